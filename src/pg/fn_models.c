/*
 * fn_models.c -- models come and go: download(), register_local(), wait(), cancel(), retry(), delete().
 *
 * What changes the registry follows the transaction (transaction.h); cancel() acts at once.  Every rule is checked here, where the
 * change is made; the names of directories are chosen here and nowhere else.
 */
#include "postgres.h"

#include <sys/stat.h>
#include <sys/statvfs.h>

#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/wait_event.h"

#include "interval.h"
#include "json.h"
#include "ready.h"
#include "settings.h"
#include "shmem.h"
#include "transaction.h"

PG_FUNCTION_INFO_V1(millm_download);
PG_FUNCTION_INFO_V1(millm_register_local);
PG_FUNCTION_INFO_V1(millm_wait_id);
PG_FUNCTION_INFO_V1(millm_wait_name);
PG_FUNCTION_INFO_V1(millm_cancel_id);
PG_FUNCTION_INFO_V1(millm_cancel_name);
PG_FUNCTION_INFO_V1(millm_retry_id);
PG_FUNCTION_INFO_V1(millm_retry_name);
PG_FUNCTION_INFO_V1(millm_delete_id);
PG_FUNCTION_INFO_V1(millm_delete_name);

/* download() answers within 2 s: the hub's share, and the helper's on top of it. */
#define VALIDATE_MS			1500
#define VALIDATE_SLACK_MS	300
#define INSPECT_MS			30000
#define MAX_NAME_BYTES		200
#define MAX_PART_BYTES		96		/* of a repo id: the Hub's own limit */
#define LOOK_MS				1000

static const char *const revision_hint = "Use a branch, a tag or a commit of the repository.";
static const char *const path_hint = "Give the absolute path of an existing directory with config.json, the weights and tokenizer.json.";

static char *
required_text(FunctionCallInfo fcinfo, int arg, const char *name)
{
	if (PG_ARGISNULL(arg))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("%s must not be null", name), NULL, NULL);
	return text_to_cstring(PG_GETARG_TEXT_PP(arg));
}

/* --- What people write ------------------------------------------------------------------------------ */

/* In a repository's name and in a directory's, whatever the locale. */
static bool
is_name_char(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
}

/* One side of the slash: letters, digits, '.', '_', '-'; not at its ends, and not twice, '.' or '-'. */
static bool
valid_part(const char *s, size_t len)
{
	if (len == 0 || len > MAX_PART_BYTES || strchr(".-", s[0]) || strchr(".-", s[len - 1]))
		return false;
	for (size_t i = 0; i < len; i++)
	{
		if (!is_name_char(s[i]))
			return false;
		if (i > 0 && s[i] == s[i - 1] && strchr(".-", s[i]))
			return false;
	}
	return true;
}

/* Returns the part after the slash, or all of an old id without owner. */
static const char *
check_repo_id(const char *repo_id)
{
	const char *slash = strchr(repo_id, '/');
	const char *name = slash ? slash + 1 : repo_id;

	if ((slash && !valid_part(repo_id, slash - repo_id)) || !valid_part(name, strlen(name)))
		millm_refuse(MILLM_E_INVALID_REPO_ID, psprintf("invalid repository id \"%s\"", repo_id), NULL,
					 "Write it as on the Hub: owner/name, of letters, digits and single \".\", \"_\" or \"-\".");
	return name;
}

static void
check_name(const char *name)
{
	bool		control = false;

	for (const unsigned char *p = (const unsigned char *) name; *p; p++)
		control |= *p < ' ' || *p == 0x7F;
	if (name[0] == '\0' || strlen(name) > MAX_NAME_BYTES || control)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("invalid model name \"%s\"", name),
					 psprintf("A name has 1 to %d bytes and no control characters.", MAX_NAME_BYTES), NULL);
	if (strspn(name, "0123456789") == strlen(name))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("invalid model name \"%s\"", name), "A name that is a number would be taken for an id.",
					 "Give the model another name with name => '...'.");
}

static void
check_revision(const char *revision)
{
	for (const unsigned char *p = (const unsigned char *) revision; *p; p++)
		if (*p <= ' ' || *p == 0x7F || strchr("?#%\\", *p))
			millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("invalid revision \"%s\"", revision), NULL, revision_hint);
	if (revision[0] == '\0' || strlen(revision) >= MILLM_NAME_BYTES || strstr(revision, ".."))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("invalid revision \"%s\"", revision), NULL, revision_hint);
}

