/*
 * avx512.c -- kernels for CPUs with AVX-512 F, BW, VL and DQ, and what AVX512-BF16 adds.
 *
 * float32 form: a dot product runs in four vectors of sixteen partial sums, chunk after chunk of 64
 * weights, then the chunks of 16 that are left, the last one masked.  Tiles of rows and tokens keep that
 * order for each element.
 *
 * bfloat16 form (AVX512-BF16, many tokens): vdpbf16ps does twice the work of a float32 FMA on Zen 4, which
 * costs the rounding of the activation to 8 bits.  One vector of sums per element, whatever the tile.  One or a few
 * tokens are bound by memory, not by arithmetic, so they keep the exact form.
 *
 * The KV cache is float16, or int8.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx512.h"

#include <math.h>
#include <string.h>

#define COLUMN_PREFETCH_ROWS 16
/* Outputs whose sums stream_columns() keeps: 4 KiB. */
#define STREAM_COLUMNS 1024

/* 16 weights from element i on as float32; where the mask is 0, zeros, and no memory is read. */
INLINE __m512
load_16(const char *p, int64_t i, MillmDtype dtype, __mmask16 mask)
{
	__m256i		half;

	if (dtype == MILLM_F32)
		return mask == 0xFFFF ? _mm512_loadu_ps(p + i * 4) : _mm512_maskz_loadu_ps(mask, p + i * 4);
	half = mask == 0xFFFF ? _mm256_loadu_si256((const __m256i *) (p + i * 2)) : _mm256_maskz_loadu_epi16(mask, p + i * 2);
	if (dtype == MILLM_F16)
		return _mm512_cvtph_ps(half);
	return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* ---- float32 form ---- */

/* n_rows x n_tokens dot products: at most 2 x 3 or 1 x 6, whose 24 vectors of sums fit the registers. */
INLINE void
dot_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, int n_rows, MillmDtype dtype, const Ahead *ahead)
{
	const int	bytes = dtype == MILLM_F32 ? 4 : 2;
	const int64_t n = m->w->n_in;
	const char *w[2];
	const float *x[6];
	__m512		acc[2][6][4];
	int64_t		i = 0;

	for (int r = 0; r < n_rows; r++)
	{
		w[r] = millm_weight_row(m->w, o + r);
		for (int j = 0; j < n_tokens; j++)
			for (int u = 0; u < 4; u++)
				acc[r][j][u] = _mm512_setzero_ps();
	}
	for (int j = 0; j < n_tokens; j++)
		x[j] = (const float *) ((const char *) m->x + (t + j) * m->x_stride);

	for (; i + 64 <= n; i += 64)
	{
		if (ahead)
			for (int r = 0; r < n_rows; r++)
				for (int line = 0; line < 64 * bytes; line += 64)
					prefetch_tile(ahead, w[r], i * bytes + line);
		for (int u = 0; u < 4; u++)
		{
			__m512		v[2];

			for (int r = 0; r < n_rows; r++)
				v[r] = load_16(w[r], i + 16 * u, dtype, 0xFFFF);
			for (int j = 0; j < n_tokens; j++)
			{
				__m512		xj = _mm512_loadu_ps(x[j] + i + 16 * u);

				for (int r = 0; r < n_rows; r++)
					acc[r][j][u] = _mm512_fmadd_ps(v[r], xj, acc[r][j][u]);
			}
		}
	}
	for (; i < n; i += 16)
	{
		__mmask16	mask = first_lanes(n - i);

		for (int j = 0; j < n_tokens; j++)
			for (int r = 0; r < n_rows; r++)
				acc[r][j][0] = _mm512_fmadd_ps(load_16(w[r], i, dtype, mask), _mm512_maskz_loadu_ps(mask, x[j] + i), acc[r][j][0]);
	}
	for (int r = 0; r < n_rows; r++)
		for (int j = 0; j < n_tokens; j++)
			finish(m, t + j, o + r, _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[r][j][0], acc[r][j][1]),
																		_mm512_add_ps(acc[r][j][2], acc[r][j][3]))));
}

INLINE void
dot_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end, MillmDtype dtype, bool prefetch)
{
	const int	n_rows = n_tokens <= 3 ? 2 : 1;
	const Ahead ahead = plan_ahead(m->w->stride * (dtype == MILLM_F32 ? 4 : 2), n_rows);
	int64_t		o = begin;

	for (; n_rows == 1 && o < end; o++)
		dot_tile(m, t, n_tokens, o, 1, dtype, prefetch ? &ahead : NULL);
	for (; o + 2 <= end; o += 2)
		dot_tile(m, t, n_tokens, o, 2, dtype, prefetch ? &ahead : NULL);
	for (; o < end; o++)
		dot_tile(m, t, n_tokens, o, 1, dtype, NULL);
}

