/*
 * parser.c -- tokens to a tree, in the order of jinja2's grammar.
 *
 * What jinja2 has and chat templates do not use is refused here by name, as are filters and tests that do not exist,
 * unless they stand in a branch: there jinja2 waits until they are used, and so do we.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "builtin.h"
#include "syntax.h"

typedef struct Parser
{
	Work	   *w;
	MillmTemplate *t;
	const Token *token;
	size_t		n_nodes;
	int			nesting;
	bool		in_branch;		/* of an if or a conditional expression of the same scope */
	bool		in_loop;		/* that break and continue would belong to */
	MacroSyntax *macros[MAX_NESTING];	/* that are being parsed, outermost first */
	int			n_macros;
} Parser;

static const Node *parse_expression(Parser *p);
static const Node *parse_or(Parser *p);
static const Node *parse_unary(Parser *p, bool with_filters);
static const Node *parse_primary(Parser *p);
static const Node *parse_body(Parser *p, const char *const *ends);

/* ---- helpers ---- */

static void __attribute__((noreturn, format(printf, 3, 4)))
fail(Parser *p, MillmCode code, const char *fmt, ...)
{
	char		text[300];
	va_list		ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	p->w->line = p->token->line;
	millm_work_fail(p->w, code, "%s", text);
}

static void __attribute__((noreturn))
unexpected(Parser *p, const char *expected)
{
	if (p->token->kind == T_END)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "unexpected end, expected %s", expected);
	fail(p, MILLM_E_INVALID_MODEL_FILE, "unexpected '%.*s', expected %s",
		 p->token->text.n < 60 ? (int) p->token->text.n : 60, p->token->text.data, expected);
}

static Node *
new_node(Parser *p, NodeKind kind)
{
	Node	   *node;

	if (++p->n_nodes > MAX_NODES)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "more than %u elements", MAX_NODES);
	node = millm_work_array(p->w, 1, sizeof(*node));
	node->kind = kind;
	node->line = p->token->line;
	return node;
}

static void
enter(Parser *p)
{
	if (++p->nesting > MAX_NESTING)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "nested more than %d deep", MAX_NESTING);
}

static void
leave(Parser *p)
{
	p->nesting--;
}

static bool
at_word(const Parser *p, const char *word)
{
	return p->token->kind == T_NAME && millm_str_is(p->token->text, word);
}

static bool
take(Parser *p, TokenKind kind)
{
	if (p->token->kind != kind)
		return false;
	p->token++;
	return true;
}

static bool
take_word(Parser *p, const char *word)
{
	if (!at_word(p, word))
		return false;
	p->token++;
	return true;
}

static void
expect(Parser *p, TokenKind kind, const char *what)
{
	if (!take(p, kind))
		unexpected(p, what);
}

static size_t
name_chain(Str text)
{
	uint32_t	hash = 0;

	for (size_t i = 0; i < text.n; i++)
		hash = hash * 31 + (unsigned char) text.data[i];
	return hash % NAME_CHAINS;
}

const Name *
millm_template_name(const MillmTemplate *t, Str text)
{
	for (const Name *name = t->names[name_chain(text)]; name; name = name->next)
		if (millm_str_equal(name->text, text))
			return name;
	return NULL;
}

static Name *
intern(Parser *p, Str text)
{
	Name	   *name = (Name *) millm_template_name(p->t, text);

	if (name)
		return name;
	name = millm_work_array(p->w, 1, sizeof(*name));
	name->text = text;
	name->next = p->t->names[name_chain(text)];
	p->t->names[name_chain(text)] = name;
	return name;
}

static const Name *
expect_name(Parser *p, const char *what)
{
	if (p->token->kind != T_NAME)
		unexpected(p, what);
	return intern(p, p->token++->text);
}

/* A chain of nodes under construction. */
typedef struct Chain
{
	const Node *first;
	Node	   *last;
} Chain;

static void
chain_add(Chain *chain, const Node *node)
{
	if (chain->last)
		chain->last->next = node;
	else
		chain->first = node;
	chain->last = (Node *) node;	/* made by this parser */
}

/* ---- expressions ---- */

