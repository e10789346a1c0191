/*
 * backend_cuda.c -- a GPU: weights and KV cache in its memory, operations queued on one stream.
 *
 * Owns:     the stream, the weights' copy, the buffers, the bytes of the KV pages, what a step brings along.
 * Borrows:  the model and, for a step, positions and page tables.
 * Does not: know what a layer is made of (forward.c), whose a page is (kv.c), or how a sum is computed (kernels.cu).
 *
 * Results are waited for where the host reads them: once a step, in first_bad(), and in buffer_read() of what was not fetched.  Once the backend exists a call of CUDA
 * that fails means that the device is broken or the kernels are; the process ends with the reason (MillmCudaHost), and its successor gets a new context.
 *
 * KV pages: for each layer of a group K, then V [n_kv_heads, 16, head_dim]: a warp reads one key side by side.  They are float16, but float32
 * for the obvious kernels, as the CPU's ref has them, and for a model that is stored in float32: whoever stores 32 bits wants them.
 */
#include "backend_cuda.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "arith.h"
#include "blas.h"
#include "clock.h"
#include "device_memory.h"
#include "experts.h"
#include "faults.h"
#include "fetch.h"
#include "kernels.h"
#include "weights.h"

#define ROW_ALIGNMENT 32		/* floats: rows of a buffer begin at cache lines */
#define PART_ALIGNMENT 64		/* bytes: of what a step brings along */
#define LAYER_ALIGNMENT 256
#define MAX_TOKENS 65535		/* rows that a launch can have */
#define PARTIALS (4 << 20)		/* floats of attention's workspace: they stay in the L2 cache of what has one of 20 MB or more */
#define TILED_ROWS 17			/* of a sequence, from which on they are computed together: more than the longest draft has */
#define KEPT_ROWS 64			/* of a step whose launches may become a graph: decode, and the ends of prompts */

struct MillmBuffer
{
	MillmRows	rows;			/* [n_rows, n_columns] */
	int64_t		n_columns;
	int			n_written;		/* rows that the last operation wrote: what there is to read */
	bool		is_elsewhere;	/* they are not in rows, but only where cuBLASLt reads them, until others are (kept) */
	float	   *host;			/* [n_rows, n_columns]; NULL: it is never read */
	size_t		host_bytes;
	size_t		locked_bytes;	/* of the host's, which copies need not stage */
	bool		cannot_lock;
	MillmBuffer *next;
};

/* What a step brings to the device in one copy, part after part. */
typedef struct Parcel
{
	char	   *host;			/* page-locked: the copy reads it until the stream was waited for */
	char	   *device;
	int64_t		used;
} Parcel;

typedef struct CudaBackend
{
	MillmBackend base;			/* first: the backend is this */
	const MillmModel *model;
	cudaStream_t stream;
	MillmCudaQueue *queue;
	MillmCudaWeights *weights;
	MillmBuffer *buffers;
	bool		is_plain;		/* the obvious kernels only */
	bool		has_tensor_cores;	/* of bfloat16 */
	bool		overlaps;		/* a kernel may begin before the one in front of it has ended */
	bool		deterministic;
	/* KV */
	char	   *kv;				/* [n_pages, page_bytes] */
	MillmDtype	kv_dtype;
	int64_t		page_bytes;
	int64_t		layer_bytes;
	/* the step */
	Parcel		parcel;
	int			n_groups;
	int64_t		max_entries;	/* of its page tables */
	int			n_pairs;
	float	   *frequencies;	/* [n_pairs], of a length */
	const int32_t *const *pages;	/* [n, n_groups], the forward pass's */
	const int32_t *positions;	/* these are the device's, in the parcel */
	const int32_t *tables;
	const int32_t *table_of;
	const float *cosine[2],		/* of the model's rope, and the local one */
			   *sine[2];
	/* an operation's */
	int		   *bad_place;		/* [1]; the step's */
	MillmBuffer *unchecked;		/* [n_unchecked rows]: a norm of it, if that is what comes next, does the check on its way; NULL: none */
	int			n_unchecked;
	int			place_unchecked;
	int		   *arrived_place;	/* [1], page-locked: the same, here */
	bool		is_idle;		/* no copy to or from what is page-locked is under way */
	float	   *partials;		/* [n_partials]: of attention, a split of a row's keys each */
	int64_t		n_partials;
	uint16_t   *fragments;		/* of few rows of up to widest values; NULL: our kernels do not want them.  Those of many are in blas */
	int64_t		widest;
	MillmCudaSkinny skinny;		/* without partials where deterministic */
	const MillmBuffer *kept;	/* whose rows the fragments are, here or in blas; NULL: nobody's */
	int			n_kept;			/* rows of it */
	int64_t		n_kept_blocks;
	MillmCudaFetch *fetch;
	MillmCudaBlas *blas;		/* NULL: our own kernels only */
	MillmCudaExperts *experts;	/* NULL: the model has none, or for the obvious kernels */
	bool		host_routes;	/* between the launches of a step: no two lists would be the same */
	bool		all_round;		/* products of many rows round them to bfloat16, whichever weights they are with */
	MillmBuffer *fetched;		/* by the step; NULL: none yet */
	int64_t		n_waits;
	int64_t		wait_us;
} CudaBackend;

static const MillmCudaHost *host;

void
millm_cuda_set_host(const MillmCudaHost *h)
{
	host = h;
}

static CudaBackend *
cuda(MillmBackend *be)
{
	return (CudaBackend *) be;
}

/* ---- errors ---- */

static void
check(cudaError_t status, const char *call, int line)
{
	MillmError	err;

	if (status == cudaSuccess)
		return;
	millm_fail(&err, MILLM_E_INTERNAL, "the CUDA device has failed: %s", cudaGetErrorString(status));
	millm_detail(&err, "%s, seen at %s:%d in %.200s", cudaGetErrorName(status), __FILE__, line, call);
	host->fault(&err);
}
#define CHECK(call) check((call), #call, __LINE__)

/* ---- memory ---- */

static int64_t
round_up(int64_t n, int64_t to)
{
	return (n + to - 1) / to * to;
}

/* NULL, "" or "ref": the obvious kernels. */
static bool
are_kernels(const char *name)
{
	return !name || !*name || strcmp(name, "ref") == 0;
}

static bool
are_plain(const char *name)
{
	return name && strcmp(name, "ref") == 0;
}

/* Is there a layer that is not stored in float32, so that these kernels may round? */
static bool
may_round(const MillmModel *model, const char *kernels)
{
	for (int i = 0; i < model->config.n_layers && !are_plain(kernels); i++)
		if (model->layers[i].o.dtype != MILLM_F32)
			return true;
	return false;
}

