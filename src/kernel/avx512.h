/*
 * avx512.h -- what the files of the AVX-512 variant share.
 */
#ifndef MILLM_KERNEL_AVX512_H
#define MILLM_KERNEL_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "kernel.h"

#define INLINE static inline __attribute__((always_inline))

/*
 * Weights are asked for so many bytes ahead, and into the L2 cache: requests into the L1 cache wait for one of its few miss buffers (24
 * on Zen 4), which bounds a core to half of what memory gives.  Measured on one core of Zen 4, INT8: nothing 13, L1 12, L2 4 KiB ahead 23,
 * 8 KiB 28, 16 KiB 28 GB/s.
 */
#define PREFETCH_BYTES 8192

INLINE void
prefetch_ahead(const void *p)
{
	_mm_prefetch((const char *) p + PREFETCH_BYTES, _MM_HINT_T1);
}

/*
 * The same for a tile that reads n_rows rows side by side: PREFETCH_BYTES ahead of all of them together, which may be in the rows of a
 * tile to come.
 */
typedef struct Ahead
{
	int64_t		turn;			/* bytes of a row, from where on the place is one more tile away */
	int64_t		before, after;	/* from what is read to what is asked for */
} Ahead;

INLINE Ahead
plan_ahead(int64_t row_bytes, int n_rows)
{
	const int64_t tiles = PREFETCH_BYTES / n_rows / row_bytes;
	const int64_t rest = PREFETCH_BYTES / n_rows % row_bytes;
	const int64_t before = tiles * n_rows * row_bytes + rest;

	return (Ahead) {row_bytes - rest, before, before + (n_rows - 1) * row_bytes};
}

/* For byte at of a row of the tile. */
INLINE void
prefetch_tile(const Ahead *ahead, const char *row, int64_t at)
{
	_mm_prefetch(row + at + (at < ahead->turn ? ahead->before : ahead->after), _MM_HINT_T1);
}

INLINE __mmask16
first_lanes(int64_t n)
{
	return n >= 16 ? 0xFFFF : (__mmask16) ((1u << n) - 1);
}

/*
 * sums += products of pairs of int16 (vpdpwssd).  By asm, because gcc (12) copies a loop's sums at every turn when it is the intrinsic.
 */
INLINE void
add_products(__m512i *sums, __m512i a, __m512i b)
{
	__asm__("vpdpwssd %2, %1, %0" : "+v"(*sums) : "v"(a), "v"(b));
}

/* The sums of four vectors, one each. */
INLINE __m128
sum_of_4(__m512 a, __m512 b, __m512 c, __m512 d)
{
	/* halves, then quarters: lanes (a | b), (c | d) */
	__m512		ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
	__m512		cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
	__m512		abcd = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));

	/* abcd has one quarter of 4 partial sums for each of a, b, c, d */
	abcd = _mm512_add_ps(abcd, _mm512_permute_ps(abcd, 0x4E));
	abcd = _mm512_add_ps(abcd, _mm512_permute_ps(abcd, 0xB1));
	return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, abcd));
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

/*
 * The scale of a block of 4-bit weights.  Product and sum are rounded one after the other, as in the definition (tensor.h): two statements,
 * so that none is fused.
 */
INLINE float
block_scale(const MillmWeight *w, int64_t block)
{
	float		scale,
				nested;

	if (w->nested_block_size == 0)
	{
		memcpy(&scale, (const char *) w->absmax + block * 4, 4);
		return scale;
	}
	memcpy(&nested, (const char *) w->nested_absmax + (block >> __builtin_ctz((unsigned) w->nested_block_size)) * 4, 4);
	scale = w->nested_map[((const uint8_t *) w->absmax)[block]] * nested;
	scale += w->nested_offset;
	return scale;
}

/* Matmuls with a panel of weights that was dequantized to F32, or to BF16. */
extern void millm_avx512_f32_rows(const MillmMatmul *m, int64_t begin, int64_t end);
extern void millm_avx512_bf16_form(const MillmMatmul *m, int64_t begin, int64_t end);

/* The choice of form where there are AVX512-BF16, slow, and VNNI. */
extern MillmForm millm_avx512_best_form_slow_bf16(const MillmWeight *w, int n_tokens);

/* The quantized formats' part of the table (avx512_quant.c). */
extern void millm_kernels_avx512_quant(MillmKernels *k, unsigned cpu);

#endif
