/*
 * mutate.c -- test support: falsify one flag of an open model, so that a test can show that the flag matters.
 *
 * A comparison with the genuine library proves a flag only if the comparison fails without it.  Each name below stands for
 * one field that the forward pass reads; test/parity/test_logits.py flips each and demands that some tiny model notices.
 * The fields of a quantized weight are called quant_..., and test_quant_logits.py's.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "model.h"
#include "quant.h"
#include "safetensors.h"

static void
drop(MillmVector *v)
{
	free(v->data);
	*v = (MillmVector) {NULL, 0};
}

typedef void (*Mutation) (MillmModel *m);

static void
each_layer(MillmModel *m, void (*f) (MillmLayer *l))
{
	for (int i = 0; i < m->config.n_layers; i++)
		f(&m->layers[i]);
}

static void norm(MillmModel *m) { m->config.norm = m->config.norm == MILLM_NORM_RMS ? MILLM_NORM_LAYER : MILLM_NORM_RMS; }
static void norm_eps(MillmModel *m) { m->config.norm_eps *= 100; }
static void rope_interleaved(MillmModel *m) { m->config.rope_interleaved = !m->config.rope_interleaved; }
static void rotary_dim(MillmModel *m) { m->config.rotary_dim -= m->config.rotary_dim > 2 ? 2 : 0; }
static void rope_attention_factor(MillmModel *m) { m->config.rope.attention_factor *= 1.1f; }
static void rope_long_above(MillmModel *m) { m->config.rope.long_above = 0; }
static void parallel(MillmModel *m) { m->config.parallel = !m->config.parallel; }
static void residual_normed(MillmModel *m) { m->config.residual_normed = !m->config.residual_normed; }
static void norm_after(MillmModel *m) { m->config.norm_after = !m->config.norm_after; }

/* Positions from 0 on. */
static void
position_offset(MillmModel *m)
{
	if (m->config.arch->position_offset)
		m->position_embedding.data = (const char *) m->position_embedding.data -
			m->config.arch->position_offset * m->position_embedding.stride * millm_dtype_bytes(m->position_embedding.dtype);
}

static void final_norm(MillmModel *m) { drop(&m->final_norm); }
static void alibi_slopes(MillmModel *m) { for (int h = 0; m->config.alibi_slopes && h < m->config.n_heads; h++) m->config.alibi_slopes[h] *= 1.1f; }
static void alibi_rounded(MillmModel *m) { m->config.alibi_rounded = !m->config.alibi_rounded; }
static void embedding_norm(MillmModel *m) { drop(&m->embedding_norm); }
static void embedding_norm_bias(MillmModel *m) { drop(&m->embedding_norm_bias); }
static void head_bias(MillmModel *m) { drop(&m->head_bias); }
static void embedding_scale(MillmModel *m) { m->config.embedding_scale = 1; }
static void residual_scale(MillmModel *m) { m->config.residual_scale = 1; }
static void logit_scale(MillmModel *m) { m->config.logit_scale = 1; }
static void attention_softcap(MillmModel *m) { m->config.attention_softcap = 0; }
static void logit_softcap(MillmModel *m) { m->config.logit_softcap = 0; }
static void attention_scale(MillmModel *m) { m->config.attention_scale *= 2; }
static void layer_inv_scale(MillmModel *m) { m->config.layer_inv_scale = !m->config.layer_inv_scale; }
static void act(MillmModel *m) { m->config.act = m->config.act == MILLM_ACT_GELU_TANH ? MILLM_ACT_GELU_ERF : MILLM_ACT_GELU_TANH; }

/* Position p gets the vector of p + 1. */
static void
position_embedding(MillmModel *m)
{
	MillmWeight *w = &m->position_embedding;

	if (!w->data)
		return;
	w->data = (const char *) w->data + w->stride * millm_dtype_bytes(w->dtype);
	w->n_out--;
}

/* The LM head is the embedding where it is a matrix of its own. */
static void
head(MillmModel *m)
{
	if (m->config.tied)
		return;
	m->head = m->embedding;
	m->screen.codes.data = NULL;	/* it was the other head's */
}

/* The layers before those that slide do. */
static void
slides(MillmModel *m)
{
	int			last = m->layers[m->config.n_layers - 1].window;

	for (int i = m->config.n_layers - 1; i > 0; i--)
		m->layers[i].window = m->layers[i - 1].window;
	m->layers[0].window = last;
}

