/*
 * attention.cu -- what brings keys and values to their pages, and the obvious attention over them: of any head size and dtype.  kernels.h has the meaning.
 *
 * Of the same values, but for the order of sums, are those of attention_rows.cu and attention_tile.cu (where queries and weights are float16, too).
 */
#include "attention.cuh"

/* Element i of the row: for each KV head the queries of its group, k, v. */
static __global__ void
split_qkv(MillmCudaAttention a, MillmRows q, MillmRows k, MillmRows v, MillmRows qkv)
{
	after_previous();
	const int64_t i = element_index();
	const int64_t group = (int64_t) (a.n_heads / a.n_kv_heads) * a.head_dim;
	const int64_t width = group + 2 * a.head_dim;
	const int64_t h = i / width;
	const int64_t j = i % width;
	const float f = h < a.n_kv_heads ? qkv.data[blockIdx.y * qkv.stride + i] : 0;

	if (h >= a.n_kv_heads)
		return;
	if (j < group)
		q.data[blockIdx.y * q.stride + h * group + j] = f;
	else if (j < group + a.head_dim)
		k.data[blockIdx.y * k.stride + h * a.head_dim + j - group] = f;
	else
		v.data[blockIdx.y * v.stride + h * a.head_dim + j - group - a.head_dim] = f;
}

cudaError_t
millm_cuda_split_qkv(const MillmCudaAttention *a, MillmRows q, MillmRows k, MillmRows v, MillmRows qkv, int n, MillmCudaQueue *queue)
{
	return launch_elements(split_qkv, (int64_t) (a->n_heads + 2 * a->n_kv_heads) * a->head_dim, n, queue, *a, q, k, v, qkv);
}

static __device__ int32_t
page_at(const MillmCudaAttention &a, int t, int64_t position)
{
	return a.tables[a.table_of[t * a.n_groups] + position / MILLM_CUDA_PAGE];
}

static __device__ float element(const Slot<uint16_t> &s, int d) { return from_f16(s.codes[d]); }
static __device__ float element(const Slot<float> &s, int d) { return s.codes[d]; }
static __device__ float element(const Slot<int8_t> &s, int d) { return (float) s.codes[d] * from_f16(s.scales[d / MILLM_KV_BLOCK]); }

/* Store dim d, where it is one: all lanes of a warp come here, those of half a warp with a block's dims in their order. */
static __device__ void
put(const Slot<uint16_t> &s, bool is_one, int d, float f)
{
	if (is_one)
		s.codes[d] = to_f16(f);
}

static __device__ void
put(const Slot<float> &s, bool is_one, int d, float f)
{
	if (is_one)
		s.codes[d] = f;
}

static __device__ void
put(const Slot<int8_t> &s, bool is_one, int d, float f)
{
	float		largest = is_one ? fabsf(f) : 0;
	uint16_t	rounded;
	float		scale;

#pragma unroll
	for (int step = MILLM_KV_BLOCK / 2; step > 0; step /= 2)
	{
		const float other = __shfl_xor_sync(ALL_LANES, largest, step);

		largest = largest >= other || largest != largest ? largest : other;	/* a NaN stays: attention must not hide it */
	}
	rounded = to_f16(largest / 127);
	scale = from_f16(rounded);
	if (is_one)
		s.codes[d] = (int8_t) (scale > 0 && scale < INFINITY ? fminf(fmaxf(rintf(f * (1 / scale)), -128), 127) : 0);
	if (is_one && d % MILLM_KV_BLOCK == 0)
		s.scales[d / MILLM_KV_BLOCK] = rounded;
}

/* So many threads, and as many more as make halves of warps of them, which are blocks */
#define WHOLE_BLOCKS(n) (MILLM_KV_BLOCKS(n) * MILLM_KV_BLOCK)

/* Of which of a head's pairs dim d is, d < 2 n_pairs; and the dim that it is paired with */
static __device__ int
pair_of(const MillmCudaAttention &a, int d)
{
	return a.interleaved ? d / 2 : d % a.n_pairs;
}

static __device__ int
partner_of(const MillmCudaAttention &a, int d)
{
	return a.interleaved ? d ^ 1 : d < a.n_pairs ? d + a.n_pairs : d - a.n_pairs;
}

