/*
 * generation.c -- generation_config.json: the sampling that the model's authors recommend.
 *
 * Repositories older than that file keep the same keys in config.json.
 *
 * Keys that are honoured fill MillmGenerationConfig.  A key that would change the output, is set to something
 * else than its neutral value and is not honoured, is listed in `ignored`, for a warning at load.
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "config.h"

static void
ignore(MillmGenerationConfig *g, const char *key)
{
	if (g->n_ignored < (int) (sizeof(g->ignored) / sizeof(g->ignored[0])))
		millm_format(g->ignored[g->n_ignored], sizeof(g->ignored[0]), "%s", key);
	g->n_ignored++;
}

static MillmCode
bad(MillmError *err, const char *file, const char *key, const char *expected)
{
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid value of \"%s\" in %s", key, file);
	millm_detail(err, "Expected %s.", expected);
	return MILLM_E_INVALID_MODEL_FILE;
}

/* null, false, nothing in it, or the number that does nothing */
static bool
is_neutral(json_t *v, double neutral)
{
	return !v || json_is_null(v) || json_is_false(v) || (json_is_number(v) && json_number_value(v) == neutral) ||
		(json_is_array(v) && json_array_size(v) == 0) || (json_is_object(v) && json_object_size(v) == 0);
}

static MillmCode
get_number(json_t *json, const char *file, const char *key, double min, double max, const char *expected, float *out, MillmError *err)
{
	json_t	   *v = json_object_get(json, key);

	if (!v || json_is_null(v))
		return MILLM_OK;
	if (!json_is_number(v) || !(json_number_value(v) >= min && json_number_value(v) <= max))
		return bad(err, file, key, expected);
	*out = (float) json_number_value(v);
	return MILLM_OK;
}

MillmCode
millm_generation_resolve(json_t *json, const char *file, MillmGenerationConfig *g, MillmConfig *config, MillmError *err)
{
	/* key and the value that does nothing */
	static const struct
	{
		const char *key;
		double		neutral;
	}			numbers[] = {
		{"min_length", 0}, {"min_new_tokens", 0}, {"typical_p", 1}, {"no_repeat_ngram_size", 0}, {"encoder_no_repeat_ngram_size", 0}, {"num_beams", 1},
		{"epsilon_cutoff", 0}, {"eta_cutoff", 0}, {"guidance_scale", 1}, {"penalty_alpha", 0}, {"num_beam_groups", 1}, {"diversity_penalty", 0},
	};
	static const char *const others[] = {
		"suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias", "stop_strings",
		"forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "constraints", "watermarking_config",
		"renormalize_logits", "token_healing", "dola_layers",
	};
	json_t	   *v;
	MillmCode	rc;

	if (!json_is_object(json))
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "%s is not a JSON object", file);
	v = json_object_get(json, "do_sample");
	if (v && !json_is_null(v) && !json_is_boolean(v))
		return bad(err, file, "do_sample", "true or false");
	g->do_sample = json_is_true(v);
	if ((rc = get_number(json, file, "temperature", 0, 100, "a number from 0 to 100", &g->temperature, err)) != MILLM_OK ||
		(rc = get_number(json, file, "top_p", 0, 1, "a number from 0 to 1", &g->top_p, err)) != MILLM_OK ||
		(rc = get_number(json, file, "min_p", 0, 1, "a number from 0 to 1", &g->min_p, err)) != MILLM_OK ||
		(rc = get_number(json, file, "repetition_penalty", 1e-3, 100, "a number from 0.001 to 100", &g->repetition_penalty, err)) != MILLM_OK)
		return rc;
	v = json_object_get(json, "top_k");
	if (v && !json_is_null(v))
	{
		if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT_MAX)
			return bad(err, file, "top_k", "an integer of at least 0");
		g->top_k = (int) json_integer_value(v);
	}
	v = json_object_get(json, "eos_token_id");
	if (v && !json_is_null(v) && (rc = millm_config_eos(v, file, config, err)) != MILLM_OK)
		return rc;
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
		if (!is_neutral(json_object_get(json, numbers[i].key), numbers[i].neutral))
			ignore(g, numbers[i].key);
	for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
		if (!is_neutral(json_object_get(json, others[i]), NAN))
			ignore(g, others[i]);
	return MILLM_OK;
}
