/*
 * fuzz_quant_bind.c -- quantized checkpoints, damaged: refused by name, or every weight is finite and lies in its own tensor.
 *
 * The input is a list of edits of one of two good models: a llama with a weight of every kind, and a GPT-2 whose fused
 * c_attn has an odd number of weights.  So whatever the fuzzer does is a safetensors file (those that are none are
 * fuzz_safetensors.c's), and most of it reaches the binding.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel.h"
#include "model.h"
#include "quant.h"
#include "utf8.h"

#define MAX_TENSORS 64
#define MAX_BYTES 2048			/* of one tensor */
#define HEADER_BYTES (MAX_TENSORS * 320)

#define LLAMA_CONFIG "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 20, \"num_hidden_layers\": 1," \
	" \"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"vocab_size\": 5, \"max_position_embeddings\": 8, \"eos_token_id\": 1}"
#define GPT2_CONFIG "{\"model_type\": \"gpt2\", \"n_embd\": 9, \"n_layer\": 1, \"n_head\": 3, \"n_inner\": 7, \"n_positions\": 8, \"vocab_size\": 5," \
	" \"tie_word_embeddings\": true}"

typedef struct Tensor
{
	char		name[120];
	const char *dtype;
	int			n_dims;
	int64_t		dims[3];
	size_t		bytes;
	size_t		begin;			/* in the file */
	uint8_t		data[MAX_BYTES];
} Tensor;

static Tensor good[2][MAX_TENSORS], tensors[MAX_TENSORS];
static int	n_good[2], n_tensors;
static char dir[] = "/dev/shm/millm_fuzz.XXXXXX";

static void
check(int ok)
{
	if (!ok)
		abort();
}

/* --- good models -------------------------------------------------------------------------------------------------- */

static size_t
dtype_bytes(const char *dtype)
{
	const char *digits = dtype + strcspn(dtype, "0123456789");

	return *digits ? (size_t) atoi(digits) / 8 : 1;
}

/* A tensor of small values: bytes count up, floats are between 0.5 and 1.  d1 0: a vector. */
static Tensor *
add(int which, const char *module, const char *suffix, const char *dtype, int64_t d0, int64_t d1)
{
	Tensor	   *t = &good[which][n_good[which]++];
	size_t		size = dtype_bytes(dtype);

	check(n_good[which] <= MAX_TENSORS);
	snprintf(t->name, sizeof(t->name), "%s%s", module, suffix);
	t->dtype = dtype;
	t->n_dims = d1 ? 2 : 1;
	t->dims[0] = d0;
	t->dims[1] = d1;
	t->bytes = (size_t) (d1 ? d0 * d1 : d0) * size;
	check(t->bytes <= MAX_BYTES);
	for (size_t i = 0; i < t->bytes; i++)
		t->data[i] = (uint8_t) (i * 37 + 11);
	for (size_t i = 0; dtype[0] != 'U' && dtype[0] != 'I' && i < t->bytes; i += size)
		memcpy(t->data + i + size - 2, size == 4 ? "\0\x3f" : "\x12\x3f", 2);
	return t;
}

/* nested 0: plain scales. */
static void
add_4bit(int which, const char *module, MillmQuantFormat format, MillmDtype dtype, int64_t n_out, int64_t n_in, int block, int nested)
{
	const bool	is_nf4 = format == MILLM_QUANT_NF4;
	int64_t		n = n_out * n_in, n_blocks = (n + block - 1) / block;
	MillmQuantState state = {format, dtype, n_out, n_in, block, nested > 0, nested, 0.25f};
	char		text[MILLM_QUANT_STATE_MAX];
	size_t		len = millm_quant_state_write(&state, text, sizeof(text));

	add(which, module, ".weight", "U8", (n + 1) / 2, 1);
	add(which, module, ".weight.absmax", nested ? "U8" : "F32", n_blocks, 0);
	memcpy(add(which, module, ".weight.quant_map", "F32", 16, 0)->data, is_nf4 ? millm_nf4_codebook : millm_fp4_codebook, 64);
	if (nested)
	{
		float		map[256];

		millm_dynamic_map(map);
		add(which, module, ".weight.nested_absmax", "F32", (n_blocks + nested - 1) / nested, 0);
		memcpy(add(which, module, ".weight.nested_quant_map", "F32", 256, 0)->data, map, sizeof(map));
	}
	memcpy(add(which, module, is_nf4 ? ".weight.quant_state.bitsandbytes__nf4" : ".weight.quant_state.bitsandbytes__fp4", "U8", (int64_t) len, 0)->data,
		   text, len);
}