static bool
at_tuple_end(const Parser *p, const char *end_word)
{
	TokenKind	kind = p->token->kind;

	return kind == T_PRINT_END || kind == T_BLOCK_END || kind == T_RPAREN || (end_word && at_word(p, end_word));
}

typedef const Node *(*ElementParser) (Parser *p);

/* One element, or a tuple of several, as far as end_word if not NULL; empty only between parentheses. */
static const Node *
parse_tuple_of(Parser *p, ElementParser parse, const char *end_word, bool in_parentheses)
{
	Chain		chain = {0};
	Node	   *tuple;
	bool		is_tuple = false;

	for (;;)
	{
		if (chain.first)
			expect(p, T_COMMA, "','");
		if (at_tuple_end(p, end_word))
			break;
		chain_add(&chain, parse(p));
		if (p->token->kind != T_COMMA)
			break;
		is_tuple = true;
	}
	if (!is_tuple && chain.first)
		return chain.first;
	if (!is_tuple && !in_parentheses)
		unexpected(p, "an expression");
	tuple = new_node(p, N_TUPLE);
	tuple->list = chain.first;
	return tuple;
}

static const Node *
parse_tuple(Parser *p)
{
	return parse_tuple_of(p, parse_expression, NULL, false);
}

static const Node *
parse_arguments(Parser *p)
{
	Chain		chain = {0};
	bool		has_keyword = false;
	bool		has_spread = false;
	bool		has_spread_keywords = false;
	int			n = 0;

	expect(p, T_LPAREN, "'('");
	while (p->token->kind != T_RPAREN)
	{
		Node	   *arg = NULL;

		if (chain.first)
			expect(p, T_COMMA, "',' or ')'");
		if (p->token->kind == T_RPAREN)
			break;
		if (++n > MAX_ARGUMENTS)
			fail(p, MILLM_E_INVALID_MODEL_FILE, "more than %d arguments", MAX_ARGUMENTS);
		if (p->token->kind == T_MUL || p->token->kind == T_POW)
		{
			bool		is_keywords = p->token->kind == T_POW;

			if (has_spread_keywords || (!is_keywords && has_spread))
				unexpected(p, "an argument");
			arg = new_node(p, is_keywords ? N_SPREAD_KEYWORDS : N_SPREAD);
			p->token++;
			arg->a = parse_expression(p);
			has_spread = has_spread || !is_keywords;
			has_spread_keywords = is_keywords;
		}
		else if (p->token->kind == T_NAME && p->token[1].kind == T_ASSIGN)
		{
			if (has_spread_keywords)
				unexpected(p, "')'");
			arg = new_node(p, N_KEYWORD);
			arg->name = expect_name(p, "a name");
			p->token++;
			arg->a = parse_expression(p);
			has_keyword = true;
		}
		else if (has_keyword || has_spread || has_spread_keywords)
			unexpected(p, "a keyword argument");
		chain_add(&chain, arg ? arg : parse_expression(p));
	}
	expect(p, T_RPAREN, "')'");
	return chain.first;
}

static const Node *
parse_subscribed(Parser *p)
{
	const Node *parts[3] = {NULL, NULL, NULL};
	Node	   *slice;
	int			n = 0;

	if (p->token->kind != T_COLON)
	{
		parts[0] = parse_expression(p);
		if (p->token->kind != T_COLON)
			return parts[0];
	}
	slice = new_node(p, N_SLICE);
	while (n < 2 && take(p, T_COLON))
	{
		n++;
		if (p->token->kind != T_COLON && p->token->kind != T_RBRACKET && p->token->kind != T_COMMA)
			parts[n] = parse_expression(p);
	}
	slice->b = parts[0];
	slice->c = parts[1];
	slice->d = parts[2];
	return slice;
}

