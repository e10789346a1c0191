/*
 * regex.c -- an Oniguruma (Ruby) regex, as tokenizer.json has them, in PCRE2's words.
 *
 * The same text means different things to the two: \s, \w, \h, ^, $, X{n,m}+, X{n}?, nested classes.  Every
 * such thing is spelled out here, and a construct that is not known to mean the same is refused by name.
 * Categories (\p{L}) get the code points that our tables have and an older PCRE2 does not; scripts (\p{Han})
 * are PCRE2's own, so a character newer than the installed PCRE2 can differ there.
 */
#include "pattern.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "unicode.h"

#define MAX_REGEX_BYTES 65536
#define MAX_GROUPS 64			/* nesting of groups, and of classes */

#define SPACE_RANGES "\\t-\\r\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"

typedef struct Translation
{
	const char *text;
	size_t		n;
	size_t		i;				/* next byte to read */
	Bytes	   *out;
	bool		no_memory;
	MillmError *err;
} Translation;

/* A predicate over classes: the categories of a mask, White_Space, or \w. */
typedef struct Set
{
	uint32_t	categories;		/* 0: not a set of categories */
	bool		is_space;
	bool		is_word;
	bool		is_hex;
	bool		negated;
} Set;

static void
put_n(Translation *t, const char *s, size_t n)
{
	if (!millm_bytes_add(t->out, s, n))
		t->no_memory = true;
}

static void put(Translation *t, const char *fmt,...) __attribute__((format(printf, 2, 3)));

/* Short pieces only: what fmt makes must fit 160 bytes. */
static void
put(Translation *t, const char *fmt,...)
{
	char		piece[160];
	va_list		ap;
	int			n;

	va_start(ap, fmt);
	n = vsnprintf(piece, sizeof(piece), fmt, ap);
	va_end(ap);
	put_n(t, piece, (size_t) n);
}

static MillmCode
refuse(Translation *t, const char *what)
{
	millm_fail(t->err, MILLM_E_UNSUPPORTED, "a regular expression of tokenizer.json is not supported");
	millm_detail(t->err, "It has %s before byte %zu: \"%.*s\".", what, t->i, (int) (t->n < 400 ? t->n : 400), t->text);
	return MILLM_E_UNSUPPORTED;
}

static const struct
{
	const char *name;
	uint32_t	categories;
}			category_names[] = {
	{"L", UM_L}, {"M", UM_M}, {"N", UM_N}, {"P", UM_P}, {"S", UM_S}, {"Z", UM_Z}, {"C", UM_C},
	{"Letter", UM_L}, {"Mark", UM_M}, {"Number", UM_N}, {"Punctuation", UM_P}, {"Symbol", UM_S},
	{"Separator", UM_Z}, {"Other", UM_C},
	{"Cn", UM(UC_CN)}, {"Cc", UM(UC_CC)}, {"Cf", UM(UC_CF)}, {"Co", UM(UC_CO)}, {"Cs", UM(UC_CS)},
	{"Ll", UM(UC_LL)}, {"Lm", UM(UC_LM)}, {"Lo", UM(UC_LO)}, {"Lt", UM(UC_LT)}, {"Lu", UM(UC_LU)},
	{"Mc", UM(UC_MC)}, {"Me", UM(UC_ME)}, {"Mn", UM(UC_MN)},
	{"Nd", UM(UC_ND)}, {"Nl", UM(UC_NL)}, {"No", UM(UC_NO)},
	{"Pc", UM(UC_PC)}, {"Pd", UM(UC_PD)}, {"Pe", UM(UC_PE)}, {"Pf", UM(UC_PF)}, {"Pi", UM(UC_PI)},
	{"Po", UM(UC_PO)}, {"Ps", UM(UC_PS)},
	{"Sc", UM(UC_SC)}, {"Sk", UM(UC_SK)}, {"Sm", UM(UC_SM)}, {"So", UM(UC_SO)},
	{"Zl", UM(UC_ZL)}, {"Zp", UM(UC_ZP)}, {"Zs", UM(UC_ZS)},
};

static bool
set_has(const Set *set, uint32_t cp)
{
	bool		in;

	if (set->is_space)
		in = millm_unicode_is_space(cp);
	else if (set->is_word)
		in = millm_unicode_is_word(cp);
	else if (set->is_hex)
		in = (cp >= '0' && cp <= '9') || (cp >= 'a' && cp <= 'f') || (cp >= 'A' && cp <= 'F');
	else
		in = millm_unicode_is_in(cp, set->categories);
	return in != set->negated;
}

