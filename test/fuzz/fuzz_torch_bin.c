/*
 * fuzz_torch_bin.c -- any file as a PyTorch checkpoint: refused by name, or a safetensors file comes of it, as long as was promised and not much more
 * than twice the file's tensors.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "arith.h"
#include "safetensors.h"
#include "torch_bin.h"

typedef struct Taken
{
	uint8_t    *bytes;
	size_t		len, size;
} Taken;

static void
check(int ok)
{
	if (!ok)
		abort();
}

static MillmCode
take(void *arg, const void *data, size_t len, MillmError *err)
{
	Taken	   *t = arg;

	(void) err;
	check(len > 0 && len <= t->size - t->len);
	memcpy(t->bytes + t->len, data, len);
	t->len += len;
	return MILLM_OK;
}

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static int	fd = -1;
	MillmTorchBin *bin;
	MillmSafetensors *st;
	MillmError	err;
	Taken		t = {0};

	if (fd < 0)
		fd = memfd_create("fuzz", MFD_CLOEXEC);
	check(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t) size);
	if (millm_torch_bin_open(fd, "fuzz", "t", &bin, &err) != MILLM_OK)
	{
		check((err.code == MILLM_E_INVALID_MODEL_FILE || err.code == MILLM_E_UNSUPPORTED) && err.message[0]);
		return 0;
	}
	t.size = (size_t) millm_torch_bin_bytes(bin);
	t.bytes = malloc(t.size);
	check(millm_torch_bin_read(bin, take, &t, &err) == MILLM_OK && t.len == t.size);
	check(t.size - 8 - millm_get_le64(t.bytes) <= 2 * size);
	/* the header that we write is one that we read, but for names longer than any message; empty data make no holes */
	check(millm_st_parse(t.bytes, t.len, "fuzz", &st, &err) == MILLM_OK);
	millm_st_close(st);
	free(t.bytes);
	millm_torch_bin_close(bin);
	return 0;
}
