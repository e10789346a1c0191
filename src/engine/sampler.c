/*
 * sampler.c -- from a row of logits to a token.
 *
 * The order and the rules for ties are those of transformers (reference/architectures.md 6):
 *
 *   logit bias           added
 *   repetition penalty   on each distinct id of prompt and output: score < 0 ? score * p : score / p
 *   frequency, presence  as OpenAI defines them, over generated tokens only:
 *                        score -= count * frequency + (count > 0) * presence
 *   temperature          score / t; 0 is greedy: the largest score, of equal ones the lowest id
 *   top_k                keeps every score >= the k-th largest, so ties survive
 *   top_p                from the smallest up, drops while the cumulative probability <= 1 - top_p; keeps at least one
 *   min_p                drops what is less probable than min_p * the most probable
 *   softmax, draw        weights in float32, sums in double; candidates in the order (score descending, id ascending)
 *
 * The most probable candidate is always kept, so min_p is decided by the ratio to it and needs no second softmax.
 * With top_p only as many candidates as survive are taken from a heap: the vocabulary is never sorted whole.
 */
#include "sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct Candidate
{
	float		score;
	int32_t		id;
} Candidate;

#define LANES MILLM_ABOVE_LANES	/* as vectors go */

/* In seen[]: the id occurs in the prompt; it has a bias; below them, the count of generated ones. */
#define IN_PROMPT	0x80000000u
#define BIASED		0x40000000u

struct MillmSampler
{
	MillmSampling options;
	int			n_vocab;
	bool		penalizes;
	uint32_t   *seen;				/* [n_vocab], only when it penalizes or has biases */
	int32_t    *distinct;			/* [n_vocab], ids whose seen[] is not 0: whose score is not the logit; behind them a draft's */
	int			n_distinct;
	float	   *scores;				/* [n_vocab], only when it penalizes or has biases */
	Candidate  *candidates;			/* [n_vocab], only when it samples */
};

MillmSampler *
millm_sampler_create(const MillmSampling *sampling, int n_vocab)
{
	MillmSampler *s = calloc(1, sizeof(*s));
	size_t		n = (size_t) n_vocab;
	bool		rescores;

	if (!s)
		return NULL;
	s->options = *sampling;
	s->n_vocab = n_vocab;
	s->penalizes = sampling->repetition_penalty != 1.0f || sampling->frequency_penalty != 0.0f ||
		sampling->presence_penalty != 0.0f;
	rescores = s->penalizes || sampling->n_bias > 0;
	if ((rescores && (!(s->seen = calloc(n, sizeof(*s->seen))) || !(s->distinct = malloc(n * sizeof(*s->distinct))) ||
					  !(s->scores = malloc(n * sizeof(*s->scores))))) ||
		(sampling->temperature > 0 && !(s->candidates = malloc(n * sizeof(*s->candidates)))))
	{
		millm_sampler_free(s);
		return NULL;
	}
	for (int i = 0; i < sampling->n_bias; i++)
	{
		s->seen[sampling->bias[i].id] = BIASED;
		s->distinct[s->n_distinct++] = sampling->bias[i].id;
	}
	return s;
}

void
millm_sampler_free(MillmSampler *s)
{
	if (!s)
		return;
	free(s->seen);
	free(s->distinct);
	free(s->scores);
	free(s->candidates);
	free(s);
}

static void
note(MillmSampler *s, int32_t id, bool generated)
{
	if (!s->penalizes || id < 0 || id >= s->n_vocab)
		return;
	if (s->seen[id] == 0)
		s->distinct[s->n_distinct++] = id;
	s->seen[id] = generated ? s->seen[id] + 1 : s->seen[id] | IN_PROMPT;
}

void
millm_sampler_note_prompt(MillmSampler *s, const int32_t *ids, int n)
{
	for (int i = 0; i < n; i++)
		note(s, ids[i], false);
}

void
millm_sampler_note_generated(MillmSampler *s, int32_t id)
{
	note(s, id, true);
}

static uint64_t
mix(uint64_t x)
{
	/* the finalizer of splitmix64 (Steele, Lea, Flood 2014) */
	x += 0x9E3779B97F4A7C15u;
	x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
	x = (x ^ x >> 27) * 0x94D049BB133111EBu;
	return x ^ x >> 31;
}

double
millm_random_uniform(int64_t seed, int choice, int position)
{
	uint64_t	x = mix(mix(mix((uint64_t) seed) ^ (uint64_t) (uint32_t) choice) ^ (uint64_t) (uint32_t) position);

	return (double) (x >> 11) * 0x1p-53;
}

/* The score of an id that may have been met. */
static float
penalized(const MillmSampler *s, int32_t id, float score)
{
	const MillmSampling *o = &s->options;
	const uint32_t count = s->seen[id] & ~(IN_PROMPT | BIASED);

	if (!(s->seen[id] & ~BIASED))
		return score;
	score = score < 0 ? score * o->repetition_penalty : score / o->repetition_penalty;
	if (count > 0)
		score -= (float) count * o->frequency_penalty + o->presence_penalty;
	return score;
}

