/*-------------------------------------------------------------------------
 * stat.c
 *	  What each role has had computed, and by which model.
 *
 * Owns:     a table in shared memory, one row for each role and model, under a lock of its own that is held for one look through it.
 * Does not: survive the server.  An engine that ends changes nothing in it.
 *
 * The table has MAX_ROWS rows.  When another one is needed, the row whose last request is the longest ago is added to "others",
 * the row without a role, and its place is taken: sums stay right, and who works is seen.
 *-------------------------------------------------------------------------
 */
#include "stat.h"

#include "catalog/pg_authid.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/shmem.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "compat.h"
#include "live.h"
#include "shmem.h"

PG_FUNCTION_INFO_V1(millm_stat_list);
PG_FUNCTION_INFO_V1(millm_stat_reset);

#define MAX_ROWS	512

typedef struct StatRow
{
	MillmAsker	asker;			/* role InvalidOid: others */
	int64		n_requests;		/* all but the busy ones */
	int64		n_failed;
	int64		n_canceled;
	int64		n_busy;
	MillmUse	use;
	TimestampTz since;			/* its first request */
	TimestampTz last;			/* its latest */
} StatRow;

typedef struct StatTable
{
	LWLock	   *lock;
	int			n;
	StatRow		others;
	StatRow		rows[MAX_ROWS];	/* [n] */
} StatTable;

static StatTable *table;

Size
millm_stat_shmem_bytes(void)
{
	return MAXALIGN(sizeof(StatTable));
}

void
millm_stat_shmem_startup(LWLock *lock)
{
	bool		found;

	table = ShmemInitStruct("millm statistics", sizeof(StatTable), &found);
	if (!found)
	{
		memset(table, 0, sizeof(StatTable));
		table->lock = lock;
	}
}

void
millm_stat_asker(MillmAsker *asker)
{
	MillmLoadedModel loaded;

	memset(asker, 0, sizeof(*asker));
	asker->role = GetUserId();
	if (!millm_loaded_model(&loaded))
		return;
	asker->model_id = loaded.id;
	strlcpy(asker->model, loaded.name, sizeof(asker->model));
}

static void
add_use(MillmUse *sum, const MillmUse *use)
{
	sum->prompt_tokens += use->prompt_tokens;
	sum->cached_tokens += use->cached_tokens;
	sum->completion_tokens += use->completion_tokens;
	sum->queue_ms += use->queue_ms;
	sum->compute_ms += use->compute_ms;
}

/* With the lock held. */
static void
add_to_others(const StatRow *row)
{
	StatRow    *others = &table->others;

	others->n_requests += row->n_requests;
	others->n_failed += row->n_failed;
	others->n_canceled += row->n_canceled;
	others->n_busy += row->n_busy;
	add_use(&others->use, &row->use);
	if (others->since == 0 || row->since < others->since)
		others->since = row->since;
}

/* The asker's row, perhaps a new one.  With the lock held. */
static StatRow *
find_row(const MillmAsker *asker, TimestampTz now)
{
	StatRow    *place = &table->rows[0];

	for (int i = 0; i < table->n; i++)
	{
		StatRow    *row = &table->rows[i];

		if (row->asker.role == asker->role && row->asker.model_id == asker->model_id)
			return row;
		if (row->last < place->last)
			place = row;
	}
	if (table->n < MAX_ROWS)
		place = &table->rows[table->n++];
	else
		add_to_others(place);
	memset(place, 0, sizeof(*place));
	place->asker = *asker;
	place->since = now;
	return place;
}

void
millm_stat_count(const MillmAsker *asker, MillmEnd end, const MillmUse *use)
{
	TimestampTz now = GetCurrentTimestamp();
	StatRow    *row;

	LWLockAcquire(table->lock, LW_EXCLUSIVE);
	row = find_row(asker, now);
	row->last = now;
	row->n_requests += end != MILLM_END_BUSY;
	row->n_failed += end == MILLM_END_FAILED;
	row->n_canceled += end == MILLM_END_CANCELED;
	row->n_busy += end == MILLM_END_BUSY;
	add_use(&row->use, use);
	LWLockRelease(table->lock);
}

/* The columns of millm.stat_list(). */
enum
{
	STAT_ROLE_ID, STAT_MODEL_ID, STAT_MODEL, STAT_REQUESTS, STAT_PROMPT_TOKENS, STAT_CACHED_TOKENS, STAT_COMPLETION_TOKENS, STAT_QUEUE_MS,
	STAT_COMPUTE_MS, STAT_ERRORS, STAT_CANCELED, STAT_BUSY, STAT_SINCE, STAT_COLUMNS
};

static void
put_row(ReturnSetInfo *rsinfo, const StatRow *row)
{
	Datum		values[STAT_COLUMNS];
	bool		nulls[STAT_COLUMNS] = {0};

	nulls[STAT_ROLE_ID] = row->asker.role == InvalidOid;
	values[STAT_ROLE_ID] = ObjectIdGetDatum(row->asker.role);
	nulls[STAT_MODEL_ID] = nulls[STAT_MODEL] = row->asker.model_id == 0;
	values[STAT_MODEL_ID] = Int64GetDatum(row->asker.model_id);
	values[STAT_MODEL] = CStringGetTextDatum(row->asker.model);
	values[STAT_REQUESTS] = Int64GetDatum(row->n_requests);
	values[STAT_PROMPT_TOKENS] = Int64GetDatum(row->use.prompt_tokens);
	values[STAT_CACHED_TOKENS] = Int64GetDatum(row->use.cached_tokens);
	values[STAT_COMPLETION_TOKENS] = Int64GetDatum(row->use.completion_tokens);
	values[STAT_QUEUE_MS] = Float8GetDatum(row->use.queue_ms);
	values[STAT_COMPUTE_MS] = Float8GetDatum(row->use.compute_ms);
	values[STAT_ERRORS] = Int64GetDatum(row->n_failed);
	values[STAT_CANCELED] = Int64GetDatum(row->n_canceled);
	values[STAT_BUSY] = Int64GetDatum(row->n_busy);
	values[STAT_SINCE] = TimestampTzGetDatum(row->since);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/*
 * millm.stat_list() RETURNS SETOF record: the rows of those roles whose privileges the caller has; of all, and the others' row, for
 * members of pg_read_all_stats.
 */
Datum
millm_stat_list(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Oid			me = GetUserId();
	bool		sees_all = has_privs_of_role(me, ROLE_PG_READ_ALL_STATS);
	StatTable  *now;

	millm_check_registry();
	millm_init_set(fcinfo);
	/* copied, so that no error can leave with the lock */
	now = palloc(sizeof(*now));
	LWLockAcquire(table->lock, LW_SHARED);
	memcpy(now, table, offsetof(StatTable, rows) + table->n * sizeof(StatRow));
	LWLockRelease(table->lock);
	for (int i = 0; i < now->n; i++)
		if (sees_all || has_privs_of_role(me, now->rows[i].asker.role))
			put_row(rsinfo, &now->rows[i]);
	if (sees_all && now->others.since != 0)
		put_row(rsinfo, &now->others);
	pfree(now);
	return (Datum) 0;
}

/* millm.stat_reset() RETURNS void: forget all rows. */
Datum
millm_stat_reset(PG_FUNCTION_ARGS)
{
	millm_check_registry();
	LWLockAcquire(table->lock, LW_EXCLUSIVE);
	table->n = 0;
	memset(&table->others, 0, sizeof(table->others));
	LWLockRelease(table->lock);
	PG_RETURN_VOID();
}
