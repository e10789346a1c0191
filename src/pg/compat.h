/*
 * compat.h -- every difference between PostgreSQL 14 and 18 that this extension meets, in one place.
 */
#ifndef MILLM_COMPAT_H
#define MILLM_COMPAT_H

#include "postgres.h"

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

#endif
