/*
 * scheduler.c -- which tokens share the next step.
 *
 * A step carries first one decode token for every running sequence, then, with what is left of the token budget, the next
 * prefill chunks, both in the order of the line.  Decode goes first because a reader who already sees words notices a pause.
 * While a stream decodes, prefill may take as long as the decode tokens take by themselves, so that its reader waits for no token more than about
 * twice as long; beside answers that are read as a whole it may make steps of STEP_MS, which cost less a token; alone, it may fill the
 * batch.  The chunk follows what the last one took, for that grows with the position, and not evenly with the number of tokens; in small changes, for a
 * step may have taken long for a reason that is not ours.  What the decode tokens take is measured by a step in DECODE_EVERY that carries nothing else.
 *
 * Owns:     the order of the slots and the size of the next chunk.
 * Borrows:  the slots (embedded in their owner), KV pages through MillmSchedPages.
 * Does not: know text, token ids, clients or time; cancels come as millm_sched_remove().
 *
 *     waiting --admit: pages for its tokens--> running --finished, cancelled--> removed
 *        ^________preempt: pages released, n_past 0____|
 *
 * Roles take turns, so that nobody's thousand prompts stand before another's first.  A slot gets its turn when it comes: the one after the
 * last of its role, but none that is over, which is every one before the latest that somebody was admitted at.  The line is ordered by
 * turn, slots of the same turn by arrival, and a slot's place never changes.  Nobody has a turn twice: who has had the present one is remembered, or
 * who comes again whenever his last one has ended would have it for ever.  So a slot whose role has k others waiting is
 * admitted after at most k + 2 of any other role's.
 *
 * Without overtaking: the head of the line waits for pages and nobody passes it.  When a running sequence finds no page for its next
 * position, the running one that is last in the line is preempted and goes back to its place; its tokens are computed
 * again later.  The first thus always gets on, and the pool holds it alone.
 *
 * Invariants: slots[0 .. n_running) run and slots[n_running .. n) wait, each part in the order of the line;
 * a waiting slot holds no page; a plan has at most max_batch_tokens tokens.
 */
#include "scheduler.h"

#include <stdlib.h>
#include <string.h>

#define MIN_PREFILL_MS	4.0		/* in a step, however fast its decode tokens are: nobody sees so short a pause */
#define STEP_MS			50.0	/* for prefill in a step without a stream */
#define DECODE_EVERY	16		/* steps beside which prefill runs before what they take without it is measured again */
#define PREFILL_SHARE	0.9		/* of what decode tokens take: somewhat less, since it is not met exactly */
#define FIRST_CHUNK		32		/* tokens, before anything is measured */
#define MIN_GROWTH		1.05	/* of a chunk that was not too much, a factor */
#define MAX_GROWTH		1.25	/* also of decode_ms */
#define MAX_SHRINKING	0.5
#define MIN_CHUNK		16		/* in a step without a stream, whatever it takes: a smaller one pays the step's own cost for less, and would shrink to nothing over it */

struct MillmScheduler
{
	MillmSchedPages pages;
	int			max_running;
	int			max_slots;
	int			max_batch_tokens;
	uint64_t	n_arrived;
	double		decode_ms;		/* of a step of decode tokens only; 0: not measured yet */
	double		chunk;			/* prefill tokens that may go beside decode tokens */
	double		prefill_ms;		/* that those of the planned step may add to it; 0: there are no decode tokens */
	int			n_mixed;		/* steps with both kinds since decode_ms was measured */
	uint64_t	turn;			/* the latest that a slot was admitted at */
	uint32_t   *served;			/* [n_served] of max_slots: roles of which one was */
	int			n_served;
	int			n_running;
	int			n;
	MillmSlot  *slots[];		/* [max_slots] */
};

MillmScheduler *
millm_sched_create(const MillmSchedPages *pages, int max_running, int max_waiting, int max_batch_tokens)
{
	size_t		max_slots = (size_t) max_running + (size_t) max_waiting;
	MillmScheduler *s = calloc(1, sizeof(*s) + max_slots * sizeof(s->slots[0]));

	if (!s || !(s->served = calloc(max_slots, sizeof(s->served[0]))))
	{
		free(s);
		return NULL;
	}
	s->pages = *pages;
	s->max_running = max_running;
	s->max_slots = (int) max_slots;
	s->max_batch_tokens = max_batch_tokens;
	s->chunk = FIRST_CHUNK;
	return s;
}

