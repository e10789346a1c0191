/*
 * backend.h -- what the forward pass asks of a compute backend.
 *
 * Activations live in the backend's memory, as buffers of float32 rows; weights are the model's views,
 * which a backend may use in place or keep a copy of.  Destination first.  n is always the number
 * of rows (tokens).  Nothing here fails once the backend and its buffers exist; what may be
 * wrong in a step was checked by forward.c.  Not thread-safe.
 */
#ifndef MILLM_BACKEND_H
#define MILLM_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "model.h"
#include "shortlist.h"
#include "tensor.h"

typedef struct MillmBackend MillmBackend;
typedef struct MillmBuffer MillmBuffer;	/* [max rows, columns] float32, the backend's */

/* The attention of one layer, as numbers. */
typedef struct MillmAttention
{
	int			page_group;		/* its page table among those of a token */
	int			page_place;		/* where it is in these pages */
	int			n_heads;
	int			n_kv_heads;
	int			head_dim;
	int			window;			/* keys a query sees, itself included; 0: all */
	float		scale;
	float		softcap;		/* of the scores; 0: none */
	const float *sinks;			/* [n_heads], or NULL (MillmLayer) */
	bool		local;			/* rotates by the model's local_rope, if it has one */
	bool		unrotated;		/* does not rotate */
} MillmAttention;

/* One of the matmuls that share an input: y (+)= x w^T + bias */
typedef struct MillmProjection
{
	MillmBuffer *y;				/* [n, w->n_out] */
	const MillmWeight *w;
	const MillmVector *bias;	/* data NULL: none */
	bool		accumulate;		/* add to y: the residual */
} MillmProjection;
#define MILLM_MAX_PROJECTIONS 3

/* What a backend whose device works on its own has done since it was created. */
typedef struct MillmBackendCounts
{
	int64_t		n_kernels;		/* of its own: a library's are not seen */
	int64_t		n_starts;		/* calls that started kernels: a graph is one */
	int64_t		n_waits;		/* for the device */
	int64_t		wait_us;		/* how long they took */
} MillmBackendCounts;

struct MillmBackend
{
	const char *name;			/* "cpu" */
	const char *variant;		/* of its kernels: "avx512" */
	MillmDtype	kv_dtype;		/* of its KV pages: F32, F16 or INT8 */
	int			n_threads;

	void		(*free) (MillmBackend *be);		/* and its buffers */
	/* Rows are uninitialised; is_read: buffer_read() may be asked for them.  INSUFFICIENT_MEMORY with figures. */
	MillmCode	(*buffer_create) (MillmBackend *be, int64_t n_rows, int64_t n_columns, bool is_read, MillmBuffer **out, MillmError *err);
	const float *(*buffer_read) (MillmBackend *be, MillmBuffer *x);	/* in host memory, until the buffer is written */
	/*
	 * Begin to bring y's n rows, which first_bad() waits for and buffer_read() then gives: of row t what tops[t] needs (k 0: all), elsewhere the
	 * value or -infinity.  Nothing else reads y after it.  NULL: buffer_read() costs nothing.
	 */
	void		(*fetch) (MillmBackend *be, MillmBuffer *y, const MillmTop *tops, int n);
	/* Of row t of what was fetched last, and read, or of what screened_matmul() wrote last: what tops[t] needs is among these.  NULL: of no row that is said. */
	MillmListed (*listed) (MillmBackend *be, int t);

	/* Begin a step of n tokens: where each is, what its sequence is planned for, and the page tables of it [n, n_groups] (borrowed for the step). */
	void		(*begin) (MillmBackend *be, const int32_t *positions, const int32_t *planned_lengths, const int32_t *const *pages, int n);

	/*
	 * In a model without experts, what norm leaves in another buffer, and attention and activation in any, is for the products that come next: it may be
	 * rounded as they round it, and is gone once another of these operations, or a product of something else, has run.
	 */