/* w [n_out, n_in].  The range's rows pass once for each few tokens: they lie in the L2 cache then.  Four to six tokens read them once. */
INLINE void
matmul_rows(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	int64_t		t = 0;

	switch (m->n_tokens)
	{
		case 1:
			dot_rows(m, 0, 1, begin, end, dtype, true);
			return;
		case 2:
			dot_rows(m, 0, 2, begin, end, dtype, true);
			return;
		case 4:
			dot_rows(m, 0, 4, begin, end, dtype, true);
			return;
		case 5:
			dot_rows(m, 0, 5, begin, end, dtype, true);
			return;
		case 6:
			dot_rows(m, 0, 6, begin, end, dtype, true);
			return;
	}
	dot_rows(m, 0, 3, begin, end, dtype, true);
	for (t = 3; t + 3 <= m->n_tokens; t += 3)
		dot_rows(m, t, 3, begin, end, dtype, false);
	if (m->n_tokens - t == 2)
		dot_rows(m, t, 2, begin, end, dtype, false);
	else if (m->n_tokens - t == 1)
		dot_rows(m, t, 1, begin, end, dtype, false);
}

/* n_vectors * 16 outputs of n_tokens tokens, at most 16 sums, the last vector masked: each weight row's piece is read once. */
INLINE void
column_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, int n_vectors, __mmask16 last, MillmDtype dtype)
{
	const int	bytes = dtype == MILLM_F32 ? 4 : 2;
	const int64_t row_bytes = m->w->stride * bytes;
	const char *w = m->w->data;
	const char *x = (const char *) m->x + t * m->x_stride;
	__m512		acc[16];		/* [n_tokens][n_vectors] */

	for (int i = 0; i < n_tokens * n_vectors; i++)
		acc[i] = _mm512_setzero_ps();
	for (int64_t i = 0; i < m->w->n_in; i++, w += row_bytes, x += sizeof(float))
	{
		__m512		xi[4];

		for (int j = 0; j < n_tokens; j++)
			xi[j] = _mm512_set1_ps(*(const float *) (x + j * m->x_stride));
		if (t == 0)
			for (int line = 0; line < n_vectors * 16 * bytes; line += 64)
				_mm_prefetch(w + o * bytes + line + COLUMN_PREFETCH_ROWS * row_bytes, _MM_HINT_T0);
		for (int u = 0; u < n_vectors; u++)
		{
			__m512		v = load_16(w, o + 16 * u, dtype, u == n_vectors - 1 ? last : 0xFFFF);

			for (int j = 0; j < n_tokens; j++)
				acc[j * n_vectors + u] = _mm512_fmadd_ps(xi[j], v, acc[j * n_vectors + u]);
		}
	}
	for (int j = 0; j < n_tokens; j++)
		for (int u = 0; u < n_vectors; u++)
		{
			__mmask16	mask = u == n_vectors - 1 ? last : 0xFFFF;
			float	   *y = m->y + (t + j) * m->y_stride + o + 16 * u;
			__m512		sum = acc[j * n_vectors + u];

			if (m->bias)
				sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, m->bias + o + 16 * u));
			if (m->accumulate)
				sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
			_mm512_mask_storeu_ps(y, mask, sum);
		}
}

INLINE void
columns_of_tokens(const MillmMatmul *m, int64_t o, int n_vectors, __mmask16 last, MillmDtype dtype)
{
	int64_t		t = 0;

	for (; t + 4 <= m->n_tokens; t += 4)
		column_tile(m, t, 4, o, n_vectors, last, dtype);
	for (; t < m->n_tokens; t++)
		column_tile(m, t, 1, o, n_vectors, last, dtype);
}

/*
 * One token: the rows are read whole, so that memory sees long streams, and the sums wait in the L1 cache.
 * Eight rows at a time, to touch each sum less often.
 */
