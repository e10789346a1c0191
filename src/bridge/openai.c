/*-------------------------------------------------------------------------
 * openai.c
 *	  POST /v1/chat/completions and /v1/completions: a body becomes parameters of millm.chat() or millm.complete(), or of their
 *	  _stream; rows become OpenAI's objects.
 *
 * Every field of a body is in a table below: taken, or refused by name.  Ranges of numbers are SQL's to check, by name too,
 * but for what would not get there.  SQL always gets n, so its answers always have one shape, that of several choices.
 *-------------------------------------------------------------------------
 */
#include "openai.h"

#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "body.h"
#include "db.h"
#include "reply.h"

#define MAX_N 128
#define MAX_CHOICES 2048		/* of a completion: n times its prompts */
#define MAX_STOPS 16
#define MAX_BIASES 300

/* The parameters of the statements; $1 is INPUT. */
enum
{
	INPUT, MAX_TOKENS, TEMPERATURE, TOP_P, TOP_K, MIN_P, REPETITION_PENALTY, FREQUENCY_PENALTY, PRESENCE_PENALTY, SEED, STOP, MODEL, N,
	LOGPROBS, TOP_LOGPROBS, LOGIT_BIAS, TEMPLATE_KWARGS, N_PARAMS
};

#define ARGUMENTS \
	"max_tokens => $2::int, temperature => $3::float8, top_p => $4::float8, top_k => $5::int, min_p => $6::float8," \
	" repetition_penalty => $7::float8, frequency_penalty => $8::float8, presence_penalty => $9::float8, seed => $10::bigint," \
	" stop => $11::text[], model => $12::text, n => $13::int, logprobs => $14::boolean, top_logprobs => $15::int, logit_bias => $16::jsonb"
#define CHAT_ARGUMENTS "(messages => $1::jsonb, template_kwargs => $17::jsonb, " ARGUMENTS ")"
#define COMPLETE_ARGUMENTS "(prompt => t.prompt, " ARGUMENTS ")"
/* A set-returning function in the SELECT list is sent row by row; in FROM it would be collected first. */
static const char chat_sql[] = "SELECT millm.chat" CHAT_ARGUMENTS ", s.name, s.fingerprint, 1 FROM millm.loaded_model() s";
static const char chat_stream_sql[] = "SELECT millm.chat_stream" CHAT_ARGUMENTS ", s.name, s.fingerprint, 1 FROM millm.loaded_model() s";
static const char complete_sql[] = "SELECT millm.complete" COMPLETE_ARGUMENTS ", s.name, s.fingerprint, t.number"
	" FROM millm.loaded_model() s, unnest($1::text[]) WITH ORDINALITY t(prompt, number)";
static const char complete_stream_sql[] = "SELECT millm.complete_stream" COMPLETE_ARGUMENTS ", s.name, s.fingerprint, t.number"
	" FROM millm.loaded_model() s, unnest($1::text[]) WITH ORDINALITY t(prompt, number)";

/* One request's question, and of its answer what rows have brought. */
typedef struct Question
{
	bool		is_chat;
	char	   *params[N_PARAMS];
	bool		is_stream;
	bool		include_usage;
	bool		wants_logprobs;
	int			n;
	int			n_prompts;
	size_t	   *offsets;		/* of a completion with logprobs: characters before what comes next, for each choice */

	char		id[48];
	json_int_t	created;
	char	   *model;			/* as it is called; before the first row as the request calls it */
	char	   *fingerprint;
	json_t	   *choices;
	bool		has_begun[MAX_N];	/* a stream of chat: the choice's role has been sent */
	json_int_t	prompt_tokens;
	json_int_t	completion_tokens;
	json_int_t	cached_tokens;
} Question;

static void
question_free(void *state)
{
	Question   *q = state;

	for (int i = 0; i < N_PARAMS; i++)
		free(q->params[i]);
	free(q->offsets);
	free(q->model);
	free(q->fingerprint);
	json_decref(q->choices);
	free(q);
}

/* ---- the body ------------------------------------------------------------------------------ */

static bool
set_param(HttpRequest *r, Question *q, int number, char *text)
{
	free(q->params[number]);
	q->params[number] = text;
	if (!text)
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
	return text != NULL;
}

