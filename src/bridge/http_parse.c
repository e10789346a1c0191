/*
 * http_parse.c -- the bytes of HTTP/1.1 requests: one pass over each line, no look-back, no allocation.
 */
#include "http_parse.h"

#include <string.h>
#include <strings.h>

#include "utf8.h"

#define MAX_CHUNK_LINE 256		/* a chunk's size line or a trailer line */
#define MAX_TRAILERS 32
#define MAX_CHUNK_DIGITS 12

static bool
refuse(HttpRefusal *refusal, int status, const char *why)
{
	refusal->status = status;
	refusal->why = why;
	return false;
}

/* RFC 9110 5.6.2: the characters of methods and header names */
static bool
is_token_char(unsigned char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (c != 0 && strchr("!#$%&'*+-.^_`|~", c));
}

static int
hex_digit(unsigned char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return -1;
}

int64_t
http_head_length(const char *data, size_t n, size_t *seen, HttpRefusal *refusal)
{
	const char *lf;

	while (*seen < n && (lf = memchr(data + *seen, '\n', n - *seen)) != NULL)
	{
		size_t		at = (size_t) (lf - data);

		if (at == 0 || data[at - 1] != '\r')
		{
			refuse(refusal, 400, "a line of the request ends without CR");
			return -1;
		}
		*seen = at + 1;
		if (at >= 3 && data[at - 2] == '\n')
			return (int64_t) at + 1;
	}
	*seen = n;
	return 0;
}

/* The line at *at, without its CR LF; *at goes behind it.  The head's lines all end so: http_head_length() has seen them. */
static HttpSlice
next_line(const char **at, const char *end)
{
	const char *lf = memchr(*at, '\n', (size_t) (end - *at));
	HttpSlice	line = {*at, (size_t) (lf - 1 - *at)};

	*at = lf + 1;
	return line;
}

/* origin-form, absolute-form of http, or "*" */
static bool
parse_target(HttpSlice target, HttpHead *head, HttpRefusal *refusal)
{
	const char *question;

	for (size_t i = 0; i < target.len; i++)
		if ((unsigned char) target.at[i] <= ' ' || (unsigned char) target.at[i] >= 0x7F || target.at[i] == '#')
			return refuse(refusal, 400, "the request target has a character that must be percent-encoded");
	if (target.len > 7 && strncasecmp(target.at, "http://", 7) == 0)
	{
		const char *slash = memchr(target.at + 7, '/', target.len - 7);

		if (!slash)
			return refuse(refusal, 400, "the request target has no path");
		target.len -= (size_t) (slash - target.at);
		target.at = slash;
	}
	else if (target.len == 0 || (target.at[0] != '/' && !(target.len == 1 && target.at[0] == '*')))
		return refuse(refusal, 400, "the request target is not a path");
	question = memchr(target.at, '?', target.len);
	head->path = target;
	head->query = (HttpSlice) {target.at + target.len, 0};
	if (question)
	{
		head->path.len = (size_t) (question - target.at);
		head->query = (HttpSlice) {question + 1, target.len - head->path.len - 1};
	}
	return true;
}

static bool
parse_request_line(HttpSlice line, HttpHead *head, HttpRefusal *refusal)
{
	const char *end = line.at + line.len;
	const char *space = memchr(line.at, ' ', line.len);
	const char *second;
	HttpSlice	version;

	if (!space || !(second = memchr(space + 1, ' ', (size_t) (end - space - 1))))
		return refuse(refusal, 400, "the request line is not METHOD TARGET VERSION");
	head->method = (HttpSlice) {line.at, (size_t) (space - line.at)};
	if (head->method.len == 0 || head->method.len > 32)
		return refuse(refusal, 400, "the request's method is not one");
	for (size_t i = 0; i < head->method.len; i++)
		if (!is_token_char((unsigned char) head->method.at[i]))
			return refuse(refusal, 400, "the request's method is not one");
	version = (HttpSlice) {second + 1, (size_t) (end - second - 1)};
	if (version.len != 8 || memcmp(version.at, "HTTP/", 5) != 0 || version.at[6] != '.')
		return refuse(refusal, 400, "the request line is not METHOD TARGET VERSION");
	if (version.at[5] != '1' || version.at[7] < '0' || version.at[7] > '9')
		return refuse(refusal, 505, "only HTTP/1.1 and HTTP/1.0 are spoken here");
	head->minor = version.at[7] != '0';
	return parse_target((HttpSlice) {space + 1, (size_t) (second - space - 1)}, head, refusal);
}

