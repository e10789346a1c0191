/*
 * kv.c -- page tables, reference counts, copy-on-write.
 *
 * Owns:     the free list, the counts, every sequence's table.
 * Borrows:  copy_page, which moves the bytes.
 * Does not: know what a page holds, or when to preempt somebody for one.
 *
 * Invariants (millm_kv_check()):
 *	 - a page's count is the number of tables it is in; pages with count 0 are exactly the free list
 *	 - a table has at least the pages of its sequence's length
 *	 - pages past that length (reserved ahead) are in one table only
 *	 - of a table only pages at its beginning are missing, none of which the sequence's next position sees in that group
 */
#include "kv.h"

#include <stdlib.h>
#include <string.h>

#include "arith.h"

static int
pages_of(int length)
{
	return (int) (((int64_t) length + MILLM_KV_PAGE_TOKENS - 1) / MILLM_KV_PAGE_TOKENS);
}

static int
greatest_common_divisor(int a, int b)
{
	while (b > 0)
	{
		int			rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

void
millm_kv_layout(MillmKvLayout *layout, const int *windows, int n_layers)
{
	int			per_page = 0;

	for (int i = 0; i < n_layers; i++)
	{
		int			n_alike = 0;

		for (int j = 0; j < n_layers; j++)
			n_alike += windows[j] == windows[i];
		per_page = greatest_common_divisor(n_alike, per_page);
	}
	layout->layers_per_page = per_page;
	layout->n_groups = 0;
	for (int i = 0; i < n_layers; i++)
	{
		int			n_before = 0;
		int			last = -1;

		for (int j = 0; j < i; j++)
			if (windows[j] == windows[i])
			{
				n_before++;
				last = layout->groups[j];
			}
		layout->places[i] = n_before % per_page;
		layout->groups[i] = layout->places[i] > 0 ? last : layout->n_groups++;
		layout->windows[layout->groups[i]] = windows[i];
	}
}

int64_t
millm_kv_pages(const MillmKvLayout *layout, int length, int step)
{
	const int64_t all = pages_of(length);
	int64_t		n = 0;

	for (int g = 0; g < layout->n_groups; g++)
	{
		/* from the first page that position L sees, unseen_pages(L), to that of position L + step - 1, wherever L is */
		const int64_t seen = ((int64_t) layout->windows[g] + step + 2 * MILLM_KV_PAGE_TOKENS - 3) / MILLM_KV_PAGE_TOKENS;

		n += layout->windows[g] > 0 && seen < all ? seen : all;
	}
	return n;
}

MillmCode
millm_kv_init(MillmKvPool *pool, int64_t n_pages, const int *windows, int n_groups, int step,
			  void (*copy_page) (void *arg, int32_t dst, int32_t src), void *arg, MillmError *err)
{
	memset(pool, 0, sizeof(*pool));
	if (n_pages < 1 || n_pages > INT32_MAX / MILLM_KV_PAGE_TOKENS)	/* so that a length fits an int */
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid number of KV pages: %lld", (long long) n_pages);
	pool->free_pages = calloc((size_t) n_pages, sizeof(*pool->free_pages));
	pool->references = calloc((size_t) n_pages, sizeof(*pool->references));
	if (!pool->free_pages || !pool->references)
	{
		millm_kv_reset(pool);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory for the tables of %lld KV pages", (long long) n_pages);
	}
	pool->n_pages = pool->n_free = (int32_t) n_pages;
	for (int32_t i = 0; i < pool->n_pages; i++)
		pool->free_pages[i] = pool->n_pages - 1 - i;	/* page 0 is taken first */
	pool->windows = windows;
	pool->n_groups = n_groups;
	pool->step = step;
	pool->copy_page = copy_page;
	pool->arg = arg;
	return MILLM_OK;
}

void
millm_kv_reset(MillmKvPool *pool)
{
	free(pool->free_pages);
	free(pool->references);
	memset(pool, 0, sizeof(*pool));
}

static int32_t
take_page(MillmKvPool *pool)
{
	int32_t		page = pool->free_pages[--pool->n_free];

	pool->references[page] = 1;
	return page;
}

static void
drop_page(MillmKvPool *pool, int32_t page)
{
	if (--pool->references[page] == 0)
		pool->free_pages[pool->n_free++] = page;
}

static bool
grow_table(MillmPageTable *table, int n_pages)
{
	int32_t    *pages;
	int			capacity = n_pages + n_pages / 2 + 8;

	if (n_pages <= table->capacity)
		return true;
	if (!(pages = realloc(table->pages, (size_t) capacity * sizeof(*pages))))
		return false;
	table->pages = pages;
	table->capacity = capacity;
	return true;
}

/* Pages at the beginning that a position does not see through a window. */
static int
unseen_pages(int window, int position)
{
	return window > 0 && position >= window ? (position - window + 1) / MILLM_KV_PAGE_TOKENS : 0;
}

void
millm_kv_pass(MillmSequence *seq)
{
	for (int g = 0; g < seq->pool->n_groups; g++)
	{
		MillmPageTable *table = &seq->tables[g];
		int			n = unseen_pages(seq->pool->windows[g], seq->length);

		for (; table->n_passed < n; table->n_passed++)
		{
			drop_page(seq->pool, table->pages[table->n_passed]);
			table->pages[table->n_passed] = -1;
		}
	}
}

/* Is the page of position length there, begun, and somebody else's too? */
static bool
must_copy(const MillmSequence *seq, int group)
{
	const MillmPageTable *table = &seq->tables[group];

	return seq->length % MILLM_KV_PAGE_TOKENS != 0 &&
		seq->pool->references[table->pages[seq->length / MILLM_KV_PAGE_TOKENS]] > 1;
}

MillmSequence *
millm_kv_create(MillmKvPool *pool)
{
	MillmSequence *seq = calloc(1, sizeof(*seq) + (size_t) pool->n_groups * sizeof(seq->tables[0]));

	if (!seq)
		return NULL;
	seq->pool = pool;
	seq->next = pool->sequences;
	if (seq->next)
		seq->next->previous = seq;
	pool->sequences = seq;
	return seq;
}

void
millm_sequence_free(MillmSequence *seq)
{
	if (!seq)
		return;
	millm_sequence_truncate(seq, 0);
	for (int g = 0; g < seq->pool->n_groups; g++)
		free(seq->tables[g].pages);
	if (seq->next)
		seq->next->previous = seq->previous;
	if (seq->previous)
		seq->previous->next = seq->next;
	else
		seq->pool->sequences = seq->next;
	free(seq);
}

MillmSequence *
millm_sequence_fork(MillmSequence *seq)
{
	MillmSequence *copy = millm_kv_create(seq->pool);
	int			n = pages_of(seq->length);	/* not what was reserved ahead: that is going to be written */

	if (!copy)
		return NULL;
	for (int g = 0; g < seq->pool->n_groups; g++)
	{
		MillmPageTable *table = &copy->tables[g];

		if (!grow_table(table, n))
		{
			millm_sequence_free(copy);
			return NULL;
		}
		for (int i = 0; i < n; i++)
		{
			table->pages[i] = seq->tables[g].pages[i];
			if (table->pages[i] >= 0)
				seq->pool->references[table->pages[i]]++;
		}
		table->n_pages = n;
		table->n_passed = seq->tables[g].n_passed;
	}
	copy->length = seq->length;
	copy->planned_length = seq->planned_length;
	return copy;
}

int
millm_sequence_length(const MillmSequence *seq)
{
	return seq->length;
}

void
millm_sequence_truncate(MillmSequence *seq, int length)
{
	if (length < 0)
		length = 0;
	for (int g = 0; g < seq->pool->n_groups; g++)
		if (length < seq->length && unseen_pages(seq->pool->windows[g], length) < seq->tables[g].n_passed)
			length = 0;
	if (length < seq->length)
		seq->length = length;
	for (int g = 0; g < seq->pool->n_groups; g++)
	{
		MillmPageTable *table = &seq->tables[g];

		while (table->n_pages > pages_of(length))
			if (--table->n_pages >= table->n_passed)
				drop_page(seq->pool, table->pages[table->n_pages]);
		if (length == 0)
			table->n_passed = 0;
	}
}

/* Pages that a group's table shall have to make room up to length: all, or with a window those of the next step. */
static int
wanted_pages(const MillmSequence *seq, int group, int length)
{
	if (seq->pool->windows[group] > 0 && length - seq->length > seq->pool->step)
		length = seq->length + seq->pool->step;
	return pages_of(length);
}

bool
millm_sequence_reserve(MillmSequence *seq, int length)
{
	MillmKvPool *pool = seq->pool;
	int64_t		n_needed = 0;

	if (length <= seq->length)
		return true;
	for (int g = 0; g < pool->n_groups; g++)
	{
		int			n = wanted_pages(seq, g, length);

		if (n > seq->tables[g].n_pages)
			n_needed += n - seq->tables[g].n_pages;
		n_needed += must_copy(seq, g);
	}
	if (n_needed > pool->n_free)
		return false;
	for (int g = 0; g < pool->n_groups; g++)
		if (!grow_table(&seq->tables[g], wanted_pages(seq, g, length)))
			return false;

	for (int g = 0; g < pool->n_groups; g++)
	{
		MillmPageTable *table = &seq->tables[g];
		int			n = wanted_pages(seq, g, length);

		if (must_copy(seq, g))
		{
			int32_t    *mine = &table->pages[seq->length / MILLM_KV_PAGE_TOKENS];
			int32_t		page = take_page(pool);

			pool->copy_page(pool->arg, page, *mine);
			drop_page(pool, *mine);
			*mine = page;
		}
		while (table->n_pages < n)
			table->pages[table->n_pages++] = take_page(pool);
	}
	return true;
}

bool
millm_kv_has_room(const MillmSequence *seq, int length)
{
	for (int g = 0; g < seq->pool->n_groups; g++)
		if (pages_of(length) > seq->tables[g].n_pages || (length > seq->length && must_copy(seq, g)))
			return false;
	return true;
}

MillmCode
millm_kv_check(const MillmKvPool *pool, MillmError *err)
{
	int32_t    *counts = calloc((size_t) pool->n_pages, sizeof(*counts));
	MillmCode	rc = MILLM_OK;

	if (!counts)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (const MillmSequence *seq = pool->sequences; seq; seq = seq->next)
		for (int g = 0; g < pool->n_groups; g++)
		{
			const MillmPageTable *table = &seq->tables[g];

			if (table->n_pages < pages_of(seq->length))
				rc = millm_fail(err, MILLM_E_INTERNAL, "a sequence of %d positions has %d KV pages", seq->length, table->n_pages);
			if (table->n_passed > unseen_pages(pool->windows[g], seq->length))
				rc = millm_fail(err, MILLM_E_INTERNAL, "a sequence of %d positions has given %d KV pages back", seq->length, table->n_passed);
			for (int i = 0; i < table->n_pages; i++)
			{
				if ((table->pages[i] < 0) != (i < table->n_passed))
					rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d of a table is missing, of which %d are", i, table->n_passed);
				if (table->pages[i] < 0)
					continue;
				counts[table->pages[i]]++;
				if (i >= pages_of(seq->length) && pool->references[table->pages[i]] != 1)
					rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is reserved ahead and shared", table->pages[i]);
			}
		}
	for (int32_t i = 0; i < pool->n_free; i++)
		if (counts[pool->free_pages[i]]-- != 0)	/* -1: seen in the list */
			rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is free and in use, or free twice", pool->free_pages[i]);
	for (int32_t i = 0; i < pool->n_pages; i++)
		if ((counts[i] == -1 ? 0 : counts[i]) != pool->references[i] || counts[i] == 0)
			rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is in %d tables and counts %d references", i, counts[i], pool->references[i]);
	free(counts);
	return rc;
}
