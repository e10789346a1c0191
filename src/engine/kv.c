/*
 * kv.c -- page tables, reference counts, copy-on-write; what is shared through the prefix cache.
 *
 * Owns:     the free list, the counts, every sequence's table, the prefix cache.
 * Borrows:  copy_page, which moves the bytes.
 * Does not: know what a page holds, or when to preempt somebody for one.
 *
 * A sequence that shares stands at a place of the cache, and walks on whenever it has filled a page: what nobody had computed before becomes
 * the cache's, too; what somebody had, becomes the sequence's, and its own page is free.  So of one text there is one copy, and
 * a sequence holds what it stands on.  Of a group with a window it is cached before it passes, so that others can begin in the middle of the text.
 *
 * A beginning is usable up to a page's end where each group has the pages that the position after it sees: all, or those in its window.
 *
 * Invariants (millm_kv_check()):
 *	 - a page's count is the number of tables it is in, and one more when it is cached; pages with count 0 are exactly the free list
 *	 - the full pages of a sequence that shares are those of the node that it stands at and of its ancestors
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
millm_kv_init(MillmKvPool *pool, int64_t n_pages, const int *windows, int n_groups, int step, bool caches,
			  void (*copy_page) (void *arg, int32_t dst, int32_t src), void *arg, MillmError *err)
{
	memset(pool, 0, sizeof(*pool));
	if (n_pages < 1 || n_pages > INT32_MAX / MILLM_KV_PAGE_TOKENS)	/* so that a length fits an int */
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid number of KV pages: %lld", (long long) n_pages);
	pool->free_pages = calloc((size_t) n_pages, sizeof(*pool->free_pages));
	pool->references = calloc((size_t) n_pages, sizeof(*pool->references));
	if (caches)
		pool->prefix = millm_prefix_create((int32_t) n_pages, n_groups);
	if (!pool->free_pages || !pool->references || (caches && !pool->prefix))
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
	millm_prefix_free(pool->prefix);
	memset(pool, 0, sizeof(*pool));
}

int32_t
millm_kv_n_free(const MillmKvPool *pool)
{
	return pool->n_free + (pool->prefix ? millm_prefix_n_resting(pool->prefix) : 0);
}

static bool
is_cached(const MillmKvPool *pool, int32_t page)
{
	return pool->prefix && millm_prefix_has(pool->prefix, page);
}

/* The page that the cache misses least becomes free; false when it has none to give. */
static bool
evict_page(MillmKvPool *pool)
{
	const int32_t page = pool->prefix ? millm_prefix_evict(pool->prefix) : -1;

	if (page < 0)
		return false;
	pool->references[page] = 0;
	pool->free_pages[pool->n_free++] = page;
	return true;
}

/* One of the millm_kv_n_free(). */
static int32_t
take_page(MillmKvPool *pool)
{
	int32_t		page;

	if (pool->n_free == 0)
		evict_page(pool);
	page = pool->free_pages[--pool->n_free];
	pool->references[page] = 1;
	return page;
}

/* A page that is somebody's or the cache's gets into one more table. */
static int32_t
share_page(MillmKvPool *pool, int32_t page)
{
	if (pool->references[page]++ == 1 && is_cached(pool, page))
		millm_prefix_wake(pool->prefix, page);
	return page;
}

static void
drop_page(MillmKvPool *pool, int32_t page)
{
	if (--pool->references[page] == 0)
		pool->free_pages[pool->n_free++] = page;
	else if (pool->references[page] == 1 && is_cached(pool, page))
		millm_prefix_rest(pool->prefix, page);
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
			if (table->pages[table->n_passed] >= 0)	/* or a shared beginning did not bring it */
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
	millm_sequence_truncate(seq, 0);	/* which leaves it before the first page */
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
				share_page(seq->pool, table->pages[i]);
		}
		table->n_pages = n;
		table->n_passed = seq->tables[g].n_passed;
	}
	copy->length = seq->length;
	copy->planned_length = seq->planned_length;
	copy->rotation = seq->rotation;
	copy->is_shared = seq->is_shared;
	copy->place = seq->place;
	memcpy(copy->begun, seq->begun, sizeof(copy->begun));
	if (copy->is_shared)
		millm_prefix_enter(copy->pool->prefix, copy->place);
	return copy;
}

int
millm_sequence_length(const MillmSequence *seq)
{
	return seq->length;
}

/* Drop all pages but the first n of each group, from the end: the cache forgets in that order. */
static void
cut_tables(MillmSequence *seq, int n)
{
	int			most = 0;

	for (int g = 0; g < seq->pool->n_groups; g++)
		most = seq->tables[g].n_pages > most ? seq->tables[g].n_pages : most;
	for (int i = most - 1; i >= n; i--)
		for (int g = 0; g < seq->pool->n_groups; g++)
		{
			MillmPageTable *table = &seq->tables[g];

			if (i >= table->n_pages)
				continue;
			table->n_pages = i;
			if (i >= table->n_passed)
				drop_page(seq->pool, table->pages[i]);
		}
}

