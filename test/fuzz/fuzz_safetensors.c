/*
 * fuzz_safetensors.c -- any bytes as a safetensors file: refused by name, or every tensor lies inside, once, in order.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "safetensors.h"

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
	MillmSafetensors *st;
	MillmError	err;
	const char *at;

	if (millm_st_parse(data, size, "fuzz", &st, &err) != MILLM_OK)
	{
		check((err.code == MILLM_E_INVALID_MODEL_FILE || err.code == MILLM_E_UNSUPPORTED) && err.message[0] && err.detail[0]);
		return 0;
	}
	at = (const char *) data + 8 + millm_get_le64(data);
	for (size_t i = 0; i < millm_st_n_tensors(st); i++)
	{
		const MillmStTensor *t = millm_st_tensor(st, i);
		uint64_t	bytes = (uint64_t) millm_dtype_bytes(t->dtype);

		for (int d = 0; d < t->n_dims; d++)
			check(millm_mul_u64(bytes, (uint64_t) t->dims[d], &bytes));
		check(bytes == t->bytes && t->data == at);
		at += bytes;
	}
	check(at == (const char *) data + size);
	millm_st_close(st);
	return 0;
}
