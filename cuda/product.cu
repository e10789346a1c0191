/*
 * product.cu -- products of a few dozen rows at most on tensor cores: every decoding step's.  kernels.h has the meaning.
 *
 * Such a product is bound by reading the weights once, if all else is little enough.  So a lane reads its part of the weights from memory into registers, in the
 * place where the tensor core wants it, a step ahead; 4-bit codes become pairs of bfloat16 by one look-up; and activations come as bfloat16 in the order of
 * the fragments (MillmCudaFragments), which is written once a product and not once a block.  A device has as many blocks as it runs at once, and each goes
 * from band to band of outputs: the table of the look-ups is made once, and loads do not pause between two bands.  A sum over columns has no order of its own, so
 * that the columns of a fragment are those that a lane finds side by side: of 64 columns, 16 are each lane's of a quad, four of them a multiplication's.
 *
 * Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), g = lane / 4, q = lane % 4: of w rows g and g + 8, columns 2q, 2q + 1, 2q + 8,
 * 2q + 9; of x the same columns of row g; of the sums rows g and g + 8, columns 2q and 2q + 1.
 */
#include "parts.cuh"

#define BLOCK_COLUMNS 64		/* that have one scale, and are multiplied together */
#define M 16					/* rows of w in a fragment */
#define N 8						/* columns of x */

struct Skinny
{
	MillmCudaMatmul m[MILLM_CUDA_MATMULS];
	unsigned	first_band[MILLM_CUDA_MATMULS + 1];	/* of each; those that are not there begin past the last band */
	MillmCudaFragments x;
	int64_t		split_pitch;	/* floats between the results of two splits */
};

/* Which of the products this band of outputs is of */
static __device__ int
which_of(const Skinny &p, unsigned band)
{
	return (band >= p.first_band[1]) + (band >= p.first_band[2]);
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
		const uint2 u = read_once_8(from);

		words[0] = u.x;
		words[1] = u.y;
	}
	else
