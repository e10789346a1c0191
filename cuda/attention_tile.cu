/*
 * attention_tile.cu -- attention of many rows of a sequence, a prompt's: keys and values are read once for a tile of rows.  kernels.h has the meaning.
 */
#include "attention.cuh"

/*
 * A block for each tile of rows of a head, 16 of them a warp's, on tensor cores: TILE_ELEMENTS of keys after the other go through shared memory, and of their values, the
 * next ones while these are multiplied.  Queries and the weights of values are rounded to float16, as keys and values are stored, or become here; scores and sums are float32.
 * Fragments are mma.m16n8k16's (PTX ISA), with the rows g = lane / 4 and g + 8, of t = lane % 4: those of queries stay in registers, and scores are, as they lie, those of
 * weights.
 *
 *   T       of the pages: float16 or int8
 *   DIMS    head_dim <= DIMS, and is a multiple of 8; shared memory is zero behind it
 *   WARPS   as many as registers allow of two blocks on a multiprocessor
 *   rows    n of one sequence, whose positions follow each other
 *   blocks  [n_heads, ceil(n / (16 * WARPS))], threads WARPS * WARP
 */
#define TILE_ELEMENTS 4096

/* Dims d to d + 7 of a key or value to shared memory, or zeros; they are there after wait_for_copies(). */
static __device__ void
bring(f16 *to, const Slot<uint16_t> &from, int d, bool is_there)
{
	copy_16(to, from.codes + (is_there ? d : 0), is_there);
}

static __device__ void
bring(f16 *to, const Slot<int8_t> &from, int d, bool is_there)
{
	Eight<int8_t> e;
	uint32_t	words[4];

	e.clear();
	if (is_there)
		e.load(from, d);
#pragma unroll
	for (int k = 0; k < 8; k += 2)
		words[k / 2] = pair_f16(e.get(k) * e.scale(), e.get(k + 1) * e.scale());
	*(uint4 *) to = {words[0], words[1], words[2], words[3]};
}

