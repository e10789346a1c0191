/*
 * filters.c -- jinja2's filters, and transformers' tojson.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "builtin.h"
#include "text.h"
#include "unicode.h"

/* ---- helpers ---- */

#define UNUSED(x) ((void) (x))

static bool
is_given(Value v)
{
	return v.kind != V_ABSENT;
}

/* A string, or str() of what is none; unlike str() it stays Markup. */
static Str
soft_str(Run *run, Value v)
{
	return v.kind == V_STRING ? *v.str : millm_value_str(&run->w, v);
}

static Value
string(Run *run, Str s)
{
	return millm_value_string(&run->w, s);
}

static Value
ignore_case(Run *run, Value v)
{
	return v.kind == V_STRING ? string(run, millm_str_cased(&run->w, *v.str, CASE_LOWER)) : v;
}

static Value
generator(Value list)
{
	list.kind = V_GENERATOR;
	return list;
}

/* v by a path like "function.name" or "0.x", or an integer; V_ABSENT as path: v itself.  fallback, if given, replaces undefined steps. */
static Value
by_path(Run *run, Value v, Value path, Value fallback)
{
	if (path.kind == V_ABSENT || path.kind == V_NONE)
		return v;
	if (path.kind != V_STRING)
	{
		v = millm_value_item(run, v, path);
		return v.kind == V_UNDEFINED && is_given(fallback) ? fallback : v;
	}
	for (size_t from = 0, to; from <= path.str->n; from = to + 1)
	{
		int64_t		dot = millm_str_find(*path.str, millm_str("."), from);
		Str			part;
		bool		is_number;

		to = dot < 0 ? path.str->n : (size_t) dot;
		part = millm_str_cut(*path.str, from, to);
		is_number = part.n > 0 && part.n < 18;
		for (size_t i = 0; i < part.n; i++)
			is_number = is_number && part.data[i] >= '0' && part.data[i] <= '9';
		if (is_number)
		{
			int64_t		index = 0;

			for (size_t i = 0; i < part.n; i++)
				index = index * 10 + (part.data[i] - '0');
			v = millm_value_item(run, v, millm_value_int(index));
		}
		else
			v = millm_value_item(run, v, string(run, part));
		if (v.kind == V_UNDEFINED && is_given(fallback) && fallback.kind != V_NONE)
			v = fallback;
	}
	return v;
}

/* The items at these paths as a tuple, or the item alone if there is one path; "a,b" are two. */
static Value
sort_key(Run *run, Value v, Value attribute, bool case_sensitive)
{
	Value		absent = {.kind = V_ABSENT};
	Value		parts;
	Value		keys;

	if (attribute.kind != V_STRING || millm_str_find(*attribute.str, millm_str(","), 0) < 0)
	{
		v = by_path(run, v, attribute, absent);
		return case_sensitive ? v : ignore_case(run, v);
	}
	parts = millm_str_split(&run->w, *attribute.str, &(Str) {.data = ",", .n = 1, .n_chars = 1}, -1, false);
	keys = millm_value_list(&run->w, V_LIST, parts.list->n);
	for (size_t i = 0; i < parts.list->n; i++)
	{
		Value		key = by_path(run, v, parts.list->items[i], absent);

		millm_list_add(&run->w, keys.list, case_sensitive ? key : ignore_case(run, key));
	}
	return keys;
}

/* Sort items by their keys, in place and stably: a merge sort. */
static void
merge_sort(Run *run, Value *items, Value *keys, Value *items_room, Value *keys_room, size_t n, bool reverse)
{
	size_t		half = n / 2;
	size_t		a = 0;
	size_t		b = half;

	if (n < 2)
		return;
	merge_sort(run, items, keys, items_room, keys_room, half, reverse);
	merge_sort(run, items + half, keys + half, items_room, keys_room, n - half, reverse);
	for (size_t i = 0; i < n; i++)
	{
		/* the right one goes first only if it must: equal ones keep their order */
		bool		takes_right = b < n && (a == half ||
											 (reverse ? millm_value_compare(&run->w, keys[a], keys[b]) == -1 :
											  millm_value_compare(&run->w, keys[b], keys[a]) == -1));
		size_t		from = takes_right ? b++ : a++;

		items_room[i] = items[from];
		keys_room[i] = keys[from];
	}
	memcpy(items, items_room, n * sizeof(*items));
	memcpy(keys, keys_room, n * sizeof(*keys));
}

