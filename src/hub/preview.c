/*
 * preview.c -- what a repository holds, told before anything of it is downloaded.
 *
 * Reads the Hub's info and list of files, config.json, a shard index; where the Hub has not counted the parameters, the first bytes of each
 * weight file too.  A repository that this engine cannot run, or whose files the Hub keeps from us, is no error: the answer says so.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "arith.h"
#include "plan.h"
#include "safetensors.h"

#define HEAD_BYTES		((size_t) 128 << 10)	/* most headers are shorter */
#define MAX_HEADERS		64		/* of so many files at most */
#define CONTEXT_LENGTH	8192	/* that a load takes by itself, or the model's maximum, the smaller */
#define MB				((int64_t) 1 << 20)

/* Spellings of config.json, for a config that the engine does not resolve. */
static const char *const hidden_size_keys[] = {"hidden_size", "n_embd", "d_model", NULL};
static const char *const num_layers_keys[] = {"num_hidden_layers", "n_layer", "num_layers", NULL};
static const char *const context_length_keys[] = {"max_position_embeddings", "n_positions", "n_ctx", NULL};

/* What bitsandbytes stores beside a weight is no parameter. */
static bool
is_beside(const char *name)
{
	static const char *const ends[] = {".SCB", ".weight_format"};
	size_t		n = strlen(name);

	for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++)
		if (n > strlen(ends[i]) && strcmp(name + n - strlen(ends[i]), ends[i]) == 0)
			return true;
	return strstr(name, ".weight.") != NULL;
}

/* The parameters of one file, as its header lists them. */
static MillmCode
count_file(const MillmPlan *p, const MillmHubFile *file, int64_t *n_params, MillmError *err)
{
	const bool	is_4bit = p->prequantized && strcmp(p->prequantized, "int8") != 0;
	MillmSafetensors *st = NULL;
	char	   *head = NULL;
	size_t		len = 0;
	uint64_t	claimed;
	MillmCode	rc = millm_repo_read_head(p->http, p->repo, file, HEAD_BYTES, p->patience, &head, &len, err);

	claimed = rc == MILLM_OK && len >= 8 ? millm_get_le64((const unsigned char *) head) : 0;
	if (claimed > len - 8 && claimed <= MILLM_ST_HEADER_MAX)
	{
		free(head);
		head = NULL;
		rc = millm_repo_read_head(p->http, p->repo, file, 8 + (size_t) claimed, p->patience, &head, &len, err);
	}
	if (rc == MILLM_OK)
		rc = millm_st_parse_head(head, len >= 8 && claimed < len - 8 ? 8 + (size_t) claimed : len, (uint64_t) file->size, file->path, &st, err);
	for (size_t i = 0; rc == MILLM_OK && i < millm_st_n_tensors(st); i++)
	{
		const MillmStTensor *t = millm_st_tensor(st, i);
		/* two codes a byte */
		const int64_t n = (int64_t) (t->bytes / (uint64_t) millm_dtype_bytes(t->dtype)) * (is_4bit && t->dtype == MILLM_U8 ? 2 : 1);

		*n_params += is_beside(t->name) ? 0 : n;	/* what lies in a file of an int64's size does not overflow it */
	}
	millm_st_close(st);
	free(head);
	return rc;
}

/* How many parameters; -1 not known.  The Hub's count is that of its default branch, and counts packed codes as they lie. */
static MillmCode
count_params(const MillmPlan *p, int64_t *out, MillmError *err)
{
	int64_t		n_params = 0;
	int			n_files = 0;
	MillmCode	rc = MILLM_OK;

	*out = -1;
	if (p->repo->params >= 0 && strcmp(p->spec->revision, "main") == 0 && !p->prequantized)
	{
		*out = p->repo->params;
		return MILLM_OK;
	}
	for (size_t i = 0; i < p->choice.n; i++)
		n_files += millm_is_weights(p->choice.files[i]);
	if (n_files > MAX_HEADERS || p->choice.is_bin)	/* a PyTorch checkpoint has no header */
		return MILLM_OK;
	for (size_t i = 0; rc == MILLM_OK && i < p->choice.n; i++)
		if (millm_is_weights(p->choice.files[i]))
			rc = count_file(p, p->choice.files[i], &n_params, err);
	if (rc == MILLM_OK)
		*out = n_params;
	return rc;
}

/* --- The answer ----------------------------------------------------------------------------------------- */

static json_t *
text_or_null(const char *s)
{
	return s && s[0] ? json_string(s) : json_null();
}

/* "135M", "2.5B", as millm.models shows it. */
static json_t *
shown_params(int64_t n)
{
	char		text[32];

	if (n < 0)
		return json_null();
	if (n >= 999500000)
		snprintf(text, sizeof(text), "%.1fB", (double) n / 1e9);
	else if (n >= 999500)
		snprintf(text, sizeof(text), "%.0fM", (double) n / 1e6);
	else if (n >= 1000)
		snprintf(text, sizeof(text), "%.0fK", (double) n / 1e3);
	else
		snprintf(text, sizeof(text), "%lld", (long long) n);
	return json_string(text);
}

/* A number of config.json: as the engine resolved it (0: it has not), else as it is written. */
static json_t *
config_number(const json_t *config, int resolved, const char *const *keys)
{
	if (resolved > 0)
		return json_integer(resolved);
	for (; *keys; keys++)
	{
		json_t	   *v = json_object_get(config, *keys);

		if (json_is_integer(v) && json_integer_value(v) > 0)
			return json_integer(json_integer_value(v));
	}
	return json_null();
}

