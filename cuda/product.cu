/*
 * product.cu -- products of a few dozen rows at most on tensor cores: every decoding step's.  kernels.h has the meaning.
 *
 * Such a product is bound by reading the weights once, if all else is little enough.  So a lane reads its part of the weights from memory into registers, in the
 * place where the tensor core wants it, a step ahead; 4-bit codes become pairs of bfloat16 by one look-up; and activations come as bfloat16 in the order of
 * the fragments (MillmCudaFragments), which is written once a product and not once a block.  A sum over columns has no order of its own, so
 * that the columns of a fragment are those that a lane finds side by side: of 64 columns, 16 are each lane's of a quad, four of them a multiplication's.
 *
 * Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), g = lane / 4, q = lane % 4: of w rows g and g + 8, columns 2q, 2q + 1, 2q + 8,
 * 2q + 9; of x the same columns of row g; of the sums rows g and g + 8, columns 2q and 2q + 1.
 */
#include "parts.cuh"

#define BLOCK_COLUMNS 64		/* that have one scale, and are multiplied together */
#define WARPS 8
#define THREADS (WARPS * WARP)
#define M 16					/* rows of w in a fragment */
#define N 8						/* columns of x */

struct Skinny
{
	MillmCudaMatmul m[MILLM_CUDA_MATMULS];
	unsigned	first_block[MILLM_CUDA_MATMULS + 1];	/* of each; those that are not there begin past the last block */
	MillmCudaFragments x;
	int64_t		split_pitch;	/* floats between the results of two splits */
};

/* Which of the products this block is of */
static __device__ int
which_of(const Skinny &p)
{
	return (blockIdx.x >= p.first_block[1]) + (blockIdx.x >= p.first_block[2]);
}

/*
 * A lane's weights of a row in a block of columns.  Such blocks lie one after the other, row by row.
 *
 *   WORDS  that are loaded
 *   BYTES  of the whole block
 */
template <int DTYPE>
struct Part
{
	static const int WORDS = DTYPE == MILLM_BF16 ? 8 : DTYPE == MILLM_INT8 ? 4 : 2;
	static const int BYTES = WORDS * 16;
};

template <int DTYPE>
static __device__ void
load_part(uint32_t *words, const char *from)
{
	if (DTYPE == MILLM_4BIT)
	{
		const uint2 u = *(const uint2 *) from;

		words[0] = u.x;
		words[1] = u.y;
	}
	else
#pragma unroll
		for (int k = 0; k < Part<DTYPE>::WORDS; k += 4)
		{
			const uint4 u = *(const uint4 *) (from + 4 * k);

			words[k] = u.x;
			words[k + 1] = u.y;
			words[k + 2] = u.z;
			words[k + 3] = u.w;
		}
}

/*
 * Two of a word's bytes, which are integers, as bfloat16.  Each at the end of 0x4300, which is 128: its lower seven bits make that 128 and as much more, and its sign
 * makes 256 of it; the difference is what the byte is.
 */
[[maybe_unused]] static __device__ uint32_t
two_integers(uint32_t word, int first)
{
	const uint32_t u = byte_perm(word, 0x43434343, first == 0 ? 0x4140 : 0x4342);

	return subtract_pairs(u & 0xff7fff7f, u & 0xff80ff80);
}

/*
 * The pair of 4-bit weights in each of 256 bytes, times the codebook's unit, as bfloat16, 32 times: a lane finds its own in a bank that is no other lane's.  The first is in
 * the byte's upper half.
 */
#define PAIRS (256 * WARP)

[[maybe_unused]] static __device__ void
share_pairs(uint32_t *pairs, const MillmCudaWeight &w)
{
	const int	warp = (int) threadIdx.x / WARP;	/* its bytes have one of two upper halves */
	const uint32_t first[2] = {to_bf16(w.codebook_unit * w.codebook[2 * warp]), to_bf16(w.codebook_unit * w.codebook[2 * warp + 1])};

#pragma unroll
	for (int k = 0; k < 16; k++)
	{
		const uint32_t second = (uint32_t) to_bf16(w.codebook_unit * w.codebook[k]) << 16;

#pragma unroll
		for (int j = 0; j < 2; j++)
			pairs[((2 * warp + j) * 16 + k) * WARP + threadIdx.x % WARP] = first[j] | second;
	}
}

