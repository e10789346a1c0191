/*
 * kernels.cu -- the operations of the CUDA backend but attention (attention*.cu), on the device.  kernels.h has their meaning.
 *
 * Arithmetic is float32.  Sums run in an order that the shapes alone decide.  What decides the value of a weight is written with
 * roundings of its own (mul(), add()), so that no compiler fuses it: a quantized weight has the same bits on every backend, but where scales multiply sums
 * (few_tile()).
 */
#include "parts.cuh"

/* ---- matmul ---- */

static __device__ void
finish(const MillmCudaMatmul &m, int t, int64_t o, float sum)
{
	float	   *y = m.y.data + t * m.y.stride + o;

	if (m.bias)
		sum += m.bias[o];
	*y = m.accumulate ? *y + sum : sum;
}

/*
 * The obvious one: a warp for each element of y, one weight at a time.  Of odd shapes too: blocks that straddle rows, rows that begin within a byte.
 *
 *   blocks [n_out, n], threads WARP
 */
static __global__ void
matmul_any(MillmCudaMatmul m)
{
	after_previous();
	const int64_t o = blockIdx.x;
	const int	t = (int) blockIdx.y;
	const float *x = m.x.data + t * m.x.stride;
	float		sum = 0;

	for (int64_t i = threadIdx.x; i < m.w.n_in; i += WARP)
		sum += element(m.w, o, i) * x[i];
	sum = warp_sum(sum);
	if (threadIdx.x == 0)
		finish(m, t, o, sum);
}

/*
 * Few tokens.  Several products of the same rows of x stand side by side: a block is of one of them.
 *
 *   T       the tokens, at most
 *   blocks  [the sum of ceil(n_out / FEW_OUTPUTS)], threads FEW_THREADS
 */
struct FewMatmuls
{
	MillmCudaMatmul m[MILLM_CUDA_MATMULS];
	unsigned	first_block[MILLM_CUDA_MATMULS + 1];	/* of each; those that are not there begin past the last block */
};

template <int DTYPE, int T>
static __global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS(T))
matmul_few(const __grid_constant__ FewMatmuls all)
{
	after_previous();
	const int	which = (blockIdx.x >= all.first_block[1]) + (blockIdx.x >= all.first_block[2]);
	const MillmCudaMatmul &m = all.m[which];

	few_tile<DTYPE, T>(m.w, (int64_t) (blockIdx.x - all.first_block[which]) * FEW_OUTPUTS, m.n, [&] (int t) { return m.x.data + t * m.x.stride; },
					   [&] (int t, int64_t o, float sum) { finish(m, t, o, sum); });
}

/*
 * Many tokens, in float32: tiles of TILE tokens x TILE outputs.  A slice of SLICE columns of weights is decoded into shared memory, beside it that of the
 * activations; a thread keeps 4 x 4 of the outputs.
 *
 *   blocks [ceil(n_out / TILE), ceil(n / TILE)], threads MANY_THREADS
 */
