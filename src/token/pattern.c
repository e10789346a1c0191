/*
 * pattern.c -- searching: strings, kinds of characters, the hand-written scanners, and PCRE2 for the rest.
 *
 * A scanner is given a text and a position and returns where the word that starts there ends.  Both scanners
 * match at every position, so a text is cut into words without gaps.  In their comments, L, N, S are letters,
 * numbers and white space, O is everything else.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "pattern.h"

#include <stdlib.h>
#include <string.h>

#include "unicode.h"

#define MATCH_LIMIT 10000000	/* steps of PCRE2 for one match */
#define JIT_STACK_MIN (32 * 1024)
#define JIT_STACK_MAX (8 * 1024 * 1024)

#define CONTRACTIONS "'s|'t|'re|'ve|'m|'ll|'d"
#define LLAMA3_TAIL "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define CL100K_HEAD "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+"
#define CL100K_TAIL "| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"

/* The regexes that have a scanner.  cl100k's spelling of Llama 3's matches the same. */
static const struct
{
	const char *text;
	PatternKind kind;
	unsigned	max_digits;
}			known[] = {
	{CONTRACTIONS "| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", PATTERN_GPT2, 0},
	{"(?i:" CONTRACTIONS ")|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" LLAMA3_TAIL, PATTERN_LLAMA3, 3},
	{"(?i:" CONTRACTIONS ")|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" LLAMA3_TAIL, PATTERN_LLAMA3, 1},
	{CL100K_HEAD "|\\p{N}{1,3}" CL100K_TAIL, PATTERN_LLAMA3, 3},
};

/* ---- scanners ---- */

typedef enum CharClass
{
	CHAR_OTHER,
	CHAR_LETTER,
	CHAR_NUMBER,
	CHAR_SPACE
} CharClass;

/* The class of the character at text[i], and its length. */
static inline CharClass
class_at(const char *text, size_t i, unsigned *length)
{
	unsigned char b = (unsigned char) text[i];
	uint32_t	cp;
	uint8_t		class;
	uint32_t	category;

	if (b < 0x80)
	{
		*length = 1;
		if ((unsigned char) ((b | 0x20) - 'a') < 26)
			return CHAR_LETTER;
		if (b == ' ' || (b >= '\t' && b <= '\r'))
			return CHAR_SPACE;
		return (unsigned char) (b - '0') < 10 ? CHAR_NUMBER : CHAR_OTHER;
	}
	*length = millm_utf8_get(text + i, &cp);
	class = millm_unicode_class(cp);
	category = UM(class & UC_CATEGORY_BITS);
	if (class & UC_SPACE)
		return CHAR_SPACE;
	return category & UM_L ? CHAR_LETTER : category & UM_N ? CHAR_NUMBER : CHAR_OTHER;
}

/* The end of the run of that class that goes on at i. */
static inline size_t
run_end(const char *text, size_t n, size_t i, CharClass class)
{
	unsigned	length;

	while (i < n && class_at(text, i, &length) == class)
		i += length;
	return i;
}

static inline bool
is_line_end(char c)
{
	return c == '\r' || c == '\n';
}

/* Length of the contraction at text[i], an apostrophe; 0: none.  Folding case, U+017F (long s) is an s. */
static inline size_t
contraction(const char *text, size_t n, size_t i, bool fold)
{
	char		fold_bit = fold ? 0x20 : 0;
	char		a = i + 1 < n ? (char) (text[i + 1] | fold_bit) : 0;
	char		b = i + 2 < n ? (char) (text[i + 2] | fold_bit) : 0;

	if (a == 's' || a == 't' || a == 'm' || a == 'd')
		return 2;
	if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
		return 3;
	return fold && i + 2 < n && memcmp(text + i + 1, "\xC5\xBF", 2) == 0 ? 3 : 0;
}

/*
 * The end of the white space that starts at i: \s+(?!\S)|\s+.  Before a word, a run of two or more leaves its
 * last character to that word.
 */