INLINE void
stream_columns(const MillmMatmul *m, int64_t o, int n, MillmDtype dtype)
{
	const int	bytes = dtype == MILLM_F32 ? 4 : 2;
	const int64_t n_in = m->w->n_in;
	const int64_t row_bytes = m->w->stride * bytes;
	const float *x = m->x;
	_Alignas(64) float acc[STREAM_COLUMNS];

	for (int u = 0; u < n; u += 16)
		_mm512_store_ps(acc + u, _mm512_setzero_ps());
	for (int64_t i = 0; i < n_in; i += 8)
	{
		const char *w = (const char *) m->w->data + i * row_bytes + o * bytes;
		int			n_rows = (int) (n_in - i < 8 ? n_in - i : 8);

		for (int u = 0; u < n; u += 16)
		{
			__mmask16	mask = first_lanes(n - u);
			__m512		sum = _mm512_load_ps(acc + u);

			if (n_rows == 8)
				for (int r = 0; r < 8; r++)
				{
					_mm_prefetch(w + (r + 8) * row_bytes + u * bytes, _MM_HINT_T0);
					sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i + r]), load_16(w + r * row_bytes, u, dtype, mask), sum);
				}
			else
				for (int r = 0; r < n_rows; r++)
					sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i + r]), load_16(w + r * row_bytes, u, dtype, mask), sum);
			_mm512_store_ps(acc + u, sum);
		}
	}
	for (int u = 0; u < n; u++)
		finish(m, 0, o + u, acc[u]);
}

/* w [n_in, n_out]: every output is one sum over n_in, in order, fused. */
INLINE void
matmul_columns(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	int64_t		o = begin;

	if (m->n_tokens == 1)
	{
		for (; o < end; o += STREAM_COLUMNS)
			stream_columns(m, o, (int) (end - o < STREAM_COLUMNS ? end - o : STREAM_COLUMNS), dtype);
		return;
	}
	for (; o + 64 <= end; o += 64)
		columns_of_tokens(m, o, 4, 0xFFFF, dtype);
	for (; o < end; o += 16)
		columns_of_tokens(m, o, 1, first_lanes(end - o), dtype);
}

#define MATMUL(name, dtype) \
static void rows_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul_rows(m, begin, end, dtype); } \
static void columns_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul_columns(m, begin, end, dtype); }
MATMUL(f32, MILLM_F32)
MATMUL(f16, MILLM_F16)
MATMUL(bf16, MILLM_BF16)

void
millm_avx512_f32_rows(const MillmMatmul *m, int64_t begin, int64_t end)
{
	rows_f32(m, begin, end);
}

/* ---- bfloat16 form ---- */

static void
pack_bf16(void *packed, const float *x, int64_t n)
{
	uint16_t   *y = packed;

	for (int64_t i = 0; i < n; i += 32)
	{
		__m512		low = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
		__m512		high = n - i > 16 ? _mm512_maskz_loadu_ps(first_lanes(n - i - 16), x + i + 16) : _mm512_setzero_ps();

		_mm512_storeu_si512(y + i, (__m512i) _mm512_cvtne2ps_pbh(high, low));
	}
}

INLINE float
sum_of_1(__m512 a)				/* the same bits as among four */
{
	return _mm_cvtss_f32(sum_of_4(a, a, a, a));
}

INLINE void
finish_4(const MillmMatmul *m, int64_t t, int64_t o, __m128 sums)	/* outputs o .. o + 3 */
{
	float	   *y = m->y + t * m->y_stride + o;

	if (m->row_scale)
		sums = _mm_mul_ps(sums, _mm_loadu_ps(m->row_scale + o));
	if (m->bias)
		sums = _mm_add_ps(sums, _mm_loadu_ps(m->bias + o));
	if (m->accumulate)
		sums = _mm_add_ps(_mm_loadu_ps(y), sums);
	_mm_storeu_ps(y, sums);
}

/* 4 rows x n_tokens, at most 6. */
INLINE void
bf16_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, const Ahead *ahead)
{
	const int64_t n = m->w->n_in;
	const char *w = millm_weight_row(m->w, o);
	const int64_t row_bytes = m->w->stride * 2;
	const char *x = (const char *) m->x + t * m->x_stride;
	__m512		acc[6][4];
	int64_t		i = 0;

	for (int j = 0; j < n_tokens; j++)
		for (int r = 0; r < 4; r++)
			acc[j][r] = _mm512_setzero_ps();
	for (; i < n; i += 32)
	{
		__m512bh	v[4];
		__mmask32	mask = n - i >= 32 ? 0xFFFFFFFF : (__mmask32) ((1u << (n - i)) - 1);

		for (int r = 0; r < 4; r++)
		{
			if (ahead)
				prefetch_tile(ahead, w + r * row_bytes, i * 2);
			v[r] = (__m512bh) (mask == 0xFFFFFFFF ? _mm512_loadu_si512(w + r * row_bytes + i * 2)
							   : _mm512_maskz_loadu_epi16(mask, w + r * row_bytes + i * 2));
		}
		for (int j = 0; j < n_tokens; j++)
		{
			__m512bh	xj = (__m512bh) _mm512_load_si512(x + j * m->x_stride + i * 2);

			for (int r = 0; r < 4; r++)
				acc[j][r] = _mm512_dpbf16_ps(acc[j][r], v[r], xj);
		}
	}
	for (int j = 0; j < n_tokens; j++)
		finish_4(m, t + j, o, sum_of_4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]));
}