#define MANY_THREADS 256
template <int DTYPE>
static __global__ void
matmul_many(MillmCudaMatmul m)
{
	after_previous();
	const int	SIZE = Chunk<DTYPE>::SIZE;
	const int	PITCH = TILE + 4;	/* rows 16 bytes apart from a multiple of the banks */
	SHARED(float, ws, SLICE * PITCH);	/* [SLICE, TILE] */
	SHARED(float, xs, SLICE * PITCH);
	SHARED(float, table, 16);
	const int64_t o0 = (int64_t) blockIdx.x * TILE;
	const int	t0 = (int) blockIdx.y * TILE;
	const int	column = (int) threadIdx.x % 16 * 4;	/* of this thread's outputs in the tile */
	const int	row = (int) threadIdx.x / 16 * 4;	/* and its tokens */
	float		sum[4][4];

	share_table<DTYPE>(table, m.w);
	for (int j = 0; j < 16; j++)
		sum[j / 4][j % 4] = 0;
	for (int64_t i0 = 0; i0 < m.w.n_in; i0 += SLICE)
	{
		for (int c = (int) threadIdx.x; c < TILE * (SLICE / SIZE); c += MANY_THREADS)
		{
			const int	o = c / (SLICE / SIZE);
			const int	i = c % (SLICE / SIZE) * SIZE;
			float		v[SIZE];

			if (o0 + o < m.w.n_out && i0 + i < m.w.n_in)
				load_chunk<DTYPE>(v, m.w, table, o0 + o, i0 + i);
			else
				for (int k = 0; k < SIZE; k++)
					v[k] = 0;
#pragma unroll
			for (int k = 0; k < SIZE; k++)
				ws[(i + k) * PITCH + o] = v[k];
		}
		for (int c = (int) threadIdx.x; c < TILE * SLICE; c += MANY_THREADS)
		{
			const int	t = c / SLICE;
			const int	i = c % SLICE;

			xs[i * PITCH + t] = t0 + t < m.n && i0 + i < m.w.n_in ? m.x.data[(t0 + t) * m.x.stride + i0 + i] : 0;
		}
		__syncthreads();
		for (int i = 0; i < SLICE; i++)
		{
			const float4 w = *(const float4 *) &ws[i * PITCH + column];
			const float4 x = *(const float4 *) &xs[i * PITCH + row];
			const float wv[4] = {w.x, w.y, w.z, w.w};
			const float xv[4] = {x.x, x.y, x.z, x.w};

#pragma unroll
			for (int j = 0; j < 16; j++)
				sum[j / 4][j % 4] = fmaf(xv[j / 4], wv[j % 4], sum[j / 4][j % 4]);
		}
		__syncthreads();
	}
#pragma unroll
	for (int j = 0; j < 16; j++)
		if (t0 + row + j / 4 < m.n && o0 + column + j % 4 < m.w.n_out)
			finish(m, t0 + row + j / 4, o0 + column + j % 4, sum[j / 4][j % 4]);
}

/*
 * Many tokens on tensor cores, a tile a block.
 *
 *   blocks [ceil(n_out / TILE), ceil(n / TILE)], threads TENSOR_THREADS
 */
template <int DTYPE>
static __global__ void
matmul_tensor(MillmCudaMatmul m)
{
	after_previous();
	const int	t0 = (int) blockIdx.y * TILE;

	tensor_tile<DTYPE>(m.w, (int64_t) blockIdx.x * TILE, m.n - t0, [&] (int t) { return m.x.data + (t0 + t) * m.x.stride; },
					   [&] (int t, int64_t o, float sum) { finish(m, t0 + t, o, sum); });
}

cudaError_t
millm_cuda_matmul_any(const MillmCudaMatmul *m, MillmCudaQueue *queue)
{
	return launch(matmul_any, dim3((unsigned) m->w.n_out, (unsigned) m->n), WARP, queue, *m);
}

template <int DTYPE>
static cudaError_t
launch_few(const MillmCudaMatmul *m, int n_matmuls, MillmCudaQueue *queue)
{
	FewMatmuls	all = {};
	unsigned	n_blocks = 0;

	for (int i = 0; i < MILLM_CUDA_MATMULS; i++)
	{
		all.first_block[i] = n_blocks;
		if (i < n_matmuls)
		{
			all.m[i] = m[i];
			n_blocks += (unsigned) ((m[i].w.n_out + FEW_OUTPUTS - 1) / FEW_OUTPUTS);
		}
	}
	all.first_block[MILLM_CUDA_MATMULS] = n_blocks;
	return launch(m->n == 1 ? matmul_few<DTYPE, 1> : m->n == 2 ? matmul_few<DTYPE, 2> : m->n <= 4 ? matmul_few<DTYPE, 4> :
				  matmul_few<DTYPE, MILLM_CUDA_FEW_ROWS>, dim3(n_blocks), FEW_THREADS, queue, all);
}

template <int DTYPE>
static cudaError_t
launch_many(const MillmCudaMatmul *m, MillmCudaQueue *queue)
{
	const dim3	blocks((unsigned) ((m->w.n_out + TILE - 1) / TILE), (unsigned) ((m->n + TILE - 1) / TILE));

	return launch(matmul_many<DTYPE>, blocks, MANY_THREADS, queue, *m);
}

template <int DTYPE>
static cudaError_t
launch_tensor(const MillmCudaMatmul *m, MillmCudaQueue *queue)
{
	const dim3	blocks((unsigned) ((m->w.n_out + TILE - 1) / TILE), (unsigned) ((m->n + TILE - 1) / TILE));

	return launch(matmul_tensor<DTYPE>, blocks, TENSOR_THREADS, queue, *m);
}

