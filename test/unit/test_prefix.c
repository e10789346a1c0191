/*
 * test_prefix.c -- the prefix cache over the ledger of KV pages: what is shared, what goes first, and that nobody ever sees another's page.
 *
 * Pages are played: what a position of a page holds is a hash of all tokens up to it and of the group, written where the
 * forward pass would write it and compared with what each live sequence must see.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "kv.h"

#define PAGE		MILLM_KV_PAGE_TOKENS
#define MAX_LENGTH	(24 * PAGE)
#define MAX_PAGES	512
#define MAX_GROUPS	4

static uint64_t contents[MAX_PAGES][PAGE];
static MillmKvPool pool;

typedef struct Text
{
	MillmSequence *seq;
	int32_t		tokens[MAX_LENGTH];
	int			n;				/* known; the sequence has computed its length of them */
} Text;

static void
copy_page(void *arg, int32_t dst, int32_t src)
{
	(void) arg;
	memcpy(contents[dst], contents[src], sizeof(contents[dst]));
}

static void
init(int n_pages, const int *windows, int n_groups, int step)
{
	assert_int_equal(millm_kv_init(&pool, n_pages, windows, n_groups, step, true, copy_page, NULL, NULL), MILLM_OK);
}

/* What the position must hold in each page of it. */
static uint64_t
content(const Text *t, int position, int group)
{
	uint64_t	h = (uint64_t) group + ((uint64_t) t->seq->rotation << 32);

	for (int i = 0; i <= position; i++)
		h = (h ^ (uint32_t) t->tokens[i]) * UINT64_C(0x9E3779B97F4A7C15) + 1;
	return h;
}

/* The ledger agrees with itself, and the sequence sees its own past. */
static void
check(const Text *t)
{
	MillmError	err;

	if (millm_kv_check(&pool, &err) != MILLM_OK)
		fail_msg("%s", err.message);
	if (!t || !t->seq)
		return;
	for (int g = 0; g < pool.n_groups; g++)
	{
		const int	window = pool.windows[g], length = t->seq->length;

		for (int i = window > 0 && length >= window ? length - window + 1 : 0; i < length; i++)
			if (contents[t->seq->tables[g].pages[i / PAGE]][i % PAGE] != content(t, i, g))
				fail_msg("position %d of %d, group %d (window %d) holds something else", i, length, g, window);
	}
}

/* A step of the forward pass: the next n tokens. */
static bool
compute(Text *t, int n)
{
	const int	begin = t->seq->length;

	if (!millm_sequence_reserve(t->seq, begin + n))
		return false;
	assert_true(millm_kv_has_room(t->seq, begin + n));
	for (int i = begin; i < begin + n; i++)
		for (int g = 0; g < pool.n_groups; g++)
			contents[t->seq->tables[g].pages[i / PAGE]][i % PAGE] = content(t, i, g);
	for (int i = begin; i < begin + n; i++)
		millm_kv_append(t->seq, t->tokens[i]);
	millm_kv_pass(t->seq);
	check(t);
	return true;
}

static void
begin(Text *t, int rotation)
{
	t->seq = millm_kv_create(&pool);
	t->seq->rotation = rotation;
}

static void
end(Text *t)
{
	millm_sequence_free(t->seq);
	t->seq = NULL;
	check(NULL);
}

/* n tokens of the text that the number stands for. */
static void
write_text(Text *t, int number, int n)
{
	for (int i = 0; i < n; i++)
		t->tokens[i] = number * 1000 + i;
	t->n = n;
}

/* Begin it, take what there is, compute the rest; returns what there was. */
static int
run(Text *t)
{
	int			shared;

	begin(t, 0);
	shared = millm_sequence_share(t->seq, t->tokens, t->n - 1);
	while (t->seq->length < t->n)
		assert_true(compute(t, t->n - t->seq->length < pool.step ? t->n - t->seq->length : pool.step));
	return shared;
}

static void
finish(void)
{
	assert_int_equal(millm_kv_n_free(&pool), pool.n_pages);
	millm_kv_reset(&pool);
}

static const int no_window[] = {0};

