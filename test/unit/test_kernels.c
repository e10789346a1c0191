/*
 * test_kernels.c -- every variant that this machine can run, against ref.
 *
 * Shapes are chosen for their tails, pointers are unaligned, and the values are those that real
 * weights contain: ordinary ones, one huge outlier, all zeros, denormals.  ref itself is compared with sums
 * in double.
 *
 * A tolerance is EPSILON * sqrt(n) * sum |w x| at the worst element, plus what a format rounds away; it is
 * printed with variant, shape and kind when exceeded.
 *
 * The matmuls of MILLM_FORM_BF16_TILES are test_amx's.
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

#define EPSILON_F32		1.2e-7		/* of float32 */
#define EPSILON_BF16	0x1p-8		/* rounding an activation to bfloat16 */
#define EPSILON_F16		0x1p-11		/* rounding K and V to float16 */

typedef enum Kind {ORDINARY, OUTLIER, ZEROS, DENORMALS, N_KINDS} Kind;
static const char *const kind_name[] = {"ordinary", "outlier", "zeros", "denormals"};
static const char *const dtype_name[] = {"f32", "f16", "bf16"};

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

/* Variants other than ref that run here: fills names, returns how many. */
static int
variants(MillmKernels *out)
{
	int			n = 0;
	bool		is_known;

	for (const char *const *name = millm_kernels_names(); *name; name++)
		if (strcmp(*name, "ref") != 0 && millm_kernels_init(&out[n], *name, &is_known))
			n++;
	return n;
}

static double
weight_at(const MillmWeight *w, int64_t row, int64_t column)
{
	const char *p = millm_weight_row(w, row) + column * millm_weight_bytes(w->dtype, 1);
	uint16_t	h;
	float		f;

	if (w->dtype == MILLM_F32)
	{
		memcpy(&f, p, sizeof(f));
		return f;
	}
	memcpy(&h, p, sizeof(h));
	return w->dtype == MILLM_F16 ? millm_f16_to_f32(h) : millm_bf16_to_f32(h);
}

/* packed: n_tokens rows x [n], x_stride floats apart, in a packed form */
static void
pack(const MillmKernels *k, MillmForm form, char *packed, int64_t stride, const float *x, int64_t x_stride, int n_tokens, int64_t n)
{
	const int	width = millm_form_group(form);

	for (int t = 0; t < n_tokens; t += width)
		if (width == 1)
			k->pack[form] (packed + t * stride, x + t * x_stride, n);
		else
			k->pack_group[form] (packed + t * stride, x + t * x_stride, x_stride, n_tokens - t < width ? n_tokens - t : width, n);
}

static float
largest_of(const float *x, int64_t n)
{
	float		max = 0;

	for (int64_t i = 0; i < n; i++)
		max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
	return max;
}

/* What MILLM_FORM_I16_TILES may lose in 64 products: half a unit of each value, and of each weight. */
static double
tiles_tolerance(const MillmWeight *w, int64_t o, int64_t i, const float *x)
{
	const double unit = w->dtype == MILLM_INT8 ? 0 : w->dtype == MILLM_4BIT ? 1.0 / 4095 : 1.0 / 2048;
	float		row[64];
	double		sum_x = 0, sum_w = 0;

	millm_weight_decode(row, w, o, i, 64);
	for (int j = 0; j < 64; j++)
	{
		sum_x += fabsf(x[j]);
		sum_w += fabsf(row[j]);
	}
	return 0.51 * (unit * largest_of(row, 64) * sum_x + largest_of(x, 64) / 8191 * sum_w);
}

static void
one_matmul(const MillmKernels *k, MillmForm form, MillmDtype dtype, bool in_out, int64_t n_in, int64_t n_out, int n_tokens, Kind kind)
{
	const int64_t stored_rows = in_out ? n_in : n_out;
	const int64_t stride = (in_out ? n_out : n_in) + 3;
	const int	size = millm_weight_bytes(dtype, 1);
	char	   *bytes = malloc((size_t) (stored_rows * stride * size) + 1);
	float	   *x = malloc(sizeof(float) * (size_t) (n_tokens * n_in + 1));
	int64_t		packed_stride = form == MILLM_FORM_F32 ? n_in * 4 : millm_form_row_bytes(form, n_in);
	char	   *packed = aligned_alloc(64, (size_t) (packed_stride + 63) / 64 * 64 * (size_t) n_tokens);
	float	   *y = malloc(sizeof(float) * (size_t) (n_tokens * (n_out + 5)));
	float	   *bias = malloc(sizeof(float) * (size_t) n_out);
	MillmWeight w = {.dtype = dtype, .in_out = in_out, .n_out = n_out, .n_in = n_in, .stride = stride, .data = bytes + 1};
	MillmMatmul m = {.y = y, .y_stride = n_out + 5, .w = &w, .bias = bias, .accumulate = true, .form = form,
		.x = form == MILLM_FORM_F32 ? (char *) (x + 1) : packed, .x_stride = packed_stride, .n_tokens = n_tokens};
	int64_t		cut = n_out / 3;

	for (int64_t i = 0; i < stored_rows * stride; i++)
	{
		float		f = uniform() * (kind == DENORMALS ? 1e-6f : kind == OUTLIER && i % 97 == 0 ? 1000 : 1);
		uint16_t	h = dtype == MILLM_F16 ? millm_f32_to_f16(f) : millm_f32_to_bf16(f);

		memcpy(bytes + 1 + i * size, dtype == MILLM_F32 ? (void *) &f : (void *) &h, (size_t) size);
	}
	for (int t = 0; t < n_tokens; t++)
		fill(x + 1 + t * n_in, n_in, kind);
	if (form != MILLM_FORM_F32)
		pack(k, form, packed, packed_stride, x + 1, n_in, n_tokens, n_in);
	fill(bias, n_out, ORDINARY);
	for (int64_t i = 0; i < n_tokens * (n_out + 5); i++)
		y[i] = 0.25f;

	k->matmul[form][dtype][in_out] (&m, 0, cut);
	k->matmul[form][dtype][in_out] (&m, cut, n_out);

	for (int t = 0; t < n_tokens; t++)
	{
		for (int64_t o = 0; o < n_out; o++)
		{
			double		sum = 0,
						absolute = 0,
						tolerance;
			float		got = y[t * (n_out + 5) + o];

			for (int64_t i = 0; i < n_in; i++)
			{
				double		p = (in_out ? weight_at(&w, i, o) : weight_at(&w, o, i)) * x[1 + t * n_in + i];

				sum += p;
				absolute += fabs(p);
			}
			sum += (double) bias[o] + 0.25;
			tolerance = (EPSILON_F32 * sqrt((double) n_in) + (form == MILLM_FORM_BF16 ? EPSILON_BF16 : 0)) * absolute +
				4 * EPSILON_F32 * (fabs(sum) + 1);
			for (int64_t i = 0; i < n_in && form == MILLM_FORM_I16_TILES; i += 64)
				tolerance += tiles_tolerance(&w, o, i, x + 1 + t * n_in + i);
			if (!(fabs(got - sum) <= tolerance))
				fail_msg("%s %s form %d in_out %d, n_in %ld n_out %ld n_tokens %d %s: y[%d, %ld] = %.9g, expected %.9g, tolerance %.3g",
						 k->variant, dtype_name[dtype], form, in_out, (long) n_in, (long) n_out, n_tokens, kind_name[kind], t, (long) o,
						 got, sum, tolerance);
		}
		for (int64_t o = n_out; o < n_out + 5; o++)
			assert_true(y[t * (n_out + 5) + o] == 0.25f);	/* nothing is written past the outputs */
	}
	free(bytes);
	free(x);
	free(packed);
	free(y);
	free(bias);
}

