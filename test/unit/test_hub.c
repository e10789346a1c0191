/* test_hub.c -- what the Hub client believes of a stranger's texts: ids, revisions, info, lists of files, indexes; the store's manners; the window. */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "breaker.h"
#include "choice.h"
#include "hub.h"
#include "store.h"
#include "window.h"

#define SHA1	"0123456789abcdef0123456789abcdef01234567"
#define SHA256	"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define UUID	"01234567-89ab-cdef-0123-456789abcdef"
#define OTHER	"99999999-89ab-cdef-0123-456789abcdef"

static void
repo_ids(void **state)
{
	/* the cases of hub-protocol.md 6.1, and what differs on purpose: ASCII only, both parts at most 96 characters */
	static const char *const good[] = {"gpt2", "a", "_a", "a_", "A/B_c.d-1", "a.git/b", "models/gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"};
	static const char *const wrong[] = {"", "-a", "a-", ".a", "a.", "a/.b", "a-/b", "/a", "a/", "a//b", "a/b/c", "a b", "a--b", "a/b..c", "a/b.git", "a%2Fb",
		"a@b", "a:b", "a\\b", "\303\251/b", "foo\n", "..", "../a", "https://huggingface.co/a/b"};
	char		id[300];

	(void) state;
	for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++)
		assert_int_equal(millm_repo_id_check(good[i], NULL), MILLM_OK);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++)
	{
		MillmError	err;

		assert_int_equal(millm_repo_id_check(wrong[i], &err), MILLM_E_INVALID_REPO_ID);
		assert_true(err.detail[0] && err.hint[0]);
	}
	for (int n = 95; n <= 98; n++)
	{
		snprintf(id, sizeof(id), "x/%0*d", n, 1);
		assert_int_equal(millm_repo_id_check(id, NULL) == MILLM_OK, n <= 96);
		snprintf(id, sizeof(id), "%0*d/x", n, 1);
		assert_int_equal(millm_repo_id_check(id, NULL) == MILLM_OK, n <= 96);
	}
}

static void
revisions(void **state)
{
	static const char *const good[] = {"main", "refs/pr/1", "v1.0", SHA1};
	static const char *const wrong[] = {"", "..", "a/../b", "a b", "a\nb", "/a", "-a", "a?b", "\303\251"};

	(void) state;
	for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++)
		assert_int_equal(millm_revision_check(good[i], NULL), MILLM_OK);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++)
		assert_int_equal(millm_revision_check(wrong[i], NULL), MILLM_E_INVALID_ARGUMENT);
}

static void
url_encoding(void **state)
{
	char	   *a = millm_url_encode("refs/pr/1", false), *b = millm_url_encode("a b/\303\251%.json", true);

	(void) state;
	assert_string_equal(a, "refs%2Fpr%2F1");
	assert_string_equal(b, "a%20b/%C3%A9%25.json");
	free(a);
	free(b);
}

static MillmCode
info(MillmRepo *repo, const char *text)
{
	memset(repo, 0, sizeof(*repo));
	return millm_repo_read_info(repo, text, strlen(text), NULL);
}

static void
infos(void **state)
{
	MillmRepo	r;

	(void) state;
	assert_int_equal(info(&r, "{\"id\":\"New/Name\",\"sha\":\"" SHA1 "\",\"gated\":\"auto\",\"cardData\":{\"license\":[\"mit\",\"x\"]},"
						  "\"safetensors\":{\"total\":135}}"), MILLM_OK);
	assert_string_equal(r.id, "New/Name");
	assert_string_equal(r.commit, SHA1);
	assert_string_equal(r.license, "mit");
	assert_true(r.gated);
	assert_int_equal(r.params, 135);
	/* what it does not say is not known */
	assert_int_equal(info(&r, "{\"id\":\"a\",\"sha\":\"" SHA1 "\",\"gated\":false,\"tags\":[1,\"license:other\"]}"), MILLM_OK);
	assert_string_equal(r.license, "other");
	assert_false(r.gated);
	assert_int_equal(r.params, -1);
	assert_int_equal(info(&r, "{\"id\":\"a\",\"sha\":\"" SHA1 "\",\"cardData\":{\"license\":\"other\",\"license_name\":\"mine\"}}"), MILLM_OK);
	assert_string_equal(r.license, "mine");
	assert_int_equal(info(&r, "{\"id\":\"a\",\"sha\":\"" SHA1 "\",\"disabled\":true}"), MILLM_E_MODEL_DOWNLOAD_FAILED);
	assert_int_equal(info(&r, "{\"id\":\"a\",\"sha\":\"" SHA256 "\"}"), MILLM_E_MODEL_DOWNLOAD_FAILED);
	assert_int_equal(info(&r, "{\"id\":\"a/../../b\",\"sha\":\"" SHA1 "\"}"), MILLM_E_MODEL_DOWNLOAD_FAILED);
	assert_int_equal(info(&r, "<html>"), MILLM_E_MODEL_DOWNLOAD_FAILED);
	assert_int_equal(info(&r, ""), MILLM_E_MODEL_DOWNLOAD_FAILED);
	assert_int_equal(info(&r, "[]"), MILLM_E_MODEL_DOWNLOAD_FAILED);
}

