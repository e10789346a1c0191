/*
 * recast.c -- see recast.h.
 *
 * The raw file begins with its header, so when that is complete everything is known but the length of the quant_states, texts that hold a
 * number of the whole tensor.  So the new file is laid out at once: room for its header, then all tensors of known size, then the
 * quant_states.  Of the first, those come first whose size is a multiple of 64, in the order of the source (weights and their scales are
 * written one after the other); the rest by the largest power of two that divides their size.  So there are no holes, and each tensor is
 * aligned to 64 bytes or to its own dtype.
 *
 * A tensor in work is copied, converted or pushed through an encoder (quant.h).  At the end of a tensor all that was written is of
 * finished tensors: there a checkpoint may be made.  It is a small file beside the partial one: where in the source we are, the state of the
 * source's hash, the quant_states.  The source's header lies in another, since it will not come again.
 *
 * Owns: the file in work, its encoder and buffers.  Borrows: the store, the config.
 */
#include "recast.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arch.h"
#include "arith.h"
#include "half.h"
#include "head_copy.h"
#include "header.h"
#include "quant.h"
#include "safetensors.h"
#include "shown.h"
#include "version.h"

#define ALIGNMENT		64
/* Written in pieces that begin and end at multiples of this, so that the page cache can hold them in huge pages. */
#define BUFFER_BYTES	((size_t) 4 << 20)
#define PIECE_BYTES		((size_t) 256 << 10)	/* of a tensor that is converted or quantized at a time */
#define MAX_STATE_BYTES	((size_t) 64 << 20)		/* of a checkpoint */

typedef enum ItemKind {COPY, CONVERT, QUANTIZE} ItemKind;

/* A tensor of the source. */
typedef struct Item
{
	const MillmStTensor *tensor;
	ItemKind	kind;
	MillmDtype	dtype;			/* what it is copied, or converted, or quantized as */
	bool		is_turned;		/* GPT-2's [in, out], to be quantized as [out, in] */
	bool		is_head;		/* the screening copy is made from it */
	size_t		first_output;
	int			n_outputs;
	char	   *state;			/* quant_state, once finished */
} Item;

/* A tensor of the new file. */
typedef struct Output
{
	char	   *name;
	MillmDtype	dtype;
	int			n_dims;
	int64_t		dims[MILLM_ST_MAX_DIMS];
	uint64_t	bytes;			/* of a quant_state: at most */
	uint64_t	offset;			/* in the data */
} Output;

struct MillmRecast
{
	MillmStore *store;
	MillmSink	sink;
	MillmRecastTarget target;
	const MillmConfig *config;
	const json_t *config_json;
	MillmDtype	dtype16;		/* what F32 becomes */
	const MillmArch *arch;		/* config's */
	char		project_in[128], project_out[128];	/* modules outside of the blocks that the family may have; or "" */
	bool		has_converted;

	/* the file in work */
	const MillmHubFile *file;
	char		partial[MILLM_STORE_MAX_NAME];
	int			fd;
	MillmHeader header;			/* of the source */
	MillmSafetensors *st;
	Item	   *items;
	size_t		n_items;
	Output	   *outputs;
	size_t		n_outputs;
	size_t	   *order;			/* [n_outputs]: as they lie in the file */
	size_t		reserved;		/* bytes of the new header, 8 for its length included */
	uint64_t	states_at;		/* where in the data the quant_states begin */
	int64_t		at;				/* bytes of the source taken */
	size_t		current;		/* item in work */
	uint64_t	in_item;		/* bytes of it taken */
	/* its work */
	MillmQuantEncoder *encoder;
	MillmHeadCopy *head_copy;	/* of the item that is the head */
	uint8_t		carry[4];		/* of an F32 that was cut */
	size_t		n_carry;
	uint8_t    *whole;			/* a tensor that is to be turned */
	uint64_t	written;		/* bytes of the item's first output */
	uint8_t    *converted;		/* [PIECE_BYTES] */
	uint8_t    *encoded;		/* [encoded_size] */
	size_t		encoded_size;
	/* the write in front: n_buffered bytes that belong at buffered_at of the file */
	uint8_t    *buffer;			/* [BUFFER_BYTES] */
	size_t		n_buffered;
	uint64_t	buffered_at;
};

static MillmCode
no_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

bool
millm_recast_target(const char *quantization, MillmRecastTarget *out)
{
	static const char *const names[] = {[MILLM_RECAST_16BIT] = "FP16", [MILLM_RECAST_Q8] = "Q8", [MILLM_RECAST_Q4] = "Q4"};

	for (int i = 0; i < 3; i++)
		if (strcmp(quantization, names[i]) == 0)
		{
			*out = (MillmRecastTarget) i;
			return true;
		}
	return false;
}

static const char *
target_name(const MillmRecast *r)
{
	return r->target == MILLM_RECAST_Q4 ? "Q4" : r->target == MILLM_RECAST_Q8 ? "Q8" : "FP16";
}

static MillmQuantFormat
format(const MillmRecast *r)
{
	return r->target == MILLM_RECAST_Q4 ? MILLM_QUANT_NF4 : MILLM_QUANT_INT8;
}

/* --- Writing ---------------------------------------------------------------------------------------- */

