/*
 * embedding.c -- from texts to tokens, and from hidden states to embeddings.
 *
 *     texts -> tokens -> groups -> hidden states -> pooled as MillmPooling says -> sink
 *
 * A group is texts whose KV pages together hold no more than a step computes, or one text that is longer.  Its tokens are one run for the scheduler,
 * which cuts it into chunks as it likes; sums are in double and in the order of positions, so that where it cut cannot be seen.
 *
 * What a preempted request has to compute again is at most the texts of a group that were not done: those that were have been handed over.
 */
#include "embedding.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "generation.h"

/* Positions in the pages of a group; not more than a step, for which even layers with a window have room. */
#define GROUP_POSITIONS	MILLM_BATCH_TOKENS
#define MAX_GROUP		(GROUP_POSITIONS / MILLM_KV_PAGE_TOKENS)

struct MillmEmbedding
{
	int32_t    *tokens;			/* of all texts, one after the other */
	size_t	   *ends;			/* [n_texts]: where each ends in tokens */
	size_t		n_texts;
	size_t		n_done;			/* handed over */
	size_t		first;			/* of the group */
	int			n_group;
	MillmSequence *seqs[MAX_GROUP];	/* [n_group]; NULL: no room yet */
	int			width;			/* of a hidden state */
	double	   *pooled;			/* [n_modes, width]: of the text in work */
	float	   *values;			/* [n_modes, width]: what it becomes */
};

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

static size_t
begin_of(const MillmEmbedding *e, size_t text)
{
	return text == 0 ? 0 : e->ends[text - 1];
}

static int
length_of(const MillmEmbedding *e, size_t text)
{
	return (int) (e->ends[text] - begin_of(e, text));	/* at most the context's */
}

/* As many texts as fit, from the first that is not done. */
static void
form_group(MillmRequest *r)
{
	MillmEmbedding *e = r->embedding;
	const int	context = r->loaded->context_length;
	int			left = context < GROUP_POSITIONS ? context : GROUP_POSITIONS;

	e->first = e->n_done;
	e->n_group = 0;
	r->choices[0].slot.n_tokens = 0;
	while (e->n_group < MAX_GROUP && e->first + (size_t) e->n_group < e->n_texts)
	{
		int			n = length_of(e, e->first + (size_t) e->n_group);
		int			held = (n + MILLM_KV_PAGE_TOKENS - 1) / MILLM_KV_PAGE_TOKENS * MILLM_KV_PAGE_TOKENS;

		if (held > left && e->n_group > 0)
			break;
		left -= held;
		r->choices[0].slot.n_tokens += n;
		e->n_group++;
	}
}

/* "Text 3 of the array", or "The text" where there is no array. */
static void
name_text(char name[48], const MillmTexts *texts, size_t i)
{
	if (texts->first > 0)
		snprintf(name, 48, "Text %lld of the array", (long long) texts->first + (long long) i);
	else
		snprintf(name, 48, "The text");
}

static MillmCode
check_length(const MillmRequest *r, const MillmTexts *texts, size_t i, size_t n, MillmError *err)
{
	const int	context = r->loaded->context_length;
	const int	own = r->loaded->model->pooling.max_tokens;
	char		name[48];

	name_text(name, texts, i);
	if (n == 0)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "an empty text has no embedding");
		millm_detail(err, "%s has no tokens.", name);
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (n > (size_t) context)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "text does not fit the context");
		millm_detail(err, "%s has %zu tokens; the context holds %d.", name, n, context);
		millm_hint(err, "Embed it in parts, or load the model with a larger context length.");
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	if (own > 0 && n > (size_t) own)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "text is too long for an embedding of this model");
		millm_detail(err, "%s has %zu tokens; the model's sentence_bert_config.json allows %d.", name, n, own);
		millm_hint(err, "Embed it in parts.");
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	return MILLM_OK;
}

