/*
 * http.c -- one request of libcurl's at a time, with our own redirects and headers read by name.
 */
#include "http.h"

#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "breaker.h"
#include "clock.h"
#include "version.h"

#define MAX_HOPS			10
#define CONNECT_TIMEOUT_S	10
#define MAX_URL				8192
#define TICK_MS				200		/* so often a request looks at *stop */
#define BEARER				"Authorization: Bearer "

static int	stall_seconds = 20;

struct MillmHttp
{
	char	   *endpoint;
	char	   *authorization;	/* BEARER and the token, or NULL */
	CURL	   *curl;
	CURLM	   *multi;			/* it alone is in there */
	char		last_url[MAX_URL];
	atomic_bool *stop;
	int64_t		deadline_ms;	/* of millm_now_ms(); 0: none */
};

void
millm_http_set_stall_seconds(int seconds)
{
	stall_seconds = seconds;
}

/* One hop in flight. */
typedef struct Hop
{
	MillmHttp  *http;
	const MillmRequest *request;
	MillmReply *reply;
	char		location[MAX_URL];
	bool		etag_is_linked;
	bool		is_overlong;	/* a URL did not fit: cut, it would be another one */
	int64_t		limit_left, limit_reset_s;	/* RateLimit */
	bool		refused;		/* take() said no */
} Hop;

MillmCode
millm_http_open(const char *endpoint, const char *token, atomic_bool *stop, MillmHttp **out, MillmError *err)
{
	MillmHttp  *h;

	if (strncmp(endpoint, "https://", 8) != 0 && strncmp(endpoint, "http://", 7) != 0)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "endpoint \"%.200s\" is not an http or https URL", endpoint);
	for (const char *p = token ? token : ""; *p; p++)
		if (*p <= ' ' || *p > '~')
		{
			millm_fail(err, MILLM_E_INVALID_HF_TOKEN, "the access token contains white space, or a character that no token has");
			millm_hint(err, "Check how it was copied.");
			return MILLM_E_INVALID_HF_TOKEN;
		}
	h = calloc(1, sizeof(*h));
	if (!h || !(h->endpoint = strdup(endpoint)) || !(h->curl = curl_easy_init()) || !(h->multi = curl_multi_init()) ||
		(token && token[0] && asprintf(&h->authorization, BEARER "%s", token) < 0))
	{
		millm_http_close(h);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	for (size_t n = strlen(h->endpoint); n > 0 && h->endpoint[n - 1] == '/'; n--)
		h->endpoint[n - 1] = '\0';
	h->stop = stop;
	*out = h;
	return MILLM_OK;
}

MillmCode
millm_http_twin(const MillmHttp *h, atomic_bool *stop, MillmHttp **out, MillmError *err)
{
	MillmCode	rc = millm_http_open(h->endpoint, h->authorization ? h->authorization + strlen(BEARER) : NULL, stop, out, err);

	if (rc == MILLM_OK)
		(*out)->deadline_ms = h->deadline_ms;
	return rc;
}

void
millm_http_close(MillmHttp *h)
{
	if (!h)
		return;
	if (h->authorization)
		explicit_bzero(h->authorization, strlen(h->authorization));
	free(h->authorization);
	free(h->endpoint);
	curl_easy_cleanup(h->curl);
	curl_multi_cleanup(h->multi);
	free(h);
}

const char *
millm_http_endpoint(const MillmHttp *h)
{
	return h->endpoint;
}

bool
millm_http_has_token(const MillmHttp *h)
{
	return h->authorization != NULL;
}

void
millm_http_set_deadline(MillmHttp *h, int ms)
{
	h->deadline_ms = millm_now_ms() + ms;
}

atomic_bool *
millm_http_stop(const MillmHttp *h)
{
	return h->stop;
}

void
millm_http_set_stop(MillmHttp *h, atomic_bool *stop)
{
	h->stop = stop;
}

const char *
millm_http_last_url(const MillmHttp *h)
{
	return h->last_url;
}

bool
millm_http_is_stopped(const MillmHttp *h)
{
	return atomic_load(h->stop);
}

char *
millm_url_encode(const char *text, bool keep_slashes)
{
	static const char hex[] = "0123456789ABCDEF";
	char	   *out = malloc(3 * strlen(text) + 1), *p = out;

	for (; out && *text; text++)
	{
		unsigned char c = (unsigned char) *text;

		if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || strchr("-._~", c) || (keep_slashes && c == '/'))
			*p++ = (char) c;
		else
		{
			*p++ = '%';
			*p++ = hex[c >> 4];
			*p++ = hex[c & 15];
		}
	}
	if (out)
		*p = '\0';
	return out;
}