static void
test_matmul(void **state)
{
	static const int64_t shapes[][2] = {{1, 1}, {7, 3}, {8, 5}, {15, 16}, {16, 17}, {31, 63}, {32, 64}, {33, 65}, {37, 32}, {64, 37}, {65, 96}, {131, 83}, {576, 41}, {1088, 35}};
	static const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 11, 13};
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	for (int v = 0; v < n; v++)
		for (int form = 0; form < MILLM_N_FORMS; form++)
			for (int dtype = 0; dtype < MILLM_N_FLOAT_DTYPES; dtype++)
				for (int in_out = 0; in_out < 2; in_out++)
				{
					if (!k[v].matmul[form][dtype][in_out] || form == MILLM_FORM_BF16_TILES)
						continue;
					for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
						for (size_t t = 0; t < sizeof(tokens) / sizeof(tokens[0]) && (form != MILLM_FORM_I16_TILES || shapes[s][0] % 64 == 0); t++)
							one_matmul(&k[v], form, dtype, in_out, shapes[s][0], shapes[s][1], tokens[t], (s + t) % N_KINDS);
				}
}

/* ---- quantized weights ---- */

typedef struct QuantCase
{
	MillmDtype	dtype;
	int64_t		n_in, n_out, first;
	int			block_size, nested_block_size;
	bool		is_fp4;
	MillmDtype	rounded;
} QuantCase;

/* A weight of random bytes, each tensor an exact allocation whose begin is unaligned, so that the address sanitizer sees any byte too far. */
typedef struct Quantized
{
	MillmWeight w;
	char	   *data, *absmax, *nested, *scale;
	_Alignas(64) float map[256];
} Quantized;

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
make_quantized(Quantized *q, const QuantCase *c)
{
	int64_t		n = c->first + c->n_in * c->n_out;

	memset(q, 0, sizeof(*q));
	q->w = (MillmWeight) {.dtype = c->dtype, .n_out = c->n_out, .n_in = c->n_in, .stride = c->n_in};
	if (c->dtype == MILLM_INT8)
	{
		q->data = random_bytes(n);
		q->scale = random_scales(c->n_out);
		q->w.scale = q->scale + 1;
	}
	else
	{
		int64_t		n_blocks = (n + c->block_size - 1) / c->block_size;

		q->data = random_bytes((n + 1) / 2);
		q->w.codebook = c->is_fp4 ? millm_fp4_codebook : millm_nf4_codebook;
		q->w.first = c->first;
		q->w.block_size = c->block_size;
		q->w.rounded = c->rounded;
		q->w.nested_block_size = c->nested_block_size;
		q->absmax = c->nested_block_size ? random_bytes(n_blocks) : random_scales(n_blocks);
		if (c->nested_block_size)
		{
			q->nested = random_scales((n_blocks + c->nested_block_size - 1) / c->nested_block_size);
			millm_dynamic_map(q->map);
			q->w.nested_absmax = q->nested + 1;
			q->w.nested_map = q->map;
			q->w.nested_offset = 0.03f;
		}
		q->w.absmax = q->absmax + 1;
	}
	q->w.data = q->data + 1;
}

static void
free_quantized(Quantized *q)
{
	free(q->data);
	free(q->absmax);
	free(q->nested);
	free(q->scale);
}