static MillmCode
page(MillmRepo *repo, const char *text)
{
	return millm_repo_read_page(repo, text, strlen(text), NULL);
}

static void
pages(void **state)
{
	static const char *const unsafe[] = {"/etc/passwd", "../x", "a/../x", "a//x", "./x", "a/.", "a\\\\x", "a\\u0001x", "a/", ""};
	MillmRepo	r = {.id = "a/b"};
	const MillmHubFile *f;
	char		text[400];

	(void) state;
	assert_int_equal(page(&r, "[{\"type\":\"file\",\"path\":\"z.json\",\"size\":5,\"oid\":\"" SHA1 "\"},{\"type\":\"directory\",\"path\":\"d\",\"size\":0}]"), MILLM_OK);
	assert_int_equal(page(&r, "[{\"type\":\"file\",\"path\":\"m.safetensors\",\"size\":7,\"oid\":\"" SHA1 "\",\"lfs\":{\"oid\":\"" SHA256 "\"}},"
						  "{\"type\":\"file\",\"path\":\"d/x\",\"size\":1,\"oid\":\"" SHA1 "\",\"lfs\":{\"oid\":\"********\"}}]"), MILLM_OK);
	assert_int_equal(r.n_files, 3);
	assert_non_null(f = millm_repo_find(&r, "m.safetensors"));
	assert_string_equal(f->hash, SHA256);	/* not the pointer's */
	assert_int_equal(f->size, 7);
	assert_string_equal(millm_repo_find(&r, "z.json")->hash, SHA1);
	assert_string_equal(millm_repo_find(&r, "d/x")->hash, "");	/* masked */
	assert_null(millm_repo_find(&r, "d"));
	for (size_t i = 0; i < sizeof(unsafe) / sizeof(*unsafe); i++)
	{
		snprintf(text, sizeof(text), "[{\"type\":\"file\",\"path\":\"%s\",\"size\":1,\"oid\":\"" SHA1 "\"}]", unsafe[i]);
		assert_int_equal(page(&r, text), MILLM_OK);
		assert_int_equal(r.n_files, 3);
	}
	assert_int_equal(page(&r, "[{\"type\":\"file\",\"path\":\"n\",\"size\":-1,\"oid\":\"" SHA1 "\"}, 3, null, {\"path\":1}]"), MILLM_OK);
	assert_int_equal(r.n_files, 3);
	assert_int_equal(page(&r, "{}"), MILLM_E_MODEL_DOWNLOAD_FAILED);
	free(r.files);
}

static void
too_many_files(void **state)
{
	MillmRepo	r = {.id = "a/b"};
	char	   *text = malloc((MILLM_HUB_MAX_FILES + 1) * 3 + 3), *p = text;

	(void) state;
	*p++ = '[';
	for (int i = 0; i <= MILLM_HUB_MAX_FILES; i++)
	{
		memcpy(p, i ? ",{}" : "{}", i ? 3 : 2);
		p += i ? 3 : 2;
	}
	memcpy(p, "]", 2);
	assert_int_equal(page(&r, text), MILLM_E_MODEL_DOWNLOAD_FAILED);
	free(text);
	free(r.files);
}

static void
add(MillmRepo *r, const char *path, long long size)
{
	char		text[400];

	snprintf(text, sizeof(text), "[{\"type\":\"file\",\"path\":\"%s\",\"size\":%lld,\"oid\":\"" SHA1 "\"}]", path, size);
	assert_int_equal(page(r, text), MILLM_OK);
}

