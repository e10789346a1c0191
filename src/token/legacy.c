/*
 * legacy.c -- models without a tokenizer.json: vocab.json with merges.txt, and SentencePiece's tokenizer.model.
 *
 * Each becomes what transformers 4 makes of it when it writes a tokenizer.json: the vocabulary and the merges go into the loader's
 * bulk, pointing into the files, everything else into a small tree of JSON.  From there on there is one way to load a tokenizer.
 *
 * Which of its converters transformers takes is a matter of "tokenizer_class" in tokenizer_config.json.  Those of language models
 * are here; a model of another class is refused by its name, not guessed.
 *
 * tokenizer.model is a protocol buffer (ModelProto).  Its lengths and numbers are a stranger's and are checked; the fields that no
 * conversion needs are stepped over.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "loader.h"
#include "unicode.h"

#define MAX_PIECE_BYTES 256		/* of tokenizer.model: each is looked up at every cut */
#define UNDERLINE "\xE2\x96\x81"	/* U+2581, for a space */

/* ---- the classes ---- */

typedef enum Shape
{
	SHAPE_GPT2,
	SHAPE_QWEN2,
	SHAPE_LLAMA,
	SHAPE_GEMMA,
	SHAPE_GENERAL				/* SentencePiece, without more */
} Shape;

static const struct
{
	const char *name;			/* of the class, but for "Fast" at its end */
	Shape		shape;
	bool		is_pair;		/* it has vocab.json and merges.txt */
}			classes[] = {
	{"GPT2Tokenizer", SHAPE_GPT2, true}, {"CodeGenTokenizer", SHAPE_GPT2, true}, {"GPTNeoXTokenizer", SHAPE_GPT2, true},
	{"PreTrainedTokenizer", SHAPE_GPT2, true}, {"Qwen2Tokenizer", SHAPE_QWEN2, true}, {"LlamaTokenizer", SHAPE_LLAMA, false},
	{"GemmaTokenizer", SHAPE_GEMMA, false}, {"PreTrainedTokenizer", SHAPE_GENERAL, false},
};

/* otherwise: the shape of a model that names no class. */
static MillmCode
get_shape(Loader *l, const json_t *config, bool is_pair, Shape otherwise, Shape *out)
{
	const char *name = json_string_value(millm_load_get(config, "tokenizer_class"));
	size_t		n = name ? strlen(name) : 0;

	*out = otherwise;
	if (!name)
		return MILLM_OK;
	if (n > 4 && strcmp(name + n - 4, "Fast") == 0)
		n -= 4;
	for (size_t i = 0; i < sizeof(classes) / sizeof(classes[0]); i++)
		if (classes[i].is_pair == is_pair && strlen(classes[i].name) == n && memcmp(classes[i].name, name, n) == 0)
		{
			*out = classes[i].shape;
			return MILLM_OK;
		}
	millm_fail(l->err, MILLM_E_UNSUPPORTED, "a tokenizer of class \"%s\" without a tokenizer.json is not supported", shown(name).text);
	millm_hint(l->err, "Choose a repository, or a revision, with a tokenizer.json.");
	return MILLM_E_UNSUPPORTED;
}

/* Set a member of object, whose value is written out.  False: out of memory. */
static bool
set(json_t *object, const char *key, const char *json)
{
	return json_object_set_new(object, key, json_loads(json, JSON_DECODE_ANY, NULL)) == 0;
}

/* One of "added_tokens"; normalized unless it is special. */
static bool
add_token(json_t *list, int64_t id, const char *content, size_t n, bool is_special, bool is_normalized)
{
	json_t	   *token = json_object();

	if (json_object_set_new(token, "id", json_integer(id)) != 0 ||
		json_object_set_new(token, "content", json_stringn(content, n)) != 0 ||
		json_object_set_new(token, "special", json_boolean(is_special)) != 0 ||
		json_object_set_new(token, "normalized", json_boolean(is_normalized)) != 0)
	{
		json_decref(token);
		return false;
	}
	return json_array_append_new(list, token) == 0;
}

/* ---- vocab.json, merges.txt ---- */

