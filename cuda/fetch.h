/*
 * fetch.h -- what of the logits crosses the bus: of each row what the choice of its next token needs, not all of it.
 */
#ifndef MILLM_CUDA_FETCH_H
#define MILLM_CUDA_FETCH_H

#include <stdint.h>

#include "error.h"
#include "kernels.h"
#include "shortlist.h"

typedef struct MillmCudaFetch MillmCudaFetch;

/* Bytes on the device for rows of n_columns logits, n_rows of them at most. */
extern int64_t millm_cuda_fetch_bytes(int64_t n_columns, int n_rows);
/* The stream is borrowed for the call.  INSUFFICIENT_MEMORY, INTERNAL as millm_cuda_allocate() says them; *out is untouched then. */
extern MillmCode millm_cuda_fetch_create(int64_t n_columns, int n_rows, cudaStream_t stream, MillmCudaFetch **out, MillmError *err);
extern void millm_cuda_fetch_free(MillmCudaFetch *f);	/* NULL is fine */

/*
 * After all that is in the queue, on its stream: queue it for the first n rows of y, to the rows of host [n, n_columns], the same each time and nobody else's: what tops[t] always needs is -infinity in y
 * from now on.
 */
extern cudaError_t millm_cuda_fetch_queue(MillmCudaFetch *f, float *host, MillmRows y, const MillmTop *tops, int n, MillmCudaQueue *queue, cudaStream_t stream);
/* Once the stream has been waited for: the rows of the host are what backend.h's fetch() promises, until the next are queued. */
extern cudaError_t millm_cuda_fetch_finish(MillmCudaFetch *f, cudaStream_t stream);
/* Of row t, then: what of it is not -infinity. */
extern MillmListed millm_cuda_fetch_listed(const MillmCudaFetch *f, int t);

#endif
