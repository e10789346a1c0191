/*
 * quant.h -- the quantized formats, as bitsandbytes stores them and transformers reads them: NF4 with double
 * quantization and LLM.int8, written while the bytes arrive; those and their older variants, read.
 *
 * Everything here is arithmetic over the caller's bytes.  Where they come from and in which file they end is not
 * this room's business.
 *
 * Words: a Linear has a module name X ("model.layers.0.mlp.up_proj") and a weight [n_out, n_in], row-major.
 * NF4 cuts the flattened weight into blocks of 64 (a block may straddle rows); absmax is the largest magnitude of
 * a block; double quantization stores absmax - offset in 8 bits, in groups of 256 with a nested_absmax each.
 * INT8 has one scale per row, SCB, the row's largest magnitude.
 */
#ifndef MILLM_QUANT_H
#define MILLM_QUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "tensor.h"

typedef enum MillmQuantFormat {MILLM_QUANT_NF4, MILLM_QUANT_INT8, MILLM_QUANT_FP4} MillmQuantFormat;

/* What we write; what we read may differ and says so in its quant_state. */
#define MILLM_NF4_BLOCK			64
#define MILLM_NF4_NESTED_BLOCK	256

/* --- Tables (nf4.c) --------------------------------------------------------------------------------------------- */

extern const float millm_nf4_codebook[16];	/* ascending; code 7 is 0 */
extern const float millm_fp4_codebook[16];	/* bit 3 is the sign */

/* Fill map[256], ascending: the values that the 8-bit codes of a double-quantized absmax stand for. */
extern void millm_dynamic_map(float map[256]);

/* --- Quantize (nf4.c, int8.c) ----------------------------------------------------------------------------------- */

/*
 * Quantize the n values of dtype F32, F16 or BF16 at values (unaligned), which begin at a block boundary.
 *
 *   packed  [(n+1)/2]  element 2k in the high nibble of byte k, 2k+1 in the low one; an odd end is padded with code 7
 *   absmax  [ceil(n/64)]
 *
 * A last block of fewer than 64 is the end of its tensor.  A block of zeros gets absmax 0 and codes 7, which
 * decode to exactly 0 (bitsandbytes' CUDA kernel stores codes 0, which double quantization may turn into a little
 * less than 0).  Returns false, outputs undefined, when a value is NaN or infinite.
 */
extern bool millm_nf4_encode(uint8_t *packed, float *absmax, const void *values, MillmDtype dtype, size_t n);

/* The same bits by instructions that every CPU has: what millm_nf4_encode() falls back to, and is judged by. */
extern bool millm_nf4_encode_portable(uint8_t *packed, float *absmax, const void *values, MillmDtype dtype, size_t n);

/* The offset of double quantization: the mean of absmax[n], n > 0, summed in double. */
extern float millm_absmax_offset(const float *absmax, size_t n);

/*
 * Quantize absmax[n] itself: codes[n], nested_absmax[ceil(n/256)].  The nearest entry of the map wins, on a
 * midpoint the even code: what bitsandbytes' CUDA kernel does (its CPU kernel looks the code up in a coarser table).
 */
extern void millm_absmax_encode(uint8_t *codes, float *nested_absmax, const float *absmax, size_t n, float offset);

typedef enum MillmInt8Result {MILLM_INT8_OK, MILLM_INT8_NOT_FINITE, MILLM_INT8_OVERFLOW} MillmInt8Result;

/*
 * Quantize n_rows rows of n_in values of dtype F32, F16 or BF16 at values (unaligned), through F16.
 *
 *   q     [n_rows, n_in]  -127..127
 *   scb   [n_rows]        largest magnitude of the row in F16; w is about q * scb / 127
 *   half  [n_in]          workspace
 *
 * NOT_FINITE: a value is NaN or infinite; OVERFLOW: it is beyond F16.  Outputs then are undefined.
 */
extern MillmInt8Result millm_int8_encode(int8_t *q, float *scb, float *half, const void *values, MillmDtype dtype,
										 size_t n_rows, size_t n_in);

/* As millm_nf4_encode_portable(). */
extern MillmInt8Result millm_int8_encode_portable(int8_t *q, float *scb, float *half, const void *values,
												  MillmDtype dtype, size_t n_rows, size_t n_in);