static MillmCode
write_at(int fd, const void *data, size_t len, uint64_t at, const char *name, MillmError *err)
{
	const char *p = data;

	while (len > 0)
	{
		ssize_t		n = pwrite(fd, p, len, (off_t) at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return millm_store_error(err, "write", name);
		p += n;
		at += (uint64_t) n;
		len -= (size_t) n;
	}
	return MILLM_OK;
}

static MillmCode
flush(MillmRecast *r, MillmError *err)
{
	MillmCode	rc = write_at(r->fd, r->buffer, r->n_buffered, r->buffered_at, r->file->path, err);

	r->buffered_at += r->n_buffered;
	r->n_buffered = 0;
	return rc;
}

/* Bytes for offset of the data.  What continues the buffer goes there; the few small tensors at the end of the file go out at once. */
static MillmCode
put(MillmRecast *r, uint64_t offset, const void *data, size_t len, MillmError *err)
{
	uint64_t	at = r->reserved + offset;
	MillmCode	rc = MILLM_OK;

	if (at != r->buffered_at + r->n_buffered)
	{
		if (len < ALIGNMENT * 1024 && r->n_buffered > 0 && at > r->buffered_at)
			return write_at(r->fd, data, len, at, r->file->path, err);
		if ((rc = flush(r, err)) != MILLM_OK)
			return rc;
		r->buffered_at = at;
	}
	for (const uint8_t *p = data; len > 0 && rc == MILLM_OK;)
	{
		size_t		room = BUFFER_BYTES - (size_t) (r->buffered_at % BUFFER_BYTES) - r->n_buffered;
		size_t		n = len < room ? len : room;

		memcpy(r->buffer + r->n_buffered, p, n);
		r->n_buffered += n;
		p += n;
		len -= n;
		if (n == room && (rc = flush(r, err)) == MILLM_OK)
			/* it goes to the disk from now on, so that the sync at the end has little left to do */
			(void) sync_file_range(r->fd, (off_t) (r->buffered_at - BUFFER_BYTES), (off_t) BUFFER_BYTES, SYNC_FILE_RANGE_WRITE);
	}
	return rc;
}

/* --- The plan of a file ------------------------------------------------------------------------------ */

static bool
add_output(MillmRecast *r, const char *name, const char *suffix, MillmDtype dtype, int n_dims, const int64_t *dims, uint64_t bytes)
{
	Output	   *o;

	if (r->n_outputs % 256 == 0)
	{
		Output	   *grown = realloc(r->outputs, (r->n_outputs + 256) * sizeof(*grown));

		if (!grown)
			return false;
		r->outputs = grown;
	}
	o = &r->outputs[r->n_outputs];
	*o = (Output) {.dtype = dtype, .n_dims = n_dims, .bytes = bytes};
	memcpy(o->dims, dims, (size_t) n_dims * sizeof(*dims));
	if (asprintf(&o->name, "%s%s", name, suffix) < 0)
	{
		o->name = NULL;
		return false;
	}
	r->n_outputs++;
	return true;
}

static bool
is_16bit(MillmDtype dtype)
{
	return dtype == MILLM_F16 || dtype == MILLM_BF16;
}

static MillmCode
plan_item(MillmRecast *r, const MillmStTensor *t, Item *item, MillmError *err)
{
	const bool	is_matrix = t->n_dims >= 2 && !millm_quant_is_router(t->name);	/* vectors (norms, sinks) keep what they have, and so do routers */
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
	char	   *module;
	int			n_parts;
	bool		done = true;
	MillmCode	rc;

	*item = (Item) {.tensor = t, .kind = COPY, .dtype = t->dtype, .first_output = r->n_outputs};
	if (t->dtype == MILLM_F32 && is_matrix)
	{
		item->kind = CONVERT;
		item->dtype = r->dtype16;
		r->has_converted = true;
	}
	item->is_head = millm_head_copy_is_of(r->config, t->name) && is_matrix && is_16bit(item->dtype);
	if (r->target == MILLM_RECAST_16BIT || !millm_quant_is_quantized(t->name, t->n_dims) || millm_arch_is_foreign(r->arch, t->name))
	{
		item->n_outputs = 1;
		if (!add_output(r, t->name, "", item->dtype, t->n_dims, t->dims, item->kind == CONVERT ? t->bytes / 2 : t->bytes))
			return no_memory(err);
		return MILLM_OK;
	}
	if (!is_16bit(item->dtype))
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "tensor \"%s\" cannot be quantized", shown(t->name).text);
		millm_detail(err, "Its dtype is %s; F32, F16 and BF16 can be.", millm_dtype_name(t->dtype));
		return MILLM_E_UNSUPPORTED;
	}
	item->kind = QUANTIZE;
	item->is_turned = r->arch->in_out;
	if ((rc = millm_quant_layout(format(r), item->dtype, t->dims[item->is_turned], t->dims[!item->is_turned], parts, &n_parts, err)) != MILLM_OK)
		return rc;
	item->n_outputs = n_parts;
	if (!(module = strndup(t->name, strlen(t->name) - strlen(".weight"))))
		return no_memory(err);
	for (int i = 0; i < n_parts && done; i++)
		done = add_output(r, module, parts[i].suffix, parts[i].dtype, parts[i].n_dims, parts[i].shape, parts[i].bytes);
	free(module);
	return done ? MILLM_OK : no_memory(err);
}

