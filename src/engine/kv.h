/*
 * kv.h -- which pages of the KV cache belong to which sequence: numbers and counts, never bytes.
 *
 * The bytes of a page lie in the backend's memory; this is the ledger.  A page holds
 * MILLM_KV_PAGE_TOKENS positions of every layer of a group and is shared by reference count.  Only the
 * page of the position that is written next needs to be a sequence's own: millm_sequence_reserve() sees to it,
 * copying it (through the pool's copy_page) when it is shared.  A group's layers have the same window: its pages that the next
 * position does not see go back as the sequence grows.
 *
 * A pool may have a prefix cache (prefix.h), which keeps the full pages of sequences that share, while they live and after.
 */
#ifndef MILLM_KV_H
#define MILLM_KV_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "forward.h"
#include "prefix.h"

/*
 * Which layers share pages.  Groups are of the same number of layers, so that one pool serves them all: a model whose layers see the same
 * has one group; where 22 layers slide and 4 do not, 13 groups of 2.
 */
typedef struct MillmKvLayout
{
	int			n_groups;
	int			layers_per_page;
	int			windows[MILLM_MAX_LAYERS];	/* [n_groups]: positions that a layer sees from one, itself included; 0: all */
	int			groups[MILLM_MAX_LAYERS];	/* [n_layers]: where a layer is */
	int			places[MILLM_MAX_LAYERS];	/* [n_layers]: in a page of that group */
} MillmKvLayout;

/* For layers [n_layers] of these windows. */
extern void millm_kv_layout(MillmKvLayout *layout, const int *windows, int n_layers);
/* Pages that a sequence takes at most that grows to length, by at most step positions at a time. */
extern int64_t millm_kv_pages(const MillmKvLayout *layout, int length, int step);

typedef struct MillmPageTable
{
	int32_t    *pages;			/* pages[i]: positions 16 i .. 16 i + 15 */
	int			n_pages;		/* those with content and those reserved ahead */
	int			n_passed;		/* of these, the first ones, which have gone back: -1 */
	int			capacity;
} MillmPageTable;

typedef struct MillmKvPool
{
	int32_t		n_pages;
	int32_t		n_free;
	int32_t    *free_pages;		/* [n_pages], the first n_free are free: a stack, so warm pages come back first */
	int32_t    *references;		/* [n_pages]: tables that a page is in, and the prefix cache */
	MillmPrefix *prefix;		/* owned; NULL: none */
	int			n_groups;
	const int  *windows;		/* [n_groups], as in MillmKvLayout; borrowed */
	int			step;			/* positions that a sequence grows by at most at a time */
	void		(*copy_page) (void *arg, int32_t dst, int32_t src);
	void	   *arg;
	MillmSequence *sequences;	/* all that live, for the check */
} MillmKvPool;

struct MillmSequence
{
	MillmKvPool *pool;
	int			length;			/* positions computed */
	int			planned_length;	/* forward.c's: decides how its positions are rotated */
	int			rotation;		/* forward.c's: equal where the same tokens have the same pages */
	bool		is_shared;		/* its full pages are the prefix cache's, too */
	int32_t		place;			/* is_shared: in the cache, after its full pages */
	int32_t		begun[MILLM_KV_PAGE_TOKENS];	/* is_shared: the tokens after these; where none is begun, anything */
	int			n_in_step;		/* forward.c's: tokens of this sequence in the running step */
	MillmSequence *next, *previous;
	MillmPageTable tables[];	/* [n_groups] */
};

/* caches: with a prefix cache. */
extern MillmCode millm_kv_init(MillmKvPool *pool, int64_t n_pages, const int *windows, int n_groups, int step, bool caches,
							   void (*copy_page) (void *arg, int32_t dst, int32_t src), void *arg, MillmError *err);
extern void millm_kv_reset(MillmKvPool *pool);	/* no sequence may be left; fine after a failed init */

/* What forward.h promises of sequences, for a pool. */
extern MillmSequence *millm_kv_create(MillmKvPool *pool);
/* Pages that can be had: free, or only the prefix cache's. */
extern int32_t millm_kv_n_free(const MillmKvPool *pool);
/* The next position, which has room, has been computed from this token. */
extern void millm_kv_append(MillmSequence *seq, int32_t token);
/* The sequence has grown, and is not going to forget any of it but all: give back the pages that no position to come will see. */
extern void millm_kv_pass(MillmSequence *seq);
/* Is there room for positions up to length, and is the page of the next position its own? */
extern bool millm_kv_has_room(const MillmSequence *seq, int length);

/* Of the pages that millm_sequence_share() would give to a new sequence of that rotation, those that others hold, and that it would keep until length >= n. */
extern int64_t millm_kv_held(const MillmKvPool *pool, int rotation, const int32_t *tokens, int n, int length);

/* Every invariant of the ledger and its prefix cache, for tests: INTERNAL says which one is broken. */
extern MillmCode millm_kv_check(const MillmKvPool *pool, MillmError *err);

#endif
