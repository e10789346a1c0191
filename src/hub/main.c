/*
 * main.c -- millm-hub: the Hub client as a helper of the server, and as a command line.
 *
 *     millm-hub serve --socket PATH          what the supervisor starts; the requests are in wire/protocol.md
 *     millm-hub validate REPO [options]      can it be downloaded and run?
 *     millm-hub preview REPO [options]       what is it, and what would it take?
 *     millm-hub download REPO --cache-dir DIR [options]
 *     millm-hub quantize DIR --output DIR2 --quantization Q4
 *
 * Each request runs on a thread of its own, few at a time; there is one download at a time.  A request's memory belongs to its Work,
 * which its thread and its connection share.
 */
#include <curl/curl.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "breaker.h"
#include "job.h"
#include "serve.h"
#include "store.h"
#include "version.h"

#define MAX_WORKERS			8	/* cancels do not count: they must always get through */
#define MAX_THREADS			32	/* with them */
#define CANCEL_WAIT_S		10
#define DOWNLOAD_WAIT_S		10	/* for a stopped download to be gone before the next begins */
#define VALIDATE_MS			1500	/* unless the request says another time */
#define PREVIEW_MS			20000
#define CONNECTIONS			4
#define DEFAULT_ENDPOINT	"https://huggingface.co"

typedef enum Op {OP_VALIDATE, OP_PREVIEW, OP_DOWNLOAD, OP_CANCEL, OP_INSPECT, OP_REMOVE} Op;

typedef struct Work
{
	Op			op;
	MillmConn  *conn;
	MillmJobSpec spec;
	char	   *strings[16];	/* owns what spec points to */
	int			n_strings;
	const char *path;
	bool		is_waiting;		/* a download, for the one before it to end */
	atomic_bool stop;			/* canceled, or the client is gone, or shutdown */
	atomic_bool keep;			/* leave what is there for a later attempt */
	struct Work *next;			/* in the list of running ones */
} Work;

static struct
{
	pthread_mutex_t lock;
	pthread_cond_t changed;
	Work	   *running;
	int			n_threads;
	int			n_counted;		/* of them, those that MAX_WORKERS limits */
	bool		ending;
} hub = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

/* --- Serving ---------------------------------------------------------------------------------------- */

static void
report_frame(void *arg, const MillmProgress *p)
{
	Work	   *w = arg;
	json_t	   *frame = json_pack("{s:s, s:I, s:I, s:s}", "stage", p->stage, "bytes", (json_int_t) p->bytes, "total_bytes", (json_int_t) p->total_bytes, "file", p->file);

	if (frame && p->bytes_per_second >= 0)
		json_object_set_new(frame, "speed_bps", json_real(p->bytes_per_second));
	if (frame)
		millm_conn_send(w->conn, WIRE_PROGRESS, frame);
}

/* Stop the download of that model, and wait until it has ended. */
static MillmCode
cancel_download(const char *uuid, MillmError *err)
{
	struct timespec until;
	MillmCode	rc = MILLM_OK;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += CANCEL_WAIT_S;
	pthread_mutex_lock(&hub.lock);
	for (;;)
	{
		Work	   *w = hub.running;

		while (w && (w->op != OP_DOWNLOAD || strcmp(w->spec.model_uuid, uuid) != 0))
			w = w->next;
		if (!w)
			break;
		/* canceled is the last word: also when its client is gone, nothing stays for another attempt */
		atomic_store(&w->keep, false);
		atomic_store(&w->stop, true);
		pthread_cond_broadcast(&hub.changed);	/* it may be waiting for its turn */
		if (pthread_cond_clockwait(&hub.changed, &hub.lock, CLOCK_MONOTONIC, &until) == ETIMEDOUT)
		{
			rc = millm_fail(err, MILLM_E_HUB_UNAVAILABLE, "the download did not stop within %d seconds", CANCEL_WAIT_S);
			break;
		}
	}
	pthread_mutex_unlock(&hub.lock);
	return rc;
}

static void
free_work(Work *w)
{
	millm_conn_unref(w->conn);
	for (int i = 0; i < w->n_strings; i++)
	{
		explicit_bzero(w->strings[i], strlen(w->strings[i]));	/* one may be a token */
		free(w->strings[i]);
	}
	free(w);
}

