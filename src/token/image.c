/*
 * image.c -- a large tokenizer compiled: its tables as they lie in memory, in one file beside the files that it is made of.
 *
 * To read 33 MB of JSON and fill the maps of 262,000 tokens takes a quarter of a second; to map them as they were when that was done
 * once, some milliseconds.  An image is a header, the stages of tokenizer.json as JSON (they are small, and are compiled patterns in
 * memory), and the tables, each at a multiple of 64; it has no pointers.  What follows from the tables is found again.
 *
 * An image is a cache and nothing else: it counts only if it was made by this very source code, from files of this size and hash, and
 * if its own hash is right; else the files are read as if it were not there.  The hashes find what chance does, not what somebody
 * does on purpose: who can write an image can write the files beside it as well.  But a wrong image with right hashes must not do
 * more than a wrong tokenizer.json could: every count, offset, id and text is checked before it is used.  After that nothing looks
 * again, so the file must not change under its mapping; it is replaced by renaming, never written in place.
 *
 * Owns nothing: the bytes of an image are the caller's, and must outlive the tokenizer that lies in them.
 */
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "loader.h"
#include "unicode.h"

#ifndef MILLM_TOKEN_SOURCES
#error "MILLM_TOKEN_SOURCES is not defined: the Makefile makes it from the files of this room"
#endif

#define MAGIC UINT64_C(0x6E656B6F746D6C6C)	/* on a machine of the other byte order it is another number */
#define ALIGNMENT 64

typedef enum Table
{
	TABLE_STAGES,				/* JSON */
	TABLE_CONTENTS,				/* keys, and slots */
	TABLE_CONTENT_SLOTS,
	TABLE_TOKENS,
	TABLE_ADDED,
	TABLE_BEFORE,
	TABLE_AFTER,
	TABLE_DECODED,
	/* BPE */
	TABLE_PREFIX,
	TABLE_SUFFIX,
	TABLE_PIECES,				/* keys, and slots */
	TABLE_PIECE_SLOTS,
	TABLE_MERGES,
	/* a lexicon */
	TABLE_EDGES,
	TABLE_NODES,
	TABLE_SCORES,
	N_TABLES
} Table;

static const uint32_t element_bytes[N_TABLES] = {
	[TABLE_STAGES] = 1,
	[TABLE_CONTENTS] = 1,
	[TABLE_CONTENT_SLOTS] = sizeof(StringMapSlot),
	[TABLE_TOKENS] = sizeof(Token),
	[TABLE_ADDED] = sizeof(AddedToken),
	[TABLE_BEFORE] = sizeof(int32_t),
	[TABLE_AFTER] = sizeof(int32_t),
	[TABLE_DECODED] = 1,
	[TABLE_PREFIX] = 1,
	[TABLE_SUFFIX] = 1,
	[TABLE_PIECES] = 1,
	[TABLE_PIECE_SLOTS] = sizeof(StringMapSlot),
	[TABLE_MERGES] = sizeof(Merge),
	[TABLE_EDGES] = sizeof(TrieEdge),
	[TABLE_NODES] = sizeof(int32_t),
	[TABLE_SCORES] = sizeof(double),
};

/* Flags are numbers here: any byte is one. */
typedef struct Header
{
	uint64_t	magic;
	uint64_t	hash;			/* of all that follows it */
	char		sources[40];	/* MILLM_TOKEN_SOURCES, zeros */
	uint32_t	element_bytes[N_TABLES];	/* another compiler's may differ */
	FilesKey	key;
	uint64_t	n[N_TABLES];	/* elements */

	double		unknown_score;
	uint64_t	longest;		/* the piece of a Bpe */
	uint64_t	max_characters;
	uint32_t	continuing;
	uint32_t	kind;
	int32_t		unknown_id;
	uint8_t		is_bpe;
	uint8_t		has_chat_template;
	uint8_t		ignore_merges;
	uint8_t		byte_fallback;
	uint8_t		fuse_unknown;
	uint8_t		zero[7];		/* the hash sees them */
} Header;

#define HASH_FROM (offsetof(Header, hash) + sizeof(uint64_t))

FilesKey
millm_files_key(const FileBytes files[N_TOKENIZER_FILES])
{
	FilesKey	key = {0};

	for (int i = 0; i < N_TOKENIZER_FILES; i++)
	{
		key.bytes[i] = files[i].data ? files[i].n : UINT64_MAX;
		if (files[i].data)
			key.hash[i] = millm_bytes_hash(files[i].data, files[i].n);
	}
	return key;
}

