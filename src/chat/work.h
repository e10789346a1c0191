/*
 * work.h -- one compilation or one rendering under way: its memory, its limits, and the way out.
 *
 * All memory of a work is in its arena and goes at once.  So a failure anywhere below may leave by longjmp
 * straight to the door (template.c), which frees or keeps the arena: nothing between holds anything else.
 */
#ifndef MILLM_CHAT_WORK_H
#define MILLM_CHAT_WORK_H

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#define MAX_DEPTH 1000			/* of evaluation, parsing, printing: what the C stack of a thread bears */

typedef struct WorkBlock WorkBlock;

typedef struct Work
{
	WorkBlock  *blocks;			/* the arena */
	char	   *at;
	char	   *end;
	size_t		left_bytes;		/* what the arena may still grow */
	uint64_t	left_steps;
	int			unlooked;		/* payments since the clock was looked at */
	int64_t		deadline;		/* of the thread's CPU time, in ns; 0: none */
	int			depth;
	int			line;			/* of the template, for messages */
	MillmError *err;
	jmp_buf		door;
} Work;

/* n bytes, aligned for anything; not zeroed.  Fails the work when its limit is reached. */
extern void *millm_work_alloc(Work *w, size_t n);
/* n elements of size bytes each, zeroed. */
extern void *millm_work_array(Work *w, size_t n, size_t size);
/* Make the newest allocation larger in place; false when it is not the newest or the block is full. */
extern bool millm_work_extend(Work *w, void *p, size_t old_n, size_t new_n);
extern void millm_work_free(Work *w);

/* Leave through the door.  The message gets the line in front. */
extern void millm_work_fail(Work *w, MillmCode code, const char *fmt, ...)
	__attribute__((noreturn, format(printf, 3, 4)));

/* Pay for n steps of evaluation, or for n bytes or elements that are copied or compared. */
extern void millm_work_pay(Work *w, uint64_t n);
static inline void
millm_work_pay_bytes(Work *w, size_t n)
{
	millm_work_pay(w, n / 32 + 1);
}
/* For what looks at n bytes one by one. */
static inline void
millm_work_pay_chars(Work *w, size_t n)
{
	millm_work_pay(w, n / 4 + 1);
}

/* Give it so many seconds of this thread's CPU time, from now on: for what costs more than it pays. */
extern void millm_work_limit_time(Work *w, int seconds);

/* One level deeper; every enter has its leave (a failure needs none). */
extern void millm_work_enter(Work *w);
static inline void
millm_work_leave(Work *w)
{
	w->depth--;
}

#endif
