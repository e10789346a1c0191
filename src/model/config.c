/*
 * config.c -- config.json, as transformers 4.x and 5.x write it, resolved to the numbers that the engine runs on.
 *
 * Each key: the value in the file, then an alias, then the family's class default; JSON null means absent.
 * A number outside of what any model could have is refused with the figure; a flag that would change the
 * result and that this engine does not implement is refused by name.
 */
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "config.h"
#include "half.h"
#include "shown.h"

#define MIN_ROPE_THETA 2.0	/* its logarithm divides */

/* The value of a key, or NULL when it is absent or null. */
static json_t *
get(json_t *object, const char *key)
{
	json_t	   *v = json_object_get(object, key);

	return json_is_null(v) ? NULL : v;
}

/* value may be NULL: absent. */
static MillmCode
bad_value_of(MillmError *err, const char *file, const char *key, json_t *value, const char *expected)
{
	char	   *text = json_is_array(value) || json_is_object(value) ? NULL : json_dumps(value, JSON_ENCODE_ANY);

	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid value of \"%s\" in %s", key, file);
	millm_detail(err, "It is %s; expected %s.",
				 !value ? "absent" : json_is_array(value) ? "a list" : json_is_object(value) ? "an object" : text ? shown(text).text : "unprintable",
				 expected);
	free(text);
	return MILLM_E_INVALID_MODEL_FILE;
}

static MillmCode
bad_value(MillmError *err, const char *key, json_t *value, const char *expected)
{
	return bad_value_of(err, "config.json", key, value, expected);
}

/* An integer under one of its spellings.  Absent: *out stays; min..max are inclusive. */
static MillmCode
get_int(json_t *c, const MillmKeys keys, int min, int max, int *out, MillmError *err)
{
	for (int i = 0; i < 4 && keys[i]; i++)
	{
		json_t	   *v = get(c, keys[i]);
		char		expected[80];

		if (!v)
			continue;
		if (!json_is_integer(v) || json_integer_value(v) < min || json_integer_value(v) > max)
		{
			snprintf(expected, sizeof(expected), "an integer from %d to %d", min, max);
			return bad_value(err, keys[i], v, expected);
		}
		*out = (int) json_integer_value(v);
		return MILLM_OK;
	}
	return MILLM_OK;
}

static MillmCode
get_double(json_t *c, const char *key, double min, double max, double *out, MillmError *err)
{
	json_t	   *v = get(c, key);
	char		expected[80];

	if (!v)
		return MILLM_OK;
	if (!json_is_number(v) || !(json_number_value(v) >= min && json_number_value(v) <= max))
	{
		snprintf(expected, sizeof(expected), "a number from %g to %g", min, max);
		return bad_value(err, key, v, expected);
	}
	*out = json_number_value(v);
	return MILLM_OK;
}

/* A number under one of its spellings; without a list of these, under key. */
static MillmCode
get_double_of(json_t *c, const MillmKeys keys, const char *key, double min, double max, double *out, MillmError *err)
{
	for (int i = 0; i < 4 && keys[i]; i++)
	{
		key = keys[i];
		if (get(c, key))
			break;
	}
	return get_double(c, key, min, max, out, err);
}

static MillmCode
get_bool(json_t *c, const char *key, bool *out, MillmError *err)
{
	json_t	   *v = get(c, key);

	if (!v)
		return MILLM_OK;
	if (!json_is_boolean(v))
		return bad_value(err, key, v, "true or false");
	*out = json_is_true(v);
	return MILLM_OK;
}

static MillmCode
get_when(json_t *c, MillmWhen when, bool *out, MillmError *err)
{
	*out = when.by_default;
	return when.key ? get_bool(c, when.key, out, err) : MILLM_OK;
}

/* A softcap: absent, the default; null or a row without the key, none (0). */
static MillmCode
get_softcap(json_t *c, const char *key, double by_default, float *out, MillmError *err)
{
	double		cap = key && !json_is_null(json_object_get(c, key)) ? by_default : 0;
	MillmCode	rc = key ? get_double(c, key, 1e-3, 1e6, &cap, err) : MILLM_OK;

	*out = (float) cap;
	return rc;
}

/* A factor under a key that a row may not have. */
static MillmCode
get_scale(json_t *c, const char *key, double by_default, float *out, MillmError *err)
{
	double		scale = by_default;
	MillmCode	rc = key ? get_double(c, key, 1e-6, 1e6, &scale, err) : MILLM_OK;

	*out = (float) scale;
	return rc;
}

static MillmCode
unsupported_flag(MillmError *err, const char *model_type, const char *key, const char *value)
{
	millm_fail(err, MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"%s\": %s is not supported for model type \"%s\"", key, shown(value).text, model_type);
	millm_hint(err, "This engine would compute something else than the model's authors meant; it refuses instead.");
	return MILLM_E_UNSUPPORTED_ARCHITECTURE;
}

static MillmCode
parse_act(const char *key, const char *name, const MillmConfig *c, MillmAct *out, MillmError *err)
{
	static const struct
	{
		const char *name;
		MillmAct	act;
	}			acts[] = {
		{"silu", MILLM_ACT_SILU}, {"swish", MILLM_ACT_SILU}, {"gelu", MILLM_ACT_GELU_ERF}, {"gelu_python", MILLM_ACT_GELU_ERF},
		{"gelu_new", MILLM_ACT_GELU_TANH}, {"gelu_fast", MILLM_ACT_GELU_TANH}, {"gelu_pytorch_tanh", MILLM_ACT_GELU_TANH}, {"relu", MILLM_ACT_RELU},
	};

	for (size_t i = 0; i < sizeof(acts) / sizeof(acts[0]); i++)
		if (strcmp(acts[i].name, name) == 0)
		{
			*out = acts[i].act;
			return MILLM_OK;
		}
	return unsupported_flag(err, c->model_type, key, name);
}

