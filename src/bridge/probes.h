/*
 * probes.h -- GET /health and GET /ready.
 */
#ifndef MILLM_BRIDGE_PROBES_H
#define MILLM_BRIDGE_PROBES_H

#include "http.h"

/* The process lives. */
extern void probe_health(HttpRequest *r);
/* The database answers, and has the extension; else 503 with the reason. */
extern void probe_ready(HttpRequest *r);

#endif
