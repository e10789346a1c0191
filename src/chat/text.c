/*
 * text.c -- strings: stripping, searching, splitting, casing.
 */
#include "text.h"

#include <string.h>
#include <utf8proc.h>

#include "unicode.h"

bool
millm_char_is_space(uint32_t cp)
{
	return millm_unicode_is_space(cp) || (cp >= 0x1C && cp <= 0x1F);
}

static bool
is_in_set(Str set, const char *c, unsigned n)
{
	for (size_t at = 0; at < set.n;)
	{
		uint32_t	cp;
		unsigned	k = millm_utf8_get(set.data + at, &cp);

		if (k == n && memcmp(set.data + at, c, n) == 0)
			return true;
		at += k;
	}
	return false;
}

Str
millm_str_strip(Str s, const Str *chars, StripSides sides)
{
	size_t		from = 0;
	size_t		to = s.n;
	uint32_t	cp;

	while (sides & STRIP_LEFT && from < to)
	{
		unsigned	n = millm_utf8_get(s.data + from, &cp);

		if (!(chars ? is_in_set(*chars, s.data + from, n) : millm_char_is_space(cp)))
			break;
		from += n;
	}
	while (sides & STRIP_RIGHT && from < to)
	{
		const char *last = millm_utf8_before(s.data + to);
		unsigned	n = millm_utf8_get(last, &cp);

		if (!(chars ? is_in_set(*chars, last, n) : millm_char_is_space(cp)))
			break;
		to -= n;
	}
	return millm_str_cut(s, from, to);
}

/* ---- searching ---- */

int64_t
millm_str_find(Str s, Str needle, size_t from)
{
	const char *p;

	if (needle.n == 0)
		return (int64_t) from;
	p = memmem(s.data + from, s.n - from, needle.data, needle.n);
	return p ? p - s.data : -1;
}

int64_t
millm_str_find_last(Work *w, Str s, Str needle)
{
	millm_work_pay(w, (uint64_t) (s.n / 32 + 1) * (needle.n / 32 + 1));	/* the worst case */
	if (needle.n <= s.n)
		for (size_t at = s.n - needle.n;; at--)
		{
			if (needle.n == 0 || memcmp(s.data + at, needle.data, needle.n) == 0)
				return (int64_t) at;
			if (at == 0)
				break;
		}
	return -1;
}

int64_t
millm_str_count(Work *w, Str s, Str needle)
{
	int64_t		n = 0;
	int64_t		at = 0;

	millm_work_pay_bytes(w, s.n);
	if (needle.n == 0)
		return (int64_t) s.n_chars + 1;
	for (; (at = millm_str_find(s, needle, (size_t) at)) >= 0; at += needle.n)
		n++;
	return n;
}

static size_t
next_char(Str s, size_t at)
{
	uint32_t	cp;

	return at + millm_utf8_get(s.data + at, &cp);
}

Str
millm_str_replace(Work *w, Str s, Str old, Str with, int64_t n)
{
	Builder		b;
	size_t		done = 0;
	size_t		from = 0;

	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (; n != 0; n--)
	{
		int64_t		at = from <= s.n ? millm_str_find(s, old, from) : -1;

		if (at < 0)
			break;
		millm_builder_add(&b, millm_str_cut(s, done, (size_t) at));
		millm_builder_add(&b, with);
		millm_work_pay(w, 1);
		done = (size_t) at + old.n;
		/* an empty one is found before each character and at the end */
		from = old.n > 0 ? done : done < s.n ? next_char(s, done) : s.n + 1;
	}
	millm_builder_add(&b, millm_str_cut(s, done, s.n));
	return millm_builder_str(&b);
}

/* ---- splitting ---- */

static void
add_part(Work *w, List *parts, Str s, size_t from, size_t to)
{
	millm_list_add(w, parts, millm_value_string(w, millm_str_cut(s, from, to)));
}

static void
reverse_list(List *list)
{
	for (size_t i = 0, j = list->n; i + 1 < j; i++)
	{
		Value		v = list->items[i];

		list->items[i] = list->items[--j];
		list->items[j] = v;
	}
}

