/*
 * text_array.h -- a text[] whose elements are a set-returning function's rows, sent to the engine in slices.
 *
 * A slice is texts that follow one another, none of them NULL: their answers leave while the engine computes the next one's, and neither side
 * ever holds a whole large array's.
 */
#ifndef MILLM_TEXT_ARRAY_H
#define MILLM_TEXT_ARRAY_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/array.h"

typedef struct MillmTextArray
{
	Datum	   *texts;			/* [n], in storage order */
	bool	   *nulls;
	int			n;
	int			at;				/* the row that comes next */
	int			slice_end;		/* the engine has been asked for the texts before it */
} MillmTextArray;

/* At the first element of array, which is borrowed as long as a is used; NULL has none.  What is allocated lives in the current memory context. */
extern void millm_text_array_init(MillmTextArray *a, ArrayType *array);

/*
 * Append to a request the fields "first" and "texts" of the slice that begins at a->at, an element that is there and not NULL, and set
 * a->slice_end.  It ends before the text that would make it too large, so that no text is refused for those beside it.
 */
extern void millm_text_array_slice(MillmTextArray *a, StringInfo request);

#endif