/* The token never appears in a message. */
static char *
optional_token(FunctionCallInfo fcinfo, int arg)
{
	char	   *token;

	if (PG_ARGISNULL(arg))
		return NULL;
	token = text_to_cstring(PG_GETARG_TEXT_PP(arg));
	for (const unsigned char *p = (const unsigned char *) token; *p; p++)
		if (*p <= ' ' || *p >= 0x7F)
			millm_refuse(MILLM_E_INVALID_HF_TOKEN, "hf_token has characters that no access token has", "It has blanks, control characters or other than ASCII.",
						 "Give the token alone, as the Hub shows it: hf_...");
	if (token[0] == '\0' || strlen(token) >= MILLM_TOKEN_BYTES)
		millm_refuse(MILLM_E_INVALID_HF_TOKEN, "hf_token is empty or too long", psprintf("At most %d bytes are accepted.", MILLM_TOKEN_BYTES - 1), NULL);
	return token;
}

/* --- Asking the hub --------------------------------------------------------------------------------- */

static void
append_field(StringInfo request, const char *name, const char *value)
{
	appendStringInfo(request, ",\"%s\":", name);
	millm_json_append_string(request, value, strlen(value));
}

/*
 * One question to millm-hub; false when it, or the Hub behind it, cannot be reached.  That error is caught without a subtransaction,
 * which is sound because between open and close nothing but a socket and memory is touched.
 */
static bool
ask_hub(const char *request, StringInfo reply)
{
	MillmClient *volatile client = NULL;
	MemoryContext caller = CurrentMemoryContext;
	volatile bool answered = false;

	PG_TRY();
	{
		client = millm_client_open(MILLM_HUB, request, VALIDATE_SLACK_MS);
		answered = millm_client_receive(client, reply, VALIDATE_MS + VALIDATE_SLACK_MS) == WIRE_RESULT;
		millm_client_close(client);
	}
	PG_CATCH();
	{
		const char *state = millm_code_sqlstate(MILLM_E_HUB_UNAVAILABLE);

		millm_client_close(client);
		if (geterrcode() != MAKE_SQLSTATE(state[0], state[1], state[2], state[3], state[4]))
			PG_RE_THROW();
		MemoryContextSwitchTo(caller);
		FlushErrorState();
	}
	PG_END_TRY();
	return answered;
}

/* What is known of a model before it is here. */
typedef struct Facts
{
	char	   *repo_id;
	char	   *model_type;
	char	   *architecture;
	char	   *license;
	char	   *config;			/* JSON */
	char	   *prequantized;	/* "nf4", "fp4" or "int8": how it is published; NULL: it is not quantized */
	char	   *converted_from;	/* "F32", which becomes converted_to; NULL: it is 16-bit */
	char	   *converted_to;
	int64		params;			/* < 0: unknown, as below */
	int64		disk_bytes;		/* as it will lie here */
} Facts;

static void
read_facts(StringInfo reply, Facts *facts)
{
	MillmJson	object = millm_json(reply->data, reply->len);
	MillmJson	config;

	facts->repo_id = millm_json_get_string(object, "repo_id");
	facts->model_type = millm_json_get_string(object, "model_type");
	facts->architecture = millm_json_get_string(object, "architecture");
	facts->license = millm_json_get_string(object, "license");
	facts->prequantized = millm_json_get_string(object, "prequantized");
	facts->converted_from = millm_json_get_string(object, "converted_from");
	facts->converted_to = millm_json_get_string(object, "converted_to");
	facts->config = millm_json_get(object, "config", &config) ? pnstrdup(config.at, config.end - config.at) : NULL;
	if (!millm_json_get_int(object, "params", &facts->params))
		facts->params = -1;
	if (!millm_json_get_int(object, "disk_bytes", &facts->disk_bytes))
		facts->disk_bytes = -1;
}

/*
 * What the weights will be when quantization was asked for.  Weights that are published quantized stay as they are, which FP16 means too;
 * from one quantization to the other there is no way.
 */
