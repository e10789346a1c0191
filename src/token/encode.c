/*
 * encode.c -- text to ids.
 *
 * The text is cut, never copied, as long as nothing rewrites it: first at the added tokens, then, segment by
 * segment, into words by the pre-tokenizers, each handing its pieces on to the next, and the last to the
 * model.  So the memory of a call is that of its longest word, whatever the length of the text.
 *
 * Added tokens are looked for twice: in the raw text, and in each normalized segment.  The details (a rejected
 * match consumes its text; white space that a token swallowed can be found again) are the genuine library's.
 */
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"
#include "unicode.h"

#define MAX_TEXT_BYTES (UINT32_C(1) << 30)	/* so that positions fit an int32_t */

typedef struct Run
{
	const MillmTokenizer *tok;
	MillmEncodeOptions options;
	size_t		max_tokens;
	size_t		n_tokens;		/* so far, also those beyond max_tokens, which are only counted */
	MillmIds   *out;
	MillmError *err;
	BpeScratch	bpe;
	LexiconScratch lexicon;
	PatternScratch pattern;
	Bytes		normalized[2];
	const char *text;			/* all of it */
	const char *segment;		/* of the text: what was normalized last */
	size_t		segment_n;
	bool		is_rewritten;	/* by the normalizer: positions in it are not those in the text */
	size_t	   *seen;			/* [n_added] of each token: the segment is searched up to here; NULL before it is needed */
	Bytes		rewritten[MAX_STAGES];	/* by the pre-tokenizer of that number */
} Run;

