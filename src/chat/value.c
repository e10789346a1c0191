/*
 * value.c -- making, comparing and walking values.
 */
#include "value.h"

#include <math.h>
#include <string.h>

#include "utf8.h"

/* ---- strings ---- */

static size_t
count_chars(const char *data, size_t n)
{
	size_t		count = 0;

	for (size_t i = 0; i < n; i++)
		count += ((unsigned char) data[i] & 0xC0) != 0x80;
	return count;
}

Str
millm_str_of(const char *data, size_t n, bool is_quoted)
{
	return (Str) {.data = data, .n = (uint32_t) n, .n_chars = (uint32_t) count_chars(data, n), .is_quoted = is_quoted};
}

Str
millm_str(const char *s)
{
	return millm_str_of(s, strlen(s), false);
}

Str
millm_str_cut(Str s, size_t from, size_t to)
{
	s.data += from;
	if (s.origins)
		s.origins += from;
	s.n_chars = s.n_chars == s.n ? (uint32_t) (to - from) : (uint32_t) count_chars(s.data, to - from);
	s.n = (uint32_t) (to - from);
	return s;
}

bool
millm_str_equal(Str a, Str b)
{
	return a.n == b.n && (a.n == 0 || memcmp(a.data, b.data, a.n) == 0);
}

bool
millm_str_is(Str a, const char *b)
{
	return a.n == strlen(b) && memcmp(a.data, b, a.n) == 0;
}

size_t
millm_str_offset(Str s, size_t i)
{
	size_t		at = 0;

	if (s.n_chars == s.n || i == s.n_chars)
		return i == s.n_chars ? s.n : i;
	for (; i > 0; i--)
		do
			at++;
		while (at < s.n && ((unsigned char) s.data[at] & 0xC0) == 0x80);
	return at;
}

Str
millm_str_escape(Work *w, Str s)
{
	Builder		b;

	if (s.is_markup)
		return s;
	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (size_t i = 0, done = 0; i <= s.n; i++)
	{
		const char *by = i == s.n ? "" : s.data[i] == '&' ? "&amp;" : s.data[i] == '<' ? "&lt;" : s.data[i] == '>' ? "&gt;" :
			s.data[i] == '\'' ? "&#39;" : s.data[i] == '"' ? "&#34;" : NULL;

		if (!by)
			continue;
		millm_builder_add(&b, millm_str_cut(s, done, i));
		millm_builder_add(&b, millm_str_of(by, strlen(by), s.origins && i < s.n ? s.origins[i] : s.is_quoted));
		done = i + 1;
	}
	s = millm_builder_str(&b);
	s.is_markup = true;
	return s;
}

/* ---- builder ---- */

void
millm_builder_init(Builder *b, Work *w, size_t max_bytes)
{
	*b = (Builder) {.w = w, .max_bytes = max_bytes};
}

static void
reserve(Builder *b, size_t extra)
{
	size_t		capacity = b->capacity ? b->capacity : 64;
	char	   *data;

	if (extra > b->max_bytes - b->n)
		millm_work_fail(b->w, MILLM_E_INVALID_ARGUMENT, "a text of more than %zu bytes", b->max_bytes);
	if (b->n + extra <= b->capacity)
		return;
	while (capacity < b->n + extra)
		capacity *= 2;
	if (!b->capacity || !millm_work_extend(b->w, b->data, b->capacity, capacity))
	{
		data = millm_work_alloc(b->w, capacity);
		if (b->n > 0)
			memcpy(data, b->data, b->n);
		b->data = data;
	}
	if (b->origins)
	{
		uint8_t    *origins = millm_work_alloc(b->w, capacity);

		memcpy(origins, b->origins, b->n);
		b->origins = origins;
	}
	b->capacity = capacity;
}

