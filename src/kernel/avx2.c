/*
 * avx2.c -- kernels for CPUs with AVX2, FMA and F16C.
 *
 * A dot product runs in four vectors of eight partial sums, chunk after chunk of 32 weights, then the
 * chunks of 8 that are left, then what is less than a vector; tiles of several tokens keep that order for
 * each of them.  The KV cache is float16.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx2.h"

#include <math.h>
#include <string.h>

#include "half.h"

#define TOKENS 3				/* of a tile: 3 x 4 sums and a weight fit 16 registers */

INLINE __m256
load_8(const char *p, int64_t i, MillmDtype dtype)
{
	if (dtype == MILLM_F32)
		return _mm256_loadu_ps((const float *) (p + i * 4));
	if (dtype == MILLM_F16)
		return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + i * 2)));
	return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) (p + i * 2))), 16));
}

INLINE float
load_1(const char *p, int64_t i, MillmDtype dtype)
{
	float		f;
	uint16_t	h;

	if (dtype == MILLM_F32)
	{
		memcpy(&f, p + i * 4, sizeof(f));
		return f;
	}
	memcpy(&h, p + i * 2, sizeof(h));
	return dtype == MILLM_F16 ? millm_f16_to_f32(h) : millm_bf16_to_f32(h);
}

/* n_tokens dot products with one row of weights. */
INLINE void
dot_tile(const MillmMatmul *m, int64_t t, int n_tokens, int64_t o, MillmDtype dtype, bool prefetch)
{
	const char *w = millm_weight_row(m->w, o);
	const int	bytes = dtype == MILLM_F32 ? 4 : 2;
	const int64_t n = m->w->n_in;
	const float *x[TOKENS];
	__m256		acc[TOKENS][4];
	int64_t		i = 0;

	for (int j = 0; j < n_tokens; j++)
	{
		x[j] = (const float *) ((const char *) m->x + (t + j) * m->x_stride);
		for (int u = 0; u < 4; u++)
			acc[j][u] = _mm256_setzero_ps();
	}
	for (; i + 32 <= n; i += 32)
	{
		if (prefetch)
			for (int line = 0; line < 32 * bytes; line += 64)
				prefetch_ahead(w + i * bytes + line);
		for (int u = 0; u < 4; u++)
		{
			__m256		v = load_8(w, i + 8 * u, dtype);

			for (int j = 0; j < n_tokens; j++)
				acc[j][u] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x[j] + i + 8 * u), acc[j][u]);
		}
	}
	for (; i + 8 <= n; i += 8)
	{
		__m256		v = load_8(w, i, dtype);

		for (int j = 0; j < n_tokens; j++)
			acc[j][0] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x[j] + i), acc[j][0]);
	}
	for (int j = 0; j < n_tokens; j++)
	{
		float		sum = sum_8(_mm256_add_ps(_mm256_add_ps(acc[j][0], acc[j][1]), _mm256_add_ps(acc[j][2], acc[j][3])));

		for (int64_t k = i; k < n; k++)
			sum = fmaf(load_1(w, k, dtype), x[j][k], sum);
		finish(m, t + j, o, sum);
	}
}

/* w [n_out, n_in].  The range's rows pass once for each few tokens: they lie in the L2 cache then. */
INLINE void
matmul_rows(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	for (int t = 0; t < m->n_tokens; t += TOKENS)
	{
		int			n = m->n_tokens - t;

		if (n >= 3)
			for (int64_t o = begin; o < end; o++)
				dot_tile(m, t, 3, o, dtype, t == 0);
		else if (n == 2)
			for (int64_t o = begin; o < end; o++)
				dot_tile(m, t, 2, o, dtype, t == 0);
		else
			for (int64_t o = begin; o < end; o++)
				dot_tile(m, t, 1, o, dtype, t == 0);
	}
}

