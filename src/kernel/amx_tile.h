/*
 * amx_tile.h -- the tile instructions that amx.c needs: eight tiles, each of 16 rows of 64 bytes.
 *
 * Assembly, because GCC 12's intrinsics do not say that a tile load reads memory: stores into a buffer that only tiles read may be
 * dropped.  test/unit/amx_emulated.c has the same names in plain C.
 *
 * A tile is named by a literal number, 0 to 7.  Between tile_configure() and tile_release() only; pointers need no alignment.
 */
#ifndef MILLM_KERNEL_AMX_TILE_H
#define MILLM_KERNEL_AMX_TILE_H

#include <stdint.h>

#define TILE_ROWS		16
#define TILE_ROW_BYTES	64
#define TILE_BYTES		(TILE_ROWS * TILE_ROW_BYTES)

typedef struct TileConfig
{
	uint8_t		palette;
	uint8_t		start_row;
	uint8_t		reserved[14];
	uint16_t	row_bytes[16];
	uint8_t		rows[16];
} TileConfig;
_Static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

static inline void
tile_configure(void)
{
	TileConfig	config = {.palette = 1};

	for (int t = 0; t < 8; t++)
	{
		config.row_bytes[t] = TILE_ROW_BYTES;
		config.rows[t] = TILE_ROWS;
	}
	__asm__ volatile ("ldtilecfg %0" : : "m" (config));
}

/* Tiles back in their initial state cost a context switch nothing. */
static inline void
tile_release(void)
{
	__asm__ volatile ("tilerelease" : : : "memory");
}

#define TILE_NAME_(t)	"%%tmm" #t
#define TILE_NAME(t)	TILE_NAME_(t)

#define tile_zero(t) \
	__asm__ volatile ("tilezero " TILE_NAME(t) : : )
/* Row r is 64 bytes at p + r * stride. */
#define tile_load(t, p, stride) \
	__asm__ volatile ("tileloadd (%0,%1,1), " TILE_NAME(t) : : "r" (p), "r" ((int64_t) (stride)) : "memory")
#define tile_store(t, p, stride) \
	__asm__ volatile ("tilestored " TILE_NAME(t) ", (%0,%1,1)" : : "r" (p), "r" ((int64_t) (stride)) : "memory")
/*
 * float32 sum[i, j] += a[i, 0] * b[0, j] + ... + a[i, 31] * b[31, j]; a is bfloat16 [16, 32], row k of b has elements 2 k and 2 k + 1 of
 * each of 16 columns.
 */
#define tile_dot_bf16(sum, a, b) \
	__asm__ volatile ("tdpbf16ps " TILE_NAME(b) ", " TILE_NAME(a) ", " TILE_NAME(sum) : : )

#endif
