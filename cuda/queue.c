/*
 * queue.c -- launches that are kept, and the graphs of those that came before.
 *
 * Owns:     the list of the step, graphs with the lists that they were made of, and the memory for what is brought along.
 * Borrows:  the stream.
 * Does not: know what a launch does.
 *
 * A decode step of n sequences is the same launches each time: what differs (positions, page tables, tokens) lies in device memory at the same place.
 * A list that comes for the second time becomes a graph; the longest unused one gives way.  There is one for each n that occurs, and no padding.
 */
#include "queue.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "device_memory.h"

#define N_GRAPHS 32
#define GRAPH_LAUNCHES 8		/* fewer are started one by one */
#define MAX_LIST_BYTES ((size_t) 4 << 20)
#define ALIGNMENT 16

/* Before each launch of a list */
typedef struct Head
{
	MillmCudaStart start;
	size_t		bytes;			/* of the launch, rounded up */
} Head;

typedef struct Graph
{
	char	   *list;			/* [bytes]; NULL: none */
	size_t		bytes;
	cudaGraphExec_t exec;		/* NULL: the list came once */
	bool		is_refused;		/* there was no memory for the graph */
	uint64_t	used_at;
} Graph;

struct MillmCudaQueue
{
	cudaStream_t stream;
	bool		overlaps;
	bool		keeps;
	char	   *list;
	size_t		used,
				capacity;
	int			n_launches;
	Graph		graphs[N_GRAPHS];
	uint64_t	n_flushes;
	int64_t		n_launched;
	int64_t		n_started;
	/* what is brought along */
	char	   *host;			/* page-locked */
	char	   *device;
	size_t		room;			/* of both */
	size_t		brought;
	size_t		copied;			/* of it, to the device */
};

