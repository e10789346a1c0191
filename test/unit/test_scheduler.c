/* test_scheduler.c -- the scheduler's rules, with a pool that only counts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "scheduler.h"

#define PAGE 4

/* With a window, room is made for one step, and pages that the window has left go back (kv.h). */
typedef struct Pool
{
	int64_t		n_free;
	int			window;			/* 0: none */
	int			step;
	int			shared;			/* positions that a slot without pages is given, in pages of somebody else's: whole ones */
} Pool;

typedef struct Seq
{
	MillmSlot	slot;			/* first */
	Pool	   *pool;			/* that has given it pages */
	int			pages;
	int			passed;			/* of them, that have gone back */
	int			shared;			/* of them, somebody else's */
	int			goal;			/* tokens in all */
	int			number;
} Seq;

static bool
reserve(void *arg, MillmSlot *slot, int length)
{
	Pool	   *pool = arg;
	Seq		   *seq = (Seq *) slot;
	int			more;

	seq->pool = pool;
	if (pool->window > 0 && length > slot->n_past + pool->step)
		length = slot->n_past + pool->step;
	more = (length + PAGE - 1) / PAGE - seq->pages;
	if (seq->pages == 0)
		more -= pool->shared / PAGE;
	if (more <= 0)
		return true;
	if (more > pool->n_free)
		return false;
	pool->n_free -= more;
	if (seq->pages == 0)
	{
		slot->n_past = pool->shared;
		seq->pages = seq->shared = pool->shared / PAGE;
	}
	seq->pages += more;
	return true;
}

static void
release(void *arg, MillmSlot *slot)
{
	Seq		   *seq = (Seq *) slot;

	((Pool *) arg)->n_free += seq->pages - seq->passed - seq->shared;
	seq->pages = seq->passed = seq->shared = 0;
}

static void
pass(Seq *seq)
{
	const int	window = seq->pool->window;

	for (; window > 0 && seq->slot.n_past >= window && seq->passed < (seq->slot.n_past - window + 1) / PAGE; seq->passed++)
		seq->pool->n_free++;
}

static int64_t
n_free(void *arg)
{
	return ((Pool *) arg)->n_free;
}

static int64_t
pages_of(const Pool *pool, int length)
{
	const int	all = (length + PAGE - 1) / PAGE;
	const int	seen = (pool->window + pool->step + 2 * PAGE - 3) / PAGE;

	return pool->window > 0 && seen < all ? seen : all;
}

static int64_t
needs(void *arg, const MillmSlot *slot)
{
	const Pool *pool = arg;

	return pages_of(pool, slot->n_tokens) - pool->shared / PAGE;
}

static MillmScheduler *
create(Pool *pool, int64_t pages, int max_running, int max_waiting, int max_batch)
{
	MillmSchedPages p = {reserve, release, n_free, needs, 1, pool};

	*pool = (Pool) {.n_free = pages};
	return millm_sched_create(&p, max_running, max_waiting, max_batch);
}

/* What every plan must satisfy. */
static void
check_plan(const MillmPlanItem *items, int n, int max_batch)
{
	int			total = 0;

	for (int i = 0; i < n; i++)
	{
		const Seq  *seq = (const Seq *) items[i].slot;

		total += items[i].n_tokens;
		assert_true(items[i].n_tokens >= 1);
		assert_true(seq->slot.is_running && !seq->slot.is_paused);
		assert_true(seq->slot.n_past + items[i].n_tokens <= seq->slot.n_tokens);
		assert_true(seq->pages * PAGE >= seq->slot.n_past + items[i].n_tokens);
		for (int j = 0; j < i; j++)
			assert_ptr_not_equal(items[i].slot, items[j].slot);
	}
	assert_true(total <= max_batch);
}

/* Run the step; sequences that computed their last known token get another. */
static void
finish_step(MillmScheduler *s, MillmPlanItem *items, int n)
{
	millm_sched_done(s, items, n, 1);
	for (int i = 0; i < n; i++)
		pass((Seq *) items[i].slot);
	for (int i = 0; i < n; i++)
		if (items[i].slot->n_past == items[i].slot->n_tokens)
		{
			Seq		   *seq = (Seq *) items[i].slot;

			seq->slot.n_tokens++;
			if (seq->slot.n_tokens >= seq->goal)
				millm_sched_remove(s, &seq->slot);
		}
}

static void
decode_goes_first(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 1000, 4, 4, 32);
	Seq			a = {.slot.n_tokens = 10, .goal = 100};
	Seq			b = {.slot.n_tokens = 50, .goal = 100};
	Seq			c = {.slot.n_tokens = 5, .goal = 100};
	MillmPlanItem items[4];

	(void) state;
	assert_true(millm_sched_add(s, &a.slot));
	assert_int_equal(millm_sched_plan(s, items), 1);
	assert_int_equal(items[0].n_tokens, 10);
	finish_step(s, items, 1);
	assert_true(millm_sched_add(s, &b.slot));
	assert_true(millm_sched_add(s, &c.slot));

	/* a decodes, b leaves room to c, and its chunk fills the rest */
	assert_int_equal(millm_sched_plan(s, items), 3);
	assert_ptr_equal(items[0].slot, &a.slot);
	assert_int_equal(items[0].n_tokens, 1);
	assert_ptr_equal(items[1].slot, &b.slot);
	assert_int_equal(items[1].n_tokens, 26);
	assert_ptr_equal(items[2].slot, &c.slot);
	assert_int_equal(items[2].n_tokens, 5);
	finish_step(s, items, 3);
	/* b's last chunk */
	assert_int_equal(millm_sched_plan(s, items), 3);
	assert_int_equal(items[0].n_tokens, 1);
	assert_int_equal(items[1].n_tokens, 1);
	assert_ptr_equal(items[2].slot, &b.slot);
	assert_int_equal(items[2].n_tokens, 24);
	finish_step(s, items, 3);
	assert_int_equal(millm_sched_plan(s, items), 3);
	for (int i = 0; i < 3; i++)
		assert_int_equal(items[i].n_tokens, 1);
	assert_int_equal(millm_sched_n_running(s), 3);
	millm_sched_free(s);
}

