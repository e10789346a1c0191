/*
 * fetch.c -- what of the logits crosses the bus.
 *
 * Owns:     lists of picked logits on both sides (page-locked on the host's), and what goes to the device for them.
 * Borrows:  the logits of the device, the rows of the host.
 * Does not: choose.  It brings at least what a choice needs, in rows that are -infinity elsewhere, and says which ids are there: who chooses looks at those, or reads the rows as if they were whole.
 *
 * A row of the host that is -infinity stays so but for what was picked, which is taken back before the next lists come: no row is
 * filled for each token.  A row of which too much would be picked crosses whole.
 */
#include "fetch.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "device_memory.h"

#define MAX_ROWS 256			/* of lists; rows past them cross whole */
#define MAX_ALWAYS 16384		/* ids of all rows together that are needed whatever their logits */

/* Of both sides, in one allocation: what comes from the device, then what goes there. */
typedef struct Lists
{
	char	   *all;
	MillmCudaPicks *picks;		/* [rows] */
	float	   *values;			/* [MAX_ALWAYS] */
	MillmCudaTop *tops;			/* [rows] */
	int32_t    *rows;			/* [MAX_ALWAYS]: of whom an id is needed, and which */
	int32_t    *ids;
	float	   *maxima;			/* [rows, groups], the device's only */
} Lists;

struct MillmCudaFetch
{
	int64_t		n_columns;
	int			n_lists;		/* rows that can have one */
	Lists		device, here;
	float	   *host;			/* [rows, n_columns]; NULL before the first fetch */
	bool	   *is_clear;		/* [n_lists]: the host's row is -infinity but for its list and what is always needed */
	int32_t   (*listed)[MILLM_MAX_LISTED];	/* [n_lists]: of such a row these, ascending */
	int		   *n_listed;		/* [n_lists]; -1: too many, or the row is whole */
	/* the last fetch */
	MillmRows	y;
	int			n;				/* rows among the lists */
	int			n_always;
};

static int64_t
groups_of(int64_t n_columns)
{
	return (n_columns + MILLM_CUDA_GROUP - 1) / MILLM_CUDA_GROUP;
}

static int
lists_of(int n_rows)
{
	return n_rows < MAX_ROWS ? n_rows : MAX_ROWS;
}

/* Bytes of the lists; where they are, when they begin at all. */
static int64_t
lay_out(Lists *l, char *all, int n_lists, int64_t n_groups)
{
	const int64_t of_row = (int64_t) sizeof(*l->picks) + (int64_t) sizeof(*l->tops) + n_groups * (int64_t) sizeof(*l->maxima);

	if (all)
	{
		l->all = all;
		l->picks = (MillmCudaPicks *) all;
		l->values = (float *) (l->picks + n_lists);
		l->tops = (MillmCudaTop *) (l->values + MAX_ALWAYS);
		l->rows = (int32_t *) (l->tops + n_lists);
		l->ids = l->rows + MAX_ALWAYS;
		l->maxima = (float *) (l->ids + MAX_ALWAYS);
	}
	return n_lists * of_row + MAX_ALWAYS * (int64_t) (sizeof(*l->values) + sizeof(*l->rows) + sizeof(*l->ids));
}

int64_t
millm_cuda_fetch_bytes(int64_t n_columns, int n_rows)
{
	Lists		l;

	return lay_out(&l, NULL, lists_of(n_rows), groups_of(n_columns));
}

