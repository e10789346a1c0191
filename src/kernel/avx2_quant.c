/*
 * avx2_quant.c -- 4-bit and INT8 weights for AVX2.
 *
 * As avx512_quant.c, with vectors of half the size and vpshufb for look-ups: a few tokens multiply int16 by int16 (4BIT) or float32 by
 * float32 (INT8); many take tiles of int16 (avx2_tiles.c).  Of rows that are not whole blocks of 64 a panel is dequantized to float32.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx2.h"

#include <math.h>
#include <string.h>

#define MIN_PANEL_TOKENS	8
#define MIN_TILES_TOKENS	8
#define PANEL_BYTES			(128 * 1024)
#define TOKENS				4		/* that share one unpacking of 4-bit weights */
#define PANEL_TOKENS		4		/* a tile is 3 x 4 */
#define PANEL_ROWS			3
#define MAX_PANEL_ROWS		48
#define PANEL_DEPTH			512		/* 4 tokens of 2 KiB */
#define INT8_TOKENS			3		/* with 4 sums each, as the float32 kernel has */
#define MAX_GROUPS			MILLM_I16_TILE_BLOCKS	/* of 64 weights, in a row of the fast paths */
#define I16_MAX				32767.0f
#define CODEBOOK_MAX		8191.0f	/* 8 * 8191 * 32767 < 2^31 */

/* s[n] = the scales of n groups of 64 from group first of the tensor on. */
static void
group_scales(float *s, const MillmWeight *w, int64_t first, int64_t n)
{
	const int	per_block = w->block_size / 64;
	const uint8_t *codes = w->absmax;

	for (int64_t i = 0; i < n; i++)
	{
		int64_t		block = (first + i) / per_block;

		if (w->nested_block_size == 0)
			memcpy(s + i, (const char *) w->absmax + block * 4, 4);
		else
		{
			float		na;

			memcpy(&na, (const char *) w->nested_absmax + block / w->nested_block_size * 4, 4);
			s[i] = w->nested_map[codes[block]] * na;
			s[i] += w->nested_offset;
		}
	}
}

/* Faster in the usual case: nested blocks of 64, eight at a time within their nested block. */
void
millm_avx2_row_scales(float *s, const MillmWeight *w, int64_t o)
{
	const int64_t first = (w->first + o * w->n_in) / 64;
	const int64_t n = w->n_in / 64;
	const uint8_t *codes = (const uint8_t *) w->absmax + first;
	int64_t		i = 0;

	if (w->nested_block_size == 0 || w->block_size != 64)
	{
		group_scales(s, w, first, n);
		return;
	}
	_mm_prefetch((const char *) codes + 2048, _MM_HINT_T1);
	while (i < n)
	{
		int64_t		group = (first + i) / w->nested_block_size;
		int64_t		end = (group + 1) * w->nested_block_size - first;
		float		na;

		memcpy(&na, (const char *) w->nested_absmax + group * 4, 4);
		end = end < n ? end : n;
		for (; i + 8 <= end; i += 8)
		{
			__m256		v = _mm256_i32gather_ps(w->nested_map, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (codes + i))), 4);

			_mm256_storeu_ps(s + i, _mm256_add_ps(_mm256_mul_ps(v, _mm256_set1_ps(na)), _mm256_set1_ps(w->nested_offset)));
		}
		if (i < end)
			group_scales(s + i, w, first + i, end - i);
		i = end;
	}
}

/* ---- 4BIT, few tokens: int16 ---- */

/*
 * In 32 bytes, byte i holds elements 2 i (high nibble) and 2 i + 1.  Unpacking interleaves the bytes of each half of the register apart:
 * first come bytes 0..7 and 16..23, then 8..15 and 24..31; of each the low nibbles, then the high ones.
 */
static void
pack_i16_nibbles(void *packed, const float *x, int64_t n)
{
	const int64_t padded = (n + 127) / 128 * 128;
	int16_t    *y = packed;
	float		max = 0;
	float		inverse;

	for (int64_t i = 0; i < n; i++)
		max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
	*(float *) (y + padded) = max / I16_MAX / CODEBOOK_MAX;
	/* a row of zeros, or so small that its inverse is none, counts as zeros: below 1e-33 */
	inverse = max > I16_MAX * 0x1p-126f ? I16_MAX / max : 0;
	for (int64_t i = 0; i < n; i += 64)
		for (int half = 0; half < 2; half++)
			for (int j = 0; j < 16; j++)
			{
				int			byte = (j < 8 ? j : j + 8) + 8 * half;

				y[i + 16 * half + j] = (int16_t) lrintf(x[i + 2 * byte + 1] * inverse);
				y[i + 32 + 16 * half + j] = (int16_t) lrintf(x[i + 2 * byte] * inverse);
			}
}

