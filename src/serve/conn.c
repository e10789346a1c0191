/*
 * conn.c -- one client's conversation: HELLO, REQUEST, frames of the answer, end.
 *
 * Owns the socket and two bounded buffers.  The incoming one grows with what has really come, never
 * with what a header claims.  The outgoing one is appended to by any thread and written by the loop.
 *
 *     HELLO --hello ok--> REQUEST --whole request--> BUSY --answer flushed--> closed
 *        \_______refused: ERROR is queued_______/       \__EOF, reset, stray bytes__/
 *
 * A client that closes, or shuts down its sending side, is gone: that is how it cancels.
 */
#include "conn.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "version.h"

#define MAX_HELLO_BYTES		1024
#define READ_BYTES			65536
/* One whole answer and the frames before it that the client has yet to read. */
#define MAX_OUTGOING_BYTES	((size_t) WIRE_MAX_REPLY_BYTES + (4u << 20))

/* ---- references ---------------------------------------------------------------------------- */

MillmConn *
millm_conn_ref(MillmConn *conn)
{
	atomic_fetch_add(&conn->refs, 1);
	return conn;
}

void
millm_conn_unref(MillmConn *conn)
{
	const MillmService *service;

	if (atomic_fetch_sub(&conn->refs, 1) != 1)
		return;
	service = conn->server->service;
	if (conn->data && service->on_free)
		service->on_free(service->arg, conn);
	free(conn->out);
	free(conn);
}

void
millm_conn_set_data(MillmConn *conn, void *data)
{
	conn->data = data;
}

void *
millm_conn_data(MillmConn *conn)
{
	return conn->data;
}

bool
millm_conn_is_closed(MillmConn *conn)
{
	bool		closed;

	pthread_mutex_lock(&conn->server->lock);
	closed = conn->closed;
	pthread_mutex_unlock(&conn->server->lock);
	return closed;
}

/* ---- the answer: any thread ---------------------------------------------------------------- */

/* Make room for n more bytes behind out_end.  Under the lock. */
static bool
reserve_out(MillmConn *conn, size_t n)
{
	size_t		used = conn->out_end - conn->out_start;
	size_t		capacity = conn->out_capacity ? conn->out_capacity : 1024;
	unsigned char *p;

	if (n > MAX_OUTGOING_BYTES - used)
		return false;
	if (conn->out_capacity - conn->out_end >= n)
		return true;
	if (conn->out_start > 0)
	{
		memmove(conn->out, conn->out + conn->out_start, used);
		conn->out_start = 0;
		conn->out_end = used;
		if (conn->out_capacity - used >= n)
			return true;
	}
	while (capacity < used + n)
		capacity *= 2;
	p = realloc(conn->out, capacity);
	if (!p)
		return false;
	conn->out = p;
	conn->out_capacity = capacity;
	return true;
}

bool
millm_conn_queue_bytes(MillmConn *conn, WireKind kind, const void *payload, size_t len)
{
	Server	   *server = conn->server;
	bool		ok = false;

	pthread_mutex_lock(&server->lock);
	if (conn->closed || conn->answered || conn->overflowed)
		;
	else if (len > WIRE_MAX_REPLY_BYTES || !reserve_out(conn, WIRE_HEADER_BYTES + len))
		conn->overflowed = true;
	else
	{
		wire_put_header(conn->out + conn->out_end, kind, (uint32_t) len);
		memcpy(conn->out + conn->out_end + WIRE_HEADER_BYTES, payload, len);
		conn->out_end += WIRE_HEADER_BYTES + len;
		conn->answered = kind == WIRE_RESULT || kind == WIRE_ERROR;
		ok = true;
	}
	if ((ok || conn->overflowed) && !conn->is_dirty && !conn->closed)
	{
		conn->is_dirty = true;
		conn->next_dirty = server->dirty;
		server->dirty = millm_conn_ref(conn);
	}
	pthread_mutex_unlock(&server->lock);
	return ok;
}

