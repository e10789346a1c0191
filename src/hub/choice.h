/*
 * choice.h -- which files of a repository its model needs.
 */
#ifndef MILLM_CHOICE_H
#define MILLM_CHOICE_H

#include "hub.h"

/* Files of a repository, each once, in the order in which they are fetched: small ones first. */
typedef struct MillmChoice
{
	const MillmHubFile **files;	/* [n], owned; what they point to is the repository's */
	size_t		n;
	int64_t		total_bytes;
	bool		is_bin;			/* the weights are PyTorch checkpoints, each of which becomes a safetensors file */
	MillmHubFile *converted;	/* [n], owned; NULL unless is_bin.  Those of weights: the new file, its size to be filled in, its hash the old one's */
} MillmChoice;

/* Reads a small file of a repository whole, at most max bytes; malloc'ed and NUL-terminated. */
typedef MillmCode (*MillmReadSmall) (void *arg, const char *path, size_t max, char **out, size_t *len, MillmError *err);

/*
 * Choose; reads the index of a sharded model.  *out, zeroed by the caller, is to be freed whatever is returned.
 *
 * UNSUPPORTED (no tokenizer), MODEL_DOWNLOAD_FAILED (no weights; an index that names a file that is not there).
 */
extern MillmCode millm_choose_files(const MillmRepo *repo, MillmReadSmall read, void *arg, MillmChoice *out, MillmError *err);
/* Is it one of the weights? */
extern bool millm_is_weights(const MillmHubFile *file);
/* What files[i] is once it lies here: itself, or what it was converted to. */
extern const MillmHubFile *millm_choice_stored(const MillmChoice *choice, size_t i);
extern void millm_choice_free(MillmChoice *choice);

/* The parts of it that ask nobody: everything but the weights, and the shards, of the kind that is_bin says, that the text of an index names. */
extern MillmCode millm_choose_small_files(const MillmRepo *repo, MillmChoice *out, MillmError *err);
extern MillmCode millm_choose_shards(const MillmRepo *repo, const char *index, size_t len, MillmChoice *out, MillmError *err);

#endif
