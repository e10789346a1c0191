/*
 * plan.h -- what there is to know of a model before its weights move: its files, its config, the form that its weights will have.
 *
 * What validate, preview and the beginning of a download have in common.  Reads of the source only small files: a repository of the Hub,
 * or a directory of this machine as if it were one.
 */
#ifndef MILLM_PLAN_H
#define MILLM_PLAN_H

#include <jansson.h>

#include "choice.h"
#include "job.h"
#include "model.h"
#include "recast.h"

/* What validate and the beginning of a download have in common. */
typedef struct MillmPlan
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
	bool		is_recast;		/* they change on the way, if only from a PyTorch checkpoint to safetensors */
	int64_t		disk_bytes;		/* what all files will take, about */
} MillmPlan;

/*
 * Look at the source of spec, which is borrowed as long as the plan.  *p, zeroed by the caller, is to be freed whatever is returned, and what was
 * found before a failure stays in it.  deadline_ms: of all requests together; 0: none.
 *
 * The errors of millm_repo_open(), millm_choose_files() and, for what a config can show, millm_model_open(); TRUST_REMOTE_CODE_REQUIRED;
 * INVALID_ARGUMENT and UNSUPPORTED for the quantization.
 */
extern MillmCode millm_plan_make(const MillmJobSpec *spec, MillmPatience patience, int deadline_ms, atomic_bool *stop, MillmPlan *p, MillmError *err);
extern void millm_plan_free(MillmPlan *p);

/* Of a plan that was made: the weights as they are published; and what all files will take in the target's form, about. */
extern int64_t millm_plan_weights_bytes(const MillmPlan *p);
extern int64_t millm_plan_disk_bytes(const MillmPlan *p, MillmRecastTarget target);

/*
 * Push an open file of file->size bytes through a sink, from its beginning; hash has begun and goes along.  On MILLM_OK all is written, and the
 * caller has to finish or abandon; after an error the sink is abandoned.  INVALID_LOCAL_PATH when it cannot be read; CANCELED; the sink's errors.
 */
extern MillmCode millm_pour(int fd, const MillmHubFile *file, MillmHash *hash, MillmSink *sink, atomic_bool *stop, bool is_fetched,
							MillmAdvance advance, void *arg, MillmError *err);
/* Open a file of the local directory path for reading.  INVALID_LOCAL_PATH. */
extern MillmCode millm_plan_open_local(const char *path, const char *name, int *fd, MillmError *err);
/* Push a file of the local directory path through a sink; fills in its sha256. */
extern MillmCode millm_plan_copy(const char *path, MillmHubFile *file, MillmSink *sink, atomic_bool *stop, MillmAdvance advance, void *arg, MillmError *err);

#endif
