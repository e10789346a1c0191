/*
 * shmem.h -- the shared memory of the supervisor, the clerk and the backends, from the inside.
 *
 * One struct, one LWLock.  Whoever changes something that somebody may wait for broadcasts `changed` after releasing the
 * lock.  Nothing here survives the server; what must survive is in the registry.
 *
 *   a backend    leaves a command (load, unload), marks a job canceled, reserves a token slot
 *   the clerk    puts pending rows of the registry into jobs, and takes finished jobs out
 *   the supervisor  moves helpers, the command and jobs through their states
 */
#ifndef MILLM_SHMEM_H
#define MILLM_SHMEM_H

#include "postgres.h"

#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"

#include "live.h"

#define MILLM_MAX_JOBS		64
#define MILLM_MAX_TOKENS	32
#define MILLM_MAX_DELETES	32
#define MILLM_MAX_EVENTS	64
#define MILLM_EVENT_BYTES	1024
#define MILLM_TOKEN_BYTES	512
#define MILLM_NAME_BYTES	256
#define MILLM_PATH_BYTES	1024

typedef enum MillmJobState
{
	MILLM_JOB_FREE,
	MILLM_JOB_QUEUED,			/* the clerk put it here */
	MILLM_JOB_RUNNING,			/* the supervisor has handed it to millm-hub */
	MILLM_JOB_DONE,				/* the clerk has to write the outcome to the registry */
	MILLM_JOB_WRITTEN			/* the clerk has; kept for those who wait, until the slot is needed */
} MillmJobState;

typedef struct MillmJob
{
	MillmJobState state;
	int64		model_id;
	char		uuid[37];
	int			attempt;		/* the registry's: retry() begins a new one */
	char		owner[37];		/* the registry's owner id */
	char		source_path[MILLM_PATH_BYTES];	/* the local directory that is quantized; "": a repository is downloaded */
	char		repo_id[MILLM_NAME_BYTES];
	char		revision[MILLM_NAME_BYTES];
	char		quantization[8];	/* in the end, what the weights are */
	char		directory[2 * MILLM_NAME_BYTES];	/* relative to the cache */
	bool		trust_remote_code;
	bool		canceled;
	int			tries;			/* so often the hub could not be reached */
	TimestampTz not_before;		/* QUEUED: of the next try; WRITTEN: when that was */
	/* progress; percent never goes back */
	char		stage[16];
	char		file[MILLM_NAME_BYTES];
	int			percent;
	int64		bytes;
	int64		total_bytes;	/* 0: not known yet */
	double		bytes_per_second;	/* < 0: not measured yet */
	/* outcome */
	MillmError	error;			/* code MILLM_OK: success */
	char		commit[48];
	char		path[MILLM_PATH_BYTES];
	char		model_type[64];
	char		architecture[128];
	char		license[64];
	int64		params;			/* < 0: unknown */
	int64		disk_bytes;
	int64		fetched_bytes;	/* over the network; what was here already did not come */
} MillmJob;

typedef enum MillmCommandKind {MILLM_LOAD, MILLM_UNLOAD} MillmCommandKind;
typedef enum MillmCommandState {MILLM_COMMAND_NONE, MILLM_COMMAND_REQUESTED, MILLM_COMMAND_RUNNING, MILLM_COMMAND_DONE} MillmCommandState;

/* The one load or unload at a time. */
typedef struct MillmCommand
{
	uint64		number;			/* of the latest command: who waits for an older one has missed its end */
	MillmCommandKind kind;
	MillmCommandState state;
	int			timeout_ms;		/* of an unload; < 0: millm.unload_timeout */
	MillmLoadedModel model;		/* to be loaded */
	char		path[MILLM_PATH_BYTES];
	bool		force;			/* although the memory seems not to be there */
	char		stage[24];
	int			percent;
	bool		canceled;		/* a load: millm.unload() has stopped it */
	int64		pending;		/* requests that an unload waits for */
	int64		freed_bytes;	/* by an unload; < 0: not known */
	char		freed_device[16];	/* whose memory that was */
	MillmError	error;			/* DONE: code MILLM_OK is success */
	char		warnings[1024];
} MillmCommand;

typedef struct MillmToken
{
	char		uuid[37];		/* "": free */
	int			owner_pid;		/* the transaction that brought it has not committed yet; 0: it has */
	char		value[MILLM_TOKEN_BYTES];
} MillmToken;

/* A model that a transaction under way deletes: it must not be loaded. */
typedef struct MillmDelete
{
	char		uuid[37];
	int			owner_pid;		/* 0: free */
} MillmDelete;

typedef struct MillmShared
{
	LWLock	   *lock;
	ConditionVariable changed;
	Latch	   *supervisor;		/* NULL: not running */
	Latch	   *clerk;
	bool		auto_load_done;
	bool		clerk_must_look;	/* at the registry: it has changed, or what was waited for is there */
	bool		no_database;	/* a clerk that connected to millm.database has failed: look before the next one tries */
	MillmHelperStatus helpers[2];
	bool		cache_owned;	/* the supervisor holds the cache's lock */
	bool		cache_is_anothers;	/* another server does */
	char		cache_dir[MILLM_PATH_BYTES];
	char		cache_problem[256];
	bool		is_loaded;
	MillmLoadedModel loaded;
	char		loaded_path[MILLM_PATH_BYTES];
	TimestampTz loaded_at;
	int64		loaded_bytes;	/* weights, KV cache and workspace; < 0: unknown */
	char		loaded_device[16];	/* where these are: "cpu", "cuda:0" */
	char		loaded_fingerprint[MILLM_FINGERPRINT_BYTES];
	MillmLoadedModel failed;	/* the model whose last load failed, and why; uuid "": none */
	MillmError	failure;
	MillmCommand command;
	MillmJob	jobs[MILLM_MAX_JOBS];
	MillmToken	tokens[MILLM_MAX_TOKENS];
	MillmDelete deletes[MILLM_MAX_DELETES];
	/* events for NOTIFY, oldest first; progress is dropped when it is full */
	int			n_events;
	char		events[MILLM_MAX_EVENTS][MILLM_EVENT_BYTES];
} MillmShared;

/* NULL when the library is not preloaded. */
extern MillmShared *millm_shared;

extern void millm_shmem_request(void);
extern void millm_shmem_startup(void);

/*
 * As millm_check_ready(), but content without a running supervisor: for functions that only look.
 */
extern void millm_check_registry(void);

/* Wake whom it may concern.  Safe in a commit callback. */
extern void millm_wake_supervisor(void);
extern void millm_wake_clerk(void);
/* Everybody who waits for a change. */
extern void millm_broadcast(void);

/*
 * With the lock held: a zeroed place for a new job of that model, in the way of nobody who waits for an older one; NULL when all
 * are at work.
 */
extern MillmJob *millm_new_job(const char *uuid);

/* With the lock held: the model's latest job, or NULL; whether the engine holds it, or is about to; queue an event for NOTIFY. */
extern MillmJob *millm_find_job(const char *uuid);
extern bool millm_model_in_engine(const char *uuid);
extern void millm_push_event(const char *fmt,...) __attribute__((format(printf, 1, 2)));
/* "model:KIND:error" */
extern void millm_push_error_event(const char *kind, int64 model_id, const MillmError *error);

#endif
