/*
 * lookup.c -- attributes, items, slices, and the methods of Python's str, dict and list.
 *
 * A name that Python's type has is a method even where we do not have it, for "x.items" must not become
 * the item of that name; calling such a one is refused.
 */
#include <string.h>

#include "builtin.h"
#include "text.h"
#include "unicode.h"

/* ---- helpers of the methods of str ---- */

static Str
want_string(Run *run, Value v, const char *what)
{
	if (v.kind != V_STRING)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "%s must be str, not %s", what, millm_value_type(v));
	return *v.str;
}

static Value
string(Run *run, Str s, bool is_markup)
{
	s.is_markup = is_markup;
	return millm_value_string(&run->w, s);
}

/* The part of s between two positions as Python's slices have them; *first is the character that it begins with. */
static bool
window(Run *run, Str s, Value from, Value to, Str *out, int64_t *first)
{
	int64_t		n = s.n_chars;
	int64_t		start = from.kind == V_ABSENT || from.kind == V_NONE ? 0 : millm_value_to_int(&run->w, from, "a position");
	int64_t		end = to.kind == V_ABSENT || to.kind == V_NONE ? n : millm_value_to_int(&run->w, to, "a position");

	start = start < 0 ? (start + n < 0 ? 0 : start + n) : start;
	end = end < 0 ? (end + n < 0 ? 0 : end + n) : end > n ? n : end;
	*first = start;
	if (start > end)
		return false;
	*out = millm_str_cut(s, millm_str_offset(s, (size_t) start), millm_str_offset(s, (size_t) end));
	return true;
}

static Value
strip(Run *run, Value self, const Value *arg, StripSides sides)
{
	Str			chars;

	millm_work_pay_chars(&run->w, self.str->n);
	if (arg[0].kind == V_ABSENT || arg[0].kind == V_NONE)
		return millm_value_string(&run->w, millm_str_strip(*self.str, NULL, sides));
	chars = want_string(run, arg[0], "what is stripped");
	millm_work_pay(&run->w, (uint64_t) (self.str->n / 4 + 1) * (chars.n / 2 + 1));
	return millm_value_string(&run->w, millm_str_strip(*self.str, &chars, sides));
}

static Value
str_strip(Run *run, Value self, const Value *arg)
{
	return strip(run, self, arg, STRIP_BOTH);
}

static Value
str_lstrip(Run *run, Value self, const Value *arg)
{
	return strip(run, self, arg, STRIP_LEFT);
}

static Value
str_rstrip(Run *run, Value self, const Value *arg)
{
	return strip(run, self, arg, STRIP_RIGHT);
}

static Value
split(Run *run, Value self, const Value *arg, bool from_right)
{
	int64_t		n = arg[1].kind == V_ABSENT ? -1 : millm_value_to_int(&run->w, arg[1], "maxsplit");
	Str			sep;

	if (arg[0].kind == V_ABSENT || arg[0].kind == V_NONE)
		return millm_str_split(&run->w, *self.str, NULL, n, from_right);
	sep = want_string(run, arg[0], "the separator");
	return millm_str_split(&run->w, *self.str, &sep, n, from_right);
}

static Value
str_split(Run *run, Value self, const Value *arg)
{
	return split(run, self, arg, false);
}

static Value
str_rsplit(Run *run, Value self, const Value *arg)
{
	return split(run, self, arg, true);
}

static Value
str_splitlines(Run *run, Value self, const Value *arg)
{
	millm_work_pay_chars(&run->w, self.str->n);
	return millm_str_split_lines(&run->w, *self.str, millm_value_is_true(arg[0]));
}

/* partition() and rpartition(): before, the separator, after; at < 0: it is not there. */
static Value
partition(Run *run, Str s, Str sep, bool from_right)
{
	Value		v = millm_value_list(&run->w, V_TUPLE, 3);
	int64_t		at;

	if (sep.n == 0)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "empty separator");
	millm_work_pay_bytes(&run->w, s.n);
	at = from_right ? millm_str_find_last(&run->w, s, sep) : millm_str_find(s, sep, 0);
	if (at < 0 && from_right)
		for (int i = 0; i < 2; i++)
			millm_list_add(&run->w, v.list, millm_value_text(&run->w, ""));
	millm_list_add(&run->w, v.list, millm_value_string(&run->w, at < 0 ? s : millm_str_cut(s, 0, (size_t) at)));
	if (at < 0 && !from_right)
		for (int i = 0; i < 2; i++)
			millm_list_add(&run->w, v.list, millm_value_text(&run->w, ""));
	if (at >= 0)
	{
		millm_list_add(&run->w, v.list, millm_value_string(&run->w, millm_str_cut(s, (size_t) at, (size_t) at + sep.n)));
		millm_list_add(&run->w, v.list, millm_value_string(&run->w, millm_str_cut(s, (size_t) at + sep.n, s.n)));
	}
	return v;
}

