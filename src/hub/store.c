/*
 * store.c -- see store.h.  All paths are relative to directory descriptors that were opened without following links.
 */
#include "store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "serve.h"

/* Where directories go to be removed, in the cache directory. */
#define TRASH_NAME ".trash"
#define MAX_DEPTH		16
#define MAX_META_BYTES	(16 << 20)
#define UUID_CHARS		36
#define OWNER_NAME		".partial-owner"	/* in an unfinished directory: {"uuid": ...} */

struct MillmStore
{
	char	   *path;
	int			dir_fd;
	bool		is_finished;	/* an earlier attempt wrote the meta file */
	bool		is_ours;		/* made for this model: nobody else's files are in it */
	MillmSink	sink;
	/* the file in work */
	const MillmHubFile *file;
	char		partial[MILLM_STORE_MAX_NAME];
	int			fd;
};

MillmCode
millm_store_error(MillmError *err, const char *doing, const char *name)
{
	int			e = errno;
	MillmCode	code = e == ENOSPC || e == EDQUOT ? MILLM_E_INSUFFICIENT_DISK : MILLM_E_MODEL_DOWNLOAD_FAILED;

	millm_fail(err, code, "could not %s \"%s\" in the model cache: %s", doing, name, strerror(e));
	millm_hint(err, code == MILLM_E_INSUFFICIENT_DISK ? "Free space or point millm.cache_dir at a larger file system." : "Check the rights on millm.cache_dir.");
	return code;
}

/*
 * "huggingface/owner--name--FP16": parts that are visible names, so that no path leads out of the cache.
 */
static MillmCode
check_directory(const char *directory, MillmError *err)
{
	for (const char *p = directory;; p++)
	{
		size_t		n = strcspn(p, "/");

		if (n == 0 || n > 255 || p[0] == '.')
			return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid directory \"%.200s\" of the model cache", directory);
		p += n;
		if (*p == '\0')
			return MILLM_OK;
	}
}

/* Open a relative path step by step below cache_dir, creating what is missing.  -1 with errno. */
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

/* One of our JSON files of a directory; NULL when there is no such file. */
static json_t *
read_json(int dir_fd, const char *name)
{
	int			fd = openat(dir_fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	struct stat st;
	json_t	   *json = NULL;

	if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size <= MAX_META_BYTES)
		json = json_loadfd(fd, 0, NULL);
	if (fd >= 0)
		close(fd);
	return json;
}

/* The uuid in such a file; false when there is none. */
static bool
read_uuid(int dir_fd, const char *name, char uuid[UUID_CHARS + 1])
{
	json_t	   *meta = read_json(dir_fd, name);
	const char *text = json_string_value(json_object_get(meta, "uuid"));
	const bool	good = text && strlen(text) == UUID_CHARS;
	if (good)
		memcpy(uuid, text, UUID_CHARS + 1);
	json_decref(meta);
	return good;
}

static bool
has_uuid(int dir_fd, const char *name, const char *uuid)
{
	char		have[UUID_CHARS + 1];

	return read_uuid(dir_fd, name, have) && strcmp(have, uuid) == 0;
}

static MillmCode
check_uuid(const char *uuid, MillmError *err)
{
	if (strlen(uuid) == UUID_CHARS && strspn(uuid, "0123456789abcdef-") == UUID_CHARS)
		return MILLM_OK;
	return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid uuid \"%.60s\"", uuid);
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

int
millm_store_dir(const MillmStore *s)
{
	return s->dir_fd;
}

MillmCode
millm_store_free_bytes(const MillmStore *s, int64_t *out, MillmError *err)
{
	struct statvfs v;

	if (fstatvfs(s->dir_fd, &v) != 0)
		return millm_store_error(err, "look at", s->path);
	*out = (int64_t) v.f_bavail * (int64_t) v.f_frsize;
	return MILLM_OK;
}

