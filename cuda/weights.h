/*
 * weights.h -- a model's weights and vectors in device memory: one allocation, filled at load, and where in it each of them is.
 */
#ifndef MILLM_CUDA_WEIGHTS_H
#define MILLM_CUDA_WEIGHTS_H

#include "error.h"
#include "kernels.h"
#include "model.h"
#include "upload.h"

typedef struct MillmCudaWeights MillmCudaWeights;

/* Bytes that it takes, as if the linear weights of the layers were "FP16", "Q4" or "Q8"; NULL: as they are. */
extern int64_t millm_cuda_weights_bytes(const MillmModel *model, const char *quantization);

/*
 * What bfloat16 holds best times, of factors in [1, 2): the RMS of (bfloat16(unit c) / unit - c) over the 16 values of a codebook is least.  That of NF4 is 0.7e-3 of the
 * values' RMS so, and 1.1e-3 as they are; FP4's are exact.
 */
extern float millm_cuda_codebook_unit(const float *codebook);

/*
 * Copy all that the forward pass reads but the screening copy of the head; the model's mappings are read until this returns.
 * The errors of millm_cuda_upload(); nothing is left then.
 */
extern MillmCode millm_cuda_weights_create(const MillmModel *model, const MillmUploadOptions *upload, MillmCudaWeights **out, MillmError *err);
extern void millm_cuda_weights_free(MillmCudaWeights *weights);	/* NULL is fine */

/* That weight of the model, and of a vector (or a slice of one) its values; NULL: of NULL, and of what the model has not. */
extern const MillmCudaWeight *millm_cuda_weight(const MillmCudaWeights *weights, const MillmWeight *w);
extern const float *millm_cuda_vector(const MillmCudaWeights *weights, const float *data);

#endif
