/*
 * scheduler.c -- which tokens share the next step.
 *
 * A step carries first one decode token for every running sequence, oldest first, then, with what is left
 * of the token budget, the next prefill chunks, oldest first.  Decode goes first because a reader who already sees
 * words notices a pause.  While anybody decodes, prefill tokens are limited to what is expected to take
 * STEP_MS; alone, a prefill may fill the batch.
 *
 * Owns:     the order of the slots and the size of the next chunk.
 * Borrows:  the slots (embedded in their owner), KV pages through MillmSchedPages.
 * Does not: know text, token ids, clients or time; cancels come as millm_sched_remove().
 *
 *     waiting --admit: pages for its tokens--> running --finished, cancelled--> removed
 *        ^________preempt: pages released, n_past 0____|
 *
 * First come, first served, without overtaking: the head of the line waits for pages and nobody passes it.  When a
 * running sequence finds no page for its next position, the youngest running one is preempted and goes back to its
 * place in the line; its tokens are computed again later.  The oldest thus always gets on, and the pool holds it alone.
 *
 * Invariants: slots[0 .. n_running) run and slots[n_running .. n) wait, each part ordered by arrival;
 * a waiting slot holds no page; a plan has at most max_batch_tokens tokens.
 */
#include "scheduler.h"

#include <stdlib.h>
#include <string.h>

#define STEP_MS		50.0	/* of a step that makes decoding readers wait */
#define MIN_CHUNK	16		/* prefill tokens that a step takes however slow they are */

struct MillmScheduler
{
	MillmSchedPages pages;
	int			max_running;
	int			max_slots;
	int			max_batch_tokens;
	uint64_t	n_arrived;
	double		token_ms;		/* of a prefill token, a moving average; 0: not measured yet */
	int			n_running;
	int			n;
	MillmSlot  *slots[];		/* [max_slots] */
};

MillmScheduler *
millm_sched_create(const MillmSchedPages *pages, int max_running, int max_waiting, int max_batch_tokens)
{
	size_t		max_slots = (size_t) max_running + (size_t) max_waiting;
	MillmScheduler *s = calloc(1, sizeof(*s) + max_slots * sizeof(s->slots[0]));

	if (!s)
		return NULL;
	s->pages = *pages;
	s->max_running = max_running;
	s->max_slots = (int) max_slots;
	s->max_batch_tokens = max_batch_tokens;
	return s;
}

void
millm_sched_free(MillmScheduler *s)
{
	free(s);
}

int
millm_sched_n_running(const MillmScheduler *s)
{
	return s->n_running;
}

int
millm_sched_n_waiting(const MillmScheduler *s)
{
	return s->n - s->n_running;
}

/* Insert by arrival into slots[from .. to), which has room. */
static void
insert(MillmScheduler *s, MillmSlot *slot, int from, int to)
{
	int			at = to;

	while (at > from && s->slots[at - 1]->arrival > slot->arrival)
		at--;
	memmove(&s->slots[at + 1], &s->slots[at], (size_t) (s->n - at) * sizeof(s->slots[0]));
	s->slots[at] = slot;
	s->n++;
}

static void
take_out(MillmScheduler *s, int at)
{
	memmove(&s->slots[at], &s->slots[at + 1], (size_t) (s->n - at - 1) * sizeof(s->slots[0]));
	s->n--;
	if (at < s->n_running)
		s->n_running--;
}

bool
millm_sched_add(MillmScheduler *s, MillmSlot *slot)
{
	if (s->n == s->max_slots)
		return false;
	slot->arrival = s->n_arrived++;
	slot->is_running = false;
	slot->n_past = 0;
	s->slots[s->n++] = slot;
	return true;
}

void
millm_sched_remove(MillmScheduler *s, MillmSlot *slot)
{
	for (int i = 0; i < s->n; i++)
		if (s->slots[i] == slot)
		{
			take_out(s, i);
			s->pages.release(s->pages.arg, slot);
			slot->is_running = false;
			return;
		}
}