static bool
chosen(const MillmChoice *c, const char *path)
{
	for (size_t i = 0; i < c->n; i++)
		if (strcmp(c->files[i]->path, path) == 0)
			return true;
	return false;
}

static void
small_files(void **state)
{
	static const char *const ours[] = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE",
		"LICENSE.txt", "README.md", "tokenizer.model"};
	static const char *const others[] = {"modeling_x.py", "training_args.bin", "original/config.json", "onnx/model.onnx", ".gitattributes", "pytorch_model.bin",
		"consolidated.safetensors", "params.json", "logo.png", "LICENSE/x"};
	MillmRepo	r = {.id = "a/b"};
	MillmChoice c = {0};

	(void) state;
	for (size_t i = 0; i < sizeof(ours) / sizeof(*ours); i++)
		add(&r, ours[i], 10);
	for (size_t i = 0; i < sizeof(others) / sizeof(*others); i++)
		add(&r, others[i], 1000);
	assert_int_equal(millm_choose_small_files(&r, &c, NULL), MILLM_OK);
	assert_int_equal(c.n, sizeof(ours) / sizeof(*ours));
	for (size_t i = 0; i < sizeof(ours) / sizeof(*ours); i++)
		assert_true(chosen(&c, ours[i]));
	assert_int_equal(c.total_bytes, 10 * c.n);
	assert_string_equal(c.files[0]->path, "config.json");
	millm_choice_free(&c);
	free(r.files);
}

static MillmCode
shards(const MillmRepo *r, const char *text, MillmChoice *c)
{
	memset(c, 0, sizeof(*c));
	return millm_choose_shards(r, text, strlen(text), c, NULL);
}

static void
indexes(void **state)
{
	/* an index of safetensors names nothing else */
	static const char *const wrong[] = {"{\"weight_map\":{\"t\":\"a.bin\"}}", "", "{}", "[]", "{\"weight_map\":{}}", "{\"weight_map\":{\"t\":\"c.safetensors\"}}", "{\"weight_map\":{\"t\":\"../a.safetensors\"}}",
		"{\"weight_map\":{\"t\":\"d/x.safetensors\"}}", "{\"weight_map\":{\"t\":7}}", "{\"weight_map\":{\"t\":\"a.safetensors\",\"u\":\"/etc/passwd\"}}"};
	MillmRepo	r = {.id = "a/b"};
	MillmChoice c;

	(void) state;
	add(&r, "b.safetensors", 3);
	add(&r, "a.safetensors", 4);
	add(&r, "d/x.safetensors", 5);
	add(&r, "a.bin", 6);
	assert_int_equal(shards(&r, "{\"weight_map\":{\"t\":\"b.safetensors\",\"u\":\"a.safetensors\",\"v\":\"b.safetensors\"}}", &c), MILLM_OK);
	assert_int_equal(c.n, 2);
	assert_string_equal(c.files[0]->path, "a.safetensors");
	assert_int_equal(c.total_bytes, 7);
	millm_choice_free(&c);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++)
	{
		assert_int_equal(shards(&r, wrong[i], &c), MILLM_E_MODEL_DOWNLOAD_FAILED);
		millm_choice_free(&c);
	}
	/* sizes whose sum does not fit */
	add(&r, "huge1.safetensors", INT64_MAX);
	add(&r, "huge2.safetensors", INT64_MAX);
	assert_int_equal(shards(&r, "{\"weight_map\":{\"t\":\"huge1.safetensors\",\"u\":\"huge2.safetensors\"}}", &c), MILLM_E_MODEL_DOWNLOAD_FAILED);
	millm_choice_free(&c);
	free(r.files);
}

static void
endpoints_and_tokens(void **state)
{
	static const char *const tokens[] = {"a b", "a\r\nX-Evil: 1", "\t", "a\177", "\303\251"};
	atomic_bool stop = false;
	MillmHttp  *h = NULL;
	MillmError	err;

	(void) state;
	assert_int_equal(millm_http_open("ftp://x", NULL, &stop, &h, NULL), MILLM_E_INVALID_ARGUMENT);
	for (size_t i = 0; i < sizeof(tokens) / sizeof(*tokens); i++)
	{
		assert_int_equal(millm_http_open("https://x", tokens[i], &stop, &h, &err), MILLM_E_INVALID_HF_TOKEN);
		assert_null(strstr(err.message, tokens[i]));
	}
	assert_int_equal(millm_http_open("https://x/", "hf_abc", &stop, &h, NULL), MILLM_OK);
	assert_string_equal(millm_http_endpoint(h), "https://x");
	assert_true(millm_http_has_token(h));
	millm_http_close(h);
	assert_int_equal(millm_http_open("https://x", "", &stop, &h, NULL), MILLM_OK);
	assert_false(millm_http_has_token(h));
	millm_http_close(h);
}

