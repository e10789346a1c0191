/*
 * ref.c -- every kernel in portable C: the complete table, and the measure of the others.
 *
 * Sums run in LANES interleaved partial sums, which a compiler can keep in vectors on any machine and
 * which lose less than one running sum does.  The KV cache is float32.
 */
#include "kernel.h"

#include <math.h>
#include <string.h>

#include "half.h"

#define LANES 16
#define TILE 4					/* tokens that share one reading of a weight */

static inline __attribute__((always_inline)) float
element(const char *p, int64_t i, MillmDtype dtype)
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

static inline void
finish(const MillmMatmul *m, int t, int64_t o, float sum)
{
	float	   *y = m->y + t * m->y_stride + o;

	if (m->row_scale)
		sum *= m->row_scale[o];
	if (m->bias)
		sum += m->bias[o];
	*y = m->accumulate ? *y + sum : sum;
}

/* w [n_out, n_in]: dot products. */
static inline __attribute__((always_inline)) void
matmul_rows(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	const int64_t n = m->w->n_in;

	for (int64_t o = begin; o < end; o++)
	{
		const char *w = millm_weight_row(m->w, o);

		for (int t = 0; t < m->n_tokens; t += TILE)
		{
			int			n_tile = m->n_tokens - t < TILE ? m->n_tokens - t : TILE;
			float		acc[TILE][LANES] = {{0}};
			const float *x[TILE];
			int64_t		i;

			for (int j = 0; j < TILE; j++)	/* a short tile computes its last token again */
				x[j] = (const float *) ((const char *) m->x + (t + (j < n_tile ? j : n_tile - 1)) * m->x_stride);
			for (i = 0; i + LANES <= n; i += LANES)
			{
				float		v[LANES];

				for (int l = 0; l < LANES; l++)
					v[l] = element(w, i + l, dtype);
				for (int j = 0; j < TILE; j++)
					for (int l = 0; l < LANES; l++)
						acc[j][l] += v[l] * x[j][i + l];
			}
			for (int j = 0; j < n_tile; j++)
			{
				float		sum = 0;

				for (int64_t k = i; k < n; k++)
					acc[j][k - i] += element(w, k, dtype) * x[j][k];
				for (int l = 0; l < LANES; l++)
					sum += acc[j][l];
				finish(m, t + j, o, sum);
			}
		}
	}
}

/* ---- quantized weights ---- */

static inline float
float_at(const void *p, int64_t i)
{
	float		f;

	memcpy(&f, (const char *) p + i * 4, sizeof(f));
	return f;
}

/* The scale of a 4-bit block.  Product and sum are rounded one after the other: two statements, so that none is fused. */
static float
block_scale(const MillmWeight *w, int64_t block)
{
	float		scale;

	if (w->nested_block_size == 0)
		return float_at(w->absmax, block);
	scale = w->nested_map[((const uint8_t *) w->absmax)[block]];
	scale *= float_at(w->nested_absmax, block / w->nested_block_size);
	scale += w->nested_offset;
	return scale;
}

static void
decode_4bit(float *y, const MillmWeight *w, int64_t first, int64_t n)
{
	const uint8_t *data = w->data;

	for (int64_t e = first; e < first + n;)
	{
		int64_t		block = e / w->block_size;
		int64_t		end = (block + 1) * w->block_size < first + n ? (block + 1) * w->block_size : first + n;
		float		scale = block_scale(w, block);

		for (; e < end; e++, y++)
		{
			*y = w->codebook[e % 2 == 0 ? data[e / 2] >> 4 : data[e / 2] & 15] * scale;
			if (w->rounded == MILLM_BF16)
				*y = millm_bf16_to_f32(millm_f32_to_bf16(*y));
			else if (w->rounded == MILLM_F16)
				*y = millm_f16_to_f32(millm_f32_to_f16(*y));
		}
	}
}

static void
decode_mxfp4(float *y, const MillmWeight *w, int64_t first, int64_t n)
{
	static const float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
	const uint8_t *data = w->data, *scale = w->scale;

	for (int64_t e = first; e < first + n; e++)
		*y++ = ldexpf(values[e % 2 == 0 ? data[e / 2] & 15 : data[e / 2] >> 4], scale[e / 32] - 127);
}

