/*
 * builtin.h -- what every template may use without defining it, and how arguments reach it.
 */
#ifndef MILLM_CHAT_BUILTIN_H
#define MILLM_CHAT_BUILTIN_H

#include <time.h>

#include "syntax.h"
#include "value.h"

#define MAX_PARAMETERS 6

typedef struct Frame Frame;

/* One rendering. */
typedef struct Run
{
	Work		w;
	const MillmTemplate *t;
	Frame	   *frame;			/* the innermost scope */
	Builder    *out;			/* where text goes */
	Value		block_text;		/* what N_BLOCK_TEXT is */
	time_t		now;
} Run;

/* The arguments of one call, as they were given. */
typedef struct Arguments
{
	Value	   *values;
	int			n;
	Str		   *names;			/* of the keywords, whose values follow the positional ones */
	int			n_keywords;
} Arguments;

/*
 * Bring arguments into the order of params, a list of names between spaces; those not given are V_ABSENT.  Before a "/"
 * (first of all, if there is one) stands that they are positional only.  Fails for too many, too few, an unknown or a repeated one.
 */
extern void millm_arguments_bind(Run *run, Str what, const char *params, int n_required, const Arguments *args,
								 Value out[MAX_PARAMETERS]);
/* All but the first n positional ones. */
extern Arguments millm_arguments_skip(const Arguments *args, int n);

/* ---- filters and tests ---- */

struct Filter
{
	const char *name;
	const char *params;			/* NULL: the function wants all as they are */
	int			n_required;
	Value		(*function) (Run *run, Value v, const Value *arg, const Arguments *all);
	bool		is_lazy;		/* makes a generator, whose elements, and errors, come when it is iterated */
};

struct Test
{
	const char *name;
	int			n_arguments;
	bool		(*function) (Run *run, Value v, const Value *arg);
};

extern const Filter *millm_filter_by_name(Str name);	/* NULL: none */
extern const Test *millm_test_by_name(Str name);
extern Value millm_filter_apply(Run *run, const Filter *filter, Value v, const Arguments *args);
extern bool millm_test_apply(Run *run, const Test *test, Value v, const Arguments *args);

/* ---- functions and methods ---- */

struct Function
{
	const char *name;
	Value		(*function) (Run *run, const Arguments *args);	/* NULL: jinja2 has it, we refuse it */
};

typedef struct MethodRow
{
	const char *name;
	const char *params;
	int			n_required;
	Value		(*function) (Run *run, Value self, const Value *arg);	/* NULL: Python has it, we refuse it */
	bool		mutates;		/* the sandbox refuses it */
} MethodRow;

struct Method
{
	Value		self;
	const MethodRow *row;
};

extern const Function *millm_function_by_name(Str name);
extern Value millm_method_call(Run *run, const Method *method, const Arguments *args);

/* v.name: the attribute, else the item.  v[key]: the item, else the attribute.  Undefined when there is neither. */
extern Value millm_value_attribute(Run *run, Value v, Str name);
extern Value millm_value_item(Run *run, Value v, Value key);
/* v[from:to:step]; V_ABSENT for what was left out.  Fails for what has no slices. */
extern Value millm_value_slice(Run *run, Value v, Value from, Value to, Value step);

/* ---- of the evaluator ---- */

extern Value millm_loop_attribute(Run *run, Loop *loop, Str name);	/* V_ABSENT: it has none of that name */
extern Value millm_loop_call(Run *run, const Method *method, const Arguments *args);
extern Value millm_value_add(Run *run, Value a, Value b);

#endif
