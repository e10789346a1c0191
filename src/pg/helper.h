/*
 * helper.h -- one helper program as the supervisor's child: start, watch, restart.
 */
#ifndef MILLM_HELPER_H
#define MILLM_HELPER_H

#include "postgres.h"

#include "utils/timestamp.h"

#include "live.h"

#define MILLM_TAIL_BYTES 8192

typedef struct MillmChild
{
	MillmHelper which;
	const char *program;		/* "millm-engine" */
	pid_t		pid;			/* 0: not running */
	int			log_fd;			/* its stdout and stderr; -1: none */
	int			control_fd;		/* our end of its fd 3; -1: none */
	char		line[1024];		/* of the log, not complete yet */
	int			line_len;
	char		tail[MILLM_TAIL_BYTES];	/* the last that it said */
	int			tail_len;
	char		hello[256];		/* received from fd 3 so far */
	int			hello_len;
	bool		ready;
	char		verdict[160];	/* why we ended it ourselves; "" if we did not */
	TimestampTz started;
	TimestampTz restart_at;		/* while it is not running */
	int			delay_ms;		/* before the next restart */
} MillmChild;

extern void millm_child_init(MillmChild *child, MillmHelper which);

/* Do what time and events ask for: read its log and its HELLO, notice its end, start it.  Returns true when it has just ended. */
extern bool millm_child_tend(MillmChild *child);

/* Milliseconds until tend() has something to do without an event; -1: nothing. */
extern long millm_child_timeout(const MillmChild *child);

/* Ask it to end, wait a little, make it end. */
extern void millm_child_stop(MillmChild *child);

#endif
