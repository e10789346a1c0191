/*
 * hfcache.c -- see hfcache.h.
 */
#include "hfcache.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The step from one directory into the next, not through a link.  Consumes dir, which may be -1. */
static int
enter(int dir, const char *name)
{
	int			next = dir < 0 ? -1 : openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (dir >= 0)
		close(dir);
	return next;
}

/* The regular file of that size in a directory.  Consumes dir, which may be -1. */
static int
open_file(int dir, const char *name, int64_t size)
{
	/* O_NONBLOCK: a FIFO must not hang us */
	int			fd = dir < 0 ? -1 : openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	struct stat sb;

	if (dir >= 0)
		close(dir);
	if (fd >= 0 && (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode) || sb.st_size != size))
	{
		close(fd);
		fd = -1;
	}
	return fd;
}

int
millm_hfcache_open(const char *cache_dir, const char *repo_id, const char *commit, const MillmHubFile *file)
{
	const char *slash = strchr(repo_id, '/');
	char		name[320];
	int			repo, fd;

	/* nothing leads out of the directory: the id and the hashes are checked, and of a path only a plain name comes here */
	if (!file->hash[0] || strchr(file->path, '/'))
		return -1;
	snprintf(name, sizeof(name), "models--%.*s%s%s", (int) (slash ? slash - repo_id : 0), repo_id, slash ? "--" : "", slash ? slash + 1 : repo_id);
	repo = enter(open(cache_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), name);
	if (repo < 0)
		return -1;
	fd = open_file(enter(dup(repo), "blobs"), file->hash, file->size);
	if (fd < 0)
		fd = open_file(enter(enter(dup(repo), "snapshots"), commit), file->path, file->size);
	close(repo);
	return fd;
}