/* Partial files lie in the model's directory, that of a module's too. */
void
millm_store_partial_name(const MillmHubFile *file, char buf[MILLM_STORE_MAX_NAME])
{
	snprintf(buf, MILLM_STORE_MAX_NAME, ".partial-%.16s-%s", file->hash[0] ? file->hash : "unknown", file->path);
	for (char *p = strchr(buf, '/'); p; p = strchr(p, '/'))
		*p = '-';
}

/* The directory of a file's path ("1_Pooling/config.json"), in part; false: it lies in the model's own. */
static bool
directory_of(const char *path, char part[MILLM_STORE_MAX_NAME])
{
	const char *slash = strrchr(path, '/');

	snprintf(part, MILLM_STORE_MAX_NAME, "%.*s", slash ? (int) (slash - path) : 0, path);
	return slash;
}

/* The proved partial file gets its name, and whatever happens then keeps it. */
static bool
give_name(const MillmStore *s, const char *partial, const char *path)
{
	char		part[MILLM_STORE_MAX_NAME];
	int			fd;
	bool		good;

	if (!directory_of(path, part))
		return renameat(s->dir_fd, partial, s->dir_fd, path) == 0 && fsync(s->dir_fd) == 0;
	if ((mkdirat(s->dir_fd, part, 0700) != 0 && errno != EEXIST) ||
		(fd = openat(s->dir_fd, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0)
		return false;
	good = renameat(s->dir_fd, partial, fd, path + strlen(part) + 1) == 0 && fsync(fd) == 0 && fsync(s->dir_fd) == 0;
	close(fd);
	return good;
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
	char		partial[MILLM_STORE_MAX_NAME];
	int64_t		n = size_of(s, file->path);

	millm_store_partial_name(file, partial);
	if (n != file->size)
		n = size_of(s, partial);
	return n < 0 ? 0 : n > file->size ? file->size : n;
}

/* Hash fd from its start until its end, or the end of size bytes; returns how many. */
static int64_t
hash_file(int fd, int64_t size, MillmHash *hash, atomic_bool *stop)
{
	unsigned char *buf = malloc(1 << 20);
	int64_t		at = 0;
	ssize_t		n;

	while (buf && at < size && !atomic_load(stop) && (n = pread(fd, buf, size - at < 1 << 20 ? (size_t) (size - at) : 1 << 20, at)) > 0)
	{
		millm_hash_update(hash, buf, (size_t) n);
		at += n;
	}
	free(buf);
	return at;
}

bool
millm_store_hash(int fd, const MillmHubFile *file, atomic_bool *stop, char hex[MILLM_HASH_HEX])
{
	MillmHash	hash;

	millm_hash_begin(&hash, file->hash, file->size);
	if (hash_file(fd, file->size, &hash, stop) != file->size)
		return false;
	millm_hash_hex(&hash, hex);
	return true;
}

bool
millm_store_is_proved(const MillmStore *s, const MillmHubFile *file, atomic_bool *stop)
{
	char		hex[MILLM_HASH_HEX];
	bool		good;
	int			fd;

	if (!file->hash[0] || size_of(s, file->path) != file->size || (fd = openat(s->dir_fd, file->path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC)) < 0)
		return false;
	good = millm_store_hash(fd, file, stop, hex) && strcmp(hex, file->hash) == 0;
	close(fd);
	return good;
}

/* --- The plain sink ------------------------------------------------------------------------------- */

static MillmCode
open_partial(MillmStore *s, const MillmHubFile *file, int64_t *size, MillmError *err)
{
	struct stat sb;

	s->file = file;
	millm_store_partial_name(file, s->partial);
	s->fd = openat(s->dir_fd, s->partial, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (s->fd < 0 || fstat(s->fd, &sb) != 0)
		return millm_store_error(err, "create", file->path);
	*size = sb.st_size;
	return MILLM_OK;
}

static MillmCode
sink_discard(void *arg, MillmError *err)
{
	MillmStore *s = arg;

	if (ftruncate(s->fd, 0) != 0 || lseek(s->fd, 0, SEEK_SET) < 0)
		return millm_store_error(err, "truncate", s->file->path);
	return MILLM_OK;
}

static MillmCode
sink_begin(void *arg, const MillmHubFile *file, MillmHash *hash, int64_t *have, atomic_bool *stop, MillmError *err)
{
	MillmStore *s = arg;
	int64_t		kept;
	MillmCode	rc = open_partial(s, file, &kept, err);

	*have = 0;
	if (rc != MILLM_OK || kept == 0)
		return rc;
	if (kept > file->size)		/* not of this file */
		return sink_discard(s, err);
	*have = hash_file(s->fd, kept, hash, stop);
	if (atomic_load(stop))
		return millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
	return lseek(s->fd, *have, SEEK_SET) < 0 ? millm_store_error(err, "read", file->path) : MILLM_OK;
}

static int64_t
sink_until_checkpoint(void *arg)
{
	(void) arg;
	return INT64_MAX;
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
			return millm_store_error(err, "write", s->file->path);
		p += n;
		len -= (size_t) n;
	}
	return MILLM_OK;
}

static MillmCode
sink_checkpoint(void *arg, const MillmHash *hash, MillmError *err)
{
	MillmStore *s = arg;

	(void) hash;				/* the bytes are there: they can be hashed again */
	return fdatasync(s->fd) != 0 ? millm_store_error(err, "sync", s->file->path) : MILLM_OK;
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
		rc = millm_store_error(err, "sync", s->file->path);
	sink_abandon(s);
	if (rc == MILLM_OK && !give_name(s, s->partial, s->file->path))
		rc = millm_store_error(err, "rename", s->file->path);
	return rc;
}

bool
millm_store_link(MillmStore *s, int fd, const MillmHubFile *file)
{
	char		partial[MILLM_STORE_MAX_NAME], self[64];
	struct stat sb;

	/* somebody else's file could become another one under our name */
	if (fstat(fd, &sb) != 0 || sb.st_uid != geteuid() || (sb.st_mode & (S_IWGRP | S_IWOTH)))
		return false;
	millm_store_partial_name(file, partial);
	snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
	(void) unlinkat(s->dir_fd, partial, 0);
	/* the very file whose content was proved, whatever its name means by now */
	if (linkat(AT_FDCWD, self, s->dir_fd, partial, AT_SYMLINK_FOLLOW) != 0)
		return false;
	return fsync(fd) == 0 && give_name(s, partial, file->path);
}

MillmSink *
millm_store_sink(MillmStore *s)
{
	s->sink = (MillmSink) {s, sink_begin, sink_write, sink_until_checkpoint, sink_checkpoint, sink_discard, sink_finish, sink_abandon};
	return &s->sink;
}

/* --- A directory from its first file to its meta file ----------------------------------------------------- */

/* A small file of our own, atomically. */
MillmCode
millm_store_put(MillmStore *s, const char *name, const void *text, size_t len, MillmError *err)
{
	MillmHubFile file = {.size = (int64_t) len};
	int64_t		have;
	MillmCode	rc;

	snprintf(file.path, sizeof(file.path), "%s", name);
	if ((rc = open_partial(s, &file, &have, err)) == MILLM_OK && (rc = sink_discard(s, err)) == MILLM_OK && (rc = sink_write(s, text, len, err)) == MILLM_OK)
		rc = sink_finish(s, err);
	if (rc != MILLM_OK)
		sink_abandon(s);
	s->file = NULL;
	return rc;
}

/*
 * The model of this finished directory is another one.  Is that gone?  In a registry no two have one directory, and a cluster has one registry,
 * so there it is; of what other servers know we know nothing.
 */
static bool
is_left_behind(const MillmStore *s, const char *owner_id, const char *cluster)
{
	json_t	   *meta = read_json(s->dir_fd, MILLM_META_NAME);
	const char *had_owner = json_string_value(json_object_get(meta, "owner_id")), *had_cluster = json_string_value(json_object_get(meta, "cluster"));
	const bool	gone = (had_owner && (strcmp(had_owner, MILLM_NOBODY) == 0 || (owner_id && owner_id[0] && strcmp(had_owner, owner_id) == 0))) ||
		(had_cluster && cluster && cluster[0] && strcmp(had_cluster, cluster) == 0);

	json_decref(meta);
	return gone;
}

/* Whose directory is it?  Makes it ours when it is nobody's. */
static MillmCode
take_possession(MillmStore *s, const char *uuid, const char *owner_id, const char *cluster, bool is_new, MillmError *err)
{
	char		owner[UUID_CHARS + 1], text[64];

	if (read_uuid(s->dir_fd, MILLM_META_NAME, owner))
	{
		const bool	is_heir = strcmp(owner, uuid) != 0 && is_left_behind(s, owner_id, cluster);

		if (strcmp(owner, uuid) == 0 || is_heir)
		{
			if (is_heir)
				millm_log("LOG", "\"%s\" was left behind by the model %s: what is intact in it is used", s->path, owner);
			s->is_finished = true;
			return MILLM_OK;
		}
		millm_fail(err, MILLM_E_MODEL_ALREADY_EXISTS, "\"%s\" holds another model", s->path);
		millm_detail(err, "It belongs to the model %s.", owner);
		millm_hint(err, "Move it away, or give this server a cache of its own with millm.cache_dir.");
		return MILLM_E_MODEL_ALREADY_EXISTS;
	}
	s->is_ours = is_new || read_uuid(s->dir_fd, OWNER_NAME, owner);
	if (!s->is_ours)
		return MILLM_OK;
	snprintf(text, sizeof(text), "{\"uuid\": \"%s\"}\n", uuid);
	return millm_store_put(s, OWNER_NAME, text, strlen(text), err);
}

MillmCode
millm_store_open(const char *cache_dir, const char *directory, const char *uuid, const char *owner_id, const char *cluster, MillmStore **out,
				 MillmError *err)
{
	MillmStore *s;
	MillmCode	rc;
	int			before;

	if ((rc = check_uuid(uuid, err)) != MILLM_OK || (rc = check_directory(directory, err)) != MILLM_OK)
		return rc;
	s = calloc(1, sizeof(*s));
	if (!s || asprintf(&s->path, "%s/%s", cache_dir, directory) < 0)
	{
		free(s);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	s->fd = -1;
	before = open_below(cache_dir, directory, false);
	s->dir_fd = before >= 0 ? before : open_below(cache_dir, directory, true);
	rc = s->dir_fd < 0 ? millm_store_error(err, "open", s->path) : take_possession(s, uuid, owner_id, cluster, before < 0, err);
	if (rc == MILLM_OK)
		*out = s;
	else
		millm_store_close(s);
	return rc;
}

MillmCode
millm_store_complete(MillmStore *s, const char *meta, size_t len, MillmError *err)
{
	MillmCode	rc = millm_store_put(s, MILLM_META_NAME, meta, len, err);

	if (rc == MILLM_OK)
	{
		s->is_finished = true;
		(void) unlinkat(s->dir_fd, OWNER_NAME, 0);	/* the meta file counts from now on */
	}
	return rc;
}

/* --- Removal --------------------------------------------------------------------------------------------- */

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

void
millm_store_remove(MillmStore *s, const MillmHubFile *const *files, size_t n)
{
	static const char *const suffixes[] = {"", ".head", ".state"};	/* of recast.c's */
	char		partial[MILLM_STORE_MAX_NAME], name[MILLM_STORE_MAX_NAME + 8];
	int			fd;

	if (s->is_ours && !s->is_finished && (fd = openat(s->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) >= 0)
		unlink_tree(fd, 0);
	for (size_t i = 0; i < n; i++)
	{
		millm_store_partial_name(files[i], partial);
		for (size_t k = 0; k < sizeof(suffixes) / sizeof(suffixes[0]); k++)
		{
			snprintf(name, sizeof(name), "%s%s", partial, suffixes[k]);
			unlinkat(s->dir_fd, name, 0);
		}
		if (s->is_finished)
			continue;
		unlinkat(s->dir_fd, files[i]->path, 0);
		if (directory_of(files[i]->path, name))
			unlinkat(s->dir_fd, name, AT_REMOVEDIR);	/* stays while something is in it */
	}
	if (!s->is_finished)
		(void) rmdir(s->path);		/* stays when somebody put something else there */
}

void
millm_store_remove_unfinished(const char *cache_dir, const char *directory, const char *uuid)
{
	MillmStore	s = {.fd = -1, .is_ours = true};
	char		path[4096];

	s.path = path;
	if (check_directory(directory, NULL) != MILLM_OK || (size_t) snprintf(path, sizeof(path), "%s/%s", cache_dir, directory) >= sizeof(path) || (s.dir_fd = open_below(cache_dir, directory, false)) < 0)
		return;
	if (has_uuid(s.dir_fd, OWNER_NAME, uuid) && !has_uuid(s.dir_fd, MILLM_META_NAME, uuid))
		millm_store_remove(&s, NULL, 0);
	close(s.dir_fd);
}

/* Remove a directory below fd with all that is in it; that it is not there is as good. */
static MillmCode
remove_tree(int fd, const char *name, MillmError *err)
{
	int			dir = openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (dir >= 0)
		unlink_tree(dir, 0);
	return unlinkat(fd, name, AT_REMOVEDIR) != 0 && errno != ENOENT ? millm_store_error(err, "remove", name) : MILLM_OK;
}

/* The two directories are open. */
static MillmCode
move_to_trash(int parent_fd, const char *name, int trash_fd, const char *uuid, bool *removed, MillmError *err)
{
	int			dir = openat(parent_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	bool		is_it;
	MillmCode	rc;

	/* what an earlier attempt had only moved */
	if (faccessat(trash_fd, uuid, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
		*removed = true;
	if ((rc = remove_tree(trash_fd, uuid, err)) != MILLM_OK || dir < 0)
	{
		if (dir >= 0)
			close(dir);
		return rc;
	}
	is_it = has_uuid(dir, MILLM_META_NAME, uuid) || (has_uuid(dir, OWNER_NAME, uuid) && faccessat(dir, MILLM_META_NAME, F_OK, AT_SYMLINK_NOFOLLOW) != 0);
	close(dir);
	if (!is_it)
		return MILLM_OK;
	if (renameat(parent_fd, name, trash_fd, uuid) != 0 || fsync(parent_fd) != 0 || fsync(trash_fd) != 0)
		return millm_store_error(err, "remove", name);
	*removed = true;
	return remove_tree(trash_fd, uuid, err);
}

MillmCode
millm_store_trash(const char *cache_dir, const char *directory, const char *uuid, bool *removed, MillmError *err)
{
	const char *slash = strrchr(directory, '/'), *name = slash ? slash + 1 : directory;
	char		parent[512];
	int			parent_fd, trash_fd;
	MillmCode	rc;

	*removed = false;
	if ((rc = check_uuid(uuid, err)) != MILLM_OK || (rc = check_directory(directory, err)) != MILLM_OK)
		return rc;
	if (strlen(directory) >= sizeof(parent))
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the directory's name is too long");
	snprintf(parent, sizeof(parent), "%.*s", slash ? (int) (slash - directory) : 0, directory);
	if ((parent_fd = open_below(cache_dir, parent, false)) < 0)
		return errno == ENOENT ? MILLM_OK : millm_store_error(err, "open", parent);
	trash_fd = open_below(cache_dir, TRASH_NAME, true);
	rc = trash_fd < 0 ? millm_store_error(err, "open", TRASH_NAME) : move_to_trash(parent_fd, name, trash_fd, uuid, removed, err);
	close(parent_fd);
	if (trash_fd >= 0)
		close(trash_fd);
	return rc;
}
