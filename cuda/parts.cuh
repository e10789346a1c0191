/*
 * parts.cuh -- what kernels of several files are made of: launches through the queue, sums over warps and blocks, weights as numbers, a tile of a product.
 *
 * Included by kernels only, each of which is compiled for devices and, over test/cuda/emulated.h, for the CPU: hence start_kernel() and SHARED()
 * in place of the language's own.
 */
#ifndef MILLM_CUDA_PARTS_H
#define MILLM_CUDA_PARTS_H

#include <cstring>
#include <utility>

#include "kernels.h"

#ifdef MILLM_CUDA_EMULATED
#include "emulated.h"
#else
#include "device.h"
#endif

/*
 * A launch as the queue keeps it: the kernel, its blocks, threads and shared memory, then its parameters one after the other, each from a multiple of 8 bytes.
 */
struct Launch
{
	void		(*kernel) ();
	unsigned	blocks[3];
	int			threads;
	int64_t		shared;			/* bytes beside those that the kernel declares: LAUNCHED_SHARED() */
};

static constexpr size_t
room_for(size_t bytes)
{
	return (bytes + 7) / 8 * 8;
}

/* Where the k-th of parameters of these sizes begins */
static constexpr size_t
place_of(size_t k, const size_t *sizes)
{
	return k == 0 ? sizeof(Launch) : place_of(k - 1, sizes) + room_for(sizes[k - 1]);
}

template <class... Parameters, size_t... I>
static cudaError_t
start_packed(const void *packed, bool overlaps, cudaStream_t stream, std::index_sequence<I...>)
{
	const Launch *l = (const Launch *) packed;
	const size_t sizes[] = {sizeof(Parameters)...};

	return start_kernel((void (*) (Parameters...)) l->kernel, dim3(l->blocks[0], l->blocks[1], l->blocks[2]), l->threads, (size_t) l->shared, overlaps,
						stream,
						*(const Parameters *) ((const char *) packed + place_of(I, sizes))...);
}

template <class... Parameters>
static cudaError_t
start(const void *packed, bool overlaps, cudaStream_t stream)
{
	return start_packed<Parameters...>(packed, overlaps, stream, std::index_sequence_for<Parameters...>());
}

template <class Parameter>
static void
pack(char *&to, const Parameter &parameter)
{
	memcpy(to, &parameter, sizeof(parameter));
	to += room_for(sizeof(parameter));
}

template <class... Parameters, class... Arguments>
static cudaError_t
launch_sharing(void (*kernel) (Parameters...), dim3 blocks, int threads, int64_t shared, MillmCudaQueue *queue, Arguments... arguments)
{
	alignas(8) char packed[(sizeof(Launch) + ... + room_for(sizeof(Parameters)))] = {};
	char	   *to = packed + sizeof(Launch);

	*(Launch *) packed = {(void (*) ()) kernel, {blocks.x, blocks.y, blocks.z}, threads, shared};
	(pack<Parameters>(to, arguments), ...);
	return millm_cuda_queue(queue, start<Parameters...>, packed, sizeof(packed));
}

template <class... Parameters, class... Arguments>
static cudaError_t
launch(void (*kernel) (Parameters...), dim3 blocks, int threads, MillmCudaQueue *queue, Arguments... arguments)
{
	return launch_sharing(kernel, blocks, threads, 0, queue, arguments...);
}

#define WARP 32
#define ALL_LANES 0xffffffffu
#define BLOCK 256				/* threads, of kernels that go over elements */

static inline __device__ float
warp_sum(float v)
{
	for (int step = WARP / 2; step > 0; step /= 2)
		v += __shfl_xor_sync(ALL_LANES, v, step);
	return v;
}

/* The sum over a block, in every thread; partial has a place for each warp. */
static inline __device__ float
block_sum(float v, float *partial)
{
	const int	n_warps = (int) blockDim.x / WARP;
	float		sum = 0;

	v = warp_sum(v);
	__syncthreads();			/* partial may still be read, from the sum before */
	if (threadIdx.x % WARP == 0)
		partial[threadIdx.x / WARP] = v;
	__syncthreads();
	for (int w = 0; w < n_warps; w++)
		sum += partial[w];
	return sum;
}