static bool
take_string(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	if (!json_is_string(value))
		return body_wrong(r, f->name, "a string");
	return set_param(r, arg, f->number, strdup(json_string_value(value)));
}

static bool
take_number(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	char		text[32];

	return body_number(r, f->name, value, text) && set_param(r, arg, f->number, strdup(text));
}

static bool
take_int(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	char		text[32];

	return body_integer(r, f->name, value, INT32_MIN, INT32_MAX, text) && set_param(r, arg, f->number, strdup(text));
}

static bool
take_seed(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	char		text[32];

	return body_integer(r, f->name, value, INT64_MIN, INT64_MAX, text) && set_param(r, arg, SEED, strdup(text));
}

/* max_tokens is the older name of max_completion_tokens. */
static bool
take_max_tokens(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;
	char		text[32];

	if (!body_integer(r, f->name, value, 1, INT32_MAX, text))
		return false;
	if (q->params[MAX_TOKENS] && strcmp(q->params[MAX_TOKENS], text) != 0)
	{
		reply_error(r, 400, "invalid_argument", f->name, "Fields \"max_tokens\" and \"max_completion_tokens\" are the same and must not differ.");
		return false;
	}
	return set_param(r, q, MAX_TOKENS, strdup(text));
}

static bool
take_n(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;
	char		text[32];

	if (!body_integer(r, f->name, value, 1, MAX_N, text))
		return false;
	q->n = (int) json_integer_value(value);
	return true;
}

static bool
take_stop(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	char	   *text;

	if (json_array_size(value) > MAX_STOPS)
	{
		reply_error(r, 400, "out_of_range", f->name, "Field \"%s\" has %zu strings; %d are the most.", f->name, json_array_size(value), MAX_STOPS);
		return false;
	}
	if (json_is_array(value) && json_array_size(value) == 0)
		return true;
	return (text = body_text_array(r, f->name, value)) != NULL && set_param(r, arg, STOP, text);
}

static bool
take_stream(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;

	if (!json_is_boolean(value))
		return body_wrong(r, f->name, "true or false");
	q->is_stream = json_is_true(value);
	return true;
}

static bool
take_stream_options(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;
	const char *name;
	json_t	   *option;

	if (!json_is_object(value))
		return body_wrong(r, f->name, "an object");
	json_object_foreach(value, name, option)
	{
		if (strcmp(name, "include_usage") == 0 && (json_is_boolean(option) || json_is_null(option)))
			q->include_usage = json_is_true(option);
		else if (strcmp(name, "include_obfuscation") == 0 && (json_is_false(option) || json_is_null(option)))
			;					/* there is none */
		else
			return body_unsupported(r, f->name, "its only option is include_usage, true or false");
	}
	return true;
}

static bool
take_object(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;

	if (!json_is_object(value))
		return body_wrong(r, f->name, "an object");
	if (q->params[f->number])
	{
		reply_error(r, 400, "invalid_argument", f->name, "Field \"%s\" is given twice, under two names.", f->name);
		return false;
	}
	return set_param(r, q, f->number, json_dumps(value, JSON_COMPACT));
}

static bool
take_logit_bias(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	if (json_object_size(value) > MAX_BIASES)
	{
		reply_error(r, 400, "out_of_range", f->name, "Field \"%s\" has %zu entries; %d are the most.", f->name, json_object_size(value), MAX_BIASES);
		return false;
	}
	return take_object(r, f, value, arg);
}

/* Of chat: whether. */
static bool
take_logprobs(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;

	if (!json_is_boolean(value))
		return body_wrong(r, f->name, "true or false");
	q->wants_logprobs = json_is_true(value);
	return set_param(r, q, LOGPROBS, strdup(q->wants_logprobs ? "true" : "false"));
}

/* Of completions: how many others beside each token. */
static bool
take_logprobs_count(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;
	char		text[32];

	if (!body_integer(r, f->name, value, 0, 20, text))
		return false;
	q->wants_logprobs = true;
	return set_param(r, q, TOP_LOGPROBS, strdup(text)) && set_param(r, q, LOGPROBS, strdup("true"));
}

