/*
 * gpu_probe.cu -- what this GPU can do right now: what the figures of bench/gpu are shares of.
 *
 *   nvcc -O3 -arch=sm_90 -o build/gpu-probe bench/gpu_probe.cu -ldl
 *   build/gpu-probe [MIB]
 *
 * Copies and reads: buffers of MIB (default 2048, several times any cache), bytes read and written.  Products: bfloat16 with float32 sums, 8192 x 8192 x
 * 8192, random operands (zeros are faster), by cublasGemmEx of libcublas.so.13, opened here; null where the loader does not find it.  Launches: of an
 * empty kernel, each after the other: alone, in a graph, and with a wait for each.  Medians, as one JSON object: GB/s in 1e9 bytes, TFLOP/s in 1e12
 * multiplications and additions, microseconds.  Exit status 1 with the reason when there is no device or a call fails.
 */
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define CHECK(call) check((call), #call)
#define PASSES 11
#define SIDE 8192
#define LAUNCHES 1000

static void
check(cudaError_t status, const char *call)
{
	if (status == cudaSuccess)
		return;
	fprintf(stderr, "gpu-probe: %s in %s\n", cudaGetErrorString(status), call);
	exit(1);
}

__global__ static void
nothing(void)
{
}

/* Each thread 16 bytes at a time, four loads in flight. */
__global__ static void
read_all(const uint4 *x, size_t n, unsigned *sum)
{
	const size_t step = (size_t) gridDim.x * blockDim.x;
	unsigned	s = 0;

	for (size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 4 * step)
	{
		uint4		v[4] = {};

#pragma unroll
		for (int k = 0; k < 4; k++)
			if (i + k * step < n)
				v[k] = __ldcs(&x[i + k * step]);
#pragma unroll
		for (int k = 0; k < 4; k++)
			s ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
	}
	if (s == 12345)				/* what the compiler cannot rule out */
		*sum = s;
}

/* Uniform in [-1, 1). */
__global__ static void
fill_bf16(__nv_bfloat16 *x, size_t n)
{
	for (size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x)
	{
		unsigned	h = (unsigned) i * 2654435761u;

		h = (h ^ h >> 15) * 2246822519u;
		h = (h ^ h >> 13) * 3266489917u;
		x[i] = __float2bfloat16((float) ((h ^ h >> 16) >> 8) * 0x1p-23f - 1);
	}
}

/* Milliseconds of the median pass, the first one aside; work(context) queues one. */
static double
device_ms(void (*work) (void *), void *context)
{
	cudaEvent_t begin, end;
	float		ms[PASSES];

	CHECK(cudaEventCreate(&begin));
	CHECK(cudaEventCreate(&end));
	work(context);
	for (int i = 0; i < PASSES; i++)
	{
		CHECK(cudaEventRecord(begin));
		work(context);
		CHECK(cudaEventRecord(end));
		CHECK(cudaEventSynchronize(end));
		CHECK(cudaEventElapsedTime(&ms[i], begin, end));
	}
	std::sort(ms, ms + PASSES);
	return ms[PASSES / 2];
}

static double
host_us(void (*work) (void *), void *context)
{
	double		us[PASSES];

	work(context);
	for (int i = 0; i < PASSES; i++)
	{
		const auto	start = std::chrono::steady_clock::now();

		work(context);
		us[i] = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
	}
	std::sort(us, us + PASSES);
	return us[PASSES / 2];
}

typedef struct Probe
{
	size_t		bytes;
	char	   *a, *b, *host;	/* [bytes] each; host is page-locked */
	unsigned   *sum;
	cudaStream_t stream;
	cudaGraphExec_t graph;
	void	   *blas;
	int			(*gemm) (void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *, void *, int, int, int, int);
} Probe;

static void
copy(void *context)
{
	const Probe *p = (const Probe *) context;

	CHECK(cudaMemcpyAsync(p->b, p->a, p->bytes, cudaMemcpyDeviceToDevice));
}

static void
upload(void *context)
{
	const Probe *p = (const Probe *) context;

	CHECK(cudaMemcpyAsync(p->a, p->host, p->bytes, cudaMemcpyHostToDevice));
}

static void
read(void *context)
{
	const Probe *p = (const Probe *) context;

	read_all<<<4096, 256>>>((const uint4 *) p->a, p->bytes / sizeof(uint4), p->sum);
	CHECK(cudaGetLastError());
}

static void
multiply(void *context)
{
	const Probe *p = (const Probe *) context;
	const float one = 1, zero = 0;
	const int	bf16 = 14, transposed = 1, plain = 0, sums_f32 = 68, default_way = -1;

	if (p->gemm(p->blas, transposed, plain, SIDE, SIDE, SIDE, &one, p->a, bf16, SIDE, p->a + (size_t) 2 * SIDE * SIDE, bf16, SIDE, &zero, p->b, bf16, SIDE,
				sums_f32, default_way) != 0)
	{
		fprintf(stderr, "gpu-probe: cublasGemmEx failed\n");
		exit(1);
	}
}

static void
launch(void *context)
{
	const Probe *p = (const Probe *) context;

	for (int i = 0; i < LAUNCHES; i++)
		nothing<<<1, 32, 0, p->stream>>>();
	CHECK(cudaStreamSynchronize(p->stream));
}

static void
launch_graph(void *context)
{
	const Probe *p = (const Probe *) context;

	CHECK(cudaGraphLaunch(p->graph, p->stream));
	CHECK(cudaStreamSynchronize(p->stream));
}

static void
launch_and_wait(void *context)
{
	const Probe *p = (const Probe *) context;

	nothing<<<1, 32, 0, p->stream>>>();
	CHECK(cudaStreamSynchronize(p->stream));
}

static void
make_graph(Probe *p)
{
	cudaGraph_t graph;

	CHECK(cudaStreamBeginCapture(p->stream, cudaStreamCaptureModeThreadLocal));
	for (int i = 0; i < LAUNCHES; i++)
		nothing<<<1, 32, 0, p->stream>>>();
	CHECK(cudaStreamEndCapture(p->stream, &graph));
	CHECK(cudaGraphInstantiate(&p->graph, graph, 0));
}

int
main(int argc, char **argv)
{
	const long	mib = argc > 1 ? strtol(argv[1], NULL, 10) : 2048;
	Probe		p = {};
	cudaDeviceProp device;
	int			driver, runtime;
	void	   *library = dlopen("libcublas.so.13", RTLD_NOW);
	int			(*create) (void **) = library ? (int (*) (void **)) dlsym(library, "cublasCreate_v2") : NULL;

	/* what is multiplied needs 128 MB twice in a, and b as much */
	if (mib < 512 || mib > 16384)
	{
		fprintf(stderr, "usage: gpu-probe [MIB(512-16384)]\n");
		return 2;
	}
	p.bytes = (size_t) mib << 20;
	CHECK(cudaGetDeviceProperties(&device, 0));
	CHECK(cudaDriverGetVersion(&driver));
	CHECK(cudaRuntimeGetVersion(&runtime));
	CHECK(cudaMalloc((void **) &p.a, p.bytes));
	CHECK(cudaMalloc((void **) &p.b, p.bytes));
	CHECK(cudaMalloc((void **) &p.sum, sizeof(*p.sum)));
	CHECK(cudaMallocHost((void **) &p.host, p.bytes));
	CHECK(cudaStreamCreateWithFlags(&p.stream, cudaStreamNonBlocking));
	make_graph(&p);
	printf("{\"device\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, \"l2_mb\": %.0f, \"memory_gb\": %.1f, \"cuda_driver\": %d, \"cuda_runtime\": %d, ",
		   device.name, device.major, device.minor, device.multiProcessorCount, device.l2CacheSize / 1e6, (double) device.totalGlobalMem / 1e9, driver, runtime);
	printf("\"upload_gb_per_s\": %.1f, ", (double) p.bytes / 1e6 / device_ms(upload, &p));
	fill_bf16<<<4096, 256>>>((__nv_bfloat16 *) p.a, p.bytes / 2);
	CHECK(cudaGetLastError());
	printf("\"copy_gb_per_s\": %.1f, ", 2 * (double) p.bytes / 1e6 / device_ms(copy, &p));
	printf("\"read_gb_per_s\": %.1f, ", (double) p.bytes / 1e6 / device_ms(read, &p));
	printf("\"launch_us\": %.2f, ", host_us(launch, &p) / LAUNCHES);
	printf("\"graph_launch_us\": %.2f, ", host_us(launch_graph, &p) / LAUNCHES);
	printf("\"launch_and_wait_us\": %.2f, ", host_us(launch_and_wait, &p));
	if (create)
		p.gemm = (decltype(p.gemm)) dlsym(library, "cublasGemmEx");
	if (p.gemm && create(&p.blas) == 0)
		printf("\"bf16_tflop_per_s\": %.1f}\n", 2.0 * SIDE * SIDE * SIDE / 1e9 / device_ms(multiply, &p));
	else
		printf("\"bf16_tflop_per_s\": null}\n");
	return 0;
}
