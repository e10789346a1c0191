/*
 * test_quant.c -- the formats against worked examples (bitsandbytes' own results; the library itself is
 * asked in test/parity/test_quant.py), the stream cut at every place, and strangers' lies.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <jansson.h>
#include <openssl/sha.h>

#include "half.h"
#include "quant.h"

static void
assert_hex(const void *data, size_t n, const char *hex)
{
	char		text[2048];

	assert_true(n * 2 < sizeof(text));
	for (size_t i = 0; i < n; i++)
		snprintf(text + 2 * i, 3, "%02x", ((const uint8_t *) data)[i]);
	assert_string_equal(text, hex);
}

static void
assert_sha256(const void *data, size_t n, const char *hex)
{
	unsigned char digest[32];

	SHA256(data, n, digest);
	assert_hex(digest, sizeof(digest), hex);
}

static float
from_bits(uint32_t u)
{
	float		f;

	memcpy(&f, &u, 4);
	return f;
}

/* Fixture F: 128 x 256 pseudorandom bf16 values. */
static uint16_t *
nested_fixture(void)
{
	static uint16_t w[128 * 256];
	uint32_t	x = 12345;

	for (int i = 0; i < 128 * 256; i++)
	{
		float		v;

		x = 1664525 * x + 1013904223;
		v = ((float) (x >> 8) - 8388608.0f) / 8388608.0f;
		w[i] = millm_f32_to_bf16(v * 0.05f);
	}
	return w;
}

/* --- tables -- */

/* The map again, from its definition: means between the ends of 2^i equal steps of [0.1, 1], times powers of ten. */
static void
dynamic_map(void **state)
{
	float		map[256];

	(void) state;
	millm_dynamic_map(map);
	for (int i = 0; i <= 6; i++)
	{
		int			m = 1 << i;
		float		step = (1.0f - 0.1f) / (float) m;
		float		power = (float) pow(10, i - 6);
		float		low = 0.1f;

		for (int j = 0; j < m; j++)
		{
			float		high = j + 1 < (m + 1) / 2 ? fmaf(step, (float) (j + 1), 0.1f) : fmaf(-step, (float) (m - 1 - j), 1.0f);
			float		mean = (low + high) / 2;

			assert_true(map[128 + m - 1 + j] == power * mean);
			assert_true(map[127 - (m + j)] == -(power * mean));
			low = high;
		}
	}
	assert_true(map[127] == 0 && !signbit(map[127]) && map[255] == 1);
	assert_sha256(map, sizeof(map), "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c");
}

/* Each threshold is the middle of two codes, rounded; it belongs to the lower one. */
static void
thresholds(void **state)
{
	(void) state;
	for (int c = 0; c < 15; c++)
	{
		float		sum = millm_nf4_codebook[c] + millm_nf4_codebook[c + 1];
		float		v[64] = {1.0f, sum / 2, nextafterf(sum / 2, 2), nextafterf(sum / 2, -2)};
		uint8_t		packed[32];
		float		absmax;

		assert_true(millm_nf4_encode(packed, &absmax, v, MILLM_F32, 64));
		assert_int_equal(packed[0], 0xF0 | c);
		assert_int_equal(packed[1], (c + 1) << 4 | c);
	}
}

/* --- NF4 -- */

static void
ramp(void **state)
{
	uint16_t	w[128];
	uint8_t		packed[64];
	float		absmax[2];

	(void) state;
	for (int i = 0; i < 128; i++)
		w[i] = millm_f32_to_bf16((float) (i - 64) / 64);
	assert_true(millm_nf4_encode(packed, absmax, w, MILLM_BF16, 128));
	assert_hex(packed, 64, "00000000001111111111111112222222222333333334444445555555666666777778888899999aaaaaabbbbbbcccccccdddddddddeeeeeeeeeeeeeefffffffff");
	assert_hex(absmax, 8, "0000803f00007c3f");
}

static void
zeros_and_signs(void **state)
{
	uint16_t	w[128] = {0};
	uint8_t		packed[64];
	float		absmax[2];

	(void) state;
	for (int i = 0; i < 64; i++)
		w[64 + i] = millm_f32_to_bf16((float) (i % 16 - 8) / 8);
	assert_true(millm_nf4_encode(packed, absmax, w, MILLM_BF16, 128));
	assert_hex(packed, 32, "7777777777777777777777777777777777777777777777777777777777777777");
	assert_hex(packed + 32, 32, "0011234679abcdef0011234679abcdef0011234679abcdef0011234679abcdef");
	assert_hex(absmax, 8, "000000000000803f");

	for (int i = 0; i < 64; i++)
		w[i] = millm_f32_to_bf16(i == 0 ? -2.0f : (float) (7 * i % 17 - 8) / 8);
	assert_true(millm_nf4_encode(packed, absmax, w, MILLM_BF16, 64));
	assert_hex(packed, 32, "06b4937c5a38c6b4926b4937c5a38c6b4926b4937c5a38c6b4926b4937c5a38c");
	assert_hex(absmax, 4, "00000040");
}