/* At runs of white space; there are no empty parts. */
static void
split_words(Work *w, List *parts, Str s, int64_t n)
{
	millm_work_pay_chars(w, s.n);
	s = millm_str_strip(s, NULL, STRIP_LEFT);
	while (s.n > 0)
	{
		size_t		end = 0;
		uint32_t	cp;

		if (n >= 0 && (int64_t) parts->n == n)
		{
			add_part(w, parts, s, 0, s.n);	/* with the white space at its end */
			return;
		}
		for (unsigned k; end < s.n; end += k)
		{
			k = millm_utf8_get(s.data + end, &cp);
			if (millm_char_is_space(cp))
				break;
		}
		add_part(w, parts, s, 0, end);
		s = millm_str_strip(millm_str_cut(s, end, s.n), NULL, STRIP_LEFT);
	}
}

static void
split_words_from_right(Work *w, List *parts, Str s, int64_t n)
{
	s = millm_str_strip(s, NULL, STRIP_RIGHT);
	while (s.n > 0)
	{
		size_t		start = s.n;
		uint32_t	cp;

		if (n >= 0 && (int64_t) parts->n == n)
		{
			add_part(w, parts, s, 0, s.n);
			return;
		}
		while (start > 0)
		{
			const char *before = millm_utf8_before(s.data + start);

			(void) millm_utf8_get(before, &cp);
			if (millm_char_is_space(cp))
				break;
			start = (size_t) (before - s.data);
		}
		add_part(w, parts, s, start, s.n);
		s = millm_str_strip(millm_str_cut(s, 0, start), NULL, STRIP_RIGHT);
	}
}

Value
millm_str_split(Work *w, Str s, const Str *sep, int64_t n, bool from_right)
{
	Value		v = millm_value_list(w, V_LIST, 0);
	size_t		done = 0;
	int64_t		at;

	millm_work_pay_bytes(w, s.n);
	if (!sep)
		(from_right ? split_words_from_right : split_words) (w, v.list, s, n);
	else if (sep->n == 0)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "empty separator");
	else if (from_right)
	{
		for (; n < 0 || (int64_t) v.list->n < n; s = millm_str_cut(s, 0, (size_t) at))
		{
			at = millm_str_find_last(w, s, *sep);
			if (at < 0)
				break;
			add_part(w, v.list, s, (size_t) at + sep->n, s.n);
		}
		add_part(w, v.list, s, 0, s.n);
	}
	else
	{
		for (; (n < 0 || (int64_t) v.list->n < n) && (at = millm_str_find(s, *sep, done)) >= 0; done = (size_t) at + sep->n)
			add_part(w, v.list, s, done, (size_t) at);
		add_part(w, v.list, s, done, s.n);
	}
	if (from_right)
		reverse_list(v.list);
	return v;
}

static bool
is_line_end(uint32_t cp)
{
	return (cp >= 0x0A && cp <= 0x0D) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 || cp == 0x2029;
}

Value
millm_str_split_lines(Work *w, Str s, bool keeps_ends)
{
	Value		v = millm_value_list(w, V_LIST, 0);
	size_t		done = 0;

	for (size_t at = 0; at < s.n;)
	{
		uint32_t	cp;
		size_t		end = at + millm_utf8_get(s.data + at, &cp);

		if (is_line_end(cp))
		{
			if (cp == '\r' && end < s.n && s.data[end] == '\n')
				end++;
			add_part(w, v.list, s, done, keeps_ends ? end : at);
			done = end;
		}
		at = end;
	}
	if (done < s.n)
		add_part(w, v.list, s, done, s.n);
	return v;
}

/* ---- casing ---- */

typedef struct SpecialCase
{
	uint32_t	cp;
	uint32_t	upper[3];		/* zeroes at the end */
	uint32_t	title[3];
} SpecialCase;

#include "case_table.h"

#define CAPITAL_SIGMA 0x03A3
#define SMALL_SIGMA 0x03C3
#define FINAL_SIGMA 0x03C2
#define CAPITAL_I_WITH_DOT 0x0130

