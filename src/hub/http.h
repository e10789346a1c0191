/*
 * http.h -- one HTTP request at a time to a hub and the hosts that it points to.
 *
 * The rule of this file: the access token goes to the endpoint's own origin (scheme, host, port) and nowhere else.  Redirects are
 * followed here, not by libcurl, so that each hop is seen.  A body reaches the caller only from a 200 or a 206 of the last hop.
 */
#ifndef MILLM_HTTP_H
#define MILLM_HTTP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef struct MillmHttp MillmHttp;

/*
 * endpoint: "https://huggingface.co" (a slash at the end is dropped); token: NULL or "" for none.  Both are copied.  *stop, which may become
 * true at any time from any thread, ends a request within a second.  INVALID_ARGUMENT for an endpoint that is no http(s) URL.
 */
extern MillmCode millm_http_open(const char *endpoint, const char *token, atomic_bool *stop, MillmHttp **out, MillmError *err);
extern void millm_http_close(MillmHttp *http);	/* NULL is fine; the token's memory is wiped */
extern const char *millm_http_endpoint(const MillmHttp *http);
extern bool millm_http_has_token(const MillmHttp *http);
extern bool millm_http_is_stopped(const MillmHttp *http);
extern atomic_bool *millm_http_stop(const MillmHttp *http);
extern void millm_http_set_stop(MillmHttp *http, atomic_bool *stop);	/* from the next request on */
/* From now on all requests together have so long; what is not done by then fails as a timeout does. */
extern void millm_http_set_deadline(MillmHttp *http, int ms);

/* For the process, before its first request: how long a transfer may stand still until it fails as a timeout does.  Default 20. */
extern void millm_http_set_stall_seconds(int seconds);

/* Another one for a thread of its own: same endpoint, token and deadline, its own connection. */
extern MillmCode millm_http_twin(const MillmHttp *http, atomic_bool *stop, MillmHttp **out, MillmError *err);

/* What an answer said.  Strings are "" and numbers -1 where it said nothing.  Texts are printable ASCII. */
typedef struct MillmReply
{
	int			status;
	char		commit[48];		/* X-Repo-Commit: 40 hexadecimal digits, or "" */
	char		etag[72];		/* X-Linked-Etag, else ETag: 40 (git sha1) or 64 (sha256) hexadecimal digits, or "" */
	int64_t		linked_size;	/* X-Linked-Size */
	int64_t		length;			/* Content-Length of the last hop */
	int64_t		range_start, range_total;	/* of Content-Range */
	char		error_code[32];	/* X-Error-Code */
	char		error_message[256];
	char		request_id[96];
	char		next[2048];		/* Link: rel="next" */
	int			retry_after;	/* seconds: Retry-After, or the reset of a spent RateLimit */
	bool		foreign;		/* the last hop is another host's: its errors are not the hub's */
	bool		retryable;		/* of a failed request: worth another attempt */
} MillmReply;

typedef enum MillmFollow
{
	FOLLOW_ALL,					/* up to MAX_HOPS */
	FOLLOW_OWN					/* only within the origin: the answer that points elsewhere is the answer */
} MillmFollow;

/* Takes a piece of the body; returns false to end the request (why is the caller's to know). */
typedef bool (*MillmTake) (void *arg, const char *data, size_t len, const MillmReply *reply);

typedef struct MillmRequest
{
	const char *method;			/* "GET" or "HEAD" */
	const char *url;			/* absolute, or a path at the endpoint */
	int64_t		range_start;	/* -1: the whole */
	int64_t		range_end;		/* behind the last byte; 0: to the end */
	MillmFollow follow;
	int			timeout_ms;		/* of everything; 0: only stalls end it */
	int			outage_ms;		/* so long it may wait when the hub is left alone (breaker.h); 0: it is refused at once */
	MillmTake	take;			/* NULL: the body is dropped */
	void	   *arg;
} MillmRequest;

/*
 * Do it once.  MILLM_OK: the server answered, reply->status says what (also an error's status).  Else: CANCELED by *stop, or
 * HUB_UNAVAILABLE with the reason (name resolution, connect, timeout, a body cut short; reply->retryable says whether another
 * attempt makes sense), also when the hub is left alone (breaker.h); MODEL_DOWNLOAD_FAILED for redirects that lead nowhere.
 */
extern MillmCode millm_http_do(MillmHttp *http, const MillmRequest *request, MillmReply *reply, MillmError *err);
/* Where the last request's redirects led to.  May be signed: never show it.  Valid until the next one. */
extern const char *millm_http_last_url(const MillmHttp *http);

/* Sleep for ms unless *stop becomes true: then CANCELED. */
extern MillmCode millm_http_pause(MillmHttp *http, int ms, MillmError *err);

/* Percent-encode for a path; slashes stay when keep_slashes.  malloc'ed, NULL when out of memory. */
extern char *millm_url_encode(const char *text, bool keep_slashes);

#endif
