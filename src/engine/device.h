/*
 * device.h -- where a model computes: the CPU, or a GPU through a module that is opened at run time.
 *
 * Nothing of CUDA is linked: one package serves hosts with and without it.  Why CUDA is not used is one
 * sentence, which status() shows, and which is the error where CUDA was asked for by name.
 */
#ifndef MILLM_DEVICE_H
#define MILLM_DEVICE_H

#include <stdint.h>

#include "backend.h"
#include "cuda_module.h"
#include "device_name.h"
#include "error.h"

/* "auto", "cpu", "cuda" or "cuda:N"; INVALID_ARGUMENT for other texts. */
extern MillmCode millm_device_wish(const char *text, MillmDeviceWish *out, MillmError *err);

typedef struct MillmDevice
{
	const MillmBackendKind *kind;
	int			ordinal;
	/* INTERNAL when the device does not tell; NULL: the CPU, whose memory is the machine's (machine.h) */
	MillmCode	(*memory) (int ordinal, int64_t *free_bytes, int64_t *total_bytes, MillmError *err);
	char		name[16];		/* "cpu", "cuda:0" */
	char		reason[320];	/* one sentence: why CUDA is not used, or which GPU it is */
} MillmDevice;

/*
 * The device for a wish: "auto" is the first of CUDA's, or else the CPU and the reason.  UNSUPPORTED with the reason when CUDA was
 * asked for by name and cannot be used.  directory is where the module lies; NULL: beside this program.  Any thread.
 */
extern MillmCode millm_device_choose(const MillmDeviceWish *wish, const char *directory, MillmDevice *out, MillmError *err);

/*
 * One of CUDA's devices, loaded on or not, from cuda:0 on; nothing is made there for it.  UNSUPPORTED past the last one, and where CUDA cannot be used.
 * Any thread.
 */
extern MillmCode millm_device_look(int ordinal, const char *directory, MillmDeviceState *out, MillmError *err);

#endif
