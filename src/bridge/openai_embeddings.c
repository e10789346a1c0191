/*
 * openai_embeddings.c -- POST /v1/embeddings: texts become rows of millm.embed().
 *
 * The answer is written as text while the rows come: a vector of PostgreSQL is JSON's but for the braces, and in its shortest
 * exact form.
 */
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "body.h"
#include "db.h"
#include "openai.h"
#include "reply.h"

#define MAX_INPUTS 2048			/* OpenAI's */

typedef struct Embedding
{
	char	   *texts;			/* text[] */
	char	   *model;
	bool		is_base64;
	long		dimensions;		/* as asked for; 0: not */
	long		has_dimensions;	/* of the model's; 0: not known yet */

	FILE	   *out;			/* the list "data", as far as it has come */
	char	   *data;
	size_t		len;
	int			n;
	char	   *name;			/* the model's */
} Embedding;

static void
embedding_free(void *state)
{
	Embedding  *e = state;

	if (e->out)
		fclose(e->out);
	free(e->data);
	free(e->texts);
	free(e->model);
	free(e->name);
	free(e);
}

static bool
take_input(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Embedding  *e = arg;

	if (json_is_integer(json_array_get(value, 0)) || json_is_array(json_array_get(value, 0)))
		return body_unsupported(r, f->name, "token ids are not taken, send text");
	if (json_is_array(value) && json_array_size(value) == 0)
		return body_wrong(r, f->name, "a string or an array of at least one string");
	if (json_array_size(value) > MAX_INPUTS)
	{
		reply_error(r, 400, "out_of_range", f->name, "Field \"%s\" has %zu strings; %d are the most.", f->name, json_array_size(value), MAX_INPUTS);
		return false;
	}
	return (e->texts = body_text_array(r, f->name, value)) != NULL;
}

static bool
take_model(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Embedding  *e = arg;

	if (!json_is_string(value))
		return body_wrong(r, f->name, "a string");
	e->model = strdup(json_string_value(value));
	return true;
}

static bool
take_encoding(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Embedding  *e = arg;
	const char *text = json_string_value(value);

	e->is_base64 = text && strcmp(text, "base64") == 0;
	return e->is_base64 || (text && strcmp(text, "float") == 0) || body_wrong(r, f->name, "\"float\" or \"base64\"");
}

static bool
take_dimensions(HttpRequest *r, const BodyField *f, json_t *value, void *arg)
{
	Embedding  *e = arg;
	char		text[32];

	if (!body_integer(r, f->name, value, 1, INT32_MAX, text))
		return false;
	e->dimensions = (long) json_integer_value(value);
	return true;
}

static const BodyField fields[] = {
	{"input", take_input, 0},
	{"model", take_model, 0},
	{"encoding_format", take_encoding, 0},
	{"dimensions", take_dimensions, 0},
	{"user", body_take_user, 0},
	{NULL, NULL, 0}
};

/* Little-endian float32, in base64, with its quotes. */
static void
put_base64(Embedding *e, const char *vector)
{
	const size_t n = (size_t) e->has_dimensions;
	unsigned char *bytes = malloc(4 * n);
	unsigned char *text = malloc(4 * ((4 * n + 2) / 3) + 1);
	char	   *at = (char *) vector + 1;

	if (bytes && text)
	{
		for (size_t i = 0; i < n; i++, at += *at == ',')
		{
			float		value = strtof(at, &at);
			uint32_t	bits;

			memcpy(&bits, &value, sizeof(bits));
			millm_put_le32(bytes + 4 * i, bits);
		}
		EVP_EncodeBlock(text, bytes, (int) (4 * n));
		fprintf(e->out, "\"%s\"", text);
	}
	else
		fputs("null", e->out);
	free(bytes);
	free(text);
}

static void
on_vector(HttpRequest *r, const PGresult *row)
{
	Embedding  *e = r->state;
	const char *vector = PQgetvalue(row, 0, 0);
	const size_t len = strlen(vector);

	if (e->n == 0)
	{
		e->has_dimensions = 1;
		for (const char *c = vector; *c; c++)
			e->has_dimensions += *c == ',';
		r->prompt_tokens = strtoll(PQgetvalue(row, 0, 1), NULL, 10);
		if (!PQgetisnull(row, 0, 2))
			e->name = strdup(PQgetvalue(row, 0, 2));
	}
	fprintf(e->out, "%s{\"object\":\"embedding\",\"index\":%d,\"embedding\":", e->n ? "," : "", e->n);
	e->n++;
	if (e->is_base64)
		put_base64(e, vector);
	else
		fprintf(e->out, "[%.*s]", len > 2 ? (int) (len - 2) : 0, vector + 1);
	fputc('}', e->out);
}

static void
on_done(HttpRequest *r, const DbError *error)
{
	Embedding  *e = r->state;
	json_t	   *rest;
	char	   *text;

	if (error)
	{
		db_reply_error(r, error);
		return;
	}
	if (e->dimensions && e->dimensions != e->has_dimensions)
	{
		reply_error(r, 400, "unsupported_parameter", "dimensions", "Field \"dimensions\" cannot be honoured: the model's embeddings have %ld.", e->has_dimensions);
		return;
	}
	rest = json_pack("{s:s, s:{s:I, s:I}}", "model", e->name ? e->name : e->model, "usage", "prompt_tokens", (json_int_t) r->prompt_tokens,
					 "total_tokens", (json_int_t) r->prompt_tokens);
	text = json_dumps(rest, JSON_COMPACT);
	json_decref(rest);
	fprintf(e->out, "],%s", text ? text + 1 : "}");	/* {"model": ... without its brace */
	free(text);
	if (fflush(e->out) == 0)
		http_reply(r, 200, "application/json", e->data, e->len);
	else
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
}

void
openai_embed(HttpRequest *r)
{
	static const char sql[] = "SELECT millm.embed($1::text[], model => $2::text), (SELECT sum(millm.count_tokens(t, for_embedding => true)) FROM unnest($1::text[]) t), s.name"
		" FROM millm.loaded_model() s";
	Embedding  *e = calloc(1, sizeof(*e));
	json_t	   *body;
	DbCall	   *call;

	if (!e || !(e->out = open_memstream(&e->data, &e->len)))
	{
		free(e);
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return;
	}
	r->state = e;
	r->free_state = embedding_free;
	fputs("{\"object\":\"list\",\"data\":[", e->out);
	if (!(body = body_read(r, fields, false, e)))
		return;
	json_decref(body);
	if (!e->model || !e->texts)
	{
		const char *missing = e->model ? "input" : "model";

		reply_error(r, 400, "missing_parameter", missing, "Field \"%s\" is missing.", missing);
		return;
	}
	if ((call = db_call(sql, on_vector, on_done)) != NULL)
	{
		db_param(call, e->texts);
		db_param(call, e->model);
	}
	db_run(r, call);
}
