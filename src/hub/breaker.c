/*
 * breaker.c -- see breaker.h.
 */
#include "breaker.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "clock.h"
#include "serve.h"

#define MAX_FAILURES	5
#define FIRST_MS		30000
#define MAX_FACTOR		20		/* 10 minutes, of FIRST_MS */
#define PROBE_LOOK_MS	250		/* for the outcome of another's try */

static struct
{
	pthread_mutex_t lock;
	char		endpoint[256];
	int			first_ms;
	int			n_failures;		/* in a row */
	int			factor;			/* of first_ms: how long it was last open; 0: closed */
	int64_t		until_ms;		/* of millm_now_ms(): open; after that half-open */
	bool		is_tried;		/* a request is on its way to close it */
	char		failure[160];	/* the last one */
} breaker = {.lock = PTHREAD_MUTEX_INITIALIZER, .first_ms = FIRST_MS};

/* When, by the clock on the wall. */
static void
shown_time(int64_t at_ms, char *buf, size_t size)
{
	time_t		t = time(NULL) + (time_t) ((at_ms - millm_now_ms() + 999) / 1000);
	struct tm	tm;

	strftime(buf, size, "%Y-%m-%d %H:%M:%S UTC", gmtime_r(&t, &tm));
}

/* With the lock held. */
static void
close_it(void)
{
	breaker.n_failures = breaker.factor = 0;
	breaker.is_tried = false;
}

/* With the lock held. */
static void
look_at(const char *endpoint)
{
	if (strncmp(breaker.endpoint, endpoint, sizeof(breaker.endpoint) - 1) == 0)
		return;
	snprintf(breaker.endpoint, sizeof(breaker.endpoint), "%s", endpoint);
	close_it();
}

MillmCode
millm_breaker_enter(const char *endpoint, bool *is_probe, int *wait_ms, MillmError *err)
{
	MillmCode	rc = MILLM_OK;
	int64_t		left;
	char		when[40];

	pthread_mutex_lock(&breaker.lock);
	look_at(endpoint);
	left = breaker.factor ? breaker.until_ms - millm_now_ms() : 0;
	*is_probe = breaker.factor && left <= 0 && !breaker.is_tried;
	if (*is_probe)
		breaker.is_tried = true;
	else if (breaker.factor)
	{
		*wait_ms = left > 0 ? (int) left : PROBE_LOOK_MS;
		rc = millm_fail(err, MILLM_E_HUB_UNAVAILABLE, "the hub is left alone for a while, because its last %d requests have failed", breaker.n_failures);
		shown_time(breaker.until_ms, when, sizeof(when));
		if (left > 0)
			millm_detail(err, "The next try is at %s, in %d s. The last failure: %s.", when, (int) ((left + 999) / 1000), breaker.failure);
		else
			millm_detail(err, "Another request is trying it right now. The last failure: %s.", breaker.failure);
		millm_hint(err, "Check the network and millm.hf_endpoint.");
	}
	pthread_mutex_unlock(&breaker.lock);
	return rc;
}

void
millm_breaker_leave(bool is_probe)
{
	if (!is_probe)
		return;
	pthread_mutex_lock(&breaker.lock);
	breaker.is_tried = false;
	pthread_mutex_unlock(&breaker.lock);
}

/* With the lock held; jitter, so that many servers do not come back at once. */
static void
open_it(void)
{
	int64_t		ms;

	breaker.factor = !breaker.factor ? 1 : 2 * breaker.factor < MAX_FACTOR ? 2 * breaker.factor : MAX_FACTOR;
	breaker.is_tried = false;
	ms = (int64_t) breaker.first_ms * breaker.factor;
	breaker.until_ms = millm_now_ms() + ms + ms / 10 * (millm_now_us() % 100) / 100;
}

void
millm_breaker_report(const char *endpoint, const char *failure)
{
	bool		opened = false, closed = false;
	char		when[40];
	int			n_failures;

	pthread_mutex_lock(&breaker.lock);
	look_at(endpoint);
	if (!failure)
	{
		closed = breaker.factor > 0;
		close_it();
	}
	else
	{
		breaker.n_failures++;
		snprintf(breaker.failure, sizeof(breaker.failure), "%s", failure);
		/* while it is open, requests that had begun before may still fail */
		opened = breaker.factor ? millm_now_ms() >= breaker.until_ms : breaker.n_failures >= MAX_FAILURES;
		if (opened)
			open_it();
	}
	n_failures = breaker.n_failures;
	shown_time(breaker.until_ms, when, sizeof(when));
	pthread_mutex_unlock(&breaker.lock);
	if (opened)
		millm_log("WARNING", "%d requests to %s have failed in a row (%s): it is asked again at %s", n_failures, endpoint, failure, when);
	else if (closed)
		millm_log("LOG", "%s answers again", endpoint);
}

void
millm_breaker_describe(char *buf, size_t size)
{
	char		when[40];

	pthread_mutex_lock(&breaker.lock);
	shown_time(breaker.until_ms, when, sizeof(when));
	if (!breaker.factor)
		snprintf(buf, size, "closed");
	else if (millm_now_ms() < breaker.until_ms)
		snprintf(buf, size, "open until %s", when);
	else
		snprintf(buf, size, "half-open");
	pthread_mutex_unlock(&breaker.lock);
}

void
millm_breaker_set_first_ms(int ms)
{
	pthread_mutex_lock(&breaker.lock);
	breaker.first_ms = ms;
	pthread_mutex_unlock(&breaker.lock);
}
