/*
 * fn_memory.c -- what models take: estimate_memory(), memory(), cache_usage(); and architecture(), what one is made of.
 *
 * Figures of a model that is not loaded are the engine's, which opens the files as a load would; those of the disk are read there.
 */
#include "postgres.h"

#include <sys/stat.h>
#include <sys/statvfs.h>

#include "access/htup_details.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/tuplestore.h"

#include "compat.h"
#include "json.h"
#include "machine.h"
#include "ready.h"
#include "settings.h"
#include "shmem.h"

PG_FUNCTION_INFO_V1(millm_estimate_memory_id);
PG_FUNCTION_INFO_V1(millm_estimate_memory_name);
PG_FUNCTION_INFO_V1(millm_memory);
PG_FUNCTION_INFO_V1(millm_cache_usage);
PG_FUNCTION_INFO_V1(millm_architecture_id);
PG_FUNCTION_INFO_V1(millm_architecture_name);

#define INSPECT_MS	30000
#define DEVICES_MS	10000		/* the driver of many GPUs starts slowly */
#define MAX_DEPTH	8			/* of directories in the cache, where we make two */

/* --- estimate_memory ------------------------------------------------------------------------------ */

/* The columns of millm.estimate_memory(). */
enum
{
	EST_QUANTIZATION, EST_CONTEXT_LENGTH, EST_WEIGHTS, EST_KV_CACHE, EST_WORKSPACE, EST_TOTAL, EST_SAVED, EST_AVAILABLE, EST_FITS, EST_COLUMNS
};

/* millm.estimate_memory(model, quantization, context_length) RETURNS record; NULL: as it is, as the settings say. */
static Datum
estimate_memory(MillmModelKey key, FunctionCallInfo fcinfo)
{
	const char *quantization = PG_ARGISNULL(1) ? NULL : millm_canonical_quantization(text_to_cstring(PG_GETARG_TEXT_PP(1)));
	int			context_length = PG_ARGISNULL(2) ? 0 : PG_GETARG_INT32(2);
	Datum		values[EST_COLUMNS];
	bool		nulls[EST_COLUMNS] = {false};
	TupleDesc	desc;
	MillmEstimate plan;
	int64		total;

	millm_check_ready();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE || desc->natts != EST_COLUMNS)
		elog(ERROR, "millm.estimate_memory() has the wrong return type");
	if (!PG_ARGISNULL(2) && context_length < 1)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "context_length must be at least 1");
		millm_detail(&err, "It is %d.", context_length);
		millm_hint(&err, "Leave it out for the context that a load would have now.");
		millm_ereport(ERROR, &err);
	}
	millm_estimate_load(millm_model_directory(millm_model_require(key)), quantization, context_length, false, &plan);
	total = plan.weights_bytes + plan.kv_bytes + plan.workspace_bytes;
	values[EST_QUANTIZATION] = CStringGetTextDatum(plan.quantization);
	values[EST_CONTEXT_LENGTH] = Int32GetDatum(plan.context_length);
	values[EST_WEIGHTS] = Int64GetDatum(plan.weights_bytes);
	values[EST_KV_CACHE] = Int64GetDatum(plan.kv_bytes);
	values[EST_WORKSPACE] = Int64GetDatum(plan.workspace_bytes);
	values[EST_TOTAL] = Int64GetDatum(total);
	values[EST_SAVED] = Int64GetDatum(plan.fp16_weights_bytes - plan.weights_bytes);
	values[EST_AVAILABLE] = Int64GetDatum(plan.available_bytes);
	values[EST_FITS] = BoolGetDatum(total <= plan.available_bytes);
	nulls[EST_AVAILABLE] = nulls[EST_FITS] = plan.available_bytes < 0;
	return HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls));
}

Datum
millm_estimate_memory_id(PG_FUNCTION_ARGS)
{
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	return estimate_memory(millm_key_from_id(PG_GETARG_INT64(0)), fcinfo);
}