/* The largest v of a block, in every thread, as fmaxf() has it; partial has a place for each warp. */
static inline __device__ float
block_max(float v, float *partial)
{
	const int	n_warps = (int) blockDim.x / WARP;

	for (int step = WARP / 2; step > 0; step /= 2)
		v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
	__syncthreads();			/* partial may still be read */
	if (threadIdx.x % WARP == 0)
		partial[threadIdx.x / WARP] = v;
	__syncthreads();
	for (int w = 0; w < n_warps; w++)
		v = fmaxf(v, partial[w]);
	return v;
}

/* ---- weights ---- */

static inline __device__ float
bf16_bits(uint32_t h)
{
	return as_float(h << 16);
}

static inline __device__ float
round_to(float v, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? bf16_bits(to_bf16(v)) : dtype == MILLM_F16 ? from_f16(to_f16(v)) : v;
}

/* The scale of a 4-bit block. */
static inline __device__ float
block_scale(const MillmCudaWeight &w, int64_t block)
{
	if (w.nested_shift < 0)
		return ((const float *) w.absmax)[block];
	return add(mul(w.nested_map[((const uint8_t *) w.absmax)[block]], w.nested_absmax[block >> w.nested_shift]), w.nested_offset);
}

/* Twice the value, which is an integer: 0, 1, 2, 3, 4, 6, 8, 12. */
static inline __device__ float
mxfp4_twice(uint32_t nibble)
{
	const uint32_t exponent = nibble >> 1 & 3;
	const uint32_t twice = exponent == 0 ? nibble & 1 : (2 + (nibble & 1)) << (exponent - 1);

	return nibble & 8 ? -(float) twice : (float) twice;
}

/* 2^(e - 128): half of the scale that the byte e is, and always finite */
static inline __device__ float
mxfp4_half_scale(uint8_t e)
{
	return e < 2 ? as_float(1u << (21 + e)) : as_float((uint32_t) (e - 1) << 23);
}

#define INT8_UNIT 0.007874015718698502f	/* 1 / 127, as bitsandbytes has it */

/* w[o, i], of any weight: what the chunks below are measured by. */
static inline __device__ float
element(const MillmCudaWeight &w, int64_t o, int64_t i)
{
	const char *row = (const char *) w.data + o * w.row_bytes;

	switch (w.dtype)
	{
		case MILLM_F32:
			return ((const float *) row)[i];
		case MILLM_F16:
			return from_f16(((const uint16_t *) row)[i]);
		case MILLM_BF16:
			return bf16_bits(((const uint16_t *) row)[i]);
		case MILLM_INT8:
			return mul(mul((float) ((const int8_t *) row)[i], ((const float *) w.scale)[o]), INT8_UNIT);
		case MILLM_MXFP4:
			return mxfp4_twice(((const uint8_t *) row)[i / 2] >> (i % 2 == 0 ? 0 : 4) & 15) *
				mxfp4_half_scale(((const uint8_t *) w.scale)[o * (w.n_in / 32) + i / 32]);
		default:
			{
				const int64_t e = w.first + o * w.n_in + i;
				const int	nibble = ((const uint8_t *) w.data)[e / 2] >> (e % 2 == 0 ? 4 : 0) & 15;

				return round_to(mul(w.codebook[nibble], block_scale(w, e >> w.block_shift)), w.rounded);
			}
	}
}

/* What the nibbles of a weight stand for, where lanes that want different ones do not wait for each other: 16 floats in 16 banks.  Of a whole block. */
template <int DTYPE>
static inline __device__ void
share_table(float *shared, const MillmCudaWeight &w)
{
	if (DTYPE != MILLM_4BIT && DTYPE != MILLM_MXFP4)
		return;
	if (threadIdx.x < 16)
		shared[threadIdx.x] = DTYPE == MILLM_4BIT ? w.codebook[threadIdx.x] : mxfp4_twice(threadIdx.x);
	__syncthreads();
}

/* The entry of such a table that a nibble of word names. */
static inline __device__ float
look_up(const float *table, uint32_t word, int shift)
{
	const uint32_t at = (shift < 2 ? word << 2 : word >> (shift - 2)) & 60;

	return *(const float *) ((const char *) table + at);
}

/* Weights in 16 bytes. */
template <int DTYPE>
struct Chunk
{
	static const int SIZE = DTYPE == MILLM_F32 ? 4 : DTYPE == MILLM_INT8 ? 16 : DTYPE == MILLM_4BIT || DTYPE == MILLM_MXFP4 ? 32 : 8;
};