/* The r / 2 frequencies of a theta, each divided by its own factor; factors may be NULL. */
static void
frequencies(double theta, const float *factors, int r, float *out)
{
	for (int j = 0; j < r / 2; j++)
		out[j] = (float) (1.0 / ((factors ? factors[j] : 1) * pow(theta, 2.0 * j / r)));
}

const float *
millm_rope_frequencies(const MillmRope *rope, int rotary_dim, int length, float *computed)
{
	double		stretch;

	if (rope->long_above == 0 || length <= rope->long_above)
		return rope->inv_freq;
	if (rope->long_inv_freq)
		return rope->long_inv_freq;
	stretch = rope->factor * length / rope->long_above - (rope->factor - 1);
	frequencies(rope->theta * pow(stretch, rotary_dim / (rotary_dim - 2.0)), NULL, rotary_dim, computed);
	return computed;
}

int
millm_rope_kind(const MillmRope *rope, int length)
{
	return rope->long_above == 0 || length <= rope->long_above ? 0 : rope->long_inv_freq ? 1 : length;
}

/* The list of n factors, each a divisor, under a key of rope_scaling. */
static MillmCode
get_factors(json_t *scaling, const char *key, int n, float *out, MillmError *err)
{
	json_t	   *list = get(scaling, key), *v;
	size_t		i;
	char		expected[80];

	snprintf(expected, sizeof(expected), "a list of %d numbers from 0.001 to 1e+06", n);
	if (!json_is_array(list) || json_array_size(list) != (size_t) n)
		return bad_value(err, key, list, expected);
	json_array_foreach(list, i, v)
	{
		if (!json_is_number(v) || !(json_number_value(v) >= 1e-3 && json_number_value(v) <= 1e6))
			return bad_value(err, key, v, expected);
		out[i] = (float) json_number_value(v);
	}
	return MILLM_OK;
}

/*
 * The rope_type "longrope": a factor for each frequency, of short sequences and of those of more than the original number of positions.  That
 * number beside rope_scaling, or the family's, counts before one inside, and then what it is stretched by is no longer the object's to say.
 */
static MillmCode
resolve_longrope(json_t *json, json_t *scaling, double theta, double factor, double attention_factor, const MillmArch *arch, MillmConfig *c,
				 MillmRope *rope, MillmError *err)
{
	const MillmKeys original_key = {"original_max_position_embeddings"};
	const int	r = c->rotary_dim;
	int			original = arch->default_original_positions, inside = 0;
	float		factors[MILLM_MAX_HEAD_DIM / 2];
	double		stretch;
	MillmCode	rc;

	if ((rc = get_int(json, original_key, 2, MILLM_MAX_POSITIONS, &original, err)) != MILLM_OK ||
		(rc = get_int(scaling, original_key, 2, MILLM_MAX_POSITIONS, &inside, err)) != MILLM_OK)
		return rc;
	rope->long_above = original ? original : inside ? inside : c->max_positions;
	if (rope->long_above < 2)	/* its logarithm divides */
		return bad_value(err, arch->max_positions[0], get(json, arch->max_positions[0]), "at least 2, for rope_type \"longrope\"");
	stretch = !original && !isnan(factor) ? factor : (double) c->max_positions / rope->long_above;
	if (isnan(attention_factor))
		attention_factor = stretch <= 1 ? 1 : sqrt(1 + log(stretch) / log(rope->long_above));
	rope->attention_factor = (float) attention_factor;
	if ((rc = get_factors(scaling, "short_factor", r / 2, factors, err)) != MILLM_OK)
		return rc;
	frequencies(theta, factors, r, rope->inv_freq);
	if ((rc = get_factors(scaling, "long_factor", r / 2, factors, err)) != MILLM_OK)
		return rc;
	if (!(rope->long_inv_freq = calloc((size_t) r / 2, sizeof(float))))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	frequencies(theta, factors, r, rope->long_inv_freq);
	return MILLM_OK;
}

/* Rope scaling lets positions up to so many be asked for, too. */
static void
allow_context(MillmConfig *c, double positions)
{
	if (positions > c->max_context)
		c->max_context = positions < MILLM_MAX_POSITIONS ? (int) positions : MILLM_MAX_POSITIONS;
}

/*
 * The rotary frequencies, [r/2], and the attention factor, by an object of parameters, or NULL for the default ones, whose theta and
 * part of the head, unless it names them, are those given.  Formulas: transformers' modeling_rope_utils.py; the exponent's denominator is
 * r, the number of dims that rotate, which all of a model's ropes share.
 */
