/*
 * eval.c -- the tree, run: statements write text, expressions have values.
 *
 * Names live in frames, one for each scope: the template, each round of a loop, each call of a macro, each block whose
 * text is captured.  Reading goes outward, set writes the innermost.  An if has no scope.  A macro's frame
 * lies within the one where the macro was defined.
 */
#include "eval.h"

#include <math.h>
#include <string.h>

#include "builtin.h"
#include "text.h"

typedef struct Slot
{
	const Name *name;
	Value		value;
} Slot;

struct Frame
{
	Frame	   *parent;
	Slot	   *slots;
	int			n;
	int			capacity;
};

struct Macro
{
	const Name *name;
	const MacroSyntax *syntax;
	const Node *body;
	Frame	   *frame;			/* of its definition */
};

struct Loop
{
	const Node *node;
	const List *candidates;
	size_t		next_candidate;
	List	   *kept;			/* those that the condition lets through, as far as it has been asked */
	size_t		index;			/* of the present one in kept */
	int			depth;
	Frame	   *outer;
	Value		changed;		/* what changed() was last asked, a tuple */
};

typedef enum Flow { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE } Flow;

static Value evaluate(Run *run, const Node *node);
static Flow execute(Run *run, const Node *body);

/* ---- frames ---- */

static Frame *
push_frame(Run *run, Frame *parent)
{
	Frame	   *outer = run->frame;

	run->frame = millm_work_array(&run->w, 1, sizeof(Frame));
	run->frame->parent = parent;
	return outer;
}

static void
set_name(Run *run, Frame *frame, const Name *name, Value v)
{
	for (int i = 0; i < frame->n; i++)
		if (frame->slots[i].name == name)
		{
			frame->slots[i].value = v;
			return;
		}
	if (frame->n == frame->capacity)
	{
		int			capacity = frame->capacity ? frame->capacity * 2 : 4;
		Slot	   *slots = millm_work_array(&run->w, (size_t) capacity, sizeof(*slots));

		if (frame->n > 0)
			memcpy(slots, frame->slots, (size_t) frame->n * sizeof(*slots));
		frame->slots = slots;
		frame->capacity = capacity;
	}
	frame->slots[frame->n++] = (Slot) {name, v};
}

static Value
get_name(Run *run, const Name *name)
{
	const Function *function;

	for (const Frame *frame = run->frame; frame; frame = frame->parent)
	{
		millm_work_pay(&run->w, 1);
		for (int i = 0; i < frame->n; i++)
			if (frame->slots[i].name == name)
				return frame->slots[i].value;
	}
	function = millm_function_by_name(name->text);
	if (function)
		return (Value) {.kind = V_FUNCTION, .function = function};
	return millm_value_undefined(&run->w, NULL, name->text);
}

/* ---- arithmetic ---- */

static void __attribute__((noreturn))
no_operation(Run *run, const char *op, Value a, Value b)
{
	millm_value_require(&run->w, a);
	millm_value_require(&run->w, b);
	millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "'%s' cannot work on '%s' and '%s'", op, millm_value_type(a), millm_value_type(b));
}

static void __attribute__((noreturn))
overflow(Run *run)
{
	millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "an integer of more than 64 bits");
}

static Value
integer_power(Run *run, int64_t base, int64_t exponent)
{
	int64_t		result = 1;

	/* beyond that, all but these overflow */
	if (exponent > 64)
	{
		if (base == 0 || base == 1)
			return millm_value_int(base);
		if (base == -1)
			return millm_value_int(exponent % 2 ? -1 : 1);
		overflow(run);
	}
	while (exponent-- > 0)
		if (__builtin_mul_overflow(result, base, &result))
			overflow(run);
	return millm_value_int(result);
}

static Value
integer_operation(Run *run, Operator op, int64_t a, int64_t b)
{
	int64_t		result = 0;
	bool		overflows = false;

	if (op == OP_ADD)
		overflows = __builtin_add_overflow(a, b, &result);
	else if (op == OP_SUB)
		overflows = __builtin_sub_overflow(a, b, &result);
	else if (op == OP_MUL)
		overflows = __builtin_mul_overflow(a, b, &result);
	else if (op == OP_POW)
		return integer_power(run, a, b);
	else if (b == -1)			/* INT64_MIN / -1 */
		overflows = op == OP_FLOORDIV && __builtin_sub_overflow(0, a, &result);
	else
	{
		int64_t		quotient = a / b;
		int64_t		rest = a % b;
		bool		rounds = rest != 0 && (rest < 0) != (b < 0);

		result = op == OP_FLOORDIV ? quotient - rounds : rounds ? rest + b : rest;
	}
	if (overflows)
		overflow(run);
	return millm_value_int(result);
}