typedef cudaError_t (*MatmulLauncher) (const MillmCudaMatmul *m, MillmCudaQueue *queue);

cudaError_t
millm_cuda_matmul_few(const MillmCudaMatmul *m, int n_matmuls, MillmCudaQueue *queue)
{
	static cudaError_t (*const of_dtype[MILLM_N_WEIGHT_DTYPES]) (const MillmCudaMatmul *m, int n_matmuls, MillmCudaQueue *queue) = {
		launch_few<MILLM_F32>, launch_few<MILLM_F16>, launch_few<MILLM_BF16>, launch_few<MILLM_4BIT>, launch_few<MILLM_INT8>, launch_few<MILLM_MXFP4>};

	return of_dtype[m->w.dtype] (m, n_matmuls, queue);
}

cudaError_t
millm_cuda_matmul_many(const MillmCudaMatmul *m, MillmCudaQueue *queue)
{
	static const MatmulLauncher of_dtype[MILLM_N_WEIGHT_DTYPES] = {
		launch_many<MILLM_F32>, launch_many<MILLM_F16>, launch_many<MILLM_BF16>, launch_many<MILLM_4BIT>, launch_many<MILLM_INT8>, launch_many<MILLM_MXFP4>};

	return of_dtype[m->w.dtype] (m, queue);
}

cudaError_t
millm_cuda_matmul_tensor(const MillmCudaMatmul *m, MillmCudaQueue *queue)
{
	static const MatmulLauncher of_dtype[MILLM_N_WEIGHT_DTYPES] = {
		launch_many<MILLM_F32>,	/* who stores 32 bits wants them */
		launch_tensor<MILLM_F16>, launch_tensor<MILLM_BF16>, launch_tensor<MILLM_4BIT>, launch_tensor<MILLM_INT8>, launch_tensor<MILLM_MXFP4>};

	return of_dtype[m->w.dtype] (m, queue);
}

/* ---- rows ---- */

/* A thread for each chunk, which it leaves in stores of 16 bytes.  blocks [ceil(chunks of a row / BLOCK), rows], threads BLOCK */
template <int DTYPE>
static __global__ void
decode(uint16_t *to, int64_t pitch, MillmCudaWeight w, int64_t o0)
{
	after_previous();
	const int	SIZE = Chunk<DTYPE>::SIZE;
	SHARED(float, table, 16);
	const int64_t i = element_index() * SIZE;
	float		v[SIZE];

	share_table<DTYPE>(table, w);
	if (i >= w.n_in)
		return;
	load_chunk<DTYPE>(v, w, table, o0 + blockIdx.y, i);
#pragma unroll
	for (int k = 0; k < SIZE; k += 8)
	{
		uint4		u;

		u.x = to_bf16(v[k]) | (uint32_t) to_bf16(v[k + 1]) << 16;
		u.y = to_bf16(v[k + 2]) | (uint32_t) to_bf16(v[k + 3]) << 16;
		u.z = to_bf16(v[k + 4]) | (uint32_t) to_bf16(v[k + 5]) << 16;
		u.w = to_bf16(v[k + 6]) | (uint32_t) to_bf16(v[k + 7]) << 16;
		*(uint4 *) (to + blockIdx.y * pitch + i + k) = u;
	}
}

template <int DTYPE>
static cudaError_t
launch_decode(void *to, int64_t pitch, const MillmCudaWeight *w, int64_t o0, int64_t n_rows, MillmCudaQueue *queue)
{
	const int	SIZE = Chunk<DTYPE>::SIZE;

	return launch_elements(decode<DTYPE>, (w->n_in + SIZE - 1) / SIZE, (int) n_rows, queue, (uint16_t *) to, pitch, *w, o0);
}

cudaError_t
millm_cuda_decode(void *to, int64_t pitch, const MillmCudaWeight *w, int64_t o0, int64_t n_rows, MillmCudaQueue *queue)
{
	return w->dtype == MILLM_F16 ? launch_decode<MILLM_F16>(to, pitch, w, o0, n_rows, queue) :
		w->dtype == MILLM_BF16 ? launch_decode<MILLM_BF16>(to, pitch, w, o0, n_rows, queue) :
		w->dtype == MILLM_4BIT ? launch_decode<MILLM_4BIT>(to, pitch, w, o0, n_rows, queue) :
		w->dtype == MILLM_INT8 ? launch_decode<MILLM_INT8>(to, pitch, w, o0, n_rows, queue) :
		w->dtype == MILLM_MXFP4 ? launch_decode<MILLM_MXFP4>(to, pitch, w, o0, n_rows, queue) : cudaErrorInvalidValue;
}

