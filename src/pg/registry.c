/*
 * registry.c -- how SQL functions read and write the registry.
 *
 * Its tables belong to the extension's owner and nobody else may touch them: a function that has been EXECUTEd has passed
 * its check, and becomes the owner for one statement.  Rows are read with the latest snapshot, because what they are compared
 * with, live state, is of now too.
 */
#include "registry.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "common/hashfn.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "client.h"

/* What SQL's advisory locks never have there, so that nobody can hold ours by accident or in bad faith. */
#define LOCK_CLASS	0x4D4C
#define MAX_LISTED	6		/* models in a message */
#define COLUMNS "id, uuid::text, attempt, name, source, repo_id, revision, quantization, directory, local_path, status, error_code, " \
	"error_message, trust_remote_code, disk_bytes, xmin"

static Oid
registry_owner(void)
{
	Oid			namespace = get_namespace_oid("millm", true);
	Oid			table = OidIsValid(namespace) ? get_relname_relid("registry", namespace) : InvalidOid;
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE), errmsg("extension millm is not installed in this database"),
				 errhint("Use CREATE EXTENSION millm.")));
	owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
	ReleaseSysCache(tuple);
	return owner;
}

void
millm_registry_begin(MillmRegistry *r)
{
	Oid			owner = registry_owner();

	r->caller = CurrentMemoryContext;
	GetUserIdAndSecContext(&r->user, &r->security);
	SetUserIdAndSecContext(owner, r->security | SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS);
	r->guc_level = NewGUCNestLevel();
	(void) set_config_option("search_path", MILLM_SAFE_PATH, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
}

void
millm_registry_end(MillmRegistry *r)
{
	SPI_finish();
	AtEOXact_GUC(true, r->guc_level);
	SetUserIdAndSecContext(r->user, r->security);
}

uint64
millm_registry_execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls)
{
	int			rc = SPI_execute_with_args(sql, nargs, types, values, nulls, false, 0);

	if (rc < 0)
		elog(ERROR, "could not execute \"%s\": %s", sql, SPI_result_code_string(rc));
	return SPI_processed;
}

MillmModelKey
millm_key_from_id(int64 id)
{
	return (MillmModelKey) {.id = id};
}

MillmModelKey
millm_key_from_name(const text *name)
{
	MillmModelKey key = {.name = text_to_cstring(name)};

	if (key.name[0] && strspn(key.name, "0123456789") == strlen(key.name))
	{
		/* a number too large for an id is no model's */
		errno = 0;
		key.id = strtoll(key.name, NULL, 10);
		if (errno == 0)
			key.name = NULL;
	}
	return key;
}

static char *
column(HeapTuple row, TupleDesc desc, int number, MemoryContext context)
{
	char	   *value = SPI_getvalue(row, desc, number);

	return value ? MemoryContextStrdup(context, value) : NULL;
}

static MillmModel *
read_model(HeapTuple row, TupleDesc desc, MemoryContext context)
{
	MillmModel *m = MemoryContextAllocZero(context, sizeof(*m));
	bool		isnull;
	Datum		bytes;

	m->id = DatumGetInt64(SPI_getbinval(row, desc, 1, &isnull));
	m->uuid = column(row, desc, 2, context);
	m->attempt = DatumGetInt32(SPI_getbinval(row, desc, 3, &isnull));
	m->name = column(row, desc, 4, context);
	m->source = column(row, desc, 5, context);
	m->repo_id = column(row, desc, 6, context);
	m->revision = column(row, desc, 7, context);
	m->quantization = column(row, desc, 8, context);
	m->directory = column(row, desc, 9, context);
	m->local_path = column(row, desc, 10, context);
	m->status = column(row, desc, 11, context);
	m->error_code = column(row, desc, 12, context);
	m->error_message = column(row, desc, 13, context);
	m->trust_remote_code = DatumGetBool(SPI_getbinval(row, desc, 14, &isnull));
	bytes = SPI_getbinval(row, desc, 15, &isnull);
	m->disk_bytes = isnull ? -1 : DatumGetInt64(bytes);
	m->uncommitted = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(SPI_getbinval(row, desc, 16, &isnull)));
	return m;
}