static MillmDtype
kv_dtype(const MillmModel *model, const char *kernels, MillmKvFormat format)
{
	return format == MILLM_KV_INT8 ? MILLM_INT8 : may_round(model, kernels) ? MILLM_F16 : MILLM_F32;
}

static int64_t
layer_bytes(const MillmModel *model, MillmDtype dtype)
{
	int64_t		largest = 0;

	for (int i = 0; i < model->config.n_layers; i++)
	{
		/* bounded by MILLM_MAX_HEADS and MILLM_MAX_HEAD_DIM: no overflow */
		const int	head_dim = model->layers[i].head_dim;
		const int64_t of_head = millm_weight_bytes(dtype, head_dim) + (dtype == MILLM_INT8 ? 2 * MILLM_KV_BLOCKS(head_dim) : 0);
		const int64_t bytes = 2 * model->layers[i].n_kv_heads * MILLM_CUDA_PAGE * of_head;

		largest = bytes > largest ? bytes : largest;
	}
	return round_up(largest, LAYER_ALIGNMENT);
}

int64_t
millm_cuda_page_bytes(const MillmModel *model, const char *kernels, MillmKvFormat format, int layers_per_page)
{
	return are_kernels(kernels) ? layers_per_page * layer_bytes(model, kv_dtype(model, kernels, format)) : -1;
}

int64_t
millm_cuda_buffer_bytes(int64_t n_rows, int64_t n_columns)
{
	return n_rows * round_up(n_columns, ROW_ALIGNMENT) * (int64_t) sizeof(float);
}

/* What a step of n tokens brings along at most. */
static int64_t
parcel_bytes(const MillmModel *model, int64_t n, int n_groups, int64_t max_entries)
{
	const int	n_ropes = model->config.local_rope.inv_freq ? 2 : 1;
	const int64_t angles = model->config.position == MILLM_POS_ROPE ? (int64_t) n_ropes * model->config.rotary_dim : 0;

	return (n * (1 + n_groups + angles) + max_entries) * 4 + 5 * PART_ALIGNMENT;
}

/* Is this head size one that is read 16 bytes at a time? */
static bool
is_chunked(int head_dim)
{
	return head_dim % 8 == 0 && head_dim <= MILLM_CUDA_MAX_CHUNKED_HEAD;
}

/* Splits of a launch whose rows have at most so many: a power of two, so that a sequence that grows has a graph for long. */
static int
splits_of_launch(int64_t n_splits)
{
	int			n = 1;

	while (n < n_splits && n < MILLM_CUDA_SPLITS)
		n = n * 2 < MILLM_CUDA_SPLITS ? n * 2 : MILLM_CUDA_SPLITS;
	return n;
}

/* Floats for partial softmaxes: for all rows of a step, but not more than fit into a cache; one row at least */
static int64_t
n_partials(const MillmModel *model, const MillmBackendOptions *o)
{
	/* of the shortest spans a row has most; and a window may begin within one */
	const int64_t of_split = splits_of_launch(o->max_entries * MILLM_CUDA_PAGE / MILLM_CUDA_SPLIT_KEYS + 2);
	int64_t		largest = 0;

	for (int i = 0; i < model->config.n_layers && !are_plain(o->kernels); i++)
	{
		const MillmLayer *l = &model->layers[i];
		/* bounded by MILLM_MAX_HEADS: no overflow */
		const int64_t of_row = is_chunked(l->head_dim) ? of_split * l->n_heads * (MILLM_CUDA_PARTIAL + l->head_dim) : 0;

		largest = of_row > largest ? of_row : largest;
	}
	return largest * o->max_tokens < PARTIALS ? largest * o->max_tokens : largest < PARTIALS ? PARTIALS : largest;
}

/* The widest row of a weight that many rows are multiplied with */
static int64_t
widest_row(const MillmModel *model)
{
	int64_t		widest = model->head.n_in;

	for (int i = 0; i < model->config.n_layers; i++)
	{
		const MillmLayer *l = &model->layers[i];
		const MillmWeight *weights[] = {&l->q, &l->qkv, &l->o, &l->up, &l->down, &l->shared.up, &l->shared.down,
			l->experts ? &l->experts[0].up : &l->up, l->experts ? &l->experts[0].down : &l->down};

		for (size_t w = 0; w < sizeof(weights) / sizeof(weights[0]); w++)
			widest = weights[w]->n_in > widest ? weights[w]->n_in : widest;
	}
	return widest;
}

/* Products of many rows go through cuBLASLt, in bfloat16: not where bits must be the same in every company, nor of what is stored in float32. */
static bool
wants_blas(const MillmModel *model, const MillmBackendOptions *o)
{
	return !are_plain(o->kernels) && !o->deterministic && o->max_tokens > KEPT_ROWS && may_round(model, o->kernels) && millm_cuda_blas_is_there();
}

/* Fragments of the rows of a product on our tensor kernels */
static int64_t
fragment_bytes(const MillmModel *model, const MillmBackendOptions *o)
{
	return are_plain(o->kernels) ? 0 : millm_cuda_fragment_bytes(widest_row(model), MILLM_CUDA_FRAGMENT_ROWS, o->deterministic);
}

/* And the parts of their sums */
static int64_t
product_partials_bytes(const MillmBackendOptions *o)
{
	return are_plain(o->kernels) || o->deterministic ? 0 : MILLM_CUDA_SKINNY_PARTIALS * (int64_t) sizeof(float);
}

/* On a device without tensor cores for bfloat16 a little less. */
int64_t
millm_cuda_own_bytes(const MillmModel *model, const MillmBackendOptions *o)
{
	return parcel_bytes(model, o->max_tokens, o->n_groups, o->max_entries) + (int64_t) millm_cuda_queue_bytes(o->max_tokens) +
		n_partials(model, o) * (int64_t) sizeof(float) + fragment_bytes(model, o) + product_partials_bytes(o) +
		millm_cuda_fetch_bytes(model->config.vocab_size, o->max_tokens) +
		(are_plain(o->kernels) ? 0 : millm_cuda_experts_bytes(model, o->max_tokens)) +
		(wants_blas(model, o) ? millm_cuda_blas_bytes(widest_row(model), o->max_tokens) : 0);
}

static MillmCode
buffer_create(MillmBackend *be, int64_t n_rows, int64_t n_columns, bool is_read, MillmBuffer **out, MillmError *err)
{
	CudaBackend *c = cuda(be);
	MillmBuffer *b = calloc(1, sizeof(*b));

	if (!b)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	b->n_columns = n_columns;
	b->rows.stride = round_up(n_columns, ROW_ALIGNMENT);
	b->next = c->buffers;
	c->buffers = b;				/* whatever of it there is, cuda_free() gives back */
	if (is_read)
	{
		const size_t bytes = (size_t) (n_rows * n_columns) * sizeof(float);
		void	   *rows = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (rows == MAP_FAILED)
			return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory for %zu bytes that the device answers: %s", bytes, strerror(errno));
		b->host = rows;
		b->host_bytes = bytes;
	}
	*out = b;
	return millm_cuda_allocate(&b->rows.data, millm_cuda_buffer_bytes(n_rows, n_columns), "the workspace", c->stream, err);
}

