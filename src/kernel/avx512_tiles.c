/*
 * avx512_tiles.c -- matmuls in tiles of int16 (tiles.h) for CPUs with AVX512-VNNI.
 *
 * Why not vdpbf16ps: Intel's cores that have it begin one in two cycles, but two vpdpwssd in each (Emerald Rapids: 86 and 355
 * GFLOP/s a core; 174 with float32).
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx512_quant.h"

#include <math.h>
#include <string.h>

#define LANES			16
#define V(name)			_mm512_##name
#define TOKENS_AT_ONCE	8

typedef __m512i Ints;
typedef __m512 Floats;
typedef __m512i Codebook;		/* twice, so that what lies above a nibble does not matter */
typedef MapPlanes ScaleTables;

INLINE void
prefetch_line(const char *p)
{
	_mm_prefetch(p, _MM_HINT_T1);
}

/* ---- 4-bit weights' codes and scales ---- */

INLINE void
load_codebook(Codebook *b, const int16_t *codes)
{
	*b = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) codes));
}

INLINE void
load_scale_tables(ScaleTables *t, const MillmWeight *w)
{
	if (w->nested_block_size > 0)
		split_map(t, w->nested_map);
}

INLINE void
decode_scales(float *s, const ScaleTables *t, const MillmWeight *w, int64_t o, int n_rows)
{
	group_scales(s, w, t, first_group(w, o), n_rows * w->n_in / 64);
}

/* ---- activations ---- */

INLINE float
quantize_block(int32_t *pairs, const float *x)
{
	static const uint16_t order[32] = {1, 5, 0, 4, 3, 7, 2, 6, 9, 13, 8, 12, 11, 15, 10, 14, 17, 21, 16, 20, 19, 23, 18, 22, 25, 29, 24, 28, 27, 31, 26, 30};
	const __m512i in_pairs = _mm512_loadu_si512(order);
	__m512		v[4];
	__m512		max = _mm512_setzero_ps();
	__m512		inverse;
	__mmask16	is_nan = 0;
	float		largest;

	for (int u = 0; u < 4; u++)
	{
		v[u] = _mm512_loadu_ps(x + 16 * u);
		max = _mm512_max_ps(max, _mm512_abs_ps(v[u]));
		is_nan |= _mm512_cmp_ps_mask(v[u], v[u], _CMP_UNORD_Q);
	}
	largest = is_nan ? NAN : _mm512_reduce_max_ps(max);
	/* a block of zeros, or so small that its inverse is none, counts as zeros */
	inverse = _mm512_set1_ps(largest > MILLM_I16_TILE_VALUE * 0x1p-126f ? MILLM_I16_TILE_VALUE / largest : 0);
	for (int h = 0; h < 2; h++)
	{
		__m256i		low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * h], inverse)));
		__m256i		high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * h + 1], inverse)));

		_mm512_storeu_si512(pairs + 16 * h, _mm512_permutexvar_epi16(in_pairs, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
	}
	return largest / MILLM_I16_TILE_VALUE;
}

/* ---- weights ---- */

/* 16 bytes of rows i, 4 + i, 8 + i and 12 + i. */
INLINE __m512i
load_4_rows(const uint8_t *row, int64_t stride, int i)
{
	const uint8_t *p = row + i * stride;
	__m512i		v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));

	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 4 * stride)), 1);
	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 8 * stride)), 2);
	return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 12 * stride)), 3);
}

INLINE void
load_words(__m512i *word, const uint8_t *row, int64_t stride)
{
	__m512i		v0 = load_4_rows(row, stride, 0),
				v1 = load_4_rows(row, stride, 1),
				v2 = load_4_rows(row, stride, 2),
				v3 = load_4_rows(row, stride, 3);
	__m512i		low01 = _mm512_unpacklo_epi32(v0, v1),
				high01 = _mm512_unpackhi_epi32(v0, v1),
				low23 = _mm512_unpacklo_epi32(v2, v3),
				high23 = _mm512_unpackhi_epi32(v2, v3);

	word[0] = _mm512_unpacklo_epi64(low01, low23);
	word[1] = _mm512_unpackhi_epi64(low01, low23);
	word[2] = _mm512_unpacklo_epi64(high01, high23);
	word[3] = _mm512_unpackhi_epi64(high01, high23);
}

INLINE void
unpack_4bit(__m512i *panel, const uint8_t *row, int64_t stride, const Codebook *codebook)
{
	for (int i = 0; i < 2; i++)
	{
		__m512i		word[4];

		load_words(word, row + 16 * i, stride);
		for (int k = 0; k < 4; k++, panel += 4)
		{
			_mm512_store_si512(panel, _mm512_permutexvar_epi16(word[k], *codebook));
			_mm512_store_si512(panel + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16(word[k], 4), *codebook));
			_mm512_store_si512(panel + 2, _mm512_permutexvar_epi16(_mm512_srli_epi16(word[k], 8), *codebook));
			_mm512_store_si512(panel + 3, _mm512_permutexvar_epi16(_mm512_srli_epi16(word[k], 12), *codebook));
		}
	}
}

