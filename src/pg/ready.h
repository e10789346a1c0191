/*
 * ready.h -- a ready model before it is loaded: where its files are, and what a load of it would take.
 */
#ifndef MILLM_READY_H
#define MILLM_READY_H

#include "registry.h"

/*
 * The directory of a model that is ready, palloc'd.  MODEL_NOT_READY for one that is not, or not committed yet; MODEL_FILES_MISSING when
 * nothing lies there: after a restore, or on a standby to which the cache did not travel.
 */
extern char *millm_model_directory(const MillmModel *m);

/* Whether nothing lies where the files of this row, which is ready, should be. */
extern bool millm_model_is_missing(const MillmModel *m);

typedef struct MillmEstimate
{
	char	   *quantization;	/* that was reckoned with */
	int			context_length;
	int64		weights_bytes;
	int64		kv_bytes;
	int64		workspace_bytes;
	int64		fp16_weights_bytes;
	int64		available_bytes;	/* < 0: not known */
} MillmEstimate;

/*
 * Ask the engine.  quantization NULL: the model's own; context_length 0: the setting's.  must_fit: INSUFFICIENT_MEMORY, with figures and
 * what would fit.  Otherwise only what prevents any load: ENGINE_UNAVAILABLE, INVALID_ARGUMENT, the errors of damaged files.
 */
extern void millm_estimate_load(const char *directory, const char *quantization, int context_length, bool must_fit, MillmEstimate *plan);

#endif
