/*
 * job.c -- validate, download, inspect.
 *
 * A download, in order: info and tree at one commit; config.json, so that an architecture we cannot run is refused before any weight
 * moves; the choice of files; room on the disk; the files, small ones first, weights through the sink that gives them their form; the meta
 * file, last.  A directory of this machine goes the same way, read instead of fetched.
 */
#include "job.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "choice.h"
#include "model.h"
#include "quant.h"
#include "recast.h"
#include "screen.h"
#include "store.h"
#include "version.h"

#define MAX_CONFIG_BYTES	(8u << 20)
#define DISK_MARGIN			((int64_t) 64 << 20)
#define REPORT_MS			200
#define COPY_BYTES			((size_t) 4 << 20)	/* of a local file at a time */

static const MillmPatience patient = {.attempts = 3, .timeout_ms = 30000};

/* What validate and the beginning of a download have in common. */
typedef struct Plan
{
	const MillmJobSpec *spec;
	MillmPatience patience;
	MillmHttp  *http;			/* NULL: the source is local */
	MillmRepo  *repo;			/* of a local source: id is the path, commit "" and hashes "" */
	MillmConfig config;
	json_t	   *config_json;
	MillmChoice choice;
	/* the form of the weights */
	const char *quantization;	/* "FP16", "Q8" or "Q4": what they will be */
	const char *prequantized;	/* "nf4", "fp4" or "int8": what they are; NULL: floats */
	MillmRecastTarget target;
	bool		is_f32;			/* most of them; becomes 16-bit */
	bool		is_recast;		/* they change on the way */
	int64_t		disk_bytes;		/* what all files will take, about */
} Plan;

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

static MillmCode
read_small(void *arg, const char *name, size_t max, char **out, size_t *len, MillmError *err)
{
	Plan	   *p = arg;
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

/* The regular files of a directory, as if it were a repository. */
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
		struct stat sb;
		MillmHubFile *f = repo->files;

		if (strlen(e->d_name) > MILLM_HUB_MAX_PATH || fstatat(dirfd(dir), e->d_name, &sb, 0) != 0 || !S_ISREG(sb.st_mode))
			continue;
		if (repo->n_files == MILLM_HUB_MAX_FILES)
			rc = millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "\"%.400s\" has more than %d files", path, MILLM_HUB_MAX_FILES);
		else if (repo->n_files % 64 == 0 && !(f = realloc(repo->files, (repo->n_files + 64) * sizeof(*f))))
			rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		else
		{
			repo->files = f;
			f += repo->n_files++;
			*f = (MillmHubFile) {.size = (int64_t) sb.st_size};
			snprintf(f->path, sizeof(f->path), "%s", e->d_name);
		}
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

/* Push a local file through a sink; fills in its sha256. */
static MillmCode
copy_local(const char *path, MillmHubFile *file, MillmSink *sink, atomic_bool *stop, MillmAdvance advance, void *arg, MillmError *err)
{
	static const char sha256[] = "0000000000000000000000000000000000000000000000000000000000000000";
	struct stat sb;
	int			fd = open_local(path, file->path, &sb);
	char	   *buf = malloc(COPY_BYTES);
	MillmHash	hash;
	int64_t		at;
	MillmCode	rc;

	if (fd < 0 || !buf)
	{
		rc = fd < 0 ? local_error(path, file->path, err) : millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		free(buf);
		if (fd >= 0)
			close(fd);
		return rc;
	}
	millm_hash_begin(&hash, sha256, file->size);
	/* what an earlier attempt left is not known to come from the same bytes */
	if ((rc = sink->begin(sink->arg, file, &hash, &at, stop, err)) == MILLM_OK)
	{
		rc = sink->discard(sink->arg, err);
		millm_hash_begin(&hash, sha256, file->size);
		for (at = 0; rc == MILLM_OK && at < file->size;)
		{
			ssize_t		n = pread(fd, buf, COPY_BYTES, at);

			if (n <= 0)
				rc = n < 0 ? local_error(path, file->path, err) :
					millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "\"%s\" became shorter while it was read", file->path);
			else if (atomic_load(stop))
				rc = millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
			else if ((rc = sink->write(sink->arg, buf, (size_t) n, err)) == MILLM_OK)
			{
				millm_hash_update(&hash, buf, (size_t) n);
				at += n;
				advance(arg, n, true);
			}
		}
		if (rc == MILLM_OK)
			rc = sink->finish(sink->arg, err);
		else
			sink->abandon(sink->arg);
		millm_hash_hex(&hash, file->hash);
	}
	free(buf);
	close(fd);
	return rc;
}

/* --- The plan -------------------------------------------------------------------------------------------- */

/* config.json: is it a model that the engine can run? */
static MillmCode
check_config(Plan *p, MillmError *err)
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

	if (!json_is_object(q))
		return NULL;
	if (json_is_true(json_object_get(q, "load_in_8bit")))
		return "int8";
	return type && strcmp(type, "nf4") == 0 ? "nf4" : "fp4";
}