INLINE void
i16_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end)
{
	const MillmWeight *w = m->w;
	const int64_t n = w->n_in;
	const int64_t padded = (n + 127) / 128 * 128;
	const __m256i nibble = _mm256_set1_epi8(0x0F);
	const char *x[TOKENS];
	float		scales[MAX_GROUPS];
	uint8_t		codes[2][16];
	__m256i		low_bytes,
				high_bytes;

	for (int i = 0; i < 16; i++)
	{
		int16_t		c = (int16_t) lrintf(w->codebook[i] * CODEBOOK_MAX);

		codes[0][i] = (uint8_t) c;
		codes[1][i] = (uint8_t) ((uint16_t) c >> 8);
	}
	low_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) codes[0]));
	high_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) codes[1]));
	for (int j = 0; j < n_tokens; j++)
		x[j] = (const char *) m->x + (t + j) * m->x_stride;

	for (int64_t o = begin; o < end; o++)
	{
		const uint8_t *row = millm_nibble_row(w, o);
		__m256		acc[TOKENS];

		millm_avx2_row_scales(scales, w, o);
		for (int j = 0; j < n_tokens; j++)
			acc[j] = _mm256_setzero_ps();
		for (int64_t i = 0; i < n; i += 64)
		{
			__m256i		v = _mm256_loadu_si256((const __m256i *) (row + i / 2));
			__m256		scale = _mm256_set1_ps(scales[i / 64]);
			__m256i		q[4];

			if (i % 128 == 0)
				prefetch_ahead(row + i / 2);
			for (int h = 0; h < 2; h++)
			{
				__m256i		index = _mm256_and_si256(h == 0 ? v : _mm256_srli_epi16(v, 4), nibble);
				__m256i		low = _mm256_shuffle_epi8(low_bytes, index);
				__m256i		high = _mm256_shuffle_epi8(high_bytes, index);

				q[2 * h] = _mm256_unpacklo_epi8(low, high);
				q[2 * h + 1] = _mm256_unpackhi_epi8(low, high);
			}
			for (int j = 0; j < n_tokens; j++)
			{
				const __m256i *xj = (const __m256i *) (x[j] + i * 2);
				__m256i		a = _mm256_add_epi32(_mm256_madd_epi16(q[0], xj[0]), _mm256_madd_epi16(q[1], xj[1]));
				__m256i		b = _mm256_add_epi32(_mm256_madd_epi16(q[2], xj[2]), _mm256_madd_epi16(q[3], xj[3]));

				acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), scale, acc[j]);
			}
		}
		for (int j = 0; j < n_tokens; j++)
			finish(m, t + j, o, sum_8(acc[j]) * *(const float *) (x[j] + padded * 2));
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

/* ---- INT8, few tokens: float32 ---- */

INLINE __m256
load_int8(const char *p)
{
	return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}

/* The order of sums is that of the float32 kernel, so that panels give the same bits. */
INLINE void
int8_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end)
{
	const int64_t n = m->w->n_in;
	const float *x[INT8_TOKENS];

	for (int j = 0; j < n_tokens; j++)
		x[j] = (const float *) ((const char *) m->x + (t + j) * m->x_stride);
	for (int64_t o = begin; o < end; o++)
	{
		const char *row = millm_weight_row(m->w, o);
		const float scale = millm_int8_scale(m->w, o);
		__m256		acc[INT8_TOKENS][4];
		int64_t		i = 0;

		for (int j = 0; j < n_tokens; j++)
			for (int u = 0; u < 4; u++)
				acc[j][u] = _mm256_setzero_ps();
		for (; i + 32 <= n; i += 32)
		{
			if (i % 64 == 0)
				prefetch_ahead(row + i);
			for (int u = 0; u < 4; u++)
			{
				__m256		v = load_int8(row + i + 8 * u);

				for (int j = 0; j < n_tokens; j++)
					acc[j][u] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x[j] + i + 8 * u), acc[j][u]);
			}
		}
		for (; i + 8 <= n; i += 8)
		{
			__m256		v = load_int8(row + i);

			for (int j = 0; j < n_tokens; j++)
				acc[j][0] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x[j] + i), acc[j][0]);
		}
		for (int j = 0; j < n_tokens; j++)
		{
			float		sum = sum_8(_mm256_add_ps(_mm256_add_ps(acc[j][0], acc[j][1]), _mm256_add_ps(acc[j][2], acc[j][3])));

			for (int64_t k = i; k < n; k++)
				sum = fmaf((float) ((const int8_t *) row)[k], x[j][k], sum);
			sum *= scale;
			finish(m, t + j, o, sum);
		}
	}
}

