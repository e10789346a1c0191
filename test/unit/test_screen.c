/*
 * test_screen.c -- the screening copy of an LM head: what is written, that the bound holds for heads and vectors made to break it,
 * and that a sampler which sees the shortlist chooses what it would choose from everything.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>

#include "checkpoint.h"
#include "half.h"
#include "kernel.h"
#include "model.h"
#include "safetensors.h"
#include "sampler.h"
#include "screen.h"

#define ROWS	400
#define MAX_IN	300

static uint64_t seed;

static float
uniform(void)
{
	seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
	return (float) (int32_t) (seed >> 32) / 2147483648.0f;
}

/* ---- heads and vectors ---- */

typedef struct Head
{
	MillmDtype	dtype;
	int64_t		n_in;
	float		values[ROWS * MAX_IN];	/* as stored */
	unsigned char bytes[ROWS * MAX_IN * 4];
	unsigned char *file;
	size_t		len;
	MillmSafetensors *st;
	MillmWeight head;
	MillmWeight codes;
	float		error[ROWS];
} Head;

static void
encode(Head *h, size_t step)
{
	size_t		total = (size_t) millm_weight_bytes(h->dtype, ROWS * h->n_in);
	MillmScreenEncoder *enc;
	MillmError	err;
	const void *part;
	size_t		n;

	h->len = (size_t) millm_screen_file_bytes(ROWS, h->n_in);
	h->file = malloc(h->len);
	assert_int_equal(millm_screen_begin(h->dtype, ROWS, h->n_in, &enc, &err), MILLM_OK);
	part = millm_screen_header(enc, &n);
	memcpy(h->file, part, n);
	for (size_t at = 0; at < total; at += step)
	{
		size_t		k = total - at < step ? total - at : step;
		size_t		writes = millm_screen_push_writes(enc, k);

		assert_true(n + writes <= h->len);
		assert_int_equal(millm_screen_push(enc, h->bytes + at, k, (int8_t *) h->file + n, &err), MILLM_OK);
		n += writes;
	}
	assert_int_equal(millm_screen_push(enc, h->bytes, 1, NULL, &err), MILLM_E_INVALID_MODEL_FILE);
	{
		size_t		n_tail;

		assert_int_equal(millm_screen_finish(enc, &part, &n_tail, &err), MILLM_OK);
		assert_int_equal(n + n_tail, h->len);
		memcpy(h->file + n, part, n_tail);
	}
	millm_screen_free(enc);
}

/* Store the values in the dtype, make the copy, and read it. */
static void
make(Head *h, MillmDtype dtype, int64_t n_in)
{
	MillmError	err;

	h->dtype = dtype;
	h->n_in = n_in;
	for (int64_t i = 0; i < ROWS * n_in; i++)
	{
		uint16_t	half = dtype == MILLM_F16 ? millm_f32_to_f16(h->values[i]) : millm_f32_to_bf16(h->values[i]);

		if (dtype == MILLM_F32)
			memcpy(h->bytes + 4 * i, &h->values[i], 4);
		else
		{
			memcpy(h->bytes + 2 * i, &half, 2);
			h->values[i] = dtype == MILLM_F16 ? millm_f16_to_f32(half) : millm_bf16_to_f32(half);
		}
	}
	encode(h, 1000003);
	assert_int_equal(millm_st_parse(h->file, h->len, "copy", &h->st, &err), MILLM_OK);
	h->head = (MillmWeight) {.dtype = dtype, .n_out = ROWS, .n_in = n_in, .stride = n_in, .data = h->bytes};
	h->codes = (MillmWeight) {.dtype = MILLM_INT8, .n_out = ROWS, .n_in = n_in, .stride = n_in};
	for (size_t i = 0; i < millm_st_n_tensors(h->st); i++)
	{
		const MillmStTensor *t = millm_st_tensor(h->st, i);

		if (strcmp(t->name, "codes") == 0)
			h->codes.data = t->data;
		else if (strcmp(t->name, "scale") == 0)
			h->codes.scale = t->data;
		else if (strcmp(t->name, "error") == 0)
			memcpy(h->error, t->data, sizeof(h->error));
		else
			assert_string_equal(t->name, "fingerprint");
	}
	assert_true(h->codes.data && h->codes.scale);
}

