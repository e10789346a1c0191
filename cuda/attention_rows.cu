/*
 * attention_rows.cu -- attention of rows that have each their own keys: decoding's.  kernels.h has the meaning.
 *
 * What such a row needs is to read its keys and values once, as fast as memory is: many blocks share a row's keys, in splits, and each leaves a partial
 * softmax; another kernel brings those of a row together.  attend_split multiplies one by one; attend_fragments does the same on tensor cores.
 */
#include "attention.cuh"

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
