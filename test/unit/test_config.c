/* test_config.c -- config.json and generation_config.json: the same model in both spellings, numbers, and refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>

#include "arch.h"
#include "checkpoint.h"
#include "config.h"
#include "utf8.h"

#define LLAMA "\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 172," \
	" \"num_hidden_layers\": 4, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 509," \
	" \"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\", \"eos_token_id\": [2, 3]"
#define FAMILY(type) "\"model_type\": \"" type "\", \"hidden_size\": 64, \"intermediate_size\": 172, \"num_hidden_layers\": 4," \
	" \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 509"
#define OPT "\"model_type\": \"opt\", \"hidden_size\": 64, \"ffn_dim\": 172, \"num_hidden_layers\": 4, \"num_attention_heads\": 4, \"vocab_size\": 509"
#define BLOOM "\"model_type\": \"bloom\", \"hidden_size\": 96, \"n_layer\": 2, \"n_head\": 6, \"vocab_size\": 509"
#define FALCON "\"model_type\": \"falcon\", \"hidden_size\": 64, \"num_hidden_layers\": 4, \"num_attention_heads\": 4, \"vocab_size\": 509"
#define GPT2 "\"model_type\": \"gpt2\", \"n_embd\": 32, \"n_layer\": 5, \"n_head\": 4, \"n_positions\": 128, \"vocab_size\": 509"

/* The object of base with the members of change in place of its own; a member that is "-" is taken away. */
static MillmCode
parse(const char *base, const char *change, MillmConfig *c, MillmError *err)
{
	char		text[4096];
	json_t	   *object, *changes, *value;
	const char *key;
	char	   *merged;
	MillmCode	rc;

	snprintf(text, sizeof(text), "{%s}", base);
	assert_non_null(object = json_loads(text, 0, NULL));
	snprintf(text, sizeof(text), "{%s}", change);
	if (!(changes = json_loads(text, 0, NULL)))
		fail_msg("the test's own JSON: %s", change);
	json_object_foreach(changes, key, value)
	{
		if (json_is_string(value) && strcmp(json_string_value(value), "-") == 0)
			assert_int_equal(json_object_del(object, key), 0);
		else
			json_object_set(object, key, value);
	}
	assert_non_null(merged = json_dumps(object, 0));
	rc = millm_config_parse(merged, strlen(merged), c, err);
	free(merged);
	json_decref(object);
	json_decref(changes);
	return rc;
}

static void
must_parse(const char *base, const char *change, MillmConfig *c)
{
	MillmError	err;

	if (parse(base, change, c, &err) != MILLM_OK)
		fail_msg("%s: %s / %s", change, err.message, err.detail);
}

static void
assert_near(double a, double b)
{
	if (!(fabs(a - b) <= 1e-6 * fmax(fabs(b), 1e-30)))
		fail_msg("%.10g is not %.10g", a, b);
}

static void
llama(void **state)
{
	MillmConfig c;

	(void) state;
	must_parse(LLAMA, "\"rope_theta\": 10000.0, \"rope_scaling\": null", &c);
	assert_string_equal(c.model_type, "llama");
	assert_string_equal(c.architecture, "LlamaForCausalLM");
	assert_int_equal(c.hidden_size, 64);
	assert_int_equal(c.intermediate_size, 172);
	assert_int_equal(c.n_layers, 4);
	assert_int_equal(c.n_heads, 4);
	assert_int_equal(c.n_kv_heads, 2);
	assert_int_equal(c.head_dim, 16);
	assert_int_equal(c.vocab_size, 509);
	assert_int_equal(c.max_positions, 128);
	assert_int_equal(c.norm, MILLM_NORM_RMS);
	assert_false(c.norm_bias);
	assert_near(c.norm_eps, 1e-5f);
	assert_int_equal(c.position, MILLM_POS_ROPE);
	assert_int_equal(c.rotary_dim, 16);
	assert_near(c.attention_scale, 0.25);
	assert_int_equal(c.act, MILLM_ACT_SILU);
	assert_true(c.mlp_gated);
	assert_false(c.tied);
	assert_false(c.qkv_bias || c.o_bias || c.mlp_bias);
	assert_int_equal(c.n_eos, 2);
	assert_int_equal(c.eos_ids[1], 3);
	millm_config_free(&c);
	millm_config_free(&c);		/* harmless */

	/* absent and null: class defaults */
	must_parse(LLAMA, "\"num_key_value_heads\": null, \"head_dim\": null, \"max_position_embeddings\": null, \"rms_norm_eps\": \"-\","
			   " \"hidden_act\": null, \"eos_token_id\": null, \"architectures\": null", &c);
	assert_int_equal(c.n_kv_heads, 4);
	assert_int_equal(c.head_dim, 16);
	assert_int_equal(c.max_positions, 2048);
	assert_near(c.norm_eps, 1e-6f);
	assert_int_equal(c.n_eos, 0);
	assert_string_equal(c.architecture, "");
	millm_config_free(&c);

	must_parse(LLAMA, "\"attention_bias\": true, \"tie_word_embeddings\": true, \"head_dim\": 24, \"num_attention_heads\": 6, \"eos_token_id\": 7", &c);
	assert_true(c.qkv_bias && c.o_bias && !c.mlp_bias && c.tied);
	assert_int_equal(c.head_dim, 24);	/* 6 heads of 24 are more than the hidden size: normal */
	assert_int_equal(c.n_eos, 1);
	assert_int_equal(c.eos_ids[0], 7);
	millm_config_free(&c);
	must_parse(LLAMA, "\"mlp_bias\": true, \"layer_types\": [\"full_attention\", \"full_attention\"], \"unknown_key\": {\"a\": [1]}", &c);
	assert_true(!c.qkv_bias && !c.o_bias && c.mlp_bias);
	millm_config_free(&c);
}

/* The layers that slide, "f" for a full one and "s" for a sliding one, and their window. */
static void
must_slide(const char *base, const char *change, const char *layers, int window)
{
	MillmConfig c;

	must_parse(base, change, &c);
	assert_int_equal(c.n_layers, strlen(layers));
	for (int i = 0; i < c.n_layers; i++)
		if (c.slides[i] != (layers[i] == 's'))
			fail_msg("%s %s: layer %d", base, change, i);
	assert_int_equal(c.window, window);
	millm_config_free(&c);
}

