/*
 * fuzz_wire.c -- frame headers and JSON strings from any bytes.
 *
 * What wire.c writes must be read back the same, by itself and by a genuine JSON reader.
 */
#include <jansson.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

static void
check(int ok)
{
	if (!ok)
		abort();
}

static void
headers(const uint8_t *data, size_t size)
{
	for (size_t at = 0; size - at >= WIRE_HEADER_BYTES;)
	{
		WireHeader	h;
		MillmError	err;
		uint8_t		again[WIRE_HEADER_BYTES];

		if (wire_get_header(data + at, WIRE_MAX_REQUEST_BYTES, &h, &err) != MILLM_OK)
		{
			check(err.code == MILLM_E_PROTOCOL_VIOLATION && err.message[0]);
			at += WIRE_HEADER_BYTES;
			continue;
		}
		check(h.length <= WIRE_MAX_REQUEST_BYTES);
		wire_put_header(again, h.kind, h.length);
		check(memcmp(again, data + at, WIRE_HEADER_BYTES) == 0);
		at += WIRE_HEADER_BYTES;
		at += h.length < size - at ? h.length : size - at;
	}
}

static void
json_string_of(const uint8_t *data, size_t size)
{
	size_t		n = wire_json_string_bytes((const char *) data, size);
	char	   *buf = malloc(n);
	json_t	   *value;

	check(wire_put_json_string(buf, n, (const char *) data, size) == n);
	check(wire_put_json_string(buf, n - 1, (const char *) data, size) == 0);
	check(wire_put_json_string(buf, n, (const char *) data, size) == n);
	value = json_loadb(buf, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
	if (value)					/* NULL: the text was not UTF-8 */
	{
		check(json_string_length(value) == size);
		check(memcmp(json_string_value(value), data, size) == 0);
		json_decref(value);
	}
	free(buf);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	headers(data, size);
	json_string_of(data, size);
	return 0;
}
