/*
 * pooling.c -- how a model's embeddings are made, by the files that sentence-transformers keeps in a repository.
 *
 *     modules.json                        what comes after the model: Pooling, and perhaps Normalize
 *     1_Pooling/config.json               which pooling; the directory's name is modules.json's
 *     sentence_bert_config.json           how long a text may be
 *     config_sentence_transformers.json   a prompt that stands before every text
 *
 * Without modules.json it is the mean of the last hidden states, normalized.  What these files ask for and is not done here (a Dense layer, say) is
 * refused by name when somebody wants an embedding: not at load, since whoever generates text does not care.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "shown.h"

#define MAX_PROMPT_BYTES 4096		/* it stands before each of many texts */

static const char *const mode_names[MILLM_N_POOLING_MODES] = {"cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"};
/* Older files have a flag for each; what several make stands side by side in the order of the enum. */
static const char *const mode_flags[MILLM_N_POOLING_MODES] = {
	"pooling_mode_cls_token", "pooling_mode_max_tokens", "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens",
	"pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
};

static MillmCode
refuse(MillmError *err)
{
	return millm_fail(err, MILLM_E_UNSUPPORTED, "embeddings cannot be made as this model's sentence-transformers files ask for");
}

static MillmCode
broken(MillmError *err, const char *file, const char *expected)
{
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid %s", file);
	millm_detail(err, "Expected %s.", expected);
	return MILLM_E_INVALID_MODEL_FILE;
}

/* Add the mode of that name. */
static MillmCode
add_mode(MillmPooling *p, const char *name, MillmError *err)
{
	for (int i = 0; name && i < MILLM_N_POOLING_MODES; i++)
		if (strcmp(name, mode_names[i]) == 0 && p->n_modes < MILLM_N_POOLING_MODES)
		{
			p->modes[p->n_modes++] = (MillmPoolingMode) i;
			return MILLM_OK;
		}
	refuse(err);
	millm_detail(err, "\"pooling_mode\" names \"%s\", which is not known or is one too many.", shown(name ? name : "").text);
	return MILLM_E_UNSUPPORTED;
}

/* The config of a Pooling module */
static MillmCode
read_pooling(const json_t *json, MillmPooling *p, MillmError *err)
{
	const json_t *mode = json_object_get(json, "pooling_mode");
	MillmCode	rc = MILLM_OK;

	if (!json_is_object(json))
		return broken(err, "config of a Pooling module", "an object");
	if (json_is_array(mode))
		for (size_t i = 0; rc == MILLM_OK && i < json_array_size(mode); i++)
			rc = add_mode(p, json_string_value(json_array_get(mode, i)), err);
	else if (mode)
		rc = add_mode(p, json_string_value(mode), err);
	else
		for (int i = 0; i < MILLM_N_POOLING_MODES; i++)
			if (json_is_true(json_object_get(json, mode_flags[i])))
				p->modes[p->n_modes++] = (MillmPoolingMode) i;
	if (rc == MILLM_OK && p->n_modes == 0)
		p->modes[p->n_modes++] = MILLM_POOL_MEAN;
	return rc;
}

/* Is type the genuine module of that name?  Its package has moved within sentence_transformers over the years. */
static bool
is_module(const char *type, const char *name)
{
	const char *dot = strrchr(type, '.');

	return dot && strncmp(type, "sentence_transformers.", strlen("sentence_transformers.")) == 0 && strcmp(dot + 1, name) == 0;
}

static MillmCode
read_pooling_file(const char *dir, const char *path, MillmPooling *p, bool *excludes_prompt, MillmError *err)
{
	char		name[300];
	json_t	   *json = NULL;
	MillmCode	rc;

	if (path[0] == '\0' || path[0] == '.' || strchr(path, '/') || (size_t) snprintf(name, sizeof(name), "%s/config.json", path) >= sizeof(name))
		return broken(err, "modules.json", "the name of a directory for each path");
	if ((rc = millm_model_read_json(dir, name, MILLM_MAX_CONFIG_BYTES, &json, err)) != MILLM_OK)
		return rc;
	if (!json)
		rc = millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "there is no \"%s\" in \"%s\", which modules.json names", name, dir);
	else
		rc = read_pooling(json, p, err);
	*excludes_prompt = json_is_false(json_object_get(json, "include_prompt"));
	json_decref(json);
	return rc;
}

static MillmCode
read_modules(const char *dir, const json_t *modules, MillmPooling *p, bool *excludes_prompt, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	if (!json_is_array(modules))
		return broken(err, "modules.json", "an array");
	p->n_modes = 0;
	p->normalized = false;
	for (size_t i = 0; rc == MILLM_OK && i < json_array_size(modules); i++)
	{
		const json_t *module = json_array_get(modules, i);
		const char *type = json_string_value(json_object_get(module, "type"));
		const char *path = json_string_value(json_object_get(module, "path"));

		if (!type || !path)
			return broken(err, "modules.json", "modules with a type and a path");
		if (i == 0 && is_module(type, "Transformer") && path[0] == '\0')
			continue;
		if (p->n_modes == 0 && i > 0 && is_module(type, "Pooling"))
			rc = read_pooling_file(dir, path, p, excludes_prompt, err);
		else if (p->n_modes > 0 && is_module(type, "Normalize"))
			p->normalized = true;
		else
		{
			rc = refuse(err);
			millm_detail(err, "modules.json names \"%s\" as module %zu; millm knows a Transformer, a Pooling, and a Normalize after it.", shown(type).text, i);
		}
	}
	if (rc == MILLM_OK && p->n_modes == 0)
	{
		rc = refuse(err);
		millm_detail(err, "modules.json names no Pooling.");
	}
	return rc;
}

