/*
 * device_name.h -- the names of devices that people write: millm.device, --device.
 */
#ifndef MILLM_DEVICE_NAME_H
#define MILLM_DEVICE_NAME_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* What somebody asked for. */
typedef struct MillmDeviceWish
{
	enum {MILLM_DEVICE_AUTO, MILLM_DEVICE_CPU, MILLM_DEVICE_CUDA} what;
	int			ordinal;		/* of CUDA's devices, 0 to 999; "cuda" is "cuda:0" */
} MillmDeviceWish;

#define MILLM_DEVICE_NAMES "Devices are \"auto\", \"cpu\", \"cuda\" and \"cuda:N\"."

/* One of MILLM_DEVICE_NAMES, or false. */
static inline bool
millm_device_name(const char *name, MillmDeviceWish *out)
{
	const char *digits = name + 5;

	*out = (MillmDeviceWish) {.what = strcmp(name, "cpu") == 0 ? MILLM_DEVICE_CPU : strncmp(name, "cuda", 4) == 0 ? MILLM_DEVICE_CUDA : MILLM_DEVICE_AUTO};
	if (strcmp(name, "auto") == 0 || strcmp(name, "cpu") == 0 || strcmp(name, "cuda") == 0)
		return true;
	if (strncmp(name, "cuda:", 5) != 0 || !*digits || strlen(digits) > 3 || strspn(digits, "0123456789") != strlen(digits))
		return false;
	out->ordinal = atoi(digits);
	return true;
}

#endif
