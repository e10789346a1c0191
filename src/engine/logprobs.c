/*
 * logprobs.c -- log-softmax, and its largest values.
 *
 * Weights in float32, their sum and the logarithm in double: as many correct digits as the logits have.
 */
#include "logprobs.h"

#include <float.h>
#include <math.h>

/* log(sum of exp(logits[i])), of which max is the largest */
static double
log_sum_exp(const float *logits, int n, float max)
{
	double		sum = 0;

	for (int i = 0; i < n; i++)
		sum += expf(logits[i] - max);
	return (double) max + log(sum);
}

double
millm_log_sum_exp(const float *logits, int n)
{
	float		max = -INFINITY;

	for (int i = 0; i < n; i++)
		max = logits[i] > max ? logits[i] : max;
	return log_sum_exp(logits, n, max);
}

float
millm_as_logprob(double logprob)
{
	return (float) fmax(logprob, -FLT_MAX);
}

void
millm_logprobs(MillmLogprob *out, int n_top, const float *logits, int n, int32_t chosen)
{
	MillmLogprob *top = out + 1;	/* sorted; meanwhile with logits */
	float		max = -INFINITY;
	double		shift;

	for (int i = 0; i < n_top; i++)
		top[i] = (MillmLogprob) {-1, -INFINITY};
	for (int32_t id = 0; id < n; id++)
	{
		int			at;

		max = logits[id] > max ? logits[id] : max;
		if (n_top == 0 || !(logits[id] > top[n_top - 1].logprob))
			continue;
		for (at = n_top - 1; at > 0 && logits[id] > top[at - 1].logprob; at--)
			top[at] = top[at - 1];
		top[at] = (MillmLogprob) {id, logits[id]};
	}
	shift = log_sum_exp(logits, n, max);
	out[0] = (MillmLogprob) {chosen, millm_as_logprob(logits[chosen] - shift)};
	for (int i = 0; i < n_top; i++)
		top[i].logprob = millm_as_logprob(top[i].logprob - shift);
}
