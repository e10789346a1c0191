/*
 * avx512_tiles.c -- matmuls of MILLM_FORM_I16_TILES: weights of 4, 8 and 16 bits with activations of int16, for any number of tokens.
 *
 * A vector's lanes are sixteen outputs.  Weights of 32 rows are turned into a panel, whose vectors have two weights of each row as int16:
 *   4BIT        from a codebook of 12 bits and a sign
 *   INT8        as they are
 *   BF16, F16   in units of a power of two, 2^-12 of the least above all 64 of a block: those of the upper five binades of bfloat16 are exact
 * vpdpwssd multiplies them with two values of one token, which all lanes share; values have 13 bits and a sign, and a scale for each 64 of
 * them.  So the products of a block of 64 add up exactly, below 2^31, and only then meet its scales, in float32: block by block, in the
 * order of the row.  What is lost beside that is the rounding of a weight to at most 1.2e-4 of its block's largest (2.4e-4 where it
 * had 16 bits) and of a value to 6.1e-5 of its block's: bfloat16 loses 2e-3 of every value.
 *
 * No sum depends on the range of outputs or on the other tokens: an answer's bits are the same in any company.
 *
 * Why not vdpbf16ps: Intel's cores that have it begin one in two cycles, but two vpdpwssd in each (Emerald Rapids: 86 and 355
 * GFLOP/s a core; 174 with float32).
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "avx512_quant.h"

#include <math.h>
#include <string.h>

#define BLOCK			64			/* values that share a scale */
#define PAIRS			(BLOCK / 2)
#define ROWS			32			/* outputs of a panel: two vectors */
#define DEPTH			512			/* weights of a row that are in the panel at a time */
#define TOKENS			256			/* that share one unpacking of the weights */
#define GROUP			MILLM_I16_TILE_TOKENS
#define VALUE_MAX		8191.0f
#define CODEBOOK_MAX	4095.0f		/* the largest weight: 64 * 4095 * 8191 < 2^31 */

typedef struct Workspace
{
	_Alignas(64) __m512i panel[2][DEPTH / 2];	/* of rows 0..15 and 16..31: [block, pair] */
	float		sums[TOKENS][ROWS];
	float		scales[MAX_GROUPS][ROWS];	/* of blocks of weights, and of the codebook; not of INT8 */
	float		row_scales[MAX_GROUPS + 64];
	uint8_t		tail[ROWS][2 * DEPTH];	/* copies of the last rows, where there are fewer than 32 */
	MapPlanes	planes;
} Workspace;

/* Bytes of a block of 64 values of n_tokens tokens: their pairs, then their scales. */
INLINE int64_t
block_bytes(int n_tokens)
{
	return (PAIRS * 4 + 4) * n_tokens;
}

/* ---- activations ---- */

/*
 * Elements 1 5, 0 4, 3 7, 2 6 of each eight make a pair: what the nibbles of an 8 and of a 5 shifted 32-bit word of weights are, and
 * what int8 ones are made to be.
 */
static void
pack_group(void *packed, const float *x, int64_t x_stride, int n_tokens, int64_t n)
{
	static const uint16_t order[32] = {1, 5, 0, 4, 3, 7, 2, 6, 9, 13, 8, 12, 11, 15, 10, 14, 17, 21, 16, 20, 19, 23, 18, 22, 25, 29, 24, 28, 27, 31, 26, 30};
	const __m512i in_pairs = _mm512_loadu_si512(order);
	char	   *y = packed;

	for (int64_t i = 0; i < n; i += BLOCK, y += block_bytes(n_tokens))
		for (int t = 0; t < n_tokens; t++)
		{
			int32_t		pairs[PAIRS];
			__m512		v[4];
			__m512		max = _mm512_setzero_ps();
			__mmask16	is_nan = 0;
			__m512		inverse;
			float		largest, scale;

			for (int u = 0; u < 4; u++)
			{
				v[u] = _mm512_loadu_ps(x + t * x_stride + i + 16 * u);
				max = _mm512_max_ps(max, _mm512_abs_ps(v[u]));
				is_nan |= _mm512_cmp_ps_mask(v[u], v[u], _CMP_UNORD_Q);
			}
			largest = is_nan ? NAN : _mm512_reduce_max_ps(max);
			scale = largest / VALUE_MAX;
			/* a block of zeros, or so small that its inverse is none, counts as zeros */
			inverse = _mm512_set1_ps(largest > VALUE_MAX * 0x1p-126f ? VALUE_MAX / largest : 0);
			for (int h = 0; h < 2; h++)
			{
				__m256i		low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * h], inverse)));
				__m256i		high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * h + 1], inverse)));

				_mm512_storeu_si512(pairs + 16 * h, _mm512_permutexvar_epi16(in_pairs, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
			}
			for (int p = 0; p < PAIRS; p++)
				memcpy(y + 4 * (p * n_tokens + t), &pairs[p], 4);
			memcpy(y + 4 * (PAIRS * n_tokens + t), &scale, 4);
		}
}

