/*
 * load.c -- a model directory's tokenizer: its files, in the order in which they count, to a MillmTokenizer.
 *
 * bulk.c reads the vocabulary and the merges, jansson the rest.  Keys that no reader of tokenizer.json knows are ignored, as the
 * genuine library does; so are truncation and padding, which are for training.
 *
 * Of tokenizer_config.json: added_tokens_decoder and the named special tokens (the config wins over
 * tokenizer.json), add_bos_token and add_eos_token (when one is present they replace the post-processor, as in
 * transformers 5), and whether there is a chat template.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader.h"

#define MAX_FILE_BYTES (INT64_C(256) << 20)
#define MIN_IMAGE_BYTES (4 << 20)	/* of a tokenizer's files that are worth an image: smaller ones are read in some tens of ms */

static const char *const file_names[N_TOKENIZER_FILES] = {
	[FILE_TOKENIZER] = "tokenizer.json",
	[FILE_CONFIG] = "tokenizer_config.json",
	[FILE_MODEL] = "tokenizer.model",
	[FILE_VOCABULARY] = "vocab.json",
	[FILE_MERGES] = "merges.txt",
	[FILE_ADDED] = "added_tokens.json",
	[FILE_SPECIAL] = "special_tokens_map.json",
};

MillmCode
millm_load_out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

MillmCode
millm_load_invalid(Loader *l, const char *fmt,...)
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

MillmCode
millm_load_unsupported(Loader *l, const char *part, const char *name)
{
	return millm_fail(l->err, MILLM_E_UNSUPPORTED, "%s \"%.100s\" of tokenizer.json is not supported", part, name);
}

/* ---- reading JSON ---- */

json_t *
millm_load_get(const json_t *object, const char *key)
{
	json_t	   *v = json_object_get(object, key);

	return json_is_null(v) ? NULL : v;
}

MillmCode
millm_load_bool(Loader *l, const json_t *object, const char *key, bool otherwise, bool *out)
{
	json_t	   *v = millm_load_get(object, key);

	*out = v ? json_is_true(v) : otherwise;
	return !v || json_is_boolean(v) ? MILLM_OK : millm_load_invalid(l, "\"%s\" is not a boolean.", key);
}

MillmCode
millm_load_size(Loader *l, const json_t *object, const char *key, size_t *out)
{
	json_t	   *v = millm_load_get(object, key);

	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > 1000000)
		return millm_load_invalid(l, "\"%s\" is not a count.", key);
	*out = (size_t) json_integer_value(v);
	return MILLM_OK;
}

MillmCode
millm_load_text(Loader *l, const json_t *object, const char *key, bool required, char **out, size_t *n)
{
	json_t	   *v = millm_load_get(object, key);

	*out = NULL;
	*n = 0;
	if (!v && !required)
		return MILLM_OK;
	if (!json_is_string(v))
		return millm_load_invalid(l, "\"%s\" is not a string.", key);
	*n = json_string_length(v);
	*out = malloc(*n + 1);
	if (!*out)
		return millm_load_out_of_memory(l->err);
	memcpy(*out, json_string_value(v), *n + 1);
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
			return millm_load_out_of_memory(l->err);
		if (!millm_letters_to_bytes(content, n, tok->decoded.data + tok->decoded.n, &n))
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
		return millm_load_invalid(l, "Line %d, column %d: %s.", why.line, why.column, why.text);
	return json_is_object(*out) ? MILLM_OK : millm_load_invalid(l, "It is not a JSON object.");
}

MillmCode
millm_load_front(Loader *l, const json_t *json)
{
	MillmCode	rc = MILLM_OK;

	if (millm_load_get(json, "normalizer"))
		rc = millm_load_normalizer(l, millm_load_get(json, "normalizer"), 0);
	if (rc == MILLM_OK && millm_load_get(json, "pre_tokenizer"))
		rc = millm_load_pre_tokenizer(l, millm_load_get(json, "pre_tokenizer"), 0);
	return rc;
}

