/*
 * test_forward.c -- the forward pass over small random models made in memory: what may change a row
 * (nothing but its own past) and what a failed step leaves (nothing).
 *
 * Three shapes with odd sizes: llama-like (bfloat16, RMS norm, rope, grouped heads, gated silu, a mixture of experts in one layer),
 * gpt2-like (float32 [in, out] slices of a fused tensor, LayerNorm, biases, learned positions, erf GELU) and falcon_like().
 * That the numbers are the right ones is the parity tests' matter.
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

#include "forward.h"
#include "kv.h"
#include "half.h"
#include "kernel.h"
#include "screen.h"
#include "threads.h"

#define VOCAB		509
#define HIDDEN		32
#define FFN			37
#define HEAD_DIM	8
#define N_HEADS		4
#define N_LAYERS	3
#define POSITIONS	96
#define N_EXPERTS	5
#define EXPERT_FFN	19
#define MAX_OWNED	256

/*
 * RMS of a variant's logits minus ref's, relative to ref's RMS.  Exact forms differ by the order of sums and by K and V in
 * float16 (2^-11 = 5e-4 a value, and these layers amplify); the bfloat16 form rounds every activation to 2^-9.
 */
#define TOLERANCE_EXACT		4e-3
#define TOLERANCE_FAST		3e-2

typedef struct Tiny
{
	MillmModel	model;
	void	   *owned[MAX_OWNED];
	int			n_owned;
	int			shape;
	uint64_t	seed;
} Tiny;

static float
uniform(Tiny *t)
{
	t->seed = t->seed * UINT64_C(6364136223846793005) + 1442695040888963407;
	return (float) (int32_t) (t->seed >> 32) / 2147483648.0f;
}

static void *
own(Tiny *t, size_t bytes)
{
	void	   *p = calloc(1, bytes);

	assert_non_null(p);
	assert_true(t->n_owned < MAX_OWNED);
	return t->owned[t->n_owned++] = p;
}

static MillmWeight
weight(Tiny *t, MillmDtype dtype, bool in_out, int n_out, int n_in)
{
	size_t		n = (size_t) n_out * (size_t) n_in;
	char	   *data = own(t, n * 4);

	for (size_t i = 0; i < n; i++)
	{
		float		f = 0.3f * uniform(t);
		uint16_t	h = millm_f32_to_bf16(f);

		memcpy(data + i * (dtype == MILLM_F32 ? 4 : 2), dtype == MILLM_F32 ? (void *) &f : (void *) &h, dtype == MILLM_F32 ? 4 : 2);
	}
	return (MillmWeight) {.dtype = dtype, .in_out = in_out, .n_out = n_out, .n_in = n_in, .stride = in_out ? n_out : n_in, .data = data};
}

static MillmVector
vector(Tiny *t, int n, float centre)
{
	MillmVector v = {own(t, sizeof(float) * (size_t) n), n};

	for (int i = 0; i < n; i++)
		v.data[i] = centre + 0.1f * uniform(t);
	return v;
}

static MillmMlp
mlp(Tiny *t, int size)
{
	return (MillmMlp) {.gate = weight(t, MILLM_BF16, false, size, HIDDEN), .up = weight(t, MILLM_BF16, false, size, HIDDEN),
		.down = weight(t, MILLM_BF16, false, HIDDEN, size)};
}

/* A mixture in place of the layer's MLP. */
static void
make_mixture(Tiny *t, MillmLayer *l)
{
	l->gate = l->up = l->down = (MillmWeight) {.data = NULL};
	l->router = weight(t, MILLM_BF16, false, N_EXPERTS, HIDDEN);
	l->experts = own(t, sizeof(MillmMlp) * N_EXPERTS);
	for (int e = 0; e < N_EXPERTS; e++)
		l->experts[e] = mlp(t, EXPERT_FFN);
	l->shared = mlp(t, FFN + 4);
	l->shared_router = weight(t, MILLM_BF16, false, 1, HIDDEN);
}