static Value
real_operation(Run *run, Operator op, double a, double b)
{
	double		result;

	switch (op)
	{
		case OP_ADD:
			result = a + b;
			break;
		case OP_SUB:
			result = a - b;
			break;
		case OP_MUL:
			result = a * b;
			break;
		case OP_DIV:
			result = a / b;
			break;
		case OP_POW:
			result = pow(a, b);
			if (a == 0 && b < 0)
				millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "0.0 cannot be raised to a negative power");
			if (isnan(result) && !isnan(a) && !isnan(b))
				millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "a complex number");
			if (isinf(result) && !isinf(a) && !isinf(b))
				millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "result too large");
			break;
		default:				/* // and %: Python's, by way of the remainder */
			result = fmod(a, b);
			if (result != 0 && (b < 0) != (result < 0))
				result += b;
			else if (result == 0)
				result = copysign(0, b);
			if (op == OP_FLOORDIV)
			{
				double		quotient = (a - result) / b;
				double		whole = floor(quotient);

				result = quotient == 0 ? copysign(0, a / b) : quotient - whole > 0.5 ? whole + 1 : whole;
			}
	}
	return (Value) {.kind = V_FLOAT, .real = result};
}

static Value
add_lists(Run *run, Value a, Value b)
{
	Value		v = millm_value_list(&run->w, a.kind, a.list->n + b.list->n);

	for (size_t i = 0; i < a.list->n; i++)
		millm_list_add(&run->w, v.list, a.list->items[i]);
	for (size_t i = 0; i < b.list->n; i++)
		millm_list_add(&run->w, v.list, b.list->items[i]);
	return v;
}

static Value
repeat(Run *run, Value v, int64_t n)
{
	Value		out;

	if (v.kind == V_STRING)
	{
		Str			s = millm_str_repeat(&run->w, *v.str, n);

		s.is_markup = v.str->is_markup;
		return millm_value_string(&run->w, s);
	}
	if (n < 0 || v.list->n == 0)
		n = 0;
	if (n > 0 && (uint64_t) n > MAX_ITEMS / v.list->n)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "a list of more than %u elements", MAX_ITEMS);
	out = millm_value_list(&run->w, v.kind, (size_t) n * v.list->n);
	for (; n > 0; n--)
		for (size_t i = 0; i < v.list->n; i++)
			millm_list_add(&run->w, out.list, v.list->items[i]);
	return out;
}

static bool
is_sequence(Value v)
{
	return v.kind == V_STRING || v.kind == V_LIST || v.kind == V_TUPLE;
}

static Value
binary(Run *run, Operator op, Value a, Value b)
{
	static const char *const signs[] = {"+", "-", "*", "/", "//", "%", "**"};

	if (millm_value_is_number(a) && millm_value_is_number(b))
	{
		bool		divides = op == OP_DIV || op == OP_FLOORDIV || op == OP_MOD;

		if (divides && millm_value_to_real(b) == 0)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "division by zero");
		if (a.kind == V_FLOAT || b.kind == V_FLOAT || op == OP_DIV || (op == OP_POW && millm_value_to_real(b) < 0))
			return real_operation(run, op, millm_value_to_real(a), millm_value_to_real(b));
		return integer_operation(run, op, a.kind == V_BOOL ? a.boolean : a.integer, b.kind == V_BOOL ? b.boolean : b.integer);
	}
	if (op == OP_ADD && a.kind == V_STRING && b.kind == V_STRING)
	{
		bool		is_markup = a.str->is_markup || b.str->is_markup;
		Str			s = millm_str_concat(&run->w, is_markup ? millm_str_escape(&run->w, *a.str) : *a.str,
										 is_markup ? millm_str_escape(&run->w, *b.str) : *b.str);

		s.is_markup = is_markup;
		return millm_value_string(&run->w, s);
	}
	if (op == OP_ADD && a.kind == b.kind && (a.kind == V_LIST || a.kind == V_TUPLE))
		return add_lists(run, a, b);
	if (op == OP_MUL && is_sequence(a) && (b.kind == V_INT || b.kind == V_BOOL))
		return repeat(run, a, b.kind == V_BOOL ? b.boolean : b.integer);
	if (op == OP_MUL && is_sequence(b) && (a.kind == V_INT || a.kind == V_BOOL))
		return repeat(run, b, a.kind == V_BOOL ? a.boolean : a.integer);
	if (op == OP_MOD && a.kind == V_STRING)
		millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "formatting with %%");
	no_operation(run, signs[op], a, b);
}

