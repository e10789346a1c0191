/*
 * generation.c -- from a prompt to tokens, and from logits to shown text.
 *
 *     logits -> sampler -> id -> detokenizer (whole characters) -> U+0000 becomes U+FFFD -> stop sequences -> sink
 *
 * All state is the request's own, and survives when the scheduler takes its pages: a preempted request computes its
 * tokens again and shows nothing twice.
 */
#include "generation.h"

#include <stdlib.h>
#include <string.h>

/* A text that is not streamed must fit one reply, escaped; a \u00XX escape is six bytes. */
#define MAX_TEXT_BYTES ((size_t) 10 << 20)

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

MillmCode
millm_request_create(const MillmLoaded *loaded, const MillmGenerateOptions *options, const MillmSink *sink,
					 MillmRequest **out, MillmError *err)
{
	MillmRequest *r;
	MillmCode	rc = millm_generate_options_check(options, err);

	if (rc != MILLM_OK)
		return rc;
	r = calloc(1, sizeof(*r));
	if (!r)
		return out_of_memory(err);
	atomic_init(&r->refs, 1);
	atomic_init(&r->is_canceled, false);
	r->sink = *sink;
	r->options = *options;
	millm_sampling_resolve(options, &loaded->model->generation, &r->sampling);
	r->stop = millm_stop_create(options->stops, options->n_stops);
	r->detok = millm_detok_create(loaded->tokenizer);
	r->loaded = millm_loaded_ref(loaded);
	if (!r->stop || !r->detok)
	{
		millm_request_unref(r);
		return out_of_memory(err);
	}
	*out = r;
	return MILLM_OK;
}

MillmRequest *
millm_request_ref(MillmRequest *r)
{
	atomic_fetch_add(&r->refs, 1);
	return r;
}

void
millm_request_unref(MillmRequest *r)
{
	if (!r || atomic_fetch_sub(&r->refs, 1) != 1)
		return;
	free(r->tokens);
	free(r->text);
	millm_sampler_free(r->sampler);
	millm_detok_free(r->detok);
	millm_stop_free(r->stop);
	millm_loaded_release(r->loaded);
	free(r);
}

MillmCode
generation_begin(MillmRequest *r, const MillmPrompt *prompt, MillmError *err)
{
	MillmEncodeOptions options = {.add_special = !prompt->origins, .parse_special = !prompt->plain, .origins = prompt->origins};
	MillmIds	ids = {0};
	int			vocab = r->loaded->model->config.vocab_size;
	MillmCode	rc = millm_encode(r->loaded->tokenizer, prompt->text, prompt->len, options, 0, &ids, err);

	if (rc == MILLM_OK)
		rc = millm_max_tokens_resolve(&r->options, (int64_t) ids.n, r->loaded->context_length, &r->max_tokens, err);
	for (size_t i = 0; rc == MILLM_OK && i < ids.n; i++)
		if (ids.ids[i] < 0 || ids.ids[i] >= vocab)
		{
			rc = millm_fail(err, MILLM_E_INVALID_ARGUMENT, "prompt contains a token that the model does not know");
			millm_detail(err, "Token id %d is not below %d, the size of the model's embedding.", (int) ids.ids[i], vocab);
		}
	if (rc == MILLM_OK)
	{
		/* n + max_tokens <= context_length, so nothing overflows */
		r->tokens = malloc((ids.n + (size_t) r->max_tokens) * sizeof(*r->tokens));
		if (!r->tokens)
			rc = out_of_memory(err);
		else
		{
			memcpy(r->tokens, ids.ids, ids.n * sizeof(*r->tokens));
			r->n_prompt = r->slot.n_tokens = (int) ids.n;
		}
	}
	millm_ids_free(&ids);
	return rc;
}

