/*
 * hub.c -- repositories: their ids, their info, their list of files, and the sentences for what the Hub refuses.
 */
#include "hub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_JSON_BYTES	(64u << 20)
#define MAX_PAGES		1000

/* --- Names ---------------------------------------------------------------------------------------- */

static bool
is_word(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* One part of an id; what is wrong with it, or NULL. */
static const char *
check_part(const char *s, size_t n)
{
	if (n == 0)
		return "neither the owner nor the name may be empty";
	if (n > 96)
		return "the owner and the name have at most 96 characters each";
	for (size_t i = 0; i < n; i++)
		if (!is_word(s[i]) && s[i] != '-' && s[i] != '.')
			return "only ASCII letters, digits, \"_\", \"-\" and \".\" are allowed";
	if (!is_word(s[0]) || !is_word(s[n - 1]))
		return "the owner and the name begin and end with a letter, a digit or \"_\"";
	return NULL;
}

MillmCode
millm_repo_id_check(const char *id, MillmError *err)
{
	const char *slash = strchr(id, '/');
	const char *why = NULL;
	size_t		n = strlen(id);

	if (slash && strchr(slash + 1, '/'))
		why = "it has at most one slash, as in owner/name";
	else if (strstr(id, "--") || strstr(id, ".."))
		why = "\"--\" and \"..\" are not allowed";
	else if (n >= 4 && strcmp(id + n - 4, ".git") == 0)
		why = "it does not end in \".git\"";
	else if (slash)
		why = check_part(id, (size_t) (slash - id));
	if (!why)
		why = slash ? check_part(slash + 1, strlen(slash + 1)) : check_part(id, n);
	if (!why)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INVALID_REPO_ID, "invalid repository id \"%.200s\"", id);
	millm_detail(err, "In a repository id, %s.", why);
	millm_hint(err, "Give it as on the Hub, like \"HuggingFaceTB/SmolLM2-135M-Instruct\".");
	return MILLM_E_INVALID_REPO_ID;
}

MillmCode
millm_revision_check(const char *revision, MillmError *err)
{
	size_t		n = strlen(revision);
	bool		good = n > 0 && n <= 200 && !strstr(revision, "..") && revision[0] != '/' && revision[0] != '-';

	for (size_t i = 0; good && i < n; i++)
		good = (unsigned char) revision[i] > 0x20 && (unsigned char) revision[i] < 0x7F && !strchr("\\^:?*[~", revision[i]);
	if (good)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid revision \"%.100s\"", revision);
	millm_hint(err, "Give a branch, a tag or a commit, like \"main\".");
	return MILLM_E_INVALID_ARGUMENT;
}

/* A file name from the Hub that may become one on our disk. */
static bool
is_safe_path(const char *path)
{
	size_t		n = strlen(path);

	if (n == 0 || n > MILLM_HUB_MAX_PATH || path[0] == '/' || strchr(path, '\\'))
		return false;
	for (const char *p = path; *p; p++)
		if ((unsigned char) *p < 0x20 || *p == 0x7F)
			return false;
	for (const char *p = path;;)
	{
		const char *slash = strchr(p, '/');
		size_t		len = slash ? (size_t) (slash - p) : strlen(p);

		if (len == 0 || (len == 1 && p[0] == '.') || (len == 2 && p[0] == '.' && p[1] == '.'))
			return false;
		if (!slash)
			return true;
		p = slash + 1;
	}
}

/* --- Errors --------------------------------------------------------------------------------------- */

/* Is the token valid?  1 yes, 0 no, -1 cannot tell. */
static int
token_is_valid(MillmHttp *http)
{
	MillmReply	reply;
	MillmRequest request = {.method = "GET", .url = "/api/whoami-v2", .range_start = -1, .timeout_ms = 5000};

	if (millm_http_do(http, &request, &reply, NULL) != MILLM_OK)
		return -1;
	return reply.status == 200 ? 1 : reply.status == 401 ? 0 : -1;
}

/* valid: what token_is_valid() said, when it was asked. */
static MillmCode
not_found(MillmHttp *http, const char *repo_id, int valid, MillmError *err)
{
	millm_fail(err, MILLM_E_REPO_NOT_FOUND, "repository \"%s\" was not found", repo_id);
	millm_detail(err, !millm_http_has_token(http) ? "It does not exist, or it is private." :
				 valid >= 0 ? "It does not exist, or this access token may not see it." :
				 "It does not exist, or this access token may not see it, or it is not valid: the Hub did not say.");
	millm_hint(err, millm_http_has_token(http) ? "Check the spelling and the token's permissions." : "Check the spelling; for a private repository give an access token (hf_token).");
	return MILLM_E_REPO_NOT_FOUND;
}

