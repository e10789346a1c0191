/* test_head_tap.c -- the screening copy of a head that goes by, in whatever pieces: the one that is made from the file; none where it does not come whole. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "checkpoint.h"
#include "head_copy.h"
#include "head_tap.h"
#include "screen.h"
#include "store.h"

#define UUID	"01234567-89ab-cdef-0123-456789abcdef"
#define SHA256	"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define MODEL	"model.safetensors"

enum {ROWS = 7, INPUTS = 12};

/* What the tests share: a store in a directory of their own, a config, a file whose head lies between other tensors. */
typedef struct Fixture
{
	char		dir[64];
	MillmStore *store;
	MillmConfig config;
	MillmHeadTap *tap;
	MillmSink  *sink;
	unsigned char *bytes;
	MillmHubFile file;
	unsigned char copy[4096];	/* of its head */
	size_t		copy_bytes;
} Fixture;

static unsigned char *
read_whole(const char *dir, const char *name, size_t *n)
{
	char		path[512];
	FILE	   *f;
	unsigned char *bytes = malloc(4096);

	assert_non_null(bytes);
	snprintf(path, sizeof(path), "%s/%s", dir, name);
	*n = 0;
	if ((f = fopen(path, "r")))
	{
		*n = fread(bytes, 1, 4096, f);
		assert_true(*n < 4096);
		fclose(f);
	}
	return bytes;
}

/* A file with that head, and what its copy is. */
static void
begin(Fixture *x, bool is_tied, const char *head)
{
	static const char form[] = "{\"model_type\": \"llama\", \"vocab_size\": 7, \"hidden_size\": 12, \"intermediate_size\": 4, \"num_hidden_layers\": 1, "
		"\"num_attention_heads\": 1, \"head_dim\": 12, \"tie_word_embeddings\": %s}";
	const TestTensor tensors[] = {
		{"model.norm.weight", "BF16", 2, {12}, 1},
		{head, "BF16", 2, {ROWS, INPUTS}, -40},
		{"model.layers.0.input_layernorm.weight", "BF16", 2, {12}, 2},
	};
	char		json[512];
	unsigned char *copy;
	MillmHeadCopy *direct;

	*x = (Fixture) {0};
	make_dir(x->dir);
	snprintf(json, sizeof(json), form, is_tied ? "true" : "false");
	assert_int_equal(millm_config_parse(json, strlen(json), &x->config, NULL), MILLM_OK);
	write_st_of(x->dir, "source", tensors, NULL, 3, 5);
	{
		size_t		n;

		x->bytes = read_whole(x->dir, "source", &n);
		x->file = (MillmHubFile) {.path = MODEL, .size = (int64_t) n, .hash = SHA256};
	}
	assert_int_equal(millm_store_open(x->dir, "m", UUID, NULL, NULL, &x->store, NULL), MILLM_OK);
	/* the data lies at the end: a norm, the head, a norm */
	assert_int_equal(millm_head_copy_begin(x->store, MILLM_BF16, ROWS, INPUTS, &direct, NULL), MILLM_OK);
	assert_int_equal(millm_head_copy_push(direct, x->bytes + x->file.size - 24 - 2 * ROWS * INPUTS, 2 * ROWS * INPUTS, NULL), MILLM_OK);
	assert_int_equal(millm_head_copy_end(direct, NULL), MILLM_OK);
	millm_head_copy_free(direct);
	copy = read_whole(millm_store_path(x->store), MILLM_SCREEN_FILE, &x->copy_bytes);
	memcpy(x->copy, copy, x->copy_bytes);
	free(copy);
	assert_true(x->copy_bytes > ROWS * INPUTS);
	remove_file(millm_store_path(x->store), MILLM_SCREEN_FILE);
	assert_int_equal(millm_head_tap_create(x->store, &x->config, millm_store_sink(x->store), &x->tap, NULL), MILLM_OK);
	x->sink = millm_head_tap_sink(x->tap);
}

static void
end(Fixture *x)
{
	millm_head_tap_free(x->tap);
	millm_store_remove(x->store, NULL, 0);
	millm_store_close(x->store);
	millm_config_free(&x->config);
	free(x->bytes);
	remove_dir(x->dir);
}