static void
add_int8(int which, const char *module, int64_t n_out, int64_t n_in)
{
	add(which, module, ".weight", "I8", n_out, n_in);
	add(which, module, ".SCB", "F32", n_out, 0);
	add(which, module, ".weight_format", "U8", 1, 0)->data[0] = 0;
}

static void
add_norm(int which, const char *module, int64_t n, bool bias)
{
	add(which, module, ".weight", "F32", n, 0);
	if (bias)
		add(which, module, ".bias", "F32", n, 0);
}

#define L "model.layers.0."
#define G "transformer.h.0."

static void
write_file(const char *name, const void *bytes, size_t n)
{
	char		path[64];
	int			fd;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	check(fd >= 0 && write(fd, bytes, n) == (ssize_t) n && close(fd) == 0);
}

static void
clean_up(void)
{
	char		path[64];

	snprintf(path, sizeof(path), "%s/config.json", dir);
	unlink(path);
	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	unlink(path);
	rmdir(dir);
}

static void
make_good(void)
{
	check(mkdtemp(dir) != NULL);
	atexit(clean_up);

	add(0, "model.embed_tokens", ".weight", "BF16", 5, 32);
	add_norm(0, "model.norm", 32, false);
	add_norm(0, L "input_layernorm", 32, false);
	add_norm(0, L "post_attention_layernorm", 32, false);
	add_4bit(0, L "self_attn.q_proj", MILLM_QUANT_NF4, MILLM_BF16, 32, 32, 64, 256);
	add_4bit(0, L "self_attn.k_proj", MILLM_QUANT_NF4, MILLM_F16, 16, 32, 128, 0);
	add_int8(0, L "self_attn.v_proj", 16, 32);
	add_4bit(0, L "self_attn.o_proj", MILLM_QUANT_FP4, MILLM_F32, 32, 32, 32, 0);
	add_4bit(0, L "mlp.gate_proj", MILLM_QUANT_FP4, MILLM_BF16, 20, 32, 32, 32);
	add_int8(0, L "mlp.up_proj", 20, 32);
	add_4bit(0, L "mlp.down_proj", MILLM_QUANT_NF4, MILLM_BF16, 32, 20, 64, 32);	/* blocks straddle the rows */
	add_4bit(0, "lm_head", MILLM_QUANT_NF4, MILLM_BF16, 5, 32, 64, 256);

	add(1, "transformer.wte", ".weight", "F32", 5, 9);
	add(1, "transformer.wpe", ".weight", "F32", 8, 9);
	add_norm(1, "transformer.ln_f", 9, true);
	add_norm(1, G "ln_1", 9, true);
	add_norm(1, G "ln_2", 9, true);
	add_4bit(1, G "attn.c_attn", MILLM_QUANT_NF4, MILLM_F32, 27, 9, 32, 256);	/* k begins in the middle of a byte */
	add(1, G "attn.c_attn", ".bias", "F32", 27, 0);
	add_int8(1, G "attn.c_proj", 9, 9);
	add(1, G "attn.c_proj", ".bias", "F32", 9, 0);
	add(1, G "mlp.c_fc", ".weight", "F16", 9, 7);
	add(1, G "mlp.c_fc", ".bias", "F16", 7, 0);
	add_4bit(1, G "mlp.c_proj", MILLM_QUANT_NF4, MILLM_F16, 9, 7, 64, 0);
	add(1, G "mlp.c_proj", ".bias", "F32", 9, 0);
}

/* --- damage ------------------------------------------------------------------------------------------------------- */

static const char *const dtypes[] = {"F32", "F16", "BF16", "U8", "I8", "I16", "I32", "F64", "BOOL"};
static const char *const suffixes[] = {
	".weight", ".SCB", ".weight_format", ".bias", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
	".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
};
static const uint32_t values[] = {0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFFFFFFFF, 0, 0x80000000, 0x477FE000};

#define COUNT(a) (sizeof(a) / sizeof(a[0]))

/* bool is one byte, not none. */
static size_t
size_of(const Tensor *t)
{
	return strcmp(t->dtype, "BOOL") == 0 ? 1 : dtype_bytes(t->dtype);
}

