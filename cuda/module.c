/*
 * module.c -- the one symbol of libmillm_cuda.so.
 */
#include "backend_cuda.h"
#include "driver.h"
#include "weights.h"

extern const MillmCudaModule *millm_cuda_module(const MillmCudaHost *host);

__attribute__((visibility("default"))) const MillmCudaModule *
millm_cuda_module(const MillmCudaHost *host)
{
	static const MillmCudaModule module = {
		.abi = MILLM_BACKEND_ABI,
		.probe = millm_cuda_probe,
		.memory = millm_cuda_memory,
		.look = millm_cuda_look,
		.kind = {
			.create = millm_cuda_create,
			.page_bytes = millm_cuda_page_bytes,
			.buffer_bytes = millm_cuda_buffer_bytes,
			.own_bytes = millm_cuda_own_bytes,
			.copied_bytes = millm_cuda_weights_bytes,
		},
	};

	millm_cuda_set_host(host);
	return &module;
}
