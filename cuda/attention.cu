/*
 * attention.cu -- attention over paged keys and values, on the device, and what brings them there.  kernels.h has the meaning.
 *
 * Four ways lead to the same values, but for the order of sums: attend (obvious, of any head size), attend_split (16 bytes a lane, many blocks for a row), attend_fragments
 * (the same on tensor cores) and attend_tile (many rows of a sequence, on tensor cores, where queries and weights are float16, too).  A softmax is online: a largest score,
 * the sum of exp(score - largest), and the values so weighted; those of parts of the keys are brought to one largest score and added.
 */
#include "parts.cuh"

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

/* K, or V, of a KV head at a position, in its page of T: float16, float32, or int8 with the scales of its blocks. */
template <class T>
struct Slot
{
	T		   *codes;			/* [head_dim] */
	uint16_t   *scales;			/* [blocks]; of int8 only */

	/* The page's, from slot on */
	__device__ Slot(const MillmCudaAttention &a, int32_t page, int kv_head, int slot, bool of_values)
	{
		char	   *in_page = a.kv + page * a.page_bytes;
		const int	n = a.n_kv_heads * MILLM_CUDA_PAGE;	/* of K in a page; bounded by MILLM_MAX_HEADS and MILLM_MAX_HEAD_DIM: no overflow */
		const int	i = (of_values ? n : 0) + kv_head * MILLM_CUDA_PAGE + slot;

		codes = (T *) in_page + i * a.head_dim;
		scales = (uint16_t *) (in_page + 2 * n * a.head_dim) + i * MILLM_KV_BLOCKS(a.head_dim);
	}
	/* The same of another page than 0 */
	__device__ Slot of_page(const MillmCudaAttention &a, int32_t page) const
	{
		Slot		s = *this;

		s.codes = (T *) ((char *) codes + page * a.page_bytes);
		s.scales = (uint16_t *) ((char *) scales + page * a.page_bytes);
		return s;
	}
	/* That many slots on */
	__device__ void skip(const MillmCudaAttention &a, int n_slots)
	{
		codes += n_slots * a.head_dim;
		scales += n_slots * MILLM_KV_BLOCKS(a.head_dim);
	}
};

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

/* What the product of query head h and the key of position p counts, before the softmax. */
static __device__ float
finished_score(const MillmCudaAttention &a, float product, int h, int64_t p)
{
	float		score = product * a.scale;

	if (a.softcap > 0)
		score = a.softcap * tanhf(score / a.softcap);
	if (a.alibi_slopes)
	{
		const float bias = a.alibi_slopes[h] * (float) p;

		score += a.alibi_rounded_scale != 0 ? bf16_bits(to_bf16(bias)) * a.alibi_rounded_scale : bias;
	}
	return score;
}