static void
unmake(Head *h)
{
	millm_st_close(h->st);
	free(h->file);
}

enum {RANDOM, TWINS, TINY, WIDE, SPIKES, N_HEADS};

static bool damaged;

/* Rows of one kind; in each kind row 7 is zeros, row 8 ones, row 9 huge; and, when damaged, row 10 holds a NaN and row 11 an infinity. */
static void
fill(Head *h, int kind, MillmDtype dtype, int64_t n_in)
{
	float		huge = dtype == MILLM_F16 ? 60000 : 1e30f;

	seed = (uint64_t) kind + 1;
	for (int64_t v = 0; v < ROWS; v++)
		for (int64_t i = 0; i < n_in; i++)
		{
			float	   *w = &h->values[v * n_in + i];

			*w = 0.1f * uniform();
			switch (kind)
			{
				case TWINS:		/* the same row again and again, in which at most one value differs by its last bit */
					*w = v == 0 ? *w : h->values[i];
					if (v > 0 && i == v % n_in && v % 3)
						*w = nextafterf(*w, v % 3 == 1 ? 2 : -2);
					break;
				case TINY:		/* down to denormals, and rows whose scale would be one, or times that of a faint vector */
					*w *= v % 2 ? 1e-37f : v % 4 ? 1e-28f : 1e-40f;
					break;
				case WIDE:		/* magnitudes of thirty powers of two in a row */
					*w = ldexpf(*w, -(int) (30 * fabsf(uniform())));
					break;
				case SPIKES:	/* one value dwarfs the others, so all others are lost */
					*w = i == v % n_in ? 50 : *w;
					break;
			}
			if (v == 7)
				*w = 0;
			else if (v == 8)
				*w = 1;
			else if (v == 9)
				*w *= huge * 10;
			else if (damaged && (v == 10 || v == 11))
				*w = i == 0 ? (v == 10 ? NAN : INFINITY) : *w;
		}
}

enum {PLAIN, LARGE, SMALL, FAINT, ZERO, ONE_HOT, ALIGNED, OUTLIERS, BEYOND, N_VECTORS};

static void
fill_vector(float *x, const Head *h, int kind)
{
	int64_t		n = h->n_in;

	for (int64_t i = 0; i < n; i++)
	{
		float		f = 3 * uniform();
		const float scale[N_VECTORS] = {[PLAIN] = 1, [LARGE] = 1e14f, [SMALL] = 1e-40f, [FAINT] = 1e-26f, [OUTLIERS] = i % 50 ? 1 : 300, [BEYOND] = 1e30f};

		x[i] = f * scale[kind];
		if (kind == ONE_HOT)
			x[i] = i == n / 2;
		if (kind == ALIGNED)	/* what the copy of row 20 loses: the worst direction for it */
			x[i] = h->values[20 * n + i] - (float) ((const int8_t *) h->codes.data)[20 * n + i] / 127 * ((const float *) h->codes.scale)[20];
	}
}

static float
norm_above(const float *x, int64_t n)
{
	double		sum = 0;

	for (int64_t i = 0; i < n; i++)
		sum += (double) x[i] * x[i];
	return nextafterf((float) (sqrt(sum) * (1 + 0x1p-30)), INFINITY);
}

static void
multiply(const MillmKernels *k, float *y, const MillmWeight *w, const float *x)
{
	MillmMatmul m = {.y = y, .y_stride = ROWS, .w = w, .form = MILLM_FORM_F32, .x = x, .x_stride = w->n_in * 4, .n_tokens = 1};

	k->matmul[MILLM_FORM_F32][w->dtype][0] (&m, 0, ROWS);
}