/* w[o, i .. i + SIZE) as it is stored, of a weight with has_chunks: one load of 16 bytes.  i is a multiple of SIZE. */
template <int DTYPE>
static inline __device__ uint4
stored_chunk(const MillmCudaWeight &w, int64_t o, int64_t i)
{
	return *(const uint4 *) ((const char *) w.data + (DTYPE == MILLM_4BIT ? (w.first + o * w.n_in + i) / 2 : o * w.row_bytes + i * 16 / Chunk<DTYPE>::SIZE));
}

/* And its scale; of floats there is none. */
template <int DTYPE>
static inline __device__ float
chunk_scale(const MillmCudaWeight &w, int64_t o, int64_t i)
{
	return DTYPE == MILLM_4BIT ? block_scale(w, (w.first + o * w.n_in + i) >> w.block_shift) :
		DTYPE == MILLM_MXFP4 ? mxfp4_half_scale(((const uint8_t *) w.scale)[o * (w.n_in / 32) + i / 32]) :
		DTYPE == MILLM_INT8 ? ((const float *) w.scale)[o] : 1;
}

/* v = weights 4 k .. 4 k + 3 of a chunk, without their scale.  table is from share_table(). */
template <int DTYPE>
static inline __device__ void
four_weights(float *v, uint4 u, int k, const float *table)
{
	const uint32_t word[4] = {u.x, u.y, u.z, u.w};

#pragma unroll
	for (int j = 0; j < 4; j++)
		if (DTYPE == MILLM_4BIT)
			v[j] = look_up(table, word[k / 2], k % 2 * 16 + j / 2 * 8 + (j % 2 == 0 ? 4 : 0));
		else if (DTYPE == MILLM_MXFP4)
			v[j] = look_up(table, word[k / 2], k % 2 * 16 + j * 4);
		else if (DTYPE == MILLM_INT8)	/* a byte plus 128 at the end of 2^23: conversions are four times as slow */
			v[j] = as_float(0x4B000000 | ((word[k] ^ 0x80808080) >> j * 8 & 255)) - 8388736.0f;
		else if (DTYPE == MILLM_F32)
			v[j] = as_float(word[j]);
		else if (DTYPE == MILLM_F16)
			v[j] = from_f16((uint16_t) (word[2 * k + j / 2] >> j % 2 * 16));
		else
			v[j] = bf16_bits(word[2 * k + j / 2] >> j % 2 * 16 & 0xffff);
}

/* v = the SIZE weights of such a chunk; past the end of the row they are zeros (F32, F16, BF16, INT8; rows of the others end with a chunk). */
template <int DTYPE>
static inline __device__ void
decode_chunk(float *v, uint4 u, float scale, const float *table, MillmDtype rounded)
{
#pragma unroll
	for (int k = 0; k < Chunk<DTYPE>::SIZE / 4; k++)
		four_weights<DTYPE>(v + 4 * k, u, k, table);
#pragma unroll
	for (int k = 0; k < Chunk<DTYPE>::SIZE; k++)
		if (DTYPE == MILLM_4BIT)
			v[k] = round_to(mul(v[k], scale), rounded);
		else if (DTYPE == MILLM_MXFP4)
			v[k] *= scale;
		else if (DTYPE == MILLM_INT8)
			v[k] = mul(mul(v[k], scale), INT8_UNIT);
}

/* v = w[o, i .. i + SIZE) */
template <int DTYPE>
static inline __device__ void
load_chunk(float *v, const MillmCudaWeight &w, const float *table, int64_t o, int64_t i)
{
	decode_chunk<DTYPE>(v, stored_chunk<DTYPE>(w, o, i), chunk_scale<DTYPE>(w, o, i), table, w.rounded);
}

/* Kernels over elements: thread (x, t) of blocks [ceil(columns / BLOCK), n] has element i of row t. */
static inline __device__ int64_t
element_index()
{
	return (int64_t) blockIdx.x * BLOCK + threadIdx.x;
}

