/*
 * driver.c -- asks the NVIDIA driver, which is opened at run time, before the CUDA runtime is touched.
 *
 * The runtime says for an absent driver, one that is too old and a broken one the same; the driver itself tells them
 * apart.  Types are the driver's, written out.
 *
 * Owns: what the contexts of this process took when they were made, which is when somebody first asked for exact memory: a load.
 */
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#include "device_memory.h"
#include "nvml.h"

#define DRIVER_LIBRARY "libcuda.so.1"

/* CUresult and CUdevice_attribute, those that are named here */
enum {SUCCESS = 0, NO_DEVICE = 100, COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76};

typedef struct Driver
{
	int			(*init) (unsigned flags);
	int			(*get_version) (int *version);
	int			(*get_count) (int *n);
	int			(*get_device) (int *device, int ordinal);
	int			(*get_name) (char *name, int size, int device);
	int			(*get_attribute) (int *value, int attribute, int device);
	int			(*get_total) (size_t *bytes, int device);
	int			(*get_uuid) (unsigned char uuid[16], int device);
} Driver;

static MillmCode
open_driver(Driver *d, MillmError *err)
{
	struct
	{
		const char *name;
		void	   *function;	/* a pointer to one: POSIX says that dlsym()'s fits */
	}			wanted[] = {
		{"cuInit", &d->init}, {"cuDriverGetVersion", &d->get_version}, {"cuDeviceGetCount", &d->get_count}, {"cuDeviceGet", &d->get_device},
		{"cuDeviceGetName", &d->get_name}, {"cuDeviceGetAttribute", &d->get_attribute},
		{"cuDeviceTotalMem_v2", &d->get_total}, {"cuDeviceGetUuid", &d->get_uuid},
	};
	void	   *library = dlopen(DRIVER_LIBRARY, RTLD_NOW | RTLD_LOCAL);	/* stays: the runtime opens it again */

	if (!library)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "there is no NVIDIA driver (" DRIVER_LIBRARY " cannot be opened)");
	for (unsigned i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (!(*(void **) wanted[i].function = dlsym(library, wanted[i].name)))
			return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver is too old (it has no %s)", wanted[i].name);
	return MILLM_OK;
}

/* The driver, and the device of that number and its name. */
static MillmCode
open_device(int ordinal, Driver *d, int *device, char name[128], MillmError *err)
{
	int			version = 0,
				n = 0;
	int			rc;

	if (open_driver(d, err) != MILLM_OK)
		return MILLM_E_UNSUPPORTED;
	if (d->get_version(&version) == SUCCESS && version < MILLM_CUDA_LEAST_DRIVER)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver is too old (it is for CUDA %d.%d, needed is %d.%d)", version / 1000,
						  version % 1000 / 10, MILLM_CUDA_LEAST_DRIVER / 1000, MILLM_CUDA_LEAST_DRIVER % 1000 / 10);
	rc = d->init(0);
	if (rc != SUCCESS && rc != NO_DEVICE)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver does not start (error %d of cuInit)", rc);
	if (rc == NO_DEVICE || d->get_count(&n) != SUCCESS || n == 0)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver finds no device");
	if (ordinal >= n)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "there is no device cuda:%d (the last one is cuda:%d)", ordinal, n - 1);
	if (d->get_device(device, ordinal) != SUCCESS || d->get_name(name, 128, *device) != SUCCESS)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver tells nothing about cuda:%d", ordinal);
	return MILLM_OK;
}

MillmCode
millm_cuda_probe(int ordinal, char *title, int title_size, MillmError *err)
{
	Driver		d;
	char		name[128] = "";
	int			device,
				major = 0,
				minor = 0;
	MillmCode	rc = open_device(ordinal, &d, &device, name, err);

	if (rc != MILLM_OK)
		return rc;
	if (d.get_attribute(&major, COMPUTE_CAPABILITY_MAJOR, device) != SUCCESS || d.get_attribute(&minor, COMPUTE_CAPABILITY_MINOR, device) != SUCCESS)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver tells nothing about cuda:%d", ordinal);
	if (10 * major + minor < MILLM_CUDA_LEAST_CAPABILITY)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "%s is too old (compute capability %d.%d, needed is %d.%d)", name, major, minor,
						  MILLM_CUDA_LEAST_CAPABILITY / 10, MILLM_CUDA_LEAST_CAPABILITY % 10);
	snprintf(title, (size_t) title_size, "%s, compute capability %d.%d", name, major, minor);
	return MILLM_OK;
}

/* ---- memory ---- */

#define MAX_DEVICES 64			/* whose contexts are known; there are no machines with more */

typedef struct Context
{
	bool		is_there;
	int64_t		bytes;			/* that were free before it was made, and not after; -1: not known */
} Context;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Context contexts[MAX_DEVICES];	/* under the lock */

static int64_t
free_bytes_of(const Driver *d, int device)
{
	unsigned char uuid[16];

	return d->get_uuid(uuid, device) == SUCCESS ? millm_nvml_free_bytes(uuid) : -1;
}

static cudaError_t
ask_runtime(int ordinal, size_t *free_size, size_t *total_size)
{
	const cudaError_t status = cudaSetDevice(ordinal);

	return status == cudaSuccess ? cudaMemGetInfo(free_size, total_size) : status;
}

MillmCode
millm_cuda_memory(int ordinal, int64_t *free_bytes, int64_t *total_bytes, MillmError *err)
{
	const bool	is_known = ordinal < MAX_DEVICES;
	Driver		d;
	char		name[128];
	int			device;
	int64_t		before,
				after;
	size_t		free_size,
				total_size;
	cudaError_t status;
	MillmCode	rc = open_device(ordinal, &d, &device, name, err);

	if (rc != MILLM_OK)
		return rc;
	pthread_mutex_lock(&lock);
	before = is_known && !contexts[ordinal].is_there ? free_bytes_of(&d, device) : -1;
	status = ask_runtime(ordinal, &free_size, &total_size);
	if (status == cudaSuccess && is_known && !contexts[ordinal].is_there)
	{
		after = before < 0 ? -1 : free_bytes_of(&d, device);
		contexts[ordinal] = (Context) {true, after < 0 ? -1 : before > after ? before - after : 0};
	}
	pthread_mutex_unlock(&lock);
	if (status != cudaSuccess)
		return millm_cuda_failed(status, "its memory", 0, err);
	*free_bytes = (int64_t) free_size;
	*total_bytes = (int64_t) total_size;
	return MILLM_OK;
}

MillmCode
millm_cuda_look(int ordinal, MillmDeviceState *out, MillmError *err)
{
	Driver		d;
	int			device;
	size_t		free_size,
				total_size;
	Context		context = {true, -1};
	MillmCode	rc = open_device(ordinal, &d, &device, out->name, err);

	if (rc != MILLM_OK)
		return rc;
	out->total_bytes = d.get_total(&total_size, device) == SUCCESS ? (int64_t) total_size : -1;
	out->free_bytes = free_bytes_of(&d, device);
	pthread_mutex_lock(&lock);
	if (ordinal < MAX_DEVICES)
		context = contexts[ordinal];
	if (context.is_there && out->free_bytes < 0 && ask_runtime(ordinal, &free_size, &total_size) == cudaSuccess)
		out->free_bytes = (int64_t) free_size;
	pthread_mutex_unlock(&lock);
	out->context_bytes = context.is_there ? context.bytes : 0;
	return MILLM_OK;
}
