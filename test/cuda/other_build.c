/*
 * other_build.c -- a module of another build: its number is not ours, and nothing else of it is to be read.
 */
#include <stdint.h>

extern const uint32_t *millm_cuda_module(const void *host);

const uint32_t *
millm_cuda_module(const void *host)
{
	static const uint32_t abi = 1;

	(void) host;
	return &abi;
}
