/*
 * worker.c -- one thread and a ring of jobs.
 */
#include "worker.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct Job
{
	MillmWorkFn fn;
	void	   *arg;
	size_t		bytes;
} Job;

struct MillmWorker
{
	pthread_t	thread;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	bool		is_ending;
	int			max;
	int			first;
	int			n;
	size_t		bytes;			/* of these */
	size_t		max_bytes;
	Job			jobs[];			/* [max], n of them from first on, around the end */
};

static void *
worker_thread(void *arg)
{
	MillmWorker *w = arg;

	pthread_mutex_lock(&w->lock);
	for (;;)
	{
		Job			job;
		bool		is_ending;

		while (w->n == 0 && !w->is_ending)
			pthread_cond_wait(&w->wake, &w->lock);
		if (w->n == 0)
			break;
		job = w->jobs[w->first];
		w->first = (w->first + 1) % w->max;
		w->n--;
		w->bytes -= job.bytes;
		is_ending = w->is_ending;
		pthread_mutex_unlock(&w->lock);
		job.fn(job.arg, is_ending);
		pthread_mutex_lock(&w->lock);
	}
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

MillmWorker *
millm_worker_create(int max_jobs, size_t max_bytes)
{
	MillmWorker *w = calloc(1, sizeof(*w) + (size_t) max_jobs * sizeof(w->jobs[0]));

	if (!w)
		return NULL;
	w->max = max_jobs;
	w->max_bytes = max_bytes;
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->wake, NULL);
	if (pthread_create(&w->thread, NULL, worker_thread, w) == 0)
		return w;
	pthread_cond_destroy(&w->wake);
	pthread_mutex_destroy(&w->lock);
	free(w);
	return NULL;
}

bool
millm_worker_post(MillmWorker *w, MillmWorkFn fn, void *arg, size_t bytes)
{
	bool		ok;

	pthread_mutex_lock(&w->lock);
	ok = w->n < w->max && bytes <= w->max_bytes - w->bytes;
	if (ok)
	{
		w->jobs[(w->first + w->n) % w->max] = (Job) {fn, arg, bytes};
		w->n++;
		w->bytes += bytes;
		pthread_cond_signal(&w->wake);
	}
	pthread_mutex_unlock(&w->lock);
	return ok;
}

void
millm_worker_free(MillmWorker *w)
{
	pthread_mutex_lock(&w->lock);
	w->is_ending = true;
	pthread_cond_signal(&w->wake);
	pthread_mutex_unlock(&w->lock);
	pthread_join(w->thread, NULL);
	pthread_cond_destroy(&w->wake);
	pthread_mutex_destroy(&w->lock);
	free(w);
}
