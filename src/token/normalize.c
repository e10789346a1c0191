/*
 * normalize.c -- the normalizers, one after the other, over one segment of text.
 *
 * Most text is normal already.  NFC looks at it first: a character below U+0300 neither changes nor composes
 * with what is before it, so only the runs that hold a higher one go through utf8proc.
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

MillmCode
millm_replace(const Pattern *pattern, PatternScratch *scratch, const char *text, size_t n,
			  const char *with, size_t with_n, Bytes *out, MillmError *err)
{
	size_t		done = 0;
	size_t		from = 0;

	out->n = 0;
	for (;;)
	{
		bool		found;
		size_t		start;
		size_t		end;
		MillmCode	rc = millm_pattern_find(pattern, scratch, text, n, from, &found, &start, &end, err);

		if (rc != MILLM_OK)
			return rc;
		if (!millm_bytes_add(out, text + done, start - done) || (found && !millm_bytes_add(out, with, with_n)))
			return out_of_memory(err);
		if (!found)
			return MILLM_OK;
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

static bool
is_low(const char *p)
{
	return (unsigned char) *p < 0xCC;	/* the lead byte of U+0300 is 0xCC */
}

/* The first character at or after i that is not below U+0300. */
static size_t
skip_low(const char *text, size_t n, size_t i)
{
	while (i < n && is_low(text + i))
		i++;
	return i;
}

static MillmCode
nfc(const char *text, size_t n, Bytes *out, MillmError *err)
{
	size_t		i = 0;

	out->n = 0;
	while (i < n)
	{
		size_t		high = skip_low(text, n, i);
		size_t		start = high;
		size_t		end = high;
		utf8proc_uint8_t *normal = NULL;
		utf8proc_ssize_t normal_n;

		if (high < n && high > i)
			start = (size_t) (millm_utf8_before(text + high) - text);	/* the letter that an accent may join */
		if (!millm_bytes_add(out, text + i, start - i))
			return out_of_memory(err);
		if (high == n)
			break;
		while (end < n && !is_low(text + end))
		{
			uint32_t	cp;

			end += millm_utf8_get(text + end, &cp);
		}
		normal_n = utf8proc_map((const utf8proc_uint8_t *) text + start, (utf8proc_ssize_t) (end - start), &normal,
								UTF8PROC_STABLE | UTF8PROC_COMPOSE);
		if (normal_n < 0)
			return millm_fail(err, MILLM_E_INTERNAL, "could not normalize text: %s", utf8proc_errmsg(normal_n));
		if (!millm_bytes_add(out, normal, (size_t) normal_n))
		{
			free(normal);
			return out_of_memory(err);
		}
		free(normal);
		i = end;
	}
	return MILLM_OK;
}

MillmCode
millm_normalize(const MillmTokenizer *tok, PatternScratch *scratch, const char *text, size_t n,
				Bytes buffers[2], const char **result, size_t *result_n, MillmError *err)
{
	int			next = 0;		/* the buffer that does not hold the text */

	for (int i = 0; i < tok->n_normalizers && n > 0; i++)
	{
		const Normalizer *stage = &tok->normalizers[i];
		Bytes	   *out = &buffers[next];
		MillmCode	rc = MILLM_OK;

		switch (stage->kind)
		{
			case NORMALIZE_NFC:
				if (skip_low(text, n, 0) == n)
					continue;
				rc = nfc(text, n, out, err);
				break;
			case NORMALIZE_PREPEND:
				out->n = 0;
				if (!millm_bytes_add(out, stage->text, stage->text_n) || !millm_bytes_add(out, text, n))
					rc = out_of_memory(err);
				break;
			case NORMALIZE_REPLACE:
				rc = millm_replace(&stage->pattern, scratch, text, n, stage->text, stage->text_n, out, err);
				break;
		}
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