void
millm_conn_flush(MillmConn *conn)
{
	Server	   *server = conn->server;
	bool		wake;

	pthread_mutex_lock(&server->lock);
	wake = server->dirty && !server->is_woken;
	server->is_woken |= wake;
	pthread_mutex_unlock(&server->lock);
	if (wake)
	{
		uint64_t	one = 1;

		/* Cannot block or fail: the counter is reset by every read, far below its limit. */
		(void) !write(server->wake_fd, &one, sizeof(one));
	}
}

bool
millm_conn_send_bytes(MillmConn *conn, WireKind kind, const void *payload, size_t len)
{
	const bool	ok = millm_conn_queue_bytes(conn, kind, payload, len);

	millm_conn_flush(conn);
	return ok;
}

bool
millm_conn_send(MillmConn *conn, WireKind kind, json_t *payload)
{
	char	   *text = payload ? json_dumps(payload, JSON_COMPACT) : NULL;
	size_t		len = text ? strlen(text) : 0;
	bool		final = kind == WIRE_RESULT || kind == WIRE_ERROR;
	bool		ok;
	MillmError	err;

	json_decref(payload);
	if (text && len <= WIRE_MAX_REPLY_BYTES)
		ok = millm_conn_send_bytes(conn, kind, text, len);
	else
	{
		/* A client that waits for a final answer gets one. */
		if (!text)
			millm_fail(&err, MILLM_E_INTERNAL, "could not write the answer as JSON");
		else
		{
			millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the answer is too large");
			millm_detail(&err, "It has %zu bytes; at most %u are sent.", len, WIRE_MAX_REPLY_BYTES);
		}
		if (final && kind != WIRE_ERROR)
			millm_conn_error(conn, &err);
		else
			millm_log("ERROR", "%s", err.message);
		ok = false;
	}
	free(text);
	return ok;
}

void
millm_conn_result(MillmConn *conn, json_t *payload)
{
	millm_conn_send(conn, WIRE_RESULT, payload);
}

json_t *
millm_error_json(const MillmError *error)
{
	json_t	   *payload = json_pack("{s:s}", "code", millm_code_name(error->code));
	const char *names[] = {"message", "detail", "hint"};
	const char *texts[] = {error->message, error->detail, error->hint};

	for (int i = 0; i < 3; i++)
	{
		json_t	   *text;

		if (i > 0 && !texts[i][0])
			continue;
		/* A path or a field name may be any bytes; JSON takes only UTF-8. */
		text = json_string(texts[i]);
		if (!text)
		{
			char		ascii[sizeof(error->detail)];
			size_t		n = 0;

			for (const char *p = texts[i]; *p && n < sizeof(ascii) - 1; p++)
				ascii[n++] = (unsigned char) *p < 0x80 ? *p : '?';
			ascii[n] = '\0';
			text = json_string(ascii);
		}
		json_object_set_new(payload, names[i], text);
	}
	if (error->wait_s > 0)
		json_object_set_new(payload, "expected_wait_s", json_integer(error->wait_s));
	return payload;
}

void
millm_conn_error(MillmConn *conn, const MillmError *error)
{
	millm_conn_send(conn, WIRE_ERROR, millm_error_json(error));
}

size_t
millm_conn_pending_bytes(MillmConn *conn)
{
	size_t		n;

	pthread_mutex_lock(&conn->server->lock);
	n = conn->out_end - conn->out_start;
	pthread_mutex_unlock(&conn->server->lock);
	return n;
}

int
millm_conn_stalled_ms(MillmConn *conn)
{
	int64_t		since;

	pthread_mutex_lock(&conn->server->lock);
	since = conn->blocked_since_ms;
	pthread_mutex_unlock(&conn->server->lock);
	return since ? (int) (millm_now_ms() - since) : 0;
}

/* ---- writing: the loop --------------------------------------------------------------------- */

static void
set_timer(MillmConn *conn, int seconds)
{
	struct timeval tv = {.tv_sec = seconds};

	event_add(conn->timer, &tv);
}

