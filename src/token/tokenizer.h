/*
 * tokenizer.h -- what the files of this room share: a loaded tokenizer as data.
 *
 *     load.c     opens a model's tokenizer, fills a MillmTokenizer from tokenizer.json and tokenizer_config.json; loader.h is its side
 *     legacy.c   writes the tokenizer.json that models without one amount to
 *     image.c    a large tokenizer compiled, in one file: written, and opened again
 *     encode.c   text -> added tokens, normalizer, pre-tokenizer, model, post-processor -> ids
 *     decode.c   ids -> decoders -> text, at once or one by one
 *
 * After loading nothing here changes; every call brings its own working memory.
 */
#ifndef MILLM_TOKENIZER_H
#define MILLM_TOKENIZER_H

#include "bpe.h"
#include "bytes.h"
#include "charsmap.h"
#include "lexicon.h"
#include "pattern.h"
#include "token.h"

/* ---- added tokens: found in the text before anything else sees it ---- */

typedef struct AddedToken
{
	int32_t		id;
	Span		content;		/* in the tokenizer's contents.keys */
	bool		single_word;
	bool		lstrip;
	bool		rstrip;
	bool		normalized;		/* looked for in the normalized text */
	bool		special;
} AddedToken;

/* A string to look for. */
typedef struct AddedPattern
{
	const char *text;			/* borrowed, or the set's own */
	size_t		n;
	uint32_t	token;			/* index into the tokenizer's added */
} AddedPattern;

/* Patterns in the order of their bytes; those that begin with byte b are first[b] .. first[b + 1] - 1. */
typedef struct AddedSet
{
	AddedPattern *patterns;
	size_t		n;
	uint32_t	first[257];
	Bytes		texts;			/* of normalized patterns */
} AddedSet;

/* ---- stages ---- */

#define MAX_STAGES 32			/* of one kind, after Sequences are taken apart */
#define MAX_SEQUENCE_DEPTH 8

typedef enum NormalizerKind
{
	NORMALIZE_FORM,				/* NFC, NFD, NFKC, NFKD */
	NORMALIZE_PREPEND,			/* text, when the segment is not empty */
	NORMALIZE_REPLACE,			/* every match of pattern becomes text */
	NORMALIZE_STRIP,			/* white space goes from the start, the end */
	NORMALIZE_CHARSMAP,
	/* character by character */
	NORMALIZE_LOWERCASE,
	NORMALIZE_DROP,				/* characters that have one of the habits are dropped */
	NORMALIZE_CLEAN,			/* BertNormalizer: control characters are dropped, white space becomes spaces */
	NORMALIZE_CHINESE,			/* BertNormalizer: spaces around ideographs */
	NORMALIZE_NMT,
	NORMALIZE_BYTE_LEVEL		/* bytes become letters of the byte alphabet */
} NormalizerKind;

typedef struct Normalizer
{
	NormalizerKind kind;
	bool		is_composed;	/* NORMALIZE_FORM: NFC, NFKC */
	bool		is_compatible;	/* NFKC, NFKD */
	bool		strips_start;
	bool		strips_end;
	uint8_t		habits;
	Pattern		pattern;
	char	   *text;			/* owned */
	size_t		text_n;
	Charsmap	charsmap;
} Normalizer;

typedef enum Behavior			/* what becomes of the matches of a splitter */
{
	SPLIT_REMOVED,
	SPLIT_ISOLATED,
	SPLIT_MERGED_WITH_PREVIOUS,
	SPLIT_MERGED_WITH_NEXT,
	SPLIT_CONTIGUOUS
} Behavior;

typedef enum PreTokenizerKind
{
	PRE_SPLIT,
	PRE_PREFIX_SPACE,			/* a space before every piece that has none */
	PRE_LETTERS,				/* bytes become letters of the byte alphabet */
	PRE_METASPACE				/* spaces become text, and perhaps one is put before */
} PreTokenizerKind;

typedef enum Prepend
{
	PREPEND_NEVER,
	PREPEND_FIRST,				/* only at the beginning of the input */
	PREPEND_ALWAYS
} Prepend;

typedef struct PreTokenizer
{
	PreTokenizerKind kind;
	Pattern		pattern;		/* PRE_SPLIT */
	Behavior	behavior;
	bool		invert;
	Prepend		prepend;		/* PRE_METASPACE */
	char	   *text;			/* owned */
	size_t		text_n;
} PreTokenizer;

typedef enum DecoderKind
{
	DECODE_BYTE_LEVEL,			/* alone */
	DECODE_REPLACE,				/* pattern becomes text, in each token */
	DECODE_BYTE_FALLBACK,		/* "<0xHH>" are bytes */
	DECODE_METASPACE,			/* pattern becomes a space, none in the first token if is_first_dropped */
	DECODE_STRIP,				/* up to n_start of pattern from the start, n_stop from the end, of each token */
	DECODE_FUSE,				/* the tokens become one string */
	DECODE_WORD_PIECE,			/* a space before tokens that do not begin with pattern, but for the first; the others lose it */
	DECODE_SUFFIX,				/* BPEDecoder: pattern becomes a space, nothing in the last token */
	DECODE_CTC					/* a token like the one before goes, and pattern in the others */
} DecoderKind;