/* One row, one token, in the same order. */
static void
bf16_dot(const MillmMatmul *m, int64_t t, int64_t o)
{
	const int64_t n = m->w->n_in;
	const char *w = millm_weight_row(m->w, o);
	const char *x = (const char *) m->x + t * m->x_stride;
	__m512		acc = _mm512_setzero_ps();

	for (int64_t i = 0; i < n; i += 32)
	{
		__mmask32	mask = n - i >= 32 ? 0xFFFFFFFF : (__mmask32) ((1u << (n - i)) - 1);

		acc = _mm512_dpbf16_ps(acc, (__m512bh) _mm512_maskz_loadu_epi16(mask, w + i * 2), (__m512bh) _mm512_load_si512(x + i * 2));
	}
	finish(m, t, o, sum_of_1(acc));
}

INLINE void
bf16_rows(const MillmMatmul *m, int64_t t, int n_tokens, int64_t begin, int64_t end, bool prefetch)
{
	const Ahead ahead = plan_ahead(m->w->stride * 2, 4);
	int64_t		o = begin;

	for (; o + 4 <= end; o += 4)
		bf16_tile(m, t, n_tokens, o, prefetch ? &ahead : NULL);
	for (; o < end; o++)
		for (int j = 0; j < n_tokens; j++)
			bf16_dot(m, t + j, o);
}

void
millm_avx512_bf16_form(const MillmMatmul *m, int64_t begin, int64_t end)
{
	int64_t		t = 0;

	/* only the first few tokens find the weights in memory */
	for (; t + 6 <= m->n_tokens; t += 6)
		if (t == 0)
			bf16_rows(m, t, 6, begin, end, true);
		else
			bf16_rows(m, t, 6, begin, end, false);
	switch (m->n_tokens - t)
	{
		case 5:
			bf16_rows(m, t, 5, begin, end, t == 0);
			break;
		case 4:
			bf16_rows(m, t, 4, begin, end, t == 0);
			break;
		case 3:
			bf16_rows(m, t, 3, begin, end, t == 0);
			break;
		case 2:
			bf16_rows(m, t, 2, begin, end, t == 0);
			break;
		case 1:
			bf16_rows(m, t, 1, begin, end, t == 0);
			break;
	}
}

/* ---- the rest ---- */

static void
rms_norm(float *y, const float *x, const float *w, float eps, int64_t n)
{
	__m512		squares = _mm512_setzero_ps();
	__m512		r;

	for (int64_t i = 0; i < n; i += 16)
	{
		__m512		v = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);

		squares = _mm512_fmadd_ps(v, v, squares);
	}
	r = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / (float) n + eps));
	for (int64_t i = 0; i < n; i += 16)
	{
		__mmask16	mask = first_lanes(n - i);
		__m512		v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), r);

		_mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w + i), v));
	}
}

static void
layer_norm(float *y, const float *x, const float *w, const float *b, float eps, int64_t n)
{
	__m512		sum = _mm512_setzero_ps(),
				squares = _mm512_setzero_ps(),
				mean,
				r;

	for (int64_t i = 0; i < n; i += 16)
		sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
	mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float) n);
	for (int64_t i = 0; i < n; i += 16)
	{
		__mmask16	mask = first_lanes(n - i);
		__m512		v = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), mean);

		squares = _mm512_fmadd_ps(v, v, squares);
	}
	r = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / (float) n + eps));
	for (int64_t i = 0; i < n; i += 16)
	{
		__mmask16	mask = first_lanes(n - i);
		__m512		v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean), r);

		if (w)
			v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, w + i));
		if (b)
			v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, b + i));
		_mm512_mask_storeu_ps(y + i, mask, v);
	}
}

/* e^x for x <= 88, towards 0 below.  Relative error below 2e-7. */
INLINE __m512
exp_16(__m512 x)
{
	__m512		n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
	__m512		r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);	/* ln 2 in two parts */
	__m512		p;

	r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
	p = _mm512_set1_ps(1.0f / 720);
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
	p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
	return _mm512_scalef_ps(p, n);
}

