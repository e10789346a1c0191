/*-------------------------------------------------------------------------
 * db.c
 *	  Requests as SQL: a pool of connections, and a bounded queue before it.
 *
 *     CONNECTING --> IDLE --job--> BEGIN --role is set--> RUN --committed or failed--> RESET --> IDLE
 *
 * Each batch of statements is a pipeline that ends with a Sync; its result moves the connection to the next state.  A
 * connection whose statement was canceled waits in RUN until both have come, the Sync and the end of PQcancel(): a cancel that
 * is still on its way must not hit the statement of the next request.
 *
 * Owns:     the connections, the jobs, the queue; a reference to the request of each job.
 * Borrows:  nothing that a client could take away: a request that is gone is still there, its job is let run to its end.
 * Refuses:  more jobs than queue_size waiting; at once when the database cannot be reached.
 *
 * A statement is never sent twice.  Only a job whose connection turned out to be dead in BEGIN, before its statement was
 * sent, gets another one.
 *-------------------------------------------------------------------------
 */
#include "db.h"

#include <assert.h>
#include <event2/event.h>
#include <jansson.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cancel.h"
#include "clock.h"
#include "error.h"
#include "log.h"
#include "reply.h"
#include "settings.h"

#define STEP_TIMEOUT_S 10		/* for connecting, BEGIN and DISCARD ALL; over the statement's own time, too */
#define CANCEL_AGAIN_MS 100		/* a cancel that reaches a Postgres backend before the statement does is lost */
#define MAX_CANCELS 100
#define BACKOFF_MIN_MS 100
#define BACKOFF_MAX_MS 5000
#define DEFAULT_MAX_TOKENS 256	/* of millm.generate() and its kin */

typedef enum DbState
{
	DB_CONNECTING, DB_IDLE, DB_BEGIN, DB_RUN, DB_RESET
} DbState;

typedef struct Job
{
	HttpRequest *r;
	DbCall	   *call;
	struct Db  *db;				/* NULL: in the queue */
	struct event *timer;		/* the end of its waiting */
	struct Job *prev;
	struct Job *next;
	bool		is_gone;		/* nobody waits for it */
	bool		is_second_try;
} Job;

typedef struct Db
{
	struct Db  *next;			/* of all connections */
	PGconn	   *pg;				/* NULL: lost; the struct stays until the cancel has come back */
	DbState		state;
	struct event *read;
	struct event *write;
	struct event *timer;
	Job		   *job;			/* in BEGIN and RUN */

	int			syncs;			/* Syncs that are still to come in this state */
	bool		is_paused;		/* the client must read first */
	bool		is_processing;
	bool		is_canceling;	/* PQcancel() is under way */
	int			n_cancels;		/* of this statement */
	bool		is_run_over;	/* the Sync of RUN has come */
	bool		has_failed;		/* error is filled */
	DbError		error;
	char	   *error_text;

	int64_t		key_id;			/* 0: no key */
	int64_t		key_max_concurrency;	/* -1: no limit, as below */
	int64_t		key_max_tokens;
} Db;

static struct event_base *loop;
static Db  *dbs;
static int	n_dbs;				/* with a connection */
static int	n_connecting;
static Job *first_waiting;
static Job *last_waiting;
static int	n_waiting;
static struct event *backoff_timer;
static int	backoff_ms;			/* 0: the last connection that was tried came about */
static long n_canceled;
static long n_failed_connects;
static bool is_closing;

static void process(Db *db);
static void work_off(void);
static void lost(Db *db, const char *why);

/* libpq's messages end with a newline. */
static json_t *
message_of(const char *text)
{
	return json_stringn(text, strcspn(text, "\n"));
}

/* ---- errors -------------------------------------------------------------------------------- */

/* "could not do it" + "." + " Detail." + " Hint.", the first letter large, unless it is that of a name (max_tokens). */
static char *
sentences(const PGresult *result)
{
	const char *message = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);
	const char *detail = PQresultErrorField(result, PG_DIAG_MESSAGE_DETAIL);
	const char *hint = PQresultErrorField(result, PG_DIAG_MESSAGE_HINT);
	char	   *text;
	size_t		len;

	if (!message || !message[0])
		message = "the database gave no reason";
	len = strlen(message);
	if (asprintf(&text, "%s%s%s%s%s%s", message, strchr(".!?", message[len - 1]) ? "" : ".", detail ? " " : "", detail ? detail : "",
				 hint ? " " : "", hint ? hint : "") < 0)
		return NULL;
	if (text[0] >= 'a' && text[0] <= 'z' && !memchr(text, '_', strcspn(text, " ")))
		text[0] = (char) (text[0] - 'a' + 'A');
	return text;
}

