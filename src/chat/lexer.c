/*
 * lexer.c -- template source to tokens, with jinja2's treatment of white space.
 *
 * One pass over the source.  Text before a tag loses what the tag's "-" or lstrip_blocks takes; text after one what its
 * "-" or trim_blocks takes.  Line ends are normalized first, so that only \n remains.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "syntax.h"
#include "text.h"
#include "unicode.h"

typedef struct Lexer
{
	Work	   *w;
	const char *source;
	size_t		n;
	size_t		at;
	int			line;			/* of at */
	Token	   *tokens;
	size_t		n_tokens;
	size_t		capacity;
	char		closers[MAX_NESTING];	/* of the parentheses that are open */
	int			n_closers;
} Lexer;

/* ---- helpers ---- */

static void __attribute__((noreturn, format(printf, 2, 3)))
fail(Lexer *lx, const char *fmt, ...)
{
	char		text[200];
	va_list		ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	lx->w->line = lx->line;
	millm_work_fail(lx->w, MILLM_E_INVALID_MODEL_FILE, "%s", text);
}

/* Go on to position `to`, counting lines. */
static void
advance(Lexer *lx, size_t to)
{
	for (; lx->at < to; lx->at++)
		lx->line += lx->source[lx->at] == '\n';
}

static bool
looking_at(const Lexer *lx, size_t at, const char *s)
{
	size_t		n = strlen(s);

	return lx->n - at >= n && memcmp(lx->source + at, s, n) == 0;
}

static size_t
skip_space(const Lexer *lx, size_t at)
{
	uint32_t	cp;
	unsigned	n;

	while (at < lx->n)
	{
		n = millm_utf8_get(lx->source + at, &cp);
		if (!millm_char_is_space(cp))
			break;
		at += n;
	}
	return at;
}

static Token *
add_token(Lexer *lx, TokenKind kind, size_t from, size_t to)
{
	Token	   *token;

	if (lx->n_tokens == lx->capacity)
	{
		Token	   *grown;

		if (lx->capacity >= MAX_TOKENS)
			fail(lx, "more than %u tokens", MAX_TOKENS);
		lx->capacity = lx->capacity ? lx->capacity * 2 : 256;
		grown = millm_work_array(lx->w, lx->capacity, sizeof(*grown));
		if (lx->n_tokens > 0)
			memcpy(grown, lx->tokens, lx->n_tokens * sizeof(*grown));
		lx->tokens = grown;
	}
	token = &lx->tokens[lx->n_tokens++];
	*token = (Token) {.kind = kind, .line = lx->line, .text = millm_str_of(lx->source + from, to - from, false)};
	return token;
}

/* ---- outside tags ---- */

/* What a tag's sign and lstrip_blocks leave of the text [from, to) before it. */
static size_t
strip_before(const Lexer *lx, size_t from, size_t to, char sign, bool is_print)
{
	Str			text = millm_str_of(lx->source + from, to - from, false);
	size_t		line_start = to;

	if (sign == '-')
		return from + millm_str_strip(text, NULL, STRIP_RIGHT).n;
	if (sign == '+' || is_print)
		return to;
	while (line_start > from && lx->source[line_start - 1] != '\n')
		line_start--;
	if (line_start == from && from > 0 && lx->source[from - 1] != '\n')
		return to;				/* the line began with another tag */
	text = millm_str_of(lx->source + line_start, to - line_start, false);
	return millm_str_strip(text, NULL, STRIP_RIGHT).n == 0 ? line_start : to;
}

/* Behind a tag that ends with `end` at at: what a newline or white space after it is swallowed. */
static size_t
swallow_after(const Lexer *lx, size_t at, char sign, bool trims)
{
	if (sign == '-')
		return skip_space(lx, at);
	if (sign != '+' && trims && at < lx->n && lx->source[at] == '\n')
		return at + 1;
	return at;
}