/* The same with x in int16, where there are such kernels and x is not too small for them. */
static bool
multiply_i16(const MillmKernels *k, float *y, const MillmWeight *w, const float *x)
{
	static _Alignas(64) char packed[2 * MAX_IN + 512];
	MillmMatmul m = {.y = y, .y_stride = ROWS, .w = w, .form = MILLM_FORM_I16, .x = packed, .x_stride = sizeof(packed), .n_tokens = 1};

	if (!k->matmul[MILLM_FORM_I16][MILLM_INT8][0] || !(norm_above(x, w->n_in) >= MILLM_SCREEN_SMALL))
		return false;
	k->pack[MILLM_FORM_I16](packed, x, w->n_in);
	k->matmul[MILLM_FORM_I16][MILLM_INT8][0] (&m, 0, ROWS);
	return true;
}

static Head the_head;			/* large */

/* Every head of every dtype and several widths, every vector, every variant: work gets the exact logits z and the copy's y. */
static void
for_all(void (*work) (const Head *h, const float *error, const float *x, const float *z, const float *y))
{
	static const int64_t widths[] = {1, 5, 64, 300};
	static float x[MAX_IN];
	float		z[ROWS],
				y[ROWS],
				wide[ROWS];

	for (int kind = 0; kind < N_HEADS; kind++)
		for (int dtype = 0; dtype < MILLM_N_FLOAT_DTYPES; dtype++)
			for (size_t i = 0; i < sizeof(widths) / sizeof(widths[0]); i++)
			{
				fill(&the_head, kind, (MillmDtype) dtype, widths[i]);
				make(&the_head, (MillmDtype) dtype, widths[i]);
				for (int vector = 0; vector < N_VECTORS; vector++)
				{
					fill_vector(x, &the_head, vector);
					for (const char *const *name = millm_kernels_names(); *name; name++)
					{
						MillmKernels k;
						bool		is_known;

						if (!millm_kernels_init(&k, *name, &is_known))
							continue;
						multiply(&k, z, &the_head.head, x);
						multiply(&k, y, &the_head.codes, x);
						work(&the_head, the_head.error, x, z, y);
						if (multiply_i16(&k, y, &the_head.codes, x))
						{
							millm_screen_widen(wide, the_head.error, the_head.codes.scale, ROWS, the_head.n_in);
							work(&the_head, wide, x, z, y);
						}
					}
				}
				unmake(&the_head);
			}
}

static int	n_bounded;

static void
is_bounded(const Head *h, const float *error, const float *x, const float *z, const float *y)
{
	float		norm = norm_above(x, h->n_in);

	for (int v = 0; v < ROWS; v++)	/* 9 may be beyond float32 */
		assert_true(v == 10 || v == 11 ? error[v] == INFINITY : v == 9 ? error[v] >= 0 : isfinite(error[v]));
	for (int v = 0; v < ROWS; v++)
	{
		double		e = (double) error[v] * norm + (double) MILLM_SCREEN_TINY;

		if (!(norm <= MILLM_SCREEN_HUGE) || !(e <= (double) MILLM_SCREEN_HUGE))
			continue;
		n_bounded++;
		if (!(fabs((double) z[v] - (double) y[v]) <= e))
			fail_msg("dtype %d, width %d, row %d: %.9g and %.9g differ by more than %.9g", h->dtype, (int) h->n_in, v, z[v], y[v], e);
	}
}

static void
bound_holds(void **state)
{
	(void) state;
	damaged = true;
	for_all(is_bounded);
	damaged = false;
	assert_true(n_bounded > 100000);	/* the guard above has not let everything through */
}

/* ---- the shortlist ---- */

static int	n_short,
			n_long;

