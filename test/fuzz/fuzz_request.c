/*
 * fuzz_request.c -- a conversation with the loop of serve.c from any bytes.
 *
 * The loop runs in a thread of this process, with a service that reads every type of field; each input is one
 * connection's bytes.  The loop must answer with well-formed frames or hang up, and still serve the next client.
 */
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "request.h"
#include "serve.h"

#define WAIT_MS 20000

static char path[64];

static void
check(int ok)
{
	if (!ok)
		abort();
}

static void
on_request(void *arg, MillmConn *conn, json_t *request)
{
	MillmFields f;
	MillmError	err = {0};
	MillmGenerateOptions o;
	const char *op = NULL;
	const char *text = NULL;
	size_t		len = 0;
	bool		flag = false;
	json_t	   *stops = NULL;

	(void) arg;
	millm_generate_options_init(&o);
	millm_fields_begin(&f, request, &err);
	millm_field_string(&f, "op", &op);
	millm_field_text(&f, "prompt", &text, &len);
	millm_field_bool(&f, "stream", &flag);
	millm_field_int(&f, "top_k", -1, 1000, &o.top_k);
	millm_field_double(&f, "temperature", 0, 100, &o.temperature);
	millm_field_array(&f, "stop", &stops);
	if (millm_fields_end(&f) == MILLM_OK && millm_generate_options_check(&o, &err) == MILLM_OK)
	{
		check(!op || strlen(op) < WIRE_MAX_REQUEST_BYTES);
		check(o.top_k >= -1 && o.top_k <= 1000);
		millm_conn_result(conn, json_pack("{s:s%}", "text", text ? text : "", len));
	}
	else
	{
		check(err.code == MILLM_E_INVALID_ARGUMENT && err.message[0]);
		millm_conn_error(conn, &err);
	}
}

static void
nothing(void *arg, MillmConn *conn)
{
	(void) arg;
	(void) conn;
}

static void
end(void *arg)
{
	(void) arg;
}

static void *
serve(void *arg)
{
	static const MillmService service = {"fuzz", on_request, nothing, end, NULL, NULL};

	millm_serve(&service, arg, false);
	return NULL;
}

static int
dial(void)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int			fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strcpy(addr.sun_path, path);
	for (int i = 0; connect(fd, (struct sockaddr *) &addr, sizeof(addr)) != 0; i++)
	{
		check(i < 2000);
		usleep(1000);			/* the thread is still starting */
	}
	return fd;
}

/* Everything the helper says until it hangs up, in whole frames of valid JSON; at most one of them final, and that last. */
static void
read_answer(int fd)
{
	uint8_t    *buf = malloc(1 << 16);
	size_t		capacity = 1 << 16;
	size_t		n = 0;
	int			n_final = 0;

	for (;;)
	{
		struct pollfd p = {.fd = fd, .events = POLLIN};
		ssize_t		k;

		int			ready;

		do
			ready = poll(&p, 1, WAIT_MS);
		while (ready < 0 && errno == EINTR);	/* libFuzzer's own timer */
		check(ready == 1);
		if (n == capacity)
			buf = realloc(buf, capacity *= 2);
		k = read(fd, buf + n, capacity - n);
		if (k <= 0)
			break;
		n += (size_t) k;
	}
	for (size_t at = 0; at < n;)
	{
		WireHeader	h;
		json_t	   *value;

		if (n - at < WIRE_HEADER_BYTES)
			break;				/* we may have been hung up on */
		check(wire_get_header(buf + at, WIRE_MAX_REPLY_BYTES, &h, NULL) == MILLM_OK);
		at += WIRE_HEADER_BYTES;
		if (n - at < h.length)
			break;
		value = json_loadb((char *) buf + at, h.length, JSON_ALLOW_NUL, NULL);
		check(json_is_object(value));
		json_decref(value);
		check(n_final == 0);
		n_final += h.kind == WIRE_RESULT || h.kind == WIRE_ERROR;
		at += h.length;
	}
	free(buf);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	static pthread_t thread;

	(void) argc;
	(void) argv;
	signal(SIGPIPE, SIG_IGN);
	check(open("/dev/null", O_RDONLY | O_CLOEXEC) >= 3);	/* so that no socket of ours becomes fd 3, the supervisor's line */
	snprintf(path, sizeof(path), "/tmp/fuzz_request.%d", (int) getpid());
	check(pthread_create(&thread, NULL, serve, path) == 0);
	close(dial());
	return 0;
}

/* The first byte chooses: raw bytes, or the bytes as the payload of a request after a right hello. */
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char		frame[WIRE_HEADER_BYTES + WIRE_HELLO_BYTES];
	size_t		len;
	int			fd;

	if (size < 1 || size > 60000)	/* fits a socket buffer, so that we need not read and write at once */
		return 0;
	fd = dial();
	if (data[0] & 1)
	{
		len = wire_put_hello(frame + WIRE_HEADER_BYTES, WIRE_HELLO_BYTES, "fuzz");
		wire_put_header(frame, WIRE_HELLO, (uint32_t) len);
		(void) !send(fd, frame, WIRE_HEADER_BYTES + len, MSG_NOSIGNAL);
		wire_put_header(frame, WIRE_REQUEST, (uint32_t) size - 1);
		(void) !send(fd, frame, WIRE_HEADER_BYTES, MSG_NOSIGNAL);
	}
	(void) !send(fd, data + 1, size - 1, MSG_NOSIGNAL);
	if (!(data[0] & 1))
		shutdown(fd, SHUT_WR);		/* or an incomplete request would be waited for */
	read_answer(fd);
	close(fd);
	return 0;
}
