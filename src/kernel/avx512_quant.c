/*
 * avx512_quant.c -- 4-bit and INT8 weights for AVX-512.
 *
 * A few tokens (memory-bound): weights are read once, as they lie, and unpacked in registers.
 *   4BIT  128 bytes are 256 weights.  Each nibble selects the two bytes of an int16 (12 bits and a sign) from a codebook, and vpdpwssd
 *         multiplies with activations of 16 bits, exactly: a lane sums 16 products, below 2^31, of one block of 64; the sums are scaled
 *         in float32.  Beside the codebook's 1.2e-4, what is lost is the rounding of an activation to 2^-16 of the row's largest: at most
 *         9e-6 sqrt(n) of the product's size, less than bfloat16 loses.  (vpermw would select int16 at once, but Intel's cores make two
 *         operations of it, one for each of the ports that the products need: 40 cycles for 256 weights and 4 tokens, so 36.)
 *   INT8  widened to 16 bits, times activations of 16 bits, exactly, in int32.  With float32 activations, where nothing is rounded but sums,
 *         for deterministic answers of rows that are not whole blocks of 64.
 *
 * Many tokens (bound by arithmetic): where products of bfloat16 are fast (Zen 4), a panel of a few rows is dequantized into the cache and handed
 * to the float kernels (4-bit values rounded as bitsandbytes does; int8 are exact in bfloat16).  Else, and for deterministic answers of
 * any number of tokens, tiles of int16 (avx512_tiles.c).
 *
 * 4-bit rows that are not whole blocks of 64 are left to AVX2's panels.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx512_quant.h"

#include <math.h>
#include <string.h>

/* From this many tokens on a panel pays, or BF16 activations; measured on Zen 4. */
#define MIN_BF16_TOKENS		8
#define MIN_4BIT_TOKENS		12
#define MIN_INT8_TOKENS		24
/* And tiles of int16; measured on Emerald Rapids. */
#define MIN_4BIT_TILES_TOKENS	5
#define MIN_INT8_TILES_TOKENS	16
#define MIN_16BIT_TILES_TOKENS	8
#define PANEL_BYTES			(128 * 1024)
#define MAX_GROUPS			MILLM_I16_TILE_BLOCKS	/* of 64 weights, in a row of the fast paths */
#define TOKENS				4		/* that share one unpacking of the weights */
#define I16_ROWS			2		/* of INT8 that share one load of the activations */
#define I16_MAX				32767.0f
#define CODEBOOK_MAX		4095.0f	/* 16 * 4095 * 32767 < 2^31 */

/* Two floats, each for eight lanes. */
INLINE __m512
pair(const float *s)
{
	return _mm512_mask_broadcastss_ps(_mm512_set1_ps(s[0]), 0xFF00, _mm_load_ss(s + 1));
}

/* Four floats, each for four lanes. */
INLINE __m512
four(const float *s)
{
	return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(s)), _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0));
}

/* 128 weights' nibbles of a row of n weights, from weight i on: at its end there may be only 64. */
INLINE __m512i
load_nibbles(const uint8_t *row, int64_t i, int64_t n)
{
	return n - i >= 128 ? _mm512_loadu_si512(row + i / 2) : _mm512_maskz_loadu_epi64(0x0F, row + i / 2);
}

/* ---- activations in int16 ---- */

static void
pack_i16(void *packed, const float *x, int64_t n)
{
	const int64_t padded = (n + 127) / 128 * 128;
	int16_t    *y = packed;
	__m512		max = _mm512_setzero_ps();
	__m512		inverse;
	float		m;

	for (int64_t i = 0; i < n; i += 16)
		max = _mm512_max_ps(max, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i)));
	m = _mm512_reduce_max_ps(max);
	*(float *) (y + padded) = m / I16_MAX;
	/* a row of zeros, or so small that its inverse is none, counts as zeros: below 1e-33 */
	inverse = _mm512_set1_ps(m > I16_MAX * 0x1p-126f ? I16_MAX / m : 0);
	memset(y + n, 0, (size_t) (padded - n) * 2);
	for (int64_t i = 0; i < n; i += 16)
	{
		__m512		v = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i), inverse);

		_mm256_storeu_si256((__m256i *) (y + i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
	}
}

/* ---- 4BIT, few tokens ---- */