static const char *
effective_quantization(const char *source, const char *quantization, const Facts *facts)
{
	const char *published;

	if (!facts->prequantized)
		return quantization;
	published = strcmp(facts->prequantized, "int8") == 0 ? "Q8" : "Q4";
	if (strcmp(quantization, "FP16") != 0 && strcmp(quantization, published) != 0)
		millm_refuse(MILLM_E_UNSUPPORTED, psprintf("\"%s\" cannot become %s", source, quantization),
					 psprintf("Its weights are quantized already (%s, which is %s).", facts->prequantized, published),
					 psprintf("Use quantization => '%s' to take them as they are, or quantize the 16-bit original.", published));
	return published;
}

/* What becomes of the weights that was not asked for. */
static void
tell_changes(const char *source, const char *quantization, const Facts *facts)
{
	if (facts->prequantized)
		ereport(NOTICE, (errmsg("\"%s\" is quantized already (%s); it stays as it is: %s", source, facts->prequantized, quantization)));
	else if (facts->converted_from && facts->converted_to && strcmp(quantization, "FP16") == 0)
		ereport(NOTICE,
				(errmsg("\"%s\" is stored as %s; it becomes %s, half the size", source, facts->converted_from, facts->converted_to)));
	else if (facts->converted_from && facts->converted_to)
		ereport(NOTICE,
				(errmsg("\"%s\" is stored as %s; it becomes %s, then %s", source, facts->converted_from, facts->converted_to, quantization)));
}

/* --- Inserting -------------------------------------------------------------------------------------- */

static Datum
text_or_null(const char *value, char *null)
{
	*null = value ? ' ' : 'n';
	return value ? CStringGetTextDatum(value) : (Datum) 0;
}

static Datum
int_or_null(int64 value, char *null)
{
	*null = value >= 0 ? ' ' : 'n';
	return Int64GetDatum(value);
}

/* A name that somebody chose is one model's alone. */
static void
check_name_is_free(const char *name)
{
	MillmModel *m;
	MillmError	err;

	if (millm_models_find((MillmModelKey) {.name = pstrdup(name)}, &m, 1) == 0)
		return;
	millm_fail(&err, MILLM_E_MODEL_ALREADY_EXISTS, "model \"%s\" already exists", name);
	millm_detail(&err, "Its id is " INT64_FORMAT ".", m->id);
	millm_hint(&err, "Choose another name with name => '...', or delete that model first.");
	millm_ereport(ERROR, &err);
}

/* The same files are some row's already. */
static void
raise_exists(const char *source, const char *quantization, const char *directory)
{
	Oid			types[] = {TEXTOID, TEXTOID, TEXTOID};
	char		nulls[] = {directory ? ' ' : 'n', ' ', ' '};
	Datum		values[] = {directory ? CStringGetTextDatum(directory) : (Datum) 0, CStringGetTextDatum(source), CStringGetTextDatum(quantization)};
	MillmRegistry r;
	MillmError	err;

	millm_fail(&err, MILLM_E_MODEL_ALREADY_EXISTS, "\"%s\" is already registered as %s", source, quantization);
	millm_registry_begin(&r);
	if (millm_registry_execute("SELECT id::text, name FROM millm.registry WHERE directory = $1 OR (local_path = $2 AND quantization = $3)",
							   lengthof(types), types, values, nulls) > 0)
		millm_detail(&err, "It is model \"%s\" with id %s.", SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2),
					 SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1));
	millm_registry_end(&r);
	millm_hint(&err, "Use that model, or delete it first.");
	millm_ereport(ERROR, &err);
}

/* What a session must hold that adds or deletes these files. */
static void
lock_files(const char *directory, const char *local_path)
{
	millm_registry_lock(directory ? directory : local_path, ExclusiveLock);
}

/*
 * Insert a row; returns its id and, in *uuid, its uuid.  MODEL_ALREADY_EXISTS for files, or for a chosen name, that another row has;
 * MODEL_BUSY while another session adds or deletes them.
 *
 * With a directory its files are still to be made there, from facts->repo_id or from local_path.  Without one it lies at local_path.
 */
