/*
 * worker.h -- one thread for work that is too long for the event loop: encoding and decoding long texts.
 */
#ifndef MILLM_WORKER_H
#define MILLM_WORKER_H

#include <stdbool.h>
#include <stddef.h>

typedef struct MillmWorker MillmWorker;

/* Jobs are run one after the other, in order.  With is_ending the process ends: answer so, without doing the work. */
typedef void (*MillmWorkFn) (void *arg, bool is_ending);

extern MillmWorker *millm_worker_create(int max_jobs, size_t max_bytes);	/* NULL: no memory, or no thread */
/* Queue a job that holds so many bytes; false when max_jobs wait, or max_bytes would be exceeded. */
extern bool millm_worker_post(MillmWorker *w, MillmWorkFn fn, void *arg, size_t bytes);
/* Every queued job is called with is_ending before this returns. */
extern void millm_worker_free(MillmWorker *w);

#endif
