/*
 * embedding.h -- one request for the embeddings of texts, on its way through the model.
 *
 * Internal to the engine; generation.h's counterpart.  Its texts run in groups (texts.h).  A group computed, the slot goes to the end of the line with
 * the next one, so that a thousand texts hold nobody up for longer than a short prompt does.
 */
#ifndef MILLM_EMBEDDING_H
#define MILLM_EMBEDDING_H

#include "engine.h"
#include "forward.h"

typedef struct MillmEmbedding MillmEmbedding;

extern MillmEmbedding *embedding_create(void);	/* NULL: out of memory */
extern void embedding_free(MillmEmbedding *e);	/* NULL is fine */
/* Append the ids of a text as embeddings are made of it: the model's own prompt, if it has one, before it. */
extern MillmCode embedding_encode(const MillmLoaded *loaded, const char *text, size_t len, MillmIds *ids, MillmError *err);
/*
 * Encode the texts of r and form the first group.  INVALID_ARGUMENT for an empty text or one with an id that the model does not have,
 * CONTEXT_LENGTH_EXCEEDED with both numbers.
 */
extern MillmCode embedding_begin(MillmRequest *r, const MillmTexts *texts, MillmError *err);

/* Room in the KV cache for the group; false when the pool is too full. */
extern bool embedding_reserve(MillmRequest *r, MillmForward *fw);
/* Give all pages back.  The texts of the group that are not done begin the next one. */
extern void embedding_release(MillmRequest *r);

/* The slot's next n_tokens, as tokens of a step. */
extern void embedding_fill(const MillmRequest *r, int n_tokens, MillmBatchToken *batch);
/*
 * The step with these has run: pool the hidden states that it gave, the request's being the first of *hidden, which is moved past them.  Hands
 * over the embeddings of texts that are complete; after the last one the choice is finished.  INTERNAL for a NaN.
 */
extern MillmCode embedding_take(MillmRequest *r, int n_tokens, const float **hidden, MillmError *err);

#endif
