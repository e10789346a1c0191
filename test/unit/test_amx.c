/*
 * test_amx.c -- the matmuls of MILLM_FORM_BF16_TILES: over emulated tiles (amx_emulated.c) wherever there is AVX-512 with BF16, VNNI and
 * VBMI, and over real ones where this CPU has them.  Elsewhere the tests say that they skip.
 *
 * The judge is a sum in double of the very bfloat16 values that are multiplied, so that only the roundings of float32 sums are left to
 * tolerate: EPSILON * sqrt(n) * sum |w x| at the worst element.  Every tensor is an exact allocation that begins unaligned; what is not to be read
 * or written is NaN, or asserted unchanged.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "kernel.h"
#include "quant.h"

#define EPSILON_F32	1.2e-7
#define TINY		1e-30			/* denormals are flushed, as factors and as sums: 1e-38, times what they meet */

extern void millm_kernels_amx_emulated(MillmKernels *k);

typedef enum Kind {ORDINARY, OUTLIER, ZEROS, DENORMALS, N_KINDS} Kind;
static const char *const kind_name[] = {"ordinary", "outlier", "zeros", "denormals"};

/* What stands beside the product. */
typedef enum Extra {BIAS = 1, ACCUMULATE = 2, ROW_SCALE = 4, N_EXTRAS = 8} Extra;

typedef struct Shape
{
	MillmDtype	dtype;
	int64_t		n_in, n_out;
	/* 4BIT */
	int64_t		first;
	int			block_size, nested_block_size;
	bool		is_fp4;
	MillmDtype	rounded;
} Shape;

/* A weight, each of its tensors an allocation that it owns. */
typedef struct Stored
{
	MillmWeight w;
	char	   *data, *absmax, *nested, *scale;
	float		map[256];
} Stored;

static uint64_t seed = 1;

static float
uniform(void)					/* [-1, 1) */
{
	seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
	return (float) (int32_t) (seed >> 32) / 2147483648.0f;
}

static void
fill(float *x, int64_t n, Kind kind)
{
	for (int64_t i = 0; i < n; i++)
		x[i] = kind == ZEROS ? 0 : kind == DENORMALS ? uniform() * 1e-39f : uniform();
	if (kind == OUTLIER && n > 0)
		x[n / 2] = 1000;
}

static char *
random_bytes(int64_t n)
{
	char	   *p = malloc((size_t) n + 1);

	for (int64_t i = 0; i <= n; i++)
		p[i] = (char) (uniform() * 128);
	return p;
}

static char *
random_scales(int64_t n)
{
	char	   *p = malloc((size_t) n * 4 + 1);

	for (int64_t i = 0; i < n; i++)
	{
		float		f = 0.02f + 0.01f * uniform();

		memcpy(p + 1 + 4 * i, &f, 4);
	}
	return p;
}