static Tiny *
tiny(bool is_gpt2)
{
	Tiny	   *t = calloc(1, sizeof(*t));
	MillmModel *m = &t->model;
	MillmConfig *c = &m->config;
	MillmDtype	dtype = is_gpt2 ? MILLM_F32 : MILLM_BF16;
	int			n_kv = is_gpt2 ? N_HEADS : 2;

	t->seed = is_gpt2 ? 2 : 1;
	*c = (MillmConfig) {
		.hidden_size = HIDDEN, .intermediate_size = FFN, .n_layers = N_LAYERS, .n_heads = N_HEADS, .n_kv_heads = n_kv,
		.head_dim = HEAD_DIM, .vocab_size = VOCAB, .max_positions = POSITIONS,
		.norm = is_gpt2 ? MILLM_NORM_LAYER : MILLM_NORM_RMS, .norm_bias = is_gpt2, .norm_eps = 1e-5f,
		.position = is_gpt2 ? MILLM_POS_LEARNED : MILLM_POS_ROPE, .rope = {.attention_factor = 1},
		.attention_scale = 0.35355339f, .embedding_scale = 1, .residual_scale = 1, .logit_scale = 1, .act = is_gpt2 ? MILLM_ACT_GELU_ERF : MILLM_ACT_SILU, .mlp_gated = !is_gpt2, .tied = true,
	};
	if (is_gpt2)
		m->position_embedding = weight(t, dtype, false, POSITIONS, HIDDEN);
	else
	{
		c->rotary_dim = HEAD_DIM;
		c->rope.inv_freq = own(t, sizeof(float) * HEAD_DIM / 2);
		for (int j = 0; j < HEAD_DIM / 2; j++)
			c->rope.inv_freq[j] = powf(1e4f, -2.0f * (float) j / HEAD_DIM);
	}
	m->embedding = weight(t, dtype, false, VOCAB, HIDDEN);
	m->head = m->embedding;
	m->final_norm = vector(t, HIDDEN, 1);
	m->layers = own(t, sizeof(MillmLayer) * N_LAYERS);
	if (is_gpt2)
		m->final_norm_bias = vector(t, HIDDEN, 0);
	for (int i = 0; i < N_LAYERS; i++)
	{
		MillmLayer *l = &m->layers[i];

		l->n_heads = N_HEADS;
		l->n_kv_heads = n_kv;
		l->head_dim = HEAD_DIM;
		l->window = !is_gpt2 && i == 1 ? 11 : 0;
		l->attn_norm = vector(t, HIDDEN, 1);
		l->mlp_norm = vector(t, HIDDEN, 1);
		if (is_gpt2)
		{
			MillmWeight fused = weight(t, dtype, true, 3 * HIDDEN, HIDDEN);

			l->q = l->k = l->v = fused;
			l->q.n_out = l->k.n_out = l->v.n_out = HIDDEN;
			l->k.data = (const char *) fused.data + HIDDEN * 4;
			l->v.data = (const char *) fused.data + 2 * HIDDEN * 4;
			l->attn_norm_bias = vector(t, HIDDEN, 0);
			l->mlp_norm_bias = vector(t, HIDDEN, 0);
			l->q_bias = vector(t, HIDDEN, 0);
			l->k_bias = vector(t, HIDDEN, 0);
			l->v_bias = vector(t, HIDDEN, 0);
			l->o_bias = vector(t, HIDDEN, 0);
			l->up_bias = vector(t, FFN, 0);
			l->down_bias = vector(t, HIDDEN, 0);
		}
		else
		{
			l->q = weight(t, dtype, false, N_HEADS * HEAD_DIM, HIDDEN);
			l->k = weight(t, dtype, false, n_kv * HEAD_DIM, HIDDEN);
			l->v = weight(t, dtype, false, n_kv * HEAD_DIM, HIDDEN);
			l->gate = weight(t, dtype, false, FFN, HIDDEN);
		}
		l->o = weight(t, dtype, is_gpt2, HIDDEN, N_HEADS * HEAD_DIM);
		l->up = weight(t, dtype, is_gpt2, FFN, HIDDEN);
		l->down = weight(t, dtype, is_gpt2, HIDDEN, FFN);
	}
	if (!is_gpt2)
	{
		c->n_experts = N_EXPERTS;
		c->n_chosen = 2;
		c->expert_size = EXPERT_FFN;
		c->shared_expert_size = FFN + 4;
		c->experts_sum_to_one = true;
		make_mixture(t, &m->layers[1]);
	}
	return t;
}

static void
tiny_free(Tiny *t)
{
	for (int i = 0; i < t->n_owned; i++)
		free(t->owned[i]);
	free(t);
}

static MillmForward *
open_forward(const Tiny *t, const char *kernels, bool deterministic, int n_threads)
{
	MillmForwardOptions options = {.n_threads = n_threads, .max_batch_tokens = 128, .n_pages = 40 * N_LAYERS, .deterministic = deterministic,
		.kernels = kernels};
	MillmForward *fw;
	MillmError	err;

	if (millm_forward_create(&t->model, &options, &fw, &err) != MILLM_OK)
		fail_msg("%s %s", err.message, err.detail);
	return fw;
}

static int32_t
token_of(int sequence, int position)
{
	return (sequence * 131 + position * 17 + position * position) % VOCAB;
}

static int
append(MillmBatchToken *batch, int n_batch, MillmSequence *seq, int sequence, int from, int n)
{
	assert_true(millm_sequence_reserve(seq, from + n));
	for (int i = 0; i < n; i++)
		batch[n_batch++] = (MillmBatchToken) {.seq = seq, .position = from + i, .token = token_of(sequence, from + i), .want_logits = true};
	return n_batch;
}

/* Run the batch; copies the logits of its n rows to out unless NULL. */
static void
step(MillmForward *fw, const MillmBatchToken *batch, int n, float *out)
{
	const float *logits;
	MillmError	err;

	if (millm_forward_step(fw, batch, n, NULL, NULL, &logits, &err) != MILLM_OK)
		fail_msg("%s", err.message);
	if (out)
		memcpy(out, logits, sizeof(float) * VOCAB * (size_t) n);
	if (millm_forward_check(fw, &err) != MILLM_OK)
		fail_msg("%s", err.message);
}

