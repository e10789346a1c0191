/*
 * recast.h -- the sink that changes the form of weights while their bytes arrive: F32 to 16 bits, NF4, LLM.int8.
 *
 * A raw safetensors file goes in, an ordinary safetensors file comes out; the full-precision copy never exists, neither on disk nor, but for
 * the tensor in work, in memory.  One MillmRecast serves all weight files of a repository, one after the other.
 */
#ifndef MILLM_RECAST_H
#define MILLM_RECAST_H

#include <jansson.h>

#include "hub.h"
#include "model.h"
#include "store.h"

typedef enum MillmRecastTarget {MILLM_RECAST_16BIT, MILLM_RECAST_Q8, MILLM_RECAST_Q4} MillmRecastTarget;

typedef struct MillmRecast MillmRecast;

/* The dtype that a config.json states, F32 (transformers' default) when it states none. */
extern MillmDtype millm_config_dtype(const json_t *config);

/* By the canonical names "FP16", "Q8" and "Q4"; false: there is no such target. */
extern bool millm_recast_target(const char *quantization, MillmRecastTarget *out);

/*
 * F32 becomes the dtype of config_json if that has 16 bits, else BF16.  config is config_json, resolved.  Both and the store are borrowed.
 */
extern MillmCode millm_recast_create(MillmStore *store, MillmRecastTarget target, const MillmConfig *config, const json_t *config_json,
									 MillmRecast **out, MillmError *err);
extern void millm_recast_free(MillmRecast *r);	/* NULL is fine */

/* Has any of the files so far been F32? */
extern bool millm_recast_has_converted(const MillmRecast *r);

/*
 * The sink of one weight file after the other.  Besides the errors of a disk: INVALID_MODEL_FILE for a damaged header, for NaN and infinity in
 * what is converted or quantized, for what overflows F16 on the way to INT8, naming the tensor.
 */
extern MillmSink *millm_recast_sink(MillmRecast *r);

/* Has an earlier attempt finished this file, in this form?  Files that are must not go through the sink again. */
extern bool millm_recast_is_done(MillmRecast *r, const MillmHubFile *file);

/*
 * All weight files are there: write config.json as transformers would for what they now are, and the index of a sharded model.  files[n] are
 * the weight files.
 */
extern MillmCode millm_recast_complete(MillmRecast *r, const MillmHubFile *const *files, size_t n, MillmError *err);

#endif
