/*
 * load_model.c -- the vocabulary and the model of tokenizer.json: BPE, Unigram, WordPiece, WordLevel.
 *
 * A vocabulary and its merges are hundreds of thousands of strings, which bulk.c has read.  Their places in the maps are fetched in
 * batches, so that a new string waits for memory once in BATCH and not every time.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader.h"
#include "unicode.h"

#define UNKNOWN_PENALTY 10.0	/* how much worse than the worst piece an unknown character is: the genuine library's */

bool
millm_letters_to_bytes(const char *s, size_t n, char *out, size_t *out_n)
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
			return millm_load_out_of_memory(l->err);
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
	return millm_load_invalid(l, "The token id %lld is out of range.", (long long) id);
}

MillmCode
millm_load_content(Loader *l, MapKey content, int64_t id, bool *is_new)
{
	MillmTokenizer *tok = l->tok;
	size_t		offset = tok->contents.keys.n;
	MillmCode	rc;

	if (id < 0 || id >= MAX_IDS)
		return invalid_id(l, id);
	if (!millm_map_add(&tok->contents, content, (int32_t) id, is_new))
		return millm_load_out_of_memory(l->err);
	if (!*is_new)
		return MILLM_OK;
	if ((rc = reserve_id(l, (int32_t) id)) != MILLM_OK)
		return rc;
	if (tok->tokens[id].exists)
		return millm_load_invalid(l, "The token id %lld belongs to two tokens, one of them \"%s\".",
					   (long long) id, shown_part(content.text, content.n).text);
	tok->tokens[id].content = (Span) {(uint32_t) offset, content.n};
	tok->tokens[id].exists = true;
	return MILLM_OK;
}

/* ---- the vocabulary ---- */

/* Why bulk.c left model.vocab to jansson. */
static MillmCode
refuse_vocabulary(Loader *l, json_t *vocabulary)
{
	const char *key;
	json_t	   *value;
	size_t		i;

	json_object_foreach(vocabulary, key, value)
	{
		if (!json_is_integer(value))
			return millm_load_invalid(l, "The id of the token \"%s\" is not an integer.", shown(key).text);
		if (json_integer_value(value) < 0 || json_integer_value(value) >= MAX_IDS)
			return invalid_id(l, json_integer_value(value));
	}
	json_array_foreach(vocabulary, i, value)
		if (json_array_size(value) != 2 || !json_is_string(json_array_get(value, 0)) || !json_is_number(json_array_get(value, 1)))
			return millm_load_invalid(l, "Entry %zu of the vocabulary is not a piece and its score.", i);
	return millm_load_invalid(l, "The model has no vocabulary.");
}

/* The vocabulary is there, and of that kind; *key_bytes is the length of all its strings.  tok->contents has room for it. */
static MillmCode
begin_vocabulary(Loader *l, const json_t *model, bool has_scores, size_t *key_bytes)
{
	const Bulk *bulk = &l->bulk;

	if (!bulk->has_vocabulary || bulk->n_entries == 0 || bulk->has_scores != has_scores)
		return refuse_vocabulary(l, millm_load_get(model, "vocab"));
	*key_bytes = 0;
	for (size_t i = 0; i < bulk->n_entries; i++)
		*key_bytes += bulk->entries[i].n;
	return millm_map_reserve(&l->tok->contents, bulk->n_entries, *key_bytes) ? MILLM_OK : millm_load_out_of_memory(l->err);
}

/* The vocabulary is in: what is a token now is a piece of the model. */
static void
mark_pieces(MillmTokenizer *tok)
{
	for (int32_t id = 0; id < tok->n_ids; id++)
		tok->tokens[id].is_piece = tok->tokens[id].exists;
}

/* The ids of "<0x00>" to "<0xFF>", -1 for those that are no pieces. */
static void
find_fallbacks(const MillmTokenizer *tok, int32_t ids[256])
{
	for (int b = 0; b < 256; b++)
	{
		char		name[8];

		snprintf(name, sizeof(name), "<0x%02X>", b);
		ids[b] = millm_map_get(&tok->contents, name, 6);
		if (ids[b] >= 0 && !tok->tokens[ids[b]].is_piece)
			ids[b] = -1;
	}
}