static MillmCode
bad_token(MillmError *err, const char *detail)
{
	millm_fail(err, MILLM_E_INVALID_HF_TOKEN, "the Hub does not accept the access token");
	millm_detail(err, "%s", detail);
	millm_hint(err, "It is the one given as hf_token, else millm.hf_token_file, millm.hf_token or HF_TOKEN. "
			   "Make a new one in the settings of your Hub account, with read permission.");
	return MILLM_E_INVALID_HF_TOKEN;
}

static MillmCode
gated(MillmHttp *http, const char *repo_id, int valid, const MillmReply *reply, MillmError *err)
{
	const char *token = !millm_http_has_token(http) ? "No access token was given." :
		valid > 0 ? "The access token is valid, but its account has no access." : "The Hub did not say whether the access token is valid.";

	millm_fail(err, MILLM_E_GATED_MODEL_NO_TOKEN, "access to repository \"%s\" is restricted", repo_id);
	if (reply->error_message[0])
		millm_detail(err, "%s The Hub answered %d: %s", token, reply->status, reply->error_message);
	else
		millm_detail(err, "%s", token);
	millm_hint(err, millm_http_has_token(http) ? "Ask for access at %s/%s, and try again when it is granted." :
			   "Ask for access at %s/%s, then give an access token (hf_token).", millm_http_endpoint(http), repo_id);
	return MILLM_E_GATED_MODEL_NO_TOKEN;
}

static bool
is_retryable_status(int status)
{
	return status == 408 || status == 429 || (status >= 500 && status <= 599);
}

MillmCode
millm_hub_error(MillmHttp *http, const char *repo_id, const char *what, const MillmReply *r, MillmError *err)
{
	/* a 403 is for an account that the Hub knows */
	int			valid = 1;
	MillmCode	code;

	if (r->foreign)
		goto failed;			/* a CDN's refusal says nothing about the repository */
	if (strcmp(r->error_code, "RevisionNotFound") == 0)
	{
		millm_fail(err, MILLM_E_REPO_NOT_FOUND, "repository \"%s\" has no such revision", repo_id);
		millm_hint(err, "Give the name of a branch or tag, or a commit of 40 digits; the usual one is \"main\".");
		return MILLM_E_REPO_NOT_FOUND;
	}
	if (strcmp(r->error_code, "EntryNotFound") == 0)
	{
		millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" has no file \"%s\"", repo_id, what);
		millm_hint(err, "It may have changed meanwhile: retry.");
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	if (strcmp(r->error_message, "Access to this resource is disabled.") == 0)
	{
		millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" is disabled by the Hub", repo_id);
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	if (strcmp(r->error_code, "GatedRepo") == 0)
	{
		if (r->status == 401 && millm_http_has_token(http) && (valid = token_is_valid(http)) == 0)
			return bad_token(err, "It is invalid or has expired.");
		return gated(http, repo_id, valid, r, err);
	}
	if (strcmp(r->error_code, "RepoNotFound") == 0)
		return not_found(http, repo_id, valid, err);
	if (r->status == 401)
	{
		if (millm_http_has_token(http) && (valid = token_is_valid(http)) == 0)
			return bad_token(err, "It is invalid or has expired.");
		return not_found(http, repo_id, valid, err);
	}
	if (r->status == 403)
		return bad_token(err, r->error_message[0] ? r->error_message : "It lacks a permission.");
	if (r->status == 400)
	{
		millm_fail(err, MILLM_E_INVALID_REPO_ID, "the Hub does not accept the repository id \"%s\"", repo_id);
		if (r->error_message[0])
			millm_detail(err, "%s", r->error_message);
		return MILLM_E_INVALID_REPO_ID;
	}
failed:
	code = is_retryable_status(r->status) ? MILLM_E_HUB_UNAVAILABLE : MILLM_E_MODEL_DOWNLOAD_FAILED;
	millm_fail(err, code, "the hub could not serve \"%s\" of repository \"%s\"", what, repo_id);
	millm_detail(err, "%s answered status %d%s%s%s%s.", r->foreign ? "Its file host" : "It", r->status, r->error_message[0] ? ": " : "", r->error_message,
				 r->request_id[0] ? ", request " : "", r->request_id);
	millm_hint(err, "Retry later.");
	return code;
}

/* --- JSON answers ----------------------------------------------------------------------------------- */

