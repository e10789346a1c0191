/*
 * amx.c -- what AMX adds to AVX-512: matmuls with many tokens, of BF16, 4-bit and INT8 weights.
 *
 * A tile of sums is 16 outputs by 16 tokens.  The weights are the left operand, whose rows lie as in a file: BF16 is loaded from where it
 * is mapped, 4-bit and INT8 weights are dequantized to bfloat16 into a panel (4-bit values rounded as bitsandbytes does; int8 are
 * exact, their scale comes last).  The activations are the right one, packed once for all matmuls that read them (MILLM_FORM_BF16_TILES).
 *
 * Two by two tiles of sums share each load.  The rest is about the L2 cache, 2 MiB a core where there is AMX, which holds at a time
 *     the activations of TOKENS tokens, DEPTH deep     512 KiB
 *     the sums of ROWS outputs for them                256 KiB
 *     a panel of PANEL_ROWS outputs, DEPTH deep         64 KiB, and the stored weights of the next one, asked for while this one is multiplied
 * so that memory is read for weights once per TOKENS tokens, and for activations once per ROWS outputs.
 *
 * Each sum runs over n_in in order, 32 at a time, whatever the range and the company.
 *
 * NOT verified on hardware: developed on a machine without AMX, where test_amx runs it over an emulation of the tile instructions
 * (test/unit/amx_emulated.c).  The sizes above are computed, not tuned.  cpu.c offers this variant only where CPU and kernel have AMX.
 */
#include "kernel.h"

#if defined(__x86_64__)
#include "amx_tile.h"
#include "avx512.h"

/* From this many tokens on: half of a tile, not tuned. */
#define MIN_TOKENS	8
#define TOKENS		256
#define ROWS		256
#define DEPTH		1024
#define PANEL_ROWS	MILLM_TILE_OUTPUTS
#define GROUPS		(TOKENS / MILLM_TILE_TOKENS)
#define K_TILE		32				/* bfloat16 values in a row of a tile */
#define PANEL_STEP	(2 * TILE_BYTES)	/* of a panel: from 32 values of all its rows to the next 32 */

_Static_assert(MILLM_TILE_TOKENS == TILE_ROWS, "a group of tokens is as wide as a tile");
_Static_assert(PANEL_ROWS == 2 * TILE_ROWS, "a panel is two tiles high");

typedef struct Workspace
{
	_Alignas(64) char panel[PANEL_ROWS * DEPTH * 2];
	_Alignas(64) char sums[ROWS * TOKENS * 4];	/* tiles [ROWS / 16][GROUPS] */
} Workspace;

/* columns[c] = column c of 16 x 16 double words at p. */
INLINE void
load_columns(__m512 columns[16], const char *p)
{
	for (int c = 0; c < 16; c += 4)
	{
		__m512		r[4],
					low01, high01, low23, high23;

		/* quarter q of r[i] has four columns of row 4 q + i */
		for (int i = 0; i < 4; i++)
		{
			const char *row = p + i * TILE_ROW_BYTES + c * 4;

			r[i] = _mm512_broadcast_f32x4(_mm_loadu_ps((const float *) row));
			r[i] = _mm512_mask_broadcast_f32x4(r[i], 0x00F0, _mm_loadu_ps((const float *) (row + 4 * TILE_ROW_BYTES)));
			r[i] = _mm512_mask_broadcast_f32x4(r[i], 0x0F00, _mm_loadu_ps((const float *) (row + 8 * TILE_ROW_BYTES)));
			r[i] = _mm512_mask_broadcast_f32x4(r[i], 0xF000, _mm_loadu_ps((const float *) (row + 12 * TILE_ROW_BYTES)));
		}
		low01 = _mm512_unpacklo_ps(r[0], r[1]);
		high01 = _mm512_unpackhi_ps(r[0], r[1]);
		low23 = _mm512_unpacklo_ps(r[2], r[3]);
		high23 = _mm512_unpackhi_ps(r[2], r[3]);
		columns[c] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(low01), _mm512_castps_pd(low23)));
		columns[c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(low01), _mm512_castps_pd(low23)));
		columns[c + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(high01), _mm512_castps_pd(high23)));
		columns[c + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(high01), _mm512_castps_pd(high23)));
	}
}

/* ---- activations ---- */