/*
 * The rows of a buffer, for the next launch to read.  Those that were left for cuBLASLt alone come back from there, rounded, which costs what leaving them
 * there saved: it is for what a product cannot do so.
 */
static MillmRows
rows_of(CudaBackend *c, MillmBuffer *x)
{
	MillmCudaFragments there;
	MillmError	err;

	if (!x->is_elsewhere)
		return x->rows;
	if (c->kept != x)
	{
		millm_fail(&err, MILLM_E_INTERNAL, "activations are read after others have taken their place");
		host->fault(&err);
	}
	there = millm_cuda_blas_rows(c->blas, c->n_kept_blocks * 64, c->n_kept);
	CHECK(millm_cuda_from_rows(x->rows, &there, c->n_kept_blocks * 64, c->n_kept, c->queue));
	x->is_elsewhere = false;
	return x->rows;
}

/* The queue, for the next launch: a check that has waited for a norm comes first. */
static MillmCudaQueue *
queue_of(CudaBackend *c)
{
	MillmBuffer *x = c->unchecked;

	c->unchecked = NULL;
	if (x)
		CHECK(millm_cuda_find_not_finite(c->bad_place, rows_of(c, x), c->place_unchecked, x->n_columns, c->n_unchecked, c->queue));
	return c->queue;
}

/* The stream, for what is no launch: those that were kept come first. */
static cudaStream_t
stream_of(CudaBackend *c)
{
	CHECK(millm_cuda_queue_flush(queue_of(c)));
	return c->stream;
}

/* Wait for all that was queued: for the host, which reads or writes what it shares with the device. */
static void
wait(CudaBackend *c)
{
	const cudaStream_t stream = stream_of(c);
	const int64_t begin = millm_now_us();

	CHECK(cudaStreamSynchronize(stream));
	c->is_idle = true;
	c->n_waits++;
	c->wait_us += millm_now_us() - begin;
}

/* The first n rows of a buffer are to be read: lock the host's pages of them, and some more.  Where the system refuses, copies are slower, and right. */
static void
prepare_host(MillmBuffer *b, int n)
{
	const size_t bytes = (size_t) (n * b->n_columns) * sizeof(float);

	if (!b->host)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_INTERNAL, "a buffer is read that was not created to be");
		host->fault(&err);
	}
	if (bytes <= b->locked_bytes || b->cannot_lock)
		return;
	if (b->locked_bytes > 0)
		CHECK(cudaHostUnregister(b->host));
	b->locked_bytes = bytes < b->host_bytes / 2 ? 2 * bytes : b->host_bytes;
	if (cudaHostRegister(b->host, b->locked_bytes, cudaHostRegisterDefault) != cudaSuccess)
	{
		(void) cudaGetLastError();	/* or the next launch would report it */
		b->locked_bytes = 0;
		b->cannot_lock = true;
	}
}

static const float *
buffer_read(MillmBackend *be, MillmBuffer *x)
{
	CudaBackend *c = cuda(be);
	const size_t row = (size_t) x->n_columns * sizeof(float);
	MillmRows	from;

	if (x == c->fetched)
	{
		if (!c->is_idle)
			wait(c);
		CHECK(millm_cuda_fetch_finish(c->fetch, c->stream));
		return x->host;
	}
	prepare_host(x, x->n_written);
	from = rows_of(c, x);
	CHECK(cudaMemcpy2DAsync(x->host, row, from.data, (size_t) from.stride * sizeof(float), row, (size_t) x->n_written, cudaMemcpyDeviceToHost,
							stream_of(c)));
	wait(c);
	return x->host;
}

static void
fetch(MillmBackend *be, MillmBuffer *y, const MillmTop *tops, int n)
{
	CudaBackend *c = cuda(be);
	int			n_whole = 0;	/* rows up to the last that crosses so */

	for (int t = 0; t < n; t++)
		if (tops[t].k == 0)
			n_whole = t + 1;
	prepare_host(y, n_whole);
	CHECK(millm_cuda_fetch_queue(c->fetch, y->host, rows_of(c, y), tops, n, queue_of(c), c->stream));
	c->fetched = y;
	c->is_idle = false;
}

static MillmListed
listed(MillmBackend *be, int t)
{
	return millm_cuda_fetch_listed(cuda(be)->fetch, t);
}

static void
cuda_free(MillmBackend *be)
{
	CudaBackend *c = cuda(be);

	while (c->buffers)
	{
		MillmBuffer *b = c->buffers;

		c->buffers = b->next;
		(void) cudaFree(b->rows.data);
		if (b->locked_bytes > 0)
			(void) cudaHostUnregister(b->host);
		if (b->host)
			munmap(b->host, b->host_bytes);
		free(b);
	}
	millm_cuda_experts_free(c->experts);
	millm_cuda_weights_free(c->weights);
	(void) cudaFree(c->kv);
	(void) cudaFree(c->parcel.device);
	(void) cudaFree(c->bad_place);
	(void) cudaFree(c->partials);
	(void) cudaFree(c->fragments);
	(void) cudaFree(c->skinny.partials);
	(void) cudaFreeHost(c->arrived_place);
	(void) cudaFreeHost(c->parcel.host);
	millm_cuda_fetch_free(c->fetch);
	millm_cuda_queue_free(c->queue);
	millm_cuda_blas_free(c->blas);
	if (c->stream)
		(void) cudaStreamDestroy(c->stream);
	free(c->frequencies);
	free(c);
}

static void
copy_page(MillmBackend *be, int32_t dst, int32_t src)
{
	CudaBackend *c = cuda(be);

	CHECK(cudaMemcpyAsync(c->kv + dst * c->page_bytes, c->kv + src * c->page_bytes, (size_t) c->page_bytes, cudaMemcpyDeviceToDevice, stream_of(c)));
}

/* ---- the step ---- */

/* The next bytes of the parcel, for which there is room: their offset. */
static int64_t
parcel_take(Parcel *p, int64_t bytes)
{
	const int64_t at = p->used;

	p->used += round_up(bytes, PART_ALIGNMENT);
	return at;
}

