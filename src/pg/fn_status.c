/*
 * fn_status.c -- looking: status(), live(), error_list(), and what CREATE EXTENSION says of its surroundings.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "commands/dbcommands.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"
#include "utils/uuid.h"

#include "compat.h"
#include "json.h"
#include "settings.h"
#include "shmem.h"

PG_FUNCTION_INFO_V1(millm_status);
PG_FUNCTION_INFO_V1(millm_loaded_model_row);
PG_FUNCTION_INFO_V1(millm_live);
PG_FUNCTION_INFO_V1(millm_error_list);
PG_FUNCTION_INFO_V1(millm_check_installation);

/* How long status() waits for an engine that answers at once when it is well. */
#define ASK_MS	2000
#define STATUS	"{\"op\":\"status\"}"

static const char *
state_name(MillmHelperState state)
{
	static const char *const names[] = {
		[MILLM_HELPER_STOPPED] = "stopped", [MILLM_HELPER_STARTING] = "starting", [MILLM_HELPER_READY] = "ready",
		[MILLM_HELPER_BACKOFF] = "restarting", [MILLM_HELPER_MISSING] = "missing",
	};

	return names[state];
}

bool
millm_helper_ask(MillmHelper helper, const MillmHelperStatus *status, const char *request, int timeout_ms, StringInfo reply)
{
	MillmClient *volatile client = NULL;
	MemoryContext caller = CurrentMemoryContext;
	volatile bool answered = false;

	if (status->state != MILLM_HELPER_READY)
		return false;
	/*
	 * Caught without a subtransaction: nothing but a socket and memory is touched in between.  Only what is said of helpers: an interrupt that is
	 * served meanwhile may bring a cancel, or the error of a parallel worker, whose rows would else be missing without a word.
	 */
	PG_TRY();
	{
		client = millm_client_open(helper, request, timeout_ms);
		answered = millm_client_receive(client, reply, timeout_ms) == WIRE_RESULT;
		millm_client_close(client);
	}
	PG_CATCH();
	{
		millm_client_close(client);
		if (ERRCODE_TO_CATEGORY(geterrcode()) != MAKE_SQLSTATE('M', 'L', '0', '0', '0'))
			PG_RE_THROW();
		MemoryContextSwitchTo(caller);
		FlushErrorState();
	}
	PG_END_TRY();
	return answered;
}

typedef struct Row
{
	Datum	   *values;
	bool	   *nulls;
} Row;

static void
put_text(Row row, int column, const char *value)
{
	row.nulls[column] = value == NULL || value[0] == '\0';
	if (!row.nulls[column])
		row.values[column] = CStringGetTextDatum(value);
}

static void
put_pid(Row row, int column, int pid)
{
	row.nulls[column] = pid == 0;
	row.values[column] = Int32GetDatum(pid);
}

static void
put_int(Row row, int column, MillmJson object, const char *field)
{
	int64		n;

	row.nulls[column] = !millm_json_get_int(object, field, &n) || n < PG_INT32_MIN || n > PG_INT32_MAX;
	if (!row.nulls[column])
		row.values[column] = Int32GetDatum((int32) n);
}

static void
put_bigint(Row row, int column, MillmJson object, const char *field)
{
	int64		n;

	row.nulls[column] = !millm_json_get_int(object, field, &n);
	if (!row.nulls[column])
		row.values[column] = Int64GetDatum(n);
}

/* The columns of millm.status(). */
enum
{
	ENGINE_PID, ENGINE_STATE, ENGINE_VERSION, RESTARTS, LAST_EXIT, MODEL_ID, MODEL, DEVICE, DEVICE_REASON, KERNELS, DETERMINISTIC,
	CONTEXT_LENGTH, RUNNING, WAITING, HUB_PID, HUB_STATE, CIRCUIT_BREAKER, FINGERPRINT, KV_PAGES, KV_PAGES_FREE,
	KV_PAGES_CACHED, KV_CACHE_DTYPE, DRAFTED_TOKENS, ACCEPTED_TOKENS, STATUS_COLUMNS
};

