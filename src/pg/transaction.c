/*
 * transaction.c -- the end of a transaction that changed the registry.
 *
 * A commit callback may not fail: it takes the lock, writes in place and sets a latch.  Places are found by the process that owns
 * them, so nothing has to be remembered here but whether there is something to do.
 */
#include "transaction.h"

#include "access/xact.h"
#include "miscadmin.h"

#include "client.h"
#include "shmem.h"

static bool touched;

static void
end_transaction(bool commit)
{
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < MILLM_MAX_TOKENS; i++)
		if (millm_shared->tokens[i].owner_pid == MyProcPid)
		{
			if (commit)
				millm_shared->tokens[i].owner_pid = 0;
			else
				explicit_bzero(&millm_shared->tokens[i], sizeof(MillmToken));
		}
	for (int i = 0; i < MILLM_MAX_DELETES; i++)
		if (millm_shared->deletes[i].owner_pid == MyProcPid)
			memset(&millm_shared->deletes[i], 0, sizeof(MillmDelete));
	millm_shared->clerk_must_look |= commit;
	LWLockRelease(millm_shared->lock);
	if (commit)
		millm_wake_clerk();
}

static void
at_transaction_event(XactEvent event, void *arg)
{
	if (!touched)
		return;
	switch (event)
	{
		case XACT_EVENT_PRE_PREPARE:
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("cannot PREPARE a transaction that has changed millm's models"),
					 errhint("Use COMMIT.")));
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_ABORT:
			touched = false;
			end_transaction(event == XACT_EVENT_COMMIT);
			break;
		default:
			break;
	}
}

void
millm_transaction_init(void)
{
	RegisterXactCallback(at_transaction_event, NULL);
}

void
millm_transaction_touch(void)
{
	touched = true;
}

static void
refuse_full(const char *what, int limit)
{
	MillmError	err;

	millm_fail(&err, MILLM_E_SERVER_BUSY, "too many %s at once", what);
	millm_detail(&err, "At most %d are possible.", limit);
	millm_hint(&err, "Try again when some of them have ended.");
	millm_ereport(ERROR, &err);
}

void
millm_transaction_token(const char *uuid, const char *token)
{
	MillmToken *place = NULL;

	millm_transaction_touch();
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < MILLM_MAX_TOKENS && !place; i++)
		if (millm_shared->tokens[i].uuid[0] == '\0' || strcmp(millm_shared->tokens[i].uuid, uuid) == 0)
			place = &millm_shared->tokens[i];
	if (place)
	{
		strlcpy(place->uuid, uuid, sizeof(place->uuid));
		place->owner_pid = MyProcPid;
		strlcpy(place->value, token, sizeof(place->value));
	}
	LWLockRelease(millm_shared->lock);
	if (!place)
		refuse_full("downloads with an access token of their own", MILLM_MAX_TOKENS);
}

void
millm_transaction_delete(const char *uuid, const char *name)
{
	MillmDelete *place = NULL;
	bool		busy;
	MillmError	err;

	millm_transaction_touch();
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	busy = millm_model_in_engine(uuid);
	for (int i = 0; i < MILLM_MAX_DELETES && !busy && !place; i++)
		if (millm_shared->deletes[i].owner_pid == 0)
			place = &millm_shared->deletes[i];
	if (place)
	{
		strlcpy(place->uuid, uuid, sizeof(place->uuid));
		place->owner_pid = MyProcPid;
	}
	LWLockRelease(millm_shared->lock);
	if (busy)
	{
		millm_fail(&err, MILLM_E_MODEL_BUSY, "model \"%s\" is loaded, so it cannot be deleted", name);
		millm_hint(&err, "Unload it first with millm.unload().");
		millm_ereport(ERROR, &err);
	}
	if (!place)
		refuse_full("deletions of models", MILLM_MAX_DELETES);
}
