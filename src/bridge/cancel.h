/*
 * cancel.h -- PQcancel() on threads of its own, since it opens a connection and waits (before PostgreSQL 17 there is no other).
 */
#ifndef MILLM_BRIDGE_CANCEL_H
#define MILLM_BRIDGE_CANCEL_H

#include <libpq-fe.h>
#include <stdbool.h>

struct event_base;

/* Start the threads.  on_done is called on the loop's thread, once for each cancel_send(), with its arg. */
extern bool cancel_open(struct event_base *base, void (*on_done) (void *arg));

/* Cancel what conn runs.  False: there is no memory, and on_done will not be called.  conn may be finished meanwhile; arg must live. */
extern bool cancel_send(PGconn *conn, void *arg);

/* After this nobody is told. */
extern void cancel_close(void);

#endif
