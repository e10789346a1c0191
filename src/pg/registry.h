/*
 * registry.h -- the durable half: SQL on the registry's tables, as the extension's owner.
 */
#ifndef MILLM_REGISTRY_H
#define MILLM_REGISTRY_H

#include "postgres.h"

#include "fmgr.h"

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

/* The row as of now, whatever the transaction's snapshot; NULL when there is none.  millm_model_require(): MODEL_NOT_FOUND. */
extern MillmModel *millm_model_find(MillmModelKey key);
extern MillmModel *millm_model_require(MillmModelKey key);

/* What makes it ready, for messages: "download", or "quantization" of a local directory. */
extern const char *millm_model_work(const MillmModel *m);

/* Run one statement within begin/end; returns the number of rows, SPI_tuptable holds them. */
extern uint64 millm_registry_execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls);

#endif
