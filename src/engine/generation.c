/*
 * generation.c -- from a prompt to tokens, and from logits to shown text.
 *
 *     logits -> sampler -> id -> detokenizer (whole characters) -> U+0000 becomes U+FFFD -> stop sequences -> sink
 *         \____ logprobs of the id: they wait for the next text ___________________________________/
 *
 * All state is the request's own, and survives when the scheduler takes the pages of a choice: a preempted one computes its
 * tokens again and shows nothing twice.
 */
#include "generation.h"

#include <stdlib.h>
#include <string.h>

#include "embedding.h"
#include "scoring.h"
#include "wire.h"

/* The texts of a request that are not streamed must fit one reply, escaped; a \u00XX escape is six bytes. */
#define MAX_TEXT_BYTES ((size_t) 10 << 20)

/* And their logprobs: more than so many do not fit, each of which takes 48 bytes of the reply and more. */
#define MAX_LOGPROBS ((int) (WIRE_MAX_REPLY_BYTES / 48))
/* Rows of logprobs that a stream keeps for the next text, should there be none to show. */
#define MAX_HELD_LOGPROBS 256

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

static MillmRequest *
create_request(const MillmLoaded *loaded, const MillmSink *sink, int n_choices)
{
	MillmRequest *r = calloc(1, sizeof(*r) + (size_t) n_choices * sizeof(r->choices[0]));

	if (!r)
		return NULL;
	atomic_init(&r->refs, 1);
	atomic_init(&r->is_canceled, false);
	r->sink = *sink;
	r->loaded = millm_loaded_ref(loaded);
	r->n_choices = r->n_left = n_choices;
	for (int i = 0; i < n_choices; i++)
	{
		r->choices[i].request = r;
		r->choices[i].index = i;
		r->choices[i].slot.role = sink->role;
		r->choices[i].slot.is_stream = sink->piece != NULL;
	}
	return r;
}

MillmCode
millm_request_create(const MillmLoaded *loaded, const MillmGenerateOptions *options, const MillmSink *sink,
					 MillmRequest **out, MillmError *err)
{
	MillmRequest *r;
	MillmCode	rc = millm_generate_options_check(options, err);

	for (int i = 0; rc == MILLM_OK && i < options->n_logit_bias; i++)
		if (options->logit_bias[i].id >= loaded->model->config.vocab_size)
		{
			rc = millm_fail(err, MILLM_E_INVALID_ARGUMENT, "logit_bias has a token that the model does not know");
			millm_detail(err, "Token id %d is not below %d, the size of the vocabulary.", (int) options->logit_bias[i].id,
						 loaded->model->config.vocab_size);
		}
	if (rc != MILLM_OK)
		return rc;
	r = create_request(loaded, sink, (int) options->n);
	if (!r)
		return out_of_memory(err);
	r->options = *options;
	r->options.n_stops = 0;
	r->n_top = !options->logprobs ? -1 : options->top_logprobs > 0 ? (int) options->top_logprobs : 0;
	millm_sampling_resolve(&r->options, &loaded->model->generation, &r->sampling);
	for (int i = 0; i < r->n_choices; i++)
		if (!(r->choices[i].stop = millm_stop_create(options->stops, options->n_stops)))
		{
			millm_request_unref(r);
			return out_of_memory(err);
		}
	*out = r;
	return MILLM_OK;
}

MillmCode
millm_request_create_embedding(const MillmLoaded *loaded, const MillmSink *sink, MillmRequest **out, MillmError *err)
{
	MillmRequest *r;

	if (loaded->model->pooling.refused.code != MILLM_OK)
	{
		*err = loaded->model->pooling.refused;
		return err->code;
	}
	if (!(r = create_request(loaded, sink, 1)) || !(r->embedding = embedding_create()))
	{
		millm_request_unref(r);
		return out_of_memory(err);
	}
	*out = r;
	return MILLM_OK;
}

MillmCode
millm_request_create_scoring(const MillmLoaded *loaded, const MillmSink *sink, MillmRequest **out, MillmError *err)
{
	MillmRequest *r = create_request(loaded, sink, 1);

	if (!r || !(r->scoring = scoring_create()))
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
	for (int i = 0; i < r->n_choices; i++)
	{
		MillmChoice *c = &r->choices[i];

		free(c->generated);
		free(c->text);
		free(c->logprobs);
		millm_sampler_free(c->sampler);
		millm_drafter_free(c->drafter);
		millm_detok_free(c->detok);
		millm_stop_free(c->stop);
	}
	free(r->prompt);
	embedding_free(r->embedding);
	scoring_free(r->scoring);
	millm_loaded_release(r->loaded);
	free(r);
}

MillmCode
tokens_check(const MillmRequest *r, const char *what, const int32_t *ids, size_t n, MillmError *err)
{
	const int	vocab = r->loaded->model->config.vocab_size;

	for (size_t i = 0; i < n; i++)
		if (ids[i] < 0 || ids[i] >= vocab)
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "%s contains a token that the model does not know", what);
			millm_detail(err, "Token id %d is not below %d, the size of the model's embedding.", (int) ids[i], vocab);
			return MILLM_E_INVALID_ARGUMENT;
		}
	return MILLM_OK;
}

