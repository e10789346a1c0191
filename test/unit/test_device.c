/*
 * test_device.c -- which device is chosen, and why not CUDA: the sentence of each situation, with modules and drivers that are made for it.
 *
 * The driver is looked for once in a process, where LD_LIBRARY_PATH said when that began: this program runs itself again for
 * each situation, as `test_device WISH DIRECTORY`, and prints what millm_device_choose() makes of it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

static char emulated[PATH_MAX];	/* where the emulated module, its driver and modules of other builds are */

static void
locate(void)
{
	char		program[PATH_MAX];
	ssize_t		n = readlink("/proc/self/exe", program, sizeof(program) - 1);

	assert_true(n > 0);
	program[n] = '\0';
	snprintf(emulated, sizeof(emulated), "%s/../emulated", dirname(program));
}

/* What is printed for a wish, with the module in directory; driver: what FAKE_CUDA says, NULL: there is no driver. */
static const char *
choice(const char *wish, const char *directory, const char *driver)
{
	static char line[1024];
	char		command[4 * PATH_MAX];
	size_t		n;
	FILE	   *f;

	snprintf(command, sizeof(command), "LD_LIBRARY_PATH='%s%s' FAKE_CUDA='%s' /proc/%d/exe %s '%s'", emulated, driver ? "/driver" : "/none",
			 driver ? driver : "", (int) getpid(), wish, directory);
	assert_non_null(f = popen(command, "r"));
	n = fread(line, 1, sizeof(line) - 1, f);
	line[n] = '\0';
	assert_int_equal(pclose(f), 0);
	return line;
}

static int
choose(const char *text, const char *directory)
{
	MillmDeviceWish wish;
	MillmDevice device;
	MillmError	err;

	if (millm_device_wish(text, &wish, &err) == MILLM_OK && millm_device_choose(&wish, directory, &device, &err) == MILLM_OK)
		printf("%s: %s", device.name, device.reason);
	else
		printf("%s: %s: %s", millm_code_name(err.code), err.message, err.detail);
	return 0;
}

static void
expect(const char *wish, const char *directory, const char *driver, const char *begin)
{
	const char *got = choice(wish, directory, driver);

	if (strncmp(got, begin, strlen(begin)) != 0)
		fail_msg("\"%s\" in place of \"%s\"", got, begin);
}

static void
test_wishes(void **state)
{
	static const char *const wrong[] = {"", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:1x", "cuda:1000", "cuda 0", "cpu:0"};
	MillmDeviceWish wish;
	MillmError	err;

	(void) state;
	assert_int_equal(millm_device_wish("auto", &wish, &err), MILLM_OK);
	assert_int_equal(wish.what, MILLM_DEVICE_AUTO);
	assert_int_equal(wish.ordinal, 0);
	assert_int_equal(millm_device_wish("cpu", &wish, &err), MILLM_OK);
	assert_int_equal(wish.what, MILLM_DEVICE_CPU);
	assert_int_equal(millm_device_wish("cuda", &wish, &err), MILLM_OK);
	assert_int_equal(wish.what, MILLM_DEVICE_CUDA);
	assert_int_equal(wish.ordinal, 0);
	assert_int_equal(millm_device_wish("cuda:12", &wish, &err), MILLM_OK);
	assert_int_equal(wish.ordinal, 12);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
		assert_int_equal(millm_device_wish(wrong[i], &wish, &err), MILLM_E_INVALID_ARGUMENT);
}

/* The six situations. */
static void
test_disabled(void **state)
{
	(void) state;
	expect("cpu", emulated, "13000 1 90", "cpu: CUDA is not used: millm.device is cpu");
}

static void
test_no_module(void **state)
{
	(void) state;
	expect("auto", "/nowhere", "13000 1 90", "cpu: CUDA is not used: the CUDA module is not installed (there is no \"/nowhere/libmillm_cuda.so\")");
}

static void
test_other_build(void **state)
{
	char		directory[PATH_MAX + 16];

	(void) state;
	snprintf(directory, sizeof(directory), "%s/other-build", emulated);
	expect("auto", directory, "13000 1 90", "cpu: CUDA is not used: the CUDA module is of another build of millm (its interface is 00000001, this engine's ");
	snprintf(directory, sizeof(directory), "%s/no-module", emulated);
	expect("auto", directory, "13000 1 90", "cpu: CUDA is not used: \"");
	expect("auto", directory, "13000 1 90", choice("auto", directory, NULL));	/* what is no module of ours is asked for nothing */
	snprintf(directory, sizeof(directory), "%s/no-library", emulated);
	expect("auto", directory, "13000 1 90", "cpu: CUDA is not used: the CUDA module cannot be opened (");
}

static void
test_no_driver(void **state)
{
	(void) state;
	expect("auto", emulated, NULL, "cpu: CUDA is not used: there is no NVIDIA driver (libcuda.so.1 cannot be opened)");
}

static void
test_no_device(void **state)
{
	(void) state;
	expect("auto", emulated, "13000 0 90", "cpu: CUDA is not used: the NVIDIA driver finds no device");
	expect("auto", emulated, "13000 -1 90", "cpu: CUDA is not used: the NVIDIA driver does not start (error 999 of cuInit)");
	expect("cuda:2", emulated, "13000 2 90",
		   "UNSUPPORTED: device \"cuda:2\" is not available: CUDA is not used: there is no device cuda:2 (the last one is cuda:1).");
}

static void
test_too_old(void **state)
{
	(void) state;
	expect("auto", emulated, "12040 1 90", "cpu: CUDA is not used: the NVIDIA driver is too old (it is for CUDA 12.4, needed is 13.0)");
	expect("auto", emulated, "13000 1 70", "cpu: CUDA is not used: Emulated GPU 0 is too old (compute capability 7.0, needed is 7.5)");
}

static void
test_by_name(void **state)
{
	(void) state;
	expect("cuda", "/nowhere", "13000 1 90", "UNSUPPORTED: device \"cuda:0\" is not available: CUDA is not used: the CUDA module is not installed");
	expect("cuda:0", emulated, NULL, "UNSUPPORTED: device \"cuda:0\" is not available: CUDA is not used: there is no NVIDIA driver");
}

static void
test_found(void **state)
{
	(void) state;
	expect("auto", emulated, "13000 2 90", "cuda:0: Emulated GPU 0, compute capability 9.0");
	expect("cuda:1", emulated, "13020 2 75", "cuda:1: Emulated GPU 1, compute capability 7.5");
}

int
main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_wishes), cmocka_unit_test(test_disabled), cmocka_unit_test(test_no_module), cmocka_unit_test(test_other_build),
		cmocka_unit_test(test_no_driver), cmocka_unit_test(test_no_device), cmocka_unit_test(test_too_old), cmocka_unit_test(test_by_name),
		cmocka_unit_test(test_found),
	};

	if (argc == 3)
		return choose(argv[1], argv[2]);
	locate();
	return cmocka_run_group_tests(tests, NULL, NULL);
}
