/*
 * queue.h -- the launches of a step: started as they come, or kept and started together; when the same ones come again, as a CUDA graph.
 *
 * A launch is a function and bytes: which kernel, how many blocks, and the values of its parameters.  Two lists of launches are the same when their
 * bytes are, so that whatever a value of the host's decides is in the comparison: a graph is never wrong, at worst it is not used.
 */
#ifndef MILLM_CUDA_QUEUE_H
#define MILLM_CUDA_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#ifdef MILLM_CUDA_EMULATED
#include "emulated_runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct MillmCudaQueue MillmCudaQueue;
typedef cudaError_t (*MillmCudaStart) (const void *launch, bool overlaps, cudaStream_t stream);

/* Bytes on the device, where steps of so many tokens bring numbers along. */
extern size_t millm_cuda_queue_bytes(int max_tokens);
/*
 * overlaps: a launch may begin before the one in front of it has ended (millm_cuda_can_overlap()).  The stream is borrowed.
 * INSUFFICIENT_MEMORY, INTERNAL as millm_cuda_allocate() says them; *out is untouched then.
 */
extern MillmCode millm_cuda_queue_create(int max_tokens, bool overlaps, cudaStream_t stream, MillmCudaQueue **out, MillmError *err);
extern void millm_cuda_queue_free(MillmCudaQueue *q);	/* NULL is fine */

/* A new step, while the stream is idle: are its launches kept? */
extern void millm_cuda_queue_begin(MillmCudaQueue *q, bool keeps);
/* The next launch: start(launch [bytes], overlaps, stream), now or at the flush. */
extern cudaError_t millm_cuda_queue(MillmCudaQueue *q, MillmCudaStart start, const void *launch, size_t bytes);
/* bytes of the host, for the next launch, of at most two such: where on the device they will be.  In the same order of calls it is the same place. */
extern cudaError_t millm_cuda_queue_bring(MillmCudaQueue *q, const void *data, size_t bytes, const void **on_device);
/* Start what was kept: before anything else is queued on the stream. */
extern cudaError_t millm_cuda_queue_flush(MillmCudaQueue *q);
/* So far: launches, and calls that started them. */
extern void millm_cuda_queue_counts(const MillmCudaQueue *q, int64_t *n_launches, int64_t *n_starts);

#ifdef __cplusplus
}
#endif

#endif
