/*
 * fn_generate.c -- text from the loaded model: generate(), chat() and complete() whole, their streams piece by piece.
 *
 * All are VOLATILE and not STRICT.  chat()'s and complete()'s values are the engine's replies, which are JSON already.  Whatever ends the query ends the generation inside the engine, because it closes
 * the connection (client.h).  The stream is a value-per-call function: in a SELECT list each row leaves for the client before
 * we wait for the next.
 */
#include "postgres.h"

#include <math.h>

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/numeric.h"

#include "client.h"
#include "generate.h"
#include "json.h"
#include "live.h"

PG_FUNCTION_INFO_V1(millm_generate);
PG_FUNCTION_INFO_V1(millm_generate_stream);
PG_FUNCTION_INFO_V1(millm_chat);
PG_FUNCTION_INFO_V1(millm_chat_text);
PG_FUNCTION_INFO_V1(millm_chat_stream);
PG_FUNCTION_INFO_V1(millm_complete);
PG_FUNCTION_INFO_V1(millm_complete_stream);
PG_FUNCTION_INFO_V1(millm_apply_chat_template);

/* Arguments of chat and complete in a row, counted from the first of them. */
enum
{
	CHOICES_N, CHOICES_LOGPROBS, CHOICES_TOP_LOGPROBS, CHOICES_LOGIT_BIAS
};

/* Those of chat and chat_stream.  Of chat(text), messages is the prompt. */
enum
{
	ARG_MESSAGES, ARG_TOOLS, ARG_TEMPLATE_KWARGS, ARG_CHAT_OPTIONS, ARG_DOCUMENTS = ARG_CHAT_OPTIONS + N_OPTIONS, ARG_CHAT_TEMPLATE, ARG_CHAT_CHOICES
};

/* Of complete and complete_stream; the prompt as of generate. */
enum
{
	ARG_COMPLETE_OPTIONS = 1, ARG_COMPLETE_PARSE_SPECIAL = ARG_COMPLETE_OPTIONS + N_OPTIONS, ARG_COMPLETE_CHOICES
};

/* And those of apply_chat_template: as of chat up to template_kwargs. */
enum
{
	ARG_ADD_GENERATION_PROMPT = ARG_TEMPLATE_KWARGS + 1, ARG_APPLY_DOCUMENTS, ARG_APPLY_CHAT_TEMPLATE, ARG_APPLY_MODEL
};

/* The numeric options; NULL leaves the choice to the engine, which also knows each range. */
static const struct
{
	int			option;
	const char *name;
	Oid			type;
}			numbers[] = {
	{OPT_MAX_TOKENS, "max_tokens", INT4OID},
	{OPT_TEMPERATURE, "temperature", FLOAT8OID},
	{OPT_TOP_P, "top_p", FLOAT8OID},
	{OPT_TOP_K, "top_k", INT4OID},
	{OPT_MIN_P, "min_p", FLOAT8OID},
	{OPT_REPETITION_PENALTY, "repetition_penalty", FLOAT8OID},
	{OPT_FREQUENCY_PENALTY, "frequency_penalty", FLOAT8OID},
	{OPT_PRESENCE_PENALTY, "presence_penalty", FLOAT8OID},
	{OPT_SEED, "seed", INT8OID},
};

static void
append_number(StringInfo request, const char *name, Oid type, Datum value)
{
	appendStringInfo(request, ",\"%s\":", name);
	if (type == INT4OID)
		appendStringInfo(request, "%d", DatumGetInt32(value));
	else if (type == INT8OID)
		appendStringInfo(request, INT64_FORMAT, DatumGetInt64(value));
	else
	{
		double		number = DatumGetFloat8(value);

		if (!isfinite(number))	/* JSON has no word for it */
		{
			MillmError	err;

			millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "%s must be a finite number", name);
			millm_ereport(ERROR, &err);
		}
		appendStringInfo(request, "%.17g", number);
	}
}