/* Logits of the first n positions of a sequence, chunk tokens a step. */
static void
run_alone(MillmForward *fw, int sequence, int n, int chunk, float *out)
{
	MillmSequence *seq = millm_sequence_create(fw, POSITIONS);
	MillmBatchToken batch[128];

	for (int at = 0; at < n; at += chunk)
	{
		int			k = n - at < chunk ? n - at : chunk;

		append(batch, 0, seq, sequence, at, k);
		step(fw, batch, k, out + (size_t) at * VOCAB);
	}
	millm_sequence_free(seq);
	assert_int_equal(millm_kv_pages_free(fw), millm_kv_pages_total(fw));
}

static void
assert_close(const char *what, const float *got, const float *expected, int n_rows, double tolerance)
{
	double		error = 0,
				size = 0;

	for (int i = 0; i < n_rows * VOCAB; i++)
	{
		error += ((double) got[i] - expected[i]) * ((double) got[i] - expected[i]);
		size += (double) expected[i] * expected[i];
	}
	if (!(sqrt(error / size) <= tolerance))
		fail_msg("%s: relative RMS error %.3g, tolerance %.3g", what, sqrt(error / size), tolerance);
}

static void
assert_same_bits(const char *what, const float *got, const float *expected, int n_rows)
{
	for (int i = 0; i < n_rows * VOCAB; i++)
		if (memcmp(&got[i], &expected[i], sizeof(float)) != 0)
			fail_msg("%s: row %d, logit %d is %.9g, expected the same bits as %.9g", what, i / VOCAB, i % VOCAB, got[i], expected[i]);
}

/* Every variant that runs here, both models: work(tiny, variant, is_gpt2). */
/* ALiBi, q, k and v of one tensor, group after group, attention and MLP beside each other; the embedding normed, branches scaled. */
static Tiny *
falcon_like(void)
{
	enum {N_KV = 2, QKV = (N_HEADS + 2 * N_KV) * HEAD_DIM};
	Tiny	   *t = tiny(true);
	MillmModel *m = &t->model;
	MillmConfig *c = &m->config;

	c->position = MILLM_POS_ALIBI;
	c->alibi_slopes = own(t, sizeof(float) * N_HEADS);
	for (int h = 0; h < N_HEADS; h++)
		c->alibi_slopes[h] = exp2f(-2.0f * (float) (h + 1));
	c->alibi_rounded = c->parallel = true;
	c->n_kv_heads = N_KV;
	c->residual_scale = 0.5f;
	c->logit_scale = 3;
	m->position_embedding.data = NULL;
	m->embedding_norm = vector(t, HIDDEN, 1);
	m->embedding_norm_bias = vector(t, HIDDEN, 0);
	for (int i = 0; i < N_LAYERS; i++)
	{
		MillmLayer *l = &m->layers[i];

		l->n_kv_heads = N_KV;
		l->q.data = l->k.data = l->v.data = NULL;
		l->qkv = weight(t, MILLM_F32, false, QKV, HIDDEN);
		l->qkv_bias = vector(t, QKV, 0);
		if (i == 1)
			l->mlp_norm.data = l->mlp_norm_bias.data = NULL;
	}
	return t;
}

static Tiny *llama_like(void) { return tiny(false); }
static Tiny *gpt2_like(void) { return tiny(true); }
static Tiny *(*const shapes[]) (void) = {llama_like, gpt2_like, falcon_like};

static void
for_all(void (*work) (const Tiny *t, const char *variant))
{
	for (int shape = 0; shape < (int) (sizeof(shapes) / sizeof(shapes[0])); shape++)
	{
		Tiny	   *t = shapes[shape] ();

		t->shape = shape;
		for (const char *const *name = millm_kernels_names(); *name; name++)
		{
			MillmKernels k;
			bool		is_known;

			if (millm_kernels_init(&k, *name, &is_known))
				work(t, *name);
		}
		tiny_free(t);
	}
}

#define N_LONG 61
static float rows_a[N_LONG * VOCAB], rows_b[N_LONG * VOCAB], rows_c[128 * VOCAB];