/*
 * The nibbles of 128 bytes of weights (256) come out of two vectors, which have the first and the second 16 bytes of each block of 64; those
 * left at the end of a row, out of one of 64 bytes or, half empty, of 32.  Values come in planes of 32 as long as a vector, four for each
 * vector of nibbles: what the low nibbles of the first 8 bytes of its quarters are multiplied by, of their last 8, and the same of the high
 * nibbles.  The high nibble of a byte is the earlier element.
 */
#define WIDE	256

/* Four planes out of the values of 64 bytes: of each quarter's 32, the first at q + quarter * stride. */
INLINE void
put_planes(int16_t *planes, const int16_t *q, int stride)
{
	const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
	const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi16(1));

	for (int g = 0; g < 2; g++, q += 16, planes += 32)
	{
		__m512i		v[2];

		for (int i = 0; i < 2; i++)
			v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) (q + 2 * i * stride))),
									  _mm256_loadu_si256((const __m256i *) (q + (2 * i + 1) * stride)), 1);
		_mm512_storeu_si512(planes, _mm512_permutex2var_epi16(v[0], odd, v[1]));
		_mm512_storeu_si512(planes + 64, _mm512_permutex2var_epi16(v[0], even, v[1]));
	}
}

static void
pack_i16_nibbles(void *packed, const float *x, int64_t n)
{
	const int64_t padded = (n + 127) / 128 * 128;
	int16_t    *y = packed;
	int16_t		q[WIDE];
	int64_t		i = 0;

	pack_i16(packed, x, n);
	*(float *) (y + padded) /= CODEBOOK_MAX;
	for (; i + WIDE <= n; i += WIDE)
	{
		memcpy(q, y + i, sizeof(q));
		put_planes(y + i, q, 64);
		put_planes(y + i + 128, q + 32, 64);
	}
	for (; i < padded; i += 128)
	{
		memcpy(q, y + i, 128 * sizeof(*q));
		put_planes(y + i, q, 32);
	}
}

/* For each value of a nibble, whatever the two bits above it: the low and the high bytes of its int16. */
typedef struct ByteCodebook
{
	__m512i		low, high;
} ByteCodebook;

INLINE ByteCodebook
byte_codebook(const float *codebook)
{
	const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(CODEBOOK_MAX)));

	return (ByteCodebook) {_mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(codes)),
		_mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_srli_epi32(codes, 8)))};
}

/* Rows of weights times tokens. */
typedef struct I16Tile
{
	const char *x;				/* the first token's */
	int64_t		x_stride;
	const uint8_t *row;			/* the first */
	int64_t		row_bytes;		/* to the next */
	const float *scales;		/* [n_rows][n_in / 64], and one more that is finite */
	const ByteCodebook *codebook;
	const Ahead *ahead;
} I16Tile;

/* sums[n_tokens][n_rows] += what the low nibbles of each row's bytes select, times the values of two planes. */
INLINE void
add_nibbles(const I16Tile *t, const __m512i *bytes, const char *planes, int n_tokens, int n_rows, __m512i *sums)
{
	__m512i		q[2][2];

	for (int r = 0; r < n_rows; r++)
	{
		__m512i		low = _mm512_permutexvar_epi8(bytes[r], t->codebook->low);
		__m512i		high = _mm512_permutexvar_epi8(bytes[r], t->codebook->high);

		q[0][r] = _mm512_unpacklo_epi8(low, high);
		q[1][r] = _mm512_unpackhi_epi8(low, high);
	}
	for (int p = 0; p < 2; p++)
		for (int j = 0; j < n_tokens; j++)
		{
			__m512i		xj = _mm512_load_si512(planes + 64 * p + j * t->x_stride);

			for (int r = 0; r < n_rows; r++)
				add_products(&sums[j * n_rows + r], q[p][r], xj);
		}
}

