/*
 * fuzz_tokenizer.c -- no tokenizer, no text and no ids may do more than fail by name.
 *
 * The input is a text, a zero byte, and a tokenizer.json; or a tokenizer.model, if that begins with the key of a piece; or 'v', a
 * vocab.json, a zero byte and a merges.txt.  What loads must encode the text, give back the ids it made, and stream them to the same
 * bytes as it decodes them, but for a broken run of byte tokens.  Compiled, it must give the same ids; and when bytes of its image are
 * changed, as the text says, and the hash is right again, it must open or not, and then do no harm.
 *
 * Of the vocabulary and the merges bulk.c must think what jansson thinks of the whole file.
 */
#include <jansson.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bulk.h"
#include "tokenizer.h"

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void
require(bool holds)
{
	if (!holds)
		abort();
}

static bool
is_same(const json_t *string, const char *text, size_t n)
{
	return json_string_length(string) == n && memcmp(json_string_value(string), text, n) == 0;
}

static void
compare_vocabulary(const Bulk *bulk, json_t *vocabulary)
{
	bool		is_ours = json_is_object(vocabulary);
	size_t		n_found = 0;
	size_t		index;
	const char *key;
	json_t	   *value;

	if (bulk->has_vocabulary && bulk->has_scores)
	{
		require(bulk->n_entries == json_array_size(vocabulary) && json_is_array(vocabulary));
		json_array_foreach(vocabulary, index, value)
		{
			double		score = json_number_value(json_array_get(value, 1));

			require(json_array_size(value) == 2 && json_is_number(json_array_get(value, 1)));
			require(is_same(json_array_get(value, 0), bulk->entries[index].text, bulk->entries[index].n));
			require(fabs(bulk->entries[index].value.score - score) <= 1e-14 * fabs(score));
		}
		return;
	}
	json_object_foreach(vocabulary, key, value)
		is_ours = is_ours && json_is_integer(value) && llabs(json_integer_value(value)) < 1000000000000000000;
	require(bulk->has_vocabulary == is_ours);
	if (!is_ours)
		return;
	require(bulk->n_entries >= json_object_size(vocabulary));
	for (size_t i = bulk->n_entries; i-- > 0;)
	{
		const BulkEntry *entry = &bulk->entries[i];

		value = json_object_getn(vocabulary, entry->text, entry->n);
		if (!value)
			continue;			/* a later one has been there */
		require(json_integer_value(value) == entry->value.id);
		json_object_deln(vocabulary, entry->text, entry->n);
		n_found++;
	}
	require(json_object_size(vocabulary) == 0 && (n_found > 0) == (bulk->n_entries > 0));
}

static void
compare_merges(const Bulk *bulk, const json_t *merges)
{
	bool		is_ours = json_is_array(merges);
	size_t		i;
	json_t	   *merge;

	json_array_foreach(merges, i, merge)
		is_ours = is_ours && (json_is_string(merge) || (json_array_size(merge) == 2 && json_is_string(json_array_get(merge, 0)) &&
														json_is_string(json_array_get(merge, 1))));
	require(bulk->has_merges == is_ours);
	if (!is_ours)
		return;
	require(bulk->n_merges == json_array_size(merges));
	json_array_foreach(merges, i, merge)
	{
		const BulkMerge *m = &bulk->merges[i];

		require(json_is_string(merge) == !m->right);
		require(is_same(m->right ? json_array_get(merge, 0) : merge, m->left, m->left_n));
		require(!m->right || is_same(json_array_get(merge, 1), m->right, m->right_n));
	}
}

/* Does bulk.c agree with jansson: on what is JSON, and on the two members? */
static void
compare(const char *json, size_t n)
{
	json_t	   *whole = json_loadb(json, n, JSON_ALLOW_NUL, NULL);
	json_t	   *rest;
	Bulk		bulk = {0};

	require(millm_bulk_read(&bulk, json, n));
	rest = json_loadb(bulk.rest.data, bulk.rest.n, JSON_ALLOW_NUL, NULL);
	require(!whole == !rest);
	if (whole)
	{
		json_t	   *model = json_object_get(whole, "model");

		compare_vocabulary(&bulk, json_object_get(model, "vocab"));
		compare_merges(&bulk, json_object_get(model, "merges"));
	}
	json_decref(whole);
	json_decref(rest);
	millm_bulk_free(&bulk);
}