/* A new list: items in the order of keys (as many), both left alone. */
static Value
sorted(Run *run, const List *items, const List *keys, bool reverse)
{
	size_t		n = items->n;
	Value		out = millm_value_list(&run->w, V_LIST, n);
	Value	   *room = millm_work_array(&run->w, 3 * n + 1, sizeof(*room));

	for (size_t i = 0; i < n; i++)
	{
		millm_list_add(&run->w, out.list, items->items[i]);
		room[i] = keys->items[i];
	}
	merge_sort(run, out.list->items, room, room + n, room + 2 * n, n, reverse);
	return out;
}

static List *
sort_keys(Run *run, const List *items, Value attribute, bool case_sensitive)
{
	List	   *keys = millm_value_list(&run->w, V_LIST, items->n).list;

	for (size_t i = 0; i < items->n; i++)
		millm_list_add(&run->w, keys, sort_key(run, items->items[i], attribute, case_sensitive));
	return keys;
}

/* ---- text ---- */

static Value
filter_trim(Run *run, Value v, const Value *arg, const Arguments *all)
{
	Str			s = soft_str(run, v);

	UNUSED(all);
	millm_work_pay_chars(&run->w, s.n);
	if (!is_given(arg[0]) || arg[0].kind == V_NONE)
		return string(run, millm_str_strip(s, NULL, STRIP_BOTH));
	if (arg[0].kind != V_STRING)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "what is trimmed must be str, not %s", millm_value_type(arg[0]));
	millm_work_pay(&run->w, (uint64_t) (s.n / 4 + 1) * (arg[0].str->n / 2 + 1));
	return string(run, millm_str_strip(s, arg[0].str, STRIP_BOTH));
}

#define CASE_FILTER(name, casing) \
static Value \
name(Run *run, Value v, const Value *arg, const Arguments *all) \
{ \
	UNUSED(arg); \
	UNUSED(all); \
	return string(run, millm_str_cased(&run->w, soft_str(run, v), casing)); \
}
CASE_FILTER(filter_upper, CASE_UPPER)
CASE_FILTER(filter_lower, CASE_LOWER)
CASE_FILTER(filter_capitalize, CASE_CAPITALIZE)

static Value
filter_title(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	UNUSED(all);
	return string(run, millm_str_title_words(&run->w, soft_str(run, v)));
}

static Value
filter_string(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	UNUSED(all);
	return string(run, soft_str(run, v));
}

static Value
filter_safe(Run *run, Value v, const Value *arg, const Arguments *all)
{
	Str			s = soft_str(run, v);

	UNUSED(arg);
	UNUSED(all);
	s.is_markup = true;
	return string(run, s);
}

static Value
filter_escape(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	UNUSED(all);
	return string(run, millm_str_escape(&run->w, soft_str(run, v)));
}

static Value
filter_replace(Run *run, Value v, const Value *arg, const Arguments *all)
{
	int64_t		n = is_given(arg[2]) && arg[2].kind != V_NONE ? millm_value_to_int(&run->w, arg[2], "the number of replacements") : -1;

	UNUSED(all);
	return string(run, millm_str_replace(&run->w, millm_value_str(&run->w, v), millm_value_str(&run->w, arg[0]),
										 millm_value_str(&run->w, arg[1]), n));
}

static Value
filter_indent(Run *run, Value v, const Value *arg, const Arguments *all)
{
	bool		first = millm_value_is_true(arg[1]);
	bool		blank = millm_value_is_true(arg[2]);
	Builder		b;
	const List *lines;
	Str			indention;

	UNUSED(all);
	if (v.kind != V_STRING)
	{
		millm_value_require(&run->w, v);
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "indent wants str, not %s", millm_value_type(v));
	}
	indention = arg[0].kind == V_STRING ? *arg[0].str :
		millm_str_repeat(&run->w, millm_str(" "), is_given(arg[0]) ? millm_value_to_int(&run->w, arg[0], "a width") : 4);
	/* with a newline at its end, as jinja2 does it: "" is one empty line */
	lines = millm_str_split_lines(&run->w, millm_str_concat(&run->w, *v.str, millm_str("\n")), false).list;
	millm_builder_init(&b, &run->w, MAX_STRING_BYTES);
	for (size_t i = 0; i < lines->n; i++)
	{
		Str			line = *lines->items[i].str;

		if (i > 0)
			millm_builder_add_text(&b, "\n");
		if (i == 0 ? first : blank || line.n > 0)
			millm_builder_add(&b, indention);
		millm_builder_add(&b, line);
	}
	{
		Str			s = millm_builder_str(&b);

		s.is_markup = v.str->is_markup;
		return string(run, s);
	}
}

static Value
filter_center(Run *run, Value v, const Value *arg, const Arguments *all)
{
	Value		width[2] = {is_given(arg[0]) ? arg[0] : millm_value_int(80), {.kind = V_ABSENT}};
	Arguments	args = {.values = width, .n = 1};
	Value		center = millm_value_attribute(run, string(run, soft_str(run, v)), millm_str("center"));

	UNUSED(all);
	return millm_method_call(run, center.method, &args);
}