/* A step that was canceled is planned again as it was: a prompt of one token too. */
static void
canceled_step(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 1000, 4, 4, 32);
	Seq			a = {.slot.n_tokens = 1, .goal = 10};
	MillmPlanItem items[4];

	(void) state;
	millm_sched_add(s, &a.slot);
	for (int i = 0; i < 3; i++)
	{
		assert_int_equal(millm_sched_plan(s, items), 1);
		check_plan(items, 1, 32);
	}
	millm_sched_free(s);
}

static void
limits(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 1000, 2, 1, 32);
	Seq			q[4] = {0};
	MillmPlanItem items[2];

	(void) state;
	for (int i = 0; i < 4; i++)
		q[i].slot.n_tokens = 3, q[i].goal = 10;
	for (int i = 0; i < 3; i++)
		assert_true(millm_sched_add(s, &q[i].slot));
	assert_false(millm_sched_add(s, &q[3].slot));
	assert_int_equal(millm_sched_plan(s, items), 2);
	assert_int_equal(millm_sched_n_running(s), 2);
	assert_int_equal(millm_sched_n_waiting(s), 1);
	millm_sched_remove(s, &q[0].slot);
	assert_int_equal(millm_sched_plan(s, items), 2);
	assert_ptr_equal(items[1].slot, &q[2].slot);
	millm_sched_free(s);
}

/* Nobody overtakes a head of the line that waits for pages; a paused one lets the others pass. */
static void
no_overtaking(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 10, 4, 4, 64);
	Seq			a = {.slot.n_tokens = 20, .goal = 40};
	Seq			b = {.slot.n_tokens = 36, .goal = 40};
	Seq			c = {.slot.n_tokens = 2, .goal = 40};
	MillmPlanItem items[4];

	(void) state;
	millm_sched_add(s, &a.slot);
	millm_sched_add(s, &b.slot);
	millm_sched_add(s, &c.slot);
	assert_int_equal(millm_sched_plan(s, items), 1);
	assert_ptr_equal(items[0].slot, &a.slot);
	b.slot.is_paused = true;
	assert_int_equal(millm_sched_plan(s, items), 2);
	assert_ptr_equal(items[1].slot, &c.slot);
	millm_sched_free(s);
}

static void
preempts_the_youngest(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 6, 4, 4, 64);		/* 24 positions */
	Seq			a = {.slot.n_tokens = 8, .goal = 24};
	Seq			b = {.slot.n_tokens = 8, .goal = 24};
	MillmPlanItem items[4];
	int			n;
	int			steps = 0;

	(void) state;
	millm_sched_add(s, &a.slot);
	millm_sched_add(s, &b.slot);
	while (b.slot.n_preempted == 0)
	{
		n = millm_sched_plan(s, items);
		check_plan(items, n, 64);
		finish_step(s, items, n);
		assert_true(++steps < 100);
	}
	assert_int_equal(b.slot.n_past, 0);
	assert_int_equal(b.pages, 0);
	assert_int_equal(a.slot.n_preempted, 0);
	assert_true(b.slot.n_tokens > 8);	/* what it had generated is not forgotten */
	while ((n = millm_sched_plan(s, items)) > 0)
	{
		check_plan(items, n, 64);
		finish_step(s, items, n);
		assert_true(++steps < 200);
	}
	assert_int_equal(a.slot.n_tokens, 24);
	assert_int_equal(b.slot.n_tokens, 24);
	assert_int_equal(pool.n_free, 6);
	millm_sched_free(s);
}

/* Who is given a beginning that somebody else has computed takes pages, and a step, for the rest only; after a preemption too. */
static void
shared_beginning(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 6, 4, 4, 64);
	Seq			q[3] = {0};
	MillmPlanItem items[4];
	int			steps = 0;
	int			n;

	(void) state;
	pool.shared = 8;
	for (int i = 0; i < 3; i++)
	{
		q[i].slot.n_tokens = 9;
		q[i].goal = 24;
		assert_true(millm_sched_add(s, &q[i].slot));
	}
	assert_int_equal(millm_sched_plan(s, items), 3);	/* nine pages, were they not shared */
	check_plan(items, 3, 64);
	for (int i = 0; i < 3; i++)
		assert_true(items[i].n_tokens == 1 && items[i].slot->n_past == 8);
	assert_int_equal(pool.n_free, 3);
	do
	{
		finish_step(s, items, n = millm_sched_plan(s, items));
		assert_true(++steps < 200);
		for (int i = 0; i < 3; i++)
			assert_true(!q[i].slot.is_running || q[i].slot.n_past >= 8);
	} while (n > 0);
	assert_true(q[2].slot.n_preempted > 0);
	for (int i = 0; i < 3; i++)
		assert_int_equal(q[i].slot.n_tokens, 24);
	assert_int_equal(pool.n_free, 6);
	millm_sched_free(s);
}

