/*
 * model.c -- open a model directory: find its files, map them, bind every tensor to its place.
 *
 * Binding is strict in both directions: each tensor that the family's row names must be there with the shape that
 * the config implies, and each tensor of the files must be used or be on the row's list of known buffers.  A wrong
 * flag (a bias that exists, a norm that does not) shows here, before it could change a number.
 *
 * Owns the mappings, the float32 copies of the vectors, the layers.  Matrices are views of the mapping.
 */
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arch.h"
#include "config.h"
#include "half.h"
#include "quant.h"
#include "safetensors.h"
#include "screen.h"
#include "screening.h"
#include "shown.h"

#define MAX_SHARDS 4096
#define MAX_INDEX_BYTES ((size_t) 32 << 20)	/* as a safetensors header */
#define MAX_PATH 4096
#define MAX_NAME 256				/* of a tensor that a row names; a file's other names have no limit */

typedef struct Entry
{
	const MillmStTensor *tensor;
	bool		used;
	int64_t		n_params;		/* weights that it holds, for the count; set when used */
} Entry;

/* The values that 8-bit absmax codes stand for, aligned; all weights of a file share one, unless a stranger wrote it. */
typedef struct NestedMap
{
	float		values[256];
	struct NestedMap *next;
} NestedMap;

struct MillmModelFiles
{
	MillmSafetensors **shards;
	int			n_shards;
	Entry	   *entries;		/* all tensors, by name */
	size_t		n_entries;
	NestedMap  *maps;
};

/* Names for an error: how many, the first one, and the first few, quoted. */
typedef struct Names
{
	size_t		n;
	MillmShown	first;
	size_t		len;
	char		text[440];
} Names;

/* What binding carries along. */
typedef struct Binder
{
	MillmModel *model;
	const MillmArch *arch;
	const char *prefix;			/* the row's, or "" */
	const Entry *tied_head;		/* a stored copy of the tied embedding, or NULL */
	Names		missing;		/* tensors that the row names and the files lack */
	MillmError *err;
} Binder;

/* --- Files ------------------------------------------------------------------------------------ */

static MillmCode
join(char path[MAX_PATH], const char *dir, const char *name, MillmError *err)
{
	if ((size_t) snprintf(path, MAX_PATH, "%s/%s", dir, name) >= MAX_PATH)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the path of \"%s\" is longer than %d bytes", shown(name).text, MAX_PATH - 1);
	return MILLM_OK;
}

MillmCode
millm_model_read_json(const char *dir, const char *name, size_t max_bytes, json_t **out, MillmError *err)
{
	char		path[MAX_PATH];
	struct stat sb;
	json_error_t jerr;
	FILE	   *f = NULL;
	char	   *text = NULL;
	size_t		len = 0;
	MillmCode	rc;
	int			fd;

	*out = NULL;
	if ((rc = join(path, dir, name, err)) != MILLM_OK)
		return rc;
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);	/* a FIFO must not hang us */
	if (fd < 0 && errno == ENOENT)
		return MILLM_OK;
	if (fd < 0)
		return millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "could not open \"%s\": %s", path, strerror(errno));
	if (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode) || !(f = fdopen(fd, "r")))
	{
		close(fd);
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" is not a regular file", path);
	}
	/* the size that stat tells may lie: one byte more than may be there is asked for */
	if (!(text = malloc(max_bytes + 1)))
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else if ((len = fread(text, 1, max_bytes + 1, f)), ferror(f))
		rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "could not read \"%s\": %s", path, strerror(errno));
	else if (len > max_bytes)
	{
		rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" is too large", path);
		millm_detail(err, "At most %zu bytes are read.", max_bytes);
	}
	else if (!(*out = json_loadb(text, len, 0, &jerr)))
	{
		rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" is not valid JSON", path);
		millm_detail(err, "Line %d: %s.", jerr.line, shown(jerr.text).text);
	}
	free(text);
	fclose(f);
	return rc;
}

static MillmCode
open_shard(struct MillmModelFiles *files, const char *dir, const char *name, MillmError *err)
{
	char		path[MAX_PATH];
	MillmCode	rc;

	if (name[0] == '\0' || name[0] == '.' || strchr(name, '/') || strchr(name, '\\'))
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid shard name \"%s\" in model.safetensors.index.json", shown(name).text);
		millm_detail(err, "A shard is a file of the same directory, and not a hidden one.");
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if ((rc = join(path, dir, name, err)) != MILLM_OK ||
		(rc = millm_st_open(path, &files->shards[files->n_shards], err)) != MILLM_OK)
		return rc;
	files->n_shards++;
	return MILLM_OK;
}

static int
by_string(const void *a, const void *b)
{
	return strcmp(*(const char *const *) a, *(const char *const *) b);
}

/* model.safetensors, else each distinct file of the index's weight_map. */
static MillmCode
open_shards(struct MillmModelFiles *files, const char *dir, MillmError *err)
{
	char		path[MAX_PATH];
	json_t	   *index = NULL, *map, *value;
	const char *key, **names = NULL;
	size_t		n = 0;
	MillmCode	rc;

	files->shards = calloc(MAX_SHARDS + 1, sizeof(*files->shards));	/* and the screening copy */
	if (!files->shards)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	if ((rc = join(path, dir, "model.safetensors", err)) != MILLM_OK)
		return rc;
	if (access(path, F_OK) == 0)
		return open_shard(files, dir, "model.safetensors", err);

	if ((rc = millm_model_read_json(dir, "model.safetensors.index.json", MAX_INDEX_BYTES, &index, err)) != MILLM_OK)
		return rc;
	if (!index)
	{
		millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "no weights in \"%s\"", dir);
		millm_detail(err, "There is neither model.safetensors nor model.safetensors.index.json.");
		millm_hint(err, "Weights in other formats (pytorch_model.bin, GGUF) are not read.");
		return MILLM_E_MODEL_FILES_MISSING;
	}
	map = json_object_get(index, "weight_map");
	if (json_object_size(map) == 0)
	{
		rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "model.safetensors.index.json has no weight_map");
		goto done;
	}
	if (!(names = calloc(json_object_size(map), sizeof(*names))))
	{
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		goto done;
	}
	json_object_foreach(map, key, value)
	{
		if (!json_is_string(value))
		{
			rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "model.safetensors.index.json maps \"%s\" to something that is not a file name", shown(key).text);
			goto done;
		}
		names[n++] = json_string_value(value);
	}
	qsort(names, n, sizeof(*names), by_string);
	for (size_t i = 0; i < n && rc == MILLM_OK; i++)
	{
		if (i > 0 && strcmp(names[i], names[i - 1]) == 0)
			continue;
		if (files->n_shards == MAX_SHARDS)
			rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "model.safetensors.index.json names more than %d files", MAX_SHARDS);
		else
			rc = open_shard(files, dir, names[i], err);
	}
done:
	free(names);
	json_decref(index);
	return rc;
}

static int
by_tensor_name(const void *a, const void *b)
{
	return strcmp(((const Entry *) a)->tensor->name, ((const Entry *) b)->tensor->name);
}

