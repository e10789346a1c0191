/*
 * reply.h -- answers in JSON, and errors in the shape of their route: OpenAI's for /v1, miLLM's envelope for /api.
 */
#ifndef MILLM_BRIDGE_REPLY_H
#define MILLM_BRIDGE_REPLY_H

#include <jansson.h>

#include "http.h"

/* Answer with body, which is taken. */
extern void reply_json(HttpRequest *r, int status, json_t *body);

/* Send body, which is taken, as an event "data: {...}" of a stream. */
extern void reply_event(HttpRequest *r, json_t *body);

/*
 * Answer with an error; in a stream that has begun, as its last event.
 * code: a static string, in letters of any case: it is written as the shape has it; param: the field at fault or NULL.  The
 * message is sentences.
 */
extern void reply_error(HttpRequest *r, int status, const char *code, const char *param, const char *fmt, ...)
	__attribute__((format(printf, 5, 6)));

#endif