/* The n (256, 128 or 64) weights from i on: acc[n_tokens][n_rows] += scaled sums. */
INLINE void
i16_step(const I16Tile *t, int64_t i, int n, int n_tokens, int n_rows, __m512 *acc)
{
	const char *planes = t->x + i * 2;
	__m512i		bytes[2][2];	/* [vector][row] */
	__m512i		sums[2 * TOKENS];
	__m512		scale[2];

	for (int r = 0; r < n_rows; r++)
	{
		const uint8_t *row = t->row + r * t->row_bytes;
		const float *s = t->scales + i / 64 + r * (t->row_bytes / 32);

		prefetch_tile(t->ahead, (const char *) row, i / 2);
		if (n == WIDE)
		{
			__m512i		a = _mm512_loadu_si512(row + i / 2),
						b = _mm512_loadu_si512(row + i / 2 + 64);

			prefetch_tile(t->ahead, (const char *) row, i / 2 + 64);
			bytes[0][r] = _mm512_shuffle_i32x4(a, b, 0x88);
			bytes[1][r] = _mm512_shuffle_i32x4(a, b, 0xDD);
		}
		else
			bytes[0][r] = load_nibbles(row, i, i + n);
		scale[r] = n == WIDE ? four(s) : pair(s);
	}
	/* all sums turn by turn: no product waits for the one before */
	for (int j = 0; j < n_tokens * n_rows; j++)
		sums[j] = _mm512_setzero_si512();
	for (int v = 0; v < (n == WIDE ? 2 : 1); v++)
	{
		add_nibbles(t, bytes[v], planes + 256 * v, n_tokens, n_rows, sums);
		for (int r = 0; r < n_rows; r++)
			bytes[v][r] = _mm512_srli_epi16(bytes[v][r], 4);
		add_nibbles(t, bytes[v], planes + 256 * v + 128, n_tokens, n_rows, sums);
	}
	for (int j = 0; j < n_tokens; j++)
		for (int r = 0; r < n_rows; r++)
			acc[j * n_rows + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[j * n_rows + r]), scale[r], acc[j * n_rows + r]);
}

/* n_rows (1 or 2) rows from o on, times n_tokens. */
INLINE void
i16_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, int n_rows, const ByteCodebook *codebook, const float *scales, const Ahead *ahead)
{
	const int64_t n = m->w->n_in;
	const int64_t padded = (n + 127) / 128 * 128;
	const I16Tile tile = {(const char *) m->x + t * m->x_stride, m->x_stride, millm_nibble_row(m->w, o), n / 2, scales, codebook, ahead};
	const int	n_sums = n_tokens * n_rows;
	__m512		acc[2 * TOKENS];
	float		sums[2 * TOKENS];
	int64_t		i = 0;

	for (int j = 0; j < n_sums; j++)
		acc[j] = _mm512_setzero_ps();
	for (; i + WIDE <= n; i += WIDE)
		i16_step(&tile, i, WIDE, n_tokens, n_rows, acc);
	if (i + 128 <= n)
	{
		i16_step(&tile, i, 128, n_tokens, n_rows, acc);
		i += 128;
	}
	if (i < n)
		i16_step(&tile, i, 64, n_tokens, n_rows, acc);
	/* unrolled, or what is summed lies in memory */
#pragma GCC unroll 2
	for (int j = 0; j < n_sums; j += 4)
		_mm_storeu_ps(sums + j, sum_of_4(acc[j], acc[j + 1 < n_sums ? j + 1 : j], acc[j + 2 < n_sums ? j + 2 : j], acc[j + 3 < n_sums ? j + 3 : j]));
	for (int j = 0; j < n_tokens; j++)
		for (int r = 0; r < n_rows; r++)
			finish(m, t + j, o + r, sums[j * n_rows + r] * *(const float *) (tile.x + j * m->x_stride + padded * 2));
}

INLINE void
i16_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end)
{
	const MillmWeight *w = m->w;
	const Ahead ahead = plan_ahead(w->n_in / 2, 2);
	const int64_t n_groups = w->n_in / 64;
	int64_t		n_rows = MAX_GROUPS / n_groups;	/* whose scales are decoded together */
	float		scales[MAX_GROUPS + 64];
	const ByteCodebook codebook = byte_codebook(w->codebook);
	MapPlanes	planes;

	if (w->nested_block_size > 0)
		split_map(&planes, w->nested_map);
	for (int64_t o = begin; o < end; o += n_rows)
	{
		int64_t		r = 0;

		n_rows = end - o < n_rows ? end - o : n_rows;
		group_scales(scales, w, &planes, first_group(w, o), n_rows * n_groups);
		scales[n_rows * n_groups] = 0;
		for (; r + 2 <= n_rows; r += 2)
			i16_tile(m, t, n_tokens, o + r, 2, &codebook, scales + r * n_groups, &ahead);
		if (r < n_rows)
			i16_tile(m, t, n_tokens, o + r, 1, &codebook, scales + r * n_groups, &ahead);
	}
}