static void
append_stop(StringInfo request, ArrayType *stop)
{
	Datum	   *elements;
	bool	   *nulls;
	int			n;

	deconstruct_array(stop, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &n);
	appendStringInfoString(request, ",\"stop\":[");
	for (int i = 0; i < n; i++)
	{
		if (nulls[i])
			millm_refuse(MILLM_E_INVALID_ARGUMENT, "stop must not contain nulls", NULL, "Leave stop out, or list only texts.");
		if (i > 0)
			appendStringInfoChar(request, ',');
		millm_append_text(request, DatumGetTextPP(elements[i]));
	}
	appendStringInfoChar(request, ']');
}

/* The options that all have, in arguments from first on. */
static void
append_options(StringInfo request, FunctionCallInfo fcinfo, int first, bool stream)
{
	appendStringInfo(request, ",\"stream\":%s", stream ? "true" : "false");
	for (int i = 0; i < (int) lengthof(numbers); i++)
		if (!PG_ARGISNULL(first + numbers[i].option))
			append_number(request, numbers[i].name, numbers[i].type, PG_GETARG_DATUM(first + numbers[i].option));
	if (!PG_ARGISNULL(first + OPT_STOP))
		append_stop(request, PG_GETARG_ARRAYTYPE_P(first + OPT_STOP));
	if (!PG_ARGISNULL(first + OPT_MODEL))
		millm_append_model(request, PG_GETARG_TEXT_PP(first + OPT_MODEL));
}

static void
append_bool(StringInfo request, FunctionCallInfo fcinfo, const char *name, int arg)
{
	if (!PG_ARGISNULL(arg))
		appendStringInfo(request, ",\"%s\":%s", name, PG_GETARG_BOOL(arg) ? "true" : "false");
}

/* An object of token ids and numbers, which the engine checks; what is no number in its JSON, or too large for it, is refused here. */
static void
append_logit_bias(StringInfo request, Jsonb *bias)
{
	JsonbIterator *it = JsonbIteratorInit(&bias->root);
	JsonbIteratorToken token;
	JsonbValue	v;
	bool		is_first = true;

	if (!JB_ROOT_IS_OBJECT(bias))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "logit_bias must be an object", NULL, "Write {\"token id\": bias, ...}.");
	appendStringInfoString(request, ",\"logit_bias\":{");
	while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
		if (token == WJB_KEY)
		{
			if (!is_first)
				appendStringInfoChar(request, ',');
			is_first = false;
			millm_json_append_string(request, v.val.string.val, v.val.string.len);
		}
		else if (token == WJB_VALUE)
		{
			double		number = v.type == jbvNumeric ?
				DatumGetFloat8(DirectFunctionCall1(numeric_float8_no_overflow, NumericGetDatum(v.val.numeric))) : NAN;

			if (!isfinite(number))
				millm_refuse(MILLM_E_INVALID_ARGUMENT, "logit_bias must have numbers only", NULL, "Write {\"token id\": bias, ...}.");
			appendStringInfo(request, ":%.17g", number);
		}
	appendStringInfoChar(request, '}');
}

/* Those that chat and complete have besides, in arguments from first on. */
static void
append_choices(StringInfo request, FunctionCallInfo fcinfo, int first)
{
	if (!PG_ARGISNULL(first + CHOICES_N))
		append_number(request, "n", INT4OID, PG_GETARG_DATUM(first + CHOICES_N));
	append_bool(request, fcinfo, "logprobs", first + CHOICES_LOGPROBS);
	if (!PG_ARGISNULL(first + CHOICES_TOP_LOGPROBS))
		append_number(request, "top_logprobs", INT4OID, PG_GETARG_DATUM(first + CHOICES_TOP_LOGPROBS));
	if (!PG_ARGISNULL(first + CHOICES_LOGIT_BIAS))
		append_logit_bias(request, PG_GETARG_JSONB_P(first + CHOICES_LOGIT_BIAS));
}

