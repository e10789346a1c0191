/*
 * serve.h -- what the two helper programs share: the life of a process under the supervisor, and
 * an event loop that speaks the wire protocol on a Unix socket.
 *
 * One thread runs the loop.  Other threads answer through millm_conn_send*(), which are thread-safe:
 * they append to the connection's bounded outgoing buffer and wake the loop.  A connection is
 * reference-counted; its client may go away at any time, which sets it closed and calls on_close once.
 */
#ifndef MILLM_SERVE_H
#define MILLM_SERVE_H

#include <stdbool.h>
#include <stddef.h>
#include <jansson.h>

#include "error.h"
#include "wire.h"

typedef struct MillmConn MillmConn;

typedef struct MillmService
{
	const char *program;		/* "millm-engine" */
	/*
	 * A client's whole request has come; request is borrowed for the call (json_incref to keep it).  Called on the loop's
	 * thread: must not block.  Answer now or later, from any thread, with exactly one
	 * millm_conn_result() or millm_conn_error().
	 */
	void		(*on_request) (void *arg, MillmConn *conn, json_t *request);
	/* The client went away (or stalled for too long) before its answer was complete.  Loop's thread. */
	void		(*on_close) (void *arg, MillmConn *conn);
	/* The supervisor is gone or asked for the end: stop work, free, return.  Loop's thread. */
	void		(*on_shutdown) (void *arg);
	/* The last reference to a connection whose data is set is gone: free the data.  Any thread.  May be NULL. */
	void		(*on_free) (void *arg, MillmConn *conn);
	void	   *arg;
} MillmService;

/* Limits of the loop. */
#define MILLM_SERVE_MAX_CONNECTIONS 1024
#define MILLM_SERVE_HELLO_TIMEOUT_S 10	/* from connect to the whole request */

/*
 * To be called before the program opens descriptors: fd 3 is the supervisor's line if it is a socket.
 * {"op":"shutdown"} is answered here; all other requests go to on_request.  When on_shutdown
 * returns, no other thread may hold a connection.
 *
 * Set up the process (signals, PR_SET_PDEATHSIG, oom_score_adj when raise_oom_score), listen on
 * socket_path, tell fd 3 that we are ready, run until shutdown.  Returns the exit status.
 */
extern int	millm_serve(const MillmService *service, const char *socket_path, bool raise_oom_score);

extern MillmConn *millm_conn_ref(MillmConn *conn);
extern void millm_conn_unref(MillmConn *conn);
extern bool millm_conn_is_closed(MillmConn *conn);
extern void millm_conn_set_data(MillmConn *conn, void *data);	/* for the service */
extern void *millm_conn_data(MillmConn *conn);
/*
 * Queue a frame.  payload is a new reference, taken.  send returns false when the client is gone.
 * The outgoing buffer of a client that does not read is bounded: millm_conn_pending_bytes() tells the producer
 * to pause; millm_conn_stalled_ms() for how long nothing could be written.
 */
extern bool millm_conn_send(MillmConn *conn, WireKind kind, json_t *payload);
extern bool millm_conn_send_bytes(MillmConn *conn, WireKind kind, const void *payload, size_t len);
/*
 * The same in two parts, for who has something for many clients: what is queued waits until the loop, which is woken
 * once then, is told of one of them, or of anything else.
 */
extern bool millm_conn_queue_bytes(MillmConn *conn, WireKind kind, const void *payload, size_t len);
extern void millm_conn_flush(MillmConn *conn);
extern void millm_conn_result(MillmConn *conn, json_t *payload);		/* final */
extern void millm_conn_error(MillmConn *conn, const MillmError *error);	/* final */
/* The payload of an ERROR, to which a service may add fields; a new reference. */
extern json_t *millm_error_json(const MillmError *error);
extern size_t millm_conn_pending_bytes(MillmConn *conn);
extern int	millm_conn_stalled_ms(MillmConn *conn);

/*
 * Strict reading of a request's fields.  Begin with a reader over the object, get each field the op
 * knows, then end: a field that nobody asked for is INVALID_ARGUMENT naming it.  The first error stays.
 * A missing or null field leaves *out as it was (its default).
 */
typedef struct MillmFields
{
	json_t	   *object;
	const char *seen[48];
	int			n_seen;
	MillmCode	code;
	MillmError *err;
} MillmFields;

extern void millm_fields_begin(MillmFields *f, json_t *object, MillmError *err);
extern void millm_field_string(MillmFields *f, const char *name, const char **out);		/* borrowed; no NUL inside */
extern void millm_field_text(MillmFields *f, const char *name, const char **out, size_t *len);	/* NUL allowed */
extern void millm_field_int(MillmFields *f, const char *name, int64_t min, int64_t max, int64_t *out);
extern void millm_field_double(MillmFields *f, const char *name, double min, double max, double *out);
extern void millm_field_bool(MillmFields *f, const char *name, bool *out);
extern void millm_field_array(MillmFields *f, const char *name, json_t **out);			/* borrowed */
extern void millm_field_object(MillmFields *f, const char *name, json_t **out);			/* borrowed */
extern MillmCode millm_fields_end(MillmFields *f);

/* One line to the supervisor's log: "LEVEL text".  level is "LOG", "WARNING", "ERROR" or "DEBUG". */
extern void millm_log(const char *level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
