/* test_model.c -- model directories: what binds where, what is counted, and every damage by its name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <jansson.h>

#include "checkpoint.h"
#include "model.h"
#include "quant.h"
#include "screen.h"
#include "utf8.h"

/* H 8, 2 heads of 4, 1 KV head, I 6, 2 layers, V 11 */
#define CONFIG "{\"model_type\": \"llama\", \"hidden_size\": 8, \"intermediate_size\": 6, \"num_hidden_layers\": 2, \"num_attention_heads\": 2," \
	" \"num_key_value_heads\": 1, \"vocab_size\": 11, \"max_position_embeddings\": 32, \"eos_token_id\": 1"
#define LAYER(i, f) \
	{"model.layers." #i ".input_layernorm.weight", "F32", 4, {8}, f}, \
	{"model.layers." #i ".self_attn.q_proj.weight", "F32", 4, {8, 8}, f + 1}, \
	{"model.layers." #i ".self_attn.k_proj.weight", "F32", 4, {4, 8}, f + 2}, \
	{"model.layers." #i ".self_attn.v_proj.weight", "F32", 4, {4, 8}, f + 3}, \
	{"model.layers." #i ".self_attn.o_proj.weight", "F32", 4, {8, 8}, f + 4}, \
	{"model.layers." #i ".post_attention_layernorm.weight", "F32", 4, {8}, f + 5}, \
	{"model.layers." #i ".mlp.gate_proj.weight", "F32", 4, {6, 8}, f + 6}, \
	{"model.layers." #i ".mlp.up_proj.weight", "F32", 4, {6, 8}, f + 7}, \
	{"model.layers." #i ".mlp.down_proj.weight", "F32", 4, {8, 6}, f + 8}

static const TestTensor llama[] = {
	{"lm_head.weight", "F32", 4, {11, 8}, 500},
	{"model.embed_tokens.weight", "F32", 4, {11, 8}, 600},
	{"model.norm.weight", "F32", 4, {8}, 700},
	LAYER(0, 10),
	LAYER(1, 20),
};
#define N_LLAMA (sizeof(llama) / sizeof(llama[0]))
#define LAYER_PARAMS (2 * 8 + 2 * 64 + 2 * 32 + 3 * 48)

#define GPT2_CONFIG "{\"model_type\": \"gpt2\", \"n_embd\": 4, \"n_layer\": 1, \"n_head\": 2, \"n_inner\": 3, \"n_positions\": 5, \"vocab_size\": 7}"
static const TestTensor gpt2[] = {
	{"transformer.wte.weight", "F32", 4, {7, 4}, 0},
	{"transformer.wpe.weight", "F32", 4, {5, 4}, 100},
	{"transformer.ln_f.weight", "F32", 4, {4}, 1},
	{"transformer.ln_f.bias", "F32", 4, {4}, 2},
	{"transformer.h.0.ln_1.weight", "F32", 4, {4}, 3},
	{"transformer.h.0.ln_1.bias", "F32", 4, {4}, 4},
	{"transformer.h.0.attn.c_attn.weight", "F32", 4, {4, 12}, 0},
	{"transformer.h.0.attn.c_attn.bias", "F32", 4, {12}, 0},
	{"transformer.h.0.attn.c_proj.weight", "F32", 4, {4, 4}, 5},
	{"transformer.h.0.attn.c_proj.bias", "F32", 4, {4}, 6},
	{"transformer.h.0.ln_2.weight", "F32", 4, {4}, 7},
	{"transformer.h.0.ln_2.bias", "F32", 4, {4}, 8},
	{"transformer.h.0.mlp.c_fc.weight", "F32", 4, {4, 3}, 9},
	{"transformer.h.0.mlp.c_fc.bias", "F32", 4, {3}, 10},
	{"transformer.h.0.mlp.c_proj.weight", "F32", 4, {3, 4}, 11},
	{"transformer.h.0.mlp.c_proj.bias", "F32", 4, {4}, 12},
};
#define N_GPT2 (sizeof(gpt2) / sizeof(gpt2[0]))

static char dir[64];

static int
setup(void **state)
{
	(void) state;
	make_dir(dir);
	return 0;
}

static int
teardown(void **state)
{
	(void) state;
	remove_dir(dir);
	return 0;
}

/* A llama with these changes to its config (", \"k\": v"). */
static void
write_llama(const char *change)
{
	char		config[1024];

	snprintf(config, sizeof(config), CONFIG "%s}", change);
	write_text(dir, "config.json", config);
	write_st(dir, "model.safetensors", llama, N_LLAMA, 0);
}

static MillmModel *
must_open(void)
{
	MillmModel *m = NULL;
	MillmError	err;

	if (millm_model_open(dir, &m, &err) != MILLM_OK)
		fail_msg("%s / %s", err.message, err.detail);
	return m;
}

static void
must_fail(MillmCode code, const char *text)
{
	MillmModel *m = NULL;
	MillmError	err;

	assert_failure(millm_model_open(dir, &m, &err), &err, code, text);
	assert_null(m);
}

/* Element i of a F32 weight, wherever it lies. */
static float
at(const void *data, int64_t i)
{
	float		f;

	memcpy(&f, (const char *) data + 4 * i, 4);
	return f;
}

/* --- good ones -------------------------------------------------------------------------------- */

static void
binds_llama(void **state)
{
	MillmModel *m;

	(void) state;
	for (int pad = 0; pad < 4; pad++)
	{
		write_llama("");
		write_st(dir, "model.safetensors", llama, N_LLAMA, pad);
		m = must_open();
		assert_true(at(m->embedding.data, 0) == 600 && m->embedding.n_out == 11 && m->embedding.n_in == 8 && m->embedding.stride == 8);
		assert_true(at(m->head.data, 87) == 587 && !m->config.tied);
		assert_true(m->final_norm.n == 8 && m->final_norm.data[7] == 707 && !m->final_norm_bias.data);
		assert_null(m->position_embedding.data);
		for (int i = 0; i < 2; i++)
		{
			const MillmLayer *l = &m->layers[i];
			float		f = i ? 20 : 10;

			assert_true(l->n_heads == 2 && l->n_kv_heads == 1 && l->head_dim == 4 && l->window == 0);
			assert_true(l->attn_norm.data[0] == f && l->mlp_norm.data[0] == f + 5 && !l->attn_norm_bias.data);
			assert_true(at(l->q.data, 0) == f + 1 && l->q.n_out == 8 && l->q.n_in == 8 && !l->q.in_out);
			assert_true(at(l->k.data, 0) == f + 2 && l->k.n_out == 4);
			assert_true(at(l->v.data, 31) == f + 3 + 31);
			assert_true(at(l->o.data, 0) == f + 4);
			assert_true(at(l->gate.data, 0) == f + 6 && l->gate.n_out == 6);
			assert_true(at(l->up.data, 0) == f + 7);
			assert_true(at(l->down.data, 0) == f + 8 && l->down.n_out == 8 && l->down.n_in == 6);
			assert_true(!l->q_bias.data && !l->o_bias.data && !l->down_bias.data);
		}
		assert_int_equal(m->n_params, 2 * 88 + 8 + 2 * LAYER_PARAMS);
		assert_int_equal(m->weights_bytes, 4 * m->n_params);
		assert_string_equal(m->dtype, "F32");
		assert_int_equal(m->generation.top_k, -1);
		millm_model_close(m);
	}
	millm_model_close(NULL);
}

static void
binds_gpt2(void **state)
{
	MillmModel *m;
	const MillmLayer *l;

	(void) state;
	write_text(dir, "config.json", GPT2_CONFIG);
	write_st(dir, "model.safetensors", gpt2, N_GPT2, 1);
	m = must_open();
	l = &m->layers[0];
	assert_true(m->config.tied && m->head.data == m->embedding.data);
	assert_true(m->position_embedding.n_out == 5 && at(m->position_embedding.data, 19) == 119);
	/* c_attn is [in, 3 out]: q, k and v are columns of it */
	assert_true(l->q.in_out && l->q.n_in == 4 && l->q.n_out == 4 && l->q.stride == 12 && at(l->q.data, 0) == 0);
	assert_true(at(l->k.data, 0) == 4 && at(l->v.data, 0) == 8 && l->v.stride == 12);
	assert_true(l->q_bias.data[3] == 3 && l->k_bias.data[0] == 4 && l->v_bias.data[3] == 11 && l->v_bias.n == 4);
	assert_true(l->up.in_out && l->up.n_in == 4 && l->up.n_out == 3 && l->up.stride == 3);
	assert_true(l->down.n_in == 3 && l->down.n_out == 4 && !l->gate.data);
	assert_true(l->up_bias.n == 3 && l->o_bias.data[0] == 6 && l->down_bias.data[0] == 12 && l->mlp_norm_bias.data[0] == 8);
	assert_int_equal(m->n_params, 28 + 20 + 8 + 8 + 48 + 12 + 16 + 4 + 8 + 12 + 3 + 12 + 4);
	millm_model_close(m);
}

/* Saved from the headless class: no prefix. */
static void
no_prefix(void **state)
{
	TestTensor	tensors[N_GPT2];
	MillmModel *m;

	(void) state;
	for (size_t i = 0; i < N_GPT2; i++)
	{
		tensors[i] = gpt2[i];
		tensors[i].name += strlen("transformer.");
	}
	write_text(dir, "config.json", GPT2_CONFIG);
	write_st(dir, "model.safetensors", tensors, N_GPT2, 0);
	m = must_open();
	assert_true(m->layers[0].o_bias.data[0] == 6);
	millm_model_close(m);

	/* neither form: the usual name is missed */
	write_st(dir, "model.safetensors", tensors + 1, N_GPT2 - 1, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"transformer.wte.weight\" is missing");
}

static void
tied(void **state)
{
	TestTensor	tensors[N_LLAMA];
	MillmModel *m;

	(void) state;
	write_llama(", \"tie_word_embeddings\": true");
	/* stored, and different: the stored one counts */
	m = must_open();
	assert_false(m->config.tied);
	assert_true(at(m->head.data, 0) == 500);
	assert_int_equal(m->n_params, 2 * 88 + 8 + 2 * LAYER_PARAMS);
	millm_model_close(m);
	/* stored, and equal: one parameter, stored twice */
	memcpy(tensors, llama, sizeof(llama));
	tensors[0].start = tensors[1].start;
	write_st(dir, "model.safetensors", tensors, N_LLAMA, 0);
	m = must_open();
	assert_true(m->config.tied);
	assert_ptr_equal(m->head.data, m->embedding.data);
	assert_int_equal(m->n_params, 88 + 8 + 2 * LAYER_PARAMS);
	assert_int_equal(m->weights_bytes, 4 * (2 * 88 + 8 + 2 * LAYER_PARAMS));
	millm_model_close(m);
	/* not stored */
	write_st(dir, "model.safetensors", llama + 1, N_LLAMA - 1, 0);
	m = must_open();
	assert_true(m->config.tied);
	assert_ptr_equal(m->head.data, m->embedding.data);
	assert_int_equal(m->n_params, 88 + 8 + 2 * LAYER_PARAMS);
	millm_model_close(m);
	/* not stored, and not tied */
	write_llama("");
	write_st(dir, "model.safetensors", llama + 1, N_LLAMA - 1, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"lm_head.weight\" is missing");
}

/* OPT: two words of prefix, two rows before position 0, an embedding of another size, no final norm where it says so. */
#define OPT_CONFIG(rest) "{\"model_type\": \"opt\", \"hidden_size\": 4, \"ffn_dim\": 3, \"num_hidden_layers\": 1, \"num_attention_heads\": 2," \
	" \"max_position_embeddings\": 5, \"vocab_size\": 7, \"enable_bias\": false, \"word_embed_proj_dim\": 2" rest "}"
static const TestTensor opt[] = {
	{"model.decoder.embed_tokens.weight", "F32", 4, {7, 2}, 0},
	{"model.decoder.embed_positions.weight", "F32", 4, {7, 4}, 100},
	{"model.decoder.project_in.weight", "F32", 4, {4, 2}, 200},
	{"model.decoder.project_out.weight", "F32", 4, {2, 4}, 300},
	{"model.decoder.layers.0.self_attn_layer_norm.weight", "F32", 4, {4}, 1},
	{"model.decoder.layers.0.self_attn_layer_norm.bias", "F32", 4, {4}, 2},
	{"model.decoder.layers.0.self_attn.q_proj.weight", "F32", 4, {4, 4}, 3},
	{"model.decoder.layers.0.self_attn.k_proj.weight", "F32", 4, {4, 4}, 4},
	{"model.decoder.layers.0.self_attn.v_proj.weight", "F32", 4, {4, 4}, 5},
	{"model.decoder.layers.0.self_attn.out_proj.weight", "F32", 4, {4, 4}, 6},
	{"model.decoder.layers.0.fc1.weight", "F32", 4, {3, 4}, 7},
	{"model.decoder.layers.0.fc2.weight", "F32", 4, {4, 3}, 8},
	{"model.decoder.layers.0.final_layer_norm.weight", "F32", 4, {4}, 9},
	{"model.decoder.layers.0.final_layer_norm.bias", "F32", 4, {4}, 10},
	{"model.decoder.final_layer_norm.weight", "F32", 4, {4}, 11},
	{"model.decoder.final_layer_norm.bias", "F32", 4, {4}, 12},
};
#define N_OPT (sizeof(opt) / sizeof(opt[0]))

static void
binds_opt(void **state)
{
	static const char *const prefix_missing[] = {"", "model.", "model.decoder."};
	TestTensor	tensors[N_OPT];
	MillmModel *m;

	(void) state;
	write_text(dir, "config.json", OPT_CONFIG(""));
	for (int k = 0; k < 3; k++)
	{
		memcpy(tensors, opt, sizeof(opt));
		for (size_t i = 0; i < N_OPT; i++)
			tensors[i].name += strlen(prefix_missing[k]);
		write_st(dir, "model.safetensors", tensors, N_OPT, 0);
		m = must_open();
		assert_true(m->embedding.n_in == 2 && m->head.data == m->embedding.data);
		assert_true(m->position_embedding.n_out == 5 && at(m->position_embedding.data, 0) == 108);
		assert_true(at(m->project_in.data, 0) == 200 && m->project_in.n_out == 4 && at(m->project_out.data, 0) == 300 && m->project_out.n_out == 2);
		assert_true(m->layers[0].attn_norm.data[0] == 1 && m->layers[0].mlp_norm_bias.data[0] == 10 && m->final_norm.data[0] == 11);
		millm_model_close(m);
	}
	write_text(dir, "config.json", OPT_CONFIG(", \"do_layer_norm_before\": false"));
	must_fail(MILLM_E_INVALID_MODEL_FILE, "There are 2 of them, such as \"final_layer_norm.bias\"");
	write_st(dir, "model.safetensors", tensors, N_OPT - 2, 0);
	m = must_open();
	assert_true(m->config.norm_after && !m->final_norm.data);
	millm_model_close(m);
	write_text(dir, "config.json", OPT_CONFIG(", \"_remove_final_layer_norm\": true"));
	m = must_open();
	assert_true(!m->config.norm_after && !m->final_norm.data);
	millm_model_close(m);
}

/* Norms that each head of q and k has for itself: a tensor for each, or one for all. */
static void
binds_own_norms(void **state)
{
	static const TestTensor each[] = {
		{"model.layers.0.self_attn.q_layernorm.norms.0.weight", "F32", 4, {4}, 1}, {"model.layers.0.self_attn.q_layernorm.norms.1.weight", "F32", 4, {4}, 20},
		{"model.layers.0.self_attn.k_layernorm.norms.0.weight", "F32", 4, {4}, 30},
		{"model.layers.1.self_attn.q_layernorm.norms.0.weight", "F32", 4, {4}, 40}, {"model.layers.1.self_attn.q_layernorm.norms.1.weight", "F32", 4, {4}, 50},
		{"model.layers.1.self_attn.k_layernorm.norms.0.weight", "F32", 4, {4}, 60},
		{"model.norm.bias", "F32", 4, {8}, 0}, {"model.layers.0.input_layernorm.bias", "F32", 4, {8}, 0}, {"model.layers.1.input_layernorm.bias", "F32", 4, {8}, 0},
		{"model.layers.0.post_attention_layernorm.bias", "F32", 4, {8}, 0}, {"model.layers.1.post_attention_layernorm.bias", "F32", 4, {8}, 0},
	};
	static const TestTensor one[] = {
		{"model.layers.0.self_attn.q_norm.weight", "F32", 4, {2, 4}, 1}, {"model.layers.0.self_attn.k_norm.weight", "F32", 4, {1, 4}, 30},
		{"model.layers.1.self_attn.q_norm.weight", "F32", 4, {2, 4}, 40}, {"model.layers.1.self_attn.k_norm.weight", "F32", 4, {1, 4}, 60},
	};
	TestTensor	tensors[N_LLAMA + 11];
	size_t		n = 0;
	MillmModel *m;

	(void) state;
	memcpy(tensors, llama, sizeof(llama));
	memcpy(tensors + N_LLAMA, each, sizeof(each));
	write_text(dir, "config.json", CONFIG ", \"model_type\": \"stablelm\", \"partial_rotary_factor\": 0.5, \"qk_layernorm\": true}");
	write_st(dir, "model.safetensors", tensors, N_LLAMA + 11, 0);
	m = must_open();
	assert_true(m->layers[0].q_norm.n == 8 && m->layers[0].q_norm.data[3] == 4 && m->layers[0].q_norm.data[4] == 20 && m->layers[0].k_norm.data[0] == 30);
	assert_true(m->layers[1].q_norm.data[7] == 53 && m->layers[1].k_norm.n == 4 && !m->layers[1].q_norm_bias.data);
	millm_model_close(m);
	tensors[N_LLAMA + 1].name = "model.layers.0.self_attn.q_layernorm.norms.2.weight";
	write_st(dir, "model.safetensors", tensors, N_LLAMA + 11, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"model.layers.0.self_attn.q_layernorm.norms.1.weight\" is missing");

	for (size_t i = 0; i < N_LLAMA; i++)
		if (!strstr(llama[i].name, "post_attention"))
			tensors[n++] = llama[i];
	memcpy(tensors + n, one, sizeof(one));
	write_text(dir, "config.json", CONFIG ", \"model_type\": \"cohere\", \"use_qk_norm\": true}");
	write_st(dir, "model.safetensors", tensors, n + 4, 0);
	m = must_open();
	assert_true(m->layers[0].q_norm.n == 8 && m->layers[0].q_norm.data[4] == 5 && m->layers[1].k_norm.data[0] == 60 && !m->layers[0].mlp_norm.data);
	millm_model_close(m);
	tensors[n].dims[0] = 3;
	write_st(dir, "model.safetensors", tensors, n + 4, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "The config implies [2, 4]; it has 2 dimensions, [3, 4]");
}

/* Each dtype in one file; vectors become float32. */
static void
mixed_dtypes(void **state)
{
	TestTensor	tensors[N_LLAMA];
	MillmModel *m;

	(void) state;
	memcpy(tensors, llama, sizeof(llama));
	for (size_t i = 0; i < N_LLAMA; i++)
	{
		tensors[i].dtype = i % 2 ? "BF16" : "F16";
		tensors[i].element_bytes = 2;
		tensors[i].start = 1;
	}
	tensors[8].dtype = "F32";
	tensors[8].element_bytes = 4;
	write_llama("");
	write_st(dir, "model.safetensors", tensors, N_LLAMA, 1);
	m = must_open();
	assert_string_equal(m->dtype, "BF16");
	assert_int_equal(m->head.dtype, MILLM_F16);
	for (int i = 0; i < 8; i++)
		assert_true(m->final_norm.data[i] == 1 + i && m->layers[0].attn_norm.data[i] == 1 + i && m->layers[0].mlp_norm.data[i] == 1 + i);
	assert_int_equal(m->weights_bytes, 2 * m->n_params + 2 * 8);
	millm_model_close(m);
}

static void
biases(void **state)
{
	TestTensor	tensors[N_LLAMA + 14];
	static const TestTensor extra[] = {
		{"model.layers.0.self_attn.q_proj.bias", "F32", 4, {8}, 1}, {"model.layers.0.self_attn.k_proj.bias", "F32", 4, {4}, 2},
		{"model.layers.0.self_attn.v_proj.bias", "F32", 4, {4}, 3}, {"model.layers.0.self_attn.o_proj.bias", "F32", 4, {8}, 4},
		{"model.layers.0.mlp.gate_proj.bias", "F32", 4, {6}, 5}, {"model.layers.0.mlp.up_proj.bias", "F32", 4, {6}, 6},
		{"model.layers.0.mlp.down_proj.bias", "F32", 4, {8}, 7},
		{"model.layers.1.self_attn.q_proj.bias", "F32", 4, {8}, 1}, {"model.layers.1.self_attn.k_proj.bias", "F32", 4, {4}, 2},
		{"model.layers.1.self_attn.v_proj.bias", "F32", 4, {4}, 3}, {"model.layers.1.self_attn.o_proj.bias", "F32", 4, {8}, 4},
		{"model.layers.1.mlp.gate_proj.bias", "F32", 4, {6}, 5}, {"model.layers.1.mlp.up_proj.bias", "F32", 4, {6}, 6},
		{"model.layers.1.mlp.down_proj.bias", "F32", 4, {8}, 7},
	};
	MillmModel *m;

	(void) state;
	memcpy(tensors, llama, sizeof(llama));
	memcpy(tensors + N_LLAMA, extra, sizeof(extra));
	write_llama(", \"attention_bias\": true, \"mlp_bias\": true");
	write_st(dir, "model.safetensors", tensors, N_LLAMA + 14, 0);
	m = must_open();
	assert_true(m->layers[1].q_bias.data[0] == 1 && m->layers[1].o_bias.data[0] == 4 && m->layers[1].gate_bias.n == 6 && m->layers[1].down_bias.data[7] == 14);
	millm_model_close(m);
	/* the same file without the flag: a wrong flag shows */
	write_text(dir, "config.json", CONFIG ", \"attention_bias\": true}");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "There are 6 of them, such as \"model.layers.0.mlp.down_proj.bias\"");
	write_llama(", \"attention_bias\": true");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"model.layers.0.self_attn.q_proj.bias\" is missing");
}

static void
ignored_buffers(void **state)
{
	TestTensor	tensors[N_LLAMA + 1];
	MillmModel *m;

	(void) state;
	memcpy(tensors, llama, sizeof(llama));
	tensors[N_LLAMA] = (TestTensor) {"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", 4, {2}, 0};
	write_llama("");
	write_st(dir, "model.safetensors", tensors, N_LLAMA + 1, 0);
	m = must_open();
	assert_int_equal(m->n_params, 2 * 88 + 8 + 2 * LAYER_PARAMS);	/* not a parameter */
	millm_model_close(m);
	/* another family's buffer is not known here */
	tensors[N_LLAMA].name = "model.layers.0.attn.bias";
	write_st(dir, "model.safetensors", tensors, N_LLAMA + 1, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "There are 1 of them, such as \"model.layers.0.attn.bias\"");
}

static void
generation_config(void **state)
{
	MillmModel *m;

	(void) state;
	write_llama("");
	write_text(dir, "generation_config.json", "{\"do_sample\": true, \"top_k\": 7, \"eos_token_id\": [3, 4]}");
	m = must_open();
	assert_true(m->generation.do_sample && m->generation.top_k == 7);
	assert_int_equal(m->config.n_eos, 2);
	assert_int_equal(m->config.eos_ids[0], 3);
	millm_model_close(m);
	write_text(dir, "generation_config.json", "{\"top_p\": 2}");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "\"top_p\" in generation_config.json");
	write_text(dir, "generation_config.json", "{");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "not valid JSON");
}

static bool
stop_after(void *arg, int percent)
{
	(void) percent;
	return --*(int *) arg > 0;
}

static void
populate_stops(void **state)
{
	MillmModel *m;
	int			calls = 1;

	(void) state;
	write_llama("");
	m = must_open();
	assert_false(millm_model_populate(m, stop_after, &calls));
	assert_int_equal(calls, 0);
	calls = 100;
	assert_true(millm_model_populate(m, stop_after, &calls));
	assert_true(calls < 100);
	assert_true(millm_model_populate(m, NULL, NULL));
	millm_model_close(m);
}

/* As another quantization its Linears have other sizes; everything else and what it is itself do not change. */
static void
weights_as(void **state)
{
	MillmModel *m;
	const int64_t screen = millm_screen_file_bytes(11, 8);

	(void) state;
	write_llama("");
	m = must_open();
	assert_string_equal(millm_model_quantization(m), "FP16");
	assert_int_equal(millm_model_weights_bytes_as(m, "FP16"), m->weights_bytes);
	assert_int_not_equal(millm_model_weights_bytes_as(m, "Q4"), m->weights_bytes);
	/* codes, a scale for each row and the format's byte, of seven Linears; norms in F32; embedding and head, which are F32 here, in 16 bits */
	assert_int_equal(millm_model_weights_bytes_as(m, "Q8") - (screen > 0 ? screen : 0), 2 * (336 + 4 * 44 + 7) + 5 * 8 * 4 + 2 * 88 * 2);
	assert_int_not_equal(millm_model_weights_bytes_as(m, "Q8"), millm_model_weights_bytes_as(m, "Q4"));
	millm_model_close(m);
}

static void
inspect(void **state)
{
	MillmModel *m;
	json_t	   *json;

	(void) state;
	write_llama("");
	m = must_open();
	assert_non_null(json = millm_model_inspect_json(m));
	assert_string_equal(json_string_value(json_object_get(json, "model_type")), "llama");
	assert_int_equal(json_integer_value(json_object_get(json, "params")), m->n_params);
	assert_int_equal(json_integer_value(json_object_get(json, "num_hidden_layers")), 2);
	assert_non_null(json_object_get(json, "torch_dtype"));
	assert_true(json_array_size(json_object_get(json, "hook_points")) > 10);
	assert_string_equal(json_string_value(json_array_get(json_object_get(json, "files"), 0)), "model.safetensors");
	json_decref(json);
	millm_model_close(m);
}

static bool
note_percent(void *arg, int percent)
{
	int		   *last = arg;

	assert_true(percent >= *last && percent <= 100);
	*last = percent;
	return true;
}

/* --- shards ----------------------------------------------------------------------------------- */

#define INDEX(map) "{\"metadata\": {}, \"weight_map\": {" map "}}"
#define TWO_SHARDS INDEX("\"lm_head.weight\": \"a.safetensors\", \"model.norm.weight\": \"b.safetensors\", \"model.embed_tokens.weight\": \"a.safetensors\"")

static void
shards(void **state)
{
	MillmModel *m;
	json_t	   *json;
	int			percent = 0;

	(void) state;
	write_llama("");
	remove_file(dir, "model.safetensors");
	write_st(dir, "a.safetensors", llama, 2, 0);
	write_st(dir, "b.safetensors", llama + 2, N_LLAMA - 2, 3);
	write_text(dir, "model.safetensors.index.json", TWO_SHARDS);
	m = must_open();
	assert_int_equal(m->n_params, 2 * 88 + 8 + 2 * LAYER_PARAMS);
	assert_non_null(json = millm_model_inspect_json(m));
	assert_int_equal(json_array_size(json_object_get(json, "files")), 2);
	json_decref(json);
	assert_true(millm_model_populate(m, note_percent, &percent));
	assert_int_equal(percent, 100);
	millm_model_populate(m, NULL, NULL);
	millm_model_close(m);

	remove_file(dir, "b.safetensors");
	must_fail(MILLM_E_MODEL_FILES_MISSING, "b.safetensors\": No such file");
	write_st(dir, "b.safetensors", llama + 1, N_LLAMA - 1, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"model.embed_tokens.weight\" is in two files");
	write_st(dir, "b.safetensors", llama + 3, N_LLAMA - 3, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"model.norm.weight\" is missing");
	write_text(dir, "b.safetensors", "short");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "It has 5 bytes");
}

static void
bad_index(void **state)
{
	static const struct
	{
		const char *index;
		const char *text;
	}			cases[] = {
		{INDEX("\"a\": \"../x\""), "invalid shard name \"../x\""},
		{INDEX("\"a\": \"/etc/passwd\""), "invalid shard name \"/etc/passwd\""},
		{INDEX("\"a\": \"sub/a.safetensors\""), "invalid shard name"},
		{INDEX("\"a\": \"sub\\\\a.safetensors\""), "invalid shard name"},
		{INDEX("\"a\": \"..\""), "invalid shard name \"..\""},
		{INDEX("\"a\": \"\""), "invalid shard name \"\""},
		{INDEX("\"a\": \".hidden\""), "invalid shard name \".hidden\""},
		{INDEX("\"a\": \"x\\ny/\""), "invalid shard name \"x?y/\""},
		{INDEX("\"a\": 1"), "maps \"a\" to something that is not a file name"},
		{INDEX("\"a\": null"), "maps \"a\""},
		{INDEX(""), "no weight_map"},
		{"{\"weight_map\": []}", "no weight_map"},
		{"{\"weight_map\": \"a.safetensors\"}", "no weight_map"},
		{"{}", "no weight_map"},
		{"[]", "no weight_map"},
		{"{\"weight_map\"", "not valid JSON"},
		{"", "not valid JSON"},
	};
	char		name[6000];

	(void) state;
	write_llama("");
	remove_file(dir, "model.safetensors");
	write_st(dir, "a.safetensors", llama, N_LLAMA, 0);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		write_text(dir, "model.safetensors.index.json", cases[i].index);
		must_fail(MILLM_E_INVALID_MODEL_FILE, cases[i].text);
	}
	memset(name, 'a', sizeof(name));
	memcpy(name, "{\"weight_map\": {\"a\": \"", 22);
	memcpy(name + sizeof(name) - 4, "\"}}", 4);
	write_text(dir, "model.safetensors.index.json", name);
	must_fail(MILLM_E_INVALID_ARGUMENT, "longer than 4095 bytes");
}

static void
too_many_shards(void **state)
{
	char	   *text = malloc(200000);
	size_t		n;
	char		file[64];

	(void) state;
	write_llama("");
	remove_file(dir, "model.safetensors");
	n = (size_t) sprintf(text, "{\"weight_map\": {");
	write_st(dir, "s0000", NULL, 0, 0);
	for (int i = 0; i <= 4096; i++)
	{
		n += (size_t) sprintf(text + n, "%s\"t%d\": \"s%04d\"", i ? ", " : "", i, i);
		if (i)
		{
			char		from[128], to[128];

			snprintf(from, sizeof(from), "%s/s0000", dir);
			snprintf(file, sizeof(file), "s%04d", i);
			snprintf(to, sizeof(to), "%s/%s", dir, file);
			assert_int_equal(link(from, to), 0);
		}
	}
	sprintf(text + n, "}}");
	write_text(dir, "model.safetensors.index.json", text);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "names more than 4096 files");
	free(text);
}

/* --- damage ----------------------------------------------------------------------------------- */

static void
missing_files(void **state)
{
	char		path[512];

	(void) state;
	must_fail(MILLM_E_MODEL_FILES_MISSING, "there is no config.json");
	write_llama("");
	remove_file(dir, "model.safetensors");
	must_fail(MILLM_E_MODEL_FILES_MISSING, "no weights in");
	/* what is not a regular file is not waited for */
	remove_file(dir, "config.json");
	snprintf(path, sizeof(path), "%s/config.json", dir);
	assert_int_equal(mkfifo(path, 0600), 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "not a regular file");
	remove_file(dir, "config.json");
	assert_int_equal(symlink("/dev/zero", path), 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "not a regular file");
	remove_file(dir, "config.json");
	assert_int_equal(symlink("config.json", path), 0);
	must_fail(MILLM_E_MODEL_FILES_MISSING, "could not open");
}

static void
config_too_large(void **state)
{
	size_t		n = ((size_t) 4 << 20) + 1;
	char	   *text = malloc(n);

	(void) state;
	memset(text, ' ', n);
	write_llama("");
	write_file(dir, "config.json", text, n);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "At most 4194304 bytes are read");
	write_file(dir, "config.json", text, n - 1);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "not valid JSON");
	free(text);
}