static int64
insert_model(const char *name, bool is_chosen, const char *source, const char *revision, const char *quantization, const char *directory,
			 const char *local_path, bool trust_remote_code, const Facts *facts, char **uuid)
{
	Oid			types[] = {TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, BOOLOID, INT8OID, TEXTOID, TEXTOID, TEXTOID,
	INT8OID, TEXTOID};
	char		nulls[lengthof(types)];
	Datum		values[] = {
		text_or_null(name, &nulls[0]), text_or_null(source, &nulls[1]), text_or_null(facts->repo_id, &nulls[2]),
		text_or_null(revision, &nulls[3]), text_or_null(quantization, &nulls[4]), text_or_null(directory, &nulls[5]),
		text_or_null(local_path, &nulls[6]), text_or_null(directory ? "pending" : "ready", &nulls[7]), BoolGetDatum(trust_remote_code),
		int_or_null(facts->params, &nulls[9]), text_or_null(facts->model_type, &nulls[10]), text_or_null(facts->architecture, &nulls[11]),
		text_or_null(facts->license, &nulls[12]), int_or_null(facts->disk_bytes, &nulls[13]), text_or_null(facts->config, &nulls[14]),
	};
	MillmRegistry r;
	int64		id = 0;
	bool		isnull;

	nulls[8] = ' ';
	millm_transaction_touch();
	lock_files(directory, local_path);
	millm_registry_lock(name, is_chosen ? ExclusiveLock : ShareLock);
	if (is_chosen)
		check_name_is_free(name);
	millm_registry_begin(&r);
	if (millm_registry_execute("INSERT INTO millm.registry (name, source, repo_id, revision, quantization, directory, local_path, status, "
							   "trust_remote_code, params, model_type, architecture, license, disk_bytes, config) "
							   "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15::json) "
							   "ON CONFLICT DO NOTHING RETURNING id, uuid::text", lengthof(types), types, values, nulls) == 1)
	{
		HeapTuple	row = SPI_tuptable->vals[0];

		id = DatumGetInt64(SPI_getbinval(row, SPI_tuptable->tupdesc, 1, &isnull));
		*uuid = MemoryContextStrdup(r.caller, SPI_getvalue(row, SPI_tuptable->tupdesc, 2));
	}
	millm_registry_end(&r);
	if (id == 0)
		raise_exists(local_path ? local_path : facts->repo_id, quantization, directory);
	return id;
}

/* --- download, register_local --------------------------------------------------------------------------- */