/* The position of the end of a comment or the like, and its sign; at is where to look from.  False: there is none. */
static bool
find_end(const Lexer *lx, size_t at, const char *end, size_t *pos, char *sign)
{
	const char *p = memmem(lx->source + at, lx->n - at, end, 2);

	if (!p)
		return false;
	*pos = (size_t) (p - lx->source);
	*sign = *pos > at && (p[-1] == '-' || p[-1] == '+') ? p[-1] : '\0';
	return true;
}

/* Is a raw block's begin or end at `at` ("{%" being there)?  *to is behind its "%}", sign the one before that. */
static bool
is_raw_tag(const Lexer *lx, size_t at, const char *word, size_t *to, char *sign)
{
	at += 2;
	if (at < lx->n && (lx->source[at] == '-' || lx->source[at] == '+'))
		at++;
	at = skip_space(lx, at);
	if (!looking_at(lx, at, word))
		return false;
	at = skip_space(lx, at + strlen(word));
	*sign = at < lx->n && (lx->source[at] == '-' || lx->source[at] == '+') ? lx->source[at] : '\0';
	at += *sign != '\0';
	*to = at + 2;
	return looking_at(lx, at, "%}");
}

static void
add_data(Lexer *lx, size_t from, size_t to)
{
	if (to > from)
		add_token(lx, T_DATA, from, to);
}

static void
lex_raw(Lexer *lx, size_t body)
{
	advance(lx, body);
	for (size_t at = body; at + 1 < lx->n; at++)
	{
		size_t		to;
		char		sign;
		char		before;

		if (!looking_at(lx, at, "{%") || !is_raw_tag(lx, at, "endraw", &to, &sign))
			continue;
		before = lx->source[at + 2] == '-' || lx->source[at + 2] == '+' ? lx->source[at + 2] : '\0';
		add_data(lx, body, strip_before(lx, body, at, before, false));
		advance(lx, swallow_after(lx, to, sign, true));
		return;
	}
	if (body < lx->n)			/* nothing at all may follow, says jinja2 */
		fail(lx, "missing end of raw directive");
}

/* Text up to the next tag, and that tag's beginning.  Returns the kind of tag, T_END at the end. */
static TokenKind
lex_text(Lexer *lx)
{
	size_t		from = lx->at;
	size_t		at = from;
	size_t		raw_end;
	char		raw_sign;
	char		sign;
	bool		is_print;

	while (at + 1 < lx->n && !(lx->source[at] == '{' && strchr("{%#", lx->source[at + 1])))
		at++;
	if (at + 1 >= lx->n)
	{
		add_data(lx, from, lx->n);
		advance(lx, lx->n);
		return T_END;
	}
	sign = at + 2 < lx->n && (lx->source[at + 2] == '-' || lx->source[at + 2] == '+') ? lx->source[at + 2] : '\0';
	is_print = lx->source[at + 1] == '{';
	add_data(lx, from, strip_before(lx, from, at, sign, is_print));
	advance(lx, at);
	if (lx->source[at + 1] == '%' && is_raw_tag(lx, at, "raw", &raw_end, &raw_sign) && raw_sign != '+')
	{
		/* trim_blocks does not concern this tag */
		lex_raw(lx, swallow_after(lx, raw_end, raw_sign, false));
		return T_DATA;
	}
	if (lx->source[at + 1] == '#')
	{
		size_t		end;

		at += 2 + (sign != '\0');
		if (at < lx->n && !find_end(lx, at, "#}", &end, &sign))
			fail(lx, "missing end of comment tag");
		if (at >= lx->n)		/* nothing at all may follow, says jinja2 */
			advance(lx, lx->n);
		else
			advance(lx, swallow_after(lx, end + 2, sign, true));
		return T_DATA;
	}
	add_token(lx, is_print ? T_PRINT_BEGIN : T_BLOCK_BEGIN, at, at + 2);
	advance(lx, at + 2 + (sign != '\0'));
	return is_print ? T_PRINT_BEGIN : T_BLOCK_BEGIN;
}

/* ---- inside tags ---- */

static int
digit_of(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : 99;
}

