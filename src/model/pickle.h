/*
 * pickle.h -- the one pickle that millm reads: the table of tensors that torch.save() writes.
 *
 * A pickle is a program.  This machine has no way to run what one asks for: the only objects that it knows are numbers, texts, tuples,
 * tables, storages and tensors, and every opcode and every global that is not needed for them is refused by its name.
 */
#ifndef MILLM_PICKLE_H
#define MILLM_PICKLE_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "tensor.h"

#define MILLM_PICKLE_MAX_BYTES	((size_t) 64 << 20)
#define MILLM_PICKLE_MAX_DIMS	8

/* A view of a storage, as it says of itself: nothing is checked but that the numbers are not negative. */
typedef struct MillmView
{
	const char *key;			/* of the storage, the pickle's */
	MillmDtype	dtype;
	int64_t		n_stored;		/* elements of the storage */
	int64_t		offset;			/* of the first element */
	int			n_dims;
	int64_t		dims[MILLM_PICKLE_MAX_DIMS];
	int64_t		strides[MILLM_PICKLE_MAX_DIMS];	/* in elements */
} MillmView;

typedef struct MillmPickle MillmPickle;

/*
 * Read len bytes, which are changed (texts get their NUL) and must outlive *out.  file is for messages.
 * INVALID_MODEL_FILE: damaged, no table of tensors, or an opcode or a global that is refused; it is named, and nothing was run.
 */
extern MillmCode millm_pickle_read(void *bytes, size_t len, const char *file, MillmPickle **out, MillmError *err);
extern void millm_pickle_free(MillmPickle *p);	/* NULL is fine */

/* The table, in the file's order.  Several names can be of the same view; the same name can come twice. */
extern size_t millm_pickle_n_tensors(const MillmPickle *p);
extern const char *millm_pickle_name(const MillmPickle *p, size_t i);
extern const MillmView *millm_pickle_view(const MillmPickle *p, size_t i);

#endif
