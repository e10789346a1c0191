/*
 * window.c -- see window.h.
 *
 * A ring of bytes, one mutex.  Copies are made outside of it: the bytes behind `filled` of a piece are its claimer's, those between the
 * reader's position and `filled` the reader's, and `filled` moves under the mutex.
 */
#include "window.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TICK_MS 100				/* so often a waiting reader looks at *stop, and is idle */

struct MillmWindow
{
	pthread_mutex_t lock;
	pthread_cond_t has_bytes, has_room;
	void		(*idle) (void *arg);	/* the reader's, with its argument */
	void	   *idle_arg;
	atomic_bool ended;
	int64_t		begin, end, piece_bytes;
	int64_t		n_pieces, n_claimed;
	int64_t		taken;			/* position of the reader */
	int64_t    *filled;			/* [n_slots]: position behind the bytes of piece i, at i % n_slots */
	int64_t		n_slots;		/* more than the pieces that can be in the window at once */
	size_t		bytes;
	char	   *ring;			/* [bytes]: position p lies at (p - begin) % bytes */
};

MillmWindow *
millm_window_create(int64_t begin, int64_t end, int64_t piece_bytes, size_t bytes)
{
	MillmWindow *w = calloc(1, sizeof(*w));

	if (!w)
		return NULL;
	if ((uint64_t) (end - begin) < bytes)
		bytes = (size_t) (end - begin);
	if (piece_bytes > end - begin)
		piece_bytes = end - begin;
	w->begin = w->taken = begin;
	w->end = end;
	w->piece_bytes = piece_bytes;
	w->n_pieces = (end - begin - 1) / piece_bytes + 1;
	w->n_slots = (int64_t) bytes / piece_bytes + 2;
	w->bytes = bytes;
	w->filled = calloc((size_t) w->n_slots, sizeof(*w->filled));
	w->ring = malloc(bytes);
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->has_bytes, NULL);
	pthread_cond_init(&w->has_room, NULL);
	if (w->filled && w->ring)
		return w;
	millm_window_free(w);
	return NULL;
}

void
millm_window_free(MillmWindow *w)
{
	if (!w)
		return;
	pthread_cond_destroy(&w->has_room);
	pthread_cond_destroy(&w->has_bytes);
	pthread_mutex_destroy(&w->lock);
	free(w->ring);
	free(w->filled);
	free(w);
}

static int64_t
min64(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

bool
millm_window_claim(MillmWindow *w, MillmPiece *piece)
{
	bool		got;

	pthread_mutex_lock(&w->lock);
	for (;;)
	{
		got = !w->ended && w->n_claimed < w->n_pieces;
		piece->index = w->n_claimed;
		piece->at = w->begin + w->n_claimed * w->piece_bytes;
		piece->to = got ? piece->at + min64(w->piece_bytes, w->end - piece->at) : piece->at;
		if (!got || min64(piece->to - piece->at, (int64_t) w->bytes) <= w->taken + (int64_t) w->bytes - piece->at)
			break;
		pthread_cond_wait(&w->has_room, &w->lock);
	}
	if (got)
	{
		w->filled[piece->index % w->n_slots] = piece->at;
		w->n_claimed++;
	}
	pthread_mutex_unlock(&w->lock);
	return got;
}

bool
millm_window_fill(MillmWindow *w, MillmPiece *piece, const void *data, size_t len)
{
	const char *p = data;

	while (len > 0)
	{
		size_t		at = (size_t) ((piece->at - w->begin) % (int64_t) w->bytes), n = w->bytes - at, room;
		bool		ended;

		pthread_mutex_lock(&w->lock);
		while (!(ended = w->ended) && piece->at - w->taken == (int64_t) w->bytes)
			pthread_cond_wait(&w->has_room, &w->lock);
		room = w->bytes - (size_t) (piece->at - w->taken);
		pthread_mutex_unlock(&w->lock);
		if (ended)
			return false;
		n = n < len ? n : len;
		n = n < room ? n : room;
		memcpy(w->ring + at, p, n);
		piece->at += (int64_t) n;
		p += n;
		len -= n;
		pthread_mutex_lock(&w->lock);
		w->filled[piece->index % w->n_slots] = piece->at;
		pthread_cond_signal(&w->has_bytes);
		pthread_mutex_unlock(&w->lock);
	}
	return true;
}

/* Of the piece that the reader is in. */
static int64_t
available(const MillmWindow *w)
{
	int64_t		index = (w->taken - w->begin) / w->piece_bytes;

	return index < w->n_claimed ? w->filled[index % w->n_slots] - w->taken : 0;
}

void
millm_window_on_idle(MillmWindow *w, void (*idle) (void *arg), void *arg)
{
	w->idle = idle;
	w->idle_arg = arg;
}

size_t
millm_window_peek(MillmWindow *w, const atomic_bool *stop, const void **data)
{
	size_t		at = (size_t) ((w->taken - w->begin) % (int64_t) w->bytes);
	int64_t		n;

	pthread_mutex_lock(&w->lock);
	while ((n = available(w)) == 0 && !w->ended && !atomic_load(stop))
	{
		struct timespec until;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += TICK_MS * 1000000L;
		until.tv_sec += until.tv_nsec / 1000000000;
		until.tv_nsec %= 1000000000;
		if (pthread_cond_clockwait(&w->has_bytes, &w->lock, CLOCK_MONOTONIC, &until) == ETIMEDOUT && w->idle)
		{
			pthread_mutex_unlock(&w->lock);
			w->idle(w->idle_arg);
			pthread_mutex_lock(&w->lock);
		}
	}
	pthread_mutex_unlock(&w->lock);
	*data = w->ring + at;
	return atomic_load(stop) ? 0 : (size_t) min64(n, (int64_t) (w->bytes - at));
}

void
millm_window_take(MillmWindow *w, size_t n)
{
	pthread_mutex_lock(&w->lock);
	w->taken += (int64_t) n;
	pthread_cond_broadcast(&w->has_room);
	pthread_mutex_unlock(&w->lock);
}

void
millm_window_end(MillmWindow *w)
{
	pthread_mutex_lock(&w->lock);
	w->ended = true;
	pthread_cond_broadcast(&w->has_bytes);
	pthread_cond_broadcast(&w->has_room);
	pthread_mutex_unlock(&w->lock);
}

atomic_bool *
millm_window_ended(MillmWindow *w)
{
	return &w->ended;
}
