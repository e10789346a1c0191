/*
 * decode.c -- ids to text, one by one or all at once, by the same machine.
 *
 * Two kinds of tokenizers.  Byte-level: a token is some bytes, a character may begin in one token and end in
 * the next; bytes wait in `carry` until they are whole characters, and bytes that can never be one become
 * U+FFFD at once.  The others: a token is text, which the decoders hand on, each rewriting it, but "<0xHH>" is one byte of a
 * run; a run that is not UTF-8 becomes one U+FFFD a byte.  There the genuine library judges a run as a whole,
 * which a stream cannot wait for: it shows the good characters of a broken run, and that is the one
 * difference between a stream and millm_decode().
 *
 * load_stages.c lets only those orders of decoders through that this machine reproduces.
 */
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "tokenizer.h"
#include "unicode.h"

#define REPLACEMENT "\xEF\xBF\xBD"

/* What a decoder has beside its rules. */
typedef struct StageState
{
	Bytes		out;			/* its last token, rewritten */
	Bytes		held;			/* DECODE_SUFFIX: a token that may be the last; DECODE_CTC: the one before */
	Bytes		spaced;			/* DECODE_CTC: out, with spaces for delimiters */
	bool		is_begun;		/* it has seen a token */
} StageState;

struct MillmDetok
{
	const MillmTokenizer *tok;
	bool		skip_special;
	bool		is_whole;		/* all ids will come: judge runs of bytes as a whole */
	bool		no_memory;		/* only if is_whole: a stream has reserved what it needs */
	bool		is_begun;		/* a token came out of the last decoder */
	size_t		n_strip;		/* characters that DECODE_STRIP, after DECODE_FUSE, may still take */
	Bytes		carry;			/* bytes of an unfinished character, or of an unfinished run */
	StageState	stages[MAX_STAGES];
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

static void hand_on(MillmDetok *d, int stage, const char *text, size_t n);

/*
 * Give out what the carry holds, to the decoders from that stage on: characters as they are, each maximal subpart that is none as
 * one U+FFFD, or (of a run of "<0xHH>") each byte.  The beginning of a character stays, unless this is the end.
 */
static void
drain(MillmDetok *d, int stage, bool each_byte, bool is_end)
{
	size_t		i = 0;

	while (i < d->carry.n)
	{
		int			length = millm_utf8_check(d->carry.data + i, d->carry.n - i);
		size_t		bad;

		if (length > 0)
		{
			hand_on(d, stage, d->carry.data + i, (size_t) length);
			i += (size_t) length;
			continue;
		}
		if (length == 0 && !is_end)
			break;
		bad = length == 0 ? d->carry.n - i : (size_t) -length;
		for (size_t k = 0; k < (each_byte ? bad : 1); k++)
			hand_on(d, stage, REPLACEMENT, 3);
		i += bad;
	}
	if (i > 0 && i < d->carry.n)
		memmove(d->carry.data, d->carry.data + i, d->carry.n - i);
	d->carry.n -= i;
}

/* A run of "<0xHH>" is over: the decoders from that stage on get it, as one token if it is UTF-8. */
static void
end_run(MillmDetok *d, int stage)
{
	size_t		bad;

	if (d->carry.n == 0)
		return;
	if (!d->is_whole)
		drain(d, stage, true, true);
	else if (millm_utf8_is_valid(d->carry.data, d->carry.n, &bad))
		hand_on(d, stage, d->carry.data, d->carry.n);
	else
		for (size_t i = 0; i < d->carry.n; i++)
			hand_on(d, stage, REPLACEMENT, 3);
	d->carry.n = 0;
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

/* Every find in text[0..n) becomes with, in *out. */
static void
replace(MillmDetok *d, const Pattern *find, const char *with, size_t with_n, const char *text, size_t n, Bytes *out)
{
	const char *end = text + n;
	const char *hit;

	out->n = 0;
	if (n == 0)
		return;
	for (; (hit = memmem(text, (size_t) (end - text), find->literal, find->literal_n)) != NULL; text = hit + find->literal_n)
	{
		add(d, out, text, (size_t) (hit - text));
		add(d, out, with, with_n);
	}
	add(d, out, text, (size_t) (end - text));
}

static void
strip(const Decoder *stage, const char **text, size_t *n)
{
	const char *find = stage->pattern.literal;
	size_t		find_n = stage->pattern.literal_n;

	for (size_t i = 0; i < stage->n_start && *n >= find_n && memcmp(*text, find, find_n) == 0; i++)
	{
		*text += find_n;
		*n -= find_n;
	}
	for (size_t i = 0; i < stage->n_stop && *n >= find_n && memcmp(*text + *n - find_n, find, find_n) == 0; i++)
		*n -= find_n;
}

/* What the genuine library calls cleanup: one replacement after the other, none of which makes text longer. */
static void
clean_up(Bytes *text)
{
	static const char *const rules[][2] = {
		{" .", "."}, {" ?", "?"}, {" !", "!"}, {" ,", ","}, {" ' ", "'"}, {" n't", "n't"}, {" 'm", "'m"}, {" do not", " don't"},
		{" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"},
	};

	for (size_t k = 0; k < sizeof(rules) / sizeof(rules[0]); k++)
	{
		size_t		find_n = strlen(rules[k][0]);
		size_t		with_n = strlen(rules[k][1]);
		size_t		n = 0;

		for (size_t i = 0; i < text->n;)
			if (text->n - i >= find_n && memcmp(text->data + i, rules[k][0], find_n) == 0)
			{
				memcpy(text->data + n, rules[k][1], with_n);
				n += with_n;
				i += find_n;
			}
			else
				text->data[n++] = text->data[i++];
		text->n = n;
	}
}

static void
word_piece(MillmDetok *d, int i, const char *text, size_t n, bool is_first)
{
	const Decoder *stage = &d->tok->decoders[i];
	Bytes	   *out = &d->stages[i].out;
	size_t		prefix_n = stage->pattern.literal_n;

	out->n = 0;
	if (!is_first && n >= prefix_n && memcmp(text, stage->pattern.literal, prefix_n) == 0)
	{
		text += prefix_n;
		n -= prefix_n;
	}
	else if (!is_first)
		add(d, out, " ", 1);
	add(d, out, text, n);
	if (stage->is_cleaned)
		clean_up(out);
	hand_on(d, i + 1, out->data, out->n);
}

static void
ctc(MillmDetok *d, int i, const char *text, size_t n, bool is_first)
{
	const Decoder *stage = &d->tok->decoders[i];
	Bytes	   *before = &d->stages[i].held;
	Bytes	   *out = &d->stages[i].out;
	Bytes	   *spaced = &d->stages[i].spaced;

	if (!is_first && before->n == n && memcmp(before->data, text, n) == 0)
		return;
	before->n = 0;
	add(d, before, text, n);
	replace(d, &stage->pattern, "", 0, text, n, out);
	if (stage->is_cleaned)
	{
		Pattern		delimiter = {.literal = stage->text, .literal_n = stage->text_n};

		clean_up(out);
		replace(d, &delimiter, " ", 1, out->data, out->n, spaced);
		out = spaced;
	}
	if (out->n > 0)
		hand_on(d, i + 1, out->data, out->n);
}

/* The token that a DECODE_SUFFIX stage has held goes on; is_last: none follows it. */
static void
release(MillmDetok *d, int i, bool is_last)
{
	StageState *state = &d->stages[i];

	replace(d, &d->tok->decoders[i].pattern, " ", is_last ? 0 : 1, state->held.data, state->held.n, &state->out);
	hand_on(d, i + 1, state->out.data, state->out.n);
}

/* Give a token to the decoder of that number, or out behind the last. */
static void
hand_on(MillmDetok *d, int i, const char *text, size_t n)
{
	const MillmTokenizer *tok = d->tok;
	const Decoder *stage = &tok->decoders[i];
	StageState *state = &d->stages[i];
	bool		is_first;
	int			byte;

	if (i == tok->n_decoders)
	{
		if (tok->n_decoders == 0 && d->is_begun)
			emit(d, " ", 1);
		d->is_begun = true;
		emit(d, text, n);
		return;
	}
	is_first = !state->is_begun;
	state->is_begun = true;
	switch (stage->kind)
	{
		case DECODE_BYTE_LEVEL:	/* in push() */
		case DECODE_FUSE:		/* what follows it is in emit() */
			emit(d, text, n);
			return;
		case DECODE_BYTE_FALLBACK:
			byte = fallback_byte(text, n);
			if (byte >= 0)
			{
				add(d, &d->carry, &(char) {(char) byte}, 1);
				if (!d->is_whole)
					drain(d, i + 1, true, false);
				return;
			}
			end_run(d, i + 1);
			break;
		case DECODE_REPLACE:
			replace(d, &stage->pattern, stage->text, stage->text_n, text, n, &state->out);
			text = state->out.data;
			n = state->out.n;
			break;
		case DECODE_METASPACE:
			replace(d, &stage->pattern, " ", is_first && stage->is_first_dropped ? 0 : 1, text, n, &state->out);
			text = state->out.data;
			n = state->out.n;
			break;
		case DECODE_STRIP:
			strip(stage, &text, &n);
			break;
		case DECODE_WORD_PIECE:
			word_piece(d, i, text, n, is_first);
			return;
		case DECODE_SUFFIX:
			if (!is_first)
				release(d, i, false);
			state->held.n = 0;
			add(d, &state->held, text, n);
			return;
		case DECODE_CTC:
			ctc(d, i, text, n, is_first);
			return;
	}
	hand_on(d, i + 1, text, n);
}

static bool
is_byte_level(const MillmTokenizer *tok)
{
	return tok->n_decoders == 1 && tok->decoders[0].kind == DECODE_BYTE_LEVEL;
}

static void
push(MillmDetok *d, int32_t id)
{
	const MillmTokenizer *tok = d->tok;
	const Token *token = &tok->tokens[id];

	if (!token->exists || (token->special && d->skip_special))
		return;
	if (is_byte_level(tok))
	{
		add(d, &d->carry, tok->decoded.data + token->bytes.offset, token->bytes.n);
		drain(d, 0, false, false);
	}
	else
		hand_on(d, 0, tok->contents.keys.data + token->content.offset, token->content.n);
}

static void
flush(MillmDetok *d)
{
	const MillmTokenizer *tok = d->tok;

	if (is_byte_level(tok))
		drain(d, 0, false, true);
	else
		for (int i = 0; i < tok->n_decoders; i++)
			if (tok->decoders[i].kind == DECODE_BYTE_FALLBACK)
				end_run(d, i + 1);
			else if (tok->decoders[i].kind == DECODE_SUFFIX && d->stages[i].is_begun)
				release(d, i, true);
}

static void
begin(MillmDetok *d, const MillmTokenizer *tok)
{
	*d = (MillmDetok) {.tok = tok};
	if (final_strip(tok))
		d->n_strip = final_strip(tok)->n_start;
}

static void
clear(MillmDetok *d)
{
	millm_bytes_free(&d->carry);
	for (int i = 0; i < d->tok->n_decoders; i++)
	{
		millm_bytes_free(&d->stages[i].out);
		millm_bytes_free(&d->stages[i].held);
		millm_bytes_free(&d->stages[i].spaced);
	}
	millm_bytes_free(&d->out);
}

static MillmCode
check_id(const MillmTokenizer *tok, int32_t id, MillmError *err)
{
	if (id < 0 || id >= tok->n_ids || !tok->tokens[id].exists)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "token id %d is not in the vocabulary", (int) id);
	return MILLM_OK;
}

/* Hand out what has been decoded, NUL-terminated. */
static MillmCode
give(MillmDetok *d, char **out, size_t *len, MillmError *err)
{
	add(d, &d->out, "", 1);
	if (d->no_memory)
	{
		clear(d);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	*len = d->out.n - 1;
	*out = d->out.data;
	d->out.data = NULL;
	clear(d);
	return MILLM_OK;
}

MillmCode
millm_decode(const MillmTokenizer *tok, const int32_t *ids, size_t n, bool skip_special,
			 char **out, size_t *len, MillmError *err)
{
	MillmDetok	d;

	for (size_t i = 0; i < n; i++)
	{
		MillmCode	rc = check_id(tok, ids[i], err);

		if (rc != MILLM_OK)
			return rc;
	}
	begin(&d, tok);
	d.skip_special = skip_special;
	d.is_whole = true;
	for (size_t i = 0; i < n && !d.no_memory; i++)
		push(&d, ids[i]);
	flush(&d);
	return give(&d, out, len, err);
}

MillmCode
millm_token_bytes(const MillmTokenizer *tok, int32_t id, char **out, size_t *len, MillmError *err)
{
	MillmDetok	d;
	const Token *token;
	const char *content;
	int			byte = -1;
	MillmCode	rc = check_id(tok, id, err);

	if (rc != MILLM_OK)
		return rc;
	token = &tok->tokens[id];
	content = tok->contents.keys.data + token->content.offset;
	begin(&d, tok);
	d.n_strip = 0;
	d.is_begun = true;
	for (int i = 0; i < tok->n_decoders; i++)
	{
		d.stages[i].is_begun = tok->decoders[i].kind != DECODE_SUFFIX;	/* which holds no token yet */
		if (tok->decoders[i].kind == DECODE_BYTE_FALLBACK && !token->special)
			byte = fallback_byte(content, token->content.n);
	}
	if (token->special)
		add(&d, &d.out, content, token->content.n);
	else if (byte >= 0)
		add(&d, &d.out, &(char) {(char) byte}, 1);
	else if (is_byte_level(tok))
		add(&d, &d.out, tok->decoded.data + token->bytes.offset, token->bytes.n);
	else
	{
		hand_on(&d, 0, content, token->content.n);
		for (int i = 0; i < tok->n_decoders; i++)
			if (tok->decoders[i].kind == DECODE_SUFFIX)
				release(&d, i, false);
	}
	return give(&d, out, len, err);
}

/* The most bytes that one token can become before it is given out; false: beyond reason. */
static bool
longest_rewritten(const MillmTokenizer *tok, size_t *longest)
{
	*longest = tok->longest > 3 ? tok->longest : 3; /* a U+FFFD */
	for (int i = 0; i < tok->n_decoders; i++)
		if (tok->decoders[i].kind == DECODE_REPLACE && tok->decoders[i].text_n > 1 &&
			!millm_mul_size(*longest, tok->decoders[i].text_n, longest))
			return false;
	*longest += (size_t) tok->n_decoders;	/* DECODE_WORD_PIECE's space */
	return *longest < SIZE_MAX / 64;
}

MillmDetok *
millm_detok_create(const MillmTokenizer *tok)
{
	MillmDetok *d = malloc(sizeof(*d));
	size_t		longest;
	bool		ok;

	if (!d)
		return NULL;
	begin(d, tok);
	d->skip_special = true;
	/* Room for the longest token behind a carry of 3 bytes, every byte of them a U+FFFD, and a NUL. */
	ok = longest_rewritten(tok, &longest) && millm_bytes_reserve(&d->carry, longest + 4);
	for (int i = 0; i < tok->n_decoders && ok; i++)
		ok = millm_bytes_reserve(&d->stages[i].out, longest) && millm_bytes_reserve(&d->stages[i].held, longest) &&
			millm_bytes_reserve(&d->stages[i].spaced, longest);
	if (!ok || !millm_bytes_reserve(&d->out, 4 * (longest + 4) + 2))
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
