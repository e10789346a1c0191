/*
 * nvml.h -- the memory of a device that this process has no context on, which only NVIDIA's management library tells.
 */
#ifndef MILLM_CUDA_NVML_H
#define MILLM_CUDA_NVML_H

#include <stdint.h>

/* What programs can still take on the device with this UUID (cuDeviceGetUuid()); -1: not known, as where the library is not installed.  Any thread. */
extern int64_t millm_nvml_free_bytes(const unsigned char uuid[16]);

#endif
