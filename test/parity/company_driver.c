/*
 * company_driver.c -- do the bits of a row of logits depend on its company?  Driven from Python.
 *
 *     company_driver DIR VARIANT N LONGEST deterministic|fast|int8 (deterministic, with a KV cache of that)
 *
 * VARIANT is one of the CPU's kernels, or cuda:DIRECTORY for a GPU through the module that lies there.
 *
 * N sequences of 1 to LONGEST tokens are computed one by one, each in one chunk, on two threads.  Then again: by one and by three threads; 1, 3, 16 ... N at a
 * time in ragged steps, in which random chunks of some of them stand in random order; as forks of a sequence that has the
 * beginning already; and as hits in the prefix cache.  Prints one JSON object: how many rows were compared for each, and how many had other bits.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "forward.h"
#include "kv.h"

#define STEP 256

typedef struct Count
{
	int64_t		n_rows;
	int64_t		n_other;
} Count;

static MillmModel *model;
static MillmError err;
static int	vocab;
static int	longest;
static int	n_sequences;
static float **alone;			/* [n_sequences] of [length_of(s), vocab] */
static uint64_t seed = 1;

static void
must(MillmCode rc)
{
	if (rc == MILLM_OK)
		return;
	fprintf(stderr, "%s: %s. %s\n", millm_code_name(rc), err.message, err.detail);
	exit(1);
}

static void *
allocate(size_t n)
{
	void	   *p = calloc(n, 1);

	if (!p)
		exit(2);
	return p;
}

static int
below(int n)
{
	seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
	return (int) ((seed >> 33) % (uint64_t) n);
}

static int
length_of(int s)
{
	return s == 0 ? longest : 1 + (s * 13 + 5) % longest;
}

static int32_t
token_of(int s, int position)
{
	return (int32_t) (((int64_t) s * 7919 + (int64_t) position * (position + 104729)) % vocab);
}

static MillmKvFormat kv_format;

static MillmForward *
open_forward(const char *variant, bool deterministic, int n_threads, bool prefix_cache)
{
	static MillmDevice device;
	MillmKvLayout layout;
	MillmForwardOptions options = {.n_threads = n_threads, .max_batch_tokens = STEP, .deterministic = deterministic, .kernels = variant, .kv_format = kv_format,
		.max_sequences = n_sequences + 2, .max_length = longest, .prefix_cache = prefix_cache};
	MillmForward *fw;

	if (strncmp(variant, "cuda:", 5) == 0)
	{
		must(millm_device_choose(&(MillmDeviceWish) {.what = MILLM_DEVICE_CUDA}, variant + 5, &device, &err));
		options.device = &device;
		options.kernels = NULL;
	}
	millm_forward_kv_layout(model, &layout);
	options.n_pages = (n_sequences + 2) * millm_kv_pages(&layout, longest, STEP);
	must(millm_forward_create(model, &options, &fw, &err));
	return fw;
}

/* The next k tokens of sequence s, at the end of the batch. */
static int
append(MillmBatchToken *batch, int n, MillmSequence *seq, int s, int k)
{
	int			from = millm_sequence_length(seq);

	if (!millm_sequence_reserve(seq, from + k))
		exit(2);
	for (int i = 0; i < k; i++)
		batch[n++] = (MillmBatchToken) {.seq = seq, .position = from + i, .token = token_of(s, from + i), .want_logits = true};
	return n;
}

static const float *
step(MillmForward *fw, const MillmBatchToken *batch, int n)
{
	const float *logits;

	must(millm_forward_step(fw, batch, n, NULL, NULL, &logits, &err));
	return logits;
}

/* Rows of sequence s from a position on, as they are now */
static void
compare(Count *count, const float *rows, int s, int from, int n)
{
	for (int i = 0; i < n; i++)
	{
		count->n_rows++;
		count->n_other += memcmp(rows + (int64_t) i * vocab, alone[s] + (int64_t) (from + i) * vocab, sizeof(float) * (size_t) vocab) != 0;
	}
}

static void
compute_alone(MillmForward *fw)
{
	for (int s = 0; s < n_sequences; s++)
	{
		MillmSequence *seq = millm_sequence_create(fw, longest);
		MillmBatchToken batch[STEP];
		size_t		bytes = sizeof(float) * (size_t) length_of(s) * (size_t) vocab;

		alone[s] = allocate(bytes);
		memcpy(alone[s], step(fw, batch, append(batch, 0, seq, s, length_of(s))), bytes);
		millm_sequence_free(seq);
	}
}

static Count
on_threads(const char *variant, bool deterministic, int n_threads)
{
	MillmForward *fw = open_forward(variant, deterministic, n_threads, false);
	Count		count = {0};

	for (int s = 0; s < n_sequences; s++)
	{
		MillmSequence *seq = millm_sequence_create(fw, longest);
		MillmBatchToken batch[STEP];

		compare(&count, step(fw, batch, append(batch, 0, seq, s, length_of(s))), s, 0, length_of(s));
		millm_sequence_free(seq);
	}
	millm_forward_free(fw);
	return count;
}

