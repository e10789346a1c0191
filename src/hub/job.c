/*
 * job.c -- validate, download, inspect.
 *
 * A download, in order: info and tree at one commit; config.json, so that an architecture we cannot run is refused before any weight
 * moves; the choice of files; room on the disk; the files, small ones first; the meta file, last.
 */
#include "job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "choice.h"
#include "model.h"
#include "store.h"
#include "version.h"

#define MAX_CONFIG_BYTES	(8u << 20)
#define DISK_MARGIN			((int64_t) 64 << 20)
#define REPORT_MS			200

static const MillmPatience patient = {.attempts = 3, .timeout_ms = 30000};

/* Refuse by name what this version does not write. */
static MillmCode
check_quantization(const char *quantization, MillmError *err)
{
	if (strcmp(quantization, "FP16") == 0)
		return MILLM_OK;
	millm_fail(err, MILLM_E_UNSUPPORTED, "quantization \"%.40s\" is not supported yet", quantization);
	millm_hint(err, "Use quantization => 'FP16', which keeps the published 16-bit weights; Q4 and Q8 come with a later version.");
	return MILLM_E_UNSUPPORTED;
}

/* config.json: is it a model that the engine can run? */
static MillmCode
check_config(MillmHttp *http, const MillmRepo *repo, const MillmJobSpec *spec, MillmPatience patience, MillmConfig *config, json_t **json, MillmError *err)
{
	char	   *text = NULL;
	size_t		len = 0;
	json_t	   *auto_map;
	MillmCode	rc;

	if (!millm_repo_find(repo, "config.json"))
	{
		millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" has no config.json", repo->id);
		if (millm_repo_find(repo, "adapter_config.json"))
			millm_detail(err, "It holds an adapter (LoRA), not a whole model.");
		else
			millm_detail(err, "It does not hold a model in the HuggingFace format.");
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	if ((rc = millm_repo_read(http, repo, "config.json", MAX_CONFIG_BYTES, patience, &text, &len, err)) != MILLM_OK)
		return rc;
	*json = json_loadb(text, len, 0, NULL);
	auto_map = json_object_get(*json, "auto_map");
	if (auto_map && !json_is_null(auto_map) && !spec->trust_remote_code)
	{
		rc = millm_fail(err, MILLM_E_TRUST_REMOTE_CODE_REQUIRED, "repository \"%s\" wants to run code of its own", repo->id);
		millm_detail(err, "Its config.json has an auto_map. millm never runs a repository's code; it can load the model if its own engine knows the architecture.");
		millm_hint(err, "Say trust_remote_code => true to try.");
	}
	else
		rc = millm_config_parse(text, len, config, err);
	free(text);
	if (rc != MILLM_OK)
	{
		json_decref(*json);
		*json = NULL;
	}
	return rc;
}

static json_t *
maybe(int64_t n)
{
	return n >= 0 ? json_integer(n) : json_null();
}

static json_t *
maybe_text(const char *s)
{
	return s[0] ? json_string(s) : json_null();
}

/* What validate and the beginning of a download have in common. */
typedef struct Plan
{
	MillmHttp  *http;
	MillmRepo  *repo;
	MillmConfig config;
	json_t	   *config_json;
	MillmChoice choice;
} Plan;

static MillmCode
make_plan(const MillmJobSpec *spec, MillmPatience patience, int deadline_ms, atomic_bool *stop, Plan *p, MillmError *err)
{
	MillmCode	rc;

	if ((rc = check_quantization(spec->quantization, err)) != MILLM_OK || (rc = millm_repo_id_check(spec->repo_id, err)) != MILLM_OK ||
		(rc = millm_http_open(spec->endpoint, spec->token, stop, &p->http, err)) != MILLM_OK)
		return rc;
	if (deadline_ms > 0)
		millm_http_set_deadline(p->http, deadline_ms);
	if ((rc = millm_repo_open(p->http, spec->repo_id, spec->revision, patience, &p->repo, err)) != MILLM_OK ||
		(rc = check_config(p->http, p->repo, spec, patience, &p->config, &p->config_json, err)) != MILLM_OK)
		return rc;
	return millm_choose_files(p->http, p->repo, patience, &p->choice, err);
}

static void
free_plan(Plan *p)
{
	millm_choice_free(&p->choice);
	json_decref(p->config_json);
	millm_config_free(&p->config);
	millm_repo_free(p->repo);
	millm_http_close(p->http);
}