MillmCode
embedding_encode(const MillmLoaded *loaded, const char *text, size_t len, MillmIds *ids, MillmError *err)
{
	const MillmEncodeOptions options = {.add_special = true, .parse_special = true};
	const char *prompt = loaded->model->pooling.prompt;
	const size_t n_prompt = prompt ? strlen(prompt) : 0;
	char	   *whole;
	MillmCode	rc;

	if (n_prompt == 0)
		return millm_encode(loaded->tokenizer, text, len, options, 0, ids, err);
	if (!(whole = malloc(n_prompt + len)))
		return out_of_memory(err);
	memcpy(whole, prompt, n_prompt);
	memcpy(whole + n_prompt, text, len);
	rc = millm_encode(loaded->tokenizer, whole, n_prompt + len, options, 0, ids, err);
	free(whole);
	return rc;
}

/* Append the ids of text i. */
static MillmCode
encode_text(const MillmRequest *r, const MillmTexts *texts, size_t i, MillmIds *ids, MillmError *err)
{
	const size_t begin = i == 0 ? 0 : texts->ends[i - 1], before = ids->n;
	MillmCode	rc = embedding_encode(r->loaded, texts->bytes + begin, texts->ends[i] - begin, ids, err);

	if (rc == MILLM_OK && (rc = check_length(r, texts, i, ids->n - before, err)) == MILLM_OK)
		rc = tokens_check(r, "text", ids->ids + before, ids->n - before, err);
	return rc;
}

MillmEmbedding *
embedding_create(void)
{
	return calloc(1, sizeof(MillmEmbedding));
}

MillmCode
embedding_begin(MillmRequest *r, const MillmTexts *texts, MillmError *err)
{
	const MillmModel *model = r->loaded->model;
	MillmEmbedding *e = r->embedding;
	const size_t n_values = (size_t) model->pooling.n_modes * (size_t) model->config.embedding_size;
	MillmIds	ids = {0};
	MillmCode	rc = MILLM_OK;

	e->width = model->config.embedding_size;
	e->ends = malloc(texts->n * sizeof(*e->ends));
	e->pooled = malloc(n_values * sizeof(*e->pooled));
	e->values = malloc(n_values * sizeof(*e->values));
	if (!e->ends || !e->pooled || !e->values)
		return out_of_memory(err);
	for (; rc == MILLM_OK && e->n_texts < texts->n; e->ends[e->n_texts++] = ids.n)
		rc = encode_text(r, texts, e->n_texts, &ids, err);
	e->tokens = ids.ids;		/* ours now, whatever came */
	if (rc != MILLM_OK)
		return rc;
	r->n_prompt = (int) ids.n;	/* a request's bytes are fewer than an int counts */
	form_group(r);
	return MILLM_OK;
}

void
embedding_free(MillmEmbedding *e)
{
	if (!e)
		return;
	free(e->tokens);
	free(e->ends);
	free(e->pooled);
	free(e->values);
	free(e);
}

/* ---- the group in the KV cache ---------------------------------------------------------------- */

static void
free_sequences(MillmEmbedding *e)
{
	for (int i = 0; i < e->n_group; i++)
	{
		millm_sequence_free(e->seqs[i]);
		e->seqs[i] = NULL;
	}
}

bool
embedding_reserve(MillmRequest *r, MillmForward *fw)
{
	MillmEmbedding *e = r->embedding;

	for (int i = 0; i < e->n_group; i++)
	{
		const int	n = length_of(e, e->first + (size_t) i);

		if ((e->seqs[i] || (e->seqs[i] = millm_sequence_create(fw, n))) && millm_sequence_reserve(e->seqs[i], n))
			continue;
		if (r->choices[0].slot.n_past == 0)
			free_sequences(e);
		return false;
	}
	return true;
}

void
embedding_release(MillmRequest *r)
{
	free_sequences(r->embedding);
	form_group(r);
}

/* ---- steps ------------------------------------------------------------------------------------ */

/* Whether the pooling looks at the token at that position of n. */
static bool
wants(const MillmPooling *p, int position, int n)
{
	for (int i = 0; i < p->n_modes; i++)
		if (p->modes[i] == MILLM_POOL_FIRST ? position == 0 : p->modes[i] == MILLM_POOL_LAST ? position == n - 1 : true)
			return true;
	return false;
}

