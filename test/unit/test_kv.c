/* test_kv.c -- the ledger of KV pages: reserve, fork, copy-on-write, truncate, and its invariants under a random life. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>

#include "kv.h"

#define PAGE MILLM_KV_PAGE_TOKENS

typedef struct Copies
{
	int			n;
	int32_t		dst, src;
} Copies;

static void
count_copy(void *arg, int32_t dst, int32_t src)
{
	Copies	   *c = arg;

	c->n++;
	c->dst = dst;
	c->src = src;
}

#define ANY_STEP	(1 << 20)

static const int no_window[] = {0};

static void
init(MillmKvPool *pool, int n_pages, const int *windows, int n_groups, int step, Copies *copies)
{
	assert_int_equal(millm_kv_init(pool, n_pages, windows, n_groups, step, false, count_copy, copies, NULL), MILLM_OK);
}

static void
check(const MillmKvPool *pool)
{
	MillmError	err;

	if (millm_kv_check(pool, &err) != MILLM_OK)
		fail_msg("%s", err.message);
}

static void
test_reserve_is_all_or_nothing(void **state)
{
	MillmKvPool pool;
	MillmSequence *a, *b;
	Copies		copies = {0};

	(void) state;
	init(&pool, 4, no_window, 1, ANY_STEP, &copies);
	a = millm_kv_create(&pool);
	b = millm_kv_create(&pool);
	assert_true(millm_sequence_reserve(a, 2 * PAGE + 1));
	assert_int_equal(pool.n_free, 1);
	assert_false(millm_sequence_reserve(b, PAGE + 1));
	assert_int_equal(pool.n_free, 1);
	assert_int_equal(b->tables[0].n_pages, 0);
	assert_true(millm_sequence_reserve(b, PAGE));
	assert_int_equal(pool.n_free, 0);
	assert_true(millm_sequence_reserve(a, 3 * PAGE));	/* had them already */
	assert_false(millm_sequence_reserve(a, 3 * PAGE + 1));
	check(&pool);
	millm_sequence_truncate(a, 0);
	assert_int_equal(pool.n_free, 3);
	millm_sequence_free(a);
	millm_sequence_free(b);
	assert_int_equal(pool.n_free, 4);
	check(&pool);
	millm_kv_reset(&pool);
}

static void
test_fork_shares_and_copies_on_write(void **state)
{
	MillmKvPool pool;
	MillmSequence *a, *b;
	Copies		copies = {0};
	int32_t		shared;

	(void) state;
	init(&pool, 8, no_window, 1, ANY_STEP, &copies);
	a = millm_kv_create(&pool);
	assert_true(millm_sequence_reserve(a, 4 * PAGE));
	a->length = PAGE + 5;		/* as a step would */
	b = millm_sequence_fork(a);
	assert_non_null(b);
	assert_int_equal(millm_sequence_length(b), PAGE + 5);
	assert_int_equal(b->tables[0].n_pages, 2);	/* not the two that a reserved ahead */
	assert_int_equal(pool.n_free, 4);
	shared = a->tables[0].pages[1];
	assert_int_equal(b->tables[0].pages[1], shared);
	check(&pool);

	assert_false(millm_kv_has_room(a, PAGE + 6));	/* its page is b's too */
	assert_true(millm_sequence_reserve(a, PAGE + 6));
	assert_int_equal(copies.n, 1);
	assert_int_equal(copies.src, shared);
	assert_int_equal(copies.dst, a->tables[0].pages[1]);
	assert_int_not_equal(a->tables[0].pages[1], shared);
	assert_int_equal(a->tables[0].pages[0], b->tables[0].pages[0]);
	assert_true(millm_kv_has_room(a, PAGE + 6));
	assert_true(millm_sequence_reserve(b, PAGE + 6));	/* alone by now: no copy */
	assert_int_equal(copies.n, 1);
	check(&pool);

	/* cut to a full page: nothing begun is shared, the next position gets a page of its own */
	millm_sequence_truncate(b, PAGE);
	assert_true(millm_sequence_reserve(b, PAGE + 1));
	assert_int_equal(copies.n, 1);
	/* cut into the shared page: it must be copied */
	millm_sequence_truncate(b, 3);
	assert_true(millm_sequence_reserve(b, 4));
	assert_int_equal(copies.n, 2);
	check(&pool);
	millm_sequence_free(a);
	millm_sequence_free(b);
	assert_int_equal(pool.n_free, 8);
	millm_kv_reset(&pool);
}

