/*
 * test_serve.c -- a helper process under a supervisor: ready, conversations, strangers, the end.
 *
 * Each test forks a real helper (millm_serve() with a small service) and talks to it over its socket.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "arith.h"
#include "serve.h"
#include "version.h"

#define WAIT_MS 20000			/* of anything that should happen at once */

/* ---- the helper ---------------------------------------------------------------------------- */

static int	n_closed;			/* conversations that ended before their answer; in the helper */
static atomic_int n_floods;		/* threads that hold a connection */
static atomic_bool is_ending;

static void *
flood(void *arg)
{
	MillmConn  *conn = arg;
	char		text[1000];

	memset(text, 'x', sizeof(text) - 1);
	text[sizeof(text) - 1] = '\0';
	/* as a well-mannered producer: pause when the client is behind, end when it is gone */
	for (int i = 0; i < 20000 && !millm_conn_is_closed(conn) && !is_ending; i++)
	{
		while (millm_conn_pending_bytes(conn) > 100000 && !millm_conn_is_closed(conn) && !is_ending)
			usleep(1000);
		millm_conn_send(conn, WIRE_TEXT, json_pack("{s:s}", "text", text));
	}
	millm_conn_result(conn, json_object());
	millm_conn_unref(conn);
	n_floods--;
	return NULL;
}

static void
on_request(void *arg, MillmConn *conn, json_t *request)
{
	MillmFields f;
	MillmError	err;
	const char *op = "";
	const char *text = "";
	size_t		len = 0;
	pthread_t	thread;

	(void) arg;
	millm_fields_begin(&f, request, &err);
	millm_field_string(&f, "op", &op);
	millm_field_text(&f, "text", &text, &len);
	if (millm_fields_end(&f) != MILLM_OK)
		millm_conn_error(conn, &err);
	else if (strcmp(op, "echo") == 0)
		millm_conn_result(conn, json_pack("{s:s%}", "text", text, len));
	else if (strcmp(op, "closed") == 0)
		millm_conn_result(conn, json_pack("{s:i}", "n", n_closed));
	else if (strcmp(op, "flood") == 0)
	{
		n_floods++;
		pthread_create(&thread, NULL, flood, millm_conn_ref(conn));
		pthread_detach(thread);
	}
	else if (strcmp(op, "huge") == 0)
	{
		char	   *big = malloc(WIRE_MAX_REPLY_BYTES + 1);

		memset(big, 'x', WIRE_MAX_REPLY_BYTES + 1);
		millm_conn_result(conn, json_pack("{s:s%}", "text", big, (size_t) WIRE_MAX_REPLY_BYTES + 1));
		free(big);
	}
	/* "never" is not answered */
}

static void
on_close(void *arg, MillmConn *conn)
{
	(void) arg;
	(void) conn;
	n_closed++;
}

static void
on_shutdown(void *arg)
{
	(void) arg;
	is_ending = true;
	while (n_floods > 0)
		usleep(1000);
}

/* ---- the harness --------------------------------------------------------------------------- */

typedef struct Helper
{
	pid_t		pid;
	int			line;			/* the supervisor's end of fd 3 */
	char		dir[64];
	char		path[96];
} Helper;

static void
must_read(int fd, void *buf, size_t n)
{
	for (size_t at = 0; at < n;)
	{
		struct pollfd p = {.fd = fd, .events = POLLIN};
		ssize_t		k;

		assert_int_equal(poll(&p, 1, WAIT_MS), 1);
		k = read(fd, (char *) buf + at, n - at);
		assert_true(k > 0);
		at += (size_t) k;
	}
}

/* The next frame; its payload is NUL-terminated and the caller's. */
static WireKind
read_frame(int fd, char **payload, uint32_t *len)
{
	unsigned char header[WIRE_HEADER_BYTES];
	WireHeader	h;

	must_read(fd, header, sizeof(header));
	assert_int_equal(wire_get_header(header, WIRE_MAX_REPLY_BYTES, &h, NULL), MILLM_OK);
	*payload = malloc(h.length + 1);
	must_read(fd, *payload, h.length);
	(*payload)[h.length] = '\0';
	*len = h.length;
	return h.kind;
}