static void
one_quantized(const MillmKernels *k, MillmForm form, const QuantCase *c, int n_tokens, Kind kind)
{
	Quantized	q;
	const int64_t n = c->n_in, y_stride = c->n_out + 5;
	float	   *x = malloc(sizeof(float) * (size_t) (n_tokens * n + 1));
	float	   *y = malloc(sizeof(float) * (size_t) (n_tokens * y_stride));
	float	   *bias = malloc(sizeof(float) * (size_t) c->n_out);
	float	   *row = malloc(sizeof(float) * (size_t) n);
	int64_t		packed_stride = millm_form_row_bytes(form, n);
	char	   *packed = aligned_alloc(64, (size_t) (packed_stride * n_tokens));
	char	   *packed_alone = aligned_alloc(64, (size_t) packed_stride);
	MillmMatmul m = {.y = y, .y_stride = y_stride, .bias = bias, .accumulate = true, .form = form, .n_tokens = n_tokens,
		.x = form == MILLM_FORM_F32 ? (char *) (x + 1) : packed, .x_stride = form == MILLM_FORM_F32 ? n * 4 : packed_stride};
	int64_t		cut = c->n_out / 3;
	const bool	is_i16 = form == MILLM_FORM_I16 || form == MILLM_FORM_I16_NIBBLES;
	const double codebook_max = strcmp(k->variant, "avx2") == 0 ? 8191 : 4095;	/* of MILLM_FORM_I16_NIBBLES, as int16 */

	make_quantized(&q, c);
	m.w = &q.w;
	for (int t = 0; t < n_tokens; t++)
		fill(x + 1 + t * n, n, kind);
	if (form != MILLM_FORM_F32)
		pack(k, form, packed, packed_stride, x + 1, n, n_tokens, n);
	fill(bias, c->n_out, ORDINARY);
	for (int64_t i = 0; i < n_tokens * y_stride; i++)
		y[i] = 0.25f;
	k->matmul[form][c->dtype][0] (&m, 0, cut);
	k->matmul[form][c->dtype][0] (&m, cut, c->n_out);

	for (int64_t o = 0; o < c->n_out; o++)
	{
		millm_weight_decode(row, &q.w, o, 0, n);
		for (int t = 0; t < n_tokens; t++)
		{
			const float *xt = x + 1 + t * n;
			double		sum = (double) bias[o] + 0.25, absolute = 0, tolerance = 0;
			float		got = y[t * y_stride + o];

			for (int64_t i = 0; i < n; i++)
			{
				double		p = (double) row[i] * xt[i];

				sum += p;
				absolute += fabs(p);
			}
			/* half a unit of the int16 activation, and of the int16 codebook */
			if (is_i16)
			{
				const float largest = largest_of(xt, n);

				for (int64_t i = 0; i < n; i++)
					tolerance += 0.5 / 32767 * largest * fabsf(row[i]);
			}
			for (int64_t i = 0; i < n && form == MILLM_FORM_I16_NIBBLES; i += 64)
				for (int64_t j = i; j < i + 64; j++)
					tolerance += 0.6 / codebook_max * largest_of(row + i, 64) * fabsf(xt[j]);
			for (int64_t i = 0; i < n && form == MILLM_FORM_I16_TILES; i += 64)
				tolerance += tiles_tolerance(&q.w, o, i, xt + i);
			/* what the judge itself rounds to, and the fast paths need not */
			tolerance += (form == MILLM_FORM_BF16 || form == MILLM_FORM_BF16_NIBBLES ? 2 * EPSILON_BF16 : 0) * absolute;
			tolerance += (c->dtype == MILLM_INT8 ? 0 : c->rounded == MILLM_BF16 ? EPSILON_BF16 : c->rounded == MILLM_F16 ? EPSILON_F16 : 0) * absolute;
			tolerance += EPSILON_F32 * sqrt((double) n) * absolute + 4 * EPSILON_F32 * (fabs(sum) + 1);
			if (!(fabs(got - sum) <= tolerance))
				fail_msg("%s %s form %d, n_in %ld n_out %ld first %ld block %d nested %d n_tokens %d %s: y[%d, %ld] = %.9g, expected %.9g, tolerance %.3g",
						 k->variant, c->dtype == MILLM_INT8 ? "int8" : "4bit", form, (long) n, (long) c->n_out, (long) c->first, c->block_size,
						 c->nested_block_size, n_tokens, kind_name[kind], t, (long) o, got, sum, tolerance);
		}
	}
	for (int t = 0; t < n_tokens; t++)
		for (int64_t o = c->n_out; o < y_stride; o++)
			assert_true(y[t * y_stride + o] == 0.25f);
	/* each token alone, and the outputs cut otherwise, has the same bits */
	if (form == MILLM_FORM_F32 || form == MILLM_FORM_I16_TILES || is_i16 || n_tokens > 1)
		for (int t = 0; t < n_tokens; t++)
		{
			float	   *alone = malloc(sizeof(float) * (size_t) y_stride);
			MillmMatmul single = m;

			for (int64_t o = 0; o < y_stride; o++)
				alone[o] = 0.25f;
			single.y = alone;
			single.n_tokens = 1;
			single.x = (const char *) m.x + t * m.x_stride;
			if (form == MILLM_FORM_I16_TILES)
			{
				single.x = packed_alone;
				pack(k, form, packed_alone, packed_stride, x + 1 + t * n, n, 1, n);
			}
			for (int64_t o = 0; o < c->n_out; o += 7)
				k->matmul[form][c->dtype][0] (&single, o, o + 7 < c->n_out ? o + 7 : c->n_out);
			if (memcmp(alone, y + t * y_stride, sizeof(float) * (size_t) c->n_out) != 0)
				fail_msg("%s %s form %d n_in %ld: token %d has other bits alone", k->variant, c->dtype == MILLM_INT8 ? "int8" : "4bit", form, (long) n, t);
			free(alone);
		}
	free_quantized(&q);
	free(x);
	free(y);
	free(bias);
	free(row);
	free(packed);
	free(packed_alone);
}

static void
test_quantized(void **state)
{
	static const QuantCase cases[] = {
		/* blocky: one and a half blocks of 128, a nested group that ends within a row, a slice, plain scales, larger blocks, FP4 */
		{MILLM_4BIT, 64, 5, 0, 64, 256, false, MILLM_BF16}, {MILLM_4BIT, 192, 37, 0, 64, 256, false, MILLM_BF16},
		{MILLM_4BIT, 128, 17, 0, 64, 0, false, MILLM_F32}, {MILLM_4BIT, 576, 41, 576 * 3, 64, 256, false, MILLM_BF16},
		{MILLM_4BIT, 4160, 9, 64, 64, 256, false, MILLM_F16}, {MILLM_4BIT, 320, 13, 0, 128, 256, false, MILLM_BF16},
		{MILLM_4BIT, 448, 11, 192, 4096, 0, false, MILLM_F32}, {MILLM_4BIT, 256, 8, 0, 64, 64, true, MILLM_BF16},
		{MILLM_4BIT, 1024, 7, 64 * 5, 64, 128, true, MILLM_F32},
		/* blocks that straddle rows, odd rows, slices that begin within a byte, small blocks */
		{MILLM_4BIT, 37, 29, 0, 64, 256, false, MILLM_BF16}, {MILLM_4BIT, 96, 19, 0, 64, 0, false, MILLM_F32},
		{MILLM_4BIT, 33, 7, 33, 64, 256, true, MILLM_F16}, {MILLM_4BIT, 128, 9, 0, 32, 256, false, MILLM_BF16},
		{MILLM_4BIT, 1, 3, 1, 64, 0, false, MILLM_F32}, {MILLM_4BIT, 100, 11, 700, 4096, 256, false, MILLM_BF16},
		{MILLM_INT8, 1, 1, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 37, 19, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 64, 5, 0, 0, 0, false, MILLM_F32},
		{MILLM_INT8, 131, 83, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 576, 73, 0, 0, 0, false, MILLM_F32}, {MILLM_INT8, 1088, 33, 0, 0, 0, false, MILLM_F32},
		{MILLM_INT8, 8192 + 37, 5, 0, 0, 0, false, MILLM_F32},
	};
	static const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 13, 259};
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	for (int v = 0; v < n; v++)
		for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
			for (int form = 0; form < MILLM_N_FORMS; form++)
			{
				const MillmWeight shape = {.dtype = cases[i].dtype, .n_in = cases[i].n_in, .first = cases[i].first, .block_size = cases[i].block_size};

				if (!k[v].matmul[form][cases[i].dtype][0] || form == MILLM_FORM_BF16_TILES ||
					((form == MILLM_FORM_I16_NIBBLES || form == MILLM_FORM_BF16_NIBBLES) && !millm_is_blocky(&shape)) ||
					(form == MILLM_FORM_I16_TILES && !millm_has_i16_tiles(&shape)))
					continue;
				for (size_t t = 0; t < sizeof(tokens) / sizeof(tokens[0]) - (cases[i].n_in > 600); t++)
					one_quantized(&k[v], form, &cases[i], tokens[t], (i + t) % N_KINDS);
			}
}