static bool
parse_header(HttpSlice line, HttpHead *head, HttpRefusal *refusal)
{
	const char *colon;
	HttpSlice	name;
	HttpSlice	value;

	if (line.at[0] == ' ' || line.at[0] == '\t')
		return refuse(refusal, 400, "a header line is folded");
	colon = memchr(line.at, ':', line.len);
	if (!colon || colon == line.at)
		return refuse(refusal, 400, "a header line is not NAME: VALUE");
	name = (HttpSlice) {line.at, (size_t) (colon - line.at)};
	for (size_t i = 0; i < name.len; i++)
		if (!is_token_char((unsigned char) name.at[i]))
			return refuse(refusal, 400, "a header's name has a character that none may have");
	value = (HttpSlice) {colon + 1, line.len - name.len - 1};
	while (value.len > 0 && (value.at[0] == ' ' || value.at[0] == '\t'))
		value.at++, value.len--;
	while (value.len > 0 && (value.at[value.len - 1] == ' ' || value.at[value.len - 1] == '\t'))
		value.len--;
	for (size_t i = 0; i < value.len; i++)
	{
		unsigned char c = (unsigned char) value.at[i];

		if ((c < ' ' && c != '\t') || c == 0x7F)
			return refuse(refusal, 400, "a header's value has a control character");
	}
	if (head->n_headers == HTTP_MAX_HEADERS)
		return refuse(refusal, 431, "the request has too many headers");
	head->headers[head->n_headers].name = name;
	head->headers[head->n_headers++].value = value;
	return true;
}

bool
http_slice_is(HttpSlice slice, const char *text)
{
	return strlen(text) == slice.len && strncasecmp(slice.at, text, slice.len) == 0;
}

const HttpSlice *
http_find_header(const HttpHead *head, const char *name)
{
	for (int i = 0; i < head->n_headers; i++)
		if (http_slice_is(head->headers[i].name, name))
			return &head->headers[i].value;
	return NULL;
}

/* Is token an element of a comma-separated list? */
static bool
list_has(HttpSlice list, const char *token)
{
	while (list.len > 0)
	{
		const char *comma = memchr(list.at, ',', list.len);
		HttpSlice	item = {list.at, comma ? (size_t) (comma - list.at) : list.len};
		size_t		taken = item.len + (comma != NULL);

		while (item.len > 0 && (item.at[0] == ' ' || item.at[0] == '\t'))
			item.at++, item.len--;
		while (item.len > 0 && (item.at[item.len - 1] == ' ' || item.at[item.len - 1] == '\t'))
			item.len--;
		if (http_slice_is(item, token))
			return true;
		list.at += taken;
		list.len -= taken;
	}
	return false;
}

/* Headers of which a second one would change the meaning for one reader and not for another. */
static const char *const once[] = {"host", "content-length", "transfer-encoding", "content-type", "authorization", "expect"};

/* What the headers say about the message itself. */
static bool
parse_framing(HttpHead *head, HttpRefusal *refusal)
{
	const HttpSlice *length = http_find_header(head, "content-length");
	const HttpSlice *coding = http_find_header(head, "transfer-encoding");
	const HttpSlice *expect = http_find_header(head, "expect");

	for (size_t k = 0; k < sizeof(once) / sizeof(once[0]); k++)
	{
		int			n = 0;

		for (int i = 0; i < head->n_headers; i++)
			n += http_slice_is(head->headers[i].name, once[k]);
		if (n > 1)
			return refuse(refusal, 400, "a header that may come once comes twice");
	}
	if (head->minor == 1 && !http_find_header(head, "host"))
		return refuse(refusal, 400, "the request has no Host header");

	head->content_length = -1;
	if (length && coding)
		return refuse(refusal, 400, "the request has both Content-Length and Transfer-Encoding");
	if (length)
	{
		uint64_t	n = 0;

		if (length->len == 0 || length->len > 18)
			return refuse(refusal, 400, "Content-Length is not a number of bytes");
		for (size_t i = 0; i < length->len; i++)
		{
			if (length->at[i] < '0' || length->at[i] > '9')
				return refuse(refusal, 400, "Content-Length is not a number of bytes");
			n = n * 10 + (uint64_t) (length->at[i] - '0');
		}
		head->content_length = (int64_t) n;
	}
	if (coding)
	{
		if (head->minor == 0)
			return refuse(refusal, 400, "HTTP/1.0 has no Transfer-Encoding");
		if (!http_slice_is(*coding, "chunked"))
			return refuse(refusal, 501, "chunked is the only Transfer-Encoding that is understood");
		head->chunked = true;
	}
	if (expect)
	{
		if (!http_slice_is(*expect, "100-continue"))
			return refuse(refusal, 417, "100-continue is the only expectation that is understood");
		head->expects_continue = head->minor == 1;
	}

	head->keep_alive = head->minor == 1;
	for (int i = 0; i < head->n_headers; i++)
	{
		if (!http_slice_is(head->headers[i].name, "connection"))
			continue;
		if (list_has(head->headers[i].value, "close"))
		{
			head->keep_alive = false;
			break;
		}
		if (list_has(head->headers[i].value, "keep-alive"))
			head->keep_alive = true;
	}
	return true;
}

