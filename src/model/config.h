/*
 * config.h -- what config.c and generation.c offer to the rest of the room.
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

#endif
