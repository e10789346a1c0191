/*
 * metrics.c -- counters, in the text format of Prometheus.
 *
 * Per route and status; both come from our own tables, so no client can make their number grow.
 */
#include "metrics.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "db.h"
#include "routes.h"

#define MAX_ROUTES 64
#define MAX_STATUSES 32

typedef struct Counter
{
	int			status;			/* 0: unused */
	long		n;
} Counter;

typedef struct RouteCounters
{
	Counter		by_status[MAX_STATUSES];
	long		n;
	double		seconds;
} RouteCounters;

static RouteCounters counters[MAX_ROUTES + 1];	/* the last one: no route */
static long prompt_tokens;
static long completion_tokens;

void
metrics_request(const HttpRequest *r, int status, int64_t duration_us)
{
	long		i = r->route ? r->route - routes : MAX_ROUTES;
	RouteCounters *c = &counters[i < MAX_ROUTES ? i : MAX_ROUTES];

	for (int k = 0; k < MAX_STATUSES; k++)
		if (c->by_status[k].status == status || c->by_status[k].status == 0)
		{
			c->by_status[k].status = status;
			c->by_status[k].n++;
			break;
		}
	c->n++;
	c->seconds += (double) duration_us / 1e6;
	if (r->prompt_tokens > 0)
		prompt_tokens += r->prompt_tokens;
	if (r->completion_tokens > 0)
		completion_tokens += r->completion_tokens;
}

static void
one(FILE *f, const char *name, const char *type, const char *help, double value)
{
	fprintf(f, "# HELP millm_bridge_%s %s\n# TYPE millm_bridge_%s %s\nmillm_bridge_%s %.15g\n", name, help, name, type, name, value);
}

void
metrics_handle(HttpRequest *r)
{
	char	   *text = NULL;
	size_t		len = 0;
	FILE	   *f = open_memstream(&text, &len);
	DbStats		db = db_stats();

	if (!f)
	{
		http_reply(r, 503, NULL, NULL, 0);
		return;
	}
	fputs("# HELP millm_bridge_requests_total Requests that are over, by route and HTTP status; 499: the client went away.\n"
		  "# TYPE millm_bridge_requests_total counter\n", f);
	for (int i = 0; i <= MAX_ROUTES; i++)
		for (int k = 0; k < MAX_STATUSES && counters[i].by_status[k].status; k++)
			fprintf(f, "millm_bridge_requests_total{method=\"%s\",route=\"%s\",status=\"%d\"} %ld\n", i < n_routes ? routes[i].method : "",
					i < n_routes ? routes[i].pattern : "none", counters[i].by_status[k].status, counters[i].by_status[k].n);
	fputs("# HELP millm_bridge_request_seconds Time from the head of a request to the end of its answer.\n"
		  "# TYPE millm_bridge_request_seconds summary\n", f);
	for (int i = 0; i <= MAX_ROUTES; i++)
		if (counters[i].n > 0)
			fprintf(f, "millm_bridge_request_seconds_sum{method=\"%s\",route=\"%s\"} %.6f\n"
					"millm_bridge_request_seconds_count{method=\"%s\",route=\"%s\"} %ld\n",
					i < n_routes ? routes[i].method : "", i < n_routes ? routes[i].pattern : "none", counters[i].seconds,
					i < n_routes ? routes[i].method : "", i < n_routes ? routes[i].pattern : "none", counters[i].n);
	one(f, "prompt_tokens_total", "counter", "Tokens of prompts.", (double) prompt_tokens);
	one(f, "completion_tokens_total", "counter", "Tokens that were generated.", (double) completion_tokens);
	one(f, "connections", "gauge", "Clients that are connected.", http_n_connections());
	one(f, "database_connections", "gauge", "Connections to the database.", db.connections);
	one(f, "database_connections_busy", "gauge", "Of these, the ones that work for a request.", db.busy);
	one(f, "queued_requests", "gauge", "Requests that wait for a connection to the database.", db.queued);
	one(f, "canceled_statements_total", "counter", "Statements that were canceled because their client went away.", (double) db.canceled);
	one(f, "failed_connects_total", "counter", "Connections to the database that did not come about.", (double) db.failed_connects);
	if (fclose(f) == 0)
		http_reply(r, 200, "text/plain; version=0.0.4; charset=utf-8", text, len);
	else
		http_reply(r, 503, NULL, NULL, 0);
	free(text);
}
