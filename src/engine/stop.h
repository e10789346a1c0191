/*
 * stop.h -- stop sequences: what of a generated text may be shown, and when it ends.
 */
#ifndef MILLM_STOP_H
#define MILLM_STOP_H

#include <stdbool.h>
#include <stddef.h>

#define MILLM_MAX_STOPS			16
#define MILLM_MAX_STOP_BYTES	1024	/* of one stop sequence */

typedef struct MillmStop MillmStop;

/* Watch for strings[0..n), non-empty, copied.  NULL when out of memory.  n may be 0. */
extern MillmStop *millm_stop_create(const char *const *strings, int n);
extern void millm_stop_free(MillmStop *stop);	/* NULL is fine */

/*
 * Take the next piece of text; *out, valid until the next call, is what may be shown now: everything
 * but a tail that may begin a stop sequence.  True when a stop sequence is complete: *out then ends before
 * it, and nothing more may be pushed.  false and *out NULL: out of memory.
 */
extern bool millm_stop_push(MillmStop *stop, const char *piece, size_t len, const char **out, size_t *out_len);
/* The text ends here: the tail that was held back. */
extern void millm_stop_flush(MillmStop *stop, const char **out, size_t *out_len);

#endif
