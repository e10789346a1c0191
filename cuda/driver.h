/*
 * driver.h -- may this process use CUDA at all, and which devices are there?
 */
#ifndef MILLM_CUDA_DRIVER_H
#define MILLM_CUDA_DRIVER_H

#include "error.h"

/* What the kernels are compiled for, and what the runtime that is linked needs. */
#define MILLM_CUDA_LEAST_CAPABILITY	75
#define MILLM_CUDA_LEAST_DRIVER		13000	/* CUDA 13.0, as cuDriverGetVersion() counts */

/* MillmCudaModule's probe(). */
extern MillmCode millm_cuda_probe(int ordinal, char *title, int title_size, MillmError *err);

#endif