static void
odd_end(void **state)
{
	uint16_t	w[67];
	uint8_t		packed[34];
	float		absmax[2];

	(void) state;
	for (int i = 0; i < 67; i++)
		w[i] = millm_f32_to_bf16((float) (13 * i % 31 - 15) / 16);
	assert_true(millm_nf4_encode(packed, absmax, w, MILLM_BF16, 67));
	assert_hex(packed, 34, "06e2c18f4d2a06e3c19f5e2b07f4d1906e2c18f4d2a06e3c19f5e2b07f4d1906f1d7");
	assert_hex(absmax, 8, "0000703f0000303f");
}

/* Magnitudes whose reciprocal overflows: every code is still in its place. */
static void
denormals(void **state)
{
	float		v[64];
	uint8_t		packed[32];
	float		absmax;

	(void) state;
	for (int i = 0; i < 64; i++)
		v[i] = from_bits((uint32_t) (i + 1) | (i % 2 ? 0x80000000 : 0));
	assert_true(millm_nf4_encode(packed, &absmax, v, MILLM_F32, 64));
	assert_true(absmax == from_bits(64));
	for (int i = 0; i < 32; i++)
		assert_int_equal(packed[i], 0x77);	/* all far below bitsandbytes' floor of 1e-38 */
}

static void
nested(void **state)
{
	uint16_t   *w = nested_fixture();
	MillmQuantEncoder *enc;
	MillmError	err;
	const MillmQuantPart *parts;
	int			n_parts;
	uint8_t	   *packed = malloc(16384);
	float		absmax[512];
	float	   *y = malloc(128 * 256 * sizeof(float));
	MillmQuantState st;
	MillmQuantWeight weight;
	MillmStored s[6];

	(void) state;
	assert_sha256(w, 65536, "13dffdab66194180c61e473895bfd0f04b10f891bdca930259ce62308735edc3");
	assert_true(millm_nf4_encode(packed, absmax, w, MILLM_BF16, 128 * 256));
	assert_sha256(absmax, sizeof(absmax), "ca45dc41a27cc279b81639d5406bfea5d4b6914e515f17b8b8173cbb561b20c9");

	assert_int_equal(millm_quant_begin(MILLM_QUANT_NF4, "x.weight", MILLM_BF16, 128, 256, &enc, &err), MILLM_OK);
	assert_int_equal(millm_quant_push_writes(enc, 65536), 16384);
	assert_int_equal(millm_quant_push(enc, w, 65536, packed, &err), MILLM_OK);
	assert_int_equal(millm_quant_finish(enc, &parts, &n_parts, &err), MILLM_OK);
	assert_int_equal(n_parts, 6);
	assert_sha256(packed, 16384, "bad75e664b1557fc15527c711ea2e9a090b81ad918673e8b37b3eee222b1766e");
	assert_int_equal(parts[0].bytes, 16384);
	assert_string_equal(parts[1].suffix, ".weight.absmax");
	assert_int_equal(parts[1].bytes, 512);
	assert_sha256(parts[1].data, 512, "8621596d056ae53fc6f6e5c4b6b50f8769ce2eba0717039f88b4f1f558176c37");
	assert_int_equal(parts[3].bytes, 8);
	assert_hex(parts[3].data, 8, "002c963b00586c3b");
	assert_int_equal(parts[5].bytes, 171);
	assert_sha256(parts[5].data, 171, "70c9038e9f0aaadc7680e05739b194df68a2eb2d901f168d238a20870fdfbc96");

	/* and back */
	for (int i = 0; i < 6; i++)
		s[i] = (MillmStored) {parts[i].dtype, i == 0 ? packed : parts[i].data, parts[i].bytes};
	assert_int_equal(millm_quant_state_read("x.weight.quant_state.bitsandbytes__nf4", s[5].data, s[5].bytes, &st, &err), MILLM_OK);
	assert_int_equal(millm_quant_bind_4bit("x.weight", &st, s[0], s[1], s[2], s[3], s[4], &weight, &err), MILLM_OK);
	millm_quant_dequantize(y, &weight, 0, 128 * 256);
	for (int i = 0; i < 128 * 256; i++)
		w[i] = millm_f32_to_bf16(y[i]);
	assert_sha256(w, 65536, "58d78e352fb5172a606f3d6feb6298f2d89e16cc823b916783132e6c04b1e943");
	/* any range is the same values */
	for (int64_t first = 0; first < 128 * 256 - 700; first += 641)
	{
		float		z[700];

		millm_quant_dequantize(z, &weight, first, 1 + first % 700);
		assert_memory_equal(z, y + first, (size_t) (1 + first % 700) * sizeof(float));
	}
	millm_quant_free(enc);
	free(packed);
	free(y);
}

