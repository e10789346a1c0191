/*-------------------------------------------------------------------------
 * clerk.c
 *	  The background worker that is connected to millm.database: registry and NOTIFY.
 *
 *     pending row --> job QUEUED          (the supervisor downloads)
 *     job DONE    --> row ready or error  --> event --> job WRITTEN
 *     trash row   --> files removed       --> row removed
 *
 * It is woken by commits and by the supervisor, and looks by itself every SCAN_MS.  Each of its steps is a transaction of its own whose
 * error is logged and which the next round repeats; nobody's lock holds it longer than lock_timeout.  When the database goes away
 * so does this process; the next one looks for the database in the shared catalog before it connects.  While the extension
 * is missing, or the server is a standby, it waits.
 *
 * Holds no lock while it talks to millm-hub, and no transaction.
 *-------------------------------------------------------------------------
 */
#include "workers.h"

#include <sys/stat.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/async.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "executor/spi.h"
#include "libpq/pqsignal.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/uuid.h"

#include "command.h"
#include "json.h"
#include "registry.h"
#include "settings.h"
#include "shmem.h"

#define SCAN_MS			3000
#define RETRY_MS		100			/* after a step that failed, for somebody's lock or worse; doubles up to: */
#define MAX_DELAY_MS	30000
#define NO_DATABASE_MS	1000
#define REMOVE_MS		30000		/* how long millm-hub may take to remove a directory's files */
#define MAX_CONFIG_BYTES (1 << 20)

static MemoryContext step_context;
static Oid	extension;			/* whose registry we serve; InvalidOid: there is none */

/* --- A step: one transaction, whose error stays here ----------------------------------------------------- */

typedef void (*Step) (void *arg);

static bool
run_step(Step step, void *arg)
{
	volatile bool good = false;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PG_TRY();
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		SPI_connect();
		step(arg);
		SPI_finish();
		PopActiveSnapshot();
		CommitTransactionCommand();
		good = true;
	}
	PG_CATCH();
	{
		HOLD_INTERRUPTS();
		/* a lock that somebody holds is nothing to write home about */
		if (geterrcode() != ERRCODE_LOCK_NOT_AVAILABLE)
			EmitErrorReport();
		FlushErrorState();
		AbortCurrentTransaction();
		RESUME_INTERRUPTS();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(step_context);
	return good;
}

static uint64
execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls)
{
	int			rc = SPI_execute_with_args(sql, nargs, types, values, nulls, false, 0);

	if (rc < 0)
		elog(ERROR, "could not execute \"%s\": %s", sql, SPI_result_code_string(rc));
	return SPI_processed;
}

/* A column of row i of the last result, palloc'd in step_context; NULL for null. */
static char *
result(uint64 i, int column)
{
	char	   *value = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, column);

	return value ? MemoryContextStrdup(step_context, value) : NULL;
}

/* The same into dst[size]; "" for null. */
static void
copy_result(char *dst, uint64 i, int column, size_t size)
{
	char	   *value = result(i, column);

	strlcpy(dst, value ? value : "", size);
}

static Datum
uuid_datum(const char *uuid)
{
	return DirectFunctionCall1(uuid_in, CStringGetDatum(uuid));
}

/* --- Is there anything to do here? -------------------------------------------------------------------------- */

static void
look_for_extension(void *found)
{
	Oid			namespace = get_namespace_oid("millm", true);

	*(Oid *) found = OidIsValid(namespace) && OidIsValid(get_relname_relid("registry", namespace)) ? get_extension_oid("millm", true) : InvalidOid;
}

static void
unload_dropped(void)
{
	uint64		number;
	MillmError	err;

	if (millm_command_unload(-1, &number, &err) != MILLM_OK && err.code != MILLM_E_MODEL_NOT_LOADED)
		ereport(LOG, (errmsg("could not unload the model of the dropped extension: %s", err.message)));
}

/* The extension was dropped: its downloads end and its model leaves the engine; files stay. */
static void
abandon(void)
{
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
	{
		MillmJob   *job = &millm_shared->jobs[i];

		if (job->state == MILLM_JOB_QUEUED || job->state == MILLM_JOB_RUNNING)
			job->canceled = true;
		else
			job->state = MILLM_JOB_FREE;
	}
	explicit_bzero(millm_shared->tokens, sizeof(millm_shared->tokens));
	LWLockRelease(millm_shared->lock);
	millm_wake_supervisor();
	unload_dropped();
}