static void
store_f16(const MillmKvLayer *kv, int32_t page, int slot, const float *k, const float *v)
{
	const int	hd = kv->head_dim;
	uint16_t   *kp = (uint16_t *) (kv->k + page * kv->page_bytes) + slot;
	uint16_t   *vp = (uint16_t *) (kv->v + page * kv->page_bytes) + (int64_t) slot * hd;

	for (int h = 0; h < kv->n_kv_heads; h++, k += hd, v += hd, kp += hd * MILLM_KERNEL_PAGE, vp += hd * MILLM_KERNEL_PAGE)
		for (int d = 0; d < hd; d += 16)
		{
			__mmask16	mask = first_lanes(hd - d);
			uint16_t	column[16];

			_mm256_storeu_si256((__m256i *) column, _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, k + d), _MM_FROUND_TO_NEAREST_INT));
			for (int i = 0; i < 16 && d + i < hd; i++)
				kp[(d + i) * MILLM_KERNEL_PAGE] = column[i];
			_mm256_mask_storeu_epi16(vp + d, mask, _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, v + d), _MM_FROUND_TO_NEAREST_INT));
		}
}

/* A slot of a head: codes step apart, a scale for each block. */
INLINE void
store_int8_head(char *head, int first, int step, int slot, const float *x, int head_dim)
{
	const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FFFFFFF));
	int8_t	   *codes = (int8_t *) head + first;
	uint16_t   *scales = (uint16_t *) (head + head_dim * MILLM_KERNEL_PAGE) + slot;

	for (int d = 0; d < head_dim; d += MILLM_KV_BLOCK, scales += MILLM_KERNEL_PAGE)
	{
		const __m512 block = _mm512_maskz_loadu_ps(first_lanes(head_dim - d), x + d);
		const float largest = _mm512_reduce_max_ps(_mm512_and_ps(block, magnitude));
		const float nan = _mm512_reduce_add_ps(_mm512_mul_ps(block, _mm512_setzero_ps()));
		int8_t		column[MILLM_KV_BLOCK];
		float		scale;

		*scales = (uint16_t) _cvtss_sh(largest / 127 + nan, _MM_FROUND_TO_NEAREST_INT);
		scale = _cvtsh_ss(*scales);
		_mm_storeu_si128((__m128i *) column, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(block, _mm512_set1_ps(scale > 0 ? 1 / scale : 0)))));
		for (int i = 0; i < MILLM_KV_BLOCK && d + i < head_dim; i++)
			codes[(d + i) * step] = column[i];
	}
}

_Static_assert(MILLM_KV_BLOCK == 16, "a block is a vector");

static void
store_int8(const MillmKvLayer *kv, int32_t page, int slot, const float *k, const float *v)
{
	const int	hd = kv->head_dim;
	char	   *kp = kv->k + page * kv->page_bytes;
	char	   *vp = kv->v + page * kv->page_bytes;

	for (int h = 0; h < kv->n_kv_heads; h++, k += hd, v += hd, kp += kv->head_bytes, vp += kv->head_bytes)
	{
		store_int8_head(kp, slot, MILLM_KERNEL_PAGE, slot, k, hd);
		store_int8_head(vp, slot * hd, 1, slot, v, hd);
	}
}

/* The scales of a block of a head, one for each slot. */
INLINE __m512
scales_of(const char *head, int head_dim, int block)
{
	return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (head + (head_dim + 2 * block) * MILLM_KERNEL_PAGE)));
}

/* 16 elements of a page from i on; of INT8, without their scales. */
INLINE __m512
load_kv(const char *p, int64_t i, MillmDtype dtype, __mmask16 mask)
{
	if (dtype == MILLM_F16)
		return load_16(p, i, MILLM_F16, mask);
	return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(mask == 0xFFFF ? _mm_loadu_si128((const __m128i *) (p + i)) : _mm_maskz_loadu_epi8(mask, p + i)));
}

/*
 * Attention is done by n_heads (at most 4) query heads of one KV head at a time, which share every load of K and
 * V, and by blocks of n_pages (1 or 4) pages, which share the loads of q and the rescaling.
 * Scores of a page are one vector, because K lies transposed in its page.  Keys of INT8 are multiplied by their scales, of values the weights are.
 */
typedef struct Softmax
{
	float		max[4];
	float		sum[4];
} Softmax;

