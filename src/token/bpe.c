/*
 * bpe.c -- byte-pair encoding of one word.
 *
 * A word starts as its characters (its bytes in a byte-level tokenizer).  Then, again and again, the adjacent
 * pair of lowest rank becomes one symbol, the leftmost of equals first, and the two new neighbours compete at
 * once.  Most words are short: those scan an array of ranks for its first minimum.  The long ones (a megabyte
 * without a space is one word) use a heap over a linked list: O(n log n).
 *
 * Where there is no pre-tokenizer, as with Gemma and Llama 2, all of a text is one word, in which U+2581 stands for a space.  Hardly a
 * piece has that behind anything else, so nothing is ever merged across most of them: such a word is cut there, and its parts are
 * short words.  That is exact: a merge across the cut would make a piece that has both sides of it, and each part's own merges come in
 * the same order.
 */
#include "bpe.h"

#include <stdlib.h>
#include <string.h>

#include "unicode.h"

#define SHORT_WORD 40			/* symbols up to which the scan is faster than the heap */

typedef struct BpeSymbol
{
	int32_t		id;				/* -1: merged into a symbol on its left */
	int32_t		prev;			/* indexes; -1: none */
	int32_t		next;
} BpeSymbol;

typedef struct BpeCandidate
{
	uint64_t	order;			/* rank << 32 | position: the smallest goes first */
	int32_t		id;				/* what the pair would become */
} BpeCandidate;

