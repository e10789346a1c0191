/*
 * fetch.c -- one file, from the Hub into a sink, proved.
 *
 * The first hop of HEAD tells what the file is: commit, size and hash; they must agree with the list of files.  Then GET, from where
 * the sink left off: connections, each a thread, fill a window (window.h) with one piece of the file after the other, and the caller's
 * thread takes the bytes out in order.  Of a small file there is one piece and so one connection.  The hash runs beside the sink,
 * over the same bytes at the same time, and stands at the same point when they are done; kept bytes of an earlier attempt are in it too, so
 * a resumed file is proved whole.
 *
 * A piece that fails is retried by its connection.  The address that the hub redirects to is kept for the next piece, until it fails: so an
 * expired signature costs one request, and a large file few of the hub's.  A hub that does not send the part that it was asked for is
 * asked for the whole on one connection.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "hub.h"
#include "window.h"

#define MAX_ATTEMPTS	3		/* without progress */
#define PROGRESS_BYTES	(64 << 10)	/* fewer are no progress, or a byte at a time could go on for ever */
#define CHECKPOINT_BYTES ((int64_t) 64 << 20)
#define MAX_WAIT_S		60
#define HEAD_TIMEOUT_MS	15000
#define LARGE_BYTES		((int64_t) 64 << 20)	/* a smaller file comes over one connection */
#define WINDOW_BYTES	((size_t) 64 << 20)
#define STEP_BYTES		((size_t) 2 << 20)	/* go through hash and sink at a time: a cancel waits for them */
#define BESIDE_BYTES	((size_t) 128 << 10)	/* fewer are hashed before the other thread is awake */

typedef struct Fetch
{
	MillmHttp  *http;
	const MillmRepo *repo;
	const MillmHubFile *file;
	MillmSink  *sink;
	MillmAdvance advance;
	void	   *arg;
	char	   *url;			/* of the hub */
	char		expected[72];	/* sha256 or git sha1 */
	MillmHash	hash;
	int64_t		have;			/* bytes in the sink and in the hash */
	int64_t		checkpoint;		/* of them at the last checkpoint */
	int			n_connections;
	bool		is_begun;		/* the sink */
	MillmError *err;
} Fetch;

/* What the answers to a connection's requests mean for the whole file. */
typedef enum Verdict
{
	VERDICT_GOOD,
	VERDICT_ONE,				/* the hub sends the whole only */
	VERDICT_MISFIT				/* what it sends, or what was kept, is not of this file */
} Verdict;

typedef struct Connection
{
	const Fetch *fetch;			/* of it only what stays as it is while connections run */
	MillmWindow *window;
	MillmHttp  *http;
	pthread_t	thread;
	MillmPiece	piece;
	char	   *direct;			/* where the hub's redirect led to; NULL: ask the hub */
	bool		started;		/* this request's first byte has come */
	int64_t		skip;			/* so many more bytes come before the one that is wanted */
	Verdict		verdict;
	MillmCode	rc;
	MillmError	err;
} Connection;

static int
backoff_ms(int attempt, int wait_s)
{
	if (wait_s > 0)
		return 1000 * (wait_s < MAX_WAIT_S ? wait_s : MAX_WAIT_S);
	return (500 << attempt) + (int) (millm_now_us() % 500);	/* half a second of jitter, of a clock nobody else has */
}

/* Forget everything of this file. */
static MillmCode
start_over(Fetch *f)
{
	MillmCode	rc = f->sink->discard(f->sink->arg, f->err);

	if (f->have > 0)
		f->advance(f->arg, -f->have, false);
	f->have = f->checkpoint = 0;
	millm_hash_begin(&f->hash, f->expected, f->file->size);
	return rc;
}

static MillmCode
take_up_kept(Fetch *f)
{
	MillmCode	rc;

	millm_hash_begin(&f->hash, f->expected, f->file->size);
	if ((rc = f->sink->begin(f->sink->arg, f->file, &f->hash, &f->have, millm_http_stop(f->http), f->err)) != MILLM_OK)
		return rc;
	f->is_begun = true;
	f->checkpoint = f->have;
	f->advance(f->arg, f->have, false);
	return MILLM_OK;
}

