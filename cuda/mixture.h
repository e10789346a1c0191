/*
 * mixture.h -- mixtures of experts on the device: which experts a row goes to is found and used there, so that no launch waits for it, or depends on it.
 *
 * An entry is a row and one of the k experts that it chooses: entry row * k + i.  Entries are sorted into tiles: some of one expert, so that a block reads
 * the weights of one.  How many tiles there are at most is a matter of the number of entries, and so the grid is.
 *
 * As in kernels.h: pointers are the device's, each function only queues work.
 */
#ifndef MILLM_CUDA_MIXTURE_H
#define MILLM_CUDA_MIXTURE_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef __CUDACC__
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wpadded"
#endif

/* One matrix of an expert: has_chunks */
typedef struct MillmCudaExpert
{
	MillmCudaWeight w;
	const float *bias;			/* [n_out]; NULL: none */
} MillmCudaExpert;

typedef struct MillmCudaTile
{
	int32_t		expert;
	int32_t		first;			/* of the sorted entries */
	int32_t		n;				/* of them; 0: there is no such tile */
} MillmCudaTile;

#define MILLM_CUDA_MANY_ENTRIES 64	/* of a tile on tensor cores; elsewhere it has a power of two, at most MILLM_CUDA_FEW_ROWS */

typedef struct MillmCudaMixture
{
	int32_t    *chosen;			/* [n * k]: of each entry the expert */
	float	   *shares;			/* [n * k]: and how much it counts */
	int32_t    *entries;		/* [n * k]: sorted by expert, in any order among themselves */
	MillmCudaTile *tiles;		/* [n_tiles] */
	int			n_experts;		/* at most MILLM_MAX_EXPERTS */
	int			k;				/* at most that */
	int			sums_to_one;
	int			tile_entries;
	int			n_tiles;		/* at least as many as there can be of n * k entries */
	int			n;				/* rows */
} MillmCudaMixture;

/* chosen and shares from scores [n, n_experts], as route.h says: the same experts; shares to the rounding of float32. */
extern cudaError_t millm_cuda_route(const MillmCudaMixture *m, MillmRows scores, MillmCudaQueue *queue);
/* entries and tiles from chosen */
extern cudaError_t millm_cuda_sort_entries(const MillmCudaMixture *m, MillmCudaQueue *queue);

/* y[e] = x[e / entries_per_row] w^T + bias, of entry e, with w of its expert */
typedef struct MillmCudaExpertMatmul
{
	MillmRows	y;				/* [n * k, n_out] */
	MillmRows	x;				/* [n * k / entries_per_row, n_in] */
	const MillmCudaExpert *experts;	/* [n_experts], all of this dtype and shape */
	const int32_t *entries;
	const MillmCudaTile *tiles;	/* [n_tiles] */
	int64_t		n_out;
	MillmDtype	dtype;
	int			entries_per_row;
	int			tile_entries;
	int			n_tiles;
} MillmCudaExpertMatmul;

/* In float32; the bits of an entry are the same whatever it shares a tile with.  tile_entries at most MILLM_CUDA_FEW_ROWS */
extern cudaError_t millm_cuda_experts_few(const MillmCudaExpertMatmul *m, MillmCudaQueue *queue);
/* Rounding to bfloat16 first; compute capability 8.0, not of F32.  tile_entries is MILLM_CUDA_MANY_ENTRIES */
extern cudaError_t millm_cuda_experts_tensor(const MillmCudaExpertMatmul *m, MillmCudaQueue *queue);

/* y[t] += the sum of shares[e] x[e], of the k entries of row t, in their order */
extern cudaError_t millm_cuda_add_entries(const MillmCudaMixture *m, MillmRows y, MillmRows x, int64_t n_columns, MillmCudaQueue *queue);

/* y[t] += sigmoid(scores[t, 0]) x[t] */
extern cudaError_t millm_cuda_add_gated(MillmRows y, MillmRows x, MillmRows scores, int64_t n_columns, int n, MillmCudaQueue *queue);

#ifndef __CUDACC__
#pragma GCC diagnostic pop
#endif

#ifdef __cplusplus
}
#endif

#endif
