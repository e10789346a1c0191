/*
 * state.c -- quant_state: the JSON beside a 4-bit weight, written as Python writes it, read as a stranger's.
 *
 * bitsandbytes' loader refuses a key that it does not know, and so do we, both ways.  Which scales a weight has is
 * decided by the keys present here and then, in decode.c, must agree with the tensors.
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layout.h"
#include "shown.h"

/* Longer than any honest one; bitsandbytes' own are below 200 bytes. */
#define MAX_STATE_BYTES	4096

static const struct
{
	const char *name;
	MillmDtype	dtype;
}			torch_dtypes[] = {{"bfloat16", MILLM_BF16}, {"float16", MILLM_F16}, {"float32", MILLM_F32}};

#define N_TORCH_DTYPES ((int) (sizeof(torch_dtypes) / sizeof(torch_dtypes[0])))

/*
 * Python's repr() of a finite double: the fewest digits that read back as the same, in scientific notation below
 * 1e-4 and from 1e16, never without a point otherwise.
 */
static void
write_python_float(char *text, size_t size, double value)
{
	int			digits = 1, exponent;

	for (;; digits++)
	{
		snprintf(text, size, "%.*e", digits - 1, value);
		if (digits == 17 || strtod(text, NULL) == value)
			break;
	}
	exponent = (int) strtol(strchr(text, 'e') + 1, NULL, 10);
	if (exponent >= -4 && exponent < 16)
		snprintf(text, size, "%.*f", digits - 1 - exponent > 1 ? digits - 1 - exponent : 1, value);
}

size_t
millm_quant_state_write(const MillmQuantState *state, char *text, size_t size)
{
	const char *dtype = "";
	char		offset[32];
	int			n;

	for (int i = 0; i < N_TORCH_DTYPES; i++)
		if (torch_dtypes[i].dtype == state->dtype)
			dtype = torch_dtypes[i].name;
	n = snprintf(text, size, "{\"quant_type\": \"%s\", \"blocksize\": %d, \"dtype\": \"%s\", \"shape\": [%lld, %lld]",
				 state->format == MILLM_QUANT_NF4 ? "nf4" : "fp4", state->block_size, dtype,
				 (long long) state->n_out, (long long) state->n_in);
	if (state->nested)
	{
		write_python_float(offset, sizeof(offset), (double) state->nested_offset);
		n += snprintf(text + n, size - (size_t) n, ", \"nested_blocksize\": %d, \"nested_dtype\": \"float32\", \"nested_offset\": %s",
					  state->nested_block_size, offset);
	}
	n += snprintf(text + n, size - (size_t) n, "}");
	return (size_t) n;
}

static MillmCode
bad_value(MillmError *err, const char *name, const char *key, json_t *value, const char *expected)
{
	char	   *text = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;

	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid \"%s\" in \"%.200s\"", shown(key).text, name);
	if (value)
		millm_detail(err, "It is %s; expected %s.", text ? shown(text).text : "unprintable", expected);
	else
		millm_detail(err, "It is missing; expected %s.", expected);
	free(text);
	return MILLM_E_INVALID_MODEL_FILE;
}

/* bitsandbytes' block sizes: powers of two from 32 to 4096. */
static bool
get_block_size(json_t *value, int *out)
{
	json_int_t	v = json_integer_value(value);	/* 0 when it is no integer */

	if (v < 32 || v > 4096 || (v & (v - 1)) != 0)
		return false;
	*out = (int) v;
	return true;
}

static MillmCode
get_shape(const char *name, json_t *value, MillmQuantState *out, MillmError *err)
{
	int64_t		dims[2], n;

	if (!json_is_array(value) || json_array_size(value) == 0)
		return bad_value(err, name, "shape", value, "a list of two sizes");
	if (json_array_size(value) != 2)
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "\"%.200s\" describes a tensor of %zu dimensions", name, json_array_size(value));
		millm_detail(err, "Quantized weights have two.");
		return MILLM_E_UNSUPPORTED;
	}
	for (size_t i = 0; i < 2; i++)
	{
		json_t	   *v = json_array_get(value, i);

		if (!json_is_integer(v) || json_integer_value(v) <= 0)
			return bad_value(err, name, "shape", value, "two positive integers");
		dims[i] = json_integer_value(v);
	}
	if (__builtin_mul_overflow(dims[0], dims[1], &n) || n > MILLM_QUANT_MAX_WEIGHTS)
		return bad_value(err, name, "shape", value, "fewer weights");
	out->n_out = dims[0];
	out->n_in = dims[1];
	return MILLM_OK;
}