/* The youngest running slot loses its pages and its seat, not its place in the line. */
static void
preempt(MillmScheduler *s)
{
	MillmSlot  *slot = s->slots[s->n_running - 1];

	take_out(s, s->n_running - 1);
	s->pages.release(s->pages.arg, slot);
	slot->n_past = 0;
	slot->is_running = false;
	slot->n_preempted++;
	insert(s, slot, s->n_running, s->n);
}

static int
owed(const MillmSlot *slot)
{
	return slot->n_tokens - slot->n_past;
}

/*
 * Admit the first in line, if the pool has its pages and then still one for each that runs; NULL if not.
 * One whose reader is behind lets the others pass.
 */
static MillmSlot *
admit(MillmScheduler *s)
{
	int			at = s->n_running;
	MillmSlot  *slot;
	int64_t		need;

	while (at < s->n && s->slots[at]->is_paused)
		at++;
	if (at == s->n || s->n_running == s->max_running)
		return NULL;
	slot = s->slots[at];
	need = s->pages.needs(s->pages.arg, slot) + s->n_running * s->pages.growth;
	if (s->n_running > 0 && s->pages.n_free(s->pages.arg) < need)
		return NULL;
	if (!s->pages.reserve(s->pages.arg, slot, slot->n_tokens))
		return NULL;
	take_out(s, at);
	slot->is_running = true;
	insert(s, slot, 0, s->n_running);
	s->n_running++;
	return slot;
}

/* Room for what the i-th running slot does next, if need be at the cost of younger ones; false, and it waits again, when there are none. */
static bool
make_room(MillmScheduler *s, int i)
{
	MillmSlot  *slot = s->slots[i];

	while (!s->pages.reserve(s->pages.arg, slot, slot->n_tokens))
	{
		if (i == s->n_running - 1)
		{
			if (i > 0)
				preempt(s);		/* it is the youngest itself */
			return false;
		}
		preempt(s);
	}
	return true;
}

/* The slot's next chunk; returns its tokens. */
static int
plan_prefill(MillmSlot *slot, int budget, MillmPlanItem *item)
{
	int			n = owed(slot) < budget ? owed(slot) : budget;

	*item = (MillmPlanItem) {slot, n};
	return n;
}

int
millm_sched_plan(MillmScheduler *s, MillmPlanItem *items)
{
	int			n_items = 0;
	int			n_decode;
	int			budget;
	MillmSlot  *admitted;

	for (int i = 0; i < s->n_running; i++)
	{
		MillmSlot  *slot = s->slots[i];

		if (!slot->is_paused && make_room(s, i) && owed(slot) == 1)
			items[n_items++] = (MillmPlanItem) {slot, 1};
	}
	n_decode = n_items;

	budget = s->max_batch_tokens - n_decode;
	if (n_decode > 0 && s->token_ms > 0)
	{
		int			chunk = STEP_MS / s->token_ms < budget ? (int) (STEP_MS / s->token_ms) : budget;

		if (chunk < MIN_CHUNK)
			chunk = MIN_CHUNK;
		if (chunk < budget)
			budget = chunk;
	}
	for (int i = 0; i < s->n_running && budget > 0; i++)
		if (!s->slots[i]->is_paused && owed(s->slots[i]) > 1)
			budget -= plan_prefill(s->slots[i], budget, &items[n_items++]);
	while (budget > 0 && (admitted = admit(s)) != NULL)
		budget -= plan_prefill(admitted, budget, &items[n_items++]);
	return n_items;
}

void
millm_sched_done(MillmScheduler *s, const MillmPlanItem *items, int n, double ms)
{
	int			n_tokens = 0;

	for (int i = 0; i < n; i++)
	{
		items[i].slot->n_past += items[i].n_tokens;
		n_tokens += items[i].n_tokens;
	}
	/* A few tokens measure the reading of the weights, not what another prefill token costs. */
	if (n_tokens >= MIN_CHUNK)
	{
		double		measured = ms / n_tokens;

		s->token_ms = s->token_ms > 0 ? 0.7 * s->token_ms + 0.3 * measured : measured;
	}
}
