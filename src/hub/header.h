/*
 * header.h -- the header of a safetensors file, of which the bytes come in pieces.
 */
#ifndef MILLM_HEADER_H
#define MILLM_HEADER_H

#include <stdint.h>

#include "hub.h"

/* Begins as {0}; zero again after free. */
typedef struct MillmHeader
{
	uint8_t    *bytes;			/* [size]: the length's 8 bytes and the header */
	size_t		have;			/* of them; whole with have == size > 0 */
	size_t		size;			/* 0 until the length has come */
} MillmHeader;

/*
 * Take the first *n of the file's next len > 0 bytes, which are the header's; it is not whole yet.  INVALID_MODEL_FILE for a length that cannot be,
 * INSUFFICIENT_MEMORY.
 */
extern MillmCode millm_header_take(MillmHeader *header, const MillmHubFile *file, const void *bytes, size_t len, size_t *n, MillmError *err);
/* Bytes that are still to come before more is known of it, at least 1; 0: it is whole. */
extern size_t millm_header_wants(const MillmHeader *header);
extern void millm_header_free(MillmHeader *header);

#endif
