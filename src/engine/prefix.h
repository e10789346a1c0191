/*
 * prefix.h -- the prefix cache: which pages of the KV cache hold the beginning of a text, by its token ids.
 *
 * A tree.  A node stands for one page's worth of tokens after all those of its ancestors, and has a page for each group of layers, or
 * had one.  Like kv.h it knows page numbers, never bytes; kv.c counts the references, of which the cache has one for each page in it.
 */
#ifndef MILLM_PREFIX_H
#define MILLM_PREFIX_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"

typedef struct MillmPrefix MillmPrefix;

/* For a pool of n_pages in n_groups.  NULL: out of memory. */
extern MillmPrefix *millm_prefix_create(int32_t n_pages, int n_groups);
extern void millm_prefix_free(MillmPrefix *p);	/* NULL is fine */

/*
 * A place in the tree: a node from 0 on; below 0 before the first page, where places are of as many kinds as a page's content
 * depends on something else than the tokens.
 */
#define MILLM_PREFIX_ROOT(kind)	(-1 - (int32_t) (kind))

/* The node that follows place with these tokens [MILLM_KV_PAGE_TOKENS]; -1: there is none. */
extern int32_t millm_prefix_find(const MillmPrefix *p, int32_t place, const int32_t *tokens);
/* Make that node, which there is not; the caller enters it or puts a page there at once.  -1: there are as many as there may be. */
extern int32_t millm_prefix_add(MillmPrefix *p, int32_t place, const int32_t *tokens);
extern int32_t millm_prefix_parent(const MillmPrefix *p, int32_t node);		/* a place */
extern const int32_t *millm_prefix_tokens(const MillmPrefix *p, int32_t node);
extern const int32_t *millm_prefix_pages(const MillmPrefix *p, int32_t node);	/* [n_groups]; -1: not cached */
/* A sequence stands at a place, or no longer: its node stays as long, even without pages. */
extern void millm_prefix_enter(MillmPrefix *p, int32_t place);
extern void millm_prefix_leave(MillmPrefix *p, int32_t place);

/* The page, which is in no node, becomes the node's, which has none of that group. */
extern void millm_prefix_put(MillmPrefix *p, int32_t node, int group, int32_t page);
extern bool millm_prefix_has(const MillmPrefix *p, int32_t page);
/* A page of the cache is nobody else's any more, the last of all to go; or it is again. */
extern void millm_prefix_rest(MillmPrefix *p, int32_t page);
extern void millm_prefix_wake(MillmPrefix *p, int32_t page);
/* Forget the page that has rested for the longest time, and return it; -1: none does. */
extern int32_t millm_prefix_evict(MillmPrefix *p);

extern int32_t millm_prefix_n_pages(const MillmPrefix *p);	/* in the cache */
extern int32_t millm_prefix_n_resting(const MillmPrefix *p);	/* of them */

/*
 * Every invariant of the tree, for tests.  references [n_pages] are the pool's counts; standing [n_pages], which is used up, says how many
 * sequences stand at a node; windows [n_groups] as in MillmKvPool.  INTERNAL says which one is broken.
 */
extern MillmCode millm_prefix_check(const MillmPrefix *p, const int32_t *references, int32_t *standing, const int *windows, MillmError *err);

#endif
