/*
 * store.h -- the directory of one model in the cache: temporary names, renames, the meta file, removal.
 *
 * A file has its name only when its content is proved.  Until then it is ".partial-HASH-NAME", so that a partial
 * file is only ever continued with the content that it was begun for.
 */
#ifndef MILLM_STORE_H
#define MILLM_STORE_H

#include "hub.h"

#define MILLM_META_NAME ".millm_meta.json"
#define MILLM_STORE_MAX_NAME 400
#define MILLM_NOBODY	"00000000-0000-0000-0000-000000000000"	/* owner_id of what the command line makes */

typedef struct MillmStore MillmStore;

/*
 * Create or open cache_dir/directory ("huggingface/owner--name--FP16") for model uuid.  Every part is opened without following links.
 * An unfinished directory bears the uuid in ".partial-owner"; a finished one in its meta file.  MODEL_ALREADY_EXISTS when a finished
 * one is another model's: nothing in it was touched.  INSUFFICIENT_DISK, MODEL_DOWNLOAD_FAILED when it cannot be written.
 *
 * A finished directory whose model is gone is taken over: one of the same registry (owner_id) or the same database cluster, in which this
 * model now has its name, or one that the command line made, which is nobody's.  It stays as it is until millm_store_complete(); a failure
 * before that removes nothing of it.  owner_id, cluster: "" or NULL for none.
 */
extern MillmCode millm_store_open(const char *cache_dir, const char *directory, const char *uuid, const char *owner_id, const char *cluster,
								  MillmStore **out, MillmError *err);
extern void millm_store_close(MillmStore *store);	/* NULL is fine; removes nothing */
extern const char *millm_store_path(const MillmStore *store);

/* Free bytes for us on the file system. */
extern MillmCode millm_store_free_bytes(const MillmStore *store, int64_t *out, MillmError *err);
/* Size of a whole file of that name that is already there, or of its partial; 0: none. */
extern int64_t millm_store_have(const MillmStore *store, const MillmHubFile *file);
/* The hash, of the kind that the list tells, of an open file's first file->size bytes; false: it is shorter, or *stop became true. */
extern bool millm_store_hash(int fd, const MillmHubFile *file, atomic_bool *stop, char hex[MILLM_HASH_HEX]);
/* Is the whole file there, with that hash? */
extern bool millm_store_is_proved(const MillmStore *store, const MillmHubFile *file, atomic_bool *stop);

/*
 * For sinks of another form (recast.h): the directory's descriptor, the store's; an error of a system call; the name of a file until it is
 * proved; a small file of our own, written at once and synced.
 */
extern int	millm_store_dir(const MillmStore *store);
extern MillmCode millm_store_error(MillmError *err, const char *doing, const char *name);
extern void millm_store_partial_name(const MillmHubFile *file, char buf[MILLM_STORE_MAX_NAME]);
extern MillmCode millm_store_put(MillmStore *store, const char *name, const void *data, size_t len, MillmError *err);

/* Verified: the file that is open as fd has this content.  Give it our name too, without a copy; false: here that cannot be done. */
extern bool millm_store_link(MillmStore *store, int fd, const MillmHubFile *file);

/* The plain sink of one file after the other. */
extern MillmSink *millm_store_sink(MillmStore *store);

/* Write the meta file: the directory is finished. */
extern MillmCode millm_store_complete(MillmStore *store, const char *meta, size_t len, MillmError *err);
/*
 * After a failure: remove an unfinished directory with what this model's attempts wrote; all that is in it when it was made for
 * this model, else these files and their partials.  Of a directory that an earlier attempt had finished only partials are removed.
 */
extern void millm_store_remove(MillmStore *store, const MillmHubFile *const *files, size_t n);
/* The same for the case that there is nothing open: what earlier attempts of model uuid left, if anything. */
extern void millm_store_remove_unfinished(const char *cache_dir, const char *directory, const char *uuid);

/*
 * Remove cache_dir/directory whole, if it is the model of that uuid, finished or not: rename to cache_dir/.trash/uuid,
 * fsync, unlink without following links.  *removed false: there is no such directory, or it is another model's.
 */
extern MillmCode millm_store_trash(const char *cache_dir, const char *directory, const char *uuid, bool *removed, MillmError *err);

#endif