/* Digits of a base from at, single underscores between them; or after the prefix also before the first. */
static size_t
scan_digits(const Lexer *lx, size_t at, int base, bool may_begin_with_underscore)
{
	size_t		end = at;

	while (at < lx->n)
	{
		if (lx->source[at] == '_' && at + 1 < lx->n && digit_of(lx->source[at + 1]) < base &&
			(may_begin_with_underscore || end == at))
			at++;
		else if (digit_of(lx->source[at]) >= base)
			break;
		if (digit_of(lx->source[at]) >= base)
			break;
		end = ++at;
		may_begin_with_underscore = true;
	}
	return end;
}

static bool
lex_number(Lexer *lx)
{
	size_t		from = lx->at;
	size_t		end;
	size_t		tail;
	int			base = 10;
	bool		is_real = false;
	char		text[128];
	size_t		n = 0;
	Token	   *token;

	if (lx->source[from] < '0' || lx->source[from] > '9')
		return false;
	end = scan_digits(lx, from, 10, false);
	/* a fraction or an exponent make it real, unless a dot stands before it, as in x.0.1 */
	if (from == 0 || lx->source[from - 1] != '.')
	{
		if (end + 1 < lx->n && lx->source[end] == '.' && digit_of(lx->source[end + 1]) < 10)
		{
			end = scan_digits(lx, end + 1, 10, false);
			is_real = true;
		}
		if (end < lx->n && (lx->source[end] | 0x20) == 'e')
		{
			tail = end + 1;
			if (tail < lx->n && (lx->source[tail] == '+' || lx->source[tail] == '-'))
				tail++;
			if (tail < lx->n && digit_of(lx->source[tail]) < 10)
			{
				end = scan_digits(lx, tail, 10, false);
				is_real = true;
			}
		}
	}
	if (!is_real && lx->source[from] == '0')
	{
		char		prefix = from + 1 < lx->n ? (char) (lx->source[from + 1] | 0x20) : '\0';
		int			other = prefix == 'x' ? 16 : prefix == 'o' ? 8 : prefix == 'b' ? 2 : 0;

		end = from + 1;
		if (other && (tail = scan_digits(lx, from + 2, other, true)) > from + 2)
		{
			base = other;
			end = tail;
		}
		else					/* 0 or 00; other digits are a number of their own */
			while (end < lx->n && (lx->source[end] == '0' ||
								   (lx->source[end] == '_' && end + 1 < lx->n && lx->source[end + 1] == '0')))
				end++;
	}
	for (size_t i = base == 10 ? from : from + 2; i < end; i++)
		if (lx->source[i] != '_')
		{
			if (n + 1 >= sizeof(text))
				fail(lx, "a number of more than %zu digits", sizeof(text) - 1);
			text[n++] = lx->source[i];
		}
	text[n] = '\0';
	token = add_token(lx, is_real ? T_FLOAT : T_INT, from, end);
	errno = 0;
	if (is_real)
		token->real = strtod(text, NULL);
	else
		token->integer = strtoll(text, NULL, base);
	if (!is_real && errno == ERANGE)
	{
		lx->w->line = lx->line;
		millm_work_fail(lx->w, MILLM_E_UNSUPPORTED, "an integer of more than 64 bits");
	}
	advance(lx, end);
	return true;
}

static bool
is_name_start(uint32_t cp)
{
	return cp == '_' || millm_unicode_is_in(cp, UM_L | UM(UC_NL));
}

static bool
is_name_char(uint32_t cp)
{
	return is_name_start(cp) || millm_unicode_is_in(cp, UM(UC_MN) | UM(UC_MC) | UM(UC_ND) | UM(UC_PC));
}

static bool
lex_name(Lexer *lx)
{
	size_t		end = lx->at;
	uint32_t	cp;
	unsigned	n = millm_utf8_get(lx->source + end, &cp);

	if (!is_name_start(cp))
		return false;
	while (is_name_char(cp))
	{
		end += n;
		if (end >= lx->n)
			break;
		n = millm_utf8_get(lx->source + end, &cp);
	}
	if (end - lx->at > MAX_NAME_BYTES)
		fail(lx, "a name of more than %d bytes", MAX_NAME_BYTES);
	add_token(lx, T_NAME, lx->at, end);
	advance(lx, end);
	return true;
}

