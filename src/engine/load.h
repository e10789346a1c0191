/*
 * load.h -- from a directory to a loaded model.  Internal to the engine.
 */
#ifndef MILLM_LOAD_H
#define MILLM_LOAD_H

#include "engine.h"
#include "forward.h"

/*
 * Open the model and its tokenizer, decide and reserve memory.  On MILLM_OK the caller owns *out (one reference,
 * millm_loaded_release()) and *fw, which must be freed first.  progress may be NULL; false: stop, CANCELED.
 */
extern MillmCode load_model(const MillmLoadOptions *options, bool (*progress) (void *arg, int percent), void *arg,
							const MillmLoaded **out, MillmForward **fw, MillmError *err);

/* millm_engine_plan(), when what is loaded now (NULL: nothing) gives its memory back before the load. */
extern MillmCode plan_load(const MillmLoadOptions *options, const char *quantization, bool must_fit, const MillmLoaded *now,
						   MillmLoadPlan *out, MillmError *err);

#endif
