/*
 * arch.c -- the architecture table.  Sources: transformers' configuration_*.py and modeling_*.py of each type.
 */
#include "arch.h"

#include <stddef.h>
#include <string.h>

/* What the families that descend from Llama share, in pieces that a row takes or not. */
#define LLAMA_SIZES \
	.hidden_size = {"hidden_size"}, .intermediate_size = {"intermediate_size"}, .n_layers = {"num_hidden_layers"}, \
	.n_heads = {"num_attention_heads"}, .max_positions = {"max_position_embeddings"}
#define LLAMA_HEADS .n_kv_heads = {"num_key_value_heads"}, .head_dim = {"head_dim"}
#define LLAMA_KEYS LLAMA_SIZES, LLAMA_HEADS, .norm_eps = {"rms_norm_eps"}
#define LLAMA_BLOCK \
	.norm = MILLM_NORM_RMS, .position = MILLM_POS_ROPE, .mlp_gated = true, .ignored = {".rotary_emb.inv_freq"}
#define LLAMA_ENDS .prefix = "model.", .embedding = "embed_tokens", .head = "lm_head"
#define LLAMA_BODY \
	.final_norm = "norm", .attn_norm = "layers.{i}.input_layernorm", .o = "layers.{i}.self_attn.o_proj", .down = "layers.{i}.mlp.down_proj"
#define LLAMA_NAMES LLAMA_ENDS, LLAMA_BODY
#define LLAMA_QKV \
	.q = "layers.{i}.self_attn.q_proj", .k = "layers.{i}.self_attn.k_proj", .v = "layers.{i}.self_attn.v_proj"
#define LLAMA_MLP_NORM .mlp_norm = "layers.{i}.post_attention_layernorm"
#define LLAMA_GATE_UP .gate = "layers.{i}.mlp.gate_proj", .up = "layers.{i}.mlp.up_proj"
#define GEMMA_BLOCK \
	.norm = MILLM_NORM_RMS, .norm_plus_one = true, .embedding_scaled = true, .position = MILLM_POS_ROPE, .mlp_gated = true, \
	.default_norm_eps = 1e-6, .default_act = "gelu_pytorch_tanh", .default_head_dim = 256, .default_tied = true, \
	.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}
#define SANDWICH_NORMS \
	.attn_post_norm = "layers.{i}.post_attention_layernorm", .mlp_norm = "layers.{i}.pre_feedforward_layernorm", \
	.mlp_post_norm = "layers.{i}.post_feedforward_layernorm"
#define HEAD_NORMS .head_norms = {.by_default = true}, .q_norm = "layers.{i}.self_attn.q_norm", .k_norm = "layers.{i}.self_attn.k_norm"
#define QWEN_SLIDING \
	.sliding = {.possible = true, .default_window = 4096, .switch_key = "use_sliding_window", .first_key = "max_window_layers", .default_first = 28}
#define QWEN_MIXTURE(n, chosen, width) \
	.possible = true, .default_n = n, .default_chosen = chosen, .size_key = "moe_intermediate_size", .default_size = width, .sum_switch = "norm_topk_prob", \
	.step_key = "decoder_sparse_step", .dense_key = "mlp_only_layers", .router = "layers.{i}.mlp.gate", .gate = "layers.{i}.mlp.{e}.gate_proj", \
	.up = "layers.{i}.mlp.{e}.up_proj", .down = "layers.{i}.mlp.{e}.down_proj"

