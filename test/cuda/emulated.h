/*
 * emulated.h -- the language of kernels.cu for an ordinary C++ compiler: blocks one after the other, the threads of a block in turns.
 *
 * A thread runs until it waits for the others of its block (__syncthreads) or its warp (shuffles).  What CUDA forbids ends the
 * program with a sentence: a barrier that a thread of the warp or the block does not reach.
 */
#ifndef MILLM_EMULATED_H
#define MILLM_EMULATED_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulated_runtime.h"
#include "half.h"

#define __global__
#define __device__
#define SHARED(type, name, n) type *const name = (type *) emulated_shared(sizeof(type) * (n))

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

extern void *emulated_shared(size_t bytes);
extern void __syncthreads();
/* The value that the lane `lane ^ by` of this warp brings to the same call. */
extern float __shfl_xor_sync(unsigned mask, float v, int by);
extern cudaError_t emulated_run(void (*thread) (void *arg), void *arg, dim3 blocks, int n_threads);

template <class... Parameters, class... Arguments>
static cudaError_t
launch(void (*kernel) (Parameters...), dim3 blocks, int threads, cudaStream_t, Arguments... arguments)
{
	auto		thread = [&] { kernel(arguments...); };

	return emulated_run([] (void *arg) { (*(decltype(thread) *) arg)(); }, &thread, blocks, threads);
}

static inline float mul(float a, float b) { return a * b; }	/* compiled with -ffp-contract=off */
static inline float add(float a, float b) { return a + b; }
static inline float as_float(uint32_t u) { float f; memcpy(&f, &u, sizeof(f)); return f; }
static inline float from_f16(uint16_t h) { return millm_f16_to_f32(h); }
static inline uint16_t to_f16(float f) { return millm_f32_to_f16(f); }
static inline uint16_t to_bf16(float f) { return millm_f32_to_bf16(f); }

#endif