static MillmCode
index_tensors(struct MillmModelFiles *files, MillmError *err)
{
	size_t		n = 0;

	for (int i = 0; i < files->n_shards; i++)
		n += millm_st_n_tensors(files->shards[i]);
	files->entries = calloc(n + 1, sizeof(Entry));
	if (!files->entries)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (int i = 0; i < files->n_shards; i++)
		for (size_t k = 0; k < millm_st_n_tensors(files->shards[i]); k++)
			files->entries[files->n_entries++].tensor = millm_st_tensor(files->shards[i], k);
	qsort(files->entries, n, sizeof(Entry), by_tensor_name);
	for (size_t i = 1; i < n; i++)
		if (by_tensor_name(&files->entries[i - 1], &files->entries[i]) == 0)
			return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" is in two files", shown(files->entries[i].tensor->name).text);
	return MILLM_OK;
}

/* --- Binding ---------------------------------------------------------------------------------- */

static Entry *
find(Binder *b, const char *name)
{
	MillmStTensor tensor = {.name = name};
	Entry		key = {.tensor = &tensor};

	return bsearch(&key, b->model->files->entries, b->model->files->n_entries, sizeof(Entry), by_tensor_name);
}

/* "layers.{i}.x" with the layer's number, a prefix before and a suffix behind. */
static const char *
tensor_name(char buf[MAX_NAME], const char *prefix, const char *template, int layer, const char *suffix)
{
	const char *hole = strstr(template, "{i}");

	if (hole)
		snprintf(buf, MAX_NAME, "%s%.*s%d%s%s", prefix, (int) (hole - template), template, layer, hole + 3, suffix);
	else
		snprintf(buf, MAX_NAME, "%s%s%s", prefix, template, suffix);
	return buf;
}

static void
add_name(Names *names, const char *name)
{
	if (names->n++ == 0)
		names->first = shown(name);
	if (sizeof(names->text) - names->len > sizeof(MillmShown) + 4)	/* two quotes, a comma, a space */
		names->len += (size_t) snprintf(names->text + names->len, sizeof(names->text) - names->len, "%s\"%s\"",
										names->n > 1 ? ", " : "", shown(name).text);
}

static MillmCode
wrong_shape(Binder *b, const MillmStTensor *t, int64_t d0, int64_t d1)
{
	millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" has the wrong shape", t->name);
	if (d1)
		millm_detail(b->err, "The config implies [%lld, %lld]; it has %d dimensions, [%lld, %lld].", (long long) d0, (long long) d1,
					 t->n_dims, (long long) (t->n_dims > 0 ? t->dims[0] : 0), (long long) (t->n_dims > 1 ? t->dims[1] : 0));
	else
		millm_detail(b->err, "The config implies [%lld]; it has %d dimensions, the first is %lld.", (long long) d0,
					 t->n_dims, (long long) (t->n_dims > 0 ? t->dims[0] : 0));
	return MILLM_E_INVALID_MODEL_FILE;
}

/*
 * The named tensor, of that shape (d1 0: a vector) and of a dtype that can be multiplied.  A missing one is noted, and
 * *out is NULL: binding goes on, so that check_complete() can name them all.
 */
static MillmCode
take(Binder *b, const char *name, int64_t d0, int64_t d1, const MillmStTensor **out)
{
	Entry	   *e = find(b, name);
	const MillmStTensor *t;

	if (!e)
	{
		add_name(&b->missing, name);
		*out = NULL;
		return MILLM_OK;
	}
	t = e->tensor;
	if (t->n_dims != (d1 ? 2 : 1) || t->dims[0] != d0 || (d1 && t->dims[1] != d1))
		return wrong_shape(b, t, d0, d1);
	if (t->dtype >= MILLM_N_FLOAT_DTYPES)
	{
		millm_fail(b->err, MILLM_E_UNSUPPORTED, "dtype %s of tensor \"%s\" is not supported", millm_dtype_name(t->dtype), name);
		millm_hint(b->err, "Weights may be F32, F16, BF16, or quantized by bitsandbytes to 4 or 8 bits.");
		return MILLM_E_UNSUPPORTED;
	}
	e->used = true;
	e->n_params = (int64_t) (t->bytes / (uint64_t) millm_dtype_bytes(t->dtype));
	*out = t;
	return MILLM_OK;
}

/* --- Quantized matrices: what lies beside the weight tells, not the config (bitsandbytes-format.md 5.2) --- */

/* module + suffix, marked as used; data NULL when there is no such tensor. */
static MillmStored
take_beside(Binder *b, const char *module, const char *suffix)
{
	char		name[MAX_NAME + 64];
	Entry	   *e;

	snprintf(name, sizeof(name), "%s%s", module, suffix);
	if (!(e = find(b, name)))
		return (MillmStored) {.data = NULL};
	e->used = true;
	return (MillmStored) {.dtype = e->tensor->dtype, .data = e->tensor->data, .bytes = e->tensor->bytes};
}

static const float *
aligned_map(Binder *b, const void *stored)
{
	NestedMap  *map = b->model->files->maps;

	if (map && memcmp(map->values, stored, sizeof(map->values)) == 0)
		return map->values;
	if (!(map = aligned_alloc(64, (sizeof(*map) + 63) / 64 * 64)))
		return NULL;
	memcpy(map->values, stored, sizeof(map->values));
	map->next = b->model->files->maps;
	b->model->files->maps = map;
	return map->values;
}

static MillmCode
bind_4bit(Binder *b, const char *module, Entry *e, const char *suffix, MillmStored text, int64_t n_out, int64_t n_in, MillmWeight *w)
{
	MillmStored weight = take_beside(b, module, ".weight");
	MillmQuantState state;
	MillmQuantWeight q;
	char		name[MAX_NAME + 64];
	MillmCode	rc;

	snprintf(name, sizeof(name), "%s%s", module, suffix);
	if (text.dtype != MILLM_U8)
		return millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "dtype %s of tensor \"%s\" is not U8", millm_dtype_name(text.dtype), name);
	if ((rc = millm_quant_state_read(name, text.data, text.bytes, &state, b->err)) != MILLM_OK)
		return rc;
	if (state.n_out != n_out || state.n_in != n_in)
	{
		millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" has the wrong shape", e->tensor->name);
		millm_detail(b->err, "The config implies [%lld, %lld]; it has been quantized from [%lld, %lld].", (long long) n_out, (long long) n_in,
					 (long long) state.n_out, (long long) state.n_in);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	/* bitsandbytes takes a row of codes for a transposed weight */
	if (e->tensor->n_dims != 2 || e->tensor->dims[1] != 1)
	{
		millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" has the wrong shape", e->tensor->name);
		millm_detail(b->err, "4-bit codes are stored as a column, [n, 1].");
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if ((rc = millm_quant_bind_4bit(module, &state, weight, take_beside(b, module, ".weight.absmax"), take_beside(b, module, ".weight.quant_map"),
									take_beside(b, module, ".weight.nested_absmax"), take_beside(b, module, ".weight.nested_quant_map"),
									&q, b->err)) != MILLM_OK)
		return rc;
	*w = (MillmWeight) {
		.dtype = MILLM_4BIT, .n_out = n_out, .n_in = n_in, .stride = n_in, .data = q.data,
		.codebook = q.format == MILLM_QUANT_NF4 ? millm_nf4_codebook : millm_fp4_codebook, .absmax = q.absmax, .block_size = q.block_size,
		.nested_absmax = q.nested_absmax, .nested_offset = q.nested_offset, .nested_block_size = q.nested_block_size, .rounded = q.dtype,
	};
	b->model->quantization = q.format == MILLM_QUANT_NF4 ? "nf4" : "fp4";
	if (q.nested_map && !(w->nested_map = aligned_map(b, q.nested_map)))
		return millm_fail(b->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	e->n_params = n_out * n_in;
	return MILLM_OK;
}

