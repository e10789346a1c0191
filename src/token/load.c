/*
 * load.c -- tokenizer.json and tokenizer_config.json to a MillmTokenizer.
 *
 * The vocabulary and the merges are hundreds of thousands of strings: bulk.c reads them, jansson the rest.  Their places
 * in the maps are fetched in batches, so that a new string waits for memory once in BATCH and not every time.
 *
 * The files are a stranger's: every type, id and size is checked, and a component, a flag or an order of
 * components that encode.c and decode.c do not reproduce exactly is refused by its name.  Keys that no reader
 * of tokenizer.json knows are ignored, as the genuine library does; so are truncation and padding, which are
 * for training.
 *
 * Of tokenizer_config.json: added_tokens_decoder and the named special tokens (the config wins over
 * tokenizer.json), add_bos_token and add_eos_token (when one is present they replace the post-processor, as in
 * transformers 5), and whether there is a chat template.
 */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bulk.h"
#include "shown.h"
#include "tokenizer.h"
#include "unicode.h"

#define MAX_FILE_BYTES (INT64_C(256) << 20)
#define MAX_IDS (1 << 24)
#define MAX_ADDED_BYTES 4096	/* of one added token: what a search may look at, byte by byte */
#define BATCH 32				/* strings whose places in a map are fetched together */
#define MAX_POST_IDS 64			/* that a post-processor adds on one side */

typedef struct Loader
{
	MillmTokenizer *tok;
	const char *file;			/* that is being read, for the messages */
	MillmError *err;
	Bulk		bulk;			/* of tokenizer.json: the vocabulary and the merges */
	bool		byte_level;		/* the pre-tokenizer ends in ByteLevel */
	size_t		n_vocabulary;
	uint32_t	rank;			/* of the next merge */
	int32_t		joined_id;		/* what the last merge made */
	int			max_ids;		/* that tok->tokens has room for */
	int32_t		max_added;		/* the largest id of an added token; -1: none */
} Loader;

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

static MillmCode invalid(Loader *l, const char *fmt,...) __attribute__((format(printf, 2, 3)));

/* The file is broken; fmt is the detail. */
static MillmCode
invalid(Loader *l, const char *fmt,...)
{
	char		detail[512];
	va_list		ap;

	va_start(ap, fmt);
	vsnprintf(detail, sizeof(detail), fmt, ap);
	va_end(ap);
	millm_fail(l->err, MILLM_E_INVALID_MODEL_FILE, "file \"%s\" is not valid", l->file);
	millm_detail(l->err, "%s", detail);
	return MILLM_E_INVALID_MODEL_FILE;
}

static MillmCode
unsupported(Loader *l, const char *part, const char *name)
{
	return millm_fail(l->err, MILLM_E_UNSUPPORTED, "%s \"%.100s\" of tokenizer.json is not supported", part, name);
}

/* ---- reading JSON ---- */

/* The value of a key, or NULL when it is absent or null. */
static json_t *
get(const json_t *object, const char *key)
{
	json_t	   *v = json_object_get(object, key);

	return json_is_null(v) ? NULL : v;
}

static MillmCode
get_bool(Loader *l, const json_t *object, const char *key, bool otherwise, bool *out)
{
	json_t	   *v = get(object, key);

	*out = v ? json_is_true(v) : otherwise;
	return !v || json_is_boolean(v) ? MILLM_OK : invalid(l, "\"%s\" is not a boolean.", key);
}

static MillmCode
get_size(Loader *l, const json_t *object, const char *key, size_t *out)
{
	json_t	   *v = get(object, key);

	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > 1000000)
		return invalid(l, "\"%s\" is not a count.", key);
	*out = (size_t) json_integer_value(v);
	return MILLM_OK;
}

/* A copy of the string under key: NULL and 0 if it is absent and that is allowed. */
static MillmCode
get_text(Loader *l, const json_t *object, const char *key, bool required, char **out, size_t *n)
{
	json_t	   *v = get(object, key);

	*out = NULL;
	*n = 0;
	if (!v && !required)
		return MILLM_OK;
	if (!json_is_string(v))
		return invalid(l, "\"%s\" is not a string.", key);
	*n = json_string_length(v);
	*out = malloc(*n + 1);
	if (!*out)
		return out_of_memory(l->err);
	memcpy(*out, json_string_value(v), *n + 1);
	return MILLM_OK;
}

/* The "type" of a component. */
static MillmCode
get_type(Loader *l, const json_t *component, const char *part, const char **type)
{
	*type = json_string_value(get(component, "type"));
	return *type ? MILLM_OK : invalid(l, "A %s has no \"type\".", part);
}

/* {"String": ...} or {"Regex": ...} */
static MillmCode
get_pattern(Loader *l, const json_t *component, bool may_be_regex, const char *part, Pattern *out)
{
	json_t	   *pattern = get(component, "pattern");
	json_t	   *regex = get(pattern, "Regex");
	MillmCode	rc;

	if (json_is_string(regex))
	{
		if (!may_be_regex)
			return unsupported(l, part, "Replace with a regular expression");
		return millm_pattern_regex(out, json_string_value(regex), json_string_length(regex), l->err);
	}
	*out = (Pattern) {.kind = PATTERN_LITERAL};
	if ((rc = get_text(l, pattern, "String", true, &out->literal, &out->literal_n)) != MILLM_OK)
		return rc;
	return out->literal_n > 0 ? MILLM_OK : unsupported(l, part, "pattern that is empty");
}

/* ---- normalizers ---- */

