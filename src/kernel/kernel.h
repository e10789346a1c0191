/*
 * kernel.h -- the CPU kernels: one table of pointers, filled once from what this CPU can do.
 *
 * ref.c fills every entry in portable C; avx2.c, avx512.c and amx.c overwrite what they do better.  Nobody
 * calls a kernel by name, so "which code ran?" has one answer: the table's variant.
 *
 * A kernel allocates nothing, starts no thread, fails never: shapes and pointers were checked by
 * whoever made the weight.  It computes a range of its output, so that a caller may split the work
 * over threads; ranges that do not overlap may run at the same time.  All arithmetic is float32 or better.
 *
 * Batch-invariance: every entry computes an output element in an order that depends neither on the
 * range nor on the other tokens.  Only the form of an activation (see below) may depend on how many
 * tokens a step has; who needs the same bits in any company asks for fixed_form().
 */
#ifndef MILLM_KERNEL_H
#define MILLM_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "tensor.h"

/* What this CPU *and* its operating system let us use (CPUID and XGETBV). */
enum
{
	MILLM_CPU_AVX2 = 1 << 0,		/* with FMA and F16C */
	MILLM_CPU_AVX512 = 1 << 1,		/* F, BW, VL, DQ */
	MILLM_CPU_AVX512_BF16 = 1 << 2,
	MILLM_CPU_AVX512_VNNI = 1 << 3,	/* with VBMI */
	MILLM_CPU_AMX = 1 << 4,		/* tiles of bfloat16, and all of the above */
	MILLM_CPU_SLOW_BF16 = 1 << 5	/* products of bfloat16 (AVX512-BF16) take longer than those of int16 and float32: Intel's */
};
extern unsigned millm_cpu_flags(void);

/* Positions of one KV page; the transposed K below makes it the width of a vector. */
#define MILLM_KERNEL_PAGE 16

/* Tokens of a group of MILLM_FORM_BF16_TILES; outputs that matmuls of forms in groups compute together. */
#define MILLM_TILE_TOKENS 16
#define MILLM_TILE_OUTPUTS 32
/*
 * Of MILLM_FORM_I16_TILES: tokens of a group; blocks of 64 that a row may have; and the largest value, and 4-bit or 16-bit weight, in
 * int16: 64 * 4095 * 8191 < 2^31.
 */
#define MILLM_I16_TILE_TOKENS 8
#define MILLM_I16_TILE_BLOCKS 1024
#define MILLM_I16_TILE_VALUE 8191.0f
#define MILLM_I16_TILE_CODE 4095.0f

/*
 * The form in which a matmul wants its activation.  F32 is the activation itself, rows as they lie;
 * a packed row of n_in values takes millm_form_row_bytes().
 */
typedef enum MillmForm
{
	MILLM_FORM_F32,
	MILLM_FORM_BF16,			/* rounded to nearest even, zeros up to a multiple of 32 */
	MILLM_FORM_I16,				/* int16, zeros up to a multiple of 128, and the row's float32 scale */
	/*
	 * The same for MILLM_4BIT rows of whole blocks (millm_is_blocky()), in the order in which a variant unpacks nibbles, zeros up to a
	 * multiple of 128.
	 */
	MILLM_FORM_BF16_NIBBLES,
	MILLM_FORM_I16_NIBBLES,
	/*
	 * bfloat16 in groups of 16 tokens, each in the space of 16 rows: its tile k [16, 16, 2], 1024 bytes, has values 32 k + 2 i and
	 * 32 k + 2 i + 1 of token t at [i, t].  Zeros up to a multiple of 32 values, and of 16 tokens.
	 */
	MILLM_FORM_BF16_TILES,
	/*
	 * int16 with a float32 scale for each 64 values, for weights whose rows are of such blocks; in groups of 8 tokens, of which the last has
	 * what is left, T: for each block its 32 pairs [32, T, 2], elements 1 5, 0 4, 3 7, 2 6 of each eight, then the scales [T].
	 */
	MILLM_FORM_I16_TILES,
	MILLM_N_FORMS
} MillmForm;

/* y[t, o] = (accumulate ? y[t, o] : 0) + bias[o] + row_scale[o] * sum_i x[t, i] * w[o, i] */
typedef struct MillmMatmul
{
	float	   *y;				/* [n_tokens, y_stride] */
	int64_t		y_stride;		/* in floats */
	const MillmWeight *w;
	const float *bias;			/* [n_out] or NULL */
	const float *row_scale;		/* [n_out] or NULL: for kernels that hand on a panel of weights without their scales */
	bool		accumulate;
	MillmForm	form;
	const void *x;				/* n_tokens rows of n_in in that form, 64-byte aligned when packed; tiles: begins with a group */
	int64_t		x_stride;		/* bytes from a row to the next */
	int			n_tokens;
} MillmMatmul;

