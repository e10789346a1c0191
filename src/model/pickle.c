/*
 * pickle.c -- see pickle.h.
 *
 * A stack machine over values that are numbered as they are made; stack, memo, tuples and tables hold numbers.  Nothing is recursive and
 * no value is copied, so the work and the memory are bounded by how many values may be pushed.  Tables keep their pairs in one list, in the
 * order in which they were set: only those of the last table matter, and it is known at the end.
 *
 * Owns: all of that, and the views that it found.  Borrows: the bytes.
 * Refuses: everything but what torch.save() writes for a state_dict, protocol 2 and newer.
 */
#include "pickle.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "shown.h"

#define MAX_PUSHES		((uint32_t) 4 << 20)	/* some 24 for each tensor */
#define MAX_TENSORS		((size_t) 1 << 18)
#define MAX_GLOBAL		255						/* bytes of a module's name, and of what it has */
#define FIRST_CAPACITY	64

typedef enum Kind {NONE, MARK, BOOLEAN, INTEGER, TEXT, TUPLE, LIST, TABLE, GLOBAL, STORAGE, TENSOR} Kind;

typedef struct Value
{
	uint8_t		kind;
	uint8_t		which;			/* GLOBAL: of globals[]; STORAGE: dtype */
	uint32_t	n;				/* TUPLE: members; STORAGE: the value that is its key; TENSOR: of views[] */
	int64_t		at;				/* INTEGER: itself; TEXT: in the bytes; TUPLE: in members[]; STORAGE: elements */
} Value;

/* One key of one table.  Numbers of values. */
typedef struct Pair
{
	uint32_t	table, key, value;
} Pair;

typedef struct Entry
{
	const char *name;
	uint32_t	view;
} Entry;

struct MillmPickle
{
	MillmView  *views;
	size_t		n_views;
	Entry	   *entries;
	size_t		n_entries;
};

typedef struct Machine
{
	MillmPickle *out;
	const char *file;
	MillmError *err;
	char	   *bytes;
	size_t		len;
	size_t		at;				/* of the next byte */
	size_t		op_at;			/* of the opcode in work */
	Value	   *values;
	size_t		n_values;
	uint32_t   *stack;
	size_t		n_stack;
	uint32_t	n_pushed;		/* so far, popped or not */
	uint32_t   *memo;			/* NO_VALUE: not set */
	size_t		n_memo;
	uint32_t   *members;		/* of tuples */
	size_t		n_members;
	Pair	   *pairs;
	size_t		n_pairs;
} Machine;

#define NO_VALUE UINT32_MAX

typedef enum GlobalKind {MAKE_TABLE, MAKE_TENSOR, MAKE_PARAMETER, STORAGE_TYPE} GlobalKind;

static const struct
{
	const char *module, *name;
	GlobalKind	kind;
	MillmDtype	dtype;			/* of a STORAGE_TYPE */
}			globals[] = {
	{"collections", "OrderedDict", MAKE_TABLE, 0},
	{"torch._utils", "_rebuild_tensor_v2", MAKE_TENSOR, 0},
	{"torch._utils", "_rebuild_parameter", MAKE_PARAMETER, 0},
	{"torch", "FloatStorage", STORAGE_TYPE, MILLM_F32},
	{"torch", "HalfStorage", STORAGE_TYPE, MILLM_F16},
	{"torch", "BFloat16Storage", STORAGE_TYPE, MILLM_BF16},
	{"torch", "DoubleStorage", STORAGE_TYPE, MILLM_F64},
	{"torch", "LongStorage", STORAGE_TYPE, MILLM_I64},
	{"torch", "IntStorage", STORAGE_TYPE, MILLM_I32},
	{"torch", "ShortStorage", STORAGE_TYPE, MILLM_I16},
	{"torch", "CharStorage", STORAGE_TYPE, MILLM_I8},
	{"torch", "ByteStorage", STORAGE_TYPE, MILLM_U8},
	{"torch", "BoolStorage", STORAGE_TYPE, MILLM_BOOL},
};

