/* test_sampler.c -- order of the processors, ties, distributions, and what a choice may depend on. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "logprobs.h"
#include "request.h"
#include "sampler.h"

static const MillmSampling neutral = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 42};

#define N_DRAWS 20000

/* Relative frequencies of N_DRAWS draws at consecutive positions. */
static void
frequencies(MillmSampling o, const float *logits, int n, double *out)
{
	MillmSampler *s = millm_sampler_create(&o, n);
	MillmError	err;

	memset(out, 0, (size_t) n * sizeof(*out));
	for (int pos = 0; pos < N_DRAWS; pos++)
	{
		int32_t		id = -1;

		assert_int_equal(millm_sampler_choose(s, logits, NULL, pos, &id, &err), MILLM_OK);
		assert_true(id >= 0 && id < n);
		out[id] += 1.0 / N_DRAWS;
	}
	millm_sampler_free(s);
}

/* Which ids can be drawn at all, as a bit mask. */
static unsigned
support(MillmSampling o, const float *logits, int n)
{
	double		f[32];
	unsigned	mask = 0;

	frequencies(o, logits, n, f);
	for (int i = 0; i < n; i++)
		if (f[i] > 0)
			mask |= 1u << i;
	return mask;
}

static int32_t
greedy(MillmSampling o, const float *logits, int n, const int32_t *prompt, int n_prompt, const int32_t *made, int n_made)
{
	MillmSampler *s;
	MillmError	err;
	int32_t		id = -1;

	o.temperature = 0;
	s = millm_sampler_create(&o, n);
	millm_sampler_note_prompt(s, prompt, n_prompt);
	for (int i = 0; i < n_made; i++)
		millm_sampler_note_generated(s, made[i]);
	assert_int_equal(millm_sampler_choose(s, logits, NULL, 0, &id, &err), MILLM_OK);
	millm_sampler_free(s);
	return id;
}

static void
greedy_ties(void **state)
{
	float		logits[] = {1, 3, 3, -INFINITY, 3};

	(void) state;
	assert_int_equal(greedy(neutral, logits, 5, NULL, 0, NULL, 0), 1);
}

static void
softmax(void **state)
{
	float		logits[] = {0, 1, 2, -INFINITY, 0.5f};
	double		f[5];
	double		sum = 0;

	(void) state;
	frequencies(neutral, logits, 5, f);
	for (int i = 0; i < 5; i++)
		sum += exp(logits[i]);
	for (int i = 0; i < 5; i++)
		assert_true(fabs(f[i] - exp(logits[i]) / sum) < 0.02);	/* five standard deviations of N_DRAWS draws */

	MillmSampling hot = neutral;

	hot.temperature = 2;
	frequencies(hot, logits, 5, f);
	sum = 0;
	for (int i = 0; i < 5; i++)
		sum += exp(logits[i] / 2);
	for (int i = 0; i < 5; i++)
		assert_true(fabs(f[i] - exp(logits[i] / 2) / sum) < 0.02);
}

static void
top_k(void **state)
{
	float		logits[] = {1, 2, 2, 0, 3};
	MillmSampling o = neutral;

	(void) state;
	o.top_k = 1;
	assert_int_equal(support(o, logits, 5), 1u << 4);
	o.top_k = 2;				/* the tie at the threshold survives */
	assert_int_equal(support(o, logits, 5), 1u << 4 | 1u << 1 | 1u << 2);
	o.top_k = 4;
	assert_int_equal(support(o, logits, 5), 1u << 4 | 1u << 1 | 1u << 2 | 1u);
	o.top_k = 100;
	assert_int_equal(support(o, logits, 5), 31);
}

