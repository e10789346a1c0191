/*-------------------------------------------------------------------------
 * supervisor.c
 *	  The background worker that is the parent of the helpers and never connects to a database.
 *
 * It starts millm-engine and millm-hub and keeps them running; it carries out the one command (load, unload) and the one
 * active download, whose connections it owns, so that both go on when the session that asked for them is gone; it holds the
 * cache directory's lock.  It knows nothing of SQL: the clerk does.
 *
 *     command:  REQUESTED --> [unload the loaded model -->] load or unload --> DONE
 *     job:      QUEUED --> RUNNING --> DONE        (then the clerk's)
 *
 * Its loop sleeps on its latch, the helpers' pipes and its connections; nothing in it blocks.
 *-------------------------------------------------------------------------
 */
#include "workers.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/xlog.h"
#include "libpq/pqsignal.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "command.h"
#include "compat.h"
#include "helper.h"
#include "json.h"
#include "settings.h"
#include "shmem.h"

#define OPEN_TIMEOUT_MS 5000
#define CACHE_RETRY_MS	5000
#define LOOK_MS			50		/* while the engine, or the server, is only starting */
#define ENGINE_WAIT_MS	10000
#define MAX_TRIES		6		/* of a download whose hub cannot be reached, 1, 2, 4... s apart */
#define EVENT_MS		400		/* between two progress events of one thing */

static MillmChild children[2];
static int	cache_lock_fd = -1;
static TimestampTz cache_retry_at;

/* The connection that carries out the command, and what it is doing right now. */
static MillmClient *command_client;
static MillmClient *stop_client;	/* tells the engine to stop the load; NULL: nothing to tell */
static MillmCommandKind command_step;	/* a load begins with an unload when another model is there */
static MemoryContext command_context;
static TimestampTz command_begin_by;	/* until then a command waits for an engine that is starting; 0: none waits */

/* The connection of the active download. */
static MillmClient *job_client;
static MillmJob *job;
static MemoryContext job_context;
static TimestampTz job_event_at;
static TimestampTz next_job_at;	/* when a queued one may begin; 0: none waits for its time */

/* The connection that makes a canceled one end: the active download, or one that waits. */
static MillmClient *cancel_client;
static MillmJob *canceled;
static MemoryContext cancel_context;

static void
at_exit(int code, Datum arg)
{
	millm_shared->supervisor = NULL;
	for (int i = 0; i < 2; i++)
		millm_child_stop(&children[i]);
}

/* --- The cache directory ------------------------------------------------------------------------ */

static bool
make_directory(const char *path)
{
	return mkdir(path, S_IRWXU) == 0 || errno == EEXIST;
}

/* Make the directory and its parents; NULL, or what is wrong. */
static char *
make_cache(char *dir)
{
	static const char *const parts[] = {"", "/huggingface", "/.trash"};

	for (char *slash = strchr(dir + 1, '/'); slash; slash = strchr(slash + 1, '/'))
	{
		*slash = '\0';
		(void) make_directory(dir);
		*slash = '/';
	}
	for (int i = 0; i < (int) lengthof(parts); i++)
	{
		char	   *path = psprintf("%s%s", dir, parts[i]);

		if (!make_directory(path))
			return psprintf("could not create \"%s\": %m", path);
	}
	return NULL;
}

/* Open and lock <cache_dir>/.lock into cache_lock_fd; NULL, or what is wrong, or "" when it is too early to say.  Another server may have the lock. */
static char *
lock_cache(char *dir, bool *is_anothers)
{
	char	   *path = psprintf("%s/.lock", dir);
	char	   *problem;

	*is_anothers = false;
	if (strlen(dir) >= sizeof(millm_shared->cache_dir))
		return psprintf("its path is longer than %zu bytes", sizeof(millm_shared->cache_dir) - 1);
	if (!pg_encoding_verifymbstr(PG_UTF8, dir, strlen(dir)))
		return "its path is not UTF-8";
	if (path_is_prefix_of_path(DataDir, dir))
		return "it is inside the data directory, where base backups would copy it";
	if (RecoveryInProgress())
		return HotStandbyActive() ? "this server is a standby" : "";	/* or it is only starting */
	if ((problem = make_cache(dir)) != NULL)
		return problem;
	cache_lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR);
	if (cache_lock_fd < 0)
		return psprintf("could not open \"%s\": %m", path);
	if (flock(cache_lock_fd, LOCK_EX | LOCK_NB) == 0)
		return NULL;
	*is_anothers = errno == EWOULDBLOCK;
	problem = *is_anothers ? psprintf("another server uses \"%s\"", dir) : psprintf("could not lock \"%s\": %m", path);
	close(cache_lock_fd);
	cache_lock_fd = -1;
	return problem;
}