static void
add_upper(Builder *b, uint32_t cp, bool is_title, bool is_quoted)
{
	if (cp >= 0x80)
		for (size_t i = 0; i < sizeof(special_cases) / sizeof(special_cases[0]); i++)
			if (special_cases[i].cp == cp)
			{
				const uint32_t *to = is_title ? special_cases[i].title : special_cases[i].upper;

				for (int k = 0; k < 3 && to[k]; k++)
					millm_builder_add_char(b, to[k], is_quoted);
				return;
			}
	millm_builder_add_char(b, (uint32_t) (is_title ? utf8proc_totitle((int32_t) cp) : utf8proc_toupper((int32_t) cp)), is_quoted);
}

static bool
is_cased(uint32_t cp)
{
	return millm_unicode_is_in(cp, UM(UC_LU) | UM(UC_LL) | UM(UC_LT)) || (uint32_t) utf8proc_toupper((int32_t) cp) != cp ||
		(uint32_t) utf8proc_tolower((int32_t) cp) != cp;
}

/* Unicode's Case_Ignorable, which does not end a word. */
static bool
is_ignored_by_case(uint32_t cp)
{
	return millm_unicode_is_in(cp, UM(UC_MN) | UM(UC_ME) | UM(UC_CF) | UM(UC_LM) | UM(UC_SK)) || cp == '\'' || cp == '.' ||
		cp == ':' || cp == 0xB7 || cp == 0x387 || cp == 0x55F || cp == 0x5F4 || cp == 0x2018 || cp == 0x2019 || cp == 0x2024 ||
		cp == 0x2027;
}

/* Is the capital sigma at `at` the last letter of its word? */
static bool
is_final_sigma(Str s, size_t at)
{
	uint32_t	cp = 0;
	size_t		i = at;

	do
	{
		if (i == 0)
			return false;
		i = (size_t) (millm_utf8_before(s.data + i) - s.data);
		(void) millm_utf8_get(s.data + i, &cp);
	} while (is_ignored_by_case(cp));
	if (!is_cased(cp))
		return false;
	for (i = next_char(s, at); i < s.n; i = next_char(s, i))
	{
		(void) millm_utf8_get(s.data + i, &cp);
		if (!is_ignored_by_case(cp))
			return !is_cased(cp);
	}
	return true;
}

static void
add_lower(Builder *b, Str s, size_t at, uint32_t cp, bool is_quoted)
{
	if (cp == CAPITAL_SIGMA)
		millm_builder_add_char(b, is_final_sigma(s, at) ? FINAL_SIGMA : SMALL_SIGMA, is_quoted);
	else
	{
		millm_builder_add_char(b, cp == CAPITAL_I_WITH_DOT ? 'i' : (uint32_t) utf8proc_tolower((int32_t) cp), is_quoted);
		if (cp == CAPITAL_I_WITH_DOT)
			millm_builder_add_char(b, 0x0307, is_quoted);
	}
}

Str
millm_str_cased(Work *w, Str s, Casing casing)
{
	Builder		b;
	bool		in_word = false;
	bool		is_markup = s.is_markup;
	uint32_t	cp;

	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (size_t at = 0, end; at < s.n; at = end)
	{
		bool		is_quoted = s.origins ? s.origins[at] : s.is_quoted;

		end = at + millm_utf8_get(s.data + at, &cp);
		if (casing == CASE_UPPER || (casing == CASE_SWAP && millm_unicode_is_in(cp, UM(UC_LL))))
			add_upper(&b, cp, false, is_quoted);
		else if ((casing == CASE_CAPITALIZE && at == 0) || (casing == CASE_TITLE && !in_word))
			add_upper(&b, cp, true, is_quoted);
		else if (casing != CASE_SWAP || millm_unicode_is_in(cp, UM(UC_LU)))
			add_lower(&b, s, at, cp, is_quoted);
		else
			millm_builder_add_char(&b, cp, is_quoted);
		in_word = is_cased(cp);
	}
	s = millm_builder_str(&b);
	s.is_markup = is_markup;
	return s;
}