/* A model with other parts: its text model's config, and what is said for the whole. */
static void
composite(void **state)
{
	static const char whole[] = "\"model_type\": \"gemma3\", \"architectures\": [\"Gemma3ForConditionalGeneration\"], \"eos_token_id\": [1, 106], \"vision_config\": {},"
		" \"text_config\": {\"model_type\": \"gemma3_text\", \"hidden_size\": 2560, \"intermediate_size\": 10240, \"num_hidden_layers\": 34, \"sliding_window\": 1024}";
	MillmConfig c;
	MillmError	err;

	(void) state;
	/* as Gemma 3 4B is published: the class has the rest */
	must_parse(whole, "", &c);
	assert_string_equal(c.model_type, "gemma3");
	assert_string_equal(c.architecture, "Gemma3ForConditionalGeneration");
	assert_int_equal(c.n_heads, 8);
	assert_int_equal(c.n_kv_heads, 4);
	assert_int_equal(c.head_dim, 256);
	assert_int_equal(c.vocab_size, 262208);
	assert_int_equal(c.window, 1024);
	assert_int_equal(c.n_eos, 2);
	assert_true(c.tied);
	assert_true(c.slides[0] && !c.slides[5]);
	millm_config_free(&c);
	assert_int_equal(parse(whole, "\"text_config\": \"-\"", &c, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_int_equal(parse(whole, "\"text_config\": [1]", &c, &err), MILLM_E_INVALID_MODEL_FILE);
	assert_non_null(strstr(err.message, "text_config"));
	assert_int_equal(parse(whole, "\"quantization_config\": {\"quant_method\": \"gptq\"}", &c, &err), MILLM_E_UNSUPPORTED);
	assert_true(millm_arch_is_foreign(millm_arch_find("gemma3", 0), "vision_tower.x"));
	assert_true(millm_arch_is_foreign(millm_arch_find("gemma3", 0), "model.multi_modal_projector.x"));
	assert_false(millm_arch_is_foreign(millm_arch_find("gemma3", 0), "language_model.model.vision_tower.x"));
	assert_false(millm_arch_is_foreign(millm_arch_find("llama", 0), "vision_tower.x"));
}

/* KV heads that a family has where its config says nothing; null are as many as heads. */
static void
kv_heads(void **state)
{
	static const struct
	{
		const char *base;
		int			n;
	}			defaults[] = {
		{FAMILY("llama"), 64}, {FAMILY("gemma"), 16}, {FAMILY("gemma2"), 4}, {FAMILY("gemma3_text"), 4}, {FAMILY("glm4"), 2}, {FAMILY("mistral"), 8},
		{FAMILY("mixtral"), 8}, {FAMILY("olmo2"), 64}, {FAMILY("phi3"), 64}, {FAMILY("qwen2"), 32}, {FAMILY("qwen2_moe"), 16}, {FAMILY("qwen3"), 32},
		{FAMILY("qwen3_moe"), 4}, {FAMILY("smollm3"), 4}, {FAMILY("stablelm"), 32}, {FAMILY("starcoder2"), 2},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(defaults) / sizeof(defaults[0]); i++)
	{
		MillmConfig c;

		must_parse(defaults[i].base, "\"hidden_size\": 1024, \"num_attention_heads\": 64, \"num_key_value_heads\": \"-\"", &c);
		assert_int_equal(c.n_kv_heads, defaults[i].n);
		millm_config_free(&c);
		must_parse(defaults[i].base, "\"hidden_size\": 1024, \"num_attention_heads\": 64, \"num_key_value_heads\": null", &c);
		assert_int_equal(c.n_kv_heads, 64);
		millm_config_free(&c);
	}
}

static void
sliding(void **state)
{
	(void) state;
	must_slide(LLAMA, "\"sliding_window\": 8", "ffff", 0);
	must_slide(FAMILY("mistral"), "", "ssss", 4096);
	must_slide(FAMILY("mistral"), "\"sliding_window\": null", "ffff", 0);
	must_slide(FAMILY("mistral"), "\"sliding_window\": 8", "ssss", 8);
	must_slide(FAMILY("mistral"), "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"full_attention\", \"sliding_attention\"]", "sffs", 4096);
	must_slide(FAMILY("phi3"), "", "ffff", 0);
	must_slide(FAMILY("phi3"), "\"sliding_window\": 2047", "ssss", 2047);
	must_slide(FAMILY("qwen2"), "\"sliding_window\": 8, \"max_window_layers\": 2", "ffff", 0);
	must_slide(FAMILY("qwen2"), "\"use_sliding_window\": true, \"sliding_window\": 8, \"max_window_layers\": 2", "ffss", 8);
	must_slide(FAMILY("qwen2"), "\"use_sliding_window\": true", "ffff", 0);
	must_slide(FAMILY("qwen3"), "\"use_sliding_window\": true, \"max_window_layers\": 0", "ssss", 4096);
	must_slide(FAMILY("qwen2_moe"), "\"sliding_window\": 0", "ffff", 0);
	must_slide(FAMILY("qwen2_moe"), "\"use_sliding_window\": true, \"sliding_window\": 8", "ssss", 8);
	must_slide(FAMILY("qwen2_moe"), "\"use_sliding_window\": true, \"sliding_window\": 8,"
			   "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"]", "sfsf", 8);
	must_slide(FAMILY("smollm3"), "\"sliding_window\": 8", "ffff", 0);
	must_slide(FAMILY("smollm3"), "\"sliding_window\": 8, \"use_sliding_window\": true, \"no_rope_layers\": [0, 1, 1, 0]", "sffs", 8);
	must_slide(FAMILY("starcoder2"), "", "ffff", 0);
	must_slide(FAMILY("starcoder2"), "\"sliding_window\": 4096", "ssss", 4096);
	must_slide(FAMILY("gemma2"), "", "sfsf", 4096);
	must_slide(FAMILY("gemma3_text"), "\"sliding_window\": 512", "ssss", 512);
	must_slide(FAMILY("gemma3_text"), "\"sliding_window_pattern\": 3", "ssfs", 4096);
	must_slide(FAMILY("gemma3_text"), "\"_sliding_window_pattern\": 2, \"num_hidden_layers\": 6", "sfsfsf", 4096);
}

static void
must_mix(const char *base, const char *change, const char *layers, int n, int chosen, int size, int shared, bool sums_to_one)
{
	MillmConfig c;

	must_parse(base, change, &c);
	for (int l = 0; l < c.n_layers; l++)
		if (c.is_mixture[l] != (layers[l] == 'x'))
			fail_msg("%s: layer %d %s experts", change, l, c.is_mixture[l] ? "has" : "has no");
	assert_int_equal(c.n_experts, n);
	assert_int_equal(c.n_chosen, chosen);
	assert_int_equal(c.expert_size, size);
	assert_int_equal(c.shared_expert_size, shared);
	assert_int_equal(c.experts_sum_to_one, sums_to_one);
	millm_config_free(&c);
}

static void
mixtures(void **state)
{
	MillmConfig c;

	(void) state;
	must_mix(FAMILY("mixtral"), "", "xxxx", 8, 2, 172, 0, true);
	must_mix(FAMILY("mixtral"), "\"num_local_experts\": 4, \"num_experts_per_tok\": 3", "xxxx", 4, 3, 172, 0, true);
	must_mix(FAMILY("qwen2_moe"), "", "xxxx", 60, 4, 1408, 5632, false);
	must_mix(FAMILY("qwen2_moe"), "\"decoder_sparse_step\": 2, \"shared_expert_intermediate_size\": 7, \"norm_topk_prob\": true", "-x-x", 60, 4, 1408, 7, true);
	must_mix(FAMILY("qwen3_moe"), "\"mlp_only_layers\": [1, 3, 9, -1], \"moe_intermediate_size\": 44", "x-x-", 128, 8, 44, 0, false);
	must_mix(FAMILY("qwen3_moe"), "\"num_local_experts\": 2, \"norm_topk_prob\": true", "xxxx", 2, 2, 768, 0, true);
	must_parse(FAMILY("qwen3_moe"), "\"num_experts\": 0", &c);
	assert_true(c.n_experts == 0 && !c.is_mixture[0]);
	millm_config_free(&c);
	must_parse(FAMILY("gpt_oss"), "\"swiglu_limit\": 7.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 32, \"original_max_position_embeddings\": 4096},"
			   " \"quantization_config\": {\"quant_method\": \"mxfp4\"}", &c);
	assert_true(c.has_fused_experts && c.experts_sum_to_one && c.act == MILLM_ACT_SWIGLU_PAIRS && c.head_dim == 64 && c.expert_size == 172);
	assert_true(c.slides[0] && !c.slides[1] && c.window == 128 && c.o_bias && c.n_experts == 128 && c.n_chosen == 4);
	millm_config_free(&c);
	must_parse(FAMILY("qwen2_moe"), "\"qkv_bias\": false", &c);
	assert_false(c.qkv_bias);
	millm_config_free(&c);
}

/* What a family has when its file does not say. */
static void
families(void **state)
{
	static const float slopes[] = {0.25f, 0.0625f, 0.015625f, 0.00390625f, 0.5f, 0.125f};
	MillmConfig c;

	(void) state;
	must_parse(FAMILY("qwen2"), "\"attention_bias\": true", &c);
	assert_true(c.qkv_bias && !c.o_bias && !c.mlp_bias && !c.tied);
	assert_int_equal(c.head_dim, 16);
	assert_int_equal(c.max_positions, 32768);
	millm_config_free(&c);
	must_parse(FAMILY("qwen3"), "", &c);
	assert_true(!c.qkv_bias && !c.o_bias && !c.tied);
	assert_int_equal(c.head_dim, 128);
	millm_config_free(&c);
	must_parse(FAMILY("mistral"), "\"attention_bias\": true, \"head_dim\": 24", &c);
	assert_true(!c.qkv_bias && !c.o_bias);
	assert_int_equal(c.head_dim, 24);
	millm_config_free(&c);
	must_parse(FAMILY("gemma"), "\"hidden_act\": \"gelu\"", &c);
	assert_int_equal(c.act, MILLM_ACT_GELU_TANH);
	assert_int_equal(c.head_dim, 256);
	assert_true(c.tied && c.norm_plus_one && c.attention_softcap == 0 && c.logit_softcap == 0);
	assert_near(c.embedding_scale, 8);
	millm_config_free(&c);
	must_parse(FAMILY("gemma"), "\"hidden_act\": \"gelu\", \"hidden_activation\": \"gelu\"", &c);
	assert_int_equal(c.act, MILLM_ACT_GELU_ERF);
	millm_config_free(&c);
	must_parse(FAMILY("gemma2"), "\"hidden_act\": \"gelu\"", &c);
	assert_int_equal(c.act, MILLM_ACT_GELU_TANH);
	assert_true(c.attention_softcap == 50 && c.logit_softcap == 30 && c.attention_scale == 1.0f / 16 && !c.local_rope.inv_freq);
	millm_config_free(&c);
	must_parse(FAMILY("gemma2"), "\"attn_logit_softcapping\": null, \"final_logit_softcapping\": null, \"query_pre_attn_scalar\": 144", &c);
	assert_true(c.attention_softcap == 0 && c.logit_softcap == 0);
	assert_near(c.attention_scale, 1.0 / 12);
	millm_config_free(&c);
	must_parse(FAMILY("gemma3_text"), "\"head_dim\": 16, \"attn_logit_softcapping\": null", &c);
	assert_true(c.attention_softcap == 0 && c.logit_softcap == 0);
	assert_near(c.rope.inv_freq[1], pow(1e6, -2.0 / 16));
	assert_near(c.local_rope.inv_freq[1], pow(1e4, -2.0 / 16));
	millm_config_free(&c);
	/* as transformers 5 says it */
	must_parse(FAMILY("gemma3_text"), "\"head_dim\": 16, \"rope_parameters\": {\"full_attention\": {\"rope_type\": \"linear\", \"factor\": 8.0, \"rope_theta\": 5e5},"
			   " \"sliding_attention\": {\"rope_type\": \"default\", \"rope_theta\": 2e4}}", &c);
	assert_near(c.rope.inv_freq[1], pow(5e5, -2.0 / 16) / 8);
	assert_near(c.local_rope.inv_freq[1], pow(2e4, -2.0 / 16));
	millm_config_free(&c);
	/* as 4 does */
	must_parse(FAMILY("gemma3_text"), "\"head_dim\": 16, \"rope_theta\": 5e5, \"rope_local_base_freq\": 2e4, \"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 8.0}", &c);
	assert_near(c.rope.inv_freq[1], pow(5e5, -2.0 / 16) / 8);
	assert_near(c.local_rope.inv_freq[1], pow(2e4, -2.0 / 16));
	millm_config_free(&c);
	must_parse(FAMILY("phi"), "", &c);
	assert_true(c.parallel && c.norm == MILLM_NORM_LAYER && c.norm_bias && c.qkv_bias && c.o_bias && c.mlp_bias && !c.mlp_gated && !c.head_norms && !c.tied);
	assert_int_equal(c.rotary_dim, 8);
	assert_int_equal(c.act, MILLM_ACT_GELU_TANH);
	millm_config_free(&c);
	must_parse(FAMILY("phi"), "\"partial_rotary_factor\": 0.25, \"qk_layernorm\": true, \"layer_norm_eps\": 1e-3", &c);
	assert_true(c.head_norms);
	assert_int_equal(c.rotary_dim, 4);
	assert_near(c.norm_eps, 1e-3f);
	millm_config_free(&c);
	must_parse(FAMILY("phi"), "\"rope_parameters\": {\"partial_rotary_factor\": 0.75, \"rope_theta\": 100.0, \"rope_type\": \"default\"}", &c);
	assert_int_equal(c.rotary_dim, 12);
	assert_near(c.rope.inv_freq[1], pow(100, -1.0 / 6));
	millm_config_free(&c);
	/* Pythia's; a file of transformers 4.57 also names what it derived from its keys */
	must_parse(FAMILY("gpt_neox"), "\"rotary_pct\": 0.5, \"partial_rotary_factor\": 0.5, \"rotary_emb_base\": 100, \"rope_theta\": 100", &c);
	assert_true(c.parallel && c.norm == MILLM_NORM_LAYER && c.norm_bias && c.qkv_bias && c.o_bias && c.mlp_bias && !c.tied);
	assert_int_equal(c.rotary_dim, 8);
	assert_near(c.rope.inv_freq[1], pow(100, -0.25));
	assert_int_equal(c.act, MILLM_ACT_GELU_ERF);
	assert_int_equal(c.n_kv_heads, 4);
	millm_config_free(&c);
	must_parse(FAMILY("gpt_neox"), "\"use_parallel_residual\": false, \"attention_bias\": false", &c);
	assert_true(!c.parallel && !c.qkv_bias && !c.o_bias && c.mlp_bias);
	assert_int_equal(c.rotary_dim, 4);
	millm_config_free(&c);
	must_parse(FAMILY("stablelm"), "", &c);
	assert_true(!c.parallel && c.norm_bias && c.mlp_gated && !c.qkv_bias && !c.o_bias && !c.head_norms && !c.tied);
	assert_int_equal(c.rotary_dim, 4);
	millm_config_free(&c);
	must_parse(FAMILY("stablelm"), "\"use_parallel_residual\": true, \"use_qkv_bias\": true, \"qk_layernorm\": true, \"rope_pct\": 0.5", &c);
	assert_true(c.parallel && c.qkv_bias && !c.o_bias && c.head_norms && c.head_norm_kind == MILLM_HEAD_NORMS_OWN);
	assert_int_equal(c.rotary_dim, 8);
	millm_config_free(&c);
	must_parse(FAMILY("granite"), "", &c);
	assert_true(c.attention_scale == 1 && c.embedding_scale == 1 && c.residual_scale == 1 && c.logit_scale == 1 && !c.tied);
	millm_config_free(&c);
	must_parse(FAMILY("granite"), "\"attention_multiplier\": 0.0078125, \"embedding_multiplier\": 12, \"residual_multiplier\": 0.22, \"logits_scaling\": 16.0", &c);
	assert_true(c.attention_scale == 0.0078125f && c.embedding_scale == 12 && c.residual_scale == 0.22f && c.logit_scale == 0.0625f);
	millm_config_free(&c);
	must_parse(FAMILY("smollm3"), "", &c);
	assert_true(c.tied && !c.unrotated[0] && !c.unrotated[2] && c.unrotated[3]);
	assert_near(c.rope.inv_freq[1], pow(2e6, -0.125));
	millm_config_free(&c);
	must_parse(FAMILY("smollm3"), "\"no_rope_layers\": [0, 1, 1, 0], \"no_rope_layer_interval\": 2", &c);
	assert_true(c.unrotated[0] && !c.unrotated[1] && !c.unrotated[2] && c.unrotated[3]);
	millm_config_free(&c);
	must_parse(FAMILY("starcoder2"), "", &c);
	assert_true(c.tied && c.norm_bias && c.qkv_bias && c.o_bias && c.mlp_bias && !c.mlp_gated && c.act == MILLM_ACT_GELU_TANH);
	millm_config_free(&c);
	must_parse(FAMILY("starcoder2"), "\"use_bias\": false, \"norm_epsilon\": 1e-3", &c);
	assert_true(!c.qkv_bias && !c.o_bias && !c.mlp_bias && c.norm_bias);
	assert_near(c.norm_eps, 1e-3f);
	millm_config_free(&c);
	must_parse(FAMILY("cohere"), "", &c);
	assert_true(c.tied && c.parallel && c.norm == MILLM_NORM_LAYER && !c.norm_bias && c.rope_interleaved && c.logit_scale == 0.0625f && !c.head_norms);
	millm_config_free(&c);
	must_parse(FAMILY("cohere"), "\"logit_scale\": 0.25, \"use_qk_norm\": true, \"attention_bias\": true, \"layer_norm_eps\": 1e-3", &c);
	assert_true(c.logit_scale == 0.25f && c.head_norms && c.head_norm_kind == MILLM_HEAD_NORMS_OWN && c.qkv_bias && c.o_bias);
	millm_config_free(&c);
	must_parse(FAMILY("glm4"), "", &c);
	assert_true(!c.tied && c.rope_interleaved && c.qkv_bias && !c.o_bias && c.head_dim == 128 && c.rotary_dim == 64);
	assert_near(c.norm_eps, 1.5625e-7f);
	millm_config_free(&c);
	must_parse(FAMILY("glm4"), "\"head_dim\": 24, \"attention_bias\": false, \"rope_parameters\": {\"rope_theta\": 100, \"partial_rotary_factor\": 0.25}", &c);
	assert_true(!c.qkv_bias && c.rotary_dim == 6);
	assert_near(c.rope.inv_freq[1], pow(100, -1.0 / 3));
	millm_config_free(&c);
	must_parse(OPT, "", &c);
	assert_true(c.tied && !c.norm_after && c.arch->final_norm && c.norm_bias && c.qkv_bias && c.o_bias && c.mlp_bias && c.position == MILLM_POS_LEARNED);
	assert_int_equal(c.intermediate_size, 172);
	assert_int_equal(c.embedding_size, 64);
	assert_int_equal(c.act, MILLM_ACT_RELU);
	millm_config_free(&c);
	must_parse(OPT, "\"do_layer_norm_before\": false, \"word_embed_proj_dim\": 32, \"enable_bias\": false", &c);
	assert_true(c.norm_after && !c.arch->final_norm && !c.qkv_bias && !c.o_bias && !c.mlp_bias);
	assert_int_equal(c.embedding_size, 32);
	millm_config_free(&c);
	must_parse(OPT, "\"_remove_final_layer_norm\": true", &c);
	assert_true(!c.norm_after && !c.arch->final_norm);
	millm_config_free(&c);
	must_parse(BLOOM, "", &c);
	assert_true(c.tied && c.norm_bias && c.qkv_bias && c.o_bias && c.mlp_bias && c.position == MILLM_POS_ALIBI && !c.alibi_rounded && !c.rope.inv_freq);
	assert_true(c.intermediate_size == 384 && c.max_positions == 2048 && c.act == MILLM_ACT_GELU_TANH);
	for (int h = 0; h < 6; h++)
		assert_true(c.alibi_slopes[h] == slopes[h]);
	millm_config_free(&c);
	must_parse(BLOOM, "\"hidden_size\": \"-\", \"n_embed\": 48, \"n_layer\": \"-\", \"num_hidden_layers\": 3, \"seq_length\": 512", &c);
	assert_true(c.hidden_size == 48 && c.n_layers == 3 && c.max_positions == 512);
	millm_config_free(&c);
	must_parse(FALCON, "", &c);	/* 7B */
	assert_true(c.tied && c.parallel && !c.arch->mlp_norm && c.n_kv_heads == 1 && !c.qkv_bias && !c.o_bias && !c.mlp_bias && c.intermediate_size == 256);
	assert_true(c.position == MILLM_POS_ROPE && c.rotary_dim == 16 && c.act == MILLM_ACT_GELU_ERF && !c.alibi_slopes);
	millm_config_free(&c);
	must_parse(FALCON, "\"new_decoder_architecture\": true, \"num_kv_heads\": 2, \"ffn_hidden_size\": 99", &c);	/* 40B */
	assert_true(c.parallel && c.arch->mlp_norm && c.n_kv_heads == 2 && c.intermediate_size == 99);
	millm_config_free(&c);
	must_parse(FALCON, "\"new_decoder_architecture\": true, \"n_head_kv\": 2, \"num_ln_in_parallel_attn\": 1", &c);	/* 11B */
	assert_true(c.parallel && !c.arch->mlp_norm && c.n_kv_heads == 2);
	millm_config_free(&c);
	must_parse(FALCON, "\"alibi\": true, \"parallel_attn\": false, \"multi_query\": false, \"bias\": true, \"num_attention_heads\": 16, \"num_kv_heads\": 2", &c);	/* RW */
	assert_true(!c.parallel && c.arch->mlp_norm && c.n_kv_heads == 16 && c.qkv_bias && c.o_bias && c.mlp_bias && c.alibi_rounded);
	assert_true(c.alibi_slopes[0] == 0.70703125f && c.alibi_slopes[1] == 0.5f);	/* the first one rounded */
	millm_config_free(&c);
	must_parse(FAMILY("phi3"), "\"partial_rotary_factor\": 0.75", &c);
	assert_int_equal(c.rotary_dim, 12);
	assert_near(c.norm_eps, 1e-5f);
	millm_config_free(&c);
}

static void
gpt2(void **state)
{
	MillmConfig c;

	(void) state;
	must_parse(GPT2, "\"n_inner\": null, \"head_dim\": 3", &c);	/* GPT-2 has no key head_dim */
	assert_int_equal(c.hidden_size, 32);
	assert_int_equal(c.intermediate_size, 128);
	assert_int_equal(c.n_layers, 5);
	assert_int_equal(c.n_heads, 4);
	assert_int_equal(c.n_kv_heads, 4);
	assert_int_equal(c.head_dim, 8);
	assert_int_equal(c.max_positions, 128);
	assert_int_equal(c.norm, MILLM_NORM_LAYER);
	assert_true(c.norm_bias && c.qkv_bias && c.o_bias && c.mlp_bias);
	assert_int_equal(c.position, MILLM_POS_LEARNED);
	assert_null(c.rope.inv_freq);
	assert_int_equal(c.act, MILLM_ACT_GELU_TANH);
	assert_false(c.mlp_gated);
	assert_false(c.layer_inv_scale);
	assert_true(c.tied);
	assert_near(c.attention_scale, 1 / sqrt(8));
	millm_config_free(&c);
	must_parse(GPT2, "\"n_inner\": 37, \"activation_function\": \"gelu\", \"scale_attn_weights\": false, \"scale_attn_by_inverse_layer_idx\": true,"
			   " \"tie_word_embeddings\": false, \"n_positions\": \"-\", \"n_ctx\": 64", &c);
	assert_int_equal(c.intermediate_size, 37);
	assert_int_equal(c.act, MILLM_ACT_GELU_ERF);
	assert_true(c.attention_scale == 1 && c.layer_inv_scale && !c.tied);
	assert_int_equal(c.max_positions, 64);
	millm_config_free(&c);
	/* the spelling that transformers' attribute map also writes */
	must_parse("\"model_type\": \"gpt2\", \"hidden_size\": 32, \"num_hidden_layers\": 5, \"num_attention_heads\": 4, \"vocab_size\": 509", "", &c);
	assert_int_equal(c.hidden_size, 32);
	assert_int_equal(c.max_positions, 1024);
	millm_config_free(&c);
}

/* transformers 4 and 5 say the same thing differently. */
static void
two_spellings(void **state)
{
	static const char *const pairs[][2] = {
		{"\"rope_theta\": 500000.0, \"rope_scaling\": null, \"torch_dtype\": \"float32\"",
		"\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500000.0}, \"dtype\": \"float32\""},
		{"\"rope_theta\": 10000.0, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 4.0}",
		"\"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 4.0, \"rope_theta\": 10000.0}"},
		{"\"rope_theta\": 20000.0, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
			" \"original_max_position_embeddings\": 64}",
		"\"rope_theta\": 7.0, \"rope_parameters\": {\"rope_theta\": 20000, \"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0,"
		" \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 64}"},
		{"\"rope_theta\": 10000.0, \"partial_rotary_factor\": 0.5", "\"rope_parameters\": {\"rope_type\": \"default\", \"partial_rotary_factor\": 0.5}"},
		/* an empty rope_scaling is none; a real one wins */
		{"\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4.0}, \"rope_parameters\": {\"rope_type\": \"default\"}",
		"\"rope_scaling\": {}, \"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 4.0}"},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
	{
		MillmConfig a, b;
		float	   *fa, *fb;

		must_parse(LLAMA, pairs[i][0], &a);
		must_parse(LLAMA, pairs[i][1], &b);
		fa = a.rope.inv_freq;
		fb = b.rope.inv_freq;
		assert_int_equal(a.rotary_dim, b.rotary_dim);
		assert_memory_equal(fa, fb, (size_t) a.rotary_dim / 2 * sizeof(float));
		a.rope.inv_freq = b.rope.inv_freq = NULL;
		assert_memory_equal(&a, &b, sizeof(a));
		free(fa);
		free(fb);
	}
}

static void
must_rotate(const MillmRope *r, int length, const double *inv_freq)
{
	float		computed[8];
	const float *f = millm_rope_frequencies(r, 16, length, computed);

	for (int j = 0; j < 8; j++)
		assert_near(f[j], inv_freq[j]);
}

#define LISTS "\"short_factor\": [1, 2.0, 1, 1, 1, 1, 1, 1], \"long_factor\": [1, 1, 4, 1, 1, 1, 1, 8]"

/* The vectors of reference/architectures.md 1.3: r = 16, theta = 1e4. */
static void
rope(void **state)
{
	static const struct
	{
		const char *change;
		double		attention_factor;
		double		inv_freq[8];
	}			cases[] = {
		{"\"rope_scaling\": {\"rope_type\": \"default\"}", 1, {1, .31622777, .1, .031622777, .01, .0031622777, .001, .00031622777}},
		{"\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 2}", 1,
		{.5, .158113883, .05, .0158113883, .005, .00158113883, .0005, .000158113883}},
		{"\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 64}", 1.13862944,
		{1, .23717082, .05, .0079056942, .0025, .00079056942, .00025, 7.9056942e-5}},
		/* without a factor it is M / O */
		{"\"max_position_embeddings\": 256, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": null, \"original_max_position_embeddings\": 64}", 1.13862944,
		{1, .23717082, .05, .0079056942, .0025, .00079056942, .00025, 7.9056942e-5}},
		{"\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 64, \"truncate\": false}", 1.13862944,
		{1, .19858352, .025595246, .0079056942, .0025, .00079056942, .00025, 7.9056942e-5}},
		{"\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 64, \"attention_factor\": 1.5}", 1.5,
		{1, .23717082, .05, .0079056942, .0025, .00079056942, .00025, 7.9056942e-5}},
		/* g(4, 1) / g(4, 0.5) */
		{"\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 64, \"mscale\": 1.0, \"mscale_all_dim\": 0.5}",
		1.13862944 / 1.06931472, {1, .23717082, .05, .0079056942, .0025, .00079056942, .00025, 7.9056942e-5}},
		{"\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 64}", 1,
		{1, .2443846, .013042256, .0039528471, .00125, .00039528471, .000125, 3.9528471e-5}},
	};
	MillmConfig c;

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		must_parse(LLAMA, cases[i].change, &c);
		assert_int_equal(c.rotary_dim, 16);
		assert_near(c.rope.attention_factor, cases[i].attention_factor);
		for (int j = 0; j < 8; j++)
			assert_near(c.rope.inv_freq[j], cases[i].inv_freq[j]);
		millm_config_free(&c);
	}
	/* gpt_oss's: the ramp is from 8.09 to 17.40, or from 8 to 18 when truncated */
	must_parse(LLAMA, "\"head_dim\": 64, \"rope_theta\": 150000, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 32.0,"
			   " \"original_max_position_embeddings\": 4096, \"truncate\": false}", &c);
	assert_near(c.rope.attention_factor, 1.34657359);
	assert_near(c.rope.inv_freq[9], pow(150000, -18.0 / 64) * (1 - 0.09749566 * 31 / 32));
	millm_config_free(&c);
	must_parse(LLAMA, "\"head_dim\": 64, \"rope_theta\": 150000, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 32.0,"
			   " \"original_max_position_embeddings\": 4096}", &c);
	assert_near(c.rope.inv_freq[9], pow(150000, -18.0 / 64) * (1 - 0.1 * 31 / 32));
	millm_config_free(&c);
	/* dynamic: by the length that a sequence is planned for, beyond what the model knows */
	must_parse(LLAMA, "\"max_position_embeddings\": 64, \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 4}", &c);
	assert_int_equal(c.max_context, 256);
	must_rotate(&c.rope, 64, (double[]) {1, .31622777, .1, .031622777, .01, .0031622777, .001, .00031622777});
	must_rotate(&c.rope, 256, (double[]) {1, .21921246, .048054103, .010534058, .0023091968, .0005062047, .00011096638, 2.4325213e-5});
	millm_config_free(&c);
	/* longrope: lists for short and long; the number outside counts, and what is inside only without it */
	for (int i = 0; i < 4; i++)
	{
		static const struct
		{
			const char *family, *change;
			int			above;
			double		attention_factor;
		}			longropes[] = {
			{FAMILY("phi3"), "\"max_position_embeddings\": 131072, \"rope_scaling\": {\"type\": \"su\", " LISTS "}", 4096, 1.19023807},
			{FAMILY("phi3"), "\"max_position_embeddings\": 256, \"original_max_position_embeddings\": 32, \"rope_scaling\": {\"type\": \"longrope\", \"factor\": 7,"
			" \"original_max_position_embeddings\": 64, " LISTS "}", 32, 1.26491106},
			{LLAMA, "\"max_position_embeddings\": 256, \"rope_scaling\": {\"rope_type\": \"longrope\", \"factor\": 16, \"original_max_position_embeddings\": 16, "
			LISTS "}", 16, 1.41421356},
			{LLAMA, "\"rope_scaling\": {\"rope_type\": \"longrope\", \"factor\": 16, \"attention_factor\": 1.5, " LISTS "}", 128, 1.5},
		};

		must_parse(longropes[i].family, longropes[i].change, &c);
		assert_int_equal(c.max_context, c.max_positions);
		assert_near(c.rope.attention_factor, longropes[i].attention_factor);
		must_rotate(&c.rope, longropes[i].above, (double[]) {1, .31622777 / 2, .1, .031622777, .01, .0031622777, .001, .00031622777});
		must_rotate(&c.rope, longropes[i].above + 1, (double[]) {1, .31622777, .1 / 4, .031622777, .01, .0031622777, .001, .00031622777 / 8});
		millm_config_free(&c);
	}
	/* as published: Qwen2.5's yarn is of four times what the file says that the model knows, Phi-3.5's long factors are of what it says */
	must_parse(FAMILY("qwen2"), "\"max_position_embeddings\": 32768, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 32768}", &c);
	assert_int_equal(c.max_context, 131072);
	millm_config_free(&c);
	/* partial: the denominator is r */
	must_parse(LLAMA, "\"head_dim\": 32, \"partial_rotary_factor\": 0.5", &c);
	assert_int_equal(c.rotary_dim, 16);
	assert_near(c.rope.inv_freq[1], .31622777);
	millm_config_free(&c);
}

static void
refused(void **state)
{
	static const struct
	{
		const char *base;
		const char *change;
		MillmCode	code;
		const char *text;
	}			cases[] = {
		/* another type, or none */
		{LLAMA, "\"model_type\": \"mamba\"", MILLM_E_UNSUPPORTED_ARCHITECTURE, "model type \"mamba\""},
		{LLAMA, "\"model_type\": \"\"", MILLM_E_UNSUPPORTED_ARCHITECTURE, "model type \"\""},
		{LLAMA, "\"model_type\": null", MILLM_E_UNSUPPORTED_ARCHITECTURE, "does not name a model_type"},
		{LLAMA, "\"model_type\": [\"llama\"]", MILLM_E_UNSUPPORTED_ARCHITECTURE, "does not name a model_type"},
		/* numbers */
		{LLAMA, "\"hidden_size\": \"-\"", MILLM_E_INVALID_MODEL_FILE, "lacks \"hidden_size\""},
		{LLAMA, "\"num_hidden_layers\": null", MILLM_E_INVALID_MODEL_FILE, "lacks \"num_hidden_layers\""},
		{LLAMA, "\"num_attention_heads\": \"-\"", MILLM_E_INVALID_MODEL_FILE, "lacks \"num_attention_heads\""},
		{LLAMA, "\"vocab_size\": \"-\"", MILLM_E_INVALID_MODEL_FILE, "lacks \"vocab_size\""},
		{LLAMA, "\"intermediate_size\": \"-\"", MILLM_E_INVALID_MODEL_FILE, "lacks \"intermediate_size\""},
		{LLAMA, "\"hidden_size\": -64", MILLM_E_INVALID_MODEL_FILE, "It is -64; expected an integer from 1 to 65536"},
		{LLAMA, "\"hidden_size\": 0", MILLM_E_INVALID_MODEL_FILE, "It is 0;"},
		{LLAMA, "\"hidden_size\": 64.0", MILLM_E_INVALID_MODEL_FILE, "It is 64.0;"},
		{LLAMA, "\"hidden_size\": \"64\"", MILLM_E_INVALID_MODEL_FILE, "It is \"64\";"},
		{LLAMA, "\"hidden_size\": true", MILLM_E_INVALID_MODEL_FILE, "It is true;"},
		{LLAMA, "\"hidden_size\": [64]", MILLM_E_INVALID_MODEL_FILE, "It is a list;"},
		{LLAMA, "\"hidden_size\": 9223372036854775807", MILLM_E_INVALID_MODEL_FILE, "It is 9223372036854775807;"},
		{LLAMA, "\"hidden_size\": 4294967360", MILLM_E_INVALID_MODEL_FILE, "It is 4294967360;"},	/* 64 in 32 bits */
		{LLAMA, "\"num_hidden_layers\": 1025", MILLM_E_INVALID_MODEL_FILE, "\"num_hidden_layers\""},
		{LLAMA, "\"num_hidden_layers\": -1", MILLM_E_INVALID_MODEL_FILE, "\"num_hidden_layers\""},
		{LLAMA, "\"num_attention_heads\": 0", MILLM_E_INVALID_MODEL_FILE, "\"num_attention_heads\""},
		{LLAMA, "\"num_key_value_heads\": 0", MILLM_E_INVALID_MODEL_FILE, "\"num_key_value_heads\""},
		{LLAMA, "\"num_key_value_heads\": 3", MILLM_E_INVALID_MODEL_FILE, "heads must be a multiple of KV heads"},
		{LLAMA, "\"num_key_value_heads\": 8", MILLM_E_INVALID_MODEL_FILE, "heads must be a multiple of KV heads"},
		{LLAMA, "\"num_attention_heads\": 6", MILLM_E_INVALID_MODEL_FILE, "must be a multiple of heads"},
		{LLAMA, "\"num_attention_heads\": 128, \"num_key_value_heads\": 128", MILLM_E_INVALID_MODEL_FILE, "must be a multiple of heads"},
		{LLAMA, "\"hidden_size\": 65536", MILLM_E_INVALID_MODEL_FILE, "4 heads of 16384 dimensions; at most 1024"},
		{LLAMA, "\"head_dim\": 1025", MILLM_E_INVALID_MODEL_FILE, "\"head_dim\""},
		{LLAMA, "\"vocab_size\": 4194305", MILLM_E_INVALID_MODEL_FILE, "\"vocab_size\""},
		{LLAMA, "\"max_position_embeddings\": 0", MILLM_E_INVALID_MODEL_FILE, "\"max_position_embeddings\""},
		{LLAMA, "\"max_position_embeddings\": 1e6", MILLM_E_INVALID_MODEL_FILE, "\"max_position_embeddings\""},
		{LLAMA, "\"rms_norm_eps\": -1e-5", MILLM_E_INVALID_MODEL_FILE, "\"rms_norm_eps\""},
		{LLAMA, "\"rms_norm_eps\": \"1e-5\"", MILLM_E_INVALID_MODEL_FILE, "\"rms_norm_eps\""},
		{LLAMA, "\"rms_norm_eps\": 2", MILLM_E_INVALID_MODEL_FILE, "from 0 to 1"},
		{GPT2, "\"n_embd\": 30", MILLM_E_INVALID_MODEL_FILE, "must be a multiple of heads"},
		{GPT2, "\"n_positions\": -5", MILLM_E_INVALID_MODEL_FILE, "\"n_positions\""},
		/* flags */
		{LLAMA, "\"attention_bias\": 1", MILLM_E_INVALID_MODEL_FILE, "\"attention_bias\""},
		{LLAMA, "\"mlp_bias\": \"false\"", MILLM_E_INVALID_MODEL_FILE, "\"mlp_bias\""},
		{LLAMA, "\"tie_word_embeddings\": 0", MILLM_E_INVALID_MODEL_FILE, "\"tie_word_embeddings\""},
		{LLAMA, "\"hidden_act\": \"xielu\"", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"hidden_act\": xielu"},
		{LLAMA, "\"hidden_act\": 1", MILLM_E_INVALID_MODEL_FILE, "\"hidden_act\""},
		{GPT2, "\"activation_function\": \"mish\"", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"activation_function\": mish"},
		{GPT2, "\"add_cross_attention\": true", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"add_cross_attention\": true"},
		{GPT2, "\"scale_attn_weights\": null, \"scale_attn_by_inverse_layer_idx\": 2", MILLM_E_INVALID_MODEL_FILE, "\"scale_attn_by_inverse_layer_idx\""},
		{LLAMA, "\"is_encoder_decoder\": true", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"is_encoder_decoder\""},
		{LLAMA, "\"is_encoder_decoder\": \"yes\"", MILLM_E_INVALID_MODEL_FILE, "\"is_encoder_decoder\""},
		{LLAMA, "\"use_bidirectional_attention\": true", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"use_bidirectional_attention\""},
		{LLAMA, "\"layer_types\": [\"full_attention\", \"sliding_attention\"]", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"layer_types\": sliding_attention"},
		{FAMILY("mistral"), "\"layer_types\": [\"sliding_attention\", \"full_attention\"]", MILLM_E_INVALID_MODEL_FILE, "It has 2 entries; there are 4 layers"},
		{FAMILY("qwen2"), "\"layer_types\": [\"sliding_attention\", \"full_attention\", \"full_attention\", \"full_attention\"]", MILLM_E_INVALID_MODEL_FILE,
		"\"sliding_window\""},
		{FAMILY("qwen3"), "\"layer_types\": [\"full_attention\", \"linear_attention\", \"full_attention\", \"full_attention\"]", MILLM_E_UNSUPPORTED_ARCHITECTURE,
		"\"layer_types\": linear_attention"},
		{FAMILY("gemma2"), "\"sliding_window\": null", MILLM_E_INVALID_MODEL_FILE, "\"sliding_window\""},
		{FAMILY("gemma2"), "\"attn_logit_softcapping\": 0", MILLM_E_INVALID_MODEL_FILE, "\"attn_logit_softcapping\""},
		{FAMILY("gemma2"), "\"query_pre_attn_scalar\": -1", MILLM_E_INVALID_MODEL_FILE, "\"query_pre_attn_scalar\""},
		{FAMILY("gemma3_text"), "\"attn_logit_softcapping\": 50.0", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"attn_logit_softcapping\": 50.0"},
		{FAMILY("gemma3_text"), "\"use_bidirectional_attention\": true", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"use_bidirectional_attention\""},
		{FAMILY("gemma3_text"), "\"rope_parameters\": {\"full_attention\": {}, \"chunked_attention\": {}}", MILLM_E_UNSUPPORTED_ARCHITECTURE, "chunked_attention"},
		{FAMILY("gemma3_text"), "\"rope_parameters\": {\"full_attention\": {}, \"sliding_attention\": 3}", MILLM_E_INVALID_MODEL_FILE, "\"rope_parameters\""},
		{FAMILY("gemma3_text"), "\"rope_parameters\": {\"full_attention\": {\"partial_rotary_factor\": 0.5}, \"sliding_attention\": {}}",
		MILLM_E_UNSUPPORTED_ARCHITECTURE, "partial_rotary_factor"},
		{FAMILY("gpt_neox"), "\"use_parallel_residual\": \"yes\"", MILLM_E_INVALID_MODEL_FILE, "\"use_parallel_residual\""},
		{FAMILY("granite"), "\"logits_scaling\": 0", MILLM_E_INVALID_MODEL_FILE, "\"logits_scaling\""},
		{FAMILY("granite"), "\"residual_multiplier\": \"0.22\"", MILLM_E_INVALID_MODEL_FILE, "\"residual_multiplier\""},
		{FAMILY("smollm3"), "\"no_rope_layers\": [1, 1]", MILLM_E_INVALID_MODEL_FILE, "\"no_rope_layers\""},
		{FAMILY("smollm3"), "\"no_rope_layers\": [1, 1, 2, 0]", MILLM_E_INVALID_MODEL_FILE, "It is 2;"},
		{FAMILY("smollm3"), "\"no_rope_layer_interval\": 0", MILLM_E_INVALID_MODEL_FILE, "\"no_rope_layer_interval\""},
		{OPT, "\"layer_norm_elementwise_affine\": 0", MILLM_E_INVALID_MODEL_FILE, "\"layer_norm_elementwise_affine\""},
		{OPT, "\"word_embed_proj_dim\": -1", MILLM_E_INVALID_MODEL_FILE, "\"word_embed_proj_dim\""},
		{BLOOM, "\"apply_residual_connection_post_layernorm\": 1", MILLM_E_INVALID_MODEL_FILE, "\"apply_residual_connection_post_layernorm\""},
		{FALCON, "\"new_decoder_architecture\": true, \"num_kv_heads\": 3", MILLM_E_INVALID_MODEL_FILE, "heads must be a multiple of KV heads"},
		{FALCON, "\"new_decoder_architecture\": \"no\"", MILLM_E_INVALID_MODEL_FILE, "\"new_decoder_architecture\""},
		{FALCON, "\"alibi\": 1", MILLM_E_INVALID_MODEL_FILE, "\"alibi\""},
		{FAMILY("mistral"), "\"sliding_window\": 0", MILLM_E_INVALID_MODEL_FILE, "\"sliding_window\""},
		{FAMILY("qwen2"), "\"use_sliding_window\": 1", MILLM_E_INVALID_MODEL_FILE, "\"use_sliding_window\""},
		{FAMILY("qwen2"), "\"max_window_layers\": -1", MILLM_E_INVALID_MODEL_FILE, "\"max_window_layers\""},
		{FAMILY("phi3"), "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2}", MILLM_E_INVALID_MODEL_FILE, "\"short_factor\""},
		{FAMILY("phi3"), "\"rope_scaling\": {\"type\": \"su\"}", MILLM_E_INVALID_MODEL_FILE, "\"short_factor\""},
		{LLAMA, "\"layer_types\": [4]", MILLM_E_UNSUPPORTED_ARCHITECTURE, "not a string"},
		{LLAMA, "\"layer_types\": \"full_attention\"", MILLM_E_INVALID_MODEL_FILE, "\"layer_types\""},
		{LLAMA, "\"quantization_config\": {\"quant_method\": \"gptq\", \"bits\": 4}", MILLM_E_UNSUPPORTED, "quant_method \"gptq\""},
		{LLAMA, "\"quantization_config\": {}", MILLM_E_UNSUPPORTED, "quant_method \"unknown\""},
		{LLAMA, "\"quantization_config\": false", MILLM_E_UNSUPPORTED, "quant_method \"unknown\""},
		/* experts */
		{FAMILY("mixtral"), "\"num_local_experts\": 0", MILLM_E_INVALID_MODEL_FILE, "\"num_local_experts\""},
		{FAMILY("mixtral"), "\"num_local_experts\": 1025", MILLM_E_INVALID_MODEL_FILE, "\"num_local_experts\""},
		{FAMILY("mixtral"), "\"num_experts_per_tok\": 9", MILLM_E_INVALID_MODEL_FILE, "\"num_experts_per_tok\""},
		{FAMILY("qwen3_moe"), "\"moe_intermediate_size\": 0", MILLM_E_INVALID_MODEL_FILE, "\"moe_intermediate_size\""},
		{FAMILY("qwen3_moe"), "\"decoder_sparse_step\": 0", MILLM_E_INVALID_MODEL_FILE, "\"decoder_sparse_step\""},
		{FAMILY("qwen3_moe"), "\"mlp_only_layers\": 3", MILLM_E_INVALID_MODEL_FILE, "\"mlp_only_layers\""},
		{FAMILY("qwen3_moe"), "\"mlp_only_layers\": [\"3\"]", MILLM_E_INVALID_MODEL_FILE, "\"mlp_only_layers\""},
		{FAMILY("qwen3_moe"), "\"norm_topk_prob\": 1", MILLM_E_INVALID_MODEL_FILE, "\"norm_topk_prob\""},
		{FAMILY("qwen3_moe"), "\"mlp_layer_types\": [\"sparse\"]", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"mlp_layer_types\""},
		{FAMILY("gpt_oss"), "", MILLM_E_INVALID_MODEL_FILE, "\"rope_parameters\""},
		{FAMILY("gpt_oss"), "\"rope_scaling\": {\"rope_type\": \"default\"}, \"swiglu_limit\": 5", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"swiglu_limit\""},
		{FAMILY("gpt_oss"), "\"rope_scaling\": {\"rope_type\": \"default\"}, \"swiglu_alpha\": 1", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"swiglu_alpha\""},
		{LLAMA, "\"quantization_config\": {\"quant_method\": \"mxfp4\"}", MILLM_E_UNSUPPORTED, "mxfp4"},
		/* rope */
		{LLAMA, "\"head_dim\": 15", MILLM_E_INVALID_MODEL_FILE, "of head_dim 15 gives 15"},
		{LLAMA, "\"head_dim\": 1", MILLM_E_INVALID_MODEL_FILE, "gives 1"},
		{LLAMA, "\"partial_rotary_factor\": 0.2", MILLM_E_INVALID_MODEL_FILE, "gives 3"},
		{LLAMA, "\"partial_rotary_factor\": 2.0", MILLM_E_INVALID_MODEL_FILE, "\"partial_rotary_factor\""},
		{LLAMA, "\"rope_theta\": 0", MILLM_E_INVALID_MODEL_FILE, "\"rope_theta\""},
		{LLAMA, "\"rope_theta\": -1e4", MILLM_E_INVALID_MODEL_FILE, "\"rope_theta\""},
		{LLAMA, "\"rope_theta\": 1", MILLM_E_INVALID_MODEL_FILE, "\"rope_theta\""},
		{LLAMA, "\"rope_theta\": \"10000\"", MILLM_E_INVALID_MODEL_FILE, "\"rope_theta\""},
		{LLAMA, "\"rope_scaling\": \"linear\"", MILLM_E_INVALID_MODEL_FILE, "\"rope_scaling\""},
		{LLAMA, "\"rope_parameters\": [1]", MILLM_E_INVALID_MODEL_FILE, "\"rope_parameters\""},
		{LLAMA, "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}}", MILLM_E_UNSUPPORTED_ARCHITECTURE, "full_attention"},
		{LLAMA, "\"rope_scaling\": {\"type\": \"dynamic\"}", MILLM_E_INVALID_MODEL_FILE, "\"factor\""},
		{LLAMA, "\"head_dim\": 2, \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"rope_type\": dynamic"},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"longrope\"}", MILLM_E_INVALID_MODEL_FILE, "\"short_factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"longrope\", \"short_factor\": [1, 1, 1, 1, 1, 1, 1, 1]}", MILLM_E_INVALID_MODEL_FILE, "\"long_factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"longrope\", \"short_factor\": [1, 1, 1, 1, 1, 1, 1]}", MILLM_E_INVALID_MODEL_FILE, "\"short_factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"longrope\", \"short_factor\": [1, 1, 1, 1, 1, 1, 1, 0]}", MILLM_E_INVALID_MODEL_FILE, "\"short_factor\""},
		{LLAMA, "\"original_max_position_embeddings\": 1, \"rope_scaling\": {\"rope_type\": \"longrope\", " LISTS "}", MILLM_E_INVALID_MODEL_FILE, "original_max"},
		{LLAMA, "\"max_position_embeddings\": 1, \"rope_scaling\": {\"rope_type\": \"longrope\", \"factor\": 2, " LISTS "}", MILLM_E_INVALID_MODEL_FILE,
			"expected at least 2, for rope_type \"longrope\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"su\"}", MILLM_E_UNSUPPORTED_ARCHITECTURE, "\"rope_type\": su"},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": 3}", MILLM_E_INVALID_MODEL_FILE, "\"rope_type\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"linear\"}", MILLM_E_INVALID_MODEL_FILE, "\"factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 0.5}", MILLM_E_INVALID_MODEL_FILE, "\"factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"llama3\"}", MILLM_E_INVALID_MODEL_FILE, "\"factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8}", MILLM_E_INVALID_MODEL_FILE, "\"low_freq_factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1}", MILLM_E_INVALID_MODEL_FILE, "\"high_freq_factor\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4}", MILLM_E_INVALID_MODEL_FILE,
		"It is 4; expected more than low_freq_factor"},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"yarn\", \"original_max_position_embeddings\": 129}", MILLM_E_INVALID_MODEL_FILE,
			"at most max_position_embeddings, for rope_type \"yarn\" without a factor"},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4, \"beta_fast\": 1, \"beta_slow\": 32}", MILLM_E_INVALID_MODEL_FILE, "\"beta_fast\""},
		{LLAMA, "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 0}", MILLM_E_INVALID_MODEL_FILE,
		"\"original_max_position_embeddings\""},
		/* eos */
		{LLAMA, "\"eos_token_id\": -1", MILLM_E_INVALID_MODEL_FILE, "It is -1; expected a token id"},
		{LLAMA, "\"eos_token_id\": \"</s>\"", MILLM_E_INVALID_MODEL_FILE, "\"eos_token_id\" in config.json"},
		{LLAMA, "\"eos_token_id\": [1, null]", MILLM_E_INVALID_MODEL_FILE, "\"eos_token_id\""},
		{LLAMA, "\"eos_token_id\": 2147483648", MILLM_E_INVALID_MODEL_FILE, "\"eos_token_id\""},
		{LLAMA, "\"eos_token_id\": [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32]", MILLM_E_INVALID_MODEL_FILE,
		"at most 32 ids"},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		MillmConfig c;
		MillmError	err;
		MillmCode	rc = parse(cases[i].base, cases[i].change, &c, &err);

		if (rc == MILLM_OK)
			fail_msg("accepted: %s", cases[i].change);
		assert_failure(rc, &err, cases[i].code, cases[i].text);
		assert_null(c.rope.inv_freq);
	}
}

