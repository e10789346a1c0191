/*
 * test_cuda.c -- the CUDA backend over an emulated device (test/cuda): each operation against the CPU's `ref`, through the interface that the forward
 * pass uses; then what becomes of it when memory runs out or the device fails.  Whole models: test/parity/test_cuda.py.
 *
 * Device memory and shared memory begin as NaN, threads take turns in two orders, and under AddressSanitizer every access is checked: what
 * compute-sanitizer's memcheck, initcheck and racecheck look for, as far as a CPU can.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "backend_cuda.h"
#include "blas.h"
#include "half.h"
#include "kernel.h"
#include "kernels.h"
#include "mixture.h"
#include "quant.h"
#include "route.h"
#include "weights.h"

#define EPSILON 1.2e-7
#define N_ROWS 70				/* of every buffer: more than a tile of the matmul, and than MILLM_CUDA_FEW_ROWS */
#define FAULT_STATUS 9

static uint64_t seed = 1;

static float
uniform(void)					/* [-1, 1) */
{
	seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
	return (float) (int32_t) (seed >> 32) / 2147483648.0f;
}

static void *
bytes_of(size_t n)
{
	void	   *p = malloc(n ? n : 1);

	assert_non_null(p);
	return p;
}

static float *
floats(int64_t n, float centre)
{
	float	   *p = bytes_of((size_t) n * sizeof(float));

	for (int64_t i = 0; i < n; i++)
		p[i] = centre + uniform();
	return p;
}

__attribute__((noreturn)) static void
fault(const MillmError *err)
{
	fprintf(stderr, "%s | %s\n", err->message, err->detail);
	_exit(FAULT_STATUS);
}

static const MillmCudaHost host = {.fault = fault, .rope_frequencies = millm_rope_frequencies};

/* Values that bfloat16 holds, so that tensor cores compute with these very ones. */
static float *
coarse(float *p, int64_t n)
{
	for (int64_t i = 0; i < n; i++)
		p[i] = millm_bf16_to_f32(millm_f32_to_bf16(p[i]));
	return p;
}

/* ---- a weight of any dtype and shape ---- */

typedef struct Shape
{
	MillmDtype	dtype;
	bool		in_out;
	int64_t		n_out, n_in;
	int			gap;			/* elements between stored rows: of a slice of a fused tensor */
	/* 4BIT */
	int64_t		first;
	int			block_size, nested_block_size;
	MillmDtype	rounded;
} Shape;

/* Everything is an allocation of its own, exact, and begins unaligned, as in a file. */
typedef struct Stored
{
	MillmWeight w;
	void	   *owned[5];
	float		codebook[16],
				map[256];
} Stored;

static char *
unaligned(Stored *s, int i, int64_t n)
{
	s->owned[i] = bytes_of((size_t) n + 1);
	return (char *) s->owned[i] + 1;
}

static void
put_float(char *p, MillmDtype dtype, int64_t i, float f)
{
	const uint16_t h = dtype == MILLM_F16 ? millm_f32_to_f16(f) : millm_f32_to_bf16(f);

	if (dtype == MILLM_F32)
		memcpy(p + 4 * i, &f, 4);
	else
		memcpy(p + 2 * i, &h, 2);
}

/* Of the weights that are multiplied in blocks of 64 columns (millm_cuda_is_skinny()), where there are tensor cores */
static bool
is_skinny(const Shape *shape)
{
	return shape->n_in % 64 == 0 && (shape->dtype == MILLM_BF16 || shape->dtype == MILLM_INT8 ||
									 (shape->dtype == MILLM_4BIT && shape->first % 64 == 0 && shape->block_size >= 64));
}

static void
store_4bit(Stored *s, const Shape *shape)
{
	const int64_t end = shape->first + shape->n_out * shape->n_in;
	const int64_t n_blocks = (end + shape->block_size - 1) / shape->block_size;
	char	   *data = unaligned(s, 0, (end + 1) / 2);
	char	   *absmax = unaligned(s, 1, n_blocks * (shape->nested_block_size ? 1 : 4));

	for (int64_t i = 0; i < (end + 1) / 2; i++)
		data[i] = (char) (uniform() * 128);
	for (int64_t b = 0; b < n_blocks; b++)
		if (shape->nested_block_size)
			absmax[b] = (char) (uniform() * 128);
		else
			put_float(absmax, MILLM_F32, b, uniform() + 1.1f);
	for (int i = 0; i < 256; i++)
		s->map[i] = uniform();
	for (int i = 0; i < 16; i++)
		s->codebook[i] = uniform();
	if (is_skinny(shape) && shape->rounded == MILLM_F32)
		coarse(s->codebook, 16);
	s->w.first = shape->first;
	s->w.codebook = s->codebook;
	s->w.absmax = absmax;
	s->w.block_size = shape->block_size;
	s->w.rounded = shape->rounded;
	s->w.data = data;
	if (shape->nested_block_size)
	{
		const int64_t n_nested = (n_blocks + shape->nested_block_size - 1) / shape->nested_block_size;
		char	   *nested = unaligned(s, 2, n_nested * 4);

		for (int64_t i = 0; i < n_nested; i++)
			put_float(nested, MILLM_F32, i, uniform() + 1.1f);
		s->w.nested_absmax = nested;
		s->w.nested_map = s->map;
		s->w.nested_offset = 0.7f;
		s->w.nested_block_size = shape->nested_block_size;
	}
}

static void
store(Stored *s, const Shape *shape)
{
	const int64_t n_rows = shape->in_out ? shape->n_in : shape->n_out;
	const int64_t n_columns = shape->in_out ? shape->n_out : shape->n_in;
	const int64_t n = n_rows * n_columns;

	*s = (Stored) {.w = {.dtype = shape->dtype, .in_out = shape->in_out, .n_out = shape->n_out, .n_in = shape->n_in, .stride = n_columns + shape->gap}};
	if (shape->dtype == MILLM_4BIT)
		store_4bit(s, shape);
	else if (shape->dtype == MILLM_INT8 || shape->dtype == MILLM_MXFP4)
	{
		const int64_t n_scales = shape->dtype == MILLM_INT8 ? shape->n_out * 4 : n / 32;
		char	   *data = unaligned(s, 0, millm_weight_bytes(shape->dtype, n));
		char	   *scale = unaligned(s, 1, n_scales);

		for (int64_t i = 0; i < millm_weight_bytes(shape->dtype, n); i++)
			data[i] = (char) (uniform() * 127);
		for (int64_t i = 0; i < shape->n_out && shape->dtype == MILLM_INT8; i++)
			put_float(scale, MILLM_F32, i, uniform());
		for (int64_t i = 0; i < n_scales && shape->dtype == MILLM_MXFP4; i++)
			scale[i] = (char) (127 + (int) (uniform() * 5));
		s->w.data = data;
		s->w.scale = scale;
	}
	else
	{
		char	   *data = unaligned(s, 0, millm_weight_bytes(shape->dtype, (n_rows - 1) * s->w.stride + n_columns));

		for (int64_t i = 0; i < (n_rows - 1) * s->w.stride + n_columns; i++)
			put_float(data, shape->dtype, i, millm_bf16_to_f32(millm_f32_to_bf16(uniform())));
		s->w.data = data;
	}
}

static void
discard(Stored *s)
{
	for (int i = 0; i < 5; i++)
		free(s->owned[i]);
}

/* ---- a model of what is put into it, and both backends over it ---- */

/* One layer; what a test needs lies in fields of it that only the weights' copy looks at. */
typedef struct Rig
{
	MillmModel	model;
	MillmLayer	layer;
	MillmBackend *be[2];		/* the CPU's ref, and CUDA */
	MillmBackendOptions options;
	int			n_alive;		/* allocations on the device before */
	int			n_host;			/* the host's for it */
} Rig;

static void
rig_init(Rig *r, int n_heads, int n_kv_heads, int head_dim)
{
	memset(r, 0, sizeof(*r));
	r->layer.n_heads = n_heads;
	r->layer.n_kv_heads = n_kv_heads;
	r->layer.head_dim = head_dim;
	r->model.layers = &r->layer;
	r->model.config = (MillmConfig) {.n_layers = 1, .n_heads = n_heads, .n_kv_heads = n_kv_heads, .head_dim = head_dim, .max_positions = 1 << 12,
		.position = MILLM_POS_LEARNED, .attention_scale = 1};
	r->options = (MillmBackendOptions) {.n_threads = 1, .kernels = "ref", .max_tokens = N_ROWS, .n_pages = 64, .layers_per_page = 1, .n_groups = 1, .max_entries = 64};
	r->n_alive = millm_emulated.n_allocations;
	r->n_host = millm_emulated.n_host;
}

static void
rig_open(Rig *r, const char *cuda_kernels)
{
	MillmBackendOptions options = r->options;
	MillmError	err;

	millm_cuda_set_host(&host);
	assert_int_equal(millm_backend_cpu.create(&r->model, &options, &r->be[0], &err), MILLM_OK);
	options.kernels = cuda_kernels;
	assert_int_equal(millm_cuda_create(&r->model, &options, &r->be[1], &err), MILLM_OK);
}

static void
rig_close(Rig *r)
{
	for (int i = 0; i < 2; i++)
		r->be[i]->free(r->be[i]);
	assert_int_equal(millm_emulated.n_allocations, r->n_alive);
	assert_int_equal(millm_emulated.n_host, r->n_host);
}

static MillmBuffer *
buffer(Rig *r, int i, int64_t n_columns)
{
	MillmBuffer *b;
	MillmError	err;

	assert_int_equal(r->be[i]->buffer_create(r->be[i], N_ROWS, n_columns, true, &b, &err), MILLM_OK);
	return b;
}

/* A table of N_ROWS rows of values, which embed() writes into a buffer.  It must be one of the model's weights. */
static MillmWeight
table(const float *values, int64_t n_columns)
{
	return (MillmWeight) {.dtype = MILLM_F32, .n_out = N_ROWS, .n_in = n_columns, .stride = n_columns, .data = values};
}

static void
fill(Rig *r, int i, MillmBuffer *b, const MillmWeight *from, int n)
{
	int32_t		rows[N_ROWS];

	for (int t = 0; t < N_ROWS; t++)
		rows[t] = t;
	r->be[i]->embed(r->be[i], b, from, rows, false, n);
}

/* Both are the same within tolerance, relative to the largest; NaN is no number near another. */
static void
assert_near(const float *ours, const float *theirs, int64_t n, double tolerance, const char *what)
{
	double		largest = 1e-30;

	for (int64_t i = 0; i < n; i++)
		largest = fmax(largest, fabs((double) theirs[i]));
	for (int64_t i = 0; i < n; i++)
		if (!(fabs((double) ours[i] - (double) theirs[i]) <= tolerance * largest))
			fail_msg("%s: element %lld is %.9g, the CPU's %.9g, the largest %.3g", what, (long long) i, (double) ours[i], (double) theirs[i], largest);
}

/* ---- matmul ---- */

static const Shape shapes[] = {
	{MILLM_F32, false, 5, 3, 0, 0, 0, 0, 0}, {MILLM_F32, false, 65, 64, 0, 0, 0, 0, 0}, {MILLM_F32, true, 33, 37, 70, 0, 0, 0, 0},
	{MILLM_F16, false, 66, 131, 0, 0, 0, 0, 0}, {MILLM_F16, true, 9, 8, 0, 0, 0, 0, 0}, {MILLM_BF16, false, 1, 1, 0, 0, 0, 0, 0},
	{MILLM_BF16, false, 130, 300, 20, 0, 0, 0, 0}, {MILLM_BF16, false, 3, 1030, 0, 0, 0, 0, 0}, {MILLM_INT8, false, 67, 33, 0, 0, 0, 0, 0},
	{MILLM_INT8, false, 6, 528, 0, 0, 0, 0, 0}, {MILLM_MXFP4, false, 65, 96, 0, 0, 0, 0, 0}, {MILLM_MXFP4, false, 2, 1056, 0, 0, 0, 0, 0},
	{MILLM_4BIT, false, 65, 128, 0, 0, 64, 256, MILLM_BF16}, {MILLM_4BIT, false, 7, 1088, 0, 0, 64, 0, MILLM_F16},
	{MILLM_4BIT, false, 12, 64, 0, 12 * 64, 64, 256, MILLM_F32},	/* a slice of a fused tensor */
	{MILLM_4BIT, false, 40, 96, 0, 40 * 96 * 5, 4096, 256, MILLM_BF16},	/* within a large block, rows straddle them */
	{MILLM_4BIT, false, 20, 32, 0, 0, 32, 256, MILLM_BF16},
	{MILLM_4BIT, false, 9, 64, 0, 16, 64, 256, MILLM_BF16},	/* begins within a chunk */
	{MILLM_4BIT, false, 11, 37, 0, 11 * 37, 64, 256, MILLM_BF16},	/* begins within a byte */
	{MILLM_4BIT, false, 300, 65, 0, 70001, 64, 256, MILLM_BF16},
	{MILLM_4BIT, false, 33, 2112, 0, 0, 64, 256, MILLM_F32}, {MILLM_4BIT, false, 18, 96, 0, 18 * 96 * 3, 4096, 0, MILLM_F32},
	{MILLM_INT8, false, 35, 2050, 0, 0, 0, 0, 0},
	/* 64 columns at a time: not all warps have some, steps are cut short, splits of columns */
	{MILLM_BF16, false, 17, 64, 0, 0, 0, 0, 0}, {MILLM_BF16, false, 150, 1216, 0, 0, 0, 0, 0}, {MILLM_INT8, false, 130, 192, 0, 0, 0, 0, 0},
	{MILLM_INT8, false, 16, 2112, 0, 0, 0, 0, 0}, {MILLM_4BIT, false, 129, 1088, 0, 64 * 3, 64, 256, MILLM_F32},
	{MILLM_4BIT, false, 31, 576, 0, 0, 128, 0, MILLM_F32}, {MILLM_4BIT, false, 15, 2048, 0, 4096 * 6, 4096, 256, MILLM_F32},
};
#define N_SHAPES (int) (sizeof(shapes) / sizeof(shapes[0]))

