/*
 * choice.c -- see choice.h.
 *
 * The rule for weights is transformers' (hub-protocol.md 5.1): model.safetensors, else the index and exactly the files that it names.
 * Everything else is chosen by name from the repository's root; what is not named here is not needed and not fetched.
 */
#include "choice.h"

#include <fnmatch.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define MAX_INDEX_BYTES	(64u << 20)
#define WEIGHTS			"model.safetensors"
#define INDEX			"model.safetensors.index.json"

static const char *const wanted[] = {
	"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.*.json", "special_tokens_map.json",
	"added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
	"LICENSE*", "README.md",
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
	millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" has no safetensors weights", repo->id);
	if (millm_repo_find(repo, "pytorch_model.bin") || millm_repo_find(repo, "pytorch_model.bin.index.json"))
		millm_detail(err, "Its weights are PyTorch pickles, which this version does not read.");
	else
		millm_detail(err, "It has neither " WEIGHTS " nor an " INDEX " that names files.");
	millm_hint(err, "Choose a repository, or a revision, with safetensors.");
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

MillmCode
millm_choose_small_files(const MillmRepo *repo, MillmChoice *c, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		for (size_t j = 0; rc == MILLM_OK && j < repo->n_files; j++)
			if (!strchr(repo->files[j].path, '/') && fnmatch(wanted[i], repo->files[j].path, FNM_PERIOD) == 0)
				rc = choose(c, &repo->files[j], err);
	return rc;
}

MillmCode
millm_choose_shards(const MillmRepo *repo, const char *text, size_t len, MillmChoice *c, MillmError *err)
{
	json_t	   *index = json_loadb(text, len, 0, NULL), *value;
	bool	   *is_named = calloc(repo->n_files + 1, sizeof(*is_named)), has_any = false;
	const char *tensor;
	MillmCode	rc = is_named ? MILLM_OK : millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");

	if (rc == MILLM_OK)
		json_object_foreach(json_object_get(index, "weight_map"), tensor, value)
		{
			const char *name = json_string_value(value);
			const MillmHubFile *f = name && !strchr(name, '/') ? millm_repo_find(repo, name) : NULL;

			if (!f)
			{
				rc = millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, INDEX " names a file that repository \"%s\" does not have", repo->id);
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
	size_t		n = strlen(file->path), k = strlen(".safetensors");

	return n > k && strcmp(file->path + n - k, ".safetensors") == 0;
}

MillmCode
millm_choose_files(const MillmRepo *repo, MillmReadSmall read, void *arg, MillmChoice *c, MillmError *err)
{
	const MillmHubFile *whole = millm_repo_find(repo, WEIGHTS), *index = millm_repo_find(repo, INDEX);
	char	   *text;
	size_t		len;
	MillmCode	rc;

	if (!whole && !index)
		return no_weights(repo, err);
	/* "download finished" means "ready": what could not be loaded is refused now */
	if (!millm_repo_find(repo, "tokenizer.json"))
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "repository \"%s\" has no tokenizer.json", repo->id);
		millm_detail(err, "This version of millm reads no other form of tokenizer.");
		millm_hint(err, "Choose a repository, or a revision, with a tokenizer.json.");
		return MILLM_E_UNSUPPORTED;
	}
	if ((rc = millm_choose_small_files(repo, c, err)) != MILLM_OK)
		return rc;
	if (whole)
		return choose(c, whole, err);
	if ((rc = choose(c, index, err)) != MILLM_OK || (rc = read(arg, INDEX, MAX_INDEX_BYTES, &text, &len, err)) != MILLM_OK)
		return rc;
	rc = millm_choose_shards(repo, text, len, c, err);
	free(text);
	return rc;
}

void
millm_choice_free(MillmChoice *c)
{
	free(c->files);
}
