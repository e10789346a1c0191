/*
 * quant_driver.c -- src/quant, driven from Python: one operation on stdin's bytes, results on stdout.
 *
 *     quant_driver encode nf4|int8 DTYPE N_OUT N_IN STEP   raw weight -> its parts, pushed STEP bytes at a time
 *     quant_driver blocks DTYPE N                          raw weight -> packed, absmax (not nested)
 *     quant_driver nest OFFSET                             float32 absmax -> codes, nested_absmax
 *     quant_driver decode4 NAME  |  quant_driver decode8 NAME N_OUT N_IN
 *                                                          parts -> float32 weight
 *     quant_driver config nf4|int8 DTYPE [SKIP...]         -> the quantization_config
 *
 *     quant_driver linears                                 lines "NAME N_DIMS" -> the names that are quantized
 *
 * DTYPE is F32, F16, BF16, ...  A part is a line "SUFFIX DTYPE BYTES DIM...\n" and its bytes; there may be no DIM.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quant.h"

static const char *const dtype_names[MILLM_N_DTYPES] = {
	[MILLM_F32] = "F32", [MILLM_F16] = "F16", [MILLM_BF16] = "BF16", [MILLM_I8] = "I8", [MILLM_U8] = "U8",
	[MILLM_I16] = "I16", [MILLM_I32] = "I32", [MILLM_I64] = "I64", [MILLM_F64] = "F64", [MILLM_BOOL] = "BOOL",
};

static MillmError err;

static int
failed(void)
{
	fprintf(stderr, "%s: %s. %s\n", millm_code_name(err.code), err.message, err.detail);
	return 1;
}

static MillmDtype
dtype_of(const char *name)
{
	for (int i = 0; i < MILLM_N_DTYPES; i++)
		if (dtype_names[i] != NULL && strcmp(dtype_names[i], name) == 0)
			return (MillmDtype) i;
	fprintf(stderr, "no dtype \"%s\"\n", name);
	exit(2);
}

static void *
allocate(size_t n)
{
	void	   *p = malloc(n ? n : 1);

	if (!p)
		exit(2);
	return p;
}

static unsigned char *
read_all(size_t *n)
{
	size_t		room = 1 << 16;
	unsigned char *data = allocate(room);

	*n = 0;
	for (size_t k; (k = fread(data + *n, 1, room - *n, stdin)) > 0;)
		if ((*n += k) == room && !(data = realloc(data, room *= 2)))
			exit(2);
	return data;
}

static void
put_part(const MillmQuantPart *part, const void *data)
{
	printf("%s %s %llu", part->suffix, dtype_names[part->dtype], (unsigned long long) part->bytes);
	for (int i = 0; i < part->n_dims; i++)
		printf(" %lld", (long long) part->shape[i]);
	putchar('\n');
	fwrite(data, 1, part->bytes, stdout);
}

static int
encode(MillmQuantFormat format, MillmDtype dtype, int64_t n_out, int64_t n_in, size_t step)
{
	MillmQuantEncoder *enc;
	const MillmQuantPart *parts;
	int			n_parts;
	size_t		n, at = 0;
	unsigned char *raw = read_all(&n);
	unsigned char *out = allocate((size_t) (n_out * n_in) + 1);

	if (millm_quant_begin(format, "driver", dtype, n_out, n_in, &enc, &err) != MILLM_OK)
		return failed();
	for (size_t i = 0; i < n; i += step)
	{
		size_t		k = n - i < step ? n - i : step;
		size_t		writes = millm_quant_push_writes(enc, k);

		if (millm_quant_push(enc, raw + i, k, out + at, &err) != MILLM_OK)
			return failed();
		at += writes;
	}
	if (millm_quant_finish(enc, &parts, &n_parts, &err) != MILLM_OK)
		return failed();
	for (int i = 0; i < n_parts; i++)
		put_part(&parts[i], i == 0 ? out : parts[i].data);
	millm_quant_free(enc);
	free(raw);
	free(out);
	return 0;
}

static int
blocks(MillmDtype dtype, size_t n)
{
	size_t		bytes, n_blocks = (n + MILLM_NF4_BLOCK - 1) / MILLM_NF4_BLOCK;
	unsigned char *raw = read_all(&bytes);
	uint8_t    *packed = allocate((n + 1) / 2);
	float	   *absmax = allocate(n_blocks * sizeof(float));

	if (!millm_nf4_encode(packed, absmax, raw, dtype, n))
		return 1;
	fwrite(packed, 1, (n + 1) / 2, stdout);
	fwrite(absmax, sizeof(float), n_blocks, stdout);
	free(raw);
	free(packed);
	free(absmax);
	return 0;
}

static int
nest(float offset)
{
	size_t		bytes;
	float	   *absmax = (float *) (void *) read_all(&bytes);
	size_t		n = bytes / sizeof(float), n_groups = (n + MILLM_NF4_NESTED_BLOCK - 1) / MILLM_NF4_NESTED_BLOCK;
	uint8_t    *codes = allocate(n);
	float	   *nested_absmax = allocate(n_groups * sizeof(float));

	millm_absmax_encode(codes, nested_absmax, absmax, n, offset);
	fwrite(codes, 1, n, stdout);
	fwrite(nested_absmax, sizeof(float), n_groups, stdout);
	free(absmax);
	free(codes);
	free(nested_absmax);
	return 0;
}

/* Read parts until the end; each goes to the place whose suffix its own ends with. */
static void
get_parts(const char *const *suffixes, MillmStored *stored, int n)
{
	char		suffix[128], dtype[16];
	unsigned long long bytes;

	while (scanf("%127s %15s %llu", suffix, dtype, &bytes) == 3)
	{
		unsigned char *data = allocate(bytes);

		while (getchar() != '\n' && !feof(stdin))
			;
		if (fread(data, 1, bytes, stdin) != bytes)
			exit(2);
		for (int i = 0; i < n; i++)
			if (strncmp(suffix, suffixes[i], strlen(suffixes[i])) == 0)
			{
				stored[i] = (MillmStored) {dtype_of(dtype), data, bytes};
				break;
			}
	}
}