/* The largest sums of products that there can be, of either sign, over several runs of an int32. */
static void
test_int8_extremes(void **state)
{
	enum {N = 3 * 8192 + 64, TOKENS = 5, ROWS = 3};
	char	   *data = malloc((size_t) ROWS * N);
	float	   *x = aligned_alloc(64, sizeof(float) * N * TOKENS);
	const float scale[ROWS] = {127, 127, 127};
	float		y[TOKENS][ROWS];
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	memset(data, -128, (size_t) ROWS * N);
	memset(data + N, 127, N);
	for (int64_t i = 0; i < N * TOKENS; i++)
		x[i] = -2;
	for (int v = 0; v < n; v++)
		for (int form = 0; form < MILLM_N_FORMS; form++)
		{
			const MillmWeight w = {.dtype = MILLM_INT8, .n_out = ROWS, .n_in = N, .stride = N, .data = data, .scale = scale};
			int64_t		stride = millm_form_row_bytes(form, N);
			char	   *packed = aligned_alloc(64, (size_t) stride * TOKENS);
			MillmMatmul m = {.y = y[0], .y_stride = ROWS, .w = &w, .form = form, .x = packed, .x_stride = stride, .n_tokens = TOKENS};

			if (k[v].matmul[form][MILLM_INT8][0] && form == MILLM_FORM_F32)
				memcpy(packed, x, (size_t) stride * TOKENS);
			else if (k[v].matmul[form][MILLM_INT8][0])
				pack(&k[v], form, packed, stride, x, N, TOKENS, N);
			if (k[v].matmul[form][MILLM_INT8][0] && (form != MILLM_FORM_BF16 || k[v].best_form(&w, 1000) == (MillmForm) form))
			{
				k[v].matmul[form][MILLM_INT8][0] (&m, 0, ROWS);
				for (int t = 0; t < TOKENS; t++)
					for (int o = 0; o < ROWS; o++)
						assert_true(fabs(y[t][o] / ((o == 1 ? -2.0 * 127 : 2.0 * 128) * N) - 1) < 1e-4);
			}
			free(packed);
		}
	free(data);
	free(x);
}

/* The same of 4-bit weights: all of a block at the end of the codebook. */
static void
test_4bit_extremes(void **state)
{
	enum {N = 4096, TOKENS = 11, ROWS = 3};
	uint8_t    *data = malloc(ROWS * N / 2);
	float	   *x = aligned_alloc(64, sizeof(float) * N * TOKENS);
	float		absmax[ROWS * N / 64];
	float		y[TOKENS][ROWS];
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	memset(data, 0xFF, ROWS * N / 2);	/* 1 */
	memset(data + N / 2, 0x00, N / 2);	/* -1 */
	for (int i = 0; i < ROWS * N / 64; i++)
		absmax[i] = 3;
	for (int64_t i = 0; i < N * TOKENS; i++)
		x[i] = -2;
	for (int v = 0; v < n; v++)
		for (int form = 0; form < MILLM_N_FORMS; form++)
		{
			const MillmWeight w = {.dtype = MILLM_4BIT, .n_out = ROWS, .n_in = N, .stride = N, .data = data, .codebook = millm_nf4_codebook,
				.absmax = absmax, .block_size = 64, .rounded = MILLM_BF16};
			int64_t		stride = millm_form_row_bytes(form, N);
			char	   *packed = aligned_alloc(64, (size_t) stride * TOKENS);
			MillmMatmul m = {.y = y[0], .y_stride = ROWS, .w = &w, .form = form, .x = form == MILLM_FORM_F32 ? (char *) x : packed,
				.x_stride = stride, .n_tokens = TOKENS};

			if (k[v].matmul[form][MILLM_4BIT][0] && form != MILLM_FORM_BF16_TILES)
			{
				if (form != MILLM_FORM_F32)
					pack(&k[v], form, packed, stride, x, N, TOKENS, N);
				k[v].matmul[form][MILLM_4BIT][0] (&m, 0, ROWS);
				for (int t = 0; t < TOKENS; t++)
					for (int o = 0; o < ROWS; o++)
						assert_true(fabs(y[t][o] / ((o == 1 ? 6.0 : -6.0) * N) - 1) < 1e-4);
			}
			free(packed);
		}
	free(data);
	free(x);
}