/* A text that begins as another did takes its pages, while that one lives and after. */
static void
test_shares_whole_pages(void **state)
{
	Text		a, b;

	(void) state;
	init(32, no_window, 1, 256);
	write_text(&a, 1, 5 * PAGE + 3);
	b = a;
	b.tokens[3 * PAGE + 2] = 7;
	assert_int_equal(run(&a), 0);
	assert_int_equal(pool.n_free, 26);
	assert_int_equal(run(&b), 3 * PAGE);
	assert_int_equal(pool.n_free, 23);
	for (int i = 0; i < 3; i++)
		assert_int_equal(a.seq->tables[0].pages[i], b.seq->tables[0].pages[i]);
	end(&a);
	end(&b);
	assert_int_equal(millm_kv_n_free(&pool), 32);
	assert_int_equal(millm_prefix_n_pages(pool.prefix), 7);

	/* The last token is left to compute, whoever has been here. */
	write_text(&a, 1, 4 * PAGE);
	assert_int_equal(run(&a), 3 * PAGE);
	end(&a);
	/* generated tokens are shared as those of prompts are */
	write_text(&a, 1, 5 * PAGE + 3);
	assert_int_equal(run(&a), 5 * PAGE);
	end(&a);
	finish();
}

/* Two that begin at once: what one has computed the other takes over on its way, and of what both have one goes. */
static void
test_shares_on_the_way(void **state)
{
	Text		a, b;

	(void) state;
	init(32, no_window, 1, 256);
	write_text(&a, 1, 10 * PAGE);
	b = a;
	begin(&a, 0);
	begin(&b, 0);
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, a.n - 1), 0);
	assert_int_equal(millm_sequence_share(b.seq, b.tokens, b.n - 1), 0);
	assert_true(millm_sequence_reserve(b.seq, b.n));	/* as the scheduler does */
	assert_true(compute(&a, 2 * PAGE + 1));
	assert_true(compute(&b, PAGE + 5));
	assert_int_equal(b.seq->tables[0].pages[0], a.seq->tables[0].pages[0]);
	assert_int_equal(millm_sequence_share(b.seq, b.tokens, b.n - 1), 2 * PAGE);
	check(&b);
	assert_true(compute(&a, 5 * PAGE));
	assert_int_equal(millm_sequence_share(b.seq, b.tokens, 6 * PAGE + 1), 6 * PAGE);
	assert_int_equal(millm_sequence_share(b.seq, b.tokens, 6 * PAGE + 1), 6 * PAGE);
	check(&b);
	assert_true(compute(&b, b.n - 6 * PAGE));
	end(&b);
	end(&a);
	finish();
}

/* What was used last goes last, the end of a text before its beginning, and never what is in use. */
static void
test_eviction_order(void **state)
{
	Text		a, b, c;

	(void) state;
	init(12, no_window, 1, 256);
	write_text(&a, 1, 4 * PAGE + 1);
	write_text(&b, 2, 4 * PAGE + 1);
	run(&a);
	end(&a);
	run(&b);
	end(&b);
	assert_int_equal(pool.n_free, 4);
	run(&a);					/* a is the later one now */
	end(&a);
	write_text(&c, 3, 7 * PAGE);
	assert_int_equal(run(&c), 0);	/* takes four free pages and three of b's */
	assert_int_equal(millm_prefix_n_pages(pool.prefix), 7 + 4 + 1);
	assert_int_equal(run(&b), PAGE);	/* and now the rest of a's but for one */
	assert_int_equal(millm_kv_n_free(&pool), 0);
	assert_int_equal(millm_prefix_n_resting(pool.prefix), 0);

	/* nothing rests: no room, and nothing changed */
	begin(&a, 0);
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, a.n - 1), 0);
	assert_false(millm_sequence_reserve(a.seq, 1));
	check(&a);
	end(&a);
	end(&c);
	end(&b);
	finish();
}

/* Pages that others hold need not be had again. */
static void
test_held_pages(void **state)
{
	Text		a;

	(void) state;
	init(16, no_window, 1, 256);
	write_text(&a, 1, 6 * PAGE);
	assert_int_equal(millm_kv_held(&pool, 0, a.tokens, a.n, a.n), 0);
	run(&a);
	assert_int_equal(millm_kv_held(&pool, 0, a.tokens, a.n, a.n), 6);
	assert_int_equal(millm_kv_held(&pool, 0, a.tokens, a.n - 1, a.n), 5);
	assert_int_equal(millm_kv_held(&pool, 1, a.tokens, a.n, a.n), 0);
	end(&a);
	assert_int_equal(millm_kv_held(&pool, 0, a.tokens, a.n, a.n), 0);	/* nobody's: counted as free */
	finish();
}