/* The first position that the query at this one sees. */
static __device__ int64_t
first_seen(const MillmCudaAttention &a, int64_t position)
{
	return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
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

/* ---- rows one by one ---- */

#define LOG2_E 1.4426950408889634f

/* exp(d): one multiplication and one instruction; d is at most 0 where it counts */
static __device__ float
exp_of(float d)
{
	return exp2_flushed(d * LOG2_E);
}

/* What a part with this largest score is multiplied by where the largest of all is max.  A part that saw no key has -infinity, and nothing to add. */
static __device__ float
share_of(float of_part, float max)
{
	return of_part == -INFINITY ? 0 : exp_of(of_part - max);
}

/* Eight elements side by side, as they are in a page: get(k) scale(), with a constant k. */
template <class T>
struct Eight;

template <>
struct Eight<uint16_t>
{
	uint4		u;

	__device__ void load(const Slot<uint16_t> &s, int d) { u = *(const uint4 *) (s.codes + d); }
	__device__ void clear() { u = {0, 0, 0, 0}; }
	__device__ float scale() const { return 1; }
	__device__ float get(int k) const
	{
		const uint32_t word = k / 2 == 0 ? u.x : k / 2 == 1 ? u.y : k / 2 == 2 ? u.z : u.w;

		return from_f16((uint16_t) (word >> k % 2 * 16));
	}
};

template <>
struct Eight<float>
{
	float4		f[2];

	__device__ void load(const Slot<float> &s, int d) { f[0] = *(const float4 *) (s.codes + d); f[1] = *(const float4 *) (s.codes + d + 4); }
	__device__ void clear() { f[0] = f[1] = {0, 0, 0, 0}; }
	__device__ float scale() const { return 1; }
	__device__ float get(int k) const { return k % 4 == 0 ? f[k / 4].x : k % 4 == 1 ? f[k / 4].y : k % 4 == 2 ? f[k / 4].z : f[k / 4].w; }
};

/* A code c becomes a float by bytes alone: 2^23 + (c + 128) has that byte last. */
template <>
struct Eight<int8_t>
{
	uint2		u;
	uint16_t	of_block;

	__device__ void load(const Slot<int8_t> &s, int d) { u = *(const uint2 *) (s.codes + d); of_block = s.scales[d / MILLM_KV_BLOCK]; }
	__device__ void clear() { u = {0, 0}; of_block = 0; }
	__device__ float scale() const { return from_f16(of_block); }
	__device__ float get(int k) const
	{
		return as_float(byte_perm((k < 4 ? u.x : u.y) ^ 0x80808080u, 0x4B000000u, 0x7440u | (unsigned) (k % 4))) - (8388608.0f + 128);
	}
};

/* The keys [from, end) of a split of a row: by position and window alone. */
struct Split
{
	int64_t		from, end;
};

static __device__ Split
split_of(const MillmCudaAttention &a, int64_t position, int i)
{
	const int64_t first = first_seen(a, position);
	const int64_t span = millm_cuda_split_span(position + 1 - first);
	const int64_t from = (first / span + i) * span;

	return {from < first ? first : from, from + span > position ? position + 1 : from + span};
}

/* Where the softmax of a split of a row's head is: the largest score, the sum, two that nobody reads, then the values. */
static __device__ float *
partial_of(const MillmCudaAttention &a, float *partials, int n_splits, int t, int h, int i)
{
	return partials + (((int64_t) t * a.n_heads + h) * n_splits + i) * (MILLM_CUDA_PARTIAL + a.head_dim);
}

#define SPLIT_WARPS 4

/*
 * What the warps of a block have of H heads of a group, from h0 on, of which `first` is the first: maxima, sums [SPLIT_WARPS, H] and values [SPLIT_WARPS, H, DIMS] become
 * the partial softmax of split i of the block's row.
 */
template <int H, int DIMS>
static __device__ void
finish_split(const MillmCudaAttention &a, float *partials, int n_splits, int first, int h0, int i, const float *maxima, const float *sums, const float *values)
{
	const int	group = a.n_heads / a.n_kv_heads;

	for (int e = (int) threadIdx.x; e < H * DIMS; e += SPLIT_WARPS * WARP)
	{
		const int	h = e / DIMS;
		float		largest = maxima[h],
					all = 0,
					v = 0;

#pragma unroll
		for (int w = 1; w < SPLIT_WARPS; w++)
			largest = !(maxima[w * H + h] <= largest) ? maxima[w * H + h] : largest;
#pragma unroll
		for (int w = 0; w < SPLIT_WARPS; w++)
		{
			const float share = share_of(maxima[w * H + h], largest);

			all = fmaf(sums[w * H + h], share, all);
			v = fmaf(values[w * H * DIMS + e], share, v);
		}
		if (h0 + h < group && e % DIMS < a.head_dim)
		{
			float	   *to = partial_of(a, partials, n_splits, (int) blockIdx.y, first + h0 + h, i);

			if (e % DIMS == 0)
			{
				to[0] = largest;
				to[1] = all;
			}
			to[MILLM_CUDA_PARTIAL + e % DIMS] = v;
		}
	}
}

/*
 * A block for each split of a row's keys, of one KV head and H query heads of its group, which all have what was read once.  A key is LANES lanes',
 * eight dims each: a warp loads WARP / LANES keys at a time, SPLIT_LOADS times before it looks at any, K and V; all of one page.  The next ones take
 * the place of those that have been looked at, K before V has been.  Who shares a key keeps a softmax of his own; at the end those of the block become one.  What a lane sums in which order is a matter of position and window alone.
 *
 *   T         of the pages
 *   LANES     a power of two; head_dim <= 8 * LANES, and is a multiple of 8
 *   H         query heads, at most; those past the group compute its last one again
 *   n_splits  of the row that has most
 *   blocks    [n_splits * n_kv_heads * ceil(group / H), n], threads SPLIT_WARPS * WARP
 */
#define SPLIT_LOADS 4
/* On a multiprocessor: registers for that many, and none spills but one value or two of eight heads from sm_100 on, whose compiler wants more for the same. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SPLIT_BLOCKS(H) 2
#else
#define SPLIT_BLOCKS(H) ((H) <= 2 ? 4 : (H) <= 4 ? 3 : 2)
#endif
template <class T, int LANES, int H>
static __global__ void __launch_bounds__(SPLIT_WARPS * WARP, SPLIT_BLOCKS(H))
attend_split(const __grid_constant__ MillmCudaAttention a, float *partials, int n_splits, MillmRows q)
{
	const int	DIMS = 8 * LANES;
	const int	KEYS = WARP / LANES;	/* of a load */
	const int	STEP = SPLIT_LOADS * KEYS;	/* of a warp; divides a page */
	SHARED(float, queries, H * DIMS);
	SHARED(float, values, SPLIT_WARPS * H * DIMS);
	SHARED(float, maxima, SPLIT_WARPS * H);
	SHARED(float, sums, SPLIT_WARPS * H);
	const int	t = (int) blockIdx.y;
	const int	split = (int) blockIdx.x % n_splits;
	const int	group = a.n_heads / a.n_kv_heads;
	const int	n_parts = (group + H - 1) / H;	/* blocks of a group */
	const int	kv_head = (int) blockIdx.x / n_splits / n_parts;
	const int	h0 = (int) blockIdx.x / n_splits % n_parts * H;	/* in the group */
	const int	warp = (int) threadIdx.x / WARP;
	const int	lane = (int) threadIdx.x % WARP;
	const int	d = lane % LANES * 8;	/* the first of this lane's dims */
	const Split s = split_of(a, a.positions[t], split);
	const int32_t *table = a.tables + a.table_of[t * a.n_groups];
	int64_t		p0 = s.from / STEP * STEP + warp * STEP;
	int32_t		page = s.from < s.end ? table[(p0 < s.end ? p0 : s.from) / MILLM_CUDA_PAGE] : 0;
	Eight<T>	key[SPLIT_LOADS],
				of_value[SPLIT_LOADS];
	float		max[H],
				sum[H],
				value[H][8];

	auto		is_seen = [&] (int64_t p) { return p >= s.from && p < s.end; };
	/* K, or V, of the warp's keys from first on; where nothing was ever stored there may be NaN, which no weight of 0 would hide */
	auto		load = [&] (Eight<T> *to, int64_t first, bool of_values) {
		const int64_t p = first + lane / LANES;	/* this lane's, of the first load */
		Slot<T>	from(a, page, kv_head, (int) (p % MILLM_CUDA_PAGE), of_values);

#pragma unroll
		for (int j = 0; j < SPLIT_LOADS; j++, from.skip(a, KEYS))
			if (is_seen(p + j * KEYS) && d < a.head_dim)
				to[j].load(from, d);
			else
				to[j].clear();
	};
	auto		page_of = [&] (int64_t first) { return table[(first < s.end ? first : s.from) / MILLM_CUDA_PAGE]; };

	after_previous();			/* positions and tables are older than all kernels of the step */
	if (s.from >= s.end)
		return;					/* another row has more splits */
	load(key, p0, false);
	load(of_value, p0, true);
	page = page_of(p0 + SPLIT_WARPS * STEP);
	for (int i = (int) threadIdx.x; i < H * DIMS; i += SPLIT_WARPS * WARP)
	{
		const int	h = h0 + i / DIMS < group ? h0 + i / DIMS : group - 1;

		queries[i] = i % DIMS < a.head_dim ? q.data[t * q.stride + (int64_t) (kv_head * group + h) * a.head_dim + i % DIMS] : 0;
	}
	__syncthreads();
#pragma unroll
	for (int h = 0; h < H; h++)
	{
		max[h] = -INFINITY;
		sum[h] = 0;
#pragma unroll
		for (int k = 0; k < 8; k++)
			value[h][k] = 0;
	}
	for (; p0 < s.end; p0 += SPLIT_WARPS * STEP)
	{
		const int64_t p = p0 + lane / LANES;	/* this lane's, of the first load */
		const int64_t next = p0 + SPLIT_WARPS * STEP;
		float		score[SPLIT_LOADS][H];

#pragma unroll
		for (int h = 0; h < H; h++)
		{
			const float4 q0 = *(const float4 *) &queries[h * DIMS + d];
			const float4 q1 = *(const float4 *) &queries[h * DIMS + d + 4];
			const float of_query[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};

#pragma unroll
			for (int j = 0; j < SPLIT_LOADS; j++)
			{
				score[j][h] = 0;
#pragma unroll
				for (int k = 0; k < 8; k++)
					score[j][h] = fmaf(of_query[k], key[j].get(k), score[j][h]);
				score[j][h] *= key[j].scale();
			}
		}
		load(key, next, false);
#pragma unroll
		for (int h = 0; h < H; h++)
		{
			const int	head = kv_head * group + (h0 + h < group ? h0 + h : group - 1);
			float		largest = max[h];

#pragma unroll
			for (int j = 0; j < SPLIT_LOADS; j++)
			{
#pragma unroll
				for (int step = LANES / 2; step > 0; step /= 2)
					score[j][h] += __shfl_xor_sync(ALL_LANES, score[j][h], step);
				score[j][h] = finished_score(a, score[j][h], head, p + j * KEYS);
				if (!is_seen(p + j * KEYS))
					score[j][h] = -INFINITY;
				else if (!(score[j][h] <= largest))	/* a NaN is taken along: it must reach the output */
					largest = score[j][h];
			}
			if (!(largest <= max[h]))
			{
				const float rescale = exp_of(max[h] - largest);

				max[h] = largest;
				sum[h] *= rescale;
#pragma unroll
				for (int k = 0; k < 8; k++)
					value[h][k] *= rescale;
			}
#pragma unroll
			for (int j = 0; j < SPLIT_LOADS; j++)
			{
				const float weight = share_of(score[j][h], max[h]);

				sum[h] += weight;
#pragma unroll
				for (int k = 0; k < 8; k++)
					value[h][k] = fmaf(weight * of_value[j].scale(), of_value[j].get(k), value[h][k]);
			}
		}
		load(of_value, next, true);
		page = page_of(next + SPLIT_WARPS * STEP);	/* is there when it is needed */
	}
#pragma unroll
	for (int h = 0; h < H; h++)
	{
		float		largest = max[h],
					share;

#pragma unroll
		for (int step = LANES; step < WARP; step *= 2)
		{
			const float other = __shfl_xor_sync(ALL_LANES, largest, step);

			largest = !(other <= largest) ? other : largest;
		}
		share = share_of(max[h], largest);
		sum[h] *= share;
#pragma unroll
		for (int k = 0; k < 8; k++)
			value[h][k] *= share;
#pragma unroll
		for (int step = LANES; step < WARP; step *= 2)
		{
			sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], step);
#pragma unroll
			for (int k = 0; k < 8; k++)
				value[h][k] += __shfl_xor_sync(ALL_LANES, value[h][k], step);
		}
		if (lane < LANES)
		{
			float4	   *to = (float4 *) &values[(warp * H + h) * DIMS + d];

			to[0] = {value[h][0], value[h][1], value[h][2], value[h][3]};
			to[1] = {value[h][4], value[h][5], value[h][6], value[h][7]};
		}
		if (lane == 0)
		{
			maxima[warp * H + h] = largest;
			sums[warp * H + h] = sum[h];
		}
	}
	__syncthreads();
	finish_split<H, DIMS>(a, partials, n_splits, kv_head * group, h0, split, maxima, sums, values);
}

