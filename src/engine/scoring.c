/*
 * scoring.c -- from texts to tokens, and from logits to how probable these were.
 *
 *     texts -> tokens -> groups (texts.h) -> logits of each position -> logprob of the token that follows -> sum of its text
 *
 * Logits are those of a step, never of a whole text: what is kept of a text is its sum.  Logprobs and sums are in double, in the order of positions, so that
 * where the scheduler cut cannot be seen.
 *
 * With a prompt, the slot's tokens are first the prompt, then group after group of labels, without leaving: all together they are no more than a long
 * prompt.  What the prefix cache has of the prompt is not computed.  A preempted request begins with the prompt again, then the labels that were not done.
 */
#include "scoring.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "generation.h"
#include "texts.h"

/* Logprobs of tokens in one piece. */
#define PIECE_TOKENS 256

struct MillmScoring
{
	MillmTextRun run;
	MillmScore *scores;			/* [n_texts] */
	int32_t    *prompt;			/* [n_prompt]: what the texts continue */
	int			n_prompt;		/* 0: nothing */
	int			planned_length;	/* of the prompt with the longest label */
	MillmSequence *trunk;		/* the prompt's; NULL: none, or no room yet */
	int			n_before;		/* tokens of the slot before those of the group */
	int			n_shown;		/* tokens that the sink has been told of: none is told twice */
};

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

MillmScoring *
scoring_create(void)
{
	return calloc(1, sizeof(MillmScoring));
}

void
scoring_free(MillmScoring *s)
{
	if (!s)
		return;
	text_run_reset(&s->run);
	free(s->scores);
	free(s->prompt);
	free(s);
}

const MillmScore *
scoring_scores(const MillmScoring *s)
{
	return s->scores;
}

/* ---- texts by themselves ----------------------------------------------------------------------- */

static void
form_group(MillmRequest *r)
{
	const int	context = r->loaded->context_length;

	r->choices[0].slot.wants_rows = true;
	r->choices[0].slot.n_tokens = text_run_form(&r->scoring->run, context < MILLM_GROUP_POSITIONS ? context : MILLM_GROUP_POSITIONS);
}

static MillmCode
begin_texts(MillmRequest *r, const MillmTexts *texts, MillmError *err)
{
	const MillmEncodeOptions options = {.add_special = true, .parse_special = true};
	MillmTextRun *run = &r->scoring->run;
	MillmIds	ids = {0};
	MillmCode	rc = MILLM_OK;

	for (size_t at = 0; rc == MILLM_OK && run->n_texts < texts->n; at = texts->ends[run->n_texts - 1])
	{
		const size_t before = ids.n, i = run->n_texts;

		rc = millm_encode(r->loaded->tokenizer, texts->bytes + at, texts->ends[i] - at, options, 0, &ids, err);
		if (rc == MILLM_OK)
			rc = text_check(r, texts, i, &ids, before, "logprobs", "Score", err);
		run->ends[run->n_texts++] = ids.n;
	}
	run->tokens = ids.ids;		/* ours now, whatever came */
	r->n_prompt = (int) ids.n;	/* a request's bytes are fewer than an int counts */
	if (rc == MILLM_OK)
		form_group(r);
	return rc;
}

/* ---- labels ------------------------------------------------------------------------------------- */

/* What a label makes of the prompt: of the prompt's own tokens the first n_common are there, and these follow them. */
typedef struct Continuation
{
	size_t		n_common;
	MillmIds	ids;
} Continuation;

static MillmCode
check_labels(const MillmTexts *labels, MillmError *err)
{
	for (size_t i = 0, at = 0; i < labels->n; at = labels->ends[i++])
	{
		const size_t len = labels->ends[i] - at;

		if (len == 0)
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "a label is empty");
			millm_detail(err, "It is label %zu.", i + 1);
			return MILLM_E_INVALID_ARGUMENT;
		}
		for (size_t k = 0, other = 0; k < i; other = labels->ends[k++])
			if (labels->ends[k] - other == len && memcmp(labels->bytes + other, labels->bytes + at, len) == 0)
			{
				millm_fail(err, MILLM_E_INVALID_ARGUMENT, "a label is there twice");
				millm_detail(err, "Labels %zu and %zu are the same.", k + 1, i + 1);
				return MILLM_E_INVALID_ARGUMENT;
			}
	}
	return MILLM_OK;
}