static void
open_file(Fixture *x, int64_t expected)
{
	atomic_bool	stop = false;
	MillmHash	hash;
	int64_t		have;

	millm_hash_begin(&hash, x->file.hash, x->file.size);
	assert_int_equal(x->sink->begin(x->sink->arg, &x->file, &hash, &have, &stop, NULL), MILLM_OK);
	assert_int_equal(have, expected);
}

/* bytes[from .. to) in pieces of so many. */
static void
push(Fixture *x, int64_t from, int64_t to, int64_t piece)
{
	for (int64_t n; from < to; from += n)
	{
		n = to - from < piece ? to - from : piece;
		assert_int_equal(x->sink->write(x->sink->arg, x->bytes + from, (size_t) n, NULL), MILLM_OK);
	}
}

/* The file has its name and its bytes; of the copy there are as many as is said, and they are what they should be. */
static void
check(Fixture *x, size_t copy_bytes)
{
	size_t		n;
	unsigned char *bytes = read_whole(millm_store_path(x->store), MODEL, &n);

	assert_int_equal(n, x->file.size);
	assert_memory_equal(bytes, x->bytes, n);
	free(bytes);
	bytes = read_whole(millm_store_path(x->store), MILLM_SCREEN_FILE, &n);
	assert_int_equal(n, copy_bytes);
	assert_memory_equal(bytes, x->copy, n);
	free(bytes);
	bytes = read_whole(millm_store_path(x->store), ".partial-" MILLM_SCREEN_FILE, &n);
	assert_int_equal(n, 0);
	free(bytes);
}

static void
in_any_pieces(void **state)
{
	static const struct
	{
		bool		is_tied;
		const char *head;
	}			heads[] = {{true, "model.embed_tokens.weight"}, {false, "lm_head.weight"}};

	(void) state;
	for (int i = 0; i < 2; i++)
		for (int64_t piece = 1; piece < 600; piece = piece * 3 / 2 + 1)
		{
			Fixture		x;

			begin(&x, heads[i].is_tied, heads[i].head);
			open_file(&x, 0);
			push(&x, 0, x.file.size, piece);
			assert_int_equal(x.sink->finish(x.sink->arg, NULL), MILLM_OK);
			check(&x, x.copy_bytes);
			end(&x);
		}
}

/* What was wrong is forgotten, wherever it ended. */
static void
starts_over(void **state)
{
	(void) state;
	for (int64_t wrong = 0; wrong < 600; wrong += 37)
	{
		Fixture		x;
		int64_t		to;

		begin(&x, true, "model.embed_tokens.weight");
		to = wrong < x.file.size ? wrong : x.file.size;
		open_file(&x, 0);
		x.bytes[x.file.size - 60] ^= 1;
		push(&x, 0, to, 50);
		x.bytes[x.file.size - 60] ^= 1;
		assert_int_equal(x.sink->discard(x.sink->arg, NULL), MILLM_OK);
		push(&x, 0, x.file.size, 50);
		assert_int_equal(x.sink->finish(x.sink->arg, NULL), MILLM_OK);
		check(&x, x.copy_bytes);
		end(&x);
	}
}

/* No copy of a head that does not come whole, of another tensor, or of what has no header; the file is there all the same. */
static void
nothing_to_copy(void **state)
{
	Fixture		x;

	(void) state;
	begin(&x, true, "model.embed_tokens.weight");
	open_file(&x, 0);
	push(&x, 0, x.file.size - 50, 64);
	x.sink->abandon(x.sink->arg);
	open_file(&x, x.file.size - 50);
	push(&x, x.file.size - 50, x.file.size, 64);
	assert_int_equal(x.sink->finish(x.sink->arg, NULL), MILLM_OK);
	check(&x, 0);
	end(&x);

	begin(&x, false, "model.embed_tokens.weight");
	open_file(&x, 0);
	push(&x, 0, x.file.size, 64);
	assert_int_equal(x.sink->finish(x.sink->arg, NULL), MILLM_OK);
	check(&x, 0);
	end(&x);

	for (int byte = 0; byte < 12; byte++)
	{
		begin(&x, true, "model.embed_tokens.weight");
		open_file(&x, 0);
		x.bytes[byte] ^= 0x91;
		push(&x, 0, x.file.size, 64);
		assert_int_equal(x.sink->finish(x.sink->arg, NULL), MILLM_OK);
		check(&x, 0);
		end(&x);
	}
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(in_any_pieces), cmocka_unit_test(starts_over), cmocka_unit_test(nothing_to_copy),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