Value
millm_value_add(Run *run, Value a, Value b)
{
	return binary(run, OP_ADD, a, b);
}

static bool
compare(Run *run, Operator op, Value a, Value b)
{
	int			c;

	switch (op)
	{
		case OP_EQ:
			return millm_value_equal(&run->w, a, b);
		case OP_NE:
			return !millm_value_equal(&run->w, a, b);
		case OP_IN:
			return millm_value_contains(&run->w, b, a);
		case OP_NOT_IN:
			return !millm_value_contains(&run->w, b, a);
		default:
			c = millm_value_compare(&run->w, a, b);
	}
	return op == OP_LT ? c == -1 : op == OP_GT ? c == 1 : op == OP_LE ? c == -1 || c == 0 : c == 1 || c == 0;
}

static Value
evaluate_comparison(Run *run, const Node *node)
{
	Value		left = evaluate(run, node->a);

	for (const Node *operand = node->list; operand; operand = operand->next)
	{
		Value		right = evaluate(run, operand->a);

		run->w.line = node->line;
		if (!compare(run, operand->op, left, right))
			return millm_value_bool(false);
		left = right;
	}
	return millm_value_bool(true);
}

static Value
evaluate_sign(Run *run, const Node *node)
{
	Value		v = evaluate(run, node->a);

	run->w.line = node->line;
	millm_value_require(&run->w, v);
	if (!millm_value_is_number(v))
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "a sign cannot stand before a %s", millm_value_type(v));
	if (v.kind == V_BOOL)
		v = millm_value_int(v.boolean);
	if (node->kind == N_POS)
		return v;
	if (v.kind == V_FLOAT)
		v.real = -v.real;
	else if (__builtin_sub_overflow(0, v.integer, &v.integer))
		overflow(run);
	return v;
}

static Value
evaluate_concat(Run *run, const Node *node)
{
	Builder		b;

	millm_builder_init(&b, &run->w, MAX_STRING_BYTES);
	for (const Node *part = node->list; part; part = part->next)
	{
		Value		v = evaluate(run, part);

		millm_builder_add(&b, millm_value_str(&run->w, v));
	}
	return millm_value_string(&run->w, millm_builder_str(&b));
}

/* ---- calls ---- */

static void
add_keyword(Run *run, Arguments *args, const List *values, Str name, Value v)
{
	for (int i = 0; i < args->n_keywords; i++)
		if (millm_str_equal(args->names[i], name))
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "the keyword argument '%.*s' is given twice", (int) name.n, name.data);
	if (args->n_keywords == MAX_ARGUMENTS)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "more than %d arguments", MAX_ARGUMENTS);
	args->names[args->n_keywords++] = name;
	millm_list_add(&run->w, (List *) values, v);
}

static Arguments
evaluate_arguments(Run *run, const Node *list)
{
	Arguments	args = {0};
	List	   *values;

	if (!list)
		return args;
	values = millm_value_list(&run->w, V_LIST, 0).list;
	/* an unpacked tuple may follow keywords, but goes before them */
	for (const Node *arg = list; arg; arg = arg->next)
	{
		if (arg->kind == N_SPREAD)
		{
			const List *more = millm_value_iterate(&run->w, evaluate(run, arg->a));

			for (size_t i = 0; i < more->n; i++)
				millm_list_add(&run->w, values, more->items[i]);
		}
		else if (arg->kind != N_KEYWORD && arg->kind != N_SPREAD_KEYWORDS)
			millm_list_add(&run->w, values, evaluate(run, arg));
	}
	if (values->n > MAX_ARGUMENTS)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "more than %d arguments", MAX_ARGUMENTS);
	args.n = (int) values->n;
	for (const Node *arg = list; arg; arg = arg->next)
	{
		if (arg->kind != N_KEYWORD && arg->kind != N_SPREAD_KEYWORDS)
			continue;
		if (!args.names)
			args.names = millm_work_array(&run->w, MAX_ARGUMENTS, sizeof(Str));
		if (arg->kind == N_KEYWORD)
			add_keyword(run, &args, values, arg->name->text, evaluate(run, arg->a));
		else
		{
			Value		more = evaluate(run, arg->a);

			if (more.kind != V_DICT)
				millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "argument after ** must be a mapping, not %s", millm_value_type(more));
			for (size_t i = 0; i < more.dict->n; i++)
			{
				if (more.dict->entries[i].key.kind != V_STRING)
					millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "keywords must be strings");
				add_keyword(run, &args, values, *more.dict->entries[i].key.str, more.dict->entries[i].value);
			}
		}
	}
	args.values = values->items;
	return args;
}

