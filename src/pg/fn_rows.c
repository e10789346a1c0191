/*
 * fn_rows.c -- many prompts of one session at once: generate(text[]), and generate_rows(query) for those of a query's rows.
 *
 * Both keep up to look_ahead requests under way (batch.h) and give answers in the order of the prompts.  All of a call are answered by one model:
 * the one that is loaded when it begins.
 *
 * generate_rows() is a value-per-call function.  Between its calls nothing of SPI is open but the query's portal, which is found again by its
 * name: it ends with the transaction, or when somebody closes it, and we with an error.  The connections live in the multi-call memory context.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/plancache.h"

#include "batch.h"
#include "client.h"
#include "compat.h"
#include "generate.h"
#include "json.h"
#include "live.h"
#include "settings.h"

PG_FUNCTION_INFO_V1(millm_generate_array);
PG_FUNCTION_INFO_V1(millm_generate_rows);

/* Of generate_rows, after those of generate. */
#define ARG_LOOK_AHEAD N_GENERATE_ARGS

enum {COLUMN_KEY, COLUMN_TEXT, COLUMN_ERROR, COLUMN_FINISH_REASON, COLUMN_PROMPT_TOKENS, COLUMN_CACHED_TOKENS, COLUMN_COMPLETION_TOKENS, N_COLUMNS};

/* While the engine computes one batch of sequences, the next one waits there for its place. */
static int
default_look_ahead(void)
{
	return Min(2 * millm_max_sequences, MILLM_MAX_LOOK_AHEAD);
}

/* What follows the prompt in each request of the call.  Without a model of the caller's choice, it is the loaded one from here on. */
static char *
options_of(FunctionCallInfo fcinfo)
{
	char	   *options = millm_generate_options(fcinfo, false);
	MillmLoadedModel loaded;

	if (!PG_ARGISNULL(ARG_OPTIONS + OPT_MODEL) || !millm_loaded_model(&loaded))
		return options;
	return psprintf("%s,\"model_uuid\":\"%s\"", options, loaded.uuid);
}

/* Write the whole request over what is in it. */
static void
write_request(StringInfo request, const char *prompt, size_t len, bool is_messages, const char *options)
{
	char	   *utf8 = pg_server_to_any(prompt, (int) len, PG_UTF8);

	if (utf8 != prompt)
		len = strlen(utf8);
	resetStringInfo(request);
	millm_begin_compute(request, "generate");
	appendStringInfo(request, ",\"%s\":", is_messages ? "messages" : "prompt");
	if (is_messages)
		appendBinaryStringInfo(request, utf8, (int) len);
	else
		millm_json_append_string(request, utf8, len);
	appendStringInfoString(request, options);
	appendStringInfoChar(request, '}');
}

/* Add a prompt of len bytes, or the JSON of a conversation; request is room to write in.  What is too long for any request fails there. */
static void
add_prompt(MillmBatch *batch, StringInfo request, const char *prompt, size_t len, bool is_messages, const char *options, const char *key)
{
	MillmError	err;

	if (len <= WIRE_MAX_REQUEST_BYTES)
	{
		write_request(request, prompt, len, is_messages, options);
		len = request->len;
	}
	if (len <= WIRE_MAX_REQUEST_BYTES)
		millm_batch_add(batch, request->data, key);
	else
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "text is too long for a request");
		millm_detail(&err, "It takes %zu bytes; at most %u are accepted.", len, WIRE_MAX_REQUEST_BYTES);
		millm_batch_add_failed(batch, &err, key);
	}
}

/* ---- generate(text[]) ------------------------------------------------------------------------ */

static void
report_prompt(const MillmError *error, int number)
{
	MillmError	err = *error;

	millm_detail(&err, "Prompt %d of the array is concerned.%s%s", number, error->detail[0] ? " " : "", error->detail);
	millm_ereport(ERROR, &err);
}

