/*
 * driver.c -- asks the NVIDIA driver, which is opened at run time, before the CUDA runtime is touched.
 *
 * The runtime says for an absent driver, one that is too old and a broken one the same; the driver itself tells them
 * apart.  Types are the driver's, written out: this file needs no CUDA header.
 */
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>

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
	};
	void	   *library = dlopen(DRIVER_LIBRARY, RTLD_NOW | RTLD_LOCAL);	/* stays: the runtime opens it again */

	if (!library)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "there is no NVIDIA driver (" DRIVER_LIBRARY " cannot be opened)");
	for (unsigned i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (!(*(void **) wanted[i].function = dlsym(library, wanted[i].name)))
			return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver is too old (it has no %s)", wanted[i].name);
	return MILLM_OK;
}

MillmCode
millm_cuda_probe(int ordinal, char *title, int title_size, MillmError *err)
{
	Driver		d;
	char		name[128] = "";
	int			version = 0,
				n = 0,
				device,
				major = 0,
				minor = 0;
	int			rc;

	if (open_driver(&d, err) != MILLM_OK)
		return err ? err->code : MILLM_E_UNSUPPORTED;
	if (d.get_version(&version) == SUCCESS && version < MILLM_CUDA_LEAST_DRIVER)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver is too old (it is for CUDA %d.%d, needed is %d.%d)", version / 1000,
						  version % 1000 / 10, MILLM_CUDA_LEAST_DRIVER / 1000, MILLM_CUDA_LEAST_DRIVER % 1000 / 10);
	rc = d.init(0);
	if (rc != SUCCESS && rc != NO_DEVICE)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver does not start (error %d of cuInit)", rc);
	if (rc == NO_DEVICE || d.get_count(&n) != SUCCESS || n == 0)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver finds no device");
	if (ordinal >= n)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "there is no device cuda:%d (the last one is cuda:%d)", ordinal, n - 1);
	if (d.get_device(&device, ordinal) != SUCCESS || d.get_name(name, sizeof(name), device) != SUCCESS ||
		d.get_attribute(&major, COMPUTE_CAPABILITY_MAJOR, device) != SUCCESS ||
		d.get_attribute(&minor, COMPUTE_CAPABILITY_MINOR, device) != SUCCESS)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the NVIDIA driver tells nothing about cuda:%d", ordinal);
	if (10 * major + minor < MILLM_CUDA_LEAST_CAPABILITY)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "%s is too old (compute capability %d.%d, needed is %d.%d)", name, major, minor,
						  MILLM_CUDA_LEAST_CAPABILITY / 10, MILLM_CUDA_LEAST_CAPABILITY % 10);
	snprintf(title, (size_t) title_size, "%s, compute capability %d.%d", name, major, minor);
	return MILLM_OK;
}