/* One edit of at least three bytes; returns how many it took. */
static size_t
edit(const uint8_t *in, size_t size)
{
	Tensor	   *t = &tensors[in[1] % n_tensors];
	size_t		arg = in[2], took = 3;
	char		module[120];

	switch (in[0] % 8)
	{
		case 0:					/* take away */
			*t = tensors[--n_tensors];
			break;
		case 1:					/* another name beside the same module */
			snprintf(module, sizeof(module), "%s", t->name);
			module[strstr(module, ".weight") ? (size_t) (strstr(module, ".weight") - module) : strcspn(module, "S")] = '\0';
			snprintf(t->name, sizeof(t->name), "%.70s%s", module, suffixes[arg % COUNT(suffixes)]);
			break;
		case 2:					/* the same bytes under another dtype */
			t->dtype = dtypes[arg % COUNT(dtypes)];
			t->bytes -= t->bytes % size_of(t);
			t->n_dims = 1 + (int) (arg / COUNT(dtypes) % 2);
			t->dims[0] = (int64_t) (t->bytes / size_of(t));
			t->dims[1] = 1;
			break;
		case 3:					/* another length; a column or a vector */
			t->bytes += (arg / 2 - 63) * size_of(t);
			if (t->bytes > MAX_BYTES)	/* below 0, too */
				t->bytes = 0;
			t->n_dims = 1 + (int) (arg % 2);
			t->dims[0] = (int64_t) (t->bytes / size_of(t));
			t->dims[1] = 1;
			break;
		case 4:					/* the same elements in another shape */
			t->n_dims = (int) (arg % 4);
			t->dims[t->n_dims > 1 ? arg / 4 % 2 : 0] = (int64_t) (t->bytes / size_of(t));
			if (t->n_dims > 1)
				t->dims[1 - arg / 4 % 2] = 1;
			t->dims[2] = 1;
			if (t->n_dims == 0)
				t->bytes = size_of(t);
			break;
		case 5:					/* a float */
			if (t->bytes >= 4)
				memcpy(t->data + arg / COUNT(values) * 4 % (t->bytes - 3), &values[arg % COUNT(values)], 4);
			break;
		case 6:					/* another text */
			took += arg < size - 3 ? arg : size - 3;
			memcpy(t->data, in + 3, took - 3);
			t->bytes = took - 3;
			t->dtype = "U8";
			t->n_dims = 1;
			t->dims[0] = (int64_t) t->bytes;
			break;
		case 7:					/* some bytes of it */
			for (took = 3; took < size && took < 11 && t->bytes > 0 && in[took]; took++)
				t->data[(arg + took - 3) % t->bytes] = in[took];
			break;
	}
	return took;
}

static void
write_model(void)
{
	static uint8_t file[8 + HEADER_BYTES + MAX_TENSORS * MAX_BYTES];
	char	   *header = (char *) file + 8;
	size_t		n = 1, at = 0;

	header[0] = '{';
	for (int i = 0; i < n_tensors; i++)
	{
		const Tensor *t = &tensors[i];

		n += (size_t) snprintf(header + n, HEADER_BYTES - n, "%s\"%s\": {\"dtype\": \"%s\", \"shape\": [", i ? ", " : "", t->name, t->dtype);
		for (int d = 0; d < t->n_dims; d++)
			n += (size_t) snprintf(header + n, HEADER_BYTES - n, "%s%" PRId64, d ? ", " : "", t->dims[d]);
		n += (size_t) snprintf(header + n, HEADER_BYTES - n, "], \"data_offsets\": [%zu, %zu]}", at, at + t->bytes);
		at += t->bytes;
	}
	n += (size_t) snprintf(header + n, HEADER_BYTES - n, "}");
	check(n < HEADER_BYTES);
	for (int i = 0; i < 8; i++)
		file[i] = (uint8_t) (n >> 8 * i);
	at = 8 + n;
	for (int i = 0; i < n_tensors; i++)
	{
		tensors[i].begin = at;
		memcpy(file + at, tensors[i].data, tensors[i].bytes);
		at += tensors[i].bytes;
	}
	write_file("model.safetensors", file, at);
}

/* --- what was bound ----------------------------------------------------------------------------------------------- */

/* Where the engine has mapped the file. */
static const char *
mapping(void)
{
	FILE	   *maps = fopen("/proc/self/maps", "r");
	char		line[512];
	uintptr_t	begin = 0;

	check(maps != NULL);
	while (!begin && fgets(line, sizeof(line), maps))
		if (strstr(line, dir))
			begin = (uintptr_t) strtoumax(line, NULL, 16);
	fclose(maps);
	check(begin != 0);
	return (const char *) begin;
}

/* A weight, and the module whose tensors it must lie in. */
typedef struct Bound
{
	const char *module;
	const MillmWeight *weight;
} Bound;

