/*
 * token.h -- text to token ids and back, as the model's own tokenizer.json says.
 *
 * A MillmTokenizer is immutable after millm_tokenizer_open() and may be used from many threads.
 * Ids equal those of the genuine `tokenizers` library for every valid UTF-8 text.
 */
#ifndef MILLM_TOKEN_H
#define MILLM_TOKEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef struct MillmTokenizer MillmTokenizer;

typedef struct MillmIds
{
	int32_t    *ids;			/* malloc'ed; millm_ids_free() */
	size_t		n;
	size_t		capacity;
} MillmIds;

extern void millm_ids_free(MillmIds *ids);

/*
 * Read the tokenizer of the model directory dir: tokenizer.json, else tokenizer.model, else vocab.json with merges.txt; and
 * tokenizer_config.json.  INVALID_MODEL_FILE for a broken file, UNSUPPORTED naming a component that is not implemented,
 * MODEL_FILES_MISSING when it has none of the three forms.
 */
extern MillmCode millm_tokenizer_open(const char *dir, MillmTokenizer **out, MillmError *err);
extern void millm_tokenizer_close(MillmTokenizer *tok);	/* NULL is fine */

/*
 * A tokenizer whose files are large takes a while to read: write it as it is in memory to dir, from which it was opened, so that it is
 * opened at once from then on, until its files change.  Does nothing for one that is small, or was opened so.  Who calls it may
 * write there, and is the only one who does.  MODEL_LOAD_FAILED when it cannot be written; the tokenizer is as good as before.
 */
extern MillmCode millm_tokenizer_compile(const MillmTokenizer *tok, const char *dir, MillmError *err);
extern bool millm_tokenizer_is_compiled(const MillmTokenizer *tok);

typedef struct MillmEncodeOptions
{
	bool		add_special;	/* what the post-processor adds: BOS, say */
	bool		parse_special;	/* special tokens written in the text are themselves */
	const uint8_t *origins;		/* with parse_special: one of these bytes for each of the text; a special token is itself only where
								 * all its bytes have 0 (the template wrote them); NULL: everywhere */
} MillmEncodeOptions;

/*
 * Encode text[0..len), appending to *out.  INVALID_ARGUMENT when text is not valid UTF-8 (the
 * message names the byte offset), CONTEXT_LENGTH_EXCEEDED when more than max_tokens would come out
 * (0: no limit).  NUL bytes are text.
 */
extern MillmCode millm_encode(const MillmTokenizer *tok, const char *text, size_t len,
							  MillmEncodeOptions options, size_t max_tokens, MillmIds *out, MillmError *err);

/* Number of ids (1 + the largest one), and properties of one id. */
extern int	millm_tokenizer_n_ids(const MillmTokenizer *tok);
extern bool millm_token_is_special(const MillmTokenizer *tok, int32_t id);
/* The id of that exact token string ("<|im_end|>"), or -1. */
extern int32_t millm_token_id(const MillmTokenizer *tok, const char *content);
/* Does tokenizer_config.json or chat_template.jinja carry a chat template? */
extern bool millm_tokenizer_has_chat_template(const MillmTokenizer *tok);

/*
 * Decode all at once, as the genuine decode(ids, skip_special_tokens) does.  *out is malloc'ed,
 * NUL-terminated (and may contain NUL); *len its length.  INVALID_ARGUMENT for an id below 0 or not in the vocabulary.
 */
extern MillmCode millm_decode(const MillmTokenizer *tok, const int32_t *ids, size_t n, bool skip_special,
							  char **out, size_t *len, MillmError *err);

/*
 * The bytes that a token adds to a text in whose middle it stands, which need not be whole characters; of a special token its name.
 * *out is malloc'ed; *len its length.  INVALID_ARGUMENT for an id that is not in the vocabulary.
 */
extern MillmCode millm_token_bytes(const MillmTokenizer *tok, int32_t id, char **out, size_t *len, MillmError *err);

/*
 * Incremental detokenization: feed ids one by one, get text that never ends in half a character.
 * The concatenation of all pieces and of the flush equals millm_decode() of all ids, but for the
 * exceptions that doc/ names.  Special tokens are skipped.
 */
typedef struct MillmDetok MillmDetok;
extern MillmDetok *millm_detok_create(const MillmTokenizer *tok);	/* NULL: out of memory; tok must outlive it */
extern void millm_detok_free(MillmDetok *d);
/* The new text, "" if none yet; valid until the next call.  Never fails on a known id. */
extern const char *millm_detok_push(MillmDetok *d, int32_t id, size_t *len);
extern const char *millm_detok_flush(MillmDetok *d, size_t *len);

#endif