static void
matmul_i16_nibbles(const MillmMatmul *m, int64_t begin, int64_t end)
{
	int64_t		t = 0;

	for (; t + TOKENS <= m->n_tokens; t += TOKENS)
		i16_rows(m, t, TOKENS, begin, end);
	switch (m->n_tokens - t)
	{
		case 3:
			i16_rows(m, t, 3, begin, end);
			break;
		case 2:
			i16_rows(m, t, 2, begin, end);
			break;
		case 1:
			i16_rows(m, t, 1, begin, end);
			break;
	}
}

/* ---- INT8 ---- */

/* A lane of int32 holds so many products of pairs: 256 * 2 * 128 * 32767 < 2^31. */
#define MAX_I16_RUN	8192

/* n_rows rows times n_tokens. */
INLINE void
int8_i16_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, int n_rows, const Ahead *ahead)
{
	const int64_t n = m->w->n_in;
	const int64_t padded = (n + 127) / 128 * 128;
	const char *row = millm_weight_row(m->w, o);
	const char *x = (const char *) m->x + t * m->x_stride;
	__m512		sum[TOKENS][I16_ROWS];

	for (int j = 0; j < n_tokens; j++)
		for (int r = 0; r < n_rows; r++)
			sum[j][r] = _mm512_setzero_ps();
	for (int64_t begin = 0; begin < n; begin += MAX_I16_RUN)
	{
		const int64_t end = n - begin < MAX_I16_RUN ? n : begin + MAX_I16_RUN;
		__m512i		acc[TOKENS][I16_ROWS];

		for (int j = 0; j < n_tokens; j++)
			for (int r = 0; r < n_rows; r++)
				acc[j][r] = _mm512_setzero_si512();
		for (int64_t i = begin; i < end; i += 32)
		{
			__m512i		v[I16_ROWS];

			for (int r = 0; r < n_rows; r++)
			{
				const char *p = row + r * n;

				if (i % 64 == 0)
					prefetch_tile(ahead, p, i);
				v[r] = _mm512_cvtepi8_epi16(end - i >= 32 ? _mm256_loadu_si256((const __m256i *) (p + i))
											: _mm256_maskz_loadu_epi8((1u << (end - i)) - 1, p + i));
			}
			for (int j = 0; j < n_tokens; j++)
			{
				__m512i		xj = _mm512_load_si512(x + j * m->x_stride + i * 2);

				for (int r = 0; r < n_rows; r++)
					add_products(&acc[j][r], v[r], xj);
			}
		}
		for (int j = 0; j < n_tokens; j++)
			for (int r = 0; r < n_rows; r++)
				sum[j][r] = _mm512_add_ps(sum[j][r], _mm512_cvtepi32_ps(acc[j][r]));
	}
	for (int r = 0; r < n_rows; r++)
	{
		float		scale = millm_int8_scale(m->w, o + r);

		for (int j = 0; j < n_tokens; j++)
			finish(m, t + j, o + r, scale * *(const float *) (x + j * m->x_stride + padded * 2) * _mm512_reduce_add_ps(sum[j][r]));
	}
}

INLINE void
int8_i16_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end)
{
	const Ahead ahead = plan_ahead(m->w->n_in, I16_ROWS);
	int64_t		o = begin;

	for (; o + I16_ROWS <= end; o += I16_ROWS)
		int8_i16_tile(m, t, n_tokens, o, I16_ROWS, &ahead);
	for (; o < end; o++)
		int8_i16_tile(m, t, n_tokens, o, 1, &ahead);
}

static void
matmul_int8_i16(const MillmMatmul *m, int64_t begin, int64_t end)
{
	int64_t		t = 0;

	for (; t + TOKENS <= m->n_tokens; t += TOKENS)
		int8_i16_rows(m, t, TOKENS, begin, end);
	switch (m->n_tokens - t)
	{
		case 3:
			int8_i16_rows(m, t, 3, begin, end);
			break;
		case 2:
			int8_i16_rows(m, t, 2, begin, end);
			break;
		case 1:
			int8_i16_rows(m, t, 1, begin, end);
			break;
	}
}

INLINE __m512
load_int8(const char *p, __mmask16 mask)
{
	return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(mask == 0xFFFF ? _mm_loadu_si128((const __m128i *) p) : _mm_maskz_loadu_epi8(mask, p)));
}

