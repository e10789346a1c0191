/*
 * shmem.c -- the shared struct's life, and the readers that live.h promises.
 */
#include "shmem.h"

#include "commands/dbcommands.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"

#include "clock.h"
#include "compat.h"
#include "settings.h"
#include "stat.h"

#define START_MS	5000		/* a second until a worker that has ended is started anew, and what a busy server takes for it */
#define LOOK_MS		20

MillmShared *millm_shared = NULL;

void
millm_shmem_request(void)
{
	RequestAddinShmemSpace(MAXALIGN(sizeof(MillmShared)) + millm_stat_shmem_bytes());
	RequestNamedLWLockTranche("millm", 2);
}

void
millm_shmem_startup(void)
{
	bool		found;

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	millm_shared = ShmemInitStruct("millm", sizeof(MillmShared), &found);
	if (!found)
	{
		memset(millm_shared, 0, sizeof(MillmShared));
		millm_shared->lock = &GetNamedLWLockTranche("millm")->lock;
		ConditionVariableInit(&millm_shared->changed);
	}
	millm_stat_shmem_startup(&GetNamedLWLockTranche("millm")[1].lock);
	LWLockRelease(AddinShmemInitLock);
}

void
millm_wake_supervisor(void)
{
	Latch	   *latch = millm_shared->supervisor;

	if (latch)
		SetLatch(latch);
}

void
millm_wake_clerk(void)
{
	Latch	   *latch = millm_shared->clerk;

	if (latch)
		SetLatch(latch);
}

void
millm_broadcast(void)
{
	ConditionVariableBroadcast(&millm_shared->changed);
}

MillmJob *
millm_find_job(const char *uuid)
{
	for (int i = 0; i < MILLM_MAX_JOBS; i++)
		if (millm_shared->jobs[i].state != MILLM_JOB_FREE && strcmp(millm_shared->jobs[i].uuid, uuid) == 0)
			return &millm_shared->jobs[i];
	return NULL;
}

MillmJob *
millm_new_job(const char *uuid)
{
	MillmJob   *place = millm_find_job(uuid);

	/* the model's own, then one never used, then the one whose end is the longest ago */
	if (place && place->state != MILLM_JOB_WRITTEN)
		return NULL;
	for (int i = 0; i < MILLM_MAX_JOBS && !place; i++)
		if (millm_shared->jobs[i].state == MILLM_JOB_FREE)
			place = &millm_shared->jobs[i];
	for (int i = 0; i < MILLM_MAX_JOBS && (!place || place->state == MILLM_JOB_WRITTEN); i++)
	{
		MillmJob   *j = &millm_shared->jobs[i];

		if (j->state == MILLM_JOB_WRITTEN && (!place || (strcmp(place->uuid, uuid) != 0 && j->not_before < place->not_before)))
			place = j;
	}
	if (!place)
		return NULL;
	memset(place, 0, sizeof(*place));
	strlcpy(place->uuid, uuid, sizeof(place->uuid));
	place->bytes_per_second = -1;
	place->params = place->disk_bytes = -1;
	return place;
}

bool
millm_model_in_engine(const char *uuid)
{
	const MillmCommand *c = &millm_shared->command;

	return (millm_shared->is_loaded && strcmp(millm_shared->loaded.uuid, uuid) == 0) ||
		(c->kind == MILLM_LOAD && (c->state == MILLM_COMMAND_REQUESTED || c->state == MILLM_COMMAND_RUNNING) &&
		 strcmp(c->model.uuid, uuid) == 0);
}

void
millm_push_event(const char *fmt,...)
{
	char	   *place;
	va_list		ap;
	int			n;

	if (millm_shared->n_events == MILLM_MAX_EVENTS)
		return;
	place = millm_shared->events[millm_shared->n_events];
	va_start(ap, fmt);
	n = vsnprintf(place, MILLM_EVENT_BYTES, fmt, ap);
	va_end(ap);
	/* half an event is no JSON */
	if (n > 0 && n < MILLM_EVENT_BYTES)
		millm_shared->n_events++;
}

void
millm_push_error_event(const char *kind, int64 model_id, const MillmError *error)
{
	char		message[MILLM_EVENT_BYTES / 2 + 1];
	size_t		len = strlen(error->message);
	size_t		n = 0;

	/* as much of it as there is room for, in whole characters */
	while ((n = wire_put_json_string(message, sizeof(message) - 1, error->message, len)) == 0)
		do
			len--;
		while ((error->message[len] & 0xC0) == 0x80);
	message[n] = '\0';
	millm_push_event("{\"event\":\"model:%s:error\",\"model_id\":" INT64_FORMAT ",\"code\":\"%s\",\"message\":%s}", kind, model_id,
					 millm_code_name(error->code), message);
}

const char *
millm_helper_socket(MillmHelper helper)
{
	return helper == MILLM_ENGINE ? MILLM_RUN_DIR "/engine.sock" : MILLM_RUN_DIR "/hub.sock";
}

void
millm_helper_status(MillmHelper helper, MillmHelperStatus *out)
{
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	*out = millm_shared->helpers[helper];
	LWLockRelease(millm_shared->lock);
}

bool
millm_loaded_fingerprint(MillmLoadedModel *out, char fingerprint[MILLM_FINGERPRINT_BYTES])
{
	bool		loaded;

	LWLockAcquire(millm_shared->lock, LW_SHARED);
	loaded = millm_shared->is_loaded;
	*out = millm_shared->loaded;
	strlcpy(fingerprint, millm_shared->loaded_fingerprint, MILLM_FINGERPRINT_BYTES);
	LWLockRelease(millm_shared->lock);
	return loaded;
}

bool
millm_loaded_model(MillmLoadedModel *out)
{
	char		fingerprint[MILLM_FINGERPRINT_BYTES];

	return millm_loaded_fingerprint(out, fingerprint);
}

void
millm_check_registry(void)
{
	MillmError	err;
	char	   *database;

	if (!millm_shared)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE), errmsg("millm must be preloaded"),
				 errhint("Add millm to shared_preload_libraries and restart the server.")));
	database = get_database_name(MyDatabaseId);
	if (database && strcmp(database, millm_database) != 0)
	{
		millm_fail(&err, MILLM_E_WRONG_DATABASE, "millm works in database \"%s\", not in \"%s\"", millm_database, database);
		millm_hint(&err, "Connect to that database, or change millm.database and restart the server.");
		millm_ereport(ERROR, &err);
	}
	if (GetDatabaseEncoding() != PG_UTF8)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("database \"%s\" has encoding %s; millm needs UTF8", millm_database, GetDatabaseEncodingName()),
				 errhint("Set millm.database to a database whose encoding is UTF8.")));
}

void
millm_check_ready(void)
{
	MillmError	err;
	int64		deadline_ms;

	millm_check_registry();
	deadline_ms = millm_now_ms() + START_MS;
	while (!millm_shared->supervisor && millm_now_ms() < deadline_ms)
	{
		if (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOOK_MS, PG_WAIT_EXTENSION) & WL_LATCH_SET)
			ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	if (millm_shared->supervisor)
		return;
	millm_fail(&err, MILLM_E_ENGINE_UNAVAILABLE, "millm's supervisor is not running");
	millm_detail(&err, "It is a background worker, and max_worker_processes is %d.", max_worker_processes);
	millm_hint(&err, "If this lasts, raise max_worker_processes and restart the server; the server log says more.");
	millm_ereport(ERROR, &err);
}
