/* test_route.c -- which experts a row goes to: the largest scores, each row with each of its experts once, weights that add up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>

#include "route.h"

static void
assert_near(float got, double expected)
{
	if (!(fabs(got - expected) <= 1e-6))
		fail_msg("%.9g, expected %.9g", got, expected);
}

static void
test_by_hand(void **state)
{
	/* two equal scores: the lower number first */
	static const float scores[3][4] = {{1, 3, 2, 0}, {5, 5, 5, 5}, {0, 1, 2, 3}};
	static const int32_t first[] = {0, 1, 3, 5, 6}, rows[] = {1, 0, 1, 0, 2, 2};
	const double all = exp(1) + exp(3) + exp(2) + exp(0);
	MillmRoutes r;

	(void) state;
	assert_true(millm_routes_init(&r, 4, 2, 3));
	for (int sums_to_one = 0; sums_to_one < 2; sums_to_one++)
	{
		millm_route(&r, scores[0], sums_to_one, 3);
		assert_memory_equal(r.first, first, sizeof(first));
		assert_memory_equal(r.rows, rows, sizeof(rows));
		assert_near(r.weights[0], sums_to_one ? 0.5 : 0.25);
		assert_near(r.weights[1], exp(3) / (sums_to_one ? exp(3) + exp(2) : all));
		assert_near(r.weights[2], sums_to_one ? 0.5 : 0.25);
		assert_near(r.weights[3], exp(2) / (sums_to_one ? exp(3) + exp(2) : all));
	}
	/* fewer rows after more */
	millm_route(&r, scores[2], true, 1);
	assert_int_equal(r.first[2], 0);
	assert_int_equal(r.first[4], 2);
	assert_near(r.weights[1], exp(3) / (exp(3) + exp(2)));
	millm_routes_free(&r);
}

static void
test_extremes(void **state)
{
	static const float scores[][3] = {{1, NAN, 2}, {INFINITY, 0, 0}, {-INFINITY, -INFINITY, 7}, {88, 1e30f, -1e30f}};
	MillmRoutes r;

	(void) state;
	assert_true(millm_routes_init(&r, 3, 2, 1));
	millm_route(&r, scores[0], true, 1);
	assert_int_equal(r.first[3], 2);
	assert_true(isnan(r.weights[0]) || isnan(r.weights[1]));
	millm_route(&r, scores[1], true, 1);
	assert_true(isnan(r.weights[0]));
	millm_route(&r, scores[2], true, 1);	/* of the two that are nothing, the first */
	assert_int_equal(r.first[1], 1);
	assert_near(r.weights[0], 0);
	assert_near(r.weights[1], 1);
	millm_route(&r, scores[3], false, 1);
	assert_near(r.weights[0], 0);
	assert_near(r.weights[1], 1);
	millm_routes_free(&r);
}

/* Many shapes at random against a plain search. */
static void
test_random(void **state)
{
	enum {ROWS = 37, EXPERTS = 29};
	float		scores[ROWS * EXPERTS];
	unsigned	random = 7;

	(void) state;
	for (int n_experts = 1; n_experts <= EXPERTS; n_experts += 4)
		for (int k = 1; k <= n_experts; k += 3)
		{
			MillmRoutes r;
			int			n_seen[ROWS] = {0};
			double		sum[ROWS] = {0};

			for (int i = 0; i < ROWS * n_experts; i++)
			{
				random = random * 1103515245 + 12345;
				scores[i] = (float) (random >> 16 & 63) / 8;	/* with many equals */
			}
			assert_true(millm_routes_init(&r, n_experts, k, ROWS));
			millm_route(&r, scores, true, ROWS);
			assert_int_equal(r.first[0], 0);
			assert_int_equal(r.first[n_experts], ROWS * k);
			for (int e = 0; e < n_experts; e++)
				for (int i = r.first[e]; i < r.first[e + 1]; i++)
				{
					int			t = r.rows[i],
								n_before = 0;

					assert_true(i == r.first[e] || r.rows[i - 1] < t);
					for (int o = 0; o < n_experts; o++)
						n_before += scores[t * n_experts + o] > scores[t * n_experts + e] || (scores[t * n_experts + o] == scores[t * n_experts + e] && o < e);
					assert_true(n_before < k);
					n_seen[t]++;
					sum[t] += r.weights[i];
				}
			for (int t = 0; t < ROWS; t++)
			{
				assert_int_equal(n_seen[t], k);
				assert_near((float) sum[t], 1);
			}
			millm_routes_free(&r);
		}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_by_hand),
		cmocka_unit_test(test_extremes),
		cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