/* --- Headers ------------------------------------------------------------------------------------ */

static bool
all_hex(const char *s, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (!((s[i] >= '0' && s[i] <= '9') || (s[i] >= 'a' && s[i] <= 'f')))
			return false;
	return n == 40 || n == 64;
}

/* W/"abc" -> abc; anything that is not a hash counts as absent: it would become a part of a file name. */
static void
set_etag(char dst[72], const char *value, size_t n)
{
	while (n > 0 && (*value == 'W' || *value == '/' || *value == '"'))
		value++, n--;
	while (n > 0 && value[n - 1] == '"')
		n--;
	if (all_hex(value, n))
		snprintf(dst, 72, "%.*s", (int) n, value);
}

static int64_t
parse_number(const char *value, size_t n)
{
	int64_t		v = 0;

	if (n == 0 || n > 18)
		return -1;
	for (size_t i = 0; i < n; i++)
	{
		if (value[i] < '0' || value[i] > '9')
			return -1;
		v = 10 * v + (value[i] - '0');
	}
	return v;
}

/* bytes 100-199/1000 */
static void
parse_content_range(MillmReply *r, const char *value, size_t n)
{
	const char *dash, *slash, *end = value + n;

	if (n < 6 || strncasecmp(value, "bytes ", 6) != 0)
		return;
	value += 6;
	dash = memchr(value, '-', (size_t) (end - value));
	slash = memchr(value, '/', (size_t) (end - value));
	if (!dash || !slash)
		return;
	r->range_start = parse_number(value, (size_t) (dash - value));
	r->range_total = parse_number(slash + 1, (size_t) (end - slash - 1));
}

static bool
is_header(const char *line, const char *name, const char **value, size_t *n, const char *end)
{
	size_t		len = strlen(name);

	if ((size_t) (end - line) <= len || strncasecmp(line, name, len) != 0 || line[len] != ':')
		return false;
	line += len + 1;
	while (line < end && (*line == ' ' || *line == '\t'))
		line++;
	while (end > line && (end[-1] == '\r' || end[-1] == '\n' || end[-1] == ' '))
		end--;
	*value = line;
	*n = (size_t) (end - line);
	return true;
}

/* A text for people, cut to what fits; a terminal or a log must not obey it. */
static void
copy_text(char *dst, size_t size, const char *value, size_t n)
{
	size_t		i = 0;

	for (; i < n && i < size - 1; i++)
		dst[i] = value[i] >= ' ' && value[i] <= '~' ? value[i] : '?';
	dst[i] = '\0';
}

static void
copy_url(Hop *hop, char *dst, size_t size, const char *value, size_t n)
{
	hop->is_overlong |= n >= size;
	snprintf(dst, size, "%.*s", (int) (n < size ? n : 0), value);
}

/* "api";r=0;t=172: so many requests are left, and in so many seconds there are more */
static void
parse_rate_limit(Hop *hop, const char *value, size_t n)
{
	const char *end = value + n;

	for (const char *p = memchr(value, ';', n); p && p + 3 < end; p = memchr(p + 1, ';', (size_t) (end - p - 1)))
	{
		size_t		digits = 0;

		while (p + 3 + digits < end && p[3 + digits] >= '0' && p[3 + digits] <= '9')
			digits++;
		if (p[2] == '=' && p[1] == 'r')
			hop->limit_left = parse_number(p + 3, digits);
		else if (p[2] == '=' && p[1] == 't')
			hop->limit_reset_s = parse_number(p + 3, digits);
	}
}

