/*
 * screen_driver.c -- the screening copy of an LM head, driven from Python.
 *
 *     screen_driver make DIR STEP          write the copy of DIR's head into DIR, pushed STEP bytes at a time
 *     screen_driver compare DIR IDS        run the ids (a file of int32) through the model, in texts of 512; at each position compute
 *                                          all logits, and what the copy says of them; print one JSON object of counts
 *
 * compare exits with 1 when a logit lies outside of its bound, or when a sampler that sees the shortlist alone chooses otherwise.
 * The hidden states are read out of the forward pass by an identity matrix in place of the head.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "forward.h"
#include "kernel.h"
#include "sampler.h"
#include "screen.h"

#define TEXT		512
#define STEP		256
#define MAX_SHARE	16			/* as in backend_cpu.c */

static MillmError err;

static int
failed(void)
{
	fprintf(stderr, "%s: %s. %s\n", millm_code_name(err.code), err.message, err.detail);
	return 1;
}

static void *
allocate(size_t n)
{
	void	   *p = calloc(n ? n : 1, 1);

	if (!p)
		exit(2);
	return p;
}

static int
make(const char *dir, size_t step)
{
	char		path[4096];
	MillmModel *m;
	MillmScreenEncoder *enc;
	FILE	   *f;
	int8_t	   *codes;
	const char *bytes;
	const void *part;
	size_t		total;
	size_t		n;
	bool		ok;

	snprintf(path, sizeof(path), "%s/%s", dir, MILLM_SCREEN_FILE);
	remove(path);
	if (millm_model_open(dir, &m, &err) != MILLM_OK ||
		millm_screen_begin(m->head.dtype, m->head.n_out, m->head.n_in, &enc, &err) != MILLM_OK)
		return failed();
	total = (size_t) millm_weight_bytes(m->head.dtype, m->head.n_out * m->head.n_in);
	bytes = m->head.data;
	codes = allocate(step + (size_t) m->head.n_in);
	part = millm_screen_header(enc, &n);
	ok = (f = fopen(path, "w")) && fwrite(part, 1, n, f) == n;
	for (size_t at = 0; at < total && ok; at += step)
	{
		size_t		k = total - at < step ? total - at : step;
		size_t		n_codes = millm_screen_push_writes(enc, k);

		if (millm_screen_push(enc, bytes + at, k, codes, &err) != MILLM_OK)
			return failed();
		ok = fwrite(codes, 1, n_codes, f) == n_codes;
	}
	if (millm_screen_finish(enc, &part, &n, &err) != MILLM_OK)
		return failed();
	ok = ok && fwrite(part, 1, n, f) == n && ftell(f) == millm_screen_file_bytes(m->head.n_out, m->head.n_in);
	if (!ok || fclose(f) != 0)
	{
		perror(path);
		return 2;
	}
	free(codes);
	millm_screen_free(enc);
	millm_model_close(m);
	return 0;
}

/* ---- compare ---- */

typedef struct Setting
{
	const char *name;
	MillmSampling sampling;
} Setting;

static const MillmLogitBias biases[] = {{28, -100}, {30, 3}, {198, -0.5f}, {7042, 12}};

static const Setting settings[] = {
	{"greedy", {.temperature = 0, .top_p = 1, .repetition_penalty = 1}},
	{"top_k 50", {.temperature = 1, .top_k = 50, .top_p = 1, .repetition_penalty = 1}},
	{"top_k 20, top_p 0.8, penalty 1.05", {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f, .repetition_penalty = 1.05f}},
	{"min_p 0.05", {.temperature = 1, .top_p = 1, .min_p = 0.05f, .repetition_penalty = 1}},
	{"greedy, biases", {.temperature = 0, .top_p = 1, .repetition_penalty = 1, .bias = biases, .n_bias = 4}},
	{"top_k 20, penalty 1.05, biases", {.temperature = 1, .top_k = 20, .top_p = 1, .repetition_penalty = 1.05f, .bias = biases, .n_bias = 4}},
};
#define N_SETTINGS ((int) (sizeof(settings) / sizeof(settings[0])))