static int
put_weight(const MillmQuantWeight *w)
{
	int64_t		n = w->n_out * w->n_in;
	float	   *y = allocate((size_t) n * sizeof(float));

	millm_quant_dequantize(y, w, 0, n);
	fwrite(y, sizeof(float), (size_t) n, stdout);
	free(y);
	return 0;
}

static int
decode4(const char *name)
{
	static const char *const suffixes[] = {
		".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", ".weight.quant_state", ".weight",
	};
	MillmStored s[6] = {0};
	MillmQuantState state;
	MillmQuantWeight w;

	get_parts(suffixes, s, 6);
	if (millm_quant_state_read(name, s[4].data, s[4].bytes, &state, &err) != MILLM_OK ||
		millm_quant_bind_4bit(name, &state, s[5], s[0], s[1], s[2], s[3], &w, &err) != MILLM_OK)
		return failed();
	return put_weight(&w);
}

static int
decode8(const char *name, int64_t n_out, int64_t n_in)
{
	static const char *const suffixes[] = {".SCB", ".weight_format", ".weight"};
	MillmStored s[3] = {0};
	MillmQuantWeight w;

	get_parts(suffixes, s, 3);
	if (millm_quant_bind_int8(name, n_out, n_in, s[2], s[0], s[1], &w, &err) != MILLM_OK)
		return failed();
	return put_weight(&w);
}

static MillmQuantFormat
format_of(const char *name)
{
	return strcmp(name, "int8") == 0 ? MILLM_QUANT_INT8 : MILLM_QUANT_NF4;
}

int
main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (strcmp(what, "encode") == 0 && argc == 7)
		return encode(format_of(argv[2]), dtype_of(argv[3]), atoll(argv[4]), atoll(argv[5]), (size_t) atoll(argv[6]));
	if (strcmp(what, "blocks") == 0 && argc == 4)
		return blocks(dtype_of(argv[2]), (size_t) atoll(argv[3]));
	if (strcmp(what, "nest") == 0 && argc == 3)
		return nest(strtof(argv[2], NULL));
	if (strcmp(what, "decode4") == 0 && argc == 3)
		return decode4(argv[2]);
	if (strcmp(what, "decode8") == 0 && argc == 5)
		return decode8(argv[2], atoll(argv[3]), atoll(argv[4]));
	if (strcmp(what, "config") == 0 && argc >= 4)
	{
		json_t	   *config = millm_quant_config_json(format_of(argv[2]), dtype_of(argv[3]), (const char *const *) argv + 4, argc - 4);

		return json_dumpf(config, stdout, JSON_SORT_KEYS | JSON_INDENT(2));
	}
	if (strcmp(what, "linears") == 0)
	{
		char		name[512];
		int			n_dims;

		while (scanf("%511s %d", name, &n_dims) == 2)
			if (millm_quant_is_quantized(name, n_dims))
				puts(name);
		return 0;
	}
	fprintf(stderr, "see the top of quant_driver.c\n");
	return 2;
}
