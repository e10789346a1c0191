/*
 * head_copy.c -- see head_copy.h.
 *
 * Owns: the file in work, ".partial-" until it is whole and on the disk; its encoder and buffer.
 */
#include "head_copy.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arch.h"
#include "screen.h"
#include "screening.h"

#define PARTIAL_FILE	".partial-" MILLM_SCREEN_FILE
#define PIECE_BYTES		((size_t) 1 << 20)	/* of a head that lies there */

struct MillmHeadCopy
{
	MillmStore *store;
	MillmScreenEncoder *encoder;
	FILE	   *file;
	int8_t	   *codes;			/* [codes_size] */
	size_t		codes_size;
};

/* Is it the weight of prefix + module? */
static bool
is_weight_of(const char *name, const char *prefix, const char *module)
{
	const size_t n = strlen(prefix), m = strlen(module);

	return strncmp(name, prefix, n) == 0 && strncmp(name + n, module, m) == 0 && strcmp(name + n + m, ".weight") == 0;
}

bool
millm_head_copy_is_of(const MillmConfig *config, const char *name)
{
	const MillmArch *arch = config->arch;

	if (!millm_config_can_screen(config))
		return false;
	if (!config->tied)
		return is_weight_of(name, "", arch->head);
	return is_weight_of(name, arch->prefix, arch->embedding) || (arch->other_prefix && is_weight_of(name, arch->other_prefix, arch->embedding));
}

static MillmCode
put(MillmHeadCopy *c, const void *data, size_t n, MillmError *err)
{
	return fwrite(data, 1, n, c->file) == n ? MILLM_OK : millm_store_error(err, "write", MILLM_SCREEN_FILE);
}

MillmCode
millm_head_copy_begin(MillmStore *store, MillmDtype dtype, int64_t n_rows, int64_t n_in, MillmHeadCopy **out, MillmError *err)
{
	MillmHeadCopy *c = calloc(1, sizeof(*c));
	const void *header;
	size_t		n;
	int			fd;
	MillmCode	rc;

	if (!c)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	c->store = store;
	fd = openat(millm_store_dir(store), PARTIAL_FILE, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0 || !(c->file = fdopen(fd, "wb")))
	{
		rc = millm_store_error(err, "create", MILLM_SCREEN_FILE);
		if (fd >= 0)
			close(fd);
	}
	else if ((rc = millm_screen_begin(dtype, n_rows, n_in, &c->encoder, err)) == MILLM_OK)
	{
		header = millm_screen_header(c->encoder, &n);
		rc = put(c, header, n, err);
	}
	if (rc == MILLM_OK)
		*out = c;
	else
		millm_head_copy_free(c);
	return rc;
}

MillmCode
millm_head_copy_push(MillmHeadCopy *c, const void *bytes, size_t n, MillmError *err)
{
	const size_t n_codes = millm_screen_push_writes(c->encoder, n);
	MillmCode	rc;

	if (n_codes > c->codes_size)
	{
		int8_t	   *grown = realloc(c->codes, n_codes);

		if (!grown)
			return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		c->codes = grown;
		c->codes_size = n_codes;
	}
	if ((rc = millm_screen_push(c->encoder, bytes, n, c->codes, err)) != MILLM_OK || n_codes == 0 || (rc = put(c, c->codes, n_codes, err)) != MILLM_OK)
		return rc;
	/* the disk works along, so that end has little left to wait for */
	(void) sync_file_range(fileno(c->file), 0, 0, SYNC_FILE_RANGE_WRITE);
	return MILLM_OK;
}

MillmCode
millm_head_copy_end(MillmHeadCopy *c, MillmError *err)
{
	const int	dir = millm_store_dir(c->store);
	const void *tail;
	size_t		n;
	MillmCode	rc;

	if ((rc = millm_screen_finish(c->encoder, &tail, &n, err)) != MILLM_OK || (rc = put(c, tail, n, err)) != MILLM_OK)
		return rc;
	if (fflush(c->file) != 0 || fsync(fileno(c->file)) != 0 || renameat(dir, PARTIAL_FILE, dir, MILLM_SCREEN_FILE) != 0 || fsync(dir) != 0)
		return millm_store_error(err, "write", MILLM_SCREEN_FILE);
	return MILLM_OK;
}

void
millm_head_copy_free(MillmHeadCopy *c)
{
	if (!c)
		return;
	if (c->file)
		fclose(c->file);
	/* of a whole one it is not the name any more */
	(void) unlinkat(millm_store_dir(c->store), PARTIAL_FILE, 0);
	millm_screen_free(c->encoder);
	free(c->codes);
	free(c);
}

MillmCode
millm_head_copy_make(MillmStore *store, const MillmModel *model, atomic_bool *stop, MillmError *err)
{
	const MillmWeight *head = &model->head;
	const char *bytes = head->data;
	MillmHeadCopy *copy;
	MillmCode	rc;

	if (model->screen.codes.data || !millm_screening_is_possible(model))
		return MILLM_OK;
	if ((rc = millm_head_copy_begin(store, head->dtype, head->n_out, head->n_in, &copy, err)) != MILLM_OK)
		return rc;
	for (size_t left = (size_t) millm_weight_bytes(head->dtype, head->n_out * head->n_in), n; left > 0 && rc == MILLM_OK; bytes += n, left -= n)
	{
		n = left < PIECE_BYTES ? left : PIECE_BYTES;
		rc = atomic_load(stop) ? millm_fail(err, MILLM_E_CANCELED, "the download was canceled") : millm_head_copy_push(copy, bytes, n, err);
	}
	if (rc == MILLM_OK)
		rc = millm_head_copy_end(copy, err);
	millm_head_copy_free(copy);
	return rc;
}
