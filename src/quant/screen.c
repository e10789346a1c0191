/*
 * screen.c -- the screening copy of an LM head: codes, scales, and a bound that holds.
 *
 * With max the row's largest magnitude, t = w * 127 / max and q = t to the nearest integer, the row d = q * max / 127
 * stands for w.  Notation: u = 2^-24, g(k) = k u / (1 - k u), n = n_in, norms are Euclidean; * marks exact values.
 *
 * 1. |z* - y*| = |(w - d) . h| <= ||w - d|| ||h||  (Cauchy and Schwarz).
 * 2. A float32 sum of n terms, in any order, where each term has been rounded j times before, is off by at most
 *    g(n + j) sum |terms|  (Higham, Accuracy and Stability, 3.1), and sum |w_i h_i| <= ||w|| ||h||.  A term of z is rounded once
 *    (0 times when fused), of y at most 4 times, so
 *        |z - y| <= ||h|| (||w - d|| + g(n + 4) (||w|| + ||d||)) + what underflow loses.
 * 3. Underflow: a product below 2^-126 is off by at most 2^-150.  Rows whose max is below SMALLEST get codes 0, so no scale or
 *    weight of y underflows; n products, n < 2^17, are far below MILLM_SCREEN_TINY.
 * 4. Overflow: error is at least 32 u ||w||, so error ||h|| <= HUGE bounds every partial sum of z by 2^79; those of y, with or
 *    without its scale, are bounded by 127 sqrt(n) HUGE and (||w|| + error) ||h||.
 * 5. SLACK more roundings are granted than step 2 counts.  Few pay for this file's own float32: t is off by at most
 *    2 u |t|, and squares may underflow.  The others, more than 25 u (|z| + |y|), are left for the one who compares
 *    (engine/shortlist.c) and for what the sampler rounds.
 * 6. In int16, h becomes k: steps of s = m / 32767, m being h's largest magnitude, no more than ||h||.  An element is off by s / 2, and by
 *    the roundings of s, of its inverse and of their product with it, each at most u m: by less than m / 64200 in all.  So ||h - k|| <=
 *    sqrt(n) ||h|| / 64200, and as no |d_i| is above max 128 / 127, |d . (h - k)| <= n max ||h|| / 63600.  Steps 1 and 2 then hold of k, and
 *    ||k|| <= (1 + sqrt(n) / 64200) ||h||.  The sums of products are exact, and rounded no more often than in step 2.  m above
 *    SMALL / sqrt(n) keeps s and its inverse normal; where the product of s and the row's scale underflows, n sums of 127 * 32767 at most
 *    times 2^-150 are below 2^-111.
 *
 * The sums of squares run in float32 with 16 lanes: the roots' relative error is below (n / 16 + 20) u / 2 < 2^-11.  INFLATE
 * is twice that, which also covers that the product error * ||h|| is rounded.
 */
#include "screen.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layout.h"
#include "widen.h"

#define SLACK			32
#define SMALLEST		0x1p-100f
#define INFLATE			(1 + 0x1p-10)
#define MAX_N_IN		(1 << 17)
#define LANES			16

#define HEADER_BYTES	512			/* a multiple of 64, so that the codes are aligned */
#define PRINT_BYTES		64			/* of each row, in its fingerprint */

struct MillmScreenEncoder
{
	MillmDtype	dtype;
	int64_t		n_rows;
	int64_t		n_in;
	size_t		row_bytes;
	uint64_t	taken;			/* bytes of the head */
	int64_t		n_rows_done;
	unsigned char *carry;		/* [row_bytes]: a row that is not complete */
	size_t		n_carried;
	float	   *values;			/* [n_in] */
	unsigned char *tail;		/* scale [n_rows], error [n_rows], fingerprint */
	uint64_t	fingerprint;
	char		header[HEADER_BYTES];
};

/* ---- the fingerprint ---- */

static uint64_t
mix(uint64_t hash, uint64_t x)
{
	hash = (hash ^ x) * UINT64_C(0x9E3779B97F4A7C15);
	return hash ^ hash >> 32;
}

