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
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "client.h"

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
	(void) set_config_option("search_path", "pg_catalog", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
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

MillmModel *
millm_model_find(MillmModelKey key)
{
	MillmRegistry r;
	MillmModel *m = NULL;
	Oid			type = key.name ? TEXTOID : INT8OID;
	Datum		value = key.name ? CStringGetTextDatum(key.name) : Int64GetDatum(key.id);
	SPIPlanPtr	plan;

	millm_registry_begin(&r);
	plan = SPI_prepare(key.name ? "SELECT " COLUMNS " FROM millm.registry WHERE name = $1"
					   : "SELECT " COLUMNS " FROM millm.registry WHERE id = $1", 1, &type);
	if (!plan || SPI_execute_snapshot(plan, &value, NULL, GetLatestSnapshot(), InvalidSnapshot, true, false, 1) != SPI_OK_SELECT)
		elog(ERROR, "could not read millm.registry");
	if (SPI_processed == 1)
	{
		HeapTuple	row = SPI_tuptable->vals[0];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		bool		isnull;
		Datum		bytes;

		m = MemoryContextAllocZero(r.caller, sizeof(*m));
		m->id = DatumGetInt64(SPI_getbinval(row, desc, 1, &isnull));
		m->uuid = column(row, desc, 2, r.caller);
		m->attempt = DatumGetInt32(SPI_getbinval(row, desc, 3, &isnull));
		m->name = column(row, desc, 4, r.caller);
		m->source = column(row, desc, 5, r.caller);
		m->repo_id = column(row, desc, 6, r.caller);
		m->revision = column(row, desc, 7, r.caller);
		m->quantization = column(row, desc, 8, r.caller);
		m->directory = column(row, desc, 9, r.caller);
		m->local_path = column(row, desc, 10, r.caller);
		m->status = column(row, desc, 11, r.caller);
		m->error_code = column(row, desc, 12, r.caller);
		m->error_message = column(row, desc, 13, r.caller);
		m->trust_remote_code = DatumGetBool(SPI_getbinval(row, desc, 14, &isnull));
		bytes = SPI_getbinval(row, desc, 15, &isnull);
		m->disk_bytes = isnull ? -1 : DatumGetInt64(bytes);
		m->uncommitted = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(SPI_getbinval(row, desc, 16, &isnull)));
	}
	millm_registry_end(&r);
	return m;
}

MillmModel *
millm_model_require(MillmModelKey key)
{
	MillmModel *m = millm_model_find(key);
	MillmError	err;

	if (m)
		return m;
	if (key.name)
		millm_fail(&err, MILLM_E_MODEL_NOT_FOUND, "model \"%s\" does not exist", key.name);
	else
		millm_fail(&err, MILLM_E_MODEL_NOT_FOUND, "model with id " INT64_FORMAT " does not exist", key.id);
	millm_hint(&err, "The view millm.models lists the models; millm.download() adds one.");
	millm_ereport(ERROR, &err);
	return NULL;
}

const char *
millm_model_work(const MillmModel *m)
{
	return strcmp(m->source, "local") == 0 ? "quantization" : "download";
}