static void
move_to(MillmSequence *seq, int32_t place)
{
	const int32_t before = seq->place;

	seq->place = place;
	millm_prefix_enter(seq->pool->prefix, place);
	millm_prefix_leave(seq->pool->prefix, before);
}

void
millm_sequence_truncate(MillmSequence *seq, int length)
{
	if (length < 0)
		length = 0;
	for (int g = 0; g < seq->pool->n_groups; g++)
		if (length < seq->length && unseen_pages(seq->pool->windows[g], length) < seq->tables[g].n_passed)
			length = 0;
	for (int n = seq->length / MILLM_KV_PAGE_TOKENS; seq->is_shared && n > length / MILLM_KV_PAGE_TOKENS; n--)
	{
		memcpy(seq->begun, millm_prefix_tokens(seq->pool->prefix, seq->place), sizeof(seq->begun));
		move_to(seq, millm_prefix_parent(seq->pool->prefix, seq->place));
	}
	if (length < seq->length)
		seq->length = length;
	cut_tables(seq, pages_of(length));
	for (int g = 0; g < seq->pool->n_groups && length == 0; g++)
		seq->tables[g].n_passed = 0;
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
	if (n_needed > millm_kv_n_free(pool))
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

/* ---- what is shared --------------------------------------------------------------------------- */

/* A node for the page that the sequence has filled; -1: there is no place for one. */
static int32_t
node_of_begun(MillmSequence *seq)
{
	MillmKvPool *pool = seq->pool;
	int32_t		node = millm_prefix_find(pool->prefix, seq->place, seq->begun);

	while (node < 0 && (node = millm_prefix_add(pool->prefix, seq->place, seq->begun)) < 0)
		if (!evict_page(pool))
			return -1;
	return node;
}

/* Its last page is full: it is the cache's, too, or what the cache has takes its place. */
static void
walk_on(MillmSequence *seq)
{
	MillmKvPool *pool = seq->pool;
	const int	at = seq->length / MILLM_KV_PAGE_TOKENS - 1;
	const int32_t node = node_of_begun(seq);

	if (node < 0)
	{
		millm_prefix_leave(pool->prefix, seq->place);
		seq->is_shared = false;
		return;
	}
	for (int g = 0; g < pool->n_groups; g++)
	{
		int32_t    *mine = &seq->tables[g].pages[at];
		int32_t		theirs = millm_prefix_pages(pool->prefix, node)[g];

		if (theirs < 0)
		{
			millm_prefix_put(pool->prefix, node, g, *mine);
			pool->references[*mine]++;
		}
		else
		{
			share_page(pool, theirs);
			drop_page(pool, *mine);
			*mine = theirs;
		}
	}
	move_to(seq, node);
}

void
millm_kv_append(MillmSequence *seq, int32_t token)
{
	seq->begun[seq->length++ % MILLM_KV_PAGE_TOKENS] = token;
	if (seq->is_shared && seq->length % MILLM_KV_PAGE_TOKENS == 0)
		walk_on(seq);
}

void
millm_sequence_accept(MillmSequence *seq, const int32_t *draft, int n)
{
	for (int i = 0; i < n; i++)
		millm_kv_append(seq, draft[i]);
	millm_kv_pass(seq);
}

/*
 * From *place on, which is after n_before pages of tokens [n]: the longest beginning that is usable by somebody who has these pages.  Returns its
 * pages, n_before when there is no longer one; *place is its end.
 */
static int
longest_beginning(const MillmKvPool *pool, int32_t *place, int n_before, const int32_t *tokens, int n)
{
	int			n_in_row[MILLM_MAX_LAYERS] = {0};	/* [n_groups]: pages there are up to here without a gap */
	int			best = n_before;
	int32_t		node = *place;

	for (int i = n_before; i < n / MILLM_KV_PAGE_TOKENS; i++)
	{
		bool		is_usable = true;

		if ((node = millm_prefix_find(pool->prefix, node, tokens + (size_t) i * MILLM_KV_PAGE_TOKENS)) < 0)
			break;
		for (int g = 0; g < pool->n_groups; g++)
		{
			const int	first = unseen_pages(pool->windows[g], (i + 1) * MILLM_KV_PAGE_TOKENS);

			n_in_row[g] = millm_prefix_pages(pool->prefix, node)[g] >= 0 ? n_in_row[g] + 1 : 0;
			is_usable &= i + 1 - n_in_row[g] <= (first > n_before ? first : n_before);
		}
		if (is_usable)
		{
			best = i + 1;
			*place = node;
		}
	}
	return best;
}

int
millm_sequence_share(MillmSequence *seq, const int32_t *tokens, int n)
{
	MillmKvPool *pool = seq->pool;
	const int	n_before = seq->length / MILLM_KV_PAGE_TOKENS;
	int32_t		place;
	int			n_pages;

	if (!pool->prefix || (!seq->is_shared && seq->length > 0))
		return seq->length;
	if (!seq->is_shared)
		seq->place = MILLM_PREFIX_ROOT(seq->rotation);
	seq->is_shared = true;
	place = seq->place;
	n_pages = longest_beginning(pool, &place, n_before, tokens, n);
	for (int g = 0; g < pool->n_groups; g++)
		if (!grow_table(&seq->tables[g], n_pages))
			return seq->length;
	if (n_pages == n_before)
		return seq->length;

	cut_tables(seq, n_before);	/* what was begun, or reserved */
	move_to(seq, place);
	seq->length = n_pages * MILLM_KV_PAGE_TOKENS;
	for (int i = n_pages - 1; i >= n_before; i--, place = millm_prefix_parent(pool->prefix, place))
		for (int g = 0; g < pool->n_groups; g++)
		{
			const int32_t page = millm_prefix_pages(pool->prefix, place)[g];

			seq->tables[g].pages[i] = i >= unseen_pages(pool->windows[g], seq->length) ? share_page(pool, page) : -1;
			seq->tables[g].n_pages = n_pages;
		}
	millm_kv_pass(seq);
	return seq->length;
}

int64_t
millm_kv_held(const MillmKvPool *pool, int rotation, const int32_t *tokens, int n, int length)
{
	int32_t		place = MILLM_PREFIX_ROOT(rotation);
	int64_t		n_held = 0;

	if (!pool->prefix)
		return 0;
	for (int i = longest_beginning(pool, &place, 0, tokens, n); i > 0; i--, place = millm_prefix_parent(pool->prefix, place))
		for (int g = 0; g < pool->n_groups; g++)
			n_held += unseen_pages(pool->windows[g], length) == 0 && pool->references[millm_prefix_pages(pool->prefix, place)[g]] > 1;
	return n_held;
}

/* ---- the check -------------------------------------------------------------------------------- */

/* Is the sequence where it says, and are its full pages those that are cached? */
static MillmCode
check_place(const MillmSequence *seq, int32_t *standing, MillmError *err)
{
	const MillmPrefix *prefix = seq->pool->prefix;
	int32_t		place = seq->place;

	if (place >= 0)
		standing[place]++;
	for (int i = seq->length / MILLM_KV_PAGE_TOKENS - 1; i >= 0 && place >= 0; i--, place = millm_prefix_parent(prefix, place))
		for (int g = 0; g < seq->pool->n_groups; g++)
			if (i >= seq->tables[g].n_passed && seq->tables[g].pages[i] != millm_prefix_pages(prefix, place)[g])
				return millm_fail(err, MILLM_E_INTERNAL, "KV page %d of a sequence that shares is not the cache's", i);
	if (place != MILLM_PREFIX_ROOT(seq->rotation))
		return millm_fail(err, MILLM_E_INTERNAL, "a sequence of %d positions stands at the wrong node", seq->length);
	return MILLM_OK;
}

static MillmCode
check_prefix(const MillmKvPool *pool, MillmError *err)
{
	int32_t    *standing = calloc((size_t) pool->n_pages, sizeof(*standing));
	MillmCode	rc = MILLM_OK;

	if (!standing)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (const MillmSequence *seq = pool->sequences; seq && rc == MILLM_OK; seq = seq->next)
		if (seq->is_shared)
			rc = check_place(seq, standing, err);
	if (rc == MILLM_OK)
		rc = millm_prefix_check(pool->prefix, pool->references, standing, pool->windows, err);
	free(standing);
	return rc;
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
	for (int32_t i = 0; i < pool->n_pages; i++)
		counts[i] += is_cached(pool, i);
	for (int32_t i = 0; i < pool->n_free; i++)
		if (counts[pool->free_pages[i]]-- != 0)	/* -1: seen in the list */
			rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is free and in use, or free twice", pool->free_pages[i]);
	for (int32_t i = 0; i < pool->n_pages; i++)
		if ((counts[i] == -1 ? 0 : counts[i]) != pool->references[i] || counts[i] == 0)
			rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is in %d tables and counts %d references", i, counts[i], pool->references[i]);
	if (rc == MILLM_OK && pool->prefix)
		rc = check_prefix(pool, err);
	free(counts);
	return rc;
}
