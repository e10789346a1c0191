/*
 * tiles.h -- matmuls of MILLM_FORM_I16_TILES: weights of 4, 8 and 16 bits with activations of int16, for any number of tokens.  What
 * avx2_tiles.c and avx512_tiles.c have in common; each defines its vectors and then includes it.
 *
 * A vector's lanes are outputs.  Weights of two vectors' rows are turned into a panel, whose vectors have two weights of each row as int16:
 *   4BIT        from a codebook of 12 bits and a sign
 *   INT8        as they are
 *   BF16, F16   in units of a power of two, 2^-12 of the least above all 64 of a block: those of the upper five binades of bfloat16 are exact
 * They are multiplied with two values of one token, which all lanes share; values have 13 bits and a sign, and a scale for each 64 of
 * them.  So the products of a block of 64 add up exactly, below 2^31, and only then meet its scales, in float32: block by block, in the
 * order of the row.  What is lost beside that is the rounding of a weight to at most 1.2e-4 of its block's largest (2.4e-4 where it
 * had 16 bits) and of a value to 6.1e-5 of its block's: bfloat16 loses 2e-3 of every value.
 *
 * No sum depends on the range of outputs or on the other tokens: an answer's bits are the same in any company.
 *
 * To be defined before:
 *   LANES, Ints, Floats, V(name)       of a vector, its types, and the intrinsic of that name: V(add_epi32)
 *   TOKENS_AT_ONCE                     whose sums the registers hold
 *   Codebook, ScaleTables              what a weight's codes, and its scales, are looked up in
 *   load_codebook(b, codes [16]), load_scale_tables(t, w), decode_scales(s, t, w, o, n_rows)      s has room for 64 more
 *   quantize_block(pairs, x)           64 values to 32 pairs, elements 1 5, 0 4, 3 7, 2 6 of each eight; returns the scale
 *   load_rows(row, stride, i)          16 bytes of rows i, 4 + i, 8 + i, ... of LANES
 *   pairs_4bit(panel, word, codebook)  8 nibbles of each lane to 4 vectors of such pairs
 *   even_floats(word, dtype), odd_floats(word, dtype)      the two 16-bit weights of each lane
 *   even_odd(a, b)                     16-bit elements of even number from a, of odd from b
 *   choose_greater(a, limit, if_greater, otherwise)        lane by lane of int32
 *   add_products(sums, a, b)           sums += products of pairs of int16
 */
#define BLOCK			64			/* values that share a scale */
#define PAIRS			(BLOCK / 2)
#define ROWS			(2 * LANES)	/* outputs of a panel */
#define DEPTH			512			/* weights of a row that are in the panel at a time */
#define TOKENS			256			/* that share one unpacking of the weights */
#define GROUP			MILLM_I16_TILE_TOKENS

_Static_assert(TOKENS % GROUP == 0 && DEPTH % BLOCK == 0 && MILLM_TILE_OUTPUTS % ROWS == 0, "blocks, groups and panels are whole");
_Static_assert(TOKENS_AT_ONCE == 4 || TOKENS_AT_ONCE == 8, "multiply_group() knows these");

typedef struct Workspace
{
	_Alignas(64) Ints panel[2][DEPTH / 2];	/* of the first and the second LANES rows: [block, pair] */
	float		sums[TOKENS][ROWS];
	float		scales[MILLM_I16_TILE_BLOCKS][ROWS];	/* of blocks of weights, and of the codebook; 1 for INT8 */
	float		row_scales[LANES * MILLM_I16_TILE_BLOCKS + 64];	/* [row, block] */
	uint8_t		tail[ROWS][2 * DEPTH];	/* copies of the last rows, where there are too few */
	ScaleTables tables;
} Workspace;

INLINE int
at_most(int64_t n, int limit)
{
	return n < limit ? (int) n : limit;
}

/* Bytes of a block of 64 values of n_tokens tokens: their pairs, then their scales. */
INLINE int64_t
block_bytes(int n_tokens)
{
	return (PAIRS * 4 + 4) * n_tokens;
}