/* Is output i a quant_state, whose length is known at the end? */
static bool
varies(const MillmRecast *r, const Item *item, size_t i)
{
	return item->kind == QUANTIZE && r->target == MILLM_RECAST_Q4 && i == item->first_output + (size_t) item->n_outputs - 1;
}

/* 64 and more alike, then smaller powers of two, then 0 for what has no size yet: the order of the file. */
static unsigned
alignment_of(uint64_t bytes)
{
	uint64_t	power = bytes == 0 ? ALIGNMENT : bytes & -bytes;

	return power > ALIGNMENT ? ALIGNMENT : (unsigned) power;
}

/* Put the outputs in order and give each its place. */
static MillmCode
lay_out(MillmRecast *r, MillmError *err)
{
	uint64_t	at = 0;
	size_t		n = 0;

	if (!(r->order = calloc(r->n_outputs + 1, sizeof(*r->order))))
		return no_memory(err);
	for (unsigned power = ALIGNMENT;; power /= 2)
	{
		if (power == 0)
			r->states_at = at;
		for (size_t i = 0; i < r->n_items; i++)
			for (size_t k = r->items[i].first_output; k < r->items[i].first_output + (size_t) r->items[i].n_outputs; k++)
			{
				Output	   *o = &r->outputs[k];

				if ((varies(r, &r->items[i], k) ? 0 : alignment_of(o->bytes)) != power)
					continue;
				o->offset = at;
				if (!millm_add_u64(at, o->bytes, &at))
					return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "the tensors of \"%s\" claim an impossible size", r->file->path);
				r->order[n++] = k;
			}
		if (power == 0)
			return MILLM_OK;
	}
}

/*
 * The new file's header, *len bytes; a new string, of exactly reserved bytes with its length in front when reserved is not 0.
 * INVALID_MODEL_FILE when two tensors would have one name: the source has what quantizing another of its tensors makes.
 */
static MillmCode
make_header(const MillmRecast *r, size_t reserved, char **out, size_t *len, MillmError *err)
{
	json_t	   *header = json_object(), *metadata = json_pack("{s:s}", "format", "pt");
	char	   *text;

	if (r->file->hash[0])
		json_object_set_new(metadata, "millm_source", json_string(r->file->hash));
	json_object_set_new(metadata, "millm_form", json_sprintf("%s %s%s", target_name(r), MILLM_VERSION, r->has_converted ? " from F32" : ""));
	json_object_set_new(header, "__metadata__", metadata);
	for (size_t i = 0; i < r->n_outputs; i++)
	{
		const Output *o = &r->outputs[r->order[i]];
		json_t	   *shape;

		if (json_object_get(header, o->name))
		{
			json_decref(header);
			millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" would hold two tensors called \"%s\"", r->file->path, shown(o->name).text);
			millm_detail(err, "It has a weight that is to be quantized, and beside it already what that makes.");
			return MILLM_E_INVALID_MODEL_FILE;
		}
		shape = json_array();
		for (int d = 0; d < o->n_dims; d++)
			json_array_append_new(shape, json_integer(o->dims[d]));
		if (json_object_set_new(header, o->name, json_pack("{s:s, s:o, s:[I, I]}", "dtype", millm_dtype_name(o->dtype), "shape", shape, "data_offsets",
														   (json_int_t) o->offset, (json_int_t) (o->offset + o->bytes))) != 0)
		{
			json_decref(header);
			return no_memory(err);
		}
	}
	text = json_dumps(header, JSON_COMPACT);
	json_decref(header);
	if (!text)
		return no_memory(err);
	*len = strlen(text);
	if (reserved == 0)
	{
		*out = text;
		return MILLM_OK;
	}
	*out = *len + 8 <= reserved ? malloc(reserved) : NULL;
	if (*out)
	{
		millm_put_le64((unsigned char *) *out, reserved - 8);
		memcpy(*out + 8, text, *len);
		memset(*out + 8 + *len, ' ', reserved - 8 - *len);
	}
	free(text);
	return *out ? MILLM_OK : no_memory(err);
}

/* The source's header is complete. */
static MillmCode
make_plan(MillmRecast *r, MillmError *err)
{
	char	   *header;
	size_t		n, len;
	MillmCode	rc;

	if ((rc = millm_st_parse_head(r->header.bytes, r->header.have, (uint64_t) r->file->size, r->file->path, &r->st, err)) != MILLM_OK)
		return rc;
	n = millm_st_n_tensors(r->st);
	if (!(r->items = calloc(n + 1, sizeof(*r->items))))
		return no_memory(err);
	for (; r->n_items < n; r->n_items++)
		if ((rc = plan_item(r, millm_st_tensor(r->st, r->n_items), &r->items[r->n_items], err)) != MILLM_OK)
			return rc;
	if ((rc = lay_out(r, err)) != MILLM_OK)
		return rc;
	/* with quant_states at their longest no number can be longer later */
	if ((rc = make_header(r, 0, &header, &len, err)) != MILLM_OK)
		return rc;
	free(header);
	r->reserved = (8 + len + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	if (r->reserved - 8 > MILLM_ST_HEADER_MAX)
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" has more tensors than a header may describe", r->file->path);
	r->buffered_at = r->reserved;
	return MILLM_OK;
}