/* ---- rows one by one, on tensor cores ---- */

/*
 * Two codes that are bytes of u, as those digits of selector say with 0x64 between them, to float16: 1024 + (c + 128) has that byte last.  u has them plus 128.
 */
static __device__ uint32_t
codes_in_f16(uint32_t u, unsigned selector)
{
	return add_f16_pairs(byte_perm(u, 0x64646464u, selector), 0xE480E480u);	/* - 1152: exact */
}

static __device__ uint32_t
pair_f16(float low, float high)
{
	return to_f16(low) | (uint32_t) to_f16(high) << 16;
}

/* What float16 does not hold of f, in float16. */
static __device__ float
rest_of_f16(float f)
{
	return f - from_f16(to_f16(f));
}

/*
 * A lane's part of 64 dims, from 64 chunk on, of a page's keys, and of its values, as fragments of mma.m16n8k16 (PTX ISA): g = lane / 4, t = lane % 4.  Neither a sum
 * over dims nor rows of a result have an order of their own, so that those of a fragment are what a lane finds side by side.
 *
 * Keys, the second factor: of n-tile i the key g + 8 i, and of step s, of four, the dims dim_of(s, t) and the three behind it.
 * Values, the first, transposed: of the keys 2t, 2t + 1, 2t + 8 and 2t + 9 the eight dims from 8 g on; m-tile j, of four, has of each lane's the dims 2j and 2j + 1,
 * as the rows g and g + 8.
 */
