/*
 * kernels.h -- the device functions as backend.c calls them: C, one function for each operation of backend.h.
 *
 * Pointers are the device's.  Activations are rows of float32, 16-byte aligned, stride floats apart.  Each function only
 * queues work and returns what the launch gave; n is the number of rows (tokens), at least 1.  Inputs were checked.
 */
#ifndef MILLM_CUDA_KERNELS_H
#define MILLM_CUDA_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "model.h"
#include "queue.h"
#include "tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a kernel takes by value has no padding: launches are compared byte by byte (queue.h). */
#ifndef __CUDACC__
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wpadded"
#endif

/* Positions of a KV page (forward.h's MILLM_KV_PAGE_TOKENS) */
#define MILLM_CUDA_PAGE 16

typedef struct MillmRows
{
	float	   *data;
	int64_t		stride;
} MillmRows;

/* The rows from t on. */
static inline MillmRows
millm_rows_from(MillmRows rows, int t)
{
	rows.data += t * rows.stride;
	return rows;
}

/*
 * A weight on the device, [n_out, n_in], row by row: what MillmWeight says (tensor.h), but that every row of F32, F16, BF16, INT8 and
 * MXFP4 begins at a multiple of 16 bytes, with zeros behind it up to the next, and that nothing is in_out.
 * 4BIT stays flat, as it is stored: element first + o * n_in + i.
 */
typedef struct MillmCudaWeight
{
	int64_t		n_out;
	int64_t		n_in;
	const void *data;
	int64_t		row_bytes;		/* from row to row; not of 4BIT */
	const void *scale;			/* INT8: float [n_out]; MXFP4: uint8 [n_out, n_in / 32] */
	/* 4BIT */
	int64_t		first;
	const float *codebook;		/* [16] */
	float		codebook_unit;	/* millm_cuda_codebook_unit()'s, */
	float		codebook_scale;	/* and 1 / that */
	const void *absmax;			/* [blocks] */
	const float *nested_absmax;
	const float *nested_map;	/* [256] */
	float		nested_offset;
	int			block_shift;	/* log2 of the block size */
	int			nested_shift;	/* the same; -1: absmax is float */
	MillmDtype	rounded;
	/* any */
	MillmDtype	dtype;
	int			has_chunks;		/* 16 bytes are one scale's and begin at a multiple of 16: all but odd shapes of 4BIT */
} MillmCudaWeight;

/* y[t, o] = (accumulate ? y[t, o] : 0) + bias[o] + sum_i x[t, i] w[o, i] */
typedef struct MillmCudaMatmul
{
	MillmRows	y;
	MillmCudaWeight w;
	const float *bias;			/* NULL: none */
	MillmRows	x;
	int			accumulate;
	int			n;
} MillmCudaMatmul;

/* Up to so many rows the weights are read once, a warp for two rows of them, and a row's bits do not depend on its company. */
#define MILLM_CUDA_FEW_ROWS 8

#define MILLM_CUDA_MATMULS 3	/* that can be one launch: q, k and v, or gate and up */

/* n_matmuls of the same x, the same n <= MILLM_CUDA_FEW_ROWS and the same dtype, which have chunks */
extern cudaError_t millm_cuda_matmul_few(const MillmCudaMatmul *m, int n_matmuls, MillmCudaQueue *queue);
extern cudaError_t millm_cuda_matmul_many(const MillmCudaMatmul *m, MillmCudaQueue *queue);	/* has_chunks */
/* The same, rounding to bfloat16 first (but not F32 weights); compute capability 8.0, has_chunks */
extern cudaError_t millm_cuda_matmul_tensor(const MillmCudaMatmul *m, MillmCudaQueue *queue);
extern cudaError_t millm_cuda_matmul_any(const MillmCudaMatmul *m, MillmCudaQueue *queue);	/* the obvious one, of all weights */

/*
 * Rows of activations as the tensor core wants them (product.cu): bfloat16 in the order of fragments.  A row has a column; with has_low two, of which the second is what
 * rounding took from the first, so that their sum is the row to 2^-17.  For each 8 columns and 64 values of each of them: 2 x 32 lanes x 8 values.
 * Or, for many rows, as cuBLASLt wants them (blas.h): in_rows, one after the other, n_blocks x 64 values each.
 */
