/*
 * emulated.h -- the language of kernels.cu for an ordinary C++ compiler: blocks one after the other, the threads of a block in turns.
 *
 * A thread runs until it waits for the others of its block (__syncthreads) or its warp (shuffles).  What CUDA forbids ends the
 * program with a sentence: a barrier that a thread of the warp or the block does not reach.
 */
#ifndef MILLM_EMULATED_H
#define MILLM_EMULATED_H

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulated_runtime.h"
#include "half.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED(type, name, n) type *const name = (type *) emulated_shared(sizeof(type) * (n))
#define LAUNCHED_SHARED(type, name, n) type *const name = (type *) emulated_launched_shared(sizeof(type) * (n))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3
{
	unsigned	x, y, z;

	dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct EmulatedPlace { dim3 thread, block; };
extern EmulatedPlace emulated_place;	/* of the thread whose turn it is */
extern dim3 emulated_block_size, emulated_grid_size;
#define threadIdx emulated_place.thread
#define blockIdx emulated_place.block
#define blockDim emulated_block_size
#define gridDim emulated_grid_size

[[noreturn]] extern void emulated_complain(const char *what);
extern void *emulated_shared(size_t bytes);
extern void *emulated_launched_shared(size_t bytes);
extern void __syncthreads();
static inline void atomicMin(int *p, int v) { *p = v < *p ? v : *p; }
static inline int atomicAdd(int *p, int v) { const int was = *p; *p += v; return was; }
/* The value that the lane `lane ^ by` of this warp brings to the same call. */
extern float __shfl_xor_sync(unsigned mask, float v, int by);
/* The value that the lane `lane` of this warp brings. */
extern float __shfl_sync(unsigned mask, float v, int lane);
/* The whole warp comes here before it goes on; true: this is its first lane. */
extern bool emulated_warp();
/* 16 bytes to shared memory, or zeros: there after this thread's wait_for_copies(), and no sooner. */
extern void copy_16(void *to, const void *from, bool is_there);
extern void wait_for_copies();
/* No kernel begins before the one in front of it has ended; but one that could may not return from a thread that has not called this. */
extern void after_previous();
/* Run it, or record it for a graph: with the values that the parameters have now. */
extern cudaError_t emulated_run(const void *kernel, void (*thread) (void *arg), void *arg, size_t arg_bytes, dim3 blocks, int n_threads, size_t shared, bool overlaps);

template <class... Parameters, class... Arguments>
static cudaError_t
start_kernel(void (*kernel) (Parameters...), dim3 blocks, int threads, size_t shared, bool overlaps, cudaStream_t, Arguments... arguments)
{
	auto		thread = [=] { kernel(arguments...); };

	return emulated_run((const void *) kernel, [] (void *arg) { (*(decltype(thread) *) arg)(); }, &thread, sizeof(thread), blocks, threads, shared, overlaps);
}

#define HAS_TENSOR_CORES
struct bf16 { uint16_t bits; };

struct f16 { uint16_t bits; };

static inline void __syncwarp() { emulated_warp(); }

/*
 * Matrices of a warp: eight elements are a lane's, others than on any device, since who knows which ones is no business of a kernel's.
 */
namespace wmma
{
	struct matrix_a {};
	struct matrix_b {};
	struct accumulator {};
	struct row_major {};
	struct col_major {};
	enum Layout {mem_row_major};

	template <class Use, int M, int N, int K, class T, class Layout = void>
	struct fragment
	{
		static_assert(M == 16 && N == 16 && K == 16, "the only size that is emulated");
		static const int num_elements = 8;
		float		x[8];
	};

	static inline float value_of(bf16 h) { return millm_bf16_to_f32(h.bits); }
	static inline float value_of(f16 h) { return millm_f16_to_f32(h.bits); }
	static inline float value_of(float f) { return f; }

	/* Row and column of the e-th element of the lane whose turn it is. */
	static inline int row_of(int e) { return (int) (emulated_place.thread.x % 32 * 8 + (unsigned) e) / 16; }
	static inline int column_of(int e) { return (int) (emulated_place.thread.x % 32 * 8 + (unsigned) e) % 16; }

	static inline void
	check_place(const void *p, size_t pitch_bytes)
	{
		if ((uintptr_t) p % 32 != 0 || pitch_bytes % 16 != 0)
			emulated_complain("a matrix of a warp that is not aligned");
	}

	template <class Use, class T, class Layout>
	static void
	load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *from, unsigned pitch)
	{
		const bool	is_transposed = std::is_same<Layout, col_major>::value;

		static_assert(!std::is_same<Use, matrix_a>::value || std::is_same<Layout, row_major>::value, "the layouts that are emulated");
		check_place(from, pitch * sizeof(T));
		for (int e = 0; e < 8; e++)
			f.x[e] = value_of(is_transposed ? from[column_of(e) * (int) pitch + row_of(e)] : from[row_of(e) * (int) pitch + column_of(e)]);
	}

	static inline void
	load_matrix_sync(fragment<accumulator, 16, 16, 16, float> &f, const float *from, unsigned pitch, Layout)
	{
		check_place(from, pitch * sizeof(float));
		for (int e = 0; e < 8; e++)
			f.x[e] = from[row_of(e) * (int) pitch + column_of(e)];
	}

	static inline void
	fill_fragment(fragment<accumulator, 16, 16, 16, float> &f, float value)
	{
		for (int e = 0; e < 8; e++)
			f.x[e] = value;
	}

	template <class T, class Layout>
	static void
	mma_sync(fragment<accumulator, 16, 16, 16, float> &y, const fragment<matrix_a, 16, 16, 16, T, row_major> &a,
			 const fragment<matrix_b, 16, 16, 16, T, Layout> &b, const fragment<accumulator, 16, 16, 16, float> &c)
	{
		static float whole_a[16][16],
					whole_b[16][16];

		for (int e = 0; e < 8; e++)
		{
			whole_a[row_of(e)][column_of(e)] = a.x[e];
			whole_b[row_of(e)][column_of(e)] = b.x[e];
		}
		emulated_warp();
		for (int e = 0; e < 8; e++)
		{
			float		sum = c.x[e];

			for (int k = 0; k < 16; k++)
				sum += whole_a[row_of(e)][k] * whole_b[k][column_of(e)];
			y.x[e] = sum;
		}
		emulated_warp();
	}

	static inline void
	store_matrix_sync(float *to, const fragment<accumulator, 16, 16, 16, float> &f, unsigned pitch, Layout)
	{
		check_place(to, pitch * sizeof(float));
		for (int e = 0; e < 8; e++)
			to[row_of(e) * (int) pitch + column_of(e)] = f.x[e];
	}
}