static void
make_weight(Stored *s, const Shape *c, Kind kind)
{
	int64_t		n = c->first + c->n_in * c->n_out;

	memset(s, 0, sizeof(*s));
	s->w = (MillmWeight) {.dtype = c->dtype, .n_out = c->n_out, .n_in = c->n_in, .stride = c->n_in};
	if (c->dtype == MILLM_BF16)
	{
		s->w.stride = c->n_in + 3;		/* a slice of a fused tensor, whose last row ends the file; NaNs between */
		n = (c->n_out - 1) * s->w.stride + c->n_in;
		s->data = malloc((size_t) n * 2 + 1);
		memset(s->data, 0xFF, (size_t) n * 2 + 1);
		for (int64_t o = 0; o < c->n_out; o++)
			for (int64_t i = 0; i < c->n_in; i++)
			{
				uint16_t	h = millm_f32_to_bf16(kind == ZEROS ? 0 : kind == DENORMALS && i % 2 ? uniform() * 1e-39f : uniform());

				memcpy(s->data + 1 + 2 * (o * s->w.stride + i), &h, 2);
			}
	}
	else if (c->dtype == MILLM_INT8)
	{
		s->data = random_bytes(n);
		s->scale = random_scales(c->n_out);
		s->w.scale = s->scale + 1;
	}
	else
	{
		int64_t		n_blocks = (n + c->block_size - 1) / c->block_size;

		s->data = random_bytes((n + 1) / 2);
		s->w.codebook = c->is_fp4 ? millm_fp4_codebook : millm_nf4_codebook;
		s->w.first = c->first;
		s->w.block_size = c->block_size;
		s->w.nested_block_size = c->nested_block_size;
		s->w.rounded = c->rounded;
		s->absmax = c->nested_block_size ? random_bytes(n_blocks) : random_scales(n_blocks);
		if (c->nested_block_size)
		{
			s->nested = random_scales((n_blocks + c->nested_block_size - 1) / c->nested_block_size);
			millm_dynamic_map(s->map);
			s->w.nested_absmax = s->nested + 1;
			s->w.nested_map = s->map;
			s->w.nested_offset = 0.03f;
		}
		else
			memset(s->absmax + 1, 0, 4);	/* a block of zeros */
		s->w.absmax = s->absmax + 1;
	}
	s->w.data = s->data + 1;
}

static void
free_weight(Stored *s)
{
	free(s->data);
	free(s->absmax);
	free(s->nested);
	free(s->scale);
}

/* y[n_in] = the values of row o that a tile gets, and the factor of their sum. */
static double
tile_row(float *y, const MillmWeight *w, int64_t o)
{
	MillmWeight exact = *w;

	if (w->dtype == MILLM_INT8)
	{
		float		scale;

		for (int64_t i = 0; i < w->n_in; i++)
			y[i] = ((const int8_t *) w->data)[o * w->n_in + i];
		memcpy(&scale, (const char *) w->scale + o * 4, 4);
		return (double) scale / 127;
	}
	exact.rounded = MILLM_F32;		/* a tile has bfloat16, whatever bitsandbytes rounds to */
	millm_weight_decode(y, &exact, o, 0, w->n_in);
	for (int64_t i = 0; i < w->n_in; i++)
		y[i] = millm_bf16_to_f32(millm_f32_to_bf16(y[i]));
	return 1;
}

/* Every group of the n_tokens rows x [n_in]; what pack_tiles() leaves out are NaNs.  The caller frees. */
static char *
pack(const MillmKernels *k, const float *x, int64_t n_in, int n_tokens, int64_t stride)
{
	int			n_groups = (n_tokens + MILLM_TILE_TOKENS - 1) / MILLM_TILE_TOKENS;
	size_t		bytes = (size_t) (n_groups * MILLM_TILE_TOKENS * stride);
	char	   *packed = aligned_alloc(64, bytes);

	memset(packed, 0xFF, bytes);
	for (int g = 0; g < n_groups; g++)
	{
		int			t = g * MILLM_TILE_TOKENS;

		k->pack_group[MILLM_FORM_BF16_TILES](packed + t * stride, x + t * n_in, n_in, n_tokens - t < MILLM_TILE_TOKENS ? n_tokens - t : MILLM_TILE_TOKENS, n_in);
	}
	return packed;
}

/* Outputs in pieces of at most step; one that begins anywhere. */
static void
run(const MillmKernels *k, const MillmMatmul *m, int64_t step)
{
	for (int64_t o = 0; o < m->w->n_out; o += step)
		k->matmul[MILLM_FORM_BF16_TILES][m->w->dtype][0] (m, o, o + step < m->w->n_out ? o + step : m->w->n_out);
}