static void
test_copy_needs_a_free_page(void **state)
{
	MillmKvPool pool;
	MillmSequence *a, *b;
	Copies		copies = {0};

	(void) state;
	init(&pool, 2, no_window, 1, ANY_STEP, &copies);
	a = millm_kv_create(&pool);
	assert_true(millm_sequence_reserve(a, PAGE + 1));
	a->length = PAGE + 1;
	b = millm_sequence_fork(a);
	assert_false(millm_sequence_reserve(b, PAGE + 2));
	assert_int_equal(copies.n, 0);
	check(&pool);
	millm_sequence_free(a);
	assert_true(millm_sequence_reserve(b, PAGE + 2));
	assert_int_equal(copies.n, 0);
	millm_sequence_free(b);
	millm_kv_reset(&pool);
}

/* What no position to come sees goes back; what is shared stays the other's. */
static void
test_window(void **state)
{
	MillmKvPool pool;
	MillmSequence *a, *b;
	Copies		copies = {0};
	const int	window = PAGE + 4;

	(void) state;
	init(&pool, 8, &window, 1, ANY_STEP, &copies);
	a = millm_kv_create(&pool);
	assert_true(millm_sequence_reserve(a, 3 * PAGE));
	a->length = 2 * PAGE + 2;	/* the next sees PAGE - 1 and on */
	millm_kv_pass(a);
	assert_int_equal(pool.n_free, 5);
	a->length++;				/* and now PAGE */
	millm_kv_pass(a);
	assert_int_equal(pool.n_free, 6);
	assert_int_equal(a->tables[0].pages[0], -1);
	check(&pool);

	/* a fork shares what is left, and each gives back its own */
	b = millm_sequence_fork(a);
	assert_int_equal(pool.n_free, 6);
	check(&pool);
	assert_true(millm_sequence_reserve(b, 5 * PAGE));
	b->length = 5 * PAGE;
	millm_kv_pass(b);
	check(&pool);
	assert_int_equal(b->tables[0].n_passed, 3);
	assert_int_equal(a->tables[0].n_passed, 1);
	/* a cut that keeps all that the next position sees, and one that does not */
	millm_sequence_truncate(b, 4 * PAGE + 9);
	assert_int_equal(millm_sequence_length(b), 4 * PAGE + 9);
	check(&pool);
	millm_sequence_truncate(b, 3 * PAGE + 2);
	assert_int_equal(millm_sequence_length(b), 0);
	assert_int_equal(b->tables[0].n_pages + b->tables[0].n_passed, 0);
	check(&pool);
	assert_true(millm_sequence_reserve(b, 1));
	millm_sequence_free(a);
	millm_sequence_free(b);
	assert_int_equal(pool.n_free, 8);
	check(&pool);
	millm_kv_reset(&pool);
}

static void
test_bounds(void **state)
{
	MillmKvPool pool;
	MillmError	err;

	(void) state;
	assert_int_equal(millm_kv_init(&pool, 0, no_window, 1, 1, false, count_copy, NULL, &err), MILLM_E_INVALID_ARGUMENT);
	assert_int_equal(millm_kv_init(&pool, -1, no_window, 1, 1, false, count_copy, NULL, &err), MILLM_E_INVALID_ARGUMENT);
	assert_int_equal(millm_kv_init(&pool, INT64_MAX, no_window, 1, 1, false, count_copy, NULL, &err), MILLM_E_INVALID_ARGUMENT);
}

/* 16 sequences live, grow, fork, are cut and die in any order; the ledger agrees with itself after each change. */
static void
random_life(const int *windows, int n_groups, int n_pages)
{
	enum {N_SEQUENCES = 16, N_EVENTS = 20000};
	MillmKvPool pool;
	MillmSequence *seq[N_SEQUENCES] = {NULL};
	Copies		copies = {0};
	unsigned	random = 1;
	int			n_refused = 0;

	init(&pool, n_pages, windows, n_groups, 46, &copies);
	for (int event = 0; event < N_EVENTS; event++)
	{
		int			i,
					j;

		random = random * 1103515245 + 12345;
		i = random >> 16 & 15;
		j = random >> 20 & 15;
		if (!seq[i])
			seq[i] = seq[j] ? millm_sequence_fork(seq[j]) : millm_kv_create(&pool);
		else if ((random >> 24) % 8 == 0)
		{
			millm_sequence_free(seq[i]);
			seq[i] = NULL;
		}
		else if ((random >> 24) % 8 == 1)
			millm_sequence_truncate(seq[i], seq[i]->length * j / 16);
		else
		{
			int			length = seq[i]->length + j * 3 + 1;
			int			n_free = pool.n_free;

			if (millm_sequence_reserve(seq[i], length))
			{
				assert_true(millm_kv_has_room(seq[i], length));
				seq[i]->length += j;	/* a step that used part of it */
				millm_kv_pass(seq[i]);
			}
			else
			{
				assert_int_equal(pool.n_free, n_free);
				n_refused++;
			}
		}
		check(&pool);
	}
	assert_true(n_refused > 0 && copies.n > 0);		/* or this test has seen nothing */
	for (int i = 0; i < N_SEQUENCES; i++)
		millm_sequence_free(seq[i]);
	assert_int_equal(pool.n_free, n_pages);
	check(&pool);
	millm_kv_reset(&pool);
}