/* n_rows (1 or 2) rows times n_tokens. */
INLINE void
int8_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, int n_rows, const Ahead *ahead)
{
	const int64_t n = m->w->n_in;
	const char *row = millm_weight_row(m->w, o);
	const float *x[TOKENS];
	__m512		acc[TOKENS][2][2];
	int64_t		i = 0;

	for (int j = 0; j < n_tokens; j++)
	{
		x[j] = (const float *) ((const char *) m->x + (t + j) * m->x_stride);
		for (int r = 0; r < n_rows; r++)
			acc[j][r][0] = acc[j][r][1] = _mm512_setzero_ps();
	}
	for (; i + 64 <= n; i += 64)
	{
		for (int r = 0; r < n_rows; r++)
			prefetch_tile(ahead, row + r * n, i);
		for (int u = 0; u < 4; u++)
		{
			__m512		v[2];

			for (int r = 0; r < n_rows; r++)
				v[r] = load_int8(row + r * n + i + 16 * u, 0xFFFF);
			for (int j = 0; j < n_tokens; j++)
			{
				__m512		xj = _mm512_loadu_ps(x[j] + i + 16 * u);

				for (int r = 0; r < n_rows; r++)
					acc[j][r][u % 2] = _mm512_fmadd_ps(v[r], xj, acc[j][r][u % 2]);
			}
		}
	}
	for (; i < n; i += 16)
	{
		__mmask16	mask = first_lanes(n - i);

		for (int r = 0; r < n_rows; r++)
		{
			__m512		v = load_int8(row + r * n + i, mask);

			for (int j = 0; j < n_tokens; j++)
				acc[j][r][0] = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, x[j] + i), acc[j][r][0]);
		}
	}
	for (int r = 0; r < n_rows; r++)
	{
		float		scale = millm_int8_scale(m->w, o + r);

		for (int j = 0; j < n_tokens; j++)
			finish(m, t + j, o + r, scale * _mm512_reduce_add_ps(_mm512_add_ps(acc[j][r][0], acc[j][r][1])));
	}
}

INLINE void
int8_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end)
{
	const Ahead ahead = plan_ahead(m->w->n_in, 2);
	int64_t		o = begin;

	for (; o + 2 <= end; o += 2)
		int8_tile(m, t, n_tokens, o, 2, &ahead);
	if (o < end)
		int8_tile(m, t, n_tokens, o, 1, &ahead);
}

static void
matmul_int8(const MillmMatmul *m, int64_t begin, int64_t end)
{
	int64_t		t = 0;

	for (; t + TOKENS <= m->n_tokens; t += TOKENS)
		int8_rows(m, t, TOKENS, begin, end);
	switch (m->n_tokens - t)
	{
		case 3:
			int8_rows(m, t, 3, begin, end);
			break;
		case 2:
			int8_rows(m, t, 2, begin, end);
			break;
		case 1:
			int8_rows(m, t, 1, begin, end);
			break;
	}
}

/* ---- panels ---- */

/* The matmul of a panel of n_rows dequantized rows, row o of m's first; their scales apart, or NULL. */
INLINE void
run_panel(const MillmMatmul *m, MillmMatmulFn run, MillmDtype dtype, MillmForm form, const void *panel, int64_t n_in, int64_t o, int64_t n_rows, const float *scale)
{
	MillmWeight w = {.dtype = dtype, .n_out = n_rows, .n_in = n_in, .stride = n_in, .data = panel};
	MillmMatmul part = *m;

	part.w = &w;
	part.form = form;
	part.y = m->y + o;
	part.bias = m->bias ? m->bias + o : NULL;
	part.row_scale = scale;
	run(&part, 0, n_rows);
}

/* How many rows of a panel: a multiple of granule, or 0 when not even that many fit. */
INLINE int64_t
panel_rows(int64_t row_bytes, int granule)
{
	return PANEL_BYTES / row_bytes / granule * granule;
}

/*
 * A 4-bit row in bfloat16, in the order of nibbles: vector k of each four has nibble k of 32 words, of which 16 belong to one block of 64 and 16
 * to the next.  So the values of both blocks, rounded once, are one table for the 128 nibbles.  scales: [n_in / 64], and one more that is finite.
 */
