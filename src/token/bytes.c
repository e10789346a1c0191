/*
 * bytes.c -- a growing run of bytes, a map from byte strings to numbers (open addressing, load below 3/4), large tables and their hash.
 */
#include "bytes.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "arith.h"

#define HUGE_PAGE ((size_t) 2 << 20)

bool
millm_bytes_reserve(Bytes *b, size_t extra)
{
	size_t		need;
	size_t		capacity;
	char	   *data;

	if (__builtin_add_overflow(b->n, extra, &need))
		return false;
	if (need <= b->capacity && b->data)
		return true;
	capacity = b->capacity ? b->capacity : 64;
	while (capacity < need)
		if (!millm_mul_size(capacity, 2, &capacity))
			return false;
	data = realloc(b->data, capacity);
	if (!data)
		return false;
	b->data = data;
	b->capacity = capacity;
	return true;
}

bool
millm_bytes_add(Bytes *b, const void *data, size_t n)
{
	if (!millm_bytes_reserve(b, n))
		return false;
	if (n > 0)
		memcpy(b->data + b->n, data, n);
	b->n += n;
	return true;
}

void
millm_bytes_free(Bytes *b)
{
	free(b->data);
	*b = (Bytes) {0};
}

/* Every bit of h reaches every bit of the result: both halves of the product are used. */
static inline uint64_t
mix(uint64_t h)
{
	unsigned __int128 product = (unsigned __int128) h * UINT64_C(0xD6E8FEB86659FD93);

	return (uint64_t) product ^ (uint64_t) (product >> 64);
}

static uint32_t
hash_bytes(const char *key, size_t n)
{
	uint64_t	h = n * UINT64_C(0x9E3779B97F4A7C15);
	uint64_t	w = 0;

	for (; n >= 8; key += 8, n -= 8)
		h = mix(h ^ millm_get_le64(key));
	if (n >= 4)
		w = millm_get_le32(key) | (uint64_t) millm_get_le32(key + n - 4) << 32;
	else if (n > 0)
		w = (unsigned char) key[0] | (uint64_t) (unsigned char) key[n / 2] << 8 | (uint64_t) (unsigned char) key[n - 1] << 16;
	return (uint32_t) mix(h ^ w);
}

MapKey
millm_map_key(const char *text, uint32_t n)
{
	return (MapKey) {text, n, hash_bytes(text, n)};
}

void
millm_map_prefetch(const StringMap *map, MapKey key)
{
	if (map->n_slots > 0)
		__builtin_prefetch(&map->slots[key.hash & (map->n_slots - 1)]);
}

void
millm_map_prefetch_text(const StringMap *map, MapKey key)
{
	const StringMapSlot *slot;

	if (map->n_slots == 0)
		return;
	slot = &map->slots[key.hash & (map->n_slots - 1)];
	if (slot->value >= 0)
		__builtin_prefetch(map->keys.data + slot->key.offset);
}

/* The slot that holds key, or the free one where it belongs.  The map has slots. */
static inline StringMapSlot *
find_slot(const StringMap *map, MapKey key)
{
	size_t		mask = map->n_slots - 1;

	for (size_t i = key.hash & mask;; i = (i + 1) & mask)
	{
		StringMapSlot *slot = &map->slots[i];

		if (slot->value < 0)
			return slot;
		if (slot->hash == key.hash && slot->key.n == key.n &&
			memcmp(map->keys.data + slot->key.offset, key.text, key.n) == 0)
			return slot;
	}
}

