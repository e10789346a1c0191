/*
 * error.h -- how millm's code says that something failed.
 *
 * A function that can fail returns a MillmCode and fills a MillmError.  The function that
 * saw the failure writes the sentence, once; everyone above passes it on.  Allocation-free
 * and thread-safe: the caller owns the MillmError, usually on its stack.
 *
 * Style of the texts (PostgreSQL's): message one line, lower case, no period, names quoted;
 * detail the facts with figures, full sentences; hint what to do, full sentences.
 */
#ifndef MILLM_ERROR_H
#define MILLM_ERROR_H

#include <stddef.h>

typedef enum MillmCode
{
	MILLM_OK = 0,
#define E(name, sqlstate, http) MILLM_E_##name,
#include "errors.def"
#undef E
	MILLM_N_CODES
} MillmCode;

typedef struct MillmError
{
	MillmCode	code;
	char		message[512];
	char		detail[1024];	/* "" if there is none */
	char		hint[512];		/* "" if there is none */
	int			wait_s;			/* when it may be worth trying again; 0: not known, or never */
} MillmError;

/* Fill err (which may be NULL) with code and message, clear the rest; returns code. */
extern MillmCode millm_fail(MillmError *err, MillmCode code, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
/* Set the detail or the hint of a failure that millm_fail() has begun.  err may be NULL. */
extern void millm_detail(MillmError *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
extern void millm_hint(MillmError *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Set wait_s, and say so at the end of the detail: "Expected wait: about 3 s."; s > 0.  err may be NULL. */
extern void millm_expect_wait(MillmError *err, int s);
/* Of a detail that has come as a text: the seconds that it speaks of, 0 if of none. */
extern int	millm_expected_wait(const char *detail);

/* snprintf() of UTF-8 into dst of size bytes (> 0): what does not fit is cut off between two characters. */
extern void millm_format(char *dst, size_t size, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Properties of a code.  Static strings; an out-of-range code reads as INTERNAL. */
extern const char *millm_code_name(MillmCode code);		/* "MODEL_NOT_FOUND"; "OK" for MILLM_OK */
extern const char *millm_code_sqlstate(MillmCode code);	/* five characters */
extern int	millm_code_http(MillmCode code);
/* The code of that name, or MILLM_E_INTERNAL when there is none. */
extern MillmCode millm_code_by_name(const char *name);

#endif