static inline float mul(float a, float b) { return a * b; }	/* compiled with -ffp-contract=off */
static inline float add(float a, float b) { return a + b; }
static inline float exp2_flushed(float d) { const float f = exp2f(d); return f < FLT_MIN ? 0 : f; }
static inline float as_float(uint32_t u) { float f; memcpy(&f, &u, sizeof(f)); return f; }
static inline uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, sizeof(u)); return u; }
static inline float from_f16(uint16_t h) { return millm_f16_to_f32(h); }
static inline uint16_t to_f16(float f) { return millm_f32_to_f16(f); }
static inline f16 as_f16(float f) { return {millm_f32_to_f16(f)}; }
static inline bf16 as_bf16(float f) { return {millm_f32_to_bf16(f)}; }
static inline uint16_t to_bf16(float f) { return millm_f32_to_bf16(f); }

static inline uint32_t
byte_perm(uint32_t a, uint32_t b, unsigned selector)
{
	const uint64_t both = a | (uint64_t) b << 32;
	uint32_t	r = 0;

	for (int i = 0; i < 4; i++)
		r |= (uint32_t) (both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
	return r;
}

static inline uint2 read_once_8(const void *p) { return *(const uint2 *) p; }
static inline uint4 read_once_16(const void *p) { return *(const uint4 *) p; }

static inline uint32_t
subtract_pairs(uint32_t a, uint32_t b)
{
	uint32_t	r = 0;

	for (int i = 0; i < 32; i += 16)
		r |= (uint32_t) millm_f32_to_bf16(millm_bf16_to_f32((uint16_t) (a >> i)) - millm_bf16_to_f32((uint16_t) (b >> i))) << i;
	return r;
}

static inline uint32_t
add_f16_pairs(uint32_t a, uint32_t b)
{
	uint32_t	r = 0;

	for (int i = 0; i < 32; i += 16)
		r |= (uint32_t) millm_f32_to_f16(millm_f16_to_f32((uint16_t) (a >> i)) + millm_f16_to_f32((uint16_t) (b >> i))) << i;
	return r;
}

static inline uint32_t
mul_f16_pairs(uint32_t a, uint32_t b)
{
	uint32_t	r = 0;

	for (int i = 0; i < 32; i += 16)
		r |= (uint32_t) millm_f32_to_f16(millm_f16_to_f32((uint16_t) (a >> i)) * millm_f16_to_f32((uint16_t) (b >> i))) << i;
	return r;
}

/*
 * c [16, 8] += a [16, 16] b [16, 8] of 16-bit floats.  Lane 4 g + q has of a rows g and g + 8, columns 2q, 2q + 1, and these plus 8; of b the same columns of row g; of c
 * rows g and g + 8, columns 2q and 2q + 1 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
 */
static inline void
multiply_fragments(float *c, const uint32_t *a, const uint32_t *b, float (*to_f32) (uint16_t))
{
	static float whole_a[16][16],
				whole_b[8][16];
	const int	g = (int) emulated_place.thread.x % 32 / 4,
				q = (int) emulated_place.thread.x % 4;

	for (int k = 0; k < 4; k++)
		for (int j = 0; j < 2; j++)
		{
			whole_a[g + k % 2 * 8][2 * q + k / 2 * 8 + j] = to_f32((uint16_t) (a[k] >> 16 * j));
			if (k < 2)
				whole_b[g][2 * q + k * 8 + j] = to_f32((uint16_t) (b[k] >> 16 * j));
		}
	emulated_warp();
	for (int k = 0; k < 4; k++)
		for (int i = 0; i < 16; i++)
			c[k] += whole_a[g + k / 2 * 8][i] * whole_b[2 * q + k % 2][i];
	emulated_warp();
}

static inline void
mma_16x8x16(float *c, const uint32_t *a, const uint32_t *b)
{
	multiply_fragments(c, a, b, millm_bf16_to_f32);
}

static inline void
mma_f16_16x8x16(float *c, const uint32_t *a, const uint32_t *b)
{
	multiply_fragments(c, a, b, millm_f16_to_f32);
}

/* Rows and columns of f16 that lie so far apart */
static inline void
load_quarters_of(uint32_t *quarters, const f16 *p, int of_row, int of_column)
{
	const int	lane = (int) emulated_place.thread.x % 32;

	if ((uintptr_t) p % 16 != 0 || of_row * of_column % 8 != 0)
		emulated_complain("a matrix of a warp that is not aligned");
	for (int i = 0; i < 4; i++)
	{
		const f16  *at = p + (i / 2 * 8 + lane / 4) * of_row + (i % 2 * 8 + lane % 4 * 2) * of_column;

		quarters[i] = at[0].bits | (uint32_t) at[of_column].bits << 16;
	}
}

static inline void load_quarters(uint32_t *quarters, const f16 *p, int pitch) { load_quarters_of(quarters, p, pitch, 1); }
static inline void load_quarters_transposed(uint32_t *quarters, const f16 *p, int pitch) { load_quarters_of(quarters, p, 1, pitch); }



#endif