/* n_vectors * 8 outputs of one token: each weight row's piece is read once. */
INLINE void
column_tile(const MillmMatmul *m, int64_t t, int64_t o, int n_vectors, MillmDtype dtype)
{
	const float *x = (const float *) ((const char *) m->x + t * m->x_stride);
	const int	bytes = dtype == MILLM_F32 ? 4 : 2;
	const int64_t row_bytes = m->w->stride * bytes;
	const char *w = (const char *) m->w->data;
	__m256		acc[8];

	for (int u = 0; u < n_vectors; u++)
		acc[u] = _mm256_setzero_ps();
	for (int64_t i = 0; i < m->w->n_in; i++, w += row_bytes)
	{
		__m256		xi = _mm256_set1_ps(x[i]);

		for (int line = 0; line < n_vectors * 8 * bytes; line += 64)
			_mm_prefetch(w + o * bytes + line + 8 * row_bytes, _MM_HINT_T0);
		for (int u = 0; u < n_vectors; u++)
			acc[u] = _mm256_fmadd_ps(xi, load_8(w, o + 8 * u, dtype), acc[u]);
	}
	for (int u = 0; u < n_vectors; u++)
	{
		float		sums[8];

		_mm256_storeu_ps(sums, acc[u]);
		for (int l = 0; l < 8; l++)
			finish(m, t, o + 8 * u + l, sums[l]);
	}
}

/* w [n_in, n_out]: every output is one sum over n_in, in order, fused. */
INLINE void
matmul_columns(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	for (int64_t o = begin; o < end;)
	{
		int			step = end - o >= 64 ? 64 : end - o >= 8 ? 8 : 1;

		for (int t = 0; t < m->n_tokens; t++)
			if (step == 64)
				column_tile(m, t, o, 8, dtype);
			else if (step == 8)
				column_tile(m, t, o, 1, dtype);
			else
			{
				const float *x = (const float *) ((const char *) m->x + t * m->x_stride);
				float		sum = 0;

				for (int64_t i = 0; i < m->w->n_in; i++)
					sum = fmaf(x[i], load_1(millm_weight_row(m->w, i), o, dtype), sum);
				finish(m, t, o, sum);
			}
		o += step;
	}
}

#define MATMUL(name, dtype) \
static void rows_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul_rows(m, begin, end, dtype); } \
static void columns_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul_columns(m, begin, end, dtype); }
MATMUL(f32, MILLM_F32)
MATMUL(f16, MILLM_F16)
MATMUL(bf16, MILLM_BF16)

void
millm_avx2_f32_rows(const MillmMatmul *m, int64_t begin, int64_t end)
{
	rows_f32(m, begin, end);
}

static void
rms_norm(float *y, const float *x, const float *w, float eps, int64_t n)
{
	__m256		squares = _mm256_setzero_ps();
	float		sum,
				r;
	int64_t		i;

	for (i = 0; i + 8 <= n; i += 8)
	{
		__m256		v = _mm256_loadu_ps(x + i);

		squares = _mm256_fmadd_ps(v, v, squares);
	}
	sum = sum_8(squares);
	for (; i < n; i++)
		sum += x[i] * x[i];
	r = 1 / sqrtf(sum / (float) n + eps);
	for (i = 0; i + 8 <= n; i += 8)
		_mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(w + i), _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(r))));
	for (; i < n; i++)
		y[i] = w[i] * (x[i] * r);
}

/* e^x for x <= 88; below -87 it is 0.  Relative error below 2e-7. */
INLINE __m256
exp_8(__m256 x)
{
	__m256		is_tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
	__m256		n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
	__m256		r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);	/* ln 2 in two parts */
	__m256		p;

	r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
	p = _mm256_set1_ps(1.0f / 720);
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
	p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
	p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
	return _mm256_andnot_ps(is_tiny, p);
}

