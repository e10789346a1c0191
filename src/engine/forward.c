/*
 * forward.c -- the forward pass: tokens in, rows of logits out, written once against backend.h.
 *
 * Owns:     the backend, its buffers, the page pool.
 * Borrows:  the model; a step's batch.
 * Does not: know a model by name (it reads MillmConfig and MillmLayer), nor a CPU from a GPU.
 *
 * A step runs all its tokens through layer after layer.  It writes K and V past the sequences' lengths,
 * which nobody reads, and only when the last layer is done do the lengths grow: a step that is
 * canceled or fails has not happened.
 *
 *	 x = embedding, projected to the hidden size where it is of another one    [n, hidden]
 *	 each layer:  x += o(attention(rope(head norms(qkv(norm(x))))))
 *	              x += down(act(gate(norm(x))) * up(norm(x)))
 *	              (some families norm what is added, too, or only that; in others, both read the same x: parallel)
 *	              or, in place of the MLP, those of the experts that a token chooses, each times its weight
 *	 logits = softcap(head(norm(x of the wanted rows)))  [n_wanted, vocab]
 */
#include "forward.h"

#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "device.h"
#include "kv.h"
#include "route.h"

#define MAX_BATCH_TOKENS		65536
/* Steps that read the full head after one that the screening copy could not decide: who chooses among many goes on so. */
#define UNSCREENED_STEPS		15

struct MillmForward
{
	const MillmModel *model;
	MillmBackend *be;
	MillmKvLayout kv;
	MillmKvPool pool;
	int			max_batch_tokens;
	int			max_logits;
	bool		is_screened;	/* the head has a copy that may be used */
	int			n_unscreened;	/* steps for which it is not asked */
	bool		has_lists;		/* of the last rows of logits the backend knows what is listed */
	MillmHeadUse head_use;
	MillmBuffer *e;				/* [n, embedding size]; absent where that is the hidden size */
	MillmBuffer *x;				/* [n, hidden]: the residual */
	MillmBuffer *h;				/* [n, hidden]: normed */
	MillmBuffer *q;				/* [n, heads * head_dim] */
	MillmBuffer *k, *v;			/* [n, KV heads * head_dim] */
	MillmBuffer *qkv;			/* [n, (heads + 2 KV heads) * head_dim]: what is split into these; absent where no layer has it so */
	MillmBuffer *a;				/* [n, heads * head_dim]: what attention gives */
	MillmBuffer *gate;			/* [n, FFN]; absent without mlp_gated */
	MillmBuffer *up;			/* [n, FFN] */
	MillmBuffer *logits;		/* [n, vocab] */
	/* of models with mixtures of experts */
	MillmBuffer *scores;		/* [n, experts] */
	MillmBuffer *shared_score;	/* [n, 1]; absent without a shared expert */
	MillmBuffer *picked;		/* [n, hidden]: an expert's tokens */
	MillmBuffer *answer;		/* [n, hidden]: and what it makes of them */
	MillmRoutes routes;
	/* the step, [max_batch_tokens] each */
	int32_t    *tokens;
	int32_t    *positions;
	int32_t    *planned;		/* lengths that the sequences are planned for */
	int32_t    *wanted;			/* rows whose logits are wanted, then those whose hidden states are */
	int			n_logits;		/* of them, the first ones */
	int			n_wanted;
	MillmTop   *tops;			/* which of them */
	const int32_t **pages;		/* [max_batch_tokens, groups]: page tables */
};

/* Columns of the buffers: the widest layer decides. */
typedef struct Widths
{
	int64_t		q, kv, qkv, ffn;
} Widths;