void
millm_weight_decode(float *y, const MillmWeight *w, int64_t o, int64_t i, int64_t n)
{
	if (w->dtype == MILLM_MXFP4)
	{
		decode_mxfp4(y, w, o * w->n_in + i, n);
		return;
	}
	if (w->dtype == MILLM_4BIT)
		decode_4bit(y, w, w->first + o * w->n_in + i, n);
	else if (w->dtype == MILLM_INT8)
	{
		const int8_t *q = (const int8_t *) w->data + o * w->n_in + i;
		float		scb = float_at(w->scale, o);

		for (int64_t j = 0; j < n; j++)
		{
			y[j] = (float) q[j] * scb;
			y[j] *= 0.007874015718698502f;	/* 1 / 127, bitsandbytes' */
		}
	}
	else
		for (int64_t j = 0; j < n; j++)
			y[j] = element(millm_weight_row(w, o), i + j, w->dtype);
}

/* Each row is decoded once for every few tokens, piece by piece. */
void
millm_matmul_decoded(const MillmMatmul *m, int64_t begin, int64_t end)
{
	enum {TOKENS = 16, PIECE = 512};
	const int64_t n = m->w->n_in;

	for (int64_t o = begin; o < end; o++)
		for (int t = 0; t < m->n_tokens; t += TOKENS)
		{
			int			n_tile = m->n_tokens - t < TOKENS ? m->n_tokens - t : TOKENS;
			float		acc[TOKENS][LANES] = {{0}};
			float		v[PIECE];

			for (int64_t i = 0; i < n; i += PIECE)
			{
				int			n_piece = (int) (n - i < PIECE ? n - i : PIECE);

				millm_weight_decode(v, m->w, o, i, n_piece);
				for (int j = 0; j < n_tile; j++)
				{
					const float *x = (const float *) ((const char *) m->x + (t + j) * m->x_stride) + i;

					for (int l = 0; l < n_piece; l++)
						acc[j][l % LANES] += v[l] * x[l];
				}
			}
			for (int j = 0; j < n_tile; j++)
			{
				float		sum = 0;

				for (int l = 0; l < LANES; l++)
					sum += acc[j][l];
				finish(m, t + j, o, sum);
			}
		}
}

/* w [n_in, n_out]: a block of outputs at a time, row after row. */
static inline __attribute__((always_inline)) void
matmul_columns(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	enum {BLOCK = 64};

	for (int t = 0; t < m->n_tokens; t++)
	{
		const float *x = (const float *) ((const char *) m->x + t * m->x_stride);

		for (int64_t o = begin; o < end; o += BLOCK)
		{
			int			n = (int) (end - o < BLOCK ? end - o : BLOCK);
			float		acc[BLOCK] = {0};

			for (int64_t i = 0; i < m->w->n_in; i++)
			{
				const char *w = millm_weight_row(m->w, i);

				for (int j = 0; j < n; j++)
					acc[j] += x[i] * element(w, o + j, dtype);
			}
			for (int j = 0; j < n; j++)
				finish(m, t, o + j, acc[j]);
		}
	}
}

#define MATMUL(name, dtype) \
static void rows_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul_rows(m, begin, end, dtype); } \
static void columns_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul_columns(m, begin, end, dtype); }
MATMUL(f32, MILLM_F32)
MATMUL(f16, MILLM_F16)
MATMUL(bf16, MILLM_BF16)

static MillmForm
best_form(const MillmWeight *w, int n_tokens)
{
	(void) w;
	(void) n_tokens;
	return MILLM_FORM_F32;
}

static MillmForm
fixed_form(const MillmWeight *w)
{
	(void) w;
	return MILLM_FORM_F32;
}

static void
rms_norm(float *y, const float *x, const float *w, float eps, int64_t n)
{
	double		sum = 0;
	float		r;

	for (int64_t i = 0; i < n; i++)
		sum += (double) x[i] * x[i];
	r = (float) (1 / sqrt(sum / (double) n + eps));
	for (int64_t i = 0; i < n; i++)
		y[i] = w[i] * (x[i] * r);
}

static void
layer_norm(float *y, const float *x, const float *w, const float *b, float eps, int64_t n)
{
	double		sum = 0,
				squares = 0;
	float		mean,
				r;

	for (int64_t i = 0; i < n; i++)
		sum += x[i];
	mean = (float) (sum / (double) n);
	for (int64_t i = 0; i < n; i++)
		squares += (double) (x[i] - mean) * (x[i] - mean);
	r = (float) (1 / sqrt(squares / (double) n + eps));
	for (int64_t i = 0; i < n; i++)
	{
		float		v = (x[i] - mean) * r;

		if (w)
			v *= w[i];
		y[i] = b ? v + b[i] : v;
	}
}