/* In tiles of int16 a weight of 16 bits that is not finite makes its output so, and no other; one without a unit above it NaN. */
static void
test_weights_not_finite(void **state)
{
	enum {N = 192, TOKENS = 3, ROWS = 35, BAD = 17};
	static const uint16_t bad[2][3] = {{0x7C00, 0x7E01, 0xFC00}, {0x7F80, 0x7FC1, 0x7F00}};	/* F16: inf, NaN, -inf; BF16: inf, NaN, 2^127 */
	const int64_t stride = millm_form_row_bytes(MILLM_FORM_I16_TILES, N);
	static float x[TOKENS * N], y[TOKENS * ROWS];
	static uint16_t w[ROWS * N];
	MillmKernels k[4];
	int			n = variants(k);

	(void) state;
	fill(x, TOKENS * N, ORDINARY);
	for (int v = 0; v < n; v++)
		for (int dtype = MILLM_F16; dtype <= MILLM_BF16; dtype++)
			for (int i = 0; i < 3; i++)
			{
				char	   *packed = aligned_alloc(64, (size_t) stride * TOKENS);
				const MillmWeight weight = {.dtype = dtype, .n_out = ROWS, .n_in = N, .stride = N, .data = w};
				MillmMatmul m = {.y = y, .y_stride = ROWS, .w = &weight, .form = MILLM_FORM_I16_TILES, .x = packed, .x_stride = stride, .n_tokens = TOKENS};

				for (int j = 0; j < ROWS * N; j++)
					w[j] = dtype == MILLM_F16 ? millm_f32_to_f16(uniform()) : millm_f32_to_bf16(uniform());
				w[BAD * N + 77] = bad[dtype == MILLM_BF16][i];
				if (k[v].matmul[m.form][dtype][0])
				{
					pack(&k[v], m.form, packed, stride, x, N, TOKENS, N);
					k[v].matmul[m.form][dtype][0] (&m, 0, ROWS);
					for (int t = 0; t < TOKENS; t++)
						for (int o = 0; o < ROWS; o++)
							assert_int_equal(isfinite(y[t * ROWS + o]) != 0, o != BAD);
				}
				free(packed);
			}
}

/* In tiles of int16 a value that is not finite is so in every output of its token, and of no other. */
static void
test_not_finite(void **state)
{
	enum {N = 192, TOKENS = 11, ROWS = 35};
	const QuantCase cases[] = {{MILLM_4BIT, N, ROWS, 0, 64, 0, false, MILLM_BF16}, {MILLM_INT8, N, ROWS, 0, 0, 0, false, MILLM_BF16}};
	const int64_t stride = millm_form_row_bytes(MILLM_FORM_I16_TILES, N);
	static float x[TOKENS * N], y[TOKENS * ROWS];
	MillmKernels k[4];
	int			n = variants(k);

	(void) state;
	for (int v = 0; v < n; v++)
		for (int i = 0; i < 2; i++)
		{
			char	   *packed = aligned_alloc(64, (size_t) stride * TOKENS);
			Quantized	q;
			MillmMatmul m = {.y = y, .y_stride = ROWS, .w = &q.w, .form = MILLM_FORM_I16_TILES, .x = packed, .x_stride = stride, .n_tokens = TOKENS};

			make_quantized(&q, &cases[i]);
			if (k[v].matmul[m.form][q.w.dtype][0])
			{
				fill(x, TOKENS * N, ORDINARY);
				x[4 * N + 70] = NAN;
				x[9 * N + 1] = INFINITY;
				pack(&k[v], m.form, packed, stride, x, N, TOKENS, N);
				k[v].matmul[m.form][q.w.dtype][0] (&m, 0, ROWS);
				for (int t = 0; t < TOKENS; t++)
					for (int o = 0; o < ROWS; o++)
						assert_int_equal(isfinite(y[t * ROWS + o]) != 0, t != 4 && t != 9);
			}
			free(packed);
			free_quantized(&q);
		}
}

/* The sixteen values times powers of two, by hand; then every variant, in any company. */
static void
test_mxfp4(void **state)
{
	enum {N_IN = 160, N_OUT = 23, N_TOKENS = 13};
	static const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
	static uint8_t data[N_OUT * N_IN / 2 + 1], scale[N_OUT * N_IN / 32 + 1];
	static float x[N_TOKENS * N_IN], y[N_TOKENS * N_OUT], one[N_OUT];
	const MillmWeight w = {.dtype = MILLM_MXFP4, .n_out = N_OUT, .n_in = N_IN, .stride = N_IN, .data = data + 1, .scale = scale + 1};
	char	   *packed = aligned_alloc(64, (size_t) millm_form_row_bytes(MILLM_FORM_BF16, N_IN) * N_TOKENS);
	float		row[N_IN];
	MillmKernels k[4];
	int			n;

	(void) state;
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t) (i * 37 + i / 16);
	for (size_t i = 0; i < sizeof(scale); i++)
		scale[i] = (uint8_t) (127 + (int) (i % 9) - 5);
	scale[3] = 0;				/* a subnormal */
	fill(x, N_TOKENS * N_IN, ORDINARY);
	millm_weight_decode(row, &w, 2, 0, N_IN);
	for (int i = 0; i < N_IN; i++)
	{
		int			e = 2 * N_IN + i,
					nibble = data[1 + e / 2] >> (e % 2 * 4) & 15;

		assert_true(row[i] == (float) ((nibble < 8 ? 1 : -1) * values[nibble % 8] * ldexp(1, scale[1 + e / 32] - 127)));
	}
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	for (int v = 0; v < n; v++)
		for (int form = MILLM_FORM_F32; form <= MILLM_FORM_BF16; form++)
		{
			const int64_t stride = form == MILLM_FORM_F32 ? N_IN * 4 : millm_form_row_bytes(form, N_IN);
			MillmMatmul m = {.y = y, .y_stride = N_OUT, .w = &w, .form = form, .x = form == MILLM_FORM_F32 ? (const void *) x : packed, .x_stride = stride,
				.n_tokens = N_TOKENS};

			if (!k[v].matmul[form][MILLM_MXFP4][0])
				continue;
			for (int t = 0; t < N_TOKENS && form != MILLM_FORM_F32; t++)
				k[v].pack[form] (packed + t * stride, x + t * N_IN, N_IN);
			k[v].matmul[form][MILLM_MXFP4][0] (&m, 0, N_OUT);
			for (int t = 0; t < N_TOKENS; t++)
				for (int o = 0; o < N_OUT; o++)
				{
					double		sum = 0,
								size = 0;

					millm_weight_decode(row, &w, o, 0, N_IN);
					for (int i = 0; i < N_IN; i++)
					{
						sum += (double) row[i] * x[t * N_IN + i];
						size += fabs((double) row[i] * x[t * N_IN + i]);
					}
					if (!(fabs(y[t * N_OUT + o] - sum) <= (form == MILLM_FORM_F32 ? 1e-6 : EPSILON_BF16) * size))
						fail_msg("%s form %d token %d: [%d] = %.9g, expected %.9g", k[v].variant, form, t, o, y[t * N_OUT + o], sum);
				}
			m.n_tokens = 1;
			m.y = one;
			for (int t = 0; t < N_TOKENS; t++)
			{
				m.x = (const char *) (form == MILLM_FORM_F32 ? (const void *) x : packed) + t * stride;
				k[v].matmul[form][MILLM_MXFP4][0] (&m, 0, 5);
				k[v].matmul[form][MILLM_MXFP4][0] (&m, 5, N_OUT);
				assert_memory_equal(one, y + t * N_OUT, sizeof(one));
			}
		}
	free(packed);
}