/* One block: its absmax is the offset, nothing is left to encode. */
static void
single_block(void **state)
{
	float		absmax = 0.75f, nested_absmax = 1;
	uint8_t		code = 1;

	(void) state;
	assert_true(millm_absmax_offset(&absmax, 1) == 0.75f);
	millm_absmax_encode(&code, &nested_absmax, &absmax, 1, 0.75f);
	assert_int_equal(code, 0);
	assert_true(nested_absmax == 0);
}

/* --- INT8 -- */

static void
int8_rows(void **state)
{
	static const uint16_t w[3][16] = {
		{0xbc00, 0xbb00, 0xba00, 0xb900, 0xb800, 0xb600, 0xb400, 0xb000, 0x0000, 0x3000, 0x3400, 0x3600, 0x3800, 0x3900, 0x3a00, 0x3b00},
		{0x2c9d, 0xa89d, 0x289d, 0xa625, 0xa51f, 0xa419, 0xa225, 0xa019, 0x9c19, 0x0000, 0x1c19, 0x2019, 0x2225, 0x2419, 0x251f, 0x2625},
		{0},
	};
	int8_t		q[32];
	float		scb[2], half[16];

	(void) state;
	assert_int_equal(millm_int8_encode(q, scb, half, w[0], MILLM_F16, 2, 16), MILLM_INT8_OK);
	assert_hex(q, 16, "8191a1b1c0d0e0f000102030404f5f6f");
	assert_hex(q + 16, 16, "7fc13fd6dde4ebf2f900070e151c232a");
	assert_hex(scb, 8, "0000803f00a0933d");
	assert_int_equal(millm_int8_encode(q, scb, half, w[2], MILLM_F16, 1, 16), MILLM_INT8_OK);
	assert_hex(q, 16, "00000000000000000000000000000000");
	assert_hex(scb, 4, "00000000");
}

static void
int8_beyond_f16(void **state)
{
	float		fits[2] = {65519, -1}, overflows[2] = {1, -65520};
	uint16_t	bf16[2] = {0x3F80, 0x4780};	/* 65536 */
	uint16_t	inf[2] = {0x7C00, 0};
	int8_t		q[2];
	float		scb, half[2];

	(void) state;
	assert_int_equal(millm_int8_encode(q, &scb, half, fits, MILLM_F32, 1, 2), MILLM_INT8_OK);
	assert_true(scb == 65504 && q[0] == 127 && q[1] == 0);
	assert_int_equal(millm_int8_encode(q, &scb, half, overflows, MILLM_F32, 1, 2), MILLM_INT8_OVERFLOW);
	assert_int_equal(millm_int8_encode(q, &scb, half, bf16, MILLM_BF16, 1, 2), MILLM_INT8_OVERFLOW);
	assert_int_equal(millm_int8_encode(q, &scb, half, inf, MILLM_F16, 1, 2), MILLM_INT8_NOT_FINITE);
}

/* The way through F16 is base's: every bf16 value, and the neighbourhood of every middle of two F16 values. */
static void
int8_rounding(void **state)
{
	(void) state;
	for (uint32_t i = 0; i < 0x7C00 * 6; i++)
	{
		float		mid = (millm_f16_to_f32((uint16_t) (i / 6)) + millm_f16_to_f32((uint16_t) (i / 6 + 1))) / 2;
		float		near[3] = {mid, nextafterf(mid, 0), nextafterf(mid, INFINITY)};
		float		v = i % 2 ? -near[i % 3] : near[i % 3];
		uint16_t	bf16 = millm_f32_to_bf16(v), f16 = millm_f32_to_f16(v);
		int8_t		q;
		float		scb, half;

		if ((f16 & 0x7FFF) == 0x7C00)
			continue;
		assert_int_equal(millm_int8_encode(&q, &scb, &half, &v, MILLM_F32, 1, 1), MILLM_INT8_OK);
		assert_true(half == millm_f16_to_f32(f16) && scb == fabsf(half));
		assert_int_equal(millm_int8_encode(&q, &scb, &half, &f16, MILLM_F16, 1, 1), MILLM_INT8_OK);
		assert_true(half == millm_f16_to_f32(f16) && scb == fabsf(half));
		f16 = millm_f32_to_f16(millm_bf16_to_f32(bf16));
		if ((f16 & 0x7FFF) == 0x7C00)
			continue;
		assert_int_equal(millm_int8_encode(&q, &scb, &half, &bf16, MILLM_BF16, 1, 1), MILLM_INT8_OK);
		assert_true(half == millm_f16_to_f32(f16) && scb == fabsf(half));
	}
}

/* --- every instruction set -- */