/* --- What a quantized Linear consists of (layout.c) ------------------------------------------------------------- */

#define MILLM_QUANT_MAX_PARTS	6
#define MILLM_QUANT_STATE_MAX	256		/* bytes; the longest quant_state that we write is shorter */

/* One stored tensor of a Linear.  Its name is the module's name and suffix. */
typedef struct MillmQuantPart
{
	const char *suffix;			/* ".weight", ".weight.absmax", ".SCB", ...; static */
	MillmDtype	dtype;
	int			n_dims;			/* 0: a single value */
	int64_t		shape[2];
	uint64_t	bytes;
	const void *data;			/* encoder's, until millm_quant_free(); NULL for the weight, which was streamed */
} MillmQuantPart;

/*
 * The parts of a Linear of n_out x n_in weights of dtype, before there is any data: everything but data is filled.
 * parts[0] is the weight.  quant_state, the last part of NF4, has an upper bound for its length: the text
 * holds a number that is known only at the end.
 *
 * INVALID_MODEL_FILE: no possible sizes.  UNSUPPORTED: a dtype that cannot be quantized, a format that we only read.
 */
extern MillmCode millm_quant_layout(MillmQuantFormat format, MillmDtype dtype, int64_t n_out, int64_t n_in,
									MillmQuantPart parts[MILLM_QUANT_MAX_PARTS], int *n_parts, MillmError *err);

/* --- The stream (encode.c) -------------------------------------------------------------------------------------- */

/*
 * One weight on its way from F32, F16 or BF16 to a format:
 *
 *     begin --push (any number of bytes at a time)--> finish --read the parts--> free
 *
 * Memory: NF4 5 bytes for 64 weights, INT8 4 bytes for a row, and one block or row.  One thread at a time.
 */
typedef struct MillmQuantEncoder MillmQuantEncoder;

/* name is the weight's, for errors; copied.  Errors as millm_quant_layout()'s, and INSUFFICIENT_MEMORY. */
extern MillmCode millm_quant_begin(MillmQuantFormat format, const char *name, MillmDtype dtype, int64_t n_out,
								   int64_t n_in, MillmQuantEncoder **out, MillmError *err);

/* How many bytes the next push of n_bytes will write: known exactly, at most n_bytes + the length of a row. */
extern size_t millm_quant_push_writes(const MillmQuantEncoder *enc, size_t n_bytes);

/*
 * Take the next n_bytes of the raw weight, little-endian, cut anywhere; write what is complete of the quantized
 * one to out.  INVALID_MODEL_FILE names the tensor when a value is not finite, or beyond F16 on the way to INT8,
 * or when there are more bytes than the weight has.  After an error only millm_quant_free() is allowed.
 */
extern MillmCode millm_quant_push(MillmQuantEncoder *enc, const void *bytes, size_t n_bytes, void *out,
								  MillmError *err);

/* All bytes are pushed: make the other parts.  parts stays the encoder's.  INVALID_MODEL_FILE: bytes are missing. */
extern MillmCode millm_quant_finish(MillmQuantEncoder *enc, const MillmQuantPart **parts, int *n_parts,
									MillmError *err);
extern void millm_quant_free(MillmQuantEncoder *enc);	/* NULL is fine */

/* --- quant_state (state.c) -------------------------------------------------------------------------------------- */

/* What the JSON beside a 4-bit weight says. */
typedef struct MillmQuantState
{
	MillmQuantFormat format;	/* NF4 or FP4 */
	MillmDtype	dtype;			/* what the weight was, and what bitsandbytes dequantizes to */
	int64_t		n_out;
	int64_t		n_in;
	int			block_size;
	bool		nested;			/* the two below are set */
	int			nested_block_size;
	float		nested_offset;
} MillmQuantState;

/* Write the text as bitsandbytes does (Python's json.dumps) into text[size], NUL-terminated; returns its length. */
extern size_t millm_quant_state_write(const MillmQuantState *state, char *text, size_t size);

/*
 * Read a stranger's text[len] (no NUL needed), stored in the tensor called name.  INVALID_MODEL_FILE: not JSON,
 * a key too many or too few, a value that cannot be; UNSUPPORTED: a quant_type, or a shape of more than two
 * dimensions, that we do not implement.
 */