static int64_t
larger(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

static Widths
widths(const MillmModel *model)
{
	Widths		w = {0};

	for (int i = 0; i < model->config.n_layers; i++)
	{
		const MillmLayer *layer = &model->layers[i];

		w.q = larger(w.q, (int64_t) layer->n_heads * layer->head_dim);
		w.kv = larger(w.kv, (int64_t) layer->n_kv_heads * layer->head_dim);
		w.qkv = larger(w.qkv, layer->qkv.n_out);
		w.ffn = larger(w.ffn, larger(layer->up.n_out, larger(layer->experts ? layer->experts[0].up.n_out : 0, layer->shared.up.n_out)));
	}
	return w;
}

static const MillmBackendKind *
kind_of(const MillmForwardOptions *options)
{
	return options->device ? options->device->kind : &millm_backend_cpu;
}

static int
batch_tokens(const MillmForwardOptions *options)
{
	return options->max_batch_tokens == 0 ? MILLM_BATCH_TOKENS : options->max_batch_tokens;
}

static int
logits_rows(const MillmForwardOptions *options)
{
	const int	n = batch_tokens(options);

	return options->max_logits == 0 || options->max_logits > n ? n : options->max_logits;
}

void
millm_forward_kv_layout(const MillmModel *model, MillmKvLayout *layout)
{
	int			windows[MILLM_MAX_LAYERS];

	for (int i = 0; i < model->config.n_layers; i++)
		windows[i] = model->layers[i].window;
	millm_kv_layout(layout, windows, model->config.n_layers);
}

int64_t
millm_kv_page_bytes(const MillmModel *model, const MillmForwardOptions *options)
{
	MillmKvLayout layout;

	millm_forward_kv_layout(model, &layout);
	return kind_of(options)->page_bytes(model, options->kernels, options->kv_format, layout.layers_per_page);
}

MillmCode
millm_kv_format(const char *name, MillmKvFormat *out, MillmError *err)
{
	if (strcmp(name, "auto") != 0 && strcmp(name, "int8") != 0)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid dtype of the KV cache: \"%.64s\"", name);
		millm_hint(err, "It is \"auto\" or \"int8\".");
		return MILLM_E_INVALID_ARGUMENT;
	}
	*out = strcmp(name, "int8") == 0 ? MILLM_KV_INT8 : MILLM_KV_AUTO;
	return MILLM_OK;
}

static MillmBackendOptions
backend_options(const MillmModel *model, const MillmForwardOptions *options)
{
	const int64_t n_sequences = options->max_sequences > 0 ? options->max_sequences : 1;
	const int64_t length = options->max_length > 0 ? options->max_length : model->config.max_context;
	MillmKvLayout layout;

	millm_forward_kv_layout(model, &layout);
	return (MillmBackendOptions) {
		.ordinal = options->device ? options->device->ordinal : 0,
		.n_threads = options->n_threads,
		.deterministic = options->deterministic,
		.kernels = options->kernels,
		.kv_format = options->kv_format,
		.max_tokens = batch_tokens(options),
		.n_pages = options->n_pages,
		.layers_per_page = layout.layers_per_page,
		.n_groups = layout.n_groups,
		.max_entries = n_sequences * layout.n_groups * (length / MILLM_KV_PAGE_TOKENS + 1),
		.progress = options->progress,
		.progress_arg = options->progress_arg,
	};
}

int64_t
millm_forward_workspace_bytes(const MillmModel *model, const MillmForwardOptions *options)
{
	const MillmConfig *c = &model->config;
	const MillmBackendKind *kind = kind_of(options);
	const MillmBackendOptions bo = backend_options(model, options);
	Widths		w = widths(model);
	int			n = batch_tokens(options);
	int64_t		experts = c->n_experts == 0 ? 0 : 2 * kind->buffer_bytes(n, c->hidden_size) +
		kind->buffer_bytes(n, c->n_experts) + kind->buffer_bytes(n, 1) + (int64_t) n * c->n_chosen * 16;

	return experts + 2 * kind->buffer_bytes(n, c->hidden_size) + 2 * kind->buffer_bytes(n, w.q) +
		2 * kind->buffer_bytes(n, w.kv) + (c->mlp_gated ? 2 : 1) * kind->buffer_bytes(n, w.ffn) +
		(w.qkv ? kind->buffer_bytes(n, w.qkv) : 0) + (model->project_in.data ? kind->buffer_bytes(n, c->embedding_size) : 0) +
		kind->buffer_bytes(logits_rows(options), c->vocab_size) + kind->own_bytes(model, &bo);
}