static MillmCode
out_of_memory(Run *run)
{
	return millm_fail(run->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

static MillmCode
add_ids(Run *run, const int32_t *ids, size_t n)
{
	MillmIds   *out = run->out;

	run->n_tokens += n;
	if (run->max_tokens > 0 && run->n_tokens > run->max_tokens)
		return MILLM_OK;		/* counted, for the message */
	if (out->capacity - out->n < n)
	{
		size_t		capacity = out->capacity * 2 > out->n + n ? out->capacity * 2 : out->n + n + 64;
		int32_t    *grown = realloc(out->ids, capacity * sizeof(*grown));

		if (!grown)
			return out_of_memory(run);
		out->ids = grown;
		out->capacity = capacity;
	}
	if (n > 0)
		memcpy(out->ids + out->n, ids, n * sizeof(*ids));
	out->n += n;
	return MILLM_OK;
}

/* ---- pre-tokenizers ---- */

static MillmCode pre_tokenize(Run *run, int stage, const char *text, size_t n, bool is_origin);

typedef struct Piece
{
	size_t		start;
	size_t		end;
	bool		is_match;
} Piece;

/* Does this piece become one with the piece before it? */
static bool
joins(Behavior behavior, const Piece *before, const Piece *piece)
{
	switch (behavior)
	{
		case SPLIT_MERGED_WITH_PREVIOUS:
			return piece->is_match && !before->is_match;
		case SPLIT_MERGED_WITH_NEXT:
			return !piece->is_match && before->is_match;
		case SPLIT_CONTIGUOUS:
			return piece->is_match == before->is_match;
		case SPLIT_REMOVED:
		case SPLIT_ISOLATED:
			break;
	}
	return false;
}

/* Cut text at the matches of a pattern. */
static MillmCode
split(Run *run, int stage, const char *text, size_t n, bool is_origin)
{
	const PreTokenizer *pre = &run->tok->pre[stage];
	Piece		held = {0};		/* the piece that the next one may join */
	bool		is_held = false;
	bool		is_begun = false;	/* there was a match, which ended at done */
	bool		last = false;	/* is_match of the last piece that was seen */
	size_t		done = 0;		/* the text before this is in pieces */
	size_t		from = 0;
	MillmCode	rc;

	while (done < n)
	{
		Piece		pieces[2];	/* the gap before a match, and the match */
		bool		found;
		size_t		start;
		size_t		end;

		rc = millm_pattern_find(&pre->pattern, &run->pattern, text, n, from, &found, &start, &end, run->err);
		if (rc != MILLM_OK)
			return rc;
		if (found && start == end && is_begun && start == done)
		{
			uint32_t	cp;

			from += millm_utf8_get(text + end, &cp);	/* an empty match that touches another is none */
			continue;
		}
		is_begun = is_begun || found;
		pieces[0] = (Piece) {done, start, pre->invert};
		pieces[1] = (Piece) {start, end, found != pre->invert};
		for (int i = 0; i < (found ? 2 : 1); i++)
		{
			Piece	   *piece = &pieces[i];

			if (i == 0 && piece->start == piece->end)
				continue;		/* no gap */
			if (is_held && joins(pre->behavior, &(Piece) {0, 0, last}, piece))
				held.end = piece->end;
			else
			{
				if (is_held && (pre->behavior != SPLIT_REMOVED || !held.is_match) &&
					(rc = pre_tokenize(run, stage + 1, text + held.start, held.end - held.start,
									   is_origin && held.start == 0)) != MILLM_OK)
					return rc;
				held = *piece;
				is_held = true;
			}
			last = piece->is_match;
		}
		done = from = end;
		if (found && start == end)	/* an empty match: look on behind the next character */
		{
			uint32_t	cp;

			if (end == n)
				break;
			from += millm_utf8_get(text + end, &cp);
		}
	}
	if (!is_held || (pre->behavior == SPLIT_REMOVED && held.is_match))
		return MILLM_OK;
	return pre_tokenize(run, stage + 1, text + held.start, held.end - held.start, is_origin && held.start == 0);
}

static MillmCode
prefix_space(Run *run, int stage, const char *text, size_t n, bool is_origin)
{
	Bytes	   *out = &run->rewritten[stage];

	if (text[0] == ' ')
		return pre_tokenize(run, stage + 1, text, n, is_origin);
	out->n = 0;
	if (!millm_bytes_add(out, " ", 1) || !millm_bytes_add(out, text, n))
		return out_of_memory(run);
	return pre_tokenize(run, stage + 1, out->data, out->n, is_origin);
}

static MillmCode
metaspace(Run *run, int stage, const char *text, size_t n, bool is_origin)
{
	const PreTokenizer *pre = &run->tok->pre[stage];
	Bytes	   *out = &run->rewritten[stage];
	bool		starts = text[0] == ' ' || (n >= pre->text_n && memcmp(text, pre->text, pre->text_n) == 0);

	out->n = 0;
	if (!starts && (pre->prepend == PREPEND_ALWAYS || (pre->prepend == PREPEND_FIRST && is_origin)) &&
		!millm_bytes_add(out, pre->text, pre->text_n))
		return out_of_memory(run);
	for (size_t i = 0; i < n; i++)
		if (!(text[i] == ' ' ? millm_bytes_add(out, pre->text, pre->text_n) : millm_bytes_add(out, text + i, 1)))
			return out_of_memory(run);
	return pre_tokenize(run, stage + 1, out->data, out->n, is_origin);
}

static MillmCode
letters(Run *run, int stage, const char *text, size_t n, bool is_origin)
{
	Bytes	   *out = &run->rewritten[stage];

	if (!millm_bytes_to_letters(text, n, out))
		return out_of_memory(run);
	return pre_tokenize(run, stage + 1, out->data, out->n, is_origin);
}

static MillmCode
encode_word(Run *run, const char *word, size_t n)
{
	MillmCode	rc;

	if (run->tok->is_bpe)
	{
		if (!millm_bpe_encode(&run->tok->bpe, &run->bpe, word, n))
			return out_of_memory(run);
		return add_ids(run, run->bpe.ids, run->bpe.n);
	}
	rc = millm_lexicon_encode(&run->tok->lexicon, &run->lexicon, word, n, run->err);
	return rc == MILLM_OK ? add_ids(run, run->lexicon.ids, run->lexicon.n) : rc;
}

/* Give text to the pre-tokenizer of that number, or to the model behind the last.  is_origin: it begins the input. */
static MillmCode
pre_tokenize(Run *run, int stage, const char *text, size_t n, bool is_origin)
{
	if (n == 0)
		return MILLM_OK;
	if (stage == run->tok->n_pre)
		return encode_word(run, text, n);
	switch (run->tok->pre[stage].kind)
	{
		case PRE_PREFIX_SPACE:
			return prefix_space(run, stage, text, n, is_origin);
		case PRE_METASPACE:
			return metaspace(run, stage, text, n, is_origin);
		case PRE_LETTERS:
			return letters(run, stage, text, n, is_origin);
		case PRE_SPLIT:
			break;
	}
	return split(run, stage, text, n, is_origin);
}

/* ---- added tokens ---- */

/* The longest pattern at the start of text, or NULL. */
static const AddedPattern *
longest_at(const AddedSet *set, const char *text, size_t n)
{
	uint32_t	low = set->first[(unsigned char) text[0]];
	uint32_t	high = set->first[(unsigned char) text[0] + 1];
	const AddedPattern *best = NULL;

	/* low..high: the patterns that agree with the text in its first `depth` bytes */
	for (size_t depth = 1; low < high; depth++)
	{
		uint32_t	end;

		if (set->patterns[low].n == depth)
		{
			best = &set->patterns[low];
			while (low < high && set->patterns[low].n == depth)
				low++;
		}
		if (depth == n)
			break;
		for (end = high; low < end;)
		{
			uint32_t	middle = low + (end - low) / 2;

			if ((unsigned char) set->patterns[middle].text[depth] < (unsigned char) text[depth])
				low = middle + 1;
			else
				end = middle;
		}
		for (uint32_t first = low; first < high;)
		{
			uint32_t	middle = first + (high - first) / 2;

			if ((unsigned char) set->patterns[middle].text[depth] == (unsigned char) text[depth])
				first = middle + 1;
			else
				high = middle;
		}
	}
	return best;
}

static bool
is_part_of_word(const char *text, size_t n, size_t start, size_t end)
{
	uint32_t	cp;

	if (start > 0)
	{
		(void) millm_utf8_get(millm_utf8_before(text + start), &cp);
		if (millm_unicode_is_word_rust(cp))
			return true;
	}
	if (end < n)
	{
		(void) millm_utf8_get(text + end, &cp);
		return millm_unicode_is_word_rust(cp);
	}
	return false;
}

/*
 * Are all bytes of this special token, found at text + start, the template's?  Where the normalizer rewrote the text, the nth
 * match of a token in it is the nth in the segment, and none when the segment has not so many.
 */
static bool
is_of_template(Run *run, uint32_t token, const char *text, size_t start, size_t n)
{
	const uint8_t *origins = run->options.origins;
	Span		content = run->tok->added[token].content;
	const char *found = text + start;

	if (run->is_rewritten)
	{
		size_t	   *seen = &run->seen[token];

		found = memmem(run->segment + *seen, run->segment_n - *seen, run->tok->contents.keys.data + content.offset, content.n);
		if (!found)
			return false;
		n = content.n;
		*seen = (size_t) (found - run->segment) + n;
	}
	return memchr(origins + (found - run->text), 1, n) == NULL;
}

typedef MillmCode (*SegmentHandler) (Run *run, const char *text, size_t n, bool is_origin);

/* Cut text at the added tokens of a set; what is between them goes to next. */
static MillmCode
extract(Run *run, const AddedSet *set, const char *text, size_t n, bool is_origin, SegmentHandler next)
{
	size_t		done = 0;
	size_t		i = 0;
	MillmCode	rc;

	if (set->n == 0)
		return next(run, text, n, is_origin);
	while (i < n)
	{
		const AddedPattern *match;
		const AddedToken *token;
		size_t		start = i;
		size_t		end;

		match = longest_at(set, text + i, n - i);
		if (!match)
		{
			i++;
			continue;
		}
		i = end = start + match->n;
		token = &run->tok->added[match->token];
		if (token->special && (!run->options.parse_special ||
							   (run->options.origins && !is_of_template(run, match->token, text, start, match->n))))
			continue;
		if (token->single_word && is_part_of_word(text, n, start, end))
			continue;
		if (token->lstrip)
			while (start > done)
			{
				const char *before = millm_utf8_before(text + start);
				uint32_t	cp;

				(void) millm_utf8_get(before, &cp);
				if (!millm_unicode_is_space(cp))
					break;
				start = (size_t) (before - text);
			}
		if (token->rstrip)
			while (end < n)
			{
				uint32_t	cp;
				unsigned	length = millm_utf8_get(text + end, &cp);

				if (!millm_unicode_is_space(cp))
					break;
				end += length;
			}
		if (done < start && (rc = next(run, text + done, start - done, is_origin && done == 0)) != MILLM_OK)
			return rc;
		if ((rc = add_ids(run, &token->id, 1)) != MILLM_OK)
			return rc;
		done = end;
	}
	return done < n ? next(run, text + done, n - done, is_origin && done == 0) : MILLM_OK;
}

static MillmCode
encode_segment(Run *run, const char *text, size_t n, bool is_origin)
{
	return pre_tokenize(run, 0, text, n, is_origin);
}

static MillmCode
normalize_segment(Run *run, const char *text, size_t n, bool is_origin)
{
	const char *normal;
	size_t		normal_n;
	bool		is_moved;
	MillmCode	rc;

	rc = millm_normalize(run->tok, &run->pattern, text, n, run->normalized, &normal, &normal_n, &is_moved, run->err);
	if (rc != MILLM_OK)
		return rc;
	run->is_rewritten = normal != text;
	if (run->is_rewritten && run->options.origins && run->tok->normalized.n > 0)
	{
		run->segment = text;
		run->segment_n = n;
		free(run->seen);
		run->seen = calloc(run->tok->n_added, sizeof(*run->seen));
		if (!run->seen)
			return out_of_memory(run);
	}
	rc = extract(run, &run->tok->normalized, normal, normal_n, is_origin && !is_moved, encode_segment);
	run->is_rewritten = false;
	return rc;
}

MillmCode
millm_encode(const MillmTokenizer *tok, const char *text, size_t len, MillmEncodeOptions options,
			 size_t max_tokens, MillmIds *out, MillmError *err)
{
	Run			run = {.tok = tok, .options = options, .max_tokens = max_tokens, .out = out, .err = err, .text = text};
	size_t		n_before = out->n;
	size_t		bad;
	MillmCode	rc = MILLM_OK;

	if (len > MAX_TEXT_BYTES)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "text of %zu bytes is too long, the limit is %u",
						  len, (unsigned) MAX_TEXT_BYTES);
	if (!millm_utf8_is_valid(text, len, &bad))
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "text is not valid UTF-8 at byte offset %zu", bad);

	if (options.add_special)
		rc = add_ids(&run, tok->before, tok->n_before);
	if (rc == MILLM_OK)
		rc = extract(&run, &tok->raw, text, len, true, normalize_segment);
	if (rc == MILLM_OK && options.add_special)
		rc = add_ids(&run, tok->after, tok->n_after);
	if (rc == MILLM_OK && max_tokens > 0 && run.n_tokens > max_tokens)
	{
		rc = millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "text is %zu tokens long, the limit is %zu",
						run.n_tokens, max_tokens);
		millm_hint(err, "Shorten the text.");
	}
	if (rc != MILLM_OK)
		out->n = n_before;
	millm_bpe_scratch_free(&run.bpe);
	millm_lexicon_scratch_free(&run.lexicon);
	millm_pattern_scratch_free(&run.pattern);
	millm_bytes_free(&run.normalized[0]);
	millm_bytes_free(&run.normalized[1]);
	free(run.seen);
	for (int i = 0; i < tok->n_pre; i++)
		millm_bytes_free(&run.rewritten[i]);
	return rc;
}

void
millm_ids_free(MillmIds *ids)
{
	free(ids->ids);
	*ids = (MillmIds) {0};
}