/* Write what the socket takes; close when the answer is out, or the client is gone. */
static void
flush(MillmConn *conn)
{
	Server	   *server = conn->server;
	bool		gone;
	bool		progress = false;
	size_t		left;
	bool		answered;

	pthread_mutex_lock(&server->lock);
	gone = conn->overflowed;
	while (!gone && conn->out_start < conn->out_end)
	{
		ssize_t		n = send(conn->fd, conn->out + conn->out_start, conn->out_end - conn->out_start,
							 MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n > 0)
		{
			conn->out_start += (size_t) n;
			progress = true;
		}
		else if (n < 0 && errno == EINTR)
			continue;
		else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			break;
		else
			gone = true;
	}
	left = conn->out_end - conn->out_start;
	if (left == 0)
	{
		conn->out_start = conn->out_end = 0;
		conn->blocked_since_ms = 0;
	}
	else if (progress || conn->blocked_since_ms == 0)
		conn->blocked_since_ms = millm_now_ms();
	answered = conn->answered;
	pthread_mutex_unlock(&server->lock);

	if (gone || (answered && left == 0))
	{
		conn_close(conn);
		return;
	}
	if (left == 0)
		return;
	event_add(conn->writable, NULL);
	if (answered && (progress || !event_pending(conn->timer, EV_TIMEOUT, NULL)))
		set_timer(conn, SERVE_LINGER_S);
}

void
conn_flush_dirty(Server *server)
{
	for (;;)
	{
		MillmConn  *conn;
		bool		closed = false;

		pthread_mutex_lock(&server->lock);
		server->is_woken = false;	/* what is queued from here on may be too late for this round */
		conn = server->dirty;
		if (conn)
		{
			server->dirty = conn->next_dirty;
			conn->is_dirty = false;
			closed = conn->closed;
		}
		pthread_mutex_unlock(&server->lock);
		if (!conn)
			break;
		if (!closed)
			flush(conn);
		millm_conn_unref(conn);
	}
}

void
conn_close(MillmConn *conn)
{
	Server	   *server = conn->server;
	bool		answered;

	if (conn->fd < 0)
		return;
	event_free(conn->readable);
	event_free(conn->writable);
	event_free(conn->timer);
	close(conn->fd);
	conn->fd = -1;
	server->incoming_bytes -= conn->in_capacity;
	free(conn->in);
	conn->in = NULL;
	conn->in_capacity = 0;
	if (conn->prev)
		conn->prev->next = conn->next;
	else
		server->conns = conn->next;
	if (conn->next)
		conn->next->prev = conn->prev;
	server->n_conns--;

	pthread_mutex_lock(&server->lock);
	conn->closed = true;
	answered = conn->answered;
	free(conn->out);
	conn->out = NULL;
	conn->out_start = conn->out_end = conn->out_capacity = 0;
	conn->blocked_since_ms = 0;
	pthread_mutex_unlock(&server->lock);

	if (conn->delivered && !answered && !server->ended)
		server->service->on_close(server->service->arg, conn);
	millm_conn_unref(conn);
}

/* ---- reading: the loop --------------------------------------------------------------------- */

static void
refuse(MillmConn *conn, const MillmError *err)
{
	conn->state = CONN_BUSY;
	event_del(conn->timer);
	millm_conn_error(conn, err);
}

/* Parse the payload of a frame, which must be a JSON object; NULL with err filled otherwise. */
static json_t *
parse(const unsigned char *payload, size_t len, MillmError *err)
{
	json_error_t jerr;
	json_t	   *object = json_loadb((const char *) payload, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &jerr);

	if (json_is_object(object))
		return object;
	millm_fail(err, MILLM_E_PROTOCOL_VIOLATION, "payload of the frame is not a JSON object");
	if (!object)
		millm_detail(err, "At byte %d: %s.", jerr.position, jerr.text);
	json_decref(object);
	return NULL;
}