typedef struct MillmCudaFragments
{
	uint16_t   *data;			/* 16-byte aligned; NULL: none are wanted */
	int64_t		n_blocks;		/* of 64 values */
	int			has_low;
	int16_t		in_rows;
	int16_t		alone;			/* the rows themselves are not written */
} MillmCudaFragments;

/* Where the rows from t on are, of those in_rows; nowhere, if they are nowhere. */
static inline MillmCudaFragments
millm_cuda_fragments_from(MillmCudaFragments f, int t)
{
	if (f.data)
		f.data += t * f.n_blocks * 64;
	return f;
}

#define MILLM_CUDA_FRAGMENT_ROWS 64	/* at a time */
#define MILLM_CUDA_SKINNY_ROWS 8	/* of those with has_low */
#define MILLM_CUDA_SKINNY_BLOCKS 128	/* bands times splits, at most, of a product of many columns that has fewer bands */
#define MILLM_CUDA_SKINNY_PARTIALS (MILLM_CUDA_SKINNY_BLOCKS * 128 * MILLM_CUDA_FRAGMENT_ROWS)	/* floats */
#define MILLM_CUDA_SKINNY_FORMATS 3	/* BF16, INT8, 4BIT */
#define MILLM_CUDA_SKINNY_SHAPES 4	/* of blocks, by the rows */

/* Bytes of the fragments of so many rows of up to n_values. */
static inline int64_t
millm_cuda_fragment_bytes(int64_t n_values, int n_rows, bool has_low)
{
	return ((has_low ? 2 : 1) * (int64_t) n_rows + 7) / 8 * 8 * ((n_values + 63) / 64 * 64) * 2;
}

/* Can the weight be multiplied so?  All but odd shapes of BF16, INT8 and 4BIT can. */
extern bool millm_cuda_is_skinny(const MillmCudaWeight *w);

/* What such products have in common, on the current device */
typedef struct MillmCudaSkinny
{
	float	   *partials;		/* [MILLM_CUDA_SKINNY_PARTIALS], borrowed; NULL: all have has_low */
	int			n_resident[MILLM_CUDA_SKINNY_FORMATS][MILLM_CUDA_SKINNY_SHAPES];	/* blocks that it runs at once */
} MillmCudaSkinny;

/* Before the first product: n_resident, and the device's leave to use as much shared memory.  Compute capability 8.0. */
extern cudaError_t millm_cuda_skinny_prepare(MillmCudaSkinny *skinny);
/*
 * Products of one x, which is read from its fragments f, with weights of one format: 64 rows at most, with has_low 8, where a row's bits do not depend on its company.
 */
extern cudaError_t millm_cuda_matmul_skinny(const MillmCudaSkinny *skinny, const MillmCudaMatmul *m, int n_matmuls, const MillmCudaFragments *f,
											MillmCudaQueue *queue);
/* f = x [n, n_columns], which is a multiple of 64; norms, activations and attention write them beside their results, or in their place, where these say so */
extern cudaError_t millm_cuda_to_fragments(const MillmCudaFragments *f, MillmRows x, int64_t n_columns, int n, MillmCudaQueue *queue);

/* to [n_rows, pitch], bfloat16 = rows o0 .. o0 + n_rows of w, which has_chunks; pitch is a multiple of 32, and what is past n_in may be anything */
extern cudaError_t millm_cuda_decode(void *to, int64_t pitch, const MillmCudaWeight *w, int64_t o0, int64_t n_rows, MillmCudaQueue *queue);
/* to [n, pitch], bfloat16 = x [n, n_columns] */
extern cudaError_t millm_cuda_round_rows(void *to, int64_t pitch, MillmRows x, int64_t n_columns, int n, MillmCudaQueue *queue);
/* y [n, n_columns] = what f has of it in_rows */
extern cudaError_t millm_cuda_from_rows(MillmRows y, const MillmCudaFragments *f, int64_t n_columns, int n, MillmCudaQueue *queue);

/* y[t] = table[rows[t]], or y[t] += */
extern cudaError_t millm_cuda_embed(MillmRows y, const MillmCudaWeight *table, const int32_t *rows, bool add, int n, MillmCudaQueue *queue);

