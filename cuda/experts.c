/*
 * experts.c -- see experts.h.
 *
 * Owns:     for each layer the tables of its experts' weights on the device, and room for what a step computes of its entries (mixture.h).
 * Borrows:  the model and the weights' copy.
 * Does not: know how a sum is computed (mixture.cu).
 *
 *	 scores -> chosen, shares -> tiles -> up, gate -> act -> answers -> y += shares x answers
 *
 * A step with more entries than there is room for is computed some rows after the others.
 */
#include "experts.h"

#include <stdlib.h>

#include "device_memory.h"

#define MAX_ENTRIES 4096		/* that there is room for, unless one row has more */
#define ALIGNMENT 256			/* of each part of the memory */

enum {UP, GATE, DOWN, N_MATRICES};

typedef struct Layer
{
	const MillmLayer *layer;	/* NULL: has no experts, or cannot be computed here */
	const MillmCudaExpert *experts[N_MATRICES];	/* the device's, [n_experts]; of GATE NULL: none */
	MillmDtype	dtypes[N_MATRICES];
} Layer;

struct MillmCudaExperts
{
	const MillmConfig *config;
	const MillmLayer *first;	/* of the model's [n_layers] */
	bool		in_float32;
	char	   *memory;
	Layer	   *layers;			/* [n_layers] */
	bool		can_all;
	int			max_rows;		/* at a time */
	MillmCudaMixture mixture;	/* where its lists are */
	MillmRows	up, gate, answer;	/* [max_rows * k, widest] */
};

/* What lies in the memory, part after part: counted with no memory, then placed. */
typedef struct Layout
{
	char	   *memory;
	int64_t		used;
} Layout;

static void *
put(Layout *l, int64_t bytes)
{
	void	   *at = l->memory ? l->memory + l->used : NULL;

	l->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	return at;
}

static MillmRows
put_rows(Layout *l, int64_t n, int64_t n_columns)
{
	const int64_t stride = (n_columns + 31) / 32 * 32;

	return (MillmRows) {put(l, n * stride * (int64_t) sizeof(float)), stride};
}

static int
rows_at_once(const MillmConfig *config, int max_tokens)
{
	const int	n = MAX_ENTRIES / config->n_chosen;

	return n < 1 ? 1 : n < max_tokens ? n : max_tokens;
}

static int
smaller(int a, int b)
{
	return a < b ? a : b;
}

/* Tiles of n rows, at most: each expert that has entries has one that may not be full, and no more than that where a tile has room for all rows. */
static int
tiles_of(const MillmConfig *config, int n, int tile_entries)
{
	const int	n_entries = n * config->n_chosen;

	return (n > tile_entries ? n_entries / tile_entries : 0) + smaller(n_entries, config->n_experts);
}

/* The room for a step; the tables come before. */
static void
lay_out(Layout *l, const MillmModel *model, int max_tokens, MillmCudaExperts *e)
{
	const MillmConfig *config = &model->config;
	const int	n = rows_at_once(config, max_tokens);
	const int64_t n_entries = (int64_t) n * config->n_chosen;
	int64_t		width = 0;
	bool		has_gate = false;

	for (int i = 0; i < config->n_layers; i++)
		if (model->layers[i].experts)
		{
			const MillmMlp *mlp = &model->layers[i].experts[0];

			width = mlp->up.n_out > width ? mlp->up.n_out : width;
			has_gate |= mlp->gate.data != NULL;
			put(l, N_MATRICES * config->n_experts * (int64_t) sizeof(MillmCudaExpert));
		}
	e->max_rows = n;
	e->mixture.chosen = put(l, n_entries * (int64_t) sizeof(*e->mixture.chosen));
	e->mixture.shares = put(l, n_entries * (int64_t) sizeof(*e->mixture.shares));
	e->mixture.entries = put(l, n_entries * (int64_t) sizeof(*e->mixture.entries));
	e->mixture.tiles = put(l, tiles_of(config, n, 1) * (int64_t) sizeof(*e->mixture.tiles));
	e->up = put_rows(l, n_entries, width);
	e->gate = put_rows(l, has_gate ? n_entries : 0, width);
	e->answer = put_rows(l, n_entries, config->hidden_size);
}