/* The same tokens, rotated otherwise, are another text. */
static void
test_rotations_are_apart(void **state)
{
	Text		a;

	(void) state;
	init(32, no_window, 1, 256);
	write_text(&a, 1, 4 * PAGE + 1);
	run(&a);
	end(&a);
	begin(&a, 5000);
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, a.n - 1), 0);
	assert_true(compute(&a, a.n));
	end(&a);
	begin(&a, 5000);
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, a.n - 1), 4 * PAGE);
	check(&a);
	end(&a);
	finish();
}

/* A sequence that does not share leaves nothing behind, and is not made to share in the middle. */
static void
test_who_does_not_share(void **state)
{
	Text		a;

	(void) state;
	init(32, no_window, 1, 256);
	write_text(&a, 1, 4 * PAGE + 1);
	begin(&a, 0);
	assert_true(compute(&a, 3 * PAGE));
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, a.n - 1), 3 * PAGE);
	assert_true(compute(&a, PAGE));
	end(&a);
	assert_int_equal(millm_prefix_n_pages(pool.prefix), 0);
	finish();
}

/* A fork stands where its sequence does; what both go on with is one text or two. */
static void
test_fork_and_truncate(void **state)
{
	Text		a, b;

	(void) state;
	init(32, no_window, 1, 256);
	write_text(&a, 1, 6 * PAGE);
	begin(&a, 0);
	millm_sequence_share(a.seq, a.tokens, a.n - 1);
	assert_true(compute(&a, 2 * PAGE + 4));
	b = a;
	b.seq = millm_sequence_fork(a.seq);
	b.tokens[2 * PAGE + 9] = 7;
	check(&b);
	assert_true(compute(&a, 2 * PAGE));
	assert_true(compute(&b, 2 * PAGE));
	assert_int_not_equal(a.seq->tables[0].pages[2], b.seq->tables[0].pages[2]);
	/* back into a page of the cache: what is written there is a copy */
	millm_sequence_truncate(b.seq, PAGE + 3);
	check(&b);
	b.tokens[PAGE + 3] = 8;
	assert_true(compute(&b, 2 * PAGE));
	check(&a);
	millm_sequence_truncate(b.seq, PAGE + 2);
	memcpy(b.tokens, a.tokens, sizeof(b.tokens));
	assert_true(compute(&b, 2 * PAGE));
	assert_int_equal(a.seq->tables[0].pages[2], b.seq->tables[0].pages[2]);
	check(&a);
	millm_sequence_truncate(b.seq, 0);
	assert_int_equal(millm_sequence_share(b.seq, b.tokens, 3 * PAGE), 3 * PAGE);
	check(&b);
	end(&a);
	end(&b);
	finish();
}

/* Gemma's layout: one group sees all, the others through a window.  What the window has passed is of use to who begins there. */
static void
test_windows(void **state)
{
	static const int windows[] = {0, 2 * PAGE + 3, 2 * PAGE + 3};
	Text		a, b;

	(void) state;
	init(80, windows, 3, 64);
	write_text(&a, 1, 12 * PAGE);
	begin(&a, 0);
	millm_sequence_share(a.seq, a.tokens, a.n - 1);
	while (a.seq->length < a.n)
		assert_true(compute(&a, 3 * PAGE));
	assert_int_equal(millm_prefix_n_pages(pool.prefix), 3 * 12);
	assert_int_equal(a.seq->tables[1].n_passed, 9);

	/* in the middle of it, where a has none of the windows' pages any more */
	b = a;
	b.tokens[6 * PAGE] = 7;
	begin(&b, 0);
	assert_int_equal(millm_sequence_share(b.seq, b.tokens, b.n - 1), 6 * PAGE);
	assert_int_equal(b.seq->tables[1].n_passed, 6 - 3);	/* the next position sees one of the third page before it */
	assert_true(compute(&b, 2 * PAGE));
	end(&b);
	end(&a);

	/* Others take 19 of its pages, which are those that rest longest: the windows' from its beginning on.  So it can be used only further on. */
	write_text(&b, 3, 15 * PAGE);
	begin(&b, 0);
	millm_sequence_share(b.seq, b.tokens, b.n - 1);
	while (b.seq->length < b.n)
		assert_true(compute(&b, 3 * PAGE));
	end(&b);
	write_text(&b, 4, 4 * PAGE);
	run(&b);
	end(&b);
	write_text(&a, 1, PAGE + 1);
	begin(&a, 0);
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, PAGE), 0);
	end(&a);
	write_text(&a, 1, 12 * PAGE + 1);
	assert_int_equal(run(&a), 12 * PAGE);
	end(&a);
	finish();
}