typedef struct Body
{
	char	   *data;
	size_t		len, max;
	bool		is_head;		/* what follows max bytes is not wanted */
	bool		too_large;
} Body;

static bool
take_body(void *arg, const char *data, size_t len, const MillmReply *reply)
{
	Body	   *b = arg;
	size_t		n = len < b->max - b->len ? len : b->max - b->len;
	char	   *grown = NULL;

	(void) reply;
	if ((n == len || b->is_head) && (grown = realloc(b->data, b->len + n + 1)))
	{
		b->data = grown;
		memcpy(b->data + b->len, data, n);
		b->len += n;
		b->data[b->len] = '\0';
	}
	b->too_large = !grown;
	return grown && n == len;
}

/* GET url with retries: at most max bytes, or, as head, the first max.  what is for messages. */
static MillmCode
get(MillmHttp *http, const char *repo_id, const char *url, const char *what, size_t max, bool is_head, MillmPatience patience,
	Body *body, MillmReply *reply, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	for (int attempt = 1;; attempt++)
	{
		MillmRequest request = {.method = "GET", .url = url, .range_start = is_head ? 0 : -1, .range_end = is_head ? (int64_t) max : 0,
			.timeout_ms = patience.timeout_ms, .outage_ms = patience.outage_ms, .take = take_body, .arg = body};
		bool		again;

		*body = (Body) {.max = max, .is_head = is_head};
		rc = millm_http_do(http, &request, reply, err);
		/* a file host's 403 is an expired signature: the next attempt gets a new one */
		again = rc == MILLM_OK ? is_retryable_status(reply->status) || (reply->foreign && reply->status == 403) : rc == MILLM_E_HUB_UNAVAILABLE && reply->retryable;
		if (!again || attempt >= patience.attempts)
			break;
		free(body->data);
		body->data = NULL;
		if ((rc = millm_http_pause(http, reply->retry_after > 0 ? 1000 * (reply->retry_after < 60 ? reply->retry_after : 60) : 300 << attempt, err)) != MILLM_OK)
			return rc;
	}
	if (rc == MILLM_OK && reply->status != 200 && !(is_head && reply->status == 206 && reply->range_start == 0))
		rc = millm_hub_error(http, repo_id, what, reply, err);
	if (rc == MILLM_OK && body->too_large)
	{
		rc = millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "\"%s\" of repository \"%s\" is too large", what, repo_id);
		millm_detail(err, "At most %zu bytes are read.", max);
	}
	if (rc != MILLM_OK)
	{
		free(body->data);
		body->data = NULL;
	}
	return rc;
}