/* millm.status() RETURNS record: helpers as the supervisor sees them, the engine's figures as it gives them itself. */
Datum
millm_status(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	Datum		values[STATUS_COLUMNS] = {0};
	bool		nulls[STATUS_COLUMNS];
	Row			row = {values, nulls};
	MillmHelperStatus engine;
	MillmHelperStatus hub;
	MillmLoadedModel model;
	char		fingerprint[MILLM_FINGERPRINT_BYTES];
	StringInfoData reply;
	MillmJson	object;
	bool		flag;

	millm_check_registry();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE || desc->natts != STATUS_COLUMNS)
		elog(ERROR, "millm.status() has the wrong return type");
	memset(nulls, true, sizeof(nulls));
	millm_helper_status(MILLM_ENGINE, &engine);
	millm_helper_status(MILLM_HUB, &hub);
	initStringInfo(&reply);
	if (!millm_helper_ask(MILLM_ENGINE, &engine, STATUS, ASK_MS, &reply))
		resetStringInfo(&reply);
	object = millm_json(reply.data, reply.len);

	put_pid(row, ENGINE_PID, engine.pid);
	put_text(row, ENGINE_STATE, state_name(engine.state));
	put_text(row, ENGINE_VERSION, millm_json_get_string(object, "version"));
	values[RESTARTS] = Int64GetDatum(engine.restarts);
	nulls[RESTARTS] = false;
	put_text(row, LAST_EXIT, engine.last_exit);
	if (millm_loaded_fingerprint(&model, fingerprint))
	{
		values[MODEL_ID] = Int64GetDatum(model.id);
		nulls[MODEL_ID] = false;
		put_text(row, MODEL, model.name);
		put_text(row, FINGERPRINT, fingerprint);
	}
	put_text(row, DEVICE, millm_json_get_string(object, "device"));
	put_text(row, DEVICE_REASON, millm_json_get_string(object, "device_reason"));
	put_text(row, KERNELS, millm_json_get_string(object, "kernels"));
	nulls[DETERMINISTIC] = !millm_json_get_bool(object, "deterministic", &flag);
	if (!nulls[DETERMINISTIC])
		values[DETERMINISTIC] = BoolGetDatum(flag);
	put_int(row, CONTEXT_LENGTH, object, "context_length");
	put_int(row, RUNNING, object, "running");
	put_int(row, WAITING, object, "waiting");
	put_int(row, KV_PAGES, object, "pages_total");
	put_int(row, KV_PAGES_FREE, object, "pages_free");
	put_int(row, KV_PAGES_CACHED, object, "pages_cached");
	put_text(row, KV_CACHE_DTYPE, millm_json_get_string(object, "kv_cache_dtype"));
	put_bigint(row, DRAFTED_TOKENS, object, "drafted_tokens");
	put_bigint(row, ACCEPTED_TOKENS, object, "accepted_tokens");
	put_pid(row, HUB_PID, hub.pid);
	put_text(row, HUB_STATE, state_name(hub.state));
	resetStringInfo(&reply);
	if (!millm_helper_ask(MILLM_HUB, &hub, STATUS, ASK_MS, &reply))
		resetStringInfo(&reply);
	put_text(row, CIRCUIT_BREAKER, millm_json_get_string(millm_json(reply.data, reply.len), "circuit_breaker"));
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/* The columns of millm.loaded_model(). */
enum
{
	LOADED_ID, LOADED_NAME, LOADED_FINGERPRINT, LOADED_COLUMNS
};

/* millm.loaded_model() RETURNS record: what of status() the server's memory knows, without asking a helper; nulls when there is none. */
Datum
millm_loaded_model_row(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	Datum		values[LOADED_COLUMNS] = {0};
	bool		nulls[LOADED_COLUMNS];
	Row			row = {values, nulls};
	MillmLoadedModel model;
	char		fingerprint[MILLM_FINGERPRINT_BYTES];

	millm_check_registry();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE || desc->natts != LOADED_COLUMNS)
		elog(ERROR, "millm.loaded_model() has the wrong return type");
	memset(nulls, true, sizeof(nulls));
	if (millm_loaded_fingerprint(&model, fingerprint))
	{
		values[LOADED_ID] = Int64GetDatum(model.id);
		nulls[LOADED_ID] = false;
		put_text(row, LOADED_NAME, model.name);
		put_text(row, LOADED_FINGERPRINT, fingerprint);
	}
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/* The columns of millm.live(). */
enum
{
	LIVE_UUID, LIVE_STATUS, LIVE_STAGE, LIVE_PROGRESS, LIVE_BYTES, LIVE_TOTAL_BYTES, LIVE_BYTES_PER_SECOND, LIVE_FILE, LIVE_LOADED_AT,
	LIVE_MEMORY_BYTES, LIVE_ERROR_CODE, LIVE_ERROR_MESSAGE, LIVE_COLUMNS
};

static void
begin_live(Row row, const char *uuid, const char *status)
{
	memset(row.nulls, true, LIVE_COLUMNS * sizeof(bool));
	row.values[LIVE_UUID] = DirectFunctionCall1(uuid_in, CStringGetDatum(uuid));
	row.nulls[LIVE_UUID] = false;
	put_text(row, LIVE_STATUS, status);
}

static void
put_big(Row row, int column, int64 value, bool known)
{
	row.nulls[column] = !known;
	row.values[column] = Int64GetDatum(value);
}

