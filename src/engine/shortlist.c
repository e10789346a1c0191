/*
 * shortlist.c -- strike out the logits that cannot be among the largest.
 *
 * Each logit z lies in [y - e, y + e].  The k-th largest of the lower ends is at most the k-th largest logit, so whose upper
 * end lies below it is out; and so is who ends below the largest lower end by more than the margin.  What is not known
 * (NaN, bounds beyond HUGE) puts nobody out and is never out.
 *
 * The bound has 25 u (|z| + |y|) to spare (quant/screen.c, step 5; u = 2^-24), and whoever is out is below the k-th by them.  y + e
 * and y - e, rounded, take 4.  Scores divided by a temperature of 1e-5 to 100 are off by u |z| each, so the others
 * keep them from becoming ties; TINY and HUGE keep them from underflow and overflow.
 */
#include "shortlist.h"

#include <math.h>
#include <stdbool.h>

#include "screen.h"

#define LANES 16

/* x in place of the smallest in the heap of k, which is its root */
static void
replace_root(float *heap, int k, float x)
{
	int			at = 0;

	for (int child; (child = 2 * at + 1) < k; at = child)
	{
		if (child + 1 < k && heap[child + 1] < heap[child])
			child++;
		if (heap[child] >= x)
			break;
		heap[at] = heap[child];
	}
	heap[at] = x;
}

float
millm_kth_largest(const float *scores, int n, int k, float *heap)
{
	/* a heap of the k largest seen, the smallest at its root: the first k, then whoever is larger */
	for (int i = 0; i < k; i++)
	{
		int			at = i;

		for (; at > 0 && heap[(at - 1) / 2] > scores[i]; at = (at - 1) / 2)
			heap[at] = heap[(at - 1) / 2];
		heap[at] = scores[i];
	}
	for (int from = k; from < n; from += MILLM_ABOVE_LANES)
	{
		const int	to = n - from < MILLM_ABOVE_LANES ? n : from + MILLM_ABOVE_LANES;

		if (millm_any_above(scores + from, to - from, heap[0]))
			for (int i = from; i < to; i++)
				if (scores[i] > heap[0])
					replace_root(heap, k, scores[i]);
	}
	return heap[0];
}

/*
 * LANES rows, n of them there: y becomes the upper ends, +infinity where nothing is known; lower the lower ones, -infinity
 * there; largest the largest of these, lane by lane, as vectors go.
 */
static inline void
bound(float *restrict y, float *restrict lower, float *restrict largest, const float *restrict error, int n, float norm)
{
	for (int l = 0; l < n; l++)
	{
		float		middle = fabsf(y[l]) < INFINITY ? y[l] : 0;
		float		e = error[l] * norm + (MILLM_SCREEN_TINY + 0 * y[l]);	/* NaN, unless y is finite */
		float		low;

		e = e <= MILLM_SCREEN_HUGE ? e : INFINITY;
		low = middle - e;
		lower[l] = low;
		y[l] = middle + e;
		largest[l] = low > largest[l] ? low : largest[l];
	}
}

/* bound() of all rows; returns the largest lower end. */
static float
bound_all(float *y, float *lower, const float *error, int n, float norm)
{
	float		largest[LANES];
	int			v = 0;

	for (int l = 0; l < LANES; l++)
		largest[l] = -INFINITY;
	for (; v + LANES <= n; v += LANES)
		bound(y + v, lower + v, largest, error + v, LANES, norm);
	bound(y + v, lower + v, largest, error + v, n - v, norm);
	for (int l = 1; l < LANES; l++)
		largest[0] = largest[l] > largest[0] ? largest[l] : largest[0];
	return largest[0];
}

static bool
any_reaches(const float *y, float threshold)
{
	int			any = 0;

	for (int l = 0; l < LANES; l++)
		any |= y[l] >= threshold;
	return any;
}

int
millm_shortlist(int32_t *ids, int max, float *y, const float *error, int n, float norm, const MillmTop *top,
				float *lower, float *heap)
{
	float		threshold;
	float		largest;
	int			n_ids = 0;

	if ((top->k > max && top->margin == INFINITY) || !(norm <= MILLM_SCREEN_HUGE))
		return -1;
	for (int i = 0; i < top->n_always; i++)
		y[top->always[i]] = NAN;
	largest = bound_all(y, lower, error, n, norm);
	threshold = largest - top->margin;
	if (top->k == 1)
		threshold = largest;
	else if (top->k <= max)
	{
		float		kth = millm_kth_largest(lower, n, top->k, heap);

		threshold = kth > threshold ? kth : threshold;
	}
	for (int v = 0; v < n; v++)
	{
		while (v + LANES <= n && !any_reaches(y + v, threshold))
			v += LANES;
		if (v < n && y[v] >= threshold)
		{
			if (n_ids == max)
				return -1;
			ids[n_ids++] = v;
		}
	}
	return n_ids;
}