void
millm_sched_free(MillmScheduler *s)
{
	if (s)
		free(s->served);
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

/* ---- the line ------------------------------------------------------------------------------ */

static bool
precedes(const MillmSlot *a, const MillmSlot *b)
{
	return a->turn != b->turn ? a->turn < b->turn : a->arrival < b->arrival;
}

/* Insert in its place into slots[from .. to), which has room. */
static void
insert(MillmScheduler *s, MillmSlot *slot, int from, int to)
{
	int			at = to;

	while (at > from && precedes(slot, s->slots[at - 1]))
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

static bool
was_served(const MillmScheduler *s, uint32_t role)
{
	for (int i = 0; i < s->n_served; i++)
		if (s->served[i] == role)
			return true;
	return false;
}

/* The next turn of a role. */
static uint64_t
next_turn(const MillmScheduler *s, uint32_t role)
{
	uint64_t	turn = s->turn + was_served(s, role);

	for (int i = s->n_running; i < s->n; i++)
		if (s->slots[i]->role == role && s->slots[i]->turn >= turn)
			turn = s->slots[i]->turn + 1;
	return turn;
}

/* A slot of that role is admitted at that turn. */
static void
note_turn(MillmScheduler *s, uint64_t turn, uint32_t role)
{
	if (turn < s->turn)
		return;					/* it was paused, or preempted */
	if (turn > s->turn)
		s->n_served = 0;
	s->turn = turn;
	if (was_served(s, role))
		return;
	if (s->n_served == s->max_slots)	/* more roles than there are places: the turn is over */
	{
		s->n_served = 0;
		s->turn++;
	}
	else
		s->served[s->n_served++] = role;
}

bool
millm_sched_add(MillmScheduler *s, MillmSlot *slot)
{
	if (s->n == s->max_slots)
		return false;
	slot->arrival = s->n_arrived++;
	slot->turn = next_turn(s, slot->role);
	slot->is_running = false;
	slot->n_past = 0;
	insert(s, slot, s->n_running, s->n);
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

/* The last running slot loses its pages and its seat, not its place in the line. */
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
	note_turn(s, slot->turn, slot->role);
	return slot;
}

/* Room for what the i-th running slot does next, if need be at the cost of later ones; false, and it waits again, when there are none. */
static bool
make_room(MillmScheduler *s, int i)
{
	MillmSlot  *slot = s->slots[i];

	while (!s->pages.reserve(s->pages.arg, slot, slot->n_tokens))
	{
		if (i == s->n_running - 1)
		{
			if (i > 0)
				preempt(s);		/* it is the last itself */
			return false;
		}
		preempt(s);
	}
	return true;
}

/* ---- a step -------------------------------------------------------------------------------- */

/* What prefill may add to a step that has decode tokens, some of a stream or none; 0: nothing, for what these take is to be measured. */
static double
time_for_prefill(const MillmScheduler *s, bool has_stream)
{
	const double least = has_stream ? MIN_PREFILL_MS : STEP_MS;
	const double share = PREFILL_SHARE * s->decode_ms;

	if (has_stream && (s->decode_ms == 0 || s->n_mixed >= DECODE_EVERY))
		return 0;
	return share > least ? share : least;
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
	int			budget;
	bool		has_stream = false;
	MillmSlot  *admitted;

	for (int i = 0; i < s->n_running; i++)
	{
		MillmSlot  *slot = s->slots[i];

		if (slot->is_paused || !make_room(s, i) || owed(slot) > 1)
			continue;
		items[n_items++] = (MillmPlanItem) {slot, 1};
		has_stream |= slot->is_stream;
	}
	budget = s->max_batch_tokens - n_items;
	s->prefill_ms = 0;
	if (n_items > 0)
	{
		s->prefill_ms = time_for_prefill(s, has_stream);
		if (s->prefill_ms == 0)
			budget = 0;
		else
		{
			const int	chunk = has_stream || s->chunk > MIN_CHUNK ? (int) s->chunk : MIN_CHUNK;

			if (budget > chunk)
				budget = chunk;
		}
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
	int			n_prefill = 0;
	double		extra_ms;
	double		fits;

	for (int i = 0; i < n; i++)
	{
		items[i].slot->n_past += items[i].n_tokens;
		if (items[i].n_tokens > 1 || owed(items[i].slot) > 0)
			n_prefill += items[i].n_tokens;
	}
	if (n_prefill == 0)
	{
		s->decode_ms = s->decode_ms > 0 && ms > MAX_GROWTH * s->decode_ms ? MAX_GROWTH * s->decode_ms : ms;
		s->n_mixed = 0;
	}
	if (n_prefill == 0 || s->prefill_ms == 0)
		return;
	s->n_mixed++;
	extra_ms = ms - s->decode_ms;
	fits = extra_ms > 0 ? s->prefill_ms / extra_ms : MAX_GROWTH;
	if (fits >= 1 && n_prefill < (int) s->chunk)
		return;					/* the end of a prompt: it says nothing of larger chunks */
	s->chunk *= fits < MAX_SHRINKING ? MAX_SHRINKING : fits < 1 ? fits : fits < MIN_GROWTH ? MIN_GROWTH : fits > MAX_GROWTH ? MAX_GROWTH : fits;
	if (s->chunk < 1)
		s->chunk = 1;
	if (s->chunk > s->max_batch_tokens)
		s->chunk = s->max_batch_tokens;
}
