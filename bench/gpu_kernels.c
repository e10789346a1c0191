/*
 * gpu_kernels.c -- how near the memory's speed each product and attention of a decoding step comes on this GPU, kernel by kernel: what bench/gpu --stage kernels runs.
 *
 *   gpu-kernels [tiny]
 *
 * Matrices of Llama-3.1-8B, and its heads and gemma-2-2b's (tiny: far smaller ones, once, to try the program out on the emulated device), each of them as often as memory of MEMORY_MB takes it, so that no
 * cache holds what comes next; one launch for each, as one graph, REPEATS of it queued before the host waits, the median of PASSES.  A JSON object a line: kernel, dtype, n_out, n_in, rows of
 * x, whether a kernel may begin before the one in front has ended, microseconds, and GB/s (1e9) of the weights alone, or for attention of keys and values.
 * Exit status 1 with the reason when a call fails, or attention is not its sibling's.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "kernels.h"

#define MEMORY_MB 1024
#define PASSES 9
#define REPEATS 8				/* of a graph: what starts it and wakes the host up is little beside them */
#define CHECK(call) check((call), #call)
/* Relative RMS between attention's results on tensor cores and its sibling's: sums in another order; int8: what float16 does not hold of a code times its scale, too */
#define TOLERANCE 5e-5
#define TOLERANCE_INT8 1e-3

static int	n_passes = PASSES,
			n_repeats = REPEATS;

static void
check(cudaError_t status, const char *call)
{
	if (status == cudaSuccess)
		return;
	fprintf(stderr, "gpu-kernels: %s in %s\n", cudaGetErrorString(status), call);
	exit(1);
}

/* ---- launches: no queue, they are started as they come ---- */

struct MillmCudaQueue
{
	cudaStream_t stream;
	bool		overlaps;
};

cudaError_t
millm_cuda_queue(MillmCudaQueue *q, MillmCudaStart start, const void *launch, size_t bytes)
{
	(void) bytes;
	return start(launch, q->overlaps, q->stream);
}

/* ---- what is measured ---- */

typedef struct Job
{
	const char *kernel;
	MillmCudaMatmul *matmuls;	/* [n], of equal shape */
	MillmCudaAttention *attention;	/* [n]; NULL: products */
	int			n;
	int			n_rows;
	int			n_splits;
	MillmRows	y, q;
	MillmCudaFragments fragments;
	float	   *partials;		/* attention's */
	const MillmCudaSkinny *skinny;
} Job;

static cudaError_t
launch(const Job *job, int i, MillmCudaQueue *queue)
{
	static const MillmCudaFragments none;

	if (job->attention)
		return (strcmp(job->kernel, "split") == 0 ? millm_cuda_attention_split : millm_cuda_attention_fragments)
			(&job->attention[i], job->y, &none, job->q, job->partials, job->n_splits, job->n_rows, queue);
	if (strcmp(job->kernel, "skinny") == 0)
		return millm_cuda_matmul_skinny(job->skinny, &job->matmuls[i], 1, &job->fragments, queue);
	if (strcmp(job->kernel, "few") == 0)
		return millm_cuda_matmul_few(&job->matmuls[i], 1, queue);
	return millm_cuda_matmul_tensor(&job->matmuls[i], queue);
}

static int
by_size(const void *a, const void *b)
{
	return (*(const double *) a > *(const double *) b) - (*(const double *) a < *(const double *) b);
}

/* Microseconds of a launch of the job: of the median graph */
static double
measure(const Job *job, bool overlaps, cudaStream_t stream)
{
	MillmCudaQueue queue = {stream, overlaps};
	cudaGraph_t graph;
	cudaGraphExec_t exec;
	double		us[PASSES];

	CHECK(launch(job, 0, &queue));	/* brings the kernel to the device */
	CHECK(cudaStreamSynchronize(stream));
	CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
	for (int i = 0; i < job->n; i++)
		CHECK(launch(job, i, &queue));
	CHECK(cudaStreamEndCapture(stream, &graph));
	CHECK(cudaGraphInstantiate(&exec, graph, 0));
	for (int pass = -1; pass < n_passes; pass++)
	{
		int64_t		begin;

		CHECK(cudaStreamSynchronize(stream));
		begin = millm_now_us();
		for (int i = 0; i < n_repeats; i++)
			CHECK(cudaGraphLaunch(exec, stream));
		CHECK(cudaStreamSynchronize(stream));
		if (pass >= 0)			/* the first brings the graph to the device */
			us[pass] = (double) (millm_now_us() - begin) / n_repeats / job->n;
	}
	CHECK(cudaGraphExecDestroy(exec));
	CHECK(cudaGraphDestroy(graph));
	qsort(us, (size_t) n_passes, sizeof(us[0]), by_size);
	return us[n_passes / 2];
}