template <class T, int DIMS, int WARPS>
static __global__ void __launch_bounds__(WARPS * WARP, 2)
attend_tile(const __grid_constant__ MillmCudaAttention a, MillmRows y, MillmCudaFragments f, MillmRows q, int n)
{
	after_previous();
	const int	ROWS = 16 * WARPS;
	const int	KEYS = TILE_ELEMENTS / DIMS;
	const int	PITCH = DIMS + 8;	/* of float16: rows 16 bytes apart from a multiple of the banks */
	SHARED(f16, tiles, 2 * 2 * KEYS * PITCH);	/* of keys, then of values: those of an even tile, then of an odd one */
	const int	h = (int) blockIdx.x;
	const int	kv_head = h / (a.n_heads / a.n_kv_heads);
	const int	t0 = (int) (gridDim.y - 1 - blockIdx.y) * ROWS;	/* those that see most begin first */
	const int	n_rows = n - t0 < ROWS ? n - t0 : ROWS;
	const int	warp = (int) threadIdx.x / WARP;
	const int	lane = (int) threadIdx.x % WARP;
	const int	g = lane / 4,
				t = lane % 4;
	const int	row = warp * 16 + g;	/* of the block's, and row + 8 */
	const int	position = a.positions[t0] + row;	/* positions fit an int */
	const int	first[2] = {(int) first_seen(a, position), (int) first_seen(a, position + 8)};
	/* the first key that one of the block's rows sees, and behind the last; and of the warp's, which may have none */
	const int	begin = (int) first_seen(a, a.positions[t0]);
	const int	end = a.positions[t0] + n_rows;
	const int	warp_rows = n_rows - warp * 16 < 16 ? n_rows - warp * 16 : 16;
	const int	warp_begin = (int) first_seen(a, position - g);
	const int	warp_end = warp_rows > 0 ? position - g + warp_rows : begin;
	const int32_t *table = a.tables + a.table_of[t0 * a.n_groups];
	const Slot<T> first_key(a, 0, kv_head, 0, false);	/* in page 0 */
	uint32_t	query[DIMS / 16][4];
	float		value[DIMS / 8][4] = {};
	float		max[2],
				sum[2];

	auto		tile_of = [&] (int p0) { return tiles + p0 / KEYS % 2 * (2 * KEYS * PITCH); };
	auto		bring_tile = [&] (int p0) {
		for (int i = (int) threadIdx.x; i < KEYS * DIMS / 8; i += WARPS * WARP)
		{
			const int	key = i / (DIMS / 8);
			const int	d = i % (DIMS / 8) * 8;
			/* where nothing was ever stored there may be NaN, which no weight of 0 would hide */
			const bool	is_there = p0 + key >= begin && p0 + key < end && d < a.head_dim;
			Slot<T>		from = first_key.of_page(a, is_there ? table[(p0 + key) / MILLM_CUDA_PAGE] : 0);
			f16		   *to = tile_of(p0) + key * PITCH + d;

			from.skip(a, (p0 + key) % MILLM_CUDA_PAGE);
			bring(to, from, d, is_there);
			from.skip(a, a.n_kv_heads * MILLM_CUDA_PAGE);	/* to its value */
			bring(to + KEYS * PITCH, from, d, is_there);
		}
	};

	bring_tile(begin / KEYS * KEYS);
#pragma unroll
	for (int i = 0; i < DIMS / 4; i++)
	{
		const int	r = row + i % 2 * 8;
		const int	d = i / 4 * 16 + i / 2 % 2 * 8 + 2 * t;
		float2		of_query = {0, 0};

		if (r < n_rows && d < a.head_dim)
			of_query = *(const float2 *) (q.data + (t0 + r) * q.stride + (int64_t) h * a.head_dim + d);
		query[i / 4][i % 4] = pair_f16(of_query.x, of_query.y);
	}
#pragma unroll
	for (int i = 0; i < 2; i++)
	{
		max[i] = a.sinks ? a.sinks[h] : -INFINITY;
		sum[i] = a.sinks && t == 0 ? 1 : 0;	/* this lane's part */
	}
	for (int p0 = begin / KEYS * KEYS; p0 < end; p0 += KEYS)
	{
		const f16  *keys = tile_of(p0);
		const f16  *values = keys + KEYS * PITCH;
		const bool	all_seen = p0 >= first_seen(a, warp_end - 1) && p0 + KEYS - 1 <= position - g;	/* by each row of the warp */
		float		score[KEYS / 8][4] = {};
		float		largest[2] = {max[0], max[1]};
		float		rescale[2];
		uint32_t	quarters[4];

		wait_for_copies();
		__syncthreads();		/* this tile is there, and the one before has been read */
		if (p0 + KEYS < end)
			bring_tile(p0 + KEYS);
		if (p0 + KEYS <= warp_begin || p0 >= warp_end)
			continue;
#pragma unroll
		for (int s = 0; s < DIMS / 16; s++)
#pragma unroll
			for (int j = 0; j < KEYS / 16; j++)
			{
				load_quarters(quarters, keys + 16 * j * PITCH + 16 * s, PITCH);
				mma_f16_16x8x16(score[2 * j], query[s], quarters);
				mma_f16_16x8x16(score[2 * j + 1], query[s], quarters + 2);
			}
		if (a.softcap > 0 || a.alibi_slopes)
#pragma unroll
			for (int i = 0; i < KEYS / 2; i++)
				score[i / 4][i % 4] = finished_score(a, score[i / 4][i % 4], h, p0 + i / 4 * 8 + 2 * t + i % 2);
		else
#pragma unroll
			for (int i = 0; i < KEYS / 2; i++)
				score[i / 4][i % 4] *= a.scale;
		if (!all_seen)
#pragma unroll
			for (int i = 0; i < KEYS / 2; i++)
			{
				const int	p = p0 + i / 4 * 8 + 2 * t + i % 2;

				if (p < first[i / 2 % 2] || p > position + i / 2 % 2 * 8)
					score[i / 4][i % 4] = -INFINITY;
			}
#pragma unroll
		for (int i = 0; i < KEYS / 2; i++)
			if (!(score[i / 4][i % 4] <= largest[i / 2 % 2]))	/* a NaN is taken along: it must reach the output */
				largest[i / 2 % 2] = score[i / 4][i % 4];
#pragma unroll
		for (int r = 0; r < 2; r++)
		{
#pragma unroll
			for (int step = 1; step < 4; step *= 2)
			{
				const float other = __shfl_xor_sync(ALL_LANES, largest[r], step);

				largest[r] = !(other <= largest[r]) ? other : largest[r];
			}
			rescale[r] = largest[r] <= max[r] ? 1 : exp_of(max[r] - largest[r]);
			max[r] = largest[r];
			sum[r] *= rescale[r];
		}
		if (rescale[0] != 1 || rescale[1] != 1)
#pragma unroll
			for (int i = 0; i < DIMS / 2; i++)
				value[i / 4][i % 4] *= rescale[i / 2 % 2];
#pragma unroll
		for (int i = 0; i < KEYS / 2; i++)
		{
			score[i / 4][i % 4] = share_of(score[i / 4][i % 4], max[i / 2 % 2]);
			sum[i / 2 % 2] += score[i / 4][i % 4];
		}
#pragma unroll
		for (int j = 0; j < KEYS / 16; j++)
		{
			const uint32_t weights[4] = {pair_f16(score[2 * j][0], score[2 * j][1]), pair_f16(score[2 * j][2], score[2 * j][3]),
				pair_f16(score[2 * j + 1][0], score[2 * j + 1][1]), pair_f16(score[2 * j + 1][2], score[2 * j + 1][3])};

#pragma unroll
			for (int d = 0; d < DIMS / 16; d++)
			{
				load_quarters_transposed(quarters, values + 16 * j * PITCH + 16 * d, PITCH);
				mma_f16_16x8x16(value[2 * d], weights, quarters);
				mma_f16_16x8x16(value[2 * d + 1], weights, quarters + 2);
			}
		}
	}
#pragma unroll
	for (int r = 0; r < 2; r++)
#pragma unroll
		for (int step = 1; step < 4; step *= 2)
			sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], step);
	/* Of two neighbours the even one takes four dims of the first row, and the other the same of the second. */