/* What may be said but only to say no. */
static bool
take_false(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	(void) arg;
	return json_is_false(value) || body_unsupported(r, f->name, "only false is");
}

static bool
take_empty(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	(void) arg;
	if ((json_is_array(value) && json_array_size(value) == 0) || (json_is_object(value) && json_object_size(value) == 0) ||
		(json_is_string(value) && json_string_length(value) == 0))
		return true;
	return body_unsupported(r, f->name, "it must be empty");
}

static bool
take_tool_choice(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	const char *text = json_string_value(value);

	(void) arg;
	return (text && (strcmp(text, "none") == 0 || strcmp(text, "auto") == 0)) || body_unsupported(r, f->name, "there are no tools to choose");
}

static bool
take_response_format(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	const char *type = json_string_value(json_object_get(value, "type"));

	(void) arg;
	return (type && strcmp(type, "text") == 0 && json_object_size(value) == 1) || body_unsupported(r, f->name, "only {\"type\": \"text\"} is");
}

static bool
take_modalities(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	const char *type = json_string_value(json_array_get(value, 0));

	(void) arg;
	return (type && strcmp(type, "text") == 0 && json_array_size(value) == 1) || body_unsupported(r, f->name, "only [\"text\"] is");
}

static bool
take_best_of(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;
	char		text[32];

	if (!body_integer(r, f->name, value, 1, MAX_N, text))
		return false;
	return set_param(r, q, N, strdup(text));	/* compared with n when the whole body is known */
}

/* The text of a message's content: a string, or the texts of its parts, joined.  New reference; NULL: answered. */
static json_t *
content_text(HttpRequest *r, size_t number, json_t *content)
{
	json_t	   *text;
	char	   *joined = NULL;
	size_t		len = 0;
	FILE	   *f;

	if (json_is_string(content))
		return json_incref(content);
	if (!json_is_array(content) || json_array_size(content) == 0)
	{
		reply_error(r, 400, "invalid_type", "messages", "Field \"messages[%zu].content\" must be a string or an array of parts.", number);
		return NULL;
	}
	for (size_t i = 0; i < json_array_size(content); i++)
	{
		json_t	   *part = json_array_get(content, i);
		const char *type = json_string_value(json_object_get(part, "type"));

		if (!type || strcmp(type, "text") != 0 || !json_is_string(json_object_get(part, "text")) || json_object_size(part) != 2)
		{
			reply_error(r, 400, "unsupported_parameter", "messages",
						"Field \"messages[%zu].content[%zu]\" cannot be honoured: only parts {\"type\": \"text\", \"text\": ...} are.", number, i);
			return NULL;
		}
	}
	if (!(f = open_memstream(&joined, &len)))
		return NULL;
	for (size_t i = 0; i < json_array_size(content); i++)
		fputs(json_string_value(json_object_get(json_array_get(content, i), "text")), f);
	fclose(f);
	text = json_stringn(joined, len);
	free(joined);
	return text;
}

/* One message as templates know it, without what is null.  New reference; NULL: answered. */
static json_t *
read_message(HttpRequest *r, size_t number, json_t *message)
{
	json_t	   *result = json_object();
	const char *name;
	json_t	   *value;

	json_object_foreach(message, name, value)
	{
		if (json_is_null(value))
			continue;
		if (strcmp(name, "content") == 0)
		{
			json_t	   *text = content_text(r, number, value);

			if (!text)
				goto refused;
			json_object_set_new(result, name, text);
		}
		else if (strcmp(name, "role") == 0 || strcmp(name, "name") == 0 || strcmp(name, "tool_call_id") == 0)
		{
			if (!json_is_string(value))
			{
				reply_error(r, 400, "invalid_type", "messages", "Field \"messages[%zu].%s\" must be a string.", number, name);
				goto refused;
			}
			json_object_set(result, name, value);
		}
		else if (!json_is_array(value) || json_array_size(value) > 0)
		{
			reply_error(r, 400, "unsupported_parameter", "messages", "Field \"messages[%zu].%.100s\" cannot be honoured.", number, name);
			goto refused;
		}
	}
	if (json_object_get(result, "role") && json_object_get(result, "content"))
		return result;
	reply_error(r, 400, "missing_parameter", "messages", "Field \"messages[%zu]\" must be an object with a role and a content.", number);
refused:
	json_decref(result);
	return NULL;
}