typedef struct Decoder
{
	DecoderKind kind;
	Pattern		pattern;		/* a literal */
	char	   *text;			/* owned; DECODE_CTC: becomes a space when is_cleaned */
	size_t		text_n;
	bool		is_first_dropped;
	bool		is_cleaned;		/* DECODE_WORD_PIECE, DECODE_CTC: spaces before punctuation go */
	size_t		n_start;
	size_t		n_stop;
} Decoder;

typedef struct Token
{
	Span		content;		/* in contents.keys */
	Span		bytes;			/* in decoded: what the ByteLevel decoder makes of it */
	uint32_t	added;			/* 1 + its index in added; 0: not an added token */
	bool		exists;
	bool		is_piece;		/* the model has it */
	bool		special;		/* skipped by decoding */
} Token;

/* The files of a model directory that say what its tokenizer is. */
typedef enum TokenizerFile
{
	FILE_TOKENIZER,				/* tokenizer.json */
	FILE_CONFIG,				/* tokenizer_config.json */
	/* of a model without the first: */
	FILE_MODEL,					/* tokenizer.model */
	FILE_VOCABULARY,			/* vocab.json; with it must be */
	FILE_MERGES,				/* merges.txt */
	FILE_ADDED,					/* added_tokens.json */
	FILE_SPECIAL,				/* special_tokens_map.json */
	N_TOKENIZER_FILES
} TokenizerFile;

typedef struct FileBytes
{
	const char *data;			/* NULL: there is no such file */
	size_t		n;
} FileBytes;

/* What those files were when a tokenizer was made from them; other files have another. */
typedef struct FilesKey
{
	uint64_t	bytes[N_TOKENIZER_FILES];	/* UINT64_MAX: there is no such file */
	uint64_t	hash[N_TOKENIZER_FILES];
} FilesKey;

struct MillmTokenizer
{
	StringMap	contents;		/* token string to id: the vocabulary and the added tokens */
	Token	   *tokens;			/* [n_ids] */
	int			n_ids;
	size_t		longest;		/* content of a token, in bytes */

	AddedToken *added;
	size_t		n_added;
	AddedSet	raw;			/* those with normalized false */
	AddedSet	normalized;

	Normalizer	normalizers[MAX_STAGES];
	int			n_normalizers;
	PreTokenizer pre[MAX_STAGES];
	int			n_pre;
	bool		is_bpe;			/* the model is bpe, else it is lexicon */
	Bpe			bpe;
	Lexicon		lexicon;

	int32_t    *before;			/* what the post-processor adds */
	size_t		n_before;
	int32_t    *after;
	size_t		n_after;

	Decoder		decoders[MAX_STAGES];
	int			n_decoders;		/* 0: tokens are joined with a space */
	Bytes		decoded;

	bool		has_chat_template;	/* in tokenizer_config.json */
	bool		has_template_file;

	bool		is_compiled;	/* the tables lie in an image */
	FileBytes	image;			/* its mapping, if that is the tokenizer's own */
	/* else */
	char	   *stages;			/* JSON: an object of normalizer, pre_tokenizer, decoder.  Owned */
	bool		is_worth_image;
	FilesKey	key;			/* of the files that one would be made from */
};

/* A tokenizer from the bytes of its files.  As millm_tokenizer_open(), but for the chat template in a file of its own. */
extern MillmCode millm_tokenizer_parse_files(const FileBytes files[N_TOKENIZER_FILES], MillmTokenizer **out, MillmError *err);
/* The same of the first two; config may be NULL. */
extern MillmCode millm_tokenizer_parse(const char *json, size_t json_n, const char *config, size_t config_n,
									   MillmTokenizer **out, MillmError *err);

/* ---- image.c ---- */

#define IMAGE_NAME "tokenizer.millm"

extern FilesKey millm_files_key(const FileBytes files[N_TOKENIZER_FILES]);
/*
 * A tokenizer that was parsed, compiled: *out is emptied and becomes the image; the caller's.  key says what it was made from.
 * False: out of memory.
 */
extern bool millm_image_make(const MillmTokenizer *tok, const FilesKey *key, Bytes *out);
/*
 * The tokenizer of an image, at a multiple of 64, that is made from the files of that key; borrowed, it must outlive the tokenizer.
 * NULL when the image is of another version of this room or of other files, when it is damaged, when memory is out: then the files
 * are to be read.
 */
extern MillmTokenizer *millm_image_open(FileBytes image, const FilesKey *key);
/* Before a tokenizer is freed: it has no tables any more. */
extern void millm_image_forget(MillmTokenizer *tok);

/*
 * Run the normalizers over text[0..n); *result is text itself or one of the two buffers.  *is_moved: what it begins with does not
 * come from the beginning of the text.
 */
extern MillmCode millm_normalize(const MillmTokenizer *tok, PatternScratch *scratch, const char *text, size_t n, Bytes buffers[2],
								 const char **result, size_t *result_n, bool *is_moved, MillmError *err);

/* Map the bytes of text[0..n) to the letters of the byte alphabet, into *out, which is emptied first.  False: out of memory. */
extern bool millm_bytes_to_letters(const char *text, size_t n, Bytes *out);

#endif