/* ---- the panel ---- */

/* 16 bytes of rows i, 4 + i, 8 + i and 12 + i. */
INLINE __m512i
load_4_rows(const uint8_t *row, int64_t stride, int i)
{
	const uint8_t *p = row + i * stride;
	__m512i		v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) p));

	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 4 * stride)), 1);
	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 8 * stride)), 2);
	return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) (p + 12 * stride)), 3);
}

/* word[k] = the k-th 32 bits from there on of each of 16 rows, row r in lane r. */
INLINE void
load_words(__m512i *word, const uint8_t *row, int64_t stride)
{
	__m512i		v0 = load_4_rows(row, stride, 0),
				v1 = load_4_rows(row, stride, 1),
				v2 = load_4_rows(row, stride, 2),
				v3 = load_4_rows(row, stride, 3);
	__m512i		low01 = _mm512_unpacklo_epi32(v0, v1),
				high01 = _mm512_unpackhi_epi32(v0, v1),
				low23 = _mm512_unpacklo_epi32(v2, v3),
				high23 = _mm512_unpackhi_epi32(v2, v3);

	word[0] = _mm512_unpacklo_epi64(low01, low23);
	word[1] = _mm512_unpackhi_epi64(low01, low23);
	word[2] = _mm512_unpacklo_epi64(high01, high23);
	word[3] = _mm512_unpackhi_epi64(high01, high23);
}

/* A block of 16 rows: 32 vectors of pairs. */
INLINE void
unpack_4bit(__m512i *panel, const uint8_t *row, int64_t stride, __m512i codebook)
{
	for (int i = 0; i < 2; i++)
	{
		__m512i		word[4];

		load_words(word, row + 16 * i, stride);
		for (int k = 0; k < 4; k++, panel += 4)
		{
			_mm512_store_si512(panel, _mm512_permutexvar_epi16(word[k], codebook));
			_mm512_store_si512(panel + 1, _mm512_permutexvar_epi16(_mm512_srli_epi16(word[k], 4), codebook));
			_mm512_store_si512(panel + 2, _mm512_permutexvar_epi16(_mm512_srli_epi16(word[k], 8), codebook));
			_mm512_store_si512(panel + 3, _mm512_permutexvar_epi16(_mm512_srli_epi16(word[k], 12), codebook));
		}
	}
}

INLINE void
unpack_int8(__m512i *panel, const uint8_t *row, int64_t stride)
{
	for (int i = 0; i < 4; i++)
	{
		__m512i		word[4];

		load_words(word, row + 16 * i, stride);
		for (int k = 0; k < 4; k += 2, panel += 4)
		{
			/* bytes 0 1 4 5, and 2 3 6 7 */
			__m512i		low = _mm512_mask_mov_epi16(word[k], 0xAAAAAAAA, _mm512_slli_epi32(word[k + 1], 16));
			__m512i		high = _mm512_mask_mov_epi16(word[k + 1], 0x55555555, _mm512_srli_epi32(word[k], 16));

			_mm512_store_si512(panel, _mm512_srai_epi16(low, 8));
			_mm512_store_si512(panel + 1, _mm512_srai_epi16(_mm512_slli_epi16(low, 8), 8));
			_mm512_store_si512(panel + 2, _mm512_srai_epi16(high, 8));
			_mm512_store_si512(panel + 3, _mm512_srai_epi16(_mm512_slli_epi16(high, 8), 8));
		}
	}
}

/* The weights of even, and of odd number in words of two, as float32. */
INLINE __m512
even_floats(__m512i word, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)) : _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word));
}

INLINE __m512
odd_floats(__m512i word, MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32((int) 0xFFFF0000))) :
		_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16)));
}

