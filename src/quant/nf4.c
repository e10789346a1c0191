/*
 * nf4.c -- NF4 and the 8-bit code of its scales: the tables, and values to codes.
 *
 * The rules are bitsandbytes': multiply by the reciprocal of the block's absmax, count the thresholds that lie
 * below.  All arithmetic is float32, one rounding for each operation: no expression below has a product and a sum
 * that a compiler might contract.  The loops are written so that a compiler vectorizes them, and compiled twice
 * (widen.h).
 */
#include <string.h>

#include "quant.h"
#include "widen.h"

const float millm_nf4_codebook[16] = {
	-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
	-0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
	0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
	0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

const float millm_fp4_codebook[16] = {
	0.0f, 0.0625f / 12, 8.0f / 12, 12.0f / 12, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
	-0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

/* The upper half of the dynamic map, as bits: entry 127 is 0, 255 is 1, entry 254 - k is minus entry k (128..254). */
static const uint32_t dynamic_map_bits[128] = {
	0x3513a3b7, 0x365a1a94, 0x370205ff, 0x37b24206, 0x38378034, 0x388aefb3, 0x38ba1f4b, 0x3923d70b,
	0x398ce705, 0x39c7e283, 0x3a016f01, 0x3a1eecc1, 0x3a3c6a80, 0x3a59e83e, 0x3a7765ff, 0x3aa7ef9d,
	0x3af1a9fc, 0x3b1db22d, 0x3b428f5c, 0x3b676c8a, 0x3b8624dd, 0x3b989374, 0x3bab020d, 0x3bbd70a4,
	0x3bcfdf3b, 0x3be24dd3, 0x3bf4bc6a, 0x3c039581, 0x3c0ccccd, 0x3c160418, 0x3c1f3b64, 0x3c3ae148,
	0x3c68f5c3, 0x3c8b851f, 0x3ca28f5d, 0x3cb9999a, 0x3cd0a3d7, 0x3ce7ae15, 0x3cfeb852, 0x3d0ae148,
	0x3d166667, 0x3d21eb85, 0x3d2d70a3, 0x3d38f5c3, 0x3d447ae1, 0x3d500000, 0x3d5b851f, 0x3d670a3d,
	0x3d728f5d, 0x3d7e147b, 0x3d84cccd, 0x3d8a8f5d, 0x3d9051eb, 0x3d96147b, 0x3d9bd70a, 0x3da1999a,
	0x3da75c2a, 0x3dad1eb8, 0x3db2e148, 0x3db8a3d7, 0x3dbe6667, 0x3dc428f7, 0x3dc9eb85, 0x3ddb3334,
	0x3df80000, 0x3e0a6666, 0x3e18cccd, 0x3e273333, 0x3e35999a, 0x3e440000, 0x3e526666, 0x3e60cccd,
	0x3e6f3333, 0x3e7d9999, 0x3e860000, 0x3e8d3334, 0x3e946666, 0x3e9b999a, 0x3ea2cccc, 0x3eaa0000,
	0x3eb13333, 0x3eb86666, 0x3ebf999a, 0x3ec6cccc, 0x3ece0000, 0x3ed53333, 0x3edc6666, 0x3ee3999a,
	0x3eeacccc, 0x3ef20000, 0x3ef93332, 0x3f003333, 0x3f03cccc, 0x3f076666, 0x3f0b0000, 0x3f0e999a,
	0x3f123334, 0x3f15cccd, 0x3f196666, 0x3f1d0000, 0x3f20999a, 0x3f243334, 0x3f27cccd, 0x3f2b6666,
	0x3f2f0000, 0x3f32999a, 0x3f363334, 0x3f39cccd, 0x3f3d6666, 0x3f410000, 0x3f44999a, 0x3f483333,
	0x3f4bcccd, 0x3f4f6666, 0x3f530000, 0x3f56999a, 0x3f5a3333, 0x3f5dcccd, 0x3f616666, 0x3f650000,
	0x3f68999a, 0x3f6c3333, 0x3f6fcccd, 0x3f736666, 0x3f770000, 0x3f7a999a, 0x3f7e3333, 0x3f800000,
};

void
millm_dynamic_map(float map[256])
{
	memcpy(map + 128, dynamic_map_bits, sizeof(dynamic_map_bits));
	map[127] = 0.0f;
	for (int k = 128; k < 255; k++)
		map[254 - k] = -map[k];
}

/* The largest magnitude of v[n]; false when it is infinite or NaN. */
INLINED bool
find_absmax(float *absmax, const float *v, size_t n)
{
	uint32_t	max = max_magnitude(v, n);

	memcpy(absmax, &max, 4);
	return max < INFINITY_BITS;
}

/* Code of x in [-1, 1]: how many midpoints of neighbours in the codebook, rounded to float32, lie below it. */
INLINED int32_t
nf4_code(float x)
{
	return (x > -0x1.b239b0p-1f) + (x > -0x1.38a4e0p-1f) + (x > -0x1.d70900p-2f) + (x > -0x1.5bd4ecp-2f)
		+ (x > -0x1.e079d8p-3f) + (x > -0x1.1a7178p-3f) + (x > -0x1.74f0e2p-5f) + (x > 0x1.45f5fep-5f)
		+ (x > 0x1.ec90c4p-4f) + (x > 0x1.a0cfc0p-3f) + (x > 0x1.2b05a8p-2f) + (x > 0x1.8ea7f2p-2f)
		+ (x > 0x1.00da08p-1f) + (x > 0x1.491b5ep-1f) + (x > 0x1.b913b4p-1f);
}

/* Below this the reciprocal of an absmax would overflow; bitsandbytes' CPU path has the same floor. */
#define SMALLEST_ABSMAX 1e-38f

/* One block of MILLM_NF4_BLOCK values. */
INLINED bool
encode_block(uint8_t *restrict packed, float *restrict absmax, const unsigned char *restrict values, MillmDtype dtype)
{
	float		v[MILLM_NF4_BLOCK];
	int32_t		code[MILLM_NF4_BLOCK];
	float		inverse;

	widen(v, values, dtype, MILLM_NF4_BLOCK);
	if (!find_absmax(absmax, v, MILLM_NF4_BLOCK))
		return false;
	inverse = 1.0f / (*absmax > SMALLEST_ABSMAX ? *absmax : SMALLEST_ABSMAX);
	for (int i = 0; i < MILLM_NF4_BLOCK; i++)
		code[i] = nf4_code(v[i] * inverse);
	for (int i = 0; i < MILLM_NF4_BLOCK / 2; i++)
		packed[i] = (uint8_t) (code[2 * i] << 4 | code[2 * i + 1]);
	return true;
}

/* The n < MILLM_NF4_BLOCK values that end a tensor: bitsandbytes divides here. */
INLINED bool
encode_rest(uint8_t *packed, float *absmax, const unsigned char *values, MillmDtype dtype, size_t n)
{
	float		v[MILLM_NF4_BLOCK] = {0};	/* an odd end is padded with zero */
	float		divisor;

	widen(v, values, dtype, n);
	if (!find_absmax(absmax, v, n))
		return false;
	divisor = *absmax > SMALLEST_ABSMAX ? *absmax : SMALLEST_ABSMAX;
	for (size_t i = 0; i < (n + 1) / 2; i++)
		packed[i] = (uint8_t) (nf4_code(v[2 * i] / divisor) << 4 | nf4_code(v[2 * i + 1] / divisor));
	return true;
}

INLINED bool
encode(uint8_t *packed, float *absmax, const void *values, MillmDtype dtype, size_t n)
{
	const unsigned char *x = values;
	size_t		n_blocks = n / MILLM_NF4_BLOCK;
	size_t		block_bytes = MILLM_NF4_BLOCK * (dtype == MILLM_F32 ? 4 : 2);

	for (size_t b = 0; b < n_blocks; b++)
		if (!encode_block(packed + b * (MILLM_NF4_BLOCK / 2), absmax + b, x + b * block_bytes, dtype))
			return false;
	if (n % MILLM_NF4_BLOCK == 0)
		return true;
	return encode_rest(packed + n_blocks * (MILLM_NF4_BLOCK / 2), absmax + n_blocks, x + n_blocks * block_bytes,
					   dtype, n % MILLM_NF4_BLOCK);
}

bool
millm_nf4_encode_portable(uint8_t *packed, float *absmax, const void *values, MillmDtype dtype, size_t n)
{
	return encode(packed, absmax, values, dtype, n);
}

AVX2 static bool
encode_avx2(uint8_t *packed, float *absmax, const void *values, MillmDtype dtype, size_t n)
{
	return encode(packed, absmax, values, dtype, n);
}

bool
millm_nf4_encode(uint8_t *packed, float *absmax, const void *values, MillmDtype dtype, size_t n)
{
	return (HAS_AVX2 ? encode_avx2 : millm_nf4_encode_portable) (packed, absmax, values, dtype, n);
}

float
millm_absmax_offset(const float *absmax, size_t n)
{
	double		sum = 0;

	for (size_t i = 0; i < n; i++)
		sum += absmax[i];
	return (float) (sum / (double) n);
}

/* The group's codes: for each x how many of the 255 midpoints lie below it, by eight halvings; on a midpoint the even one. */
static void
absmax_codes(uint8_t *codes, const float *x, const float *middle, size_t n)
{
	int32_t		code[MILLM_NF4_NESTED_BLOCK] = {0};

	/* the halvings outside: those of one x wait for each other */
	for (int half = 128; half > 0; half /= 2)
		for (size_t i = 0; i < n; i++)
			code[i] += (middle[code[i] + half - 1] < x[i]) * half;
	for (size_t i = 0; i < n; i++)
		codes[i] = (uint8_t) (code[i] + ((code[i] & 1) & (x[i] == middle[code[i]])));
}

void
millm_absmax_encode(uint8_t *codes, float *nested_absmax, const float *absmax, size_t n, float offset)
{
	float		map[256];
	float		middle[256];

	millm_dynamic_map(map);
	for (int i = 0; i < 255; i++)
	{
		float		sum = map[i] + map[i + 1];

		middle[i] = sum * 0.5f;
	}
	middle[255] = 2;			/* above every x; code 255 is tested for a tie like the others */
	for (size_t group = 0; group < n; group += MILLM_NF4_NESTED_BLOCK)
	{
		size_t		length = n - group < MILLM_NF4_NESTED_BLOCK ? n - group : MILLM_NF4_NESTED_BLOCK;
		float		x[MILLM_NF4_NESTED_BLOCK];
		float		max;
		float		inverse;
		uint32_t	max_bits;

		for (size_t i = 0; i < length; i++)
			x[i] = absmax[group + i] - offset;
		max_bits = max_magnitude(x, length);
		memcpy(&max, &max_bits, 4);
		nested_absmax[group / MILLM_NF4_NESTED_BLOCK] = max;
		if (max == 0)			/* every absmax is the offset; any code decodes to it */
		{
			memset(codes + group, 0, length);
			continue;
		}
		inverse = 1.0f / max;
		for (size_t i = 0; i < length; i++)
			x[i] *= inverse;
		absmax_codes(codes + group, x, middle, length);
	}
}
