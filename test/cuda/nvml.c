/*
 * nvml.c -- libnvidia-ml.so.1 for tests: of the devices of driver.c, what is free is 8 GiB, and 300 MB less from the third time on that somebody asks.
 */
#include <string.h>

extern int	nvmlInit_v2(void);
extern int	nvmlDeviceGetHandleByUUID(const char *uuid, void **device);
extern int	nvmlDeviceGetMemoryInfo(void *device, unsigned long long memory[3]);

int
nvmlInit_v2(void)
{
	return 0;
}

int
nvmlDeviceGetHandleByUUID(const char *uuid, void **device)
{
	static int	places[10];

	if (strlen(uuid) != 40 || strncmp(uuid, "GPU-01020304-0506-0708-090a-0b0c0d0e0f0", 39) != 0 || uuid[39] < '0' || uuid[39] > '9')
		return 6;
	*device = &places[uuid[39] - '0'];
	return 0;
}

int
nvmlDeviceGetMemoryInfo(void *device, unsigned long long memory[3])
{
	int		   *asked = device;

	memory[0] = 8ULL << 30;
	memory[2] = ++*asked > 2 ? 300000000 : 0;
	memory[1] = memory[0] - memory[2];
	return 0;
}