/* What will the weights be? */
static MillmCode
choose_form(Plan *p, MillmError *err)
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

/* Weights of n_out x n_in in the target's form. */
static int64_t
quantized_bytes(const Plan *p, int64_t n_out, int64_t n_in)
{
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
	int64_t		bytes = 0;
	int			n;

	if (millm_quant_layout(p->target == MILLM_RECAST_Q4 ? MILLM_QUANT_NF4 : MILLM_QUANT_INT8, MILLM_BF16, n_out, n_in, parts, &n, NULL) != MILLM_OK)
		return 0;
	for (int i = 0; i < n; i++)
		bytes += (int64_t) parts[i].bytes;
	return bytes;
}

/* What all files will take: from the sizes that the config states for the Linears, and what the repository's files take for the rest. */
static void
estimate(Plan *p)
{
	const MillmConfig *c = &p->config;
	const int64_t h = c->hidden_size, q = (int64_t) c->n_heads * c->head_dim, kv = (int64_t) c->n_kv_heads * c->head_dim, ffn = c->intermediate_size;
	const int64_t shapes[][2] = {{q, h}, {kv, h}, {kv, h}, {h, q}, {ffn, h}, {h, ffn}, {c->mlp_gated ? ffn : 0, h}};
	int64_t		weights = 0, linear = 0, quantized = 0;

	for (size_t i = 0; i < p->choice.n; i++)
		if (millm_is_weights(p->choice.files[i]))
			weights += p->choice.files[i]->size;
	p->disk_bytes = p->choice.total_bytes - (p->is_f32 ? weights / 2 : 0);
	if (p->target == MILLM_RECAST_16BIT)
		return;
	for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
	{
		linear += shapes[i][0] * shapes[i][1] * 2 * c->n_layers;
		quantized += shapes[i][0] > 0 ? quantized_bytes(p, shapes[i][0], shapes[i][1]) * c->n_layers : 0;
	}
	if (linear < p->disk_bytes)	/* else the config and the files are of different models: the engine will say so */
		p->disk_bytes += quantized - linear + millm_screen_file_bytes(c->vocab_size, h);
}

static MillmCode
make_plan(const MillmJobSpec *spec, MillmPatience patience, int deadline_ms, atomic_bool *stop, Plan *p, MillmError *err)
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
	estimate(p);
	return MILLM_OK;
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
	Plan		p = {0};
	MillmPatience once = {.attempts = 1, .timeout_ms = spec->timeout_ms};
	MillmCode	rc = make_plan(spec, once, spec->timeout_ms, stop, &p, err);

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
check_disk(const MillmStore *store, const Plan *p, MillmError *err)
{
	int64_t		need = p->disk_bytes, available;
	MillmCode	rc;

	for (size_t i = 0; i < p->choice.n; i++)
		need -= millm_store_have(store, p->choice.files[i]);
	if ((rc = millm_store_free_bytes(store, &available, err)) != MILLM_OK)
		return rc;
	if (need <= 0 || need <= available - DISK_MARGIN)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INSUFFICIENT_DISK, "insufficient disk space for \"%s\" as %s", p->repo->id, p->quantization);
	millm_detail(err, "Need %.1f GB in the model cache, only %.1f GB available.", ((double) need + (double) DISK_MARGIN) / 1e9, (double) available / 1e9);
	millm_hint(err, "Free space or point millm.cache_dir at a larger file system.");
	return MILLM_E_INSUFFICIENT_DISK;
}

/* What a file of the store takes; -1 when it is not there. */
static int64_t
bytes_of(const MillmStore *store, const char *name)
{
	struct stat sb;

	return fstatat(millm_store_dir(store), name, &sb, AT_SYMLINK_NOFOLLOW) == 0 ? (int64_t) sb.st_size : -1;
}

/* The last file to be written: whose directory it is, and where all of it comes from. */
static MillmCode
write_meta(MillmStore *store, const Plan *p, int64_t *disk_bytes, MillmError *err)
{
	const MillmJobSpec *spec = p->spec;
	json_t	   *files = json_object(), *meta;
	int64_t		original = 0, now = 0, screen = bytes_of(store, MILLM_SCREEN_FILE);
	char	   *text;
	MillmCode	rc;

	*disk_bytes = screen > 0 ? screen : 0;
	for (size_t i = 0; i < p->choice.n; i++)
	{
		const MillmHubFile *f = p->choice.files[i];
		int64_t		bytes = bytes_of(store, f->path);

		*disk_bytes += bytes > 0 ? bytes : 0;
		if (millm_is_weights(f))
		{
			original += f->size;
			now += bytes;
		}
		json_object_set_new(files, f->path, json_pack("{s:I, s:o, s:o}", "size", (json_int_t) f->size, "hash", maybe_text(f->hash), "bytes", maybe(bytes)));
	}
	meta = json_pack("{s:s, s:s?, s:s?, s:o, s:s, s:s?, s:I, s:s, s:s, s:I, s:I, s:I, s:o}", "millm_version", MILLM_VERSION,
					 "repo_id", p->http ? p->repo->id : NULL, "source_path", spec->source_path, "commit", maybe_text(p->repo->commit),
					 "quantization", p->quantization, "converted_from", p->is_f32 ? "F32" : NULL, "model_id", (json_int_t) spec->model_id,
					 "uuid", spec->model_uuid, "owner_id", spec->owner_id, "bytes", (json_int_t) *disk_bytes,
					 "original_bytes", (json_int_t) original, "quantized_bytes", (json_int_t) now, "files", files);
	text = meta ? json_dumps(meta, JSON_INDENT(1)) : NULL;
	json_decref(meta);
	if (!text)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	rc = millm_store_complete(store, text, strlen(text), err);
	free(text);
	return rc;
}