MillmCode
millm_job_validate(const MillmJobSpec *spec, atomic_bool *stop, json_t **out, MillmError *err)
{
	Plan		p = {0};
	MillmPatience once = {.attempts = 1, .timeout_ms = spec->timeout_ms};
	MillmCode	rc = make_plan(spec, once, spec->timeout_ms, stop, &p, err);

	if (rc == MILLM_OK)
		*out = json_pack("{s:s, s:s, s:I, s:I, s:o, s:s, s:s, s:o, s:b}", "repo_id", p.repo->id, "commit", p.repo->commit,
						 "total_bytes", (json_int_t) p.choice.total_bytes, "n_files", (json_int_t) p.choice.n, "params", maybe(p.repo->params),
						 "model_type", p.config.model_type, "architecture", p.config.architecture, "license", maybe_text(p.repo->license), "gated", p.repo->gated);
	free_plan(&p);
	return rc;
}

/* --- Progress ------------------------------------------------------------------------------------- */

typedef struct Meter
{
	MillmReport report;
	void	   *arg;
	MillmProgress progress;		/* as last reported: its bytes never go back */
	int64_t		bytes;			/* as it is: what was wrong is taken back */
	int64_t		last_ms;
	int64_t		window_ms, window_bytes;	/* where the speed's measurement began */
	int64_t		fetched;		/* bytes that came over the network */
} Meter;

static int64_t
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void
report(Meter *m, bool now)
{
	int64_t		t = now_ms();

	if (!now && t - m->last_ms < REPORT_MS)
		return;
	if (t - m->window_ms >= 1000)
	{
		double		speed = (double) (m->fetched - m->window_bytes) * 1000 / (double) (t - m->window_ms);

		m->progress.bytes_per_second = m->progress.bytes_per_second < 0 ? speed : 0.5 * m->progress.bytes_per_second + 0.5 * speed;
		m->window_ms = t;
		m->window_bytes = m->fetched;
	}
	if (m->bytes > m->progress.bytes)
		m->progress.bytes = m->bytes;
	m->last_ms = t;
	m->report(m->arg, &m->progress);
}

static void
advance(void *arg, int64_t delta, bool is_fetched)
{
	Meter	   *m = arg;

	m->bytes += delta;
	if (is_fetched)
		m->fetched += delta;
	m->progress.stage = is_fetched ? "downloading" : "verifying";
	report(m, false);
}

/* --- Download --------------------------------------------------------------------------------------- */

static MillmCode
check_disk(const MillmStore *store, const MillmChoice *c, const MillmRepo *repo, MillmError *err)
{
	int64_t		need = 0, available;
	MillmCode	rc;

	for (size_t i = 0; i < c->n; i++)
		need += c->files[i]->size - millm_store_have(store, c->files[i]);
	if ((rc = millm_store_free_bytes(store, &available, err)) != MILLM_OK)
		return rc;
	if (need == 0 || need <= available - DISK_MARGIN)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INSUFFICIENT_DISK, "insufficient disk space for \"%s\" as FP16", repo->id);
	millm_detail(err, "Need %.1f GB in the model cache, only %.1f GB available.", ((double) need + (double) DISK_MARGIN) / 1e9, (double) available / 1e9);
	millm_hint(err, "Free space or point millm.cache_dir at a larger file system.");
	return MILLM_E_INSUFFICIENT_DISK;
}

static MillmCode
write_meta(MillmStore *store, const MillmJobSpec *spec, const Plan *p, MillmError *err)
{
	json_t	   *files = json_object(), *meta;
	char	   *text;
	MillmCode	rc;

	for (size_t i = 0; i < p->choice.n; i++)
		json_object_set_new(files, p->choice.files[i]->path,
							json_pack("{s:I, s:o}", "size", (json_int_t) p->choice.files[i]->size, "hash", maybe_text(p->choice.files[i]->hash)));
	meta = json_pack("{s:s, s:s, s:s, s:s, s:I, s:s, s:s, s:I, s:o}", "millm_version", MILLM_VERSION, "repo_id", p->repo->id, "commit", p->repo->commit,
					 "quantization", spec->quantization, "model_id", (json_int_t) spec->model_id, "uuid", spec->model_uuid, "owner_id", spec->owner_id,
					 "bytes", (json_int_t) p->choice.total_bytes, "files", files);
	text = meta ? json_dumps(meta, JSON_INDENT(1)) : NULL;
	json_decref(meta);
	if (!text)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	rc = millm_store_complete(store, text, strlen(text), err);
	free(text);
	return rc;
}

