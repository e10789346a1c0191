/*
 * model.h -- a checkpoint on disk, opened: its resolved config and its weights, mapped in place.
 *
 * A MillmModel is immutable once open.  Everything that distinguishes a family from another
 * is data: one MillmArch row per model_type (arch.c) says how its config is spelled, how its
 * tensors are named and which of the few shapes its block has; the forward pass (engine/forward.c)
 * reads the resolved MillmConfig and the MillmLayer views and knows no model by name.
 */
#ifndef MILLM_MODEL_H
#define MILLM_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "tensor.h"

typedef enum MillmNorm {MILLM_NORM_RMS, MILLM_NORM_LAYER} MillmNorm;
/* Norms of q and k: each head by itself, by one weight for all [head_dim] or each by its own [heads, head_dim]; or all heads as one [heads * head_dim]. */
typedef enum MillmHeadNorms {MILLM_HEAD_NORMS_SHARED, MILLM_HEAD_NORMS_OWN, MILLM_HEAD_NORMS_WHOLE} MillmHeadNorms;
typedef enum MillmPosition {MILLM_POS_ROPE, MILLM_POS_LEARNED, MILLM_POS_ALIBI} MillmPosition;
typedef enum MillmAct {MILLM_ACT_SILU, MILLM_ACT_GELU_TANH, MILLM_ACT_GELU_ERF, MILLM_ACT_RELU,
	MILLM_ACT_SWIGLU_PAIRS		/* of gate and up side by side, clamped: kernel.h's swiglu_pairs */
} MillmAct;

/* Limits on what a config may claim; beyond them a file is refused, not believed. */
#define MILLM_MAX_LAYERS		1024
#define MILLM_MAX_HIDDEN		65536
#define MILLM_MAX_HEADS			1024
#define MILLM_MAX_HEAD_DIM		1024
#define MILLM_MAX_EXPERTS		1024
#define MILLM_MAX_VOCAB			(4 << 20)
#define MILLM_MAX_POSITIONS		(16 << 20)

/*
 * The angles of rope: position times these.  Two kinds of scaling have other frequencies for long sequences ("longrope", "dynamic");
 * a sequence keeps to those of the length that it was planned for, since its keys are rotated once.
 */
typedef struct MillmRope
{
	float	   *inv_freq;			/* [rotary_dim / 2], owned; NULL without rope */
	float		attention_factor;	/* multiplies cosine and sine */
	int			long_above;			/* longer sequences are long; 0: none is */
	float	   *long_inv_freq;		/* theirs, owned; NULL with long_above: theta grows with the length */
	double		theta, factor;		/* of these */
} MillmRope;

/* The resolved numbers and flags of one model: config.json, then aliases, then class defaults. */
typedef struct MillmConfig
{
	const struct MillmArch *arch;	/* the family's row (arch.h), which model.c binds by; the forward pass does not look at it */
	char		model_type[64];
	char		architecture[128];	/* architectures[0], or "" */
	int			hidden_size;
	int			intermediate_size;
	int			n_layers;
	int			n_heads;
	int			n_kv_heads;
	int			head_dim;
	int			vocab_size;			/* rows of the embedding */
	int			embedding_size;		/* its columns, and the LM head's: hidden_size, or what is projected from and to it */
	int			max_positions;
	int			max_context;		/* positions that may be asked for: max_positions, unless rope scaling stretches them */
	float		embedding_scale;	/* 1: none.  Once open, one that is the root of the hidden size is rounded to the embedding's dtype, as the library does */
	float		residual_scale;		/* of what attention and MLP add; 1: none */
	float		logit_scale;		/* 1: none */
	/* norms */
	MillmNorm	norm;
	bool		norm_after;			/* attn_norm and mlp_norm norm the residual, after attention and MLP were added to it */
	bool		norm_bias;
	bool		norm_plain;			/* norms of the residual have neither weight nor bias; once open the weights are ones */
	bool		residual_normed;	/* attention and MLP are added to the residual as their norm made it */
	bool		head_norms;			/* of q and k, before rope */
	MillmHeadNorms head_norm_kind;
	bool		norm_plus_one;		/* weights of norms are stored less 1; once open they are whole */
	float		norm_eps;
	/* positions */
	MillmPosition position;
	bool		rope_interleaved;	/* pairs (2j, 2j+1) instead of (j, j + r/2) */
	int			rotary_dim;			/* r: dims of each head that rotate */
	MillmRope	rope;
	MillmRope	local_rope;			/* of the layers that slide; inv_freq NULL: as the others */
	float	   *alibi_slopes;		/* [n_heads], owned; NULL without ALiBi: a key's position times this is added to its score */
	bool		alibi_rounded;		/* Falcon's: that product is rounded to bfloat16, and scaled as the score is */
	/* attention and block */
	bool		parallel;			/* attention and MLP read the same residual; without mlp_norm, as attn_norm made it */
	float		attention_scale;	/* multiplies q.k; layer_inv_scale divides it by (layer + 1) */
	bool		layer_inv_scale;
	float		attention_softcap;	/* c: scores become c tanh(score / c); 0: none */
	float		logit_softcap;		/* the same for the logits */
	int			window;				/* keys that a query sees in a layer that slides, itself included; 0: none slides */
	bool		slides[MILLM_MAX_LAYERS];
	bool		unrotated[MILLM_MAX_LAYERS];	/* no rope there */
	MillmAct	act;
	bool		mlp_gated;
	bool		qkv_bias, o_bias, mlp_bias, head_bias;
	/* mixtures of experts */
	int			n_experts;			/* 0: there are none */
	int			n_chosen;			/* experts that a token takes */
	int			expert_size;		/* of each, as intermediate_size; of the shared one, 0 when there is none */
	int			shared_expert_size;
	bool		has_fused_experts;	/* stored as tensors of all of a layer's: no Linears, never quantized by bitsandbytes */
	bool		experts_sum_to_one;	/* the weights of a token's experts do; else they are parts of a softmax over all */
	bool		is_mixture[MILLM_MAX_LAYERS];	/* layers that have them, the others have an MLP */
	bool		tied;				/* the LM head is the embedding; once open: it is, whatever the file says */
	/* ids that end a text */
	int			eos_ids[32];
	int			n_eos;
} MillmConfig;

