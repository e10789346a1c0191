/*
 * backend_cpu.c -- the CPU: kernels of one variant, a team of threads, weights used where they lie.
 *
 * Owns:     the team, the buffers, the bytes of the KV pages, the angles of the step.
 * Borrows:  the model and, for a step, positions and page tables.
 * Does not: know what a layer is made of (forward.c) or whose a page is (kv.c).
 *
 * An activation is packed once into the form that the weights it meets ask for, and the packed rows
 * stay valid until the buffer is written again or a weight asks for another form.  Small loops run on the calling thread alone: waking
 * others takes longer.
 *
 * KV pages: for each layer of a group K [n_kv_heads, head_dim, 16] then V [n_kv_heads, 16, head_dim] (MillmKvLayer), in float32
 * for ref, which is exact, float16 otherwise, or in int8, which is asked for.
 */
#include "backend.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "arith.h"
#include "forward.h"
#include "half.h"
#include "kernel.h"
#include "screen.h"
#include "threads.h"

_Static_assert(MILLM_KV_PAGE_TOKENS == MILLM_KERNEL_PAGE, "a KV page is as wide as the kernels think");

/* Loops with less work than this, in multiply-adds or the like, are not worth waking anybody for. */
#define MIN_PARALLEL_WORK	(32 * 1024)
/*
 * The pieces of a matmul.  A thread takes many that follow each other, and towards the end single ones (millm_team_run()), since each that does not follow
 * the one before is a new read: it costs a few hundred nanoseconds until the prefetches are ahead.  With several tokens a piece's weights may be
 * read again for each few of them, and must stay in the L2 cache.  Kernels of tiles see to that themselves: theirs are a tile's outputs.
 */
#define MIN_PIECE_BYTES		(32 * 1024)
#define MAX_PIECE_BYTES		(128 * 1024)
#define PIECES_PER_THREAD	8
/* Outputs of a piece: a multiple of every kernel's tile, but of those of forms in groups. */
#define OUTPUT_GRANULE		16
#define COLUMN_GRANULE		256

/* A shortlist of more than this part of the head's rows is not worth reading it piecemeal. */
#define SHORTLIST_SHARE		16
/* A step of more rows is bound by arithmetic, of which the copy saves none. */
#define MAX_SCREENED_ROWS	7

struct MillmBuffer
{
	float	   *data;			/* [n_rows, n_columns] */
	int64_t		n_columns;
	char	   *packed;			/* [n_rows, packed_stride bytes] in one form, 64-byte aligned; rows up to a multiple of MILLM_TILE_TOKENS */
	int64_t		packed_stride;	/* wide enough for any form */
	MillmForm	form;			/* of the first n_packed rows of packed, which are up to date */
	int			n_packed;
	size_t		mapped;			/* bytes from data on, packed included */
	MillmBuffer *next;
};

typedef struct CpuBackend
{
	MillmBackend base;			/* first: the backend is this */
	const MillmModel *model;
	MillmKernels k;
	const MillmKvKernels *kv_kernels;	/* in k: of the pages' format */
	MillmTeam  *team;
	bool		deterministic;
	MillmBuffer *buffers;
	/* KV */
	char	   *kv;				/* [n_pages, page_bytes] */
	size_t		kv_bytes;
	int64_t		page_bytes;
	int64_t		layer_bytes;	/* of a layer in a page */
	/* the step */
	int			bad_place;		/* of check(); -1: none */
	const int32_t *positions;
	const int32_t *const *pages;	/* [n, n_groups] */
	int			n_groups;
	int			n_pairs;		/* rotary_dim / 2, 0 without rope */
	float	   *cosine,			/* [max_tokens, n_pairs]; behind them, the local rope's */
			   *sine;
	float	   *frequencies;	/* [n_pairs], of a length */
	int64_t		local_angles;	/* where these begin; 0: there is none */
	float	   *alibi;			/* [n_heads, alibi_stride]: what a key's position adds to its score; NULL without */
	int64_t		alibi_stride;
	/* the shortlist of a row of logits, when the model has a screening copy */
	float	   *lower;			/* [vocab] */
	float	   *heap;			/* [vocab / SHORTLIST_SHARE] */
	int32_t    *ids;			/* the same */
	float	   *wide_error;		/* [vocab]: of the screening copy with activations of int16; NULL: they are not used */
	int			n_listed[MAX_SCREENED_ROWS];	/* of each row; -1: too many */
	int32_t		listed[MAX_SCREENED_ROWS][MILLM_MAX_LISTED];
} CpuBackend;

static CpuBackend *
cpu(MillmBackend *be)
{
	return (CpuBackend *) be;
}

static float *
row(const MillmBuffer *b, int64_t t)
{
	return b->data + t * b->n_columns;
}

/* Run work over n rows of about row_work each; few of them stay here. */
static void
run_rows(CpuBackend *c, void (*work) (void *arg, int64_t begin, int64_t end), void *arg, int64_t n, int64_t row_work)
{
	int64_t		grain = MIN_PARALLEL_WORK / 4 / (row_work < 1 ? 1 : row_work) + 1;

	if (n * row_work < MIN_PARALLEL_WORK)
		grain = n;
	millm_team_run(c->team, work, arg, n, grain, grain);
}