/* The work is done: before its client hears of it, so that the next download does not find this one still there. */
static void
leave(Work *w)
{
	pthread_mutex_lock(&hub.lock);
	for (Work **p = &hub.running; *p; p = &(*p)->next)
		if (*p == w)
		{
			*p = w->next;
			break;
		}
	pthread_cond_broadcast(&hub.changed);
	pthread_mutex_unlock(&hub.lock);
}

/* The end of a request that has left.  on_shutdown() waits for it: nothing of the request may be used after. */
static void
finish(Work *w)
{
	bool		counts = w->op != OP_CANCEL;

	free_work(w);
	pthread_mutex_lock(&hub.lock);
	hub.n_threads--;
	hub.n_counted -= counts;
	pthread_cond_broadcast(&hub.changed);
	pthread_mutex_unlock(&hub.lock);
}

/* A stopped download may take a second to be gone; the next one waits for it. */
static MillmCode
await_turn(Work *w, MillmError *err)
{
	struct timespec until;
	MillmCode	rc = MILLM_OK;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += DOWNLOAD_WAIT_S;
	pthread_mutex_lock(&hub.lock);
	while (rc == MILLM_OK)
	{
		Work	   *r = hub.running;

		while (r && (r == w || r->op != OP_DOWNLOAD || r->is_waiting))
			r = r->next;
		if (atomic_load(&w->stop))
			rc = millm_fail(err, MILLM_E_CANCELED, "the download was canceled");
		else if (!r)
			break;
		else if (!atomic_load(&r->stop) || pthread_cond_clockwait(&hub.changed, &hub.lock, CLOCK_MONOTONIC, &until) == ETIMEDOUT)
			rc = millm_fail(err, MILLM_E_SERVER_BUSY, "another download is running");
	}
	if (rc == MILLM_OK)
		w->is_waiting = false;
	pthread_mutex_unlock(&hub.lock);
	return rc;
}

static void *
work_main(void *arg)
{
	Work	   *w = arg;
	json_t	   *out = NULL;
	MillmError	err = {0};
	MillmCode	rc = MILLM_E_INTERNAL;
	bool		removed = false;

	switch (w->op)
	{
		case OP_VALIDATE:
			rc = millm_job_validate(&w->spec, &w->stop, &out, &err);
			break;
		case OP_PREVIEW:
			rc = millm_job_preview(&w->spec, &w->stop, &out, &err);
			break;
		case OP_DOWNLOAD:
			if ((rc = await_turn(w, &err)) == MILLM_OK)
				rc = millm_job_download(&w->spec, &w->stop, &w->keep, report_frame, w, &out, &err);
			break;
		case OP_CANCEL:
			rc = cancel_download(w->spec.model_uuid, &err);
			out = json_object();
			break;
		case OP_INSPECT:
			rc = millm_job_inspect(w->path, &out, &err);
			break;
		case OP_REMOVE:
			rc = millm_store_trash(w->spec.cache_dir, w->spec.directory, w->spec.model_uuid, &removed, &err);
			out = json_pack("{s:b}", "removed", removed);
			break;
	}
	leave(w);
	if (rc == MILLM_OK)
		millm_conn_result(w->conn, out);
	else
	{
		millm_conn_error(w->conn, &err);
		json_decref(out);
	}
	finish(w);
	return NULL;
}