static MillmCode
resolve_one_rope(json_t *json, json_t *scaling, double theta, double partial, const MillmArch *arch, MillmConfig *c, MillmRope *rope, MillmError *err)
{
	const char *type = "default";
	double		factor = NAN, attention_factor = NAN;
	double		low = NAN, high = NAN, fast = 32.0, slow = 1.0, mscale = 0.0, mscale_all = 0.0;
	int			original = c->max_positions, r;
	bool		truncate = true;
	MillmCode	rc;

	if (scaling)
	{
		json_t	   *t = get(scaling, "rope_type");

		if (!t)
			t = get(scaling, "type");
		if (t)
		{
			if (!json_is_string(t))
				return bad_value(err, "rope_type", t, "a string");
			type = json_string_value(t);
			if (arch->yarn_is_longrope && (strcmp(type, "yarn") == 0 || strcmp(type, "su") == 0))
				type = "longrope";
		}
		if ((rc = get_double(scaling, "rope_theta", MIN_ROPE_THETA, 1e12, &theta, err)) != MILLM_OK ||
			(rc = get_double(scaling, "partial_rotary_factor", 0.01, 1.0, &partial, err)) != MILLM_OK ||
			(rc = get_double(scaling, "factor", 1.0, 1e6, &factor, err)) != MILLM_OK ||
			(rc = get_double(scaling, "attention_factor", 0.0, 1e3, &attention_factor, err)) != MILLM_OK ||
			(rc = get_double(scaling, "low_freq_factor", 1e-3, 1e6, &low, err)) != MILLM_OK ||
			(rc = get_double(scaling, "high_freq_factor", 1e-3, 1e6, &high, err)) != MILLM_OK ||
			(rc = get_double(scaling, "beta_fast", 1e-3, 1e6, &fast, err)) != MILLM_OK ||
			(rc = get_double(scaling, "beta_slow", 1e-3, 1e6, &slow, err)) != MILLM_OK ||
			(rc = get_double(scaling, "mscale", 0.0, 1e3, &mscale, err)) != MILLM_OK ||
			(rc = get_double(scaling, "mscale_all_dim", 0.0, 1e3, &mscale_all, err)) != MILLM_OK ||
			(rc = get_bool(scaling, "truncate", &truncate, err)) != MILLM_OK ||
			(rc = get_int(scaling, (const MillmKeys) {"original_max_position_embeddings"}, 1, MILLM_MAX_POSITIONS, &original, err)) != MILLM_OK)
			return rc;
	}

	r = (int) (c->head_dim * partial);
	if (r < 2 || r % 2 != 0)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid rotary dimension in config.json");
		millm_detail(err, "partial_rotary_factor %g of head_dim %d gives %d; expected an even number of at least 2.", partial, c->head_dim, r);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (c->rotary_dim && c->rotary_dim != r)
		return unsupported_flag(err, c->model_type, "partial_rotary_factor", "one for each of the layer_types");
	c->rotary_dim = r;
	rope->attention_factor = 1.0f;
	rope->inv_freq = calloc((size_t) r / 2, sizeof(float));
	if (!rope->inv_freq)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	frequencies(theta, NULL, r, rope->inv_freq);

	if (strcmp(type, "default") == 0)
		return MILLM_OK;
	if (strcmp(type, "longrope") == 0)
		return resolve_longrope(json, scaling, theta, factor, attention_factor, arch, c, rope, err);
	if (strcmp(type, "dynamic") == 0)
	{
		if (isnan(factor))
			return bad_value(err, "factor", NULL, "a number, for rope_type \"dynamic\"");
		if (r < 4)
			return unsupported_flag(err, c->model_type, "rope_type", "dynamic, of two dimensions,");
		rope->long_above = c->max_positions;
		rope->theta = theta;
		rope->factor = factor;
		allow_context(c, factor * c->max_positions);
		return MILLM_OK;
	}
	if (strcmp(type, "linear") == 0)
	{
		if (isnan(factor))
			return bad_value(err, "factor", NULL, "a number, for rope_type \"linear\"");
		for (int j = 0; j < r / 2; j++)
			rope->inv_freq[j] = (float) (rope->inv_freq[j] / factor);
		return MILLM_OK;
	}
	if (strcmp(type, "llama3") == 0)
	{
		if (isnan(factor))
			return bad_value(err, "factor", NULL, "a number, for rope_type \"llama3\"");
		if (isnan(low))
			return bad_value(err, "low_freq_factor", NULL, "a number, for rope_type \"llama3\"");
		if (!(high > low))
			return bad_value(err, "high_freq_factor", get(scaling, "high_freq_factor"), "more than low_freq_factor");
		for (int j = 0; j < r / 2; j++)
		{
			double		base = rope->inv_freq[j];
			double		wavelength = 2 * M_PI / base;
			double		smooth = (original / wavelength - low) / (high - low);

			if (wavelength > original / low)
				rope->inv_freq[j] = (float) (base / factor);
			else if (wavelength >= original / high)
				rope->inv_freq[j] = (float) ((1 - smooth) * base / factor + smooth * base);
		}
		return MILLM_OK;
	}
	if (strcmp(type, "yarn") == 0)
	{
		double		lo, hi;

		if (fast <= slow)
			return bad_value(err, "beta_fast", get(scaling, "beta_fast"), "more than beta_slow");
		if (isnan(factor))
			factor = (double) c->max_positions / original;
		if (factor < 1)
			return bad_value(err, "original_max_position_embeddings", get(scaling, "original_max_position_embeddings"),
							 "at most max_position_embeddings, for rope_type \"yarn\" without a factor");
		allow_context(c, factor * original);
		lo = r * log(original / (fast * 2 * M_PI)) / (2 * log(theta));
		hi = r * log(original / (slow * 2 * M_PI)) / (2 * log(theta));

		if (truncate)
		{
			lo = floor(lo);
			hi = ceil(hi);
		}
		lo = fmax(lo, 0);
		hi = fmin(hi, r - 1);
		if (lo == hi)
			hi += 0.001;
		for (int j = 0; j < r / 2; j++)
		{
			double		ramp = fmin(fmax((j - lo) / (hi - lo), 0), 1);
			double		base = rope->inv_freq[j];

			rope->inv_freq[j] = (float) (base * (1 - ramp) + base / factor * ramp);
		}
#define YARN_SCALE(s, m) ((s) <= 1 ? 1.0 : 0.1 * (m) * log(s) + 1.0)
		if (isnan(attention_factor))
			attention_factor = mscale != 0 && mscale_all != 0 ? YARN_SCALE(factor, mscale) / YARN_SCALE(factor, mscale_all)
				: YARN_SCALE(factor, 1.0);
#undef YARN_SCALE
		rope->attention_factor = (float) attention_factor;
		return MILLM_OK;
	}
	return unsupported_flag(err, c->model_type, "rope_type", type);
}