static inline size_t
space_end(const char *text, size_t n, size_t i)
{
	size_t		end = run_end(text, n, i, CHAR_SPACE);
	size_t		last;

	if (end == n)
		return end;
	last = (size_t) (millm_utf8_before(text + end) - text);
	return last > i ? last : end;
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?O+|\s+(?!\S)|\s+ */
static size_t
scan_gpt2(const char *text, size_t n, size_t i)
{
	unsigned	length;
	CharClass	class;
	size_t		word = i;

	if (text[i] == '\'')
	{
		size_t		short_form = contraction(text, n, i, false);

		if (short_form > 0)
			return i + short_form;
	}
	if (text[i] == ' ' && i + 1 < n)
		word = i + 1;
	class = class_at(text, word, &length);
	if (class == CHAR_SPACE)
		return space_end(text, n, i);
	return run_end(text, n, word + length, class);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nLN]?L+|N{1,max_digits}| ?O+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t
scan_llama3(const char *text, size_t n, size_t i, unsigned max_digits)
{
	unsigned	length;
	unsigned	next_length;
	CharClass	class = class_at(text, i, &length);
	size_t		end;

	if (class == CHAR_LETTER)
		return run_end(text, n, i + length, CHAR_LETTER);
	if (class == CHAR_NUMBER)
	{
		end = i + length;
		for (unsigned digits = 1; digits < max_digits && end < n && class_at(text, end, &length) == CHAR_NUMBER; digits++)
			end += length;
		return end;
	}
	if (text[i] == '\'')
	{
		size_t		short_form = contraction(text, n, i, true);

		if (short_form > 0)
			return i + short_form;
	}
	if (i + length < n && !is_line_end(text[i]))
	{
		CharClass	next = class_at(text, i + length, &next_length);

		if (next == CHAR_LETTER)
			return run_end(text, n, i + length + next_length, CHAR_LETTER);
		if (text[i] == ' ' && next == CHAR_OTHER)
			class = CHAR_OTHER;
	}
	if (class == CHAR_OTHER)
	{
		end = run_end(text, n, i + length, CHAR_OTHER);
		while (end < n && is_line_end(text[end]))
			end++;
		return end;
	}
	end = run_end(text, n, i, CHAR_SPACE);
	while (end > i && !is_line_end(text[end - 1]))
		end--;					/* a line end in the run is the last thing it takes */
	return end > i ? end : space_end(text, n, i);
}

/* What Whitespace puts together: 0 is white space. */
static int
word_kind(uint32_t cp)
{
	return millm_unicode_is_word_rust(cp) ? 1 : millm_unicode_is_space(cp) ? 0 : 2;
}

/* The first word at or behind i.  False: there is none. */
static bool
find_word(const char *text, size_t n, size_t i, size_t *start, size_t *end)
{
	int			kind = 0;
	uint32_t	cp;

	for (; i < n && kind == 0; i = *end)
	{
		*start = i;
		*end = i + millm_utf8_get(text + i, &cp);
		kind = word_kind(cp);
	}
	for (unsigned length; *end < n; *end += length)
	{
		length = millm_utf8_get(text + *end, &cp);
		if (word_kind(cp) != kind)
			break;
	}
	return kind != 0;
}

/* The first run of one script at or behind i; what belongs to none goes on with any, but begins none.  False: there is none. */
static bool
find_script(const char *text, size_t n, size_t i, size_t *start, size_t *end)
{
	uint8_t		script = 0;
	uint32_t	cp;

	for (; i < n && script == 0; i = *end)
	{
		*start = i;
		*end = i + millm_utf8_get(text + i, &cp);
		script = millm_unicode_script(cp);
	}
	for (unsigned length; *end < n; *end += length)
	{
		uint8_t		next;

		length = millm_utf8_get(text + *end, &cp);
		next = millm_unicode_script(cp);
		if (next != 0 && next != script)
			break;
	}
	return script != 0;
}

/* ---- PCRE2 ---- */

static MillmCode
regex_find(const Pattern *pattern, PatternScratch *s, const char *text, size_t n, size_t from,
		   bool *found, size_t *start, size_t *end, MillmError *err)
{
	int			rc;
	const PCRE2_SIZE *at;

	if (!s->match)
	{
		s->match = pcre2_match_data_create(1, NULL);
		s->context = pcre2_match_context_create(NULL);
		s->stack = pcre2_jit_stack_create(JIT_STACK_MIN, JIT_STACK_MAX, NULL);
		if (!s->match || !s->context)
			return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		pcre2_set_match_limit(s->context, MATCH_LIMIT);
		if (s->stack)			/* NULL where PCRE2 has no JIT compiler */
			pcre2_jit_stack_assign(s->context, NULL, s->stack);
	}
	rc = pcre2_match(pattern->code, (PCRE2_SPTR) text, n, from, PCRE2_NO_UTF_CHECK, s->match, s->context);
	*found = rc >= 0;
	*start = *end = n;
	if (rc == PCRE2_ERROR_NOMATCH)
		return MILLM_OK;
	if (rc < 0)
	{
		PCRE2_UCHAR message[128];

		pcre2_get_error_message(rc, message, sizeof(message));
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "could not split the text with the tokenizer's regular expression");
		millm_detail(err, "PCRE2 stopped at byte %zu of a part of %zu bytes: %s.", from, n, (const char *) message);
		return MILLM_E_INVALID_ARGUMENT;
	}
	at = pcre2_get_ovector_pointer(s->match);
	*start = at[0];
	*end = at[1] >= at[0] ? at[1] : at[0];	/* \K inside a lookahead could set them so; it is not translated */
	return MILLM_OK;
}