/* A string, copied. */
static void
need(MillmFields *f, Work *w, const char *name, const char **out, bool required)
{
	const char *value = NULL;

	millm_field_string(f, name, &value);
	if (value && !(w->strings[w->n_strings] = strdup(value)))
		f->code = millm_fail(f->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	else if (value)
		*out = w->strings[w->n_strings++];
	else if (required && f->code == MILLM_OK)
		f->code = millm_fail(f->err, MILLM_E_INVALID_ARGUMENT, "field \"%s\" is missing", name);
}

static void
need_repo(MillmFields *f, Work *w)
{
	need(f, w, "endpoint", &w->spec.endpoint, true);
	need(f, w, "repo_id", &w->spec.repo_id, true);
	need(f, w, "revision", &w->spec.revision, false);
	need(f, w, "token", &w->spec.token, false);
}

static MillmCode
read_request(Work *w, json_t *request, MillmError *err)
{
	MillmFields f;
	const char *op = NULL;
	int64_t		timeout_ms, n_connections = CONNECTIONS;

	millm_fields_begin(&f, request, err);
	millm_field_string(&f, "op", &op);
	w->spec.revision = "main";
	w->spec.quantization = "FP16";
	if (op && strcmp(op, "validate") == 0)
		w->op = OP_VALIDATE;
	else if (op && strcmp(op, "preview") == 0)
		w->op = OP_PREVIEW;
	else if (op && strcmp(op, "download") == 0)
		w->op = OP_DOWNLOAD;
	else if (op && strcmp(op, "cancel") == 0)
		w->op = OP_CANCEL;
	else if (op && strcmp(op, "inspect") == 0)
		w->op = OP_INSPECT;
	else if (op && strcmp(op, "remove") == 0)
		w->op = OP_REMOVE;
	else
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "there is no op \"%.60s\"", op ? op : "");
	if (w->op == OP_VALIDATE || w->op == OP_DOWNLOAD)
	{
		need(&f, w, "source_path", &w->spec.source_path, false);
		need(&f, w, "quantization", &w->spec.quantization, false);
		if (!w->spec.source_path)
		{
			need_repo(&f, w);
			millm_field_bool(&f, "trust_remote_code", &w->spec.trust_remote_code);
		}
	}
	if (w->op == OP_PREVIEW)
		need_repo(&f, w);
	timeout_ms = w->op == OP_PREVIEW ? PREVIEW_MS : VALIDATE_MS;
	if (w->op == OP_VALIDATE || w->op == OP_PREVIEW)
		millm_field_int(&f, "timeout_ms", 1, 600000, &timeout_ms);
	w->spec.timeout_ms = (int) timeout_ms;
	if (w->op == OP_DOWNLOAD || w->op == OP_REMOVE)
	{
		need(&f, w, "cache_dir", &w->spec.cache_dir, true);
		need(&f, w, "directory", &w->spec.directory, true);
	}
	if (w->op == OP_DOWNLOAD || w->op == OP_REMOVE || w->op == OP_CANCEL)
		need(&f, w, "model_uuid", &w->spec.model_uuid, true);
	if (w->op == OP_DOWNLOAD)
	{
		need(&f, w, "owner_id", &w->spec.owner_id, true);
		need(&f, w, "cluster", &w->spec.cluster, false);
		need(&f, w, "hf_cache_dir", &w->spec.hf_cache_dir, false);
		millm_field_int(&f, "model_id", 0, INT64_MAX, &w->spec.model_id);
		millm_field_int(&f, "connections", 1, MILLM_HUB_MAX_CONNECTIONS, &n_connections);
	}
	w->spec.n_connections = (int) n_connections;
	if (w->op == OP_INSPECT)
		need(&f, w, "path", &w->path, true);
	return millm_fields_end(&f);
}

/* {"op":"status"} is answered at once. */
static bool
answer_status(MillmConn *conn, json_t *request)
{
	const char *op = json_string_value(json_object_get(request, "op"));
	json_t	   *job = json_null();
	bool		downloading = false;
	char		breaker[64];

	if (!op || strcmp(op, "status") != 0 || json_object_size(request) != 1)
		return false;
	pthread_mutex_lock(&hub.lock);
	for (Work *w = hub.running; w; w = w->next)
		if (w->op == OP_DOWNLOAD && !w->is_waiting)
		{
			downloading = true;
			job = json_string(w->spec.model_uuid);
		}
	pthread_mutex_unlock(&hub.lock);
	millm_breaker_describe(breaker, sizeof(breaker));
	millm_conn_result(conn, json_pack("{s:s, s:i, s:s, s:o, s:s}", "state", downloading ? "downloading" : "idle", "pid", (int) getpid(), "version", MILLM_VERSION, "job", job,
									  "circuit_breaker", breaker));
	return true;
}