typedef struct Comparison
{
	MillmModel *model;
	MillmWeight head;			/* the model's own */
	MillmKernels k;
	int			n_vocab;
	float	   *z;				/* [STEP, vocab] */
	float	   *y;				/* [STEP, vocab] */
	float	   *ends,			/* [vocab], as what follows */
			   *lower, *heap, *few;
	int32_t    *ids;
	int64_t		n_positions;
	int64_t		n_out_of_bound;
	double		max_use;		/* largest |z - y| / e */
	int64_t		n_full[N_SETTINGS];	/* positions without a shortlist */
	int64_t		n_ids[N_SETTINGS];	/* rows of the others */
	int64_t		n_differ[N_SETTINGS];
} Comparison;

static float
norm_above(const float *x, int64_t n)
{
	double		sum = 0;

	for (int64_t i = 0; i < n; i++)
		sum += (double) x[i] * x[i];
	return nextafterf((float) (sqrt(sum) * (1 + 0x1p-30)), INFINITY);
}

static void
compare_row(Comparison *c, const float *h, const float *z, const float *y, MillmSampler **samplers)
{
	const float *error = c->model->screen.error.data;
	float		norm = norm_above(h, c->head.n_in);

	for (int v = 0; v < c->n_vocab; v++)
	{
		double		e = (double) error[v] * norm + (double) MILLM_SCREEN_TINY;
		double		use = fabs((double) z[v] - (double) y[v]) / e;

		c->n_out_of_bound += !(use <= 1);
		c->max_use = use > c->max_use ? use : c->max_use;
	}
	for (int s = 0; s < N_SETTINGS; s++)
	{
		MillmTop	top = millm_sampler_needs(samplers[s], NULL, 0);
		int32_t		all,
					few;
		int			n;

		memcpy(c->ends, y, sizeof(float) * (size_t) c->n_vocab);
		n = millm_shortlist(c->ids, c->n_vocab / MAX_SHARE, c->ends, error, c->n_vocab, norm, &top, c->lower, c->heap);
		if (n < 0)
		{
			c->n_full[s]++;
			continue;
		}
		c->n_ids[s] += n;
		for (int v = 0; v < c->n_vocab; v++)
			c->few[v] = -INFINITY;
		for (int i = 0; i < n; i++)
			c->few[c->ids[i]] = z[c->ids[i]];
		if (millm_sampler_choose(samplers[s], z, NULL, (int) c->n_positions, &all, &err) != MILLM_OK ||
			millm_sampler_choose(samplers[s], c->few, NULL, (int) c->n_positions, &few, &err) != MILLM_OK || all != few)
			c->n_differ[s]++;
	}
	c->n_positions++;
}

/* The rows of h through the head and through its copy. */
static void
compare_rows(Comparison *c, const float *h, int64_t h_stride, int n, MillmSampler **samplers, const int32_t *tokens)
{
	const MillmWeight *w[] = {&c->head, &c->model->screen.codes};
	float	   *to[] = {c->z, c->y};

	for (int i = 0; i < 2; i++)
	{
		MillmMatmul m = {.y = to[i], .y_stride = c->n_vocab, .w = w[i], .form = MILLM_FORM_F32, .x = h, .x_stride = h_stride * 4, .n_tokens = n};

		for (int64_t o = 0; o < c->n_vocab; o += 64)	/* of which the weights stay in the cache */
			c->k.matmul[MILLM_FORM_F32][w[i]->dtype][0] (&m, o, o + 64 < c->n_vocab ? o + 64 : c->n_vocab);
	}
	for (int t = 0; t < n; t++)
	{
		for (int s = 0; s < N_SETTINGS; s++)
			millm_sampler_note_generated(samplers[s], tokens[t]);
		compare_row(c, h + t * h_stride, c->z + (int64_t) t * c->n_vocab, c->y + (int64_t) t * c->n_vocab, samplers);
	}
}

