/*
 * builtin.c -- binding of arguments, the global functions, the tests.
 */
#include "builtin.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "text.h"

#define MAX_RANGE 100000		/* jinja2's sandbox has the same */

/* ---- arguments ---- */

void
millm_arguments_bind(Run *run, Str what, const char *params, int n_required, const Arguments *args, Value out[MAX_PARAMETERS])
{
	const char *names[MAX_PARAMETERS];
	size_t		lengths[MAX_PARAMETERS];
	bool		positional_only = params[0] == '/';
	int			n = 0;

	for (const char *p = params + positional_only; *p; n++)
	{
		names[n] = p;
		lengths[n] = strcspn(p, " ");
		p += lengths[n];
		p += *p == ' ';
	}
	if (args->n > n)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "'%.*s' takes at most %d argument(s), %d given", (int) what.n, what.data, n, args->n);
	for (int i = 0; i < MAX_PARAMETERS; i++)
		out[i] = i < args->n ? args->values[i] : (Value) {.kind = V_ABSENT};
	for (int k = 0; k < args->n_keywords; k++)
	{
		Str			name = args->names[k];
		int			i = 0;

		while (i < n && (positional_only || lengths[i] != name.n || memcmp(names[i], name.data, name.n) != 0))
			i++;
		if (i == n || out[i].kind != V_ABSENT)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "'%.*s' got an unexpected or repeated keyword argument '%.*s'",
							(int) what.n, what.data, name.n < 60 ? (int) name.n : 60, name.data);
		out[i] = args->values[args->n + k];
	}
	for (int i = 0; i < n_required; i++)
		if (out[i].kind == V_ABSENT)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "'%.*s' lacks its argument '%.*s'", (int) what.n, what.data,
							(int) lengths[i], names[i]);
}

Arguments
millm_arguments_skip(const Arguments *args, int n)
{
	Arguments	rest = *args;

	rest.values += n;
	rest.n -= n;
	return rest;
}

/* ---- functions ---- */

static Value
function_range(Run *run, const Arguments *args)
{
	Value		arg[MAX_PARAMETERS];
	Range	   *range = millm_work_array(&run->w, 1, sizeof(*range));
	int64_t		stop;
	__int128	n;

	millm_arguments_bind(run, millm_str("range"), "/start stop step", 1, args, arg);
	range->start = arg[1].kind == V_ABSENT ? 0 : millm_value_to_int(&run->w, arg[0], "an argument of range");
	stop = millm_value_to_int(&run->w, arg[1].kind == V_ABSENT ? arg[0] : arg[1], "an argument of range");
	range->step = arg[2].kind == V_ABSENT ? 1 : millm_value_to_int(&run->w, arg[2], "an argument of range");
	if (range->step == 0)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "the step of range must not be zero");
	n = range->step > 0 ? ((__int128) stop - range->start + range->step - 1) / range->step :
		((__int128) range->start - stop - range->step - 1) / -(__int128) range->step;
	if (n > MAX_RANGE)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "a range of more than %d numbers", MAX_RANGE);
	range->n = n > 0 ? (int64_t) n : 0;
	return (Value) {.kind = V_RANGE, .range = range};
}

/* A dict from pairs or another dict, and keywords. */
static Value
make_dict(Run *run, const char *what, const Arguments *args)
{
	Value		v = millm_value_dict(&run->w);

	if (args->n > 1)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "%s takes at most one argument that has no name", what);
	if (args->n == 1 && args->values[0].kind == V_DICT)
	{
		const Dict *from = args->values[0].dict;

		for (size_t i = 0; i < from->n; i++)
			millm_dict_set(&run->w, v.dict, from->entries[i].key, from->entries[i].value);
	}
	else if (args->n == 1)
	{
		const List *pairs = millm_value_iterate(&run->w, args->values[0]);

		for (size_t i = 0; i < pairs->n; i++)
		{
			const List *pair = millm_value_iterate(&run->w, pairs->items[i]);

			if (pair->n != 2)
				millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "%s wants pairs, one has %zu elements", what, pair->n);
			millm_dict_set(&run->w, v.dict, pair->items[0], pair->items[1]);
		}
	}
	for (int k = 0; k < args->n_keywords; k++)
		millm_dict_set(&run->w, v.dict, millm_value_string(&run->w, args->names[k]), args->values[args->n + k]);
	return v;
}

static Value
function_dict(Run *run, const Arguments *args)
{
	return make_dict(run, "dict", args);
}

static Value
function_namespace(Run *run, const Arguments *args)
{
	Value		v = make_dict(run, "namespace", args);

	v.kind = V_NAMESPACE;
	return v;
}