static MillmCode
fetch_all(Plan *p, MillmStore *store, Meter *m, atomic_bool *stop, MillmError *err)
{
	MillmCode	rc;

	if ((rc = check_disk(store, &p->choice, p->repo, err)) != MILLM_OK)
		return rc;
	m->progress.stage = "downloading";
	m->progress.total_bytes = p->choice.total_bytes;
	m->window_ms = now_ms();
	for (size_t i = 0; i < p->choice.n; i++)
	{
		const MillmHubFile *f = p->choice.files[i];

		m->progress.file = f->path;
		report(m, i == 0);
		if (millm_store_is_proved(store, f, stop))
		{
			advance(m, f->size, false);	/* an earlier attempt's, or another installation's of the same model */
			continue;
		}
		if ((rc = millm_hub_fetch(p->http, p->repo, f, millm_store_sink(store), advance, m, err)) != MILLM_OK)
			return rc;
	}
	m->progress.stage = "verifying";
	m->progress.file = "";
	report(m, true);
	return MILLM_OK;
}

MillmCode
millm_job_download(const MillmJobSpec *spec, atomic_bool *stop, atomic_bool *keep, MillmReport report_fn, void *arg, json_t **out, MillmError *err)
{
	Plan		p = {0};
	MillmStore *store = NULL;
	MillmModel *model = NULL;
	Meter		m = {.report = report_fn, .arg = arg, .progress = {.stage = "resolving", .file = "", .bytes_per_second = -1}};
	MillmCode	rc;

	report(&m, true);
	/* before the meta file says that all is well: does the engine really find its place for every tensor? */
	if ((rc = make_plan(spec, patient, 0, stop, &p, err)) == MILLM_OK && (rc = millm_store_open(spec->cache_dir, spec->directory, spec->model_uuid, &store, err)) == MILLM_OK &&
		(rc = fetch_all(&p, store, &m, stop, err)) == MILLM_OK && (rc = millm_model_open(millm_store_path(store), &model, err)) == MILLM_OK)
		rc = atomic_load(stop) ? millm_fail(err, MILLM_E_CANCELED, "the download was canceled") : write_meta(store, spec, &p, err);
	if (rc == MILLM_OK)
		*out = json_pack("{s:s, s:I, s:s, s:s, s:s, s:I, s:o, s:O, s:I}", "commit", p.repo->commit, "bytes", (json_int_t) m.fetched,
						 "path", millm_store_path(store), "model_type", p.config.model_type, "architecture", p.config.architecture,
						 "params", (json_int_t) model->n_params, "license", maybe_text(p.repo->license), "config", p.config_json,
						 "disk_bytes", (json_int_t) p.choice.total_bytes);
	else if (store && !atomic_load(keep))
		millm_store_remove(store, p.choice.files, p.choice.n);
	else if (!atomic_load(keep))
		millm_store_remove_unfinished(spec->cache_dir, spec->directory, spec->model_uuid);
	/* here HUB_UNAVAILABLE would mean the helper, not the network */
	if (rc == MILLM_E_HUB_UNAVAILABLE)
		err->code = rc = MILLM_E_MODEL_DOWNLOAD_FAILED;
	millm_model_close(model);
	millm_store_close(store);
	free_plan(&p);
	return rc;
}

MillmCode
millm_job_inspect(const char *path, json_t **out, MillmError *err)
{
	MillmModel *model = NULL;
	json_t	   *config;
	char		file[4096];
	struct stat st;
	MillmCode	rc;

	if (path[0] != '/' || (size_t) snprintf(file, sizeof(file), "%s/config.json", path) >= sizeof(file) || stat(path, &st) != 0 || !S_ISDIR(st.st_mode))
	{
		millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "\"%.400s\" is not a directory that millm can open", path);
		millm_hint(err, "Give the absolute path of an existing directory with config.json, the weights and tokenizer.json.");
		return MILLM_E_INVALID_LOCAL_PATH;
	}
	if ((rc = millm_model_open(path, &model, err)) != MILLM_OK)
		return rc == MILLM_E_MODEL_FILES_MISSING ? (err->code = MILLM_E_INVALID_LOCAL_PATH) : rc;
	config = json_load_file(file, 0, NULL);
	*out = json_pack("{s:s, s:s, s:I, s:I, s:o}", "model_type", model->config.model_type, "architecture", model->config.architecture,
					 "params", (json_int_t) model->n_params, "disk_bytes", (json_int_t) model->weights_bytes, "config", config ? config : json_null());
	millm_model_close(model);
	return MILLM_OK;
}
