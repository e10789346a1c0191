/*-------------------------------------------------------------------------
 * client.c
 *	  One conversation of a Postgres process with a helper program.
 *
 *     open: connect, HELLO + REQUEST ->, <- HELLO      receive: <- frame ... <- RESULT or ERROR
 *
 * Owns:     the socket and the bytes that have come but are not yet a whole frame.
 * Borrows:  the memory context that was current at open, whose reset closes the socket; the
 *           helper's address, state and last exit (live.h).
 * Does not: know what a request means.
 *
 * Closing is canceling, so the socket is closed on every way out: by the context's reset callback
 * (end of a query, LIMIT, rollback to a savepoint), and at once when an error leaves from here.  The
 * latter matters: PostgreSQL sends an error to its client before it cleans up memory, and a client
 * that does not read would hold the engine's pages meanwhile.
 *
 * No wait is without an end: connect and HELLO have CONNECT_TIMEOUT_MS, everything can be
 * interrupted, and a wait on behalf of a client that has gone ends within CLIENT_CHECK_MS.
 *-------------------------------------------------------------------------
 */
#include "client.h"

#include <sys/socket.h>
#include <sys/un.h>

/* libpq-be.h would want Kerberos' headers, for a pointer that is there with or without them. */
#undef ENABLE_GSS
#include "libpq/libpq.h"
#include "libpq/libpq-be.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "clock.h"
#include "compat.h"
#include "json.h"
#include "live.h"
#include "stat.h"
#include "version.h"

#define CONNECT_TIMEOUT_MS	30000
/* How often a wait looks whether the SQL client is still there. */
#define CLIENT_CHECK_MS		1000
/* Between two attempts to reach a helper that is starting, or whose queue of connections is full. */
#define CONNECT_RETRY_MS	10
/* A helper is dead before the supervisor has read its last words: how long an error waits for them. */
#define LAST_EXIT_WAIT_MS	200
#define READ_BYTES			8192

struct MillmClient
{
	MillmHelper helper;
	pgsocket	sock;			/* PGINVALID_SOCKET: closed */
	int			helper_pid;		/* when we connected, as live.h had it */
	bool		lost;			/* the helper ended the connection before a final frame */
	bool		is_counted;		/* its end is still to be counted */
	MillmAsker	asker;			/* with is_counted */
	MillmUse	use;
	StringInfoData in;			/* bytes received; those before cursor are consumed */
	MemoryContextCallback on_reset;
};

/* A moment at which patience ends. */
typedef struct Deadline
{
	instr_time	start;
	int			timeout_ms;		/* < 0: never */
} Deadline;

static const char *const helper_program[] = {[MILLM_ENGINE] = "millm-engine", [MILLM_HUB] = "millm-hub"};
static const MillmCode helper_unavailable[] = {[MILLM_ENGINE] = MILLM_E_ENGINE_UNAVAILABLE, [MILLM_HUB] = MILLM_E_HUB_UNAVAILABLE};

/* What pg_stat_activity shows of a wait for a helper. */
static uint32
wait_event(MillmHelper helper)
{
	static uint32 events[2];

	if (events[helper] == 0)
		events[helper] = millm_new_wait_event(helper == MILLM_ENGINE ? "MillmEngine" : "MillmHub");
	return events[helper];
}

static Deadline
deadline_in(int timeout_ms)
{
	Deadline	d = {.timeout_ms = timeout_ms};

	INSTR_TIME_SET_CURRENT(d.start);
	return d;
}

/* Milliseconds left, at most limit. */
static long
deadline_left(const Deadline *d, long limit)
{
	instr_time	now;
	double		left;

	if (d->timeout_ms < 0)
		return limit;
	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, d->start);
	left = d->timeout_ms - INSTR_TIME_GET_MILLISEC(now);
	return left <= 0 ? 0 : left < limit ? (long) left + 1 : limit;
}

void
millm_ereport(int elevel, const MillmError *err)
{
	const char *state = millm_code_sqlstate(err->code);

	ereport(elevel,
			(errcode(MAKE_SQLSTATE(state[0], state[1], state[2], state[3], state[4])),
			 errmsg_internal("%s", err->message),
			 err->detail[0] ? errdetail_internal("%s", err->detail) : 0,
			 err->hint[0] ? errhint("%s", err->hint) : 0));
}