int64_t
millm_cuda_experts_bytes(const MillmModel *model, int max_tokens)
{
	MillmCudaExperts measure;
	Layout		l = {0};

	if (model->config.n_experts > 0)
		lay_out(&l, model, max_tokens, &measure);
	return l.used;
}

static const MillmWeight *
matrix_of(const MillmMlp *mlp, int which)
{
	return which == UP ? &mlp->up : which == GATE ? &mlp->gate : &mlp->down;
}

/* One matrix of all experts of a layer into table [n_experts]; false: a kernel cannot take them all. */
static bool
fill_table(MillmCudaExpert *table, const MillmLayer *layer, int n_experts, int which, const MillmCudaWeights *weights)
{
	for (int e = 0; e < n_experts; e++)
	{
		const MillmMlp *mlp = &layer->experts[e];
		const MillmCudaWeight *w = millm_cuda_weight(weights, matrix_of(mlp, which));

		if (!w || !w->has_chunks || (e > 0 && (w->dtype != table[0].w.dtype || w->n_out != table[0].w.n_out || w->n_in != table[0].w.n_in)))
			return false;
		table[e] = (MillmCudaExpert) {*w, which == GATE ? NULL : millm_cuda_vector(weights, which == UP ? mlp->up_bias.data : mlp->down_bias.data)};
	}
	return true;
}

static cudaError_t
fill_layer(MillmCudaExperts *e, Layer *to, const MillmLayer *layer, const MillmCudaWeights *weights, MillmCudaExpert *on_device, MillmCudaExpert *table,
		   cudaStream_t stream)
{
	const int	n = e->config->n_experts;
	cudaError_t status = cudaSuccess;
	bool		can = true;

	for (int which = 0; which < N_MATRICES && can && status == cudaSuccess; which++)
	{
		if (!matrix_of(&layer->experts[0], which)->data)
			continue;
		if (!(can = fill_table(table, layer, n, which, weights)))
			break;
		to->experts[which] = on_device + (int64_t) which * n;
		to->dtypes[which] = table[0].w.dtype;
		status = cudaMemcpyAsync(on_device + (int64_t) which * n, table, (size_t) n * sizeof(*table), cudaMemcpyHostToDevice, stream);
		if (status == cudaSuccess)
			status = cudaStreamSynchronize(stream);	/* the table is used again */
	}
	to->layer = can ? layer : NULL;
	e->can_all &= can;
	return status;
}

MillmCode
millm_cuda_experts_create(const MillmModel *model, const MillmCudaWeights *weights, const MillmCudaExpertsOptions *options, cudaStream_t stream,
						  MillmCudaExperts **out, MillmError *err)
{
	const MillmConfig *config = &model->config;
	MillmCudaExpert *table;
	MillmCudaExperts *e;
	Layout		l = {0};
	cudaError_t status = cudaSuccess;
	MillmCode	rc;

	*out = NULL;
	if (config->n_experts == 0)
		return MILLM_OK;
	e = calloc(1, sizeof(*e));
	table = calloc((size_t) config->n_experts, sizeof(*table));
	if (!e || !table || !(e->layers = calloc((size_t) config->n_layers, sizeof(*e->layers))))
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else
		rc = millm_cuda_allocate(&e->memory, millm_cuda_experts_bytes(model, options->max_tokens), "the experts' answers", stream, err);
	if (rc == MILLM_OK)
	{
		e->config = config;
		e->first = model->layers;
		e->in_float32 = options->in_float32;
		e->can_all = true;
		l.memory = e->memory;
		lay_out(&l, model, options->max_tokens, e);
		l.used = 0;				/* the tables are what lies there first */
		for (int i = 0; i < config->n_layers && status == cudaSuccess; i++)
			if (model->layers[i].experts)
				status = fill_layer(e, &e->layers[i], &model->layers[i], weights, put(&l, N_MATRICES * config->n_experts * (int64_t) sizeof(*table)), table, stream);
		if (status != cudaSuccess)
			rc = millm_cuda_failed(status, "the experts' weights", 0, err);
	}
	free(table);
	if (rc != MILLM_OK)
		millm_cuda_experts_free(e);
	else
		*out = e;
	return rc;
}

void
millm_cuda_experts_free(MillmCudaExperts *e)
{
	if (!e)
		return;
	(void) cudaFree(e->memory);
	free(e->layers);
	free(e);
}