/* Many random sequences in a small pool, with cancels and pauses: everything ends, every page comes back. */
static void
run_storm(int window, int longest)
{
	for (unsigned seed = 1; seed <= 60; seed++)
	{
		Pool		pool;
		int			max_batch = 8 + (int) (seed % 40);
		MillmScheduler *s = create(&pool, 0, 6, 30, max_batch);
		int64_t		n_pages;
		Seq			q[36] = {0};
		bool		gone[36] = {0};
		MillmPlanItem items[6];
		int			steps = 0;
		int			n;
		int			left = 36;

		pool.window = window;
		pool.step = max_batch;
		pool.n_free = n_pages = pages_of(&pool, longest);	/* the pool holds one */
		srandom(seed);
		for (int i = 0; i < 36; i++)
		{
			q[i].goal = 2 + (int) (random() % (longest - 2));
			q[i].slot.n_tokens = 1 + (int) (random() % (q[i].goal - 1));
			q[i].number = i;
			q[i].slot.role = (uint32_t) (random() % 4);
			q[i].slot.is_stream = random() % 2;
			assert_true(millm_sched_add(s, &q[i].slot));
		}
		while (left > 0)
		{
			int			pick = (int) (random() % 36);

			if (random() % 20 == 0 && !gone[pick])
			{
				millm_sched_remove(s, &q[pick].slot);
				gone[pick] = true;
			}
			q[pick].slot.is_paused = steps < 300 && random() % 2;
			if (steps >= 300)
				for (int i = 0; i < 36; i++)
					q[i].slot.is_paused = false;
			n = millm_sched_plan(s, items);
			check_plan(items, n, max_batch);
			if (n > 0 && random() % 30 > 0)		/* else: the step was canceled */
				finish_step(s, items, n);
			left = 0;
			for (int i = 0; i < 36; i++)
			{
				if (q[i].slot.n_tokens >= q[i].goal)
					gone[i] = true;
				left += !gone[i];
			}
			assert_true(++steps < 20000);
		}
		assert_int_equal(pool.n_free, n_pages);
		assert_int_equal(millm_sched_n_running(s) + millm_sched_n_waiting(s), 0);
		millm_sched_free(s);
	}
}

static void
storm(void **state)
{
	run_storm(0, 80);
	run_storm(10, 300);
	(void) state;
}

/* Admit and end what runs, one at a time, until nobody waits; the numbers in the order of admission. */
static int
admitted_in_order(MillmScheduler *s, int *numbers, int max)
{
	MillmPlanItem items[1];
	int			n = 0;

	while (millm_sched_plan(s, items) == 1)
	{
		assert_true(n < max);
		numbers[n++] = ((Seq *) items[0].slot)->number;
		millm_sched_remove(s, items[0].slot);
	}
	return n;
}

static void
roles_take_turns(void **state)
{
	static const uint32_t roles[] = {1, 1, 1, 1, 2, 2, 3, 1};
	static const int expected[] = {0, 4, 6, 1, 5, 2, 3, 7};
	Pool		pool;
	MillmScheduler *s = create(&pool, 1000, 1, 20, 64);
	Seq			q[8] = {0};
	int			numbers[8];

	(void) state;
	for (int i = 0; i < 8; i++)
	{
		q[i] = (Seq) {.slot = {.role = roles[i], .n_tokens = 5}, .goal = 20, .number = i};
		assert_true(millm_sched_add(s, &q[i].slot));
	}
	assert_int_equal(admitted_in_order(s, numbers, 8), 8);
	assert_memory_equal(numbers, expected, sizeof(expected));
	/* who waits no longer has no claim to the turns that he would have had */
	for (int i = 0; i < 4; i++)
		assert_true(millm_sched_add(s, &q[i].slot));
	for (int i = 0; i < 4; i++)
		millm_sched_remove(s, &q[i].slot);
	assert_true(millm_sched_add(s, &q[7].slot));
	for (int i = 4; i < 7; i++)
		assert_true(millm_sched_add(s, &q[i].slot));
	assert_int_equal(admitted_in_order(s, numbers, 8), 4);
	assert_memory_equal(numbers, ((int[]) {4, 6, 7, 5}), 4 * sizeof(int));
	millm_sched_free(s);
}