static void
copy_page(void *arg, int32_t dst, int32_t src)
{
	MillmBackend *be = arg;

	be->copy_page(be, dst, src);
}

static MillmCode
create_buffers(MillmForward *fw, MillmError *err)
{
	const MillmConfig *c = &fw->model->config;
	Widths		w = widths(fw->model);
	struct
	{
		MillmBuffer **buffer;
		int64_t		n_columns;
	}			wanted[] = {
		{&fw->x, c->hidden_size}, {&fw->h, c->hidden_size}, {&fw->q, w.q}, {&fw->k, w.kv}, {&fw->v, w.kv}, {&fw->a, w.q},
		{&fw->up, w.ffn}, {&fw->logits, c->vocab_size}, {&fw->gate, c->mlp_gated ? w.ffn : 0}, {&fw->qkv, w.qkv},
		{&fw->e, fw->model->project_in.data ? c->embedding_size : 0},
		{&fw->scores, c->n_experts}, {&fw->shared_score, c->n_experts > 0 && c->shared_expert_size > 0}, {&fw->picked, c->n_experts > 0 ? c->hidden_size : 0},
		{&fw->answer, c->n_experts > 0 ? c->hidden_size : 0},
	};

	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
	{
		MillmBuffer **b = wanted[i].buffer;
		const int	n_rows = b == &fw->logits ? fw->max_logits : fw->max_batch_tokens;
		const bool	is_read = b == &fw->logits || b == &fw->scores || b == (fw->model->project_out.data ? &fw->e : &fw->h);
		MillmCode	rc;

		if (wanted[i].n_columns > 0 && (rc = fw->be->buffer_create(fw->be, n_rows, wanted[i].n_columns, is_read, b, err)) != MILLM_OK)
			return rc;
	}
	if (c->n_experts > 0 && !millm_routes_init(&fw->routes, c->n_experts, c->n_chosen, fw->max_batch_tokens))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	return MILLM_OK;
}

MillmCode
millm_forward_create(const MillmModel *model, const MillmForwardOptions *options, MillmForward **out, MillmError *err)
{
	int			n = batch_tokens(options);
	MillmForward *fw;
	MillmCode	rc;
	const MillmBackendOptions bo = backend_options(model, options);

	if (n < 1 || n > MAX_BATCH_TOKENS)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid number of tokens of a step: %d", n);
	if (!(fw = calloc(1, sizeof(*fw))))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	fw->model = model;
	fw->max_batch_tokens = n;
	fw->max_logits = logits_rows(options);
	millm_forward_kv_layout(model, &fw->kv);
	fw->tokens = calloc((size_t) n, sizeof(*fw->tokens));
	fw->positions = calloc((size_t) n, sizeof(*fw->positions));
	fw->planned = calloc((size_t) n, sizeof(*fw->planned));
	fw->wanted = calloc((size_t) n, sizeof(*fw->wanted));
	fw->tops = calloc((size_t) n, sizeof(*fw->tops));
	fw->pages = calloc((size_t) n * (size_t) fw->kv.n_groups, sizeof(*fw->pages));
	fw->is_screened = model->screen.codes.data && !options->full_head && millm_config_can_screen(&model->config);
	if (!fw->tokens || !fw->positions || !fw->planned || !fw->wanted || !fw->tops || !fw->pages)
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else if ((rc = kind_of(options)->create(model, &bo, &fw->be, err)) == MILLM_OK &&
			 (rc = create_buffers(fw, err)) == MILLM_OK)
		rc = millm_kv_init(&fw->pool, options->n_pages, fw->kv.windows, fw->kv.n_groups, n, options->prefix_cache, copy_page, fw->be, err);
	if (rc != MILLM_OK)
	{
		millm_forward_free(fw);
		return rc;
	}
	fw->is_screened &= fw->be->screened_matmul != NULL;
	*out = fw;
	return MILLM_OK;
}

void
millm_forward_free(MillmForward *fw)
{
	if (!fw)
		return;
	millm_kv_reset(&fw->pool);
	if (fw->be)
		fw->be->free(fw->be);
	free(fw->tokens);
	free(fw->positions);
	free(fw->planned);
	free(fw->wanted);
	free(fw->tops);
	free(fw->pages);
	millm_routes_free(&fw->routes);
	free(fw);
}

