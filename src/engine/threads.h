/*
 * threads.h -- a team of threads that runs one parallel loop at a time.
 *
 * The thread that calls millm_team_run() works too.  Workers spin for a short while after a loop,
 * because the next one of the same step is microseconds away, then sleep until they are woken: the
 * engine lives beside PostgreSQL and must not burn its CPUs between requests.
 */
#ifndef MILLM_THREADS_H
#define MILLM_THREADS_H

#include <stdint.h>

#include "error.h"

#define MILLM_MAX_THREADS 1024

typedef struct MillmTeam MillmTeam;

/* CPUs that this process may use, at least 1. */
extern int	millm_cpu_count(void);

/* n_threads counts the caller: 1 starts no thread; 0 means millm_cpu_count(). */
extern MillmCode millm_team_create(int n_threads, MillmTeam **out, MillmError *err);
extern void millm_team_free(MillmTeam *team);	/* NULL is fine */
extern int	millm_team_size(const MillmTeam *team);

/*
 * Call work(arg, begin, end) for pieces of grain to largest items (the last may have fewer) that cover [0, n_items), and return when all
 * are done.  Pieces begin large and shrink towards grain: a thread that another process holds up delays the others by little.
 * They run at the same time and in any order; everything written is visible on return.
 * Not for concurrent use, and work must not call it.
 */
extern void millm_team_run(MillmTeam *team, void (*work) (void *arg, int64_t begin, int64_t end), void *arg,
						   int64_t n_items, int64_t grain, int64_t largest);

#endif
