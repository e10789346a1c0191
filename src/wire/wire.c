/*
 * wire.c -- frame headers and the few bytes of JSON that both worlds write by hand.
 */
#include "wire.h"

#include <stdio.h>
#include <string.h>

#include "arith.h"
#include "version.h"

void
wire_put_header(void *dst, WireKind kind, uint32_t length)
{
	millm_put_le32(dst, length);
	millm_put_le32((char *) dst + 4, (uint32_t) kind);
}

MillmCode
wire_get_header(const void *src, uint32_t max_length, WireHeader *out, MillmError *err)
{
	uint32_t	length = millm_get_le32(src);
	uint32_t	kind = millm_get_le32((const char *) src + 4);

	if (kind < WIRE_HELLO || kind > WIRE_ERROR)
		return millm_fail(err, MILLM_E_PROTOCOL_VIOLATION, "invalid frame kind %u", (unsigned) kind);
	if (length > max_length)
	{
		millm_fail(err, MILLM_E_PROTOCOL_VIOLATION, "frame is too large");
		millm_detail(err, "Its header announces %u bytes; at most %u are accepted.",
					 (unsigned) length, (unsigned) max_length);
		return MILLM_E_PROTOCOL_VIOLATION;
	}
	out->length = length;
	out->kind = (WireKind) kind;
	return MILLM_OK;
}

/* The escaped form of one byte: its length, and in esc the characters. */
static size_t
escape(unsigned char c, char esc[8])
{
	static const char hex[] = "0123456789abcdef";

	switch (c)
	{
		case '"':
		case '\\':
			esc[0] = '\\';
			esc[1] = (char) c;
			return 2;
		case '\n':
			memcpy(esc, "\\n", 2);
			return 2;
		case '\r':
			memcpy(esc, "\\r", 2);
			return 2;
		case '\t':
			memcpy(esc, "\\t", 2);
			return 2;
		default:
			if (c >= 0x20)
			{
				esc[0] = (char) c;
				return 1;
			}
			memcpy(esc, "\\u00", 4);
			esc[4] = hex[c >> 4];
			esc[5] = hex[c & 15];
			return 6;
	}
}

size_t
wire_json_string_bytes(const char *text, size_t len)
{
	size_t		n = 2;
	char		esc[8];

	for (size_t i = 0; i < len; i++)
		n += escape((unsigned char) text[i], esc);
	return n;
}

size_t
wire_put_json_string(char *dst, size_t size, const char *text, size_t len)
{
	size_t		n = 0;
	char		esc[8];

	if (size < 2)
		return 0;
	dst[n++] = '"';
	for (size_t i = 0; i < len; i++)
	{
		size_t		k = escape((unsigned char) text[i], esc);

		if (k > size - n - 1)
			return 0;
		memcpy(dst + n, esc, k);
		n += k;
	}
	dst[n++] = '"';
	return n;
}

size_t
wire_put_hello(char *dst, size_t size, const char *program)
{
	int			n = snprintf(dst, size, "{\"protocol\":%d,\"version\":\"%s\",\"program\":\"%s\"}",
							 WIRE_PROTOCOL, MILLM_VERSION, program);

	return n > 0 && (size_t) n < size ? (size_t) n : 0;
}