static MillmCode
load_normalizer(Loader *l, const json_t *json, int depth)
{
	MillmTokenizer *tok = l->tok;
	const char *type;
	Normalizer *stage;
	MillmCode	rc;

	if ((rc = get_type(l, json, "normalizer", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return unsupported(l, "normalizer", "Sequence nested too deeply");
		if (!json_is_array(get(json, "normalizers")))
			return invalid(l, "\"normalizers\" is not an array.");
		json_array_foreach(get(json, "normalizers"), i, part)
			if ((rc = load_normalizer(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (tok->n_normalizers == MAX_STAGES)
		return unsupported(l, "normalizer", "Sequence with more than 32 parts");
	stage = &tok->normalizers[tok->n_normalizers++];
	if (strcmp(type, "NFC") == 0)
	{
		stage->kind = NORMALIZE_NFC;
		return MILLM_OK;
	}
	if (strcmp(type, "Prepend") == 0)
	{
		stage->kind = NORMALIZE_PREPEND;
		return get_text(l, json, "prepend", true, &stage->text, &stage->text_n);
	}
	if (strcmp(type, "Replace") == 0)
	{
		stage->kind = NORMALIZE_REPLACE;
		if ((rc = get_pattern(l, json, true, "normalizer", &stage->pattern)) != MILLM_OK)
			return rc;
		return get_text(l, json, "content", true, &stage->text, &stage->text_n);
	}
	return unsupported(l, "normalizer", type);
}

/* ---- pre-tokenizers ---- */

static MillmCode
add_pre(Loader *l, PreTokenizerKind kind, PreTokenizer **out)
{
	if (l->tok->n_pre == MAX_STAGES)
		return unsupported(l, "pre-tokenizer", "Sequence with more than 32 parts");
	if (l->byte_level)
		return unsupported(l, "pre-tokenizer", "ByteLevel before another one");
	*out = &l->tok->pre[l->tok->n_pre++];
	(*out)->kind = kind;
	return MILLM_OK;
}

static MillmCode
add_split(Loader *l, Pattern pattern, Behavior behavior, bool invert)
{
	PreTokenizer *pre = NULL;
	MillmCode	rc = add_pre(l, PRE_SPLIT, &pre);

	if (rc != MILLM_OK)
	{
		millm_pattern_free(&pattern);
		return rc;
	}
	pre->pattern = pattern;
	pre->behavior = behavior;
	pre->invert = invert;
	return MILLM_OK;
}

static MillmCode
load_byte_level(Loader *l, const json_t *json)
{
	static const char gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
	bool		add_prefix_space;
	bool		use_regex;
	PreTokenizer *pre;
	Pattern		pattern;
	MillmCode	rc;

	if (!get(json, "add_prefix_space"))
		return invalid(l, "ByteLevel has no \"add_prefix_space\".");
	if ((rc = get_bool(l, json, "add_prefix_space", false, &add_prefix_space)) != MILLM_OK ||
		(rc = get_bool(l, json, "use_regex", true, &use_regex)) != MILLM_OK)
		return rc;
	if (add_prefix_space && (rc = add_pre(l, PRE_PREFIX_SPACE, &pre)) != MILLM_OK)
		return rc;
	if (use_regex && ((rc = millm_pattern_regex(&pattern, gpt2, sizeof(gpt2) - 1, l->err)) != MILLM_OK ||
					  (rc = add_split(l, pattern, SPLIT_ISOLATED, false)) != MILLM_OK))
		return rc;
	if (l->byte_level)
		return unsupported(l, "pre-tokenizer", "ByteLevel before another one");
	l->byte_level = true;
	return MILLM_OK;
}

static MillmCode
load_split(Loader *l, const json_t *json)
{
	static const char *const names[] = {
		[SPLIT_REMOVED] = "Removed",
		[SPLIT_ISOLATED] = "Isolated",
		[SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
		[SPLIT_MERGED_WITH_NEXT] = "MergedWithNext",
		[SPLIT_CONTIGUOUS] = "Contiguous",
	};
	const char *name = json_string_value(get(json, "behavior"));
	Pattern		pattern = {0};
	bool		invert;
	MillmCode	rc;

	if (!name)
		return invalid(l, "Split has no \"behavior\".");
	if ((rc = get_bool(l, json, "invert", false, &invert)) != MILLM_OK)
		return rc;
	for (int behavior = 0; behavior <= SPLIT_CONTIGUOUS; behavior++)
		if (strcmp(names[behavior], name) == 0)
		{
			if ((rc = get_pattern(l, json, true, "pre-tokenizer", &pattern)) != MILLM_OK)
			{
				millm_pattern_free(&pattern);
				return rc;
			}
			return add_split(l, pattern, (Behavior) behavior, invert);
		}
	return invalid(l, "Split has the behavior \"%.50s\".", name);
}

static MillmCode
load_metaspace(Loader *l, const json_t *json, Prepend *prepend, Pattern *replacement, bool *is_split)
{
	const char *scheme = json_string_value(get(json, "prepend_scheme"));
	bool		legacy;
	uint32_t	cp;
	MillmCode	rc;

	*replacement = (Pattern) {.kind = PATTERN_LITERAL};
	*prepend = PREPEND_ALWAYS;
	if ((rc = get_bool(l, json, "add_prefix_space", true, &legacy)) != MILLM_OK ||
		(rc = get_bool(l, json, "split", true, is_split)) != MILLM_OK)
		return rc;
	if (scheme && strcmp(scheme, "never") == 0)
		*prepend = PREPEND_NEVER;
	else if (scheme && strcmp(scheme, "first") == 0)
		*prepend = PREPEND_FIRST;
	else if (get(json, "prepend_scheme") && (!scheme || strcmp(scheme, "always") != 0))
		return invalid(l, "Metaspace has the \"prepend_scheme\" \"%.50s\".", scheme ? scheme : "");
	if (!legacy)
	{
		if (scheme && *prepend != PREPEND_NEVER)
			return invalid(l, "Metaspace has \"add_prefix_space\" false, but \"prepend_scheme\" \"%s\".", scheme);
		*prepend = PREPEND_NEVER;
	}
	if ((rc = get_text(l, json, "replacement", true, &replacement->literal, &replacement->literal_n)) != MILLM_OK)
		return rc;
	if (replacement->literal_n == 0 || millm_utf8_get(replacement->literal, &cp) != replacement->literal_n)
		return invalid(l, "The \"replacement\" of Metaspace is not one character.");
	return MILLM_OK;
}

static MillmCode
load_pre_tokenizer(Loader *l, const json_t *json, int depth)
{
	const char *type;
	MillmCode	rc;

	if ((rc = get_type(l, json, "pre-tokenizer", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return unsupported(l, "pre-tokenizer", "Sequence nested too deeply");
		if (!json_is_array(get(json, "pretokenizers")))
			return invalid(l, "\"pretokenizers\" is not an array.");
		json_array_foreach(get(json, "pretokenizers"), i, part)
			if ((rc = load_pre_tokenizer(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (strcmp(type, "ByteLevel") == 0)
		return load_byte_level(l, json);
	if (strcmp(type, "Split") == 0)
		return load_split(l, json);
	if (strcmp(type, "Digits") == 0)
	{
		bool		individual;

		if ((rc = get_bool(l, json, "individual_digits", false, &individual)) != MILLM_OK)
			return rc;
		return add_split(l, (Pattern) {.kind = PATTERN_FLAG, .flag = UC_NUMERIC},
						 individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, false);
	}
	if (strcmp(type, "WhitespaceSplit") == 0)
		return add_split(l, (Pattern) {.kind = PATTERN_FLAG, .flag = UC_SPACE}, SPLIT_REMOVED, false);
	if (strcmp(type, "Metaspace") == 0)
	{
		Pattern		replacement;
		Prepend		prepend;
		bool		is_split;
		PreTokenizer *pre = NULL;

		if ((rc = load_metaspace(l, json, &prepend, &replacement, &is_split)) != MILLM_OK ||
			(rc = add_pre(l, PRE_METASPACE, &pre)) != MILLM_OK)
		{
			millm_pattern_free(&replacement);
			return rc;
		}
		pre->prepend = prepend;
		pre->text = replacement.literal;
		pre->text_n = replacement.literal_n;
		if (!is_split)
			return MILLM_OK;
		replacement.literal = malloc(pre->text_n);
		if (!replacement.literal)
			return out_of_memory(l->err);
		memcpy(replacement.literal, pre->text, pre->text_n);
		return add_split(l, replacement, SPLIT_MERGED_WITH_NEXT, false);
	}
	return unsupported(l, "pre-tokenizer", type);
}

/* ---- the model ---- */

/* Turn letters of the byte alphabet into their bytes; false when one is not of the alphabet.  out has room for n. */
static bool
letters_to_bytes(const char *s, size_t n, char *out, size_t *out_n)
{
	*out_n = 0;
	for (size_t i = 0; i < n;)
	{
		uint32_t	cp;
		int			byte;

		if (s[i] > 0x20 && s[i] < 0x7F) /* most letters: they stand for themselves */
		{
			out[(*out_n)++] = s[i++];
			continue;
		}
		i += millm_utf8_get(s + i, &cp);
		byte = millm_letter_to_byte(cp);
		if (byte < 0)
			return false;
		out[(*out_n)++] = (char) byte;
	}
	return true;
}

/* Make tokens large enough for id. */
static MillmCode
reserve_id(Loader *l, int32_t id)
{
	MillmTokenizer *tok = l->tok;
	Token	   *tokens;

	if (id < tok->n_ids)
		return MILLM_OK;
	if (id >= l->max_ids)
	{
		int			max_ids = id + id / 4 + 1024;

		tokens = millm_table_alloc((size_t) max_ids, sizeof(*tokens));
		if (!tokens)
			return out_of_memory(l->err);
		if (tok->n_ids > 0)
			memcpy(tokens, tok->tokens, (size_t) tok->n_ids * sizeof(*tokens));
		free(tok->tokens);
		tok->tokens = tokens;
		l->max_ids = max_ids;
	}
	memset(tok->tokens + tok->n_ids, 0, (size_t) (id + 1 - tok->n_ids) * sizeof(*tok->tokens));
	tok->n_ids = id + 1;
	return MILLM_OK;
}

/* A string of the vocabulary, fit for a message. */
static MillmShown
shown_part(const char *text, size_t n)
{
	char		copy[SHOWN_BYTES + 2];	/* one byte more than are shown, to tell that there are more */

	n = n < sizeof(copy) - 1 ? n : sizeof(copy) - 1;
	memcpy(copy, text, n);
	copy[n] = '\0';
	return shown(copy);
}

static MillmCode
invalid_id(Loader *l, int64_t id)
{
	return invalid(l, "The token id %lld is out of range.", (long long) id);
}

/* Give content its id, a new one.  A content that is there keeps the id it has, and *is_new is false. */
static MillmCode
add_content(Loader *l, MapKey content, int64_t id, bool *is_new)
{
	MillmTokenizer *tok = l->tok;
	size_t		offset = tok->contents.keys.n;
	MillmCode	rc;

	if (id < 0 || id >= MAX_IDS)
		return invalid_id(l, id);
	if (!millm_map_add(&tok->contents, content, (int32_t) id, is_new))
		return out_of_memory(l->err);
	if (!*is_new)
		return MILLM_OK;
	if ((rc = reserve_id(l, (int32_t) id)) != MILLM_OK)
		return rc;
	if (tok->tokens[id].exists)
		return invalid(l, "The token id %lld belongs to two tokens, one of them \"%s\".",
					   (long long) id, shown_part(content.text, content.n).text);
	tok->tokens[id].content = (Span) {(uint32_t) offset, content.n};
	tok->tokens[id].exists = true;
	return MILLM_OK;
}

/* Why bulk.c left model.vocab to jansson. */
static MillmCode
refuse_vocabulary(Loader *l, const json_t *vocabulary)
{
	const char *key;
	json_t	   *value;

	json_object_foreach((json_t *) vocabulary, key, value)
	{
		if (!json_is_integer(value))
			return invalid(l, "The id of the token \"%s\" is not an integer.", shown(key).text);
		if (json_integer_value(value) < 0 || json_integer_value(value) >= MAX_IDS)
			return invalid_id(l, json_integer_value(value));
	}
	return invalid(l, "The model has no vocabulary.");
}

/*
 * Put entries[0..n), at most BATCH of them, into the vocabulary.  Backwards: of equal keys the last one counts, as in
 * any reader of JSON.  What letters of the byte alphabet stand for goes into decoded, which has room for it.
 */
static MillmCode
add_entries(Loader *l, const BulkEntry *entries, size_t n)
{
	Bpe		   *bpe = &l->tok->bpe;
	Bytes	   *decoded = &l->tok->decoded;
	MapKey		contents[BATCH];
	MapKey		pieces[BATCH];
	bool		is_piece[BATCH];
	bool		is_new;
	MillmCode	rc;

	for (size_t i = 0; i < n; i++)
	{
		contents[i] = pieces[i] = millm_map_key(entries[i].text, entries[i].n);
		is_piece[i] = true;
		if (bpe->is_byte_level)
		{
			char	   *piece = decoded->data + decoded->n;
			size_t		piece_n;

			/* if not, a literal special token: no text can become it by merging */
			is_piece[i] = letters_to_bytes(entries[i].text, entries[i].n, piece, &piece_n);
			pieces[i] = millm_map_key(piece, (uint32_t) piece_n);
			decoded->n += piece_n;
		}
		millm_map_prefetch(&l->tok->contents, contents[i]);
		millm_map_prefetch(&bpe->pieces, pieces[i]);
	}
	for (size_t i = n; i-- > 0;)
	{
		if ((rc = add_content(l, contents[i], entries[i].id, &is_new)) != MILLM_OK)
			return rc;
		if (!is_new)
			continue;
		l->n_vocabulary++;
		if (!is_piece[i])
			continue;
		if (!millm_map_add(&bpe->pieces, pieces[i], (int32_t) entries[i].id, &is_new))
			return out_of_memory(l->err);
		if (bpe->is_byte_level)
			l->tok->tokens[entries[i].id].bytes = (Span) {(uint32_t) (pieces[i].text - decoded->data), pieces[i].n};
		if (pieces[i].n > bpe->longest)
			bpe->longest = pieces[i].n;
	}
	return MILLM_OK;
}

static MillmCode
load_vocabulary(Loader *l, const json_t *model)
{
	Bpe		   *bpe = &l->tok->bpe;
	StringMap  *contents = &l->tok->contents;
	const Bulk *bulk = &l->bulk;
	size_t		key_bytes = 0;
	MillmCode	rc = MILLM_OK;

	if (!bulk->has_vocabulary || bulk->n_entries == 0)
		return refuse_vocabulary(l, get(model, "vocab"));
	for (size_t i = 0; i < bulk->n_entries; i++)
		key_bytes += bulk->entries[i].n;
	if (!millm_map_reserve(contents, bulk->n_entries, key_bytes) ||
		!millm_map_reserve(&bpe->pieces, bulk->n_entries, key_bytes) ||
		!millm_bytes_reserve(&l->tok->decoded, key_bytes))
		return out_of_memory(l->err);
	for (size_t end = bulk->n_entries, n; end > 0 && rc == MILLM_OK; end -= n)
	{
		n = end < BATCH ? end : BATCH;
		rc = add_entries(l, bulk->entries + end - n, n);
	}
	if (rc != MILLM_OK)
		return rc;
	for (int b = 0; b < 256; b++)
	{
		char		byte = (char) b;
		char		name[8];

		snprintf(name, sizeof(name), "<0x%02X>", b);
		bpe->byte_ids[b] = bpe->is_byte_level ? millm_map_get(&bpe->pieces, &byte, 1) : -1;
		bpe->fallback_ids[b] = millm_map_get(contents, name, 6);
	}
	return MILLM_OK;
}

/* Take "a b" apart into "a" and "b".  False when it has no space, or more than one. */
static bool
split_merge(BulkMerge *merge)
{
	const char *space = memchr(merge->left, ' ', merge->left_n);

	if (!space)
		return false;
	merge->right = space + 1;
	merge->right_n = merge->left_n - (uint32_t) (space + 1 - merge->left);
	merge->left_n = (uint32_t) (space - merge->left);
	return memchr(merge->right, ' ', merge->right_n) == NULL;
}

/* Why bulk.c left model.merges to jansson. */
static MillmCode
refuse_merges(Loader *l, const json_t *merges)
{
	size_t		i;
	json_t	   *merge;

	json_array_foreach(merges, i, merge)
		if (!json_is_string(merge) &&
			(json_array_size(merge) != 2 || !json_is_string(json_array_get(merge, 0)) || !json_is_string(json_array_get(merge, 1))))
			return invalid(l, "Merge %zu is not a pair of tokens.", i);
	return invalid(l, "The model has no \"merges\".");
}

/* Is the token id the text of left and right together? */
static bool
is_joined(const MillmTokenizer *tok, int32_t id, const char *left, size_t left_n, const char *right, size_t right_n)
{
	Span		content;
	const char *text;

	if (id >= tok->n_ids || !tok->tokens[id].exists)
		return false;
	content = tok->tokens[id].content;
	text = tok->contents.keys.data + content.offset;
	return content.n == left_n + right_n && memcmp(text, left, left_n) == 0 && memcmp(text + left_n, right, right_n) == 0;
}

/*
 * What a merge makes, or -1 in *id.  Vocabularies are written in the order of their merges, so it is likely what the
 * merge before made, which the caller leaves in *id, or the token behind that.
 */
static MillmCode
find_joined(Loader *l, const char *left, size_t left_n, const char *right, size_t right_n, Bytes *joined, int32_t *id)
{
	for (int likely = 0; likely < 2; likely++, ++*id)
		if (is_joined(l->tok, *id, left, left_n, right, right_n))
			return MILLM_OK;
	joined->n = 0;
	if (!millm_bytes_add(joined, left, left_n) || !millm_bytes_add(joined, right, right_n))
		return out_of_memory(l->err);
	*id = millm_map_get(&l->tok->contents, joined->data, joined->n);
	return MILLM_OK;
}

/*
 * Add merges[0..n), at most BATCH of them, the first of which is number `first` of the file.  prefix_n bytes are cut
 * from the beginning of a right part that is joined.
 */
static MillmCode
add_merges(Loader *l, BulkMerge *merges, size_t n, size_t first, size_t prefix_n, Bytes *joined)
{
	MillmTokenizer *tok = l->tok;
	MapKey		left[BATCH];
	MapKey		right[BATCH];
	Merge		made[BATCH];
	size_t		n_made = 0;
	MillmCode	rc;

	for (size_t i = 0; i < n; i++)
	{
		BulkMerge  *merge = &merges[i];

		left[i].text = NULL;
		if (!merge->right && merge->left_n >= 8 && memcmp(merge->left, "#version", 8) == 0)
			continue;
		if (!merge->right && !split_merge(merge))
			return invalid(l, "Merge %zu is not a pair of tokens.", first + i);
		left[i] = millm_map_key(merge->left, merge->left_n);
		right[i] = millm_map_key(merge->right, merge->right_n);
		millm_map_prefetch(&tok->contents, left[i]);
		millm_map_prefetch(&tok->contents, right[i]);
	}
	for (size_t i = 0; i < n; i++)
	{
		int32_t		a;
		int32_t		b;

		if (!left[i].text)
			continue;
		a = millm_map_find(&tok->contents, left[i]);
		b = right[i].n < prefix_n ? -1 : millm_map_find(&tok->contents, right[i]);
		if (b >= 0 && (rc = find_joined(l, left[i].text, left[i].n, right[i].text + prefix_n, right[i].n - prefix_n,
										joined, &l->joined_id)) != MILLM_OK)
			return rc;
		if (a < 0 || b < 0 || l->joined_id < 0)
			return invalid(l, "Merge %zu, \"%s\" and \"%s\", has a part or a result that is not in the vocabulary.",
						   first + i, shown_part(left[i].text, left[i].n).text, shown_part(right[i].text, right[i].n).text);
		made[n_made++] = millm_bpe_merge(&tok->bpe, a, b, l->rank++, l->joined_id);
	}
	for (size_t i = 0; i < n_made; i++)
		millm_bpe_add_merge(&tok->bpe, made[i]);
	return MILLM_OK;
}

static MillmCode
load_merges(Loader *l, const json_t *model, size_t prefix_n)
{
	Bytes		joined = {0};
	MillmCode	rc = MILLM_OK;

	if (!l->bulk.has_merges)
		return refuse_merges(l, get(model, "merges"));
	if (!millm_bpe_reserve_merges(&l->tok->bpe, l->bulk.n_merges))
		return out_of_memory(l->err);
	for (size_t first = 0, n; first < l->bulk.n_merges && rc == MILLM_OK; first += n)
	{
		n = l->bulk.n_merges - first < BATCH ? l->bulk.n_merges - first : BATCH;
		rc = add_merges(l, l->bulk.merges + first, n, first, prefix_n, &joined);
	}
	millm_bytes_free(&joined);
	return rc;
}

/* continuing_subword_prefix and end_of_word_suffix; "" is none. */
static MillmCode
load_affix(Loader *l, const json_t *model, const char *key, char **affix, size_t *n)
{
	MillmCode	rc = get_text(l, model, key, false, affix, n);

	if (rc == MILLM_OK && *affix && *n == 0)
	{
		free(*affix);
		*affix = NULL;
	}
	if (rc == MILLM_OK && *affix && l->byte_level && !letters_to_bytes(*affix, *n, *affix, n))
		rc = unsupported(l, "model", "BPE with an affix outside of the byte alphabet");
	return rc;
}

static MillmCode
load_model(Loader *l, const json_t *json)
{
	Bpe		   *bpe = &l->tok->bpe;
	const char *type = json_string_value(get(json, "type"));
	json_t	   *dropout = get(json, "dropout");
	json_t	   *unknown = get(json, "unk_token");
	bool		has_all_bytes = l->byte_level;
	size_t		prefix_n;
	MillmCode	rc;

	if (!json_is_object(json))
		return invalid(l, "It has no \"model\".");
	if (type ? strcmp(type, "BPE") != 0 : !l->bulk.has_merges && !get(json, "merges"))
		return unsupported(l, "model", type ? type : "without a type");
	if (dropout && (!json_is_number(dropout) || json_number_value(dropout) != 0))
		return unsupported(l, "model", "BPE with dropout");
	bpe->is_byte_level = l->byte_level;
	bpe->unknown_id = -1;
	if ((rc = get_bool(l, json, "ignore_merges", false, &bpe->ignore_merges)) != MILLM_OK ||
		(rc = get_bool(l, json, "byte_fallback", false, &bpe->byte_fallback)) != MILLM_OK ||
		(rc = get_bool(l, json, "fuse_unk", false, &bpe->fuse_unknown)) != MILLM_OK ||
		(rc = load_affix(l, json, "continuing_subword_prefix", &bpe->prefix, &bpe->prefix_n)) != MILLM_OK ||
		(rc = load_affix(l, json, "end_of_word_suffix", &bpe->suffix, &bpe->suffix_n)) != MILLM_OK ||
		(rc = load_vocabulary(l, json)) != MILLM_OK)
		return rc;
	/* the merges are written in letters, so is the prefix that is cut from them */
	prefix_n = json_string_length(get(json, "continuing_subword_prefix"));
	if ((rc = load_merges(l, json, prefix_n)) != MILLM_OK)
		return rc;
	for (int b = 0; b < 256; b++)
		has_all_bytes = has_all_bytes && bpe->byte_ids[b] >= 0;
	if (unknown)
	{
		if (!json_is_string(unknown))
			return invalid(l, "\"unk_token\" is not a string.");
		bpe->unknown_id = millm_map_get(&l->tok->contents, json_string_value(unknown), json_string_length(unknown));
		if (bpe->unknown_id < 0 && !has_all_bytes)
			return invalid(l, "The \"unk_token\" \"%.100s\" is not in the vocabulary.", json_string_value(unknown));
	}
	bpe->is_whole = calloc((size_t) l->tok->n_ids, sizeof(*bpe->is_whole));
	return bpe->is_whole ? MILLM_OK : out_of_memory(l->err);
}

/* ---- added tokens ---- */

/*
 * Add one token, or change the flags of one that is there.  file_id is what the file says (-1: nothing); an id
 * is computed as the genuine library does, which ignores file_id; where the two differ, the file is not what
 * its maker thought.
 */
static MillmCode
add_token(Loader *l, const json_t *json, bool is_special, int64_t file_id)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *content = json_is_string(json) ? (json_t *) json : get(json, "content");
	const char *text = json_string_value(content);
	size_t		n = json_string_length(content);
	AddedToken	token = {0};
	bool		is_new;
	int64_t		id;
	size_t		i;
	MillmCode	rc;

	if (!text)
		return invalid(l, "An added token has no \"content\".");
	if (n == 0)
		return MILLM_OK;
	if (n > MAX_ADDED_BYTES)
		return invalid(l, "An added token is %zu bytes long, the limit is %d.", n, MAX_ADDED_BYTES);
	token.special = is_special;
	if (json_is_object(json))
	{
		if ((rc = get_bool(l, json, "special", is_special, &token.special)) != MILLM_OK ||
			(rc = get_bool(l, json, "single_word", false, &token.single_word)) != MILLM_OK ||
			(rc = get_bool(l, json, "lstrip", false, &token.lstrip)) != MILLM_OK ||
			(rc = get_bool(l, json, "rstrip", false, &token.rstrip)) != MILLM_OK ||
			(rc = get_bool(l, json, "normalized", !token.special, &token.normalized)) != MILLM_OK)
			return rc;
		token.special = token.special || is_special;
	}
	id = millm_map_get(&tok->contents, text, n);
	if (id < 0)
	{
		id = (int64_t) l->n_vocabulary;
		if (l->max_added >= id)
			id = (int64_t) l->max_added + 1;
		if ((rc = add_content(l, millm_map_key(text, (uint32_t) n), id, &is_new)) != MILLM_OK)
			return rc;
	}
	if (file_id >= 0 && file_id != id)
		return invalid(l, "The added token \"%.100s\" has the id %lld, but its place in the vocabulary is %lld.",
					   text, (long long) file_id, (long long) id);
	token.id = (int32_t) id;
	token.content = tok->tokens[id].content;
	tok->tokens[id].special = token.special = token.special || tok->tokens[id].special;
	if (token.id > l->max_added)
		l->max_added = token.id;
	i = tok->tokens[id].added;
	if (i == 0)
	{
		if ((tok->n_added & (tok->n_added - 1)) == 0)
		{
			size_t		capacity = tok->n_added ? tok->n_added * 2 : 1;
			AddedToken *added = realloc(tok->added, capacity * sizeof(*added));

			if (!added)
				return out_of_memory(l->err);
			tok->added = added;
		}
		i = ++tok->n_added;
		tok->tokens[id].added = (uint32_t) i;
	}
	tok->added[i - 1] = token;
	return MILLM_OK;
}

static MillmCode
load_added_tokens(Loader *l, const json_t *list)
{
	size_t		i;
	json_t	   *json;
	MillmCode	rc;

	if (list && !json_is_array(list))
		return invalid(l, "\"added_tokens\" is not an array.");
	json_array_foreach(list, i, json)
	{
		json_t	   *id = get(json, "id");

		if (!json_is_integer(id) || json_integer_value(id) < 0)
			return invalid(l, "An added token has no \"id\".");
		if ((rc = add_token(l, json, false, json_integer_value(id))) != MILLM_OK)
			return rc;
	}
	return MILLM_OK;
}

static int
compare_patterns(const void *a, const void *b)
{
	const AddedPattern *x = a;
	const AddedPattern *y = b;
	size_t		n = x->n < y->n ? x->n : y->n;
	int			order = memcmp(x->text, y->text, n);

	if (order != 0)
		return order;
	if (x->n != y->n)
		return x->n < y->n ? -1 : 1;
	return x->token < y->token ? -1 : x->token > y->token;
}

/* Fill one of the two sets with its tokens, once all are known. */
static MillmCode
build_set(Loader *l, AddedSet *set, bool normalized)
{
	MillmTokenizer *tok = l->tok;
	Bytes		buffers[2] = {0};
	PatternScratch scratch = {0};
	size_t	   *offsets = NULL; /* of the patterns in set->texts, which may still move */
	uint32_t	first = 0;
	MillmCode	rc = MILLM_OK;

	if (tok->n_added == 0)
		return MILLM_OK;
	set->patterns = calloc(tok->n_added, sizeof(*set->patterns));
	offsets = calloc(tok->n_added, sizeof(*offsets));
	if (!set->patterns || !offsets)
		rc = out_of_memory(l->err);
	for (size_t i = 0; i < tok->n_added && rc == MILLM_OK; i++)
	{
		const AddedToken *token = &tok->added[i];
		const char *text = tok->contents.keys.data + token->content.offset;
		size_t		n = token->content.n;

		if (token->normalized != normalized)
			continue;
		if (normalized &&
			(rc = millm_normalize(tok, &scratch, text, n, buffers, &text, &n, l->err)) != MILLM_OK)
			break;
		if (n == 0)
			continue;
		offsets[set->n] = set->texts.n;
		if (!millm_bytes_add(&set->texts, text, n))
			rc = out_of_memory(l->err);
		set->patterns[set->n++] = (AddedPattern) {NULL, n, (uint32_t) i};
	}
	for (size_t i = 0; i < set->n && rc == MILLM_OK; i++)
		set->patterns[i].text = set->texts.data + offsets[i];
	if (rc == MILLM_OK)
		qsort(set->patterns, set->n, sizeof(*set->patterns), compare_patterns);
	for (int b = 0; b <= 256 && rc == MILLM_OK; b++)
	{
		while (first < set->n && (unsigned char) set->patterns[first].text[0] < b)
			first++;
		set->first[b] = first;
	}
	free(offsets);
	millm_bytes_free(&buffers[0]);
	millm_bytes_free(&buffers[1]);
	millm_pattern_scratch_free(&scratch);
	return rc;
}

/* ---- the post-processor ---- */

static MillmCode
add_post_ids(Loader *l, int32_t **ids, size_t *n, const int32_t *more, size_t n_more, bool in_front)
{
	int32_t    *grown;

	if (*n + n_more > MAX_POST_IDS)
		return unsupported(l, "post-processor", "with more than 64 tokens");
	grown = realloc(*ids, (*n + n_more + 1) * sizeof(*grown));
	if (!grown)
		return out_of_memory(l->err);
	*ids = grown;
	if (in_front)
		memmove(grown + n_more, grown, *n * sizeof(*grown));
	memcpy(grown + (in_front ? 0 : *n), more, n_more * sizeof(*grown));
	*n += n_more;
	return MILLM_OK;
}

static MillmCode
load_template(Loader *l, const json_t *json)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *single = get(json, "single");
	int32_t		ids[2][MAX_POST_IDS];	/* before the text, and behind it */
	size_t		n[2] = {0};
	int			side = 0;
	size_t		i;
	json_t	   *item;
	MillmCode	rc;

	if (!json_is_array(single))
		return invalid(l, "TemplateProcessing has no \"single\".");
	json_array_foreach(single, i, item)
	{
		json_t	   *sequence = get(item, "Sequence");
		const char *name = json_string_value(get(get(item, "SpecialToken"), "id"));
		json_t	   *token_ids;
		size_t		k;
		json_t	   *id;

		if (sequence)
		{
			const char *which = json_string_value(get(sequence, "id"));

			if (!which || strcmp(which, "A") != 0 || side++ > 0)
				return unsupported(l, "post-processor", "TemplateProcessing that does not name the text once");
			continue;
		}
		token_ids = name ? get(get(get(json, "special_tokens"), name), "ids") : NULL;
		if (!json_is_array(token_ids))
			return invalid(l, "Item %zu of TemplateProcessing names no special token.", i);
		json_array_foreach(token_ids, k, id)
		{
			if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= tok->n_ids)
				return invalid(l, "The special token \"%.100s\" of TemplateProcessing has an id that no token has.", name);
			if (n[side] == MAX_POST_IDS)
				return unsupported(l, "post-processor", "with more than 64 tokens");
			ids[side][n[side]++] = (int32_t) json_integer_value(id);
		}
	}
	if (side == 0)
		return unsupported(l, "post-processor", "TemplateProcessing that does not name the text once");
	if ((rc = add_post_ids(l, &tok->before, &tok->n_before, ids[0], n[0], true)) != MILLM_OK)
		return rc;
	return add_post_ids(l, &tok->after, &tok->n_after, ids[1], n[1], false);
}

static MillmCode
load_post_processor(Loader *l, const json_t *json, int depth)
{
	const char *type;
	MillmCode	rc;

	if ((rc = get_type(l, json, "post-processor", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return unsupported(l, "post-processor", "Sequence nested too deeply");
		if (!json_is_array(get(json, "processors")))
			return invalid(l, "\"processors\" is not an array.");
		json_array_foreach(get(json, "processors"), i, part)
			if ((rc = load_post_processor(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (strcmp(type, "ByteLevel") == 0)
		return MILLM_OK;		/* it only moves offsets, which we do not have */
	if (strcmp(type, "TemplateProcessing") == 0)
		return load_template(l, json);
	return unsupported(l, "post-processor", type);
}

/* ---- decoders ---- */

static MillmCode
load_decoder(Loader *l, const json_t *json, int depth)
{
	MillmTokenizer *tok = l->tok;
	const char *type;
	Decoder    *stage;
	MillmCode	rc;

	if ((rc = get_type(l, json, "decoder", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return unsupported(l, "decoder", "Sequence nested too deeply");
		if (json_array_size(get(json, "decoders")) == 0)
			return unsupported(l, "decoder", "Sequence without decoders");
		json_array_foreach(get(json, "decoders"), i, part)
			if ((rc = load_decoder(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (tok->n_decoders == MAX_STAGES)
		return unsupported(l, "decoder", "Sequence with more than 32 parts");
	stage = &tok->decoders[tok->n_decoders++];
	if (strcmp(type, "ByteLevel") == 0)
		stage->kind = DECODE_BYTE_LEVEL;
	else if (strcmp(type, "ByteFallback") == 0)
		stage->kind = DECODE_BYTE_FALLBACK;
	else if (strcmp(type, "Fuse") == 0)
		stage->kind = DECODE_FUSE;
	else if (strcmp(type, "Replace") == 0)
	{
		stage->kind = DECODE_REPLACE;
		if ((rc = get_pattern(l, json, false, "decoder", &stage->pattern)) != MILLM_OK)
			return rc;
		return get_text(l, json, "content", true, &stage->text, &stage->text_n);
	}
	else if (strcmp(type, "Strip") == 0)
	{
		uint32_t	cp;

		stage->kind = DECODE_STRIP;
		stage->pattern.kind = PATTERN_LITERAL;
		if ((rc = get_size(l, json, "start", &stage->n_start)) != MILLM_OK ||
			(rc = get_size(l, json, "stop", &stage->n_stop)) != MILLM_OK ||
			(rc = get_text(l, json, "content", true, &stage->pattern.literal, &stage->pattern.literal_n)) != MILLM_OK)
			return rc;
		if (stage->pattern.literal_n == 0 || millm_utf8_get(stage->pattern.literal, &cp) != stage->pattern.literal_n)
			return invalid(l, "The \"content\" of Strip is not one character.");
	}
	else if (strcmp(type, "Metaspace") == 0)
	{
		Prepend		prepend;
		bool		is_split;

		stage->kind = DECODE_METASPACE;
		rc = load_metaspace(l, json, &prepend, &stage->pattern, &is_split);
		stage->is_first_dropped = prepend != PREPEND_NEVER;
		return rc;
	}
	else
		return unsupported(l, "decoder", type);
	return MILLM_OK;
}

/*
 * Are the decoders in an order that decode.c reproduces?  ByteLevel alone; else those that rewrite a token,
 * then ByteFallback, then Fuse, then one Strip of the beginning.
 */
static MillmCode
check_decoders(Loader *l)
{
	const MillmTokenizer *tok = l->tok;
	int			last = 0;

	for (int i = 0; i < tok->n_decoders; i++)
	{
		const Decoder *d = &tok->decoders[i];
		int			place = d->kind == DECODE_BYTE_FALLBACK ? 1 : d->kind == DECODE_FUSE ? 2 : 0;

		if (d->kind == DECODE_STRIP && last == 2 && d->n_stop == 0)
			place = 3;
		if ((d->kind == DECODE_BYTE_LEVEL && tok->n_decoders > 1) || place < last || (place > 0 && place == last))
			return unsupported(l, "decoder", "Sequence in this order");
		last = place;
	}
	return MILLM_OK;
}

/* What each token is to the ByteLevel decoder: bytes if all of it is of the byte alphabet, else itself. */
static MillmCode
decode_tokens(Loader *l)
{
	MillmTokenizer *tok = l->tok;

	if (tok->n_decoders != 1 || tok->decoders[0].kind != DECODE_BYTE_LEVEL)
		return MILLM_OK;
	for (int id = 0; id < tok->n_ids; id++)
	{
		Token	   *token = &tok->tokens[id];
		const char *content = tok->contents.keys.data + token->content.offset;
		size_t		n = token->content.n;

		if (!token->exists || token->bytes.n > 0)
			continue;			/* none, or add_entries() has been there */
		token->bytes.offset = (uint32_t) tok->decoded.n;
		if (!millm_bytes_reserve(&tok->decoded, n))
			return out_of_memory(l->err);
		if (!letters_to_bytes(content, n, tok->decoded.data + tok->decoded.n, &n))
		{
			n = token->content.n;
			memcpy(tok->decoded.data + tok->decoded.n, content, n);
		}
		tok->decoded.n += n;
		token->bytes.n = (uint32_t) n;
	}
	return MILLM_OK;
}

/* ---- the two files ---- */

static MillmCode
parse_json(Loader *l, const char *text, size_t n, size_t flags, json_t **out)
{
	json_error_t why;

	*out = json_loadb(text, n, JSON_ALLOW_NUL | flags, &why);
	if (!*out)
		return invalid(l, "Line %d, column %d: %s.", why.line, why.column, why.text);
	return json_is_object(*out) ? MILLM_OK : invalid(l, "It is not a JSON object.");
}

static MillmCode
load_tokenizer(Loader *l, const json_t *json)
{
	const char *version = json_string_value(get(json, "version"));
	MillmCode	rc = MILLM_OK;

	if (version && strcmp(version, "1.0") != 0)
		return unsupported(l, "version", version);
	if (get(json, "normalizer"))
		rc = load_normalizer(l, get(json, "normalizer"), 0);
	if (rc == MILLM_OK && get(json, "pre_tokenizer"))
		rc = load_pre_tokenizer(l, get(json, "pre_tokenizer"), 0);
	if (rc == MILLM_OK)
		rc = load_model(l, get(json, "model"));
	if (rc == MILLM_OK)
		rc = load_added_tokens(l, get(json, "added_tokens"));
	if (rc == MILLM_OK && get(json, "post_processor"))
		rc = load_post_processor(l, get(json, "post_processor"), 0);
	if (rc == MILLM_OK && get(json, "decoder"))
		rc = load_decoder(l, get(json, "decoder"), 0);
	return rc == MILLM_OK ? check_decoders(l) : rc;
}

static int
compare_ids(const void *a, const void *b)
{
	long		x = strtol(*(const char *const *) a, NULL, 10);
	long		y = strtol(*(const char *const *) b, NULL, 10);

	return (x > y) - (x < y);
}

/* added_tokens_decoder: {"5": {"content": ..., flags}, ...}, in the order of the ids. */
static MillmCode
load_config_tokens(Loader *l, json_t *object)
{
	const char **ids;
	const char *key;
	json_t	   *value;
	size_t		n = 0;
	MillmCode	rc = MILLM_OK;

	if (!object)
		return MILLM_OK;
	if (!json_is_object(object))
		return invalid(l, "\"added_tokens_decoder\" is not an object.");
	ids = calloc(json_object_size(object) + 1, sizeof(*ids));
	if (!ids)
		return out_of_memory(l->err);
	json_object_foreach(object, key, value)
		ids[n++] = key;
	qsort(ids, n, sizeof(*ids), compare_ids);
	for (size_t i = 0; i < n && rc == MILLM_OK; i++)
	{
		char	   *end;
		long		id = strtol(ids[i], &end, 10);

		if (end == ids[i] || *end != '\0' || id < 0)
			rc = invalid(l, "\"added_tokens_decoder\" has the id \"%.50s\".", ids[i]);
		else
			rc = add_token(l, json_object_get(object, ids[i]), false, id);
	}
	free(ids);
	return rc;
}

/* A token that the config names as special: add it, if there is no added token of that content yet. */
static MillmCode
add_special_token(Loader *l, const json_t *token)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *content = json_is_string(token) ? (json_t *) token : get(token, "content");
	int32_t		id;

	if (!json_is_string(content))
		return invalid(l, "A special token is neither a string nor an object with \"content\".");
	id = millm_map_get(&tok->contents, json_string_value(content), json_string_length(content));
	if (id >= 0 && tok->tokens[id].added > 0)
		return MILLM_OK;
	return add_token(l, token, true, -1);
}

static MillmCode
load_special_tokens(Loader *l, const json_t *config)
{
	static const char *const names[] = {
		"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
		"additional_special_tokens", "extra_special_tokens",
	};
	MillmCode	rc = MILLM_OK;

	for (size_t k = 0; k < sizeof(names) / sizeof(names[0]) && rc == MILLM_OK; k++)
	{
		json_t	   *value = get(config, names[k]);
		json_t	   *one;
		const char *key;
		size_t		i;

		if (json_is_array(value))
		{
			json_array_foreach(value, i, one)
				if ((rc = add_special_token(l, one)) != MILLM_OK)
					return rc;
		}
		else if (json_is_object(value) && strcmp(names[k], "extra_special_tokens") == 0)
		{
			json_object_foreach(value, key, one)
				if ((rc = add_special_token(l, one)) != MILLM_OK)
					return rc;
		}
		else if (value)
			rc = add_special_token(l, value);
	}
	return rc;
}

/* The id of "bos_token" or "eos_token"; -1: there is none. */
static int32_t
named_id(Loader *l, const json_t *config, const char *name)
{
	json_t	   *token = get(config, name);
	json_t	   *content = json_is_string(token) ? token : get(token, "content");

	return json_is_string(content) ?
		millm_map_get(&l->tok->contents, json_string_value(content), json_string_length(content)) : -1;
}

static MillmCode
load_config(Loader *l, const json_t *config)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *chat_template = get(config, "chat_template");
	bool		add_bos;
	bool		add_eos;
	int32_t		bos;
	int32_t		eos;
	MillmCode	rc;

	if ((rc = load_config_tokens(l, get(config, "added_tokens_decoder"))) != MILLM_OK ||
		(rc = load_special_tokens(l, config)) != MILLM_OK ||
		(rc = get_bool(l, config, "add_bos_token", false, &add_bos)) != MILLM_OK ||
		(rc = get_bool(l, config, "add_eos_token", false, &add_eos)) != MILLM_OK)
		return rc;
	tok->has_chat_template = json_string_length(chat_template) > 0 || json_array_size(chat_template) > 0;
	if (!get(config, "add_bos_token") && !get(config, "add_eos_token"))
		return MILLM_OK;
	bos = named_id(l, config, "bos_token");
	eos = named_id(l, config, "eos_token");
	tok->n_before = tok->n_after = 0;
	if (add_bos && bos >= 0)
		rc = add_post_ids(l, &tok->before, &tok->n_before, &bos, 1, true);
	if (rc == MILLM_OK && add_eos && eos >= 0)
		rc = add_post_ids(l, &tok->after, &tok->n_after, &eos, 1, false);
	return rc;
}

MillmCode
millm_tokenizer_parse(const char *json, size_t json_n, const char *config, size_t config_n,
					  MillmTokenizer **out, MillmError *err)
{
	MillmTokenizer *tok = calloc(1, sizeof(*tok));
	Loader		l = {.tok = tok, .file = "tokenizer.json", .err = err, .max_added = -1};
	json_t	   *root = NULL;
	json_t	   *config_root = NULL;
	MillmCode	rc;

	if (!tok)
		return out_of_memory(err);
	if (!millm_bulk_read(&l.bulk, json, json_n))
	{
		rc = out_of_memory(err);
		goto done;
	}
	/* What is wrong with the rest is told from the whole file, for the line and the column. */
	root = json_loadb(l.bulk.rest.data, l.bulk.rest.n, JSON_ALLOW_NUL, NULL);
	if (!root && (rc = parse_json(&l, json, json_n, 0, &root)) != MILLM_OK)
		goto done;
	if (!json_is_object(root))
		rc = invalid(&l, "It is not a JSON object.");
	else
		rc = load_tokenizer(&l, root);
	if (rc != MILLM_OK)
		goto done;
	if (config)
	{
		l.file = "tokenizer_config.json";
		/* model_max_length is often 10^30; no number of this file is wanted */
		if ((rc = parse_json(&l, config, config_n, JSON_DECODE_INT_AS_REAL, &config_root)) != MILLM_OK ||
			(rc = load_config(&l, config_root)) != MILLM_OK)
			goto done;
	}
	if ((rc = build_set(&l, &tok->raw, false)) != MILLM_OK || (rc = build_set(&l, &tok->normalized, true)) != MILLM_OK ||
		(rc = decode_tokens(&l)) != MILLM_OK)
		goto done;
	*out = tok;
done:
	millm_bulk_free(&l.bulk);
	json_decref(root);
	json_decref(config_root);
	if (rc != MILLM_OK)
		millm_tokenizer_close(tok);
	return rc;
}

/* Map a file; MODEL_FILES_MISSING if there is none.  unmap() ends it. */
static MillmCode
map_file(const char *dir, const char *name, const char **out, size_t *n, MillmError *err)
{
	char		path[4096];
	struct stat st;
	void	   *data = "";		/* an empty file cannot be mapped */
	int			fd;

	if ((size_t) snprintf(path, sizeof(path), "%s/%s", dir, name) >= sizeof(path))
		return millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "path of \"%s\" is too long", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT)
		return millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "model directory \"%s\" has no %s", dir, name);
	if (fd < 0 || fstat(fd, &st) != 0)
	{
		millm_fail(err, MILLM_E_MODEL_LOAD_FAILED, "could not open file \"%s\": %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
		return MILLM_E_MODEL_LOAD_FAILED;
	}
	if (!S_ISREG(st.st_mode) || st.st_size > MAX_FILE_BYTES)
	{
		close(fd);
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "file \"%s\" is not valid", path);
		millm_detail(err, "It is %lld bytes long or not a regular file; the limit is %lld bytes.",
					 (long long) st.st_size, (long long) MAX_FILE_BYTES);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	/* All of it will be read, in order and at once. */
	if (st.st_size > 0)
		data = mmap(NULL, (size_t) st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	if (data == MAP_FAILED)
		millm_fail(err, MILLM_E_MODEL_LOAD_FAILED, "could not map file \"%s\": %s", path, strerror(errno));
	close(fd);
	if (data == MAP_FAILED)
		return MILLM_E_MODEL_LOAD_FAILED;
	*out = data;
	*n = (size_t) st.st_size;
	return MILLM_OK;
}

static void
unmap(const char *data, size_t n)
{
	if (n > 0)
		munmap((void *) data, n);
}

MillmCode
millm_tokenizer_open(const char *dir, MillmTokenizer **out, MillmError *err)
{
	const char *json = NULL;
	const char *config = NULL;
	size_t		json_n = 0;
	size_t		config_n = 0;
	char		path[4096];
	MillmCode	rc;

	if ((rc = map_file(dir, "tokenizer.json", &json, &json_n, err)) != MILLM_OK)
		return rc;
	rc = map_file(dir, "tokenizer_config.json", &config, &config_n, err);
	if (rc == MILLM_OK || rc == MILLM_E_MODEL_FILES_MISSING)
		rc = millm_tokenizer_parse(json, json_n, config, config_n, out, err);
	unmap(json, json_n);
	unmap(config, config_n);
	if (rc != MILLM_OK)
		return rc;
	if ((size_t) snprintf(path, sizeof(path), "%s/chat_template.jinja", dir) < sizeof(path) && access(path, F_OK) == 0)
		(*out)->has_chat_template = true;
	return MILLM_OK;
}

void
millm_tokenizer_close(MillmTokenizer *tok)
{
	if (!tok)
		return;
	for (int i = 0; i < tok->n_normalizers; i++)
	{
		millm_pattern_free(&tok->normalizers[i].pattern);
		free(tok->normalizers[i].text);
	}
	for (int i = 0; i < tok->n_pre; i++)
	{
		millm_pattern_free(&tok->pre[i].pattern);
		free(tok->pre[i].text);
	}
	for (int i = 0; i < tok->n_decoders; i++)
	{
		millm_pattern_free(&tok->decoders[i].pattern);
		free(tok->decoders[i].text);
	}
	millm_bpe_free(&tok->bpe);
	millm_map_free(&tok->contents);
	free(tok->tokens);
	free(tok->added);
	free(tok->raw.patterns);
	millm_bytes_free(&tok->raw.texts);
	free(tok->normalized.patterns);
	millm_bytes_free(&tok->normalized.texts);
	free(tok->before);
	free(tok->after);
	millm_bytes_free(&tok->decoded);
	free(tok);
}

/* ---- properties ---- */

int
millm_tokenizer_n_ids(const MillmTokenizer *tok)
{
	return tok->n_ids;
}

bool
millm_token_is_special(const MillmTokenizer *tok, int32_t id)
{
	return id >= 0 && id < tok->n_ids && tok->tokens[id].special;
}

int32_t
millm_token_id(const MillmTokenizer *tok, const char *content)
{
	return millm_map_get(&tok->contents, content, strlen(content));
}

bool
millm_tokenizer_has_chat_template(const MillmTokenizer *tok)
{
	return tok->has_chat_template;
}