/* Is the block of cp, its first, one of the many that are alike and have no new character: ideographs, syllables, unassigned? */
static bool
is_old_block(uint32_t cp)
{
	uint16_t	block = millm_unicode_index[cp >> MILLM_UNICODE_SHIFT];

	return block == millm_unicode_index[0x4E00 >> MILLM_UNICODE_SHIFT] || block == millm_unicode_index[0xAC00 >> MILLM_UNICODE_SHIFT] ||
		block == millm_unicode_index[0x40000 >> MILLM_UNICODE_SHIFT] || block == millm_unicode_index[0xF0000 >> MILLM_UNICODE_SHIFT];
}

/* The ranges of a set, as they stand inside of [ ].  only_new: those that PCRE2 may not know. */
static void
put_ranges(Translation *t, const Set *set, bool only_new)
{
	for (uint32_t cp = 0; cp < 0x110000; cp++)
	{
		uint32_t	first = cp;

		if (only_new && cp % (1 << MILLM_UNICODE_SHIFT) == 0 && is_old_block(cp))
		{
			cp += (1 << MILLM_UNICODE_SHIFT) - 1;
			continue;
		}
		while (cp < 0x110000 && set_has(set, cp) && (!only_new || millm_unicode_class(cp) & UC_IS_NEW))
			cp++;
		if (cp == first || (first >= 0xD800 && cp <= 0xE000))
			continue;			/* empty, or only surrogates, which PCRE2 refuses and UTF-8 has not */
		if (first < 0xD800 && cp > 0xD800)
		{
			put(t, "\\x{%x}-\\x{d7ff}", first);
			first = 0xE000;
		}
		if (first >= 0xD800 && first < 0xE000)
			first = 0xE000;
		if (first < cp)
			put(t, "\\x{%x}-\\x{%x}", first, cp - 1);
	}
}

/* A set as an item inside of [ ]. */
static void
put_set_item(Translation *t, const Set *set)
{
	if (set->is_space && !set->negated)
		put_n(t, SPACE_RANGES, strlen(SPACE_RANGES));
	else if (set->categories && !set->negated)
	{
		/* PCRE2's own class, fast, and what it may lack. */
		for (size_t i = 0; i < sizeof(category_names) / sizeof(category_names[0]); i++)
			if (category_names[i].categories == set->categories && (set->categories & UM_C) == 0)
			{
				put(t, "\\p{%s}", category_names[i].name);
				put_ranges(t, set, true);
				return;
			}
		put_ranges(t, set, false);
	}
	else
		put_ranges(t, set, false);
}

/* The same outside of [ ]. */
static void
put_set(Translation *t, const Set *set)
{
	Set			positive = *set;

	positive.negated = false;
	put(t, set->negated ? "[^" : "[");
	put_set_item(t, &positive);
	put(t, "]");
}

/* The set of a one-letter escape, or false. */
static bool
escape_set(char c, Set *set)
{
	*set = (Set) {0};
	switch (c | 0x20)
	{
		case 's':
			set->is_space = true;
			break;
		case 'w':
			set->is_word = true;
			break;
		case 'd':
			set->categories = UM(UC_ND);
			break;
		case 'h':
			set->is_hex = true;
			break;
		default:
			return false;
	}
	set->negated = (c & 0x20) == 0;
	return true;
}

/*
 * \p{...}, with t->i behind the p or P.  A script is written at once (and *is_script set), a category is
 * returned in *set.
 */