void
millm_builder_add(Builder *b, Str s)
{
	if (s.n == 0)
		return;
	millm_work_pay_bytes(b->w, s.n);
	reserve(b, s.n);
	if (b->n == 0)
		b->is_quoted = s.is_quoted;
	if (!b->origins && (s.origins || s.is_quoted != b->is_quoted))
	{
		b->origins = millm_work_alloc(b->w, b->capacity);
		memset(b->origins, b->is_quoted, b->n);
	}
	memcpy(b->data + b->n, s.data, s.n);
	if (s.origins)
		memcpy(b->origins + b->n, s.origins, s.n);
	else if (b->origins)
		memset(b->origins + b->n, s.is_quoted, s.n);
	b->n += s.n;
	b->n_chars += s.n_chars;
}

void
millm_builder_add_text(Builder *b, const char *s)
{
	millm_builder_add(b, millm_str(s));
}

void
millm_builder_add_char(Builder *b, uint32_t cp, bool is_quoted)
{
	char		utf8[4];
	unsigned	n = 1;

	if (cp < 0x80)
		utf8[0] = (char) cp;
	else
	{
		n = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
		for (unsigned i = n - 1; i > 0; i--, cp >>= 6)
			utf8[i] = (char) (0x80 | (cp & 0x3F));
		utf8[0] = (char) ((0xF00u >> n) | cp);
	}
	millm_builder_add(b, (Str) {.data = utf8, .n = n, .n_chars = 1, .is_quoted = is_quoted});
}

Str
millm_builder_str(const Builder *b)
{
	return (Str) {.data = b->n ? b->data : "", .origins = b->origins, .n = (uint32_t) b->n, .n_chars = (uint32_t) b->n_chars,
		.is_quoted = b->is_quoted};
}

/* ---- making ---- */

Value
millm_value_string(Work *w, Str s)
{
	Str		   *copy = millm_work_alloc(w, sizeof(*copy));

	*copy = s;
	return (Value) {.kind = V_STRING, .str = copy};
}

Value
millm_value_text(Work *w, const char *s)
{
	return millm_value_string(w, millm_str(s));
}

Value
millm_value_list(Work *w, ValueKind kind, size_t capacity)
{
	List	   *list = millm_work_array(w, 1, sizeof(*list));

	if (capacity > MAX_ITEMS)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a list of more than %u elements", MAX_ITEMS);
	if (capacity > 0)
		list->items = millm_work_array(w, capacity, sizeof(Value));
	list->capacity = capacity;
	return (Value) {.kind = kind, .list = list};
}

Value
millm_value_dict(Work *w)
{
	return (Value) {.kind = V_DICT, .dict = millm_work_array(w, 1, sizeof(Dict))};
}

Value
millm_value_undefined(Work *w, const char *owner, Str name)
{
	Undefined  *u = millm_work_array(w, 1, sizeof(*u));

	u->owner = owner;
	u->name = name;
	return (Value) {.kind = V_UNDEFINED, .undefined = u};
}

Value
millm_value_pair(Work *w, Value a, Value b)
{
	Value		pair = millm_value_list(w, V_TUPLE, 2);

	millm_list_add(w, pair.list, a);
	millm_list_add(w, pair.list, b);
	return pair;
}

void
millm_list_add(Work *w, List *list, Value v)
{
	millm_work_pay_bytes(w, sizeof(Value));
	if (list->n == list->capacity)
	{
		size_t		capacity = list->capacity ? list->capacity * 2 : 4;
		Value	   *items = list->items;

		if (capacity > MAX_ITEMS)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a list of more than %u elements", MAX_ITEMS);
		items = millm_work_array(w, capacity, sizeof(Value));
		if (list->n > 0)
			memcpy(items, list->items, list->n * sizeof(Value));
		list->items = items;
		list->capacity = capacity;
	}
	list->items[list->n++] = v;
}

static void
require_hashable(Work *w, Value key)
{
	if (key.kind == V_LIST || key.kind == V_DICT)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "unhashable type: '%s'", millm_value_type(key));
	if (key.kind == V_TUPLE)
		for (size_t i = 0; i < key.list->n; i++)
		{
			millm_work_enter(w);
			require_hashable(w, key.list->items[i]);
			millm_work_leave(w);
		}
}

