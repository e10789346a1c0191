/*
 * hub.h -- the HuggingFace Hub: what is in a repository, and its files.
 *
 * Protocol: reference hub-protocol.md.  This library does not know what the bytes of a file mean; job.c does.
 */
#ifndef MILLM_HUB_H
#define MILLM_HUB_H

#include <jansson.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "hash.h"
#include "http.h"

/* A download waits for a hub that is left alone (breaker.h); when the next try is later than this, it fails. */
#define MILLM_OUTAGE_MS			60000

#define MILLM_HUB_MAX_FILES		10000
#define MILLM_HUB_MAX_CONNECTIONS	16
#define MILLM_HUB_MAX_PATH		255

/* owner/name or name: ASCII letters, digits, '_', '-', '.'; see hub-protocol.md 6.1.  INVALID_REPO_ID naming the rule. */
extern MillmCode millm_repo_id_check(const char *repo_id, MillmError *err);
/* A branch, tag or commit.  INVALID_ARGUMENT. */
extern MillmCode millm_revision_check(const char *revision, MillmError *err);

typedef struct MillmHubFile
{
	char		path[MILLM_HUB_MAX_PATH + 1];	/* in the repository */
	int64_t		size;
	char		hash[72];		/* sha256 (64) or git sha1 (40) of the content; "" when the hub masks it */
} MillmHubFile;

typedef struct MillmRepo
{
	char		id[256];		/* as the hub spells it: a renamed or miscased id becomes the new one */
	char		commit[48];
	bool		gated;
	char		license[64];	/* "" unknown */
	int64_t		params;			/* by the hub's own count; -1 unknown */
	int64_t		f32_params;		/* those of them that are stored as F32 */
	char		model_type[64];	/* of the config, as the hub shows it to everybody; "" unknown, as is the next */
	char		architecture[128];
	MillmHubFile *files;		/* [n_files], sorted by path */
	size_t		n_files;
} MillmRepo;

/* Attempts and patience of API requests. */
typedef struct MillmPatience
{
	int			attempts;
	int			timeout_ms;		/* of one request */
	int			outage_ms;		/* MillmRequest's */
} MillmPatience;

/*
 * Model info and the whole tree at the resolved commit.  The caller frees *out.  Errors as hub-protocol.md section 8 maps them.
 */
extern MillmCode millm_repo_open(MillmHttp *http, const char *repo_id, const char *revision, MillmPatience patience, MillmRepo **out, MillmError *err);
extern void millm_repo_free(MillmRepo *repo);	/* NULL is fine */
extern const MillmHubFile *millm_repo_find(const MillmRepo *repo, const char *path);

/*
 * The two answers that make a MillmRepo, as texts.  info fills all but the files; each page adds files, at most
 * MILLM_HUB_MAX_FILES in all.  Names that could not safely be one on our disk are left out: no model needs such a file.
 * MODEL_DOWNLOAD_FAILED when the text is no such answer.
 */
extern MillmCode millm_repo_read_info(MillmRepo *repo, const char *json, size_t len, MillmError *err);
extern MillmCode millm_repo_read_page(MillmRepo *repo, const char *json, size_t len, MillmError *err);

/* A small file whole, at most max bytes; malloc'ed and NUL-terminated. */
extern MillmCode millm_repo_read(MillmHttp *http, const MillmRepo *repo, const char *path, size_t max, MillmPatience patience,
								 char **out, size_t *len, MillmError *err);

/*
 * The first n bytes of a file, or all of a shorter one; malloc'ed.  Whether the hub sends the part that it was asked for, or the whole, whose
 * rest is not waited for, is as good.
 */
extern MillmCode millm_repo_read_head(MillmHttp *http, const MillmRepo *repo, const MillmHubFile *file, size_t n, MillmPatience patience,
									  char **out, size_t *len, MillmError *err);

/* Turn an answer of status >= 400 into an error (asks whoami-v2 when it must tell a bad token from a missing grant). */
extern MillmCode millm_hub_error(MillmHttp *http, const char *repo_id, const char *what, const MillmReply *reply, MillmError *err);

/* "/owner/name/resolve/COMMIT/path", malloc'ed. */
extern char *millm_resolve_url(const MillmRepo *repo, const char *path);

/*
 * Where the bytes of a file go, in order.  begin ... finish or abandon; one thread at a time, not always the same.
 */
typedef struct MillmSink
{
	void	   *arg;
	/*
	 * Open for this file.  *have: how many of its first bytes an earlier attempt left that need not come again; hash, which the caller
	 * has begun, is then brought to that point (by reading them again, or from a saved state).  *stop ends a long reading: CANCELED.
	 */
	MillmCode	(*begin) (void *arg, const MillmHubFile *file, MillmHash *hash, int64_t *have, atomic_bool *stop, MillmError *err);
	/* The next len bytes; never across the point that until_checkpoint() tells. */
	MillmCode	(*write) (void *arg, const void *data, size_t len, MillmError *err);
	/* After how many more bytes, at least 1, a checkpoint is possible; INT64_MAX: wherever you like. */
	int64_t		(*until_checkpoint) (void *arg);
	/* What was written is good so far, and hash is the state at this point: make both survive a crash of the machine. */
	MillmCode	(*checkpoint) (void *arg, const MillmHash *hash, MillmError *err);
	/* Start over: forget what was written of this file. */
	MillmCode	(*discard) (void *arg, MillmError *err);
	/* The bytes are what they should be: keep the file under its name. */
	MillmCode	(*finish) (void *arg, MillmError *err);
	/* The attempt ends without finish; what is there may be kept for another (begin). */
	void		(*abandon) (void *arg);
} MillmSink;

/* Bytes are in the sink: fetched over the network, or from this machine.  A negative delta: they were wrong and must come again; 0: nothing has come for a while. */
typedef void (*MillmAdvance) (void *arg, int64_t delta, bool is_fetched);

/*
 * Bring one file into the sink, verified: size, commit and hash.  Resumes, retries (3 attempts without progress), fetches once more
 * after a wrong hash.  A large file comes over n_connections, at most MILLM_HUB_MAX_CONNECTIONS, which are threads of this call; sink and
 * advance are called by the caller's thread only, while another one hashes.
 */
extern MillmCode millm_hub_fetch(MillmHttp *http, const MillmRepo *repo, const MillmHubFile *file, int n_connections, MillmSink *sink,
								 MillmAdvance advance, void *arg, MillmError *err);

#endif
