/*
 * scheduler.h -- decide, step after step, which tokens run through the model next.
 *
 * Knows counts, never token ids, text or bytes of the KV cache, which it asks for through two functions:
 * so its rules are tested without a model.
 */
#ifndef MILLM_SCHEDULER_H
#define MILLM_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

/* A seat for one sequence.  Embedded in its owner's struct; the owner keeps role, n_tokens and what it is and wants. */
typedef struct MillmSlot
{
	uint32_t	role;			/* who asks; roles take turns */
	int			n_tokens;		/* tokens known: the prompt and what was generated */
	int			n_past;			/* of them, positions that are in the KV cache; n_tokens > n_past while it lives */
	bool		is_stream;		/* somebody reads it token by token */
	bool		is_paused;		/* its reader is behind: computes nothing for now */
	bool		wants_rows;		/* the logits of all its tokens are wanted, not those of the last alone */
	bool		is_running;		/* admitted; the scheduler's */
	uint64_t	turn;			/* its place in the line, with arrival; the scheduler's */
	uint64_t	arrival;
	int64_t		n_preempted;	/* times its pages were taken; the scheduler's */
} MillmSlot;

typedef struct MillmSchedPages
{
	/*
	 * Make room for the slot's positions up to length; false, and nothing changed, when the pool is too full.  A slot that had no pages may be
	 * given some that hold a beginning of its tokens: its n_past is then set.
	 */
	bool		(*reserve) (void *arg, MillmSlot *slot, int length);
	/* Give all pages of the slot back. */
	void		(*release) (void *arg, MillmSlot *slot);
	int64_t		(*n_free) (void *arg);		/* pages */
	int64_t		(*needs) (void *arg, const MillmSlot *slot);	/* pages that a waiting slot takes at most for the tokens that it has */
	int64_t		growth;			/* pages that a running one may need for its next position */
	void	   *arg;
} MillmSchedPages;

typedef struct MillmPlanItem
{
	MillmSlot  *slot;
	int			n_tokens;		/* the next so many tokens of the slot, from its n_past on */
	int			n_drafted;		/* its owner's, after the plan: tokens that the step computes after these, should the slot go on with them */
} MillmPlanItem;

typedef struct MillmScheduler MillmScheduler;

/* Of slots that want rows, tokens of a step: more would keep who else is in it waiting while their logits are read. */
#define MILLM_SCHED_ROWS 256

/*
 * At most max_running sequences share steps of at most max_batch_tokens (>= max_running) tokens; max_waiting more may
 * wait.  The pool must hold the longest sequence that will be added.  NULL: out of memory.
 */
extern MillmScheduler *millm_sched_create(const MillmSchedPages *pages, int max_running, int max_waiting, int max_batch_tokens);
extern void millm_sched_free(MillmScheduler *s);

/* Queue a slot at its role's next turn.  False when max_running + max_waiting are there already. */
extern bool millm_sched_add(MillmScheduler *s, MillmSlot *slot);
/* Take a slot out, wherever it is, and release its pages. */
extern void millm_sched_remove(MillmScheduler *s, MillmSlot *slot);
extern int	millm_sched_n_running(const MillmScheduler *s);
extern int	millm_sched_n_waiting(const MillmScheduler *s);

/*
 * The next step, into items [max_running]: returns how many, 0 when there is nothing to do.  May admit and preempt: a
 * preempted slot has n_past 0 and waits again.  Pages for the planned positions are reserved.
 */
extern int	millm_sched_plan(MillmScheduler *s, MillmPlanItem *items);
/*
 * The planned step has run, in so many milliseconds: n_past grows, and the next chunk is fitted to it.  The owner adds what was accepted of a draft to
 * n_tokens and n_past.
 */
extern void millm_sched_done(MillmScheduler *s, const MillmPlanItem *items, int n, double ms);

#endif