void
millm_refuse(MillmCode code, const char *message, const char *detail, const char *hint)
{
	MillmError	err;

	millm_fail(&err, code, "%s", message);
	if (detail)
		millm_detail(&err, "%s", detail);
	if (hint)
		millm_hint(&err, "%s", hint);
	millm_ereport(ERROR, &err);
	pg_unreachable();
}

static void
hide_statement(void *is_secret)
{
	if (is_secret)
		errhidestmt(true);
}

void
millm_hide_statement(ErrorContextCallback *context, bool is_secret)
{
	context->callback = hide_statement;
	context->arg = is_secret ? context : NULL;
	context->previous = error_context_stack;
	error_context_stack = context;
}

static void
error_from_json(const char *text, size_t len, MillmError *err)
{
	MillmJson	object = millm_json(text, len);
	char	   *code = millm_json_get_string(object, "code");
	char	   *message = millm_json_get_string(object, "message");
	char	   *detail = millm_json_get_string(object, "detail");
	char	   *hint = millm_json_get_string(object, "hint");

	if (!code || !message)
		millm_fail(err, MILLM_E_PROTOCOL_VIOLATION, "a helper program sent an error without a code and a message");
	else
		millm_fail(err, millm_code_by_name(code), "%s", message);
	if (detail)
		millm_detail(err, "%s", detail);
	if (hint)
		millm_hint(err, "%s", hint);
}

void
millm_error_from_json(const char *json, MillmError *err)
{
	error_from_json(json, strlen(json), err);
}

/* Say that the helper is not there, or no longer: what happened, its state and last exit, what to do. */
static void
unavailable(MillmHelper helper, MillmError *err, const char *what)
{
	MillmHelperStatus status;
	const char *state = "";
	const char *hint = "It is restarted automatically; the server log says why it ended.";

	millm_helper_status(helper, &status);
	switch (status.state)
	{
		case MILLM_HELPER_READY:
			state = "It is running.";
			hint = helper == MILLM_ENGINE ? "If it was restarted, load the model again with millm.load()." : "Try again.";
			break;
		case MILLM_HELPER_STARTING:
			state = "It is starting.";
			hint = helper == MILLM_ENGINE ? "Load the model again with millm.load()." : "Try again.";
			break;
		case MILLM_HELPER_BACKOFF:
			state = "It waits to be restarted.";
			break;
		case MILLM_HELPER_STOPPED:
			state = "It is stopped.";
			hint = "The server log says why.";
			break;
		case MILLM_HELPER_MISSING:
			state = "The program is missing or cannot be executed.";
			hint = "Install millm's helper programs beside the extension's library.";
			break;
	}
	millm_fail(err, helper_unavailable[helper], "%s %s", helper_program[helper], what);
	millm_detail(err, "%s%s%s", state, status.last_exit[0] ? " Its last run ended: " : "", status.last_exit);
	millm_hint(err, "%s", hint);
}

/* The request has come to its end; the first one counts. */
static void
count_end(MillmClient *client, MillmEnd end)
{
	if (!client->is_counted)
		return;
	client->is_counted = false;
	millm_stat_count(&client->asker, end, &client->use);
}

void
millm_client_close(MillmClient *client)
{
	if (!client)
		return;
	count_end(client, MILLM_END_CANCELED);
	if (client->sock == PGINVALID_SOCKET)
		return;
	closesocket(client->sock);
	client->sock = PGINVALID_SOCKET;
	ReleaseExternalFD();
}

static void
close_on_reset(void *arg)
{
	millm_client_close(arg);
}

pgsocket
millm_client_socket(MillmClient *client)
{
	return client->sock;
}

/*
 * A backend whose client has gone must not keep an engine busy: let ProcessInterrupts() end it.  Called after every sleep, for many short ones may
 * follow one another; it looks now and then.
 */
static void
check_sql_client(void)
{
	static int64 looked_at_ms;
	const int64 now = millm_now_ms();

	if (now - looked_at_ms < CLIENT_CHECK_MS / 2)
		return;
	looked_at_ms = now;
	if (whereToSendOutput == DestRemote && MyProcPort && millm_can_check_client() && !pq_check_connection())
	{
		ClientConnectionLost = true;
		InterruptPending = true;
	}
}

/* Sleep until the socket is ready for event, something wants our attention, or the time is up: the caller looks which. */
static void
wait_socket(MillmClient *client, int event, const Deadline *deadline)
{
	int			rc = WaitLatchOrSocket(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | WL_TIMEOUT | event,
									   client->sock, deadline_left(deadline, CLIENT_CHECK_MS),
									   wait_event(client->helper));

	if (rc & WL_LATCH_SET)
		ResetLatch(MyLatch);
	check_sql_client();
	CHECK_FOR_INTERRUPTS();
}