/* Do so many tokens fit the context: of the prompt, with a label behind it if that is not 0? */
static MillmCode
check_length(const MillmRequest *r, size_t n, size_t label, MillmError *err)
{
	const int	context = r->loaded->context_length;

	if (n <= (size_t) context)
		return MILLM_OK;
	millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "prompt and labels do not fit the context");
	if (label == 0)
		millm_detail(err, "The prompt has %zu tokens; the context holds %d.", n, context);
	else
		millm_detail(err, "The prompt and label %zu have %zu tokens; the context holds %d.", label, n, context);
	millm_hint(err, "Shorten the prompt, or load the model with a larger context length.");
	return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
}

/* Encode the prompt with a label behind it: label i, of len bytes; text and origins have room for it. */
static MillmCode
encode_label(const MillmRequest *r, const MillmIds *prompt, char *text, uint8_t *origins, size_t n_text, MillmEncodeOptions options, const char *label,
			 size_t len, size_t i, Continuation *out, MillmError *err)
{
	MillmCode	rc;

	if (atomic_load(&r->is_canceled))
		return millm_fail(err, MILLM_E_CANCELED, "scoring canceled");
	memcpy(text + n_text, label, len);
	memset(origins + n_text, 1, len);	/* a person wrote it */
	if ((rc = millm_encode(r->loaded->tokenizer, text, n_text + len, options, 0, &out->ids, err)) != MILLM_OK)
		return rc;
	if ((rc = check_length(r, out->ids.n, i + 1, err)) != MILLM_OK ||
		(rc = tokens_check(r, "text", out->ids.ids, out->ids.n, err)) != MILLM_OK)
		return rc;
	while (out->n_common < prompt->n && out->n_common < out->ids.n && out->ids.ids[out->n_common] == prompt->ids[out->n_common])
		out->n_common++;
	out->ids.n -= out->n_common;
	memmove(out->ids.ids, out->ids.ids + out->n_common, out->ids.n * sizeof(*out->ids.ids));
	return MILLM_OK;
}

/* Where the prompt ends and the labels begin, as scoring.h says; fills the run.  The prompt's ids become the scoring's. */
static MillmCode
divide(MillmRequest *r, MillmIds *prompt, const Continuation *continuations, size_t n, MillmError *err)
{
	MillmScoring *s = r->scoring;
	size_t		n_prompt = prompt->n, total = 0, longest = 0;

	for (size_t i = 0; i < n; i++)
		n_prompt = continuations[i].n_common < n_prompt ? continuations[i].n_common : n_prompt;
	if (n_prompt == 0)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the prompt has no token that the labels leave as it is");
		millm_hint(err, "Write at least a word before the labels.");
		return MILLM_E_INVALID_ARGUMENT;
	}
	for (size_t i = 0; i < n; i++)
	{
		const size_t length = continuations[i].n_common - n_prompt + continuations[i].ids.n;

		if (continuations[i].ids.n == 0)
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "a label has no tokens");
			millm_detail(err, "Label %zu adds none to those of the prompt.", i + 1);
			return MILLM_E_INVALID_ARGUMENT;
		}
		total += length;
		longest = length > longest ? length : longest;
	}
	s->run.tokens = malloc(total * sizeof(*s->run.tokens));
	if (!s->run.tokens)
		return out_of_memory(err);
	for (size_t i = 0, at = 0; i < n; i++)
	{
		const Continuation *c = &continuations[i];
		const size_t n_of_prompt = c->n_common - n_prompt;

		memcpy(s->run.tokens + at, prompt->ids + n_prompt, n_of_prompt * sizeof(*s->run.tokens));
		memcpy(s->run.tokens + at + n_of_prompt, c->ids.ids, c->ids.n * sizeof(*s->run.tokens));
		s->run.ends[s->run.n_texts++] = at += n_of_prompt + c->ids.n;
	}
	s->run.n_unread = 1;
	s->n_prompt = (int) n_prompt;
	s->planned_length = (int) (n_prompt + longest);
	s->prompt = prompt->ids;
	*prompt = (MillmIds) {0};
	r->n_prompt = (int) (n_prompt + total);	/* at most MILLM_MAX_LABELS contexts */
	r->choices[0].slot.n_tokens = s->n_prompt;
	return MILLM_OK;
}

