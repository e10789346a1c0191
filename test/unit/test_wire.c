/* test_wire.c -- frame headers, JSON strings, hello. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>
#include <jansson.h>

#include "version.h"
#include "wire.h"

static void
headers(void **state)
{
	unsigned char buf[WIRE_HEADER_BYTES];
	WireHeader	h;
	MillmError	err;

	(void) state;
	for (int kind = WIRE_HELLO; kind <= WIRE_ERROR; kind++)
	{
		wire_put_header(buf, (WireKind) kind, 0x01020304);
		assert_int_equal(wire_get_header(buf, UINT32_MAX, &h, &err), MILLM_OK);
		assert_int_equal(h.kind, kind);
		assert_int_equal(h.length, 0x01020304);
	}
	wire_put_header(buf, WIRE_TEXT, 0x01020304);
	assert_memory_equal(buf, "\x04\x03\x02\x01\x04\0\0\0", 8);

	wire_put_header(buf, WIRE_TEXT, 100);
	assert_int_equal(wire_get_header(buf, 100, &h, &err), MILLM_OK);
	assert_int_equal(wire_get_header(buf, 99, &h, &err), MILLM_E_PROTOCOL_VIOLATION);
	assert_non_null(strstr(err.detail, "100"));
	assert_non_null(strstr(err.detail, "99"));
	for (int kind = 8; kind < 300; kind++)
	{
		wire_put_header(buf, (WireKind) kind, 0);
		assert_int_equal(wire_get_header(buf, 100, &h, &err), MILLM_E_PROTOCOL_VIOLATION);
	}
	wire_put_header(buf, (WireKind) 0, 0);
	assert_int_equal(wire_get_header(buf, 100, &h, &err), MILLM_E_PROTOCOL_VIOLATION);
}

/* What we write by hand, a genuine JSON reader reads back. */
static void
json_strings(void **state)
{
	char		text[256];
	char		literal[6 * 256 + 2];
	size_t		n;
	json_t	   *value;

	(void) state;
	for (int i = 0; i < 128; i++)
		text[i] = (char) i;
	memcpy(text + 128, "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 9);
	n = wire_json_string_bytes(text, 137);
	assert_int_equal(wire_put_json_string(literal, sizeof(literal), text, 137), n);
	value = json_loadb(literal, n, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
	assert_non_null(value);
	assert_int_equal(json_string_length(value), 137);
	assert_memory_equal(json_string_value(value), text, 137);
	json_decref(value);

	/* too small by any amount: nothing is claimed, nothing past the end is written */
	for (size_t size = 0; size < n; size++)
	{
		literal[size] = '!';
		assert_int_equal(wire_put_json_string(literal, size, text, 137), 0);
		assert_int_equal(literal[size], '!');
	}
	assert_int_equal(wire_put_json_string(literal, 2, "", 0), 2);
	assert_memory_equal(literal, "\"\"", 2);
}

static void
hello(void **state)
{
	char		buf[WIRE_HELLO_BYTES];
	size_t		n = wire_put_hello(buf, sizeof(buf), "millm-engine");
	json_t	   *value = json_loadb(buf, n, 0, NULL);

	(void) state;
	assert_non_null(value);
	assert_int_equal(json_integer_value(json_object_get(value, "protocol")), WIRE_PROTOCOL);
	assert_string_equal(json_string_value(json_object_get(value, "version")), MILLM_VERSION);
	assert_string_equal(json_string_value(json_object_get(value, "program")), "millm-engine");
	json_decref(value);
	assert_int_equal(wire_put_hello(buf, n, "millm-engine"), 0);
	assert_int_equal(wire_put_hello(buf, n + 1, "millm-engine"), n);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(headers), cmocka_unit_test(json_strings), cmocka_unit_test(hello),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
