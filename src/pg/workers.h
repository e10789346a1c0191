/*
 * workers.h -- the two background workers' entry points.
 */
#ifndef MILLM_WORKERS_H
#define MILLM_WORKERS_H

#include "postgres.h"

extern PGDLLEXPORT void millm_supervisor_main(Datum arg);
extern PGDLLEXPORT void millm_clerk_main(Datum arg);

#endif