/* The lines of merges.txt, as they are: load_model.c takes them apart. */
static bool
read_merge_lines(Bulk *bulk, const char *text, size_t n)
{
	const char *end = text + n;
	size_t		max = 1;

	for (size_t i = 0; i < n; i++)
		max += text[i] == '\n';
	bulk->merges = millm_table_alloc(max, sizeof(*bulk->merges));
	if (!bulk->merges)
		return false;
	bulk->has_merges = true;
	for (const char *next; text < end; text = next)
	{
		const char *line_end = memchr(text, '\n', (size_t) (end - text));

		next = line_end ? line_end + 1 : end;
		line_end = line_end ? line_end : end;
		if (line_end > text && line_end[-1] == '\r')
			line_end--;
		if (line_end > text)
			bulk->merges[bulk->n_merges++] = (BulkMerge) {.left = text, .left_n = (uint32_t) (line_end - text)};
	}
	return true;
}

static int
compare_added(const void *a, const void *b)
{
	json_int_t	x = json_integer_value(json_object_get(*(json_t *const *) a, "id"));
	json_int_t	y = json_integer_value(json_object_get(*(json_t *const *) b, "id"));

	return (x > y) - (x < y);
}

/* added_tokens.json, {content: id}, in the order of the ids. */
static MillmCode
read_added(Loader *l, json_t *added, json_t *list)
{
	json_t	  **tokens = calloc(json_object_size(added) + 1, sizeof(*tokens));
	size_t		n = 0;
	const char *content;
	json_t	   *id;
	MillmCode	rc = MILLM_OK;

	if (!tokens)
		return millm_load_out_of_memory(l->err);
	json_object_foreach(added, content, id)
	{
		if (!json_is_integer(id))
			rc = millm_load_invalid(l, "The id of the added token \"%s\" is not an integer.", shown(content).text);
		else if (!add_token(list, json_integer_value(id), content, strlen(content), false, true))
			rc = millm_load_out_of_memory(l->err);
		if (rc != MILLM_OK)
			break;
		tokens[n++] = json_incref(json_array_get(list, json_array_size(list) - 1));
	}
	qsort(tokens, n, sizeof(*tokens), compare_added);
	json_array_clear(list);
	for (size_t i = 0; i < n; i++)
		if (json_array_append_new(list, tokens[i]) != 0)
			rc = millm_load_out_of_memory(l->err);
	free(tokens);
	return rc;
}

MillmCode
millm_legacy_pair(Loader *l, const char *vocabulary, size_t vocabulary_n, const char *merges, size_t merges_n,
				  json_t *added, const json_t *config, json_t **root)
{
	static const char qwen2[] = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"behavior\":\"Isolated\",\"invert\":false,"
		"\"pattern\":{\"Regex\":\"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*"
		"|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"}},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]}";
	static const char end_of_text[] = "<|endoftext|>";
	json_t	   *list = json_array();
	bool		add_prefix_space;
	Shape		shape;
	size_t		bad;
	MillmCode	rc;

	*root = json_object();
	if (json_object_set_new(*root, "added_tokens", list) != 0)
		return millm_load_out_of_memory(l->err);
	if ((rc = get_shape(l, config, true, SHAPE_GPT2, &shape)) != MILLM_OK ||
		(rc = millm_load_bool(l, config, "add_prefix_space", false, &add_prefix_space)) != MILLM_OK)
		return rc;
	l->file = "merges.txt";
	if (!millm_utf8_is_valid(merges, merges_n, &bad))
		return millm_load_invalid(l, "It is not UTF-8 at byte %zu.", bad);
	l->file = "vocab.json";
	if (!millm_bulk_read_vocabulary(&l->bulk, vocabulary, vocabulary_n) || !read_merge_lines(&l->bulk, merges, merges_n))
		return millm_load_out_of_memory(l->err);
	if (!l->bulk.has_vocabulary)
		return millm_load_invalid(l, "It is not an object of tokens and their ids.");
	if (!set(*root, "model", "{\"type\":\"BPE\"}") || !set(*root, "decoder", "{\"type\":\"ByteLevel\"}"))
		return millm_load_out_of_memory(l->err);
	if (shape == SHAPE_QWEN2 ? !set(*root, "normalizer", "{\"type\":\"NFC\"}") || !set(*root, "pre_tokenizer", qwen2) :
		!set(*root, "pre_tokenizer", add_prefix_space ? "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}" :
			 "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"))
		return millm_load_out_of_memory(l->err);
	if (shape == SHAPE_QWEN2 && add_prefix_space)
		return millm_load_unsupported(l, "pre-tokenizer", "Qwen2 with a space before the text");
	if ((rc = read_added(l, added, list)) != MILLM_OK)
		return rc;
	/* the classes' own end of text, which few config files name */
	for (size_t i = 0; i < l->bulk.n_entries; i++)
		if (l->bulk.entries[i].n == sizeof(end_of_text) - 1 && memcmp(l->bulk.entries[i].text, end_of_text, sizeof(end_of_text) - 1) == 0 &&
			!add_token(list, l->bulk.entries[i].value.id, end_of_text, sizeof(end_of_text) - 1, true, shape == SHAPE_GPT2))
			return millm_load_out_of_memory(l->err);
	l->file = "vocab.json with merges.txt";
	return MILLM_OK;
}