/* Two roles that come again as soon as they are done leave a turn to a third one that already has had one, be the roles ever so many. */
static void
nobody_has_a_turn_twice(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 1000, 1, 4, 64);
	Seq			b[2] = {{.slot = {.role = 2, .n_tokens = 5}, .goal = 9}, {.slot = {.role = 2, .n_tokens = 5}, .goal = 9}};
	Seq			others[2] = {{.slot = {.n_tokens = 5}, .goal = 9}, {.slot = {.n_tokens = 5}, .goal = 9}};
	MillmPlanItem items[1];

	(void) state;
	for (int n_roles = 2; n_roles < 100; n_roles *= 3)
	{
		int			n = 0;

		assert_true(millm_sched_add(s, &b[0].slot));
		assert_true(millm_sched_add(s, &b[1].slot));
		for (int i = 0; i < 2; i++)
		{
			others[i].slot.role = 10 + (uint32_t) i;
			assert_true(millm_sched_add(s, &others[i].slot));
		}
		while (millm_sched_plan(s, items) == 1 && items[0].slot != &b[1].slot)
		{
			millm_sched_remove(s, items[0].slot);
			if (items[0].slot == &b[0].slot)
				continue;
			items[0].slot->role = 10 + (uint32_t) (++n % n_roles);
			assert_true(millm_sched_add(s, items[0].slot));
			assert_true(n < 20);
		}
		millm_sched_remove(s, &b[1].slot);
		millm_sched_remove(s, &others[0].slot);
		millm_sched_remove(s, &others[1].slot);
	}
	millm_sched_free(s);
}

/* Whatever comes when, from whom: a slot with k others of its role before it waits for at most k + 2 of any other. */
static void
bounded_waiting(void **state)
{
	enum {N = 60, ROLES = 5, RUNNING = 3};

	(void) state;
	for (unsigned seed = 1; seed <= 100; seed++)
	{
		Pool		pool;
		MillmScheduler *s = create(&pool, 100000, RUNNING, N, 64);
		Seq			q[N] = {0};
		bool		is_in[N] = {0};
		int			bound[N];
		int			before[N][ROLES];	/* admitted when it came */
		int			admitted[ROLES] = {0};
		int			n_admitted = 0;
		MillmPlanItem items[RUNNING];

		srandom(seed);
		for (int step = 0; step < 1000; step++)
		{
			int			n;

			/* role 0 floods; the others come now and then */
			for (int i = 0; i < N; i++)
				if (!is_in[i] && random() % (i % ROLES == 0 ? 2 : 40) == 0)
				{
					bound[i] = 2;
					for (int k = 0; k < N; k++)
						bound[i] += is_in[k] && !q[k].slot.is_running && k % ROLES == i % ROLES;
					memcpy(before[i], admitted, sizeof(admitted));
					q[i] = (Seq) {.slot = {.role = (uint32_t) (i % ROLES), .n_tokens = 1 + (int) (random() % 30)}, .number = i};
					q[i].goal = q[i].slot.n_tokens + 1 + (int) (random() % 10);
					is_in[i] = true;
					assert_true(millm_sched_add(s, &q[i].slot));
				}
			n = millm_sched_plan(s, items);
			check_plan(items, n, 64);
			for (int k = 0; k < n; k++)
			{
				const int	i = ((Seq *) items[k].slot)->number;

				if (items[k].slot->n_past > 0)
					continue;
				admitted[i % ROLES]++;
				n_admitted++;
				for (int r = 0; r < ROLES; r++)
					assert_true(r == i % ROLES || admitted[r] - before[i][r] <= bound[i]);
			}
			finish_step(s, items, n);
			for (int i = 0; i < N; i++)
				if (is_in[i] && q[i].slot.n_tokens >= q[i].goal)
					is_in[i] = false;
		}
		assert_true(n_admitted > 200);
		millm_sched_free(s);
	}
}

/* A machine on which a step takes decode_ms and so much for each prefill token, which is more the longer the sequence is. */
static double
step_ms(const MillmPlanItem *items, int n, double decode_ms, double token_ms)
{
	double		ms = decode_ms;

	for (int i = 0; i < n; i++)
		if (items[i].n_tokens > 1)
			ms += items[i].n_tokens * token_ms * (1 + items[i].slot->n_past / 4096.0);
	return ms;
}

/* A long prompt beside a sequence that decodes, a stream or not: the longest step but for those that find out, and how many there were. */
static double
longest_step(bool is_stream, double decode_ms, double token_ms, int *n_steps)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, 4, 4, 1024);
	Seq			a = {.slot = {.n_tokens = 100, .is_stream = is_stream}, .goal = 1000000};
	Seq			b = {.slot.n_tokens = 8192, .goal = 8193};
	MillmPlanItem items[4];
	double		longest = 0;
	int			n;

	millm_sched_add(s, &a.slot);
	n = millm_sched_plan(s, items);
	millm_sched_done(s, items, n, 100 * token_ms);
	a.slot.n_tokens++;
	millm_sched_add(s, &b.slot);
	for (*n_steps = 0; b.slot.n_past < 8192; (*n_steps)++)
	{
		double		ms;

		n = millm_sched_plan(s, items);
		check_plan(items, n, 1024);
		assert_ptr_equal(items[0].slot, &a.slot);	/* goes on at each step */
		ms = step_ms(items, n, decode_ms, token_ms);
		if (*n_steps > 15)
			longest = ms > longest ? ms : longest;
		/* now and then another process takes the CPU */
		millm_sched_done(s, items, n, *n_steps % 50 == 25 ? 5 * ms : ms);
		a.slot.n_tokens++;
	}
	millm_sched_free(s);
	return longest;
}

