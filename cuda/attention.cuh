/*
 * attention.cuh -- what the files of attention share: where keys and values lie, what their products count, and the softmax of parts.
 *
 * A softmax is online: a largest score, the sum of exp(score - largest), and the values so weighted; those of parts of the keys are brought to one largest
 * score and added.
 */
#ifndef MILLM_CUDA_ATTENTION_H
#define MILLM_CUDA_ATTENTION_H

#include "parts.cuh"

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

/* What the product of query head h and the key of position p counts, before the softmax. */
static inline __device__ float
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
static inline __device__ int64_t
first_seen(const MillmCudaAttention &a, int64_t position)
{
	return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}

#define LOG2_E 1.4426950408889634f

/* exp(d): one multiplication and one instruction; d is at most 0 where it counts */
static inline __device__ float
exp_of(float d)
{
	return exp2_flushed(d * LOG2_E);
}

/* What a part with this largest score is multiplied by where the largest of all is max.  A part that saw no key has -infinity, and nothing to add. */
static inline __device__ float
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

static inline __device__ uint32_t
pair_f16(float low, float high)
{
	return to_f16(low) | (uint32_t) to_f16(high) << 16;
}

#endif