static void final_norm_bias(MillmModel *m) { drop(&m->final_norm_bias); }

static void
inv_freq(MillmModel *m)
{
	for (int j = 0; j < m->config.rotary_dim / 2 && m->config.rope.inv_freq; j++)
		m->config.rope.inv_freq[j] *= 1.1f;
}

/* The layers that slide rotate as the others. */
static void
local_rope(MillmModel *m)
{
	free(m->config.local_rope.inv_freq);
	m->config.local_rope.inv_freq = NULL;
}

/* The weights of the norms as they are stored. */
static void
norm_plus_one(MillmModel *m)
{
	for (int64_t i = 0; m->config.norm_plus_one && i < m->final_norm.n; i++)
		m->final_norm.data[i] -= 1;
	for (int l = 0; m->config.norm_plus_one && l < m->config.n_layers; l++)
	{
		MillmLayer *layer = &m->layers[l];
		MillmVector *norms[] = {&layer->attn_norm, &layer->mlp_norm, &layer->q_norm, &layer->k_norm, &layer->attn_post_norm, &layer->mlp_post_norm};

		for (size_t k = 0; k < sizeof(norms) / sizeof(norms[0]); k++)
			for (int64_t i = 0; i < norms[k]->n; i++)
				norms[k]->data[i] -= 1;
	}
}

static void l_window(MillmLayer *l) { l->window = 5; }
static void l_window_wider(MillmLayer *l) { l->window += l->window > 0; }
static void l_unrotated(MillmLayer *l) { l->unrotated = false; }
static void l_q_norm(MillmLayer *l) { drop(&l->q_norm); }
static void l_k_norm(MillmLayer *l) { drop(&l->k_norm); }
static void l_q_norm_bias(MillmLayer *l) { drop(&l->q_norm_bias); }
static void l_k_norm_bias(MillmLayer *l) { drop(&l->k_norm_bias); }
static void
head_norms_whole(MillmModel *m)
{
	if (m->config.head_norm_kind == MILLM_HEAD_NORMS_WHOLE)
		m->config.head_norm_kind = MILLM_HEAD_NORMS_OWN;
}

/* The first head's for all. */
static void
l_own_norms(MillmLayer *l)
{
	for (int64_t i = l->head_dim; i < l->q_norm.n; i++)
		l->q_norm.data[i] = l->q_norm.data[i - l->head_dim];
	for (int64_t i = l->head_dim; i < l->k_norm.n; i++)
		l->k_norm.data[i] = l->k_norm.data[i - l->head_dim];
}
static void l_attn_post_norm(MillmLayer *l) { drop(&l->attn_post_norm); }
static void l_mlp_post_norm(MillmLayer *l) { drop(&l->mlp_post_norm); }
static void l_attn_norm_bias(MillmLayer *l) { drop(&l->attn_norm_bias); }
static void l_mlp_norm_bias(MillmLayer *l) { drop(&l->mlp_norm_bias); }
static void l_q_bias(MillmLayer *l) { drop(&l->q_bias); }
static void l_k_bias(MillmLayer *l) { for (int64_t i = 0; i < l->k_bias.n; i++) l->k_bias.data[i] = -l->k_bias.data[i]; }
static void l_v_bias(MillmLayer *l) { drop(&l->v_bias); }
static void l_o_bias(MillmLayer *l) { drop(&l->o_bias); }
static void l_gate_bias(MillmLayer *l) { drop(&l->gate_bias); }
static void l_up_bias(MillmLayer *l) { drop(&l->up_bias); }
static void l_down_bias(MillmLayer *l) { drop(&l->down_bias); }
static void l_mlp_gated(MillmLayer *l) { MillmWeight w = l->gate; if (w.data) { l->gate = l->up; l->up = w; } }
static void l_qkv_order(MillmLayer *l) { MillmWeight w = l->k; l->k = l->v; l->v = w; }
/* Every head reads the first KV head. */
static void
l_n_kv_heads(MillmLayer *l)
{
	if (l->qkv.data)
		return;
	l->n_kv_heads = 1;
	l->k.n_out = l->v.n_out = l->head_dim;
}