static void
same_choice(const Head *h, const float *error, const float *x, const float *z, const float *y)
{
	static const MillmSampling settings[] = {
		{.temperature = 0, .top_p = 1, .repetition_penalty = 1},
		{.temperature = 0, .top_p = 1, .repetition_penalty = 1.3f, .frequency_penalty = 0.1f},
		{.temperature = 1, .top_k = 1, .top_p = 1, .repetition_penalty = 1},
		{.temperature = 1, .top_k = 10, .top_p = 1, .repetition_penalty = 1},
		{.temperature = 0.7f, .top_k = 7, .top_p = 0.8f, .min_p = 0.01f, .repetition_penalty = 1.1f, .presence_penalty = -0.5f},
		{.temperature = 1.5f, .top_p = 1, .min_p = 0.3f, .repetition_penalty = 1},
		{.temperature = 1e-5f, .top_k = 5, .top_p = 1, .min_p = 1, .repetition_penalty = 1},
		{.temperature = 100, .top_k = 5, .top_p = 1, .min_p = 0.9f, .repetition_penalty = 1},
	};
	static const int32_t prompt[] = {20, 21, 300, 20, 399};
	float		norm = norm_above(x, h->n_in);

	for (size_t s = 0; s < sizeof(settings) / sizeof(settings[0]); s++)
	{
		MillmSampler *sampler = millm_sampler_create(&settings[s], ROWS);
		float		ends[ROWS],
					few[ROWS],
					lower[ROWS],
					heap[ROWS];
		int32_t		ids[ROWS];
		MillmTop	top;
		MillmError	err;
		int			n;
		bool		finite = true;	/* what was read: else the backend reads the full head */

		millm_sampler_note_prompt(sampler, prompt, 4);
		millm_sampler_note_generated(sampler, prompt[4]);
		top = millm_sampler_needs(sampler, NULL, 0);
		assert_true(top.k > 0);
		memcpy(ends, y, sizeof(ends));
		n = millm_shortlist(ids, ROWS / 2, ends, error, ROWS, norm, &top, lower, heap);
		for (int v = 0; v < ROWS; v++)
			few[v] = -INFINITY;
		for (int i = 0; i < n; i++)
		{
			assert_true(ids[i] >= 0 && ids[i] < ROWS && (i == 0 || ids[i] > ids[i - 1]));
			few[ids[i]] = z[ids[i]];
			finite &= isfinite(z[ids[i]]);
		}
		n_short += n >= 0;
		n_long += n < 0;
		for (int v = 0, i = 0; v < ROWS && n >= 0; v++)
			if (i < n && ids[i] == v)
				i++;
			else
				assert_true(isfinite(z[v]));	/* nothing that has overflowed goes unseen */
		for (int pos = 0; pos < 6 && n >= 0 && finite; pos++)
		{
			const MillmListed listed = {ids, n};
			int32_t		a = -1,
						b = -2,
						c = -3;

			assert_int_equal(millm_sampler_choose(sampler, z, NULL, pos, &a, &err), MILLM_OK);
			assert_int_equal(millm_sampler_choose(sampler, few, NULL, pos, &b, &err), MILLM_OK);
			assert_int_equal(millm_sampler_choose(sampler, z, &listed, pos, &c, &err), MILLM_OK);
			if (a != b || a != c)
				fail_msg("setting %zu, dtype %d, width %d: %d and %d instead of %d", s, h->dtype, (int) h->n_in, b, c, a);
		}
		millm_sampler_free(sampler);
	}
}

static void
choice_is_the_same(void **state)
{
	(void) state;
	for_all(same_choice);
	assert_true(n_short > 1000 && n_long > 1000);
}