/* The answers, in a new array.  What each takes beside its text is freed as soon as it is there. */
static Datum *
generate_all(const Datum *prompts, const bool *nulls, int n, const char *options)
{
	MillmBatch *batch = millm_batch_create(default_look_ahead(), false);
	Datum	   *texts = palloc0(n * sizeof(Datum));
	MemoryContext scratch = AllocSetContextCreate(CurrentMemoryContext, "millm prompts", ALLOCSET_DEFAULT_SIZES);
	MemoryContext outer = MemoryContextSwitchTo(scratch);

	for (int added = 0, i = 0; i < n; i++)
	{
		StringInfoData request;
		MillmAnswer answer;

		initStringInfo(&request);
		for (; added < n && millm_batch_room(batch) > 0; added++)
			if (nulls[added])
				millm_batch_add(batch, NULL, NULL);
			else
			{
				text	   *prompt = DatumGetTextPP(prompts[added]);

				add_prompt(batch, &request, VARDATA_ANY(prompt), VARSIZE_ANY_EXHDR(prompt), false, options, NULL);
			}
		millm_batch_next(batch, &answer);
		if (answer.error)
		{
			millm_batch_close(batch);
			report_prompt(answer.error, i + 1);
		}
		if (answer.reply)
		{
			text	   *reply = millm_reply_text(answer.reply, "text");

			MemoryContextSwitchTo(outer);
			texts[i] = datumCopy(PointerGetDatum(reply), false, -1);
			MemoryContextSwitchTo(scratch);
		}
		MemoryContextReset(scratch);
	}
	MemoryContextSwitchTo(outer);
	MemoryContextDelete(scratch);
	return texts;
}

/* millm.generate(prompts text[], system, raw, ...) RETURNS text[]: of the same shape, NULL for NULL; a NULL array gives NULL without a call. */
Datum
millm_generate_array(PG_FUNCTION_ARGS)
{
	ArrayType  *array;
	Datum	   *prompts;
	Datum	   *texts;
	bool	   *nulls;
	int			n;

	millm_check_ready();
	if (PG_ARGISNULL(ARG_PROMPT))
		PG_RETURN_NULL();
	array = PG_GETARG_ARRAYTYPE_P(ARG_PROMPT);
	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &prompts, &nulls, &n);
	texts = generate_all(prompts, nulls, n, options_of(fcinfo));
	PG_RETURN_ARRAYTYPE_P(construct_md_array(texts, nulls, ARR_NDIM(array), ARR_DIMS(array), ARR_LBOUND(array), TEXTOID, -1, false, TYPALIGN_INT));
}

/* ---- generate_rows(query) -------------------------------------------------------------------- */

typedef struct Rows
{
	ExprContext *econtext;		/* whose end closes the query */
	char	   *portal;
	bool		is_exhausted;	/* the query has no more rows */
	bool		has_messages;	/* its second column is conversations, else prompts */
	char	   *options;
	MillmBatch *batch;
} Rows;

static void
connect_spi(void)
{
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
}

/* It is over before its last row: LIMIT, a closed cursor.  After an error the portal ends with the (sub)transaction. */
static void
close_query(Datum arg)
{
	Portal		portal = GetPortalByName(((Rows *) DatumGetPointer(arg))->portal);

	if (PortalIsValid(portal))
		SPI_cursor_close(portal);
}

/* A query that only reads, and nothing beside it. */
static void
check_select(SPIPlanPtr plan)
{
	List	   *sources = SPI_plan_get_plan_sources(plan);
	CachedPlanSource *source = list_length(sources) == 1 ? linitial(sources) : NULL;
	Query	   *query = source && list_length(source->query_list) == 1 ? linitial(source->query_list) : NULL;

	if (!query || query->commandType != CMD_SELECT || query->hasModifyingCTE || query->rowMarks != NIL)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "the query of generate_rows must be a single SELECT that only reads", NULL,
					 "Write SELECT key, prompt FROM ..., without FOR UPDATE and without INSERT, UPDATE or DELETE.");
}