/*
 * A thread for each pair of a row of q, then for each element of k and v, so that a row is done in the time of one: where its result goes and the angle are there before
 * the kernel in front has ended.
 *
 *   T       of the pages
 *   blocks  [ceil((WHOLE_BLOCKS(n_heads n_pairs) + n_kv_heads WHOLE_BLOCKS(head_dim)) / BLOCK), n], threads BLOCK
 */
template <class T>
static __global__ void
rope_and_store(const __grid_constant__ MillmCudaAttention a, MillmRows q, MillmRows k, MillmRows v)
{
	const int	t = (int) blockIdx.y;
	const int	i = (int) element_index();
	const int	of_key = i - WHOLE_BLOCKS(a.n_heads * a.n_pairs);	/* the element, counting heads as whole blocks */
	const int	d = of_key >= 0 ? of_key % WHOLE_BLOCKS(a.head_dim) : 0;
	const int	kv_head = of_key / WHOLE_BLOCKS(a.head_dim);
	const bool	is_query = i < a.n_heads * a.n_pairs;
	const bool	is_key = of_key >= 0 && kv_head < a.n_kv_heads && d < a.head_dim;
	const bool	is_rotated = is_query || (is_key && d < 2 * a.n_pairs);
	const int	j = is_query ? i % a.n_pairs : is_rotated ? pair_of(a, d) : 0;
	const float cosine = is_rotated ? a.cosine[(int64_t) t * a.n_pairs + j] : 1;
	const float sine = is_rotated ? a.sine[(int64_t) t * a.n_pairs + j] : 0;
	const int64_t position = a.positions[t];
	const int32_t page = page_at(a, t, position);
	const Slot<T> key(a, page, is_key ? kv_head : 0, (int) (position % MILLM_CUDA_PAGE), false);
	const Slot<T> value(a, page, is_key ? kv_head : 0, (int) (position % MILLM_CUDA_PAGE), true);
	float		of_k = 0,
				of_v = 0;

	after_previous();			/* positions, tables and angles are older than all kernels of the step */
	if (is_query)
	{
		float	   *head = q.data + t * q.stride + (int64_t) (i / a.n_pairs) * a.head_dim;
		const int	first = a.interleaved ? 2 * j : j;
		const int	second = partner_of(a, first);
		const float x = head[first];
		const float y = head[second];

		head[first] = x * cosine - y * sine;
		head[second] = y * cosine + x * sine;
	}
	else if (is_key)
	{
		const float *row = k.data + t * k.stride + kv_head * a.head_dim;

		of_k = row[d];
		of_v = v.data[t * v.stride + kv_head * a.head_dim + d];
		if (is_rotated)
		{
			const float other = row[partner_of(a, d)];

			of_k = partner_of(a, d) > d ? of_k * cosine - other * sine : of_k * cosine + other * sine;
		}
	}
	put(key, is_key, d, of_k);
	put(value, is_key, d, of_v);
}

cudaError_t
millm_cuda_rope_and_store(const MillmCudaAttention *a, MillmRows q, MillmRows k, MillmRows v, int n, MillmCudaQueue *queue)
{
	return launch_elements(a->kv_dtype == MILLM_F32 ? rope_and_store<float> : a->kv_dtype == MILLM_F16 ? rope_and_store<uint16_t> : rope_and_store<int8_t>,
						   WHOLE_BLOCKS(a->n_heads * a->n_pairs) + (int64_t) a->n_kv_heads * WHOLE_BLOCKS(a->head_dim), n, queue, *a, q, k, v);
}

/*
 * A block for each head of each token.  Each of its warps takes every ATTENTION_WARPS-th key, a lane every 32nd dim of it, and keeps a softmax of
 * its own; at the end they are brought to one maximum and added.
 *
 *   T       of the pages
 *   DIMS    of a lane: head_dim <= DIMS * WARP
 *   blocks  [n_heads, n], threads ATTENTION_WARPS * WARP
 */