/* The n bytes at p belong to the tensor module + suffix. */
static void
check_inside(const char *map, const char *module, const char *suffix, const void *p, int64_t n)
{
	int64_t		at = (const char *) p - map;
	char		name[120];

	snprintf(name, sizeof(name), "%s%s", module, suffix);
	for (int i = 0; i < n_tensors; i++)
		if (strcmp(tensors[i].name, name) == 0)
		{
			check(n > 0 && at >= (int64_t) tensors[i].begin && at + n <= (int64_t) (tensors[i].begin + tensors[i].bytes));
			return;
		}
	abort();
}

static void
check_weight(const char *map, Bound b)
{
	const MillmWeight *w = b.weight;
	int64_t		n = w->n_out * w->n_in;
	float		row[64];

	check(w->data && w->n_in <= 64);
	if (w->dtype == MILLM_4BIT)
	{
		int64_t		n_blocks = (w->first + n + w->block_size - 1) / w->block_size;

		check(!w->in_out && w->first >= 0 && (w->codebook == millm_nf4_codebook || w->codebook == millm_fp4_codebook));
		check_inside(map, b.module, ".weight", w->data, (w->first + n + 1) / 2);
		check_inside(map, b.module, ".weight.absmax", w->absmax, n_blocks * (w->nested_block_size ? 1 : 4));
		if (w->nested_block_size)
			check_inside(map, b.module, ".weight.nested_absmax", w->nested_absmax, (n_blocks + w->nested_block_size - 1) / w->nested_block_size * 4);
	}
	else if (w->dtype == MILLM_INT8)
	{
		check(!w->in_out);
		check_inside(map, b.module, ".weight", w->data, n);
		check_inside(map, b.module, ".SCB", w->scale, w->n_out * 4);
	}
	else
	{
		int64_t		rows = w->in_out ? w->n_in : w->n_out, columns = w->in_out ? w->n_out : w->n_in;

		check_inside(map, b.module, ".weight", w->data, millm_weight_bytes(w->dtype, (rows - 1) * w->stride + columns));
		return;					/* any value is a float */
	}
	for (int64_t o = 0; o < w->n_out; o++)
	{
		millm_weight_decode(row, w, o, 0, w->n_in);
		for (int64_t i = 0; i < w->n_in; i++)
			check(isfinite(row[i]));
	}
}

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	MillmModel *m;
	MillmError	err;
	const int	which = size > 0 && data[0] & 1;

	if (n_good[0] == 0)
		make_good();
	memcpy(tensors, good[which], (size_t) n_good[which] * sizeof(Tensor));
	n_tensors = n_good[which];
	for (size_t at = 1; size >= at + 3 && n_tensors > 1;)
		at += edit(data + at, size - at);
	write_file("config.json", which ? GPT2_CONFIG : LLAMA_CONFIG, strlen(which ? GPT2_CONFIG : LLAMA_CONFIG));
	write_model();

	if (millm_model_open(dir, &m, &err) == MILLM_OK)
	{
		const MillmLayer *l = &m->layers[0];
		const Bound llama[] = {
			{"model.embed_tokens", &m->embedding}, {"lm_head", &m->head}, {L "self_attn.q_proj", &l->q}, {L "self_attn.k_proj", &l->k},
			{L "self_attn.v_proj", &l->v}, {L "self_attn.o_proj", &l->o}, {L "mlp.gate_proj", &l->gate}, {L "mlp.up_proj", &l->up},
			{L "mlp.down_proj", &l->down},
		};
		const Bound gpt2[] = {
			{"transformer.wte", &m->embedding}, {"transformer.wte", &m->head}, {"transformer.wpe", &m->position_embedding},
			{G "attn.c_attn", &l->q}, {G "attn.c_attn", &l->k}, {G "attn.c_attn", &l->v}, {G "attn.c_proj", &l->o}, {G "mlp.c_fc", &l->up},
			{G "mlp.c_proj", &l->down},
		};
		const char *map = mapping();

		for (size_t i = 0; i < COUNT(llama); i++)
			check_weight(map, which ? gpt2[i] : llama[i]);
		millm_model_close(m);
	}
	else
	{
		check(size >= 4);		/* the models without an edit are good */
		check((err.code == MILLM_E_INVALID_MODEL_FILE || err.code == MILLM_E_UNSUPPORTED) && err.message[0]);
		check(millm_utf8_valid_bytes(err.message, strlen(err.message)) == strlen(err.message));
		check(millm_utf8_valid_bytes(err.detail, strlen(err.detail)) == strlen(err.detail));
	}
	return 0;
}