/* Become the cache's owner; without its lock this server never writes there, and asks again after a while. */
static void
own_cache(void)
{
	char	   *dir = millm_effective_cache_dir();
	bool		is_anothers;
	char	   *problem = lock_cache(dir, &is_anothers);
	bool		news;

	cache_retry_at = GetCurrentTimestamp() + (problem && !problem[0] ? LOOK_MS : CACHE_RETRY_MS) * INT64CONST(1000);
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	news = problem && problem[0] && strcmp(problem, millm_shared->cache_problem) != 0;
	strlcpy(millm_shared->cache_dir, dir, sizeof(millm_shared->cache_dir));
	strlcpy(millm_shared->cache_problem, problem ? problem : "", sizeof(millm_shared->cache_problem));
	millm_shared->cache_owned = problem == NULL;
	millm_shared->cache_is_anothers = is_anothers;
	LWLockRelease(millm_shared->lock);
	if (news)
		ereport(LOG, (errmsg("millm does not write to its model cache \"%s\": %s", dir, problem)));
	millm_wake_clerk();
}

/* The setting may name another directory now. */
static void
recheck_cache(void)
{
	if (cache_lock_fd >= 0 && strcmp(millm_effective_cache_dir(), millm_shared->cache_dir) == 0)
		return;
	if (cache_lock_fd >= 0)
		close(cache_lock_fd);
	cache_lock_fd = -1;
	own_cache();
}

/* --- Talking to a helper without ever leaving the loop by an error ------------------------------- */