static MillmCode
check_hello(const MillmService *service, json_t *hello, MillmError *err)
{
	MillmFields f;
	int64_t		protocol = -1;
	const char *version = "";
	const char *program = "";

	millm_fields_begin(&f, hello, err);
	millm_field_int(&f, "protocol", 0, INT32_MAX, &protocol);
	millm_field_string(&f, "version", &version);
	millm_field_string(&f, "program", &program);
	if (millm_fields_end(&f) != MILLM_OK)
		return f.code;
	if (protocol == WIRE_PROTOCOL && strcmp(version, MILLM_VERSION) == 0)
		return MILLM_OK;
	millm_fail(err, MILLM_E_VERSION_MISMATCH, "%s and its client are of different versions", service->program);
	millm_detail(err, "%s is %s (protocol %d); \"%.50s\" is %.50s (protocol %lld).", service->program,
				 MILLM_VERSION, WIRE_PROTOCOL, program, version, (long long) protocol);
	millm_hint(err, "Both must come from one installation; restart the server after an upgrade.");
	return MILLM_E_VERSION_MISMATCH;
}

/* A whole frame has come: header.length bytes at payload. */
static void
take_frame(MillmConn *conn, WireHeader header, const unsigned char *payload)
{
	Server	   *server = conn->server;
	const MillmService *service = server->service;
	MillmError	err = {0};
	json_t	   *object = NULL;
	const char *op;

	if (header.kind != (conn->state == CONN_HELLO ? WIRE_HELLO : WIRE_REQUEST))
	{
		millm_fail(&err, MILLM_E_PROTOCOL_VIOLATION, "unexpected frame kind %d: a %s is awaited",
				   (int) header.kind, conn->state == CONN_HELLO ? "HELLO" : "REQUEST");
		refuse(conn, &err);
		return;
	}
	object = parse(payload, header.length, &err);
	if (!object || (conn->state == CONN_HELLO && check_hello(service, object, &err) != MILLM_OK))
		refuse(conn, &err);
	else if (conn->state == CONN_HELLO)
		conn->state = CONN_REQUEST;
	else
	{
		conn->state = CONN_BUSY;
		event_del(conn->timer);
		op = json_string_value(json_object_get(object, "op"));
		if (op && strcmp(op, "shutdown") == 0)
		{
			if (json_object_size(object) != 1)
			{
				millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "a shutdown has no arguments");
				refuse(conn, &err);
			}
			else
			{
				millm_conn_result(conn, json_object());
				server->on_stop_request(server);
			}
		}
		else
		{
			conn->delivered = true;
			service->on_request(service->arg, conn, object);
		}
	}
	json_decref(object);
}

/* Make room for at least one more byte of the frame that needs `need` bytes in all. */
static bool
reserve_in(MillmConn *conn, size_t need, MillmError *err)
{
	Server	   *server = conn->server;
	size_t		capacity = conn->in_capacity ? conn->in_capacity : 1024;
	unsigned char *p;

	if (conn->n_in < conn->in_capacity)
		return true;
	while (capacity <= conn->n_in)
		capacity *= 2;
	if (capacity > need && need > conn->n_in)
		capacity = need;
	if (capacity - conn->in_capacity > SERVE_MAX_INCOMING_BYTES - server->incoming_bytes)
	{
		millm_fail(err, MILLM_E_SERVER_BUSY, "too many large requests are arriving at once");
		millm_detail(err, "Requests that are still arriving may take %zu bytes together.", SERVE_MAX_INCOMING_BYTES);
		return false;
	}
	p = realloc(conn->in, capacity);
	if (!p)
	{
		millm_fail(err, MILLM_E_INTERNAL, "out of memory");
		return false;
	}
	conn->in = p;
	server->incoming_bytes += capacity - conn->in_capacity;
	conn->in_capacity = capacity;
	return true;
}