/* What is not in errors.def: classes of PostgreSQL's own. */
static void
classify(const char *sqlstate, DbError *error)
{
	for (int code = 1; code < MILLM_N_CODES; code++)
	{
		if (code == MILLM_E_INTERNAL || code == MILLM_E_CANCELED || strcmp(millm_code_sqlstate((MillmCode) code), sqlstate) != 0)
			continue;
		error->status = millm_code_http((MillmCode) code);
		error->code = millm_code_name((MillmCode) code);
		return;
	}
	if (strcmp(sqlstate, "42501") == 0)
		error->status = 403, error->code = "permission_denied";
	else if (strcmp(sqlstate, "57014") == 0)	/* our own cancels are for nobody's eyes, so this is statement_timeout or an administrator */
		error->status = 504, error->code = "request_timeout";
	else if (strncmp(sqlstate, "22", 2) == 0)
		error->status = 400, error->code = "invalid_argument";
	else if (strncmp(sqlstate, "08", 2) == 0 || strncmp(sqlstate, "57P", 3) == 0 || strncmp(sqlstate, "53", 2) == 0 || strncmp(sqlstate, "40", 2) == 0)
		error->status = 503, error->code = "database_unavailable";
	else
		error->status = 500, error->code = "internal_error";
}

void
db_error(const PGresult *result, DbError *error, char **buffer)
{
	const char *sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);

	/* libpq's own errors, a lost connection, have no SQLSTATE */
	classify(sqlstate ? sqlstate : "08006", error);
	*buffer = sentences(result);
	error->message = *buffer ? *buffer : "The bridge is out of memory.";
}

void
db_reply_error(HttpRequest *r, const DbError *error)
{
	if (error->status == 500)
	{
		/* what went wrong inside is for the log; the id finds it there */
		bridge_log("error", "database", json_pack("{s:s, s:s}", "request_id", r->id, "message", error->message));
		reply_error(r, 500, error->code, NULL, "Something went wrong inside the server. The log tells what, of request %s.", r->id);
		return;
	}
	reply_error(r, error->status, error->code, NULL, "%s", error->message);
}

/* ---- calls and jobs ------------------------------------------------------------------------ */

DbCall *
db_call(const char *sql, void (*on_row) (HttpRequest *, const PGresult *), void (*on_done) (HttpRequest *, const DbError *))
{
	DbCall	   *call = calloc(1, sizeof(*call));

	if (!call)
		return NULL;
	call->sql = sql;
	call->on_row = on_row;
	call->on_done = on_done;
	call->max_tokens_param = -1;
	call->n_choices = 1;
	return call;
}

bool
db_param(DbCall *call, const char *value)
{
	char	   *copy = value ? strdup(value) : NULL;

	db_take_param(call, copy);
	return copy || !value;
}

void
db_take_param(DbCall *call, char *value)
{
	assert(call->n_params < DB_MAX_PARAMS);
	call->params[call->n_params++] = value;
}

static void
call_free(DbCall *call)
{
	if (!call)
		return;
	for (int i = 0; i < call->n_params; i++)
		free(call->params[i]);
	free(call);
}

static void
job_free(Job *job)
{
	if (job->timer)
		event_free(job->timer);
	call_free(job->call);
	http_request_unref(job->r);
	free(job);
}

static int64_t
time_left_ms(const HttpRequest *r)
{
	int64_t		left = (r->deadline_us - millm_now_us()) / 1000;

	return left > 1 ? left : 1;
}

static void
queue_remove(Job *job)
{
	*(job->prev ? &job->prev->next : &first_waiting) = job->next;
	*(job->next ? &job->next->prev : &last_waiting) = job->prev;
	n_waiting--;
	event_del(job->timer);
}

/* At the end, or at the front when it has been there already. */
static void
queue_add(Job *job, bool at_front)
{
	int64_t		left = time_left_ms(job->r);
	struct timeval tv;

	job->db = NULL;
	job->prev = at_front ? NULL : last_waiting;
	job->next = at_front ? first_waiting : NULL;
	*(job->prev ? &job->prev->next : &first_waiting) = job;
	*(job->next ? &job->next->prev : &last_waiting) = job;
	n_waiting++;
	tv = (struct timeval) {left / 1000, left % 1000 * 1000};
	event_add(job->timer, &tv);
}

/* The job's end: tell the client, unless it is gone.  error NULL: it is done.  The job must not be in the queue. */
static void
job_end(Job *job, const DbError *error)
{
	/* from here on nothing is to be stopped, and on_done may begin another call */
	job->r->work = NULL;
	job->r->on_gone = NULL;
	job->r->on_drained = NULL;
	if (!job->is_gone)
		job->call->on_done(job->r, error);
	job_free(job);
}