typedef struct Known
{
	char		uuid[37];
	bool		is_known;
} Known;

static void
look_for_model(void *arg)
{
	Known	   *known = arg;
	Oid			type = UUIDOID;
	Datum		value = uuid_datum(known->uuid);

	known->is_known = execute("SELECT FROM millm.registry WHERE uuid = $1", 1, &type, &value, NULL) > 0;
}

/*
 * The extension was dropped and there is another one, whose first model may be in the engine already, or on its way: only one that the new
 * registry does not know leaves it.  Downloads of the old one are hand_over()'s.  False: the registry could not be read.
 */
static bool
abandon_unknown(void)
{
	const MillmCommand *c = &millm_shared->command;
	Known		known = {.uuid = ""};

	LWLockAcquire(millm_shared->lock, LW_SHARED);
	if (c->kind == MILLM_LOAD && millm_model_in_engine(c->model.uuid))
		strlcpy(known.uuid, c->model.uuid, sizeof(known.uuid));
	else if (millm_shared->is_loaded)
		strlcpy(known.uuid, millm_shared->loaded.uuid, sizeof(known.uuid));
	LWLockRelease(millm_shared->lock);
	if (!known.uuid[0])
		return true;
	if (!run_step(look_for_model, &known))
		return false;
	if (!known.is_known)
		unload_dropped();
	return true;
}

/* --- From the registry to jobs ---------------------------------------------------------------------------------- */

static void
read_owner(void *owner)
{
	if (execute("SELECT id::text FROM millm.owner", 0, NULL, NULL, NULL) == 0)
		(void) execute("INSERT INTO millm.owner (id) VALUES (pg_catalog.gen_random_uuid()) RETURNING id::text", 0, NULL, NULL, NULL);
	strlcpy(owner, result(0, 1), sizeof(((MillmJob *) NULL)->owner));
}

typedef struct Pending
{
	uint64		n;
	MillmJob   *jobs;			/* in step_context */
} Pending;

/* Every pending row but those whose directory still has the files of a deleted model. */
static void
read_pending(void *arg)
{
	Pending    *pending = arg;

	pending->n = execute("SELECT id, uuid::text, attempt, repo_id, revision, quantization, directory, trust_remote_code, "
						 "CASE source WHEN 'local' THEN local_path END FROM millm.registry r "
						 "WHERE status = 'pending' AND NOT EXISTS (SELECT FROM millm.trash t WHERE t.directory = r.directory) ORDER BY id",
						 0, NULL, NULL, NULL);
	pending->jobs = MemoryContextAllocExtended(step_context, (pending->n + 1) * sizeof(MillmJob), MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
	for (uint64 i = 0; i < pending->n; i++)
	{
		MillmJob   *job = &pending->jobs[i];
		HeapTuple	row = SPI_tuptable->vals[i];
		bool		isnull;

		job->model_id = DatumGetInt64(SPI_getbinval(row, SPI_tuptable->tupdesc, 1, &isnull));
		copy_result(job->uuid, i, 2, sizeof(job->uuid));
		job->attempt = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, 3, &isnull));
		copy_result(job->repo_id, i, 4, sizeof(job->repo_id));
		copy_result(job->revision, i, 5, sizeof(job->revision));
		copy_result(job->quantization, i, 6, sizeof(job->quantization));
		copy_result(job->directory, i, 7, sizeof(job->directory));
		job->trust_remote_code = DatumGetBool(SPI_getbinval(row, SPI_tuptable->tupdesc, 8, &isnull));
		copy_result(job->source_path, i, 9, sizeof(job->source_path));
	}
}

static bool
is_pending(const Pending *pending, const char *uuid)
{
	for (uint64 i = 0; i < pending->n; i++)
		if (strcmp(pending->jobs[i].uuid, uuid) == 0)
			return true;
	return false;
}

