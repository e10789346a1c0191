/*
 * kernel_bench.c -- one core's kernels beside the limits of that core, in the same second.
 *
 *   make && cc -O2 -D_GNU_SOURCE -Isrc/base -Isrc/kernel -Isrc/quant -o build/kernel_bench bench/kernel_bench.c build/libmillm.a -lm
 *   build/kernel_bench [VARIANT]
 *
 * matmul, one token: GB/s of weights, and the share of a plain read of the same bytes (rounds interleaved,
 * medians).  matmul, many tokens: GFLOP/s from a panel in the cache.  attention: GB/s of K and V.
 * Times are CPU time of the thread, so a busy machine disturbs less; it still shares memory and caches.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "half.h"
#include "kernel.h"
#include "quant.h"

#define ROUNDS		9
#define BIG_BYTES	(256 << 20)
#define FORMS_BYTES	(32 << 20)

typedef uint64_t Vec __attribute__((vector_size(32), aligned(32)));

static double
now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (double) ts.tv_sec + (double) ts.tv_nsec / 1e9;
}

static int
compare(const void *a, const void *b)
{
	double		x = *(const double *) a,
				y = *(const double *) b;

	return (x > y) - (x < y);
}

static double
median(double *x)
{
	qsort(x, ROUNDS, sizeof(*x), compare);
	return x[ROUNDS / 2];
}

static volatile uint64_t sink;

static double
read_seconds(const char *p, size_t n)
{
	const Vec  *v = (const Vec *) p;
	Vec			a = {0}, b = {0}, c = {0}, d = {0};
	double		start = now();

	for (size_t i = 0; i + 4 <= n / sizeof(Vec); i += 4)
	{
		if (i % 2 == 0)
			__builtin_prefetch((const char *) &v[i] + 4096), __builtin_prefetch((const char *) &v[i + 2] + 4096);
		a += v[i], b += v[i + 1], c += v[i + 2], d += v[i + 3];
	}
	a += b + c + d;
	sink += a[0] + a[1] + a[2] + a[3];
	return now() - start;
}

static void
bench_read(const MillmKernels *k, MillmDtype dtype, int64_t n_in, bool in_out, const char *what, char *data)
{
	int			size = millm_weight_bytes(dtype, 1);
	int64_t		n_out = in_out ? n_in : BIG_BYTES / size / n_in;
	int64_t		n_matrices = in_out ? BIG_BYTES / size / n_in / n_out : 1;
	float	   *x = calloc((size_t) n_in, sizeof(*x)),
			   *y = calloc((size_t) n_out, sizeof(*y));
	double		seconds[ROUNDS],
				share[ROUNDS];

	for (int r = 0; r < ROUNDS; r++)
	{
		double		probe = read_seconds(data, BIG_BYTES),
					start = now();

		for (int64_t i = 0; i < n_matrices; i++)
		{
			MillmWeight w = {.dtype = dtype, .in_out = in_out, .n_out = n_out, .n_in = n_in, .stride = in_out ? n_out : n_in,
				.data = data + i * n_in * n_out * size};
			MillmMatmul m = {.y = y, .y_stride = n_out, .w = &w, .form = MILLM_FORM_F32, .x = x, .x_stride = n_in * 4, .n_tokens = 1};

			k->matmul[MILLM_FORM_F32][dtype][in_out] (&m, 0, n_out);
		}
		seconds[r] = now() - start;
		probe = (probe + read_seconds(data, BIG_BYTES)) / 2;
		share[r] = probe / seconds[r];
	}
	printf("  %-28s n_in %5ld   %6.1f GB/s   %4.2f of a read\n", what, (long) n_in,
		   (double) (n_out * n_in * size * n_matrices) / median(seconds) / 1e9, median(share));
	free(x);
	free(y);
}

static void
bench_gemm(const MillmKernels *k, MillmForm form, MillmDtype dtype, bool in_out, int64_t n_in, int n_tokens, const char *what, char *data)
{
	int64_t		panel = 128 * 1024 / millm_weight_bytes(dtype, 1) / n_in / 16 * 16;
	int64_t		n_out = (panel < 16 ? 16 : panel) * 16;
	int64_t		stride = form == MILLM_FORM_F32 ? n_in * 4 : millm_form_row_bytes(form, n_in);
	char	   *x = aligned_alloc(64, (size_t) (stride * n_tokens + 63) / 64 * 64);
	float	   *y = calloc((size_t) (n_out * n_tokens), sizeof(*y));
	MillmWeight w = {.dtype = dtype, .in_out = in_out, .n_out = n_out, .n_in = n_in, .stride = in_out ? n_out : n_in, .data = data};
	MillmMatmul m = {.y = y, .y_stride = n_out, .w = &w, .form = form, .x = x, .x_stride = stride, .n_tokens = n_tokens};
	double		seconds[ROUNDS];

	if (!k->matmul[form][dtype][in_out])
		return;
	memset(x, 0, (size_t) (stride * n_tokens));
	panel = in_out ? 256 : n_out / 16;
	for (int r = 0; r < ROUNDS; r++)
	{
		double		start = now();

		for (int64_t o = 0; o < n_out; o += panel)
			k->matmul[form][dtype][in_out] (&m, o, o + panel < n_out ? o + panel : n_out);
		seconds[r] = now() - start;
	}
	printf("  %-28s n_in %5ld   %6.1f GFLOP/s with %d tokens\n", what, (long) n_in,
		   2.0 * (double) n_in * (double) n_out * n_tokens / median(seconds) / 1e9, n_tokens);
	free(x);
	free(y);
}

/* Weights that are read from memory, in every form that the variant has: where does which begin to pay? */
static void
bench_forms(const MillmKernels *k, MillmDtype dtype, int64_t n_in, const char *what, const char *data)
{
	static const char *const name[MILLM_N_FORMS] = {"f32", "bf16", "i16", "bf16 nib.", "i16 nib.", "bf16 tiles", "i16 tiles"};
	static const int tokens[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128};
	const int	n_tokens_most = 128;
	const int64_t row_bytes = millm_weight_bytes(dtype, n_in), n_out = FORMS_BYTES / row_bytes / 32 * 32;
	const MillmWeight w = {.dtype = dtype, .n_out = n_out, .n_in = n_in, .stride = n_in, .data = data, .codebook = millm_nf4_codebook, .absmax = data,
		.nested_absmax = data, .nested_map = (const float *) data, .block_size = 64, .nested_block_size = 256, .rounded = MILLM_BF16, .scale = data};
	float	   *y = calloc((size_t) (n_out * n_tokens_most), sizeof(*y));

	printf("%s from memory, n_in %ld: GFLOP/s (GB/s of weights)\n  tokens", what, (long) n_in);
	for (int form = 0; form < MILLM_N_FORMS; form++)
		if (k->matmul[form][dtype][0])
			printf("  %16s", name[form]);
	for (size_t i = 0; i < sizeof(tokens) / sizeof(tokens[0]); i++)
	{
		const int	n = tokens[i];

		printf("\n  %6d", n);
		for (int form = 0; form < MILLM_N_FORMS; form++)
		{
			const int	width = millm_form_group(form);
			const int64_t stride = form == MILLM_FORM_F32 ? n_in * 4 : millm_form_row_bytes(form, n_in);
			const int64_t piece = width > 1 ? n_out : (128 * 1024 / row_bytes / 16 + 1) * 16;	/* as the engine cuts them */
			char	   *packed = aligned_alloc(64, (size_t) (stride * (n + width)));
			MillmMatmul m = {.y = y, .y_stride = n_out, .w = &w, .form = form, .x = packed, .x_stride = stride, .n_tokens = n};
			double		seconds[ROUNDS];

			memset(packed, 0, (size_t) (stride * (n + width)));
			for (int r = 0; r < ROUNDS && k->matmul[form][dtype][0]; r++)
			{
				double		start = now();

				for (int64_t o = 0; o < n_out; o += piece)
					k->matmul[form][dtype][0] (&m, o, o + piece < n_out ? o + piece : n_out);
				seconds[r] = now() - start;
			}
			if (k->matmul[form][dtype][0])
				printf("  %9.1f (%4.1f)", 2.0 * (double) (n_in * n_out * n) / median(seconds) / 1e9, (double) (n_out * row_bytes) / median(seconds) / 1e9);
			free(packed);
		}
	}
	printf("\n");
	free(y);
}

