/*
 * test_http.c -- the bytes of HTTP requests: what is read, and what is refused for being readable in two ways.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "../../src/bridge/http_parse.h"

/* The status of refusing text, or 0 when it is taken. */
static int
parse(const char *text, HttpHead *head)
{
	HttpRefusal refusal = {0};
	size_t		seen = 0;
	int64_t		n = http_head_length(text, strlen(text), &seen, &refusal);

	if (n < 0)
		return refusal.status;
	assert_int_equal(n, strlen(text));
	if (http_parse_head(text, (size_t) n, head, &refusal))
		return 0;
	assert_non_null(refusal.why);
	return refusal.status;
}

#define HOST "Host: x\r\n"

static void
test_head(void **state)
{
	HttpHead	head;

	(void) state;
	assert_int_equal(parse("POST /v1/models?all=true&x HTTP/1.1\r\nHost: a.b:80\r\nContent-Length: 12\r\nX-Y:\t v w \t\r\nEmpty:\r\n\r\n", &head), 0);
	assert_true(http_slice_is(head.method, "POST"));
	assert_true(http_slice_is(head.path, "/v1/models"));
	assert_true(http_slice_is(head.query, "all=true&x"));
	assert_int_equal(head.minor, 1);
	assert_int_equal(head.content_length, 12);
	assert_false(head.chunked);
	assert_true(head.keep_alive);
	assert_int_equal(head.n_headers, 4);
	assert_true(http_slice_is(*http_find_header(&head, "x-y"), "v w"));
	assert_int_equal(http_find_header(&head, "EMPTY")->len, 0);
	assert_null(http_find_header(&head, "X"));

	assert_int_equal(parse("GET http://h:1/p?q HTTP/1.1\r\n" HOST "\r\n", &head), 0);
	assert_true(http_slice_is(head.path, "/p"));
	assert_true(http_slice_is(head.query, "q"));
	assert_int_equal(head.content_length, -1);
	assert_int_equal(parse("OPTIONS * HTTP/1.1\r\n" HOST "\r\n", &head), 0);
	assert_int_equal(parse("GET / HTTP/1.0\r\n\r\n", &head), 0);
	assert_false(head.keep_alive);
	assert_int_equal(parse("GET / HTTP/1.0\r\nConnection: x , Keep-Alive\r\n\r\n", &head), 0);
	assert_true(head.keep_alive);
	assert_int_equal(parse("GET / HTTP/1.1\r\n" HOST "Connection: keep-alive, close\r\n\r\n", &head), 0);
	assert_false(head.keep_alive);
	assert_int_equal(parse("POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: Chunked\r\nExpect: 100-Continue\r\n\r\n", &head), 0);
	assert_true(head.chunked && head.expects_continue);
}

static void
test_refused(void **state)
{
	static const struct {const char *text; int status;} cases[] = {
		{"GET / HTTP/1.1\nHost: x\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: x\n\r\n", 400},
		{"\n", 400},
		{"GET / HTTP/1.1\r\n" HOST "A: b\r\n c\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n" HOST "A : b\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n" HOST ": b\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n" HOST "A\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n" HOST "A: b\rc\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n" HOST "A: \x01\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n\r\n", 400},
		{"GET / HTTP/1.1\r\n" HOST HOST "\r\n", 400},
		{"GET  / HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET / HTTP/1.1 \r\n" HOST "\r\n", 400},
		{"GET /a b HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET /\t HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET /#f HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET x HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET http://h HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET /\r\n" HOST "\r\n", 400},
		{"G@T / HTTP/1.1\r\n" HOST "\r\n", 400},
		{" / HTTP/1.1\r\n" HOST "\r\n", 400},
		{"GET / http/1.1\r\n" HOST "\r\n", 400},
		{"GET / HTTP/2.0\r\n" HOST "\r\n", 505},
		{"GET / HTTP/0.9\r\n" HOST "\r\n", 505},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: 1, 1\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: +1\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: -1\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: 0x1\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length:\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Content-Length: 9999999999999999999\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: gzip, chunked\r\n\r\n", 501},
		{"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"POST / HTTP/1.1\r\n" HOST "Expect: magic\r\n\r\n", 417},
	};
	HttpHead	head;
	char		many[4096] = "GET / HTTP/1.1\r\n" HOST;

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		int			status = parse(cases[i].text, &head);

		if (status != cases[i].status)
			fail_msg("\"%s\": %d instead of %d", cases[i].text, status, cases[i].status);
	}
	for (int i = 0; i < HTTP_MAX_HEADERS; i++)
		strncat(many, "A: b\r\n", sizeof(many) - strlen(many) - 1);
	strncat(many, "\r\n", sizeof(many) - strlen(many) - 1);
	assert_int_equal(parse(many, &head), 431);
}

