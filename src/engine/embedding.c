/*
 * embedding.c -- from texts to tokens, and from hidden states to embeddings.
 *
 *     texts -> tokens -> groups (texts.h) -> hidden states -> pooled as MillmPooling says -> sink
 *
 * Sums are in double and in the order of positions, so that where the scheduler cut cannot be seen.
 *
 * What a preempted request has to compute again is at most the texts of a group that were not done: those that were have been handed over.
 */
#include "embedding.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "generation.h"
#include "texts.h"

struct MillmEmbedding
{
	MillmTextRun run;			/* its n_done: handed over */
	int			width;			/* of a hidden state */
	double	   *pooled;			/* [n_modes, width]: of the text in work */
	float	   *values;			/* [n_modes, width]: what it becomes */
};

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

/* As many texts as fit, from the first that is not done. */
static void
form_group(MillmRequest *r)
{
	const int	context = r->loaded->context_length;

	r->choices[0].slot.n_tokens = text_run_form(&r->embedding->run, context < MILLM_GROUP_POSITIONS ? context : MILLM_GROUP_POSITIONS);
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
	const int	own = r->loaded->model->pooling.max_tokens;
	MillmCode	rc = embedding_encode(r->loaded, texts->bytes + begin, texts->ends[i] - begin, ids, err);
	char		name[48];

	if (rc == MILLM_OK)
		rc = text_check(r, texts, i, ids, before, "embedding", "Embed", err);
	if (rc == MILLM_OK && own > 0 && ids->n - before > (size_t) own)
	{
		text_name(name, texts, i);
		rc = millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "text is too long for an embedding of this model");
		millm_detail(err, "%s has %zu tokens; the model's sentence_bert_config.json allows %d.", name, ids->n - before, own);
		millm_hint(err, "Embed it in parts.");
	}
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
	e->run.ends = malloc(texts->n * sizeof(*e->run.ends));
	e->pooled = malloc(n_values * sizeof(*e->pooled));
	e->values = malloc(n_values * sizeof(*e->values));
	if (!e->run.ends || !e->pooled || !e->values)
		return out_of_memory(err);
	for (; rc == MILLM_OK && e->run.n_texts < texts->n; e->run.ends[e->run.n_texts++] = ids.n)
		rc = encode_text(r, texts, e->run.n_texts, &ids, err);
	e->run.tokens = ids.ids;	/* ours now, whatever came */
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
	text_run_reset(&e->run);
	free(e->pooled);
	free(e->values);
	free(e);
}

bool
embedding_reserve(MillmRequest *r, MillmForward *fw)
{
	return text_run_reserve(&r->embedding->run, fw, r->choices[0].slot.n_past > 0);
}

void
embedding_release(MillmRequest *r)
{
	text_run_release(&r->embedding->run);
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

void
embedding_fill(const MillmRequest *r, int n_tokens, MillmBatchToken *batch)
{
	const MillmTextRun *run = &r->embedding->run;
	MillmTextToken at = text_run_seek(run, r->choices[0].slot.n_past);

	for (int i = 0; i < n_tokens; i++, at = text_run_next(run, at))
	{
		batch[i] = text_run_batch_token(run, at);
		batch[i].want_hidden = wants(&r->loaded->model->pooling, at.index, text_length(run, at.text));
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
	MillmTextToken at = text_run_seek(&e->run, r->choices[0].slot.n_past - n_tokens);
	MillmCode	rc = MILLM_OK;

	for (int i = 0; i < n_tokens; i++, at = text_run_next(&e->run, at))
	{
		const int	n = text_length(&e->run, at.text);

		if (wants(p, at.index, n))
		{
			pool(p, e->pooled, *hidden, e->width, at.index, n);
			*hidden += e->width;
		}
		/* after a failure only *hidden goes on */
		if (rc != MILLM_OK || at.index < n - 1 || (rc = complete(p, e->values, e->pooled, e->width, n, err)) != MILLM_OK)
			continue;
		e->run.n_done++;
		r->sink.embedding(r->sink.arg, e->values, p->n_modes * e->width);
	}
	r->choices[0].is_finished = e->run.n_done == e->run.n_texts;
	return rc;
}