/* What pickle calls the opcodes that are refused. */
static const char *const refused[256] = {
	['0'] = "POP", ['1'] = "POP_MARK", ['2'] = "DUP", ['B'] = "BINBYTES", ['C'] = "SHORT_BINBYTES", ['F'] = "FLOAT", ['G'] = "BINFLOAT",
	['I'] = "INT", ['L'] = "LONG", ['P'] = "PERSID", ['S'] = "STRING", ['T'] = "BINSTRING", ['U'] = "SHORT_BINSTRING", ['V'] = "UNICODE",
	['d'] = "DICT", ['g'] = "GET", ['i'] = "INST", ['l'] = "LIST", ['o'] = "OBJ", ['p'] = "PUT", [0x80] = "PROTO", [0x81] = "NEWOBJ",
	[0x82] = "EXT1", [0x83] = "EXT2", [0x84] = "EXT4", [0x8B] = "LONG4", [0x8D] = "BINUNICODE8", [0x8E] = "BINBYTES8", [0x8F] = "EMPTY_SET",
	[0x90] = "ADDITEMS", [0x91] = "FROZENSET", [0x92] = "NEWOBJ_EX", [0x96] = "BYTEARRAY8", [0x97] = "NEXT_BUFFER", [0x98] = "READONLY_BUFFER",
};

/* --- Refusals -------------------------------------------------------------------------------------------- */

