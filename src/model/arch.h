/*
 * arch.h -- what distinguishes one model family from another, as data.
 *
 * A MillmArch is a static row: how the family spells its config.json, how it names its tensors, and which of
 * the few shapes its block has.  A family whose members differ in more than single values has a row for each
 * shape.  config.c resolves a config against a row, model.c binds tensors by it; no
 * other code knows a family by name.  A new family is a row in arch.c and a fixture in the tests.
 */
#ifndef MILLM_ARCH_H
#define MILLM_ARCH_H

#include <stdbool.h>

#include "model.h"

/* Whether a bias (or another optional part) exists: as a boolean key of the config says; without a key, or without it in the file, by_default. */
typedef struct MillmWhen
{
	bool		by_default;
	const char *key;
} MillmWhen;

/* A boolean or integer key of the config must have this value; without the key in the file, it has by_default. */
typedef struct MillmCondition
{
	const char *key;
	int			value;
	int			by_default;
} MillmCondition;

/* Spellings of one config key, the first one found counts. */
typedef const char *MillmKeys[4];

/*
 * The layers that see only a window of the last keys.  layer_types of the config tells them; where it is absent, layer i slides unless
 * i < first, or (i + 1) % every == 0.  All zeros: the family has no windows.
 */
typedef struct MillmSliding
{
	bool		possible;
	int			default_window;		/* when "sliding_window" is absent; 0: no layer slides then.  null in the file: none does */
	const char *switch_key;			/* boolean key, false by default, without which no layer slides; NULL: no such key */
	const char *first_key;
	int			default_first;
	MillmKeys	every_key;
	int			default_every;		/* 0: no layer is full for its number */
	bool		unrotated_only;		/* and no layer slides that has rope */
} MillmSliding;

/*
 * A mixture of experts: MLPs of which each token takes a few, by the scores of a router.  Layer i has it unless the config lists it as dense, or
 * (i + 1) % step != 0.  In the names, {e} stands for "experts.N", or the shared expert that every token takes.
 */
typedef struct MillmMixture
{
	bool		possible;
	int			default_n, default_chosen;
	const char *size_key;			/* of an expert; NULL: the intermediate size */
	int			default_size;
	const char *shared_size_key;	/* NULL: no shared expert */
	int			default_shared_size;
	const char *sum_switch;			/* boolean key, false by default: the chosen weights are made to sum to 1; NULL: always */
	const char *step_key, *dense_key;	/* NULL: all layers have it */
	const char *router, *shared_router;
	const char *gate, *up, *down;
	/*
	 * All experts in one tensor each, gate and up in one as well, even and odd: "...", [n, in, out], or "..._blocks" and "..._scales" in MXFP4; and
	 * "..._bias".  What such experts compute is MILLM_ACT_SWIGLU_PAIRS, whatever the config calls it.
	 */
	const char *fused_gate_up, *fused_down;
	bool		router_bias;
} MillmMixture;