static void
top_p(void **state)
{
	/* probabilities 0.5, 0.25, 0.125, 0.125 */
	float		logits[] = {logf(0.125f), logf(0.5f), logf(0.25f), logf(0.125f)};
	MillmSampling o = neutral;

	(void) state;
	o.top_p = 0;
	assert_int_equal(support(o, logits, 4), 1u << 1);
	o.top_p = 0.4f;
	assert_int_equal(support(o, logits, 4), 1u << 1);
	o.top_p = 0.6f;
	assert_int_equal(support(o, logits, 4), 1u << 1 | 1u << 2);
	o.top_p = 0.8f;				/* of the two equal ones the lower id stays */
	assert_int_equal(support(o, logits, 4), 1u << 1 | 1u << 2 | 1u);
	o.top_p = 0.95f;
	assert_int_equal(support(o, logits, 4), 15);
	/* top_p counts what top_k has left: of 0.667 and 0.333, 0.6 needs one */
	o.top_k = 2;
	o.top_p = 0.6f;
	assert_int_equal(support(o, logits, 4), 1u << 1);
}

static void
min_p(void **state)
{
	float		logits[] = {logf(0.125f), logf(0.5f), logf(0.25f), logf(0.125f)};
	MillmSampling o = neutral;

	(void) state;
	o.min_p = 0.3f;
	assert_int_equal(support(o, logits, 4), 1u << 1 | 1u << 2);
	o.min_p = 1;
	assert_int_equal(support(o, logits, 4), 1u << 1);
	o.min_p = 0.2f;
	assert_int_equal(support(o, logits, 4), 15);
	o.top_p = 0.6f;
	assert_int_equal(support(o, logits, 4), 1u << 1 | 1u << 2);
}

static void
penalties(void **state)
{
	float		logits[] = {2, 3, -1, -1.5f};
	int32_t		prompt[] = {1, 1, 2, 1};
	int32_t		made[] = {0, 0, 0};
	MillmSampling o = neutral;

	(void) state;
	o.repetition_penalty = 2;		/* once per distinct id: 3 -> 1.5, not 0.375 */
	assert_int_equal(greedy(o, logits, 4, prompt, 4, NULL, 0), 0);
	assert_int_equal(greedy(o, logits, 4, prompt, 4, made, 3), 1);	/* 1 and 1.5 */
	/* a negative score is multiplied: -1 -> -2 < -1.5 */
	assert_int_equal(greedy(o, (float[]) {-9, -9, -1, -1.5f}, 4, prompt, 4, NULL, 0), 3);

	o = neutral;
	o.frequency_penalty = 0.5f;		/* generated tokens only: the prompt's do not count */
	assert_int_equal(greedy(o, logits, 4, prompt, 4, NULL, 0), 1);
	assert_int_equal(greedy(o, (float[]) {4.4f, 3, 0, 0}, 4, prompt, 4, made, 3), 1);	/* 4.4 - 1.5 */
	assert_int_equal(greedy(o, (float[]) {4.6f, 3, 0, 0}, 4, prompt, 4, made, 3), 0);
	o = neutral;
	o.presence_penalty = 0.5f;		/* once, however often */
	assert_int_equal(greedy(o, (float[]) {3.6f, 3, 0, 0}, 4, prompt, 4, made, 3), 0);
	assert_int_equal(greedy(o, (float[]) {3.4f, 3, 0, 0}, 4, prompt, 4, made, 3), 1);
}