/* What is exactly equal to the k-th stays, what cannot be known stays, what is clearly below goes. */
static void
shortlist_rules(void **state)
{
	float		y[8] = {1, 5, 3, 5, 4.9f, NAN, -9, 3};
	float		error[8] = {0, 0, 0, 0, 0, 0, INFINITY, 0};
	float		work[8],
				lower[8],
				heap[8];
	int32_t		ids[8];
	const int32_t always[] = {0};
	MillmTop	top = {.k = 1, .margin = INFINITY};

	(void) state;
#define LIST(max, norm) (memcpy(work, y, sizeof(y)), millm_shortlist(ids, max, work, error, 8, norm, &top, lower, heap))
	assert_int_equal(LIST(7, 1), 4);	/* the two 5s, the NaN, the row of which nothing is known */
	assert_true(ids[0] == 1 && ids[1] == 3 && ids[2] == 5 && ids[3] == 6);
	assert_int_equal(LIST(4, 1), 4);
	assert_int_equal(LIST(3, 1), -1);
	assert_int_equal(LIST(7, NAN), -1);
	assert_int_equal(LIST(7, 1e20f), -1);
	top.k = 4;
	assert_int_equal(LIST(7, 1), 7);	/* 5, 5, 4.9, and both 3s; NaN and unknown */
	top.margin = 1;
	assert_int_equal(LIST(7, 1), 5);
	top.k = 8;
	assert_int_equal(LIST(7, 1), 5);
	top.margin = INFINITY;
	assert_int_equal(LIST(7, 1), -1);
	top.margin = 1;
	top.always = always;
	top.n_always = 1;
	assert_int_equal(LIST(7, 1), 6);
	assert_int_equal(ids[0], 0);
	for (int v = 0; v < 8; v++)
		error[v] = 1;
	top = (MillmTop) {.k = 1, .margin = INFINITY};
	y[5] = y[6] = 0;
	assert_int_equal(LIST(7, 1), 5);	/* 5 - 1 = 3 + 1 */
	assert_int_equal(LIST(7, 0.5f), 3);
}

/* ---- the file ---- */

static void
cut_anywhere(void **state)
{
	static const size_t steps[] = {1, 2, 3, 127, 600, 601, 5000, 1 << 20};
	unsigned char *whole;
	size_t		len;

	(void) state;
	fill(&the_head, RANDOM, MILLM_BF16, 61);
	make(&the_head, MILLM_BF16, 61);
	whole = the_head.file;
	len = the_head.len;
	millm_st_close(the_head.st);
	for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++)
	{
		encode(&the_head, steps[i]);
		assert_int_equal(the_head.len, len);
		assert_memory_equal(the_head.file, whole, len);
		free(the_head.file);
	}
	free(whole);
}

static void
encoder_refuses(void **state)
{
	MillmScreenEncoder *enc = NULL;
	MillmError	err;
	const void *tail;
	size_t		n;
	int8_t		codes[16];

	(void) state;
	assert_failure(millm_screen_begin(MILLM_INT8, 1, 1, &enc, &err), &err, MILLM_E_UNSUPPORTED, "dtype");
	assert_failure(millm_screen_begin(MILLM_F32, 0, 1, &enc, &err), &err, MILLM_E_INVALID_MODEL_FILE, "[0, 1]");
	assert_failure(millm_screen_begin(MILLM_F32, 1, -1, &enc, &err), &err, MILLM_E_INVALID_MODEL_FILE, "shape");
	assert_failure(millm_screen_begin(MILLM_F32, INT64_MAX, 2, &enc, &err), &err, MILLM_E_INVALID_MODEL_FILE, "shape");
	assert_failure(millm_screen_begin(MILLM_F32, 1, 1 << 20, &enc, &err), &err, MILLM_E_INVALID_MODEL_FILE, "shape");
	assert_int_equal(millm_screen_file_bytes(INT64_MAX, 2), -1);
	assert_int_equal(millm_screen_begin(MILLM_BF16, 2, 3, &enc, &err), MILLM_OK);
	assert_int_equal(millm_screen_push(enc, "abcdefgh", 8, codes, &err), MILLM_OK);
	assert_failure(millm_screen_finish(enc, &tail, &n, &err), &err, MILLM_E_INVALID_MODEL_FILE, "shorter");
	assert_failure(millm_screen_push(enc, "abcdefgh", 8, codes, &err), &err, MILLM_E_INVALID_MODEL_FILE, "longer");
	millm_screen_free(enc);
	millm_screen_free(NULL);
}

