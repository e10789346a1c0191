/*
 * api.c -- the management routes: each is one SQL function, and the row of millm.models that it is about.
 *
 * What changes a model answers with the model as it is afterwards, read by a second statement once the first is committed.  JSON that
 * the database makes goes into the envelope as it came.
 *
 * Owns:     of each request, what must be kept between its statements.
 * Refuses:  by name, fields that a route does not have and values of another type.
 */
#include "api.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "body.h"
#include "db.h"
#include "error.h"
#include "reply.h"

/* One request. */
typedef struct Work
{
	int			status;			/* of the answer, if all goes well */
	char		id[24];			/* of the model */
	char	   *data;			/* JSON; NULL: no row came */
	bool		is_loaded;		/* of unload */
} Work;

/* The values of a body's fields, as parameters; NULL is not given. */
typedef struct Values
{
	const char *of[DB_MAX_PARAMS];	/* by BodyField.number; borrowed of the body */
} Values;

static const char list_sql[] = "SELECT coalesce(json_agg(m ORDER BY m.id), '[]') FROM millm.models m";
static const char get_sql[] = "SELECT row_to_json(m) FROM millm.models m WHERE m.id = $1::bigint";
static const char download_sql[] =
	"SELECT millm.download($1::text, quantization => coalesce($2::text, 'Q4'), hf_token => $3::text,"
	" trust_remote_code => coalesce($4::boolean, false), name => $5::text, revision => coalesce($6::text, 'main'))";
static const char register_sql[] = "SELECT millm.register_local($1::text, quantization => coalesce($2::text, 'FP16'), name => $3::text)";
static const char preview_sql[] = "SELECT millm.preview($1::text, hf_token => $2::text, revision => coalesce($3::text, 'main'))";
static const char delete_sql[] = "SELECT row_to_json(m), millm.delete(m.id) FROM millm.models m WHERE m.id = $1::bigint";
static const char load_sql[] = "SELECT millm.load($1::bigint, force => coalesce($2::boolean, false), wait => coalesce($3::boolean, false))";
static const char unload_sql[] =
	"SELECT m.status IN ('loading', 'loaded'), CASE WHEN m.status IN ('loading', 'loaded') THEN millm.unload() END"
	" FROM millm.models m WHERE m.id = $1::bigint";
static const char cancel_sql[] = "SELECT millm.cancel($1::bigint)";
static const char memory_sql[] =
	"SELECT json_build_object('devices', (SELECT coalesce(json_agg(m), '[]') FROM millm.memory() m), 'status', (SELECT row_to_json(s) FROM millm.status() s))";

/* ---- what was asked --------------------------------------------------------------------------- */

static void
free_work(void *state)
{
	Work	   *w = state;

	free(w->data);
	free(w);
}

/* Begin to work on r.  False: it is answered. */
static bool
begin(HttpRequest *r, int status)
{
	Work	   *w;

	if (!(w = calloc(1, sizeof(*w))))
	{
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
		return false;
	}
	w->status = status;
	r->state = w;
	r->free_state = free_work;
	return true;
}

/* The same, with the model's number of the path. */
static bool
begin_model(HttpRequest *r, int status)
{
	Work	   *w;
	size_t		len = strlen(r->param);

	errno = 0;
	if (len >= sizeof(w->id) || strspn(r->param, "0123456789") != len || (strtoll(r->param, NULL, 10), errno != 0))
	{
		reply_error(r, 400, "invalid_argument", "id", "The id of a model is a number, which the path does not have.");
		return false;
	}
	if (!begin(r, status))
		return false;
	w = r->state;
	memcpy(w->id, r->param, len + 1);
	return true;
}

static bool
take_string(HttpRequest *r, const BodyField *field, json_t *value, void *arg)
{
	Values	   *values = arg;

	if (!json_is_string(value))
		return body_wrong(r, field->name, "a string");
	values->of[field->number] = json_string_value(value);
	return true;
}