/* Added first, to the logits: before a penalty, and to what was never met too. */
static void
biases(void **state)
{
	static const MillmLogitBias b[] = {{0, 1.5f}, {3, 2}};
	float		logits[] = {2, 3, -1, -1.5f};
	int32_t		ids[] = {0};
	double		f[4];
	MillmSampling o = neutral;
	MillmSampler *s;
	MillmTop	top;

	(void) state;
	o.bias = b;
	o.n_bias = 2;
	assert_int_equal(greedy(o, logits, 4, NULL, 0, NULL, 0), 0);		/* 3.5 and 3 */
	assert_int_equal(greedy(o, (float[]) {-9, -9, 0, -1.5f}, 4, NULL, 0, NULL, 0), 3);
	frequencies(o, (float[]) {-INFINITY, logf(2), -INFINITY, logf(2) - 2}, 4, f);
	assert_true(f[0] == 0 && f[2] == 0 && fabs(f[1] - 0.5) < 0.02);		/* what cannot be stays so */
	o.repetition_penalty = 2;
	assert_int_equal(greedy(o, logits, 4, ids, 1, NULL, 0), 1);			/* 3.5 / 2, and 3 */
	assert_int_equal(greedy(o, (float[]) {-1.2f, 0, 0, 0.4f}, 4, ids, 1, NULL, 0), 3);	/* 3's bias alone is no meeting: 2.4 */
	assert_int_equal(greedy(o, (float[]) {-1.6f, -0.15f, -9, -9}, 4, ids, 1, NULL, 0), 1);	/* -0.1 * 2 */
	o.repetition_penalty = 1;
	o.presence_penalty = 1;
	assert_int_equal(greedy(o, logits, 4, ids, 1, NULL, 0), 0);
	assert_int_equal(greedy(o, logits, 4, NULL, 0, ids, 1), 1);			/* 2.5 and 3 */

	/* the screening copy must leave them exact, met or not, each named once */
	o.temperature = 0;
	s = millm_sampler_create(&o, 4);
	millm_sampler_note_prompt(s, (int32_t[]) {3, 1}, 2);
	top = millm_sampler_needs(s, NULL, 0);
	assert_true(top.k == 1 && top.n_always == 3 && top.always[0] == 0 && top.always[1] == 3 && top.always[2] == 1);
	/* those of a draft are going to be penalized, and are named once, too */
	top = millm_sampler_needs(s, (int32_t[]) {2, 1, 2}, 3);
	assert_true(top.n_always == 4 && top.always[2] == 1 && top.always[3] == 2);
	assert_int_equal(millm_sampler_needs(s, NULL, 0).n_always, 3);
	millm_sampler_free(s);
	o.presence_penalty = 0;
	s = millm_sampler_create(&o, 4);
	assert_int_equal(millm_sampler_needs(s, (int32_t[]) {1, 2}, 2).n_always, 2);	/* the biased ones alone */
	millm_sampler_free(s);
}

static void
logprobs(void **state)
{
	float		logits[] = {1, 3, -INFINITY, 3, 0.5f};
	double		sum = 2 * exp(3) + exp(1) + exp(0.5);
	MillmLogprob p[1 + MILLM_MAX_TOP_LOGPROBS];
	int			order[] = {1, 3, 0, 4};

	(void) state;
	millm_logprobs(p, 0, logits, 5, 0);
	assert_true(p[0].id == 0 && fabs(p[0].logprob - (1 - log(sum))) < 1e-6);
	millm_logprobs(p, 1, logits, 5, 2);
	assert_true(p[0].logprob == -FLT_MAX && p[1].id == 1);		/* of equal ones the lower id */
	millm_logprobs(p, MILLM_MAX_TOP_LOGPROBS, logits, 5, 3);
	for (int i = 0; i < 4; i++)
		assert_true(p[1 + i].id == order[i] && fabs(p[1 + i].logprob - (logits[order[i]] - log(sum))) < 1e-6);
	for (int i = 4; i < MILLM_MAX_TOP_LOGPROBS; i++)
		assert_int_equal(p[1 + i].id, -1);
	/* one is certain; large logits */
	millm_logprobs(p, 2, (float[]) {-3e38f, 3e38f}, 2, 1);
	assert_true(p[0].logprob == 0 && p[1].id == 1 && p[2].id == 0 && p[2].logprob == -FLT_MAX);
}

/* The same (seed, choice, position) is the same draw, whatever was drawn before; another one is another. */
static void
pure_draws(void **state)
{
	double		sum = 0;
	int			same = 0;

	(void) state;
	for (int pos = 0; pos < 1000; pos++)
	{
		double		u = millm_random_uniform(1, 0, pos);

		assert_true(u >= 0 && u < 1);
		assert_true(u == millm_random_uniform(1, 0, pos));
		same += u == millm_random_uniform(2, 0, pos);
		same += u == millm_random_uniform(1, 1, pos);
		same += u == millm_random_uniform(1, 0, pos + 1);
		sum += u;
	}
	assert_int_equal(same, 0);
	assert_true(fabs(sum / 1000 - 0.5) < 0.05);

	/* limits that are off do not change the draw */
	float		logits[64];
	MillmError	err;
	MillmSampling o = neutral;
	MillmSampling p = neutral;
	MillmSampler *a;
	MillmSampler *b;

	for (int i = 0; i < 64; i++)
		logits[i] = (float) (i * 37 % 64) / 16;
	p.top_k = 64;
	p.top_p = 0.9999999f;
	a = millm_sampler_create(&o, 64);
	b = millm_sampler_create(&p, 64);
	for (int pos = 0; pos < 1000; pos++)
	{
		int32_t		x;
		int32_t		y;

		assert_int_equal(millm_sampler_choose(a, logits, NULL, pos, &x, &err), MILLM_OK);
		assert_int_equal(millm_sampler_choose(b, logits, NULL, pos, &y, &err), MILLM_OK);
		assert_int_equal(x, y);
	}
	millm_sampler_free(a);
	millm_sampler_free(b);
}