/* q, k and v as if they were concatenated. */
static void
l_grouped_qkv(MillmLayer *l)
{
	if (!l->qkv.data || l->qkv.dtype >= MILLM_N_FLOAT_DTYPES)
		return;
	l->q = l->k = l->v = l->qkv;
	l->qkv.data = NULL;
	l->q.n_out = (int64_t) l->n_heads * l->head_dim;
	l->k.n_out = l->v.n_out = (int64_t) l->n_kv_heads * l->head_dim;
	l->k.data = (const char *) l->q.data + millm_weight_bytes(l->q.dtype, l->q.n_out * l->q.n_in);
	l->v.data = (const char *) l->k.data + millm_weight_bytes(l->k.dtype, l->k.n_out * l->k.n_in);
}

static void l_qkv_bias(MillmLayer *l) { drop(&l->qkv_bias); }
static void l_in_out(MillmLayer *l) { if (l->o.n_in == l->o.n_out && l->o.dtype < MILLM_N_FLOAT_DTYPES) l->o.in_out = !l->o.in_out; }

/* Each 4-bit weight of a layer, changed so that nothing behind the end of a tensor is read. */
static void
each_4bit(MillmLayer *l, void (*f) (MillmWeight *w))
{
	MillmWeight *weights[] = {&l->q, &l->k, &l->v, &l->qkv, &l->o, &l->gate, &l->up, &l->down};

	for (size_t i = 0; i < sizeof(weights) / sizeof(weights[0]); i++)
		if (weights[i]->dtype == MILLM_4BIT && weights[i]->data)
			f(weights[i]);
}

static void experts_sum_to_one(MillmModel *m) { m->config.experts_sum_to_one = !m->config.experts_sum_to_one; }
static void n_chosen(MillmModel *m) { m->config.n_chosen -= m->config.n_chosen > 1; }
static void l_sinks(MillmLayer *l) { drop(&l->sinks); }
static void l_router_bias(MillmLayer *l) { drop(&l->router_bias); }
static void l_expert_up_bias(MillmLayer *l) { if (l->experts) l->experts[0].up_bias.data = NULL; }
static void l_expert_down_bias(MillmLayer *l) { if (l->experts) l->experts[0].down_bias.data = NULL; }
static void l_experts_order(MillmLayer *l) { if (l->experts) { MillmMlp e = l->experts[0]; l->experts[0] = l->experts[1]; l->experts[1] = e; } }
static void l_expert_gated(MillmLayer *l) { if (l->experts && l->experts[0].gate.data) { MillmWeight w = l->experts[0].gate; l->experts[0].gate = l->experts[0].up; l->experts[0].up = w; } }
static void l_shared_router(MillmLayer *l) { if (l->experts) { l->shared_router.data = l->router.data; } }
static void l_shared(MillmLayer *l) { l->shared.up.data = NULL; }

static void w_first(MillmWeight *w) { w->first -= w->first > 0; }
static void w_codebook(MillmWeight *w) { w->codebook = w->codebook == millm_nf4_codebook ? millm_fp4_codebook : millm_nf4_codebook; }
static void w_block_size(MillmWeight *w) { w->block_size *= 2; }
static void w_nested_block_size(MillmWeight *w) { w->nested_block_size *= 2; }
static void w_nested_offset(MillmWeight *w) { w->nested_offset *= 1.01f; }
static void w_rounded(MillmWeight *w) { w->rounded = w->rounded == MILLM_F32 ? MILLM_BF16 : MILLM_F32; }
static void l_quant_first(MillmLayer *l) { each_4bit(l, w_first); }
static void l_quant_codebook(MillmLayer *l) { each_4bit(l, w_codebook); }
static void l_quant_block_size(MillmLayer *l) { each_4bit(l, w_block_size); }
static void l_quant_nested_block_size(MillmLayer *l) { each_4bit(l, w_nested_block_size); }
static void l_quant_nested_offset(MillmLayer *l) { each_4bit(l, w_nested_offset); }
static void l_quant_rounded(MillmLayer *l) { each_4bit(l, w_rounded); }
/* The scales of the first rows of a fused INT8 tensor for all of its parts. */
static void l_quant_scale(MillmLayer *l) { if (l->k.dtype == MILLM_INT8 && l->q.n_out >= l->k.n_out) l->k.scale = l->q.scale; }

