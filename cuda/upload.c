/*
 * upload.c -- see upload.h.
 *
 * What is to be copied is cut into windows.  Threads fill buffers with one window after the other, which reads the disk where the page cache has it
 * not, while this thread queues the copies of those that are full:
 *
 *     mapping --threads--> buffer of window k --copy--> device [--transpose--> device]
 *
 * A buffer of pinned memory is copied while the host goes on; it is filled again when the event behind its copy has come.  All calls of CUDA are this
 * thread's.  Where there is no pinned memory, smaller buffers are tried, then ordinary memory, which is slower and changes nothing else.
 *
 * A window is bytes of the device memory, parts and the zeros between them; or rows of one part that is transposed on the device, from a buffer there.
 */
#include "upload.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device_memory.h"

#define MAX_FILLERS 8			/* threads that fill: one does not keep up with a fast bus */
#define MAX_SLOTS (MAX_FILLERS + 2)	/* one more is copied, and one waits for that */
#define BUFFER_BYTES (4 << 20)
#define LEAST_BYTES (256 << 10)	/* that is worth being pinned */

typedef struct Window
{
	int			part;			/* the first one */
	int64_t		begin, end;		/* in the device memory */
} Window;

/* Buffer k % n_slots is that of window k. */
typedef struct Slot
{
	char	   *buffer;
	Window		window;
	bool		is_full;
	cudaEvent_t copied;
} Slot;

typedef struct Upload
{
	char	   *device;
	const MillmPart *parts;
	int			n_parts;
	const MillmUploadOptions *options;
	int64_t		buffer_bytes;
	char	   *memory;			/* of all buffers */
	bool		is_pinned;
	char	   *transposes;		/* [buffer_bytes] on the device, of a part that is transposed there; NULL: there is none */
	int			n_slots;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	/* under the lock */
	Slot		slots[MAX_SLOTS];	/* of one whose window is taken and not yet full: his who took it */
	int			part;			/* where the next window begins: the part, */
	int64_t		done;			/* and how much of it is in windows already */
	int64_t		n_taken;		/* windows that somebody fills or has filled */
	int64_t		n_copied;		/* windows whose buffers are free again */
	bool		stops;

	pthread_t	fillers[MAX_FILLERS];
	int			n_fillers;
} Upload;

static int64_t
smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t
part_bytes(const MillmPart *p)
{
	return p->n_rows * p->to_pitch;
}

/* ---- windows ---- */

static bool
is_at_end(const Upload *u)
{
	return u->part == u->n_parts;
}

/* The next one; there is one. */
static Window
next_window(Upload *u)
{
	const MillmPart *p = &u->parts[u->part];
	Window		w = {.part = u->part, .begin = p->at + u->done};
	int64_t		limit;

	if (p->element)
	{
		/* whole rows of this part: at least one fits (create_buffers) */
		w.end = smaller(w.begin + u->buffer_bytes / p->to_pitch * p->to_pitch, p->at + part_bytes(p));
		u->done = w.end - p->at;
		if (u->done == part_bytes(p))
			u->part++, u->done = 0;
		return w;
	}
	limit = w.begin + u->buffer_bytes;
	for (w.end = w.begin; !is_at_end(u) && !u->parts[u->part].element && u->parts[u->part].at < limit; u->part++, u->done = 0)
	{
		p = &u->parts[u->part];
		w.end = smaller(p->at + part_bytes(p), limit);
		u->done = w.end - p->at;
		if (u->done < part_bytes(p))
			break;
	}
	return w;
}

/* Let the kernel read these at once, not page after page; where it cannot, reads will. */
static void
prefetch(const char *from, int64_t bytes)
{
#ifdef MADV_POPULATE_READ
	const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
	const uintptr_t begin = (uintptr_t) from / page * page;

	(void) madvise((void *) begin, (uintptr_t) from + (uintptr_t) bytes - begin, MADV_POPULATE_READ);
#else
	(void) from;
	(void) bytes;
#endif
}

/* Bytes [begin, end) of part p as the device has it. */
static void
copy_part(char *to, const MillmPart *p, int64_t begin, int64_t end)
{
	if (p->row_bytes == p->from_pitch && p->row_bytes == p->to_pitch)
	{
		prefetch(p->from + begin, end - begin);
		memcpy(to, p->from + begin, (size_t) (end - begin));
		return;
	}
	for (int64_t n; begin < end; begin += n, to += n)
	{
		const int64_t row = begin / p->to_pitch,
					column = begin % p->to_pitch;
		const int64_t n_values = column < p->row_bytes ? smaller(p->row_bytes - column, end - begin) : 0;

		n = smaller(p->to_pitch - column, end - begin);
		memcpy(to, p->from + row * p->from_pitch + column, (size_t) n_values);
		memset(to + n_values, 0, (size_t) (n - n_values));
	}
}