static void
damage(void **state)
{
	float		nan[] = {1, NAN, 2};
	float		inf[] = {1, INFINITY, 2};
	float		none[] = {-INFINITY, -INFINITY, -INFINITY};
	const float *rows[] = {nan, inf, none};

	(void) state;
	for (int t = 0; t < 2; t++)
		for (int i = 0; i < 3; i++)
		{
			MillmSampling o = neutral;
			MillmSampler *s;
			MillmError	err;
			int32_t		id;

			o.temperature = (float) t;
			s = millm_sampler_create(&o, 3);
			assert_int_equal(millm_sampler_choose(s, rows[i], NULL, 0, &id, &err), MILLM_E_INTERNAL);
			if (i < 2)
				assert_non_null(strstr(err.message, "token 1"));
			millm_sampler_free(s);
		}
}

static const MillmGenerationConfig silent = {.temperature = NAN, .top_k = -1, .top_p = NAN, .min_p = NAN, .repetition_penalty = NAN};

static void
precedence(void **state)
{
	MillmGenerateOptions o;
	MillmGenerationConfig c = silent;
	MillmSampling s;

	(void) state;
	millm_generate_options_init(&o);
	assert_int_equal(millm_generate_options_check(&o, NULL), MILLM_OK);
	millm_sampling_resolve(&o, &c, &s);		/* nobody says anything: greedy */
	assert_true(s.temperature == 0 && s.repetition_penalty == 1);
	c.do_sample = true;
	millm_sampling_resolve(&o, &c, &s);
	assert_true(s.temperature == 1 && s.top_k == 50 && s.top_p == 1 && s.min_p == 0);
	c.temperature = 0.6f;
	c.top_k = 20;
	c.top_p = 0.9f;
	c.repetition_penalty = 1.1f;
	millm_sampling_resolve(&o, &c, &s);
	assert_true(s.temperature == 0.6f && s.top_k == 20 && s.top_p == 0.9f && s.repetition_penalty == 1.1f);
	o.temperature = 0;			/* the call wins */
	millm_sampling_resolve(&o, &c, &s);
	assert_true(s.temperature == 0 && s.repetition_penalty == 1.1f);
	c = silent;
	o.temperature = 0.7;
	o.top_k = 0;
	millm_sampling_resolve(&o, &c, &s);		/* samples though do_sample is false */
	assert_true(s.temperature == 0.7f && s.top_k == 0 && s.top_p == 1);

	int64_t		first = s.seed;

	assert_true(first >= 0 && first < (int64_t) 1 << 53);
	millm_sampling_resolve(&o, &c, &s);
	assert_true(s.seed != first);
	o.has_seed = true;
	o.seed = -5;
	millm_sampling_resolve(&o, &c, &s);
	assert_true(s.seed == -5);
}

