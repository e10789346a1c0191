/*
 * db.h -- requests as SQL: a pool of connections, and a bounded queue before it.
 *
 * A call runs one constant statement for a request, as the role of the request's key, in a transaction of its own:
 *
 *     BEGIN; SELECT set_config('role', ...) ... FROM millm.authenticate(key's hash);      one round trip
 *     the statement with its parameters; COMMIT;                                          another
 *     DISCARD ALL                                                                         when the answer has gone
 *
 * No text of a client ever becomes SQL: a parameter is a value.  Rows come one by one; while the client's backlog is high the
 * connection is not read.  When the client is gone the statement is canceled, by a thread, since PQcancel() blocks.
 */
#ifndef MILLM_BRIDGE_DB_H
#define MILLM_BRIDGE_DB_H

#include <libpq-fe.h>
#include <stdbool.h>

#include "http.h"

struct event_base;

#define DB_MAX_PARAMS 32

/* Why a statement failed. */
typedef struct DbError
{
	int			status;			/* HTTP's */
	const char *code;			/* a static string: a name of errors.def in OpenAI's letters, or OpenAI's own */
	const char *message;		/* whole sentences: message, detail and hint; for what is not the client's business it says so */
} DbError;

typedef struct DbCall DbCall;
struct DbCall
{
	const char *sql;			/* constant */
	int			n_params;
	char	   *params[DB_MAX_PARAMS];	/* text format; NULL is NULL */

	/* A key may limit tokens: the number of the parameter that asks for them (-1: none), and for how many choices. */
	int			max_tokens_param;
	int			n_choices;

	/* row: one row, number 0 of it.  Not called when the client is gone.  NULL: no row matters. */
	void		(*on_row) (HttpRequest *r, const PGresult *row);
	/* Once, when the transaction has been committed (error NULL) or has failed.  Not called when the client is gone. */
	void		(*on_done) (HttpRequest *r, const DbError *error);
};

/* sql must live for ever.  NULL when there is no memory. */
extern DbCall *db_call(const char *sql, void (*on_row) (HttpRequest *, const PGresult *), void (*on_done) (HttpRequest *, const DbError *));
/* Append a parameter, which is copied; NULL is NULL.  False: no memory. */
extern bool db_param(DbCall *call, const char *value);
/* The same, taken: malloc's. */
extern void db_take_param(DbCall *call, char *value);
/* Run call, which is taken, for r.  NULL is answered as out of memory.  Uses r->work, r->on_gone and r->on_drained. */
extern void db_run(HttpRequest *r, DbCall *call);

/* Answer with a DbError. */
extern void db_reply_error(HttpRequest *r, const DbError *error);

/* The errors of a result, in the terms of HTTP.  *buffer is the caller's to free. */
extern void db_error(const PGresult *result, DbError *error, char **buffer);

/*
 * Check the database and the settings that depend on it, with a connection that is closed again.  False: why says what is
 * wrong, with a hint.
 */
extern bool db_check(char *why, size_t size);

extern void db_open(struct event_base *base);
/* After http_abort(): wait for the cancels that are under way, close all connections. */
extern void db_close(void);

/* For /ready and /metrics. */
typedef struct DbStats
{
	int			connections;
	int			busy;
	int			queued;
	long		canceled;
	long		failed_connects;
} DbStats;
extern DbStats db_stats(void);

#endif