/* The same without a socket. */
static void
wait_a_moment(MillmHelper helper, long ms)
{
	int			rc = WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | WL_TIMEOUT, ms, wait_event(helper));

	if (rc & WL_LATCH_SET)
		ResetLatch(MyLatch);
	check_sql_client();
	CHECK_FOR_INTERRUPTS();
}

void
millm_client_sleep(MillmClient *client, int timeout_ms)
{
	Deadline	deadline = deadline_in(timeout_ms);

	if (client)
		wait_socket(client, WL_SOCKET_READABLE, &deadline);
	else
		wait_a_moment(MILLM_ENGINE, deadline_left(&deadline, CLIENT_CHECK_MS));
}

bool
millm_client_can_open(void)
{
	bool		has_both;

	if (!AcquireExternalFD())
		return false;
	has_both = AcquireExternalFD();	/* the other one is for waiting: PostgreSQL makes a set of events each time */
	if (has_both)
		ReleaseExternalFD();
	ReleaseExternalFD();
	return has_both;
}

/* Connect, or ereport.  A helper that is starting is waited for; one that is down for longer is not. */
static void
connect_helper(MillmClient *client, const Deadline *deadline)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	MillmHelperStatus status;
	MillmError	err;

	strlcpy(addr.sun_path, millm_helper_socket(client->helper), sizeof(addr.sun_path));
	for (;;)
	{
		int			sock;
		int			save_errno;

		if (!AcquireExternalFD())
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
					 errmsg("could not connect to %s: too many open files", helper_program[client->helper])));
		sock = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (sock < 0)
		{
			save_errno = errno;
			ReleaseExternalFD();
			errno = save_errno;
			ereport(ERROR,
					(errcode_for_socket_access(), errmsg("could not create a socket for %s: %m", helper_program[client->helper])));
		}
		client->sock = sock;
		millm_helper_status(client->helper, &status);
		if (connect(sock, (struct sockaddr *) &addr, sizeof(addr)) == 0)
		{
			client->helper_pid = status.pid;
			return;
		}
		save_errno = errno;
		millm_client_close(client);
		if (deadline_left(deadline, CONNECT_RETRY_MS) == 0 ||
			(save_errno != EAGAIN && save_errno != EINTR && status.state != MILLM_HELPER_STARTING))
		{
			unavailable(client->helper, &err, save_errno == EAGAIN ? "accepts no more connections" : "is not available");
			millm_ereport(ERROR, &err);
		}
		wait_a_moment(client->helper, CONNECT_RETRY_MS);
	}
}

/* Send everything.  A helper that closed early has left its reason for us to read, so that is no error here. */
static void
send_all(MillmClient *client, const char *data, size_t len, const Deadline *deadline)
{
	MillmError	err;

	while (len > 0)
	{
		ssize_t		n = send(client->sock, data, len, MSG_NOSIGNAL);

		if (n >= 0)
		{
			data += n;
			len -= n;
		}
		else if (errno == EAGAIN || errno == EWOULDBLOCK)
		{
			if (deadline_left(deadline, 1) == 0)
			{
				unavailable(client->helper, &err, "did not take the request in time");
				millm_ereport(ERROR, &err);
			}
			wait_socket(client, WL_SOCKET_WRITEABLE, deadline);
		}
		else if (errno != EINTR)
			return;
	}
}

/* What the engine says of a request that has ended, be it in a RESULT or an ERROR. */
static void
read_use(MillmJson object, MillmUse *use)
{
	MillmJson	usage;

	(void) millm_json_get_double(object, "queue_ms", &use->queue_ms);
	(void) millm_json_get_double(object, "compute_ms", &use->compute_ms);
	if (!millm_json_get(object, "usage", &usage))
		return;
	(void) millm_json_get_int(usage, "prompt_tokens", &use->prompt_tokens);
	(void) millm_json_get_int(usage, "cached_tokens", &use->cached_tokens);
	(void) millm_json_get_int(usage, "completion_tokens", &use->completion_tokens);
}