static Entry *
find_entry(Work *w, const Dict *dict, Value key)
{
	millm_work_pay(w, dict->n / 8 + 1);
	if (key.kind == V_STRING)
		millm_work_pay_bytes(w, key.str->n);
	for (size_t i = 0; i < dict->n; i++)
	{
		Entry	   *entry = &dict->entries[i];

		if (key.kind == V_STRING && entry->key.kind == V_STRING ? millm_str_equal(*key.str, *entry->key.str) :
			millm_value_equal(w, entry->key, key))
			return entry;
	}
	return NULL;
}

void
millm_dict_set(Work *w, Dict *dict, Value key, Value value)
{
	Entry	   *entry;

	require_hashable(w, key);
	entry = find_entry(w, dict, key);
	if (entry)
	{
		entry->value = value;
		return;
	}
	if (dict->n == dict->capacity)
	{
		size_t		capacity = dict->capacity ? dict->capacity * 2 : 4;
		Entry	   *entries;

		if (capacity > MAX_ITEMS)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a dict of more than %u elements", MAX_ITEMS);
		entries = millm_work_array(w, capacity, sizeof(Entry));
		if (dict->n > 0)
			memcpy(entries, dict->entries, dict->n * sizeof(Entry));
		dict->entries = entries;
		dict->capacity = capacity;
	}
	dict->entries[dict->n++] = (Entry) {key, value};
}

const Value *
millm_dict_get(Work *w, const Dict *dict, Value key)
{
	Entry	   *entry = find_entry(w, dict, key);

	return entry ? &entry->value : NULL;
}

const Value *
millm_dict_get_str(Work *w, const Dict *dict, Str key)
{
	return millm_dict_get(w, dict, (Value) {.kind = V_STRING, .str = &key});
}

/* Without a search for the key: JSON objects have each once. */
static void
append_entry(Work *w, Dict *dict, size_t capacity, Value key, Value value)
{
	if (!dict->entries)
	{
		if (capacity > MAX_ITEMS)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a dict of more than %u elements", MAX_ITEMS);
		dict->entries = millm_work_array(w, capacity, sizeof(Entry));
		dict->capacity = capacity;
	}
	dict->entries[dict->n++] = (Entry) {key, value};
}

static Str
copy_quoted(Work *w, const char *data, size_t n)
{
	char	   *copy;

	if (n > MAX_STRING_BYTES)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a text of more than %u bytes", MAX_STRING_BYTES);
	copy = millm_work_alloc(w, n);
	memcpy(copy, data, n);
	return millm_str_of(copy, n, true);
}

Value
millm_value_json(Work *w, const json_t *json)
{
	Value		v = millm_value_none();

	millm_work_enter(w);
	millm_work_pay(w, 1);
	switch (json_typeof(json))
	{
		case JSON_OBJECT:
			{
				const char *key;
				json_t	   *member;
				size_t		n = json_object_size(json);

				v = millm_value_dict(w);
				json_object_foreach((json_t *) json, key, member)
					append_entry(w, v.dict, n, millm_value_string(w, copy_quoted(w, key, strlen(key))), millm_value_json(w, member));
				break;
			}
		case JSON_ARRAY:
			v = millm_value_list(w, V_LIST, json_array_size(json));
			for (size_t i = 0; i < json_array_size(json); i++)
				millm_list_add(w, v.list, millm_value_json(w, json_array_get(json, i)));
			break;
		case JSON_STRING:
			v = millm_value_string(w, copy_quoted(w, json_string_value(json), json_string_length(json)));
			break;
		case JSON_INTEGER:
			v = millm_value_int(json_integer_value(json));
			break;
		case JSON_REAL:
			v = (Value) {.kind = V_FLOAT, .real = json_real_value(json)};
			break;
		case JSON_TRUE:
		case JSON_FALSE:
			v = millm_value_bool(json_is_true(json));
			break;
		case JSON_NULL:
			break;
	}
	millm_work_leave(w);
	return v;
}