/* y [n_heads, head_dim] = y * rescale + weights . v, n_vectors * 16 dims from d on, a multiple of 16, the last vector masked. */
INLINE void
add_values(float *y, int n_heads, int d, int n_vectors, __mmask16 last, const MillmKvLayer *kv, const char *const *v, int n_pages,
		   int from, int to, float (*weight)[4 * MILLM_KERNEL_PAGE], const float *rescale, MillmDtype dtype)
{
	const int	hd = kv->head_dim;
	float		scaled[4][4][4 * MILLM_KERNEL_PAGE];	/* for a block, that is a vector, each: the weights, times the scales */
	__m512		out[4][4];

	if (dtype == MILLM_INT8)
		for (int u = 0; u < n_vectors; u++)
			for (int p = 0; p < n_pages; p++)
			{
				const __m512 scales = scales_of(v[p], hd, d / MILLM_KV_BLOCK + u);

				for (int g = 0; g < n_heads; g++)
					_mm512_storeu_ps(scaled[u][g] + p * MILLM_KERNEL_PAGE, _mm512_mul_ps(_mm512_loadu_ps(weight[g] + p * MILLM_KERNEL_PAGE), scales));
			}
	for (int g = 0; g < n_heads; g++)
		for (int u = 0; u < n_vectors; u++)
			out[g][u] = _mm512_mul_ps(_mm512_maskz_loadu_ps(u == n_vectors - 1 ? last : 0xFFFF, y + g * hd + d + 16 * u),
									  _mm512_set1_ps(rescale[g]));
	for (int p = 0; p < n_pages; p++)
	{
		int			begin = p == 0 ? from : 0;
		int			end = p == n_pages - 1 ? to : MILLM_KERNEL_PAGE - 1;

		for (int s = begin; s <= end; s++)
			for (int u = 0; u < n_vectors; u++)
			{
				__m512		vs = load_kv(v[p], (int64_t) s * hd + d + 16 * u, dtype, u == n_vectors - 1 ? last : 0xFFFF);

				for (int g = 0; g < n_heads; g++)
					out[g][u] = _mm512_fmadd_ps(_mm512_set1_ps((dtype == MILLM_INT8 ? scaled[u] : weight)[g][p * MILLM_KERNEL_PAGE + s]), vs, out[g][u]);
			}
	}
	for (int g = 0; g < n_heads; g++)
		for (int u = 0; u < n_vectors; u++)
			_mm512_mask_storeu_ps(y + g * hd + d + 16 * u, u == n_vectors - 1 ? last : 0xFFFF, out[g][u]);
}

/* 1 / (1 + e^-x) */
INLINE __m512
sigmoid_16(__m512 x)
{
	/* where one is NaN, max and min give their second operand: it passes */
	__m512		bounded = _mm512_max_ps(_mm512_set1_ps(-87), _mm512_sub_ps(_mm512_setzero_ps(), x));

	bounded = _mm512_min_ps(_mm512_set1_ps(87), bounded);
	return _mm512_div_ps(_mm512_set1_ps(1), _mm512_add_ps(_mm512_set1_ps(1), exp_16(bounded)));
}

/* cap tanh(x / cap), by tanh(z) = 2 sigmoid(2 z) - 1 */
INLINE __m512
softcap_16(__m512 x, float cap)
{
	__m512		s = sigmoid_16(_mm512_mul_ps(x, _mm512_set1_ps(2 / cap)));

	return _mm512_fmsub_ps(_mm512_set1_ps(2 * cap), s, _mm512_set1_ps(cap));
}