static __global__ void
round_rows(uint16_t *to, int64_t pitch, MillmRows x, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		to[blockIdx.y * pitch + i] = to_bf16(x.data[blockIdx.y * x.stride + i]);
}

cudaError_t
millm_cuda_round_rows(void *to, int64_t pitch, MillmRows x, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(round_rows, n_columns, n, queue, (uint16_t *) to, pitch, x, n_columns);
}

static __global__ void
from_rows(MillmRows y, MillmCudaFragments f, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		y.data[blockIdx.y * y.stride + i] = bf16_bits(*place_in(f, (int) blockIdx.y, i));
}

cudaError_t
millm_cuda_from_rows(MillmRows y, const MillmCudaFragments *f, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(from_rows, n_columns, n, queue, y, *f, n_columns);
}

static __global__ void
embed(MillmRows y, MillmCudaWeight table, const int32_t *rows, bool add)
{
	after_previous();
	const int64_t i = element_index();
	float	   *to = y.data + blockIdx.y * y.stride + i;

	if (i < table.n_in)
		*to = (add ? *to : 0) + element(table, rows[blockIdx.y], i);
}

cudaError_t
millm_cuda_embed(MillmRows y, const MillmCudaWeight *table, const int32_t *rows, bool add, int n, MillmCudaQueue *queue)
{
	return launch_elements(embed, table->n_in, n, queue, y, *table, rows, add);
}

/* *first = the smaller of it and place, if v is NaN or infinite */
static __device__ void
check_value(int *first, int place, float v)
{
	if (!(fabsf(v) <= 3.402823466e38f))
		atomicMin(first, place);
}

/* A block for each part of a row.  blocks [n_parts, n], threads a multiple of WARP, at most BLOCK */
static __global__ void
norm(MillmCudaNorm l)
{
	after_previous();
	SHARED(float, partial, BLOCK / WARP);
	const int64_t part = blockIdx.x;
	const float *x = l.x.data + blockIdx.y * l.x.stride + part * l.n_columns;
	float	   *y = l.y.data + blockIdx.y * l.y.stride + part * l.n_columns;
	const float *weight = l.weight ? l.weight + part * l.weight_stride : NULL;
	const float *bias = l.bias ? l.bias + part * l.bias_stride : NULL;
	float		mean = 0,
				sum = 0,
				r;

	if (l.kind == MILLM_NORM_LAYER)
	{
		for (int64_t i = threadIdx.x; i < l.n_columns; i += blockDim.x)
			sum += x[i];
		mean = block_sum(sum, partial) / (float) l.n_columns;
		sum = 0;
	}
	for (int64_t i = threadIdx.x; i < l.n_columns; i += blockDim.x)
	{
		sum += (x[i] - mean) * (x[i] - mean);
		if (l.bad_place)
			check_value(l.bad_place, (int) l.place, x[i]);
	}
	r = 1 / sqrtf(block_sum(sum, partial) / (float) l.n_columns + l.eps);
	for (int64_t i = threadIdx.x; i < l.n_columns; i += blockDim.x)	/* y may be x: each thread reads what it writes */
	{
		float		v = (x[i] - mean) * r;

		if (weight)
			v *= weight[i];
		if (bias)
			v += bias[i];
		if (!l.fragments.alone)
			y[i] = v;
		if (l.fragments.data)
			keep(l.fragments, (int) blockIdx.y, i, v);
	}
}

cudaError_t
millm_cuda_norm_any(const MillmCudaNorm *l, int n, MillmCudaQueue *queue)
{
	return launch(norm, dim3((unsigned) l->n_parts, (unsigned) n), l->n_columns > 4 * WARP ? BLOCK : WARP, queue, *l);
}

/*
 * The same of a multiple of four columns, for where one row is all there is and its loads are waited for one after the other: here what a thread has of the row is loaded at
 * once, and of the weights before the kernel in front has ended.
 *
 *   threads  at least n_columns / NORM_VALUES, a multiple of WARP
 */
