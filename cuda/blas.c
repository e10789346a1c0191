/*
 * blas.c -- products of many rows through cuBLASLt.
 *
 * Owns:     the library's handle, a tile of weights and one of activations in bfloat16, the library's workspace, and the ways it has chosen.
 * Borrows:  the weights, the rows, the stream.
 * Does not: hold a model twice: of weights that are not bfloat16 one tile at a time is decoded, and overwritten by the next.
 *
 * The library is opened at run time, since it is larger than all of millm and not on every host.  Its types and numbers are written out here; they are
 * those of cublasLt.h of CUDA 12 and 13, and compared with it where it is when this is compiled.
 *
 * Ours is row by row, the library's column by column: y^T [n_out, n] = w [n_out, n_in] x^T.
 */
#include "blas.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "device_memory.h"

#define TILE_BYTES ((int64_t) 32 << 20)	/* of weights in bfloat16 */
#define TILE_ROWS 4096
#define X_ROWS 2048				/* of activations at a time: all of a step of the engine, or weights would be decoded once more */
#define WORKSPACE_BYTES ((int64_t) 32 << 20)
#define ALIGNMENT 256
#define COLUMN_ALIGNMENT 32		/* of a tile's rows: the largest chunk */
#define POINTER_ALIGNMENT 16	/* what the library may count on */
#define N_PLANS 64

typedef struct Algorithm
{
	uint64_t	data[8];
} Algorithm;

typedef struct Heuristic
{
	Algorithm	algorithm;
	size_t		workspace_bytes;
	int			status;
	float		waves;
	int			reserved[4];
} Heuristic;

enum
{
	TYPE_F32 = 0,
	TYPE_BF16 = 14,
	COMPUTE_F32 = 68,			/* never TF32 */
	TRANSPOSED = 1,
	DESC_TRANSPOSE_A = 3,
	PREF_MAX_WORKSPACE_BYTES = 1,
	PREF_MIN_ALIGNMENT_A = 5,	/* and B, C, D */
	N_MATRICES = 4
};

#if __has_include(<cublasLt.h>) && !defined(MILLM_CUDA_EMULATED)
#include <cublasLt.h>
_Static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t), "cublasLtMatmulAlgo_t");
_Static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t) &&
			   offsetof(Heuristic, status) == offsetof(cublasLtMatmulHeuristicResult_t, state), "cublasLtMatmulHeuristicResult_t");
_Static_assert(TYPE_F32 == (int) CUDA_R_32F && TYPE_BF16 == (int) CUDA_R_16BF && COMPUTE_F32 == (int) CUBLAS_COMPUTE_32F && TRANSPOSED == (int) CUBLAS_OP_T,
			   "types");
_Static_assert(DESC_TRANSPOSE_A == (int) CUBLASLT_MATMUL_DESC_TRANSA && PREF_MAX_WORKSPACE_BYTES == (int) CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
			   PREF_MIN_ALIGNMENT_A == (int) CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
			   PREF_MIN_ALIGNMENT_A + 3 == (int) CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, "attributes");
#endif

/* They return 0 when they succeed. */
static struct
{
	int			(*create) (void **handle);
	int			(*destroy) (void *handle);
	int			(*create_desc) (void **desc, int compute, int scale_type);
	int			(*destroy_desc) (void *desc);
	int			(*set_desc) (void *desc, int attribute, const void *value, size_t bytes);
	int			(*create_layout) (void **layout, int type, uint64_t n_rows, uint64_t n_columns, int64_t pitch);
	int			(*destroy_layout) (void *layout);
	int			(*create_preference) (void **preference);
	int			(*destroy_preference) (void *preference);
	int			(*set_preference) (void *preference, int attribute, const void *value, size_t bytes);
	int			(*choose) (void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int n_wanted, Heuristic *found, int *n_found);
	int			(*multiply) (void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout, const void *beta,
							 const void *c, void *c_layout, void *d, void *d_layout, const Algorithm *algorithm, void *workspace, size_t workspace_bytes,
							 cudaStream_t stream);
} lt;
static bool is_there;

