/*
 * openai_models.c -- GET /v1/models and /v1/models/{id}.
 *
 * A model's id is its name, or its number where several have the name: what the field "model" of a request takes.
 */
#include <stdlib.h>
#include <string.h>

#include "db.h"
#include "openai.h"
#include "reply.h"

#define COLUMNS \
	"SELECT CASE WHEN count(*) OVER (PARTITION BY m.name) > 1 THEN m.id::text ELSE m.name END AS model," \
	" extract(epoch FROM m.created_at)::bigint, coalesce(split_part(m.repo_id, '/', 1), 'local'), m.name, m.id::text, m.status FROM millm.models m"

static json_t *
model(const PGresult *row)
{
	return json_pack("{s:s, s:s, s:I, s:s}", "id", PQgetvalue(row, 0, 0), "object", "model",
					 "created", (json_int_t) strtoll(PQgetvalue(row, 0, 1), NULL, 10), "owned_by", PQgetvalue(row, 0, 2));
}

static void
free_json(void *state)
{
	json_decref(state);
}

static void
on_model(HttpRequest *r, const PGresult *row)
{
	json_array_append_new(r->state, model(row));
}

static void
on_models(HttpRequest *r, const DbError *error)
{
	if (error)
		db_reply_error(r, error);
	else
		reply_json(r, 200, json_pack("{s:s, s:O}", "object", "list", "data", r->state));
}

static void
on_one(HttpRequest *r, const DbError *error)
{
	if (error)
		db_reply_error(r, error);
	else if (json_array_size(r->state) == 0)
		reply_error(r, 404, "model_not_found", "model", "Model \"%s\" does not exist, or is not ready.", r->param);
	else
		reply_json(r, 200, json_incref(json_array_get(r->state, 0)));
}

void
openai_models(HttpRequest *r)
{
	static const char sql[] = "SELECT * FROM (" COLUMNS ") m WHERE m.status = 'loaded' OR $1::boolean AND m.status IN ('ready', 'loading') ORDER BY 1";
	char	   *all = http_query(r, "all");
	DbCall	   *call;

	if (all && strcmp(all, "true") != 0 && strcmp(all, "false") != 0)
		reply_error(r, 400, "invalid_argument", "all", "Parameter \"all\" takes true or false.");
	else
	{
		r->state = json_array();
		r->free_state = free_json;
		if ((call = db_call(sql, on_model, on_models)) != NULL)
			db_param(call, all ? all : "false");
		db_run(r, call);
	}
	free(all);
}

void
openai_model(HttpRequest *r)
{
	static const char sql[] = "SELECT * FROM (" COLUMNS ") m WHERE $1 IN (m.model, m.id) AND m.status IN ('ready', 'loading', 'loaded')";
	DbCall	   *call = db_call(sql, on_model, on_one);

	r->state = json_array();
	r->free_state = free_json;
	if (call)
		db_param(call, r->param);
	db_run(r, call);
}
