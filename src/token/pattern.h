/*
 * pattern.h -- what a splitter or a replacement looks for: a string, a kind of characters, or a regex.
 *
 * Regexes in tokenizer.json are Oniguruma's.  The two that most models use are hand-written scanners, told by
 * their text; any other is translated to PCRE2 (regex.c), with the classes of our own Unicode tables.
 */
#ifndef MILLM_PATTERN_H
#define MILLM_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bytes.h"
#include "error.h"

typedef enum PatternKind
{
	PATTERN_LITERAL,			/* the bytes of literal */
	PATTERN_FLAG,				/* one character whose class has flag */
	PATTERN_PUNCTUATION,		/* one character that Punctuation splits at */
	PATTERN_WORD,				/* a run of \w, or of what is neither that nor white space: Whitespace's words */
	PATTERN_SCRIPT,				/* a run of one script: UnicodeScripts' pieces */
	PATTERN_LENGTH,				/* so many characters as length says; fewer at the end */
	PATTERN_GPT2,				/* GPT-2's words */
	PATTERN_LLAMA3,				/* Llama 3's words, also Qwen's and cl100k's: they differ in max_digits */
	PATTERN_REGEX
} PatternKind;

typedef struct Pattern
{
	PatternKind kind;
	char	   *literal;		/* owned */
	size_t		literal_n;		/* > 0 */
	uint8_t		flag;			/* UC_SPACE or UC_NUMERIC */
	unsigned	max_digits;		/* of PATTERN_LLAMA3 */
	size_t		length;			/* of PATTERN_LENGTH, > 0 */
	struct pcre2_real_code_8 *code;	/* owned */
} Pattern;

/* What a search needs beside the pattern, one per thread; zeroed is empty. */
typedef struct PatternScratch
{
	struct pcre2_real_match_data_8 *match;
	struct pcre2_real_match_context_8 *context;
	struct pcre2_real_jit_stack_8 *stack;
} PatternScratch;

/* The Oniguruma regex text[0..n) as a Pattern.  UNSUPPORTED names what cannot be translated. */
extern MillmCode millm_pattern_regex(Pattern *out, const char *text, size_t n, MillmError *err);
extern void millm_pattern_free(Pattern *pattern);
extern void millm_pattern_scratch_free(PatternScratch *scratch);

/*
 * The leftmost match in text[0..n), valid UTF-8, that starts at `from` or later: *start == *end == n with
 * *found false if there is none.  INVALID_ARGUMENT when a regex gives up on this text.
 */
extern MillmCode millm_pattern_find(const Pattern *pattern, PatternScratch *scratch, const char *text, size_t n, size_t from,
									bool *found, size_t *start, size_t *end, MillmError *err);

/* regex.c: the PCRE2 spelling of an Oniguruma regex, appended to *out. */
extern MillmCode millm_regex_translate(const char *text, size_t n, Bytes *out, MillmError *err);

#endif