static MillmCode
fetch_all(Plan *p, MillmStore *store, MillmRecast *recast, Meter *m, atomic_bool *stop, MillmError *err)
{
	const MillmHubFile *weights[MILLM_HUB_MAX_FILES];
	size_t		n_weights = 0;
	MillmCode	rc;

	if ((rc = check_disk(store, p, err)) != MILLM_OK)
		return rc;
	m->progress.stage = "downloading";
	m->progress.total_bytes = p->choice.total_bytes;
	m->window_ms = now_ms();
	for (size_t i = 0; i < p->choice.n; i++)
	{
		const MillmHubFile *f = p->choice.files[i];
		const bool	is_recast = recast && millm_is_weights(f);
		MillmSink  *sink = is_recast ? millm_recast_sink(recast) : millm_store_sink(store);

		m->progress.file = f->path;
		report(m, i == 0);
		if (is_recast)
			weights[n_weights++] = f;
		if (is_recast ? millm_recast_is_done(recast, f) : millm_store_is_proved(store, f, stop))
		{
			advance(m, f->size, false);	/* an earlier attempt's, or another installation's of the same model */
			continue;
		}
		rc = p->http ? millm_hub_fetch(p->http, p->repo, f, sink, advance, m, err)
			: copy_local(p->spec->source_path, &p->repo->files[f - p->repo->files], sink, stop, advance, m, err);
		if (rc != MILLM_OK)
			return rc;
	}
	m->progress.stage = "verifying";
	m->progress.file = "";
	report(m, true);
	return recast ? millm_recast_complete(recast, weights, n_weights, err) : MILLM_OK;
}

MillmCode
millm_job_download(const MillmJobSpec *spec, atomic_bool *stop, atomic_bool *keep, MillmReport report_fn, void *arg, json_t **out, MillmError *err)
{
	Plan		p = {0};
	MillmStore *store = NULL;
	MillmRecast *recast = NULL;
	MillmModel *model = NULL;
	Meter		m = {.report = report_fn, .arg = arg, .progress = {.stage = "resolving", .file = "", .bytes_per_second = -1}};
	int64_t		disk_bytes = 0;
	MillmCode	rc;

	report(&m, true);
	if ((rc = make_plan(spec, patient, 0, stop, &p, err)) == MILLM_OK && (rc = millm_store_open(spec->cache_dir, spec->directory, spec->model_uuid, &store, err)) == MILLM_OK &&
		p.is_recast)
		rc = millm_recast_create(store, p.target, &p.config, p.config_json, &recast, err);
	/* before the meta file says that all is well: does the engine really find its place for every tensor? */
	if (rc == MILLM_OK && (rc = fetch_all(&p, store, recast, &m, stop, err)) == MILLM_OK && (rc = millm_model_open(millm_store_path(store), &model, err)) == MILLM_OK)
		rc = atomic_load(stop) ? millm_fail(err, MILLM_E_CANCELED, "the download was canceled") : write_meta(store, &p, &disk_bytes, err);
	millm_recast_free(recast);
	if (rc == MILLM_OK)
		*out = json_pack("{s:o, s:I, s:s, s:s, s:s, s:I, s:o, s:O, s:s, s:I}", "commit", maybe_text(p.repo->commit), "bytes", (json_int_t) m.fetched,
						 "path", millm_store_path(store), "model_type", p.config.model_type, "architecture", p.config.architecture,
						 "params", (json_int_t) model->n_params, "license", maybe_text(p.repo->license), "config", p.config_json,
						 "quantization", p.quantization, "disk_bytes", (json_int_t) disk_bytes);
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
	*out = json_pack("{s:s, s:s, s:I, s:I, s:s?, s:s, s:o}", "model_type", model->config.model_type, "architecture", model->config.architecture,
					 "params", (json_int_t) model->n_params, "disk_bytes", (json_int_t) model->weights_bytes, "quantization", model->quantization,
					 "dtype", model->dtype, "config", config ? config : json_null());
	millm_model_close(model);
	return MILLM_OK;
}