/* deterministic: the same bits alone, in a ragged batch, in chunks of any size, and on any number of threads. */
static void
deterministic_rows(const Tiny *t, const char *variant)
{
	static const int chunks[] = {1, 2, 7, 16, 33};
	static const int past[] = {0, 5, 16, 29}, count[] = {32, 1, 9, 1};
	MillmForward *fw = open_forward(t, variant, true, 2);
	MillmForward *single = open_forward(t, variant, true, 1);
	MillmSequence *seq[4];
	MillmBatchToken batch[128];
	int			n = 0;

	run_alone(fw, 1, N_LONG, N_LONG, rows_a);
	run_alone(single, 1, N_LONG, N_LONG, rows_b);
	assert_same_bits("one thread", rows_b, rows_a, N_LONG);
	for (size_t i = 0; i < sizeof(chunks) / sizeof(chunks[0]); i++)
	{
		run_alone(fw, 1, N_LONG, chunks[i], rows_b);
		assert_same_bits("chunks", rows_b, rows_a, N_LONG);
	}

	/* prefill chunks and decode tokens of four sequences side by side */
	for (int s = 0; s < 4; s++)
	{
		seq[s] = millm_sequence_create(fw, POSITIONS);
		if (past[s] > 0)
			step(fw, batch, append(batch, 0, seq[s], s, 0, past[s]), NULL);
	}
	for (int s = 0; s < 4; s++)
		n = append(batch, n, seq[s], s, past[s], count[s]);
	step(fw, batch, n, rows_c);
	n = 0;
	for (int s = 0; s < 4; s++)
	{
		assert_int_equal(millm_sequence_length(seq[s]), past[s] + count[s]);
		millm_sequence_free(seq[s]);
	}
	for (int s = 0; s < 4; s++)
	{
		run_alone(fw, s, past[s] + count[s], 64, rows_b);
		assert_same_bits("ragged batch", rows_c + (size_t) n * VOCAB, rows_b + (size_t) past[s] * VOCAB, count[s]);
		n += count[s];
	}
	millm_forward_free(fw);
	millm_forward_free(single);
}

static void
test_deterministic_rows(void **state)
{
	(void) state;
	for_all(deterministic_rows);
}

/* Every variant computes what ref does, whatever it rounds. */
static void
variant_agrees(const Tiny *t, const char *variant)
{
	MillmForward *ref = open_forward(t, "ref", false, 1);
	MillmForward *exact = open_forward(t, variant, true, 2);
	MillmForward *fast = open_forward(t, variant, false, 2);

	assert_string_equal(millm_forward_kernels(fast), variant);
	run_alone(ref, 3, N_LONG, 64, rows_a);
	run_alone(exact, 3, N_LONG, 64, rows_b);
	assert_close(variant, rows_b, rows_a, N_LONG, strcmp(variant, "ref") == 0 ? 0 : TOLERANCE_EXACT);
	run_alone(fast, 3, N_LONG, 64, rows_b);
	assert_close(variant, rows_b, rows_a, N_LONG, TOLERANCE_FAST);
	run_alone(fast, 3, N_LONG, 5, rows_b);	/* too few tokens for the bfloat16 form */
	assert_close(variant, rows_b, rows_a, N_LONG, TOLERANCE_EXACT);
	millm_forward_free(ref);
	millm_forward_free(exact);
	millm_forward_free(fast);
}

static void
test_variants_agree_with_ref(void **state)
{
	(void) state;
	for_all(variant_agrees);
}

/* A fork goes its own way: neither sees what the other writes, and both equal a sequence that was never forked. */
static void
forked(const Tiny *t, const char *variant)
{
	enum {PAST = 21, MORE = 20};
	MillmForward *fw = open_forward(t, variant, true, 2);
	MillmSequence *a = millm_sequence_create(fw, POSITIONS),
			   *b;
	MillmBatchToken batch[128];
	int64_t		used;
	int			from;

	run_alone(fw, 1, PAST + MORE, 64, rows_a);
	step(fw, batch, append(batch, 0, a, 1, 0, PAST), NULL);
	used = millm_kv_pages_free(fw);
	b = millm_sequence_fork(a);
	assert_int_equal(millm_kv_pages_free(fw), used);	/* all shared */

	/* b continues with other tokens, then a with its own */
	assert_true(millm_sequence_reserve(b, PAST + MORE));
	for (int i = 0; i < MORE; i++)
		batch[i] = (MillmBatchToken) {.seq = b, .position = PAST + i, .token = (7 * i + 3) % VOCAB, .want_logits = true};
	step(fw, batch, MORE, rows_c);
	step(fw, batch, append(batch, 0, a, 1, PAST, MORE), rows_b);
	assert_same_bits("the original after a fork", rows_b, rows_a + PAST * VOCAB, MORE);

	/* rewind both into the shared part, which a layer that slides has let go, and swap what they say */
	millm_sequence_truncate(b, 9);
	millm_sequence_truncate(a, 9);
	from = t->model.layers[1].window > 0 ? 0 : 9;
	assert_int_equal(millm_sequence_length(a), from);
	step(fw, batch, append(batch, 0, b, 1, from, MORE), rows_b);
	assert_same_bits("recomputed after truncate", rows_b, rows_a + from * VOCAB, MORE);
	millm_sequence_free(b);
	step(fw, batch, append(batch, 0, a, 1, from, MORE), rows_b);
	assert_same_bits("recomputed after the fork was freed", rows_b, rows_a + from * VOCAB, MORE);
	millm_sequence_free(a);
	assert_int_equal(millm_kv_pages_free(fw), millm_kv_pages_total(fw));
	millm_forward_free(fw);
}

static void
test_fork_and_truncate(void **state)
{
	(void) state;
	for_all(forked);
}