static MillmCode
no_memory(Machine *m)
{
	return millm_fail(m->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

static MillmCode damaged(Machine *m, const char *fmt,...) __attribute__((format(printf, 2, 3)));

static MillmCode
damaged(Machine *m, const char *fmt,...)
{
	char		what[400];
	va_list		args;

	va_start(args, fmt);
	vsnprintf(what, sizeof(what), fmt, args);
	va_end(args);
	millm_fail(m->err, MILLM_E_INVALID_MODEL_FILE, "invalid PyTorch checkpoint \"%s\"", m->file);
	millm_detail(m->err, "At byte %zu of its pickle: %s.", m->op_at, what);
	return MILLM_E_INVALID_MODEL_FILE;
}

/* The program asks for something that no checkpoint needs. */
static MillmCode
refuse(Machine *m, const char *what, const char *name)
{
	millm_fail(m->err, MILLM_E_INVALID_MODEL_FILE, "PyTorch checkpoint \"%s\" uses the %s %s", m->file, what, shown(name).text);
	millm_detail(m->err, "At byte %zu of its pickle. millm never runs code from a checkpoint: it only rebuilds tensors, and refuses everything else.", m->op_at);
	millm_hint(m->err, "Choose a repository, or a revision, with safetensors.");
	return MILLM_E_INVALID_MODEL_FILE;
}

/* --- The machine ------------------------------------------------------------------------------------------- */

/* Room for one element after n of them: array, or where it moved to; at least the next power of two of them.  NULL: out of memory. */
static void *
grown(void *array, size_t n, size_t element)
{
	if (n == 0)
		return array ? array : malloc(FIRST_CAPACITY * element);
	return n < FIRST_CAPACITY || (n & (n - 1)) != 0 ? array : realloc(array, 2 * n * element);
}

static MillmCode
push(Machine *m, uint32_t value)
{
	uint32_t   *stack;

	if (m->n_pushed++ >= MAX_PUSHES)
		return damaged(m, "it makes more than %u values", MAX_PUSHES);
	if (!(stack = grown(m->stack, m->n_stack, sizeof(*stack))))
		return no_memory(m);
	m->stack = stack;
	m->stack[m->n_stack++] = value;
	return MILLM_OK;
}

static MillmCode
push_new(Machine *m, Value v)
{
	Value	   *values = grown(m->values, m->n_values, sizeof(*values));

	if (!values)
		return no_memory(m);
	m->values = values;
	m->values[m->n_values] = v;
	return push(m, (uint32_t) m->n_values++);
}

/* The value at depth from the top, 0 the last; of that kind, or NULL. */
static const Value *
peek(const Machine *m, size_t depth, Kind kind)
{
	const Value *v = depth < m->n_stack ? &m->values[m->stack[m->n_stack - 1 - depth]] : NULL;

	return v && v->kind == kind ? v : NULL;
}

/* Is the value of that kind? */
static bool
is(const Machine *m, uint32_t value, Kind kind)
{
	return m->values[value].kind == kind;
}

static const char *
text(const Machine *m, uint32_t value)
{
	return m->bytes + m->values[value].at;
}

/* Values above the last mark; SIZE_MAX: there is no mark. */
static size_t
above_mark(const Machine *m)
{
	size_t		n = 0;

	while (n < m->n_stack && !peek(m, n, MARK))
		n++;
	return n < m->n_stack ? n : SIZE_MAX;
}

/* The next n bytes, or NULL. */
static char *
take(Machine *m, size_t n)
{
	char	   *p = m->bytes + m->at;

	if (n > m->len - m->at)
		return NULL;
	m->at += n;
	return p;
}

/* A number of n <= 8 bytes, little-endian; as signed as LONG1 has it when is_signed.  false: the bytes end before. */
static bool
take_number(Machine *m, size_t n, bool is_signed, int64_t *out)
{
	const unsigned char *p = (const unsigned char *) take(m, n);
	uint64_t	u = is_signed && n > 0 && p && p[n - 1] & 0x80 ? UINT64_MAX : 0;

	for (size_t i = n; p && i-- > 0;)
		u = u << 8 | p[i];
	*out = (int64_t) u;
	return p != NULL;
}

/* --- Opcodes ---------------------------------------------------------------------------------------------------- */

static MillmCode
cut(Machine *m)
{
	return damaged(m, "it ends within an opcode");
}

static MillmCode
op_integer(Machine *m, size_t n, bool is_signed)
{
	Value		v = {.kind = INTEGER};

	return take_number(m, n, is_signed, &v.at) ? push_new(m, v) : cut(m);
}

/* LONG1: an integer of so many bytes. */
static MillmCode
op_long(Machine *m)
{
	int64_t		n;

	if (!take_number(m, 1, false, &n))
		return cut(m);
	return n <= 8 ? op_integer(m, (size_t) n, true) : damaged(m, "it holds an integer of %d bytes", (int) n);
}

/* A text, its length in size_bytes in front of it.  It moves one byte to the front, so that there is room for a NUL behind it. */
static MillmCode
op_text(Machine *m, size_t size_bytes)
{
	int64_t		n;
	char	   *p;

	if (!take_number(m, size_bytes, false, &n) || !(p = take(m, (size_t) n)))
		return cut(m);
	if (memchr(p, '\0', (size_t) n) || millm_utf8_valid_bytes(p, (size_t) n) != (size_t) n)
		return damaged(m, "it holds a text that is not UTF-8");
	memmove(p - 1, p, (size_t) n);
	p[n - 1] = '\0';
	return push_new(m, (Value) {.kind = TEXT, .at = p - 1 - m->bytes});
}

static MillmCode
push_global(Machine *m, const char *module, const char *name)
{
	char		full[2 * MAX_GLOBAL + 2];

	for (size_t i = 0; i < sizeof(globals) / sizeof(globals[0]); i++)
		if (strcmp(globals[i].module, module) == 0 && strcmp(globals[i].name, name) == 0)
			return push_new(m, (Value) {.kind = GLOBAL, .which = (uint8_t) i});
	snprintf(full, sizeof(full), "%.*s.%.*s", MAX_GLOBAL, module, MAX_GLOBAL, name);
	return refuse(m, "global", full);
}

/* The rest of the line, its end replaced by a NUL; NULL when there is no such line. */
static char *
take_line(Machine *m)
{
	size_t		left = m->len - m->at;
	char	   *p = m->bytes + m->at, *end = memchr(p, '\n', left < MAX_GLOBAL + 1 ? left : MAX_GLOBAL + 1);

	if (!end || memchr(p, '\0', (size_t) (end - p)))
		return NULL;
	*end = '\0';
	m->at += (size_t) (end - p) + 1;
	return p;
}

static MillmCode
op_global(Machine *m)
{
	char	   *module = take_line(m), *name = module ? take_line(m) : NULL;

	return name ? push_global(m, module, name) : damaged(m, "a global has no name, or one of more than %d bytes", MAX_GLOBAL);
}

static MillmCode
op_stack_global(Machine *m)
{
	if (!peek(m, 1, TEXT) || !peek(m, 0, TEXT))
		return damaged(m, "a global has no name");
	m->n_stack -= 2;
	return push_global(m, text(m, m->stack[m->n_stack]), text(m, m->stack[m->n_stack + 1]));
}

/* The last n values become a tuple; also what is below them goes, when it is a mark. */
static MillmCode
op_tuple(Machine *m, size_t n, bool has_mark)
{
	Value		v = {.kind = TUPLE, .n = (uint32_t) n, .at = (int64_t) m->n_members};

	if (n > m->n_stack)
		return damaged(m, "a tuple lacks members");
	for (size_t i = 0; i < n; i++)
	{
		uint32_t   *members;

		if (is(m, m->stack[m->n_stack - n + i], MARK))
			return damaged(m, "a tuple lacks members");
		if (!(members = grown(m->members, m->n_members, sizeof(*members))))
			return no_memory(m);
		m->members = members;
		m->members[m->n_members++] = m->stack[m->n_stack - n + i];
	}
	m->n_stack -= n + has_mark;
	return push_new(m, v);
}

static MillmCode
op_marked_tuple(Machine *m)
{
	size_t		n = above_mark(m);

	return n != SIZE_MAX ? op_tuple(m, n, true) : damaged(m, "a tuple has no mark");
}

/* Set n / 2 keys of the table below the last n values, and below their mark. */
static MillmCode
op_set_items(Machine *m, size_t n, bool has_mark)
{
	if (n == SIZE_MAX || n % 2 != 0 || !peek(m, n + has_mark, TABLE))
		return damaged(m, "keys are set of something that is no table");
	for (size_t i = m->n_stack - n; i < m->n_stack; i += 2)
	{
		Pair	   *pairs = grown(m->pairs, m->n_pairs, sizeof(*pairs));

		if (!pairs)
			return no_memory(m);
		m->pairs = pairs;
		m->pairs[m->n_pairs++] = (Pair) {m->stack[m->n_stack - n - has_mark - 1], m->stack[i], m->stack[i + 1]};
	}
	m->n_stack -= n + has_mark;
	return MILLM_OK;
}

/* Lists are in a table's metadata only: what they hold does not matter. */
static MillmCode
op_append(Machine *m, size_t n, bool has_mark)
{
	if (n == SIZE_MAX || !peek(m, n + has_mark, LIST))
		return damaged(m, "something is appended to what is no list");
	m->n_stack -= n + has_mark;
	return MILLM_OK;
}

/* The attributes of an OrderedDict: a state_dict has _metadata, which no tensor needs. */
static MillmCode
op_build(Machine *m)
{
	if (!peek(m, 0, TABLE) || !peek(m, 1, TABLE))
		return damaged(m, "attributes are given to something that is no table");
	m->n_stack--;
	return MILLM_OK;
}

static MillmCode
op_put(Machine *m, int64_t i)
{
	if (m->n_stack == 0 || peek(m, 0, MARK))
		return damaged(m, "there is nothing to be remembered");
	if (i >= MAX_PUSHES)
		return damaged(m, "it remembers value %lld, of at most %u", (long long) i, MAX_PUSHES);
	while (m->n_memo <= (size_t) i)
	{
		uint32_t   *memo = grown(m->memo, m->n_memo, sizeof(*memo));

		if (!memo)
			return no_memory(m);
		m->memo = memo;
		m->memo[m->n_memo++] = NO_VALUE;
	}
	m->memo[i] = m->stack[m->n_stack - 1];
	return MILLM_OK;
}

static MillmCode
op_numbered_put(Machine *m, size_t size_bytes)
{
	int64_t		i;

	return take_number(m, size_bytes, false, &i) ? op_put(m, i) : cut(m);
}

static MillmCode
op_get(Machine *m, size_t size_bytes)
{
	int64_t		i;

	if (!take_number(m, size_bytes, false, &i))
		return cut(m);
	if (i >= (int64_t) m->n_memo || m->memo[i] == NO_VALUE)
		return damaged(m, "it recalls value %lld, which it never remembered", (long long) i);
	return push(m, m->memo[i]);
}

/* ('storage', type, key, location, elements) */
static MillmCode
op_persistent_id(Machine *m)
{
	const Value *id = peek(m, 0, TUPLE), *type, *n;
	const uint32_t *part;

	if (!id || id->n != 5)
		return damaged(m, "a reference to a storage does not have five parts");
	part = m->members + id->at;
	type = &m->values[part[1]];
	n = &m->values[part[4]];
	if (!is(m, part[0], TEXT) || strcmp(text(m, part[0]), "storage") != 0 || type->kind != GLOBAL || globals[type->which].kind != STORAGE_TYPE ||
		!is(m, part[2], TEXT) || !is(m, part[3], TEXT) || n->kind != INTEGER || n->at < 0)
		return damaged(m, "a reference to a storage is none");
	m->n_stack--;
	return push_new(m, (Value) {.kind = STORAGE, .which = (uint8_t) globals[type->which].dtype, .n = part[2], .at = n->at});
}

/* A tuple of at most MILLM_PICKLE_MAX_DIMS integers that are not negative; how many, or -1. */
static int
read_dims(const Machine *m, uint32_t value, int64_t *out)
{
	const Value *tuple = &m->values[value];

	if (tuple->kind != TUPLE || tuple->n > MILLM_PICKLE_MAX_DIMS)
		return -1;
	for (uint32_t i = 0; i < tuple->n; i++)
	{
		const Value *v = &m->values[m->members[tuple->at + i]];

		if (v->kind != INTEGER || v->at < 0)
			return -1;
		out[i] = v->at;
	}
	return (int) tuple->n;
}

/* (storage, offset, dims, strides, requires_grad, hooks[, metadata]) */
static MillmCode
make_tensor(Machine *m, const Value *args)
{
	const uint32_t *arg;
	MillmView	view = {0}, *views;
	const Value *storage, *offset;

	if (args->n < 6 || args->n > 7)
		return damaged(m, "a tensor is made of %u parts, not of 6 or 7", args->n);
	arg = m->members + args->at;
	storage = &m->values[arg[0]];
	offset = &m->values[arg[1]];
	if (storage->kind != STORAGE || offset->kind != INTEGER || offset->at < 0)
		return damaged(m, "a tensor has no storage");
	view.n_dims = read_dims(m, arg[2], view.dims);
	if (view.n_dims < 0 || read_dims(m, arg[3], view.strides) != view.n_dims)
		return damaged(m, "a tensor has an impossible shape, or more than %d dimensions", MILLM_PICKLE_MAX_DIMS);
	if (!is(m, arg[4], BOOLEAN) || !is(m, arg[5], TABLE) || (args->n == 7 && !is(m, arg[6], NONE) && !is(m, arg[6], TABLE)))
		return damaged(m, "a tensor has hooks or metadata that are none");
	if (m->out->n_views == MAX_TENSORS)
		return damaged(m, "it makes more than %zu tensors", MAX_TENSORS);
	view.dtype = (MillmDtype) storage->which;
	view.n_stored = storage->at;
	view.key = text(m, storage->n);
	view.offset = offset->at;
	if (!(views = grown(m->out->views, m->out->n_views, sizeof(*views))))
		return no_memory(m);
	m->out->views = views;
	m->out->views[m->out->n_views] = view;
	m->n_stack -= 2;
	return push_new(m, (Value) {.kind = TENSOR, .n = (uint32_t) m->out->n_views++});
}

/* Call one of the globals with a tuple of arguments. */
static MillmCode
op_reduce(Machine *m)
{
	const Value *args = peek(m, 0, TUPLE), *callee = peek(m, 1, GLOBAL);
	uint32_t	parameter;

	if (!args || !callee)
		return damaged(m, "it calls what is no function, or without arguments");
	switch (globals[callee->which].kind)
	{
		case MAKE_TABLE:
			if (args->n != 0)
				return damaged(m, "it makes an OrderedDict of %u arguments", args->n);
			m->n_stack -= 2;
			return push_new(m, (Value) {.kind = TABLE});
		case MAKE_TENSOR:
			return make_tensor(m, args);
		case MAKE_PARAMETER:	/* (tensor, requires_grad, hooks) */
			if (args->n != 3 || !is(m, m->members[args->at], TENSOR) || !is(m, m->members[args->at + 1], BOOLEAN) || !is(m, m->members[args->at + 2], TABLE))
				return damaged(m, "it makes a parameter of what is no tensor");
			parameter = m->members[args->at];
			m->n_stack -= 2;
			return push(m, parameter);
		case STORAGE_TYPE:
			break;
	}
	return damaged(m, "it calls %s.%s", globals[callee->which].module, globals[callee->which].name);
}

/* FRAME: how many bytes follow it. */
static MillmCode
op_frame(Machine *m)
{
	int64_t		n;

	if (!take_number(m, 8, false, &n))
		return cut(m);
	return (uint64_t) n <= m->len - m->at ? MILLM_OK : damaged(m, "it ends within a frame");
}

static MillmCode
step(Machine *m, unsigned char op)
{
	char		number[8];

	switch (op)
	{
		case '(': return push_new(m, (Value) {.kind = MARK});
		case 'N': return push_new(m, (Value) {.kind = NONE});
		case 0x88: case 0x89: return push_new(m, (Value) {.kind = BOOLEAN});
		case 'J': return op_integer(m, 4, true);
		case 'K': return op_integer(m, 1, false);
		case 'M': return op_integer(m, 2, false);
		case 0x8A: return op_long(m);
		case 'X': return op_text(m, 4);
		case 0x8C: return op_text(m, 1);
		case 'c': return op_global(m);
		case 0x93: return op_stack_global(m);
		case ')': return op_tuple(m, 0, false);
		case 0x85: return op_tuple(m, 1, false);
		case 0x86: return op_tuple(m, 2, false);
		case 0x87: return op_tuple(m, 3, false);
		case 't': return op_marked_tuple(m);
		case '}': return push_new(m, (Value) {.kind = TABLE});
		case 's': return op_set_items(m, 2, false);
		case 'u': return op_set_items(m, above_mark(m), true);
		case ']': return push_new(m, (Value) {.kind = LIST});
		case 'a': return op_append(m, 1, false);
		case 'e': return op_append(m, above_mark(m), true);
		case 'b': return op_build(m);
		case 'q': return op_numbered_put(m, 1);
		case 'r': return op_numbered_put(m, 4);
		case 0x94: return op_put(m, (int64_t) m->n_memo);
		case 'h': return op_get(m, 1);
		case 'j': return op_get(m, 4);
		case 'Q': return op_persistent_id(m);
		case 'R': return op_reduce(m);
		case 0x95: return op_frame(m);
		default: break;
	}
	snprintf(number, sizeof(number), "0x%02x", op);
	return refuse(m, "pickle opcode", refused[op] ? refused[op] : number);
}

/* The program has ended: what it leaves is a table of tensors. */
static MillmCode
read_table(Machine *m)
{
	MillmPickle *out = m->out;

	if (m->n_stack != 1 || !peek(m, 0, TABLE))
		return damaged(m, "what it holds is no table");
	if (m->at != m->len)
		return damaged(m, "%zu bytes follow its end", m->len - m->at);
	for (size_t i = 0; i < m->n_pairs; i++)
	{
		const Pair *pair = &m->pairs[i];
		Entry	   *entries;

		if (pair->table != m->stack[0])
			continue;
		if (!is(m, pair->key, TEXT))
			return damaged(m, "its table has a key that is no text");
		if (!is(m, pair->value, TENSOR))
			return damaged(m, "\"%s\" is no tensor", shown(text(m, pair->key)).text);
		if (!(entries = grown(out->entries, out->n_entries, sizeof(*entries))))
			return no_memory(m);
		out->entries = entries;
		out->entries[out->n_entries++] = (Entry) {text(m, pair->key), m->values[pair->value].n};
	}
	return out->n_entries > 0 ? MILLM_OK : damaged(m, "its table is empty");
}

static MillmCode
run(Machine *m)
{
	const char *version = take(m, 2);
	MillmCode	rc;

	if (!version || (unsigned char) version[0] != 0x80 || version[1] < 2 || version[1] > 5)
		return damaged(m, "it does not begin as a pickle of protocol 2 to 5");
	for (;;)
	{
		const char *op;

		m->op_at = m->at;
		if (!(op = take(m, 1)))
			return damaged(m, "it has no end");
		if (*op == '.')
			return read_table(m);
		if ((rc = step(m, (unsigned char) *op)) != MILLM_OK)
			return rc;
	}
}

MillmCode
millm_pickle_read(void *bytes, size_t len, const char *file, MillmPickle **out, MillmError *err)
{
	Machine		m = {.file = file, .err = err, .bytes = bytes, .len = len, .out = calloc(1, sizeof(*m.out))};
	MillmCode	rc = m.out ? run(&m) : no_memory(&m);

	free(m.values);
	free(m.stack);
	free(m.memo);
	free(m.members);
	free(m.pairs);
	if (rc == MILLM_OK)
		*out = m.out;
	else
		millm_pickle_free(m.out);
	return rc;
}

void
millm_pickle_free(MillmPickle *p)
{
	if (!p)
		return;
	free(p->views);
	free(p->entries);
	free(p);
}

size_t
millm_pickle_n_tensors(const MillmPickle *p)
{
	return p->n_entries;
}

const char *
millm_pickle_name(const MillmPickle *p, size_t i)
{
	return p->entries[i].name;
}

const MillmView *
millm_pickle_view(const MillmPickle *p, size_t i)
{
	return &p->views[p->entries[i].view];
}