static bool
take_messages(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	json_t	   *messages;
	bool		ok = true;

	if (!json_is_array(value) || json_array_size(value) == 0)
		return body_wrong(r, f->name, "an array of at least one message");
	messages = json_array();
	for (size_t i = 0; i < json_array_size(value) && ok; i++)
	{
		json_t	   *message = read_message(r, i, json_array_get(value, i));

		ok = message != NULL;
		if (message)
			json_array_append_new(messages, message);
	}
	ok = ok && set_param(r, arg, INPUT, json_dumps(messages, JSON_COMPACT));
	json_decref(messages);
	return ok;
}

static bool
take_prompt(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Question   *q = arg;
	char	   *text;

	if (json_is_integer(json_array_get(value, 0)) || json_is_array(json_array_get(value, 0)))
		return body_unsupported(r, f->name, "token ids are not taken, send text");
	if (json_is_array(value) && json_array_size(value) == 0)
		return body_wrong(r, f->name, "a string or an array of at least one string");
	q->n_prompts = json_is_array(value) ? (int) json_array_size(value) : 1;
	if (q->n_prompts > MAX_CHOICES)
	{
		reply_error(r, 400, "out_of_range", f->name, "Field \"%s\" has %d strings; %d are the most.", f->name, q->n_prompts, MAX_CHOICES);
		return false;
	}
	return (text = body_text_array(r, f->name, value)) != NULL && set_param(r, q, INPUT, text);
}

#define SAMPLING_FIELDS \
	{"model", take_string, MODEL}, \
	{"max_tokens", take_max_tokens, 0}, \
	{"temperature", take_number, TEMPERATURE}, \
	{"top_p", take_number, TOP_P}, \
	{"top_k", take_int, TOP_K}, \
	{"min_p", take_number, MIN_P}, \
	{"repetition_penalty", take_number, REPETITION_PENALTY}, \
	{"frequency_penalty", take_number, FREQUENCY_PENALTY}, \
	{"presence_penalty", take_number, PRESENCE_PENALTY}, \
	{"seed", take_seed, 0}, \
	{"stop", take_stop, 0}, \
	{"n", take_n, 0}, \
	{"logit_bias", take_logit_bias, LOGIT_BIAS}, \
	{"stream", take_stream, 0}, \
	{"stream_options", take_stream_options, 0}, \
	{"user", body_take_user, 0}

static const BodyField chat_fields[] = {
	SAMPLING_FIELDS,
	{"messages", take_messages, 0},
	{"max_completion_tokens", take_max_tokens, 0},
	{"logprobs", take_logprobs, 0},
	{"top_logprobs", take_int, TOP_LOGPROBS},
	{"template_kwargs", take_object, TEMPLATE_KWARGS},
	{"chat_template_kwargs", take_object, TEMPLATE_KWARGS},
	{"response_format", take_response_format, 0},
	{"modalities", take_modalities, 0},
	{"tools", take_empty, 0},
	{"functions", take_empty, 0},
	{"tool_choice", take_tool_choice, 0},
	{"store", take_false, 0},
	{"metadata", take_empty, 0},
	{NULL, NULL, 0}
};

static const BodyField completion_fields[] = {
	SAMPLING_FIELDS,
	{"prompt", take_prompt, 0},
	{"logprobs", take_logprobs_count, 0},
	{"echo", take_false, 0},
	{"best_of", take_best_of, 0},
	{"suffix", take_empty, 0},
	{NULL, NULL, 0}
};