#define CHUNK 64
template <class T>
struct Keys;
template <class T>
struct Values;

template <>
struct Keys<uint16_t>
{
	uint4		u[2][2];

	static __device__ int dim_of(int s, int t) { return s / 2 * 32 + t * 8 + s % 2 * 4; }
	__device__ void load(const Slot<uint16_t> &s, int i, int chunk, int t, int head_dim)
	{
#pragma unroll
		for (int half = 0; half < 2; half++)
		{
			const int	d = chunk * CHUNK + half * 32 + t * 8;

			u[i][half] = d < head_dim ? *(const uint4 *) (s.codes + d) : uint4 {0, 0, 0, 0};
		}
	}
	__device__ void fragment(uint32_t *b, int i, int s) const
	{
		const uint4 w = u[i][s / 2];

		b[0] = s % 2 ? w.z : w.x;
		b[1] = s % 2 ? w.w : w.y;
	}
};

template <>
struct Keys<int8_t>
{
	uint4		u[2];
	uint16_t	scale[2];

	static __device__ int dim_of(int s, int t) { return t * MILLM_KV_BLOCK + s * 4; }
	__device__ void load(const Slot<int8_t> &s, int i, int chunk, int t, int head_dim)
	{
		const int	d = chunk * CHUNK + t * MILLM_KV_BLOCK;

		u[i] = d < head_dim ? *(const uint4 *) (s.codes + d) : uint4 {0, 0, 0, 0};
		scale[i] = d < head_dim ? s.scales[d / MILLM_KV_BLOCK] : 0;
	}
	__device__ void fragment(uint32_t *b, int i, int s) const
	{
		const uint32_t word = (s == 0 ? u[i].x : s == 1 ? u[i].y : s == 2 ? u[i].z : u[i].w) ^ 0x80808080u;
		const uint32_t scales = scale[i] * 0x10001u;

		b[0] = mul_f16_pairs(codes_in_f16(word, 0x4140), scales);
		b[1] = mul_f16_pairs(codes_in_f16(word, 0x4342), scales);
	}
};