uint32_t
millm_byte_to_letter(uint8_t b)
{
	if ((b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE)
		return b;
	if (b <= 0x20)
		return 0x100u + b;
	if (b <= 0xA0)
		return 0x121u + (b - 0x7Fu);
	return 0x143;				/* 0xAD */
}

int
millm_letter_to_byte(uint32_t cp)
{
	if ((cp >= 0x21 && cp <= 0x7E) || (cp >= 0xA1 && cp <= 0xAC) || (cp >= 0xAE && cp <= 0xFF))
		return (int) cp;
	if (cp >= 0x100 && cp <= 0x120)
		return (int) (cp - 0x100);
	if (cp >= 0x121 && cp <= 0x142)
		return (int) (cp - 0x121 + 0x7F);
	return cp == 0x143 ? 0xAD : -1;
}

/* ---- merges ---- */

static size_t
hash_pair(uint64_t key)
{
	key *= UINT64_C(0x9E3779B97F4A7C15);
	return (size_t) (key ^ key >> 32);
}

static uint64_t
pair_key(int32_t left, int32_t right)
{
	return (uint64_t) (uint32_t) left << 32 | (uint32_t) right;
}

static Merge *
find_merge(const Bpe *bpe, uint64_t key)
{
	size_t		mask = bpe->n_merge_slots - 1;
	size_t		i = hash_pair(key) & mask;

	while (bpe->merges[i].key != key && bpe->merges[i].key != UINT64_MAX)
		i = (i + 1) & mask;
	return &bpe->merges[i];
}

/* The merge of two ids, or NULL. */
static const Merge *
get_merge(const Bpe *bpe, int32_t left, int32_t right)
{
	const Merge *m;

	if (bpe->n_merges == 0)
		return NULL;
	m = find_merge(bpe, pair_key(left, right));
	return m->key == UINT64_MAX ? NULL : m;
}

bool
millm_bpe_reserve_merges(Bpe *bpe, size_t n)
{
	size_t		n_slots = 64;

	if (n > SIZE_MAX / 4)
		return false;
	while (n_slots / 3 * 2 < n)
		n_slots *= 2;
	bpe->merges = millm_table_alloc(n_slots, sizeof(*bpe->merges));
	if (!bpe->merges)
		return false;
	for (size_t i = 0; i < n_slots; i++)
		bpe->merges[i] = (Merge) {.key = UINT64_MAX};
	bpe->n_merge_slots = n_slots;
	return true;
}

Merge
millm_bpe_merge(const Bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
	uint64_t	key = pair_key(left, right);

	__builtin_prefetch(&bpe->merges[hash_pair(key) & (bpe->n_merge_slots - 1)], 1);
	return (Merge) {key, rank, id};
}

void
millm_bpe_add_merge(Bpe *bpe, Merge merge)
{
	Merge	   *m = find_merge(bpe, merge.key);

	if (m->key == UINT64_MAX)
		bpe->n_merges++;
	*m = merge;
}

bool
millm_bpe_adopt_merges(Bpe *bpe, Merge *merges, size_t n_slots, size_t n_ids)
{
	size_t		n = 0;
	bool		is_bad = (n_slots & (n_slots - 1)) != 0;

	for (size_t i = 0; i < n_slots; i++)
	{
		bool		is_free = merges[i].key == UINT64_MAX;

		is_bad |= !is_free && (merges[i].id < 0 || (size_t) merges[i].id >= n_ids);
		n += !is_free;
	}
	if (is_bad || (n > 0 && n == n_slots))
		return false;
	bpe->merges = merges;
	bpe->n_merge_slots = n_slots;
	bpe->n_merges = n;
	return true;
}

void
millm_bpe_free(Bpe *bpe)
{
	millm_map_free(&bpe->pieces);
	free(bpe->merges);
	free(bpe->prefix);
	free(bpe->suffix);
	free((void *) bpe->is_whole);
}

void
millm_bpe_scratch_free(BpeScratch *s)
{
	free(s->ids);
	free(s->symbols);
	free(s->heap);
	millm_bytes_free(&s->key);
}

/* ---- the characters of a word ---- */

static bool
add_id(BpeScratch *s, int32_t id)
{
	if (s->n == s->capacity)
	{
		size_t		capacity = s->capacity ? s->capacity * 2 : 64;
		int32_t    *ids = realloc(s->ids, capacity * sizeof(*ids));

		if (!ids)
			return false;
		s->ids = ids;
		s->capacity = capacity;
	}
	s->ids[s->n++] = id;
	return true;
}

/* Can every byte of s[0..n) be written as "<0xHH>"? */
static bool
has_fallback(const Bpe *bpe, const char *s, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (bpe->fallback_ids[(unsigned char) s[i]] < 0)
			return false;
	return true;
}

/* The id of a piece, or -1. */
static int32_t
find_piece(const Bpe *bpe, const char *text, size_t n)
{
	int32_t		id;

	if (bpe->is_byte_level)
		return millm_map_get(&bpe->pieces, text, n);
	id = millm_map_get(bpe->names, text, n);
	if (id >= bpe->n_ids || (id >= 0 && atomic_load_explicit(&bpe->is_whole[id], memory_order_relaxed) == WHOLE_NO_PIECE))
		return -1;
	return id;
}

/*
 * The symbols that a word starts as, behind those in s->ids.  An unknown character waits in `unknown` until the next known
 * one, so that neighbours can become one; the bytes of a fallback do not end such a run, as in the genuine library.
 */
static bool
split_characters(const Bpe *bpe, BpeScratch *s, const char *word, size_t n)
{
	bool		unknown = false;

	for (size_t i = 0, next; i < n; i = next)
	{
		char		letter[4];
		const char *character = word + i;
		size_t		character_n;
		int32_t		id;
		uint32_t	cp;

		next = i + (bpe->is_byte_level ? 1 : millm_utf8_get(character, &cp));
		character_n = next - i;
		if ((bpe->prefix && i > 0) || (bpe->suffix && next == n))
		{
			s->key.n = 0;
			if ((bpe->prefix && i > 0 && !millm_bytes_add(&s->key, bpe->prefix, bpe->prefix_n)) ||
				!millm_bytes_add(&s->key, character, character_n) ||
				(bpe->suffix && next == n && !millm_bytes_add(&s->key, bpe->suffix, bpe->suffix_n)))
				return false;
			character = s->key.data;
			character_n = s->key.n;
			id = find_piece(bpe, character, character_n);
		}
		else if (bpe->is_byte_level)
			id = bpe->byte_ids[(unsigned char) *character];
		else
			id = find_piece(bpe, character, character_n);

		if (id >= 0)
		{
			if (unknown && !add_id(s, bpe->unknown_id))
				return false;
			unknown = false;
			if (!add_id(s, id))
				return false;
			continue;
		}
		if (bpe->byte_fallback)
		{
			/* The genuine library falls back to the bytes of the letter that stands for this byte. */
			if (bpe->is_byte_level && character_n == 1)
			{
				character_n = millm_utf8_put(letter, millm_byte_to_letter((unsigned char) *character));
				character = letter;
			}
			if (has_fallback(bpe, character, character_n))
			{
				for (size_t b = 0; b < character_n; b++)
					if (!add_id(s, bpe->fallback_ids[(unsigned char) character[b]]))
						return false;
				continue;
			}
		}
		if (bpe->unknown_id < 0)
			continue;
		if (unknown && !bpe->fuse_unknown && !add_id(s, bpe->unknown_id))
			return false;
		unknown = true;
	}
	return !unknown || add_id(s, bpe->unknown_id);
}

/* ---- merging ---- */

/* The rank of the pair (i, i + 1), UINT32_MAX if it does not merge, and what it becomes. */
static inline void
look_up(const Bpe *bpe, const int32_t *ids, size_t i, uint32_t *ranks, int32_t *merged)
{
	const Merge *m = get_merge(bpe, ids[i], ids[i + 1]);

	ranks[i] = m ? m->rank : UINT32_MAX;
	merged[i] = m ? m->id : -1;
}

/* Merge the symbols of s->ids from `first' on, 2 to SHORT_WORD of them. */
static void
merge_short(const Bpe *bpe, BpeScratch *s, size_t first)
{
	uint32_t	ranks[SHORT_WORD];
	int32_t		merged[SHORT_WORD];
	int32_t    *ids = s->ids + first;
	size_t		n = s->n - first;

	for (size_t i = 0; i + 1 < n; i++)
		look_up(bpe, ids, i, ranks, merged);
	while (n > 1)
	{
		size_t		best = 0;

		for (size_t i = 1; i + 1 < n; i++)
			if (ranks[i] < ranks[best])
				best = i;
		if (merged[best] < 0)
			break;
		ids[best] = merged[best];
		n--;
		memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof(*ids));
		if (best + 1 < n)
		{
			memmove(ranks + best + 1, ranks + best + 2, (n - best - 2) * sizeof(*ranks));
			memmove(merged + best + 1, merged + best + 2, (n - best - 2) * sizeof(*merged));
			look_up(bpe, ids, best, ranks, merged);
		}
		if (best > 0)
			look_up(bpe, ids, best - 1, ranks, merged);
	}
	s->n = first + n;
}