static void
job_fail(Job *job, int status, const char *code, const char *message)
{
	const DbError error = {status, code, message};

	job_end(job, &error);
}

static void
on_wait_over(evutil_socket_t fd, short what, void *arg)
{
	Job		   *job = arg;

	(void) fd;
	(void) what;
	queue_remove(job);
	job_fail(job, 503, "queue_timeout", "The request waited for request_timeout without a connection to the database becoming free.");
}

static void
set_timer(Db *db, int64_t ms)
{
	struct timeval tv = {ms / 1000, ms % 1000 * 1000};

	event_add(db->timer, &tv);
}

/* Stop the statement of a job that nobody waits for.  When that does not help, on_step_timeout() comes here again. */
static void
cancel(Db *db)
{
	db->n_cancels++;
	db->is_canceling = cancel_send(db->pg, db);
	set_timer(db, CANCEL_AGAIN_MS);
}

static void
job_gone(HttpRequest *r)
{
	Job		   *job = r->work;

	if (job->is_gone)
		return;
	job->is_gone = true;
	r->on_gone = NULL;
	if (!job->db)
	{
		queue_remove(job);
		job_free(job);
		return;
	}
	if (job->db->state == DB_RUN && !job->db->is_run_over && !job->db->is_canceling)
	{
		cancel(job->db);
		n_canceled++;
	}
	if (job->db->is_paused)
	{
		job->db->is_paused = false;
		event_active(job->db->read, EV_READ, 0);	/* not from here: we may be within process() */
	}
}

static void
job_drained(HttpRequest *r)
{
	Job		   *job = r->work;

	if (job->db && job->db->is_paused)
	{
		job->db->is_paused = false;
		event_active(job->db->read, EV_READ, 0);
	}
}

/* ---- one connection ------------------------------------------------------------------------ */

static void
db_free(Db *db)
{
	Db		  **at = &dbs;

	while (*at != db)
		at = &(*at)->next;
	*at = db->next;
	event_free(db->timer);
	free(db->error_text);
	free(db);
}

/* The connection alone; db stays while its cancel is under way. */
static void
disconnect(Db *db)
{
	if (db->state == DB_CONNECTING)
		n_connecting--;
	n_dbs--;
	if (db->read)
		event_free(db->read);
	if (db->write)
		event_free(db->write);
	db->read = db->write = NULL;
	PQfinish(db->pg);
	db->pg = NULL;
	event_del(db->timer);
	if (!db->is_canceling)
		db_free(db);
}

/* Send what libpq holds.  False: the connection was lost. */
static bool
flush(Db *db)
{
	int			rc = PQflush(db->pg);

	if (rc < 0)
	{
		lost(db, PQerrorMessage(db->pg));
		return false;
	}
	if (rc > 0)
		event_add(db->write, NULL);
	return true;
}

/* The connection is of no use any more. */
static void
lost(Db *db, const char *why)
{
	Job		   *job = db->job;
	const DbState state = db->state;

	db->job = NULL;
	if (state != DB_IDLE)
		bridge_log("warning", "connection_lost", json_pack("{s:o}", "message", message_of(why)));
	if (job && !job->is_gone && state == DB_BEGIN && !job->is_second_try)
	{
		job->is_second_try = true;
		queue_add(job, true);
	}
	else if (job && db->has_failed)
		job_end(job, &db->error);
	else if (job)
		job_fail(job, 503, "database_unavailable", "The connection to the database was lost.");
	disconnect(db);
	work_off();
}

static void
on_cancel_done(void *arg)
{
	Db		   *db = arg;

	db->is_canceling = false;
	if (!db->pg)
		db_free(db);
	else if (db->state == DB_RUN && !db->is_run_over)
		set_timer(db, CANCEL_AGAIN_MS);
	else
		process(db);
}

static void
start_batch(Db *db, DbState state, int timeout_ms)
{
	db->state = state;
	db->syncs = 1;
	db->n_cancels = 0;
	db->is_run_over = false;
	db->has_failed = false;
	set_timer(db, timeout_ms + STEP_TIMEOUT_S * 1000);
}

static bool
send_sql(Db *db, const char *sql, int n, const char *const *values)
{
	return PQsendQueryParams(db->pg, sql, n, NULL, values, NULL, NULL, 0) == 1;
}

#define LIMITS \
	"pg_catalog.set_config('search_path', 'pg_catalog', true), pg_catalog.set_config('application_name', $1, true)"