static int
compare(const char *dir, const char *path)
{
	Comparison	c = {0};
	MillmForwardOptions options = {.n_threads = 1, .max_batch_tokens = STEP, .n_pages = TEXT / MILLM_KV_PAGE_TOKENS + 1, .full_head = true};
	MillmForward *fw;
	MillmSequence *seq;
	FILE	   *f = fopen(path, "r");
	int32_t		tokens[TEXT];
	float	   *identity;
	size_t		hidden;
	size_t		n;
	bool		bad;

	if (!f || millm_model_open(dir, &c.model, &err) != MILLM_OK)
		return failed();
	if (!c.model->screen.codes.data)
	{
		fprintf(stderr, "there is no copy of the head: %s\n", c.model->screen_refused);
		return 1;
	}
	millm_kernels_init(&c.k, getenv("MILLM_KERNELS"), &bad);
	c.head = c.model->head;
	c.n_vocab = (int) c.head.n_out;
	hidden = (size_t) c.head.n_in;
	identity = allocate(hidden * hidden * sizeof(float));
	for (size_t i = 0; i < hidden; i++)
		identity[i * hidden + i] = 1;
	c.model->head = (MillmWeight) {.dtype = MILLM_F32, .n_out = c.head.n_in, .n_in = c.head.n_in, .stride = c.head.n_in, .data = identity};
	c.z = allocate(sizeof(float) * STEP * (size_t) c.n_vocab);
	c.y = allocate(sizeof(float) * STEP * (size_t) c.n_vocab);
	c.ends = allocate(sizeof(float) * (size_t) c.n_vocab);
	c.lower = allocate(sizeof(float) * (size_t) c.n_vocab);
	c.heap = allocate(sizeof(float) * (size_t) c.n_vocab);
	c.few = allocate(sizeof(float) * (size_t) c.n_vocab);
	c.ids = allocate(sizeof(int32_t) * (size_t) c.n_vocab);
	if (millm_forward_create(c.model, &options, &fw, &err) != MILLM_OK)
		return failed();
	while ((n = fread(tokens, sizeof(tokens[0]), TEXT, f)) > 0)
	{
		MillmSampler *samplers[N_SETTINGS];

		for (int s = 0; s < N_SETTINGS; s++)
			if (!(samplers[s] = millm_sampler_create(&settings[s].sampling, c.n_vocab)))
				return 2;
		if (!(seq = millm_sequence_create(fw, (int) n)) || !millm_sequence_reserve(seq, (int) n))
			return 2;
		for (int at = 0, k; at < (int) n; at += k)
		{
			MillmBatchToken batch[STEP];
			const float *h;

			k = (int) n - at < STEP ? (int) n - at : STEP;
			for (int i = 0; i < k; i++)
				batch[i] = (MillmBatchToken) {.seq = seq, .position = at + i, .token = tokens[at + i], .want_logits = true};
			if (millm_forward_step(fw, batch, k, NULL, NULL, &h, &err) != MILLM_OK)
				return failed();
			compare_rows(&c, h, c.n_vocab, k, samplers, tokens + at);
		}
		millm_sequence_free(seq);
		for (int s = 0; s < N_SETTINGS; s++)
			millm_sampler_free(samplers[s]);
	}
	printf("{\"positions\": %" PRId64 ", \"vocab\": %d, \"out_of_bound\": %" PRId64 ", \"max_use\": %.4f, \"settings\": {", c.n_positions, c.n_vocab,
		   c.n_out_of_bound, c.max_use);
	bad = c.n_out_of_bound > 0;
	for (int s = 0; s < N_SETTINGS; s++)
	{
		printf("%s\"%s\": {\"differ\": %" PRId64 ", \"full\": %" PRId64 ", \"rows\": %.1f}", s ? ", " : "", settings[s].name, c.n_differ[s],
			   c.n_full[s], (double) c.n_ids[s] / (double) (c.n_positions - c.n_full[s]));
		bad |= c.n_differ[s] > 0;
	}
	printf("}}\n");
	return bad;
}

int
main(int argc, char **argv)
{
	if (argc == 4 && strcmp(argv[1], "make") == 0)
		return make(argv[2], (size_t) strtoull(argv[3], NULL, 10));
	if (argc == 4 && strcmp(argv[1], "compare") == 0)
		return compare(argv[2], argv[3]);
	fprintf(stderr, "usage: screen_driver make DIR STEP | compare DIR IDS\n");
	return 2;
}
