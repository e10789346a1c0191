/*
 * events.c -- notifications of the database, fanned out to the streams of GET /api/events.
 *
 * One connection of its own LISTENs, since a pooler in transaction mode would drop that (setting listen_database).  It is there while
 * somebody is.  When it is lost, streams stay: it is opened again, later and later, and then says events:interrupted.
 *
 * A stream begins when its key may look at models and the connection listens, and holds no connection of the pool.  Every RECHECK_MS
 * the key is asked for again: a revoked one ends its stream.  What a slow client has not read is bounded (HTTP_BACKLOG_HIGH);
 * events beyond that are dropped, for it alone, and counted in events:dropped as soon as it reads again.
 *
 * Owns:     the listening connection, the list of streams; a reference to each stream's request.
 * Refuses:  notifications that do not look like an event, or like one of ours: any role can NOTIFY.
 */
#include "events.h"

#include <event2/event.h>
#include <inttypes.h>
#include <jansson.h>
#include <libpq-fe.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "db.h"
#include "log.h"
#include "reply.h"
#include "settings.h"

#define CHANNEL			"millm_progress"
#define OWN_PREFIX		"events:"	/* of the bridge's own events */
#define MAX_EVENT_NAME	64
#define TICK_MS			1000
#define RECHECK_MS		10000
#define CONNECT_TIMEOUT_MS 10000
#define MAX_BACKOFF_MS	30000

/* What the key's role must be able to do. */
#define MAY_LOOK		"SELECT EXISTS (SELECT FROM millm.models)"

/* One client. */
typedef struct Stream
{
	HttpRequest *r;
	struct Stream *next;
	bool		checking;		/* the pool has the request; it calls back or the client is gone */
	bool		interrupted;	/* to be told */
	int64_t		checked_us;
	uint64_t	dropped;		/* to be told */
} Stream;

static struct event_base *loop;
static Stream *streams;
static struct event *tick;		/* pending while there are streams */
static bool is_draining;

static PGconn *conn;			/* NULL: not connected, and the next try is at retry_us */
static struct event *io;
static bool is_listening;
static int64_t connect_deadline_us;
static int64_t retry_us;
static int	backoff_ms;

static void on_io(evutil_socket_t fd, short what, void *arg);

/* ---- streams ------------------------------------------------------------------------------- */

static void
send_event(Stream *s, const char *name, const char *data)
{
	char	   *event;
	int			n = asprintf(&event, "event: %s\ndata: %s\n\n", name, data);

	if (n < 0)
		return;
	http_stream_send(s->r, event, (size_t) n);
	free(event);
}

/* What the client has to be told before the next event, if it reads. */
static void
catch_up(Stream *s)
{
	char		data[64];

	if (!s->r->is_streaming || http_backlog(s->r) >= HTTP_BACKLOG_LOW)
		return;
	if (s->interrupted && is_listening)
	{
		s->interrupted = false;
		send_event(s, "events:interrupted", "{\"event\":\"events:interrupted\"}");
	}
	if (s->dropped > 0)
	{
		snprintf(data, sizeof(data), "{\"event\":\"events:dropped\",\"dropped\":%" PRIu64 "}", s->dropped);
		s->dropped = 0;
		send_event(s, "events:dropped", data);
	}
}

static void
deliver(Stream *s, const char *name, const char *data)
{
	if (!s->r->is_streaming)
		return;
	catch_up(s);
	if (s->dropped > 0 || http_backlog(s->r) > HTTP_BACKLOG_HIGH)
		s->dropped++;
	else
		send_event(s, name, data);
}

/* The stream's client reads events from now on. */
static void
begin(Stream *s)
{
	static const char comment[] = ": listening\n\n";

	if (!s->r->is_streaming)
		http_stream_send(s->r, comment, sizeof(comment) - 1);
}

static void
on_drained(HttpRequest *r)
{
	catch_up(r->state);
}