/* Take away, or reshape, or re-type each tensor in turn: each is missed by its name, and nothing leaks. */
static void
each_tensor(void **state)
{
	TestTensor	tensors[N_LLAMA];
	char		text[200];

	(void) state;
	write_llama("");
	for (size_t i = 0; i < N_LLAMA; i++)
	{
		memcpy(tensors, llama, sizeof(llama));
		memmove(tensors + i, tensors + i + 1, (N_LLAMA - i - 1) * sizeof(tensors[0]));
		write_st(dir, "model.safetensors", tensors, N_LLAMA - 1, 0);
		snprintf(text, sizeof(text), "tensor \"%s\" is missing", llama[i].name);
		must_fail(MILLM_E_INVALID_MODEL_FILE, text);

		memcpy(tensors, llama, sizeof(llama));
		tensors[i].dims[0]++;
		write_st(dir, "model.safetensors", tensors, N_LLAMA, 0);
		snprintf(text, sizeof(text), "tensor \"%s\" has the wrong shape", llama[i].name);
		must_fail(MILLM_E_INVALID_MODEL_FILE, text);
		snprintf(text, sizeof(text), "%d dimensions", llama[i].dims[1] ? 2 : 1);
		must_fail(MILLM_E_INVALID_MODEL_FILE, text);

		/* the same elements with one dimension more */
		memcpy(tensors, llama, sizeof(llama));
		tensors[i].dims[llama[i].dims[1] ? 2 : 1] = 1;
		write_st(dir, "model.safetensors", tensors, N_LLAMA, 0);
		snprintf(text, sizeof(text), "%d dimensions", llama[i].dims[1] ? 3 : 2);
		must_fail(MILLM_E_INVALID_MODEL_FILE, text);

		memcpy(tensors, llama, sizeof(llama));
		tensors[i].dtype = "I64";
		tensors[i].element_bytes = 8;
		write_st(dir, "model.safetensors", tensors, N_LLAMA, 0);
		snprintf(text, sizeof(text), "dtype I64 of tensor \"%s\"", llama[i].name);
		must_fail(MILLM_E_UNSUPPORTED, text);
	}
	write_st(dir, "model.safetensors", NULL, 0, 0);
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"model.embed_tokens.weight\" is missing");
}