static MillmCode
begin_labels(MillmRequest *r, const MillmPrompt *prompt, const MillmTexts *labels, MillmError *err)
{
	MillmEncodeOptions options = {.add_special = !prompt->origins, .parse_special = !prompt->plain};
	size_t		longest = 0;
	MillmIds	ids = {0};
	Continuation *continuations = NULL;
	char	   *text = NULL;
	uint8_t    *origins = NULL;
	MillmCode	rc = check_labels(labels, err);

	if (rc != MILLM_OK)
		return rc;
	for (size_t i = 0, at = 0; i < labels->n; at = labels->ends[i++])
		longest = labels->ends[i] - at > longest ? labels->ends[i] - at : longest;
	continuations = calloc(labels->n, sizeof(*continuations));
	text = malloc(prompt->len + longest);
	origins = malloc(prompt->len + longest);
	if (!continuations || !text || !origins)
		rc = out_of_memory(err);
	else
	{
		memcpy(text, prompt->text, prompt->len);
		if (prompt->origins)
		{
			memcpy(origins, prompt->origins, prompt->len);
			options.origins = origins;
		}
		rc = millm_encode(r->loaded->tokenizer, text, prompt->len, options, 0, &ids, err);
	}
	if (rc == MILLM_OK)
		rc = check_length(r, ids.n, 0, err);
	for (size_t i = 0, at = 0; rc == MILLM_OK && i < labels->n; at = labels->ends[i++])
		rc = encode_label(r, &ids, text, origins, prompt->len, options, labels->bytes + at, labels->ends[i] - at, i, &continuations[i], err);
	if (rc == MILLM_OK)
		rc = divide(r, &ids, continuations, labels->n, err);
	for (size_t i = 0; continuations && i < labels->n; i++)
		millm_ids_free(&continuations[i].ids);
	free(continuations);
	free(text);
	free(origins);
	millm_ids_free(&ids);
	return rc;
}

MillmCode
scoring_begin(MillmRequest *r, const MillmPrompt *prompt, const MillmTexts *texts, MillmError *err)
{
	MillmScoring *s = r->scoring;

	s->run.ends = malloc(texts->n * sizeof(*s->run.ends));
	s->scores = calloc(texts->n, sizeof(*s->scores));
	if (!s->run.ends || !s->scores)
		return out_of_memory(err);
	return prompt ? begin_labels(r, prompt, texts, err) : begin_texts(r, texts, err);
}

/* ---- in the KV cache ---------------------------------------------------------------------------- */

bool
scoring_reserve(MillmRequest *r, MillmForward *fw)
{
	MillmScoring *s = r->scoring;
	MillmSlot  *slot = &r->choices[0].slot;

	if (slot->n_past >= s->n_prompt)
		return text_run_reserve(&s->run, fw, slot->n_past > s->n_before);
	if (!s->trunk && (s->trunk = millm_sequence_create(fw, s->planned_length)) && s->n_prompt > MIN_COMPUTED)
		slot->n_past = millm_sequence_share(s->trunk, s->prompt, s->n_prompt - MIN_COMPUTED);
	if (s->trunk && millm_sequence_reserve(s->trunk, s->n_prompt))
	{
		if (!slot->is_running && slot->n_preempted == 0)
			r->n_cached = slot->n_past;
		return true;
	}
	if (!slot->is_running)
	{
		millm_sequence_free(s->trunk);
		s->trunk = NULL;
		slot->n_past = 0;
	}
	return false;
}

void
scoring_release(MillmRequest *r)
{
	MillmScoring *s = r->scoring;

	text_run_release(&s->run);
	millm_sequence_free(s->trunk);
	s->trunk = s->run.trunk = NULL;
	if (s->n_prompt == 0)
		form_group(r);
	else
	{
		s->run.n_group = 0;
		r->choices[0].slot.wants_rows = false;
		r->choices[0].slot.n_tokens = s->n_prompt;
	}
}

/* ---- steps -------------------------------------------------------------------------------------- */

/* Is there a token after this one, which its logits score? */
static bool
has_next(const MillmTextRun *run, MillmTextToken at)
{
	return at.index + 1 < text_length(run, at.text);
}

void
scoring_fill(const MillmRequest *r, int n_tokens, MillmBatchToken *batch)
{
	const MillmScoring *s = r->scoring;
	const int	n_past = r->choices[0].slot.n_past;
	MillmTextToken at;

	if (n_past < s->n_prompt)
	{
		for (int pos = n_past; pos < n_past + n_tokens; pos++)
			*batch++ = (MillmBatchToken) {.seq = s->trunk, .position = pos, .token = s->prompt[pos], .want_logits = pos == s->n_prompt - 1};
		return;
	}
	at = text_run_seek(&s->run, n_past - s->n_before);
	for (int i = 0; i < n_tokens; i++, at = text_run_next(&s->run, at))
	{
		batch[i] = text_run_batch_token(&s->run, at);
		batch[i].want_logits = has_next(&s->run, at);
	}
}