MillmCode
millm_pattern_regex(Pattern *out, const char *text, size_t n, MillmError *err)
{
	Bytes		translated = {0};
	pcre2_compile_context *context = NULL;
	MillmCode	rc;
	int			why;
	PCRE2_SIZE	where;

	*out = (Pattern) {.kind = PATTERN_REGEX};
	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
		if (strlen(known[i].text) == n && memcmp(known[i].text, text, n) == 0)
		{
			out->kind = known[i].kind;
			out->max_digits = known[i].max_digits;
			return MILLM_OK;
		}
	if ((rc = millm_regex_translate(text, n, &translated, err)) != MILLM_OK)
		goto done;
	context = pcre2_compile_context_create(NULL);
	if (!context)
	{
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		goto done;
	}
	pcre2_set_newline(context, PCRE2_NEWLINE_LF);
	out->code = pcre2_compile((PCRE2_SPTR) translated.data, translated.n, PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C,
							  &why, &where, context);
	if (!out->code)
	{
		PCRE2_UCHAR message[128];

		pcre2_get_error_message(why, message, sizeof(message));
		rc = millm_fail(err, MILLM_E_UNSUPPORTED, "a regular expression of tokenizer.json is not supported");
		millm_detail(err, "PCRE2 says of \"%.*s\": %s.", (int) (n < 400 ? n : 400), text, (const char *) message);
		goto done;
	}
	/* Without a JIT compiler the interpreter gives the same matches, slower. */
	(void) pcre2_jit_compile(out->code, PCRE2_JIT_COMPLETE);
done:
	pcre2_compile_context_free(context);
	millm_bytes_free(&translated);
	return rc;
}

void
millm_pattern_free(Pattern *pattern)
{
	free(pattern->literal);
	pcre2_code_free(pattern->code);
}

void
millm_pattern_scratch_free(PatternScratch *s)
{
	pcre2_match_data_free(s->match);
	pcre2_match_context_free(s->context);
	pcre2_jit_stack_free(s->stack);
}

MillmCode
millm_pattern_find(const Pattern *pattern, PatternScratch *scratch, const char *text, size_t n, size_t from,
				   bool *found, size_t *start, size_t *end, MillmError *err)
{
	*found = false;
	*start = *end = n;
	if (from >= n && pattern->kind != PATTERN_REGEX)
		return MILLM_OK;
	switch (pattern->kind)
	{
		case PATTERN_LITERAL:
			{
				const char *hit = memmem(text + from, n - from, pattern->literal, pattern->literal_n);

				if (hit)
				{
					*found = true;
					*start = (size_t) (hit - text);
					*end = *start + pattern->literal_n;
				}
				return MILLM_OK;
			}
		case PATTERN_FLAG:
			for (size_t i = from; i < n;)
			{
				uint32_t	cp;
				unsigned	length = millm_utf8_get(text + i, &cp);

				if (millm_unicode_class(cp) & pattern->flag)
				{
					*found = true;
					*start = i;
					*end = i + length;
					break;
				}
				i += length;
			}
			return MILLM_OK;
		case PATTERN_PUNCTUATION:
			for (size_t i = from; i < n;)
			{
				uint32_t	cp;
				unsigned	length = millm_utf8_get(text + i, &cp);

				if (millm_unicode_habits(cp) & UH_PUNCTUATION)
				{
					*found = true;
					*start = i;
					*end = i + length;
					break;
				}
				i += length;
			}
			return MILLM_OK;
		case PATTERN_WORD:
			*found = find_word(text, n, from, start, end);
			break;
		case PATTERN_SCRIPT:
			*found = find_script(text, n, from, start, end);
			break;
		case PATTERN_LENGTH:
			*found = true;
			*start = *end = from;
			for (size_t i = 0; i < pattern->length && *end < n; i++)
			{
				uint32_t	cp;

				*end += millm_utf8_get(text + *end, &cp);
			}
			return MILLM_OK;
		case PATTERN_GPT2:
			*found = true;
			*start = from;
			*end = scan_gpt2(text, n, from);
			return MILLM_OK;
		case PATTERN_LLAMA3:
			*found = true;
			*start = from;
			*end = scan_llama3(text, n, from, pattern->max_digits);
			return MILLM_OK;
		case PATTERN_REGEX:
			return regex_find(pattern, scratch, text, n, from, found, start, end, err);
	}
	if (!*found)
		*start = *end = n;
	return MILLM_OK;
}
