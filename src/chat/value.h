/*
 * value.h -- what a template computes with: Python's values, as far as templates use them.
 *
 * Values are immutable once others can see them (namespaces apart) and lie in the work's arena; functions
 * return views of their arguments where they can.  Every byte of a string knows its origin: written by the template, or
 * quoted from what the caller sent.  The tokenizer reads special tokens only in the former.
 */
#ifndef MILLM_CHAT_VALUE_H
#define MILLM_CHAT_VALUE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "work.h"

#define MAX_STRING_BYTES (16u << 20)
#define MAX_ITEMS (1u << 20)

typedef struct Str
{
	const char *data;			/* valid UTF-8, not terminated */
	const uint8_t *origins;		/* 1 for each byte that is quoted; NULL: all are as is_quoted says */
	uint32_t	n;				/* bytes */
	uint32_t	n_chars;
	bool		is_quoted;
	bool		is_markup;		/* made by |safe: what is added to it with + gets escaped */
} Str;

typedef enum ValueKind
{
	V_ABSENT,					/* an argument that was not given; never seen by templates */
	V_UNDEFINED,
	V_NONE,
	V_BOOL,
	V_INT,
	V_FLOAT,
	V_STRING,
	V_LIST,
	V_TUPLE,
	V_GENERATOR,				/* a list that can be iterated once, and may not be computed before that */
	V_DICT,
	V_VIEW,						/* a dict's keys(), values(), items() */
	V_RANGE,
	V_NAMESPACE,
	V_LOOP,
	V_MACRO,
	V_METHOD,					/* of a value */
	V_FUNCTION					/* a global one */
} ValueKind;

typedef struct Value Value;
typedef struct List List;
typedef struct Dict Dict;
typedef struct Undefined Undefined;
typedef struct Range Range;
typedef struct View View;
typedef struct Method Method;
typedef struct Loop Loop;
typedef struct Macro Macro;
typedef struct Function Function;
typedef struct Pending Pending;

struct Value
{
	ValueKind	kind;
	union
	{
		bool		boolean;
		int64_t		integer;
		double		real;
		const Str  *str;
		List	   *list;		/* LIST, TUPLE, GENERATOR */
		Dict	   *dict;		/* DICT, NAMESPACE */
		const Undefined *undefined;
		const View *view;
		const Range *range;
		const Method *method;
		Loop	   *loop;
		const Macro *macro;
		const Function *function;
	};
};

struct List
{
	Value	   *items;
	size_t		n;
	size_t		capacity;
	const Pending *pending;		/* a generator's: not NULL until its elements are computed */
};

/* How to compute the elements of a generator; the first member of whatever that takes. */
struct Pending
{
	List	   *(*compute) (Work *w, const Pending *pending);
};

typedef struct Entry
{
	Value		key;
	Value		value;
} Entry;

struct Dict						/* in the order of insertion */
{
	Entry	   *entries;
	size_t		n;
	size_t		capacity;
};

struct Undefined
{
	const char *owner;			/* the type that lacks it; NULL: a variable */
	Str			name;
	const char *hint;			/* instead of both */
};

struct Range
{
	int64_t		start;
	int64_t		step;
	int64_t		n;
};

typedef enum ViewKind { VIEW_KEYS, VIEW_VALUES, VIEW_ITEMS } ViewKind;

struct View
{
	ViewKind	kind;
	Dict	   *dict;
};

/* ---- making ---- */

extern Value millm_value_string(Work *w, Str s);
extern Value millm_value_text(Work *w, const char *s);	/* a static string of the template's side */
extern Value millm_value_list(Work *w, ValueKind kind, size_t capacity);
extern Value millm_value_dict(Work *w);
extern Value millm_value_undefined(Work *w, const char *owner, Str name);
extern Value millm_value_pair(Work *w, Value a, Value b);
/* From JSON; strings are quoted. */
extern Value millm_value_json(Work *w, const json_t *json);

static inline Value
millm_value_bool(bool b)
{
	return (Value) {.kind = V_BOOL, .boolean = b};
}

static inline Value
millm_value_int(int64_t i)
{
	return (Value) {.kind = V_INT, .integer = i};
}

static inline Value
millm_value_none(void)
{
	return (Value) {.kind = V_NONE};
}

extern Str	millm_str(const char *s);	/* a view of a static, terminated string */
extern Str	millm_str_of(const char *data, size_t n, bool is_quoted);	/* a view; counts the characters */
/* The bytes [from, to) of s, which are whole characters. */
extern Str	millm_str_cut(Str s, size_t from, size_t to);
extern bool millm_str_equal(Str a, Str b);
extern bool millm_str_is(Str a, const char *b);
/* The byte at which character i (at most n_chars) begins. */
extern size_t millm_str_offset(Str s, size_t i);
/* s with its character set of & < > " ' escaped, as Markup; Markup stays as it is. */
extern Str	millm_str_escape(Work *w, Str s);

extern void millm_list_add(Work *w, List *list, Value v);
/* Replaces the value of an equal key.  Fails for a key that Python cannot hash. */
extern void millm_dict_set(Work *w, Dict *dict, Value key, Value value);
extern const Value *millm_dict_get(Work *w, const Dict *dict, Value key);	/* NULL: not there */
extern const Value *millm_dict_get_str(Work *w, const Dict *dict, Str key);

/* ---- text under construction ---- */

typedef struct Builder
{
	Work	   *w;
	char	   *data;
	uint8_t    *origins;		/* NULL as long as all bytes have one origin */
	size_t		n;
	size_t		capacity;
	size_t		n_chars;
	size_t		max_bytes;
	bool		is_quoted;
} Builder;

extern void millm_builder_init(Builder *b, Work *w, size_t max_bytes);
extern void millm_builder_add(Builder *b, Str s);
extern void millm_builder_add_text(Builder *b, const char *s);	/* the template's side */
extern void millm_builder_add_char(Builder *b, uint32_t cp, bool is_quoted);
extern Str	millm_builder_str(const Builder *b);

/* ---- asking ---- */

extern bool millm_value_is_true(Value v);
extern bool millm_value_equal(Work *w, Value a, Value b);
/* < 0, 0, > 0; fails for types that have no order. */
extern int	millm_value_compare(Work *w, Value a, Value b);
extern bool millm_value_contains(Work *w, Value container, Value v);
/* Python's name for the type, for messages. */
extern const char *millm_value_type(Value v);
static inline bool
millm_value_is_number(Value v)
{
	return v.kind == V_INT || v.kind == V_FLOAT || v.kind == V_BOOL;
}
/* An int or bool as an integer; fails, naming what, for anything else. */
extern int64_t millm_value_to_int(Work *w, Value v, const char *what);
extern double millm_value_to_real(Value v);	/* of a number */
/* The characters, keys or elements of v as a list; a generator is spent by it.  Fails for what cannot be iterated. */
extern List *millm_value_iterate(Work *w, Value v);
/* Fails with "'x' is undefined" if v is. */
extern void millm_value_require(Work *w, Value v);

/* ---- printing (print.c) ---- */

extern Str	millm_value_str(Work *w, Value v);	/* Python's str() */
extern void millm_value_repr(Builder *b, Value v);	/* Python's repr() */

typedef struct JsonStyle
{
	bool		ensure_ascii;
	bool		sort_keys;
	bool		has_indent;
	Str			indent;
	Str			item_separator;
	Str			key_separator;
} JsonStyle;

extern Str	millm_value_tojson(Work *w, Value v, const JsonStyle *style);

#endif