MillmCode
generation_begin(MillmRequest *r, const MillmPrompt *prompt, MillmError *err)
{
	MillmEncodeOptions options = {.add_special = !prompt->origins, .parse_special = !prompt->plain, .origins = prompt->origins};
	MillmIds	ids = {0};
	MillmCode	rc = millm_encode(r->loaded->tokenizer, prompt->text, prompt->len, options, 0, &ids, err);

	if (rc == MILLM_OK)
		rc = millm_max_tokens_resolve(&r->options, (int64_t) ids.n, r->loaded->context_length, &r->max_tokens, err);
	if (rc == MILLM_OK)
		rc = tokens_check(r, "prompt", ids.ids, ids.n, err);
	if (rc != MILLM_OK)
	{
		millm_ids_free(&ids);
		return rc;
	}
	r->prompt = ids.ids;
	r->n_prompt = (int) ids.n;	/* n_prompt + max_tokens <= context_length */
	r->shares_prompt = r->n_choices > 1 && r->n_prompt > 1;
	for (int i = 0; i < r->n_choices; i++)
	{
		MillmChoice *c = &r->choices[i];

		c->slot.n_tokens = r->shares_prompt && i == 0 ? r->n_prompt - 1 : r->n_prompt;
		c->generated = malloc((size_t) r->max_tokens * sizeof(*c->generated));
		if (!c->generated)
			return out_of_memory(err);
	}
	return MILLM_OK;
}

int32_t
generation_token(const MillmChoice *c, int position)
{
	const MillmRequest *r = c->request;

	return position < r->n_prompt ? r->prompt[position] : c->generated[position - r->n_prompt];
}

/* A piece with that text, and the logprobs that wait for it. */
static MillmPiece
piece_of(const MillmChoice *c, const char *text, size_t len)
{
	return (MillmPiece) {.choice = c->index, .text = text, .len = len,
		.logprobs = c->logprobs, .n_tokens = c->n_logprobs, .n_top = c->request->n_top};
}

static void
stream_piece(MillmChoice *c, const char *text, size_t len)
{
	const MillmSink *sink = &c->request->sink;
	MillmPiece	piece = piece_of(c, text, len);

	sink->piece(sink->arg, &piece);
	c->n_logprobs = 0;
}

/* Hand text to the reader, or keep it. */
static MillmCode
emit(MillmChoice *c, const char *text, size_t len, MillmError *err)
{
	MillmRequest *r = c->request;

	if (len == 0)
		return MILLM_OK;
	if (r->sink.piece)
	{
		stream_piece(c, text, len);
		return MILLM_OK;
	}
	if (len > MAX_TEXT_BYTES - r->text_bytes)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the text is too long for one answer");
		millm_detail(err, "It has more than %zu bytes.", MAX_TEXT_BYTES);
		millm_hint(err, "Ask for fewer tokens, or stream the text.");
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (c->len + len > c->capacity)
	{
		size_t		capacity = 2 * (c->len + len) + 256;
		char	   *p = realloc(c->text, capacity);

		if (!p)
			return out_of_memory(err);
		c->text = p;
		c->capacity = capacity;
	}
	memcpy(c->text + c->len, text, len);
	c->len += len;
	r->text_bytes += len;
	return MILLM_OK;
}

/* Pass text without U+0000 through the stop sequences. */
static MillmCode
show(MillmChoice *c, const char *text, size_t len, MillmError *err)
{
	const char *out;
	size_t		out_len;

	if (len == 0 || c->stopped)
		return MILLM_OK;
	c->stopped = millm_stop_push(c->stop, text, len, &out, &out_len);
	if (!out)
		return out_of_memory(err);
	return emit(c, out, out_len, err);
}

static MillmCode
show_piece(MillmChoice *c, const char *piece, size_t len, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	while (len > 0 && rc == MILLM_OK && !c->stopped)
	{
		const char *nul = memchr(piece, '\0', len);
		size_t		n = nul ? (size_t) (nul - piece) : len;

		rc = show(c, piece, n, err);
		if (rc == MILLM_OK && nul)
			rc = show(c, "\xEF\xBF\xBD", 3, err);
		n += nul != NULL;
		piece += n;
		len -= n;
	}
	return rc;
}

