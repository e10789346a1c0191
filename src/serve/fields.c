/*
 * fields.c -- strict reading of a request's fields: known names, right types, stated ranges.
 *
 * The reader notes every name that the op asks for; what the object has beyond them is refused
 * by name at the end.  Only the first error is kept.
 */
#include "serve.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

void
millm_fields_begin(MillmFields *f, json_t *object, MillmError *err)
{
	f->object = object;
	f->n_seen = 0;
	f->code = MILLM_OK;
	f->err = err;
	if (!json_is_object(object))
		f->code = millm_fail(err, MILLM_E_INVALID_ARGUMENT, "request is not a JSON object");
}

/* The field's value, or NULL when it is missing, null, or an error has already been seen. */
static json_t *
find(MillmFields *f, const char *name)
{
	json_t	   *value;

	assert(f->n_seen < (int) (sizeof(f->seen) / sizeof(f->seen[0])));
	f->seen[f->n_seen++] = name;
	if (f->code != MILLM_OK)
		return NULL;
	value = json_object_get(f->object, name);
	return json_is_null(value) ? NULL : value;
}

static void
wrong_type(MillmFields *f, const char *name, const char *wanted)
{
	f->code = millm_fail(f->err, MILLM_E_INVALID_ARGUMENT, "field \"%s\" must be %s", name, wanted);
}

void
millm_field_text(MillmFields *f, const char *name, const char **out, size_t *len)
{
	json_t	   *value = find(f, name);

	if (!value)
		return;
	if (!json_is_string(value))
	{
		wrong_type(f, name, "a string");
		return;
	}
	*out = json_string_value(value);
	*len = json_string_length(value);
}

void
millm_field_string(MillmFields *f, const char *name, const char **out)
{
	const char *text = NULL;
	size_t		len = 0;

	millm_field_text(f, name, &text, &len);
	if (!text)
		return;
	if (memchr(text, '\0', len))
		wrong_type(f, name, "a string without U+0000");
	else
		*out = text;
}

void
millm_field_int(MillmFields *f, const char *name, int64_t min, int64_t max, int64_t *out)
{
	json_t	   *value = find(f, name);
	int64_t		v;

	if (!value)
		return;
	if (!json_is_integer(value))
	{
		wrong_type(f, name, "an integer");
		return;
	}
	v = json_integer_value(value);
	if (v < min || v > max)
	{
		f->code = millm_fail(f->err, MILLM_E_INVALID_ARGUMENT, "field \"%s\" is out of range", name);
		millm_detail(f->err, "It is %lld; the valid range is %lld to %lld.",
					 (long long) v, (long long) min, (long long) max);
		return;
	}
	*out = v;
}

void
millm_field_double(MillmFields *f, const char *name, double min, double max, double *out)
{
	json_t	   *value = find(f, name);
	double		v;

	if (!value)
		return;
	if (!json_is_number(value))
	{
		wrong_type(f, name, "a number");
		return;
	}
	v = json_number_value(value);
	if (!(v >= min && v <= max))
	{
		f->code = millm_fail(f->err, MILLM_E_INVALID_ARGUMENT, "field \"%s\" is out of range", name);
		millm_detail(f->err, "It is %g; the valid range is %g to %g.", v, min, max);
		return;
	}
	*out = v;
}

void
millm_field_bool(MillmFields *f, const char *name, bool *out)
{
	json_t	   *value = find(f, name);

	if (!value)
		return;
	if (json_is_boolean(value))
		*out = json_is_true(value);
	else
		wrong_type(f, name, "true or false");
}

void
millm_field_array(MillmFields *f, const char *name, json_t **out)
{
	json_t	   *value = find(f, name);

	if (!value)
		return;
	if (json_is_array(value))
		*out = value;
	else
		wrong_type(f, name, "an array");
}

void
millm_field_object(MillmFields *f, const char *name, json_t **out)
{
	json_t	   *value = find(f, name);

	if (!value)
		return;
	if (json_is_object(value))
		*out = value;
	else
		wrong_type(f, name, "an object");
}

MillmCode
millm_fields_end(MillmFields *f)
{
	const char *name;
	json_t	   *value;

	if (f->code != MILLM_OK)
		return f->code;
	json_object_foreach(f->object, name, value)
	{
		int			i = 0;
		char		known[512] = "";
		size_t		n = 0;

		while (i < f->n_seen && strcmp(f->seen[i], name) != 0)
			i++;
		if (i < f->n_seen)
			continue;
		f->code = millm_fail(f->err, MILLM_E_INVALID_ARGUMENT, "unrecognized field \"%.100s\"", name);
		for (i = 0; i < f->n_seen && n < sizeof(known); i++)
			n += (size_t) snprintf(known + n, sizeof(known) - n, "%s%s", i ? ", " : "", f->seen[i]);
		millm_hint(f->err, "The fields are: %s.", known);
		break;
	}
	return f->code;
}
