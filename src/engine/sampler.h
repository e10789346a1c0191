/*
 * sampler.h -- choose the next token from a row of logits.
 *
 * A sampler belongs to one sequence.  Its choice is a pure function of the logits, the tokens noted so far,
 * its options and (seed, choice, position): never of a clock, a thread, or the company in a batch.
 */
#ifndef MILLM_SAMPLER_H
#define MILLM_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "shortlist.h"

typedef struct MillmLogitBias
{
	int32_t		id;
	float		bias;
} MillmLogitBias;

typedef struct MillmSampling
{
	float		temperature;		/* 0: greedy; what follows up to min_p then changes nothing */
	int			top_k;				/* 0: off */
	float		top_p;				/* 1: off */
	float		min_p;				/* 0: off */
	float		repetition_penalty;	/* 1: off */
	float		frequency_penalty;	/* 0: off */
	float		presence_penalty;	/* 0: off */
	int64_t		seed;
	int			choice;				/* which of the n answers to one prompt: 0, 1, ... */
	const MillmLogitBias *bias;		/* [n_bias], distinct ids of the vocabulary; borrowed for the sampler's life */
	int			n_bias;
} MillmSampling;

typedef struct MillmSampler MillmSampler;

/* For rows of n_vocab logits.  NULL: out of memory. */
extern MillmSampler *millm_sampler_create(const MillmSampling *sampling, int n_vocab);
extern void millm_sampler_free(MillmSampler *s);	/* NULL is fine */
/* Note the ids of the prompt (repetition penalty) or one that was generated (all penalties). */
extern void millm_sampler_note_prompt(MillmSampler *s, const int32_t *ids, int n);
extern void millm_sampler_note_generated(MillmSampler *s, int32_t id);

/*
 * Which of the next logits decide its choice: with -infinity in place of the others it is the same.  Of the rows of a draft [n_draft], ids of the vocabulary,
 * too, when its tokens up to there have been noted.  Valid until the next note or call.
 */
extern MillmTop millm_sampler_needs(MillmSampler *s, const int32_t *draft, int n_draft);

/*
 * Choose from logits [n_vocab], which are only read, for the token at that position of the sequence: of those that are listed, or, with NULL, of all.  The choice is the
 * same if all that millm_sampler_needs() are.  INTERNAL when a logit is NaN or +infinity, or all are -infinity.
 */
extern MillmCode millm_sampler_choose(MillmSampler *s, const float *logits, const MillmListed *listed, int position, int32_t *out, MillmError *err);

/* The uniform random number in [0, 1) of that place; the same on every machine. */
extern double millm_random_uniform(int64_t seed, int choice, int position);

#endif