static const Node *
parse_subscript(Parser *p, const Node *of)
{
	Node	   *node = new_node(p, N_ITEM);
	Chain		chain = {0};

	node->a = of;
	if (take(p, T_DOT))
	{
		if (p->token->kind == T_INT)
		{
			Node	   *index = new_node(p, N_CONST);

			index->value = millm_value_int(p->token++->integer);
			node->b = index;
			return node;
		}
		node->kind = N_ATTRIBUTE;
		node->name = expect_name(p, "a name or a number");
		return node;
	}
	p->token++;
	do
	{
		if (chain.first)
			expect(p, T_COMMA, "']'");
		chain_add(&chain, parse_subscribed(p));
	} while (p->token->kind != T_RBRACKET);
	p->token++;
	if (chain.first->next)
	{
		Node	   *tuple = new_node(p, N_TUPLE);

		for (const Node *part = chain.first; part; part = part->next)
			if (part->kind == N_SLICE)
				fail(p, MILLM_E_UNSUPPORTED, "a tuple of slices");
		tuple->list = chain.first;
		node->b = tuple;
	}
	else if (chain.first->kind == N_SLICE)
	{
		Node	   *slice = (Node *) chain.first;

		slice->a = of;
		return slice;
	}
	else
		node->b = chain.first;
	return node;
}

static const Node *
parse_call(Parser *p, const Node *of)
{
	Node	   *call = new_node(p, N_CALL);

	call->a = of;
	call->list = parse_arguments(p);
	return call;
}

static const Node *
parse_postfix(Parser *p, const Node *node)
{
	for (;;)
	{
		if (p->token->kind == T_DOT || p->token->kind == T_LBRACKET)
			node = parse_subscript(p, node);
		else if (p->token->kind == T_LPAREN)
			node = parse_call(p, node);
		else
			return node;
	}
}

/* name or dotted.name, as one; no filter or test with dots exists */
static const Name *
parse_dotted_name(Parser *p, const char *what)
{
	const Name *name = expect_name(p, what);

	if (p->token->kind == T_DOT)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "there is no %s with a dot in its name", what);
	return name;
}

/* Filters behind |; or, if at_name, the first without its |. */
static const Node *
parse_filters(Parser *p, const Node *node, bool at_name)
{
	while (at_name || take(p, T_PIPE))
	{
		Node	   *filter = new_node(p, N_FILTER);

		at_name = false;
		filter->a = node;
		filter->name = parse_dotted_name(p, "filter");
		filter->filter = millm_filter_by_name(filter->name->text);
		if (!filter->filter && !p->in_branch)
			fail(p, MILLM_E_INVALID_MODEL_FILE, "there is no filter '%.*s'", (int) filter->name->text.n, filter->name->text.data);
		if (p->token->kind == T_LPAREN)
			filter->list = parse_arguments(p);
		node = filter;
	}
	return node;
}

static const Node *
parse_test(Parser *p, const Node *node)
{
	Node	   *test = new_node(p, N_TEST);
	Node	   *negation;
	bool		is_negated;
	TokenKind	kind;

	p->token++;					/* is */
	is_negated = take_word(p, "not");
	test->a = node;
	test->name = parse_dotted_name(p, "test");
	test->test = millm_test_by_name(test->name->text);
	if (!test->test && !p->in_branch)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "there is no test '%.*s'", (int) test->name->text.n, test->name->text.data);
	kind = p->token->kind;
	if (kind == T_LPAREN)
		test->list = parse_arguments(p);
	else if ((kind == T_NAME && !at_word(p, "else") && !at_word(p, "or") && !at_word(p, "and")) || kind == T_STRING ||
			 kind == T_INT || kind == T_FLOAT || kind == T_LBRACKET || kind == T_LBRACE)
	{
		if (at_word(p, "is"))
			fail(p, MILLM_E_INVALID_MODEL_FILE, "tests cannot be chained with is");
		test->list = parse_postfix(p, parse_primary(p));
	}
	if (!is_negated)
		return test;
	negation = new_node(p, N_NOT);
	negation->a = test;
	return negation;
}

static const Node *
parse_filter_expression(Parser *p, const Node *node)
{
	for (;;)
	{
		if (p->token->kind == T_PIPE)
			node = parse_filters(p, node, false);
		else if (at_word(p, "is"))
			node = parse_test(p, node);
		else if (p->token->kind == T_LPAREN)
			node = parse_call(p, node);
		else
			return node;
	}
}

