/*
 * route.c -- see route.h.  Owns the lists; counts, then fills them, so that each expert's rows lie together.
 */
#include "route.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

bool
millm_routes_init(MillmRoutes *r, int n_experts, int k, int max_rows)
{
	size_t		n = (size_t) max_rows * (size_t) k;

	*r = (MillmRoutes) {
		.first = calloc((size_t) n_experts + 1, sizeof(*r->first)),
		.rows = calloc(n, sizeof(*r->rows)),
		.weights = calloc(n, sizeof(*r->weights)),
		.chosen = calloc(n, sizeof(*r->chosen)),
		.shares = calloc(n, sizeof(*r->shares)),
		.n_experts = n_experts,
		.k = k,
	};
	return r->first && r->rows && r->weights && r->chosen && r->shares;
}

void
millm_routes_free(MillmRoutes *r)
{
	free(r->first);
	free(r->rows);
	free(r->weights);
	free(r->chosen);
	free(r->shares);
	*r = (MillmRoutes) {0};
}

/* The largest score that comes after (bound, at) in the order of falling scores, equals by number; there is one. */
static int
next_largest(const float *scores, int n, float bound, int at)
{
	int			best = -1;

	for (int e = 0; e < n; e++)
		if ((scores[e] < bound || (scores[e] == bound && e > at)) && (best < 0 || scores[e] > scores[best]))
			best = e;
	return best;
}

static void
choose(const MillmRoutes *r, const float *scores, bool sums_to_one, int32_t *chosen, float *shares)
{
	float		bound = INFINITY;
	int			at = -1;
	double		all = 0,
				sum = 0;
	bool		any_nan = false;

	for (int e = 0; e < r->n_experts; e++)
		any_nan |= isnan(scores[e]);
	for (int i = 0; i < r->k; i++)
	{
		chosen[i] = at = any_nan ? i : next_largest(scores, r->n_experts, bound, at);	/* a NaN is in no order */
		bound = scores[at];
	}
	for (int e = 0; e < r->n_experts; e++)
		all += exp((double) scores[e] - scores[chosen[0]]);
	for (int i = 0; i < r->k; i++)
		sum += exp((double) scores[chosen[i]] - scores[chosen[0]]);
	for (int i = 0; i < r->k; i++)
		shares[i] = any_nan ? NAN : (float) (exp((double) scores[chosen[i]] - scores[chosen[0]]) / (sums_to_one ? sum : all));
}

void
millm_route(MillmRoutes *r, const float *scores, bool sums_to_one, int n)
{
	memset(r->first, 0, sizeof(*r->first) * (size_t) (r->n_experts + 1));
	for (int t = 0; t < n; t++)
	{
		choose(r, scores + (int64_t) t * r->n_experts, sums_to_one, r->chosen + t * r->k, r->shares + t * r->k);
		for (int i = 0; i < r->k; i++)
			r->first[r->chosen[t * r->k + i]]++;
	}
	/* counts become ends; filling from the last row backwards turns them into beginnings */
	for (int e = 1; e <= r->n_experts; e++)
		r->first[e] += r->first[e - 1];
	for (int i = n * r->k - 1; i >= 0; i--)
	{
		int32_t		at = --r->first[r->chosen[i]];

		r->rows[at] = i / r->k;
		r->weights[at] = r->shares[i];
	}
}
