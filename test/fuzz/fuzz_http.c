/*
 * fuzz_http.c -- requests of HTTP/1.1 from any bytes.
 *
 * How bytes are cut into packets must not matter: a head is measured, and a chunked body read, in one piece and in pieces of
 * one byte, with the same result.  An accepted head is written again from what was read of it, and must be read as the same.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "http_parse.h"

static void
check(int ok)
{
	if (!ok)
		abort();
}

/* The length of the head, seen in growing pieces of step bytes. */
static int64_t
measure(const char *data, size_t size, size_t step)
{
	size_t		seen = 0;
	HttpRefusal refusal = {0};

	for (size_t n = 0;;)
	{
		int64_t		length;

		n = size - n < step ? size : n + step;
		length = http_head_length(data, n, &seen, &refusal);
		check(seen <= n && length <= (int64_t) n);
		check(length >= 0 || (refusal.status == 400 && refusal.why));
		if (length != 0 || n == size)
			return length;
	}
}

static bool
same(HttpSlice a, HttpSlice b)
{
	return a.len == b.len && memcmp(a.at, b.at, a.len) == 0;
}

/* Append to a text that has room. */
static void
put(char *text, size_t *len, const char *at, size_t n)
{
	memcpy(text + *len, at, n);
	*len += n;
}

static void
write_again(const HttpHead *head, size_t size)
{
	char	   *text = malloc(size + 3 * HTTP_MAX_HEADERS + 64);
	size_t		len = 0;
	HttpHead	again;
	HttpRefusal refusal;

	put(text, &len, head->method.at, head->method.len);
	put(text, &len, " ", 1);
	put(text, &len, head->path.at, head->path.len);
	put(text, &len, "?", 1);
	put(text, &len, head->query.at, head->query.len);
	put(text, &len, head->minor ? " HTTP/1.1\r\n" : " HTTP/1.0\r\n", 11);
	for (int i = 0; i < head->n_headers; i++)
	{
		put(text, &len, head->headers[i].name.at, head->headers[i].name.len);
		put(text, &len, ": ", 2);
		put(text, &len, head->headers[i].value.at, head->headers[i].value.len);
		put(text, &len, "\r\n", 2);
	}
	put(text, &len, "\r\n", 2);
	check(measure(text, len, len) == (int64_t) len);
	/* a '*' with a query is no target */
	if (head->path.at[0] == '/')
	{
		check(http_parse_head(text, len, &again, &refusal));
		check(same(again.method, head->method) && same(again.path, head->path) && same(again.query, head->query));
		check(again.minor == head->minor && again.keep_alive == head->keep_alive && again.chunked == head->chunked &&
			  again.content_length == head->content_length && again.expects_continue == head->expects_continue && again.n_headers == head->n_headers);
	}
	free(text);
}

/* A chunked body read in pieces of step bytes.  Returns the last result; *end is what belongs to it, *sum a digest of the body. */
static HttpChunkResult
read_body(const char *data, size_t size, size_t step, size_t *end, uint64_t *sum)
{
	HttpChunked chunked = {0};
	HttpChunkResult result = HTTP_CHUNK_MORE;
	size_t		at = 0;

	*sum = 0;
	while (at < size)
	{
		size_t		n = size - at < step ? size - at : step;
		size_t		used = 0;
		const char *body;
		size_t		len;
		HttpRefusal refusal = {0};

		result = http_read_chunked(&chunked, data + at, n, &used, &body, &len, &refusal);
		check(used <= n);
		if (result == HTTP_CHUNK_DATA)
		{
			check(len > 0 && body >= data + at && body + len <= data + at + used);
			for (size_t i = 0; i < len; i++)
				*sum = *sum * 1099511628211u + (unsigned char) body[i] + 1;
		}
		else if (result == HTTP_CHUNK_MORE)
			check(used == n);
		else
		{
			check(result == HTTP_CHUNK_END || refusal.status == 400);
			at += used;
			break;
		}
		at += used;
	}
	*end = at;
	return result;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char	   *text = malloc(size + 1);	/* of exactly this size, for the sanitizer; and one more that nothing may read */
	HttpHead	head;
	HttpRefusal refusal = {0};
	int64_t		length;
	size_t		end[2];
	uint64_t	sum[2];
	HttpChunkResult result[2];

	if (size == 0)
	{
		free(text);
		return 0;
	}
	memcpy(text, data, size);
	length = measure(text, size, size);
	check(measure(text, size, 1) == length);
	check(measure(text, size, 7) == length);
	if (length > 0)
	{
		char	   *exact = malloc((size_t) length);

		memcpy(exact, text, (size_t) length);
		if (http_parse_head(exact, (size_t) length, &head, &refusal))
		{
			check(head.n_headers <= HTTP_MAX_HEADERS && head.path.len > 0 && (head.path.at[0] == '/' || head.path.at[0] == '*'));
			check(!head.chunked || head.content_length < 0);
			check(!memchr(exact, 0, (size_t) length));
			write_again(&head, (size_t) length);
		}
		else
			check(refusal.status >= 400 && refusal.status <= 505 && refusal.why);
		free(exact);
	}
	for (int i = 0; i < 2; i++)
		result[i] = read_body(text, size, i ? 1 : size, &end[i], &sum[i]);
	check(sum[0] == sum[1]);
	/* what is asked for after the last byte of data differs: a part of the body, or more */
	check((result[0] == HTTP_CHUNK_BAD) == (result[1] == HTTP_CHUNK_BAD) && (result[0] == HTTP_CHUNK_END) == (result[1] == HTTP_CHUNK_END));
	check(result[0] != HTTP_CHUNK_END || end[0] == end[1]);
	if (http_percent_decode(text, (const char *) data, size))
		check(strlen(text) <= size);
	free(text);
	return 0;
}