/*
 * A block of 16 rows of BF16 or F16, and the rows' units.  Adding 1.5 * 2^23 units leaves a float's number of units, rounded to nearest even,
 * in its low bits.
 */
INLINE void
unpack_16bit(__m512i *panel, float *units, const uint8_t *row, int64_t stride, MillmDtype dtype)
{
	const int	exponent_at = dtype == MILLM_BF16 ? 7 : 10;
	/* from a weight's exponent field to that of a unit */
	const int	to_unit = dtype == MILLM_BF16 ? -11 : 101;
	const __m512i no_sign = _mm512_set1_epi16(0x7FFF);
	__m512i		word[PAIRS];
	__m512i		max = _mm512_setzero_si512();
	__m512i		exponent, unit;
	__m512		magic;

	for (int k = 0; k < PAIRS; k += 4)
		load_words(word + k, row + 4 * k, stride);
	for (int k = 0; k < PAIRS; k++)
		max = _mm512_max_epu16(max, _mm512_and_si512(word[k], no_sign));
	max = _mm512_max_epu16(max, _mm512_srli_epi32(max, 16));
	exponent = _mm512_srli_epi32(_mm512_and_si512(max, _mm512_set1_epi32(0xFFFF)), (unsigned) exponent_at);
	/* a block whose unit would be no normal number has the smallest that is one */
	exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(dtype == MILLM_BF16 ? 12 : 1));
	unit = _mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(to_unit)), 23);
	magic = _mm512_castsi512_ps(_mm512_add_epi32(unit, _mm512_set1_epi32((23 << 23) | 0x400000)));
	/* one that has none above all its weights, infinity or NaN among them, is NaN */
	unit = _mm512_mask_mov_epi32(unit, _mm512_cmpgt_epi32_mask(exponent, _mm512_set1_epi32(dtype == MILLM_BF16 ? 242 : 30)), _mm512_set1_epi32(0x7FC00000));
	_mm512_storeu_si512(units, unit);
	for (int k = 0; k < PAIRS; k += 4, panel += 4)
		for (int j = 0; j < 2; j++)
		{
			__m512i		odd_low = _mm512_castps_si512(_mm512_add_ps(odd_floats(word[k + j], dtype), magic));
			__m512i		odd_high = _mm512_castps_si512(_mm512_add_ps(odd_floats(word[k + 2 + j], dtype), magic));
			__m512i		even_low = _mm512_castps_si512(_mm512_add_ps(even_floats(word[k + j], dtype), magic));
			__m512i		even_high = _mm512_castps_si512(_mm512_add_ps(even_floats(word[k + 2 + j], dtype), magic));

			_mm512_store_si512(panel + 2 * j, _mm512_mask_mov_epi16(odd_low, 0xAAAAAAAA, _mm512_slli_epi32(odd_high, 16)));
			_mm512_store_si512(panel + 2 * j + 1, _mm512_mask_mov_epi16(even_low, 0xAAAAAAAA, _mm512_slli_epi32(even_high, 16)));
		}
}

/*
 * Rows o .. o + n_rows of w, weights i .. i + depth.  Asks for as many bytes of the next 32 rows, in the order in which they lie: memory
 * sees one stream, not 32.
 */
INLINE void
fill_panel(Workspace *work, const MillmWeight *w, MillmDtype dtype, int64_t o, int n_rows, int64_t i, int depth, __m512i codebook, bool prefetch)
{
	const int	bytes_of_block = dtype == MILLM_4BIT ? BLOCK / 2 : dtype == MILLM_INT8 ? BLOCK : 2 * BLOCK;
	const uint8_t *row = dtype == MILLM_4BIT ? nibble_row(w, o) : (const uint8_t *) millm_weight_row(w, o);
	int64_t		stride = dtype == MILLM_4BIT ? w->n_in / 2 : dtype == MILLM_INT8 ? w->n_in : 2 * w->stride;
	const char *ahead = (const char *) row + ROWS * stride + ROWS * i / BLOCK * bytes_of_block;

	row += i / BLOCK * bytes_of_block;
	if (n_rows < ROWS)
	{
		memset(work->tail, 0, sizeof(work->tail));
		for (int r = 0; r < n_rows; r++)
			memcpy(work->tail[r], row + r * stride, (size_t) (depth / BLOCK * bytes_of_block));
		row = work->tail[0];
		stride = sizeof(work->tail[0]);
	}
	for (int v = 0; v < 2; v++)
		for (int b = 0; b < depth / BLOCK; b++)
		{
			const uint8_t *p = row + v * 16 * stride + b * bytes_of_block;

			for (int line = 0; prefetch && line < 16 * bytes_of_block; line += 64, ahead += 64)
				_mm_prefetch(ahead, _MM_HINT_T1);
			if (dtype == MILLM_4BIT)
				unpack_4bit(work->panel[v] + b * PAIRS, p, stride, codebook);
			else if (dtype == MILLM_INT8)
				unpack_int8(work->panel[v] + b * PAIRS, p, stride);
			else
				unpack_16bit(work->panel[v] + b * PAIRS, work->scales[i / BLOCK + b] + 16 * v, p, stride, dtype);
		}
}