/* cosine, then sine of n tokens: their offset */
static int64_t
pack_angles(CudaBackend *c, const MillmRope *rope, const int32_t *positions, const int32_t *planned_lengths, int n)
{
	const int64_t at = parcel_take(&c->parcel, (int64_t) 2 * n * c->n_pairs * 4);
	float	   *cosine = (float *) (c->parcel.host + at);
	float	   *sine = cosine + (int64_t) n * c->n_pairs;
	const float *inv_freq = NULL;

	for (int t = 0; t < n; t++)
	{
		if (t == 0 || planned_lengths[t] != planned_lengths[t - 1])
			inv_freq = host->rope_frequencies(rope, c->model->config.rotary_dim, planned_lengths[t], c->frequencies);
		for (int j = 0; j < c->n_pairs; j++)
		{
			const float angle = (float) positions[t] * inv_freq[j];

			*cosine++ = cosf(angle) * rope->attention_factor;
			*sine++ = sinf(angle) * rope->attention_factor;
		}
	}
	return at;
}

/* Entries of the table of the tokens [t, end) of a sequence, in one group. */
static int64_t
table_entries(const int32_t *positions, int end)
{
	return positions[end - 1] / MILLM_CUDA_PAGE + 1;
}

/* The first token after t that has another table in this group. */
static int
end_of_table(const int32_t *const *pages, int n_groups, int t, int n)
{
	int			end = t + 1;

	while (end < n && pages[end * n_groups] == pages[t * n_groups])
		end++;
	return end;
}

/* Entries of all tables of a step, for which there is room. */
static int64_t
all_entries(const CudaBackend *c, const int32_t *positions, const int32_t *const *pages, int n)
{
	int64_t		n_entries = 0;
	MillmError	err;

	for (int g = 0; g < c->n_groups; g++)
		for (int t = 0, end; t < n; t = end)
		{
			end = end_of_table(pages + g, c->n_groups, t, n);
			n_entries += table_entries(positions, end);
		}
	if (n_entries > c->max_entries)
	{
		millm_fail(&err, MILLM_E_INTERNAL, "a step has more page tables than there is room for");
		millm_detail(&err, "They have %" PRId64 " entries, room is for %" PRId64 ".", n_entries, c->max_entries);
		host->fault(&err);
	}
	return n_entries;
}

/*
 * The page tables, each as far as its sequence has come, one after the other, and for each token and group where its table begins.
 * Tokens of a sequence are together in the step, and share it.
 */
static void
pack_tables(CudaBackend *c, int32_t *tables, int32_t *table_of, const int32_t *positions, const int32_t *const *pages, int n)
{
	int64_t		n_entries = 0;

	for (int g = 0; g < c->n_groups; g++)
		for (int t = 0, end; t < n; t = end)
		{
			const int32_t *from = pages[t * c->n_groups + g];

			end = end_of_table(pages + g, c->n_groups, t, n);
			memcpy(tables + n_entries, from, (size_t) table_entries(positions, end) * 4);
			for (int i = t; i < end; i++)
				table_of[i * c->n_groups + g] = (int32_t) n_entries;
			n_entries += table_entries(positions, end);
		}
}

/* The tables are the last part, so that where the others are, and these begin, is a matter of n alone, as the launches of a graph want it. */
static void
begin(MillmBackend *be, const int32_t *positions, const int32_t *planned_lengths, const int32_t *const *pages, int n)
{
	CudaBackend *c = cuda(be);
	const MillmRope *ropes[] = {&c->model->config.rope, &c->model->config.local_rope};
	const int64_t n_entries = all_entries(c, positions, pages, n);
	int64_t		at_positions,
				at_tables,
				at_table_of,
				at_angles[2] = {0};

	if (!c->is_idle)			/* a step that was canceled may still read its parcel; what of it was kept is dropped */
		CHECK(cudaStreamSynchronize(c->stream));
	c->is_idle = false;
	c->fetched = NULL;
	c->kept = NULL;
	c->unchecked = NULL;
#ifdef MILLM_FAULTS
	if (millm_fault_is_due("illegal_address"))
		CHECK(millm_cuda_violate(c->stream));
#endif
	millm_cuda_queue_begin(c->queue, n <= KEPT_ROWS && !c->host_routes);
	CHECK(cudaMemsetAsync(c->bad_place, MILLM_CUDA_NO_PLACE & 0xff, sizeof(*c->bad_place), c->stream));
	c->pages = pages;
	c->parcel.used = 0;
	at_positions = parcel_take(&c->parcel, (int64_t) n * 4);
	memcpy(c->parcel.host + at_positions, positions, (size_t) n * 4);
	for (int i = 0; i < 2 && c->n_pairs > 0; i++)
		if (ropes[i]->inv_freq)
			at_angles[i] = pack_angles(c, ropes[i], positions, planned_lengths, n);
	at_table_of = parcel_take(&c->parcel, (int64_t) n * c->n_groups * 4);
	at_tables = parcel_take(&c->parcel, n_entries * 4);
	pack_tables(c, (int32_t *) (c->parcel.host + at_tables), (int32_t *) (c->parcel.host + at_table_of), positions, pages, n);
	CHECK(cudaMemcpyAsync(c->parcel.device, c->parcel.host, (size_t) c->parcel.used, cudaMemcpyHostToDevice, c->stream));
	c->positions = (const int32_t *) (c->parcel.device + at_positions);
	c->tables = (const int32_t *) (c->parcel.device + at_tables);
	c->table_of = (const int32_t *) (c->parcel.device + at_table_of);
	for (int i = 0; i < 2; i++)
	{
		c->cosine[i] = (const float *) (c->parcel.device + at_angles[i]);
		c->sine[i] = c->cosine[i] + (int64_t) n * c->n_pairs;
	}
}

/* n numbers of 4 bytes of the host's for the operation that is queued next; NULL stays NULL. */
static const void *
bring(CudaBackend *c, const void *numbers, int n)
{
	const void *on_device;

	if (!numbers)
		return NULL;
	c->is_idle = false;
	CHECK(millm_cuda_queue_bring(c->queue, numbers, (size_t) n * 4, &on_device));
	return on_device;
}

static const MillmCudaWeight *
weight_of(CudaBackend *c, const MillmWeight *w)
{
	const MillmCudaWeight *found = millm_cuda_weight(c->weights, w);
	MillmError	err;

	if (found)
		return found;
	millm_fail(&err, MILLM_E_INTERNAL, "a weight is not on the device");
	millm_detail(&err, "It has %" PRId64 " x %" PRId64 " values.", w->n_out, w->n_in);
	host->fault(&err);
}

static const float *
vector_of(CudaBackend *c, const float *data)
{
	const float *found = millm_cuda_vector(c->weights, data);
	MillmError	err;

	if (found || !data)
		return found;
	millm_fail(&err, MILLM_E_INTERNAL, "a vector is not on the device");
	host->fault(&err);
}

static const MillmCudaFragments no_fragments;

