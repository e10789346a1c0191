/*
 * header.c -- see header.h.
 */
#include "header.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "safetensors.h"

#define LENGTH_BYTES	8

size_t
millm_header_wants(const MillmHeader *h)
{
	return (h->size == 0 ? LENGTH_BYTES : h->size) - h->have;
}

MillmCode
millm_header_take(MillmHeader *h, const MillmHubFile *file, const void *bytes, size_t len, size_t *n, MillmError *err)
{
	const size_t wanted = millm_header_wants(h);
	uint8_t    *grown = realloc(h->bytes, h->have + wanted);
	uint64_t	claimed;

	if (!grown)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	h->bytes = grown;
	*n = wanted < len ? wanted : len;
	memcpy(h->bytes + h->have, bytes, *n);
	h->have += *n;
	if (h->size > 0 || *n < wanted)
		return MILLM_OK;
	claimed = millm_get_le64(h->bytes);
	if (claimed == 0 || claimed > MILLM_ST_HEADER_MAX || claimed > (uint64_t) file->size - LENGTH_BYTES)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid safetensors file \"%s\"", file->path);
		millm_detail(err, "The header claims %" PRIu64 " bytes of a file of %" PRId64 ".", claimed, file->size);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	h->size = LENGTH_BYTES + (size_t) claimed;
	return MILLM_OK;
}

void
millm_header_free(MillmHeader *h)
{
	free(h->bytes);
	*h = (MillmHeader) {0};
}