static void
check_cache(void)
{
	MillmError	err;
	char		problem[sizeof(millm_shared->cache_problem)];
	bool		owned;

	LWLockAcquire(millm_shared->lock, LW_SHARED);
	owned = millm_shared->cache_owned;
	strlcpy(problem, millm_shared->cache_problem, sizeof(problem));
	LWLockRelease(millm_shared->lock);
	if (owned || !problem[0])
		return;
	millm_fail(&err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the model cache cannot be written");
	millm_detail(&err, "%s.", problem);
	millm_hint(&err, "Give this server a directory of its own with millm.cache_dir.");
	millm_ereport(ERROR, &err);
}

/* Refuse at once what millm-hub would refuse later, when its turn comes; unknown sizes it finds out itself. */
static void
check_disk(const char *source, const char *quantization, int64 bytes)
{
	struct statvfs fs;
	int64		available;
	MillmError	err;

	if (bytes < 0 || statvfs(millm_shared->cache_dir, &fs) != 0)
		return;
	available = (int64) fs.f_bavail * (int64) fs.f_frsize;
	if (bytes <= available)
		return;
	millm_fail(&err, MILLM_E_INSUFFICIENT_DISK, "insufficient disk space for \"%s\" as %s", source, quantization);
	millm_detail(&err, "Need %.1f GB in the model cache, only %.1f GB available.", bytes / 1e9, available / 1e9);
	millm_hint(&err, "Free space or point millm.cache_dir at a larger file system.");
	millm_ereport(ERROR, &err);
}

/* "huggingface/owner--name--FP16" */
static char *
repo_directory(const char *repo_id, const char *quantization)
{
	const char *slash = strchr(repo_id, '/');

	return slash ? psprintf("huggingface/%.*s--%s--%s", (int) (slash - repo_id), repo_id, slash + 1, quantization)
		: psprintf("huggingface/%s--%s", repo_id, quantization);
}

/* "local/name--HASH--Q4": for people the name, for uniqueness the whole path's hash. */
static char *
local_directory(const char *path, const char *quantization)
{
	const char *last = last_dir_separator(path) + 1;
	uint64		hash = DatumGetUInt64(hash_any_extended((const unsigned char *) path, strlen(path), 0));
	StringInfoData buf;

	initStringInfo(&buf);
	appendStringInfoString(&buf, "local/");
	for (int i = 0; last[i] && i < MAX_PART_BYTES; i++)
		appendStringInfoChar(&buf, is_name_char(last[i]) && (i > 0 || last[i] != '.') ? last[i] : '_');
	appendStringInfo(&buf, "--%016llx--%s", (unsigned long long) hash, quantization);
	return buf.data;
}

/*
 * millm.download(repo_id, quantization, hf_token, trust_remote_code, name, revision) RETURNS bigint
 *
 * The Hub is asked whether there is such a model and we may have it.  When it does not answer in time, the download is queued
 * all the same and finds out by itself.
 */
Datum
millm_download(PG_FUNCTION_ARGS)
{
	char	   *repo_id;
	const char *quantization;
	char	   *token;
	bool		trust = !PG_ARGISNULL(3) && PG_GETARG_BOOL(3);
	char	   *name = PG_ARGISNULL(4) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(4));
	char	   *revision = PG_ARGISNULL(5) ? "main" : text_to_cstring(PG_GETARG_TEXT_PP(5));
	char	   *server_token = NULL;
	Facts		facts = {.params = -1, .disk_bytes = -1};
	ErrorContextCallback secret;
	StringInfoData buf;
	char	   *uuid;
	int64		id;

	millm_hide_statement(&secret, !PG_ARGISNULL(2));
	repo_id = required_text(fcinfo, 0, "repo_id");
	quantization = required_text(fcinfo, 1, "quantization");
	token = optional_token(fcinfo, 2);
	millm_check_ready();
	check_repo_id(repo_id);
	quantization = millm_canonical_quantization(quantization);
	check_revision(revision);
	if (name)
		check_name(name);
	check_cache();
	PreventCommandIfReadOnly("millm.download()");

	if (!token)
		server_token = millm_effective_token();
	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"validate\"");
	append_field(&buf, "endpoint", millm_effective_endpoint());
	append_field(&buf, "repo_id", repo_id);
	append_field(&buf, "revision", revision);
	append_field(&buf, "quantization", quantization);
	if (token || server_token)
		append_field(&buf, "token", token ? token : server_token);
	appendStringInfo(&buf, ",\"trust_remote_code\":%s,\"timeout_ms\":%d}", trust ? "true" : "false", VALIDATE_MS);
	if (ask_hub(pstrdup(buf.data), &buf))
		read_facts(&buf, &facts);
	else
		ereport(NOTICE, (errmsg("the Hub did not answer in time; the download is queued and will ask again")));
	if (facts.repo_id)
		check_repo_id(facts.repo_id);	/* it becomes a path */
	else
		facts.repo_id = repo_id;
	if (!name)
	{
		name = pstrdup(check_repo_id(facts.repo_id));
		check_name(name);
	}
	quantization = effective_quantization(facts.repo_id, quantization, &facts);
	check_disk(facts.repo_id, quantization, facts.disk_bytes);
	id = insert_model(name, !PG_ARGISNULL(4), "huggingface", revision, quantization, repo_directory(facts.repo_id, quantization), NULL, trust, &facts, &uuid);
	if (token)
		millm_transaction_token(uuid, token);
	tell_changes(facts.repo_id, quantization, &facts);
	error_context_stack = secret.previous;
	PG_RETURN_INT64(id);
}

/* One question to millm-hub about a directory of this machine. */
static void
ask_about_directory(const char *op, const char *path_field, const char *path, const char *quantization, StringInfo reply)
{
	initStringInfo(reply);
	appendStringInfo(reply, "{\"op\":\"%s\"", op);
	append_field(reply, path_field, path);
	if (quantization)
		append_field(reply, "quantization", quantization);
	appendStringInfoChar(reply, '}');
	millm_client_call(MILLM_HUB, reply->data, reply, INSPECT_MS);
}

/*
 * millm.register_local(path, quantization, name) RETURNS bigint
 *
 * FP16, and what is quantized already, is used where it lies.  For Q4 and Q8 the cache gets a copy, made as a download is: a pending row,
 * the queue, and the work after COMMIT.
 */