static void
pack_group(void *packed, const float *x, int64_t x_stride, int n_tokens, int64_t n)
{
	char	   *y = packed;

	for (int64_t i = 0; i < n; i += BLOCK, y += block_bytes(n_tokens))
		for (int t = 0; t < n_tokens; t++)
		{
			int32_t		pairs[PAIRS];
			float		scale = quantize_block(pairs, x + t * x_stride + i);

			for (int p = 0; p < PAIRS; p++)
				memcpy(y + 4 * (p * n_tokens + t), &pairs[p], 4);
			memcpy(y + 4 * (PAIRS * n_tokens + t), &scale, 4);
		}
}

/* word[k] = the k-th 32 bits from there on of each of LANES rows, row r in lane r, k < 4. */
INLINE void
load_words(Ints *word, const uint8_t *row, int64_t stride)
{
	Ints		v0 = load_rows(row, stride, 0),
				v1 = load_rows(row, stride, 1),
				v2 = load_rows(row, stride, 2),
				v3 = load_rows(row, stride, 3);
	Ints		low01 = V(unpacklo_epi32) (v0, v1),
				high01 = V(unpackhi_epi32) (v0, v1),
				low23 = V(unpacklo_epi32) (v2, v3),
				high23 = V(unpackhi_epi32) (v2, v3);

	word[0] = V(unpacklo_epi64) (low01, low23);
	word[1] = V(unpackhi_epi64) (low01, low23);
	word[2] = V(unpacklo_epi64) (high01, high23);
	word[3] = V(unpackhi_epi64) (high01, high23);
}

/* A block of LANES rows: 32 vectors of pairs.  So, too, the two functions below. */
INLINE void
unpack_4bit(Ints *panel, const uint8_t *row, int64_t stride, const Codebook *codebook)
{
	for (int i = 0; i < 2; i++)
	{
		Ints		word[4];

		load_words(word, row + 16 * i, stride);
		for (int k = 0; k < 4; k++, panel += 4)
			pairs_4bit(panel, word[k], codebook);
	}
}

INLINE void
unpack_int8(Ints *panel, const uint8_t *row, int64_t stride)
{
	for (int i = 0; i < 4; i++)
	{
		Ints		word[4];

		load_words(word, row + 16 * i, stride);
		for (int k = 0; k < 4; k += 2, panel += 4)
		{
			/* bytes 0 1 4 5, and 2 3 6 7 */
			Ints		low = even_odd(word[k], V(slli_epi32) (word[k + 1], 16));
			Ints		high = even_odd(V(srli_epi32) (word[k], 16), word[k + 1]);

			panel[0] = V(srai_epi16) (low, 8);
			panel[1] = V(srai_epi16) (V(slli_epi16) (low, 8), 8);
			panel[2] = V(srai_epi16) (high, 8);
			panel[3] = V(srai_epi16) (V(slli_epi16) (high, 8), 8);
		}
	}
}

/*
 * Of BF16 or F16, and the rows' units.  Adding 1.5 * 2^23 units leaves a float's number of units, rounded to nearest even, in its low bits.
 */