static Value
filter_wordcount(Run *run, Value v, const Value *arg, const Arguments *all)
{
	Str			s = soft_str(run, v);
	int64_t		n = 0;
	bool		in_word = false;
	uint32_t	cp;

	UNUSED(arg);
	UNUSED(all);
	millm_work_pay_bytes(&run->w, s.n);
	for (size_t at = 0; at < s.n;)
	{
		bool		is_word;

		at += millm_utf8_get(s.data + at, &cp);
		is_word = cp == '_' || millm_unicode_is_in(cp, UM_L | UM_N);
		n += is_word && !in_word;
		in_word = is_word;
	}
	return millm_value_int(n);
}

static Value
filter_join(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	List	   *parts = millm_value_list(&run->w, V_LIST, items->n).list;
	Value		absent = {.kind = V_ABSENT};

	UNUSED(all);
	for (size_t i = 0; i < items->n; i++)
		millm_list_add(&run->w, parts, by_path(run, items->items[i], arg[1], absent));
	return string(run, millm_str_join(&run->w, is_given(arg[0]) ? millm_value_str(&run->w, arg[0]) : millm_str(""), parts));
}

/* ---- numbers ---- */

/* A whole text as a number of that base, as Python's int() reads it. */
static bool
read_int(Str s, int base, int64_t *out, bool *overflows)
{
	bool		is_negative = false;
	uint64_t	value = 0;
	size_t		at = 0;
	bool		may_underscore = false;

	*overflows = false;
	s = millm_str_strip(s, NULL, STRIP_BOTH);
	if (at < s.n && (s.data[at] == '-' || s.data[at] == '+'))
		is_negative = s.data[at++] == '-';
	if (s.n - at > 2 && s.data[at] == '0')
	{
		char		prefix = (char) (s.data[at + 1] | 0x20);

		if ((base == 16 && prefix == 'x') || (base == 8 && prefix == 'o') || (base == 2 && prefix == 'b'))
		{
			at += 2;
			may_underscore = true;
		}
	}
	if (at == s.n)
		return false;
	for (; at < s.n; at++)
	{
		char		c = s.data[at];
		int			digit = c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'z' ? (c | 0x20) - 'a' + 10 : 99;

		if (c == '_' && may_underscore && at + 1 < s.n)
		{
			may_underscore = false;
			continue;
		}
		if (digit >= base)
			return false;
		may_underscore = true;
		if (__builtin_mul_overflow(value, (uint64_t) base, &value) || __builtin_add_overflow(value, (uint64_t) digit, &value))
			*overflows = true;
	}
	if (value > (uint64_t) INT64_MAX)
		*overflows = true;
	*out = is_negative ? -(int64_t) (value & INT64_MAX) : (int64_t) (value & INT64_MAX);
	return true;
}

/* Python's float() of a text. */
static bool
read_real(Str s, double *out)
{
	char		text[512];
	char	   *end;
	size_t		n = 0;

	s = millm_str_strip(s, NULL, STRIP_BOTH);
	if (s.n == 0 || s.n >= sizeof(text))
		return false;
	for (size_t i = 0; i < s.n; i++)
	{
		char		c = s.data[i];
		bool		is_between = i > 0 && i + 1 < s.n && s.data[i - 1] >= '0' && s.data[i - 1] <= '9' && s.data[i + 1] >= '0' && s.data[i + 1] <= '9';

		if (c == '_' && is_between)
			continue;
		if (c == '\0' || !strchr("+-.0123456789eEinfatyINFATY", c))	/* nothing hexadecimal, no nan(...) */
			return false;
		text[n++] = c;
	}
	text[n] = '\0';
	*out = strtod(text, &end);
	return *end == '\0';
}

static Value
int_of_real(Run *run, double x)
{
	if (!(x >= -0x1p63 && x < 0x1p63))
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "an integer of more than 64 bits");
	return millm_value_int((int64_t) x);
}