const char *
millm_forward_kernels(const MillmForward *fw)
{
	return fw->be->variant;
}

const char *
millm_forward_kv_dtype(const MillmForward *fw)
{
	return fw->be->kv_dtype == MILLM_F32 ? "float32" : fw->be->kv_dtype == MILLM_F16 ? "float16" : "int8";
}

int
millm_forward_threads(const MillmForward *fw)
{
	return fw->be->n_threads;
}

int
millm_forward_max_batch_tokens(const MillmForward *fw)
{
	return fw->max_batch_tokens;
}

MillmHeadUse
millm_forward_head_use(const MillmForward *fw)
{
	return fw->head_use;
}

bool
millm_forward_counts(const MillmForward *fw, MillmBackendCounts *counts)
{
	if (!fw->be->counts)
		return false;
	*counts = fw->be->counts(fw->be);
	return true;
}

int64_t
millm_kv_pages_total(const MillmForward *fw)
{
	return fw->pool.n_pages;
}

int64_t
millm_kv_pages_free(const MillmForward *fw)
{
	return millm_kv_n_free(&fw->pool);
}

int64_t
millm_kv_pages_cached(const MillmForward *fw)
{
	return fw->pool.prefix ? millm_prefix_n_pages(fw->pool.prefix) : 0;
}

int64_t
millm_kv_pages_needed(const MillmForward *fw, int length)
{
	return millm_kv_pages(&fw->kv, length, fw->max_batch_tokens);
}

/* Equal for sequences whose positions are rotated alike. */
static int
rotation(const MillmForward *fw, int planned_length)
{
	const MillmConfig *c = &fw->model->config;
	const int	local = millm_rope_kind(&c->local_rope, planned_length);

	return local > 0 ? planned_length : millm_rope_kind(&c->rope, planned_length);
}

int64_t
millm_kv_pages_held(const MillmForward *fw, int planned_length, const int32_t *tokens, int n, int length)
{
	return millm_kv_held(&fw->pool, rotation(fw, planned_length), tokens, n, length);
}

MillmSequence *
millm_sequence_create(MillmForward *fw, int planned_length)
{
	MillmSequence *seq = millm_kv_create(&fw->pool);

	if (!seq)
		return NULL;
	seq->planned_length = planned_length;
	seq->rotation = rotation(fw, planned_length);
	return seq;
}

MillmCode
millm_forward_check(const MillmForward *fw, MillmError *err)
{
	return millm_kv_check(&fw->pool, err);
}

/* Is the batch what forward.h says it must be?  Fills the step's arrays. */
static MillmCode
take_batch(MillmForward *fw, const MillmBatchToken *batch, int n, MillmError *err)
{
	const MillmConfig *c = &fw->model->config;
	const MillmSequence *previous = NULL;

	fw->n_logits = fw->n_wanted = 0;
	if (n < 1 || n > fw->max_batch_tokens)
		return millm_fail(err, MILLM_E_INTERNAL, "a step of %d tokens; at least 1 and at most %d are possible", n, fw->max_batch_tokens);
	for (int t = 0; t < n; t++)
	{
		const MillmBatchToken *b = &batch[t];
		MillmSequence *seq = b->seq;

		if (b->token < 0 || b->token >= c->vocab_size)
			return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "token id %d is not in the model's vocabulary of %d", b->token, c->vocab_size);
		if (seq != previous && seq->n_in_step > 0)
			return millm_fail(err, MILLM_E_INTERNAL, "the tokens of a sequence are not together in the step");
		if (b->position != seq->length + seq->n_in_step)
			return millm_fail(err, MILLM_E_INTERNAL, "a token at position %d where %d is next", b->position, seq->length + seq->n_in_step);
		if (fw->model->position_embedding.data && b->position >= fw->model->position_embedding.n_out)
			return millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "position %d is past the model's %lld positions",
							  b->position, (long long) fw->model->position_embedding.n_out);
		if (c->position == MILLM_POS_ALIBI && b->position >= c->max_positions)
			return millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "position %d is past the model's %d positions", b->position, c->max_positions);
		seq->n_in_step++;
		if (!millm_kv_has_room(seq, seq->length + seq->n_in_step))
			return millm_fail(err, MILLM_E_INTERNAL, "no KV page was reserved for position %d", b->position);
		previous = seq;
		fw->tokens[t] = b->token;
		fw->positions[t] = b->position;
		fw->planned[t] = seq->planned_length;
		for (int g = 0; g < fw->kv.n_groups; g++)
			fw->pages[(size_t) t * (size_t) fw->kv.n_groups + (size_t) g] = seq->tables[g].pages;
		if (b->want_logits)
		{
			if (fw->n_logits == fw->max_logits)
				return millm_fail(err, MILLM_E_INTERNAL, "a step wants more than the %d rows of logits that there is room for", fw->max_logits);
			fw->tops[fw->n_logits] = b->top;
			fw->wanted[fw->n_logits++] = t;
		}
	}
	fw->n_wanted = fw->n_logits;
	for (int t = 0; t < n; t++)
		if (batch[t].want_hidden && !batch[t].want_logits)
			fw->wanted[fw->n_wanted++] = t;
	return MILLM_OK;
}