static void
rope(float *x, int n_heads, int head_dim, int n_pairs, bool interleaved, const float *cosine, const float *sine)
{
	const int	first = interleaved ? 2 : 1;	/* distance between the first members of two pairs */
	const int	second = interleaved ? 1 : n_pairs; /* distance within a pair */

	for (int h = 0; h < n_heads; h++, x += head_dim)
		for (int j = 0; j < n_pairs; j++)
		{
			float		a = x[first * j],
						b = x[first * j + second];

			x[first * j] = a * cosine[j] - b * sine[j];
			x[first * j + second] = b * cosine[j] + a * sine[j];
		}
}

/* Element i, which is dim d of the position in this slot, of a head in a page. */
static float
element_of(const char *head, MillmDtype dtype, int head_dim, int i, int slot, int d)
{
	const uint16_t *scales = (const uint16_t *) (head + head_dim * MILLM_KERNEL_PAGE);

	return dtype == MILLM_F32 ? ((const float *) head)[i] :
		(float) ((const int8_t *) head)[i] * millm_f16_to_f32(scales[d / MILLM_KV_BLOCK * MILLM_KERNEL_PAGE + slot]);
}

static void
store_f32(const MillmKvLayer *kv, int32_t page, int slot, const float *k, const float *v)
{
	const int64_t head = (int64_t) kv->head_dim * MILLM_KERNEL_PAGE;
	float	   *kp = (float *) (kv->k + page * kv->page_bytes);
	float	   *vp = (float *) (kv->v + page * kv->page_bytes);

	for (int h = 0; h < kv->n_kv_heads; h++)
		for (int d = 0; d < kv->head_dim; d++)
		{
			kp[h * head + d * MILLM_KERNEL_PAGE + slot] = k[h * kv->head_dim + d];
			vp[h * head + slot * kv->head_dim + d] = v[h * kv->head_dim + d];
		}
}

/* A slot of a head: codes step apart, a scale for each block.  A NaN or infinity makes its block NaN, which attention must not hide. */
static void
store_int8_head(char *head, int first, int step, int slot, const float *x, int head_dim)
{
	int8_t	   *codes = (int8_t *) head + first;
	uint16_t   *scales = (uint16_t *) (head + head_dim * MILLM_KERNEL_PAGE) + slot;

	for (int begin = 0; begin < head_dim; begin += MILLM_KV_BLOCK, scales += MILLM_KERNEL_PAGE)
	{
		const int	end = begin + MILLM_KV_BLOCK < head_dim ? begin + MILLM_KV_BLOCK : head_dim;
		float		largest = 0,
					nan = 0;
		float		scale;

		for (int d = begin; d < end; d++)
		{
			largest = fmaxf(largest, fabsf(x[d]));
			nan += x[d] * 0;
		}
		*scales = millm_f32_to_f16(largest / 127 + nan);
		scale = millm_f16_to_f32(*scales);
		for (int d = begin; d < end; d++)
		{
			const float code = scale > 0 ? rintf(x[d] * (1 / scale)) : 0;

			codes[d * step] = (int8_t) (code > 127 ? 127 : code < -128 ? -128 : code);
		}
	}
}

static void
store_int8(const MillmKvLayer *kv, int32_t page, int slot, const float *k, const float *v)
{
	for (int h = 0; h < kv->n_kv_heads; h++)
	{
		store_int8_head(kv->k + page * kv->page_bytes + h * kv->head_bytes, slot, MILLM_KERNEL_PAGE, slot, k + h * kv->head_dim, kv->head_dim);
		store_int8_head(kv->v + page * kv->page_bytes + h * kv->head_bytes, slot * kv->head_dim, 1, slot, v + h * kv->head_dim, kv->head_dim);
	}
}

static inline __attribute__((always_inline)) void
attention(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head, MillmDtype dtype)
{
	const int	hd = kv->head_dim;
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
			const char *k = kv->k + pages[p] * kv->page_bytes + kv_head * kv->head_bytes;
			const char *v = kv->v + pages[p] * kv->page_bytes + kv_head * kv->head_bytes;
			int64_t		base = p * MILLM_KERNEL_PAGE;
			int			from = (int) (first > base ? first - base : 0);
			int			to = (int) (position - base < MILLM_KERNEL_PAGE - 1 ? position - base : MILLM_KERNEL_PAGE - 1);
			float		score[MILLM_KERNEL_PAGE] = {0};
			float		page_max = max,
						rescale;

			for (int d = 0; d < hd; d++)
				for (int s = from; s <= to; s++)
					score[s] += qh[d] * element_of(k, dtype, hd, d * MILLM_KERNEL_PAGE + s, s, d);
			for (int s = from; s <= to; s++)
			{
				score[s] *= kv->scale;
				if (kv->softcap > 0)
					score[s] = kv->softcap * tanhf(score[s] / kv->softcap);
				if (kv->bias)
					score[s] += kv->bias[(kv_head * kv->group + g) * kv->bias_stride + base + s];
				if (!(score[s] <= page_max))	/* a NaN is taken along: it must reach the output */
					page_max = score[s];
			}
			rescale = expf(max - page_max);
			max = page_max;
			sum *= rescale;
			for (int d = 0; d < hd; d++)
				yh[d] *= rescale;
			for (int s = from; s <= to; s++)
			{
				float		weight = expf(score[s] - max);

				sum += weight;
				for (int d = 0; d < hd; d++)
					yh[d] += weight * element_of(v, dtype, hd, s * hd + d, s, d);
			}
		}
		for (int d = 0; d < hd; d++)
			yh[d] /= sum;
	}
}