/* A row's bits depend neither on its company nor on how the outputs are split. */
static void
test_matmul_is_batch_invariant(void **state)
{
	enum {N_IN = 131, N_OUT = 101, N_TOKENS = 13};
	static float x[N_TOKENS * N_IN], w[N_OUT * N_IN], all[N_TOKENS * N_OUT], one[N_OUT];
	static uint16_t h[N_OUT * N_IN];
	static _Alignas(64) char packed[N_TOKENS * 320], packed_alone[320];
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	fill(x, N_TOKENS * N_IN, ORDINARY);
	fill(w, N_OUT * N_IN, ORDINARY);
	for (int i = 0; i < N_OUT * N_IN; i++)
		h[i] = millm_f32_to_bf16(w[i]);
	for (int v = 0; v < n; v++)
		for (int form = 0; form < MILLM_N_FORMS; form++)
			for (int dtype = 0; dtype < MILLM_N_FLOAT_DTYPES; dtype++)
				for (int in_out = 0; in_out < 2; in_out++)
				{
					const int	n_in = form == MILLM_FORM_I16_TILES ? 128 : N_IN;	/* whole blocks */
					MillmWeight weight = {.dtype = dtype, .in_out = in_out, .n_out = N_OUT, .n_in = n_in,
						.stride = in_out ? N_OUT : N_IN, .data = dtype == MILLM_F32 ? (void *) w : (void *) h};
					MillmMatmul m = {.y = all, .y_stride = N_OUT, .w = &weight, .form = form,
						.x = form == MILLM_FORM_F32 ? (char *) x : packed, .x_stride = form == MILLM_FORM_F32 ? N_IN * 4 : 320, .n_tokens = N_TOKENS};
					MillmMatmulFn f = k[v].matmul[form][dtype][in_out];

					if (!f || dtype == MILLM_F16 || form == MILLM_FORM_BF16_TILES)	/* bfloat16's bits would be nonsense as float16 */
						continue;
					if (form != MILLM_FORM_F32)
						pack(&k[v], form, packed, 320, x, N_IN, N_TOKENS, n_in);
					f(&m, 0, N_OUT);
					for (int t = 0; t < N_TOKENS; t++)
					{
						MillmMatmul single = m;

						single.y = one;
						single.n_tokens = 1;
						single.x = (const char *) m.x + t * m.x_stride;
						if (millm_form_group(form) > 1)
						{
							single.x = packed_alone;
							pack(&k[v], form, packed_alone, 320, x + t * N_IN, N_IN, 1, n_in);
						}
						for (int64_t o = 0; o < N_OUT; o += 7)
							f(&single, o, o + 7 < N_OUT ? o + 7 : N_OUT);
						if (memcmp(one, all + t * N_OUT, sizeof(one)) != 0)
							fail_msg("%s %s form %d in_out %d: token %d has other bits alone", k[v].variant, dtype_name[dtype], form, in_out, t);
					}
				}
}

static void
compare(const char *what, const char *variant, int64_t n, const float *got, const float *expected, double relative, double slack)
{
	for (int64_t i = 0; i < n; i++)
		if (!(fabs((double) got[i] - expected[i]) <= slack + relative * fabs(expected[i])))
			fail_msg("%s %s n %ld: [%ld] = %.9g, ref %.9g", variant, what, (long) n, (long) i, got[i], expected[i]);
}

static void
test_norms_and_activations(void **state)
{
	static float pairs[1400], x[700], w[700], b[700], up[700], got[700], expected[700];
	static const int sizes[] = {1, 7, 8, 15, 16, 17, 32, 37, 64, 576, 601};
	static const char *const unary_name[] = {"silu", "gelu_tanh", "gelu_erf", "relu"};
	MillmKernels ref, k[3];
	int			n_variants = variants(k);

	(void) state;
	millm_kernels_ref(&ref);
	for (int v = 0; v < n_variants; v++)
		for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
			for (int kind = 0; kind < N_KINDS; kind++)
			{
				int			n = sizes[s];

				fill(x, n + 1, kind);
				fill(w, n + 1, ORDINARY);
				fill(b, n + 1, ORDINARY);
				fill(up, n + 1, ORDINARY);
				ref.rms_norm(expected, x + 1, w + 1, 1e-5f, n);
				k[v].rms_norm(got, x + 1, w + 1, 1e-5f, n);
				compare("rms_norm", k[v].variant, n, got, expected, 2e-6, 1e-12);
				ref.layer_norm(expected, x + 1, w + 1, b + 1, 1e-5f, n);
				k[v].layer_norm(got, x + 1, w + 1, b + 1, 1e-5f, n);
				compare("layer_norm", k[v].variant, n, got, expected, 1e-5, 2e-5);	/* x - mean cancels */
				memcpy(expected, x + 1, sizeof(float) * (size_t) n);
				memcpy(got, x + 1, sizeof(float) * (size_t) n);
				for (int i = 0; i < 2 * n; i++)
					pairs[i] = 9 * uniform();	/* some beyond the limits */
				ref.swiglu_pairs(expected, pairs, n);
				k[v].swiglu_pairs(got, pairs, n);
				compare("swiglu_pairs", k[v].variant, n, got, expected, 2e-6, 2e-6);
				memcpy(expected, x + 1, sizeof(float) * (size_t) n);
				memcpy(got, x + 1, sizeof(float) * (size_t) n);
				ref.softcap(expected, 3, n);
				k[v].softcap(got, 3, n);
				compare("softcap", k[v].variant, n, got, expected, 2e-6, 2e-6);
				for (int u = 0; u < MILLM_N_UNARY; u++)
				{
					for (int i = 0; i < n; i++)
						x[i + 1] *= 12;
					ref.unary[u] (expected, x + 1, up + 1, n);
					k[v].unary[u] (got, x + 1, up + 1, n);
					compare(unary_name[u], k[v].variant, n, got, expected, 2e-6, 2e-6);
					ref.unary[u] (expected, x + 1, NULL, n);
					k[v].unary[u] (got, x + 1, NULL, n);
					compare(unary_name[u], k[v].variant, n, got, expected, 2e-6, 2e-6);
				}
			}
}