/* Where the tables of an image lie, and its length; false: no image can be so long. */
static bool
lay_out(const Header *h, size_t at[N_TABLES], size_t *image_n)
{
	size_t		end = sizeof(Header);

	for (int t = 0; t < N_TABLES; t++)
	{
		size_t		n;

		if (__builtin_add_overflow(end, ALIGNMENT - 1, &end) || !millm_mul_size(h->n[t], element_bytes[t], &n))
			return false;
		at[t] = end = end / ALIGNMENT * ALIGNMENT;
		if (__builtin_add_overflow(end, n, &end))
			return false;
	}
	*image_n = end;
	return true;
}

bool
millm_image_make(const MillmTokenizer *tok, const FilesKey *key, Bytes *out)
{
	const Bpe  *bpe = &tok->bpe;
	const Lexicon *lexicon = &tok->lexicon;
	const struct
	{
		const void *data;
		size_t		n;
	}			tables[N_TABLES] = {
		[TABLE_STAGES] = {tok->stages, strlen(tok->stages)},
		[TABLE_CONTENTS] = {tok->contents.keys.data, tok->contents.keys.n},
		[TABLE_CONTENT_SLOTS] = {tok->contents.slots, tok->contents.n_slots},
		[TABLE_TOKENS] = {tok->tokens, (size_t) tok->n_ids},
		[TABLE_ADDED] = {tok->added, tok->n_added},
		[TABLE_BEFORE] = {tok->before, tok->n_before},
		[TABLE_AFTER] = {tok->after, tok->n_after},
		[TABLE_DECODED] = {tok->decoded.data, tok->decoded.n},
		[TABLE_PREFIX] = {bpe->prefix, bpe->prefix ? bpe->prefix_n : 0},
		[TABLE_SUFFIX] = {bpe->suffix, bpe->suffix ? bpe->suffix_n : 0},
		[TABLE_PIECES] = {bpe->pieces.keys.data, bpe->pieces.keys.n},
		[TABLE_PIECE_SLOTS] = {bpe->pieces.slots, bpe->pieces.n_slots},
		[TABLE_MERGES] = {bpe->merges, bpe->n_merge_slots},
		[TABLE_EDGES] = {lexicon->edges, lexicon->n_edge_slots},
		[TABLE_NODES] = {lexicon->ids, lexicon->n_nodes},
		[TABLE_SCORES] = {lexicon->scores, lexicon->n_scores},
	};
	Header		h = {
		.magic = MAGIC,
		.sources = MILLM_TOKEN_SOURCES,
		.key = *key,
		.unknown_score = lexicon->unknown_score,
		.longest = bpe->longest,
		.max_characters = lexicon->max_characters,
		.continuing = lexicon->continuing,
		.kind = (uint32_t) lexicon->kind,
		.unknown_id = tok->is_bpe ? bpe->unknown_id : lexicon->unknown_id,
		.is_bpe = tok->is_bpe,
		.has_chat_template = tok->has_chat_template,
		.ignore_merges = bpe->ignore_merges,
		.byte_fallback = tok->is_bpe ? bpe->byte_fallback : lexicon->byte_fallback,
		.fuse_unknown = bpe->fuse_unknown,
	};
	size_t		at[N_TABLES];
	size_t		n;

	memcpy(h.element_bytes, element_bytes, sizeof(element_bytes));
	for (int t = 0; t < N_TABLES; t++)
		h.n[t] = tables[t].n;
	out->n = 0;
	if (!lay_out(&h, at, &n) || !millm_bytes_reserve(out, n))
		return false;
	memset(out->data, 0, n);
	for (int t = 0; t < N_TABLES; t++)
		if (tables[t].n > 0)
			memcpy(out->data + at[t], tables[t].data, tables[t].n * element_bytes[t]);
	memcpy(out->data, &h, sizeof(h));
	h.hash = millm_bytes_hash(out->data + HASH_FROM, n - HASH_FROM);
	memcpy(out->data + offsetof(Header, hash), &h.hash, sizeof(h.hash));
	out->n = n;
	return true;
}

/* ---- opening ---- */

