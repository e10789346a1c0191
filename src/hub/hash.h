/*
 * hash.h -- the hash that proves a file of the Hub: sha256 of an LFS file, or git's blob id (sha1) of a small one.
 *
 * A plain value: copied by assignment, saved to bytes and restored, so that a download that was killed goes on with the hash of
 * what it no longer has.
 */
#ifndef MILLM_HASH_H
#define MILLM_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* OpenSSL's EVP interface has no way to save a state; these older structures are their state. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

typedef struct MillmHash
{
	bool		is_sha256;
	SHA256_CTX	sha256;
	SHA_CTX		sha1;
} MillmHash;

#define MILLM_HASH_HEX		65		/* the longest, with its NUL */
#define MILLM_HASH_STATE	256		/* a saved state, as text with its NUL */

/* Begin for a file of size bytes whose hash is given in hex: 64 digits sha256, else git's sha1. */
extern void millm_hash_begin(MillmHash *h, const char *expected, int64_t size);
extern void millm_hash_update(MillmHash *h, const void *data, size_t len);
/* The hash of the bytes so far; h can go on. */
extern void millm_hash_hex(const MillmHash *h, char hex[MILLM_HASH_HEX]);
extern void millm_hash_save(const MillmHash *h, char state[MILLM_HASH_STATE]);
/* False, h untouched, when the text is no saved state of the same kind of hash. */
extern bool millm_hash_restore(MillmHash *h, const char *state);

/* A thread that hashes while its owner does something else with the same bytes. */
typedef struct MillmHasher MillmHasher;

extern MillmHasher *millm_hasher_create(void);	/* NULL: no memory, or no thread */
extern void millm_hasher_free(MillmHasher *hasher);	/* nothing is under way; NULL is fine */
/* Update h with these bytes.  Both are the hasher's until millm_hasher_wait returns, which must come before anything else of it. */
extern void millm_hasher_start(MillmHasher *hasher, MillmHash *h, const void *data, size_t len);
extern void millm_hasher_wait(MillmHasher *hasher);

#endif