INLINE void
unpack_int8(__m512i *panel, const uint8_t *row, int64_t stride)
{
	for (int i = 0; i < 4; i++)
	{
		__m512i		word[4];

		load_words(word, row + 16 * i, stride);
		for (int k = 0; k < 4; k += 2, panel += 4)
		{
			/* bytes 0 1 4 5, and 2 3 6 7 */
			__m512i		low = _mm512_mask_mov_epi16(word[k], 0xAAAAAAAA, _mm512_slli_epi32(word[k + 1], 16));
			__m512i		high = _mm512_mask_mov_epi16(word[k + 1], 0x55555555, _mm512_srli_epi32(word[k], 16));

			_mm512_store_si512(panel, _mm512_srai_epi16(low, 8));
			_mm512_store_si512(panel + 1, _mm512_srai_epi16(_mm512_slli_epi16(low, 8), 8));
			_mm512_store_si512(panel + 2, _mm512_srai_epi16(high, 8));
			_mm512_store_si512(panel + 3, _mm512_srai_epi16(_mm512_slli_epi16(high, 8), 8));
		}
	}
}

/* The weights of even, and of odd number in words of two, as float32. */
INLINE __m512
even_floats(__m512i word, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)) : _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word));
}

INLINE __m512
odd_floats(__m512i word, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32((int) 0xFFFF0000))) :
		_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16)));
}

/*
 * A block of 16 rows of BF16 or F16, and the rows' units.  Adding 1.5 * 2^23 units leaves a float's number of units, rounded to nearest even,
 * in its low bits.
 */
INLINE void
unpack_16bit(__m512i *panel, float *units, const uint8_t *row, int64_t stride, MillmDtype dtype)
{
	const int	exponent_at = dtype == MILLM_BF16 ? 7 : 10;
	/* from a weight's exponent field to that of a unit */
	const int	to_unit = dtype == MILLM_BF16 ? -11 : 101;
	const __m512i no_sign = _mm512_set1_epi16(0x7FFF);
	__m512i		word[32];
	__m512i		max = _mm512_setzero_si512();
	__m512i		exponent, unit;
	__m512		magic;

	for (int k = 0; k < 32; k += 4)
		load_words(word + k, row + 4 * k, stride);
	for (int k = 0; k < 32; k++)
		max = _mm512_max_epu16(max, _mm512_and_si512(word[k], no_sign));
	max = _mm512_max_epu16(max, _mm512_srli_epi32(max, 16));
	exponent = _mm512_srli_epi32(_mm512_and_si512(max, _mm512_set1_epi32(0xFFFF)), (unsigned) exponent_at);
	/* a block whose unit would be no normal number has the smallest that is one */
	exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(dtype == MILLM_BF16 ? 12 : 1));
	unit = _mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(to_unit)), 23);
	magic = _mm512_castsi512_ps(_mm512_add_epi32(unit, _mm512_set1_epi32((23 << 23) | 0x400000)));
	/* one that has none above all its weights, infinity or NaN among them, is NaN */
	unit = _mm512_mask_mov_epi32(unit, _mm512_cmpgt_epi32_mask(exponent, _mm512_set1_epi32(dtype == MILLM_BF16 ? 242 : 30)), _mm512_set1_epi32(0x7FC00000));
	_mm512_storeu_si512(units, unit);
	for (int k = 0; k < 32; k += 4, panel += 4)
		for (int j = 0; j < 2; j++)
		{
			__m512i		odd_low = _mm512_castps_si512(_mm512_add_ps(odd_floats(word[k + j], dtype), magic));
			__m512i		odd_high = _mm512_castps_si512(_mm512_add_ps(odd_floats(word[k + 2 + j], dtype), magic));
			__m512i		even_low = _mm512_castps_si512(_mm512_add_ps(even_floats(word[k + j], dtype), magic));
			__m512i		even_high = _mm512_castps_si512(_mm512_add_ps(even_floats(word[k + 2 + j], dtype), magic));

			_mm512_store_si512(panel + 2 * j, _mm512_mask_mov_epi16(odd_low, 0xAAAAAAAA, _mm512_slli_epi32(odd_high, 16)));
			_mm512_store_si512(panel + 2 * j + 1, _mm512_mask_mov_epi16(even_low, 0xAAAAAAAA, _mm512_slli_epi32(even_high, 16)));
		}
}

#include "tiles.h"

MATMUL(f16, MILLM_F16)

void
millm_kernels_avx512_tiles(MillmKernels *k)
{
	k->matmul[MILLM_FORM_I16_TILES][MILLM_F16][0] = matmul_f16;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_BF16][0] = matmul_bf16;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_4BIT][0] = matmul_4bit;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_INT8][0] = matmul_int8;
	k->pack_group[MILLM_FORM_I16_TILES] = pack_group;
	k->fixed_form = fixed_form;
}
#endif