static void
row_to_bf16_nibbles(uint16_t *y, const MillmWeight *w, int64_t o, const float *scales)
{
	const __m512 codebook = _mm512_loadu_ps(w->codebook);
	const __m512i nibble = _mm512_set1_epi16(15);
	const __m512i second_block = _mm512_maskz_set1_epi16(0xFFFF0000, 16);
	const uint8_t *row = millm_nibble_row(w, o);

	for (int64_t i = 0; i < w->n_in; i += 128, y += 128)
	{
		const __m512i v = load_nibbles(row, i, w->n_in);
		const float *s = scales + i / 64;
		const __m512i table = (__m512i) _mm512_cvtne2ps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(s[1])), _mm512_mul_ps(codebook, _mm512_set1_ps(s[0])));

		prefetch_ahead(row + i / 2);
		for (int k = 0; k < 4; k++)
		{
			/* (v >> 4 k & 15) | second_block */
			__m512i		at = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, (unsigned) (4 * k)), nibble, second_block, 0xEA);

			_mm512_storeu_si512(y + 32 * k, _mm512_permutexvar_epi16(at, table));
		}
	}
}

/* Nibbles 0..3 of a little-endian word are elements 1, 0, 3, 2 of its four. */
static void
pack_bf16_nibbles(void *packed, const float *x, int64_t n)
{
	static const int element[4] = {1, 0, 3, 2};
	uint16_t   *y = packed;
	uint16_t	fourths[32];
	__m512i		every_4th;

	for (int j = 0; j < 32; j++)	/* of 64 elements, twice */
		fourths[j] = (uint16_t) (4 * j % 64);
	every_4th = _mm512_loadu_si512(fourths);
	for (int64_t i = 0; i < n; i += 128, y += 128)
	{
		__m512i		b[4];			/* 128 elements in their order */

		for (int h = 0; h < 4; h++)
			b[h] = i + 32 * h >= n ? _mm512_setzero_si512() :
				(__m512i) _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 32 * h + 16), _mm512_loadu_ps(x + i + 32 * h));
		for (int k = 0; k < 4; k++)
		{
			const __m512i at = _mm512_add_epi16(every_4th, _mm512_set1_epi16((short) element[k]));

			_mm512_storeu_si512(y + 32 * k, _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(b[0], at, b[1]), 0xFFFF0000,
																  _mm512_permutex2var_epi16(b[2], at, b[3])));
		}
	}
}

static void
matmul_bf16_nibbles(const MillmMatmul *m, int64_t begin, int64_t end)
{
	const int64_t n = (m->w->n_in + 127) / 128 * 128;
	int64_t		n_rows = panel_rows(n * 2, 4);
	const int64_t n_groups = m->w->n_in / 64;
	_Alignas(64) uint16_t panel[PANEL_BYTES / 2];
	float		scales[PANEL_BYTES / 2 / 64 + 64];
	MapPlanes	planes;

	if (m->w->nested_block_size > 0)
		split_map(&planes, m->w->nested_map);
	for (int64_t o = begin; o < end; o += n_rows)
	{
		n_rows = end - o < n_rows ? end - o : n_rows;
		group_scales(scales, m->w, &planes, first_group(m->w, o), n_rows * n_groups);
		scales[n_rows * n_groups] = 0;
		for (int64_t r = 0; r < n_rows; r++)
			row_to_bf16_nibbles(panel + r * n, m->w, o + r, scales + r * n_groups);
		run_panel(m, millm_avx512_bf16_form, MILLM_BF16, MILLM_FORM_BF16, panel, n, o, n_rows, NULL);
	}
}

/* int8 are exact in bfloat16: the panel has them without their scale. */
static void
matmul_int8_bf16_form(const MillmMatmul *m, int64_t begin, int64_t end)
{
	const int64_t n = m->w->n_in;
	int64_t		n_rows = panel_rows(n * 2, 4);
	_Alignas(64) uint16_t panel[PANEL_BYTES / 2];
	float		scale[PANEL_BYTES / 2];

	for (int64_t o = begin; o < end; o += n_rows)
	{
		n_rows = end - o < n_rows ? end - o : n_rows;
		for (int64_t r = 0; r < n_rows; r++)
		{
			const char *row = millm_weight_row(m->w, o + r);

			scale[r] = millm_int8_scale(m->w, o + r);
			for (int64_t i = 0; i < n; i += 16)
			{
				__mmask16	mask = first_lanes(n - i);

				if (i % 64 == 0)
					prefetch_ahead(row + i);
				_mm256_mask_storeu_epi16(panel + r * n + i, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(load_int8(row + i, mask)), 16)));
			}
		}
		run_panel(m, millm_avx512_bf16_form, MILLM_BF16, MILLM_FORM_BF16, panel, n, o, n_rows, scale);
	}
}

