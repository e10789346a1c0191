/*
 * draft.c -- prompt lookup: the latest place where the sequence has said the same (github.com/apoorvumang/prompt-lookup-decoding).
 *
 * A table has for each hash of NGRAM tokens the place after their latest occurrence; the tokens there are compared, so that a collision costs a draft and
 * nothing else.  Tokens enter it one late: the end of the sequence does not find itself.
 *
 * A wrong draft costs its rows of a step.  So after two that were all wrong in a row one chance is let go, then two, four, up to MAX_REST, until a draft is right.
 */
#include "draft.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define NGRAM		3			/* fewer are often a coincidence */
#define MAX_REST	32

struct MillmDrafter
{
	int32_t    *tokens;			/* [n] of max_tokens */
	int			n;
	int			max_tokens;
	int32_t    *places;			/* [mask + 1]; 0: none */
	uint32_t	mask;
	int			n_wrong;		/* drafts in a row of which nothing was accepted */
	int			n_rest;			/* chances to let go */
};

MillmDrafter *
millm_drafter_create(int max_tokens)
{
	MillmDrafter *d = calloc(1, sizeof(*d));
	size_t		n_places = 256;

	if (!d)
		return NULL;
	while (n_places < (size_t) max_tokens)
		n_places *= 2;
	d->max_tokens = max_tokens;
	d->mask = (uint32_t) (n_places - 1);
	d->tokens = malloc((size_t) max_tokens * sizeof(*d->tokens));
	d->places = calloc(n_places, sizeof(*d->places));
	if (d->tokens && d->places)
		return d;
	millm_drafter_free(d);
	return NULL;
}

void
millm_drafter_free(MillmDrafter *d)
{
	if (!d)
		return;
	free(d->tokens);
	free(d->places);
	free(d);
}

/* Of the NGRAM tokens before that place: where the latest occurrence of them is. */
static int32_t *
place_of(MillmDrafter *d, int place)
{
	uint32_t	hash = 0;

	for (int i = place - NGRAM; i < place; i++)
		hash = (hash ^ (uint32_t) d->tokens[i]) * 0x9E3779B1u;	/* Knuth's multiplicative hash */
	return &d->places[(hash ^ hash >> 15) & d->mask];
}

void
millm_drafter_note(MillmDrafter *d, int32_t token)
{
	if (d->n == d->max_tokens)
		return;
	if (d->n >= NGRAM)
		*place_of(d, d->n) = d->n;
	d->tokens[d->n++] = token;
}

int
millm_drafter_draft(MillmDrafter *d, int32_t *draft, int max)
{
	int			from;

	if (d->n < NGRAM || max < 1)
		return 0;
	from = *place_of(d, d->n);
	if (from == 0 || memcmp(d->tokens + from - NGRAM, d->tokens + d->n - NGRAM, NGRAM * sizeof(*d->tokens)) != 0)
		return 0;
	if (d->n_rest > 0)
	{
		d->n_rest--;
		return 0;
	}
	for (int i = 0; i < max; i++)	/* past the end it repeats itself */
		draft[i] = from + i < d->n ? d->tokens[from + i] : draft[from + i - d->n];
	return max;
}

void
millm_drafter_accepted(MillmDrafter *d, int n)
{
	d->n_wrong = n > 0 ? 0 : d->n_wrong + 1;
	if (d->n_wrong < 2)
		return;
	d->n_rest = d->n_wrong < 8 ? 1 << (d->n_wrong - 2) : MAX_REST;
	d->n_rest = d->n_rest < MAX_REST ? d->n_rest : MAX_REST;
}