/* Key and prompt: true when the latter is a conversation. */
static bool
check_columns(TupleDesc columns)
{
	char		category;
	bool		is_preferred;
	Oid			type;

	if (columns->natts != 2)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "the query of generate_rows must have two columns: key and prompt",
					 psprintf("It has %d.", columns->natts), NULL);
	type = getBaseType(TupleDescAttr(columns, 1)->atttypid);
	if (type == JSONBOID || type == JSONOID)
		return true;
	get_type_category_preferred(type, &category, &is_preferred);
	if (category != TYPCATEGORY_STRING)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "the second column of generate_rows' query must be text, or jsonb messages",
					 psprintf("It is %s.", format_type_be(TupleDescAttr(columns, 1)->atttypid)), "Cast it to text.");
	return false;
}

/* In the multi-call memory context. */
static Rows *
open_rows(FunctionCallInfo fcinfo)
{
	Rows	   *rows = palloc0(sizeof(Rows));
	MemoryContext context = CurrentMemoryContext;
	int			look_ahead = PG_ARGISNULL(ARG_LOOK_AHEAD) ? default_look_ahead() : PG_GETARG_INT32(ARG_LOOK_AHEAD);
	char	   *query = text_to_cstring(PG_GETARG_TEXT_PP(0));
	SPIPlanPtr	plan;
	Portal		portal;

	if (look_ahead < 1 || look_ahead > MILLM_MAX_LOOK_AHEAD)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "look_ahead is out of range",
					 psprintf("It is %d; 1 to %d are accepted.", look_ahead, MILLM_MAX_LOOK_AHEAD), NULL);
	rows->options = options_of(fcinfo);
	rows->batch = millm_batch_create(look_ahead, true);

	connect_spi();
	plan = SPI_prepare_cursor(query, 0, NULL, CURSOR_OPT_NO_SCROLL);
	if (!plan)
		elog(ERROR, "could not prepare the query of generate_rows: %s", SPI_result_code_string(SPI_result));
	check_select(plan);
	/* read-only: it sees what the calling statement sees */
	portal = SPI_cursor_open(NULL, plan, NULL, NULL, true);
	rows->has_messages = check_columns(portal->tupDesc);
	rows->portal = MemoryContextStrdup(context, portal->name);
	SPI_finish();

	if (rows->has_messages && !PG_ARGISNULL(ARG_SYSTEM))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "messages have their own system message", NULL, "Write it into the messages, or give prompts as text.");
	if (rows->has_messages && !PG_ARGISNULL(ARG_RAW) && PG_GETARG_BOOL(ARG_RAW))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "messages cannot be raw", NULL, "Give prompts as text.");
	rows->econtext = ((ReturnSetInfo *) fcinfo->resultinfo)->econtext;
	RegisterExprContextCallback(rows->econtext, close_query, PointerGetDatum(rows));
	return rows;
}

/* Read rows, one by one because each may be large, while the batch has room, and make requests of them. */
static void
read_rows(Rows *rows)
{
	StringInfoData request;
	Portal		portal;

	if (rows->is_exhausted || millm_batch_room(rows->batch) == 0)
		return;
	connect_spi();
	portal = SPI_cursor_find(rows->portal);
	if (!portal)
		ereport(ERROR, (errcode(ERRCODE_INVALID_CURSOR_STATE), errmsg("the query of generate_rows was closed before its end")));
	initStringInfo(&request);
	while (millm_batch_room(rows->batch) > 0)
	{
		char	   *key;
		char	   *prompt;

		SPI_cursor_fetch(portal, true, 1);
		rows->is_exhausted = SPI_processed == 0;
		if (rows->is_exhausted)
			break;
		key = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
		prompt = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2);
		if (prompt)
			add_prompt(rows->batch, &request, prompt, strlen(prompt), rows->has_messages, rows->options, key);
		else
			millm_batch_add(rows->batch, NULL, key);
		if (key)
			pfree(key);
		if (prompt)
			pfree(prompt);
		SPI_freetuptable(SPI_tuptable);
	}
	SPI_finish();
}

/* A failure of one row, which the others have no part in. */
static bool
is_of_row(MillmCode code)
{
	return code == MILLM_E_INVALID_ARGUMENT || code == MILLM_E_CONTEXT_LENGTH_EXCEEDED || code == MILLM_E_UNSUPPORTED;
}