static void
pack_tiles(void *packed, const float *x, int64_t x_stride, int n_tokens, int64_t n)
{
	char	   *y = packed;

	for (int64_t i = 0; i < n; i += K_TILE, y += TILE_BYTES)
	{
		const __mmask16 low = first_lanes(n - i);
		const __mmask16 high = n - i > 16 ? first_lanes(n - i - 16) : 0;
		_Alignas(64) char rows[TILE_BYTES] = {0};
		__m512		pairs[16];

		for (int t = 0; t < n_tokens; t++)
		{
			const float *xt = x + t * x_stride + i;

			_mm512_store_si512(rows + t * TILE_ROW_BYTES,
							   (__m512i) _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, xt + 16), _mm512_maskz_loadu_ps(low, xt)));
		}
		load_columns(pairs, rows);
		for (int k = 0; k < 16; k++)
			_mm512_store_ps(y + k * TILE_ROW_BYTES, pairs[k]);
	}
}

/* ---- panels: tiles [depth / 32][2]; columns that are not there are zeros, rows that are not there anything: nobody reads their sums ---- */

INLINE char *
panel_row(char *panel, int r)
{
	return panel + r / TILE_ROWS * TILE_BYTES + r % TILE_ROWS * TILE_ROW_BYTES;
}

/* Ask for what this row's successor in the next panel will need: n bytes of a row of row_bytes. */
INLINE void
prefetch_next_panel(const char *row, int64_t row_bytes, int n)
{
	for (int line = 0; line < n; line += 64)
		_mm_prefetch(row + PANEL_ROWS * row_bytes + line, _MM_HINT_T1);
}

/* Sixteen bfloat16 values, one for each nibble, twice: so that what lies above the nibble does not matter. */
INLINE __m512i
scaled_codebook(__m512 codebook, float scale)
{
	return _mm512_broadcast_i64x4((__m256i) _mm512_cvtneps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(scale))));
}

/* 32 weights in order, from 16 bytes: the nibbles of each two bytes go to four words, the high nibble of a byte before its low one. */
INLINE __m512i
look_up_nibbles(const uint8_t *p, __m512i values)
{
	const __m512i shifts = _mm512_set1_epi64(0x08080C0C00000404);
	__m512i		v = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *) p));

	return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, v), values);
}

/* Values [i, i + depth) of row o, 32 every PANEL_STEP from y on.  In 4 bits i and depth are multiples of 64. */
INLINE void
row_of_4bit(char *y, const MillmWeight *w, int64_t o, int64_t i, int depth)
{
	const __m512 codebook = _mm512_loadu_ps(w->codebook);
	const int	block_shift = __builtin_ctz((unsigned) w->block_size);
	const int64_t first = w->first + o * w->n_in + i;
	const uint8_t *row = (const uint8_t *) w->data + first / 2;

	prefetch_next_panel((const char *) row, w->n_in / 2, depth / 2);
	for (int k = 0; k < depth; k += 64, y += 2 * PANEL_STEP, row += 32)
	{
		__m512i		values = scaled_codebook(codebook, block_scale(w, (first + k) >> block_shift));

		_mm512_store_si512(y, look_up_nibbles(row, values));
		_mm512_store_si512(y + PANEL_STEP, look_up_nibbles(row + 16, values));
	}
}

INLINE void
row_of_int8(char *y, const MillmWeight *w, int64_t o, int64_t i, int depth)
{
	const char *row = millm_weight_row(w, o) + i;

	prefetch_next_panel(row, w->n_in, depth);
	for (int k = 0; k < depth; k += K_TILE, y += PANEL_STEP)
	{
		__m256i		v = depth - k >= K_TILE ? _mm256_loadu_si256((const __m256i *) (row + k))
			: _mm256_maskz_loadu_epi8((1u << (depth - k)) - 1, row + k);
		__m512		low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(v)));
		__m512		high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(v, 1)));

		_mm512_store_si512(y, (__m512i) _mm512_cvtne2ps_pbh(high, low));
	}
}

/* Only where rows or columns are missing, which tiles would read nevertheless. */
INLINE void
row_of_bf16(char *y, const MillmWeight *w, int64_t o, int64_t i, int depth)
{
	const char *row = millm_weight_row(w, o) + i * 2;

	for (int k = 0; k < depth; k += K_TILE, y += PANEL_STEP)
		_mm512_store_si512(y, depth - k >= K_TILE ? _mm512_loadu_si512(row + k * 2) : _mm512_maskz_loadu_epi16((1u << (depth - k)) - 1, row + k * 2));
}