#define NORM_VALUES 16			/* of a thread */
#define NORM_THREADS 512		/* at most */
static __global__ void __launch_bounds__(NORM_THREADS)
norm_at_once(const __grid_constant__ MillmCudaNorm l)
{
	const int	FOURS = NORM_VALUES / 4;
	SHARED(float, partial, NORM_THREADS / WARP);
	const int64_t part = blockIdx.x;
	const float *x = l.x.data + blockIdx.y * l.x.stride + part * l.n_columns;
	float	   *y = l.y.data + blockIdx.y * l.y.stride + part * l.n_columns;
	const int	n_columns = (int) l.n_columns;
	float4		four[FOURS],
				weight[FOURS],
				bias[FOURS];
	float		v[NORM_VALUES];
	float		mean = 0,
				sum = 0,
				r;

#pragma unroll
	for (int k = 0; k < FOURS; k++)
	{
		const int	i = (k * (int) blockDim.x + (int) threadIdx.x) * 4;

		weight[k] = {1, 1, 1, 1};
		bias[k] = {0, 0, 0, 0};
		if (l.weight && i < n_columns)
			weight[k] = *(const float4 *) (l.weight + part * l.weight_stride + i);
		if (l.bias && i < n_columns)
			bias[k] = *(const float4 *) (l.bias + part * l.bias_stride + i);
	}
	after_previous();			/* only what no kernel writes was read before */
#pragma unroll
	for (int k = 0; k < FOURS; k++)
	{
		const int	i = (k * (int) blockDim.x + (int) threadIdx.x) * 4;

		four[k] = {0, 0, 0, 0};
		if (i < n_columns)
			four[k] = *(const float4 *) (x + i);
		v[4 * k] = four[k].x;
		v[4 * k + 1] = four[k].y;
		v[4 * k + 2] = four[k].z;
		v[4 * k + 3] = four[k].w;
	}
	if (l.kind == MILLM_NORM_LAYER)
	{
#pragma unroll
		for (int k = 0; k < NORM_VALUES; k++)
			sum += v[k];
		mean = block_sum(sum, partial) / (float) n_columns;
		sum = 0;
	}
#pragma unroll
	for (int k = 0; k < NORM_VALUES; k++)
		if ((k / 4 * (int) blockDim.x + (int) threadIdx.x) * 4 < n_columns)
			sum += (v[k] - mean) * (v[k] - mean);
#pragma unroll
	for (int k = 0; k < NORM_VALUES && l.bad_place; k++)
		check_value(l.bad_place, (int) l.place, v[k]);
	r = 1 / sqrtf(block_sum(sum, partial) / (float) n_columns + l.eps);
#pragma unroll
	for (int k = 0; k < FOURS; k++)	/* y may be x: each thread has read what it writes */
	{
		const int	i = (k * (int) blockDim.x + (int) threadIdx.x) * 4;
		const float of_weight[4] = {weight[k].x, weight[k].y, weight[k].z, weight[k].w};
		const float of_bias[4] = {bias[k].x, bias[k].y, bias[k].z, bias[k].w};
		float	   *of_k = v + 4 * k;

#pragma unroll
		for (int j = 0; j < 4; j++)
			of_k[j] = (of_k[j] - mean) * r * of_weight[j] + of_bias[j];
		if (i >= n_columns)
			continue;
		if (!l.fragments.alone)
			*(float4 *) (y + i) = {of_k[0], of_k[1], of_k[2], of_k[3]};
		if (l.fragments.data)
			keep_four(l.fragments, (int) blockIdx.y, i, of_k);
	}
}

cudaError_t
millm_cuda_norm(const MillmCudaNorm *l, int n, MillmCudaQueue *queue)
{
	const int64_t n_threads = ((l->n_columns + NORM_VALUES - 1) / NORM_VALUES + WARP - 1) / WARP * WARP;

	if (n_threads > NORM_THREADS || l->n_columns % 4 != 0 || (uintptr_t) l->weight % 16 != 0 || (uintptr_t) l->bias % 16 != 0)
		return millm_cuda_norm_any(l, n, queue);
	return launch(norm_at_once, dim3((unsigned) l->n_parts, (unsigned) n), (int) n_threads, queue, *l);
}

