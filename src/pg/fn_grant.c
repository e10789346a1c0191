/*
 * fn_grant.c -- grant_user() and grant_admin(): what each kind of role needs, in one call.
 *
 * The GRANTs run as the caller, so only who may grant these privileges can.
 */
#include "postgres.h"

#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"

#include "registry.h"

PG_FUNCTION_INFO_V1(millm_grant_user);
PG_FUNCTION_INFO_V1(millm_grant_admin);

#define USER_FUNCTIONS "generate,generate_stream,generate_rows,chat,chat_stream,complete,complete_stream,apply_chat_template,embed,logprobs,perplexity,classify,tokenize,detokenize,count_tokens,status,stat_list,loaded_model,memory,estimate_memory,architecture,cache_usage,live,error_list"
#define ADMIN_FUNCTIONS USER_FUNCTIONS ",preview,download,register_local,wait,cancel,retry,delete,load,unload,stat_reset,create_api_key,revoke_api_key"
#define USER_VIEWS "millm.models,millm.progress,millm.errors,millm.stat_generate"
#define ADMIN_VIEWS USER_VIEWS ",millm.api_keys"

static void
execute(const char *sql)
{
	int			rc = SPI_execute(sql, false, 0);

	if (rc < 0)
		elog(ERROR, "could not execute \"%s\": %s", sql, SPI_result_code_string(rc));
}

static void
grant(Oid role, const char *functions, const char *views)
{
	const char *grantee = quote_identifier(GetUserNameFromId(role, false));
	int			guc_level = NewGUCNestLevel();
	uint64		n;
	char	  **statements;

	(void) set_config_option("search_path", MILLM_SAFE_PATH, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	execute(psprintf("SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname = ANY (string_to_array('%s', ','))",
					 functions));
	n = SPI_processed;
	statements = palloc(n * sizeof(char *));
	for (uint64 i = 0; i < n; i++)
		statements[i] = psprintf("GRANT EXECUTE ON FUNCTION %s TO %s", SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1), grantee);
	for (uint64 i = 0; i < n; i++)
		execute(statements[i]);
	execute(psprintf("GRANT USAGE ON SCHEMA millm TO %s", grantee));
	execute(psprintf("GRANT SELECT ON %s TO %s", views, grantee));
	SPI_finish();
	AtEOXact_GUC(true, guc_level);
}

/* millm.grant_user(role regrole) RETURNS void; STRICT */
Datum
millm_grant_user(PG_FUNCTION_ARGS)
{
	grant(PG_GETARG_OID(0), USER_FUNCTIONS, USER_VIEWS);
	PG_RETURN_VOID();
}

/* millm.grant_admin(role regrole) RETURNS void; STRICT */
Datum
millm_grant_admin(PG_FUNCTION_ARGS)
{
	grant(PG_GETARG_OID(0), ADMIN_FUNCTIONS, ADMIN_VIEWS);
	PG_RETURN_VOID();
}