char *
millm_generate_options(FunctionCallInfo fcinfo, bool stream)
{
	bool		raw = !PG_ARGISNULL(ARG_RAW) && PG_GETARG_BOOL(ARG_RAW);
	StringInfoData options;

	initStringInfo(&options);
	if (!PG_ARGISNULL(ARG_SYSTEM))
	{
		if (raw)
			millm_refuse(MILLM_E_INVALID_ARGUMENT, "a raw prompt has no system message", NULL, "Write the instructions into the prompt.");
		appendStringInfoString(&options, ",\"system\":");
		millm_append_text(&options, PG_GETARG_TEXT_PP(ARG_SYSTEM));
	}
	appendStringInfo(&options, ",\"raw\":%s", raw ? "true" : "false");
	append_bool(&options, fcinfo, "parse_special", ARG_PARSE_SPECIAL);
	append_options(&options, fcinfo, ARG_OPTIONS, stream);
	return options.data;
}

/* The REQUEST of a call whose first argument is not NULL. */
static char *
generate_request(FunctionCallInfo fcinfo, bool stream)
{
	StringInfoData request;

	initStringInfo(&request);
	millm_begin_compute(&request, "generate");
	appendStringInfoString(&request, ",\"prompt\":");
	millm_append_text(&request, PG_GETARG_TEXT_PP(ARG_PROMPT));
	appendStringInfoString(&request, millm_generate_options(fcinfo, stream));
	appendStringInfoChar(&request, '}');
	return request.data;
}

static char *
complete_request(FunctionCallInfo fcinfo, bool stream)
{
	StringInfoData request;

	initStringInfo(&request);
	millm_begin_compute(&request, "generate");
	appendStringInfoString(&request, ",\"raw\":true,\"prompt\":");
	millm_append_text(&request, PG_GETARG_TEXT_PP(ARG_PROMPT));
	append_bool(&request, fcinfo, "parse_special", ARG_COMPLETE_PARSE_SPECIAL);
	append_options(&request, fcinfo, ARG_COMPLETE_OPTIONS, stream);
	append_choices(&request, fcinfo, ARG_COMPLETE_CHOICES);
	appendStringInfoChar(&request, '}');
	return request.data;
}

/* JSON that is an argument, in UTF-8. */
static void
append_json(StringInfo request, const char *name, const char *json)
{
	int			len = strlen(json);

	appendStringInfo(request, ",\"%s\":", name);
	appendStringInfoString(request, pg_server_to_any(json, len, PG_UTF8));
}

static char *
jsonb_text(Jsonb *value)
{
	return JsonbToCString(NULL, &value->root, VARSIZE(value));
}

/*
 * A literal without a type is text to PostgreSQL before it is jsonb.  Who writes messages so would be answered about JSON; who sends a
 * stranger's text must not have it read as messages.  So such a text is refused: an array of objects that all have a role.
 */
static void
refuse_messages_as_text(const text *prompt)
{
	MillmJson	rest = millm_json(VARDATA_ANY(prompt), VARSIZE_ANY_EXHDR(prompt));
	MillmJson	message;
	MillmJson	role;
	bool		has_messages = false;

	if (rest.at == rest.end || *rest.at != '[')
		return;
	while (millm_json_next(&rest, &message))
	{
		if (!millm_json_get(message, "role", &role))
			return;
		has_messages = true;
	}
	if (has_messages && rest.end - rest.at == 1 && *rest.at == ']')
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "the prompt is an array of messages, given as text", NULL,
					 "Give messages as jsonb: millm.chat(messages => '[...]'). Any text at all is taken by millm.generate().");
}

/* A prompt is a conversation of one message. */
static void
append_prompt(StringInfo request, const text *prompt)
{
	refuse_messages_as_text(prompt);
	appendStringInfoString(request, ",\"messages\":[{\"role\":\"user\",\"content\":");
	millm_append_text(request, prompt);
	appendStringInfoString(request, "}]");
}