/* Forget all of the file in work but that it is open. */
static void
reset(MillmRecast *r)
{
	for (size_t i = 0; i < r->n_items; i++)
		free(r->items[i].state);
	for (size_t i = 0; i < r->n_outputs; i++)
		free(r->outputs[i].name);
	free(r->items);
	free(r->outputs);
	free(r->order);
	millm_header_free(&r->header);
	free(r->whole);
	millm_st_close(r->st);
	millm_quant_free(r->encoder);
	millm_head_copy_free(r->head_copy);
	r->items = NULL;
	r->outputs = NULL;
	r->order = NULL;
	r->whole = NULL;
	r->st = NULL;
	r->encoder = NULL;
	r->head_copy = NULL;
	r->n_items = r->n_outputs = r->current = r->n_carry = r->n_buffered = 0;
	r->at = 0;
	r->in_item = r->written = 0;
}

static bool
need_encoded(MillmRecast *r, size_t n)
{
	if (n > r->encoded_size)
	{
		uint8_t    *grown = realloc(r->encoded, n);

		if (!grown)
			return false;
		r->encoded = grown;
		r->encoded_size = n;
	}
	return true;
}

/* --- One tensor ------------------------------------------------------------------------------------------ */

static MillmCode
overflow(const Item *item, const char *what, MillmError *err)
{
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" holds a value that is %s", shown(item->tensor->name).text, what);
	millm_hint(err, "The weights are damaged, or cannot be stored in this form.");
	return MILLM_E_INVALID_MODEL_FILE;
}

/* n float32 values at p to item's dtype, in place of r->converted. */
static MillmCode
convert(MillmRecast *r, const Item *item, const uint8_t *p, size_t n, MillmError *err)
{
	uint32_t	largest = 0;

	for (size_t i = 0; i < n; i++)
	{
		uint32_t	u;
		uint16_t	h;
		float		f;

		memcpy(&f, p + 4 * i, 4);
		memcpy(&u, p + 4 * i, 4);
		u &= 0x7FFFFFFF;
		largest = u > largest ? u : largest;
		h = item->dtype == MILLM_F16 ? millm_f32_to_f16(f) : millm_f32_to_bf16(f);
		memcpy(r->converted + 2 * i, &h, 2);
	}
	if (largest >= 0x7F800000)
		return overflow(item, "not finite", err);
	/* what rounds to infinity: from 65520 on, and from half a unit below 2^128 on */
	if (largest >= (item->dtype == MILLM_F16 ? 0x477FF000u : 0x7F7F8000u))
		return overflow(item, item->dtype == MILLM_F16 ? "too large for F16" : "too large for BF16", err);
	return MILLM_OK;
}

/* Bytes of item in its dtype. */
static MillmCode
take_typed(MillmRecast *r, const Item *item, const uint8_t *p, size_t len, MillmError *err)
{
	MillmCode	rc;

	if (item->kind == QUANTIZE)
	{
		size_t		n = millm_quant_push_writes(r->encoder, len);

		if (!need_encoded(r, n))
			return no_memory(err);
		if ((rc = millm_quant_push(r->encoder, p, len, r->encoded, err)) != MILLM_OK)
			return rc;
		rc = put(r, r->outputs[item->first_output].offset + r->written, r->encoded, n, err);
		r->written += n;
		return rc;
	}
	if (r->head_copy && (rc = millm_head_copy_push(r->head_copy, p, len, err)) != MILLM_OK)
		return rc;
	rc = put(r, r->outputs[item->first_output].offset + r->written, p, len, err);
	r->written += len;
	return rc;
}

/* Bytes of item as they come, in any cut; F32 is converted on the way. */
static MillmCode
take_raw(MillmRecast *r, const Item *item, const uint8_t *p, size_t len, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	if (item->tensor->dtype == item->dtype)
	{
		for (size_t n; len > 0 && rc == MILLM_OK; p += n, len -= n)
		{
			n = len < PIECE_BYTES ? len : PIECE_BYTES;
			rc = take_typed(r, item, p, n, err);
		}
		return rc;
	}
	while (len > 0 && rc == MILLM_OK)
	{
		size_t		n;

		if (r->n_carry > 0 || len < 4)
		{
			n = 4 - r->n_carry < len ? 4 - r->n_carry : len;
			memcpy(r->carry + r->n_carry, p, n);
			r->n_carry += n;
			if (r->n_carry == 4)
			{
				r->n_carry = 0;
				if ((rc = convert(r, item, r->carry, 1, err)) == MILLM_OK)
					rc = take_typed(r, item, r->converted, 2, err);
			}
		}
		else
		{
			n = (len < 2 * PIECE_BYTES ? len : 2 * PIECE_BYTES) / 4 * 4;
			if ((rc = convert(r, item, p, n / 4, err)) == MILLM_OK)
				rc = take_typed(r, item, r->converted, n / 2, err);
		}
		p += n;
		len -= n;
	}
	return rc;
}