#define ATTENTION_WARPS 4
template <class T, int DIMS>
static __global__ void
attend(MillmCudaAttention a, MillmRows y, MillmRows q)
{
	after_previous();
	SHARED(float, maxima, ATTENTION_WARPS);
	SHARED(float, sums, ATTENTION_WARPS);
	SHARED(float, values, ATTENTION_WARPS * DIMS * WARP);
	const int	h = (int) blockIdx.x;
	const int	t = (int) blockIdx.y;
	const int	warp = (int) threadIdx.x / WARP;
	const int	lane = (int) threadIdx.x % WARP;
	const int64_t position = a.positions[t];
	const int64_t first = first_seen(a, position);
	const float *query = q.data + t * q.stride + (int64_t) h * a.head_dim;
	const int	kv_head = h / (a.n_heads / a.n_kv_heads);
	const bool	has_sink = a.sinks && warp == 0;
	float		max = has_sink ? a.sinks[h] : -INFINITY;
	float		sum = has_sink ? 1 : 0;
	float		of_query[DIMS],
				value[DIMS];

#pragma unroll
	for (int j = 0; j < DIMS; j++)
	{
		of_query[j] = j * WARP + lane < a.head_dim ? query[j * WARP + lane] : 0;
		value[j] = 0;
	}
	for (int64_t p = first + warp; p <= position; p += ATTENTION_WARPS)
	{
		const int32_t page = page_at(a, t, p);
		const Slot<T> key(a, page, kv_head, (int) (p % MILLM_CUDA_PAGE), false);
		const Slot<T> of_value(a, page, kv_head, (int) (p % MILLM_CUDA_PAGE), true);
		float		score = 0,
					weight;

#pragma unroll
		for (int j = 0; j < DIMS; j++)
			if (j * WARP + lane < a.head_dim)
				score = fmaf(of_query[j], element(key, j * WARP + lane), score);
		score = finished_score(a, warp_sum(score), h, p);
		if (!(score <= max))	/* a NaN is taken along: it must reach the output */
		{
			const float rescale = expf(max - score);

			max = score;
			sum *= rescale;
#pragma unroll
			for (int j = 0; j < DIMS; j++)
				value[j] *= rescale;
		}
		weight = expf(score - max);
		sum += weight;
#pragma unroll
		for (int j = 0; j < DIMS; j++)
			if (j * WARP + lane < a.head_dim)
				value[j] = fmaf(weight, element(of_value, j * WARP + lane), value[j]);
	}
	if (lane == 0)
	{
		maxima[warp] = max;
		sums[warp] = sum;
	}
#pragma unroll
	for (int j = 0; j < DIMS; j++)
		values[(warp * DIMS + j) * WARP + lane] = value[j];
	__syncthreads();
	max = maxima[0];			/* of the first key, or the sink: there is one */
	for (int w = 1; w < ATTENTION_WARPS; w++)
		if (!(maxima[w] <= max))
			max = maxima[w];
	sum = 0;
	for (int w = 0; w < ATTENTION_WARPS; w++)
		sum += sums[w] * expf(maxima[w] - max);
	for (int d = (int) threadIdx.x; d < a.head_dim; d += ATTENTION_WARPS * WARP)
	{
		float		v = 0;

		for (int w = 0; w < ATTENTION_WARPS; w++)
			v += values[w * DIMS * WARP + d] * expf(maxima[w] - max);
		y.data[t * y.stride + (int64_t) h * a.head_dim + d] = v / sum;
	}
}

template <class T>
static cudaError_t
launch_attend(const MillmCudaAttention *a, MillmRows y, MillmRows q, int n, MillmCudaQueue *queue)
{
	const dim3	blocks((unsigned) a->n_heads, (unsigned) n);
	const int	threads = ATTENTION_WARPS * WARP;

	return launch(a->head_dim <= 2 * WARP ? attend<T, 2> : a->head_dim <= 4 * WARP ? attend<T, 4> : a->head_dim <= 8 * WARP ? attend<T, 8> :
				  attend<T, MILLM_MAX_HEAD_DIM / WARP>, blocks, threads, queue, *a, y, q);
}

cudaError_t
millm_cuda_attention_any(const MillmCudaAttention *a, MillmRows y, MillmRows q, int n, MillmCudaQueue *queue)
{
	return a->kv_dtype == MILLM_F32 ? launch_attend<float>(a, y, q, n, queue) : a->kv_dtype == MILLM_F16 ? launch_attend<uint16_t>(a, y, q, n, queue) :
		launch_attend<int8_t>(a, y, q, n, queue);
}