/* The template's own refusal: its words are the message. */
static Value
function_raise_exception(Run *run, const Arguments *args)
{
	Value		arg[MAX_PARAMETERS];
	Str			words;
	MillmError *err = run->w.err;

	millm_arguments_bind(run, millm_str("raise_exception"), "message", 1, args, arg);
	words = millm_value_str(&run->w, arg[0]);
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the chat template refuses the conversation");
	millm_detail(err, "It says: %.*s", words.n < 900 ? (int) words.n : 900, words.data);
	run->w.err = NULL;
	millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "refused");
}

static Value
function_strftime_now(Run *run, const Arguments *args)
{
	static const char directives[] = "YmdHIMSjybBaApeDFTRCuwUWnt%hXxcGgVklPrsZz";
	Value		arg[MAX_PARAMETERS];
	Builder		b;
	struct tm	now;
	Str			format;

	millm_arguments_bind(run, millm_str("strftime_now"), "format", 1, args, arg);
	if (arg[0].kind != V_STRING)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "strftime_now wants a format");
	format = *arg[0].str;
	localtime_r(&run->now, &now);
	millm_builder_init(&b, &run->w, MAX_STRING_BYTES);
	for (size_t at = 0; at < format.n;)
	{
		const char *percent = memchr(format.data + at, '%', format.n - at);
		size_t		end = percent ? (size_t) (percent - format.data) : format.n;
		char		directive[4] = "%";
		char		text[64];
		size_t		n = 1;

		millm_builder_add(&b, millm_str_cut(format, at, end));
		at = end + 1;
		if (!percent)
			break;
		if (at < format.n && format.data[at] == '-')
			directive[n++] = format.data[at++];
		if (at >= format.n || format.data[at] == '\0' || !strchr(directives, format.data[at]))
			millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "strftime_now does not know '%%%.1s'", at < format.n ? format.data + at : "");
		directive[n] = format.data[at++];
		if (directive[n] == 'Z' || directive[n] == 'z')
			continue;			/* this time has no zone, as Python's has none */
		/* the C locale's words: this program never sets another */
		n = strftime(text, sizeof(text), directive, &now);
		millm_builder_add(&b, millm_str_of(text, n, false));
	}
	return millm_value_string(&run->w, millm_builder_str(&b));
}

const Function *
millm_function_by_name(Str name)
{
	static const Function functions[] = {
		{"range", function_range}, {"dict", function_dict}, {"namespace", function_namespace},
		{"raise_exception", function_raise_exception}, {"strftime_now", function_strftime_now},
		{"cycler", NULL}, {"joiner", NULL}, {"lipsum", NULL},
	};

	for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++)
		if (millm_str_is(name, functions[i].name))
			return &functions[i];
	return NULL;
}

/* ---- tests ---- */

static bool
is_defined(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind != V_UNDEFINED;
}

static bool
is_undefined(Run *run, Value v, const Value *arg)
{
	return !is_defined(run, v, arg);
}

static bool
is_none(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_NONE;
}

static bool
is_string(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_STRING;
}

static bool
is_boolean(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_BOOL;
}

static bool
is_true(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_BOOL && v.boolean;
}

static bool
is_false(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_BOOL && !v.boolean;
}

static bool
is_integer(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_INT;
}

static bool
is_float(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_FLOAT;
}

static bool
is_number(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return millm_value_is_number(v);
}

static bool
is_mapping(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_DICT;
}

static bool
is_sequence(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_STRING || v.kind == V_LIST || v.kind == V_TUPLE || v.kind == V_DICT || v.kind == V_RANGE || v.kind == V_UNDEFINED;
}

static bool
is_iterable(Run *run, Value v, const Value *arg)
{
	return is_sequence(run, v, arg) || v.kind == V_GENERATOR || v.kind == V_VIEW || v.kind == V_LOOP;
}

static bool
is_callable(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_FUNCTION || v.kind == V_METHOD || v.kind == V_MACRO || v.kind == V_LOOP || v.kind == V_UNDEFINED;
}

static bool
is_escaped(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_STRING && v.str->is_markup;
}

static bool
is_all(Run *run, Value v, CharClass class)
{
	Str			s = millm_value_str(&run->w, v);

	millm_work_pay_chars(&run->w, s.n);
	return millm_str_is_all(s, class);
}

static bool
is_lower(Run *run, Value v, const Value *arg)
{
	(void) arg;
	return is_all(run, v, CLASS_LOWER);
}

static bool
is_upper(Run *run, Value v, const Value *arg)
{
	(void) arg;
	return is_all(run, v, CLASS_UPPER);
}

