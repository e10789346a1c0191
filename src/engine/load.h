/*
 * load.h -- from a directory to a loaded model.  Internal to the engine.
 */
#ifndef MILLM_LOAD_H
#define MILLM_LOAD_H

#include "engine.h"
#include "forward.h"

/* Told how far the load is, by stages that are MillmLoadSink's; false: stop, CANCELED. */
typedef struct LoadProgress
{
	bool		(*report) (void *arg, const char *stage, int percent);
	void	   *arg;
} LoadProgress;

/*
 * Open the model and its tokenizer, decide and reserve memory.  On MILLM_OK the caller owns *out (one reference,
 * millm_loaded_release()) and *fw, which must be freed first.
 */
extern MillmCode load_model(const MillmLoadOptions *options, const LoadProgress *progress, const MillmLoaded **out, MillmForward **fw, MillmError *err);

/* millm_engine_plan(), when what is loaded now (NULL: nothing) gives its memory back before the load. */
extern MillmCode plan_load(const MillmLoadOptions *options, const char *quantization, bool must_fit, const MillmLoaded *now,
						   MillmLoadPlan *out, MillmError *err);

#endif