static MillmCode
bind_int8(Binder *b, const char *module, Entry *e, MillmStored scb, int64_t n_out, int64_t n_in, MillmWeight *w)
{
	const MillmStTensor *t = e->tensor;
	MillmQuantWeight q;
	MillmCode	rc;

	if (t->n_dims != 2 || t->dims[0] != n_out || t->dims[1] != n_in)
		return wrong_shape(b, t, n_out, n_in);
	if ((rc = millm_quant_bind_int8(module, n_out, n_in, take_beside(b, module, ".weight"), scb, take_beside(b, module, ".weight_format"), &q,
									b->err)) != MILLM_OK)
		return rc;
	b->model->quantization = "int8";
	*w = (MillmWeight) {.dtype = MILLM_INT8, .n_out = n_out, .n_in = n_in, .stride = n_in, .data = q.data, .scale = q.absmax};
	e->n_params = n_out * n_in;
	return MILLM_OK;
}

/*
 * A matrix, quantized or not.  Stored [n_out, n_in], or [n_in, n_out] when in_out; a quantized one always [n_out, n_in], because
 * bitsandbytes turns a Conv1D first.  *w stays as it was when the tensor is missing.
 */
static MillmCode
bind_matrix(Binder *b, const char *prefix, const char *template, int layer, int64_t n_out, int64_t n_in, bool in_out, MillmWeight *w)
{
	char		module[MAX_NAME], name[MAX_NAME];
	const MillmStTensor *t;
	MillmStored beside;
	Entry	   *e;
	MillmCode	rc;

	tensor_name(module, prefix, template, layer, "");
	tensor_name(name, prefix, template, layer, ".weight");
	if ((e = find(b, name)))
	{
		static const char *const state[] = {".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4"};

		for (int i = 0; i < 2; i++)
			if ((beside = take_beside(b, module, state[i])).data)
				return bind_4bit(b, module, e, state[i], beside, n_out, n_in, w);
		if ((beside = take_beside(b, module, ".SCB")).data)
			return bind_int8(b, module, e, beside, n_out, n_in, w);
		if (e->tensor->dtype == MILLM_U8 || e->tensor->dtype == MILLM_I8)
		{
			millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s%s\" is missing", module, e->tensor->dtype == MILLM_I8 ? ".SCB" : state[0]);
			millm_detail(b->err, "\"%s\" is stored as %s: quantized, and nothing beside it tells how.", name, millm_dtype_name(e->tensor->dtype));
			return MILLM_E_INVALID_MODEL_FILE;
		}
	}
	rc = in_out ? take(b, name, n_in, n_out, &t) : take(b, name, n_out, n_in, &t);
	if (rc == MILLM_OK && t)
		*w = (MillmWeight) {.dtype = t->dtype, .in_out = in_out, .n_out = n_out, .n_in = n_in, .stride = in_out ? n_out : n_in, .data = t->data};
	return rc;
}

/* A matrix whose rows are looked up: never quantized by transformers. */
static MillmCode
bind_table(Binder *b, const char *template, int64_t n_rows, int64_t n_columns, MillmWeight *w)
{
	MillmCode	rc = bind_matrix(b, b->prefix, template, 0, n_rows, n_columns, false, w);

	if (rc == MILLM_OK && w->dtype >= MILLM_N_FLOAT_DTYPES)
		rc = millm_fail(b->err, MILLM_E_UNSUPPORTED, "the embedding \"%s%s.weight\" is quantized, which is not supported", b->prefix, template);
	return rc;
}

/* Rows first..first+n_out of a fused matrix, as a view. */
static MillmWeight
slice(const MillmWeight *fused, int64_t first, int64_t n_out)
{
	MillmWeight w = *fused;

	w.n_out = n_out;
	if (w.dtype == MILLM_4BIT)
		w.first += first * w.n_in;
	else
		w.data = (const char *) fused->data + millm_weight_bytes(w.dtype, first * (fused->in_out ? 1 : fused->stride));
	if (w.dtype == MILLM_INT8)
		w.scale = (const char *) fused->scale + first * 4;
	return w;
}