static Value
filter_int(Run *run, Value v, const Value *arg, const Arguments *all)
{
	Value		fallback = is_given(arg[0]) ? arg[0] : millm_value_int(0);
	int64_t		base = is_given(arg[1]) ? millm_value_to_int(&run->w, arg[1], "a base") : 10;
	int64_t		i = 0;
	double		x;
	bool		overflows = false;

	UNUSED(all);
	millm_value_require(&run->w, v);
	if (base < 2 || base > 36)
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "int with a base that is not 2 to 36");
	if (v.kind == V_STRING)
		millm_work_pay_chars(&run->w, v.str->n);
	if (v.kind == V_STRING && read_int(*v.str, (int) base, &i, &overflows))
	{
		if (overflows)
			millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "an integer of more than 64 bits");
		return millm_value_int(i);
	}
	if (v.kind == V_STRING && read_real(*v.str, &x))
		return isfinite(x) ? int_of_real(run, x) : fallback;
	if (v.kind == V_FLOAT)
		return isfinite(v.real) ? int_of_real(run, v.real) : fallback;
	return millm_value_is_number(v) ? millm_value_int(v.kind == V_BOOL ? v.boolean : v.integer) : fallback;
}

static Value
filter_float(Run *run, Value v, const Value *arg, const Arguments *all)
{
	double		x;

	UNUSED(all);
	millm_value_require(&run->w, v);
	if (millm_value_is_number(v))
		return (Value) {.kind = V_FLOAT, .real = millm_value_to_real(v)};
	if (v.kind == V_STRING)
		millm_work_pay_chars(&run->w, v.str->n);
	if (v.kind == V_STRING && read_real(*v.str, &x))
		return (Value) {.kind = V_FLOAT, .real = x};
	return is_given(arg[0]) ? arg[0] : (Value) {.kind = V_FLOAT, .real = 0};
}

static void
want_number(Run *run, Value v, const char *what)
{
	millm_value_require(&run->w, v);
	if (!millm_value_is_number(v))
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "%s wants a number, not %s", what, millm_value_type(v));
}

static Value
filter_abs(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	UNUSED(all);
	want_number(run, v, "abs");
	if (v.kind == V_FLOAT)
		return (Value) {.kind = V_FLOAT, .real = fabs(v.real)};
	if (v.kind == V_BOOL)
		return millm_value_int(v.boolean);
	if (v.integer == INT64_MIN)
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "an integer of more than 64 bits");
	return millm_value_int(v.integer < 0 ? -v.integer : v.integer);
}

static Value
filter_round(Run *run, Value v, const Value *arg, const Arguments *all)
{
	int64_t		precision = is_given(arg[0]) ? millm_value_to_int(&run->w, arg[0], "a precision") : 0;
	Str			method = is_given(arg[1]) ? millm_value_str(&run->w, arg[1]) : millm_str("common");
	bool		is_common = millm_str_is(method, "common");
	char		text[400];
	double		scale;

	UNUSED(all);
	if (!is_common && !millm_str_is(method, "ceil") && !millm_str_is(method, "floor"))
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "method must be common, ceil or floor");
	want_number(run, v, "round");
	if (precision < 0 || precision > 30)
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "round to a precision that is not 0 to 30");
	if (is_common && v.kind != V_FLOAT)
		return millm_value_int(v.kind == V_BOOL ? v.boolean : v.integer);
	if (is_common)				/* half to even of the exact decimal value, as printf does it */
	{
		snprintf(text, sizeof(text), "%.*f", (int) precision, v.real);
		return (Value) {.kind = V_FLOAT, .real = strtod(text, NULL)};
	}
	scale = pow(10, (double) precision);
	v.real = millm_value_to_real(v) * scale;
	v.real = (method.data[0] == 'c' ? ceil(v.real) : floor(v.real)) / scale;
	v.kind = V_FLOAT;
	return v;
}

/* ---- sequences ---- */

static Value
filter_length(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	UNUSED(all);
	switch (v.kind)
	{
		case V_UNDEFINED:
			return millm_value_int(0);
		case V_STRING:
			return millm_value_int(v.str->n_chars);
		case V_LIST:
		case V_TUPLE:
			return millm_value_int((int64_t) v.list->n);
		case V_DICT:
			return millm_value_int((int64_t) v.dict->n);
		case V_VIEW:
			return millm_value_int((int64_t) v.view->dict->n);
		case V_RANGE:
			return millm_value_int(v.range->n);
		default:
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "object of type '%s' has no len()", millm_value_type(v));
	}
}

static Value
filter_list(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	Value		out = millm_value_list(&run->w, V_LIST, items->n);

	UNUSED(arg);
	UNUSED(all);
	for (size_t i = 0; i < items->n; i++)
		millm_list_add(&run->w, out.list, items->items[i]);
	return out;
}

static Value
filter_items(Run *run, Value v, const Value *arg, const Arguments *all)
{
	View		view = {VIEW_ITEMS, v.dict};

	UNUSED(arg);
	UNUSED(all);
	if (v.kind == V_UNDEFINED)
		return millm_value_list(&run->w, V_GENERATOR, 0);
	if (v.kind != V_DICT)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "can only get item pairs from a mapping");
	return (Value) {.kind = V_GENERATOR, .list = millm_value_iterate(&run->w, (Value) {.kind = V_VIEW, .view = &view})};
}