static void
not_a_config(void **state)
{
	static const struct
	{
		const char *text;
		const char *expected;
	}			cases[] = {
		{"", "not valid JSON"}, {"{\"model_type\": \"llama\"", "Line 1"}, {"[]", "not a JSON object"}, {"3", "not valid JSON"},
		{"{\"model_type\": \"llama\", \"x\": NaN}", "not valid JSON"}, {"{\"model_type\": \"\xff\"}", "not valid JSON"},
		{"{\"x\": 1e999}", "not valid JSON"}, {"{\"x\": 99999999999999999999}", "not valid JSON"},
	};
	MillmConfig c;
	MillmError	err;
	char		deep[8192];

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		assert_failure(millm_config_parse(cases[i].text, strlen(cases[i].text), &c, &err), &err, MILLM_E_INVALID_MODEL_FILE, cases[i].expected);
	memset(deep, '[', sizeof(deep));
	assert_failure(millm_config_parse(deep, sizeof(deep), &c, &err), &err, MILLM_E_INVALID_MODEL_FILE, "depth");
}

/* An architecture's name that does not fit is cut between characters. */
static void
long_architecture(void **state)
{
	char		change[400];
	MillmConfig c;
	size_t		n;

	(void) state;
	n = (size_t) snprintf(change, sizeof(change), "\"architectures\": [\"x");
	for (; n < 380; n += 2)
		memcpy(change + n, "\xc3\xa9", 2);
	memcpy(change + n, "\"]", 3);
	must_parse(LLAMA, change, &c);
	assert_true(strlen(c.architecture) > 100);
	assert_int_equal(millm_utf8_valid_bytes(c.architecture, strlen(c.architecture)), strlen(c.architecture));
	millm_config_free(&c);
}

