/*
 * bulk.h -- the two members of tokenizer.json that are nearly all of it: model.vocab and model.merges.
 */
#ifndef MILLM_BULK_H
#define MILLM_BULK_H

#include "bytes.h"

/* A string of the file: valid UTF-8, may hold NUL, is not NUL-terminated.  Points into the file or into unescaped. */
typedef struct BulkString
{
	const char *text;
	uint32_t	n;
} BulkString;

typedef struct BulkEntry
{
	const char *text;			/* as in a BulkString */
	uint32_t	n;
	union
	{
		int64_t		id;
		double		score;
	}			value;
} BulkEntry;

typedef struct BulkMerge
{
	const char *left;			/* as in a BulkString */
	const char *right;			/* NULL: left is both of them, "a b" */
	uint32_t	left_n;
	uint32_t	right_n;
} BulkMerge;

/* Zeroed is empty. */
typedef struct Bulk
{
	bool		has_vocabulary;	/* model.vocab is an object of integers, or an array of pairs of string and number: it is in entries */
	bool		has_scores;		/* the latter */
	bool		has_merges;		/* model.merges is an array of strings and pairs of strings: it is in merges */
	BulkEntry  *entries;		/* in the order of the file, keys as often as it has them: the last one counts */
	size_t		n_entries;
	size_t		max_entries;
	BulkMerge  *merges;
	size_t		n_merges;
	size_t		max_merges;
	char	   *unescaped;		/* the strings that had escapes */
	size_t		unescaped_n;
	Bytes		rest;			/* the file, with null in the place of what was read */
} Bulk;

/*
 * Read json[0..n), which must stay as long as *bulk does.  What is not of the forms above, valid JSON or not,
 * is left in rest, for a reader that can say what is wrong with it.  If rest is valid JSON, the file is.
 * False: out of memory; *bulk is to be freed then, too.
 */
extern bool millm_bulk_read(Bulk *bulk, const char *json, size_t n);
/* Read a file that is a vocabulary and nothing else, an object of integers; if it is not, has_vocabulary stays false. */
extern bool millm_bulk_read_vocabulary(Bulk *bulk, const char *json, size_t n);
extern void millm_bulk_free(Bulk *bulk);

#endif