static Value
str_partition(Run *run, Value self, const Value *arg)
{
	return partition(run, *self.str, want_string(run, arg[0], "the separator"), false);
}

static Value
str_rpartition(Run *run, Value self, const Value *arg)
{
	return partition(run, *self.str, want_string(run, arg[0], "the separator"), true);
}

static bool
begins_or_ends(Str s, Str with, bool at_end)
{
	return s.n >= with.n && memcmp(at_end ? s.data + s.n - with.n : s.data, with.data, with.n) == 0;
}

static Value
affix(Run *run, Value self, const Value *arg, bool at_end)
{
	Str			s;
	int64_t		first;

	if (arg[0].kind != V_STRING && arg[0].kind != V_TUPLE)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "a prefix or suffix must be str or a tuple of str, not %s", millm_value_type(arg[0]));
	if (!window(run, *self.str, arg[1], arg[2], &s, &first))
		return millm_value_bool(false);
	if (arg[0].kind == V_STRING)
		return millm_value_bool(begins_or_ends(s, *arg[0].str, at_end));
	for (size_t i = 0; i < arg[0].list->n; i++)
		if (begins_or_ends(s, want_string(run, arg[0].list->items[i], "a prefix or suffix"), at_end))
			return millm_value_bool(true);
	return millm_value_bool(false);
}

static Value
str_startswith(Run *run, Value self, const Value *arg)
{
	return affix(run, self, arg, false);
}

static Value
str_endswith(Run *run, Value self, const Value *arg)
{
	return affix(run, self, arg, true);
}

static Value
str_removeprefix(Run *run, Value self, const Value *arg)
{
	Str			s = want_string(run, arg[0], "a prefix");

	return millm_value_string(&run->w, begins_or_ends(*self.str, s, false) ? millm_str_cut(*self.str, s.n, self.str->n) : *self.str);
}

static Value
str_removesuffix(Run *run, Value self, const Value *arg)
{
	Str			s = want_string(run, arg[0], "a suffix");

	return millm_value_string(&run->w, begins_or_ends(*self.str, s, true) ? millm_str_cut(*self.str, 0, self.str->n - s.n) : *self.str);
}

static Value
str_replace(Run *run, Value self, const Value *arg)
{
	int64_t		n = arg[2].kind == V_ABSENT ? -1 : millm_value_to_int(&run->w, arg[2], "the number of replacements");
	Str			old = want_string(run, arg[0], "what is replaced");
	Str			with = want_string(run, arg[1], "the replacement");

	if (self.str->is_markup)
	{
		old = millm_str_escape(&run->w, old);
		with = millm_str_escape(&run->w, with);
	}
	return string(run, millm_str_replace(&run->w, *self.str, old, with, n), self.str->is_markup);
}

/* find() and the like: the character, or -1. */
static int64_t
find(Run *run, Value self, const Value *arg, bool last)
{
	Str			needle = want_string(run, arg[0], "what is looked for");
	Str			s;
	int64_t		first;
	int64_t		at;

	if (!window(run, *self.str, arg[1], arg[2], &s, &first))
		return -1;
	millm_work_pay_bytes(&run->w, s.n);
	at = last ? millm_str_find_last(&run->w, s, needle) : millm_str_find(s, needle, 0);
	return at < 0 ? -1 : first + millm_str_cut(s, 0, (size_t) at).n_chars;
}

static Value
str_find(Run *run, Value self, const Value *arg)
{
	return millm_value_int(find(run, self, arg, false));
}

static Value
str_rfind(Run *run, Value self, const Value *arg)
{
	return millm_value_int(find(run, self, arg, true));
}

static Value
found_or_fail(Run *run, int64_t at)
{
	if (at < 0)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "substring not found");
	return millm_value_int(at);
}

static Value
str_index(Run *run, Value self, const Value *arg)
{
	return found_or_fail(run, find(run, self, arg, false));
}

