/*
 * bench.c -- see bench.h.  Token ids are random: speed does not depend on them.
 */
#include "bench.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "clock.h"
#include "kv.h"
#include "sampler.h"

typedef struct Run
{
	const MillmModel *model;
	const MillmBench *bench;
	MillmForward *fw;
	MillmSequence **sequences;	/* [n_sequences]; the first one takes the prompt too */
	MillmBatchToken *batch;		/* [max_batch] */
	int			max_batch;
	MillmBackendCounts counts;	/* of the measured decoding steps, where is_counted */
	bool		is_counted;
	MillmError *err;
} Run;

static double
now_s(void)
{
	return (double) millm_now_us() / 1e6;
}

static int
compare_doubles(const void *a, const void *b)
{
	double		x = *(const double *) a;
	double		y = *(const double *) b;

	return (x > y) - (x < y);
}

static double
median(double *x, int n)
{
	qsort(x, (size_t) n, sizeof(*x), compare_doubles);
	return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static int32_t
token_id(const Run *run, int i)
{
	return (int32_t) (millm_random_uniform(1, 0, i) * run->model->config.vocab_size);
}

/* Positions of the decoding rounds: where they begin, and how many there are with the first one, which is not measured. */
static int64_t
decoded_length(const MillmBench *b)
{
	return (int64_t) b->n_context + 1 + b->n_gen;
}

static void
truncate_all(Run *run, int length)
{
	for (int i = 0; i < run->bench->n_sequences; i++)
		millm_sequence_truncate(run->sequences[i], length);
}

/* The next step, of n tokens of the batch, for which the first n_sequences of these grow to that length. */
static MillmCode
step(Run *run, int n, MillmSequence **sequences, int n_sequences, int length)
{
	const float *logits;

	for (int i = 0; i < n_sequences; i++)
		if (!millm_sequence_reserve(sequences[i], length))
			return millm_fail(run->err, MILLM_E_INTERNAL, "the KV cache is too small");
	return millm_forward_step(run->fw, run->batch, n, NULL, NULL, &logits, run->err);
}

/* Let a sequence grow to n positions as a prompt does; with logits: of the last one. */
static MillmCode
fill(Run *run, MillmSequence *seq, int n, bool with_logits)
{
	MillmCode	rc = MILLM_OK;

	for (int at = millm_sequence_length(seq), k; at < n && rc == MILLM_OK; at += k)
	{
		k = n - at < run->max_batch ? n - at : run->max_batch;
		for (int i = 0; i < k; i++)
			run->batch[i] = (MillmBatchToken) {.seq = seq, .position = at + i, .token = token_id(run, at + i), .want_logits = with_logits && at + i == n - 1};
		rc = step(run, k, &seq, 1, at + k);
	}
	return rc;
}

/* One token of each sequence at a time. */
static MillmCode
decode(Run *run, int first, int n)
{
	MillmCode	rc = MILLM_OK;

	for (int at = first; at < first + n && rc == MILLM_OK; at++)
	{
		for (int i = 0; i < run->bench->n_sequences; i++)
			run->batch[i] = (MillmBatchToken) {.seq = run->sequences[i], .position = at, .token = token_id(run, at + 7 * i), .want_logits = true,
				.top = {.k = 1, .margin = INFINITY}};
		rc = step(run, run->bench->n_sequences, run->sequences, run->bench->n_sequences, at + 1);
	}
	return rc;
}

static MillmCode
measure_prefill(Run *run, int n, double *seconds)
{
	double		start;
	MillmCode	rc;

	truncate_all(run, 0);
	start = now_s();
	rc = fill(run, run->sequences[0], n, true);
	*seconds = now_s() - start;
	return rc;
}

/* Adds to run->counts what the measured steps took. */
static MillmCode
measure_decode(Run *run, int n, double *seconds)
{
	const int	context = run->bench->n_context;
	MillmBackendCounts before = {0}, after = {0};
	MillmCode	rc = MILLM_OK;
	double		start;

	truncate_all(run, context);
	for (int i = 0; i < run->bench->n_sequences && rc == MILLM_OK; i++)
		rc = fill(run, run->sequences[i], context, false);
	if (rc == MILLM_OK)
		rc = decode(run, context, 1);
	run->is_counted = millm_forward_counts(run->fw, &before);
	start = now_s();
	if (rc == MILLM_OK)
		rc = decode(run, context + 1, n);
	*seconds = now_s() - start;
	(void) millm_forward_counts(run->fw, &after);
	run->counts.n_kernels += after.n_kernels - before.n_kernels;
	run->counts.n_starts += after.n_starts - before.n_starts;
	run->counts.n_waits += after.n_waits - before.n_waits;
	run->counts.wait_us += after.wait_us - before.wait_us;
	return rc;
}

/* A matrix and the scales beside it. */
static int64_t
matrix_bytes(const MillmWeight *w)
{
	int64_t		bytes = millm_weight_bytes(w->dtype, w->n_out * w->n_in);

	if (!w->data)
		return 0;
	if (w->dtype == MILLM_INT8)
		bytes += w->n_out * 4;
	if (w->dtype == MILLM_4BIT)
	{
		int64_t		n_blocks = (w->n_out * w->n_in + w->block_size - 1) / w->block_size;

		bytes += w->nested_block_size == 0 ? n_blocks * 4 : n_blocks + (n_blocks + w->nested_block_size - 1) / w->nested_block_size * 4;
	}
	return bytes;
}

static int64_t
mlp_bytes(const MillmMlp *mlp)
{
	return matrix_bytes(&mlp->gate) + matrix_bytes(&mlp->up) + matrix_bytes(&mlp->down);
}

/* head_rows: of the head, that are read for a token; < 0: all. */
static int64_t
decode_bytes(const MillmModel *m, double head_rows)
{
	int64_t		bytes = head_rows < 0 ? matrix_bytes(&m->head) :
		matrix_bytes(&m->screen.codes) + m->screen.error.n * 4 + (int64_t) (head_rows * (double) millm_weight_bytes(m->head.dtype, m->head.n_in));

	for (int i = 0; i < m->config.n_layers; i++)
	{
		const MillmLayer *l = &m->layers[i];
		const MillmWeight *w[] = {&l->q, &l->k, &l->v, &l->qkv, &l->o, &l->gate, &l->up, &l->down};

		for (size_t k = 0; k < sizeof(w) / sizeof(w[0]); k++)
			bytes += matrix_bytes(w[k]);
		if (l->experts)
			bytes += matrix_bytes(&l->router) + m->config.n_chosen * mlp_bytes(&l->experts[0]) + mlp_bytes(&l->shared);
	}
	return bytes;
}

static MillmCode
open_run(Run *run)
{
	const MillmBench *b = run->bench;
	int64_t		positions = b->n_prompt > decoded_length(b) ? b->n_prompt : decoded_length(b);
	MillmForwardOptions options = {.device = b->device, .n_threads = b->n_threads, .kernels = b->kernels, .kv_format = b->kv_format, .full_head = b->full_head,
		.max_batch_tokens = b->n_sequences > b->n_batch ? b->n_sequences : b->n_batch,
		.max_logits = b->n_sequences, .max_sequences = b->n_sequences, .max_length = (int) positions};
	MillmKvLayout layout;
	int64_t		prompt_pages,
				decode_pages;
	MillmCode	rc;

	if (positions > run->model->config.max_context)
	{
		millm_fail(run->err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "too many tokens for the model");
		millm_detail(run->err, "There would be %" PRId64 "; it knows %d positions.", positions, run->model->config.max_context);
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	millm_forward_kv_layout(run->model, &layout);
	prompt_pages = millm_kv_pages(&layout, b->n_prompt, options.max_batch_tokens);	/* while the other sequences are empty */
	decode_pages = millm_kv_pages(&layout, (int) decoded_length(b), options.max_batch_tokens) * b->n_sequences;
	options.n_pages = prompt_pages > decode_pages ? prompt_pages : decode_pages;
	if ((rc = millm_forward_create(run->model, &options, &run->fw, run->err)) != MILLM_OK)
		return rc;
	run->max_batch = millm_forward_max_batch_tokens(run->fw);
	run->batch = calloc((size_t) run->max_batch, sizeof(*run->batch));
	run->sequences = calloc((size_t) b->n_sequences, sizeof(MillmSequence *));
	if (!run->batch || !run->sequences)
		return millm_fail(run->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (int i = 0; i < b->n_sequences; i++)
		if (!(run->sequences[i] = millm_sequence_create(run->fw, (int) positions)))
			return millm_fail(run->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	return MILLM_OK;
}

MillmCode
millm_bench_run(const MillmModel *model, const MillmBench *bench, MillmBenchResult *result, MillmError *err)
{
	Run			run = {.model = model, .bench = bench, .err = err};
	double		prefill_s[MILLM_BENCH_MAX_ROUNDS], decode_s[MILLM_BENCH_MAX_ROUNDS], decoding_s = 0;
	MillmCode	rc = open_run(&run);

	/* Once unmeasured: threads, caches, graphs and the clock wake up. */
	if (rc == MILLM_OK)
		rc = measure_prefill(&run, bench->n_prompt < 16 ? bench->n_prompt : 16, &prefill_s[0]);
	for (int i = 0; i < bench->n_rounds && rc == MILLM_OK; i++)
		rc = measure_prefill(&run, bench->n_prompt, &prefill_s[i]);
	if (rc == MILLM_OK)
		rc = measure_decode(&run, bench->n_gen < 4 ? bench->n_gen : 4, &decode_s[0]);
	run.counts = (MillmBackendCounts) {0};
	for (int i = 0; i < bench->n_rounds && rc == MILLM_OK; i++)
	{
		rc = measure_decode(&run, bench->n_gen, &decode_s[i]);
		decoding_s += decode_s[i];
	}
	if (rc == MILLM_OK)
	{
		MillmHeadUse use = millm_forward_head_use(run.fw);

		result->prefill_tps = bench->n_prompt / median(prefill_s, bench->n_rounds);
		result->decode_tps = (double) bench->n_gen * bench->n_sequences / median(decode_s, bench->n_rounds);
		result->head = use.n_screened > 0 ? "screened" : "full";
		result->head_rows = use.n_screened > 0 ? (double) use.n_read / (double) use.n_screened : 0;
		result->decode_bytes = decode_bytes(model, use.n_screened > 0 ? result->head_rows * bench->n_sequences : -1);
		snprintf(result->kernels, sizeof(result->kernels), "%s", millm_forward_kernels(run.fw));
		result->kv_dtype = millm_forward_kv_dtype(run.fw);
		result->n_threads = millm_forward_threads(run.fw);
		if ((result->is_counted = run.is_counted))
		{
			const double steps = (double) bench->n_rounds * bench->n_gen;

			result->kernels_a_step = (double) run.counts.n_kernels / steps;
			result->starts_a_step = (double) run.counts.n_starts / steps;
			result->waits_a_step = (double) run.counts.n_waits / steps;
			result->host_us_a_step = (decoding_s * 1e6 - (double) run.counts.wait_us) / steps;
		}
	}
	for (int i = 0; run.sequences && i < bench->n_sequences; i++)
		millm_sequence_free(run.sequences[i]);
	free(run.sequences);
	free(run.batch);
	millm_forward_free(run.fw);
	return rc;
}
