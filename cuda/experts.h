/*
 * experts.h -- the layers of a model that are mixtures of experts, computed with no word from the host.
 */
#ifndef MILLM_CUDA_EXPERTS_H
#define MILLM_CUDA_EXPERTS_H

#include "mixture.h"
#include "weights.h"

typedef struct MillmCudaExperts MillmCudaExperts;

typedef struct MillmCudaExpertsOptions
{
	int			max_tokens;		/* of a step */
	bool		in_float32;		/* whatever how many rows there are: no tensor cores, or bits must be the same in every company */
} MillmCudaExpertsOptions;

/* Bytes on the device; 0 of a model that has no such layers. */
extern int64_t millm_cuda_experts_bytes(const MillmModel *model, int max_tokens);
/*
 * The model and its weights are borrowed; the stream is idle when this returns.  *out is NULL for a model that has no such layers.
 * INSUFFICIENT_MEMORY with figures, or INTERNAL when the device does not answer.
 */
extern MillmCode millm_cuda_experts_create(const MillmModel *model, const MillmCudaWeights *weights, const MillmCudaExpertsOptions *options, cudaStream_t stream,
										   MillmCudaExperts **out, MillmError *err);
extern void millm_cuda_experts_free(MillmCudaExperts *e);	/* NULL is fine */

/* Can this layer, or can all that have experts (NULL), be computed here?  Not where experts of a layer differ in format, or weights lie askew. */
extern bool millm_cuda_experts_can(const MillmCudaExperts *e, const MillmLayer *layer);
/* backend.h's mixture(), of a layer that can be */
extern cudaError_t millm_cuda_experts_add(MillmCudaExperts *e, const MillmLayer *layer, MillmRows y, MillmRows x, MillmRows scores, int n, MillmCudaQueue *queue);

#endif