/* Sampling defaults of generation_config.json; NAN or -1 where it says nothing. */
typedef struct MillmGenerationConfig
{
	bool		do_sample;
	float		temperature;
	int			top_k;
	float		top_p;
	float		min_p;
	float		repetition_penalty;
	int			n_ignored;			/* keys that would change the output and are not honoured; may be more than fit below */
	char		ignored[8][48];
} MillmGenerationConfig;

/* A vector of float parameters (norm weight, bias): any float dtype in the file, float32 here. NULL data: absent. */
typedef struct MillmVector
{
	float	   *data;			/* [n], owned by the model, 64-byte aligned */
	int64_t		n;
} MillmVector;

/* An expert: y = down(act(gate(x)) * up(x)); without a gate, y = down(act(up(x))) of an act of pairs.  Biases are slices of the layer's. */
typedef struct MillmMlp
{
	MillmWeight gate, up, down;
	MillmVector up_bias, down_bias;
} MillmMlp;

/* One transformer block.  Sizes are per layer because newer families vary them. */
typedef struct MillmLayer
{
	int			n_heads;
	int			n_kv_heads;
	int			head_dim;
	int			window;			/* 0: full attention */
	MillmVector sinks;			/* [n_heads]: a score of each head that no key has; optional */
	bool		unrotated;		/* no rope */
	MillmVector attn_norm, attn_norm_bias;	/* optional */
	MillmVector attn_post_norm, mlp_post_norm;	/* of what is added to the residual; optional */
	MillmWeight q, k, v, o;
	MillmWeight qkv;			/* instead of q, k, v, whose data is NULL: KV head after KV head, the queries of its group, k, v */
	MillmVector q_bias, k_bias, v_bias, o_bias, qkv_bias;
	MillmVector q_norm, k_norm;	/* before rope, as head_norm_kind says; optional */
	MillmVector q_norm_bias, k_norm_bias;
	MillmVector mlp_norm, mlp_norm_bias;	/* optional */
	MillmWeight gate, up, down;	/* gate is absent without mlp_gated */
	MillmVector gate_bias, up_bias, down_bias;
	/* in place of these, in a layer with a mixture of experts */
	MillmMlp   *experts;		/* [n_experts], owned; NULL: an MLP */
	MillmWeight router;			/* [n_experts, hidden]: the scores */
	MillmVector router_bias;
	MillmVector experts_up_bias, experts_down_bias;	/* [n_experts * ...], one expert after the other */
	MillmMlp	shared;			/* every token's; optional */
	MillmWeight shared_router;	/* [1, hidden]: it counts by the sigmoid of its score */
} MillmLayer;

/* An INT8 copy of the LM head that tells which rows cannot be among the largest logits (quant/screen.h); optional. */
typedef struct MillmScreen
{
	MillmWeight codes;			/* [vocab, embedding size]; data NULL: there is none */
	MillmVector error;			/* [vocab]; +infinity where nothing is known */
} MillmScreen;

/* What an embedding is made of: of the last hidden states of a text's tokens, in this order, one part each. */
typedef enum MillmPoolingMode {
	MILLM_POOL_FIRST,				/* token's */
	MILLM_POOL_MAX,
	MILLM_POOL_MEAN,
	MILLM_POOL_SUM_BY_ROOT,			/* the sum, divided by the root of the number of tokens */
	MILLM_POOL_WEIGHTED_MEAN,		/* token i counts i times, from 1 on */
	MILLM_POOL_LAST,				/* token's */
	MILLM_N_POOLING_MODES
} MillmPoolingMode;