INLINE void
fill_panel(char *panel, const MillmWeight *w, MillmDtype dtype, int64_t o, int n_rows, int64_t i, int depth)
{
	for (int r = 0; r < n_rows; r++)
		if (dtype == MILLM_4BIT)
			row_of_4bit(panel_row(panel, r), w, o + r, i, depth);
		else if (dtype == MILLM_INT8)
			row_of_int8(panel_row(panel, r), w, o + r, i, depth);
		else
			row_of_bf16(panel_row(panel, r), w, o + r, i, depth);
}

/* ---- products ---- */

/* Where tiles find PANEL_ROWS rows of weights, and which rows to ask for meanwhile. */
typedef struct Rows
{
	const char *at;
	int64_t		stride;			/* bytes from a row to the next */
	int64_t		second;			/* from the first 16 rows to the second */
	int64_t		step;			/* from 32 values to the next */
	const char *ahead;
	int64_t		ahead_stride;
	int			n_ahead;
} Rows;

/* sums (+)= 32 rows of weights times one or two groups of tokens, n_tiles * 32 deep. */
INLINE void
multiply(char *sums, const Rows *w, const char *x, int64_t group_bytes, int n_groups, int n_tiles, bool is_first)
{
	char	   *second = sums + GROUPS * TILE_BYTES;

	if (is_first)
	{
		tile_zero(0);
		tile_zero(1);
		tile_zero(2);
		tile_zero(3);
	}
	else
	{
		tile_load(0, sums, TILE_ROW_BYTES);
		tile_load(1, second, TILE_ROW_BYTES);
		if (n_groups == 2)
		{
			tile_load(2, sums + TILE_BYTES, TILE_ROW_BYTES);
			tile_load(3, second + TILE_BYTES, TILE_ROW_BYTES);
		}
	}
	for (int k = 0; k < n_tiles; k++, x += TILE_BYTES)
	{
		const char *a = w->at + k * w->step;

		for (int r = 0; r < w->n_ahead; r++)
			_mm_prefetch(w->ahead + r * w->ahead_stride + k * TILE_ROW_BYTES, _MM_HINT_T1);
		tile_load(4, a, w->stride);
		tile_load(6, x, TILE_ROW_BYTES);
		tile_dot_bf16(0, 4, 6);
		tile_load(5, a + w->second, w->stride);
		tile_dot_bf16(1, 5, 6);
		if (n_groups == 2)
		{
			tile_load(7, x + group_bytes, TILE_ROW_BYTES);
			tile_dot_bf16(2, 4, 7);
			tile_dot_bf16(3, 5, 7);
		}
	}
	tile_store(0, sums, TILE_ROW_BYTES);
	tile_store(1, second, TILE_ROW_BYTES);
	if (n_groups == 2)
	{
		tile_store(2, sums + TILE_BYTES, TILE_ROW_BYTES);
		tile_store(3, second + TILE_BYTES, TILE_ROW_BYTES);
	}
}

/* What is left to do with a tile of sums: at most 16 outputs from o on, of at most 16 tokens from t on. */
INLINE void
finish_tile(const MillmMatmul *m, MillmDtype dtype, const char *sums, int64_t t, int n_tokens, int64_t o, __mmask16 mask)
{
	const __m512 bias = m->bias ? _mm512_maskz_loadu_ps(mask, m->bias + o) : _mm512_setzero_ps();
	__m512		scale = m->row_scale ? _mm512_maskz_loadu_ps(mask, m->row_scale + o) : _mm512_set1_ps(1);
	__m512		columns[16];

	if (dtype == MILLM_INT8)
		scale = _mm512_mul_ps(scale, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, (const char *) m->w->scale + o * 4),
												   _mm512_set1_ps(0.007874015718698502f)));	/* 1 / 127 */
	load_columns(columns, sums);
	for (int j = 0; j < n_tokens; j++)
	{
		float	   *y = m->y + (t + j) * m->y_stride + o;
		__m512		v = _mm512_fmadd_ps(columns[j], scale, bias);

		if (m->accumulate)
			v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), v);
		_mm512_mask_storeu_ps(y, mask, v);
	}
}

INLINE int
at_most(int64_t n, int max)
{
	return n < max ? (int) n : max;
}

