/*
 * device.h -- the few words of kernels that mean one thing on a device and another in the emulation (test/cuda/emulated.h).
 */
#ifndef MILLM_CUDA_DEVICE_H
#define MILLM_CUDA_DEVICE_H

#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>

namespace wmma = nvcuda::wmma;
typedef __nv_bfloat16 bf16;
typedef __half f16;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAS_TENSOR_CORES		/* of bfloat16, and copies to shared memory that nobody waits for */
#endif

#define SHARED(type, name, n) __shared__ __align__(32) type name[n]	/* as matrices of warps want it */
/* The one that the launch brings, of so many bytes that only it can: cudaFuncAttributeMaxDynamicSharedMemorySize */
extern __shared__ __align__(32) char launched_shared[];
#define LAUNCHED_SHARED(type, name, n) type *const name = (type *) launched_shared

/* overlaps: it may begin while the kernel in front of it runs, and calls after_previous(). */
template <class... Parameters, class... Arguments>
static cudaError_t
start_kernel(void (*kernel) (Parameters...), dim3 blocks, int threads, size_t shared, bool overlaps, cudaStream_t stream, Arguments... arguments)
{
	cudaLaunchAttribute attribute = {};
	cudaLaunchConfig_t config = {};

	attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
	attribute.val.programmaticStreamSerializationAllowed = 1;
	config.gridDim = blocks;
	config.blockDim = dim3((unsigned) threads);
	config.dynamicSmemBytes = shared;
	config.stream = stream;
	config.attrs = &attribute;
	config.numAttrs = overlaps;
	(void) cudaLaunchKernelEx(&config, kernel, arguments...);
	return cudaGetLastError();	/* the launch's, or one that nobody has asked for */
}

/*
 * What every thread of a kernel of a step calls, before any return and before it reads or writes what another kernel of the step writes or reads; before it, it may
 * read weights, and what begin() has brought.
 *
 * From compute capability 9.0 on it may have begun while the one in front of it runs.  Here it waits until that one has ended and what it wrote can be seen;
 * those before it have ended, too, since it has waited likewise: a kernel that ends without waiting would break that.  Only then may the next one begin: its
 * blocks are there when this one's leave room, and no third kernel's are.  After a copy none begins early; behind a kernel that lets nothing begin, a library's,
 * it is when the blocks of that one are done, and what they wrote is still waited for.
 */
static inline __device__ void
after_previous()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
	cudaGridDependencySynchronize();
	cudaTriggerProgrammaticLaunchCompletion();
#endif
}

static __device__ float mul(float a, float b) { return __fmul_rn(a, b); }	/* rounded, never fused */
static __device__ float add(float a, float b) { return __fadd_rn(a, b); }
/* 2^d, to two last bits, or 0 below 2^-126: one instruction, where exp2f has four for such small ones */
static __device__ float exp2_flushed(float d) { float f; asm("ex2.approx.ftz.f32 %0, %1;" : "=f" (f) : "f" (d)); return f; }
static __device__ float as_float(uint32_t u) { return __uint_as_float(u); }
static __device__ uint32_t as_bits(float f) { return __float_as_uint(f); }
static __device__ float from_f16(uint16_t h) { return __half2float(__ushort_as_half(h)); }
static __device__ uint16_t to_f16(float f) { return __half_as_ushort(__float2half_rn(f)); }
static __device__ f16 as_f16(float f) { return __float2half_rn(f); }
static __device__ bf16 as_bf16(float f) { return __float2bfloat16_rn(f); }
static __device__ uint16_t to_bf16(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }

/* Bytes of a (0 to 3) and b (4 to 7), as the digits of selector say, the lowest first. */
static inline __device__ uint32_t byte_perm(uint32_t a, uint32_t b, unsigned selector) { return __byte_perm(a, b, selector); }

/*
 * 8 or 16 bytes of what no kernel writes and this one reads once from its beginning to its end: the L2 asks the memory for 256 bytes at a time, so that more is on its
 * way than registers wait for.  Volatile and not as constants, or the assembler asks for them only behind after_previous().
 */
static inline __device__ uint2
read_once_8(const void *p)
{
	uint2		u = {};

#ifdef HAS_TENSOR_CORES
	asm volatile("ld.global.L1::evict_first.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r" (u.x), "=r" (u.y) : "l" (p));
#endif
	return u;
}