/* ---- memory ---- */

/* Of any layer in a KV page: the largest counts. */
static int64_t
layer_bytes(const MillmModel *model, MillmDtype dtype)
{
	int64_t		largest = 0;

	for (int i = 0; i < model->config.n_layers; i++)
	{
		const MillmLayer *layer = &model->layers[i];
		/* bounded by MILLM_MAX_HEADS and MILLM_MAX_HEAD_DIM: no overflow */
		int64_t		bytes = 2 * layer->n_kv_heads * millm_kv_head_bytes(dtype, layer->head_dim);

		largest = bytes > largest ? bytes : largest;
	}
	return (largest + 63) / 64 * 64;
}

static bool
choose_kernels(const char *name, MillmKernels *k, MillmError *err)
{
	bool		is_known;

	if (!name || !*name)
		name = getenv("MILLM_KERNELS");
	if (name && !*name)
		name = NULL;
	if (millm_kernels_init(k, name, &is_known))
		return true;
	millm_fail(err, is_known ? MILLM_E_UNSUPPORTED : MILLM_E_INVALID_ARGUMENT,
			   is_known ? "this CPU cannot run the kernels \"%s\"" : "there are no kernels named \"%s\"", name);
	millm_hint(err, "Kernels are \"ref\", \"avx2\", \"avx512\" and \"amx\"; without a name the best that the CPU can run are taken.");
	return false;
}

static int64_t
page_bytes(const MillmModel *model, const char *kernels, MillmKvFormat format, int layers_per_page)
{
	MillmKernels k;

	return choose_kernels(kernels, &k, NULL) ? layers_per_page * layer_bytes(model, k.kv[format].dtype) : -1;
}

static int64_t
buffer_bytes(int64_t n_rows, int64_t n_columns)
{
	int64_t		packed_rows = (n_rows + MILLM_TILE_TOKENS - 1) / MILLM_TILE_TOKENS * MILLM_TILE_TOKENS;

	return (n_rows * n_columns * (int64_t) sizeof(float) + 63) / 64 * 64 + packed_rows * millm_packed_row_bytes(n_columns);
}

/* Positions that a sequence can have, in whole pages; more than the pool's where windows give them back. */
static int64_t
alibi_stride(const MillmModel *model, int64_t n_pages)
{
	int64_t		known = (model->config.max_positions + MILLM_KERNEL_PAGE - 1) / MILLM_KERNEL_PAGE;

	return (known < n_pages || model->config.window > 0 ? known : n_pages) * MILLM_KERNEL_PAGE;
}

static int64_t
own_bytes(const MillmModel *model, const MillmBackendOptions *options)
{
	int64_t		n = model->screen.codes.data ? model->head.n_out : 0;
	int64_t		n_alibi = model->config.alibi_slopes ? model->config.n_heads * alibi_stride(model, options->n_pages) : 0;

	return (n_alibi + (int64_t) options->max_tokens * model->config.rotary_dim * (model->config.local_rope.inv_freq ? 2 : 1) + 2 * n + 2 * (n / SHORTLIST_SHARE)) * (int64_t) sizeof(float);
}

/* Zeroed memory that is not touched before it is used. */
static void *
map(size_t bytes, const char *what, MillmError *err)
{
	void	   *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory for %s", what);
		millm_detail(err, "Need %.1f MB: %s.", (double) bytes / 1e6, strerror(errno));
		return NULL;
	}
	madvise(p, bytes, MADV_HUGEPAGE);	/* a hint; refusal changes nothing */
	return p;
}

static MillmCode
buffer_create(MillmBackend *be, int64_t n_rows, int64_t n_columns, bool is_read, MillmBuffer **out, MillmError *err)
{
	CpuBackend *c = cpu(be);
	MillmBuffer *b = calloc(1, sizeof(*b));

	(void) is_read;				/* all of them are in host memory */
	if (!b)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	b->n_columns = n_columns;
	b->packed_stride = millm_packed_row_bytes(n_columns);
	b->mapped = (size_t) buffer_bytes(n_rows, n_columns);
	if (!(b->data = map(b->mapped, "the workspace", err)))
	{
		free(b);
		return MILLM_E_INSUFFICIENT_MEMORY;
	}
	b->packed = (char *) b->data + (n_rows * n_columns * (int64_t) sizeof(float) + 63) / 64 * 64;
	b->next = c->buffers;
	c->buffers = b;
	*out = b;
	return MILLM_OK;
}

static const float *
buffer_read(MillmBackend *be, MillmBuffer *x)
{
	(void) be;
	return x->data;
}

static void
cpu_free(MillmBackend *be)
{
	CpuBackend *c = cpu(be);

	while (c->buffers)
	{
		MillmBuffer *b = c->buffers;

		c->buffers = b->next;
		munmap(b->data, b->mapped);
		free(b);
	}
	if (c->kv)
		munmap(c->kv, c->kv_bytes);
	millm_team_free(c->team);
	free(c->cosine);
	free(c->sine);
	free(c->alibi);
	free(c->frequencies);
	free(c->wide_error);
	free(c->lower);
	free(c->heap);
	free(c->ids);
	free(c);
}

