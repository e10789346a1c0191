/*
 * compat.h -- every difference between PostgreSQL 14 and 18 that this extension meets, in one place.
 */
#ifndef MILLM_COMPAT_H
#define MILLM_COMPAT_H

#include "postgres.h"

#include "access/xlog.h"
#if PG_VERSION_NUM >= 150000
#include "access/xlogrecovery.h"	/* HotStandbyActive() */
#endif
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/guc.h"
#include "utils/wait_event.h"

/* PostgreSQL 17: a wait event set belongs to a resource owner; NULL is the session, as before. */
#if PG_VERSION_NUM >= 170000
#define millm_create_wait_events(n) CreateWaitEventSet(NULL, n)
#else
#define millm_create_wait_events(n) CreateWaitEventSet(CurrentMemoryContext, n)
#endif

/* PostgreSQL 17: a wait of an extension has a name of its own in pg_stat_activity. */
#if PG_VERSION_NUM >= 170000
#define millm_new_wait_event(name) WaitEventExtensionNew(name)
#else
#define millm_new_wait_event(name) PG_WAIT_EXTENSION
#endif

/* PostgreSQL 15: a backend can be asked whether its client is still there. */
#if PG_VERSION_NUM >= 150000
#define millm_can_check_client() WaitEventSetCanReportClosed()
#else
#define millm_can_check_client() false
#endif

/* PostgreSQL 15: shared memory is asked for in a hook. */
#if PG_VERSION_NUM < 150000
#define MarkGUCPrefixReserved(prefix) EmitWarningsOnPlaceholders(prefix)
#endif

/* PostgreSQL 16: what a member may do with a role is said by each GRANT; before, by the member's own NOINHERIT. */
#if PG_VERSION_NUM >= 160000
#define MILLM_MEMBER_BY_SET_ONLY " WITH INHERIT FALSE, SET TRUE"
#else
#define MILLM_MEMBER_BY_SET_ONLY ""
#endif

/* PostgreSQL 16: how variable-length values are laid out has a header of its own. */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/* Begin a set that is returned in one piece: rsinfo->setResult and setDesc are there afterwards. */
#if PG_VERSION_NUM >= 160000
#define millm_init_set(fcinfo) InitMaterializedSRF(fcinfo, 0)
#elif PG_VERSION_NUM >= 150000
#define millm_init_set(fcinfo) SetSingleFuncCall(fcinfo, 0)
#else
static inline void
millm_init_set(FunctionCallInfo fcinfo)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	MemoryContext old;

	if (!rsinfo || !IsA(rsinfo, ReturnSetInfo) || !(rsinfo->allowedModes & SFRM_Materialize))
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("set-valued function called in context that cannot accept a set")));
	old = MemoryContextSwitchTo(rsinfo->econtext->ecxt_per_query_memory);
	if (get_call_result_type(fcinfo, NULL, &rsinfo->setDesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	rsinfo->setResult = tuplestore_begin_heap(true, false, work_mem);
	rsinfo->returnMode = SFRM_Materialize;
	MemoryContextSwitchTo(old);
}
#endif

#endif