static void
fill(const Upload *u, Slot *slot)
{
	const Window w = slot->window;
	const MillmPart *p = &u->parts[w.part];
	int64_t		at = w.begin;

	if (p->element)
	{
		/* columns of the model's rows, side by side: [n_in, n_rows of the window] */
		const int64_t n_in = p->row_bytes / p->element;
		const int64_t width = (w.end - w.begin) / p->to_pitch * p->element;
		const char *from = p->from + (w.begin - p->at) / p->to_pitch * p->element;

		for (int64_t i = 0; i < n_in; i++)
			memcpy(slot->buffer + i * width, from + i * p->from_pitch, (size_t) width);
		return;
	}
	for (; at < w.end; p++)
	{
		const int64_t begin = p->at > at ? p->at : at;
		const int64_t end = smaller(p->at + part_bytes(p), w.end);

		memset(slot->buffer + (at - w.begin), 0, (size_t) (begin - at));
		copy_part(slot->buffer + (begin - w.begin), p, begin - p->at, end - p->at);
		at = end;
	}
}

/* Take the next window and fill it, under the lock but while it is filled; false: there is none, or no buffer for it. */
static bool
fill_next(Upload *u)
{
	Slot	   *slot = &u->slots[u->n_taken % u->n_slots];

	if (is_at_end(u) || u->n_taken == u->n_copied + u->n_slots)
		return false;
	u->n_taken++;
	slot->is_full = false;
	slot->window = next_window(u);
	pthread_mutex_unlock(&u->lock);
	fill(u, slot);
	pthread_mutex_lock(&u->lock);
	slot->is_full = true;
	pthread_cond_broadcast(&u->changed);
	return true;
}

static void *
filler(void *arg)
{
	Upload	   *u = arg;

	pthread_mutex_lock(&u->lock);
	while (!u->stops && !is_at_end(u))
		if (!fill_next(u))
			pthread_cond_wait(&u->changed, &u->lock);	/* for a buffer */
	pthread_mutex_unlock(&u->lock);
	return NULL;
}

/* Window k, full; NULL: there are no more.  Where there is no other thread this one fills it. */
static const Slot *
wait_full(Upload *u, int64_t k)
{
	Slot	   *slot = &u->slots[k % u->n_slots];
	bool		is_there;

	pthread_mutex_lock(&u->lock);
	if (u->n_fillers == 0)
		fill_next(u);
	while (k == u->n_taken ? !is_at_end(u) : !slot->is_full)
		pthread_cond_wait(&u->changed, &u->lock);
	is_there = k < u->n_taken;
	pthread_mutex_unlock(&u->lock);
	return is_there ? slot : NULL;
}

/* ---- copies ---- */

static cudaError_t
queue_copy(const Upload *u, const Slot *slot)
{
	const Window w = slot->window;
	const MillmPart *p = &u->parts[w.part];
	const int64_t n_rows = (w.end - w.begin) / p->to_pitch;
	cudaError_t status;

	if (!p->element)
		status = cudaMemcpyAsync(u->device + w.begin, slot->buffer, (size_t) (w.end - w.begin), cudaMemcpyHostToDevice, u->options->stream);
	else
	{
		status = cudaMemcpyAsync(u->transposes, slot->buffer, (size_t) (n_rows * p->row_bytes), cudaMemcpyHostToDevice, u->options->stream);
		if (status == cudaSuccess)
			status = millm_cuda_transpose(u->device + w.begin, p->to_pitch, u->transposes, p->row_bytes / p->element, n_rows, p->element, u->options->stream);
	}
	return status == cudaSuccess ? cudaEventRecord(slot->copied, u->options->stream) : status;
}

/* Windows up to k are on the device: their buffers may be filled again. */
static cudaError_t
wait_copied(Upload *u, int64_t k)
{
	cudaError_t status = cudaEventSynchronize(u->slots[k % u->n_slots].copied);

	pthread_mutex_lock(&u->lock);
	u->n_copied = k + 1;
	pthread_cond_broadcast(&u->changed);
	pthread_mutex_unlock(&u->lock);
	return status;
}