static void
copy_page(MillmBackend *be, int32_t dst, int32_t src)
{
	CpuBackend *c = cpu(be);

	memcpy(c->kv + dst * c->page_bytes, c->kv + src * c->page_bytes, (size_t) c->page_bytes);
}

/* ---- the step ---- */

/* cosine and sine from element `at` on */
static void
compute_angles(CpuBackend *c, const MillmRope *rope, const int32_t *planned_lengths, int64_t at, int n)
{
	const float *inv_freq = NULL;

	for (int t = 0; t < n; t++)
	{
		if (t == 0 || planned_lengths[t] != planned_lengths[t - 1])
			inv_freq = millm_rope_frequencies(rope, c->model->config.rotary_dim, planned_lengths[t], c->frequencies);
		for (int j = 0; j < c->n_pairs; j++, at++)
		{
			float		angle = (float) c->positions[t] * inv_freq[j];

			c->cosine[at] = cosf(angle) * rope->attention_factor;
			c->sine[at] = sinf(angle) * rope->attention_factor;
		}
	}
}

static void
begin(MillmBackend *be, const int32_t *positions, const int32_t *planned_lengths, const int32_t *const *pages, int n)
{
	CpuBackend *c = cpu(be);

	c->bad_place = -1;
	c->positions = positions;
	c->pages = pages;
	compute_angles(c, &c->model->config.rope, planned_lengths, 0, n);
	if (c->local_angles)
		compute_angles(c, &c->model->config.local_rope, planned_lengths, c->local_angles, n);
}

static void
embed(MillmBackend *be, MillmBuffer *y, const MillmWeight *table, const int32_t *rows, bool add, int n)
{
	y->n_packed = 0;
	for (int t = 0; t < n; t++)
		cpu(be)->k.load_row(row(y, t), millm_weight_row(table, rows[t]), table->dtype, table->n_in, add);
}

typedef struct NormLoop
{
	CpuBackend *c;
	MillmBuffer *y, *x;
	MillmNorm	kind;
	const MillmVector *weight, *bias;
	float		eps;
	int			n_parts;
	int64_t		n_columns;
} NormLoop;

static void
norm_rows(void *arg, int64_t begin_row, int64_t end_row)
{
	NormLoop   *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
		for (int64_t i = 0; i < l->n_parts * l->n_columns; i += l->n_columns)
		{
			const float *weight = l->weight->data + (l->weight->n > l->n_columns ? i : 0);
			const float *bias = l->bias->data && l->bias->n > l->n_columns ? l->bias->data + i : l->bias->data;

			if (l->kind == MILLM_NORM_RMS)
				l->c->k.rms_norm(row(l->y, t) + i, row(l->x, t) + i, weight, l->eps, l->n_columns);
			else
				l->c->k.layer_norm(row(l->y, t) + i, row(l->x, t) + i, weight, bias, l->eps, l->n_columns);
		}
}

static void
norm(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, MillmNorm kind, const MillmVector *weight, const MillmVector *bias,
	 float eps, int n_parts, int64_t n_columns, int n)
{
	NormLoop	l = {cpu(be), y, x, kind, weight, bias, eps, n_parts, n_columns};

	y->n_packed = 0;
	run_rows(l.c, norm_rows, &l, n, n_parts * n_columns * 2);
}

typedef struct PackLoop
{
	const MillmKernels *k;
	MillmForm	form;
	MillmBuffer *x;
	int64_t		n_columns;
	int			n;
} PackLoop;

static void
pack_groups(void *arg, int64_t begin_group, int64_t end_group)
{
	PackLoop   *l = arg;
	const int	width = millm_form_group(l->form);

	for (int64_t g = begin_group; g < end_group; g++)
	{
		int			t = (int) g * width;
		char	   *packed = l->x->packed + t * l->x->packed_stride;

		if (width == 1)
			l->k->pack[l->form] (packed, row(l->x, t), l->n_columns);
		else
			l->k->pack_group[l->form] (packed, row(l->x, t), l->x->n_columns, l->n - t < width ? l->n - t : width, l->n_columns);
	}
}

/* x->packed = the first n rows of x, n_columns of them, in that form, unless they are there. */
static void
pack(CpuBackend *c, MillmBuffer *x, MillmForm form, int64_t n_columns, int n)
{
	PackLoop	l = {&c->k, form, x, n_columns, n};
	const int	width = millm_form_group(form);

	if (x->form == form && x->n_packed == n)
		return;
	run_rows(c, pack_groups, &l, (n + width - 1) / width, n_columns * width);
	x->form = form;
	x->n_packed = n;
}

typedef struct MatmulLoop
{
	int			n_matmuls;
	MillmMatmulFn run[MILLM_MAX_PROJECTIONS];
	MillmMatmul m[MILLM_MAX_PROJECTIONS];
	int64_t		outputs[MILLM_MAX_PROJECTIONS];		/* of a piece */
	int64_t		end_piece[MILLM_MAX_PROJECTIONS];	/* pieces of the matmuls up to this one */
} MatmulLoop;

