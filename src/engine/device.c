/*
 * device.c -- which device a model computes on, and the CUDA module.
 *
 * Owns: the opened module, which stays open until the process ends.
 *
 * That there is no module, driver or device is found anew at each load: somebody may have installed it meanwhile.
 */
#include "device.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model.h"
#include "serve.h"

#define EXIT_DEVICE_FAULT 71

__attribute__((noreturn)) static void
fault(const MillmError *err)
{
	/* Memory and results are no longer to be trusted, and the driver gives a new process a new context. */
	millm_log("ERROR", "%s: %s", err->message, err->detail);
	_exit(EXIT_DEVICE_FAULT);
}

static const MillmCudaHost host = {.fault = fault, .rope_frequencies = millm_rope_frequencies};

MillmCode
millm_device_wish(const char *text, MillmDeviceWish *out, MillmError *err)
{
	if (millm_device_name(text, out))
		return MILLM_OK;
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "there is no device named \"%.50s\"", text);
	millm_hint(err, "%s", MILLM_DEVICE_NAMES);
	return MILLM_E_INVALID_ARGUMENT;
}

/* The module's path into path[PATH_MAX]. */
static MillmCode
module_path(const char *directory, char *path, MillmError *err)
{
	char		program[PATH_MAX];
	ssize_t		len;
	int			n;

	if (!directory)
	{
		if ((len = readlink("/proc/self/exe", program, sizeof(program) - 1)) < 0)
			return millm_fail(err, MILLM_E_UNSUPPORTED, "the directory of this program cannot be read: %s", strerror(errno));
		program[len] = '\0';
		*strrchr(program, '/') = '\0';	/* the link's text is absolute */
		directory = program;
	}
	n = snprintf(path, PATH_MAX, "%s/%s", directory, MILLM_CUDA_MODULE);
	return n < PATH_MAX ? MILLM_OK : millm_fail(err, MILLM_E_UNSUPPORTED, "the path of the module is too long");
}

static MillmCode
open_module(const char *directory, const MillmCudaModule **out, MillmError *err)
{
	char		path[PATH_MAX];
	void	   *library;
	union
	{
		void	   *symbol;
		MillmCudaEntry function;
	}			entry;
	MillmCode	rc = module_path(directory, path, err);

	if (rc != MILLM_OK)
		return rc;
	if (access(path, F_OK) != 0)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the CUDA module is not installed (there is no \"%.200s\")", path);
	if (!(library = dlopen(path, RTLD_NOW | RTLD_LOCAL)))
		return millm_fail(err, MILLM_E_UNSUPPORTED, "the CUDA module cannot be opened (%.200s)", dlerror());
	entry.symbol = dlsym(library, MILLM_CUDA_ENTRY);
	*out = entry.symbol ? entry.function(&host) : NULL;
	if (*out && (*out)->abi == MILLM_BACKEND_ABI)
		return MILLM_OK;
	if (!*out)
		millm_fail(err, MILLM_E_UNSUPPORTED, "\"%.200s\" is not a CUDA module of millm", path);
	else
		millm_fail(err, MILLM_E_UNSUPPORTED, "the CUDA module is of another build of millm (its interface is %08x, this engine's %08x)",
				   (unsigned) (*out)->abi, (unsigned) MILLM_BACKEND_ABI);
	dlclose(library);
	return MILLM_E_UNSUPPORTED;
}

static MillmCode
use_cuda(int ordinal, const char *directory, MillmDevice *out, MillmError *err)
{
	const MillmCudaModule *module = NULL;
	char		title[192];
	MillmCode	rc = open_module(directory, &module, err);

	if (rc != MILLM_OK || (rc = module->probe(ordinal, title, sizeof(title), err)) != MILLM_OK)
		return rc;
	*out = (MillmDevice) {.kind = &module->kind, .ordinal = ordinal, .memory = module->memory};
	snprintf(out->name, sizeof(out->name), "cuda:%d", ordinal);
	snprintf(out->reason, sizeof(out->reason), "%s", title);
	return MILLM_OK;
}

MillmCode
millm_device_look(int ordinal, const char *directory, MillmDeviceState *out, MillmError *err)
{
	const MillmCudaModule *module = NULL;
	MillmCode	rc = open_module(directory, &module, err);

	return rc == MILLM_OK ? module->look(ordinal, out, err) : rc;
}

MillmCode
millm_device_choose(const MillmDeviceWish *wish, const char *directory, MillmDevice *out, MillmError *err)
{
	MillmError	why = {.message = "millm.device is cpu"};

	if (wish->what != MILLM_DEVICE_CPU && use_cuda(wish->ordinal, directory, out, &why) == MILLM_OK)
		return MILLM_OK;
	if (wish->what == MILLM_DEVICE_CUDA)
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "device \"cuda:%d\" is not available", wish->ordinal);
		millm_detail(err, "CUDA is not used: %s.", why.message);
		millm_hint(err, "With \"auto\" a model is loaded on the CPU where there is no CUDA.");
		return MILLM_E_UNSUPPORTED;
	}
	*out = (MillmDevice) {.kind = &millm_backend_cpu, .name = "cpu"};
	snprintf(out->reason, sizeof(out->reason), "CUDA is not used: %.290s", why.message);
	return MILLM_OK;
}
