/*
 * registry.h -- the durable half: SQL on the registry's tables, as the extension's owner.
 */
#ifndef MILLM_REGISTRY_H
#define MILLM_REGISTRY_H

#include "postgres.h"

#include "fmgr.h"
#include "storage/lockdefs.h"

/* One row.  Strings are palloc'd and in the database's encoding, which is UTF-8; NULL where the column is. */
typedef struct MillmModel
{
	int64		id;
	char	   *uuid;
	int			attempt;
	char	   *name;
	char	   *source;			/* "huggingface" or "local" */
	char	   *repo_id;
	char	   *revision;
	char	   *quantization;	/* "FP16", "Q4" or "Q8" */
	char	   *directory;		/* relative to the cache; NULL for a local model that is used where it lies */
	char	   *local_path;		/* of a local model, what was registered; of a downloaded one, where it is when it is ready */
	char	   *status;			/* "pending", "ready" or "error" */
	char	   *error_code;
	char	   *error_message;
	bool		trust_remote_code;
	int64		disk_bytes;		/* < 0: unknown */
	bool		uncommitted;	/* written by the current transaction */
} MillmModel;

/* Temporary objects last: where they are not named they come first, and a caller's own type "text" would be the owner's. */
#define MILLM_SAFE_PATH "pg_catalog, pg_temp"

/* SPI with the registry's owner as current user and a safe search_path, between the two; errors undo it by themselves. */
typedef struct MillmRegistry
{
	MemoryContext caller;		/* where results go */
	Oid			user;
	int			security;
	int			guc_level;
} MillmRegistry;

extern void millm_registry_begin(MillmRegistry *r);
extern void millm_registry_end(MillmRegistry *r);

/* A model that a caller named: by id, or by a name; a name that is all digits is an id. */
typedef struct MillmModelKey
{
	int64		id;				/* when name is NULL */
	char	   *name;
} MillmModelKey;

extern MillmModelKey millm_key_from_id(int64 id);
extern MillmModelKey millm_key_from_name(const text *name);

/*
 * The rows as of now, whatever the transaction's snapshot, oldest first and at most max: an id has one at most, a name may have
 * several (one repository with two quantizations).  Returns how many.
 */
extern int	millm_models_find(MillmModelKey key, MillmModel **models, int max);
/* The one row.  MODEL_NOT_FOUND; INVALID_ARGUMENT, which lists them, when the name has several. */
extern MillmModel *millm_model_require(MillmModelKey key);

/*
 * Until the transaction's end, keep other sessions from adding or deleting what (a directory of the cache, a local path, a name):
 * they, or we, get MODEL_BUSY at once rather than wait for a stranger's COMMIT.
 */
extern void millm_registry_lock(const char *what, LOCKMODE mode);

/* "FP16", "Q4" or "Q8", the registry's and the helpers' only names, for what people write; INVALID_ARGUMENT lists that.  Static. */
extern const char *millm_canonical_quantization(const char *quantization);

/* What makes it ready, for messages: "download", or "quantization" of a local directory. */
extern const char *millm_model_work(const MillmModel *m);

/* Run one statement within begin/end; returns the number of rows, SPI_tuptable holds them. */
extern uint64 millm_registry_execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls);

#endif