/* ---- asking ---- */

const char *
millm_value_type(Value v)
{
	switch (v.kind)
	{
		case V_ABSENT:
		case V_UNDEFINED:
			return "Undefined";
		case V_NONE:
			return "NoneType";
		case V_BOOL:
			return "bool";
		case V_INT:
			return "int";
		case V_FLOAT:
			return "float";
		case V_STRING:
			return v.str->is_markup ? "Markup" : "str";
		case V_LIST:
			return "list";
		case V_TUPLE:
			return "tuple";
		case V_GENERATOR:
			return "generator";
		case V_DICT:
			return "dict";
		case V_VIEW:
			return v.view->kind == VIEW_KEYS ? "dict_keys" : v.view->kind == VIEW_VALUES ? "dict_values" : "dict_items";
		case V_RANGE:
			return "range";
		case V_NAMESPACE:
			return "Namespace";
		case V_LOOP:
			return "LoopContext";
		case V_MACRO:
			return "Macro";
		case V_METHOD:
			return "builtin_function_or_method";
		case V_FUNCTION:
			return "function";
	}
	return "object";
}

void
millm_value_require(Work *w, Value v)
{
	const Undefined *u = v.undefined;

	if (v.kind != V_UNDEFINED)
		return;
	if (u->hint)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "%s", u->hint);
	if (u->owner)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "'%s object' has no attribute '%.*s'", u->owner,
						u->name.n < 80 ? (int) u->name.n : 80, u->name.data);
	millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "'%.*s' is undefined", u->name.n < 80 ? (int) u->name.n : 80, u->name.data);
}

bool
millm_value_is_true(Value v)
{
	switch (v.kind)
	{
		case V_ABSENT:
		case V_UNDEFINED:
		case V_NONE:
			return false;
		case V_BOOL:
			return v.boolean;
		case V_INT:
			return v.integer != 0;
		case V_FLOAT:
			return v.real != 0;
		case V_STRING:
			return v.str->n > 0;
		case V_LIST:
		case V_TUPLE:
			return v.list->n > 0;
		case V_DICT:
			return v.dict->n > 0;
		case V_VIEW:
			return v.view->dict->n > 0;
		case V_RANGE:
			return v.range->n > 0;
		case V_GENERATOR:
		case V_NAMESPACE:
		case V_LOOP:
		case V_MACRO:
		case V_METHOD:
		case V_FUNCTION:
			break;
	}
	return true;
}

double
millm_value_to_real(Value v)
{
	return v.kind == V_FLOAT ? v.real : v.kind == V_BOOL ? v.boolean : (double) v.integer;
}

int64_t
millm_value_to_int(Work *w, Value v, const char *what)
{
	if (v.kind == V_BOOL)
		return v.boolean;
	millm_value_require(w, v);
	if (v.kind != V_INT)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "%s must be an integer, not %s", what, millm_value_type(v));
	return v.integer;
}

/* -1, 0, 1, or 2 for a NaN; exact, also where an integer has no double. */
static int
compare_numbers(Value a, Value b)
{
	if (a.kind != V_FLOAT && b.kind != V_FLOAT)
	{
		int64_t		x = a.kind == V_BOOL ? a.boolean : a.integer;
		int64_t		y = b.kind == V_BOOL ? b.boolean : b.integer;

		return (x > y) - (x < y);
	}
	if (a.kind == V_FLOAT && b.kind == V_FLOAT)
		return isnan(a.real) || isnan(b.real) ? 2 : (a.real > b.real) - (a.real < b.real);
	if (a.kind != V_FLOAT)
	{
		int			c = compare_numbers(b, a);

		return c == 2 ? 2 : -c;
	}
	if (isnan(a.real))
		return 2;
	if (a.real >= 0x1p63)
		return 1;
	if (a.real < -0x1p63)
		return -1;
	{
		int64_t		y = b.kind == V_BOOL ? b.boolean : b.integer;
		int64_t		whole = (int64_t) a.real;	/* towards zero */
		double		rest = a.real - (double) whole;

		return whole != y ? (whole > y) - (whole < y) : (rest > 0) - (rest < 0);
	}
}

