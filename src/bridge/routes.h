/*
 * routes.h -- which method and path is whose.
 */
#ifndef MILLM_BRIDGE_ROUTES_H
#define MILLM_BRIDGE_ROUTES_H

#include "http.h"

/* All routes; n_routes of them. */
extern const Route routes[];
extern const int n_routes;

/*
 * The route of a path, which is still percent-encoded.  NULL: *allowed, of size bytes, lists the methods that the path has,
 * and is "" when there is no such path.  *param, *param_len: what stands for the pattern's {id}; NULL if it has none.
 */
extern const Route *route_find(const char *method, const char *path, const char **param, size_t *param_len, char *allowed, size_t size);

#endif