static const Node *
parse_list(Parser *p)
{
	Node	   *list = new_node(p, N_LIST);
	Chain		chain = {0};

	p->token++;
	while (p->token->kind != T_RBRACKET)
	{
		if (chain.first)
			expect(p, T_COMMA, "',' or ']'");
		if (p->token->kind == T_RBRACKET)
			break;
		chain_add(&chain, parse_expression(p));
	}
	p->token++;
	list->list = chain.first;
	return list;
}

static const Node *
parse_dict(Parser *p)
{
	Node	   *dict = new_node(p, N_DICT);
	Chain		chain = {0};

	p->token++;
	while (p->token->kind != T_RBRACE)
	{
		if (chain.first)
			expect(p, T_COMMA, "',' or '}'");
		if (p->token->kind == T_RBRACE)
			break;
		chain_add(&chain, parse_expression(p));
		expect(p, T_COLON, "':'");
		chain_add(&chain, parse_expression(p));
	}
	p->token++;
	dict->list = chain.first;
	return dict;
}

/* true, none and the like; false: not one of them. */
static bool
constant_of(Str name, Value *v)
{
	if (millm_str_is(name, "true") || millm_str_is(name, "True"))
		*v = millm_value_bool(true);
	else if (millm_str_is(name, "false") || millm_str_is(name, "False"))
		*v = millm_value_bool(false);
	else if (millm_str_is(name, "none") || millm_str_is(name, "None"))
		*v = millm_value_none();
	else
		return false;
	return true;
}

/* A macro needs to know whether its body speaks of what is given besides its parameters. */
static void
note_use(Parser *p, Str name)
{
	for (int i = 0; i < p->n_macros; i++)
	{
		p->macros[i]->uses_caller |= millm_str_is(name, "caller");
		p->macros[i]->uses_varargs |= millm_str_is(name, "varargs");
		p->macros[i]->uses_kwargs |= millm_str_is(name, "kwargs");
	}
}

static Str
parse_adjacent_strings(Parser *p)
{
	Builder		b;

	if (p->token[1].kind != T_STRING)
		return p->token++->text;
	millm_builder_init(&b, p->w, MAX_SOURCE_BYTES);
	while (p->token->kind == T_STRING)
		millm_builder_add(&b, p->token++->text);
	return millm_builder_str(&b);
}

static const Node *
parse_primary(Parser *p)
{
	Node	   *node = NULL;
	const Node *inner;

	enter(p);
	switch (p->token->kind)
	{
		case T_NAME:
			node = new_node(p, N_CONST);
			if (!constant_of(p->token->text, &node->value))
			{
				Name	   *name = intern(p, p->token->text);

				name->is_variable = true;
				node->kind = N_NAME;
				node->name = name;
				note_use(p, p->token->text);
			}
			p->token++;
			inner = node;
			break;
		case T_STRING:
			node = new_node(p, N_CONST);
			node->value = millm_value_string(p->w, parse_adjacent_strings(p));
			inner = node;
			break;
		case T_INT:
		case T_FLOAT:
			node = new_node(p, N_CONST);
			node->value = p->token->kind == T_INT ? millm_value_int(p->token->integer) :
				(Value) {.kind = V_FLOAT, .real = p->token->real};
			p->token++;
			inner = node;
			break;
		case T_LPAREN:
			p->token++;
			inner = parse_tuple_of(p, parse_expression, NULL, true);
			expect(p, T_RPAREN, "')'");
			/* in a list of its own, not in the chain that it was parsed for */
			break;
		case T_LBRACKET:
			inner = parse_list(p);
			break;
		case T_LBRACE:
			inner = parse_dict(p);
			break;
		default:
			unexpected(p, "an expression");
	}
	leave(p);
	return inner;
}

static const Node *
parse_unary(Parser *p, bool with_filters)
{
	const Node *node;

	enter(p);
	if (p->token->kind == T_SUB || p->token->kind == T_ADD)
	{
		Node	   *sign = new_node(p, p->token->kind == T_SUB ? N_NEG : N_POS);

		p->token++;
		sign->a = parse_unary(p, false);
		node = sign;
	}
	else
		node = parse_primary(p);
	node = parse_postfix(p, node);
	if (with_filters)
		node = parse_filter_expression(p, node);
	leave(p);
	return node;
}

