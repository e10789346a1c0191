/*
 * convert.c -- see convert.h.
 */
#include "convert.h"

#include <stdio.h>

#include "arch.h"
#include "torch_bin.h"

typedef struct Flow
{
	MillmSink  *sink;
	atomic_bool *stop;
	MillmConverted converted;
	void	   *arg;
	int64_t		bytes, total;
} Flow;

static MillmCode
take(void *arg, const void *data, size_t len, MillmError *err)
{
	Flow	   *f = arg;
	MillmCode	rc;

	if (atomic_load(f->stop))
		return millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
	if ((rc = f->sink->write(f->sink->arg, data, len, err)) != MILLM_OK)
		return rc;
	f->bytes += (int64_t) len;
	f->converted(f->arg, f->bytes, f->total);
	return MILLM_OK;
}

MillmCode
millm_convert(int fd, const char *name, const MillmConfig *config, MillmHubFile *out, MillmSink *sink, atomic_bool *stop, MillmConverted converted,
			  void *arg, MillmError *err)
{
	Flow		flow = {.sink = sink, .stop = stop, .converted = converted, .arg = arg};
	MillmTorchBin *bin;
	MillmHash	hash;
	char		head[128];
	int64_t		have;
	MillmCode	rc;

	/* a tied head is the embedding once more: transformers does not save it either */
	snprintf(head, sizeof(head), "%s.weight", config->arch->head);
	if ((rc = millm_torch_bin_open(fd, name, config->tied ? head : NULL, &bin, err)) != MILLM_OK)
		return rc;
	out->size = flow.total = (int64_t) millm_torch_bin_bytes(bin);
	millm_hash_begin(&hash, out->hash, out->size);
	if ((rc = sink->begin(sink->arg, out, &hash, &have, stop, err)) == MILLM_OK)
	{
		if ((rc = sink->discard(sink->arg, err)) == MILLM_OK && (rc = millm_torch_bin_read(bin, take, &flow, err)) == MILLM_OK)
			rc = sink->finish(sink->arg, err);
		else
			sink->abandon(sink->arg);
	}
	millm_torch_bin_close(bin);
	return rc;
}