static void
extra_tensors(void **state)
{
	TestTensor	tensors[N_LLAMA + 40];
	static char names[40][200];

	(void) state;
	memcpy(tensors, llama, sizeof(llama));
	for (int i = 0; i < 40; i++)
	{
		/* names of every length around the limit of what is shown, of two-byte characters */
		snprintf(names[i], sizeof(names[i]), "z%02d%.*s", i, i, "...........................................");
		while (strlen(names[i]) < 150)
			strcat(names[i], "\xc3\xa9");
		tensors[N_LLAMA + i] = (TestTensor) {names[i], "F32", 4, {1}, 0};
	}
	write_llama("");
	for (size_t n = 1; n <= 40; n++)
	{
		MillmModel *m;
		MillmError	err;

		write_st(dir, "model.safetensors", tensors, N_LLAMA + n, 0);
		assert_failure(millm_model_open(dir, &m, &err), &err, MILLM_E_INVALID_MODEL_FILE, "have no place in a model of type \"llama\"");
		assert_non_null(strstr(err.detail, "such as \"z00"));
		assert_int_equal(millm_utf8_valid_bytes(err.detail, strlen(err.detail)), strlen(err.detail));
		assert_int_equal(strtol(err.detail + strlen("There are "), NULL, 10), n);
	}
	/* a layer more than the config says */
	write_st(dir, "model.safetensors", llama, N_LLAMA, 0);
	write_text(dir, "config.json", CONFIG ", \"num_hidden_layers\": 1}");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "There are 9 of them, such as \"model.layers.1.input_layernorm.weight\"");
	write_text(dir, "config.json", CONFIG ", \"num_hidden_layers\": 1024}");
	must_fail(MILLM_E_INVALID_MODEL_FILE, "tensor \"model.layers.2.input_layernorm.weight\" is missing");
}