/* --- generation_config.json ------------------------------------------------------------------- */

static MillmCode
generation(const char *text, MillmGenerationConfig *g, MillmConfig *c, MillmError *err)
{
	json_t	   *json = json_loads(text, 0, NULL);
	MillmCode	rc;

	assert_non_null(json);
	memset(c, 0, sizeof(*c));
	c->n_eos = 1;
	c->eos_ids[0] = 9;
	*g = (MillmGenerationConfig) {.temperature = NAN, .top_k = -1, .top_p = NAN, .min_p = NAN, .repetition_penalty = NAN};
	rc = millm_generation_resolve(json, "generation_config.json", g, c, err);
	json_decref(json);
	return rc;
}

static void
generation_good(void **state)
{
	MillmGenerationConfig g;
	MillmConfig c;
	MillmError	err;

	(void) state;
	assert_int_equal(generation("{}", &g, &c, &err), MILLM_OK);
	assert_false(g.do_sample);
	assert_true(isnan(g.temperature) && isnan(g.top_p) && isnan(g.min_p) && isnan(g.repetition_penalty) && g.top_k == -1);
	assert_int_equal(c.n_eos, 1);	/* config.json's */
	assert_int_equal(g.n_ignored, 0);

	assert_int_equal(generation("{\"do_sample\": true, \"temperature\": 0.6, \"top_k\": 20, \"top_p\": 0.95, \"min_p\": 0, \"repetition_penalty\": 1.1,"
								" \"eos_token_id\": [5, 6, 7], \"bos_token_id\": 1, \"pad_token_id\": null, \"max_length\": 4096}", &g, &c, &err), MILLM_OK);
	assert_true(g.do_sample && g.top_k == 20);
	assert_near(g.temperature, 0.6f);
	assert_near(g.top_p, 0.95f);
	assert_true(g.min_p == 0);
	assert_near(g.repetition_penalty, 1.1f);
	assert_int_equal(c.n_eos, 3);	/* replaced */
	assert_int_equal(c.eos_ids[0], 5);
	assert_int_equal(c.eos_ids[2], 7);
	assert_int_equal(g.n_ignored, 0);
	assert_int_equal(generation("{\"temperature\": null, \"top_k\": null, \"do_sample\": null, \"eos_token_id\": null}", &g, &c, &err), MILLM_OK);
	assert_true(isnan(g.temperature) && g.top_k == -1 && c.n_eos == 1);
}