/* ---- protocol buffers ---- */

typedef struct Field
{
	uint32_t	number;
	uint64_t	value;			/* of a number */
	const char *bytes;			/* of a string or a message; NULL: it is a number */
	size_t		n;
} Field;

/* False: it does not end before end, or in 10 bytes. */
static bool
read_varint(const char **p, const char *end, uint64_t *out)
{
	*out = 0;
	for (int shift = 0; shift < 70 && *p < end; shift += 7)
	{
		unsigned char b = (unsigned char) *(*p)++;

		*out |= shift < 64 ? (uint64_t) (b & 0x7F) << shift : 0;
		if (b < 0x80)
			return true;
	}
	return false;
}

/* The next field of a message that ends at end; the message is not at its end.  False: it is broken. */
static bool
read_field(const char **p, const char *end, Field *field)
{
	uint64_t	key;

	*field = (Field) {0};
	if (!read_varint(p, end, &key) || key >> 3 > UINT32_MAX || key >> 3 == 0)
		return false;
	field->number = (uint32_t) (key >> 3);
	switch (key & 7)
	{
		case 0:
			return read_varint(p, end, &field->value);
		case 1:
			if (end - *p < 8)
				return false;
			field->value = millm_get_le64(*p);
			*p += 8;
			return true;
		case 2:
			if (!read_varint(p, end, &field->value) || field->value > (uint64_t) (end - *p))
				return false;
			field->bytes = *p;
			field->n = (size_t) field->value;
			*p += field->n;
			return true;
		case 5:
			if (end - *p < 4)
				return false;
			field->value = millm_get_le32(*p);
			*p += 4;
			return true;
	}
	return false;				/* groups, which are no longer written */
}

/* ---- tokenizer.model ---- */

typedef enum PieceType
{
	PIECE_NORMAL = 1,
	PIECE_UNKNOWN,
	PIECE_CONTROL,
	PIECE_USER_DEFINED,
	PIECE_UNUSED,
	PIECE_BYTE
} PieceType;

typedef struct SentencePiece
{
	Bulk	   *bulk;			/* its entries are the pieces, with their scores */
	uint8_t    *types;			/* [n_entries] a PieceType */
	uint64_t	model_type;		/* 1 Unigram, 2 BPE */
	uint64_t	unknown_id;
	bool		byte_fallback;
	bool		is_suffixed;	/* the space is at the end of a word */
	const char *charsmap;		/* borrowed; NULL: none */
	size_t		charsmap_n;
} SentencePiece;

static bool
read_piece(SentencePiece *sp, const char *p, const char *end)
{
	BulkEntry	entry = {.text = "", .value = {.score = 0}};
	uint64_t	type = PIECE_NORMAL;
	size_t		bad;
	Field		field;

	while (p < end)
	{
		if (!read_field(&p, end, &field))
			return false;
		if (field.number == 1 && field.bytes)
		{
			entry.text = field.bytes;
			entry.n = (uint32_t) field.n;
		}
		else if (field.number == 2 && !field.bytes)
		{
			uint32_t	bits = (uint32_t) field.value;
			float		score;

			memcpy(&score, &bits, sizeof(score));
			entry.value.score = (double) score;
		}
		else if (field.number == 3 && !field.bytes)
			type = field.value;
	}
	if (entry.n > MAX_PIECE_BYTES || type < PIECE_NORMAL || type > PIECE_BYTE || !isfinite(entry.value.score) ||
		!millm_utf8_is_valid(entry.text, entry.n, &bad) || memchr(entry.text, '\0', entry.n))
		return false;
	sp->types[sp->bulk->n_entries] = (uint8_t) type;
	sp->bulk->entries[sp->bulk->n_entries++] = entry;
	return true;
}

