/*
 * head_copy.h -- the screening copy of a model's LM head (quant/screen.h), as a file of its store.
 */
#ifndef MILLM_HEAD_COPY_H
#define MILLM_HEAD_COPY_H

#include <stdatomic.h>

#include "model.h"
#include "store.h"

/* Is a tensor of that name, in a model of this config, what its copy is made of? */
extern bool millm_head_copy_is_of(const MillmConfig *config, const char *name);

/*
 * A copy in work.  The store, which must outlive it, has the file once end succeeds; until then an older one stays.
 *
 *     begin --> push (the head's bytes in order, cut anywhere) --> end
 *
 * After an error, and to give up: free.  Errors are the encoder's and a disk's.
 */
typedef struct MillmHeadCopy MillmHeadCopy;

extern MillmCode millm_head_copy_begin(MillmStore *store, MillmDtype dtype, int64_t n_rows, int64_t n_in, MillmHeadCopy **out, MillmError *err);
extern MillmCode millm_head_copy_push(MillmHeadCopy *copy, const void *bytes, size_t n, MillmError *err);
extern MillmCode millm_head_copy_end(MillmHeadCopy *copy, MillmError *err);
extern void millm_head_copy_free(MillmHeadCopy *copy);	/* NULL is fine */

/*
 * The copy of model, whose files lie in the store, unless it is there already or would be of no use.  CANCELED when *stop comes first.
 */
extern MillmCode millm_head_copy_make(MillmStore *store, const MillmModel *model, atomic_bool *stop, MillmError *err);

#endif