static MillmCode
begin_item(MillmRecast *r, const Item *item, MillmError *err)
{
	const int64_t *dims = item->tensor->dims;
	MillmCode	rc = MILLM_OK;

	r->written = 0;
	r->n_carry = 0;
	if (item->kind == QUANTIZE)
		rc = millm_quant_begin(format(r), item->tensor->name, item->dtype, dims[item->is_turned], dims[!item->is_turned], &r->encoder, err);
	if (rc == MILLM_OK && item->is_turned && !(r->whole = malloc((size_t) item->tensor->bytes + 1)))
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory to turn tensor \"%s\"", shown(item->tensor->name).text);
		millm_detail(err, "It takes %.1f MB.", (double) item->tensor->bytes / 1e6);
		rc = MILLM_E_INSUFFICIENT_MEMORY;
	}
	if (rc == MILLM_OK && item->is_head)
		rc = millm_head_copy_begin(r->store, item->dtype, dims[0], dims[1], &r->head_copy, err);
	return rc;
}

/* The whole tensor [in, out] is there: push it as [out, in], a few rows at a time. */
static MillmCode
turn(MillmRecast *r, const Item *item, MillmError *err)
{
	enum {ROWS = 16};
	const size_t es = item->tensor->dtype == MILLM_F32 ? 4 : 2;
	const size_t n_in = (size_t) item->tensor->dims[0], n_out = (size_t) item->tensor->dims[1];
	uint8_t    *rows = malloc(ROWS * n_in * es + 1);
	MillmCode	rc = rows ? MILLM_OK : no_memory(err);

	for (size_t o = 0; o < n_out && rc == MILLM_OK; o += ROWS)
	{
		size_t		n = n_out - o < ROWS ? n_out - o : ROWS;

		for (size_t i = 0; i < n_in; i++)
			for (size_t k = 0; k < n; k++)
				memcpy(rows + (k * n_in + i) * es, r->whole + (i * n_out + o + k) * es, es);
		rc = take_raw(r, item, rows, n * n_in * es, err);
	}
	free(rows);
	return rc;
}

static MillmCode
end_item(MillmRecast *r, Item *item, MillmError *err)
{
	const MillmQuantPart *parts;
	int			n;
	MillmCode	rc;

	if (item->is_turned && (rc = turn(r, item, err)) != MILLM_OK)
		return rc;
	free(r->whole);
	r->whole = NULL;
	if (r->head_copy && (rc = millm_head_copy_end(r->head_copy, err)) != MILLM_OK)
		return rc;
	millm_head_copy_free(r->head_copy);
	r->head_copy = NULL;
	if (item->kind != QUANTIZE)
		return MILLM_OK;
	if ((rc = millm_quant_finish(r->encoder, &parts, &n, err)) != MILLM_OK)
		return rc;
	for (int i = 1; i < n && rc == MILLM_OK; i++)
		if (varies(r, item, item->first_output + (size_t) i))
			rc = (item->state = strndup(parts[i].data, parts[i].bytes)) ? MILLM_OK : no_memory(err);
		else
			rc = put(r, r->outputs[item->first_output + (size_t) i].offset, parts[i].data, parts[i].bytes, err);
	millm_quant_free(r->encoder);
	r->encoder = NULL;
	return rc;
}

/* --- The sink ---------------------------------------------------------------------------------------------- */

static MillmCode
sink_write(void *arg, const void *data, size_t len, MillmError *err)
{
	MillmRecast *r = arg;
	const uint8_t *p = data;
	MillmCode	rc = MILLM_OK;

	while (rc == MILLM_OK)
	{
		size_t		n = 0;

		if (!r->st)
		{
			if (len == 0)
				break;
			if ((rc = millm_header_take(&r->header, r->file, p, len, &n, err)) == MILLM_OK && millm_header_wants(&r->header) == 0)
				rc = make_plan(r, err);
		}
		else
		{
			Item	   *item = &r->items[r->current];

			if (r->current == r->n_items || (len == 0 && item->tensor->bytes > 0))
				break;
			if (r->in_item == 0 && (rc = begin_item(r, item, err)) != MILLM_OK)
				break;
			n = item->tensor->bytes - r->in_item < len ? (size_t) (item->tensor->bytes - r->in_item) : len;
			if (item->is_turned)
				memcpy(r->whole + r->in_item, p, n);
			else
				rc = take_raw(r, item, p, n, err);
			r->in_item += n;
			if (rc == MILLM_OK && r->in_item == item->tensor->bytes)
			{
				rc = end_item(r, item, err);
				r->current++;
				r->in_item = 0;
			}
		}
		p += n;
		len -= n;
		r->at += (int64_t) n;
	}
	if (rc == MILLM_OK && len > 0)
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" is longer than its header says", r->file->path);
	return rc;
}

static int64_t
sink_until_checkpoint(void *arg)
{
	MillmRecast *r = arg;

	if (!r->st)
		return (int64_t) millm_header_wants(&r->header);
	if (r->current == r->n_items)
		return INT64_MAX;
	return (int64_t) (r->items[r->current].tensor->bytes - r->in_item);
}

static void
beside(const MillmRecast *r, const char *suffix, char name[MILLM_STORE_MAX_NAME + 8])
{
	snprintf(name, MILLM_STORE_MAX_NAME + 8, "%s%s", r->partial, suffix);
}

