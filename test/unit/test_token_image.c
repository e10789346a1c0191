/*
 * test_token_image.c -- compiled tokenizers: the same as those that were parsed, or not there.
 *
 * One whose bytes changed by chance is found by its hash.  One that somebody made with a right hash may be a wrong tokenizer, but must
 * be one: every byte of small ones is changed here, and what opens is used, under the sanitizers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tokenizer.h"

#define HASH_AT 8				/* in an image; it is of all that follows it */

/* One of each model, with what only it has. */
static const char *const kinds[] = {
	/* bytes; added tokens, one of them looked for in normalized text; a BOS */
	"{\"added_tokens\":[{\"id\":8,\"content\":\"<s>\",\"special\":true},{\"id\":10,\"content\":\"A b\",\"normalized\":true}],"
	"\"normalizer\":{\"type\":\"Lowercase\"},\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false},"
	"\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"}},{\"Sequence\":{\"id\":\"A\"}}],"
	"\"special_tokens\":{\"<s>\":{\"ids\":[8]}}},\"decoder\":{\"type\":\"ByteLevel\"},"
	"\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"\\u0120\":2,\"ab\":3,\"\\u0120a\":4,\"\\u00e2\":5,\"\\u0124\":6,\"\\u00ac\":7,"
	"\"<s>\":8,\"aba\":9},\"merges\":[\"a b\",\"\\u0120 a\",\"ab a\"]}}",
	/* characters; bytes to fall back to, affixes, an unknown token; a hole in the vocabulary, into which an added token falls */
	"{\"added_tokens\":[{\"id\":8,\"content\":\"<0x62>\"}],\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}]},"
	"\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"unk_token\":\"?\",\"continuing_subword_prefix\":\"#\",\"end_of_word_suffix\":\"$\","
	"\"vocab\":{\"?\":0,\"a\":1,\"#a\":2,\"#a$\":3,\"aa\":4,\"aaa$\":5,\"<0x61>\":6,\"\\u20ac\":9},\"merges\":[\"a #a\",\"aa #a$\"]}}",
	"{\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" +\"},\"content\":\"_\"},\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"_\"},"
	"\"model\":{\"type\":\"Unigram\",\"unk_id\":0,\"byte_fallback\":true,\"vocab\":[[\"?\",0],[\"a\",-1.5],[\"b\",-2],[\"ab\",-2.5],[\"_\",-3],"
	"[\"a\",-9],[\"<0xE2>\",-10],[\"<0x82>\",-10],[\"<0xAC>\",-10]]}}",
	"{\"added_tokens\":[{\"id\":5,\"content\":\"<s>\",\"special\":true,\"lstrip\":true}],\"pre_tokenizer\":{\"type\":\"Whitespace\"},"
	"\"decoder\":{\"type\":\"WordPiece\",\"prefix\":\"##\"},\"model\":{\"type\":\"WordPiece\",\"unk_token\":\"?\",\"continuing_subword_prefix\":\"##\","
	"\"max_input_chars_per_word\":9,\"vocab\":{\"?\":0,\"a\":1,\"##b\":2,\"ab\":3,\"##\\u20ac\":4}}}",
};

#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))

static const char *const texts[] = {"", "ab aba<s> a", "A b\xE2\x82\xAC", "aaa bb aaaaaaaaaaaaaaaa", "b \xE2\x82\xAC ? <0x62>"};

#define N_TEXTS (sizeof(texts) / sizeof(texts[0]))

static MillmTokenizer *
parse(const char *json)
{
	MillmTokenizer *tok = NULL;
	MillmError	err = {0};

	if (millm_tokenizer_parse(json, strlen(json), NULL, 0, &tok, &err) != MILLM_OK)
		fail_msg("%s: %s", err.message, err.detail);
	return tok;
}

/* The image of a kind, where an image may lie; free() ends it. */
static FileBytes
make_image(size_t kind, FilesKey *key)
{
	MillmTokenizer *tok = parse(kinds[kind]);
	Bytes		image = {0};
	char	   *copy;

	*key = millm_files_key((FileBytes[N_TOKENIZER_FILES]) {[FILE_TOKENIZER] = {kinds[kind], strlen(kinds[kind])}});
	assert_true(millm_image_make(tok, key, &image));
	millm_tokenizer_close(tok);
	copy = aligned_alloc(64, (image.n + 64) / 64 * 64);	/* a byte more than the image, at least */
	assert_non_null(copy);
	memcpy(copy, image.data, image.n);
	copy[image.n] = 0;
	FileBytes	out = {copy, image.n};

	millm_bytes_free(&image);
	return out;
}

