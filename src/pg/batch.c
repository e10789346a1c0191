/*-------------------------------------------------------------------------
 * batch.c
 *	  Several requests of one statement under way at once.
 *
 * Owns:     a ring of entries, each in a memory context of its own, a connection in one below that.
 * Does not: know what a request means, nor read the rows that requests are made of.
 *
 * Answers are wanted in order, and no more than look_ahead entries exist, so only the oldest one is worth waiting for: its
 * answer alone makes room.  One socket is waited on; the others are looked at when something has happened.  Replies that have come
 * early lie in memory, so the engine never waits for us.
 *
 * Credit says how many requests may be sent now.  An answer gives one back; SERVER_BUSY takes all, and from then on one is tried every
 * RETRY_MS, until as many are under way again as may be.  So the batch keeps the share of a full engine that it has got, and gets
 * more as others leave.
 *-------------------------------------------------------------------------
 */
#include "batch.h"

#include "utils/memutils.h"

#include "client.h"
#include "clock.h"
#include "settings.h"

/* Of requests and keys held; the last one added may go beyond. */
#define BATCH_BYTES		(16 << 20)
#define RETRY_MS		100
/* How long the engine may be full of others' requests. */
#define PATIENCE_MS		60000

typedef struct Entry
{
	MemoryContext context;		/* its end closes the connection, too */
	MemoryContext attempt;		/* the connection */
	MillmClient *client;		/* NULL: not under way */
	bool		is_answered;
	char	   *request;		/* NULL: asks nothing */
	char	   *key;
	size_t		n_bytes;		/* of both */
	StringInfoData reply;
	MillmError *error;			/* NULL: none */
} Entry;

struct MillmBatch
{
	MemoryContext context;
	bool		sends_rows;
	int			capacity;
	int			first;			/* the oldest */
	int			n;
	int			n_under_way;
	size_t		n_bytes;		/* of requests and keys held */
	int			credit;
	int64		retry_at_ms;
	int64		busy_since_ms;	/* 0: the latest answer was none of SERVER_BUSY */
	Entry	   *last;			/* that was taken out: its answer is borrowed */
	Entry	   *entries[FLEXIBLE_ARRAY_MEMBER];	/* [capacity] */
};

MillmBatch *
millm_batch_create(int look_ahead, bool sends_rows)
{
	int			capacity = Min(look_ahead, millm_max_sequences + millm_max_queue);
	MillmBatch *b = palloc0(offsetof(MillmBatch, entries) + capacity * sizeof(Entry *));

	Assert(look_ahead >= 1 && look_ahead <= MILLM_MAX_LOOK_AHEAD);
	b->context = CurrentMemoryContext;
	b->sends_rows = sends_rows;
	b->capacity = capacity;
	b->credit = capacity;
	return b;
}

static Entry *
entry_at(const MillmBatch *b, int i)
{
	return b->entries[(b->first + i) % b->capacity];
}

int
millm_batch_room(const MillmBatch *b)
{
	return b->n_bytes < BATCH_BYTES ? b->capacity - b->n : 0;
}

int
millm_batch_count(const MillmBatch *b)
{
	return b->n;
}

/* The entry has an answer: its connection goes. */
static void
answered(MillmBatch *b, Entry *e)
{
	e->is_answered = true;
	if (!e->client)
		return;
	e->client = NULL;
	MemoryContextDelete(e->attempt);
	b->n_under_way--;
	b->credit++;
	b->busy_since_ms = 0;
}

static void
failed(MillmBatch *b, Entry *e, const MillmError *err)
{
	e->error = MemoryContextAlloc(e->context, sizeof(*err));
	*e->error = *err;
	answered(b, e);
}

