/*
 * fetch.c -- one file, from the Hub into a sink, proved.
 *
 * The first hop of HEAD tells what the file is: commit, size and hash; they must agree with the list of files.  Then GET, from where
 * the sink left off.  The hash runs along with the bytes; kept bytes of an earlier attempt are hashed again first, so a resumed file is
 * proved whole.  Every attempt resolves the redirect anew, so an expired signature of the file host costs one attempt.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "hub.h"

#define MAX_ATTEMPTS	3		/* without progress */
#define PROGRESS_BYTES	(64 << 10)	/* fewer are no progress, or a byte at a time could go on for ever */
#define CHECKPOINT_BYTES ((int64_t) 64 << 20)
#define MAX_WAIT_S		60
#define HEAD_TIMEOUT_MS	15000

typedef struct Fetch
{
	MillmHttp  *http;
	const MillmRepo *repo;
	const MillmHubFile *file;
	MillmSink  *sink;
	MillmAdvance advance;
	void	   *arg;
	char		expected[72];	/* sha256 or git sha1 */
	MillmHash	hash;
	int64_t		have;			/* bytes in the sink and in the hash */
	int64_t		checkpoint;		/* of them at the last checkpoint */
	int64_t		asked;			/* where this attempt's GET begins */
	bool		started;		/* this attempt's first byte has come */
	MillmCode	failed;			/* of the sink, while bytes came */
	bool		is_begun;		/* the sink */
	bool		is_misfit;		/* the bytes that came, or were kept, are not of this file */
	MillmError *err;
} Fetch;

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