/* Run body in the present frame; its text is the value. */
static Str
capture(Run *run, const Node *body, Flow *flow)
{
	Builder		text;
	Builder    *outer = run->out;

	millm_builder_init(&text, &run->w, MAX_STRING_BYTES);
	run->out = &text;
	*flow = execute(run, body);
	run->out = outer;
	return millm_builder_str(&text);
}

static Value
call_macro(Run *run, const Macro *macro, const Arguments *args)
{
	const MacroSyntax *syntax = macro->syntax;
	Work	   *w = &run->w;
	Frame	   *outer;
	Value		given[MAX_ARGUMENTS];
	Value		rest = millm_value_list(w, V_TUPLE, 0);
	Value		keywords = millm_value_dict(w);
	Value		caller = {.kind = V_ABSENT};
	Flow		flow;
	Str			text;
	int			line = w->line;

	millm_work_enter(w);
	for (int i = 0; i < syntax->n; i++)
		given[i] = i < args->n ? args->values[i] : (Value) {.kind = V_ABSENT};
	for (int i = syntax->n; i < args->n; i++)
		millm_list_add(w, rest.list, args->values[i]);
	for (int k = 0; k < args->n_keywords; k++)
	{
		Value		v = args->values[args->n + k];
		int			i = args->n < syntax->n ? args->n : syntax->n;

		while (i < syntax->n && !millm_str_equal(syntax->names[i]->text, args->names[k]))
			i++;
		if (i < syntax->n)
			given[i] = v;
		else if (syntax->uses_caller && millm_str_is(args->names[k], "caller"))
			caller = v;
		else
			millm_dict_set(w, keywords.dict, millm_value_string(w, args->names[k]), v);
	}
	if (rest.list->n > 0 && !syntax->uses_varargs)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "macro '%.*s' takes not more than %d argument(s)",
						(int) macro->name->text.n, macro->name->text.data, syntax->n);
	if (keywords.dict->n > 0 && !syntax->uses_kwargs)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "macro '%.*s' takes no keyword argument '%.*s'",
						(int) macro->name->text.n, macro->name->text.data,
						(int) keywords.dict->entries[0].key.str->n, keywords.dict->entries[0].key.str->data);
	outer = push_frame(run, macro->frame);
	for (int i = 0; i < syntax->n; i++)
	{
		if (given[i].kind == V_ABSENT)
		{
			Undefined  *u = millm_work_array(w, 1, sizeof(*u));

			u->hint = "a parameter was not provided";
			given[i] = syntax->defaults[i] ? evaluate(run, syntax->defaults[i]) : (Value) {.kind = V_UNDEFINED, .undefined = u};
		}
		set_name(run, run->frame, syntax->names[i], given[i]);
	}
	if (syntax->uses_caller)
		set_name(run, run->frame, millm_template_name(run->t, millm_str("caller")),
				 caller.kind != V_ABSENT ? caller : millm_value_undefined(w, NULL, millm_str("caller")));
	if (syntax->uses_varargs)
		set_name(run, run->frame, millm_template_name(run->t, millm_str("varargs")), rest);
	if (syntax->uses_kwargs)
		set_name(run, run->frame, millm_template_name(run->t, millm_str("kwargs")), keywords);
	text = capture(run, macro->body, &flow);
	run->frame = outer;
	w->line = line;
	millm_work_leave(w);
	return millm_value_string(w, text);
}

static Value
call_value(Run *run, Value callee, const Arguments *args)
{
	static const MethodRow loop_call = {.name = ""};

	switch (callee.kind)
	{
		case V_FUNCTION:
			if (!callee.function->function)
				millm_work_fail(&run->w, MILLM_E_UNSUPPORTED, "the function '%s' is not supported", callee.function->name);
			return callee.function->function(run, args);
		case V_METHOD:
			if (callee.method->self.kind == V_LOOP)
				return millm_loop_call(run, callee.method, args);
			return millm_method_call(run, callee.method, args);
		case V_MACRO:
			return call_macro(run, callee.macro, args);
		case V_LOOP:
			return millm_loop_call(run, &(Method) {callee, &loop_call}, args);
		default:
			millm_value_require(&run->w, callee);
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "'%s' object is not callable", millm_value_type(callee));
	}
}