/* What tensor cores' rounding to bfloat16, 2^-9, makes of sums of values that it does not hold. */
#define TOLERANCE_ROUNDED 1e-2
/* One rounding to bfloat16, 2^-9, beside what the other numbers allow: rows that were left for cuBLASLt alone are read back */
#define TOLERANCE_BF16 4e-3
/* A key that is rotated here and there differs in its last bits, and so may become the next int8 code, 1/127 of the largest of its block. */
#define TOLERANCE_CODE 1e-2
/* For tensor cores a code times its scale becomes float16, 2^-11. */
#define TOLERANCE_F16 1e-3
/* And of 64 such products, times 40, the deviation is 0.015, and the exponential makes it relative. */
#define TOLERANCE_STEEP 6e-2

/* Does bfloat16 hold its weights? */
static bool
is_coarse(const Shape *shape)
{
	return shape->dtype == MILLM_4BIT ? shape->rounded == MILLM_BF16 : shape->dtype != MILLM_INT8;
}

/* Neither products of few rows nor those of whole blocks of columns round 4-bit weights, but these their codebook; other tensor cores' round everything. */
static double
tolerance(const Shape *shape, const char *kernels, bool deterministic, int n)
{
	const bool	are_few = deterministic || n <= MILLM_CUDA_FEW_ROWS;
	const bool	is_exact = kernels || (are_few || (n <= MILLM_CUDA_FRAGMENT_ROWS && is_skinny(shape)) ? shape->dtype != MILLM_4BIT || shape->rounded == MILLM_F32 : is_coarse(shape));

	return is_exact ? EPSILON * 8 * sqrt((double) shape->n_in) : TOLERANCE_ROUNDED;
}

static void
run_matmul(const Shape *shape, const char *kernels, bool deterministic, int n, bool accumulate, bool has_bias)
{
	enum {BEYOND = 3};			/* columns of x that are not the matmul's, as where experts are smaller than the buffer: NaN */
	const int64_t width = shape->n_in + BEYOND;
	Rig			r;
	Stored		s;
	float	   *x = coarse(floats(N_ROWS * width, 0), N_ROWS * width),
			   *y = floats(N_ROWS * shape->n_out, 0),
			   *bias = floats(shape->n_out, 0);
	const float *result[2];
	int32_t		every_row[N_ROWS];
	char		what[128];

	snprintf(what, sizeof(what), "matmul of dtype %d, %lld x %lld, %d rows, kernels %s", shape->dtype, (long long) shape->n_out, (long long) shape->n_in, n,
			 kernels ? kernels : "best");
	for (int t = 0; t < N_ROWS; t++)
		every_row[t] = t;
	for (int64_t i = 0; i < N_ROWS * width; i++)
		x[i] = i % width < shape->n_in ? x[i] : NAN;
	rig_init(&r, 1, 1, 8);
	store(&s, shape);
	r.options.deterministic = deterministic;
	r.layer.o.dtype = MILLM_BF16;	/* a model that is not stored in float32 */
	r.layer.q = s.w;
	r.layer.k = table(x, width);
	r.layer.v = table(y, shape->n_out);
	r.layer.q_bias = (MillmVector) {has_bias ? bias : NULL, shape->n_out};
	rig_open(&r, kernels);
	for (int i = 0; i < 2; i++)
	{
		MillmBuffer *in = buffer(&r, i, width);
		MillmBuffer *out = buffer(&r, i, shape->n_out);
		MillmBuffer *all = buffer(&r, i, shape->n_out);
		const MillmProjection p = {out, &r.layer.q, &r.layer.q_bias, accumulate};

		fill(&r, i, in, &r.layer.k, N_ROWS);
		fill(&r, i, out, &r.layer.v, N_ROWS);
		r.be[i]->matmul(r.be[i], &p, 1, in, n);
		r.be[i]->select(r.be[i], all, out, every_row, N_ROWS);	/* those past n, too: they are as they were */
		result[i] = r.be[i]->buffer_read(r.be[i], all);
	}
	assert_near(result[1], result[0], N_ROWS * shape->n_out, tolerance(shape, kernels, deterministic, n), what);
	rig_close(&r);
	discard(&s);
	free(x);
	free(y);
	free(bias);
}

static void
test_matmul(void **state)
{
	/* our tensor kernels up to 64, then cuBLASLt, which refuses 67 */
	static const int n_rows[] = {1, 2, 3, 5, 8, 9, 17, 33, 64, 67, N_ROWS};

	(void) state;
	for (int i = 0; i < N_SHAPES; i++)
		for (size_t j = 0; j < sizeof(n_rows) / sizeof(n_rows[0]); j++)
			run_matmul(&shapes[i], NULL, false, n_rows[j], j % 2, (i + j) % 3 == 0);
}

/* In float32, where there are no tensor cores of bfloat16. */
static void
test_matmul_old_device(void **state)
{
	(void) state;
	millm_emulated.capability = 7;
	for (int i = 0; i < N_SHAPES; i++)
	{
		run_matmul(&shapes[i], NULL, false, N_ROWS, i % 2, i % 3);
		run_matmul(&shapes[i], NULL, false, 9, i % 3, i % 2);
	}
	millm_emulated.capability = 9;
}

/* The obvious kernel, and few rows at a time where bits must not depend on the company. */
static void
test_matmul_others(void **state)
{
	(void) state;
	for (int i = 0; i < N_SHAPES; i++)
	{
		run_matmul(&shapes[i], "ref", false, 5, true, true);
		run_matmul(&shapes[i], NULL, true, 19, false, true);
	}
}

/* Projections of one input: side by side in a launch, or in two where formats differ, with biases and sums of their own. */
static void
test_projections(void **state)
{
	static const int sets[][3] = {{12, 12, 16}, {6, 8, 6}, {3, 4, 17}, {1, 1, 1}};
	static const int n_rows[] = {1, 2, 4, 7, 19, 64};

	(void) state;
	for (size_t i = 0; i < sizeof(sets) / sizeof(sets[0]) * 2; i++)
		for (size_t j = 0; j < sizeof(n_rows) / sizeof(n_rows[0]); j++)
		{
			const int	n = n_rows[j];
			const int	n_projections = i % 2 ? 3 : 2;
			Rig			r;
			Stored		s[3];
			Shape		shape[3];
			float	   *x = coarse(floats(N_ROWS * 128, 0), N_ROWS * 128),
					   *bias = floats(200, 0);
			MillmBuffer *y[2][3];
			MillmWeight *places[] = {&r.layer.q, &r.layer.k, &r.layer.v};
			MillmVector *biases[] = {&r.layer.q_bias, &r.layer.k_bias, &r.layer.v_bias};

			rig_init(&r, 1, 1, 8);
			r.options.deterministic = n == 19;
			r.layer.o.dtype = MILLM_BF16;
			for (int k = 0; k < 3; k++)
			{
				shape[k] = shapes[sets[i / 2][k]];
				shape[k].rounded = MILLM_F32;	/* as few rows have it */
				shape[k].n_in = 128;
				shape[k].n_out = 5 + 60 * k;
				shape[k].first = shape[k].first ? 64 * 128 : 0;
				store(&s[k], &shape[k]);
				*places[k] = s[k].w;
				*biases[k] = (MillmVector) {k == 1 ? NULL : bias, shape[k].n_out};
			}
			r.layer.up = table(x, 128);
			rig_open(&r, NULL);
			for (int b = 0; b < 2; b++)
			{
				MillmBuffer *in = buffer(&r, b, 128);
				MillmProjection p[3];

				fill(&r, b, in, &r.layer.up, N_ROWS);
				for (int k = 0; k < 3; k++)
				{
					y[b][k] = buffer(&r, b, shape[k].n_out);
					p[k] = (MillmProjection) {y[b][k], places[k], biases[k], false};
				}
				r.be[b]->matmul(r.be[b], p, n_projections, in, n);
			}
			for (int k = 0; k < n_projections; k++)
			{
				char		what[64];

				snprintf(what, sizeof(what), "projection %d of %d, of set %zu, %d rows", k, n_projections, i / 2, n);
				assert_near(r.be[1]->buffer_read(r.be[1], y[1][k]), r.be[0]->buffer_read(r.be[0], y[0][k]), n * shape[k].n_out,
							n == 64 ? TOLERANCE_ROUNDED : EPSILON * 8 * sqrt(128), what);
			}
			rig_close(&r);
			for (int k = 0; k < 3; k++)
				discard(&s[k]);
			free(x);
			free(bias);
		}
}

/* The factor is 1 where bfloat16 holds the values; else it is of use. */
static void
test_codebook_unit(void **state)
{
	float		exact[16];
	double		error[2] = {0, 0},
				sum = 0;
	const float units[2] = {1, millm_cuda_codebook_unit(millm_nf4_codebook)};

	(void) state;
	for (int k = 0; k < 16; k++)
	{
		exact[k] = millm_bf16_to_f32(millm_f32_to_bf16(millm_nf4_codebook[k]));
		sum += millm_nf4_codebook[k] * millm_nf4_codebook[k];
		for (int i = 0; i < 2; i++)
			error[i] += pow(millm_bf16_to_f32(millm_f32_to_bf16(units[i] * millm_nf4_codebook[k])) / units[i] - millm_nf4_codebook[k], 2);
	}
	assert_true(millm_cuda_codebook_unit(exact) == 1);
	assert_true(sqrt(error[1] / sum) < 7.2e-4 && sqrt(error[0] / sum) > 1e-3);
}

/* A product takes the rows that are there now: not those that an operation has left as fragments, where others came since, in place or of another buffer. */
static void
test_fragments(void **state)
{
	enum {WIDTH = 64, N_CASES = 8};
	static const int n_rows[] = {5, 20, N_ROWS};	/* fragments with and without what rounding took, and rows for the library */
	const Shape shape = {MILLM_BF16, false, 24, WIDTH, 0, 0, 0, 0, 0};
	const MillmVector none = {0};
	int32_t		rows[N_ROWS];

	(void) state;
	for (int t = 0; t < N_ROWS; t++)
		rows[t] = t ^ 1;
	for (size_t k = 0; k < sizeof(n_rows) / sizeof(n_rows[0]); k++)
		for (int which = 0; which < N_CASES; which++)
		{
			const int	n = n_rows[k];
			Rig			r;
			Stored		s;
			float	   *x = floats(N_ROWS * WIDTH, 0);
			const float *result[2];
			char		what[64];

			rig_init(&r, 1, 1, 8);
			store(&s, &shape);
			r.layer.o.dtype = MILLM_BF16;
			r.layer.q = s.w;
			r.layer.k = table(x, WIDTH);
			rig_open(&r, NULL);
			for (int i = 0; i < 2; i++)
			{
				MillmBackend *be = r.be[i];
				MillmBuffer *in = buffer(&r, i, WIDTH),
						   *y = buffer(&r, i, WIDTH),
						   *other = buffer(&r, i, WIDTH),
						   *out = buffer(&r, i, shape.n_out);
				const MillmProjection p = {out, &r.layer.q, &none, false};
				const int	n_now = which == 3 ? n - 2 : n;

				fill(&r, i, in, &r.layer.k, n);
				be->norm(be, y, in, MILLM_NORM_LAYER, &none, &none, 1e-5f, 1, WIDTH, n);
				if (which == 1)
					be->scale(be, y, -3, n);
				else if (which == 2)
					be->norm(be, other, y, MILLM_NORM_LAYER, &none, &none, 1e-5f, 1, WIDTH, n);
				else if (which == 4)
					be->activation(be, y, MILLM_ACT_SILU, y, in, WIDTH, n);
				else if (which == 5)
					be->add(be, y, in, 2, n);
				else if (which == 6)
					be->select(be, y, in, rows, n);
				else if (which == 7 && n <= MILLM_CUDA_FRAGMENT_ROWS)	/* those of many are gone then */
				{
					be->matmul(be, &p, 1, in, n);	/* which takes their place */
					be->matmul(be, &p, 1, in, n);
				}
				be->matmul(be, &p, 1, y, n_now);
				result[i] = be->buffer_read(be, out);
			}
			snprintf(what, sizeof(what), "case %d, %d rows", which, n);
			assert_near(result[1], result[0], n * shape.n_out, n > MILLM_CUDA_SKINNY_ROWS ? TOLERANCE_ROUNDED : 2e-5, what);
			rig_close(&r);
			discard(&s);
			free(x);
		}
}