/* Is it the whole image, undamaged, of these files and this code?  Then *h is its header, and at says where its tables lie. */
static bool
is_ours(FileBytes image, const FilesKey *key, Header *h, size_t at[N_TABLES])
{
	static const char sources[sizeof(h->sources)] = MILLM_TOKEN_SOURCES;
	size_t		n;

	if (image.n < sizeof(*h))
		return false;
	memcpy(h, image.data, sizeof(*h));
	return h->magic == MAGIC && memcmp(h->sources, sources, sizeof(sources)) == 0 &&
		memcmp(h->element_bytes, element_bytes, sizeof(element_bytes)) == 0 && memcmp(&h->key, key, sizeof(*key)) == 0 &&
		lay_out(h, at, &n) && n == image.n && h->hash == millm_bytes_hash(image.data + HASH_FROM, image.n - HASH_FROM);
}

/* Does span lie in text[0..n), which is UTF-8, at the bounds of characters? */
static inline bool
is_text(const char *text, size_t n, Span span)
{
	size_t		end = (size_t) span.offset + span.n;

	return end <= n && (span.offset == n || ((unsigned char) text[span.offset] & 0xC0) != 0x80) &&
		(end == n || ((unsigned char) text[end] & 0xC0) != 0x80);
}

/* A bool of a stranger: is it one? */
static inline bool
is_bool(const bool *p)
{
	unsigned char byte;

	memcpy(&byte, p, 1);
	return byte <= 1;
}

static bool
are_ids(const int32_t *ids, size_t n, size_t n_ids)
{
	for (size_t i = 0; i < n; i++)
		if (ids[i] < 0 || (size_t) ids[i] >= n_ids)
			return false;
	return true;
}

/* Are tokens and added tokens such as the loader makes them?  The rest of tok that they refer to is there. */
static bool
are_tokens(const MillmTokenizer *tok)
{
	const Bytes *keys = &tok->contents.keys;
	size_t		bad;
	bool		is_bad = !millm_utf8_is_valid(keys->data, keys->n, &bad);

	for (int i = 0; i < tok->n_ids && !is_bad; i++)
	{
		const Token *token = &tok->tokens[i];

		is_bad |= !is_text(keys->data, keys->n, token->content) || (size_t) token->bytes.offset + token->bytes.n > tok->decoded.n ||
			token->added > tok->n_added || !is_bool(&token->exists) || !is_bool(&token->is_piece) || !is_bool(&token->special);
	}
	for (size_t i = 0; i < tok->n_added && !is_bad; i++)
	{
		const AddedToken *token = &tok->added[i];

		is_bad |= !are_ids(&token->id, 1, (size_t) tok->n_ids) || !is_text(keys->data, keys->n, token->content) ||
			token->content.n > MAX_ADDED_BYTES || !is_bool(&token->single_word) || !is_bool(&token->lstrip) ||
			!is_bool(&token->rstrip) || !is_bool(&token->normalized) || !is_bool(&token->special);
	}
	return !is_bad;
}