/* Another row, another place, another shape: another fingerprint. */
static void
fingerprints(void **state)
{
	Head	   *h = &the_head;
	int64_t		print;
	size_t		row = 64 * 2;

	(void) state;
	fill(h, RANDOM, MILLM_BF16, 64);
	make(h, MILLM_BF16, 64);
	print = millm_screen_fingerprint(MILLM_BF16, ROWS, 64, h->bytes);
	assert_true(print != millm_screen_fingerprint(MILLM_F16, ROWS, 64, h->bytes));
	assert_true(print != millm_screen_fingerprint(MILLM_BF16, ROWS / 2, 128, h->bytes));
	assert_true(print != millm_screen_fingerprint(MILLM_BF16, ROWS - 1, 64, h->bytes));
	for (int v = 0; v < ROWS; v++)
	{
		unsigned char saved[64 * 2];

		memcpy(saved, h->bytes + v * row, row);
		for (size_t i = 0; i < row; i += 2)
			h->bytes[v * row + i] ^= 1;		/* the last bit of each value */
		assert_true(print != millm_screen_fingerprint(MILLM_BF16, ROWS, 64, h->bytes));
		memcpy(h->bytes + v * row, h->bytes + (v + 1) % ROWS * row, row);
		assert_true(print != millm_screen_fingerprint(MILLM_BF16, ROWS, 64, h->bytes));
		memcpy(h->bytes + v * row, saved, row);
	}
	assert_true(print == millm_screen_fingerprint(MILLM_BF16, ROWS, 64, h->bytes));
	unmake(h);
}

/* ---- beside a model ---- */

#define CONFIG "{\"model_type\": \"llama\", \"hidden_size\": 8, \"intermediate_size\": 6, \"num_hidden_layers\": 1, \"num_attention_heads\": 2," \
	" \"vocab_size\": 11, \"max_position_embeddings\": 32, \"tie_word_embeddings\": true}"

static TestTensor llama[] = {
	{"model.embed_tokens.weight", "F32", 4, {11, 8}, 600},
	{"model.norm.weight", "F32", 4, {8}, 700},
	{"model.layers.0.input_layernorm.weight", "F32", 4, {8}, 1},
	{"model.layers.0.self_attn.q_proj.weight", "F32", 4, {8, 8}, 1},
	{"model.layers.0.self_attn.k_proj.weight", "F32", 4, {8, 8}, 1},
	{"model.layers.0.self_attn.v_proj.weight", "F32", 4, {8, 8}, 1},
	{"model.layers.0.self_attn.o_proj.weight", "F32", 4, {8, 8}, 1},
	{"model.layers.0.post_attention_layernorm.weight", "F32", 4, {8}, 1},
	{"model.layers.0.mlp.gate_proj.weight", "F32", 4, {6, 8}, 1},
	{"model.layers.0.mlp.up_proj.weight", "F32", 4, {6, 8}, 1},
	{"model.layers.0.mlp.down_proj.weight", "F32", 4, {8, 6}, 1},
};

static char dir[64];

static MillmModel *
must_open(const char *refused)
{
	MillmModel *m = NULL;
	MillmError	err;

	if (millm_model_open(dir, &m, &err) != MILLM_OK)
		fail_msg("%s / %s", err.message, err.detail);
	if (!strstr(m->screen_refused, refused) || (refused[0] == '\0' && m->screen_refused[0]) || (refused[0] && m->screen.codes.data))
		fail_msg("expected a refusal for \"%s\", got \"%s\"", refused, m->screen_refused);
	return m;
}