static void
generation_ignored(void **state)
{
	MillmGenerationConfig g;
	MillmConfig c;
	MillmError	err;

	(void) state;
	/* neutral values change nothing */
	assert_int_equal(generation("{\"num_beams\": 1, \"typical_p\": 1.0, \"no_repeat_ngram_size\": 0, \"bad_words_ids\": [], \"suppress_tokens\": null,"
								" \"renormalize_logits\": false, \"sequence_bias\": {}, \"token_healing\": false, \"use_cache\": true}", &g, &c, &err), MILLM_OK);
	assert_int_equal(g.n_ignored, 0);
	assert_int_equal(generation("{\"num_beams\": 4, \"stop_strings\": [\"x\"], \"renormalize_logits\": true}", &g, &c, &err), MILLM_OK);
	assert_int_equal(g.n_ignored, 3);
	assert_string_equal(g.ignored[0], "num_beams");
	assert_string_equal(g.ignored[1], "stop_strings");
	assert_string_equal(g.ignored[2], "renormalize_logits");
	/* more than have room are still counted */
	assert_int_equal(generation("{\"min_length\": 1, \"min_new_tokens\": 1, \"typical_p\": 0.5, \"no_repeat_ngram_size\": 1, \"num_beams\": 2,"
								" \"epsilon_cutoff\": 0.1, \"eta_cutoff\": 0.1, \"guidance_scale\": 2, \"penalty_alpha\": 1, \"num_beam_groups\": 2}", &g, &c, &err), MILLM_OK);
	assert_int_equal(g.n_ignored, 10);
}

