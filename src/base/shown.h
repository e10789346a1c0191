/*
 * shown.h -- a stranger's text, made fit for an error message.
 *
 * Names in a checkpoint can be long, and can hold anything that JSON can: a newline that forges a log line, an
 * escape sequence for the terminal.  Errors show at most SHOWN_BYTES of them, whole characters, controls as '?'.
 */
#ifndef MILLM_SHOWN_H
#define MILLM_SHOWN_H

#include <string.h>

#include "utf8.h"

#define SHOWN_BYTES 120

typedef struct MillmShown
{
	char		text[SHOWN_BYTES + 4];
} MillmShown;

/* Use as shown(name).text within one expression. */
static inline MillmShown
shown(const char *s)
{
	MillmShown	out;
	size_t		len = strlen(s);
	size_t		n = millm_utf8_valid_bytes(s, len < SHOWN_BYTES ? len : SHOWN_BYTES);

	for (size_t i = 0; i < n; i++)
		out.text[i] = (unsigned char) s[i] < 0x20 || s[i] == 0x7F ? '?' : s[i];
	memcpy(out.text + n, n < len ? "..." : "", n < len ? 4 : 1);
	return out;
}

#endif