Datum
millm_register_local(PG_FUNCTION_ARGS)
{
	char	   *path = required_text(fcinfo, 0, "path");
	const char *quantization = required_text(fcinfo, 1, "quantization");
	char	   *name = PG_ARGISNULL(2) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(2));
	struct stat sb;
	Facts		facts;
	StringInfoData buf;
	char	   *directory = NULL;
	char	   *uuid;
	int64		id;

	millm_check_ready();
	if (!has_privs_of_role(GetUserId(), ROLE_PG_READ_SERVER_FILES))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("permission denied to register a model of the server's file system"),
				 errdetail("Only roles with privileges of the role \"pg_read_server_files\" may do that.")));
	quantization = millm_canonical_quantization(quantization);
	if (path[0] != '/')
		millm_refuse(MILLM_E_INVALID_LOCAL_PATH, psprintf("path \"%s\" is not absolute", path), NULL, path_hint);
	if (strlen(path) >= MILLM_PATH_BYTES)
		millm_refuse(MILLM_E_INVALID_LOCAL_PATH, "path is too long", psprintf("At most %d bytes are accepted.", MILLM_PATH_BYTES - 1), NULL);
	canonicalize_path(path);
	if (stat(path, &sb) != 0)
		millm_refuse(MILLM_E_INVALID_LOCAL_PATH, psprintf("could not access \"%s\": %m", path), NULL, path_hint);
	if (!S_ISDIR(sb.st_mode))
		millm_refuse(MILLM_E_INVALID_LOCAL_PATH, psprintf("\"%s\" is not a directory", path), NULL, path_hint);
	if (!name)
		name = pstrdup(last_dir_separator(path) + 1);
	check_name(name);
	PreventCommandIfReadOnly("millm.register_local()");

	ask_about_directory("inspect", "path", path, NULL, &buf);
	read_facts(&buf, &facts);
	facts.prequantized = millm_json_get_string(millm_json(buf.data, buf.len), "quantization");
	quantization = effective_quantization(path, quantization, &facts);
	if (!facts.prequantized && strcmp(quantization, "FP16") != 0)
	{
		check_cache();
		directory = local_directory(path, quantization);
		ask_about_directory("validate", "source_path", path, quantization, &buf);
		read_facts(&buf, &facts);
		check_disk(path, quantization, facts.disk_bytes);
	}
	id = insert_model(name, !PG_ARGISNULL(2), "local", NULL, quantization, directory, path, false, &facts, &uuid);
	tell_changes(path, quantization, &facts);
	PG_RETURN_INT64(id);
}

/* --- wait ------------------------------------------------------------------------------------------------ */

static void
refuse_uncommitted(const MillmModel *m, const char *verb)
{
	if (m->uncommitted)
		millm_refuse(MILLM_E_MODEL_NOT_READY, psprintf("cannot %s model \"%s\" in the transaction that has changed it", verb, m->name),
					 "The work on it starts when this transaction commits.",
					 "COMMIT first. psql -c runs all of its statements in one transaction; use one -c for each.");
}

/* Tell people who watch, at most once in LOOK_MS and only when there is something new. */
static void
report_progress(const MillmModel *m, const MillmJob *job, int *last_percent, TimestampTz *last_time)
{
	TimestampTz now = GetCurrentTimestamp();

	if (job->state != MILLM_JOB_RUNNING || job->total_bytes <= 0 || job->percent == *last_percent || now - *last_time < LOOK_MS * INT64CONST(1000))
		return;
	*last_percent = job->percent;
	*last_time = now;
	if (job->bytes_per_second >= 0)
		ereport(NOTICE, (errmsg("%s: %d %% of %.1f MB, %.1f MB/s", m->name, job->percent, job->total_bytes / 1e6, job->bytes_per_second / 1e6)));
	else
		ereport(NOTICE, (errmsg("%s: %d %% of %.1f MB", m->name, job->percent, job->total_bytes / 1e6)));
}

static Datum
ended(const MillmModel *m, bool ready, const char *code, const char *message)
{
	if (ready)
		return CStringGetTextDatum("ready");
	ereport(WARNING,
			(errmsg("%s of model \"%s\" has failed: %s", millm_model_work(m), m->name, message), errdetail("Error %s.", code),
			 errhint("Try again with millm.retry().")));
	return CStringGetTextDatum("error");
}

/*
 * millm.wait(model, timeout) RETURNS text; STRICT
 *
 * Waits on the model's job in shared memory.  A job that is not there (not seen by the clerk yet, or its place was needed) is
 * looked for in the registry as of now.
 */
