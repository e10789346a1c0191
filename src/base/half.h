/*
 * half.h -- the two 16-bit floating-point formats and float32.
 *
 * bf16 is the upper half of a float32; f16 is IEEE 754 binary16.  Rounding is to nearest even.
 */
#ifndef MILLM_HALF_H
#define MILLM_HALF_H

#include <stdint.h>
#include <string.h>

static inline float
millm_bf16_to_f32(uint16_t h)
{
	uint32_t	u = (uint32_t) h << 16;
	float		f;

	memcpy(&f, &u, sizeof(f));
	return f;
}

static inline uint16_t
millm_f32_to_bf16(float f)
{
	uint32_t	u;

	memcpy(&u, &f, sizeof(u));
	if ((u & 0x7FFFFFFF) > 0x7F800000)
		return (uint16_t) (u >> 16 | 0x40);	/* a NaN stays a NaN */
	return (uint16_t) ((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

static inline float
millm_f16_to_f32(uint16_t h)
{
	uint32_t	sign = (uint32_t) (h & 0x8000) << 16;
	uint32_t	exp = h >> 10 & 0x1F;
	uint32_t	man = h & 0x3FF;
	uint32_t	u;
	float		f;

	if (exp == 0)
	{
		f = (float) man * 0x1p-24f;	/* zero and subnormals: exact in float32 */
		return sign ? -f : f;
	}
	if (exp == 31)
		u = sign | 0x7F800000 | man << 13;
	else
		u = sign | (exp + 112) << 23 | man << 13;
	memcpy(&f, &u, sizeof(f));
	return f;
}

static inline uint16_t
millm_f32_to_f16(float f)
{
	uint32_t	u;
	uint16_t	sign;
	float		a;

	memcpy(&u, &f, sizeof(u));
	sign = (uint16_t) (u >> 16 & 0x8000);
	u &= 0x7FFFFFFF;
	if (u > 0x7F800000)
		return sign | 0x7E00;
	if (u >= 0x477FF000)			/* rounds to 65536 or more */
		return sign | 0x7C00;
	if (u < 0x38800000)			/* below 2^-14: a subnormal; adding 0.5 rounds at 2^-24 */
	{
		memcpy(&a, &u, sizeof(a));
		a += 0.5f;
		memcpy(&u, &a, sizeof(u));
		return sign | (uint16_t) (u - 0x3F000000);
	}
	u += 0xFFF + (u >> 13 & 1);
	return sign | (uint16_t) ((u - 0x38000000) >> 13);
}

#endif