/* Of experts that nobody chooses nothing is read: here they lie where nothing is. */
static void
test_only_chosen_experts_are_read(void **state)
{
	Tiny	   *t = tiny(false);
	MillmLayer *l = &t->model.layers[1];
	uint16_t   *router = own(t, N_EXPERTS * HIDDEN * 2);
	MillmForward *fw;

	(void) state;
	/* the scores are s, -s and zeros, so that the largest is never one of these */
	memcpy(router, l->router.data, HIDDEN * 2);
	for (int i = 0; i < HIDDEN; i++)
		router[HIDDEN + i] = router[i] ^ 0x8000;
	l->router.data = router;
	t->model.config.n_chosen = 1;
	fw = open_forward(t, NULL, false, 2);
	run_alone(fw, 1, N_LONG, 64, rows_a);
	for (int e = 2; e < N_EXPERTS; e++)
		l->experts[e].gate.data = l->experts[e].up.data = l->experts[e].down.data = (const void *) 64;
	run_alone(fw, 1, N_LONG, 64, rows_b);
	assert_same_bits("experts that are not there", rows_b, rows_a, N_LONG);
	run_alone(fw, 1, 3, 1, rows_b);
	millm_forward_free(fw);
	tiny_free(t);
}

/*
 * Of layers that slide, a long text takes no more pages than their window and one at either end.  Two sequences share a pool that
 * is too small for either, so that one soon writes where the other was: the rows are those that they get alone, computed at once.
 */
static void
lets_go(const Tiny *t, const char *variant, bool slides)
{
	enum {LENGTH = 400, WINDOW = 21, TAIL = 7};
	static float whole[2][TAIL * VOCAB];
	MillmForwardOptions options = {.n_threads = 2, .max_batch_tokens = 128, .deterministic = true, .kernels = variant};
	MillmKvLayout layout;
	MillmForward *large, *small;
	MillmSequence *seq[2];
	MillmBatchToken batch[128];
	MillmError	err;
	int			least_free = INT32_MAX;

	if (t->model.config.position != MILLM_POS_ROPE)
		return;
	for (int i = 0; i < N_LAYERS; i++)
		t->model.layers[i].window = i == 1 ? 7 : slides || i > 0 ? WINDOW : 0;
	millm_forward_kv_layout(&t->model, &layout);
	options.n_pages = 2 * millm_kv_pages(&layout, LENGTH, 1);
	large = open_forward(t, variant, true, 2);
	for (int s = 0; s < 2; s++)
	{
		seq[s] = millm_sequence_create(large, LENGTH);
		for (int at = 0; at < LENGTH; at += 100)
			step(large, batch, append(batch, 0, seq[s], s, at, 100), rows_c);
		memcpy(whole[s], rows_c + (100 - TAIL) * VOCAB, sizeof(whole[s]));
		millm_sequence_free(seq[s]);
	}
	millm_forward_free(large);

	if (millm_forward_create(&t->model, &options, &small, &err) != MILLM_OK)
		fail_msg("%s", err.message);
	seq[0] = millm_sequence_create(small, LENGTH);
	seq[1] = millm_sequence_create(small, LENGTH);
	for (int at = 0; at < LENGTH; at++)
	{
		step(small, batch, append(batch, append(batch, 0, seq[0], 0, at, 1), seq[1], 1, at, 1), rows_c);
		if (millm_kv_pages_free(small) < least_free)
			least_free = (int) millm_kv_pages_free(small);
		for (int s = 0; s < 2 && at >= LENGTH - TAIL; s++)
			assert_same_bits("one at a time, in few pages", rows_c + s * VOCAB, whole[s] + (at - LENGTH + TAIL) * VOCAB, 1);
	}
	assert_true(least_free <= layout.n_groups);	/* or the pool was not small */
	/* what has gone cannot be had again */
	millm_sequence_truncate(seq[0], LENGTH - 1);
	assert_int_equal(millm_sequence_length(seq[0]), LENGTH - 1);
	millm_sequence_truncate(seq[0], LENGTH - 30);
	assert_int_equal(millm_sequence_length(seq[0]), 0);
	millm_sequence_free(seq[0]);
	millm_sequence_free(seq[1]);
	assert_int_equal(millm_kv_pages_free(small), options.n_pages);
	millm_forward_free(small);
	for (int i = 0; i < N_LAYERS; i++)
		t->model.layers[i].window = i == 1 ? 11 : 0;
}

/* All layers slide, or all but the first. */
static void
window_lets_go(const Tiny *t, const char *variant)
{
	lets_go(t, variant, true);
	lets_go(t, variant, false);
}

static void
test_windows_let_pages_go(void **state)
{
	(void) state;
	for_all(window_lets_go);
}

static bool
stop_at_second(void *arg)
{
	return ++*(int *) arg == 2;
}

static void
test_cancel_leaves_nothing(void **state)
{
	Tiny	   *t = tiny(false);
	MillmForward *fw = open_forward(t, NULL, true, 2);
	MillmSequence *seq = millm_sequence_create(fw, POSITIONS);
	MillmBatchToken batch[128];
	MillmError	err;
	const float *logits;
	int			n_asked = 0;
	int			n;

	(void) state;
	run_alone(fw, 1, 40, 64, rows_a);
	step(fw, batch, append(batch, 0, seq, 1, 0, 18), NULL);
	n = append(batch, 0, seq, 1, 18, 22);
	for (int i = 0; i < n; i++)
		batch[i].token = (batch[i].token + 1) % VOCAB;	/* what a canceled step wrote must not be seen */
	assert_int_equal(millm_forward_step(fw, batch, n, stop_at_second, &n_asked, &logits, &err), MILLM_E_CANCELED);
	assert_int_equal(n_asked, 2);
	assert_int_equal(millm_sequence_length(seq), 18);
	step(fw, batch, append(batch, 0, seq, 1, 18, 22), rows_b);
	assert_same_bits("after a canceled step", rows_b, rows_a + 18 * VOCAB, 22);
	millm_sequence_free(seq);
	millm_forward_free(fw);
	tiny_free(t);
}

