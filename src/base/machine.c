/*
 * machine.c -- see machine.h.  Nothing is allocated, and what cannot be read limits nothing.
 */
#include "machine.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_PATH	1024
#define MAX_FILE	16384			/* memory.stat and meminfo have some 3 kB */

/* A version of control groups: where it is mounted, and what its files and figures are called. */
typedef struct Version
{
	const char *mount;
	const char *limits[2];
	const char *usage;
	const char *cached[2];		/* in memory.stat, of the group and those below it */
} Version;

static const Version v1 = {"/sys/fs/cgroup/memory", {"memory.limit_in_bytes"}, "memory.usage_in_bytes", {"total_active_file", "total_inactive_file"}};
static const Version v2 = {"/sys/fs/cgroup", {"memory.max", "memory.high"}, "memory.current", {"active_file", "inactive_file"}};

/* The file's text into buf[MAX_FILE]; false when there is none. */
static bool
read_text(const char *root, const char *dir, const char *name, char *buf)
{
	char		path[2 * MAX_PATH];
	int			fd;
	ssize_t		n,
				len = 0;

	if ((size_t) snprintf(path, sizeof(path), "%s%s/%s", root, dir, name) >= sizeof(path) || (fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
		return false;
	while (len < MAX_FILE - 1 && (n = read(fd, buf + len, (size_t) (MAX_FILE - 1 - len))) > 0)
		len += n;
	close(fd);
	buf[len] = '\0';
	return len > 0;
}

/* The number at the start of text, -1 when there is none ("max"). */
static int64_t
number(const char *text)
{
	char	   *end;
	long long	n = strtoll(text, &end, 10);

	return end == text || n < 0 ? -1 : n;
}

/* The number behind a name that begins a line; -1 when there is no such line. */
static int64_t
figure(const char *text, const char *name)
{
	const size_t len = strlen(name);

	for (const char *line = text; line; line = strchr(line, '\n'))
	{
		line += *line == '\n';
		if (strncmp(line, name, len) == 0 && (line[len] == ' ' || line[len] == ':'))
			return number(line + len + 1);
	}
	return -1;
}

static int64_t
number_in(const char *root, const char *dir, const char *name, char *buf)
{
	return read_text(root, dir, name, buf) ? number(buf) : -1;
}

/* What one group leaves. */
static void
apply_group(const char *root, const char *dir, const Version *v, MillmMachineMemory *m)
{
	char		buf[MAX_FILE];
	int64_t		limit = -1,
				used,
				free_bytes;

	for (int i = 0; i < 2 && v->limits[i]; i++)
	{
		const int64_t l = number_in(root, dir, v->limits[i], buf);

		if (l >= 0 && (limit < 0 || l < limit))
			limit = l;
	}
	/* version 1 says "none" with a number beyond any memory */
	if (limit < 0 || (m->total_bytes >= 0 && limit >= m->total_bytes))
		return;
	m->total_bytes = limit;
	used = number_in(root, dir, v->usage, buf);
	if (used < 0)
		used = 0;				/* of what is not known, no more than the limit is left */
	if (read_text(root, dir, "memory.stat", buf))
		for (int i = 0; i < 2; i++)
		{
			const int64_t cached = figure(buf, v->cached[i]);

			if (cached > 0)
				used = cached < used ? used - cached : 0;
		}
	free_bytes = used < limit ? limit - used : 0;
	if (m->available_bytes < 0 || free_bytes < m->available_bytes)
		m->available_bytes = free_bytes;
}

/* The group of that path (in place) and all above it.  A path that a container does not see ends at the mount, its own group. */
static void
apply_groups(const char *root, char *path, const Version *v, MillmMachineMemory *m)
{
	char		dir[2 * MAX_PATH];

	if (path[0] != '/' || path[1] == '\0' || strlen(path) >= MAX_PATH || strstr(path, ".."))
		path[0] = '\0';
	for (;;)
	{
		char	   *slash;

		snprintf(dir, sizeof(dir), "%s%s", v->mount, path);
		apply_group(root, dir, v, m);
		if ((slash = strrchr(path, '/')) == NULL)
			return;
		*slash = '\0';
	}
}

/* Is "memory" among these names, with commas between them? */
static bool
has_memory(const char *names)
{
	for (const char *p = names; *p; p += strcspn(p, ","), p += *p == ',')
		if (strcspn(p, ",") == strlen("memory") && strncmp(p, "memory", strlen("memory")) == 0)
			return true;
	return false;
}

MillmMachineMemory
millm_machine_memory(const char *root)
{
	MillmMachineMemory m = {-1, -1};
	char		buf[MAX_FILE];

	if (read_text(root, "/proc", "meminfo", buf))
	{
		const int64_t total = figure(buf, "MemTotal"),
					available = figure(buf, "MemAvailable");

		m.total_bytes = total < 0 ? -1 : total * 1024;
		m.available_bytes = available < 0 ? -1 : available * 1024;
	}
	if (!read_text(root, "/proc/self", "cgroup", buf))
		return m;
	/* lines of "number:controllers:path"; version 2 is number 0 and names none */
	for (char *line = buf, *next; line; line = next)
	{
		char	   *names = strchr(line, ':'),
				   *path;

		if ((next = strchr(line, '\n')) != NULL)
			*next++ = '\0';
		if (!names || !(path = strchr(names + 1, ':')))
			continue;
		*names++ = *path++ = '\0';
		if (strcmp(line, "0") == 0 && *names == '\0')
			apply_groups(root, path, &v2, &m);
		else if (has_memory(names))
			apply_groups(root, path, &v1, &m);
	}
	return m;
}