/* Softmax attention in double over plain arrays, keys [position, head_dim]. */
static void
plain_attention(double *y, const float *q, const float *keys, const float *values, int hd, int64_t stride, int first, int last, float scale,
				float softcap, const float *bias, const float *sink)
{
	double		max = -INFINITY,
				sum = 0;
	double	   *score = calloc((size_t) last + 1, sizeof(*score));

	for (int p = first; p <= last; p++)
	{
		for (int d = 0; d < hd; d++)
			score[p] += (double) q[d] * keys[p * stride + d];
		score[p] *= scale;
		if (softcap > 0)
			score[p] = softcap * tanh(score[p] / softcap);
		if (bias)
			score[p] += bias[p];
		max = score[p] > max ? score[p] : max;
	}
	max = sink && *sink > max ? *sink : max;
	sum = sink ? exp(*sink - max) : 0;
	memset(y, 0, sizeof(*y) * (size_t) hd);
	for (int p = first; p <= last; p++)
		sum += score[p] = exp(score[p] - max);
	for (int p = first; p <= last; p++)
		for (int d = 0; d < hd; d++)
			y[d] += score[p] / sum * values[p * stride + d];
	free(score);
}

/* What MILLM_KV_INT8 makes of a head [hd]. */
static void
round_to_int8(float *x, int hd)
{
	for (int begin = 0; begin < hd; begin += 16)
	{
		float		largest = 0,
					scale;

		for (int d = begin; d < hd && d < begin + 16; d++)
			largest = fabsf(x[d]) > largest ? fabsf(x[d]) : largest;
		scale = millm_f16_to_f32(millm_f32_to_f16(largest / 127));
		for (int d = begin; d < hd && d < begin + 16; d++)
			x[d] = scale > 0 ? roundf(x[d] / scale) * scale : 0;
	}
}

static void
test_attention(void **state)
{
	static const int shapes[][3] = {{1, 1, 8}, {2, 3, 64}, {1, 5, 16}, {3, 2, 37}, {2, 4, 1}, {1, 7, 80}};	/* KV heads, group, head_dim */
	static const int windows[] = {0, 1, 5, 16, 40};
	enum {N_POSITIONS = 83, N_PAGES = 6};
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	for (int v = 0; v < n * MILLM_N_KV_FORMATS; v++)
		for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
		{
			const MillmKernels *of = &k[v / MILLM_N_KV_FORMATS];
			const MillmKvKernels *kernels = &of->kv[v % MILLM_N_KV_FORMATS];
			const double tolerance = kernels->dtype == MILLM_F32 ? 2e-6 : kernels->dtype == MILLM_F16 ? 8 * EPSILON_F16 : 1e-5;
			int			n_kv = shapes[s][0],
						group = shapes[s][1],
						hd = shapes[s][2];
			int64_t		head_bytes = millm_kv_head_bytes(kernels->dtype, hd);
			int64_t		half_bytes = n_kv * head_bytes;
			char	   *pool = malloc((size_t) (2 * half_bytes * N_PAGES));
			float	   *keys = malloc(sizeof(float) * (size_t) (N_POSITIONS * n_kv * hd));
			float	   *values = malloc(sizeof(float) * (size_t) (N_POSITIONS * n_kv * hd));
			float	   *q = malloc(sizeof(float) * (size_t) (n_kv * group * hd));
			float	   *y = malloc(sizeof(float) * (size_t) (n_kv * group * hd));
			float	   *bias = malloc(sizeof(float) * (size_t) (n_kv * group * N_PAGES * MILLM_KERNEL_PAGE));
			float		sinks[10];
			int32_t		pages[N_PAGES] = {3, 0, 5, 1, 4, 2};
			MillmKvLayer kv = {.k = pool, .v = pool + half_bytes, .page_bytes = 2 * half_bytes, .head_bytes = head_bytes, .n_kv_heads = n_kv, .head_dim = hd,
				.group = group, .scale = 0.7f, .bias_stride = N_PAGES * MILLM_KERNEL_PAGE};

			memset(pool, 0xFF, (size_t) (2 * half_bytes * N_PAGES));	/* NaNs where nobody wrote */
			fill(keys, N_POSITIONS * n_kv * hd, ORDINARY);
			fill(values, N_POSITIONS * n_kv * hd, ORDINARY);
			fill(q, n_kv * group * hd, ORDINARY);
			fill(bias, n_kv * group * N_PAGES * MILLM_KERNEL_PAGE, ORDINARY);
			fill(sinks, n_kv * group, ORDINARY);
			sinks[0] = 30;		/* nearly all of the softmax */
			for (int p = 0; p < N_POSITIONS; p++)
				kernels->store(&kv, pages[p / MILLM_KERNEL_PAGE], p % MILLM_KERNEL_PAGE, keys + p * n_kv * hd, values + p * n_kv * hd);
			for (int i = 0; kernels->dtype == MILLM_INT8 && i < N_POSITIONS * n_kv; i++)
			{
				round_to_int8(keys + i * hd, hd);
				round_to_int8(values + i * hd, hd);
			}
			for (size_t w = 0; w < sizeof(windows) / sizeof(windows[0]); w++)
				for (int position = 0; position < N_POSITIONS; position += 6)
				{
					kv.window = windows[w];
					kv.softcap = position % 4 == 0 ? 0 : 1.5f;
					kv.bias = position % 3 == 0 && position % 9 != 0 ? bias : NULL;
					kv.sinks = position % 5 == 0 ? NULL : sinks;
					for (int h = 0; h < n_kv; h++)
						kernels->attention(y, q, &kv, pages, position, h);
					for (int h = 0; h < n_kv * group; h++)
					{
						double		expected[80];
						int			first = windows[w] > 0 && position >= windows[w] ? position - windows[w] + 1 : 0;

						plain_attention(expected, q + h * hd, keys + h / group * hd, values + h / group * hd, hd, n_kv * hd, first, position, 0.7f,
										kv.softcap, kv.bias ? kv.bias + h * kv.bias_stride : NULL, kv.sinks ? kv.sinks + h : NULL);
						for (int d = 0; d < hd; d++)
							if (!(fabs(y[h * hd + d] - expected[d]) <= tolerance))
								fail_msg("%s attention (format %d) KV heads %d group %d head_dim %d window %d position %d: head %d [%d] = %.9g, expected %.9g",
										 of->variant, v % MILLM_N_KV_FORMATS, n_kv, group, hd, windows[w], position, h, d, y[h * hd + d], expected[d]);
					}
				}
			free(pool);
			free(keys);
			free(values);
			free(q);
			free(y);
			free(bias);
		}
}