/* An aligned vector of n, uninitialised. */
static MillmCode
create_vector(Binder *b, int64_t n, MillmVector *v)
{
	v->data = aligned_alloc(64, ((size_t) n * sizeof(float) + 63) & ~(size_t) 63);
	if (!v->data)
		return millm_fail(b->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	v->n = n;
	return MILLM_OK;
}

/* All n values of a tensor. */
static void
read_floats(float *out, const MillmStTensor *t, int64_t n)
{
	const char *src = t->data;

	for (int64_t i = 0; i < n; i++)
	{
		uint16_t	half;

		if (t->dtype == MILLM_F32)
		{
			memcpy(&out[i], src + 4 * i, 4);
			continue;
		}
		memcpy(&half, src + 2 * i, 2);
		out[i] = t->dtype == MILLM_BF16 ? millm_bf16_to_f32(half) : millm_f16_to_f32(half);
	}
}

static MillmCode
bind_vector(Binder *b, const char *prefix, const char *template, int layer, const char *suffix, int64_t n, MillmVector *v)
{
	char		buf[MAX_NAME];
	const MillmStTensor *t;
	MillmCode	rc = take(b, tensor_name(buf, prefix, template, layer, suffix), n, 0, &t);

	if (rc != MILLM_OK || !t || (rc = create_vector(b, n, v)) != MILLM_OK)
		return rc;
	read_floats(v->data, t, n);
	return MILLM_OK;
}

/* The weight of a norm of n values, whole. */
static MillmCode
bind_norm_weight(Binder *b, const char *template, int layer, int64_t n, MillmVector *weight)
{
	MillmCode	rc = bind_vector(b, b->prefix, template, layer, ".weight", n, weight);

	for (int64_t i = 0; b->model->config.norm_plus_one && i < weight->n; i++)
		weight->data[i] += 1;
	return rc;
}

/* A norm of the residual, if the row has it. */
static MillmCode
bind_norm(Binder *b, const char *template, int layer, MillmVector *weight, MillmVector *bias)
{
	const MillmConfig *c = &b->model->config;
	MillmCode	rc;

	if (!template)
		return MILLM_OK;
	if (c->norm_plain)
	{
		rc = create_vector(b, c->hidden_size, weight);
		for (int64_t i = 0; i < weight->n; i++)
			weight->data[i] = 1;
		return rc;
	}
	rc = bind_norm_weight(b, template, layer, c->hidden_size, weight);
	if (rc == MILLM_OK && c->norm_bias)
		rc = bind_vector(b, b->prefix, template, layer, ".bias", c->hidden_size, bias);
	return rc;
}

/* Weights of norms that each head has for itself, [n_heads, head_dim]. */
static MillmCode
bind_own_norms(Binder *b, const char *template, int layer, int n_heads, int head_dim, MillmVector *weight)
{
	const char *hole = strstr(template, "{h}");
	MillmCode	rc = create_vector(b, (int64_t) n_heads * head_dim, weight);

	for (int h = 0; rc == MILLM_OK && h < (hole ? n_heads : 1); h++)
	{
		char		of_head[MAX_NAME], name[MAX_NAME];
		const MillmStTensor *t;

		if (hole)
			snprintf(of_head, sizeof(of_head), "%.*s%d%s", (int) (hole - template), template, h, hole + 3);
		tensor_name(name, b->prefix, hole ? of_head : template, layer, ".weight");
		rc = hole ? take(b, name, head_dim, 0, &t) : take(b, name, n_heads, head_dim, &t);
		if (rc == MILLM_OK && t)
			read_floats(weight->data + (int64_t) h * head_dim, t, hole ? head_dim : weight->n);
	}
	return rc;
}

static MillmCode
bind_head_norm(Binder *b, const char *template, int layer, int n_heads, int head_dim, MillmVector *weight)
{
	if (b->arch->head_norm_kind == MILLM_HEAD_NORMS_OWN)
		return bind_own_norms(b, template, layer, n_heads, head_dim, weight);
	return bind_norm_weight(b, template, layer, b->arch->head_norm_kind == MILLM_HEAD_NORMS_WHOLE ? (int64_t) n_heads * head_dim : head_dim, weight);
}

/* The norms of q and k. */
static MillmCode
bind_head_norms(Binder *b, int i, MillmLayer *l)
{
	const MillmArch *a = b->arch;
	MillmCode	rc;

	if (!b->model->config.head_norms)
		return MILLM_OK;
	if ((rc = bind_head_norm(b, a->q_norm, i, l->n_heads, l->head_dim, &l->q_norm)) != MILLM_OK ||
		(rc = bind_head_norm(b, a->k_norm, i, l->n_kv_heads, l->head_dim, &l->k_norm)) != MILLM_OK ||
		!a->head_norm_bias)
		return rc;
	if ((rc = bind_vector(b, b->prefix, a->q_norm, i, ".bias", l->head_dim, &l->q_norm_bias)) != MILLM_OK)
		return rc;
	return bind_vector(b, b->prefix, a->k_norm, i, ".bias", l->head_dim, &l->k_norm_bias);
}

static MillmVector
vector_slice(const MillmVector *v, int64_t first, int64_t n)
{
	MillmVector s = {aligned_alloc(64, ((size_t) n * sizeof(float) + 63) & ~(size_t) 63), n};

	if (s.data)
		memcpy(s.data, v->data + first, (size_t) n * sizeof(float));
	return s;
}

static MillmCode
bind_qkv(Binder *b, int i, MillmLayer *l)
{
	const MillmArch *a = b->arch;
	const MillmConfig *c = &b->model->config;
	int64_t		nq = (int64_t) l->n_heads * l->head_dim, nkv = (int64_t) l->n_kv_heads * l->head_dim;
	MillmWeight fused = {.data = NULL};
	MillmVector fused_bias = {NULL, 0};
	MillmCode	rc;

	if (a->grouped_qkv)
	{
		if ((rc = bind_matrix(b, b->prefix, a->grouped_qkv, i, nq + 2 * nkv, c->hidden_size, a->in_out, &l->qkv)) != MILLM_OK || !c->qkv_bias)
			return rc;
		return bind_vector(b, b->prefix, a->grouped_qkv, i, ".bias", nq + 2 * nkv, &l->qkv_bias);
	}
	if (!a->qkv)
	{
		if ((rc = bind_matrix(b, b->prefix, a->q, i, nq, c->hidden_size, a->in_out, &l->q)) != MILLM_OK ||
			(rc = bind_matrix(b, b->prefix, a->k, i, nkv, c->hidden_size, a->in_out, &l->k)) != MILLM_OK ||
			(rc = bind_matrix(b, b->prefix, a->v, i, nkv, c->hidden_size, a->in_out, &l->v)) != MILLM_OK || !c->qkv_bias)
			return rc;
		if ((rc = bind_vector(b, b->prefix, a->q, i, ".bias", nq, &l->q_bias)) != MILLM_OK ||
			(rc = bind_vector(b, b->prefix, a->k, i, ".bias", nkv, &l->k_bias)) != MILLM_OK)
			return rc;
		return bind_vector(b, b->prefix, a->v, i, ".bias", nkv, &l->v_bias);
	}
	if ((rc = bind_matrix(b, b->prefix, a->qkv, i, nq + 2 * nkv, c->hidden_size, a->in_out, &fused)) != MILLM_OK)
		return rc;
	if (fused.data)
	{
		l->q = slice(&fused, 0, nq);
		l->k = slice(&fused, nq, nkv);
		l->v = slice(&fused, nq + nkv, nkv);
	}
	if (!c->qkv_bias || (rc = bind_vector(b, b->prefix, a->qkv, i, ".bias", nq + 2 * nkv, &fused_bias)) != MILLM_OK || !fused_bias.data)
		return rc;
	l->q_bias = vector_slice(&fused_bias, 0, nq);
	l->k_bias = vector_slice(&fused_bias, nq, nkv);
	l->v_bias = vector_slice(&fused_bias, nq + nkv, nkv);
	free(fused_bias.data);
	if (!l->q_bias.data || !l->k_bias.data || !l->v_bias.data)
		return millm_fail(b->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	return MILLM_OK;
}

static MillmCode
bind_gate_up(Binder *b, int i, MillmLayer *l)
{
	const MillmArch *a = b->arch;
	int64_t		h = b->model->config.hidden_size, ffn = b->model->config.intermediate_size;
	MillmWeight fused = {.data = NULL};
	MillmCode	rc;

	if (!a->gate_up)
	{
		if (b->model->config.mlp_gated && (rc = bind_matrix(b, b->prefix, a->gate, i, ffn, h, a->in_out, &l->gate)) != MILLM_OK)
			return rc;
		return bind_matrix(b, b->prefix, a->up, i, ffn, h, a->in_out, &l->up);
	}
	if ((rc = bind_matrix(b, b->prefix, a->gate_up, i, 2 * ffn, h, a->in_out, &fused)) == MILLM_OK && fused.data)
	{
		l->gate = slice(&fused, 0, ffn);
		l->up = slice(&fused, ffn, ffn);
	}
	return rc;
}

/* An expert's matrices, each under its name with expert in place of {e}. */
static MillmCode
bind_expert(Binder *b, int i, const char *expert, int64_t size, MillmMlp *mlp)
{
	const MillmMixture *x = &b->arch->mixture;
	const int64_t h = b->model->config.hidden_size;
	const struct
	{
		const char *name;
		int64_t		n_out, n_in;
		MillmWeight *w;
	}			parts[] = {{x->gate, size, h, &mlp->gate}, {x->up, size, h, &mlp->up}, {x->down, h, size, &mlp->down}};
	MillmCode	rc = MILLM_OK;

	for (int k = 0; k < 3 && rc == MILLM_OK; k++)
	{
		const char *hole = strstr(parts[k].name, "{e}");
		char		name[MAX_NAME];

		snprintf(name, sizeof(name), "%.*s%s%s", (int) (hole - parts[k].name), parts[k].name, expert, hole + 3);
		rc = bind_matrix(b, b->prefix, name, i, parts[k].n_out, parts[k].n_in, false, parts[k].w);
	}
	return rc;
}

/* The named tensor of n_dims dims, of bytes if is_codes, else of floats.  A missing one is noted, and *out is NULL. */
static MillmCode
take_stack(Binder *b, const char *name, bool is_codes, const int64_t *dims, int n_dims, const MillmStTensor **out)
{
	Entry	   *e = find(b, name);

	*out = NULL;
	if (!e)
	{
		add_name(&b->missing, name);
		return MILLM_OK;
	}
	if (e->tensor->n_dims != n_dims || memcmp(e->tensor->dims, dims, sizeof(*dims) * (size_t) n_dims) != 0)
	{
		millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" has the wrong shape", name);
		millm_detail(b->err, "The config implies [%lld, %lld, %lld, ...]; it has %d dimensions, the first is %lld.", (long long) dims[0], (long long) dims[1],
					 (long long) (n_dims > 2 ? dims[2] : 0), e->tensor->n_dims, (long long) (e->tensor->n_dims > 0 ? e->tensor->dims[0] : 0));
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (is_codes ? e->tensor->dtype != MILLM_U8 : e->tensor->dtype >= MILLM_N_FLOAT_DTYPES)
		return millm_fail(b->err, MILLM_E_UNSUPPORTED, "dtype %s of tensor \"%s\" is not supported", millm_dtype_name(e->tensor->dtype), name);
	e->used = true;
	if (!is_codes)
		e->n_params = (int64_t) (e->tensor->bytes / (uint64_t) millm_dtype_bytes(e->tensor->dtype));
	*out = e->tensor;
	return MILLM_OK;
}

/* What all experts have in one tensor: the up, or down, of each, [n_out, n_in]; and their biases, which *bias owns. */
static MillmCode
bind_stack(Binder *b, int i, const char *template, int64_t n_out, int64_t n_in, MillmMlp *experts, bool is_down, MillmVector *bias)
{
	const int64_t n = b->model->config.n_experts;
	const MillmStTensor *floats = NULL, *blocks = NULL, *scales = NULL, *biases;
	char		name[MAX_NAME];
	MillmCode	rc;

	if ((rc = take_stack(b, tensor_name(name, b->prefix, template, i, "_bias"), false, (const int64_t[]) {n, n_out}, 2, &biases)) != MILLM_OK ||
		(biases && (rc = create_vector(b, n * n_out, bias)) != MILLM_OK))
		return rc;
	if (biases)
		read_floats(bias->data, biases, n * n_out);
	if (!find(b, tensor_name(name, b->prefix, template, i, "_blocks")))
		rc = take_stack(b, tensor_name(name, b->prefix, template, i, ""), false, (const int64_t[]) {n, n_in, n_out}, 3, &floats);
	else if (n_in % 32 != 0)
		rc = millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" cannot be of rows of %lld weights", name, (long long) n_in);
	else if ((rc = take_stack(b, name, true, (const int64_t[]) {n, n_out, n_in / 32, 16}, 4, &blocks)) == MILLM_OK)
		rc = take_stack(b, tensor_name(name, b->prefix, template, i, "_scales"), true, (const int64_t[]) {n, n_out, n_in / 32}, 3, &scales);
	if (rc != MILLM_OK || (!floats && (!blocks || !scales)))
		return rc;
	if (blocks)
	{
		find(b, tensor_name(name, b->prefix, template, i, "_blocks"))->n_params = n * n_out * n_in;
		b->model->quantization = "mxfp4";
	}
	for (int64_t e = 0; e < n; e++)
	{
		MillmWeight *w = is_down ? &experts[e].down : &experts[e].up;
		MillmVector *v = is_down ? &experts[e].down_bias : &experts[e].up_bias;

		if (blocks)
			*w = (MillmWeight) {.dtype = MILLM_MXFP4, .n_out = n_out, .n_in = n_in, .stride = n_in, .data = (const char *) blocks->data + e * n_out * n_in / 2,
				.scale = (const char *) scales->data + e * n_out * n_in / 32};
		else
			*w = (MillmWeight) {.dtype = floats->dtype, .in_out = true, .n_out = n_out, .n_in = n_in, .stride = n_out,
				.data = (const char *) floats->data + millm_weight_bytes(floats->dtype, e * n_out * n_in)};
		if (biases)
			*v = (MillmVector) {bias->data + e * n_out, n_out};
	}
	return MILLM_OK;
}

static MillmCode
bind_mixture(Binder *b, int i, MillmLayer *l)
{
	const MillmMixture *x = &b->arch->mixture;
	const MillmConfig *c = &b->model->config;
	char		expert[32];
	MillmCode	rc;

	if (!(l->experts = calloc((size_t) c->n_experts, sizeof(MillmMlp))))
		return millm_fail(b->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	rc = bind_matrix(b, b->prefix, x->router, i, c->n_experts, c->hidden_size, false, &l->router);
	if (rc == MILLM_OK && x->router_bias)
		rc = bind_vector(b, b->prefix, x->router, i, ".bias", c->n_experts, &l->router_bias);
	if (rc == MILLM_OK && c->has_fused_experts)
	{
		if ((rc = bind_stack(b, i, x->fused_gate_up, 2 * (int64_t) c->expert_size, c->hidden_size, l->experts, false, &l->experts_up_bias)) != MILLM_OK)
			return rc;
		return bind_stack(b, i, x->fused_down, c->hidden_size, c->expert_size, l->experts, true, &l->experts_down_bias);
	}
	for (int e = 0; e < c->n_experts && rc == MILLM_OK; e++)
	{
		snprintf(expert, sizeof(expert), "experts.%d", e);
		rc = bind_expert(b, i, expert, c->expert_size, &l->experts[e]);
	}
	if (rc != MILLM_OK || !c->shared_expert_size || (rc = bind_expert(b, i, "shared_expert", c->shared_expert_size, &l->shared)) != MILLM_OK)
		return rc;
	return bind_matrix(b, b->prefix, x->shared_router, i, 1, c->hidden_size, false, &l->shared_router);
}

static MillmCode
bind_mlp(Binder *b, int i, MillmLayer *l)
{
	const MillmArch *a = b->arch;
	const MillmConfig *c = &b->model->config;
	const int64_t h = c->hidden_size, ffn = c->intermediate_size;
	MillmCode	rc;

	if ((rc = bind_gate_up(b, i, l)) != MILLM_OK ||
		(rc = bind_matrix(b, b->prefix, a->down, i, h, ffn, a->in_out, &l->down)) != MILLM_OK || !c->mlp_bias)
		return rc;
	if ((c->mlp_gated && (rc = bind_vector(b, b->prefix, a->gate, i, ".bias", ffn, &l->gate_bias)) != MILLM_OK) ||
		(rc = bind_vector(b, b->prefix, a->up, i, ".bias", ffn, &l->up_bias)) != MILLM_OK)
		return rc;
	return bind_vector(b, b->prefix, a->down, i, ".bias", h, &l->down_bias);
}

static MillmCode
bind_layer(Binder *b, int i, MillmLayer *l)
{
	const MillmArch *a = b->arch;
	const MillmConfig *c = &b->model->config;
	int64_t		h = c->hidden_size;
	MillmCode	rc;

	l->n_heads = c->n_heads;
	l->n_kv_heads = c->n_kv_heads;
	l->head_dim = c->head_dim;
	l->window = c->slides[i] ? c->window : 0;
	l->unrotated = c->unrotated[i];
	if ((rc = bind_norm(b, a->attn_norm, i, &l->attn_norm, &l->attn_norm_bias)) != MILLM_OK ||
		(rc = bind_qkv(b, i, l)) != MILLM_OK ||
		(rc = bind_head_norms(b, i, l)) != MILLM_OK ||
		(rc = bind_matrix(b, b->prefix, a->o, i, h, (int64_t) l->n_heads * l->head_dim, a->in_out, &l->o)) != MILLM_OK ||
		(a->sinks && (rc = bind_vector(b, b->prefix, a->sinks, i, "", l->n_heads, &l->sinks)) != MILLM_OK) ||
		(c->o_bias && (rc = bind_vector(b, b->prefix, a->o, i, ".bias", h, &l->o_bias)) != MILLM_OK) ||
		(a->attn_post_norm && (rc = bind_norm_weight(b, a->attn_post_norm, i, h, &l->attn_post_norm)) != MILLM_OK) ||
		(a->mlp_post_norm && (rc = bind_norm_weight(b, a->mlp_post_norm, i, h, &l->mlp_post_norm)) != MILLM_OK) ||
		(rc = bind_norm(b, a->mlp_norm, i, &l->mlp_norm, &l->mlp_norm_bias)) != MILLM_OK)
		return rc;
	return c->is_mixture[i] ? bind_mixture(b, i, l) : bind_mlp(b, i, l);
}

/*
 * The LM head: the embedding when tied.  Files that say tied and yet store a head that differs are run with the
 * stored head, as transformers 5 does.
 */
static MillmCode
bind_head(Binder *b)
{
	MillmModel *m = b->model;
	char		name[MAX_NAME];
	Entry	   *e = find(b, tensor_name(name, "", b->arch->head, 0, ".weight"));
	const MillmWeight *emb = &m->embedding;
	MillmCode	rc;

	if (m->config.head_bias && (rc = bind_vector(b, "", b->arch->head, 0, ".bias", m->config.vocab_size, &m->head_bias)) != MILLM_OK)
		return rc;
	if (!e && m->config.tied)
	{
		m->head = *emb;
		return MILLM_OK;
	}
	if ((rc = bind_matrix(b, "", b->arch->head, 0, m->config.vocab_size, m->config.embedding_size, false, &m->head)) != MILLM_OK)
		return rc;
	if (m->config.tied && emb->data && m->head.dtype == emb->dtype && m->head.dtype < MILLM_N_FLOAT_DTYPES &&
		memcmp(m->head.data, emb->data, (size_t) millm_weight_bytes(emb->dtype, emb->n_out * emb->n_in)) == 0)
	{
		m->head = *emb;
		b->tied_head = e;
	}
	else
		m->config.tied = false;
	return MILLM_OK;
}

static bool
ends_with(const char *s, const char *suffix)
{
	size_t		n = strlen(s), k = strlen(suffix);

	return n >= k && strcmp(s + n - k, suffix) == 0;
}

/* Each tensor that the row names was there, and each tensor of the files has its place or is a known buffer. */
static MillmCode
check_complete(Binder *b)
{
	const struct MillmModelFiles *files = b->model->files;
	const char *type = b->arch->model_type;
	const Names *missing = &b->missing;
	Names		extra = {.n = 0};

	for (size_t i = 0; i < files->n_entries; i++)
	{
		const char *name = files->entries[i].tensor->name;
		bool		known = files->entries[i].used || millm_arch_is_foreign(b->arch, name);

		for (int k = 0; !known && k < 6 && b->arch->ignored[k]; k++)
			known = ends_with(name, b->arch->ignored[k]);
		if (!known)
			add_name(&extra, name);
	}
	if (missing->n == 0 && extra.n == 0)
		return MILLM_OK;
	if (missing->n == 0)
	{
		millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "the files hold tensors that have no place in a model of type \"%s\"", type);
		millm_detail(b->err, "There are %zu of them, such as %s.", extra.n, extra.text);
	}
	else
	{
		char		rest[600] = "";

		if (extra.n > 0)
			snprintf(rest, sizeof(rest), "  Without a place: %zu, such as %s.", extra.n, extra.text);
		millm_fail(b->err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" is missing", missing->first.text);
		millm_detail(b->err, "Missing of a model of type \"%s\" with %d layers: %zu, such as %s.%s",
					 type, b->model->config.n_layers, missing->n, missing->text, rest);
	}
	if (extra.n > 0)
		millm_hint(b->err, "The config may lack a flag, or the model is of another type than it says.");
	return MILLM_E_INVALID_MODEL_FILE;
}

static void
count(Binder *b)
{
	MillmModel *m = b->model;

	for (size_t i = 0; i < m->files->n_entries; i++)
	{
		const Entry *e = &m->files->entries[i];

		/* parts that are not run are parameters all the same, as their file has them */
		if (millm_arch_is_foreign(b->arch, e->tensor->name))
			m->n_params += (int64_t) (e->tensor->bytes / (uint64_t) millm_dtype_bytes(e->tensor->dtype));
		if (!e->used)
			continue;
		m->weights_bytes += e->tensor->bytes;
		if (e != b->tied_head)
			m->n_params += e->n_params;
	}
}

static MillmCode
bind_positions(Binder *b)
{
	const MillmArch *a = b->arch;
	const MillmConfig *c = &b->model->config;
	MillmWeight *w = &b->model->position_embedding;
	MillmCode	rc;

	if (!a->position_embedding)
		return MILLM_OK;
	if ((rc = bind_table(b, a->position_embedding, (int64_t) c->max_positions + a->position_offset, c->hidden_size, w)) == MILLM_OK && w->data)
		*w = slice(w, a->position_offset, c->max_positions);
	return rc;
}

static MillmCode
bind_projections(Binder *b)
{
	const MillmConfig *c = &b->model->config;
	MillmCode	rc;

	if (c->embedding_size == c->hidden_size)
		return MILLM_OK;
	if ((rc = bind_matrix(b, b->prefix, b->arch->project_in, 0, c->hidden_size, c->embedding_size, false, &b->model->project_in)) != MILLM_OK)
		return rc;
	return bind_matrix(b, b->prefix, b->arch->project_out, 0, c->embedding_size, c->hidden_size, false, &b->model->project_out);
}

static MillmCode
bind(Binder *b)
{
	MillmModel *m = b->model;
	const MillmArch *a = b->arch;
	MillmConfig *c = &m->config;
	char		name[MAX_NAME];
	MillmCode	rc;

	/* a file saved from the headless class lacks the prefix, or its first word */
	for (b->prefix = a->prefix; *b->prefix && !find(b, tensor_name(name, b->prefix, a->embedding, 0, ".weight"));)
		b->prefix = strchr(b->prefix, '.') + 1;
	if (a->other_prefix && find(b, tensor_name(name, a->other_prefix, a->embedding, 0, ".weight")))
		b->prefix = a->other_prefix;
	if (!*b->prefix && !find(b, tensor_name(name, "", a->embedding, 0, ".weight")))
		b->prefix = a->prefix;
	if ((rc = bind_table(b, a->embedding, c->vocab_size, c->embedding_size, &m->embedding)) != MILLM_OK ||
		(rc = bind_norm(b, a->embedding_norm, 0, &m->embedding_norm, &m->embedding_norm_bias)) != MILLM_OK ||
		(rc = bind_positions(b)) != MILLM_OK ||
		(rc = bind_projections(b)) != MILLM_OK ||
		(rc = bind_norm(b, a->final_norm, 0, &m->final_norm, &m->final_norm_bias)) != MILLM_OK ||
		(rc = bind_head(b)) != MILLM_OK)
		return rc;
	m->layers = calloc((size_t) c->n_layers, sizeof(MillmLayer));
	if (!m->layers)
		return millm_fail(b->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (int i = 0; i < c->n_layers; i++)
		if ((rc = bind_layer(b, i, &m->layers[i])) != MILLM_OK)
			return rc;
	if ((rc = check_complete(b)) != MILLM_OK)
		return rc;
	if (a->embedding_scaled && m->embedding.dtype == MILLM_BF16)
		c->embedding_scale = millm_bf16_to_f32(millm_f32_to_bf16(c->embedding_scale));
	else if (a->embedding_scaled && m->embedding.dtype == MILLM_F16)
		c->embedding_scale = millm_f16_to_f32(millm_f32_to_f16(c->embedding_scale));
	snprintf(m->dtype, sizeof(m->dtype), "%s", millm_dtype_name(m->embedding.dtype));
	count(b);
	return MILLM_OK;
}

/* --- The whole -------------------------------------------------------------------------------- */

MillmCode
millm_model_open(const char *dir, MillmModel **out, MillmError *err)
{
	MillmModel *m = calloc(1, sizeof(*m));
	json_t	   *config = NULL, *generation = NULL;
	Binder		binder = {.model = m, .err = err};
	MillmSafetensors *screening;
	MillmCode	rc;

	if (!m || !(m->files = calloc(1, sizeof(*m->files))))
	{
		free(m);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	m->generation = (MillmGenerationConfig) {.temperature = NAN, .top_k = -1, .top_p = NAN, .min_p = NAN, .repetition_penalty = NAN};
	if ((rc = millm_model_read_json(dir, "config.json", MILLM_MAX_CONFIG_BYTES, &config, err)) != MILLM_OK)
		goto done;
	if (!config)
	{
		rc = millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "there is no config.json in \"%s\"", dir);
		goto done;
	}
	if ((rc = millm_config_resolve(config, &m->config, err)) != MILLM_OK ||
		(rc = millm_model_read_json(dir, "generation_config.json", MILLM_MAX_CONFIG_BYTES, &generation, err)) != MILLM_OK ||
		(rc = generation ? millm_generation_resolve(generation, "generation_config.json", &m->generation, &m->config, err)
		 : millm_generation_resolve(config, "config.json", &m->generation, &m->config, err)) != MILLM_OK ||
		(rc = open_shards(m->files, dir, err)) != MILLM_OK ||
		(rc = index_tensors(m->files, err)) != MILLM_OK)
		goto done;
	binder.arch = m->config.arch;
	if ((rc = bind(&binder)) != MILLM_OK ||
		(rc = millm_screening_open(dir, m, &screening, err)) != MILLM_OK)
		goto done;
	millm_pooling_open(dir, &m->pooling);
	if (screening)
		m->files->shards[m->files->n_shards++] = screening;
	*out = m;
	m = NULL;
done:
	json_decref(config);
	json_decref(generation);
	millm_model_close(m);
	return rc;
}

void
millm_model_close(MillmModel *m)
{
	if (!m)
		return;
	for (int i = 0; m->layers && i < m->config.n_layers; i++)
	{
		MillmLayer *l = &m->layers[i];
		MillmVector *vectors[] = {&l->attn_norm, &l->attn_norm_bias, &l->q_bias, &l->k_bias, &l->v_bias, &l->o_bias, &l->qkv_bias, &l->q_norm, &l->k_norm,
		&l->q_norm_bias, &l->k_norm_bias, &l->attn_post_norm, &l->mlp_post_norm,
		&l->sinks, &l->router_bias, &l->experts_up_bias, &l->experts_down_bias,
		&l->mlp_norm, &l->mlp_norm_bias, &l->gate_bias, &l->up_bias, &l->down_bias};

		for (size_t k = 0; k < sizeof(vectors) / sizeof(vectors[0]); k++)
			free(vectors[k]->data);
		free(l->experts);
	}
	free(m->layers);
	free(m->embedding_norm.data);
	free(m->embedding_norm_bias.data);
	free(m->final_norm.data);
	free(m->final_norm_bias.data);
	free(m->head_bias.data);
	free(m->pooling.prompt);
	free(m->screen.error.data);
	for (int i = 0; i < m->files->n_shards; i++)
		millm_st_close(m->files->shards[i]);
	while (m->files->maps)
	{
		NestedMap  *map = m->files->maps;

		m->files->maps = map->next;
		free(map);
	}
	free(m->files->shards);
	free(m->files->entries);
	free(m->files);
	millm_config_free(&m->config);
	free(m);
}

bool
millm_model_populate(const MillmModel *m, bool (*progress) (void *arg, int percent), void *arg)
{
	const size_t piece = 64 << 20;
	size_t		total = 0, done = 0;

	for (int i = 0; i < m->files->n_shards; i++)
	{
		size_t		len;

		millm_st_map(m->files->shards[i], &len);
		total += len;
	}
	for (int i = 0; i < m->files->n_shards; i++)
	{
		size_t		len;
		const char *map = millm_st_map(m->files->shards[i], &len);

		for (size_t at = 0; at < len; at += piece)
		{
			size_t		n = len - at < piece ? len - at : piece;
			char	   *p = (char *) (uintptr_t) (map + at);

#ifdef MADV_POPULATE_READ
			if (madvise(p, n, MADV_POPULATE_READ) != 0)
#endif
				(void) madvise(p, n, MADV_WILLNEED);	/* only a hint: reads fault pages in later */
			done += n;
			if (progress && !progress(arg, (int) (done * 100 / total)))
				return false;
		}
	}
	return true;
}

/* --- As if it were quantized otherwise ------------------------------------------------------------------- */

const char *
millm_model_quantization(const MillmModel *m)
{
	return !m->quantization || strcmp(m->quantization, "mxfp4") == 0 ? "FP16" : strcmp(m->quantization, "int8") == 0 ? "Q8" : "Q4";
}

/* Of a Linear in a block: its weight, or what a quantization stores beside it. */
static bool
is_of_linear(const MillmStTensor *t)
{
	return millm_quant_is_quantized(t->name, t->n_dims) || strstr(t->name, ".weight.") || ends_with(t->name, ".SCB") ||
		ends_with(t->name, ".weight_format");
}

static int64_t
linear_bytes(const MillmWeight *w, const char *quantization)
{
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
	int64_t		bytes = 0;
	int			n = 0;

	if (!w->data)
		return 0;
	if (strcmp(quantization, "FP16") == 0)
		return w->n_out * w->n_in * 2;
	/* sizes that cannot be are no open model's */
	(void) millm_quant_layout(strcmp(quantization, "Q4") == 0 ? MILLM_QUANT_NF4 : MILLM_QUANT_INT8, MILLM_BF16, w->n_out, w->n_in, parts, &n, NULL);
	for (int i = 0; i < n; i++)
		bytes += (int64_t) parts[i].bytes;
	return bytes;
}

static int64_t
mlp_bytes(const MillmMlp *mlp, const char *quantization)
{
	return linear_bytes(&mlp->gate, quantization) + linear_bytes(&mlp->up, quantization) + linear_bytes(&mlp->down, quantization);
}

/* Which stays as it is with 16 bits or more, and becomes so when somebody has quantized it. */
static int64_t
router_bytes(const MillmWeight *w)
{
	return w->dtype < MILLM_N_FLOAT_DTYPES ? 0 : linear_bytes(w, "FP16");
}

int64_t
millm_model_weights_bytes_as(const MillmModel *m, const char *quantization)
{
	const int64_t screen = millm_config_can_screen(&m->config) ? millm_screen_file_bytes(m->head.n_out, m->head.n_in) : 0;
	int64_t		bytes = (int64_t) m->weights_bytes;

	if (strcmp(quantization, millm_model_quantization(m)) == 0)
		return bytes;
	for (size_t i = 0; i < m->files->n_entries; i++)
	{
		const MillmStTensor *t = m->files->entries[i].tensor;

		if (m->files->entries[i].used && is_of_linear(t))
			bytes -= (int64_t) t->bytes;
		else if (m->files->entries[i].used && t->dtype == MILLM_F32 && t->n_dims == 2 && !millm_quant_is_router(t->name))
			bytes -= (int64_t) t->bytes / 2;	/* millm-hub makes 16 bits of it */
	}
	for (int i = 0; i < m->config.n_layers; i++)
	{
		const MillmLayer *l = &m->layers[i];
		const MillmWeight *const linears[] = {&l->q, &l->k, &l->v, &l->qkv, &l->o, &l->gate, &l->up, &l->down};

		for (size_t k = 0; k < sizeof(linears) / sizeof(linears[0]); k++)
			bytes += linear_bytes(linears[k], quantization);
		for (int e = 0; l->experts && !m->config.has_fused_experts && e < m->config.n_experts; e++)
			bytes += mlp_bytes(&l->experts[e], quantization);
		bytes += mlp_bytes(&l->shared, quantization) + router_bytes(&l->router) + router_bytes(&l->shared_router);
	}
	if (!m->screen.codes.data && screen > 0)
		bytes += screen;
	return bytes;
}

/* Where activations can be seen, in the order of the forward pass; {i} stands for every layer. */
static json_t *
hook_points(const MillmModel *m)
{
	const MillmConfig *c = &m->config;
	const struct
	{
		const char *name;
		bool		is_there;
	}			points[] = {
		{"model.hook_embed", true},
		{"model.hook_pos_embed", c->position == MILLM_POS_LEARNED},
		{"model.layers.{i}.hook_resid_pre", true},
		{"model.layers.{i}.ln1.hook_normalized", m->layers[0].attn_norm.data != NULL},
		{"model.layers.{i}.attn.hook_q", true},
		{"model.layers.{i}.attn.hook_k", true},
		{"model.layers.{i}.attn.hook_v", true},
		{"model.layers.{i}.attn.hook_rot_q", c->position == MILLM_POS_ROPE},
		{"model.layers.{i}.attn.hook_rot_k", c->position == MILLM_POS_ROPE},
		{"model.layers.{i}.attn.hook_z", true},
		{"model.layers.{i}.hook_attn_out", true},
		{"model.layers.{i}.hook_resid_mid", !c->parallel},
		{"model.layers.{i}.ln2.hook_normalized", m->layers[0].mlp_norm.data != NULL},
		{"model.layers.{i}.mlp.hook_pre", c->n_experts == 0},	/* an expert sees some of the tokens only */
		{"model.layers.{i}.mlp.hook_pre_linear", c->mlp_gated && c->n_experts == 0},
		{"model.layers.{i}.mlp.hook_post", c->n_experts == 0},
		{"model.layers.{i}.hook_mlp_out", true},
		{"model.layers.{i}.hook_resid_post", true},
		{"model.ln_final.hook_normalized", m->final_norm.data != NULL},
	};
	json_t	   *names = json_array();

	for (size_t i = 0; i < sizeof(points) / sizeof(points[0]); i++)
		if (points[i].is_there)
			json_array_append_new(names, json_string(points[i].name));
	return names;
}

/* As torch calls it. */
static const char *
torch_dtype(const char *dtype)
{
	return strcmp(dtype, "BF16") == 0 ? "bfloat16" : strcmp(dtype, "F16") == 0 ? "float16" : "float32";
}

json_t *
millm_model_inspect_json(const MillmModel *m)
{
	const MillmConfig *c = &m->config;
	json_t	   *files = json_array(), *object;

	for (int i = 0; i < m->files->n_shards; i++)
	{
		const char *path = millm_st_path(m->files->shards[i]);
		const char *slash = strrchr(path, '/');

		json_array_append_new(files, json_string(slash ? slash + 1 : path));
	}
	object = json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:b, s:s, s:s?, s:I, s:I, s:o, s:o}",
					 "model_type", c->model_type, "architecture", c->architecture, "hidden_size", c->hidden_size,
					 "intermediate_size", c->intermediate_size, "num_hidden_layers", c->n_layers, "num_attention_heads", c->n_heads,
					 "num_key_value_heads", c->n_kv_heads, "head_dim", c->head_dim, "vocab_size", c->vocab_size,
					 "max_position_embeddings", c->max_positions, "tie_word_embeddings", c->tied, "torch_dtype", torch_dtype(m->dtype),
					 "quantization", m->quantization,
					 "params", (json_int_t) m->n_params, "weights_bytes", (json_int_t) m->weights_bytes, "files", files,
					 "hook_points", hook_points(m));
	if (object && c->n_experts > 0)
	{
		json_object_set_new(object, "num_experts", json_integer(c->n_experts));
		json_object_set_new(object, "num_experts_per_tok", json_integer(c->n_chosen));
		json_object_set_new(object, "moe_intermediate_size", json_integer(c->expert_size));
	}
	return object;
}