static MillmCode
not_a_hub(const char *what, MillmError *err)
{
	millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the endpoint does not look like a HuggingFace Hub");
	millm_detail(err, "Its answer for %s makes no sense.", what);
	millm_hint(err, "Check millm.hf_endpoint, and whether a proxy or a log-in page stands in between.");
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

/* --- A repository ------------------------------------------------------------------------------------- */

void
millm_repo_free(MillmRepo *repo)
{
	if (!repo)
		return;
	free(repo->files);
	free(repo);
}

static int
by_path(const void *a, const void *b)
{
	return strcmp(((const MillmHubFile *) a)->path, ((const MillmHubFile *) b)->path);
}

const MillmHubFile *
millm_repo_find(const MillmRepo *repo, const char *path)
{
	MillmHubFile key;

	if (repo->n_files == 0 || strlen(path) > MILLM_HUB_MAX_PATH)
		return NULL;
	snprintf(key.path, sizeof(key.path), "%s", path);
	return bsearch(&key, repo->files, repo->n_files, sizeof(key), by_path);
}

static bool
is_hash(const char *s)
{
	size_t		n = s ? strlen(s) : 0;

	return (n == 40 || n == 64) && strspn(s, "0123456789abcdef") == n;
}

static const char *
text_of(json_t *object, const char *key)
{
	return json_string_value(json_object_get(object, key));
}

/* A text that is too long for any of these is nonsense, and a cut could leave half a character. */
static void
copy_short(char *dst, size_t size, json_t *value)
{
	if (json_string_length(value) < size)
		snprintf(dst, size, "%s", json_is_string(value) ? json_string_value(value) : "");
}

/* cardData.license, a string or a list; "other" goes with a name.  Else the tag that says the same. */
static void
read_license(MillmRepo *repo, json_t *info)
{
	json_t	   *card = json_object_get(info, "cardData"), *v = json_object_get(card, "license"), *tag;
	const char *s = json_string_value(json_is_array(v) ? json_array_get(v, 0) : v);
	size_t		i;

	if (s && strcmp(s, "other") == 0 && text_of(card, "license_name"))
		s = text_of(card, "license_name");
	if (!s)
		json_array_foreach(json_object_get(info, "tags"), i, tag)
			if (json_is_string(tag) && strncmp(json_string_value(tag), "license:", 8) == 0)
				s = json_string_value(tag) + 8;
	/* longer than any licence's name is nonsense, and a cut could leave half a character */
	if (s && strlen(s) < sizeof(repo->license))
		snprintf(repo->license, sizeof(repo->license), "%s", s);
}

MillmCode
millm_repo_read_info(MillmRepo *repo, const char *text, size_t len, MillmError *err)
{
	json_t	   *info = json_loadb(text, len, 0, NULL), *v;
	const char *id = text_of(info, "id"), *sha = text_of(info, "sha");
	MillmCode	rc = MILLM_OK;

	if (!id || millm_repo_id_check(id, NULL) != MILLM_OK || !is_hash(sha) || strlen(sha) != 40)
	{
		json_decref(info);
		return not_a_hub("the model's info", err);
	}
	snprintf(repo->id, sizeof(repo->id), "%s", id);
	snprintf(repo->commit, sizeof(repo->commit), "%s", sha);
	v = json_object_get(info, "gated");
	repo->gated = v && !json_is_false(v) && !json_is_null(v);
	read_license(repo, info);
	v = json_object_get(info, "config");
	copy_short(repo->model_type, sizeof(repo->model_type), json_object_get(v, "model_type"));
	copy_short(repo->architecture, sizeof(repo->architecture), json_array_get(json_object_get(v, "architectures"), 0));
	v = json_object_get(json_object_get(info, "safetensors"), "total");
	repo->params = json_is_integer(v) && json_integer_value(v) > 0 ? json_integer_value(v) : -1;
	v = json_object_get(json_object_get(json_object_get(info, "safetensors"), "parameters"), "F32");
	repo->f32_params = json_is_integer(v) && json_integer_value(v) > 0 ? json_integer_value(v) : 0;
	if (json_is_true(json_object_get(info, "disabled")))
		rc = millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" is disabled by the Hub", repo->id);
	json_decref(info);
	return rc;
}

/* One entry of the tree; false when it is no file that could be ours. */
static bool
read_entry(json_t *e, MillmHubFile *f)
{
	const char *type = text_of(e, "type"), *path = text_of(e, "path");
	json_t	   *size = json_object_get(e, "size"), *lfs = json_object_get(e, "lfs");
	/* beside "lfs", "oid" is the hash of git's pointer, not of the content */
	const char *hash = text_of(lfs ? lfs : e, "oid");

	if (!type || strcmp(type, "file") != 0 || !path || !is_safe_path(path) || !json_is_integer(size) || json_integer_value(size) < 0)
		return false;
	memset(f, 0, sizeof(*f));
	snprintf(f->path, sizeof(f->path), "%s", path);
	f->size = json_integer_value(size);
	if (is_hash(hash))
		snprintf(f->hash, sizeof(f->hash), "%s", hash);
	return true;
}

