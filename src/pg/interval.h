/*
 * interval.h -- a timeout that came as an interval.
 */
#ifndef MILLM_INTERVAL_H
#define MILLM_INTERVAL_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "client.h"

#define MILLM_MAX_TIMEOUT_MS (24 * 3600 * 1000)

/* In milliseconds.  INVALID_ARGUMENT when it is negative or longer than a day. */
static inline int
millm_interval_ms(const Interval *interval)
{
	double		ms = interval->time / 1000.0 + (interval->day + 30.0 * interval->month) * 86400000.0;
	MillmError	err;

	if (ms >= 0 && ms <= MILLM_MAX_TIMEOUT_MS)
		return (int) ms;
	millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "timeout must be between 0 and 1 day");
	millm_ereport(ERROR, &err);
	return 0;
}

#endif
