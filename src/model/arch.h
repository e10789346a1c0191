/*
 * arch.h -- what distinguishes one model family from another, as data.
 *
 * A MillmArch is a static row: how the family spells its config.json, how it names its tensors, and which of
 * the few shapes its block has.  config.c resolves a config against a row, model.c binds tensors by it; no
 * other code knows a family by name.  A new family is a row in arch.c and a fixture in the tests.
 */
#ifndef MILLM_ARCH_H
#define MILLM_ARCH_H

#include <stdbool.h>

#include "model.h"

/* Whether a bias (or another optional part) exists: never, always, or as a boolean key of the config says. */
typedef struct MillmWhen
{
	bool		always;
	const char *key;			/* NULL: not configurable; absent in the file: false */
} MillmWhen;

/* Spellings of one config key, the first one found counts. */
typedef const char *MillmKeys[4];

typedef struct MillmArch
{
	const char *model_type;

	/* config.json */
	MillmKeys	hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, max_positions, norm_eps, act;
	double		default_norm_eps;
	double		default_rope_theta;
	int			default_max_positions;
	const char *default_act;
	int			default_ffn_mult;		/* intermediate size when null: this times hidden size; 0: required */
	bool		default_tied;

	/* the block */
	MillmNorm	norm;
	bool		norm_bias;
	MillmPosition position;
	bool		rope_interleaved;
	bool		mlp_gated;
	bool		in_out;					/* Linears are stored [in, out] */
	MillmWhen	qkv_bias, o_bias, mlp_bias;
	const char *scale_switch;			/* boolean key: false means attention_scale 1; NULL: no such key */
	const char *layer_inv_scale_switch;	/* boolean key: divide the scale by layer + 1 */

	/* tensor names; {i} is the layer.  prefix may be missing in a file.  Without ".weight" / ".bias". */
	const char *prefix;
	const char *embedding, *position_embedding, *final_norm, *head;
	const char *attn_norm, *mlp_norm;
	const char *q, *k, *v;				/* separate, or */
	const char *qkv;					/* q, k and v concatenated along the output */
	const char *o, *gate, *up, *down;
	const char *ignored[6];				/* suffixes of buffers that old files carry */

	/* boolean keys that must be false, or absent, for this engine */
	const char *refused[4];
} MillmArch;

/* The row of a model_type, or NULL. */
extern const MillmArch *millm_arch_find(const char *model_type);

#endif