/* A config that disagrees with the files; sizes that no file has. */
static void
config_and_files(void **state)
{
	static const struct
	{
		const char *change;
		const char *text;
	}			cases[] = {
		{", \"vocab_size\": 12", "The config implies [12, 8]; it has 2 dimensions, [11, 8]"},
		{", \"vocab_size\": 4194304, \"hidden_size\": 65536, \"head_dim\": 4", "The config implies [4194304, 65536]"},
		{", \"hidden_size\": 16", "The config implies [11, 16]"},
		{", \"intermediate_size\": 1048576", "The config implies [1048576, 8]"},
		{", \"num_key_value_heads\": 2", "\"model.layers.0.self_attn.k_proj.weight\" has the wrong shape"},
		{", \"num_attention_heads\": 1024, \"num_key_value_heads\": 1, \"head_dim\": 1024", "The config implies [1048576, 8]"},
		{", \"head_dim\": 8", "\"model.layers.0.self_attn.q_proj.weight\" has the wrong shape"},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		write_llama(cases[i].change);
		must_fail(MILLM_E_INVALID_MODEL_FILE, cases[i].text);
	}
	write_llama(", \"quantization_config\": {\"quant_method\": \"awq\"}");
	must_fail(MILLM_E_UNSUPPORTED, "awq");
	write_llama(", \"model_type\": \"mamba2\"");
	must_fail(MILLM_E_UNSUPPORTED_ARCHITECTURE, "mamba2");
	assert_non_null(strstr(millm_supported_model_types(), "llama"));
}