/* The last token was chosen: show what was held back, unless a stop sequence ends the text. */
static MillmCode
show_rest(MillmChoice *c, MillmError *err)
{
	size_t		len;
	const char *piece = millm_detok_flush(c->detok, &len);
	MillmCode	rc = show_piece(c, piece, len, err);

	if (rc != MILLM_OK || c->stopped)
		return rc;
	millm_stop_flush(c->stop, &piece, &len);
	return emit(c, piece, len, err);
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
generation_needs(const MillmChoice *c)
{
	/* the first choice, which makes the sampler, reads them all, and a log-softmax sums over all */
	return c->sampler && c->request->n_top < 0 ? millm_sampler_needs(c->sampler, c->draft, c->n_drafted) : (MillmTop) {.k = 0};
}

/* What a choice has from its first token on: the memory of these is that of the sequences that have run, not of those that wait. */
static MillmCode
begin_choice(MillmChoice *c, MillmError *err)
{
	const MillmRequest *r = c->request;
	MillmSampling sampling = r->sampling;

	sampling.choice = c->index;
	c->detok = millm_detok_create(r->loaded->tokenizer);
	c->sampler = millm_sampler_create(&sampling, r->loaded->model->config.vocab_size);
	if (!c->detok || !c->sampler)
		return out_of_memory(err);
	millm_sampler_note_prompt(c->sampler, r->prompt, r->n_prompt);
	return MILLM_OK;
}

/* Note how probable the model found id. */
static MillmCode
note_logprobs(MillmChoice *c, const float *logits, int32_t id, MillmError *err)
{
	MillmRequest *r = c->request;
	const int	width = 1 + r->n_top;

	if (!r->sink.piece && ++r->n_logprobs > MAX_LOGPROBS / width)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "there are too many logprobs for one answer");
		millm_detail(err, "They are of more than %d tokens.", MAX_LOGPROBS / width);
		millm_hint(err, "Ask for fewer tokens or a smaller top_logprobs, or stream the text.");
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (c->n_logprobs == c->logprobs_capacity)
	{
		int			capacity = 2 * c->n_logprobs + 16;
		MillmLogprob *p = realloc(c->logprobs, (size_t) capacity * (size_t) width * sizeof(*p));

		if (!p)
			return out_of_memory(err);
		c->logprobs = p;
		c->logprobs_capacity = capacity;
	}
	millm_logprobs(c->logprobs + (size_t) c->n_logprobs++ * (size_t) width, r->n_top, logits, r->loaded->model->config.vocab_size, id);
	return MILLM_OK;
}

void
generation_draft(MillmChoice *c, int max)
{
	const MillmRequest *r = c->request;
	const int	n_left = r->max_tokens - c->n_completion - 1;	/* after the next one */

	c->n_drafted = 0;
	if (n_left < 1 || !c->sampler)
		return;
	if (!c->drafter)
	{
		if (!(c->drafter = millm_drafter_create(r->n_prompt + r->max_tokens)))
			return;
		for (int i = 0; i < c->slot.n_tokens; i++)
			millm_drafter_note(c->drafter, generation_token(c, i));
	}
	c->n_drafted = millm_drafter_draft(c->drafter, c->draft, max < n_left ? max : n_left);
}

/* Choose the next token from logits [vocab_size], of which these are listed. */
static MillmCode
take_one(MillmChoice *c, const float *logits, MillmListed listed, MillmError *err)
{
	const MillmRequest *r = c->request;
	int32_t		id;
	const char *piece;
	size_t		len;
	MillmCode	rc = millm_sampler_choose(c->sampler, logits, &listed, c->slot.n_tokens, &id, err);

	if (rc != MILLM_OK)
		return rc;
	c->n_completion++;
	if (is_eos(&r->loaded->model->config, id))
	{
		rc = show_rest(c, err);
		c->is_finished = c->stopped = true;
		return rc;
	}

	if (r->n_top >= 0 && (rc = note_logprobs(c, logits, id, err)) != MILLM_OK)
		return rc;
	millm_sampler_note_generated(c->sampler, id);
	if (c->drafter)
		millm_drafter_note(c->drafter, id);
	c->generated[c->slot.n_tokens++ - r->n_prompt] = id;
	piece = millm_detok_push(c->detok, id, &len);
	rc = show_piece(c, piece, len, err);
	if (rc == MILLM_OK && !c->stopped && c->n_completion == r->max_tokens)
	{
		c->is_finished = true;
		rc = show_rest(c, err);
	}
	c->is_finished |= c->stopped;
	if (r->sink.piece && c->n_logprobs == MAX_HELD_LOGPROBS)
		stream_piece(c, "", 0);
	return rc;
}

MillmCode
generation_take(MillmChoice *c, const MillmForward *fw, const float *logits, int row, MillmError *err)
{
	const size_t vocab = (size_t) c->request->loaded->model->config.vocab_size;
	MillmCode	rc = c->sampler ? MILLM_OK : begin_choice(c, err);
	int			n_accepted = 0;

	if (rc == MILLM_OK)
		rc = take_one(c, logits, millm_forward_listed(fw, row), err);
	while (rc == MILLM_OK && !c->is_finished && n_accepted < c->n_drafted && generation_token(c, c->slot.n_tokens - 1) == c->draft[n_accepted])
	{
		c->slot.n_past++;
		n_accepted++;
		rc = take_one(c, logits + (size_t) n_accepted * vocab, millm_forward_listed(fw, row + n_accepted), err);
	}
	if (c->n_drafted > 0)
		millm_drafter_accepted(c->drafter, n_accepted);
	return rc;
}

MillmPiece
generation_last_piece(const MillmChoice *c)
{
	MillmPiece	piece = piece_of(c, c->text ? c->text : "", c->len);

	piece.is_last = true;
	piece.stopped = c->stopped;
	return piece;
}
