/*
 * hash.c -- see hash.h.
 */
#include "hash.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void
millm_hash_begin(MillmHash *h, const char *expected, int64_t size)
{
	char		header[40];

	memset(h, 0, sizeof(*h));
	h->is_sha256 = strlen(expected) == 64;
	if (h->is_sha256)
	{
		SHA256_Init(&h->sha256);
		return;
	}
	/* git's blob id: sha1 over "blob " + length + NUL + content; the NUL is part of it */
	SHA1_Init(&h->sha1);
	SHA1_Update(&h->sha1, header, (size_t) snprintf(header, sizeof(header), "blob %" PRId64, size) + 1);
}

void
millm_hash_update(MillmHash *h, const void *data, size_t len)
{
	if (h->is_sha256)
		SHA256_Update(&h->sha256, data, len);
	else
		SHA1_Update(&h->sha1, data, len);
}

void
millm_hash_hex(const MillmHash *h, char hex[MILLM_HASH_HEX])
{
	unsigned char digest[SHA256_DIGEST_LENGTH];
	MillmHash	end = *h;
	int			n = h->is_sha256 ? SHA256_DIGEST_LENGTH : SHA_DIGEST_LENGTH;

	if (h->is_sha256)
		SHA256_Final(digest, &end.sha256);
	else
		SHA1_Final(digest, &end.sha1);
	for (int i = 0; i < n; i++)
		snprintf(hex + 2 * i, 3, "%02x", digest[i]);
}

/* "sha256 BITS CHAINING-WORDS REST": the words as 8 hex digits each, then the bytes of the unfinished block. */
void
millm_hash_save(const MillmHash *h, char state[MILLM_HASH_STATE])
{
	const unsigned char *rest = h->is_sha256 ? (const unsigned char *) h->sha256.data : (const unsigned char *) h->sha1.data;
	const uint32_t words[8] = {h->sha1.h0, h->sha1.h1, h->sha1.h2, h->sha1.h3, h->sha1.h4};
	unsigned	n_rest = h->is_sha256 ? h->sha256.num : h->sha1.num;
	uint64_t	bits = h->is_sha256 ? (uint64_t) h->sha256.Nh << 32 | h->sha256.Nl : (uint64_t) h->sha1.Nh << 32 | h->sha1.Nl;
	int			at = snprintf(state, MILLM_HASH_STATE, "%s %016" PRIx64 " ", h->is_sha256 ? "sha256" : "sha1", bits);

	for (int i = 0; i < (h->is_sha256 ? 8 : 5); i++)
		at += snprintf(state + at, (size_t) (MILLM_HASH_STATE - at), "%08x", h->is_sha256 ? h->sha256.h[i] : words[i]);
	at += snprintf(state + at, (size_t) (MILLM_HASH_STATE - at), " ");
	for (unsigned i = 0; i < n_rest; i++)
		at += snprintf(state + at, (size_t) (MILLM_HASH_STATE - at), "%02x", rest[i]);
}

bool
millm_hash_restore(MillmHash *h, const char *state)
{
	MillmHash	r;
	int			n_words = h->is_sha256 ? 8 : 5;
	int			at = 0;
	uint64_t	bits;
	uint32_t	words[8] = {0};
	unsigned char rest[64] = {0};
	unsigned	n_rest = 0;

	if (sscanf(state, h->is_sha256 ? "sha256 %16" SCNx64 " %n" : "sha1 %16" SCNx64 " %n", &bits, &at) != 1 || at == 0)
		return false;
	for (int i = 0; i < n_words; i++, at += 8)
		if (strspn(state + at, "0123456789abcdef") < 8 || sscanf(state + at, "%8x", &words[i]) != 1)
			return false;
	if (state[at++] != ' ')
		return false;
	for (; state[at]; at += 2)
	{
		unsigned	byte;

		if (n_rest == sizeof(rest) || strspn(state + at, "0123456789abcdef") < 2 || sscanf(state + at, "%2x", &byte) != 1)
			return false;
		rest[n_rest++] = (unsigned char) byte;
	}
	if (n_rest == sizeof(rest) || n_rest != bits / 8 % 64 || bits % 8 != 0)
		return false;
	millm_hash_begin(&r, h->is_sha256 ? "0000000000000000000000000000000000000000000000000000000000000000" : "", 0);
	if (r.is_sha256)
	{
		memcpy(r.sha256.h, words, sizeof(words));
		memcpy(r.sha256.data, rest, sizeof(rest));
		r.sha256.num = n_rest;
		r.sha256.Nl = (uint32_t) bits;
		r.sha256.Nh = (uint32_t) (bits >> 32);
	}
	else
	{
		r.sha1.h0 = words[0];
		r.sha1.h1 = words[1];
		r.sha1.h2 = words[2];
		r.sha1.h3 = words[3];
		r.sha1.h4 = words[4];
		memcpy(r.sha1.data, rest, sizeof(rest));
		r.sha1.num = n_rest;
		r.sha1.Nl = (uint32_t) bits;
		r.sha1.Nh = (uint32_t) (bits >> 32);
	}
	*h = r;
	return true;
}

/* --- Beside its owner -------------------------------------------------------------------------------- */

struct MillmHasher
{
	pthread_t	thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	MillmHash  *hash;			/* NULL: idle */
	const void *data;
	size_t		len;
	bool		quit;
};

static void *
hash_beside(void *arg)
{
	MillmHasher *s = arg;

	pthread_mutex_lock(&s->lock);
	for (;;)
	{
		while (!s->hash && !s->quit)
			pthread_cond_wait(&s->changed, &s->lock);
		if (s->quit)
			break;
		pthread_mutex_unlock(&s->lock);
		millm_hash_update(s->hash, s->data, s->len);
		pthread_mutex_lock(&s->lock);
		s->hash = NULL;
		pthread_cond_signal(&s->changed);
	}
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

MillmHasher *
millm_hasher_create(void)
{
	MillmHasher *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->changed, NULL);
	if (pthread_create(&s->thread, NULL, hash_beside, s) == 0)
		return s;
	pthread_cond_destroy(&s->changed);
	pthread_mutex_destroy(&s->lock);
	free(s);
	return NULL;
}

void
millm_hasher_free(MillmHasher *s)
{
	if (!s)
		return;
	pthread_mutex_lock(&s->lock);
	s->quit = true;
	pthread_cond_signal(&s->changed);
	pthread_mutex_unlock(&s->lock);
	pthread_join(s->thread, NULL);
	pthread_cond_destroy(&s->changed);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

void
millm_hasher_start(MillmHasher *s, MillmHash *h, const void *data, size_t len)
{
	pthread_mutex_lock(&s->lock);
	s->hash = h;
	s->data = data;
	s->len = len;
	pthread_cond_signal(&s->changed);
	pthread_mutex_unlock(&s->lock);
}

void
millm_hasher_wait(MillmHasher *s)
{
	pthread_mutex_lock(&s->lock);
	while (s->hash)
		pthread_cond_wait(&s->changed, &s->lock);
	pthread_mutex_unlock(&s->lock);
}