/* Give the supervisor the pending rows it does not know, and take back what nobody wants any more. */
static void
hand_over(const Pending *pending, const char *owner, const bool *was_committed, const bool *was_there)
{
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	for (uint64 i = 0; i < pending->n; i++)
	{
		const MillmJob *wanted = &pending->jobs[i];
		MillmJob   *job = millm_find_job(wanted->uuid);

		if (job && job->attempt >= wanted->attempt)
			continue;
		job = millm_new_job(wanted->uuid);
		if (!job)
			continue;			/* its turn comes when a place is free */
		job->model_id = wanted->model_id;
		job->attempt = wanted->attempt;
		strlcpy(job->owner, owner, sizeof(job->owner));
		strlcpy(job->source_path, wanted->source_path, sizeof(job->source_path));
		strlcpy(job->repo_id, wanted->repo_id, sizeof(job->repo_id));
		strlcpy(job->revision, wanted->revision, sizeof(job->revision));
		strlcpy(job->quantization, wanted->quantization, sizeof(job->quantization));
		strlcpy(job->directory, wanted->directory, sizeof(job->directory));
		job->trust_remote_code = wanted->trust_remote_code;
		job->state = MILLM_JOB_QUEUED;
	}
	/* a job or a token that was there before we looked, and whose row is not pending: deleted, or never committed */
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
	{
		MillmJob   *job = &millm_shared->jobs[i];

		if (was_there[i] && (job->state == MILLM_JOB_QUEUED || job->state == MILLM_JOB_RUNNING) && !is_pending(pending, job->uuid))
			job->canceled = true;
	}
	for (int i = 0; i < MILLM_MAX_TOKENS; i++)
	{
		MillmToken *token = &millm_shared->tokens[i];

		if (was_committed[i] && token->owner_pid == 0 && token->uuid[0] && !is_pending(pending, token->uuid))
			explicit_bzero(token, sizeof(*token));
	}
	LWLockRelease(millm_shared->lock);
	millm_wake_supervisor();
}

static bool
scan_pending(void)
{
	static char owner[37];
	Pending		pending = {0};
	bool		was_committed[MILLM_MAX_TOKENS];
	bool		was_there[MILLM_MAX_JOBS];

	/* before the snapshot, or what commits right now would look as if it had no row */
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	for (int i = 0; i < MILLM_MAX_TOKENS; i++)
		was_committed[i] = millm_shared->tokens[i].uuid[0] && millm_shared->tokens[i].owner_pid == 0;
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
		was_there[i] = millm_shared->jobs[i].state != MILLM_JOB_FREE;
	LWLockRelease(millm_shared->lock);
	if (!run_step(read_owner, owner) || !run_step(read_pending, &pending))
		return false;
	hand_over(&pending, owner, was_committed, was_there);
	return true;
}

/* --- From jobs to the registry -------------------------------------------------------------------------------------- */

typedef struct Outcome
{
	MillmJob	job;
	char	   *config;			/* config.json of the finished directory, or NULL */
	char	   *event;
} Outcome;

/* At most MAX_CONFIG_BYTES of valid UTF-8, or NULL. */
static char *
read_config(const char *directory)
{
	char	   *path = psprintf("%s/config.json", directory);
	FILE	   *f = AllocateFile(path, "r");
	struct stat sb;
	char	   *text = NULL;

	if (f && fstat(fileno(f), &sb) == 0 && S_ISREG(sb.st_mode) && sb.st_size > 0 && sb.st_size <= MAX_CONFIG_BYTES)
	{
		text = palloc(sb.st_size + 1);
		text[fread(text, 1, sb.st_size, f)] = '\0';
		if (!pg_verifymbstr(text, strlen(text), true))
			text = NULL;
	}
	if (f)
		FreeFile(f);
	return text;
}

static void
write_ready(void *arg)
{
	const Outcome *outcome = arg;
	const MillmJob *job = &outcome->job;
	Oid			types[] = {UUIDOID, INT4OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT8OID, INT8OID, TEXTOID, TEXTOID};
	Datum		values[] = {
		uuid_datum(job->uuid), Int32GetDatum(job->attempt), CStringGetTextDatum(job->commit), CStringGetTextDatum(job->path),
		CStringGetTextDatum(job->model_type), CStringGetTextDatum(job->architecture), CStringGetTextDatum(job->license),
		Int64GetDatum(job->params), Int64GetDatum(job->disk_bytes), outcome->config ? CStringGetTextDatum(outcome->config) : (Datum) 0,
		CStringGetTextDatum(job->quantization),
	};
	char		nulls[lengthof(types)];

	for (int i = 0; i < (int) lengthof(nulls); i++)
		nulls[i] = ' ';
	nulls[2] = job->commit[0] ? ' ' : 'n';
	nulls[4] = job->model_type[0] ? ' ' : 'n';
	nulls[5] = job->architecture[0] ? ' ' : 'n';
	nulls[6] = job->license[0] ? ' ' : 'n';
	nulls[7] = job->params >= 0 ? ' ' : 'n';
	nulls[8] = job->disk_bytes >= 0 ? ' ' : 'n';
	nulls[9] = outcome->config ? ' ' : 'n';
	(void) execute("UPDATE millm.registry SET status = 'ready', commit = $3, local_path = CASE source WHEN 'local' THEN local_path ELSE $4 END, "
				   "model_type = $5, architecture = $6, license = coalesce($7, license), params = coalesce($8, params), disk_bytes = $9, "
				   "config = $10::json, quantization = $11, "
				   "updated_at = pg_catalog.clock_timestamp() WHERE uuid = $1 AND attempt = $2 AND status = 'pending'",
				   lengthof(types), types, values, nulls);
}

