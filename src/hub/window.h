/*
 * window.h -- a bounded window onto a file on its way: connections fill it, each a piece of its own, and one reader takes the bytes in order.
 *
 * The file's bytes [begin, end) are cut into pieces, claimed in order.  The window holds at most so many bytes past those taken: who fills
 * more waits, so a slow reader slows the connections and memory stays bounded.  Any number of threads may claim and fill; one reads.
 * Refuses nothing: what the bytes are is not its business.  Positions are bytes from the start of the file.
 */
#ifndef MILLM_WINDOW_H
#define MILLM_WINDOW_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct MillmWindow MillmWindow;

/* A claimed piece; only its claimer looks at it. */
typedef struct MillmPiece
{
	int64_t		index;
	int64_t		at;				/* the next byte that is missing */
	int64_t		to;				/* behind the last */
} MillmPiece;

/* begin < end; piece_bytes and bytes > 0.  NULL when out of memory. */
extern MillmWindow *millm_window_create(int64_t begin, int64_t end, int64_t piece_bytes, size_t bytes);
extern void millm_window_free(MillmWindow *w);	/* no thread is in it any more; NULL is fine */

/* The next piece, as soon as there is room for it (or for a window full of it).  False: all are claimed, or the window has ended. */
extern bool millm_window_claim(MillmWindow *w, MillmPiece *piece);
/* The next len bytes of a piece, no more than it misses; waits for room.  False: the window has ended. */
extern bool millm_window_fill(MillmWindow *w, MillmPiece *piece, const void *data, size_t len);

/* While the reader waits, idle(arg) is called each 100 ms, by its own thread.  Before the first peek; NULL: nobody wants to know. */
extern void millm_window_on_idle(MillmWindow *w, void (*idle) (void *arg), void *arg);
/* How many of the next bytes lie at *data; waits for one.  0: *stop became true, or the window has ended and has no more. */
extern size_t millm_window_peek(MillmWindow *w, const atomic_bool *stop, const void **data);
/* The first n of those that peek told are done with. */
extern void millm_window_take(MillmWindow *w, size_t n);

/* No byte comes in from now on, and nobody waits.  The flag that says so becomes true within this call; it lives as long as the window. */
extern void millm_window_end(MillmWindow *w);
extern atomic_bool *millm_window_ended(MillmWindow *w);

#endif