/* BEGIN, and become who the request's key says. */
static void
begin(Db *db, Job *job)
{
	HttpRequest *r = job->r;
	char		name[64];		/* as long as application_name; a key's name goes behind it */
	char		timeout[24];
	char		hash[3 + 2 * SHA256_DIGEST_LENGTH] = "\\x";
	const char *values[3] = {name, timeout, NULL};
	bool		ok;

	r->had_turn = true;
	job->db = db;
	db->job = job;
	db->key_id = 0;
	db->key_max_concurrency = db->key_max_tokens = -1;
	start_batch(db, DB_BEGIN, 0);
	snprintf(name, sizeof(name), "millm-bridge %.28s", r->id);
	snprintf(timeout, sizeof(timeout), "%lld", (long long) time_left_ms(r));
	ok = send_sql(db, "BEGIN", 0, NULL);
	if (r->route->flags & ROUTE_OPEN)
		ok = ok && send_sql(db, "SELECT " LIMITS ", pg_catalog.set_config('statement_timeout', $2, true)", 2, values);
	else if (r->bearer)
	{
		unsigned char digest[SHA256_DIGEST_LENGTH];

		SHA256((const unsigned char *) r->bearer, strlen(r->bearer), digest);
		for (int i = 0; i < SHA256_DIGEST_LENGTH; i++)
			snprintf(hash + 2 + 2 * i, 3, "%02x", digest[i]);
		values[2] = hash;
		ok = ok && send_sql(db, "SELECT pg_catalog.set_config('search_path', 'pg_catalog', true),"
						" pg_catalog.set_config('application_name', $1 || ' ' || k.name, true),"
						" pg_catalog.set_config('statement_timeout', least($2::int, k.timeout_ms)::text, true),"
						" pg_catalog.set_config('role', k.role, true), k.key_id, k.name, k.max_concurrency, k.max_tokens"
						" FROM millm.authenticate($3::bytea) k", 3, values);
	}
	else
	{
		values[2] = settings.anonymous_role;
		ok = ok && send_sql(db, "SELECT " LIMITS ", pg_catalog.set_config('statement_timeout', $2, true),"
						" pg_catalog.set_config('role', $3, true)", 3, values);
	}
	if (!ok || !PQpipelineSync(db->pg))
		lost(db, PQerrorMessage(db->pg));
	else
		flush(db);
}

/* The answer has gone, or will never: make the connection as new. */
static void
reset(Db *db)
{
	bool		ok = true;

	start_batch(db, DB_RESET, 0);
	if (PQtransactionStatus(db->pg) != PQTRANS_IDLE)
	{
		ok = send_sql(db, "ROLLBACK", 0, NULL) && PQpipelineSync(db->pg);
		db->syncs = 2;
	}
	ok = ok && send_sql(db, "DISCARD ALL", 0, NULL) && PQpipelineSync(db->pg);
	if (!ok)
		lost(db, PQerrorMessage(db->pg));
	else
		flush(db);
}

/* Give the outcome to the request. */
static void
finish_job(Db *db)
{
	Job		   *job = db->job;

	db->job = NULL;
	job_end(job, db->has_failed ? &db->error : NULL);
}

/* May this key have one more?  And as many tokens?  False: the error is filled. */
static bool
check_key(Db *db)
{
	DbCall	   *call = db->job->call;
	int			n = 0;
	int64_t		limit;
	char	   *end;
	char	  **param;

	for (Db *other = dbs; other; other = other->next)
		n += other->job && other->state == DB_RUN && other->key_id == db->key_id;
	free(db->error_text);
	db->error_text = NULL;
	if (db->key_max_concurrency >= 0 && n >= db->key_max_concurrency)
	{
		if (asprintf(&db->error_text, "API key \"%s\" has %d requests running, as many as its max_concurrency allows.", db->job->r->key_name, n) < 0)
			db->error_text = NULL;
		db->error = (DbError) {429, "rate_limit_exceeded", db->error_text ? db->error_text : "Too many requests."};
		return false;
	}
	if (db->key_max_tokens < 0 || call->max_tokens_param < 0)
		return true;
	param = &call->params[call->max_tokens_param];
	limit = db->key_max_tokens / call->n_choices;
	if (limit < 1 || (*param && strtoll(*param, &end, 10) > limit))
	{
		if (asprintf(&db->error_text, "API key \"%s\" allows a request %lld tokens; its choices, %d of max_tokens %s, are more.", db->job->r->key_name,
					 (long long) db->key_max_tokens, call->n_choices, *param ? *param : "1 at least") < 0)
			db->error_text = NULL;
		db->error = (DbError) {400, "max_tokens_exceeded", db->error_text ? db->error_text : "Too many tokens."};
		return false;
	}
	if (!*param && limit < DEFAULT_MAX_TOKENS && asprintf(param, "%lld", (long long) limit) < 0)
		*param = NULL;
	return true;
}

