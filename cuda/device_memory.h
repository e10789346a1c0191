/*
 * device_memory.h -- device memory, zeroed, so that nobody reads what another model left there (test_cuda looks at every allocation).
 */
#ifndef MILLM_CUDA_DEVICE_MEMORY_H
#define MILLM_CUDA_DEVICE_MEMORY_H

#include <stdint.h>

#include "error.h"
#include "kernels.h"

/*
 * bytes (at least 1) at *out, a pointer to a pointer, zeroed before what the stream has next; the caller's until cudaFree().  INSUFFICIENT_MEMORY
 * with the figure, INTERNAL when the device does not answer; *out is untouched then.
 */
extern MillmCode millm_cuda_allocate(void *out, int64_t bytes, const char *what, cudaStream_t stream, MillmError *err);

/*
 * What a call that failed means while there is no backend yet: INSUFFICIENT_MEMORY of bytes for what, or INTERNAL.  The runtime forgets it: else
 * the next kernel that this thread launches would be told of it.
 */
extern MillmCode millm_cuda_failed(cudaError_t status, const char *what, int64_t bytes, MillmError *err);

#endif
