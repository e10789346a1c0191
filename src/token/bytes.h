/*
 * bytes.h -- memory of this room: a growing run of bytes, a map from byte strings to numbers, and large tables.
 */
#ifndef MILLM_BYTES_H
#define MILLM_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed is empty.  May hold NUL; is not NUL-terminated. */
typedef struct Bytes
{
	char	   *data;
	size_t		n;
	size_t		capacity;
} Bytes;

/* These return false, and change nothing, when memory is out. */
extern bool millm_bytes_reserve(Bytes *b, size_t extra);
extern bool millm_bytes_add(Bytes *b, const void *data, size_t n);
extern void millm_bytes_free(Bytes *b);

/* A part of some Bytes, or of a text, by position: such a pair survives that its owner moves. */
typedef struct Span
{
	uint32_t	offset;
	uint32_t	n;
} Span;

typedef struct StringMapSlot
{
	uint32_t	hash;
	Span		key;			/* in the map's keys */
	int32_t		value;			/* -1: the slot is free */
} StringMapSlot;

/* Keys are copied into one arena of less than 4 GiB.  Zeroed is empty.  Read-only use is thread-safe. */
typedef struct StringMap
{
	Bytes		keys;
	StringMapSlot *slots;
	size_t		n_slots;		/* a power of two, or 0 */
	size_t		n;
} StringMap;

/* Make room for n more keys of together key_bytes; false: out of memory. */
extern bool millm_map_reserve(StringMap *map, size_t n, size_t key_bytes);
/* A key to look for: text[0..n), borrowed, and its hash. */
typedef struct MapKey
{
	const char *text;
	uint32_t	n;
	uint32_t	hash;
} MapKey;

extern MapKey millm_map_key(const char *text, uint32_t n);
/* Fetch the place of a key that will be asked for soon: a large map is read at the speed of memory, not of the cache. */
extern void millm_map_prefetch(const StringMap *map, MapKey key);
/* The same, of the text to which that place is likely to point: some time later. */
extern void millm_map_prefetch_text(const StringMap *map, MapKey key);
/* The value under a key, or -1. */
extern int32_t millm_map_find(const StringMap *map, MapKey key);
extern int32_t millm_map_get(const StringMap *map, const char *key, size_t n);
/* Put key with its value (>= 0); a key that is there keeps the value it has, and *is_new is false.  False: out of memory. */
extern bool millm_map_add(StringMap *map, MapKey key, int32_t value, bool *is_new);
/*
 * Make *map, zeroed, of a stranger's keys and slots, borrowed: false if looking something up there could read elsewhere, not end, or
 * find a value that is not below n_values.
 */
extern bool millm_map_adopt(StringMap *map, char *keys, size_t keys_n, StringMapSlot *slots, size_t n_slots, size_t n_values);
extern void millm_map_free(StringMap *map);

/*
 * Memory for a table of n elements, uninitialized; free() ends it.  NULL: out of memory.  A large one lies on huge
 * pages where the system has them: else the page faults take longer than what is put into it.
 */
extern void *millm_table_alloc(size_t n, size_t size);

/* Tell one run of bytes from any other by accident, at the speed of memory; it is no cryptographic hash. */
extern uint64_t millm_bytes_hash(const void *data, size_t n);

#endif
