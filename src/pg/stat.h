/*
 * stat.h -- what each role has had computed, and by which model: the view millm.stat_generate.
 *
 * client.c counts a request when it ends, so that whoever asks the engine to compute is counted.
 */
#ifndef MILLM_STAT_H
#define MILLM_STAT_H

#include "postgres.h"

#include "storage/lwlock.h"

/* Who asks which model. */
typedef struct MillmAsker
{
	Oid			role;
	int64		model_id;		/* 0: no model is loaded */
	char		model[256];		/* its name, in UTF-8 */
} MillmAsker;

typedef enum MillmEnd
{
	MILLM_END_DONE, MILLM_END_FAILED,
	MILLM_END_CANCELED,			/* by whomever; also a stream that was not read to its end */
	MILLM_END_BUSY				/* refused with SERVER_BUSY */
} MillmEnd;

/* What a request took, as far as the engine has said it: zeros where it has not. */
typedef struct MillmUse
{
	int64		prompt_tokens;
	int64		cached_tokens;
	int64		completion_tokens;
	double		queue_ms;
	double		compute_ms;
} MillmUse;

/* The current role and the loaded model. */
extern void millm_stat_asker(MillmAsker *asker);
/* Count a request that has ended.  Safe wherever a lock may be taken, in the clean-up of an aborted transaction too. */
extern void millm_stat_count(const MillmAsker *asker, MillmEnd end, const MillmUse *use);

/* For shmem.c: the table's bytes, and its place in shared memory, to be made under AddinShmemInitLock. */
extern Size millm_stat_shmem_bytes(void);
extern void millm_stat_shmem_startup(LWLock *lock);

#endif