/* The labels that run next, beside the prompt. */
static MillmCode
form_labels(MillmRequest *r, MillmForward *fw, MillmError *err)
{
	MillmScoring *s = r->scoring;
	MillmSlot  *slot = &r->choices[0].slot;
	const int64_t pages = millm_kv_pages_total(fw) - millm_kv_pages_needed(fw, s->n_prompt);
	const int64_t n_positions = pages / millm_kv_pages_needed(fw, 1) * MILLM_KV_PAGE_TOKENS;	/* a position is in a page of each group of layers */
	const int	n = text_run_form(&s->run, n_positions < MILLM_GROUP_POSITIONS ? (int) n_positions : MILLM_GROUP_POSITIONS);

	if (n > 0 && s->n_prompt % MILLM_KV_PAGE_TOKENS + text_n_computed(&s->run, s->run.first) > n_positions)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "prompt and label do not fit the KV cache");
		millm_detail(err, "The prompt has %d tokens and label %zu has %d; the KV cache holds %lld pages of %d.", s->n_prompt, s->run.first + 1,
					 text_length(&s->run, s->run.first), (long long) millm_kv_pages_total(fw), MILLM_KV_PAGE_TOKENS);
		millm_hint(err, "Shorten the prompt, or raise millm.kv_cache_size.");
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	slot->wants_rows = true;
	s->n_before = slot->n_past;
	slot->n_tokens = slot->n_past + n;
	return MILLM_OK;
}

/* What the prompt makes of the first token of each label that is not done. */
static void
score_first(MillmScoring *s, const float *logits, int vocab)
{
	const double shift = millm_log_sum_exp(logits, vocab);

	for (size_t i = s->run.n_done; i < s->run.n_texts; i++)
		s->scores[i] = (MillmScore) {logits[text_token(&s->run, i, 0)] - shift, 1};
}

/* Logprobs for the sink, as many as fit into a piece. */
typedef struct Piece
{
	MillmLogprob rows[PIECE_TOKENS];
	int			n;
} Piece;

static void
send_piece(const MillmRequest *r, Piece *piece)
{
	const MillmPiece out = {.text = "", .logprobs = piece->rows, .n_tokens = piece->n};

	if (piece->n > 0)
		r->sink.piece(r->sink.arg, &out);
	piece->n = 0;
}

/* Tell the sink of a token, unless it has been told before. */
static void
show(MillmRequest *r, Piece *piece, int index, int32_t id, float logprob)
{
	MillmScoring *s = r->scoring;

	if (!r->sink.piece || index < s->n_shown)
		return;
	s->n_shown = index + 1;
	piece->rows[piece->n++] = (MillmLogprob) {id, logprob};
	if (piece->n == PIECE_TOKENS)
		send_piece(r, piece);
}

/* The rows of the group's tokens. */
static void
score_group(MillmRequest *r, int n_tokens, const float **logits, int vocab)
{
	MillmScoring *s = r->scoring;
	MillmTextRun *run = &s->run;
	MillmTextToken at = text_run_seek(run, r->choices[0].slot.n_past - s->n_before - n_tokens);
	Piece		piece = {.n = 0};

	for (int i = 0; i < n_tokens; i++, at = text_run_next(run, at))
	{
		MillmScore *score = &s->scores[at.text];

		if (at.index == 0 && s->n_prompt == 0)
		{
			*score = (MillmScore) {0};
			show(r, &piece, 0, text_token(run, at.text, 0), NAN);
		}
		if (has_next(run, at))
		{
			const int32_t next = text_token(run, at.text, at.index + 1);
			const double logprob = (*logits)[next] - millm_log_sum_exp(*logits, vocab);

			score->logprob += logprob;
			score->n++;
			show(r, &piece, at.index + 1, next, millm_as_logprob(logprob));
			*logits += vocab;
		}
		if (at.index == text_n_computed(run, at.text) - 1)
			run->n_done = at.text + 1;
	}
	send_piece(r, &piece);
}

MillmCode
scoring_take(MillmRequest *r, MillmForward *fw, int n_tokens, const float **logits, MillmError *err)
{
	MillmScoring *s = r->scoring;
	MillmSlot  *slot = &r->choices[0].slot;
	const int	vocab = r->loaded->model->config.vocab_size;
	MillmCode	rc = MILLM_OK;

	if (slot->n_past < s->n_prompt)
		return MILLM_OK;
	if (slot->n_past - n_tokens < s->n_prompt)
	{
		score_first(s, *logits, vocab);
		*logits += vocab;
		s->run.trunk = s->trunk;
	}
	else
		score_group(r, n_tokens, logits, vocab);
	if (s->n_prompt > 0 && slot->n_past == slot->n_tokens)
	{
		text_run_release(&s->run);
		rc = form_labels(r, fw, err);
		r->choices[0].is_finished = slot->n_past == slot->n_tokens;
	}
	else if (s->n_prompt == 0)
		r->choices[0].is_finished = s->run.n_done == s->run.n_texts;
	return rc;
}
