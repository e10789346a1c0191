/*
 * bench.h -- how fast a model runs: prefill of one prompt, then decoding of several sequences side by side.
 */
#ifndef MILLM_BENCH_H
#define MILLM_BENCH_H

#include <stdbool.h>

#include "error.h"
#include "forward.h"
#include "model.h"

#define MILLM_BENCH_MAX_ROUNDS 1000

typedef struct MillmBench
{
	const MillmDevice *device;	/* as in MillmForwardOptions */
	int			n_prompt;
	int			n_batch;		/* tokens of it that a step takes */
	int			n_context;		/* tokens that each sequence has before those, computed unmeasured */
	int			n_gen;			/* tokens of each sequence */
	int			n_sequences;
	int			n_rounds;		/* at most MILLM_BENCH_MAX_ROUNDS; once more, before, unmeasured */
	int			n_threads;		/* 0: one per CPU */
	const char *kernels;		/* the same */
	MillmKvFormat kv_format;	/* the same */
	bool		full_head;		/* the same */
} MillmBench;

/* Medians of the rounds. */
typedef struct MillmBenchResult
{
	double		prefill_tps;	/* tokens per second; logits of the last token only */
	double		decode_tps;		/* of all sequences together, each from n_context on, each with the logits of a greedy choice */
	int64_t		decode_bytes;	/* bytes of weights that a decoding step reads, on average */
	const char *head;			/* what it reads of the LM head: "full", or "screened" */
	double		head_rows;		/* rows of the head that a screened row of logits reads, on average; 0: none was screened */
	char		kernels[16];
	const char *kv_dtype;		/* millm_forward_kv_dtype() */
	int			n_threads;
	/* Means of the decoding steps, from a backend that queues work on a device (MillmBackendCounts) */
	bool		is_counted;
	double		kernels_a_step;
	double		starts_a_step;
	double		waits_a_step;
	double		host_us_a_step;	/* not spent waiting for the device */
} MillmBenchResult;

/* Errors are millm_forward_create()'s, CONTEXT_LENGTH_EXCEEDED, INSUFFICIENT_MEMORY. */
extern MillmCode millm_bench_run(const MillmModel *model, const MillmBench *bench, MillmBenchResult *result, MillmError *err);

#endif
