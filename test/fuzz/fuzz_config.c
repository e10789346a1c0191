/*
 * fuzz_config.c -- any text as config.json and as generation_config.json: refused by name, or numbers in their limits.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "config.h"

static void
check(int ok)
{
	if (!ok)
		abort();
}

static void
check_failure(const MillmError *err)
{
	check((err->code == MILLM_E_INVALID_MODEL_FILE || err->code == MILLM_E_UNSUPPORTED || err->code == MILLM_E_UNSUPPORTED_ARCHITECTURE) &&
		  err->message[0]);
}

static void
generation(const char *text, size_t size)
{
	MillmGenerationConfig g = {.temperature = NAN, .top_k = -1, .top_p = NAN, .min_p = NAN, .repetition_penalty = NAN};
	MillmConfig c = {0};
	MillmError	err;
	json_t	   *json = json_loadb(text, size, 0, NULL);

	if (!json)
		return;
	if (millm_generation_resolve(json, "generation_config.json", &g, &c, &err) != MILLM_OK)
		check_failure(&err);
	else
		check(!(g.temperature < 0) && g.top_k >= -1 && !(g.top_p < 0 || g.top_p > 1) && !(g.min_p < 0 || g.min_p > 1) &&
			  !(g.repetition_penalty <= 0) && c.n_eos >= 0 && c.n_eos <= 32 && g.n_ignored >= 0);
	json_decref(json);
}

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	MillmConfig c;
	MillmError	err;

	generation((const char *) data, size);
	if (millm_config_parse((const char *) data, size, &c, &err) != MILLM_OK)
	{
		check_failure(&err);
		return 0;
	}
	check(c.hidden_size >= 1 && c.hidden_size <= MILLM_MAX_HIDDEN && c.n_layers >= 1 && c.n_layers <= MILLM_MAX_LAYERS);
	check(c.n_heads >= 1 && c.n_heads <= MILLM_MAX_HEADS && c.n_kv_heads >= 1 && c.n_heads % c.n_kv_heads == 0);
	check(c.head_dim >= 1 && c.head_dim <= MILLM_MAX_HEAD_DIM && c.intermediate_size >= 1);
	check(c.vocab_size >= 1 && c.vocab_size <= MILLM_MAX_VOCAB && c.max_positions >= 1 && c.max_positions <= MILLM_MAX_POSITIONS);
	check(c.n_eos >= 0 && c.n_eos <= 32 && isfinite(c.norm_eps) && isfinite(c.attention_scale));
	check((c.position == MILLM_POS_ROPE) == (c.rope.inv_freq != NULL) && (c.position == MILLM_POS_ALIBI) == (c.alibi_slopes != NULL));
	check(c.embedding_size >= 1 && c.embedding_size <= MILLM_MAX_HIDDEN && c.arch && (c.arch->project_in || c.embedding_size == c.hidden_size));
	check(c.embedding_scale > 0 && c.residual_scale > 0 && c.logit_scale > 0 && isfinite(c.logit_scale));
	if (c.rope.inv_freq)
	{
		check(c.rotary_dim >= 2 && c.rotary_dim % 2 == 0 && c.rotary_dim <= c.head_dim && isfinite(c.rope.attention_factor));
		for (int j = 0; j < c.rotary_dim / 2; j++)	/* longrope's factors may make them larger than 1 */
			check(c.rope.inv_freq[j] >= 0 && (c.rope.long_inv_freq ? isfinite(c.rope.inv_freq[j]) && isfinite(c.rope.long_inv_freq[j]) : c.rope.inv_freq[j] <= 1));
	}
	check(c.attention_softcap >= 0 && c.logit_softcap >= 0 && c.window >= 0 && c.window <= MILLM_MAX_POSITIONS);
	for (int i = 0; i < c.n_layers; i++)
		check(!c.slides[i] || c.window > 0);
	millm_config_free(&c);
	return 0;
}