/* --- The store ---------------------------------------------------------------------------------------- */

static char cache[] = "/tmp/millm-test-XXXXXX";

static bool
is_there(const char *name)
{
	char		path[400];
	struct stat st;

	snprintf(path, sizeof(path), "%s/%s", cache, name);
	return lstat(path, &st) == 0;
}

static void
directories(void **state)
{
	static const char *const wrong[] = {"", "/x", "x/", "a//b", ".", "..", "../x", "a/..", "a/../b", ".trash/x", "a/.b"};
	MillmStore *s;
	bool		removed;

	(void) state;
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++)
	{
		assert_int_equal(millm_store_open(cache, wrong[i], UUID, NULL, NULL, &s, NULL), MILLM_E_INVALID_ARGUMENT);
		assert_int_equal(millm_store_trash(cache, wrong[i], UUID, &removed, NULL), MILLM_E_INVALID_ARGUMENT);
	}
	assert_int_equal(millm_store_open(cache, "h/m", "../../etc", NULL, NULL, &s, NULL), MILLM_E_INVALID_ARGUMENT);
	assert_int_equal(millm_store_trash(cache, "h/m", "../../etc", &removed, NULL), MILLM_E_INVALID_ARGUMENT);
	assert_false(is_there("h"));
	/* a link on the way is not followed */
	{
		char		link[400];

		snprintf(link, sizeof(link), "%s/h", cache);
		assert_int_equal(symlink("/tmp", link), 0);
		assert_int_equal(millm_store_open(cache, "h/m", UUID, NULL, NULL, &s, NULL), MILLM_E_MODEL_DOWNLOAD_FAILED);
		assert_int_equal(unlink(link), 0);
	}
}

static void
write_file(MillmStore *s, const char *name, const char *text)
{
	MillmSink  *sink = millm_store_sink(s);
	MillmHubFile f = {.size = (int64_t) strlen(text), .hash = SHA256};
	atomic_bool	stop = false;
	MillmHash	hash;
	int64_t		have;

	snprintf(f.path, sizeof(f.path), "%s", name);
	millm_hash_begin(&hash, f.hash, f.size);
	assert_int_equal(sink->begin(sink->arg, &f, &hash, &have, &stop, NULL), MILLM_OK);
	assert_int_equal(sink->discard(sink->arg, NULL), MILLM_OK);
	assert_int_equal(sink->write(sink->arg, text, strlen(text), NULL), MILLM_OK);
	assert_int_equal(sink->checkpoint(sink->arg, &hash, NULL), MILLM_OK);
	assert_false(is_there("h/m/a.json"));	/* no name before the proof */
	assert_int_equal(sink->finish(sink->arg, NULL), MILLM_OK);
}

/* A hash that was saved at any point and restored elsewhere ends as one that never stopped. */
static void
hash_state(void **state)
{
	static const unsigned char bytes[300] = {1, 2, 3, 250};
	char		text[MILLM_HASH_STATE], whole[MILLM_HASH_HEX], resumed[MILLM_HASH_HEX];

	(void) state;
	for (int kind = 0; kind < 2; kind++)
		for (size_t cut = 0; cut <= sizeof(bytes); cut++)
		{
			MillmHash	a, b;

			millm_hash_begin(&a, kind ? SHA256 : "", sizeof(bytes));
			b = a;
			millm_hash_update(&a, bytes, cut);
			millm_hash_save(&a, text);
			assert_true(millm_hash_restore(&b, text));
			millm_hash_update(&a, bytes + cut, sizeof(bytes) - cut);
			millm_hash_update(&b, bytes + cut, sizeof(bytes) - cut);
			millm_hash_hex(&a, whole);
			millm_hash_hex(&b, resumed);
			assert_string_equal(whole, resumed);
			/* not of the other kind, not cut off, not something else */
			millm_hash_begin(&b, kind ? "" : SHA256, sizeof(bytes));
			assert_false(millm_hash_restore(&b, text));
			millm_hash_begin(&b, kind ? SHA256 : "", sizeof(bytes));
			for (size_t n = 0; n + 1 < strlen(text); n++)
			{
				char		shorter[MILLM_HASH_STATE];

				snprintf(shorter, sizeof(shorter), "%.*s", (int) n, text);
				assert_false(millm_hash_restore(&b, shorter));
			}
			assert_false(millm_hash_restore(&b, "sha256 zz"));
		}
}