Datum
millm_estimate_memory_name(PG_FUNCTION_ARGS)
{
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	return estimate_memory(millm_key_from_name(PG_GETARG_TEXT_PP(0)), fcinfo);
}

/* --- memory --------------------------------------------------------------------------------------- */

/* The columns of millm.memory(). */
enum
{
	MEM_DEVICE, MEM_NAME, MEM_TOTAL, MEM_FREE, MEM_USED, MEM_CONTEXT, MEM_COLUMNS
};

/* A row; figures below 0 are not known. */
static void
put_device(ReturnSetInfo *rsinfo, const char *device, const char *name, int64 total, int64 free_bytes, int64 used, int64 context)
{
	const int64 figures[] = {[MEM_TOTAL] = total, [MEM_FREE] = free_bytes, [MEM_USED] = used, [MEM_CONTEXT] = context};
	Datum		values[MEM_COLUMNS] = {0};
	bool		nulls[MEM_COLUMNS] = {0};

	values[MEM_DEVICE] = CStringGetTextDatum(device);
	values[MEM_NAME] = CStringGetTextDatum(name);
	for (int i = MEM_TOTAL; i < MEM_COLUMNS; i++)
	{
		values[i] = Int64GetDatum(figures[i]);
		nulls[i] = figures[i] < 0;
	}
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

static int64
int_or_unknown(MillmJson object, const char *field)
{
	int64		n;

	return millm_json_get_int(object, field, &n) ? n : -1;
}

/*
 * millm.memory() RETURNS SETOF record: the machine's memory, then that of each GPU, which the engine knows.  What a model that is on a GPU has of the
 * machine's is not known.
 */
Datum
millm_memory(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	const MillmMachineMemory memory = millm_machine_memory("");
	char		loaded[sizeof(millm_shared->loaded_device)] = "cpu";
	MillmHelperStatus engine;
	StringInfoData reply;
	MillmJson	devices,
				device;
	int64		used = 0;
	bool		is_listed = false;

	millm_check_registry();
	millm_init_set(fcinfo);
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	if (millm_shared->is_loaded)
	{
		used = millm_shared->loaded_bytes;
		strlcpy(loaded, millm_shared->loaded_device, sizeof(loaded));
	}
	LWLockRelease(millm_shared->lock);
	put_device(rsinfo, "cpu", "RAM", memory.total_bytes, memory.available_bytes, strcmp(loaded, "cpu") == 0 ? used : -1, -1);

	millm_helper_status(MILLM_ENGINE, &engine);
	initStringInfo(&reply);
	if (strcmp(millm_device, "cpu") == 0 && strcmp(loaded, "cpu") == 0)
		return (Datum) 0;		/* the driver of a GPU that nobody wants is left alone */
	if (!millm_helper_ask(MILLM_ENGINE, &engine, "{\"op\":\"memory\"}", DEVICES_MS, &reply))
		resetStringInfo(&reply);
	if (!millm_json_get(millm_json(reply.data, reply.len), "devices", &devices))
		devices = millm_json("", 0);
	while (millm_json_next(&devices, &device))
	{
		const char *name = millm_json_get_string(device, "device");
		const char *title = millm_json_get_string(device, "name");
		bool		has_model = name && strcmp(name, loaded) == 0;

		if (!name || !title)
			continue;
		is_listed |= has_model;
		put_device(rsinfo, name, title, int_or_unknown(device, "total_bytes"), int_or_unknown(device, "free_bytes"), has_model ? used : 0,
				   int_or_unknown(device, "context_bytes"));
	}
	if (!is_listed && strcmp(loaded, "cpu") != 0)
		put_device(rsinfo, loaded, loaded, -1, -1, used, -1);	/* an engine that is too busy to say more */
	return (Datum) 0;
}

/* --- cache_usage ---------------------------------------------------------------------------------- */

/* What the files under path take, as their sizes say; < 0: there is no such directory.  Links are not followed. */
static int64
directory_bytes(const char *path, int depth)
{
	DIR		   *dir = AllocateDir(path);
	struct dirent *entry;
	int64		bytes = 0;

	if (!dir)
		return -1;
	while ((entry = ReadDirExtended(dir, path, LOG)) != NULL)
	{
		char	   *child = psprintf("%s/%s", path, entry->d_name);
		struct stat sb;

		CHECK_FOR_INTERRUPTS();
		/* a file may go away while we look */
		if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 && lstat(child, &sb) == 0)
		{
			if (S_ISREG(sb.st_mode))
				bytes += sb.st_size;
			else if (S_ISDIR(sb.st_mode) && depth < MAX_DEPTH)
				bytes += Max(0, directory_bytes(child, depth + 1));
		}
		pfree(child);
	}
	FreeDir(dir);
	return bytes;
}