#define NEOX \
	.model_type = "gpt_neox", LLAMA_SIZES, .norm_eps = {"layer_norm_eps"}, .act = {"hidden_act"}, \
	.default_norm_eps = 1e-5, .rope_theta = {"rotary_emb_base", "rope_theta"}, .default_rope_theta = 10000.0, \
	.rotary_part = {"rotary_pct", "partial_rotary_factor"}, .default_rotary_part = 0.25, .default_max_positions = 2048, .default_act = "gelu", \
	.norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_ROPE, \
	.qkv_bias = {.by_default = true, .key = "attention_bias"}, .o_bias = {.by_default = true, .key = "attention_bias"}, .mlp_bias = {.by_default = true}, \
	.prefix = "gpt_neox.", .embedding = "embed_in", .final_norm = "final_layer_norm", .head = "embed_out", \
	.attn_norm = "layers.{i}.input_layernorm", .mlp_norm = "layers.{i}.post_attention_layernorm", \
	.grouped_qkv = "layers.{i}.attention.query_key_value", .o = "layers.{i}.attention.dense", \
	.up = "layers.{i}.mlp.dense_h_to_4h", .down = "layers.{i}.mlp.dense_4h_to_h", \
	.ignored = {".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"}

#define STABLELM \
	.model_type = "stablelm", LLAMA_SIZES, .n_kv_heads = {"num_key_value_heads"}, .norm_eps = {"layer_norm_eps"}, .act = {"hidden_act"}, \
	.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .rotary_part = {"partial_rotary_factor", "rope_pct"}, .default_rotary_part = 0.25, \
	.default_n_kv_heads = 32, .default_max_positions = 4096, .default_act = "silu", \
	.norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_ROPE, .mlp_gated = true, .qkv_bias = {.key = "use_qkv_bias"}, \
	.head_norms = {.key = "qk_layernorm"}, .head_norm_kind = MILLM_HEAD_NORMS_OWN, \
	.q_norm = "layers.{i}.self_attn.q_layernorm.norms.{h}", .k_norm = "layers.{i}.self_attn.k_layernorm.norms.{h}", \
	LLAMA_NAMES, LLAMA_QKV, LLAMA_GATE_UP, .ignored = {".rotary_emb.inv_freq"}

#define OPT \
	.model_type = "opt", .hidden_size = {"hidden_size"}, .intermediate_size = {"ffn_dim"}, .n_layers = {"num_hidden_layers"}, \
	.n_heads = {"num_attention_heads"}, .max_positions = {"max_position_embeddings"}, .act = {"activation_function"}, \
	.embedding_size = "word_embed_proj_dim", .default_norm_eps = 1e-5, .default_max_positions = 2048, .default_act = "relu", .default_tied = true, \
	.norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_LEARNED, .position_offset = 2, \
	.qkv_bias = {.by_default = true, .key = "enable_bias"}, .o_bias = {.by_default = true, .key = "enable_bias"}, \
	.mlp_bias = {.by_default = true, .key = "enable_bias"}, \
	.prefix = "model.decoder.", .embedding = "embed_tokens", .position_embedding = "embed_positions", .head = "lm_head", \
	.project_in = "project_in", .project_out = "project_out", \
	.attn_norm = "layers.{i}.self_attn_layer_norm", .mlp_norm = "layers.{i}.final_layer_norm", LLAMA_QKV, \
	.o = "layers.{i}.self_attn.out_proj", .up = "layers.{i}.fc1", .down = "layers.{i}.fc2", \
	.ignored = {"decoder.version"}, .norm_switch = "layer_norm_elementwise_affine"

#define FALCON \
	.model_type = "falcon", .hidden_size = {"n_embed", "hidden_size"}, .intermediate_size = {"ffn_hidden_size"}, .n_layers = {"num_hidden_layers", "n_layer"}, \
	.n_heads = {"num_attention_heads", "n_head"}, .max_positions = {"max_position_embeddings"}, .norm_eps = {"layer_norm_epsilon"}, .act = {"activation"}, \
	.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .default_max_positions = 2048, .default_act = "gelu", .default_ffn_mult = 4, .default_tied = true, \
	.norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_ROPE, .alibi = {.key = "alibi"}, .alibi_rounded = true, \
	.qkv_bias = {.key = "bias"}, .o_bias = {.key = "bias"}, .mlp_bias = {.key = "bias"}, \
	.prefix = "transformer.", .embedding = "word_embeddings", .final_norm = "ln_f", .head = "lm_head", \
	.grouped_qkv = "h.{i}.self_attention.query_key_value", .o = "h.{i}.self_attention.dense", \
	.up = "h.{i}.mlp.dense_h_to_4h", .down = "h.{i}.mlp.dense_4h_to_h", .ignored = {".inv_freq"}
