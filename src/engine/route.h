/*
 * route.h -- which experts compute which tokens of a step, and how much each counts.
 */
#ifndef MILLM_ROUTE_H
#define MILLM_ROUTE_H

#include <stdbool.h>
#include <stdint.h>

/* Expert e has the entries first[e] .. first[e + 1] - 1 of rows and weights, rows ascending; each row is with its k experts. */
typedef struct MillmRoutes
{
	int32_t    *first;			/* [n_experts + 1] */
	int32_t    *rows;			/* [max_rows * k] */
	float	   *weights;		/* [max_rows * k] */
	int32_t    *chosen;			/* [max_rows * k]: the experts of each row */
	float	   *shares;			/* [max_rows * k]: and their weights */
	int			n_experts;
	int			k;
} MillmRoutes;

/* Room for max_rows rows that choose k of n_experts each, 1 <= k <= n_experts; false: out of memory, and free is due all the same. */
extern bool millm_routes_init(MillmRoutes *r, int n_experts, int k, int max_rows);
extern void millm_routes_free(MillmRoutes *r);

/*
 * Route n rows by their scores [n, n_experts]: each goes to the k experts of its largest scores, the lower number first among equals.  The weights are
 * the softmax of all scores, divided by the sum of the chosen ones if sums_to_one.  Where a score is NaN the weights are.
 */
extern void millm_route(MillmRoutes *r, const float *scores, bool sums_to_one, int n);

#endif