/* Where an operation leaves the fragments of n rows of so many values: nowhere, if the products of such rows want none. */
static MillmCudaFragments
fragments_of(const CudaBackend *c, int64_t n_columns, int n)
{
	const bool	are_wanted = n <= MILLM_CUDA_FRAGMENT_ROWS && n_columns % 64 == 0 && n_columns <= c->widest;

	if (c->blas && n > KEPT_ROWS)
		return millm_cuda_blas_rows(c->blas, n_columns, n);
	return (MillmCudaFragments) {
		.data = are_wanted ? c->fragments : NULL,
		.n_blocks = n_columns / 64,
		.has_low = c->deterministic || n <= MILLM_CUDA_SKINNY_ROWS,
	};
}

/*
 * The same for what is read by products alone, as backend.h says of norms into another buffer, attention and activations: where cuBLASLt takes their rows, these are all
 * that is written.  Experts read theirs themselves.
 */
static MillmCudaFragments
for_products(const CudaBackend *c, int64_t n_columns, int n)
{
	MillmCudaFragments f = fragments_of(c, n_columns, n);

	f.alone = f.data && f.in_rows && c->all_round && c->model->config.n_experts == 0;
	return f;
}

/* The same of a norm.  Many rows that are normed in place are for products in the families that norm the residual so; in others they are rotated, or added to it. */
static MillmCudaFragments
of_norm(const CudaBackend *c, bool in_place, int n_parts, int64_t n_columns, int n)
{
	const MillmConfig *config = &c->model->config;

	if (n_parts > 1 || (in_place && c->blas && n > KEPT_ROWS && !config->residual_normed && !config->norm_after))
		return no_fragments;
	return in_place ? fragments_of(c, n_columns, n) : for_products(c, n_columns, n);
}

/* The fragments are n rows of y. */
static void
keep(CudaBackend *c, const MillmBuffer *y, const MillmCudaFragments *f, int n)
{
	c->kept = f->data ? y : NULL;
	c->n_kept = n;
	c->n_kept_blocks = f->n_blocks;
}

static bool
are_kept(const CudaBackend *c, const MillmBuffer *x, const MillmCudaFragments *f, int n)
{
	return f->data && c->kept == x && c->n_kept == n && c->n_kept_blocks == f->n_blocks;
}

/* Rows of y are others now. */
static void
changed(CudaBackend *c, const MillmBuffer *y)
{
	if (c->kept == y)
		c->kept = NULL;
}

/* An operation wrote n rows of y, and the fragments of them. */
static void
wrote(CudaBackend *c, MillmBuffer *y, const MillmCudaFragments *f, int n)
{
	y->n_written = n;
	y->is_elsewhere = f->alone;
	changed(c, y);
	if (f->data)
		keep(c, y, f, n);
}

static void
embed(MillmBackend *be, MillmBuffer *y, const MillmWeight *table, const int32_t *rows, bool add, int n)
{
	CudaBackend *c = cuda(be);

	CHECK(millm_cuda_embed(add ? rows_of(c, y) : y->rows, weight_of(c, table), bring(c, rows, n), add, n, queue_of(c)));
	wrote(c, y, &no_fragments, n);
}

static void
norm(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, MillmNorm kind, const MillmVector *weight, const MillmVector *bias, float eps, int n_parts,
	 int64_t n_columns, int n)
{
	CudaBackend *c = cuda(be);
	const bool	checks = c->unchecked == x && c->n_unchecked == n && n_parts * n_columns == x->n_columns;
	const MillmCudaNorm l = {
		.y = y->rows,
		.x = rows_of(c, x),
		.kind = kind,
		.weight = vector_of(c, weight->data),
		.bias = kind == MILLM_NORM_LAYER ? vector_of(c, bias->data) : NULL,
		.weight_stride = weight->n > n_columns ? n_columns : 0,
		.bias_stride = bias->n > n_columns ? n_columns : 0,
		.fragments = of_norm(c, y == x, n_parts, n_columns, n),
		.eps = eps,
		.n_parts = n_parts,
		.n_columns = n_columns,
		.bad_place = checks ? c->bad_place : NULL,
		.place = checks ? c->place_unchecked : 0,
	};

	if (checks)
		c->unchecked = NULL;

	CHECK(c->is_plain ? millm_cuda_norm_any(&l, n, queue_of(c)) : millm_cuda_norm(&l, n, queue_of(c)));
	wrote(c, y, &l.fragments, n);
}

/* All of these products of few rows, which have chunks: MILLM_CUDA_FEW_ROWS rows in a launch, and weights of one format. */
static void
multiply_few(CudaBackend *c, const MillmCudaMatmul *m, int n_matmuls)
{
	for (int i = 0, end; i < n_matmuls; i = end)
	{
		for (end = i + 1; end < n_matmuls && m[end].w.dtype == m[i].w.dtype;)
			end++;
		for (int t = 0; t < m->n; t += MILLM_CUDA_FEW_ROWS)
		{
			MillmCudaMatmul some[MILLM_MAX_PROJECTIONS];

			for (int j = i; j < end; j++)
			{
				some[j] = m[j];
				some[j].y.data += t * m[j].y.stride;
				some[j].x.data += t * m[j].x.stride;
				some[j].n = m->n - t < MILLM_CUDA_FEW_ROWS ? m->n - t : MILLM_CUDA_FEW_ROWS;
			}
			CHECK(millm_cuda_matmul_few(some + i, end - i, queue_of(c)));
		}
	}
}

/* All of these products of x on tensor cores, which can be multiplied so: weights of one format in a launch. */
static void
multiply_skinny(CudaBackend *c, const MillmCudaMatmul *m, int n_matmuls, const MillmBuffer *x)
{
	const int64_t n_in = m->w.n_in;

	for (int t0 = 0; t0 < m->n; t0 += MILLM_CUDA_FRAGMENT_ROWS)
	{
		const int	n = m->n - t0 < MILLM_CUDA_FRAGMENT_ROWS ? m->n - t0 : MILLM_CUDA_FRAGMENT_ROWS;
		const MillmCudaFragments all = fragments_of(c, n_in, n);
		const int	together = all.has_low ? MILLM_CUDA_SKINNY_ROWS : MILLM_CUDA_FRAGMENT_ROWS;

		if (!are_kept(c, x, &all, m->n))
		{
			CHECK(millm_cuda_to_fragments(&all, millm_rows_from(m->x, t0), n_in, n, queue_of(c)));
			keep(c, x, n == m->n ? &all : &no_fragments, n);
		}
		for (int i = 0, end; i < n_matmuls; i = end)
		{
			for (end = i + 1; end < n_matmuls && m[end].w.dtype == m[i].w.dtype;)
				end++;
			for (int t = 0; t < n; t += together)
			{
				MillmCudaMatmul some[MILLM_MAX_PROJECTIONS];
				MillmCudaFragments f = all;

				f.data += millm_cuda_fragment_bytes(n_in, t, all.has_low) / (int64_t) sizeof(*f.data);
				for (int j = i; j < end; j++)
				{
					some[j] = m[j];
					some[j].y = millm_rows_from(m[j].y, t0 + t);
					some[j].n = n - t < together ? n - t : together;
				}
				CHECK(millm_cuda_matmul_skinny(&c->skinny, some + i, end - i, &f, queue_of(c)));
			}
		}
	}
}