/* More rows of weights than a tile of them has, and more rows than one of these: what is beside y stays as it is. */
static void
test_blas_tiles(void **state)
{
	static const Shape tiled[] = {{MILLM_INT8, false, 4100, 33, 0, 0, 0, 0, 0}, {MILLM_4BIT, false, 4160, 64, 0, 0, 64, 256, MILLM_BF16},
		{MILLM_F16, false, 4097, 5, 0, 0, 0, 0, 0}, {MILLM_BF16, false, 4099, 40, 8, 0, 0, 0, 0}, {MILLM_MXFP4, false, 30, 64, 0, 0, 0, 0, 0}};
	enum {N = 11, AT_ONCE = 4};

	(void) state;
	assert_true(millm_cuda_blas_is_there());
	for (size_t i = 0; i < sizeof(tiled) / sizeof(tiled[0]); i++)
	{
		const int64_t n_out = tiled[i].n_out,
					n_in = tiled[i].n_in,
					stride = n_out / 32 * 32 + 64;
		Rig			r;
		Stored		s;
		MillmCudaWeights *weights;
		MillmCudaBlas *blas;
		MillmCudaQueue *queue;
		MillmCudaMatmul m = {.accumulate = true, .n = N};
		float	   *x = coarse(floats(N * 64, 0), N * 64),
				   *y,
				   *row = bytes_of((size_t) n_in * sizeof(float));
		MillmError	err;
		bool		is_done;

		rig_init(&r, 1, 1, 8);
		store(&s, &tiled[i]);
		r.layer.q = s.w;
		assert_int_equal(millm_cuda_weights_create(&r.model, &(MillmUploadOptions) {0}, &weights, &err), MILLM_OK);
		assert_int_equal(millm_cuda_blas_create(n_in, AT_ONCE, NULL, &blas, &err), MILLM_OK);
		assert_int_equal(millm_cuda_queue_create(N, true, NULL, &queue, &err), MILLM_OK);
		assert_int_equal(cudaMalloc((void **) &y, (size_t) (N * stride) * sizeof(float)), cudaSuccess);
		for (int64_t k = 0; k < N * stride; k++)
			y[k] = 1;
		m.y = (MillmRows) {y, stride};
		m.x = (MillmRows) {x, 64};
		m.w = *millm_cuda_weight(weights, &r.layer.q);
		assert_int_equal(millm_cuda_blas_matmul(blas, &m, false, queue, NULL, &is_done), cudaSuccess);
		assert_true(is_done);
		for (int64_t o = 0; o < n_out; o++)
		{
			millm_weight_decode(row, &s.w, o, 0, n_in);
			for (int t = 0; t < N; t++)
			{
				double		sum = 1,
							size = 0;

				for (int64_t k = 0; k < n_in; k++)
				{
					sum += (double) row[k] * (double) x[t * 64 + k];
					size += fabs((double) row[k] * (double) x[t * 64 + k]);
				}
				if (!(fabs((double) y[t * stride + o] - sum) <= size * 0x1p-8 + 1e-5))
					fail_msg("dtype %d: output %lld of row %d is %.9g, not %.9g", tiled[i].dtype, (long long) o, t, (double) y[t * stride + o], sum);
			}
		}
		for (int t = 0; t < N; t++)
			for (int64_t o = n_out; o < stride; o++)
				assert_true(y[t * stride + o] == 1);
		m.w.n_in = n_in + 1;	/* wider than was said */
		assert_int_equal(millm_cuda_blas_matmul(blas, &m, false, queue, NULL, &is_done), cudaSuccess);
		assert_false(is_done);
		cudaFree(y);
		millm_cuda_queue_free(queue);
		millm_cuda_blas_free(blas);
		millm_cuda_weights_free(weights);
		assert_int_equal(millm_emulated.n_allocations, r.n_alive);
		discard(&s);
		free(x);
		free(row);
	}
}

/* The bits of row t of n, of kernels that promise so. */
static void
test_company(void **state)
{
	(void) state;
	for (int i = 0; i < N_SHAPES; i++)
	{
		const Shape *shape = &shapes[i];
		Rig			r;
		Stored		s;
		float	   *x = floats(N_ROWS * shape->n_in, 0);
		float	   *alone = bytes_of((size_t) (N_ROWS * shape->n_out) * sizeof(float));
		const MillmVector none = {0};

		rig_init(&r, 1, 1, 8);
		store(&s, shape);
		r.options.deterministic = true;
		r.layer.q = s.w;
		r.layer.k = table(x, shape->n_in);
		rig_open(&r, NULL);
		for (int n = 1; n <= 17; n += 8)
			for (int t = 0; t < 17; t += n)
			{
				MillmBuffer *in = buffer(&r, 1, shape->n_in);
				MillmBuffer *out = buffer(&r, 1, shape->n_out);
				const MillmProjection p = {out, &r.layer.q, &none, false};
				int32_t		rows[17];
				const int	n_now = t + n > 17 ? 17 - t : n;

				for (int k = 0; k < n_now; k++)
					rows[k] = t + k;
				r.be[1]->embed(r.be[1], in, &r.layer.k, rows, false, n_now);
				r.be[1]->matmul(r.be[1], &p, 1, in, n_now);
				if (n == 1)
					memcpy(alone + t * shape->n_out, r.be[1]->buffer_read(r.be[1], out), (size_t) shape->n_out * sizeof(float));
				else
					assert_memory_equal(r.be[1]->buffer_read(r.be[1], out), alone + t * shape->n_out, (size_t) (n_now * shape->n_out) * sizeof(float));
			}
		rig_close(&r);
		discard(&s);
		free(x);
		free(alone);
	}
}

/* ---- attention ---- */

typedef struct Case
{
	int			n_heads, n_kv_heads, head_dim, window;
	float		softcap;
	bool		has_sinks, has_alibi, alibi_rounded;
	int			rotary_dim;		/* 0: none */
	bool		interleaved, fused;
	bool		is_steep;		/* scores so far apart that what is summed must be brought to the largest of all */
} Case;

/* Keys and values are float16, unless weights are float32 or the kernels the obvious ones. */
static void
run_attention(const Case *c, MillmDtype weights, const char *kernels, MillmKvFormat format)
{
	enum {STEPS = 4};
	static const int step_rows[STEPS] = {67, 1, 2, 20};	/* of one sequence; in the last step one more of another */
	const int64_t q_size = (int64_t) c->n_heads * c->head_dim;
	const int64_t kv_size = (int64_t) c->n_kv_heads * c->head_dim;
	Rig			r;
	float	   *q = coarse(floats(N_ROWS * q_size, 0), N_ROWS * q_size),
			   *k = floats(N_ROWS * kv_size, 0),
			   *v = floats(N_ROWS * kv_size, 0),
			   *qkv = floats(N_ROWS * (q_size + 2 * kv_size), 0),
			   *sinks = floats(c->n_heads, 0),
			   *slopes = floats(c->n_heads, 1),
			   *inv_freq = floats(c->head_dim, 1);
	int32_t		pages[2][6] = {{7, 3, 11, 2, 40, 41}, {5, 63, 0, 1, 42, 43}};
	const MillmAttention a = {.n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim, .window = c->window,
		.scale = c->is_steep ? 40 : 0.3f, .softcap = c->softcap, .sinks = c->has_sinks ? sinks : NULL};
	char		what[128];

	snprintf(what, sizeof(what), "attention of %d heads, %d for keys, of %d dims, window %d, softcap %g, %d to rotate, weights of dtype %d, KV format %d", c->n_heads,
			 c->n_kv_heads, c->head_dim, c->window, (double) c->softcap, c->rotary_dim, weights, format);
	/* what float16 can hold, so that only what is rotated on the way differs, if that is what they are kept in */
	for (int64_t i = 0; i < N_ROWS * kv_size; i++)
	{
		k[i] = millm_f16_to_f32(millm_f32_to_f16(k[i]));
		v[i] = millm_f16_to_f32(millm_f32_to_f16(v[i]));
	}
	for (int64_t i = 0; i < N_ROWS * (q_size + 2 * kv_size); i++)
		qkv[i] = millm_f16_to_f32(millm_f32_to_f16(qkv[i]));
	rig_init(&r, c->n_heads, c->n_kv_heads, c->head_dim);
	r.options.kv_format = format;
	r.layer.o.dtype = weights;
	if (c->rotary_dim > 0)
	{
		r.model.config.position = MILLM_POS_ROPE;
		r.model.config.rotary_dim = c->rotary_dim;
		r.model.config.rope_interleaved = c->interleaved;
		r.model.config.rope = (MillmRope) {.inv_freq = inv_freq, .attention_factor = 1.1f};
	}
	r.model.config.alibi_slopes = c->has_alibi ? slopes : NULL;
	r.model.config.alibi_rounded = c->alibi_rounded;
	r.layer.q = table(q, q_size);
	r.layer.k = table(k, kv_size);
	r.layer.v = table(v, kv_size);
	r.layer.qkv = table(qkv, q_size + 2 * kv_size);
	r.layer.sinks = (MillmVector) {sinks, c->n_heads};
	rig_open(&r, kernels);
	{
		MillmBuffer *bq[2],
				   *bk[2],
				   *bv[2],
				   *bqkv[2],
				   *by[2];
		int			length = 0;

		for (int i = 0; i < 2; i++)
		{
			bq[i] = buffer(&r, i, q_size);
			bk[i] = buffer(&r, i, kv_size);
			bv[i] = buffer(&r, i, kv_size);
			bqkv[i] = buffer(&r, i, q_size + 2 * kv_size);
			by[i] = buffer(&r, i, q_size);
		}
		for (int step = 0; step < STEPS; step++)
		{
			const int	n = step_rows[step] + (step == STEPS - 1);
			int32_t		positions[N_ROWS],
						planned[N_ROWS];
			const int32_t *tables[N_ROWS];
			const bool	is_rounded = (weights != MILLM_F32 || format == MILLM_KV_INT8) && !kernels;
			const bool	are_many = n > 3;	/* rows of a sequence: queries and weights are in float16, too */
			const bool	is_left = n > MILLM_CUDA_FRAGMENT_ROWS && q_size % 64 == 0;
			const float *y[2];

			for (int t = 0; t < n; t++)
			{
				const bool	is_other = step == STEPS - 1 && t == n - 1;

				positions[t] = is_other ? 0 : length + t;
				planned[t] = 96;
				tables[t] = pages[is_other];
			}
			for (int i = 0; i < 2; i++)
			{
				MillmBackend *be = r.be[i];

				be->begin(be, positions, planned, tables, n);
				if (c->fused)
				{
					fill(&r, i, bqkv[i], &r.layer.qkv, n);
					be->split_qkv(be, &a, bq[i], bk[i], bv[i], bqkv[i], n);
				}
				else
				{
					fill(&r, i, bq[i], &r.layer.q, n);
					fill(&r, i, bk[i], &r.layer.k, n);
					fill(&r, i, bv[i], &r.layer.v, n);
				}
				be->rope_and_store(be, &a, bq[i], bk[i], bv[i], n);
				if (step == 1)
					be->copy_page(be, 9, 11);
				be->attention(be, &a, by[i], bq[i], n);
				y[i] = be->buffer_read(be, by[i]);
			}
			assert_near(y[1], y[0], n * q_size,
						format == MILLM_KV_INT8 && c->is_steep && !kernels ? TOLERANCE_STEEP
						: format == MILLM_KV_INT8 && c->rotary_dim > 0 ? TOLERANCE_CODE
						: is_rounded && is_left ? TOLERANCE_BF16
						: format == MILLM_KV_INT8 && !kernels ? TOLERANCE_F16
						: is_rounded && c->rotary_dim > 0 ? 3e-3
						: c->is_steep || (is_rounded && are_many) ? 1e-3
						: 1e-5, what);
			length += step_rows[step];
			if (step == 1)
				pages[0][2] = 9;	/* the copy is what is read from now on */
		}
	}
	rig_close(&r);
	free(q);
	free(k);
	free(v);
	free(qkv);
	free(sinks);
	free(slopes);
	free(inv_freq);
}