static bool
take(void *arg, const char *data, size_t len, const MillmReply *reply)
{
	Fetch	   *f = arg;

	if (!f->started)
	{
		f->started = true;
		if (f->asked > 0 && reply->status == 200)
		{
			/* the server ignores ranges: it sends the whole */
			if ((f->failed = start_over(f)) != MILLM_OK)
				return false;
		}
		else if (f->asked > 0 && (reply->range_start != f->asked || reply->range_total != f->file->size))
		{
			f->is_misfit = true;
			millm_fail(f->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub sent another part of \"%s\" than it was asked for", f->file->path);
			millm_detail(f->err, "Asked from byte %lld of %lld; it sent from %lld of %lld.", (long long) f->asked, (long long) f->file->size,
						 (long long) reply->range_start, (long long) reply->range_total);
			return false;
		}
	}
	if ((int64_t) len > f->file->size - f->have)
	{
		f->is_misfit = true;
		millm_fail(f->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub sent more bytes of \"%s\" than the file has", f->file->path);
		millm_detail(f->err, "It has %lld bytes.", (long long) f->file->size);
		return false;
	}
	while (len > 0 && f->failed == MILLM_OK)
	{
		int64_t		until = f->sink->until_checkpoint(f->sink->arg);
		size_t		n = until < (int64_t) len ? (size_t) until : len;

		if ((f->failed = f->sink->write(f->sink->arg, data, n, f->err)) != MILLM_OK)
			return false;
		millm_hash_update(&f->hash, data, n);
		data += n;
		len -= n;
		f->have += (int64_t) n;
		f->advance(f->arg, (int64_t) n, true);
		if (f->have - f->checkpoint >= CHECKPOINT_BYTES && (until == INT64_MAX || n == (size_t) until))
		{
			f->checkpoint = f->have;
			f->failed = f->sink->checkpoint(f->sink->arg, &f->hash, f->err);
		}
	}
	return f->failed == MILLM_OK;
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
check_identity(Fetch *f, const char *url, bool *again, int *wait_s)
{
	MillmRequest request = {.method = "HEAD", .url = url, .range_start = -1, .follow = FOLLOW_OWN, .timeout_ms = HEAD_TIMEOUT_MS};
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

/* One GET; *again when another attempt may help. */
static MillmCode
get_bytes(Fetch *f, const char *url, bool *again, int *wait_s)
{
	MillmRequest request = {.method = "GET", .url = url, .range_start = f->have > 0 ? f->have : -1, .take = take, .arg = f};
	MillmReply	r;
	MillmCode	rc;

	f->asked = f->have;
	f->started = false;
	f->failed = MILLM_OK;
	f->is_misfit = false;
	rc = millm_http_do(f->http, &request, &r, f->err);
	*again = true;
	*wait_s = r.retry_after;
	if (f->failed != MILLM_OK)
	{
		*again = false;			/* the disk's trouble, not the hub's */
		return f->failed;
	}
	if (f->is_misfit)
	{
		MillmError	keep = *f->err;
		MillmCode	discarded = start_over(f);

		if (discarded != MILLM_OK)
		{
			*again = false;
			return discarded;
		}
		*f->err = keep;
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	if (rc != MILLM_OK)
	{
		*again = r.retryable;
		return rc;
	}
	if (r.status == 416)
	{
		MillmCode	discarded = start_over(f);

		if (discarded != MILLM_OK)
			return discarded;
	}
	if (r.status != 200 && r.status != 206)
	{
		*again = r.foreign || r.status == 408 || r.status == 416 || r.status == 429 || r.status >= 500;
		return millm_hub_error(f->http, f->repo->id, f->file->path, &r, f->err);
	}
	if (f->have < f->file->size)
	{
		millm_fail(f->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub ended \"%s\" too early", f->file->path);
		millm_detail(f->err, "%lld of %lld bytes came.", (long long) f->have, (long long) f->file->size);
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	return MILLM_OK;
}

static int
backoff_ms(int attempt, int wait_s)
{
	struct timespec ts;

	if (wait_s > 0)
		return 1000 * (wait_s < MAX_WAIT_S ? wait_s : MAX_WAIT_S);
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (500 << attempt) + (int) (ts.tv_nsec / 1000 % 500);	/* half a second of jitter, of a clock nobody else has */
}

static MillmCode
fetch(Fetch *f, const char *url)
{
	bool		identified = false, refetched = false;

	for (int attempt = 0;;)
	{
		int64_t		before = f->have;
		bool		again = false;
		int			wait_s = -1;
		MillmCode	rc;

		if (!identified)
		{
			rc = check_identity(f, url, &again, &wait_s);
			if (rc == MILLM_OK)
			{
				identified = true;
				if ((rc = take_up_kept(f)) != MILLM_OK)
					return rc;
				before = f->have;
			}
		}
		else
			rc = MILLM_OK;
		if (rc == MILLM_OK && f->have < f->file->size)
			rc = get_bytes(f, url, &again, &wait_s);
		if (rc == MILLM_OK)
		{
			char		got[MILLM_HASH_HEX];

			millm_hash_hex(&f->hash, got);
			if (strcmp(got, f->expected) == 0)
				return f->sink->finish(f->sink->arg, f->err);
			rc = start_over(f);
			if (rc != MILLM_OK)
				return rc;
			millm_fail(f->err, MILLM_E_MODEL_DOWNLOAD_FAILED, "\"%s\" arrived with wrong content", f->file->path);
			millm_detail(f->err, "Its hash is %s; expected %s.", got, f->expected);
			millm_hint(f->err, "The hub or something on the way is damaged; retry later.");
			if (refetched)
				return MILLM_E_MODEL_DOWNLOAD_FAILED;
			refetched = true;
			attempt = 0;
			continue;
		}
		if (rc == MILLM_E_CANCELED || !again)
			return rc;
		attempt = f->have - before >= PROGRESS_BYTES ? 1 : attempt + 1;
		if (attempt >= MAX_ATTEMPTS)
			return rc;
		if ((rc = millm_http_pause(f->http, backoff_ms(attempt, wait_s), f->err)) != MILLM_OK)
			return rc;
	}
}

MillmCode
millm_hub_fetch(MillmHttp *http, const MillmRepo *repo, const MillmHubFile *file, MillmSink *sink,
				MillmAdvance advance, void *arg, MillmError *err)
{
	Fetch		f = {.http = http, .repo = repo, .file = file, .sink = sink, .advance = advance, .arg = arg, .err = err};
	char	   *url = millm_resolve_url(repo, file->path);
	MillmCode	rc;

	if (!url)
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else if ((rc = fetch(&f, url)) != MILLM_OK && f.is_begun)
		sink->abandon(sink->arg);
	free(url);
	return rc;
}
