/*
 * http_parse.h -- the bytes of HTTP/1.1 requests, strictly (RFC 9110, 9112): pure functions over the caller's bytes.
 *
 * No allocation, no I/O, no state but what the caller holds.  Whatever two readers could read differently is refused, since a
 * proxy in front of us might be the other reader: a bare LF or CR, folded header lines, white space before a colon,
 * Content-Length together with Transfer-Encoding, a Content-Length twice or with anything but digits, codings other than
 * chunked, two Hosts, control characters anywhere.
 */
#ifndef MILLM_HTTP_PARSE_H
#define MILLM_HTTP_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HTTP_MAX_HEADERS 100

/* Bytes borrowed from the input; not terminated. */
typedef struct HttpSlice
{
	const char *at;
	size_t		len;
} HttpSlice;

typedef struct HttpHead
{
	HttpSlice	method;
	HttpSlice	path;			/* begins with '/', or is "*"; still percent-encoded */
	HttpSlice	query;			/* what follows the '?'; empty if nothing */
	int			minor;			/* of the version: 0 or 1 */
	bool		keep_alive;		/* the client means to send another request */
	bool		expects_continue;
	bool		chunked;
	int64_t		content_length;	/* -1: none was given */
	int			n_headers;
	struct
	{
		HttpSlice	name;
		HttpSlice	value;		/* without the white space around it */
	}			headers[HTTP_MAX_HEADERS];
} HttpHead;

/* Why a request is refused. */
typedef struct HttpRefusal
{
	int			status;			/* 400, 417, 431, 501 or 505 */
	const char *why;			/* a static sentence without a period */
} HttpRefusal;

/*
 * Is there a whole head in data[0..n)?  Returns its length, the empty line included; 0 when more must come; -1 and *refusal
 * when a line ends without CR.  *seen, 0 before the first call, is where the next call over the same, longer data goes on.
 */
extern int64_t http_head_length(const char *data, size_t n, size_t *seen, HttpRefusal *refusal);

/* Read a whole head of n bytes, as http_head_length() measured it.  False and *refusal when it is refused.  *head borrows data. */
extern bool http_parse_head(const char *data, size_t n, HttpHead *head, HttpRefusal *refusal);

/* The value of a header, by its name in any case; NULL if there is none. */
extern const HttpSlice *http_find_header(const HttpHead *head, const char *name);

/* Is text the slice, in any case of letters? */
extern bool http_slice_is(HttpSlice slice, const char *text);

/* A chunked body that arrives piece by piece.  Zeroed at first. */
typedef struct HttpChunked
{
	int			state;
	int			line_bytes;		/* of the line being read: its bound is a constant of http_parse.c */
	int			digits;
	int			trailers;
	uint64_t	left;			/* of the chunk */
} HttpChunked;

typedef enum HttpChunkResult
{
	HTTP_CHUNK_MORE,			/* all n bytes were consumed */
	HTTP_CHUNK_DATA,			/* *body, *body_len is a part of the body; call again with what follows *used */
	HTTP_CHUNK_END,				/* the body has ended; *used bytes belong to it */
	HTTP_CHUNK_BAD				/* *refusal says why */
} HttpChunkResult;

/* Consume from data[0..n).  Trailer fields are read and dropped, as RFC 9112 7.1.2 allows. */
extern HttpChunkResult http_read_chunked(HttpChunked *chunked, const char *data, size_t n, size_t *used, const char **body, size_t *body_len,
										 HttpRefusal *refusal);

/*
 * Decode %XX (and nothing else) into dst, which must have room for len + 1 bytes; terminated.  False: a broken escape, an
 * encoded NUL, or the result is not UTF-8.
 */
extern bool http_percent_decode(char *dst, const char *src, size_t len);

#endif
