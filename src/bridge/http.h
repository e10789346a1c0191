/*
 * http.h -- HTTP/1.1 over sockets of one event loop: a connection reads one request, hands it to its route, sends the answer,
 * goes on to the next.
 *
 * Everything runs on the loop's thread and nothing blocks.  A handler answers now or later, with one http_reply() or with a
 * stream (http_stream_send() ... http_stream_end()).  What answers later holds a reference to the request: the client may go
 * away at any time, after which the functions below do nothing, and on_gone is called once.
 *
 * Memory is bounded: a connection holds at most a head, a body, and of its answer what it has not read yet, which
 * http_backlog() tells: who streams must pause above HTTP_BACKLOG_HIGH and go on at on_drained.
 */
#ifndef MILLM_BRIDGE_HTTP_H
#define MILLM_BRIDGE_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct event_base;

#define HTTP_BACKLOG_HIGH 65536
#define HTTP_BACKLOG_LOW 16384

typedef struct HttpRequest HttpRequest;
typedef struct HttpConn HttpConn;

typedef enum RouteFlags
{
	ROUTE_OPEN = 1,				/* needs no key */
	ROUTE_STREAM = 2			/* always answers with a stream; so it has no HEAD */
} RouteFlags;

/* One line of the table in routes.c. */
typedef struct Route
{
	const char *method;
	const char *pattern;		/* "/v1/models/{id}"; a last segment {id*} is the rest of the path */
	void		(*handle) (HttpRequest *r);
	unsigned	flags;
	const char *query;			/* the parameter that may follow the path's '?'; NULL: none may */
} Route;

struct HttpRequest
{
	/* What was asked.  Read only; terminated strings that live as long as the request. */
	const Route *route;			/* NULL while it is not found: the answer is then http.c's */
	bool		is_api;			/* /api/...: errors have that envelope */
	bool		is_head;
	char	   *method;
	char	   *path;			/* still percent-encoded */
	char	   *query;			/* "" if there is none; still percent-encoded */
	char	   *param;			/* decoded, what stood for {id}; NULL if the pattern has none */
	char	   *bearer;			/* the key; NULL if there is no Authorization */
	char	   *body;			/* terminated; may hold zero bytes.  Gone after handle(), unless it is to be logged */
	size_t		body_len;
	char		id[129];		/* X-Request-Id */
	int64_t		started_us;		/* millm_now_us() */
	int64_t		deadline_us;	/* request_timeout is over; a stream without an end puts it off */

	/* For the log line and the metrics; filled by who knows. */
	char		key_name[64];
	char		user[128];
	int64_t		prompt_tokens;	/* -1: not known */
	int64_t		completion_tokens;
	const char *error_code;		/* a static string; NULL: none */

	/* Of the answer. */
	bool		is_streaming;	/* the head of a stream is sent: an error can only be an event now */
	bool		is_answered;
	int			status;			/* once is_streaming or is_answered */

	/* The handler's.  free_state is called with the last reference. */
	void	   *state;
	void		(*free_state) (void *state);

	/* Of who works for the request (db.c, events.c).  Either may be NULL. */
	void	   *work;
	void		(*on_gone) (HttpRequest *r);	/* the client is gone: stop the work.  Called at most once; may come from within any function below */
	void		(*on_drained) (HttpRequest *r);	/* the backlog has fallen below HTTP_BACKLOG_LOW */

	bool		had_turn;		/* db.c's: a further statement of this request is not refused for a full queue */

	/* http.c's own. */
	HttpConn   *conn;			/* NULL: the client is gone */
	int			refs;
	char	   *extra_headers;	/* whole lines; NULL: none */
	size_t		charged_bytes;	/* of its body, counted until the request ends: what was made of it lives that long */
	bool		will_stream;
};

extern HttpRequest *http_request_ref(HttpRequest *r);
extern void http_request_unref(HttpRequest *r);

/* The value of name in the query, decoded: the caller's to free; NULL if there is none or it is malformed. */
extern char *http_query(const HttpRequest *r, const char *name);

/* Add a header to the answer that is still to come. */
extern void http_add_header(HttpRequest *r, const char *name, const char *value);

/* The whole answer.  content_type NULL: there is no body. */
extern void http_reply(HttpRequest *r, int status, const char *content_type, const char *body, size_t len);

/*
 * Server-Sent Events.  After http_stream_expect() a client that waits for long gets 200 and a comment, and later ones.
 * The first http_stream_send() begins the stream, if that has not happened.  len bytes of whole events.
 */
extern void http_stream_expect(HttpRequest *r);
extern void http_stream_send(HttpRequest *r, const char *events, size_t len);
extern void http_stream_end(HttpRequest *r);
/* Bytes that wait for the client to read. */
extern size_t http_backlog(const HttpRequest *r);

/*
 * Listen on settings.listen and answer from then on.  Returns false and fills why when that cannot be.
 * http_address() is the address in use, its port resolved.
 */
extern bool http_open(struct event_base *base, char *why, size_t size);
extern const char *http_address(void);
/* Does settings.listen name a loopback address? */
extern bool http_is_loopback(void);

/* Accept no more, close what is idle; when the last connection has ended, on_empty is called. */
extern void http_drain(void (*on_empty) (void));
/* End what is still running, with an error that says so. */
extern void http_abort(void);

extern int	http_n_connections(void);

#endif