static bool
take_boolean(HttpRequest *r, const BodyField *field, json_t *value, void *arg)
{
	Values	   *values = arg;

	if (!json_is_boolean(value))
		return body_wrong(r, field->name, "true or false");
	values->of[field->number] = json_is_true(value) ? "true" : "false";
	return true;
}

/* No fields at all. */
static const BodyField nothing[] = {{NULL, NULL, 0}};

/* ---- what comes back ---------------------------------------------------------------------------- */

static void
keep_data(HttpRequest *r, const PGresult *row)
{
	Work	   *w = r->state;

	free(w->data);
	w->data = PQgetisnull(row, 0, 0) ? NULL : strdup(PQgetvalue(row, 0, 0));
}

static void
reply_data_or_not_found(HttpRequest *r, const DbError *error)
{
	Work	   *w = r->state;
	char	   *body;
	int			n;

	if (error)
		db_reply_error(r, error);
	else if (!w->data)
		reply_error(r, millm_code_http(MILLM_E_MODEL_NOT_FOUND), millm_code_name(MILLM_E_MODEL_NOT_FOUND), NULL, "Model with id %s does not exist.", w->id);
	else if ((n = asprintf(&body, "{\"success\": true, \"data\": %s, \"error\": null}", w->data)) < 0)
		reply_error(r, 503, "out_of_memory", NULL, "The bridge is out of memory.");
	else
	{
		http_reply(r, w->status, "application/json", body, (size_t) n);
		free(body);
	}
}

/* Run sql with the model's id, if it is about one, and the first n values. */
static void
run(HttpRequest *r, const char *sql, const Values *values, int n, void (*on_row) (HttpRequest *, const PGresult *),
	void (*on_done) (HttpRequest *, const DbError *))
{
	const Work *w = r->state;
	DbCall	   *call = db_call(sql, on_row, on_done);

	if (call && w->id[0])
		db_param(call, w->id);
	for (int i = 0; call && i < n; i++)
		db_param(call, values->of[i]);
	db_run(r, call);
}

/* The change is committed: answer with the model. */
static void
then_get(HttpRequest *r, const DbError *error)
{
	if (error)
		db_reply_error(r, error);
	else
		run(r, get_sql, NULL, 0, keep_data, reply_data_or_not_found);
}

static void
keep_id(HttpRequest *r, const PGresult *row)
{
	Work	   *w = r->state;

	snprintf(w->id, sizeof(w->id), "%s", PQgetvalue(row, 0, 0));
}

/* ---- routes -------------------------------------------------------------------------------------- */

void
api_list(HttpRequest *r)
{
	if (begin(r, 200))
		run(r, list_sql, NULL, 0, keep_data, reply_data_or_not_found);
}

void
api_get(HttpRequest *r)
{
	if (begin_model(r, 200))
		run(r, get_sql, NULL, 0, keep_data, reply_data_or_not_found);
}

void
api_add(HttpRequest *r)
{
	/* in the order of the parameters of download_sql and register_sql, one after the other */
	enum {REPO_ID, QUANTIZATION, HF_TOKEN, TRUST_REMOTE_CODE, NAME, REVISION, PATH};
	static const BodyField fields[] = {
		{"repo_id", take_string, REPO_ID}, {"quantization", take_string, QUANTIZATION}, {"hf_token", take_string, HF_TOKEN},
		{"trust_remote_code", take_boolean, TRUST_REMOTE_CODE}, {"name", take_string, NAME}, {"revision", take_string, REVISION},
		{"path", take_string, PATH}, {NULL, NULL, 0}
	};
	static const int only_hub[] = {HF_TOKEN, TRUST_REMOTE_CODE, REVISION};
	Values		v = {{NULL}};
	json_t	   *body;

	if (!begin(r, 202) || !(body = body_read(r, fields, false, &v)))
		return;
	if (!v.of[REPO_ID] == !v.of[PATH])
		reply_error(r, 400, "missing_parameter", "repo_id", "Give either \"repo_id\", a repository of the Hub, or \"path\", a directory of the database's server.");
	else if (v.of[REPO_ID])
		run(r, download_sql, &v, PATH, keep_id, then_get);
	else
	{
		const Values local = {{v.of[PATH], v.of[QUANTIZATION], v.of[NAME]}};
		const char *other = NULL;

		for (int i = 0; i < 3; i++)
			if (v.of[only_hub[i]])
				other = fields[only_hub[i]].name;
		if (other)
			body_unsupported(r, other, "it is for a repository of the Hub, not for a path");
		else
			run(r, register_sql, &local, 3, keep_id, then_get);
	}
	json_decref(body);
}

