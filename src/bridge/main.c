/*
 * main.c -- millm-bridge: OpenAI's HTTP API and millm's own, answered by a PostgreSQL server with the extension.
 *
 * One thread runs one event loop (libevent); libpq talks to the database without blocking it.  No model, no state of one, no
 * line to the engine: every request becomes SQL, as the role of the key that it brings.
 *
 * SIGTERM and SIGINT drain: no new connection, the requests that run end, at most drain_timeout; a second one ends at once.
 */
#include <event2/event.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "db.h"
#include "events.h"
#include "http.h"
#include "log.h"
#include "settings.h"
#include "version.h"

/* Descriptors beside those of clients and the pool: of libevent, the log, cancels, LISTEN */
#define OTHER_DESCRIPTORS 64

#define MAX_ORIGIN 256
#define ORIGIN_CHARACTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._:/[]*"

static struct event_base *base;
static struct event *drain_timer;

static int
fail(const char *why)
{
	fprintf(stderr, "millm-bridge: %s\n", why);
	return 1;
}

static void
on_empty(void)
{
	event_base_loopbreak(base);
}

static void
on_drain_over(evutil_socket_t fd, short what, void *arg)
{
	(void) fd;
	(void) what;
	(void) arg;
	bridge_log("warning", "drain_timeout", json_pack("{s:i}", "connections", http_n_connections()));
	http_abort();
}

static void
on_signal(evutil_socket_t number, short what, void *arg)
{
	static bool is_draining;
	struct timeval tv = {settings.drain_timeout, 0};

	(void) what;
	(void) arg;
	if (is_draining)
	{
		on_drain_over(-1, 0, NULL);
		return;
	}
	is_draining = true;
	bridge_log("info", "draining", json_pack("{s:s, s:i}", "signal", strsignal(number), "connections", http_n_connections()));
	event_add(drain_timer, &tv);
	events_drain();
	http_drain(on_empty);
}

/* Every client and every connection of the pool needs a descriptor. */
static bool
raise_descriptors(char *why, size_t size)
{
	struct rlimit limit;
	const rlim_t need = (rlim_t) (settings.max_connections + settings.pool_size + OTHER_DESCRIPTORS + 64);

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= need)
		return true;
	if (limit.rlim_max < need)
	{
		snprintf(why, size, "max_connections and pool_size need %llu file descriptors, and this process may have %llu\n"
				 "HINT:  Raise the limit (ulimit -n, LimitNOFILE of systemd), or lower max_connections.",
				 (unsigned long long) need, (unsigned long long) limit.rlim_max);
		return false;
	}
	limit.rlim_cur = need;
	return setrlimit(RLIMIT_NOFILE, &limit) == 0;
}

static struct event_base *
new_loop(void)
{
	struct event_config *config = event_config_new();
	struct event_base *result = NULL;

	/* http.c watches sockets edge-triggered, and for their end */
	if (config && event_config_require_features(config, EV_FEATURE_ET | EV_FEATURE_EARLY_CLOSE) == 0)
		result = event_base_new_with_config(config);
	if (config)
		event_config_free(config);
	return result;
}

int
main(int argc, char **argv)
{
	char		why[1024] = "out of memory";
	struct event *signals[2];

	settings_read(argc, argv);
#ifdef M_MMAP_THRESHOLD
	/* glibc would raise this with each large block that is freed, and keep ever more of what large bodies took */
	mallopt(M_MMAP_THRESHOLD, 128 * 1024);
#endif
	signal(SIGPIPE, SIG_IGN);
	if (settings.anonymous_role[0] && !http_is_loopback())
		return fail("anonymous_role is only for a loopback address\nHINT:  Make keys with millm.create_api_key(), or listen on 127.0.0.1.");
	/* it goes into a header as it is */
	if (strlen(settings.cors_origin) > MAX_ORIGIN || settings.cors_origin[strspn(settings.cors_origin, ORIGIN_CHARACTERS)])
		return fail("cors_origin is an origin like \"https://app.example.com\", or *");
	if (!raise_descriptors(why, sizeof(why)) || !db_check(why, sizeof(why)))
		return fail(why);

	base = new_loop();
	if (!base)
		return fail("there is no event loop that can watch sockets edge-triggered");
	if (!http_open(base, why, sizeof(why)))
		return fail(why);
	bridge_log("info", "listening", json_pack("{s:s, s:s}", "address", http_address(), "version", MILLM_VERSION));
	drain_timer = evtimer_new(base, on_drain_over, NULL);
	signals[0] = evsignal_new(base, SIGTERM, on_signal, NULL);
	signals[1] = evsignal_new(base, SIGINT, on_signal, NULL);
	if (!drain_timer || !signals[0] || !signals[1] || event_add(signals[0], NULL) != 0 || event_add(signals[1], NULL) != 0)
		return fail(why);
	db_open(base);
	events_open(base);

	event_base_dispatch(base);

	db_close();
	events_close();
	bridge_log("info", "stopped", NULL);
	event_free(drain_timer);
	event_free(signals[0]);
	event_free(signals[1]);
	event_base_free(base);
	return 0;
}
