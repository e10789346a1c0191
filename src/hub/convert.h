/*
 * convert.h -- a PyTorch checkpoint of this machine becomes the safetensors file that the model's directory holds.
 */
#ifndef MILLM_CONVERT_H
#define MILLM_CONVERT_H

#include "hub.h"
#include "model.h"

/* So many bytes of so many are converted. */
typedef void (*MillmConverted) (void *arg, int64_t bytes, int64_t total);

/*
 * Push the checkpoint that fd has open through sink, which is of safetensors files (recast.h).  name is for messages.  *out is the file that the sink
 * gets: its path and hash are the caller's, its size is filled in.  It is always begun anew: the checkpoint is here, and reading is fast.
 *
 * The errors of millm_torch_bin_open() and of the sink; CANCELED when *stop becomes true.
 */
extern MillmCode millm_convert(int fd, const char *name, const MillmConfig *config, MillmHubFile *out, MillmSink *sink, atomic_bool *stop,
							   MillmConverted converted, void *arg, MillmError *err);

#endif
