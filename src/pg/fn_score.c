/*
 * fn_score.c -- how probable the loaded model finds a text: logprobs(text) token by token, perplexity(text), classify(prompt, labels).
 *
 * All are STABLE and not STRICT, for the model may be left out; a NULL text gives NULL, or no rows, without a call.  Closing the connection cancels, as
 * everywhere (client.h).
 *
 * Does not: compute a logprob; the engine says them and their sums, here the mean and the shares are taken.
 */
#include "postgres.h"

#include <math.h>

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "client.h"
#include "json.h"
#include "live.h"
#include "text_array.h"

PG_FUNCTION_INFO_V1(millm_logprobs);
PG_FUNCTION_INFO_V1(millm_perplexity);
PG_FUNCTION_INFO_V1(millm_perplexity_array);
PG_FUNCTION_INFO_V1(millm_classify);

/* Of how many tokens (0: none has any before it) the sum of the logprobs is what. */
typedef struct Score
{
	double		logprob;
	int64		tokens;
} Score;

/* The next of a RESULT's scores; *rest is the array at first. */
static Score
next_score(MillmJson *rest)
{
	MillmJson	element;
	Score		score;

	if (!millm_json_next(rest, &element) || !millm_json_get_double(element, "logprob", &score.logprob) ||
		!millm_json_get_int(element, "tokens", &score.tokens) || score.tokens < 0)
		millm_reply_invalid("scores");
	return score;
}

/* Begin a score request; what is to be scored is still to be written. */
static void
begin_request(StringInfo request, FunctionCallInfo fcinfo, int arg_model)
{
	initStringInfo(request);
	millm_begin_compute(request, "score");
	if (!PG_ARGISNULL(arg_model))
		millm_append_model(request, PG_GETARG_TEXT_PP(arg_model));
}

/* ---- logprobs ---------------------------------------------------------------------------------- */

typedef struct Tokens
{
	MillmClient *client;
	StringInfoData frame;		/* the last one */
	MillmJson	rest;			/* its logprobs that are still to come */
	int32		position;		/* of the last row, from 1 on */
} Tokens;

/* The next token's object; false at the end. */
static bool
next_token(Tokens *t, MillmJson *token)
{
	while (!millm_json_next(&t->rest, token))
	{
		WireKind	kind = millm_client_receive(t->client, &t->frame, -1);

		if (kind == WIRE_RESULT)
			return false;
		if (kind != WIRE_TEXT || !millm_json_get(millm_json(t->frame.data, t->frame.len), "logprobs", &t->rest))
			millm_reply_invalid("logprobs");
	}
	return true;
}

/* An array of bytes. */
static bytea *
read_bytes(MillmJson array)
{
	StringInfoData bytes;
	MillmJson	element;
	int64		value;
	bytea	   *out;

	initStringInfo(&bytes);
	while (millm_json_next(&array, &element))
	{
		if (!millm_json_int(element, &value) || value < 0 || value > 255)
			millm_reply_invalid("bytes");
		appendStringInfoCharMacro(&bytes, (char) value);
	}
	out = palloc(bytes.len + VARHDRSZ);
	SET_VARSIZE(out, bytes.len + VARHDRSZ);
	memcpy(VARDATA(out), bytes.data, bytes.len);
	pfree(bytes.data);
	return out;
}

/*
 * millm.logprobs(text, model text) RETURNS SETOF ("position" int, token_id int, token text, bytes bytea, logprob float8): a row per token.
 *
 * The connection lives in the call's multi-call context, as fn_generate.c's streams do.
 */