/* The settings of the trainer (message 2) or of the normalizer (3). */
static bool
read_settings(SentencePiece *sp, uint32_t message, const char *p, const char *end)
{
	Field		field;

	while (p < end)
	{
		if (!read_field(&p, end, &field))
			return false;
		if (message == 3 && field.number == 2 && field.bytes && field.n > 0)
		{
			sp->charsmap = field.bytes;
			sp->charsmap_n = field.n;
		}
		if (message == 3 || field.bytes)
			continue;
		if (field.number == 3)
			sp->model_type = field.value;
		else if (field.number == 24)
			sp->is_suffixed = field.value != 0;
		else if (field.number == 35)
			sp->byte_fallback = field.value != 0;
		else if (field.number == 40)
			sp->unknown_id = field.value;
	}
	return true;
}

static MillmCode
read_model(Loader *l, SentencePiece *sp, const char *model, size_t model_n)
{
	const char *end = model + model_n;
	size_t		n_pieces = 0;
	Field		field;

	for (const char *p = model; p < end;)
	{
		if (!read_field(&p, end, &field))
			return millm_load_invalid(l, "It is not a SentencePiece model: a field before byte %zu is broken.", (size_t) (p - model));
		n_pieces += field.number == 1 && field.bytes != NULL;
	}
	if (n_pieces == 0 || n_pieces >= MAX_IDS)
		return millm_load_invalid(l, "It is not a SentencePiece model: it has %zu pieces.", n_pieces);
	sp->bulk->entries = millm_table_alloc(n_pieces, sizeof(*sp->bulk->entries));
	sp->types = malloc(n_pieces);
	if (!sp->bulk->entries || !sp->types)
		return millm_load_out_of_memory(l->err);
	sp->model_type = 1;
	for (const char *p = model; p < end;)
	{
		(void) read_field(&p, end, &field);
		if (field.number == 1 && field.bytes && !read_piece(sp, field.bytes, field.bytes + field.n))
			return millm_load_invalid(l, "Piece %zu is broken, or longer than %d bytes.", sp->bulk->n_entries, MAX_PIECE_BYTES);
		if ((field.number == 2 || field.number == 3) && field.bytes &&
			!read_settings(sp, field.number, field.bytes, field.bytes + field.n))
			return millm_load_invalid(l, "Its settings are broken.");
	}
	sp->bulk->has_vocabulary = sp->bulk->has_scores = true;
	return MILLM_OK;
}

/* ---- the merges that scores amount to ---- */

/* A way to cut a piece into two pieces. */
typedef struct Cut
{
	double		score;			/* of the piece */
	uint32_t	piece;
	uint32_t	left_n;			/* in bytes */
	int32_t		left_id;
	int32_t		right_id;
	uint16_t	n_left;			/* in characters */
	uint16_t	n_right;
} Cut;

/* Python's sort, reversed: the best score first, of equals the longest parts; it keeps the order of pieces, and of ids in one. */
static int
compare_cuts(const void *a, const void *b)
{
	const Cut  *x = a;
	const Cut  *y = b;

	if (x->score != y->score)
		return x->score > y->score ? -1 : 1;
	if (x->n_left != y->n_left)
		return x->n_left > y->n_left ? -1 : 1;
	if (x->n_right != y->n_right)
		return x->n_right > y->n_right ? -1 : 1;
	if (x->piece != y->piece)
		return x->piece < y->piece ? -1 : 1;
	if (x->left_id != y->left_id)
		return x->left_id < y->left_id ? -1 : 1;
	return (x->right_id > y->right_id) - (x->right_id < y->right_id);
}

static uint16_t
count_characters(const char *text, size_t n)
{
	uint16_t	count = 0;

	for (size_t i = 0; i < n; i++)
		count += ((unsigned char) text[i] & 0xC0) != 0x80;
	return count;
}

