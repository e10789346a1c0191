/*
 * body.c -- JSON of strangers.
 *
 * jansson checks UTF-8 and bounds nesting (2048); U+0000, which no PostgreSQL text can hold, and numbers beyond 64 bits
 * or a double are refused by it too, here in our words.
 */
#include "body.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "reply.h"

#define MAX_SHOWN_NAME 100		/* of a field that we do not know: nobody's megabyte goes back to him */

bool
body_wrong(HttpRequest *r, const char *field, const char *wanted)
{
	reply_error(r, 400, "invalid_type", field, "Field \"%s\" must be %s.", field, wanted);
	return false;
}

bool
body_unsupported(HttpRequest *r, const char *field, const char *why)
{
	reply_error(r, 400, "unsupported_parameter", field, "Field \"%s\" cannot be honoured: %s.", field, why);
	return false;
}

/* 400 in the words of what jansson found. */
static void
refuse_json(HttpRequest *r, const json_error_t *error)
{
	const char *what = error->text;

	switch (json_error_code(error))
	{
		case json_error_null_character:
		case json_error_null_byte_in_key:
			what = "a string has the character U+0000, which PostgreSQL's text cannot hold";
			break;
		case json_error_numeric_overflow:
			what = "a number is too large";
			break;
		case json_error_stack_overflow:
			what = "it is nested too deeply";
			break;
		case json_error_invalid_utf8:
			what = "it is not UTF-8";
			break;
		case json_error_duplicate_key:
			what = "an object has a field twice";
			break;
		case json_error_premature_end_of_input:
			what = "it ends too early";
			break;
		case json_error_end_of_input_expected:
			what = "something follows its end";
			break;
		default:
			break;
	}
	reply_error(r, 400, "invalid_json", NULL, "The body is not JSON that can be read: %s (line %d, column %d).", what, error->line, error->column);
}

json_t *
body_read(HttpRequest *r, const BodyField *fields, bool may_be_empty, void *arg)
{
	json_error_t error;
	json_t	   *body;
	json_t	   *value;
	const char *name;

	if (r->body_len == 0 && may_be_empty)
		return json_object();
	if (!(body = json_loadb(r->body ? r->body : "", r->body_len, JSON_REJECT_DUPLICATES, &error)))
	{
		refuse_json(r, &error);
		return NULL;
	}
	if (!json_is_object(body))
	{
		reply_error(r, 400, "invalid_type", NULL, "The body must be a JSON object.");
		json_decref(body);
		return NULL;
	}
	json_object_foreach(body, name, value)
	{
		const BodyField *f = fields;

		while (f->name && strcmp(f->name, name) != 0)
			f++;
		if (!f->name)
			reply_error(r, 400, "unknown_parameter", strlen(name) <= MAX_SHOWN_NAME ? name : NULL, "Field \"%.*s\" is not one of this request.", MAX_SHOWN_NAME, name);
		if (!f->name || (!json_is_null(value) && !f->take(r, f, value, arg)))
		{
			json_decref(body);
			return NULL;
		}
	}
	return body;
}

bool
body_integer(HttpRequest *r, const char *field, json_t *value, int64_t least, int64_t most, char text[32])
{
	if (!json_is_integer(value))
		return body_wrong(r, field, "an integer");
	if (json_integer_value(value) < least || json_integer_value(value) > most)
	{
		reply_error(r, 400, "out_of_range", field, "Field \"%s\" is %lld; the valid range is %lld to %lld.", field,
					(long long) json_integer_value(value), (long long) least, (long long) most);
		return false;
	}
	snprintf(text, 32, "%lld", (long long) json_integer_value(value));
	return true;
}

bool
body_number(HttpRequest *r, const char *field, json_t *value, char text[32])
{
	if (!json_is_number(value))
		return body_wrong(r, field, "a number");
	snprintf(text, 32, "%.17g", json_number_value(value));
	return true;
}

char *
body_text_array(HttpRequest *r, const char *field, json_t *value)
{
	const size_t n = json_is_string(value) ? 1 : json_array_size(value);
	char	   *text = NULL;
	size_t		len;
	FILE	   *f;
	bool		is_good = json_is_string(value) || json_is_array(value);

	for (size_t i = 0; i < n && json_is_array(value); i++)
		is_good = is_good && json_is_string(json_array_get(value, i));
	if (!is_good)
	{
		body_wrong(r, field, "a string or an array of strings");
		return NULL;
	}
	if (!(f = open_memstream(&text, &len)))
	{
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return NULL;
	}
	fputc('{', f);
	for (size_t i = 0; i < n; i++)
	{
		fputs(i ? ",\"" : "\"", f);
		for (const char *c = json_string_value(json_is_string(value) ? value : json_array_get(value, i)); *c; c++)
		{
			if (*c == '"' || *c == '\\')
				fputc('\\', f);
			fputc(*c, f);
		}
		fputc('"', f);
	}
	fputc('}', f);
	if (fclose(f) != 0)
	{
		free(text);
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return NULL;
	}
	return text;
}

bool
body_take_user(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	(void) arg;
	if (!json_is_string(value))
		return body_wrong(r, f->name, "a string");
	if (json_string_length(value) >= sizeof(r->user))
	{
		reply_error(r, 400, "out_of_range", f->name, "Field \"%s\" has %zu bytes; %zu are the most.", f->name, json_string_length(value), sizeof(r->user) - 1);
		return false;
	}
	memcpy(r->user, json_string_value(value), json_string_length(value) + 1);
	return true;
}