/* Open a conversation in context; NULL and *err when it fails. */
static MillmClient *
try_open(MemoryContext context, MillmHelper helper, const char *request, MillmError *err)
{
	MemoryContext old = MemoryContextSwitchTo(context);
	MillmClient *volatile client = NULL;

	PG_TRY();
	{
		client = millm_client_open(helper, request, OPEN_TIMEOUT_MS);
	}
	PG_CATCH();
	{
		ErrorData  *e;

		MemoryContextSwitchTo(context);
		e = CopyErrorData();
		FlushErrorState();
		millm_fail(err, helper == MILLM_ENGINE ? MILLM_E_ENGINE_UNAVAILABLE : MILLM_E_HUB_UNAVAILABLE, "%s", e->message);
		if (e->detail)
			millm_detail(err, "%s", e->detail);
		if (e->hint)
			millm_hint(err, "%s", e->hint);
		FreeErrorData(e);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	return client;
}

static void
append_field(StringInfo buf, const char *name, const char *value)
{
	appendStringInfo(buf, "%s\"%s\":", buf->data[buf->len - 1] == '{' ? "" : ",", name);
	millm_json_append_string(buf, value, strlen(value));
}

/* --- The command: load and unload ----------------------------------------------------------------- */

/* With the lock held: what a look at that model shall say of its last load. */
static void
remember_failure(const MillmLoadedModel *model, const MillmError *error)
{
	if (error && error->code != MILLM_E_CANCELED)
	{
		millm_shared->failed = *model;
		millm_shared->failure = *error;
	}
	else if (strcmp(millm_shared->failed.uuid, model->uuid) == 0)
		millm_shared->failed.uuid[0] = '\0';
}

static void
command_done(const MillmError *error)
{
	MillmCommand *c = &millm_shared->command;

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	if (error)
		c->error = *error;
	else
		c->error.code = MILLM_OK;
	c->state = MILLM_COMMAND_DONE;
	command_begin_by = 0;
	if (c->kind == MILLM_LOAD)
		remember_failure(&c->model, error);
	if (error)
		millm_push_error_event(c->kind == MILLM_LOAD ? "load" : "unload", c->model.id, error);
	else if (c->kind == MILLM_LOAD)
		millm_push_event("{\"event\":\"model:load:complete\",\"model_id\":" INT64_FORMAT "}", c->model.id);
	LWLockRelease(millm_shared->lock);
	millm_client_close(command_client);
	command_client = NULL;
	millm_client_close(stop_client);
	stop_client = NULL;
	MemoryContextReset(command_context);
	millm_broadcast();
	millm_wake_clerk();
}

static void
begin_unload(void)
{
	MillmCommand *c = &millm_shared->command;
	int			timeout = c->kind == MILLM_UNLOAD && c->timeout_ms >= 0 ? c->timeout_ms : millm_unload_timeout;
	MillmError	err;

	command_step = MILLM_UNLOAD;
	command_client = try_open(command_context, MILLM_ENGINE, psprintf("{\"op\":\"unload\",\"timeout_ms\":%d}", timeout), &err);
	if (!command_client)
		command_done(&err);
}

static void
begin_load(void)
{
	MillmCommand *c = &millm_shared->command;
	bool		may_write = cache_lock_fd >= 0 && path_is_prefix_of_path(millm_shared->cache_dir, c->path);
	StringInfoData request;
	MillmError	err;

	initStringInfo(&request);
	appendStringInfoChar(&request, '{');
	append_field(&request, "op", "load");
	append_field(&request, "path", c->path);
	append_field(&request, "model", c->model.name);
	append_field(&request, "model_uuid", c->model.uuid);
	append_field(&request, "device", millm_device);
	append_field(&request, "kv_cache_dtype", millm_kv_cache_dtype());
	appendStringInfo(&request, ",\"threads\":%d,\"context_length\":%d,\"max_sequences\":%d,\"max_queue\":%d,\"kv_cache_bytes\":" INT64_FORMAT
					 ",\"stream_stall_timeout_ms\":%d,\"deterministic\":%s,\"prefix_cache\":%s,\"draft_tokens\":%d,\"may_write\":%s,\"force\":%s}",
					 millm_threads, millm_context_length, millm_max_sequences, millm_max_queue, (int64) millm_kv_cache_size << 20,
					 millm_stream_stall_timeout, millm_deterministic ? "true" : "false",
					 millm_prefix_cache ? "true" : "false", millm_draft_tokens, may_write ? "true" : "false", c->force ? "true" : "false");
	command_step = MILLM_LOAD;
	command_client = try_open(command_context, MILLM_ENGINE, request.data, &err);
	pfree(request.data);
	if (!command_client)
		command_done(&err);
}

static void
set_unloaded(void)
{
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	millm_shared->is_loaded = false;
	LWLockRelease(millm_shared->lock);
	millm_broadcast();
}

/* The command's model is loaded, as the engine's answer says. */
static void
set_loaded(MillmJson answer)
{
	int64		weights;
	int64		reserved;
	const char *device = millm_json_get_string(answer, "device");
	const char *fingerprint = millm_json_get_string(answer, "fingerprint");
	bool		known = millm_json_get_int(answer, "weights_bytes", &weights) && millm_json_get_int(answer, "private_bytes", &reserved);

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	millm_shared->is_loaded = true;
	millm_shared->loaded = millm_shared->command.model;
	strlcpy(millm_shared->loaded_path, millm_shared->command.path, sizeof(millm_shared->loaded_path));
	millm_shared->loaded_at = GetCurrentTimestamp();
	millm_shared->loaded_bytes = known ? weights + reserved : -1;
	strlcpy(millm_shared->loaded_device, device ? device : "", sizeof(millm_shared->loaded_device));
	strlcpy(millm_shared->loaded_fingerprint, fingerprint ? fingerprint : "", sizeof(millm_shared->loaded_fingerprint));
	LWLockRelease(millm_shared->lock);
	millm_broadcast();
}

/* Every string of an array, one a line. */
static void
copy_warnings(MillmJson array, char *dst, size_t size)
{
	MillmJson	element;
	StringInfoData buf;

	initStringInfo(&buf);
	while (millm_json_next(&array, &element))
	{
		if (buf.len)
			appendStringInfoChar(&buf, '\n');
		(void) millm_json_string(element, &buf);
	}
	millm_format(dst, size, "%s", buf.data);
	pfree(buf.data);
}

static void
load_canceled(void)
{
	MillmError	err;

	millm_fail(&err, MILLM_E_CANCELED, "the load of model \"%s\" was canceled", millm_shared->command.model.name);
	command_done(&err);
}

/* An engine that is only starting is waited for, not very long. */
static void
begin_command(void)
{
	MillmCommand *c = &millm_shared->command;
	MillmHelperStatus engine;
	MillmError	err;

	if (c->canceled)
	{
		load_canceled();
		return;
	}
	if (!children[MILLM_ENGINE].ready)
	{
		millm_helper_status(MILLM_ENGINE, &engine);
		if (command_begin_by == 0)
			command_begin_by = GetCurrentTimestamp() + ENGINE_WAIT_MS * INT64CONST(1000);
		if (engine.state != MILLM_HELPER_MISSING && GetCurrentTimestamp() < command_begin_by)
			return;
		millm_fail(&err, MILLM_E_ENGINE_UNAVAILABLE, "millm-engine is not available");
		if (engine.state == MILLM_HELPER_MISSING)
			millm_detail(&err, "The program is missing or cannot be executed.");
		else if (engine.last_exit[0])
			millm_detail(&err, "Its last run: %s", engine.last_exit);
		millm_hint(&err, engine.state == MILLM_HELPER_MISSING ? "Install millm's helper programs beside the extension's library."
				   : "The server log says why.");
		command_done(&err);
		return;
	}
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	c->state = MILLM_COMMAND_RUNNING;
	LWLockRelease(millm_shared->lock);
	if (c->kind == MILLM_UNLOAD || millm_shared->is_loaded)
		begin_unload();
	else
		begin_load();
}

/* An unload has ended: the command's, or the first half of a load. */
static void
unload_done(MillmJson answer)
{
	MillmCommand *c = &millm_shared->command;
	int64		freed;

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	c->pending = 0;
	if (c->kind == MILLM_UNLOAD && millm_json_get_int(answer, "freed_bytes", &freed))
	{
		c->freed_bytes = freed;
		strlcpy(c->freed_device, millm_shared->loaded_device, sizeof(c->freed_device));
	}
	if (millm_shared->is_loaded)
		millm_push_event("{\"event\":\"model:unload:complete\",\"model_id\":" INT64_FORMAT "}", millm_shared->loaded.id);
	LWLockRelease(millm_shared->lock);
	set_unloaded();
	if (c->kind == MILLM_UNLOAD)
		command_done(NULL);
	else if (c->canceled)
		load_canceled();
	else
		begin_load();
}

/* millm.unload() came while the load was under way. */
static void
stop_load(void)
{
	MillmError	err;

	stop_client = try_open(command_context, MILLM_ENGINE, "{\"op\":\"cancel_load\"}", &err);
	if (!stop_client)
		ereport(LOG, (errmsg("could not stop the load of model \"%s\": %s", millm_shared->command.model.name, err.message)));
}

static void
tend_command(void)
{
	MillmCommand *c = &millm_shared->command;
	StringInfoData payload;
	MillmError	err;
	int			kind;

	if (c->state == MILLM_COMMAND_REQUESTED)
		begin_command();
	if (!command_client)
		return;
	if (c->canceled && command_step == MILLM_LOAD && !stop_client)
		stop_load();
	initStringInfo(&payload);
	while (command_client && (kind = millm_client_poll(command_client, &payload, &err)) != 0)
	{
		MillmJson	object = millm_json(payload.data, payload.len);
		int64		n;
		MillmJson	warnings;
		char	   *stage;

		switch (kind)
		{
			case WIRE_PROGRESS:
				stage = millm_json_get_string(object, "stage");
				LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
				strlcpy(c->stage, stage ? stage : "", sizeof(c->stage));
				if (millm_json_get_int(object, "progress", &n))
				{
					if (command_step == MILLM_LOAD && (n / 25 != c->percent / 25))
						millm_push_event("{\"event\":\"model:load:progress\",\"model_id\":" INT64_FORMAT ",\"stage\":\"%s\",\"progress\":%d}",
										 c->model.id, c->stage, (int) n);
					c->percent = Max(c->percent, (int) n);
				}
				n = millm_json_get_int(object, "pending", &n) ? n : 0;
				if (n > 0 && n != c->pending)
					millm_push_event("{\"event\":\"model:unload:progress\",\"model_id\":" INT64_FORMAT ",\"pending\":" INT64_FORMAT "}",
									 millm_shared->loaded.id, n);
				c->pending = n;
				LWLockRelease(millm_shared->lock);
				millm_broadcast();
				millm_wake_clerk();
				break;
			case WIRE_RESULT:
				millm_client_close(command_client);
				command_client = NULL;
				if (command_step == MILLM_UNLOAD)
				{
					unload_done(object);
					break;
				}
				if (millm_json_get(object, "warnings", &warnings))
					copy_warnings(warnings, c->warnings, sizeof(c->warnings));
				set_loaded(object);
				if (c->canceled)
					begin_unload();	/* it was too late to stop it */
				else
					command_done(NULL);
				break;
			case WIRE_ERROR:
				millm_client_close(command_client);
				command_client = NULL;
				/* somebody else's unload came first */
				if (command_step == MILLM_UNLOAD && err.code == MILLM_E_MODEL_NOT_LOADED)
					unload_done(object);
				else
					command_done(&err);
				break;
			default:
				break;
		}
	}
	pfree(payload.data);
}

/* The engine is no more, and with it the model; a new one is started, and loads it again if the setting says so. */
static void
engine_ended(void)
{
	const MillmLoadedModel model = millm_shared->loaded;
	const bool	was_loaded = millm_shared->is_loaded;
	uint64		number;
	MillmError	err;

	set_unloaded();
	if (!was_loaded || !millm_reload_after_crash)
		return;
	/* an engine that dies while it loads has nothing loaded: it is not tried again and again */
	if (millm_command_load(&model, millm_shared->loaded_path, false, &number, &err) != MILLM_OK)
		ereport(LOG, (errmsg("could not load model \"%s\" again: %s", model.name, err.message)));
}

/* --- The download ----------------------------------------------------------------------------------- */

/* The job is nobody's now; if it was the active one, the next may begin. */
static void
leave_job(MillmJob *j)
{
	if (j == canceled)
	{
		millm_client_close(cancel_client);
		cancel_client = NULL;
		canceled = NULL;
		MemoryContextReset(cancel_context);
	}
	if (j == job)
	{
		millm_client_close(job_client);
		job_client = NULL;
		job = NULL;
		MemoryContextReset(job_context);
	}
	millm_broadcast();
}

static void
job_done(MillmJob *j, const MillmError *error)
{
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	if (error)
		j->error = *error;
	else
		j->error.code = MILLM_OK;
	j->state = MILLM_JOB_DONE;
	LWLockRelease(millm_shared->lock);
	leave_job(j);
	millm_wake_clerk();
}

static void
job_canceled(MillmJob *j)
{
	MillmError	err;

	millm_fail(&err, MILLM_E_CANCELED, "the %s was canceled", j->source_path[0] ? "quantization" : "download");
	millm_hint(&err, "Start it again with millm.retry().");
	job_done(j, &err);
}

/*
 * millm-hub died, or says that the Hub cannot be reached: what it has verified is kept, and a later try goes on from there, or
 * a cancel removes it.
 */
static void
job_failed(const MillmError *error)
{
	if (error->code != MILLM_E_HUB_UNAVAILABLE && job->canceled)
		job_canceled(job);
	else if (error->code != MILLM_E_HUB_UNAVAILABLE || (job->tries + 1 >= MAX_TRIES && !job->canceled))
		job_done(job, error);
	else
	{
		LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
		job->not_before = GetCurrentTimestamp() + (INT64CONST(1000000) << job->tries);
		job->tries++;
		job->state = MILLM_JOB_QUEUED;
		LWLockRelease(millm_shared->lock);
		ereport(LOG, (errmsg("\"%s\" is tried again: %s", job->directory, error->message)));
		leave_job(job);
	}
}

/* The token that came with this download, else the server's own.  palloc'd, or NULL. */
static char *
job_token(const char *uuid)
{
	char	   *token = NULL;

	LWLockAcquire(millm_shared->lock, LW_SHARED);
	for (int i = 0; i < MILLM_MAX_TOKENS; i++)
		if (strcmp(millm_shared->tokens[i].uuid, uuid) == 0)
			token = pstrdup(millm_shared->tokens[i].value);
	LWLockRelease(millm_shared->lock);
	return token ? token : millm_effective_token();
}

static void
begin_job(void)
{
	StringInfoData request;
	MillmError	err;
	char	   *token = NULL,
			   *endpoint = millm_effective_endpoint(),
			   *hf_cache_dir;

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	job->state = MILLM_JOB_RUNNING;
	LWLockRelease(millm_shared->lock);
	if (!millm_shared->cache_owned)
	{
		millm_fail(&err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the model cache cannot be written");
		millm_detail(&err, "%s.", millm_shared->cache_problem);
		millm_hint(&err, "Give this server a directory of its own with millm.cache_dir.");
		job_done(job, &err);
		return;
	}
	initStringInfo(&request);
	appendStringInfoChar(&request, '{');
	append_field(&request, "op", "download");
	if (job->source_path[0])
		append_field(&request, "source_path", job->source_path);
	else
	{
		append_field(&request, "endpoint", endpoint);
		append_field(&request, "repo_id", job->repo_id);
		append_field(&request, "revision", job->revision);
		appendStringInfo(&request, ",\"trust_remote_code\":%s", job->trust_remote_code ? "true" : "false");
		token = job_token(job->uuid);
		if ((hf_cache_dir = millm_effective_hf_cache_dir()) != NULL)
			append_field(&request, "hf_cache_dir", hf_cache_dir);
	}
	append_field(&request, "quantization", job->quantization);
	append_field(&request, "cache_dir", millm_shared->cache_dir);
	append_field(&request, "directory", job->directory);
	append_field(&request, "model_uuid", job->uuid);
	append_field(&request, "owner_id", job->owner);
	append_field(&request, "cluster", psprintf(UINT64_FORMAT, GetSystemIdentifier()));
	appendStringInfo(&request, ",\"model_id\":" INT64_FORMAT ",\"connections\":%d", job->model_id, millm_download_connections);
	if (token)
		append_field(&request, "token", token);
	appendStringInfoChar(&request, '}');
	job_client = try_open(job_context, MILLM_HUB, request.data, &err);
	explicit_bzero(request.data, request.len);
	pfree(request.data);
	if (token)
	{
		explicit_bzero(token, strlen(token));
		pfree(token);
	}
	pfree(endpoint);
	if (!job_client)
		job_failed(&err);
}

static void
copy_field(MillmJson object, const char *name, char *dst, size_t size)
{
	char	   *value = millm_json_get_string(object, name);

	strlcpy(dst, value ? value : "", size);
	if (value)
		pfree(value);
}

static void
job_progress(MillmJson object)
{
	int64		n;
	double		speed;
	TimestampTz now = GetCurrentTimestamp();

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	copy_field(object, "stage", job->stage, sizeof(job->stage));
	copy_field(object, "file", job->file, sizeof(job->file));
	if (millm_json_get_int(object, "total_bytes", &n))
		job->total_bytes = n;
	if (millm_json_get_int(object, "bytes", &n) && n > job->bytes)
		job->bytes = n;
	job->bytes_per_second = millm_json_get_double(object, "speed_bps", &speed) ? speed : -1;
	if (job->total_bytes > 0)
		job->percent = Max(job->percent, (int) Min(100, job->bytes * 100 / job->total_bytes));
	if (now >= job_event_at)
	{
		char		total[32] = "null";
		char		mbps[32] = "null";

		if (job->total_bytes > 0)
			snprintf(total, sizeof(total), INT64_FORMAT, job->total_bytes);
		if (job->bytes_per_second >= 0)
			snprintf(mbps, sizeof(mbps), "%.1f", job->bytes_per_second / 1e6);
		millm_push_event("{\"event\":\"model:download:progress\",\"model_id\":" INT64_FORMAT ",\"progress\":%d,\"bytes_downloaded\":" INT64_FORMAT
						 ",\"total_bytes\":%s,\"speed_mbps\":%s}", job->model_id, job->percent, job->bytes, total, mbps);
		job_event_at = now + EVENT_MS * INT64CONST(1000);
	}
	LWLockRelease(millm_shared->lock);
	millm_broadcast();
	millm_wake_clerk();
}

/* The oldest that may begin now; NULL: none.  *next_at, if there is one that may begin later. */
static MillmJob *
next_job(TimestampTz *next_at)
{
	MillmJob   *next = NULL;
	TimestampTz now = GetCurrentTimestamp();

	*next_at = 0;
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
	{
		MillmJob   *j = &millm_shared->jobs[i];

		if (j->state != MILLM_JOB_QUEUED || j->canceled)
			continue;
		if (j->not_before > now)
			*next_at = *next_at ? Min(*next_at, j->not_before) : j->not_before;
		else if (!next || j->model_id < next->model_id)
			next = j;
	}
	LWLockRelease(millm_shared->lock);
	return next;
}

/* The active job, or one that waits, if it is to end. */
static MillmJob *
next_canceled(void)
{
	MillmJob   *next = NULL;

	LWLockAcquire(millm_shared->lock, LW_SHARED);
	for (int i = 0; i < MILLM_MAX_JOBS && !next; i++)
	{
		MillmJob   *j = &millm_shared->jobs[i];

		if (j->canceled && (j->state == MILLM_JOB_QUEUED || (j == job && job_client)))
			next = j;
	}
	LWLockRelease(millm_shared->lock);
	return next;
}

/*
 * A second conversation, whose answer comes when the bytes have stopped and the files are gone: those too that an earlier attempt of
 * a waiting job has left.
 */
static void
begin_cancel(void)
{
	StringInfoData request;
	MillmError	err;

	initStringInfo(&request);
	appendStringInfoChar(&request, '{');
	append_field(&request, "op", canceled == job ? "cancel" : "remove");
	append_field(&request, "model_uuid", canceled->uuid);
	if (canceled != job)
	{
		append_field(&request, "cache_dir", millm_shared->cache_dir);
		append_field(&request, "directory", canceled->directory);
	}
	appendStringInfoChar(&request, '}');
	if (canceled != job && !millm_shared->cache_owned)
	{
		job_canceled(canceled);	/* what lies there is somebody else's */
		return;
	}
	cancel_client = try_open(cancel_context, MILLM_HUB, request.data, &err);
	if (cancel_client)
		return;
	ereport(LOG, (errmsg("could not cancel the work on \"%s\": %s", canceled->directory, err.message)));
	job_canceled(canceled);
}

static void
poll_cancel(void)
{
	StringInfoData payload;
	MillmError	err;
	int			kind;

	initStringInfo(&payload);
	kind = millm_client_poll(cancel_client, &payload, &err);
	if (kind == WIRE_RESULT || kind == WIRE_ERROR)
		job_canceled(canceled);
}

static void
poll_job(void)
{
	StringInfoData payload;
	MillmError	err;
	int			kind;

	initStringInfo(&payload);
	while (job_client && (kind = millm_client_poll(job_client, &payload, &err)) != 0)
	{
		MillmJson	object = millm_json(payload.data, payload.len);
		MillmJson	quantization;
		int64		n;

		if (kind == WIRE_PROGRESS)
			job_progress(object);
		else if (kind == WIRE_RESULT)
		{
			LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
			copy_field(object, "commit", job->commit, sizeof(job->commit));
			copy_field(object, "path", job->path, sizeof(job->path));
			copy_field(object, "model_type", job->model_type, sizeof(job->model_type));
			copy_field(object, "architecture", job->architecture, sizeof(job->architecture));
			copy_field(object, "license", job->license, sizeof(job->license));
			if (millm_json_get(object, "quantization", &quantization))
				copy_field(object, "quantization", job->quantization, sizeof(job->quantization));
			job->params = millm_json_get_int(object, "params", &n) ? n : -1;
			job->disk_bytes = millm_json_get_int(object, "disk_bytes", &n) ? n : -1;
			job->fetched_bytes = millm_json_get_int(object, "bytes", &n) ? n : 0;
			job->percent = 100;
			LWLockRelease(millm_shared->lock);
			job_done(job, NULL);
		}
		else if (kind == WIRE_ERROR)
			job_failed(&err);
	}
}

static void
tend_job(void)
{
	static bool was_ready;
	bool		hub_ready = children[MILLM_HUB].ready && (millm_shared->cache_owned || millm_shared->cache_problem[0]);

	/* the clerk may have looked too early to empty the trash */
	if (hub_ready && !was_ready)
	{
		LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
		millm_shared->clerk_must_look = true;
		LWLockRelease(millm_shared->lock);
		millm_wake_clerk();
	}
	was_ready = hub_ready;
	if (!canceled && hub_ready && (canceled = next_canceled()) != NULL)
		begin_cancel();
	if (!job && hub_ready && (job = next_job(&next_job_at)) != NULL)
		begin_job();
	if (job_client)
		poll_job();
	if (cancel_client)
		poll_cancel();
}

/* --- The loop ------------------------------------------------------------------------------------------ */

static long
smaller(long a, long b)
{
	return a < 0 ? b : b < 0 ? a : Min(a, b);
}

static long
milliseconds_until(TimestampTz time)
{
	return Max(0, (time - GetCurrentTimestamp()) / 1000) + 1;
}

static void
wait_for_something(void)
{
	WaitEventSet *set = millm_create_wait_events(10);
	WaitEvent	event;
	long		timeout = smaller(millm_child_timeout(&children[0]), millm_child_timeout(&children[1]));

	if (cache_lock_fd < 0)
		timeout = smaller(timeout, milliseconds_until(cache_retry_at));
	if (!job && next_job_at)
		timeout = smaller(timeout, milliseconds_until(next_job_at));
	if (command_begin_by)
		timeout = smaller(timeout, LOOK_MS);
	AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	for (int i = 0; i < 2; i++)
	{
		if (children[i].log_fd >= 0)
			AddWaitEventToSet(set, WL_SOCKET_READABLE, children[i].log_fd, NULL, NULL);
		if (children[i].control_fd >= 0)
			AddWaitEventToSet(set, WL_SOCKET_READABLE, children[i].control_fd, NULL, NULL);
	}
	if (command_client)
		AddWaitEventToSet(set, WL_SOCKET_READABLE, millm_client_socket(command_client), NULL, NULL);
	if (job_client)
		AddWaitEventToSet(set, WL_SOCKET_READABLE, millm_client_socket(job_client), NULL, NULL);
	if (cancel_client)
		AddWaitEventToSet(set, WL_SOCKET_READABLE, millm_client_socket(cancel_client), NULL, NULL);
	(void) WaitEventSetWait(set, timeout, &event, 1, PG_WAIT_EXTENSION);
	FreeWaitEventSet(set);
	ResetLatch(MyLatch);
}

void
millm_supervisor_main(Datum arg)
{
	MemoryContext turn_context;
	bool		reloaded = false;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();

	CurrentResourceOwner = ResourceOwnerCreate(NULL, "millm supervisor");
	command_context = AllocSetContextCreate(TopMemoryContext, "millm command", ALLOCSET_SMALL_SIZES);
	job_context = AllocSetContextCreate(TopMemoryContext, "millm download", ALLOCSET_SMALL_SIZES);
	cancel_context = AllocSetContextCreate(TopMemoryContext, "millm cancel", ALLOCSET_SMALL_SIZES);
	if (!make_directory(MILLM_RUN_DIR))
		ereport(FATAL, (errcode_for_file_access(), errmsg("could not create directory \"%s\": %m", MILLM_RUN_DIR)));
	millm_child_init(&children[0], MILLM_ENGINE);
	millm_child_init(&children[1], MILLM_HUB);

	/* what an earlier supervisor left unfinished */
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
		if (millm_shared->jobs[i].state == MILLM_JOB_RUNNING)
			millm_shared->jobs[i].state = MILLM_JOB_QUEUED;
	if (millm_shared->command.state == MILLM_COMMAND_REQUESTED || millm_shared->command.state == MILLM_COMMAND_RUNNING)
	{
		millm_fail(&millm_shared->command.error, MILLM_E_ENGINE_UNAVAILABLE, "millm's supervisor was restarted");
		millm_shared->command.state = MILLM_COMMAND_DONE;
	}
	millm_shared->is_loaded = false;
	millm_shared->cache_owned = false;
	millm_shared->supervisor = MyLatch;
	LWLockRelease(millm_shared->lock);
	before_shmem_exit(at_exit, (Datum) 0);
	millm_broadcast();

	/* what a turn allocates is gone after it; what must stay has a context of its own */
	turn_context = AllocSetContextCreate(TopMemoryContext, "millm supervisor's turn", ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(turn_context);
	while (!ShutdownRequestPending)
	{
		MemoryContextReset(turn_context);
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			reloaded = true;
		}
		/* a download stays where it has begun */
		if (reloaded && !job && !canceled)
		{
			reloaded = false;
			recheck_cache();
		}
		if (cache_lock_fd < 0 && GetCurrentTimestamp() >= cache_retry_at)
			own_cache();
		(void) millm_child_tend(&children[MILLM_HUB]);
		if (millm_child_tend(&children[MILLM_ENGINE]))
			engine_ended();
		tend_command();
		tend_job();
		wait_for_something();
	}
	/* not 0: when somebody but the postmaster has stopped us, it shall start us again */
	proc_exit(1);
}