/* Pages pages[0 .. n_pages), of which slots from (of the first) to (of the last) count; bias: the first head's of the first slot, or NULL. */
INLINE void
attention_block(float *y, const float *q, int n_heads, const MillmKvLayer *kv, const int32_t *pages, int n_pages, int from, int to,
				int64_t head_offset, const float *bias, Softmax *softmax, MillmDtype dtype)
{
	const int	hd = kv->head_dim;
	const char *k[4],
			   *v[4];
	__m512		score[4][4];
	float		weight[4][4 * MILLM_KERNEL_PAGE];
	float		rescale[4];
	int			d;

	for (int p = 0; p < n_pages; p++)
	{
		k[p] = kv->k + pages[p] * kv->page_bytes + head_offset;
		v[p] = kv->v + pages[p] * kv->page_bytes + head_offset;
		for (int g = 0; g < n_heads; g++)
			score[g][p] = _mm512_setzero_ps();
	}
	for (d = 0; d < hd;)
	{
		const int	end = dtype == MILLM_INT8 && hd - d > MILLM_KV_BLOCK ? d + MILLM_KV_BLOCK : hd;
		__m512		scales[4];

		for (int p = 0; dtype == MILLM_INT8 && p < n_pages; p++)
			scales[p] = scales_of(k[p], hd, d / MILLM_KV_BLOCK);
		for (; d < end; d++)
		{
			__m512		qd[4];

			for (int g = 0; g < n_heads; g++)
				qd[g] = _mm512_set1_ps(q[g * hd + d]);
			for (int p = 0; p < n_pages; p++)
			{
				__m512		kd = load_kv(k[p], d * MILLM_KERNEL_PAGE, dtype, 0xFFFF);

				if (dtype == MILLM_INT8)
					kd = _mm512_mul_ps(kd, scales[p]);
				for (int g = 0; g < n_heads; g++)
					score[g][p] = _mm512_fmadd_ps(qd[g], kd, score[g][p]);
			}
		}
	}
	for (int g = 0; g < n_heads; g++)
	{
		__m512		max = _mm512_set1_ps(softmax->max[g]),
					sum = _mm512_setzero_ps();
		__mmask16	counts[4];
		float		block_max;

		for (int p = 0; p < n_pages; p++)
		{
			counts[p] = (p == n_pages - 1 ? first_lanes(to + 1) : 0xFFFF) & (p == 0 ? ~first_lanes(from) : 0xFFFF);
			score[g][p] = _mm512_mul_ps(score[g][p], _mm512_set1_ps(kv->scale));
			if (kv->softcap > 0)
				score[g][p] = softcap_16(score[g][p], kv->softcap);
			if (bias)
				score[g][p] = _mm512_add_ps(score[g][p], _mm512_loadu_ps(bias + g * kv->bias_stride + p * MILLM_KERNEL_PAGE));
			score[g][p] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), counts[p], score[g][p]);
			max = _mm512_max_ps(max, score[g][p]);
		}
		block_max = _mm512_reduce_max_ps(max);
		for (int p = 0; p < n_pages; p++)
		{
			/* a NaN stays one, whatever the maximum made of it, and so reaches the sum */
			__m512		e = _mm512_maskz_mov_ps(counts[p], exp_16(_mm512_sub_ps(score[g][p], _mm512_set1_ps(block_max))));

			sum = _mm512_add_ps(sum, e);
			_mm512_storeu_ps(weight[g] + p * MILLM_KERNEL_PAGE, e);
		}
		rescale[g] = expf(softmax->max[g] - block_max);
		softmax->max[g] = block_max;
		softmax->sum[g] = softmax->sum[g] * rescale[g] + _mm512_reduce_add_ps(sum);
	}
	for (d = 0; d + 64 <= hd; d += 64)
		add_values(y, n_heads, d, 4, 0xFFFF, kv, v, n_pages, from, to, weight, rescale, dtype);
	for (; d < hd; d += 16)
		add_values(y, n_heads, d, 1, first_lanes(hd - d), kv, v, n_pages, from, to, weight, rescale, dtype);
}

INLINE void
attention_heads(float *y, const float *q, int n_heads, int first_head, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int64_t head_offset,
				const float *bias, MillmDtype dtype)
{
	const int	hd = kv->head_dim;
	const int64_t first = kv->window > 0 && position >= kv->window ? position - kv->window + 1 : 0;
	const int64_t last_page = position / MILLM_KERNEL_PAGE;
	const int	to = (int) (position % MILLM_KERNEL_PAGE);
	int			from = (int) (first % MILLM_KERNEL_PAGE);
	Softmax		softmax;

	for (int g = 0; g < n_heads; g++)
	{
		softmax.max[g] = kv->sinks ? kv->sinks[first_head + g] : -INFINITY;
		softmax.sum[g] = kv->sinks ? 1 : 0;
	}
	memset(y, 0, sizeof(float) * (size_t) (n_heads * hd));
	for (int64_t p = first / MILLM_KERNEL_PAGE; p <= last_page; from = 0)
		if (last_page - p >= 3)
		{
			attention_block(y, q, n_heads, kv, pages + p, 4, from, p + 3 == last_page ? to : MILLM_KERNEL_PAGE - 1, head_offset,
							bias ? bias + p * MILLM_KERNEL_PAGE : NULL, &softmax, dtype);
			p += 4;
		}
		else
		{
			attention_block(y, q, n_heads, kv, pages + p, 1, from, p == last_page ? to : MILLM_KERNEL_PAGE - 1, head_offset,
							bias ? bias + p * MILLM_KERNEL_PAGE : NULL, &softmax, dtype);
			p++;
		}
	for (int g = 0; g < n_heads; g++)
		for (int d = 0; d < hd; d++)
			y[g * hd + d] /= softmax.sum[g];
}