/* A stream's tokens come at least half as fast while a long prompt is read; answers that are read as a whole give way to steps of 50 ms. */
static void
chunk_follows_time(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, 4, 4, 1024);
	Seq			alone = {.slot.n_tokens = 200000, .goal = 1000000};
	MillmPlanItem items[4];
	int			n_steps;
	int			n_stream_steps;

	(void) state;
	millm_sched_add(s, &alone.slot);
	for (int i = 0; i < 2; i++)
	{
		assert_int_equal(millm_sched_plan(s, items), 1);
		assert_int_equal(items[0].n_tokens, i == 0 ? 256 : 1024);	/* unless it is known that they are fast */
		millm_sched_done(s, items, 1, items[0].n_tokens * 0.1);
	}
	millm_sched_free(s);

	assert_true(longest_step(true, 20, 1, &n_stream_steps) <= 1.3 * 2 * 20);
	assert_true(longest_step(false, 20, 1, &n_steps) <= 1.3 * (50 + 20));
	assert_true(n_steps < n_stream_steps);
	/* a model for which 50 ms are less than a token's time, and one that is faster than anybody reads */
	assert_true(longest_step(false, 200, 5, &n_steps) <= 1.3 * 2 * 200);
	assert_true(longest_step(true, 0.2, 0.05, &n_stream_steps) <= 1.3 * (0.2 + 4));
	assert_true(n_stream_steps < 8192 / 16);
}

/*
 * Prefill has a cost of its own in a step, however small the chunk: other kernels, a machine that is busy.  Beside answers that are read as a whole no chunk
 * gets so small that only this cost is paid, or the sequences that wait would never fill the batch.
 */
static void
small_chunks_do_not_pay(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, 4, 4, 1024);
	Seq			a = {.slot.n_tokens = 1, .goal = 1000000};
	Seq			b = {.slot.n_tokens = 4096, .goal = 4097};
	MillmPlanItem items[4];
	int			n_steps;

	(void) state;
	millm_sched_add(s, &a.slot);
	for (n_steps = 0; n_steps < 3; n_steps++, a.slot.n_tokens++)
		millm_sched_done(s, items, millm_sched_plan(s, items), 20);
	millm_sched_add(s, &b.slot);
	for (n_steps = 0; b.slot.n_past < 4096 && n_steps < 1000; n_steps++, a.slot.n_tokens++)
	{
		const int	n = millm_sched_plan(s, items);

		check_plan(items, n, 1024);
		millm_sched_done(s, items, n, step_ms(items, n, n > 1 ? 20 + 400 : 20, 1));
	}
	assert_true(n_steps <= 4096 / 8 * 17 / 16 + 2);	/* decode tokens alone are measured now and then */
	millm_sched_free(s);
}

/* Short prompts do not wait for the end of a long one before them, which goes on at half its speed at least, and at its full one where nobody waits. */
static void
long_prompt_shares(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, 4, 4, 64);
	Seq			whole = {.slot.n_tokens = 10000, .goal = 10001};
	Seq			brief[2] = {{.slot.n_tokens = 20, .goal = 21, .number = 1}, {.slot.n_tokens = 20, .goal = 21, .number = 2}};
	MillmPlanItem items[4];
	int			n;

	(void) state;
	millm_sched_add(s, &whole.slot);
	assert_int_equal(millm_sched_plan(s, items), 1);
	assert_int_equal(items[0].n_tokens, 64);
	finish_step(s, items, 1);
	for (int i = 0; i < 2; i++)
		millm_sched_add(s, &brief[i].slot);
	n = millm_sched_plan(s, items);
	check_plan(items, n, 64);
	assert_int_equal(n, 3);
	assert_ptr_equal(items[0].slot, &whole.slot);
	assert_int_equal(items[0].n_tokens, 32);
	assert_int_equal(items[1].n_tokens, 20);
	assert_int_equal(items[2].n_tokens, 12);
	finish_step(s, items, n);
	n = millm_sched_plan(s, items);
	check_plan(items, n, 64);
	assert_true(items[n - 1].slot == &brief[1].slot && items[n - 1].n_tokens == 8);
	assert_int_equal(items[n - 2].n_tokens, 64 - 8);
	finish_step(s, items, n);
	millm_sched_free(s);
}

/* So it is where a step could hold all of the long one, but has room for a part of it beside a stream. */
static void
large_batch_shares(void **state)
{
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, 4, 4, 2048);
	Seq			stream = {.slot = {.n_tokens = 10, .is_stream = true}, .goal = 1000000};
	Seq			whole = {.slot.n_tokens = 2000, .goal = 2001, .number = 1};
	Seq			brief = {.slot.n_tokens = 50, .goal = 51, .number = 2};
	MillmPlanItem items[4];
	int			n_steps = 0;

	(void) state;
	/* a prefill token takes 1 ms, a decode token 50 */
	millm_sched_add(s, &stream.slot);
	millm_sched_done(s, items, millm_sched_plan(s, items), 10);
	stream.slot.n_tokens++;
	millm_sched_done(s, items, millm_sched_plan(s, items), 50);
	millm_sched_add(s, &whole.slot);
	millm_sched_add(s, &brief.slot);
	for (; brief.slot.n_past < 50; n_steps++)
	{
		stream.slot.n_tokens++;
		const int	n = millm_sched_plan(s, items);

		check_plan(items, n, 2048);
		assert_true(n_steps < 3);
		millm_sched_done(s, items, n, step_ms(items, n, 50, 1));
	}
	assert_in_range(whole.slot.n_past, 40, 250);
	millm_sched_free(s);
}