static void
on_checked(HttpRequest *r, const DbError *error)
{
	Stream	   *s = r->state;

	s->checking = false;
	s->checked_us = millm_now_us();
	r->on_drained = on_drained;
	if (!error)
	{
		if (is_listening)
			begin(s);
	}
	else if (!r->is_streaming || error->status == 401 || error->status == 403)
		db_reply_error(r, error);
	/* else the database was not there, or busy: the key may be good still */
}

static void
check(Stream *s)
{
	s->checking = true;
	s->r->deadline_us = millm_now_us() + (int64_t) settings.request_timeout * 1000000;
	db_run(s->r, db_call(MAY_LOOK, NULL, on_checked));
}

/* ---- the connection ------------------------------------------------------------------------- */

static void
disconnect(void)
{
	if (io)
		event_free(io);
	io = NULL;
	PQfinish(conn);
	conn = NULL;
	is_listening = false;
}

/* The connection is lost, or was none.  Who waits for it to begin is told so; who has begun waits for the next one. */
static void
lost(const char *why)
{
	bridge_log("warning", "events_lost", json_pack("{s:s, s:i}", "message", why, "retry_ms", backoff_ms));
	disconnect();
	retry_us = millm_now_us() + (int64_t) backoff_ms * 1000;
	backoff_ms = backoff_ms * 2 < MAX_BACKOFF_MS ? backoff_ms * 2 : MAX_BACKOFF_MS;
	for (Stream *s = streams; s; s = s->next)
		if (s->r->is_streaming)
			s->interrupted = true;
		else if (!s->checking)
			reply_error(s->r, 503, "database_unavailable", NULL, "The bridge cannot listen to the database now.");
}

static void
watch(short what)
{
	if (io)
		event_free(io);
	io = event_new(loop, PQsocket(conn), what | EV_PERSIST, on_io, NULL);
	if (!io || event_add(io, NULL) != 0)
		lost("out of memory");
}

/* What ends the connection is logged by lost(). */
static void
ignore_notice(void *arg, const char *message)
{
	(void) arg;
	(void) message;
}

static void
connect_now(void)
{
	const char *keywords[] = {"dbname", "client_encoding", "application_name", NULL};
	const char *values[] = {settings.listen_database[0] ? settings.listen_database : settings.database, "UTF8", "millm-bridge events", NULL};

	connect_deadline_us = millm_now_us() + CONNECT_TIMEOUT_MS * 1000;
	conn = PQconnectStartParams(keywords, values, 1);
	if (!conn || PQstatus(conn) == CONNECTION_BAD)
	{
		lost(conn ? PQerrorMessage(conn) : "out of memory");
		return;
	}
	PQsetNoticeProcessor(conn, ignore_notice, NULL);
	watch(EV_WRITE);
}