static Value
str_rindex(Run *run, Value self, const Value *arg)
{
	return found_or_fail(run, find(run, self, arg, true));
}

static Value
str_count(Run *run, Value self, const Value *arg)
{
	Str			needle = want_string(run, arg[0], "what is counted");
	Str			s;
	int64_t		first;

	return millm_value_int(window(run, *self.str, arg[1], arg[2], &s, &first) ? millm_str_count(&run->w, s, needle) : 0);
}

static Value
str_join(Run *run, Value self, const Value *arg)
{
	const List *parts = millm_value_iterate(&run->w, arg[0]);
	bool		is_markup = self.str->is_markup;
	Builder		b;

	millm_builder_init(&b, &run->w, MAX_STRING_BYTES);
	for (size_t i = 0; i < parts->n; i++)
	{
		Str			part = want_string(run, parts->items[i], "what is joined");

		if (i > 0)
			millm_builder_add(&b, *self.str);
		millm_builder_add(&b, is_markup ? millm_str_escape(&run->w, part) : part);
	}
	return string(run, millm_builder_str(&b), is_markup);
}

static Value
str_upper(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return millm_value_string(&run->w, millm_str_cased(&run->w, *self.str, CASE_UPPER));
}

static Value
str_lower(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return millm_value_string(&run->w, millm_str_cased(&run->w, *self.str, CASE_LOWER));
}

static Value
str_capitalize(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return millm_value_string(&run->w, millm_str_cased(&run->w, *self.str, CASE_CAPITALIZE));
}

static Value
str_title(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return millm_value_string(&run->w, millm_str_cased(&run->w, *self.str, CASE_TITLE));
}

static Value
str_swapcase(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return millm_value_string(&run->w, millm_str_cased(&run->w, *self.str, CASE_SWAP));
}

#define CLASS_METHOD(name, class) \
static Value \
name(Run *run, Value self, const Value *arg) \
{ \
	(void) run; \
	(void) arg; \
	millm_work_pay_chars(&run->w, self.str->n); \
	return millm_value_bool(millm_str_is_all(*self.str, class)); \
}
CLASS_METHOD(str_isalpha, CLASS_ALPHA)
CLASS_METHOD(str_isalnum, CLASS_ALNUM)
CLASS_METHOD(str_isdigit, CLASS_DIGIT)
CLASS_METHOD(str_isdecimal, CLASS_DECIMAL)
CLASS_METHOD(str_isnumeric, CLASS_NUMERIC)
CLASS_METHOD(str_isspace, CLASS_SPACE)
CLASS_METHOD(str_isupper, CLASS_UPPER)
CLASS_METHOD(str_islower, CLASS_LOWER)

static Value
justify(Run *run, Value self, const Value *arg, int64_t left_half, int64_t right_half)
{
	int64_t		width = millm_value_to_int(&run->w, arg[0], "a width");
	Str			fill = arg[1].kind == V_ABSENT ? millm_str(" ") : want_string(run, arg[1], "the fill character");
	int64_t		missing = width > self.str->n_chars ? width - self.str->n_chars : 0;
	int64_t		left = left_half && right_half ? missing / 2 + (missing & width & 1) : left_half ? missing : 0;
	Str			s;

	if (fill.n_chars != 1)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "the fill character must be one character long");
	s = millm_str_concat(&run->w, millm_str_repeat(&run->w, fill, left), *self.str);
	s = millm_str_concat(&run->w, s, millm_str_repeat(&run->w, fill, missing - left));
	return string(run, s, self.str->is_markup);
}

static Value
str_center(Run *run, Value self, const Value *arg)
{
	return justify(run, self, arg, 1, 1);
}

static Value
str_ljust(Run *run, Value self, const Value *arg)
{
	return justify(run, self, arg, 0, 1);
}

static Value
str_rjust(Run *run, Value self, const Value *arg)
{
	return justify(run, self, arg, 1, 0);
}

