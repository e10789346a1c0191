/*
 * charsmap.h -- the map of characters that SentencePiece compiles into a model: the normalizer Precompiled.
 */
#ifndef MILLM_CHARSMAP_H
#define MILLM_CHARSMAP_H

#include "bytes.h"
#include "error.h"

/* Zeroed maps nothing. */
typedef struct Charsmap
{
	Bytes		data;			/* a double array of n_units little-endian numbers, then texts that end in NUL.  Owned */
	size_t		n_units;
} Charsmap;

/* Take the map out of base64[0..n).  INVALID_MODEL_FILE, and err's detail says why; on failure, too, *map is to be freed. */
extern MillmCode millm_charsmap_read(Charsmap *map, const char *base64, size_t n, MillmError *err);
extern void millm_charsmap_free(Charsmap *map);

/* Map text[0..n), valid UTF-8, into *out, which is emptied first.  False: out of memory. */
extern bool millm_charsmap_apply(const Charsmap *map, const char *text, size_t n, Bytes *out);

#endif