/* NULL: it cannot be computed here */
static const Layer *
layer_of(const MillmCudaExperts *e, const MillmLayer *layer)
{
	const Layer *l = &e->layers[layer - e->first];

	return l->layer ? l : NULL;
}

bool
millm_cuda_experts_can(const MillmCudaExperts *e, const MillmLayer *layer)
{
	return layer ? layer_of(e, layer) != NULL : e->can_all;
}

/*
 * Few entries of an expert are multiplied in float32, its weights read once for FEW_ROWS of them; where experts have more than that on average, tensor
 * cores take them.  That is decided by n, so that the launches are.
 */
static bool
are_few(const MillmCudaExperts *e, const Layer *l, int n)
{
	bool		in_float32 = e->in_float32;

	for (int which = 0; which < N_MATRICES; which++)
		in_float32 |= l->experts[which] && l->dtypes[which] == MILLM_F32;	/* who stores 32 bits wants them */
	return in_float32 || n * e->config->n_chosen <= MILLM_CUDA_FEW_ROWS * e->config->n_experts;
}

static cudaError_t
multiply(const Layer *l, int which, MillmRows y, MillmRows x, const MillmCudaMixture *mixture, MillmCudaQueue *queue)
{
	const MillmCudaExpertMatmul m = {
		.y = y,
		.x = x,
		.experts = l->experts[which],
		.entries = mixture->entries,
		.tiles = mixture->tiles,
		.n_out = matrix_of(&l->layer->experts[0], which)->n_out,
		.dtype = l->dtypes[which],
		.entries_per_row = which == DOWN ? 1 : mixture->k,
		.tile_entries = mixture->tile_entries,
		.n_tiles = mixture->n_tiles,
	};

	if (!m.experts)
		return cudaSuccess;
	return mixture->tile_entries <= MILLM_CUDA_FEW_ROWS ? millm_cuda_experts_few(&m, queue) : millm_cuda_experts_tensor(&m, queue);
}

/* of so many rows as there is room for */
static cudaError_t
add_some(MillmCudaExperts *e, const Layer *l, MillmRows y, MillmRows x, MillmRows scores, int n, MillmCudaQueue *queue)
{
	const MillmConfig *config = e->config;
	const MillmMlp *mlp = &l->layer->experts[0];
	const bool	has_gate = l->experts[GATE];
	const MillmCudaFragments no_fragments = {0};
	const MillmRows none = {NULL, 0};
	MillmCudaMixture m = e->mixture;
	cudaError_t status;

	m.n_experts = config->n_experts;
	m.k = config->n_chosen;
	m.sums_to_one = config->experts_sum_to_one;
	m.n = n;
	m.tile_entries = !are_few(e, l, n) ? MILLM_CUDA_MANY_ENTRIES : n == 1 ? 1 : n == 2 ? 2 : n <= 4 ? 4 : MILLM_CUDA_FEW_ROWS;
	m.n_tiles = tiles_of(config, n, m.tile_entries);
	status = millm_cuda_route(&m, scores, queue);
	if (status == cudaSuccess)
		status = millm_cuda_sort_entries(&m, queue);
	if (status == cudaSuccess)
		status = multiply(l, UP, e->up, x, &m, queue);
	if (status == cudaSuccess)
		status = multiply(l, GATE, e->gate, x, &m, queue);
	if (status == cudaSuccess)
		status = millm_cuda_activation(e->up, &no_fragments, config->act, has_gate ? e->gate : e->up, has_gate ? e->up : none, mlp->down.n_in, n * m.k, queue);
	if (status == cudaSuccess)
		status = multiply(l, DOWN, e->answer, e->up, &m, queue);
	return status == cudaSuccess ? millm_cuda_add_entries(&m, y, e->answer, mlp->down.n_out, queue) : status;
}

cudaError_t
millm_cuda_experts_add(MillmCudaExperts *e, const MillmLayer *layer, MillmRows y, MillmRows x, MillmRows scores, int n, MillmCudaQueue *queue)
{
	const Layer *l = layer_of(e, layer);
	cudaError_t status = cudaSuccess;

	for (int t = 0; t < n && status == cudaSuccess; t += e->max_rows)
		status = add_some(e, l, millm_rows_from(y, t), millm_rows_from(x, t), millm_rows_from(scores, t), smaller(n - t, e->max_rows), queue);
	return status;
}
