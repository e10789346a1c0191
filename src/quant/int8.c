/*
 * int8.c -- LLM.int8's weights: one scale per row, the row's largest magnitude after a rounding to F16.
 *
 * The scale that multiplies is 127 times the reciprocal, both rounded, which is how PyTorch evaluates 127 / x.
 */
#include <string.h>

#include "quant.h"
#include "widen.h"

/*
 * The bits of a float32 magnitude, rounded to the nearest F16, ties to even: millm_f32_to_f16() and back without a
 * branch.  Normal ones lose 13 bits; below 2^-14 F16's step is 2^-24, the last bit of what is added to 0.5.
 */
INLINED uint32_t
round_to_f16(uint32_t magnitude)
{
	uint32_t	normal = (magnitude + 0xFFF + (magnitude >> 13 & 1)) & ~0x1FFFu;
	uint32_t	is_subnormal = -(uint32_t) (magnitude < 0x38800000);	/* a mask: all bits or none */
	uint32_t	subnormal;
	float		f;

	memcpy(&f, &magnitude, 4);
	f += 0.5f;
	f -= 0.5f;
	memcpy(&subnormal, &f, 4);
	return (is_subnormal & subnormal) | (~is_subnormal & normal);
}

/* half[n] = row rounded to F16, as float32; *absmax its largest magnitude. */
INLINED MillmInt8Result
round_row(float *half, float *absmax, const unsigned char *row, MillmDtype dtype, size_t n)
{
	uint32_t	max;

	widen(half, row, dtype, n);
	if (max_magnitude(half, n) >= INFINITY_BITS)
		return MILLM_INT8_NOT_FINITE;
	if (dtype != MILLM_F16)
		for (size_t i = 0; i < n; i++)
		{
			uint32_t	u;

			memcpy(&u, half + i, 4);
			u = (u & 0x80000000) | round_to_f16(u & 0x7FFFFFFF);
			memcpy(half + i, &u, 4);
		}
	max = max_magnitude(half, n);
	memcpy(absmax, &max, 4);
	return *absmax < 65536 ? MILLM_INT8_OK : MILLM_INT8_OVERFLOW;
}

INLINED MillmInt8Result
encode(int8_t *q, float *scb, float *half, const void *values, MillmDtype dtype, size_t n_rows, size_t n_in)
{
	const unsigned char *row = values;

	for (size_t r = 0; r < n_rows; r++)
	{
		MillmInt8Result result = round_row(half, scb + r, row, dtype, n_in);
		float		scale = 0;

		if (result != MILLM_INT8_OK)
			return result;
		if (scb[r] > 0)			/* a row of zeros stays one */
		{
			scale = 1.0f / scb[r];
			scale *= 127.0f;
		}
		for (size_t i = 0; i < n_in; i++)
		{
			/* 1.5 * 2^23 pushes the fraction out, rounding to nearest even; the low bits then are the integer */
			float		x = half[i] * scale;
			float		shifted = x + 0x1.8p23f;
			uint32_t	bits;

			memcpy(&bits, &shifted, 4);
			q[i] = (int8_t) (uint8_t) bits;
		}
		q += n_in;
		row += n_in * (dtype == MILLM_F32 ? 4 : 2);
	}
	return MILLM_INT8_OK;
}

MillmInt8Result
millm_int8_encode_portable(int8_t *q, float *scb, float *half, const void *values, MillmDtype dtype, size_t n_rows, size_t n_in)
{
	return encode(q, scb, half, values, dtype, n_rows, n_in);
}

AVX2 static MillmInt8Result
encode_avx2(int8_t *q, float *scb, float *half, const void *values, MillmDtype dtype, size_t n_rows, size_t n_in)
{
	return encode(q, scb, half, values, dtype, n_rows, n_in);
}

MillmInt8Result
millm_int8_encode(int8_t *q, float *scb, float *half, const void *values, MillmDtype dtype, size_t n_rows, size_t n_in)
{
	return (HAS_AVX2 ? encode_avx2 : millm_int8_encode_portable) (q, scb, half, values, dtype, n_rows, n_in);
}