MillmCode
millm_cuda_fetch_create(int64_t n_columns, int n_rows, cudaStream_t stream, MillmCudaFetch **out, MillmError *err)
{
	static const char what[] = "the choice among logits";
	const int	n_lists = lists_of(n_rows);
	MillmCudaFetch *f = calloc(1, sizeof(*f));
	char	   *all;
	int64_t		bytes;
	cudaError_t status;
	MillmCode	rc;

	if (!f || !(f->is_clear = calloc((size_t) n_lists, sizeof(*f->is_clear))) || !(f->listed = calloc((size_t) n_lists, sizeof(*f->listed))) ||
		!(f->n_listed = calloc((size_t) n_lists, sizeof(*f->n_listed))))
	{
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		goto fail;
	}
	f->n_columns = n_columns;
	f->n_lists = n_lists;
	if ((rc = millm_cuda_allocate(&all, millm_cuda_fetch_bytes(n_columns, n_rows), what, stream, err)) != MILLM_OK)
		goto fail;
	lay_out(&f->device, all, n_lists, groups_of(n_columns));
	bytes = lay_out(&f->here, NULL, n_lists, 0);
	if ((status = cudaMallocHost((void **) &all, (size_t) bytes)) != cudaSuccess)
	{
		rc = millm_cuda_failed(status, what, bytes, err);
		goto fail;
	}
	lay_out(&f->here, all, n_lists, 0);
	*out = f;
	return MILLM_OK;
fail:
	millm_cuda_fetch_free(f);
	return rc;
}

void
millm_cuda_fetch_free(MillmCudaFetch *f)
{
	if (!f)
		return;
	(void) cudaFree(f->device.all);
	(void) cudaFreeHost(f->here.all);
	free(f->is_clear);
	free(f->listed);
	free(f->n_listed);
	free(f);
}

/* How much of a list is there: what the device says is not trusted with the host's memory. */
static int
n_picked(const MillmCudaPicks *picks)
{
	return picks->n < 0 ? 0 : picks->n < MILLM_CUDA_PICKS ? picks->n : MILLM_CUDA_PICKS;
}

static void
put(MillmCudaFetch *f, int row, int32_t id, float value)
{
	if (id >= 0 && id < f->n_columns)
		f->host[row * f->n_columns + id] = value;
}

/* The same with its place in the list, of which it is not yet. */
static void
put_and_list(MillmCudaFetch *f, int row, int32_t id, float value)
{
	int32_t    *ids = f->listed[row];
	int			i = f->n_listed[row];

	put(f, row, id, value);
	if (i < 0 || id < 0 || id >= f->n_columns)
		return;
	if (i == MILLM_MAX_LISTED)
	{
		f->n_listed[row] = -1;
		return;
	}
	for (; i > 0 && ids[i - 1] > id; i--)
		ids[i] = ids[i - 1];
	ids[i] = id;
	f->n_listed[row]++;
}

/* Take back what the last lists have put into rows that are else clear. */
static void
clear(MillmCudaFetch *f)
{
	for (int t = 0; t < f->n; t++)
		for (int i = 0; i < n_picked(&f->here.picks[t]) && f->is_clear[t]; i++)
			put(f, t, f->here.picks[t].ids[i], -INFINITY);
	for (int i = 0; i < f->n_always; i++)
		if (f->is_clear[f->here.rows[i]])
			put(f, f->here.rows[i], f->here.ids[i], -INFINITY);
}

static cudaError_t
copy_rows(MillmCudaFetch *f, MillmRows y, int first, int n, cudaStream_t stream)
{
	const size_t row = (size_t) f->n_columns * sizeof(float);

	return cudaMemcpy2DAsync(f->host + first * f->n_columns, row, y.data + first * y.stride, (size_t) y.stride * sizeof(float), row, (size_t) n,
							 cudaMemcpyDeviceToHost, stream);
}

/* Row t has a list; its ids are among those that are always needed. */
static bool
takes_list(MillmCudaFetch *f, const MillmTop *top, int t)
{
	if (t >= f->n_lists || top->k == 0 || (top->k > MILLM_CUDA_PICKS && top->margin == INFINITY) || top->n_always > MAX_ALWAYS - f->n_always ||
		groups_of(f->n_columns) > MILLM_CUDA_MAX_GROUPS)
		return false;
	for (int i = 0; i < top->n_always; i++)
	{
		f->here.rows[f->n_always] = t;
		f->here.ids[f->n_always++] = top->always[i];
	}
	return true;
}

/* Device and host, from a to the end of b's n */
#define SPAN(b, a, n) ((size_t) ((const char *) ((b) + (n)) - (const char *) (a)))