/* The role is set: the statement itself. */
static void
run(Db *db)
{
	Job		   *job = db->job;

	if (job->is_gone)
	{
		finish_job(db);
		reset(db);
		return;
	}
	if (db->key_id != 0 && !check_key(db))
	{
		db->has_failed = true;
		finish_job(db);
		reset(db);
		return;
	}
	start_batch(db, DB_RUN, (int) time_left_ms(job->r));
	if (!send_sql(db, job->call->sql, job->call->n_params, (const char *const *) job->call->params) || !PQsetSingleRowMode(db->pg) ||
		!send_sql(db, "COMMIT", 0, NULL) || !PQpipelineSync(db->pg))
		lost(db, PQerrorMessage(db->pg));
	else
		flush(db);
}

/* All Syncs of the state have come. */
static void
batch_over(Db *db)
{
	switch (db->state)
	{
		case DB_BEGIN:
			if (db->has_failed)
			{
				/* a dead connection that still answers: as a lost one */
				if (db->error.status == 503 && !db->job->is_second_try)
				{
					lost(db, db->error.message);
					return;
				}
				/* who may not even authenticate is the bridge, not its client */
				if (db->error.status != 503 && strcmp(db->error.code, "INVALID_API_KEY") != 0)
					db->error.status = 500, db->error.code = "internal_error";
				finish_job(db);
				reset(db);
			}
			else
				run(db);
			break;
		case DB_RUN:
			db->is_run_over = true;
			if (db->job)
				finish_job(db);
			if (!db->is_canceling)
				reset(db);
			break;
		case DB_RESET:
			if (db->has_failed)
			{
				lost(db, db->error.message);
				break;
			}
			db->state = DB_IDLE;
			event_del(db->timer);
			work_off();
			break;
		default:
			break;
	}
}

static void
take_error(Db *db, const PGresult *result)
{
	if (db->has_failed)
		return;
	db->has_failed = true;
	free(db->error_text);
	db_error(result, &db->error, &db->error_text);
}

static int64_t
int_or(const PGresult *result, int column, int64_t otherwise)
{
	return PQgetisnull(result, 0, column) ? otherwise : strtoll(PQgetvalue(result, 0, column), NULL, 10);
}

static void
take_result(Db *db, const PGresult *result)
{
	switch (PQresultStatus(result))
	{
		case PGRES_FATAL_ERROR:
			take_error(db, result);
			break;
		case PGRES_SINGLE_TUPLE:
			if (db->job && !db->job->is_gone)
			{
				if (db->job->call->on_row)
					db->job->call->on_row(db->job->r, result);
				if (!db->job->is_gone && http_backlog(db->job->r) > HTTP_BACKLOG_HIGH)
					db->is_paused = true;
			}
			break;
		case PGRES_TUPLES_OK:
			if (db->state == DB_BEGIN && db->job->r->bearer && PQnfields(result) == 8 && PQntuples(result) == 1)
			{
				db->key_id = int_or(result, 4, 0);
				snprintf(db->job->r->key_name, sizeof(db->job->r->key_name), "%s", PQgetvalue(result, 0, 5));
				db->key_max_concurrency = int_or(result, 6, -1);
				db->key_max_tokens = int_or(result, 7, -1);
			}
			break;
		case PGRES_PIPELINE_SYNC:
			db->syncs--;
			break;
		default:				/* COMMAND_OK; PIPELINE_ABORTED follows an error that was taken */
			break;
	}
}

/* Use what has been read.  db may be freed afterwards. */
static void
process(Db *db)
{
	if (db->is_processing)
		return;
	db->is_processing = true;
	while (db->pg && !db->is_paused && db->syncs > 0 && !PQisBusy(db->pg))
	{
		PGresult   *result = PQgetResult(db->pg);

		if (PQstatus(db->pg) == CONNECTION_BAD)
		{
			if (result && PQresultStatus(result) == PGRES_FATAL_ERROR)
				take_error(db, result);
			PQclear(result);
			db->is_processing = false;
			lost(db, db->has_failed ? db->error.message : PQerrorMessage(db->pg));
			return;
		}
		if (!result)
			continue;			/* the end of one statement's results */
		take_result(db, result);
		PQclear(result);
		if (db->syncs == 0)
		{
			db->is_processing = false;
			batch_over(db);
			return;
		}
	}
	db->is_processing = false;
	if (db->state == DB_RUN && db->is_run_over && !db->is_canceling)
		reset(db);				/* the cancel has come back after the Sync */
	else if (db->state == DB_IDLE)
	{
		/* nothing was asked: a notice, or the end */
		PGnotify   *n;

		while ((n = PQnotifies(db->pg)) != NULL)
			PQfreemem(n);
		if (PQstatus(db->pg) == CONNECTION_BAD)
			lost(db, PQerrorMessage(db->pg));
	}
}