/* One product of x, of rows that are not few for our tuned kernels, or by the obvious one */
static void
multiply(CudaBackend *c, const MillmCudaMatmul *m, MillmBuffer *x)
{
	bool		is_done = false;

	if (c->is_plain || !m->w.has_chunks)
	{
		(void) rows_of(c, x);
		CHECK(millm_cuda_matmul_any(m, queue_of(c)));
		return;
	}
	if (c->blas && m->n > KEPT_ROWS)
	{
		const MillmCudaFragments rows = millm_cuda_blas_rows(c->blas, m->w.n_in, m->n);
		const bool	are_there = are_kept(c, x, &rows, m->n);

		if (!are_there)
			(void) rows_of(c, x);
		CHECK(millm_cuda_blas_matmul(c->blas, m, are_there, queue_of(c), c->stream, &is_done));
		if (is_done)
			keep(c, x, &rows, m->n);
	}
	if (!is_done)
	{
		(void) rows_of(c, x);
		CHECK(c->has_tensor_cores ? millm_cuda_matmul_tensor(m, queue_of(c)) : millm_cuda_matmul_many(m, queue_of(c)));
	}
}

static void
matmul(MillmBackend *be, const MillmProjection *p, int n_projections, MillmBuffer *x, int n)
{
	_Static_assert(MILLM_MAX_PROJECTIONS == MILLM_CUDA_MATMULS, "projections of one input are one launch");
	CudaBackend *c = cuda(be);
	MillmCudaMatmul few[MILLM_MAX_PROJECTIONS],
				skinny[MILLM_MAX_PROJECTIONS];
	int			n_few = 0,
				n_skinny = 0;

	for (int i = 0; i < n_projections; i++)
	{
		const MillmCudaMatmul m = {
			.y = p[i].accumulate ? rows_of(c, p[i].y) : p[i].y->rows,
			.w = *weight_of(c, p[i].w),
			.bias = vector_of(c, p[i].bias->data),
			.accumulate = p[i].accumulate,
			.x = x->rows,
			.n = n,
		};
		if (c->fragments && (n <= MILLM_CUDA_FRAGMENT_ROWS || c->deterministic) && m.w.n_in <= c->widest && millm_cuda_is_skinny(&m.w))
			skinny[n_skinny++] = m;
		else if (!c->is_plain && m.w.has_chunks && (n <= MILLM_CUDA_FEW_ROWS || c->deterministic))
			few[n_few++] = m;
		else
			multiply(c, &m, x);
	}
	if (n_few + n_skinny > 0)
		(void) rows_of(c, x);
	if (n_few > 0)
		multiply_few(c, few, n_few);
	if (n_skinny > 0)
		multiply_skinny(c, skinny, n_skinny, x);
	for (int i = 0; i < n_projections; i++)
		wrote(c, p[i].y, &no_fragments, n);
}

static MillmCudaAttention
attention_of(CudaBackend *c, const MillmAttention *a)
{
	const MillmConfig *config = &c->model->config;

	return (MillmCudaAttention) {
		.kv = c->kv + a->page_place * c->layer_bytes,
		.page_bytes = c->page_bytes,
		.kv_dtype = c->kv_dtype,
		.positions = c->positions,
		.tables = c->tables,
		.table_of = c->table_of + a->page_group,
		.n_groups = c->n_groups,
		.n_heads = a->n_heads,
		.n_kv_heads = a->n_kv_heads,
		.head_dim = a->head_dim,
		.window = a->window,
		.scale = a->scale,
		.softcap = a->softcap,
		.sinks = vector_of(c, a->sinks),
		.alibi_slopes = vector_of(c, config->alibi_slopes),
		.alibi_rounded_scale = config->alibi_rounded ? config->attention_scale : 0,
		.n_pairs = a->unrotated ? 0 : c->n_pairs,
		.interleaved = config->rope_interleaved,
		.cosine = c->cosine[a->local],
		.sine = c->sine[a->local],
	};
}

static void
split_qkv(MillmBackend *be, const MillmAttention *a, MillmBuffer *q, MillmBuffer *k, MillmBuffer *v, MillmBuffer *qkv, int n)
{
	CudaBackend *c = cuda(be);
	const MillmCudaAttention d = attention_of(c, a);

	CHECK(millm_cuda_split_qkv(&d, q->rows, k->rows, v->rows, rows_of(c, qkv), n, queue_of(c)));
	wrote(c, q, &no_fragments, n);
	wrote(c, k, &no_fragments, n);
	wrote(c, v, &no_fragments, n);
}

static void
rope_and_store(MillmBackend *be, const MillmAttention *a, MillmBuffer *q, MillmBuffer *k, MillmBuffer *v, int n)
{
	CudaBackend *c = cuda(be);
	const MillmCudaAttention d = attention_of(c, a);

	CHECK(millm_cuda_rope_and_store(&d, rows_of(c, q), rows_of(c, k), rows_of(c, v), n, queue_of(c)));
	changed(c, q);
	changed(c, k);
}

static MillmCudaAttention
attention_from(MillmCudaAttention a, int t)
{
	a.positions += t;
	a.table_of += t * a.n_groups;
	return a;
}

/* The rows [t, n), as many in a launch as there is room for partial softmaxes.  True: one launch had all rows, and left the fragments of y; those in_rows are left by any. */
static bool
attend_one_by_one(CudaBackend *c, MillmCudaAttention a, MillmRows y, const MillmCudaFragments *f, MillmRows q, int t, int n)
{
	const int64_t of_split = (int64_t) a.n_heads * (MILLM_CUDA_PARTIAL + a.head_dim);
	const int32_t *positions = (const int32_t *) c->parcel.host;
	const bool	on_tensor_cores = c->kv_dtype != MILLM_F32 && a.head_dim % 16 == 0;
	const int	begin = t;
	bool		has_all = false;

	for (int end; t < n; t = end)
	{
		MillmCudaAttention some = attention_from(a, t);
		MillmCudaFragments of_some;
		int			n_splits = 1;

		for (end = t; end < n; end++)
		{
			const int	of_row = splits_of_launch(millm_cuda_splits(positions[end], a.window));
			const int	needed = of_row > n_splits ? of_row : n_splits;

			if (end > t && (end + 1 - t) * needed * of_split > c->n_partials)
				break;
			n_splits = needed;
		}
		has_all = t == begin && end == n;
		of_some = f->in_rows ? millm_cuda_fragments_from(*f, t) : has_all ? *f : no_fragments;
		CHECK((on_tensor_cores ? millm_cuda_attention_fragments : millm_cuda_attention_split)
			  (&some, millm_rows_from(y, t), &of_some, millm_rows_from(q, t), c->partials, n_splits, end - t, queue_of(c)));
	}
	return has_all;
}