#define FALCON_KV_HEADS .n_kv_heads = {"num_kv_heads", "n_head_kv"}
#define FALCON_MULTI_QUERY .multi_query = {.by_default = true, .key = "multi_query"}

#define GEMMA3 \
	LLAMA_KEYS, GEMMA_BLOCK, LLAMA_QKV, SANDWICH_NORMS, LLAMA_GATE_UP, HEAD_NORMS, .act = {"hidden_activation"}, \
	.default_rope_theta = 1000000.0, .local_theta_key = "rope_local_base_freq", .default_local_theta = 10000.0, .default_n_kv_heads = 4, \
	.default_max_positions = 131072, .default_n_heads = 8, .default_vocab_size = 262208, \
	.scale_key = "query_pre_attn_scalar", .default_scale_key = 256, .logit_softcap_key = "final_logit_softcapping", \
	.sliding = {.possible = true, .default_window = 4096, .every_key = {"sliding_window_pattern", "_sliding_window_pattern"}, .default_every = 6}, \
	.refused = {"attn_logit_softcapping"}

static const MillmArch archs[] = {
	{
		/* GPT-2, DistilGPT2: learned positions, LayerNorm, Conv1D weights stored [in, out], one fused c_attn */
		.model_type = "gpt2",
		.hidden_size = {"n_embd", "hidden_size"}, .intermediate_size = {"n_inner"}, .n_layers = {"n_layer", "num_hidden_layers"},
		.n_heads = {"n_head", "num_attention_heads"}, .max_positions = {"n_positions", "n_ctx", "max_position_embeddings"},
		.norm_eps = {"layer_norm_epsilon"}, .act = {"activation_function"},
		.default_norm_eps = 1e-5, .default_max_positions = 1024, .default_act = "gelu_new", .default_ffn_mult = 4, .default_tied = true,
		.norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_LEARNED, .in_out = true,
		.qkv_bias = {.by_default = true}, .o_bias = {.by_default = true}, .mlp_bias = {.by_default = true},
		.scale_switch = "scale_attn_weights", .layer_inv_scale_switch = "scale_attn_by_inverse_layer_idx",
		.prefix = "transformer.", .embedding = "wte", .position_embedding = "wpe", .final_norm = "ln_f", .head = "lm_head",
		.attn_norm = "h.{i}.ln_1", .mlp_norm = "h.{i}.ln_2", .qkv = "h.{i}.attn.c_attn", .o = "h.{i}.attn.c_proj",
		.up = "h.{i}.mlp.c_fc", .down = "h.{i}.mlp.c_proj",
		.ignored = {".attn.bias", ".attn.masked_bias"},
		.refused = {"add_cross_attention"},
	},
	{
		/* BLOOM, BLOOMZ: ALiBi; the embedding is normed */
		.model_type = "bloom",
		.hidden_size = {"n_embed", "hidden_size"}, .n_layers = {"n_layer", "num_hidden_layers"}, .n_heads = {"n_head", "num_attention_heads"},
		.max_positions = {"seq_length"}, .norm_eps = {"layer_norm_epsilon"},
		.default_norm_eps = 1e-5, .default_max_positions = 2048, .default_act = "gelu_new", .default_ffn_mult = 4, .default_tied = true,
		.norm = MILLM_NORM_LAYER, .norm_bias = true, .alibi = {.by_default = true},
		.qkv_bias = {.by_default = true}, .o_bias = {.by_default = true}, .mlp_bias = {.by_default = true},
		.prefix = "transformer.", .embedding = "word_embeddings", .embedding_norm = "word_embeddings_layernorm", .final_norm = "ln_f", .head = "lm_head",
		.attn_norm = "h.{i}.input_layernorm", .mlp_norm = "h.{i}.post_attention_layernorm",
		.grouped_qkv = "h.{i}.self_attention.query_key_value", .o = "h.{i}.self_attention.dense",
		.up = "h.{i}.mlp.dense_h_to_4h", .down = "h.{i}.mlp.dense_4h_to_h",
		.residual_normed_key = "apply_residual_connection_post_layernorm",
	},
	{
		/* Command R, R+, Aya: attention and MLP read one LayerNorm, which has no bias; interleaved rope */
		.model_type = "cohere",
		LLAMA_SIZES, LLAMA_HEADS, LLAMA_NAMES, LLAMA_QKV, LLAMA_GATE_UP, .norm_eps = {"layer_norm_eps"}, .act = {"hidden_act"},
		.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .default_max_positions = 8192, .default_act = "silu", .default_tied = true,
		.parallel = true, .norm = MILLM_NORM_LAYER, .position = MILLM_POS_ROPE, .rope_interleaved = true, .mlp_gated = true,
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}, .logit_scale_key = "logit_scale", .default_logit_scale = 0.0625,
		.head_norms = {.key = "use_qk_norm"}, .head_norm_kind = MILLM_HEAD_NORMS_OWN,
		.q_norm = "layers.{i}.self_attn.q_norm", .k_norm = "layers.{i}.self_attn.k_norm", .ignored = {".rotary_emb.inv_freq"},
	},
	{
		/* Falcon 2 11B */
		FALCON, FALCON_KV_HEADS, .only_if = {{"new_decoder_architecture", true, false}, {"num_ln_in_parallel_attn", 1, 2}},
		.parallel = true, .attn_norm = "h.{i}.input_layernorm",
	},
	{
		/* Falcon 40B, 180B: attention and MLP have a norm each */
		FALCON, FALCON_KV_HEADS, .only_if = {{"new_decoder_architecture", true, false}},
		.parallel = true, .attn_norm = "h.{i}.ln_attn", .mlp_norm = "h.{i}.ln_mlp",
	},
	{
		/* Falcon 7B: they share one, and all heads a key and a value */
		FALCON, FALCON_MULTI_QUERY, .only_if = {{"parallel_attn", true, true}},
		.parallel = true, .attn_norm = "h.{i}.input_layernorm",
	},
	{
		/* Falcon RW 1B, 7B: ALiBi */
		FALCON, FALCON_MULTI_QUERY,
		.attn_norm = "h.{i}.input_layernorm", .mlp_norm = "h.{i}.post_attention_layernorm",
	},
	{
		/* GLM-4 0414: norms before and after, under names of its own; interleaved rope of half a head */
		.model_type = "glm4",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, .act = {"hidden_act"},
		.default_norm_eps = 1.5625e-7, .default_rope_theta = 10000.0, .default_rotary_part = 0.5, .default_n_kv_heads = 2, .default_max_positions = 131072, .default_act = "silu",
		.default_head_dim = 128, .rope_interleaved = true, .qkv_bias = {.by_default = true, .key = "attention_bias"},
		.attn_post_norm = "layers.{i}.post_self_attn_layernorm", .mlp_post_norm = "layers.{i}.post_mlp_layernorm",
		.gate_up = "layers.{i}.mlp.gate_up_proj",
	},
	{
		/* Granite 3: Llama with factors */
		.model_type = "granite",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_max_positions = 2048, .default_act = "silu",
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}, .mlp_bias = {.key = "mlp_bias"},
		.embedding_scale_key = "embedding_multiplier", .residual_scale_key = "residual_multiplier",
		.attention_scale_key = "attention_multiplier", .logit_divisor_key = "logits_scaling",
	},
	{
		/* gpt-oss 20B, 120B: sinks, every other layer slides, experts of pairs in MXFP4 */
		.model_type = "gpt_oss",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, .act = {"hidden_act"},
		.default_norm_eps = 1e-5, .default_rope_theta = 150000.0, .rope_is_scaled = true, .default_n_kv_heads = 8, .default_max_positions = 131072, .default_act = "silu", .default_head_dim = 64,
		.qkv_bias = {.by_default = true}, .o_bias = {.by_default = true}, .sinks = "layers.{i}.self_attn.sinks",
		.sliding = {.possible = true, .default_window = 128, .default_every = 2},
		.mixture = {.possible = true, .default_n = 128, .default_chosen = 4, .router = "layers.{i}.mlp.router", .router_bias = true,
			.fused_gate_up = "layers.{i}.mlp.experts.gate_up_proj", .fused_down = "layers.{i}.mlp.experts.down_proj"},
	},
	{
		/* Gemma: old files say "gelu" and mean its approximation */
		.model_type = "gemma",
		LLAMA_KEYS, GEMMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_activation", "hidden_act"},
		.default_rope_theta = 10000.0, .default_n_kv_heads = 16, .default_max_positions = 8192, .legacy_gelu_is_tanh = true,
	},
	{
		/* Gemma 2: norms before and after, softcaps, every other layer slides */
		.model_type = "gemma2",
		LLAMA_KEYS, GEMMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, SANDWICH_NORMS, LLAMA_GATE_UP, .act = {"hidden_activation"},
		.default_rope_theta = 10000.0, .default_n_kv_heads = 4, .default_max_positions = 8192,
		.scale_key = "query_pre_attn_scalar", .default_scale_key = 256,
		.attention_softcap_key = "attn_logit_softcapping", .default_attention_softcap = 50,
		.logit_softcap_key = "final_logit_softcapping", .default_logit_softcap = 30,
		.sliding = {.possible = true, .default_window = 4096, .default_every = 2},
	},
	{
		/* Gemma 3 4B, 12B, 27B: the text model of one that also sees */
		.model_type = "gemma3", .text_config = "text_config",
		LLAMA_BODY, GEMMA3, .prefix = "language_model.model.", .embedding = "embed_tokens", .head = "lm_head", .other_prefix = "model.language_model.",
		.foreign = {"vision_tower.", "multi_modal_projector."},
	},
	{
		/* Gemma 3's text model: norms of the heads, five layers of six slide and rotate faster.  transformers reads the softcap of scores, and ignores it */
		.model_type = "gemma3_text",
		LLAMA_NAMES, GEMMA3,
	},
	{
		/* Pythia, GPT-NeoX-20B, Dolly: attention and MLP beside each other, each with its norm, or, rarely, one after the other */
		NEOX, .only_if = {{"use_parallel_residual", true, true}}, .parallel = true,
	},
	{
		NEOX,
	},
	{
		/* Llama 2 and 3, SmolLM, TinyLlama, R1-Distill-Llama, Vicuna, Yi */
		.model_type = "llama",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_max_positions = 2048, .default_act = "silu",
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}, .mlp_bias = {.key = "mlp_bias"},
	},
	{
		/* Mistral 7B, Nemo, Small: a window in all layers, or in none */
		.model_type = "mistral",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_n_kv_heads = 8, .default_max_positions = 131072, .default_act = "silu",
		.sliding = {.possible = true, .default_window = 4096},
	},
	{
		/* Mixtral 8x7B, 8x22B: of the intermediate size are its experts */
		.model_type = "mixtral",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, .act = {"hidden_act"},
		.default_norm_eps = 1e-5, .default_rope_theta = 1000000.0, .default_n_kv_heads = 8, .default_max_positions = 131072, .default_act = "silu",
		.sliding = {.possible = true},
		.mixture = {.possible = true, .default_n = 8, .default_chosen = 2, .router = "layers.{i}.block_sparse_moe.gate",
			.gate = "layers.{i}.block_sparse_moe.{e}.w1", .up = "layers.{i}.block_sparse_moe.{e}.w3", .down = "layers.{i}.block_sparse_moe.{e}.w2"},
	},
	{
		/* OLMo 2: no norm before attention and MLP, one behind each; q and k are normed as wholes */
		.model_type = "olmo2",
		LLAMA_KEYS, LLAMA_ENDS, LLAMA_QKV, LLAMA_GATE_UP, HEAD_NORMS, .act = {"hidden_act"}, LLAMA_BLOCK,
		.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .default_max_positions = 2048, .default_act = "silu",
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}, .head_norm_kind = MILLM_HEAD_NORMS_WHOLE,
		.final_norm = "norm", .attn_post_norm = "layers.{i}.post_attention_layernorm", .mlp_post_norm = "layers.{i}.post_feedforward_layernorm",
		.o = "layers.{i}.self_attn.o_proj", .down = "layers.{i}.mlp.down_proj",
	},
	{
		/* OPT: positions from 2 on */
		OPT, .only_if = {{"do_layer_norm_before", true, true}, {"_remove_final_layer_norm", false, false}}, .final_norm = "final_layer_norm",
	},
	{
		/* OPT as fine-tuned before transformers 4.20 */
		OPT, .only_if = {{"do_layer_norm_before", true, true}},
	},
	{
		/* OPT 350M */
		OPT, .norm_after = true,
	},
	{
		/* Phi-1, 1.5, 2: attention and MLP read one norm, biases everywhere, the head's included */
		.model_type = "phi",
		LLAMA_SIZES, LLAMA_HEADS, LLAMA_ENDS, LLAMA_QKV, .norm_eps = {"layer_norm_eps"}, .act = {"hidden_act"},
		.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .default_rotary_part = 0.5, .default_max_positions = 2048, .default_act = "gelu_new",
		.parallel = true, .norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_ROPE,
		.qkv_bias = {.by_default = true}, .o_bias = {.by_default = true}, .mlp_bias = {.by_default = true}, .head_bias = true,
		.head_norms = {.key = "qk_layernorm"}, .head_norm_bias = true,
		.q_norm = "layers.{i}.self_attn.q_layernorm", .k_norm = "layers.{i}.self_attn.k_layernorm",
		.final_norm = "final_layernorm", .attn_norm = "layers.{i}.input_layernorm", .o = "layers.{i}.self_attn.dense", .up = "layers.{i}.mlp.fc1", .down = "layers.{i}.mlp.fc2",
		.ignored = {".rotary_emb.inv_freq"},
	},
	{
		/* Phi-3, 3.5, 4: q, k, v in one tensor, gate and up in another */
		.model_type = "phi3",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_MLP_NORM, .act = {"hidden_act"},
		.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .default_max_positions = 4096, .default_act = "silu",
		.yarn_is_longrope = true, .default_original_positions = 4096, .sliding = {.possible = true},
		.qkv = "layers.{i}.self_attn.qkv_proj", .gate_up = "layers.{i}.mlp.gate_up_proj",
	},
	{
		/* Qwen1.5, 2, 2.5, R1-Distill-Qwen: biases on q, k, v and nowhere else */
		.model_type = "qwen2",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_n_kv_heads = 32, .default_max_positions = 32768, .default_act = "silu",
		.qkv_bias = {.by_default = true}, QWEN_SLIDING,
	},
	{
		/* Qwen1.5-MoE, Qwen2-57B-A14B: a shared expert.  All layers slide, or none, as transformers 4 has it; 5 has another rule, and writes layer_types */
		.model_type = "qwen2_moe",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_n_kv_heads = 16, .default_max_positions = 32768, .default_act = "silu",
		.qkv_bias = {.by_default = true, .key = "qkv_bias"},
		.mixture = {QWEN_MIXTURE(60, 4, 1408), .shared_size_key = "shared_expert_intermediate_size", .default_shared_size = 5632,
			.shared_router = "layers.{i}.mlp.shared_expert_gate"},
		.sliding = {.possible = true, .default_window = 4096, .switch_key = "use_sliding_window"},
		.refused = {"mlp_layer_types"},
	},
	{
		/* Qwen3: norms of the heads of q and k */
		.model_type = "qwen3",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_n_kv_heads = 32, .default_max_positions = 32768, .default_act = "silu", .default_head_dim = 128,
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}, QWEN_SLIDING, HEAD_NORMS,
	},
	{
		/* Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder: all layers slide, or none */
		.model_type = "qwen3_moe",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, HEAD_NORMS, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 10000.0, .default_n_kv_heads = 4, .default_max_positions = 32768, .default_act = "silu",
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"},
		.sliding = {.possible = true, .default_window = 4096, .switch_key = "use_sliding_window"},
		.mixture = {QWEN_MIXTURE(128, 8, 768)},
		.refused = {"mlp_layer_types"},
	},
	{
		/* SmolLM3: every fourth layer without rope */
		.model_type = "smollm3",
		LLAMA_KEYS, LLAMA_BLOCK, LLAMA_NAMES, LLAMA_QKV, LLAMA_MLP_NORM, LLAMA_GATE_UP, .act = {"hidden_act"},
		.default_norm_eps = 1e-6, .default_rope_theta = 2000000.0, .default_n_kv_heads = 4, .default_max_positions = 32768, .default_act = "silu", .default_tied = true,
		.qkv_bias = {.key = "attention_bias"}, .o_bias = {.key = "attention_bias"}, .mlp_bias = {.key = "mlp_bias"},
		.unrotated_key = "no_rope_layers", .unrotated_every_key = {"no_rope_layer_interval"}, .default_unrotated_every = 4,
		.sliding = {.possible = true, .switch_key = "use_sliding_window", .unrotated_only = true},
	},
	{
		/* StableLM 2 12B: attention and MLP read one norm */
		STABLELM, .only_if = {{"use_parallel_residual", true, false}}, .parallel = true,
	},
	{
		/* StableLM 3B, StableLM 2 1.6B */
		STABLELM, LLAMA_MLP_NORM,
	},
	{
		/* StarCoder 2: Llama's names and GPT-2's MLP */
		.model_type = "starcoder2",
		LLAMA_SIZES, LLAMA_HEADS, LLAMA_ENDS, LLAMA_QKV, LLAMA_MLP_NORM, .norm_eps = {"norm_epsilon"}, .act = {"hidden_act"},
		.default_norm_eps = 1e-5, .default_rope_theta = 10000.0, .default_n_kv_heads = 2, .default_max_positions = 4096, .default_act = "gelu_pytorch_tanh", .default_tied = true,
		.norm = MILLM_NORM_LAYER, .norm_bias = true, .position = MILLM_POS_ROPE, .sliding = {.possible = true},
		.qkv_bias = {.by_default = true, .key = "use_bias"}, .o_bias = {.by_default = true, .key = "use_bias"},
		.mlp_bias = {.by_default = true, .key = "use_bias"},
		.final_norm = "norm", .attn_norm = "layers.{i}.input_layernorm", .o = "layers.{i}.self_attn.o_proj",
		.up = "layers.{i}.mlp.c_fc", .down = "layers.{i}.mlp.c_proj", .ignored = {".rotary_emb.inv_freq"},
	},
};

const MillmArch *
millm_arch_find(const char *model_type, int i)
{
	for (size_t k = 0; k < sizeof(archs) / sizeof(archs[0]); k++)
		if (strcmp(archs[k].model_type, model_type) == 0 && i-- == 0)
			return &archs[k];
	return NULL;
}

bool
millm_arch_is_foreign(const MillmArch *arch, const char *tensor)
{
	if (strncmp(tensor, "model.", 6) == 0)
		tensor += 6;
	for (size_t k = 0; k < sizeof(arch->foreign) / sizeof(arch->foreign[0]) && arch->foreign[k]; k++)
		if (strncmp(tensor, arch->foreign[k], strlen(arch->foreign[k])) == 0)
			return true;
	return false;
}

const char *
millm_supported_model_types(void)
{
	return "bloom, cohere, falcon, gemma, gemma2, gemma3, gemma3_text, glm4, gpt2, gpt_neox, gpt_oss, granite, llama, mistral, mixtral, olmo2, opt, phi, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe, smollm3, stablelm, starcoder2";
}