static void
long_path(void **state)
{
	char		path[5000];
	MillmModel *m;
	MillmError	err;

	(void) state;
	memset(path, 'a', sizeof(path));
	for (size_t n = 4060; n < 4100; n++)
	{
		MillmCode	rc;

		path[n] = '\0';
		rc = millm_model_open(path, &m, &err);
		assert_true(rc == MILLM_E_INVALID_ARGUMENT || rc == MILLM_E_MODEL_FILES_MISSING);
		path[n] = 'a';
	}
	path[sizeof(path) - 1] = '\0';
	assert_failure(millm_model_open(path, &m, &err), &err, MILLM_E_INVALID_ARGUMENT, "longer than 4095 bytes");
}

/* --- quantized --------------------------------------------------------------------------------- */

/* What lies beside a weight of n_out x n_in codes in blocks of 32, nested or not; returns how many tensors. */
#define MAX_PARTS 6
typedef struct Parts
{
	TestTensor	tensors[MAX_PARTS];
	const void *contents[MAX_PARTS];
	size_t		n;
	char		names[MAX_PARTS][120];
	char		state[MILLM_QUANT_STATE_MAX];
	float		map[256];
} Parts;

static TestTensor *
add_part(Parts *p, const char *module, const char *suffix, const char *dtype, int element_bytes, int64_t d0, int64_t d1, const void *content)
{
	snprintf(p->names[p->n], sizeof(p->names[0]), "%s%s", module, suffix);
	p->tensors[p->n] = (TestTensor) {p->names[p->n], dtype, element_bytes, {d0, d1}, 1};
	p->contents[p->n] = content;
	return &p->tensors[p->n++];
}

