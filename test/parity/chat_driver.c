/*
 * chat_driver.c -- src/chat on a pipe, for test_chat_templates.py.
 *
 * Each line of the input is {"template", "trusted", "variables", "now"}; each line of the output is
 * {"text", "origins"} (one digit for each byte) or {"code", "message", "detail"}.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "chat.h"

static json_t *
answer(const json_t *line)
{
	const json_t *source = json_object_get(line, "template");
	MillmTemplate *t;
	MillmRendering r;
	MillmError	err = {0};
	json_t	   *result;

	if (millm_template_compile(json_string_value(source), json_string_length(source), &t, &err) != MILLM_OK)
		return json_pack("{s:s, s:s, s:s}", "code", millm_code_name(err.code), "message", err.message, "detail", err.detail);
	if (millm_template_render(t, json_object_get(line, "trusted"), json_object_get(line, "variables"),
							  (time_t) json_integer_value(json_object_get(line, "now")), &r, &err) != MILLM_OK)
		result = json_pack("{s:s, s:s, s:s}", "code", millm_code_name(err.code), "message", err.message, "detail", err.detail);
	else
	{
		for (size_t i = 0; i < r.n; i++)
			r.origins[i] += '0';
		result = json_pack("{s:s%, s:s%}", "text", r.text, r.n, "origins", (char *) r.origins, r.n);
		millm_rendering_free(&r);
	}
	millm_template_free(t);
	return result;
}

int
main(void)
{
	for (;;)
	{
		json_error_t where;
		json_t	   *line = json_loadf(stdin, JSON_DISABLE_EOF_CHECK | JSON_ALLOW_NUL, &where);
		json_t	   *result;

		if (!line)
			return feof(stdin) ? 0 : 1;
		result = answer(line);
		json_dumpf(result, stdout, JSON_COMPACT);
		putchar('\n');
		fflush(stdout);
		json_decref(result);
		json_decref(line);
	}
}