/* Binary operators by precedence, all left-associative. */
typedef struct BinaryOperator
{
	TokenKind	token;
	Operator	op;
} BinaryOperator;

static const BinaryOperator sums[] = {{T_ADD, OP_ADD}, {T_SUB, OP_SUB}};
static const BinaryOperator products[] = {{T_MUL, OP_MUL}, {T_DIV, OP_DIV}, {T_FLOORDIV, OP_FLOORDIV}, {T_MOD, OP_MOD}};
static const BinaryOperator powers[] = {{T_POW, OP_POW}};
static const BinaryOperator comparisons[] = {
	{T_EQ, OP_EQ}, {T_NE, OP_NE}, {T_LT, OP_LT}, {T_LE, OP_LE}, {T_GT, OP_GT}, {T_GE, OP_GE}};

#define N_OF(array) (sizeof(array) / sizeof((array)[0]))

static const BinaryOperator *
operator_at(const Parser *p, const BinaryOperator *operators, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (operators[i].token == p->token->kind)
			return &operators[i];
	return NULL;
}

static const Node *
parse_binary(Parser *p, const BinaryOperator *operators, size_t n, ElementParser parse)
{
	const Node *left = parse(p);
	const BinaryOperator *op;

	while ((op = operator_at(p, operators, n)))
	{
		Node	   *node = new_node(p, N_BINARY);

		p->token++;
		node->op = op->op;
		node->a = left;
		node->b = parse(p);
		left = node;
	}
	return left;
}

static const Node *
parse_operand(Parser *p)
{
	return parse_unary(p, true);
}

static const Node *
parse_power(Parser *p)
{
	return parse_binary(p, powers, N_OF(powers), parse_operand);
}

static const Node *
parse_product(Parser *p)
{
	return parse_binary(p, products, N_OF(products), parse_power);
}

static const Node *
parse_concat(Parser *p)
{
	const Node *first = parse_product(p);
	Chain		chain = {0};
	Node	   *concat;

	if (p->token->kind != T_TILDE)
		return first;
	concat = new_node(p, N_CONCAT);
	chain_add(&chain, first);
	while (take(p, T_TILDE))
		chain_add(&chain, parse_product(p));
	concat->list = chain.first;
	return concat;
}

static const Node *
parse_sum(Parser *p)
{
	return parse_binary(p, sums, N_OF(sums), parse_concat);
}

static const Node *
parse_comparison(Parser *p)
{
	const Node *first = parse_sum(p);
	Chain		chain = {0};
	Node	   *comparison = NULL;

	for (;;)
	{
		const BinaryOperator *op = operator_at(p, comparisons, N_OF(comparisons));
		bool		is_not_in = at_word(p, "not") && p->token[1].kind == T_NAME && millm_str_is(p->token[1].text, "in");
		Node	   *operand;

		if (!op && !is_not_in && !at_word(p, "in"))
			break;
		if (!comparison)
			comparison = new_node(p, N_COMPARE);
		operand = new_node(p, N_OPERAND);
		operand->op = op ? op->op : is_not_in ? OP_NOT_IN : OP_IN;
		p->token += is_not_in ? 2 : 1;
		operand->a = parse_sum(p);
		chain_add(&chain, operand);
	}
	if (!comparison)
		return first;
	comparison->a = first;
	comparison->list = chain.first;
	return comparison;
}

static const Node *
parse_not(Parser *p)
{
	Node	   *node;

	if (!at_word(p, "not"))
		return parse_comparison(p);
	enter(p);
	node = new_node(p, N_NOT);
	p->token++;
	node->a = parse_not(p);
	leave(p);
	return node;
}

static const Node *
parse_logical(Parser *p, const char *word, NodeKind kind, ElementParser parse)
{
	const Node *left = parse(p);

	while (take_word(p, word))
	{
		Node	   *node = new_node(p, kind);

		node->a = left;
		node->b = parse(p);
		left = node;
	}
	return left;
}

static const Node *
parse_and(Parser *p)
{
	return parse_logical(p, "and", N_AND, parse_not);
}

static const Node *
parse_or(Parser *p)
{
	return parse_logical(p, "or", N_OR, parse_and);
}