static void
assert_same(const MillmTokenizer *a, const MillmTokenizer *b)
{
	assert_int_equal(millm_tokenizer_n_ids(a), millm_tokenizer_n_ids(b));
	for (size_t t = 0; t < N_TEXTS * 4; t++)
	{
		const char *text = texts[t / 4];
		MillmEncodeOptions options = {.add_special = t % 2 > 0, .parse_special = t / 2 % 2 > 0};
		MillmIds	x = {0};
		MillmIds	y = {0};
		char	   *decoded[2];
		size_t		n[2];
		MillmError	err;

		assert_int_equal(millm_encode(a, text, strlen(text), options, 0, &x, &err), MILLM_OK);
		assert_int_equal(millm_encode(b, text, strlen(text), options, 0, &y, &err), MILLM_OK);
		assert_int_equal(x.n, y.n);
		if (x.n > 0)
			assert_memory_equal(x.ids, y.ids, x.n * sizeof(*x.ids));
		assert_int_equal(millm_decode(a, x.ids, x.n, true, &decoded[0], &n[0], &err), MILLM_OK);
		assert_int_equal(millm_decode(b, y.ids, y.n, true, &decoded[1], &n[1], &err), MILLM_OK);
		assert_int_equal(n[0], n[1]);
		assert_memory_equal(decoded[0], decoded[1], n[0] + 1);
		free(decoded[0]);
		free(decoded[1]);
		millm_ids_free(&x);
		millm_ids_free(&y);
	}
	for (int id = 0; id < millm_tokenizer_n_ids(a); id++)
		assert_int_equal(millm_token_is_special(a, id), millm_token_is_special(b, id));
}

static void
test_same(void **state)
{
	(void) state;
	for (size_t k = 0; k < N_KINDS; k++)
	{
		FilesKey	key;
		FileBytes	image = make_image(k, &key);
		MillmTokenizer *compiled = millm_image_open(image, &key);
		MillmTokenizer *parsed = parse(kinds[k]);

		assert_non_null(compiled);
		assert_true(millm_tokenizer_is_compiled(compiled));
		assert_false(millm_tokenizer_is_compiled(parsed));
		assert_same(compiled, parsed);
		millm_tokenizer_close(compiled);
		millm_tokenizer_close(parsed);
		free((char *) image.data);
	}
}

static void
test_key(void **state)
{
	FilesKey	key;
	FileBytes	image = make_image(0, &key);
	FileBytes	files[N_TOKENIZER_FILES] = {[FILE_TOKENIZER] = {kinds[0], strlen(kinds[0])}};
	char	   *changed = strdup(kinds[0]);

	(void) state;
	/* another character in the file, another length, another file beside it, an empty one */
	changed[strlen(changed) / 2] ^= 1;
	files[FILE_TOKENIZER].data = changed;
	for (int i = 0; i < 4; i++)
	{
		FilesKey	other = millm_files_key(files);

		assert_null(millm_image_open(image, &other));
		files[FILE_TOKENIZER] = (FileBytes) {kinds[0], strlen(kinds[0]) - (i == 0)};
		files[FILE_CONFIG] = (FileBytes) {i == 1 ? "{}" : i == 2 ? "" : NULL, i == 1 ? 2 : 0};
	}
	free(changed);
	free((char *) image.data);
}

/* Whatever single byte changes, whatever is missing or too much. */
static void
test_damage(void **state)
{
	(void) state;
	for (size_t k = 0; k < N_KINDS; k++)
	{
		FilesKey	key;
		FileBytes	image = make_image(k, &key);
		char	   *data = (char *) image.data;

		for (size_t i = 0; i < image.n; i++)
		{
			data[i] ^= (char) (1 << i % 8);
			assert_null(millm_image_open(image, &key));
			data[i] ^= (char) (1 << i % 8);
			assert_null(millm_image_open((FileBytes) {data, i}, &key));
		}
		assert_null(millm_image_open((FileBytes) {data, image.n + 1}, &key));
		free(data);
	}
}

/* Do with it what can be done, whatever comes out. */
static void
use(const MillmTokenizer *tok)
{
	MillmDetok *detok = millm_detok_create(tok);
	MillmError	err;
	size_t		n;

	for (size_t t = 0; t < N_TEXTS; t++)
	{
		MillmIds	ids = {0};
		char	   *decoded;

		if (millm_encode(tok, texts[t], strlen(texts[t]), (MillmEncodeOptions) {true, true, NULL}, 0, &ids, &err) == MILLM_OK)
		{
			for (size_t i = 0; i < ids.n; i++)
				assert_in_range(ids.ids[i], 0, millm_tokenizer_n_ids(tok) - 1);
			if (millm_decode(tok, ids.ids, ids.n, false, &decoded, &n, &err) == MILLM_OK)
				free(decoded);
		}
		millm_ids_free(&ids);
	}
	for (int id = 0; id < millm_tokenizer_n_ids(tok) && detok; id++)
		(void) millm_detok_push(detok, id, &n);
	if (detok)
		(void) millm_detok_flush(detok, &n);
	millm_detok_free(detok);
}