/* What the model takes in one form.  Memory: its weights, which are mapped as they lie, and the KV cache of one whole context. */
static json_t *
size_in(const MillmPlan *p, MillmRecastTarget target)
{
	const MillmConfig *c = &p->config;
	const int64_t context = c->max_positions < CONTEXT_LENGTH ? c->max_positions : CONTEXT_LENGTH;
	/* keys and values, of 16 bits: beyond what limits of model.h allow nothing gets here */
	const int64_t kv = context * c->n_layers * c->n_kv_heads * c->head_dim * 2 * 2;
	const int64_t disk = millm_plan_disk_bytes(p, target), memory = disk - (p->choice.total_bytes - millm_plan_weights_bytes(p)) + kv;

	return json_pack("{s:I, s:I}", "disk_mb", (json_int_t) ((disk + MB - 1) / MB), "memory_mb", (json_int_t) ((memory + MB - 1) / MB));
}

/* Q4, Q8 and FP16; null for what it cannot become. */
static json_t *
sizes(const MillmPlan *p)
{
	static const struct
	{
		const char *name;
		MillmRecastTarget target;
	}			forms[] = {{"Q4", MILLM_RECAST_Q4}, {"Q8", MILLM_RECAST_Q8}, {"FP16", MILLM_RECAST_16BIT}};
	json_t	   *out = json_object();

	for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++)
		json_object_set_new(out, forms[i].name, p->config.has_fused_experts && forms[i].target != MILLM_RECAST_16BIT ? json_null() : !p->prequantized ? size_in(p, forms[i].target) :
							strcmp(p->quantization, forms[i].name) == 0 ? size_in(p, MILLM_RECAST_16BIT) : json_null());
	return out;
}

static bool
wants_code(const json_t *config)
{
	const json_t *auto_map = json_object_get(config, "auto_map");

	return auto_map && !json_is_null(auto_map);
}

MillmCode
millm_job_preview(const MillmJobSpec *asked, atomic_bool *stop, json_t **out, MillmError *err)
{
	const MillmPatience patience = {.attempts = 3, .timeout_ms = asked->timeout_ms};
	MillmJobSpec spec = *asked;
	MillmPlan	p = {0};
	MillmError	why = {0};
	MillmCode	rc;
	const char *model_type, *architecture, *slash;
	int64_t		n_params = -1;
	json_t	   *supported;

	/* what it would need is part of the answer; as published: the other forms are computed from that */
	spec.trust_remote_code = true;
	spec.quantization = "FP16";
	rc = millm_plan_make(&spec, patience, spec.timeout_ms, stop, &p, &why);
	if (rc == MILLM_OK)
		rc = count_params(&p, &n_params, &why);
	else if (p.repo)
		n_params = p.repo->params;
	if (p.repo && (rc == MILLM_OK || rc == MILLM_E_UNSUPPORTED_ARCHITECTURE || rc == MILLM_E_UNSUPPORTED || rc == MILLM_E_INVALID_MODEL_FILE ||
				   rc == MILLM_E_MODEL_DOWNLOAD_FAILED))
		supported = json_boolean(rc == MILLM_OK);
	else if (p.repo && rc == MILLM_E_GATED_MODEL_NO_TOKEN)
		supported = p.repo->model_type[0] && !millm_arch_find(p.repo->model_type, 0) ? json_false() : json_null();
	else
	{
		*err = why;
		millm_plan_free(&p);
		return rc;
	}
	slash = strchr(p.repo->id, '/');
	model_type = json_string_value(json_object_get(p.config_json, "model_type"));
	architecture = json_string_value(json_array_get(json_object_get(p.config_json, "architectures"), 0));
	*out = json_pack("{s:s, s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
					 "name", slash ? slash + 1 : p.repo->id, "repo_id", p.repo->id, "commit", p.repo->commit,
					 "params", shown_params(n_params), "params_count", n_params >= 0 ? json_integer(n_params) : json_null(),
					 "architecture", text_or_null(architecture ? architecture : p.repo->architecture),
					 "model_type", text_or_null(model_type ? model_type : p.repo->model_type),
					 "hidden_size", config_number(p.config_json, rc == MILLM_OK ? p.config.hidden_size : 0, hidden_size_keys),
					 "num_layers", config_number(p.config_json, rc == MILLM_OK ? p.config.n_layers : 0, num_layers_keys),
					 "context_length", config_number(p.config_json, rc == MILLM_OK ? p.config.max_positions : 0, context_length_keys),
					 "license", text_or_null(p.repo->license),
					 "requires_trust_remote_code", p.config_json ? json_boolean(wants_code(p.config_json)) : json_null(),
					 "is_gated", p.repo->gated, "quantization", text_or_null(p.prequantized),
					 "supported", supported, "reason", text_or_null(why.message), "detail", text_or_null(why.detail), "hint", text_or_null(why.hint),
					 "download_mb", rc == MILLM_OK ? json_integer((p.choice.total_bytes + MB - 1) / MB) : json_null(),
					 "estimated_sizes", rc == MILLM_OK ? sizes(&p) : json_null());
	millm_plan_free(&p);
	return *out ? MILLM_OK : millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}
