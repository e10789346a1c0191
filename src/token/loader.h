/*
 * loader.h -- what the files share that fill a MillmTokenizer from JSON.
 *
 *     load.c          the files, the order of their parts, tokenizer_config.json
 *     load_stages.c   normalizers, pre-tokenizers, post-processors, decoders
 *     load_model.c    the vocabulary and the model
 *     load_added.c    added tokens, and the sets by which they are found
 *     bulk.c          reads the vocabulary and the merges
 *     legacy.c        models without a tokenizer.json
 *     image.c         a tokenizer that was loaded once, compiled
 *
 * The files are a stranger's: every type, id and size is checked, and a component, a flag or an order of components
 * that encode.c and decode.c do not reproduce exactly is refused by its name.
 */
#ifndef MILLM_LOADER_H
#define MILLM_LOADER_H

#include <jansson.h>

#include "bulk.h"
#include "shown.h"
#include "tokenizer.h"

#define MAX_IDS (1 << 24)
#define MAX_ADDED_BYTES 4096	/* of one added token: what a search may look at, byte by byte */
#define BATCH 32				/* strings whose places in a map are fetched together */

typedef struct Loader
{
	MillmTokenizer *tok;
	const char *file;			/* that is being read, for the messages */
	MillmError *err;
	Bulk		bulk;			/* of tokenizer.json: the vocabulary and the merges */
	bool		byte_level;		/* the pre-tokenizer ends in ByteLevel: the model gets bytes, not letters for them */
	size_t		n_vocabulary;
	uint32_t	rank;			/* of the next merge */
	int32_t		joined_id;		/* what the last merge made */
	int			max_ids;		/* that tok->tokens has room for */
	int32_t		max_added;		/* the largest id of an added token; -1: none */
} Loader;

/* ---- load.c ---- */

extern MillmCode millm_load_out_of_memory(MillmError *err);
/* The file is broken; fmt is the detail. */
extern MillmCode millm_load_invalid(Loader *l, const char *fmt,...) __attribute__((format(printf, 2, 3)));
/* UNSUPPORTED: `part "name" of tokenizer.json is not supported'. */
extern MillmCode millm_load_unsupported(Loader *l, const char *part, const char *name);

/* The value of a key, or NULL when it is absent or null. */
extern json_t *millm_load_get(const json_t *object, const char *key);
/* These fill *out from the value of a key, or fail: it must be of that type, a count at most 1,000,000. */
extern MillmCode millm_load_bool(Loader *l, const json_t *object, const char *key, bool otherwise, bool *out);
extern MillmCode millm_load_size(Loader *l, const json_t *object, const char *key, size_t *out);
/* A copy of the string under key: NULL and 0 if it is absent and that is allowed. */
extern MillmCode millm_load_text(Loader *l, const json_t *object, const char *key, bool required, char **out, size_t *n);

/* The stages of tokenizer.json that come before the model. */
extern MillmCode millm_load_front(Loader *l, const json_t *json);
/* The last step of any loading: what follows from all that is there. */
extern MillmCode millm_load_finish(Loader *l);

/* ---- load_stages.c: each fills its part of l->tok from its member of tokenizer.json ---- */

extern MillmCode millm_load_normalizer(Loader *l, const json_t *json, int depth);
extern MillmCode millm_load_pre_tokenizer(Loader *l, const json_t *json, int depth);
extern MillmCode millm_load_post_processor(Loader *l, const json_t *json, int depth);
extern MillmCode millm_load_decoder(Loader *l, const json_t *json);
/* Add ids to those that the post-processor puts before or behind the text. */
extern MillmCode millm_load_post_ids(Loader *l, int32_t **ids, size_t *n, const int32_t *more, size_t n_more, bool in_front);
/* The last pre-tokenizer was ByteLevel, but what follows it needs letters: end byte_level, add a stage that makes them. */
extern MillmCode millm_load_letters(Loader *l);

/* ---- load_model.c ---- */

/* After the pre-tokenizer. */
extern MillmCode millm_load_model(Loader *l, const json_t *json);
/* What the model knows beside its tables, from them; its pieces are marked. */
extern MillmCode millm_load_derived(Loader *l);
/* Give content its id, a new one.  A content that is there keeps the id it has, and *is_new is false. */
extern MillmCode millm_load_content(Loader *l, MapKey content, int64_t id, bool *is_new);
/* Turn letters of the byte alphabet into their bytes; false when one is not of the alphabet.  out has room for n. */
extern bool millm_letters_to_bytes(const char *s, size_t n, char *out, size_t *out_n);

/* ---- load_added.c ---- */

/* The "added_tokens" of tokenizer.json; after the model. */
extern MillmCode millm_load_added_tokens(Loader *l, const json_t *list);
/*
 * Add one token, a string or an object, or change the flags of one that is there.  file_id is what the file says (-1: nothing); an
 * id is computed as the genuine library does, which ignores file_id; where the two differ, the file is not what its maker thought.
 */
extern MillmCode millm_load_added_token(Loader *l, const json_t *json, bool is_special, int64_t file_id);
/* The two sets, once all added tokens are known. */
extern MillmCode millm_load_sets(Loader *l);

/* ---- legacy.c ---- */

/*
 * The tokenizer.json that a model without one amounts to: its vocabulary and its merges in l->bulk, which points into the files, and
 * the rest in *root, the caller's, also on failure.  config is tokenizer_config.json, added is added_tokens.json; each may be NULL.
 */
extern MillmCode millm_legacy_pair(Loader *l, const char *vocabulary, size_t vocabulary_n, const char *merges, size_t merges_n,
								   json_t *added, const json_t *config, json_t **root);
extern MillmCode millm_legacy_sentencepiece(Loader *l, const char *model, size_t model_n, const json_t *config, json_t **root);

#endif