static bool
equal_lists(Work *w, const List *a, const List *b)
{
	if (a->n != b->n)
		return false;
	for (size_t i = 0; i < a->n; i++)
		if (!millm_value_equal(w, a->items[i], b->items[i]))
			return false;
	return true;
}

static bool
equal_dicts(Work *w, const Dict *a, const Dict *b)
{
	if (a->n != b->n)
		return false;
	for (size_t i = 0; i < a->n; i++)
	{
		const Value *other = millm_dict_get(w, b, a->entries[i].key);

		if (!other || !millm_value_equal(w, a->entries[i].value, *other))
			return false;
	}
	return true;
}

bool
millm_value_equal(Work *w, Value a, Value b)
{
	bool		result;

	if (millm_value_is_number(a) && millm_value_is_number(b))
		return compare_numbers(a, b) == 0;
	millm_work_pay(w, 1);
	if (a.kind != b.kind)
		return false;
	millm_work_enter(w);
	switch (a.kind)
	{
		case V_UNDEFINED:
		case V_NONE:
			result = true;
			break;
		case V_STRING:
			result = millm_str_equal(*a.str, *b.str);
			millm_work_pay_bytes(w, a.str->n == b.str->n ? a.str->n : 0);
			break;
		case V_LIST:
		case V_TUPLE:
			result = equal_lists(w, a.list, b.list);
			break;
		case V_DICT:
			result = equal_dicts(w, a.dict, b.dict);
			break;
		case V_RANGE:
			result = a.range->n == b.range->n && (a.range->n == 0 || (a.range->start == b.range->start &&
																		  (a.range->n == 1 || a.range->step == b.range->step)));
			break;
		case V_VIEW:			/* items() and keys() are equal as sets are */
			result = a.view == b.view ||
				(a.view->kind == b.view->kind && a.view->kind != VIEW_VALUES &&
				 (a.view->kind == VIEW_ITEMS ? equal_dicts(w, a.view->dict, b.view->dict) :
				  a.view->dict->n == b.view->dict->n));
			for (size_t i = 0; result && a.view->kind == VIEW_KEYS && i < a.view->dict->n; i++)
				result = millm_dict_get(w, b.view->dict, a.view->dict->entries[i].key) != NULL;
			break;
		default:				/* by identity */
			result = a.list == b.list;
	}
	millm_work_leave(w);
	return result;
}

int
millm_value_compare(Work *w, Value a, Value b)
{
	int			c = 2;

	millm_value_require(w, a);
	millm_value_require(w, b);
	millm_work_enter(w);
	millm_work_pay(w, 1);
	if (millm_value_is_number(a) && millm_value_is_number(b))
		c = compare_numbers(a, b);
	else if (a.kind == V_STRING && b.kind == V_STRING)
	{
		uint32_t	n = a.str->n < b.str->n ? a.str->n : b.str->n;

		millm_work_pay_bytes(w, n);
		/* UTF-8 sorts as its code points do */
		c = n ? memcmp(a.str->data, b.str->data, n) : 0;
		c = c ? c : (a.str->n > b.str->n) - (a.str->n < b.str->n);
		c = (c > 0) - (c < 0);
	}
	else if (a.kind == b.kind && (a.kind == V_LIST || a.kind == V_TUPLE))
	{
		size_t		i = 0;

		while (i < a.list->n && i < b.list->n && millm_value_equal(w, a.list->items[i], b.list->items[i]))
			i++;
		if (i < a.list->n && i < b.list->n)
			c = millm_value_compare(w, a.list->items[i], b.list->items[i]);
		else
			c = (a.list->n > b.list->n) - (a.list->n < b.list->n);
	}
	else
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "'%s' and '%s' have no order", millm_value_type(a), millm_value_type(b));
	millm_work_leave(w);
	return c;
}

