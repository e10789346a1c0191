/*
 * machine.h -- the memory that this process may use: the machine's, within the limits of the control groups that hold the process.
 */
#ifndef MILLM_MACHINE_H
#define MILLM_MACHINE_H

#include <stdint.h>

typedef struct MillmMachineMemory
{
	int64_t		total_bytes;	/* both: -1 when it cannot be known */
	int64_t		available_bytes;	/* without swapping; what is cached of files counts as available */
} MillmMachineMemory;

/*
 * Read /proc and /sys/fs/cgroup below root, "" but for tests: /proc/meminfo, and of each group from the process's own up to the root
 * memory.max and memory.high (version 2), or memory.limit_in_bytes (version 1).  A container sees its own group as the root.
 */
extern MillmMachineMemory millm_machine_memory(const char *root);

#endif