/* Pieces that follow each other may be computed as one. */
static bool
is_one_read(const MillmMatmul *m)
{
	return m->n_tokens == 1 || millm_form_group(m->form) > 1;
}

static void
matmul_pieces(void *arg, int64_t begin_piece, int64_t end_piece)
{
	MatmulLoop *l = arg;
	int64_t		first = 0;

	for (int i = 0; i < l->n_matmuls; first = l->end_piece[i++])
	{
		int64_t		from = begin_piece > first ? begin_piece : first;
		int64_t		to = end_piece < l->end_piece[i] ? end_piece : l->end_piece[i];
		int64_t		n_out = l->m[i].w->n_out;

		while (from < to)
		{
			const int64_t next = is_one_read(&l->m[i]) ? to : from + 1;
			const int64_t end = (next - first) * l->outputs[i];

			l->run[i] (&l->m[i], (from - first) * l->outputs[i], end < n_out ? end : n_out);
			from = next;
		}
	}
}

static MillmForm
choose_form(const CpuBackend *c, const MillmWeight *w, int n)
{
	return c->deterministic ? c->k.fixed_form(w) : c->k.best_form(w, n);
}

/* Outputs of a piece of a loop whose weights have so many bytes. */
static int64_t
piece_outputs(const CpuBackend *c, const MillmWeight *w, MillmForm form, int64_t all_bytes)
{
	const int64_t granule = w->in_out ? COLUMN_GRANULE : OUTPUT_GRANULE;
	int64_t		bytes = all_bytes / (c->base.n_threads * PIECES_PER_THREAD);
	int64_t		outputs;

	if (millm_form_group(form) > 1)
		return MILLM_TILE_OUTPUTS;
	bytes = bytes > MAX_PIECE_BYTES ? MAX_PIECE_BYTES : bytes < MIN_PIECE_BYTES ? MIN_PIECE_BYTES : bytes;
	outputs = bytes / millm_weight_bytes(w->dtype, w->n_in) / granule * granule;
	return outputs < granule ? granule : outputs;
}

static void
matmul(MillmBackend *be, const MillmProjection *p, int n_projections, MillmBuffer *x, int n)
{
	CpuBackend *c = cpu(be);
	MatmulLoop	l = {.n_matmuls = n_projections};
	MillmForm	packed = MILLM_FORM_F32;
	int64_t		bytes = 0,
				work = 0,
				n_pieces = 0;

	for (int i = 0; i < n_projections; i++)
	{
		bytes += millm_weight_bytes(p[i].w->dtype, p[i].w->n_in * p[i].w->n_out);
		work += p[i].w->n_in * p[i].w->n_out * n;
	}
	for (int i = 0; i < n_projections; i++)
	{
		const MillmForm form = choose_form(c, p[i].w, n);

		if (packed != MILLM_FORM_F32 && form != MILLM_FORM_F32 && form != packed)
		{						/* one packed form at a time */
			for (int j = 0; j < n_projections; j++)
				matmul(be, &p[j], 1, x, n);
			return;
		}
		packed = packed == MILLM_FORM_F32 ? form : packed;
	}
	if (packed != MILLM_FORM_F32)
		pack(c, x, packed, p[0].w->n_in, n);
	for (int i = 0; i < n_projections; i++)
	{
		const MillmWeight *w = p[i].w;
		const MillmForm form = choose_form(c, w, n);

		l.run[i] = c->k.matmul[form][w->dtype][w->in_out];
		l.m[i] = (MillmMatmul) {
			.y = p[i].y->data,
			.y_stride = p[i].y->n_columns,
			.w = w,
			.bias = p[i].bias->data,
			.accumulate = p[i].accumulate,
			.form = form,
			.x = form == MILLM_FORM_F32 ? (const void *) x->data : x->packed,
			.x_stride = form == MILLM_FORM_F32 ? x->n_columns * (int64_t) sizeof(float) : x->packed_stride,
			.n_tokens = n,
		};
		l.outputs[i] = piece_outputs(c, w, form, bytes);
		n_pieces += (w->n_out + l.outputs[i] - 1) / l.outputs[i];
		l.end_piece[i] = n_pieces;
		p[i].y->n_packed = 0;
	}
	millm_team_run(c->team, matmul_pieces, &l, n_pieces, work < MIN_PARALLEL_WORK ? n_pieces : 1, n_pieces);
}

/* ---- the head through its screening copy ---- */

typedef struct ScreenLoop
{
	MillmMatmulFn run;
	MillmMatmul m;
	const int32_t *ids;			/* of outputs */
} ScreenLoop;

static void
screen_ids(void *arg, int64_t begin_id, int64_t end_id)
{
	ScreenLoop *l = arg;

	for (int64_t i = begin_id; i < end_id; i++)
		l->run(&l->m, l->ids[i], l->ids[i] + 1);
}

