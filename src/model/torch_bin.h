/*
 * torch_bin.h -- a PyTorch checkpoint (pytorch_model.bin), read as if it were a safetensors file.
 *
 * torch.save() writes a zip archive (zip.h) of a pickle (pickle.h) and of the storages that it refers to.  Nothing of it is ever run.
 */
#ifndef MILLM_TORCH_BIN_H
#define MILLM_TORCH_BIN_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef struct MillmTorchBin MillmTorchBin;

/* Takes the next len > 0 bytes; what it returns but MILLM_OK ends the reading. */
typedef MillmCode (*MillmTorchTake) (void *arg, const void *data, size_t len, MillmError *err);

/*
 * Read what it holds.  fd, open for reading, is borrowed until close; name is copied, for messages.  tied, or NULL: the tensor of this name is left
 * out when it is the same as another one, as transformers does when it saves a head that is tied.
 *
 * INVALID_MODEL_FILE: damaged, or it wants to run something, which is named; UNSUPPORTED: the format before PyTorch 1.6, or numbers of a
 * machine of the other byte order.
 */
extern MillmCode millm_torch_bin_open(int fd, const char *name, const char *tied, MillmTorchBin **out, MillmError *err);
extern void millm_torch_bin_close(MillmTorchBin *bin);	/* NULL is fine */

/* Bytes of the safetensors file. */
extern uint64_t millm_torch_bin_bytes(const MillmTorchBin *bin);

/* Give take all of them, in order.  INSUFFICIENT_MEMORY for a tensor that is not contiguous, read whole; INVALID_MODEL_FILE when the file fails us. */
extern MillmCode millm_torch_bin_read(MillmTorchBin *bin, MillmTorchTake take, void *arg, MillmError *err);

#endif
