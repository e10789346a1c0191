/*
 * template.c -- the door of this room: compile, render, free.
 *
 * Everything behind it may leave by longjmp (work.h); what has to be freed then is owned here.
 */
#include "chat.h"

#include <stdlib.h>
#include <string.h>

#include "eval.h"
#include "syntax.h"

#define MAX_COMPILE_BYTES (32u << 20)
#define MAX_RENDER_BYTES (128u << 20)
#define MAX_OUTPUT_BYTES (16u << 20)
#define FREE_STEPS 2000000
#define STEPS_PER_BYTE 20
#define MAX_RENDER_SECONDS 5		/* of CPU time */

static MillmCode
parse(MillmTemplate *t, const char *source, size_t n)
{
	int			rc = setjmp(t->work.door);

	if (rc != 0)
		return (MillmCode) rc;
	millm_template_parse(t, source, n);
	return MILLM_OK;
}

MillmCode
millm_template_compile(const char *source, size_t n, MillmTemplate **out, MillmError *err)
{
	MillmTemplate *t = calloc(1, sizeof(*t));
	MillmCode	rc;

	*out = NULL;
	if (!t)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	t->work.err = err;
	t->work.left_bytes = MAX_COMPILE_BYTES;
	t->work.left_steps = UINT64_MAX;	/* the source's length bounds them */
	rc = parse(t, source, n);
	t->work.err = NULL;
	if (rc != MILLM_OK)
	{
		millm_template_free(t);
		return rc;
	}
	*out = t;
	return MILLM_OK;
}

void
millm_template_free(MillmTemplate *t)
{
	if (!t)
		return;
	millm_work_free(&t->work);
	free(t);
}

bool
millm_template_uses(const MillmTemplate *t, const char *variable)
{
	const Name *name = millm_template_name(t, millm_str(variable));

	return name && name->is_variable;
}

/* Bytes of all texts in the conversation, about; what a rendering may cost goes with it. */
static uint64_t
input_bytes(const json_t *json, int depth)
{
	uint64_t	n = 1;
	const char *key;
	json_t	   *member;

	if (depth > 2000)
		return n;
	if (json_is_string(json))
		return n + json_string_length(json);
	json_object_foreach((json_t *) json, key, member)
		n += strlen(key) + input_bytes(member, depth + 1);
	for (size_t i = 0; i < json_array_size(json); i++)
		n += input_bytes(json_array_get(json, i), depth + 1);
	return n;
}

static MillmCode
run_template(Run *run, size_t max_output, const json_t *trusted, const json_t *variables, Str *text)
{
	int			rc = setjmp(run->w.door);

	if (rc != 0)
		return (MillmCode) rc;
	*text = millm_template_run(run, max_output, trusted, variables);
	return MILLM_OK;
}

MillmCode
millm_template_render(const MillmTemplate *t, const json_t *trusted, const json_t *variables, time_t now,
					  MillmRendering *out, MillmError *err)
{
	Run			run = {.t = t, .now = now};
	uint64_t	n_input = input_bytes(variables, 0);
	Str			text;
	MillmCode	rc;

	*out = (MillmRendering) {0};
	run.w.err = err;
	run.w.left_bytes = MAX_RENDER_BYTES;
	run.w.left_steps = FREE_STEPS + STEPS_PER_BYTE * n_input;
	millm_work_limit_time(&run.w, MAX_RENDER_SECONDS);
	rc = run_template(&run, MAX_OUTPUT_BYTES, trusted, variables, &text);
	if (rc == MILLM_OK)
	{
		out->text = malloc((size_t) text.n + 1);
		out->origins = malloc((size_t) text.n + 1);
		if (!out->text || !out->origins)
		{
			millm_rendering_free(out);
			rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		}
		else
		{
			memcpy(out->text, text.data, text.n);
			out->text[text.n] = '\0';
			if (text.origins)
				memcpy(out->origins, text.origins, text.n);
			else
				memset(out->origins, text.is_quoted, text.n);
			out->n = text.n;
		}
	}
	millm_work_free(&run.w);
	return rc;
}

void
millm_rendering_free(MillmRendering *r)
{
	free(r->text);
	free(r->origins);
	*r = (MillmRendering) {0};
}