static Datum
wait_for(MillmModelKey key, const Interval *timeout)
{
	MillmModel *m;
	TimestampTz deadline;
	TimestampTz last_time = 0;
	int			last_percent = -1;

	millm_check_ready();
	deadline = GetCurrentTimestamp() + millm_interval_ms(timeout) * INT64CONST(1000);
	m = millm_model_require(key);
	if (strcmp(m->status, "pending") == 0)
		refuse_uncommitted(m, "wait for");
	ConditionVariablePrepareToSleep(&millm_shared->changed);
	while (strcmp(m->status, "pending") == 0)
	{
		MillmJob	job;
		MillmJob   *found;
		bool		timed_out;
		int64		left_ms;

		LWLockAcquire(millm_shared->lock, LW_SHARED);
		found = millm_find_job(m->uuid);
		if (found)
			job = *found;
		LWLockRelease(millm_shared->lock);
		if (found && job.attempt >= m->attempt && job.state == MILLM_JOB_WRITTEN)
		{
			ConditionVariableCancelSleep();
			return ended(m, job.error.code == MILLM_OK, millm_code_name(job.error.code),
						 psprintf("%s%s%s", job.error.message, job.error.detail[0] ? ": " : "", job.error.detail));
		}
		if (found)
			report_progress(m, &job, &last_percent, &last_time);
		left_ms = (deadline - GetCurrentTimestamp()) / 1000;
		if (left_ms <= 0)
		{
			ConditionVariableCancelSleep();
			millm_refuse(MILLM_E_MODEL_NOT_READY, psprintf("model \"%s\" is not ready yet", m->name),
						 found ? psprintf("%d %% is done.", job.percent) : NULL, "The work goes on; wait again.");
		}
		timed_out = ConditionVariableTimedSleep(&millm_shared->changed, Min(left_ms, LOOK_MS), PG_WAIT_EXTENSION);
		if (!found && timed_out)
		{
			m = millm_model_require(millm_key_from_id(m->id));
			ConditionVariablePrepareToSleep(&millm_shared->changed);
		}
	}
	ConditionVariableCancelSleep();
	return ended(m, strcmp(m->status, "ready") == 0, m->error_code, m->error_message);
}

Datum
millm_wait_id(PG_FUNCTION_ARGS)
{
	return wait_for(millm_key_from_id(PG_GETARG_INT64(0)), PG_GETARG_INTERVAL_P(1));
}

Datum
millm_wait_name(PG_FUNCTION_ARGS)
{
	return wait_for(millm_key_from_name(PG_GETARG_TEXT_PP(0)), PG_GETARG_INTERVAL_P(1));
}

/* --- cancel, retry, delete ----------------------------------------------------------------------------------- */

/* millm.cancel(model) RETURNS void; STRICT.  The row's error CANCELED follows when the bytes have stopped. */
static void
cancel(MillmModelKey key)
{
	MillmModel *m;
	MillmJob   *job;
	bool		full = false;

	millm_check_ready();
	PreventCommandDuringRecovery("millm.cancel()");
	m = millm_model_require(key);
	refuse_uncommitted(m, "cancel");
	if (strcmp(m->status, "pending") != 0)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("there is no %s of model \"%s\" to cancel", millm_model_work(m), m->name),
					 psprintf("Its status is %s.", m->status), NULL);
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	job = millm_find_job(m->uuid);
	if (!job || job->attempt < m->attempt)
	{
		/* the clerk has not come to it: in its place, so that it finds the job there */
		job = millm_new_job(m->uuid);
		full = job == NULL;
		if (job)
		{
			job->model_id = m->id;
			job->attempt = m->attempt;
			strlcpy(job->directory, m->directory, sizeof(job->directory));
			if (!m->repo_id)
				strlcpy(job->source_path, m->local_path, sizeof(job->source_path));
			job->state = MILLM_JOB_QUEUED;
		}
	}
	if (job)
		job->canceled = true;
	LWLockRelease(millm_shared->lock);
	if (full)
		millm_refuse(MILLM_E_SERVER_BUSY, "too many downloads at once", psprintf("At most %d are possible.", MILLM_MAX_JOBS), NULL);
	millm_wake_supervisor();
}

Datum
millm_cancel_id(PG_FUNCTION_ARGS)
{
	cancel(millm_key_from_id(PG_GETARG_INT64(0)));
	PG_RETURN_VOID();
}