static void
bench_attention(const MillmKvKernels *k, int n_positions, int group, int hd, char *data)
{
	int64_t		half = millm_kv_head_bytes(k->dtype, hd);
	int			n_pages = (n_positions + MILLM_KERNEL_PAGE - 1) / MILLM_KERNEL_PAGE;
	int32_t    *pages = calloc((size_t) n_pages, sizeof(*pages));
	float	   *q = calloc((size_t) (group * hd), sizeof(*q)),
			   *y = calloc((size_t) (group * hd), sizeof(*y));
	MillmKvLayer kv = {.k = data, .v = data + half, .page_bytes = 2 * half, .head_bytes = half, .n_kv_heads = 1, .head_dim = hd, .group = group, .scale = 0.1f};
	double		seconds[ROUNDS];

	for (int i = 0; i < n_pages; i++)
		pages[i] = i;
	for (int r = 0; r < ROUNDS; r++)
	{
		double		start = now();

		for (int i = 0; i < 50; i++)
			k->attention(y, q, &kv, pages, n_positions - 1, 0);
		seconds[r] = (now() - start) / 50;
	}
	printf("  attention %4d positions%s, %d heads of %d: %7.2f us, %5.1f GFLOP/s\n", n_positions, k->dtype == MILLM_INT8 ? " in int8" : "", group, hd, median(seconds) * 1e6,
		   4.0 * n_positions * group * hd / median(seconds) / 1e9);
	free(pages);
	free(q);
	free(y);
}