template <class... Parameters, class... Arguments>
static cudaError_t
launch_elements(void (*kernel) (Parameters...), int64_t n_columns, int n, MillmCudaQueue *queue, Arguments... arguments)
{
	return launch(kernel, dim3((unsigned) ((n_columns + BLOCK - 1) / BLOCK), (unsigned) n), BLOCK, queue, arguments...);
}

/* Where value i of row t is: the next seven of a multiple of eight lie behind it. */
static inline __device__ uint16_t *
place_in(const MillmCudaFragments &f, int t, int64_t i)
{
	const int	column = f.has_low ? 2 * t : t;

	if (f.in_rows)
		return f.data + t * f.n_blocks * 64 + i;
	return f.data + (column / 8 * f.n_blocks + i / 64) * 512 + i % 16 / 8 * 256 + column % 8 * 32 + i % 64 / 16 * 8 + i % 8;
}

/* Value i of row t is v, in fragments, too. */
static inline __device__ void
keep(const MillmCudaFragments &f, int t, int64_t i, float v)
{
	const uint16_t high = to_bf16(v);
	uint16_t   *to = place_in(f, t, i);

	*to = high;
	if (f.has_low)
		to[32] = to_bf16(v - bf16_bits(high));	/* the next column, which is even here, or this would be another tile's */
}

/* The same of four values from i on, which is a multiple of four. */
static inline __device__ void
keep_four(const MillmCudaFragments &f, int t, int64_t i, const float *v)
{
	uint16_t   *to = place_in(f, t, i);
	uint32_t	high[4],
				low[4];

#pragma unroll
	for (int k = 0; k < 4; k++)
	{
		high[k] = to_bf16(v[k]);
		low[k] = to_bf16(v[k] - bf16_bits(high[k]));
	}
	*(uint2 *) to = {high[0] | high[1] << 16, high[2] | high[3] << 16};
	if (f.has_low)
		*(uint2 *) (to + 32) = {low[0] | low[1] << 16, low[2] | low[3] << 16};
}

/* ---- a product with few rows ---- */

#define FEW_WARPS 4
#define FEW_ROWS 4				/* of weights, a warp */
#define FEW_OUTPUTS (FEW_WARPS * FEW_ROWS)
#define FEW_THREADS (FEW_WARPS * WARP)
/* of them on a multiprocessor, by the rows of x: registers for that many, and none spills (sm_75 to sm_120); all their loads are in flight together */
#define FEW_BLOCKS(T) ((T) <= 2 ? 4 : (T) <= 4 ? 3 : 2)
#define FEW_X_BYTES 32768		/* of activations in shared memory, but for padding */

/*
 * n <= T rows of activations x FEW_OUTPUTS outputs of w from o0 on, in float32.  Decode is bound by reading the weights: a warp reads FEW_ROWS of their
 * rows once, 16 bytes a lane, LOADS chunks of each asked for before the first is looked at.  Instructions are few, too: activations lie in shared memory in
 * the order in which lanes read them, four at a time, for all rows of a warp, and a chunk's scale multiplies its sum, so 4-bit weights are not rounded.  A lane
 * sums its chunks of a row in their order, whatever T is.  Of a whole block of FEW_THREADS, w has_chunks.
 *
 *   row_of(t)      where the activations of row t begin
 *   put(t, o, sum) takes the product of row t and output o
 */