/* Only wanted rows come, in the order of the wanting tokens. */
static void
test_wanted_rows(void **state)
{
	Tiny	   *t = tiny(false);
	MillmForward *fw = open_forward(t, NULL, true, 2);
	MillmSequence *seq = millm_sequence_create(fw, POSITIONS);
	MillmBatchToken batch[128];
	MillmError	err;
	const float *logits;
	int			n;

	(void) state;
	run_alone(fw, 1, 20, 64, rows_a);
	n = append(batch, 0, seq, 1, 0, 20);
	for (int i = 0; i < n; i++)
		batch[i].want_logits = i == 3 || i == 19;
	assert_int_equal(millm_forward_step(fw, batch, n, NULL, NULL, &logits, &err), MILLM_OK);
	assert_same_bits("first wanted", logits, rows_a + 3 * VOCAB, 1);
	assert_same_bits("second wanted", logits + VOCAB, rows_a + 19 * VOCAB, 1);
	millm_sequence_free(seq);
	millm_forward_free(fw);
	tiny_free(t);
}

/* Give the model a screening copy of its head. */
static void
add_screen(Tiny *t)
{
	MillmModel *m = &t->model;
	size_t		bytes = (size_t) millm_weight_bytes(m->head.dtype, VOCAB * HIDDEN);
	int8_t	   *codes = own(t, VOCAB * HIDDEN);
	char	   *tail = own(t, VOCAB * 8 + 8);
	MillmScreenEncoder *enc;
	MillmError	err;
	const void *part;
	size_t		n;

	assert_int_equal(millm_screen_begin(m->head.dtype, VOCAB, HIDDEN, &enc, &err), MILLM_OK);
	assert_int_equal(millm_screen_push(enc, m->head.data, bytes, codes, &err), MILLM_OK);
	assert_int_equal(millm_screen_finish(enc, &part, &n, &err), MILLM_OK);
	memcpy(tail, part, n);
	millm_screen_free(enc);
	m->screen.codes = (MillmWeight) {.dtype = MILLM_INT8, .n_out = VOCAB, .n_in = HIDDEN, .stride = HIDDEN, .data = codes, .scale = tail};
	m->screen.error = (MillmVector) {(float *) (tail + VOCAB * 4), VOCAB};
}

/* A row has the full head's bits, or -infinity where that is below the k-th; returns how many are there. */
static int
assert_screened(const float *got, const float *full, int k)
{
	int			n = 0;
	float		least = INFINITY;

	for (int v = 0; v < VOCAB; v++)
		if (got[v] != -INFINITY)
		{
			n++;
			assert_memory_equal(&got[v], &full[v], sizeof(float));
			least = got[v] < least ? got[v] : least;
		}
	assert_true(n >= k);
	for (int v = 0, above = 0; v < VOCAB; v++)
	{
		above += full[v] != got[v] && full[v] >= least;
		assert_true(above <= n - k);	/* whoever is missing lies below k of those that are there */
	}
	return n;
}