Datum
millm_cancel_name(PG_FUNCTION_ARGS)
{
	cancel(millm_key_from_name(PG_GETARG_TEXT_PP(0)));
	PG_RETURN_VOID();
}

/* millm.retry(model, hf_token) RETURNS void: of what has failed, and of what was ready here or elsewhere and whose files are gone. */
static void
retry(MillmModelKey key, FunctionCallInfo fcinfo)
{
	ErrorContextCallback secret;
	const char *token;
	MillmModel *m;
	MillmRegistry r;
	Oid			types[] = {UUIDOID, TEXTOID};
	Datum		values[lengthof(types)];
	bool		is_missing;
	uint64		n;

	millm_hide_statement(&secret, !PG_ARGISNULL(1));
	token = optional_token(fcinfo, 1);
	millm_check_ready();
	check_cache();
	m = millm_model_require(key);
	if (token && !m->repo_id)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("model \"%s\" needs no hf_token", m->name), "It is made from a directory of this server.", NULL);
	PreventCommandIfReadOnly("millm.retry()");
	lock_files(m->directory, m->local_path);
	millm_transaction_touch();
	is_missing = m->directory && strcmp(m->status, "ready") == 0 && millm_model_is_missing(m);
	values[0] = DirectFunctionCall1(uuid_in, CStringGetDatum(m->uuid));
	values[1] = CStringGetTextDatum(is_missing ? "ready" : "error");
	millm_registry_begin(&r);
	n = millm_registry_execute("UPDATE millm.registry SET status = 'pending', attempt = attempt + 1, error_code = NULL, error_message = NULL, "
							   "updated_at = pg_catalog.clock_timestamp() WHERE uuid = $1 AND status = $2", lengthof(types), types, values, NULL);
	millm_registry_end(&r);
	if (n == 0)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, psprintf("model \"%s\" has not failed", m->name), psprintf("Its status is %s.", m->status), NULL);
	if (token)
		millm_transaction_token(m->uuid, token);
	error_context_stack = secret.previous;
}

Datum
millm_retry_id(PG_FUNCTION_ARGS)
{
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	retry(millm_key_from_id(PG_GETARG_INT64(0)), fcinfo);
	PG_RETURN_VOID();
}

Datum
millm_retry_name(PG_FUNCTION_ARGS)
{
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	retry(millm_key_from_name(PG_GETARG_TEXT_PP(0)), fcinfo);
	PG_RETURN_VOID();
}

/*
 * millm.delete(model) RETURNS void; STRICT.  A download of it that is under way is canceled after COMMIT.  While another server has the
 * cache, the files are not ours to remove, now or later: it may know them too (a registry that was restored beside its original).
 */
static void
delete(MillmModelKey key)
{
	MillmModel *m;
	MillmRegistry r;
	Oid			types[] = {UUIDOID, BOOLOID};
	Datum		values[lengthof(types)];
	bool		keep;

	millm_check_ready();
	m = millm_model_require(key);
	PreventCommandIfReadOnly("millm.delete()");
	lock_files(m->directory, m->local_path);
	millm_transaction_delete(m->uuid, m->name);
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	keep = millm_shared->cache_is_anothers;
	LWLockRelease(millm_shared->lock);
	values[0] = DirectFunctionCall1(uuid_in, CStringGetDatum(m->uuid));
	values[1] = BoolGetDatum(keep);
	millm_registry_begin(&r);
	(void) millm_registry_execute("WITH gone AS (DELETE FROM millm.registry WHERE uuid = $1 RETURNING uuid, directory) "
								  "INSERT INTO millm.trash (uuid, directory) SELECT uuid, directory FROM gone WHERE directory IS NOT NULL AND NOT $2",
								  lengthof(types), types, values, NULL);
	millm_registry_end(&r);
	if (keep && m->directory)
		ereport(NOTICE, (errmsg("the files of model \"%s\" stay in the model cache, which another server uses", m->name)));
}

Datum
millm_delete_id(PG_FUNCTION_ARGS)
{
	delete(millm_key_from_id(PG_GETARG_INT64(0)));
	PG_RETURN_VOID();
}

Datum
millm_delete_name(PG_FUNCTION_ARGS)
{
	delete(millm_key_from_name(PG_GETARG_TEXT_PP(0)));
	PG_RETURN_VOID();
}
