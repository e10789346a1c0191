/*-------------------------------------------------------------------------
 * http.c
 *	  Connections: read a request, hand it to its route, send the answer, go on to the next.
 *
 *     IDLE --first byte--> HEAD --whole--> BODY --whole--> RUNNING --answered--> SENDING --sent--> IDLE
 *       \___________________ refused __________________________________________/    \--close--> LINGER --> freed
 *
 * Why not evhttp (libevent 2.1): its timeouts begin anew with every byte (slowloris), it takes bare LF, folded lines and two
 * Content-Lengths, answers in HTML, bounds no connections, and learns only by writing that a client is gone.
 *
 * Sockets are watched edge-triggered, for reading and writing at once, so the end of a connection is seen whatever we
 * are doing.  A FIN alone does not say whether the client has closed, or only has no more to say and still reads (shutdown).
 * We ask: something harmless is sent, a comment in a stream or else an interim response (102), and the kernel of a client that has
 * closed answers with RST.  HTTP/1.0 knows no interim responses, so there a FIN before the answer is the end.
 *
 * Owns:     the listener, connections, requests until their last reference is gone.
 * Refuses:  by http_parse.c's rules; more than the limits in settings.def; what needs a key and has none, before its body is read.
 *
 * conn_close() may happen inside of any call that writes; the memory stays until the outermost pump() or call has returned.
 *-------------------------------------------------------------------------
 */
#include "http.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "http_parse.h"
#include "log.h"
#include "metrics.h"
#include "reply.h"
#include "routes.h"
#include "settings.h"

#define LINGER_MS 2000			/* for a client to read a refusal while it still sends */
#define REFUSED_CONNECTIONS 64	/* beyond max_connections: they are there to be told so */
#define STEPS_AT_ONCE 64		/* of one connection, before others have their turn: a client may send faster than we read */
#define BODIES_AT_ONCE 64		/* all bodies together: so many of the largest */
#define MAX_ANSWER_HEAD 2048
#define MAX_EXTRA_HEADERS 1024
#define MAX_SHOWN_NAME 100		/* of a query's parameter */

typedef enum ConnState
{
	CONN_IDLE, CONN_HEAD, CONN_BODY, CONN_RUNNING, CONN_SENDING, CONN_LINGER
} ConnState;

struct HttpConn
{
	int			fd;
	ConnState	state;
	struct event *io;
	struct event *timer;
	HttpConn   *prev;
	HttpConn   *next;

	bool		is_readable;	/* until recv() says otherwise: the watch is edge-triggered */
	bool		is_eof;			/* the client sends no more */
	bool		is_excess;		/* beyond max_connections */
	bool		is_closed;		/* freed when busy is 0 */
	int			busy;			/* calls on the stack that hold this pointer */

	char	   *in;				/* max_header_bytes; NULL while nothing has come */
	size_t		in_len;
	size_t		seen;			/* of http_head_length() */
	int			n_requests;

	HttpRequest *request;		/* from its head on until it is answered */
	HttpRequest *answered;		/* whose answer is being sent, for on_drained and the log */
	int			minor;
	bool		keep_alive;
	bool		is_chunked;
	HttpChunked chunked;
	size_t		body_left;		/* of a Content-Length */
	size_t		body_room;		/* allocated for request->body */

	struct evbuffer *out;
	bool		chunked_answer;
	bool		has_backlog;	/* was above HTTP_BACKLOG_HIGH */
	int64_t		last_progress_us;	/* the client took bytes */
	int64_t		last_sent_us;	/* we had some for it */
};

static struct event_base *loop;
static struct evconnlistener *listener;
static char address[128];
static HttpConn *conns;
static int	n_conns;
static size_t body_bytes;		/* of all requests */
static bool is_listening;		/* the listener is enabled */
static void (*when_empty) (void);	/* set: we are draining */

static void pump(HttpConn *c);
static void set_tick(HttpConn *c, int64_t now);
static void conn_close(HttpConn *c);

int
http_n_connections(void)
{
	return n_conns;
}

static void
set_timer(HttpConn *c, int64_t ms)
{
	struct timeval tv = {ms / 1000, ms % 1000 * 1000};

	event_add(c->timer, &tv);
}

/* ---- requests ------------------------------------------------------------------------------ */

HttpRequest *
http_request_ref(HttpRequest *r)
{
	r->refs++;
	return r;
}

void
http_request_unref(HttpRequest *r)
{
	if (--r->refs > 0)
		return;
	if (r->free_state)
		r->free_state(r->state);
	body_bytes -= r->charged_bytes;
	free(r->method);
	free(r->path);
	free(r->query);
	free(r->param);
	free(r->bearer);
	free(r->body);
	free(r->extra_headers);
	free(r);
}

char *
http_query(const HttpRequest *r, const char *name)
{
	size_t		len = strlen(name);

	for (const char *at = r->query; *at;)
	{
		size_t		n = strcspn(at, "&");

		if (n >= len && strncmp(at, name, len) == 0 && (n == len || at[len] == '='))
		{
			const char *value = n == len ? at + n : at + len + 1;
			char	   *decoded = malloc(n + 1);

			if (decoded && http_percent_decode(decoded, value, (size_t) (at + n - value)))
				return decoded;
			free(decoded);
			return NULL;
		}
		at += n + (at[n] == '&');
	}
	return NULL;
}