/* What chat and apply_chat_template have in common. */
static void
append_conversation(StringInfo request, FunctionCallInfo fcinfo, bool is_prompt, int arg_documents, int arg_chat_template)
{
	if (is_prompt)
		append_prompt(request, PG_GETARG_TEXT_PP(ARG_MESSAGES));
	else
		append_json(request, "messages", jsonb_text(PG_GETARG_JSONB_P(ARG_MESSAGES)));
	if (!PG_ARGISNULL(ARG_TOOLS))
		append_json(request, "tools", text_to_cstring(PG_GETARG_TEXT_PP(ARG_TOOLS)));
	if (!PG_ARGISNULL(ARG_TEMPLATE_KWARGS))
		append_json(request, "template_kwargs", jsonb_text(PG_GETARG_JSONB_P(ARG_TEMPLATE_KWARGS)));
	if (!PG_ARGISNULL(arg_documents))
		append_json(request, "documents", text_to_cstring(PG_GETARG_TEXT_PP(arg_documents)));
	if (!PG_ARGISNULL(arg_chat_template))
	{
		appendStringInfoString(request, ",\"chat_template\":");
		millm_append_text(request, PG_GETARG_TEXT_PP(arg_chat_template));
	}
}

static char *
conversation_request(FunctionCallInfo fcinfo, bool is_prompt, bool stream)
{
	StringInfoData request;

	initStringInfo(&request);
	millm_begin_compute(&request, "generate");
	append_conversation(&request, fcinfo, is_prompt, ARG_DOCUMENTS, ARG_CHAT_TEMPLATE);
	append_options(&request, fcinfo, ARG_CHAT_OPTIONS, stream);
	append_choices(&request, fcinfo, ARG_CHAT_CHOICES);
	appendStringInfoChar(&request, '}');
	return request.data;
}

static char *
chat_request(FunctionCallInfo fcinfo, bool stream)
{
	return conversation_request(fcinfo, false, stream);
}

static char *
chat_text_request(FunctionCallInfo fcinfo, bool stream)
{
	return conversation_request(fcinfo, true, stream);
}

/* A reply as jsonb, in the database's encoding, without its times: the same question has the same answer. */
static Datum
reply_jsonb(StringInfo reply)
{
	Datum		value = DirectFunctionCall1(jsonb_in, CStringGetDatum(pg_any_to_server(reply->data, reply->len, PG_UTF8)));

	value = DirectFunctionCall2(jsonb_delete, value, CStringGetTextDatum("queue_ms"));
	return DirectFunctionCall2(jsonb_delete, value, CStringGetTextDatum("compute_ms"));
}

/* What makes a function's REQUEST of its arguments, the first of which is not NULL. */
typedef char *(*RequestFn) (FunctionCallInfo fcinfo, bool stream);

/* The whole reply; false, and no call, when the first argument is NULL. */
static bool
call_engine(FunctionCallInfo fcinfo, RequestFn request, StringInfo reply)
{
	millm_check_ready();
	if (PG_ARGISNULL(0))
		return false;
	initStringInfo(reply);
	millm_compute_call(request(fcinfo, false), reply);
	return true;
}

/* millm.generate(prompt, system, raw, ...) RETURNS text; a NULL prompt gives NULL without a call. */
Datum
millm_generate(PG_FUNCTION_ARGS)
{
	StringInfoData reply;

	if (!call_engine(fcinfo, generate_request, &reply))
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(millm_reply_text(&reply, "text"));
}

/* millm.chat(messages jsonb, tools, ...) RETURNS jsonb; NULL messages give NULL without a call. */
Datum
millm_chat(PG_FUNCTION_ARGS)
{
	StringInfoData reply;

	if (!call_engine(fcinfo, chat_request, &reply))
		PG_RETURN_NULL();
	return reply_jsonb(&reply);
}

