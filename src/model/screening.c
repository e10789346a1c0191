/*
 * screening.c -- bind the screening copy of the LM head to its head.
 *
 * A copy of another head would strike out the wrong tokens.  That it belongs to this one is told by dtype, shape and
 * fingerprint (64 bytes of each row): whatever trains, exchanges, appends or moves rows changes it.  What remains is a head of
 * which someone has edited a few single values in place, since the copy was made, and bytes of the copy that have rotted on disk
 * (which would go unseen in the head as well).
 */
#include "screening.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "screen.h"

static const MillmStTensor *
find(const MillmSafetensors *st, const char *name, MillmDtype dtype, int n_dims, int64_t d0, int64_t d1)
{
	for (size_t i = 0; i < millm_st_n_tensors(st); i++)
	{
		const MillmStTensor *t = millm_st_tensor(st, i);

		if (strcmp(t->name, name) == 0)
			return t->dtype == dtype && t->n_dims == n_dims && t->dims[0] == d0 && (n_dims < 2 || t->dims[1] == d1) ? t : NULL;
	}
	return NULL;
}

/* Bounds are not negative, scales not that and finite; NaN is neither. */
static bool
are_possible(const float *error, const char *scale, int64_t n)
{
	for (int64_t v = 0; v < n; v++)
	{
		float		f;

		memcpy(&f, scale + 4 * v, sizeof(f));
		if (!(error[v] >= 0) || !(f >= 0 && f < INFINITY))
			return false;
	}
	return true;
}

/* One call for the pages of a mapping that will be read here and there, instead of a fault for each few.  Only a hint. */
static void
map_now(const void *p, size_t n)
{
#ifdef MADV_POPULATE_READ
	const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
	uintptr_t	begin = (uintptr_t) p / page * page;

	(void) madvise((void *) begin, (uintptr_t) p + n - begin, MADV_POPULATE_READ);
#else
	(void) p;
	(void) n;
#endif
}

bool
millm_screening_is_possible(const MillmModel *m)
{
	const MillmWeight *head = &m->head;

	return millm_config_can_screen(&m->config) && head->data && head->dtype < MILLM_N_FLOAT_DTYPES && !head->in_out && head->stride == head->n_in && !m->head_bias.data;
}

/* NULL, or why the file cannot be used. */
static const char *
bind(MillmModel *m, const MillmSafetensors *st)
{
	const MillmWeight *head = &m->head;
	int64_t		n = head->n_out;
	const MillmStTensor *codes = find(st, "codes", MILLM_I8, 2, n, head->n_in);
	const MillmStTensor *scale = find(st, "scale", MILLM_F32, 1, n, 0);
	const MillmStTensor *error = find(st, "error", MILLM_F32, 1, n, 0);
	const MillmStTensor *print = find(st, "fingerprint", MILLM_I64, 1, 1, 0);
	int64_t		fingerprint;

	if (!millm_screening_is_possible(m))
		return "the model's head is not a plain matrix of floats, or something is done to its logits";
	if (millm_st_n_tensors(st) != 4 || !codes || !scale || !error || !print)
		return "it does not hold what it should";
	memcpy(&fingerprint, print->data, sizeof(fingerprint));
	map_now(head->data, (size_t) millm_weight_bytes(head->dtype, n * head->n_in));
	if (fingerprint != millm_screen_fingerprint(head->dtype, n, head->n_in, head->data))
		return "it was made from another LM head";
	memcpy(m->screen.error.data, error->data, (size_t) n * sizeof(float));
	if (!are_possible(m->screen.error.data, scale->data, n))
		return "it holds scales or bounds that cannot be";
	m->screen.codes = (MillmWeight) {.dtype = MILLM_INT8, .n_out = n, .n_in = head->n_in, .stride = head->n_in,
		.data = codes->data, .scale = scale->data};
	m->weights_bytes += codes->bytes + scale->bytes + error->bytes;
	return NULL;
}

MillmCode
millm_screening_open(const char *dir, MillmModel *m, MillmSafetensors **out, MillmError *err)
{
	char		path[4096];
	const char *problem;
	MillmSafetensors *st = NULL;
	MillmError	why;
	MillmCode	rc;

	*out = NULL;
	if ((size_t) snprintf(path, sizeof(path), "%s/%s", dir, MILLM_SCREEN_FILE) >= sizeof(path) || access(path, F_OK) != 0)
		return MILLM_OK;
	if ((rc = millm_st_open(path, &st, &why)) == MILLM_E_INSUFFICIENT_MEMORY)
	{
		if (err)
			*err = why;
		return rc;
	}
	m->screen.error = (MillmVector) {aligned_alloc(64, ((size_t) m->head.n_out * sizeof(float) + 63) & ~(size_t) 63), m->head.n_out};
	if (!m->screen.error.data)
	{
		millm_st_close(st);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	problem = rc != MILLM_OK ? why.message : bind(m, st);
	if (!problem)
		*out = st;
	else
	{
		snprintf(m->screen_refused, sizeof(m->screen_refused), "\"%s\" is not used: %.180s", MILLM_SCREEN_FILE, problem);
		millm_st_close(st);
	}
	return MILLM_OK;
}