/* What an image needs of it beside tables. */
static MillmCode
keep_stages(Loader *l, const json_t *json)
{
	static const char *const names[] = {"normalizer", "pre_tokenizer", "decoder"};
	json_t	   *stages = json_object();
	bool		ok = stages != NULL;

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]) && ok; i++)
		if (millm_load_get(json, names[i]))
			ok = json_object_set(stages, names[i], millm_load_get(json, names[i])) == 0;
	if (ok)
		l->tok->stages = json_dumps(stages, JSON_COMPACT);
	json_decref(stages);
	return l->tok->stages ? MILLM_OK : millm_load_out_of_memory(l->err);
}

static MillmCode
load_tokenizer(Loader *l, const json_t *json)
{
	const char *version = json_string_value(millm_load_get(json, "version"));
	MillmCode	rc;

	if (version && strcmp(version, "1.0") != 0)
		return millm_load_unsupported(l, "version", version);
	if ((rc = millm_load_front(l, json)) == MILLM_OK)
		rc = millm_load_model(l, millm_load_get(json, "model"));
	if (rc == MILLM_OK)
		rc = millm_load_added_tokens(l, millm_load_get(json, "added_tokens"));
	if (rc == MILLM_OK && millm_load_get(json, "post_processor"))
		rc = millm_load_post_processor(l, millm_load_get(json, "post_processor"), 0);
	if (rc == MILLM_OK && millm_load_get(json, "decoder"))
		rc = millm_load_decoder(l, millm_load_get(json, "decoder"));
	return rc == MILLM_OK ? keep_stages(l, json) : rc;
}

MillmCode
millm_load_finish(Loader *l)
{
	MillmTokenizer *tok = l->tok;

	for (int i = 0; i < tok->n_ids; i++)
		if (tok->tokens[i].content.n > tok->longest)
			tok->longest = tok->tokens[i].content.n;
	return millm_load_sets(l);
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
		return millm_load_invalid(l, "\"added_tokens_decoder\" is not an object.");
	ids = calloc(json_object_size(object) + 1, sizeof(*ids));
	if (!ids)
		return millm_load_out_of_memory(l->err);
	json_object_foreach(object, key, value)
		ids[n++] = key;
	qsort(ids, n, sizeof(*ids), compare_ids);
	for (size_t i = 0; i < n && rc == MILLM_OK; i++)
	{
		char	   *end;
		long		id = strtol(ids[i], &end, 10);

		if (end == ids[i] || *end != '\0' || id < 0)
			rc = millm_load_invalid(l, "\"added_tokens_decoder\" has the id \"%.50s\".", ids[i]);
		else
			rc = millm_load_added_token(l, json_object_get(object, ids[i]), false, id);
	}
	free(ids);
	return rc;
}

/* A token that the config names as special: add it, if there is no added token of that content yet. */
static MillmCode
add_special_token(Loader *l, const json_t *token)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *content = json_is_string(token) ? (json_t *) token : millm_load_get(token, "content");
	int32_t		id;

	if (!json_is_string(content))
		return millm_load_invalid(l, "A special token is neither a string nor an object with \"content\".");
	id = millm_map_get(&tok->contents, json_string_value(content), json_string_length(content));
	if (id >= 0 && tok->tokens[id].added > 0)
		return MILLM_OK;
	return millm_load_added_token(l, token, true, -1);
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
		json_t	   *value = millm_load_get(config, names[k]);
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
	json_t	   *token = millm_load_get(config, name);
	json_t	   *content = json_is_string(token) ? token : millm_load_get(token, "content");

	return json_is_string(content) ?
		millm_map_get(&l->tok->contents, json_string_value(content), json_string_length(content)) : -1;
}