/*
 * A conditional's first part is parsed before its "if" is seen; so whether filters of it exist must be a question of run time
 * whenever an "if" follows.  Looking ahead for the word at this level answers it.
 */
static bool
is_conditional_ahead(const Parser *p)
{
	int			depth = 0;

	for (const Token *t = p->token; t->kind != T_END && t->kind != T_PRINT_END && t->kind != T_BLOCK_END; t++)
	{
		if (t->kind == T_LPAREN || t->kind == T_LBRACKET || t->kind == T_LBRACE)
			depth++;
		else if (t->kind == T_RPAREN || t->kind == T_RBRACKET || t->kind == T_RBRACE)
			depth--;
		if (depth < 0 || (depth == 0 && t->kind == T_COMMA))
			return false;
		if (depth == 0 && t->kind == T_NAME && millm_str_is(t->text, "if"))
			return true;
	}
	return false;
}

static const Node *
parse_expression(Parser *p)
{
	bool		was_in_branch = p->in_branch;
	const Node *node;

	enter(p);
	p->in_branch = p->in_branch || is_conditional_ahead(p);
	node = parse_or(p);
	while (at_word(p, "if"))
	{
		Node	   *conditional = new_node(p, N_CONDITIONAL);

		p->token++;
		conditional->a = node;
		conditional->b = parse_or(p);
		if (take_word(p, "else"))
			conditional->c = parse_expression(p);
		node = conditional;
	}
	p->in_branch = was_in_branch;
	leave(p);
	return node;
}

/* ---- statements ---- */

/* A name, or a namespace's attribute where that may stand. */
static const Node *
parse_target_element(Parser *p, bool with_namespace)
{
	const Node *node;

	if (with_namespace && p->token->kind == T_NAME && p->token[1].kind == T_DOT && !constant_of(p->token->text, &(Value) {0}))
	{
		Node	   *attribute = new_node(p, N_NAMESPACE_ATTRIBUTE);
		Node	   *name = new_node(p, N_NAME);

		name->name = expect_name(p, "a name");
		p->token++;
		attribute->a = name;
		attribute->name = expect_name(p, "a name");
		return attribute;
	}
	node = parse_primary(p);
	return node;
}

static const Node *
parse_plain_target(Parser *p)
{
	return parse_target_element(p, false);
}

static const Node *
parse_set_target(Parser *p)
{
	return parse_target_element(p, true);
}

static void
check_target(Parser *p, const Node *target)
{
	if (target->kind == N_TUPLE)
		for (const Node *part = target->list; part; part = part->next)
			check_target(p, part);
	else if (target->kind != N_NAME && target->kind != N_NAMESPACE_ATTRIBUTE)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "cannot assign to this");
}

static const Node *
parse_target(Parser *p, ElementParser parse, const char *end_word)
{
	const Node *target = parse_tuple_of(p, parse, end_word, false);

	check_target(p, target);
	return target;
}

/* Statements up to one of the end words, which becomes the current token; its tag's begin is behind us. */
static const Node *
parse_block(Parser *p, const char *const *ends)
{
	const Node *body;

	(void) take(p, T_COLON);
	expect(p, T_BLOCK_END, "'%}'");
	enter(p);
	body = parse_body(p, ends);
	leave(p);
	if (p->token->kind == T_END)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "unexpected end, looking for '%s'", ends[0]);
	return body;
}

/* A block whose filters and breaks have nothing to do with what is around it. */
static const Node *
parse_scope(Parser *p, bool in_loop, const char *const *ends)
{
	bool		was_in_branch = p->in_branch;
	bool		was_in_loop = p->in_loop;
	const Node *body;

	p->in_branch = false;
	p->in_loop = in_loop;
	body = parse_block(p, ends);
	p->in_branch = was_in_branch;
	p->in_loop = was_in_loop;
	return body;
}

static const Node *
parse_if(Parser *p, Node *node)
{
	static const char *const ends[] = {"endif", "elif", "else", NULL};
	static const char *const else_ends[] = {"endif", NULL};
	bool		was_in_branch = p->in_branch;

	p->in_branch = true;
	node->a = parse_tuple_of(p, parse_or, NULL, false);
	node->body = parse_block(p, ends);
	if (take_word(p, "elif"))
	{
		Node	   *other = new_node(p, N_IF);

		enter(p);				/* elifs are ifs within else */
		node->else_body = parse_if(p, other);
		leave(p);
	}
	else if (take_word(p, "else"))
	{
		node->else_body = parse_block(p, else_ends);
		p->token++;
	}
	else
		p->token++;
	p->in_branch = was_in_branch;
	return node;
}