static __global__ void
activate(MillmRows y, MillmCudaFragments f_y, MillmAct act, MillmRows x, MillmRows up, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();
	const float *in = x.data + blockIdx.y * x.stride;
	float		v,
				f;

	if (i >= n_columns)
		return;
	if (up.data && act != MILLM_ACT_SWIGLU_PAIRS)
		f = up.data[blockIdx.y * up.stride + i];
	else
		f = 1;
	v = in[i];
	switch (act)
	{
		case MILLM_ACT_SILU:
			f *= v / (1 + expf(-v));
			break;
		case MILLM_ACT_GELU_TANH:
			f *= 0.5f * v * (1 + tanhf(0.7978845608f * (v + 0.044715f * v * v * v)));
			break;
		case MILLM_ACT_GELU_ERF:
			f *= 0.5f * v * (1 + erff(v * 0.7071067812f));
			break;
		default:				/* MILLM_ACT_RELU */
			f *= v < 0 ? 0 : v;
			break;
	}
	if (!f_y.alone)
		y.data[blockIdx.y * y.stride + i] = f;
	if (f_y.data)
		keep(f_y, (int) blockIdx.y, i, f);
}

/* y may be x, so that a row is one block's and read before it is written, piece by piece: y[i] lies before x[2 i].  blocks [1, n], threads BLOCK */
static __global__ void
activate_pairs(MillmRows y, MillmCudaFragments f_y, MillmRows x, int64_t n_columns)
{
	after_previous();
	const float alpha = 1.702f,
				limit = 7;

	for (int64_t i0 = 0; i0 < n_columns; i0 += BLOCK)
	{
		const int64_t i = i0 + threadIdx.x;
		const float *pair = x.data + blockIdx.y * x.stride + 2 * i;
		float		gate = 0,
					up = 0;

		if (i < n_columns)
		{
			gate = pair[0] > limit ? limit : pair[0];
			up = pair[1] > limit ? limit : pair[1] < -limit ? -limit : pair[1];
		}
		__syncthreads();
		if (i < n_columns)
		{
			const float f = (up + 1) * gate / (1 + expf(-alpha * gate));

			if (!f_y.alone)
				y.data[blockIdx.y * y.stride + i] = f;
			if (f_y.data)
				keep(f_y, (int) blockIdx.y, i, f);
		}
		__syncthreads();
	}
}

cudaError_t
millm_cuda_activation(MillmRows y, const MillmCudaFragments *f, MillmAct act, MillmRows x, MillmRows up, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	if (act == MILLM_ACT_SWIGLU_PAIRS)
		return launch(activate_pairs, dim3(1, (unsigned) n), BLOCK, queue, y, *f, x, n_columns);
	return launch_elements(activate, n_columns, n, queue, y, *f, act, x, up, n_columns);
}

static __global__ void
scale_rows(MillmRows x, float by, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		x.data[blockIdx.y * x.stride + i] *= by;
}

cudaError_t
millm_cuda_scale(MillmRows x, float by, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(scale_rows, n_columns, n, queue, x, by, n_columns);
}

static __global__ void
cap_rows(MillmRows x, float cap, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		x.data[blockIdx.y * x.stride + i] = cap * tanhf(x.data[blockIdx.y * x.stride + i] / cap);
}

cudaError_t
millm_cuda_softcap(MillmRows x, float cap, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(cap_rows, n_columns, n, queue, x, cap, n_columns);
}

static __global__ void
add_rows(MillmRows y, MillmRows x, const int32_t *rows, const float *weights, float scale, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();
	const int64_t row = rows ? rows[blockIdx.y] : blockIdx.y;

	if (i < n_columns)
		y.data[row * y.stride + i] += scale * (weights ? weights[blockIdx.y] : 1) * x.data[blockIdx.y * x.stride + i];
}

cudaError_t
millm_cuda_add_rows(MillmRows y, MillmRows x, const int32_t *rows, const float *weights, float scale, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(add_rows, n_columns, n, queue, y, x, rows, weights, scale, n_columns);
}

static __global__ void
select_rows(MillmRows y, MillmRows x, const int32_t *rows, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		y.data[blockIdx.y * y.stride + i] = x.data[rows[blockIdx.y] * x.stride + i];
}

cudaError_t
millm_cuda_select(MillmRows y, MillmRows x, const int32_t *rows, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(select_rows, n_columns, n, queue, y, x, rows, n_columns);
}

static __global__ void
find_not_finite(int *first, MillmRows x, int place, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		check_value(first, place, x.data[blockIdx.y * x.stride + i]);
}

cudaError_t
millm_cuda_find_not_finite(int *first, MillmRows x, int place, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(find_not_finite, n_columns, n, queue, first, x, place, n_columns);
}