/* How a text's embedding is made: what the repository's sentence-transformers files say, or else the mean, normalized. */
typedef struct MillmPooling
{
	MillmPoolingMode modes[MILLM_N_POOLING_MODES];
	int			n_modes;
	bool		normalized;		/* to length 1 */
	int			max_tokens;		/* a text of more is refused; 0: no other limit than the context */
	char	   *prompt;			/* stands before each text, owned; NULL: nothing does */
	MillmError	refused;		/* why no embedding can be had; code MILLM_OK: it can */
} MillmPooling;

typedef struct MillmModel
{
	MillmConfig config;
	MillmGenerationConfig generation;
	MillmPooling pooling;
	MillmWeight embedding;		/* [vocab, embedding size] */
	MillmVector embedding_norm, embedding_norm_bias;	/* of its rows; optional */
	MillmWeight project_in, project_out;	/* [hidden, embedding size] and back; absent where these are the same */
	MillmWeight position_embedding;	/* [positions, hidden]; absent with rope */
	MillmLayer *layers;			/* [n_layers] */
	MillmVector final_norm, final_norm_bias;	/* optional */
	MillmWeight head;			/* [vocab, embedding size]; the embedding when tied */
	MillmVector head_bias;
	MillmScreen screen;			/* of the head */
	char		screen_refused[256];	/* why the file that is there is not used; "" */
	int64_t		n_params;		/* as stored, tied weights once */
	uint64_t	weights_bytes;	/* bytes of tensor data mapped, the screening copy's too */
	char		dtype[8];		/* "BF16", "F16", "F32" of the embedding, for people */
	const char *quantization;	/* "nf4", "fp4", "int8" of the Linears, "mxfp4" of fused experts; NULL: none.  A checkpoint that mixes them shows one of them */
	struct MillmModelFiles *files;	/* the mappings; model.c's */
} MillmModel;

/*
 * Open the directory dir: config.json, generation_config.json, model.safetensors or the shards
 * of its index; and the LM head's screening copy when it is there.  On MILLM_OK the caller owns *out.
 *
 * UNSUPPORTED_ARCHITECTURE (unknown model_type, or a known one with a flag we do not implement),
 * UNSUPPORTED (a quantization_config of another method than bitsandbytes, and what else we name), MODEL_FILES_MISSING, INVALID_MODEL_FILE
 * (damaged or contradictory files; the detail has the figures).
 */
extern MillmCode millm_model_open(const char *dir, MillmModel **out, MillmError *err);
extern void millm_model_close(MillmModel *model);	/* NULL is fine */

/* Ask the kernel to read the mapped weights into the page cache now; reports 0..100.  False: progress, which may be NULL, has said stop. */
extern bool millm_model_populate(const MillmModel *model, bool (*progress) (void *arg, int percent), void *arg);

/* "FP16" (not quantized), "Q4" or "Q8"; static. */
extern const char *millm_model_quantization(const MillmModel *model);
/*
 * weights_bytes as that quantization; exact for the model's own.  Others are of its shapes: Linears as millm-hub would write them (or
 * with 16 bits), a screening copy where there would be one, other matrices in F32 with 16 bits, everything else as it is.
 */
extern int64_t millm_model_weights_bytes_as(const MillmModel *model, const char *quantization);

/*
 * What millm.architecture() shows: type, sizes as resolved, torch_dtype, quantization, params, weights_bytes, files, hook_points.  A new
 * reference, or NULL when memory is out.
 */
extern struct json_t *millm_model_inspect_json(const MillmModel *model);

/* Test support (mutate.c): names of the flags that can be falsified, NULL past the last; and do it. */
extern const char *millm_mutation_name(int i);
extern MillmCode millm_model_mutate(MillmModel *model, const char *flag, MillmError *err);

/* Whether a screening copy of the LM head is of use: it knows nothing of what is done to the logits after, and a sampler's margin is one of these. */
extern bool millm_config_can_screen(const MillmConfig *config);

/* Names of the supported model types, comma-separated ("gpt2, llama"). */
extern const char *millm_supported_model_types(void);

/*
 * Check config.json text alone (before a download): resolve it, fill *config (millm_config_free()).
 * Same errors as millm_model_open() for what a config can show.
 */
extern MillmCode millm_config_parse(const char *json, size_t len, MillmConfig *config, MillmError *err);
extern void millm_config_free(MillmConfig *config);

/* The frequencies, [rotary_dim / 2], of a sequence planned for that many positions: the rope's own, or in computed, a buffer of that size. */
extern const float *millm_rope_frequencies(const MillmRope *rope, int rotary_dim, int length, float *computed);
/* Of a sequence planned for length: 0, or more where it is rotated as a long one; equal numbers are rotated alike. */
extern int	millm_rope_kind(const MillmRope *rope, int length);

#endif