/* ---- MXFP4 ---- */

#define MXFP4_ROWS			4		/* that share one load of the activation */
#define MIN_MXFP4_TOKENS	8

/* The power of two of a scale byte; 0 is the smallest, a subnormal, and 255 infinity. */
INLINE __m512
mxfp4_scale(uint8_t byte)
{
	return _mm512_castsi512_ps(_mm512_set1_epi32(byte == 0 ? 0x00400000 : byte << 23));
}

/* 32 weights without their scale: those of even number, and those of odd number. */
INLINE void
mxfp4_values(const uint8_t *p, __m512 *even, __m512 *odd)
{
	const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
	__m512i		codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));

	*even = _mm512_permutexvar_ps(codes, values);
	*odd = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
}

/* A few rows of weights, read once as they lie, with one token; the sums of a row's 32s are scaled one by one. */
INLINE void
mxfp4_tile(const MillmMatmul *m, int64_t t, int64_t o, int n_rows)
{
	const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
	const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
	const int64_t n = m->w->n_in;
	const uint8_t *data = (const uint8_t *) m->w->data + o * n / 2;
	const uint8_t *scale = (const uint8_t *) m->w->scale + o * n / 32;
	const float *x = (const float *) ((const char *) m->x + t * m->x_stride);
	__m512		acc[MXFP4_ROWS];

	for (int r = 0; r < n_rows; r++)
		acc[r] = _mm512_setzero_ps();
	for (int64_t i = 0; i < n; i += 32)
	{
		__m512		a = _mm512_loadu_ps(x + i),
					b = _mm512_loadu_ps(x + i + 16);
		__m512		x_even = _mm512_permutex2var_ps(a, evens, b),
					x_odd = _mm512_permutex2var_ps(a, odds, b);

		for (int r = 0; r < n_rows; r++)
		{
			__m512		even,
						odd;

			if (i % 128 == 0)
				prefetch_ahead(data + (r * n + i) / 2);
			mxfp4_values(data + (r * n + i) / 2, &even, &odd);
			acc[r] = _mm512_fmadd_ps(_mm512_fmadd_ps(odd, x_odd, _mm512_mul_ps(even, x_even)), mxfp4_scale(scale[(r * n + i) / 32]), acc[r]);
		}
	}
	for (int r = 0; r < n_rows; r++)
		finish(m, t, o + r, _mm512_reduce_add_ps(acc[r]));
}

static void
matmul_mxfp4(const MillmMatmul *m, int64_t begin, int64_t end)
{
	for (int64_t o = begin; o < end; o += MXFP4_ROWS)
		for (int64_t t = 0; t < m->n_tokens; t++)
			if (end - o >= MXFP4_ROWS)
				mxfp4_tile(m, t, o, MXFP4_ROWS);
			else
				for (int64_t r = o; r < end; r++)
					mxfp4_tile(m, t, r, 1);
}

/* MXFP4 are exact in bfloat16. */
static void
matmul_mxfp4_bf16_form(const MillmMatmul *m, int64_t begin, int64_t end)
{
	const int64_t n = m->w->n_in;
	int64_t		n_rows = panel_rows(n * 2, 4);
	_Alignas(64) uint16_t panel[PANEL_BYTES / 2];

	for (int64_t o = begin; o < end; o += n_rows)
	{
		const uint8_t *data = (const uint8_t *) m->w->data + o * n / 2;
		const uint8_t *scale = (const uint8_t *) m->w->scale + o * n / 32;

		n_rows = end - o < n_rows ? end - o : n_rows;
		for (int64_t i = 0; i < n_rows * n; i += 32)
		{
			__m512		even,
						odd;

			mxfp4_values(data + i / 2, &even, &odd);
			even = _mm512_mul_ps(even, mxfp4_scale(scale[i / 32]));
			odd = _mm512_mul_ps(odd, mxfp4_scale(scale[i / 32]));
			_mm512_storeu_si512(panel + i, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
														   _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32((int) 0xFFFF0000))));
		}
		run_panel(m, millm_avx512_bf16_form, MILLM_BF16, MILLM_FORM_BF16, panel, n, o, n_rows, NULL);
	}
}