/* The line of the log and the counters.  status 499: the client was gone before the end. */
static void
request_over(HttpRequest *r, int status)
{
	int64_t		us = millm_now_us() - r->started_us;
	json_t	   *line = json_pack("{s:s, s:s, s:s, s:s, s:i, s:f}", "request_id", r->id, "method", r->method, "path", r->path,
								 "route", r->route ? r->route->pattern : "none", "status", status, "duration_ms", us / 1000.0);

	metrics_request(r, status, us);
	if (!line)
		return;
	if (r->key_name[0])
		json_object_set_new(line, "key", json_string(r->key_name));
	if (r->user[0])
		json_object_set_new(line, "user", json_string(r->user));
	if (r->error_code)
		json_object_set_new(line, "error", json_string(r->error_code));
	if (r->prompt_tokens >= 0)
		json_object_set_new(line, "prompt_tokens", json_integer(r->prompt_tokens));
	if (r->completion_tokens >= 0)
		json_object_set_new(line, "completion_tokens", json_integer(r->completion_tokens));
	/* no prompts in /api, but access tokens */
	if (settings.log_prompts && r->body_len > 0 && !r->is_api)
		json_object_set_new(line, "body", json_stringn(r->body, r->body_len));
	bridge_log("info", "request", line);
}

/* ---- sending ------------------------------------------------------------------------------- */

static const char *
reason(int status)
{
	switch (status)
	{
		case 200: return "OK";
		case 202: return "Accepted";
		case 204: return "No Content";
		case 400: return "Bad Request";
		case 401: return "Unauthorized";
		case 403: return "Forbidden";
		case 404: return "Not Found";
		case 405: return "Method Not Allowed";
		case 408: return "Request Timeout";
		case 409: return "Conflict";
		case 413: return "Content Too Large";
		case 415: return "Unsupported Media Type";
		case 417: return "Expectation Failed";
		case 429: return "Too Many Requests";
		case 431: return "Request Header Fields Too Large";
		case 499: return "Canceled";
		case 500: return "Internal Server Error";
		case 501: return "Not Implemented";
		case 502: return "Bad Gateway";
		case 503: return "Service Unavailable";
		case 504: return "Gateway Timeout";
		case 505: return "HTTP Version Not Supported";
		case 507: return "Insufficient Storage";
	}
	return "Status";
}

