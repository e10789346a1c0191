/*
 * fn_load.c -- load() and unload(): act at once, whatever becomes of the transaction.
 *
 * A load belongs to the server: the session that asked may be canceled or go away, the load goes on.
 */
#include "postgres.h"

#include "fmgr.h"
#include "storage/fd.h"
#include "utils/builtins.h"

#include "command.h"
#include "interval.h"
#include "registry.h"

PG_FUNCTION_INFO_V1(millm_load_id);
PG_FUNCTION_INFO_V1(millm_load_name);
PG_FUNCTION_INFO_V1(millm_unload);

/* What the kernel says that new memory, page cache included, can still take; < 0: it does not say. */
static int64
available_memory(void)
{
	FILE	   *f = AllocateFile("/proc/meminfo", "r");
	char		line[256];
	long long	kb = -1;

	while (f && kb < 0 && fgets(line, sizeof(line), f))
		if (sscanf(line, "MemAvailable: %lld kB", &kb) != 1)
			kb = -1;
	if (f)
		FreeFile(f);
	return kb < 0 ? -1 : (int64) kb * 1024;
}

/* Refuse what cannot fit, before the model now loaded is touched. */
static void
check_memory(const MillmModel *m)
{
	int64		available = available_memory();
	MillmError	err;

	if (available < 0 || m->disk_bytes <= available)
		return;
	millm_fail(&err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory for model \"%s\"", m->name);
	millm_detail(&err, "Its weights need %.1f GB, only %.1f GB are available.", m->disk_bytes / 1e9, available / 1e9);
	millm_hint(&err, "Free memory, use a smaller model, or load it anyway with force => true.");
	millm_ereport(ERROR, &err);
}

static void
check_loadable(const MillmModel *m)
{
	MillmError	err;

	if (m->uncommitted)
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_READY, "model \"%s\" is not committed yet", m->name);
		millm_hint(&err, "COMMIT first: a load does not wait for the transaction's end.");
	}
	else if (strcmp(m->status, "pending") == 0)
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_READY, "%s of model \"%s\" has not ended yet", millm_model_work(m), m->name);
		millm_hint(&err, "Wait for it with millm.wait().");
	}
	else if (strcmp(m->status, "error") == 0)
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_READY, "%s of model \"%s\" has failed", millm_model_work(m), m->name);
		millm_detail(&err, "%s: %s", m->error_code, m->error_message);
		millm_hint(&err, "Try again with millm.retry().");
	}
	else
		return;
	millm_ereport(ERROR, &err);
}

static Datum
load(MillmModelKey key, bool force, bool wait)
{
	MillmModel *m;
	MillmLoadedModel model;
	MillmError	err;
	uint64		number;
	char	   *path;

	millm_check_ready();
	m = millm_model_require(key);
	check_loadable(m);
	if (!force)
		check_memory(m);
	if (m->directory)
		path = psprintf("%s/%s", millm_shared->cache_dir, m->directory);
	else
		path = m->local_path;
	model.id = m->id;
	strlcpy(model.name, m->name, sizeof(model.name));
	strlcpy(model.uuid, m->uuid, sizeof(model.uuid));
	if (millm_command_load(&model, path, &number, &err) != MILLM_OK)
		millm_ereport(ERROR, &err);
	if (!wait)
		return CStringGetTextDatum("loading");
	millm_command_wait(number);
	return CStringGetTextDatum("loaded");
}

/* millm.load(model, force, wait) RETURNS text; STRICT */
Datum
millm_load_id(PG_FUNCTION_ARGS)
{
	return load(millm_key_from_id(PG_GETARG_INT64(0)), PG_GETARG_BOOL(1), PG_GETARG_BOOL(2));
}

Datum
millm_load_name(PG_FUNCTION_ARGS)
{
	return load(millm_key_from_name(PG_GETARG_TEXT_PP(0)), PG_GETARG_BOOL(1), PG_GETARG_BOOL(2));
}

/* millm.unload(timeout interval) RETURNS void; NULL is millm.unload_timeout. */
Datum
millm_unload(PG_FUNCTION_ARGS)
{
	MillmError	err;
	uint64		number;

	millm_check_ready();
	if (millm_command_unload(PG_ARGISNULL(0) ? -1 : millm_interval_ms(PG_GETARG_INTERVAL_P(0)), &number, &err) != MILLM_OK)
		millm_ereport(ERROR, &err);
	millm_command_wait(number);
	PG_RETURN_VOID();
}