/* The next whole frame among the bytes received: its kind, or 0.  WIRE_ERROR: err says which. */
static int
take_frame(MillmClient *client, StringInfo out, MillmError *err)
{
	StringInfo	in = &client->in;
	const char *at = in->data + in->cursor;
	size_t		have = in->len - in->cursor;
	WireHeader	header;

	if (have < WIRE_HEADER_BYTES)
		return 0;
	if (wire_get_header(at, WIRE_MAX_REPLY_BYTES, &header, err) != MILLM_OK)
		return WIRE_ERROR;
	if (have - WIRE_HEADER_BYTES < header.length)
		return 0;
	at += WIRE_HEADER_BYTES;
	in->cursor += WIRE_HEADER_BYTES + header.length;
	if (client->is_counted && (header.kind == WIRE_RESULT || header.kind == WIRE_ERROR))
		read_use(millm_json(at, header.length), &client->use);
	if (header.kind == WIRE_ERROR)
	{
		error_from_json(at, header.length, err);
		count_end(client, err->code == MILLM_E_SERVER_BUSY ? MILLM_END_BUSY : err->code == MILLM_E_CANCELED ? MILLM_END_CANCELED : MILLM_END_FAILED);
		return WIRE_ERROR;
	}
	if (header.kind == WIRE_RESULT)
		count_end(client, MILLM_END_DONE);
	resetStringInfo(out);
	appendBinaryStringInfo(out, at, header.length);
	return header.kind;
}