/* The first n sequences at a time */
static Count
in_company(MillmForward *fw, int n)
{
	MillmSequence **seqs = allocate(sizeof(*seqs) * (size_t) n);
	int			n_left = n;
	Count		count = {0};

	for (int s = 0; s < n; s++)
		seqs[s] = millm_sequence_create(fw, longest);
	while (n_left > 0)
	{
		MillmBatchToken batch[STEP];
		struct {int s, from, n;} parts[STEP];
		int			n_parts = 0,
					n_batch = 0,
					first = below(n);
		const float *rows;

		for (int i = 0; i < n && n_batch < STEP; i++)
		{
			int			s = (first + i) % n,
						at = millm_sequence_length(seqs[s]),
						k = 1 + below(below(3) == 0 ? 40 : 3);

			k = k < length_of(s) - at ? k : length_of(s) - at;
			k = k < STEP - n_batch ? k : STEP - n_batch;
			if (k == 0 || (n > 1 && below(4) == 0))
				continue;
			n_batch = append(batch, n_batch, seqs[s], s, k);
			parts[n_parts].s = s;
			parts[n_parts].from = at;
			parts[n_parts++].n = k;
			n_left -= at + k == length_of(s);
		}
		if (n_batch == 0)
			continue;
		rows = step(fw, batch, n_batch);
		for (int i = 0; i < n_parts; rows += (int64_t) parts[i++].n * vocab)
			compare(&count, rows, parts[i].s, parts[i].from, parts[i].n);
	}
	for (int s = 0; s < n; s++)
		millm_sequence_free(seqs[s]);
	free(seqs);
	return count;
}

/* Sequence 0 from each position on, by a fork of one that has what comes before, and by the original after it */
static Count
as_forks(MillmForward *fw)
{
	Count		count = {0};

	for (int past = 1; past < longest; past += past < 14 || past > 18 ? 5 : 1)
	{
		MillmSequence *original = millm_sequence_create(fw, longest);
		MillmSequence *fork;
		MillmBatchToken batch[STEP];

		step(fw, batch, append(batch, 0, original, 0, past));
		fork = millm_sequence_fork(original);
		compare(&count, step(fw, batch, append(batch, 0, fork, 0, longest - past)), 0, past, longest - past);
		compare(&count, step(fw, batch, append(batch, 0, original, 0, longest - past)), 0, past, longest - past);
		millm_sequence_free(original);
		millm_sequence_free(fork);
	}
	return count;
}

/*
 * Sequence 0 leaves its text in the prefix cache.  Who begins with 16, 32 ... of its tokens goes on from there, in a step with another that says something
 * else after them: what both share is as it was for those that come later.
 */
static Count
as_hits(const char *variant, bool deterministic)
{
	MillmForward *fw = open_forward(variant, deterministic, 2, true);
	MillmSequence *original = millm_sequence_create(fw, longest);
	MillmBatchToken batch[2 * STEP];
	int32_t    *tokens = allocate(sizeof(*tokens) * (size_t) longest);
	Count		count = {0};

	for (int i = 0; i < longest; i++)
		tokens[i] = token_of(0, i);
	if (millm_sequence_share(original, tokens, longest) != 0)
		exit(2);
	step(fw, batch, append(batch, 0, original, 0, longest));
	for (int past = MILLM_KV_PAGE_TOKENS; past < longest; past += MILLM_KV_PAGE_TOKENS)
	{
		MillmSequence *hit = millm_sequence_create(fw, longest);
		MillmSequence *other = millm_sequence_create(fw, longest);
		int			n;

		if (millm_sequence_share(hit, tokens, past) != past || millm_sequence_share(other, tokens, past) != past)
			exit(2);
		n = append(batch, 0, hit, 0, longest - past);
		compare(&count, step(fw, batch, append(batch, n, other, 1, longest - past)), 0, past, longest - past);
		must(millm_forward_check(fw, &err));
		millm_sequence_free(hit);
		millm_sequence_free(other);
	}
	millm_sequence_free(original);
	millm_forward_free(fw);
	free(tokens);
	return count;
}

static void
print(const char *name, Count count, const char *end)
{
	printf("\"%s\": [%lld, %lld]%s", name, (long long) count.n_rows, (long long) count.n_other, end);
}

int
main(int argc, char **argv)
{
	MillmForward *fw;
	bool		deterministic;

	if (argc != 6)
		return 2;
	must(millm_model_open(argv[1], &model, &err));
	vocab = model->config.vocab_size;
	n_sequences = atoi(argv[3]);
	longest = atoi(argv[4]);
	kv_format = strcmp(argv[5], "int8") == 0 ? MILLM_KV_INT8 : MILLM_KV_AUTO;
	deterministic = strcmp(argv[5], "fast") != 0;
	if (n_sequences < 1 || longest < 1 || longest > STEP / 2)
		return 2;
	alone = allocate(sizeof(*alone) * (size_t) n_sequences);
	fw = open_forward(argv[2], deterministic, 2, false);
	compute_alone(fw);
	printf("{");
	print("1 thread", on_threads(argv[2], deterministic, 1), ", ");
	print("3 threads", on_threads(argv[2], deterministic, 3), ", ");
	for (int i = 0; i < 4; i++)
	{
		static const int sizes[] = {1, 3, 16, 64};
		char		name[32];

		snprintf(name, sizeof(name), "%d at a time", sizes[i]);
		if (sizes[i] <= n_sequences)
			print(name, in_company(fw, sizes[i]), ", ");
	}
	if (longest > MILLM_KV_PAGE_TOKENS)
		print("hits", as_hits(argv[2], deterministic), ", ");
	print("forks", as_forks(fw), "}\n");
	millm_forward_free(fw);
	for (int s = 0; s < n_sequences; s++)
		free(alone[s]);
	free(alone);
	millm_model_close(model);
	return 0;
}
