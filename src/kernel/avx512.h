/*
 * avx512.h -- what the files of the AVX-512 variant share.
 */
#ifndef MILLM_KERNEL_AVX512_H
#define MILLM_KERNEL_AVX512_H

#include <immintrin.h>

#include "kernel.h"

#define INLINE static inline __attribute__((always_inline))

/*
 * Weights are asked for this far ahead, and into the L2 cache: requests into the L1 cache wait for one of its few miss buffers (24 on
 * Zen 4), which bounds a core to half of what memory gives.  Measured on one core of Zen 4, INT8: nothing 13, L1 12, L2 4 KiB ahead 23,
 * 8 KiB 28, 16 KiB 28 GB/s.
 */
#define PREFETCH_BYTES 8192

INLINE void
prefetch_ahead(const void *p)
{
	_mm_prefetch((const char *) p + PREFETCH_BYTES, _MM_HINT_T1);
}

INLINE __mmask16
first_lanes(int64_t n)
{
	return n >= 16 ? 0xFFFF : (__mmask16) ((1u << n) - 1);
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

/* Matmuls with a panel of weights that was dequantized to F32, or to BF16. */
extern void millm_avx512_f32_rows(const MillmMatmul *m, int64_t begin, int64_t end);
extern void millm_avx512_bf16_form(const MillmMatmul *m, int64_t begin, int64_t end);

/* The quantized formats' part of the table (avx512_quant.c). */
extern void millm_kernels_avx512_quant(MillmKernels *k, unsigned cpu);

#endif
