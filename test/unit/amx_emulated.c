/*
 * amx_emulated.c -- src/kernel/amx.c over tiles in plain C: millm_kernels_amx_emulated() fills the table as millm_kernels_amx() does.
 *
 * Sums have the order, the roundings and the treatment of denormals that Intel's manual gives TDPBF16PS.  A tile's loads and stores are
 * ordinary ones, which the address sanitizer sees; a tile that is used while none are configured ends the test.
 */
#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "amx_tile.h"
#include "half.h"

static _Thread_local struct
{
	bool		is_configured;
	char		tile[8][TILE_BYTES];
} tiles;

static void
emulated_configure(void)
{
	assert(!tiles.is_configured);
	memset(&tiles, 0xFF, sizeof(tiles));	/* NaNs */
	tiles.is_configured = true;
}

static void
emulated_release(void)
{
	assert(tiles.is_configured);
	tiles.is_configured = false;
}

static void
emulated_zero(int t)
{
	assert(tiles.is_configured);
	memset(tiles.tile[t], 0, TILE_BYTES);
}

static void
emulated_load(int t, const char *p, int64_t stride)
{
	assert(tiles.is_configured);
	for (int r = 0; r < TILE_ROWS; r++)
		memcpy(tiles.tile[t] + r * TILE_ROW_BYTES, p + r * stride, TILE_ROW_BYTES);
}

static void
emulated_store(int t, char *p, int64_t stride)
{
	assert(tiles.is_configured);
	for (int r = 0; r < TILE_ROWS; r++)
		memcpy(p + r * stride, tiles.tile[t] + r * TILE_ROW_BYTES, TILE_ROW_BYTES);
}

static inline float
flush_denormal(float f)
{
	return fabsf(f) < FLT_MIN ? copysignf(0, f) : f;
}

/* Even and odd elements are summed apart, fused, then together, and that is added to the tile. */
static void
emulated_dot_bf16(int sum, int a, int b)
{
	uint16_t	va[16][32],
				vb[16][32];
	float		s[16][16];

	assert(tiles.is_configured);
	memcpy(va, tiles.tile[a], TILE_BYTES);
	memcpy(vb, tiles.tile[b], TILE_BYTES);
	memcpy(s, tiles.tile[sum], TILE_BYTES);
	for (int i = 0; i < 16; i++)
	{
		float		partial[32] = {0};

		for (int k = 0; k < 16; k++)
			for (int j = 0; j < 32; j++)
				partial[j] = flush_denormal(fmaf(flush_denormal(millm_bf16_to_f32(va[i][2 * k + j % 2])),
												 flush_denormal(millm_bf16_to_f32(vb[k][j])), partial[j]));
		for (int j = 0; j < 16; j++)
			s[i][j] = flush_denormal(flush_denormal(s[i][j]) + flush_denormal(partial[2 * j] + partial[2 * j + 1]));
	}
	memcpy(tiles.tile[sum], s, TILE_BYTES);
}

#undef tile_zero
#undef tile_load
#undef tile_store
#undef tile_dot_bf16
#define tile_configure	emulated_configure
#define tile_release	emulated_release
#define tile_zero		emulated_zero
#define tile_load		emulated_load
#define tile_store		emulated_store
#define tile_dot_bf16	emulated_dot_bf16
#define millm_kernels_amx millm_kernels_amx_emulated

#include "../../src/kernel/amx.c"