static size_t
on_header(char *line, size_t one, size_t len, void *arg)
{
	Hop		   *hop = arg;
	MillmReply *r = hop->reply;
	const char *end = line + len, *v;
	size_t		n;

	(void) one;
	if (is_header(line, "x-repo-commit", &v, &n, end))
	{
		if (n == 40 && all_hex(v, n))
			copy_text(r->commit, sizeof(r->commit), v, n);
	}
	else if (is_header(line, "x-linked-etag", &v, &n, end))
	{
		set_etag(r->etag, v, n);
		hop->etag_is_linked = true;
	}
	else if (is_header(line, "etag", &v, &n, end))
	{
		/* a CDN's own etag is no hash of the content */
		if (!hop->etag_is_linked && !r->foreign)
			set_etag(r->etag, v, n);
	}
	else if (is_header(line, "x-linked-size", &v, &n, end))
		r->linked_size = parse_number(v, n);
	else if (is_header(line, "content-length", &v, &n, end))
		r->length = parse_number(v, n);
	else if (is_header(line, "content-range", &v, &n, end))
		parse_content_range(r, v, n);
	else if (is_header(line, "x-error-code", &v, &n, end))
		copy_text(r->error_code, sizeof(r->error_code), v, n);
	else if (is_header(line, "x-error-message", &v, &n, end))
		copy_text(r->error_message, sizeof(r->error_message), v, n);
	else if (is_header(line, "x-request-id", &v, &n, end))
		copy_text(r->request_id, sizeof(r->request_id), v, n);
	else if (is_header(line, "retry-after", &v, &n, end))
		r->retry_after = (int) parse_number(v, n < 6 ? n : 0);
	else if (is_header(line, "ratelimit", &v, &n, end))
		parse_rate_limit(hop, v, n);
	else if (is_header(line, "location", &v, &n, end))
		copy_url(hop, hop->location, sizeof(hop->location), v, n);
	else if (is_header(line, "link", &v, &n, end))
	{
		const char *close = memchr(v, '>', n);

		if (n > 2 && v[0] == '<' && close && memmem(close, (size_t) (v + n - close), "rel=\"next\"", 10))
			copy_url(hop, r->next, sizeof(r->next), v + 1, (size_t) (close - v - 1));
	}
	return len;
}

/* --- One hop -------------------------------------------------------------------------------------- */

static size_t
on_body(char *data, size_t one, size_t len, void *arg)
{
	Hop		   *hop = arg;
	long		status = 0;

	(void) one;
	curl_easy_getinfo(hop->http->curl, CURLINFO_RESPONSE_CODE, &status);
	hop->reply->status = (int) status;
	if ((status != 200 && status != 206) || !hop->request->take)
	{
		/* an error's JSON: {"error": "..."}; the header has the same, except from some proxies */
		return len;
	}
	if (!hop->request->take(hop->request->arg, data, len, hop->reply))
	{
		hop->refused = true;
		return 0;
	}
	return len;
}

/* As curl_easy_perform, which looks up but once a second. */
static CURLcode
perform(MillmHttp *h)
{
	CURLcode	code = CURLE_OUT_OF_MEMORY;
	CURLMcode	bad;
	int			running = 1, left;

	if (curl_multi_add_handle(h->multi, h->curl) != CURLM_OK)
		return code;
	while ((bad = curl_multi_perform(h->multi, &running)) == CURLM_OK && running && !atomic_load(h->stop) &&
		   (bad = curl_multi_poll(h->multi, NULL, 0, TICK_MS, NULL)) == CURLM_OK)
		;
	if (bad == CURLM_OK && running)
		code = CURLE_ABORTED_BY_CALLBACK;
	for (CURLMsg *m; (m = curl_multi_info_read(h->multi, &left));)
		if (m->msg == CURLMSG_DONE)
			code = m->data.result;
	curl_multi_remove_handle(h->multi, h->curl);
	return code;
}

/* Scheme, host and port of a URL, compared with the endpoint's. */
static bool
is_own(const MillmHttp *h, const char *url)
{
	CURLU	   *a = curl_url(), *b = curl_url();
	bool		same = a && b && curl_url_set(a, CURLUPART_URL, url, 0) == CURLUE_OK && curl_url_set(b, CURLUPART_URL, h->endpoint, 0) == CURLUE_OK;
	static const CURLUPart parts[] = {CURLUPART_SCHEME, CURLUPART_HOST, CURLUPART_PORT};

	for (int i = 0; same && i < 3; i++)
	{
		char	   *x = NULL, *y = NULL;

		same = curl_url_get(a, parts[i], &x, CURLU_DEFAULT_PORT) == CURLUE_OK && curl_url_get(b, parts[i], &y, CURLU_DEFAULT_PORT) == CURLUE_OK &&
			strcasecmp(x, y) == 0;
		curl_free(x);
		curl_free(y);
	}
	curl_url_cleanup(a);
	curl_url_cleanup(b);
	return same;
}

/* base + location, as a browser would; false when it makes no URL. */
static bool
resolve_location(const char *base, const char *location, char *out)
{
	CURLU	   *u = curl_url();
	char	   *full = NULL;
	bool		good = u && curl_url_set(u, CURLUPART_URL, base, 0) == CURLUE_OK && curl_url_set(u, CURLUPART_URL, location, 0) == CURLUE_OK &&
		curl_url_get(u, CURLUPART_URL, &full, 0) == CURLUE_OK && strlen(full) < MAX_URL;

	if (good)
		memcpy(out, full, strlen(full) + 1);
	curl_free(full);
	curl_url_cleanup(u);
	return good;
}

