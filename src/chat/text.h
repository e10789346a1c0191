/*
 * text.h -- what Python's str can do, as far as templates ask for it.
 *
 * Results are views where they can be, and keep for each byte where it came from.
 */
#ifndef MILLM_CHAT_TEXT_H
#define MILLM_CHAT_TEXT_H

#include "value.h"

typedef enum StripSides { STRIP_LEFT = 1, STRIP_RIGHT = 2, STRIP_BOTH = 3 } StripSides;

extern bool millm_char_is_space(uint32_t cp);	/* as str.isspace() has it */

/* Without the characters of the set *chars, or white space when that is NULL, at its ends. */
extern Str	millm_str_strip(Str s, const Str *chars, StripSides sides);
/* The byte at which needle begins at or after from; -1: nowhere. */
extern int64_t millm_str_find(Str s, Str needle, size_t from);
extern int64_t millm_str_find_last(Work *w, Str s, Str needle);
extern int64_t millm_str_count(Work *w, Str s, Str needle);
/* At most n replacements; n < 0: all. */
extern Str	millm_str_replace(Work *w, Str s, Str old, Str with, int64_t n);
/* The parts between separators, or between runs of white space when sep is NULL; at most n + 1 if n >= 0. */
extern Value millm_str_split(Work *w, Str s, const Str *sep, int64_t n, bool from_right);
extern Value millm_str_split_lines(Work *w, Str s, bool keeps_ends);

typedef enum Casing { CASE_UPPER, CASE_LOWER, CASE_CAPITALIZE, CASE_TITLE, CASE_SWAP } Casing;

extern Str	millm_str_cased(Work *w, Str s, Casing casing);
extern Str	millm_str_title_words(Work *w, Str s);	/* jinja2's title: words end at space - ( { [ < */
extern Str	millm_str_repeat(Work *w, Str s, int64_t n);
extern Str	millm_str_concat(Work *w, Str a, Str b);
extern Str	millm_str_join(Work *w, Str sep, const List *parts);	/* str() of each */
extern Str	millm_str_reverse(Work *w, Str s);

typedef enum CharClass { CLASS_ALPHA, CLASS_DIGIT, CLASS_DECIMAL, CLASS_NUMERIC, CLASS_ALNUM, CLASS_SPACE, CLASS_UPPER, CLASS_LOWER } CharClass;

/* Python's isalpha(), isupper() and so on: not empty, and all (for cases: all cased, and one at least) are of the class. */
extern bool millm_str_is_all(Str s, CharClass class);

#endif