template <>
struct Values<uint16_t>
{
	uint4		u[4];

	__device__ void clear(int i) { u[i] = {0, 0, 0, 0}; }
	__device__ void load(const Slot<uint16_t> &s, int i, int d) { u[i] = *(const uint4 *) (s.codes + d); }
	__device__ uint32_t word(int i, int j) const { return j == 0 ? u[i].x : j == 1 ? u[i].y : j == 2 ? u[i].z : u[i].w; }
	__device__ void fragment(uint32_t *a, int j) const
	{
#pragma unroll
		for (int k = 0; k < 2; k++)
		{
			a[2 * k] = byte_perm(word(2 * k, j), word(2 * k + 1, j), 0x5410);
			a[2 * k + 1] = byte_perm(word(2 * k, j), word(2 * k + 1, j), 0x7632);
		}
	}
};

template <>
struct Values<int8_t>
{
	uint2		u[4];
	uint16_t	scale[4];

	__device__ void clear(int i) { u[i] = {0, 0}; scale[i] = 0; }
	__device__ void load(const Slot<int8_t> &s, int i, int d) { u[i] = *(const uint2 *) (s.codes + d); scale[i] = s.scales[d / MILLM_KV_BLOCK]; }
	__device__ uint32_t word(int i, int j) const { return j < 2 ? u[i].x : u[i].y; }
	__device__ void fragment(uint32_t *a, int j) const
	{
#pragma unroll
		for (int k = 0; k < 2; k++)
		{
			const uint32_t both = byte_perm(word(2 * k, j), word(2 * k + 1, j), j % 2 ? 0x7362 : 0x5140) ^ 0x80808080u;
			const uint32_t scales = scale[2 * k] | (uint32_t) scale[2 * k + 1] << 16;

			a[2 * k] = mul_f16_pairs(codes_in_f16(both, 0x4140), scales);
			a[2 * k + 1] = mul_f16_pairs(codes_in_f16(both, 0x4342), scales);
		}
	}
};

/*
 * What attend_split computes, where the group is no matter.  Of queries' 16 rows the first eight are its heads, and the others what float16 does not hold of them;
 * weights are two fragments likewise: products are of queries, and of weights, to 2^-22 (2^-25 of 1).  A warp takes a page at a time, and the next one's keys and values are on
 * their way while these are multiplied.  The scores of two n-tiles of keys, with heads as rows, are the fragment of weights that values, transposed, are multiplied
 * by, as they are; so the result has heads as columns, which needs half the registers that 16 rows of them would.
 *
 *   T         of the pages: float16 or int8
 *   CHUNKS    head_dim <= CHUNK * CHUNKS, and is a multiple of 16
 *   n_splits  of the row that has most
 *   blocks    [n_splits * n_kv_heads * ceil(group / FRAGMENT_HEADS), n], threads SPLIT_WARPS * WARP
 */