static void
on_readable(evutil_socket_t fd, short what, void *arg)
{
	Db		   *db = arg;

	(void) fd;
	(void) what;
	if (db->is_paused)
	{
		event_del(db->read);
		return;
	}
	event_add(db->read, NULL);
	if (!PQconsumeInput(db->pg))
	{
		lost(db, PQerrorMessage(db->pg));
		return;
	}
	if (PQflush(db->pg) > 0)
		event_add(db->write, NULL);
	process(db);
}

static void
on_writable(evutil_socket_t fd, short what, void *arg)
{
	(void) fd;
	(void) what;
	flush(arg);
}

static void
ignore_notice(void *arg, const char *message)
{
	(void) arg;
	(void) message;
}

/* ---- connecting ---------------------------------------------------------------------------- */

static void
on_backoff_over(evutil_socket_t fd, short what, void *arg)
{
	(void) fd;
	(void) what;
	(void) arg;
	work_off();
}

static void
connect_failed(Db *db, const char *why)
{
	struct timeval tv;

	n_failed_connects++;
	backoff_ms = backoff_ms == 0 ? BACKOFF_MIN_MS : backoff_ms * 2 < BACKOFF_MAX_MS ? backoff_ms * 2 : BACKOFF_MAX_MS;
	bridge_log("warning", "connect_failed", json_pack("{s:o, s:i}", "message", message_of(why), "retry_ms", backoff_ms));
	tv = (struct timeval) {backoff_ms / 1000, backoff_ms % 1000 * 1000};
	event_add(backoff_timer, &tv);
	disconnect(db);
	/* with no connection at all nobody's turn comes soon */
	while (n_dbs == 0 && first_waiting)
	{
		Job		   *job = first_waiting;

		queue_remove(job);
		job_fail(job, 503, "database_unavailable", "The database cannot be reached.");
	}
}

static void on_connect_step(evutil_socket_t fd, short what, void *arg);

/* Wait for what PQconnectPoll() asks for; the socket may be another one each time. */
static void
connect_step(Db *db, PostgresPollingStatusType want)
{
	if (db->read)
		event_free(db->read);
	db->read = NULL;
	switch (want)
	{
		case PGRES_POLLING_READING:
		case PGRES_POLLING_WRITING:
			db->read = event_new(loop, PQsocket(db->pg), want == PGRES_POLLING_READING ? EV_READ : EV_WRITE, on_connect_step, db);
			if (!db->read || event_add(db->read, NULL) != 0)
				connect_failed(db, "out of memory");
			break;
		case PGRES_POLLING_OK:
			db->read = event_new(loop, PQsocket(db->pg), EV_READ | EV_PERSIST, on_readable, db);
			db->write = event_new(loop, PQsocket(db->pg), EV_WRITE, on_writable, db);
			PQsetNoticeProcessor(db->pg, ignore_notice, NULL);
			if (!db->read || !db->write || event_add(db->read, NULL) != 0 || PQsetnonblocking(db->pg, 1) != 0 || !PQenterPipelineMode(db->pg))
			{
				connect_failed(db, "could not set up the connection");
				break;
			}
			n_connecting--;
			backoff_ms = 0;
			event_del(backoff_timer);
			db->state = DB_IDLE;
			event_del(db->timer);
			work_off();
			break;
		default:
			connect_failed(db, PQerrorMessage(db->pg));
			break;
	}
}

static void
on_connect_step(evutil_socket_t fd, short what, void *arg)
{
	Db		   *db = arg;

	(void) fd;
	(void) what;
	connect_step(db, PQconnectPoll(db->pg));
}

static void
on_step_timeout(evutil_socket_t fd, short what, void *arg)
{
	Db		   *db = arg;

	(void) fd;
	(void) what;
	if (db->state == DB_CONNECTING)
		connect_failed(db, "no answer in time");
	else if (db->state == DB_RUN && !db->is_run_over && db->job->is_gone && db->n_cancels < MAX_CANCELS)
	{
		if (!db->is_canceling)
			cancel(db);
		else
			set_timer(db, STEP_TIMEOUT_S * 1000);	/* PQcancel() itself takes its time */
	}
	else
		lost(db, "no answer in time");
}