static void
write_error(void *arg)
{
	const MillmJob *job = &((const Outcome *) arg)->job;
	Oid			types[] = {UUIDOID, INT4OID, TEXTOID, TEXTOID};
	char	   *message = psprintf("%s%s%s", job->error.message, job->error.detail[0] ? ": " : "", job->error.detail);
	Datum		values[] = {uuid_datum(job->uuid), Int32GetDatum(job->attempt), CStringGetTextDatum(millm_code_name(job->error.code)),
	CStringGetTextDatum(message)};

	(void) execute("UPDATE millm.registry SET status = 'error', error_code = $3, error_message = $4, updated_at = pg_catalog.clock_timestamp() "
				   "WHERE uuid = $1 AND attempt = $2 AND status = 'pending'", lengthof(types), types, values, NULL);
}

/* False: an outcome could not be written yet. */
static bool
write_outcomes(void)
{
	bool		all = true;

	for (int i = 0; i < MILLM_MAX_JOBS; i++)
	{
		MillmJob   *place = &millm_shared->jobs[i];
		Outcome		outcome = {.config = NULL};
		bool		written;

		LWLockAcquire(millm_shared->lock, LW_SHARED);
		outcome.job = *place;
		LWLockRelease(millm_shared->lock);
		if (outcome.job.state != MILLM_JOB_DONE)
			continue;
		if (outcome.job.error.code == MILLM_OK)
		{
			outcome.config = read_config(outcome.job.path);
			written = run_step(write_ready, &outcome);
			if (!written && outcome.config)
			{
				/* JSON that PostgreSQL cannot hold, perhaps; the model is good without it */
				outcome.config = NULL;
				written = run_step(write_ready, &outcome);
			}
		}
		else
			written = run_step(write_error, &outcome);
		if (!written)
		{
			all = false;
			continue;
		}
		LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
		place->state = MILLM_JOB_WRITTEN;
		place->not_before = GetCurrentTimestamp();
		if (outcome.job.error.code == MILLM_OK)
			millm_push_event("{\"event\":\"model:download:complete\",\"model_id\":" INT64_FORMAT ",\"bytes_downloaded\":" INT64_FORMAT
							 ",\"total_bytes\":" INT64_FORMAT "}", outcome.job.model_id, outcome.job.fetched_bytes, outcome.job.total_bytes);
		else
			millm_push_error_event("download", outcome.job.model_id, &outcome.job.error);
		for (int t = 0; t < MILLM_MAX_TOKENS; t++)
			if (millm_shared->tokens[t].owner_pid == 0 && strcmp(millm_shared->tokens[t].uuid, outcome.job.uuid) == 0)
				explicit_bzero(&millm_shared->tokens[t], sizeof(MillmToken));
		LWLockRelease(millm_shared->lock);
		millm_broadcast();
	}
	return all;
}

/* --- Trash --------------------------------------------------------------------------------------------------------------- */

typedef struct Trash
{
	uint64		n;
	char	  **uuids;			/* in step_context, as what they point to */
	char	  **directories;
} Trash;

static void
read_trash(void *arg)
{
	Trash	   *trash = arg;

	trash->n = execute("SELECT uuid::text, directory FROM millm.trash", 0, NULL, NULL, NULL);
	trash->uuids = MemoryContextAlloc(step_context, (trash->n + 1) * sizeof(char *));
	trash->directories = MemoryContextAlloc(step_context, (trash->n + 1) * sizeof(char *));
	for (uint64 i = 0; i < trash->n; i++)
	{
		trash->uuids[i] = result(i, 1);
		trash->directories[i] = result(i, 2);
	}
}

static void
forget_trash(void *uuid)
{
	Oid			type = UUIDOID;
	Datum		value = uuid_datum(uuid);

	(void) execute("DELETE FROM millm.trash WHERE uuid = $1", 1, &type, &value, NULL);
}

