/*
 * decode.c -- ids to text, one by one or all at once, by the same machine.
 *
 * Two kinds of tokenizers.  Byte-level: a token is some bytes, a character may begin in one token and end in
 * the next; bytes wait in `carry` until they are whole characters, and bytes that can never be one become
 * U+FFFD at once.  SentencePiece-like: a token is text, rewritten by the decoders, but "<0xHH>" is one byte of a
 * run; a run that is not UTF-8 becomes one U+FFFD a byte.  There the genuine library judges a run as a whole,
 * which a stream cannot wait for: it shows the good characters of a broken run, and that is the one
 * difference between a stream and millm_decode().
 *
 * load.c lets only those orders of decoders through that this machine reproduces.
 */
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "tokenizer.h"
#include "unicode.h"

#define REPLACEMENT "\xEF\xBF\xBD"

struct MillmDetok
{
	const MillmTokenizer *tok;
	bool		skip_special;
	bool		is_whole;		/* all ids will come: judge runs of bytes as a whole */
	bool		no_memory;		/* only if is_whole: a stream has reserved what it needs */
	bool		is_first;		/* no token was seen yet */
	size_t		n_strip;		/* characters that DECODE_STRIP, after DECODE_FUSE, may still take */
	Bytes		carry;			/* bytes of an unfinished character, or of an unfinished run */
	Bytes		rewritten[2];
	Bytes		out;
};

static void
add(MillmDetok *d, Bytes *to, const void *data, size_t n)
{
	if (!millm_bytes_add(to, data, n))
		d->no_memory = true;
}

/* The stage that strips the fused text, or NULL. */
static const Decoder *
final_strip(const MillmTokenizer *tok)
{
	const Decoder *last = tok->n_decoders > 1 ? &tok->decoders[tok->n_decoders - 1] : NULL;

	return last && last->kind == DECODE_STRIP && last[-1].kind == DECODE_FUSE ? last : NULL;
}

/* Text that is whole characters, on its way out. */
static void
emit(MillmDetok *d, const char *text, size_t n)
{
	if (d->n_strip > 0)
	{
		const Pattern *strip = &final_strip(d->tok)->pattern;

		while (n > 0 && d->n_strip > 0)
			if (n >= strip->literal_n && memcmp(text, strip->literal, strip->literal_n) == 0)
			{
				text += strip->literal_n;
				n -= strip->literal_n;
				d->n_strip--;
			}
			else
				d->n_strip = 0;
	}
	add(d, &d->out, text, n);
}

/*
 * Give out what the carry holds: characters as they are, each maximal subpart that is none as one U+FFFD, or
 * (of a run of "<0xHH>") each byte.  The beginning of a character stays, unless this is the end.
 */
static void
drain(MillmDetok *d, bool each_byte, bool is_end)
{
	size_t		i = 0;

	while (i < d->carry.n)
	{
		int			length = millm_utf8_check(d->carry.data + i, d->carry.n - i);
		size_t		bad;

		if (length > 0)
		{
			emit(d, d->carry.data + i, (size_t) length);
			i += (size_t) length;
			continue;
		}
		if (length == 0 && !is_end)
			break;
		bad = length == 0 ? d->carry.n - i : (size_t) -length;
		for (size_t k = 0; k < (each_byte ? bad : 1); k++)
			emit(d, REPLACEMENT, 3);
		i += bad;
	}
	if (i > 0 && i < d->carry.n)
		memmove(d->carry.data, d->carry.data + i, d->carry.n - i);
	d->carry.n -= i;
}

/* A run of "<0xHH>" is over. */
static void
end_run(MillmDetok *d)
{
	size_t		bad;

	if (d->is_whole && !millm_utf8_is_valid(d->carry.data, d->carry.n, &bad))
	{
		for (size_t i = 0; i < d->carry.n; i++)
			emit(d, REPLACEMENT, 3);
		d->carry.n = 0;
		return;
	}
	drain(d, true, true);
}

