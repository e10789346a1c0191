/*
 * safetensors.c -- map a file of tensors and believe none of it before it is checked.
 *
 * Owns the mapping and the index.  Knows nothing about models.
 */
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arith.h"
#include "shown.h"

struct MillmSafetensors
{
	char	   *path;
	const unsigned char *bytes;
	size_t		len;			/* of the file */
	size_t		present;		/* of its bytes, at bytes: all, or those up to the end of the header */
	bool		mapped;
	json_t	   *header;			/* owns the names */
	MillmStTensor *tensors;		/* in order of their data */
	size_t		n_tensors;
};

static const struct
{
	const char *name;
	int			bytes;
}			dtypes[MILLM_N_DTYPES] = {	/* 4BIT and INT8 are made of several tensors: no dtype of a file */
	[MILLM_F32] = {"F32", 4}, [MILLM_F16] = {"F16", 2}, [MILLM_BF16] = {"BF16", 2}, [MILLM_I8] = {"I8", 1},
	[MILLM_U8] = {"U8", 1}, [MILLM_I16] = {"I16", 2}, [MILLM_I32] = {"I32", 4}, [MILLM_I64] = {"I64", 8},
	[MILLM_F64] = {"F64", 8}, [MILLM_BOOL] = {"BOOL", 1},
};

int
millm_dtype_bytes(MillmDtype dtype)
{
	return dtypes[dtype].bytes;
}

const char *
millm_dtype_name(MillmDtype dtype)
{
	return dtypes[dtype].name;
}

static MillmCode
damaged(const MillmSafetensors *st, MillmError *err)
{
	return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid safetensors file \"%s\"", st->path);
}

/* A JSON array of two non-negative integers. */
static bool
get_offsets(json_t *v, uint64_t *begin, uint64_t *end)
{
	json_t	   *a = json_array_get(v, 0), *b = json_array_get(v, 1);

	if (json_array_size(v) != 2 || !json_is_integer(a) || !json_is_integer(b) ||
		json_integer_value(a) < 0 || json_integer_value(b) < json_integer_value(a))
		return false;
	*begin = (uint64_t) json_integer_value(a);
	*end = (uint64_t) json_integer_value(b);
	return true;
}

