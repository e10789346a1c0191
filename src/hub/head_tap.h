/*
 * head_tap.h -- a sink that hands files on to another one as they come, and makes the screening copy of the LM head that goes by.
 *
 * For weights that keep their form.  Where the head does not come as a whole, because an earlier attempt left a part of its file or because the file was
 * linked, there is no copy, and millm_head_copy_make() makes it from the files.
 */
#ifndef MILLM_HEAD_TAP_H
#define MILLM_HEAD_TAP_H

#include "hub.h"
#include "model.h"
#include "store.h"

typedef struct MillmHeadTap MillmHeadTap;

/* All three are borrowed.  INSUFFICIENT_MEMORY. */
extern MillmCode millm_head_tap_create(MillmStore *store, const MillmConfig *config, MillmSink *sink, MillmHeadTap **out, MillmError *err);
extern void millm_head_tap_free(MillmHeadTap *tap);	/* NULL is fine */

/*
 * The sink of one safetensors file after the other.  Errors are the other sink's and head_copy.h's; a file that is no safetensors file is handed on like any
 * other.
 */
extern MillmSink *millm_head_tap_sink(MillmHeadTap *tap);

#endif