static void
four_bit(Parts *p, const char *module, MillmQuantFormat format, int64_t n_out, int64_t n_in, bool nested)
{
	int64_t		n_blocks = (n_out * n_in + 31) / 32;
	MillmQuantState state = {format, MILLM_F16, n_out, n_in, 32, nested, 64, 0.5f};

	p->n = 0;
	add_part(p, module, ".weight", "U8", 1, (n_out * n_in + 1) / 2, 1, NULL);
	add_part(p, module, ".weight.absmax", nested ? "U8" : "F32", nested ? 1 : 4, n_blocks, 0, NULL);
	add_part(p, module, ".weight.quant_map", "F32", 4, 16, 0, format == MILLM_QUANT_NF4 ? millm_nf4_codebook : millm_fp4_codebook);
	if (nested)
	{
		millm_dynamic_map(p->map);
		add_part(p, module, ".weight.nested_absmax", "F32", 4, (n_blocks + 63) / 64, 0, NULL);
		add_part(p, module, ".weight.nested_quant_map", "F32", 4, 256, 0, p->map);
	}
	add_part(p, module, format == MILLM_QUANT_NF4 ? ".weight.quant_state.bitsandbytes__nf4" : ".weight.quant_state.bitsandbytes__fp4", "U8", 1,
			 (int64_t) millm_quant_state_write(&state, p->state, sizeof(p->state)), 0, p->state);
}

