/*
 * millm.c -- what happens when the server loads the library: settings, shared memory, two workers, one transaction callback.
 *
 * Everything needs shared_preload_libraries; a library that was loaded later defines nothing, and each function says so
 * (millm_check_registry()).  A server in binary upgrade gets the settings and no workers: nobody may write to it.
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"

#include "settings.h"
#include "shmem.h"
#include "transaction.h"
#include "workers.h"

/* Seconds until the postmaster starts a worker again that has ended. */
#define RESTART_SECONDS 1

PG_MODULE_MAGIC;

void		_PG_init(void);

#if PG_VERSION_NUM >= 150000
static shmem_request_hook_type next_shmem_request;
#endif
static shmem_startup_hook_type next_shmem_startup;

#if PG_VERSION_NUM >= 150000
static void
shmem_request(void)
{
	if (next_shmem_request)
		next_shmem_request();
	millm_shmem_request();
}
#endif

static void
shmem_startup(void)
{
	if (next_shmem_startup)
		next_shmem_startup();
	millm_shmem_startup();
}

static void
register_worker(const char *name, const char *main, int flags, BgWorkerStartTime start)
{
	BackgroundWorker worker = {
		.bgw_flags = BGWORKER_SHMEM_ACCESS | flags,
		.bgw_start_time = start,
		.bgw_restart_time = RESTART_SECONDS,
	};

	strlcpy(worker.bgw_name, name, sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, name, sizeof(worker.bgw_type));
	strlcpy(worker.bgw_library_name, "millm", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, main, sizeof(worker.bgw_function_name));
	RegisterBackgroundWorker(&worker);
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		return;
	millm_define_settings();
#if PG_VERSION_NUM >= 150000
	next_shmem_request = shmem_request_hook;
	shmem_request_hook = shmem_request;
#else
	millm_shmem_request();
#endif
	next_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = shmem_startup;
	millm_transaction_init();
	if (IsBinaryUpgrade)
		return;
	register_worker("millm supervisor", "millm_supervisor_main", 0, BgWorkerStart_PostmasterStart);
	/* on a standby the clerk only reads, so that its sessions learn which database is theirs */
	register_worker("millm clerk", "millm_clerk_main", BGWORKER_BACKEND_DATABASE_CONNECTION, BgWorkerStart_ConsistentState);
}