/* Where words may be cut: bpe.h.  Where every character becomes a piece, its bytes or the unknown one, and nothing is said of a whole word. */
static void
find_cuts(MillmTokenizer *tok)
{
	Bpe		   *bpe = &tok->bpe;
	const char *keys = tok->contents.keys.data;
	int32_t		marker = millm_map_get(&tok->contents, "\xE2\x96\x81", 3);
	Span		unknown;

	bpe->has_cuts = !bpe->is_byte_level && !bpe->prefix && !bpe->suffix && !bpe->ignore_merges && bpe->unknown_id >= 0 &&
		marker >= 0 && tok->tokens[marker].is_piece;
	if (!bpe->has_cuts)
		return;
	unknown = tok->tokens[bpe->unknown_id].content;
	for (int32_t id = 0; id < tok->n_ids; id++)
		if (tok->tokens[id].is_piece)
			millm_bpe_note_joins(bpe, keys + tok->tokens[id].content.offset, tok->tokens[id].content.n, keys + unknown.offset, unknown.n);
}

MillmCode
millm_load_derived(Loader *l)
{
	MillmTokenizer *tok = l->tok;
	Bpe		   *bpe = &tok->bpe;

	if (!tok->is_bpe)
	{
		find_fallbacks(tok, tok->lexicon.fallback_ids);
		return MILLM_OK;
	}
	for (int b = 0; b < 256; b++)
	{
		char		byte = (char) b;

		bpe->byte_ids[b] = bpe->is_byte_level ? millm_map_get(&bpe->pieces, &byte, 1) : -1;
	}
	find_fallbacks(tok, bpe->fallback_ids);
	bpe->names = &tok->contents;
	bpe->n_ids = tok->n_ids;
	bpe->is_whole = calloc((size_t) bpe->n_ids, sizeof(*bpe->is_whole));
	if (!bpe->is_whole)
		return millm_load_out_of_memory(l->err);
	for (int32_t id = 0; id < bpe->n_ids; id++)
		if (!tok->tokens[id].is_piece)
			atomic_init(&bpe->is_whole[id], WHOLE_NO_PIECE);
	find_cuts(tok);
	return MILLM_OK;
}

/* ---- BPE ---- */

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
			is_piece[i] = millm_letters_to_bytes(entries[i].text, entries[i].n, piece, &piece_n);
			pieces[i] = millm_map_key(piece, (uint32_t) piece_n);
			decoded->n += piece_n;
		}
		millm_map_prefetch(&l->tok->contents, contents[i]);
		if (bpe->is_byte_level)
			millm_map_prefetch(&bpe->pieces, pieces[i]);
	}
	for (size_t i = n; i-- > 0;)
	{
		if ((rc = millm_load_content(l, contents[i], entries[i].value.id, &is_new)) != MILLM_OK)
			return rc;
		if (!is_new)
			continue;
		l->n_vocabulary++;
		if (!is_piece[i])
			continue;
		if (bpe->is_byte_level && !millm_map_add(&bpe->pieces, pieces[i], (int32_t) entries[i].value.id, &is_new))
			return millm_load_out_of_memory(l->err);
		if (bpe->is_byte_level)
			l->tok->tokens[entries[i].value.id].bytes = (Span) {(uint32_t) (pieces[i].text - decoded->data), pieces[i].n};
		if (pieces[i].n > bpe->longest)
			bpe->longest = pieces[i].n;
	}
	return MILLM_OK;
}