static void
store_f16(const MillmKvLayer *kv, int32_t page, int slot, const float *k, const float *v)
{
	const int	hd = kv->head_dim;
	uint16_t   *kp = (uint16_t *) (kv->k + page * kv->page_bytes) + slot;
	uint16_t   *vp = (uint16_t *) (kv->v + page * kv->page_bytes) + (int64_t) slot * hd;

	for (int h = 0; h < kv->n_kv_heads; h++, k += hd, v += hd, kp += hd * MILLM_KERNEL_PAGE, vp += hd * MILLM_KERNEL_PAGE)
		for (int d = 0; d < hd; d++)
		{
			kp[d * MILLM_KERNEL_PAGE] = (uint16_t) _cvtss_sh(k[d], _MM_FROUND_TO_NEAREST_INT);
			vp[d] = (uint16_t) _cvtss_sh(v[d], _MM_FROUND_TO_NEAREST_INT);
		}
}

/* 1 / (1 + e^-x) */
INLINE __m256
sigmoid_8(__m256 x)
{
	/* where one is NaN, max and min give their second operand: it passes */
	__m256		bounded = _mm256_max_ps(_mm256_set1_ps(-87), _mm256_sub_ps(_mm256_setzero_ps(), x));

	bounded = _mm256_min_ps(_mm256_set1_ps(87), bounded);
	return _mm256_div_ps(_mm256_set1_ps(1), _mm256_add_ps(_mm256_set1_ps(1), exp_8(bounded)));
}

/* cap tanh(x / cap), by tanh(z) = 2 sigmoid(2 z) - 1 */
INLINE __m256
softcap_8(__m256 x, float cap)
{
	__m256		s = sigmoid_8(_mm256_mul_ps(x, _mm256_set1_ps(2 / cap)));

	return _mm256_fmsub_ps(_mm256_set1_ps(2 * cap), s, _mm256_set1_ps(cap));
}

/* Eight elements of a page from i on, or one; of INT8, without their scales. */
INLINE __m256
load_kv_8(const char *p, int64_t i, MillmDtype dtype)
{
	return dtype == MILLM_INT8 ? _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (p + i)))) : load_8(p, i, MILLM_F16);
}

INLINE float
load_kv_1(const char *p, int64_t i, MillmDtype dtype)
{
	return dtype == MILLM_INT8 ? (float) ((const int8_t *) p)[i] : load_1(p, i, MILLM_F16);
}

/* The scales of eight slots of a block of a head, from this slot on. */
INLINE __m256
scales_of(const char *head, int head_dim, int block, int slot)
{
	return load_8(head + head_dim * MILLM_KERNEL_PAGE, block * MILLM_KERNEL_PAGE + slot, MILLM_F16);
}

/* Add the values of one page, weighted, to y [head_dim]: y = y * rescale + sum_s weight[s] v[s]. */
INLINE void
add_values(float *y, const char *v, int hd, const float *weight, int from, int to, float rescale, MillmDtype dtype)
{
	float		scaled[MILLM_KERNEL_PAGE];	/* the weights, times the scales of a block */

	for (int d = 0; d < hd;)
	{
		const int	end = dtype == MILLM_INT8 && hd - d > MILLM_KV_BLOCK ? d + MILLM_KV_BLOCK : hd;
		const float *w = weight;

		if (dtype == MILLM_INT8)
		{
			_mm256_storeu_ps(scaled, _mm256_mul_ps(_mm256_loadu_ps(weight), scales_of(v, hd, d / MILLM_KV_BLOCK, 0)));
			_mm256_storeu_ps(scaled + 8, _mm256_mul_ps(_mm256_loadu_ps(weight + 8), scales_of(v, hd, d / MILLM_KV_BLOCK, 8)));
			w = scaled;
		}
		for (; d + 8 <= end; d += 8)
		{
			__m256		sum = _mm256_mul_ps(_mm256_loadu_ps(y + d), _mm256_set1_ps(rescale));

			for (int s = from; s <= to; s++)
				sum = _mm256_fmadd_ps(_mm256_set1_ps(w[s]), load_kv_8(v, (int64_t) s * hd + d, dtype), sum);
			_mm256_storeu_ps(y + d, sum);
		}
		for (; d < end; d++)
		{
			float		sum = y[d] * rescale;

			for (int s = from; s <= to; s++)
				sum += w[s] * load_kv_1(v, (int64_t) s * hd + d, dtype);
			y[d] = sum;
		}
	}
}