static const struct
{
	const char *name;
	Mutation	model;
	void		(*layer) (MillmLayer *l);
}			mutations[] = {
	{"norm", norm, NULL}, {"norm_eps", norm_eps, NULL}, {"rope_interleaved", rope_interleaved, NULL}, {"rotary_dim", rotary_dim, NULL},
	{"inv_freq", inv_freq, NULL}, {"rope_attention_factor", rope_attention_factor, NULL}, {"rope_long_above", rope_long_above, NULL}, {"attention_scale", attention_scale, NULL},
	{"layer_inv_scale", layer_inv_scale, NULL}, {"act", act, NULL}, {"position_embedding", position_embedding, NULL},
	{"final_norm_bias", final_norm_bias, NULL}, {"head", head, NULL}, {"n_kv_heads", NULL, l_n_kv_heads},
	{"local_rope", local_rope, NULL}, {"norm_plus_one", norm_plus_one, NULL}, {"embedding_scale", embedding_scale, NULL},
	{"attention_softcap", attention_softcap, NULL}, {"logit_softcap", logit_softcap, NULL}, {"attn_post_norm", NULL, l_attn_post_norm},
	{"mlp_post_norm", NULL, l_mlp_post_norm}, {"window", NULL, l_window}, {"window_wider", NULL, l_window_wider}, {"slides", slides, NULL}, {"q_norm", NULL, l_q_norm}, {"k_norm", NULL, l_k_norm},
	{"parallel", parallel, NULL}, {"own_norms", NULL, l_own_norms}, {"embedding_norm", embedding_norm, NULL}, {"embedding_norm_bias", embedding_norm_bias, NULL}, {"alibi_slopes", alibi_slopes, NULL}, {"alibi_rounded", alibi_rounded, NULL}, {"norm_after", norm_after, NULL}, {"residual_normed", residual_normed, NULL}, {"position_offset", position_offset, NULL},
	{"final_norm", final_norm, NULL}, {"unrotated", NULL, l_unrotated}, {"residual_scale", residual_scale, NULL}, {"logit_scale", logit_scale, NULL}, {"head_norms_whole", head_norms_whole, NULL}, {"head_bias", head_bias, NULL}, {"q_norm_bias", NULL, l_q_norm_bias}, {"k_norm_bias", NULL, l_k_norm_bias},
	{"attn_norm_bias", NULL, l_attn_norm_bias}, {"mlp_norm_bias", NULL, l_mlp_norm_bias}, {"q_bias", NULL, l_q_bias},
	{"k_bias", NULL, l_k_bias}, {"v_bias", NULL, l_v_bias}, {"o_bias", NULL, l_o_bias}, {"gate_bias", NULL, l_gate_bias}, {"up_bias", NULL, l_up_bias},
	{"down_bias", NULL, l_down_bias}, {"mlp_gated", NULL, l_mlp_gated}, {"qkv_order", NULL, l_qkv_order}, {"grouped_qkv", NULL, l_grouped_qkv}, {"qkv_bias", NULL, l_qkv_bias}, {"in_out", NULL, l_in_out},
	{"experts_sum_to_one", experts_sum_to_one, NULL}, {"n_chosen", n_chosen, NULL}, {"experts_order", NULL, l_experts_order},
	{"sinks", NULL, l_sinks}, {"router_bias", NULL, l_router_bias}, {"expert_up_bias", NULL, l_expert_up_bias}, {"expert_down_bias", NULL, l_expert_down_bias},
	{"expert_gated", NULL, l_expert_gated}, {"shared_router", NULL, l_shared_router}, {"shared", NULL, l_shared},
	{"quant_first", NULL, l_quant_first}, {"quant_codebook", NULL, l_quant_codebook}, {"quant_block_size", NULL, l_quant_block_size},
	{"quant_nested_block_size", NULL, l_quant_nested_block_size}, {"quant_nested_offset", NULL, l_quant_nested_offset},
	{"quant_rounded", NULL, l_quant_rounded}, {"quant_scale", NULL, l_quant_scale},
};

const char *
millm_mutation_name(int i)
{
	return i >= 0 && (size_t) i < sizeof(mutations) / sizeof(mutations[0]) ? mutations[i].name : NULL;
}

MillmCode
millm_model_mutate(MillmModel *model, const char *flag, MillmError *err)
{
	for (size_t i = 0; i < sizeof(mutations) / sizeof(mutations[0]); i++)
		if (strcmp(mutations[i].name, flag) == 0)
		{
			if (mutations[i].model)
				mutations[i].model(model);
			else
				each_layer(model, mutations[i].layer);
			return MILLM_OK;
		}
	return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "there is no flag \"%s\" to mutate", flag);
}