static MillmCode
bad_identity(Fetch *f, const char *what, const char *got, const char *expected)
{
	millm_fail(f->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub's answer for \"%s\" does not fit its list of files", f->file->path);
	millm_detail(f->err, "%s is %s; expected %s.", what, got, expected);
	millm_hint(f->err, "The repository may have changed meanwhile: retry.");
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

/* HEAD: is it the file of the list?  Fills f->expected. */
static MillmCode
check_identity(Fetch *f, bool *again, int *wait_s)
{
	MillmRequest request = {.method = "HEAD", .url = f->url, .range_start = -1, .follow = FOLLOW_OWN, .timeout_ms = HEAD_TIMEOUT_MS,
		.outage_ms = MILLM_OUTAGE_MS};
	MillmReply	r;
	MillmCode	rc = millm_http_do(f->http, &request, &r, f->err);
	char		a[32], b[32];
	int64_t		size;

	*again = rc == MILLM_E_HUB_UNAVAILABLE && r.retryable;
	if (rc != MILLM_OK)
		return rc;
	if (r.status >= 400)
	{
		*again = r.status == 408 || r.status == 429 || r.status >= 500;
		*wait_s = r.retry_after;
		return millm_hub_error(f->http, f->repo->id, f->file->path, &r, f->err);
	}
	if (!r.commit[0] || strcmp(r.commit, f->repo->commit) != 0)
		return bad_identity(f, "The commit", r.commit[0] ? r.commit : "missing", f->repo->commit);
	size = r.linked_size >= 0 ? r.linked_size : r.status == 200 ? r.length : -1;
	snprintf(a, sizeof(a), "%lld", (long long) size);
	snprintf(b, sizeof(b), "%lld", (long long) f->file->size);
	if (size != f->file->size)
		return bad_identity(f, "The size", size < 0 ? "missing" : a, b);
	if (!r.etag[0])
		return bad_identity(f, "The hash", "missing", f->file->hash[0] ? f->file->hash : "one");
	if (f->file->hash[0] && strcmp(f->file->hash, r.etag) != 0)
		return bad_identity(f, "The hash", r.etag, f->file->hash);
	snprintf(f->expected, sizeof(f->expected), "%s", r.etag);
	return MILLM_OK;
}

/* --- A connection ---------------------------------------------------------------------------------------- */

static bool
misfit(Connection *c, const MillmReply *reply)
{
	c->verdict = VERDICT_MISFIT;
	millm_fail(&c->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub sent another part of \"%s\" than it was asked for", c->fetch->file->path);
	millm_detail(&c->err, "Asked for bytes %lld to %lld of %lld; it sent from %lld of %lld.", (long long) c->piece.at, (long long) c->piece.to,
				 (long long) c->fetch->file->size, (long long) reply->range_start, (long long) reply->range_total);
	return false;
}

static bool
take(void *arg, const char *data, size_t len, const MillmReply *reply)
{
	Connection *c = arg;

	if (!c->started)
	{
		c->started = true;
		if (reply->status == 206 && (reply->range_start != c->piece.at || reply->range_total != c->fetch->file->size))
			return misfit(c, reply);
		if (reply->status == 200 && c->fetch->n_connections > 1)
		{
			c->verdict = VERDICT_ONE;
			return false;
		}
		c->skip = reply->status == 200 ? c->piece.at : 0;	/* it ignores ranges */
	}
	if (c->skip > 0)
	{
		size_t		n = (int64_t) len < c->skip ? len : (size_t) c->skip;

		c->skip -= (int64_t) n;
		data += n;
		len -= n;
	}
	if ((int64_t) len > c->piece.to - c->piece.at)
	{
		c->verdict = VERDICT_MISFIT;
		millm_fail(&c->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub sent more bytes of \"%s\" than it was asked for", c->fetch->file->path);
		millm_detail(&c->err, "Asked for those up to %lld of %lld.", (long long) c->piece.to, (long long) c->fetch->file->size);
		return false;
	}
	return millm_window_fill(c->window, &c->piece, data, len);
}

/* One GET of what is missing of the piece; *again when another attempt may help. */
static MillmCode
get_bytes(Connection *c, bool *again, int *wait_s)
{
	const Fetch *f = c->fetch;
	const bool	to_end = c->piece.to == f->file->size;
	MillmRequest request = {.method = "GET", .url = c->direct ? c->direct : f->url, .range_start = to_end && c->piece.at == 0 ? -1 : c->piece.at,
		.range_end = to_end ? 0 : c->piece.to, .outage_ms = MILLM_OUTAGE_MS, .take = take, .arg = c};
	MillmReply	r = {.retry_after = -1};
	MillmCode	rc;

	c->started = false;
	c->skip = 0;
	rc = millm_http_do(c->http, &request, &r, &c->err);
	*again = false;
	*wait_s = r.retry_after;
	if (c->verdict != VERDICT_GOOD)
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	if (rc != MILLM_OK)
	{
		*again = r.retryable;
		return rc;
	}
	if (r.status != 200 && r.status != 206)
	{
		if (r.status == 416)
			c->verdict = VERDICT_MISFIT;
		*again = r.status != 416 && (r.foreign || r.status == 408 || r.status == 429 || r.status >= 500);
		return millm_hub_error(c->http, f->repo->id, f->file->path, &r, &c->err);
	}
	if (c->piece.at < c->piece.to)
	{
		*again = true;
		millm_fail(&c->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub ended \"%s\" too early", f->file->path);
		millm_detail(&c->err, "Byte %lld of %lld did not come.", (long long) c->piece.at, (long long) f->file->size);
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	if (r.foreign && !c->direct)
		c->direct = strdup(millm_http_last_url(c->http));	/* without it the hub is asked again */
	return MILLM_OK;
}

static MillmCode
get_piece(Connection *c)
{
	for (int attempt = 0;;)
	{
		const int64_t before = c->piece.at;
		const bool	was_direct = c->direct != NULL;
		bool		again, progress;
		int			wait_s;
		MillmCode	rc = get_bytes(c, &again, &wait_s);

		if (rc != MILLM_OK && millm_http_is_stopped(c->http))
			return MILLM_E_CANCELED;	/* another one has failed, and knows why */
		if (rc == MILLM_OK || !again)
			return rc;
		free(c->direct);
		c->direct = NULL;
		progress = c->piece.at - before >= PROGRESS_BYTES;
		if (was_direct && !progress && wait_s < 0)
			continue;			/* the kept address is no longer good: that is no attempt */
		attempt = progress ? 1 : attempt + 1;
		if (attempt >= MAX_ATTEMPTS)
			return rc;
		if ((rc = millm_http_pause(c->http, backoff_ms(attempt, wait_s), &c->err)) != MILLM_OK)
			return rc;
	}
}

/* The thread of a connection. */
static void *
get_pieces(void *arg)
{
	Connection *c = arg;

	while (c->rc == MILLM_OK && millm_window_claim(c->window, &c->piece))
		c->rc = get_piece(c);
	if (c->rc != MILLM_OK)
		millm_window_end(c->window);
	return NULL;
}

/* --- The file ---------------------------------------------------------------------------------------------- */

/* The next bytes, at least one: through hash and sink.  *n: how many there are; then how many went. */
static MillmCode
pass_on(Fetch *f, MillmHasher *hasher, const void *data, size_t *n)
{
	const int64_t until = f->sink->until_checkpoint(f->sink->arg);
	bool		beside;
	MillmCode	rc;

	*n = *n < STEP_BYTES ? *n : STEP_BYTES;
	*n = until < (int64_t) *n ? (size_t) until : *n;
	beside = *n >= BESIDE_BYTES;
	if (beside)
		millm_hasher_start(hasher, &f->hash, data, *n);
	rc = f->sink->write(f->sink->arg, data, *n, f->err);
	if (beside)
		millm_hasher_wait(hasher);
	if (rc != MILLM_OK)
		return rc;
	if (!beside)
		millm_hash_update(&f->hash, data, *n);
	f->have += (int64_t) *n;
	f->advance(f->arg, (int64_t) *n, true);
	if (f->have - f->checkpoint < CHECKPOINT_BYTES || (until != INT64_MAX && until != (int64_t) *n))
		return MILLM_OK;
	f->checkpoint = f->have;
	return f->sink->checkpoint(f->sink->arg, &f->hash, f->err);
}

/* Start connection i; the first goes on with what is open to the hub. */
static MillmCode
start(const Fetch *f, MillmWindow *window, int i, Connection *c)
{
	MillmCode	rc;

	*c = (Connection) {.fetch = f, .window = window, .http = f->http};
	if (i > 0 && (rc = millm_http_twin(f->http, millm_window_ended(window), &c->http, f->err)) != MILLM_OK)
		return rc;
	if (pthread_create(&c->thread, NULL, get_pieces, c) == 0)
		return MILLM_OK;
	if (i > 0)
		millm_http_close(c->http);
	return millm_fail(f->err, MILLM_E_INSUFFICIENT_MEMORY, "could not start a thread");
}

/* Nothing comes: tell what has come, and that it is no more. */
static void
tell(void *arg)
{
	const Fetch *f = arg;

	f->advance(f->arg, 0, true);
}

/*
 * Bring what is missing of the file into the sink.  After a failure *verdict may say that the hub does better when it is asked for the
 * whole.
 */
static MillmCode
transfer(Fetch *f, Verdict *verdict)
{
	atomic_bool *stop = millm_http_stop(f->http);
	/* two pieces for each: none waits for the slowest at once */
	const int64_t piece_bytes = f->n_connections > 1 ? (int64_t) WINDOW_BYTES / (2 * f->n_connections) : f->file->size;
	MillmWindow *window = millm_window_create(f->have, f->file->size, piece_bytes, WINDOW_BYTES);
	MillmHasher *hasher = millm_hasher_create();
	Connection	connections[MILLM_HUB_MAX_CONNECTIONS];
	const Connection *failed = NULL;
	MillmCode	rc = MILLM_OK;
	const void *data;
	size_t		len;
	int			n = 0;

	if (!window || !hasher)
	{
		millm_window_free(window);
		millm_hasher_free(hasher);
		return millm_fail(f->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	millm_http_set_stop(f->http, millm_window_ended(window));
	millm_window_on_idle(window, tell, f);
	while (n < f->n_connections && (rc = start(f, window, n, &connections[n])) == MILLM_OK)
		n++;
	while (rc == MILLM_OK && f->have < f->file->size && (len = millm_window_peek(window, stop, &data)) > 0)
	{
		rc = pass_on(f, hasher, data, &len);
		millm_window_take(window, len);
	}
	millm_window_end(window);
	for (int i = 0; i < n; i++)
	{
		pthread_join(connections[i].thread, NULL);
		/* one that fails cancels the others */
		if (connections[i].rc != MILLM_OK && connections[i].rc != MILLM_E_CANCELED)
			failed = &connections[i];
	}
	millm_http_set_stop(f->http, stop);
	if (rc == MILLM_OK && f->have < f->file->size)
	{
		if (atomic_load(stop) || !failed)
			rc = millm_fail(f->err, MILLM_E_CANCELED, "the download was canceled");
		else
		{
			rc = failed->rc;
			*verdict = failed->verdict;
			if (f->err)
				*f->err = failed->err;
		}
	}
	for (int i = 0; i < n; i++)
	{
		free(connections[i].direct);
		if (i > 0)
			millm_http_close(connections[i].http);
	}
	millm_hasher_free(hasher);
	millm_window_free(window);
	return rc;
}

static MillmCode
wrong_content(Fetch *f, const char *got)
{
	millm_fail(f->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "\"%s\" arrived with wrong content", f->file->path);
	millm_detail(f->err, "Its hash is %s; expected %s.", got, f->expected);
	millm_hint(f->err, "The hub or something on the way is damaged; retry later.");
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

/* Ask what the file is, as often as makes sense, and take up what an earlier attempt has left. */
static MillmCode
identify(Fetch *f)
{
	for (int attempt = 1;; attempt++)
	{
		bool		again = false;
		int			wait_s = -1;
		MillmCode	rc = check_identity(f, &again, &wait_s);

		if (rc == MILLM_OK)
			return take_up_kept(f);
		if (!again || attempt == MAX_ATTEMPTS || (rc = millm_http_pause(f->http, backoff_ms(attempt, wait_s), f->err)) != MILLM_OK)
			return rc;
	}
}

static MillmCode
fetch(Fetch *f)
{
	bool		refetched = false;
	MillmCode	rc = identify(f);

	for (int attempt = 1; rc == MILLM_OK;)
	{
		Verdict		verdict = VERDICT_GOOD;
		char		got[MILLM_HASH_HEX];
		MillmCode	failed = f->have < f->file->size ? transfer(f, &verdict) : MILLM_OK;

		if (failed == MILLM_OK)
		{
			millm_hash_hex(&f->hash, got);
			if (strcmp(got, f->expected) == 0)
				return f->sink->finish(f->sink->arg, f->err);
			if ((rc = start_over(f)) == MILLM_OK && refetched)
				rc = wrong_content(f, got);
			refetched = true;
			continue;
		}
		if (failed == MILLM_E_INVALID_MODEL_FILE && !refetched)
		{
			/* the sink saw it before the hash could: damaged on the way, unless it comes so again */
			refetched = true;
			rc = start_over(f);
			continue;
		}
		if (verdict == VERDICT_GOOD)
			return failed;
		f->n_connections = 1;	/* it has disobeyed */
		if (verdict == VERDICT_ONE)
			continue;
		if ((rc = start_over(f)) == MILLM_OK)
			rc = attempt == MAX_ATTEMPTS ? failed : millm_http_pause(f->http, backoff_ms(attempt++, -1), f->err);
	}
	return rc;
}

MillmCode
millm_hub_fetch(MillmHttp *http, const MillmRepo *repo, const MillmHubFile *file, int n_connections, MillmSink *sink,
				MillmAdvance advance, void *arg, MillmError *err)
{
	Fetch		f = {.http = http, .repo = repo, .file = file, .sink = sink, .advance = advance, .arg = arg, .err = err,
		.url = millm_resolve_url(repo, file->path), .n_connections = file->size >= LARGE_BYTES ? n_connections : 1};
	MillmCode	rc;

	if (!f.url)
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else if ((rc = fetch(&f)) != MILLM_OK && f.is_begun)
		sink->abandon(sink->arg);
	free(f.url);
	return rc;
}