/* Whether somebody still uses the files. */
static bool
in_use(const char *uuid)
{
	MillmJob   *job;
	bool		used;

	LWLockAcquire(millm_shared->lock, LW_SHARED);
	job = millm_find_job(uuid);
	used = millm_model_in_engine(uuid) || (job && (job->state == MILLM_JOB_QUEUED || job->state == MILLM_JOB_RUNNING));
	LWLockRelease(millm_shared->lock);
	return used;
}

/* Have millm-hub remove a directory that carries this uuid; false: not now. */
static bool
remove_files(const char *uuid, const char *directory)
{
	StringInfoData buf;
	volatile bool good = false;

	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"remove\",\"cache_dir\":");
	millm_json_append_string(&buf, millm_shared->cache_dir, strlen(millm_shared->cache_dir));
	appendStringInfoString(&buf, ",\"directory\":");
	millm_json_append_string(&buf, directory, strlen(directory));
	appendStringInfo(&buf, ",\"model_uuid\":\"%s\"}", uuid);
	PG_TRY();
	{
		millm_client_call(MILLM_HUB, buf.data, &buf, REMOVE_MS);
		good = true;
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(step_context);
		EmitErrorReport();
		FlushErrorState();
	}
	PG_END_TRY();
	return good;
}

/* False: the table could not be read.  Files that could not be removed are tried again later and later. */
static bool
empty_trash(void)
{
	static TimestampTz next_try;
	static int	delay_ms = SCAN_MS;
	Trash		trash = {0};
	MillmHelperStatus hub;
	bool		all = true;

	millm_helper_status(MILLM_HUB, &hub);
	if (!millm_shared->cache_owned || hub.state != MILLM_HELPER_READY || GetCurrentTimestamp() < next_try)
		return true;
	if (!run_step(read_trash, &trash))
		return false;
	for (uint64 i = 0; i < trash.n; i++)
		if (!in_use(trash.uuids[i]))
			all &= remove_files(trash.uuids[i], trash.directories[i]) && run_step(forget_trash, trash.uuids[i]);
	next_try = all ? 0 : GetCurrentTimestamp() + delay_ms * INT64CONST(1000);
	delay_ms = all ? SCAN_MS : Min(2 * delay_ms, MAX_DELAY_MS);
	return true;
}

/* --- The model that every server start loads ------------------------------------------------------------------------------ */

typedef struct AutoLoad
{
	const char *wanted;			/* a name, or an id */
	uint64		n_found;
	MillmLoadedModel model;
	char	   *path;			/* in step_context */
} AutoLoad;

static void
read_auto_load(void *arg)
{
	AutoLoad   *load = arg;
	Oid			type = TEXTOID;
	Datum		value = CStringGetTextDatum(load->wanted);
	bool		isnull;

	load->n_found = execute("SELECT id, name, uuid::text, directory, local_path FROM millm.registry "
						  "WHERE (name = $1 OR id::text = $1) AND status = 'ready'", 1, &type, &value, NULL);
	if (load->n_found != 1)
		return;
	load->model.id = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	strlcpy(load->model.name, result(0, 2), sizeof(load->model.name));
	strlcpy(load->model.uuid, result(0, 3), sizeof(load->model.uuid));
	load->path = result(0, 4);
	load->path = load->path ? psprintf("%s/%s", millm_shared->cache_dir, load->path) : result(0, 5);
	load->path = MemoryContextStrdup(step_context, load->path);
}

/* Once in the server's life, successful or not; the supervisor knows how to wait for the engine. */
static bool
auto_load(void)
{
	AutoLoad	load = {.wanted = millm_effective_auto_load()};
	uint64		number;
	MillmError	err;

	if (millm_shared->auto_load_done || !load.wanted)
		return true;
	if (!run_step(read_auto_load, &load))
		return false;
	millm_shared->auto_load_done = true;
	if (load.n_found == 0)
		ereport(LOG, (errmsg("millm.auto_load_model is \"%s\", but no such model is ready", load.wanted)));
	else if (load.n_found > 1)
		ereport(LOG, (errmsg("millm.auto_load_model is \"%s\", which is the name of several models", load.wanted),
					  errhint("Set it to a model's id.")));
	else if (millm_command_load(&load.model, load.path, false, &number, &err) != MILLM_OK)
		ereport(LOG, (errmsg("could not load millm.auto_load_model: %s", err.message)));
	return true;
}

/* --- Events --------------------------------------------------------------------------------------------------------------- */