static MillmCode
read_property(Translation *t, bool negated, Set *set, bool *is_script)
{
	const char *close;
	char		name[64];
	size_t		length;

	*set = (Set) {.negated = negated};
	*is_script = false;
	if (t->i >= t->n || t->text[t->i] != '{')
		return refuse(t, "a \\p without braces");
	t->i++;
	if (t->i < t->n && t->text[t->i] == '^')
	{
		set->negated = !set->negated;
		t->i++;
	}
	close = memchr(t->text + t->i, '}', t->n - t->i);
	length = close ? (size_t) (close - (t->text + t->i)) : 0;
	if (length == 0 || length >= sizeof(name))
		return refuse(t, "a property without a name");
	memcpy(name, t->text + t->i, length);
	name[length] = '\0';
	t->i += length + 1;
	for (size_t i = 0; i < sizeof(category_names) / sizeof(category_names[0]); i++)
		if (strcasecmp(category_names[i].name, name) == 0)
		{
			set->categories = category_names[i].categories;
			return MILLM_OK;
		}
	if (strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_") != length)
		return refuse(t, "a property with an unusual name");
	/* Plain \p{Han} would be Script_Extensions.  An unknown script is PCRE2's error. */
	put(t, "\\%c{sc:%s}", set->negated ? 'P' : 'p', name);
	*is_script = true;
	return MILLM_OK;
}

static int
hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The code point that an escape stands for, with t->i behind the letter c of the escape. */
static MillmCode
read_code_point(Translation *t, char c, uint32_t *cp)
{
	int			digits = 0;
	int			max = c == 'u' ? 4 : 2;
	bool		braces = c == 'x' && t->i < t->n && t->text[t->i] == '{';

	*cp = 0;
	if (c != 'u' && c != 'x')
	{
		static const char letters[] = "ntrfvae";
		static const char values[] = "\n\t\r\f\v\a\033";
		const char *at = strchr(letters, c);

		if (c == '\0' || (!at && ((c | 0x20) >= 'a' && (c | 0x20) <= 'z')) || (c >= '0' && c <= '9'))
			return refuse(t, "an escape that is not supported");
		*cp = at ? (unsigned char) values[at - letters] : (unsigned char) c;
		return MILLM_OK;
	}
	if (braces)
	{
		t->i++;
		max = 6;
	}
	while (digits < max && t->i < t->n && hex_digit(t->text[t->i]) >= 0)
	{
		*cp = *cp << 4 | (uint32_t) hex_digit(t->text[t->i++]);
		digits++;
	}
	if (digits == 0 || (c == 'u' && digits < 4) || *cp > 0x10FFFF || (*cp >= 0xD800 && *cp < 0xE000) ||
		(c == 'x' && !braces && *cp > 0x7F))
		return refuse(t, "an escape that is not a character");
	if (braces && (t->i >= t->n || t->text[t->i++] != '}'))
		return refuse(t, "an escape without its closing brace");
	return MILLM_OK;
}

/*
 * The items of a class, up to its closing bracket, into t->out; t->i is behind the opening one and its ^.
 * [a[bc]d] is a union.  *intersects is set when the items end at &&.
 */
static MillmCode
put_class_items(Translation *t, int depth, bool *intersects)
{
	MillmCode	rc;
	bool		is_first = true;

	*intersects = false;
	if (depth > MAX_GROUPS)
		return refuse(t, "classes nested too deeply");
	for (;; is_first = false)
	{
		char		c;

		if (t->i >= t->n)
			return refuse(t, "a class without its closing bracket");
		c = t->text[t->i++];
		if (c == ']' && !is_first)
			return MILLM_OK;
		if (c == ']')
			return refuse(t, "an empty class");
		if (c == '&' && t->i < t->n && t->text[t->i] == '&')
		{
			if (is_first || depth > 0)
				return refuse(t, "an intersection that is not supported");
			t->i++;
			*intersects = true;
			return MILLM_OK;
		}
		if (c == '[')
		{
			bool		inner;

			if (t->n - t->i >= 9 && memcmp(t->text + t->i, ":punct:]]", 8) == 0)
			{
				Set			punct = {.categories = UM_P};
				Set			symbol = {.categories = UM_S};

				put_set_item(t, &punct);
				put_set_item(t, &symbol);
				t->i += 8;
				continue;
			}
			if (t->i < t->n && (t->text[t->i] == ':' || t->text[t->i] == '^'))
				return refuse(t, "a class inside of a class");
			if ((rc = put_class_items(t, depth + 1, &inner)) != MILLM_OK)
				return rc;
			continue;
		}
		if (c == '\\')
		{
			Set			set;
			uint32_t	cp;
			bool		is_script;

			if (t->i >= t->n)
				return refuse(t, "a backslash at its end");
			c = t->text[t->i++];
			if (c == 'p' || c == 'P')
			{
				if ((rc = read_property(t, c == 'P', &set, &is_script)) != MILLM_OK)
					return rc;
				if (!is_script)
					put_set_item(t, &set);
			}
			else if (escape_set(c, &set))
				put_set_item(t, &set);
			else if ((unsigned char) c >= 0x80)
				put_n(t, &c, 1);	/* an escaped character beyond ASCII is itself */
			else
			{
				if (c == 'b')
					cp = '\b';
				else if ((rc = read_code_point(t, c, &cp)) != MILLM_OK)
					return rc;
				put(t, "\\x{%x}", cp);
			}
		}
		else if (c == '-' || (unsigned char) c >= 0x80)
			put_n(t, &c, 1);		/* a range keeps its place between two characters; UTF-8 is itself */
		else
			put(t, "\\x{%x}", (unsigned char) c);
	}
}

/* A class, with t->i behind its opening bracket. */
static MillmCode
put_class(Translation *t)
{
	MillmCode	rc;
	Bytes	   *out = t->out;
	Bytes		first = {0};
	bool		negated = t->i < t->n && t->text[t->i] == '^';
	bool		intersects;

	if (negated)
		t->i++;
	t->out = &first;
	rc = put_class_items(t, 0, &intersects);
	t->out = out;
	if (rc == MILLM_OK && intersects && negated)
		rc = refuse(t, "a negated intersection");
	if (rc != MILLM_OK)
		goto done;
	if (!intersects)
	{
		put(t, negated ? "[^" : "[");
		put_n(t, first.data, first.n);
		put(t, "]");
		goto done;
	}
	/* [A&&[^B]&&C] is (?:(?![B])(?=[C])[A]) */
	put(t, "(?:");
	while (intersects)
	{
		bool		wrapped = t->i < t->n && t->text[t->i] == '[';
		bool		excluded;

		if (wrapped)
			t->i++;
		excluded = wrapped && t->i < t->n && t->text[t->i] == '^';
		if (excluded)
			t->i++;
		put(t, excluded ? "(?![" : "(?=[");
		if ((rc = put_class_items(t, wrapped ? 1 : 0, &intersects)) != MILLM_OK)
			goto done;
		put(t, "])");
		if (wrapped)
		{
			/* what may follow [B] is ] or another && */
			if (t->n - t->i >= 2 && memcmp(t->text + t->i, "&&", 2) == 0)
			{
				t->i += 2;
				intersects = true;
			}
			else if (t->i < t->n && t->text[t->i] == ']')
			{
				t->i++;
				intersects = false;
			}
			else
			{
				rc = refuse(t, "an intersection that is not supported");
				goto done;
			}
		}
	}
	put(t, "[");
	put_n(t, first.data, first.n);
	put(t, "])");
done:
	millm_bytes_free(&first);
	return rc;
}

/* The edge of a word, for \b. */
static void
put_word_edge(Translation *t, bool negated)
{
	Set			word = {.is_word = true};
	Bytes	   *out = t->out;
	Bytes		w = {0};

	t->out = &w;
	put_set(t, &word);
	t->out = out;
	for (int i = 0; i < 4; i++)
	{
		static const char *const edge[] = {"(?:(?<=", ")(?!", ")|(?<!", ")(?="};
		static const char *const inside[] = {"(?:(?<=", ")(?=", ")|(?<!", ")(?!"};

		put(t, "%s", (negated ? inside : edge)[i]);
		put_n(t, w.data, w.n);
	}
	put(t, "))");
	millm_bytes_free(&w);
}

/* An escape outside of a class, with t->i behind the backslash. */
static MillmCode
put_escape(Translation *t)
{
	MillmCode	rc;
	Set			set;
	uint32_t	cp;
	bool		is_script;
	char		c;

	if (t->i >= t->n)
		return refuse(t, "a backslash at its end");
	c = t->text[t->i++];
	if (c == 'p' || c == 'P')
	{
		if ((rc = read_property(t, c == 'P', &set, &is_script)) != MILLM_OK)
			return rc;
		if (!is_script)
			put_set(t, &set);
	}
	else if (c == 'b' || c == 'B')
		put_word_edge(t, c == 'B');
	else if (c == 'A' || c == 'z' || c == 'Z')
		put(t, "\\%c", c);
	else if (escape_set(c, &set))
		put_set(t, &set);
	else if ((unsigned char) c >= 0x80)
		put_n(t, &c, 1);
	else
	{
		if ((rc = read_code_point(t, c, &cp)) != MILLM_OK)
			return rc;
		put(t, "\\x{%x}", cp);
	}
	return MILLM_OK;
}

/* What follows "(", with t->i behind it. */
static MillmCode
put_group_start(Translation *t, bool *is_group)
{
	static const char *const same[] = {"?:", "?=", "?!", "?<=", "?<!", "?>"};

	*is_group = true;
	put(t, "(");
	if (t->i >= t->n || t->text[t->i] != '?')
		return MILLM_OK;
	for (size_t k = 0; k < sizeof(same) / sizeof(same[0]); k++)
		if (t->n - t->i >= strlen(same[k]) && memcmp(t->text + t->i, same[k], strlen(same[k])) == 0)
		{
			put(t, "%s", same[k]);
			t->i += strlen(same[k]);
			return MILLM_OK;
		}
	/* (?i:...) and (?i); Ruby's m is Perl's s */
	put(t, "?");
	for (t->i++; t->i < t->n; t->i++)
	{
		char		c = t->text[t->i];

		if (c == 'i' || c == '-')
			put_n(t, &c, 1);
		else if (c == 'm')
			put(t, "s");
		else if (c == ':' || c == ')')
		{
			*is_group = c == ':';
			put_n(t, &c, 1);
			t->i++;
			return MILLM_OK;
		}
		else
			break;
	}
	return refuse(t, "a kind of group that is not supported");
}

/* Put text before what was written from offset on. */
static void
insert(Translation *t, size_t offset, const char *text)
{
	size_t		n = strlen(text);

	put_n(t, text, n);
	if (t->no_memory)
		return;
	memmove(t->out->data + offset + n, t->out->data + offset, t->out->n - n - offset);
	memcpy(t->out->data + offset, text, n);
}

/*
 * An interval {n}, {n,}, {,m} or {n,m} at t->i, just behind the brace.  *is_one false: the brace is a brace.
 * Oniguruma repeats X{n,m}+ (it is not possessive), and makes X{n}? optional.
 */
static MillmCode
put_interval(Translation *t, size_t atom, bool *is_one)
{
	size_t		i = t->i;
	char		low[8] = "",
				high[8] = "";
	bool		comma = false;
	char		next;

	for (char *to = low; i < t->n && t->text[i] != '}'; i++)
	{
		char		c = t->text[i];

		if (c == ',' && !comma)
		{
			comma = true;
			to = high;
		}
		else if (c >= '0' && c <= '9')
		{
			if (strlen(to) > 5)
				return refuse(t, "an interval that is too large");
			to[strlen(to)] = c;
		}
		else
			break;
	}
	*is_one = i < t->n && t->text[i] == '}' && (low[0] || high[0]);
	if (!*is_one)
		return MILLM_OK;
	t->i = i + 1;
	put(t, "{%s%s%s}", low[0] ? low : "0", comma ? "," : "", high);
	next = t->i < t->n ? t->text[t->i] : '\0';
	if (next == '+' || (next == '?' && !comma))
	{
		insert(t, atom, "(?:");
		put(t, ")%c", next);
		t->i++;
	}
	return MILLM_OK;
}

MillmCode
millm_regex_translate(const char *text, size_t n, Bytes *out, MillmError *err)
{
	Translation t = {.text = text, .n = n, .out = out, .err = err};
	size_t		group_at[MAX_GROUPS];	/* where the open groups begin in out */
	int			n_groups = 0;
	size_t		atom = 0;		/* where the last atom begins in out: what a quantifier repeats */
	MillmCode	rc = MILLM_OK;

	if (n > MAX_REGEX_BYTES)
		return refuse(&t, "too many bytes");
	while (t.i < n && rc == MILLM_OK)
	{
		char		c = t.text[t.i++];
		size_t		here = out->n;
		bool		flag = false;

		switch (c)
		{
			case '(':
				rc = put_group_start(&t, &flag);
				if (rc == MILLM_OK && flag)
				{
					if (n_groups == MAX_GROUPS)
						return refuse(&t, "groups nested too deeply");
					group_at[n_groups++] = here;
				}
				break;
			case ')':
				if (n_groups == 0)
					return refuse(&t, "a parenthesis that was not opened");
				put(&t, ")");
				atom = group_at[--n_groups];
				break;
			case '[':
				atom = here;
				rc = put_class(&t);
				break;
			case '\\':
				atom = here;
				rc = put_escape(&t);
				break;
			case '^':
				put(&t, "(?<=\\n|\\A)");
				break;
			case '$':
				put(&t, "(?=\\n|\\z)");
				break;
			case '{':
				rc = put_interval(&t, atom, &flag);
				if (rc == MILLM_OK && !flag)
				{
					atom = here;
					put(&t, "\\{");
				}
				break;
			case '|':
			case '*':
			case '+':
			case '?':
				put(&t, "%c", c);
				break;
			default:
				if (((unsigned char) c & 0xC0) != 0x80)
					atom = here;	/* a character begins; its further bytes belong to it */
				if (c == '\0')
					put(&t, "\\x{0}");
				else
					put_n(&t, &c, 1);
		}
	}
	if (rc == MILLM_OK && n_groups > 0)
		return refuse(&t, "a group that is not closed");
	if (rc == MILLM_OK && t.no_memory)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	return rc;
}