/* Of all scores */
static void
rescore(const MillmSampler *s, float *scores)
{
	for (int i = 0; i < s->options.n_bias; i++)
		scores[s->options.bias[i].id] += s->options.bias[i].bias;
	for (int i = 0; i < s->n_distinct && s->penalizes; i++)
		scores[s->distinct[i]] = penalized(s, s->distinct[i], scores[s->distinct[i]]);
}

/* The same of those that are listed: of ids [n], ascending */
static void
rescore_listed(const MillmSampler *s, float *scores, const int32_t *ids, int n)
{
	for (int i = 0; i < s->options.n_bias; i++)
	{
		const MillmLogitBias *b = &s->options.bias[i];
		int			from = 0,
					to = n;		/* it is among these, if at all */

		while (to - from > 1)
		{
			const int	middle = from + (to - from) / 2;

			if (ids[middle] <= b->id)
				from = middle;
			else
				to = middle;
		}
		if (from < to && ids[from] == b->id)
			scores[from] += b->bias;
	}
	for (int i = 0; i < n && s->penalizes; i++)
		scores[i] = penalized(s, ids[i], scores[i]);
}

/* Does a stand before b in the order (score descending, id ascending)? */
static bool
before(Candidate a, Candidate b)
{
	return a.score > b.score || (a.score == b.score && a.id < b.id);
}

/* Restore the heap at i; its root stands before all others. */
static void
sift_down(Candidate *heap, int n, int i)
{
	Candidate	c = heap[i];

	for (;;)
	{
		int			child = 2 * i + 1;

		if (child >= n)
			break;
		if (child + 1 < n && before(heap[child + 1], heap[child]))
			child++;
		if (!before(heap[child], c))
			break;
		heap[i] = heap[child];
		i = child;
	}
	heap[i] = c;
}

static void
heapify(Candidate *heap, int n)
{
	for (int i = n / 2 - 1; i >= 0; i--)
		sift_down(heap, n, i);
}

/* Move the root behind the heap that is left; the order of what has been moved is that of candidates from the end. */
static void
pop(Candidate *heap, int n)
{
	Candidate	root = heap[0];

	heap[0] = heap[n - 1];
	heap[n - 1] = root;
	sift_down(heap, n - 1, 0);
}

/* The index of the largest of scores[0..n), n > 0, none NaN: the first of equal ones.  First the value, in vectors. */
static int32_t
argmax(const float *scores, int n)
{
	float		largest[LANES];
	int			i = 0;

	for (int l = 0; l < LANES; l++)
		largest[l] = scores[0];
	for (; i + LANES <= n; i += LANES)
		for (int l = 0; l < LANES; l++)
			largest[l] = scores[i + l] > largest[l] ? scores[i + l] : largest[l];
	for (; i < n; i++)
		largest[0] = scores[i] > largest[0] ? scores[i] : largest[0];
	for (int l = 1; l < LANES; l++)
		largest[0] = largest[l] > largest[0] ? largest[l] : largest[0];
	for (i = 0; scores[i] != largest[0];)
		i++;
	return i;
}

/* NaN and +infinity are damage; -infinity everywhere leaves no choice.  Of ids [n], NULL: 0, 1, ... */
static MillmCode
check_logits(const float *logits, const int32_t *ids, int n, MillmError *err)
{
	int			damaged = 0;
	int			any = 0;

	for (int i = 0; i < n; i++)
	{
		damaged |= !(logits[i] < INFINITY);
		any |= logits[i] > -INFINITY;
	}
	for (int i = 0; i < n && damaged; i++)
		if (!(logits[i] < INFINITY))
			return millm_fail(err, MILLM_E_INTERNAL, "the logit of token %d is %s", ids ? ids[i] : i, isnan(logits[i]) ? "NaN" : "infinite");
	if (!any)
		return millm_fail(err, MILLM_E_INTERNAL, "all logits are -infinity");
	return MILLM_OK;
}

/*
 * Make s->candidates a heap of those of scores / t [n] that top_k keeps, and min_p when it is decided without top_p; returns how many.  Their ids are those of scores.  The
 * heap depends on nothing else: not on what the others are, and so not on whether they are known.
 */
