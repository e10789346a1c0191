/*
 * cublaslt.c -- what cuda/blas.c calls of cuBLASLt, as plain loops over this process's memory: bfloat16 factors, float32 sums.
 *
 * It refuses (status 15, as the library says of what it does not support) what the library would: pitches that are too small.  And, so that the way
 * around is taken too, every product of exactly 67 rows.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"

#define REFUSED 15
#define REFUSED_ROWS 67

typedef struct Layout
{
	uint64_t	n_rows, n_columns;
	int64_t		pitch;
	int			type;
} Layout;

typedef struct Heuristic
{
	uint64_t	algorithm[8];
	size_t		workspace_bytes;
	int			status;
	float		waves;
	int			reserved[4];
} Heuristic;

static int
make(void **out, size_t bytes)
{
	return (*out = calloc(1, bytes)) ? 0 : 3;
}

static int
unmake(void *p)
{
	free(p);
	return 0;
}

int
cublasLtCreate(void **handle)
{
	return make(handle, 1);
}

int
cublasLtDestroy(void *handle)
{
	return unmake(handle);
}

int
cublasLtMatmulDescCreate(void **desc, int compute, int scale_type)
{
	return compute == 68 && scale_type == 0 ? make(desc, sizeof(int32_t)) : REFUSED;
}

int
cublasLtMatmulDescDestroy(void *desc)
{
	return unmake(desc);
}

int
cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t bytes)
{
	if (attribute != 3 || bytes != sizeof(int32_t))
		return REFUSED;
	memcpy(desc, value, bytes);
	return 0;
}

int
cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t n_rows, uint64_t n_columns, int64_t pitch)
{
	int			status = make(layout, sizeof(Layout));

	if (status == 0)
		*(Layout *) *layout = (Layout) {n_rows, n_columns, pitch, type};
	return status;
}

int
cublasLtMatrixLayoutDestroy(void *layout)
{
	return unmake(layout);
}

int
cublasLtMatmulPreferenceCreate(void **preference)
{
	return make(preference, 1);
}

int
cublasLtMatmulPreferenceDestroy(void *preference)
{
	return unmake(preference);
}

int
cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t bytes)
{
	(void) preference;
	(void) value;
	return (attribute == 1 && bytes == 8) || (attribute >= 5 && attribute <= 8 && bytes == 4) ? 0 : REFUSED;
}

/* a is w [k rows, m columns], transposed; b is x [k, n]; d is y [m, n]: columns lie pitch apart */
int
cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, const Layout *a, const Layout *b, const Layout *c, const Layout *d, void *preference, int n_wanted,
							   Heuristic *found, int *n_found)
{
	(void) handle;
	(void) preference;
	if (*(int32_t *) desc != 1 || a->type != 14 || b->type != 14 || c->type != 0 || d->type != 0 || a->n_rows != b->n_rows || a->n_columns != d->n_rows ||
		b->n_columns != d->n_columns || n_wanted < 1 || a->pitch < (int64_t) a->n_rows || b->pitch < (int64_t) b->n_rows || d->pitch < (int64_t) d->n_rows ||
		b->n_columns == REFUSED_ROWS)
		return REFUSED;
	memset(found, 0, sizeof(*found));
	found->algorithm[0] = 0x6d696c6c6d;
	*n_found = 1;
	return 0;
}

int
cublasLtMatmul(void *handle, void *desc, const float *alpha, const uint16_t *w, const Layout *a, const uint16_t *x, const Layout *b, const float *beta,
			   const float *c, const Layout *c_layout, float *y, const Layout *d, const uint64_t *algorithm, void *workspace, size_t workspace_bytes,
			   void *stream)
{
	(void) handle;
	(void) desc;
	(void) c_layout;
	(void) stream;
	if (algorithm[0] != 0x6d696c6c6d || (uintptr_t) w % 16 || (uintptr_t) x % 16 || (uintptr_t) y % 16)
		return REFUSED;
	memset(workspace, 0xff, workspace_bytes < 4096 ? workspace_bytes : 4096);
	for (uint64_t t = 0; t < d->n_columns; t++)
		for (uint64_t o = 0; o < d->n_rows; o++)
		{
			const int64_t at = (int64_t) t * d->pitch + (int64_t) o;
			float		sum = 0;

			for (uint64_t i = 0; i < a->n_rows; i++)
				sum += millm_bf16_to_f32(w[(int64_t) o * a->pitch + (int64_t) i]) * millm_bf16_to_f32(x[(int64_t) t * b->pitch + (int64_t) i]);
			y[at] = *alpha * sum + (*beta != 0 ? *beta * c[at] : 0);
		}
	return 0;
}
