/*
 * store.c -- see store.h.  All paths are relative to directory descriptors that were opened without following links.
 */
#include "store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define MAX_DEPTH 16

struct MillmStore
{
	char	   *path;
	int			dir_fd;
	MillmSink	sink;
	/* the file in work */
	const MillmHubFile *file;
	char		partial[400];
	int			fd;
	int64_t		kept;
};

static MillmCode
disk_error(MillmError *err, const char *doing, const char *name)
{
	int			e = errno;
	MillmCode	code = e == ENOSPC || e == EDQUOT ? MILLM_E_INSUFFICIENT_DISK : MILLM_E_MODEL_DOWNLOAD_FAILED;

	millm_fail(err, code, "could not %s \"%s\" in the model cache: %s", doing, name, strerror(e));
	millm_hint(err, code == MILLM_E_INSUFFICIENT_DISK ? "Free space or point millm.cache_dir at a larger file system." : "Check the rights on millm.cache_dir.");
	return code;
}

/* Open the directory step by step below cache_dir, creating what is missing. */
static int
open_below(const char *cache_dir, const char *directory, bool create)
{
	char		part[256];
	int			fd;

	if (create)
		(void) mkdir(cache_dir, 0700);	/* the open below says whether it is there */
	fd = open(cache_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	while (fd >= 0 && *directory)
	{
		size_t		n = strcspn(directory, "/");
		int			next;

		if (n == 0 || n >= sizeof(part) || (n <= 2 && memcmp(directory, "..", n) == 0))
		{
			close(fd);
			errno = EINVAL;
			return -1;
		}
		memcpy(part, directory, n);
		part[n] = '\0';
		directory += n + (directory[n] == '/');
		if (create && mkdirat(fd, part, 0700) != 0 && errno != EEXIST)
			next = -1;
		else
			next = openat(fd, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		close(fd);
		fd = next;
	}
	return fd;
}

MillmCode
millm_store_open(const char *cache_dir, const char *directory, MillmStore **out, MillmError *err)
{
	MillmStore *s = calloc(1, sizeof(*s));

	if (!s || asprintf(&s->path, "%s/%s", cache_dir, directory) < 0)
	{
		free(s);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	s->fd = -1;
	s->dir_fd = open_below(cache_dir, directory, true);
	if (s->dir_fd < 0)
	{
		MillmCode	rc = disk_error(err, "open", s->path);

		millm_store_close(s);
		return rc;
	}
	*out = s;
	return MILLM_OK;
}

void
millm_store_close(MillmStore *s)
{
	if (!s)
		return;
	if (s->fd >= 0)
		close(s->fd);
	if (s->dir_fd >= 0)
		close(s->dir_fd);
	free(s->path);
	free(s);
}

const char *
millm_store_path(const MillmStore *s)
{
	return s->path;
}

MillmCode
millm_store_free_bytes(const MillmStore *s, int64_t *out, MillmError *err)
{
	struct statvfs v;

	if (fstatvfs(s->dir_fd, &v) != 0)
		return disk_error(err, "look at", s->path);
	*out = (int64_t) v.f_bavail * (int64_t) v.f_frsize;
	return MILLM_OK;
}

/* Files of ours lie in one directory: only names of the repository's root come here. */
static void
partial_name(const MillmHubFile *file, char buf[400])
{
	snprintf(buf, 400, ".partial-%.16s-%s", file->hash[0] ? file->hash : "unknown", file->path);
}

static int64_t
size_of(const MillmStore *s, const char *name)
{
	struct stat sb;

	return fstatat(s->dir_fd, name, &sb, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(sb.st_mode) ? (int64_t) sb.st_size : -1;
}

int64_t
millm_store_have(const MillmStore *s, const MillmHubFile *file)
{
	char		partial[400];
	int64_t		n = size_of(s, file->path);

	partial_name(file, partial);
	if (n != file->size)
		n = size_of(s, partial);
	return n < 0 ? 0 : n > file->size ? file->size : n;
}

bool
millm_store_is_proved(const MillmStore *s, const MillmHubFile *file, atomic_bool *stop)
{
	bool		is_sha256 = strlen(file->hash) == 64;
	unsigned char digest[EVP_MAX_MD_SIZE], *buf;
	char		header[40], hex[2 * EVP_MAX_MD_SIZE + 1] = "";
	unsigned	n = 0;
	ssize_t		got;
	EVP_MD_CTX *h;
	int			fd;

	if (!file->hash[0] || size_of(s, file->path) != file->size)
		return false;
	fd = openat(s->dir_fd, file->path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	h = EVP_MD_CTX_new();
	buf = malloc(1 << 20);
	if (fd >= 0 && h && buf && EVP_DigestInit_ex(h, is_sha256 ? EVP_sha256() : EVP_sha1(), NULL) == 1)
	{
		if (!is_sha256)
			EVP_DigestUpdate(h, header, (size_t) snprintf(header, sizeof(header), "blob %lld", (long long) file->size) + 1);
		while (!atomic_load(stop) && (got = read(fd, buf, 1 << 20)) > 0)
			EVP_DigestUpdate(h, buf, (size_t) got);
		EVP_DigestFinal_ex(h, digest, &n);
	}
	for (unsigned i = 0; i < n; i++)
		snprintf(hex + 2 * i, 3, "%02x", digest[i]);
	if (fd >= 0)
		close(fd);
	EVP_MD_CTX_free(h);
	free(buf);
	return strcmp(hex, file->hash) == 0;
}

/* --- The plain sink ------------------------------------------------------------------------------- */

static MillmCode
sink_begin(void *arg, const MillmHubFile *file, int64_t *have, MillmError *err)
{
	MillmStore *s = arg;
	struct stat sb;

	s->file = file;
	partial_name(file, s->partial);
	s->fd = openat(s->dir_fd, s->partial, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (s->fd < 0 || fstat(s->fd, &sb) != 0)
		return disk_error(err, "create", file->path);
	*have = s->kept = sb.st_size;
	return MILLM_OK;
}

static MillmCode
sink_replay(void *arg, void (*see) (void *see_arg, const void *data, size_t len), void *see_arg, MillmError *err)
{
	MillmStore *s = arg;
	char	   *buf = malloc(1 << 20);
	int64_t		at = 0;

	if (!buf)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	while (at < s->kept)
	{
		ssize_t		n = pread(s->fd, buf, 1 << 20, at);

		if (n <= 0)
			break;
		see(see_arg, buf, (size_t) n);
		at += n;
	}
	free(buf);
	if (lseek(s->fd, at, SEEK_SET) < 0 || ftruncate(s->fd, at) != 0)
		return disk_error(err, "read", s->file->path);
	return MILLM_OK;
}

static MillmCode
sink_write(void *arg, const void *data, size_t len, MillmError *err)
{
	MillmStore *s = arg;
	const char *p = data;

	while (len > 0)
	{
		ssize_t		n = write(s->fd, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return disk_error(err, "write", s->file->path);
		p += n;
		len -= (size_t) n;
	}
	return MILLM_OK;
}

static MillmCode
sink_discard(void *arg, MillmError *err)
{
	MillmStore *s = arg;

	if (ftruncate(s->fd, 0) != 0 || lseek(s->fd, 0, SEEK_SET) < 0)
		return disk_error(err, "truncate", s->file->path);
	return MILLM_OK;
}

static void
sink_abandon(void *arg)
{
	MillmStore *s = arg;

	if (s->fd >= 0)
		close(s->fd);
	s->fd = -1;
}

static MillmCode
sink_finish(void *arg, MillmError *err)
{
	MillmStore *s = arg;
	MillmCode	rc = MILLM_OK;

	if (fsync(s->fd) != 0)
		rc = disk_error(err, "sync", s->file->path);
	sink_abandon(s);
	if (rc == MILLM_OK && (renameat(s->dir_fd, s->partial, s->dir_fd, s->file->path) != 0 || fsync(s->dir_fd) != 0))
		rc = disk_error(err, "rename", s->file->path);
	return rc;
}

MillmSink *
millm_store_sink(MillmStore *s)
{
	s->sink = (MillmSink) {s, sink_begin, sink_replay, sink_write, sink_discard, sink_finish, sink_abandon};
	return &s->sink;
}

/* --- Small files, removal ----------------------------------------------------------------------------- */

MillmCode
millm_store_put(MillmStore *s, const char *name, const char *text, size_t len, MillmError *err)
{
	MillmHubFile file = {.size = (int64_t) len};
	int64_t		have;
	MillmCode	rc;

	snprintf(file.path, sizeof(file.path), "%s", name);
	(void) millm_store_sink(s);
	if ((rc = sink_begin(s, &file, &have, err)) == MILLM_OK && (rc = sink_discard(s, err)) == MILLM_OK && (rc = sink_write(s, text, len, err)) == MILLM_OK)
		rc = sink_finish(s, err);
	if (rc != MILLM_OK)
		sink_abandon(s);
	s->file = NULL;
	return rc;
}

void
millm_store_remove(MillmStore *s, const MillmHubFile *const *files, size_t n)
{
	char		partial[400];

	for (size_t i = 0; i < n; i++)
	{
		partial_name(files[i], partial);
		unlinkat(s->dir_fd, partial, 0);
		unlinkat(s->dir_fd, files[i]->path, 0);
	}
	unlinkat(s->dir_fd, MILLM_META_NAME, 0);
	unlinkat(s->dir_fd, ".partial-unknown-" MILLM_META_NAME, 0);
	(void) rmdir(s->path);		/* stays when somebody put something else there */
}

/* Unlink a tree below a descriptor, never through a link.  Consumes fd. */
static void
unlink_tree(int fd, int depth)
{
	DIR		   *dir = fdopendir(fd);
	struct dirent *e;

	if (!dir)
	{
		close(fd);
		return;
	}
	while (depth < MAX_DEPTH && (e = readdir(dir)))
	{
		int			sub;

		if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
			continue;
		if (unlinkat(dirfd(dir), e->d_name, 0) == 0)
			continue;
		sub = openat(dirfd(dir), e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (sub >= 0)
			unlink_tree(sub, depth + 1);
		unlinkat(dirfd(dir), e->d_name, AT_REMOVEDIR);
	}
	closedir(dir);
}

/* Does the directory's meta file name that uuid? */
static bool
meta_has_uuid(int dir_fd, const char *uuid)
{
	int			fd = openat(dir_fd, MILLM_META_NAME, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	FILE	   *f = fd >= 0 ? fdopen(fd, "r") : NULL;
	json_t	   *meta;
	const char *have;
	bool		same;

	if (!f)
	{
		if (fd >= 0)
			close(fd);
		return false;
	}
	meta = json_loadf(f, 0, NULL);
	fclose(f);
	have = json_string_value(json_object_get(meta, "uuid"));
	same = have && strcmp(have, uuid) == 0;
	json_decref(meta);
	return same;
}

MillmCode
millm_store_trash(const char *cache_dir, const char *directory, const char *uuid, bool *removed, MillmError *err)
{
	const char *slash = strrchr(directory, '/');
	char		parent[512];
	int			dir, parent_fd, trash_fd;
	MillmCode	rc = MILLM_OK;

	*removed = false;
	if (!slash || strlen(directory) >= sizeof(parent) || strspn(uuid, "0123456789abcdef-") != strlen(uuid) || strlen(uuid) != 36)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid directory or uuid to remove");
	snprintf(parent, sizeof(parent), "%.*s", (int) (slash - directory), directory);
	parent_fd = open_below(cache_dir, parent, false);
	trash_fd = open_below(cache_dir, ".trash", true);
	if (parent_fd < 0 || trash_fd < 0)
	{
		if (errno != ENOENT)
			rc = disk_error(err, "open", directory);
		goto done;
	}
	dir = openat(parent_fd, slash + 1, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (dir >= 0)
	{
		bool		ours = meta_has_uuid(dir, uuid);

		close(dir);
		if (!ours)
			goto done;
		if (renameat(parent_fd, slash + 1, trash_fd, uuid) != 0 || fsync(parent_fd) != 0)
		{
			rc = disk_error(err, "remove", directory);
			goto done;
		}
		*removed = true;
	}
	/* also what an earlier attempt had only renamed */
	dir = openat(trash_fd, uuid, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (dir >= 0)
	{
		unlink_tree(dir, 0);
		if (unlinkat(trash_fd, uuid, AT_REMOVEDIR) != 0)
			rc = disk_error(err, "remove", directory);
		*removed = true;
	}
done:
	if (parent_fd >= 0)
		close(parent_fd);
	if (trash_fd >= 0)
		close(trash_fd);
	return rc;
}