static int
gather(MillmSampler *s, const float *scores, int n_scores)
{
	const MillmSampling *o = &s->options;
	Candidate  *c = s->candidates;
	float		threshold = -INFINITY;
	float		above = -INFINITY;	/* nothing up to here reaches the threshold, divided */
	float		max = -INFINITY;
	int			n = 0;
	int			n_kept = 0;

	/* The heap of millm_kth_largest() lies in the candidates' memory, which is not yet used. */
	if (o->top_k > 0 && o->top_k < n_scores)
	{
		const float kth = millm_kth_largest(scores, n_scores, o->top_k, (float *) c);

		threshold = kth / o->temperature;	/* the k-th largest of what is divided: division keeps the order, but may make equal what was not */
		if (kth > -INFINITY)
			above = kth - (fabsf(kth) * 0x1p-20f + FLT_MIN);
	}
	for (int from = 0; from < n_scores; from += LANES)
	{
		const int	to = n_scores - from < LANES ? n_scores : from + LANES;

		if (!millm_any_above(scores + from, to - from, above))
			continue;
		for (int i = from; i < to; i++)
		{
			const float score = scores[i] / o->temperature;

			if (score >= threshold && score != -INFINITY)
			{
				c[n++] = (Candidate) {score, i};
				max = score > max ? score : max;
			}
		}
	}
	if (o->min_p > 0 && o->top_p >= 1)
	{
		for (int i = 0; i < n; i++)
			if (expf(c[i].score - max) >= o->min_p)
				c[n_kept++] = c[i];
		n = n_kept;
	}
	heapify(c, n);
	return n;
}

/* Draw from the heap of n candidates; top_p < 1 drops some of them, and then min_p.  u is uniform in [0, 1). */
static int32_t
draw(Candidate *c, int n, float top_p, float min_p, double u)
{
	float		max = c[0].score;
	double		total = 0;		/* weight of all */
	double		sum;			/* weight of those that stay */
	double		walked = 0;
	int			popped = 0;
	int			kept = n;

	for (int i = 0; i < n; i++)
		total += expf(c[i].score - max);
	sum = total;
	if (top_p < 1)
	{
		/* The cumulative probability from the smallest up to this one is 1 - sum / total. */
		for (sum = 0, kept = 0; kept < n && (kept == 0 || sum / total < top_p); kept++)
		{
			float		weight = expf(c[0].score - max);

			if (weight < min_p)
				break;
			sum += weight;
			pop(c, n - kept);
		}
		popped = kept;
	}
	for (int i = 0; i < kept; i++)
	{
		if (i == popped)
			pop(c, n - popped++);
		walked += expf(c[n - 1 - i].score - max);
		if (walked > u * sum)
			return c[n - 1 - i].id;
	}
	return c[n - kept].id;		/* rounding left a crumb: the last */
}

/* Behind the distinct ids, those of the draft that will be penalized besides; returns how many ids there are then. */
static int
add_draft(MillmSampler *s, const int32_t *draft, int n_draft)
{
	int			n = s->n_distinct;

	for (int i = 0; i < n_draft && s->penalizes; i++)
	{
		bool		is_there = s->seen[draft[i]] != 0;

		for (int k = s->n_distinct; k < n; k++)
			is_there |= s->distinct[k] == draft[i];
		if (!is_there)
			s->distinct[n++] = draft[i];
	}
	return n;
}

MillmTop
millm_sampler_needs(MillmSampler *s, const int32_t *draft, int n_draft)
{
	const MillmSampling *o = &s->options;
	MillmTop	top = {.k = s->n_vocab, .margin = INFINITY, .always = s->distinct, .n_always = add_draft(s, draft, n_draft)};
	float		t = o->temperature;

	if (t == 0)
		top.k = 1;
	else
	{
		if (o->top_k > 0 && o->top_k < s->n_vocab)
			top.k = o->top_k;
		/* logits this far below the largest have a weight below min_p: with what expf() and this line round */
		if (o->min_p > 0 && o->top_p >= 1)
			top.margin = t * (-logf(o->min_p) * (1 + 0x1p-16f) + 0x1p-16f);
		if (top.k == s->n_vocab && top.margin == INFINITY)
			top.k = 0;			/* the sum of all weights decides */
	}
	return top;
}

MillmCode
millm_sampler_choose(MillmSampler *s, const float *logits, const MillmListed *listed, int position, int32_t *out, MillmError *err)
{
	const MillmSampling *o = &s->options;
	const int32_t *ids = listed && listed->n >= 0 ? listed->ids : NULL;
	const int	n = ids ? listed->n : s->n_vocab;
	float		of_listed[MILLM_MAX_LISTED];
	const float *scores = logits;
	int32_t		at;
	MillmCode	rc;

	if (ids)
	{
		for (int i = 0; i < n; i++)
			of_listed[i] = logits[ids[i]];
		scores = of_listed;
	}
	rc = check_logits(scores, ids, n, err);
	if (rc != MILLM_OK)
		return rc;
	if (s->scores && ids)
		rescore_listed(s, of_listed, ids, n);
	else if (s->scores)
	{
		rescore(s, memcpy(s->scores, logits, (size_t) n * sizeof(*logits)));
		scores = s->scores;
	}
	at = o->temperature == 0 ? argmax(scores, n) :
		draw(s->candidates, gather(s, scores, n), o->top_p, o->min_p, millm_random_uniform(o->seed, o->choice, position));
	*out = ids ? ids[at] : at;
	return MILLM_OK;
}
