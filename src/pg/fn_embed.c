/*
 * fn_embed.c -- the loaded model's embeddings: embed(text), and embed(text[]) row by row.
 *
 * Both are STABLE and not STRICT, for the model may be left out.  An array goes to the engine in slices (text_array.h), one request after the
 * other.  Closing the connection cancels, as everywhere (client.h).
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "client.h"
#include "live.h"
#include "text_array.h"

PG_FUNCTION_INFO_V1(millm_embed);
PG_FUNCTION_INFO_V1(millm_embed_array);

/* Begin an embed request, its texts still to be written. */
static void
begin_request(StringInfo request, FunctionCallInfo fcinfo)
{
	initStringInfo(request);
	millm_begin_compute(request, "embed");
	if (!PG_ARGISNULL(1))
		millm_append_model(request, PG_GETARG_TEXT_PP(1));
}

/* The next VECTOR as a real[] with lower bound 1. */
static Datum
receive_embedding(MillmClient *client)
{
	StringInfoData values;
	Datum	   *elements;
	int			n;

	initStringInfo(&values);
	if (millm_client_receive(client, &values, -1) != WIRE_VECTOR || values.len == 0 || values.len % sizeof(float4) != 0)
		millm_reply_invalid("vector");
	n = values.len / sizeof(float4);
	elements = palloc(n * sizeof(Datum));
	for (int i = 0; i < n; i++)
	{
		float4		value;

		memcpy(&value, values.data + i * sizeof(value), sizeof(value));
		elements[i] = Float4GetDatum(value);
	}
	return PointerGetDatum(construct_array(elements, n, FLOAT4OID, sizeof(float4), true, TYPALIGN_INT));
}

/* The end of the conversation, after the last vector. */
static void
receive_end(MillmClient *client)
{
	StringInfoData rest;

	initStringInfo(&rest);
	if (millm_client_receive(client, &rest, -1) != WIRE_RESULT)
		millm_reply_invalid("end");
	millm_client_close(client);
}

/* millm.embed(text, model text) RETURNS real[]; a NULL text gives NULL without a call. */
Datum
millm_embed(PG_FUNCTION_ARGS)
{
	StringInfoData request;
	MillmClient *client;
	Datum		embedding;

	millm_check_ready();
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	begin_request(&request, fcinfo);
	appendStringInfoString(&request, ",\"texts\":[");
	millm_append_text(&request, PG_GETARG_TEXT_PP(0));
	appendStringInfoString(&request, "]}");
	client = millm_compute_open(request.data);
	embedding = receive_embedding(client);
	receive_end(client);
	PG_RETURN_DATUM(embedding);
}

typedef struct EmbedArray
{
	MillmTextArray array;
	MillmClient *client;		/* on its slice; NULL: on none */
} EmbedArray;

static void
open_slice(EmbedArray *e, FunctionCallInfo fcinfo)
{
	StringInfoData request;

	begin_request(&request, fcinfo);
	millm_text_array_slice(&e->array, &request);
	appendStringInfoChar(&request, '}');
	e->client = millm_compute_open(request.data);
	pfree(request.data);
}

/*
 * millm.embed(texts text[], model text) RETURNS SETOF real[]: a row per element, in storage order, NULL for NULL; no rows for a NULL array.
 *
 * The connection lives in the call's multi-call context, as fn_generate.c's streams do.
 */
Datum
millm_embed_array(PG_FUNCTION_ARGS)
{
	FuncCallContext *call;
	EmbedArray *e;
	MillmTextArray *a;
	Datum		embedding;

	if (SRF_IS_FIRSTCALL())
	{
		MemoryContext old;

		millm_check_ready();
		call = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		call->user_fctx = e = palloc0(sizeof(EmbedArray));
		millm_text_array_init(&e->array, PG_ARGISNULL(0) ? NULL : PG_GETARG_ARRAYTYPE_P_COPY(0));
		MemoryContextSwitchTo(old);
	}
	call = SRF_PERCALL_SETUP();
	e = call->user_fctx;
	a = &e->array;
	if (a->at == a->n)
		SRF_RETURN_DONE(call);
	if (a->nulls[a->at])
	{
		a->at++;
		SRF_RETURN_NEXT_NULL(call);
	}
	if (!e->client)
	{
		MemoryContext old = MemoryContextSwitchTo(call->multi_call_memory_ctx);

		open_slice(e, fcinfo);
		MemoryContextSwitchTo(old);
	}
	embedding = receive_embedding(e->client);
	if (++a->at == a->slice_end)
	{
		receive_end(e->client);
		e->client = NULL;
	}
	SRF_RETURN_NEXT(call, embedding);
}
