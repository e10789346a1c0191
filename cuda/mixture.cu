/*
 * mixture.cu -- mixtures of experts, on the device.  mixture.h has the meaning of each function.
 */
#include "mixture.h"
#include "parts.cuh"

/* ---- who goes where ---- */

static inline __device__ float
warp_max(float v)
{
	for (int step = WARP / 2; step > 0; step /= 2)
		v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
	return v;
}

/*
 * A warp for each row: k times the largest score that comes after the last one in the order of falling scores, equals by number, as route.c does.  Numbers of
 * experts are exact as floats, too.
 *
 *   blocks [n], threads WARP
 */
static __global__ void
route(MillmCudaMixture m, MillmRows scores)
{
	after_previous();
	const float *row = scores.data + blockIdx.x * scores.stride;
	int32_t    *chosen = m.chosen + (int64_t) blockIdx.x * m.k;
	float	   *shares = m.shares + (int64_t) blockIdx.x * m.k;
	const int	lane = (int) threadIdx.x;
	float		n_nan = 0,
				all = 0,
				sum = 0,
				largest = 0,
				bound = INFINITY;
	int			at = -1;

	for (int e = lane; e < m.n_experts; e += WARP)
		n_nan += row[e] != row[e];
	n_nan = warp_sum(n_nan);
	for (int i = 0; i < m.k; i++)
	{
		int			best = m.n_experts;	/* of this lane; there may be none */

		for (int e = lane; e < m.n_experts; e += WARP)
			if ((row[e] < bound || (row[e] == bound && e > at)) && (best == m.n_experts || row[e] > row[best]))
				best = e;
		bound = warp_max(best < m.n_experts ? row[best] : -INFINITY);
		if (best < m.n_experts && row[best] != bound)
			best = m.n_experts;
		at = n_nan > 0 ? i : (int) -warp_max((float) -best);	/* a NaN is in no order */
		largest = i == 0 ? bound : largest;
		sum += expf(bound - largest);
		if (lane == 0)
		{
			chosen[i] = at;
			shares[i] = n_nan > 0 ? NAN : expf(bound - largest);
		}
	}
	for (int e = lane; e < m.n_experts; e += WARP)
		all += expf(row[e] - largest);
	all = warp_sum(all);
	for (int i = 0; i < m.k && lane == 0; i++)
		shares[i] /= m.sums_to_one ? sum : all;
}

cudaError_t
millm_cuda_route(const MillmCudaMixture *m, MillmRows scores, MillmCudaQueue *queue)
{
	return launch(route, dim3((unsigned) m->n), WARP, queue, *m, scores);
}

/*
 * One block counts, gives each expert its place and its tiles, and puts the entries there.  In which order those of an expert come is the device's to
 * say; nothing that is computed of an entry depends on it.
 *
 *   blocks [1], threads SORT_THREADS
 */
#define SORT_THREADS 1024
static __global__ void
sort_entries(MillmCudaMixture m)
{
	after_previous();
	SHARED(int, counts, MILLM_MAX_EXPERTS);
	SHARED(int, next, MILLM_MAX_EXPERTS);	/* place of the next entry */
	const int	n_entries = m.n * m.k;

	for (int e = (int) threadIdx.x; e < m.n_experts; e += SORT_THREADS)
		counts[e] = 0;
	__syncthreads();
	for (int i = (int) threadIdx.x; i < n_entries; i += SORT_THREADS)
		atomicAdd(&counts[m.chosen[i]], 1);
	__syncthreads();
	for (int e = (int) threadIdx.x; e < m.n_experts; e += SORT_THREADS)
	{
		int			first = 0,
					tile = 0;

		for (int before = 0; before < e; before++)
		{
			first += counts[before];
			tile += (counts[before] + m.tile_entries - 1) / m.tile_entries;
		}
		next[e] = first;
		for (int i = 0; i < counts[e]; i += m.tile_entries)
			m.tiles[tile++] = {e, first + i, counts[e] - i < m.tile_entries ? counts[e] - i : m.tile_entries};
		if (e == m.n_experts - 1)
			while (tile < m.n_tiles)
				m.tiles[tile++] = {0, 0, 0};
	}
	__syncthreads();
	for (int i = (int) threadIdx.x; i < n_entries; i += SORT_THREADS)
		m.entries[atomicAdd(&next[m.chosen[i]], 1)] = i;
}

cudaError_t
millm_cuda_sort_entries(const MillmCudaMixture *m, MillmCudaQueue *queue)
{
	return launch(sort_entries, dim3(1), SORT_THREADS, queue, *m);
}

/* ---- products ---- */

static __device__ const float *
row_of_entry(const MillmCudaExpertMatmul &m, int entry)
{
	return m.x.data + entry / m.entries_per_row * m.x.stride;
}

static __device__ void
finish(const MillmCudaExpertMatmul &m, const MillmCudaExpert &expert, int entry, int64_t o, float sum)
{
	m.y.data[entry * m.y.stride + o] = expert.bias ? sum + expert.bias[o] : sum;
}

