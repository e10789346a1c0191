/*
 * chat.h -- chat templates: a conversation becomes the text that a model was trained on.
 *
 * A template is Jinja as transformers runs it (ImmutableSandboxedEnvironment with trim_blocks, lstrip_blocks, loop
 * controls, its tojson, strftime_now and raise_exception), of which this room interprets what templates use.  It renders
 * the same bytes or refuses.  What jinja2 has and this room has not is refused by name: blocks with inheritance or imports, i18n,
 * formatting with % and format(), HTML filters.  Templates come with models from strangers: source, nesting,
 * steps, memory and output are bounded.
 *
 * A MillmTemplate is immutable and may be rendered by many threads at once.
 */
#ifndef MILLM_CHAT_H
#define MILLM_CHAT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "error.h"

typedef struct MillmTemplate MillmTemplate;

/*
 * Compile source[0..n).  INVALID_MODEL_FILE naming the line of what is not Jinja, UNSUPPORTED of what is but
 * not here, INVALID_MODEL_FILE too for a source over its limits.
 */
extern MillmCode millm_template_compile(const char *source, size_t n, MillmTemplate **out, MillmError *err);
extern void millm_template_free(MillmTemplate *t);	/* NULL is fine */

/* Is there a variable of that name anywhere in it?  (One that it sets itself counts.) */
extern bool millm_template_uses(const MillmTemplate *t, const char *variable);

/* A text, of each byte of which is known who wrote it. */
typedef struct MillmRendering
{
	char	   *text;			/* malloc'ed, terminated; may contain NUL */
	uint8_t    *origins;		/* malloc'ed; 1: the caller's, 0: the template's */
	size_t		n;
} MillmRendering;

extern void millm_rendering_free(MillmRendering *r);

/*
 * Render the template with the variables of the JSON object `trusted` (bos_token and the like: as if the template
 * had written them) and `variables` (messages, tools, ...: the caller's; they win).  The role of a message is the template's when it
 * is one of the usual ones.  now is what strftime_now() tells, in local time.
 *
 * INVALID_ARGUMENT with the template's own words when it refuses the conversation, with line and reason when a value does not suit it,
 * UNSUPPORTED for what this room does not do, INVALID_ARGUMENT beyond the limits of steps, memory, depth and output.
 */
extern MillmCode millm_template_render(const MillmTemplate *t, const json_t *trusted, const json_t *variables, time_t now,
									   MillmRendering *out, MillmError *err);

#endif
