/*
 * avx512_quant.h -- what AVX-512's files for quantized weights share: rows, and the scales of their blocks.
 */
#ifndef MILLM_KERNEL_AVX512_QUANT_H
#define MILLM_KERNEL_AVX512_QUANT_H

#include "avx512.h"

/* ---- scales of the blocks of a row ---- */

typedef struct MapPlanes
{
	_Alignas(64) uint8_t byte[4][256];	/* the nested map's floats, byte by byte */
} MapPlanes;

INLINE void
split_map(MapPlanes *p, const float *map)
{
	for (int i = 0; i < 256; i += 16)
	{
		__m512i		v = _mm512_loadu_si512(map + i);

		for (int k = 0; k < 4; k++)
			_mm_store_si128((__m128i *) (p->byte[k] + i), _mm512_cvtepi32_epi8(_mm512_srlv_epi32(v, _mm512_set1_epi32(8 * k))));
	}
}

/* s[64] = map[codes[64]] * factor + offset: each byte of the map's floats is looked up in a table of 256 that lies in four registers. */
INLINE void
look_up_64(float *s, const MapPlanes *p, __m512i codes, float factor, float offset)
{
	/* so that what the unpacking below interleaves comes out in order: position 16 l + 4 v + m gets code 16 v + 4 l + m */
	const __m512i order = _mm512_set_epi32(0x3F3E3D3C, 0x2F2E2D2C, 0x1F1E1D1C, 0x0F0E0D0C, 0x3B3A3938, 0x2B2A2928, 0x1B1A1918, 0x0B0A0908,
										   0x37363534, 0x27262524, 0x17161514, 0x07060504, 0x33323130, 0x23222120, 0x13121110, 0x03020100);
	__m512i		b[4];
	__m512i		v[4];
	__m512i		low01, high01, low23, high23;
	__mmask64	upper;

	codes = _mm512_permutexvar_epi8(order, codes);
	upper = _mm512_movepi8_mask(codes);
	for (int k = 0; k < 4; k++)
	{
		const __m512i *t = (const __m512i *) p->byte[k];

		b[k] = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(t[0], codes, t[1]), upper, _mm512_permutex2var_epi8(t[2], codes, t[3]));
	}
	low01 = _mm512_unpacklo_epi8(b[0], b[1]);
	high01 = _mm512_unpackhi_epi8(b[0], b[1]);
	low23 = _mm512_unpacklo_epi8(b[2], b[3]);
	high23 = _mm512_unpackhi_epi8(b[2], b[3]);
	v[0] = _mm512_unpacklo_epi16(low01, low23);
	v[1] = _mm512_unpackhi_epi16(low01, low23);
	v[2] = _mm512_unpacklo_epi16(high01, high23);
	v[3] = _mm512_unpackhi_epi16(high01, high23);
	for (int k = 0; k < 4; k++)
		_mm512_storeu_ps(s + 16 * k, _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(v[k]), _mm512_set1_ps(factor)), _mm512_set1_ps(offset)));
}

/*
 * s[n] = the scales of n groups of 64 from group first of the tensor on; s has room for 64 more.  Each product and sum is rounded by
 * itself, as in the definition (tensor.h).  Asks for the next n.
 */
INLINE void
group_scales(float *s, const MillmWeight *w, const MapPlanes *planes, int64_t first, int64_t n)
{
	const int	per_block = w->block_size / 64;

	if (per_block != 1)
		for (int64_t i = 0; i < n; i++)
			s[i] = block_scale(w, (first + i) / per_block);
	else if (w->nested_block_size == 0)
		memcpy(s, (const char *) w->absmax + first * 4, (size_t) n * 4);
	else
	{
		const uint8_t *codes = (const uint8_t *) w->absmax + first;

		for (int64_t i = 0, end; i < n; i = end)
		{
			int64_t		group = (first + i) / w->nested_block_size;
			float		factor;

			memcpy(&factor, (const char *) w->nested_absmax + group * 4, 4);
			end = (group + 1) * w->nested_block_size - first;
			for (end = end < n ? end : n; i < end; i += 64)
			{
				_mm_prefetch((const char *) codes + n + i, _MM_HINT_T1);
				look_up_64(s + i, planes, end - i >= 64 ? _mm512_loadu_si512(codes + i)
						   : _mm512_maskz_loadu_epi8((UINT64_C(1) << (end - i)) - 1, codes + i), factor, w->nested_offset);
			}
		}
	}
}

/* The first group of 64 of row o. */
INLINE int64_t
first_group(const MillmWeight *w, int64_t o)
{
	return (w->first + o * w->n_in) / 64;
}

/* The table's entries for MILLM_FORM_I16_TILES (avx512_tiles.c). */
extern void millm_kernels_avx512_tiles(MillmKernels *k);

#endif