static void
open_library(void)
{
	static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
	const struct
	{
		const char *name;
		void	   *function;
	}			wanted[] = {
		{"cublasLtCreate", &lt.create}, {"cublasLtDestroy", &lt.destroy},
		{"cublasLtMatmulDescCreate", &lt.create_desc}, {"cublasLtMatmulDescDestroy", &lt.destroy_desc},
		{"cublasLtMatmulDescSetAttribute", &lt.set_desc},
		{"cublasLtMatrixLayoutCreate", &lt.create_layout}, {"cublasLtMatrixLayoutDestroy", &lt.destroy_layout},
		{"cublasLtMatmulPreferenceCreate", &lt.create_preference}, {"cublasLtMatmulPreferenceDestroy", &lt.destroy_preference},
		{"cublasLtMatmulPreferenceSetAttribute", &lt.set_preference},
		{"cublasLtMatmulAlgoGetHeuristic", &lt.choose}, {"cublasLtMatmul", &lt.multiply},
	};
	void	   *library = NULL;

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]) && !library; i++)
		library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
	if (!library)
		return;
	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (!(*(void **) wanted[i].function = dlsym(library, wanted[i].name)))
			return;
	is_there = true;
}

bool
millm_cuda_blas_is_there(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, open_library);
	return is_there;
}

/* What the library has chosen for a shape; without layouts it has no way. */
typedef struct Plan
{
	int64_t		n_out, n, n_in;
	int64_t		w_pitch, x_pitch, y_pitch;
	void	   *w, *x, *y;		/* layouts */
	Algorithm	algorithm;
} Plan;

struct MillmCudaBlas
{
	void	   *handle;
	void	   *desc;
	void	   *preference;
	int64_t		widest;
	int64_t		n_x;			/* rows of the tile of activations */
	char	   *memory;
	void	   *w, *x, *workspace;	/* in it */
	Plan		plans[N_PLANS];
	int			next_plan;		/* that gives way */
};

static int64_t
round_up(int64_t n, int64_t to)
{
	return (n + to - 1) / to * to;
}

static int64_t
smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* Rows of weights that are decoded at a time, a multiple of 64; of any weight's at most w_bytes() */
static int64_t
tile_rows(int64_t pitch)
{
	return smaller(TILE_ROWS, TILE_BYTES / (2 * pitch) / 64 * 64);
}

static int64_t
w_bytes(int64_t widest)
{
	return smaller(TILE_BYTES, TILE_ROWS * round_up(widest, COLUMN_ALIGNMENT) * 2);
}

static int64_t
x_bytes(int64_t widest, int max_tokens)
{
	return round_up(smaller(max_tokens, X_ROWS) * round_up(widest, COLUMN_ALIGNMENT) * 2, ALIGNMENT);
}

int64_t
millm_cuda_blas_bytes(int64_t widest, int max_tokens)
{
	return w_bytes(widest) + x_bytes(widest, max_tokens) + WORKSPACE_BYTES;
}

