/* test_half.c -- every 16-bit value goes to float32 and back; rounding is to nearest even. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "half.h"

static void
round_trip(void **state)
{
	(void) state;
	for (uint32_t h = 0; h < 65536; h++)
	{
		float		f = millm_f16_to_f32((uint16_t) h);
		float		b = millm_bf16_to_f32((uint16_t) h);

		if (isnan(f))
			assert_true(isnan(millm_f16_to_f32(millm_f32_to_f16(f))));
		else
			assert_int_equal(millm_f32_to_f16(f), h);
		if (isnan(b))
			assert_true(isnan(millm_bf16_to_f32(millm_f32_to_bf16(b))));
		else
			assert_int_equal(millm_f32_to_bf16(b), h);
	}
}

static void
f16_values(void **state)
{
	(void) state;
	assert_true(millm_f16_to_f32(0x3C00) == 1.0f);
	assert_true(millm_f16_to_f32(0xC000) == -2.0f);
	assert_true(millm_f16_to_f32(0x7BFF) == 65504.0f);
	assert_true(millm_f16_to_f32(0x0001) == 0x1p-24f);
	assert_true(millm_f16_to_f32(0x0400) == 0x1p-14f);
	assert_true(isinf(millm_f16_to_f32(0x7C00)));
	assert_true(isnan(millm_f16_to_f32(0x7E00)));
}

/* Between two neighbours the middle goes to the even one, its own neighbours to the nearer. */
static void
nearest_even(void **state)
{
	(void) state;
	for (uint32_t h = 0; h + 1 < 0x7C00; h++)
	{
		float		mid = (millm_f16_to_f32((uint16_t) h) + millm_f16_to_f32((uint16_t) (h + 1))) / 2;

		assert_int_equal(millm_f32_to_f16(mid), h + (h & 1));
		assert_int_equal(millm_f32_to_f16(nextafterf(mid, 0)), h);
		assert_int_equal(millm_f32_to_f16(nextafterf(mid, INFINITY)), h + 1);
		assert_int_equal(millm_f32_to_f16(-mid), 0x8000 | (h + (h & 1)));
	}
	for (uint32_t h = 0x0080; h + 1 < 0x7F80; h++)
	{
		float		mid = millm_bf16_to_f32((uint16_t) h) / 2 + millm_bf16_to_f32((uint16_t) (h + 1)) / 2;

		assert_int_equal(millm_f32_to_bf16(mid), h + (h & 1));
		assert_int_equal(millm_f32_to_bf16(nextafterf(mid, 0)), h);
	}
	assert_int_equal(millm_f32_to_f16(65519.996f), 0x7BFF);
	assert_int_equal(millm_f32_to_f16(65520.0f), 0x7C00);
	assert_int_equal(millm_f32_to_f16(1e30f), 0x7C00);
	assert_int_equal(millm_f32_to_f16(0x1p-25f), 0x0000);
	assert_int_equal(millm_f32_to_f16(nextafterf(0x1p-25f, 1)), 0x0001);
	assert_int_equal(millm_f32_to_bf16(3.4028235e38f), 0x7F80);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(round_trip), cmocka_unit_test(f16_values), cmocka_unit_test(nearest_even),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