INLINE void
unpack_16bit(Ints *panel, float *units, const uint8_t *row, int64_t stride, MillmDtype dtype)
{
	const bool	is_bf16 = dtype == MILLM_BF16;
	const Ints	no_sign = V(set1_epi32) (0x7FFF7FFF);
	Ints		word[PAIRS];
	Ints		max = V(set1_epi32) (0);
	Ints		exponent, unit;
	Floats		magic;

	for (int k = 0; k < PAIRS; k += 4)
		load_words(word + k, row + 4 * k, stride);
	for (int k = 0; k < PAIRS; k++)
		max = V(max_epu16) (max, word[k] & no_sign);
	max = V(max_epu16) (max, V(srli_epi32) (max, 16));
	exponent = V(srli_epi32) (max & V(set1_epi32) (0xFFFF), is_bf16 ? 7 : 10);
	/* a block whose unit would be no normal number has the smallest that is one */
	exponent = V(max_epi32) (exponent, V(set1_epi32) (is_bf16 ? 12 : 1));
	/* from a weight's exponent field to that of a unit */
	unit = V(slli_epi32) (V(add_epi32) (exponent, V(set1_epi32) (is_bf16 ? -11 : 101)), 23);
	magic = (Floats) V(add_epi32) (unit, V(set1_epi32) ((23 << 23) | 0x400000));
	/* one that has none above all its weights, infinity or NaN among them, is NaN */
	unit = choose_greater(exponent, is_bf16 ? 242 : 30, V(set1_epi32) (0x7FC00000), unit);
	V(storeu_ps) (units, (Floats) unit);
	for (int k = 0; k < PAIRS; k += 4, panel += 4)
		for (int j = 0; j < 2; j++)
		{
			Ints		odd_low = (Ints) V(add_ps) (odd_floats(word[k + j], dtype), magic);
			Ints		odd_high = (Ints) V(add_ps) (odd_floats(word[k + 2 + j], dtype), magic);
			Ints		even_low = (Ints) V(add_ps) (even_floats(word[k + j], dtype), magic);
			Ints		even_high = (Ints) V(add_ps) (even_floats(word[k + 2 + j], dtype), magic);

			panel[2 * j] = even_odd(odd_low, V(slli_epi32) (odd_high, 16));
			panel[2 * j + 1] = even_odd(even_low, V(slli_epi32) (even_high, 16));
		}
}

/*
 * Rows o .. o + n_rows of w, weights i .. i + depth.  Asks for as many bytes of the rows that follow, in the order in which they lie: memory
 * sees one stream, not ROWS.
 */
INLINE void
fill_panel(Workspace *work, const MillmWeight *w, MillmDtype dtype, int64_t o, int n_rows, int64_t i, int depth, const Codebook *codebook, bool prefetch)
{
	const int	bytes_of_block = dtype == MILLM_4BIT ? BLOCK / 2 : dtype == MILLM_INT8 ? BLOCK : 2 * BLOCK;
	const uint8_t *row = dtype == MILLM_4BIT ? millm_nibble_row(w, o) : (const uint8_t *) millm_weight_row(w, o);
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
			const uint8_t *p = row + v * LANES * stride + b * bytes_of_block;
			Ints	   *panel = work->panel[v] + b * PAIRS;

			for (int line = 0; prefetch && line < LANES * bytes_of_block; line += 64, ahead += 64)
				_mm_prefetch(ahead, _MM_HINT_T1);
			if (dtype == MILLM_4BIT)
				unpack_4bit(panel, p, stride, codebook);
			else if (dtype == MILLM_INT8)
				unpack_int8(panel, p, stride);
			else
				unpack_16bit(panel, work->scales[i / BLOCK + b] + LANES * v, p, stride, dtype);
		}
}

/* work->scales of n_rows rows of 4 bits from o on, 0 for those that are not there. */
INLINE void
transpose_scales(Workspace *work, const MillmWeight *w, int64_t o, int n_rows)
{
	const int64_t n_blocks = w->n_in / BLOCK;
	const Floats unit = V(set1_ps) (1 / MILLM_I16_TILE_CODE);

	for (int v = 0; v < 2; v++)
	{
		const int	n = at_most(n_rows - LANES * v, LANES);

		if (n > 0)
			decode_scales(work->row_scales, &work->tables, w, o + LANES * v, n);
		for (int64_t i = n > 0 ? n * n_blocks : 0; i < LANES * n_blocks; i++)
			work->row_scales[i] = 0;
		for (int64_t b = 0; b < n_blocks; b += 4)
		{
			Ints		transposed[4];

			load_words(transposed, (const uint8_t *) (work->row_scales + b), n_blocks * 4);
			for (int k = 0; k < 4 && b + k < n_blocks; k++)
				V(storeu_ps) (work->scales[b + k] + LANES * v, V(mul_ps) ((Floats) transposed[k], unit));
		}
	}
}

