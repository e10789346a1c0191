/*
 * shortlist.h -- which logits a sampler needs, and which rows of the LM head can be among them.
 */
#ifndef MILLM_SHORTLIST_H
#define MILLM_SHORTLIST_H

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
 * The ids of what can be in top (k > 0), ascending, into ids[max], given approximate logits y [n] whose logits lie within
 * error[v] * norm + MILLM_SCREEN_TINY (quant/screen.h), norm being no less than the Euclidean norm of the vector that the head
 * is multiplied by.  Returns how many; -1 when there are more than max, which is less than n.  What is not in ids is not in
 * top, neither before nor after the roundings of a sampler, and is finite.
 *
 * y is overwritten; lower [n] and heap [max] are workspace.
 */
extern int millm_shortlist(int32_t *ids, int max, float *y, const float *error, int n, float norm, const MillmTop *top,
						   float *lower, float *heap);

/* The k-th largest of scores[0..n), 1 <= k <= n, none NaN; heap [k] is workspace. */
extern float millm_kth_largest(const float *scores, int n, int k, float *heap);

#endif