static size_t
open_and_use(FileBytes image, const FilesKey *key)
{
	uint64_t	hash = millm_bytes_hash(image.data + HASH_AT + 8, image.n - HASH_AT - 8);
	MillmTokenizer *tok;

	memcpy((char *) image.data + HASH_AT, &hash, sizeof(hash));
	if (!(tok = millm_image_open(image, key)))
		return 0;
	use(tok);
	millm_tokenizer_close(tok);
	return 1;
}

static void
test_hostile(void **state)
{
	static const unsigned char changes[] = {0x01, 0x80, 0xFF};
	uint32_t	random = 1;

	(void) state;
	for (size_t k = 0; k < N_KINDS; k++)
	{
		FilesKey	key;
		FileBytes	image = make_image(k, &key);
		unsigned char *data = (unsigned char *) image.data;
		unsigned char *good = malloc(image.n);
		size_t		n_opened = 0;

		memcpy(good, data, image.n);
		for (size_t i = HASH_AT + 8; i < image.n; i++)
			for (size_t c = 0; c < sizeof(changes); c++)
			{
				data[i] ^= changes[c];
				n_opened += open_and_use(image, &key);
				data[i] ^= changes[c];
			}
		/* in free slots and where the answer is only another one it does no harm; in most other places it must be refused */
		assert_in_range(n_opened, 1, (image.n - HASH_AT - 8) * sizeof(changes) - 1);
		for (int round = 0; round < 5000; round++)
		{
			for (int i = 0; i < 4; i++)
			{
				random = random * 1664525 + 1013904223;
				data[HASH_AT + 8 + (random >> 8) % (image.n - HASH_AT - 8)] = (unsigned char) (random >> 3);
			}
			(void) open_and_use(image, &key);
			memcpy(data, good, image.n);
		}
		assert_int_equal(open_and_use(image, &key), 1);
		free(good);
		free(data);
	}
}

