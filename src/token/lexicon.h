/*
 * lexicon.h -- the models that look up pieces of a word: Unigram, WordPiece, WordLevel.
 *
 * A Lexicon is filled by load_model.c and then immutable.
 */
#ifndef MILLM_LEXICON_H
#define MILLM_LEXICON_H

#include <stdbool.h>
#include <stdint.h>

#include "bytes.h"
#include "error.h"

typedef enum LexiconKind
{
	LEXICON_UNIGRAM,			/* the pieces of the best sum of scores */
	LEXICON_WORDPIECE,			/* the longest piece, again and again */
	LEXICON_WORDLEVEL			/* the whole word */
} LexiconKind;

typedef struct TrieEdge
{
	uint32_t	key;			/* node << 8 | byte */
	uint32_t	node;			/* where it leads; 0: the slot is free */
} TrieEdge;

typedef struct Lexicon
{
	LexiconKind kind;
	int32_t		unknown_id;		/* -1: there is none */

	/* a trie over the bytes of the pieces: node 0 is the root */
	TrieEdge   *edges;			/* open addressing */
	size_t		n_edge_slots;	/* a power of two, or 0 */
	uint32_t	n_nodes;
	int32_t    *ids;			/* [n_nodes] of the piece that ends there, or -1 */
	size_t		max_nodes;		/* that ids has room for */

	double	   *scores;			/* LEXICON_UNIGRAM: [n_scores], by id; owned */
	size_t		n_scores;
	double		unknown_score;	/* of a character that is no piece */
	bool		byte_fallback;
	int32_t		fallback_ids[256];	/* the id of "<0xHH>", or -1 */

	uint32_t	continuing;		/* LEXICON_WORDPIECE: the node of the prefix of pieces that do not begin a word; NO_NODE: none has it */
	size_t		max_characters; /* of a word that is looked up */
} Lexicon;

#define NO_NODE UINT32_MAX
#define MAX_LEXICON_BYTES ((1 << 24) - 1)	/* of all pieces: a node and a byte make a key of 32 bits */

/* The working memory of one caller; zeroed is empty. */
typedef struct LexiconScratch
{
	int32_t    *ids;			/* the result: n of them */
	size_t		n;
	size_t		capacity;
	struct PathNode *path;
	size_t		path_capacity;
} LexiconScratch;

typedef struct LexiconPiece
{
	const char *text;			/* borrowed */
	uint32_t	n;
	int32_t		id;
} LexiconPiece;

#define LEXICON_BATCH 32		/* pieces that go in together */

/*
 * Give pieces their ids, at most LEXICON_BATCH of them; a piece that is there gets the new one.  millm_lexicon_reserve() comes first,
 * with the number of bytes of all pieces, at most MAX_LEXICON_BYTES.  False: out of memory.
 */
extern bool millm_lexicon_reserve(Lexicon *lexicon, size_t n_bytes);
extern bool millm_lexicon_add(Lexicon *lexicon, const LexiconPiece *pieces, size_t n);
/* The node that a text leads to, or NO_NODE; and the id of the piece that is this text, or -1. */
extern uint32_t millm_lexicon_walk(const Lexicon *lexicon, const char *text, size_t n);
extern int32_t millm_lexicon_find(const Lexicon *lexicon, const char *text, size_t n);
/*
 * Is a Lexicon whose members come from a stranger, n_edge_slots edges, n_nodes ids and n_scores scores among them, one that can be
 * used: no step leads elsewhere or does not end, no id is not below n_ids, each has its score?
 */
extern bool millm_lexicon_is_sound(const Lexicon *lexicon, size_t n_ids);
extern void millm_lexicon_free(Lexicon *lexicon);

/*
 * Encode one word, valid UTF-8 and not empty, into scratch->ids.  INVALID_ARGUMENT when the word needs an unknown token and there
 * is none, INSUFFICIENT_MEMORY.
 */
extern MillmCode millm_lexicon_encode(const Lexicon *lexicon, LexiconScratch *scratch, const char *word, size_t n, MillmError *err);
extern void millm_lexicon_scratch_free(LexiconScratch *scratch);

#endif
