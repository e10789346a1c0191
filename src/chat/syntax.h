/*
 * syntax.h -- a template taken apart: tokens (lexer.c), then a tree (parser.c).
 *
 * All of it lies in the template's arena and never changes after compilation, so that many threads may render it.
 */
#ifndef MILLM_CHAT_SYNTAX_H
#define MILLM_CHAT_SYNTAX_H

#include "chat.h"
#include "value.h"

#define MAX_SOURCE_BYTES (256u << 10)
#define MAX_TOKENS (64u << 10)
#define MAX_NODES (32u << 10)
#define MAX_NESTING 200			/* of blocks and parentheses */
#define MAX_NAME_BYTES 256
#define MAX_ARGUMENTS 64		/* of one call or macro */

/* ---- tokens ---- */

typedef enum TokenKind
{
	T_END,
	T_DATA,						/* text outside tags */
	T_PRINT_BEGIN, T_PRINT_END,	/* {{ }} */
	T_BLOCK_BEGIN, T_BLOCK_END,	/* {% %} */
	T_NAME, T_STRING, T_INT, T_FLOAT,
	T_ADD, T_SUB, T_MUL, T_DIV, T_FLOORDIV, T_MOD, T_POW, T_TILDE,
	T_EQ, T_NE, T_LT, T_LE, T_GT, T_GE,
	T_ASSIGN, T_DOT, T_COLON, T_COMMA, T_PIPE, T_SEMICOLON,
	T_LPAREN, T_RPAREN, T_LBRACKET, T_RBRACKET, T_LBRACE, T_RBRACE
} TokenKind;

typedef struct Token
{
	TokenKind	kind;
	int			line;
	Str			text;			/* DATA, NAME, STRING; of others the source */
	int64_t		integer;
	double		real;
} Token;

/* The tokens of a template, T_END last. */
extern Token *millm_template_lex(Work *w, const char *source, size_t n);

/* ---- the tree ---- */

/* A name that the template uses; equal names are one. */
typedef struct Name
{
	Str			text;
	bool		is_variable;	/* somewhere; not only an attribute, a filter or the like */
	struct Name *next;			/* in its chain */
} Name;

typedef enum NodeKind
{
	/* statements; body and else_body are chains by next */
	N_TEXT,						/* value */
	N_PRINT,					/* a */
	N_IF,						/* a, body, else_body */
	N_FOR,						/* target, a: the iterable, b: the condition or NULL, body, else_body, flag: recursive */
	N_SET,						/* target, a */
	N_SET_BLOCK,				/* target, body, a: filters of the text, or NULL */
	N_FILTER_BLOCK,				/* body, a */
	N_MACRO,					/* name, macro, body */
	N_CALL_BLOCK,				/* a: the call; macro, body: of caller() */
	N_GENERATION,				/* body */
	N_BREAK,
	N_CONTINUE,
	/* expressions; list is a chain by next */
	N_CONST,					/* value */
	N_NAME,						/* name */
	N_BLOCK_TEXT,				/* what a block's filters start from */
	N_LIST, N_TUPLE,			/* list */
	N_DICT,						/* list: keys and values in turn */
	N_ATTRIBUTE,				/* a, name */
	N_ITEM,						/* a, b */
	N_SLICE,					/* a, and b, c, d or NULL */
	N_CALL,						/* a, list: arguments */
	N_FILTER,					/* a, name, filter, list: arguments */
	N_TEST,						/* a, name, test, list: arguments */
	N_NOT, N_NEG, N_POS,		/* a */
	N_AND, N_OR,				/* a, b */
	N_CONDITIONAL,				/* a if b else c; c may be NULL */
	N_COMPARE,					/* a, list of N_OPERANDs */
	N_OPERAND,					/* op, a */
	N_CONCAT,					/* list */
	N_BINARY,					/* op, a, b */
	/* targets of an assignment, besides N_NAME and N_TUPLE */
	N_NAMESPACE_ATTRIBUTE,		/* a: the namespace, name */
	/* arguments */
	N_KEYWORD,					/* name, a */
	N_SPREAD,					/* *a */
	N_SPREAD_KEYWORDS			/* **a */
} NodeKind;

typedef enum Operator
{
	OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_FLOORDIV, OP_MOD, OP_POW,
	OP_EQ, OP_NE, OP_LT, OP_LE, OP_GT, OP_GE, OP_IN, OP_NOT_IN
} Operator;

typedef struct Node Node;

typedef struct MacroSyntax
{
	const Name *names[MAX_ARGUMENTS];
	const Node *defaults[MAX_ARGUMENTS];	/* NULL: none */
	int			n;
	bool		uses_caller;
	bool		uses_varargs;
	bool		uses_kwargs;
} MacroSyntax;

typedef struct Filter Filter;
typedef struct Test Test;

struct Node
{
	NodeKind	kind;
	Operator	op;
	int			line;
	bool		flag;
	const Name *name;
	Value		value;
	const Node *target;
	const Node *a;
	const Node *b;
	const Node *c;
	const Node *d;
	const Node *list;
	const Node *body;
	const Node *else_body;
	const MacroSyntax *macro;
	const Filter *filter;		/* NULL: there is none of this name, which only using it makes an error */
	const Test *test;
	const Node *next;
};

#define NAME_CHAINS 64

struct MillmTemplate
{
	Work		work;			/* owns everything here, this struct apart */
	const Node *body;
	Name	   *names[NAME_CHAINS];
};

/* Fill t->body and t->names from the source; fails the template's work. */
extern void millm_template_parse(MillmTemplate *t, const char *source, size_t n);
/* The template's Name of that text, or NULL. */
extern const Name *millm_template_name(const MillmTemplate *t, Str text);

#endif