static Value
evaluate_call(Run *run, const Node *node)
{
	Value		callee = evaluate(run, node->a);
	Arguments	args = evaluate_arguments(run, node->list);

	run->w.line = node->line;
	return call_value(run, callee, &args);
}

/* ---- expressions ---- */

static Value
evaluate_or_absent(Run *run, const Node *node)
{
	return node ? evaluate(run, node) : (Value) {.kind = V_ABSENT};
}

static Value
evaluate_list(Run *run, const Node *node)
{
	Value		v = millm_value_list(&run->w, node->kind == N_LIST ? V_LIST : V_TUPLE, 0);

	for (const Node *item = node->list; item; item = item->next)
		millm_list_add(&run->w, v.list, evaluate(run, item));
	return v;
}

static Value
evaluate_dict(Run *run, const Node *node)
{
	Value		v = millm_value_dict(&run->w);

	for (const Node *item = node->list; item; item = item->next->next)
	{
		Value		key = evaluate(run, item);

		millm_dict_set(&run->w, v.dict, key, evaluate(run, item->next));
	}
	return v;
}

static Value
evaluate_filter(Run *run, const Node *node)
{
	Value		v = evaluate(run, node->a);
	Arguments	args = evaluate_arguments(run, node->list);

	run->w.line = node->line;
	if (!node->filter)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "there is no filter '%.*s'", (int) node->name->text.n, node->name->text.data);
	return millm_filter_apply(run, node->filter, v, &args);
}

static Value
evaluate_test(Run *run, const Node *node)
{
	Value		v = evaluate(run, node->a);
	Arguments	args = evaluate_arguments(run, node->list);

	run->w.line = node->line;
	if (!node->test)
		millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "there is no test '%.*s'", (int) node->name->text.n, node->name->text.data);
	return millm_value_bool(millm_test_apply(run, node->test, v, &args));
}

static Value
evaluate_conditional(Run *run, const Node *node)
{
	Undefined  *u;

	if (millm_value_is_true(evaluate(run, node->b)))
		return evaluate(run, node->a);
	if (node->c)
		return evaluate(run, node->c);
	u = millm_work_array(&run->w, 1, sizeof(*u));
	u->hint = "an inline if was false and has no else";
	return (Value) {.kind = V_UNDEFINED, .undefined = u};
}

static Value
evaluate_slice(Run *run, const Node *node)
{
	Value		v = evaluate(run, node->a);
	Value		from = evaluate_or_absent(run, node->b);
	Value		to = evaluate_or_absent(run, node->c);
	Value		step = evaluate_or_absent(run, node->d);

	run->w.line = node->line;
	return millm_value_slice(run, v, from, to, step);
}

static Value
evaluate_binary(Run *run, const Node *node)
{
	Value		a = evaluate(run, node->a);
	Value		b = evaluate(run, node->b);

	run->w.line = node->line;
	return binary(run, node->op, a, b);
}

static Value
evaluate_item(Run *run, const Node *node)
{
	Value		v = evaluate(run, node->a);
	Value		key = evaluate(run, node->b);

	run->w.line = node->line;
	return millm_value_item(run, v, key);
}

static Value
evaluate_node(Run *run, const Node *node)
{
	Value		v;

	switch (node->kind)
	{
		case N_CONST:
			return node->value;
		case N_NAME:
			return get_name(run, node->name);
		case N_BLOCK_TEXT:
			return run->block_text;
		case N_LIST:
		case N_TUPLE:
			return evaluate_list(run, node);
		case N_DICT:
			return evaluate_dict(run, node);
		case N_ATTRIBUTE:
			v = evaluate(run, node->a);
			run->w.line = node->line;
			return millm_value_attribute(run, v, node->name->text);
		case N_ITEM:
			return evaluate_item(run, node);
		case N_SLICE:
			return evaluate_slice(run, node);
		case N_CALL:
			return evaluate_call(run, node);
		case N_FILTER:
			return evaluate_filter(run, node);
		case N_TEST:
			return evaluate_test(run, node);
		case N_NOT:
			return millm_value_bool(!millm_value_is_true(evaluate(run, node->a)));
		case N_NEG:
		case N_POS:
			return evaluate_sign(run, node);
		case N_AND:
			v = evaluate(run, node->a);
			return millm_value_is_true(v) ? evaluate(run, node->b) : v;
		case N_OR:
			v = evaluate(run, node->a);
			return millm_value_is_true(v) ? v : evaluate(run, node->b);
		case N_CONDITIONAL:
			return evaluate_conditional(run, node);
		case N_COMPARE:
			return evaluate_comparison(run, node);
		case N_CONCAT:
			return evaluate_concat(run, node);
		case N_BINARY:
			return evaluate_binary(run, node);
		default:
			millm_work_fail(&run->w, MILLM_E_INTERNAL, "not an expression");
	}
}