static void
one_matmul(const MillmKernels *k, const Shape *c, int n_tokens, Kind kind, unsigned extra)
{
	Stored		s;
	const int64_t n = c->n_in, y_stride = c->n_out + 5;
	const int64_t stride = millm_form_row_bytes(MILLM_FORM_BF16_TILES, n) + 64;	/* rows of a wider buffer */
	float	   *x = malloc(sizeof(float) * (size_t) (n_tokens * n + 1));
	float	   *y = malloc(sizeof(float) * (size_t) (n_tokens * y_stride));
	float	   *again = malloc(sizeof(float) * (size_t) (n_tokens * y_stride));
	float	   *bias = malloc(sizeof(float) * (size_t) c->n_out);
	float	   *row_scale = malloc(sizeof(float) * (size_t) c->n_out);
	float	   *row = malloc(sizeof(float) * (size_t) n);
	char	   *packed;
	MillmMatmul m = {.y = y, .y_stride = y_stride, .w = &s.w, .bias = extra & BIAS ? bias : NULL, .row_scale = extra & ROW_SCALE ? row_scale : NULL,
		.accumulate = extra & ACCUMULATE, .form = MILLM_FORM_BF16_TILES, .x_stride = stride, .n_tokens = n_tokens};

	make_weight(&s, c, kind);
	for (int t = 0; t < n_tokens; t++)
		fill(x + 1 + t * n, n, kind);
	fill(bias, c->n_out, ORDINARY);
	fill(row_scale, c->n_out, ORDINARY);
	for (int64_t i = 0; i < n_tokens * y_stride; i++)
		y[i] = again[i] = extra & ACCUMULATE || i % y_stride >= c->n_out ? 0.25f : NAN;
	m.x = packed = pack(k, x + 1, n, n_tokens, stride);
	run(k, &m, c->n_out);

	for (int64_t o = 0; o < c->n_out; o++)
	{
		double		factor = tile_row(row, &s.w, o) * (extra & ROW_SCALE ? row_scale[o] : 1);

		for (int t = 0; t < n_tokens; t++)
		{
			double		sum = 0, absolute = 0, tolerance;
			float		got = y[t * y_stride + o];

			for (int64_t i = 0; i < n; i++)
			{
				double		p = factor * row[i] * millm_bf16_to_f32(millm_f32_to_bf16(x[1 + t * n + i]));

				sum += p;
				absolute += fabs(p);
			}
			sum += (extra & BIAS ? bias[o] : 0) + (extra & ACCUMULATE ? 0.25 : 0);
			tolerance = EPSILON_F32 * (sqrt((double) n) + 4) * absolute + (extra & (BIAS | ACCUMULATE) ? 4 * EPSILON_F32 * (fabs(sum) + 1) : 0) + TINY;
			if (!(fabs(got - sum) <= tolerance))
				fail_msg("dtype %d n_in %ld n_out %ld first %ld block %d nested %d n_tokens %d %s extra %u: y[%d, %ld] = %.9g, expected %.9g, tolerance %.3g",
						 c->dtype, (long) n, (long) c->n_out, (long) c->first, c->block_size, c->nested_block_size, n_tokens, kind_name[kind],
						 extra, t, (long) o, got, sum, tolerance);
		}
	}
	for (int t = 0; t < n_tokens; t++)
		for (int64_t o = c->n_out; o < y_stride; o++)
			assert_true(y[t * y_stride + o] == 0.25f);

	/* the same bits when the outputs are cut otherwise, and when the last tokens are alone */
	m.y = again;
	run(k, &m, 37);
	assert_memory_equal(again, y, sizeof(float) * (size_t) (n_tokens * y_stride));
	free(packed);
	m.n_tokens = (n_tokens + 4) / 5;
	m.x = packed = pack(k, x + 1 + (n_tokens - m.n_tokens) * n, n, m.n_tokens, stride);
	for (int64_t i = 0; i < m.n_tokens * y_stride; i++)
		again[i] = 0.25f;
	run(k, &m, c->n_out);
	assert_memory_equal(again, y + (n_tokens - m.n_tokens) * y_stride, sizeof(float) * (size_t) (m.n_tokens * y_stride));

	free_weight(&s);
	free(x);
	free(y);
	free(again);
	free(bias);
	free(row_scale);
	free(row);
	free(packed);
}