extern MillmCode millm_quant_state_read(const char *name, const void *text, size_t len, MillmQuantState *out,
										MillmError *err);

/* --- A stranger's quantized Linear, checked, and dequantized (decode.c) ----------------------------------------- */

/* A tensor of a file: bytes of data (unaligned) that its reader has found to lie inside of the file. */
typedef struct MillmStored
{
	MillmDtype	dtype;
	const void *data;			/* NULL: there is no such tensor */
	uint64_t	bytes;
} MillmStored;

/* A quantized weight [n_out, n_in], checked: views of the stored tensors, nothing is owned. */
typedef struct MillmQuantWeight
{
	MillmQuantFormat format;
	MillmDtype	dtype;			/* NF4, FP4: what bitsandbytes rounds the dequantized weight to; INT8: F32 */
	int64_t		n_out;
	int64_t		n_in;
	int			block_size;		/* power of two; 0: INT8 */
	int			nested_block_size;	/* power of two; 0: absmax holds floats */
	float		nested_offset;
	const uint8_t *data;		/* [(n+1)/2] nibbles, high first; or [n_out, n_in] int8 */
	const void *absmax;			/* [ceil(n/block)] float, or uint8 when nested; INT8: SCB, [n_out] float */
	const void *nested_absmax;	/* [ceil(ceil(n/block)/nested_block)] float */
	const void *nested_map;		/* [256] float: the file's own, because there are several */
} MillmQuantWeight;

/*
 * The 4-bit weight called name from what lies beside it; quant_map, nested_absmax and nested_map as named in a file.
 * weight may be stored as U8 or, the same bytes, as any float dtype.  INVALID_MODEL_FILE when a tensor is missing or
 * too many, has the wrong dtype or length, or when its scales make weights that are not finite.
 */
extern MillmCode millm_quant_bind_4bit(const char *name, const MillmQuantState *state, MillmStored weight,
									   MillmStored absmax, MillmStored quant_map, MillmStored nested_absmax,
									   MillmStored nested_map, MillmQuantWeight *out, MillmError *err);

/* The INT8 weight [n_out, n_in] called name.  weight_format may be absent; row-major (0) is the only one supported. */
extern MillmCode millm_quant_bind_int8(const char *name, int64_t n_out, int64_t n_in, MillmStored weight,
									   MillmStored scb, MillmStored weight_format, MillmQuantWeight *out,
									   MillmError *err);

/*
 * y[n] = the weights [first, first + n) of w, flattened; 0 <= first, first + n <= n_out * n_in.  The judge of
 * every faster path: each product and sum is rounded to float32, once.  Rounded to w->dtype they are
 * bitsandbytes' dequantize_4bit().
 */
extern void millm_quant_dequantize(float *y, const MillmQuantWeight *w, int64_t first, int64_t n);

/* --- transformers (layout.c) ------------------------------------------------------------------------------------ */

/*
 * Is this tensor of a decoder the weight of a Linear (or of GPT-2's Conv1D, to be transposed first) that is quantized:
 * a matrix "....weight" in one of the numbered blocks, but no router?  Embeddings and the LM head lie outside of these; norms
 * have one dimension, or, where each head has its own, a name that says so.  The LM head's module name must then be in the skip list, or transformers expects it quantized.
 */
extern bool millm_quant_is_quantized(const char *tensor, int n_dims);

/*
 * Modules of a mixture of experts, the last part of their names, that choose experts: small, and an error in them is a wrong choice, so they are never
 * quantized here, and the skip list of such a model must have them.  NULL-terminated, static.
 */
#define MILLM_QUANT_N_ROUTERS 2
extern const char *const *millm_quant_routers(void);
/* Is this tensor the weight of one of them?  It stays F32, too, where F32 becomes 16 bits. */
extern bool millm_quant_is_router(const char *tensor);

/*
 * The value of "quantization_config" in config.json; a new reference, NULL without memory.  compute is the model's
 * dtype; skip[n_skip] the full names of the Linears that stay as they are ("lm_head").  Keys are sorted by whoever dumps.
 */
extern struct json_t *millm_quant_config_json(MillmQuantFormat format, MillmDtype compute, const char *const *skip,
											  int n_skip);

#endif