typedef void (*MillmMatmulFn) (const MillmMatmul *m, int64_t begin, int64_t end);	/* outputs [begin, end) */

/*
 * One layer of the paged KV cache as attention sees it.  Page p has, for each KV head h,
 *   k + p * page_bytes + h * head_bytes:  [head_dim, 16]  (positions side by side)
 *   v + p * page_bytes + h * head_bytes:  [16, head_dim]
 * in the dtype of the table's MillmKvKernels; of INT8, the float16 scales [blocks, 16] follow in both.  Slots that were never written may hold anything.
 */
typedef struct MillmKvLayer
{
	char	   *k;
	char	   *v;
	int64_t		page_bytes;
	int64_t		head_bytes;		/* millm_kv_head_bytes() */
	int			n_kv_heads;
	int			head_dim;
	int			group;			/* query heads per KV head */
	int			window;			/* keys a query sees, itself included; 0: all */
	float		scale;			/* multiplies q.k */
	float		softcap;		/* c: scaled scores become c tanh(score / c); 0: none */
	const float *bias;			/* [heads, bias_stride]: what the score of the key at a position gets added, last; NULL: nothing */
	int64_t		bias_stride;	/* a multiple of 16 */
	const float *sinks;			/* [query heads]: a score that takes its share of the softmax and has no value; NULL: none */
} MillmKvLayer;

typedef enum MillmUnary {MILLM_UNARY_SILU, MILLM_UNARY_GELU_TANH, MILLM_UNARY_GELU_ERF, MILLM_UNARY_RELU, MILLM_N_UNARY} MillmUnary;

/* What reads and writes KV pages of one format. */
typedef struct MillmKvKernels
{
	MillmDtype	dtype;
	/* Store the K and V heads of one position, [n_kv_heads, head_dim] each, in slot (0..15) of a page. */
	void		(*store) (const MillmKvLayer *kv, int32_t page, int slot, const float *k, const float *v);
	/*
	 * Attention of the query at position for the heads of one KV head: y, q [n_heads, head_dim]; only
	 * heads kv_head * group .. + group are read and written.  pages[i] holds positions 16 i .. 16 i + 15.
	 * Online softmax in float32.
	 */
	void		(*attention) (float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages,
							  int64_t position, int kv_head);
} MillmKvKernels;

typedef struct MillmKernels
{
	const char *variant;		/* "ref", "avx2", "avx512", "amx" */
	MillmKvKernels kv[MILLM_N_KV_FORMATS];	/* AUTO: MILLM_F32 in ref (exact), MILLM_F16 elsewhere */

	/* [form][dtype][in_out]; never NULL for what best_form() and fixed_form() say */
	MillmMatmulFn matmul[MILLM_N_FORMS][MILLM_N_WEIGHT_DTYPES][2];
	MillmForm	(*best_form) (const MillmWeight *w, int n_tokens);
	MillmForm	(*fixed_form) (const MillmWeight *w);	/* the best that any number of tokens may have */
	/* y = x [n] in a packed form, the row's padding too; NULL where nobody asks for the form, and for those in groups of tokens */
	void		(*pack[MILLM_N_FORMS]) (void *y, const float *x, int64_t n);
	/* Those: y = one group of 1 to millm_form_group() tokens, rows x [n] that lie x_stride floats apart; y is 64-byte aligned */
	void		(*pack_group[MILLM_N_FORMS]) (void *y, const float *x, int64_t x_stride, int n_tokens, int64_t n);

	/* y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i];  w [n]; y may be x */
	void		(*rms_norm) (float *y, const float *x, const float *w, float eps, int64_t n);
	/* y[i] = (x[i] - mean) / sqrt(variance + eps) * w[i] + b[i];  w, b [n] or NULL; y may be x */
	void		(*layer_norm) (float *y, const float *x, const float *w, const float *b, float eps, int64_t n);
	/*
	 * Rotate the first 2 * n_pairs dims of each of n_heads heads of x [n_heads, head_dim] in place:
	 * (a, b) -> (a c - b s, b c + a s) for pairs (j, j + n_pairs), or (2j, 2j + 1) when interleaved.
	 */
	void		(*rope) (float *x, int n_heads, int head_dim, int n_pairs, bool interleaved,
						 const float *cosine, const float *sine);
	/* y[i] = f(x[i]), times up[i] unless up is NULL; y may be x */
	void		(*unary[MILLM_N_UNARY]) (float *y, const float *x, const float *up, int64_t n);
	/* y[i] = (up + 1) gate sigmoid(1.702 gate), gate = min(x[2 i], 7), up = x[2 i + 1] within -7 and 7; y may be x [2 n] */
	void		(*swiglu_pairs) (float *y, const float *x, int64_t n);
	/* x[i] = cap tanh(x[i] / cap) */
	void		(*softcap) (float *x, float cap, int64_t n);
	/* y[i] = w[i], or y[i] += w[i]: n stored values of a dtype to float32 */
	void		(*load_row) (float *y, const void *w, MillmDtype dtype, int64_t n, bool add);
	bool		(*is_finite) (const float *x, int64_t n);
} MillmKernels;

