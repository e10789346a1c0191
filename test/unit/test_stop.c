/* test_stop.c -- stop sequences against a plain search, with the text cut in every way. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "stop.h"

/* The whole text cut in pieces of `step` bytes: what is shown, and whether it stopped. */
static bool
run(const char *const *stops, int n, const char *text, size_t step, char *shown)
{
	MillmStop  *s = millm_stop_create(stops, n);
	size_t		len = strlen(text);
	size_t		total = 0;
	bool		stopped = false;
	const char *out;
	size_t		out_len;

	assert_non_null(s);
	for (size_t at = 0; at < len && !stopped; at += step)
	{
		stopped = millm_stop_push(s, text + at, len - at < step ? len - at : step, &out, &out_len);
		assert_non_null(out);
		memcpy(shown + total, out, out_len);
		total += out_len;
	}
	if (!stopped)
	{
		millm_stop_flush(s, &out, &out_len);
		memcpy(shown + total, out, out_len);
		total += out_len;
		millm_stop_flush(s, &out, &out_len);
		assert_int_equal(out_len, 0);
	}
	shown[total] = '\0';
	millm_stop_free(s);
	return stopped;
}

/* The rule, said plainly: the first end of any sequence; of those, the longest. */
static size_t
plain(const char *const *stops, int n, const char *text)
{
	for (size_t end = 1; end <= strlen(text); end++)
	{
		size_t		longest = 0;

		for (int i = 0; i < n; i++)
		{
			size_t		k = strlen(stops[i]);

			if (k <= end && k > longest && memcmp(text + end - k, stops[i], k) == 0)
				longest = k;
		}
		if (longest)
			return end - longest;
	}
	return strlen(text);
}

static void
random_texts(void **state)
{
	(void) state;
	srandom(7);
	for (int round = 0; round < 3000; round++)
	{
		char		text[41];
		char		words[3][6];
		const char *stops[3] = {words[0], words[1], words[2]};
		int			n = (int) (random() % 4);
		char		shown[64];
		size_t		keep;

		for (int i = 0; i < 40; i++)
			text[i] = "ab"[random() % 2];
		text[random() % 41] = '\0';
		text[40] = '\0';
		for (int w = 0; w < 3; w++)
		{
			int			k = 1 + (int) (random() % 5);

			for (int i = 0; i < k; i++)
				words[w][i] = "ab"[random() % 2];
			words[w][k] = '\0';
		}
		keep = plain(stops, n, text);
		for (size_t step = 1; step < 9; step++)
		{
			bool		stopped = run(stops, n, text, step, shown);

			assert_int_equal(strlen(shown), keep);
			assert_memory_equal(shown, text, keep);
			if (keep < strlen(text))
				assert_true(stopped);
		}
	}
}

/* What cannot become a stop sequence is shown at once. */
static void
shows_at_once(void **state)
{
	const char *stops[] = {"\n\n", "END"};
	MillmStop  *s = millm_stop_create(stops, 2);
	const char *out;
	size_t		len;

	(void) state;
	assert_false(millm_stop_push(s, "abc", 3, &out, &len));
	assert_int_equal(len, 3);
	assert_false(millm_stop_push(s, "d\n", 2, &out, &len));
	assert_int_equal(len, 1);
	assert_false(millm_stop_push(s, "e", 1, &out, &len));
	assert_int_equal(len, 2);
	assert_memory_equal(out, "\ne", 2);
	assert_false(millm_stop_push(s, "EN", 2, &out, &len));
	assert_int_equal(len, 0);
	assert_true(millm_stop_push(s, "D more", 6, &out, &len));
	assert_int_equal(len, 0);
	millm_stop_free(s);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {cmocka_unit_test(random_texts), cmocka_unit_test(shows_at_once)};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