/* A step of prompts only may be as large as the batch, if that does not take long. */
static void
lone_step_ends_soon(void **state)
{
	static const struct
	{
		double		token_ms;
		int			expected;	/* tokens */
	}			cases[] = {{0.01, 2048}, {0.5, 500}, {1, 256}, {20, 256}};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
	{
		Pool		pool;
		MillmScheduler *s = create(&pool, 100000, 4, 4, 2048);
		Seq			a = {.slot.n_tokens = 10000, .goal = 10001};
		MillmPlanItem items[4];

		millm_sched_add(s, &a.slot);
		assert_int_equal(millm_sched_plan(s, items), 1);
		assert_int_equal(items[0].n_tokens, 256);	/* nothing is measured */
		millm_sched_done(s, items, 1, 256 * cases[i].token_ms);
		assert_int_equal(millm_sched_plan(s, items), 1);
		assert_int_equal(items[0].n_tokens, cases[i].expected);
		millm_sched_free(s);
	}
}

/*
 * The first step of a machine that was just started says little, and so do a few tokens: as soon as a step at least as large has cost less a token, that counts.
 * What small ones cost more says nothing against it, and so the next long prompt has the room that its steps need.
 */
static void
larger_steps_count(void **state)
{
	static const struct
	{
		int			n_tokens;
		double		token_ms;
		int			next;		/* tokens that the next step has room for */
	}			steps[] = {{256, 5, 256}, {256, 0.5, 500}, {500, 0.2, 1250}, {20, 3, 1250}, {128, 1, 1250}, {600, 1, 1250}, {700, 1, 1000}, {1000, 0.1, 2048}};
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, 4, 4, 2048);
	MillmPlanItem items[4];

	(void) state;
	for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
	{
		Seq			a = {.slot.n_tokens = steps[i].n_tokens, .goal = 10000};
		Seq			long_one = {.slot.n_tokens = 10000, .goal = 10001};

		millm_sched_add(s, &a.slot);
		assert_int_equal(millm_sched_plan(s, items), 1);
		assert_int_equal(items[0].n_tokens, steps[i].n_tokens);
		millm_sched_done(s, items, 1, steps[i].n_tokens * steps[i].token_ms);
		millm_sched_remove(s, &a.slot);
		millm_sched_add(s, &long_one.slot);
		assert_int_equal(millm_sched_plan(s, items), 1);
		assert_int_equal(items[0].n_tokens, steps[i].next);
		millm_sched_remove(s, &long_one.slot);
	}
	millm_sched_free(s);
}

/* A scheduler that knows how little a token of prefill takes: its steps may have 1,600, and some more to end one. */
static MillmScheduler *
create_fast(Pool *pool, int max_running)
{
	MillmScheduler *s = create(pool, 100000, max_running, max_running, 2048);
	Seq			first = {.slot.n_tokens = 256, .goal = 257};
	MillmPlanItem items[1];

	millm_sched_add(s, &first.slot);
	assert_int_equal(millm_sched_plan(s, items), 1);
	millm_sched_done(s, items, 1, 40);
	millm_sched_remove(s, &first.slot);
	return s;
}

/* Of those of whom all rows are wanted only so many tokens go into a step, of the first ones in line each some; others fill it. */
static void
few_rows_are_wanted(void **state)
{
	Pool		pool;
	MillmScheduler *s = create_fast(&pool, 8);
	Seq			scored[4] = {0};
	Seq			last = {.slot.n_tokens = 1000, .goal = 1001, .number = 4};
	MillmPlanItem items[8];
	int			n;

	(void) state;
	for (int i = 0; i < 4; i++)
	{
		scored[i] = (Seq) {.slot = {.n_tokens = 500, .wants_rows = true}, .goal = 501, .number = i};
		millm_sched_add(s, &scored[i].slot);
	}
	millm_sched_add(s, &last.slot);
	for (int n_steps = 0; last.slot.n_past < 1000 || scored[3].slot.n_past < 500; n_steps++)
	{
		int			rows = 0;

		assert_true(n_steps <= 8);	/* 4 x 500 of 256 a step */
		n = millm_sched_plan(s, items);
		check_plan(items, n, 2048);
		for (int i = 0; i < n; i++)
			rows += items[i].slot->wants_rows ? items[i].n_tokens : 0;
		assert_true(rows <= MILLM_SCHED_ROWS);
		if (n_steps == 0)
		{
			assert_true(n > 2 && items[1].slot == &scored[1].slot);
			assert_true(items[n - 1].slot == &last.slot && items[n - 1].n_tokens == 1000);
		}
		for (int i = 0; i < n; i++)
			if (items[i].slot->n_past + items[i].n_tokens == items[i].slot->n_tokens)
				items[i].slot->is_paused = true;	/* whose turn has ended */
		millm_sched_done(s, items, n, 1);
	}
	millm_sched_free(s);
}