int
millm_models_find(MillmModelKey key, MillmModel **models, int max)
{
	MillmRegistry r;
	Oid			type = key.name ? TEXTOID : INT8OID;
	Datum		value = key.name ? CStringGetTextDatum(key.name) : Int64GetDatum(key.id);
	SPIPlanPtr	plan;
	int			n;

	millm_registry_begin(&r);
	plan = SPI_prepare(key.name ? "SELECT " COLUMNS " FROM millm.registry WHERE name = $1 ORDER BY id"
					   : "SELECT " COLUMNS " FROM millm.registry WHERE id = $1", 1, &type);
	if (!plan || SPI_execute_snapshot(plan, &value, NULL, GetLatestSnapshot(), InvalidSnapshot, true, false, max) != SPI_OK_SELECT)
		elog(ERROR, "could not read millm.registry");
	n = (int) SPI_processed;
	for (int i = 0; i < n; i++)
		models[i] = read_model(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, r.caller);
	millm_registry_end(&r);
	return n;
}

MillmModel *
millm_model_require(MillmModelKey key)
{
	MillmModel *models[MAX_LISTED + 1];
	int			n = millm_models_find(key, models, lengthof(models));
	StringInfoData list;
	MillmError	err;

	if (n == 1)
		return models[0];
	if (n == 0)
	{
		if (key.name)
			millm_fail(&err, MILLM_E_MODEL_NOT_FOUND, "model \"%s\" does not exist", key.name);
		else
			millm_fail(&err, MILLM_E_MODEL_NOT_FOUND, "model with id " INT64_FORMAT " does not exist", key.id);
		millm_hint(&err, "The view millm.models lists the models; millm.download() adds one.");
		millm_ereport(ERROR, &err);
	}
	initStringInfo(&list);
	for (int i = 0; i < n && i < MAX_LISTED; i++)
		appendStringInfo(&list, "%s" INT64_FORMAT " (%s, %s)", i ? ", " : "", models[i]->id,
						 models[i]->repo_id ? models[i]->repo_id : models[i]->local_path, models[i]->quantization);
	millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the name \"%s\" is that of several models", key.name);
	millm_detail(&err, "They have the ids %s%s.", list.data, n > MAX_LISTED ? " and more" : "");
	millm_hint(&err, "Name the model by its id.");
	millm_ereport(ERROR, &err);
	return NULL;
}

void
millm_registry_lock(const char *what, LOCKMODE mode)
{
	uint64		hash = DatumGetUInt64(hash_any_extended((const unsigned char *) what, strlen(what), 0));
	LOCKTAG		tag;
	MillmError	err;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, (uint32) (hash >> 32), (uint32) hash, LOCK_CLASS);
	if (LockAcquire(&tag, mode, false, true) != LOCKACQUIRE_NOT_AVAIL)
		return;
	millm_fail(&err, MILLM_E_MODEL_BUSY, "another session is changing \"%s\" right now", what);
	millm_detail(&err, "Its transaction has not ended yet.");
	millm_hint(&err, "Try again when it has.");
	millm_ereport(ERROR, &err);
}

const char *
millm_canonical_quantization(const char *quantization)
{
	static const struct
	{
		const char *alias;
		const char *name;
	}			names[] = {
		{"FP16", "FP16"}, {"none", "FP16"},
		{"Q4", "Q4"}, {"nf4", "Q4"}, {"bnb-4bit", "Q4"},
		{"Q8", "Q8"}, {"int8", "Q8"}, {"bnb-8bit", "Q8"},
	};
	MillmError	err;

	for (int i = 0; i < (int) lengthof(names); i++)
		if (pg_strcasecmp(quantization, names[i].alias) == 0)
			return names[i].name;
	millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "invalid quantization \"%s\"", quantization);
	millm_hint(&err, "There are FP16 (also called none), Q4 (nf4, bnb-4bit) and Q8 (int8, bnb-8bit).");
	millm_ereport(ERROR, &err);
	return NULL;
}

const char *
millm_model_work(const MillmModel *m)
{
	return strcmp(m->source, "local") == 0 ? "quantization" : "download";
}