/* Do the encoders in use and the portable ones do the same with the n values of dtype, as NF4 and as rows of n_in?  Bytes and verdict. */
static void
assert_same(const void *values, MillmDtype dtype, size_t n, size_t n_in)
{
	const size_t bytes = n * (dtype == MILLM_F32 ? 4 : 2);
	unsigned char *x = malloc(bytes + 1);	/* unaligned */
	uint8_t    *packed[2] = {calloc(n, 1), calloc(n, 1)};
	float	   *scales[2] = {calloc(n, sizeof(float)), calloc(n, sizeof(float))};
	float	   *half = malloc(n_in * sizeof(float));
	MillmInt8Result result;

	memcpy(x + 1, values, bytes);
	assert_int_equal(millm_nf4_encode(packed[0], scales[0], x + 1, dtype, n),
					 millm_nf4_encode_portable(packed[1], scales[1], x + 1, dtype, n));
	if (millm_nf4_encode(packed[0], scales[0], x + 1, dtype, n))
	{
		assert_memory_equal(packed[0], packed[1], (n + 1) / 2);
		assert_memory_equal(scales[0], scales[1], (n + 63) / 64 * sizeof(float));
	}
	result = millm_int8_encode((int8_t *) packed[0], scales[0], half, x + 1, dtype, n / n_in, n_in);
	assert_int_equal(result, millm_int8_encode_portable((int8_t *) packed[1], scales[1], half, x + 1, dtype, n / n_in, n_in));
	if (result == MILLM_INT8_OK)
	{
		assert_memory_equal(packed[0], packed[1], n / n_in * n_in);
		assert_memory_equal(scales[0], scales[1], n / n_in * sizeof(float));
	}
	for (int i = 0; i < 2; i++)
	{
		free(packed[i]);
		free(scales[i]);
	}
	free(x);
	free(half);
}

/* Every 16-bit value, finite or not, as a share of several absmax; and each alone among zeros. */
static void
variants_16bit(void **state)
{
	static const uint16_t absmax[][2] = {{0x3C00, 0x3F80}, {0x3555, 0x3EAB}, {0x7BFF, 0x477F}, {0x7BFF, 0x7F7F}, {0x0001, 0x0001}, {0x03FF, 0x0080}};
	uint16_t	v[64];

	(void) state;
	for (int is_bf16 = 0; is_bf16 < 2; is_bf16++)
	{
		MillmDtype	dtype = is_bf16 ? MILLM_BF16 : MILLM_F16;

		for (uint32_t first = 0; first < 65536; first += 63)
			for (size_t a = 0; a < sizeof(absmax) / sizeof(absmax[0]); a++)
			{
				v[0] = absmax[a][is_bf16];
				for (uint32_t i = 0; i < 63; i++)
				{
					v[1 + i] = (uint16_t) (first + i);
					if (a > 0 && (v[1 + i] & 0x7FFF) > v[0])	/* larger ones, and those that are not finite, only with the first */
						v[1 + i] = 0;
				}
				assert_same(v, dtype, 64, 64);
			}
		for (uint32_t h = 0; h < 65536; h += h < 256 || h % 32768 > 0x7B00 ? 1 : 61)
		{
			memset(v, 0, sizeof(v));
			v[h % 64] = (uint16_t) h;
			assert_same(v, dtype, 64, 64);
		}
	}
}

/* Random bits and random magnitudes, each length that leaves a tail, rows of odd lengths, values that are not finite anywhere. */
static void
variants_any(void **state)
{
	static const MillmDtype dtypes[] = {MILLM_F32, MILLM_F16, MILLM_BF16};
	unsigned char raw[300 * 4];
	uint64_t	x = 88172645463325252;

	(void) state;
	for (size_t round = 0; round < 3000; round++)
	{
		MillmDtype	dtype = dtypes[round % 3];
		size_t		size = dtype == MILLM_F32 ? 4 : 2;
		unsigned	mask = (unsigned[]) {0x7F, 0x3F, 0xBF, 0x83}[round / 3 % 4];	/* of the sign and the first bits of the exponent */
		size_t		n = 1 + round % 300;

		for (size_t i = 0; i < sizeof(raw); i++)
		{
			x ^= x << 13, x ^= x >> 7, x ^= x << 17;
			raw[i] = (unsigned char) (x >> 32);
			if (i % size == size - 1)
				raw[i] &= (unsigned char) mask;
		}
		if (mask == 0x7F && round % 5 > 0)	/* all of them small: denormals and near */
			for (size_t i = size - 1; i < sizeof(raw); i += size)
				raw[i] &= 0x80;
		assert_same(raw, dtype, n, 1 + round / 3 % n);
	}
}

