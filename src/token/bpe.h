/*
 * bpe.h -- byte-pair encoding of one word.
 *
 * A Bpe is filled by load.c and then immutable, but for a memo of relaxed atomics (see is_whole).
 * With a byte-level tokenizer everything here is raw bytes: the vocabulary and the merges are converted
 * when they are read, so no text is ever mapped to the byte alphabet.
 */
#ifndef MILLM_BPE_H
#define MILLM_BPE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "bytes.h"

/* One merge; a free slot has key UINT64_MAX. */
typedef struct Merge
{
	uint64_t	key;			/* left id << 32 | right id */
	uint32_t	rank;
	int32_t		id;				/* what the two become */
} Merge;

typedef struct Bpe
{
	bool		is_byte_level;
	bool		ignore_merges;	/* a word that is in the vocabulary is that id */
	bool		byte_fallback;
	bool		fuse_unknown;
	int32_t		unknown_id;		/* -1: an unknown character is dropped */
	char	   *prefix;			/* of all characters of a word but the first; or NULL.  Owned */
	size_t		prefix_n;
	char	   *suffix;			/* of the last character of a word; or NULL.  Owned */
	size_t		suffix_n;

	StringMap	pieces;			/* is_byte_level: raw bytes to id.  Owned */
	const StringMap *names;		/* otherwise: string to id, of the whole tokenizer, so also of tokens that are no pieces.  Borrowed */
	size_t		longest;		/* of them, in bytes */
	int32_t		byte_ids[256];	/* is_byte_level: the id of that byte alone, or -1 */
	int32_t		fallback_ids[256];	/* the id of "<0xHH>", or -1 */
	bool		has_cuts;		/* a word is cut before U+2581, if the byte before that is none of these: no piece has the two together */
	bool		joins[256];

	Merge	   *merges;			/* open addressing */
	size_t		n_merge_slots;	/* a power of two, or 0 */
	size_t		n_merges;

	/*
	 * By id: does the word that reads as this piece become this piece?  Asked for the first time, the word is
	 * encoded and the answer kept: any thread finds the same.  WHOLE_UNKNOWN at first, or WHOLE_NO_PIECE.  Owned.
	 */
	_Atomic uint8_t *is_whole;
	int32_t		n_ids;			/* that is_whole has; the ids from there on are no pieces */
} Bpe;

enum
{
	WHOLE_UNKNOWN,
	WHOLE_YES,
	WHOLE_NO,
	WHOLE_NO_PIECE				/* the model has no piece of that id */
};

/* The working memory of one caller; zeroed is empty. */
typedef struct BpeScratch
{
	int32_t    *ids;			/* the result: n of them */
	size_t		n;
	size_t		capacity;
	struct BpeSymbol *symbols;
	size_t		n_symbols_max;
	struct BpeCandidate *heap;
	size_t		heap_n;
	size_t		heap_capacity;
	Bytes		key;
} BpeScratch;

/* Encode one word, valid UTF-8 unless is_byte_level, into scratch->ids.  False: out of memory. */
extern bool millm_bpe_encode(const Bpe *bpe, BpeScratch *scratch, const char *word, size_t n);
extern void millm_bpe_scratch_free(BpeScratch *scratch);

/* Look at a piece: does it join something and U+2581?  Once for each, from has_cuts true on; what is in it is as when it is encoded. */
extern void millm_bpe_note_joins(Bpe *bpe, const char *piece, size_t n, const char *unknown, size_t unknown_n);

/*
 * Make room for n merges, once; false: out of memory.  Then add so many: a later one replaces an earlier one of the
 * same pair.  millm_bpe_merge() fetches the place of the one it makes: make some, then add them.
 */
extern bool millm_bpe_reserve_merges(Bpe *bpe, size_t n);
extern Merge millm_bpe_merge(const Bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t id);
extern void millm_bpe_add_merge(Bpe *bpe, Merge merge);
/* Take a stranger's table of merges, borrowed: false if looking one up there could not end, or find an id that is not below n_ids. */
extern bool millm_bpe_adopt_merges(Bpe *bpe, Merge *merges, size_t n_slots, size_t n_ids);
extern void millm_bpe_free(Bpe *bpe);

/* The byte alphabet of byte-level tokenizers: the code point that stands for byte b, and back (-1: for none). */
extern uint32_t millm_byte_to_letter(uint8_t b);
extern int	millm_letter_to_byte(uint32_t cp);

#endif