/* Whether there is a row of this model that tells more than its last failure. */
static bool
is_at_work(const MillmShared *now, const char *uuid)
{
	bool		is = (now->is_loaded && strcmp(now->loaded.uuid, uuid) == 0) ||
		(now->command.state != MILLM_COMMAND_DONE && strcmp(now->command.model.uuid, uuid) == 0);

	for (int i = 0; i < MILLM_MAX_JOBS && !is; i++)
		is = (now->jobs[i].state == MILLM_JOB_RUNNING || now->jobs[i].state == MILLM_JOB_DONE) && strcmp(now->jobs[i].uuid, uuid) == 0;
	return is;
}

/* millm.live() RETURNS SETOF record: at most one row a model. */
Datum
millm_live(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Datum		values[LIVE_COLUMNS] = {0};
	bool		nulls[LIVE_COLUMNS];
	Row			row = {values, nulls};
	MillmShared *now;

	millm_check_registry();
	millm_init_set(fcinfo);
	/* copied, so that no error can leave with the lock */
	now = palloc(sizeof(*now));
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	memcpy(now, millm_shared, offsetof(MillmShared, tokens));
	LWLockRelease(millm_shared->lock);

	if (now->is_loaded)
	{
		begin_live(row, now->loaded.uuid, "loaded");
		values[LIVE_LOADED_AT] = TimestampTzGetDatum(now->loaded_at);
		nulls[LIVE_LOADED_AT] = false;
		put_big(row, LIVE_MEMORY_BYTES, now->loaded_bytes, now->loaded_bytes >= 0);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	if (now->command.kind == MILLM_LOAD && (now->command.state == MILLM_COMMAND_REQUESTED || now->command.state == MILLM_COMMAND_RUNNING))
	{
		begin_live(row, now->command.model.uuid, "loading");
		put_text(row, LIVE_STAGE, now->command.stage);
		values[LIVE_PROGRESS] = Int32GetDatum(now->command.percent);
		nulls[LIVE_PROGRESS] = false;
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	if (now->failed.uuid[0] && !is_at_work(now, now->failed.uuid))
	{
		begin_live(row, now->failed.uuid, NULL);
		put_text(row, LIVE_ERROR_CODE, millm_code_name(now->failure.code));
		put_text(row, LIVE_ERROR_MESSAGE, psprintf("%s%s%s", now->failure.message, now->failure.detail[0] ? ": " : "", now->failure.detail));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
	{
		const MillmJob *job = &now->jobs[i];

		if (job->state != MILLM_JOB_RUNNING && job->state != MILLM_JOB_DONE)
			continue;
		begin_live(row, job->uuid, "downloading");
		put_text(row, LIVE_STAGE, job->stage);
		values[LIVE_PROGRESS] = Int32GetDatum(job->percent);
		nulls[LIVE_PROGRESS] = false;
		put_big(row, LIVE_BYTES, job->bytes, true);
		put_big(row, LIVE_TOTAL_BYTES, job->total_bytes, job->total_bytes > 0);
		nulls[LIVE_BYTES_PER_SECOND] = job->bytes_per_second < 0;
		if (!nulls[LIVE_BYTES_PER_SECOND])
			values[LIVE_BYTES_PER_SECOND] = Float8GetDatum(job->bytes_per_second);
		put_text(row, LIVE_FILE, job->file);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	pfree(now);
	return (Datum) 0;
}

/* millm.error_list() RETURNS SETOF record: errors.def; needs no preloaded library. */
Datum
millm_error_list(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	millm_init_set(fcinfo);
	for (int code = MILLM_OK + 1; code < MILLM_N_CODES; code++)
	{
		Datum		values[3] = {CStringGetTextDatum(millm_code_name(code)), CStringGetTextDatum(millm_code_sqlstate(code)),
		Int32GetDatum(millm_code_http(code))};
		bool		nulls[3] = {false};

		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	return (Datum) 0;
}

/* Called once by CREATE EXTENSION: say what would make every function fail. */
Datum
millm_check_installation(PG_FUNCTION_ARGS)
{
	char	   *database = get_database_name(MyDatabaseId);

	if (!millm_shared)
		ereport(WARNING, (errmsg("millm is not preloaded, so its functions will not work"),
						  errhint("Add millm to shared_preload_libraries and restart the server.")));
	else if (strcmp(database, millm_database) != 0)
		ereport(WARNING, (errmsg("millm works in database \"%s\", so its functions will not work in \"%s\"", millm_database, database),
						  errhint("Create the extension there, or change millm.database and restart the server.")));
	if (GetDatabaseEncoding() != PG_UTF8)
		ereport(WARNING, (errmsg("database \"%s\" has encoding %s, so millm's functions will not work in it", database, GetDatabaseEncodingName()),
						  errhint("millm needs a database whose encoding is UTF8.")));
	PG_RETURN_VOID();
}