/* Write what the socket takes.  False: the client is gone, and the connection is closed. */
static bool
flush(HttpConn *c)
{
	bool		progress = false;

	while (evbuffer_get_length(c->out) > 0)
	{
		int			n = evbuffer_write(c->out, c->fd);

		if (n > 0)
		{
			progress = true;
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			break;
		conn_close(c);
		return false;
	}
	if (progress)
		c->last_progress_us = millm_now_us();
	if (evbuffer_get_length(c->out) > HTTP_BACKLOG_HIGH)
		c->has_backlog = true;
	else if (c->has_backlog && evbuffer_get_length(c->out) < HTTP_BACKLOG_LOW)
	{
		c->has_backlog = false;
		if (c->request && c->request->on_drained)
			c->request->on_drained(c->request);
	}
	return !c->is_closed;
}

/* Append to what is to be sent; nothing waited before, so the time without progress begins now. */
static void
put(HttpConn *c, const void *bytes, size_t len)
{
	c->last_sent_us = millm_now_us();
	if (evbuffer_get_length(c->out) == 0)
		c->last_progress_us = c->last_sent_us;
	evbuffer_add(c->out, bytes, len);
}

void
http_add_header(HttpRequest *r, const char *name, const char *value)
{
	char	   *more;

	if (asprintf(&more, "%s%s: %s\r\n", r->extra_headers ? r->extra_headers : "", name, value) < 0)
		return;
	if (strlen(more) < MAX_EXTRA_HEADERS)
	{
		free(r->extra_headers);
		r->extra_headers = more;
	}
	else
		free(more);
}

/* The head of the answer.  len -1: a stream. */
static void
put_head(HttpRequest *r, int status, const char *content_type, int64_t len)
{
	HttpConn   *c = r->conn;
	char		head[MAX_ANSWER_HEAD + MAX_EXTRA_HEADERS];
	char		date[40];
	char		length[64] = "";
	time_t		now = time(NULL);
	struct tm	utc;
	int			n;

	if (len >= 0)
		snprintf(length, sizeof(length), "Content-Length: %lld\r\n", (long long) len);
	else if (c->minor == 1)
		snprintf(length, sizeof(length), "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n");
	else
	{
		snprintf(length, sizeof(length), "Cache-Control: no-cache\r\n");
		c->keep_alive = false;	/* its end is the connection's */
	}
	c->chunked_answer = len < 0 && c->minor == 1;
	if (when_empty || c->is_excess)
		c->keep_alive = false;
	if (status == 204)
		length[0] = '\0';
	strftime(date, sizeof(date), "%a, %d %b %Y %H:%M:%S GMT", gmtime_r(&now, &utc));
	n = snprintf(head, sizeof(head), "HTTP/1.1 %d %s\r\nDate: %s\r\nX-Request-Id: %s\r\n%s%s%s%s%s%s%s%s%s%s\r\n", status, reason(status), date, r->id,
				 content_type ? "Content-Type: " : "", content_type ? content_type : "", content_type ? "\r\n" : "",
				 settings.cors_origin[0] ? "Access-Control-Allow-Origin: " : "", settings.cors_origin,
				 settings.cors_origin[0] ? "\r\nAccess-Control-Expose-Headers: X-Request-Id\r\nVary: Origin\r\n" : "",
				 length, r->extra_headers ? r->extra_headers : "",
				 c->keep_alive ? "" : "Connection: close\r\n", c->minor == 0 && c->keep_alive ? "Connection: keep-alive\r\n" : "");
	assert(n > 0 && n < (int) sizeof(head));
	put(c, head, (size_t) n);
	r->status = status;
}

/* The answer is complete: send the rest, then go on. */
static void
answered(HttpRequest *r)
{
	HttpConn   *c = r->conn;

	r->is_answered = true;
	c->busy++;
	c->request = NULL;
	c->answered = r;			/* with the connection's reference */
	c->state = CONN_SENDING;
	set_timer(c, settings.send_timeout * 1000);
	if (c->busy == 1)
		pump(c);
	if (--c->busy == 0 && c->is_closed)
		free(c);
}

void
http_reply(HttpRequest *r, int status, const char *content_type, const char *body, size_t len)
{
	if (!r->conn || r->is_answered)
		return;
	put_head(r, status, content_type, (int64_t) len);
	if (!r->is_head && len > 0)
		put(r->conn, body, len);
	answered(r);
}

void
http_stream_expect(HttpRequest *r)
{
	r->will_stream = true;
}

/* Append len bytes as one chunk; the first one begins the stream. */
static void
stream_put(HttpRequest *r, const char *bytes, size_t len)
{
	HttpConn   *c = r->conn;

	if (!r->is_streaming)
	{
		r->is_streaming = true;
		r->will_stream = true;
		put_head(r, 200, "text/event-stream; charset=utf-8", -1);
	}
	if (c->chunked_answer)
		evbuffer_add_printf(c->out, "%zx\r\n", len);
	put(c, bytes, len);
	if (c->chunked_answer)
		evbuffer_add(c->out, "\r\n", 2);
}

void
http_stream_send(HttpRequest *r, const char *events, size_t len)
{
	HttpConn   *c = r->conn;

	if (!c || r->is_answered)
		return;
	stream_put(r, events, len);
	c->busy++;
	flush(c);
	if (--c->busy == 0 && c->is_closed)
		free(c);
}

void
http_stream_end(HttpRequest *r)
{
	if (!r->conn || r->is_answered)
		return;
	if (!r->is_streaming)
		stream_put(r, ":\n\n", 3);
	if (r->conn->chunked_answer)
		evbuffer_add(r->conn->out, "0\r\n\r\n", 5);
	answered(r);
}

size_t
http_backlog(const HttpRequest *r)
{
	return r->conn ? evbuffer_get_length(r->conn->out) : 0;
}

/* A FIN has come while a request runs: is anybody still reading?  Who has closed answers this with RST. */
static void
ask_if_gone(HttpConn *c)
{
	if (c->request->is_streaming)
		stream_put(c->request, ": ?\n\n", 5);
	else if (c->minor == 1)
		put(c, "HTTP/1.1 102 Processing\r\n\r\n", 27);
	else
	{
		conn_close(c);
		return;
	}
	flush(c);
}

/* ---- the life of a connection -------------------------------------------------------------- */

static void
listen_again(void)
{
	if (listener && !is_listening && n_conns < settings.max_connections + REFUSED_CONNECTIONS)
	{
		evconnlistener_enable(listener);
		is_listening = true;
	}
}

/* At once; what runs for it is told. */
static void
conn_close(HttpConn *c)
{
	HttpRequest *r = c->request;

	if (c->is_closed)
		return;
	c->is_closed = true;
	event_free(c->io);
	event_free(c->timer);
	close(c->fd);
	evbuffer_free(c->out);
	c->out = NULL;
	free(c->in);
	*(c->prev ? &c->prev->next : &conns) = c->next;
	if (c->next)
		c->next->prev = c->prev;
	n_conns--;
	c->request = NULL;
	if (r)
	{
		r->conn = NULL;
		if (r->on_gone)
			r->on_gone(r);
		request_over(r, 499);
		http_request_unref(r);
	}
	if (c->answered)			/* all of its answer was given to the kernel, or its client went away meanwhile */
	{
		c->answered->conn = NULL;
		request_over(c->answered, c->answered->status);
		http_request_unref(c->answered);
		c->answered = NULL;
	}
	if (c->busy == 0)
		free(c);
	listen_again();
	if (when_empty && n_conns == 0)
		when_empty();
}

/* Refuse what is being read, and read no more of it. */
__attribute__((format(printf, 4, 5))) static void
refuse(HttpConn *c, int status, const char *code, const char *fmt, ...)
{
	char		message[256];
	va_list		ap;

	va_start(ap, fmt);
	vsnprintf(message, sizeof(message), fmt, ap);
	va_end(ap);
	c->keep_alive = false;
	reply_error(c->request, status, code, NULL, "%s", message);
}

/* Text of a slice; NULL for no memory. */
static char *
slice_dup(HttpSlice s)
{
	return strndup(s.at, s.len);
}

static bool
is_safe_id(HttpSlice s)
{
	if (s.len == 0 || s.len > 128)
		return false;
	for (size_t i = 0; i < s.len; i++)
		if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~:+/=@", s.at[i]) || !s.at[i])
			return false;
	return true;
}

/* A request of which nothing is known yet. */
static HttpRequest *
request_create(HttpConn *c)
{
	HttpRequest *r = calloc(1, sizeof(*r));
	unsigned char random[12];

	if (!r)
		return NULL;
	r->refs = 1;
	r->conn = c;
	r->prompt_tokens = r->completion_tokens = -1;
	r->started_us = millm_now_us();
	r->deadline_us = r->started_us + (int64_t) settings.request_timeout * 1000000;
	if (RAND_bytes(random, sizeof(random)) != 1)
		memset(random, 0, sizeof(random));
	memcpy(r->id, "req-", 5);
	for (size_t i = 0; i < sizeof(random); i++)
		snprintf(r->id + 4 + 2 * i, 3, "%02x", random[i]);
	r->method = strdup("-");
	r->path = strdup("-");
	r->query = strdup("");
	if (r->method && r->path && r->query)
		return r;
	http_request_unref(r);
	return NULL;
}

/* Take over what the head says.  False: no memory. */
static bool
take_head(HttpRequest *r, const HttpHead *head)
{
	const HttpSlice *id = http_find_header(head, "x-request-id");
	const HttpSlice *auth = http_find_header(head, "authorization");

	free(r->method);
	free(r->path);
	free(r->query);
	r->method = slice_dup(head->method);
	r->path = slice_dup(head->path);
	r->query = slice_dup(head->query);
	if (!r->method || !r->path || !r->query)
		return false;
	r->is_head = strcmp(r->method, "HEAD") == 0;
	r->is_api = strncmp(r->path, "/api/", 5) == 0;
	if (id && is_safe_id(*id))
	{
		memcpy(r->id, id->at, id->len);
		r->id[id->len] = '\0';
	}
	if (auth && auth->len > 7 && strncasecmp(auth->at, "Bearer ", 7) == 0)
	{
		HttpSlice	key = {auth->at + 7, auth->len - 7};

		while (key.len > 0 && key.at[0] == ' ')
			key.at++, key.len--;
		if (!(r->bearer = slice_dup(key)))
			return false;
	}
	else if (auth && !(r->bearer = strdup("")))	/* a scheme that is no key of ours: it is nobody's */
		return false;
	return true;
}

/* Without a key only this machine itself is served; a page of somebody's site whose name leads here is not. */
static bool
is_own_host(const HttpHead *head)
{
	const HttpSlice *host = http_find_header(head, "host");
	char		name[64];
	size_t		len;
	struct in6_addr any;

	if (!host || host->len >= sizeof(name))
		return host == NULL;
	memcpy(name, host->at, host->len);
	name[host->len] = '\0';
	if (name[0] == '[')
	{
		char	   *end = strchr(name, ']');

		if (end)
			*end = '\0';
		return inet_pton(AF_INET6, name + 1, &any) == 1;
	}
	len = strcspn(name, ":");
	name[len] = '\0';
	return strcasecmp(name, "localhost") == 0 || inet_pton(AF_INET, name, &any) == 1;
}

/* Nor is a page of another site, which a browser lets send what it may not read the answer of. */
static bool
is_own_page(const HttpHead *head)
{
	const HttpSlice *origin = http_find_header(head, "origin");

	return !origin || strcmp(settings.cors_origin, "*") == 0 || http_slice_is(*origin, settings.cors_origin);
}

static bool
is_json(const HttpHead *head)
{
	const HttpSlice *type = http_find_header(head, "content-type");
	HttpSlice	bare;
	const char *semicolon;

	if (!type)
		return false;
	bare = *type;
	if ((semicolon = memchr(bare.at, ';', bare.len)) != NULL)
		bare.len = (size_t) (semicolon - bare.at);
	while (bare.len > 0 && (bare.at[bare.len - 1] == ' ' || bare.at[bare.len - 1] == '\t'))
		bare.len--;
	return http_slice_is(bare, "application/json");
}

static void
preflight(HttpRequest *r)
{
	http_add_header(r, "Access-Control-Allow-Methods", "GET, POST, DELETE");
	http_add_header(r, "Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id, X-Stainless-Arch, X-Stainless-Lang, "
					"X-Stainless-OS, X-Stainless-Package-Version, X-Stainless-Retry-Count, X-Stainless-Runtime, X-Stainless-Runtime-Version, X-Stainless-Timeout");
	http_add_header(r, "Access-Control-Max-Age", "600");
	http_reply(r, 204, NULL, NULL, 0);
}

/* The first name in the query that the route does not know, and how much of it to show; NULL: there is none. */
static const char *
unknown_query(const HttpRequest *r, int *len)
{
	for (const char *at = r->query; *at; at += *at == '&')
	{
		size_t		n = strcspn(at, "=&");

		if (!r->route->query || n != strlen(r->route->query) || strncmp(at, r->route->query, n) != 0)
		{
			*len = n < MAX_SHOWN_NAME ? (int) n : MAX_SHOWN_NAME;
			return at;
		}
		at += strcspn(at, "&");
	}
	return NULL;
}

/*
 * A whole head has come: everything that can be refused without the body is refused here.  The request is answered, or the
 * connection is in state BODY afterwards.
 */
static void
begin_request(HttpConn *c, const HttpHead *head)
{
	HttpRequest *r = c->request;
	const char *param;
	size_t		param_len;
	char		allowed[64];
	const char *unknown;
	int			unknown_len;

	c->minor = head->minor;
	c->keep_alive = head->keep_alive;
	c->is_chunked = head->chunked;
	c->body_left = head->content_length > 0 ? (size_t) head->content_length : 0;
	c->body_room = 0;
	memset(&c->chunked, 0, sizeof(c->chunked));
	if (!take_head(r, head))
	{
		refuse(c, 503, "out_of_memory", "The bridge is out of memory.");
		return;
	}
	if (c->is_excess)
	{
		refuse(c, 503, "too_many_connections", "There are more than max_connections = %d connections.", settings.max_connections);
		return;
	}
	r->route = route_find(r->method, r->path, &param, &param_len, allowed, sizeof(allowed));
	if (!r->route && strcmp(r->method, "OPTIONS") == 0 && settings.cors_origin[0] && !head->chunked && c->body_left == 0)
	{
		preflight(r);
		return;
	}
	if (!r->route && allowed[0])
	{
		http_add_header(r, "Allow", allowed);
		refuse(c, 405, "method_not_allowed", "The methods of this path are %s.", allowed);
		return;
	}
	if (!r->route)
	{
		refuse(c, 404, "not_found", "There is nothing at this path; /openapi.json lists what there is.");
		return;
	}
	if (!(r->route->flags & ROUTE_OPEN) && (unknown = unknown_query(r, &unknown_len)) != NULL)
	{
		refuse(c, 400, "unknown_parameter", "Parameter \"%.*s\" is not one of this path.", unknown_len, unknown);
		return;
	}
	if (param && (!(r->param = malloc(param_len + 1)) || !http_percent_decode(r->param, param, param_len)))
	{
		refuse(c, 400, "invalid_path", "The path is not percent-encoded UTF-8.");
		return;
	}
	if (!(r->route->flags & ROUTE_OPEN) && !r->bearer && !settings.anonymous_role[0])
	{
		refuse(c, 401, "missing_api_key", "The request has no API key. Send \"Authorization: Bearer millm-...\"; millm.create_api_key() makes one.");
		return;
	}
	if (!(r->route->flags & ROUTE_OPEN) && !r->bearer && !is_own_host(head))
	{
		refuse(c, 403, "host_not_allowed", "Without a key, the bridge must be addressed as localhost or by an IP address.");
		return;
	}
	if (!(r->route->flags & ROUTE_OPEN) && !r->bearer && !is_own_page(head))
	{
		refuse(c, 403, "origin_not_allowed", "Without a key, no page of another site than cors_origin is answered.");
		return;
	}
	if ((c->is_chunked || c->body_left > 0) && !is_json(head))
	{
		refuse(c, 415, "unsupported_media_type", "The body must be JSON: send \"Content-Type: application/json\".");
		return;
	}
	if (c->body_left > (size_t) settings.max_body_bytes)
	{
		refuse(c, 413, "body_too_large", "The body has %zu bytes; max_body_bytes is %d.", c->body_left, settings.max_body_bytes);
		return;
	}
	if (head->expects_continue && (c->is_chunked || c->body_left > 0))
		put(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
	c->state = CONN_BODY;
	set_timer(c, settings.body_timeout * 1000);
}

/* Append to the body.  False: refused. */
static bool
take_body(HttpConn *c, const char *bytes, size_t len)
{
	HttpRequest *r = c->request;

	if (len > (size_t) settings.max_body_bytes - r->body_len)
	{
		refuse(c, 413, "body_too_large", "The body has more than max_body_bytes = %d bytes.", settings.max_body_bytes);
		return false;
	}
	if (body_bytes + len > (size_t) settings.max_body_bytes * BODIES_AT_ONCE)
	{
		refuse(c, 503, "too_many_bodies", "Too many large requests are being read.");
		return false;
	}
	if (r->body_len + len + 1 > c->body_room)
	{
		size_t		room = 2 * (r->body_len + len) + 1;
		char	   *larger = realloc(r->body, room);

		if (!larger)
		{
			refuse(c, 503, "out_of_memory", "The bridge is out of memory.");
			return false;
		}
		r->body = larger;
		c->body_room = room;
	}
	memcpy(r->body + r->body_len, bytes, len);
	r->body_len += len;
	r->body[r->body_len] = '\0';
	r->charged_bytes += len;
	body_bytes += len;
	return true;
}

static void
consume(HttpConn *c, size_t n)
{
	c->in_len -= n;
	memmove(c->in, c->in + n, c->in_len);
}

static void
run_request(HttpConn *c)
{
	HttpRequest *r = c->request;

	c->state = CONN_RUNNING;
	c->last_sent_us = millm_now_us();
	set_tick(c, c->last_sent_us);
	http_request_ref(r);
	r->route->handle(r);
	if (!settings.log_prompts)
	{
		free(r->body);
		r->body = NULL;
		r->body_len = 0;
	}
	if (c->is_eof && c->request == r && !c->is_closed)
		ask_if_gone(c);
	http_request_unref(r);
}

/* Use up what has been read.  False: more must come, or the connection is busy with something else than reading. */
static bool
advance(HttpConn *c)
{
	HttpRefusal refusal;

	if (c->state == CONN_IDLE || c->state == CONN_HEAD)
	{
		HttpHead	head;
		int64_t		n;

		while (c->seen == 0 && c->in_len >= 2 && memcmp(c->in, "\r\n", 2) == 0)
			consume(c, 2);		/* RFC 9112 2.2: an empty line before a request */
		if (c->in_len == 0)
			return false;
		if (c->state == CONN_IDLE)
		{
			c->state = CONN_HEAD;
			set_timer(c, settings.header_timeout * 1000);
		}
		n = http_head_length(c->in, c->in_len, &c->seen, &refusal);
		if (n == 0 && c->in_len < (size_t) settings.max_header_bytes)
			return false;
		if (!(c->request = request_create(c)))
		{
			conn_close(c);
			return false;
		}
		c->seen = 0;
		c->n_requests++;
		if (n == 0)
			refuse(c, 431, "headers_too_large", "The request line and the headers have more than max_header_bytes = %d bytes.", settings.max_header_bytes);
		else if (n < 0 || !http_parse_head(c->in, (size_t) n, &head, &refusal))
			refuse(c, refusal.status, "malformed_request", "The request cannot be read: %s.", refusal.why);
		else
		{
			begin_request(c, &head);
			consume(c, (size_t) n);
		}
		return !c->is_closed;
	}
	if (c->state == CONN_BODY && c->is_chunked)
	{
		size_t		at = 0;
		size_t		used;
		const char *body;
		size_t		len;
		HttpChunkResult result;

		while ((result = http_read_chunked(&c->chunked, c->in + at, c->in_len - at, &used, &body, &len, &refusal)) == HTTP_CHUNK_DATA)
		{
			if (!take_body(c, body, len))
				return !c->is_closed;
			at += used;
		}
		consume(c, at + used);
		if (result == HTTP_CHUNK_MORE)
			return false;
		if (result == HTTP_CHUNK_END)
			run_request(c);
		else
			refuse(c, refusal.status, "malformed_request", "The request cannot be read: %s.", refusal.why);
		return !c->is_closed;
	}
	if (c->state == CONN_BODY)
	{
		size_t		n = c->in_len < c->body_left ? c->in_len : c->body_left;

		if (n > 0)
		{
			if (!take_body(c, c->in, n))
				return !c->is_closed;
			consume(c, n);
			c->body_left -= n;
		}
		if (c->body_left > 0)
			return false;
		run_request(c);
		return !c->is_closed;
	}
	if (c->state == CONN_SENDING && evbuffer_get_length(c->out) == 0)
	{
		HttpRequest *r = c->answered;

		c->answered = NULL;
		r->conn = NULL;
		request_over(r, r->status);
		http_request_unref(r);
		if (c->keep_alive && !when_empty)
		{
			c->state = CONN_IDLE;
			set_timer(c, settings.idle_timeout * 1000);
			return true;
		}
		if (c->is_eof)
		{
			conn_close(c);
			return false;
		}
		shutdown(c->fd, SHUT_WR);
		c->state = CONN_LINGER;
		set_timer(c, LINGER_MS);
		return true;
	}
	if (c->state == CONN_LINGER)
		c->in_len = 0;
	return false;
}

/* Read what is there and fits.  False: nothing more now. */
static bool
fill(HttpConn *c)
{
	while (c->is_readable && !c->is_eof && c->in_len < (size_t) settings.max_header_bytes)
	{
		ssize_t		n;

		if (!c->in && !(c->in = malloc((size_t) settings.max_header_bytes)))
		{
			conn_close(c);
			return false;
		}
		n = recv(c->fd, c->in + c->in_len, (size_t) settings.max_header_bytes - c->in_len, 0);
		if (n > 0)
		{
			c->in_len += (size_t) n;
			return true;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			c->is_readable = false;
		else if (n == 0)
			c->is_eof = true;
		else
			conn_close(c);
		return false;
	}
	return false;
}

/* Do all that can be done now, but no more than is fair to others.  The caller holds c->busy. */
static void
pump(HttpConn *c)
{
	for (int steps = 0;; steps++)
	{
		if (!flush(c))
			return;
		if (steps == STEPS_AT_ONCE)
		{
			/* an edge-triggered watch that is added anew tells of what is there already: in the loop's next turn */
			if (event_del(c->io) != 0 || event_add(c->io, NULL) != 0)
				conn_close(c);
			return;
		}
		if (advance(c))
			continue;
		if (c->is_closed)
			return;
		if (!fill(c))
			break;
	}
	if (c->is_closed)
		return;
	if (c->is_eof && (c->state == CONN_IDLE || c->state == CONN_HEAD || c->state == CONN_BODY || c->state == CONN_LINGER))
		conn_close(c);			/* what has begun will never be whole */
	else if (c->in_len == 0 && c->in && (c->state == CONN_IDLE || c->state == CONN_RUNNING))
	{
		free(c->in);			/* most connections wait most of the time */
		c->in = NULL;
	}
}

static void
on_io(evutil_socket_t fd, short what, void *arg)
{
	HttpConn   *c = arg;
	const bool	was_eof = c->is_eof;
	int			error = 0;
	socklen_t	size = sizeof(error);

	c->busy++;
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error != 0)
		conn_close(c);
	else
	{
		if (what & (EV_READ | EV_CLOSED))
			c->is_readable = true;
		pump(c);
		/* EV_CLOSED: a FIN, which may stand behind bytes that there is no room for yet */
		if (!c->is_closed && c->request && c->state == CONN_RUNNING && !was_eof && (c->is_eof || (what & EV_CLOSED)))
			ask_if_gone(c);
	}
	if (--c->busy == 0 && c->is_closed)
		free(c);
}

/* When tick() has something to do next: the client has not read for send_timeout, or nothing was sent for keepalive_interval. */
static void
set_tick(HttpConn *c, int64_t now)
{
	const bool	is_behind = evbuffer_get_length(c->out) > 0;
	int64_t		due = is_behind ? c->last_progress_us + (int64_t) settings.send_timeout * 1000000
		: c->last_sent_us + (int64_t) settings.keepalive_interval * 1000000;
	const int64_t soonest = (int64_t) (settings.keepalive_interval < settings.send_timeout ? settings.keepalive_interval : settings.send_timeout) * 1000000;

	/* the two change over as bytes come and go, which sets no timer: look at least this often */
	if (due > now + soonest)
		due = now + soonest;
	set_timer(c, due > now ? (due - now) / 1000 + 1 : 1);
}

/* A request runs: is the client there, and does it know that we are? */
static void
tick(HttpConn *c, int64_t now)
{
	if (evbuffer_get_length(c->out) > 0)
	{
		if (now - c->last_progress_us >= (int64_t) settings.send_timeout * 1000000)
			conn_close(c);
	}
	else if (now - c->last_sent_us >= (int64_t) settings.keepalive_interval * 1000000)
	{
		c->last_sent_us = now;
		if (c->request->will_stream)
			stream_put(c->request, ": keep-alive\n\n", 14);
		else if (c->is_eof)
			ask_if_gone(c);
		if (!c->is_closed)
			flush(c);
	}
	if (!c->is_closed)
		set_tick(c, now);
}

static void
on_timer(evutil_socket_t fd, short what, void *arg)
{
	HttpConn   *c = arg;
	int64_t		now = millm_now_us();

	(void) fd;
	(void) what;
	c->busy++;
	switch (c->state)
	{
		case CONN_HEAD:
			if ((c->request = request_create(c)) != NULL)
			{
				c->seen = 0;
				refuse(c, 408, "request_timeout", "The head of the request did not come within header_timeout = %d s.", settings.header_timeout);
				pump(c);
			}
			else
				conn_close(c);
			break;
		case CONN_BODY:
			refuse(c, 408, "request_timeout", "The body of the request did not come within body_timeout = %d s.", settings.body_timeout);
			pump(c);
			break;
		case CONN_RUNNING:
			tick(c, now);
			break;
		case CONN_SENDING:
			if (now - c->last_progress_us < (int64_t) settings.send_timeout * 1000000)
			{
				set_timer(c, settings.send_timeout * 1000 - (now - c->last_progress_us) / 1000 + 1);
				break;
			}
			conn_close(c);
			break;
		case CONN_IDLE:
		case CONN_LINGER:
			conn_close(c);
			break;
	}
	if (--c->busy == 0 && c->is_closed)
		free(c);
}

static void
on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *sa, int len, void *arg)
{
	HttpConn   *c = calloc(1, sizeof(*c));
	const int	one = 1;
	const int	unsent = HTTP_BACKLOG_HIGH;
	const unsigned patience_ms = (unsigned) settings.send_timeout * 1000;

	(void) l;
	(void) sa;
	(void) len;
	(void) arg;
	if (!c)
	{
		close(fd);
		return;
	}
	c->fd = fd;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	/* else the kernel keeps megabytes for a client that does not read */
	setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof(unsent));
	/* a machine that has lost its power says no good-bye: it is asked, and must take what is sent */
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &settings.send_timeout, sizeof(settings.send_timeout));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &settings.send_timeout, sizeof(settings.send_timeout));
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof(patience_ms));
	c->out = evbuffer_new();
	c->io = event_new(loop, fd, EV_READ | EV_WRITE | EV_CLOSED | EV_ET | EV_PERSIST, on_io, c);
	c->timer = event_new(loop, -1, 0, on_timer, c);
	if (!c->out || !c->io || !c->timer || event_add(c->io, NULL) < 0)
	{
		if (c->out)
			evbuffer_free(c->out);
		if (c->io)
			event_free(c->io);
		if (c->timer)
			event_free(c->timer);
		close(fd);
		free(c);
		return;
	}
	c->last_sent_us = c->last_progress_us = millm_now_us();
	c->next = conns;
	if (conns)
		conns->prev = c;
	conns = c;
	c->is_excess = ++n_conns > settings.max_connections;
	if (n_conns >= settings.max_connections + REFUSED_CONNECTIONS)
	{
		evconnlistener_disable(listener);
		is_listening = false;
	}
	set_timer(c, settings.header_timeout * 1000);	/* who connects has something to say */
}