/* Fills k with the tables to test; returns how many, 0 on a CPU that cannot run what lies around the tiles. */
static int
tables(MillmKernels k[2])
{
	const unsigned need = MILLM_CPU_AVX512 | MILLM_CPU_AVX512_BF16 | MILLM_CPU_AVX512_VNNI;
	bool		is_known;

	if ((millm_cpu_flags() & need) != need)
		return 0;
	assert_true(millm_kernels_init(&k[0], "avx512", &is_known));
	millm_kernels_amx_emulated(&k[0]);
	return millm_kernels_init(&k[1], "amx", &is_known) ? 2 : 1;
}

/* Every form of weight, with few tokens in all numbers and with more than the kernels take at a time. */
static void
test_matmul(void **state)
{
	/* one tile and less, tails in both directions, more than DEPTH values and ROWS outputs */
	static const Shape shapes[] = {
		{MILLM_BF16, 1, 1, 0, 0, 0, false, MILLM_F32}, {MILLM_BF16, 31, 15, 0, 0, 0, false, MILLM_F32}, {MILLM_BF16, 32, 32, 0, 0, 0, false, MILLM_F32},
		{MILLM_BF16, 33, 17, 0, 0, 0, false, MILLM_F32}, {MILLM_BF16, 64, 33, 0, 0, 0, false, MILLM_F32}, {MILLM_BF16, 100, 64, 0, 0, 0, false, MILLM_F32},
		{MILLM_BF16, 576, 47, 0, 0, 0, false, MILLM_F32}, {MILLM_BF16, 1024, 40, 0, 0, 0, false, MILLM_F32}, {MILLM_BF16, 2070, 33, 0, 0, 0, false, MILLM_F32},
		{MILLM_BF16, 96, 290, 0, 0, 0, false, MILLM_F32},
		{MILLM_INT8, 1, 1, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 31, 17, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 64, 32, 0, 0, 0, false, MILLM_F32},
		{MILLM_INT8, 131, 83, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 1030, 33, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 64, 290, 0, 0, 0, false, MILLM_F32},
		/* nested and plain, every size of block, blocks and nested groups that straddle rows, slices */
		{MILLM_4BIT, 64, 5, 0, 64, 256, false, MILLM_BF16}, {MILLM_4BIT, 192, 37, 0, 64, 0, false, MILLM_F32}, {MILLM_4BIT, 320, 33, 192, 128, 256, false, MILLM_BF16},
		{MILLM_4BIT, 576, 41, 576 * 3, 64, 256, false, MILLM_BF16}, {MILLM_4BIT, 448, 16, 64, 256, 64, true, MILLM_F16}, {MILLM_4BIT, 1088, 32, 0, 64, 256, false, MILLM_F16},
		{MILLM_4BIT, 128, 49, 128 * 5, 512, 0, false, MILLM_BF16}, {MILLM_4BIT, 832, 31, 64 * 7, 1024, 128, false, MILLM_BF16},
		{MILLM_4BIT, 2112, 17, 0, 2048, 256, true, MILLM_F32}, {MILLM_4BIT, 704, 48, 704, 4096, 0, false, MILLM_F32}, {MILLM_4BIT, 64, 290, 64, 4096, 256, false, MILLM_BF16},
	};
	MillmKernels k[2];
	int			n = tables(k);

	(void) state;
	if (n == 0)
		skip();
	for (int v = 0; v < n; v++)
		for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
		{
			for (int t = 1 + (int) (i % 3); t <= 40; t += 3)
				one_matmul(&k[v], &shapes[i], t, (i + (size_t) t) % N_KINDS, (unsigned) (i + (size_t) t) % N_EXTRAS);
			if (i % 4 == 1 || shapes[i].n_out > 256)
				one_matmul(&k[v], &shapes[i], 300, ORDINARY, BIAS | ACCUMULATE);
		}
}