static Value
evaluate(Run *run, const Node *node)
{
	Value		v;

	millm_work_pay(&run->w, 1);
	millm_work_enter(&run->w);
	v = evaluate_node(run, node);
	millm_work_leave(&run->w);
	return v;
}

/* ---- statements ---- */

static void
assign(Run *run, Frame *frame, const Node *target, Value v)
{
	const List *parts;
	size_t		i = 0;

	millm_work_pay(&run->w, 1);
	if (target->kind == N_NAME)
		set_name(run, frame, target->name, v);
	else if (target->kind == N_NAMESPACE_ATTRIBUTE)
	{
		Value		ns = evaluate(run, target->a);

		run->w.line = target->line;
		if (ns.kind != V_NAMESPACE)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "cannot assign attribute on non-namespace object");
		millm_dict_set(&run->w, ns.dict, millm_value_string(&run->w, target->name->text), v);
	}
	else
	{
		run->w.line = target->line;
		parts = millm_value_iterate(&run->w, v);
		for (const Node *part = target->list; part; part = part->next)
			i++;
		if (parts->n != i)
			millm_work_fail(&run->w, MILLM_E_INVALID_ARGUMENT, "expected %zu values to unpack, got %zu", i, parts->n);
		i = 0;
		for (const Node *part = target->list; part; part = part->next)
			assign(run, frame, part, parts->items[i++]);
	}
}

/* Is there an element after the last that was kept?  If so, keep it. */
static bool
loop_keep_next(Run *run, Loop *loop)
{
	while (loop->next_candidate < loop->candidates->n)
	{
		Value		v = loop->candidates->items[loop->next_candidate++];
		bool		is_kept = true;

		if (loop->node->b)
		{
			Frame	   *outer = push_frame(run, loop->outer);

			assign(run, run->frame, loop->node->target, v);
			is_kept = millm_value_is_true(evaluate(run, loop->node->b));
			run->frame = outer;
		}
		if (is_kept)
		{
			millm_list_add(&run->w, loop->kept, v);
			return true;
		}
	}
	return false;
}

static bool
loop_has(Run *run, Loop *loop, size_t i)
{
	return i < loop->kept->n || loop_keep_next(run, loop);
}

static int64_t
loop_length(Run *run, Loop *loop)
{
	while (loop_keep_next(run, loop))
		;
	return (int64_t) loop->kept->n;
}

Value
millm_loop_attribute(Run *run, Loop *loop, Str name)
{
	static const MethodRow methods[] = {{.name = "cycle"}, {.name = "changed"}};
	int64_t		index = (int64_t) loop->index;

	if (millm_str_is(name, "index"))
		return millm_value_int(index + 1);
	if (millm_str_is(name, "index0"))
		return millm_value_int(index);
	if (millm_str_is(name, "first"))
		return millm_value_bool(index == 0);
	if (millm_str_is(name, "last"))
		return millm_value_bool(!loop_has(run, loop, loop->index + 1));
	if (millm_str_is(name, "length"))
		return millm_value_int(loop_length(run, loop));
	if (millm_str_is(name, "revindex"))
		return millm_value_int(loop_length(run, loop) - index);
	if (millm_str_is(name, "revindex0"))
		return millm_value_int(loop_length(run, loop) - index - 1);
	if (millm_str_is(name, "depth"))
		return millm_value_int(loop->depth + 1);
	if (millm_str_is(name, "depth0"))
		return millm_value_int(loop->depth);
	if (millm_str_is(name, "previtem"))
		return index > 0 ? loop->kept->items[index - 1] : millm_value_undefined(&run->w, NULL, millm_str("there is no previous item"));
	if (millm_str_is(name, "nextitem"))
		return loop_has(run, loop, loop->index + 1) ? loop->kept->items[index + 1] :
			millm_value_undefined(&run->w, NULL, millm_str("there is no next item"));
	for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
		if (millm_str_is(name, methods[i].name))
		{
			Method	   *method = millm_work_alloc(&run->w, sizeof(*method));

			*method = (Method) {{.kind = V_LOOP, .loop = loop}, &methods[i]};
			return (Value) {.kind = V_METHOD, .method = method};
		}
	return (Value) {.kind = V_ABSENT};
}