/* Point tok at the tables of an image; false: they are none.  is_byte_level is what the pre-tokenizers say. */
static bool
adopt(MillmTokenizer *tok, const Header *h, const char *image, const size_t at[N_TABLES], bool is_byte_level)
{
	Bpe		   *bpe = &tok->bpe;
	Lexicon    *lexicon = &tok->lexicon;
	void	   *table[N_TABLES];
	size_t		n_ids = h->n[TABLE_TOKENS];

	if (n_ids > MAX_IDS || h->unknown_id < -1 || (h->unknown_id >= 0 && (size_t) h->unknown_id >= n_ids) || h->kind > LEXICON_WORDLEVEL)
		return false;
	for (int t = 0; t < N_TABLES; t++)
		table[t] = (char *) image + at[t];	/* never written to */
	tok->n_ids = (int) n_ids;
	tok->tokens = table[TABLE_TOKENS];
	tok->added = table[TABLE_ADDED];
	tok->n_added = h->n[TABLE_ADDED];
	tok->before = table[TABLE_BEFORE];
	tok->n_before = h->n[TABLE_BEFORE];
	tok->after = table[TABLE_AFTER];
	tok->n_after = h->n[TABLE_AFTER];
	tok->decoded = (Bytes) {.data = table[TABLE_DECODED], .n = h->n[TABLE_DECODED]};
	if (!millm_map_adopt(&tok->contents, table[TABLE_CONTENTS], h->n[TABLE_CONTENTS], table[TABLE_CONTENT_SLOTS],
						 h->n[TABLE_CONTENT_SLOTS], n_ids) ||
		!are_tokens(tok) || !are_ids(tok->before, tok->n_before, n_ids) || !are_ids(tok->after, tok->n_after, n_ids))
		return false;
	if (tok->is_bpe)
	{
		bpe->is_byte_level = is_byte_level;
		bpe->ignore_merges = h->ignore_merges != 0;
		bpe->byte_fallback = h->byte_fallback != 0;
		bpe->fuse_unknown = h->fuse_unknown != 0;
		bpe->unknown_id = h->unknown_id;
		bpe->longest = h->longest;
		bpe->prefix = h->n[TABLE_PREFIX] > 0 ? table[TABLE_PREFIX] : NULL;
		bpe->prefix_n = h->n[TABLE_PREFIX];
		bpe->suffix = h->n[TABLE_SUFFIX] > 0 ? table[TABLE_SUFFIX] : NULL;
		bpe->suffix_n = h->n[TABLE_SUFFIX];
		return millm_map_adopt(&bpe->pieces, table[TABLE_PIECES], h->n[TABLE_PIECES], table[TABLE_PIECE_SLOTS],
							   h->n[TABLE_PIECE_SLOTS], n_ids) &&
			millm_bpe_adopt_merges(bpe, table[TABLE_MERGES], h->n[TABLE_MERGES], n_ids);
	}
	lexicon->kind = (LexiconKind) h->kind;
	lexicon->unknown_id = h->unknown_id;
	lexicon->edges = table[TABLE_EDGES];
	lexicon->n_edge_slots = h->n[TABLE_EDGES];
	lexicon->ids = table[TABLE_NODES];
	lexicon->n_nodes = h->n[TABLE_NODES] <= UINT32_MAX ? (uint32_t) h->n[TABLE_NODES] : 0;
	lexicon->scores = table[TABLE_SCORES];
	lexicon->n_scores = h->n[TABLE_SCORES];
	lexicon->unknown_score = h->unknown_score;
	lexicon->byte_fallback = h->byte_fallback != 0;
	lexicon->continuing = h->continuing;
	lexicon->max_characters = h->max_characters;
	return millm_lexicon_is_sound(lexicon, n_ids);
}

/* The steps of the loader, with the tables of the image in the place of the model, the added tokens and the post-processor. */
static bool
open_image(Loader *l, const Header *h, const char *image, const size_t at[N_TABLES])
{
	MillmTokenizer *tok = l->tok;
	json_t	   *stages = json_loadb(image + at[TABLE_STAGES], h->n[TABLE_STAGES], JSON_ALLOW_NUL, NULL);
	bool		ok;

	tok->is_bpe = h->is_bpe != 0;
	tok->has_chat_template = h->has_chat_template != 0;
	ok = stages && millm_load_front(l, stages) == MILLM_OK && (tok->is_bpe || millm_load_letters(l) == MILLM_OK) &&
		adopt(tok, h, image, at, l->byte_level) && millm_load_derived(l) == MILLM_OK &&
		(!millm_load_get(stages, "decoder") || millm_load_decoder(l, millm_load_get(stages, "decoder")) == MILLM_OK) &&
		millm_load_finish(l) == MILLM_OK;
	json_decref(stages);
	return ok;
}

MillmTokenizer *
millm_image_open(FileBytes image, const FilesKey *key)
{
	MillmTokenizer *tok;
	Loader		l;
	MillmError	why;			/* of no interest: the files will be read */
	Header		h;
	size_t		at[N_TABLES];

	if (!is_ours(image, key, &h, at) || !(tok = calloc(1, sizeof(*tok))))
		return NULL;
	tok->is_compiled = true;
	l = (Loader) {.tok = tok, .file = IMAGE_NAME, .err = &why};
	if (open_image(&l, &h, image.data, at))
		return tok;
	millm_tokenizer_close(tok);
	return NULL;
}

void
millm_image_forget(MillmTokenizer *tok)
{
	tok->contents = tok->bpe.pieces = (StringMap) {0};
	tok->tokens = NULL;
	tok->added = NULL;
	tok->before = tok->after = NULL;
	tok->decoded = (Bytes) {0};
	tok->bpe.prefix = tok->bpe.suffix = NULL;
	tok->bpe.merges = NULL;
	tok->lexicon.edges = NULL;
	tok->lexicon.ids = NULL;
	tok->lexicon.scores = NULL;
}