#pragma unroll
	for (int i = 0; i < DIMS / 8; i++)
	{
		const bool	is_odd = t % 2;
		const int	r = row + 8 * is_odd;
		const int	d = i * 8 + t / 2 * 4;
		const float theirs[2] = {__shfl_xor_sync(ALL_LANES, is_odd ? value[i][0] : value[i][2], 1), __shfl_xor_sync(ALL_LANES, is_odd ? value[i][1] : value[i][3], 1)};
		const float share = 1 / (is_odd ? sum[1] : sum[0]);
		const float v[4] = {(is_odd ? theirs[0] : value[i][0]) * share, (is_odd ? theirs[1] : value[i][1]) * share,
			(is_odd ? value[i][2] : theirs[0]) * share, (is_odd ? value[i][3] : theirs[1]) * share};

		if (r < n_rows && d < a.head_dim)
		{
			if (!f.alone)
				*(float4 *) (y.data + (t0 + r) * y.stride + (int64_t) h * a.head_dim + d) = {v[0], v[1], v[2], v[3]};
			if (f.data)
				keep_four(f, t0 + r, (int64_t) h * a.head_dim + d, v);
		}
	}
}

template <class T, int DIMS, int WARPS>
static cudaError_t
launch_tile(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, int n, MillmCudaQueue *queue)
{
	return launch(attend_tile<T, DIMS, WARPS>, dim3((unsigned) a->n_heads, (unsigned) ((n + 16 * WARPS - 1) / (16 * WARPS))), WARPS * WARP, queue, *a, y, *f, q, n);
}

template <class T>
static cudaError_t
launch_tile(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, int n, MillmCudaQueue *queue)
{
	return a->head_dim <= 64 ? launch_tile<T, 64, 6>(a, y, f, q, n, queue) : a->head_dim <= 128 ? launch_tile<T, 128, 6>(a, y, f, q, n, queue) :
		launch_tile<T, 256, 4>(a, y, f, q, n, queue);
}

cudaError_t
millm_cuda_attention_tile(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, int n, MillmCudaQueue *queue)
{
	return a->kv_dtype == MILLM_F16 ? launch_tile<uint16_t>(a, y, f, q, n, queue) : launch_tile<int8_t>(a, y, f, q, n, queue);
}