static void
int8(Parts *p, const char *module, int64_t n_out, int64_t n_in)
{
	p->n = 0;
	add_part(p, module, ".weight", "I8", 1, n_out, n_in, NULL);
	add_part(p, module, ".SCB", "F32", 4, n_out, 0, NULL)->start = 5;
	add_part(p, module, ".weight_format", "U8", 1, 1, 0, NULL);
}

/* The tensors of base, those of the parts instead of the weights with their names. */
static void
write_with(const TestTensor *base, size_t n_base, const Parts *parts, size_t n_parts, int pad)
{
	TestTensor	tensors[64];
	const void *contents[64] = {NULL};
	size_t		n = 0;

	for (size_t i = 0; i < n_base; i++)
	{
		bool		replaced = false;

		for (size_t k = 0; k < n_parts; k++)
			replaced |= strcmp(base[i].name, parts[k].names[0]) == 0;
		if (!replaced)
			tensors[n++] = base[i];
	}
	for (size_t k = 0; k < n_parts; k++)
		for (size_t i = 0; i < parts[k].n; i++)
		{
			assert_true(n < 64);
			contents[n] = parts[k].contents[i];
			tensors[n++] = parts[k].tensors[i];
		}
	write_st_of(dir, "model.safetensors", tensors, contents, n, pad);
}

static void
binds_quantized(void **state)
{
	Parts		parts[4];
	MillmModel *m;
	const MillmLayer *l;

	(void) state;
	four_bit(&parts[0], "model.layers.1.self_attn.q_proj", MILLM_QUANT_NF4, 8, 8, true);
	four_bit(&parts[1], "model.layers.1.mlp.up_proj", MILLM_QUANT_FP4, 6, 8, false);
	four_bit(&parts[2], "lm_head", MILLM_QUANT_NF4, 11, 8, true);
	int8(&parts[3], "model.layers.1.self_attn.v_proj", 4, 8);
	for (int pad = 0; pad < 4; pad++)
	{
		write_llama(", \"tie_word_embeddings\": true");
		write_with(llama, N_LLAMA, parts, 4, pad);
		m = must_open();
		l = &m->layers[1];
		assert_true(l->q.dtype == MILLM_4BIT && !l->q.in_out && l->q.n_out == 8 && l->q.n_in == 8 && l->q.stride == 8 && l->q.first == 0);
		assert_true(l->q.block_size == 32 && l->q.nested_block_size == 64 && l->q.nested_offset == 0.5f && l->q.rounded == MILLM_F16);
		assert_true(l->q.codebook == millm_nf4_codebook && at(l->q.nested_absmax, 0) == 1 && l->q.nested_map[255] == 1.0f);
		assert_true((uintptr_t) l->q.nested_map % 64 == 0 && l->q.nested_map == m->head.nested_map);
		assert_true(l->up.dtype == MILLM_4BIT && l->up.codebook == millm_fp4_codebook && l->up.nested_block_size == 0 && at(l->up.absmax, 1) == 2);
		assert_true(l->v.dtype == MILLM_INT8 && l->v.stride == 8 && at(l->v.scale, 3) == 8);
		assert_true(l->k.dtype == MILLM_F32 && at(l->k.data, 0) == 22);
		assert_true(m->head.dtype == MILLM_4BIT && m->head.n_out == 11 && !m->config.tied);
		assert_non_null(m->quantization);
		/* scales are no parameters */
		assert_int_equal(m->n_params, 2 * 88 + 8 + 2 * LAYER_PARAMS);
		millm_model_close(m);
	}
}