static bool
heap_push(BpeScratch *s, BpeCandidate c)
{
	size_t		i;

	if (s->heap_n == s->heap_capacity)
	{
		size_t		capacity = s->heap_capacity ? s->heap_capacity * 2 : 256;
		BpeCandidate *heap = realloc(s->heap, capacity * sizeof(*heap));

		if (!heap)
			return false;
		s->heap = heap;
		s->heap_capacity = capacity;
	}
	for (i = s->heap_n++; i > 0 && s->heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2)
		s->heap[i] = s->heap[(i - 1) / 2];
	s->heap[i] = c;
	return true;
}

static BpeCandidate
heap_pop(BpeScratch *s)
{
	BpeCandidate top = s->heap[0];
	BpeCandidate last = s->heap[--s->heap_n];
	size_t		i = 0;

	for (size_t child; (child = 2 * i + 1) < s->heap_n; i = child)
	{
		if (child + 1 < s->heap_n && s->heap[child + 1].order < s->heap[child].order)
			child++;
		if (s->heap[child].order >= last.order)
			break;
		s->heap[i] = s->heap[child];
	}
	s->heap[i] = last;
	return top;
}

/* Offer the pair that starts at position i, if it is one. */
static bool
offer(const Bpe *bpe, BpeScratch *s, int32_t i)
{
	const Merge *m;

	if (i < 0 || s->symbols[i].next < 0)
		return true;
	m = get_merge(bpe, s->symbols[i].id, s->symbols[s->symbols[i].next].id);
	return !m || heap_push(s, (BpeCandidate) {(uint64_t) m->rank << 32 | (uint32_t) i, m->id});
}

