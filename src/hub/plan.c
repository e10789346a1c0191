/*
 * plan.c -- see plan.h.
 */
#include "plan.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "quant.h"
#include "screen.h"

#define MAX_CONFIG_BYTES	(8u << 20)
#define COPY_BYTES			((size_t) 4 << 20)	/* of a local file at a time */

/* --- Where files come from ---------------------------------------------------------------------------- */

static MillmCode
local_error(const char *path, const char *name, MillmError *err)
{
	millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "could not read \"%.300s/%.200s\": %s", path, name, strerror(errno));
	return MILLM_E_INVALID_LOCAL_PATH;
}

static int
open_local(const char *path, const char *name, struct stat *sb)
{
	int			dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int			fd = dir < 0 ? -1 : openat(dir, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);	/* a FIFO must not hang us */

	if (dir >= 0)
		close(dir);
	if (fd >= 0 && (fstat(fd, sb) != 0 || !S_ISREG(sb->st_mode)))
	{
		close(fd);
		errno = EINVAL;
		return -1;
	}
	return fd;
}

MillmCode
millm_plan_open_local(const char *path, const char *name, int *fd, MillmError *err)
{
	struct stat sb;

	return (*fd = open_local(path, name, &sb)) < 0 ? local_error(path, name, err) : MILLM_OK;
}

static MillmCode
read_small(void *arg, const char *name, size_t max, char **out, size_t *len, MillmError *err)
{
	MillmPlan  *p = arg;
	struct stat sb;
	ssize_t		n;
	int			fd;

	if (p->http)
		return millm_repo_read(p->http, p->repo, name, max, p->patience, out, len, err);
	if ((fd = open_local(p->spec->source_path, name, &sb)) < 0)
		return local_error(p->spec->source_path, name, err);
	*out = (uint64_t) sb.st_size <= max ? malloc((size_t) sb.st_size + 1) : NULL;
	n = *out ? pread(fd, *out, (size_t) sb.st_size, 0) : -1;
	close(fd);
	if (n < 0)
	{
		free(*out);
		return millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "could not read \"%.300s/%.200s\", of at most %zu bytes", p->spec->source_path, name, max);
	}
	(*out)[n] = '\0';
	*len = (size_t) n;
	return MILLM_OK;
}

static int
by_path(const void *a, const void *b)
{
	return strcmp(((const MillmHubFile *) a)->path, ((const MillmHubFile *) b)->path);
}

/* Add the file of that path below fd if it is a regular one; false: there is no room for it. */
static bool
add_local(int fd, const char *path, MillmRepo *repo)
{
	MillmHubFile *f = repo->files;
	struct stat sb;

	if (strlen(path) > MILLM_HUB_MAX_PATH || fstatat(fd, path, &sb, 0) != 0 || !S_ISREG(sb.st_mode))
		return true;
	if (repo->n_files == MILLM_HUB_MAX_FILES || (repo->n_files % 64 == 0 && !(f = realloc(f, (repo->n_files + 64) * sizeof(*f)))))
		return false;
	repo->files = f;
	f += repo->n_files++;
	*f = (MillmHubFile) {.size = (int64_t) sb.st_size};
	snprintf(f->path, sizeof(f->path), "%s", path);
	return true;
}

/* The regular files of a directory, and the configs of modules in those below it, as if it were a repository. */
static MillmCode
list_local(const char *path, MillmRepo **out, MillmError *err)
{
	DIR		   *dir = path[0] == '/' ? opendir(path) : NULL;
	MillmRepo  *repo = calloc(1, sizeof(*repo));
	struct dirent *e;
	MillmCode	rc = repo ? MILLM_OK : millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");

	if (rc == MILLM_OK && !dir)
	{
		rc = millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "\"%.400s\" is not a directory that millm can open", path);
		millm_hint(err, "Give the absolute path of an existing directory with config.json, the weights and tokenizer.json.");
	}
	while (rc == MILLM_OK && (e = readdir(dir)))
	{
		char		config[NAME_MAX + sizeof("/config.json")];

		snprintf(config, sizeof(config), "%s/config.json", e->d_name);
		if (add_local(dirfd(dir), e->d_name, repo) && (e->d_name[0] == '.' || add_local(dirfd(dir), config, repo)))
			continue;
		rc = repo->n_files == MILLM_HUB_MAX_FILES ?
			millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "\"%.400s\" has more than %d files", path, MILLM_HUB_MAX_FILES) :
			millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	if (dir)
		closedir(dir);
	if (rc != MILLM_OK)
	{
		millm_repo_free(repo);
		return rc;
	}
	snprintf(repo->id, sizeof(repo->id), "%s", path);
	repo->params = -1;
	qsort(repo->files, repo->n_files, sizeof(*repo->files), by_path);
	*out = repo;
	return MILLM_OK;
}

