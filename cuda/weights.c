/*
 * weights.c -- see weights.h.
 *
 * The model is walked in the same order to count, with no memory, how many there are and what they take, and to lay out what is then
 * uploaded (upload.c).  What kernels read 16 bytes at a time begins at a multiple of 16, which nothing in a file does.
 */
#include "weights.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "device_memory.h"
#include "half.h"
#include "upload.h"

#define ALIGNMENT 256			/* of each part */

typedef struct Place
{
	const MillmWeight *weight;
	MillmCudaWeight on_device;
} Place;

typedef struct Vector
{
	const float *host;
	const float *device;
	int64_t		n;
} Vector;

struct MillmCudaWeights
{
	const char *as;				/* the quantization that is pretended, while it is only measured; NULL: none */
	char	   *memory;			/* NULL while it is only measured */
	int64_t		used;
	MillmPart  *parts;			/* [n_parts], what is uploaded; NULL once it is, and while it is measured */
	int			n_parts;
	Place	   *places;			/* [n_places]; sorted by weight once filled */
	int			n_places;
	Vector	   *vectors;		/* [n_vectors]; sorted by host */
	int			n_vectors;
};

/* Give a part the next bytes of the memory: where it will be. */
static void *
put_part(MillmCudaWeights *m, MillmPart part)
{
	part.at = m->used;
	if (m->parts)
		m->parts[m->n_parts] = part;
	m->n_parts++;
	m->used += (part.n_rows * part.to_pitch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	return m->memory ? m->memory + part.at : NULL;
}

static void *
put(MillmCudaWeights *m, const void *from, int64_t bytes)
{
	return put_part(m, (MillmPart) {.from = from, .n_rows = 1, .row_bytes = bytes, .from_pitch = bytes, .to_pitch = bytes});
}

static int
log2_of(int power)
{
	return __builtin_ctz((unsigned) power);
}

float
millm_cuda_codebook_unit(const float *codebook)
{
	enum {CANDIDATES = 256};
	float		best = 1;
	double		least = INFINITY;

	for (int i = 0; i < CANDIDATES; i++)
	{
		const float unit = 1 + (float) i / CANDIDATES;
		double		sum = 0;

		for (int k = 0; k < 16; k++)
		{
			const double error = (double) millm_bf16_to_f32(millm_f32_to_bf16(unit * codebook[k])) / (double) unit - (double) codebook[k];

			sum += error * error;
		}
		if (sum < least)
		{
			least = sum;
			best = unit;
		}
	}
	return best;
}

/* The stored tensor is flat: this slice of it, from the last group of scales on that begins no later. */
static void
put_4bit(MillmCudaWeights *m, const MillmWeight *w, MillmCudaWeight *d)
{
	const int64_t nested = w->nested_block_size > 0 ? w->nested_block_size : 1;
	const int64_t absmax_bytes = w->nested_block_size > 0 ? 1 : 4;
	const int64_t begin = w->first / (w->block_size * nested) * (w->block_size * nested);
	const int64_t end = w->first + w->n_out * w->n_in;
	const int64_t begin_block = begin / w->block_size;
	const int64_t end_block = (end + w->block_size - 1) / w->block_size;

	d->first = w->first - begin;
	d->block_shift = log2_of(w->block_size);
	d->nested_shift = w->nested_block_size > 0 ? log2_of(w->nested_block_size) : -1;
	d->nested_offset = w->nested_offset;
	d->rounded = w->rounded;
	d->has_chunks = d->first % 32 == 0 && w->n_in % 32 == 0;
	d->codebook_unit = m->memory ? millm_cuda_codebook_unit(w->codebook) : 1;
	d->codebook_scale = 1 / d->codebook_unit;
	d->codebook = put(m, w->codebook, 16 * (int64_t) sizeof(float));
	d->data = put(m, (const char *) w->data + begin / 2, (end + 1) / 2 - begin / 2);
	d->absmax = put(m, (const char *) w->absmax + begin_block * absmax_bytes, (end_block - begin_block) * absmax_bytes);
	if (w->nested_block_size == 0)
		return;
	d->nested_map = put(m, w->nested_map, 256 * (int64_t) sizeof(float));
	d->nested_absmax = put(m, (const char *) w->nested_absmax + begin_block / nested * 4, ((end_block + nested - 1) / nested - begin_block / nested) * 4);
}

static void
put_weight(MillmCudaWeights *m, const MillmWeight *w)
{
	MillmCudaWeight d = {.dtype = w->dtype, .n_out = w->n_out, .n_in = w->n_in, .has_chunks = true};
	const int64_t bytes = millm_weight_bytes(w->dtype, w->n_in);

	if (!w->data)
		return;
	d.row_bytes = (bytes + 15) / 16 * 16;
	if (w->dtype == MILLM_4BIT)
		put_4bit(m, w, &d);
	else
		d.data = put_part(m, (MillmPart) {.from = w->data, .n_rows = w->n_out, .row_bytes = bytes, .from_pitch = millm_weight_bytes(w->dtype, w->stride),
				.to_pitch = d.row_bytes, .element = w->in_out ? (int) millm_weight_bytes(w->dtype, 1) : 0});
	if (w->dtype == MILLM_INT8)
		d.scale = put(m, w->scale, w->n_out * (int64_t) sizeof(float));
	else if (w->dtype == MILLM_MXFP4)
		d.scale = put(m, w->scale, w->n_out * (w->n_in / 32));
	if (m->places)
		m->places[m->n_places] = (Place) {w, d};
	m->n_places++;
}

static void
put_values(MillmCudaWeights *m, const float *values, int64_t n)
{
	const float *device;

	if (!values)
		return;
	device = put(m, values, n * (int64_t) sizeof(float));
	if (m->vectors)
		m->vectors[m->n_vectors] = (Vector) {values, device, n};
	m->n_vectors++;
}

static void
put_vector(MillmCudaWeights *m, const MillmVector *v)
{
	put_values(m, v->data, v->n);
}

/* Of a format that is pretended what it takes counts, and nothing else. */
static void
put_pretended(MillmCudaWeights *m, const MillmWeight *w, MillmDtype dtype)
{
	const MillmWeight p = {.dtype = dtype, .n_out = w->n_out, .n_in = w->n_in, .stride = w->n_in, .data = w->data, .absmax = w->data,
		.nested_absmax = w->data, .block_size = 64, .nested_block_size = 256};

	put_weight(m, &p);
}

/* A weight that quantization is for. */
static void
put_linear(MillmCudaWeights *m, const MillmWeight *w)
{
	if (!m->as)
		put_weight(m, w);
	else
		put_pretended(m, w, strcmp(m->as, "Q4") == 0 ? MILLM_4BIT : strcmp(m->as, "Q8") == 0 ? MILLM_INT8 : MILLM_BF16);
}

/* Any other: it has 16 bits where the linear ones have been recast. */
static void
put_matrix(MillmCudaWeights *m, const MillmWeight *w)
{
	if (!m->as || w->dtype == MILLM_F16 || w->dtype == MILLM_BF16)
		put_weight(m, w);
	else
		put_pretended(m, w, MILLM_BF16);
}

static void
put_mlp(MillmCudaWeights *m, const MillmMlp *mlp)
{
	put_linear(m, &mlp->gate);
	put_linear(m, &mlp->up);
	put_linear(m, &mlp->down);
}

static void
put_layer(MillmCudaWeights *m, const MillmModel *model, const MillmLayer *l)
{
	const char *as = m->as;
	const MillmWeight *linears[] = {&l->q, &l->k, &l->v, &l->o, &l->qkv, &l->gate, &l->up, &l->down};
	const MillmVector *vectors[] = {
		&l->sinks, &l->attn_norm, &l->attn_norm_bias, &l->attn_post_norm, &l->mlp_post_norm, &l->q_bias, &l->k_bias, &l->v_bias, &l->o_bias,
		&l->qkv_bias, &l->q_norm, &l->k_norm, &l->q_norm_bias, &l->k_norm_bias, &l->mlp_norm, &l->mlp_norm_bias, &l->gate_bias, &l->up_bias,
		&l->down_bias, &l->router_bias, &l->experts_up_bias, &l->experts_down_bias, &l->shared.up_bias, &l->shared.down_bias,
	};

	for (size_t i = 0; i < sizeof(linears) / sizeof(linears[0]); i++)
		put_linear(m, linears[i]);
	put_matrix(m, &l->router);
	put_matrix(m, &l->shared_router);
	for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
		put_vector(m, vectors[i]);
	put_mlp(m, &l->shared);
	if (model->config.has_fused_experts)
		m->as = NULL;			/* which nobody quantizes */
	for (int e = 0; l->experts && e < model->config.n_experts; e++)
		put_mlp(m, &l->experts[e]);
	m->as = as;
}

static bool
is_tied(const MillmModel *model)
{
	return model->head.data == model->embedding.data && model->head.dtype == model->embedding.dtype && model->head.n_out == model->embedding.n_out;
}

static void
put_model(MillmCudaWeights *m, const MillmModel *model)
{
	const MillmVector *vectors[] = {
		&model->embedding_norm, &model->embedding_norm_bias, &model->final_norm, &model->final_norm_bias, &model->head_bias};

	m->used = 0;
	m->n_parts = m->n_places = m->n_vectors = 0;
	put_matrix(m, &model->embedding);
	if (!is_tied(model))
		put_matrix(m, &model->head);
	else
	{
		if (m->places)
			m->places[m->n_places] = (Place) {&model->head, m->places[0].on_device};
		m->n_places++;
	}
	put_matrix(m, &model->project_in);
	put_matrix(m, &model->project_out);
	put_matrix(m, &model->position_embedding);
	put_values(m, model->config.alibi_slopes, model->config.n_heads);
	for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
		put_vector(m, vectors[i]);
	for (int i = 0; i < model->config.n_layers; i++)
		put_layer(m, model, &model->layers[i]);
}

int64_t
millm_cuda_weights_bytes(const MillmModel *model, const char *quantization)
{
	MillmCudaWeights measure = {.as = quantization};

	put_model(&measure, model);
	return measure.used;
}

static int
compare_places(const void *a, const void *b)
{
	const MillmWeight *x = ((const Place *) a)->weight;
	const MillmWeight *y = ((const Place *) b)->weight;

	return (x > y) - (x < y);
}

static int
compare_vectors(const void *a, const void *b)
{
	const float *x = ((const Vector *) a)->host;
	const float *y = ((const Vector *) b)->host;

	return (x > y) - (x < y);
}

static MillmCode
fill(MillmCudaWeights *m, const MillmModel *model, const MillmUploadOptions *upload, MillmError *err)
{
	MillmCode	rc;

	m->parts = calloc((size_t) m->n_parts + 1, sizeof(*m->parts));
	m->places = calloc((size_t) m->n_places + 1, sizeof(*m->places));
	m->vectors = calloc((size_t) m->n_vectors + 1, sizeof(*m->vectors));
	if (!m->parts || !m->places || !m->vectors)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	if ((rc = millm_cuda_allocate(&m->memory, m->used, "the weights", upload->stream, err)) != MILLM_OK)
		return rc;
	put_model(m, model);
	if ((rc = millm_cuda_upload(m->memory, m->parts, m->n_parts, upload, err)) != MILLM_OK)
		return rc;
	free(m->parts);
	m->parts = NULL;
	qsort(m->places, (size_t) m->n_places, sizeof(*m->places), compare_places);
	qsort(m->vectors, (size_t) m->n_vectors, sizeof(*m->vectors), compare_vectors);
	return MILLM_OK;
}

MillmCode
millm_cuda_weights_create(const MillmModel *model, const MillmUploadOptions *upload, MillmCudaWeights **out, MillmError *err)
{
	MillmCudaWeights *m = calloc(1, sizeof(*m));
	MillmCode	rc;

	if (!m)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	put_model(m, model);
	if ((rc = fill(m, model, upload, err)) != MILLM_OK)
		millm_cuda_weights_free(m);
	else
		*out = m;
	return rc;
}

void
millm_cuda_weights_free(MillmCudaWeights *m)
{
	if (!m)
		return;
	(void) cudaFree(m->memory);	/* of a device that no longer answers there is nothing to free */
	free(m->parts);
	free(m->places);
	free(m->vectors);
	free(m);
}

const MillmCudaWeight *
millm_cuda_weight(const MillmCudaWeights *m, const MillmWeight *w)
{
	const Place wanted = {.weight = w};
	const Place *found = bsearch(&wanted, m->places, (size_t) m->n_places, sizeof(wanted), compare_places);

	return found ? &found->on_device : NULL;
}

const float *
millm_cuda_vector(const MillmCudaWeights *m, const float *data)
{
	int			first = 0;		/* the last that begins no later is in [first, end) */
	int			end = m->n_vectors;

	if (!data)
		return NULL;
	while (end - first > 1)
	{
		const int	middle = first + (end - first) / 2;

		if (m->vectors[middle].host <= data)
			first = middle;
		else
			end = middle;
	}
	if (end == 0 || data < m->vectors[first].host || data >= m->vectors[first].host + m->vectors[first].n)
		return NULL;
	return m->vectors[first].device + (data - m->vectors[first].host);
}