/* The newest entry, empty. */
static Entry *
new_entry(MillmBatch *b, const char *key)
{
	MemoryContext context = AllocSetContextCreate(b->context, "millm request", ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	Entry	   *e = palloc0(sizeof(Entry));

	Assert(b->n < b->capacity);
	e->context = context;
	e->key = key ? pstrdup(key) : NULL;
	e->n_bytes = key ? strlen(key) : 0;
	initStringInfo(&e->reply);
	MemoryContextSwitchTo(old);
	b->n_bytes += e->n_bytes;
	b->entries[(b->first + b->n++) % b->capacity] = e;
	return e;
}

void
millm_batch_add(MillmBatch *b, const char *request, const char *key)
{
	Entry	   *e = new_entry(b, key);

	if (!request)
	{
		answered(b, e);
		return;
	}
	e->request = MemoryContextStrdup(e->context, request);
	e->n_bytes += strlen(request);
	b->n_bytes += strlen(request);
}

void
millm_batch_add_failed(MillmBatch *b, const MillmError *error, const char *key)
{
	failed(b, new_entry(b, key), error);
}

/* The engine is full: the entry waits for another attempt.  False: it has waited long enough. */
static bool
refused(MillmBatch *b, Entry *e)
{
	const int64 now = millm_now_ms();

	if (b->busy_since_ms == 0)
		b->busy_since_ms = now;
	if (b->n_under_way == 1 && now - b->busy_since_ms > PATIENCE_MS)
		return false;
	e->client = NULL;
	MemoryContextDelete(e->attempt);
	b->n_under_way--;
	b->credit = 0;
	b->retry_at_ms = now + RETRY_MS;
	return true;
}

/* Take what has come for an entry that is under way. */
static void
look(MillmBatch *b, Entry *e)
{
	MillmError	err;
	int			kind = millm_client_poll(e->client, &e->reply, &err);

	if (kind == WIRE_RESULT)
		answered(b, e);
	else if (kind == WIRE_ERROR)
	{
		if (err.code == MILLM_E_ENGINE_UNAVAILABLE)
			millm_client_receive(e->client, &e->reply, 0);	/* says how the engine ended */
		if (err.code != MILLM_E_SERVER_BUSY || !refused(b, e))
			failed(b, e, &err);
	}
	else if (kind != 0)
		millm_reply_invalid("result");
}

/* Send, oldest first, what there is credit for.  Returns when to try again, as milliseconds to wait; < 0: everything is sent. */
static int
send_waiting(MillmBatch *b)
{
	const int64 now = millm_now_ms();

	if (b->credit == 0 && b->n_under_way < b->capacity && now >= b->retry_at_ms)
	{
		b->credit = 1;
		b->retry_at_ms = now + RETRY_MS;
	}
	for (int i = 0; i < b->n; i++)
	{
		Entry	   *e = entry_at(b, i);
		MemoryContext old;

		if (e->client || e->is_answered)
			continue;
		if (b->credit > 0 && b->n_under_way > 0 && !millm_client_can_open())
		{
			b->credit = 0;
			b->retry_at_ms = now + RETRY_MS;
		}
		if (b->credit == 0)
			return (int) Max(b->retry_at_ms - now, 0);
		e->attempt = AllocSetContextCreate(e->context, "millm connection", ALLOCSET_SMALL_SIZES);
		old = MemoryContextSwitchTo(e->attempt);
		e->client = millm_compute_open(e->request);
		MemoryContextSwitchTo(old);
		b->n_under_way++;
		b->credit--;
	}
	return -1;
}

/* Until the oldest entry has its answer. */
static void
work(MillmBatch *b)
{
	Entry	   *oldest = entry_at(b, 0);
	bool		has_flushed = !b->sends_rows;

	for (;;)
	{
		int			retry_in_ms;

		for (int i = 0; i < b->n; i++)
			if (entry_at(b, i)->client)
				look(b, entry_at(b, i));
		retry_in_ms = send_waiting(b);
		if (oldest->is_answered)
			return;
		if (has_flushed)
			millm_client_sleep(oldest->client, retry_in_ms);
		else
			millm_client_flush_rows(oldest->client);
		has_flushed = true;
	}
}

void
millm_batch_close(MillmBatch *b)
{
	for (int i = 0; i < b->n; i++)
		millm_client_close(entry_at(b, i)->client);
}

void
millm_batch_next(MillmBatch *b, MillmAnswer *out)
{
	Entry	   *e = entry_at(b, 0);

	if (b->last)
		MemoryContextDelete(b->last->context);
	b->last = NULL;
	PG_TRY();
	{
		work(b);
	}
	PG_CATCH();
	{
		millm_batch_close(b);
		PG_RE_THROW();
	}
	PG_END_TRY();
	b->last = e;
	b->first = (b->first + 1) % b->capacity;
	b->n--;
	b->n_bytes -= e->n_bytes;
	*out = (MillmAnswer) {.key = e->key, .error = e->error, .reply = e->request && !e->error ? &e->reply : NULL};
}