/* Start a helper at h->path and wait until it listens. */
static void
start_there(Helper *h)
{
	int			pair[2];
	char	   *payload;
	uint32_t	len;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	h->pid = fork();
	assert_true(h->pid >= 0);
	if (h->pid == 0)
	{
		MillmService service = {"test", on_request, on_close, on_shutdown, NULL, NULL};

		if (pair[1] != 3)
			dup2(pair[1], 3);
		for (int fd = 4; fd < 64; fd++)
			close(fd);
		if (freopen("/dev/null", "w", stderr) == NULL)
			_exit(99);
		_exit(millm_serve(&service, h->path, false));
	}
	close(pair[1]);
	h->line = pair[0];
	assert_int_equal(read_frame(h->line, &payload, &len), WIRE_HELLO);
	assert_non_null(strstr(payload, "\"program\":\"test\""));
	free(payload);
}

static void
start(Helper *h)
{
	strcpy(h->dir, "/tmp/test_serve.XXXXXX");
	assert_non_null(mkdtemp(h->dir));
	snprintf(h->path, sizeof(h->path), "%s/s", h->dir);
	start_there(h);
}

/* The exit status, once the process is gone; it must go by itself. */
static int
exit_status(Helper *h)
{
	int			status;

	for (int i = 0; i < WAIT_MS; i++)
	{
		if (waitpid(h->pid, &status, WNOHANG) == h->pid)
			return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
		usleep(1000);
	}
	kill(h->pid, SIGKILL);
	waitpid(h->pid, &status, 0);
	return -2;
}

static void
finish(Helper *h)
{
	close(h->line);				/* the supervisor is gone */
	assert_int_equal(exit_status(h), 0);
	assert_int_equal(access(h->path, F_OK), -1);
	rmdir(h->dir);
}

static int
dial(Helper *h)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int			fd = socket(AF_UNIX, SOCK_STREAM, 0);
	char	   *payload;
	uint32_t	len;

	strcpy(addr.sun_path, h->path);
	assert_int_equal(connect(fd, (struct sockaddr *) &addr, sizeof(addr)), 0);
	assert_int_equal(read_frame(fd, &payload, &len), WIRE_HELLO);
	free(payload);
	return fd;
}

/* Header and payload at once: a helper that refuses the frame for its header closes, and the rest could not be sent any more. */
static void
write_frame(int fd, WireKind kind, const char *text, size_t len)
{
	const size_t n = WIRE_HEADER_BYTES + len;
	char	   *frame = malloc(n);

	assert_non_null(frame);
	wire_put_header(frame, kind, (uint32_t) len);
	memcpy(frame + WIRE_HEADER_BYTES, text, len);
	for (size_t at = 0; at < n;)
	{
		ssize_t		k = send(fd, frame + at, n - at, MSG_NOSIGNAL);

		assert_true(k > 0);
		at += (size_t) k;
	}
	free(frame);
}

static int
ask(Helper *h, const char *request)
{
	char		hello[WIRE_HELLO_BYTES];
	int			fd = dial(h);

	write_frame(fd, WIRE_HELLO, hello, wire_put_hello(hello, sizeof(hello), "client"));
	write_frame(fd, WIRE_REQUEST, request, strlen(request));
	return fd;
}

/* Read the answer, which must be a final frame of that kind that contains the words, and then the end. */
static void
expect(int fd, WireKind kind, const char *words)
{
	char	   *payload;
	uint32_t	len;
	char		c;

	assert_int_equal(read_frame(fd, &payload, &len), kind);
	if (!strstr(payload, words))
		fail_msg("\"%s\" is not in %s", words, payload);
	free(payload);
	assert_true(read(fd, &c, 1) <= 0);
	close(fd);
}

/* ---- the tests ----------------------------------------------------------------------------- */