/* int8 has no NaN or infinity: its scales have. */
static void
test_kv_not_finite(void **state)
{
	static const float bad[] = {NAN, INFINITY, -INFINITY};
	enum {DIM = 40};
	MillmKernels k[4];
	int			n;

	(void) state;
	millm_kernels_ref(&k[0]);
	n = 1 + variants(k + 1);
	for (int v = 0; v < n; v++)
		for (int i = 0; i < 6; i++)
		{
			const MillmKvKernels *kernels = &k[v].kv[MILLM_KV_INT8];
			const int64_t head_bytes = millm_kv_head_bytes(MILLM_INT8, DIM);
			char	   *pool = calloc(2, (size_t) head_bytes);
			MillmKvLayer kv = {.k = pool, .v = pool + head_bytes, .page_bytes = 2 * head_bytes, .head_bytes = head_bytes, .n_kv_heads = 1, .head_dim = DIM,
				.group = 1, .scale = 1};
			const int32_t page = 0;
			float		key[DIM], value[DIM], q[DIM], y[DIM];

			fill(key, DIM, ORDINARY);
			fill(value, DIM, ORDINARY);
			fill(q, DIM, ORDINARY);
			(i < 3 ? key : value)[37] = bad[i % 3];
			kernels->store(&kv, 0, 0, key, value);
			kernels->attention(y, q, &kv, &page, 0, 0);
			assert_true(isnan(y[i < 3 ? 0 : 37]));
			assert_true(i < 3 || isfinite(y[0]));
			free(pool);
		}
}

/* The other entries are ref's own in every variant, or simple: their definition in a few lines each. */
static void
test_rope_rows_and_finite(void **state)
{
	float		x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
	const float cosine[] = {0.5f, 0.25f};
	const float sine[] = {2, 3};
	const float half_split[] = {1 * 0.5f - 3 * 2, 2 * 0.25f - 4 * 3, 3 * 0.5f + 1 * 2, 4 * 0.25f + 2 * 3, 5, 6, 7, 8};
	const float interleaved[] = {1 * 0.5f - 2 * 2, 2 * 0.5f + 1 * 2, 3 * 0.25f - 4 * 3, 4 * 0.25f + 3 * 3, 5, 6, 7, 8};
	uint16_t	row[3] = {0x3F80, 0xC000, 0x4040};
	float		y[3] = {10, 10, 10};
	float		bad[19] = {0};
	MillmKernels k;
	bool		is_known;

	(void) state;
	for (const char *const *name = millm_kernels_names(); *name; name++)
	{
		float		copy[8];

		if (!millm_kernels_init(&k, *name, &is_known))
			continue;
		assert_string_equal(k.variant, *name);
		memcpy(copy, x, sizeof(x));
		k.rope(copy, 1, 8, 2, false, cosine, sine);
		assert_memory_equal(copy, half_split, sizeof(x));
		memcpy(copy, x, sizeof(x));
		k.rope(copy, 1, 8, 2, true, cosine, sine);
		assert_memory_equal(copy, interleaved, sizeof(x));

		y[0] = y[1] = y[2] = 10;
		k.load_row(y, row, MILLM_BF16, 3, true);
		assert_true(y[0] == 11 && y[1] == 8 && y[2] == 13);
		k.load_row(y, row, MILLM_BF16, 3, false);
		assert_true(y[0] == 1 && y[1] == -2 && y[2] == 3);

		assert_true(k.is_finite(bad, 19));
		for (int i = 0; i < 19; i++)
		{
			bad[i] = i % 2 ? NAN : -INFINITY;
			assert_false(k.is_finite(bad, 19));
			bad[i] = 3e38f;
			assert_true(k.is_finite(bad, 19));
		}
		memset(bad, 0, sizeof(bad));
	}
}

static void
test_names(void **state)
{
	MillmKernels k;
	bool		is_known;

	(void) state;
	assert_true(millm_kernels_init(&k, "ref", &is_known));
	assert_string_equal(k.variant, "ref");
	assert_false(millm_kernels_init(&k, "sse9", &is_known));
	assert_false(is_known);
	assert_true(millm_kernels_init(&k, NULL, &is_known));
	assert_string_equal(k.variant, millm_cpu_flags() & MILLM_CPU_AMX ? "amx" : millm_cpu_flags() & MILLM_CPU_AVX512 ? "avx512" : millm_cpu_flags() & MILLM_CPU_AVX2 ? "avx2" : "ref");
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_matmul),
		cmocka_unit_test(test_quantized), cmocka_unit_test(test_int8_extremes), cmocka_unit_test(test_4bit_extremes),
		cmocka_unit_test(test_not_finite), cmocka_unit_test(test_weights_not_finite),
		cmocka_unit_test(test_mxfp4),
		cmocka_unit_test(test_matmul_is_batch_invariant),
		cmocka_unit_test(test_norms_and_activations),
		cmocka_unit_test(test_attention), cmocka_unit_test(test_kv_not_finite),
		cmocka_unit_test(test_rope_rows_and_finite),
		cmocka_unit_test(test_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