/*
 * sums [n_tokens, ROWS] += the panel's n_blocks blocks times tokens first .. first + n_tokens of a group x of n_group.  Few tokens keep n_parts
 * sums each, so that no product waits for the one before.
 */
INLINE void
multiply(const Workspace *work, float *sums, const char *x, const float *scales, int n_blocks, int n_group, int first, int n_tokens, int n_parts)
{
	for (int b = 0; b < n_blocks; b++, x += block_bytes(n_group), scales += ROWS)
	{
		const int32_t *pairs = (const int32_t *) x + first;
		const float *x_scale = (const float *) x + PAIRS * n_group + first;
		Ints		acc[2][TOKENS_AT_ONCE][4];

		for (int v = 0; v < 2; v++)
			for (int t = 0; t < n_tokens; t++)
				for (int u = 0; u < n_parts; u++)
					acc[v][t][u] = V(set1_epi32) (0);
		for (int p = 0; p < PAIRS; p += n_parts)
			for (int u = 0; u < n_parts; u++)
			{
				Ints		w0 = work->panel[0][b * PAIRS + p + u],
							w1 = work->panel[1][b * PAIRS + p + u];

				for (int t = 0; t < n_tokens; t++)
				{
					Ints		xt = V(set1_epi32) (pairs[(p + u) * n_group + t]);

					add_products(&acc[0][t][u], w0, xt);
					add_products(&acc[1][t][u], w1, xt);
				}
			}
		for (int v = 0; v < 2; v++)
			for (int t = 0; t < n_tokens; t++)
			{
				float	   *y = sums + t * ROWS + LANES * v;
				Floats		f = V(set1_ps) (x_scale[t]);

				for (int u = 1; u < n_parts; u++)
					acc[v][t][0] = V(add_epi32) (acc[v][t][0], acc[v][t][u]);
				f = V(mul_ps) (f, V(loadu_ps) (scales + LANES * v));
				V(storeu_ps) (y, V(fmadd_ps) (V(cvtepi32_ps) (acc[v][t][0]), f, V(loadu_ps) (y)));
			}
	}
}

/* One function for all dtypes: it is long, and compilers take their time. */
static __attribute__((noinline)) void
multiply_group(const Workspace *work, float *sums, const char *x, const float *scales, int n_blocks, int n_group)
{
	for (int first = 0; first < n_group; first += TOKENS_AT_ONCE)
	{
		float	   *y = sums + first * ROWS;

		switch (n_group - first < TOKENS_AT_ONCE ? n_group - first : TOKENS_AT_ONCE)
		{
			case 1:
				multiply(work, y, x, scales, n_blocks, n_group, first, 1, 4);
				break;
			case 2:
				multiply(work, y, x, scales, n_blocks, n_group, first, 2, TOKENS_AT_ONCE / 2);
				break;
			case 3:
				multiply(work, y, x, scales, n_blocks, n_group, first, 3, TOKENS_AT_ONCE / 4);
				break;
			case 4:
				multiply(work, y, x, scales, n_blocks, n_group, first, 4, TOKENS_AT_ONCE / 4);
				break;
#if TOKENS_AT_ONCE > 4
			case 5:
				multiply(work, y, x, scales, n_blocks, n_group, first, 5, 1);
				break;
			case 6:
				multiply(work, y, x, scales, n_blocks, n_group, first, 6, 1);
				break;
			case 7:
				multiply(work, y, x, scales, n_blocks, n_group, first, 7, 1);
				break;
			case 8:
				multiply(work, y, x, scales, n_blocks, n_group, first, 8, 1);
				break;
#endif
		}
	}
}