static void
int8_few(const MillmMatmul *m, int64_t begin, int64_t end)
{
	int64_t		t = 0;

	for (; t + INT8_TOKENS <= m->n_tokens; t += INT8_TOKENS)
		int8_rows(m, t, INT8_TOKENS, begin, end);
	if (m->n_tokens - t == 2)
		int8_rows(m, t, 2, begin, end);
	else if (m->n_tokens - t == 1)
		int8_rows(m, t, 1, begin, end);
}

/* ---- float32 panels ---- */

/* The matmul of a panel of n_rows rows of INT8 as floats, row o of m's first; their scales apart. */
static void
run_panel(const MillmMatmul *m, const float *panel, int64_t o, int64_t n_rows, const float *scale)
{
	MillmWeight w = {.dtype = MILLM_F32, .n_out = n_rows, .n_in = m->w->n_in, .stride = m->w->n_in, .data = panel};
	MillmMatmul part = *m;

	part.w = &w;
	part.y = m->y + o;
	part.bias = m->bias ? m->bias + o : NULL;
	part.row_scale = scale;
	millm_avx2_f32_rows(&part, 0, n_rows);
}

static void
matmul_int8(const MillmMatmul *m, int64_t begin, int64_t end)
{
	const int64_t n = m->w->n_in;
	int64_t		n_rows = PANEL_BYTES / 4 / n;
	_Alignas(64) float panel[PANEL_BYTES / 4];
	float		scale[PANEL_BYTES / 4];

	if (m->n_tokens < MIN_PANEL_TOKENS || n_rows == 0)
	{
		int8_few(m, begin, end);
		return;
	}
	for (int64_t o = begin; o < end; o += n_rows)
	{
		n_rows = end - o < n_rows ? end - o : n_rows;
		for (int64_t r = 0; r < n_rows; r++)
		{
			const char *row = millm_weight_row(m->w, o + r);
			int64_t		i = 0;

			scale[r] = millm_int8_scale(m->w, o + r);
			for (; i + 8 <= n; i += 8)
			{
				if (i % 64 == 0)
					prefetch_ahead(row + i);
				_mm256_storeu_ps(panel + r * n + i, load_int8(row + i));
			}
			for (; i < n; i++)
				panel[r * n + i] = (float) ((const int8_t *) row)[i];
		}
		run_panel(m, panel, o, n_rows, scale);
	}
}

/* n floats at p, 8 at most: the others are zeros, and no memory is read. */
INLINE __m256
load_first(const float *p, int64_t n)
{
	const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);

	return n == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int) n), lanes));
}

/* acc[n_rows][n_tokens] += the products of n values, 8 at most. */
INLINE void
panel_step(__m256 (*acc)[PANEL_TOKENS], const float *row, int64_t row_stride, int n_rows, const char *x, int64_t x_stride, int n_tokens, int64_t n)
{
	__m256		w[PANEL_ROWS];

	for (int r = 0; r < n_rows; r++)
		w[r] = load_first(row + r * row_stride, n);
	for (int j = 0; j < n_tokens; j++)
	{
		__m256		xj = load_first((const float *) (x + j * x_stride), n);

		for (int r = 0; r < n_rows; r++)
			acc[r][j] = _mm256_fmadd_ps(w[r], xj, acc[r][j]);
	}
}

/* sums[n_rows][4] += n_rows rows of a panel times n_tokens tokens, n deep: at most 3 x 4, whose 12 sums fit the registers. */
INLINE void
panel_tile(__m256 (*sums)[PANEL_TOKENS], const float *row, int64_t row_stride, int n_rows, const char *x, int64_t x_stride, int n_tokens, int64_t n)
{
	__m256		acc[PANEL_ROWS][PANEL_TOKENS];
	int64_t		i = 0;

	for (int r = 0; r < n_rows; r++)
		for (int j = 0; j < n_tokens; j++)
			acc[r][j] = sums[r][j];
	for (; i + 8 <= n; i += 8)
		panel_step(acc, row + i, row_stride, n_rows, x + i * 4, x_stride, n_tokens, 8);
	if (i < n)
		panel_step(acc, row + i, row_stride, n_rows, x + i * 4, x_stride, n_tokens, n - i);
	for (int r = 0; r < n_rows; r++)
		for (int j = 0; j < n_tokens; j++)
			sums[r][j] = acc[r][j];
}

