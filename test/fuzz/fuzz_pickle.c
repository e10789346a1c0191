/*
 * fuzz_pickle.c -- any bytes as a checkpoint's pickle: refused by name, or every tensor has a name and a view of what it says.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pickle.h"

static void
check(int ok)
{
	if (!ok)
		abort();
}

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char	   *bytes = malloc(size ? size : 1);
	MillmPickle *p;
	MillmError	err;

	memcpy(bytes, data, size);
	if (millm_pickle_read(bytes, size, "fuzz", &p, &err) != MILLM_OK)
		check(err.code == MILLM_E_INVALID_MODEL_FILE && err.message[0] && err.detail[0]);
	else
	{
		check(millm_pickle_n_tensors(p) > 0);
		for (size_t i = 0; i < millm_pickle_n_tensors(p); i++)
		{
			const MillmView *v = millm_pickle_view(p, i);

			/* texts lie in the bytes, with their ends */
			check(millm_pickle_name(p, i) >= bytes && millm_pickle_name(p, i) + strlen(millm_pickle_name(p, i)) < bytes + size);
			check(v->key >= bytes && v->key + strlen(v->key) < bytes + size);
			check(v->dtype < MILLM_N_DTYPES && v->n_stored >= 0 && v->offset >= 0 && v->n_dims >= 0 && v->n_dims <= MILLM_PICKLE_MAX_DIMS);
			for (int d = 0; d < v->n_dims; d++)
				check(v->dims[d] >= 0 && v->strides[d] >= 0);
		}
		millm_pickle_free(p);
	}
	free(bytes);
	return 0;
}