static void
beside_a_model(void **state)
{
	MillmScreenEncoder *enc;
	MillmModel *m;
	MillmError	err;
	uint64_t	without;
	unsigned char file[2048];
	const void *part;
	size_t		n,
				len;
	static const float bad[] = {-1, NAN};

	(void) state;
	make_dir(dir);
	write_text(dir, "config.json", CONFIG);
	write_st(dir, "model.safetensors", llama, sizeof(llama) / sizeof(llama[0]), 0);
	m = must_open("");
	assert_null(m->screen.codes.data);
	without = m->weights_bytes;

	assert_int_equal(millm_screen_begin(m->head.dtype, 11, 8, &enc, &err), MILLM_OK);
	part = millm_screen_header(enc, &n);
	memcpy(file, part, n);
	len = n;
	assert_int_equal(millm_screen_push(enc, m->head.data, 11 * 8 * 4, (int8_t *) file + len, &err), MILLM_OK);
	len += 11 * 8;
	assert_int_equal(millm_screen_finish(enc, &part, &n, &err), MILLM_OK);
	memcpy(file + len, part, n);
	len += n;
	millm_screen_free(enc);
	millm_model_close(m);

	write_file(dir, MILLM_SCREEN_FILE, file, len);
	m = must_open("");
	assert_true(m->screen.codes.dtype == MILLM_INT8 && m->screen.codes.n_out == 11 && m->screen.codes.n_in == 8);
	assert_true(m->screen.codes.data && m->screen.codes.scale && m->screen.error.n == 11);
	assert_true(m->weights_bytes == without + 11 * (8 + 4 + 4));
	millm_model_populate(m, NULL, NULL);
	millm_model_close(m);

	for (int i = 0; i < 2; i++)	/* a bound, a scale that cannot be */
	{
		unsigned char saved[4];

		memcpy(saved, file + 512 + 88 + 44 * i, 4);
		memcpy(file + 512 + 88 + 44 * i, &bad[i], 4);
		write_file(dir, MILLM_SCREEN_FILE, file, len);
		millm_model_close(must_open("cannot be"));
		memcpy(file + 512 + 88 + 44 * i, saved, 4);
	}
	write_file(dir, MILLM_SCREEN_FILE, file, len - 1);
	millm_model_close(must_open("safetensors"));
	write_file(dir, MILLM_SCREEN_FILE, "", 0);
	millm_model_close(must_open("safetensors"));
	memcpy(file + 8 + 1, "\"__metadata_X\"", 14);
	write_file(dir, MILLM_SCREEN_FILE, file, len);
	millm_model_close(must_open("not used"));
	memcpy(file + 8 + 1, "\"__metadata__\"", 14);

	/* the head has been trained on, or has other rows */
	write_file(dir, MILLM_SCREEN_FILE, file, len);
	llama[0].start = 601;
	write_st(dir, "model.safetensors", llama, sizeof(llama) / sizeof(llama[0]), 0);
	millm_model_close(must_open("another LM head"));
	llama[0].start = 600;
	llama[0].dims[0] = 12;
	write_st(dir, "model.safetensors", llama, sizeof(llama) / sizeof(llama[0]), 0);
	write_text(dir, "config.json", "{\"model_type\": \"llama\", \"hidden_size\": 8, \"intermediate_size\": 6, \"num_hidden_layers\": 1,"
			   " \"num_attention_heads\": 2, \"vocab_size\": 12, \"max_position_embeddings\": 32, \"tie_word_embeddings\": true}");
	millm_model_close(must_open("what it should"));
	remove_dir(dir);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(bound_holds), cmocka_unit_test(choice_is_the_same), cmocka_unit_test(shortlist_rules),
		cmocka_unit_test(cut_anywhere), cmocka_unit_test(encoder_refuses), cmocka_unit_test(fingerprints),
		cmocka_unit_test(beside_a_model),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
