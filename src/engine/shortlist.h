/*
 * shortlist.h -- which logits a sampler needs, and which rows of the LM head can be among them.
 */
#ifndef MILLM_SHORTLIST_H
#define MILLM_SHORTLIST_H

#include <stdbool.h>
#include <stdint.h>

/*
 * What must be exact in a row of logits: the k largest, with all that equal the k-th; of these only those within margin of
 * the largest; and the ids always, which are not counted among the k, whatever their logits.  Any other logit may be -infinity.
 */
typedef struct MillmTop
{
	int			k;				/* 0: all of them, and the rest of this means nothing */
	float		margin;			/* INFINITY: any distance */
	const int32_t *always;		/* [n_always]; borrowed */
	int			n_always;
} MillmTop;

/*
 * Of a row of logits those that a choice has to look at: ids [n], ascending; the others are -infinity, or need not be looked at.  n -1: any may be more.
 */
typedef struct MillmListed
{
	const int32_t *ids;
	int			n;				/* at most MILLM_MAX_LISTED */
} MillmListed;

#define MILLM_MAX_LISTED 512	/* a row with more is as quickly looked at whole */

/*
 * The ids of what can be in top (k > 0), ascending, into ids[max], given approximate logits y [n] whose logits lie within
 * error[v] * norm + MILLM_SCREEN_TINY (quant/screen.h), norm being no less than the Euclidean norm of the vector that the head
 * is multiplied by.  Returns how many; -1 when there are more than max, which is less than n.  What is not in ids is not in
 * top, neither before nor after the roundings of a sampler, and is finite.
 *
 * y is overwritten; lower [n] and heap [max] are workspace.
 */
extern int millm_shortlist(int32_t *ids, int max, float *y, const float *error, int n, float norm, const MillmTop *top,
						   float *lower, float *heap);

/* Is any of scores [n] above the threshold?  Said of MILLM_ABOVE_LANES, as vectors go; of fewer it may be. */
#define MILLM_ABOVE_LANES 16
static inline bool
millm_any_above(const float *scores, int n, float threshold)
{
	int			any = n < MILLM_ABOVE_LANES;

	for (int l = 0; l < MILLM_ABOVE_LANES && n >= MILLM_ABOVE_LANES; l++)
		any |= scores[l] > threshold;
	return any;
}

/* The k-th largest of scores[0..n), 1 <= k <= n, none NaN; heap [k] is workspace. */
extern float millm_kth_largest(const float *scores, int n, int k, float *heap);

#endif