/* work->scales of n_rows rows from o on, 0 for those that are not there. */
INLINE void
turn_scales(Workspace *work, const MillmWeight *w, int64_t o, int n_rows)
{
	const int64_t n_groups = w->n_in / BLOCK;
	const int	at_once = (int) (MAX_GROUPS / n_groups);	/* rows that are decoded together */

	for (int r = 0; r < ROWS; r++)
	{
		const int64_t at = r % at_once * n_groups;

		if (r < n_rows && at == 0)
			group_scales(work->row_scales, w, &work->planes, first_group(w, o + r), (n_rows - r < at_once ? n_rows - r : at_once) * n_groups);
		for (int64_t g = 0; g < n_groups; g++)
			work->scales[g][r] = r < n_rows ? work->row_scales[at + g] * (1 / CODEBOOK_MAX) : 0;
	}
}

/* ---- products ---- */

/*
 * sums [n_tokens, 32] += the panel's n_blocks blocks times x.  Few tokens keep n_parts sums each, so that no product waits for the one before.
 */
INLINE void
multiply(const Workspace *work, float *sums, MillmDtype dtype, const char *x, const float *scales, int n_blocks, int n_tokens, int n_parts)
{
	for (int b = 0; b < n_blocks; b++, x += block_bytes(n_tokens), scales += ROWS)
	{
		const int32_t *pairs = (const int32_t *) x;
		const float *x_scale = (const float *) (x + PAIRS * 4 * n_tokens);
		__m512i		acc[2][GROUP][4];

		for (int v = 0; v < 2; v++)
			for (int t = 0; t < n_tokens; t++)
				for (int u = 0; u < n_parts; u++)
					acc[v][t][u] = _mm512_setzero_si512();
		for (int p = 0; p < PAIRS; p += n_parts)
			for (int u = 0; u < n_parts; u++)
			{
				__m512i		w0 = _mm512_load_si512(&work->panel[0][b * PAIRS + p + u]),
							w1 = _mm512_load_si512(&work->panel[1][b * PAIRS + p + u]);

				for (int t = 0; t < n_tokens; t++)
				{
					__m512i		xt = _mm512_set1_epi32(pairs[(p + u) * n_tokens + t]);

					add_products(&acc[0][t][u], w0, xt);
					add_products(&acc[1][t][u], w1, xt);
				}
			}
		for (int v = 0; v < 2; v++)
			for (int t = 0; t < n_tokens; t++)
			{
				float	   *y = sums + t * ROWS + 16 * v;
				__m512		f = _mm512_set1_ps(x_scale[t]);

				for (int u = 1; u < n_parts; u++)
					acc[v][t][0] = _mm512_add_epi32(acc[v][t][0], acc[v][t][u]);
				if (dtype != MILLM_INT8)
					f = _mm512_mul_ps(f, _mm512_loadu_ps(scales + 16 * v));
				_mm512_store_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[v][t][0]), f, _mm512_load_ps(y)));
			}
	}
}

