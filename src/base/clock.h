/*
 * clock.h -- time that only goes on, for waits and measurements: nobody sets this clock.
 */
#ifndef MILLM_CLOCK_H
#define MILLM_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Milliseconds since some point in the past, the same for all processes of the machine. */
static inline int64_t
millm_now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t) ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* The same clock in microseconds. */
static inline int64_t
millm_now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t) ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

#endif