	/* y[t] = table[rows[t]], or y[t] += table[rows[t]] */
	void		(*embed) (MillmBackend *be, MillmBuffer *y, const MillmWeight *table, const int32_t *rows, bool add, int n);
	/*
	 * Each of the first n_parts parts of a row, n_columns values, is normed by itself: the row, or its heads.  Weights and biases are those
	 * of a part, or of all n_parts.  y may be x
	 */
	void		(*norm) (MillmBackend *be, MillmBuffer *y, MillmBuffer *x, MillmNorm kind, const MillmVector *weight,
						 const MillmVector *bias, float eps, int n_parts, int64_t n_columns, int n);
	void		(*matmul) (MillmBackend *be, const MillmProjection *p, int n_projections, MillmBuffer *x, int n);
	/*
	 * y[t] = x[t] head^T, the same bits as matmul's for the n rows, where tops[t] (k > 0) needs them, -infinity elsewhere: decided by
	 * the head's screening copy.  Returns how many rows of the head were read; y is undefined, and matmul the only way, with 0, which is
	 * said at once, for so many rows, and with -1, for these: also whenever a logit that was read is NaN or infinite.  NULL: it never is of use.
	 */
	int64_t		(*screened_matmul) (MillmBackend *be, MillmBuffer *y, const MillmWeight *head, const MillmScreen *screen, MillmBuffer *x,
									const MillmTop *tops, int n);
	/* Parts of qkv's rows: for each KV head the queries of its group, k, v; side by side in q, k and v. */
	void		(*split_qkv) (MillmBackend *be, const MillmAttention *a, MillmBuffer *q, MillmBuffer *k, MillmBuffer *v, MillmBuffer *qkv, int n);
	/* Rotate q and k by the tokens' positions, when the model has rope; store k and v in their pages. */
	void		(*rope_and_store) (MillmBackend *be, const MillmAttention *a, MillmBuffer *q, MillmBuffer *k, MillmBuffer *v, int n);
	/* y = attention of q over what the pages hold, each token up to its own position */
	void		(*attention) (MillmBackend *be, const MillmAttention *a, MillmBuffer *y, MillmBuffer *q, int n);
	/* y = act(x), times up unless NULL; y may be x.  n_columns: of y; x has twice as many for an act of pairs, which has no up */
	void		(*activation) (MillmBackend *be, MillmBuffer *y, MillmAct act, MillmBuffer *x, MillmBuffer *up, int64_t n_columns, int n);
	void		(*add) (MillmBackend *be, MillmBuffer *y, MillmBuffer *x, float scale, int n);	/* y += scale x */
	void		(*scale) (MillmBackend *be, MillmBuffer *x, float scale, int n);	/* x = scale x */
	/* x = cap tanh(x / cap) */
	void		(*softcap) (MillmBackend *be, MillmBuffer *x, float cap, int n);
	/* y[rows[t]] += weights[t] x[t], for rows that differ */
	void		(*add_rows) (MillmBackend *be, MillmBuffer *y, MillmBuffer *x, const int32_t *rows, const float *weights, int n);
	void		(*add_gated) (MillmBackend *be, MillmBuffer *y, MillmBuffer *x, MillmBuffer *scores, int n);	/* y[t] += sigmoid(scores[t][0]) x[t] */
	/*
	 * y[t] += what the experts of this layer that row t chooses by its scores [n, n_experts] make of x[t], each times its weight (route.h).  False, y
	 * untouched, or NULL: forward.c does so with the other operations, for which the host reads the scores.
	 */
	bool		(*mixture) (MillmBackend *be, const MillmLayer *layer, MillmBuffer *y, MillmBuffer *x, MillmBuffer *scores, int n);
	void		(*select) (MillmBackend *be, MillmBuffer *y, MillmBuffer *x, const int32_t *rows, int n);	/* y[t] = x[rows[t]] */
	/* Look for a NaN or infinity in x, at a place of the step that is numbered: from 0 on, in the order of the looks. */
	void		(*check) (MillmBackend *be, MillmBuffer *x, int place, int n);
	/* The first place since begin() that had one, once all of it is computed; -1: none had.  The only wait of a step but for what is read. */
	int			(*first_bad) (MillmBackend *be);

	void		(*copy_page) (MillmBackend *be, int32_t dst, int32_t src);	/* all layers */
	MillmBackendCounts (*counts) (MillmBackend *be);	/* NULL: it does all in its calls */
};

typedef struct MillmBackendOptions
{
	int			ordinal;		/* of the device among its kind's */
	int			n_threads;		/* 0: one per CPU */
	bool		deterministic;
	MillmKvFormat kv_format;
	const char *kernels;		/* a variant by name; NULL: $MILLM_KERNELS, else the best */
	int			max_tokens;		/* of a step */
	int64_t		n_pages;		/* of the KV cache */
	int			layers_per_page;
	int			n_groups;		/* page tables of a sequence */
	int64_t		max_entries;	/* of all page tables of a step */
	/* Told how far the copy of the weights is, where one is made (copied_bytes), on this thread; false: stop, CANCELED.  NULL: nobody asks */
	bool		(*progress) (void *arg, int percent);
	void	   *progress_arg;
} MillmBackendOptions;

/* Backends of one kind: how one is made, and what it will take, for the prediction. */
typedef struct MillmBackendKind
{
	/* The model is borrowed for the backend's life. */
	MillmCode	(*create) (const MillmModel *model, const MillmBackendOptions *options, MillmBackend **out, MillmError *err);
	/* -1 when kernels cannot be chosen (create says why) */
	int64_t		(*page_bytes) (const MillmModel *model, const char *kernels, MillmKvFormat format, int layers_per_page);
	int64_t		(*buffer_bytes) (int64_t n_rows, int64_t n_columns);
	int64_t		(*own_bytes) (const MillmModel *model, const MillmBackendOptions *options);
	/* Of the weights that it keeps a copy of, as if they were "FP16", "Q4" or "Q8"; NULL: as they are.  No function: uses them in place */
	int64_t		(*copied_bytes) (const MillmModel *model, const char *quantization);
} MillmBackendKind;

extern const MillmBackendKind millm_backend_cpu;

#endif