INLINE void
attention(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head, MillmDtype dtype)
{
	const int	hd = kv->head_dim;
	const int64_t head_offset = kv_head * kv->head_bytes;
	const int64_t first = kv->window > 0 && position >= kv->window ? position - kv->window + 1 : 0;

	for (int g = 0; g < kv->group; g++)
	{
		const float *qh = q + (int64_t) (kv_head * kv->group + g) * hd;
		float	   *yh = y + (int64_t) (kv_head * kv->group + g) * hd;
		float		max = kv->sinks ? kv->sinks[kv_head * kv->group + g] : -INFINITY,
					sum = kv->sinks ? 1 : 0;

		memset(yh, 0, sizeof(float) * (size_t) hd);
		for (int64_t p = first / MILLM_KERNEL_PAGE; p * MILLM_KERNEL_PAGE <= position; p++)
		{
			const char *k = kv->k + pages[p] * kv->page_bytes + head_offset;
			const char *v = kv->v + pages[p] * kv->page_bytes + head_offset;
			int64_t		base = p * MILLM_KERNEL_PAGE;
			int			from = (int) (first > base ? first - base : 0);
			int			to = (int) (position - base < MILLM_KERNEL_PAGE - 1 ? position - base : MILLM_KERNEL_PAGE - 1);
			__m256		low = _mm256_setzero_ps(),
						high = _mm256_setzero_ps();
			float		score[MILLM_KERNEL_PAGE];
			float		page_max = max,
						rescale;

			for (int d = 0; d < hd;)
			{
				const int	end = dtype == MILLM_INT8 && hd - d > MILLM_KV_BLOCK ? d + MILLM_KV_BLOCK : hd;
				__m256		of_block = low,	/* of INT8, before their scales */
							of_block_high = high;

				if (dtype == MILLM_INT8)
					of_block = of_block_high = _mm256_setzero_ps();
				for (int i = d; i < end; i++)
				{
					__m256		qd = _mm256_set1_ps(qh[i]);

					of_block = _mm256_fmadd_ps(qd, load_kv_8(k, i * MILLM_KERNEL_PAGE, dtype), of_block);
					of_block_high = _mm256_fmadd_ps(qd, load_kv_8(k, i * MILLM_KERNEL_PAGE + 8, dtype), of_block_high);
				}
				low = dtype == MILLM_INT8 ? _mm256_fmadd_ps(of_block, scales_of(k, hd, d / MILLM_KV_BLOCK, 0), low) : of_block;
				high = dtype == MILLM_INT8 ? _mm256_fmadd_ps(of_block_high, scales_of(k, hd, d / MILLM_KV_BLOCK, 8), high) : of_block_high;
				d = end;
			}
			low = _mm256_mul_ps(low, _mm256_set1_ps(kv->scale));
			high = _mm256_mul_ps(high, _mm256_set1_ps(kv->scale));
			if (kv->softcap > 0)
			{
				low = softcap_8(low, kv->softcap);
				high = softcap_8(high, kv->softcap);
			}
			if (kv->bias)
			{
				const float *bias = kv->bias + (kv_head * kv->group + g) * kv->bias_stride + base;

				low = _mm256_add_ps(low, _mm256_loadu_ps(bias));
				high = _mm256_add_ps(high, _mm256_loadu_ps(bias + 8));
			}
			_mm256_storeu_ps(score, low);
			_mm256_storeu_ps(score + 8, high);
			for (int s = from; s <= to; s++)
				if (!(score[s] <= page_max))	/* a NaN is taken along: it must reach the output */
					page_max = score[s];
			rescale = expf(max - page_max);
			max = page_max;
			_mm256_storeu_ps(score, exp_8(_mm256_sub_ps(_mm256_loadu_ps(score), _mm256_set1_ps(max))));
			_mm256_storeu_ps(score + 8, exp_8(_mm256_sub_ps(_mm256_loadu_ps(score + 8), _mm256_set1_ps(max))));
			sum *= rescale;
			for (int s = from; s <= to; s++)
				sum += score[s];
			add_values(yh, v, hd, score, from, to, rescale, dtype);
		}
		for (int d = 0; d < hd; d++)
			yh[d] /= sum;
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

INLINE __m256
silu_8(__m256 x)
{
	return _mm256_mul_ps(x, sigmoid_8(x));
}

/* tanh(z) = 2 sigmoid(2 z) - 1, so the whole is x sigmoid(2 z) */
INLINE __m256
gelu_tanh_8(__m256 x)
{
	__m256		cubed = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
	__m256		z2 = _mm256_mul_ps(_mm256_set1_ps(1.5957691216f), _mm256_fmadd_ps(_mm256_set1_ps(0.044715f), cubed, x));

	return _mm256_mul_ps(x, sigmoid_8(z2));
}

#define UNARY(name) \
static void \
name(float *y, const float *x, const float *up, int64_t n) \
{ \
	float		tail[8] = {0}; \
	int64_t		i; \
\
	for (i = 0; i + 8 <= n; i += 8) \
	{ \
		__m256		f = name##_8(_mm256_loadu_ps(x + i)); \
\
		_mm256_storeu_ps(y + i, up ? _mm256_mul_ps(f, _mm256_loadu_ps(up + i)) : f); \
	} \
	if (i == n) \
		return; \
	memcpy(tail, x + i, sizeof(float) * (size_t) (n - i)); \
	_mm256_storeu_ps(tail, name##_8(_mm256_loadu_ps(tail))); \
	for (int64_t k = i; k < n; k++) \
		y[k] = up ? tail[k - i] * up[k] : tail[k - i]; \
}
UNARY(silu)
UNARY(gelu_tanh)

static void
softcap(float *x, float cap, int64_t n)
{
	float		tail[8] = {0};
	int64_t		i;

	for (i = 0; i + 8 <= n; i += 8)
		_mm256_storeu_ps(x + i, softcap_8(_mm256_loadu_ps(x + i), cap));
	if (i == n)
		return;
	memcpy(tail, x + i, sizeof(float) * (size_t) (n - i));
	_mm256_storeu_ps(tail, softcap_8(_mm256_loadu_ps(tail), cap));
	memcpy(x + i, tail, sizeof(float) * (size_t) (n - i));
}

void
millm_kernels_avx2(MillmKernels *k)
{
	k->variant = "avx2";
	k->kv[MILLM_KV_AUTO] = (MillmKvKernels) {MILLM_F16, store_f16, attention_f16};
	k->kv[MILLM_KV_INT8].attention = attention_int8;
	k->matmul[MILLM_FORM_F32][MILLM_F32][0] = rows_f32;
	k->matmul[MILLM_FORM_F32][MILLM_F32][1] = columns_f32;
	k->matmul[MILLM_FORM_F32][MILLM_F16][0] = rows_f16;
	k->matmul[MILLM_FORM_F32][MILLM_F16][1] = columns_f16;
	k->matmul[MILLM_FORM_F32][MILLM_BF16][0] = rows_bf16;
	k->matmul[MILLM_FORM_F32][MILLM_BF16][1] = columns_bf16;
	millm_kernels_avx2_quant(k);
	k->rms_norm = rms_norm;
	k->unary[MILLM_UNARY_SILU] = silu;
	k->unary[MILLM_UNARY_GELU_TANH] = gelu_tanh;
	k->softcap = softcap;
}
#endif