static void
ranges(void **state)
{
	MillmGenerateOptions o;
	MillmError	err;
	double	   *fields[] = {&o.temperature, &o.temperature, &o.temperature, &o.top_p, &o.top_p, &o.min_p, &o.repetition_penalty,
		&o.frequency_penalty, &o.presence_penalty};
	double		values[] = {-1, 1e-9, 1e9, -0.1, 1.1, 2, 0, 2.1, -2.1};
	const char *names[] = {"temperature", "temperature", "temperature", "top_p", "top_p", "min_p", "repetition_penalty",
		"frequency_penalty", "presence_penalty"};

	(void) state;
	for (int i = 0; i < 9; i++)
	{
		millm_generate_options_init(&o);
		*fields[i] = values[i];
		assert_int_equal(millm_generate_options_check(&o, &err), MILLM_E_INVALID_ARGUMENT);
		assert_non_null(strstr(err.message, names[i]));
		*fields[i] = INFINITY;
		assert_int_equal(millm_generate_options_check(&o, &err), MILLM_E_INVALID_ARGUMENT);
	}
	millm_generate_options_init(&o);
	o.stops[o.n_stops++] = "";
	assert_int_equal(millm_generate_options_check(&o, &err), MILLM_E_INVALID_ARGUMENT);
}

static void
max_tokens(void **state)
{
	MillmGenerateOptions o;
	MillmError	err;
	int			n;

	(void) state;
	millm_generate_options_init(&o);
	assert_int_equal(millm_max_tokens_resolve(&o, 10, 1000, &n, &err), MILLM_OK);
	assert_int_equal(n, 256);
	assert_int_equal(millm_max_tokens_resolve(&o, 900, 1000, &n, &err), MILLM_OK);
	assert_int_equal(n, 100);
	assert_int_equal(millm_max_tokens_resolve(&o, 999, 1000, &n, &err), MILLM_OK);
	assert_int_equal(n, 1);
	assert_int_equal(millm_max_tokens_resolve(&o, 1000, 1000, &n, &err), MILLM_E_CONTEXT_LENGTH_EXCEEDED);
	assert_non_null(strstr(err.detail, "1000 tokens"));
	assert_int_equal(millm_max_tokens_resolve(&o, 0, 1000, &n, &err), MILLM_E_INVALID_ARGUMENT);
	o.max_tokens = 101;
	assert_int_equal(millm_max_tokens_resolve(&o, 900, 1000, &n, &err), MILLM_E_CONTEXT_LENGTH_EXCEEDED);
	assert_non_null(strstr(err.detail, "900"));
	assert_non_null(strstr(err.detail, "1000"));
	o.max_tokens = 100;
	assert_int_equal(millm_max_tokens_resolve(&o, 900, 1000, &n, &err), MILLM_OK);
	assert_int_equal(n, 100);
}