/* n rows of x, from row t on, times w: in the exact form, whose rows have the same bits in any company, or as they are packed. */
static ScreenLoop
screen_loop(const CpuBackend *c, float *y, int64_t y_stride, const MillmWeight *w, MillmForm form, MillmBuffer *x, int t, int n)
{
	const bool	is_exact = form == MILLM_FORM_F32;

	return (ScreenLoop) {
		.run = c->k.matmul[form][w->dtype][0],
		.m = {.y = y, .y_stride = y_stride, .w = w, .form = form, .x = is_exact ? (const void *) row(x, t) : x->packed + t * x->packed_stride,
			.x_stride = is_exact ? x->n_columns * (int64_t) sizeof(float) : x->packed_stride, .n_tokens = n},
	};
}

/* No less than the Euclidean norm. */
static float
norm_above(const float *x, int64_t n)
{
	double		sum = 0;

	for (int64_t i = 0; i < n; i++)
		sum += (double) x[i] * x[i];
	return nextafterf((float) (sqrt(sum) * (1 + 0x1p-30)), INFINITY);
}

static int64_t
screened_matmul(MillmBackend *be, MillmBuffer *y, const MillmWeight *head, const MillmScreen *screen, MillmBuffer *x, const MillmTop *tops, int n)
{
	CpuBackend *c = cpu(be);
	int			vocab = (int) head->n_out;
	int64_t		n_read = 0;
	const MillmForm form = c->wide_error ? MILLM_FORM_I16 : MILLM_FORM_F32;
	const int64_t outputs = piece_outputs(c, &screen->codes, form, head->n_in * vocab);
	const int64_t n_pieces = (vocab + outputs - 1) / outputs;
	MatmulLoop	copy;
	ScreenLoop	l;

	if (n > MAX_SCREENED_ROWS || choose_form(c, head, n) != MILLM_FORM_F32)
		return 0;
	if (form != MILLM_FORM_F32)
		pack(c, x, form, head->n_in, n);
	y->n_packed = 0;
	l = screen_loop(c, y->data, y->n_columns, &screen->codes, form, x, 0, n);
	copy = (MatmulLoop) {.n_matmuls = 1, .run = {l.run}, .m = {l.m}, .outputs = {outputs}, .end_piece = {n_pieces}};
	millm_team_run(c->team, matmul_pieces, &copy, n_pieces, vocab * head->n_in * n < MIN_PARALLEL_WORK ? n_pieces : 1, n_pieces);
	for (int t = 0; t < n; t++)
	{
		float	   *logits = row(y, t);
		float		norm = norm_above(row(x, t), head->n_in);
		int			n_ids;

		if (form != MILLM_FORM_F32 && !(norm >= MILLM_SCREEN_SMALL))
			return -1;
		n_ids = millm_shortlist(c->ids, vocab / SHORTLIST_SHARE, logits, c->wide_error ? c->wide_error : screen->error.data, vocab, norm, &tops[t],
								c->lower, c->heap);
		if (n_ids < 0)
			return -1;
		for (int v = 0; v < vocab; v++)
			logits[v] = -INFINITY;
		l = screen_loop(c, logits, y->n_columns, head, MILLM_FORM_F32, x, t, 1);
		l.ids = c->ids;
		run_rows(c, screen_ids, &l, n_ids, head->n_in);
		for (int i = 0; i < n_ids; i++)
			if (!isfinite(logits[c->ids[i]]))
				return -1;
		c->n_listed[t] = n_ids <= MILLM_MAX_LISTED ? n_ids : -1;
		if (n_ids <= MILLM_MAX_LISTED)
			memcpy(c->listed[t], c->ids, (size_t) n_ids * sizeof(*c->ids));
		n_read += n_ids;
	}
	return n_read;
}

static MillmListed
listed(MillmBackend *be, int t)
{
	return (MillmListed) {cpu(be)->listed[t], cpu(be)->n_listed[t]};
}

/* Query heads of one KV head that a thread takes at a time: a whole group, but where all heads share one (Falcon 7B has 71).  A multiple of the kernels' 4. */
#define HEADS_AT_ONCE 8

typedef struct AttentionLoop
{
	CpuBackend *c;
	const MillmAttention *a;
	MillmKvLayer kv;
	int			n_parts;		/* of a group */
	MillmBuffer *y, *q, *k, *v;
} AttentionLoop;