/* Compute what a generator has pending.  It may be asked for itself meanwhile, and then is empty. */
static void
settle(Work *w, List *list)
{
	const Pending *pending = list->pending;

	list->pending = NULL;
	if (pending)
		*list = *pending->compute(w, pending);
}

bool
millm_value_contains(Work *w, Value container, Value v)
{
	switch (container.kind)
	{
		case V_UNDEFINED:
			return false;
		case V_STRING:
			if (v.kind != V_STRING)
				millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "'in <string>' requires string as left operand, not %s", millm_value_type(v));
			millm_work_pay_chars(w, container.str->n);
			return v.str->n == 0 || memmem(container.str->data, container.str->n, v.str->data, v.str->n) != NULL;
		case V_DICT:
			require_hashable(w, v);
			return millm_dict_get(w, container.dict, v) != NULL;
		case V_VIEW:
			if (container.view->kind == VIEW_KEYS)
				return millm_dict_get(w, container.view->dict, v) != NULL;
			break;
		case V_LIST:
		case V_TUPLE:
		case V_RANGE:
			break;
		case V_GENERATOR:		/* looking spends it up to what is found */
			settle(w, container.list);
			while (container.list->n > 0)
			{
				bool		found = millm_value_equal(w, *container.list->items, v);

				container.list->items++;
				container.list->n--;
				container.list->capacity--;
				if (found)
					return true;
			}
			return false;
		default:
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "argument of type '%s' is not iterable", millm_value_type(container));
	}
	{
		List	   *list = millm_value_iterate(w, container);

		for (size_t i = 0; i < list->n; i++)
			if (millm_value_equal(w, list->items[i], v))
				return true;
	}
	return false;
}

List *
millm_value_iterate(Work *w, Value v)
{
	List	   *list;
	Str			chars;

	switch (v.kind)
	{
		case V_LIST:
		case V_TUPLE:
			return v.list;
		case V_GENERATOR:
			settle(w, v.list);
			list = millm_work_alloc(w, sizeof(*list));
			*list = *v.list;
			*v.list = (List) {0};
			return list;
		case V_UNDEFINED:
			return millm_value_list(w, V_LIST, 0).list;
		case V_STRING:
			list = millm_value_list(w, V_LIST, v.str->n_chars).list;
			for (size_t at = 0, end; at < v.str->n; at = end)
			{
				for (end = at + 1; end < v.str->n && ((unsigned char) v.str->data[end] & 0xC0) == 0x80;)
					end++;
				chars = millm_str_cut(*v.str, at, end);
				chars.is_markup = false;	/* Python's iterator knows only str */
				millm_list_add(w, list, millm_value_string(w, chars));
			}
			return list;
		case V_DICT:
		case V_VIEW:
			{
				const Dict *dict = v.kind == V_DICT ? v.dict : v.view->dict;
				ViewKind	kind = v.kind == V_DICT ? VIEW_KEYS : v.view->kind;

				list = millm_value_list(w, V_LIST, dict->n).list;
				for (size_t i = 0; i < dict->n; i++)
				{
					Entry	   *e = &dict->entries[i];

					millm_list_add(w, list, kind == VIEW_KEYS ? e->key : kind == VIEW_VALUES ? e->value :
								   millm_value_pair(w, e->key, e->value));
				}
				return list;
			}
		case V_RANGE:
			list = millm_value_list(w, V_LIST, (size_t) v.range->n).list;
			for (int64_t i = 0; i < v.range->n; i++)
				millm_list_add(w, list, millm_value_int(v.range->start + i * v.range->step));
			return list;
		default:
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "'%s' object is not iterable", millm_value_type(v));
	}
}