/* Write a small file beside the partial one, at once. */
static MillmCode
put_beside(MillmRecast *r, const char *suffix, const void *data, size_t len, MillmError *err)
{
	char		name[MILLM_STORE_MAX_NAME + 8], tmp[MILLM_STORE_MAX_NAME + 16];
	int			dir = millm_store_dir(r->store), fd;
	MillmCode	rc;

	beside(r, suffix, name);
	snprintf(tmp, sizeof(tmp), "%s.new", name);
	if ((fd = openat(dir, tmp, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600)) < 0)
		return millm_store_error(err, "create", name);
	rc = write_at(fd, data, len, 0, name, err);
	if (rc == MILLM_OK && (fdatasync(fd) != 0 || renameat(dir, tmp, dir, name) != 0))
		rc = millm_store_error(err, "write", name);
	close(fd);
	return rc;
}

static void
unlink_beside(MillmRecast *r)
{
	static const char *const suffixes[] = {".head", ".state", ".head.new", ".state.new"};
	char		name[MILLM_STORE_MAX_NAME + 8];

	for (int i = 0; i < 4; i++)
	{
		beside(r, suffixes[i], name);
		(void) unlinkat(millm_store_dir(r->store), name, 0);
	}
}

static MillmCode
sink_checkpoint(void *arg, const MillmHash *hash, MillmError *err)
{
	MillmRecast *r = arg;
	char		hash_state[MILLM_HASH_STATE], *text;
	json_t	   *states = json_array(), *state;
	char		head[MILLM_STORE_MAX_NAME + 8];
	MillmCode	rc;

	if (!r->st || r->in_item > 0)	/* within a tensor there is none */
	{
		json_decref(states);
		return MILLM_OK;
	}
	beside(r, ".head", head);
	if ((rc = flush(r, err)) == MILLM_OK && fdatasync(r->fd) != 0)
		rc = millm_store_error(err, "sync", r->file->path);
	if (rc == MILLM_OK && faccessat(millm_store_dir(r->store), head, F_OK, AT_SYMLINK_NOFOLLOW) != 0)
		rc = put_beside(r, ".head", r->header.bytes, r->header.have, err);
	if (rc != MILLM_OK)
	{
		json_decref(states);
		return rc;
	}
	for (size_t i = 0; i < r->current; i++)
		json_array_append_new(states, r->items[i].state ? json_string(r->items[i].state) : json_null());
	millm_hash_save(hash, hash_state);
	state = json_pack("{s:s, s:s, s:I, s:s, s:o}", "millm_version", MILLM_VERSION, "form", target_name(r), "offset", (json_int_t) r->at, "hash", hash_state, "states", states);
	text = state ? json_dumps(state, JSON_COMPACT) : NULL;
	json_decref(state);
	rc = text ? put_beside(r, ".state", text, strlen(text), err) : no_memory(err);
	free(text);
	return rc;
}

