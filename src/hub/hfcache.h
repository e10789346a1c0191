/*
 * hfcache.h -- files that the user's own HuggingFace cache has already.
 *
 * Layout: reference hub-protocol.md 4.3.  The cache is read, never written, and no link in it is followed: a blob is opened by its hash, and where
 * there are no links, a snapshot's file by its name.  What is found there counts only when its bytes have the hash that the Hub lists.
 */
#ifndef MILLM_HFCACHE_H
#define MILLM_HFCACHE_H

#include "hub.h"

/*
 * Open a file of a repository in cache_dir, of the size that the list tells; -1: it is not there, or it may not be read.  repo_id as the user
 * or as the Hub spells it; both are tried by callers.
 */
extern int	millm_hfcache_open(const char *cache_dir, const char *repo_id, const char *commit, const MillmHubFile *file);

#endif
