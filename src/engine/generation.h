/*
 * generation.h -- one request on its way: its prompt, and the choices that come of it, each with its tokens, sampler and text.
 * One for embeddings or scores has embedding.h's or scoring.h's state instead, and one choice, of which only the slot counts.
 *
 * Internal to the engine.  The creating thread fills it, then it belongs to the model thread; only refs and
 * is_canceled are shared.
 */
#ifndef MILLM_GENERATION_H
#define MILLM_GENERATION_H

#include <stdatomic.h>

#include "draft.h"
#include "engine.h"
#include "forward.h"
#include "scheduler.h"

/*
 * The last tokens of a prompt are computed, whatever the prefix cache has: the last one for its logits, the others so that the kernels for
 * many rows are used, as they were when the prompt was computed first.  The same question then has the same answer.
 */
#define MIN_COMPUTED		24

/* One of a request's n answers: a sequence. */
typedef struct MillmChoice
{
	MillmSlot	slot;			/* first: the scheduler's view; n_tokens are known, the prompt's and those generated */
	MillmRequest *request;
	int			index;
	int32_t    *generated;		/* [max_tokens] */
	int			n_completion;	/* chosen so far, the eos id too */
	bool		is_finished;	/* eos, a stop sequence, or max_tokens; the last embedding or score */
	bool		stopped;		/* by the first two */
	MillmSequence *seq;			/* its positions in the KV cache; NULL: none */
	MillmSampler *sampler;		/* NULL until its first token; then the detokenizer is there too */
	MillmDrafter *drafter;		/* NULL until it runs alone */
	int32_t		draft[MILLM_MAX_DRAFT_TOKENS];	/* [n_drafted]: what the step computes after its last token */
	int			n_drafted;
	MillmDetok *detok;
	MillmStop  *stop;
	char	   *text;			/* not streamed: all of it */
	size_t		len;
	size_t		capacity;
	MillmLogprob *logprobs;		/* [n_logprobs], rows of 1 + n_top; streamed: those that no piece has brought yet */
	int			n_logprobs;
	int			logprobs_capacity;
} MillmChoice;

struct MillmRequest
{
	atomic_int	refs;
	atomic_bool is_canceled;
	const MillmLoaded *loaded;	/* a reference */
	MillmSink	sink;
	MillmGenerateOptions options;	/* its stops are gone: every choice has a copy */
	MillmSampling sampling;		/* of choice 0 */
	MillmRequest *next;			/* in the engine's inbox */
	double		accepted_ms;	/* on the monotonic clock */
	double		begun_ms;		/* its first step; 0: that has not been */
	struct MillmEmbedding *embedding;	/* owned; this and the next NULL: a generation */
	struct MillmScoring *scoring;	/* owned */

	int32_t    *prompt;			/* [n_prompt] */
	int			n_prompt;
	int			n_cached;		/* of them, those that choice 0 did not compute, since the prefix cache had them */
	int			max_tokens;		/* of a choice */
	size_t		text_bytes;		/* of all choices, not streamed */
	int			n_top;			/* of a row of logprobs; -1: none are wanted */
	int			n_logprobs;		/* of all choices, not streamed */
	bool		has_failed;		/* one of the choices; why is in failure */
	MillmError	failure;
	int			n_left;			/* choices that have not ended */
	bool		shares_prompt;	/* choice 0 computes the prompt for all, up to its last token; the others are paused until it has */
	MillmSequence *prefix;		/* what it has computed, for choices that have not begun; NULL: nothing */
	int			n_choices;
	MillmChoice choices[];		/* [n_choices] */
};

/* INVALID_ARGUMENT when the model has no embedding for one of ids[0 .. n), which what ("prompt") contains. */
extern MillmCode tokens_check(const MillmRequest *r, const char *what, const int32_t *ids, size_t n, MillmError *err);
/* Encode the prompt and resolve what depends on its length.  Errors of millm_encode(), millm_max_tokens_resolve(). */
extern MillmCode generation_begin(MillmRequest *r, const MillmPrompt *prompt, MillmError *err);
/* The token at a position below slot.n_tokens. */
extern int32_t generation_token(const MillmChoice *c, int position);
/* Fill the draft with at most max tokens, which may be none. */
extern void generation_draft(MillmChoice *c, int max);
/* Which logits its next choice needs, and those of the draft; valid until generation_take(). */
extern MillmTop generation_needs(const MillmChoice *c);
/*
 * Choose the next token from the first row of logits [1 + n_drafted, vocab_size], the step's from this row on, and one more from each row of a draft's token that was chosen,
 * which n_past then counts; show what text they complete; may finish the choice.
 */
extern MillmCode generation_take(MillmChoice *c, const MillmForward *fw, const float *logits, int row, MillmError *err);
/* Its last piece: all of it unless it was streamed.  Lives as long as the request. */
extern MillmPiece generation_last_piece(const MillmChoice *c);

#endif