/*
 * transformers 4 has rope_theta, rope_scaling and, of the layers that slide, a theta of their own; 5 has rope_parameters, which hold an
 * object for each of the layer_types where these differ.
 */
static MillmCode
resolve_rope(json_t *json, const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	json_t	   *scaling = get(json, "rope_scaling"), *local = NULL, *value;	/* what transformers 4 wrote wins, as it does in 5 */
	const char *spelling = "rope_scaling", *key;
	double		theta = arch->default_rope_theta, local_theta = arch->default_local_theta,
				partial = arch->default_rotary_part > 0 ? arch->default_rotary_part : 1.0;
	bool		is_nested = false;
	MillmCode	rc;

	if (!scaling || (json_is_object(scaling) && json_object_size(scaling) == 0))
		scaling = get(json, spelling = "rope_parameters");
	if ((scaling && !json_is_object(scaling)) || (!scaling && arch->rope_is_scaled))
		return bad_value(err, spelling, scaling, "an object");
	json_object_foreach(scaling, key, value)
		if (json_is_object(value))
		{
			if (!arch->local_theta_key || (strcmp(key, "full_attention") != 0 && strcmp(key, "sliding_attention") != 0))
				return unsupported_flag(err, c->model_type, spelling, key);
			is_nested = true;
		}
	if ((rc = get_double_of(json, arch->rope_theta, "rope_theta", MIN_ROPE_THETA, 1e12, &theta, err)) != MILLM_OK ||
		(rc = get_double_of(json, arch->rotary_part, "partial_rotary_factor", 0.01, 1.0, &partial, err)) != MILLM_OK)
		return rc;
	if (is_nested)
	{
		local = get(scaling, "sliding_attention");
		scaling = get(scaling, "full_attention");
		if ((scaling && !json_is_object(scaling)) || (local && !json_is_object(local)))
			return bad_value(err, spelling, get(json, spelling), "an object for each of the layer_types");
	}
	if ((rc = resolve_one_rope(json, scaling, theta, partial, arch, c, &c->rope, err)) != MILLM_OK || !arch->local_theta_key)
		return rc;
	if ((rc = get_double(json, arch->local_theta_key, MIN_ROPE_THETA, 1e12, &local_theta, err)) != MILLM_OK)
		return rc;
	return resolve_one_rope(json, local, local_theta, partial, arch, c, &c->local_rope, err);
}

/* Token ids that config.json and generation_config.json give as an int or a list. */
MillmCode
millm_config_eos(json_t *value, const char *file, MillmConfig *c, MillmError *err)
{
	size_t		n = json_is_array(value) ? json_array_size(value) : 1;

	if (n > sizeof(c->eos_ids) / sizeof(c->eos_ids[0]))
		return bad_value_of(err, file, "eos_token_id", value, "at most 32 ids");
	c->n_eos = 0;
	for (size_t i = 0; i < n; i++)
	{
		json_t	   *id = json_is_array(value) ? json_array_get(value, i) : value;

		if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT_MAX)
			return bad_value_of(err, file, "eos_token_id", json_is_array(value) ? id : value, "a token id, or a list of them");
		c->eos_ids[c->n_eos++] = (int) json_integer_value(id);
	}
	return MILLM_OK;
}

/* The slopes of ALiBi: powers of 2 for as many heads as are a power of 2, what lies between these for the rest. */
static MillmCode
resolve_alibi(const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	int			n = 1;

	c->alibi_rounded = arch->alibi_rounded;
	if (!(c->alibi_slopes = calloc((size_t) c->n_heads, sizeof(float))))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	while (2 * n <= c->n_heads)
		n *= 2;
	for (int h = 0; h < c->n_heads; h++)
	{
		double		slope = h < n ? exp2(-8.0 * (h + 1) / n) : exp2(-4.0 * (2 * (h - n) + 1) / n);

		c->alibi_slopes[h] = c->alibi_rounded ? millm_bf16_to_f32(millm_f32_to_bf16((float) slope)) : (float) slope;
	}
	return MILLM_OK;
}

