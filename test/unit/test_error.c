/* test_error.c -- the list of errors: complete, distinct, and texts that are cut only between characters. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "error.h"

static void
codes_are_whole(void **state)
{
	(void) state;
	for (int i = 1; i < MILLM_N_CODES; i++)
	{
		MillmCode	code = (MillmCode) i;

		assert_int_equal(strlen(millm_code_sqlstate(code)), 5);
		assert_true(millm_code_http(code) >= 400 && millm_code_http(code) < 600);
		assert_int_equal(millm_code_by_name(millm_code_name(code)), code);
		for (int j = 1; j < i; j++)
		{
			assert_string_not_equal(millm_code_name(code), millm_code_name((MillmCode) j));
			assert_string_not_equal(millm_code_sqlstate(code), millm_code_sqlstate((MillmCode) j));
		}
	}
	assert_string_equal(millm_code_name(MILLM_OK), "OK");
	assert_string_equal(millm_code_name((MillmCode) 9999), "INTERNAL");
	assert_int_equal(millm_code_by_name("NO_SUCH_CODE"), MILLM_E_INTERNAL);
}

static void
fill(void **state)
{
	MillmError	err;

	(void) state;
	memset(&err, 'x', sizeof(err));
	assert_int_equal(millm_fail(&err, MILLM_E_SERVER_BUSY, "%d of %s", 3, "them"), MILLM_E_SERVER_BUSY);
	assert_string_equal(err.message, "3 of them");
	assert_string_equal(err.detail, "");
	assert_string_equal(err.hint, "");
	millm_detail(&err, "D%d.", 1);
	millm_hint(&err, "H%d.", 2);
	assert_string_equal(err.detail, "D1.");
	assert_string_equal(err.hint, "H2.");
	assert_int_equal(millm_fail(NULL, MILLM_E_INTERNAL, "nobody listens"), MILLM_E_INTERNAL);
	millm_detail(NULL, "x");
	millm_hint(NULL, "x");
}

static void
expected_wait(void **state)
{
	MillmError	err;

	(void) state;
	millm_fail(&err, MILLM_E_SERVER_BUSY, "busy");
	assert_int_equal(err.wait_s, 0);
	millm_expect_wait(&err, 7);
	assert_string_equal(err.detail, "Expected wait: about 7 s.");
	millm_detail(&err, "Two wait.");
	millm_expect_wait(&err, 86400);
	assert_string_equal(err.detail, "Two wait. Expected wait: about 86400 s.");
	assert_int_equal(err.wait_s, 86400);
	assert_int_equal(millm_expected_wait(err.detail), 86400);
	millm_fail(&err, MILLM_E_SERVER_BUSY, "busy");
	assert_int_equal(err.wait_s, 0);
	for (size_t n = sizeof(err.detail) - 40; n < sizeof(err.detail); n++)
	{
		memset(err.detail, 'x', n);
		err.detail[n] = '\0';
		millm_expect_wait(&err, 3);
		assert_true(strlen(err.detail) < sizeof(err.detail));
	}
	millm_expect_wait(NULL, 1);
	assert_int_equal(millm_expected_wait(""), 0);
	assert_int_equal(millm_expected_wait("Expected wait: about"), 0);
	assert_int_equal(millm_expected_wait("Expected wait: about two s."), 0);
	assert_int_equal(millm_expected_wait("Expected wait: about -2 s."), 0);
	assert_int_equal(millm_expected_wait("Expected wait: about 99999999999999999999 s."), 0);
}

/* Cut at every possible place of a text of 1-, 2-, 3- and 4-byte characters. */
static void
cut_between_characters(void **state)
{
	(void) state;
	for (size_t pad = 0; pad < 12; pad++)
	{
		MillmError	err;
		char		text[2048];
		size_t		n = 0;
		size_t		len;

		memset(text, 'a', pad);
		for (n = pad; n + 10 < sizeof(text) - 1; n += 10)
			memcpy(text + n, "b\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 10);
		text[n] = '\0';
		millm_fail(&err, MILLM_E_INTERNAL, "%s", text);
		len = strlen(err.message);
		assert_true(len >= sizeof(err.message) - 9 && len < sizeof(err.message));
		assert_memory_equal(err.message, text, len);
		/* what follows the cut is the start of a character */
		assert_true(((unsigned char) text[len] & 0xC0) != 0x80);

		millm_format(err.hint, sizeof(err.hint), "%s", text);
		assert_string_equal(err.hint, err.message);
		millm_format(err.hint, 2, "%s", "\xC3\xA9");
		assert_string_equal(err.hint, "");
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(codes_are_whole), cmocka_unit_test(fill), cmocka_unit_test(expected_wait), cmocka_unit_test(cut_between_characters),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