static MillmCode
load_config(Loader *l, const json_t *config)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *chat_template = millm_load_get(config, "chat_template");
	bool		add_bos;
	bool		add_eos;
	int32_t		bos;
	int32_t		eos;
	MillmCode	rc;

	if ((rc = load_config_tokens(l, millm_load_get(config, "added_tokens_decoder"))) != MILLM_OK ||
		(rc = load_special_tokens(l, config)) != MILLM_OK ||
		(rc = millm_load_bool(l, config, "add_bos_token", false, &add_bos)) != MILLM_OK ||
		(rc = millm_load_bool(l, config, "add_eos_token", false, &add_eos)) != MILLM_OK)
		return rc;
	tok->has_chat_template = json_string_length(chat_template) > 0 || json_array_size(chat_template) > 0;
	if (!millm_load_get(config, "add_bos_token") && !millm_load_get(config, "add_eos_token"))
		return MILLM_OK;
	bos = named_id(l, config, "bos_token");
	eos = named_id(l, config, "eos_token");
	tok->n_before = tok->n_after = 0;
	if (add_bos && bos >= 0)
		rc = millm_load_post_ids(l, &tok->before, &tok->n_before, &bos, 1, true);
	if (rc == MILLM_OK && add_eos && eos >= 0)
		rc = millm_load_post_ids(l, &tok->after, &tok->n_after, &eos, 1, false);
	return rc;
}

/*
 * The JSON of a file, NULL if there is none.  In a config no integer is read, but the "model_max_length" of many is 10^30, which
 * no integer can be.
 */
static MillmCode
parse_file(Loader *l, const FileBytes *files, TokenizerFile which, json_t **out)
{
	*out = NULL;
	if (!files[which].data)
		return MILLM_OK;
	l->file = file_names[which];
	return parse_json(l, files[which].data, files[which].n, which == FILE_CONFIG ? JSON_DECODE_INT_AS_REAL : 0, out);
}

/* tokenizer.json: its vocabulary and its merges into the bulk, the rest into *root. */
static MillmCode
read_tokenizer(Loader *l, FileBytes file, json_t **root)
{
	l->file = file_names[FILE_TOKENIZER];
	if (!millm_bulk_read(&l->bulk, file.data, file.n))
		return millm_load_out_of_memory(l->err);
	/* What is wrong with the rest is told from the whole file, for the line and the column. */
	*root = json_loadb(l->bulk.rest.data, l->bulk.rest.n, JSON_ALLOW_NUL, NULL);
	if (!*root)
		return parse_json(l, file.data, file.n, 0, root);
	return json_is_object(*root) ? MILLM_OK : millm_load_invalid(l, "It is not a JSON object.");
}

MillmCode
millm_tokenizer_parse_files(const FileBytes files[N_TOKENIZER_FILES], MillmTokenizer **out, MillmError *err)
{
	MillmTokenizer *tok = calloc(1, sizeof(*tok));
	Loader		l = {.tok = tok, .err = err, .max_added = -1};
	json_t	   *root = NULL;
	json_t	   *config = NULL;
	json_t	   *added = NULL;
	json_t	   *special = NULL;
	MillmCode	rc;

	if (!tok)
		return millm_load_out_of_memory(err);
	if ((rc = parse_file(&l, files, FILE_CONFIG, &config)) != MILLM_OK || (rc = parse_file(&l, files, FILE_ADDED, &added)) != MILLM_OK ||
		(rc = parse_file(&l, files, FILE_SPECIAL, &special)) != MILLM_OK)
		goto done;
	if (files[FILE_TOKENIZER].data)
		rc = read_tokenizer(&l, files[FILE_TOKENIZER], &root);
	else if (files[FILE_MODEL].data)
		rc = millm_legacy_sentencepiece(&l, files[FILE_MODEL].data, files[FILE_MODEL].n, config, &root);
	else
		rc = millm_legacy_pair(&l, files[FILE_VOCABULARY].data, files[FILE_VOCABULARY].n, files[FILE_MERGES].data, files[FILE_MERGES].n,
							   added, config, &root);
	if (rc != MILLM_OK || (rc = load_tokenizer(&l, root)) != MILLM_OK)
		goto done;
	l.file = file_names[FILE_CONFIG];
	if (config && (rc = load_config(&l, config)) != MILLM_OK)
		goto done;
	l.file = file_names[FILE_SPECIAL];
	if (special && (rc = load_special_tokens(&l, special)) != MILLM_OK)
		goto done;
	if ((rc = decode_tokens(&l)) != MILLM_OK || (rc = millm_load_finish(&l)) != MILLM_OK)
		goto done;
	*out = tok;
done:
	millm_bulk_free(&l.bulk);
	json_decref(root);
	json_decref(config);
	json_decref(added);
	json_decref(special);
	if (rc != MILLM_OK)
		millm_tokenizer_close(tok);
	return rc;
}