int
main(int argc, char **argv)
{
	MillmKernels k;
	bool		is_known;
	char	   *data = aligned_alloc(4096, BIG_BYTES);

	if (!millm_kernels_init(&k, argc > 1 ? argv[1] : NULL, &is_known))
		return fprintf(stderr, "no such kernels here\n"), 1;
	memset(data, 0, BIG_BYTES);
	printf("%s, one core; plain read %.1f GB/s\n", k.variant, BIG_BYTES / read_seconds(data, BIG_BYTES) / 1e9);
	bench_read(&k, MILLM_BF16, 576, false, "bf16 one token", data);
	bench_read(&k, MILLM_BF16, 2048, false, "bf16 one token", data);
	bench_read(&k, MILLM_F16, 2048, false, "f16 one token", data);
	bench_read(&k, MILLM_F32, 2048, false, "f32 one token", data);
	bench_read(&k, MILLM_F32, 768, true, "f32 [in, out] one token", data);
	for (int64_t n_in = 576; n_in <= 8192; n_in = n_in == 576 ? 1536 : n_in == 1536 ? 2048 : n_in * 4)
	{
		bench_gemm(&k, MILLM_FORM_BF16, MILLM_BF16, false, n_in, 252, "bf16 form, bf16", data);
		bench_gemm(&k, MILLM_FORM_BF16_TILES, MILLM_BF16, false, n_in, 256, "tiles, bf16", data);
		bench_gemm(&k, MILLM_FORM_F32, MILLM_BF16, false, n_in, 252, "f32 form, bf16", data);
	}
	bench_gemm(&k, MILLM_FORM_F32, MILLM_F32, true, 768, 252, "f32 [in, out]", data);
	bench_forms(&k, MILLM_4BIT, 2048, "4-bit", data);
	bench_forms(&k, MILLM_4BIT, 576, "4-bit", data);
	bench_forms(&k, MILLM_INT8, 2048, "int8", data);
	bench_forms(&k, MILLM_BF16, 2048, "bf16", data);
	bench_forms(&k, MILLM_F16, 2048, "f16", data);
	for (int f = 0; f < MILLM_N_KV_FORMATS; f++)
	{
		bench_attention(&k.kv[f], 512, 3, 64, data);
		bench_attention(&k.kv[f], 2048, 4, 64, data);
		bench_attention(&k.kv[f], 32768, 4, 128, data);
	}
	free(data);
	return 0;
}