/* What decides the choice; that the rest does not is test_screen.c's matter. */
static void
needs(void **state)
{
	static const int32_t ids[] = {3, 5, 3};
	struct
	{
		float		temperature;
		int			top_k;
		float		top_p, min_p;
		int			k;
		double		margin;
	}			cases[] = {
		{0, 0, 1, 0, 1, INFINITY}, {0, 40, 0.5f, 0.1f, 1, INFINITY},
		{1, 0, 1, 0, 0, 0}, {1, 0, 0.9f, 0, 0, 0}, {1, 0, 0.9f, 0.1f, 0, 0}, {1, 100, 0.9f, 0, 0, 0},
		{1, 40, 1, 0, 40, INFINITY}, {1, 40, 0.9f, 0, 40, INFINITY}, {1, 40, 0.9f, 0.1f, 40, INFINITY},
		{1, 0, 1, 0.1f, 100, 2.302585}, {2, 0, 1, 0.5f, 100, 1.386294}, {1, 40, 1, 0.1f, 40, 2.302585}, {1, 0, 1, 1, 100, 0},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		for (int penalty = 0; penalty < 2; penalty++)
		{
			MillmSampling o = {.temperature = cases[i].temperature, .top_k = cases[i].top_k, .top_p = cases[i].top_p,
				.min_p = cases[i].min_p, .repetition_penalty = penalty ? 1.1f : 1};
			MillmSampler *s = millm_sampler_create(&o, 100);
			MillmTop	top;

			millm_sampler_note_prompt(s, ids, 3);
			millm_sampler_note_generated(s, 7);
			top = millm_sampler_needs(s, NULL, 0);
			assert_int_equal(top.k, cases[i].k);
			if (top.k > 0)
			{
				assert_int_equal(top.n_always, penalty ? 3 : 0);
				if (isinf(cases[i].margin))
					assert_true(isinf(top.margin));
				else
					assert_true(top.margin > cases[i].margin && top.margin < cases[i].margin * 1.001 + 0.001);
			}
			millm_sampler_free(s);
		}
}

/* Of a list only what is in it is looked at, and the choice is that of the whole row: with equal ones, biases and penalties. */
static void
listed(void **state)
{
	enum {N = 700};
	static const MillmLogitBias bias[] = {{3, 1}, {50, -2}, {699, 2.5f}};
	static const int32_t prompt[] = {4, 90, 3, 699, 400};
	static const MillmSampling settings[] = {
		{.temperature = 0, .top_p = 1, .repetition_penalty = 1}, {.temperature = 1, .top_k = 20, .top_p = 1, .repetition_penalty = 1},
		{.temperature = 0.6f, .top_k = 20, .top_p = 0.9f, .repetition_penalty = 1.2f, .frequency_penalty = 0.5f},
		{.temperature = 3, .top_p = 1, .min_p = 0.2f, .repetition_penalty = 1}, {.temperature = 1, .top_k = 1000, .top_p = 0.9f, .repetition_penalty = 1},
	};
	int			n_long = 0;

	(void) state;
	for (int i = 0; i < 5 * 200 * 4; i++)
	{
		MillmSampling o = settings[i % 5];
		MillmListed all = {NULL, -1};
		MillmSampler *s;
		MillmTop	top;
		float		row[N],
					rest[N];
		int32_t		ids[N];
		MillmListed l = {ids, 0};
		MillmError	err;
		int32_t		a = -1,
					b = -2;

		o.bias = bias;
		o.n_bias = i % 4;
		s = millm_sampler_create(&o, N);
		millm_sampler_note_prompt(s, prompt, i % 7 == 0 ? 0 : 5);
		millm_sampler_note_generated(s, 90);
		for (int v = 0; v < N; v++)
			row[v] = roundf((float) millm_random_uniform(i, 1, v) * 100) / 8 - 4;
		top = millm_sampler_needs(s, NULL, 0);
		for (int v = 0; v < N; v++)
		{
			bool		is_in = i % 9 == 0 && v % 3 == 0;	/* more than what is needed */
			int			n_above = 0;
			float		largest = -INFINITY;

			for (int k = 0; k < top.n_always; k++)
				is_in |= top.always[k] == v;
			for (int u = 0; u < N; u++)
			{
				n_above += row[u] > row[v];
				largest = fmaxf(largest, row[u]);
			}
			/* penalties move some of those that are above; here as many as there are */
			is_in |= n_above < top.k + 8 && row[v] >= largest - 8 - top.margin;
			rest[v] = is_in ? row[v] : NAN;
			if (is_in)
				ids[l.n++] = v;
		}
		assert_true(top.k > 0 || i % 5 == 4);
		if (top.k == 0 || l.n > MILLM_MAX_LISTED)
		{
			n_long++;
			l = all;
			memcpy(rest, row, sizeof(rest));
		}
		for (int pos = 0; pos < 4; pos++)
		{
			assert_int_equal(millm_sampler_choose(s, row, NULL, pos, &a, &err), MILLM_OK);
			assert_int_equal(millm_sampler_choose(s, rest, &l, pos, &b, &err), MILLM_OK);
			assert_int_equal(b, a);
		}
		if (l.n > 0)
		{
			rest[ids[l.n / 2]] = NAN;
			assert_int_equal(millm_sampler_choose(s, rest, &l, 0, &a, &err), MILLM_E_INTERNAL);
			assert_non_null(strstr(err.message, "NaN"));
		}
		millm_sampler_free(s);
	}
	assert_true(n_long >= 800 && n_long < 2000);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(greedy_ties), cmocka_unit_test(softmax), cmocka_unit_test(top_k), cmocka_unit_test(top_p),
		cmocka_unit_test(min_p), cmocka_unit_test(penalties), cmocka_unit_test(pure_draws), cmocka_unit_test(damage),
		cmocka_unit_test(precedence), cmocka_unit_test(ranges), cmocka_unit_test(max_tokens),
		cmocka_unit_test(needs), cmocka_unit_test(listed), cmocka_unit_test(biases), cmocka_unit_test(logprobs),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
