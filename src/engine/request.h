/*
 * request.h -- what a caller may ask of one generation, and what becomes of what he left open.
 */
#ifndef MILLM_REQUEST_H
#define MILLM_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "logprobs.h"
#include "model.h"
#include "sampler.h"
#include "stop.h"

#define MILLM_DEFAULT_MAX_TOKENS	256
#define MILLM_MAX_TEMPERATURE		100.0
#define MILLM_MIN_TEMPERATURE		1e-5	/* between it and 0 a division would overflow: refused */
#define MILLM_MAX_TOP_K				MILLM_MAX_VOCAB
#define MILLM_MAX_CHOICES			128
#define MILLM_MAX_LOGIT_BIASES		300
#define MILLM_MAX_LOGIT_BIAS		100.0

/* As asked: NAN or -1 where the caller said nothing. */
typedef struct MillmGenerateOptions
{
	int64_t		max_tokens;
	double		temperature;
	int64_t		top_k;
	double		top_p;
	double		min_p;
	double		repetition_penalty;
	double		frequency_penalty;
	double		presence_penalty;
	bool		has_seed;
	int64_t		seed;
	int64_t		n;				/* choices: answers to the one prompt; 1 unless asked */
	bool		logprobs;
	int64_t		top_logprobs;	/* -1 where the caller said nothing; else needs logprobs */
	MillmLogitBias logit_bias[MILLM_MAX_LOGIT_BIASES];
	int			n_logit_bias;
	const char *stops[MILLM_MAX_STOPS];	/* borrowed */
	int			n_stops;
} MillmGenerateOptions;

extern void millm_generate_options_init(MillmGenerateOptions *options);

/* INVALID_ARGUMENT naming the option that is out of its range, with the range. */
extern MillmCode millm_generate_options_check(const MillmGenerateOptions *options, MillmError *err);

/*
 * Fill *out: the call, then generation_config.json, then the defaults (do_sample absent or false is greedy; true is
 * temperature 1, top_k 50, top_p 1).  An explicit temperature decides alone whether to sample.  Without a seed a
 * random one of 53 bits is drawn, so that every JSON reader can hold it.  It is the sampling of choice 0,
 * and borrows the biases of options.
 */
extern void millm_sampling_resolve(const MillmGenerateOptions *options, const MillmGenerationConfig *config,
								   MillmSampling *out);

/*
 * The number of tokens to generate after n_prompt ones.  CONTEXT_LENGTH_EXCEEDED with the figures when the prompt leaves no
 * room, or not the room that was asked for; a default is capped by what is left.  INVALID_ARGUMENT for an empty prompt.
 */
extern MillmCode millm_max_tokens_resolve(const MillmGenerateOptions *options, int64_t n_prompt, int64_t context_length,
										  int *out, MillmError *err);

#endif