/* Everything that would make the model compute something that this engine does not. */
static MillmCode
refuse_flags(json_t *json, const MillmArch *arch, MillmError *err)
{
	static const char *const everywhere[] = {"is_encoder_decoder", "use_bidirectional_attention", NULL};
	json_t	   *quantization = get(json, "quantization_config");
	bool		flag = false;
	MillmCode	rc;

	if (quantization)
	{
		const char *method = json_string_value(json_object_get(quantization, "quant_method"));

		/* what is quantized, and how, the tensors say themselves */
		if (!method || (strcmp(method, "bitsandbytes") != 0 && !(arch->mixture.fused_down && strcmp(method, "mxfp4") == 0)))
		{
			millm_fail(err, MILLM_E_UNSUPPORTED, "quantized checkpoints of quant_method \"%s\" are not supported", method ? shown(method).text : "unknown");
			millm_hint(err, "Use a repository that holds the 16-bit weights, or one that bitsandbytes quantized; millm quantizes while it downloads.");
			return MILLM_E_UNSUPPORTED;
		}
	}
	for (const char *const *key = everywhere; *key; key++)
	{
		if ((rc = get_bool(json, *key, &flag, err)) != MILLM_OK)
			return rc;
		if (flag)
			return unsupported_flag(err, arch->model_type, *key, "true");
	}
	for (size_t i = 0; i < sizeof(arch->refused) / sizeof(arch->refused[0]) && arch->refused[i]; i++)
	{
		json_t	   *value = get(json, arch->refused[i]);
		char	   *text = value && !json_is_false(value) ? json_dumps(value, JSON_ENCODE_ANY) : NULL;

		if (!value || json_is_false(value))
			continue;
		unsupported_flag(err, arch->model_type, arch->refused[i], text ? text : "set");
		free(text);
		return MILLM_E_UNSUPPORTED_ARCHITECTURE;
	}
	return MILLM_OK;
}

/* Which layers have no rope.  c->n_layers is known. */
static MillmCode
resolve_unrotated(json_t *json, const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	json_t	   *list = arch->default_unrotated_every ? get(json, arch->unrotated_key) : NULL, *entry;
	int			every = arch->default_unrotated_every;
	size_t		l;
	MillmCode	rc;

	if (every == 0)
		return MILLM_OK;
	if ((rc = get_int(json, arch->unrotated_every_key, 1, INT_MAX, &every, err)) != MILLM_OK)
		return rc;
	if (list && (!json_is_array(list) || json_array_size(list) != (size_t) c->n_layers))
		return bad_value(err, arch->unrotated_key, list, "a list of as many numbers as there are layers");
	for (int i = 0; i < c->n_layers; i++)
		c->unrotated[i] = (i + 1) % every == 0;
	json_array_foreach(list, l, entry)
	{
		if (!json_is_integer(entry) || json_integer_value(entry) < 0 || json_integer_value(entry) > 1)
			return bad_value(err, arch->unrotated_key, entry, "0 or 1 for each layer");
		c->unrotated[l] = json_integer_value(entry) == 0;
	}
	return MILLM_OK;
}

/* Which layers slide, and how far those see.  c->n_layers is known. */
static MillmCode
resolve_sliding(json_t *json, const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	const MillmSliding *s = &arch->sliding;
	json_t	   *types = get(json, "layer_types"), *entry;
	int			window = s->default_window, first = s->default_first, every = s->default_every;
	bool		on = !s->switch_key;
	size_t		i;
	MillmCode	rc;

	if (types && !json_is_array(types))
		return bad_value(err, "layer_types", types, "a list");
	json_array_foreach(types, i, entry)
	{
		const char *type = json_string_value(entry);
		bool		slides = type && s->possible && strcmp(type, "sliding_attention") == 0;

		if (!type || (!slides && strcmp(type, "full_attention") != 0))
			return unsupported_flag(err, arch->model_type, "layer_types", type ? type : "a value that is not a string");
		if (i < (size_t) c->n_layers)
			c->slides[i] = slides;
	}
	if (!s->possible)
		return MILLM_OK;
	if (types && json_array_size(types) != (size_t) c->n_layers)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid value of \"layer_types\" in config.json");
		millm_detail(err, "It has %zu entries; there are %d layers.", json_array_size(types), c->n_layers);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (s->switch_key && (rc = get_bool(json, s->switch_key, &on, err)) != MILLM_OK)
		return rc;
	/* transformers 5 may write 0 where it is off */
	if (!on || json_is_null(json_object_get(json, "sliding_window")))
		window = 0;
	if ((on && (rc = get_int(json, (const MillmKeys) {"sliding_window"}, 1, MILLM_MAX_POSITIONS, &window, err)) != MILLM_OK) ||
		(s->first_key && (rc = get_int(json, (const MillmKeys) {s->first_key}, 0, INT_MAX, &first, err)) != MILLM_OK) ||
		(rc = get_int(json, s->every_key, 1, INT_MAX, &every, err)) != MILLM_OK)
		return rc;
	for (int l = 0; l < c->n_layers; l++)
	{
		if (!types)
			c->slides[l] = (window > 0 || every > 0) && l >= first && (every == 0 || (l + 1) % every != 0) &&
				(!s->unrotated_only || c->unrotated[l]);
		if (c->slides[l] && window == 0)
			return bad_value(err, "sliding_window", NULL, "a number, for there are layers that slide");
		if (c->slides[l])
			c->window = window;
	}
	return MILLM_OK;
}

static MillmCode
missing(MillmError *err, const char *key)
{
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "config.json lacks \"%s\"", key);
	millm_detail(err, "There is no default for it.");
	return MILLM_E_INVALID_MODEL_FILE;
}