static void
conversation(void **state)
{
	Helper		h;
	struct stat st;

	(void) state;
	start(&h);
	assert_int_equal(stat(h.path, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0600);
	expect(ask(&h, "{\"op\":\"echo\",\"text\":\"a\\u0000b\"}"), WIRE_RESULT, "a\\u0000b");
	expect(ask(&h, "{\"op\":\"echo\",\"txet\":\"a\"}"), WIRE_ERROR, "unrecognized field \\\"txet\\\"");
	expect(ask(&h, "{\"op\":\"echo\",\"text\":5}"), WIRE_ERROR, "\\\"text\\\" must be a string");
	expect(ask(&h, "{\"op\":\"huge\"}"), WIRE_ERROR, "too large");
	for (int i = 0; i < 200; i++)
		expect(ask(&h, "{\"op\":\"echo\",\"text\":\"x\"}"), WIRE_RESULT, "x");
	finish(&h);
}

static void
strangers(void **state)
{
	Helper		h;
	char		hello[WIRE_HELLO_BYTES];
	size_t		n = wire_put_hello(hello, sizeof(hello), "client");
	int			fd;

	(void) state;
	start(&h);
	fd = dial(&h);
	assert_int_equal(write(fd, "GET / HTTP/1.1\r\n\r\n", 18), 18);
	expect(fd, WIRE_ERROR, "PROTOCOL_VIOLATION");

	fd = dial(&h);
	write_frame(fd, WIRE_REQUEST, "{}", 2);
	expect(fd, WIRE_ERROR, "HELLO is awaited");

	fd = dial(&h);
	write_frame(fd, WIRE_HELLO, "{\"protocol\":1,\"version\":\"0.9.9\",\"program\":\"old\"}", 48);
	expect(fd, WIRE_ERROR, "VERSION_MISMATCH");

	fd = dial(&h);
	write_frame(fd, WIRE_HELLO, hello, n);
	write_frame(fd, WIRE_HELLO, hello, n);
	expect(fd, WIRE_ERROR, "REQUEST is awaited");

	fd = dial(&h);
	write_frame(fd, WIRE_HELLO, hello, n);
	write_frame(fd, WIRE_REQUEST, "[1]", 3);
	expect(fd, WIRE_ERROR, "not a JSON object");

	fd = dial(&h);
	write_frame(fd, WIRE_HELLO, hello, n);
	write_frame(fd, WIRE_REQUEST, "{\"op\":\"\xff\"}", 10);
	expect(fd, WIRE_ERROR, "not a JSON object");

	fd = dial(&h);				/* announces more than a request may have */
	write_frame(fd, WIRE_HELLO, hello, n);
	wire_put_header(hello, WIRE_REQUEST, WIRE_MAX_REQUEST_BYTES + 1);
	assert_int_equal(write(fd, hello, WIRE_HEADER_BYTES), WIRE_HEADER_BYTES);
	expect(fd, WIRE_ERROR, "too large");

	fd = dial(&h);				/* goes away in the middle of a header */
	assert_int_equal(write(fd, "\1\0\0", 3), 3);
	close(fd);
	expect(ask(&h, "{\"op\":\"echo\",\"text\":\"alive\"}"), WIRE_RESULT, "alive");
	finish(&h);
}

/* A request in pieces of one byte, and one of the largest size. */
static void
pieces(void **state)
{
	Helper		h;
	char		bytes[512];
	size_t		n;
	int			fd;
	char	   *big = malloc(WIRE_MAX_REQUEST_BYTES);
	static const char head[] = "{\"op\":\"echo\",\"text\":\"";
	char	   *payload;
	uint32_t	len;

	(void) state;
	start(&h);
	n = wire_put_hello(bytes + WIRE_HEADER_BYTES, WIRE_HELLO_BYTES, "client");
	wire_put_header(bytes, WIRE_HELLO, (uint32_t) n);
	n += WIRE_HEADER_BYTES;
	wire_put_header(bytes + n, WIRE_REQUEST, 26);
	memcpy(bytes + n + WIRE_HEADER_BYTES, "{\"op\":\"echo\",\"text\":\"yes\"} ", 26);
	n += WIRE_HEADER_BYTES + 26;
	fd = dial(&h);
	for (size_t i = 0; i < n; i++)
		assert_int_equal(write(fd, bytes + i, 1), 1);
	expect(fd, WIRE_RESULT, "yes");

	memset(big, 'x', WIRE_MAX_REQUEST_BYTES);
	memcpy(big, head, sizeof(head) - 1);
	memcpy(big + WIRE_MAX_REQUEST_BYTES - 2, "\"}", 2);
	fd = dial(&h);
	n = wire_put_hello(bytes, WIRE_HELLO_BYTES, "client");
	write_frame(fd, WIRE_HELLO, bytes, n);
	write_frame(fd, WIRE_REQUEST, big, WIRE_MAX_REQUEST_BYTES);
	if (read_frame(fd, &payload, &len) != WIRE_RESULT)
		fail_msg("not a result: %.500s", payload);
	assert_int_equal(len, WIRE_MAX_REQUEST_BYTES - (sizeof(head) - 1) - 2 + strlen("{\"text\":\"\"}"));
	free(payload);
	close(fd);
	free(big);
	finish(&h);
}

static int
count_closed(Helper *h)
{
	int			fd = ask(h, "{\"op\":\"closed\"}");
	char	   *payload;
	uint32_t	len;
	int			n = -1;

	assert_int_equal(read_frame(fd, &payload, &len), WIRE_RESULT);
	assert_int_equal(sscanf(payload, "{\"n\":%d}", &n), 1);
	free(payload);
	close(fd);
	return n;
}

static void
await_closed(Helper *h, int n)
{
	for (int i = 0; i < WAIT_MS / 10; i++)
	{
		if (count_closed(h) == n)
			return;
		usleep(10000);
	}
	assert_int_equal(count_closed(h), n);
}

/* The service hears of a client that closes, half-closes, or says more than it should; of an answered one it hears nothing. */
static void
cancels(void **state)
{
	Helper		h;
	int			fd;
	char	   *payload;
	uint32_t	len;

	(void) state;
	start(&h);
	close(ask(&h, "{\"op\":\"never\"}"));
	await_closed(&h, 1);
	fd = ask(&h, "{\"op\":\"never\"}");
	shutdown(fd, SHUT_WR);
	await_closed(&h, 2);
	close(fd);
	fd = ask(&h, "{\"op\":\"never\"}");
	write_frame(fd, WIRE_REQUEST, "{}", 2);
	await_closed(&h, 3);
	close(fd);
	expect(ask(&h, "{\"op\":\"echo\"}"), WIRE_RESULT, "");
	fd = ask(&h, "{\"op\":\"flood\"}");
	assert_int_equal(read_frame(fd, &payload, &len), WIRE_TEXT);
	free(payload);
	close(fd);
	await_closed(&h, 4);
	finish(&h);
}

/* 20 MB through a bounded buffer, to a reader that first lets it fill. */
static void
slow_reader(void **state)
{
	Helper		h;
	int			fd;
	char	   *payload;
	uint32_t	len;
	int			n = 0;
	WireKind	kind;

	(void) state;
	start(&h);
	fd = ask(&h, "{\"op\":\"flood\"}");
	usleep(200000);
	while ((kind = read_frame(fd, &payload, &len)) == WIRE_TEXT)
	{
		free(payload);
		n++;
	}
	free(payload);
	assert_int_equal(kind, WIRE_RESULT);
	assert_int_equal(n, 20000);
	close(fd);
	finish(&h);
}

static void
ends(void **state)
{
	Helper		h;

	(void) state;
	start(&h);
	assert_int_equal(kill(h.pid, SIGTERM), 0);
	assert_int_equal(exit_status(&h), 0);
	close(h.line);
	rmdir(h.dir);

	start(&h);
	expect(ask(&h, "{\"op\":\"shutdown\",\"now\":1}"), WIRE_ERROR, "no arguments");
	expect(ask(&h, "{\"op\":\"shutdown\"}"), WIRE_RESULT, "{}");
	assert_int_equal(exit_status(&h), 0);
	close(h.line);
	rmdir(h.dir);
}

static int
serve_at(const char *path)
{
	pid_t		pid = fork();
	int			status;

	if (pid == 0)
	{
		MillmService service = {"test", on_request, on_close, on_shutdown, NULL, NULL};

		close(3);
		if (freopen("/dev/null", "w", stderr) == NULL)
			_exit(99);
		alarm(20);
		_exit(millm_serve(&service, path, false));
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* A live socket is not taken over, a stale one is, a file is not touched. */
static void
the_path(void **state)
{
	Helper		h;
	char		long_path[256];
	int			status;
	int			fd;

	(void) state;
	start(&h);
	assert_int_equal(serve_at(h.path), 1);
	expect(ask(&h, "{\"op\":\"echo\",\"text\":\"still\"}"), WIRE_RESULT, "still");
	kill(h.pid, SIGKILL);
	waitpid(h.pid, &status, 0);
	close(h.line);
	assert_int_equal(access(h.path, F_OK), 0);
	start_there(&h);			/* over the stale socket */
	expect(ask(&h, "{\"op\":\"echo\",\"text\":\"next\"}"), WIRE_RESULT, "next");
	kill(h.pid, SIGTERM);
	assert_int_equal(exit_status(&h), 0);
	close(h.line);
	fd = open(h.path, O_CREAT | O_WRONLY, 0600);
	close(fd);
	assert_int_equal(serve_at(h.path), 1);
	assert_int_equal(access(h.path, F_OK), 0);
	unlink(h.path);
	rmdir(h.dir);
	memset(long_path, 'x', sizeof(long_path) - 1);
	memcpy(long_path, "/tmp/", 5);
	long_path[sizeof(long_path) - 1] = '\0';
	assert_int_equal(serve_at(long_path), 1);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(conversation), cmocka_unit_test(strangers), cmocka_unit_test(pieces), cmocka_unit_test(cancels),
		cmocka_unit_test(slow_reader), cmocka_unit_test(ends), cmocka_unit_test(the_path),
	};

	signal(SIGPIPE, SIG_IGN);
	alarm(120);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