/* ---- memory ---- */

/* Device memory of random bfloat16 in [-1, 1), which are such floats, too, and bytes of other formats; or of zeros */
static void *
device_memory(int64_t bytes, bool is_random, cudaStream_t stream)
{
	enum {PIECE = 1 << 20};
	static uint16_t piece[PIECE];
	uint32_t	state = 1;
	char	   *p;

	CHECK(cudaMalloc((void **) &p, (size_t) bytes));
	CHECK(cudaMemsetAsync(p, 0, (size_t) bytes, stream));
	for (int i = 0; i < PIECE && is_random; i++)
	{
		state = state * 1664525 + 1013904223;
		piece[i] = (uint16_t) ((state >> 31 << 15) | (0x3c00 + (state >> 8) % 0x380));
	}
	for (int64_t at = 0; at < bytes && is_random; at += (int64_t) sizeof(piece))
		CHECK(cudaMemcpyAsync(p + at, piece, bytes - at < (int64_t) sizeof(piece) ? (size_t) (bytes - at) : sizeof(piece), cudaMemcpyHostToDevice, stream));
	CHECK(cudaStreamSynchronize(stream));
	return p;
}

static void *
to_device(const void *from, size_t bytes, cudaStream_t stream)
{
	void	   *p;

	CHECK(cudaMalloc(&p, bytes));
	CHECK(cudaMemcpyAsync(p, from, bytes, cudaMemcpyHostToDevice, stream));
	CHECK(cudaStreamSynchronize(stream));
	return p;
}

/* ---- products ---- */

static const char *
name_of(MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? "BF16" : dtype == MILLM_INT8 ? "INT8" : "NF4";
}

static void
products(MillmDtype dtype, int64_t n_out, int64_t n_in, int64_t memory, cudaStream_t stream)
{
	static const int rows[] = {1, 2, 4, 8, 16, 32, 64};
	const int64_t bytes = dtype == MILLM_BF16 ? n_out * n_in * 2 : dtype == MILLM_INT8 ? n_out * n_in : n_out * n_in / 2;
	const int64_t n_blocks = dtype == MILLM_4BIT ? n_out * n_in / 64 : 0;
	const int	n = memory / bytes < 4 ? 4 : memory / bytes < 256 ? (int) (memory / bytes) : 256;
	char	   *weights = device_memory(n * bytes, true, stream);
	char	   *absmax = device_memory(n * n_blocks + 16, true, stream);
	float	   *floats = device_memory((n_out + n_in + n_blocks / 256 + 1024) * 4, true, stream);
	float	   *y = device_memory(64 * n_out * 4, false, stream),
			   *x = device_memory(64 * n_in * 4, true, stream);
	MillmCudaSkinny skinny = {.partials = device_memory(MILLM_CUDA_SKINNY_PARTIALS * 4, false, stream)};
	void	   *fragments = device_memory(millm_cuda_fragment_bytes(n_in, MILLM_CUDA_FRAGMENT_ROWS, true), true, stream);
	MillmCudaMatmul *m = calloc((size_t) n, sizeof(*m));

	if (!m)
		exit(1);
	CHECK(millm_cuda_skinny_prepare(&skinny));
	for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++)
	{
		const bool	is_few = rows[r] <= MILLM_CUDA_SKINNY_ROWS;
		const char *kernels[] = {"skinny", is_few ? "few" : "tensor"};
		Job			job = {.matmuls = m, .n = n, .n_rows = rows[r], .skinny = &skinny,
			.fragments = {.data = fragments, .n_blocks = n_in / 64, .has_low = is_few}};

		for (int i = 0; i < n; i++)
			m[i] = (MillmCudaMatmul) {
				.y = {y, n_out}, .x = {x, n_in}, .n = rows[r],
				.w = {.n_out = n_out, .n_in = n_in, .data = weights + i * bytes, .row_bytes = dtype == MILLM_BF16 ? 2 * n_in : n_in, .scale = floats, .dtype = dtype,
					.has_chunks = 1, .codebook = floats, .codebook_unit = 1, .codebook_scale = 1, .absmax = absmax + i * n_blocks, .nested_absmax = floats, .nested_map = floats, .block_shift = 6, .nested_shift = 8,
					.rounded = MILLM_BF16},
			};
		for (int k = 0; k < 2; k++)
			for (int overlaps = 0; overlaps < 2; overlaps++)
			{
				double		us;

				job.kernel = kernels[k];
				us = measure(&job, overlaps, stream);
				printf("{\"kernel\": \"%s\", \"dtype\": \"%s\", \"n_out\": %" PRId64 ", \"n_in\": %" PRId64 ", \"rows\": %d, \"overlaps\": %s, \"us\": %.2f, "
					   "\"gb_per_s\": %.0f}\n", job.kernel, name_of(dtype), n_out, n_in, rows[r], overlaps ? "true" : "false", us,
					   (double) (bytes + n_blocks) / 1e3 / us);
				fflush(stdout);
			}
	}
	free(m);
	CHECK(cudaFree(weights));
	CHECK(cudaFree(absmax));
	CHECK(cudaFree(floats));
	CHECK(cudaFree(y));
	CHECK(cudaFree(x));
	CHECK(cudaFree(skinny.partials));
	CHECK(cudaFree(fragments));
}