static MillmCode
read_tensor(MillmSafetensors *st, const char *name, json_t *entry, uint64_t data_bytes, MillmStTensor *t, MillmError *err)
{
	const char *dtype = json_string_value(json_object_get(entry, "dtype"));
	json_t	   *shape = json_object_get(entry, "shape");
	uint64_t	n = 1, end = 0;
	size_t		i;
	int			d;

	t->name = name;
	if (!dtype || !json_is_array(shape) || !get_offsets(json_object_get(entry, "data_offsets"), &t->begin, &end))
	{
		damaged(st, err);
		millm_detail(err, "Tensor \"%s\" lacks a valid dtype, shape or data_offsets.", shown(name).text);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	for (d = 0; d < MILLM_N_DTYPES && (!dtypes[d].name || strcmp(dtypes[d].name, dtype) != 0); d++)
		;
	if (d == MILLM_N_DTYPES)
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "dtype \"%s\" of tensor \"%s\" is not supported", shown(dtype).text, shown(name).text);
		millm_detail(err, "It is in the file \"%s\".", st->path);
		return MILLM_E_UNSUPPORTED;
	}
	t->dtype = (MillmDtype) d;
	if (json_array_size(shape) > MILLM_ST_MAX_DIMS)
	{
		damaged(st, err);
		millm_detail(err, "Tensor \"%s\" has %zu dimensions; at most %d are possible.", shown(name).text, json_array_size(shape), MILLM_ST_MAX_DIMS);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	t->n_dims = (int) json_array_size(shape);
	for (i = 0; i < (size_t) t->n_dims; i++)
	{
		json_t	   *dim = json_array_get(shape, i);

		if (!json_is_integer(dim) || json_integer_value(dim) < 0 || !millm_mul_u64(n, (uint64_t) json_integer_value(dim), &n))
		{
			damaged(st, err);
			millm_detail(err, "Tensor \"%s\" has an impossible shape: dimension %zu is %s.", shown(name).text, i,
						 json_is_integer(dim) ? "negative, or makes more elements than 64 bits count" : "not an integer");
			return MILLM_E_INVALID_MODEL_FILE;
		}
		t->dims[i] = json_integer_value(dim);
	}
	if (!millm_mul_u64(n, (uint64_t) dtypes[d].bytes, &n) || n != end - t->begin || end > data_bytes)
	{
		damaged(st, err);
		millm_detail(err, "Tensor \"%s\" claims bytes %llu to %llu for %llu bytes of elements; the file has %llu bytes of data.", shown(name).text,
					 (unsigned long long) t->begin, (unsigned long long) end, (unsigned long long) n, (unsigned long long) data_bytes);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	t->bytes = n;
	t->data = st->present == st->len ? st->bytes + (st->len - data_bytes) + t->begin : NULL;
	return MILLM_OK;
}

static int
by_begin(const void *a, const void *b)
{
	const MillmStTensor *x = a, *y = b;

	if (x->begin != y->begin)
		return x->begin < y->begin ? -1 : 1;
	return (x->bytes > y->bytes) - (x->bytes < y->bytes);	/* empty tensors first */
}

/* Put the tensors in order; every byte of the data belongs to exactly one of them. */
static MillmCode
check_coverage(MillmSafetensors *st, uint64_t data_bytes, MillmError *err)
{
	uint64_t	at = 0;

	qsort(st->tensors, st->n_tensors, sizeof(MillmStTensor), by_begin);
	for (size_t i = 0; i < st->n_tensors; i++)
	{
		const MillmStTensor *t = &st->tensors[i];

		if (t->begin != at)
		{
			damaged(st, err);
			millm_detail(err, "Tensor \"%s\" begins at byte %llu of the data where byte %llu is expected: a hole or an overlap.",
						 shown(t->name).text, (unsigned long long) t->begin, (unsigned long long) at);
			return MILLM_E_INVALID_MODEL_FILE;
		}
		at += t->bytes;
	}
	if (at != data_bytes)
	{
		damaged(st, err);
		millm_detail(err, "The header describes %llu bytes of data; the file has %llu.", (unsigned long long) at, (unsigned long long) data_bytes);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	return MILLM_OK;
}

static MillmCode
read_index(MillmSafetensors *st, MillmError *err)
{
	uint64_t	header_len, data_bytes;
	json_error_t jerr;
	const char *name;
	json_t	   *entry;
	MillmCode	rc;

	if (st->len < 8 || st->present < 8)
	{
		damaged(st, err);
		millm_detail(err, "It has %zu bytes, fewer than the length of a header takes.", st->len);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	header_len = millm_get_le64(st->bytes);
	if (header_len > MILLM_ST_HEADER_MAX || header_len > st->len - 8)
	{
		damaged(st, err);
		millm_detail(err, "The header claims %llu bytes; %zu follow, and at most %llu are read.", (unsigned long long) header_len,
					 st->len - 8, (unsigned long long) MILLM_ST_HEADER_MAX);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (st->present < st->len && st->present != 8 + header_len)
		return millm_fail(err, MILLM_E_INTERNAL, "the head of \"%s\" is not its header", st->path);
	data_bytes = st->len - 8 - header_len;
	st->header = json_loadb((const char *) st->bytes + 8, (size_t) header_len, JSON_REJECT_DUPLICATES, &jerr);
	if (!json_is_object(st->header))
	{
		damaged(st, err);
		millm_detail(err, "Its header is not a JSON object: %s.", st->header ? "it is another value" : jerr.text);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	st->tensors = calloc(json_object_size(st->header) + 1, sizeof(MillmStTensor));
	if (!st->tensors)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	json_object_foreach(st->header, name, entry)
	{
		if (strcmp(name, "__metadata__") == 0)
			continue;
		if ((rc = read_tensor(st, name, entry, data_bytes, &st->tensors[st->n_tensors], err)) != MILLM_OK)
			return rc;
		st->n_tensors++;
	}
	return check_coverage(st, data_bytes, err);
}

static MillmCode
parse(const void *bytes, size_t present, size_t len, const char *name, MillmSafetensors **out, MillmError *err)
{
	MillmSafetensors *st = calloc(1, sizeof(*st));
	MillmCode	rc;

	if (!st || !(st->path = strdup(name)))
	{
		free(st);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	st->bytes = bytes;
	st->len = len;
	st->present = present;
	if ((rc = read_index(st, err)) == MILLM_OK)
		*out = st;
	else
		millm_st_close(st);
	return rc;
}

MillmCode
millm_st_parse(const void *bytes, size_t len, const char *name, MillmSafetensors **out, MillmError *err)
{
	return parse(bytes, len, len, name, out, err);
}

MillmCode
millm_st_parse_head(const void *head, size_t head_len, uint64_t file_len, const char *name, MillmSafetensors **out, MillmError *err)
{
	return parse(head, head_len, (size_t) file_len, name, out, err);
}

MillmCode
millm_st_open(const char *path, MillmSafetensors **out, MillmError *err)
{
	int			fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);	/* a FIFO must not hang us */
	struct stat sb;
	void	   *map = NULL;
	MillmCode	rc;

	if (fd < 0)
		return millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "could not open \"%s\": %s", path, strerror(errno));
	if (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode))
	{
		close(fd);
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" is not a regular file", path);
	}
	if (sb.st_size > 0)
		map = mmap(NULL, (size_t) sb.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
	{
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "could not map \"%s\": %s", path, strerror(errno));
		close(fd);
		return rc;
	}
	close(fd);
	/* what is read from disk from now on lies in the page cache in huge pages where the file system can: mapped at once, and fewer TLB misses */
	if (map)
		(void) madvise(map, (size_t) sb.st_size, MADV_HUGEPAGE);
	rc = millm_st_parse(map ? map : "", (size_t) sb.st_size, path, out, err);
	if (rc == MILLM_OK)
		(*out)->mapped = map != NULL;
	else if (map)
		munmap(map, (size_t) sb.st_size);
	return rc;
}

void
millm_st_close(MillmSafetensors *st)
{
	if (!st)
		return;
	if (st->mapped)
		munmap((void *) (uintptr_t) st->bytes, st->len);
	json_decref(st->header);
	free(st->tensors);
	free(st->path);
	free(st);
}

size_t
millm_st_n_tensors(const MillmSafetensors *st)
{
	return st->n_tensors;
}

const MillmStTensor *
millm_st_tensor(const MillmSafetensors *st, size_t i)
{
	return &st->tensors[i];
}

const char *
millm_st_metadata(const MillmSafetensors *st, const char *key)
{
	return json_string_value(json_object_get(json_object_get(st->header, "__metadata__"), key));
}

const char *
millm_st_path(const MillmSafetensors *st)
{
	return st->path;
}

const void *
millm_st_map(const MillmSafetensors *st, size_t *len)
{
	*len = st->len;
	return st->bytes;
}
