/*
 * int8.c -- LLM.int8's weights: one scale per row, the row's largest magnitude after a rounding to F16.
 *
 * The scale that multiplies is 127 times the reciprocal, both rounded, which is how PyTorch evaluates 127 / x.
 */
#include <string.h>

#include "half.h"
#include "quant.h"

/* half[n] = row rounded to F16, as float32; *absmax its largest magnitude. */
static MillmInt8Result
round_row(float *half, float *absmax, const unsigned char *row, MillmDtype dtype, size_t n)
{
	uint16_t	max = 0;

	for (size_t i = 0; i < n; i++)
	{
		uint16_t	h;

		if (dtype == MILLM_F16)
			memcpy(&h, row + 2 * i, 2);
		else
		{
			float		f;

			if (dtype == MILLM_BF16)
			{
				memcpy(&h, row + 2 * i, 2);
				f = millm_bf16_to_f32(h);
			}
			else
				memcpy(&f, row + 4 * i, 4);
			if (!(f - f == 0))
				return MILLM_INT8_NOT_FINITE;
			h = millm_f32_to_f16(f);
			if ((h & 0x7FFF) == 0x7C00)
				return MILLM_INT8_OVERFLOW;
		}
		max = (h & 0x7FFF) > max ? h & 0x7FFF : max;
		half[i] = millm_f16_to_f32(h);
	}
	*absmax = millm_f16_to_f32(max);
	return max < 0x7C00 ? MILLM_INT8_OK : MILLM_INT8_NOT_FINITE;
}

MillmInt8Result
millm_int8_encode(int8_t *q, float *scb, float *half, const void *values, MillmDtype dtype, size_t n_rows, size_t n_in)
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
