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
load_rows(const uint8_t *row, int64_t stride, int i)
{
	const uint8_t *p = row + i * stride;
	__m512i		v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));

	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 4 * stride)), 1);
	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 8 * stride)), 2);
	return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 12 * stride)), 3);
}

/* The 8 weights of each row in a word, as 4 vectors of pairs. */
INLINE void
pairs_4bit(__m512i *panel, __m512i word, const Codebook *codebook)
{
	_mm512_store_si512(panel, _mm512_permutexvar_epi16(word, *codebook));
	_mm512_store_si512(panel + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), *codebook));
	_mm512_store_si512(panel + 2, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), *codebook));
	_mm512_store_si512(panel + 3, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), *codebook));
}

/* Even 16-bit elements of a, odd ones of b. */
INLINE __m512i
even_odd(__m512i a, __m512i b)
{
	return _mm512_mask_mov_epi16(a, 0xAAAAAAAA, b);
}

INLINE __m512i
choose_greater(__m512i a, int32_t limit, __m512i if_greater, __m512i otherwise)
{
	return _mm512_mask_mov_epi32(otherwise, _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(limit)), if_greater);
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

#include "tiles.h"

void
millm_kernels_avx512_tiles(MillmKernels *k)
{
	set_kernels(k);
}
#endif