static void
attention_f32(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head)
{
	attention(y, q, kv, pages, position, kv_head, MILLM_F32);
}

static void
attention_int8(float *y, const float *q, const MillmKvLayer *kv, const int32_t *pages, int64_t position, int kv_head)
{
	attention(y, q, kv, pages, position, kv_head, MILLM_INT8);
}

#define UNARY(name, expression) \
static void \
name(float *y, const float *x, const float *up, int64_t n) \
{ \
	for (int64_t i = 0; i < n; i++) \
	{ \
		float		v = x[i]; \
		float		f = (expression); \
\
		y[i] = up ? f * up[i] : f; \
	} \
}
UNARY(silu, v / (1 + expf(-v)))
UNARY(gelu_tanh, 0.5f * v * (1 + tanhf(0.7978845608f * (v + 0.044715f * v * v * v))))
UNARY(gelu_erf, 0.5f * v * (1 + erff(v * 0.7071067812f)))
UNARY(relu, v < 0 ? 0 : v)

static void
swiglu_pairs(float *y, const float *x, int64_t n)
{
	const float alpha = 1.702f, limit = 7;

	for (int64_t i = 0; i < n; i++)
	{
		float		gate = x[2 * i] > limit ? limit : x[2 * i];
		float		up = x[2 * i + 1] > limit ? limit : x[2 * i + 1] < -limit ? -limit : x[2 * i + 1];

		y[i] = (up + 1) * gate / (1 + expf(-alpha * gate));
	}
}

static void
softcap(float *x, float cap, int64_t n)
{
	for (int64_t i = 0; i < n; i++)
		x[i] = cap * tanhf(x[i] / cap);
}

static void
load_row(float *y, const void *w, MillmDtype dtype, int64_t n, bool add)
{
	for (int64_t i = 0; i < n; i++)
		y[i] = (add ? y[i] : 0) + element(w, i, dtype);
}

static bool
is_finite(const float *x, int64_t n)
{
	float		zero[16] = {0};	/* sums that do not wait for each other */
	int64_t		i = 0;

	for (; i + 16 <= n; i += 16)
		for (int j = 0; j < 16; j++)
			zero[j] += x[i + j] * 0;	/* NaN and infinity times 0 are NaN, and stay so */
	for (; i < n; i++)
		zero[0] += x[i] * 0;
	for (int j = 1; j < 16; j++)
		zero[0] += zero[j];
	return zero[0] == 0;
}

void
millm_kernels_ref(MillmKernels *k)
{
	*k = (MillmKernels) {
		.variant = "ref",
		.kv = {
			[MILLM_KV_AUTO] = {MILLM_F32, store_f32, attention_f32},
			[MILLM_KV_INT8] = {MILLM_INT8, store_int8, attention_int8}
		},
		.matmul = {
			[MILLM_FORM_F32] = {
				[MILLM_F32] = {rows_f32, columns_f32},
				[MILLM_F16] = {rows_f16, columns_f16},
				[MILLM_BF16] = {rows_bf16, columns_bf16},
				[MILLM_4BIT] = {millm_matmul_decoded, NULL},
				[MILLM_INT8] = {millm_matmul_decoded, NULL},
				[MILLM_MXFP4] = {millm_matmul_decoded, NULL},
			},
		},
		.best_form = best_form,
		.fixed_form = fixed_form,
		.rms_norm = rms_norm,
		.layer_norm = layer_norm,
		.rope = rope,
		.unary = {
			[MILLM_UNARY_SILU] = silu,
			[MILLM_UNARY_GELU_TANH] = gelu_tanh,
			[MILLM_UNARY_GELU_ERF] = gelu_erf,
			[MILLM_UNARY_RELU] = relu,
		},
		.swiglu_pairs = swiglu_pairs,
		.softcap = softcap,
		.load_row = load_row,
		.is_finite = is_finite,
	};
}
