/*
 * routes.c -- the table of routes.
 */
#include "routes.h"

#include <stdio.h>
#include <string.h>

#include "api.h"
#include "events.h"
#include "metrics.h"
#include "openai.h"
#include "probes.h"

/* What is written out comes before a pattern that it fits. */
const Route routes[] = {
	{"GET", "/health", probe_health, ROUTE_OPEN, NULL},
	{"GET", "/ready", probe_ready, ROUTE_OPEN, NULL},
	{"GET", "/metrics", metrics_handle, ROUTE_OPEN, NULL},
	{"GET", "/openapi.json", api_openapi, ROUTE_OPEN, NULL},
	{"GET", "/v1/models", openai_models, 0, "all"},
	{"GET", "/v1/models/{id*}", openai_model, 0, NULL},
	{"POST", "/v1/chat/completions", openai_chat, 0, NULL},
	{"POST", "/v1/completions", openai_complete, 0, NULL},
	{"POST", "/v1/embeddings", openai_embed, 0, NULL},
	{"GET", "/api/models", api_list, 0, NULL},
	{"POST", "/api/models", api_add, 0, NULL},
	{"POST", "/api/models/preview", api_preview, 0, NULL},
	{"GET", "/api/models/{id}", api_get, 0, NULL},
	{"DELETE", "/api/models/{id}", api_delete, 0, NULL},
	{"POST", "/api/models/{id}/load", api_load, 0, NULL},
	{"POST", "/api/models/{id}/unload", api_unload, 0, NULL},
	{"POST", "/api/models/{id}/cancel", api_cancel, 0, NULL},
	{"GET", "/api/events", events_handle, ROUTE_STREAM, NULL},
	{"GET", "/api/system/memory", api_memory, 0, NULL},
};

const int	n_routes = sizeof(routes) / sizeof(routes[0]);

/* Does path fit pattern?  *param borrows path. */
static bool
fits(const char *pattern, const char *path, const char **param, size_t *param_len)
{
	*param = NULL;
	*param_len = 0;
	while (*pattern)
	{
		if (*pattern == '{')
		{
			const char *end = strchr(pattern, '}') + 1;

			*param = path;
			*param_len = end[-2] == '*' ? strlen(path) : strcspn(path, "/");
			if (*param_len == 0)
				return false;
			path += *param_len;
			pattern = end;
		}
		else if (*pattern++ != *path++)
			return false;
	}
	return *path == '\0';
}

const Route *
route_find(const char *method, const char *path, const char **param, size_t *param_len, char *allowed, size_t size)
{
	const bool	is_head = strcmp(method, "HEAD") == 0;
	bool		is_literal = false;
	size_t		n = 0;

	allowed[0] = '\0';
	for (int i = 0; i < n_routes; i++)
	{
		const Route *route = &routes[i];
		const bool	has_head = strcmp(route->method, "GET") == 0 && !(route->flags & ROUTE_STREAM);

		if (!fits(route->pattern, path, param, param_len))
			continue;
		/* a path that is written out is no pattern's: /api/models/preview is no model */
		if (is_literal && *param)
			continue;
		is_literal = *param == NULL;
		if (strcmp(method, route->method) == 0 || (is_head && has_head))
			return route;
		n += (size_t) snprintf(allowed + n, size - n, "%s%s%s", n ? ", " : "", route->method, has_head ? ", HEAD" : "");
		if (n >= size)
			n = size - 1;
	}
	*param = NULL;
	return NULL;
}
