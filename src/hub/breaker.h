/*
 * breaker.h -- a hub that keeps failing is left alone for a while.
 *
 *     closed --5 failures in a row--> open --its time is over--> half-open --the one request that tries succeeds--> closed
 *                                      ^--------------it fails: open for twice the time-----------/
 *
 * There is one for the process, and it is of one endpoint: another endpoint begins closed.  Any thread may ask and report.
 *
 * A failure is the hub's: no connection, no answer in time, an answer cut short, a status 5xx.  All else that it answers, a refusal too, shows that it
 * works.  What other hosts do that it points to says nothing of it.
 */
#ifndef MILLM_BREAKER_H
#define MILLM_BREAKER_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"

/*
 * Before a request to the hub.  *is_probe: it is the one that tries.  HUB_UNAVAILABLE with the time of the next try when the hub is to be
 * left alone; *wait_ms: ask again after so long.
 */
extern MillmCode millm_breaker_enter(const char *endpoint, bool *is_probe, int *wait_ms, MillmError *err);
/* After it, whatever came of it: a try without an outcome (a cancel) leaves the next request to try. */
extern void millm_breaker_leave(bool is_probe);
/* What the hub did with a request: NULL is well, else how it failed. */
extern void millm_breaker_report(const char *endpoint, const char *failure);

/* For people: "closed", "half-open", "open until 2026-11-21 12:00:05 UTC". */
extern void millm_breaker_describe(char *buf, size_t size);
/* How long the first opening lasts; each failed try doubles it, up to 20 times as long.  Default 30000. */
extern void millm_breaker_set_first_ms(int ms);

#endif
