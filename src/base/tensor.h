/*
 * tensor.h -- what a stored matrix is, for everyone who reads or multiplies one.
 */
#ifndef MILLM_TENSOR_H
#define MILLM_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum MillmDtype
{
	MILLM_F32,
	MILLM_F16,
	MILLM_BF16,
	MILLM_N_FLOAT_DTYPES,		/* the ones above are what a published weight may be */
	MILLM_4BIT = MILLM_N_FLOAT_DTYPES,	/* codes of a codebook of 16, two to a byte, with a scale per block: NF4, FP4 */
	MILLM_INT8,					/* int8 with a scale per row: LLM.int8 */
	MILLM_MXFP4,				/* floats of 4 bits with a power of two per 32 of them: OCP Microscaling */
	MILLM_N_WEIGHT_DTYPES,		/* the ones above can be multiplied; the ones below are only stored */
	MILLM_I8 = MILLM_N_WEIGHT_DTYPES,
	MILLM_U8,
	MILLM_I16,
	MILLM_I32,
	MILLM_I64,
	MILLM_F64,
	MILLM_BOOL,
	MILLM_N_DTYPES
} MillmDtype;

/*
 * A weight as it lies in the mapped file: a view, nothing is owned or copied.  No pointer into the file is aligned.
 *
 * in_out false: data is [n_out, n_in], y[o] = sum_i x[i] * w[o, i]  (torch Linear)
 * in_out true:  data is [n_in, n_out], y[o] = sum_i x[i] * w[i, o]  (GPT-2's Conv1D); float dtypes only
 * stride is the distance, in elements, between consecutive stored rows: larger than the row
 * when this is a slice of a fused tensor (the q part of GPT-2's c_attn).  The quantized formats have stride n_in.
 *
 * MXFP4: w[o, i] = v * 2^(scale[o, i / 32] - 127), of bytes; v is {0, 0.5, 1, 1.5, 2, 3, 4, 6}[nibble % 8], less than zero from nibble 8 on, element
 * o * n_in + i is in byte e / 2, the low nibble first (even e).  n_in is a multiple of 32.
 *
 * INT8: w[o, i] = data[o * n_in + i] * scale[o] / 127; data and scale begin with the slice.
 *
 * 4BIT: the stored tensor is flat.  Element e = first + o * n_in + i is the nibble e of data (even e: the high one of byte
 * e / 2), in block b = e / block_size, and w[o, i] = codebook[nibble] * s[b] rounded to the dtype rounded, where s[b] is
 *     ((float *) absmax)[b]                                                          when nested_block_size is 0
 *     nested_map[((uint8_t *) absmax)[b]] * nested_absmax[b / nested_block_size] + nested_offset   otherwise,
 * each product and sum rounded to float32.  A slice of a fused tensor differs in first only; blocks may straddle rows.
 */
typedef struct MillmWeight
{
	MillmDtype	dtype;
	bool		in_out;
	int64_t		n_out;
	int64_t		n_in;
	int64_t		stride;
	const void *data;			/* NULL: this weight does not exist in this model */
	const void *scale;			/* INT8: float32 [n_out]; MXFP4: uint8 [n_out, n_in / 32] */
	/* 4BIT */
	int64_t		first;
	const float *codebook;		/* [16] */
	const void *absmax;			/* float32 or uint8, one per block */
	const void *nested_absmax;	/* float32 */
	const float *nested_map;	/* [256]; aligned */
	float		nested_offset;
	int			block_size;		/* power of two, at least 32 */
	int			nested_block_size;	/* power of two; 0: absmax is float32 */
	MillmDtype	rounded;		/* F32, F16 or BF16 */
} MillmWeight;

/* How the KV cache keeps keys and values. */
typedef enum MillmKvFormat
{
	MILLM_KV_AUTO,				/* in the dtype in which the kernels best read them: float16, where they are exact float32 */
	/*
	 * int8 in blocks of MILLM_KV_BLOCK dims of a head (the last one has what is left), each with a float16 scale: s = max |x| / 127, and x is about
	 * round(x / s) s.  So ggml's Q8_0, but for blocks of half its size: keys have dims that are much larger than others, beside which these lose.
	 */
	MILLM_KV_INT8,
	MILLM_N_KV_FORMATS
} MillmKvFormat;
#define MILLM_KV_BLOCK 16
#define MILLM_KV_BLOCKS(head_dim) (((head_dim) + MILLM_KV_BLOCK - 1) / MILLM_KV_BLOCK)

/* Bytes of n elements of weights; the scales beside them apart. */
static inline int64_t
millm_weight_bytes(MillmDtype dtype, int64_t n)
{
	return dtype == MILLM_F32 ? n * 4 : dtype == MILLM_4BIT || dtype == MILLM_MXFP4 ? (n + 1) / 2 : dtype == MILLM_INT8 ? n : n * 2;
}

#endif