static void
on_request(void *arg, MillmConn *conn, json_t *request)
{
	Work	   *w;
	MillmError	err = {0};
	pthread_t	thread;
	bool		busy;

	(void) arg;
	if (answer_status(conn, request))
		return;
	w = calloc(1, sizeof(*w));
	if (!w)
	{
		millm_fail(&err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
		millm_conn_error(conn, &err);
		return;
	}
	w->conn = millm_conn_ref(conn);
	if (read_request(w, request, &err) != MILLM_OK)
	{
		millm_conn_error(conn, &err);
		free_work(w);
		return;
	}
	w->is_waiting = w->op == OP_DOWNLOAD;
	pthread_mutex_lock(&hub.lock);
	busy = hub.ending || hub.n_threads >= MAX_THREADS || (w->op != OP_CANCEL && hub.n_counted >= MAX_WORKERS);
	if (!busy)
	{
		hub.n_threads++;
		hub.n_counted += w->op != OP_CANCEL;
		w->next = hub.running;
		hub.running = w;
	}
	pthread_mutex_unlock(&hub.lock);
	if (busy)
	{
		millm_fail(&err, MILLM_E_SERVER_BUSY, "millm-hub has too much to do");
		millm_detail(&err, "It works on %d requests at a time.", MAX_WORKERS);
		millm_conn_error(conn, &err);
		free_work(w);
	}
	else if (pthread_create(&thread, NULL, work_main, w) != 0)
	{
		millm_fail(&err, MILLM_E_INSUFFICIENT_MEMORY, "could not start a thread");
		millm_conn_error(conn, &err);
		leave(w);
		finish(w);
	}
	else
		pthread_detach(thread);
}

/* The client is gone: nobody wants the answer.  A download's bytes are kept for the next attempt. */
static void
on_close(void *arg, MillmConn *conn)
{
	(void) arg;
	pthread_mutex_lock(&hub.lock);
	for (Work *w = hub.running; w; w = w->next)
		if (w->conn == conn)
		{
			if (!atomic_load(&w->stop))
				atomic_store(&w->keep, true);
			atomic_store(&w->stop, true);
		}
	pthread_cond_broadcast(&hub.changed);
	pthread_mutex_unlock(&hub.lock);
}

static void
on_shutdown(void *arg)
{
	(void) arg;
	pthread_mutex_lock(&hub.lock);
	hub.ending = true;
	for (Work *w = hub.running; w; w = w->next)
	{
		if (!atomic_load(&w->stop))
			atomic_store(&w->keep, true);
		atomic_store(&w->stop, true);
	}
	pthread_cond_broadcast(&hub.changed);	/* who waits for another */
	while (hub.n_threads > 0)	/* each request ends within a second of its stop */
		pthread_cond_wait(&hub.changed, &hub.lock);
	pthread_mutex_unlock(&hub.lock);
}

/* --- The command line ---------------------------------------------------------------------------------- */

static void
report_line(void *arg, const MillmProgress *p)
{
	(void) arg;
	fprintf(stderr, "\r%-12s %3d%%  %8.1f of %.1f MB  %-30.30s", p->stage, p->total_bytes ? (int) (p->bytes * 100 / p->total_bytes) : 0,
			(double) p->bytes / 1e6, (double) p->total_bytes / 1e6, p->file);
}

static int
complain(const MillmError *err)
{
	fprintf(stderr, "millm-hub: %s: %s\n", millm_code_name(err->code), err->message);
	if (err->detail[0])
		fprintf(stderr, "  %s\n", err->detail);
	if (err->hint[0])
		fprintf(stderr, "  Hint: %s\n", err->hint);
	return 1;
}

static int
usage(FILE *out, int status)
{
	fputs("usage: millm-hub validate REPO [options]         can it be downloaded and run?\n"
		  "       millm-hub preview REPO [options]          what is it, and what would it take?\n"
		  "       millm-hub download REPO --cache-dir DIR    download it to DIR/huggingface/\n"
		  "       millm-hub quantize DIR --output DIR2       the model of a directory, in another form, to a new one\n"
		  "       millm-hub serve --socket PATH              as the server's helper\n"
		  "       millm-hub --version | help\n"
		  "options: --endpoint URL (HF_ENDPOINT, " DEFAULT_ENDPOINT "), --revision REV (main), --token-file FILE, --trust-remote-code,\n"
		  "         --quantization Q4|Q8|FP16 (Q4), --connections 1..16 (4; of a large file),\n"
		  "         --hf-cache DIR (a HuggingFace cache to take files from); of serve: --breaker-ms N, how long a failing hub is first left alone (30000),\n"
		  "         --stall-s N, how long a transfer may stand still (20)\n", out);
	return status;
}

static char *
read_token(const char *file)
{
	FILE	   *f = fopen(file, "re");
	char		line[512] = "";

	if (!f || !fgets(line, sizeof(line), f))
		line[0] = '\0';
	if (f)
		fclose(f);
	line[strcspn(line, " \t\r\n")] = '\0';
	return line[0] ? strdup(line) : NULL;
}

/* One cache, one owner: a server that uses it holds this lock.  It is ours until we exit. */
static MillmCode
lock_cache(const char *cache_dir, MillmError *err)
{
	char		path[4096];
	int			fd = -1;

	(void) mkdir(cache_dir, 0700);	/* the open says whether it is there */
	if ((size_t) snprintf(path, sizeof(path), "%s/.lock", cache_dir) >= sizeof(path))
		errno = ENAMETOOLONG;
	else
		fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0)
		return MILLM_OK;
	millm_fail(err, MILLM_E_MODEL_DOWNLOAD_FAILED, "could not lock the model cache \"%s\": %s", cache_dir,
			   fd >= 0 && errno == EWOULDBLOCK ? "a server or another download uses it" : strerror(errno));
	if (fd >= 0)
		close(fd);
	return MILLM_E_MODEL_DOWNLOAD_FAILED;
}

