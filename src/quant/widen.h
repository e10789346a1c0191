/*
 * widen.h -- inside of src/quant: stored values to float32, and the largest of them.  Loops without branches, which
 * compilers vectorize.
 *
 * The encoders are compiled twice, for any CPU and for AVX2, from the same lines: a function marked AVX2 calls the
 * inlined one that holds the loops.  Each operation is rounded once in both (AVX2 does not bring FMA), so the results
 * are the same bits.
 */
#ifndef MILLM_QUANT_WIDEN_H
#define MILLM_QUANT_WIDEN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tensor.h"

#define INLINED static inline __attribute__((always_inline))
#ifdef __x86_64__
#define AVX2		__attribute__((target("avx2")))
#define HAS_AVX2	__builtin_cpu_supports("avx2")	/* by the CPU and by the operating system */
#else
#define AVX2
#define HAS_AVX2	0
#endif

/* IEEE binary16 to binary32, bits to bits: millm_f16_to_f32() without a branch. */
INLINED uint32_t
widen_f16(uint16_t h)
{
	uint32_t	magnitude = h & 0x7FFF;
	uint32_t	is_subnormal = -(uint32_t) (magnitude < 0x400);	/* masks: all bits or none */
	uint32_t	is_special = -(uint32_t) (magnitude >= 0x7C00);
	uint32_t	normal = (magnitude << 13) + (112u << 23) + (is_special & 112u << 23);
	float		tiny = (float) (int32_t) magnitude * 0x1p-24f;
	uint32_t	subnormal;

	memcpy(&subnormal, &tiny, 4);
	return (uint32_t) (h & 0x8000) << 16 | (is_subnormal & subnormal) | (~is_subnormal & normal);
}

/* y[n] = the n values of dtype F32, F16 or BF16 at x, which may be unaligned. */
INLINED void
widen(float *restrict y, const void *restrict x, MillmDtype dtype, size_t n)
{
	const unsigned char *bytes = x;

	if (dtype == MILLM_F32)
		memcpy(y, x, n * 4);
	else if (dtype == MILLM_BF16)
		for (size_t i = 0; i < n; i++)
		{
			uint16_t	h;
			uint32_t	u;

			memcpy(&h, bytes + 2 * i, 2);
			u = (uint32_t) h << 16;
			memcpy(y + i, &u, 4);
		}
	else
		for (size_t i = 0; i < n; i++)
		{
			uint16_t	h;
			uint32_t	u;

			memcpy(&h, bytes + 2 * i, 2);
			u = widen_f16(h);
			memcpy(y + i, &u, 4);
		}
}

/* Bits of the largest magnitude of the n floats at p, unaligned.  Magnitudes order as their bits do; NaN lies above infinity. */
INLINED uint32_t
max_magnitude(const void *p, size_t n)
{
	uint32_t	max = 0;

	for (size_t i = 0; i < n; i++)
	{
		uint32_t	u;

		memcpy(&u, (const unsigned char *) p + 4 * i, 4);
		u &= 0x7FFFFFFF;
		max = u > max ? u : max;
	}
	return max;
}

#define INFINITY_BITS 0x7F800000u

#endif