static AttentionLoop
attention_loop(MillmBackend *be, const MillmAttention *a)
{
	CpuBackend *c = cpu(be);
	int64_t		head_bytes = millm_kv_head_bytes(c->kv_kernels->dtype, a->head_dim);
	char	   *layer = c->kv + a->page_place * c->layer_bytes;

	return (AttentionLoop) {
		.c = c,
		.a = a,
		.n_parts = (a->n_heads / a->n_kv_heads + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE,
		.kv = {
			.k = layer,
			.v = layer + a->n_kv_heads * head_bytes,
			.page_bytes = c->page_bytes,
			.head_bytes = head_bytes,
			.n_kv_heads = a->n_kv_heads,
			.head_dim = a->head_dim,
			.group = a->n_heads / a->n_kv_heads,
			.window = a->window,
			.scale = a->scale,
			.softcap = a->softcap,
			.bias = c->alibi,
			.bias_stride = c->alibi_stride,
			.sinks = a->sinks,
		},
	};
}

/* The page table of a token for these layers. */
static const int32_t *
pages_of(const CpuBackend *c, const MillmAttention *a, int64_t t)
{
	return c->pages[t * c->n_groups + a->page_group];
}

static void
split_qkv(MillmBackend *be, const MillmAttention *a, MillmBuffer *q, MillmBuffer *k, MillmBuffer *v, MillmBuffer *qkv, int n)
{
	const size_t head = (size_t) a->head_dim,
				group = head * (size_t) (a->n_heads / a->n_kv_heads);

	(void) be;
	q->n_packed = k->n_packed = v->n_packed = 0;
	for (int t = 0; t < n; t++)
		for (size_t h = 0; h < (size_t) a->n_kv_heads; h++)
		{
			const float *from = row(qkv, t) + h * (group + 2 * head);

			memcpy(row(q, t) + h * group, from, group * sizeof(float));
			memcpy(row(k, t) + h * head, from + group, head * sizeof(float));
			memcpy(row(v, t) + h * head, from + group + head, head * sizeof(float));
		}
}

static void
rope_and_store_rows(void *arg, int64_t begin_row, int64_t end_row)
{
	AttentionLoop *l = arg;
	const CpuBackend *c = l->c;
	bool		interleaved = c->model->config.rope_interleaved;

	for (int64_t t = begin_row; t < end_row; t++)
	{
		int32_t		position = c->positions[t];

		if (c->n_pairs > 0 && !l->a->unrotated)
		{
			int64_t		at = (l->a->local ? c->local_angles : 0) + t * c->n_pairs;
			const float *cosine = c->cosine + at;
			const float *sine = c->sine + at;

			c->k.rope(row(l->q, t), l->a->n_heads, l->a->head_dim, c->n_pairs, interleaved, cosine, sine);
			c->k.rope(row(l->k, t), l->a->n_kv_heads, l->a->head_dim, c->n_pairs, interleaved, cosine, sine);
		}
		c->kv_kernels->store(&l->kv, pages_of(c, l->a, t)[position / MILLM_KERNEL_PAGE], position % MILLM_KERNEL_PAGE, row(l->k, t), row(l->v, t));
	}
}

static void
rope_and_store(MillmBackend *be, const MillmAttention *a, MillmBuffer *q, MillmBuffer *k, MillmBuffer *v, int n)
{
	AttentionLoop l = attention_loop(be, a);

	l.q = q;
	l.k = k;
	l.v = v;
	q->n_packed = k->n_packed = 0;
	run_rows(l.c, rope_and_store_rows, &l, n, (int64_t) (a->n_heads + 3 * a->n_kv_heads) * a->head_dim);
}

/* Items are parts of the groups of the KV heads of the tokens. */
static void
attention_items(void *arg, int64_t begin_item, int64_t end_item)
{
	AttentionLoop *l = arg;

	for (int64_t i = begin_item; i < end_item; i++)
	{
		const int64_t t = i / l->n_parts / l->a->n_kv_heads, kv_head = i / l->n_parts % l->a->n_kv_heads;
		const int	first = (int) (i % l->n_parts) * HEADS_AT_ONCE, rest = l->kv.group - first;
		const int64_t head = kv_head * l->kv.group + first;
		MillmKvLayer kv = l->kv;

		/* a layer whose first KV head has no other queries */
		kv.group = rest < HEADS_AT_ONCE ? rest : HEADS_AT_ONCE;
		kv.k += kv_head * kv.head_bytes;
		kv.v += kv_head * kv.head_bytes;
		if (kv.bias)
			kv.bias += head * kv.bias_stride;
		if (kv.sinks)
			kv.sinks += head;
		l->c->kv_kernels->attention(row(l->y, t) + head * kv.head_dim, row(l->q, t) + head * kv.head_dim, &kv, pages_of(l->c, l->a, t), l->c->positions[t], 0);
	}
}

static void
attention(MillmBackend *be, const MillmAttention *a, MillmBuffer *y, MillmBuffer *q, int n)
{
	AttentionLoop l = attention_loop(be, a);
	int64_t		n_items = (int64_t) n * a->n_kv_heads * l.n_parts;
	int64_t		work = 0;
	int64_t		grain = n_items / (l.c->base.n_threads * 16) + 1;

	for (int t = 0; t < n; t++)
		work += ((int64_t) l.c->positions[t] + 1) * a->n_heads * a->head_dim * 2;
	l.y = y;
	l.q = q;
	y->n_packed = 0;
	grain = work < MIN_PARALLEL_WORK ? n_items : grain;
	millm_team_run(l.c->team, attention_items, &l, n_items, grain, grain);
}

typedef struct ActivationLoop
{
	void		(*unary) (float *y, const float *x, const float *up, int64_t n);
	void		(*pairs) (float *y, const float *x, int64_t n);	/* instead, unless NULL */
	MillmBuffer *y, *x, *up;
	int64_t		n_columns;
} ActivationLoop;

static void
activation_rows(void *arg, int64_t begin_row, int64_t end_row)
{
	ActivationLoop *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
		if (l->pairs)
			l->pairs(row(l->y, t), row(l->x, t), l->n_columns);
		else
			l->unary(row(l->y, t), row(l->x, t), l->up ? row(l->up, t) : NULL, l->n_columns);
}

static void
activation(MillmBackend *be, MillmBuffer *y, MillmAct act, MillmBuffer *x, MillmBuffer *up, int64_t n_columns, int n)
{
	static const MillmUnary unary_of[] = {
		[MILLM_ACT_SILU] = MILLM_UNARY_SILU,
		[MILLM_ACT_GELU_TANH] = MILLM_UNARY_GELU_TANH,
		[MILLM_ACT_GELU_ERF] = MILLM_UNARY_GELU_ERF,
		[MILLM_ACT_RELU] = MILLM_UNARY_RELU,
	};
	const bool	has_pairs = act == MILLM_ACT_SWIGLU_PAIRS;
	ActivationLoop l = {has_pairs ? NULL : cpu(be)->k.unary[unary_of[act]], has_pairs ? cpu(be)->k.swiglu_pairs : NULL, y, x, up, n_columns};

	y->n_packed = 0;
	run_rows(cpu(be), activation_rows, &l, n, n_columns * 4);
}

typedef struct PairLoop
{
	CpuBackend *c;
	MillmBuffer *y, *x;
	float		scale;			/* or cap */
} PairLoop;

static void
add_rows(void *arg, int64_t begin_row, int64_t end_row)
{
	PairLoop   *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
		for (int64_t i = 0; i < l->y->n_columns; i++)
			row(l->y, t)[i] += l->scale * row(l->x, t)[i];
}

static void
add(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, float scale, int n)
{
	PairLoop	l = {cpu(be), y, x, scale};

	y->n_packed = 0;
	run_rows(l.c, add_rows, &l, n, y->n_columns);
}

typedef struct AddLoop
{
	MillmBuffer *y, *x;
	const int32_t *rows;
	const float *weights;
} AddLoop;

static void
add_weighted_row(void *arg, int64_t begin_row, int64_t end_row)
{
	AddLoop    *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
	{
		float	   *y = row(l->y, l->rows[t]);
		const float *x = row(l->x, t);

		for (int64_t i = 0; i < l->y->n_columns; i++)
			y[i] += l->weights[t] * x[i];
	}
}

static void
add_weighted_rows(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, const int32_t *rows, const float *weights, int n)
{
	AddLoop		l = {y, x, rows, weights};

	y->n_packed = 0;
	run_rows(cpu(be), add_weighted_row, &l, n, y->n_columns);
}

typedef struct GatedLoop
{
	MillmBuffer *y, *x, *scores;
} GatedLoop;

static void
add_gated_row(void *arg, int64_t begin_row, int64_t end_row)
{
	GatedLoop  *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
	{
		const float share = 1 / (1 + expf(-*row(l->scores, t)));

		for (int64_t i = 0; i < l->y->n_columns; i++)
			row(l->y, t)[i] += share * row(l->x, t)[i];
	}
}

static void
add_gated(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, MillmBuffer *scores, int n)
{
	GatedLoop	l = {y, x, scores};

	y->n_packed = 0;
	run_rows(cpu(be), add_gated_row, &l, n, y->n_columns);
}

static void
scale_rows(void *arg, int64_t begin_row, int64_t end_row)
{
	PairLoop   *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
		for (int64_t i = 0; i < l->x->n_columns; i++)
			row(l->x, t)[i] *= l->scale;
}

static void
scale(MillmBackend *be, MillmBuffer *x, float by, int n)
{
	PairLoop	l = {cpu(be), NULL, x, by};

	x->n_packed = 0;
	run_rows(l.c, scale_rows, &l, n, x->n_columns);
}

static void
softcap_rows(void *arg, int64_t begin_row, int64_t end_row)
{
	PairLoop   *l = arg;

	for (int64_t t = begin_row; t < end_row; t++)
		l->c->k.softcap(row(l->x, t), l->scale, l->x->n_columns);
}

static void
softcap(MillmBackend *be, MillmBuffer *x, float cap, int n)
{
	PairLoop	l = {cpu(be), NULL, x, cap};

	x->n_packed = 0;
	run_rows(l.c, softcap_rows, &l, n, x->n_columns * 4);
}

static void
select_rows(MillmBackend *be, MillmBuffer *y, MillmBuffer *x, const int32_t *rows, int n)
{
	(void) be;
	y->n_packed = 0;
	for (int t = 0; t < n; t++)
		memcpy(row(y, t), row(x, rows[t]), sizeof(float) * (size_t) x->n_columns);
}

static void
check(MillmBackend *be, MillmBuffer *x, int place, int n)
{
	CpuBackend *c = cpu(be);

	for (int t = 0; t < n && c->bad_place < 0; t++)
		if (!c->k.is_finite(row(x, t), x->n_columns))
			c->bad_place = place;
}

static int
first_bad(MillmBackend *be)
{
	return cpu(be)->bad_place;
}

/* ---- create ---- */

static MillmCode
create_kv(CpuBackend *c, int64_t n_pages, int layers_per_page, MillmError *err)
{
	c->layer_bytes = layer_bytes(c->model, c->kv_kernels->dtype);
	c->page_bytes = layers_per_page * c->layer_bytes;
	if (n_pages < 1 || !millm_mul_size((size_t) n_pages, (size_t) c->page_bytes, &c->kv_bytes))
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid number of KV pages: %" PRId64, n_pages);
	if (!(c->kv = map(c->kv_bytes, "the KV cache", err)))
		return MILLM_E_INSUFFICIENT_MEMORY;
	return MILLM_OK;
}

/* Once and for all: two roundings of what a key gets added are then no kernel's matter. */
static MillmCode
create_alibi(CpuBackend *c, int64_t n_pages, MillmError *err)
{
	const MillmConfig *config = &c->model->config;

	if (!config->alibi_slopes)
		return MILLM_OK;
	c->alibi_stride = alibi_stride(c->model, n_pages);
	if (!(c->alibi = calloc((size_t) config->n_heads, (size_t) c->alibi_stride * sizeof(float))))
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory for the biases of the scores");
		millm_detail(err, "Need %.1f MB.", (double) config->n_heads * (double) c->alibi_stride * 4 / 1e6);
		return MILLM_E_INSUFFICIENT_MEMORY;
	}
	for (int h = 0; h < config->n_heads; h++)
		for (int64_t p = 0; p < c->alibi_stride; p++)
		{
			float		bias = config->alibi_slopes[h] * (float) p;

			if (config->alibi_rounded)
				bias = millm_bf16_to_f32(millm_f32_to_bf16(bias)) * config->attention_scale;
			c->alibi[h * c->alibi_stride + p] = bias;
		}
	return MILLM_OK;
}