#define FRAGMENT_HEADS 8
/* On a multiprocessor: registers for that many, and none spills but a few values of 256 dims (float16 from sm_100 on: 51). */
#define FRAGMENT_BLOCKS(CHUNKS) ((CHUNKS) == 1 ? 4 : (CHUNKS) == 2 ? 3 : 2)
template <class T, int CHUNKS>
static __global__ void __launch_bounds__(SPLIT_WARPS * WARP, FRAGMENT_BLOCKS(CHUNKS))
attend_fragments(const __grid_constant__ MillmCudaAttention a, float *partials, int n_splits, MillmRows q)
{
	const int	H = FRAGMENT_HEADS;
	const int	DIMS = CHUNK * CHUNKS;
	SHARED(uint4, queries, CHUNKS * 4 * WARP);	/* fragments, of each step of four dims a lane */
	SHARED(float, values, SPLIT_WARPS * H * DIMS);
	SHARED(float, maxima, SPLIT_WARPS * H);
	SHARED(float, sums, SPLIT_WARPS * H);
	const int	row = (int) blockIdx.y;
	const int	split = (int) blockIdx.x % n_splits;
	const int	group = a.n_heads / a.n_kv_heads;
	const int	n_parts = (group + H - 1) / H;	/* blocks of a group */
	const int	kv_head = (int) blockIdx.x / n_splits / n_parts;
	const int	h0 = (int) blockIdx.x / n_splits % n_parts * H;	/* in the group */
	const int	warp = (int) threadIdx.x / WARP;
	const int	lane = (int) threadIdx.x % WARP;
	const int	g = lane / 4,
				t = lane % 4;
	const int	head = kv_head * group + (h0 + g < group ? h0 + g : group - 1);	/* whose softmax is this lane's, and its quad's */
	const Split s = split_of(a, a.positions[row], split);
	const int	first = (int) s.from,	/* positions fit an int, and take less room */
				behind = (int) s.end;
	const int32_t *table = a.tables + a.table_of[row * a.n_groups];
	const int	end = (behind + MILLM_CUDA_PAGE - 1) / MILLM_CUDA_PAGE;	/* of its pages */
	int			at = first / MILLM_CUDA_PAGE + warp;	/* the page of this warp that is next */
	int32_t		page = first < behind ? table[at < end ? at : end - 1] : 0;
	const Slot<T> keys(a, 0, kv_head, g, false);	/* this lane's, in page 0 */
	const Slot<T> all_values(a, 0, kv_head, 2 * t, true);
	Keys<T>		key[CHUNKS];
	Values<T>	of_value[CHUNKS];
	float		value[CHUNKS][4][4] = {};	/* m-tile j: of the heads 2t and 2t + 1 the dim 8 g + 2j, and then the next one */
	float		max = -INFINITY;
	float		sum = 0;		/* this lane's part */

	auto		is_seen = [&] (int p) { return p >= first && p < behind; };
	auto		load_keys = [&] () {
		Slot<T>		slot = keys.of_page(a, page);

#pragma unroll
		for (int i = 0; i < 2; i++, slot.skip(a, 8))
#pragma unroll
			for (int c = 0; c < CHUNKS; c++)
				key[c].load(slot, i, c, t, a.head_dim);
	};
	/* where nothing was ever stored there may be NaN, which no weight of 0 would hide */
	auto		load_values = [&] (int of) {
		Slot<T>		slot = all_values.of_page(a, page);

#pragma unroll
		for (int i = 0; i < 4; i++, slot.skip(a, i == 2 ? 7 : 1))
#pragma unroll
			for (int c = 0; c < CHUNKS; c++)
				if (is_seen(of * MILLM_CUDA_PAGE + 2 * t + i % 2 + i / 2 * 8) && c * CHUNK + g * 8 < a.head_dim)
					of_value[c].load(slot, i, c * CHUNK + g * 8);
				else
					of_value[c].clear(i);
	};

	after_previous();			/* positions and tables are older than all kernels of the step */
	if (first >= behind)
		return;					/* another row has more splits */
	if (at < end)
	{
		load_keys();
		load_values(at);
	}
	page = table[at + SPLIT_WARPS < end ? at + SPLIT_WARPS : end - 1];
	for (int i = (int) threadIdx.x; i < CHUNKS * 4 * WARP; i += SPLIT_WARPS * WARP)
	{
		const int	h = h0 + i % WARP / 4;
		const int	d = i / WARP / 4 * CHUNK + Keys<T>::dim_of(i / WARP % 4, i % 4);
		float4		f = {0, 0, 0, 0};

		if (h < group && d < a.head_dim)
			f = *(const float4 *) (q.data + row * q.stride + (int64_t) (kv_head * group + h) * a.head_dim + d);
		queries[i] = {pair_f16(f.x, f.y), pair_f16(rest_of_f16(f.x), rest_of_f16(f.y)), pair_f16(f.z, f.w), pair_f16(rest_of_f16(f.z), rest_of_f16(f.w))};
	}
	__syncthreads();
	for (; at < end; at += SPLIT_WARPS)
	{
		const int	next = at + SPLIT_WARPS;
		float		product[2][4] = {};
		float		score[4];
		uint32_t	weights[2],
					rests[2];
		float		largest = max;
		float		rescale[2];

#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
#pragma unroll
			for (int step = 0; step < 4; step++)
			{
				const uint4 u = queries[(c * 4 + step) * WARP + lane];
				const uint32_t of_query[4] = {u.x, u.y, u.z, u.w};
				uint32_t	b[2];

#pragma unroll
				for (int i = 0; i < 2; i++)
				{
					key[c].fragment(b, i, step);
					mma_f16_16x8x16(product[i], of_query, b);
				}
			}
		if (next < end)
			load_keys();
#pragma unroll
		for (int i = 0; i < 4; i++)
		{
			const int	p = at * MILLM_CUDA_PAGE + i / 2 * 8 + 2 * t + i % 2;

			score[i] = finished_score(a, product[i / 2][i % 2] + product[i / 2][i % 2 + 2], head, p);
			if (!is_seen(p))
				score[i] = -INFINITY;
			else if (!(score[i] <= largest))	/* a NaN is taken along: it must reach the output */
				largest = score[i];
		}
#pragma unroll
		for (int step = 1; step < 4; step *= 2)
		{
			const float other = __shfl_xor_sync(ALL_LANES, largest, step);

			largest = !(other <= largest) ? other : largest;
		}
		rescale[0] = largest <= max ? 1 : exp_of(max - largest);
		max = largest;
		sum *= rescale[0];
		rescale[1] = __shfl_sync(ALL_LANES, rescale[0], (2 * t + 1) * 4);
		rescale[0] = __shfl_sync(ALL_LANES, rescale[0], 2 * t * 4);	/* of the heads of this lane's values */
		if (rescale[0] != 1 || rescale[1] != 1)
#pragma unroll
			for (int i = 0; i < CHUNKS * 16; i++)
				value[i / 16][i / 4 % 4][i % 4] *= rescale[i % 2];
#pragma unroll
		for (int i = 0; i < 2; i++)
		{
			const float even = share_of(score[2 * i], max);
			const float odd = share_of(score[2 * i + 1], max);

			sum += even + odd;
			weights[i] = pair_f16(even, odd);
			rests[i] = pair_f16(rest_of_f16(even), rest_of_f16(odd));
		}
#pragma unroll
		for (int c = 0; c < CHUNKS; c++)
#pragma unroll
			for (int j = 0; j < 4; j++)
			{
				uint32_t	transposed[4];

				of_value[c].fragment(transposed, j);
				mma_f16_16x8x16(value[c][j], transposed, weights);
				mma_f16_16x8x16(value[c][j], transposed, rests);
			}
		if (next < end)
			load_values(next);
		page = table[next + SPLIT_WARPS < end ? next + SPLIT_WARPS : end - 1];	/* is there when it is needed */
	}
#pragma unroll
	for (int step = 1; step < 4; step *= 2)
		sum += __shfl_xor_sync(ALL_LANES, sum, step);
#pragma unroll
	for (int c = 0; c < CHUNKS; c++)
#pragma unroll
		for (int i = 0; i < 2; i++)
		{
			float4	   *to = (float4 *) &values[(warp * H + 2 * t + i) * DIMS + c * CHUNK + g * 8];

			to[0] = {value[c][0][i], value[c][0][i + 2], value[c][1][i], value[c][1][i + 2]};
			to[1] = {value[c][2][i], value[c][2][i + 2], value[c][3][i], value[c][3][i + 2]};
		}
	if (t == 0)
	{
		maxima[warp * H + g] = max;
		sums[warp * H + g] = sum;
	}
	__syncthreads();
	finish_split<H, DIMS>(a, partials, n_splits, kv_head * group, h0, split, maxima, sums, values);
}

