/*
 * chat_driver.c -- src/chat on a pipe, for test_chat_templates.py and test_chat_ids.py.
 *
 * Each line of the input is {"template", "trusted", "variables", "now"}, or {"directory", "messages", "tools"?, "kwargs"?, "now"} of a model's
 * directory; each line of the output is {"text", "origins"} (one digit for each byte), with "ids" for a directory, or {"code", "message", "detail"}.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "templates.h"
#include "token.h"

/* What the last lines' directory holds: opening a large tokenizer takes longer than using it. */
static char opened[4096];
static MillmTokenizer *tokenizer;
static MillmTemplates *templates;

static MillmCode
open_directory(const char *directory, MillmError *err)
{
	MillmCode	rc;

	if (strcmp(opened, directory) == 0)
		return MILLM_OK;
	millm_tokenizer_close(tokenizer);
	millm_templates_free(templates);
	tokenizer = NULL;
	templates = NULL;
	opened[0] = '\0';
	if ((rc = millm_tokenizer_open(directory, &tokenizer, err)) == MILLM_OK &&
		(rc = millm_templates_open(directory, &templates, NULL, err)) == MILLM_OK)
		snprintf(opened, sizeof(opened), "%s", directory);
	return rc;
}

static json_t *
failure(const MillmError *err)
{
	return json_pack("{s:s, s:s, s:s}", "code", millm_code_name(err->code), "message", err->message, "detail", err->detail);
}

/* A rendering, and its ids if there are any. */
static json_t *
rendered(MillmRendering *r, const MillmIds *ids)
{
	json_t	   *list = NULL;
	json_t	   *result;

	for (size_t i = 0; i < r->n; i++)
		r->origins[i] += '0';
	if (ids)
	{
		list = json_array();
		for (size_t i = 0; i < ids->n; i++)
			json_array_append_new(list, json_integer(ids->ids[i]));
	}
	result = json_pack("{s:s%, s:s%, s:o*}", "text", r->text, r->n, "origins", (char *) r->origins, r->n, "ids", list);
	millm_rendering_free(r);
	return result;
}

/* As the engine does it (generation.c): nothing is added to what the template wrote. */
static json_t *
answer_for_directory(const char *directory, const json_t *line)
{
	MillmChatOptions o = {
		.messages = json_object_get(line, "messages"), .tools = json_object_get(line, "tools"), .kwargs = json_object_get(line, "kwargs"),
		.add_generation_prompt = true,
	};
	MillmEncodeOptions how = {.parse_special = true};
	MillmRendering r;
	MillmIds	ids = {0};
	MillmError	err = {0};
	json_t	   *result;

	if (open_directory(directory, &err) != MILLM_OK ||
		millm_templates_apply(templates, &o, (time_t) json_integer_value(json_object_get(line, "now")), &r, &err) != MILLM_OK)
		return failure(&err);
	how.origins = r.origins;
	if (millm_encode(tokenizer, r.text, r.n, how, 0, &ids, &err) != MILLM_OK)
	{
		millm_rendering_free(&r);
		return failure(&err);
	}
	result = rendered(&r, &ids);
	millm_ids_free(&ids);
	return result;
}

static json_t *
answer(const json_t *line)
{
	const json_t *source = json_object_get(line, "template");
	MillmTemplate *t;
	MillmRendering r;
	const char *directory = json_string_value(json_object_get(line, "directory"));
	MillmError	err = {0};
	json_t	   *result;

	if (directory)
		return answer_for_directory(directory, line);
	if (millm_template_compile(json_string_value(source), json_string_length(source), &t, &err) != MILLM_OK)
		return failure(&err);
	if (millm_template_render(t, json_object_get(line, "trusted"), json_object_get(line, "variables"),
							  (time_t) json_integer_value(json_object_get(line, "now")), &r, &err) != MILLM_OK)
		result = failure(&err);
	else
		result = rendered(&r, NULL);
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
			break;
		result = answer(line);
		json_dumpf(result, stdout, JSON_COMPACT);
		putchar('\n');
		fflush(stdout);
		json_decref(result);
		json_decref(line);
	}
	millm_tokenizer_close(tokenizer);
	millm_templates_free(templates);
	return feof(stdin) ? 0 : 1;
}