/* A whole small file beside the partial one; malloc'ed, NULL when it is not there or too large. */
static uint8_t *
read_beside(MillmRecast *r, const char *suffix, size_t max, size_t *len)
{
	char		name[MILLM_STORE_MAX_NAME + 8];
	uint8_t    *data = NULL;
	struct stat sb;
	int			fd;

	beside(r, suffix, name);
	fd = openat(millm_store_dir(r->store), name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	if (fstat(fd, &sb) == 0 && S_ISREG(sb.st_mode) && (uint64_t) sb.st_size <= max && (data = malloc((size_t) sb.st_size + 1)))
	{
		*len = (size_t) sb.st_size;
		if (pread(fd, data, *len, 0) != (ssize_t) *len)
		{
			free(data);
			data = NULL;
		}
	}
	close(fd);
	return data;
}

/* Go on from a checkpoint; false when there is none that fits, and nothing has changed. */
static bool
resume(MillmRecast *r, MillmHash *hash)
{
	size_t		len, state_len;
	uint8_t    *state_text = read_beside(r, ".state", MAX_STATE_BYTES, &state_len);
	json_t	   *state = state_text ? json_loadb((char *) state_text, state_len, 0, NULL) : NULL;
	json_t	   *states = json_object_get(state, "states");
	const char *version = json_string_value(json_object_get(state, "millm_version"));
	const char *form = json_string_value(json_object_get(state, "form"));
	const char *hash_state = json_string_value(json_object_get(state, "hash"));
	int64_t		offset = json_integer_value(json_object_get(state, "offset"));
	bool		good;

	free(state_text);
	good = version && form && hash_state && strcmp(version, MILLM_VERSION) == 0 && strcmp(form, target_name(r)) == 0 &&
		(r->header.bytes = read_beside(r, ".head", 8 + MILLM_ST_HEADER_MAX, &len)) && len >= 8;
	if (good)
	{
		r->header.have = r->header.size = len;
		r->at = (int64_t) len;
		good = make_plan(r, NULL) == MILLM_OK && json_array_size(states) <= r->n_items;
	}
	for (; good && r->current < json_array_size(states); r->current++)
	{
		Item	   *item = &r->items[r->current];
		const char *text = json_string_value(json_array_get(states, r->current));

		r->at += (int64_t) item->tensor->bytes;
		if (varies(r, item, item->first_output + (size_t) item->n_outputs - 1))
			good = text && strlen(text) <= r->outputs[item->first_output + (size_t) item->n_outputs - 1].bytes && (item->state = strdup(text));
	}
	/* an empty tensor is taken with the one before it, so nobody stops in front of it */
	good = good && r->at == offset && (r->current == r->n_items || r->items[r->current].tensor->bytes > 0) && millm_hash_restore(hash, hash_state);
	json_decref(state);
	if (!good)
		reset(r);
	return good;
}

static MillmCode
sink_discard(void *arg, MillmError *err)
{
	MillmRecast *r = arg;

	reset(r);
	unlink_beside(r);
	return ftruncate(r->fd, 0) != 0 ? millm_store_error(err, "truncate", r->file->path) : MILLM_OK;
}

static MillmCode
sink_begin(void *arg, const MillmHubFile *file, MillmHash *hash, int64_t *have, atomic_bool *stop, MillmError *err)
{
	MillmRecast *r = arg;

	(void) stop;
	*have = 0;
	reset(r);
	r->file = file;
	millm_store_partial_name(file, r->partial);
	r->fd = openat(millm_store_dir(r->store), r->partial, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (r->fd < 0)
		return millm_store_error(err, "create", file->path);
	if (!file->hash[0] || !resume(r, hash))
		return sink_discard(r, err);
	*have = r->at;
	return MILLM_OK;
}

static void
sink_abandon(void *arg)
{
	MillmRecast *r = arg;

	reset(r);
	if (r->fd >= 0)
		close(r->fd);
	r->fd = -1;
}

/* The quant_states and the header, now that everything is known. */
static MillmCode
write_ends(MillmRecast *r, MillmError *err)
{
	uint64_t	at = r->states_at;
	char	   *header;
	size_t		len;
	MillmCode	rc = MILLM_OK;

	for (size_t i = 0; i < r->n_items && rc == MILLM_OK; i++)
	{
		Item	   *item = &r->items[i];
		Output	   *o = &r->outputs[item->first_output + (size_t) item->n_outputs - 1];

		if (!item->state)
			continue;
		o->offset = at;
		o->bytes = strlen(item->state);
		o->dims[0] = (int64_t) o->bytes;
		rc = put(r, at, item->state, o->bytes, err);
		at += o->bytes;
	}
	if (rc != MILLM_OK || (rc = flush(r, err)) != MILLM_OK)
		return rc;
	if ((rc = make_header(r, r->reserved, &header, &len, err)) != MILLM_OK)
		return rc;
	rc = write_at(r->fd, header, r->reserved, 0, r->file->path, err);
	free(header);
	if (rc == MILLM_OK && ftruncate(r->fd, (off_t) (r->reserved + at)) != 0)
		rc = millm_store_error(err, "write", r->file->path);
	return rc;
}

static MillmCode
sink_finish(void *arg, MillmError *err)
{
	MillmRecast *r = arg;
	int			dir = millm_store_dir(r->store);
	MillmCode	rc;

	if (!r->st || r->current < r->n_items)
		rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" ends before its tensors do", r->file->path);
	else if ((rc = write_ends(r, err)) == MILLM_OK && fsync(r->fd) != 0)
		rc = millm_store_error(err, "sync", r->file->path);
	sink_abandon(r);
	if (rc == MILLM_OK && (renameat(dir, r->partial, dir, r->file->path) != 0 || fsync(dir) != 0))
		rc = millm_store_error(err, "rename", r->file->path);
	unlink_beside(r);
	return rc;
}

MillmSink *
millm_recast_sink(MillmRecast *r)
{
	r->sink = (MillmSink) {r, sink_begin, sink_write, sink_until_checkpoint, sink_checkpoint, sink_discard, sink_finish, sink_abandon};
	return &r->sink;
}

/* --- A repository ------------------------------------------------------------------------------------------- */

MillmDtype
millm_config_dtype(const json_t *config)
{
	const char *name = json_string_value(json_object_get(config, "dtype"));

	if (!name)
		name = json_string_value(json_object_get(config, "torch_dtype"));
	if (name && strncmp(name, "torch.", 6) == 0)
		name += 6;
	return name && strcmp(name, "float16") == 0 ? MILLM_F16 : name && strcmp(name, "bfloat16") == 0 ? MILLM_BF16 : MILLM_F32;
}

MillmCode
millm_recast_create(MillmStore *store, MillmRecastTarget target, const MillmConfig *config, const json_t *config_json, MillmRecast **out, MillmError *err)
{
	const MillmArch *arch = config->arch;
	MillmRecast *r = calloc(1, sizeof(*r));

	if (!r || !(r->buffer = malloc(BUFFER_BYTES)) || !(r->converted = malloc(PIECE_BYTES)))
	{
		millm_recast_free(r);
		return no_memory(err);
	}
	r->store = store;
	r->target = target;
	r->config = config;
	r->config_json = config_json;
	r->fd = -1;
	r->dtype16 = millm_config_dtype(config_json) == MILLM_F16 ? MILLM_F16 : MILLM_BF16;
	r->arch = arch;
	if (config->embedding_size != config->hidden_size)
	{
		snprintf(r->project_in, sizeof(r->project_in), "%s%s", arch->prefix, arch->project_in);
		snprintf(r->project_out, sizeof(r->project_out), "%s%s", arch->prefix, arch->project_out);
	}
	*out = r;
	return MILLM_OK;
}

void
millm_recast_free(MillmRecast *r)
{
	if (!r)
		return;
	if (r->store)
		sink_abandon(r);
	free(r->buffer);
	free(r->converted);
	free(r->encoded);
	free(r);
}

bool
millm_recast_has_converted(const MillmRecast *r)
{
	return r->has_converted;
}

bool
millm_recast_is_done(MillmRecast *r, const MillmHubFile *file)
{
	char		path[4096], form[64];
	MillmSafetensors *st = NULL;
	const char *source, *has;
	size_t		n = (size_t) snprintf(form, sizeof(form), "%s %s", target_name(r), MILLM_VERSION);
	bool		is_done;

	if (!file->hash[0] || (size_t) snprintf(path, sizeof(path), "%s/%s", millm_store_path(r->store), file->path) >= sizeof(path) ||
		millm_st_open(path, &st, NULL) != MILLM_OK)
		return false;
	source = millm_st_metadata(st, "millm_source");
	has = millm_st_metadata(st, "millm_form");
	is_done = source && has && strcmp(source, file->hash) == 0 && strncmp(has, form, n) == 0 && (has[n] == '\0' || has[n] == ' ');
	if (is_done && has[n] == ' ')
		r->has_converted = true;
	millm_st_close(st);
	return is_done;
}

/* Dump as transformers does. */
static MillmCode
put_json(MillmRecast *r, const char *name, const json_t *json, MillmError *err)
{
	char	   *text = json_dumps(json, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_ENCODE_ANY);
	MillmCode	rc = text ? millm_store_put(r->store, name, text, strlen(text), err) : no_memory(err);

	free(text);
	return rc;
}

/* The index of a sharded model names every tensor's file. */
static MillmCode
write_index(MillmRecast *r, const MillmHubFile *const *files, size_t n, MillmError *err)
{
	json_t	   *map = json_object(), *index;
	uint64_t	total = 0;
	MillmCode	rc = MILLM_OK;

	for (size_t i = 0; i < n && rc == MILLM_OK; i++)
	{
		char		path[4096];
		MillmSafetensors *st;

		snprintf(path, sizeof(path), "%s/%s", millm_store_path(r->store), files[i]->path);
		if ((rc = millm_st_open(path, &st, err)) != MILLM_OK)
			break;
		for (size_t k = 0; k < millm_st_n_tensors(st); k++)
		{
			json_object_set_new(map, millm_st_tensor(st, k)->name, json_string(files[i]->path));
			total += millm_st_tensor(st, k)->bytes;
		}
		millm_st_close(st);
	}
	index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t) total, "weight_map", map);
	if (rc == MILLM_OK)
		rc = index ? put_json(r, "model.safetensors.index.json", index, err) : no_memory(err);
	json_decref(index);
	return rc;
}