/* Newer files say what becomes of a text.  Where there are messages, too, a text is made one: the chat template would write more around it. */
static MillmCode
check_modalities(const json_t *json, MillmError *err)
{
	const json_t *modalities = json_object_get(json, "modality_config"), *text = json_object_get(modalities, "text");
	const char *task = json_string_value(json_object_get(json, "transformer_task"));
	const char *method = json_string_value(json_object_get(text, "method")), *output = json_string_value(json_object_get(text, "method_output_name"));

	if (task && strcmp(task, "feature-extraction") != 0)
	{
		refuse(err);
		millm_detail(err, "sentence_bert_config.json has the \"transformer_task\" \"%s\"; millm knows \"feature-extraction\".", shown(task).text);
		return MILLM_E_UNSUPPORTED;
	}
	if (!modalities)
		return MILLM_OK;
	if (json_object_get(modalities, "message") || !method || strcmp(method, "forward") != 0 || !output || strcmp(output, "last_hidden_state") != 0)
	{
		refuse(err);
		millm_detail(err, "\"modality_config\" of sentence_bert_config.json takes a text otherwise than by its last hidden states%s.",
					 json_object_get(modalities, "message") ? ": as a \"message\", by the chat template" : "");
		return MILLM_E_UNSUPPORTED;
	}
	return MILLM_OK;
}

/* How the Transformer module takes its texts */
static MillmCode
read_transformer(const char *dir, MillmPooling *p, MillmError *err)
{
	json_t	   *json = NULL;
	const json_t *max;
	MillmCode	rc = millm_model_read_json(dir, "sentence_bert_config.json", MILLM_MAX_CONFIG_BYTES, &json, err);

	max = json_object_get(json, "max_seq_length");
	if (rc == MILLM_OK && max && !json_is_null(max))
	{
		if (!json_is_integer(max) || json_integer_value(max) < 1)
			rc = broken(err, "sentence_bert_config.json", "a \"max_seq_length\" of at least 1");
		else
			p->max_tokens = json_integer_value(max) < MILLM_MAX_POSITIONS ? (int) json_integer_value(max) : MILLM_MAX_POSITIONS;
	}
	if (rc == MILLM_OK && json_is_true(json_object_get(json, "do_lower_case")))
	{
		rc = refuse(err);
		millm_detail(err, "sentence_bert_config.json has \"do_lower_case\", which is not done.");
	}
	if (rc == MILLM_OK)
		rc = check_modalities(json, err);
	json_decref(json);
	return rc;
}

static MillmCode
read_prompt(const char *dir, bool excludes_prompt, MillmPooling *p, MillmError *err)
{
	json_t	   *json = NULL;
	const char *name, *prompt;
	MillmCode	rc = millm_model_read_json(dir, "config_sentence_transformers.json", MILLM_MAX_CONFIG_BYTES, &json, err);

	name = json_string_value(json_object_get(json, "default_prompt_name"));
	prompt = name ? json_string_value(json_object_get(json_object_get(json, "prompts"), name)) : NULL;
	if (rc == MILLM_OK && name && (!prompt || strlen(prompt) > MAX_PROMPT_BYTES))
		rc = broken(err, "config_sentence_transformers.json", "a prompt of the name that \"default_prompt_name\" says, of at most 4096 bytes");
	else if (rc == MILLM_OK && prompt && prompt[0] && excludes_prompt)
	{
		rc = refuse(err);
		millm_detail(err, "Its Pooling has \"include_prompt\": false; a prompt stands before each text, and would have to be left out of the pooling.");
	}
	else if (rc == MILLM_OK && prompt && prompt[0] && !(p->prompt = strdup(prompt)))
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	json_decref(json);
	return rc;
}

void
millm_pooling_open(const char *dir, MillmPooling *p)
{
	json_t	   *modules = NULL;
	bool		excludes_prompt = false;

	*p = (MillmPooling) {.modes = {MILLM_POOL_MEAN}, .n_modes = 1, .normalized = true};
	if (millm_model_read_json(dir, "modules.json", MILLM_MAX_CONFIG_BYTES, &modules, &p->refused) == MILLM_OK && modules &&
		read_modules(dir, modules, p, &excludes_prompt, &p->refused) == MILLM_OK && read_transformer(dir, p, &p->refused) == MILLM_OK)
		read_prompt(dir, excludes_prompt, p, &p->refused);
	json_decref(modules);
}
