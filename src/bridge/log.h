/*
 * log.h -- the log: one JSON object a line, on stderr.
 */
#ifndef MILLM_BRIDGE_LOG_H
#define MILLM_BRIDGE_LOG_H

#include <jansson.h>

/*
 * Write {"time": now, "level": level, "event": event, ...fields}.  fields is taken; NULL is none.  Never blocks: lines that
 * nobody reads are dropped, and the next line that gets through says how many.  Level is "info", "warning" or "error".
 */
extern void bridge_log(const char *level, const char *event, json_t *fields);

#endif