bool
http_parse_head(const char *data, size_t n, HttpHead *head, HttpRefusal *refusal)
{
	const char *at = data;
	const char *end = data + n;

	memset(head, 0, offsetof(HttpHead, headers));
	if (!parse_request_line(next_line(&at, end), head, refusal))
		return false;
	while (at < end)
	{
		HttpSlice	line = next_line(&at, end);

		if (line.len == 0)
			break;
		if (!parse_header(line, head, refusal))
			return false;
	}
	return parse_framing(head, refusal);
}

/* Where a chunked body is.  The names say what the next byte must be. */
enum
{
	SIZE, EXTENSION, SIZE_LF, DATA, DATA_CR, DATA_LF, TRAILER, TRAILER_TEXT, TRAILER_LF, END_LF, ENDED
};

HttpChunkResult
http_read_chunked(HttpChunked *c, const char *data, size_t n, size_t *used, const char **body, size_t *body_len, HttpRefusal *refusal)
{
	const char *why = NULL;

	for (*used = 0; *used < n && c->state != ENDED;)
	{
		unsigned char b = (unsigned char) data[*used];
		int			digit;

		if (c->state == DATA)
		{
			*body = data + *used;
			*body_len = n - *used < c->left ? n - *used : (size_t) c->left;
			*used += *body_len;
			c->left -= *body_len;
			if (c->left == 0)
				c->state = DATA_CR;
			return HTTP_CHUNK_DATA;
		}
		++*used;
		if (c->state != DATA_CR && c->state != DATA_LF && ++c->line_bytes > MAX_CHUNK_LINE)
		{
			why = "a line of the chunked body is too long";
			break;
		}
		switch (c->state)
		{
			case SIZE:
				if ((digit = hex_digit(b)) >= 0 && c->digits < MAX_CHUNK_DIGITS)
				{
					c->left = c->left << 4 | (unsigned) digit;
					c->digits++;
				}
				else if (c->digits > 0 && b == '\r')
					c->state = SIZE_LF;
				else if (c->digits > 0 && b == ';')
					c->state = EXTENSION;
				else
					why = "a chunk's size is not a hexadecimal number";
				break;
			case EXTENSION:		/* RFC 9112 7.1.1: extensions that are not understood are to be ignored */
				if (b == '\r')
					c->state = SIZE_LF;
				else if ((b < ' ' && b != '\t') || b == 0x7F)
					why = "a chunk's extension has a control character";
				break;
			case SIZE_LF:
				if (b != '\n')
					why = "a chunk's size line ends without LF";
				c->state = c->left > 0 ? DATA : TRAILER;
				c->line_bytes = c->digits = 0;
				break;
			case DATA_CR:
				if (b != '\r')
					why = "a chunk is longer than its size";
				c->state = DATA_LF;
				break;
			case DATA_LF:
				if (b != '\n')
					why = "a chunk is longer than its size";
				c->state = SIZE;
				break;
			case TRAILER:
				if (b == '\r')
					c->state = END_LF;
				else if (!is_token_char(b))
					why = "a trailer line is not NAME: VALUE";
				else if (++c->trailers > MAX_TRAILERS)
					why = "the chunked body has too many trailers";
				else
					c->state = TRAILER_TEXT;
				break;
			case TRAILER_TEXT:
				if (b == '\r')
					c->state = TRAILER_LF;
				else if ((b < ' ' && b != '\t') || b == 0x7F)
					why = "a trailer has a control character";
				break;
			case TRAILER_LF:
				if (b != '\n')
					why = "a trailer line ends without LF";
				c->state = TRAILER;
				c->line_bytes = 0;
				break;
			case END_LF:
				if (b != '\n')
					why = "the chunked body ends without LF";
				c->state = ENDED;
				break;
		}
		if (why)
			break;
	}
	if (why)
	{
		refuse(refusal, 400, why);
		return HTTP_CHUNK_BAD;
	}
	return c->state == ENDED ? HTTP_CHUNK_END : HTTP_CHUNK_MORE;
}

bool
http_percent_decode(char *dst, const char *src, size_t len)
{
	size_t		n = 0;

	for (size_t i = 0; i < len; i++)
	{
		int			high, low;

		if (src[i] != '%')
		{
			dst[n++] = src[i];
			continue;
		}
		if (len - i < 3 || (high = hex_digit((unsigned char) src[i + 1])) < 0 || (low = hex_digit((unsigned char) src[i + 2])) < 0 || high + low == 0)
			return false;
		dst[n++] = (char) (high << 4 | low);
		i += 2;
	}
	dst[n] = '\0';
	return millm_utf8_valid_bytes(dst, n) == n;
}