/* What was hashed beside is what was hashed. */
static void
hash_beside(void **state)
{
	static unsigned char bytes[70000];
	MillmHasher *hasher = millm_hasher_create();
	char		a[MILLM_HASH_HEX], b[MILLM_HASH_HEX];
	MillmHash	h, beside;

	(void) state;
	assert_non_null(hasher);
	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (unsigned char) (i * 7 >> 3);
	millm_hash_begin(&h, SHA256, sizeof(bytes));
	beside = h;
	for (size_t at = 0; at < sizeof(bytes); at += 700)
	{
		millm_hasher_start(hasher, &beside, bytes + at, 700);
		millm_hash_update(&h, bytes + at, 700);
		millm_hasher_wait(hasher);
	}
	millm_hash_hex(&h, a);
	millm_hash_hex(&beside, b);
	assert_string_equal(a, b);
	millm_hasher_free(hasher);
	millm_hasher_free(NULL);
}

/* --- The window ------------------------------------------------------------------------------------------ */

static unsigned char
byte_at(int64_t position)
{
	return (unsigned char) (position * 131 >> 4 ^ position);
}

/* A connection: claims pieces and fills them with what belongs there, in portions of every size. */
static void *
fill(void *arg)
{
	MillmWindow *w = arg;
	MillmPiece	piece;
	unsigned	n = 0;

	while (millm_window_claim(w, &piece))
		while (piece.at < piece.to)
		{
			unsigned char data[97];
			size_t		len = n++ % sizeof(data) + 1;

			if ((int64_t) len > piece.to - piece.at)
				len = (size_t) (piece.to - piece.at);
			for (size_t i = 0; i < len; i++)
				data[i] = byte_at(piece.at + (int64_t) i);
			if (!millm_window_fill(w, &piece, data, len))
				return NULL;
		}
	return NULL;
}

/* Every byte comes once and in its place, whatever the shapes: pieces larger than the window, one piece, pieces that do not divide it. */
static void
windows(void **state)
{
	static const struct {int64_t begin, end, piece; size_t bytes; int n;} cases[] = {
		{0, 1, 1, 1, 1}, {0, 1, 8, 100, 3}, {0, 100000, 1000, 8000, 4}, {5, 100000, 333, 1000, 4}, {7, 30000, 30000, 512, 1}, {0, 30000, 700, 512, 3},
		{1, 5000, 1, 3, 4}, {0, 64000, 64, 64, 2}, {((int64_t) 1 << 40) + 3, ((int64_t) 1 << 40) + 70000, 4096, 10000, 4},
	};
	const atomic_bool stop = false;

	(void) state;
	for (size_t k = 0; k < sizeof(cases) / sizeof(cases[0]); k++)
	{
		MillmWindow *w = millm_window_create(cases[k].begin, cases[k].end, cases[k].piece, cases[k].bytes);
		pthread_t	threads[4];
		int64_t		at = cases[k].begin;
		const void *data;
		size_t		n, largest = 0;

		for (int i = 0; i < cases[k].n; i++)
			assert_int_equal(pthread_create(&threads[i], NULL, fill, w), 0);
		while (at < cases[k].end)
		{
			assert_int_not_equal(n = millm_window_peek(w, &stop, &data), 0);
			largest = n > largest ? n : largest;
			n = n > 40 ? n - 7 : n;	/* not all of it */
			for (size_t i = 0; i < n; i++, at++)
				assert_int_equal(((const unsigned char *) data)[i], byte_at(at));
			millm_window_take(w, n);
		}
		assert_true(at == cases[k].end && largest <= cases[k].bytes);
		for (int i = 0; i < cases[k].n; i++)
			pthread_join(threads[i], NULL);
		millm_window_end(w);
		assert_int_equal(millm_window_peek(w, &stop, &data), 0);
		millm_window_free(w);
	}
	millm_window_free(NULL);
}

