/*
 * fuzz_template.c -- no chat template and no conversation may do more than fail by name, within bounds.
 *
 * The input is a template, a zero byte, and the variables as JSON; without the latter there are some that most
 * templates like.  What renders must be valid UTF-8, each byte of
 * it the template's or the caller's.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "chat.h"
#include "utf8.h"

static const char usual[] =
	"{\"messages\": [{\"role\": \"system\", \"content\": \"Be brief.\"}, {\"role\": \"user\", \"content\": \"H\\u00e9 <b> \\n\"},"
	" {\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"type\": \"function\", \"function\": {\"name\": \"f\","
	" \"arguments\": {\"x\": [1, 2.5, true, null]}}}]}, {\"role\": \"tool\", \"content\": [{\"type\": \"text\", \"text\": \"4\"}]}],"
	" \"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"type\": [\"integer\", \"null\"]}}}],"
	" \"add_generation_prompt\": true, \"xs\": [3, 1, 2], \"s\": \"Hello World\"}";

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const uint8_t *end = memchr(data, 0, size);
	size_t		n = end ? (size_t) (end - data) : size;
	MillmTemplate *t;
	MillmRendering r;
	MillmError	err;
	json_t	   *trusted;
	json_t	   *variables;
	MillmCode	rc;

	if (millm_template_compile((const char *) data, n, &t, &err) != MILLM_OK)
	{
		if (!err.message[0])
			abort();
		return 0;
	}
	variables = end ? json_loadb((const char *) end + 1, size - n - 1, JSON_ALLOW_NUL, NULL) : json_loads(usual, 0, NULL);
	trusted = json_pack("{s:s, s:s}", "bos_token", "<s>", "eos_token", "</s>");
	if (json_is_object(variables))
	{
		rc = millm_template_render(t, trusted, variables, 1753000000, &r, &err);
		if (rc == MILLM_OK)
		{
			if (millm_utf8_valid_bytes(r.text, r.n) != r.n)
				abort();
			for (size_t i = 0; i < r.n; i++)
				if (r.origins[i] > 1)
					abort();
			millm_rendering_free(&r);
		}
		else if (rc == MILLM_E_INTERNAL || !err.message[0])
			abort();
	}
	json_decref(trusted);
	json_decref(variables);
	millm_template_free(t);
	return 0;
}
