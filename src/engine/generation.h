/*
 * generation.h -- one request on its way: its tokens, its sampler, and the text that comes of it.
 *
 * Internal to the engine.  The creating thread fills it, then it belongs to the model thread; only refs and
 * is_canceled are shared.
 */
#ifndef MILLM_GENERATION_H
#define MILLM_GENERATION_H

#include <stdatomic.h>

#include "engine.h"
#include "forward.h"
#include "scheduler.h"

struct MillmRequest
{
	MillmSlot	slot;			/* n_tokens of tokens[] are known */
	atomic_int	refs;
	atomic_bool is_canceled;
	const MillmLoaded *loaded;	/* a reference */
	MillmSink	sink;
	MillmGenerateOptions options;	/* stops are not here but in stop */
	MillmSampling sampling;
	MillmRequest *next;			/* in the engine's inbox */

	int32_t    *tokens;			/* [n_prompt + max_tokens]: the prompt and what was generated */
	int			n_prompt;
	int			max_tokens;
	int			n_completion;	/* chosen so far, the eos id too */
	bool		is_finished;	/* eos, a stop sequence, or max_tokens */
	bool		stopped;		/* by the first two */
	MillmSequence *seq;			/* its positions in the KV cache; NULL: none */
	MillmSampler *sampler;		/* NULL until the first choice */
	MillmDetok *detok;
	MillmStop  *stop;
	char	   *text;			/* not streamed: all of it */
	size_t		len;
	size_t		capacity;
};

/* Encode the prompt into tokens and resolve what depends on its length.  Errors of millm_encode(), millm_max_tokens_resolve(). */
extern MillmCode generation_begin(MillmRequest *r, const MillmPrompt *prompt, MillmError *err);
/* Which logits its next choice needs; valid until generation_take(). */
extern MillmTop generation_needs(const MillmRequest *r);
/* Choose the next token from logits [vocab_size] and show what text it completes; may finish the request. */
extern MillmCode generation_take(MillmRequest *r, const float *logits, MillmError *err);

#endif
