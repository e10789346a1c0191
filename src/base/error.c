/*
 * error.c -- the texts and numbers of errors.def, and the two ways to fill a MillmError.
 *
 * Part of the allocation-free half of base: the extension links it too.
 */
#include "error.h"

#include <limits.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WAIT_SENTENCE "Expected wait: about "

typedef struct CodeInfo
{
	const char *name;
	const char *sqlstate;
	int			http;
} CodeInfo;

static const CodeInfo code_info[MILLM_N_CODES] = {
	[MILLM_OK] = {"OK", "00000", 200},
#define E(name, sqlstate, http) [MILLM_E_##name] = {#name, sqlstate, http},
#include "errors.def"
#undef E
};

static const CodeInfo *
info(MillmCode code)
{
	return (unsigned) code < MILLM_N_CODES ? &code_info[code] : &code_info[MILLM_E_INTERNAL];
}

/* vsnprintf() may cut in the middle of a UTF-8 character; take the broken tail off. */
static void format_text(char *dst, size_t size, const char *fmt, va_list ap) __attribute__((format(printf, 3, 0)));

static void
format_text(char *dst, size_t size, const char *fmt, va_list ap)
{
	int			n = vsnprintf(dst, size, fmt, ap);
	size_t		len;

	if (n < 0)
	{
		dst[0] = '\0';
		return;
	}
	if ((size_t) n < size)
		return;
	len = size - 1;
	while (len > 0 && ((unsigned char) dst[len - 1] & 0xC0) == 0x80)
		len--;
	if (len > 0 && (unsigned char) dst[len - 1] >= 0xC0)
		len--;						/* the lead byte of the character that was cut, or of the last whole one */
	dst[len] = '\0';
}

MillmCode
millm_fail(MillmError *err, MillmCode code, const char *fmt, ...)
{
	va_list		ap;

	if (!err)
		return code;
	err->code = code;
	err->detail[0] = err->hint[0] = '\0';
	err->wait_s = 0;
	va_start(ap, fmt);
	format_text(err->message, sizeof(err->message), fmt, ap);
	va_end(ap);
	return code;
}

void
millm_format(char *dst, size_t size, const char *fmt, ...)
{
	va_list		ap;

	va_start(ap, fmt);
	format_text(dst, size, fmt, ap);
	va_end(ap);
}

void
millm_detail(MillmError *err, const char *fmt, ...)
{
	va_list		ap;

	if (!err)
		return;
	va_start(ap, fmt);
	format_text(err->detail, sizeof(err->detail), fmt, ap);
	va_end(ap);
}

void
millm_hint(MillmError *err, const char *fmt, ...)
{
	va_list		ap;

	if (!err)
		return;
	va_start(ap, fmt);
	format_text(err->hint, sizeof(err->hint), fmt, ap);
	va_end(ap);
}

void
millm_expect_wait(MillmError *err, int s)
{
	size_t		n;

	if (!err)
		return;
	err->wait_s = s;
	n = strlen(err->detail);
	snprintf(err->detail + n, sizeof(err->detail) - n, "%s" WAIT_SENTENCE "%d s.", n > 0 ? " " : "", s);
}

int
millm_expected_wait(const char *detail)
{
	const char *at = strstr(detail, WAIT_SENTENCE);
	long		s = at ? strtol(at + sizeof(WAIT_SENTENCE) - 1, NULL, 10) : 0;

	return s > 0 && s <= INT_MAX ? (int) s : 0;
}

const char *
millm_code_name(MillmCode code)
{
	return info(code)->name;
}

const char *
millm_code_sqlstate(MillmCode code)
{
	return info(code)->sqlstate;
}

int
millm_code_http(MillmCode code)
{
	return info(code)->http;
}

MillmCode
millm_code_by_name(const char *name)
{
	for (int i = 0; i < MILLM_N_CODES; i++)
		if (strcmp(code_info[i].name, name) == 0)
			return (MillmCode) i;
	return MILLM_E_INTERNAL;
}