/* Pieces of prompts by tiles, where a row's bits may depend on its company; what lies between them one by one.  True: f has the fragments of y. */
static bool
attend(CudaBackend *c, MillmCudaAttention a, int group, MillmRows y, const MillmCudaFragments *f, MillmRows q, int n)
{
	const bool	has_tiles = !c->deterministic && c->kv_dtype != MILLM_F32;
	const MillmCudaFragments *of_part = f->in_rows ? f : &no_fragments;
	int			t = 0;			/* rows before it are done */

	for (int begin = 0, end; begin < n && has_tiles; begin = end)
	{
		MillmCudaAttention some = attention_from(a, begin);
		MillmCudaFragments of_tile = millm_cuda_fragments_from(*of_part, begin);

		end = end_of_table(c->pages + group, c->n_groups, begin, n);
		if (end - begin < TILED_ROWS)
			continue;
		(void) attend_one_by_one(c, a, y, of_part, q, t, begin);
		CHECK(millm_cuda_attention_tile(&some, millm_rows_from(y, begin), &of_tile, millm_rows_from(q, begin), end - begin, queue_of(c)));
		t = end;
	}
	return (attend_one_by_one(c, a, y, t == 0 ? f : of_part, q, t, n) && t == 0) || f->in_rows;
}

static void
attention(MillmBackend *be, const MillmAttention *a, MillmBuffer *y, MillmBuffer *q, int n)
{
	CudaBackend *c = cuda(be);
	const MillmCudaAttention d = attention_of(c, a);
	const MillmCudaFragments f = for_products(c, (int64_t) a->n_heads * a->head_dim, n);
	const MillmRows from = rows_of(c, q);
	bool		has_fragments = false;

	if (c->is_plain || !is_chunked(a->head_dim))
		CHECK(millm_cuda_attention_any(&d, y->rows, from, n, queue_of(c)));
	else
		has_fragments = attend(c, d, a->page_group, y->rows, &f, from, n);
	wrote(c, y, has_fragments ? &f : &no_fragments, n);
}

static void
activation(MillmBackend *be, MillmBuffer *y, MillmAct act, MillmBuffer *x, MillmBuffer *up, int64_t n_columns, int n)
{
	const MillmRows none = {NULL, 0};
	CudaBackend *c = cuda(be);
	const MillmCudaFragments f = for_products(c, n_columns, n);

	CHECK(millm_cuda_activation(y->rows, &f, act, rows_of(c, x), up ? rows_of(c, up) : none, n_columns, n, queue_of(c)));
	wrote(c, y, &f, n);
}

static void
add(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, float scale, int n)
{
	CudaBackend *c = cuda(be);

	CHECK(millm_cuda_add_rows(rows_of(c, y), rows_of(c, x), NULL, NULL, scale, y->n_columns, n, queue_of(c)));
	changed(c, y);
}

static void
scale(MillmBackend *be, MillmBuffer *x, float by, int n)
{
	CudaBackend *c = cuda(be);

	CHECK(millm_cuda_scale(rows_of(c, x), by, x->n_columns, n, queue_of(c)));
	changed(c, x);
}

static void
softcap(MillmBackend *be, MillmBuffer *x, float cap, int n)
{
	CudaBackend *c = cuda(be);

	CHECK(millm_cuda_softcap(rows_of(c, x), cap, x->n_columns, n, queue_of(c)));
	changed(c, x);
}

static void
add_rows(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, const int32_t *rows, const float *weights, int n)
{
	CudaBackend *c = cuda(be);

	const int32_t *to = bring(c, rows, n);

	CHECK(millm_cuda_add_rows(rows_of(c, y), rows_of(c, x), to, bring(c, weights, n), 1, y->n_columns, n, queue_of(c)));
	changed(c, y);
}

static void
add_gated(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, MillmBuffer *scores, int n)
{
	CudaBackend *c = cuda(be);

	CHECK(millm_cuda_add_gated(rows_of(c, y), rows_of(c, x), rows_of(c, scores), y->n_columns, n, queue_of(c)));
	changed(c, y);
}

static bool
mixture(MillmBackend *be, const MillmLayer *layer, MillmBuffer *y, MillmBuffer *x, MillmBuffer *scores, int n)
{
	CudaBackend *c = cuda(be);

	if (!millm_cuda_experts_can(c->experts, layer))
		return false;
	CHECK(millm_cuda_experts_add(c->experts, layer, rows_of(c, y), rows_of(c, x), rows_of(c, scores), n, queue_of(c)));
	changed(c, y);
	return true;
}

static void
select_rows(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, const int32_t *rows, int n)
{
	CudaBackend *c = cuda(be);

	CHECK(millm_cuda_select(y->rows, rows_of(c, x), bring(c, rows, n), x->n_columns, n, queue_of(c)));
	wrote(c, y, &no_fragments, n);
}

static void
check_rows(MillmBackend *be, MillmBuffer *x, int place, int n)
{
	CudaBackend *c = cuda(be);

	(void) queue_of(c);			/* the check before this one */
	c->unchecked = x;
	c->n_unchecked = n;
	c->place_unchecked = place;
}

static int
first_bad(MillmBackend *be)
{
	CudaBackend *c = cuda(be);

	CHECK(cudaMemcpyAsync(c->arrived_place, c->bad_place, sizeof(*c->bad_place), cudaMemcpyDeviceToHost, stream_of(c)));
	wait(c);
	return *c->arrived_place == MILLM_CUDA_NO_PLACE ? -1 : *c->arrived_place;
}

static MillmBackendCounts
counts(MillmBackend *be)
{
	const CudaBackend *c = cuda(be);
	MillmBackendCounts so_far = {.n_waits = c->n_waits, .wait_us = c->wait_us};

	millm_cuda_queue_counts(c->queue, &so_far.n_kernels, &so_far.n_starts);
	return so_far;
}

/* ---- create ---- */

/* Are all products of a layer with weights whose products of many rows round these?  Those stored in float32 do not, nor those of odd shapes. */
static bool
all_round(CudaBackend *c)
{
	for (int i = 0; i < c->model->config.n_layers; i++)
	{
		const MillmLayer *l = &c->model->layers[i];
		const MillmWeight *weights[] = {&l->q, &l->k, &l->v, &l->qkv, &l->o, &l->up, &l->gate, &l->down};

		for (size_t w = 0; w < sizeof(weights) / sizeof(weights[0]); w++)
			if (weights[w]->data && (weight_of(c, weights[w])->dtype == MILLM_F32 || !weight_of(c, weights[w])->has_chunks))
				return false;
	}
	return true;
}

