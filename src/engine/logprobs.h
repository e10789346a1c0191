/*
 * logprobs.h -- how probable the model found a token, and which it found the most probable.
 */
#ifndef MILLM_LOGPROBS_H
#define MILLM_LOGPROBS_H

#include <stdint.h>

#define MILLM_MAX_TOP_LOGPROBS 20

typedef struct MillmLogprob
{
	int32_t		id;
	float		logprob;
} MillmLogprob;

/*
 * Log-softmax of logits [n], finite or -infinity and not all of them the latter: of chosen to out[0], of the n_top (at most
 * MILLM_MAX_TOP_LOGPROBS) most probable ids to out[1 .. n_top], the most probable first, of equal ones the lower id.  Where there are
 * fewer that are possible at all, the rest have the id -1.  None is less than -FLT_MAX, so JSON has a word for each.
 */
extern void millm_logprobs(MillmLogprob *out, int n_top, const float *logits, int n, int32_t chosen);

/* log(sum of exp(logits[i])), for the same logits: what a logit is more than this is its logprob. */
extern double millm_log_sum_exp(const float *logits, int n);
/* A logprob as others see it: not less than -FLT_MAX. */
extern float millm_as_logprob(double logprob);

#endif