/* Through the screening copy come the same bits, in any company; where it cannot decide, all of the head is read. */
static void
screened_rows(const Tiny *unscreened, const char *variant)
{
	Tiny	   *t = shapes[unscreened->shape] ();
	MillmForward *full;
	MillmForward *fw;
	MillmSequence *seq;
	MillmBatchToken batch[128];
	MillmHeadUse use;
	MillmError	err;
	const float *logits;
	uint16_t   *head;
	uint16_t	saved;
	int			at = 0;

	add_screen(t);
	full = open_forward(unscreened, variant, true, 2);
	fw = open_forward(t, variant, true, 2);
	seq = millm_sequence_create(fw, POSITIONS);
	run_alone(full, 1, N_LONG, N_LONG, rows_a);
	for (int n = 1; n <= 7; n += n < 3 ? 1 : 4)
		for (int k = 1; k <= 20; k += 19, at += n)
		{
			append(batch, 0, seq, 1, at, n);
			for (int i = 0; i < n; i++)
				batch[i].top = (MillmTop) {.k = k, .margin = INFINITY};
			step(fw, batch, n, rows_c);
			for (int i = 0; i < n; i++)
			{
				const MillmListed l = millm_forward_listed(fw, i);

				assert_int_equal(assert_screened(rows_c + i * VOCAB, rows_a + (size_t) (at + i) * VOCAB, k), l.n);
				assert_true(l.n < VOCAB / 4);
				for (int j = 0; j < l.n; j++)
					assert_true(rows_c[i * VOCAB + l.ids[j]] > -INFINITY && (j == 0 || l.ids[j] > l.ids[j - 1]));
			}
		}
	use = millm_forward_head_use(fw);
	assert_int_equal(use.n_rows, 26);
	assert_int_equal(use.n_screened, 26);
	assert_true(use.n_read >= 273 && use.n_read < 26 * VOCAB / 16);

	/* a head that is damaged where its copy knows it: the full head is asked, and says so */
	millm_sequence_free(seq);
	millm_forward_free(fw);
	t->model.screen.error.data[5] = INFINITY;
	fw = open_forward(t, variant, true, 2);
	seq = millm_sequence_create(fw, POSITIONS);
	at = 0;
	head = (uint16_t *) (uintptr_t) t->model.head.data + 5 * HIDDEN * (t->model.head.dtype == MILLM_F32 ? 2 : 1) + 1;
	saved = *head;
	*head = 0x7FC0;				/* NaN in both dtypes */
	append(batch, 0, seq, 1, at, 1);
	batch[0].top = (MillmTop) {.k = 1, .margin = INFINITY};
	assert_int_equal(millm_forward_step(fw, batch, 1, NULL, NULL, &logits, &err), MILLM_E_INTERNAL);
	assert_non_null(strstr(err.message, "the logits"));
	*head = saved;

	/* and it is asked for some steps more */
	for (int i = 0; i < 16; i++, at++)
	{
		append(batch, 0, seq, 1, at, 1);
		batch[0].top = (MillmTop) {.k = 1, .margin = INFINITY};
		step(fw, batch, 1, rows_c);
		if (i < 15)
			assert_same_bits("after what could not be decided", rows_c, rows_a + (size_t) at * VOCAB, 1);
		assert_int_equal(millm_forward_head_use(fw).n_screened, i < 15 ? 0 : 1);
	}

	/* one wants all, too many tokens */
	append(batch, 0, seq, 1, at, 2);
	batch[0].top = (MillmTop) {.k = 1, .margin = INFINITY};
	step(fw, batch, 2, rows_c);
	assert_same_bits("one wants all", rows_c, rows_a + (size_t) at * VOCAB, 2);
	assert_int_equal(millm_forward_listed(fw, 0).n, -1);
	at += 2;
	append(batch, 0, seq, 1, at, 9);
	for (int i = 0; i < 9; i++)
		batch[i].top = (MillmTop) {.k = 1, .margin = INFINITY};
	step(fw, batch, 9, rows_c);
	assert_same_bits("many tokens", rows_c, rows_a + (size_t) at * VOCAB, 9);
	at += 9;
	assert_int_equal(millm_forward_head_use(fw).n_screened, 1);
	millm_sequence_free(seq);
	millm_forward_free(fw);
	millm_forward_free(full);
	tiny_free(t);
}

static void
test_screened_rows(void **state)
{
	(void) state;
	for_all(screened_rows);
}

static void
test_bad_steps_are_refused(void **state)
{
	Tiny	   *t = tiny(true);
	MillmForward *fw = open_forward(t, NULL, false, 1);
	MillmSequence *a = millm_sequence_create(fw, POSITIONS),
			   *b = millm_sequence_create(fw, POSITIONS);
	MillmBatchToken batch[128];
	MillmError	err;
	const float *logits;
	float		saved;
	struct
	{
		MillmBatchToken tokens[3];
		int			n;
		MillmCode	code;
	}			bad[] = {
		{{{.seq = a, .position = 0, .token = -1}}, 1, MILLM_E_INVALID_ARGUMENT},
		{{{.seq = a, .position = 0, .token = VOCAB}}, 1, MILLM_E_INVALID_ARGUMENT},
		{{{.seq = a, .position = 1, .token = 5}}, 1, MILLM_E_INTERNAL},	/* not the next position */
		{{{.seq = a, .position = 0, .token = 5}, {.seq = a, .position = 0, .token = 5}}, 2, MILLM_E_INTERNAL},
		{{{.seq = a, .position = 0, .token = 5}, {.seq = b, .position = 0, .token = 5}, {.seq = a, .position = 1, .token = 5}}, 3, MILLM_E_INTERNAL},	/* not together */
		{{{.seq = a, .position = 0, .token = 5}}, 0, MILLM_E_INTERNAL},
	};

	(void) state;
	assert_int_equal(millm_forward_step(fw, bad[2].tokens, 1, NULL, NULL, &logits, &err), MILLM_E_INTERNAL);	/* nothing reserved */
	assert_true(millm_sequence_reserve(a, 8));
	assert_true(millm_sequence_reserve(b, 8));
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
	{
		assert_int_equal(millm_forward_step(fw, bad[i].tokens, bad[i].n, NULL, NULL, &logits, &err), bad[i].code);
		assert_int_equal(millm_sequence_length(a), 0);
	}
	step(fw, batch, append(batch, 0, a, 1, 0, POSITIONS), NULL);
	assert_true(millm_sequence_reserve(a, POSITIONS + 1));
	batch[0] = (MillmBatchToken) {.seq = a, .position = POSITIONS, .token = 1, .want_logits = true};
	assert_int_equal(millm_forward_step(fw, batch, 1, NULL, NULL, &logits, &err), MILLM_E_CONTEXT_LENGTH_EXCEEDED);
	millm_sequence_free(a);

	/* ALiBi's biases end, too */
	t->model.config.position = MILLM_POS_ALIBI;
	batch[0] = (MillmBatchToken) {.seq = b, .position = 0, .token = 1};
	t->model.config.max_positions = 1;
	step(fw, batch, 1, NULL);
	batch[0].position = 1;
	assert_int_equal(millm_forward_step(fw, batch, 1, NULL, NULL, &logits, &err), MILLM_E_CONTEXT_LENGTH_EXCEEDED);
	t->model.config.position = MILLM_POS_LEARNED;
	millm_sequence_truncate(b, 0);
	assert_true(millm_sequence_reserve(b, 8));

	/* a damaged weight is found in its layer */
	saved = ((float *) t->model.layers[1].up_bias.data)[3];
	t->model.layers[1].up_bias.data[3] = NAN;
	batch[0] = (MillmBatchToken) {.seq = b, .token = 1, .want_logits = true};
	assert_int_equal(millm_forward_step(fw, batch, 1, NULL, NULL, &logits, &err), MILLM_E_INTERNAL);
	assert_non_null(strstr(err.message, "layer 1"));
	t->model.layers[1].up_bias.data[3] = saved;
	step(fw, batch, 1, NULL);
	millm_sequence_free(b);
	millm_forward_free(fw);
	tiny_free(t);
}