/* The code point of an escape with so many hexadecimal digits at *at, which goes on behind them. */
static uint32_t
hex_escape(Lexer *lx, size_t *at, size_t end, int n)
{
	uint32_t	cp = 0;

	for (int i = 0; i < n; i++, (*at)++)
	{
		if (*at >= end || digit_of(lx->source[*at]) >= 16)
			fail(lx, "truncated \\%c escape in a string", n == 2 ? 'x' : n == 4 ? 'u' : 'U');
		cp = cp << 4 | (uint32_t) digit_of(lx->source[*at]);
	}
	if (cp > 0x10FFFF || (cp >= 0xD800 && cp <= 0xDFFF))
		fail(lx, "an escape in a string that is not a character");
	return cp;
}

static Str
unescape(Lexer *lx, size_t at, size_t end)
{
	static const char letters[] = "abfnrtv\\'\"";
	static const char values[] = "\a\b\f\n\r\t\v\\'\"";
	Builder		b;

	millm_builder_init(&b, lx->w, MAX_SOURCE_BYTES);
	while (at < end)
	{
		const char *slash = memchr(lx->source + at, '\\', end - at);
		size_t		stop = slash ? (size_t) (slash - lx->source) : end;
		const char *found;
		char		c;

		millm_builder_add(&b, millm_str_of(lx->source + at, stop - at, false));
		if (!slash)
			break;
		c = lx->source[stop + 1];	/* there is one, or the string would not have ended */
		at = stop + 2;
		found = c ? strchr(letters, c) : NULL;
		if (found)
			millm_builder_add_char(&b, (unsigned char) values[found - letters], false);
		else if (c == 'x' || c == 'u' || c == 'U')
			millm_builder_add_char(&b, hex_escape(lx, &at, end, c == 'x' ? 2 : c == 'u' ? 4 : 8), false);
		else if (c >= '0' && c <= '7')
		{
			uint32_t	cp = (uint32_t) (c - '0');

			for (int i = 0; i < 2 && at < end && lx->source[at] >= '0' && lx->source[at] <= '7'; i++)
				cp = cp << 3 | (uint32_t) (lx->source[at++] - '0');
			millm_builder_add_char(&b, cp, false);
		}
		else if (c == 'N')
		{
			lx->w->line = lx->line;
			millm_work_fail(lx->w, MILLM_E_UNSUPPORTED, "\\N{...} in a string");
		}
		else if (c != '\n')		/* an unknown escape is itself; a character's further bytes follow as text */
		{
			millm_builder_add_text(&b, "\\");
			at = stop + 1 + (c == '\\');
			{
				uint32_t	cp;
				unsigned	n = millm_utf8_get(lx->source + at, &cp);

				millm_builder_add(&b, millm_str_of(lx->source + at, n, false));
				at += n;
			}
		}
	}
	return millm_builder_str(&b);
}

static bool
lex_string(Lexer *lx)
{
	char		quote = lx->source[lx->at];
	size_t		end = lx->at + 1;
	Token	   *token;
	Str			text;

	if (quote != '\'' && quote != '"')
		return false;
	while (end < lx->n && lx->source[end] != quote)
		end += lx->source[end] == '\\' ? 2 : 1;
	if (end >= lx->n)
		return false;
	text = unescape(lx, lx->at + 1, end);
	token = add_token(lx, T_STRING, lx->at, end + 1);
	token->text = text;
	advance(lx, end + 1);
	return true;
}