Datum
millm_logprobs(PG_FUNCTION_ARGS)
{
	FuncCallContext *call;
	Tokens	   *t;
	MillmJson	token,
				field;
	Datum		values[5];
	bool		nulls[5] = {false};
	StringInfoData content;
	int64		id;
	double		logprob;

	if (SRF_IS_FIRSTCALL())
	{
		MemoryContext old;
		StringInfoData request;

		millm_check_ready();
		call = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		if (get_call_result_type(fcinfo, NULL, &call->tuple_desc) != TYPEFUNC_COMPOSITE)
			elog(ERROR, "return type must be a row type");
		call->tuple_desc = BlessTupleDesc(call->tuple_desc);
		if (!PG_ARGISNULL(0))
		{
			begin_request(&request, fcinfo, 1);
			appendStringInfoString(&request, ",\"tokens\":true,\"texts\":[");
			millm_append_text(&request, PG_GETARG_TEXT_PP(0));
			appendStringInfoString(&request, "]}");
			call->user_fctx = t = palloc0(sizeof(Tokens));
			initStringInfo(&t->frame);
			t->rest = millm_json("", 0);
			t->client = millm_compute_open(request.data);
			pfree(request.data);
		}
		MemoryContextSwitchTo(old);
	}
	call = SRF_PERCALL_SETUP();
	t = call->user_fctx;
	if (!t || !next_token(t, &token))
		SRF_RETURN_DONE(call);
	initStringInfo(&content);
	if (!millm_json_get_int(token, "id", &id) || !millm_json_get(token, "token", &field) || !millm_json_string(field, &content))
		millm_reply_invalid("logprobs");
	values[0] = Int32GetDatum(++t->position);
	values[1] = Int32GetDatum((int32) id);
	values[2] = PointerGetDatum(cstring_to_text(pg_any_to_server(content.data, content.len, PG_UTF8)));
	nulls[3] = !millm_json_get(token, "bytes", &field);
	values[3] = nulls[3] ? (Datum) 0 : PointerGetDatum(read_bytes(field));
	nulls[4] = !millm_json_get_double(token, "logprob", &logprob);
	values[4] = nulls[4] ? (Datum) 0 : Float8GetDatum(logprob);
	SRF_RETURN_NEXT(call, HeapTupleGetDatum(heap_form_tuple(call->tuple_desc, values, nulls)));
}

/* ---- perplexity -------------------------------------------------------------------------------- */

/* Of a text; NULL when no token of it has one before it. */
static Datum
perplexity(Score score, bool *is_null)
{
	*is_null = score.tokens == 0;
	return *is_null ? (Datum) 0 : Float8GetDatum(exp(-score.logprob / score.tokens));
}

/* The RESULT of the request; its scores. */
static MillmJson
ask(StringInfo request)
{
	MillmJson	scores;

	millm_compute_call(request->data, request);
	if (!millm_json_get(millm_json(request->data, request->len), "scores", &scores))
		millm_reply_invalid("scores");
	return scores;
}

/* millm.perplexity(text, model text) RETURNS float8 */
Datum
millm_perplexity(PG_FUNCTION_ARGS)
{
	StringInfoData request;
	MillmJson	scores;
	Datum		value;

	millm_check_ready();
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	begin_request(&request, fcinfo, 1);
	appendStringInfoString(&request, ",\"texts\":[");
	millm_append_text(&request, PG_GETARG_TEXT_PP(0));
	appendStringInfoString(&request, "]}");
	scores = ask(&request);
	value = perplexity(next_score(&scores), &fcinfo->isnull);
	return value;
}

typedef struct PerplexityArray
{
	MillmTextArray array;
	StringInfoData reply;		/* for its slice */
	MillmJson	rest;			/* of its scores */
} PerplexityArray;

static void
ask_slice(PerplexityArray *p, FunctionCallInfo fcinfo)
{
	if (p->reply.data)
		pfree(p->reply.data);
	begin_request(&p->reply, fcinfo, 1);
	millm_text_array_slice(&p->array, &p->reply);
	appendStringInfoChar(&p->reply, '}');
	p->rest = ask(&p->reply);
}

/* millm.perplexity(texts text[], model text) RETURNS SETOF float8: a row per element, in storage order, NULL for NULL; no rows for a NULL array. */
Datum
millm_perplexity_array(PG_FUNCTION_ARGS)
{
	FuncCallContext *call;
	PerplexityArray *p;
	MillmTextArray *a;
	MemoryContext old;
	Datum		value;
	bool		is_null;

	if (SRF_IS_FIRSTCALL())
	{
		millm_check_ready();
		call = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		call->user_fctx = p = palloc0(sizeof(PerplexityArray));
		millm_text_array_init(&p->array, PG_ARGISNULL(0) ? NULL : PG_GETARG_ARRAYTYPE_P_COPY(0));
		MemoryContextSwitchTo(old);
	}
	call = SRF_PERCALL_SETUP();
	p = call->user_fctx;
	a = &p->array;
	if (a->at == a->n)
		SRF_RETURN_DONE(call);
	if (a->nulls[a->at])
	{
		a->at++;
		SRF_RETURN_NEXT_NULL(call);
	}
	if (a->at >= a->slice_end)
	{
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		ask_slice(p, fcinfo);
		MemoryContextSwitchTo(old);
	}
	a->at++;
	value = perplexity(next_score(&p->rest), &is_null);
	if (is_null)
		SRF_RETURN_NEXT_NULL(call);
	SRF_RETURN_NEXT(call, value);
}

/* ---- classify ---------------------------------------------------------------------------------- */