typedef struct MillmCudaNorm
{
	MillmRows	y, x;
	const float *weight, *bias;	/* NULL: none, of LayerNorms */
	int64_t		weight_stride, bias_stride;	/* from part to part; 0: one for all */
	int64_t		n_parts;
	int64_t		n_columns;
	MillmCudaFragments fragments;	/* y's; of one part */
	int		   *bad_place;		/* what millm_cuda_find_not_finite() would do with x; NULL: nothing */
	int64_t		place;
	MillmNorm	kind;
	float		eps;
} MillmCudaNorm;
extern cudaError_t millm_cuda_norm(const MillmCudaNorm *l, int n, MillmCudaQueue *queue);
extern cudaError_t millm_cuda_norm_any(const MillmCudaNorm *l, int n, MillmCudaQueue *queue);	/* the obvious one */

/*
 * Attention of one layer.  Page p has at kv + p * page_bytes K [n_kv_heads, 16, head_dim], then V, the same, of kv_dtype; with INT8, then the float16
 * scales of K [n_kv_heads, 16, blocks], then those of V (MILLM_KV_INT8).
 * The table of token t begins at tables[table_of[t * n_groups]].
 */
typedef struct MillmCudaAttention
{
	char	   *kv;
	int64_t		page_bytes;
	const int32_t *positions;	/* [n] */
	const int32_t *tables;
	const int32_t *table_of;	/* [n, n_groups], from this group's on */
	const float *sinks;			/* [n_heads]; NULL: none */
	const float *alibi_slopes;	/* the same */
	int64_t		window;			/* 0: none */
	MillmDtype	kv_dtype;		/* F16, F32 or INT8 */
	int			n_groups;
	int			n_heads, n_kv_heads, head_dim;
	float		scale, softcap;	/* softcap 0: none */
	float		alibi_rounded_scale;	/* Falcon's: slope * position is rounded to bfloat16 and scaled by this; 0: neither */
	/* rope */
	int			n_pairs;		/* 0: nothing rotates */
	int			interleaved;
	const float *cosine, *sine;	/* [n, n_pairs] */
} MillmCudaAttention;

extern cudaError_t millm_cuda_split_qkv(const MillmCudaAttention *a, MillmRows q, MillmRows k, MillmRows v, MillmRows qkv, int n, MillmCudaQueue *queue);
/* q is rotated in place; k rotated and v go to their pages, and stay as they are where they are. */
extern cudaError_t millm_cuda_rope_and_store(const MillmCudaAttention *a, MillmRows q, MillmRows k, MillmRows v, int n, MillmCudaQueue *queue);
/* y [n, n_heads * head_dim] = attention of the rotated q; the obvious one, of any head size: K and V are read once for each query head. */
extern cudaError_t millm_cuda_attention_any(const MillmCudaAttention *a, MillmRows y, MillmRows q, int n, MillmCudaQueue *queue);

/*
 * The same for rows one by one, K and V read once for each group of query heads.  What a row sees is cut into splits that begin at multiples of
 * a span, which many blocks sum at a time: by its position and the window alone, so that a row's bits do not depend on its company.
 */
#define MILLM_CUDA_MAX_CHUNKED_HEAD 256	/* head sizes: multiples of 8 up to this one */
#define MILLM_CUDA_SPLIT_KEYS 64	/* the shortest span */
#define MILLM_CUDA_SPLITS 65	/* at most: 64 spans, and one more where a window begins within one */
#define MILLM_CUDA_PARTIAL 4	/* floats beside the head_dim of a split's softmax */

#ifdef __CUDACC__
#define MILLM_CUDA_BOTH_SIDES static inline __host__ __device__
#else
#define MILLM_CUDA_BOTH_SIDES static inline
#endif

/* Keys of a split of what sees so many. */
MILLM_CUDA_BOTH_SIDES int64_t
millm_cuda_split_span(int64_t n_seen)
{
	int64_t		span = MILLM_CUDA_SPLIT_KEYS;

	while (span * (MILLM_CUDA_SPLITS - 1) < n_seen)
		span *= 2;
	return span;
}

/* Splits of the row at this position; window 0: none */
MILLM_CUDA_BOTH_SIDES int
millm_cuda_splits(int64_t position, int64_t window)
{
	const int64_t first = window > 0 && position >= window ? position - window + 1 : 0;
	const int64_t span = millm_cuda_split_span(position + 1 - first);

	return (int) (position / span - first / span) + 1;
}

/* f: y's.  partials: floats of [n, n_heads, n_splits, MILLM_CUDA_PARTIAL + head_dim]; n_splits: at least each row's.  They are 16-byte aligned. */
extern cudaError_t millm_cuda_attention_split(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, float *partials, int n_splits,
											  int n, MillmCudaQueue *queue);
