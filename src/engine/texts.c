/*
 * texts.c -- groups of texts in the KV cache.
 *
 * A group is texts whose own KV pages together hold no more than a step computes, or one text that is longer.
 */
#include "texts.h"

#include <stdio.h>
#include <stdlib.h>

#include "generation.h"

static size_t
begin_of(const MillmTextRun *run, size_t text)
{
	return text == 0 ? 0 : run->ends[text - 1];
}

int
text_length(const MillmTextRun *run, size_t text)
{
	return (int) (run->ends[text] - begin_of(run, text));
}

int32_t
text_token(const MillmTextRun *run, size_t text, int index)
{
	return run->tokens[begin_of(run, text) + (size_t) index];
}

int
text_n_computed(const MillmTextRun *run, size_t text)
{
	return text_length(run, text) - run->n_unread;
}

static int
trunk_length(const MillmTextRun *run)
{
	return run->trunk ? millm_sequence_length(run->trunk) : 0;
}

void
text_run_reset(MillmTextRun *run)
{
	free(run->tokens);
	free(run->ends);
	*run = (MillmTextRun) {0};
}

int
text_run_form(MillmTextRun *run, int n_positions)
{
	const int	begun = trunk_length(run) % MILLM_KV_PAGE_TOKENS;	/* positions in the trunk's last page, of which each text has a copy */
	int			n_tokens = 0;

	while (run->n_done < run->n_texts && text_n_computed(run, run->n_done) == 0)
		run->n_done++;
	run->first = run->n_done;
	run->n_group = 0;
	while (run->n_group < MILLM_MAX_GROUP && run->first + (size_t) run->n_group < run->n_texts)
	{
		int			n = text_n_computed(run, run->first + (size_t) run->n_group);
		int			held = n == 0 ? 0 : (begun + n + MILLM_KV_PAGE_TOKENS - 1) / MILLM_KV_PAGE_TOKENS * MILLM_KV_PAGE_TOKENS;

		if (held > n_positions && run->n_group > 0)
			break;
		n_positions -= held;
		n_tokens += n;
		run->n_group++;
	}
	return n_tokens;
}

bool
text_run_reserve(MillmTextRun *run, MillmForward *fw, bool has_begun)
{
	const int	before = trunk_length(run);

	for (int i = 0; i < run->n_group; i++)
	{
		const int	n = text_n_computed(run, run->first + (size_t) i);
		MillmSequence **seq = &run->seqs[i];

		if (n == 0)
			continue;
		if (!*seq)
			*seq = run->trunk ? millm_sequence_fork(run->trunk) : millm_sequence_create(fw, n);
		if (*seq && millm_sequence_reserve(*seq, before + n))
			continue;
		if (!has_begun)
			text_run_release(run);
		return false;
	}
	return true;
}

void
text_run_release(MillmTextRun *run)
{
	for (int i = 0; i < run->n_group; i++)
	{
		millm_sequence_free(run->seqs[i]);
		run->seqs[i] = NULL;
	}
}

/* On to the text that has that token, if it is one of a later text. */
static MillmTextToken
settle(const MillmTextRun *run, MillmTextToken token)
{
	while (token.text < run->n_texts && token.index >= text_n_computed(run, token.text))
		token.index -= text_n_computed(run, token.text++);
	return token;
}

MillmTextToken
text_run_seek(const MillmTextRun *run, int offset)
{
	return settle(run, (MillmTextToken) {run->first, offset});
}

MillmTextToken
text_run_next(const MillmTextRun *run, MillmTextToken token)
{
	token.index++;
	return settle(run, token);
}

MillmBatchToken
text_run_batch_token(const MillmTextRun *run, MillmTextToken token)
{
	return (MillmBatchToken) {.seq = run->seqs[token.text - run->first], .position = trunk_length(run) + token.index,
		.token = text_token(run, token.text, token.index)};
}

void
text_name(char name[48], const MillmTexts *texts, size_t i)
{
	if (texts->first > 0)
		snprintf(name, 48, "Text %lld of the array", (long long) texts->first + (long long) i);
	else
		snprintf(name, 48, "The text");
}

MillmCode
text_check(const MillmRequest *r, const MillmTexts *texts, size_t i, const MillmIds *ids, size_t first, const char *what, const char *verb,
		   MillmError *err)
{
	const size_t n = ids->n - first;
	const int	context = r->loaded->context_length;
	char		name[48];

	text_name(name, texts, i);
	if (n == 0)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "an empty text has no %s", what);
		millm_detail(err, "%s has no tokens.", name);
		return MILLM_E_INVALID_ARGUMENT;
	}
	if (n > (size_t) context)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "text does not fit the context");
		millm_detail(err, "%s has %zu tokens; the context holds %d.", name, n, context);
		millm_hint(err, "%s it in parts, or load the model with a larger context length.", verb);
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	return tokens_check(r, "text", ids->ids + first, n, err);
}