/* Of many of them, those who would have no row of a step take no seat in it, and who wants none goes before them. */
static void
no_seats_without_rows(void **state)
{
	Pool		pool;
	MillmScheduler *s = create_fast(&pool, 16);
	Seq			scored[16] = {0};
	Seq			first = {.slot.n_tokens = 50, .goal = 51, .number = 16};
	Seq			last = {.slot.n_tokens = 100, .goal = 101, .number = 17};
	MillmPlanItem items[16];
	int			rows = 0;
	int			n;

	(void) state;
	millm_sched_add(s, &first.slot);
	for (int i = 0; i < 16; i++)
	{
		scored[i] = (Seq) {.slot = {.n_tokens = 500, .wants_rows = true}, .goal = 501, .number = i};
		millm_sched_add(s, &scored[i].slot);
	}
	millm_sched_add(s, &last.slot);
	n = millm_sched_plan(s, items);
	check_plan(items, n, 2048);
	assert_true(items[0].slot == &first.slot && items[0].n_tokens == 50);
	assert_true(items[n - 1].slot == &last.slot && items[n - 1].n_tokens == 100);
	assert_int_equal(millm_sched_n_running(s), n);
	assert_int_equal(items[1].n_tokens, MILLM_SCHED_ROWS / 2);	/* the others have the other half */
	for (int i = 1; i < n - 1; i++)
		rows += items[i].n_tokens;
	assert_int_equal(rows, MILLM_SCHED_ROWS);
	millm_sched_free(s);
}

/* Prompts that share a step: the last of them is not cut for a few tokens, but never is the batch larger than it may be. */
static void
last_prompt_is_whole(void **state)
{
	static const struct
	{
		int			second, max_batch, expected;	/* tokens */
	}			cases[] = {{25, 512, 25}, {36, 512, 36}, {37, 512, 20}, {36, 60, 20}, {25, 60, 25}};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
	{
		Pool		pool;
		MillmScheduler *s = create(&pool, 100000, 4, 4, cases[i].max_batch);
		Seq			a = {.slot.n_tokens = 30, .goal = 1000000};
		Seq			b = {.slot.n_tokens = 30, .goal = 31};
		Seq			c = {.slot.n_tokens = cases[i].second, .goal = 100};
		MillmPlanItem items[4];
		int			n;

		/* a prefill token takes 1 ms, a decode token 20: beside it there is room for 50 */
		millm_sched_add(s, &a.slot);
		millm_sched_done(s, items, millm_sched_plan(s, items), 30);
		a.slot.n_tokens++;
		millm_sched_done(s, items, millm_sched_plan(s, items), 20);
		a.slot.n_tokens++;
		millm_sched_add(s, &b.slot);
		millm_sched_add(s, &c.slot);
		n = millm_sched_plan(s, items);
		check_plan(items, n, cases[i].max_batch);
		assert_int_equal(n, 3);
		assert_int_equal(items[1].n_tokens, 30);
		assert_int_equal(items[2].n_tokens, cases[i].expected);
		millm_sched_free(s);
	}
}

/* Steps with drafts take longer and bring more: they say nothing of what a decode token takes, and so nothing of what may be computed beside it. */
static void
drafts_are_not_measured(void **state)
{
	int			n_tokens[2];

	(void) state;
	for (int drafts = 0; drafts < 2; drafts++)
	{
		Pool		pool;
		MillmScheduler *s = create(&pool, 100000, 4, 4, 512);
		Seq			a = {.slot = {.n_tokens = 30, .is_stream = true}, .goal = 1000000};
		Seq			b = {.slot.n_tokens = 1000, .goal = 1001};
		MillmPlanItem items[4];

		/* a prefill token takes 1 ms, a decode token 20 */
		millm_sched_add(s, &a.slot);
		millm_sched_done(s, items, millm_sched_plan(s, items), 30);
		a.slot.n_tokens++;
		millm_sched_done(s, items, millm_sched_plan(s, items), 20);
		for (int i = 0; i < 10 && drafts; i++)
		{
			a.slot.n_tokens++;
			assert_int_equal(millm_sched_plan(s, items), 1);
			assert_int_equal(items[0].n_drafted, 0);
			items[0].n_drafted = 3;
			millm_sched_done(s, items, 1, 100);
			a.slot.n_tokens += 2;	/* accepted */
			a.slot.n_past += 2;
		}
		a.slot.n_tokens++;
		millm_sched_add(s, &b.slot);
		assert_int_equal(millm_sched_plan(s, items), 2);
		n_tokens[drafts] = items[1].n_tokens;
		millm_sched_free(s);
	}
	assert_int_equal(n_tokens[1], n_tokens[0]);
}

/* Where nobody decodes yet, a few streams begin together and the others after them; answers that are read as a whole fill the batch. */
static void
few_streams_begin(void **state)
{
	(void) state;
	for (int is_stream = 0; is_stream < 2; is_stream++)
	{
		Pool		pool;
		MillmScheduler *s = create(&pool, 100000, 8, 8, 64);
		Seq			q[8] = {0};
		MillmPlanItem items[8];

		for (int i = 0; i < 8; i++)
		{
			q[i] = (Seq) {.slot = {.n_tokens = 8, .is_stream = is_stream}, .goal = 100};
			assert_true(millm_sched_add(s, &q[i].slot));
		}
		assert_int_equal(millm_sched_plan(s, items), is_stream ? 4 : 8);
		check_plan(items, is_stream ? 4 : 8, 64);
		millm_sched_free(s);
	}
}

static int
by_size(const void *a, const void *b)
{
	const double x = *(const double *) a - *(const double *) b;

	return x < 0 ? -1 : x > 0;
}