static MillmCode
copy_all(Upload *u, MillmError *err)
{
	const MillmPart *last = &u->parts[u->n_parts - 1];
	const int64_t total = last->at + part_bytes(last);
	cudaError_t status = cudaSuccess;
	const Slot *slot;

	/* the copy of window k is queued before that of k - 1 is waited for: the bus is never idle for the host's sake */
	for (int64_t k = 0; status == cudaSuccess && (slot = wait_full(u, k)); k++)
	{
		const int64_t end = slot->window.end;

		status = queue_copy(u, slot);
		if (status == cudaSuccess && k > 0)
			status = wait_copied(u, k - 1);
		if (status == cudaSuccess && u->options->progress && !u->options->progress(u->options->arg, (int) (end * 100 / total)))
			return millm_fail(err, MILLM_E_CANCELED, "the load was canceled");
	}
	if (status == cudaSuccess)
		status = cudaStreamSynchronize(u->options->stream);	/* a load ends when the weights are there */
	return status == cudaSuccess ? MILLM_OK : millm_cuda_failed(status, "copies of the weights", 0, err);
}

/* ---- the whole ---- */

static int
usable_cpus(void)
{
	cpu_set_t	set;

	return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

/* Pinned buffers, smaller ones, or those of ordinary memory: never smaller than a row that is transposed. */
static MillmCode
create_buffers(Upload *u, MillmError *err)
{
	int64_t		least = 0;		/* 0: nothing is transposed */
	int64_t		bytes = u->options->buffer_bytes > 0 ? u->options->buffer_bytes : BUFFER_BYTES;

	for (int i = 0; i < u->n_parts; i++)
		if (u->parts[i].element && u->parts[i].to_pitch > least)
			least = u->parts[i].to_pitch;
	bytes = bytes > least ? bytes : least;
	for (;; bytes /= 2)
	{
		u->is_pinned = cudaMallocHost((void **) &u->memory, (size_t) (u->n_slots * bytes)) == cudaSuccess;
		if (u->is_pinned || bytes / 2 < least || bytes / 2 < LEAST_BYTES)
			break;
	}
	(void) cudaGetLastError();	/* what was refused is nobody's error */
	if (!u->is_pinned && !(u->memory = malloc((size_t) (u->n_slots * bytes))))
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory to copy the weights");
		millm_detail(err, "Need %.1f MB.", (double) (u->n_slots * bytes) / 1e6);
		return MILLM_E_INSUFFICIENT_MEMORY;
	}
	u->buffer_bytes = bytes;
	for (int i = 0; i < u->n_slots; i++)
	{
		cudaError_t status = cudaEventCreateWithFlags(&u->slots[i].copied, cudaEventDisableTiming);

		if (status != cudaSuccess)
		{
			u->slots[i].copied = NULL;
			return millm_cuda_failed(status, "copies of the weights", 0, err);
		}
		u->slots[i].buffer = u->memory + i * bytes;
	}
	return least > 0 ? millm_cuda_allocate(&u->transposes, bytes, "transposes", u->options->stream, err) : MILLM_OK;
}

static void
free_buffers(Upload *u)
{
	(void) cudaStreamSynchronize(u->options->stream);	/* copies that are still queued read the buffers */
	(void) cudaFree(u->transposes);
	for (int i = 0; i < u->n_slots; i++)
		if (u->slots[i].copied)
			(void) cudaEventDestroy(u->slots[i].copied);
	if (u->is_pinned)
		(void) cudaFreeHost(u->memory);
	else
		free(u->memory);
	(void) cudaGetLastError();	/* what came of it the caller knows already */
}

MillmCode
millm_cuda_upload(char *device, const MillmPart *parts, int n_parts, const MillmUploadOptions *options, MillmError *err)
{
	const int	n_cpus = usable_cpus();
	Upload		u = {.device = device, .parts = parts, .n_parts = n_parts, .options = options,
		.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
	const int	n_fillers = n_cpus < MAX_FILLERS ? n_cpus : MAX_FILLERS;
	MillmCode	rc;

	if (n_parts == 0)
		return MILLM_OK;
	u.n_slots = n_fillers + 2;
	if ((rc = create_buffers(&u, err)) == MILLM_OK)
	{
		while (u.n_fillers < n_fillers && pthread_create(&u.fillers[u.n_fillers], NULL, filler, &u) == 0)
			u.n_fillers++;
		rc = copy_all(&u, err);
	}
	pthread_mutex_lock(&u.lock);
	u.stops = true;
	pthread_cond_broadcast(&u.changed);
	pthread_mutex_unlock(&u.lock);
	for (int i = 0; i < u.n_fillers; i++)
		pthread_join(u.fillers[i], NULL);
	free_buffers(&u);
	return rc;
}