/* The columns of millm.cache_usage(). */
enum
{
	USE_ID, USE_NAME, USE_QUANTIZATION, USE_DIRECTORY, USE_BYTES, USE_FREE, USE_COLUMNS
};

/*
 * millm.cache_usage() RETURNS SETOF record: first the cache as a whole, with what is free on its file system, then each model that has
 * a directory there.
 */
Datum
millm_cache_usage(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Datum		values[USE_COLUMNS] = {0};
	bool		nulls[USE_COLUMNS] = {true, true, true};
	MillmRegistry r;
	struct statvfs fs;
	char	   *cache;
	int64		bytes;

	millm_check_ready();
	millm_init_set(fcinfo);
	LWLockAcquire(millm_shared->lock, LW_SHARED);
	cache = pstrdup(millm_shared->cache_dir);
	LWLockRelease(millm_shared->lock);
	bytes = directory_bytes(cache, 0);
	values[USE_DIRECTORY] = CStringGetTextDatum(cache);
	values[USE_BYTES] = Int64GetDatum(Max(0, bytes));
	nulls[USE_FREE] = statvfs(cache, &fs) != 0;
	if (!nulls[USE_FREE])
		values[USE_FREE] = Int64GetDatum((int64) fs.f_bavail * (int64) fs.f_frsize);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);

	nulls[USE_FREE] = true;
	millm_registry_begin(&r);
	(void) millm_registry_execute("SELECT id, name, quantization, directory FROM millm.registry WHERE directory IS NOT NULL ORDER BY id",
								  0, NULL, NULL, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		HeapTuple	row = SPI_tuptable->vals[i];
		char	   *directory = psprintf("%s/%s", cache, SPI_getvalue(row, SPI_tuptable->tupdesc, 4));

		for (int k = USE_ID; k <= USE_QUANTIZATION; k++)
			values[k] = SPI_getbinval(row, SPI_tuptable->tupdesc, k + 1, &nulls[k]);
		bytes = directory_bytes(directory, 0);
		values[USE_DIRECTORY] = CStringGetTextDatum(directory);
		values[USE_BYTES] = Int64GetDatum(Max(0, bytes));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	millm_registry_end(&r);
	return (Datum) 0;
}

/* --- architecture --------------------------------------------------------------------------------- */

/* millm.architecture(model) RETURNS jsonb; STRICT */
static Datum
architecture(MillmModelKey key)
{
	StringInfoData buf;
	char	   *directory;

	millm_check_ready();
	directory = millm_model_directory(millm_model_require(key));
	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"inspect\",\"path\":");
	millm_json_append_string(&buf, directory, strlen(directory));
	appendStringInfoChar(&buf, '}');
	millm_client_call(MILLM_ENGINE, buf.data, &buf, INSPECT_MS);
	return DirectFunctionCall1(jsonb_in, CStringGetDatum(buf.data));
}

Datum
millm_architecture_id(PG_FUNCTION_ARGS)
{
	return architecture(millm_key_from_id(PG_GETARG_INT64(0)));
}

Datum
millm_architecture_name(PG_FUNCTION_ARGS)
{
	return architecture(millm_key_from_name(PG_GETARG_TEXT_PP(0)));
}