static Flow run_loop(Run *run, const Node *node, Value iterable, int depth, Frame *outer);

/* cycle(...), changed(...), or loop(...) of a recursive loop. */
Value
millm_loop_call(Run *run, const Method *method, const Arguments *args)
{
	Loop	   *loop = method->self.loop;
	Work	   *w = &run->w;
	Value		asked;
	bool		is_changed;

	if (args->n_keywords > 0)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a loop takes no keyword arguments");
	if (method->row->name[0] == '\0')
	{
		Builder		text;
		Builder    *outer = run->out;
		Frame	   *frame = run->frame;

		if (!loop->node->flag)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "the loop must have the 'recursive' marker to be called recursively");
		if (args->n != 1)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a recursive loop takes one argument");
		millm_work_enter(w);
		millm_builder_init(&text, w, MAX_STRING_BYTES);
		run->out = &text;
		run_loop(run, loop->node, args->values[0], loop->depth + 1, loop->outer);
		run->out = outer;
		run->frame = frame;
		millm_work_leave(w);
		return millm_value_string(w, millm_builder_str(&text));
	}
	if (strcmp(method->row->name, "cycle") == 0)
	{
		if (args->n == 0)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "no items for cycling given");
		return args->values[loop->index % (size_t) args->n];
	}
	asked = millm_value_list(w, V_TUPLE, (size_t) args->n);
	for (int i = 0; i < args->n; i++)
		millm_list_add(w, asked.list, args->values[i]);
	is_changed = loop->changed.kind == V_ABSENT || !millm_value_equal(w, loop->changed, asked);
	loop->changed = asked;
	return millm_value_bool(is_changed);
}

static Flow
run_loop(Run *run, const Node *node, Value iterable, int depth, Frame *outer)
{
	const Name *loop_name = millm_template_name(run->t, millm_str("loop"));
	Loop	   *loop = millm_work_array(&run->w, 1, sizeof(*loop));
	Flow		flow = FLOW_ON;
	Frame	   *before = run->frame;

	loop->node = node;
	loop->candidates = millm_value_iterate(&run->w, iterable);
	loop->kept = millm_value_list(&run->w, V_LIST, 0).list;
	loop->depth = depth;
	loop->outer = outer;
	for (; loop_has(run, loop, loop->index); loop->index++)
	{
		push_frame(run, outer);
		assign(run, run->frame, node->target, loop->kept->items[loop->index]);
		if (loop_name)
			set_name(run, run->frame, loop_name, (Value) {.kind = V_LOOP, .loop = loop});
		flow = execute(run, node->body);
		if (flow == FLOW_BREAK)
			break;
	}
	flow = FLOW_ON;
	if (loop->kept->n == 0 && node->else_body)
	{
		push_frame(run, outer);
		flow = execute(run, node->else_body);
	}
	run->frame = before;
	return flow;
}

static Value
make_macro(Run *run, const Node *node)
{
	Macro	   *macro = millm_work_alloc(&run->w, sizeof(*macro));

	*macro = (Macro) {node->name, node->macro, node->body, run->frame};
	return (Value) {.kind = V_MACRO, .macro = macro};
}

static void
execute_call_block(Run *run, const Node *node)
{
	Value		callee = evaluate(run, node->a->a);
	Arguments	args = evaluate_arguments(run, node->a->list);
	Value	   *values = millm_work_array(&run->w, (size_t) (args.n + args.n_keywords + 1), sizeof(*values));
	Str		   *names = millm_work_array(&run->w, (size_t) args.n_keywords + 1, sizeof(*names));

	run->w.line = node->line;
	if (args.n + args.n_keywords > 0)
		memcpy(values, args.values, (size_t) (args.n + args.n_keywords) * sizeof(*values));
	if (args.n_keywords > 0)
		memcpy(names, args.names, (size_t) args.n_keywords * sizeof(*names));
	values[args.n + args.n_keywords] = make_macro(run, node);
	names[args.n_keywords++] = millm_str("caller");
	args.values = values;
	args.names = names;
	millm_builder_add(run->out, millm_value_str(&run->w, call_value(run, callee, &args)));
}

