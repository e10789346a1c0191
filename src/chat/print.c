/*
 * print.c -- values as text: Python's str() and repr(), and json.dumps().
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "unicode.h"
#include "value.h"

/* The shortest digits that read back as the same number, in Python's form. */
static void
format_real(double x, char out[40])
{
	char		text[40];
	char		digits[24];
	int			n_digits = 0;
	int			exponent;
	int			at = 0;

	if (isnan(x) || isinf(x))
	{
		snprintf(out, 40, "%s", isnan(x) ? "nan" : x < 0 ? "-inf" : "inf");
		return;
	}
	for (int precision = 0; precision <= 16; precision++)
	{
		snprintf(text, sizeof(text), "%.*e", precision, x);
		if (strtod(text, NULL) == x)
			break;
	}
	for (const char *p = text; *p && *p != 'e'; p++)
		if (*p >= '0' && *p <= '9')
			digits[n_digits++] = *p;
	exponent = (int) strtol(strchr(text, 'e') + 1, NULL, 10);
	if (signbit(x))
		out[at++] = '-';
	if (exponent < -4 || exponent >= 16)
	{
		out[at++] = digits[0];
		if (n_digits > 1)
			out[at++] = '.';
		memcpy(out + at, digits + 1, (size_t) n_digits - 1);
		at += n_digits - 1;
		snprintf(out + at, 40 - (size_t) at, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
		return;
	}
	if (exponent < 0)
	{
		out[at++] = '0';
		out[at++] = '.';
		for (int i = -1; i > exponent; i--)
			out[at++] = '0';
		memcpy(out + at, digits, (size_t) n_digits);
		at += n_digits;
	}
	else
	{
		for (int i = 0; i <= exponent; i++)
			out[at++] = i < n_digits ? digits[i] : '0';
		out[at++] = '.';
		for (int i = exponent + 1; i < n_digits; i++)
			out[at++] = digits[i];
		if (n_digits <= exponent + 1)
			out[at++] = '0';
	}
	out[at] = '\0';
}

/* ---- str() and repr() ---- */

static bool
is_printable(uint32_t cp)
{
	return cp == ' ' || !millm_unicode_is_in(cp, UM_C | UM_Z);
}

static void
repr_string(Builder *b, Str s)
{
	bool		single = memchr(s.data, '\'', s.n) && !memchr(s.data, '"', s.n);
	char		quote = single ? '"' : '\'';
	char		text[16];
	uint32_t	cp;

	if (s.is_markup)
		millm_builder_add_text(b, "Markup(");
	millm_builder_add_char(b, (uint32_t) quote, false);
	for (size_t at = 0, done = 0, end; at <= s.n; at = end)
	{
		text[0] = '\0';
		end = at + 1;
		if (at < s.n)
		{
			end = at + millm_utf8_get(s.data + at, &cp);
			if (cp == (uint32_t) quote || cp == '\\')
				snprintf(text, sizeof(text), "\\%c", (int) cp);
			else if (cp == '\n' || cp == '\r' || cp == '\t')
				snprintf(text, sizeof(text), "\\%c", cp == '\n' ? 'n' : cp == '\r' ? 'r' : 't');
			else if (is_printable(cp))
				continue;
			else if (cp < 0x100)
				snprintf(text, sizeof(text), "\\x%02x", cp);
			else if (cp < 0x10000)
				snprintf(text, sizeof(text), "\\u%04x", cp);
			else
				snprintf(text, sizeof(text), "\\U%08x", cp);
		}
		millm_builder_add(b, millm_str_cut(s, done, at));
		millm_builder_add(b, millm_str_of(text, strlen(text), true));
		done = end;
	}
	millm_builder_add_char(b, (uint32_t) quote, false);
	if (s.is_markup)
		millm_builder_add_text(b, ")");
}

static void
repr_list(Builder *b, const List *list, const char *open, const char *close)
{
	millm_builder_add_text(b, open);
	for (size_t i = 0; i < list->n; i++)
	{
		if (i > 0)
			millm_builder_add_text(b, ", ");
		millm_value_repr(b, list->items[i]);
	}
	millm_builder_add_text(b, close);
}

static void
repr_dict(Builder *b, const Dict *dict)
{
	millm_builder_add_text(b, "{");
	for (size_t i = 0; i < dict->n; i++)
	{
		if (i > 0)
			millm_builder_add_text(b, ", ");
		millm_value_repr(b, dict->entries[i].key);
		millm_builder_add_text(b, ": ");
		millm_value_repr(b, dict->entries[i].value);
	}
	millm_builder_add_text(b, "}");
}

void
millm_value_repr(Builder *b, Value v)
{
	char		text[64];
	bool		is_single;

	millm_work_enter(b->w);
	switch (v.kind)
	{
		case V_ABSENT:
		case V_UNDEFINED:
			millm_builder_add_text(b, "Undefined");
			break;
		case V_NONE:
			millm_builder_add_text(b, "None");
			break;
		case V_BOOL:
			millm_builder_add_text(b, v.boolean ? "True" : "False");
			break;
		case V_INT:
			snprintf(text, sizeof(text), "%" PRId64, v.integer);
			millm_builder_add_text(b, text);
			break;
		case V_FLOAT:
			format_real(v.real, text);
			millm_builder_add_text(b, text);
			break;
		case V_STRING:
			repr_string(b, *v.str);
			break;
		case V_LIST:
			repr_list(b, v.list, "[", "]");
			break;
		case V_TUPLE:
			is_single = v.list->n == 1;
			repr_list(b, v.list, "(", is_single ? ",)" : ")");
			break;
		case V_DICT:
			repr_dict(b, v.dict);
			break;
		case V_VIEW:
			millm_builder_add_text(b, millm_value_type(v));
			repr_list(b, millm_value_iterate(b->w, v), "([", "])");
			break;
		case V_RANGE:
			snprintf(text, sizeof(text), "range(%" PRId64 ", %" PRId64, v.range->start, v.range->start + v.range->n * v.range->step);
			millm_builder_add_text(b, text);
			snprintf(text, sizeof(text), v.range->step == 1 ? ")" : ", %" PRId64 ")", v.range->step);
			millm_builder_add_text(b, text);
			break;
		case V_NAMESPACE:
			millm_builder_add_text(b, "<Namespace ");
			repr_dict(b, v.dict);
			millm_builder_add_text(b, ">");
			break;
		case V_GENERATOR:
		case V_LOOP:
		case V_MACRO:
		case V_METHOD:
		case V_FUNCTION:		/* Python prints an address */
			millm_work_fail(b->w, MILLM_E_INVALID_ARGUMENT, "a %s has no text", millm_value_type(v));
	}
	millm_work_leave(b->w);
}

Str
millm_value_str(Work *w, Value v)
{
	Builder		b;

	if (v.kind == V_UNDEFINED)
		return millm_str("");
	if (v.kind == V_STRING)
	{
		Str			s = *v.str;

		s.is_markup = false;
		return s;
	}
	millm_builder_init(&b, w, MAX_STRING_BYTES);
	millm_value_repr(&b, v);
	return millm_builder_str(&b);
}

/* ---- JSON ---- */

typedef struct Json
{
	Builder		b;
	const JsonStyle *style;
} Json;

static void
json_string_text(Json *j, Str s)
{
	Builder    *b = &j->b;
	char		text[16];
	uint32_t	cp;

	millm_builder_add_text(b, "\"");
	for (size_t at = 0, done = 0, end; at <= s.n; at = end)
	{
		text[0] = '\0';
		end = at + 1;
		if (at < s.n)
		{
			static const char escapes[] = "\"\\\n\r\t\b\f";
			static const char letters[] = "\"\\nrtbf";
			const char *found;

			end = at + millm_utf8_get(s.data + at, &cp);
			found = cp > 0 && cp < 0x80 ? strchr(escapes, (int) cp) : NULL;
			if (found)
				snprintf(text, sizeof(text), "\\%c", letters[found - escapes]);
			else if (cp >= 0x20 && (cp < 0x7F || !j->style->ensure_ascii))
				continue;
			else if (cp < 0x10000)
				snprintf(text, sizeof(text), "\\u%04x", cp);
			else
				snprintf(text, sizeof(text), "\\u%04x\\u%04x", 0xD800 + ((cp - 0x10000) >> 10), 0xDC00 + ((cp - 0x10000) & 0x3FF));
		}
		millm_builder_add(b, millm_str_cut(s, done, at));
		millm_builder_add(b, millm_str_of(text, strlen(text), true));
		done = end;
	}
	millm_builder_add_text(b, "\"");
}

static void
json_break(Json *j, int level)
{
	if (!j->style->has_indent)
		return;
	millm_builder_add_text(&j->b, "\n");
	for (int i = 0; i < level; i++)
		millm_builder_add(&j->b, j->style->indent);
}

static void
json_real_text(Json *j, double x)
{
	char		text[40];

	format_real(x, text);
	millm_builder_add_text(&j->b, isnan(x) ? "NaN" : isinf(x) ? (x < 0 ? "-Infinity" : "Infinity") : text);
}

static void
json_key(Json *j, Value key)
{
	switch (key.kind)
	{
		case V_STRING:
			json_string_text(j, *key.str);
			return;
		case V_BOOL:
			millm_builder_add_text(&j->b, key.boolean ? "\"true\"" : "\"false\"");
			return;
		case V_NONE:
			millm_builder_add_text(&j->b, "\"null\"");
			return;
		case V_INT:
		case V_FLOAT:
			millm_builder_add_text(&j->b, "\"");
			if (key.kind == V_INT)
				millm_value_repr(&j->b, key);
			else
				json_real_text(j, key.real);
			millm_builder_add_text(&j->b, "\"");
			return;
		default:
			millm_work_fail(j->b.w, MILLM_E_INVALID_ARGUMENT, "a %s cannot be a key in JSON", millm_value_type(key));
	}
}

/* The members in their order, or, on request, in that of their keys. */
static const Entry *
json_members(Json *j, const Dict *dict)
{
	Work	   *w = j->b.w;
	Entry	   *sorted;

	if (!j->style->sort_keys || dict->n < 2)
		return dict->entries;
	sorted = millm_work_array(w, dict->n, sizeof(*sorted));
	for (size_t i = 0; i < dict->n; i++)
	{
		size_t		at = i;

		for (; at > 0 && millm_value_compare(w, dict->entries[i].key, sorted[at - 1].key) < 0; at--)
			sorted[at] = sorted[at - 1];
		sorted[at] = dict->entries[i];
	}
	return sorted;
}

static void
json_value(Json *j, Value v, int level)
{
	Builder    *b = &j->b;

	millm_work_enter(b->w);
	millm_work_pay(b->w, 1);
	switch (v.kind)
	{
		case V_NONE:
			millm_builder_add_text(b, "null");
			break;
		case V_BOOL:
			millm_builder_add_text(b, v.boolean ? "true" : "false");
			break;
		case V_INT:
			millm_value_repr(b, v);
			break;
		case V_FLOAT:
			json_real_text(j, v.real);
			break;
		case V_STRING:
			json_string_text(j, *v.str);
			break;
		case V_LIST:
		case V_TUPLE:
			millm_builder_add_text(b, "[");
			for (size_t i = 0; i < v.list->n; i++)
			{
				if (i > 0)
					millm_builder_add(b, j->style->item_separator);
				json_break(j, level + 1);
				json_value(j, v.list->items[i], level + 1);
			}
			if (v.list->n > 0)
				json_break(j, level);
			millm_builder_add_text(b, "]");
			break;
		case V_DICT:
			{
				const Entry *members = json_members(j, v.dict);

				millm_builder_add_text(b, "{");
				for (size_t i = 0; i < v.dict->n; i++)
				{
					if (i > 0)
						millm_builder_add(b, j->style->item_separator);
					json_break(j, level + 1);
					json_key(j, members[i].key);
					millm_builder_add(b, j->style->key_separator);
					json_value(j, members[i].value, level + 1);
				}
				if (v.dict->n > 0)
					json_break(j, level);
				millm_builder_add_text(b, "}");
				break;
			}
		default:
			millm_work_fail(b->w, MILLM_E_INVALID_ARGUMENT, "a value of type %s is not JSON serializable", millm_value_type(v));
	}
	millm_work_leave(b->w);
}

Str
millm_value_tojson(Work *w, Value v, const JsonStyle *style)
{
	Json		j = {.style = style};

	millm_builder_init(&j.b, w, MAX_STRING_BYTES);
	json_value(&j, v, 0);
	return millm_builder_str(&j.b);
}
