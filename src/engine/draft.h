/*
 * draft.h -- what a sequence may go on with, by what it has said before: drafts for speculative decoding.
 *
 * Text repeats itself: names, code, the document that is summarized.  Where the last few tokens have occurred before, what followed them then
 * is the draft.  The model computes its tokens in one step, which costs it little more than one, and accepts those that it would have chosen.
 */
#ifndef MILLM_DRAFT_H
#define MILLM_DRAFT_H

#include <stdint.h>

#define MILLM_MAX_DRAFT_TOKENS		15
#define MILLM_DEFAULT_DRAFT_TOKENS	3		/* with the next one four rows, which CPU kernels compute in little more than the time of one */

/* Of one sequence: its tokens, and where the last occurrence of each few of them is. */
typedef struct MillmDrafter MillmDrafter;

/* For a sequence of at most max_tokens > 0.  NULL: out of memory. */
extern MillmDrafter *millm_drafter_create(int max_tokens);
extern void millm_drafter_free(MillmDrafter *d);	/* NULL is fine */
/* The next token of the sequence; those past max_tokens are not looked at. */
extern void millm_drafter_note(MillmDrafter *d, int32_t token);
/*
 * At most max tokens that may come next into draft [max <= MILLM_MAX_DRAFT_TOKENS]; returns how many, often 0: the end has not occurred before, or
 * drafts have been wrong of late.  A function of the tokens and of what was told of earlier drafts, never of a clock.
 */
extern int	millm_drafter_draft(MillmDrafter *d, int32_t *draft, int max);
/* Of the last draft, which had tokens, the first so many were accepted. */
extern void millm_drafter_accepted(MillmDrafter *d, int n);

#endif
