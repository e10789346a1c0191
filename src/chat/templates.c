/*
 * templates.c -- a model's chat templates: where they lie, which one is meant, and what they are given.
 */
#include "templates.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shown.h"

#define MAX_TEMPLATES 16
#define MAX_NAME_BYTES 63
#define MAX_FILE_BYTES (64u << 20)

typedef struct Named
{
	char		name[MAX_NAME_BYTES + 1];
	MillmTemplate *compiled;	/* NULL: error tells why */
	MillmError	error;
} Named;

struct MillmTemplates
{
	Named		named[MAX_TEMPLATES];
	int			n;
	json_t	   *tokens;			/* bos_token and the like, an object of strings */
};

/* ---- files ---- */

/* The whole file, terminated; *out is NULL when there is none of that name. */
static MillmCode
read_file(const char *dir, const char *name, char **out, size_t *n, MillmError *err)
{
	char		path[4096];
	FILE	   *f;
	long		size;
	MillmCode	rc = MILLM_OK;

	*out = NULL;
	if ((size_t) snprintf(path, sizeof(path), "%s/%s", dir, name) >= sizeof(path))
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "path of the model is too long");
	f = fopen(path, "rbe");
	if (!f && errno == ENOENT)
		return MILLM_OK;
	if (!f || fseek(f, 0, SEEK_END) != 0 || (size = ftell(f)) < 0 || size > (long) MAX_FILE_BYTES || fseek(f, 0, SEEK_SET) != 0)
		rc = millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "could not read \"%s\"", shown(name).text);
	else
	{
		*out = malloc((size_t) size + 1);
		if (!*out)
			rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		else
		{
			*n = fread(*out, 1, (size_t) size, f);
			(*out)[*n] = '\0';
		}
	}
	if (f)
		fclose(f);
	return rc;
}

static MillmCode
read_json(const char *dir, const char *name, json_t **out, MillmError *err)
{
	char	   *text;
	size_t		n;
	json_error_t where;
	MillmCode	rc = read_file(dir, name, &text, &n, err);

	*out = NULL;
	if (rc != MILLM_OK || !text)
		return rc;
	/* as reals: model_max_length is often 10^30, and no number of these files is wanted */
	*out = json_loadb(text, n, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &where);
	free(text);
	if (json_is_object(*out))
		return MILLM_OK;
	json_decref(*out);
	*out = NULL;
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" is not a JSON object", name);
	millm_detail(err, "Line %d: %s.", where.line, where.text);
	return MILLM_E_INVALID_MODEL_FILE;
}

/* ---- collecting ---- */

static Named *
find(MillmTemplates *set, const char *name)
{
	for (int i = 0; i < set->n; i++)
		if (strcmp(set->named[i].name, name) == 0)
			return &set->named[i];
	return NULL;
}

/* Compile a template under a name; one that is there already stays. */
static MillmCode
add(MillmTemplates *set, const char *name, const char *source, size_t n, MillmError *err)
{
	Named	   *named;

	if (find(set, name))
		return MILLM_OK;
	if (set->n == MAX_TEMPLATES || strlen(name) > MAX_NAME_BYTES)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "the model has too many chat templates, or one of too long a name");
		millm_detail(err, "At most %d with names of at most %d bytes are accepted.", MAX_TEMPLATES, MAX_NAME_BYTES);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	named = &set->named[set->n++];
	snprintf(named->name, sizeof(named->name), "%s", name);
	(void) millm_template_compile(source, n, &named->compiled, &named->error);
	return MILLM_OK;
}

static MillmCode
add_from_config(MillmTemplates *set, const json_t *config, MillmError *err)
{
	const json_t *value = json_object_get(config, "chat_template");
	MillmCode	rc = MILLM_OK;

	if (!value || json_is_null(value))
		return MILLM_OK;
	if (json_is_string(value))
		return add(set, "default", json_string_value(value), json_string_length(value), err);
	for (size_t i = 0; rc == MILLM_OK && i < json_array_size(value); i++)
	{
		const json_t *name = json_object_get(json_array_get(value, i), "name");
		const json_t *source = json_object_get(json_array_get(value, i), "template");

		if (!json_is_string(name) || !json_is_string(source))
			return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"chat_template\" in tokenizer_config.json has an element without name and template");
		rc = add(set, json_string_value(name), json_string_value(source), json_string_length(source), err);
	}
	if (!json_is_array(value))
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"chat_template\" in tokenizer_config.json is neither a text nor a list");
	return rc;
}

static MillmCode
add_file(MillmTemplates *set, const char *dir, const char *file, const char *name, MillmError *err)
{
	char	   *source;
	size_t		n;
	MillmCode	rc = read_file(dir, file, &source, &n, err);

	if (rc == MILLM_OK && source)
		rc = add(set, name, source, n, err);
	free(source);
	return rc;
}