/* All cuts of one piece, onto the array *cuts of *n. */
static bool
add_cuts(const Bulk *bulk, const StringMap *ids, size_t piece, Cut **cuts, size_t *n, size_t *max)
{
	const BulkEntry *entry = &bulk->entries[piece];

	for (uint32_t at = 1; at < entry->n; at++)
	{
		int32_t		left;
		int32_t		right;

		if (((unsigned char) entry->text[at] & 0xC0) == 0x80 || (left = millm_map_get(ids, entry->text, at)) < 0 ||
			(right = millm_map_get(ids, entry->text + at, entry->n - at)) < 0)
			continue;
		if (*n == *max)
		{
			size_t		grown_max = *max ? *max * 2 : 4096;
			Cut		   *grown = realloc(*cuts, grown_max * sizeof(*grown));

			if (!grown)
				return false;
			*cuts = grown;
			*max = grown_max;
		}
		(*cuts)[(*n)++] = (Cut) {entry->value.score, (uint32_t) piece, at, left, right, count_characters(entry->text, at),
			count_characters(entry->text + at, entry->n - at)};
	}
	return true;
}

/* Fill bulk->merges: every cut of every piece, in the order that the scores say. */
static bool
make_merges(Bulk *bulk)
{
	StringMap	ids = {0};
	Cut		   *cuts = NULL;
	size_t		n = 0;
	size_t		max = 0;
	bool		is_new;
	bool		ok = true;

	/* of equal pieces the last one counts */
	for (size_t i = bulk->n_entries; i-- > 0 && ok;)
		ok = millm_map_add(&ids, millm_map_key(bulk->entries[i].text, bulk->entries[i].n), (int32_t) i, &is_new);
	for (size_t i = 0; i < bulk->n_entries && ok; i++)
		if (millm_map_get(&ids, bulk->entries[i].text, bulk->entries[i].n) == (int32_t) i)
			ok = add_cuts(bulk, &ids, i, &cuts, &n, &max);
	if (ok)
		ok = (bulk->merges = millm_table_alloc(n + 1, sizeof(*bulk->merges))) != NULL;
	if (ok && n > 0)
		qsort(cuts, n, sizeof(*cuts), compare_cuts);
	for (size_t i = 0; i < n && ok; i++)
	{
		const BulkEntry *piece = &bulk->entries[cuts[i].piece];

		bulk->merges[i] = (BulkMerge) {piece->text, piece->text + cuts[i].left_n, cuts[i].left_n, piece->n - cuts[i].left_n};
	}
	bulk->n_merges = n;
	bulk->has_merges = ok;
	millm_map_free(&ids);
	free(cuts);
	return ok;
}

/* BPE looks tokens up by id: scores become ids. */
static void
number_pieces(Bulk *bulk)
{
	for (size_t i = 0; i < bulk->n_entries; i++)
		bulk->entries[i].value.id = (int64_t) i;
	bulk->has_scores = false;
}

/* Old Gemma files lack a tab; its byte token is one. */
static void
add_tab(Bulk *bulk)
{
	size_t		byte = bulk->n_entries;

	for (size_t i = 0; i < bulk->n_entries; i++)
	{
		const BulkEntry *entry = &bulk->entries[i];

		if (entry->n == 1 && entry->text[0] == '\t')
			return;
		if (entry->n == 6 && memcmp(entry->text, "<0x09>", 6) == 0)
			byte = i;
	}
	if (byte < bulk->n_entries)
		bulk->entries[byte] = (BulkEntry) {.text = "\t", .n = 1, .value = {.score = 0}};
}

/* ---- the rest of a SentencePiece model's tokenizer.json ---- */

/* Control pieces are special tokens, and so is the unknown one; user-defined ones are found in the text like them. */
static bool
add_tokens(const SentencePiece *sp, Shape shape, json_t *list)
{
	for (size_t i = 0; i < sp->bulk->n_entries; i++)
	{
		const BulkEntry *entry = &sp->bulk->entries[i];
		bool		is_turn = shape == SHAPE_GEMMA && ((entry->n == 15 && memcmp(entry->text, "<start_of_turn>", 15) == 0) ||
													   (entry->n == 13 && memcmp(entry->text, "<end_of_turn>", 13) == 0));

		if ((sp->types[i] == PIECE_UNKNOWN || sp->types[i] == PIECE_CONTROL || sp->types[i] == PIECE_USER_DEFINED) &&
			!add_token(list, (int64_t) i, entry->text, entry->n, sp->types[i] != PIECE_USER_DEFINED || is_turn, false))
			return false;
	}
	return true;
}