static Value
filter_first(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);

	UNUSED(arg);
	UNUSED(all);
	return items->n > 0 ? items->items[0] : millm_value_undefined(&run->w, NULL, millm_str("the first of an empty sequence"));
}

static Value
filter_last(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items;

	UNUSED(arg);
	UNUSED(all);
	if (v.kind == V_GENERATOR)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "'generator' object is not reversible");
	items = millm_value_iterate(&run->w, v);
	return items->n > 0 ? items->items[items->n - 1] : millm_value_undefined(&run->w, NULL, millm_str("the last of an empty sequence"));
}

static Value
filter_reverse(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items;
	Value		out;

	UNUSED(arg);
	UNUSED(all);
	if (v.kind == V_STRING)
	{
		Str			s = millm_str_reverse(&run->w, *v.str);

		s.is_markup = v.str->is_markup;
		return string(run, s);
	}
	items = millm_value_iterate(&run->w, v);
	out = millm_value_list(&run->w, V_LIST, items->n);
	for (size_t i = items->n; i > 0; i--)
		millm_list_add(&run->w, out.list, items->items[i - 1]);
	/* of what Python cannot walk backwards, jinja2 makes a list */
	return v.kind == V_GENERATOR || v.kind == V_UNDEFINED ? out : generator(out);
}

static Value
filter_sort(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);

	UNUSED(all);
	return sorted(run, items, sort_keys(run, items, arg[2], millm_value_is_true(arg[1])), millm_value_is_true(arg[0]));
}

static Value
filter_dictsort(Run *run, Value v, const Value *arg, const Arguments *all)
{
	bool		by_value = is_given(arg[1]) && arg[1].kind == V_STRING && millm_str_is(*arg[1].str, "value");
	Value		items;
	Value		keys;

	UNUSED(all);
	millm_value_require(&run->w, v);
	if (v.kind != V_DICT)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "dictsort wants a dict, not %s", millm_value_type(v));
	if (is_given(arg[1]) && !by_value && !(arg[1].kind == V_STRING && millm_str_is(*arg[1].str, "key")))
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "a dict is sorted by \"key\" or \"value\"");
	items = millm_value_list(&run->w, V_LIST, v.dict->n);
	keys = millm_value_list(&run->w, V_LIST, v.dict->n);
	for (size_t i = 0; i < v.dict->n; i++)
	{
		Value		key = by_value ? v.dict->entries[i].value : v.dict->entries[i].key;

		millm_list_add(&run->w, items.list, millm_value_pair(&run->w, v.dict->entries[i].key, v.dict->entries[i].value));
		millm_list_add(&run->w, keys.list, millm_value_is_true(arg[0]) ? key : ignore_case(run, key));
	}
	return sorted(run, items.list, keys.list, millm_value_is_true(arg[2]));
}

static Value
filter_unique(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	Value		seen = millm_value_dict(&run->w);
	Value		out = millm_value_list(&run->w, V_GENERATOR, 0);
	Value		absent = {.kind = V_ABSENT};

	UNUSED(all);
	for (size_t i = 0; i < items->n; i++)
	{
		Value		key = by_path(run, items->items[i], arg[1], absent);
		size_t		n = seen.dict->n;

		millm_dict_set(&run->w, seen.dict, millm_value_is_true(arg[0]) ? key : ignore_case(run, key), millm_value_none());
		if (seen.dict->n > n)
			millm_list_add(&run->w, out.list, items->items[i]);
	}
	return out;
}

static Value
extreme(Run *run, Value v, const Value *arg, int sign)
{
	const List *items = millm_value_iterate(&run->w, v);
	Value		absent = {.kind = V_ABSENT};
	Value		best_key = absent;
	Value		best = absent;

	for (size_t i = 0; i < items->n; i++)
	{
		Value		key = by_path(run, items->items[i], arg[1], absent);

		key = millm_value_is_true(arg[0]) ? key : ignore_case(run, key);
		if (best.kind != V_ABSENT && millm_value_compare(&run->w, key, best_key) != sign)
			continue;
		best = items->items[i];
		best_key = key;
	}
	return best.kind != V_ABSENT ? best : millm_value_undefined(&run->w, NULL, millm_str("an element of an empty sequence"));
}

static Value
filter_max(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(all);
	return extreme(run, v, arg, 1);
}

static Value
filter_min(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(all);
	return extreme(run, v, arg, -1);
}