typedef struct MillmArch
{
	const char *model_type;
	MillmCondition only_if[2];	/* of the rows of a type, the first one whose conditions hold counts */

	/* config.json */
	const char *text_config;		/* key of the object that has all that is below, of a model with other parts than a text model; NULL: the file itself */
	MillmKeys	hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, max_positions, norm_eps, act;
	double		default_norm_eps;
	double		default_rope_theta;
	MillmKeys	rope_theta, rotary_part;	/* keys; none: "rope_theta", "partial_rotary_factor" */
	double		default_rotary_part;	/* of a head; 0: the whole */
	bool		rope_is_scaled;			/* "rope_scaling" has a default that is not none, and must be there */
	const char *local_theta_key;		/* layers that slide rotate by this theta, unscaled; NULL: as the others */
	double		default_local_theta;
	int			default_n_heads, default_vocab_size;	/* 0: required */
	int			default_n_kv_heads;		/* when absent; 0: as many as heads, which null always means */
	int			default_max_positions;
	int			default_head_dim;		/* 0: hidden size over heads */
	const char *default_act;
	MillmWhen	multi_query;			/* one KV head, whatever n_kv_heads */
	bool		legacy_gelu_is_tanh;	/* "gelu" under act's second spelling */
	const char *embedding_size;		/* key; NULL or absent: the hidden size */
	int			default_ffn_mult;		/* intermediate size when null: this times hidden size; 0: required */
	bool		default_tied;

	/* the block */
	bool		parallel;				/* attention and MLP read the same residual; without mlp_norm, as attn_norm made it */
	bool		norm_after;				/* attn_norm and mlp_norm norm the residual, after attention and MLP were added to it */
	MillmNorm	norm;
	bool		norm_bias;
	const char *norm_switch;			/* boolean key: false means norms without weights and biases; NULL: no such key */
	const char *residual_normed_key;	/* boolean key; NULL: no such key */
	bool		norm_plus_one;			/* weights of norms are stored less 1 */
	bool		embedding_scaled;		/* by the root of the hidden size */
	const char *embedding_scale_key, *residual_scale_key;	/* factors, 1 by default; NULL: no such key */
	const char *logit_scale_key, *logit_divisor_key;
	double		default_logit_scale;	/* 0: 1 */
	MillmPosition position;
	int			position_offset;		/* row of position 0 */
	bool		rope_interleaved;
	MillmWhen	alibi;					/* instead of position */
	bool		alibi_rounded;
	const char *unrotated_key;		/* list of a number for each layer, 0 where it has no rope; absent: layer i has none if (i + 1) % every == 0 */
	MillmKeys	unrotated_every_key;
	int			default_unrotated_every;	/* 0: the family rotates in all layers */
	bool		yarn_is_longrope;		/* old files say "su" or "yarn" and mean "longrope" */
	int			default_original_positions;	/* "original_max_position_embeddings" beside rope_scaling; 0: none, the object has it or there is none */
	bool		mlp_gated;
	bool		in_out;					/* Linears are stored [in, out] */
	MillmWhen	qkv_bias, o_bias, mlp_bias;
	bool		head_bias;
	MillmWhen	head_norms;				/* q_norm and k_norm */
	MillmHeadNorms head_norm_kind;
	bool		head_norm_bias;			/* SHARED only */
	MillmSliding sliding;
	MillmMixture mixture;
	const char *scale_key;				/* attention_scale is the inverse root of it; NULL: of head_dim */
	double		default_scale_key;
	const char *attention_scale_key;	/* attention_scale itself, 1 by default; NULL: no such key */
	const char *attention_softcap_key, *logit_softcap_key;	/* null in the file: none; NULL: no such key */
	double		default_attention_softcap, default_logit_softcap;	/* 0: none */
	const char *scale_switch;			/* boolean key: false means attention_scale 1; NULL: no such key */
	const char *layer_inv_scale_switch;	/* boolean key: divide the scale by layer + 1 */

	/* tensor names; {i} is the layer.  prefix, or words at its begin, may be missing in a file.  Without ".weight" / ".bias". */
	const char *prefix;
	const char *other_prefix;			/* of newer files; NULL: the same */
	const char *foreign[3];				/* what the names of other parts begin with, behind "model." or not: they are not read */
	const char *embedding, *position_embedding, *head;
	const char *embedding_norm;			/* of the embedding's rows; NULL: none */
	const char *project_in, *project_out;	/* where embedding_size is not the hidden size */
	const char *final_norm;				/* NULL: none */
	const char *attn_norm, *mlp_norm;	/* NULL: none */
	const char *attn_post_norm, *mlp_post_norm;	/* of what is added to the residual; NULL: none */
	const char *sinks;					/* NULL: none */
	const char *q, *k, *v;				/* separate, or */
	const char *qkv;					/* q, k and v concatenated along the output, or */
	const char *grouped_qkv;			/* KV head after KV head: the queries of its group, k, v */
	const char *o;
	const char *q_norm, *k_norm;		/* before rope; of OWN ones one tensor, or, where {h} is the head, one for each */
	const char *gate, *up;				/* separate, or */
	const char *gate_up;				/* gate and up concatenated along the output */
	const char *down;
	const char *ignored[6];				/* suffixes of buffers that old files carry */

	/* keys that must be false, null or absent for this engine */
	const char *refused[6];
} MillmArch;

/* The rows of a model_type, in order, from i = 0 on; NULL past the last. */
extern const MillmArch *millm_arch_find(const char *model_type, int i);

/* Does the tensor belong to a part that the engine does not run (a vision tower)? */
extern bool millm_arch_is_foreign(const MillmArch *arch, const char *tensor);

#endif