/* Outputs [begin, end), at most ROWS, of n_tokens tokens from t on, at most TOKENS. */
INLINE void
matmul_block(const MillmMatmul *m, MillmDtype dtype, int64_t t, int n_tokens, int64_t begin, int64_t end, Workspace *work)
{
	const MillmWeight *w = m->w;
	const int	n_groups = (n_tokens + MILLM_TILE_TOKENS - 1) / MILLM_TILE_TOKENS;
	const int64_t group_bytes = m->x_stride * MILLM_TILE_TOKENS;
	const char *x = (const char *) m->x + t * m->x_stride;

	for (int64_t i = 0; i < w->n_in; i += DEPTH)
	{
		const int	depth = at_most(w->n_in - i, DEPTH);
		const int	n_tiles = (depth + K_TILE - 1) / K_TILE;
		const bool	is_last = i + depth == w->n_in;

		for (int64_t o = begin; o < end; o += PANEL_ROWS)
		{
			const int	n_rows = at_most(end - o, PANEL_ROWS);
			char	   *sums = work->sums + (o - begin) / TILE_ROWS * GROUPS * TILE_BYTES;
			Rows		rows = {work->panel, TILE_ROW_BYTES, TILE_BYTES, PANEL_STEP, NULL, 0, 0};

			if (dtype == MILLM_BF16 && n_rows == PANEL_ROWS && depth % K_TILE == 0)
			{
				rows.at = millm_weight_row(w, o) + i * 2;
				rows.stride = w->stride * 2;
				rows.second = TILE_ROWS * rows.stride;
				rows.step = TILE_ROW_BYTES;
			}
			else
				fill_panel(work->panel, w, dtype, o, n_rows, i, depth);
			for (int g = 0; g < n_groups; g += 2)
			{
				const char *xg = x + g * group_bytes + i / K_TILE * TILE_BYTES;
				char	   *sums_g = sums + g * TILE_BYTES;

				if (rows.at != work->panel)
				{				/* each pair of groups asks for its share of the next rows */
					int			first = PANEL_ROWS * g / (n_groups + n_groups % 2);

					rows.n_ahead = PANEL_ROWS * (g + 2) / (n_groups + n_groups % 2) - first;
					rows.ahead_stride = rows.stride;
					rows.ahead = rows.at + (PANEL_ROWS + first) * rows.stride;
				}
				if (g + 1 < n_groups)
					multiply(sums_g, &rows, xg, group_bytes, 2, n_tiles, i == 0);
				else
					multiply(sums_g, &rows, xg, group_bytes, 1, n_tiles, i == 0);
				for (int j = g; is_last && j < n_groups && j < g + 2; j++)
					for (int r = 0; r < n_rows; r += TILE_ROWS)
						finish_tile(m, dtype, sums + (r / TILE_ROWS * GROUPS + j) * TILE_BYTES, t + j * MILLM_TILE_TOKENS,
									at_most(n_tokens - j * MILLM_TILE_TOKENS, MILLM_TILE_TOKENS), o + r, first_lanes(n_rows - r));
			}
		}
	}
}

INLINE void
matmul(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	Workspace	work;

	tile_configure();
	for (int64_t t = 0; t < m->n_tokens; t += TOKENS)
		for (int64_t o = begin; o < end; o += ROWS)
			matmul_block(m, dtype, t, at_most(m->n_tokens - t, TOKENS), o, end - o < ROWS ? end : o + ROWS, &work);
	tile_release();
}

#define MATMUL(name, dtype) \
static void matmul_##name(const MillmMatmul *m, int64_t begin, int64_t end) { matmul(m, begin, end, dtype); }
MATMUL(bf16, MILLM_BF16)
MATMUL(4bit, MILLM_4BIT)
MATMUL(int8, MILLM_INT8)

/* ---- the table ---- */

static MillmForm
best_form(const MillmWeight *w, int n_tokens)
{
	if (n_tokens >= MIN_TOKENS && !w->in_out && (w->dtype == MILLM_BF16 || w->dtype == MILLM_INT8 || (w->dtype == MILLM_4BIT && millm_is_blocky(w))))
		return MILLM_FORM_BF16_TILES;
	return millm_avx512_best_form_slow_bf16(w, n_tokens);	/* whoever has AMX is Intel's */
}

void
millm_kernels_amx(MillmKernels *k)
{
	k->variant = "amx";
	k->matmul[MILLM_FORM_BF16_TILES][MILLM_BF16][0] = matmul_bf16;
	k->matmul[MILLM_FORM_BF16_TILES][MILLM_4BIT][0] = matmul_4bit;
	k->matmul[MILLM_FORM_BF16_TILES][MILLM_INT8][0] = matmul_int8;
	k->pack_group[MILLM_FORM_BF16_TILES] = pack_tiles;
	k->best_form = best_form;
}
#endif
