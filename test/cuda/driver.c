/*
 * driver.c -- libcuda.so.1 for tests: a driver that says what FAKE_CUDA tells it, "VERSION N_DEVICES CAPABILITY",
 * for example "13000 1 90"; without it, of version 13.0 with one device of 9.0.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Fake
{
	int			version, n_devices, capability;
} Fake;

static Fake
fake(void)
{
	Fake		f = {13000, 1, 90};
	const char *told = getenv("FAKE_CUDA");

	if (told && sscanf(told, "%d %d %d", &f.version, &f.n_devices, &f.capability) != 3)
		abort();
	return f;
}

extern int	cuInit(unsigned flags);
extern int	cuDriverGetVersion(int *version);
extern int	cuDeviceGetCount(int *n);
extern int	cuDeviceGet(int *device, int ordinal);
extern int	cuDeviceGetName(char *name, int size, int device);
extern int	cuDeviceTotalMem_v2(size_t *bytes, int device);
extern int	cuDeviceGetUuid(unsigned char uuid[16], int device);
extern int	cuDeviceGetAttribute(int *value, int attribute, int device);

int
cuInit(unsigned flags)
{
	if (fake().n_devices < 0)
		return 999;
	return flags == 0 && fake().n_devices > 0 ? 0 : 100;
}

int
cuDriverGetVersion(int *version)
{
	*version = fake().version;
	return 0;
}

int
cuDeviceGetCount(int *n)
{
	*n = fake().n_devices;
	return 0;
}

int
cuDeviceGet(int *device, int ordinal)
{
	*device = 40 + ordinal;
	return ordinal < fake().n_devices ? 0 : 101;
}

int
cuDeviceGetName(char *name, int size, int device)
{
	return snprintf(name, (size_t) size, "Emulated GPU %d", device - 40) < size ? 0 : 1;
}

int
cuDeviceGetAttribute(int *value, int attribute, int device)
{
	*value = attribute == 75 ? fake().capability / 10 : fake().capability % 10;
	return device >= 40 ? 0 : 101;
}

int
cuDeviceTotalMem_v2(size_t *bytes, int device)
{
	*bytes = (size_t) 8 << 30;
	return device >= 40 ? 0 : 101;
}

int
cuDeviceGetUuid(unsigned char uuid[16], int device)
{
	for (int i = 0; i < 16; i++)
		uuid[i] = (unsigned char) (i < 15 ? i + 1 : device - 40);
	return device >= 40 ? 0 : 101;
}