static bool
open_files(const char *data, size_t n, MillmTokenizer **out)
{
	FileBytes	files[N_TOKENIZER_FILES] = {0};
	const char *end = memchr(data, 0, n);
	MillmError	err;

	if (n > 0 && data[0] == '\n')
		files[FILE_MODEL] = (FileBytes) {data, n};
	else if (n > 0 && data[0] == 'v' && end)
	{
		files[FILE_VOCABULARY] = (FileBytes) {data + 1, (size_t) (end - data - 1)};
		files[FILE_MERGES] = (FileBytes) {end + 1, n - (size_t) (end - data) - 1};
	}
	else
	{
		compare(data, n);
		files[FILE_TOKENIZER] = (FileBytes) {data, n};
	}
	return millm_tokenizer_parse_files(files, out, &err) == MILLM_OK;
}

/* Encode, decode, stream; is_sound: what comes out must fit together. */
static void
use(const MillmTokenizer *tok, const char *text, size_t text_n, bool is_sound, MillmIds *ids)
{
	MillmEncodeOptions options = {.add_special = true, .parse_special = text_n % 2};
	MillmDetok *detok;
	MillmError	err;
	char	   *decoded;
	size_t		decoded_n;
	size_t		streamed_n = 0;
	size_t		n;

	if (millm_encode(tok, text, text_n, options, 0, ids, &err) != MILLM_OK)
		return;
	if (millm_decode(tok, ids->ids, ids->n, true, &decoded, &decoded_n, &err) != MILLM_OK)
	{
		require(!is_sound);
		return;
	}
	detok = millm_detok_create(tok);
	for (size_t i = 0; detok && i < ids->n; i++)
	{
		(void) millm_detok_push(detok, ids->ids[i], &n);
		streamed_n += n;
	}
	if (detok)
	{
		(void) millm_detok_flush(detok, &n);
		require(!is_sound || tok->decoders[0].kind != DECODE_BYTE_LEVEL || tok->n_decoders != 1 || streamed_n + n == decoded_n);
	}
	millm_detok_free(detok);
	free(decoded);
}

/* Change the bytes of an image: every four bytes of the text are a place and what to put there. */
static void
damage(char *image, size_t n, const uint8_t *text, size_t text_n)
{
	const size_t hash_at = 8;
	uint64_t	hash;

	for (size_t i = 0; i + 4 <= text_n; i += 4)
		image[hash_at + 8 + ((size_t) text[i] << 16 | text[i + 1] << 8 | text[i + 2]) % (n - hash_at - 8)] = (char) text[i + 3];
	hash = millm_bytes_hash(image + hash_at + 8, n - hash_at - 8);
	memcpy(image + hash_at, &hash, sizeof(hash));
}

static void
require_same(const MillmIds *a, const MillmIds *b)
{
	require(a->n == b->n && (a->n == 0 || memcmp(a->ids, b->ids, a->n * sizeof(*a->ids)) == 0));
}

/* Words that are cut at U+2581 must give what they give in one piece. */
static void
use_uncut(MillmTokenizer *tok, const char *text, size_t text_n, const MillmIds *expected)
{
	MillmIds	ids = {0};

	if (!tok->bpe.has_cuts)
		return;
	tok->bpe.has_cuts = false;
	use(tok, text, text_n, true, &ids);
	require_same(&ids, expected);
	tok->bpe.has_cuts = true;
	millm_ids_free(&ids);
}

static void
use_compiled(const MillmTokenizer *tok, const char *text, size_t text_n, const MillmIds *expected)
{
	FilesKey	key = {0};
	Bytes		image = {0};
	char	   *aligned;
	MillmIds	ids = {0};
	MillmTokenizer *compiled;

	require(millm_image_make(tok, &key, &image));
	aligned = aligned_alloc(64, (image.n + 63) / 64 * 64);
	require(aligned != NULL);
	memcpy(aligned, image.data, image.n);
	compiled = millm_image_open((FileBytes) {aligned, image.n}, &key);
	require(compiled != NULL);
	use(compiled, text, text_n, true, &ids);
	require_same(&ids, expected);
	millm_tokenizer_close(compiled);
	damage(aligned, image.n, (const uint8_t *) text, text_n);
	compiled = millm_image_open((FileBytes) {aligned, image.n}, &key);
	ids.n = 0;
	if (compiled)
		use(compiled, text, text_n, false, &ids);
	millm_tokenizer_close(compiled);
	millm_ids_free(&ids);
	free(aligned);
	millm_bytes_free(&image);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const uint8_t *end = memchr(data, 0, size);
	const char *text = (const char *) data;
	size_t		text_n = end ? (size_t) (end - data) : 0;
	MillmTokenizer *tok;
	MillmIds	ids = {0};

	if (!end || size > 65536)
		return 0;
	if (!open_files((const char *) end + 1, size - text_n - 1, &tok))
		return 0;
	use(tok, text, text_n, true, &ids);
	use_uncut(tok, text, text_n, &ids);
	use_compiled(tok, text, text_n, &ids);
	millm_ids_free(&ids);
	millm_tokenizer_close(tok);
	return 0;
}
