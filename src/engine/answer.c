/*
 * answer.c -- generations as JSON.
 *
 * Written straight into one buffer: as a tree of jansson's, logprobs would take many times their bytes.  A buffer never gets longer
 * than WIRE_MAX_REPLY_BYTES.  Failures are kept in the answer, so that writing needs no check after each word.
 */
#include "answer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

static bool
reserve(MillmAnswer *a, size_t n)
{
	size_t		capacity;
	char	   *p;

	if (a->has_failed || n > WIRE_MAX_REPLY_BYTES - a->n)
	{
		a->has_failed = true;
		return false;
	}
	if (a->n + n <= a->capacity)
		return true;
	capacity = 2 * (a->n + n) + 256;
	p = realloc(a->json, capacity);
	if (!p)
	{
		a->has_failed = true;
		return false;
	}
	a->json = p;
	a->capacity = capacity;
	return true;
}

/* A few words. */
__attribute__((format(printf, 2, 3))) static void
put(MillmAnswer *a, const char *fmt, ...)
{
	char		words[256];
	va_list		ap;
	int			n;

	va_start(ap, fmt);
	n = vsnprintf(words, sizeof(words), fmt, ap);
	va_end(ap);
	if (n < 0 || n >= (int) sizeof(words))
		a->has_failed = true;
	else if (reserve(a, (size_t) n))
	{
		memcpy(a->json + a->n, words, (size_t) n);
		a->n += (size_t) n;
	}
}

static void
put_string(MillmAnswer *a, const char *text, size_t len)
{
	size_t		n = wire_json_string_bytes(text, len);

	if (reserve(a, n))
		a->n += wire_put_json_string(a->json + a->n, n, text, len);
}

/* The fields of a piece, separated by commas. */
static void
put_piece(MillmAnswer *a, const MillmAnswerForm *form, const MillmPiece *piece)
{
	const char *comma = "";

	if (form->has_choices)
	{
		put(a, "\"index\":%d", piece->choice);
		comma = ",";
	}
	if (!piece->is_last || !form->streams)
	{
		put(a, "%s\"text\":", comma);
		put_string(a, piece->text, piece->len);
		comma = ",";
	}
	if (piece->is_last)
		put(a, "%s\"finish_reason\":\"%s\"", comma, piece->stopped ? "stop" : "length");
}

void
millm_answer_row(MillmAnswer *a, const MillmAnswerForm *form, const MillmPiece *piece)
{
	put(a, "{");
	put_piece(a, form, piece);
	put(a, "}");
}

void
millm_answer_result(MillmAnswer *a, const MillmAnswerForm *form, const MillmResult *result)
{
	put(a, "{");
	if (!form->has_choices)
	{
		put_piece(a, form, &result->choices[0]);
		put(a, ",");
	}
	else if (!form->streams)
	{
		put(a, "\"choices\":[");
		for (int i = 0; i < result->n; i++)
		{
			put(a, "%s{", i > 0 ? "," : "");
			put_piece(a, form, &result->choices[i]);
			put(a, "}");
		}
		put(a, "],");
	}
	put(a, "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d},\"seed\":%lld}", result->prompt_tokens, result->completion_tokens,
		(long long) result->seed);
}
