/*
 * checkpoint.h -- small checkpoints for the tests of src/model: a directory, files in it, safetensors made of a list.
 *
 * Everything here fails the running test when it cannot do its work.  Include after cmocka.h.
 */
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

typedef struct TestTensor
{
	const char *name;
	const char *dtype;			/* of the format */
	int			element_bytes;
	int64_t		dims[4];		/* the first 0 ends them */
	float		start;			/* element i is start + i, for F32, F16 and BF16 small enough to be exact */
} TestTensor;

/* A new directory, in dir. */
static inline void
make_dir(char dir[64])
{
	snprintf(dir, 64, "/tmp/millm_model.XXXXXX");
	if (!mkdtemp(dir))
		fail_msg("no temporary directory");
}

/* Remove dir and the files in it. */
static inline void
remove_dir(const char *dir)
{
	DIR		   *d = opendir(dir);
	struct dirent *e;
	char		path[512];

	while (d && (e = readdir(d)))
	{
		snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
		unlink(path);
	}
	if (d)
		closedir(d);
	rmdir(dir);
}

static inline void
write_file(const char *dir, const char *name, const void *bytes, size_t n)
{
	char		path[512];
	FILE	   *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	if (!(f = fopen(path, "w")) || fwrite(bytes, 1, n, f) != n || fclose(f) != 0)
		fail_msg("could not write %s", path);
}

static inline void
write_text(const char *dir, const char *name, const char *text)
{
	write_file(dir, name, text, strlen(text));
}

static inline void
remove_file(const char *dir, const char *name)
{
	char		path[512];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	assert_int_equal(unlink(path), 0);
}

/* A safetensors file of that header and so many bytes of data, all zero; the caller frees it. */
static inline unsigned char *
st_bytes(const char *header, size_t data_bytes, size_t *len)
{
	size_t		n = strlen(header);
	unsigned char *b = calloc(1, 8 + n + data_bytes);

	assert_non_null(b);
	for (int i = 0; i < 8; i++)
		b[i] = (unsigned char) (n >> 8 * i);
	memcpy(b + 8, header, n);
	*len = 8 + n + data_bytes;
	return b;
}

static inline void
put_element(unsigned char *to, const TestTensor *t, float value)
{
	uint32_t	bits;

	memcpy(&bits, &value, 4);
	if (strcmp(t->dtype, "F32") == 0)
		memcpy(to, &bits, 4);
	else if (strcmp(t->dtype, "BF16") == 0)
		memcpy(to, (unsigned char *) &bits + 2, 2);
	else if (strcmp(t->dtype, "F16") == 0)
	{
		/* exact for the small whole numbers that the tests use */
		uint16_t	half = value == 0 ? 0 : (uint16_t) ((bits >> 16 & 0x8000) | (((bits >> 23 & 0xFF) - 112) << 10) | (bits >> 13 & 0x3FF));

		memcpy(to, &half, 2);
	}
}

/*
 * Write dir/name with these tensors one after the other; pad spaces end the header, so that the data can lie odd.
 * Elements of tensor i are contents[i], all of them, instead where there is such a thing; without it, dtypes but floats are zeros.
 */
static inline void
write_st_of(const char *dir, const char *name, const TestTensor *tensors, const void *const *contents, size_t n, int pad)
{
	size_t		at = 0, size = 0, cap = 256 + n * 256 + (size_t) pad, len;
	char	   *header = malloc(cap);
	unsigned char *bytes, *data;

	assert_non_null(header);
	size += (size_t) snprintf(header, cap, "{\"__metadata__\": {\"format\": \"pt\"}");
	for (size_t i = 0; i < n; i++)
	{
		const TestTensor *t = &tensors[i];
		size_t		bytes_of = (size_t) t->element_bytes;

		size += (size_t) snprintf(header + size, cap - size, ", \"%s\": {\"dtype\": \"%s\", \"shape\": [", t->name, t->dtype);
		for (int d = 0; d < 4 && t->dims[d]; d++)
		{
			size += (size_t) snprintf(header + size, cap - size, "%s%lld", d ? ", " : "", (long long) t->dims[d]);
			bytes_of *= (size_t) t->dims[d];
		}
		size += (size_t) snprintf(header + size, cap - size, "], \"data_offsets\": [%zu, %zu]}", at, at + bytes_of);
		at += bytes_of;
	}
	size += (size_t) snprintf(header + size, cap - size, "}%*s", pad, "");
	assert_true(size < cap);
	bytes = st_bytes(header, at, &len);
	data = bytes + 8 + size;
	for (size_t i = 0; i < n; i++)
	{
		size_t		count = 1;

		for (int d = 0; d < 4 && tensors[i].dims[d]; d++)
			count *= (size_t) tensors[i].dims[d];
		for (size_t k = 0; k < count; k++, data += tensors[i].element_bytes)
			if (contents && contents[i])
				memcpy(data, (const char *) contents[i] + k * (size_t) tensors[i].element_bytes, (size_t) tensors[i].element_bytes);
			else
				put_element(data, &tensors[i], tensors[i].start + (float) k);
	}
	write_file(dir, name, bytes, len);
	free(bytes);
	free(header);
}

static inline void
write_st(const char *dir, const char *name, const TestTensor *tensors, size_t n, int pad)
{
	write_st_of(dir, name, tensors, NULL, n, pad);
}

/* The failure is this one: its code, and a text that its message or detail holds. */
static inline void
assert_failure(MillmCode rc, const MillmError *err, MillmCode code, const char *text)
{
	if (rc != code || err->code != code || (!strstr(err->message, text) && !strstr(err->detail, text)))
		fail_msg("expected %s with \"%s\", got %s: %s / %s", millm_code_name(code), text, millm_code_name(rc),
				 rc == MILLM_OK ? "" : err->message, rc == MILLM_OK ? "" : err->detail);
}

#endif