/* A notification: to everybody, if it is an event, on one line: a line end can only stand between JSON's words. */
static void
publish(char *payload)
{
	json_t	   *event = json_loads(payload, JSON_REJECT_DUPLICATES, NULL);
	const char *name = json_string_value(json_object_get(event, "event"));

	if (name && name[0] && strlen(name) <= MAX_EVENT_NAME && strncmp(name, OWN_PREFIX, strlen(OWN_PREFIX)) != 0 &&
		name[strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_:-")] == '\0')
	{
		for (char *c = payload; *c; c++)
			if (*c == '\n' || *c == '\r')
				*c = ' ';
		for (Stream *s = streams; s; s = s->next)
			deliver(s, name, payload);
	}
	json_decref(event);
}

/* LISTEN was answered. */
static void
listening(void)
{
	PGresult   *result;
	bool		ok = true;

	while ((result = PQgetResult(conn)) != NULL)
	{
		ok = ok && PQresultStatus(result) == PGRES_COMMAND_OK;
		PQclear(result);
	}
	if (!ok)
	{
		lost(PQerrorMessage(conn));
		return;
	}
	is_listening = true;
	backoff_ms = TICK_MS;
	bridge_log("info", "events_connected", NULL);
	for (Stream *s = streams; s; s = s->next)
		if (!s->checking)
		{
			begin(s);
			catch_up(s);
		}
}

static void
on_io(evutil_socket_t fd, short what, void *arg)
{
	PGnotify   *notice;

	(void) fd;
	(void) what;
	(void) arg;
	if (PQstatus(conn) != CONNECTION_OK)
	{
		switch (PQconnectPoll(conn))
		{
			case PGRES_POLLING_READING:
				watch(EV_READ);
				return;
			case PGRES_POLLING_WRITING:
				watch(EV_WRITE);
				return;
			case PGRES_POLLING_OK:
				/* a few bytes into an empty socket buffer: it does not block */
				if (!PQsendQuery(conn, "LISTEN " CHANNEL))
					lost(PQerrorMessage(conn));
				else
					watch(EV_READ);
				return;
			default:
				lost(PQerrorMessage(conn));
				return;
		}
	}
	if (!PQconsumeInput(conn))
	{
		lost(PQerrorMessage(conn));
		return;
	}
	if (!is_listening && !PQisBusy(conn))
		listening();
	while (conn && (notice = PQnotifies(conn)) != NULL)
	{
		publish(notice->extra);
		PQfreemem(notice);
	}
}

/* ---- time ------------------------------------------------------------------------------------ */

/* Streams whose client is gone go; keys are checked again; the connection is opened, given up, or closed after the last stream. */
static void
on_tick(evutil_socket_t fd, short what, void *arg)
{
	const struct timeval again = {TICK_MS / 1000, TICK_MS % 1000 * 1000};
	int64_t		now = millm_now_us();

	(void) fd;
	(void) what;
	(void) arg;
	for (Stream **at = &streams; *at;)
	{
		Stream	   *s = *at;

		if (!s->r->conn || s->r->is_answered)
		{
			*at = s->next;
			http_request_unref(s->r);
			continue;
		}
		at = &s->next;
		catch_up(s);
		/* one that does not read gets no events either, and would hold a connection of the pool */
		if (!s->checking && s->r->is_streaming && now - s->checked_us > RECHECK_MS * 1000 && http_backlog(s->r) <= HTTP_BACKLOG_HIGH)
			check(s);
	}
	if (!streams)
	{
		disconnect();
		return;
	}
	if (!conn && now >= retry_us)
		connect_now();
	else if (conn && !is_listening && now > connect_deadline_us)
		lost("timeout");
	event_add(tick, &again);
}

/* ---- for the others --------------------------------------------------------------------------- */

void
events_handle(HttpRequest *r)
{
	Stream	   *s = calloc(1, sizeof(*s));

	if (is_draining || !s)
	{
		reply_error(r, 503, is_draining ? "shutting_down" : "out_of_memory", NULL, is_draining ? "The bridge is shutting down." : "The bridge is out of memory.");
		free(s);
		return;
	}
	s->r = http_request_ref(r);
	r->state = s;
	r->free_state = free;
	s->next = streams;
	streams = s;
	if (!event_pending(tick, EV_TIMEOUT, NULL))
	{
		backoff_ms = TICK_MS;
		retry_us = 0;
		event_active(tick, EV_TIMEOUT, 0);
	}
	check(s);
}

void
events_open(struct event_base *base)
{
	loop = base;
	tick = evtimer_new(base, on_tick, NULL);
}

void
events_drain(void)
{
	is_draining = true;
	for (Stream *s = streams; s; s = s->next)
		if (s->r->is_streaming)
			http_stream_end(s->r);
		else
			reply_error(s->r, 503, "shutting_down", NULL, "The bridge is shutting down.");
}

void
events_close(void)
{
	while (streams)
	{
		Stream	   *s = streams;

		streams = s->next;
		http_request_unref(s->r);
	}
	disconnect();
	event_free(tick);
}