static void
norm(MillmForward *fw, MillmBuffer *y, MillmBuffer *x, const MillmVector *weight, const MillmVector *bias, int n)
{
	const MillmConfig *c = &fw->model->config;

	fw->be->norm(fw->be, y, x, c->norm, weight, bias, c->norm_eps, 1, weight->n, n);
}

/* x += scale norm(in w^T + bias), where the family has a scale and a norm; without, it goes into the residual at once */
static void
add_branch(MillmForward *fw, const MillmWeight *w, const MillmVector *bias, const MillmVector *post_norm, MillmBuffer *in, int n)
{
	static const MillmVector none;
	const float scale = fw->model->config.residual_scale;
	const bool	at_once = !post_norm->data && scale == 1;
	const MillmProjection p = {at_once ? fw->x : fw->h, w, bias, at_once};

	fw->be->matmul(fw->be, &p, 1, in, n);
	if (at_once)
		return;
	if (post_norm->data)
		norm(fw, fw->h, fw->h, post_norm, &none, n);
	fw->be->add(fw->be, fw->x, fw->h, scale, n);
}

/* What a branch reads: x normed, in h; without a norm before it, x. */
static MillmBuffer *
normed(MillmForward *fw, const MillmVector *weight, const MillmVector *bias, int n)
{
	MillmBuffer *y = fw->model->config.residual_normed ? fw->x : fw->h;

	if (!weight->data || fw->model->config.norm_after)
		return fw->x;
	norm(fw, y, fw->x, weight, bias, n);
	return y;
}

/* x += down(act(gate(in)) * up(in)), or down(act(up(in))) */
static void
run_mlp(MillmForward *fw, const MillmLayer *l, MillmBuffer *in, int n)
{
	MillmBackend *be = fw->be;
	const MillmConfig *c = &fw->model->config;
	const MillmProjection up_gate[] = {{fw->up, &l->up, &l->up_bias, false}, {fw->gate, &l->gate, &l->gate_bias, false}};

	be->matmul(be, up_gate, c->mlp_gated ? 2 : 1, in, n);
	if (c->mlp_gated)
		be->activation(be, fw->up, c->act, fw->gate, fw->up, l->up.n_out, n);
	else
		be->activation(be, fw->up, c->act, fw->up, NULL, l->up.n_out, n);
	add_branch(fw, &l->down, &l->down_bias, &l->mlp_post_norm, fw->up, n);
}

static void
norm_heads(MillmForward *fw, MillmBuffer *x, const MillmVector *weight, const MillmVector *bias, int n_heads, int head_dim, int n)
{
	const MillmConfig *c = &fw->model->config;

	if (!weight->data)
		return;
	if (c->head_norm_kind == MILLM_HEAD_NORMS_WHOLE)
		norm(fw, x, x, weight, bias, n);
	else
		fw->be->norm(fw->be, x, x, c->norm, weight, bias, c->norm_eps, n_heads, head_dim, n);
}