static Value
filter_sum(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	Value		total = is_given(arg[1]) ? arg[1] : millm_value_int(0);
	Value		absent = {.kind = V_ABSENT};

	UNUSED(all);
	if (total.kind == V_STRING)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "sum() can't sum strings");
	for (size_t i = 0; i < items->n; i++)
		total = millm_value_add(run, total, by_path(run, items->items[i], arg[0], absent));
	return total;
}

static Value
filter_batch(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	int64_t		n = millm_value_to_int(&run->w, arg[0], "the size of a batch");
	Value		out = millm_value_list(&run->w, V_GENERATOR, 0);
	Value		batch = millm_value_list(&run->w, V_LIST, 0);

	UNUSED(all);
	for (size_t i = 0; i < items->n; i++)
	{
		if ((int64_t) batch.list->n == n)
		{
			millm_list_add(&run->w, out.list, batch);
			batch = millm_value_list(&run->w, V_LIST, 0);
		}
		millm_list_add(&run->w, batch.list, items->items[i]);
	}
	if (batch.list->n > 0)
	{
		while (is_given(arg[1]) && arg[1].kind != V_NONE && (int64_t) batch.list->n < n)
			millm_list_add(&run->w, batch.list, arg[1]);
		millm_list_add(&run->w, out.list, batch);
	}
	return out;
}

static Value
filter_slice(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	int64_t		n = millm_value_to_int(&run->w, arg[0], "the number of slices");
	Value		out = millm_value_list(&run->w, V_GENERATOR, 0);
	size_t		at = 0;

	UNUSED(all);
	if (n == 0)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "division by zero");
	for (int64_t k = 0; k < n; k++)
	{
		bool		is_longer = (uint64_t) k < items->n % (uint64_t) n;
		size_t		size = items->n / (uint64_t) n + is_longer;
		Value		part = millm_value_list(&run->w, V_LIST, 0);

		for (size_t i = 0; i < size; i++)
			millm_list_add(&run->w, part.list, items->items[at++]);
		if (!is_longer && is_given(arg[1]) && arg[1].kind != V_NONE)
			millm_list_add(&run->w, part.list, arg[1]);
		millm_list_add(&run->w, out.list, part);
	}
	return out;
}

static Value
filter_groupby(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items = millm_value_iterate(&run->w, v);
	bool		case_sensitive = millm_value_is_true(arg[2]);
	Value		fallback = is_given(arg[1]) ? arg[1] : (Value) {.kind = V_NONE};
	Value		keys = millm_value_list(&run->w, V_LIST, items->n);
	Value		in_order;
	Value		out = millm_value_list(&run->w, V_LIST, 0);
	Value		last = {.kind = V_ABSENT};

	UNUSED(all);
	for (size_t i = 0; i < items->n; i++)
	{
		Value		key = by_path(run, items->items[i], arg[0], fallback);

		millm_list_add(&run->w, keys.list, case_sensitive ? key : ignore_case(run, key));
	}
	in_order = sorted(run, items, keys.list, false);
	for (size_t i = 0; i < items->n; i++)
	{
		Value		item = in_order.list->items[i];
		Value		shown = by_path(run, item, arg[0], fallback);
		Value		key = case_sensitive ? shown : ignore_case(run, shown);

		if (last.kind == V_ABSENT || !millm_value_equal(&run->w, last, key))
			millm_list_add(&run->w, out.list, millm_value_pair(&run->w, shown, millm_value_list(&run->w, V_LIST, 0)));
		last = key;
		millm_list_add(&run->w, out.list->items[out.list->n - 1].list->items[1].list, item);
	}
	return out;
}

/* ---- choosing and mapping ---- */

static Str
want_name(Run *run, const Arguments *all, int i, const char *what)
{
	if (all->n <= i)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "%s lacks an argument", what);
	if (all->values[i].kind != V_STRING)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "%s wants a name", what);
	return *all->values[i].str;
}

/* select, reject, and the same by attribute.  Of what is false, none for example, nothing is chosen and nothing is checked. */
static Value
choose(Run *run, Value v, const Arguments *all, bool by_attribute, bool wanted)
{
	const List *items;
	Value		out = millm_value_list(&run->w, V_GENERATOR, 0);
	Value		absent = {.kind = V_ABSENT};
	Value		path = absent;
	const Test *test = NULL;
	Arguments	rest = *all;

	if (!millm_value_is_true(v))
		return out;
	if (by_attribute)
	{
		if (all->n == 0)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "missing parameter for attribute name");
		path = all->values[0];
		rest = millm_arguments_skip(all, 1);
	}
	if (rest.n > 0)
	{
		Str			name = want_name(run, &rest, 0, "a test");

		test = millm_test_by_name(name);
		if (!test)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "there is no test '%.*s'", name.n < 60 ? (int) name.n : 60, name.data);
		rest = millm_arguments_skip(&rest, 1);
	}
	items = millm_value_iterate(&run->w, v);
	for (size_t i = 0; i < items->n; i++)
	{
		Value		item = by_attribute ? by_path(run, items->items[i], path, absent) : items->items[i];

		millm_work_pay(&run->w, 1);
		if ((test ? millm_test_apply(run, test, item, &rest) : millm_value_is_true(item)) == wanted)
			millm_list_add(&run->w, out.list, items->items[i]);
	}
	return out;
}