/* ---- the logits that a choice needs ---- */

static __global__ void
take(float *values, MillmRows y, const int32_t *rows, const int32_t *ids, int n)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n)
	{
		float	   *from = y.data + rows[i] * y.stride + ids[i];

		values[i] = *from;
		*from = -INFINITY;
	}
}

cudaError_t
millm_cuda_take(float *values, MillmRows y, const int32_t *rows, const int32_t *ids, int n, MillmCudaQueue *queue)
{
	return launch_elements(take, n, 1, queue, values, y, rows, ids, n);
}

/* The four logits of group g that are this lane's; -infinity past the end of the row, where rows have room up to a multiple of four */
static __device__ float4
load_logits(const float *row, int64_t g, int64_t n_columns)
{
	const int64_t i = g * MILLM_CUDA_GROUP + threadIdx.x % WARP * 4;
	float4		f = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};

	if (i < n_columns)
		f = *(const float4 *) (row + i);
	f.y = i + 1 < n_columns ? f.y : -INFINITY;
	f.z = i + 2 < n_columns ? f.z : -INFINITY;
	f.w = i + 3 < n_columns ? f.w : -INFINITY;
	return f;
}

/* A warp for each group.  blocks [ceil(groups / (BLOCK / WARP)), n], threads BLOCK */
static __global__ void
group_maxima(float *maxima, MillmRows y, int64_t n_columns)
{
	after_previous();
	const int64_t n_groups = (n_columns + MILLM_CUDA_GROUP - 1) / MILLM_CUDA_GROUP;
	const int64_t g = (int64_t) blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
	float4		f;
	float		max;

	if (g >= n_groups)
		return;
	f = load_logits(y.data + blockIdx.y * y.stride, g, n_columns);
	max = fmaxf(fmaxf(f.x, f.y), fmaxf(f.z, f.w));
	for (int step = WARP / 2; step > 0; step /= 2)
		max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, step));
	if (threadIdx.x % WARP == 0)
		maxima[blockIdx.y * n_groups + g] = max;
}

