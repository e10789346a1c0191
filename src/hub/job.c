/*
 * job.c -- validate, download, inspect.
 *
 * A download, in order: info and tree at one commit; config.json, so that an architecture we cannot run is refused before any weight
 * moves; the choice of files; room on the disk; the files, small ones first, weights through the sink that gives them their form, or the one that
 * makes the screening copy of a head that keeps its own; that copy, where it could not be made so; the meta file, last.  A PyTorch checkpoint, whose directory is at its end, is fetched whole, converted through that sink, and removed.  A directory of this machine goes the same way, read instead of fetched.
 */
#include "job.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "convert.h"
#include "head_copy.h"
#include "head_tap.h"
#include "hfcache.h"
#include "plan.h"
#include "screen.h"
#include "serve.h"
#include "store.h"
#include "version.h"

#define DISK_MARGIN			((int64_t) 64 << 20)
#define REPORT_MS			200
#define SPEED_MS			1000	/* that a speed is measured over; the first one sooner */
#define FIRST_SPEED_MS		250

static const MillmPatience patient = {.attempts = 3, .timeout_ms = 30000, .outage_ms = MILLM_OUTAGE_MS};

static json_t *
maybe(int64_t n)
{
	return n >= 0 ? json_integer(n) : json_null();
}

static json_t *
maybe_text(const char *s)
{
	return s && s[0] ? json_string(s) : json_null();
}

