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
 * A weight as it lies in the mapped file: a view, nothing is owned or copied.
 *
 * in_out false: data is [n_out, n_in], y[o] = sum_i x[i] * w[o, i]  (torch Linear)
 * in_out true:  data is [n_in, n_out], y[o] = sum_i x[i] * w[i, o]  (GPT-2's Conv1D)
 * stride is the distance, in elements, between consecutive stored rows: larger than the row
 * when this is a slice of a fused tensor (the q part of GPT-2's c_attn).
 *
 * data may be unaligned: kernels use unaligned loads.  The quantized formats put their
 * scales beside it: absmax one per block of block_size weights, nested_* the absmax of
 * absmax (see quant/); all NULL and 0 for the float dtypes.
 */
typedef struct MillmWeight
{
	MillmDtype	dtype;
	bool		in_out;
	int64_t		n_out;
	int64_t		n_in;
	int64_t		stride;
	const void *data;			/* NULL: this weight does not exist in this model */
	const void *absmax;
	const float *nested_absmax;
	float		nested_offset;
	int			block_size;
	int			nested_block_size;
} MillmWeight;

#endif
