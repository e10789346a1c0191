/*
 * job.h -- what millm-hub does for its callers: look at a repository, download one, quantize one of this machine, look at a directory.
 *
 * Here the rooms meet: the Hub's files (hub.h), what they mean to the engine (model.h), and the cache on disk (store.h).
 */
#ifndef MILLM_JOB_H
#define MILLM_JOB_H

#include <jansson.h>

#include "hub.h"

/* What is asked for.  Strings are the caller's, until the call returns. */
typedef struct MillmJobSpec
{
	const char *source_path;	/* absolute: a directory of this machine; the next four then do not count */
	const char *endpoint;
	const char *repo_id;
	const char *revision;
	const char *token;			/* NULL: none */
	const char *quantization;	/* "FP16", "Q8" or "Q4" */
	bool		trust_remote_code;
	int			timeout_ms;		/* validate, preview: of all requests together */
	/* download only */
	int			n_connections;	/* of a large file: 1 to MILLM_HUB_MAX_CONNECTIONS */
	const char *cache_dir;
	const char *directory;
	const char *model_uuid;
	const char *owner_id;
	const char *cluster;		/* names the server in the directory; NULL: none */
	const char *hf_cache_dir;	/* the user's HuggingFace cache; NULL: none */
	int64_t		model_id;
} MillmJobSpec;

typedef struct MillmProgress
{
	const char *stage;			/* "resolving", "downloading", "converting" (a PyTorch checkpoint), "verifying" */
	const char *file;			/* "" */
	int64_t		bytes, total_bytes;	/* total_bytes 0: not known yet */
	double		bytes_per_second;	/* < 0: not measured yet */
} MillmProgress;

/* Called at most 5 times a second, and at each change of stage. */
typedef void (*MillmReport) (void *arg, const MillmProgress *progress);

/*
 * Can this repository be downloaded and run?  Writes nothing.  *out is the RESULT of protocol.md.  Network trouble and timeouts
 * are HUB_UNAVAILABLE: the caller may queue the download all the same.
 */
extern MillmCode millm_job_validate(const MillmJobSpec *spec, atomic_bool *stop, json_t **out, MillmError *err);

/*
 * What is in this repository, whether the engine can run it, and what it would take; of spec only the endpoint, repo_id, revision, token and
 * timeout_ms count.  Writes nothing and reads no weights.  *out is the RESULT of protocol.md.
 */
extern MillmCode millm_job_preview(const MillmJobSpec *spec, atomic_bool *stop, json_t **out, MillmError *err);

/*
 * Bring a repository to the cache, its weights in the form that quantization says.  When it fails or is stopped, everything that it wrote is removed, unless *keep is true by then: then
 * whole files and partials stay for the next attempt.  So does what an earlier attempt left when there is no way in for this one (GATED_MODEL_NO_TOKEN from the start).
 */
extern MillmCode millm_job_download(const MillmJobSpec *spec, atomic_bool *stop, atomic_bool *keep, MillmReport report, void *arg,
									json_t **out, MillmError *err);

/* A directory that is already there.  INVALID_LOCAL_PATH when it is none, or lacks files; else the errors of millm_model_open(). */
extern MillmCode millm_job_inspect(const char *path, json_t **out, MillmError *err);

#endif
