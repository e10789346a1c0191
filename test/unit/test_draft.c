/* test_draft.c -- drafts: what is found, what is not, and what wrong ones cost. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "draft.h"

static void
note_all(MillmDrafter *d, const int32_t *tokens, int n)
{
	for (int i = 0; i < n; i++)
		millm_drafter_note(d, tokens[i]);
}

/* The draft is what followed the latest of the same three tokens, and where that ends at the end, what would follow if it went on so. */
static void
latest_occurrence(void **state)
{
	static const struct
	{
		int			n, tokens[12], max, n_draft, draft[6];
	}			cases[] = {
		{2, {1, 1}, 3, 0, {0}},							/* too few */
		{6, {1, 2, 3, 4, 5, 6}, 3, 0, {0}},				/* nothing twice */
		{7, {1, 2, 3, 4, 1, 2, 3}, 1, 1, {4}},
		{7, {1, 2, 3, 4, 1, 2, 3}, 0, 0, {0}},
		{7, {1, 2, 3, 4, 1, 2, 3}, 6, 6, {4, 1, 2, 3, 4, 1}},
		{11, {1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3}, 2, 2, {5, 1}},
		{4, {7, 7, 7, 7}, 3, 3, {7, 7, 7}},
		{6, {1, 2, 3, 9, 2, 3}, 3, 0, {0}},				/* two are not enough */
		{8, {0, 0, 5, 0, 0, 5, 0, 0}, 4, 4, {5, 0, 0, 5}},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
	{
		MillmDrafter *d = millm_drafter_create(12);
		int32_t		draft[MILLM_MAX_DRAFT_TOKENS];

		note_all(d, cases[i].tokens, cases[i].n);
		assert_int_equal(millm_drafter_draft(d, draft, cases[i].max), cases[i].n_draft);
		assert_memory_equal(draft, cases[i].draft, (size_t) cases[i].n_draft * sizeof(*draft));
		millm_drafter_free(d);
	}
	millm_drafter_free(NULL);
}

/* Against the obvious search, in a text of few words, in which a table of few places has many collisions: it may miss one, and finds no other. */
static void
like_the_obvious(void **state)
{
	enum {N = 5000};
	static int32_t tokens[N];
	MillmDrafter *d = millm_drafter_create(N);
	unsigned	random = 1;
	int			n_there = 0;
	int			n_found = 0;

	(void) state;
	for (int n = 0; n < N; n++)
	{
		int32_t		draft[4];
		int			from = 0;

		for (int at = n - 1; at >= 3 && from == 0; at--)
			if (memcmp(tokens + at - 3, tokens + n - 3, 3 * sizeof(*tokens)) == 0)
				from = at;
		n_there += from > 0;
		if (millm_drafter_draft(d, draft, 4) > 0)
		{
			n_found++;
			assert_true(from > 0);
			for (int i = 0; i < 4 && from + i < n; i++)
				assert_int_equal(draft[i], tokens[from + i]);
			millm_drafter_accepted(d, 1);
		}
		random = random * 1103515245 + 12345;
		tokens[n] = (int32_t) (random >> 16) % 12;
		millm_drafter_note(d, tokens[n]);
	}
	assert_true(n_there > N / 2);
	assert_true(n_found > n_there * 8 / 10);
	millm_drafter_free(d);
}

/* Wrong ones become rare, and a right one makes up for all. */
static void
wrong_drafts_are_rare(void **state)
{
	MillmDrafter *d = millm_drafter_create(4000);
	int32_t		draft[3];
	int			n = 0;

	(void) state;
	for (int i = 0; i < 1000; i++)
	{
		millm_drafter_note(d, 5);
		if (millm_drafter_draft(d, draft, 3) > 0)
		{
			n++;
			millm_drafter_accepted(d, 0);
		}
	}
	assert_in_range(n, 1000 / 33, 1000 / 33 + 8);
	n = 0;
	for (int i = 0; i < 100; i++)
	{
		millm_drafter_note(d, 5);
		if (millm_drafter_draft(d, draft, 3) > 0)
		{
			n++;
			millm_drafter_accepted(d, 3);
		}
	}
	assert_in_range(n, 100 - 33, 100);
	millm_drafter_free(d);
}

/* What does not fit is not looked at. */
static void
no_more_than_was_said(void **state)
{
	MillmDrafter *d = millm_drafter_create(4);
	int32_t		draft[2];

	(void) state;
	note_all(d, (int32_t[]) {1, 1, 1, 1}, 4);
	assert_int_equal(millm_drafter_draft(d, draft, 2), 2);
	note_all(d, (int32_t[]) {2, 3, 4, 5, 6}, 5);
	assert_int_equal(millm_drafter_draft(d, draft, 2), 2);
	assert_int_equal(draft[0], 1);
	millm_drafter_free(d);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(latest_occurrence), cmocka_unit_test(like_the_obvious), cmocka_unit_test(wrong_drafts_are_rare),
		cmocka_unit_test(no_more_than_was_said),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