/* The end of a window wakes all who wait; what came before can still be read. */
static void
window_ends(void **state)
{
	MillmWindow *w = millm_window_create(0, 10000, 100, 300);
	const atomic_bool stop = true, go_on = false;
	pthread_t	threads[4];
	const void *data;
	size_t		n, all = 0;

	(void) state;
	for (int i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, fill, w), 0);
	assert_int_equal(millm_window_peek(w, &stop, &data), 0);
	while (all < 1000)
	{
		assert_int_not_equal(n = millm_window_peek(w, &go_on, &data), 0);
		millm_window_take(w, n);
		all += n;
	}
	assert_false(atomic_load(millm_window_ended(w)));
	millm_window_end(w);
	assert_true(atomic_load(millm_window_ended(w)));
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	for (; (n = millm_window_peek(w, &go_on, &data)) > 0; all += n)
		millm_window_take(w, n);
	assert_true(all <= 1000 + 300 + 300);	/* no more than there was room for */
	millm_window_free(w);
}

/* The third time that nothing has come ends the wait. */
typedef struct Idle
{
	MillmWindow *w;
	int			n;
} Idle;

static void
count_idle(void *arg)
{
	Idle	   *idle = arg;

	if (++idle->n == 3)
		millm_window_end(idle->w);
}

static void
window_tells_of_waiting(void **state)
{
	Idle		idle = {.w = millm_window_create(0, 10000, 100, 300)};
	const atomic_bool stop = false;
	const void *data;

	(void) state;
	millm_window_on_idle(idle.w, count_idle, &idle);
	assert_int_equal(millm_window_peek(idle.w, &stop, &data), 0);
	assert_int_equal(idle.n, 3);
	millm_window_free(idle.w);
}

static void
possession(void **state)
{
	static const char meta[] = "{\"uuid\": \"" UUID "\"}";
	MillmStore *s;
	bool		removed;

	(void) state;
	/* unfinished: known by its uuid, removed whole */
	assert_int_equal(millm_store_open(cache, "h/m", UUID, NULL, NULL, &s, NULL), MILLM_OK);
	write_file(s, "a.json", "{}");
	millm_store_close(s);
	millm_store_remove_unfinished(cache, "h/m", OTHER);
	assert_true(is_there("h/m/a.json"));
	assert_int_equal(millm_store_trash(cache, "h/m", OTHER, &removed, NULL), MILLM_OK);
	assert_false(removed);
	millm_store_remove_unfinished(cache, "h/m", UUID);
	assert_false(is_there("h/m"));
	/* finished: stays whatever a later attempt does, and another model may not have it */
	assert_int_equal(millm_store_open(cache, "h/m", UUID, NULL, NULL, &s, NULL), MILLM_OK);
	write_file(s, "a.json", "{}");
	assert_int_equal(millm_store_complete(s, meta, strlen(meta), NULL), MILLM_OK);
	millm_store_remove(s, NULL, 0);
	millm_store_close(s);
	assert_true(is_there("h/m/a.json"));
	assert_false(is_there("h/m/.partial-owner"));
	millm_store_remove_unfinished(cache, "h/m", UUID);
	assert_int_equal(millm_store_open(cache, "h/m", OTHER, NULL, NULL, &s, NULL), MILLM_E_MODEL_ALREADY_EXISTS);
	assert_int_equal(millm_store_open(cache, "h/m", UUID, NULL, NULL, &s, NULL), MILLM_OK);
	millm_store_remove(s, NULL, 0);
	millm_store_close(s);
	assert_true(is_there("h/m/a.json"));
	/* removed by its uuid; a second time there is nothing */
	assert_int_equal(millm_store_trash(cache, "h/m", OTHER, &removed, NULL), MILLM_OK);
	assert_false(removed);
	assert_int_equal(millm_store_trash(cache, "h/m", UUID, &removed, NULL), MILLM_OK);
	assert_true(removed);
	assert_false(is_there("h/m"));
	assert_false(is_there(".trash/" UUID));
	assert_int_equal(millm_store_trash(cache, "h/m", UUID, &removed, NULL), MILLM_OK);
	assert_false(removed);
}

static int
make_cache(void **state)
{
	(void) state;
	return mkdtemp(cache) ? 0 : -1;
}

static int
remove_cache(void **state)
{
	static const char *const dirs[] = {"h", ".trash", ""};
	char		path[400];

	(void) state;
	for (int i = 0; i < (int) (sizeof(dirs) / sizeof(dirs[0])); i++)
	{
		snprintf(path, sizeof(path), "%s/%s", cache, dirs[i]);
		rmdir(path);
	}
	return access(cache, F_OK) == 0 ? -1 : 0;
}

