/*
 * arith.h -- arithmetic on numbers that a stranger chose: checked, never wrapped.
 *
 * Each returns false, and leaves *out undefined, when the result does not fit.
 */
#ifndef MILLM_ARITH_H
#define MILLM_ARITH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline bool
millm_mul_u64(uint64_t a, uint64_t b, uint64_t *out)
{
	return !__builtin_mul_overflow(a, b, out);
}

static inline bool
millm_add_u64(uint64_t a, uint64_t b, uint64_t *out)
{
	return !__builtin_add_overflow(a, b, out);
}

static inline bool
millm_mul_size(size_t a, size_t b, size_t *out)
{
	return !__builtin_mul_overflow(a, b, out);
}

/* Little-endian readers over unaligned bytes. */
static inline uint32_t
millm_get_le32(const void *p)
{
	const unsigned char *b = p;

	return (uint32_t) b[0] | (uint32_t) b[1] << 8 | (uint32_t) b[2] << 16 | (uint32_t) b[3] << 24;
}

static inline uint64_t
millm_get_le64(const void *p)
{
	return (uint64_t) millm_get_le32(p) | (uint64_t) millm_get_le32((const char *) p + 4) << 32;
}

static inline void
millm_put_le32(void *p, uint32_t v)
{
	unsigned char *b = p;

	b[0] = (unsigned char) v;
	b[1] = (unsigned char) (v >> 8);
	b[2] = (unsigned char) (v >> 16);
	b[3] = (unsigned char) (v >> 24);
}

static inline void
millm_put_le64(void *p, uint64_t v)
{
	millm_put_le32(p, (uint32_t) v);
	millm_put_le32((unsigned char *) p + 4, (uint32_t) (v >> 32));
}

#endif