void
api_preview(HttpRequest *r)
{
	static const BodyField fields[] = {{"repo_id", take_string, 0}, {"hf_token", take_string, 1}, {"revision", take_string, 2}, {NULL, NULL, 0}};
	Values		v = {{NULL}};
	json_t	   *body;

	if (!begin(r, 200) || !(body = body_read(r, fields, false, &v)))
		return;
	if (v.of[0])
		run(r, preview_sql, &v, 3, keep_data, reply_data_or_not_found);
	else
		reply_error(r, 400, "missing_parameter", "repo_id", "Field \"repo_id\" is missing.");
	json_decref(body);
}

void
api_delete(HttpRequest *r)
{
	json_t	   *body;

	if (!begin_model(r, 200) || !(body = body_read(r, nothing, true, NULL)))
		return;
	run(r, delete_sql, NULL, 0, keep_data, reply_data_or_not_found);
	json_decref(body);
}

void
api_load(HttpRequest *r)
{
	static const BodyField fields[] = {{"force", take_boolean, 0}, {"wait", take_boolean, 1}, {NULL, NULL, 0}};
	Values		v = {{NULL}};
	json_t	   *body;

	if (!begin_model(r, 202) || !(body = body_read(r, fields, true, &v)))
		return;
	if (v.of[1] && strcmp(v.of[1], "true") == 0)
		((Work *) r->state)->status = 200;
	run(r, load_sql, &v, 2, NULL, then_get);
	json_decref(body);
}

static void
keep_is_loaded(HttpRequest *r, const PGresult *row)
{
	Work	   *w = r->state;

	w->is_loaded = PQgetvalue(row, 0, 0)[0] == 't';
	keep_data(r, row);
}

/* millm.unload() unloads what is loaded, whatever that is: not this model, if it is another. */
static void
unloaded(HttpRequest *r, const DbError *error)
{
	Work	   *w = r->state;

	if (error || !w->data)
		reply_data_or_not_found(r, error);
	else if (!w->is_loaded)
		reply_error(r, millm_code_http(MILLM_E_MODEL_NOT_LOADED), millm_code_name(MILLM_E_MODEL_NOT_LOADED), NULL, "Model with id %s is not loaded.", w->id);
	else
		then_get(r, NULL);
}

void
api_unload(HttpRequest *r)
{
	json_t	   *body;

	if (!begin_model(r, 200) || !(body = body_read(r, nothing, true, NULL)))
		return;
	run(r, unload_sql, NULL, 0, keep_is_loaded, unloaded);
	json_decref(body);
}

void
api_cancel(HttpRequest *r)
{
	json_t	   *body;

	if (!begin_model(r, 200) || !(body = body_read(r, nothing, true, NULL)))
		return;
	run(r, cancel_sql, NULL, 0, NULL, then_get);
	json_decref(body);
}

void
api_memory(HttpRequest *r)
{
	if (begin(r, 200))
		run(r, memory_sql, NULL, 0, keep_data, reply_data_or_not_found);
}

void
api_openapi(HttpRequest *r)
{
	extern const char openapi_json[],
				openapi_json_end[];

	http_reply(r, 200, "application/json", openapi_json, (size_t) (openapi_json_end - openapi_json));
}
