/*
 * head_tap.c -- see head_tap.h.
 *
 * Owns: of the file that goes by, its header until that is read, and the copy of the head from there on.
 */
#include "head_tap.h"

#include <stdlib.h>

#include "head_copy.h"
#include "header.h"
#include "safetensors.h"

struct MillmHeadTap
{
	MillmStore *store;
	const MillmConfig *config;
	MillmSink  *to;
	MillmSink	sink;

	/* the file that goes by */
	const MillmHubFile *file;
	bool		is_closed;		/* nothing more is taken of it */
	MillmHeader header;
	uint64_t	skip, left;		/* bytes before the rest of the head, and of that rest */
	MillmHeadCopy *copy;		/* once the header is read */
};

static void
forget(MillmHeadTap *t)
{
	millm_header_free(&t->header);
	millm_head_copy_free(t->copy);
	t->copy = NULL;
	t->is_closed = true;
}

/* The header is whole: where is the head? */
static MillmCode
find_head(MillmHeadTap *t, MillmError *err)
{
	MillmSafetensors *st;
	const MillmStTensor *head = NULL;
	MillmCode	rc = MILLM_OK;

	t->is_closed = true;
	if (millm_st_parse_head(t->header.bytes, t->header.have, (uint64_t) t->file->size, t->file->path, &st, NULL) != MILLM_OK)
		return MILLM_OK;
	for (size_t i = 0; i < millm_st_n_tensors(st) && !head; i++)
		if (millm_head_copy_is_of(t->config, millm_st_tensor(st, i)->name))
			head = millm_st_tensor(st, i);
	if (head && head->n_dims == 2 && head->dtype < MILLM_N_FLOAT_DTYPES && head->bytes > 0)
	{
		t->is_closed = false;
		t->skip = head->begin;
		t->left = head->bytes;
		rc = millm_head_copy_begin(t->store, head->dtype, head->dims[0], head->dims[1], &t->copy, err);
	}
	millm_st_close(st);
	millm_header_free(&t->header);
	return rc;
}

/* The next n > 0 bytes of the file's data. */
static MillmCode
take_data(MillmHeadTap *t, const uint8_t *p, size_t n, MillmError *err)
{
	const size_t before = t->skip < n ? (size_t) t->skip : n;
	const size_t here = t->left < n - before ? (size_t) t->left : n - before;

	t->skip -= before;
	t->left -= here;
	return here > 0 ? millm_head_copy_push(t->copy, p + before, here, err) : MILLM_OK;
}

static MillmCode
sink_begin(void *arg, const MillmHubFile *file, MillmHash *hash, int64_t *have, atomic_bool *stop, MillmError *err)
{
	MillmHeadTap *t = arg;
	const MillmCode rc = t->to->begin(t->to->arg, file, hash, have, stop, err);

	forget(t);
	t->file = file;
	t->is_closed = rc != MILLM_OK || *have > 0;
	return rc;
}

static MillmCode
sink_write(void *arg, const void *data, size_t len, MillmError *err)
{
	MillmHeadTap *t = arg;
	const uint8_t *p = data;
	MillmCode	rc = t->to->write(t->to->arg, data, len, err);

	while (rc == MILLM_OK && len > 0 && !t->is_closed)
	{
		size_t		n = len;

		if (t->copy)
			rc = take_data(t, p, n, err);
		else if (millm_header_take(&t->header, t->file, p, len, &n, NULL) != MILLM_OK)
			t->is_closed = true;
		else if (millm_header_wants(&t->header) == 0)
			rc = find_head(t, err);
		p += n;
		len -= n;
	}
	return rc;
}

static int64_t
sink_until_checkpoint(void *arg)
{
	MillmHeadTap *t = arg;

	return t->to->until_checkpoint(t->to->arg);
}

static MillmCode
sink_checkpoint(void *arg, const MillmHash *hash, MillmError *err)
{
	MillmHeadTap *t = arg;

	return t->to->checkpoint(t->to->arg, hash, err);
}

static MillmCode
sink_discard(void *arg, MillmError *err)
{
	MillmHeadTap *t = arg;

	forget(t);
	t->is_closed = false;
	return t->to->discard(t->to->arg, err);
}

static MillmCode
sink_finish(void *arg, MillmError *err)
{
	MillmHeadTap *t = arg;
	MillmCode	rc = t->to->finish(t->to->arg, err);

	/* not before it is known that the bytes are what they should be */
	if (rc == MILLM_OK && t->copy && t->left == 0)
		rc = millm_head_copy_end(t->copy, err);
	forget(t);
	return rc;
}

static void
sink_abandon(void *arg)
{
	MillmHeadTap *t = arg;

	forget(t);
	t->to->abandon(t->to->arg);
}

MillmCode
millm_head_tap_create(MillmStore *store, const MillmConfig *config, MillmSink *sink, MillmHeadTap **out, MillmError *err)
{
	MillmHeadTap *t = calloc(1, sizeof(*t));

	if (!t)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	*t = (MillmHeadTap) {.store = store, .config = config, .to = sink, .is_closed = true};
	t->sink = (MillmSink) {t, sink_begin, sink_write, sink_until_checkpoint, sink_checkpoint, sink_discard, sink_finish, sink_abandon};
	*out = t;
	return MILLM_OK;
}

void
millm_head_tap_free(MillmHeadTap *t)
{
	if (t)
		forget(t);
	free(t);
}

MillmSink *
millm_head_tap_sink(MillmHeadTap *t)
{
	return &t->sink;
}