static size_t
round_up(size_t n)
{
	return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

size_t
millm_cuda_queue_bytes(int max_tokens)
{
	return 4 * round_up((size_t) max_tokens * 4) + 65536;
}

MillmCode
millm_cuda_queue_create(int max_tokens, bool overlaps, cudaStream_t stream, MillmCudaQueue **out, MillmError *err)
{
	static const char what[] = "the queue";
	MillmCudaQueue *q = calloc(1, sizeof(*q));
	cudaError_t status;
	MillmCode	rc;

	if (!q)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	q->stream = stream;
	q->overlaps = overlaps;
	q->room = millm_cuda_queue_bytes(max_tokens);
	status = cudaMallocHost((void **) &q->host, q->room);
	rc = status == cudaSuccess ? millm_cuda_allocate(&q->device, (int64_t) q->room, what, stream, err) : millm_cuda_failed(status, what, (int64_t) q->room, err);
	if (rc != MILLM_OK)
	{
		millm_cuda_queue_free(q);
		return rc;
	}
	*out = q;
	return MILLM_OK;
}

static void
drop(Graph *g)
{
	if (g->exec)
		(void) cudaGraphExecDestroy(g->exec);
	free(g->list);
	*g = (Graph) {0};
}

void
millm_cuda_queue_free(MillmCudaQueue *q)
{
	if (!q)
		return;
	for (int i = 0; i < N_GRAPHS; i++)
		drop(&q->graphs[i]);
	(void) cudaFreeHost(q->host);
	(void) cudaFree(q->device);
	free(q->list);
	free(q);
}

void
millm_cuda_queue_begin(MillmCudaQueue *q, bool keeps)
{
	q->keeps = keeps;
	q->used = 0;				/* of a step that was canceled */
	q->n_launches = 0;
	q->brought = q->copied = 0;
}

static cudaError_t
start_all(MillmCudaQueue *q)
{
	cudaError_t status = cudaSuccess;

	for (size_t at = 0; at < q->used && status == cudaSuccess;)
	{
		const Head *head = (const Head *) (q->list + at);

		status = head->start(head + 1, q->overlaps, q->stream);
		at += sizeof(*head) + head->bytes;
	}
	return status;
}

/* The graph of this list, or one that gives way to it. */
static Graph *
graph_of(MillmCudaQueue *q)
{
	Graph	   *oldest = &q->graphs[0];

	for (int i = 0; i < N_GRAPHS; i++)
	{
		Graph	   *g = &q->graphs[i];

		if (g->bytes == q->used && memcmp(g->list, q->list, q->used) == 0)
			return g;
		if (g->used_at < oldest->used_at)
			oldest = g;
	}
	drop(oldest);
	return oldest;
}

/* Remember the list; without memory it will come for the first time again. */
static void
remember(MillmCudaQueue *q, Graph *g)
{
	if ((g->list = malloc(q->used)))
	{
		memcpy(g->list, q->list, q->used);
		g->bytes = q->used;
	}
}

/* Make the graph of the list, which has come before; g->exec stays NULL when there is no memory for it. */
static cudaError_t
instantiate(MillmCudaQueue *q, Graph *g)
{
	cudaGraph_t graph = NULL;
	cudaError_t status = cudaStreamBeginCapture(q->stream, cudaStreamCaptureModeThreadLocal),
				ended;

	if (status != cudaSuccess)
		return status;
	status = start_all(q);
	ended = cudaStreamEndCapture(q->stream, &graph);
	if (status == cudaSuccess)
		status = ended;
	if (status == cudaSuccess)
		status = cudaGraphInstantiate(&g->exec, graph, 0);
	if (graph)
		(void) cudaGraphDestroy(graph);
	if (status == cudaErrorMemoryAllocation)
	{
		(void) cudaGetLastError();	/* or the next launch would report it */
		g->exec = NULL;
		g->is_refused = true;
		status = cudaSuccess;
	}
	return status;
}

cudaError_t
millm_cuda_queue_flush(MillmCudaQueue *q)
{
	Graph	   *g = NULL;
	cudaError_t status = cudaSuccess;

	if (q->brought > q->copied)
	{
		status = cudaMemcpyAsync(q->device + q->copied, q->host + q->copied, q->brought - q->copied, cudaMemcpyHostToDevice, q->stream);
		q->copied = q->brought;
	}
	if (status == cudaSuccess && q->n_launches >= GRAPH_LAUNCHES)
	{
		g = graph_of(q);
		g->used_at = ++q->n_flushes;
		if (!g->list)
			remember(q, g);
		else if (!g->exec && !g->is_refused)
			status = instantiate(q, g);
	}
	if (status == cudaSuccess)
		status = g && g->exec ? cudaGraphLaunch(g->exec, q->stream) : start_all(q);
	q->n_launched += q->n_launches;
	q->n_started += g && g->exec ? 1 : q->n_launches;
	q->used = 0;
	q->n_launches = 0;
	return status;
}

/* Room for so many bytes more in the list; false: there will be none. */
static bool
reserve(MillmCudaQueue *q, size_t bytes)
{
	const size_t capacity = q->capacity ? 2 * q->capacity : 65536;
	char	   *larger;

	if (bytes <= q->capacity - q->used)
		return true;
	if (capacity > MAX_LIST_BYTES || bytes > capacity - q->used || !(larger = realloc(q->list, capacity)))
		return false;
	q->list = larger;
	q->capacity = capacity;
	return true;
}

cudaError_t
millm_cuda_queue(MillmCudaQueue *q, MillmCudaStart start, const void *launch, size_t bytes)
{
	const size_t rounded = round_up(bytes);
	Head	   *head;

	if (q->keeps && !reserve(q, sizeof(*head) + rounded))
	{
		const cudaError_t status = millm_cuda_queue_flush(q);

		q->keeps = false;
		if (status != cudaSuccess)
			return status;
	}
	if (!q->keeps)
	{
		q->n_launched++;
		q->n_started++;
		return start(launch, q->overlaps, q->stream);
	}
	head = (Head *) (q->list + q->used);
	*head = (Head) {start, rounded};
	memset((char *) (head + 1) + bytes, 0, rounded - bytes);
	memcpy(head + 1, launch, bytes);
	q->used += sizeof(*head) + rounded;
	q->n_launches++;
	return cudaSuccess;
}

cudaError_t
millm_cuda_queue_bring(MillmCudaQueue *q, const void *data, size_t bytes, const void **on_device)
{
	cudaError_t status = cudaSuccess;

	if (bytes > q->room - q->brought)
	{
		/* what is there has been read before it is overwritten: the host's by the copy, the device's by the launches before the next one */
		status = millm_cuda_queue_flush(q);
		if (status == cudaSuccess)
			status = cudaStreamSynchronize(q->stream);
		q->brought = q->copied = 0;
	}
	memcpy(q->host + q->brought, data, bytes);
	*on_device = q->device + q->brought;
	q->brought += round_up(bytes);
	if (!q->keeps && status == cudaSuccess)
		status = millm_cuda_queue_flush(q);
	return status;
}

void
millm_cuda_queue_counts(const MillmCudaQueue *q, int64_t *n_launches, int64_t *n_starts)
{
	*n_launches = q->n_launched;
	*n_starts = q->n_started;
}