/* ---- attention ---- */

typedef struct Heads
{
	int			n, n_kv, dim;
} Heads;

/* On tensor cores, and its sibling, whose results these must be */
static void
attention(const Heads *heads, MillmDtype dtype, int n_sequences, int context, int64_t memory, cudaStream_t stream)
{
	static const char *const kernels[] = {"fragments", "split"};
	const int	dim = heads->dim;
	const int64_t width = (int64_t) heads->n * dim;
	const int64_t n_values = n_sequences * width;
	const int64_t page_bytes = (int64_t) 2 * heads->n_kv * MILLM_CUDA_PAGE * (dtype == MILLM_INT8 ? dim + 2 * MILLM_KV_BLOCKS(dim) : 2 * dim);
	const int	n_entries = (context + MILLM_CUDA_PAGE - 1) / MILLM_CUDA_PAGE;
	const int64_t bytes = n_sequences * n_entries * page_bytes;	/* of a layer */
	const int	n = memory / bytes < 2 ? 2 : (int) (memory / bytes);
	const int64_t of_split = heads->n * (MILLM_CUDA_PARTIAL + (int64_t) dim);
	char	   *kv = device_memory(n * bytes, true, stream);
	float	   *q = device_memory(n_values * 4, true, stream),
			   *y = device_memory(n_values * 4, false, stream),
			   *partials = device_memory((int64_t) n_sequences * MILLM_CUDA_SPLITS * of_split * 4, false, stream);
	int32_t    *tables = malloc((size_t) n_sequences * (size_t) n_entries * 4),
			   *positions = malloc((size_t) n_sequences * 4),
			   *table_of = malloc((size_t) n_sequences * 4);
	int32_t    *on_device[3];
	MillmCudaAttention *a = calloc((size_t) n, sizeof(*a));
	float	   *results[2] = {malloc((size_t) n_values * 4), malloc((size_t) n_values * 4)};
	Job			job = {.attention = a, .n = n, .n_rows = n_sequences, .n_splits = 1, .y = {y, width}, .q = {q, width}, .partials = partials};
	double		differs = 0,
				all = 0;

	if (!tables || !positions || !table_of || !a || !results[0] || !results[1])
		exit(1);
	for (int s = 0; s < n_sequences; s++)
	{
		positions[s] = context - 1;
		table_of[s] = s * n_entries;
		for (int e = 0; e < n_entries; e++)
			tables[s * n_entries + e] = e * n_sequences + s;
	}
	on_device[0] = to_device(tables, (size_t) n_sequences * (size_t) n_entries * 4, stream);
	on_device[1] = to_device(positions, (size_t) n_sequences * 4, stream);
	on_device[2] = to_device(table_of, (size_t) n_sequences * 4, stream);
	while (job.n_splits < millm_cuda_splits(context - 1, 0))
		job.n_splits = job.n_splits * 2 < MILLM_CUDA_SPLITS ? job.n_splits * 2 : MILLM_CUDA_SPLITS;
	for (int i = 0; i < n; i++)
		a[i] = (MillmCudaAttention) {.kv = kv + i * bytes, .page_bytes = page_bytes, .positions = on_device[1], .tables = on_device[0], .table_of = on_device[2],
			.kv_dtype = dtype, .n_groups = 1, .n_heads = heads->n, .n_kv_heads = heads->n_kv, .head_dim = dim, .scale = dtype == MILLM_INT8 ? 1e-3f : 0.088f};	/* scores are about 1 */
	for (int k = 0; k < 2; k++)
	{
		job.kernel = kernels[k];
		for (int overlaps = 0; overlaps < 2; overlaps++)
		{
			const double us = measure(&job, overlaps, stream);

			printf("{\"kernel\": \"%s\", \"dtype\": \"%s\", \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, \"sequences\": %d, \"context\": %d, \"overlaps\": %s, "
				   "\"us\": %.2f, \"gb_per_s\": %.0f}\n", job.kernel, dtype == MILLM_INT8 ? "INT8" : "F16", heads->n, heads->n_kv, dim, n_sequences, context,
				   overlaps ? "true" : "false", us, (double) bytes / 1e3 / us);
			fflush(stdout);
		}
		CHECK(cudaMemcpyAsync(results[k], y, (size_t) n_values * 4, cudaMemcpyDeviceToHost, stream));
		CHECK(cudaStreamSynchronize(stream));
	}
	for (int64_t i = 0; i < n_values; i++)
	{
		differs += ((double) results[0][i] - (double) results[1][i]) * ((double) results[0][i] - (double) results[1][i]);
		all += (double) results[1][i] * (double) results[1][i];
	}
	if (!(sqrt(differs / all) <= (dtype == MILLM_INT8 ? TOLERANCE_INT8 : TOLERANCE)))
	{
		fprintf(stderr, "gpu-kernels: attention of %d heads of %d dims over %d keys is wrong: on tensor cores it differs by %g, relative RMS\n", heads->n, dim, context,
				sqrt(differs / all));
		exit(1);
	}
	free(tables);
	free(positions);
	free(table_of);
	free(a);
	free(results[0]);
	free(results[1]);
	for (int i = 0; i < 3; i++)
		CHECK(cudaFree(on_device[i]));
	CHECK(cudaFree(kv));
	CHECK(cudaFree(q));
	CHECK(cudaFree(y));
	CHECK(cudaFree(partials));
}