static void
on_accept_error(struct evconnlistener *l, void *arg)
{
	(void) l;
	(void) arg;
	/* out of descriptors, most likely: the next connection that ends makes room */
	bridge_log("error", "accept", json_pack("{s:s}", "message", strerror(errno)));
	if (n_conns > 0)
	{
		evconnlistener_disable(listener);
		is_listening = false;
	}
}

/* ---- listening ----------------------------------------------------------------------------- */

/* settings.listen, ADDRESS:PORT or [ADDRESS]:PORT, as an address of *size bytes. */
static bool
parse_listen(struct sockaddr_storage *ss, int *size)
{
	const char *colon = strrchr(settings.listen, ':');
	struct sockaddr_in *v4 = (struct sockaddr_in *) ss;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *) ss;
	char		host[INET6_ADDRSTRLEN + 2];
	size_t		len;
	char	   *end;
	long		port;

	if (!colon || (len = (size_t) (colon - settings.listen)) >= sizeof(host))
		return false;
	port = strtol(colon + 1, &end, 10);
	if (end == colon + 1 || *end || port < 0 || port > 65535)
		return false;
	memset(ss, 0, sizeof(*ss));
	memcpy(host, settings.listen, len);
	host[len] = '\0';
	if (host[0] == '[' && host[len - 1] == ']')
	{
		host[len - 1] = '\0';
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons((uint16_t) port);
		*size = sizeof(*v6);
		return inet_pton(AF_INET6, host + 1, &v6->sin6_addr) == 1;
	}
	v4->sin_family = AF_INET;
	v4->sin_port = htons((uint16_t) port);
	*size = sizeof(*v4);
	return inet_pton(AF_INET, host, &v4->sin_addr) == 1;
}

