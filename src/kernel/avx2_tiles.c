/*
 * avx2_tiles.c -- matmuls in tiles of int16 (tiles.h) for AVX2: vpmaddwd does 16 products, and vpaddd adds them, where a float32 FMA does 8.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx2.h"

#include <math.h>
#include <string.h>

#define LANES			8
#define V(name)			_mm256_##name
#define TOKENS_AT_ONCE	4

typedef __m256i Ints;
typedef __m256 Floats;

typedef struct Codebook
{
	__m256i		low, high;		/* bytes of its int16, for vpshufb */
} Codebook;

typedef struct ScaleTables
{
	char		none;
} ScaleTables;

INLINE void
add_products(__m256i *sums, __m256i a, __m256i b)
{
	*sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(a, b));
}

/* ---- 4-bit weights' codes and scales ---- */

INLINE void
load_codebook(Codebook *b, const int16_t *codes)
{
	__m128i		first = _mm_loadu_si128((const __m128i *) codes),
				second = _mm_loadu_si128((const __m128i *) (codes + 8));
	const __m128i low = _mm_set1_epi16(0xFF);

	b->low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, low), _mm_and_si128(second, low)));
	b->high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
}

INLINE void
load_scale_tables(ScaleTables *t, const MillmWeight *w)
{
	(void) w;
	t->none = 0;
}

INLINE void
decode_scales(float *s, const ScaleTables *t, const MillmWeight *w, int64_t o, int n_rows)
{
	(void) t;
	for (int r = 0; r < n_rows; r++)
		millm_avx2_row_scales(s + r * (w->n_in / 64), w, o + r);
}

/* ---- activations ---- */

INLINE float
quantize_block(int32_t *pairs, const float *x)
{
	const __m256 sign = _mm256_set1_ps(-0.0f);
	__m256		max = _mm256_setzero_ps(),
				is_nan = _mm256_setzero_ps();
	__m256		inverse;
	float		lane[8];
	float		largest = 0;

	for (int i = 0; i < 64; i += 8)
	{
		__m256		v = _mm256_loadu_ps(x + i);

		max = _mm256_max_ps(max, _mm256_andnot_ps(sign, v));
		is_nan = _mm256_or_ps(is_nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
	}
	_mm256_storeu_ps(lane, max);
	for (int i = 0; i < 8; i++)
		largest = lane[i] > largest ? lane[i] : largest;
	if (_mm256_movemask_ps(is_nan))
		largest = NAN;
	/* a block of zeros, or so small that its inverse is none, counts as zeros */
	inverse = _mm256_set1_ps(largest > MILLM_I16_TILE_VALUE * 0x1p-126f ? MILLM_I16_TILE_VALUE / largest : 0);
	for (int i = 0; i < 64; i += 8)
	{
		__m256i		q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
		/* pairs 0 4, 1 5, 2 6, 3 7 */
		__m128i		p = _mm_blend_epi16(_mm256_castsi256_si128(q), _mm_slli_epi32(_mm256_extracti128_si256(q, 1), 16), 0xAA);

		_mm_storeu_si128((__m128i *) (pairs + i / 2), _mm_shuffle_epi32(p, _MM_SHUFFLE(2, 3, 0, 1)));
	}
	return largest / MILLM_I16_TILE_VALUE;
}

/* ---- weights ---- */

/* 16 bytes of rows i and 4 + i. */
INLINE __m256i
load_rows(const uint8_t *row, int64_t stride, int i)
{
	const uint8_t *p = row + i * stride;

	return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) p)), _mm_loadu_si128((const __m128i *) (p + 4 * stride)), 1);
}

/* The 8 weights of each row in a word, as 4 vectors of pairs. */
INLINE void
pairs_4bit(__m256i *panel, __m256i word, const Codebook *codebook)
{
	const __m256i nibble = _mm256_set1_epi8(0x0F);
	const __m256i low_byte = _mm256_set1_epi16(0xFF);

	for (int odd = 0; odd < 2; odd++)
	{
		/* nibbles 0 2 4 6, or 1 3 5 7, in their bytes: the low, and the high bytes of their codes */
		__m256i		at = _mm256_and_si256(odd ? _mm256_srli_epi16(word, 4) : word, nibble);
		__m256i		low = _mm256_shuffle_epi8(codebook->low, at);
		__m256i		high = _mm256_shuffle_epi8(codebook->high, at);

		/* pairs of nibbles 0 4 and 2 6, or 1 5 and 3 7 */
		panel[odd] = _mm256_or_si256(_mm256_and_si256(low, low_byte), _mm256_slli_epi16(high, 8));
		panel[2 + odd] = _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(low_byte, high));
	}
}

/* Even 16-bit elements of a, odd ones of b. */
INLINE __m256i
even_odd(__m256i a, __m256i b)
{
	return _mm256_blend_epi16(a, b, 0xAA);
}

INLINE __m256i
choose_greater(__m256i a, int32_t limit, __m256i if_greater, __m256i otherwise)
{
	return _mm256_blendv_epi8(otherwise, if_greater, _mm256_cmpgt_epi32(a, _mm256_set1_epi32(limit)));
}

/* F16 in the low halves of words, as float32. */
INLINE __m256
low_halves(__m256i word)
{
	__m256i		packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);

	return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

/* The weights of even, and of odd number in words of two, as float32. */
INLINE __m256
even_floats(__m256i word, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? _mm256_castsi256_ps(_mm256_slli_epi32(word, 16)) : low_halves(_mm256_and_si256(word, _mm256_set1_epi32(0xFFFF)));
}

INLINE __m256
odd_floats(__m256i word, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? _mm256_castsi256_ps(_mm256_and_si256(word, _mm256_set1_epi32((int) 0xFFFF0000))) : low_halves(_mm256_srli_epi32(word, 16));
}

#include "tiles.h"

void
millm_kernels_avx2_tiles(MillmKernels *k)
{
	set_kernels(k);
}
#endif
