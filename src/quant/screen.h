/*
 * screen.h -- the screening copy of an LM head: INT8, a quarter to a half of the bytes, and for each row a bound of what
 * it gets wrong.
 *
 * bitsandbytes leaves the head in 16 bits.  Who wants only the largest logits computes all of them from this copy,
 * strikes out the rows that the bound excludes, and computes the few that are left from the head itself: the same logits,
 * bit for bit, from half of the bytes (engine/shortlist.h).
 *
 * The copy is a file of its own beside the model's, which transformers does not look at.  It is ordinary safetensors:
 *
 *     codes        I8  [n_rows, n_in]   row v stands for codes[v] * scale[v] / 127
 *     scale        F32 [n_rows]
 *     error        F32 [n_rows]         see below; +infinity: nothing is known of this row
 *     fingerprint  I64 [1]              of the head that it was made from
 *
 * The bound.  Let z be the product of row v of the head with a float32 vector h, and y the product of row v of the copy with h,
 * each evaluated in float32 in whatever order, fused or not, of terms that have been rounded at most 4 times before they are
 * summed (as the kernels' MILLM_FORM_F32 does).  Then
 *
 *     |z - y| <= error[v] * ||h||_2 + MILLM_SCREEN_TINY
 *
 * as long as ||h||_2 and error[v] * ||h||_2 are at most MILLM_SCREEN_HUGE: beyond it something could overflow.  The proof, and
 * what is left over for the one who compares, stand in screen.c.
 *
 * y may come from an h that was rounded to int16 in steps of 1 / 32767 of its largest value (MILLM_FORM_I16), if ||h||_2 is at least
 * MILLM_SCREEN_SMALL and error is what millm_screen_widen() makes of it.
 */
#ifndef MILLM_SCREEN_H
#define MILLM_SCREEN_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "tensor.h"

#define MILLM_SCREEN_FILE	"millm_head_int8.safetensors"
#define MILLM_SCREEN_TINY	0x1p-100f
#define MILLM_SCREEN_HUGE	0x1p60f
#define MILLM_SCREEN_SMALL	0x1p-90f

/*
 * A head [n_rows, n_in] of F32, F16 or BF16, as it will lie in the model's file, on its way to its copy:
 *
 *     begin --write the header--> push (any number of bytes at a time) --write the codes--> finish --write the tail--> free
 *
 * What is written one after the other is the file.  Memory: 8 bytes for a row, and one row.  One thread at a time.
 */
typedef struct MillmScreenEncoder MillmScreenEncoder;

/* INVALID_MODEL_FILE: no possible sizes; UNSUPPORTED: a dtype that is no float; INSUFFICIENT_MEMORY. */
extern MillmCode millm_screen_begin(MillmDtype dtype, int64_t n_rows, int64_t n_in, MillmScreenEncoder **out, MillmError *err);
extern void millm_screen_free(MillmScreenEncoder *enc);	/* NULL is fine */

/* The file's first bytes, *n of them; the encoder's. */
extern const void *millm_screen_header(const MillmScreenEncoder *enc, size_t *n);

/* How many codes (of a byte) the next push of n_bytes will write: known exactly, whole rows. */
extern size_t millm_screen_push_writes(const MillmScreenEncoder *enc, size_t n_bytes);

/*
 * Take the next n_bytes of the head, little-endian, cut anywhere; write the codes of the rows that they complete.
 * INVALID_MODEL_FILE, nothing taken, when there are more bytes than the head has.  A row with NaN or infinity is no
 * error: its bound is infinite, so it will always be read from the head.
 */
extern MillmCode millm_screen_push(MillmScreenEncoder *enc, const void *bytes, size_t n_bytes, int8_t *codes, MillmError *err);

/* All bytes are pushed: the file's last bytes, *n of them; the encoder's.  INVALID_MODEL_FILE: bytes are missing. */
extern MillmCode millm_screen_finish(MillmScreenEncoder *enc, const void **tail, size_t *n, MillmError *err);

/* Bytes of the whole file; -1 for sizes that begin refuses. */
extern int64_t millm_screen_file_bytes(int64_t n_rows, int64_t n_in);

/* wide [n_rows] = error [n_rows] for vectors in int16; of a copy whose scales are scale [n_rows], stored floats.  wide may be error. */
extern void millm_screen_widen(float *wide, const float *error, const void *scale, int64_t n_rows, int64_t n_in);

/*
 * The fingerprint of a head that lies in memory: a hash of its dtype, its shape and 64 bytes of each row, at a place that
 * depends on the row.  A head whose rows have been trained, exchanged or moved has another one; a change of a few values
 * that misses these bytes is not seen.
 */
extern int64_t millm_screen_fingerprint(MillmDtype dtype, int64_t n_rows, int64_t n_in, const void *head);

#endif
