/*
 * utf8.h -- UTF-8, strictly: shortest forms only, no surrogates, at most U+10FFFF (Unicode 3.9, table 3-7).
 */
#ifndef MILLM_UTF8_H
#define MILLM_UTF8_H

#include <stddef.h>
#include <stdint.h>

/*
 * Decode the character at s[0..n), n > 0.  Returns its length 1 to 4; or, when the bytes are not a whole valid
 * character, minus the length of the maximal subpart that stands for one U+FFFD, and *cp is 0xFFFD.
 * *incomplete, if not NULL, tells that this subpart ends with the input: more bytes could still make it valid.
 */
static inline int
millm_utf8_decode(const char *s, size_t n, uint32_t *cp, int *incomplete)
{
	const unsigned char *b = (const unsigned char *) s;
	unsigned	lo = 0x80, hi = 0xBF;
	int			need;
	uint32_t	c = b[0];

	if (incomplete)
		*incomplete = 0;
	if (c < 0x80)
	{
		*cp = c;
		return 1;
	}
	*cp = 0xFFFD;
	if (c >= 0xC2 && c <= 0xDF)
		need = 1, c &= 0x1F;
	else if (c >= 0xE0 && c <= 0xEF)
	{
		need = 2;
		if (c == 0xE0)
			lo = 0xA0;
		else if (c == 0xED)
			hi = 0x9F;
		c &= 0x0F;
	}
	else if (c >= 0xF0 && c <= 0xF4)
	{
		need = 3;
		if (c == 0xF0)
			lo = 0x90;
		else if (c == 0xF4)
			hi = 0x8F;
		c &= 0x07;
	}
	else
		return -1;
	for (int i = 1; i <= need; i++)
	{
		if ((size_t) i >= n)
		{
			if (incomplete)
				*incomplete = 1;
			return -i;
		}
		if (b[i] < lo || b[i] > hi)
			return -i;
		c = c << 6 | (b[i] & 0x3F);
		lo = 0x80, hi = 0xBF;
	}
	*cp = c;
	return need + 1;
}

/* Offset of the first byte that is not part of a valid character, or n. */
static inline size_t
millm_utf8_valid_bytes(const char *s, size_t n)
{
	size_t		i = 0;
	uint32_t	cp;

	while (i < n)
	{
		int			k = (unsigned char) s[i] < 0x80 ? 1 : millm_utf8_decode(s + i, n - i, &cp, NULL);

		if (k < 0)
			return i;
		i += (size_t) k;
	}
	return n;
}

#endif