static const Node *
parse_for(Parser *p, Node *node)
{
	static const char *const ends[] = {"endfor", "else", NULL};
	static const char *const else_ends[] = {"endfor", NULL};

	node->target = parse_target(p, parse_plain_target, "in");
	if (!take_word(p, "in"))
		unexpected(p, "'in'");
	node->a = parse_tuple_of(p, parse_or, "recursive", false);
	if (take_word(p, "if"))
		node->b = parse_expression(p);
	node->flag = take_word(p, "recursive");
	node->body = parse_scope(p, true, ends);
	if (take_word(p, "else"))
		node->else_body = parse_scope(p, p->in_loop && !node->flag, else_ends);
	p->token++;
	return node;
}

static const Node *
parse_set(Parser *p, Node *node)
{
	static const char *const ends[] = {"endset", NULL};

	node->target = parse_target(p, parse_set_target, NULL);
	if (take(p, T_ASSIGN))
	{
		node->a = parse_tuple(p);
		return node;
	}
	node->kind = N_SET_BLOCK;
	if (p->token->kind == T_PIPE)
		node->a = parse_filters(p, new_node(p, N_BLOCK_TEXT), false);
	node->body = parse_scope(p, p->in_loop, ends);
	p->token++;
	return node;
}

static const Node *
parse_filter_block(Parser *p, Node *node)
{
	static const char *const ends[] = {"endfilter", NULL};

	node->a = parse_filters(p, new_node(p, N_BLOCK_TEXT), true);
	node->body = parse_scope(p, p->in_loop, ends);
	p->token++;
	return node;
}

static void
parse_signature(Parser *p, MacroSyntax *macro)
{
	expect(p, T_LPAREN, "'('");
	while (p->token->kind != T_RPAREN)
	{
		if (macro->n > 0)
			expect(p, T_COMMA, "',' or ')'");
		if (macro->n == MAX_ARGUMENTS)
			fail(p, MILLM_E_INVALID_MODEL_FILE, "more than %d parameters", MAX_ARGUMENTS);
		if (p->token->kind == T_NAME && constant_of(p->token->text, &(Value) {0}))
			unexpected(p, "a name");
		macro->names[macro->n] = expect_name(p, "a name");
		for (int i = 0; i < macro->n; i++)
			if (macro->names[i] == macro->names[macro->n])
				fail(p, MILLM_E_INVALID_MODEL_FILE, "two parameters of the same name");
		if (take(p, T_ASSIGN))
			macro->defaults[macro->n] = parse_expression(p);
		else if (macro->n > 0 && macro->defaults[macro->n - 1])
			fail(p, MILLM_E_INVALID_MODEL_FILE, "a parameter without a default follows one with a default");
		macro->n++;
	}
	p->token++;
}

static const Node *
parse_macro_body(Parser *p, MacroSyntax *macro, const char *const *ends)
{
	const Node *body;

	if (p->n_macros == MAX_NESTING)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "nested more than %d deep", MAX_NESTING);
	p->macros[p->n_macros++] = macro;
	body = parse_scope(p, false, ends);
	p->n_macros--;
	p->token++;
	return body;
}

static const Node *
parse_macro(Parser *p, Node *node)
{
	static const char *const ends[] = {"endmacro", NULL};
	MacroSyntax *macro = millm_work_array(p->w, 1, sizeof(*macro));

	if (p->token->kind == T_NAME && constant_of(p->token->text, &(Value) {0}))
		unexpected(p, "a name");
	node->name = expect_name(p, "a name");
	parse_signature(p, macro);
	node->macro = macro;
	node->body = parse_macro_body(p, macro, ends);
	return node;
}