MillmCode
millm_tokenizer_parse(const char *json, size_t json_n, const char *config, size_t config_n,
					  MillmTokenizer **out, MillmError *err)
{
	return millm_tokenizer_parse_files((FileBytes[N_TOKENIZER_FILES]) {[FILE_TOKENIZER] = {json, json_n}, [FILE_CONFIG] = {config, config_n}},
									   out, err);
}

/* Map a file; MODEL_FILES_MISSING if there is none.  unmap() ends it. */
static MillmCode
map_file(const char *dir, const char *name, FileBytes *out, MillmError *err)
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
	*out = (FileBytes) {data, (size_t) st.st_size};
	return MILLM_OK;
}

static void
unmap(FileBytes file)
{
	if (file.n > 0)
		munmap((void *) file.data, file.n);
}

/* Map it if it is there. */
static MillmCode
map_optional(const char *dir, TokenizerFile which, FileBytes files[N_TOKENIZER_FILES], MillmError *err)
{
	MillmCode	rc = map_file(dir, file_names[which], &files[which], err);

	return rc == MILLM_E_MODEL_FILES_MISSING ? MILLM_OK : rc;
}

/* Map the files of the first form of tokenizer that dir has. */
static MillmCode
map_files(const char *dir, FileBytes files[N_TOKENIZER_FILES], MillmError *err)
{
	MillmCode	rc;

	if ((rc = map_optional(dir, FILE_TOKENIZER, files, err)) != MILLM_OK || (rc = map_optional(dir, FILE_CONFIG, files, err)) != MILLM_OK)
		return rc;
	if (files[FILE_TOKENIZER].data)
		return MILLM_OK;
	if ((rc = map_optional(dir, FILE_MODEL, files, err)) != MILLM_OK || (rc = map_optional(dir, FILE_SPECIAL, files, err)) != MILLM_OK)
		return rc;
	if (files[FILE_MODEL].data)
		return MILLM_OK;
	if ((rc = map_optional(dir, FILE_VOCABULARY, files, err)) != MILLM_OK || (rc = map_optional(dir, FILE_MERGES, files, err)) != MILLM_OK)
		return rc;
	if (files[FILE_VOCABULARY].data && files[FILE_MERGES].data)
		return map_optional(dir, FILE_ADDED, files, err);
	millm_fail(err, MILLM_E_MODEL_FILES_MISSING, "model directory \"%s\" has no tokenizer.json", dir);
	millm_detail(err, "It has no tokenizer.model either, nor vocab.json with merges.txt.");
	return MILLM_E_MODEL_FILES_MISSING;
}

/* The tokenizer of the image in dir, if that has one of these files; or NULL. */
static MillmTokenizer *
open_compiled(const char *dir, const FilesKey *key)
{
	FileBytes	image;
	MillmError	why;			/* that there is none */
	MillmTokenizer *tok;

	if (map_file(dir, IMAGE_NAME, &image, &why) != MILLM_OK)
		return NULL;
	tok = millm_image_open(image, key);
	if (tok)
		tok->image = image;
	else
		unmap(image);
	return tok;
}