/* The splits of a row's head, and its sink, in their order.  blocks [n_heads, n], threads COMBINE_THREADS */
#define COMBINE_THREADS 128		/* at least MILLM_CUDA_SPLITS */
static __global__ void
combine(const __grid_constant__ MillmCudaAttention a, MillmRows y, MillmCudaFragments f, float *partials, int n_splits)
{
	SHARED(float, maxima, MILLM_CUDA_SPLITS);
	SHARED(float, sums, MILLM_CUDA_SPLITS);
	SHARED(float, shares, MILLM_CUDA_SPLITS);
	const int	h = (int) blockIdx.x;
	const int	t = (int) blockIdx.y;
	const int64_t position = a.positions[t];
	const int	n = millm_cuda_splits(position, a.window);
	const float *part = partial_of(a, partials, n_splits, t, h, 0);
	const int	pitch = MILLM_CUDA_PARTIAL + a.head_dim;
	const int	i = (int) threadIdx.x;
	float		largest = a.sinks ? a.sinks[h] : -INFINITY;
	float		sum = 0;

	after_previous();			/* positions are older than all kernels of the step, and sinks are weights */
	if (i < n)
	{
		maxima[i] = part[i * pitch];
		sums[i] = part[i * pitch + 1];
	}
	__syncthreads();
	for (int k = 0; k < n; k++)
		largest = !(maxima[k] <= largest) ? maxima[k] : largest;
	if (i < n)
		shares[i] = share_of(maxima[i], largest);
	__syncthreads();
	for (int k = 0; k < n; k++)
		sum = fmaf(sums[k], shares[k], sum);
	if (a.sinks)
		sum += share_of(a.sinks[h], largest);
	for (int d = i; d < a.head_dim; d += COMBINE_THREADS)
	{
		float		v = 0;

#pragma unroll 8
		for (int k = 0; k < n; k++)
			v = fmaf(part[k * pitch + MILLM_CUDA_PARTIAL + d], shares[k], v);
		v /= sum;
		if (!f.alone)
			y.data[t * y.stride + (int64_t) h * a.head_dim + d] = v;
		if (f.data)
			keep(f, t, (int64_t) h * a.head_dim + d, v);
	}
}

