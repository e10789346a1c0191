/*
 * fuzz_recast.c -- any bytes through the sink that changes their form: refused by name, or an ordinary safetensors file comes out;
 * and the same one however the bytes are cut and however often the sink is stopped and goes on.
 *
 * The input is a Plan and then either a file as it is, or (most of them, since few edits of a header leave one) a recipe of one: how many
 * tensors, four bytes for each, the bytes of their values.  It goes through the sink twice: from checkpoint to checkpoint without a
 * stop, and in small pieces with stops.  With plan.tampers something is changed in what the sink left for its next attempt; then the
 * result may be another one, but is judged as strictly.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arith.h"
#include "arch.h"
#include "recast.h"
#include "safetensors.h"
#include "screen.h"

#define FILE_NAME		"model.safetensors"
#define MAX_TENSORS		6
#define MAX_FILE_BYTES	((size_t) 256 << 10)	/* 6 tensors of 69 x 69 F32 and their header are half of that */

typedef struct Plan
{
	uint8_t		target;			/* modulo 3 */
	uint8_t		flags;			/* below */
	uint8_t		dtype;			/* of the config, modulo 3 */
	uint8_t		tampers;		/* how often, modulo 4 */
	uint8_t		seed[4];		/* of the pieces and stops */
} Plan;

enum {IS_GPT2 = 1, IS_TIED = 2, IS_RAW = 4, IS_SHORT = 8};

typedef struct Result
{
	MillmCode	code;
	uint8_t    *file;			/* NULL: there is none */
	size_t		len;
	uint8_t    *screen;
	size_t		screen_len;
} Result;

static char dir[] = "/dev/shm/millm_fuzz.XXXXXX";
static MillmStore *store;

static void
check(int ok)
{
	if (!ok)
		abort();
}

/* --- the directory ---------------------------------------------------------------------------------------------------- */

static void
empty_directory(void)
{
	DIR		   *d = opendir(millm_store_path(store));
	struct dirent *e;

	check(d != NULL);
	while ((e = readdir(d)))
		if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
			check(unlinkat(dirfd(d), e->d_name, 0) == 0);
	closedir(d);
}

static void
clean_up(void)
{
	empty_directory();
	check(rmdir(millm_store_path(store)) == 0);
	millm_store_close(store);
	check(rmdir(dir) == 0);
}

static void
set_up(void)
{
	MillmError	err;

	check(mkdtemp(dir) != NULL);
	check(millm_store_open(dir, "fuzz", "00000000-0000-0000-0000-000000000000", NULL, NULL, &store, &err) == MILLM_OK);
	atexit(clean_up);
}

static uint8_t *
read_file(const char *name, size_t *len)
{
	int			fd = openat(millm_store_dir(store), name, O_RDONLY);
	struct stat sb;
	uint8_t    *data;

	*len = 0;
	if (fd < 0)
		return NULL;
	check(fstat(fd, &sb) == 0);
	*len = (size_t) sb.st_size;
	data = malloc(*len + 1);
	check(pread(fd, data, *len, 0) == (ssize_t) *len);
	close(fd);
	return data;
}

/* --- the source ------------------------------------------------------------------------------------------------------- */

