/*
 * texts.h -- texts that are read and not continued: their tokens, and the group of them that is in the KV cache.
 *
 * Internal to the engine; what embeddings and scores have in common.  A request for them has one choice, of which the slot is used, however many texts
 * it has: it runs them in groups, as many as fill a step, each text in a sequence of its own.  A group's tokens are one run for the scheduler, which
 * cuts it into chunks as it likes.
 */
#ifndef MILLM_TEXTS_H
#define MILLM_TEXTS_H

#include "engine.h"
#include "forward.h"

/* Positions in the pages of a group; not more than a step, for which even layers with a window have room. */
#define MILLM_GROUP_POSITIONS	MILLM_BATCH_TOKENS
#define MILLM_MAX_GROUP			(MILLM_GROUP_POSITIONS / MILLM_KV_PAGE_TOKENS)

typedef struct MillmTextRun
{
	int32_t    *tokens;			/* of all texts, one after the other; owned, as ends is */
	size_t	   *ends;			/* [n_texts]: where each ends in tokens */
	size_t		n_texts;
	int			n_unread;		/* tokens at the end of each text that are not computed */
	MillmSequence *trunk;		/* what each text continues; NULL: nothing.  The owner's */
	size_t		n_done;			/* texts of which all tokens were taken */
	size_t		first;			/* of the group */
	int			n_group;
	MillmSequence *seqs[MILLM_MAX_GROUP];	/* [n_group]; NULL: no room yet, or nothing to compute */
} MillmTextRun;

/* A token of the group. */
typedef struct MillmTextToken
{
	size_t		text;
	int			index;			/* in the text */
} MillmTextToken;

extern void text_run_reset(MillmTextRun *run);	/* its sequences must be gone */

extern int	text_length(const MillmTextRun *run, size_t text);	/* tokens; at most the context's */
extern int32_t text_token(const MillmTextRun *run, size_t text, int index);
extern int	text_n_computed(const MillmTextRun *run, size_t text);	/* tokens of it that run through the model */

/*
 * Make a group of the texts from n_done on: as many as fit into so many positions of KV pages, but at least one that has something to compute.  Returns
 * how many tokens are to be computed; 0: there is no such text left.
 */
extern int	text_run_form(MillmTextRun *run, int n_positions);
/* Room in the KV cache for the group; false when the pool is too full, and then nothing is kept of a group that has not begun. */
extern bool text_run_reserve(MillmTextRun *run, MillmForward *fw, bool has_begun);
extern void text_run_release(MillmTextRun *run);	/* the group's pages */

/* The token that is the offset-th to be computed of the group, and the one after a token. */
extern MillmTextToken text_run_seek(const MillmTextRun *run, int offset);
extern MillmTextToken text_run_next(const MillmTextRun *run, MillmTextToken token);
/* As a token of a step that wants nothing. */
extern MillmBatchToken text_run_batch_token(const MillmTextRun *run, MillmTextToken token);

/*
 * Is text i of these, whose ids are those from first on, one that the model can read?  INVALID_ARGUMENT for an empty one, which has no what
 * ("embedding"); CONTEXT_LENGTH_EXCEEDED with both numbers, and the hint to verb ("Embed") it in parts; INVALID_ARGUMENT for an id that the model does
 * not have.
 */
extern MillmCode text_check(const MillmRequest *r, const MillmTexts *texts, size_t i, const MillmIds *ids, size_t first, const char *what,
							const char *verb, MillmError *err);
/* "Text 3 of the array", or "The text" where there is no array. */
extern void text_name(char name[48], const MillmTexts *texts, size_t i);

#endif