int
main(int argc, char **argv)
{
	const bool	is_tiny = argc == 2 && strcmp(argv[1], "tiny") == 0;
	const int64_t memory = is_tiny ? 1 : (int64_t) MEMORY_MB << 20;
	const int	by = is_tiny ? 32 : 1;
	const MillmDtype dtypes[] = {MILLM_4BIT, MILLM_BF16, MILLM_INT8};
	const Heads llama = {32, 8, 128},
				gemma = {8, 4, 256};
	cudaStream_t stream;
	int			capability;

	if (argc > 1 && !is_tiny)
	{
		fprintf(stderr, "usage: gpu-kernels [tiny]\n");
		return 2;
	}
	if (is_tiny)
		n_passes = n_repeats = 1;
	CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
	CHECK(millm_cuda_compiled_for(&capability));
	if (capability < 90)
	{
		fprintf(stderr, "gpu-kernels: its kernels were compiled for %d.%d, which has no programmatic launches\n", capability / 10, capability % 10);
		return 1;
	}
	for (int d = 0; d < 3; d++)
	{
		products(dtypes[d], 4096 / by, 4096 / by, memory, stream);	/* o */
		products(dtypes[d], 6144 / by, 4096 / by, memory, stream);	/* q, k and v */
		products(dtypes[d], 14336 / by, 4096 / by, memory, stream);	/* gate, up */
		products(dtypes[d], 4096 / by, 14336 / by, memory, stream);	/* down */
	}
	products(MILLM_BF16, 128256 / by, 4096 / by, memory, stream);	/* head */
	for (int i = 0; i < 2; i++)
	{
		const MillmDtype dtype = i == 0 ? MILLM_F16 : MILLM_INT8;

		attention(&llama, dtype, 1, 1024 / by, memory, stream);
		attention(&llama, dtype, 1, 32768 / by, memory, stream);
		attention(&llama, dtype, 64 / by, 1024 / by, memory, stream);
		attention(&gemma, dtype, 1, 8192 / by, memory, stream);
	}
	CHECK(cudaStreamDestroy(stream));
	return 0;
}
