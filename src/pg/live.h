/*
 * live.h -- the state that dies with the server: shared memory of the supervisor, the clerk and
 * the backends.
 */
#ifndef MILLM_LIVE_H
#define MILLM_LIVE_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "client.h"

/* Relative to the data directory, so always short enough for sun_path; left out of base backups by its name. */
#define MILLM_RUN_DIR "pgsql_tmp.millm"

typedef enum MillmHelperState
{
	MILLM_HELPER_STOPPED, MILLM_HELPER_STARTING, MILLM_HELPER_READY, MILLM_HELPER_BACKOFF, MILLM_HELPER_MISSING
} MillmHelperState;

typedef struct MillmHelperStatus
{
	MillmHelperState state;
	int			pid;			/* 0: none */
	int64		restarts;
	char		last_exit[512];	/* how the last one ended, with the tail of its stderr; "" at first */
} MillmHelperStatus;

/* "pgsql_tmp.millm/engine.sock" */
extern const char *millm_helper_socket(MillmHelper helper);
extern void millm_helper_status(MillmHelper helper, MillmHelperStatus *out);
/* The JSON of a helper's answer to a request that it does not refuse; false when there is none to be had within timeout_ms. */
extern bool millm_helper_ask(MillmHelper helper, const MillmHelperStatus *status, const char *request, int timeout_ms, StringInfo reply);

/* The model that the engine holds, as the supervisor last heard. */
typedef struct MillmLoadedModel
{
	int64		id;				/* the registry's */
	char		name[256];		/* UTF-8, NUL-terminated */
	char		uuid[37];
} MillmLoadedModel;

/* False: none is loaded. */
extern bool millm_loaded_model(MillmLoadedModel *out);

#define MILLM_FINGERPRINT_BYTES 384

/* The loaded model, and "NAME/QUANTIZATION/millm-VERSION-KERNELS" of what computes its answers. */
extern bool millm_loaded_fingerprint(MillmLoadedModel *out, char fingerprint[MILLM_FINGERPRINT_BYTES]);

/*
 * ereport unless the library is preloaded, this database is the one of millm.database, and it is
 * UTF8 (see design 2 and 3).  A supervisor that is only being started is waited for.  Every SQL function calls it first.
 */
extern void millm_check_ready(void);

#endif