INLINE void
multiply_group(const Workspace *work, float *sums, MillmDtype dtype, const char *x, const float *scales, int n_blocks, int n_tokens)
{
	switch (n_tokens)
	{
		case 1:
			multiply(work, sums, dtype, x, scales, n_blocks, 1, 4);
			break;
		case 2:
			multiply(work, sums, dtype, x, scales, n_blocks, 2, 4);
			break;
		case 3:
			multiply(work, sums, dtype, x, scales, n_blocks, 3, 2);
			break;
		case 4:
			multiply(work, sums, dtype, x, scales, n_blocks, 4, 2);
			break;
		case 5:
			multiply(work, sums, dtype, x, scales, n_blocks, 5, 1);
			break;
		case 6:
			multiply(work, sums, dtype, x, scales, n_blocks, 6, 1);
			break;
		case 7:
			multiply(work, sums, dtype, x, scales, n_blocks, 7, 1);
			break;
		case 8:
			multiply(work, sums, dtype, x, scales, n_blocks, 8, 1);
			break;
	}
}

/* y of n_tokens tokens from t on, outputs o .. o + n_rows. */
INLINE void
finish_panel(const MillmMatmul *m, MillmDtype dtype, const Workspace *work, int64_t t, int n_tokens, int64_t o, int n_rows)
{
	for (int r = 0; r < n_rows; r += 16)
	{
		const __mmask16 mask = first_lanes(n_rows - r);
		const __m512 bias = m->bias ? _mm512_maskz_loadu_ps(mask, m->bias + o + r) : _mm512_setzero_ps();
		__m512		scale = _mm512_set1_ps(1);

		if (dtype == MILLM_INT8)
		{
			float		s[16];

			for (int i = 0; i < 16; i++)
				s[i] = r + i < n_rows ? int8_scale(m->w, o + r + i) : 0;
			scale = _mm512_loadu_ps(s);
		}
		for (int j = 0; j < n_tokens; j++)
		{
			float	   *y = m->y + (t + j) * m->y_stride + o + r;
			__m512		sum = _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(work->sums[j] + r), scale), bias);

			if (m->accumulate)
				sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
			_mm512_mask_storeu_ps(y, mask, sum);
		}
	}
}

INLINE int
at_most(int64_t n, int limit)
{
	return n < limit ? (int) n : limit;
}

INLINE void
matmul(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	const MillmWeight *w = m->w;
	__m512i		codebook = _mm512_setzero_si512();
	Workspace	work;

	if (dtype == MILLM_4BIT)
	{
		int16_t		codes[32];

		for (int i = 0; i < 32; i++)	/* twice, so that what lies above the nibble does not matter */
			codes[i] = (int16_t) lrintf(w->codebook[i % 16] * CODEBOOK_MAX);
		codebook = _mm512_loadu_si512(codes);
		if (w->nested_block_size > 0)
			split_map(&work.planes, w->nested_map);
	}
	for (int64_t t = 0; t < m->n_tokens; t += TOKENS)
	{
		const int	n_tokens = at_most(m->n_tokens - t, TOKENS);

		for (int64_t o = begin; o < end; o += ROWS)
		{
			const int	n_rows = at_most(end - o, ROWS);

			if (dtype == MILLM_4BIT)
				turn_scales(&work, w, o, n_rows);
			memset(work.sums, 0, sizeof(work.sums[0]) * (size_t) n_tokens);
			for (int64_t i = 0; i < w->n_in; i += DEPTH)
			{
				const int	depth = at_most(w->n_in - i, DEPTH);

				fill_panel(&work, w, dtype, o, n_rows, i, depth, codebook, t == 0);
				for (int j = 0; j < n_tokens; j += GROUP)
				{
					const int	n_group = at_most(n_tokens - j, GROUP);
					const char *x = (const char *) m->x + (t + j) * m->x_stride + i / BLOCK * block_bytes(n_group);

					multiply_group(&work, work.sums[j], dtype, x, work.scales[i / BLOCK], depth / BLOCK, n_group);
				}
			}
			finish_panel(m, dtype, &work, t, n_tokens, o, n_rows);
		}
	}
}

#define MATMUL(name, dtype) \
static void matmul_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul(m, begin, end, dtype); }
MATMUL(f16, MILLM_F16)
MATMUL(bf16, MILLM_BF16)
MATMUL(4bit, MILLM_4BIT)
MATMUL(int8, MILLM_INT8)

void
millm_kernels_avx512_tiles(MillmKernels *k)
{
	k->matmul[MILLM_FORM_I16_TILES][MILLM_F16][0] = matmul_f16;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_BF16][0] = matmul_bf16;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_4BIT][0] = matmul_4bit;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_INT8][0] = matmul_int8;
	k->pack_group[MILLM_FORM_I16_TILES] = pack_group;
}
#endif
