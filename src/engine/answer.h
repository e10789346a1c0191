/*
 * answer.h -- the JSON of what a generation says: the rows of a stream, and the result.
 */
#ifndef MILLM_ANSWER_H
#define MILLM_ANSWER_H

#include "engine.h"

/* Zeroed is empty. */
typedef struct MillmAnswer
{
	char	   *json;			/* [n], malloc'ed */
	size_t		n;
	size_t		capacity;
	bool		has_failed;		/* out of memory, or longer than a reply may be */
} MillmAnswer;

/* How the request wants to be answered. */
typedef struct MillmAnswerForm
{
	bool		streams;		/* the text is in the rows, not in the result */
	bool		has_choices;	/* n was given: every choice is named by its index */
	bool		has_logprobs;
	const MillmTokenizer *tokenizer;	/* with has_logprobs; borrowed */
} MillmAnswerForm;

/* Append the row of a piece to a, which free(a->json) ends; see a->has_failed. */
extern void millm_answer_row(MillmAnswer *a, const MillmAnswerForm *form, const MillmPiece *piece);
/* And the RESULT. */
extern void millm_answer_result(MillmAnswer *a, const MillmAnswerForm *form, const MillmResult *result);

#endif