static void
test_attention(void **state)
{
	static const Case cases[] = {
		{4, 2, 8, 0, 0, false, false, false, 0, false, false, false}, {4, 1, 64, 0, 0, false, false, false, 64, false, false, false},
		{3, 3, 33, 5, 0, false, false, false, 0, false, true, false}, {2, 1, 96, 17, 2.5f, true, false, false, 0, false, false, false},
		{2, 2, 80, 0, 0, false, true, false, 0, false, true, false}, {4, 2, 128, 0, 30, false, true, true, 0, false, true, false},
		{2, 1, 256, 16, 0, true, false, false, 0, false, false, false}, {2, 1, 64, 0, 0, false, false, false, 32, true, false, false},
		{2, 2, 20, 0, 0, false, false, false, 6, false, false, false}, {1, 1, 300, 1, 0, false, false, false, 0, false, false, false},
		{1, 1, 1024, 0, 0, true, false, false, 0, false, false, false}, {6, 2, 1, 0, 0, false, false, false, 0, false, false, false},
		{2, 1, 64, 0, 0, false, false, false, 0, false, false, true}, {2, 1, 64, 0, 0, true, false, false, 0, false, false, true},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		for (int j = 0; j < 3; j++)
			for (int format = 0; format < MILLM_N_KV_FORMATS; format++)
				run_attention(&cases[i], j == 0 ? MILLM_F32 : MILLM_BF16, j == 2 ? "ref" : NULL, format);
}

/* Rows at these positions of sequences that share eight pages over and over. */
enum {LONG_PAGES = 300, LONG_ROWS = 9};
static const int32_t long_positions[LONG_ROWS] = {0, 4321, 63, 64, 299, 4096, 777, 4095, 15};

static int64_t
splits_by_hand(int64_t position, int64_t window)
{
	const int64_t seen = window > 0 && window < position + 1 ? window : position + 1;
	int64_t		span = 64;

	while (span * 64 < seen)
		span *= 2;
	return position / span - (position + 1 - seen) / span + 1;
}

/* Contexts of many splits, by kernels that read them in splits: as the CPU has them, and in any company the same bits. */
static void
run_splits(int n_heads, int n_kv_heads, int head_dim, int window, bool has_sinks, MillmDtype weights, MillmKvFormat format)
{
	const int64_t q_size = (int64_t) n_heads * head_dim;
	const int64_t kv_size = (int64_t) n_kv_heads * head_dim;
	Rig			r;
	float	   *q = floats(N_ROWS * q_size, 0),
			   *k = coarse(floats(N_ROWS * kv_size, 0), N_ROWS * kv_size),
			   *v = coarse(floats(N_ROWS * kv_size, 0), N_ROWS * kv_size),
			   *sinks = floats(n_heads, 0);
	int32_t		pages[LONG_ROWS][LONG_PAGES];	/* the same, of as many sequences */
	const int32_t *tables[LONG_ROWS],
			   *of_one[N_ROWS];
	const MillmAttention a = {.n_heads = n_heads, .n_kv_heads = n_kv_heads, .head_dim = head_dim, .window = window, .scale = 0.3f,
		.sinks = has_sinks ? sinks : NULL};
	const float *y[2];
	char		what[128];

	snprintf(what, sizeof(what), "splits of %d heads, %d for keys, of %d dims, window %d, weights of dtype %d, KV format %d", n_heads, n_kv_heads, head_dim,
			 window, weights, format);
	for (int i = 0; i < LONG_ROWS * LONG_PAGES; i++)
		pages[i / LONG_PAGES][i % LONG_PAGES] = i % LONG_PAGES % 8 * 5 % 8 + 3;
	for (int t = 0; t < LONG_ROWS; t++)
		tables[t] = pages[t];
	for (int t = 0; t < N_ROWS; t++)
		of_one[t] = pages[0];
	rig_init(&r, n_heads, n_kv_heads, head_dim);
	r.options.max_entries = LONG_ROWS * LONG_PAGES;
	r.options.kv_format = format;
	r.layer.o.dtype = weights;
	r.layer.q = table(q, q_size);
	r.layer.k = table(k, kv_size);
	r.layer.v = table(v, kv_size);
	r.layer.sinks = (MillmVector) {sinks, n_heads};
	rig_open(&r, NULL);
	for (int i = 0; i < 2; i++)
	{
		MillmBackend *be = r.be[i];
		MillmBuffer *bq = buffer(&r, i, q_size),
				   *bk = buffer(&r, i, kv_size),
				   *bv = buffer(&r, i, kv_size),
				   *by = buffer(&r, i, q_size);
		int32_t		positions[64];
		float	   *together = bytes_of((size_t) (LONG_ROWS * q_size) * sizeof(float));

		for (int half = 0; half < 2; half++)
		{
			for (int t = 0; t < 64; t++)
				positions[t] = half * 64 + t;
			be->begin(be, positions, positions, of_one, 64);
			fill(&r, i, bq, &r.layer.q, 64);
			fill(&r, i, bk, half ? &r.layer.v : &r.layer.k, 64);
			fill(&r, i, bv, half ? &r.layer.k : &r.layer.v, 64);
			be->rope_and_store(be, &a, bq, bk, bv, 64);
			assert_int_equal(be->first_bad(be), -1);
		}
		be->begin(be, long_positions, long_positions, tables, LONG_ROWS);
		fill(&r, i, bq, &r.layer.q, LONG_ROWS);
		be->attention(be, &a, by, bq, LONG_ROWS);
		y[i] = be->buffer_read(be, by);
		for (int t = 0; t < LONG_ROWS && i == 1; t++)
		{
			assert_int_equal(millm_cuda_splits(long_positions[t], window), splits_by_hand(long_positions[t], window));
			memcpy(together + t * q_size, y[1] + t * q_size, (size_t) q_size * sizeof(float));
		}
		for (int t = 0; t < LONG_ROWS && i == 1; t++)
		{
			const int32_t row[] = {t};

			be->begin(be, long_positions + t, long_positions + t, tables + t, 1);
			be->embed(be, bq, &r.layer.q, row, false, 1);
			be->attention(be, &a, by, bq, 1);
			assert_memory_equal(be->buffer_read(be, by), together + t * q_size, (size_t) q_size * sizeof(float));
		}
		if (i == 1)
			assert_near(together, y[0], LONG_ROWS * q_size, format == MILLM_KV_INT8 ? TOLERANCE_F16 : 2e-5, what);
		free(together);
	}
	rig_close(&r);
	free(q);
	free(k);
	free(v);
	free(sinks);
}

static void
test_splits(void **state)
{
	(void) state;
	for (int format = 0; format < MILLM_N_KV_FORMATS; format++)
	{
		run_splits(2, 1, 64, 0, false, MILLM_BF16, format);
		run_splits(1, 1, 128, 0, true, MILLM_F32, format);
		run_splits(9, 1, 40, 0, false, MILLM_BF16, format);
		run_splits(6, 2, 256, 70, true, MILLM_BF16, format);
		run_splits(5, 1, 8, 4097, false, MILLM_F32, format);
		run_splits(7, 1, 16, 100, false, MILLM_BF16, format);
		run_splits(10, 1, 48, 0, true, MILLM_BF16, format);
		run_splits(4, 2, 112, 33, false, MILLM_BF16, format);
		run_splits(11, 1, 192, 0, false, MILLM_BF16, format);
		run_splits(3, 1, 128, 70, true, MILLM_BF16, format);
		run_splits(3, 1, 248, 0, true, MILLM_BF16, format);
	}
	assert_int_equal(millm_cuda_split_span(4096), 64);
	assert_int_equal(millm_cuda_split_span(4097), 128);
	assert_int_equal(millm_cuda_splits(MILLM_MAX_POSITIONS - 1, 0), 64);
	assert_int_equal(millm_cuda_splits(4096, 4096), 65);	/* which begins within a split */
}

/* A piece of a prompt that several blocks have, behind what was there before, and which begins and ends within a page and a tile. */
static void
run_tiles(int head_dim, int window, bool has_sinks, MillmKvFormat format)
{
	enum {BEFORE = 26, ROWS = 227, TILED_PAGES = (BEFORE + ROWS + 15) / 16};
	const int64_t q_size = 3 * head_dim;
	const MillmAttention a = {.n_heads = 3, .n_kv_heads = 1, .head_dim = head_dim, .window = window, .scale = 0.5f};
	float	   *q = coarse(floats(ROWS * q_size, 0), ROWS * q_size),
			   *k = coarse(floats(ROWS * head_dim, 0), ROWS * head_dim),
			   *v = coarse(floats(ROWS * head_dim, 0), ROWS * head_dim);
	float		sinks[] = {0.5f, 2, -1};
	int32_t		pages[TILED_PAGES],
				rows[ROWS],
				positions[BEFORE + ROWS];
	const int32_t *tables[ROWS];
	const float *y[2];
	Rig			r;
	char		what[128];

	snprintf(what, sizeof(what), "%d rows of a prompt, heads of %d dims, window %d, KV format %d", ROWS, head_dim, window, format);
	for (int i = 0; i < TILED_PAGES; i++)
		pages[i] = i * 5 % TILED_PAGES + 2;
	for (int t = 0; t < ROWS; t++)
	{
		rows[t] = t;
		tables[t] = pages;
	}
	for (int t = 0; t < BEFORE + ROWS; t++)
		positions[t] = t;
	rig_init(&r, 3, 1, head_dim);
	r.options.max_tokens = ROWS;
	r.options.kv_format = format;
	r.layer.o.dtype = MILLM_BF16;
	r.layer.q = (MillmWeight) {.dtype = MILLM_F32, .n_out = ROWS, .n_in = q_size, .stride = q_size, .data = q};
	r.layer.k = (MillmWeight) {.dtype = MILLM_F32, .n_out = ROWS, .n_in = head_dim, .stride = head_dim, .data = k};
	r.layer.v = (MillmWeight) {.dtype = MILLM_F32, .n_out = ROWS, .n_in = head_dim, .stride = head_dim, .data = v};
	r.layer.sinks = has_sinks ? (MillmVector) {sinks, 3} : (MillmVector) {NULL, 0};
	rig_open(&r, NULL);
	for (int i = 0; i < 2; i++)
	{
		MillmBackend *be = r.be[i];
		MillmBuffer *b[4];
		MillmError	err;
		MillmAttention with_sinks = a;

		with_sinks.sinks = has_sinks ? sinks : NULL;
		for (int j = 0; j < 4; j++)
			assert_int_equal(be->buffer_create(be, ROWS, j % 3 == 0 ? q_size : head_dim, true, &b[j], &err), MILLM_OK);
		for (int step = 0; step < 2; step++)
		{
			const int	n = step == 0 ? BEFORE : ROWS;

			be->begin(be, positions + step * BEFORE, positions + step * BEFORE, tables, n);
			be->embed(be, b[0], &r.layer.q, rows, false, n);
			be->embed(be, b[1], step == 0 ? &r.layer.v : &r.layer.k, rows, false, n);
			be->embed(be, b[2], step == 0 ? &r.layer.k : &r.layer.v, rows, false, n);
			be->rope_and_store(be, &with_sinks, b[0], b[1], b[2], n);
			be->attention(be, &with_sinks, b[3], b[0], n);
			assert_int_equal(be->first_bad(be), -1);
		}
		y[i] = be->buffer_read(be, b[3]);
	}
	assert_near(y[1], y[0], ROWS * q_size, TOLERANCE_F16, what);
	rig_close(&r);
	free(q);
	free(k);
	free(v);
}

static void
test_tiles(void **state)
{
	(void) state;
	for (int format = 0; format < MILLM_N_KV_FORMATS; format++)
	{
		run_tiles(64, 0, false, format);
		run_tiles(40, 50, true, format);
		run_tiles(128, 0, true, format);
		run_tiles(96, 9, false, format);
		run_tiles(256, 0, false, format);
		run_tiles(200, 70, true, format);
	}
}

/* A backend for one row at a time has room for as many splits as a launch has, which is more than the row's; the emulation tells who writes behind it. */
static void
test_one_row(void **state)
{
	static const int32_t ends[] = {64, 129, 330};
	const int64_t size = 8 * 64;
	const MillmAttention a = {.n_heads = 8, .n_kv_heads = 8, .head_dim = 64, .scale = 0.3f};
	float	   *x = coarse(floats(N_ROWS * size, 0), N_ROWS * size);
	int32_t		pages[21];
	const int32_t *tables[] = {pages};
	Rig			r;

	(void) state;
	for (int i = 0; i < 21; i++)
		pages[i] = 3;
	rig_init(&r, 8, 8, 64);
	r.options.max_tokens = 1;
	r.layer.o.dtype = MILLM_BF16;
	r.layer.q = table(x, size);
	for (size_t e = 0; e < sizeof(ends) / sizeof(ends[0]); e++)
	{
		const int32_t last = ends[e] - 1;
		const float *y[2];

		r.options.max_entries = last / 16 + 1;
		rig_open(&r, NULL);
		for (int i = 0; i < 2; i++)
		{
			MillmBackend *be = r.be[i];
			MillmBuffer *bq = buffer(&r, i, size),
					   *by = buffer(&r, i, size);

			for (int32_t t = 0; t < 16; t++)
			{
				be->begin(be, &t, &t, tables, 1);
				be->embed(be, bq, &r.layer.q, &t, false, 1);
				be->rope_and_store(be, &a, bq, bq, bq, 1);
				assert_int_equal(be->first_bad(be), -1);
			}
			be->begin(be, &last, &last, tables, 1);
			be->attention(be, &a, by, bq, 1);
			y[i] = be->buffer_read(be, by);
		}
		assert_near(y[1], y[0], size, 2e-5, "the last of so many rows");
		rig_close(&r);
	}
	free(x);
}

/* ---- the rest ---- */

/* Columns of the rows below: more than a block, and no multiple of anything. */
#define WIDE 515

static void
run_rows(int backwards)
{
	static const MillmAct acts[] = {MILLM_ACT_SILU, MILLM_ACT_GELU_TANH, MILLM_ACT_GELU_ERF, MILLM_ACT_RELU};
	const int	n = 5;
	const int32_t rows[] = {3, 0, 4, 1, 2};
	const float shares[] = {0.5f, -1, 2, 0, 1};
	Rig			r;
	float	   *x = floats(N_ROWS * WIDE, 0),
			   *up = floats(N_ROWS * WIDE, 0),
			   *pairs = floats(N_ROWS * 2 * WIDE, 0),
			   *weight = floats(WIDE, 1),
			   *bias = floats(WIDE, 0),
			   *odd = floats(N_ROWS * 2, 0),
			   *fours = floats(N_ROWS * 8, 0);
	const float *y[2];
	MillmVector none = {0};

	for (int64_t i = 0; i < N_ROWS * 2 * WIDE; i++)
		pairs[i] *= 10;			/* beyond the limits */
	odd[2] = INFINITY;			/* in row 1 */
	fours[8 + 5] = -INFINITY;	/* the same */
	odd[5] = NAN;				/* in row 2 */
	rig_init(&r, 1, 1, 8);
	r.layer.q = table(x, WIDE);
	r.layer.k = table(up, WIDE);
	r.layer.v = table(pairs, 2 * WIDE);
	r.layer.o = table(odd, 2);
	r.layer.gate = table(fours, 8);
	r.layer.attn_norm = (MillmVector) {weight, WIDE};
	r.layer.attn_norm_bias = (MillmVector) {bias, WIDE};
	rig_open(&r, NULL);
	millm_emulated.backwards = backwards;

#define COMPARE(what, tolerance, operation) \
	for (int i = 0; i < 2; i++) \
	{ \
		MillmBackend *be = r.be[i]; \
		MillmBuffer *a = buffer(&r, i, WIDE), *b = buffer(&r, i, WIDE), *p = buffer(&r, i, 2 * WIDE); \
\
		fill(&r, i, a, &r.layer.q, n); \
		fill(&r, i, b, &r.layer.k, n); \
		fill(&r, i, p, &r.layer.v, n); \
		operation; \
		y[i] = be->buffer_read(be, a); \
	} \
	assert_near(y[1], y[0], n * WIDE, tolerance, what)

	COMPARE("embed", 0, be->embed(be, a, &r.layer.k, rows, true, n));
	COMPARE("RMS norm", 1e-6, be->norm(be, a, a, MILLM_NORM_RMS, &r.layer.attn_norm, &none, 1e-5f, 1, WIDE, n));
	COMPARE("layer norm", 2e-6, be->norm(be, a, b, MILLM_NORM_LAYER, &r.layer.attn_norm, &r.layer.attn_norm_bias, 1e-5f, 1, WIDE, n));
	COMPARE("layer norm without weights", 2e-6, be->norm(be, a, b, MILLM_NORM_LAYER, &none, &none, 1e-5f, 1, WIDE, n));
	COMPARE("norm of parts, each its own weight", 2e-6, be->norm(be, a, b, MILLM_NORM_LAYER, &r.layer.attn_norm, &r.layer.attn_norm_bias, 1e-5f, 5, 103, n));
	COMPARE("norm of parts, one weight", 1e-6,
			be->norm(be, a, a, MILLM_NORM_RMS, &((MillmVector) {weight, 103}), &none, 1e-5f, 5, 103, n));
	for (size_t i = 0; i < sizeof(acts) / sizeof(acts[0]); i++)
	{
		const MillmAct act = acts[i];

		COMPARE("activation with up", 1e-6, be->activation(be, b, act, a, b, WIDE, n); be->select(be, a, b, rows, n));
		COMPARE("activation", 1e-6, be->activation(be, a, act, a, NULL, WIDE, n));
	}
	COMPARE("activation of pairs", 1e-6, be->activation(be, a, MILLM_ACT_SWIGLU_PAIRS, p, NULL, WIDE, n));
	COMPARE("add", 1e-6, be->add(be, a, b, 0.37f, n));
	COMPARE("scale", 0, be->scale(be, a, -1.7f, n));
	COMPARE("softcap", 1e-6, be->softcap(be, a, 0.4f, n));
	COMPARE("add_rows", 1e-6, be->add_rows(be, a, b, rows, shares, n));
	COMPARE("add_gated", 1e-6, be->add_gated(be, a, b, b, n));
	COMPARE("select", 0, be->select(be, a, b, rows, n));
#undef COMPARE

	/* pairs in place: y is x */
	for (int i = 0; i < 2; i++)
	{
		MillmBuffer *p = buffer(&r, i, 2 * WIDE);

		fill(&r, i, p, &r.layer.v, 1);
		r.be[i]->activation(r.be[i], p, MILLM_ACT_SWIGLU_PAIRS, p, NULL, WIDE, 1);
		y[i] = r.be[i]->buffer_read(r.be[i], p);
	}
	assert_near(y[1], y[0], WIDE, 1e-6, "activation of pairs in place");
	for (int i = 0; i < 2; i++)
	{
		MillmBuffer *b = buffer(&r, i, 2);
		const int32_t first[] = {0},
					second[] = {1},
					third[] = {2},
					positions[] = {0},
				   *tables[] = {first};

		/* the first place counts, and a new step begins without */
		for (int step = 0; step < 2; step++)
		{
			r.be[i]->begin(r.be[i], positions, positions, tables, 1);
			r.be[i]->embed(r.be[i], b, &r.layer.o, first, false, 1);
			r.be[i]->check(r.be[i], b, 0, 1);
			assert_int_equal(r.be[i]->first_bad(r.be[i]), -1);
			r.be[i]->embed(r.be[i], b, &r.layer.o, step == 0 ? second : third, false, 1);
			r.be[i]->check(r.be[i], b, 5, 1);
			r.be[i]->check(r.be[i], b, 6, 1);
			assert_int_equal(r.be[i]->first_bad(r.be[i]), 5);
		}

		/* whatever comes next: nothing, a norm of these rows (at once, or of an odd width), of others, or what makes them numbers again */
		for (int next = 0; next < 5; next++)
		{
			const int	width = next == 2 ? 8 : 2;
			MillmBuffer *bad = buffer(&r, i, width),
					   *other = buffer(&r, i, 2);
			const MillmWeight *from = next == 2 ? &r.layer.gate : &r.layer.o;

			r.be[i]->begin(r.be[i], positions, positions, tables, 1);
			r.be[i]->embed(r.be[i], other, &r.layer.o, first, false, 1);
			r.be[i]->embed(r.be[i], bad, from, second, false, 1);
			r.be[i]->check(r.be[i], bad, 3, 1);
			if (next == 1 || next == 2)
				r.be[i]->norm(r.be[i], bad, bad, MILLM_NORM_LAYER, &none, &none, 1e-5f, 1, width, 1);
			else if (next == 3)
				r.be[i]->norm(r.be[i], bad, other, MILLM_NORM_LAYER, &none, &none, 1e-5f, 1, width, 1);
			if (next > 0)
				r.be[i]->embed(r.be[i], bad, from, first, false, 1);
			assert_int_equal(r.be[i]->first_bad(r.be[i]), 3);
		}
	}
	millm_emulated.backwards = 0;
	rig_close(&r);
	free(x);
	free(up);
	free(pairs);
	free(weight);
	free(bias);
	free(odd);
	free(fours);
}

static void
test_rows(void **state)
{
	(void) state;
	run_rows(0);
}

/* Rows of so many parts, each of so many columns, which a block has at once or, if there are too many or not fours of them, one after the other; in place */
static void
run_norm(int n_parts, int n_columns, bool has_weight_of_part)
{
	const int	n = 3;
	const int	width = n_parts * n_columns;
	Rig			r;
	float	   *x = floats((int64_t) N_ROWS * width, 0),
			   *weight = floats(width, 1),
			   *bias = floats(width, 0);

	rig_init(&r, 1, 1, 8);
	r.layer.q = table(x, width);
	r.layer.attn_norm = (MillmVector) {weight, has_weight_of_part ? width : n_columns};
	r.layer.attn_norm_bias = (MillmVector) {bias, has_weight_of_part ? width : n_columns};
	rig_open(&r, NULL);
	for (int kind = 0; kind < 2; kind++)
	{
		const float *y[2];

		for (int i = 0; i < 2; i++)
		{
			MillmBuffer *b = buffer(&r, i, width);

			fill(&r, i, b, &r.layer.q, n);
			r.be[i]->norm(r.be[i], b, b, kind == 0 ? MILLM_NORM_RMS : MILLM_NORM_LAYER, &r.layer.attn_norm, &r.layer.attn_norm_bias, 1e-5f, n_parts, n_columns, n);
			y[i] = r.be[i]->buffer_read(r.be[i], b);
		}
		assert_near(y[1], y[0], (int64_t) n * width, 2e-6, kind == 0 ? "RMS norm" : "layer norm");
	}
	rig_close(&r);
	free(x);
	free(weight);
	free(bias);
}

static void
test_norms(void **state)
{
	(void) state;
	for (int backwards = 0; backwards < 2; backwards++)
	{
		millm_emulated.backwards = backwards;
		run_norm(1, 4, true);
		run_norm(1, 576, true);
		run_norm(1, 2304, true);
		run_norm(1, 8192, true);	/* the most at once */
		run_norm(1, 8196, true);
		run_norm(1, 1030, true);	/* not fours */
		run_norm(5, 128, false);
		run_norm(3, 132, true);
		run_norm(3, 6, true);	/* whose second part begins within four */
	}
	millm_emulated.backwards = 0;
}

/* The same with the turns of a block's threads reversed: who reads what another is to write first, or writes where another does, is found. */
static void
test_backwards(void **state)
{
	(void) state;
	run_rows(1);
	millm_emulated.backwards = 1;
	test_attention(state);
	test_splits(state);
	for (int i = 0; i < N_SHAPES; i++)
	{
		run_matmul(&shapes[i], NULL, false, 65, true, true);
		run_matmul(&shapes[i], NULL, false, 3, true, true);
		millm_emulated.capability = 7;
		run_matmul(&shapes[i], NULL, false, 65, true, true);
		millm_emulated.capability = 9;
	}
	millm_emulated.backwards = 0;
}

/* ---- the logits that a choice needs ---- */

/* Is id among top's always? */
static bool
is_always(const MillmTop *top, int32_t id)
{
	for (int i = 0; i < top->n_always; i++)
		if (top->always[i] == id)
			return true;
	return false;
}

/* What backend.h promises of a row of n: each that is needed is itself; returns how many are there at all. */
static int
assert_needed(const float *row, const float *logits, int n, const MillmTop *top, const char *what)
{
	float		largest = -INFINITY;
	int			n_there = 0;

	for (int i = 0; i < n; i++)
		if (!is_always(top, i))
			largest = fmaxf(largest, logits[i]);
	for (int i = 0; i < n; i++)
	{
		int			n_larger = 0;
		bool		is_needed;

		for (int j = 0; j < n && top->k > 0; j++)
			n_larger += logits[j] > logits[i] && !is_always(top, j);
		is_needed = top->k == 0 || is_always(top, i) || (n_larger < top->k && logits[i] >= largest - top->margin);
		if (row[i] != logits[i] && (is_needed || row[i] != -INFINITY))
			fail_msg("%s: logit %d is %.9g, not %.9g, the largest %.9g", what, i, (double) row[i], (double) logits[i], (double) largest);
		n_there += row[i] != -INFINITY;
	}
	return n_there;
}

/* The list of a row is what is there of it, n_there logits, or it is whole, or too long for one. */
static void
assert_listed(MillmListed l, const float *row, int n, int n_there, const char *what)
{
	int			at = 0;

	if (l.n < 0 ? n_there <= 256 && n_there < n : l.n != n_there)
		fail_msg("%s: %d are listed of %d", what, l.n, n_there);
	for (int v = 0; v < n && l.n >= 0; v++)
		if (row[v] != -INFINITY && l.ids[at++] != v)
			fail_msg("%s: %d is not listed", what, v);
}

static void
run_fetch(int n_columns, bool has_ties)
{
	enum {ROWS = 6};
	static const int32_t ids[] = {0, 3, 4, 2};
	/* rows that change places with each fetch, so that what an earlier one left on the host would be seen */
	const MillmTop tops[] = {
		{.k = 1, .margin = INFINITY}, {.k = 40, .margin = INFINITY}, {.k = 0}, {.k = n_columns, .margin = 0.01f}, {.k = 3, .margin = 0.001f, .always = ids, .n_always = 4},
		{.k = 300, .margin = INFINITY, .always = ids, .n_always = 1}, {.k = n_columns, .margin = 1.5f, .always = ids + 1, .n_always = 2},
	};
	const int32_t rows[] = {0, 1, 2, 3, 4, 5},
				zero = 0,
			   *page_table = &zero;
	Rig			r;
	float	   *logits = floats((int64_t) N_ROWS * n_columns, 0);
	MillmBuffer *b;
	char		what[64];

	for (int64_t i = 0; i < (int64_t) N_ROWS * n_columns && has_ties; i++)
		logits[i] = roundf(logits[i] * 9) / 9;
	rig_init(&r, 1, 1, 8);
	r.model.config.vocab_size = n_columns;
	r.layer.q = table(logits, n_columns);
	rig_open(&r, NULL);
	b = buffer(&r, 1, n_columns);
	for (int step = 0; step < 9; step++)
	{
		const int	n = step % 3 == 0 ? 1 : ROWS;
		MillmTop	now[ROWS];
		const float *y;
		size_t		bytes = millm_emulated.bytes_to_host;

		for (int t = 0; t < ROWS; t++)
			now[t] = tops[(t + step) % 7];
		r.be[1]->begin(r.be[1], &zero, &zero, &page_table, 1);
		r.be[1]->embed(r.be[1], b, &r.layer.q, rows, false, n);
		r.be[1]->fetch(r.be[1], b, now, n);
		if (step % 2 == 0)
			assert_int_equal(r.be[1]->first_bad(r.be[1]), -1);
		y = r.be[1]->buffer_read(r.be[1], b);
		bytes = millm_emulated.bytes_to_host - bytes;
		for (int t = 0; t < n; t++)
		{
			int			n_there;

			snprintf(what, sizeof(what), "row %d of %d columns, step %d", t, n_columns, step);
			n_there = assert_needed(y + (int64_t) t * n_columns, logits + (int64_t) t * n_columns, n_columns, &now[t], what);
			if (now[t].k == 1 && !has_ties)
				assert_int_equal(n_there, 1);
			assert_listed(r.be[1]->listed(r.be[1], t), y + (int64_t) t * n_columns, n_columns, n_there, what);
		}
		if (n == 1 && now[0].k == 1)
			assert_true(bytes <= sizeof(MillmCudaPicks) + 4);
	}
	rig_close(&r);
	free(logits);
}

/* Of a row of logits only what is needed crosses the bus, and all that is. */
static void
test_fetch(void **state)
{
	static const int widths[] = {5, 127, 640, 3001};

	(void) state;
	for (int i = 0; i < 4; i++)
		for (int ties = 0; ties < 2; ties++)
			run_fetch(widths[i], ties);
	millm_emulated.backwards = 1;
	run_fetch(3001, true);
	millm_emulated.backwards = 0;
}

/* ---- graphs ---- */

/* A step of n sequences, each at its position, as decode queues it; what attention gives is at y[i]. */
static const float *
decode(Rig *r, int i, MillmBuffer *const b[4], const int32_t *tokens, const int32_t *positions, const int32_t *const *tables, int n)
{
	const MillmAttention a = {.n_heads = 2, .n_kv_heads = 1, .head_dim = 8, .scale = 0.3f};
	const MillmVector none = {0};
	MillmBackend *be = r->be[i];

	be->begin(be, positions, positions, tables, n);
	be->embed(be, b[0], &r->layer.q, tokens, false, n);
	be->embed(be, b[1], &r->layer.k, tokens, false, n);
	be->embed(be, b[1], &r->layer.k, positions, true, n);	/* the second numbers do not take the place of the first */
	be->embed(be, b[2], &r->layer.v, tokens, false, n);
	be->norm(be, b[0], b[0], MILLM_NORM_LAYER, &none, &none, 1e-5f, 1, 16, n);
	be->scale(be, b[1], 0.5f, n);
	be->rope_and_store(be, &a, b[0], b[1], b[2], n);
	be->attention(be, &a, b[3], b[0], n);
	be->check(be, b[3], 0, n);
	assert_int_equal(be->first_bad(be), -1);
	return be->buffer_read(be, b[3]);
}

static void
decode_rig(Rig *r, MillmBuffer *b[2][4])
{
	rig_init(r, 2, 1, 8);
	r->layer.q = table(floats(N_ROWS * 16, 0), 16);
	r->layer.k = table(floats(N_ROWS * 8, 0), 8);
	r->layer.v = table(floats(N_ROWS * 8, 0), 8);
	rig_open(r, NULL);
	for (int i = 0; i < 2; i++)
		for (int j = 0; j < 4; j++)
			b[i][j] = buffer(r, i, j == 0 || j == 3 ? 16 : 8);
}

static void
decode_close(Rig *r)
{
	const MillmWeight *weights[] = {&r->layer.q, &r->layer.k, &r->layer.v};

	rig_close(r);
	for (int i = 0; i < 3; i++)
		free((void *) weights[i]->data);
}

/* Steps of one, two and three sequences that grow over pages: from the second of a kind on they are graphs, and as right as the first. */
static void
test_graphs(void **state)
{
	static const int32_t pages[3][3] = {{7, 3, 11}, {5, 63, 0}, {1, 2, 4}};
	const int32_t *tables[] = {pages[0], pages[1], pages[2]};
	const int	before = millm_emulated.n_graph_launches;
	int32_t		positions[] = {0, 0, 0};
	Rig			r;
	MillmBuffer *b[2][4];

	(void) state;
	decode_rig(&r, b);
	for (int step = 0; step < 3 * 40; step++)
	{
		const int	n = step % 3 + 1;
		const int32_t tokens[] = {(step * 7 + 1) % N_ROWS, (step * 5 + 2) % N_ROWS, step % N_ROWS};
		const float *y[2];

		for (int i = 0; i < 2; i++)
			y[i] = decode(&r, i, b[i], tokens, positions, tables, n);
		assert_near(y[1], y[0], n * 16, 1e-5, "a step that is a graph");
		for (int t = 0; t < n; t++)
			positions[t] += positions[t] < 47;
		if (step == 5)
			assert_int_equal(millm_emulated.n_graph_launches - before, 3);
	}
	assert_int_equal(millm_emulated.n_graph_launches - before, 3 * 39);
	decode_close(&r);
}

/* Every launch of a step, one by one and in a graph, may begin early where its kernel waits for the one in front of it, and none where it was compiled without. */
static void
test_overlap(void **state)
{
	const int32_t zero[] = {0};
	const int32_t *tables[] = {zero};

	(void) state;
	for (millm_emulated.capability = 8; millm_emulated.capability <= 12; millm_emulated.capability++)
	{
		Rig			r;
		MillmBuffer *b[2][4];
		int			before;

		decode_rig(&r, b);
		before = millm_emulated.n_overlapping;
		for (int step = 0; step < 3; step++)
			decode(&r, 1, b[1], zero, zero, tables, 1);
		assert_true(r.be[1]->counts(r.be[1]).n_kernels > 3 * 8);
		assert_int_equal(millm_emulated.n_overlapping - before, millm_emulated.capability >= 9 ? r.be[1]->counts(r.be[1]).n_kernels : 0);
		decode_close(&r);
	}
	millm_emulated.capability = 9;
}

/* A list that differs in one value is another; there are no more than so many graphs; and where there is no memory for one, there is none. */
static void
test_graphs_differ(void **state)
{
	const int32_t zero[] = {0};
	const int32_t *tables[] = {zero};
	Rig			r;
	MillmBuffer *b[2][4];
	int			n_launches;

	(void) state;
	decode_rig(&r, b);
	for (int round = 0; round < 4; round++)
		for (int by = 0; by < 50; by++)
		{
			const float *y;

			millm_emulated.allocations_left = round == 0 ? 0 : -1;
			n_launches = millm_emulated.n_graph_launches;
			for (int again = 0; again < 3; again++)
			{
				r.be[1]->begin(r.be[1], zero, zero, tables, 1);
				r.be[1]->embed(r.be[1], b[1][0], &r.layer.q, zero, false, 1);
				for (int i = 0; i < 8; i++)
					r.be[1]->scale(r.be[1], b[1][0], i == by % 8 ? 1 + (float) by : 1, 1);
				assert_int_equal(r.be[1]->first_bad(r.be[1]), -1);
				y = r.be[1]->buffer_read(r.be[1], b[1][0]);
				assert_true(y[3] == ((const float *) r.layer.q.data)[3] * (1 + (float) by));
			}
			assert_int_equal(millm_emulated.n_graph_launches - n_launches, round == 0 ? 0 : 2);
		}
	millm_emulated.allocations_left = -1;
	assert_true(millm_emulated.n_host < 50);
	decode_close(&r);
}

/* ---- mixtures of experts ---- */

/* Whom a row goes to is what route.c says, ties and infinities too; each entry is in one tile, of its expert, and tiles are as many as can be. */
static void
run_routes(int n_experts, int k, bool sums_to_one, int n, int tile_entries, bool has_nan)
{
	enum {MOST = 7 * 1000};
	static int32_t chosen[MOST],
				entries[MOST];
	static float shares[MOST];
	static MillmCudaTile tiles[2 * MOST];
	const int	n_tiles = n * k / tile_entries + (n * k < n_experts ? n * k : n_experts);
	const MillmCudaMixture m = {.chosen = chosen, .shares = shares, .entries = entries, .tiles = tiles, .n_experts = n_experts, .k = k, .sums_to_one = sums_to_one,
		.tile_entries = tile_entries, .n_tiles = n_tiles, .n = n};
	float	   *scores = floats((int64_t) n * n_experts, 0);
	bool		seen[MOST] = {false};
	MillmRoutes r;
	MillmCudaQueue *queue;
	MillmError	err;

	assert_true(n * k <= MOST && millm_routes_init(&r, n_experts, k, n));
	for (int i = 0; i < n * n_experts; i++)
		scores[i] = i % 3 == 0 ? roundf(scores[i] * 2) : i % 11 == 0 ? -INFINITY : scores[i] * 4;
	if (has_nan)
		scores[n * n_experts - 1] = NAN;
	millm_route(&r, scores, sums_to_one, n);
	assert_int_equal(millm_cuda_queue_create(n, true, NULL, &queue, &err), MILLM_OK);
	memset(tiles, 0x55, sizeof(tiles));
	assert_int_equal(millm_cuda_route(&m, (MillmRows) {scores, n_experts}, queue), cudaSuccess);
	assert_int_equal(millm_cuda_sort_entries(&m, queue), cudaSuccess);
	for (int i = 0; i < n * k; i++)
	{
		assert_int_equal(chosen[i], r.chosen[i]);
		assert_true(isnan(r.shares[i]) ? isnan(shares[i]) : fabsf(shares[i] - r.shares[i]) <= 1e-6f);
		assert_true(isnan(r.shares[i]) || !has_nan || i / k != n - 1);
	}
	for (int t = 0; t < n_tiles; t++)
	{
		assert_in_range(tiles[t].n, 0, tile_entries);
		for (int i = tiles[t].first; i < tiles[t].first + tiles[t].n; i++)
		{
			assert_in_range(i, 0, n * k - 1);
			assert_in_range(entries[i], 0, n * k - 1);
			assert_int_equal(chosen[entries[i]], tiles[t].expert);
			assert_false(seen[entries[i]]);
			seen[entries[i]] = true;
		}
	}
	for (int i = 0; i < n * k; i++)
		assert_true(seen[i]);
	assert_int_equal(tiles[n_tiles].n, 0x55555555);
	millm_cuda_queue_free(queue);
	millm_routes_free(&r);
	free(scores);
}

static void
test_routes(void **state)
{
	static const int sizes[][2] = {{1, 1}, {4, 2}, {8, 8}, {33, 5}, {128, 8}, {1000, 3}};
	static const int n_rows[] = {1, 2, 7, 65};

	(void) state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (size_t j = 0; j < sizeof(n_rows) / sizeof(n_rows[0]); j++)
		{
			millm_emulated.backwards = (i + j) % 2;
			run_routes(sizes[i][0], sizes[i][1], j % 2, n_rows[j], 1 << (i + j) % 4, false);
			run_routes(sizes[i][0], sizes[i][1], i % 2, n_rows[j], 64, sizes[i][0] > 1);
		}
	millm_emulated.backwards = 0;
}

enum {MOST_EXPERTS = 64, HIDDEN = 96, EXPERT_SIZE = 64};

typedef struct Mixture
{
	MillmDtype	dtype;
	int			n_experts, k;
	bool		sums_to_one, is_paired;	/* pairs: one matrix for both, and biases */
} Mixture;

typedef struct Experts
{
	Stored		stored[MOST_EXPERTS * 3];
	MillmMlp	mlps[MOST_EXPERTS];
	float	   *biases;
} Experts;

static void
experts_init(Experts *e, const Mixture *c)
{
	const int64_t width = c->is_paired ? 2 * EXPERT_SIZE : EXPERT_SIZE;
	Shape		shape = {.dtype = c->dtype, .block_size = 64, .nested_block_size = 256, .rounded = MILLM_F32};	/* as few rows have it */

	memset(e, 0, sizeof(*e));
	e->biases = floats(MOST_EXPERTS * (2 * EXPERT_SIZE + HIDDEN), 0);
	for (int i = 0; i < c->n_experts; i++)
	{
		MillmMlp   *mlp = &e->mlps[i];

		shape.n_out = width;
		shape.n_in = HIDDEN;
		store(&e->stored[i * 3], &shape);
		mlp->up = e->stored[i * 3].w;
		if (!c->is_paired)
		{
			store(&e->stored[i * 3 + 1], &shape);
			mlp->gate = e->stored[i * 3 + 1].w;
		}
		shape.n_out = HIDDEN;
		shape.n_in = EXPERT_SIZE;
		store(&e->stored[i * 3 + 2], &shape);
		mlp->down = e->stored[i * 3 + 2].w;
		mlp->up_bias = (MillmVector) {c->is_paired ? e->biases + i * width : NULL, width};
		mlp->down_bias = (MillmVector) {c->is_paired ? e->biases + MOST_EXPERTS * 2 * EXPERT_SIZE + i * HIDDEN : NULL, HIDDEN};
	}
}

static void
experts_rig(Rig *r, Experts *e, const Mixture *c, float *values[3])
{
	experts_init(e, c);
	rig_init(r, 1, 1, 8);
	r->model.config.hidden_size = HIDDEN;
	r->model.config.n_experts = c->n_experts;
	r->model.config.n_chosen = c->k;
	r->model.config.experts_sum_to_one = c->sums_to_one;
	r->model.config.act = c->is_paired ? MILLM_ACT_SWIGLU_PAIRS : MILLM_ACT_SILU;
	r->layer.o.dtype = c->dtype;
	r->layer.experts = e->mlps;
	r->layer.experts_up_bias = (MillmVector) {e->biases, MOST_EXPERTS * 2 * EXPERT_SIZE};
	r->layer.experts_down_bias = (MillmVector) {e->biases + MOST_EXPERTS * 2 * EXPERT_SIZE, MOST_EXPERTS * HIDDEN};
	for (int i = 0; i < 3; i++)
		values[i] = floats(N_ROWS * HIDDEN, 0);
	coarse(values[0], N_ROWS * HIDDEN);
	r->layer.q = table(values[0], HIDDEN);
	r->layer.k = table(values[1], HIDDEN);
	r->layer.v = table(values[2], c->n_experts);
}

static void
experts_close(Rig *r, Experts *e, float *values[3])
{
	rig_close(r);
	for (int i = 0; i < MOST_EXPERTS * 3; i++)
		discard(&e->stored[i]);
	free(e->biases);
	for (int i = 0; i < 3; i++)
		free(values[i]);
}

/* As forward.c does it with the other operations */
static void
by_other_operations(Rig *r, MillmBuffer *y, MillmBuffer *x, const float *scores, int n)
{
	const MillmConfig *config = &r->model.config;
	const MillmVector none = {0};
	MillmBackend *be = r->be[0];
	MillmBuffer *picked = buffer(r, 0, HIDDEN),
			   *up = buffer(r, 0, 2 * EXPERT_SIZE),
			   *gate = buffer(r, 0, EXPERT_SIZE),
			   *answer = buffer(r, 0, HIDDEN);
	MillmRoutes routes;

	assert_true(millm_routes_init(&routes, config->n_experts, config->n_chosen, n));
	millm_route(&routes, scores, config->experts_sum_to_one, n);
	for (int e = 0; e < config->n_experts; e++)
	{
		const MillmMlp *mlp = &r->layer.experts[e];
		const MillmProjection up_gate[] = {{up, &mlp->up, &mlp->up_bias, false}, {gate, &mlp->gate, &none, false}};
		const MillmProjection down = {answer, &mlp->down, &mlp->down_bias, false};
		const bool	has_gate = mlp->gate.data;
		const int32_t *rows = routes.rows + routes.first[e];
		const int	n_rows = routes.first[e + 1] - routes.first[e];

		if (n_rows == 0)
			continue;
		be->select(be, picked, x, rows, n_rows);
		be->matmul(be, up_gate, has_gate ? 2 : 1, picked, n_rows);
		be->activation(be, up, config->act, has_gate ? gate : up, has_gate ? up : NULL, EXPERT_SIZE, n_rows);
		be->matmul(be, &down, 1, up, n_rows);
		be->add_rows(be, y, answer, rows, routes.weights + routes.first[e], n_rows);
	}
	millm_routes_free(&routes);
}

static void
run_mixture(const Mixture *c, int n, bool deterministic)
{
	const bool	in_float32 = deterministic || c->dtype == MILLM_F32 || n * c->k <= MILLM_CUDA_FEW_ROWS * c->n_experts;
	static Experts e;
	Rig			r;
	float	   *values[3];
	const float *y[2];
	char		what[128];

	snprintf(what, sizeof(what), "mixture of %d experts of dtype %d, %d chosen, %d rows", c->n_experts, c->dtype, c->k, n);
	experts_rig(&r, &e, c, values);
	r.options.deterministic = deterministic;
	rig_open(&r, NULL);
	for (int i = 0; i < 2; i++)
	{
		MillmBuffer *in = buffer(&r, i, HIDDEN),
				   *out = buffer(&r, i, HIDDEN),
				   *scores = buffer(&r, i, c->n_experts);

		fill(&r, i, in, &r.layer.q, n);
		fill(&r, i, out, &r.layer.k, N_ROWS);
		fill(&r, i, scores, &r.layer.v, n);
		if (i == 0)
			by_other_operations(&r, out, in, values[2], n);
		else
			assert_true(r.be[1]->mixture(r.be[1], &r.layer, out, in, scores, n));
		y[i] = r.be[i]->buffer_read(r.be[i], out);
	}
	assert_near(y[1], y[0], N_ROWS * HIDDEN, in_float32 ? 1e-5 : TOLERANCE_ROUNDED, what);
	experts_close(&r, &e, values);
}

static const Mixture mixtures[] = {
	{MILLM_F32, 4, 2, true, false}, {MILLM_BF16, 8, 2, true, false}, {MILLM_F16, 5, 5, false, false}, {MILLM_4BIT, 9, 4, false, false},
	{MILLM_INT8, 3, 1, true, false}, {MILLM_MXFP4, 4, 4, true, true}, {MILLM_BF16, 1, 1, false, true},
};
#define N_MIXTURES (int) (sizeof(mixtures) / sizeof(mixtures[0]))

static void
test_mixture(void **state)
{
	static const int n_rows[] = {1, 2, 3, 8, 33, N_ROWS};

	(void) state;
	for (int i = 0; i < N_MIXTURES; i++)
		for (size_t j = 0; j < sizeof(n_rows) / sizeof(n_rows[0]); j++)
		{
			millm_emulated.backwards = (i + (int) j) % 2;
			run_mixture(&mixtures[i], n_rows[j], false);
		}
	run_mixture(&mixtures[1], N_ROWS, true);
	run_mixture(&(Mixture) {MILLM_BF16, MOST_EXPERTS, MOST_EXPERTS, true, false}, N_ROWS, false);	/* more entries than there is room for at a time */
	millm_emulated.capability = 7;
	run_mixture(&mixtures[3], N_ROWS, false);
	millm_emulated.capability = 9;
	millm_emulated.backwards = 0;
}

/* The same launches whatever is chosen: a graph from the second time on; and nothing crosses the bus. */
static void
test_mixture_graphs(void **state)
{
	const Mixture *c = &mixtures[1];
	const int32_t zeros[N_ROWS] = {0};
	const int32_t *tables[N_ROWS];
	static Experts e;
	Rig			r;
	float	   *values[3];

	(void) state;
	for (int t = 0; t < N_ROWS; t++)
		tables[t] = zeros;
	experts_rig(&r, &e, c, values);
	rig_open(&r, NULL);
	for (int n = 1; n <= 61; n += 20)
	{
		MillmBuffer *in = buffer(&r, 1, HIDDEN),
				   *out = buffer(&r, 1, HIDDEN),
				   *scores = buffer(&r, 1, c->n_experts);
		const int	n_before = millm_emulated.n_graph_launches;

		for (int step = 0; step < 5; step++)
		{
			int32_t		rows[N_ROWS];
			size_t		bytes;

			for (int t = 0; t < n; t++)
				rows[t] = (t * 7 + step) % N_ROWS;
			r.be[1]->begin(r.be[1], zeros, zeros, tables, n);
			r.be[1]->embed(r.be[1], in, &r.layer.q, rows, false, n);
			r.be[1]->embed(r.be[1], out, &r.layer.k, rows, false, n);
			r.be[1]->embed(r.be[1], scores, &r.layer.v, rows, false, n);
			bytes = millm_emulated.bytes_to_host;
			assert_true(r.be[1]->mixture(r.be[1], &r.layer, out, in, scores, n));
			r.be[1]->check(r.be[1], out, 0, n);
			assert_int_equal(millm_emulated.bytes_to_host, bytes);
			assert_int_equal(r.be[1]->first_bad(r.be[1]), -1);
		}
		assert_int_equal(millm_emulated.n_graph_launches - n_before, 4);
	}
	experts_close(&r, &e, values);
}

/* Experts that no kernel takes together are left to the other operations. */
static void
test_mixture_refused(void **state)
{
	static const Shape other[] = {{MILLM_F16, false, EXPERT_SIZE, HIDDEN, 0, 0, 0, 0, 0}, {MILLM_4BIT, false, EXPERT_SIZE, HIDDEN, 0, 16, 64, 256, MILLM_BF16}};

	(void) state;
	for (int i = 0; i < 2; i++)
	{
		static Experts e;
		Rig			r;
		Stored		s;
		float	   *values[3];

		experts_rig(&r, &e, &mixtures[i == 0 ? 1 : 3], values);
		store(&s, &other[i]);
		e.mlps[2].gate = s.w;
		rig_open(&r, NULL);
		assert_false(r.be[1]->mixture(r.be[1], &r.layer, NULL, NULL, NULL, 1));
		experts_close(&r, &e, values);
		discard(&s);
	}
}

/* Memory that runs out while there are experts leaves the device as it was; what they take was predicted. */
static void
test_mixture_memory(void **state)
{
	const size_t used = millm_emulated.used_bytes;
	int64_t		predicted;
	MillmError	err;
	MillmCode	rc;
	static Experts e;
	Rig			r;
	float	   *values[3];
	int			n = 0;

	(void) state;
	experts_rig(&r, &e, &mixtures[1], values);
	r.options.kernels = NULL;
	millm_cuda_set_host(&host);
	do
	{
		millm_emulated.allocations_left = n++;
		rc = millm_cuda_create(&r.model, &r.options, &r.be[1], &err);
		millm_emulated.allocations_left = -1;
		if (rc != MILLM_OK)
		{
			assert_int_equal(rc, MILLM_E_INSUFFICIENT_MEMORY);
			assert_int_equal(millm_emulated.used_bytes, used);
			assert_int_equal(millm_emulated.n_host, r.n_host);
		}
	} while (rc != MILLM_OK && n < 100);
	assert_int_equal(rc, MILLM_OK);
	predicted = millm_cuda_weights_bytes(&r.model, NULL) + millm_cuda_page_bytes(&r.model, NULL, MILLM_KV_AUTO, 1) * r.options.n_pages + millm_cuda_own_bytes(&r.model, &r.options);
	assert_true(fabs((double) (millm_emulated.used_bytes - used) / (double) predicted - 1) < 0.02);
	assert_int_equal(millm_backend_cpu.create(&r.model, &(MillmBackendOptions) {.n_threads = 1, .kernels = "ref", .max_tokens = 1, .n_pages = 1, .layers_per_page = 1,
											  .n_groups = 1}, &r.be[0], &err), MILLM_OK);
	experts_close(&r, &e, values);
}

/* ---- trouble ---- */

static void
small_model(Rig *r, Stored *s, float **values)
{
	rig_init(r, 2, 1, 64);
	store(s, &shapes[12]);
	*values = floats(N_ROWS * 64, 0);
	r->layer.q = s->w;
	r->layer.k = table(*values, 64);
	r->options.kernels = NULL;
}

/* Memory that runs out at any allocation is an error with figures, and leaves the device as it was. */
static void
test_out_of_memory(void **state)
{
	Rig			r;
	Stored		s;
	float	   *values;
	MillmError	err;
	MillmCode	rc;
	int			n = 0;

	(void) state;
	small_model(&r, &s, &values);
	millm_cuda_set_host(&host);
	do
	{
		const size_t used = millm_emulated.used_bytes;

		millm_emulated.allocations_left = n++;
		rc = millm_cuda_create(&r.model, &r.options, &r.be[1], &err);
		millm_emulated.allocations_left = -1;
		if (rc != MILLM_OK)
		{
			assert_int_equal(rc, MILLM_E_INSUFFICIENT_MEMORY);
			assert_non_null(strstr(err.detail, "Need "));
			assert_int_equal(millm_emulated.used_bytes, used);
			assert_int_equal(millm_emulated.n_allocations, r.n_alive);
			assert_int_equal(millm_emulated.n_host, r.n_host);
		}
	} while (rc != MILLM_OK && n < 1000);
	assert_int_equal(rc, MILLM_OK);
	assert_true(n > 4);
	for (int i = 0; i < 3; i++)
	{
		MillmBuffer *b;

		millm_emulated.allocations_left = 0;
		assert_int_equal(r.be[1]->buffer_create(r.be[1], N_ROWS, 100, true, &b, &err), MILLM_E_INSUFFICIENT_MEMORY);
		millm_emulated.allocations_left = -1;
	}
	/* what was refused is nothing that a kernel is told of */
	r.be[1]->embed(r.be[1], buffer(&r, 1, 64), &r.layer.k, (int32_t[]) {0}, false, 1);
	r.be[1]->free(r.be[1]);
	assert_int_equal(millm_emulated.n_allocations, r.n_alive);
	discard(&s);
	free(values);
}

/* Each allocation of device memory goes by where a test can make it fail (faults.h): the first one that a backend makes, too. */
static void
test_fault(void **state)
{
	Rig			r;
	Stored		s;
	float	   *values;
	MillmError	err;
	FILE	   *f = fopen("millm_fault", "w");

	(void) state;
	assert_non_null(f);
	fputs("out_of_memory\n", f);
	fclose(f);
	small_model(&r, &s, &values);
	millm_cuda_set_host(&host);
	assert_int_equal(millm_cuda_create(&r.model, &r.options, &r.be[1], &err), MILLM_E_INSUFFICIENT_MEMORY);
	assert_string_equal(err.message, "insufficient device memory for the choice among logits");
	assert_int_equal(millm_emulated.n_allocations, r.n_alive);
	assert_int_equal(millm_emulated.n_host, r.n_host);
	discard(&s);
	free(values);
}

/* Nothing that another model left in the device's memory is there to be read: all that is taken is cleared. */
static void
test_cleared(void **state)
{
	const float zeros[64] = {0};
	Rig			r;
	MillmError	err;

	(void) state;
	rig_init(&r, 2, 1, 64);
	r.layer.q = (MillmWeight) {.dtype = MILLM_F32, .n_out = 4, .n_in = 13, .stride = 16, .data = zeros};	/* rows that end before the device's do */
	millm_cuda_set_host(&host);
	assert_int_equal(r.n_alive, 0);
	assert_int_equal(millm_cuda_create(&r.model, &r.options, &r.be[1], &err), MILLM_OK);
	buffer(&r, 1, 100);
	assert_true(millm_emulated_is_clear());
	r.be[1]->free(r.be[1]);
}

/* ---- uploads ---- */

typedef struct Asked
{
	int			n;
	int			last;
	int			stop_at;		/* say so the n-th time; 0: never */
} Asked;

static bool
ask(void *arg, int percent)
{
	Asked	   *asked = arg;

	assert_true(percent >= asked->last && percent <= 100);
	asked->last = percent;
	return ++asked->n != asked->stop_at;
}

enum {UPLOAD_PARTS = 7, UPLOAD_BYTES = 1 << 16};

/* Parts of every kind, from a buffer of bytes that begins unaligned, and what the device is to have then. */
static int
upload_parts(MillmPart *parts, const char *from, char *expected)
{
	static const MillmPart kinds[UPLOAD_PARTS] = {
		{.n_rows = 1, .row_bytes = 5000, .from_pitch = 5000, .to_pitch = 5000}, {.n_rows = 37, .row_bytes = 130, .from_pitch = 133, .to_pitch = 144},
		{.n_rows = 35, .row_bytes = 70 * 2, .from_pitch = 40 * 2, .to_pitch = 144, .element = 2}, {.n_rows = 1, .row_bytes = 4, .from_pitch = 4, .to_pitch = 4},
		{.n_rows = 300, .row_bytes = 33 * 4, .from_pitch = 300 * 4, .to_pitch = 144, .element = 4}, {.n_rows = 3, .row_bytes = 1, .from_pitch = 9, .to_pitch = 16, .element = 1},
		{.n_rows = 40, .row_bytes = 16, .from_pitch = 16, .to_pitch = 16},
	};
	int64_t		at = 0;

	memset(expected, 0, UPLOAD_BYTES);
	for (int i = 0; i < UPLOAD_PARTS; i++)
	{
		MillmPart  *p = &parts[i];

		*p = kinds[i];
		p->at = at;
		p->from = from + 1000 * i + 1;
		for (int64_t row = 0; row < p->n_rows; row++)
			for (int64_t k = 0; k < p->row_bytes; k++)
				expected[at + row * p->to_pitch + k] = p->element ? p->from[k / p->element * p->from_pitch + row * p->element + k % p->element] :
					p->from[row * p->from_pitch + k];
		at += (p->n_rows * p->to_pitch + 255) / 256 * 256;
		assert_true(at <= UPLOAD_BYTES);
	}
	return UPLOAD_PARTS;
}

/* What arrives is the same with buffers of any size, pinned or not; a cancel, a call that fails and memory that runs out leave nothing behind. */
static void
test_upload(void **state)
{
	static const int64_t sizes[] = {0, 144, 500, 5000, 1 << 20};
	static const size_t limits[] = {(size_t) 1 << 30, 3 << 20, 0};
	char	   *from = bytes_of(UPLOAD_BYTES),
			   *expected = bytes_of(UPLOAD_BYTES),
			   *device;
	MillmPart	parts[UPLOAD_PARTS];
	const int	n_host = millm_emulated.n_host;
	const size_t used = millm_emulated.used_bytes;
	MillmError	err;
	MillmCode	rc;
	int			n = 0,
				n_asked;

	(void) state;
	for (int i = 0; i < UPLOAD_BYTES; i++)
		from[i] = (char) (uniform() * 128);
	upload_parts(parts, from, expected);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (size_t k = 0; k < sizeof(limits) / sizeof(limits[0]); k++)
		{
			Asked		asked = {0};

			millm_emulated.pinned_limit = limits[k];
			assert_int_equal(cudaMalloc((void **) &device, UPLOAD_BYTES), cudaSuccess);
			cudaMemsetAsync(device, 0, UPLOAD_BYTES, NULL);
			assert_int_equal(millm_cuda_upload(device, parts, UPLOAD_PARTS, &(MillmUploadOptions) {.progress = ask, .arg = &asked, .buffer_bytes = sizes[i]}, &err),
							 MILLM_OK);
			assert_memory_equal(device, expected, UPLOAD_BYTES);
			assert_int_equal(asked.last, 100);
			assert_int_equal(cudaGetLastError(), cudaSuccess);
			cudaFree(device);
		}
	millm_emulated.pinned_limit = limits[0];

	n_asked = 0;
	assert_int_equal(cudaMalloc((void **) &device, UPLOAD_BYTES), cudaSuccess);
	do
	{
		Asked		asked = {.stop_at = ++n_asked};

		rc = millm_cuda_upload(device, parts, UPLOAD_PARTS, &(MillmUploadOptions) {.progress = ask, .arg = &asked, .buffer_bytes = 500}, &err);
		assert_true(rc == MILLM_OK || rc == MILLM_E_CANCELED);
		assert_int_equal(millm_emulated.n_host, n_host);
		assert_int_equal(millm_emulated.used_bytes, used + UPLOAD_BYTES);
	} while (rc != MILLM_OK);
	assert_true(n_asked > 100);
	do
	{
		millm_emulated.calls_left = n++;
		rc = millm_cuda_upload(device, parts, UPLOAD_PARTS, &(MillmUploadOptions) {.buffer_bytes = 5000}, &err);
		millm_emulated.calls_left = -1;
		assert_true(rc == MILLM_OK || rc == MILLM_E_INTERNAL);
		assert_int_equal(millm_emulated.n_host, n_host);
		assert_int_equal(millm_emulated.used_bytes, used + UPLOAD_BYTES);
		assert_int_equal(cudaGetLastError(), cudaSuccess);
	} while (rc != MILLM_OK);
	assert_true(n > 30);
	millm_emulated.allocations_left = 0;
	assert_int_equal(millm_cuda_upload(device, parts, UPLOAD_PARTS, &(MillmUploadOptions) {0}, &err), MILLM_E_INSUFFICIENT_MEMORY);
	millm_emulated.allocations_left = -1;
	assert_int_equal(millm_emulated.n_host, n_host);
	cudaFree(device);
	assert_int_equal(millm_emulated.used_bytes, used);
	free(from);
	free(expected);
}

/* What is predicted is what is taken. */
static void
test_prediction(void **state)
{
	Rig			r;
	Stored		s;
	float	   *values;
	MillmBuffer *b;
	MillmError	err;
	size_t		before;
	int64_t		predicted;

	(void) state;
	small_model(&r, &s, &values);
	millm_cuda_set_host(&host);
	before = millm_emulated.used_bytes;
	assert_int_equal(millm_cuda_create(&r.model, &r.options, &r.be[1], &err), MILLM_OK);
	assert_int_equal(r.be[1]->buffer_create(r.be[1], N_ROWS, 100, true, &b, &err), MILLM_OK);
	predicted = millm_cuda_weights_bytes(&r.model, NULL) + millm_cuda_page_bytes(&r.model, NULL, MILLM_KV_AUTO, 1) * r.options.n_pages + millm_cuda_buffer_bytes(N_ROWS, 100) +
		millm_cuda_own_bytes(&r.model, &r.options);
	assert_true(fabs((double) (millm_emulated.used_bytes - before) / (double) predicted - 1) < 0.05);
	r.be[1]->free(r.be[1]);
	assert_int_equal(millm_emulated.used_bytes, before);
	discard(&s);
	free(values);
}

static void
test_refused_options(void **state)
{
	Rig			r;
	Stored		s;
	float	   *values;
	MillmError	err;

	(void) state;
	small_model(&r, &s, &values);
	r.options.kernels = "avx2";
	assert_int_equal(millm_cuda_create(&r.model, &r.options, &r.be[1], &err), MILLM_E_INVALID_ARGUMENT);
	assert_non_null(strstr(err.message, "avx2"));
	assert_int_equal(millm_cuda_page_bytes(&r.model, "avx2", MILLM_KV_AUTO, 1), -1);
	r.options.kernels = NULL;
	r.options.max_tokens = 65536;
	assert_int_equal(millm_cuda_create(&r.model, &r.options, &r.be[1], &err), MILLM_E_INVALID_ARGUMENT);
	r.options.max_tokens = N_ROWS;
	r.options.n_pages = INT64_MAX / 2;
	assert_int_equal(millm_cuda_create(&r.model, &r.options, &r.be[1], &err), MILLM_E_INVALID_ARGUMENT);
	assert_int_equal(millm_emulated.n_allocations, r.n_alive);
	discard(&s);
	free(values);
}

/* A device that fails at any call while the backend is made is an error; after that it is the host's fault(), with call and reason. */
static void
test_device_fails(void **state)
{
	Rig			r;
	Stored		s;
	float	   *values;
	MillmError	err;
	MillmCode	rc;
	int			n = 0;

	(void) state;
	small_model(&r, &s, &values);
	millm_cuda_set_host(&host);
	do
	{
		millm_emulated.calls_left = n++;
		rc = millm_cuda_create(&r.model, &r.options, &r.be[1], &err);
		millm_emulated.calls_left = -1;
		if (rc != MILLM_OK)
		{
			assert_int_equal(rc, MILLM_E_INTERNAL);
			assert_non_null(strstr(err.detail, "cudaErrorIllegalAddress"));
			assert_int_equal(millm_emulated.n_allocations, r.n_alive);
			assert_int_equal(millm_emulated.n_host, r.n_host);
		}
	} while (rc != MILLM_OK);
	assert_true(n > 8);

	for (int calls = 0; calls < 6; calls++)
	{
		int			said[2],
					status;
		char		text[1024];
		ssize_t		len;
		pid_t		child;

		assert_int_equal(pipe(said), 0);
		if ((child = fork()) == 0)
		{
			const int32_t row = 0;
			MillmBuffer *b = buffer(&r, 1, 64);

			dup2(said[1], STDERR_FILENO);
			millm_emulated.calls_left = calls;
			for (;;)
			{
				r.be[1]->embed(r.be[1], b, &r.layer.k, &row, false, 1);
				r.be[1]->check(r.be[1], b, 0, 1);
				r.be[1]->first_bad(r.be[1]);
			}
		}
		close(said[1]);
		assert_true((len = read(said[0], text, sizeof(text) - 1)) > 0);
		text[len] = '\0';
		close(said[0]);
		assert_int_equal(waitpid(child, &status, 0), child);
		assert_true(WIFEXITED(status) && WEXITSTATUS(status) == FAULT_STATUS);
		assert_non_null(strstr(text, "the CUDA device has failed: an illegal memory access was encountered | cudaErrorIllegalAddress, seen at "));
	}
	r.be[1]->free(r.be[1]);
	discard(&s);
	free(values);
}

int
main(int argc, char **argv)
{
	char		path[PATH_MAX];
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_matmul), cmocka_unit_test(test_matmul_old_device), cmocka_unit_test(test_matmul_others), cmocka_unit_test(test_projections), cmocka_unit_test(test_fragments), cmocka_unit_test(test_codebook_unit), cmocka_unit_test(test_blas_tiles),
		cmocka_unit_test(test_company), cmocka_unit_test(test_attention), cmocka_unit_test(test_splits), cmocka_unit_test(test_tiles), cmocka_unit_test(test_one_row),
		cmocka_unit_test(test_rows), cmocka_unit_test(test_norms), cmocka_unit_test(test_fetch), cmocka_unit_test(test_graphs), cmocka_unit_test(test_graphs_differ), cmocka_unit_test(test_overlap),
		cmocka_unit_test(test_routes), cmocka_unit_test(test_mixture), cmocka_unit_test(test_mixture_graphs), cmocka_unit_test(test_mixture_refused), cmocka_unit_test(test_mixture_memory),
		cmocka_unit_test(test_backwards), cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_fault), cmocka_unit_test(test_prediction),
		cmocka_unit_test(test_cleared), cmocka_unit_test(test_upload),
		cmocka_unit_test(test_refused_options), cmocka_unit_test(test_device_fails),
	};

	/* as if it were where the loader looks for it */
	(void) argc;
	snprintf(path, sizeof(path), "%s/../emulated/driver/libcublasLt.so.13", dirname(argv[0]));
	if (!dlopen(path, RTLD_NOW | RTLD_GLOBAL))
	{
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
