/*
 * events.h -- GET /api/events: what is notified on millm_progress, as Server-Sent Events.
 */
#ifndef MILLM_BRIDGE_EVENTS_H
#define MILLM_BRIDGE_EVENTS_H

#include "http.h"

struct event_base;

/* GET /api/events: a stream without an end. */
extern void events_handle(HttpRequest *r);

/* Before the first request. */
extern void events_open(struct event_base *base);
/* Draining begins: end all streams, which would not end by themselves.  Those that come later are refused, 503. */
extern void events_drain(void);
/* After the loop. */
extern void events_close(void);

#endif