/* What one field alone does not show.  False: answered. */
static bool
check_whole(HttpRequest *r, Question *q)
{
	const char *missing = !q->params[MODEL] ? "model" : !q->params[INPUT] ? (q->is_chat ? "messages" : "prompt") : NULL;
	char		text[32];

	if (missing)
	{
		reply_error(r, 400, "missing_parameter", missing, "Field \"%s\" is missing.", missing);
		return false;
	}
	snprintf(text, sizeof(text), "%d", q->n);
	if (q->params[N] && strcmp(q->params[N], "1") != 0 && strcmp(q->params[N], text) != 0)
		return body_unsupported(r, "best_of", "it must be as n");
	if (q->include_usage && !q->is_stream)
	{
		reply_error(r, 400, "invalid_argument", "stream_options", "Field \"stream_options\" is for streams only.");
		return false;
	}
	if (q->n * q->n_prompts > MAX_CHOICES)
	{
		reply_error(r, 400, "out_of_range", "n", "%d choices of %d prompts are more than %d.", q->n, q->n_prompts, MAX_CHOICES);
		return false;
	}
	if (!(q->model = strdup(q->params[MODEL])))
	{
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return false;
	}
	return set_param(r, q, N, strdup(text));
}

/* ---- the answer ---------------------------------------------------------------------------- */

static size_t
n_characters(const char *text)
{
	size_t		n = 0;

	for (; *text; text++)
		n += ((unsigned char) *text & 0xC0) != 0x80;
	return n;
}

/* SQL's array of logprobs in OpenAI's shape of chat: as it is, but for the ids.  New reference. */
static json_t *
chat_logprobs(json_t *entries)
{
	json_t	   *entry;
	json_t	   *top;
	size_t		i;
	size_t		k;

	json_array_foreach(entries, i, entry)
	{
		json_object_del(entry, "id");
		if (!json_object_get(entry, "top_logprobs"))
			json_object_set_new(entry, "top_logprobs", json_array());
		json_array_foreach(json_object_get(entry, "top_logprobs"), k, top)
			json_object_del(top, "id");
	}
	return json_pack("{s:O, s:n}", "content", entries, "refusal");
}

/* The same in that of completions.  *offset, in characters, goes on.  New reference. */
static json_t *
completion_logprobs(json_t *entries, size_t *offset)
{
	json_t	   *tokens = json_array();
	json_t	   *logprobs = json_array();
	json_t	   *tops = json_array();
	json_t	   *offsets = json_array();
	json_t	   *entry;
	json_t	   *top;
	size_t		i;
	size_t		k;

	json_array_foreach(entries, i, entry)
	{
		json_t	   *others = json_object();
		const char *token = json_string_value(json_object_get(entry, "token"));

		json_array_append(tokens, json_object_get(entry, "token"));
		json_array_append(logprobs, json_object_get(entry, "logprob"));
		/* halves of characters have one text in common: the likeliest counts */
		json_array_foreach(json_object_get(entry, "top_logprobs"), k, top)
			if (json_is_string(json_object_get(top, "token")) && !json_object_get(others, json_string_value(json_object_get(top, "token"))))
				json_object_set(others, json_string_value(json_object_get(top, "token")), json_object_get(top, "logprob"));
		json_array_append_new(tops, others);
		json_array_append_new(offsets, json_integer((json_int_t) *offset));
		*offset += token ? n_characters(token) : 0;
	}
	return json_pack("{s:o, s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", logprobs, "top_logprobs", tops, "text_offset", offsets);
}

/* Logprobs of a row for one choice; null when none were asked for.  New reference. */
static json_t *
row_logprobs(Question *q, int index, json_t *entries)
{
	json_t	   *none = NULL;
	json_t	   *result;

	if (!q->wants_logprobs)
		return json_null();
	if (!entries)
		entries = none = json_array();
	result = q->is_chat ? chat_logprobs(entries) : completion_logprobs(entries, &q->offsets[index]);
	json_decref(none);
	return result;
}

static json_t *
usage(const Question *q)
{
	return json_pack("{s:I, s:I, s:I, s:{s:I}}", "prompt_tokens", q->prompt_tokens, "completion_tokens", q->completion_tokens,
					 "total_tokens", q->prompt_tokens + q->completion_tokens, "prompt_tokens_details", "cached_tokens", q->cached_tokens);
}

/* The object around choices, which is taken. */
static json_t *
envelope(const Question *q, json_t *choices)
{
	const char *object = !q->is_chat ? "text_completion" : q->is_stream ? "chat.completion.chunk" : "chat.completion";

	return json_pack("{s:s, s:s, s:I, s:s, s:s?, s:o}", "id", q->id, "object", object, "created", q->created,
					 "model", q->model, "system_fingerprint", q->fingerprint, "choices", choices);
}

