/*
 * bytes.c -- a growing run of bytes, and a map from byte strings to numbers (open addressing, load below 1/2).
 */
#include "bytes.h"

#include <stdlib.h>
#include <string.h>

#include "arith.h"

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

static uint32_t
hash_bytes(const char *key, size_t n)
{
	uint64_t	h = n * UINT64_C(0x9E3779B97F4A7C15);
	uint64_t	w = 0;

	for (; n >= 8; key += 8, n -= 8)
	{
		h = (h ^ millm_get_le64(key)) * UINT64_C(0xD6E8FEB86659FD93);
		h ^= h >> 32;
	}
	if (n >= 4)
		w = millm_get_le32(key) | (uint64_t) millm_get_le32(key + n - 4) << 32;
	else if (n > 0)
		w = (unsigned char) key[0] | (uint64_t) (unsigned char) key[n / 2] << 8 | (uint64_t) (unsigned char) key[n - 1] << 16;
	h = (h ^ w) * UINT64_C(0xD6E8FEB86659FD93);
	return (uint32_t) (h >> 32);
}

/* The slot that holds key, or the free one where it belongs.  The map has slots. */
static StringMapSlot *
find_slot(const StringMap *map, uint32_t hash, const char *key, size_t n)
{
	size_t		mask = map->n_slots - 1;

	for (size_t i = hash & mask;; i = (i + 1) & mask)
	{
		StringMapSlot *slot = &map->slots[i];

		if (slot->value < 0)
			return slot;
		if (slot->hash == hash && slot->key.n == n && memcmp(map->keys.data + slot->key.offset, key, n) == 0)
			return slot;
	}
}

static bool
grow(StringMap *map)
{
	size_t		n_slots = map->n_slots ? map->n_slots * 2 : 64;
	StringMapSlot *old = map->slots;
	StringMapSlot *slots = malloc(n_slots * sizeof(*slots));

	if (!slots)
		return false;
	for (size_t i = 0; i < n_slots; i++)
		slots[i].value = -1;
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
millm_map_get(const StringMap *map, const char *key, size_t n)
{
	if (map->n == 0)
		return -1;
	return find_slot(map, hash_bytes(key, n), key, n)->value;
}

bool
millm_map_put(StringMap *map, const char *key, size_t n, int32_t value)
{
	uint32_t	hash = hash_bytes(key, n);
	StringMapSlot *slot;

	if (map->n >= map->n_slots / 2 && !grow(map))
		return false;
	slot = find_slot(map, hash, key, n);
	if (slot->value < 0)
	{
		size_t		offset = map->keys.n;

		if (offset > UINT32_MAX - n || n > UINT32_MAX || !millm_bytes_add(&map->keys, key, n))
			return false;
		*slot = (StringMapSlot) {hash, {(uint32_t) offset, (uint32_t) n}, value};
		map->n++;
	}
	slot->value = value;
	return true;
}

void
millm_map_free(StringMap *map)
{
	millm_bytes_free(&map->keys);
	free(map->slots);
	*map = (StringMap) {0};
}