static MillmCode
load_bpe_vocabulary(Loader *l, const json_t *model)
{
	Bpe		   *bpe = &l->tok->bpe;
	const Bulk *bulk = &l->bulk;
	size_t		key_bytes;
	MillmCode	rc = begin_vocabulary(l, model, false, &key_bytes);

	if (rc != MILLM_OK)
		return rc;
	if (bpe->is_byte_level &&
		(!millm_map_reserve(&bpe->pieces, bulk->n_entries, key_bytes) || !millm_bytes_reserve(&l->tok->decoded, key_bytes)))
		return millm_load_out_of_memory(l->err);
	for (size_t end = bulk->n_entries, n; end > 0 && rc == MILLM_OK; end -= n)
	{
		n = end < BATCH ? end : BATCH;
		rc = add_entries(l, bulk->entries + end - n, n);
	}
	mark_pieces(l->tok);
	return rc;
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
			return millm_load_invalid(l, "Merge %zu is not a pair of tokens.", i);
	return millm_load_invalid(l, "The model has no \"merges\".");
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
		return millm_load_out_of_memory(l->err);
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
			return millm_load_invalid(l, "Merge %zu is not a pair of tokens.", first + i);
		left[i] = millm_map_key(merge->left, merge->left_n);
		right[i] = millm_map_key(merge->right, merge->right_n);
		millm_map_prefetch(&tok->contents, left[i]);
		millm_map_prefetch(&tok->contents, right[i]);
	}
	for (size_t i = 0; i < n; i++)
		if (left[i].text)
		{
			millm_map_prefetch_text(&tok->contents, left[i]);
			millm_map_prefetch_text(&tok->contents, right[i]);
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
			return millm_load_invalid(l, "Merge %zu, \"%s\" and \"%s\", has a part or a result that is not in the vocabulary.",
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
		return refuse_merges(l, millm_load_get(model, "merges"));
	if (!millm_bpe_reserve_merges(&l->tok->bpe, l->bulk.n_merges))
		return millm_load_out_of_memory(l->err);
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
	MillmCode	rc = millm_load_text(l, model, key, false, affix, n);

	if (rc == MILLM_OK && *affix && *n == 0)
	{
		free(*affix);
		*affix = NULL;
	}
	if (rc == MILLM_OK && *affix && l->byte_level && !millm_letters_to_bytes(*affix, *n, *affix, n))
		rc = millm_load_unsupported(l, "model", "BPE with an affix outside of the byte alphabet");
	return rc;
}

static MillmCode
load_bpe(Loader *l, const json_t *json)
{
	Bpe		   *bpe = &l->tok->bpe;
	json_t	   *dropout = millm_load_get(json, "dropout");
	json_t	   *unknown = millm_load_get(json, "unk_token");
	bool		has_all_bytes = l->byte_level;
	size_t		prefix_n;
	MillmCode	rc;

	if (dropout && (!json_is_number(dropout) || json_number_value(dropout) != 0))
		return millm_load_unsupported(l, "model", "BPE with dropout");
	l->tok->is_bpe = true;
	bpe->is_byte_level = l->byte_level;
	bpe->unknown_id = -1;
	if ((rc = millm_load_bool(l, json, "ignore_merges", false, &bpe->ignore_merges)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "byte_fallback", false, &bpe->byte_fallback)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "fuse_unk", false, &bpe->fuse_unknown)) != MILLM_OK ||
		(rc = load_affix(l, json, "continuing_subword_prefix", &bpe->prefix, &bpe->prefix_n)) != MILLM_OK ||
		(rc = load_affix(l, json, "end_of_word_suffix", &bpe->suffix, &bpe->suffix_n)) != MILLM_OK ||
		(rc = load_bpe_vocabulary(l, json)) != MILLM_OK)
		return rc;
	/* the merges are written in letters, so is the prefix that is cut from them */
	prefix_n = json_string_length(millm_load_get(json, "continuing_subword_prefix"));
	if ((rc = load_merges(l, json, prefix_n)) != MILLM_OK)
		return rc;
	if (unknown && !json_is_string(unknown))
		return millm_load_invalid(l, "\"unk_token\" is not a string.");
	if (unknown)
		bpe->unknown_id = millm_map_get(&l->tok->contents, json_string_value(unknown), json_string_length(unknown));
	if ((rc = millm_load_derived(l)) != MILLM_OK)
		return rc;
	for (int b = 0; b < 256; b++)
		has_all_bytes = has_all_bytes && bpe->byte_ids[b] >= 0;
	if (unknown && bpe->unknown_id < 0 && !has_all_bytes)
		return millm_load_invalid(l, "The \"unk_token\" \"%.100s\" is not in the vocabulary.", json_string_value(unknown));
	return MILLM_OK;
}

/* ---- Unigram, WordPiece, WordLevel ---- */

/*
 * Put the vocabulary into the trie.  Backwards: of equal pieces of Unigram the last one counts, but each has its id and is decoded;
 * of equal keys of an object, as in any reader of JSON, only the last is there.
 */
static MillmCode
load_pieces(Loader *l, const json_t *model, bool has_scores)
{
	MillmTokenizer *tok = l->tok;
	Lexicon    *lexicon = &tok->lexicon;
	const Bulk *bulk = &l->bulk;
	LexiconPiece batch[LEXICON_BATCH];
	size_t		n_batch = 0;
	size_t		key_bytes;
	MillmCode	rc = begin_vocabulary(l, model, has_scores, &key_bytes);

	if (rc != MILLM_OK)
		return rc;
	if (bulk->n_entries >= MAX_IDS || key_bytes > MAX_LEXICON_BYTES)
		return millm_load_invalid(l, "The vocabulary has %zu entries of %zu bytes; the limits are %d and %d.",
								  bulk->n_entries, key_bytes, MAX_IDS, MAX_LEXICON_BYTES);
	if (!millm_lexicon_reserve(lexicon, key_bytes))
		return millm_load_out_of_memory(l->err);
	if (has_scores && !(lexicon->scores = malloc(bulk->n_entries * sizeof(*lexicon->scores))))
		return millm_load_out_of_memory(l->err);
	lexicon->n_scores = has_scores ? bulk->n_entries : 0;
	for (size_t i = bulk->n_entries; i-- > 0;)
	{
		const BulkEntry *entry = &bulk->entries[i];
		int64_t		id = has_scores ? (int64_t) i : entry->value.id;
		bool		is_new;

		if (has_scores)
			lexicon->scores[i] = entry->value.score;
		if ((rc = millm_load_content(l, millm_map_key(entry->text, entry->n), id, &is_new)) != MILLM_OK)
			return rc;
		if (is_new)
		{
			batch[n_batch++] = (LexiconPiece) {entry->text, entry->n, (int32_t) id};
			l->n_vocabulary++;
		}
		else if (has_scores)
		{
			int32_t		last = millm_map_get(&tok->contents, entry->text, entry->n);

			tok->tokens[id] = (Token) {.content = tok->tokens[last].content, .exists = true};
			l->n_vocabulary++;
		}
		if ((n_batch == LEXICON_BATCH || i == 0) && !millm_lexicon_add(lexicon, batch, n_batch))
			return millm_load_out_of_memory(l->err);
		if (n_batch == LEXICON_BATCH)
			n_batch = 0;
	}
	mark_pieces(tok);
	return MILLM_OK;
}

