/*
 * upload.h -- from a model's mappings to device memory: disk reads, copies into pinned memory, copies to the device and repacking there go on at once.
 */
#ifndef MILLM_CUDA_UPLOAD_H
#define MILLM_CUDA_UPLOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "kernels.h"

/* n_rows rows of row_bytes, from_pitch apart in the model and to_pitch on the device, where zeros follow each. */
typedef struct MillmPart
{
	int64_t		at;				/* in the device memory, 16-byte aligned */
	const char *from;
	int64_t		n_rows, row_bytes;
	int64_t		from_pitch, to_pitch;
	/* 0; or the bytes of an element, 1, 2 or 4, of a part whose transpose is in the model: [row_bytes / element, n_rows], from_pitch from row to row */
	int			element;
} MillmPart;

typedef struct MillmUploadOptions
{
	cudaStream_t stream;
	bool		(*progress) (void *arg, int percent);	/* asked between buffers, on this thread; false: stop.  NULL: nobody asks */
	void	   *arg;
	int64_t		buffer_bytes;	/* 0: chosen */
} MillmUploadOptions;

/*
 * Bring parts, ascending by `at` and none overlapping, to the zeroed device memory; what the stream had before is done by then, and what is here
 * when this returns.  CANCELED, INSUFFICIENT_MEMORY of host or device with the figure, INTERNAL when the device does not answer; the device
 * memory holds anything then, and all else is given back.
 */
extern MillmCode millm_cuda_upload(char *device, const MillmPart *parts, int n_parts, const MillmUploadOptions *options, MillmError *err);

#endif