/* The same of any number. */
static bool
merge_long(const Bpe *bpe, BpeScratch *s, size_t first)
{
	size_t		n = s->n - first;
	BpeSymbol  *symbols;

	if (n > s->n_symbols_max)
	{
		symbols = realloc(s->symbols, n * sizeof(*symbols));
		if (!symbols)
			return false;
		s->symbols = symbols;
		s->n_symbols_max = n;
	}
	symbols = s->symbols;
	for (size_t i = 0; i < n; i++)
		symbols[i] = (BpeSymbol) {s->ids[first + i], (int32_t) i - 1, i + 1 < n ? (int32_t) i + 1 : -1};
	s->heap_n = 0;
	for (size_t i = 0; i < n; i++)
		if (!offer(bpe, s, (int32_t) i))
			return false;
	while (s->heap_n > 0)
	{
		BpeCandidate c = heap_pop(s);
		BpeSymbol  *left = &symbols[(uint32_t) c.order];
		BpeSymbol  *right;
		const Merge *m;

		if (left->id < 0 || left->next < 0)
			continue;
		right = &symbols[left->next];
		m = get_merge(bpe, left->id, right->id);
		if (!m || m->id != c.id)
			continue;			/* one of the two has changed since */
		left->id = c.id;
		right->id = -1;
		left->next = right->next;
		if (left->next >= 0)
			symbols[left->next].prev = (int32_t) (left - symbols);
		if (!offer(bpe, s, left->prev) || !offer(bpe, s, (int32_t) (left - symbols)))
			return false;
	}
	s->n = first;
	for (int32_t i = 0; i >= 0; i = symbols[i].next)
		s->ids[s->n++] = symbols[i].id;
	return true;
}

/* Add the ids of a word, or of a part that nothing joins to the others. */
static bool
encode_part(const Bpe *bpe, BpeScratch *s, const char *word, size_t n)
{
	int32_t		whole = n <= bpe->longest ? find_piece(bpe, word, n) : -1;
	size_t		first = s->n;
	bool		ask = false;

	if (whole >= 0)
	{
		uint8_t		memo = bpe->ignore_merges ? WHOLE_YES : atomic_load_explicit(&bpe->is_whole[whole], memory_order_relaxed);

		if (memo == WHOLE_YES)
			return add_id(s, whole);
		ask = memo == WHOLE_UNKNOWN;
	}
	if (!split_characters(bpe, s, word, n))
		return false;
	if (s->n - first > SHORT_WORD)
	{
		if (!merge_long(bpe, s, first))
			return false;
	}
	else if (s->n - first > 1)
		merge_short(bpe, s, first);
	if (ask)
		atomic_store_explicit(&bpe->is_whole[whole], s->n - first == 1 && s->ids[first] == whole ? WHOLE_YES : WHOLE_NO,
							  memory_order_relaxed);
	return true;
}

/* ---- cuts ---- */

static const char marker[] = "\xE2\x96\x81";	/* U+2581 */

#define MARKER_BYTES 3

/* Where the next U+2581 in text[from..n) begins, or n. */
static inline size_t
find_marker(const char *text, size_t n, size_t from)
{
	const char *hit;

	for (; from < n && (hit = memchr(text + from, (unsigned char) marker[0], n - from)) != NULL; from = (size_t) (hit - text) + 1)
		if (n - (size_t) (hit - text) >= MARKER_BYTES && memcmp(hit, marker, MARKER_BYTES) == 0)
			return (size_t) (hit - text);
	return n;
}

/* Does text[0..n) end in a "<0xHH>"? */
static bool
ends_in_fallback(const char *text, size_t n)
{
	return n >= 6 && memcmp(text + n - 6, "<0x", 3) == 0 && text[n - 1] == '>';
}

void
millm_bpe_note_joins(Bpe *bpe, const char *piece, size_t n, const char *unknown, size_t unknown_n)
{
	for (size_t at = find_marker(piece, n, 1); at < n; at = find_marker(piece, n, at + 1))
	{
		bpe->joins[(unsigned char) piece[at - 1]] = true;
		/* what stands for characters that are no pieces ends in another byte than they do */
		if (ends_in_fallback(piece, at) || (at >= unknown_n && memcmp(piece + at - unknown_n, unknown, unknown_n) == 0))
			bpe->has_cuts = false;
	}
}

bool
millm_bpe_encode(const Bpe *bpe, BpeScratch *s, const char *word, size_t n)
{
	size_t		start = 0;

	s->n = 0;
	if (bpe->has_cuts)
		for (size_t at = find_marker(word, n, 1); at < n; at = find_marker(word, n, at + 1))
			if (!bpe->joins[(unsigned char) word[at - 1]])
			{
				if (!encode_part(bpe, s, word + start, at - start))
					return false;
				start = at;
			}
	return encode_part(bpe, s, word + start, n - start);
}