/* ---- the choice ---- */

/* Do four rows fit a panel of bfloat16? */
INLINE bool
fits_panel(int64_t n_in)
{
	return (n_in + 127) / 128 * 128 * 2 * 4 <= PANEL_BYTES;
}

INLINE bool
is_fast_4bit(const MillmWeight *w)
{
	return w->dtype == MILLM_4BIT && millm_has_i16_tiles(w);
}

static MillmForm
best_form_without_bf16(const MillmWeight *w, int n_tokens)
{
	const int	from = w->dtype == MILLM_4BIT ? MIN_4BIT_TILES_TOKENS : w->dtype == MILLM_INT8 ? MIN_INT8_TILES_TOKENS : MIN_16BIT_TILES_TOKENS;

	if (millm_has_i16_tiles(w) && n_tokens >= from)
		return MILLM_FORM_I16_TILES;
	if (w->dtype == MILLM_INT8)
		return MILLM_FORM_I16;
	return is_fast_4bit(w) ? MILLM_FORM_I16_NIBBLES : MILLM_FORM_F32;
}

static MillmForm
best_form(const MillmWeight *w, int n_tokens)
{
	if (w->dtype == MILLM_BF16)
		return !w->in_out && n_tokens >= MIN_BF16_TOKENS ? MILLM_FORM_BF16 : MILLM_FORM_F32;
	if (w->dtype == MILLM_MXFP4)
		return n_tokens >= MIN_MXFP4_TOKENS && fits_panel(w->n_in) ? MILLM_FORM_BF16 : MILLM_FORM_F32;
	if (w->dtype == MILLM_INT8)
		return n_tokens >= MIN_INT8_TOKENS && fits_panel(w->n_in) ? MILLM_FORM_BF16 : MILLM_FORM_I16;
	if (is_fast_4bit(w) && n_tokens >= MIN_4BIT_TOKENS)
		return fits_panel(w->n_in) ? MILLM_FORM_BF16_NIBBLES : MILLM_FORM_I16_TILES;
	if (is_fast_4bit(w))
		return MILLM_FORM_I16_NIBBLES;
	return w->dtype == MILLM_F16 && n_tokens >= MIN_16BIT_TILES_TOKENS && millm_has_i16_tiles(w) ? MILLM_FORM_I16_TILES : MILLM_FORM_F32;
}

/* Where products of bfloat16 are slow. */
MillmForm
millm_avx512_best_form_slow_bf16(const MillmWeight *w, int n_tokens)
{
	return millm_has_i16_tiles(w) ? best_form_without_bf16(w, n_tokens) : best_form(w, n_tokens);
}

void
millm_kernels_avx512_quant(MillmKernels *k, unsigned cpu)
{
	if (!(cpu & MILLM_CPU_AVX512_VNNI))
		return;					/* AVX2's 4-bit and INT8 kernels stay */
	k->matmul[MILLM_FORM_F32][MILLM_INT8][0] = matmul_int8;
	k->matmul[MILLM_FORM_F32][MILLM_MXFP4][0] = matmul_mxfp4;
	k->matmul[MILLM_FORM_I16_NIBBLES][MILLM_4BIT][0] = matmul_i16_nibbles;
	k->pack[MILLM_FORM_I16_NIBBLES] = pack_i16_nibbles;
	k->matmul[MILLM_FORM_I16][MILLM_INT8][0] = matmul_int8_i16;
	k->pack[MILLM_FORM_I16] = pack_i16;
	millm_kernels_avx512_tiles(k);
	k->best_form = best_form_without_bf16;
	if (cpu & MILLM_CPU_AVX512_BF16)
	{
		k->matmul[MILLM_FORM_BF16_NIBBLES][MILLM_4BIT][0] = matmul_bf16_nibbles;
		k->pack[MILLM_FORM_BF16_NIBBLES] = pack_bf16_nibbles;
		k->matmul[MILLM_FORM_BF16][MILLM_INT8][0] = matmul_int8_bf16_form;
		k->matmul[MILLM_FORM_BF16][MILLM_MXFP4][0] = matmul_mxfp4_bf16_form;
		k->best_form = cpu & MILLM_CPU_SLOW_BF16 ? millm_avx512_best_form_slow_bf16 : best_form;
	}
}
#endif
