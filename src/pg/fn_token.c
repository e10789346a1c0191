/*
 * fn_token.c -- text to token ids and back, by the loaded model's tokenizer.
 *
 * All are STABLE (another model may be loaded tomorrow) and STRICT: one question to the engine, which answers while it generates.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "client.h"
#include "json.h"
#include "live.h"

PG_FUNCTION_INFO_V1(millm_tokenize);
PG_FUNCTION_INFO_V1(millm_detokenize);
PG_FUNCTION_INFO_V1(millm_count_tokens);

/* {"ids":[...]} as an int[] with lower bound 1. */
static ArrayType *
reply_ids(StringInfo reply)
{
	MillmJson	rest;
	MillmJson	element;
	int64		id;
	int			n = 0;
	int			size = 64;
	Datum	   *ids = palloc(size * sizeof(Datum));

	if (!millm_json_get(millm_json(reply->data, reply->len), "ids", &rest))
		millm_reply_invalid("ids");
	while (millm_json_next(&rest, &element))
	{
		if (!millm_json_int(element, &id) || id < 0 || id > PG_INT32_MAX)
			millm_reply_invalid("ids");
		if (n == size)
		{
			size *= 2;
			ids = repalloc(ids, size * sizeof(Datum));
		}
		ids[n++] = Int32GetDatum((int32) id);
	}
	return construct_array(ids, n, INT4OID, sizeof(int32), true, TYPALIGN_INT);
}

/* millm.tokenize(text, add_special bool, parse_special bool) RETURNS int[] */
Datum
millm_tokenize(PG_FUNCTION_ARGS)
{
	StringInfoData buf;

	millm_check_ready();
	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"tokenize\",\"text\":");
	millm_append_text(&buf, PG_GETARG_TEXT_PP(0));
	appendStringInfo(&buf, ",\"add_special\":%s,\"parse_special\":%s}", PG_GETARG_BOOL(1) ? "true" : "false", PG_GETARG_BOOL(2) ? "true" : "false");
	millm_client_call(MILLM_ENGINE, buf.data, &buf, -1);
	PG_RETURN_ARRAYTYPE_P(reply_ids(&buf));
}

/* millm.detokenize(int[]) RETURNS text.  An array of any number of dimensions is read in storage order. */
Datum
millm_detokenize(PG_FUNCTION_ARGS)
{
	ArrayType  *array = PG_GETARG_ARRAYTYPE_P(0);
	int			n = ArrayGetNItems(ARR_NDIM(array), ARR_DIMS(array));
	const int32 *ids = (const int32 *) ARR_DATA_PTR(array);
	StringInfoData buf;

	millm_check_ready();
	if (array_contains_nulls(array))
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "token ids must not be null");
		millm_ereport(ERROR, &err);
	}
	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"detokenize\",\"ids\":[");
	for (int i = 0; i < n; i++)
		appendStringInfo(&buf, "%s%d", i ? "," : "", ids[i]);
	appendStringInfoString(&buf, "]}");
	millm_client_call(MILLM_ENGINE, buf.data, &buf, -1);
	PG_RETURN_TEXT_P(millm_reply_text(&buf, "text"));
}

/* millm.count_tokens(text, for_embedding) RETURNS int: the length of tokenize()'s array, or how many tokens embed() reads */
Datum
millm_count_tokens(PG_FUNCTION_ARGS)
{
	StringInfoData buf;
	int64		count;

	millm_check_ready();
	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"count_tokens\",\"text\":");
	millm_append_text(&buf, PG_GETARG_TEXT_PP(0));
	appendStringInfo(&buf, ",\"for_embedding\":%s}", PG_GETARG_BOOL(1) ? "true" : "false");
	millm_client_call(MILLM_ENGINE, buf.data, &buf, -1);
	if (!millm_json_get_int(millm_json(buf.data, buf.len), "count", &count) || count < 0 || count > PG_INT32_MAX)
		millm_reply_invalid("count");
	PG_RETURN_INT32((int32) count);
}