static void
test_random_life(void **state)
{
	random_life(no_window, 1, 64);
	random_life((int[]) {1}, 1, 24);
	random_life((int[]) {37}, 1, 24);
	random_life((int[]) {0, 37, 37, 5}, 4, 120);
	(void) state;
}

/* Layers with the same window share pages, and all pages are of as many layers. */
static void
test_layout(void **state)
{
	MillmKvLayout l;
	int			windows[26];

	(void) state;
	millm_kv_layout(&l, (int[]) {0, 0, 0}, 3);
	assert_int_equal(l.n_groups, 1);
	assert_int_equal(l.layers_per_page, 3);
	assert_int_equal(l.places[2], 2);

	millm_kv_layout(&l, (int[]) {7, 0, 7, 0}, 4);
	assert_int_equal(l.n_groups, 2);
	assert_int_equal(l.layers_per_page, 2);
	for (int i = 0; i < 4; i++)
	{
		assert_int_equal(l.groups[i], i % 2);
		assert_int_equal(l.places[i], i / 2);
	}
	assert_int_equal(l.windows[0], 7);
	assert_int_equal(l.windows[1], 0);

	for (int i = 0; i < 26; i++)
		windows[i] = (i + 1) % 6 == 0 ? 0 : 512;	/* 4 and 22 */
	millm_kv_layout(&l, windows, 26);
	assert_int_equal(l.n_groups, 13);
	assert_int_equal(l.layers_per_page, 2);
	for (int i = 0; i < 26; i++)
	{
		assert_int_equal(l.windows[l.groups[i]], windows[i]);
		for (int j = 0; j < i; j++)		/* no two layers in one place */
			assert_false(l.groups[i] == l.groups[j] && l.places[i] == l.places[j]);
	}
}

/* No growth takes more pages than was said, and one takes all of them. */
static void
test_needed_pages(void **state)
{
	const int	layers[] = {0, 40, 0, 40, 40, 40};	/* groups: 0, 40, 40 */

	(void) state;
	for (int step = 1; step <= 70; step += 23)
	{
		MillmKvLayout l;
		MillmKvPool pool;
		Copies		copies = {0};
		int64_t		needed;
		int			most = 0;
		unsigned	random = 1;

		millm_kv_layout(&l, layers, 6);
		assert_int_equal(l.n_groups, 3);
		needed = millm_kv_pages(&l, 1000, step);
		assert_true(needed < 3 * (1000 + PAGE - 1) / PAGE);
		for (int life = 0; life < 40; life++)
		{
			MillmSequence *seq;

			init(&pool, (int) needed, l.windows, l.n_groups, step, &copies);
			seq = millm_kv_create(&pool);
			while (seq->length < 1000)
			{
				int			n = life == 0 ? step : 1 + (int) ((random = random * 1103515245 + 12345) >> 16) % step;

				n = n < 1000 - seq->length ? n : 1000 - seq->length;
				assert_true(millm_sequence_reserve(seq, 1000));	/* a whole prompt, of which a step is done at a time */
				assert_true(millm_kv_has_room(seq, seq->length + n));
				most = needed - pool.n_free > most ? (int) needed - pool.n_free : most;
				seq->length += n;
				millm_kv_pass(seq);
				check(&pool);
			}
			millm_sequence_free(seq);
			millm_kv_reset(&pool);
		}
		assert_int_equal(most, needed);
		assert_int_equal(millm_kv_pages(&l, 20, step), 3 * 2);
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_reserve_is_all_or_nothing),
		cmocka_unit_test(test_fork_shares_and_copies_on_write),
		cmocka_unit_test(test_copy_needs_a_free_page),
		cmocka_unit_test(test_window),
		cmocka_unit_test(test_layout),
		cmocka_unit_test(test_needed_pages),
		cmocka_unit_test(test_bounds),
		cmocka_unit_test(test_random_life),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