/* The packed form is what kernel.h says, to the last zero. */
static void
test_pack(void **state)
{
	static const int64_t sizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 64, 100};
	MillmKernels k[2];

	(void) state;
	if (tables(k) == 0)
		skip();
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
		for (int n_tokens = 1; n_tokens <= MILLM_TILE_TOKENS; n_tokens++)
		{
			const int64_t n = sizes[s], stride = millm_form_row_bytes(MILLM_FORM_BF16_TILES, n);
			float	   *x = malloc(sizeof(float) * (size_t) (n_tokens * n));
			uint16_t   *packed;

			fill(x, n_tokens * n, ORDINARY);
			packed = (uint16_t *) pack(&k[0], x, n, n_tokens, stride);
			for (int64_t at = 0; at < MILLM_TILE_TOKENS * stride / 2; at++)
			{
				int64_t		i = at / 512 * 32 + at % 512 / 32 * 2 + at % 2;
				int64_t		t = at % 32 / 2;

				assert_int_equal(packed[at], t < n_tokens && i < n ? millm_f32_to_bf16(x[t * n + i]) : 0);
			}
			free(x);
			free(packed);
		}
}

/* Tiles are for many tokens and for rows that they can read; everything else goes where it went. */
static void
test_choice(void **state)
{
	const MillmWeight bf16 = {.dtype = MILLM_BF16, .n_in = 576, .n_out = 32, .stride = 576};
	const MillmWeight int8 = {.dtype = MILLM_INT8, .n_in = 577, .n_out = 32, .stride = 577};
	const MillmWeight blocky = {.dtype = MILLM_4BIT, .n_in = 576, .n_out = 32, .block_size = 64, .nested_block_size = 256};
	MillmWeight other;
	MillmKernels k[2];

	(void) state;
	if (tables(k) == 0)
		skip();
	assert_string_equal(k[0].variant, "amx");
	for (int n = 1; n <= 300; n++)
	{
		const MillmWeight *const weights[] = {&bf16, &blocky, &int8};

		for (int i = 0; i < 3; i++)
		{
			const MillmForm form = k[0].best_form(weights[i], n);

			assert_int_equal(form == MILLM_FORM_BF16_TILES, n >= 8);
			assert_non_null(k[0].matmul[form][weights[i]->dtype][0]);
		}
		other = blocky;
		other.first = 32;
		assert_int_equal(k[0].best_form(&other, n), MILLM_FORM_F32);
		other.first = 0;
		other.block_size = 32;
		assert_int_equal(k[0].best_form(&other, n), MILLM_FORM_F32);
		other = bf16;
		other.in_out = true;
		assert_int_equal(k[0].best_form(&other, n), MILLM_FORM_F32);
		other = bf16;
		other.dtype = MILLM_F16;
		assert_int_not_equal(k[0].best_form(&other, n), MILLM_FORM_BF16_TILES);
	}
}

/* The variant runs on a CPU that the kernel, too, says has it, and on no other. */
static void
test_only_where_there_are_tiles(void **state)
{
	FILE	   *f = fopen("/proc/cpuinfo", "r");
	char		line[8192];
	bool		is_there = false,
				is_known;
	MillmKernels k;

	(void) state;
	if (!f)
		skip();
	while (!is_there && fgets(line, sizeof(line), f))
		is_there = strncmp(line, "flags", 5) == 0 && strstr(line, " amx_tile") && strstr(line, " amx_bf16");
	fclose(f);
	if (millm_kernels_init(&k, "amx", &is_known))
	{
		assert_true(is_there);
		assert_true(millm_cpu_flags() & MILLM_CPU_AMX);
		return;
	}
	assert_true(is_known);
	assert_false(millm_cpu_flags() & MILLM_CPU_AMX);
	assert_true(millm_kernels_init(&k, NULL, &is_known));
	assert_string_not_equal(k.variant, "amx");
	assert_null(k.pack_group[MILLM_FORM_BF16_TILES]);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_matmul),
		cmocka_unit_test(test_pack),
		cmocka_unit_test(test_choice),
		cmocka_unit_test(test_only_where_there_are_tiles),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
