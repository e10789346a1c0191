/*
 * choice.c -- see choice.h.
 *
 * The rule for weights is transformers' (hub-protocol.md 5.1): model.safetensors, else the index and exactly the files that it names; else the
 * same of PyTorch's checkpoints.  Everything else is chosen by name from the repository's root, and the configs of sentence-transformers' modules from
 * theirs ("1_Pooling"); what is not named here is not needed and not fetched.
 */
#include "choice.h"

#include <fnmatch.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_INDEX_BYTES	(64u << 20)
#define WEIGHTS			"model.safetensors"
#define INDEX			"model.safetensors.index.json"
#define BIN_WEIGHTS		"pytorch_model.bin"
#define BIN_INDEX		"pytorch_model.bin.index.json"

static const char *const wanted[] = {
	"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.*.json", "special_tokens_map.json",
	"added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
	"preprocessor_config.json", "processor_config.json",
	"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json", "LICENSE*", "README.md",
};

static MillmCode
choose(MillmChoice *c, const MillmHubFile *f, MillmError *err)
{
	const MillmHubFile **grown;

	for (size_t i = 0; i < c->n; i++)
		if (c->files[i] == f)
			return MILLM_OK;
	if (c->n % 64 == 0)
	{
		if (!(grown = realloc(c->files, (c->n + 64) * sizeof(*grown))))
			return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		c->files = grown;
	}
	c->files[c->n++] = f;
	if (__builtin_add_overflow(c->total_bytes, f->size, &c->total_bytes))
		return millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the files of the repository claim an impossible size");
	return MILLM_OK;
}

static MillmCode
no_weights(const MillmRepo *repo, MillmError *err)
{
	millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" has no weights that millm reads", repo->id);
	millm_detail(err, "It has neither " WEIGHTS " nor " BIN_WEIGHTS ", nor an index of the one or the other that names files.");
	millm_hint(err, "Choose a repository, or a revision, with safetensors.");
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

static bool
ends_with(const char *name, const char *suffix)
{
	size_t		n = strlen(name), k = strlen(suffix);

	return n > k && strcmp(name + n - k, suffix) == 0;
}

MillmCode
millm_choose_small_files(const MillmRepo *repo, MillmChoice *c, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		for (size_t j = 0; rc == MILLM_OK && j < repo->n_files; j++)
			if (fnmatch(wanted[i], repo->files[j].path, FNM_PERIOD | FNM_PATHNAME) == 0)
				rc = choose(c, &repo->files[j], err);
	return rc;
}

MillmCode
millm_choose_shards(const MillmRepo *repo, const char *text, size_t len, MillmChoice *c, MillmError *err)
{
	const char *suffix = c->is_bin ? ".bin" : ".safetensors";
	json_t	   *index = json_loadb(text, len, 0, NULL), *value;
	bool	   *is_named = calloc(repo->n_files + 1, sizeof(*is_named)), has_any = false;
	const char *tensor;
	MillmCode	rc = is_named ? MILLM_OK : millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");

	if (rc == MILLM_OK)
		json_object_foreach(json_object_get(index, "weight_map"), tensor, value)
		{
			const char *name = json_string_value(value);
			const MillmHubFile *f = name && !strchr(name, '/') && ends_with(name, suffix) ? millm_repo_find(repo, name) : NULL;

			if (!f)
			{
				rc = millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "%s names a %s file that repository \"%s\" does not have", c->is_bin ? BIN_INDEX : INDEX,
								suffix, repo->id);
				millm_detail(err, "Tensor \"%.100s\" should be in \"%.200s\".", tensor, name ? name : "(no name)");
				break;
			}
			is_named[f - repo->files] = has_any = true;
		}
	json_decref(index);
	if (rc == MILLM_OK && !has_any)
		rc = no_weights(repo, err);
	for (size_t i = 0; rc == MILLM_OK && i < repo->n_files; i++)
		if (is_named[i])
			rc = choose(c, &repo->files[i], err);
	free(is_named);
	return rc;
}

bool
millm_is_weights(const MillmHubFile *file)
{
	return ends_with(file->path, ".safetensors") || ends_with(file->path, ".bin");
}

const MillmHubFile *
millm_choice_stored(const MillmChoice *c, size_t i)
{
	return c->is_bin && millm_is_weights(c->files[i]) ? &c->converted[i] : c->files[i];
}

/* Give each checkpoint the name that its safetensors file has by transformers' rule. */
static MillmCode
name_converted(MillmChoice *c, MillmError *err)
{
	size_t		n = 0, k = 0;

	if (!(c->converted = calloc(c->n, sizeof(*c->converted))))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (size_t i = 0; i < c->n; i++)
		n += millm_is_weights(c->files[i]);
	for (size_t i = 0; i < c->n; i++)
	{
		MillmHubFile *f = &c->converted[i];

		if (!millm_is_weights(c->files[i]))
			continue;
		if (n == 1)
			snprintf(f->path, sizeof(f->path), WEIGHTS);
		else
			snprintf(f->path, sizeof(f->path), "model-%05zu-of-%05zu.safetensors", ++k, n);
		memcpy(f->hash, c->files[i]->hash, sizeof(f->hash));
	}
	return MILLM_OK;
}

/* The file of all weights, or its index and what that names. */
static MillmCode
choose_weights(const MillmRepo *repo, const char *whole_name, const char *index_name, MillmReadSmall read, void *arg, MillmChoice *c, MillmError *err)
{
	const MillmHubFile *whole = millm_repo_find(repo, whole_name);
	char	   *text;
	size_t		len;
	MillmCode	rc;

	if (whole)
		return choose(c, whole, err);
	/* of converted weights an index of our own is written: theirs is read, but not kept */
	if ((!c->is_bin && (rc = choose(c, millm_repo_find(repo, index_name), err)) != MILLM_OK) ||
		(rc = read(arg, index_name, MAX_INDEX_BYTES, &text, &len, err)) != MILLM_OK)
		return rc;
	rc = millm_choose_shards(repo, text, len, c, err);
	free(text);
	return rc;
}

MillmCode
millm_choose_files(const MillmRepo *repo, MillmReadSmall read, void *arg, MillmChoice *c, MillmError *err)
{
	MillmCode	rc;

	c->is_bin = !millm_repo_find(repo, WEIGHTS) && !millm_repo_find(repo, INDEX);
	if (c->is_bin && !millm_repo_find(repo, BIN_WEIGHTS) && !millm_repo_find(repo, BIN_INDEX))
		return no_weights(repo, err);
	/* "download finished" means "ready": what could not be loaded is refused now */
	if (!millm_repo_find(repo, "tokenizer.json") && !millm_repo_find(repo, "tokenizer.model") &&
		!(millm_repo_find(repo, "vocab.json") && millm_repo_find(repo, "merges.txt")))
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "repository \"%s\" has no tokenizer.json", repo->id);
		millm_detail(err, "It has no tokenizer.model either, nor vocab.json with merges.txt.");
		millm_hint(err, "Choose a repository, or a revision, with a tokenizer.json.");
		return MILLM_E_UNSUPPORTED;
	}
	if ((rc = millm_choose_small_files(repo, c, err)) != MILLM_OK)
		return rc;
	if (!c->is_bin)
		return choose_weights(repo, WEIGHTS, INDEX, read, arg, c, err);
	if ((rc = choose_weights(repo, BIN_WEIGHTS, BIN_INDEX, read, arg, c, err)) != MILLM_OK)
		return rc;
	return name_converted(c, err);
}

void
millm_choice_free(MillmChoice *c)
{
	free(c->files);
	free(c->converted);
}