/*
 * The same on tensor cores, of float16 or int8, for head sizes that are multiples of 16: queries and weights are two float16 each, so they are to 2^-22, or 2^-25 of 1 where
 * they are small; a query of 65520 and more is infinite.
 */
extern cudaError_t millm_cuda_attention_fragments(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, float *partials, int n_splits,
												  int n, MillmCudaQueue *queue);
/* The same for n rows of one sequence, of positions that follow each other, on tensor cores, f in_rows: q is rounded to float16, which keys and values are. */
extern cudaError_t millm_cuda_attention_tile(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, int n, MillmCudaQueue *queue);

/* f: y's; up.data NULL: none */
extern cudaError_t millm_cuda_activation(MillmRows y, const MillmCudaFragments *f, MillmAct act, MillmRows x, MillmRows up, int64_t n_columns, int n,
										 MillmCudaQueue *queue);
extern cudaError_t millm_cuda_scale(MillmRows x, float by, int64_t n_columns, int n, MillmCudaQueue *queue);
extern cudaError_t millm_cuda_softcap(MillmRows x, float cap, int64_t n_columns, int n, MillmCudaQueue *queue);
/* y[rows[t]] += scale weights[t] x[t]; rows NULL: t, weights NULL: 1 */
extern cudaError_t millm_cuda_add_rows(MillmRows y, MillmRows x, const int32_t *rows, const float *weights, float scale, int64_t n_columns, int n,
									   MillmCudaQueue *queue);
extern cudaError_t millm_cuda_select(MillmRows y, MillmRows x, const int32_t *rows, int64_t n_columns, int n, MillmCudaQueue *queue);
/* *first = the smaller of it and place, if a value is NaN or infinite; NO_PLACE is larger than any, and of four equal bytes */
#define MILLM_CUDA_NO_PLACE 0x7f7f7f7f
extern cudaError_t millm_cuda_find_not_finite(int *first, MillmRows x, int place, int64_t n_columns, int n, MillmCudaQueue *queue);

/*
 * Which logits cross the bus.  Of a row of n_columns, in groups of MILLM_CUDA_GROUP, the k-th largest of the groups' maxima is at most the k-th largest
 * logit, and seldom far below: what reaches it is picked.
 */
#define MILLM_CUDA_PICKS 256
#define MILLM_CUDA_GROUP 128
#define MILLM_CUDA_MAX_GROUPS 4096

typedef struct MillmCudaTop
{
	int32_t		k;				/* 0: nothing is picked of this row */
	float		margin;			/* MillmTop's */
} MillmCudaTop;

typedef struct MillmCudaPicks
{
	int32_t		n;				/* that there are; if more than MILLM_CUDA_PICKS, not all of them are here */
	int32_t		ids[MILLM_CUDA_PICKS];	/* in no order */
	float		values[MILLM_CUDA_PICKS];
} MillmCudaPicks;

#ifndef __CUDACC__
#pragma GCC diagnostic pop
#endif

/* values[i] = y[rows[i], ids[i]], of i < n, which differ; -infinity takes its place. */
extern cudaError_t millm_cuda_take(float *values, MillmRows y, const int32_t *rows, const int32_t *ids, int n, MillmCudaQueue *queue);
/* picks[t] of the row t: at least what tops[t] needs.  maxima is workspace, [n, ceil(n_columns / GROUP)], at most MAX_GROUPS each */
extern cudaError_t millm_cuda_pick(MillmCudaPicks *picks, float *maxima, MillmRows y, const MillmCudaTop *tops, int64_t n_columns, int n,
								   MillmCudaQueue *queue);

/*
 * Ten times the compute capability that the kernels which this device runs were compiled for: a newer device may run those of an older one, which have no tensor cores
 * below 80, and do not wait for those in front of them below 90 (after_previous()).
 */
extern cudaError_t millm_cuda_compiled_for(int *capability);

#ifdef MILLM_FAULTS
extern cudaError_t millm_cuda_violate(cudaStream_t stream);	/* writes to memory that is nobody's */
#endif

/* to [n_out rows, pitch bytes apart] = the transpose of from [n_in, n_out]; elements of 1, 2 or 4 bytes.  Load only. */
extern cudaError_t millm_cuda_transpose(char *to, int64_t pitch, const char *from, int64_t n_in, int64_t n_out, int element, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
