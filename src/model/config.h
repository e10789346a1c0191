/*
 * config.h -- what config.c, generation.c and pooling.c offer to the rest of the room, and the file that they read.
 */
#ifndef MILLM_CONFIG_H
#define MILLM_CONFIG_H

#include <jansson.h>

#include "model.h"

/* millm_config_parse() on a parsed file.  On failure *config owns nothing. */
extern MillmCode millm_config_resolve(json_t *json, MillmConfig *config, MillmError *err);
/* Set the eos ids from an int or a list of them, in the named file. */
extern MillmCode millm_config_eos(json_t *value, const char *file, MillmConfig *config, MillmError *err);
/* Resolve generation_config.json, or config.json where there is none (file says which); its eos list replaces config's. */
extern MillmCode millm_generation_resolve(json_t *json, const char *file, MillmGenerationConfig *g, MillmConfig *config, MillmError *err);
/*
 * Read how sentence-transformers would make embeddings of the model in dir.  What cannot be done that way, or cannot be read, is
 * pooling->refused: it keeps nobody from generating text.  The caller owns pooling->prompt.
 */
extern void millm_pooling_open(const char *dir, MillmPooling *pooling);

/* model.c's: parse dir/name, of at most max_bytes; *out is NULL when there is no such file. */
extern MillmCode millm_model_read_json(const char *dir, const char *name, size_t max_bytes, json_t **out, MillmError *err);
#define MILLM_MAX_CONFIG_BYTES	((size_t) 4 << 20)

#endif