/* What multiplies the embedding, each branch and the logits. */
static MillmCode
resolve_scales(json_t *json, const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	float		divisor;
	MillmCode	rc;

	if ((rc = get_scale(json, arch->embedding_scale_key, arch->embedding_scaled ? sqrt(c->hidden_size) : 1, &c->embedding_scale, err)) != MILLM_OK ||
		(rc = get_scale(json, arch->residual_scale_key, 1, &c->residual_scale, err)) != MILLM_OK ||
		(rc = get_scale(json, arch->logit_scale_key, arch->default_logit_scale > 0 ? arch->default_logit_scale : 1, &c->logit_scale, err)) != MILLM_OK ||
		(rc = get_scale(json, arch->logit_divisor_key, 1, &divisor, err)) != MILLM_OK)
		return rc;
	c->logit_scale /= divisor;
	return MILLM_OK;
}

/* The mixture of experts, and which layers have it. */
static MillmCode
resolve_mixture(json_t *json, const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	const MillmMixture *x = &arch->mixture;
	json_t	   *dense = x->dense_key ? get(json, x->dense_key) : NULL, *layer;
	int			step = 1;
	size_t		i;
	MillmCode	rc;

	if (!x->possible)
		return MILLM_OK;
	c->n_experts = x->default_n;
	c->n_chosen = x->default_chosen;
	c->expert_size = x->size_key ? x->default_size : c->intermediate_size;
	c->shared_expert_size = x->default_shared_size;
	c->experts_sum_to_one = !x->sum_switch;
	c->has_fused_experts = x->fused_down;
	if (c->has_fused_experts)
	{
		double		limit = 7, alpha = 1.702;

		if ((rc = get_double(json, "swiglu_limit", 0, 1e6, &limit, err)) != MILLM_OK || (rc = get_double(json, "swiglu_alpha", 0, 1e6, &alpha, err)) != MILLM_OK)
			return rc;
		if (limit != 7 || alpha != 1.702)
			return unsupported_flag(err, c->model_type, limit != 7 ? "swiglu_limit" : "swiglu_alpha", limit != 7 ? "another than 7" : "another than 1.702");
		c->act = MILLM_ACT_SWIGLU_PAIRS;
	}
	/* any of the counts' spellings for any family: transformers 5 may write another than it reads */
	if ((rc = get_int(json, (const MillmKeys) {"num_experts", "num_local_experts", "n_routed_experts"}, arch->up ? 0 : 1, MILLM_MAX_EXPERTS, &c->n_experts, err)) != MILLM_OK)
		return rc;
	if (c->n_experts == 0)
		return MILLM_OK;
	if (c->n_chosen > c->n_experts)
		c->n_chosen = c->n_experts;
	if ((rc = get_int(json, (const MillmKeys) {"num_experts_per_tok"}, 1, c->n_experts, &c->n_chosen, err)) != MILLM_OK ||
		(rc = get_int(json, (const MillmKeys) {x->size_key}, 1, 16 * MILLM_MAX_HIDDEN, &c->expert_size, err)) != MILLM_OK ||
		(rc = get_int(json, (const MillmKeys) {x->shared_size_key}, 1, 16 * MILLM_MAX_HIDDEN, &c->shared_expert_size, err)) != MILLM_OK ||
		(rc = get_int(json, (const MillmKeys) {x->step_key}, 1, INT_MAX, &step, err)) != MILLM_OK ||
		(x->sum_switch && (rc = get_bool(json, x->sum_switch, &c->experts_sum_to_one, err)) != MILLM_OK))
		return rc;
	for (int l = 0; l < c->n_layers; l++)
		c->is_mixture[l] = (l + 1) % step == 0;
	if (dense && !json_is_array(dense))
		return bad_value(err, x->dense_key, dense, "a list of layers");
	json_array_foreach(dense, i, layer)
	{
		if (!json_is_integer(layer))
			return bad_value(err, x->dense_key, layer, "the number of a layer");
		if (json_integer_value(layer) >= 0 && json_integer_value(layer) < c->n_layers)
			c->is_mixture[json_integer_value(layer)] = false;
	}
	return MILLM_OK;
}

