/*
 * text_array.c -- see text_array.h.
 */
#include "text_array.h"

#include "catalog/pg_type.h"
#include "fmgr.h"

#include "client.h"
#include "compat.h"

#define SLICE_TEXTS		256
#define SLICE_BYTES		(1024 * 1024)	/* of more than one text; as JSON six times as many, which is less than a request may have */

void
millm_text_array_init(MillmTextArray *a, ArrayType *array)
{
	memset(a, 0, sizeof(*a));
	if (array)
		deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &a->texts, &a->nulls, &a->n);
}

void
millm_text_array_slice(MillmTextArray *a, StringInfo request)
{
	int64		bytes = 0;

	appendStringInfo(request, ",\"first\":%d,\"texts\":[", a->at + 1);
	for (a->slice_end = a->at; a->slice_end < a->n && !a->nulls[a->slice_end] && a->slice_end - a->at < SLICE_TEXTS; a->slice_end++)
	{
		const text *next = DatumGetTextPP(a->texts[a->slice_end]);

		bytes += VARSIZE_ANY_EXHDR(next);
		if (a->slice_end > a->at)
		{
			if (bytes > SLICE_BYTES)
				break;
			appendStringInfoChar(request, ',');
		}
		millm_append_text(request, next);
	}
	appendStringInfoChar(request, ']');
}
