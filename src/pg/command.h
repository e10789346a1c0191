/*
 * command.h -- ask the supervisor to load or unload, and wait for it.  There is one such command at a time.
 */
#ifndef MILLM_COMMAND_H
#define MILLM_COMMAND_H

#include "shmem.h"

/*
 * Leave a command; *number names it.  timeout_ms < 0: millm.unload_timeout.  A load of what is being loaded joins that load.
 * MODEL_BUSY: another command is under way, or a transaction deletes the model; MODEL_ALREADY_LOADED; MODEL_NOT_LOADED.
 */
extern MillmCode millm_command_load(const MillmLoadedModel *model, const char *path, bool force, uint64 *number, MillmError *err);
/* While a load is under way it stops that load, whose end is then the command's: CANCELED. */
extern MillmCode millm_command_unload(int timeout_ms, uint64 *number, MillmError *err);

/*
 * Wait, interruptibly, for its end; returns its code.  ereports its error, unless that is CANCELED and the caller has stopped it
 * (is_unload); its warnings are raised as WARNINGs, and what it waits for as NOTICEs.
 */
extern MillmCode millm_command_wait(uint64 number, bool is_unload);

#endif