/* Base64, as tokenizer.json has a charsmap. */
static json_t *
encode_charsmap(const char *data, size_t n)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	size_t		out_n = (n + 2) / 3 * 4;
	char	   *out = malloc(out_n + 1);
	json_t	   *json = NULL;
	const unsigned char *b = (const unsigned char *) data;

	for (size_t i = 0, k = 0; out && i < n; i += 3, k += 4)
	{
		uint32_t	bits = (uint32_t) b[i] << 16 | (i + 1 < n ? (uint32_t) b[i + 1] << 8 : 0) | (i + 2 < n ? b[i + 2] : 0);

		out[k] = digits[bits >> 18];
		out[k + 1] = digits[bits >> 12 & 63];
		out[k + 2] = i + 1 < n ? digits[bits >> 6 & 63] : '=';
		out[k + 3] = i + 2 < n ? digits[bits & 63] : '=';
	}
	if (out)
		json = json_stringn(out, out_n);
	free(out);
	return json;
}

#define METASPACE(scheme, split) "{\"type\":\"Metaspace\",\"replacement\":\"" UNDERLINE "\",\"prepend_scheme\":\"" scheme "\",\"split\":" split "}"
#define SPACES "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"" UNDERLINE "\"}"
#define UNSPACES "{\"type\":\"Replace\",\"pattern\":{\"String\":\"" UNDERLINE "\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}"

/* Llama's and Gemma's stages: the text as it is, with spaces written as U+2581. */
static bool
set_plain_stages(json_t *root, Shape shape, bool is_legacy, bool add_prefix_space)
{
	bool		ok;

	if (shape == SHAPE_GEMMA)
		ok = set(root, "normalizer", SPACES);
	else if (is_legacy)
		ok = set(root, "normalizer", add_prefix_space ?
				 "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"" UNDERLINE "\"}," SPACES "]}" : SPACES);
	else
		ok = set(root, "pre_tokenizer", add_prefix_space ? METASPACE("first", "false") : METASPACE("never", "false"));
	return ok && set(root, "decoder", shape == SHAPE_LLAMA && add_prefix_space ?
					 "{\"type\":\"Sequence\",\"decoders\":[" UNSPACES ",{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}" :
					 "{\"type\":\"Sequence\",\"decoders\":[" UNSPACES "]}");
}

/* SentencePiece's own: the charsmap, runs of spaces as one, words. */
static bool
set_general_stages(json_t *root, const SentencePiece *sp, bool is_legacy, bool add_prefix_space)
{
	const char *metaspace = !add_prefix_space ? METASPACE("never", "true") : is_legacy ? METASPACE("always", "true") : METASPACE("first", "true");
	json_t	   *stage;

	if (!set(root, "normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Strip\",\"strip_left\":false,\"strip_right\":true},"
			 "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" {2,}\"},\"content\":\"" UNDERLINE "\"}]}") ||
		!set(root, "pre_tokenizer", metaspace) || !set(root, "decoder", metaspace))
		return false;
	if (!sp->charsmap)
		return true;
	stage = json_object();
	if (json_object_set_new(stage, "type", json_string("Precompiled")) != 0 ||
		json_object_set_new(stage, "precompiled_charsmap", encode_charsmap(sp->charsmap, sp->charsmap_n)) != 0)
	{
		json_decref(stage);
		return false;
	}
	return json_array_insert_new(json_object_get(json_object_get(root, "normalizer"), "normalizers"), 0, stage) == 0;
}