[[maybe_unused]] static __device__ uint32_t
look_up_pair(const uint32_t *pairs, uint32_t word, int byte)
{
	const uint32_t at = ((byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80) | threadIdx.x % WARP * 4;

	return *(const uint32_t *) ((const char *) pairs + at);
}

/* a = this row's half of four fragments */
template <int DTYPE>
static __device__ void
fill_fragments(uint32_t (*a)[4], int half, const uint32_t *words, const uint32_t *pairs)
{
#pragma unroll
	for (int s = 0; s < 4; s++)
#pragma unroll
		for (int j = 0; j < 2; j++)
			a[s][half + 2 * j] = DTYPE == MILLM_4BIT ? look_up_pair(pairs, words[s / 2], s % 2 * 2 + j) :
				DTYPE == MILLM_INT8 ? two_integers(words[s % Part<DTYPE>::WORDS], 2 * j) : words[(2 * s + j) % Part<DTYPE>::WORDS];
}

/* The scale of a 4-bit row's block of columns, as it is stored: of 8 bits with what they stand for, or the scale itself */
struct StoredScale
{
	uint32_t	code;
	float		absmax;
};

[[maybe_unused]] static __device__ StoredScale
load_scale(const MillmCudaWeight &w, uint32_t block)
{
	const uint32_t at = block >> (w.block_shift - 6);	/* BLOCK_COLUMNS is 2^6 */

	if (w.nested_shift < 0)
		return {0, ((const float *) w.absmax)[at]};
	return {((const uint8_t *) w.absmax)[at], w.nested_absmax[at >> w.nested_shift]};
}

/*
 * What a lane holds of a step: its parts of STEP blocks of columns, for HEIGHT rows of fragments, and a quarter of its quad's scales: those of the lane's rows in fragment
 * q / STEP and block q % STEP.
 */
template <int DTYPE, int HEIGHT>
struct Stored
{
	static const int STEP = (DTYPE == MILLM_4BIT ? 4 : 2) / HEIGHT;

	uint32_t	words[STEP][HEIGHT][2][Part<DTYPE>::WORDS];
	StoredScale scale[2];
};

/* The parts of a block, of the rows whose first ones these are. */
template <int DTYPE, int HEIGHT>
static __device__ void
load_block(Stored<DTYPE, HEIGHT> &s, int b, const MillmCudaWeight &w, const uint32_t (*row)[2], int block)
{
	const int	BYTES = Part<DTYPE>::BYTES;

#pragma unroll
	for (int h = 0; h < 2 * HEIGHT; h++)
		load_part<DTYPE>(s.words[b][h / 2][h % 2], (const char *) w.data + (int64_t) (row[h / 2][h % 2] + block) * BYTES + threadIdx.x % 4 * (BYTES / 4));
}

template <int DTYPE, int HEIGHT>
static __device__ void
load_scales(Stored<DTYPE, HEIGHT> &s, const MillmCudaWeight &w, const uint32_t (*row)[2], int block, int last)
{
	const int	STEP = Stored<DTYPE, HEIGHT>::STEP;
	const int	q = (int) threadIdx.x % 4;
	const int	of_lane = block + q % STEP;

#pragma unroll
	for (int half = 0; half < 2 && DTYPE == MILLM_4BIT; half++)
		s.scale[half] = load_scale(w, (q < STEP ? row[0][half] : row[HEIGHT - 1][half]) + (of_lane < last ? of_lane : last));
}

/*
 * Up to 8 TILES columns of x.  A warp has 16 HEIGHT outputs and every so many steps of their columns: of a block's warps OUT_WARPS have different outputs, the
 * others different columns of the same, and so have the splits of a grid.  Sums of 4-bit weights are multiplied by their scale block after block.  The order of a
 * sum's parts is a matter of n_in, OUT_WARPS, and the splits.
 *
 *   blocks  [the sum of ceil(n_out / (16 HEIGHT OUT_WARPS)), splits], threads THREADS
 */
template <int DTYPE, int TILES, int HEIGHT, int OUT_WARPS>
static __global__ void __launch_bounds__(THREADS, TILES <= 2 ? 2 : 1)
matmul_skinny(const __grid_constant__ Skinny p)
{
#ifdef HAS_TENSOR_CORES
	const int	K_WARPS = WARPS / OUT_WARPS;
	const int	STEP = Stored<DTYPE, HEIGHT>::STEP;
	const int	SUMS = HEIGHT * TILES * 4;
	const int	OUTPUTS = M * HEIGHT * OUT_WARPS;
	const int	REDUCED = (K_WARPS - 1) * OUT_WARPS * SUMS * WARP;	/* floats of the others, for the first of the warps that share outputs */
	const bool	HAS_PAIRS = DTYPE == MILLM_4BIT;
	SHARED(uint32_t, shared, HAS_PAIRS && PAIRS > REDUCED ? PAIRS : REDUCED);
	SHARED(float, nested_map, HAS_PAIRS ? 256 : 1);
	const MillmCudaMatmul &m = p.m[which_of(p)];
	const int64_t o_block = (int64_t) (blockIdx.x - p.first_block[which_of(p)]) * OUTPUTS;
	const int	lane = (int) threadIdx.x % WARP;
	const int	out_warp = (int) threadIdx.x / WARP % OUT_WARPS;
	const int	k_warp = (int) threadIdx.x / WARP / OUT_WARPS;
	const int	n_blocks = (int) (m.w.n_in / BLOCK_COLUMNS);
	const int	last = n_blocks - 1;
	const int	stride = (int) gridDim.y * K_WARPS * STEP;
	const uint4 *x = (const uint4 *) p.x.data;
	const bool	has_low = TILES <= 2 && p.x.has_low;	/* of more rows nobody has */
	const int	n_columns = has_low ? 2 * m.n : m.n;
	int			block = ((int) blockIdx.y * K_WARPS + k_warp) * STEP;
	uint32_t	first[HEIGHT][2];	/* blocks of the lane's rows of w */
	Stored<DTYPE, HEIGHT> stored;	/* each part of the next step takes the place of one that has become fragments */
	float		sum[HEIGHT][TILES][4] = {};
	float	   *others = (float *) shared;

#pragma unroll
	for (int h = 0; h < 2 * HEIGHT; h++)
	{
		const int64_t o = o_block + (out_warp * HEIGHT + h / 2) * M + h % 2 * 8 + lane / 4;

		first[h / 2][h % 2] = (uint32_t) (m.w.first / BLOCK_COLUMNS + (o < m.w.n_out ? o : m.w.n_out - 1) * n_blocks);
	}
	auto		load_x = [&] (uint4 *to, int tile, int b) {
		const uint4 *from = x + ((tile * n_blocks + b) * 2) * WARP + lane;
		const bool	is_there = tile * N + lane / 4 < n_columns;

		to[0] = is_there ? from[0] : uint4();
		to[1] = is_there ? from[WARP] : uint4();
	};

	load_scales<DTYPE, HEIGHT>(stored, m.w, first, block, last);
#pragma unroll
	for (int b = 0; b < STEP; b++)
		load_block<DTYPE, HEIGHT>(stored, b, m.w, first, block + b < last ? block + b : last);
	if (HAS_PAIRS)
	{
		share_pairs(shared, m.w);
		if (m.w.nested_shift >= 0)
			nested_map[threadIdx.x] = m.w.nested_map[threadIdx.x];
		__syncthreads();
	}
	after_previous();			/* only weights were read before */
	for (; block < n_blocks; block += stride)
	{
		float		scale[2];

#pragma unroll
		for (int half = 0; half < 2 && HAS_PAIRS; half++)
		{
			const StoredScale s = stored.scale[half];

			scale[half] = m.w.codebook_scale * (m.w.nested_shift < 0 ? s.absmax : add(mul(nested_map[s.code], s.absmax), m.w.nested_offset));
		}
		load_scales<DTYPE, HEIGHT>(stored, m.w, first, block + stride, last);
#pragma unroll
		for (int b = 0; b < STEP; b++)
		{
			const int	next = block + stride + b;
			uint32_t	a[HEIGHT][4][4];
			float		scale_now[HEIGHT][2];
			uint4		u[TILES <= 2 ? TILES : 1][2];	/* fragments of x: if few, asked for before the weights are looked at */

			if (block + b > last)
				break;
#pragma unroll
			for (int tile = 0; tile < TILES && TILES <= 2; tile++)
				load_x(u[tile], tile, block + b);
#pragma unroll
			for (int h = 0; h < 2 * HEIGHT; h++)
			{
				fill_fragments<DTYPE>(a[h / 2], h % 2, stored.words[b][h / 2][h % 2], shared);
				scale_now[h / 2][h % 2] = HAS_PAIRS ? __shfl_sync(ALL_LANES, scale[h % 2], lane / 4 * 4 + h / 2 * STEP + b) : 1;
			}
			load_block<DTYPE, HEIGHT>(stored, b, m.w, first, next < last ? next : last);
#pragma unroll
			for (int tile = 0; tile < TILES; tile++)
			{
				const uint4 (&ut)[2] = u[TILES <= 2 ? tile : 0];

				if (TILES > 2)
					load_x(u[0], tile, block + b);
				const uint32_t fragment[4][2] = {{ut[0].x, ut[0].y}, {ut[0].z, ut[0].w}, {ut[1].x, ut[1].y}, {ut[1].z, ut[1].w}};

#pragma unroll
				for (int h = 0; h < HEIGHT; h++)
				{
					float		part[4] = {};

#pragma unroll
					for (int s = 0; s < 4; s++)
						mma_16x8x16(HAS_PAIRS ? part : sum[h][tile], a[h][s], fragment[s]);
#pragma unroll
					for (int k = 0; k < 4 && HAS_PAIRS; k++)
						sum[h][tile][k] = fmaf(part[k], scale_now[h][k / 2], sum[h][tile][k]);
				}
			}
		}
	}
	__syncthreads();			/* the pairs have been read */
	if (k_warp > 0)
#pragma unroll
		for (int k = 0; k < SUMS; k++)
			others[(((k_warp - 1) * OUT_WARPS + out_warp) * SUMS + k) * WARP + lane] = sum[k / 4 / TILES][k / 4 % TILES][k % 4];
	__syncthreads();
	if (k_warp > 0)
		return;
	for (int warp = 0; warp < K_WARPS - 1; warp++)
#pragma unroll
		for (int k = 0; k < SUMS; k++)
			sum[k / 4 / TILES][k / 4 % TILES][k % 4] += others[((warp * OUT_WARPS + out_warp) * SUMS + k) * WARP + lane];
#pragma unroll
	for (int h = 0; h < 2 * HEIGHT; h++)
	{
		const int	row = (out_warp * HEIGHT + h / 2) * M + h % 2 * 8 + lane / 4;	/* of the block's outputs */
		const int64_t o = o_block + row;
		const bool	is_there = o < m.w.n_out;
		const float unit = DTYPE == MILLM_INT8 && is_there ? mul(((const float *) m.w.scale)[o], INT8_UNIT) : 1;
		const float bias = m.bias && is_there ? m.bias[o] : 0;
		float	   *y = m.y.data + blockIdx.y * p.split_pitch + o;

#pragma unroll
		for (int k = 0; k < 2 * TILES; k++)
		{
			const float (&s)[4] = sum[h / 2][k / 2];
			const float v = unit * (has_low ? s[h % 2 * 2] + s[h % 2 * 2 + 1] : s[h % 2 * 2 + k % 2]) + bias;
			const int	column = k / 2 * N + lane % 4 * 2 + k % 2;
			const int	t = has_low ? column / 2 : column;
			float	   *to = y + t * m.y.stride;

			if (t < m.n && is_there && !(has_low && k % 2 == 1))
				*to = m.accumulate ? *to + v : v;
		}
	}
#endif
}

/* The splits of each output, in their order: those of sums are [n_splits, n, blocks x threads].  blocks [those of matmul_skinny, n], threads a block's outputs */
static __global__ void
add_splits(const __grid_constant__ Skinny p, const float *sums, int n_splits)
{
	after_previous();
	const MillmCudaMatmul &m = p.m[which_of(p)];
	const int64_t o = (int64_t) (blockIdx.x - p.first_block[which_of(p)]) * blockDim.x + threadIdx.x;
	const int64_t pitch = (int64_t) gridDim.x * blockDim.x;
	const float *sum = sums + blockIdx.y * pitch + (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
	float	   *y = m.y.data + blockIdx.y * m.y.stride + o;
	float		v = 0;

	if (o >= m.w.n_out)
		return;
	for (int s = 0; s < n_splits; s++)
		v += sum[s * m.n * pitch];
	if (m.bias)
		v += m.bias[o];
	*y = m.accumulate ? *y + v : v;
}

/* Blocks of two shapes: for few columns, where all warps share 16 outputs, and for more, where activations are read for 128 at a time */
#define NARROW_OUTPUTS M
#define WIDE_OUT_WARPS 4
#define WIDE_OUTPUTS (2 * M * WIDE_OUT_WARPS)

template <int DTYPE>
static cudaError_t
launch_skinny(const MillmCudaMatmul *m, int n_matmuls, const MillmCudaFragments *f, float *partials, MillmCudaQueue *queue)
{
	const int	n_tiles = ((f->has_low ? 2 * m->n : m->n) + N - 1) / N;
	const bool	is_wide = n_tiles > 2;
	const int	outputs = is_wide ? WIDE_OUTPUTS : NARROW_OUTPUTS;
	const int64_t n_steps = m->w.n_in / BLOCK_COLUMNS / (WARPS / WIDE_OUT_WARPS * Stored<DTYPE, 2>::STEP);	/* of a warp without splits, rounded down */
	unsigned	n_splits = 1;
	unsigned	n_blocks = 0;
	Skinny		p = {},
				of_splits;
	cudaError_t status;

	for (int i = 0; i < MILLM_CUDA_MATMULS; i++)
	{
		p.first_block[i] = n_blocks;
		if (i < n_matmuls)
		{
			p.m[i] = m[i];
			n_blocks += (unsigned) ((m[i].w.n_out + outputs - 1) / outputs);
		}
	}
	p.first_block[MILLM_CUDA_MATMULS] = n_blocks;
	p.x = *f;
	if (is_wide && n_blocks < MILLM_CUDA_SKINNY_BLOCKS)
		n_splits = MILLM_CUDA_SKINNY_BLOCKS / n_blocks;
	if (n_splits > n_steps)
		n_splits = n_steps > 1 ? (unsigned) n_steps : 1;
	of_splits = p;
	for (int i = 0; i < n_matmuls && n_splits > 1; i++)
	{
		MillmCudaMatmul *of_split = &of_splits.m[i];

		of_split->y = {partials + (int64_t) p.first_block[i] * outputs, (int64_t) n_blocks * outputs};
		of_split->bias = NULL;
		of_split->accumulate = false;
		of_splits.split_pitch = m->n * of_split->y.stride;
	}
	status = launch(n_tiles == 1 ? matmul_skinny<DTYPE, 1, 1, 1> : n_tiles == 2 ? matmul_skinny<DTYPE, 2, 1, 1> :
					n_tiles <= 4 ? matmul_skinny<DTYPE, 4, 2, WIDE_OUT_WARPS> : matmul_skinny<DTYPE, 8, 2, WIDE_OUT_WARPS>,
					dim3(n_blocks, n_splits), THREADS, queue, of_splits);
	if (status != cudaSuccess || n_splits == 1)
		return status;
	return launch(add_splits, dim3(n_blocks, (unsigned) m->n), outputs, queue, p, (const float *) partials, (int) n_splits);
}

cudaError_t
millm_cuda_matmul_skinny(const MillmCudaMatmul *m, int n_matmuls, const MillmCudaFragments *f, float *partials, MillmCudaQueue *queue)
{
	return m->w.dtype == MILLM_4BIT ? launch_skinny<MILLM_4BIT>(m, n_matmuls, f, partials, queue) :
		m->w.dtype == MILLM_INT8 ? launch_skinny<MILLM_INT8>(m, n_matmuls, f, partials, queue) :
		m->w.dtype == MILLM_BF16 ? launch_skinny<MILLM_BF16>(m, n_matmuls, f, partials, queue) : cudaErrorInvalidValue;
}

bool
millm_cuda_is_skinny(const MillmCudaWeight *w)
{
	return w->n_in % BLOCK_COLUMNS == 0 && (w->dtype == MILLM_BF16 || w->dtype == MILLM_INT8 ||
											(w->dtype == MILLM_4BIT && w->first % BLOCK_COLUMNS == 0 && w->block_shift >= 6));
}

static __global__ void
to_fragments(MillmCudaFragments f, MillmRows x, int64_t n_columns)
{
	after_previous();
	const int64_t i = element_index();

	if (i < n_columns)
		keep(f, (int) blockIdx.y, i, x.data[blockIdx.y * x.stride + i]);
}

cudaError_t
millm_cuda_to_fragments(const MillmCudaFragments *f, MillmRows x, int64_t n_columns, int n, MillmCudaQueue *queue)
{
	return launch_elements(to_fragments, n_columns, n, queue, *f, x, n_columns);
}