MillmCode
millm_repo_read_page(MillmRepo *repo, const char *text, size_t len, MillmError *err)
{
	json_t	   *page = json_loadb(text, len, 0, NULL), *e;
	size_t		i, n = json_array_size(page);
	MillmHubFile *grown;

	if (!json_is_array(page))
	{
		json_decref(page);
		return not_a_hub("the list of files", err);
	}
	if (n > MILLM_HUB_MAX_FILES - repo->n_files)
	{
		json_decref(page);
		millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "repository \"%s\" has too many files", repo->id);
		millm_detail(err, "More than %d.", MILLM_HUB_MAX_FILES);
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	grown = n > 0 ? realloc(repo->files, (repo->n_files + n) * sizeof(*grown)) : repo->files;
	if (n > 0 && !grown)
	{
		json_decref(page);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	repo->files = grown;
	json_array_foreach(page, i, e)
		if (read_entry(e, &repo->files[repo->n_files]))
			repo->n_files++;
	json_decref(page);
	if (repo->n_files > 0)
		qsort(repo->files, repo->n_files, sizeof(*repo->files), by_path);
	return MILLM_OK;
}

static MillmCode
get_info(MillmHttp *http, MillmRepo *repo, const char *revision, MillmPatience patience, MillmError *err)
{
	char	   *rev = millm_url_encode(revision, false), *url = NULL;
	MillmReply	reply;
	Body		body;
	MillmCode	rc;

	if (!rev || asprintf(&url, "/api/models/%s/revision/%s", repo->id, rev) < 0)
	{
		free(rev);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	rc = get(http, repo->id, url, "the model's info", MAX_JSON_BYTES, false, patience, &body, &reply, err);
	free(rev);
	free(url);
	if (rc == MILLM_OK)
	{
		rc = millm_repo_read_info(repo, body.data ? body.data : "", body.len, err);
		free(body.data);
	}
	else if (rc == MILLM_E_REPO_NOT_FOUND && strcmp(reply.error_code, "RevisionNotFound") == 0)
	{
		millm_fail(err, rc, "repository \"%s\" has no revision \"%s\"", repo->id, revision);
		millm_hint(err, "Give a branch, a tag or a full commit of the repository, like \"main\".");
	}
	return rc;
}

static MillmCode
get_tree(MillmHttp *http, MillmRepo *repo, MillmPatience patience, MillmError *err)
{
	char	   *url = NULL;
	MillmCode	rc = MILLM_OK;

	if (asprintf(&url, "/api/models/%s/tree/%s?recursive=true&expand=false", repo->id, repo->commit) < 0)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	for (int page = 0; rc == MILLM_OK && url; page++)
	{
		MillmReply	reply;
		Body		body;

		if (page == MAX_PAGES)
			rc = not_a_hub("the list of files", err);
		else
			rc = get(http, repo->id, url, "the list of files", MAX_JSON_BYTES, false, patience, &body, &reply, err);
		free(url);
		url = NULL;
		if (rc != MILLM_OK)
			break;
		rc = millm_repo_read_page(repo, body.data ? body.data : "", body.len, err);
		free(body.data);
		if (rc == MILLM_OK && reply.next[0] && !(url = strdup(reply.next)))
			rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	free(url);
	return rc;
}

MillmCode
millm_repo_open(MillmHttp *http, const char *repo_id, const char *revision, MillmPatience patience, MillmRepo **out, MillmError *err)
{
	MillmRepo  *repo;
	MillmCode	rc;

	if ((rc = millm_repo_id_check(repo_id, err)) != MILLM_OK || (rc = millm_revision_check(revision, err)) != MILLM_OK)
		return rc;
	repo = calloc(1, sizeof(*repo));
	if (!repo)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	snprintf(repo->id, sizeof(repo->id), "%s", repo_id);
	if ((rc = get_info(http, repo, revision, patience, err)) == MILLM_OK && (rc = get_tree(http, repo, patience, err)) == MILLM_OK)
		*out = repo;
	else
		millm_repo_free(repo);
	return rc;
}

MillmCode
millm_repo_read_head(MillmHttp *http, const MillmRepo *repo, const MillmHubFile *file, size_t n, MillmPatience patience, char **out, size_t *len,
					 MillmError *err)
{
	char	   *url = millm_resolve_url(repo, file->path);
	Body		body;
	MillmReply	reply;
	MillmCode	rc;

	if (!url)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	n = file->size < (int64_t) n ? (size_t) file->size : n;
	rc = get(http, repo->id, url, file->path, n, true, patience, &body, &reply, err);
	free(url);
	if (rc == MILLM_OK && (body.len < n || (reply.status == 206 && reply.range_total != file->size)))
	{
		free(body.data);
		rc = millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub sent another part of \"%s\" than it was asked for", file->path);
		millm_detail(err, "Asked for %zu bytes of %lld; it sent %zu.", n, (long long) file->size, body.len);
	}
	if (rc == MILLM_OK)
	{
		*out = body.data;
		*len = body.len;
	}
	return rc;
}

char *
millm_resolve_url(const MillmRepo *repo, const char *path)
{
	char	   *encoded = millm_url_encode(path, true), *url = NULL;

	if (encoded && asprintf(&url, "/%s/resolve/%s/%s", repo->id, repo->commit, encoded) < 0)
		url = NULL;
	free(encoded);
	return url;
}

MillmCode
millm_repo_read(MillmHttp *http, const MillmRepo *repo, const char *path, size_t max, MillmPatience patience, char **out, size_t *len, MillmError *err)
{
	char	   *url = millm_resolve_url(repo, path);
	Body		body;
	MillmReply	reply;
	MillmCode	rc;

	if (!url)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	rc = get(http, repo->id, url, path, max, false, patience, &body, &reply, err);
	free(url);
	if (rc == MILLM_OK && !body.data && !(body.data = strdup("")))
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	if (rc == MILLM_OK)
	{
		*out = body.data;
		*len = body.len;
	}
	return rc;
}
