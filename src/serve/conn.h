/*
 * conn.h -- what serve.c and conn.c share: the loop, and one client's conversation.
 *
 * The loop's thread owns the sockets, the events and everything incoming.  The outgoing buffers
 * of all connections are guarded by one lock, because any thread may answer; a thread that
 * appended puts the connection on the dirty list and, at once or when it has no more, wakes the loop,
 * which alone writes to sockets.
 */
#ifndef MILLM_CONN_H
#define MILLM_CONN_H

#include <event2/event.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "serve.h"

/* What all clients together may have us hold of requests that are still arriving. */
#define SERVE_MAX_INCOMING_BYTES	((size_t) 256 << 20)
/* A client that reads nothing of its final answer for so long is dropped. */
#define SERVE_LINGER_S				30

typedef struct Server
{
	const MillmService *service;
	struct event_base *base;
	int			wake_fd;			/* eventfd: the dirty list is to be flushed */
	MillmConn  *conns;				/* all of them; the loop's */
	int			n_conns;
	size_t		incoming_bytes;		/* capacity of all incoming buffers; the loop's */
	bool		ended;				/* on_shutdown has returned: the service hears nothing more */
	void		(*on_stop_request) (struct Server *server);	/* {"op":"shutdown"} came */

	pthread_mutex_t lock;
	MillmConn  *dirty;				/* under lock: to be flushed, linked by next_dirty */
	bool		is_woken;			/* under lock: the loop has been told of them */
} Server;

typedef enum ConnState
{
	CONN_HELLO,					/* the client's HELLO is awaited */
	CONN_REQUEST,				/* its request is awaited */
	CONN_BUSY					/* the request, or our refusal, is on its way to an answer */
} ConnState;

struct MillmConn
{
	Server	   *server;
	atomic_int	refs;
	void	   *data;				/* the service's */

	/* the loop's */
	int			fd;
	ConnState	state;
	bool		delivered;			/* the service has seen the request */
	struct event *readable;
	struct event *writable;
	struct event *timer;
	MillmConn  *prev;
	MillmConn  *next;
	unsigned char *in;
	size_t		n_in;
	size_t		in_capacity;

	/* under server->lock */
	unsigned char *out;				/* out[out_start .. out_end) is yet to be written */
	size_t		out_start;
	size_t		out_end;
	size_t		out_capacity;
	int64_t		blocked_since_ms;	/* when the client last took nothing; 0: it keeps up */
	bool		answered;			/* a RESULT or ERROR is in the buffer, or was */
	bool		overflowed;			/* the producer ignored the limit: drop the client */
	bool		closed;
	bool		is_dirty;
	MillmConn  *next_dirty;
};

/* Begin a conversation on the accepted, non-blocking fd; closes fd when it cannot. */
extern void conn_open(Server *server, int fd);
/* Flush every connection that other threads appended to. */
extern void conn_flush_dirty(Server *server);
/* End the conversation now; the service hears of it when its answer was not complete. */
extern void conn_close(MillmConn *conn);

#endif
