/*
 * cuda_module.h -- what libmillm_cuda.so and the program that opens it agree on.
 *
 * MILLM_BACKEND_ABI is a checksum of the headers that both were compiled with (Makefile): a module of another build is
 * refused before anything else of it is read.
 */
#ifndef MILLM_CUDA_MODULE_H
#define MILLM_CUDA_MODULE_H

#include <stdint.h>

#include "backend.h"

#define MILLM_CUDA_MODULE "libmillm_cuda.so"
#define MILLM_CUDA_ENTRY "millm_cuda_module"

/* What the module needs of the program. */
typedef struct MillmCudaHost
{
	/* A device does not answer as it must, which no backend can go on from: report it and end the process. */
	void		(*fault) (const MillmError *err) __attribute__((noreturn));
	const float *(*rope_frequencies) (const MillmRope *rope, int rotary_dim, int length, float *computed);	/* model.h */
} MillmCudaHost;

/* A device as it is now; bytes below 0 are not known. */
typedef struct MillmDeviceState
{
	char		name[128];		/* "NVIDIA H200" */
	int64_t		total_bytes;
	int64_t		free_bytes;
	int64_t		context_bytes;	/* of this process's context, when it was made; 0: there is none */
} MillmDeviceState;

typedef struct MillmCudaModule
{
	uint32_t	abi;			/* MILLM_BACKEND_ABI */
	/*
	 * Can this device be used?  UNSUPPORTED with a message that completes "CUDA is not used: "; on success *title is its
	 * name, "NVIDIA H200, compute capability 9.0".
	 */
	MillmCode	(*probe) (int ordinal, char *title, int title_size, MillmError *err);
	/* Exactly, which makes a context on the device.  INTERNAL when it does not tell. */
	MillmCode	(*memory) (int ordinal, int64_t *free_bytes, int64_t *total_bytes, MillmError *err);
	/* What is known without making one.  UNSUPPORTED, as of probe(), when there is no such device; one that is too old is looked at, too. */
	MillmCode	(*look) (int ordinal, MillmDeviceState *out, MillmError *err);
	MillmBackendKind kind;
} MillmCudaModule;

/* The host must outlive the module, whose this is. */
typedef const MillmCudaModule *(*MillmCudaEntry) (const MillmCudaHost *host);

#endif
