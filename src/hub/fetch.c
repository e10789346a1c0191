/*
 * fetch.c -- one file, from the Hub into a sink, proved.
 *
 * The first hop of HEAD tells what the file is: commit, size and hash; they must agree with the list of files.  Then GET, from where
 * the sink left off.  The hash runs along with the bytes; kept bytes of an earlier attempt are hashed again first, so a resumed file is
 * proved whole.  Every attempt resolves the redirect anew, so an expired signature of the file host costs one attempt.
 */
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "hub.h"

#define MAX_ATTEMPTS	3		/* without progress */
#define PROGRESS_BYTES	(64 << 10)	/* fewer are no progress, or a byte at a time could go on for ever */
#define CHECKPOINT_BYTES ((int64_t) 256 << 20)
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
	EVP_MD_CTX *hash;
	int64_t		have;			/* bytes in the sink and in the hash */
	int64_t		checkpoint;		/* of them at the last checkpoint */
	int64_t		asked;			/* where this attempt's GET begins */
	bool		started;		/* this attempt's first byte has come */
	MillmCode	failed;			/* of the sink, while bytes came */
	bool		is_misfit;		/* the bytes that came, or were kept, are not of this file */
	MillmError *err;
} Fetch;

static MillmCode
start_hash(Fetch *f)
{
	char		header[40];
	bool		is_sha256 = strlen(f->expected) == 64;
	/* git's blob id: sha1 over "blob " + length + NUL + content; the NUL is part of it */
	int			n = snprintf(header, sizeof(header), "blob %lld", (long long) f->file->size) + 1;

	if (EVP_DigestInit_ex(f->hash, is_sha256 ? EVP_sha256() : EVP_sha1(), NULL) != 1 ||
		(!is_sha256 && EVP_DigestUpdate(f->hash, header, (size_t) n) != 1))
		return millm_fail(f->err, MILLM_E_INTERNAL, "OpenSSL cannot compute a hash");
	return MILLM_OK;
}

/* A piece of what an earlier attempt left. */
static bool
see(void *arg, const void *data, size_t len)
{
	Fetch	   *f = arg;

	if ((int64_t) len > f->file->size - f->have)
	{
		f->is_misfit = true;
		return false;
	}
	EVP_DigestUpdate(f->hash, data, len);
	f->have += (int64_t) len;
	f->advance(f->arg, (int64_t) len, false);
	return !millm_http_is_stopped(f->http);
}

/* Forget everything of this file. */
static MillmCode
start_over(Fetch *f)
{
	MillmCode	rc = f->sink->discard(f->sink->arg, f->err);

	if (f->have > 0)
		f->advance(f->arg, -f->have, false);
	f->have = f->checkpoint = 0;
	return rc == MILLM_OK ? start_hash(f) : rc;
}

static MillmCode
take_up_kept(Fetch *f)
{
	MillmCode	rc;

	f->is_misfit = false;
	if ((rc = start_hash(f)) != MILLM_OK || (rc = f->sink->replay(f->sink->arg, see, f, f->err)) != MILLM_OK)
		return rc;
	if (millm_http_is_stopped(f->http))
		return millm_fail(f->err, MILLM_E_CANCELED, "the download was canceled");
	f->checkpoint = f->have;
	return f->is_misfit ? start_over(f) : MILLM_OK;
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
	if ((f->failed = f->sink->write(f->sink->arg, data, len, f->err)) != MILLM_OK)
		return false;
	EVP_DigestUpdate(f->hash, data, len);
	f->have += (int64_t) len;
	f->advance(f->arg, (int64_t) len, true);
	if (f->have - f->checkpoint >= CHECKPOINT_BYTES)
	{
		f->checkpoint = f->have;
		f->failed = f->sink->checkpoint(f->sink->arg, f->err);
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

/* True when all bytes are there and are the right ones. */
static bool
is_proved(Fetch *f, char got[72])
{
	unsigned char digest[EVP_MAX_MD_SIZE];
	unsigned	n = 0;

	if (EVP_DigestFinal_ex(f->hash, digest, &n) != 1)
		return false;
	for (unsigned i = 0; i < n && i < 32; i++)
		snprintf(got + 2 * i, 3, "%02x", digest[i]);
	return strcmp(got, f->expected) == 0;
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
			char		got[72] = "";

			if (is_proved(f, got))
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
	Fetch		f = {.http = http, .repo = repo, .file = file, .sink = sink, .advance = advance, .arg = arg, .err = err, .hash = EVP_MD_CTX_new()};
	char	   *url = millm_resolve_url(repo, file->path);
	int64_t		kept;
	MillmCode	rc;

	if (!f.hash || !url)
		rc = millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else if ((rc = sink->begin(sink->arg, file, &kept, err)) == MILLM_OK && (rc = fetch(&f, url)) != MILLM_OK)
		sink->abandon(sink->arg);
	EVP_MD_CTX_free(f.hash);
	free(url);
	return rc;
}