static cudaError_t
queue_lists(MillmCudaFetch *f, MillmRows y, MillmCudaQueue *queue, cudaStream_t stream)
{
	Lists	   *d = &f->device,
			   *h = &f->here;
	cudaError_t status = cudaMemcpyAsync(d->tops, h->tops, SPAN(h->tops, h->tops, f->n), cudaMemcpyHostToDevice, stream);

	if (status == cudaSuccess && f->n_always > 0)
	{
		status = cudaMemcpyAsync(d->rows, h->rows, SPAN(h->ids, h->rows, f->n_always), cudaMemcpyHostToDevice, stream);
		if (status == cudaSuccess)
			status = millm_cuda_take(d->values, y, d->rows, d->ids, f->n_always, queue);
		if (status == cudaSuccess)
			status = millm_cuda_queue_flush(queue);
		if (status == cudaSuccess)
			status = cudaMemcpyAsync(h->values, d->values, SPAN(h->values, h->values, f->n_always), cudaMemcpyDeviceToHost, stream);
	}
	if (status == cudaSuccess)
		status = millm_cuda_pick(d->picks, d->maxima, y, d->tops, f->n_columns, f->n, queue);
	if (status == cudaSuccess)
		status = millm_cuda_queue_flush(queue);
	if (status == cudaSuccess)
		status = cudaMemcpyAsync(h->picks, d->picks, SPAN(h->picks, h->picks, f->n), cudaMemcpyDeviceToHost, stream);
	return status;
}

cudaError_t
millm_cuda_fetch_queue(MillmCudaFetch *f, float *host, MillmRows y, const MillmTop *tops, int n, MillmCudaQueue *queue, cudaStream_t stream)
{
	cudaError_t status = millm_cuda_queue_flush(queue);
	int			n_listed = 0;

	clear(f);
	f->host = host;
	f->y = y;
	f->n = n < f->n_lists ? n : f->n_lists;
	f->n_always = 0;
	for (int t = 0; t < n && status == cudaSuccess; t++)
	{
		const bool	has_list = takes_list(f, &tops[t], t);

		if (t < f->n)
			f->here.tops[t] = has_list ? (MillmCudaTop) {tops[t].k, tops[t].margin} : (MillmCudaTop) {0};
		n_listed += has_list;
		if (has_list)
			for (int64_t i = 0; i < f->n_columns && !f->is_clear[t]; i++)
				f->host[t * f->n_columns + i] = -INFINITY;
		else
			status = copy_rows(f, y, t, 1, stream);
		if (t < f->n)
			f->is_clear[t] = has_list;
	}
	if (n_listed == 0)
		f->n = 0;
	else if (status == cudaSuccess)
		status = queue_lists(f, y, queue, stream);
	return status;
}

cudaError_t
millm_cuda_fetch_finish(MillmCudaFetch *f, cudaStream_t stream)
{
	cudaError_t status = cudaSuccess;
	bool		has_copied = false;

	for (int t = 0; t < f->n && status == cudaSuccess; t++)
		if (f->here.tops[t].k > 0 && f->here.picks[t].n > MILLM_CUDA_PICKS)
		{
			status = copy_rows(f, f->y, t, 1, stream);
			f->is_clear[t] = false;
			has_copied = true;
		}
	if (status == cudaSuccess && has_copied)
		status = cudaStreamSynchronize(stream);
	for (int t = 0; t < f->n; t++)
	{
		f->n_listed[t] = f->is_clear[t] ? 0 : -1;
		for (int i = 0; i < n_picked(&f->here.picks[t]) && f->is_clear[t]; i++)
			put_and_list(f, t, f->here.picks[t].ids[i], f->here.picks[t].values[i]);
	}
	for (int i = 0; i < f->n_always; i++)
		put_and_list(f, f->here.rows[i], f->here.ids[i], f->here.values[i]);
	return status;
}

MillmListed
millm_cuda_fetch_listed(const MillmCudaFetch *f, int t)
{
	return t < f->n ? (MillmListed) {f->listed[t], f->n_listed[t]} : (MillmListed) {NULL, -1};
}
