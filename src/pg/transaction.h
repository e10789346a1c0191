/*
 * transaction.h -- what a registry change leaves in shared memory until its transaction ends.
 *
 * At COMMIT the clerk is woken and the transaction's tokens become the supervisor's; at ROLLBACK tokens are wiped.  A rollback to
 * a savepoint waits for the end of the whole: the clerk drops a token whose row never appeared.  PREPARE TRANSACTION is refused.
 */
#ifndef MILLM_TRANSACTION_H
#define MILLM_TRANSACTION_H

#include "postgres.h"

/* Install the callback; once, in the postmaster. */
extern void millm_transaction_init(void);

/* This transaction has changed the registry. */
extern void millm_transaction_touch(void);

/* Keep token for the download of that model.  ereports SERVER_BUSY when all places are taken. */
extern void millm_transaction_token(const char *uuid, const char *token);

/*
 * Nobody may load that model until this transaction has ended.  MODEL_BUSY when it is loaded or being loaded or unloaded,
 * SERVER_BUSY when all places are taken.
 */
extern void millm_transaction_delete(const char *uuid, const char *name);

#endif
