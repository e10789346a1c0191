/*
 * command.c -- the one command of shared memory, from the side of those who ask.
 */
#include "command.h"

#include "miscadmin.h"
#include "utils/wait_event.h"

/* How long a command may be without a supervisor, which the postmaster starts again after a second. */
#define NO_SUPERVISOR_MS	10000
#define LOOK_MS				1000

static bool
under_way(const MillmCommand *c)
{
	return c->state == MILLM_COMMAND_REQUESTED || c->state == MILLM_COMMAND_RUNNING;
}

/* With the lock held: refuse a command beside the one under way. */
static MillmCode
busy(const MillmCommand *c, MillmError *err)
{
	if (c->kind == MILLM_LOAD)
		millm_fail(err, MILLM_E_MODEL_BUSY, "model \"%s\" is being loaded", c->model.name);
	else
		millm_fail(err, MILLM_E_MODEL_BUSY, "model \"%s\" is being unloaded", millm_shared->loaded.name);
	millm_hint(err, "Try again when that is done.");
	return err->code;
}

/* With the lock held. */
static uint64
put_command(MillmCommandKind kind)
{
	MillmCommand *c = &millm_shared->command;
	uint64		number = c->number + 1;

	memset(c, 0, sizeof(*c));
	c->number = number;
	c->kind = kind;
	c->freed_bytes = -1;
	c->state = MILLM_COMMAND_REQUESTED;
	return number;
}

MillmCode
millm_command_load(const MillmLoadedModel *model, const char *path, bool force, uint64 *number, MillmError *err)
{
	MillmCommand *c = &millm_shared->command;
	MillmCode	code = MILLM_OK;

	if (strlen(path) >= sizeof(c->path))
		return millm_fail(err, MILLM_E_INVALID_LOCAL_PATH, "path of model \"%s\" is longer than %zu bytes", model->name, sizeof(c->path) - 1);
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < MILLM_MAX_DELETES && code == MILLM_OK; i++)
		if (millm_shared->deletes[i].owner_pid != 0 && strcmp(millm_shared->deletes[i].uuid, model->uuid) == 0)
			code = millm_fail(err, MILLM_E_MODEL_BUSY, "model \"%s\" is being deleted", model->name);
	if (code == MILLM_OK && under_way(c))
	{
		if (c->kind == MILLM_LOAD && strcmp(c->model.uuid, model->uuid) == 0)
			*number = c->number;
		else
			code = busy(c, err);
	}
	else if (code == MILLM_OK && millm_shared->is_loaded && strcmp(millm_shared->loaded.uuid, model->uuid) == 0)
		code = millm_fail(err, MILLM_E_MODEL_ALREADY_LOADED, "model \"%s\" is already loaded", model->name);
	else if (code == MILLM_OK)
	{
		*number = put_command(MILLM_LOAD);
		c->model = *model;
		strlcpy(c->path, path, sizeof(c->path));
		c->force = force;
	}
	LWLockRelease(millm_shared->lock);
	millm_wake_supervisor();
	return code;
}

MillmCode
millm_command_unload(int timeout_ms, uint64 *number, MillmError *err)
{
	MillmCommand *c = &millm_shared->command;
	MillmCode	code = MILLM_OK;

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	if (under_way(c) && c->kind == MILLM_LOAD)
	{
		c->canceled = true;
		*number = c->number;
	}
	else if (under_way(c))
		code = busy(c, err);
	else if (!millm_shared->is_loaded)
		code = millm_fail(err, MILLM_E_MODEL_NOT_LOADED, "no model is loaded");
	else
	{
		*number = put_command(MILLM_UNLOAD);
		c->model = millm_shared->loaded;
		c->timeout_ms = timeout_ms;
	}
	LWLockRelease(millm_shared->lock);
	millm_wake_supervisor();
	return code;
}

/* One WARNING a line. */
static void
raise_warnings(char *lines)
{
	char	   *next;

	for (char *line = lines; line && *line; line = next)
	{
		next = strchr(line, '\n');
		if (next)
			*next++ = '\0';
		ereport(WARNING, (errmsg_internal("%s", line)));
	}
}

MillmCode
millm_command_wait(uint64 number, bool is_unload)
{
	const MillmCommand *c = &millm_shared->command;
	MillmError	err = {MILLM_OK};
	char		warnings[sizeof(c->warnings)] = "";
	int			alone_ms = 0;
	int64		told = 0;
	int64		freed = -1;
	char		device[sizeof(c->freed_device)] = "";
	bool		done = false;

	ConditionVariablePrepareToSleep(&millm_shared->changed);
	for (;;)
	{
		int64		pending = 0;

		LWLockAcquire(millm_shared->lock, LW_SHARED);
		if (c->number != number)
		{
			/* somebody else's command followed before we looked: ours has ended, we have missed how */
			millm_fail(&err, MILLM_E_MODEL_BUSY, "another load or unload has followed this one");
			millm_hint(&err, "millm.status() tells which model is loaded.");
			done = true;
		}
		else if (c->state == MILLM_COMMAND_DONE)
		{
			err = c->error;
			strlcpy(warnings, c->warnings, sizeof(warnings));
			freed = c->freed_bytes;
			strlcpy(device, c->freed_device, sizeof(device));
			done = true;
		}
		else
			pending = c->pending;
		LWLockRelease(millm_shared->lock);
		if (done)
			break;
		/* once for each new number, so that people see it go down */
		if (pending > 0 && pending != told)
			ereport(NOTICE, (errmsg_plural("Waiting for " INT64_FORMAT " pending request...", "Waiting for " INT64_FORMAT " pending requests...",
										   (unsigned long) pending, pending)));
		told = pending;
		if (ConditionVariableTimedSleep(&millm_shared->changed, LOOK_MS, PG_WAIT_EXTENSION))
		{
			alone_ms = millm_shared->supervisor ? 0 : alone_ms + LOOK_MS;
			if (alone_ms >= NO_SUPERVISOR_MS)
			{
				millm_fail(&err, MILLM_E_ENGINE_UNAVAILABLE, "millm's supervisor is not running");
				millm_hint(&err, "The server log says why.");
				break;
			}
		}
	}
	ConditionVariableCancelSleep();
	if (err.code != MILLM_OK && !(is_unload && err.code == MILLM_E_CANCELED))
		millm_ereport(ERROR, &err);
	raise_warnings(warnings);
	if (is_unload && freed >= 0 && strcmp(device, "cpu") == 0)
		ereport(NOTICE, (errmsg("%.1f MB of private memory are free again", freed / 1e6)));
	else if (is_unload && freed >= 0)
		ereport(NOTICE, (errmsg("%.1f MB of the memory of %s are free again", freed / 1e6, device)));
	return err.code;
}
