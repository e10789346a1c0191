/*
 * json.h -- the few things that the extension does with a helper's JSON: write a string, read a field.
 *
 * PostgreSQL's own jsonb would raise an error over a broken text, and wants a database's encoding; the supervisor has
 * neither a database nor anybody to tell.  So a value is a borrowed slice of the payload, every reader says false for
 * what is not there (absent, null, of another type, broken), and nothing here raises an error but for lack of memory.
 */
#ifndef MILLM_PG_JSON_H
#define MILLM_PG_JSON_H

#include "postgres.h"

#include "lib/stringinfo.h"

/* One value's bytes, without the white space around it.  Borrowed from the text it was found in. */
typedef struct MillmJson
{
	const char *at;
	const char *end;
} MillmJson;

/* The value that len bytes of text hold. */
extern MillmJson millm_json(const char *text, size_t len);

/* Field name of an object.  False: not an object, no such field, or the field is null. */
extern bool millm_json_get(MillmJson object, const char *name, MillmJson *value);

/*
 * The next element of an array.  *rest is the array itself at first, and what follows the element afterwards.
 * False: no more, or not an array.
 */
extern bool millm_json_next(MillmJson *rest, MillmJson *element);

/* Append a string's UTF-8 to out.  It may contain zero bytes.  False: not a string; out is unspecified. */
extern bool millm_json_string(MillmJson value, StringInfo out);
extern bool millm_json_int(MillmJson value, int64 *out);
extern bool millm_json_double(MillmJson value, double *out);
extern bool millm_json_bool(MillmJson value, bool *out);

/* Field and type in one step. */
extern char *millm_json_get_string(MillmJson object, const char *name);	/* palloc'd; NULL: none, or it holds a zero byte */
extern bool millm_json_get_int(MillmJson object, const char *name, int64 *out);
extern bool millm_json_get_double(MillmJson object, const char *name, double *out);
extern bool millm_json_get_bool(MillmJson object, const char *name, bool *out);

/* Append text[0..len), which is UTF-8, as a JSON string literal. */
extern void millm_json_append_string(StringInfo buf, const char *text, size_t len);

#endif
