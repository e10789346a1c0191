/*
 * safetensors.h -- one safetensors file, mapped and indexed.
 *
 * Format (github.com/huggingface/safetensors): 8 bytes little-endian length N of the header, N bytes of
 * JSON {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}, then the data, to which the
 * offsets refer.  The data must be covered without holes or overlaps, as the genuine reader demands.
 */
#ifndef MILLM_SAFETENSORS_H
#define MILLM_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "tensor.h"

/*
 * The genuine reader allows 100 MB.  A parsed header can take 50 times its text, and the largest published ones are
 * a few MB, so this is where a header stops being believed.
 */
#define MILLM_ST_HEADER_MAX	((uint64_t) 32 << 20)
#define MILLM_ST_MAX_DIMS	8

typedef struct MillmStTensor
{
	const char *name;			/* the file's */
	MillmDtype	dtype;
	int			n_dims;
	int64_t		dims[MILLM_ST_MAX_DIMS];
	uint64_t	begin;			/* offset in the file's data */
	uint64_t	bytes;
	const void *data;			/* in the mapping */
} MillmStTensor;

typedef struct MillmSafetensors MillmSafetensors;

/*
 * Map path and index its tensors.  On MILLM_OK the caller owns *out; on failure it is untouched.
 * MODEL_FILES_MISSING when it cannot be opened, INVALID_MODEL_FILE when it is damaged, UNSUPPORTED
 * for a dtype that we do not know.
 *
 * The checks hold for the file as it is now.  Whoever truncates it while it is mapped kills the reading process
 * with SIGBUS; that is one reason why the engine is a process of its own.
 */
extern MillmCode millm_st_open(const char *path, MillmSafetensors **out, MillmError *err);
extern void millm_st_close(MillmSafetensors *st);	/* NULL is fine */

/*
 * The same checks on bytes in memory, which must outlive *out.  name is for messages.
 */
extern MillmCode millm_st_parse(const void *bytes, size_t len, const char *name, MillmSafetensors **out, MillmError *err);

/*
 * The same checks on the first bytes of a file of file_len bytes whose header is complete in them: head_len is 8 + the header's length.  The
 * tensors' data are NULL.
 */
extern MillmCode millm_st_parse_head(const void *head, size_t head_len, uint64_t file_len, const char *name, MillmSafetensors **out,
									 MillmError *err);

extern size_t millm_st_n_tensors(const MillmSafetensors *st);
extern const MillmStTensor *millm_st_tensor(const MillmSafetensors *st, size_t i);	/* in order of their data */
extern const char *millm_st_metadata(const MillmSafetensors *st, const char *key);	/* of "__metadata__"; NULL: none, or no text */
extern const char *millm_st_path(const MillmSafetensors *st);
/* The mapping, for madvise(). */
extern const void *millm_st_map(const MillmSafetensors *st, size_t *len);

/* Bytes of one element, and the format's name ("BF16"). */
extern int	millm_dtype_bytes(MillmDtype dtype);
extern const char *millm_dtype_name(MillmDtype dtype);

#endif