/* millm.chat(prompt text, tools, ...) RETURNS jsonb: the same of one user's message. */
Datum
millm_chat_text(PG_FUNCTION_ARGS)
{
	StringInfoData reply;

	if (!call_engine(fcinfo, chat_text_request, &reply))
		PG_RETURN_NULL();
	return reply_jsonb(&reply);
}

/* millm.complete(prompt, ...) RETURNS jsonb: what goes on from a raw prompt; a NULL prompt gives NULL without a call. */
Datum
millm_complete(PG_FUNCTION_ARGS)
{
	StringInfoData reply;

	if (!call_engine(fcinfo, complete_request, &reply))
		PG_RETURN_NULL();
	return reply_jsonb(&reply);
}

/* millm.apply_chat_template(messages, tools, ...) RETURNS text: what chat() would have the model continue. */
Datum
millm_apply_chat_template(PG_FUNCTION_ARGS)
{
	StringInfoData buf;

	millm_check_ready();
	if (PG_ARGISNULL(ARG_MESSAGES))
		PG_RETURN_NULL();
	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"apply_chat_template\"");
	append_conversation(&buf, fcinfo, false, ARG_APPLY_DOCUMENTS, ARG_APPLY_CHAT_TEMPLATE);
	if (!PG_ARGISNULL(ARG_ADD_GENERATION_PROMPT))
		appendStringInfo(&buf, ",\"add_generation_prompt\":%s", PG_GETARG_BOOL(ARG_ADD_GENERATION_PROMPT) ? "true" : "false");
	if (!PG_ARGISNULL(ARG_APPLY_MODEL))
		millm_append_model(&buf, PG_GETARG_TEXT_PP(ARG_APPLY_MODEL));
	appendStringInfoChar(&buf, '}');
	millm_client_call(MILLM_ENGINE, buf.data, &buf, -1);
	PG_RETURN_TEXT_P(millm_reply_text(&buf, "text"));
}

/*
 * millm.generate_stream(as generate) RETURNS SETOF text, chat_stream(as chat) and complete_stream(as complete) RETURNS SETOF jsonb: a
 * row for each piece, of the latter also one for the end.  No rows for a NULL prompt.
 *
 * The connection lives in the call's multi-call context, which dies with the executor node (LIMIT, a closed cursor) and with
 * the (sub)transaction (error, ROLLBACK TO).
 */
static Datum
stream(FunctionCallInfo fcinfo, RequestFn request, bool is_jsonb)
{
	FuncCallContext *call;
	MillmClient *client;

	if (SRF_IS_FIRSTCALL())
	{
		MemoryContext old;

		millm_check_ready();
		call = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		if (!PG_ARGISNULL(0))
			call->user_fctx = millm_compute_open(request(fcinfo, true));
		MemoryContextSwitchTo(old);
	}
	call = SRF_PERCALL_SETUP();
	client = call->user_fctx;
	if (client)
	{
		StringInfoData piece;
		WireKind	kind;

		initStringInfo(&piece);
		millm_client_flush_rows(client);
		kind = millm_client_receive(client, &piece, -1);
		if (kind == WIRE_TEXT)
			SRF_RETURN_NEXT(call, is_jsonb ? reply_jsonb(&piece) : PointerGetDatum(millm_reply_text(&piece, "text")));
		millm_client_close(client);
		if (kind != WIRE_RESULT)
			millm_reply_invalid("text");
		call->user_fctx = NULL;
		if (is_jsonb)
			SRF_RETURN_NEXT(call, reply_jsonb(&piece));
	}
	SRF_RETURN_DONE(call);
}

Datum
millm_generate_stream(PG_FUNCTION_ARGS)
{
	return stream(fcinfo, generate_request, false);
}

Datum
millm_chat_stream(PG_FUNCTION_ARGS)
{
	return stream(fcinfo, chat_request, true);
}

Datum
millm_complete_stream(PG_FUNCTION_ARGS)
{
	return stream(fcinfo, complete_request, true);
}