static Value
filter_select(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	return choose(run, v, all, false, true);
}

static Value
filter_reject(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	return choose(run, v, all, false, false);
}

static Value
filter_selectattr(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	return choose(run, v, all, true, true);
}

static Value
filter_rejectattr(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(arg);
	return choose(run, v, all, true, false);
}

static Value
filter_map(Run *run, Value v, const Value *arg, const Arguments *all)
{
	const List *items;
	Value		out = millm_value_list(&run->w, V_GENERATOR, 0);
	Value		bound[MAX_PARAMETERS];
	const Filter *filter = NULL;
	Arguments	rest = {0};

	UNUSED(arg);
	if (!millm_value_is_true(v))
		return out;
	if (all->n == 0)
		millm_arguments_bind(run, millm_str("map"), "attribute default", 1, all, bound);
	else
	{
		Str			name = want_name(run, all, 0, "map");

		filter = millm_filter_by_name(name);
		if (!filter)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "there is no filter '%.*s'", name.n < 60 ? (int) name.n : 60, name.data);
		rest = millm_arguments_skip(all, 1);
	}
	items = millm_value_iterate(&run->w, v);
	for (size_t i = 0; i < items->n; i++)
		millm_list_add(&run->w, out.list, filter ? millm_filter_apply(run, filter, items->items[i], &rest) :
					   by_path(run, items->items[i], bound[0], is_given(bound[1]) ? bound[1] : (Value) {.kind = V_NONE}));
	return out;
}

/* ---- the rest ---- */

static Value
filter_default(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(all);
	if (v.kind != V_UNDEFINED && !(millm_value_is_true(arg[1]) && !millm_value_is_true(v)))
		return v;
	return is_given(arg[0]) ? arg[0] : millm_value_text(&run->w, "");
}

static Value
filter_attr(Run *run, Value v, const Value *arg, const Arguments *all)
{
	Value		found;

	UNUSED(all);
	if (v.kind == V_UNDEFINED)
		millm_value_require(&run->w, v);
	if (v.kind == V_DICT)		/* only what Python calls an attribute: a method */
		v = (Value) {.kind = V_DICT, .dict = v.dict};
	found = millm_value_attribute(run, v, millm_value_str(&run->w, arg[0]));
	return v.kind != V_DICT || found.kind == V_METHOD ? found :
		millm_value_undefined(&run->w, "dict", millm_value_str(&run->w, arg[0]));
}

/* json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) */
static Value
filter_tojson(Run *run, Value v, const Value *arg, const Arguments *all)
{
	JsonStyle	style = {.ensure_ascii = millm_value_is_true(arg[0]), .sort_keys = millm_value_is_true(arg[3])};

	UNUSED(all);
	style.has_indent = is_given(arg[1]) && arg[1].kind != V_NONE;
	if (style.has_indent)
		style.indent = arg[1].kind == V_STRING ? *arg[1].str :
			millm_str_repeat(&run->w, millm_str(" "), millm_value_to_int(&run->w, arg[1], "an indent"));
	style.item_separator = millm_str(style.has_indent ? "," : ", ");
	style.key_separator = millm_str(": ");
	if (is_given(arg[2]) && arg[2].kind != V_NONE)
	{
		const List *pair = millm_value_iterate(&run->w, arg[2]);

		if (pair->n != 2 || pair->items[0].kind != V_STRING || pair->items[1].kind != V_STRING)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "separators must be two strings");
		style.item_separator = *pair->items[0].str;
		style.key_separator = *pair->items[1].str;
	}
	return string(run, millm_value_tojson(&run->w, v, &style));
}

/* jinja2 has these; templates for chats have no use for them. */
static Value
filter_unsupported(Run *run, Value v, const Value *arg, const Arguments *all)
{
	UNUSED(v);
	UNUSED(arg);
	UNUSED(all);
	millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "this filter is not supported");
}