/* Double quantization beside its definition: count the midpoints below, one after the other; a midpoint goes to the even code. */
static void
absmax_rule(void **state)
{
	enum {N = 2 * 256 + 77};
	float		map[256], absmax[N], nested_absmax[3];
	uint8_t		codes[N];
	uint32_t	x = 7;

	(void) state;
	millm_dynamic_map(map);
	for (int i = 0; i < N; i++)
	{
		x = 1664525 * x + 1013904223;
		absmax[i] = ldexpf((float) (x >> 8), -24 - (int) (x & 7));
	}
	for (int i = 0; i < 255; i++)	/* a group whose scale is 1: all midpoints, exactly */
		absmax[256 + i] = (map[i] + map[i + 1]) * 0.5f;
	absmax[511] = 1;
	for (int round = 0; round < 2; round++)
	{
		float		offset = round == 0 ? 0 : millm_absmax_offset(absmax, N);

		millm_absmax_encode(codes, nested_absmax, absmax, N, offset);
		for (int i = 0; i < N; i++)
		{
			float		max = 0, scaled, inverse;
			int			code = 0;

			for (int k = i / 256 * 256; k < N && k < i / 256 * 256 + 256; k++)
				max = fmaxf(max, fabsf(absmax[k] - offset));
			assert_true(nested_absmax[i / 256] == max);
			inverse = 1.0f / max;
			scaled = absmax[i] - offset;
			scaled *= inverse;
			while (code < 255 && (map[code] + map[code + 1]) * 0.5f < scaled)
				code++;
			if (code % 2 == 1 && code < 255 && (map[code] + map[code + 1]) * 0.5f == scaled)
				code++;
			assert_int_equal(codes[i], code);
		}
	}
}

/* --- the stream -- */

/* However the bytes are cut, the result is the same; every push writes what it said. */
static void
cuts(void **state)
{
	static const MillmDtype dtypes[] = {MILLM_F32, MILLM_F16, MILLM_BF16};
	const int64_t n_out = 7, n_in = 29;	/* 203: three blocks and a rest of 11 */
	unsigned char raw[203 * 4];
	uint32_t	x = 1;

	(void) state;
	for (size_t i = 0; i < sizeof(raw); i++)
		raw[i] = (unsigned char) ((x = 1664525 * x + 1013904223) >> 24) & 0x3F;	/* finite in every dtype */
	for (int d = 0; d < 3; d++)
		for (int format = MILLM_QUANT_NF4; format <= MILLM_QUANT_INT8; format++)
		{
			size_t		n = 203 * (dtypes[d] == MILLM_F32 ? 4 : 2);
			uint8_t		want[203] = {0}, got[204];
			char		scales[2][2048];

			for (size_t step = n; step > 0; step = step > 40 ? step - 37 : step - 1)
			{
				MillmQuantEncoder *enc;
				MillmError	err;
				const MillmQuantPart *parts;
				int			n_parts;
				size_t		at = 0, used = 0;

				assert_int_equal(millm_quant_begin((MillmQuantFormat) format, "w", dtypes[d], n_out, n_in, &enc, &err), MILLM_OK);
				memset(got, 0xAA, sizeof(got));
				for (size_t i = 0; i < n; i += step)
				{
					size_t		k = n - i < step ? n - i : step;
					size_t		writes = millm_quant_push_writes(enc, k);
					unsigned char *exact = malloc(k);	/* a read past the end is seen by ASan */

					memcpy(exact, raw + i, k);
					assert_true(at + writes < sizeof(got));
					assert_int_equal(millm_quant_push(enc, exact, k, got + at, &err), MILLM_OK);
					free(exact);
					at += writes;
					assert_int_equal(got[at], 0xAA);
				}
				assert_int_equal(millm_quant_finish(enc, &parts, &n_parts, &err), MILLM_OK);
				assert_int_equal(parts[0].bytes, at);
				if (step == n)
					memcpy(want, got, sizeof(want));
				assert_memory_equal(want, got, at);
				for (int p = 1; p < n_parts; p++)
				{
					memcpy(scales[step != n] + used, parts[p].data, parts[p].bytes);
					used += parts[p].bytes;
				}
				assert_memory_equal(scales[0], scales[step != n], used);
				millm_quant_free(enc);
			}
		}
}