static MillmCode
create_memory(CudaBackend *c, const MillmBackendOptions *options, MillmError *err)
{
	const MillmConfig *config = &c->model->config;
	int64_t		parcel;
	cudaError_t status;
	size_t		kv_bytes;
	MillmCode	rc;

	c->kv_dtype = c->base.kv_dtype = kv_dtype(c->model, options->kernels, options->kv_format);
	c->layer_bytes = layer_bytes(c->model, c->kv_dtype);
	c->page_bytes = options->layers_per_page * c->layer_bytes;
	if (options->n_pages < 1 || !millm_mul_size((size_t) options->n_pages, (size_t) c->page_bytes, &kv_bytes) || kv_bytes > INT64_MAX)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid number of KV pages: %" PRId64, options->n_pages);
	c->n_groups = options->n_groups;
	c->n_pairs = config->position == MILLM_POS_ROPE ? config->rotary_dim / 2 : 0;
	c->max_entries = options->max_entries;
	parcel = parcel_bytes(c->model, options->max_tokens, c->n_groups, c->max_entries);
	c->frequencies = calloc((size_t) c->n_pairs + 1, sizeof(float));
	if (!c->frequencies)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	status = cudaMallocHost((void **) &c->parcel.host, (size_t) parcel);
	if (status == cudaSuccess)
		status = cudaMallocHost((void **) &c->arrived_place, sizeof(*c->arrived_place));
	if (status != cudaSuccess)
		return millm_cuda_failed(status, "the page tables", parcel, err);
	if ((rc = millm_cuda_fetch_create(config->vocab_size, options->max_tokens, c->stream, &c->fetch, err)) != MILLM_OK ||
		(rc = millm_cuda_queue_create(options->max_tokens, c->overlaps, c->stream, &c->queue, err)) != MILLM_OK)
		return rc;
	if (c->has_tensor_cores && wants_blas(c->model, options) &&
		(rc = millm_cuda_blas_create(widest_row(c->model), options->max_tokens, c->stream, &c->blas, err)) != MILLM_OK)
		return rc;
	if ((rc = millm_cuda_allocate(&c->parcel.device, parcel, "the page tables", c->stream, err)) != MILLM_OK ||
		(rc = millm_cuda_allocate(&c->bad_place, sizeof(*c->bad_place), "the workspace", c->stream, err)) != MILLM_OK)
		return rc;
	c->n_partials = n_partials(c->model, options);
	if (c->n_partials > 0 &&
		(rc = millm_cuda_allocate(&c->partials, c->n_partials * (int64_t) sizeof(*c->partials), "the workspace", c->stream, err)) != MILLM_OK)
		return rc;
	if (c->has_tensor_cores && !c->is_plain)
	{
		c->widest = widest_row(c->model);
		if ((status = millm_cuda_skinny_prepare(&c->skinny)) != cudaSuccess)
			return millm_cuda_failed(status, "the products", 0, err);
		if ((rc = millm_cuda_allocate(&c->fragments, fragment_bytes(c->model, options), "the workspace", c->stream, err)) != MILLM_OK ||
			(!c->deterministic &&
			 (rc = millm_cuda_allocate(&c->skinny.partials, product_partials_bytes(options), "the workspace", c->stream, err)) != MILLM_OK))
			return rc;
	}
	return millm_cuda_allocate(&c->kv, (int64_t) kv_bytes, "the KV cache", c->stream, err);
}

MillmCode
millm_cuda_create(const MillmModel *model, const MillmBackendOptions *options, MillmBackend **out, MillmError *err)
{
	CudaBackend *c;
	cudaError_t status;
	int			capability = 0;
	MillmCode	rc;

	if (!are_kernels(options->kernels))
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "there are no kernels named \"%s\" for CUDA", options->kernels);
		millm_hint(err, "Leave the name out, or use \"ref\".");
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (options->max_tokens > MAX_TOKENS)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "a step on CUDA can have %d tokens, not %d", MAX_TOKENS, options->max_tokens);
	if (!(c = calloc(1, sizeof(*c))))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	c->model = model;
	c->deterministic = options->deterministic;
	c->is_plain = are_plain(options->kernels);
	c->base = (MillmBackend) {
		.name = "cuda",
		.variant = c->is_plain ? "cuda-ref" : "cuda",
		.n_threads = 1,
		.free = cuda_free,
		.buffer_create = buffer_create,
		.buffer_read = buffer_read,
		.fetch = c->is_plain ? NULL : fetch,
		.listed = listed,
		.begin = begin,
		.embed = embed,
		.norm = norm,
		.matmul = matmul,
		.split_qkv = split_qkv,
		.rope_and_store = rope_and_store,
		.attention = attention,
		.activation = activation,
		.add = add,
		.scale = scale,
		.softcap = softcap,
		.add_rows = add_rows,
		.add_gated = add_gated,
		.mixture = c->is_plain ? NULL : mixture,
		.select = select_rows,
		.check = check_rows,
		.first_bad = first_bad,
		.copy_page = copy_page,
		.counts = counts,
	};
	status = cudaSetDevice(options->ordinal);
	if (status == cudaSuccess)
		status = millm_cuda_compiled_for(&capability);
	c->has_tensor_cores = capability >= 80;
	c->overlaps = capability >= 90;
	if (status == cudaSuccess)
		status = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
	if (status != cudaSuccess)
	{
		c->stream = NULL;
		rc = millm_cuda_failed(status, "its stream", 0, err);
	}
	else if ((rc = create_memory(c, options, err)) == MILLM_OK)
	{
		const MillmUploadOptions upload = {.stream = c->stream, .progress = options->progress, .arg = options->progress_arg};

		rc = millm_cuda_weights_create(model, &upload, &c->weights, err);
	}
	if (rc == MILLM_OK && !c->is_plain)
	{
		const MillmCudaExpertsOptions experts = {.max_tokens = options->max_tokens, .in_float32 = c->deterministic || !c->has_tensor_cores};

		rc = millm_cuda_experts_create(model, c->weights, &experts, c->stream, &c->experts, err);
	}
	c->all_round = rc == MILLM_OK && all_round(c);
	c->host_routes = model->config.n_experts > 0 && (!c->experts || !millm_cuda_experts_can(c->experts, NULL));
	if (rc != MILLM_OK)
	{
		cuda_free(&c->base);
		return rc;
	}
	*out = &c->base;
	return MILLM_OK;
}