/* Tables that small images hardly come to by a few changed bytes: full ones, odd sizes, what ends one byte behind the end. */
static void
test_tables(void **state)
{
	char		keys[] = "ab";
	StringMapSlot slots[4] = {{.value = 1, .key = {0, 2}}, {.value = 0, .key = {2, 0}}, {.value = -1}, {.value = -1}};
	Merge		merges[4] = {{.key = 1, .id = 1}, {.key = UINT64_MAX}, {.key = UINT64_MAX}, {.key = UINT64_MAX, .id = 7}};
	TrieEdge	edges[4] = {{'a', 1}, {'b', 2}, {0}, {0}};
	int32_t		ids[3] = {-1, 0, 1};
	double		scores[2] = {-1, -2};
	const Lexicon good = {.kind = LEXICON_UNIGRAM, .unknown_id = 1, .edges = edges, .n_edge_slots = 4, .n_nodes = 3, .ids = ids, .scores = scores,
		.n_scores = 2, .continuing = 2};
	Lexicon		lexicon = good;
	StringMap	map = {0};
	Bpe			bpe = {0};

	(void) state;
	assert_true(millm_map_adopt(&map, keys, 2, slots, 4, 2));
	assert_int_equal(map.n, 2);
	assert_true(millm_map_adopt(&map, keys, 2, slots, 0, 2));
	assert_false(millm_map_adopt(&map, keys, 2, slots, 4, 1));	/* a value */
	assert_false(millm_map_adopt(&map, keys, 1, slots, 4, 2));	/* a key */
	assert_false(millm_map_adopt(&map, keys, 2, slots, 3, 2));
	assert_false(millm_map_adopt(&map, keys, 2, slots, 2, 2));	/* no free slot */
	slots[0].key = (Span) {3, 0};
	assert_false(millm_map_adopt(&map, keys, 2, slots, 4, 2));
	slots[0].key = (Span) {1, UINT32_MAX};
	assert_false(millm_map_adopt(&map, keys, 2, slots, 4, 2));

	assert_true(millm_bpe_adopt_merges(&bpe, merges, 4, 2));
	assert_int_equal(bpe.n_merges, 1);
	assert_true(millm_bpe_adopt_merges(&bpe, merges, 0, 2));
	assert_false(millm_bpe_adopt_merges(&bpe, merges, 4, 1));
	assert_false(millm_bpe_adopt_merges(&bpe, merges, 3, 2));
	assert_false(millm_bpe_adopt_merges(&bpe, merges, 1, 2));
	merges[0].id = -1;
	assert_false(millm_bpe_adopt_merges(&bpe, merges, 4, 2));

	assert_true(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.continuing = NO_NODE;
	assert_true(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.continuing = 3;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon = good;
	lexicon.n_nodes = 2;		/* an edge leads out of it */
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.n_nodes = 0;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon = good;
	lexicon.n_scores = 1;		/* a piece without a score */
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.kind = LEXICON_WORDLEVEL;	/* which needs none */
	assert_true(millm_lexicon_is_sound(&lexicon, 2));
	assert_false(millm_lexicon_is_sound(&lexicon, 1));
	lexicon = good;
	lexicon.unknown_id = 2;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.unknown_id = -2;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon = good;
	lexicon.n_edge_slots = 3;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.n_edge_slots = 2;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
	lexicon.n_edge_slots = 0;
	assert_false(millm_lexicon_is_sound(&lexicon, 2));
}

/* ---- in a directory ---- */

static void
write_file(const char *dir, const char *name, const char *text, size_t padding)
{
	char		path[512];
	FILE	   *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "w");
	assert_non_null(f);
	fputs(text, f);
	for (size_t i = 0; i < padding; i++)
		fputc(' ', f);
	assert_int_equal(fclose(f), 0);
}

static bool
has_file(const char *dir, const char *name)
{
	char		path[512];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return access(path, F_OK) == 0;
}

/* Open dir's tokenizer, compile it if that pays; was it compiled before? */
static bool
open_and_compile(const char *dir)
{
	MillmTokenizer *tok;
	MillmTokenizer *parsed = parse(kinds[0]);
	MillmError	err = {0};
	bool		is_compiled;

	assert_int_equal(millm_tokenizer_open(dir, &tok, &err), MILLM_OK);
	is_compiled = millm_tokenizer_is_compiled(tok);
	assert_same(tok, parsed);
	assert_int_equal(millm_tokenizer_compile(tok, dir, &err), MILLM_OK);
	millm_tokenizer_close(tok);
	millm_tokenizer_close(parsed);
	return is_compiled;
}

static void
test_directory(void **state)
{
	char		dir[] = "/tmp/millm-image-XXXXXX";
	char		path[512];
	const size_t large = 4 << 20;
	MillmTokenizer *tok;
	MillmError	err = {0};

	(void) state;
	assert_non_null(mkdtemp(dir));
	/* a small one is parsed each time */
	write_file(dir, "tokenizer.json", kinds[0], 0);
	assert_false(open_and_compile(dir));
	assert_false(has_file(dir, "tokenizer.millm"));

	write_file(dir, "tokenizer.json", kinds[0], large);
	write_file(dir, ".partial-tokenizer.millm", "of one who was killed", 0);
	assert_false(open_and_compile(dir));
	assert_false(has_file(dir, ".partial-tokenizer.millm"));
	assert_true(open_and_compile(dir));

	/* changed files, and a changed image, make a new one; a template in a file of its own is not in it */
	write_file(dir, "tokenizer.json", kinds[0], large + 1);
	assert_false(open_and_compile(dir));
	assert_true(open_and_compile(dir));
	write_file(dir, "tokenizer.millm", "nonsense", 0);
	write_file(dir, "chat_template.jinja", "{{ messages }}", 0);
	assert_false(open_and_compile(dir));
	snprintf(path, sizeof(path), "%s/chat_template.jinja", dir);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(millm_tokenizer_open(dir, &tok, &err), MILLM_OK);
	assert_true(millm_tokenizer_is_compiled(tok));
	assert_false(millm_tokenizer_has_chat_template(tok));
	millm_tokenizer_close(tok);

	/* where it cannot be written, nothing is left of it, and the error says so */
	write_file(dir, "tokenizer.json", kinds[0], large);
	assert_int_equal(millm_tokenizer_open(dir, &tok, &err), MILLM_OK);
	snprintf(path, sizeof(path), "%s/tokenizer.millm", dir);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(mkdir(path, 0700), 0);	/* no rename goes over it */
	assert_int_equal(millm_tokenizer_compile(tok, dir, &err), MILLM_E_MODEL_LOAD_FAILED);
	assert_non_null(strstr(err.message, "could not write file \"/tmp/millm-image-"));
	assert_false(has_file(dir, ".partial-tokenizer.millm"));
	millm_tokenizer_close(tok);
	assert_false(has_file(dir, ".partial-tokenizer.millm"));

	assert_int_equal(rmdir(path), 0);
	snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(rmdir(dir), 0);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_same), cmocka_unit_test(test_key), cmocka_unit_test(test_damage), cmocka_unit_test(test_hostile),
		cmocka_unit_test(test_tables), cmocka_unit_test(test_directory),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