template <class T, int LANES>
static cudaError_t
launch_split(const MillmCudaAttention *a, float *partials, int n_splits, MillmRows q, int n, MillmCudaQueue *queue)
{
	const int	group = a->n_heads / a->n_kv_heads;
	const int	n_together = group == 1 ? 1 : group == 2 ? 2 : group <= 4 ? 4 : 8;
	const dim3	blocks((unsigned) (n_splits * a->n_kv_heads * ((group + n_together - 1) / n_together)), (unsigned) n);

	return launch(n_together == 1 ? attend_split<T, LANES, 1> : n_together == 2 ? attend_split<T, LANES, 2> : n_together == 4 ? attend_split<T, LANES, 4> :
				  attend_split<T, LANES, 8>, blocks, SPLIT_WARPS * WARP, queue, *a, partials, n_splits, q);
}

template <class T>
static cudaError_t
launch_fragments(const MillmCudaAttention *a, float *partials, int n_splits, MillmRows q, int n, MillmCudaQueue *queue)
{
	const int	n_parts = (a->n_heads / a->n_kv_heads + FRAGMENT_HEADS - 1) / FRAGMENT_HEADS;
	const dim3	blocks((unsigned) (n_splits * a->n_kv_heads * n_parts), (unsigned) n);

	return launch(a->head_dim <= CHUNK ? attend_fragments<T, 1> : a->head_dim <= 2 * CHUNK ? attend_fragments<T, 2> : attend_fragments<T, MILLM_CUDA_MAX_CHUNKED_HEAD / CHUNK>,
				  blocks, SPLIT_WARPS * WARP, queue, *a, partials, n_splits, q);
}

template <class T>
static cudaError_t
launch_split(const MillmCudaAttention *a, float *partials, int n_splits, MillmRows q, int n, MillmCudaQueue *queue)
{
	return a->head_dim <= 64 ? launch_split<T, 8>(a, partials, n_splits, q, n, queue) :
		a->head_dim <= 128 ? launch_split<T, 16>(a, partials, n_splits, q, n, queue) : launch_split<T, 32>(a, partials, n_splits, q, n, queue);
}

/* The partial softmaxes of n rows, once they are there, to y. */
static cudaError_t
launch_combine(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, float *partials, int n_splits, int n, MillmCudaQueue *queue)
{
	return launch(combine, dim3((unsigned) a->n_heads, (unsigned) n), COMBINE_THREADS, queue, *a, y, *f, partials, n_splits);
}

cudaError_t
millm_cuda_attention_split(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, float *partials, int n_splits, int n,
						   MillmCudaQueue *queue)
{
	const cudaError_t status = a->kv_dtype == MILLM_F32 ? launch_split<float>(a, partials, n_splits, q, n, queue) :
		a->kv_dtype == MILLM_F16 ? launch_split<uint16_t>(a, partials, n_splits, q, n, queue) : launch_split<int8_t>(a, partials, n_splits, q, n, queue);

	return status == cudaSuccess ? launch_combine(a, y, f, partials, n_splits, n, queue) : status;
}

cudaError_t
millm_cuda_attention_fragments(const MillmCudaAttention *a, MillmRows y, const MillmCudaFragments *f, MillmRows q, float *partials, int n_splits, int n,
							   MillmCudaQueue *queue)
{
	const cudaError_t status = a->kv_dtype == MILLM_F16 ? launch_fragments<uint16_t>(a, partials, n_splits, q, n, queue) :
		launch_fragments<int8_t>(a, partials, n_splits, q, n, queue);

	return status == cudaSuccess ? launch_combine(a, y, f, partials, n_splits, n, queue) : status;
}

/* ---- many rows of a sequence ---- */

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