/* The template of Llama and Gemma without a word in the config: the piece that begins a text. */
static bool
set_template(json_t *root, const Bulk *bulk, Shape shape)
{
	const char *name = shape == SHAPE_GEMMA ? "<bos>" : "<s>";
	json_t	   *ids = NULL;

	for (size_t i = 0; i < bulk->n_entries && !ids; i++)
		if (bulk->entries[i].n == strlen(name) && memcmp(bulk->entries[i].text, name, strlen(name)) == 0)
			ids = json_pack("[I]", (json_int_t) i);
	if (!ids)
		return true;
	return json_object_set_new(root, "post_processor",
							   json_pack("{s:s, s:[{s:{s:s}}, {s:{s:s}}], s:{s:{s:o}}}", "type", "TemplateProcessing",
										 "single", "SpecialToken", "id", name, "Sequence", "id", "A",
										 "special_tokens", name, "ids", ids)) == 0;
}

static MillmCode
make_model(Loader *l, SentencePiece *sp, Shape shape, json_t *root)
{
	json_t	   *model = json_object();
	uint64_t	unknown = shape == SHAPE_LLAMA ? 0 : shape == SHAPE_GEMMA ? 3 : sp->unknown_id;
	bool		has_bytes = shape == SHAPE_LLAMA || shape == SHAPE_GEMMA;
	const BulkEntry *piece;

	if (json_object_set_new(root, "model", model) != 0)
		return millm_load_out_of_memory(l->err);
	if (sp->model_type != 1 && sp->model_type != 2)
		return millm_load_unsupported(l, "model", "SentencePiece of words or characters");
	if (sp->is_suffixed)
		return millm_load_unsupported(l, "model", "SentencePiece with spaces behind words");
	if (unknown >= sp->bulk->n_entries)
		return millm_load_invalid(l, "The id of the unknown piece is %llu, of %zu.", (unsigned long long) unknown, sp->bulk->n_entries);
	piece = &sp->bulk->entries[unknown];
	if (json_object_set_new(model, "byte_fallback", json_boolean(has_bytes)) != 0 ||
		json_object_set_new(model, "type", json_string(sp->model_type == 1 ? "Unigram" : "BPE")) != 0 ||
		json_object_set_new(model, "fuse_unk", json_true()) != 0 ||
		json_object_set_new(model, "unk_id", json_integer((json_int_t) unknown)) != 0 ||
		json_object_set_new(model, "unk_token", json_stringn(piece->text, piece->n)) != 0)
		return millm_load_out_of_memory(l->err);
	if (sp->model_type == 1)
		return MILLM_OK;
	if (!make_merges(sp->bulk))
		return millm_load_out_of_memory(l->err);
	number_pieces(sp->bulk);
	return MILLM_OK;
}

MillmCode
millm_legacy_sentencepiece(Loader *l, const char *model, size_t model_n, const json_t *config, json_t **root)
{
	SentencePiece sp = {.bulk = &l->bulk};
	json_t	   *list = json_array();
	Shape		shape;
	bool		is_legacy;
	bool		add_prefix_space;
	bool		ok;
	MillmCode	rc;

	l->file = "tokenizer.model";
	*root = json_object();
	if (json_object_set_new(*root, "added_tokens", list) != 0)
		return millm_load_out_of_memory(l->err);
	if ((rc = read_model(l, &sp, model, model_n)) != MILLM_OK)
		goto done;
	l->file = "tokenizer_config.json";
	if ((rc = get_shape(l, config, false, sp.byte_fallback ? SHAPE_LLAMA : SHAPE_GENERAL, &shape)) != MILLM_OK ||
		(rc = millm_load_bool(l, config, "legacy", true, &is_legacy)) != MILLM_OK ||
		(rc = millm_load_bool(l, config, "add_prefix_space", true, &add_prefix_space)) != MILLM_OK)
		goto done;
	l->file = "tokenizer.model";
	if (shape == SHAPE_GEMMA)
		add_tab(&l->bulk);
	if ((rc = make_model(l, &sp, shape, *root)) != MILLM_OK)
		goto done;
	ok = add_tokens(&sp, shape, list);
	if (shape == SHAPE_GENERAL)
		ok = ok && set_general_stages(*root, &sp, is_legacy, add_prefix_space);
	else
		ok = ok && set_plain_stages(*root, shape, is_legacy, add_prefix_space) && set_template(*root, &l->bulk, shape);
	if (!ok)
		rc = millm_load_out_of_memory(l->err);
done:
	free(sp.types);
	return rc;
}