static const MethodRow str_methods[] = {
	{"strip", "/chars", 0, str_strip, false}, {"lstrip", "/chars", 0, str_lstrip, false}, {"rstrip", "/chars", 0, str_rstrip, false},
	{"split", "sep maxsplit", 0, str_split, false}, {"rsplit", "sep maxsplit", 0, str_rsplit, false},
	{"splitlines", "keepends", 0, str_splitlines, false},
	{"partition", "/sep", 1, str_partition, false}, {"rpartition", "/sep", 1, str_rpartition, false},
	{"startswith", "/prefix start end", 1, str_startswith, false}, {"endswith", "/suffix start end", 1, str_endswith, false},
	{"removeprefix", "/prefix", 1, str_removeprefix, false}, {"removesuffix", "/suffix", 1, str_removesuffix, false},
	{"replace", "/old new count", 2, str_replace, false}, {"join", "/iterable", 1, str_join, false},
	{"find", "/sub start end", 1, str_find, false}, {"rfind", "/sub start end", 1, str_rfind, false},
	{"index", "/sub start end", 1, str_index, false}, {"rindex", "/sub start end", 1, str_rindex, false},
	{"count", "/sub start end", 1, str_count, false},
	{"upper", "", 0, str_upper, false}, {"lower", "", 0, str_lower, false}, {"capitalize", "", 0, str_capitalize, false},
	{"title", "", 0, str_title, false}, {"swapcase", "", 0, str_swapcase, false},
	{"isalpha", "", 0, str_isalpha, false}, {"isalnum", "", 0, str_isalnum, false}, {"isdigit", "", 0, str_isdigit, false},
	{"isdecimal", "", 0, str_isdecimal, false}, {"isnumeric", "", 0, str_isnumeric, false}, {"isspace", "", 0, str_isspace, false},
	{"isupper", "", 0, str_isupper, false}, {"islower", "", 0, str_islower, false},
	{"center", "/width fillchar", 1, str_center, false}, {"ljust", "/width fillchar", 1, str_ljust, false},
	{"rjust", "/width fillchar", 1, str_rjust, false},
	{.name = "format"}, {.name = "format_map"}, {.name = "encode"}, {.name = "expandtabs"}, {.name = "casefold"}, {.name = "translate"},
	{.name = "maketrans"}, {.name = "isascii"}, {.name = "isidentifier"}, {.name = "isprintable"}, {.name = "istitle"}, {.name = "zfill"},
};

/* ---- dict, list, tuple ---- */

static Value
view(Run *run, Value self, ViewKind kind)
{
	View	   *v = millm_work_alloc(&run->w, sizeof(*v));

	*v = (View) {kind, self.dict};
	return (Value) {.kind = V_VIEW, .view = v};
}

static Value
dict_items(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return view(run, self, VIEW_ITEMS);
}

static Value
dict_keys(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return view(run, self, VIEW_KEYS);
}

static Value
dict_values(Run *run, Value self, const Value *arg)
{
	(void) arg;
	return view(run, self, VIEW_VALUES);
}

static Value
dict_get(Run *run, Value self, const Value *arg)
{
	const Value *found;

	if (arg[0].kind == V_LIST || arg[0].kind == V_DICT)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "unhashable type: '%s'", millm_value_type(arg[0]));
	found = millm_dict_get(&run->w, self.dict, arg[0]);
	return found ? *found : arg[1].kind == V_ABSENT ? millm_value_none() : arg[1];
}

static Value
copy(Run *run, Value self, const Value *arg)
{
	(void) run;
	(void) arg;
	return self;				/* nothing can change it */
}

static const MethodRow dict_methods[] = {
	{"items", "", 0, dict_items, false}, {"keys", "", 0, dict_keys, false}, {"values", "", 0, dict_values, false},
	{"get", "/key default", 1, dict_get, false}, {"copy", "", 0, copy, false}, {.name = "fromkeys"},
	{.name = "update", .mutates = true}, {.name = "pop", .mutates = true}, {.name = "setdefault", .mutates = true},
	{.name = "clear", .mutates = true}, {.name = "popitem", .mutates = true},
};

static Value
list_index(Run *run, Value self, const Value *arg)
{
	for (size_t i = 0; i < self.list->n; i++)
		if (millm_value_equal(&run->w, self.list->items[i], arg[0]))
			return millm_value_int((int64_t) i);
	millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "what index() looks for is not in the list");
}

static Value
list_count(Run *run, Value self, const Value *arg)
{
	int64_t		n = 0;

	for (size_t i = 0; i < self.list->n; i++)
		n += millm_value_equal(&run->w, self.list->items[i], arg[0]);
	return millm_value_int(n);
}