/* From the image in dir, else from the files themselves. */
static MillmCode
open_files(const char *dir, const FileBytes files[N_TOKENIZER_FILES], MillmTokenizer **out, MillmError *err)
{
	size_t		n_bytes = 0;
	FilesKey	key;
	MillmCode	rc;

	for (int i = 0; i < N_TOKENIZER_FILES; i++)
		n_bytes += files[i].n;
	if (n_bytes < MIN_IMAGE_BYTES)
		return millm_tokenizer_parse_files(files, out, err);
	key = millm_files_key(files);
	if ((*out = open_compiled(dir, &key)) != NULL)
		return MILLM_OK;
	rc = millm_tokenizer_parse_files(files, out, err);
	if (rc == MILLM_OK)
	{
		(*out)->is_worth_image = true;
		(*out)->key = key;
	}
	return rc;
}

MillmCode
millm_tokenizer_open(const char *dir, MillmTokenizer **out, MillmError *err)
{
	FileBytes	files[N_TOKENIZER_FILES] = {0};
	char		path[4096];
	MillmCode	rc = map_files(dir, files, err);

	if (rc == MILLM_OK)
		rc = open_files(dir, files, out, err);
	for (int i = 0; i < N_TOKENIZER_FILES; i++)
		unmap(files[i]);
	if (rc != MILLM_OK)
		return rc;
	if ((size_t) snprintf(path, sizeof(path), "%s/chat_template.jinja", dir) < sizeof(path) && access(path, F_OK) == 0)
		(*out)->has_template_file = true;
	return MILLM_OK;
}

static bool
write_all(int fd, const char *data, size_t n)
{
	while (n > 0)
	{
		ssize_t		done = write(fd, data, n);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		data += done;
		n -= (size_t) done;
	}
	return true;
}

/* Under another name first: who opens the image has a whole one, or none. */
static MillmCode
write_image(const char *dir, const Bytes *image, MillmError *err)
{
	char		path[4096];
	char		partial[4096];
	int			fd;
	bool		ok;

	if ((size_t) snprintf(path, sizeof(path), "%s/%s", dir, IMAGE_NAME) >= sizeof(path) ||
		(size_t) snprintf(partial, sizeof(partial), "%s/.partial-%s", dir, IMAGE_NAME) >= sizeof(partial))
		return millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "path of \"%s\" is too long", IMAGE_NAME);
	(void) unlink(partial);		/* of somebody who was killed */
	fd = open(partial, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	ok = fd >= 0 && write_all(fd, image->data, image->n) && fsync(fd) == 0 && rename(partial, path) == 0;
	if (!ok)
		millm_fail(err, MILLM_E_MODEL_LOAD_FAILED, "could not write file \"%s\": %s", path, strerror(errno));
	if (fd >= 0)
	{
		close(fd);
		if (!ok)
			(void) unlink(partial);
	}
	return ok ? MILLM_OK : MILLM_E_MODEL_LOAD_FAILED;
}

MillmCode
millm_tokenizer_compile(const MillmTokenizer *tok, const char *dir, MillmError *err)
{
	Bytes		image = {0};
	MillmCode	rc = MILLM_OK;

	if (!tok->is_worth_image)
		return MILLM_OK;
	if (!millm_image_make(tok, &tok->key, &image))
		return millm_load_out_of_memory(err);
	if (image.n <= MAX_FILE_BYTES)	/* else nobody would open it */
		rc = write_image(dir, &image, err);
	millm_bytes_free(&image);
	return rc;
}

void
millm_tokenizer_close(MillmTokenizer *tok)
{
	if (!tok)
		return;
	if (tok->is_compiled)
		millm_image_forget(tok);
	unmap(tok->image);
	for (int i = 0; i < tok->n_normalizers; i++)
	{
		millm_pattern_free(&tok->normalizers[i].pattern);
		free(tok->normalizers[i].text);
		millm_charsmap_free(&tok->normalizers[i].charsmap);
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
	millm_lexicon_free(&tok->lexicon);
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
	free(tok->stages);
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
millm_tokenizer_is_compiled(const MillmTokenizer *tok)
{
	return tok->is_compiled;
}

bool
millm_tokenizer_has_chat_template(const MillmTokenizer *tok)
{
	return tok->has_chat_template || tok->has_template_file;
}