const Filter *
millm_filter_by_name(Str name)
{
	static const Filter filters[] = {
		{"abs", "", 0, filter_abs, false},
		{"attr", "name", 1, filter_attr, false},
		{"batch", "linecount fill_with", 1, filter_batch, true},
		{"capitalize", "", 0, filter_capitalize, false},
		{"center", "width", 0, filter_center, false},
		{"count", "", 0, filter_length, false},
		{"d", "default_value boolean", 0, filter_default, false},
		{"default", "default_value boolean", 0, filter_default, false},
		{"dictsort", "case_sensitive by reverse", 0, filter_dictsort, false},
		{"e", "", 0, filter_escape, false},
		{"escape", "", 0, filter_escape, false},
		{"first", "", 0, filter_first, false},
		{"float", "default", 0, filter_float, false},
		{"groupby", "attribute default case_sensitive", 1, filter_groupby, false},
		{"indent", "width first blank", 0, filter_indent, false},
		{"int", "default base", 0, filter_int, false},
		{"items", "", 0, filter_items, true},
		{"join", "d attribute", 0, filter_join, false},
		{"last", "", 0, filter_last, false},
		{"length", "", 0, filter_length, false},
		{"list", "", 0, filter_list, false},
		{"lower", "", 0, filter_lower, false},
		{"map", NULL, 0, filter_map, true},
		{"max", "case_sensitive attribute", 0, filter_max, false},
		{"min", "case_sensitive attribute", 0, filter_min, false},
		{"reject", NULL, 0, filter_reject, true},
		{"rejectattr", NULL, 0, filter_rejectattr, true},
		{"replace", "old new count", 2, filter_replace, false},
		{"reverse", "", 0, filter_reverse, false},
		{"round", "precision method", 0, filter_round, false},
		{"safe", "", 0, filter_safe, false},
		{"select", NULL, 0, filter_select, true},
		{"selectattr", NULL, 0, filter_selectattr, true},
		{"slice", "slices fill_with", 1, filter_slice, true},
		{"sort", "reverse case_sensitive attribute", 0, filter_sort, false},
		{"string", "", 0, filter_string, false},
		{"sum", "attribute start", 0, filter_sum, false},
		{"title", "", 0, filter_title, false},
		{"tojson", "ensure_ascii indent separators sort_keys", 0, filter_tojson, false},
		{"trim", "chars", 0, filter_trim, false},
		{"unique", "case_sensitive attribute", 0, filter_unique, true},
		{"upper", "", 0, filter_upper, false},
		{"wordcount", "", 0, filter_wordcount, false},
		{"filesizeformat", NULL, 0, filter_unsupported, false}, {"forceescape", NULL, 0, filter_unsupported, false},
		{"format", NULL, 0, filter_unsupported, false}, {"pprint", NULL, 0, filter_unsupported, false}, {"random", NULL, 0, filter_unsupported, false},
		{"striptags", NULL, 0, filter_unsupported, false}, {"truncate", NULL, 0, filter_unsupported, false}, {"urlencode", NULL, 0, filter_unsupported, false},
		{"urlize", NULL, 0, filter_unsupported, false}, {"wordwrap", NULL, 0, filter_unsupported, false}, {"xmlattr", NULL, 0, filter_unsupported, false},
	};

	for (size_t i = 0; i < sizeof(filters) / sizeof(filters[0]); i++)
		if (millm_str_is(name, filters[i].name))
			return &filters[i];
	return NULL;
}

/* A lazy filter that has been called and not been iterated. */
typedef struct PendingFilter
{
	Pending		pending;
	const Filter *filter;
	Value		v;
	Value		arg[MAX_PARAMETERS];
	Arguments	args;
} PendingFilter;

static List *
compute_pending(Work *w, const Pending *pending)
{
	const PendingFilter *p = (const PendingFilter *) pending;
	List	   *list;

	millm_work_enter(w);		/* chains of generators call each other */
	list = p->filter->function((Run *) w, p->v, p->arg, &p->args).list;	/* filters are run by Runs, which begin with their Work */
	millm_work_leave(w);
	return list;
}

Value
millm_filter_apply(Run *run, const Filter *filter, Value v, const Arguments *args)
{
	Value		arg[MAX_PARAMETERS] = {{0}};
	PendingFilter *p;

	millm_work_pay(&run->w, 1);
	if (filter->params)
		millm_arguments_bind(run, millm_str(filter->name), filter->params, filter->n_required, args, arg);
	if (!filter->is_lazy)
		return filter->function(run, v, arg, args);
	p = millm_work_array(&run->w, 1, sizeof(*p));
	p->pending.compute = compute_pending;
	p->filter = filter;
	p->v = v;
	p->args = *args;
	memcpy(p->arg, arg, sizeof(arg));
	v = millm_value_list(&run->w, V_GENERATOR, 0);
	v.list->pending = &p->pending;
	return v;
}