/* bitsandbytes has turned c_attn: q, k and v are rows of it. */
static void
binds_quantized_gpt2(void **state)
{
	Parts		parts[2];
	MillmModel *m;
	const MillmLayer *l;

	(void) state;
	four_bit(&parts[0], "transformer.h.0.attn.c_attn", MILLM_QUANT_NF4, 12, 4, true);
	int8(&parts[1], "transformer.h.0.mlp.c_fc", 3, 4);
	write_text(dir, "config.json", GPT2_CONFIG);
	write_with(gpt2, N_GPT2, parts, 2, 1);
	m = must_open();
	l = &m->layers[0];
	assert_true(l->q.dtype == MILLM_4BIT && !l->q.in_out && l->q.n_out == 4 && l->q.n_in == 4 && l->q.first == 0);
	assert_true(l->k.first == 16 && l->v.first == 32 && l->v.n_out == 4 && l->v.data == l->q.data && l->v.absmax == l->q.absmax);
	assert_true(l->up.dtype == MILLM_INT8 && !l->up.in_out && l->up.n_out == 3 && l->up.n_in == 4);
	assert_true(l->down.in_out && l->o.in_out);
	millm_model_close(m);

	int8(&parts[0], "transformer.h.0.attn.c_attn", 12, 4);
	write_with(gpt2, N_GPT2, parts, 1, 1);
	m = must_open();
	l = &m->layers[0];
	assert_true((const char *) l->k.data - (const char *) l->q.data == 16 && (const char *) l->v.data - (const char *) l->q.data == 32);
	assert_true(at(l->q.scale, 0) == 5 && at(l->k.scale, 0) == 9 && at(l->v.scale, 3) == 16);
	millm_model_close(m);
}

/* Take away each part, make it longer, of another dtype or shape: an error that names the module, and nothing leaks. */
static void
each_part(void **state)
{
	static const char module[] = "model.layers.1.self_attn.q_proj";
	Parts		p;

	(void) state;
	write_llama("");
	for (int kind = 0; kind < 3; kind++)
		for (size_t i = 0; i < MAX_PARTS; i++)
			for (int damage = 0; damage < 4; damage++)
			{
				TestTensor *t = &p.tensors[i];

				if (kind == 2)
					int8(&p, module, 8, 8);
				else
					four_bit(&p, module, MILLM_QUANT_NF4, 8, 8, kind == 0);
				if (i >= p.n)
					continue;
				if (damage == 0)
				{
					memmove(t, t + 1, (p.n - i - 1) * sizeof(*t));
					memmove(&p.contents[i], &p.contents[i + 1], (p.n - i - 1) * sizeof(p.contents[0]));
					p.n--;
				}
				else
					p.contents[i] = NULL;
				if (damage == 1)
					t->dims[0]++;
				else if (damage == 2)
					t->dtype = t->element_bytes == 1 ? "BOOL" : "I32";
				else if (damage == 3)
					t->dims[t->dims[1] ? 2 : 1] = 2;
				write_with(llama, N_LLAMA, &p, 1, 0);
				if (kind == 2 && i == 2 && damage == 0)
					millm_model_close(must_open());	/* weight_format may be absent */
				else
					must_fail(MILLM_E_INVALID_MODEL_FILE, module);
			}
}

static void
quantized_embedding(void **state)
{
	Parts		p;

	(void) state;
	write_llama("");
	four_bit(&p, "model.embed_tokens", MILLM_QUANT_NF4, 11, 8, false);
	write_with(llama, N_LLAMA, &p, 1, 0);
	must_fail(MILLM_E_UNSUPPORTED, "the embedding \"model.embed_tokens.weight\" is quantized");
	int8(&p, "model.embed_tokens", 11, 8);
	write_with(llama, N_LLAMA, &p, 1, 0);
	must_fail(MILLM_E_UNSUPPORTED, "the embedding \"model.embed_tokens.weight\" is quantized");
}

/* --- mutations -------------------------------------------------------------------------------- */

static void
mutations(void **state)
{
	int			n = 0;

	(void) state;
	for (; millm_mutation_name(n); n++)
	{
		MillmError	err;
		MillmModel *m;

		for (int k = 0; k < n; k++)
			assert_string_not_equal(millm_mutation_name(k), millm_mutation_name(n));
		write_llama("");
		m = must_open();
		assert_int_equal(millm_model_mutate(m, millm_mutation_name(n), &err), MILLM_OK);
		millm_model_close(m);
		write_text(dir, "config.json", GPT2_CONFIG);
		write_st(dir, "model.safetensors", gpt2, N_GPT2, 0);
		m = must_open();
		assert_int_equal(millm_model_mutate(m, millm_mutation_name(n), &err), MILLM_OK);
		assert_failure(millm_model_mutate(m, "no_such_flag", &err), &err, MILLM_E_INVALID_ARGUMENT, "no_such_flag");
		millm_model_close(m);
	}
	assert_true(n >= 20);
	assert_null(millm_mutation_name(-1));
	assert_null(millm_mutation_name(n + 1));
}

int
main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(binds_llama), TEST(binds_gpt2), TEST(no_prefix), TEST(tied), TEST(binds_opt), TEST(binds_own_norms), TEST(mixed_dtypes), TEST(biases), TEST(ignored_buffers),
		TEST(generation_config), TEST(inspect), TEST(populate_stops), TEST(weights_as), TEST(shards), TEST(bad_index), TEST(too_many_shards), TEST(missing_files), TEST(config_too_large),
		TEST(each_tensor), TEST(extra_tensors), TEST(config_and_files), TEST(long_path),
		TEST(binds_quantized), TEST(binds_quantized_gpt2), TEST(each_part), TEST(quantized_embedding), TEST(mutations),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