/* The parameters of every connection: settings.database, and what the bridge needs. */
static PGconn *
start_connection(bool wait)
{
	const char *const names[] = {"dbname", "client_encoding", "fallback_application_name", NULL};
	const char *const values[] = {settings.database[0] ? settings.database : NULL, "UTF8", "millm-bridge", NULL};

	return wait ? PQconnectdbParams(names, values, 1) : PQconnectStartParams(names, values, 1);
}

static void
connect_one(void)
{
	Db		   *db = calloc(1, sizeof(*db));

	if (!db || !(db->timer = event_new(loop, -1, 0, on_step_timeout, db)) || !(db->pg = start_connection(false)))
	{
		if (db && db->timer)
			event_free(db->timer);
		free(db);
		return;
	}
	db->next = dbs;
	dbs = db;
	n_dbs++;
	n_connecting++;
	db->state = DB_CONNECTING;
	set_timer(db, STEP_TIMEOUT_S * 1000);
	connect_step(db, PQstatus(db->pg) == CONNECTION_BAD ? PGRES_POLLING_FAILED : PGRES_POLLING_WRITING);
}

static Db *
idle_db(void)
{
	for (Db *db = dbs; db; db = db->next)
		if (db->pg && db->state == DB_IDLE)
			return db;
	return NULL;
}

/* Give waiting jobs to idle connections; open more for the rest. */
static void
work_off(void)
{
	Db		   *db;

	while (first_waiting && (db = idle_db()) != NULL)
	{
		Job		   *job = first_waiting;

		queue_remove(job);
		begin(db, job);
	}
	if (is_closing || event_pending(backoff_timer, EV_TIMEOUT, NULL))
		return;
	/* after a failure one that tries is enough; and one there should always be, to know that the database is */
	while (n_dbs < settings.pool_size && (n_dbs == 0 || (n_connecting < n_waiting && (backoff_ms == 0 || n_connecting == 0))))
	{
		int			before = n_dbs;

		connect_one();
		if (n_dbs <= before || event_pending(backoff_timer, EV_TIMEOUT, NULL))
			break;
	}
}

void
db_run(HttpRequest *r, DbCall *call)
{
	Job		   *job = calloc(1, sizeof(*job));
	int			n_busy = 0;

	if (!job || !call || !(job->timer = event_new(loop, -1, 0, on_wait_over, job)))
	{
		free(job);
		call_free(call);
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return;
	}
	job->r = http_request_ref(r);
	job->call = call;
	r->work = job;
	r->on_gone = job_gone;
	r->on_drained = job_drained;
	for (Db *db = dbs; db; db = db->next)
		n_busy += db->pg && db->state != DB_IDLE && db->state != DB_CONNECTING;
	/* who waits for a connection that is being opened does not wait for another request's end */
	if (!r->had_turn && n_waiting >= settings.queue_size + settings.pool_size - n_busy)
	{
		char		text[160];

		snprintf(text, sizeof(text), "All %d connections to the database are busy, and %d requests wait already.", settings.pool_size, n_waiting);
		job_fail(job, 503, "queue_full", text);
		return;
	}
	queue_add(job, false);
	if (n_dbs == 0 && event_pending(backoff_timer, EV_TIMEOUT, NULL))
	{
		/* somebody waits: ask again soon, so that the answer is today's */
		struct timeval tv = {0, BACKOFF_MIN_MS * 1000};

		event_add(backoff_timer, &tv);
	}
	work_off();
}

DbStats
db_stats(void)
{
	DbStats		s = {.connections = n_dbs - n_connecting, .queued = n_waiting, .canceled = n_canceled, .failed_connects = n_failed_connects};

	for (Db *db = dbs; db; db = db->next)
		s.busy += db->pg && db->state != DB_IDLE && db->state != DB_CONNECTING;
	return s;
}

void
db_open(struct event_base *base)
{
	loop = base;
	if (!(backoff_timer = event_new(base, -1, 0, on_backoff_over, NULL)) || !cancel_open(base, on_cancel_done))
	{
		bridge_log("error", "start", json_pack("{s:s}", "message", "out of memory"));
		exit(1);
	}
	work_off();
}

void
db_close(void)
{
	const int64_t end = millm_now_us() + STEP_TIMEOUT_S * 1000000;

	is_closing = true;
	for (;;)
	{
		bool		is_canceling = false;

		for (Db *db = dbs; db; db = db->next)
			is_canceling |= db->is_canceling;
		if (!is_canceling || millm_now_us() > end)
			break;
		event_base_loop(loop, EVLOOP_ONCE);
	}
	for (Db *db = dbs, *next; db; db = next)
	{
		next = db->next;
		if (db->job)
			job_free(db->job);
		if (db->pg)
			disconnect(db);
	}
	event_free(backoff_timer);
	cancel_close();
}

