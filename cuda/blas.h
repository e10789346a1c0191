/*
 * blas.h -- products of many rows through cuBLASLt, where its library is: weights are decoded to bfloat16 tile by tile, sums are float32.
 */
#ifndef MILLM_CUDA_BLAS_H
#define MILLM_CUDA_BLAS_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "kernels.h"

typedef struct MillmCudaBlas MillmCudaBlas;

/* Is the library there?  It is opened by the first who asks, and stays open. */
extern bool millm_cuda_blas_is_there(void);
/* Bytes on the device for weights of up to `widest` columns and max_tokens rows; more rows go over in parts of so many, or of 2048. */
extern int64_t millm_cuda_blas_bytes(int64_t widest, int max_tokens);
/* The library is there.  INSUFFICIENT_MEMORY with figures, INTERNAL when it does not start on this device. */
extern MillmCode millm_cuda_blas_create(int64_t widest, int max_tokens, cudaStream_t stream, MillmCudaBlas **out, MillmError *err);
extern void millm_cuda_blas_free(MillmCudaBlas *b);	/* NULL is fine */

/* Where the n rows of the next product's x can be left, as it wants them; data NULL: nowhere, it rounds them itself. */
extern MillmCudaFragments millm_cuda_blas_rows(const MillmCudaBlas *b, int64_t n_columns, int n);
/*
 * millm_cuda_matmul_tensor's contract, of F16, BF16, INT8, 4BIT and MXFP4 weights.  *is_done false: the library has no way for this shape, or the weight
 * is wider than was said; nothing was queued then.  x_is_there: x was left where millm_cuda_blas_rows() says, by another product of it, too;
 * m->x is not read then.
 */
extern cudaError_t millm_cuda_blas_matmul(MillmCudaBlas *b, const MillmCudaMatmul *m, bool x_is_there, MillmCudaQueue *queue, cudaStream_t stream, bool *is_done);

#endif
