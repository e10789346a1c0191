/*
 * backend_cuda.h -- the CUDA backend, for module.c and the tests.
 */
#ifndef MILLM_BACKEND_CUDA_H
#define MILLM_BACKEND_CUDA_H

#include "cuda_module.h"

/* MillmBackendKind's functions.  The host must be known before create. */
extern void millm_cuda_set_host(const MillmCudaHost *host);
extern MillmCode millm_cuda_create(const MillmModel *model, const MillmBackendOptions *options, MillmBackend **out, MillmError *err);
extern int64_t millm_cuda_page_bytes(const MillmModel *model, const char *kernels, MillmKvFormat format, int layers_per_page);
extern int64_t millm_cuda_buffer_bytes(int64_t n_rows, int64_t n_columns);
extern int64_t millm_cuda_own_bytes(const MillmModel *model, const MillmBackendOptions *options);

#endif
