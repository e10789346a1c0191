/*
 * scoring.h -- one request for the scores of texts, on its way through the model: how probable it finds their tokens.
 *
 * Internal to the engine; generation.h's counterpart.  Texts by themselves run in groups (texts.h), as embeddings do.
 *
 * Labels continue a prompt.  It is computed once, and scores the first token of each label; those that have more fork its sequence, a group of them in
 * one step.  The prompt and a label are encoded together, since their tokens may merge where they meet: what all labels leave of the prompt's own
 * tokens is the prompt, and what follows is the label, be it with the prompt's last characters.  So a space that ends the prompt does no harm.
 */
#ifndef MILLM_SCORING_H
#define MILLM_SCORING_H

#include "engine.h"
#include "forward.h"

#define MILLM_MAX_LABELS 256	/* of one request: the caller sees to it */

typedef struct MillmScoring MillmScoring;

extern MillmScoring *scoring_create(void);	/* NULL: out of memory */
extern void scoring_free(MillmScoring *s);	/* NULL is fine */
/*
 * Encode the texts of r, what they continue (prompt; NULL: nothing), and form the first group.  INVALID_ARGUMENT for an empty text, for a label
 * that is empty or there twice, for an empty prompt, for an id that the model does not have; CONTEXT_LENGTH_EXCEEDED with both numbers;
 * CANCELED when r is meanwhile.
 */
extern MillmCode scoring_begin(MillmRequest *r, const MillmPrompt *prompt, const MillmTexts *texts, MillmError *err);
extern const MillmScore *scoring_scores(const MillmScoring *s);	/* [texts]; complete when the choice is finished */

/* Room in the KV cache for the prompt, or the group; false when the pool is too full. */
extern bool scoring_reserve(MillmRequest *r, MillmForward *fw);
/* Give all pages back.  The texts of the group that are not done begin the next one. */
extern void scoring_release(MillmRequest *r);

/* The slot's next n_tokens, as tokens of a step. */
extern void scoring_fill(const MillmRequest *r, int n_tokens, MillmBatchToken *batch);
/*
 * The step with these has run: take the rows of logits that it gave, the request's being the first of *logits, which is moved past them.  After the
 * last one the choice is finished.  CONTEXT_LENGTH_EXCEEDED when the KV cache cannot hold a label beside its prompt.
 */
extern MillmCode scoring_take(MillmRequest *r, MillmForward *fw, int n_tokens, const float **logits, MillmError *err);

#endif