/* The answers of an expert to n rows of in */
static void
answer(MillmForward *fw, const MillmMlp *mlp, MillmBuffer *in, int n)
{
	static const MillmVector none;
	MillmBackend *be = fw->be;
	const bool	has_gate = mlp->gate.data;
	const MillmProjection up_gate[] = {{fw->up, &mlp->up, &mlp->up_bias, false}, {fw->gate, &mlp->gate, &none, false}};
	const MillmProjection down = {fw->answer, &mlp->down, &mlp->down_bias, false};

	be->matmul(be, up_gate, has_gate ? 2 : 1, in, n);
	be->activation(be, fw->up, fw->model->config.act, has_gate ? fw->gate : fw->up, has_gate ? fw->up : NULL, mlp->down.n_in, n);
	be->matmul(be, &down, 1, fw->up, n);
}

/* x += what the experts that each row of in chooses by its scores make of it: what a backend's mixture() is measured by. */
static void
run_experts(MillmForward *fw, const MillmLayer *l, MillmBuffer *in, int n)
{
	MillmBackend *be = fw->be;
	MillmRoutes *r = &fw->routes;

	millm_route(r, be->buffer_read(be, fw->scores), fw->model->config.experts_sum_to_one, n);
	for (int e = 0; e < r->n_experts; e++)
	{
		const int32_t first = r->first[e];
		const int	n_rows = r->first[e + 1] - first;

		if (n_rows == 0)
			continue;
		if (n_rows < n)
			be->select(be, fw->picked, in, r->rows + first, n_rows);
		answer(fw, &l->experts[e], n_rows < n ? fw->picked : in, n_rows);
		be->add_rows(be, fw->x, fw->answer, r->rows + first, r->weights + first, n_rows);
	}
}

/* x += what the experts that each row of in chooses make of it, and the shared one.  Of the other experts nothing is read. */
static void
run_mixture(MillmForward *fw, const MillmLayer *l, MillmBuffer *in, int n)
{
	static const MillmVector none;
	MillmBackend *be = fw->be;
	const MillmProjection scores = {fw->scores, &l->router, &l->router_bias, false};

	be->matmul(be, &scores, 1, in, n);
	if (!be->mixture || !be->mixture(be, l, fw->x, in, fw->scores, n))
		run_experts(fw, l, in, n);
	if (l->shared.up.data)
	{
		const MillmProjection score = {fw->shared_score, &l->shared_router, &none, false};

		be->matmul(be, &score, 1, in, n);
		answer(fw, &l->shared, in, n);
		be->add_gated(be, fw->x, fw->answer, fw->shared_score, n);
	}
}

static void
run_layer(MillmForward *fw, int i, int n)
{
	MillmBackend *be = fw->be;
	const MillmConfig *c = &fw->model->config;
	const MillmLayer *l = &fw->model->layers[i];
	const MillmAttention attention = {
		.page_group = fw->kv.groups[i],
		.page_place = fw->kv.places[i],
		.n_heads = l->n_heads,
		.n_kv_heads = l->n_kv_heads,
		.head_dim = l->head_dim,
		.window = l->window,
		.scale = c->layer_inv_scale ? c->attention_scale / (float) (i + 1) : c->attention_scale,
		.softcap = c->attention_softcap,
		.sinks = l->sinks.data,
		.local = l->window > 0 && c->local_rope.inv_freq,
		.unrotated = l->unrotated,
	};
	const MillmProjection fused = {fw->qkv, &l->qkv, &l->qkv_bias, false};
	const MillmProjection qkv[] = {{fw->q, &l->q, &l->q_bias, false}, {fw->k, &l->k, &l->k_bias, false}, {fw->v, &l->v, &l->v_bias, false}};
	MillmBuffer *in = normed(fw, &l->attn_norm, &l->attn_norm_bias, n);

	if (l->qkv.data)
	{
		be->matmul(be, &fused, 1, in, n);
		be->split_qkv(be, &attention, fw->q, fw->k, fw->v, fw->qkv, n);
	}
	else
		be->matmul(be, qkv, 3, in, n);
	if (c->parallel)
		/* first: norms of q and k, and attention, take the place of what the MLP reads */
		run_mlp(fw, l, l->mlp_norm.data ? normed(fw, &l->mlp_norm, &l->mlp_norm_bias, n) : in, n);
	norm_heads(fw, fw->q, &l->q_norm, &l->q_norm_bias, l->n_heads, l->head_dim, n);
	norm_heads(fw, fw->k, &l->k_norm, &l->k_norm_bias, l->n_kv_heads, l->head_dim, n);
	be->rope_and_store(be, &attention, fw->q, fw->k, fw->v, n);
	be->attention(be, &attention, fw->a, fw->q, n);
	add_branch(fw, &l->o, &l->o_bias, &l->attn_post_norm, fw->a, n);
	if (c->norm_after)
		norm(fw, fw->x, fw->x, &l->attn_norm, &l->attn_norm_bias, n);
	if (l->experts)
	{
		run_mixture(fw, l, normed(fw, &l->mlp_norm, &l->mlp_norm_bias, n), n);
		return;
	}
	if (!c->parallel)
		run_mlp(fw, l, normed(fw, &l->mlp_norm, &l->mlp_norm_bias, n), n);
	if (c->norm_after)
		norm(fw, fw->x, fw->x, &l->mlp_norm, &l->mlp_norm_bias, n);
}