static void
set_text(Datum *values, bool *nulls, int column, const char *value)
{
	nulls[column] = !value;
	values[column] = value ? CStringGetTextDatum(value) : (Datum) 0;
}

static void
set_count(Datum *values, bool *nulls, int column, MillmJson usage, const char *field)
{
	int64		n;

	nulls[column] = !millm_json_get_int(usage, field, &n);
	values[column] = nulls[column] ? (Datum) 0 : Int32GetDatum((int32) n);
}

static Datum
row_of(TupleDesc desc, const MillmAnswer *answer)
{
	Datum		values[N_COLUMNS] = {0};
	bool		nulls[N_COLUMNS];
	MillmJson	reply;
	MillmJson	usage;

	memset(nulls, true, sizeof(nulls));
	set_text(values, nulls, COLUMN_KEY, answer->key);
	if (answer->error)
		set_text(values, nulls, COLUMN_ERROR, psprintf("%s: %s%s%s", millm_code_name(answer->error->code), answer->error->message,
													   answer->error->detail[0] ? ". " : "", answer->error->detail));
	if (answer->reply)
	{
		reply = millm_json(answer->reply->data, answer->reply->len);
		nulls[COLUMN_TEXT] = false;
		values[COLUMN_TEXT] = PointerGetDatum(millm_reply_text(answer->reply, "text"));
		set_text(values, nulls, COLUMN_FINISH_REASON, millm_json_get_string(reply, "finish_reason"));
		if (!millm_json_get(reply, "usage", &usage))
			millm_reply_invalid("usage");
		set_count(values, nulls, COLUMN_PROMPT_TOKENS, usage, "prompt_tokens");
		set_count(values, nulls, COLUMN_CACHED_TOKENS, usage, "cached_tokens");
		set_count(values, nulls, COLUMN_COMPLETION_TOKENS, usage, "completion_tokens");
	}
	return HeapTupleGetDatum(heap_form_tuple(desc, values, nulls));
}

/* The next row, or false: there is none. */
static bool
next_row(Rows *rows, TupleDesc desc, Datum *row)
{
	MillmAnswer answer;

	PG_TRY();
	{
		read_rows(rows);
	}
	PG_CATCH();
	{
		millm_batch_close(rows->batch);
		PG_RE_THROW();
	}
	PG_END_TRY();
	if (millm_batch_count(rows->batch) == 0)
		return false;
	millm_batch_next(rows->batch, &answer);
	if (answer.error && !is_of_row(answer.error->code))
	{
		millm_batch_close(rows->batch);
		millm_ereport(ERROR, answer.error);
	}
	*row = row_of(desc, &answer);
	return true;
}

/* millm.generate_rows(query text, system, raw, ..., look_ahead) RETURNS SETOF record, one for each row of the query; no rows for a NULL query. */
Datum
millm_generate_rows(PG_FUNCTION_ARGS)
{
	FuncCallContext *call;
	Rows	   *rows;
	Datum		row;

	if (SRF_IS_FIRSTCALL())
	{
		MemoryContext old;

		millm_check_ready();
		call = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		if (get_call_result_type(fcinfo, NULL, &call->tuple_desc) != TYPEFUNC_COMPOSITE)
			elog(ERROR, "return type must be a row type");
		BlessTupleDesc(call->tuple_desc);
		if (!PG_ARGISNULL(0))
			call->user_fctx = open_rows(fcinfo);
		MemoryContextSwitchTo(old);
	}
	call = SRF_PERCALL_SETUP();
	rows = call->user_fctx;
	if (!rows)
		SRF_RETURN_DONE(call);
	if (next_row(rows, call->tuple_desc, &row))
		SRF_RETURN_NEXT(call, row);
	close_query(PointerGetDatum(rows));
	UnregisterExprContextCallback(rows->econtext, close_query, PointerGetDatum(rows));
	SRF_RETURN_DONE(call);
}