static int
hex(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that a token "<0xHH>" stands for, or -1. */
static int
fallback_byte(const char *s, size_t n)
{
	if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>' || hex(s[3]) < 0 || hex(s[4]) < 0)
		return -1;
	return hex(s[3]) << 4 | hex(s[4]);
}

/* One stage that rewrites a token; *text may come to point into out. */
static void
rewrite(MillmDetok *d, const Decoder *stage, const char **text, size_t *n, Bytes *out)
{
	const char *find = stage->pattern.literal;
	size_t		find_n = stage->pattern.literal_n;
	const char *with = stage->kind == DECODE_METASPACE ? " " : stage->text;
	size_t		with_n = stage->kind == DECODE_METASPACE ? 1 : stage->text_n;
	const char *p = *text;
	const char *end = p + *n;
	const char *hit;

	if (stage->kind == DECODE_STRIP)
	{
		for (size_t i = 0; i < stage->n_start && *n >= find_n && memcmp(*text, find, find_n) == 0; i++)
		{
			*text += find_n;
			*n -= find_n;
		}
		for (size_t i = 0; i < stage->n_stop && *n >= find_n && memcmp(*text + *n - find_n, find, find_n) == 0; i++)
			*n -= find_n;
		return;
	}
	if (stage->kind == DECODE_METASPACE && stage->is_first_dropped && d->is_first)
		with_n = 0;
	out->n = 0;
	for (; (hit = memmem(p, (size_t) (end - p), find, find_n)) != NULL; p = hit + find_n)
	{
		add(d, out, p, (size_t) (hit - p));
		add(d, out, with, with_n);
	}
	add(d, out, p, (size_t) (end - p));
	*text = out->data;
	*n = out->n;
}

static void
push(MillmDetok *d, int32_t id)
{
	const MillmTokenizer *tok = d->tok;
	const Token *token = &tok->tokens[id];
	const char *text = tok->contents.keys.data + token->content.offset;
	size_t		n = token->content.n;

	int			spare = 0;		/* the buffer that does not hold text */

	if (!token->exists || (token->special && d->skip_special))
		return;
	if (tok->n_decoders == 1 && tok->decoders[0].kind == DECODE_BYTE_LEVEL)
	{
		add(d, &d->carry, tok->decoded.data + token->bytes.offset, token->bytes.n);
		drain(d, false, false);
		return;
	}
	for (int i = 0; i < tok->n_decoders && tok->decoders[i].kind != DECODE_FUSE; i++)
	{
		int			byte = -1;

		if (tok->decoders[i].kind == DECODE_BYTE_FALLBACK)
			byte = fallback_byte(text, n);
		else
		{
			rewrite(d, &tok->decoders[i], &text, &n, &d->rewritten[spare]);
			spare = 1 - spare;
		}
		if (byte >= 0)
		{
			add(d, &d->carry, &(char) {(char) byte}, 1);
			if (!d->is_whole)
				drain(d, true, false);
			d->is_first = false;
			return;
		}
	}
	end_run(d);
	if (tok->n_decoders == 0 && !d->is_first)
		emit(d, " ", 1);
	emit(d, text, n);
	d->is_first = false;
}

static void
flush(MillmDetok *d)
{
	if (d->tok->n_decoders == 1 && d->tok->decoders[0].kind == DECODE_BYTE_LEVEL)
		drain(d, false, true);
	else
		end_run(d);
}

static void
begin(MillmDetok *d, const MillmTokenizer *tok)
{
	*d = (MillmDetok) {.tok = tok, .is_first = true};
	if (final_strip(tok))
		d->n_strip = final_strip(tok)->n_start;
}

static void
clear(MillmDetok *d)
{
	millm_bytes_free(&d->carry);
	millm_bytes_free(&d->rewritten[0]);
	millm_bytes_free(&d->rewritten[1]);
	millm_bytes_free(&d->out);
}

MillmCode
millm_decode(const MillmTokenizer *tok, const int32_t *ids, size_t n, bool skip_special,
			 char **out, size_t *len, MillmError *err)
{
	MillmDetok	d;

	for (size_t i = 0; i < n; i++)
		if (ids[i] < 0 || ids[i] >= tok->n_ids || !tok->tokens[ids[i]].exists)
			return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "token id %d is not in the vocabulary", (int) ids[i]);
	begin(&d, tok);
	d.skip_special = skip_special;
	d.is_whole = true;
	for (size_t i = 0; i < n && !d.no_memory; i++)
		push(&d, ids[i]);
	flush(&d);
	add(&d, &d.out, "", 1);
	if (d.no_memory)
	{
		clear(&d);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	*len = d.out.n - 1;
	*out = d.out.data;
	d.out.data = NULL;
	clear(&d);
	return MILLM_OK;
}

/* The most bytes that one token can become before it is given out; false: beyond reason. */
static bool
longest_rewritten(const MillmTokenizer *tok, size_t *longest)
{
	*longest = 1;
	for (int i = 0; i < tok->n_ids; i++)
		if (tok->tokens[i].content.n > *longest)
			*longest = tok->tokens[i].content.n;
	for (int i = 0; i < tok->n_decoders; i++)
		if (tok->decoders[i].text_n > 1 && !millm_mul_size(*longest, tok->decoders[i].text_n, longest))
			return false;
	return *longest < SIZE_MAX / 8;
}

MillmDetok *
millm_detok_create(const MillmTokenizer *tok)
{
	MillmDetok *d = malloc(sizeof(*d));
	size_t		longest;

	if (!d)
		return NULL;
	begin(d, tok);
	d->skip_special = true;
	/* Room for the longest token behind a carry of 3 bytes, every byte of them a U+FFFD, and a NUL. */
	if (!longest_rewritten(tok, &longest) || !millm_bytes_reserve(&d->carry, longest + 4) ||
		!millm_bytes_reserve(&d->rewritten[0], longest) || !millm_bytes_reserve(&d->rewritten[1], longest) ||
		!millm_bytes_reserve(&d->out, 3 * (longest + 4) + 2))
	{
		millm_detok_free(d);
		return NULL;
	}
	return d;
}

void
millm_detok_free(MillmDetok *d)
{
	if (!d)
		return;
	clear(d);
	free(d);
}

/* The text of this call, NUL-terminated in the room that create() has reserved. */
static const char *
take(MillmDetok *d, size_t *len)
{
	*len = d->out.n;
	d->out.data[d->out.n] = '\0';
	return d->out.data;
}

const char *
millm_detok_push(MillmDetok *d, int32_t id, size_t *len)
{
	d->out.n = 0;
	if (id >= 0 && id < d->tok->n_ids)
		push(d, id);
	return take(d, len);
}

const char *
millm_detok_flush(MillmDetok *d, size_t *len)
{
	d->out.n = 0;
	flush(d);
	return take(d, len);
}
