/*
 * unicode.h -- code points: their classes (Unicode 16.0), what the genuine tokenizer does with them, and their UTF-8.
 *
 * The classes are our own because the ids must equal the genuine tokenizer's, whose tables are
 * newer than those of the PCRE2 and of the C library that we may run with.
 */
#ifndef MILLM_UNICODE_H
#define MILLM_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum UnicodeCategory
{
	UC_CN, UC_CC, UC_CF, UC_CO, UC_CS,
	UC_LL, UC_LM, UC_LO, UC_LT, UC_LU,
	UC_MC, UC_ME, UC_MN,
	UC_ND, UC_NL, UC_NO,
	UC_PC, UC_PD, UC_PE, UC_PF, UC_PI, UC_PO, UC_PS,
	UC_SC, UC_SK, UC_SM, UC_SO,
	UC_ZL, UC_ZP, UC_ZS,
	UC_N_CATEGORIES
} UnicodeCategory;

/* Sets of categories, as bit masks. */
#define UM(c) (UINT32_C(1) << (c))
#define UM_L (UM(UC_LL) | UM(UC_LM) | UM(UC_LO) | UM(UC_LT) | UM(UC_LU))
#define UM_M (UM(UC_MC) | UM(UC_ME) | UM(UC_MN))
#define UM_N (UM(UC_ND) | UM(UC_NL) | UM(UC_NO))
#define UM_P (UM(UC_PC) | UM(UC_PD) | UM(UC_PE) | UM(UC_PF) | UM(UC_PI) | UM(UC_PO) | UM(UC_PS))
#define UM_S (UM(UC_SC) | UM(UC_SK) | UM(UC_SM) | UM(UC_SO))
#define UM_Z (UM(UC_ZL) | UM(UC_ZP) | UM(UC_ZS))
#define UM_C (UM(UC_CN) | UM(UC_CC) | UM(UC_CF) | UM(UC_CO) | UM(UC_CS))

/* A class: the category and three flags. */
#define UC_CATEGORY_BITS 0x1F
#define UC_SPACE 0x20			/* White_Space */
#define UC_IS_NEW 0x40			/* its category is not the one of Unicode 14.0 */
#define UC_NUMERIC 0x80			/* a number in Unicode 17.0, as for Rust's is_numeric() */

#define MILLM_UNICODE_SHIFT 7
extern const uint16_t millm_unicode_index[];
extern const uint8_t millm_unicode_block[][1 << MILLM_UNICODE_SHIFT];

/* The class of a code point up to U+10FFFF. */
static inline uint8_t
millm_unicode_class(uint32_t cp)
{
	return millm_unicode_block[millm_unicode_index[cp >> MILLM_UNICODE_SHIFT]][cp & ((1 << MILLM_UNICODE_SHIFT) - 1)];
}

/* Habits: what the normalizers and splitters of the genuine tokenizer do with a code point, by tables of several ages. */
#define UH_NOT_NORMAL 0x01		/* Unicode 9.0 has not assigned it: the normal forms leave it as it is */
#define UH_ACCENT 0x02			/* StripAccents drops it */
#define UH_CONTROL 0x04			/* BertNormalizer's clean_text drops it */
#define UH_MARK 0x08			/* BertNormalizer's strip_accents drops it */
#define UH_PUNCTUATION 0x10		/* Punctuation splits at it */
#define UH_UPPER 0x20			/* Lowercase changes it */

extern const uint16_t millm_unicode_habit_index[];
extern const uint8_t millm_unicode_habit_block[][1 << MILLM_UNICODE_SHIFT];
extern const uint16_t millm_unicode_script_index[];
extern const uint8_t millm_unicode_script_block[][1 << MILLM_UNICODE_SHIFT];
/* From and to, in the order of from. */
extern const uint32_t millm_unicode_lower[][2];
extern const size_t millm_unicode_n_lower;

static inline uint8_t
millm_unicode_habits(uint32_t cp)
{
	return millm_unicode_habit_block[millm_unicode_habit_index[cp >> MILLM_UNICODE_SHIFT]][cp & ((1 << MILLM_UNICODE_SHIFT) - 1)];
}

/* A number for the script, as UnicodeScripts tells them apart; 0: of any script. */
static inline uint8_t
millm_unicode_script(uint32_t cp)
{
	return millm_unicode_script_block[millm_unicode_script_index[cp >> MILLM_UNICODE_SHIFT]][cp & ((1 << MILLM_UNICODE_SHIFT) - 1)];
}

/* The lower-case code point of one that has UH_UPPER.  That of U+0130 is the first of two: U+0307 follows. */
extern uint32_t millm_unicode_to_lower(uint32_t cp);

static inline bool
millm_unicode_is_space(uint32_t cp)
{
	return millm_unicode_class(cp) & UC_SPACE;
}

static inline bool
millm_unicode_is_in(uint32_t cp, uint32_t categories)
{
	return UM(millm_unicode_class(cp) & UC_CATEGORY_BITS) & categories;
}

/* \w of the genuine tokenizer's two regex engines; they differ in ZWNJ and ZWJ and a few numbers (see unicode.c). */
extern bool millm_unicode_is_word(uint32_t cp);			/* Oniguruma's */
extern bool millm_unicode_is_word_rust(uint32_t cp);

/* The code point at p, which must be valid UTF-8; returns its length in bytes. */
static inline unsigned
millm_utf8_get(const char *p, uint32_t *cp)
{
	const unsigned char *b = (const unsigned char *) p;

	if (b[0] < 0x80)
	{
		*cp = b[0];
		return 1;
	}
	if (b[0] < 0xE0)
	{
		*cp = (b[0] & 0x1Fu) << 6 | (b[1] & 0x3Fu);
		return 2;
	}
	if (b[0] < 0xF0)
	{
		*cp = (b[0] & 0x0Fu) << 12 | (b[1] & 0x3Fu) << 6 | (b[2] & 0x3Fu);
		return 3;
	}
	*cp = (b[0] & 0x07u) << 18 | (b[1] & 0x3Fu) << 12 | (b[2] & 0x3Fu) << 6 | (b[3] & 0x3Fu);
	return 4;
}

/* The start of the code point that ends just before p (valid UTF-8, p not its beginning). */
static inline const char *
millm_utf8_before(const char *p)
{
	do
		p--;
	while (((unsigned char) *p & 0xC0) == 0x80);
	return p;
}

/* Write cp at out (4 bytes of room); returns its length. */
extern unsigned millm_utf8_put(char *out, uint32_t cp);

/*
 * Look at the bytes p[0..n), n > 0, of any origin.  Returns
 *   > 0: a whole character of so many bytes
 *   = 0: all n bytes are the beginning of a character
 *   < 0: the first -result bytes can never be part of one (the "maximal subpart" that becomes one U+FFFD)
 */
extern int	millm_utf8_check(const char *p, size_t n);

/* Is all of it valid UTF-8?  If not, *bad is the offset of the first byte that is not. */
extern bool millm_utf8_is_valid(const char *p, size_t n, size_t *bad);

#endif
