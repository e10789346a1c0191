/*
 * normalize.c -- the normalizers, one after the other, over one segment of text.
 *
 * Most text is normal already.  The normal forms look at it first: no character below U+0300 changes under NFC or composes with
 * what is before it, none below U+0080 under the others, so only the runs that hold a higher one go through utf8proc.
 * And those are cut at characters that the genuine library's tables, Unicode 9.0's, have not assigned: to it
 * they are inert, so what is before and behind them is normalized alone.
 */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "tokenizer.h"
#include "unicode.h"

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

/* Is text[0..n) more than one character? */
static bool
is_long(const char *text, size_t n)
{
	uint32_t	cp;

	return n > 0 && millm_utf8_get(text, &cp) < n;
}

/*
 * Every match becomes the stage's text.  What replaces a match comes from the last character of the match: so *is_moved when a
 * longer one is at the beginning, or nothing takes its place.
 */
static MillmCode
replace(const Normalizer *stage, PatternScratch *scratch, const char *text, size_t n, Bytes *out, bool *is_moved, MillmError *err)
{
	size_t		done = 0;
	size_t		from = 0;
	bool		is_begun = false;	/* there was a match, which ended at done */

	out->n = 0;
	for (;;)
	{
		bool		found;
		bool		counts;
		size_t		start;
		size_t		end;
		MillmCode	rc = millm_pattern_find(&stage->pattern, scratch, text, n, from, &found, &start, &end, err);

		if (rc != MILLM_OK)
			return rc;
		counts = found && (end > start || !is_begun || start > done);	/* an empty match that touches another is none */
		if (!millm_bytes_add(out, text + done, start - done) || (counts && !millm_bytes_add(out, stage->text, stage->text_n)))
			return out_of_memory(err);
		if (!found)
			return MILLM_OK;
		is_begun = true;
		if (start == 0 && end > 0)
			*is_moved = *is_moved || stage->text_n == 0 || is_long(text, end);
		done = from = end;
		if (start == end)		/* an empty match: go on behind the next character */
		{
			uint32_t	cp;

			if (end == n)
				return MILLM_OK;
			from += millm_utf8_get(text + end, &cp);
		}
	}
}

/* Where this form must look: the first character at or after i whose lead byte is not below `lead`. */
static size_t
skip_low(const char *text, size_t n, size_t i, unsigned char lead)
{
	while (i < n && (unsigned char) text[i] < lead)
		i++;
	return i;
}

/* Normalize a run that holds no character newer than the genuine library's tables. */
static MillmCode
add_normal(const Normalizer *stage, const char *text, size_t n, Bytes *out, MillmError *err)
{
	utf8proc_option_t options = UTF8PROC_STABLE | (stage->is_composed ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
		(stage->is_compatible ? UTF8PROC_COMPAT : 0);
	utf8proc_uint8_t *normal = NULL;
	utf8proc_ssize_t normal_n;
	bool		ok;

	if (n == 0)
		return MILLM_OK;
	normal_n = utf8proc_map((const utf8proc_uint8_t *) text, (utf8proc_ssize_t) n, &normal, options);
	if (normal_n < 0)
		return millm_fail(err, MILLM_E_INTERNAL, "could not normalize text: %s", utf8proc_errmsg(normal_n));
	ok = millm_bytes_add(out, normal, (size_t) normal_n);
	free(normal);
	return ok ? MILLM_OK : out_of_memory(err);
}

static MillmCode
normal_form(const Normalizer *stage, unsigned char lead, const char *text, size_t n, Bytes *out, MillmError *err)
{
	size_t		i = 0;

	out->n = 0;
	while (i < n)
	{
		size_t		high = skip_low(text, n, i, lead);
		size_t		start = high;
		size_t		end = high;
		MillmCode	rc;

		if (high < n && high > i)
			start = (size_t) (millm_utf8_before(text + high) - text);	/* the letter that an accent may join */
		if (!millm_bytes_add(out, text + i, start - i))
			return out_of_memory(err);
		while (end < n && (unsigned char) text[end] >= lead)
		{
			uint32_t	cp;
			unsigned	length = millm_utf8_get(text + end, &cp);

			if (millm_unicode_habits(cp) & UH_NOT_NORMAL)
			{
				if ((rc = add_normal(stage, text + start, end - start, out, err)) != MILLM_OK)
					return rc;
				if (!millm_bytes_add(out, text + end, length))
					return out_of_memory(err);
				start = end + length;
			}
			end += length;
		}
		if ((rc = add_normal(stage, text + start, end - start, out, err)) != MILLM_OK)
			return rc;
		i = end;
	}
	return MILLM_OK;
}

bool
millm_bytes_to_letters(const char *text, size_t n, Bytes *out)
{
	out->n = 0;
	if (n > SIZE_MAX / 2 || !millm_bytes_reserve(out, 2 * n))
		return false;
	for (size_t i = 0; i < n; i++)
		out->n += millm_utf8_put(out->data + out->n, millm_byte_to_letter((uint8_t) text[i]));
	return true;
}

static void
strip(const Normalizer *stage, const char **text, size_t *n)
{
	uint32_t	cp;

	while (stage->strips_start && *n > 0)
	{
		unsigned	length = millm_utf8_get(*text, &cp);

		if (!millm_unicode_is_space(cp))
			break;
		*text += length;
		*n -= length;
	}
	while (stage->strips_end && *n > 0)
	{
		const char *last = millm_utf8_before(*text + *n);

		(void) millm_utf8_get(last, &cp);
		if (!millm_unicode_is_space(cp))
			break;
		*n = (size_t) (last - *text);
	}
}

/* The blocks of ideographs of BertNormalizer. */
static bool
is_chinese(uint32_t cp)
{
	static const uint32_t blocks[][2] = {
		{0x4E00, 0x9FFF}, {0x3400, 0x4DBF}, {0x20000, 0x2A6DF}, {0x2A700, 0x2B73F}, {0x2B740, 0x2B81F}, {0x2B920, 0x2CEAF},
		{0xF900, 0xFAFF}, {0x2F800, 0x2FA1F},
	};

	for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++)
		if (cp >= blocks[i][0] && cp <= blocks[i][1])
			return true;
	return false;
}