/* Places of a step that are checked: the embedding, what each layer leaves, the logits. */
#define PLACE_EMBEDDING		0
#define PLACE_LAYER(i)		(1 + (i))

/* Was every activation of the step a number? */
static MillmCode
check_step(MillmForward *fw, MillmError *err)
{
	const int	n_layers = fw->model->config.n_layers;
	const int	place = fw->be->first_bad(fw->be);

	if (place < 0)
		return MILLM_OK;
	if (place == PLACE_EMBEDDING || place == PLACE_LAYER(n_layers))
		millm_fail(err, MILLM_E_INTERNAL, "an activation became NaN or infinite in the %s", place == PLACE_EMBEDDING ? "embedding" : "logits");
	else
		millm_fail(err, MILLM_E_INTERNAL, "an activation became NaN or infinite in layer %d", place - PLACE_LAYER(0));
	millm_hint(err, "The weights may be damaged, or of a model that overflows in this precision.");
	return MILLM_E_INTERNAL;
}

/* The rows that hidden() has left: projected where the embedding is not of the hidden size. */
static MillmBuffer *
hidden_buffer(const MillmForward *fw)
{
	return fw->model->project_out.data ? fw->e : fw->h;
}

/* The last hidden states of the wanted rows */
static void
hidden(MillmForward *fw)
{
	static const MillmVector none;
	MillmBackend *be = fw->be;
	const MillmModel *model = fw->model;
	const MillmProjection project = {fw->e, &model->project_out, &none, false};
	const int	n = fw->n_wanted;

	be->select(be, fw->h, fw->x, fw->wanted, n);
	if (model->final_norm.data)
		norm(fw, fw->h, fw->h, &model->final_norm, &model->final_norm_bias, n);
	if (project.w->data)
		be->matmul(be, &project, 1, fw->h, n);
}

/* The logits of the first n rows of in, which are scaled first: the screening copy needs to know nothing of it. */
static void
run_head(MillmForward *fw, MillmBuffer *in, int n)
{
	MillmBackend *be = fw->be;
	const MillmModel *model = fw->model;
	const MillmProjection head = {fw->logits, &model->head, &model->head_bias, false};
	bool		screens = fw->is_screened && be->first_bad(be) < 0;	/* what is no number is in no order */
	int64_t		n_read = 0;

	if (model->config.logit_scale != 1)
		be->scale(be, in, model->config.logit_scale, n);
	for (int i = 0; i < n; i++)
		screens &= fw->tops[i].k > 0;
	if (screens && fw->n_unscreened > 0)
		fw->n_unscreened--;
	else if (screens &&
			 (n_read = be->screened_matmul(be, fw->logits, &model->head, &model->screen, in, fw->tops, n)) < 0)
		fw->n_unscreened = UNSCREENED_STEPS;
	fw->head_use.n_rows += n;
	fw->has_lists = n_read > 0 || be->fetch;
	if (n_read > 0)
	{
		fw->head_use.n_screened += n;
		fw->head_use.n_read += n_read;
		return;
	}
	be->matmul(be, &head, 1, in, n);
	be->check(be, fw->logits, PLACE_LAYER(model->config.n_layers), n);	/* a softcap would make infinite ones finite */
	if (model->config.logit_softcap > 0)
		be->softcap(be, fw->logits, model->config.logit_softcap, n);
}