static void
stream_errors(void **state)
{
	MillmQuantEncoder *enc;
	MillmError	err;
	const MillmQuantPart *parts;
	int			n_parts;
	float		v[128];
	uint8_t		out[128];

	(void) state;
	for (int i = 0; i < 128; i++)
		v[i] = 1;
	assert_int_equal(millm_quant_begin(MILLM_QUANT_NF4, "w", MILLM_F32, 2, 64, &enc, &err), MILLM_OK);
	assert_int_equal(millm_quant_push(enc, v, 500, out, &err), MILLM_OK);
	assert_int_equal(millm_quant_finish(enc, &parts, &n_parts, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_string_equal(err.message, "tensor \"w\" is shorter than its shape");
	assert_int_equal(millm_quant_push(enc, v, 13, out, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_string_equal(err.message, "tensor \"w\" is longer than its shape");
	millm_quant_free(enc);

	v[100] = NAN;
	for (int format = MILLM_QUANT_NF4; format <= MILLM_QUANT_INT8; format++)
	{
		assert_int_equal(millm_quant_begin((MillmQuantFormat) format, "w", MILLM_F32, 2, 64, &enc, &err), MILLM_OK);
		assert_int_equal(millm_quant_push(enc, v, 512, out, &err), MILLM_E_INVALID_MODEL_FILE);
		assert_string_equal(err.message, "tensor \"w\" holds a value that is NaN or infinite");
		millm_quant_free(enc);
	}
	v[100] = 1e9f;
	assert_int_equal(millm_quant_begin(MILLM_QUANT_INT8, "w", MILLM_F32, 2, 64, &enc, &err), MILLM_OK);
	assert_int_equal(millm_quant_push(enc, v, 512, out, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_string_equal(err.message, "cannot quantize tensor \"w\" to INT8: a value does not fit into F16");
	millm_quant_free(enc);

	assert_int_equal(millm_quant_begin(MILLM_QUANT_NF4, "w", MILLM_I32, 2, 64, &enc, &err), MILLM_E_UNSUPPORTED);
	assert_int_equal(millm_quant_begin(MILLM_QUANT_FP4, "w", MILLM_F32, 2, 64, &enc, &err), MILLM_E_UNSUPPORTED);
	assert_int_equal(millm_quant_begin(MILLM_QUANT_NF4, "w", MILLM_F32, 0, 64, &enc, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_int_equal(millm_quant_begin(MILLM_QUANT_INT8, "w", MILLM_F32, INT64_MAX, 2, &enc, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_int_equal(millm_quant_begin(MILLM_QUANT_INT8, "w", MILLM_F32, 1 << 21, 1 << 21, &enc, &err), MILLM_E_INVALID_MODEL_FILE);
}

/* Sizes of the files of Llama-3.2-1B, from the reference document. */
static void
layout_sizes(void **state)
{
	static const struct {int64_t out, in; uint64_t nf4;} rows[] = {
		{2048, 2048, 2164973}, {512, 2048, 542188}, {8192, 2048, 8656109}, {2048, 8192, 8656109},
	};
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
	MillmError	err;
	int			n_parts;

	(void) state;
	for (int i = 0; i < 4; i++)
	{
		MillmQuantState st = {MILLM_QUANT_NF4, MILLM_BF16, rows[i].out, rows[i].in, 64, true, 256, 0.049260616302490234f};
		char		text[MILLM_QUANT_STATE_MAX];
		uint64_t	sum = 0;

		assert_int_equal(millm_quant_layout(MILLM_QUANT_NF4, MILLM_BF16, rows[i].out, rows[i].in, parts, &n_parts, &err), MILLM_OK);
		for (int p = 0; p + 1 < n_parts; p++)
			sum += parts[p].bytes;
		assert_int_equal(sum + millm_quant_state_write(&st, text, sizeof(text)), rows[i].nf4);
		assert_int_equal(millm_quant_layout(MILLM_QUANT_INT8, MILLM_BF16, rows[i].out, rows[i].in, parts, &n_parts, &err), MILLM_OK);
		assert_int_equal(parts[0].bytes + parts[1].bytes + parts[2].bytes, rows[i].out * rows[i].in + 4 * rows[i].out + 1);
		assert_int_equal(parts[2].n_dims, 0);
	}
}

/* --- quant_state -- */

static const char NF4_NAME[] = "x.weight.quant_state.bitsandbytes__nf4";

static void
state_texts(void **state)
{
	static const struct {float offset; const char *text;} floats[] = {
		{0.0f, "0.0"}, {1.0f, "1.0"}, {300.0f, "300.0"}, {0.5f, "0.5"}, {1e-4f, "9.999999747378752e-05"}, {1e16f, "1.0000000272564224e+16"},
		{123456.0f, "123456.0"}, {9007199254740992.0f, "9007199254740992.0"}, {0x1p-126f, "1.1754943508222875e-38"}, {0.0625f, "0.0625"},
	};
	MillmQuantState st = {MILLM_QUANT_NF4, MILLM_BF16, 1, 128, 64, false, 0, 0}, again;
	char		text[MILLM_QUANT_STATE_MAX];
	MillmError	err;

	(void) state;
	millm_quant_state_write(&st, text, sizeof(text));
	assert_string_equal(text, "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [1, 128]}");
	st.nested = true;
	st.nested_block_size = 256;
	for (size_t i = 0; i < sizeof(floats) / sizeof(floats[0]); i++)
	{
		char		want[64];
		size_t		n;

		st.nested_offset = floats[i].offset;
		n = millm_quant_state_write(&st, text, sizeof(text));
		snprintf(want, sizeof(want), "\"nested_offset\": %s}", floats[i].text);
		assert_int_equal(n, strlen(text));
		assert_non_null(strstr(text, want));
		assert_int_equal(millm_quant_state_read(NF4_NAME, text, n, &again, &err), MILLM_OK);
		assert_memory_equal(&again.nested_offset, &st.nested_offset, 4);
	}
	/* the longest that can be written fits */
	st = (MillmQuantState) {MILLM_QUANT_NF4, MILLM_BF16, INT64_C(1) << 40, INT64_C(1) << 40, 4096, true, 4096, -0x1.fffffep-120f};
	assert_true(millm_quant_state_write(&st, text, sizeof(text)) < MILLM_QUANT_STATE_MAX);
}

static void
state_lies(void **state)
{
	static const struct {const char *text; MillmCode code; const char *message;} lies[] = {
		{"", MILLM_E_INVALID_MODEL_FILE, "is not a JSON object"},
		{"[1]", MILLM_E_INVALID_MODEL_FILE, "is not a JSON object"},
		{"{}", MILLM_E_INVALID_MODEL_FILE, "invalid \"quant_type\""},
		{"{\"quant_type\": \"af4\"}", MILLM_E_UNSUPPORTED, "quant_type \"af4\" is not supported"},
		{"{\"quant_type\": \"fp4\"}", MILLM_E_INVALID_MODEL_FILE, "invalid \"quant_type\""},
#define REST(b, d, s) "{\"quant_type\": \"nf4\", \"blocksize\": " b ", \"dtype\": " d ", \"shape\": " s
		{REST("0", "\"bfloat16\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"blocksize\""},
		{REST("-64", "\"bfloat16\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"blocksize\""},
		{REST("63", "\"bfloat16\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"blocksize\""},
		{REST("8192", "\"bfloat16\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"blocksize\""},
		{REST("64.0", "\"bfloat16\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"blocksize\""},
		{REST("18446744073709551680", "\"bfloat16\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "is not a JSON object"},
		{REST("64", "\"int8\"", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"dtype\""},
		{REST("64", "3", "[2, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"dtype\""},
		{REST("64", "\"float16\"", "[]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"shape\""},
		{REST("64", "\"float16\"", "4}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"shape\""},
		{REST("64", "\"float16\"", "[2]}"), MILLM_E_UNSUPPORTED, "describes a tensor of 1 dimensions"},
		{REST("64", "\"float16\"", "[8, 2, 2]}"), MILLM_E_UNSUPPORTED, "describes a tensor of 3 dimensions"},
		{REST("64", "\"float16\"", "[0, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"shape\""},
		{REST("64", "\"float16\"", "[-2, -2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"shape\""},
		{REST("64", "\"float16\"", "[4294967296, 4294967296]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"shape\""},
		{REST("64", "\"float16\"", "[9223372036854775807, 2]}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"shape\""},
		{REST("64", "\"float16\"", "[2, 2], \"millm\": 1}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"millm\""},
		{REST("64", "\"float16\"", "[2, 2], \"nested_blocksize\": 256}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"nested_dtype\""},
		{REST("64", "\"float16\"", "[2, 2], \"nested_offset\": 0.5}"), MILLM_E_INVALID_MODEL_FILE, "invalid \"nested_blocksize\""},
		{REST("64", "\"float16\"", "[2, 2], \"nested_blocksize\": 256, \"nested_dtype\": \"bfloat16\", \"nested_offset\": 0.5}"),
			MILLM_E_INVALID_MODEL_FILE, "invalid \"nested_dtype\""},
		{REST("64", "\"float16\"", "[2, 2], \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 1e39}"),
			MILLM_E_INVALID_MODEL_FILE, "invalid \"nested_offset\""},
		{REST("64", "\"float16\"", "[2, 2], \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": NaN}"),
			MILLM_E_INVALID_MODEL_FILE, "is not a JSON object"},
		{REST("64", "\"float16\"", "[2, 2], \"blocksize\": 128}"), MILLM_E_INVALID_MODEL_FILE, "is not a JSON object"},
#undef REST
	};
	char		*longer = calloc(1, 5000);
	MillmQuantState st;
	MillmError	err;

	(void) state;
	for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++)
	{
		MillmCode	rc = millm_quant_state_read(NF4_NAME, lies[i].text, strlen(lies[i].text), &st, &err);

		if (rc != lies[i].code || !strstr(err.message, lies[i].message))
			fail_msg("%s: %s: %s (%s)", lies[i].text, millm_code_name(rc), err.message, err.detail);
	}
	assert_int_equal(millm_quant_state_read(NF4_NAME, longer, 5000, &st, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_string_equal(err.message, "\"x.weight.quant_state.bitsandbytes__nf4\" is too long");
	free(longer);
}

/* --- binding -- */

static void
bind_lies(void **state)
{
	const MillmQuantState good = {MILLM_QUANT_NF4, MILLM_BF16, 3, 67, 64, true, 256, 0.5f};	/* 201 weights, 4 blocks */
	MillmQuantState plain = good;
	uint8_t		bytes[101] = {0}, codes[4] = {0};
	float		map[256], nested_absmax = 1, absmax[4] = {1, 1, 1, 1}, wrong[16] = {0};
	const MillmStored none = {0};
	MillmStored w = {MILLM_U8, bytes, 101}, a = {MILLM_U8, codes, 4}, q = {MILLM_F32, millm_nf4_codebook, 64};
	MillmStored na, nm = {MILLM_F32, map, 1024}, bad;
	MillmQuantWeight out;
	MillmError	err;

	(void) state;
	na = (MillmStored) {MILLM_F32, &nested_absmax, 4};
	plain.nested = false;
	millm_dynamic_map(map);
#define BIND(st, w, a, q, na, nm) millm_quant_bind_4bit("x.weight", &(st), w, a, q, na, nm, &out, &err)
#define REFUSED(call, what) (assert_int_equal(call, MILLM_E_INVALID_MODEL_FILE), assert_non_null(strstr(err.message, what)))
	assert_int_equal(BIND(good, w, a, q, na, nm), MILLM_OK);
	bad = w, bad.dtype = MILLM_BF16, bad.bytes = 101;	/* the same bytes under another dtype */
	assert_int_equal(BIND(good, bad, a, q, na, nm), MILLM_OK);
	bad = w, bad.bytes = 100;
	REFUSED(BIND(good, bad, a, q, na, nm), "\"weight\"");
	bad = w, bad.dtype = MILLM_I64;
	REFUSED(BIND(good, bad, a, q, na, nm), "\"weight\"");
	bad = a, bad.bytes = 3;
	REFUSED(BIND(good, w, bad, q, na, nm), "\"absmax\"");
	bad = a, bad.dtype = MILLM_F32;
	REFUSED(BIND(good, w, bad, q, na, nm), "\"absmax\"");
	REFUSED(BIND(good, w, none, q, na, nm), "\"absmax\"");
	REFUSED(BIND(good, w, a, none, na, nm), "\"quant_map\"");
	bad = q, bad.data = wrong;
	REFUSED(BIND(good, w, a, bad, na, nm), "codebook");
	REFUSED(BIND(good, w, a, q, none, nm), "\"nested_absmax\"");
	REFUSED(BIND(good, w, a, q, na, none), "\"nested_quant_map\"");
	nested_absmax = NAN;
	REFUSED(BIND(good, w, a, q, na, nm), "NaN or infinite");
	nested_absmax = 3e38f, map[9] = 3e38f;
	REFUSED(BIND(good, w, a, q, na, nm), "NaN or infinite");
	bad = (MillmStored) {MILLM_F32, absmax, 16};
	assert_int_equal(BIND(plain, w, bad, q, none, none), MILLM_OK);
	REFUSED(BIND(plain, w, bad, q, na, none), "does not mention");
	REFUSED(BIND(plain, w, a, q, none, none), "\"absmax\"");
	absmax[3] = INFINITY;
	REFUSED(BIND(plain, w, bad, q, none, none), "NaN or infinite");
#undef BIND

	w = (MillmStored) {MILLM_I8, bytes, 100};
	absmax[3] = 1;
	bad = (MillmStored) {MILLM_F32, absmax, 16};
#define BIND(out_, in_, w, s, f) millm_quant_bind_int8("x.weight", out_, in_, w, s, f, &out, &err)
	assert_int_equal(BIND(4, 25, w, bad, none), MILLM_OK);
	REFUSED(BIND(4, 26, w, bad, none), "\"weight\"");
	REFUSED(BIND(5, 20, w, bad, none), "\"SCB\"");
	REFUSED(BIND(4, 25, w, none, none), "\"SCB\"");
	REFUSED(BIND(0, 25, w, bad, none), "claims");
	REFUSED(BIND(INT64_MAX, 25, w, bad, none), "claims");
	codes[0] = 2;
	assert_int_equal(BIND(4, 25, w, bad, ((MillmStored) {MILLM_U8, codes, 1})), MILLM_E_UNSUPPORTED);
	absmax[0] = NAN;
	REFUSED(BIND(4, 25, w, bad, none), "NaN or infinite");
#undef BIND
#undef REFUSED
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(dynamic_map), cmocka_unit_test(thresholds), cmocka_unit_test(ramp), cmocka_unit_test(zeros_and_signs),
		cmocka_unit_test(odd_end), cmocka_unit_test(denormals), cmocka_unit_test(nested), cmocka_unit_test(single_block),
		cmocka_unit_test(int8_rows), cmocka_unit_test(int8_beyond_f16), cmocka_unit_test(int8_rounding),
		cmocka_unit_test(variants_16bit), cmocka_unit_test(variants_any), cmocka_unit_test(absmax_rule), cmocka_unit_test(cuts), cmocka_unit_test(stream_errors),
		cmocka_unit_test(layout_sizes), cmocka_unit_test(state_texts), cmocka_unit_test(state_lies), cmocka_unit_test(bind_lies),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