typedef struct Events
{
	int			n;
	char		text[MILLM_MAX_EVENTS][MILLM_EVENT_BYTES];
} Events;

static void
notify_all(void *arg)
{
	Events	   *events = arg;

	for (int i = 0; i < events->n; i++)
		Async_Notify("millm_progress", events->text[i]);
}

/* An event that cannot be sent is lost: what it tells is in the registry already. */
static void
send_events(void)
{
	Events	   *events = palloc(sizeof(*events));

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	events->n = millm_shared->n_events;
	memcpy(events->text, millm_shared->events, sizeof(events->text[0]) * events->n);
	millm_shared->n_events = 0;
	LWLockRelease(millm_shared->lock);
	if (events->n > 0)
		(void) run_step(notify_all, events);
	pfree(events);
}

/* --- The worker ------------------------------------------------------------------------------------------------------------ */

static void
at_exit(int code, Datum arg)
{
	millm_shared->clerk = NULL;
}

static void
wait_latch(long ms)
{
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, ms, PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

static void
look_for_database(void *found)
{
	*(bool *) found = OidIsValid(get_database_oid(millm_database, true));
}

/* Connected to no database, wait until there is the one we want; the next clerk connects to it. */
static void
wait_for_database(void)
{
	bool		found = false;

	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	while (!found)
	{
		StartTransactionCommand();
		look_for_database(&found);
		CommitTransactionCommand();
		if (!found)
			wait_latch(NO_DATABASE_MS);
	}
	millm_shared->no_database = false;
	proc_exit(1);				/* the postmaster starts the next one */
}

/* Look into the database; false: try again soon. */
static bool
scan(void)
{
	Oid			found = InvalidOid;

	if (!run_step(look_for_extension, &found))
		return false;
	if (OidIsValid(extension) && found != extension && !RecoveryInProgress())
	{
		if (!OidIsValid(found))
			abandon();
		else if (!abandon_unknown())
			return false;
	}
	extension = found;
	if (!OidIsValid(extension))
		return true;
	if (!auto_load())
		return false;
	return RecoveryInProgress() || (empty_trash() && scan_pending());
}

/* One round; milliseconds until the next without an event. */
static long
work(void)
{
	static TimestampTz next_scan;
	static long delay_ms = RETRY_MS;
	bool		good = true;

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	if (millm_shared->clerk_must_look)
		next_scan = 0;
	millm_shared->clerk_must_look = false;
	LWLockRelease(millm_shared->lock);

	/* progress wakes us too, and is no reason to read tables */
	if (OidIsValid(extension) && !RecoveryInProgress())
		good = write_outcomes();
	if (GetCurrentTimestamp() >= next_scan)
	{
		good = scan() && good;
		next_scan = GetCurrentTimestamp() + SCAN_MS * INT64CONST(1000);
	}
	if (OidIsValid(extension) && !RecoveryInProgress())
		send_events();
	if (good)
	{
		delay_ms = RETRY_MS;
		return SCAN_MS;
	}
	/* somebody's lock, or worse: again soon, then less and less so */
	next_scan = 0;
	delay_ms = Min(2 * delay_ms, MAX_DELAY_MS);
	return delay_ms;
}

void
millm_clerk_main(Datum arg)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	millm_shared->clerk = MyLatch;
	before_shmem_exit(at_exit, (Datum) 0);

	if (millm_shared->no_database)
		wait_for_database();
	/* connecting to a database that is not there is the end of this process */
	millm_shared->no_database = true;
	BackgroundWorkerInitializeConnection(millm_database, NULL, 0);
	millm_shared->no_database = false;
	SetConfigOption("search_path", MILLM_SAFE_PATH, PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("lock_timeout", "100ms", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("statement_timeout", "0", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("synchronous_commit", "local", PGC_SUSET, PGC_S_OVERRIDE);
	/* what is the default for sessions must not keep from the registry what a session has committed */
	SetConfigOption("default_transaction_read_only", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("default_transaction_isolation", "read committed", PGC_SUSET, PGC_S_OVERRIDE);
	pgstat_report_activity(STATE_IDLE, NULL);

	step_context = AllocSetContextCreate(TopMemoryContext, "millm clerk", ALLOCSET_DEFAULT_SIZES);
	for (;;)
	{
		long		ms;

		MemoryContextSwitchTo(step_context);
		ms = work();
		MemoryContextReset(step_context);
		/* what the steps have changed is autovacuum's business; nobody else reports it for us */
		pgstat_report_stat(true);
		wait_latch(ms);
	}
}