/* Receive what is there, room for one frame at most.  True: something came, or the end did (client->lost). */
static bool
receive_some(MillmClient *client)
{
	StringInfo	in = &client->in;
	WireHeader	header;
	int			need = READ_BYTES;
	ssize_t		n;

	if (in->cursor > 0)
	{
		in->len -= in->cursor;
		memmove(in->data, in->data + in->cursor, in->len);
		in->cursor = 0;
	}
	/* The header was accepted by take_frame(), so the length is bounded. */
	if (in->len >= WIRE_HEADER_BYTES &&
		wire_get_header(in->data, WIRE_MAX_REPLY_BYTES, &header, NULL) == MILLM_OK)
		need = Max(need, (int) header.length + WIRE_HEADER_BYTES - in->len);
	enlargeStringInfo(in, need);
	for (;;)
	{
		n = recv(client->sock, in->data + in->len, need, 0);
		if (n > 0)
		{
			in->len += n;
			return true;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return false;
		client->lost = true;
		return true;
	}
}

int
millm_client_poll(MillmClient *client, StringInfo out, MillmError *err)
{
	for (;;)
	{
		int			kind = take_frame(client, out, err);

		if (kind != 0)
			return kind;
		if (client->sock == PGINVALID_SOCKET)
		{
			millm_fail(err, MILLM_E_INTERNAL, "the connection to %s is closed", helper_program[client->helper]);
			return WIRE_ERROR;
		}
		if (!receive_some(client))
			return 0;
		if (client->lost)
		{
			count_end(client, MILLM_END_FAILED);
			unavailable(client->helper, err, "ended the connection before it answered");
			return WIRE_ERROR;
		}
	}
}

/* The connection broke.  Give the supervisor a moment to notice an exit, then say how the helper ended. */
static void
report_lost(MillmClient *client)
{
	Deadline	deadline = deadline_in(LAST_EXIT_WAIT_MS);
	MillmHelperStatus status;
	MillmError	err;

	do
	{
		wait_a_moment(client->helper, CONNECT_RETRY_MS);
		millm_helper_status(client->helper, &status);
	} while (status.pid == client->helper_pid && deadline_left(&deadline, 1) > 0);
	unavailable(client->helper, &err, "ended the connection before it answered");
	millm_ereport(ERROR, &err);
}

static WireKind
receive_frame(MillmClient *client, StringInfo out, const Deadline *deadline)
{
	MillmError	err;
	int			kind;

	while ((kind = millm_client_poll(client, out, &err)) == 0)
	{
		if (deadline_left(deadline, 1) == 0)
		{
			unavailable(client->helper, &err, "did not answer in time");
			millm_ereport(ERROR, &err);
		}
		wait_socket(client, WL_SOCKET_READABLE, deadline);
	}
	if (kind == WIRE_ERROR)
	{
		millm_client_close(client);
		if (client->lost)
			report_lost(client);
		millm_ereport(ERROR, &err);
	}
	return kind;
}

WireKind
millm_client_receive(MillmClient *client, StringInfo out, int timeout_ms)
{
	Deadline	deadline = deadline_in(timeout_ms);
	volatile WireKind kind = 0;

	PG_TRY();
	{
		kind = receive_frame(client, out, &deadline);
	}
	PG_CATCH();
	{
		millm_client_close(client);
		PG_RE_THROW();
	}
	PG_END_TRY();
	return kind;
}

/*
 * Write out what the backend has for its SQL client, whatever the socket takes; then wait until it has taken the rest.
 * A backend that must end here ends without a word, as it does in PostgreSQL's own wait: the word would wait for the client too.
 */
static void
flush_rows(void)
{
	while (pq_flush_if_writable() == 0 && pq_is_send_pending())
	{
		int			rc = WaitLatchOrSocket(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | WL_SOCKET_WRITEABLE,
										   MyProcPort->sock, -1, WAIT_EVENT_CLIENT_WRITE);

		if (rc & WL_LATCH_SET)
			ResetLatch(MyLatch);
		if (ProcDiePending)
			whereToSendOutput = DestNone;
		CHECK_FOR_INTERRUPTS();
	}
	CHECK_FOR_INTERRUPTS();		/* a failed write has left its mark there */
}

void
millm_client_flush_rows(MillmClient *client)
{
	if (whereToSendOutput != DestRemote || !MyProcPort)
		return;
	PG_TRY();
	{
		flush_rows();
	}
	PG_CATCH();
	{
		millm_client_close(client);
		PG_RE_THROW();
	}
	PG_END_TRY();
}

/* The first frame must be the HELLO of the program we expect, of our own build. */
static void
check_hello(MillmClient *client, WireKind kind, StringInfo payload)
{
	MillmJson	hello = millm_json(payload->data, payload->len);
	char	   *version = millm_json_get_string(hello, "version");
	char	   *program = millm_json_get_string(hello, "program");
	int64		protocol = 0;
	MillmError	err;

	if (kind != WIRE_HELLO || !version || !program || !millm_json_get_int(hello, "protocol", &protocol))
	{
		millm_fail(&err, MILLM_E_PROTOCOL_VIOLATION, "%s did not say hello", helper_program[client->helper]);
		millm_ereport(ERROR, &err);
	}
	if (protocol != WIRE_PROTOCOL || strcmp(version, MILLM_VERSION) != 0 ||
		strcmp(program, helper_program[client->helper]) != 0)
	{
		millm_fail(&err, MILLM_E_VERSION_MISMATCH, "%s is of another version than the extension", helper_program[client->helper]);
		millm_detail(&err, "It is %s %s with protocol " INT64_FORMAT "; the extension's library is %s with protocol %d.",
					 program, version, protocol, MILLM_VERSION, WIRE_PROTOCOL);
		millm_hint(&err, "Reconnect if the extension was upgraded, or restart the server.");
		millm_ereport(ERROR, &err);
	}
}

/* As millm_client_open(); asker: count the request as his.  NULL: it is not counted. */
static MillmClient *
open_client(MillmHelper helper, const char *request, int timeout_ms, const MillmAsker *asker)
{
	size_t		len = strlen(request);
	Deadline	deadline = deadline_in(timeout_ms < 0 ? CONNECT_TIMEOUT_MS : timeout_ms);
	MillmClient *client;
	StringInfoData frames;
	char		hello[WIRE_HELLO_BYTES];
	char		header[WIRE_HEADER_BYTES];
	size_t		hello_len;

	if (len > WIRE_MAX_REQUEST_BYTES)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "request to %s is too large", helper_program[helper]);
		millm_detail(&err, "It has %zu bytes; at most %u are accepted.", len, WIRE_MAX_REQUEST_BYTES);
		millm_ereport(ERROR, &err);
	}
	client = palloc0(sizeof(*client));
	client->helper = helper;
	client->sock = PGINVALID_SOCKET;
	if (asker)
	{
		client->is_counted = true;
		client->asker = *asker;
	}
	initStringInfo(&client->in);
	client->on_reset.func = close_on_reset;
	client->on_reset.arg = client;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &client->on_reset);

	initStringInfo(&frames);
	hello_len = wire_put_hello(hello, sizeof(hello), "millm.so");
	wire_put_header(header, WIRE_HELLO, (uint32_t) hello_len);
	appendBinaryStringInfo(&frames, header, sizeof(header));
	appendBinaryStringInfo(&frames, hello, (int) hello_len);
	wire_put_header(header, WIRE_REQUEST, (uint32_t) len);
	appendBinaryStringInfo(&frames, header, sizeof(header));
	appendBinaryStringInfo(&frames, request, (int) len);

	PG_TRY();
	{
		connect_helper(client, &deadline);
		send_all(client, frames.data, frames.len, &deadline);
		resetStringInfo(&frames);
		check_hello(client, receive_frame(client, &frames, &deadline), &frames);
	}
	PG_CATCH();
	{
		if (geterrcode() != ERRCODE_QUERY_CANCELED)
			count_end(client, MILLM_END_FAILED);
		millm_client_close(client);
		PG_RE_THROW();
	}
	PG_END_TRY();
	pfree(frames.data);
	return client;
}