/* Bytes of K, or V, of a KV head in a page of this dtype. */
static inline int64_t
millm_kv_head_bytes(MillmDtype dtype, int head_dim)
{
	return MILLM_KERNEL_PAGE * (millm_weight_bytes(dtype, head_dim) + (dtype == MILLM_INT8 ? 2 * MILLM_KV_BLOCKS(head_dim) : 0));
}

/* Tokens that a form packs together. */
static inline int
millm_form_group(MillmForm form)
{
	return form == MILLM_FORM_BF16_TILES ? MILLM_TILE_TOKENS : form == MILLM_FORM_I16_TILES ? MILLM_I16_TILE_TOKENS : 1;
}

/* Bytes of a row of n_in values in a form, or of a token's share of a group; a multiple of 64. */
static inline int64_t
millm_form_row_bytes(MillmForm form, int64_t n_in)
{
	int64_t		padded = (n_in + 127) / 128 * 128;
	int64_t		bytes = form == MILLM_FORM_F32 ? n_in * 4 : form == MILLM_FORM_BF16 || form == MILLM_FORM_BF16_TILES ? n_in * 2 :
		form == MILLM_FORM_BF16_NIBBLES ? padded * 2 : form == MILLM_FORM_I16_TILES ? (n_in + 63) / 64 * 132 : padded * 2 + 4;

	return (bytes + 63) / 64 * 64;
}

/* As many as any packed form needs. */
static inline int64_t
millm_packed_row_bytes(int64_t n_in)
{
	int64_t		rows = millm_form_row_bytes(MILLM_FORM_I16_NIBBLES, n_in);
	int64_t		tiles = millm_form_row_bytes(MILLM_FORM_I16_TILES, n_in);

	return rows > tiles ? rows : tiles;
}

/* The address of element 0 of stored row i; not of MILLM_4BIT, whose rows may begin within a byte. */
static inline const char *
millm_weight_row(const MillmWeight *w, int64_t i)
{
	return (const char *) w->data + millm_weight_bytes(w->dtype, i * w->stride);
}

/* Byte 0 of row o of a 4-bit weight whose rows begin with a byte. */
static inline const uint8_t *
millm_nibble_row(const MillmWeight *w, int64_t o)
{
	return (const uint8_t *) w->data + (w->first + o * w->n_in) / 2;
}

/* What the sums of row o of INT8 are multiplied by. */
static inline float
millm_int8_scale(const MillmWeight *w, int64_t o)
{
	float		scb;

	memcpy(&scb, (const char *) w->scale + o * 4, 4);
	return scb * 0.007874015718698502f;	/* 1 / 127, bitsandbytes' */
}

/*
 * Do rows of this 4-bit weight begin and end with 64 weights of one scale?  So it is in all but exotic models and files.
 */
static inline bool
millm_is_blocky(const MillmWeight *w)
{
	return w->n_in % 64 == 0 && w->first % 64 == 0 && w->block_size % 64 == 0;
}

/* Are its rows whole blocks of 64, as MILLM_FORM_I16_TILES wants them? */
static inline bool
millm_has_i16_tiles(const MillmWeight *w)
{
	const bool	is_whole = w->dtype == MILLM_4BIT ? millm_is_blocky(w) : w->dtype == MILLM_INT8 || w->dtype == MILLM_BF16 || w->dtype == MILLM_F16;

	return is_whole && !w->in_out && w->n_in % 64 == 0 && w->n_in / 64 <= MILLM_I16_TILE_BLOCKS;
}

/*
 * y[n] = w[o, i .. i + n), of a weight of any dtype that is not in_out: what the faster paths are measured by, and what they fall
 * back to for shapes that they do not know.
 */
extern void millm_weight_decode(float *y, const MillmWeight *w, int64_t o, int64_t i, int64_t n);

/*
 * Fill *k with the variant of that name, or, when name is NULL, with the best one.  Returns false,
 * k untouched, when there is no such variant or this machine cannot run it (is_known tells which).
 */
extern bool millm_kernels_init(MillmKernels *k, const char *name, bool *is_known);
/* Names in ascending order, NULL-terminated; static. */
extern const char *const *millm_kernels_names(void);

/* ref's matmul in F32 form, of a weight of any dtype that is not in_out, decoded piece by piece. */
extern void millm_matmul_decoded(const MillmMatmul *m, int64_t begin, int64_t end);

/* The steps of millm_kernels_init(). */
extern void millm_kernels_ref(MillmKernels *k);
extern void millm_kernels_avx2(MillmKernels *k);
extern void millm_kernels_avx512(MillmKernels *k, unsigned cpu);
extern void millm_kernels_amx(MillmKernels *k);	/* after those */

#endif
