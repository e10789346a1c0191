/*
 * probes.c -- is the bridge alive, can it serve.
 */
#include "probes.h"

#include "db.h"
#include "reply.h"
#include "version.h"

void
probe_health(HttpRequest *r)
{
	reply_json(r, 200, json_pack("{s:s, s:s}", "status", "ok", "version", MILLM_VERSION));
}

static void
on_row(HttpRequest *r, const PGresult *row)
{
	(void) row;
	r->state = r;				/* a sign only: there was a row */
}

static void
on_done(HttpRequest *r, const DbError *error)
{
	if (error)
		reply_error(r, 503, error->code, NULL, "%s", error->message);
	else if (!r->state)
		reply_error(r, 503, "extension_missing", NULL, "The database does not have the extension millm.");
	else
		reply_json(r, 200, json_pack("{s:s}", "status", "ready"));
}

void
probe_ready(HttpRequest *r)
{
	db_run(r, db_call("SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'millm'", on_row, on_done));
}
