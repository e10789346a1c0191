/*
 * nvml.c -- opens NVIDIA's management library at run time; it comes with the driver, but not into every container.
 *
 * Its own numbers of devices are not CUDA's: devices are found by their UUIDs.  Types are the library's, written out.
 */
#include "nvml.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>

#define NVML_LIBRARY "libnvidia-ml.so.1"
#define UUID_TEXT 41			/* "GPU-" and 36 characters */

typedef struct Memory
{
	unsigned long long total, free, used;
} Memory;

static struct
{
	int			(*init) (void);
	int			(*get_by_uuid) (const char *uuid, void **device);
	int			(*get_memory) (void *device, Memory *memory);
} nvml;
static bool is_usable;

/* It stays open until the process ends. */
static void
open_library(void)
{
	struct
	{
		const char *name;
		void	   *function;
	}			wanted[] = {{"nvmlInit_v2", &nvml.init}, {"nvmlDeviceGetHandleByUUID", &nvml.get_by_uuid}, {"nvmlDeviceGetMemoryInfo", &nvml.get_memory}};
	void	   *library = dlopen(NVML_LIBRARY, RTLD_NOW | RTLD_LOCAL);

	if (!library)
		return;
	for (unsigned i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (!(*(void **) wanted[i].function = dlsym(library, wanted[i].name)))
			return;
	is_usable = nvml.init() == 0;
}

int64_t
millm_nvml_free_bytes(const unsigned char uuid[16])
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	char		text[UUID_TEXT] = "GPU-";
	int			n = 4;
	void	   *device;
	Memory		memory;

	pthread_once(&once, open_library);
	if (!is_usable)
		return -1;
	for (int i = 0; i < 16; i++)
		n += snprintf(text + n, sizeof(text) - (size_t) n, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", uuid[i]);
	return nvml.get_by_uuid(text, &device) == 0 && nvml.get_memory(device, &memory) == 0 ? (int64_t) memory.free : -1;
}