static MillmCode
hop_failed(const Hop *hop, CURLcode code, const char *text, MillmError *err)
{
	if (atomic_load(hop->http->stop))
		return millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
	millm_fail(err, MILLM_E_HUB_UNAVAILABLE, "the request to the hub failed");
	/* the URL's query may be a signature: only the path is shown */
	millm_detail(err, "%s, for %s.", text[0] ? text : curl_easy_strerror(code), hop->request->url[0] == '/' ? hop->request->url : "a URL that the hub gave");
	millm_hint(err, "Check the network and millm.hf_endpoint; retry later.");
	return MILLM_E_HUB_UNAVAILABLE;
}

/* What this hop says of the hub, if anything. */
static void
report_to_breaker(const Hop *hop, CURLcode code, const char *text)
{
	const bool	failed = code != CURLE_OK && !hop->refused && !hop->is_overlong;
	char		status[32];

	if (hop->reply->foreign || (failed && (!hop->reply->retryable || atomic_load(hop->http->stop))))
		return;
	snprintf(status, sizeof(status), "status %d", hop->reply->status);
	millm_breaker_report(hop->http->endpoint, failed ? (text[0] ? text : curl_easy_strerror(code)) : hop->reply->status >= 500 ? status : NULL);
}

static MillmCode
do_hop(Hop *hop, const char *url, int timeout_ms, MillmError *err)
{
	MillmHttp  *h = hop->http;
	CURL	   *c = h->curl;
	char		message[CURL_ERROR_SIZE] = "", range[40];
	struct curl_slist *headers = NULL;
	bool		https = strncmp(h->endpoint, "https:", 6) == 0;
	CURLcode	code;
	long		status = 0;

	if (h->deadline_ms)
	{
		int64_t		left = h->deadline_ms - millm_now_ms();

		if (left <= 0)
		{
			hop->reply->retryable = true;
			return hop_failed(hop, CURLE_OPERATION_TIMEDOUT, "", err);
		}
		if (timeout_ms <= 0 || left < timeout_ms)
			timeout_ms = (int) left;
	}
	curl_easy_reset(c);
	curl_easy_setopt(c, CURLOPT_URL, url);
	curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(c, CURLOPT_USERAGENT, "millm/" MILLM_VERSION);
	/* never leave https once there */
#if LIBCURL_VERSION_NUM >= 0x075500
#if LIBCURL_VERSION_NUM >= 0x075500
	curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, https ? "https" : "http,https");