MillmCode
millm_cuda_blas_create(int64_t widest, int max_tokens, cudaStream_t stream, MillmCudaBlas **out, MillmError *err)
{
	static const int32_t transposed = TRANSPOSED;
	static const size_t workspace_bytes = WORKSPACE_BYTES;
	static const uint32_t alignment = POINTER_ALIGNMENT;
	MillmCudaBlas *b = calloc(1, sizeof(*b));
	MillmCode	rc;
	int			status;

	if (!b)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	status = lt.create(&b->handle);
	if (status == 0)
		status = lt.create_desc(&b->desc, COMPUTE_F32, TYPE_F32);
	if (status == 0)
		status = lt.set_desc(b->desc, DESC_TRANSPOSE_A, &transposed, sizeof(transposed));
	if (status == 0)
		status = lt.create_preference(&b->preference);
	if (status == 0)
		status = lt.set_preference(b->preference, PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof(workspace_bytes));
	for (int i = 0; i < N_MATRICES && status == 0; i++)
		status = lt.set_preference(b->preference, PREF_MIN_ALIGNMENT_A + i, &alignment, sizeof(alignment));
	if (status != 0)
	{
		rc = millm_fail(err, MILLM_E_INTERNAL, "cuBLASLt does not start on the CUDA device");
		millm_detail(err, "Its status is %d.", status);
	}
	else
		rc = millm_cuda_allocate(&b->memory, millm_cuda_blas_bytes(widest, max_tokens), "products of many rows", stream, err);
	if (rc != MILLM_OK)
	{
		millm_cuda_blas_free(b);
		return rc;
	}
	b->widest = widest;
	b->n_x = smaller(max_tokens, X_ROWS);
	b->w = b->memory;
	b->x = b->memory + w_bytes(widest);
	b->workspace = (char *) b->x + x_bytes(widest, max_tokens);
	*out = b;
	return MILLM_OK;
}

static void
drop(Plan *p)
{
	void	   *layouts[] = {p->w, p->x, p->y};

	for (int i = 0; i < 3; i++)
		if (layouts[i])
			(void) lt.destroy_layout(layouts[i]);
	*p = (Plan) {0};
}

void
millm_cuda_blas_free(MillmCudaBlas *b)
{
	if (!b)
		return;
	for (int i = 0; i < N_PLANS; i++)
		drop(&b->plans[i]);
	if (b->preference)
		(void) lt.destroy_preference(b->preference);
	if (b->desc)
		(void) lt.destroy_desc(b->desc);
	if (b->handle)
		(void) lt.destroy(b->handle);
	(void) cudaFree(b->memory);
	free(b);
}

/* How n rows are multiplied with n_out of the weights; NULL: the library has no way. */
static const Plan *
plan_of(MillmCudaBlas *b, int64_t n_out, int64_t n, int64_t n_in, int64_t w_pitch, int64_t x_pitch, int64_t y_pitch)
{
	Plan	   *p;
	Heuristic	found;
	int			n_found = 0;

	for (int i = 0; i < N_PLANS; i++)
	{
		p = &b->plans[i];
		if (p->n_out == n_out && p->n == n && p->n_in == n_in && p->w_pitch == w_pitch && p->x_pitch == x_pitch && p->y_pitch == y_pitch)
			return p->w ? p : NULL;
	}
	p = &b->plans[b->next_plan];
	b->next_plan = (b->next_plan + 1) % N_PLANS;
	drop(p);
	*p = (Plan) {.n_out = n_out, .n = n, .n_in = n_in, .w_pitch = w_pitch, .x_pitch = x_pitch, .y_pitch = y_pitch};
	if (lt.create_layout(&p->w, TYPE_BF16, (uint64_t) n_in, (uint64_t) n_out, w_pitch) != 0 ||
		lt.create_layout(&p->x, TYPE_BF16, (uint64_t) n_in, (uint64_t) n, x_pitch) != 0 ||
		lt.create_layout(&p->y, TYPE_F32, (uint64_t) n_out, (uint64_t) n, y_pitch) != 0 ||
		lt.choose(b->handle, b->desc, p->w, p->x, p->y, p->y, b->preference, 1, &found, &n_found) != 0 || n_found < 1 || found.status != 0)
	{
		drop(p);
		*p = (Plan) {.n_out = n_out, .n = n, .n_in = n_in, .w_pitch = w_pitch, .x_pitch = x_pitch, .y_pitch = y_pitch};
		return NULL;
	}
	p->algorithm = found.algorithm;
	return p;
}

/* Of a product: tiles of weights [tile, n_in], w_pitch elements apart, and of rows [n_x, n_in], x_pitch apart */
typedef struct Tiles
{
	int64_t		tile, w_pitch, x_pitch;
	bool		in_place;		/* weights are bfloat16, and all of them one tile */
} Tiles;