static inline __device__ uint4
read_once_16(const void *p)
{
	uint4		u = {};

#ifdef HAS_TENSOR_CORES
	asm volatile("ld.global.L1::evict_first.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r" (u.x), "=r" (u.y), "=r" (u.z), "=r" (u.w) : "l" (p));
#endif
	return u;
}

/* a - b, each of two bfloat16 */
static inline __device__ uint32_t
subtract_pairs(uint32_t a, uint32_t b)
{
	uint32_t	c = 0;

#ifdef HAS_TENSOR_CORES
	asm("{.reg .b32 one; mov.b32 one, 0xbf80bf80; fma.rn.bf16x2 %0, %1, one, %2;}" : "=r" (c) : "r" (b), "r" (a));
#endif
	return c;
}

/* a + b, and a b, each of two float16 */
static inline __device__ uint32_t
add_f16_pairs(uint32_t a, uint32_t b)
{
	uint32_t	c;

	asm("add.rn.f16x2 %0, %1, %2;" : "=r" (c) : "r" (a), "r" (b));
	return c;
}

static inline __device__ uint32_t
mul_f16_pairs(uint32_t a, uint32_t b)
{
	uint32_t	c;

	asm("mul.rn.f16x2 %0, %1, %2;" : "=r" (c) : "r" (a), "r" (b));
	return c;
}

/* c [16, 8] += a [16, 16] b [16, 8] of float16, each lane's parts of them: mma.m16n8k16 */
static inline __device__ void
mma_f16_16x8x16(float *c, const uint32_t *a, const uint32_t *b)
{
#ifndef HAS_TENSOR_CORES			/* compute capability 7.5 has halves of it */
	for (int k = 0; k < 2; k++)
		asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
			: "+f" (c[0]), "+f" (c[1]), "+f" (c[2]), "+f" (c[3])
			: "r" (a[2 * k]), "r" (a[2 * k + 1]), "r" (b[k]));
#else
	asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
		: "+f" (c[0]), "+f" (c[1]), "+f" (c[2]), "+f" (c[3])
		: "r" (a[0]), "r" (a[1]), "r" (a[2]), "r" (a[3]), "r" (b[0]), "r" (b[1]));
#endif
}

/*
 * This lane's parts of the quarters of 16 rows of 16 float16 in shared memory, pitch apart and each 16-byte aligned: [rows / 8][columns / 8], of the row lane / 4 the elements
 * 2 (lane % 4) and the next.  They are second factors of mma.m16n8k16: the first two of the rows 0 to 7, the others of those from 8 on.
 */
static inline __device__ void
load_quarters(uint32_t *quarters, const f16 *p, int pitch)
{
	const int	lane = (int) threadIdx.x % 32;

	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
				 : "=r" (quarters[0]), "=r" (quarters[1]), "=r" (quarters[2]), "=r" (quarters[3])
				 : "r" ((uint32_t) __cvta_generic_to_shared(p + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8)));
}

/* The same of these rows as columns. */
static inline __device__ void
load_quarters_transposed(uint32_t *quarters, const f16 *p, int pitch)
{
	const int	lane = (int) threadIdx.x % 32;

	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
				 : "=r" (quarters[0]), "=r" (quarters[1]), "=r" (quarters[2]), "=r" (quarters[3])
				 : "r" ((uint32_t) __cvta_generic_to_shared(p + lane % 16 * pitch + lane / 16 * 8)));
}

/* 16 bytes to shared memory, or zeros: on their way until wait_for_copies(), where the device can do so, which waits for this thread's. */
static inline __device__ void
copy_16(void *to, const void *from, bool is_there)
{
#ifdef HAS_TENSOR_CORES
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r" ((uint32_t) __cvta_generic_to_shared(to)), "l" (from), "r" (is_there ? 16 : 0) : "memory");
#else
	*(uint4 *) to = is_there ? *(const uint4 *) from : uint4 {0, 0, 0, 0};
#endif
}

static inline __device__ void
wait_for_copies()
{
#ifdef HAS_TENSOR_CORES
	asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/* The same of bfloat16 */
static inline __device__ void
mma_16x8x16(float *c, const uint32_t *a, const uint32_t *b)
{
#ifdef HAS_TENSOR_CORES
	asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
		: "+f" (c[0]), "+f" (c[1]), "+f" (c[2]), "+f" (c[3])
		: "r" (a[0]), "r" (a[1]), "r" (a[2]), "r" (a[3]), "r" (b[0]), "r" (b[1]));
#endif
}

#endif
