/*
 * fuzz_http.c -- heads and chunked bodies of HTTP requests from any bytes.
 *
 * Whatever is taken must be whole, must lie within the input, and must be the same when the bytes arrive one by one.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/bridge/http_parse.h"

static void
check(int ok)
{
	if (!ok)
		abort();
}

static void
within(HttpSlice s, const char *data, size_t n)
{
	check(s.at >= data && s.at <= data + n && s.len <= (size_t) (data + n - s.at));
	check(!memchr(s.at, '\n', s.len) && !memchr(s.at, '\r', s.len) && !memchr(s.at, '\0', s.len));
}

static size_t
head(const char *data, size_t n)
{
	HttpRefusal refusal = {0};
	HttpRefusal again = {0};
	HttpHead	head;
	size_t		seen = 0;
	size_t		seen_again = 0;
	int64_t		whole = http_head_length(data, n, &seen, &refusal);
	int64_t		later = 0;
	char	   *decoded;

	for (size_t i = 0; i <= n && later == 0; i++)
		later = http_head_length(data, i, &seen_again, &again);
	check(whole == later && seen <= n);
	if (whole <= 0)
	{
		check(whole == 0 || refusal.status == 400);
		return 0;
	}
	check((size_t) whole <= n && whole >= 4 && memcmp(data + whole - 4, "\r\n\r\n", 4) == 0);
	if (!http_parse_head(data, (size_t) whole, &head, &refusal))
	{
		check(refusal.status >= 400 && refusal.status < 600 && refusal.why);
		return 0;
	}
	within(head.method, data, n);
	within(head.path, data, n);
	within(head.query, data, n);
	check(head.n_headers >= 0 && head.n_headers <= HTTP_MAX_HEADERS && head.content_length >= -1 && !(head.chunked && head.content_length >= 0));
	for (int i = 0; i < head.n_headers; i++)
	{
		within(head.headers[i].name, data, n);
		within(head.headers[i].value, data, n);
	}
	decoded = malloc(head.path.len + 1);
	if (http_percent_decode(decoded, head.path.at, head.path.len))
		check(strlen(decoded) <= head.path.len);
	free(decoded);
	return (size_t) whole;
}

/* The body in out, which has room for n bytes; -1: refused, -2: more must come. */
static long
body(const char *data, size_t n, size_t piece, char *out, size_t *used)
{
	HttpChunked chunked = {0};
	size_t		len = 0;

	for (*used = 0; *used < n;)
	{
		HttpRefusal refusal = {0};
		size_t		give = n - *used < piece ? n - *used : piece;
		size_t		took;
		const char *at;
		size_t		at_len;

		switch (http_read_chunked(&chunked, data + *used, give, &took, &at, &at_len, &refusal))
		{
			case HTTP_CHUNK_BAD:
				check(refusal.status == 400 && refusal.why);
				return -1;
			case HTTP_CHUNK_DATA:
				check(took > 0 && took <= give && at_len > 0 && at >= data + *used && at + at_len <= data + *used + took);
				memcpy(out + len, at, at_len);
				len += at_len;
				break;
			case HTTP_CHUNK_MORE:
				check(took == give);
				break;
			case HTTP_CHUNK_END:
				check(took <= give);
				*used += took;
				return (long) len;
		}
		*used += took;
	}
	return -2;
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	const char *data = (const char *) bytes;
	size_t		begin = head(data, size);
	char	   *one = malloc(size + 1);
	char	   *two = malloc(size + 1);
	size_t		used_one;
	size_t		used_two;
	long		n = body(data + begin, size - begin, size + 1, one, &used_one);

	check(body(data + begin, size - begin, 1, two, &used_two) == n);
	if (n >= 0)
		check(used_one == used_two && memcmp(one, two, (size_t) n) == 0);
	free(one);
	free(two);
	return 0;
}