/* y of n_tokens tokens from t on, outputs o .. o + n_rows. */
INLINE void
finish_panel(const MillmMatmul *m, MillmDtype dtype, const Workspace *work, int64_t t, int n_tokens, int64_t o, int n_rows)
{
	float		scale[ROWS],
				bias[ROWS];

	for (int r = 0; r < n_rows; r++)
	{
		scale[r] = (dtype == MILLM_INT8 ? millm_int8_scale(m->w, o + r) : 1) * (m->row_scale ? m->row_scale[o + r] : 1);
		bias[r] = m->bias ? m->bias[o + r] : 0;
	}
	for (int j = 0; j < n_tokens; j++)
	{
		const float *sums = work->sums[j];
		float	   *y = m->y + (t + j) * m->y_stride + o;
		int			r = 0;

		for (; r + LANES <= n_rows; r += LANES)
		{
			Floats		sum = V(add_ps) (V(mul_ps) (V(loadu_ps) (sums + r), V(loadu_ps) (scale + r)), V(loadu_ps) (bias + r));

			V(storeu_ps) (y + r, m->accumulate ? V(add_ps) (V(loadu_ps) (y + r), sum) : sum);
		}
		for (; r < n_rows; r++)
		{
			float		scaled = sums[r] * scale[r];
			float		sum = scaled + bias[r];	/* not fused, as above */

			y[r] = m->accumulate ? y[r] + sum : sum;
		}
	}
}

INLINE void
matmul(const MillmMatmul *m, int64_t begin, int64_t end, MillmDtype dtype)
{
	const MillmWeight *w = m->w;
	Codebook	codebook;
	Workspace	work;

	if (dtype == MILLM_4BIT)
	{
		int16_t		codes[16];

		for (int i = 0; i < 16; i++)
			codes[i] = (int16_t) lrintf(w->codebook[i] * MILLM_I16_TILE_CODE);
		load_codebook(&codebook, codes);
		load_scale_tables(&work.tables, w);
	}
	for (int64_t b = 0; dtype == MILLM_INT8 && b < w->n_in / BLOCK; b++)
		for (int r = 0; r < ROWS; r++)
			work.scales[b][r] = 1;
	for (int64_t t = 0; t < m->n_tokens; t += TOKENS)
	{
		const int	n_tokens = at_most(m->n_tokens - t, TOKENS);

		for (int64_t o = begin; o < end; o += ROWS)
		{
			const int	n_rows = at_most(end - o, ROWS);

			if (dtype == MILLM_4BIT)
				transpose_scales(&work, w, o, n_rows);
			memset(work.sums, 0, sizeof(work.sums[0]) * (size_t) n_tokens);
			for (int64_t i = 0; i < w->n_in; i += DEPTH)
			{
				const int	depth = at_most(w->n_in - i, DEPTH);

				fill_panel(&work, w, dtype, o, n_rows, i, depth, &codebook, t == 0);
				for (int j = 0; j < n_tokens; j += GROUP)
				{
					const int	n_group = at_most(n_tokens - j, GROUP);
					const char *x = (const char *) m->x + (t + j) * m->x_stride + i / BLOCK * block_bytes(n_group);

					multiply_group(&work, work.sums[j], x, work.scales[i / BLOCK], depth / BLOCK, n_group);
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

/* Weights that were rounded before: 16-bit ones keep all their bits. */
static MillmForm
fixed_form(const MillmWeight *w)
{
	return (w->dtype == MILLM_4BIT || w->dtype == MILLM_INT8) && millm_has_i16_tiles(w) ? MILLM_FORM_I16_TILES : MILLM_FORM_F32;
}

static void
set_kernels(MillmKernels *k)
{
	k->matmul[MILLM_FORM_I16_TILES][MILLM_F16][0] = matmul_f16;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_BF16][0] = matmul_bf16;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_4BIT][0] = matmul_4bit;
	k->matmul[MILLM_FORM_I16_TILES][MILLM_INT8][0] = matmul_int8;
	k->pack_group[MILLM_FORM_I16_TILES] = pack_group;
	k->fixed_form = fixed_form;
}