static void
generation_bad(void **state)
{
	static const struct
	{
		const char *text;
		const char *expected;
	}			cases[] = {
		{"[]", "not a JSON object"}, {"{\"do_sample\": 1}", "\"do_sample\" in generation_config.json"}, {"{\"temperature\": -0.5}", "\"temperature\""},
		{"{\"temperature\": \"hot\"}", "\"temperature\""}, {"{\"temperature\": 1e30}", "\"temperature\""}, {"{\"top_k\": -1}", "\"top_k\""},
		{"{\"top_k\": 2.5}", "\"top_k\""}, {"{\"top_k\": 99999999999}", "\"top_k\""}, {"{\"top_p\": 1.5}", "\"top_p\""}, {"{\"min_p\": -1}", "\"min_p\""},
		{"{\"repetition_penalty\": 0}", "\"repetition_penalty\""}, {"{\"eos_token_id\": \"x\"}", "\"eos_token_id\" in generation_config.json"},
		{"{\"eos_token_id\": [1, -2]}", "It is -2"}, {"{\"eos_token_id\": {}}", "It is an object"},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		MillmGenerationConfig g;
		MillmConfig c;
		MillmError	err;

		assert_failure(generation(cases[i].text, &g, &c, &err), &err, MILLM_E_INVALID_MODEL_FILE, cases[i].expected);
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(llama),
		cmocka_unit_test(composite), cmocka_unit_test(kv_heads), cmocka_unit_test(sliding),
		cmocka_unit_test(mixtures),
		cmocka_unit_test(families),
		cmocka_unit_test(gpt2),
		cmocka_unit_test(two_spellings),
		cmocka_unit_test(rope),
		cmocka_unit_test(refused),
		cmocka_unit_test(not_a_config),
		cmocka_unit_test(long_architecture),
		cmocka_unit_test(generation_good),
		cmocka_unit_test(generation_ignored),
		cmocka_unit_test(generation_bad),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