/* What every row brings besides its jsonb. */
static json_t *
take_row(Question *q, const PGresult *row, int *first_index)
{
	char	   *name;

	if (!q->fingerprint)
	{
		if (!PQgetisnull(row, 0, 1) && (name = strdup(PQgetvalue(row, 0, 1))) != NULL)
		{
			free(q->model);
			q->model = name;
		}
		q->fingerprint = strdup(PQgetvalue(row, 0, 2));
	}
	*first_index = ((int) strtol(PQgetvalue(row, 0, 3), NULL, 10) - 1) * q->n;
	return json_loads(PQgetvalue(row, 0, 0), JSON_ALLOW_NUL, NULL);
}

static void
take_usage(HttpRequest *r, Question *q, json_t *counts)
{
	q->prompt_tokens += json_integer_value(json_object_get(counts, "prompt_tokens"));
	q->completion_tokens += json_integer_value(json_object_get(counts, "completion_tokens"));
	q->cached_tokens += json_integer_value(json_object_get(counts, "cached_tokens"));
	r->prompt_tokens = q->prompt_tokens;
	r->completion_tokens = q->completion_tokens;
}

/* The index of a choice among all of the request's; -1: not one that can be. */
static int
choice_index(const Question *q, json_t *object, int first_index)
{
	json_int_t	index = json_integer_value(json_object_get(object, "index"));

	return index >= 0 && index < q->n && first_index >= 0 && first_index + q->n <= q->n * q->n_prompts ? first_index + (int) index : -1;
}

/* A row of chat() or complete(): all choices of a prompt. */
static void
on_answer(HttpRequest *r, const PGresult *row)
{
	Question   *q = r->state;
	int			first_index;
	json_t	   *answer = take_row(q, row, &first_index);
	json_t	   *choice;
	size_t		i;

	json_array_foreach(json_object_get(answer, "choices"), i, choice)
	{
		const int	index = choice_index(q, choice, first_index);
		json_t	   *text = json_object_get(choice, "text");
		json_t	   *finish = json_object_get(choice, "finish_reason");
		json_t	   *logprobs;

		if (index < 0)
			continue;
		logprobs = row_logprobs(q, index, json_object_get(choice, "logprobs"));
		if (q->is_chat)
			json_array_append_new(q->choices, json_pack("{s:i, s:{s:s, s:O, s:n}, s:o, s:O}", "index", index, "message", "role", "assistant",
														"content", text, "refusal", "logprobs", logprobs, "finish_reason", finish));
		else
			json_array_append_new(q->choices, json_pack("{s:i, s:O, s:o, s:O}", "index", index, "text", text, "logprobs", logprobs,
														"finish_reason", finish));
	}
	take_usage(r, q, json_object_get(answer, "usage"));
	json_decref(answer);
}

static void
on_answered(HttpRequest *r, const DbError *error)
{
	Question   *q = r->state;
	json_t	   *body;

	if (error)
	{
		db_reply_error(r, error);
		return;
	}
	body = envelope(q, json_incref(q->choices));
	json_object_set_new(body, "usage", usage(q));
	reply_json(r, 200, body);
}

/* One event with one choice, which is taken. */
static void
send_choice(HttpRequest *r, Question *q, json_t *choice)
{
	json_t	   *chunk = envelope(q, json_pack("[o]", choice));

	if (q->include_usage)
		json_object_set_new(chunk, "usage", json_null());
	reply_event(r, chunk);
}

