/*
 * driver.h -- may this process use CUDA at all, which devices are there, and what is free of their memory?
 */
#ifndef MILLM_CUDA_DRIVER_H
#define MILLM_CUDA_DRIVER_H

#include "cuda_module.h"
#include "error.h"

/* What the kernels are compiled for, and what the runtime that is linked needs. */
#define MILLM_CUDA_LEAST_CAPABILITY	75
#define MILLM_CUDA_LEAST_DRIVER		13000	/* CUDA 13.0, as cuDriverGetVersion() counts */

/* MillmCudaModule's functions.  Any thread. */
extern MillmCode millm_cuda_probe(int ordinal, char *title, int title_size, MillmError *err);
extern MillmCode millm_cuda_look(int ordinal, MillmDeviceState *out, MillmError *err);
extern MillmCode millm_cuda_memory(int ordinal, int64_t *free_bytes, int64_t *total_bytes, MillmError *err);

#endif
