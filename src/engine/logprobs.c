/*
 * logprobs.c -- log-softmax, and its largest values.
 *
 * Weights in float32, their sum and the logarithm in double: as many correct digits as the logits have.
 */
#include "logprobs.h"

#include <float.h>
#include <math.h>

static float
as_float(double logprob)
{
	return (float) fmax(logprob, -FLT_MAX);
}

void
millm_logprobs(MillmLogprob *out, int n_top, const float *logits, int n, int32_t chosen)
{
	MillmLogprob *top = out + 1;	/* sorted; meanwhile with logits */
	float		max = -INFINITY;
	double		sum = 0;
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
	for (int i = 0; i < n; i++)
		sum += expf(logits[i] - max);
	shift = (double) max + log(sum);
	out[0] = (MillmLogprob) {chosen, as_float(logits[chosen] - shift)};
	for (int i = 0; i < n_top; i++)
		top[i].logprob = as_float(top[i].logprob - shift);
}