/* ---- the check at the start ---------------------------------------------------------------- */

static const char check_sql[] =
	"SELECT r.rolname, r.rolsuper, r.rolinherit OR EXISTS"
	"  (SELECT FROM pg_catalog.pg_roles o WHERE o.oid <> r.oid AND pg_catalog.pg_has_role(r.oid, o.oid, 'USAGE')),"
	" EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'millm'),"
	" least(pg_catalog.current_setting('max_connections')::int - pg_catalog.current_setting('superuser_reserved_connections')::int,"
	"  nullif(r.rolconnlimit, -1), nullif(d.datconnlimit, -1)),"
	" a.rolname IS NOT NULL, coalesce(a.rolsuper, false), pg_catalog.current_database(),"
	" coalesce(pg_catalog.pg_has_role(r.oid, a.oid, 'MEMBER'), false)"
	" FROM pg_catalog.pg_roles r JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()"
	" LEFT JOIN pg_catalog.pg_roles a ON a.rolname = $1"
	" WHERE r.rolname = session_user";

static bool
is_true(const PGresult *result, int column)
{
	return PQgetvalue(result, 0, column)[0] == 't';
}

static bool
has_keys(PGconn *pg)
{
	PGresult   *row = PQexec(pg, "SELECT FROM millm.api_keys LIMIT 1");
	const bool	result = PQresultStatus(row) == PGRES_TUPLES_OK && PQntuples(row) == 1;

	PQclear(row);
	return result;
}

static bool
check_row(PGconn *pg, const PGresult *row, char *why, size_t size)
{
	const char *role = PQgetvalue(row, 0, 0);
	const long	most = strtol(PQgetvalue(row, 0, 4), NULL, 10);

	if (is_true(row, 1))
		snprintf(why, size, "role \"%s\" is a superuser\nHINT:  Let the bridge log in as a role of its own: "
				 "CREATE ROLE millm_bridge LOGIN NOINHERIT; SELECT millm.grant_bridge('millm_bridge');", role);
	else if (is_true(row, 2))
		snprintf(why, size, "role \"%s\" inherits the privileges of its keys' roles\nHINT:  ALTER ROLE \"%s\" NOINHERIT; "
				 "since PostgreSQL 16, GRANT ... TO \"%s\" WITH INHERIT FALSE, too.", role, role, role);
	else if (!is_true(row, 3))
		snprintf(why, size, "database \"%s\" does not have the extension\nHINT:  CREATE EXTENSION millm; in the database that millm.database names.",
				 PQgetvalue(row, 0, 7));
	else if (!http_is_loopback() && !has_keys(pg))
		snprintf(why, size, "there is no API key, and \"%s\" is no loopback address\nHINT:  Make one with millm.create_api_key(), or listen on 127.0.0.1.",
				 settings.listen);
	else if (settings.pool_size > most)
		snprintf(why, size, "pool_size is %d, but the server allows role \"%s\" %ld connections\nHINT:  Lower pool_size, or raise max_connections "
				 "or the CONNECTION LIMIT.", settings.pool_size, role, most);
	else if (settings.anonymous_role[0] && !is_true(row, 5))
		snprintf(why, size, "role \"%s\" of anonymous_role does not exist", settings.anonymous_role);
	else if (settings.anonymous_role[0] && is_true(row, 6))
		snprintf(why, size, "role \"%s\" of anonymous_role is a superuser", settings.anonymous_role);
	else if (settings.anonymous_role[0] && !is_true(row, 8))
		snprintf(why, size, "role \"%s\" may not become anonymous_role \"%s\"\nHINT:  GRANT \"%s\" TO \"%s\";", role, settings.anonymous_role,
				 settings.anonymous_role, role);
	else
		return true;
	return false;
}

bool
db_check(char *why, size_t size)
{
	PGconn	   *pg = start_connection(true);
	const char *values[1] = {settings.anonymous_role};
	PGresult   *row = NULL;
	bool		ok = false;

	if (!pg || PQstatus(pg) != CONNECTION_OK)
		snprintf(why, size, "could not connect to the database: %s", pg ? PQerrorMessage(pg) : "out of memory");
	else
	{
		row = PQexecParams(pg, check_sql, 1, NULL, values, NULL, NULL, 0);
		if (PQresultStatus(row) != PGRES_TUPLES_OK || PQntuples(row) != 1)
			snprintf(why, size, "could not look at the database: %s", PQerrorMessage(pg));
		else
			ok = check_row(pg, row, why, size);
	}
	PQclear(row);
	PQfinish(pg);
	return ok;
}
