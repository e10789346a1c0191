/*
 * api.h -- the management routes, /api/... but for the events, and the document that describes all routes.
 */
#ifndef MILLM_BRIDGE_API_H
#define MILLM_BRIDGE_API_H

#include "http.h"

/* Each answers with miLLM's envelope: {"success", "data", "error"}. */
extern void api_list(HttpRequest *r);
extern void api_add(HttpRequest *r);
extern void api_preview(HttpRequest *r);
extern void api_get(HttpRequest *r);
extern void api_delete(HttpRequest *r);
extern void api_load(HttpRequest *r);
extern void api_unload(HttpRequest *r);
extern void api_cancel(HttpRequest *r);
extern void api_memory(HttpRequest *r);

/* GET /openapi.json: openapi.json, as it is in the source. */
extern void api_openapi(HttpRequest *r);

#endif
