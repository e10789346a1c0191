/*
 * stop.c -- stop sequences, byte by byte.
 *
 * Each sequence has its failure function (Knuth, Morris and Pratt 1977), so a byte costs amortized
 * constant time per sequence, and the state of all of them says how long a tail may still become one:
 * exactly that is held back.  The first sequence to be *complete* ends the text, the longest of those
 * that are complete at the same byte: so the result does not depend on how the text was cut in pieces.
 */
#include "stop.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct Pattern
{
	char	   *text;
	size_t		len;
	size_t	   *fail;			/* [len]: length of the longest proper border of text[0..i] */
	size_t		matched;		/* bytes of text that the tail equals */
} Pattern;

struct MillmStop
{
	int			n;
	Pattern		patterns[MILLM_MAX_STOPS];
	char	   *buf;			/* the held tail, then the new piece */
	size_t		held;
	size_t		shown;			/* bytes that the last call gave out; they go first thing in the next */
	size_t		capacity;
};

static bool
prepare(Pattern *p, const char *text)
{
	p->len = strlen(text);
	p->text = strdup(text);
	p->fail = calloc(p->len, sizeof(*p->fail));
	if (!p->text || !p->fail)
		return false;
	for (size_t i = 1, k = 0; i < p->len; i++)
	{
		while (k > 0 && text[k] != text[i])
			k = p->fail[k - 1];
		if (text[k] == text[i])
			k++;
		p->fail[i] = k;
	}
	return true;
}

MillmStop *
millm_stop_create(const char *const *strings, int n)
{
	MillmStop  *stop = calloc(1, sizeof(*stop));

	if (!stop)
		return NULL;
	for (; stop->n < n; stop->n++)
		if (!prepare(&stop->patterns[stop->n], strings[stop->n]))
		{
			stop->n++;
			millm_stop_free(stop);
			return NULL;
		}
	return stop;
}

void
millm_stop_free(MillmStop *stop)
{
	if (!stop)
		return;
	for (int i = 0; i < stop->n; i++)
	{
		free(stop->patterns[i].text);
		free(stop->patterns[i].fail);
	}
	free(stop->buf);
	free(stop);
}

/* Advance by one byte; the length of the sequence that it completes, or 0. */
static size_t
advance(MillmStop *stop, char c)
{
	size_t		complete = 0;

	for (int i = 0; i < stop->n; i++)
	{
		Pattern    *p = &stop->patterns[i];

		while (p->matched > 0 && p->text[p->matched] != c)
			p->matched = p->fail[p->matched - 1];
		if (p->text[p->matched] == c)
			p->matched++;
		if (p->matched == p->len)
		{
			if (p->len > complete)
				complete = p->len;
			p->matched = p->fail[p->len - 1];
		}
	}
	return complete;
}

/* Drop what has been shown. */
static void
drop_shown(MillmStop *stop)
{
	if (stop->shown > 0)
		memmove(stop->buf, stop->buf + stop->shown, stop->held);
	stop->shown = 0;
}

bool
millm_stop_push(MillmStop *stop, const char *piece, size_t len, const char **out, size_t *out_len)
{
	size_t		total;
	size_t		hold = 0;

	drop_shown(stop);
	total = stop->held + len;
	if (total + 1 > stop->capacity)
	{
		size_t		capacity = 2 * total + 64;
		char	   *buf = realloc(stop->buf, capacity);

		*out = NULL;
		*out_len = 0;
		if (!buf)
			return false;
		stop->buf = buf;
		stop->capacity = capacity;
	}
	memcpy(stop->buf + stop->held, piece, len);
	*out = stop->buf;
	for (size_t i = 0; i < len; i++)
	{
		size_t		complete = advance(stop, piece[i]);

		if (complete > 0)
		{
			*out_len = stop->shown = stop->held + i + 1 - complete;
			stop->held = 0;
			return true;
		}
	}
	for (int i = 0; i < stop->n; i++)
		if (stop->patterns[i].matched > hold)
			hold = stop->patterns[i].matched;
	*out_len = stop->shown = total - hold;
	stop->held = hold;
	return false;
}

void
millm_stop_flush(MillmStop *stop, const char **out, size_t *out_len)
{
	drop_shown(stop);
	*out = stop->buf ? stop->buf : "";
	*out_len = stop->shown = stop->held;
	stop->held = 0;
}