/* y[t0 .. t0 + n, o0 .. o0 + n_out) (+)= x w^T, of tiles that are decoded; a plan for it is known. */
static cudaError_t
multiply(MillmCudaBlas *b, const MillmCudaMatmul *m, const Tiles *s, int64_t o0, int64_t n_out, int64_t t0, int64_t n, cudaStream_t stream)
{
	static const float one = 1,
				zero = 0;
	const Plan *p = plan_of(b, n_out, n, m->w.n_in, s->w_pitch, s->x_pitch, m->y.stride);
	const void *w = s->in_place ? m->w.data : b->w;
	float	   *y = m->y.data + t0 * m->y.stride + o0;

	if (!p || lt.multiply(b->handle, b->desc, &one, w, p->w, b->x, p->x, m->accumulate ? &one : &zero, y, p->y, y, p->y, &p->algorithm, b->workspace,
						  (size_t) WORKSPACE_BYTES, stream) != 0)
		return cudaErrorUnknown;
	return cudaSuccess;
}

/* Has the library a way for every pair of tiles?  There are at most four shapes of them. */
static bool
has_plans(MillmCudaBlas *b, const MillmCudaMatmul *m, const Tiles *s)
{
	const int64_t widths[] = {smaller(s->tile, m->w.n_out), m->w.n_out % s->tile},
				heights[] = {smaller(b->n_x, m->n), m->n % b->n_x};

	for (int i = 0; i < 4; i++)
		if (widths[i % 2] > 0 && heights[i / 2] > 0 &&
			!plan_of(b, widths[i % 2], heights[i / 2], m->w.n_in, s->w_pitch, s->x_pitch, m->y.stride))
			return false;
	return true;
}

MillmCudaFragments
millm_cuda_blas_rows(const MillmCudaBlas *b, int64_t n_columns, int n)
{
	const bool	has_room = n <= b->n_x && n_columns <= b->widest && n_columns % 64 == 0;

	return (MillmCudaFragments) {.data = has_room ? b->x : NULL, .n_blocks = n_columns / 64, .in_rows = true};
}

cudaError_t
millm_cuda_blas_matmul(MillmCudaBlas *b, const MillmCudaMatmul *m, bool x_is_there, MillmCudaQueue *queue, cudaStream_t stream, bool *is_done)
{
	const int64_t pitch = round_up(m->w.n_in, COLUMN_ALIGNMENT);
	const bool	in_place = m->w.dtype == MILLM_BF16;
	const Tiles s = {.tile = in_place ? m->w.n_out : tile_rows(pitch), .w_pitch = in_place ? m->w.row_bytes / 2 : pitch, .x_pitch = pitch, .in_place = in_place};
	cudaError_t status = cudaSuccess;

	*is_done = m->w.dtype != MILLM_F32 && m->w.n_in <= b->widest && s.tile > 0 && has_plans(b, m, &s);
	if (!*is_done)
		return cudaSuccess;
	for (int64_t t0 = 0; t0 < m->n && status == cudaSuccess; t0 += b->n_x)
	{
		const int64_t n = smaller(b->n_x, m->n - t0);

		if (!x_is_there)
			status = millm_cuda_round_rows(b->x, pitch, (MillmRows) {m->x.data + t0 * m->x.stride, m->x.stride}, m->w.n_in, (int) n, queue);
		for (int64_t o0 = 0; o0 < m->w.n_out && status == cudaSuccess; o0 += s.tile)
		{
			const int64_t n_out = smaller(s.tile, m->w.n_out - o0);

			if (!in_place)
				status = millm_cuda_decode(b->w, pitch, &m->w, o0, n_out, queue);
			if (status == cudaSuccess)
				status = millm_cuda_queue_flush(queue);
			if (status == cudaSuccess)
				status = multiply(b, m, &s, o0, n_out, t0, n, stream);
		}
	}
	if (status == cudaSuccess && m->bias)
		status = millm_cuda_add_rows(m->y, (MillmRows) {(float *) m->bias, 0}, NULL, NULL, 1, m->w.n_out, m->n, queue);
	return status;
}