static bool
lex_operator(Lexer *lx)
{
	static const struct
	{
		const char *text;
		TokenKind	kind;
	}			operators[] = {
		{"//", T_FLOORDIV}, {"**", T_POW}, {"==", T_EQ}, {"!=", T_NE}, {">=", T_GE}, {"<=", T_LE},
		{"+", T_ADD}, {"-", T_SUB}, {"/", T_DIV}, {"*", T_MUL}, {"%", T_MOD}, {"~", T_TILDE}, {"[", T_LBRACKET}, {"]", T_RBRACKET},
		{"(", T_LPAREN}, {")", T_RPAREN}, {"{", T_LBRACE}, {"}", T_RBRACE}, {">", T_GT}, {"<", T_LT}, {"=", T_ASSIGN}, {".", T_DOT},
		{":", T_COLON}, {"|", T_PIPE}, {",", T_COMMA}, {";", T_SEMICOLON},
	};

	for (size_t i = 0; i < sizeof(operators) / sizeof(operators[0]); i++)
	{
		const char *text = operators[i].text;
		char		c = text[0];

		if (!looking_at(lx, lx->at, text))
			continue;
		if (strchr("([{", c))
		{
			if (lx->n_closers == MAX_NESTING)
				fail(lx, "more than %d nested parentheses", MAX_NESTING);
			lx->closers[lx->n_closers++] = c == '(' ? ')' : c == '[' ? ']' : '}';
		}
		else if (strchr(")]}", c))
		{
			if (lx->n_closers == 0)
				fail(lx, "unexpected '%c'", c);
			if (lx->closers[--lx->n_closers] != c)
				fail(lx, "unexpected '%c', expected '%c'", c, lx->closers[lx->n_closers]);
		}
		add_token(lx, operators[i].kind, lx->at, lx->at + strlen(text));
		advance(lx, lx->at + strlen(text));
		return true;
	}
	return false;
}

/* The end of the tag at the current position, if it is here. */
static bool
lex_tag_end(Lexer *lx, TokenKind begin)
{
	const char *end = begin == T_PRINT_BEGIN ? "}}" : "%}";
	char		sign = lx->source[lx->at] == '-' || (begin == T_BLOCK_BEGIN && lx->source[lx->at] == '+') ? lx->source[lx->at] : '\0';
	size_t		at = lx->at + (sign != '\0');

	if (lx->n_closers > 0 || !looking_at(lx, at, end))
		return false;
	add_token(lx, begin == T_PRINT_BEGIN ? T_PRINT_END : T_BLOCK_END, lx->at, at + 2);
	advance(lx, swallow_after(lx, at + 2, sign, begin == T_BLOCK_BEGIN));
	return true;
}

static void
lex_tag(Lexer *lx, TokenKind begin)
{
	uint32_t	cp;

	for (;;)
	{
		advance(lx, skip_space(lx, lx->at));
		if (lx->at >= lx->n || lex_tag_end(lx, begin))
			return;				/* the parser will say what is missing */
		if (!lex_number(lx) && !lex_name(lx) && !lex_string(lx) && !lex_operator(lx))
			fail(lx, "unexpected character '%.*s'", (int) millm_utf8_get(lx->source + lx->at, &cp), lx->source + lx->at);
	}
}

/* A copy with \n for every line end, and without the last one. */
static void
normalize_lines(Lexer *lx, const char *source, size_t n)
{
	char	   *copy = millm_work_alloc(lx->w, n + 1);
	size_t		out = 0;

	for (size_t i = 0; i < n; i++)
	{
		if (source[i] == '\r' && i + 1 < n && source[i + 1] == '\n')
			continue;
		copy[out++] = source[i] == '\r' ? '\n' : source[i];
	}
	if (out > 0 && copy[out - 1] == '\n')
		out--;
	lx->source = copy;
	lx->n = out;
}

Token *
millm_template_lex(Work *w, const char *source, size_t n)
{
	Lexer		lx = {.w = w, .line = 1};
	size_t		bad;

	if (n > MAX_SOURCE_BYTES)
		millm_work_fail(w, MILLM_E_INVALID_MODEL_FILE, "longer than %u bytes", MAX_SOURCE_BYTES);
	if (!millm_utf8_is_valid(source, n, &bad))
		millm_work_fail(w, MILLM_E_INVALID_MODEL_FILE, "not valid UTF-8 at byte offset %zu", bad);
	normalize_lines(&lx, source, n);
	while (lx.at < lx.n)
	{
		TokenKind	kind = lex_text(&lx);

		if (kind == T_PRINT_BEGIN || kind == T_BLOCK_BEGIN)
			lex_tag(&lx, kind);
	}
	add_token(&lx, T_END, lx.n, lx.n);
	return lx.tokens;
}