static MillmCode
resolve(json_t *json, const MillmArch *arch, MillmConfig *c, MillmError *err)
{
	json_t	   *v;
	double		eps = arch->default_norm_eps;
	bool		scaled = true, affine = true, alibi, multi_query;
	const char *act = arch->default_act, *act_key;
	MillmCode	rc;

	if ((rc = refuse_flags(json, arch, err)) != MILLM_OK)
		return rc;
	v = json_array_get(json_object_get(json, "architectures"), 0);
	snprintf(c->architecture, sizeof(c->architecture), "%s", json_is_string(v) ? shown(json_string_value(v)).text : "");

	c->max_positions = arch->default_max_positions;
	c->head_dim = arch->default_head_dim;
	c->n_kv_heads = arch->n_kv_heads[0] && json_is_null(json_object_get(json, arch->n_kv_heads[0])) ? 0 : arch->default_n_kv_heads;
	c->n_heads = arch->default_n_heads;
	c->vocab_size = arch->default_vocab_size;
	if ((rc = get_int(json, arch->hidden_size, 1, MILLM_MAX_HIDDEN, &c->hidden_size, err)) != MILLM_OK ||
		(rc = get_int(json, arch->n_layers, 1, MILLM_MAX_LAYERS, &c->n_layers, err)) != MILLM_OK ||
		(rc = get_int(json, arch->n_heads, 1, MILLM_MAX_HEADS, &c->n_heads, err)) != MILLM_OK ||
		(rc = get_int(json, arch->n_kv_heads, 1, MILLM_MAX_HEADS, &c->n_kv_heads, err)) != MILLM_OK ||
		(rc = get_int(json, arch->head_dim, 1, MILLM_MAX_HEAD_DIM, &c->head_dim, err)) != MILLM_OK ||
		(rc = get_int(json, arch->intermediate_size, 1, 16 * MILLM_MAX_HIDDEN, &c->intermediate_size, err)) != MILLM_OK ||
		(rc = get_int(json, (const MillmKeys) {"vocab_size"}, 1, MILLM_MAX_VOCAB, &c->vocab_size, err)) != MILLM_OK ||
		(rc = get_int(json, arch->max_positions, 1, MILLM_MAX_POSITIONS, &c->max_positions, err)) != MILLM_OK ||
		(rc = get_int(json, (const MillmKeys) {arch->embedding_size}, 1, MILLM_MAX_HIDDEN, &c->embedding_size, err)) != MILLM_OK ||
		(rc = get_double(json, arch->norm_eps[0], 0.0, 1.0, &eps, err)) != MILLM_OK)
		return rc;
	c->max_context = c->max_positions;
	if (!c->hidden_size)
		return missing(err, arch->hidden_size[0]);
	if (!c->n_layers)
		return missing(err, arch->n_layers[0]);
	if (!c->n_heads)
		return missing(err, arch->n_heads[0]);
	if (!c->vocab_size)
		return missing(err, "vocab_size");
	if (!c->embedding_size)
		c->embedding_size = c->hidden_size;
	if (!c->intermediate_size && !arch->default_ffn_mult)
		return missing(err, arch->intermediate_size[0]);
	if (!c->intermediate_size)
		c->intermediate_size = arch->default_ffn_mult * c->hidden_size;
	if ((rc = get_when(json, arch->multi_query, &multi_query, err)) != MILLM_OK)
		return rc;
	if (multi_query)
		c->n_kv_heads = 1;
	if (!c->n_kv_heads)
		c->n_kv_heads = c->n_heads;
	if (c->n_heads % c->n_kv_heads != 0 || (!c->head_dim && c->hidden_size % c->n_heads != 0))
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "contradictory attention sizes in config.json");
		millm_detail(err, "Hidden size %d, %d heads, %d KV heads: %s.", c->hidden_size, c->n_heads, c->n_kv_heads,
					 c->n_heads % c->n_kv_heads != 0 ? "heads must be a multiple of KV heads"
					 : "without a head_dim, the hidden size must be a multiple of heads");
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (!c->head_dim)
		c->head_dim = c->hidden_size / c->n_heads;
	if (c->head_dim > MILLM_MAX_HEAD_DIM)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "heads are too large in config.json");
		millm_detail(err, "Hidden size %d makes %d heads of %d dimensions; at most %d are possible.",
					 c->hidden_size, c->n_heads, c->head_dim, MILLM_MAX_HEAD_DIM);
		return MILLM_E_INVALID_MODEL_FILE;
	}

	c->parallel = arch->parallel;
	c->norm = arch->norm;
	c->norm_after = arch->norm_after;
	c->norm_bias = arch->norm_bias;
	c->norm_plus_one = arch->norm_plus_one;
	c->head_norm_kind = arch->head_norm_kind;
	c->head_bias = arch->head_bias;
	c->norm_eps = (float) eps;
	if ((rc = get_when(json, arch->alibi, &alibi, err)) != MILLM_OK)
		return rc;
	c->position = alibi ? MILLM_POS_ALIBI : arch->position;
	c->rope_interleaved = arch->rope_interleaved;
	c->mlp_gated = arch->mlp_gated;
	c->tied = arch->default_tied;
	if ((rc = resolve_scales(json, arch, c, err)) != MILLM_OK ||
		(rc = get_bool(json, "tie_word_embeddings", &c->tied, err)) != MILLM_OK ||
		(rc = get_when(json, arch->qkv_bias, &c->qkv_bias, err)) != MILLM_OK ||
		(rc = get_when(json, arch->o_bias, &c->o_bias, err)) != MILLM_OK ||
		(rc = get_when(json, arch->mlp_bias, &c->mlp_bias, err)) != MILLM_OK ||
		(rc = get_when(json, arch->head_norms, &c->head_norms, err)) != MILLM_OK)
		return rc;
	if ((arch->scale_switch && (rc = get_bool(json, arch->scale_switch, &scaled, err)) != MILLM_OK) ||
		(arch->norm_switch && (rc = get_bool(json, arch->norm_switch, &affine, err)) != MILLM_OK) ||
		(arch->residual_normed_key && (rc = get_bool(json, arch->residual_normed_key, &c->residual_normed, err)) != MILLM_OK))
		return rc;
	c->norm_plain = !affine;
	if (arch->attention_scale_key)
		rc = get_scale(json, arch->attention_scale_key, 1, &c->attention_scale, err);
	else if (arch->scale_key)
	{
		double		scalar = arch->default_scale_key;

		if ((rc = get_double(json, arch->scale_key, 1e-3, 1e6, &scalar, err)) != MILLM_OK)
			return rc;
		c->attention_scale = (float) (1.0 / sqrt(scalar));
	}
	else
		c->attention_scale = scaled ? 1.0f / sqrtf((float) c->head_dim) : 1.0f;
	if (rc != MILLM_OK ||
		(rc = get_softcap(json, arch->attention_softcap_key, arch->default_attention_softcap, &c->attention_softcap, err)) != MILLM_OK ||
		(rc = get_softcap(json, arch->logit_softcap_key, arch->default_logit_softcap, &c->logit_softcap, err)) != MILLM_OK)
		return rc;
	if (arch->layer_inv_scale_switch && (rc = get_bool(json, arch->layer_inv_scale_switch, &c->layer_inv_scale, err)) != MILLM_OK)
		return rc;
	act_key = arch->act[0];
	if (!(v = get(json, act_key)) && arch->act[1])
		v = get(json, act_key = arch->act[1]);
	if (v)
	{
		if (!json_is_string(v))
			return bad_value(err, act_key, v, "a string");
		act = json_string_value(v);
		if (arch->legacy_gelu_is_tanh && act_key == arch->act[1] && strcmp(act, "gelu") == 0)
			act = "gelu_pytorch_tanh";
	}
	if ((rc = parse_act(act_key, act, c, &c->act, err)) != MILLM_OK)
		return rc;
	if ((rc = resolve_unrotated(json, arch, c, err)) != MILLM_OK ||
		(rc = resolve_sliding(json, arch, c, err)) != MILLM_OK ||
		(rc = resolve_mixture(json, arch, c, err)) != MILLM_OK)
		return rc;
	if (c->position == MILLM_POS_ROPE && (rc = resolve_rope(json, arch, c, err)) != MILLM_OK)
		return rc;
	if (c->position == MILLM_POS_ALIBI && (rc = resolve_alibi(arch, c, err)) != MILLM_OK)
		return rc;

	if ((v = get(json, "eos_token_id")) && (rc = millm_config_eos(v, "config.json", c, err)) != MILLM_OK)
		return rc;
	return MILLM_OK;
}