static uint64_t
print_begin(MillmDtype dtype, int64_t n_rows, int64_t n_in)
{
	return mix(mix(mix(0, (uint64_t) dtype), (uint64_t) n_rows), (uint64_t) n_in);
}

/* Where in a row of row_bytes the bytes that count begin. */
static size_t
print_offset(int64_t index, size_t row_bytes)
{
	size_t		n = row_bytes < PRINT_BYTES ? 1 : row_bytes - PRINT_BYTES + 1;

	return (size_t) ((mix(0, (uint64_t) index) >> 32) * n >> 32);
}

static uint64_t
print_row(uint64_t hash, int64_t index, const unsigned char *row, size_t row_bytes)
{
	uint64_t	words[PRINT_BYTES / 8] = {0};
	uint64_t	print = (uint64_t) index;

	memcpy(words, row + print_offset(index, row_bytes), row_bytes < PRINT_BYTES ? row_bytes : PRINT_BYTES);
	for (int i = 0; i < PRINT_BYTES / 8; i++)
		print = mix(print, words[i]);
	return mix(hash, print);
}

int64_t
millm_screen_fingerprint(MillmDtype dtype, int64_t n_rows, int64_t n_in, const void *head)
{
	enum {AHEAD = 32};			/* rows: each lies on another page, so nothing but we can know what comes next */
	const unsigned char *rows = head;
	size_t		row_bytes = (size_t) millm_weight_bytes(dtype, n_in);
	uint64_t	hash = print_begin(dtype, n_rows, n_in);

	for (int64_t v = 0; v < n_rows; v++)
	{
		if (v + AHEAD < n_rows)
			__builtin_prefetch(rows + (size_t) (v + AHEAD) * row_bytes + print_offset(v + AHEAD, row_bytes));
		hash = print_row(hash, v, rows + (size_t) v * row_bytes, row_bytes);
	}
	return (int64_t) hash;
}

/* ---- a row ---- */

/* The least float32 that is not below x >= 0. */
static float
round_up(double x)
{
	float		f = (float) x;

	return (double) f < x ? nextafterf(f, INFINITY) : f;
}

static float
sum_of(const float *lanes)
{
	float		sum = 0;

	for (int l = 0; l < LANES; l++)
		sum += lanes[l];
	return sum;
}

INLINED void
encode_lanes(const float *w, float inverse, float *t2, float *r2, int8_t *codes)
{
	float		shifted[LANES];
	uint32_t	bits[LANES];

	for (int l = 0; l < LANES; l++)
	{
		const float t = w[l] * inverse;
		float		r;

		/* 1.5 * 2^23 pushes the fraction out, rounding to nearest even; the low bits then are the integer */
		shifted[l] = t + 0x1.8p23f;
		r = t - (shifted[l] - 0x1.8p23f);	/* exact */
		t2[l] += t * t;
		r2[l] += r * r;
	}
	memcpy(bits, shifted, sizeof(bits));
	for (int l = 0; l < LANES; l++)
		codes[l] = (int8_t) (uint8_t) bits[l];
}

INLINED void
encode_row(const float *w, int64_t n, int8_t *codes, float *scale, float *error)
{
	float		t2[LANES] = {0},	/* of t, the row in steps */
				r2[LANES] = {0};	/* of t - q */
	uint32_t	bits = max_magnitude(w, (size_t) n);
	float		max,
				inverse;
	double		g = (double) (n + 4 + SLACK) * 0x1p-24;
	int64_t		i = 0;

	g /= 1 - g;
	memcpy(&max, &bits, 4);
	*scale = 0;
	if (!(max >= SMALLEST) || bits >= INFINITY_BITS)
	{
		memset(codes, 0, (size_t) n);
		*error = bits >= INFINITY_BITS ? INFINITY : round_up(sqrt((double) n) * max * (1 + g) * INFLATE);
		return;
	}
	*scale = max;
	inverse = 127.0f / max;
	for (; i + LANES <= n; i += LANES)
		encode_lanes(w + i, inverse, t2, r2, codes + i);
	if (i < n)
	{
		float		rest[LANES] = {0};
		int8_t		rest_codes[LANES];

		memcpy(rest, w + i, sizeof(float) * (size_t) (n - i));
		encode_lanes(rest, inverse, t2, r2, rest_codes);
		memcpy(codes + i, rest_codes, (size_t) (n - i));
	}
	/* ||d|| <= ||w|| + ||w - d|| */
	*error = round_up(((1 + g) * sqrt((double) sum_of(r2)) + 2 * g * sqrt((double) sum_of(t2))) * max / 127 * INFLATE);
}