/* All rows of a panel times n_tokens tokens from t on: depth by depth, so that the tokens' values stay in the L1 cache. */
INLINE void
panel_rows(const MillmMatmul *m, const float *panel, int64_t o, int64_t n_rows, int64_t t, int n_tokens)
{
	const int64_t n = m->w->n_in;
	const char *x = (const char *) m->x + t * m->x_stride;
	__m256		sums[MAX_PANEL_ROWS][PANEL_TOKENS];

	for (int64_t r = 0; r < n_rows; r++)
		for (int j = 0; j < n_tokens; j++)
			sums[r][j] = _mm256_setzero_ps();
	for (int64_t i = 0; i < n; i += PANEL_DEPTH)
	{
		const int64_t depth = n - i < PANEL_DEPTH ? n - i : PANEL_DEPTH;
		const float *row = panel + i;
		int64_t		r = 0;

		for (; r + PANEL_ROWS <= n_rows; r += PANEL_ROWS)
			panel_tile(sums + r, row + r * n, n, PANEL_ROWS, x + i * 4, m->x_stride, n_tokens, depth);
		if (n_rows - r == 2)
			panel_tile(sums + r, row + r * n, n, 2, x + i * 4, m->x_stride, n_tokens, depth);
		else if (n_rows - r == 1)
			panel_tile(sums + r, row + r * n, n, 1, x + i * 4, m->x_stride, n_tokens, depth);
	}
	for (int64_t r = 0; r < n_rows; r++)
		for (int j = 0; j < n_tokens; j++)
			finish(m, t + j, o + r, sum_8(sums[r][j]));
}

/* One sum of eight parts per element, whatever the tile: a token's bits do not depend on its company. */
static void
panel_products(const MillmMatmul *m, const float *panel, int64_t o, int64_t n_rows)
{
	int64_t		t = 0;

	for (; t + PANEL_TOKENS <= m->n_tokens; t += PANEL_TOKENS)
		panel_rows(m, panel, o, n_rows, t, PANEL_TOKENS);
	switch (m->n_tokens - t)
	{
		case 3:
			panel_rows(m, panel, o, n_rows, t, 3);
			break;
		case 2:
			panel_rows(m, panel, o, n_rows, t, 2);
			break;
		case 1:
			panel_rows(m, panel, o, n_rows, t, 1);
			break;
	}
}

/* Rows that are not whole blocks are decoded by the reference: correct, and slow for a single token. */
static void
matmul_panels(const MillmMatmul *m, int64_t begin, int64_t end)
{
	const int64_t n = m->w->n_in;
	int64_t		n_rows = PANEL_BYTES / 4 / n;
	_Alignas(64) float panel[PANEL_BYTES / 4];

	if (n_rows == 0)
	{
		millm_matmul_decoded(m, begin, end);
		return;
	}
	n_rows = n_rows < MAX_PANEL_ROWS ? n_rows : MAX_PANEL_ROWS;
	if (n_rows > PANEL_ROWS)
		n_rows -= n_rows % PANEL_ROWS;
	for (int64_t o = begin; o < end; o += n_rows)
	{
		n_rows = end - o < n_rows ? end - o : n_rows;
		for (int64_t r = 0; r < n_rows; r++)
			millm_weight_decode(panel + r * n, m->w, o + r, 0, n);
		panel_products(m, panel, o, n_rows);
	}
}

INLINE bool
is_fast_4bit(const MillmWeight *w)
{
	return w->dtype == MILLM_4BIT && millm_has_i16_tiles(w);
}

static MillmForm
best_form(const MillmWeight *w, int n_tokens)
{
	if (n_tokens >= MIN_TILES_TOKENS && millm_has_i16_tiles(w))
		return MILLM_FORM_I16_TILES;
	return is_fast_4bit(w) ? MILLM_FORM_I16_NIBBLES : MILLM_FORM_F32;
}

void
millm_kernels_avx2_quant(MillmKernels *k)
{
	k->matmul[MILLM_FORM_F32][MILLM_4BIT][0] = matmul_panels;
	k->matmul[MILLM_FORM_F32][MILLM_MXFP4][0] = matmul_panels;
	k->matmul[MILLM_FORM_F32][MILLM_INT8][0] = matmul_int8;
	k->matmul[MILLM_FORM_I16_NIBBLES][MILLM_4BIT][0] = matmul_i16_nibbles;
	k->pack[MILLM_FORM_I16_NIBBLES] = pack_i16_nibbles;
	millm_kernels_avx2_tiles(k);
	k->best_form = best_form;
}
#endif