MillmCode
millm_job_validate(const MillmJobSpec *spec, atomic_bool *stop, json_t **out, MillmError *err)
{
	MillmPlan	p = {0};
	MillmPatience once = {.attempts = 1, .timeout_ms = spec->timeout_ms};
	MillmCode	rc = millm_plan_make(spec, once, spec->timeout_ms, stop, &p, err);

	if (rc == MILLM_OK)
	{
		*out = json_pack("{s:o, s:I, s:I, s:o, s:s, s:s, s:o, s:b, s:s, s:I, s:s?, s:s?, s:s?}", "commit", maybe_text(p.repo->commit),
						 "total_bytes", (json_int_t) p.choice.total_bytes, "n_files", (json_int_t) p.choice.n, "params", maybe(p.repo->params),
						 "model_type", p.config.model_type, "architecture", p.config.architecture, "license", maybe_text(p.repo->license), "gated", p.repo->gated,
						 "quantization", p.quantization, "disk_bytes", (json_int_t) p.disk_bytes, "prequantized", p.prequantized,
						 "converted_from", p.is_f32 ? "F32" : NULL,
						 "converted_to", !p.is_f32 ? NULL : millm_config_dtype(p.config_json) == MILLM_F16 ? "F16" : "BF16");
		if (*out && p.http)
			json_object_set_new(*out, "repo_id", json_string(p.repo->id));
	}
	millm_plan_free(&p);
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

static void
report(Meter *m, bool now)
{
	int64_t		t = millm_now_ms();

	if (!now && t - m->last_ms < REPORT_MS)
		return;
	if (m->fetched == 0)
		m->window_ms = t;
	if (t - m->window_ms >= (m->progress.bytes_per_second < 0 ? FIRST_SPEED_MS : SPEED_MS))
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

/* What a file of the store takes; -1 when it is not there. */
static int64_t
bytes_of(const MillmStore *store, const char *name)
{
	struct stat sb;

	return fstatat(millm_store_dir(store), name, &sb, AT_SYMLINK_NOFOLLOW) == 0 ? (int64_t) sb.st_size : -1;
}

static MillmCode
check_disk(const MillmStore *store, const MillmPlan *p, MillmError *err)
{
	int64_t		need = p->disk_bytes, largest = 0, available;
	MillmCode	rc;

	for (size_t i = 0; i < p->choice.n; i++)
	{
		const MillmHubFile *f = p->choice.files[i], *stored = millm_choice_stored(&p->choice, i);
		int64_t		converted = stored != f ? bytes_of(store, stored->path) : -1;

		need -= millm_store_have(store, f) + (converted > 0 ? converted : 0);
		/* a checkpoint is here beside what it becomes, one at a time */
		if (p->http && stored != f && converted < 0 && f->size > largest)
			largest = f->size;
	}
	need += largest;
	if ((rc = millm_store_free_bytes(store, &available, err)) != MILLM_OK)
		return rc;
	if (need <= 0 || need <= available - DISK_MARGIN)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INSUFFICIENT_DISK, "insufficient disk space for \"%s\" as %s", p->repo->id, p->quantization);
	millm_detail(err, "Need %.1f GB in the model cache, only %.1f GB available.", ((double) need + (double) DISK_MARGIN) / 1e9, (double) available / 1e9);
	millm_hint(err, "Free space or point millm.cache_dir at a larger file system.");
	return MILLM_E_INSUFFICIENT_DISK;
}

/* The last file to be written: whose directory it is, and where all of it comes from. */
static MillmCode
write_meta(MillmStore *store, const MillmPlan *p, int64_t *disk_bytes, MillmError *err)
{
	const MillmJobSpec *spec = p->spec;
	json_t	   *files = json_object(), *meta;
	int64_t		original = 0, now = 0, screen = bytes_of(store, MILLM_SCREEN_FILE);
	char	   *text;
	MillmCode	rc;

	*disk_bytes = screen > 0 ? screen : 0;
	for (size_t i = 0; i < p->choice.n; i++)
	{
		const MillmHubFile *f = p->choice.files[i], *stored = millm_choice_stored(&p->choice, i);
		int64_t		bytes = bytes_of(store, stored->path);
		json_t	   *file;

		*disk_bytes += bytes > 0 ? bytes : 0;
		if (millm_is_weights(f))
		{
			original += f->size;
			now += bytes;
		}
		file = json_pack("{s:I, s:o, s:o}", "size", (json_int_t) f->size, "hash", maybe_text(f->hash), "bytes", maybe(bytes));
		if (stored != f)
			json_object_set_new(file, "stored_as", json_string(stored->path));
		json_object_set_new(files, f->path, file);
	}
	meta = json_pack("{s:s, s:s?, s:s?, s:o, s:s, s:s?, s:I, s:s, s:s, s:s?, s:I, s:I, s:I, s:o}", "millm_version", MILLM_VERSION,
					 "repo_id", p->http ? p->repo->id : NULL, "source_path", spec->source_path, "commit", maybe_text(p->repo->commit),
					 "quantization", p->quantization, "converted_from", p->is_f32 ? "F32" : NULL, "model_id", (json_int_t) spec->model_id,
					 "uuid", spec->model_uuid, "owner_id", spec->owner_id, "cluster", spec->cluster, "bytes", (json_int_t) *disk_bytes,
					 "original_bytes", (json_int_t) original, "quantized_bytes", (json_int_t) now, "files", files);
	text = meta ? json_dumps(meta, JSON_INDENT(1)) : NULL;
	json_decref(meta);
	if (!text)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	rc = millm_store_complete(store, text, strlen(text), err);
	free(text);
	return rc;
}

/* Does the open file have the content of the list? */
static bool
has_content(int fd, const MillmHubFile *file, atomic_bool *stop)
{
	char		hex[MILLM_HASH_HEX];

	return millm_store_hash(fd, file, stop, hex) && strcmp(hex, file->hash) == 0;
}

/* Push the open file through the sink.  *taken false: it could not be read, or has changed meanwhile; the sink is as if nothing had been. */
static MillmCode
pour_cached(int fd, const MillmHubFile *f, MillmSink *sink, Meter *m, atomic_bool *stop, bool *taken, MillmError *err)
{
	MillmHash	hash;
	char		hex[MILLM_HASH_HEX];
	MillmCode	rc;

	*taken = false;
	millm_hash_begin(&hash, f->hash, f->size);
	if ((rc = millm_pour(fd, f, &hash, sink, stop, false, advance, m, err)) != MILLM_OK)
		return rc == MILLM_E_INVALID_LOCAL_PATH ? MILLM_OK : rc;
	millm_hash_hex(&hash, hex);
	*taken = strcmp(hex, f->hash) == 0;
	if (!*taken)
		advance(m, -f->size, false);
	rc = *taken ? sink->finish(sink->arg, err) : sink->discard(sink->arg, err);
	if (!*taken || rc != MILLM_OK)
		sink->abandon(sink->arg);
	return rc;
}

/* Take the file from the user's HuggingFace cache: link it, or push it through the sink.  *taken false: it is not there, or is another one. */
static MillmCode
take_cached(const MillmPlan *p, const MillmHubFile *f, MillmStore *store, bool is_plain, MillmSink *sink, Meter *m, atomic_bool *stop, bool *taken,
			MillmError *err)
{
	const char *cache = p->spec->hf_cache_dir;
	int			fd = cache ? millm_hfcache_open(cache, p->repo->id, p->repo->commit, f) : -1;
	MillmCode	rc = MILLM_OK;

	*taken = false;
	if (fd < 0 && cache)
		fd = millm_hfcache_open(cache, p->spec->repo_id, p->repo->commit, f);	/* a renamed one lies under the name that was typed */
	if (fd < 0)
		return MILLM_OK;
	/* first of all: what is not of this file must not get into the sink */
	if (has_content(fd, f, stop))
	{
		*taken = is_plain && millm_store_link(store, fd, f);
		if (*taken)
			advance(m, f->size, false);
		else
			rc = pour_cached(fd, f, sink, m, stop, taken, err);
	}
	close(fd);
	if (*taken && rc == MILLM_OK)
		millm_log("LOG", "\"%s\" of \"%s\" is taken from \"%s\"", f->path, p->repo->id, cache);
	else if (rc == MILLM_OK && !atomic_load(stop))
		millm_log("WARNING", "\"%s\" of \"%s\" is damaged in \"%s\", so it is downloaded", f->path, p->repo->id, cache);
	return rc;
}

/* Bring one file into the sink, which keeps it as it is when is_plain: from this machine if it is here, else from the Hub. */
static MillmCode
bring(MillmPlan *p, const MillmHubFile *f, MillmStore *store, bool is_plain, MillmSink *sink, Meter *m, atomic_bool *stop, MillmError *err)
{
	bool		taken;
	MillmCode	rc;

	if (!p->http)
		return millm_plan_copy(p->spec->source_path, &p->repo->files[f - p->repo->files], sink, stop, advance, m, err);
	rc = take_cached(p, f, store, is_plain, sink, m, stop, &taken, err);
	return rc != MILLM_OK || taken ? rc : millm_hub_fetch(p->http, p->repo, f, p->spec->n_connections, sink, advance, m, err);
}

/* How far a conversion is: of a local checkpoint that is all there is to be seen, one of the Hub has come already. */
typedef struct Conversion
{
	Meter	   *meter;
	int64_t		begin, size;	/* size 0: nothing advances */
} Conversion;

static void
converted(void *arg, int64_t bytes, int64_t total)
{
	Conversion *c = arg;
	int64_t		to = c->begin + (int64_t) ((double) bytes / (double) total * (double) c->size);

	c->meter->fetched += to - c->meter->bytes;
	c->meter->bytes = to;
	report(c->meter, false);
}

/* Bring PyTorch checkpoint i of the plan, as safetensors. */
static MillmCode
fetch_bin(MillmPlan *p, size_t i, MillmStore *store, MillmRecast *recast, Meter *m, atomic_bool *stop, MillmError *err)
{
	const MillmHubFile *f = p->choice.files[i];
	Conversion	c = {.meter = m, .size = p->http ? 0 : f->size};
	MillmCode	rc = MILLM_OK;
	int			fd;

	if (millm_recast_is_done(recast, &p->choice.converted[i]))
		advance(m, f->size, false);
	else
	{
		if (p->http && millm_store_is_proved(store, f, stop))
			advance(m, f->size, false);
		else if (p->http && (rc = bring(p, f, store, true, millm_store_sink(store), m, stop, err)) != MILLM_OK)
			return rc;
		if (!p->http)
			rc = millm_plan_open_local(p->spec->source_path, f->path, &fd, err);
		else if ((fd = openat(millm_store_dir(store), f->path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC)) < 0)
			rc = millm_store_error(err, "open", f->path);
		if (rc != MILLM_OK)
			return rc;
		m->progress.stage = "converting";
		report(m, true);
		c.begin = m->bytes;
		rc = millm_convert(fd, f->path, &p->config, &p->choice.converted[i], millm_recast_sink(recast), stop, converted, &c, err);
		close(fd);
	}
	/* what is refused would be refused again */
	if (p->http && (rc == MILLM_OK || rc == MILLM_E_INVALID_MODEL_FILE || rc == MILLM_E_UNSUPPORTED))
		(void) unlinkat(millm_store_dir(store), f->path, 0);
	return rc;
}

/* The weights go through recast, or, where they keep their form and it is NULL, through tap. */
static MillmCode
fetch_all(MillmPlan *p, MillmStore *store, MillmRecast *recast, MillmHeadTap *tap, Meter *m, atomic_bool *stop, MillmError *err)
{
	const MillmHubFile *weights[MILLM_HUB_MAX_FILES];
	size_t		n_weights = 0;
	MillmCode	rc;

	if ((rc = check_disk(store, p, err)) != MILLM_OK)
		return rc;
	m->progress.stage = "downloading";
	m->progress.total_bytes = p->choice.total_bytes;
	m->window_ms = millm_now_ms();
	for (size_t i = 0; i < p->choice.n; i++)
	{
		const MillmHubFile *f = p->choice.files[i];
		const bool	is_recast = recast && millm_is_weights(f);
		MillmSink  *sink = is_recast ? millm_recast_sink(recast) : millm_is_weights(f) ? millm_head_tap_sink(tap) : millm_store_sink(store);

		m->progress.file = f->path;
		report(m, i == 0);
		if (is_recast)
			weights[n_weights++] = millm_choice_stored(&p->choice, i);
		if (is_recast && p->choice.is_bin)
		{
			if ((rc = fetch_bin(p, i, store, recast, m, stop, err)) != MILLM_OK)
				return rc;
			continue;
		}
		if (is_recast ? millm_recast_is_done(recast, f) : millm_store_is_proved(store, f, stop))
		{
			advance(m, f->size, false);	/* an earlier attempt's, or another installation's of the same model */
			continue;
		}
		if ((rc = bring(p, f, store, !is_recast, sink, m, stop, err)) != MILLM_OK)
			return rc;
	}
	m->progress.stage = "verifying";
	m->progress.file = "";
	report(m, true);
	/* of a checkpoint's dtypes nobody told before */
	if (p->choice.is_bin)
		p->is_f32 = millm_recast_has_converted(recast);
	return recast ? millm_recast_complete(recast, weights, n_weights, err) : MILLM_OK;
}

/* After a failure: what came, and what it became. */
static void
remove_files(MillmStore *store, const MillmChoice *c)
{
	const MillmHubFile *all[2 * MILLM_HUB_MAX_FILES];
	size_t		n = 0;

	for (size_t i = 0; i < c->n; i++)
	{
		const MillmHubFile *stored = millm_choice_stored(c, i);

		all[n++] = c->files[i];
		if (stored != c->files[i])
			all[n++] = stored;
	}
	millm_store_remove(store, all, n);
}

MillmCode
millm_job_download(const MillmJobSpec *spec, atomic_bool *stop, atomic_bool *keep, MillmReport report_fn, void *arg, json_t **out, MillmError *err)
{
	MillmPlan	p = {0};
	MillmStore *store = NULL;
	MillmRecast *recast = NULL;
	MillmHeadTap *tap = NULL;
	MillmModel *model = NULL;
	Meter		m = {.report = report_fn, .arg = arg, .progress = {.stage = "resolving", .file = "", .bytes_per_second = -1}};
	int64_t		disk_bytes = 0;
	MillmCode	rc;

	report(&m, true);
	if ((rc = millm_plan_make(spec, patient, 0, stop, &p, err)) == MILLM_OK && (rc = millm_store_open(spec->cache_dir, spec->directory, spec->model_uuid, spec->owner_id, spec->cluster, &store, err)) == MILLM_OK)
		rc = p.is_recast ? millm_recast_create(store, p.target, &p.config, p.config_json, &recast, err) :
			millm_head_tap_create(store, &p.config, millm_store_sink(store), &tap, err);
	/* before the meta file says that all is well: does the engine really find its place for every tensor? */
	if (rc == MILLM_OK && (rc = fetch_all(&p, store, recast, tap, &m, stop, err)) == MILLM_OK && (rc = millm_model_open(millm_store_path(store), &model, err)) == MILLM_OK)
		rc = millm_head_copy_make(store, model, stop, err);
	if (rc == MILLM_OK)
		rc = atomic_load(stop) ? millm_fail(err, MILLM_E_CANCELED, "the download was canceled") : write_meta(store, &p, &disk_bytes, err);
	millm_recast_free(recast);
	millm_head_tap_free(tap);
	if (rc == MILLM_OK)
		*out = json_pack("{s:o, s:I, s:s, s:s, s:s, s:I, s:o, s:O, s:s, s:I}", "commit", maybe_text(p.repo->commit), "bytes", (json_int_t) m.fetched,
						 "path", millm_store_path(store), "model_type", p.config.model_type, "architecture", p.config.architecture,
						 "params", (json_int_t) model->n_params, "license", maybe_text(p.repo->license), "config", p.config_json,
						 "quantization", p.quantization, "disk_bytes", (json_int_t) disk_bytes);
	else if (store && !atomic_load(keep))
		remove_files(store, &p.choice);
	/* what came with a token that a restart of the server has wiped stays for a retry with that token */
	else if (!atomic_load(keep) && rc != MILLM_E_GATED_MODEL_NO_TOKEN)
		millm_store_remove_unfinished(spec->cache_dir, spec->directory, spec->model_uuid);
	/* here HUB_UNAVAILABLE would mean the helper, not the network */
	if (rc == MILLM_E_HUB_UNAVAILABLE)
		err->code = rc = MILLM_E_MODEL_DOWNLOAD_FAILED;
	millm_model_close(model);
	millm_store_close(store);
	millm_plan_free(&p);
	return rc;
}

/* Is a file of that name in the directory? */
static bool
has_file(const char *path, const char *name)
{
	char		file[4096];

	return (size_t) snprintf(file, sizeof(file), "%s/%s", path, name) < sizeof(file) && access(file, F_OK) == 0;
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
	rc = millm_model_open(path, &model, err);
	if (rc == MILLM_E_MODEL_FILES_MISSING && has_file(path, "config.json") && (has_file(path, "pytorch_model.bin") || has_file(path, "pytorch_model.bin.index.json")))
	{
		millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "the weights in \"%.300s\" are a PyTorch checkpoint, which cannot be used where it lies", path);
		millm_detail(err, "The engine reads safetensors files; a checkpoint becomes one when it is downloaded or quantized.");
		millm_hint(err, "Register it as Q4 or Q8, or convert it first: millm-hub quantize DIR --quantization FP16 --output DIR2.");
		return MILLM_E_INVALID_LOCAL_PATH;
	}
	if (rc != MILLM_OK)
		return rc == MILLM_E_MODEL_FILES_MISSING ? (err->code = MILLM_E_INVALID_LOCAL_PATH) : rc;
	config = json_load_file(file, 0, NULL);
	*out = json_pack("{s:s, s:s, s:I, s:I, s:s?, s:s, s:o}", "model_type", model->config.model_type, "architecture", model->config.architecture,
					 "params", (json_int_t) model->n_params, "disk_bytes", (json_int_t) model->weights_bytes, "quantization", model->quantization,
					 "dtype", model->dtype, "config", config ? config : json_null());
	millm_model_close(model);
	return MILLM_OK;
}