static MillmCode
create(const MillmModel *model, const MillmBackendOptions *options, MillmBackend **out, MillmError *err)
{
	CpuBackend *c = calloc(1, sizeof(*c));
	MillmCode	rc;

	if (!c)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	c->model = model;
	c->n_groups = options->n_groups;
	c->deterministic = options->deterministic;
	if (!choose_kernels(options->kernels, &c->k, err))
	{
		rc = err ? err->code : MILLM_E_UNSUPPORTED;
		goto failed;
	}
	c->kv_kernels = &c->k.kv[options->kv_format];
	c->base = (MillmBackend) {
		.name = "cpu",
		.variant = c->k.variant,
		.kv_dtype = c->kv_kernels->dtype,
		.free = cpu_free,
		.buffer_create = buffer_create,
		.buffer_read = buffer_read,
		.begin = begin,
		.embed = embed,
		.norm = norm,
		.matmul = matmul,
		.screened_matmul = screened_matmul,
		.listed = listed,
		.split_qkv = split_qkv,
		.rope_and_store = rope_and_store,
		.attention = attention,
		.activation = activation,
		.add = add,
		.scale = scale,
		.softcap = softcap,
		.add_rows = add_weighted_rows,
		.add_gated = add_gated,
		.select = select_rows,
		.check = check,
		.first_bad = first_bad,
		.copy_page = copy_page,
	};
	if ((rc = millm_team_create(options->n_threads, &c->team, err)) != MILLM_OK ||
		(rc = create_kv(c, options->n_pages, options->layers_per_page, err)) != MILLM_OK ||
		(rc = create_alibi(c, options->n_pages, err)) != MILLM_OK)
		goto failed;
	c->base.n_threads = millm_team_size(c->team);
	if (model->config.position == MILLM_POS_ROPE)
	{
		size_t		n;

		c->n_pairs = model->config.rotary_dim / 2;
		n = (size_t) options->max_tokens * (size_t) c->n_pairs;
		if (model->config.local_rope.inv_freq)
		{
			c->local_angles = (int64_t) n;
			n *= 2;
		}
		c->cosine = calloc(n, sizeof(float));
		c->sine = calloc(n, sizeof(float));
		c->frequencies = calloc((size_t) c->n_pairs, sizeof(float));
		if (!c->cosine || !c->sine || !c->frequencies)
		{
			rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
			goto failed;
		}
	}
	if (model->screen.codes.data)
	{
		size_t		n = (size_t) model->head.n_out;

		if (c->k.matmul[MILLM_FORM_I16][MILLM_INT8][0] && (c->wide_error = malloc(n * sizeof(float))))
			millm_screen_widen(c->wide_error, model->screen.error.data, model->screen.codes.scale, model->head.n_out, model->head.n_in);
		c->lower = malloc(n * sizeof(float));
		c->heap = malloc((n / SHORTLIST_SHARE + 1) * sizeof(float));
		c->ids = malloc((n / SHORTLIST_SHARE + 1) * sizeof(int32_t));
		if (!c->lower || !c->heap || !c->ids)
		{
			rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
			goto failed;
		}
	}
	*out = &c->base;
	return MILLM_OK;
failed:
	cpu_free(&c->base);
	return rc;
}

const MillmBackendKind millm_backend_cpu = {
	.create = create,
	.page_bytes = page_bytes,
	.buffer_bytes = buffer_bytes,
	.own_bytes = own_bytes,
};
