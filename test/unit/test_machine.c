/* test_machine.c -- the memory of this machine and of made-up ones: control groups of both versions, containers, nonsense. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "machine.h"

#define MB ((int64_t) 1 << 20)

static char root[64];

/* Write a file below root, with the directories that lead there. */
static void
put(const char *path, const char *text)
{
	char		full[512];
	FILE	   *f;

	snprintf(full, sizeof(full), "%s%s", root, path);
	for (char *slash = strchr(full + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/'))
	{
		*slash = '\0';
		mkdir(full, 0700);
		*slash = '/';
	}
	assert_non_null(f = fopen(full, "w"));
	fputs(text, f);
	fclose(f);
}

static int
new_root(void **state)
{
	(void) state;
	strcpy(root, "/tmp/millm-machine-XXXXXX");
	if (!mkdtemp(root))
		return -1;
	put("/proc/meminfo", "MemTotal:        8388608 kB\nMemFree:          100 kB\nMemAvailable:    4194304 kB\n");
	return 0;
}

static int
remove_root(void **state)
{
	char		command[128];

	(void) state;
	snprintf(command, sizeof(command), "rm -rf %s", root);
	return system(command);
}

static void
expect(int64_t total, int64_t available)
{
	const MillmMachineMemory m = millm_machine_memory(root);

	assert_int_equal(m.total_bytes, total);
	assert_int_equal(m.available_bytes, available);
}

static void
test_none(void **state)
{
	MillmMachineMemory here = millm_machine_memory("");

	(void) state;
	expect(8192 * MB, 4096 * MB);
	put("/proc/self/cgroup", "0::/\n");
	expect(8192 * MB, 4096 * MB);
	put("/proc/meminfo", "");
	expect(-1, -1);
	assert_true(here.total_bytes > 0 && here.available_bytes > 0 && here.available_bytes <= here.total_bytes);
}

static void
test_version_2(void **state)
{
	(void) state;
	put("/proc/self/cgroup", "0::/system.slice/postgresql.service\n");
	put("/sys/fs/cgroup/system.slice/memory.max", "max\n");
	put("/sys/fs/cgroup/system.slice/postgresql.service/memory.max", "1073741824\n");
	put("/sys/fs/cgroup/system.slice/postgresql.service/memory.current", "629145600\n");
	expect(1024 * MB, 424 * MB);
	/* what is cached of files can be had */
	put("/sys/fs/cgroup/system.slice/postgresql.service/memory.stat",
		"anon 209715200\nfile 314572800\nshmem 104857600\ninactive_file 104857600\nactive_file 209715200\nunevictable 0\n");
	expect(1024 * MB, 724 * MB);
	/* the group above is the narrower one */
	put("/sys/fs/cgroup/system.slice/memory.max", "536870912\n");
	put("/sys/fs/cgroup/system.slice/memory.current", "524288000\n");
	expect(512 * MB, 12 * MB);
	/* where it is throttled instead of killed counts too; more is used than may be */
	put("/sys/fs/cgroup/system.slice/memory.high", "268435456\n");
	expect(256 * MB, 0);
	/* more than the machine has is no limit */
	put("/sys/fs/cgroup/system.slice/memory.high", "max\n");
	put("/sys/fs/cgroup/system.slice/memory.max", "1099511627776\n");
	expect(1024 * MB, 724 * MB);
	/* the machine itself has less */
	put("/proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 102400 kB\n");
	expect(1024 * MB, 100 * MB);
}

static void
test_version_1(void **state)
{
	(void) state;
	put("/proc/self/cgroup", "9:name=systemd:/\n8:pids:/\n4:memory:/docker/0123\n3:cpuset,cpu:/x\n0::/\n");
	put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
	put("/sys/fs/cgroup/memory/docker/0123/memory.limit_in_bytes", "1073741824\n");
	put("/sys/fs/cgroup/memory/docker/0123/memory.usage_in_bytes", "943718400\n");
	put("/sys/fs/cgroup/memory/docker/0123/memory.stat", "cache 1\nactive_file 1\ntotal_inactive_file 104857600\ntotal_active_file 209715200\n");
	expect(1024 * MB, 424 * MB);
	/* from inside the container that path is not there: its own group is the root */
	put("/proc/self/cgroup", "11:cpu,memory:/docker/4567\n");
	put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n");
	put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1073741824\n");
	expect(2048 * MB, 1024 * MB);
	/* another controller whose name begins alike */
	put("/proc/self/cgroup", "11:memory_x,xmemory:/docker/0123\n");
	expect(8192 * MB, 4096 * MB);
}

static void
test_nonsense(void **state)
{
	char		text[4096];

	(void) state;
	put("/etc/memory.max", "1\n");
	for (int i = 0; i < 5; i++)
	{
		static const char *const texts[] = {"", "\n\n:\n::\n0:\n0:x:/a\nmemory\n", "0::/../../../etc\n", "4:memory:\n", "0::no-slash\n"};

		put("/proc/self/cgroup", texts[i]);
		expect(8192 * MB, 4096 * MB);
	}
	memset(text, 'a', sizeof(text));
	memcpy(text, "0::/", 4);
	text[sizeof(text) - 1] = '\0';
	put("/proc/self/cgroup", text);
	expect(8192 * MB, 4096 * MB);
	/* a limit without its usage, and one that is no number */
	put("/proc/self/cgroup", "0::/g\n");
	put("/sys/fs/cgroup/g/memory.max", "1073741824\n");
	expect(1024 * MB, 1024 * MB);
	put("/sys/fs/cgroup/g/memory.max", "-5\n");
	expect(8192 * MB, 4096 * MB);
	put("/sys/fs/cgroup/g/memory.max", "");
	expect(8192 * MB, 4096 * MB);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_none, new_root, remove_root),
		cmocka_unit_test_setup_teardown(test_version_2, new_root, remove_root),
		cmocka_unit_test_setup_teardown(test_version_1, new_root, remove_root),
		cmocka_unit_test_setup_teardown(test_nonsense, new_root, remove_root),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