MillmCode
millm_pour(int fd, const MillmHubFile *file, MillmHash *hash, MillmSink *sink, atomic_bool *stop, bool is_fetched, MillmAdvance advance, void *arg,
		   MillmError *err)
{
	const MillmHash fresh = *hash;
	char	   *buf = malloc(COPY_BYTES);
	int64_t		at = 0;
	MillmCode	rc;

	if (!buf)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	if ((rc = sink->begin(sink->arg, file, hash, &at, stop, err)) != MILLM_OK)
	{
		free(buf);
		return rc;
	}
	/* what an earlier attempt left is not known to come from the same bytes */
	rc = sink->discard(sink->arg, err);
	*hash = fresh;
	for (at = 0; rc == MILLM_OK && at < file->size;)
	{
		ssize_t		n = pread(fd, buf, COPY_BYTES, at);

		if (n < 0)
			rc = millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "could not read \"%s\": %s", file->path, strerror(errno));
		else if (n == 0)
			rc = millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "\"%s\" became shorter while it was read", file->path);
		else if (atomic_load(stop))
			rc = millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
		else if ((rc = sink->write(sink->arg, buf, (size_t) n, err)) == MILLM_OK)
		{
			millm_hash_update(hash, buf, (size_t) n);
			at += n;
			advance(arg, n, is_fetched);
		}
	}
	if (rc != MILLM_OK)
	{
		advance(arg, -at, is_fetched);
		sink->abandon(sink->arg);
	}
	free(buf);
	return rc;
}

MillmCode
millm_plan_copy(const char *path, MillmHubFile *file, MillmSink *sink, atomic_bool *stop, MillmAdvance advance, void *arg, MillmError *err)
{
	static const char sha256[] = "0000000000000000000000000000000000000000000000000000000000000000";
	struct stat sb;
	int			fd = open_local(path, file->path, &sb);
	MillmHash	hash;
	MillmCode	rc;

	if (fd < 0)
		return local_error(path, file->path, err);
	millm_hash_begin(&hash, sha256, file->size);
	if ((rc = millm_pour(fd, file, &hash, sink, stop, true, advance, arg, err)) == MILLM_OK)
	{
		if ((rc = sink->finish(sink->arg, err)) != MILLM_OK)
			sink->abandon(sink->arg);
		/* the sink knew the file without a hash, to its end: its header has no room for one */
		millm_hash_hex(&hash, file->hash);
	}
	close(fd);
	return rc;
}

/* --- The plan -------------------------------------------------------------------------------------------- */

/* config.json: is it a model that the engine can run? */
static MillmCode
check_config(MillmPlan *p, MillmError *err)
{
	char	   *text = NULL;
	size_t		len = 0;
	json_t	   *auto_map;
	MillmCode	rc;

	if (!millm_repo_find(p->repo, "config.json"))
	{
		millm_fail(err, p->http ? MILLM_E_MODEL_DOWNLOAD_FAILED : MILLM_E_INVALID_LOCAL_PATH, "%s \"%s\" has no config.json", p->http ? "repository" : "directory", p->repo->id);
		if (millm_repo_find(p->repo, "adapter_config.json"))
			millm_detail(err, "It holds an adapter (LoRA), not a whole model.");
		else
			millm_detail(err, "It does not hold a model in the HuggingFace format.");
		return p->http ? MILLM_E_MODEL_DOWNLOAD_FAILED : MILLM_E_INVALID_LOCAL_PATH;
	}
	if ((rc = read_small(p, "config.json", MAX_CONFIG_BYTES, &text, &len, err)) != MILLM_OK)
		return rc;
	p->config_json = json_loadb(text, len, 0, NULL);
	auto_map = json_object_get(p->config_json, "auto_map");
	if (p->http && auto_map && !json_is_null(auto_map) && !p->spec->trust_remote_code)
	{
		rc = millm_fail(err, MILLM_E_TRUST_REMOTE_CODE_REQUIRED, "repository \"%s\" wants to run code of its own", p->repo->id);
		millm_detail(err, "Its config.json has an auto_map. millm never runs a repository's code; it can load the model if its own engine knows the architecture.");
		millm_hint(err, "Say trust_remote_code => true to try.");
	}
	else
		rc = millm_config_parse(text, len, &p->config, err);
	free(text);
	return rc;
}

