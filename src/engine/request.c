/*
 * request.c -- the options of a generation: ranges, precedence, defaults.  Pure functions.
 */
#include "request.h"

#include <math.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

/* The field's defaults for sampling (reference/architectures.md 6). */
#define DEFAULT_TOP_K 50

void
millm_generate_options_init(MillmGenerateOptions *options)
{
	*options = (MillmGenerateOptions) {
		.max_tokens = -1, .temperature = NAN, .top_k = -1, .top_p = NAN, .min_p = NAN,
		.repetition_penalty = NAN, .frequency_penalty = NAN, .presence_penalty = NAN, .n = 1, .top_logprobs = -1,
	};
}

static MillmCode
out_of_range(MillmError *err, const char *name, double value, const char *range)
{
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "%s is out of range", name);
	millm_detail(err, "It is %g; it must be %s.", value, range);
	return MILLM_E_INVALID_ARGUMENT;
}

MillmCode
millm_generate_options_check(const MillmGenerateOptions *o, MillmError *err)
{
	if (o->max_tokens != -1 && (o->max_tokens < 1 || o->max_tokens > INT32_MAX))
		return out_of_range(err, "max_tokens", (double) o->max_tokens, "at least 1");
	if (!isnan(o->temperature) && o->temperature != 0 &&
		!(o->temperature >= MILLM_MIN_TEMPERATURE && o->temperature <= MILLM_MAX_TEMPERATURE))
		return out_of_range(err, "temperature", o->temperature, "0 (greedy) or between 0.00001 and 100");
	if (o->top_k != -1 && (o->top_k < 0 || o->top_k > MILLM_MAX_TOP_K))
		return out_of_range(err, "top_k", (double) o->top_k, "0 (off) or the number of candidates to keep");
	if (!isnan(o->top_p) && !(o->top_p >= 0 && o->top_p <= 1))
		return out_of_range(err, "top_p", o->top_p, "between 0 and 1");
	if (!isnan(o->min_p) && !(o->min_p >= 0 && o->min_p <= 1))
		return out_of_range(err, "min_p", o->min_p, "between 0 and 1");
	if (!isnan(o->repetition_penalty) && !(o->repetition_penalty >= 0.01 && o->repetition_penalty <= 100))
		return out_of_range(err, "repetition_penalty", o->repetition_penalty, "between 0.01 and 100");
	if (!isnan(o->frequency_penalty) && !(o->frequency_penalty >= -2 && o->frequency_penalty <= 2))
		return out_of_range(err, "frequency_penalty", o->frequency_penalty, "between -2 and 2");
	if (!isnan(o->presence_penalty) && !(o->presence_penalty >= -2 && o->presence_penalty <= 2))
		return out_of_range(err, "presence_penalty", o->presence_penalty, "between -2 and 2");
	if (o->n < 1 || o->n > MILLM_MAX_CHOICES)
		return out_of_range(err, "n", (double) o->n, "between 1 and 128");
	if (o->top_logprobs != -1 && !o->logprobs)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "top_logprobs needs logprobs");
	if (o->top_logprobs < -1 || o->top_logprobs > MILLM_MAX_TOP_LOGPROBS)
		return out_of_range(err, "top_logprobs", (double) o->top_logprobs, "between 0 and 20");
	for (int i = 0; i < o->n_logit_bias; i++)
		if (!(fabsf(o->logit_bias[i].bias) <= MILLM_MAX_LOGIT_BIAS))
			return out_of_range(err, "a bias of logit_bias", o->logit_bias[i].bias, "between -100 and 100");
	if (o->n_stops > MILLM_MAX_STOPS)
		return out_of_range(err, "number of stop sequences", o->n_stops, "at most 16");
	for (int i = 0; i < o->n_stops; i++)
	{
		size_t		len = strlen(o->stops[i]);

		if (len < 1 || len > MILLM_MAX_STOP_BYTES)
			return out_of_range(err, "length of a stop sequence", (double) len, "between 1 and 1024 bytes");
	}
	return MILLM_OK;
}

/* The first of the call, the config and the default that says something. */
static float
pick(double call, float config, float fallback)
{
	if (!isnan(call))
		return (float) call;
	return isnan(config) ? fallback : config;
}

static int64_t
random_seed(void)
{
	uint64_t	x;

	/* Blocks only before the kernel's pool is ready, at boot; cannot be interrupted for 8 bytes. */
	if (getrandom(&x, sizeof(x), 0) != sizeof(x))
	{
		struct timespec ts;

		clock_gettime(CLOCK_REALTIME, &ts);
		x = (uint64_t) ts.tv_sec * 1000000007u ^ (uint64_t) ts.tv_nsec;
	}
	return (int64_t) (x >> 11);
}

void
millm_sampling_resolve(const MillmGenerateOptions *o, const MillmGenerationConfig *config, MillmSampling *out)
{
	float		temperature = pick(NAN, config->temperature, 1.0f);

	if (!isnan(o->temperature))
		temperature = (float) o->temperature;
	else if (!config->do_sample)
		temperature = 0;
	*out = (MillmSampling) {
		.temperature = temperature,
		.top_k = (int) (o->top_k >= 0 ? o->top_k : config->top_k >= 0 ? config->top_k : DEFAULT_TOP_K),
		.top_p = pick(o->top_p, config->top_p, 1.0f),
		.min_p = pick(o->min_p, config->min_p, 0.0f),
		.repetition_penalty = pick(o->repetition_penalty, config->repetition_penalty, 1.0f),
		.frequency_penalty = pick(o->frequency_penalty, NAN, 0.0f),
		.presence_penalty = pick(o->presence_penalty, NAN, 0.0f),
		.seed = o->has_seed ? o->seed : random_seed(),
		.bias = o->logit_bias,
		.n_bias = o->n_logit_bias,
	};
}

MillmCode
millm_max_tokens_resolve(const MillmGenerateOptions *o, int64_t n_prompt, int64_t context_length, int *out, MillmError *err)
{
	int64_t		left = context_length - n_prompt;

	if (n_prompt == 0)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "prompt is empty");
		millm_hint(err, "This model's tokenizer adds nothing of its own; give at least one character.");
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (left < 1)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "prompt does not fit the context");
		millm_detail(err, "The prompt has %lld tokens; the context holds %lld, and at least one must be left to generate.",
					 (long long) n_prompt, (long long) context_length);
		millm_hint(err, "Shorten the prompt, or load the model with a larger context length.");
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	if (o->max_tokens > left)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "max_tokens does not fit the context");
		millm_detail(err, "The prompt has %lld tokens and max_tokens is %lld; the context holds %lld.",
					 (long long) n_prompt, (long long) o->max_tokens, (long long) context_length);
		millm_hint(err, "Ask for at most %lld tokens, or load the model with a larger context length.", (long long) left);
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	if (o->max_tokens > 0)
		*out = (int) o->max_tokens;
	else
		*out = (int) (left < MILLM_DEFAULT_MAX_TOKENS ? left : MILLM_DEFAULT_MAX_TOKENS);
	return MILLM_OK;
}