static void
on_readable(evutil_socket_t fd, short what, void *arg)
{
	MillmConn  *conn = arg;
	MillmError	err;
	size_t		budget = 4 * READ_BYTES;	/* then the others get their turn */

	(void) what;
	while (conn->state != CONN_BUSY && budget > 0)
	{
		size_t		need = WIRE_HEADER_BYTES;
		WireHeader	header = {0};
		size_t		want;
		ssize_t		n;

		if (conn->n_in >= WIRE_HEADER_BYTES)
		{
			uint32_t	max = conn->state == CONN_HELLO ? MAX_HELLO_BYTES : WIRE_MAX_REQUEST_BYTES;

			if (wire_get_header(conn->in, max, &header, &err) != MILLM_OK)
			{
				refuse(conn, &err);
				break;
			}
			need += header.length;
			if (conn->n_in >= need)
			{
				take_frame(conn, header, conn->in + WIRE_HEADER_BYTES);
				memmove(conn->in, conn->in + need, conn->n_in - need);
				conn->n_in -= need;
				continue;
			}
		}
		if (!reserve_in(conn, need, &err))
		{
			refuse(conn, &err);
			break;
		}
		want = conn->in_capacity - conn->n_in;
		if (want > budget)
			want = budget;
		n = recv(fd, conn->in + conn->n_in, want, MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return;
		if (n <= 0)
		{
			conn_close(conn);
			return;
		}
		conn->n_in += (size_t) n;
		budget -= (size_t) n;
	}
	if (conn->state != CONN_BUSY)
		return;

	/* Nothing more may come: only the end of the client, which is its way to cancel. */
	if (conn->in)
	{
		bool		stray = conn->n_in > 0;

		conn->server->incoming_bytes -= conn->in_capacity;
		free(conn->in);
		conn->in = NULL;
		conn->in_capacity = conn->n_in = 0;
		if (stray && conn->delivered)
		{
			conn_close(conn);
			return;
		}
	}
	for (;;)
	{
		unsigned char stray[4096];
		ssize_t		n = recv(fd, stray, sizeof(stray), MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return;
		if (n > 0 && !conn->delivered)
		{
			if (budget < sizeof(stray))
				return;
			budget -= sizeof(stray);
			continue;			/* the rest of what we have refused; it shall read why */
		}
		if (!conn->delivered)
		{
			/* A half-closed client may still read the refusal, if it fits. */
			millm_conn_ref(conn);
			flush(conn);
			conn_close(conn);
			millm_conn_unref(conn);
			return;
		}
		conn_close(conn);
		return;
	}
}

static void
on_writable(evutil_socket_t fd, short what, void *arg)
{
	(void) fd;
	(void) what;
	flush(arg);
}

static void
on_timer(evutil_socket_t fd, short what, void *arg)
{
	MillmConn  *conn = arg;
	MillmError	err;

	(void) fd;
	(void) what;
	if (conn->state == CONN_BUSY)
	{
		conn_close(conn);			/* it does not read its answer */
		return;
	}
	millm_fail(&err, MILLM_E_PROTOCOL_VIOLATION, "no whole request came within %d s", MILLM_SERVE_HELLO_TIMEOUT_S);
	refuse(conn, &err);
}

void
conn_open(Server *server, int fd)
{
	MillmConn  *conn = calloc(1, sizeof(*conn));
	char		hello[WIRE_HELLO_BYTES];
	size_t		len;

	if (!conn)
	{
		close(fd);
		return;
	}
	conn->server = server;
	atomic_init(&conn->refs, 1);
	conn->fd = fd;
	conn->readable = event_new(server->base, fd, EV_READ | EV_PERSIST, on_readable, conn);
	conn->writable = event_new(server->base, fd, EV_WRITE, on_writable, conn);
	conn->timer = evtimer_new(server->base, on_timer, conn);
	if (!conn->readable || !conn->writable || !conn->timer)
	{
		if (conn->readable)
			event_free(conn->readable);
		if (conn->writable)
			event_free(conn->writable);
		if (conn->timer)
			event_free(conn->timer);
		close(fd);
		free(conn);
		return;
	}
	conn->next = server->conns;
	if (conn->next)
		conn->next->prev = conn;
	server->conns = conn;
	server->n_conns++;
	event_add(conn->readable, NULL);
	set_timer(conn, MILLM_SERVE_HELLO_TIMEOUT_S);

	len = wire_put_hello(hello, sizeof(hello), server->service->program);
	millm_conn_send_bytes(conn, WIRE_HELLO, hello, len);
	if (server->n_conns > MILLM_SERVE_MAX_CONNECTIONS)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_SERVER_BUSY, "%s has too many clients", server->service->program);
		millm_detail(&err, "At most %d may be connected.", MILLM_SERVE_MAX_CONNECTIONS);
		refuse(conn, &err);
	}
}