template <int DTYPE, int T, class Row, class Put>
static inline __device__ void
few_tile(const MillmCudaWeight &w, int64_t o0, int n, Row row_of, Put put)
{
	const int	SIZE = Chunk<DTYPE>::SIZE;
	const int	LOADS = T * 2 * WARP * SIZE * (int) sizeof(float) <= FEW_X_BYTES ? 2 : 1;
	const int	COLUMNS = LOADS * WARP * SIZE;
	const int	PITCH = WARP + 1;	/* those who write neighbours of a row do not wait for each other */
	const bool	HAS_SCALES = DTYPE == MILLM_4BIT || DTYPE == MILLM_MXFP4;
	SHARED(float, table, 16);
	SHARED(float4, xs, T * COLUMNS / 4 / WARP * PITCH);	/* [T, LOADS, SIZE / 4, PITCH]: four columns of a lane's chunk */
	const int	lane = (int) threadIdx.x % WARP;
	int64_t		o[FEW_ROWS];
	float		sum[FEW_ROWS][T];

	share_table<DTYPE>(table, w);
#pragma unroll
	for (int r = 0; r < FEW_ROWS; r++)
	{
		o[r] = o0 + (int) threadIdx.x / WARP * FEW_ROWS + r;
		o[r] = o[r] < w.n_out ? o[r] : w.n_out - 1;
#pragma unroll
		for (int t = 0; t < T; t++)
			sum[r][t] = 0;
	}
	for (int64_t i0 = 0; i0 < w.n_in; i0 += COLUMNS)
	{
		uint4		stored[LOADS][FEW_ROWS];
		float		scale[LOADS][FEW_ROWS];

#pragma unroll
		for (int j = 0; j < LOADS * FEW_ROWS; j++)
		{
			const int64_t i = i0 + (j / FEW_ROWS * WARP + lane) * SIZE;	/* past the end activations are zeros: any chunk will do */

			stored[j / FEW_ROWS][j % FEW_ROWS] = stored_chunk<DTYPE>(w, o[j % FEW_ROWS], i < w.n_in ? i : i0);
		}
#pragma unroll
		for (int j = 0; j < LOADS * FEW_ROWS && HAS_SCALES; j++)
		{
			const int64_t i = i0 + (j / FEW_ROWS * WARP + lane) * SIZE;

			scale[j / FEW_ROWS][j % FEW_ROWS] = chunk_scale<DTYPE>(w, o[j % FEW_ROWS], i < w.n_in ? i : i0);
		}
		__syncthreads();		/* the last slice has been read */
		for (int c = (int) threadIdx.x; c < T * COLUMNS / 4; c += FEW_THREADS)
		{
			const int	t = c / (COLUMNS / 4);
			const int	column = c % (COLUMNS / 4) * 4;
			const int64_t i = i0 + column;
			float4		f = {0, 0, 0, 0};

			if (t < n && i < w.n_in)
			{
				const float *x = row_of(t) + i;

				if (w.n_in - i >= 4)
					f = *(const float4 *) x;
				else
				{
					f.x = x[0];
					f.y = w.n_in - i > 1 ? x[1] : 0;
					f.z = w.n_in - i > 2 ? x[2] : 0;
				}
			}
			xs[((t * LOADS + column / (WARP * SIZE)) * (SIZE / 4) + column % SIZE / 4) * PITCH + column % (WARP * SIZE) / SIZE] = f;
		}
		__syncthreads();
#pragma unroll
		for (int j = 0; j < LOADS; j++)
		{
			float		part[FEW_ROWS][T];

#pragma unroll
			for (int r = 0; r < FEW_ROWS; r++)
#pragma unroll
				for (int t = 0; t < T; t++)
					part[r][t] = HAS_SCALES ? 0 : sum[r][t];
#pragma unroll
			for (int k = 0; k < SIZE / 4; k++)
			{
				float4		x[T];

#pragma unroll
				for (int t = 0; t < T; t++)
					x[t] = xs[((t * LOADS + j) * (SIZE / 4) + k) * PITCH + lane];
#pragma unroll
				for (int r = 0; r < FEW_ROWS; r++)
				{
					float		v[4];

					four_weights<DTYPE>(v, stored[j][r], k, table);
#pragma unroll
					for (int t = 0; t < T; t++)
					{
						part[r][t] = fmaf(v[0], x[t].x, part[r][t]);
						part[r][t] = fmaf(v[1], x[t].y, part[r][t]);
						part[r][t] = fmaf(v[2], x[t].z, part[r][t]);
						part[r][t] = fmaf(v[3], x[t].w, part[r][t]);
					}
				}
			}
#pragma unroll
			for (int r = 0; r < FEW_ROWS; r++)
#pragma unroll
				for (int t = 0; t < T; t++)
					sum[r][t] = HAS_SCALES ? fmaf(part[r][t], scale[j][r], sum[r][t]) : part[r][t];
		}
	}
#pragma unroll
	for (int r = 0; r < FEW_ROWS; r++)
#pragma unroll
		for (int t = 0; t < T; t++)
		{
			const float s = warp_sum(sum[r][t]);
			const int64_t row = o0 + (int) threadIdx.x / WARP * FEW_ROWS + r;

			if (lane == 0 && t < n && row < w.n_out)
				put(t, row, DTYPE == MILLM_INT8 ? s * mul(((const float *) w.scale)[row], INT8_UNIT) : s);
		}
}

