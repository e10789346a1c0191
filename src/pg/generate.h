/*
 * generate.h -- the arguments that generate() has in common with its forms for many prompts.
 */
#ifndef MILLM_GENERATE_H
#define MILLM_GENERATE_H

#include "postgres.h"

#include "fmgr.h"

/* Arguments that several functions have in a row, counted from the first of them. */
enum
{
	OPT_MAX_TOKENS, OPT_TEMPERATURE, OPT_TOP_P, OPT_TOP_K, OPT_MIN_P, OPT_REPETITION_PENALTY, OPT_FREQUENCY_PENALTY, OPT_PRESENCE_PENALTY,
	OPT_SEED, OPT_STOP, OPT_MODEL, N_OPTIONS
};

/* The arguments of generate, generate_stream and, with their own first and last ones, generate(text[]) and generate_rows, in the order of the SQL script. */
enum
{
	ARG_PROMPT, ARG_SYSTEM, ARG_RAW, ARG_OPTIONS, ARG_PARSE_SPECIAL = ARG_OPTIONS + N_OPTIONS, N_GENERATE_ARGS
};

/*
 * The fields of a generate REQUEST that follow the prompt's, ",\"raw\":false,..." without the closing brace: those of the call's arguments from
 * ARG_SYSTEM on that are given.  ereports what is refused before the engine is asked: an invalid argument, a model that is not loaded.  palloc'd.
 */
extern char *millm_generate_options(FunctionCallInfo fcinfo, bool stream);

#endif