static const Node *
parse_call_block(Parser *p, Node *node)
{
	static const char *const ends[] = {"endcall", NULL};
	MacroSyntax *macro = millm_work_array(p->w, 1, sizeof(*macro));

	if (p->token->kind == T_LPAREN)
		parse_signature(p, macro);
	node->name = intern(p, millm_str("caller"));
	node->macro = macro;
	node->a = parse_expression(p);
	if (node->a->kind != N_CALL)
		fail(p, MILLM_E_INVALID_MODEL_FILE, "expected a call");
	node->body = parse_macro_body(p, macro, ends);
	return node;
}

static const Node *
parse_print(Parser *p)
{
	Chain		chain = {0};

	while (p->token->kind != T_BLOCK_END)
	{
		Node	   *print = new_node(p, N_PRINT);

		if (chain.first)
			expect(p, T_COMMA, "','");
		print->a = parse_expression(p);
		chain_add(&chain, print);
	}
	return chain.first;
}

static const Node *
parse_statement(Parser *p)
{
	static const char *const refused[] = {"block", "with", "autoescape", "include", "import", "from", "extends"};
	static const char *const generation_ends[] = {"endgeneration", NULL};
	Node	   *node = new_node(p, N_IF);

	if (p->token->kind != T_NAME)
		unexpected(p, "the name of a tag");
	if (take_word(p, "if"))
		return parse_if(p, node);
	node->kind = N_FOR;
	if (take_word(p, "for"))
		return parse_for(p, node);
	node->kind = N_SET;
	if (take_word(p, "set"))
		return parse_set(p, node);
	node->kind = N_FILTER_BLOCK;
	if (take_word(p, "filter"))
		return parse_filter_block(p, node);
	node->kind = N_MACRO;
	if (take_word(p, "macro"))
		return parse_macro(p, node);
	node->kind = N_CALL_BLOCK;
	if (take_word(p, "call"))
		return parse_call_block(p, node);
	node->kind = N_GENERATION;
	if (take_word(p, "generation"))
	{
		node->body = parse_scope(p, false, generation_ends);
		p->token++;
		return node;
	}
	if (take_word(p, "print"))
		return parse_print(p);
	if (at_word(p, "break") || at_word(p, "continue"))
	{
		node->kind = at_word(p, "break") ? N_BREAK : N_CONTINUE;
		if (!p->in_loop)
			fail(p, MILLM_E_INVALID_MODEL_FILE, "'%.*s' outside loop", (int) p->token->text.n, p->token->text.data);
		p->token++;
		return node;
	}
	for (size_t i = 0; i < N_OF(refused); i++)
		if (at_word(p, refused[i]))
			fail(p, MILLM_E_UNSUPPORTED, "the tag '%s' is not supported", refused[i]);
	fail(p, MILLM_E_INVALID_MODEL_FILE, "unknown tag '%.*s'", p->token->text.n < 60 ? (int) p->token->text.n : 60, p->token->text.data);
}

static const Node *
parse_body(Parser *p, const char *const *ends)
{
	Chain		chain = {0};

	for (;;)
	{
		Node	   *node;

		switch (p->token->kind)
		{
			case T_DATA:
				node = new_node(p, N_TEXT);
				node->value = millm_value_string(p->w, p->token++->text);
				chain_add(&chain, node);
				continue;
			case T_PRINT_BEGIN:
				node = new_node(p, N_PRINT);
				p->token++;
				node->a = parse_tuple(p);
				expect(p, T_PRINT_END, "'}}'");
				chain_add(&chain, node);
				continue;
			case T_BLOCK_BEGIN:
				p->token++;
				for (size_t i = 0; ends && ends[i]; i++)
					if (at_word(p, ends[i]))
						return chain.first;
				{
					const Node *statement = parse_statement(p);

					expect(p, T_BLOCK_END, "'%}'");
					for (const Node *next; statement; statement = next)
					{
						next = statement->next;
						chain_add(&chain, statement);
					}
				}
				continue;
			default:			/* T_END: whoever wants more says so */
				return chain.first;
		}
	}
}

void
millm_template_parse(MillmTemplate *t, const char *source, size_t n)
{
	Parser		p = {.w = &t->work, .t = t};

	p.token = millm_template_lex(p.w, source, n);
	t->body = parse_body(&p, NULL);
	t->work.line = 0;
}