MillmClient *
millm_client_open(MillmHelper helper, const char *request, int timeout_ms)
{
	return open_client(helper, request, timeout_ms, NULL);
}

MillmClient *
millm_compute_open(const char *request)
{
	MillmAsker	asker;

	millm_stat_asker(&asker);
	return open_client(MILLM_ENGINE, request, -1, &asker);
}

/* Read the one RESULT that answers. */
static void
receive_result(MillmClient *client, StringInfo out, int timeout_ms)
{
	MillmError	err;

	if (millm_client_receive(client, out, timeout_ms) != WIRE_RESULT)
	{
		millm_client_close(client);
		millm_fail(&err, MILLM_E_PROTOCOL_VIOLATION, "%s sent something else than a result", helper_program[client->helper]);
		millm_ereport(ERROR, &err);
	}
	millm_client_close(client);
}

void
millm_client_call(MillmHelper helper, const char *request, StringInfo out, int timeout_ms)
{
	receive_result(millm_client_open(helper, request, -1), out, timeout_ms);
}

void
millm_compute_call(const char *request, StringInfo out)
{
	receive_result(millm_compute_open(request), out, -1);
}

void
millm_begin_compute(StringInfo request, const char *op)
{
	appendStringInfo(request, "{\"op\":\"%s\",\"role\":%u", op, GetUserId());
}

void
millm_append_text(StringInfo request, const text *value)
{
	const char *bytes = VARDATA_ANY(value);
	int			len = VARSIZE_ANY_EXHDR(value);
	char	   *utf8;

	if (len > (int) WIRE_MAX_REQUEST_BYTES)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "text is too long for a request");
		millm_detail(&err, "It has %d bytes; at most %u are accepted.", len, WIRE_MAX_REQUEST_BYTES);
		millm_ereport(ERROR, &err);
	}
	utf8 = pg_server_to_any(bytes, len, PG_UTF8);
	millm_json_append_string(request, utf8, utf8 == bytes ? (size_t) len : strlen(utf8));
}

void
millm_append_model(StringInfo request, const text *wanted)
{
	char	   *name = text_to_cstring(wanted);
	MillmLoadedModel loaded;
	MillmError	err;
	char		id[24];

	if (millm_loaded_model(&loaded))
	{
		snprintf(id, sizeof(id), INT64_FORMAT, loaded.id);
		if (strcmp(name, loaded.name) == 0 || strcmp(name, id) == 0)
		{
			appendStringInfo(request, ",\"model_uuid\":\"%s\"", loaded.uuid);
			return;
		}
		millm_fail(&err, MILLM_E_MODEL_NOT_LOADED, "model \"%s\" is not loaded", name);
		millm_detail(&err, "The loaded model is \"%s\" (id %s).", loaded.name, id);
	}
	else
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_LOADED, "model \"%s\" is not loaded", name);
		millm_detail(&err, "No model is loaded.");
	}
	millm_hint(&err, "Load it with millm.load().");
	millm_ereport(ERROR, &err);
}

text *
millm_reply_text(StringInfo reply, const char *field)
{
	StringInfoData buf;
	MillmJson	value;
	char	   *converted;

	initStringInfo(&buf);
	if (!millm_json_get(millm_json(reply->data, reply->len), field, &value) || !millm_json_string(value, &buf))
		millm_reply_invalid(field);
	converted = pg_any_to_server(buf.data, buf.len, PG_UTF8);
	return converted == buf.data ? cstring_to_text_with_len(buf.data, buf.len) : cstring_to_text(converted);
}

void
millm_reply_invalid(const char *what)
{
	MillmError	err;

	millm_fail(&err, MILLM_E_PROTOCOL_VIOLATION, "invalid reply of a helper program");
	millm_detail(&err, "It lacks a valid \"%s\".", what);
	millm_ereport(ERROR, &err);
	pg_unreachable();
}
