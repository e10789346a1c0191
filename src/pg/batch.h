/*
 * batch.h -- several requests of one statement under way at once, answered in the order in which they were added.
 *
 * Each has a connection of its own to the engine, so what holds for one request holds for each: closing is canceling, and an error is the
 * request's own.  At most look_ahead of them, and about 16 MB, are held at a time.  SERVER_BUSY is waited for, not reported, while the
 * batch has other requests in the engine; then for a minute more.
 */
#ifndef MILLM_BATCH_H
#define MILLM_BATCH_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "error.h"

#define MILLM_MAX_LOOK_AHEAD	256

typedef struct MillmBatch MillmBatch;

/* What became of a request.  Borrowed, until the next millm_batch_next() of the batch. */
typedef struct MillmAnswer
{
	const char *key;			/* as it was added */
	StringInfo	reply;			/* the RESULT's payload; NULL: nothing was asked, or it failed */
	const MillmError *error;	/* NULL: it has not failed */
} MillmAnswer;

/*
 * An empty batch in the current memory context, whose reset closes all connections.  look_ahead is 1 to MILLM_MAX_LOOK_AHEAD; of more requests than
 * the engine takes (millm.max_sequences and millm.max_queue) it makes so many.  sends_rows: before it waits, the query's rows go to the SQL client.
 */
extern MillmBatch *millm_batch_create(int look_ahead, bool sends_rows);

/* How many requests may be added now; and how many are there that millm_batch_next() has not returned. */
extern int	millm_batch_room(const MillmBatch *b);
extern int	millm_batch_count(const MillmBatch *b);

/*
 * Add a request (JSON text, UTF-8, at most WIRE_MAX_REQUEST_BYTES), or with NULL a place in the order that asks nothing; or one that has failed
 * already.  There must be room.  key, which may be NULL, comes back with the answer.  All is copied.
 */
extern void millm_batch_add(MillmBatch *b, const char *request, const char *key);
extern void millm_batch_add_failed(MillmBatch *b, const MillmError *error, const char *key);

/*
 * Wait for the oldest request's answer and take it out; the batch must not be empty.  All others are sent and received meanwhile.  What is no single
 * request's failure (the engine is not there, an interrupt) is ereported, all connections closed.
 */
extern void millm_batch_next(MillmBatch *b, MillmAnswer *out);

/* Close all connections now: an error is about to leave.  Nothing can be done with the batch any more. */
extern void millm_batch_close(MillmBatch *b);

#endif