static const MethodRow list_methods[] = {
	{"index", "/value", 1, list_index, false}, {"count", "/value", 1, list_count, false}, {"copy", "", 0, copy, false},
	{.name = "append", .mutates = true}, {.name = "pop", .mutates = true}, {.name = "insert", .mutates = true},
	{.name = "extend", .mutates = true}, {.name = "remove", .mutates = true}, {.name = "sort", .mutates = true},
	{.name = "reverse", .mutates = true}, {.name = "clear", .mutates = true},
};

#define N_LIST_METHODS_OF_TUPLE 2	/* the first ones */
#define N_OF(array) (sizeof(array) / sizeof((array)[0]))

Value
millm_method_call(Run *run, const Method *method, const Arguments *args)
{
	const MethodRow *row = method->row;
	Value		arg[MAX_PARAMETERS];

	millm_work_pay(&run->w, 1);
	if (row->mutates)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "the sandbox does not allow %s() of a %s", row->name, millm_value_type(method->self));
	if (!row->function)
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "%s() of a %s is not supported", row->name, millm_value_type(method->self));
	millm_arguments_bind(run, millm_str(row->name), row->params, row->n_required, args, arg);
	return row->function(run, method->self, arg);
}

/* Python's numbers have these, which no template uses; saying that they are undefined would be wrong. */
static bool
is_number_attribute(Str name)
{
	static const char *const names[] = {
		"real", "imag", "numerator", "denominator", "conjugate", "bit_length", "bit_count", "as_integer_ratio", "to_bytes", "from_bytes",
		"is_integer", "hex", "fromhex",
	};

	for (size_t i = 0; i < N_OF(names); i++)
		if (millm_str_is(name, names[i]))
			return true;
	return false;
}

/* A bound method; V_ABSENT: the type has none of that name. */
static Value
find_method(Run *run, Value v, Str name)
{
	const MethodRow *rows = NULL;
	size_t		n = 0;

	if (v.kind == V_STRING)
		rows = str_methods, n = N_OF(str_methods);
	else if (v.kind == V_DICT)
		rows = dict_methods, n = N_OF(dict_methods);
	else if (v.kind == V_LIST)
		rows = list_methods, n = N_OF(list_methods);
	else if (v.kind == V_TUPLE)
		rows = list_methods, n = N_LIST_METHODS_OF_TUPLE;
	else if (millm_value_is_number(v) && is_number_attribute(name))
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "'%.*s' of a number is not supported", (int) name.n, name.data);
	else if (v.kind == V_LOOP)
		return millm_loop_attribute(run, v.loop, name);
	for (size_t i = 0; i < n; i++)
		if (millm_str_is(name, rows[i].name))
		{
			Method	   *method = millm_work_alloc(&run->w, sizeof(*method));

			*method = (Method) {v, &rows[i]};
			return (Value) {.kind = V_METHOD, .method = method};
		}
	if (v.kind == V_NAMESPACE)
	{
		const Value *found = millm_dict_get_str(&run->w, v.dict, name);

		if (found)
			return *found;
	}
	return (Value) {.kind = V_ABSENT};
}

/* ---- attributes and items ---- */

/* v[key]; V_ABSENT when Python would raise. */
static Value
find_item(Run *run, Value v, Value key)
{
	int64_t		i;
	int64_t		n = v.kind == V_STRING ? v.str->n_chars : v.kind == V_RANGE ? v.range->n :
		v.kind == V_LIST || v.kind == V_TUPLE ? (int64_t) v.list->n : -1;

	if (v.kind == V_DICT && key.kind != V_LIST && key.kind != V_DICT)
	{
		const Value *found = millm_dict_get(&run->w, v.dict, key);

		if (found)
			return *found;
	}
	if (n < 0 || (key.kind != V_INT && key.kind != V_BOOL))
		return (Value) {.kind = V_ABSENT};
	i = key.kind == V_BOOL ? key.boolean : key.integer;
	if (i < 0 && i >= -n)
		i += n;
	if (i < 0 || i >= n)
		return (Value) {.kind = V_ABSENT};
	if (v.kind == V_RANGE)
		return millm_value_int(v.range->start + i * v.range->step);
	if (v.kind == V_STRING)
	{
		size_t		at = millm_str_offset(*v.str, (size_t) i);
		uint32_t	cp;

		millm_work_pay_bytes(&run->w, v.str->n_chars == v.str->n ? 0 : at);
		return millm_value_string(&run->w, millm_str_cut(*v.str, at, at + millm_utf8_get(v.str->data + at, &cp)));
	}
	return v.list->items[i];
}

