/*
 * emulated_runtime.h -- the few functions of the CUDA runtime that cuda/ calls, over the memory of this process.
 *
 * Device memory is malloc()'s, filled with NaN, so that AddressSanitizer sees what is read or written beyond it, and what is read before it is
 * written shows.  A stream does its work when it is queued, but for copies from and to pinned memory: the former wait for the first call that needs
 * them, the latter for cudaStreamSynchronize(), so that who overwrites a buffer or reads it too early is found.
 */
#ifndef MILLM_EMULATED_RUNTIME_H
#define MILLM_EMULATED_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cudaError_t {cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorIllegalAddress = 700, cudaErrorUnknown = 999} cudaError_t;
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;
typedef enum cudaStreamCaptureMode {cudaStreamCaptureModeThreadLocal = 1} cudaStreamCaptureMode;
typedef enum cudaMemcpyKind {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice} cudaMemcpyKind;
enum {cudaHostRegisterDefault = 0};
enum {cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2};
typedef struct cudaFuncAttributes {int ptxVersion;} cudaFuncAttributes;
typedef enum cudaFuncAttribute {cudaFuncAttributeMaxDynamicSharedMemorySize = 8} cudaFuncAttribute;
typedef enum cudaDeviceAttr {cudaDevAttrMultiProcessorCount = 16} cudaDeviceAttr;

extern cudaError_t cudaSetDevice(int device);
extern cudaError_t cudaGetDevice(int *device);
extern cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
extern cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *kernel);
extern cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
extern cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *kernel, int n_threads, size_t shared);	/* 1 */
extern cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
extern cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
extern cudaError_t cudaStreamDestroy(cudaStream_t stream);
extern cudaError_t cudaStreamSynchronize(cudaStream_t stream);
extern cudaError_t cudaMalloc(void **p, size_t bytes);
extern cudaError_t cudaFree(void *p);	/* NULL is fine */
extern cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
extern cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
extern cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
									 cudaStream_t stream);
extern cudaError_t cudaMallocHost(void **p, size_t bytes);
extern cudaError_t cudaFreeHost(void *p);
extern cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags);
extern cudaError_t cudaHostUnregister(void *p);
extern cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
extern cudaError_t cudaEventDestroy(cudaEvent_t event);
extern cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
extern cudaError_t cudaEventSynchronize(cudaEvent_t event);
extern cudaError_t cudaGetLastError(void);	/* and forget it; a launch says it, too, as launch() asks for it */
extern cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
extern cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
extern cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
extern cudaError_t cudaGraphDestroy(cudaGraph_t graph);
extern cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
extern cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
extern const char *cudaGetErrorName(cudaError_t error);
extern const char *cudaGetErrorString(cudaError_t error);

/* For tests: the emulated device's state and its faults. */
typedef struct MillmEmulated
{
	size_t		total_bytes;	/* of the device's memory */
	size_t		used_bytes;
	int			n_allocations;	/* that live */
	int			n_host;			/* streams, events, graphs, page-locked allocations and ranges that live */
	size_t		bytes_to_host;	/* that were copied so far */
	int			n_graph_launches;	/* so far */
	size_t		pinned_limit;	/* a page-locked allocation of more is refused */
	int			allocations_left;	/* after so many more, memory is out; < 0: never */
	int			calls_left;		/* after so many more, every call says cudaErrorIllegalAddress; < 0: never */
	int			capability;		/* the major number, of the device and of what its kernels were compiled for */
	int			backwards;		/* threads of a block take their turns from the last to the first: a race shows as other bits */
	int			n_overlapping;	/* launches so far that could begin before the one in front has ended */
} MillmEmulated;
extern MillmEmulated millm_emulated;
/* Is every byte of every allocation zero? */
extern int millm_emulated_is_clear(void);

#ifdef __cplusplus
}
#endif

#endif
