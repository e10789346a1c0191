/*
 * avx2.h -- what the files of the AVX2 variant share.
 */
#ifndef MILLM_KERNEL_AVX2_H
#define MILLM_KERNEL_AVX2_H

#include <immintrin.h>

#include "kernel.h"

#define INLINE static inline __attribute__((always_inline))

/* As in avx512.h: far ahead, and into the L2 cache. */
INLINE void
prefetch_ahead(const void *p)
{
	_mm_prefetch((const char *) p + 8192, _MM_HINT_T1);
}

INLINE float
sum_8(__m256 v)
{
	__m128		s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

	s = _mm_add_ps(s, _mm_movehl_ps(s, s));
	s = _mm_add_ss(s, _mm_movehdup_ps(s));
	return _mm_cvtss_f32(s);
}

/* What is left to do with a dot product. */
INLINE void
finish(const MillmMatmul *m, int64_t t, int64_t o, float sum)
{
	float	   *y = m->y + t * m->y_stride + o;

	if (m->row_scale)
		sum *= m->row_scale[o];
	if (m->bias)
		sum += m->bias[o];
	*y = m->accumulate ? *y + sum : sum;
}

/* The matmul with a panel of weights that was dequantized to F32. */
extern void millm_avx2_f32_rows(const MillmMatmul *m, int64_t begin, int64_t end);

/* The quantized formats' part of the table (avx2_quant.c), and MILLM_FORM_I16_TILES' (avx2_tiles.c). */
extern void millm_kernels_avx2_quant(MillmKernels *k);
extern void millm_kernels_avx2_tiles(MillmKernels *k);

/* s [n_in / 64] = the scales of the blocks of row o of a 4-bit weight of whole blocks. */
extern void millm_avx2_row_scales(float *s, const MillmWeight *w, int64_t o);

#endif