static Value
missing(Run *run, Value v, Str name)
{
	return millm_value_undefined(&run->w, millm_value_type(v), name);
}

Value
millm_value_attribute(Run *run, Value v, Str name)
{
	Value		found;

	millm_value_require(&run->w, v);
	found = find_method(run, v, name);
	if (found.kind == V_ABSENT && v.kind == V_DICT)
		found = find_item(run, v, (Value) {.kind = V_STRING, .str = &name});
	return found.kind == V_ABSENT ? missing(run, v, name) : found;
}

Value
millm_value_item(Run *run, Value v, Value key)
{
	Value		found;

	millm_value_require(&run->w, v);
	found = find_item(run, v, key);
	if (found.kind == V_ABSENT && key.kind == V_STRING)
		found = find_method(run, v, *key.str);
	if (found.kind != V_ABSENT)
		return found;
	return missing(run, v, key.kind == V_STRING || key.kind == V_INT ? millm_value_str(&run->w, key) : millm_str("that element"));
}

/* ---- slices ---- */

static bool
is_index(Value v)
{
	return v.kind == V_ABSENT || v.kind == V_NONE || v.kind == V_INT || v.kind == V_BOOL;
}

/* A bound, brought into 0..n, or -1..n-1 when going backwards. */
static int64_t
bound(Value v, int64_t n, bool backwards, int64_t fallback)
{
	int64_t		low = backwards ? -1 : 0;
	int64_t		high = backwards ? n - 1 : n;
	int64_t		i;

	if (v.kind == V_ABSENT || v.kind == V_NONE)
		return fallback;
	i = v.kind == V_BOOL ? v.boolean : v.integer;
	if (i < 0)
		i = i < -n ? low : i + n;
	return i < low ? low : i > high ? high : i;
}

Value
millm_value_slice(Run *run, Value v, Value from, Value to, Value step)
{
	int64_t		by = step.kind == V_INT ? step.integer : step.kind == V_BOOL ? step.boolean : 1;
	int64_t		n = v.kind == V_STRING ? v.str->n_chars : v.kind == V_RANGE ? v.range->n :
		v.kind == V_LIST || v.kind == V_TUPLE ? (int64_t) v.list->n : -1;
	int64_t		start;
	int64_t		end;
	uint64_t	stride;
	uint64_t	count = 0;
	Value		out;

	millm_value_require(&run->w, v);
	if (n < 0 || !is_index(from) || !is_index(to) || !is_index(step))
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "this slice of '%s' is not possible", millm_value_type(v));
	if (by == 0)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "the step of a slice cannot be zero");
	start = bound(from, n, by < 0, by < 0 ? n - 1 : 0);
	end = bound(to, n, by < 0, by < 0 ? -1 : n);
	stride = by < 0 ? 0 - (uint64_t) by : (uint64_t) by;
	if (by > 0 ? start < end : start > end)
		count = ((uint64_t) (by > 0 ? end - start : start - end) + stride - 1) / stride;
	if (v.kind == V_RANGE)
	{
		Range	   *range = millm_work_alloc(&run->w, sizeof(*range));

		if (count <= 1)
			by = 1;				/* it does not matter, and cannot overflow */
		*range = (Range) {v.range->start + start * v.range->step, v.range->step * by, (int64_t) count};
		return (Value) {.kind = V_RANGE, .range = range};
	}
	if (v.kind == V_STRING)
	{
		Builder		b;
		Str			s = *v.str;

		millm_work_pay_bytes(&run->w, s.n);
		if (by == 1)
			return millm_value_string(&run->w, count == 0 ? millm_str_cut(s, 0, 0) :
									  millm_str_cut(s, millm_str_offset(s, (size_t) start), millm_str_offset(s, (size_t) end)));
		{
			const List *chars = millm_value_iterate(&run->w, v);

			millm_builder_init(&b, &run->w, MAX_STRING_BYTES);
			for (uint64_t i = 0; i < count; i++, start += i < count ? by : 0)
				millm_builder_add(&b, *chars->items[start].str);
		}
		return string(run, millm_builder_str(&b), s.is_markup);
	}
	out = millm_value_list(&run->w, v.kind, (size_t) count);
	for (uint64_t i = 0; i < count; i++, start += i < count ? by : 0)
		millm_list_add(&run->w, out.list, v.list->items[start]);
	return out;
}