void
millm_screen_widen(float *wide, const float *error, const void *scale, int64_t n_rows, int64_t n_in)
{
	const double n = (double) n_in;

	for (int64_t v = 0; v < n_rows; v++)
	{
		float		max;

		memcpy(&max, (const char *) scale + v * 4, 4);
		wide[v] = round_up(((double) error[v] + n * max / 63600) * (1 + sqrt(n) / 64200));
	}
}

/* ---- the stream ---- */

static int64_t
tail_bytes(int64_t n_rows)
{
	return n_rows * 8 + 8;
}

static bool
is_possible(int64_t n_rows, int64_t n_in)
{
	return n_rows >= 1 && n_in >= 1 && n_in < MAX_N_IN && n_rows <= MILLM_QUANT_MAX_WEIGHTS / n_in;
}

int64_t
millm_screen_file_bytes(int64_t n_rows, int64_t n_in)
{
	return is_possible(n_rows, n_in) ? HEADER_BYTES + n_rows * n_in + tail_bytes(n_rows) : -1;
}

/* Fill header: its length, the JSON, spaces. */
static void
write_header(char header[HEADER_BYTES], int64_t n_rows, int64_t n_in)
{
	int64_t		codes = n_rows * n_in;
	int			n;

	memset(header, ' ', HEADER_BYTES);
	memset(header, 0, 8);
	header[0] = (char) (uint8_t) ((HEADER_BYTES - 8) & 0xFF);
	header[1] = (char) (uint8_t) ((HEADER_BYTES - 8) >> 8);
	n = snprintf(header + 8, HEADER_BYTES - 8,
				 "{\"__metadata__\":{\"format\":\"millm_head_int8\"},"
				 "\"codes\":{\"dtype\":\"I8\",\"shape\":[%" PRId64 ",%" PRId64 "],\"data_offsets\":[0,%" PRId64 "]},"
				 "\"scale\":{\"dtype\":\"F32\",\"shape\":[%" PRId64 "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]},"
				 "\"error\":{\"dtype\":\"F32\",\"shape\":[%" PRId64 "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]},"
				 "\"fingerprint\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}}",
				 n_rows, n_in, codes, n_rows, codes, codes + 4 * n_rows, n_rows, codes + 4 * n_rows, codes + 8 * n_rows,
				 codes + 8 * n_rows, codes + 8 * n_rows + 8);
	header[8 + n] = ' ';
}

MillmCode
millm_screen_begin(MillmDtype dtype, int64_t n_rows, int64_t n_in, MillmScreenEncoder **out, MillmError *err)
{
	MillmScreenEncoder *enc;

	if (dtype >= MILLM_N_FLOAT_DTYPES)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "an LM head of this dtype has no screening copy");
	if (!is_possible(n_rows, n_in))
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid shape of an LM head: [%" PRId64 ", %" PRId64 "]", n_rows, n_in);
	if (!(enc = calloc(1, sizeof(*enc))))
		goto no_memory;
	enc->dtype = dtype;
	enc->n_rows = n_rows;
	enc->n_in = n_in;
	enc->row_bytes = (size_t) millm_weight_bytes(dtype, n_in);
	enc->fingerprint = print_begin(dtype, n_rows, n_in);
	enc->carry = malloc(enc->row_bytes);
	enc->values = malloc((size_t) n_in * sizeof(float));
	enc->tail = malloc((size_t) tail_bytes(n_rows));
	if (!enc->carry || !enc->values || !enc->tail)
		goto no_memory;
	write_header(enc->header, n_rows, n_in);
	*out = enc;
	return MILLM_OK;

no_memory:
	millm_screen_free(enc);
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory for the LM head's screening copy");
}