typedef struct Served
{
	double	   *first;			/* [n]: milliseconds to the first token */
	int			n;
	double		ms, least_ms;	/* all steps, and their tokens alone */
	int			n_late, n_steps;
} Served;

/*
 * Sessions that begin at once, or all but the first while its first step runs, and ask for short answers, each the next one when it has the last, on a
 * machine that is noisy and where a step has a cost of its own.
 */
static void
serve(Served *served, int n_requests, bool at_once, uint32_t random)
{
	enum {SESSIONS = 32, PROMPT = 30, TOKENS = 24};
	const double decode_ms = 1,
				prefill_ms = 0.6;	/* a token */
	const int	n = served->n + n_requests;
	Pool		pool;
	MillmScheduler *s = create(&pool, 100000, SESSIONS, SESSIONS, 512);
	Seq			seq[SESSIONS] = {0};
	bool		has_come[SESSIONS];
	double		asked[SESSIONS] = {0};
	double		now = 0;

	for (int i = 0; i < SESSIONS; i++)
	{
		seq[i] = (Seq) {.slot = {.n_tokens = PROMPT, .is_stream = true}, .goal = PROMPT + TOKENS, .number = i};
		has_come[i] = (at_once || i == 0) && millm_sched_add(s, &seq[i].slot);
	}
	for (; served->n < n; served->n_steps++)
	{
		MillmPlanItem items[SESSIONS];
		const int	n_items = millm_sched_plan(s, items);
		int			n_decode = 0,
					n_prefill = 0;
		double		speed,
					ms;

		check_plan(items, n_items, 512);
		assert_true(n_items > 0);
		/* who comes while a step runs takes part in the next */
		for (int i = 0; i < SESSIONS; i++)
			if (!has_come[i])
				has_come[i] = millm_sched_add(s, &seq[i].slot);
		for (int i = 0; i < n_items; i++)
			if (items[i].slot->n_tokens - items[i].slot->n_past == 1)
				n_decode++;
			else
				n_prefill += items[i].n_tokens;
		random = random * 1664525 + 1013904223;
		/* now and then somebody else's work takes a part of the machine for seconds */
		speed = (0.8 + 0.4 * (random >> 16) / 65536.0) * ((int64_t) now % 50000 > 45000 ? 1.5 : 1);
		served->least_ms += speed * (n_decode * decode_ms + n_prefill * prefill_ms);
		ms = speed * (4 + n_decode * decode_ms + (n_prefill > 0 ? 2 + n_prefill * prefill_ms : 0));
		now += ms;
		served->n_late += n_decode > 0 && ms > 1.3 * (4 + n_decode * decode_ms + 100);
		millm_sched_done(s, items, n_items, ms);
		for (int i = 0; i < n_items; i++)
		{
			Seq		   *q = (Seq *) items[i].slot;

			if (q->slot.n_past < q->slot.n_tokens)
				continue;
			if (q->slot.n_tokens == PROMPT && served->n < n)
				served->first[served->n++] = now - asked[q->number];
			if (++q->slot.n_tokens < q->goal)
				continue;
			millm_sched_remove(s, &q->slot);
			q->slot.n_tokens = PROMPT;
			asked[q->number] = now;
			assert_true(millm_sched_add(s, &q->slot));
		}
	}
	served->ms += now;
	millm_sched_free(s);
}

/*
 * The batch fills, so that little is paid for steps; the slowest of a hundred sees the first token in at most three times the median; nobody who reads waits
 * much longer than for his own token and a step's worth of others' prompts.
 */
static void
many_sessions(void **state)
{
	enum {RUNS = 4, REQUESTS = 32 * 100};
	static double first[RUNS * REQUESTS];

	(void) state;
	for (int at_once = 0; at_once < 2; at_once++)
	{
		Served		served = {.first = first};

		for (uint32_t run = 1; run <= RUNS; run++)
			serve(&served, REQUESTS, at_once, run);
		assert_true(served.ms < 1.1 * served.least_ms);
		qsort(first, RUNS * REQUESTS, sizeof(first[0]), by_size);
		assert_true(first[RUNS * REQUESTS * 99 / 100] <= 3 * first[RUNS * REQUESTS / 2]);
		assert_true(served.n_late < served.n_steps / 20);
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(decode_goes_first), cmocka_unit_test(canceled_step), cmocka_unit_test(limits),
		cmocka_unit_test(no_overtaking), cmocka_unit_test(preempts_the_youngest), cmocka_unit_test(shared_beginning), cmocka_unit_test(storm),
		cmocka_unit_test(roles_take_turns), cmocka_unit_test(nobody_has_a_turn_twice), cmocka_unit_test(bounded_waiting),
		cmocka_unit_test(chunk_follows_time), cmocka_unit_test(small_chunks_do_not_pay),
		cmocka_unit_test(long_prompt_shares), cmocka_unit_test(large_batch_shares), cmocka_unit_test(lone_step_ends_soon),
		cmocka_unit_test(larger_steps_count), cmocka_unit_test(few_rows_are_wanted), cmocka_unit_test(no_seats_without_rows),
		cmocka_unit_test(last_prompt_is_whole),
		cmocka_unit_test(drafts_are_not_measured), cmocka_unit_test(few_streams_begin), cmocka_unit_test(many_sessions),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