bool
millm_map_reserve(StringMap *map, size_t n, size_t key_bytes)
{
	size_t		n_slots = map->n_slots ? map->n_slots : 64;
	StringMapSlot *old = map->slots;
	StringMapSlot *slots;

	if (n > SIZE_MAX / 8 - map->n || !millm_bytes_reserve(&map->keys, key_bytes))
		return false;
	/* 2/3 at most: some more fit, without another table */
	while (n_slots / 3 * 2 < map->n + n)
		n_slots *= 2;
	if (n_slots == map->n_slots)
		return true;
	slots = millm_table_alloc(n_slots, sizeof(*slots));
	if (!slots)
		return false;
	for (size_t i = 0; i < n_slots; i++)
		slots[i] = (StringMapSlot) {.value = -1};
	for (size_t i = 0; i < map->n_slots; i++)
		if (old[i].value >= 0)
		{
			size_t		j = old[i].hash & (n_slots - 1);

			while (slots[j].value >= 0)
				j = (j + 1) & (n_slots - 1);
			slots[j] = old[i];
		}
	map->slots = slots;
	map->n_slots = n_slots;
	free(old);
	return true;
}

int32_t
millm_map_find(const StringMap *map, MapKey key)
{
	return map->n == 0 ? -1 : find_slot(map, key)->value;
}

int32_t
millm_map_get(const StringMap *map, const char *key, size_t n)
{
	return n > UINT32_MAX ? -1 : millm_map_find(map, millm_map_key(key, (uint32_t) n));
}

bool
millm_map_add(StringMap *map, MapKey key, int32_t value, bool *is_new)
{
	size_t		offset = map->keys.n;
	StringMapSlot *slot;

	if (map->n >= map->n_slots / 4 * 3 && !millm_map_reserve(map, map->n + 1, 0))
		return false;
	slot = find_slot(map, key);
	*is_new = slot->value < 0;
	if (!*is_new)
		return true;
	if (offset > UINT32_MAX - key.n || !millm_bytes_add(&map->keys, key.text, key.n))
		return false;
	*slot = (StringMapSlot) {key.hash, {(uint32_t) offset, key.n}, value};
	map->n++;
	return true;
}

bool
millm_map_adopt(StringMap *map, char *keys, size_t keys_n, StringMapSlot *slots, size_t n_slots, size_t n_values)
{
	size_t		n = 0;
	bool		is_bad = (n_slots & (n_slots - 1)) != 0;

	for (size_t i = 0; i < n_slots; i++)
	{
		const StringMapSlot *slot = &slots[i];

		if (slot->value < 0)
			continue;
		is_bad |= (size_t) slot->value >= n_values || slot->key.offset > keys_n || slot->key.n > keys_n - slot->key.offset;
		n++;
	}
	if (is_bad || (n > 0 && n == n_slots))	/* a search ends at a free slot */
		return false;
	*map = (StringMap) {.keys = {.data = keys, .n = keys_n}, .slots = slots, .n_slots = n_slots, .n = n};
	return true;
}

void
millm_map_free(StringMap *map)
{
	millm_bytes_free(&map->keys);
	free(map->slots);
	*map = (StringMap) {0};
}

void *
millm_table_alloc(size_t n, size_t size)
{
	size_t		bytes;
	void	   *table;

	if (!millm_mul_size(n, size, &bytes) || bytes > SIZE_MAX - HUGE_PAGE)
		return NULL;
	if (bytes < HUGE_PAGE / 2)
		return malloc(bytes);
	bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
	table = aligned_alloc(HUGE_PAGE, bytes);
	if (table)
		(void) madvise(table, bytes, MADV_HUGEPAGE);	/* advice: without it the table is as good, only slower */
	return table;
}

uint64_t
millm_bytes_hash(const void *data, size_t n)
{
	const char *p = data;
	uint64_t	h[4] = {n, 1, 2, 3};	/* four at once: a multiplication takes as long as it takes to begin three others */
	char		last[32] = {0};

	for (; n >= 32; p += 32, n -= 32)
		for (int i = 0; i < 4; i++)
			h[i] = mix(h[i] ^ millm_get_le64(p + 8 * i));
	if (n > 0)
		memcpy(last, p, n);
	for (int i = 0; i < 4; i++)
		h[i] = mix(h[i] ^ millm_get_le64(last + 8 * i));
	return mix(h[0] ^ mix(h[1] ^ mix(h[2] ^ mix(h[3]))));
}
