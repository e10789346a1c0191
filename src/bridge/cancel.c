/*
 * cancel.c -- a list of connections to cancel, and the threads that work it off.
 *
 * Owns the list, the threads and the pipe over which they tell the loop.  A PGcancel is a copy of what it needs, so the
 * connection itself stays with the loop.
 */
#include "cancel.h"

#include <event2/event.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#define N_THREADS 4				/* many clients may go away at once */

typedef struct Order
{
	struct Order *next;
	PGcancel   *cancel;
	void	   *arg;
} Order;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static Order *first;			/* under lock, as is last */
static Order **last = &first;
static int	pipe_fds[2];
static struct event *pipe_event;
static void (*when_done) (void *arg);

static void *
work(void *unused)
{
	(void) unused;
	for (;;)
	{
		Order	   *order;
		char		text[256];

		pthread_mutex_lock(&lock);
		while (!first)
			pthread_cond_wait(&more, &lock);
		order = first;
		if (!(first = order->next))
			last = &first;
		pthread_mutex_unlock(&lock);

		/* a failure shows itself: the statement goes on until its timeout */
		(void) PQcancel(order->cancel, text, sizeof(text));
		PQfreeCancel(order->cancel);
		/* a pointer is far below PIPE_BUF: written whole or not at all */
		while (write(pipe_fds[1], &order->arg, sizeof(order->arg)) < 0)
			;
		free(order);
	}
	return NULL;
}

static void
on_pipe(evutil_socket_t fd, short what, void *unused)
{
	void	   *arg;

	(void) what;
	(void) unused;
	while (read(fd, &arg, sizeof(arg)) == (ssize_t) sizeof(arg))
		when_done(arg);
}

bool
cancel_open(struct event_base *base, void (*on_done) (void *arg))
{
	sigset_t	all;
	sigset_t	before;
	bool		ok = true;

	when_done = on_done;
	if (pipe2(pipe_fds, O_CLOEXEC) != 0 || fcntl(pipe_fds[0], F_SETFL, O_NONBLOCK) != 0)
		return false;
	if (!(pipe_event = event_new(base, pipe_fds[0], EV_READ | EV_PERSIST, on_pipe, NULL)) || event_add(pipe_event, NULL) != 0)
		return false;
	sigfillset(&all);			/* signals are the loop's */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (int i = 0; i < N_THREADS && ok; i++)
	{
		pthread_t	thread;

		ok = pthread_create(&thread, NULL, work, NULL) == 0;
		if (ok)
			pthread_detach(thread);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return ok;
}

void
cancel_close(void)
{
	event_free(pipe_event);		/* the threads end with the process */
}

bool
cancel_send(PGconn *conn, void *arg)
{
	Order	   *order = malloc(sizeof(*order));

	if (!order || !(order->cancel = PQgetCancel(conn)))
	{
		free(order);
		return false;
	}
	order->arg = arg;
	order->next = NULL;
	pthread_mutex_lock(&lock);
	*last = order;
	last = &order->next;
	pthread_cond_signal(&more);
	pthread_mutex_unlock(&lock);
	return true;
}