/* ---- a tile of a product ---- */

#define TILE 64					/* tokens, and outputs */
#define SLICE 32				/* columns at a time: the largest chunk */
#define TENSOR_THREADS 128

/*
 * TILE tokens, n of them there, x TILE outputs of w from o0 on, on tensor cores: a slice of weights and activations after the other is rounded to bfloat16 in
 * shared memory, sums are float32; each of four warps has 32 x 32 of the outputs.  Of a whole block of TENSOR_THREADS, w has_chunks.  Needs
 * compute capability 8.0.
 *
 *   row_of(t)      where the activations of token t begin
 *   put(t, o, sum) takes the product of token t and output o
 */
template <int DTYPE, class Row, class Put>
static __device__ void
tensor_tile(const MillmCudaWeight &weight, int64_t o0, int n, Row row_of, Put put)
{
#ifdef HAS_TENSOR_CORES
	const int	SIZE = Chunk<DTYPE>::SIZE;
	const int	PITCH = SLICE + 8;	/* of bfloat16: rows 16 bytes apart from a multiple of the banks */
	const int	Y_PITCH = TILE + 4;
	SHARED(bf16, ws, TILE * PITCH);	/* [TILE outputs, SLICE] */
	SHARED(bf16, xs, TILE * PITCH);	/* [TILE tokens, SLICE] */
	SHARED(float, ys, TILE * Y_PITCH);	/* [TILE tokens, TILE outputs] */
	SHARED(float, table, 16);
	const int	row = (int) threadIdx.x / WARP / 2 * 32;	/* of this warp's tokens in the tile */
	const int	column = (int) threadIdx.x / WARP % 2 * 32;	/* and its outputs */
	wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::row_major> x[2];
	wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::col_major> w[2];
	wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2][2];

	share_table<DTYPE>(table, weight);
#pragma unroll
	for (int j = 0; j < 4; j++)
		wmma::fill_fragment(sum[j / 2][j % 2], 0.0f);
	for (int64_t i0 = 0; i0 < weight.n_in; i0 += SLICE)
	{
		for (int c = (int) threadIdx.x; c < TILE * (SLICE / SIZE); c += TENSOR_THREADS)
		{
			const int	o = c / (SLICE / SIZE);
			const int	i = c % (SLICE / SIZE) * SIZE;
			float		v[SIZE];

			if (o0 + o < weight.n_out && i0 + i < weight.n_in)
				load_chunk<DTYPE>(v, weight, table, o0 + o, i0 + i);
			else
				for (int k = 0; k < SIZE; k++)
					v[k] = 0;
#pragma unroll
			for (int k = 0; k < SIZE; k++)
				ws[o * PITCH + i + k] = as_bf16(v[k]);
		}
		for (int c = (int) threadIdx.x; c < TILE * SLICE; c += TENSOR_THREADS)
		{
			const int	t = c / SLICE;
			const int	i = c % SLICE;

			xs[t * PITCH + i] = as_bf16(t < n && i0 + i < weight.n_in ? row_of(t)[i0 + i] : 0);
		}
		__syncthreads();
#pragma unroll
		for (int i = 0; i < SLICE; i += 16)
		{
			for (int j = 0; j < 2; j++)
			{
				wmma::load_matrix_sync(x[j], xs + (row + 16 * j) * PITCH + i, PITCH);
				wmma::load_matrix_sync(w[j], ws + (column + 16 * j) * PITCH + i, PITCH);
			}
			for (int j = 0; j < 4; j++)
				wmma::mma_sync(sum[j / 2][j % 2], x[j / 2], w[j % 2], sum[j / 2][j % 2]);
		}
		__syncthreads();
	}
#pragma unroll
	for (int j = 0; j < 4; j++)
		wmma::store_matrix_sync(ys + (row + j / 2 * 16) * Y_PITCH + column + j % 2 * 16, sum[j / 2][j % 2], Y_PITCH, wmma::mem_row_major);
	__syncthreads();
	for (int c = (int) threadIdx.x; c < TILE * TILE; c += TENSOR_THREADS)
		if (c / TILE < n && o0 + c % TILE < weight.n_out)
			put(c / TILE, o0 + c % TILE, ys[c / TILE * Y_PITCH + c % TILE]);
#endif
}

#endif
