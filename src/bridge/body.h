/*
 * body.h -- bodies of requests as JSON, strictly: every field is one that its table names, and of the right type.
 *
 * The first thing that is wrong is answered with 400 naming the field, and nothing more is done.  A field that is null
 * counts as not given, as OpenAI's clients send it.
 */
#ifndef MILLM_BRIDGE_BODY_H
#define MILLM_BRIDGE_BODY_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "http.h"

/* One field that a route knows. */
typedef struct BodyField
{
	const char *name;
	/* Take a value that is not null: true, or the request has been answered.  arg is body_read()'s. */
	bool		(*take) (HttpRequest *r, const struct BodyField *field, json_t *value, void *arg);
	int			number;			/* for take: which of its places the value goes to */
} BodyField;

/*
 * The body as an object whose fields have all been given to their take(), in the body's order.  fields ends with a NULL name.
 * NULL: the request has been answered.  Otherwise the caller owns the result; an empty body is an empty object when may_be_empty.
 */
extern json_t *body_read(HttpRequest *r, const BodyField *fields, bool may_be_empty, void *arg);

/* Answer 400: field must be what wanted says ("a string").  Returns false. */
extern bool body_wrong(HttpRequest *r, const char *field, const char *wanted);
/* Answer 400: what the field asks for cannot be done.  Returns false. */
extern bool body_unsupported(HttpRequest *r, const char *field, const char *why);

/* A number of the range, as text for a parameter, at most 32 bytes with its end; false: the request has been answered. */
extern bool body_integer(HttpRequest *r, const char *field, json_t *value, int64_t least, int64_t most, char text[32]);
extern bool body_number(HttpRequest *r, const char *field, json_t *value, char text[32]);

/* An array of strings as text of PostgreSQL's text[]; a single string counts as an array of one.  NULL: the request has been answered. */
extern char *body_text_array(HttpRequest *r, const char *field, json_t *value);

/* take() of the field "user", which goes to the log. */
extern bool body_take_user(HttpRequest *r, const BodyField *field, json_t *value, void *arg);

#endif