INLINE void
attention(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head, MillmDtype dtype)
{
	const int64_t head_offset = kv_head * kv->head_bytes;

	for (int g = 0; g < kv->group;)
	{
		int			head = kv_head * kv->group + g;
		int64_t		at = (int64_t) head * kv->head_dim;
		int			n = kv->group - g;
		const float *bias = kv->bias ? kv->bias + (kv_head * kv->group + g) * kv->bias_stride : NULL;

		if (n >= 4)
			attention_heads(y + at, q + at, 4, head, kv, pages, position, head_offset, bias, dtype);
		else if (n == 3)
			attention_heads(y + at, q + at, 3, head, kv, pages, position, head_offset, bias, dtype);
		else if (n == 2)
			attention_heads(y + at, q + at, 2, head, kv, pages, position, head_offset, bias, dtype);
		else
			attention_heads(y + at, q + at, 1, head, kv, pages, position, head_offset, bias, dtype);
		g += n >= 4 ? 4 : n;
	}
}

static void
attention_f16(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head)
{
	attention(y, q, kv, pages, position, kv_head, MILLM_F16);
}

static void
attention_int8(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head)
{
	attention(y, q, kv, pages, position, kv_head, MILLM_INT8);
}

INLINE __m512
silu_16(__m512 x)
{
	return _mm512_mul_ps(x, sigmoid_16(x));
}

/* tanh(z) = 2 sigmoid(2 z) - 1, so the whole is x sigmoid(2 z) */
INLINE __m512
gelu_tanh_16(__m512 x)
{
	__m512		cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
	__m512		z2 = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cubed, x));

	return _mm512_mul_ps(x, sigmoid_16(z2));
}

#define UNARY(name) \
static void \
name(float *y, const float *x, const float *up, int64_t n) \
{ \
	for (int64_t i = 0; i < n; i += 16) \
	{ \
		__mmask16	mask = first_lanes(n - i); \
		__m512		f = name##_16(_mm512_maskz_loadu_ps(mask, x + i)); \
\
		_mm512_mask_storeu_ps(y + i, mask, up ? _mm512_mul_ps(f, _mm512_maskz_loadu_ps(mask, up + i)) : f); \
	} \
}
UNARY(silu)
UNARY(gelu_tanh)

static void
softcap(float *x, float cap, int64_t n)
{
	for (int64_t i = 0; i < n; i += 16)
	{
		__mmask16	mask = first_lanes(n - i);

		_mm512_mask_storeu_ps(x + i, mask, softcap_16(_mm512_maskz_loadu_ps(mask, x + i), cap));
	}
}

void
millm_kernels_avx512(MillmKernels *k, unsigned cpu)
{
	k->variant = "avx512";
	k->kv[MILLM_KV_AUTO] = (MillmKvKernels) {MILLM_F16, store_f16, attention_f16};
	k->kv[MILLM_KV_INT8] = (MillmKvKernels) {MILLM_INT8, store_int8, attention_int8};
	k->matmul[MILLM_FORM_F32][MILLM_F32][0] = rows_f32;
	k->matmul[MILLM_FORM_F32][MILLM_F32][1] = columns_f32;
	k->matmul[MILLM_FORM_F32][MILLM_F16][0] = rows_f16;
	k->matmul[MILLM_FORM_F32][MILLM_F16][1] = columns_f16;
	k->matmul[MILLM_FORM_F32][MILLM_BF16][0] = rows_bf16;
	k->matmul[MILLM_FORM_F32][MILLM_BF16][1] = columns_bf16;
	if (cpu & MILLM_CPU_AVX512_BF16)
	{
		k->matmul[MILLM_FORM_BF16][MILLM_BF16][0] = millm_avx512_bf16_form;
		k->pack[MILLM_FORM_BF16] = pack_bf16;
	}
	millm_kernels_avx512_quant(k, cpu);
	k->rms_norm = rms_norm;
	k->layer_norm = layer_norm;
	k->unary[MILLM_UNARY_SILU] = silu;
	k->unary[MILLM_UNARY_GELU_TANH] = gelu_tanh;
	k->softcap = softcap;
}
#endif
