/*
 * metrics.h -- counters for GET /metrics.
 */
#ifndef MILLM_BRIDGE_METRICS_H
#define MILLM_BRIDGE_METRICS_H

#include "http.h"

/* The request is over: with its status, or 499 when the client went away before the answer. */
extern void metrics_request(const HttpRequest *r, int status, int64_t duration_us);

/* GET /metrics: Prometheus' text format. */
extern void metrics_handle(HttpRequest *r);

#endif