/* A block whose text becomes a value: what filters make of it, if there are any. */
static Flow
capture_block(Run *run, const Node *node, Value *out)
{
	Frame	   *outer = push_frame(run, run->frame);
	Value		outer_text = run->block_text;
	Flow		flow;
	Str			text = capture(run, node->body, &flow);

	run->frame = outer;
	*out = millm_value_string(&run->w, text);
	if (flow == FLOW_ON && node->a)
	{
		run->block_text = *out;
		*out = evaluate(run, node->a);
		run->block_text = outer_text;
	}
	return flow;
}

static Flow
execute_one(Run *run, const Node *node)
{
	Flow		flow = FLOW_ON;
	Value		v;
	Frame	   *outer;

	switch (node->kind)
	{
		case N_TEXT:
			millm_builder_add(run->out, *node->value.str);
			break;
		case N_PRINT:
			v = evaluate(run, node->a);
			run->w.line = node->line;
			millm_builder_add(run->out, millm_value_str(&run->w, v));
			break;
		case N_IF:
			return execute(run, millm_value_is_true(evaluate(run, node->a)) ? node->body : node->else_body);
		case N_FOR:
			v = evaluate(run, node->a);
			run->w.line = node->line;
			return run_loop(run, node, v, 0, run->frame);
		case N_SET:
			v = evaluate(run, node->a);
			assign(run, run->frame, node->target, v);
			break;
		case N_SET_BLOCK:
			flow = capture_block(run, node, &v);
			if (flow == FLOW_ON)
				assign(run, run->frame, node->target, v);
			break;
		case N_FILTER_BLOCK:
			flow = capture_block(run, node, &v);
			if (flow == FLOW_ON)
				millm_builder_add(run->out, millm_value_str(&run->w, v));
			break;
		case N_MACRO:
			set_name(run, run->frame, node->name, make_macro(run, node));
			break;
		case N_CALL_BLOCK:
			execute_call_block(run, node);
			break;
		case N_GENERATION:
			outer = push_frame(run, run->frame);
			execute(run, node->body);
			run->frame = outer;
			break;
		case N_BREAK:
			return FLOW_BREAK;
		case N_CONTINUE:
			return FLOW_CONTINUE;
		default:
			millm_work_fail(&run->w, MILLM_E_INTERNAL, "not a statement");
	}
	return flow;
}

static Flow
execute(Run *run, const Node *body)
{
	for (const Node *node = body; node; node = node->next)
	{
		Flow		flow;

		millm_work_pay(&run->w, 1);
		millm_work_enter(&run->w);
		run->w.line = node->line;
		flow = execute_one(run, node);
		millm_work_leave(&run->w);
		if (flow != FLOW_ON)
			return flow;
	}
	return FLOW_ON;
}

/* Roles make special tokens ("<|" + role + "|>"); those that everybody knows count as the template's own words. */
static void
trust_roles(Work *w, Value messages)
{
	static const char *const roles[] = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "documents"};

	if (messages.kind != V_LIST)
		return;
	for (size_t i = 0; i < messages.list->n; i++)
	{
		Value		message = messages.list->items[i];
		const Value *role = message.kind == V_DICT ? millm_dict_get_str(w, message.dict, millm_str("role")) : NULL;

		for (size_t k = 0; role && role->kind == V_STRING && k < sizeof(roles) / sizeof(roles[0]); k++)
			if (millm_str_is(*role->str, roles[k]))
				((Str *) role->str)->is_quoted = false;	/* no one else has seen it yet */
	}
}

Str
millm_template_run(Run *run, size_t max_output, const json_t *trusted, const json_t *variables)
{
	Builder		out;
	const char *key;
	json_t	   *value;

	push_frame(run, NULL);
	json_object_foreach((json_t *) trusted, key, value)
	{
		const Name *name = millm_template_name(run->t, millm_str(key));

		if (name)
		{
			Str			text = *millm_value_json(&run->w, value).str;

			text.is_quoted = false;
			set_name(run, run->frame, name, millm_value_string(&run->w, text));
		}
	}
	json_object_foreach((json_t *) variables, key, value)
	{
		const Name *name = millm_template_name(run->t, millm_str(key));

		if (name)
		{
			Value		v = millm_value_json(&run->w, value);

			if (strcmp(key, "messages") == 0)
				trust_roles(&run->w, v);
			set_name(run, run->frame, name, v);
		}
	}
	push_frame(run, run->frame);
	millm_builder_init(&out, &run->w, max_output);
	run->out = &out;
	execute(run, run->t->body);
	return millm_builder_str(&out);
}
