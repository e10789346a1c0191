/*
 * fn_load.c -- load() and unload(): act at once, whatever becomes of the transaction.
 *
 * A load belongs to the server: the session that asked may be canceled or go away, the load goes on.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"

#include "command.h"
#include "interval.h"
#include "ready.h"

PG_FUNCTION_INFO_V1(millm_load_id);
PG_FUNCTION_INFO_V1(millm_load_name);
PG_FUNCTION_INFO_V1(millm_unload);

static Datum
load(MillmModelKey key, bool force, bool wait)
{
	MillmModel *m;
	MillmLoadedModel model;
	MillmEstimate plan;
	MillmError	err;
	uint64		number;
	char	   *path;

	millm_check_ready();
	m = millm_model_require(key);
	path = millm_model_directory(m);
	/* before the model now loaded is touched */
	if (!force)
		millm_estimate_load(path, NULL, 0, true, &plan);
	model.id = m->id;
	strlcpy(model.name, m->name, sizeof(model.name));
	strlcpy(model.uuid, m->uuid, sizeof(model.uuid));
	if (millm_command_load(&model, path, force, &number, &err) != MILLM_OK)
		millm_ereport(ERROR, &err);
	if (!wait)
		return CStringGetTextDatum("loading");
	(void) millm_command_wait(number, false);
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
	(void) millm_command_wait(number, true);
	PG_RETURN_VOID();
}