Str
millm_str_title_words(Work *w, Str s)
{
	Builder		b;
	size_t		word = 0;		/* where the present word begins */
	bool		in_word = false;
	uint32_t	cp;

	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (size_t at = 0, end; at <= s.n; at = end)
	{
		bool		ends = at == s.n;

		end = at + 1;
		if (!ends)
		{
			end = at + millm_utf8_get(s.data + at, &cp);
			ends = millm_char_is_space(cp) || cp == '-' || cp == '(' || cp == '{' || cp == '[' || cp == '<';
		}
		if (in_word && ends)
		{
			size_t		second = next_char(s, word);
			Str			first = millm_str_cut(s, word, second);

			first.is_markup = false;
			millm_builder_add(&b, millm_str_cased(w, first, CASE_UPPER));
			millm_builder_add(&b, millm_str_cased(w, millm_str_cut(s, second, at), CASE_LOWER));
		}
		if (!ends && !in_word)
			word = at;
		in_word = !ends;
		if (ends && at < s.n)
			millm_builder_add(&b, millm_str_cut(s, at, end));
	}
	return millm_builder_str(&b);
}

/* ---- putting together ---- */

Str
millm_str_concat(Work *w, Str a, Str b)
{
	Builder		out;

	if (b.n == 0)
		return a;
	if (a.n == 0)
		return b;
	millm_builder_init(&out, w, MAX_STRING_BYTES);
	millm_builder_add(&out, a);
	millm_builder_add(&out, b);
	return millm_builder_str(&out);
}

Str
millm_str_repeat(Work *w, Str s, int64_t n)
{
	Builder		b;

	if (n <= 0 || s.n == 0)
		return millm_str("");
	if (n > MAX_STRING_BYTES / s.n)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "a text of more than %u bytes", MAX_STRING_BYTES);
	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (; n > 0; n--)
		millm_builder_add(&b, s);
	return millm_builder_str(&b);
}

Str
millm_str_join(Work *w, Str sep, const List *parts)
{
	Builder		b;

	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (size_t i = 0; i < parts->n; i++)
	{
		if (i > 0)
			millm_builder_add(&b, sep);
		millm_builder_add(&b, millm_value_str(w, parts->items[i]));
	}
	return millm_builder_str(&b);
}

Str
millm_str_reverse(Work *w, Str s)
{
	Builder		b;

	millm_builder_init(&b, w, MAX_STRING_BYTES);
	for (size_t to = s.n, from; to > 0; to = from)
	{
		from = (size_t) (millm_utf8_before(s.data + to) - s.data);
		millm_builder_add(&b, millm_str_cut(s, from, to));
	}
	return millm_builder_str(&b);
}

/* ---- classes ---- */

bool
millm_str_is_all(Str s, CharClass class)
{
	bool		any_cased = false;
	uint32_t	cp;

	if (s.n == 0)
		return false;
	for (size_t at = 0; at < s.n; at += millm_utf8_get(s.data + at, &cp))
	{
		bool		ok = true;
		uint32_t	c;

		(void) millm_utf8_get(s.data + at, &c);
		switch (class)
		{
			case CLASS_ALPHA:
				ok = millm_unicode_is_in(c, UM_L);
				break;
			case CLASS_ALNUM:
				ok = millm_unicode_is_in(c, UM_L | UM_N);
				break;
			case CLASS_DECIMAL:
				ok = millm_unicode_is_in(c, UM(UC_ND));
				break;
			case CLASS_DIGIT:	/* superscripts and the like too; those of Latin-1 are what occurs */
				ok = millm_unicode_is_in(c, UM(UC_ND)) || c == 0xB2 || c == 0xB3 || c == 0xB9;
				break;
			case CLASS_NUMERIC:
				ok = millm_unicode_is_in(c, UM_N);
				break;
			case CLASS_SPACE:
				ok = millm_char_is_space(c);
				break;
			case CLASS_UPPER:
			case CLASS_LOWER:
				ok = !millm_unicode_is_in(c, UM(UC_LT) | UM(class == CLASS_UPPER ? UC_LL : UC_LU));
				any_cased = any_cased || millm_unicode_is_in(c, UM(class == CLASS_UPPER ? UC_LU : UC_LL));
				break;
		}
		if (!ok)
			return false;
	}
	return class == CLASS_UPPER || class == CLASS_LOWER ? any_cased : true;
}