bool
http_is_loopback(void)
{
	struct sockaddr_storage ss;
	int			size;

	if (!parse_listen(&ss, &size))
		return false;
	if (ss.ss_family == AF_INET)
		return ntohl(((struct sockaddr_in *) &ss)->sin_addr.s_addr) >> 24 == 127;
	return IN6_IS_ADDR_LOOPBACK(&((struct sockaddr_in6 *) &ss)->sin6_addr);
}

bool
http_open(struct event_base *base, char *why, size_t size)
{
	struct sockaddr_storage ss;
	int			len;
	socklen_t	ss_len = sizeof(ss);
	char		host[INET6_ADDRSTRLEN];

	loop = base;
	if (!parse_listen(&ss, &len))
	{
		snprintf(why, size, "listen is ADDRESS:PORT with an IP address, not \"%s\"", settings.listen);
		return false;
	}
	listener = evconnlistener_new_bind(base, on_accept, NULL, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE, 1024,
									   (struct sockaddr *) &ss, len);
	if (!listener || getsockname(evconnlistener_get_fd(listener), (struct sockaddr *) &ss, &ss_len) != 0)
	{
		snprintf(why, size, "could not listen on %s: %s", settings.listen, strerror(errno));
		return false;
	}
	evconnlistener_set_error_cb(listener, on_accept_error);
	is_listening = true;
	if (ss.ss_family == AF_INET)
		snprintf(address, sizeof(address), "%s:%d", inet_ntop(AF_INET, &((struct sockaddr_in *) &ss)->sin_addr, host, sizeof(host)),
				 ntohs(((struct sockaddr_in *) &ss)->sin_port));
	else
		snprintf(address, sizeof(address), "[%s]:%d", inet_ntop(AF_INET6, &((struct sockaddr_in6 *) &ss)->sin6_addr, host, sizeof(host)),
				 ntohs(((struct sockaddr_in6 *) &ss)->sin6_port));
	return true;
}

const char *
http_address(void)
{
	return address;
}

void
http_drain(void (*on_empty) (void))
{
	HttpConn   *next;

	when_empty = on_empty;
	if (listener)
		evconnlistener_free(listener);
	listener = NULL;
	if (n_conns == 0)
		on_empty();
	for (HttpConn *c = conns; c; c = next)
	{
		next = c->next;
		if (c->state == CONN_IDLE || c->state == CONN_LINGER)
			conn_close(c);
	}
}

void
http_abort(void)
{
	HttpConn   *next;

	for (HttpConn *c = conns; c; c = next)
	{
		HttpRequest *r = c->state == CONN_RUNNING ? c->request : NULL;

		next = c->next;
		c->busy++;
		if (r)
		{
			http_request_ref(r);
			reply_error(r, 503, "shutting_down", NULL, "The bridge is shutting down.");
			if (r->on_gone)
				r->on_gone(r);	/* nobody waits for the work any more */
			http_request_unref(r);
		}
		if (!c->is_closed)
			flush(c);
		conn_close(c);
		if (--c->busy == 0)
			free(c);
	}
}