static MillmCode
add_directory(MillmTemplates *set, const char *dir, MillmError *err)
{
	static const char directory[] = "additional_chat_templates";
	static const char suffix[] = ".jinja";
	char		path[4096];
	DIR		   *d;
	struct dirent *entry;
	MillmCode	rc = MILLM_OK;

	if ((size_t) snprintf(path, sizeof(path), "%s/%s", dir, directory) >= sizeof(path) || !(d = opendir(path)))
		return MILLM_OK;
	while (rc == MILLM_OK && (entry = readdir(d)))
	{
		size_t		n = strlen(entry->d_name);

		if (n > sizeof(suffix) - 1 && strcmp(entry->d_name + n - (sizeof(suffix) - 1), suffix) == 0)
		{
			char		name[256];

			snprintf(name, sizeof(name), "%.*s", (int) (n - (sizeof(suffix) - 1)), entry->d_name);
			rc = add_file(set, path, entry->d_name, name, err);
		}
	}
	closedir(d);
	return rc;
}

/* The special tokens that a template may name, from one of the two files that tell them; what is there already stays. */
static void
add_tokens(MillmTemplates *set, const json_t *from)
{
	const char *key;
	json_t	   *value;

	json_object_foreach((json_t *) from, key, value)
	{
		size_t		n = strlen(key);
		json_t	   *content = json_is_object(value) ? json_object_get(value, "content") : value;

		if (n > 6 && strcmp(key + n - 6, "_token") == 0 && json_is_string(content) && !json_object_get(set->tokens, key))
			json_object_set(set->tokens, key, content);
	}
}

MillmCode
millm_templates_open(const char *dir, MillmTemplates **out, MillmError *complaint, MillmError *err)
{
	MillmTemplates *set = calloc(1, sizeof(*set));
	json_t	   *config = NULL;
	json_t	   *map = NULL;
	MillmCode	rc;

	*out = NULL;
	if (complaint)
		complaint->code = MILLM_OK;
	if (!set || !(set->tokens = json_object()))
	{
		free(set);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	if ((rc = read_json(dir, "tokenizer_config.json", &config, err)) == MILLM_OK &&
		(rc = read_json(dir, "special_tokens_map.json", &map, err)) == MILLM_OK &&
		(rc = add_file(set, dir, "chat_template.jinja", "default", err)) == MILLM_OK &&
		(rc = add_directory(set, dir, err)) == MILLM_OK)
		rc = add_from_config(set, config, err);
	add_tokens(set, config);
	add_tokens(set, map);
	json_decref(config);
	json_decref(map);
	if (rc != MILLM_OK || set->n == 0)
	{
		millm_templates_free(set);
		return rc;
	}
	for (int i = set->n - 1; i >= 0 && complaint; i--)
		if (!set->named[i].compiled)
			*complaint = set->named[i].error;
	*out = set;
	return MILLM_OK;
}

void
millm_templates_free(MillmTemplates *set)
{
	if (!set)
		return;
	for (int i = 0; i < set->n; i++)
		millm_template_free(set->named[i].compiled);
	json_decref(set->tokens);
	free(set);
}

/* ---- applying ---- */

/* A text, nothing, whatever object a template may want, or parts that are objects: those of text only. */
static MillmCode
check_content(const json_t *content, size_t message, MillmError *err)
{
	static const char *const media[] = {"image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file"};

	if (json_is_number(content) || json_is_boolean(content))
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the content of a message must be a text or an array of objects");
		millm_detail(err, "That of message %zu is a %s.", message, json_is_number(content) ? "number" : "boolean");
		return MILLM_E_INVALID_ARGUMENT;
	}
	for (size_t i = 0; i < json_array_size(content); i++)
	{
		const json_t *part = json_array_get(content, i);
		const char *type = json_string_value(json_object_get(part, "type"));

		if (!json_is_object(part))
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the content of a message must be a text or an array of objects");
			millm_detail(err, "Part %zu of message %zu is no object.", i + 1, message);
			return MILLM_E_INVALID_ARGUMENT;
		}
		for (size_t k = 0; type && k < sizeof(media) / sizeof(media[0]); k++)
			if (strcmp(type, media[k]) == 0)
			{
				millm_fail(err, MILLM_E_UNSUPPORTED, "only text can be read");
				millm_detail(err, "Part %zu of message %zu is of type \"%s\".", i + 1, message, type);
				return MILLM_E_UNSUPPORTED;
			}
	}
	return MILLM_OK;
}

static MillmCode
check_messages(const json_t *messages, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	if (!json_is_array(messages))
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "messages must be an array of objects");
		millm_hint(err, "For example [{\"role\": \"user\", \"content\": \"Hello\"}].");
		return MILLM_E_INVALID_ARGUMENT;
	}
	for (size_t i = 0; rc == MILLM_OK && i < json_array_size(messages); i++)
	{
		const json_t *message = json_array_get(messages, i);

		if (json_is_string(json_object_get(message, "role")))
		{
			rc = check_content(json_object_get(message, "content"), i + 1, err);
			continue;
		}
		rc = millm_fail(err, MILLM_E_INVALID_ARGUMENT, "each message must be an object with a role");
		millm_detail(err, "Message %zu %s.", i + 1, json_is_object(message) ? "has no role that is a text" : "is no object");
	}
	return rc;
}