static bool
is_nmt_dropped(uint32_t cp)
{
	return (cp >= 1 && cp <= 8) || cp == 0xB || (cp >= 0xE && cp <= 0x1F) || cp == 0x7F || cp == 0x8F || cp == 0x9F;
}

static bool
is_nmt_space(uint32_t cp)
{
	return cp == 9 || cp == 0xA || cp == 0xC || cp == 0xD || cp == 0x1680 || (cp >= 0x200B && cp <= 0x200F) || cp == 0x2028 ||
		cp == 0x2029 || cp == 0x2581 || cp == 0xFEFF || cp == 0xFFFD;
}

/* What a stage makes of one character, into out, which has room; returns its bytes. */
static size_t
map_character(const Normalizer *stage, const char *character, unsigned length, uint32_t cp, char *out)
{
	unsigned	n = 0;

	switch (stage->kind)
	{
		case NORMALIZE_LOWERCASE:
			if (!(millm_unicode_habits(cp) & UH_UPPER))
				break;
			n = millm_utf8_put(out, millm_unicode_to_lower(cp));
			return cp == 0x130 ? n + millm_utf8_put(out + n, 0x307) : n;
		case NORMALIZE_DROP:
			if (millm_unicode_habits(cp) & stage->habits)
				return 0;
			break;
		case NORMALIZE_CLEAN:
			if (millm_unicode_habits(cp) & UH_CONTROL)
				return 0;
			if (millm_unicode_is_space(cp))
			{
				out[0] = ' ';
				return 1;
			}
			break;
		case NORMALIZE_CHINESE:
			if (!is_chinese(cp))
				break;
			out[0] = ' ';
			memcpy(out + 1, character, length);
			out[1 + length] = ' ';
			return length + 2;
		case NORMALIZE_NMT:
			if (is_nmt_dropped(cp))
				return 0;
			if (!is_nmt_space(cp))
				break;
			out[0] = ' ';
			return 1;
		default:
			break;
	}
	memcpy(out, character, length);
	return length;
}

/* Character by character.  *is_moved: the first one is dropped. */
static bool
map_characters(const Normalizer *stage, const char *text, size_t n, Bytes *out, bool *is_moved)
{
	unsigned	length;

	out->n = 0;
	for (size_t i = 0; i < n; i += length)
	{
		uint32_t	cp;

		length = millm_utf8_get(text + i, &cp);
		if (!millm_bytes_reserve(out, 8))
			return false;
		out->n += map_character(stage, text + i, length, cp, out->data + out->n);
		*is_moved = *is_moved || (i == 0 && out->n == 0);
	}
	return true;
}

MillmCode
millm_normalize(const MillmTokenizer *tok, PatternScratch *scratch, const char *text, size_t n, Bytes buffers[2],
				const char **result, size_t *result_n, bool *is_moved, MillmError *err)
{
	int			next = 0;		/* the buffer that does not hold the text */

	*is_moved = false;
	for (int i = 0; i < tok->n_normalizers && n > 0; i++)
	{
		const Normalizer *stage = &tok->normalizers[i];
		const char *before = text;
		unsigned char lead;
		Bytes	   *out = &buffers[next];
		bool		ok = true;
		MillmCode	rc = MILLM_OK;

		switch (stage->kind)
		{
			case NORMALIZE_FORM:
				/* the lead byte of U+0300, or that of U+0080 */
				lead = stage->is_composed && !stage->is_compatible ? 0xCC : 0xC2;
				if (skip_low(text, n, 0, lead) == n)
					continue;
				rc = normal_form(stage, lead, text, n, out, err);
				break;
			case NORMALIZE_PREPEND:
				out->n = 0;
				ok = millm_bytes_add(out, stage->text, stage->text_n) && millm_bytes_add(out, text, n);
				break;
			case NORMALIZE_REPLACE:
				rc = replace(stage, scratch, text, n, out, is_moved, err);
				break;
			case NORMALIZE_STRIP:
				strip(stage, &text, &n);
				*is_moved = *is_moved || text != before;
				continue;
			case NORMALIZE_CHARSMAP:
				ok = millm_charsmap_apply(&stage->charsmap, text, n, out);
				break;
			case NORMALIZE_BYTE_LEVEL:
				ok = millm_bytes_to_letters(text, n, out);
				break;
			case NORMALIZE_LOWERCASE:
			case NORMALIZE_DROP:
			case NORMALIZE_CLEAN:
			case NORMALIZE_CHINESE:
			case NORMALIZE_NMT:
				ok = map_characters(stage, text, n, out, is_moved);
				break;
		}
		if (!ok)
			rc = out_of_memory(err);
		if (rc != MILLM_OK)
			return rc;
		text = out->data;
		n = out->n;
		next = 1 - next;
	}
	*result = text;
	*result_n = n;
	return MILLM_OK;
}