/* All layers slide: nodes whose pages are gone still lead to those behind them. */
static void
test_all_slide(void **state)
{
	static const int windows[] = {PAGE + 5};
	Text		a, b;

	(void) state;
	init(12, windows, 1, 32);
	write_text(&a, 1, 20 * PAGE + 1);
	begin(&a, 0);
	millm_sequence_share(a.seq, a.tokens, a.n - 1);
	for (int n = 0; n < 8 * PAGE; n += PAGE)
		assert_true(compute(&a, PAGE));
	b = a;
	b.n = 8 * PAGE + 1;
	end(&a);
	assert_int_equal(run(&b), 8 * PAGE);
	end(&b);

	/* more nodes than there may be: one that finds no place does without the cache */
	begin(&a, 0);
	assert_int_equal(millm_sequence_share(a.seq, a.tokens, a.n - 1), 8 * PAGE);
	while (a.seq->length < a.n)
		assert_true(compute(&a, 1));
	assert_false(a.seq->is_shared);
	end(&a);
	finish();
}

/* Sequences begin alike, grow, share again, fork, are cut, preempted and dropped in any order. */
static void
random_life(const int *windows, int n_groups, int n_pages, int step)
{
	enum {N_TEXTS = 10, N_EVENTS = 12000};
	static Text texts[N_TEXTS];
	unsigned	random = 1;
	int			n_refused = 0,
				n_shared = 0,
				n_later = 0;

	memset(texts, 0, sizeof(texts));
	init(n_pages, windows, n_groups, step);
	for (int event = 0; event < N_EVENTS; event++)
	{
		Text	   *t,
				   *other;
		int			kind;

		random = random * 1103515245 + 12345;
		t = &texts[(random >> 16) % N_TEXTS];
		other = &texts[(random >> 20) % N_TEXTS];
		kind = random >> 24 & 15;
		if (!t->seq && other->seq && kind < 3)
		{
			*t = *other;
			t->seq = millm_sequence_fork(other->seq);
			t->tokens[t->seq->length + 1] = kind;
		}
		else if (!t->seq)
		{
			/* few beginnings, and ends that differ somewhere */
			write_text(t, (int) (random >> 18 & 3), MAX_LENGTH);
			t->tokens[(random >> 10) % MAX_LENGTH] = (int32_t) (random >> 28 & 3);
			begin(t, (random >> 9) % 8 == 0);
			if ((random >> 13) % 16 > 0)
			{
				millm_sequence_share(t->seq, t->tokens, (int) ((random >> 14) % MAX_LENGTH));
				n_shared += t->seq->length > 0;
			}
		}
		else if (kind == 0)
		{
			millm_sequence_free(t->seq);
			t->seq = NULL;
		}
		else if (kind == 1)
		{
			millm_sequence_truncate(t->seq, t->seq->length * (int) (random >> 10 & 15) / 16);
			t->tokens[t->seq->length] = (int32_t) (random >> 20 & 3);
		}
		else if (kind < 5)
		{
			const int	before = t->seq->length;

			n_later += millm_sequence_share(t->seq, t->tokens, MAX_LENGTH - 1) > before && before > 0;
		}
		else
		{
			int			n = 1 + (int) ((random >> 8) % (unsigned) step);

			if (t->seq->length + n > MAX_LENGTH - 2)
			{
				millm_sequence_free(t->seq);
				t->seq = NULL;
			}
			else if (!compute(t, n))
				n_refused++;
		}
		check(t);
		check(other);
	}
	for (int i = 0; i < N_TEXTS; i++)
		end(&texts[i]);
	assert_true(n_refused > 0 && n_shared > 0 && n_later > 0);	/* or this test has seen nothing */
	finish();
}

static void
test_random_life(void **state)
{
	(void) state;
	random_life(no_window, 1, 48, 40);
	random_life((int[]) {1}, 1, 10, 40);
	random_life((int[]) {37}, 1, 24, 46);
	random_life((int[]) {0, 37}, 2, 80, 46);
	random_life((int[]) {0, 37, 37, 5}, 4, 140, 33);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_shares_whole_pages),
		cmocka_unit_test(test_shares_on_the_way),
		cmocka_unit_test(test_eviction_order),
		cmocka_unit_test(test_held_pages),
		cmocka_unit_test(test_rotations_are_apart),
		cmocka_unit_test(test_who_does_not_share),
		cmocka_unit_test(test_fork_and_truncate),
		cmocka_unit_test(test_windows),
		cmocka_unit_test(test_all_slide),
		cmocka_unit_test(test_random_life),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