/* --- The breaker --------------------------------------------------------------------------------------- */

#define HUB		"http://hub"

static bool
may_ask(bool *is_probe, MillmError *err)
{
	int			wait_ms = -1;
	const MillmCode rc = millm_breaker_enter(HUB, is_probe, &wait_ms, err);

	assert_true(rc == MILLM_OK ? wait_ms == -1 : rc == MILLM_E_HUB_UNAVAILABLE && wait_ms > 0);
	return rc == MILLM_OK;
}

static bool
is_described_as(const char *prefix)
{
	char		text[64];

	millm_breaker_describe(text, sizeof(text));
	return strncmp(text, prefix, strlen(prefix)) == 0;
}

static void
circuit_breaker(void **state)
{
	MillmError	err;
	bool		is_probe, other;
	int			wait_ms = 0, again_ms = 0;

	(void) state;
	millm_breaker_set_first_ms(1000);
	/* failures count in a row only */
	for (int i = 0; i < 20; i++)
	{
		millm_breaker_report(HUB, i % 5 == 4 ? NULL : "no answer");
		assert_true(may_ask(&is_probe, NULL) && !is_probe);
	}
	assert_true(is_described_as("closed"));
	for (int i = 0; i < 5; i++)
	{
		assert_true(may_ask(&is_probe, NULL));
		millm_breaker_report(HUB, "no answer");
	}
	assert_false(may_ask(&is_probe, &err));
	assert_true(is_described_as("open until 20"));
	assert_true(strstr(err.detail, "no answer") && strstr(err.detail, "next try") && err.hint[0]);
	/* what had begun before changes nothing; another hub is another matter, and so is this one after it */
	millm_breaker_report(HUB, "late");
	assert_int_equal(millm_breaker_enter(HUB, &is_probe, &wait_ms, NULL), MILLM_E_HUB_UNAVAILABLE);
	assert_true(wait_ms > 0 && wait_ms <= 1100);
	usleep(1000 * (unsigned) wait_ms + 1000);
	/* one request tries; canceled, it leaves that to the next */
	assert_true(is_described_as("half-open"));
	assert_true(may_ask(&is_probe, NULL) && is_probe);
	assert_false(may_ask(&other, &err));
	assert_true(strstr(err.detail, "right now") != NULL);
	millm_breaker_leave(is_probe);
	assert_true(may_ask(&is_probe, NULL) && is_probe);
	/* it fails: for longer */
	millm_breaker_report(HUB, "no answer");
	millm_breaker_leave(is_probe);
	assert_int_equal(millm_breaker_enter(HUB, &other, &again_ms, NULL), MILLM_E_HUB_UNAVAILABLE);
	assert_true(again_ms > 1200 && again_ms <= 2200);
	usleep(1000 * (unsigned) again_ms + 1000);
	/* it succeeds: all may go on */
	assert_true(may_ask(&is_probe, NULL) && is_probe);
	millm_breaker_report(HUB, NULL);
	assert_true(is_described_as("closed"));
	assert_true(may_ask(&other, NULL) && !other);
	millm_breaker_leave(is_probe);
	/* and it begins anew: five, and the first time again */
	for (int i = 0; i < 5; i++)
		millm_breaker_report(HUB, "no answer");
	assert_int_equal(millm_breaker_enter(HUB, &other, &wait_ms, NULL), MILLM_E_HUB_UNAVAILABLE);
	assert_true(wait_ms <= 1100);
	assert_int_equal(millm_breaker_enter("http://elsewhere", &other, &wait_ms, NULL), MILLM_OK);
	assert_true(is_described_as("closed"));
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(repo_ids), cmocka_unit_test(revisions), cmocka_unit_test(url_encoding), cmocka_unit_test(infos), cmocka_unit_test(pages),
		cmocka_unit_test(too_many_files), cmocka_unit_test(small_files), cmocka_unit_test(indexes), cmocka_unit_test(endpoints_and_tokens),
		cmocka_unit_test(directories), cmocka_unit_test(hash_state), cmocka_unit_test(hash_beside), cmocka_unit_test(windows), cmocka_unit_test(window_ends), cmocka_unit_test(window_tells_of_waiting),
		cmocka_unit_test(possession), cmocka_unit_test(circuit_breaker),
	};

	return cmocka_run_group_tests(tests, make_cache, remove_cache);
}
