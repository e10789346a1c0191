/*
 * fn_preview.c -- preview(): what a repository of the Hub holds, before it is downloaded.
 *
 * Nothing is written, here or by millm-hub; the question ends with the statement that asks it.  For those who may download: it makes the
 * server ask the network, with the server's own access token when none is given.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "json.h"
#include "live.h"
#include "settings.h"

PG_FUNCTION_INFO_V1(millm_preview);

#define PREVIEW_MS	20000
#define ANSWER_MS	(PREVIEW_MS + 5000)	/* millm-hub's share, and the helper's on top of it */

/* {"op":"preview"...; value is in UTF-8, as the database is. */
static void
append_field(StringInfo request, const char *name, const char *value)
{
	appendStringInfo(request, ",\"%s\":", name);
	millm_json_append_string(request, value, strlen(value));
}

static char *
text_argument(FunctionCallInfo fcinfo, int arg)
{
	return PG_ARGISNULL(arg) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(arg));
}

/*
 * millm.preview(repo_id, hf_token, revision) RETURNS jsonb
 *
 * NULL for the token: the server's own, if it has one; for the revision: main.
 */
Datum
millm_preview(PG_FUNCTION_ARGS)
{
	char	   *repo_id = text_argument(fcinfo, 0);
	char	   *token = text_argument(fcinfo, 1);
	char	   *revision = text_argument(fcinfo, 2);
	ErrorContextCallback secret;
	StringInfoData request;
	StringInfoData reply;
	MillmError	err;

	if (!repo_id)
		PG_RETURN_NULL();
	millm_hide_statement(&secret, token != NULL);
	millm_check_ready();
	if (token && !token[0])
	{
		millm_fail(&err, MILLM_E_INVALID_HF_TOKEN, "hf_token is empty");
		millm_hint(&err, "Leave it out to use the server's own, if it has one.");
		millm_ereport(ERROR, &err);
	}
	if (!token)
		token = millm_effective_token();
	initStringInfo(&request);
	appendStringInfo(&request, "{\"op\":\"preview\",\"timeout_ms\":%d", PREVIEW_MS);
	append_field(&request, "endpoint", millm_effective_endpoint());
	append_field(&request, "repo_id", repo_id);
	if (revision)
		append_field(&request, "revision", revision);
	if (token)
		append_field(&request, "token", token);
	appendStringInfoChar(&request, '}');
	initStringInfo(&reply);
	millm_client_call(MILLM_HUB, request.data, &reply, ANSWER_MS);
	error_context_stack = secret.previous;
	PG_RETURN_DATUM(DirectFunctionCall1(jsonb_in, CStringGetDatum(reply.data)));
}