/* Unsigned numbers in the order of floats, and back */
static __device__ uint32_t
ordered(float f)
{
	const uint32_t u = as_bits(f);

	return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static __device__ float
unordered(uint32_t u)
{
	return as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/*
 * The k-th largest maximum, of more than one found bit by bit from the highest: the largest number that k of them reach; then what reaches it, of the groups that do.
 *
 *   blocks [n], threads BLOCK
 */
static __global__ void
pick(MillmCudaPicks *picks, const float *maxima, MillmRows y, const MillmCudaTop *tops, int64_t n_columns)
{
	after_previous();
	SHARED(uint32_t, keys, MILLM_CUDA_MAX_GROUPS);
	SHARED(float, partial, BLOCK / WARP);
	SHARED(int, n_picked, 1);
	const int	n_groups = (int) ((n_columns + MILLM_CUDA_GROUP - 1) / MILLM_CUDA_GROUP);
	const float *row = y.data + blockIdx.x * y.stride;
	const MillmCudaTop top = tops[blockIdx.x];
	MillmCudaPicks *to = &picks[blockIdx.x];
	float		largest = -INFINITY,
				threshold;
	uint32_t	kth = 0;

	for (int g = (int) threadIdx.x; g < n_groups; g += BLOCK)
	{
		const float max = maxima[(int64_t) blockIdx.x * n_groups + g];

		keys[g] = ordered(max);
		largest = fmaxf(largest, max);
	}
	if (threadIdx.x == 0)
		*n_picked = 0;
	largest = block_max(largest, partial);	/* and everyone's keys are there */
	for (int bit = 31; bit >= 0 && top.k > 1; bit--)
	{
		float		n_kth = 0;	/* that reach it: far below 2^24, exact */

		for (int g = (int) threadIdx.x; g < n_groups; g += BLOCK)
			n_kth += keys[g] >= (kth | 1u << bit);
		if (block_sum(n_kth, partial) >= (float) top.k)
			kth |= 1u << bit;
	}
	threshold = top.k > 1 ? fmaxf(unordered(kth), largest - top.margin) : largest;
	for (int g = (int) threadIdx.x / WARP; g < n_groups && top.k > 0; g += BLOCK / WARP)
		if (!(unordered(keys[g]) < threshold))
		{
			const float4 f = load_logits(row, g, n_columns);
			const float of_lane[4] = {f.x, f.y, f.z, f.w};

#pragma unroll
			for (int j = 0; j < 4; j++)
			{
				const int64_t i = (int64_t) g * MILLM_CUDA_GROUP + threadIdx.x % WARP * 4 + j;

				if (i < n_columns && !(of_lane[j] < threshold))
				{
					const int	place = atomicAdd(n_picked, 1);

					if (place < MILLM_CUDA_PICKS)
					{
						to->ids[place] = (int32_t) i;
						to->values[place] = of_lane[j];
					}
				}
			}
		}
	__syncthreads();
	if (threadIdx.x == 0)
		to->n = *n_picked;
}

cudaError_t
millm_cuda_pick(MillmCudaPicks *picks, float *maxima, MillmRows y, const MillmCudaTop *tops, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	const int64_t n_groups = (n_columns + MILLM_CUDA_GROUP - 1) / MILLM_CUDA_GROUP;
	const dim3	blocks((unsigned) ((n_groups + BLOCK / WARP - 1) / (BLOCK / WARP)), (unsigned) n);
	const cudaError_t status = launch(group_maxima, blocks, BLOCK, queue, maxima, y, n_columns);

	return status == cudaSuccess ? launch(pick, dim3((unsigned) n), BLOCK, queue, picks, maxima, y, tops, n_columns) : status;
}

/* ---- launches ---- */

/* All kernels are compiled for the same devices: one tells it of all. */
cudaError_t
millm_cuda_compiled_for(int *capability)
{
	cudaFuncAttributes of_kernel;
	const cudaError_t status = cudaFuncGetAttributes(&of_kernel, (const void *) scale_rows);

	*capability = status == cudaSuccess ? of_kernel.ptxVersion : 0;
	return status;
}

/* ---- loading ---- */

#define SQUARE 32				/* elements of a side, of what a block transposes */

template <class T>
static __global__ void
transpose(char *to, int64_t pitch, const T *from, int64_t n_in, int64_t n_out)
{
	SHARED(T, square, SQUARE * (SQUARE + 1));	/* a column more, so that a column lies in different banks */
	const int64_t in0 = (int64_t) blockIdx.x * SQUARE,
				out0 = (int64_t) blockIdx.y * SQUARE;
	const int	lane = (int) threadIdx.x % SQUARE;

	for (int i = (int) threadIdx.x / SQUARE; i < SQUARE; i += BLOCK / SQUARE)
		if (in0 + i < n_in && out0 + lane < n_out)
			square[i * (SQUARE + 1) + lane] = from[(in0 + i) * n_out + out0 + lane];
	__syncthreads();
	for (int o = (int) threadIdx.x / SQUARE; o < SQUARE; o += BLOCK / SQUARE)
		if (out0 + o < n_out && in0 + lane < n_in)
			((T *) (to + (out0 + o) * pitch))[in0 + lane] = square[lane * (SQUARE + 1) + o];
}

cudaError_t
millm_cuda_transpose(char *to, int64_t pitch, const char *from, int64_t n_in, int64_t n_out, int element, cudaStream_t stream)
{
	const dim3	blocks((unsigned) ((n_in + SQUARE - 1) / SQUARE), (unsigned) ((n_out + SQUARE - 1) / SQUARE));

	return element == 4 ? start_kernel(transpose<uint32_t>, blocks, BLOCK, 0, false, stream, to, pitch, (const uint32_t *) from, n_in, n_out) :
		element == 2 ? start_kernel(transpose<uint16_t>, blocks, BLOCK, 0, false, stream, to, pitch, (const uint16_t *) from, n_in, n_out) :
		start_kernel(transpose<uint8_t>, blocks, BLOCK, 0, false, stream, to, pitch, (const uint8_t *) from, n_in, n_out);
}

/* ---- faults, for tests ---- */

#ifdef MILLM_FAULTS
static __global__ void
violate(int *nowhere)
{
#ifdef MILLM_CUDA_EMULATED
	(void) nowhere;
	millm_emulated.calls_left = 0;
#else
	*(volatile int *) nowhere = 1;
#endif
}

cudaError_t
millm_cuda_violate(cudaStream_t stream)
{
	return start_kernel(violate, dim3(1), WARP, 0, false, stream, (int *) 16);
}
#endif