/* The length is the same however the bytes arrive, and nothing is looked at twice. */
static void
test_length(void **state)
{
	const char	text[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /next";
	const size_t whole = strlen(text) - strlen("GET /next");
	HttpRefusal refusal;
	size_t		seen = 0;

	(void) state;
	for (size_t n = 0; n < whole; n++)
	{
		assert_int_equal(http_head_length(text, n, &seen, &refusal), 0);
		assert_true(seen <= n);
	}
	assert_int_equal(http_head_length(text, whole, &seen, &refusal), whole);
	seen = 0;
	assert_int_equal(http_head_length(text, strlen(text), &seen, &refusal), whole);
}

/* Decode text, given in pieces of so many bytes: the body in out, or NULL when it is refused; *used is what it took. */
static const char *
dechunk(const char *text, size_t piece, char *out, size_t *used)
{
	HttpChunked chunked = {0};
	HttpRefusal refusal = {0};
	const size_t n = strlen(text);
	size_t		len = 0;

	for (*used = 0; *used < n;)
	{
		size_t		give = n - *used < piece ? n - *used : piece;
		size_t		took;
		const char *body;
		size_t		body_len;
		HttpChunkResult result = http_read_chunked(&chunked, text + *used, give, &took, &body, &body_len, &refusal);

		assert_true(took <= give);
		*used += took;
		if (result == HTTP_CHUNK_BAD)
		{
			assert_int_equal(refusal.status, 400);
			return NULL;
		}
		if (result == HTTP_CHUNK_DATA)
		{
			assert_true(body_len > 0);
			memcpy(out + len, body, body_len);
			len += body_len;
		}
		if (result == HTTP_CHUNK_END)
		{
			out[len] = '\0';
			return out;
		}
	}
	return "more";
}

static void
test_chunked(void **state)
{
	const char	text[] = "4;ext=\"a\"\r\nWiki\r\n0005\r\npedia\r\nB\r\n in\r\nchunks\r\n0\r\nTrailer: x\r\nB: y\r\n\r\n";
	static const char *const bad[] = {
		"\r\n", "x\r\n", "4\n", "4 \r\nWiki\r\n", "-4\r\n", "0x4\r\n", "4\r\nWikiX", "4\r\nWiki\rX", "4\r\nWiki\n", "1000000000000\r\n", "4;\x01\r\n",
		"0\r\n \r\n", "0\r\nA\x01\r\n", "0\r\n\rX", "0\r\nA: b\rX",
	};
	char		next[sizeof(text) + 8];
	char		out[256];
	size_t		used;
	char		lines[2048] = "0\r\n";

	(void) state;
	snprintf(next, sizeof(next), "%sGET", text);
	for (size_t piece = 1; piece < sizeof(text); piece++)
	{
		assert_string_equal(dechunk(next, piece, out, &used), "Wikipedia in\r\nchunks");
		assert_int_equal(used, strlen(text));
	}
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		for (size_t piece = 1; piece < 4; piece++)
			if (dechunk(bad[i], piece, out, &used))
				fail_msg("\"%s\" was taken", bad[i]);
	/* no line and no number of lines without an end */
	for (int i = 0; i < 40; i++)
		strncat(lines, "A: b\r\n", sizeof(lines) - strlen(lines) - 1);
	assert_null(dechunk(lines, 7, out, &used));
	memset(lines, '0', 1000);
	lines[1000] = '\0';
	assert_null(dechunk(lines, 7, out, &used));
	memset(lines, ';', 1000);
	lines[0] = '1';
	assert_null(dechunk(lines, 7, out, &used));
}

static void
test_percent(void **state)
{
	char		out[32];

	(void) state;
	assert_true(http_percent_decode(out, "a%20b%C3%a9+", 12));
	assert_string_equal(out, "a b\xc3\xa9+");
	assert_false(http_percent_decode(out, "%", 1));
	assert_false(http_percent_decode(out, "%2", 2));
	assert_false(http_percent_decode(out, "%2g", 3));
	assert_false(http_percent_decode(out, "%00", 3));
	assert_false(http_percent_decode(out, "%C3", 3));
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_head),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_length),
		cmocka_unit_test(test_chunked),
		cmocka_unit_test(test_percent),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