static MillmCode
check_objects(const json_t *array, const char *what, MillmError *err)
{
	bool		ok = !array || json_is_array(array);

	for (size_t i = 0; i < json_array_size(array); i++)
		ok = ok && json_is_object(json_array_get(array, i));
	return ok ? MILLM_OK : millm_fail(err, MILLM_E_INVALID_ARGUMENT, "%s must be an array of objects", what);
}

static MillmCode
check_kwargs(const json_t *kwargs, MillmError *err)
{
	static const char *const arguments[] = {"messages", "tools", "documents"};

	if (kwargs && !json_is_object(kwargs))
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "template_kwargs must be an object");
	for (size_t i = 0; i < sizeof(arguments) / sizeof(arguments[0]); i++)
		if (json_object_get(kwargs, arguments[i]))
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "template_kwargs must not have \"%s\"", arguments[i]);
			millm_hint(err, "That is an argument of its own.");
			return MILLM_E_INVALID_ARGUMENT;
		}
	return MILLM_OK;
}

/* What the template does not look at, the model does not see: refused, not left out in silence. */
static MillmCode
check_used(const MillmTemplate *t, const char *variable, MillmError *err)
{
	if (millm_template_uses(t, variable))
		return MILLM_OK;
	millm_fail(err, MILLM_E_UNSUPPORTED, "the chat template has no use for \"%s\"", shown(variable).text);
	millm_hint(err, "Leave it out: the model would not see it.");
	return MILLM_E_UNSUPPORTED;
}

static MillmCode
check_all_used(const MillmTemplate *t, const MillmChatOptions *o, MillmError *err)
{
	MillmCode	rc = MILLM_OK;
	const char *key;
	json_t	   *value;

	if (json_array_size(o->tools) > 0)
		rc = check_used(t, "tools", err);
	if (rc == MILLM_OK && json_array_size(o->documents) > 0)
		rc = check_used(t, "documents", err);
	json_object_foreach((json_t *) o->kwargs, key, value)
		if (rc == MILLM_OK)
			rc = check_used(t, key, err);
	return rc;
}

static MillmCode
pick(const MillmTemplates *set, const MillmChatOptions *o, const Named **out, MillmError *err)
{
	MillmTemplates *any = (MillmTemplates *) set;	/* only read */
	char		names[MAX_TEMPLATES * (MAX_NAME_BYTES + sizeof(" and \"\""))];

	if (!set)
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "the model has no chat template");
		millm_hint(err, "Write the prompt as the model wants it, and use millm.generate(..., raw => true).");
		return MILLM_E_UNSUPPORTED;
	}
	*out = o->template_name ? find(any, o->template_name) : o->tools ? find(any, "tool_use") : NULL;
	if (!*out && !o->template_name)
		*out = find(any, "default");
	if (*out)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the model has no chat template \"%s\"",
			   o->template_name ? shown(o->template_name).text : "default");
	for (int i = 0, n = 0; i < set->n; i++)
		n += snprintf(names + n, sizeof(names) - (size_t) n, "%s\"%s\"", i == 0 ? "" : i < set->n - 1 ? ", " : " and ", set->named[i].name);
	millm_hint(err, "It has %s.", names);
	return MILLM_E_INVALID_ARGUMENT;
}

static json_t *
or_null(const json_t *json)
{
	return json ? json_incref((json_t *) json) : json_null();
}

MillmCode
millm_templates_apply(const MillmTemplates *set, const MillmChatOptions *o, time_t now, MillmRendering *out, MillmError *err)
{
	const Named *named;
	json_t	   *variables;
	MillmCode	rc;

	*out = (MillmRendering) {0};
	if ((rc = pick(set, o, &named, err)) != MILLM_OK ||
		(rc = check_messages(o->messages, err)) != MILLM_OK ||
		(rc = check_objects(o->tools, "tools", err)) != MILLM_OK ||
		(rc = check_objects(o->documents, "documents", err)) != MILLM_OK ||
		(rc = check_kwargs(o->kwargs, err)) != MILLM_OK)
		return rc;
	if (!named->compiled)
	{
		*err = named->error;
		return err->code;
	}
	if ((rc = check_all_used(named->compiled, o, err)) != MILLM_OK)
		return rc;
	/* tools and documents are always passed: templates ask whether they are none */
	variables = json_pack("{s:O, s:o, s:o, s:b}", "messages", o->messages, "tools", or_null(o->tools), "documents", or_null(o->documents),
						  "add_generation_prompt", o->add_generation_prompt);
	if (!variables || (o->kwargs && json_object_update(variables, (json_t *) o->kwargs) != 0))
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else
		rc = millm_template_render(named->compiled, set->tokens, variables, now, out, err);
	json_decref(variables);
	return rc;
}