/* A row of chat_stream() or complete_stream(): a piece of a choice, the end of one, or the counts. */
static void
on_piece(HttpRequest *r, const PGresult *row)
{
	Question   *q = r->state;
	int			first_index;
	json_t	   *piece = take_row(q, row, &first_index);
	json_t	   *text = json_object_get(piece, "text");
	json_t	   *finish = json_object_get(piece, "finish_reason");
	const int	index = choice_index(q, piece, first_index);

	if ((text || finish) && index >= 0)
	{
		json_t	   *logprobs = row_logprobs(q, index, json_object_get(piece, "logprobs"));

		if (q->is_chat && !q->has_begun[index])
		{
			q->has_begun[index] = true;
			send_choice(r, q, json_pack("{s:i, s:{s:s, s:s, s:n}, s:n, s:n}", "index", index, "delta", "role", "assistant", "content", "",
										"refusal", "logprobs", "finish_reason"));
		}
		if (!q->is_chat)
			send_choice(r, q, json_pack("{s:i, s:o, s:o, s:O?}", "index", index, "text", text ? json_incref(text) : json_string(""),
										"logprobs", logprobs, "finish_reason", finish));
		else if (text)
			send_choice(r, q, json_pack("{s:i, s:{s:O}, s:o, s:O?}", "index", index, "delta", "content", text, "logprobs", logprobs,
										"finish_reason", finish));
		else
			send_choice(r, q, json_pack("{s:i, s:{}, s:o, s:O}", "index", index, "delta", "logprobs", logprobs, "finish_reason", finish));
	}
	if (json_object_get(piece, "usage"))
		take_usage(r, q, json_object_get(piece, "usage"));
	json_decref(piece);
}

static void
on_stream_over(HttpRequest *r, const DbError *error)
{
	Question   *q = r->state;

	if (error)
	{
		db_reply_error(r, error);
		return;
	}
	if (q->include_usage)
	{
		json_t	   *chunk = envelope(q, json_array());

		json_object_set_new(chunk, "usage", usage(q));
		reply_event(r, chunk);
	}
	http_stream_send(r, "data: [DONE]\n\n", 14);
	http_stream_end(r);
}

/* ---- the routes ---------------------------------------------------------------------------- */

/* For each choice of a completion, where its text begins: after the prompt. */
static bool
measure_prompts(Question *q, json_t *prompt)
{
	if (!(q->offsets = calloc((size_t) (q->n * q->n_prompts), sizeof(*q->offsets))))
		return false;
	for (int i = 0; i < q->n * q->n_prompts; i++)
		q->offsets[i] = n_characters(json_string_value(json_is_string(prompt) ? prompt : json_array_get(prompt, (size_t) (i / q->n))));
	return true;
}

static void
ask(HttpRequest *r, bool is_chat, const BodyField *fields, const char *sql, const char *stream_sql)
{
	Question   *q = calloc(1, sizeof(*q));
	json_t	   *body;
	unsigned char random[12] = {0};
	DbCall	   *call;
	bool		ok;
	int			n;

	if (!q)
	{
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return;
	}
	r->state = q;
	r->free_state = question_free;
	q->is_chat = is_chat;
	q->n = q->n_prompts = 1;
	q->choices = json_array();
	q->created = (json_int_t) time(NULL);
	RAND_bytes(random, sizeof(random));
	n = snprintf(q->id, sizeof(q->id), "%s", is_chat ? "chatcmpl-" : "cmpl-");
	for (size_t i = 0; i < sizeof(random); i++)
		n += snprintf(q->id + n, sizeof(q->id) - (size_t) n, "%02x", random[i]);

	if (!(body = body_read(r, fields, false, q)))
		return;
	ok = check_whole(r, q);
	if (ok && !is_chat && q->wants_logprobs && !(ok = measure_prompts(q, json_object_get(body, "prompt"))))
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
	json_decref(body);
	if (!ok)
		return;

	call = q->is_stream ? db_call(stream_sql, on_piece, on_stream_over) : db_call(sql, on_answer, on_answered);
	if (call)
	{
		call->max_tokens_param = MAX_TOKENS;
		call->n_choices = q->n * q->n_prompts;
		for (int i = 0; i < (is_chat ? N_PARAMS : TEMPLATE_KWARGS); i++)
		{
			db_take_param(call, q->params[i]);	/* a prompt may be large: there is one copy of it */
			q->params[i] = NULL;
		}
	}
	if (q->is_stream)
		http_stream_expect(r);
	db_run(r, call);
}

void
openai_chat(HttpRequest *r)
{
	ask(r, true, chat_fields, chat_sql, chat_stream_sql);
}

void
openai_complete(HttpRequest *r)
{
	ask(r, false, completion_fields, complete_sql, complete_stream_sql);
}