/* A directory of this machine, to a new directory beside whatever output's parent holds. */
static MillmCode
quantize(MillmJobSpec *spec, const char *source, const char *output, json_t **out, MillmError *err)
{
	atomic_bool stop = false, keep = false;
	char		path[PATH_MAX], parent[PATH_MAX];
	const char *slash = strrchr(output, '/');
	MillmCode	rc;

	if (!realpath(source, path))
		return millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "could not open \"%s\": %s", source, strerror(errno));
	if (access(output, F_OK) == 0)
		return millm_fail(err, MILLM_E_MODEL_ALREADY_EXISTS, "\"%s\" is there already", output);
	snprintf(parent, sizeof(parent), "%.*s", slash ? (int) (slash - output) + (slash == output) : 1, slash ? output : ".");
	spec->source_path = path;
	spec->cache_dir = parent;
	spec->directory = slash ? slash + 1 : output;
	rc = millm_job_download(spec, &stop, &keep, report_line, NULL, out, err);
	fputc('\n', stderr);
	return rc;
}

int
main(int argc, char **argv)
{
	static const struct option options[] = {
		{"endpoint", required_argument, NULL, 'e'}, {"revision", required_argument, NULL, 'r'}, {"token-file", required_argument, NULL, 't'},
		{"cache-dir", required_argument, NULL, 'c'}, {"socket", required_argument, NULL, 's'}, {"trust-remote-code", no_argument, NULL, 'x'},
		{"quantization", required_argument, NULL, 'q'}, {"output", required_argument, NULL, 'o'}, {"breaker-ms", required_argument, NULL, 'b'},
		{"connections", required_argument, NULL, 'n'}, {"hf-cache", required_argument, NULL, 'h'}, {"stall-s", required_argument, NULL, 'l'}, {0}
	};
	MillmService service = {.program = "millm-hub", .on_request = on_request, .on_close = on_close, .on_shutdown = on_shutdown};
	MillmJobSpec spec = {.revision = "main", .quantization = "Q4", .owner_id = MILLM_NOBODY, .model_uuid = MILLM_NOBODY, .timeout_ms = 30000, .n_connections = CONNECTIONS, .endpoint = getenv("HF_ENDPOINT")};
	const char *command = argc > 1 ? argv[1] : "", *socket = NULL, *output = NULL;
	char	   *token = NULL, directory[512];
	atomic_bool stop = false, keep = true;
	MillmError	err = {0};
	json_t	   *out = NULL;
	MillmCode	rc;
	int			opt, breaker_ms = 0, stall_s = 0;

	if (strcmp(command, "--version") == 0)
		return puts("millm-hub " MILLM_VERSION) < 0;
	if (strcmp(command, "help") == 0 || strcmp(command, "--help") == 0)
		return usage(stdout, 0);
	optind = 2;
	while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (opt)
		{
			case 'e': spec.endpoint = optarg; break;
			case 'r': spec.revision = optarg; break;
			case 'c': spec.cache_dir = optarg; break;
			case 's': socket = optarg; break;
			case 'x': spec.trust_remote_code = true; break;
			case 'q': spec.quantization = optarg; break;
			case 'o': output = optarg; break;
			case 'h': spec.hf_cache_dir = optarg; break;
			case 'n':
				spec.n_connections = (int) strtol(optarg, NULL, 10);
				if (spec.n_connections < 1 || spec.n_connections > MILLM_HUB_MAX_CONNECTIONS)
					return usage(stderr, 2);
				break;
			case 'b':
				if ((breaker_ms = (int) strtol(optarg, NULL, 10)) <= 0 || strcmp(command, "serve") != 0)
					return usage(stderr, 2);
				break;
			case 'l':
				if ((stall_s = (int) strtol(optarg, NULL, 10)) <= 0 || strcmp(command, "serve") != 0)
					return usage(stderr, 2);
				break;
			case 't':
				if (!(spec.token = token = read_token(optarg)))
				{
					fprintf(stderr, "millm-hub: there is no token in \"%s\"\n", optarg);
					return 1;
				}
				break;
			default: return usage(stderr, 2);
		}
	if (strcmp(command, "serve") == 0 && socket && optind == argc)
	{
		int			status;

		if (breaker_ms > 0)
			millm_breaker_set_first_ms(breaker_ms);
		if (stall_s > 0)
			millm_http_set_stall_seconds(stall_s);
		/* fd 3 is the supervisor's: nothing may be opened before */
		curl_global_init(CURL_GLOBAL_DEFAULT);
		status = millm_serve(&service, socket, false);
		curl_global_cleanup();
		return status;
	}
	if (optind != argc - 1 || socket)
		return usage(stderr, 2);
	spec.repo_id = argv[optind];
	if (!spec.endpoint || !spec.endpoint[0])
		spec.endpoint = DEFAULT_ENDPOINT;
	curl_global_init(CURL_GLOBAL_DEFAULT);
	if (strcmp(command, "validate") == 0 && !spec.cache_dir)
		rc = millm_job_validate(&spec, &stop, &out, &err);
	else if (strcmp(command, "preview") == 0 && !spec.cache_dir)
		rc = millm_job_preview(&spec, &stop, &out, &err);
	else if (strcmp(command, "download") == 0 && spec.cache_dir)
	{
		snprintf(directory, sizeof(directory), "huggingface/%.400s--%.8s", spec.repo_id, spec.quantization);
		for (char *p = strchr(directory, '/') + 1, *slash = strchr(p, '/'); slash; slash = NULL)
		{
			memmove(slash + 2, slash + 1, strlen(slash + 1) + 1);
			memcpy(slash, "--", 2);
		}
		spec.directory = directory;
		if ((rc = millm_repo_id_check(spec.repo_id, &err)) == MILLM_OK && (rc = lock_cache(spec.cache_dir, &err)) == MILLM_OK)
		{
			rc = millm_job_download(&spec, &stop, &keep, report_line, NULL, &out, &err);
			fputc('\n', stderr);
		}
	}
	else if (strcmp(command, "quantize") == 0 && output && !spec.cache_dir)
		rc = quantize(&spec, argv[optind], output, &out, &err);
	else
		return usage(stderr, 2);
	if (rc != MILLM_OK)
		return complain(&err);
	json_dumpf(out, stdout, JSON_INDENT(1));
	putchar('\n');
	json_decref(out);
	free(token);
	curl_global_cleanup();
	return 0;
}