/*
 * A tile of an expert's few entries.
 *
 *   T       entries of a tile, at most
 *   blocks  [ceil(n_out / FEW_OUTPUTS), n_tiles], threads FEW_THREADS
 */
template <int DTYPE, int T>
static __global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS(T))
experts_few(MillmCudaExpertMatmul m)
{
	after_previous();
	const MillmCudaTile tile = m.tiles[blockIdx.y];
	const MillmCudaExpert expert = m.experts[tile.expert];

	if (tile.n > 0)
		few_tile<DTYPE, T>(expert.w, (int64_t) blockIdx.x * FEW_OUTPUTS, tile.n, [&] (int t) { return row_of_entry(m, m.entries[tile.first + t]); },
						   [&] (int t, int64_t o, float sum) { finish(m, expert, m.entries[tile.first + t], o, sum); });
}

template <int DTYPE>
static cudaError_t
launch_few(const MillmCudaExpertMatmul *m, MillmCudaQueue *queue)
{
	const dim3	blocks((unsigned) ((m->n_out + FEW_OUTPUTS - 1) / FEW_OUTPUTS), (unsigned) m->n_tiles);

	return launch(m->tile_entries == 1 ? experts_few<DTYPE, 1> : m->tile_entries == 2 ? experts_few<DTYPE, 2> : m->tile_entries == 4 ? experts_few<DTYPE, 4> :
				  experts_few<DTYPE, MILLM_CUDA_FEW_ROWS>, blocks, FEW_THREADS, queue, *m);
}

/* A tile on tensor cores.  blocks [ceil(n_out / TILE), n_tiles], threads TENSOR_THREADS */
template <int DTYPE>
static __global__ void
experts_tensor(MillmCudaExpertMatmul m)
{
	after_previous();
	static_assert(TILE == MILLM_CUDA_MANY_ENTRIES, "a tile of entries is a tile of the product");
	const MillmCudaTile tile = m.tiles[blockIdx.y];
	const MillmCudaExpert expert = m.experts[tile.expert];

	if (tile.n == 0)
		return;
	tensor_tile<DTYPE>(expert.w, (int64_t) blockIdx.x * TILE, tile.n, [&] (int t) { return row_of_entry(m, m.entries[tile.first + t]); },
					   [&] (int t, int64_t o, float sum) { finish(m, expert, m.entries[tile.first + t], o, sum); });
}

template <int DTYPE>
static cudaError_t
launch_tensor(const MillmCudaExpertMatmul *m, MillmCudaQueue *queue)
{
	return launch(experts_tensor<DTYPE>, dim3((unsigned) ((m->n_out + TILE - 1) / TILE), (unsigned) m->n_tiles), TENSOR_THREADS, queue, *m);
}

typedef cudaError_t (*ExpertsLauncher) (const MillmCudaExpertMatmul *m, MillmCudaQueue *queue);

cudaError_t
millm_cuda_experts_few(const MillmCudaExpertMatmul *m, MillmCudaQueue *queue)
{
	static const ExpertsLauncher of_dtype[MILLM_N_WEIGHT_DTYPES] = {
		launch_few<MILLM_F32>, launch_few<MILLM_F16>, launch_few<MILLM_BF16>, launch_few<MILLM_4BIT>, launch_few<MILLM_INT8>, launch_few<MILLM_MXFP4>};

	return of_dtype[m->dtype] (m, queue);
}

cudaError_t
millm_cuda_experts_tensor(const MillmCudaExpertMatmul *m, MillmCudaQueue *queue)
{
	static const ExpertsLauncher of_dtype[MILLM_N_WEIGHT_DTYPES] = {
		NULL, launch_tensor<MILLM_F16>, launch_tensor<MILLM_BF16>, launch_tensor<MILLM_4BIT>, launch_tensor<MILLM_INT8>, launch_tensor<MILLM_MXFP4>};

	return m->dtype == MILLM_F32 ? cudaErrorInvalidValue : of_dtype[m->dtype] (m, queue);
}

static __global__ void
add_entries(MillmCudaMixture m, MillmRows y, MillmRows x, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();
	const int64_t first = (int64_t) blockIdx.y * m.k;
	float	   *to = y.data + blockIdx.y * y.stride + i;
	float		sum;

	if (i >= n_columns)
		return;
	sum = *to;
	for (int64_t e = first; e < first + m.k; e++)
		sum = fmaf(m.shares[e], x.data[e * x.stride + i], sum);
	*to = sum;
}

cudaError_t
millm_cuda_add_entries(const MillmCudaMixture *m, MillmRows y, MillmRows x, int64_t n_columns, MillmCudaQueue *queue)
{
	return launch_elements(add_entries, n_columns, m->n, queue, *m, y, x, n_columns);
}

static __global__ void
add_gated(MillmRows y, MillmRows x, MillmRows scores, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		y.data[blockIdx.y * y.stride + i] += x.data[blockIdx.y * x.stride + i] / (1 + expf(-scores.data[blockIdx.y * scores.stride]));
}

cudaError_t
millm_cuda_add_gated(MillmRows y, MillmRows x, MillmRows scores, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(add_gated, n_columns, n, queue, y, x, scores, n_columns);
}
