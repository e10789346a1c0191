/*
 * kv.h -- which pages of the KV cache belong to which sequence: numbers and counts, never bytes.
 *
 * The bytes of a page lie in the backend's memory; this is the ledger.  A page holds
 * MILLM_KV_PAGE_TOKENS positions of every layer of a group and is shared by reference count.  Only the
 * page of the position that is written next needs to be a sequence's own: millm_kv_reserve() sees to it,
 * copying it (through the pool's copy_page) when it is shared.  Where all layers have a window, pages that the next position does not see
 * go back as the sequence grows.
 */
#ifndef MILLM_KV_H
#define MILLM_KV_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "forward.h"

/*
 * Layers that keep the same positions share a page table.  One group holds them all: where only some slide, their part of a page
 * is kept for the sake of the others.
 */
#define MILLM_KV_GROUPS 1

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
	int32_t    *references;		/* [n_pages] */
	int			window;			/* positions that one sees, itself included; 0: all.  Set before there is a sequence */
	void		(*copy_page) (void *arg, int32_t dst, int32_t src);
	void	   *arg;
	MillmSequence *sequences;	/* all that live, for the check */
} MillmKvPool;

struct MillmSequence
{
	MillmKvPool *pool;
	int			length;			/* positions computed */
	int			planned_length;	/* forward.c's: decides how its positions are rotated */
	int			n_in_step;		/* forward.c's: tokens of this sequence in the running step */
	MillmPageTable tables[MILLM_KV_GROUPS];
	MillmSequence *next, *previous;
};

extern MillmCode millm_kv_init(MillmKvPool *pool, int64_t n_pages, void (*copy_page) (void *arg, int32_t dst, int32_t src),
							   void *arg, MillmError *err);
extern void millm_kv_reset(MillmKvPool *pool);	/* no sequence may be left; fine after a failed init */

/* What forward.h promises of sequences, for a pool. */
extern MillmSequence *millm_kv_create(MillmKvPool *pool);
/* The sequence has grown: give back the pages that no position to come will see. */
extern void millm_kv_pass(MillmSequence *seq);
/* Is there room for positions up to length, and is the page of the next position its own? */
extern bool millm_kv_has_room(const MillmSequence *seq, int length);

/* Every invariant of the ledger, for tests: INTERNAL says which one is broken. */
extern MillmCode millm_kv_check(const MillmKvPool *pool, MillmError *err);

#endif