/* A token of the group: which text's it is, and where in it.  Walks on from *text, at first the group's. */
static int
locate(const MillmEmbedding *e, size_t token, size_t *text)
{
	while (token >= e->ends[*text])
		(*text)++;
	return (int) (token - begin_of(e, *text));
}

void
embedding_fill(const MillmRequest *r, int n_tokens, MillmBatchToken *batch)
{
	const MillmEmbedding *e = r->embedding;
	const size_t begin = begin_of(e, e->first) + (size_t) r->choices[0].slot.n_past;
	size_t		text = e->first;

	for (size_t t = begin; t < begin + (size_t) n_tokens; t++)
	{
		const int	position = locate(e, t, &text);

		*batch++ = (MillmBatchToken) {.seq = e->seqs[text - e->first], .position = position, .token = e->tokens[t],
			.want_hidden = wants(&r->loaded->model->pooling, position, length_of(e, text))};
	}
}

/* Take a hidden state into the text's pooled ones. */
static void
pool(const MillmPooling *p, double *pooled, const float *hidden, int width, int position, int n)
{
	for (int i = 0; i < p->n_modes; i++, pooled += width)
	{
		const MillmPoolingMode mode = p->modes[i];
		const double weight = mode == MILLM_POOL_WEIGHTED_MEAN ? position + 1 : 1;

		if (position == 0 || (mode == MILLM_POOL_LAST && position == n - 1))
			for (int k = 0; k < width; k++)
				pooled[k] = weight * hidden[k];
		else if (mode == MILLM_POOL_MAX)
			for (int k = 0; k < width; k++)
				pooled[k] = hidden[k] > pooled[k] ? hidden[k] : pooled[k];
		else if (mode == MILLM_POOL_MEAN || mode == MILLM_POOL_SUM_BY_ROOT || mode == MILLM_POOL_WEIGHTED_MEAN)
			for (int k = 0; k < width; k++)
				pooled[k] += weight * hidden[k];
	}
}

/* values = the pooled ones of a text of n tokens, as they are to be */
static MillmCode
complete(const MillmPooling *p, float *values, const double *pooled, int width, int n, MillmError *err)
{
	double		length = 0;

	for (int i = 0; i < p->n_modes * width; i++)
	{
		const MillmPoolingMode mode = p->modes[i / width];
		const double value = mode == MILLM_POOL_MEAN ? pooled[i] / n : mode == MILLM_POOL_SUM_BY_ROOT ? pooled[i] / sqrt(n) :
			mode == MILLM_POOL_WEIGHTED_MEAN ? pooled[i] / (0.5 * n * (n + 1.0)) : pooled[i];

		values[i] = (float) value;
		length += value * value;
	}
	if (!isfinite(length))
		return millm_fail(err, MILLM_E_INTERNAL, "an embedding became NaN or infinite");
	length = sqrt(length);
	if (p->normalized && length > 0)
		for (int i = 0; i < p->n_modes * width; i++)
			values[i] = (float) ((double) values[i] / length);
	return MILLM_OK;
}

MillmCode
embedding_take(MillmRequest *r, int n_tokens, const float **hidden, MillmError *err)
{
	MillmEmbedding *e = r->embedding;
	const MillmPooling *p = &r->loaded->model->pooling;
	const size_t end = begin_of(e, e->first) + (size_t) r->choices[0].slot.n_past;
	size_t		text = e->first;
	MillmCode	rc = MILLM_OK;

	for (size_t t = end - (size_t) n_tokens; t < end; t++)
	{
		const int	position = locate(e, t, &text), n = length_of(e, text);

		if (wants(p, position, n))
		{
			pool(p, e->pooled, *hidden, e->width, position, n);
			*hidden += e->width;
		}
		/* after a failure only *hidden goes on */
		if (rc != MILLM_OK || position < n - 1 || (rc = complete(p, e->values, e->pooled, e->width, n, err)) != MILLM_OK)
			continue;
		e->n_done++;
		r->sink.embedding(r->sink.arg, e->values, p->n_modes * e->width);
	}
	r->choices[0].is_finished = e->n_done == e->n_texts;
	return rc;
}