static MillmCode
load_unigram(Loader *l, const json_t *json)
{
	Lexicon    *lexicon = &l->tok->lexicon;
	json_t	   *unknown = millm_load_get(json, "unk_id");
	double		least = INFINITY;
	MillmCode	rc;

	lexicon->kind = LEXICON_UNIGRAM;
	if ((rc = millm_load_bool(l, json, "byte_fallback", false, &lexicon->byte_fallback)) != MILLM_OK ||
		(rc = load_pieces(l, json, true)) != MILLM_OK)
		return rc;
	if (unknown && (!json_is_integer(unknown) || json_integer_value(unknown) < 0 ||
					(uint64_t) json_integer_value(unknown) >= l->bulk.n_entries))
		return millm_load_invalid(l, "\"unk_id\" is not an id of the vocabulary.");
	if (unknown)
		lexicon->unknown_id = (int32_t) json_integer_value(unknown);
	for (size_t i = 0; i < l->bulk.n_entries; i++)
		if (lexicon->scores[i] < least)
			least = lexicon->scores[i];
	lexicon->unknown_score = least - UNKNOWN_PENALTY;
	return millm_load_derived(l);
}

/* WordPiece, WordLevel */
static MillmCode
load_words(Loader *l, const json_t *json, LexiconKind kind)
{
	Lexicon    *lexicon = &l->tok->lexicon;
	char	   *text = NULL;
	size_t		n;
	MillmCode	rc;

	lexicon->kind = kind;
	if ((rc = load_pieces(l, json, false)) != MILLM_OK ||
		(rc = millm_load_text(l, json, "unk_token", true, &text, &n)) != MILLM_OK)
		return rc;
	lexicon->unknown_id = millm_lexicon_find(lexicon, text, n);
	free(text);
	if (kind == LEXICON_WORDLEVEL)
		return MILLM_OK;
	if ((rc = millm_load_size(l, json, "max_input_chars_per_word", &lexicon->max_characters)) != MILLM_OK ||
		(rc = millm_load_text(l, json, "continuing_subword_prefix", true, &text, &n)) != MILLM_OK)
		return rc;
	lexicon->continuing = millm_lexicon_walk(lexicon, text, n);
	free(text);
	return MILLM_OK;
}

/* The type of a model that does not say it: old files had only BPE's merges, or what the others need. */
static const char *
guess_type(Loader *l, const json_t *json)
{
	if (l->bulk.has_merges || millm_load_get(json, "merges"))
		return "BPE";
	if (l->bulk.has_scores)
		return "Unigram";
	return millm_load_get(json, "continuing_subword_prefix") ? "WordPiece" : "WordLevel";
}

MillmCode
millm_load_model(Loader *l, const json_t *json)
{
	const char *type;
	MillmCode	rc;

	if (!json_is_object(json))
		return millm_load_invalid(l, "It has no \"model\".");
	type = millm_load_get(json, "type") ? json_string_value(millm_load_get(json, "type")) : guess_type(l, json);
	if (!type)
		return millm_load_invalid(l, "The type of the model is not a string.");
	if (strcmp(type, "BPE") == 0)
		return load_bpe(l, json);
	l->tok->lexicon.unknown_id = -1;
	/* these look for pieces of letters */
	if ((rc = millm_load_letters(l)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Unigram") == 0)
		return load_unigram(l, json);
	if (strcmp(type, "WordPiece") == 0)
		return load_words(l, json, LEXICON_WORDPIECE);
	if (strcmp(type, "WordLevel") == 0)
		return load_words(l, json, LEXICON_WORDLEVEL);
	return millm_load_unsupported(l, "model", type);
}