MillmCode
millm_recast_complete(MillmRecast *r, const MillmHubFile *const *files, size_t n, MillmError *err)
{
	json_t	   *config = json_deep_copy(r->config_json);
	const char *skip[3 + MILLM_QUANT_N_ROUTERS + 2 * 3] = {r->arch->head};
	char		foreign[2 * 3][64];
	int			n_skip = 1;
	const char *dtype = r->dtype16 == MILLM_F16 ? "float16" : "bfloat16";
	MillmCode	rc = MILLM_OK;

	if (!config)
		return no_memory(err);
	if (r->project_in[0])
	{
		skip[n_skip++] = r->project_in;
		skip[n_skip++] = r->project_out;
	}
	for (int i = 0; r->config->n_experts > 0 && i < MILLM_QUANT_N_ROUTERS; i++)
		skip[n_skip++] = millm_quant_routers()[i];
	/* module names, without the dot: transformers 5 wants them from their begin on, in either spelling */
	for (int i = 0; i < 3 && r->arch->foreign[i]; i++)
		for (int k = 0; k < 2; k++)
		{
			snprintf(foreign[2 * i + k], sizeof(foreign[0]), "%s%.*s", k ? "model." : "", (int) strlen(r->arch->foreign[i]) - 1, r->arch->foreign[i]);
			skip[n_skip++] = foreign[2 * i + k];
		}
	if (r->has_converted)
	{
		bool		has_new = json_object_get(config, "dtype") != NULL;

		if (has_new)
			json_object_set_new(config, "dtype", json_string(dtype));
		if (!has_new || json_object_get(config, "torch_dtype"))
			json_object_set_new(config, "torch_dtype", json_string(dtype));
	}
	if (r->target != MILLM_RECAST_16BIT && json_object_set_new(config, "quantization_config", millm_quant_config_json(format(r), r->dtype16, skip, n_skip)) != 0)
		rc = no_memory(err);
	if (rc == MILLM_OK && n > 1)
		rc = write_index(r, files, n, err);
	if (rc == MILLM_OK)
		rc = put_json(r, "config.json", config, err);
	json_decref(config);
	return rc;
}