#pragma unroll
		for (int k = 0; k < Part<DTYPE>::WORDS; k += 4)
		{
			const uint4 u = read_once_16(from + 4 * k);

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
 * the byte's upper half.  They are twice as far apart as they are long, so that the byte is the second of its pairs' place, and what lies between them is free.
 */
#define N_PAIRS 256
#define PAIR_PITCH (2 * WARP)	/* of 32 bits: 256 bytes */

template <int WARPS>
[[maybe_unused]] static __device__ void
share_pairs(uint32_t *pairs, const MillmCudaWeight &w)
{
	const int	warp = (int) threadIdx.x / WARP;	/* its bytes have one of so many upper halves */
	const int	N_FIRST = 16 / WARPS;
	uint32_t	first[N_FIRST];

#pragma unroll
	for (int j = 0; j < N_FIRST; j++)
		first[j] = to_bf16(w.codebook_unit * w.codebook[N_FIRST * warp + j]);

#pragma unroll
	for (int k = 0; k < 16; k++)
	{
		const uint32_t second = (uint32_t) to_bf16(w.codebook_unit * w.codebook[k]) << 16;

#pragma unroll
		for (int j = 0; j < N_FIRST; j++)
			pairs[((N_FIRST * warp + j) * 16 + k) * PAIR_PITCH + threadIdx.x % WARP] = first[j] | second;
	}
}

[[maybe_unused]] static __device__ uint32_t
look_up_pair(const uint32_t *pairs, uint32_t word, int byte)
{
	const uint32_t at = byte_perm(threadIdx.x % WARP * 4, word, 0x1100 | (unsigned) (4 + byte) << 4);

	return *(const uint32_t *) ((const char *) pairs + at);
}

/*
 * a = this row's half of four fragments.  nothing: 0, which the compiler must not know, or it would load words of bfloat16 into other registers than those of a and
 * move them there, for which it would wait for them a step too early.
 */
template <int DTYPE>
static __device__ void
fill_fragments(uint32_t (*a)[4], int half, const uint32_t *words, const uint32_t *pairs, uint32_t nothing)
{
#pragma unroll
	for (int s = 0; s < 4; s++)
#pragma unroll
		for (int j = 0; j < 2; j++)
			a[s][half + 2 * j] = DTYPE == MILLM_4BIT ? look_up_pair(pairs, words[s / 2], s % 2 * 2 + j) :
				DTYPE == MILLM_INT8 ? two_integers(words[s % Part<DTYPE>::WORDS], 2 * j) : words[(2 * s + j) % Part<DTYPE>::WORDS] ^ nothing;
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
	StoredScale scale[2] = {};
};

/* A lane's rows of a band: its parts of a product's weights, and the blocks of columns in front of each row */
template <int HEIGHT>
struct Rows
{
	const char *parts;
	uint32_t	first[HEIGHT][2];
};

/* The parts of block b of a step, if the row has it: it begins at this block of columns, where these parts are. */
template <int DTYPE, int HEIGHT>
static __device__ void
load_block(Stored<DTYPE, HEIGHT> &s, int b, const char *const (*parts)[2], int block, int last)
{
#pragma unroll
	for (int h = 0; h < 2 * HEIGHT; h++)
		if (block + b <= last)
			load_part<DTYPE>(s.words[b][h / 2][h % 2], parts[h / 2][h % 2] + b * Part<DTYPE>::BYTES);
}

template <int DTYPE, int HEIGHT>
static __device__ void
load_scales(Stored<DTYPE, HEIGHT> &s, const MillmCudaWeight &w, const Rows<HEIGHT> &rows, int block, int last)
{
	const int	STEP = Stored<DTYPE, HEIGHT>::STEP;
	const int	q = (int) threadIdx.x % 4;
	const int	of_lane = block + q % STEP;

#pragma unroll
	for (int half = 0; half < 2 && DTYPE == MILLM_4BIT; half++)
		if (of_lane <= last)
			s.scale[half] = load_scale(w, (q < STEP ? rows.first[0][half] : rows.first[HEIGHT - 1][half]) + of_lane);
}

/*
 * What a block of matmul_skinny has: OUT_WARPS warps that have different outputs, each K_WARPS times, for different columns.
 *
 *   OUTPUTS  of a band
 *   REDUCED  sums of a band that are other warps' than those that add them up, for each lane
 *   BUFFERS  for them: with two, warps begin the next band while these are read
 *   PITCH    from one of them to the next, and from pair to pair
 *   WORDS    of shared memory
 */
template <int DTYPE, int TILES, int HEIGHT, int OUT_WARPS, int K_WARPS>
struct Block
{
	static const bool HAS_PAIRS = DTYPE == MILLM_4BIT;
	static const int THREADS = OUT_WARPS * K_WARPS * WARP;
	static const int OUTPUTS = M * HEIGHT * OUT_WARPS;
	static const int SUMS = HEIGHT * TILES * 4;
	static const int REDUCED = (K_WARPS - 1) * OUT_WARPS * SUMS;
	static const int BUFFERS = 2 * REDUCED <= N_PAIRS ? 2 : 1;
	static const int PITCH = HAS_PAIRS ? PAIR_PITCH : WARP;
	static const int WORDS = PITCH * (HAS_PAIRS ? N_PAIRS : BUFFERS * REDUCED);

	static_assert(BUFFERS * REDUCED <= N_PAIRS, "they lie between the pairs");
};

/*
 * Up to 8 TILES columns of x.  A block has a band of outputs after the other, as far apart as there are blocks, and asks for the first weights of the next while it
 * multiplies the last of this one.  A warp has 16 HEIGHT of the outputs and every so many steps of their columns; so have the splits of a grid.  Sums of 4-bit weights are
 * multiplied by their scale block after block.  The order of a sum's parts is a matter of n_in, K_WARPS, and the splits.
 *
 *   blocks  [at most the bands, splits], and Block's THREADS and WORDS of shared memory
 */
template <int DTYPE, int TILES, int HEIGHT, int OUT_WARPS, int K_WARPS>
static __global__ void __launch_bounds__(OUT_WARPS * K_WARPS * WARP, TILES == 1 ? 2 : 1)
matmul_skinny(const __grid_constant__ Skinny p)
{
#ifdef HAS_TENSOR_CORES
	typedef Block<DTYPE, TILES, HEIGHT, OUT_WARPS, K_WARPS> B;
	const int	STEP = Stored<DTYPE, HEIGHT>::STEP;
	const int	SUMS = B::SUMS;
	const int	WARPS = OUT_WARPS * K_WARPS;
	const bool	HAS_PAIRS = B::HAS_PAIRS;
	LAUNCHED_SHARED(uint32_t, shared, B::WORDS);
	SHARED(float, nested_map, HAS_PAIRS ? 256 : 1);
	const unsigned n_bands = p.first_band[MILLM_CUDA_MATMULS];
	const int	lane = (int) threadIdx.x % WARP;
	const int	g = lane / 4,
				q = lane % 4;
	const int	out_warp = (int) threadIdx.x / WARP % OUT_WARPS;
	const int	k_warp = (int) threadIdx.x / WARP / OUT_WARPS;
	const int	n_blocks = (int) (p.m[0].w.n_in / BLOCK_COLUMNS);
	const int	last = n_blocks - 1;
	const int	first_block = ((int) blockIdx.y * K_WARPS + k_warp) * STEP;	/* of a band, for this warp */
	const int	stride = (int) gridDim.y * K_WARPS * STEP;
	const uint4 *x = (const uint4 *) p.x.data;
	const bool	has_low = TILES <= 2 && p.x.has_low;	/* of more rows nobody has */
	const int	n_columns = has_low ? 2 * p.m[0].n : p.m[0].n;
	const unsigned of_warp = out_warp * HEIGHT * M + g;	/* this lane's first output of a band */
	const uint32_t nothing = (uint32_t) (p.m[0].w.n_in >> 40);
	float	   *others = (float *) shared + B::PITCH - WARP + lane;	/* [BUFFERS, REDUCED], PITCH apart */
	int			buffer = 0;
	int			tabled = which_of(p, blockIdx.x);	/* whose pairs are shared */
	int			asked = tabled;	/* whose weights are asked for */
	Rows<HEIGHT> rows;			/* of these */
	const char *parts[HEIGHT][2];	/* and of the next step's first block of columns */
	Stored<DTYPE, HEIGHT> stored;	/* each part of the next step takes the place of one that has become fragments */

	auto		ask_for = [&] (unsigned band) {
		const MillmCudaWeight &w = p.m[asked = which_of(p, band)].w;
		const unsigned o_lane = (band - p.first_band[asked]) * B::OUTPUTS + of_warp;

		rows.parts = (const char *) w.data + q * (Part<DTYPE>::BYTES / 4);
#pragma unroll
		for (int h = 0; h < 2 * HEIGHT; h++)
		{
			const unsigned o = o_lane + h * 8 < w.n_out ? o_lane + h * 8 : (unsigned) w.n_out - 1;

			rows.first[h / 2][h % 2] = (uint32_t) (w.first / BLOCK_COLUMNS) + o * (unsigned) n_blocks;
		}
	};
	auto		find = [&] (const char *(*parts)[2], int block) {
#pragma unroll
		for (int h = 0; h < 2 * HEIGHT; h++)
			parts[h / 2][h % 2] = rows.parts + (int64_t) (rows.first[h / 2][h % 2] + block) * Part<DTYPE>::BYTES;
	};
	auto		share = [&] (const MillmCudaWeight &w) {
		share_pairs<WARPS>(shared, w);
		if (w.nested_shift >= 0 && threadIdx.x < 256)
			nested_map[threadIdx.x] = w.nested_map[threadIdx.x];
		__syncthreads();
	};
	auto		load_x = [&] (uint4 *to, int tile, int b) {
		const uint4 *from = x + (tile * N + g < n_columns ? tile * n_blocks * (2 * WARP) + lane : q) + (int64_t) b * (2 * WARP);

		to[0] = from[0];
		to[1] = from[WARP];
	};

	ask_for(blockIdx.x);
	find(parts, first_block);
	load_scales<DTYPE, HEIGHT>(stored, p.m[asked].w, rows, first_block, last);
#pragma unroll
	for (int b = 0; b < STEP; b++)
		load_block<DTYPE, HEIGHT>(stored, b, parts, first_block, last);
	if (HAS_PAIRS)
		share(p.m[tabled].w);
	after_previous();			/* only weights were read before */
	for (unsigned band = blockIdx.x; band < n_bands; band += gridDim.x)
	{
		const int	which = which_of(p, band);
		const MillmCudaMatmul &m = p.m[which];
		const int64_t o_band = (int64_t) (band - p.first_band[which]) * B::OUTPUTS;
		float		sum[HEIGHT][TILES][4] = {};

		if (HAS_PAIRS && which != tabled)
			share(p.m[tabled = which].w);	/* those of the product before have been read: its sums were waited for */
		for (int block = first_block; block < n_blocks; block += stride)
		{
			const bool	is_last = block + stride >= n_blocks;
			const bool	is_end = is_last && band + gridDim.x >= n_bands;
			const int	next = is_end ? n_blocks : is_last ? first_block : block + stride;
			float		scale[2];

#pragma unroll
			for (int half = 0; half < 2 && HAS_PAIRS; half++)
			{
				const StoredScale s = stored.scale[half];

				scale[half] = m.w.codebook_scale * (m.w.nested_shift < 0 ? s.absmax : add(mul(nested_map[s.code], s.absmax), m.w.nested_offset));
			}
			if (is_last && !is_end)
				ask_for(band + gridDim.x);
			find(parts, next);
			load_scales<DTYPE, HEIGHT>(stored, p.m[asked].w, rows, next, last);
#pragma unroll
			for (int b = 0; b < STEP; b++)
			{
				uint32_t	a[HEIGHT][4][4];
				float		scale_now[HEIGHT][2];
				uint4		u[TILES <= 2 ? TILES : 1][2];	/* fragments of x: if few, asked for before the weights are looked at; of a column that is not there another's */

				if (block + b > last)
					break;
#pragma unroll
				for (int tile = 0; tile < TILES && TILES <= 2; tile++)
					load_x(u[tile], tile, block + b);
#pragma unroll
				for (int h = 0; h < 2 * HEIGHT; h++)
				{
					fill_fragments<DTYPE>(a[h / 2], h % 2, stored.words[b][h / 2][h % 2], shared, nothing);
					scale_now[h / 2][h % 2] = HAS_PAIRS ? __shfl_sync(ALL_LANES, scale[h % 2], g * 4 + h / 2 * STEP + b) : 1;
				}
				load_block<DTYPE, HEIGHT>(stored, b, parts, next, last);
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
#pragma unroll
			for (int b = 1; b < STEP; b++)
				if (block + b > last)	/* the parts that this step has not */
					load_block<DTYPE, HEIGHT>(stored, b, parts, next, last);
		}
		if (B::BUFFERS == 1)
			__syncthreads();	/* those of the band before have been read; of two buffers, because everyone has come to the sums after them */
		if (k_warp > 0)
#pragma unroll
			for (int k = 0; k < SUMS; k++)
				others[(buffer * B::REDUCED + ((k_warp - 1) * OUT_WARPS + out_warp) * SUMS + k) * B::PITCH] = sum[k / 4 / TILES][k / 4 % TILES][k % 4];
		__syncthreads();
		for (int warp = 0; warp < K_WARPS - 1 && k_warp == 0; warp++)
#pragma unroll
			for (int k = 0; k < SUMS; k++)
				sum[k / 4 / TILES][k / 4 % TILES][k % 4] += others[(buffer * B::REDUCED + (warp * OUT_WARPS + out_warp) * SUMS + k) * B::PITCH];
		buffer = (buffer + 1) % B::BUFFERS;
		if (k_warp > 0)
			continue;
#pragma unroll
		for (int h = 0; h < 2 * HEIGHT; h++)
		{
			const int64_t o = o_band + of_warp + h * 8;
			const bool	is_there = o < m.w.n_out;
			const float unit = DTYPE == MILLM_INT8 && is_there ? mul(((const float *) m.w.scale)[o], INT8_UNIT) : 1;
			const float bias = m.bias && is_there ? m.bias[o] : 0;
			float	   *y = m.y.data + blockIdx.y * p.split_pitch + o;

#pragma unroll
			for (int k = 0; k < 2 * TILES; k++)
			{
				const float (&s)[4] = sum[h / 2][k / 2];
				const float v = unit * (has_low ? s[h % 2 * 2] + s[h % 2 * 2 + 1] : s[h % 2 * 2 + k % 2]) + bias;
				const int	column = k / 2 * N + q * 2 + k % 2;
				const int	t = has_low ? column / 2 : column;
				float	   *to = y + t * m.y.stride;

				if (t < m.n && is_there && !(has_low && k % 2 == 1))
					*to = m.accumulate ? *to + v : v;
			}
		}
	}
#endif
}

/* The splits of each output, in their order: those of sums are [n_splits, n, bands x threads].  blocks [bands, n], threads a band's outputs */
static __global__ void
add_splits(const __grid_constant__ Skinny p, const float *sums, int n_splits)
{
	after_previous();
	const int	which = which_of(p, blockIdx.x);
	const MillmCudaMatmul &m = p.m[which];
	const int64_t o = (int64_t) (blockIdx.x - p.first_band[which]) * blockDim.x + threadIdx.x;
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

/*
 * Blocks for 8, 16, 32 and 64 columns: the more there are, the more outputs share the reading of them.  The first two sum in one order, so that up to
 * MILLM_CUDA_SKINNY_ROWS rows a row's bits do not depend on its company.
 */
struct Shape
{
	void		(*kernel) (Skinny);
	int			outputs;		/* of a band */
	int			threads;
	int			blocks_at_once;	/* of columns, that a block's warps have */
	int			shared;			/* bytes */
};

template <int DTYPE, int TILES, int HEIGHT, int OUT_WARPS, int K_WARPS>
static constexpr Shape
shape()
{
	typedef Block<DTYPE, TILES, HEIGHT, OUT_WARPS, K_WARPS> B;

	return {matmul_skinny<DTYPE, TILES, HEIGHT, OUT_WARPS, K_WARPS>, B::OUTPUTS, B::THREADS, K_WARPS * Stored<DTYPE, HEIGHT>::STEP, B::WORDS * 4};
}

template <int DTYPE>
static Shape
shape_of(int i)
{
	const Shape shapes[MILLM_CUDA_SKINNY_SHAPES] = {shape<DTYPE, 1, 1, 1, 8>(), shape<DTYPE, 2, 1, 2, 8>(), shape<DTYPE, 4, 2, 4, 2>(),
		shape<DTYPE, 8, 2, 4, 2>()};

	return shapes[i];
}

/* The place of a weight's format in MillmCudaSkinny */
static int
format_of(MillmDtype dtype)
{
	return dtype == MILLM_BF16 ? 0 : dtype == MILLM_INT8 ? 1 : 2;
}

static Shape
shape_of(int format, int i)
{
	return format == 0 ? shape_of<MILLM_BF16>(i) : format == 1 ? shape_of<MILLM_INT8>(i) : shape_of<MILLM_4BIT>(i);
}

cudaError_t
millm_cuda_skinny_prepare(MillmCudaSkinny *skinny)
{
	int			device,
				n_multiprocessors = 0;
	cudaError_t status = cudaGetDevice(&device);

	if (status == cudaSuccess)
		status = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
	for (int i = 0; i < MILLM_CUDA_SKINNY_FORMATS * MILLM_CUDA_SKINNY_SHAPES && status == cudaSuccess; i++)
	{
		const Shape shape = shape_of(i / MILLM_CUDA_SKINNY_SHAPES, i % MILLM_CUDA_SKINNY_SHAPES);
		int			n = 0;

		status = cudaFuncSetAttribute((const void *) shape.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared);
		if (status == cudaSuccess)
			status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, (const void *) shape.kernel, shape.threads, (size_t) shape.shared);
		skinny->n_resident[i / MILLM_CUDA_SKINNY_SHAPES][i % MILLM_CUDA_SKINNY_SHAPES] = n * n_multiprocessors;
	}
	return status;
}

cudaError_t
millm_cuda_matmul_skinny(const MillmCudaSkinny *skinny, const MillmCudaMatmul *m, int n_matmuls, const MillmCudaFragments *f, MillmCudaQueue *queue)
{
	const int	n_tiles = ((f->has_low ? 2 * m->n : m->n) + N - 1) / N;
	const int	format = format_of(m->w.dtype);
	const int	i = n_tiles == 1 ? 0 : n_tiles == 2 ? 1 : n_tiles <= 4 ? 2 : 3;
	const Shape shape = shape_of(format, i);
	const int64_t n_steps = m->w.n_in / BLOCK_COLUMNS / shape.blocks_at_once;	/* of a warp without splits, rounded down */
	unsigned	n_resident = (unsigned) skinny->n_resident[format][i];
	unsigned	n_splits = 1;
	unsigned	n_bands = 0;
	Skinny		p = {},
				of_splits;
	cudaError_t status;

	for (int j = 0; j < MILLM_CUDA_MATMULS; j++)
	{
		p.first_band[j] = n_bands;
		if (j < n_matmuls)
		{
			p.m[j] = m[j];
			n_bands += (unsigned) ((m[j].w.n_out + shape.outputs - 1) / shape.outputs);
		}
	}
	p.first_band[MILLM_CUDA_MATMULS] = n_bands;
	p.x = *f;
	if (n_tiles > 2 && n_bands < MILLM_CUDA_SKINNY_BLOCKS)
		n_splits = MILLM_CUDA_SKINNY_BLOCKS / n_bands;
	if (n_splits > n_steps)
		n_splits = n_steps > 1 ? (unsigned) n_steps : 1;
	of_splits = p;
	for (int j = 0; j < n_matmuls && n_splits > 1; j++)
	{
		MillmCudaMatmul *of_split = &of_splits.m[j];

		of_split->y = {skinny->partials + (int64_t) p.first_band[j] * shape.outputs, (int64_t) n_bands * shape.outputs};
		of_split->bias = NULL;
		of_split->accumulate = false;
		of_splits.split_pitch = m->n * of_split->y.stride;
	}
	n_resident = n_resident > n_splits ? n_resident / n_splits : 1;
	status = launch_sharing(shape.kernel, dim3(n_bands < n_resident ? n_bands : n_resident, n_splits), shape.threads, shape.shared, queue, of_splits);
	if (status != cudaSuccess || n_splits == 1)
		return status;
	return launch(add_splits, dim3(n_bands, (unsigned) m->n), shape.outputs, queue, p, (const float *) skinny->partials, (int) n_splits);
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