/* Do a row's conditions hold? */
static MillmCode
conditions_hold(json_t *json, const MillmArch *arch, bool *out, MillmError *err)
{
	*out = true;
	for (int i = 0; i < 2 && arch->only_if[i].key; i++)
	{
		const MillmCondition *c = &arch->only_if[i];
		json_t	   *v = get(json, c->key);

		if (v && !json_is_boolean(v) && !json_is_integer(v))
			return bad_value(err, c->key, v, "true, false or an integer");
		*out &= c->value == (!v ? c->by_default : json_is_integer(v) ? json_integer_value(v) : json_is_true(v));
	}
	return MILLM_OK;
}

/* The text model's part of a config, with what the whole says for it; a new reference. */
static MillmCode
text_part(json_t *json, const MillmArch *arch, json_t **out, MillmError *err)
{
	static const char *const whole[] = {"architectures", "quantization_config", "eos_token_id"};
	json_t	   *part = get(json, arch->text_config), *value;

	if (!json_is_object(part))
		return bad_value(err, arch->text_config, part, "an object");
	if (!(*out = json_copy(part)))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (size_t i = 0; i < sizeof(whole) / sizeof(whole[0]); i++)
		if ((value = get(json, whole[i])))
			json_object_set(*out, whole[i], value);
	return MILLM_OK;
}

MillmCode
millm_config_resolve(json_t *json, MillmConfig *config, MillmError *err)
{
	json_t	   *type = get(json, "model_type");
	const MillmArch *arch;
	bool		holds = false;
	json_t	   *part = NULL;
	MillmCode	rc;

	memset(config, 0, sizeof(*config));
	if (!json_is_object(json))
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "config.json is not a JSON object");
	if (!json_is_string(type))
	{
		millm_fail(err, MILLM_E_UNSUPPORTED_ARCHITECTURE, "config.json does not name a model_type");
		millm_hint(err, "Supported are: %s.", millm_supported_model_types());
		return MILLM_E_UNSUPPORTED_ARCHITECTURE;
	}
	for (int i = 0; (arch = millm_arch_find(json_string_value(type), i)); i++)
	{
		if ((rc = conditions_hold(json, arch, &holds, err)) != MILLM_OK)
			return rc;
		if (holds)
			break;
	}
	if (!arch)
	{
		millm_fail(err, MILLM_E_UNSUPPORTED_ARCHITECTURE, "model type \"%s\" is not supported", shown(json_string_value(type)).text);
		millm_hint(err, "Supported are: %s.", millm_supported_model_types());
		return MILLM_E_UNSUPPORTED_ARCHITECTURE;
	}
	config->arch = arch;
	snprintf(config->model_type, sizeof(config->model_type), "%s", arch->model_type);
	if (arch->text_config && (rc = text_part(json, arch, &part, err)) != MILLM_OK)
		return rc;
	if ((rc = resolve(part ? part : json, arch, config, err)) != MILLM_OK)
		millm_config_free(config);
	json_decref(part);
	return rc;
}

MillmCode
millm_config_parse(const char *text, size_t len, MillmConfig *config, MillmError *err)
{
	json_error_t jerr;
	json_t	   *json = json_loadb(text, len, 0, &jerr);
	MillmCode	rc;

	if (!json)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "config.json is not valid JSON");
		millm_detail(err, "Line %d: %s.", jerr.line, jerr.text);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	rc = millm_config_resolve(json, config, err);
	json_decref(json);
	return rc;
}

bool
millm_config_can_screen(const MillmConfig *config)
{
	return config->logit_softcap == 0 && !config->head_bias;
}

void
millm_config_free(MillmConfig *config)
{
	MillmRope  *ropes[] = {&config->rope, &config->local_rope};

	for (int i = 0; i < 2; i++)
	{
		free(ropes[i]->inv_freq);
		free(ropes[i]->long_inv_freq);
		ropes[i]->inv_freq = ropes[i]->long_inv_freq = NULL;
	}
	free(config->alibi_slopes);
	config->alibi_slopes = NULL;
}