/* Hand text to the reader, or keep it. */
static MillmCode
emit(MillmRequest *r, const char *text, size_t len, MillmError *err)
{
	if (len == 0)
		return MILLM_OK;
	if (r->sink.text)
	{
		r->sink.text(r->sink.arg, text, len);
		return MILLM_OK;
	}
	if (len > MAX_TEXT_BYTES - r->len)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the text is too long for one answer");
		millm_detail(err, "It has more than %zu bytes.", MAX_TEXT_BYTES);
		millm_hint(err, "Ask for fewer tokens, or stream the text.");
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (r->len + len > r->capacity)
	{
		size_t		capacity = 2 * (r->len + len) + 256;
		char	   *p = realloc(r->text, capacity);

		if (!p)
			return out_of_memory(err);
		r->text = p;
		r->capacity = capacity;
	}
	memcpy(r->text + r->len, text, len);
	r->len += len;
	return MILLM_OK;
}

/* Pass text without U+0000 through the stop sequences. */
static MillmCode
show(MillmRequest *r, const char *text, size_t len, MillmError *err)
{
	const char *out;
	size_t		out_len;

	if (len == 0 || r->stopped)
		return MILLM_OK;
	r->stopped = millm_stop_push(r->stop, text, len, &out, &out_len);
	if (!out)
		return out_of_memory(err);
	return emit(r, out, out_len, err);
}

static MillmCode
show_piece(MillmRequest *r, const char *piece, size_t len, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	while (len > 0 && rc == MILLM_OK && !r->stopped)
	{
		const char *nul = memchr(piece, '\0', len);
		size_t		n = nul ? (size_t) (nul - piece) : len;

		rc = show(r, piece, n, err);
		if (rc == MILLM_OK && nul)
			rc = show(r, "\xEF\xBF\xBD", 3, err);
		n += nul != NULL;
		piece += n;
		len -= n;
	}
	return rc;
}

/* The last token was chosen: show what was held back, unless a stop sequence ends the text. */
static MillmCode
show_rest(MillmRequest *r, MillmError *err)
{
	size_t		len;
	const char *piece = millm_detok_flush(r->detok, &len);
	MillmCode	rc = show_piece(r, piece, len, err);

	if (rc != MILLM_OK || r->stopped)
		return rc;
	millm_stop_flush(r->stop, &piece, &len);
	return emit(r, piece, len, err);
}

static bool
is_eos(const MillmConfig *config, int32_t id)
{
	for (int i = 0; i < config->n_eos; i++)
		if (config->eos_ids[i] == id)
			return true;
	return false;
}

MillmTop
generation_needs(const MillmRequest *r)
{
	/* the first choice, which makes the sampler, reads them all */
	return r->sampler ? millm_sampler_needs(r->sampler) : (MillmTop) {.k = 0};
}

MillmCode
generation_take(MillmRequest *r, const float *logits, MillmError *err)
{
	const MillmConfig *config = &r->loaded->model->config;
	int32_t		id;
	const char *piece;
	size_t		len;
	MillmCode	rc;

	if (!r->sampler)
	{
		r->sampler = millm_sampler_create(&r->sampling, config->vocab_size);
		if (!r->sampler)
			return out_of_memory(err);
		millm_sampler_note_prompt(r->sampler, r->tokens, r->n_prompt);
	}
	rc = millm_sampler_choose(r->sampler, logits, r->slot.n_tokens, &id, err);
	if (rc != MILLM_OK)
		return rc;
	r->n_completion++;
	if (is_eos(config, id))
	{
		rc = show_rest(r, err);
		r->is_finished = r->stopped = true;
		return rc;
	}

	millm_sampler_note_generated(r->sampler, id);
	r->tokens[r->slot.n_tokens++] = id;
	piece = millm_detok_push(r->detok, id, &len);
	rc = show_piece(r, piece, len, err);
	if (rc == MILLM_OK && !r->stopped && r->n_completion == r->max_tokens)
	{
		r->is_finished = true;
		rc = show_rest(r, err);
	}
	r->is_finished |= r->stopped;
	return rc;
}