#else
	curl_easy_setopt(c, CURLOPT_PROTOCOLS, (long) (https ? CURLPROTO_HTTPS : CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
	curl_easy_setopt(c, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);	/* a proxy's are not the hub's */
#else
	curl_easy_setopt(c, CURLOPT_PROTOCOLS, (long) (https ? CURLPROTO_HTTPS : CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
	curl_easy_setopt(c, CURLOPT_CONNECTTIMEOUT, (long) CONNECT_TIMEOUT_S);
	curl_easy_setopt(c, CURLOPT_LOW_SPEED_LIMIT, 1L);
	curl_easy_setopt(c, CURLOPT_LOW_SPEED_TIME, (long) stall_seconds);
	if (timeout_ms > 0)
		curl_easy_setopt(c, CURLOPT_TIMEOUT_MS, (long) timeout_ms);
	curl_easy_setopt(c, CURLOPT_ERRORBUFFER, message);
	curl_easy_setopt(c, CURLOPT_BUFFERSIZE, 512L << 10);
	curl_easy_setopt(c, CURLOPT_HEADERFUNCTION, on_header);
	curl_easy_setopt(c, CURLOPT_HEADERDATA, hop);
	curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, on_body);
	curl_easy_setopt(c, CURLOPT_WRITEDATA, hop);
	if (strcmp(hop->request->method, "HEAD") == 0)
		curl_easy_setopt(c, CURLOPT_NOBODY, 1L);
	if (hop->request->range_end > 0)
		snprintf(range, sizeof(range), "%lld-%lld", (long long) hop->request->range_start, (long long) hop->request->range_end - 1);
	else
		snprintf(range, sizeof(range), "%lld-", (long long) hop->request->range_start);
	if (hop->request->range_start >= 0)
		curl_easy_setopt(c, CURLOPT_RANGE, range);
	if (h->authorization && is_own(h, url))
		headers = curl_slist_append(headers, h->authorization);
	curl_easy_setopt(c, CURLOPT_HTTPHEADER, headers);

	code = perform(h);
	if (headers)
		explicit_bzero(headers->data, strlen(headers->data));
	curl_slist_free_all(headers);
	curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &status);
	hop->reply->status = (int) status;
	hop->reply->retryable = code != CURLE_UNSUPPORTED_PROTOCOL && code != CURLE_URL_MALFORMAT && code != CURLE_PEER_FAILED_VERIFICATION;
	report_to_breaker(hop, code, message);
	if (hop->is_overlong)
	{
		millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub answered with a URL that is too long");
		return MILLM_E_MODEL_DOWNLOAD_FAILED;
	}
	if (code == CURLE_OK)
		return MILLM_OK;
	if (hop->refused)
		return MILLM_OK;		/* the caller ended it and knows why */
	return hop_failed(hop, code, message, err);
}

static void
clear_reply(MillmReply *reply)
{
	memset(reply, 0, sizeof(*reply));
	reply->linked_size = reply->length = reply->range_start = reply->range_total = reply->retry_after = -1;
}

/* Hop after hop, from url on. */
static MillmCode
follow(MillmHttp *h, const MillmRequest *request, char url[MAX_URL], MillmReply *reply, MillmError *err)
{
	Hop			hop = {.http = h, .request = request, .reply = reply};
	char		commit[48] = "", etag[72] = "";
	int64_t		linked_size = -1;

	for (int n = 0; n < MAX_HOPS; n++)
	{
		char		next[MAX_URL];
		MillmCode	rc;

		clear_reply(reply);
		reply->foreign = !is_own(h, url);
		memcpy(h->last_url, url, sizeof(h->last_url));
		hop.location[0] = '\0';
		hop.etag_is_linked = hop.is_overlong = false;
		hop.limit_left = hop.limit_reset_s = -1;
		if ((rc = do_hop(&hop, url, request->timeout_ms, err)) != MILLM_OK)
			return rc;
		/* what an earlier hop said of the file stays true */
		if (!reply->commit[0])
			memcpy(reply->commit, commit, sizeof(commit));
		if (etag[0])
			memcpy(reply->etag, etag, sizeof(etag));
		if (reply->linked_size < 0)
			reply->linked_size = linked_size;
		if (reply->status == 429 && reply->retry_after < 0 && hop.limit_left == 0 && hop.limit_reset_s >= 0)
			reply->retry_after = hop.limit_reset_s < 3600 ? (int) hop.limit_reset_s + 1 : 3600;
		if (reply->status < 300 || reply->status >= 400 || !hop.location[0])
			return MILLM_OK;
		if (!resolve_location(url, hop.location, next))
		{
			millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub redirects to something that is no URL");
			return MILLM_E_MODEL_DOWNLOAD_FAILED;
		}
		if (request->follow == FOLLOW_OWN && !is_own(h, next))
			return MILLM_OK;
		memcpy(commit, reply->commit, sizeof(commit));
		memcpy(etag, reply->etag, sizeof(etag));
		linked_size = reply->linked_size;
		memcpy(url, next, sizeof(next));
	}
	millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "the hub redirects in a loop");
	millm_detail(err, "After %d redirects from %.300s.", MAX_HOPS, request->url);
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

MillmCode
millm_http_do(MillmHttp *h, const MillmRequest *request, MillmReply *reply, MillmError *err)
{
	char		url[MAX_URL];
	bool		is_probe = false;
	int			wait_ms;
	MillmCode	rc;

	clear_reply(reply);
	if ((size_t) snprintf(url, sizeof(url), "%s%s", request->url[0] == '/' ? h->endpoint : "", request->url) >= sizeof(url))
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the URL is too long");
	if (is_own(h, url))
		while ((rc = millm_breaker_enter(h->endpoint, &is_probe, &wait_ms, err)) != MILLM_OK)
			if (wait_ms > request->outage_ms || (rc = millm_http_pause(h, wait_ms, err)) != MILLM_OK)
				return rc;
	rc = follow(h, request, url, reply, err);
	millm_breaker_leave(is_probe);
	return rc;
}

MillmCode
millm_http_pause(MillmHttp *h, int ms, MillmError *err)
{
	const int	slice = 100;

	for (int waited = 0; waited < ms; waited += slice)
	{
		struct timespec ts = {0, slice * 1000000L};

		if (atomic_load(h->stop))
			return millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
		clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL);
	}
	return MILLM_OK;
}