/* quant_type, and its agreement with the name of the tensor, "X.weight.quant_state.bitsandbytes__nf4". */
static MillmCode
get_format(const char *name, json_t *value, MillmQuantState *out, MillmError *err)
{
	static const char marker[] = "bitsandbytes__";
	const char *type = json_string_value(value);
	const char *in_name = strstr(name, marker);

	if (!type)
		return bad_value(err, name, "quant_type", value, "\"nf4\" or \"fp4\"");
	if (strcmp(type, "nf4") == 0)
		out->format = MILLM_QUANT_NF4;
	else if (strcmp(type, "fp4") == 0)
		out->format = MILLM_QUANT_FP4;
	else
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "quant_type \"%s\" is not supported", shown(type).text);
		millm_detail(err, "\"%.200s\" asks for it; \"nf4\" and \"fp4\" are known.", name);
		return MILLM_E_UNSUPPORTED;
	}
	if (!in_name || strcmp(in_name + sizeof(marker) - 1, type) != 0)
		return bad_value(err, name, "quant_type", value, "what the name of the tensor ends with");
	return MILLM_OK;
}

static MillmCode
get_nested(const char *name, json_t *object, MillmQuantState *out, MillmError *err)
{
	json_t	   *block_size = json_object_get(object, "nested_blocksize");
	json_t	   *dtype = json_object_get(object, "nested_dtype");
	json_t	   *offset = json_object_get(object, "nested_offset");

	if (!block_size && !dtype && !offset)
		return MILLM_OK;
	if (!get_block_size(block_size, &out->nested_block_size))
		return bad_value(err, name, "nested_blocksize", block_size, "a power of two from 32 to 4096");
	if (!json_is_string(dtype) || strcmp(json_string_value(dtype), "float32") != 0)
		return bad_value(err, name, "nested_dtype", dtype, "\"float32\"");
	if (!json_is_number(offset) || !(fabs(json_number_value(offset)) <= 3.4028234663852886e38))
		return bad_value(err, name, "nested_offset", offset, "a number that fits into float32");
	out->nested_offset = (float) json_number_value(offset);
	out->nested = true;
	return MILLM_OK;
}

static MillmCode
read_object(const char *name, json_t *object, MillmQuantState *out, MillmError *err)
{
	static const char *const known[] = {
		"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
	};
	const char *key;
	json_t	   *value;
	json_t	   *dtype = json_object_get(object, "dtype");
	bool		found = false;
	MillmCode	rc;

	json_object_foreach(object, key, value)
	{
		bool		is_known = false;

		for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
			is_known |= strcmp(key, known[i]) == 0;
		if (!is_known)
			return bad_value(err, name, key, value, "no such key");
	}
	if ((rc = get_format(name, json_object_get(object, "quant_type"), out, err)) != MILLM_OK)
		return rc;
	if (!get_block_size(json_object_get(object, "blocksize"), &out->block_size))
		return bad_value(err, name, "blocksize", json_object_get(object, "blocksize"), "a power of two from 32 to 4096");
	for (int i = 0; i < N_TORCH_DTYPES; i++)
		if (json_is_string(dtype) && strcmp(json_string_value(dtype), torch_dtypes[i].name) == 0)
		{
			out->dtype = torch_dtypes[i].dtype;
			found = true;
		}
	if (!found)
		return bad_value(err, name, "dtype", dtype, "\"bfloat16\", \"float16\" or \"float32\"");
	if ((rc = get_shape(name, json_object_get(object, "shape"), out, err)) != MILLM_OK)
		return rc;
	return get_nested(name, object, out, err);
}

MillmCode
millm_quant_state_read(const char *name, const void *text, size_t len, MillmQuantState *out, MillmError *err)
{
	MillmQuantState state = {0};
	json_error_t why;
	json_t	   *object;
	MillmCode	rc;

	if (len > MAX_STATE_BYTES)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%.200s\" is too long", name);
		millm_detail(err, "It has %zu bytes; at most %d are read.", len, MAX_STATE_BYTES);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	object = json_loadb(text, len, JSON_REJECT_DUPLICATES, &why);
	if (!json_is_object(object))
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%.200s\" is not a JSON object", name);
		if (!object)
			millm_detail(err, "%s at byte %d.", shown(why.text).text, why.position);
		json_decref(object);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	rc = read_object(name, object, &state, err);
	json_decref(object);
	if (rc == MILLM_OK)
		*out = state;
	return rc;
}