/* x = the tokens' rows of the embedding, at the hidden size */
static void
embed(MillmForward *fw, int n)
{
	static const MillmVector none;
	const MillmModel *model = fw->model;
	const MillmProjection project = {fw->x, &model->project_in, &none, false};

	fw->be->embed(fw->be, project.w->data ? fw->e : fw->x, &model->embedding, fw->tokens, false, n);
	if (project.w->data)
		fw->be->matmul(fw->be, &project, 1, fw->e, n);
}

static MillmCode
run_step(MillmForward *fw, int n, bool (*should_stop) (void *arg), void *arg, MillmError *err)
{
	MillmBackend *be = fw->be;
	const MillmModel *model = fw->model;
	const MillmConfig *c = &model->config;

	be->begin(be, fw->positions, fw->planned, fw->pages, n);
	embed(fw, n);
	if (model->embedding_norm.data)
		norm(fw, fw->x, fw->x, &model->embedding_norm, &model->embedding_norm_bias, n);
	if (c->embedding_scale != 1)
		be->scale(be, fw->x, c->embedding_scale, n);
	if (c->position == MILLM_POS_LEARNED)
		be->embed(be, fw->x, &model->position_embedding, fw->positions, true, n);
	be->check(be, fw->x, PLACE_EMBEDDING, n);

	for (int i = 0; i < c->n_layers; i++)
	{
		if (should_stop && should_stop(arg))
			return millm_fail(err, MILLM_E_CANCELED, "canceled");
		run_layer(fw, i, n);
		be->check(be, fw->x, PLACE_LAYER(i), n);
	}

	if (fw->n_wanted > 0)
		hidden(fw);
	if (fw->n_logits > 0)
	{
		run_head(fw, hidden_buffer(fw), fw->n_logits);
		if (be->fetch)
			be->fetch(be, fw->logits, fw->tops, fw->n_logits);
	}
	return check_step(fw, err);
}

MillmCode
millm_forward_step(MillmForward *fw, const MillmBatchToken *batch, int n, bool (*should_stop) (void *arg), void *arg,
				   const float **logits, MillmError *err)
{
	MillmCode	rc = take_batch(fw, batch, n, err);

	if (rc == MILLM_OK)
		rc = run_step(fw, n, should_stop, arg, err);
	for (int t = 0; t < n; t++)
	{
		MillmSequence *seq = batch[t].seq;

		seq->n_in_step = rc == MILLM_OK ? seq->n_in_step - 1 : 0;
		if (rc != MILLM_OK || batch[t].is_draft)
			continue;
		millm_kv_append(seq, batch[t].token);
		if (seq->n_in_step == 0 || batch[t + 1].is_draft)
			millm_kv_pass(seq);
	}
	if (rc == MILLM_OK && logits)
		*logits = fw->n_logits > 0 ? fw->be->buffer_read(fw->be, fw->logits) : NULL;
	return rc;
}

MillmListed
millm_forward_listed(const MillmForward *fw, int i)
{
	return fw->has_lists && fw->be->listed ? fw->be->listed(fw->be, i) : (MillmListed) {NULL, -1};
}

const float *
millm_forward_hidden(const MillmForward *fw)
{
	if (fw->n_wanted == fw->n_logits)
		return NULL;
	return fw->be->buffer_read(fw->be, hidden_buffer(fw)) + (size_t) fw->n_logits * (size_t) millm_forward_hidden_size(fw);
}

int
millm_forward_hidden_size(const MillmForward *fw)
{
	return fw->model->config.embedding_size;	/* what is projected back to it, too */
}