/* How bitsandbytes says that it quantized a checkpoint; NULL: it did not. */
static const char *
prequantized(const json_t *config)
{
	const json_t *q = json_object_get(config, "quantization_config");
	const char *type = json_string_value(json_object_get(q, "bnb_4bit_quant_type"));

	if (!json_is_object(q) || json_string_value(json_object_get(q, "quant_method")) == NULL ||
		strcmp(json_string_value(json_object_get(q, "quant_method")), "bitsandbytes") != 0)
		return NULL;
	if (json_is_true(json_object_get(q, "load_in_8bit")))
		return "int8";
	return type && strcmp(type, "nf4") == 0 ? "nf4" : "fp4";
}

/* What will the weights be? */
static MillmCode
choose_form(MillmPlan *p, MillmError *err)
{
	const MillmDtype dtype = millm_config_dtype(p->config_json);
	const char *published;

	p->quantization = p->spec->quantization;
	if (!millm_recast_target(p->quantization, &p->target))
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "there is no quantization \"%.40s\"", p->quantization);
		millm_hint(err, "There are \"Q4\", \"Q8\" and \"FP16\".");
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (p->config.has_fused_experts && p->target != MILLM_RECAST_16BIT)
	{
		millm_fail(err, MILLM_E_UNSUPPORTED, "models of type \"%s\" cannot be quantized to %s", p->config.model_type, p->quantization);
		millm_detail(err, "Their experts are not Linears: neither bitsandbytes nor transformers would read them. They are published in MXFP4, which has 4 bits.");
		millm_hint(err, "Use quantization => 'FP16', which leaves them as they are published.");
		return MILLM_E_UNSUPPORTED;
	}
	p->prequantized = prequantized(p->config_json);
	if (p->prequantized)
	{
		published = strcmp(p->prequantized, "int8") == 0 ? "Q8" : "Q4";
		if (p->target != MILLM_RECAST_16BIT && strcmp(published, p->quantization) != 0)
		{
			millm_fail(err, MILLM_E_UNSUPPORTED, "\"%s\" cannot be quantized to %s", p->repo->id, p->quantization);
			millm_detail(err, "Its weights are quantized already (%s, which is %s).", p->prequantized, published);
			millm_hint(err, "Use quantization => '%s', or the repository that holds the 16-bit weights.", published);
			return MILLM_E_UNSUPPORTED;
		}
		p->quantization = published;
		p->target = MILLM_RECAST_16BIT;
		return MILLM_OK;
	}
	p->is_f32 = p->repo->params > 0 ? p->repo->f32_params > p->repo->params / 2 : dtype == MILLM_F32;
	p->is_recast = p->target != MILLM_RECAST_16BIT || p->is_f32;
	return MILLM_OK;
}

int64_t
millm_plan_weights_bytes(const MillmPlan *p)
{
	int64_t		bytes = 0;

	for (size_t i = 0; i < p->choice.n; i++)
		if (millm_is_weights(p->choice.files[i]))
			bytes += p->choice.files[i]->size;
	return bytes;
}