/* A file by a recipe, in out[MAX_FILE_BYTES]; its length. */
static size_t
cook(const uint8_t *recipe, size_t size, uint8_t *out)
{
	static const char *const names[] = {
		"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight",
		"model.embed_tokens.weight", "lm_head.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias",
		"transformer.h.1.attn.c_attn.weight", "transformer.wte.weight", "model.layers.0.mlp.up_proj.weight.absmax",
		"model.layers.0.mlp.up_proj.SCB", "\xc3\xa9.0.weight", ".0.weight", "0.0.weight",
	};
	static const MillmDtype dtypes[] = {MILLM_BF16, MILLM_F32, MILLM_F16, MILLM_BF16, MILLM_F32, MILLM_U8, MILLM_I64, MILLM_BOOL};
	const int	n = size == 0 ? 0 : 1 + recipe[0] % MAX_TENSORS;
	char		header[MAX_TENSORS * 200];
	size_t		len = 0, begin = 0, at;
	struct {size_t n, bytes; bool is_tame;} values[MAX_TENSORS];

	if (size < 1 + 4 * (size_t) n)
		return 0;
	for (int i = 0; i < n; i++)
	{
		const uint8_t *t = recipe + 1 + 4 * i;
		MillmDtype	dtype = dtypes[t[1] % 8];
		size_t		d0 = t[2] % 70, d1 = t[3] % 70;
		bool		is_matrix = t[1] / 8 % 4 > 0;

		values[i].bytes = (size_t) millm_dtype_bytes(dtype);
		values[i].n = is_matrix ? d0 * d1 : d0;
		values[i].is_tame = dtype < MILLM_N_FLOAT_DTYPES && t[1] / 32 > 0;
		len += (size_t) snprintf(header + len, sizeof(header) - len, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%zu", i > 0 ? "," : "{",
								 names[t[0] % (sizeof(names) / sizeof(names[0]))], millm_dtype_name(dtype), d0);
		if (is_matrix)
			len += (size_t) snprintf(header + len, sizeof(header) - len, ",%zu", d1);
		len += (size_t) snprintf(header + len, sizeof(header) - len, "],\"data_offsets\":[%zu,%zu]}", begin,
								 begin + values[i].n * values[i].bytes);
		begin += values[i].n * values[i].bytes;
	}
	header[len++] = '}';
	millm_put_le64(out, len);
	memcpy(out + 8, header, len);
	at = 8 + len;
	recipe += 1 + 4 * n;
	size -= 1 + 4 * (size_t) n;
	for (int i = 0; i < n; i++)
		for (size_t k = 0; k < values[i].n * values[i].bytes; k++, at++)
		{
			out[at] = size > 0 ? recipe[at % size] : (uint8_t) (at * 37);
			if (values[i].is_tame && k % values[i].bytes == values[i].bytes - 1)
				out[at] &= 0xBF;	/* below 2, so neither infinite nor beyond F16 */
		}
	check(at <= MAX_FILE_BYTES && at == 8 + len + begin);
	return at;
}

/* --- the sink --------------------------------------------------------------------------------------------------------- */

static uint32_t
next(uint32_t *state)
{
	*state = *state * 1664525 + 1013904223;
	return *state >> 8;
}

/* Change a byte of what the next attempt is to go on with. */
static void
tamper(const MillmHubFile *file, uint32_t *random)
{
	char		partial[MILLM_STORE_MAX_NAME], name[MILLM_STORE_MAX_NAME + 8];
	int			fd;
	struct stat sb;
	uint8_t		byte;

	millm_store_partial_name(file, partial);
	snprintf(name, sizeof(name), "%s%s", partial, next(random) % 2 ? ".state" : ".head");
	if ((fd = openat(millm_store_dir(store), name, O_RDWR)) < 0)
		return;
	byte = (uint8_t) next(random);
	check(fstat(fd, &sb) == 0);
	if (next(random) % 4 == 0)
		check(ftruncate(fd, next(random) % (sb.st_size + 1)) == 0);
	else
		check(sb.st_size == 0 || pwrite(fd, &byte, 1, next(random) % sb.st_size) == 1);
	close(fd);
}

/* Bytes that are all there, at addresses of their own, so that a read past the end is seen. */
static MillmCode
write_piece(MillmSink *sink, const uint8_t *data, size_t n, MillmError *err)
{
	uint8_t    *exact = malloc(n);
	MillmCode	rc;

	check(exact != NULL);
	memcpy(exact, data, n);
	rc = sink->write(sink->arg, exact, n, err);
	free(exact);
	return rc;
}

/* size bytes, of which len come, through the sink.  pieces false: as large as the sink allows, without stops. */
static Result
run(const Plan *plan, const uint8_t *data, size_t size, size_t len, bool pieces)
{
	static const char *const dtypes[] = {"{}", "{\"dtype\": \"float16\"}", "{\"torch_dtype\": \"bfloat16\"}"};
	MillmConfig config = {.tied = (plan->flags & IS_TIED) != 0, .arch = millm_arch_find(plan->flags & IS_GPT2 ? "gpt2" : "llama", 0)};
	MillmHubFile file = {.path = FILE_NAME, .size = (int64_t) size};
	json_t	   *json = json_loads(dtypes[plan->dtype % 3], 0, NULL);
	uint32_t	random = millm_get_le32(plan->seed);
	int			stops = pieces ? (int) (next(&random) % 4) : 0;
	int			tampers = pieces ? plan->tampers % 4 : 0;
	MillmRecast *recast = NULL;
	MillmSink  *sink;
	MillmHash	hash;
	MillmError	err = {0};
	atomic_bool stop = false;
	int64_t		have;
	Result		result = {0};
	bool		is_tampered = false;

	memset(file.hash, 'a', 64);
	strcpy(config.model_type, config.arch->model_type);
	check(millm_recast_create(store, (MillmRecastTarget) (plan->target % 3), &config, json, &recast, &err) == MILLM_OK);
	sink = millm_recast_sink(recast);
	millm_hash_begin(&hash, file.hash, file.size);
	check(sink->begin(sink->arg, &file, &hash, &have, &stop, &err) == MILLM_OK && have == 0);
	for (size_t at = 0; at < len && result.code == MILLM_OK;)
	{
		int64_t		until = sink->until_checkpoint(sink->arg);
		size_t		n = len - at, most = pieces ? 1 + next(&random) % (next(&random) % 4 == 0 ? 2 : 700) : n;

		check(until > 0);
		n = n < most ? n : most;
		n = (uint64_t) until < n ? (size_t) until : n;
		result.code = write_piece(sink, data + at, n, &err);
		at += n;
		millm_hash_update(&hash, data + at - n, n);
		if (result.code != MILLM_OK || !pieces)
			continue;
		if (next(&random) % 2)
			check(sink->checkpoint(sink->arg, &hash, &err) == MILLM_OK);
		if (stops > 0 && next(&random) % 8 == 0)
		{
			char		want[MILLM_HASH_HEX], got[MILLM_HASH_HEX];

			stops--;
			sink->abandon(sink->arg);
			if (next(&random) % 2)	/* another process */
			{
				millm_recast_free(recast);
				check(millm_recast_create(store, (MillmRecastTarget) (plan->target % 3), &config, json, &recast, &err) == MILLM_OK);
				sink = millm_recast_sink(recast);
			}
			if (tampers > 0)
			{
				tampers--;
				tamper(&file, &random);
				is_tampered = true;
			}
			millm_hash_begin(&hash, file.hash, file.size);
			check(sink->begin(sink->arg, &file, &hash, &have, &stop, &err) == MILLM_OK && have >= 0 && (size_t) have <= size);
			if (is_tampered)
			{
				at = (size_t) have;
				continue;
			}
			check((size_t) have <= at);
			at = (size_t) have;
			millm_hash_hex(&hash, got);
			millm_hash_begin(&hash, file.hash, file.size);
			millm_hash_update(&hash, data, at);
			millm_hash_hex(&hash, want);
			check(strcmp(got, want) == 0);
		}
	}
	if (result.code == MILLM_OK)
		result.code = sink->finish(sink->arg, &err);
	else
		sink->abandon(sink->arg);
	check(result.code == MILLM_OK || ((result.code == MILLM_E_INVALID_MODEL_FILE || result.code == MILLM_E_UNSUPPORTED) && err.message[0]));
	result.file = read_file(FILE_NAME, &result.len);
	result.screen = read_file(MILLM_SCREEN_FILE, &result.screen_len);
	check((result.code == MILLM_OK) == (result.file != NULL));
	check(result.code != MILLM_OK || is_tampered || len == size);
	millm_recast_free(recast);
	json_decref(json);
	empty_directory();
	return result;
}

/* An ordinary file; with aligned, its tensors lie at multiples of 64 or at least of their dtype. */
static void
check_file(const uint8_t *file, size_t len, bool aligned)
{
	MillmSafetensors *st;
	MillmError	err;

	check(millm_st_parse(file, len, "recast", &st, &err) == MILLM_OK);
	for (size_t i = 0; aligned && i < millm_st_n_tensors(st); i++)
	{
		const MillmStTensor *t = millm_st_tensor(st, i);
		size_t		align = t->bytes % 64 == 0 ? 64 : (size_t) millm_dtype_bytes(t->dtype);

		check((size_t) ((const uint8_t *) t->data - file) % align == 0);
	}
	millm_st_close(st);
}

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t cooked[MAX_FILE_BYTES];
	Plan		plan;
	Result		whole, cut;
	size_t		len;

	if (size < sizeof(plan))
		return 0;
	if (!store)
		set_up();
	memcpy(&plan, data, sizeof(plan));
	data += sizeof(plan);
	size -= sizeof(plan);
	if (!(plan.flags & IS_RAW))
	{
		if ((size = cook(data, size, cooked)) == 0)
			return 0;
		data = cooked;
	}
	len = plan.flags & IS_SHORT && size > 0 ? size - 1 : size;
	whole = run(&plan, data, size, len, false);
	cut = run(&plan, data, size, len, true);
	if (whole.file)
		check_file(whole.file, whole.len, true);
	if (whole.screen)
		check_file(whole.screen, whole.screen_len, false);
	if (cut.file)
		check_file(cut.file, cut.len, true);
	if (plan.tampers % 4 == 0)
	{
		check(whole.code == cut.code);
		check(whole.len == cut.len && (whole.len == 0 || memcmp(whole.file, cut.file, whole.len) == 0));
		check(whole.screen_len == cut.screen_len && (whole.screen_len == 0 || memcmp(whole.screen, cut.screen, whole.screen_len) == 0));
	}
	free(whole.file);
	free(whole.screen);
	free(cut.file);
	free(cut.screen);
	return 0;
}
