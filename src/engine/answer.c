/*
 * answer.c -- generations as JSON.
 *
 * Written straight into one buffer: as a tree of jansson's, logprobs would take many times their bytes.  A buffer never gets longer
 * than WIRE_MAX_REPLY_BYTES.  Failures are kept in the answer, so that writing needs no check after each word.
 */
#include "answer.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "utf8.h"
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

/* A token's own text: bytes that are no characters by themselves become U+FFFD, and so does U+0000, which PostgreSQL cannot hold. */
static void
put_characters(MillmAnswer *a, const char *bytes, size_t len)
{
	char	   *text = malloc(3 * len + 1);
	size_t		n = 0;
	uint32_t	cp;

	if (!text)
	{
		a->has_failed = true;
		return;
	}
	for (size_t i = 0; i < len;)
	{
		int			k = millm_utf8_decode(bytes + i, len - i, &cp, NULL);
		size_t		bytes_n = (size_t) (k > 0 ? k : -k);
		bool		is_shown = k > 0 && cp != 0;
		size_t		text_n = is_shown ? bytes_n : 3;

		memcpy(text + n, is_shown ? bytes + i : "\xEF\xBF\xBD", text_n);
		n += text_n;
		i += bytes_n;
	}
	put_string(a, text, n);
	free(text);
}

/* The fields of one logprob. */
static void
put_logprob(MillmAnswer *a, const MillmTokenizer *tokenizer, const MillmLogprob *p)
{
	char	   *bytes;
	size_t		len;
	MillmError	err;

	put(a, "\"id\":%d,\"logprob\":", p->id);
	if (isnan(p->logprob))
		put(a, "null");			/* nothing is before it */
	else
		put(a, "%.9g", (double) p->logprob);
	put(a, ",\"token\":");
	if (millm_token_bytes(tokenizer, p->id, &bytes, &len, &err) != MILLM_OK)
	{
		if (err.code != MILLM_E_INVALID_ARGUMENT)
			a->has_failed = true;
		put(a, "\"\",\"bytes\":null");	/* one of the rows that fill an embedding up */
		return;
	}
	put_characters(a, bytes, len);
	put(a, ",\"bytes\":[");
	for (size_t i = 0; i < len; i++)
		put(a, "%s%d", i > 0 ? "," : "", (unsigned char) bytes[i]);
	put(a, "]");
	free(bytes);
}

static void
put_logprobs(MillmAnswer *a, const MillmTokenizer *tokenizer, const MillmPiece *piece)
{
	for (int i = 0; i < piece->n_tokens; i++)
	{
		const MillmLogprob *row = piece->logprobs + (size_t) i * (size_t) (1 + piece->n_top);

		put(a, "%s{", i > 0 ? "," : "");
		put_logprob(a, tokenizer, row);
		put(a, ",\"top_logprobs\":[");
		for (int k = 1; k <= piece->n_top && row[k].id >= 0; k++)
		{
			put(a, "%s{", k > 1 ? "," : "");
			put_logprob(a, tokenizer, &row[k]);
			put(a, "}");
		}
		put(a, "]}");
	}
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
	{
		put(a, "%s\"finish_reason\":\"%s\"", comma, piece->stopped ? "stop" : "length");
		comma = ",";
	}
	if (form->has_logprobs)
	{
		put(a, "%s\"logprobs\":[", comma);
		put_logprobs(a, form->tokenizer, piece);
		put(a, "]");
	}
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
	put(a, "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"cached_tokens\":%d},\"seed\":%lld,\"queue_ms\":%.3f,\"compute_ms\":%.3f}",
		result->prompt_tokens, result->completion_tokens, result->cached_tokens, (long long) result->seed, result->timing.queue_ms, result->timing.compute_ms);
}