void
millm_screen_free(MillmScreenEncoder *enc)
{
	if (!enc)
		return;
	free(enc->carry);
	free(enc->values);
	free(enc->tail);
	free(enc);
}

const void *
millm_screen_header(const MillmScreenEncoder *enc, size_t *n)
{
	*n = HEADER_BYTES;
	return enc->header;
}

size_t
millm_screen_push_writes(const MillmScreenEncoder *enc, size_t n_bytes)
{
	uint64_t	left = (uint64_t) enc->n_rows * enc->row_bytes - enc->taken;

	return (enc->n_carried + (n_bytes < left ? n_bytes : (size_t) left)) / enc->row_bytes * (size_t) enc->n_in;
}

/* values [n_in]: room for the row in float32. */
INLINED void
encode(float *values, const unsigned char *row, MillmDtype dtype, int64_t n_in, int8_t *codes, float *scale, float *error)
{
	widen(values, row, dtype, (size_t) n_in);
	encode_row(values, n_in, codes, scale, error);
}

static void
encode_portable(float *values, const unsigned char *row, MillmDtype dtype, int64_t n_in, int8_t *codes, float *scale, float *error)
{
	encode(values, row, dtype, n_in, codes, scale, error);
}

AVX2 static void
encode_avx2(float *values, const unsigned char *row, MillmDtype dtype, int64_t n_in, int8_t *codes, float *scale, float *error)
{
	encode(values, row, dtype, n_in, codes, scale, error);
}

static void
take_row(MillmScreenEncoder *enc, const unsigned char *row, int8_t *codes)
{
	float		scale,
				error;

	(HAS_AVX2 ? encode_avx2 : encode_portable) (enc->values, row, enc->dtype, enc->n_in, codes, &scale, &error);
	memcpy(enc->tail + 4 * enc->n_rows_done, &scale, 4);
	memcpy(enc->tail + 4 * (enc->n_rows + enc->n_rows_done), &error, 4);
	enc->fingerprint = print_row(enc->fingerprint, enc->n_rows_done, row, enc->row_bytes);
	enc->n_rows_done++;
}

MillmCode
millm_screen_push(MillmScreenEncoder *enc, const void *bytes, size_t n_bytes, int8_t *codes, MillmError *err)
{
	const unsigned char *in = bytes;
	uint64_t	total = (uint64_t) enc->n_rows * enc->row_bytes;

	if (n_bytes > total - enc->taken)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "the LM head is longer than its shape");
		millm_detail(err, "Its %" PRId64 " x %" PRId64 " weights have %" PRIu64 " bytes.", enc->n_rows, enc->n_in, total);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	enc->taken += n_bytes;
	if (enc->n_carried > 0)
	{
		size_t		wanted = enc->row_bytes - enc->n_carried;
		size_t		n = n_bytes < wanted ? n_bytes : wanted;

		memcpy(enc->carry + enc->n_carried, in, n);
		enc->n_carried += n;
		in += n;
		n_bytes -= n;
		if (enc->n_carried == enc->row_bytes)
		{
			take_row(enc, enc->carry, codes);
			codes += enc->n_in;
			enc->n_carried = 0;
		}
	}
	for (; n_bytes >= enc->row_bytes; in += enc->row_bytes, n_bytes -= enc->row_bytes, codes += enc->n_in)
		take_row(enc, in, codes);
	if (n_bytes > 0)
	{
		memcpy(enc->carry, in, n_bytes);
		enc->n_carried = n_bytes;
	}
	return MILLM_OK;
}

MillmCode
millm_screen_finish(MillmScreenEncoder *enc, const void **tail, size_t *n, MillmError *err)
{
	if (enc->n_rows_done < enc->n_rows)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "the LM head is shorter than its shape");
		millm_detail(err, "%" PRId64 " of its %" PRId64 " rows came.", enc->n_rows_done, enc->n_rows);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	memcpy(enc->tail + 8 * enc->n_rows, &enc->fingerprint, 8);
	*tail = enc->tail;
	*n = (size_t) tail_bytes(enc->n_rows);
	return MILLM_OK;
}