static void
test_create_refuses(void **state)
{
	Tiny	   *t = tiny(false);
	MillmForward *fw = NULL;
	MillmError	err;
	MillmForwardOptions options = {.n_threads = 1, .n_pages = 4, .kernels = "fastest"};

	(void) state;
	assert_int_equal(millm_forward_create(&t->model, &options, &fw, &err), MILLM_E_INVALID_ARGUMENT);
	assert_non_null(strstr(err.message, "\"fastest\""));
	assert_true(millm_kv_page_bytes(&t->model, &options) < 0);
	options.kernels = "ref";
	options.n_pages = 0;
	assert_int_equal(millm_forward_create(&t->model, &options, &fw, &err), MILLM_E_INVALID_ARGUMENT);
	options.n_pages = INT64_MAX / 2;
	assert_int_equal(millm_forward_create(&t->model, &options, &fw, &err), MILLM_E_INVALID_ARGUMENT);
	options.n_pages = INT32_MAX / MILLM_KV_PAGE_TOKENS;		/* 800 GB and more: where the system grants it, it is only a promise */
	options.n_threads = -1;
	assert_int_equal(millm_forward_create(&t->model, &options, &fw, &err), MILLM_E_INVALID_ARGUMENT);
	assert_null(fw);
	/* [layer][K, V][KV heads][head_dim][16] float32; of one layer, since one of them slides, or of all */
	assert_int_equal(millm_kv_page_bytes(&t->model, &options), 2 * 2 * HEAD_DIM * 16 * 4);
	t->model.layers[1].window = 0;
	assert_int_equal(millm_kv_page_bytes(&t->model, &options), N_LAYERS * 2 * 2 * HEAD_DIM * 16 * 4);
	tiny_free(t);
}

/* ---- the team ---- */

typedef struct Sum
{
	int64_t		n_items;
	int			seen[4096];
} Sum;

static void
count_items(void *arg, int64_t begin, int64_t end)
{
	Sum		   *sum = arg;

	for (int64_t i = begin; i < end; i++)
		sum->seen[i]++;			/* each item is one thread's alone */
}

/* Every item once, in thousands of loops with workers awake, asleep and on their way. */
static void
test_team(void **state)
{
	static Sum	sum;
	MillmTeam  *team;

	(void) state;
	for (int n_threads = 1; n_threads <= 5; n_threads += 2)
	{
		assert_int_equal(millm_team_create(n_threads, &team, NULL), MILLM_OK);
		assert_int_equal(millm_team_size(team), n_threads);
		for (int loop = 0; loop < 2000; loop++)
		{
			int64_t		n = (loop * 37) % 4096;

			memset(sum.seen, 0, sizeof(sum.seen));
			millm_team_run(team, count_items, &sum, n, 1 + loop % 50, loop % 3 ? 1 + loop % 50 : INT64_MAX);
			for (int64_t i = 0; i < 4096; i++)
				assert_int_equal(sum.seen[i], i < n);
		}
		millm_team_free(team);
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_team),
		cmocka_unit_test(test_deterministic_rows),
		cmocka_unit_test(test_variants_agree_with_ref),
		cmocka_unit_test(test_fork_and_truncate),
		cmocka_unit_test(test_only_chosen_experts_are_read),
		cmocka_unit_test(test_windows_let_pages_go),
		cmocka_unit_test(test_cancel_leaves_nothing),
		cmocka_unit_test(test_wanted_rows),
		cmocka_unit_test(test_screened_rows),
		cmocka_unit_test(test_bad_steps_are_refused),
		cmocka_unit_test(test_create_refuses),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
