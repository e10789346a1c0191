/*
 * unicode.c -- UTF-8 of any origin, lower case, and the two definitions of a word character.
 */
#include "unicode.h"

#include <string.h>

#include "arith.h"

/* Alphabetic symbols: circled and squared Latin letters. */
static bool
is_enclosed_letter(uint32_t cp)
{
	return (cp >= 0x24B6 && cp <= 0x24E9) || (cp >= 0x1F130 && cp <= 0x1F149) ||
		(cp >= 0x1F150 && cp <= 0x1F169) || (cp >= 0x1F170 && cp <= 0x1F189);
}

bool
millm_unicode_is_word(uint32_t cp)
{
	return millm_unicode_is_in(cp, UM_L | UM_M | UM(UC_ND) | UM(UC_NL) | UM(UC_PC)) || is_enclosed_letter(cp) ||
		cp == 0xB2 || cp == 0xB3 || cp == 0xB9 || (cp >= 0xBC && cp <= 0xBE);
}

bool
millm_unicode_is_word_rust(uint32_t cp)
{
	return millm_unicode_is_in(cp, UM_L | UM_M | UM(UC_ND) | UM(UC_NL) | UM(UC_PC)) || is_enclosed_letter(cp) ||
		cp == 0x200C || cp == 0x200D;
}

uint32_t
millm_unicode_to_lower(uint32_t cp)
{
	size_t		low = 0;
	size_t		high = millm_unicode_n_lower;

	while (low < high)
	{
		size_t		middle = low + (high - low) / 2;

		if (millm_unicode_lower[middle][0] < cp)
			low = middle + 1;
		else
			high = middle;
	}
	return millm_unicode_lower[low][1];
}

unsigned
millm_utf8_put(char *out, uint32_t cp)
{
	if (cp < 0x80)
	{
		out[0] = (char) cp;
		return 1;
	}
	if (cp < 0x800)
	{
		out[0] = (char) (0xC0 | cp >> 6);
		out[1] = (char) (0x80 | (cp & 0x3F));
		return 2;
	}
	if (cp < 0x10000)
	{
		out[0] = (char) (0xE0 | cp >> 12);
		out[1] = (char) (0x80 | (cp >> 6 & 0x3F));
		out[2] = (char) (0x80 | (cp & 0x3F));
		return 3;
	}
	out[0] = (char) (0xF0 | cp >> 18);
	out[1] = (char) (0x80 | (cp >> 12 & 0x3F));
	out[2] = (char) (0x80 | (cp >> 6 & 0x3F));
	out[3] = (char) (0x80 | (cp & 0x3F));
	return 4;
}

int
millm_utf8_check(const char *p, size_t n)
{
	const unsigned char *b = (const unsigned char *) p;
	unsigned char low = 0x80,
				high = 0xBF;	/* what the second byte may be */
	int			length;

	if (b[0] < 0x80)
		return 1;
	if (b[0] < 0xC2 || b[0] > 0xF4)
		return -1;
	length = b[0] < 0xE0 ? 2 : b[0] < 0xF0 ? 3 : 4;
	if (b[0] == 0xE0)
		low = 0xA0;				/* no overlong forms */
	else if (b[0] == 0xED)
		high = 0x9F;			/* no surrogates */
	else if (b[0] == 0xF0)
		low = 0x90;
	else if (b[0] == 0xF4)
		high = 0x8F;			/* nothing above U+10FFFF */
	for (int i = 1; i < length; i++)
	{
		if ((size_t) i == n)
			return 0;
		if (b[i] < low || b[i] > high)
			return -i;
		low = 0x80;
		high = 0xBF;
	}
	return length;
}

bool
millm_utf8_is_valid(const char *p, size_t n, size_t *bad)
{
	size_t		i = 0;

	while (i < n)
	{
		int			length;

		while (n - i >= 8 && (millm_get_le64(p + i) & UINT64_C(0x8080808080808080)) == 0)
			i += 8;
		if (i == n)
			break;
		length = millm_utf8_check(p + i, n - i);
		if (length <= 0)
		{
			*bad = i;
			return false;
		}
		i += (size_t) length;
	}
	return true;
}
