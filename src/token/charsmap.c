/*
 * charsmap.c -- SentencePiece's compiled map of characters.
 *
 * The data is a number of bytes, a trie of so many (a double array, as Darts has it), and the texts that its values point to.
 * It is a stranger's: every position is checked when it is followed, and what leads out of the data maps nothing.
 *
 * Text is looked up a grapheme cluster at a time, as the genuine library does: one of less than 6 bytes as a whole, where the
 * shortest of its beginnings that the trie knows stands for all of it; else each character alone.
 */
#include "charsmap.h"

#include <string.h>
#include <utf8proc.h>

#include "arith.h"
#include "unicode.h"

#define MAX_CLUSTER 6			/* bytes: from here on its characters are looked up */

static int
base64_value(char c)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	const char *at = c != '\0' ? strchr(digits, c) : NULL;

	return at ? (int) (at - digits) : -1;
}

static MillmCode
invalid(MillmError *err, const char *why)
{
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "file \"tokenizer.json\" is not valid");
	millm_detail(err, "The \"precompiled_charsmap\" %s.", why);
	return MILLM_E_INVALID_MODEL_FILE;
}

MillmCode
millm_charsmap_read(Charsmap *map, const char *base64, size_t n, MillmError *err)
{
	uint32_t	bits = 0;
	int			n_bits = 0;
	uint32_t	trie_bytes;
	size_t		bad;

	if (n % 4 != 0)
		return invalid(err, "is not base64");
	for (int i = 0; i < 2 && n > 0 && base64[n - 1] == '='; i++)
		n--;
	if (!millm_bytes_reserve(&map->data, n / 4 * 3 + 3))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (size_t i = 0; i < n; i++)
	{
		int			value = base64_value(base64[i]);

		if (value < 0)
			return invalid(err, "is not base64");
		bits = bits << 6 | (uint32_t) value;
		n_bits += 6;
		if (n_bits >= 8)
		{
			n_bits -= 8;
			map->data.data[map->data.n++] = (char) (bits >> n_bits);
		}
	}
	if (n_bits >= 6 || (bits & ((1u << n_bits) - 1)) != 0)
		return invalid(err, "is not base64");
	if (map->data.n < 4)
		return invalid(err, "is too short");
	trie_bytes = millm_get_le32(map->data.data);
	if (trie_bytes % 4 != 0 || trie_bytes > map->data.n - 4)
		return invalid(err, "is shorter than it says");
	if (!millm_utf8_is_valid(map->data.data + 4 + trie_bytes, map->data.n - 4 - trie_bytes, &bad))
		return invalid(err, "has texts that are not UTF-8");
	map->n_units = trie_bytes / 4;
	return MILLM_OK;
}

void
millm_charsmap_free(Charsmap *map)
{
	millm_bytes_free(&map->data);
}

/* ---- the double array ---- */

static bool
get_unit(const Charsmap *map, uint32_t at, uint32_t *unit)
{
	if (at >= map->n_units)
		return false;
	*unit = millm_get_le32(map->data.data + 4 + 4 * (size_t) at);
	return true;
}

static inline uint32_t
unit_offset(uint32_t unit)
{
	return (unit >> 10) << ((unit & 0x200) >> 6);
}

/* What key[0..n) becomes, up to its NUL; NULL when the map does not know it. */
static const char *
look_up(const Charsmap *map, const char *key, size_t n, size_t *text_n)
{
	const char *texts = map->data.data + 4 + 4 * map->n_units;
	size_t		texts_n = map->data.n - 4 - 4 * map->n_units;
	uint32_t	unit;
	uint32_t	at;

	if (!get_unit(map, 0, &unit))
		return NULL;
	at = unit_offset(unit);
	for (size_t i = 0; i < n; i++)
	{
		unsigned char b = (unsigned char) key[i];

		if (b == 0)
			return NULL;
		at ^= b;
		if (!get_unit(map, at, &unit) || (unit & 0x800000FF) != b)
			return NULL;
		at ^= unit_offset(unit);
		if (unit & 0x100)
		{
			size_t		from;

			if (!get_unit(map, at, &unit))
				return NULL;
			from = unit & 0x7FFFFFFF;
			if (from > texts_n || (from < texts_n && ((unsigned char) texts[from] & 0xC0) == 0x80))
				return NULL;
			*text_n = strnlen(texts + from, texts_n - from);
			return texts + from;
		}
	}
	return NULL;
}

/*
 * Do the two belong together by characters that are newer than utf8proc's tables may be: a mark behind anything but a control, or
 * one of the letters (Kawi's and Tulu-Tigalari's repha) that is written before its syllable?
 */
static bool
is_new_bond(uint32_t before, uint32_t cp)
{
	const uint32_t controls = UM_C | UM(UC_ZL) | UM(UC_ZP);

	if (before == 0x11F02 || before == 0x113D1)
		return !millm_unicode_is_in(cp, controls);
	return millm_unicode_class(cp) & UC_IS_NEW && millm_unicode_is_in(cp, UM_M) && !millm_unicode_is_in(before, controls);
}

/* The end of the grapheme cluster that starts at i. */
static size_t
cluster_end(const char *text, size_t n, size_t i)
{
	utf8proc_int32_t state = 0;
	uint32_t	before;
	uint32_t	cp;

	i += millm_utf8_get(text + i, &before);
	for (; i < n; before = cp)
	{
		unsigned	length;

		if ((unsigned char) text[i] < 0x80 && before < 0x80 && before != '\r')
			return i;
		length = millm_utf8_get(text + i, &cp);
		if (utf8proc_grapheme_break_stateful((utf8proc_int32_t) before, (utf8proc_int32_t) cp, &state) && !is_new_bond(before, cp))
			return i;
		i += length;
	}
	return n;
}

bool
millm_charsmap_apply(const Charsmap *map, const char *text, size_t n, Bytes *out)
{
	out->n = 0;
	for (size_t i = 0, end; i < n; i = end)
	{
		size_t		found_n = 0;
		const char *found = NULL;

		end = cluster_end(text, n, i);
		if (end - i < MAX_CLUSTER && (found = look_up(map, text + i, end - i, &found_n)) != NULL)
		{
			if (!millm_bytes_add(out, found, found_n))
				return false;
			continue;
		}
		for (size_t k = i, next; k < end; k = next)
		{
			uint32_t	cp;

			next = k + millm_utf8_get(text + k, &cp);
			found = look_up(map, text + k, next - k, &found_n);
			if (!(found ? millm_bytes_add(out, found, found_n) : millm_bytes_add(out, text + k, next - k)))
				return false;
		}
	}
	return true;
}
