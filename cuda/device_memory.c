/*
 * device_memory.c -- see device_memory.h.
 *
 * Memory is cleared where it is taken, not where it is given back: so it is clear, too, after an engine that was killed.
 */
#include "device_memory.h"

#include "faults.h"

MillmCode
millm_cuda_failed(cudaError_t status, const char *what, int64_t bytes, MillmError *err)
{
	(void) cudaGetLastError();
	if (status == cudaErrorMemoryAllocation)
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient device memory for %s", what);
		millm_detail(err, "Need %.1f MB.", (double) bytes / 1e6);
		return MILLM_E_INSUFFICIENT_MEMORY;
	}
	millm_fail(err, MILLM_E_INTERNAL, "could not set up the CUDA device");
	millm_detail(err, "%s: %s: %s.", what, cudaGetErrorName(status), cudaGetErrorString(status));
	return MILLM_E_INTERNAL;
}

MillmCode
millm_cuda_allocate(void *out, int64_t bytes, const char *what, cudaStream_t stream, MillmError *err)
{
	void	   *p;
	cudaError_t status = cudaMalloc(&p, millm_fault_is_due("out_of_memory") ? SIZE_MAX / 2 : (size_t) bytes);

	if (status == cudaSuccess && (status = cudaMemsetAsync(p, 0, (size_t) bytes, stream)) != cudaSuccess)
		(void) cudaFree(p);
	if (status != cudaSuccess)
		return millm_cuda_failed(status, what, bytes, err);
	*(void **) out = p;
	return MILLM_OK;
}