static bool
is_divisible(Run *run, Value v, Value by)
{
	millm_value_require(&run->w, v);
	millm_value_require(&run->w, by);
	if (!millm_value_is_number(v) || !millm_value_is_number(by))
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "a %s cannot be divided by a %s", millm_value_type(v), millm_value_type(by));
	if (millm_value_to_real(by) == 0)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "division by zero");
	if (v.kind == V_FLOAT || by.kind == V_FLOAT)
		return fmod(millm_value_to_real(v), millm_value_to_real(by)) == 0;
	return millm_value_to_int(&run->w, by, "a divisor") == -1 ||
		millm_value_to_int(&run->w, v, "a dividend") % millm_value_to_int(&run->w, by, "a divisor") == 0;
}

static bool
is_divisibleby(Run *run, Value v, const Value *arg)
{
	return is_divisible(run, v, arg[0]);
}

static bool
is_even(Run *run, Value v, const Value *arg)
{
	(void) arg;
	return is_divisible(run, v, millm_value_int(2));
}

static bool
is_odd(Run *run, Value v, const Value *arg)
{
	(void) arg;
	if (v.kind == V_FLOAT)		/* v % 2 == 1, so 1.5 is neither */
		return v.real - 2 * floor(v.real / 2) == 1;
	return !is_divisible(run, v, millm_value_int(2));
}

static bool
is_sameas(Run *run, Value v, const Value *arg)
{
	(void) run;
	if (v.kind != arg->kind)
		return false;
	switch (v.kind)
	{
		case V_NONE:
			return true;
		case V_BOOL:
			return v.boolean == arg->boolean;
		case V_INT:				/* Python keeps one of each small number */
			return v.integer == arg->integer && v.integer >= -5 && v.integer <= 256;
		default:
			return v.list == arg->list;
	}
}

static bool
is_in(Run *run, Value v, const Value *arg)
{
	return millm_value_contains(&run->w, arg[0], v);
}

static bool
is_eq(Run *run, Value v, const Value *arg)
{
	return millm_value_equal(&run->w, v, arg[0]);
}

static bool
is_ne(Run *run, Value v, const Value *arg)
{
	return !millm_value_equal(&run->w, v, arg[0]);
}

static bool
is_lt(Run *run, Value v, const Value *arg)
{
	return millm_value_compare(&run->w, v, arg[0]) == -1;
}

static bool
is_gt(Run *run, Value v, const Value *arg)
{
	return millm_value_compare(&run->w, v, arg[0]) == 1;
}

static bool
is_le(Run *run, Value v, const Value *arg)
{
	int			c = millm_value_compare(&run->w, v, arg[0]);

	return c == -1 || c == 0;
}

static bool
is_ge(Run *run, Value v, const Value *arg)
{
	int			c = millm_value_compare(&run->w, v, arg[0]);

	return c == 1 || c == 0;
}

static bool
is_filter(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_STRING && millm_filter_by_name(*v.str);
}

static bool
is_test(Run *run, Value v, const Value *arg)
{
	(void) run;
	(void) arg;
	return v.kind == V_STRING && millm_test_by_name(*v.str);
}

const Test *
millm_test_by_name(Str name)
{
	static const Test tests[] = {
		{"defined", 0, is_defined}, {"undefined", 0, is_undefined}, {"none", 0, is_none}, {"string", 0, is_string},
		{"boolean", 0, is_boolean}, {"true", 0, is_true}, {"false", 0, is_false}, {"integer", 0, is_integer},
		{"float", 0, is_float}, {"number", 0, is_number}, {"mapping", 0, is_mapping}, {"sequence", 0, is_sequence},
		{"iterable", 0, is_iterable}, {"callable", 0, is_callable}, {"escaped", 0, is_escaped}, {"lower", 0, is_lower},
		{"upper", 0, is_upper}, {"even", 0, is_even}, {"odd", 0, is_odd}, {"filter", 0, is_filter}, {"test", 0, is_test},
		{"divisibleby", 1, is_divisibleby}, {"sameas", 1, is_sameas}, {"in", 1, is_in},
		{"eq", 1, is_eq}, {"==", 1, is_eq}, {"equalto", 1, is_eq}, {"ne", 1, is_ne}, {"!=", 1, is_ne},
		{"lt", 1, is_lt}, {"<", 1, is_lt}, {"lessthan", 1, is_lt}, {"gt", 1, is_gt}, {">", 1, is_gt}, {"greaterthan", 1, is_gt},
		{"le", 1, is_le}, {"<=", 1, is_le}, {"ge", 1, is_ge}, {">=", 1, is_ge},
	};

	for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
		if (millm_str_is(name, tests[i].name))
			return &tests[i];
	return NULL;
}

bool
millm_test_apply(Run *run, const Test *test, Value v, const Arguments *args)
{
	Value		arg[MAX_PARAMETERS];

	millm_work_pay(&run->w, 1);
	millm_arguments_bind(run, millm_str(test->name), test->n_arguments ? "/other" : "", test->n_arguments, args, arg);
	return test->function(run, v, arg);
}