/* Weights of n_out x n_in in the target's form. */
static int64_t
quantized_bytes(MillmRecastTarget target, int64_t n_out, int64_t n_in)
{
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
	int64_t		bytes = 0;
	int			n;

	if (millm_quant_layout(target == MILLM_RECAST_Q4 ? MILLM_QUANT_NF4 : MILLM_QUANT_INT8, MILLM_BF16, n_out, n_in, parts, &n, NULL) != MILLM_OK)
		return 0;
	for (int i = 0; i < n; i++)
		bytes += (int64_t) parts[i].bytes;
	return bytes;
}

static int
count_mixtures(const MillmConfig *c)
{
	int			n = 0;

	for (int l = 0; l < c->n_layers; l++)
		n += c->is_mixture[l];
	return n;
}

/* From the sizes that the config states for the Linears, and what the repository's files take for the rest. */
int64_t
millm_plan_disk_bytes(const MillmPlan *p, MillmRecastTarget target)
{
	const MillmConfig *c = &p->config;
	const int64_t h = c->hidden_size, q = (int64_t) c->n_heads * c->head_dim, kv = (int64_t) c->n_kv_heads * c->head_dim, ffn = c->intermediate_size;
	const int64_t n_all = c->n_layers, n_mixtures = count_mixtures(c), n_mlps = n_all - n_mixtures;
	const int64_t n_experts = n_mixtures * c->n_experts, size = c->expert_size, shared = c->shared_expert_size;
	const struct
	{
		int64_t		n, n_out, n_in;
	}			linears[] = {
		{n_all, q, h}, {2 * n_all, kv, h}, {n_all, h, q}, {n_mlps * (c->mlp_gated ? 2 : 1), ffn, h}, {n_mlps, h, ffn},
		{2 * n_experts, size, h}, {n_experts, h, size}, {2 * n_mixtures, shared, h}, {n_mixtures, h, shared},
	};
	const int64_t screen = millm_config_can_screen(c) ? millm_screen_file_bytes(c->vocab_size, c->embedding_size) : 0;
	int64_t		bytes = p->choice.total_bytes - (p->is_f32 ? millm_plan_weights_bytes(p) / 2 : 0), linear = 0, quantized = 0;

	bytes += screen > 0 ? screen : 0;
	if (target == MILLM_RECAST_16BIT || c->has_fused_experts)
		return bytes;
	for (size_t i = 0; i < sizeof(linears) / sizeof(linears[0]); i++)
		if (linears[i].n * linears[i].n_out * linears[i].n_in > 0)
		{
			linear += linears[i].n * linears[i].n_out * linears[i].n_in * 2;
			quantized += linears[i].n * quantized_bytes(target, linears[i].n_out, linears[i].n_in);
		}
	if (linear < bytes)			/* else the config and the files are of different models: the engine will say so */
		bytes += quantized - linear;
	return bytes;
}

MillmCode
millm_plan_make(const MillmJobSpec *spec, MillmPatience patience, int deadline_ms, atomic_bool *stop, MillmPlan *p, MillmError *err)
{
	MillmCode	rc;

	p->spec = spec;
	p->patience = patience;
	if (spec->source_path)
		rc = list_local(spec->source_path, &p->repo, err);
	else if ((rc = millm_repo_id_check(spec->repo_id, err)) == MILLM_OK && (rc = millm_http_open(spec->endpoint, spec->token, stop, &p->http, err)) == MILLM_OK)
	{
		if (deadline_ms > 0)
			millm_http_set_deadline(p->http, deadline_ms);
		rc = millm_repo_open(p->http, spec->repo_id, spec->revision, patience, &p->repo, err);
	}
	if (rc != MILLM_OK || (rc = check_config(p, err)) != MILLM_OK || (rc = choose_form(p, err)) != MILLM_OK ||
		(rc = millm_choose_files(p->repo, read_small, p, &p->choice, err)) != MILLM_OK)
		return rc;
	p->is_recast = p->is_recast || p->choice.is_bin;
	p->disk_bytes = millm_plan_disk_bytes(p, p->target);
	return MILLM_OK;
}

void
millm_plan_free(MillmPlan *p)
{
	millm_choice_free(&p->choice);
	json_decref(p->config_json);
	millm_config_free(&p->config);
	millm_repo_free(p->repo);
	millm_http_close(p->http);
}