enum
{
	ARG_PROMPT, ARG_LABELS, ARG_SYSTEM, ARG_RAW, ARG_MODEL
};

typedef struct Label
{
	Datum		label;			/* a text */
	int			number;			/* in the array */
	double		logprob;
	double		probability;	/* among the labels */
} Label;

static int
compare_labels(const void *a, const void *b)
{
	const Label *x = a,
			   *y = b;

	return x->logprob != y->logprob ? (x->logprob < y->logprob ? 1 : -1) : x->number - y->number;
}

/* The arguments as labels that have no logprob yet. */
static Label *
read_labels(FunctionCallInfo fcinfo, int *n)
{
	Datum	   *elements;
	bool	   *nulls;
	Label	   *labels;

	if (PG_ARGISNULL(ARG_LABELS))
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "labels must not be null", NULL, "List the texts among which the model is to choose.");
	deconstruct_array(PG_GETARG_ARRAYTYPE_P_COPY(ARG_LABELS), TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, n);
	if (*n == 0)
		millm_refuse(MILLM_E_INVALID_ARGUMENT, "there are no labels", NULL, "List the texts among which the model is to choose.");
	labels = palloc(*n * sizeof(Label));
	for (int i = 0; i < *n; i++)
	{
		if (nulls[i])
			millm_refuse(MILLM_E_INVALID_ARGUMENT, "labels must not contain nulls", NULL, "List only texts.");
		labels[i] = (Label) {.label = elements[i], .number = i};
	}
	return labels;
}

/* Have the model say how probable they are, and sort them. */
static void
score_labels(FunctionCallInfo fcinfo, Label *labels, int n)
{
	StringInfoData request;
	MillmJson	scores;
	double		sum = 0;

	begin_request(&request, fcinfo, ARG_MODEL);
	appendStringInfoString(&request, ",\"prompt\":");
	millm_append_text(&request, PG_GETARG_TEXT_PP(ARG_PROMPT));
	if (!PG_ARGISNULL(ARG_SYSTEM))
	{
		appendStringInfoString(&request, ",\"system\":");
		millm_append_text(&request, PG_GETARG_TEXT_PP(ARG_SYSTEM));
	}
	appendStringInfo(&request, ",\"raw\":%s,\"labels\":[", !PG_ARGISNULL(ARG_RAW) && PG_GETARG_BOOL(ARG_RAW) ? "true" : "false");
	for (int i = 0; i < n; i++)
	{
		if (i > 0)
			appendStringInfoChar(&request, ',');
		millm_append_text(&request, DatumGetTextPP(labels[i].label));
	}
	appendStringInfoString(&request, "]}");
	scores = ask(&request);
	for (int i = 0; i < n; i++)
		labels[i].logprob = next_score(&scores).logprob;
	qsort(labels, n, sizeof(Label), compare_labels);
	for (int i = 0; i < n; i++)
		sum += labels[i].probability = exp(labels[i].logprob - labels[0].logprob);
	for (int i = 0; i < n; i++)
		labels[i].probability /= sum;
	pfree(request.data);
}

/* millm.classify(prompt, labels text[], system, raw, model) RETURNS SETOF (label text, probability float8, logprob float8), the most probable first */
Datum
millm_classify(PG_FUNCTION_ARGS)
{
	FuncCallContext *call;
	const Label *label;
	Datum		values[3];
	bool		nulls[3] = {false};

	if (SRF_IS_FIRSTCALL())
	{
		MemoryContext old;
		Label	   *labels;
		int			n;

		millm_check_ready();
		call = SRF_FIRSTCALL_INIT();
		old = MemoryContextSwitchTo(call->multi_call_memory_ctx);
		if (get_call_result_type(fcinfo, NULL, &call->tuple_desc) != TYPEFUNC_COMPOSITE)
			elog(ERROR, "return type must be a row type");
		call->tuple_desc = BlessTupleDesc(call->tuple_desc);
		if (!PG_ARGISNULL(ARG_PROMPT))
		{
			call->user_fctx = labels = read_labels(fcinfo, &n);
			score_labels(fcinfo, labels, n);
			call->max_calls = n;
		}
		MemoryContextSwitchTo(old);
	}
	call = SRF_PERCALL_SETUP();
	if (call->call_cntr >= call->max_calls)
		SRF_RETURN_DONE(call);
	label = (const Label *) call->user_fctx + call->call_cntr;
	values[0] = label->label;
	values[1] = Float8GetDatum(label->probability);
	values[2] = Float8GetDatum(label->logprob);
	SRF_RETURN_NEXT(call, HeapTupleGetDatum(heap_form_tuple(call->tuple_desc, values, nulls)));
}
