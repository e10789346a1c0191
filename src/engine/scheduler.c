/*
 * scheduler.c -- which tokens share the next step.
 *
 * A step carries first one decode token for every running sequence, then, with what is left of the token budget, the next
 * prefill chunks, both in the order of the line.  Decode goes first because a reader who already sees words notices a pause.  A prompt of many
 * chunks shares them with those after it, which else would wait for the whole of it.
 * Prefill beside decode tokens may take as long as these take by themselves, so that a stream's reader waits for no token more than about twice as
 * long; where many prompts wait, as many times that, up to MANY_SHARE of it, or sessions that all ask for short answers would wait for each other's prompts
 * with a batch half empty.  Beside answers that are read as a whole it may always make steps of STEP_MS, which cost less a token; alone, it may take
 * LONE_MS, so that who comes meanwhile does not wait long, but admits FIRST_STREAMS streams at most.  Two things are measured: what steps take that carry
 * decode tokens only, by their number, for which prefill pauses in one step of DECODE_EVERY; and what a token of prefill adds, which grows with its position.
 * A step that carries both says only whether the machine is slower or faster than it was, which changes both.
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
 * again later.  The first thus always gets on, and the pool holds it alone.  Who wants rows of logits, though, waits for these without holding up those behind him
 * who want none, and is let in once those before him that do have had theirs.
 *
 * Invariants: slots[0 .. n_running) run and slots[n_running .. n) wait, each part in the order of the line;
 * a waiting slot holds no page; a plan has at most max_batch_tokens tokens, and of slots that want rows at most MILLM_SCHED_ROWS and one each.
 */
#include "scheduler.h"

#include <stdlib.h>
#include <string.h>

#define MIN_PREFILL_MS	3.0		/* in a step, however fast its decode tokens are: nobody sees so short a pause */
#define STEP_MS			50.0	/* in a step without a stream */
#define LONE_MS			250.0	/* in a step without decode tokens, which has room for WHOLE_CHUNK tokens however long they take */
#define DECODE_EVERY	32		/* steps beside which prefill runs before what they take without it is measured again */
#define FIRST_MIXED		16		/* the same, where it never was and nobody reads a stream */
#define PREFILL_SHARE	0.8		/* of what decode tokens take: less, since they take longer when prefill has had the caches */
#define MANY_SHARE		2.5		/* of that at most, where many prompts wait: what begins together ends and comes again together */
#define FIRST_CHUNK		32		/* tokens, before anything is measured */
#define FIRST_STREAMS	4		/* admitted to a step without decode tokens: the others come a few at a time, and so do their next requests */
/*
 * Tokens of a chunk.  Smaller ones pay once more for what a chunk has to read, the weights and the KV cache of all that is before it: a stream gets
 * a longer step now and then instead, of STEP_MS more at most, and in the mean waits no longer.
 */
#define MIN_CHUNK		8
#define WHOLE_CHUNK		256		/* in a step of their own before one is measured, and however long they take; who has more than these to do shares the room */
/* A measure counts for at most so much more or less than the one before: a step may have taken long for a reason that is not ours. */
#define MAX_CHANGE		1.25
#define BOTH_CHANGE		0.3		/* of that, where decode tokens and prefill were measured together */

/* Steps of decode tokens only, of which there were [2^i, 2^(i+1)). */
#define DECODE_CLASSES	16

typedef struct DecodeCost
{
	double		ms;				/* a token, of the latest such step; 0: none yet */
	int			n_mixed;		/* steps with as many decode tokens and prefill since then */
} DecodeCost;

struct MillmScheduler
{
	MillmSchedPages pages;
	int			max_running;
	int			max_slots;
	int			max_batch_tokens;
	uint64_t	n_arrived;
	DecodeCost	decode[DECODE_CLASSES];
	double		prefill_ms;		/* that a token of prefill adds to a step; 0: not measured yet */
	int			n_measured;		/* tokens of the largest step that had no others */
	int			chunk;			/* tokens of prefill that the planned step has room for */
	int			rows;			/* tokens of slots that want rows that the planned step still has room for */
	double		saved_ms;		/* that prefill might have taken in the steps before this one, and did not */
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

/* Of so many tokens of the slot, how many the planned step may have. */
static int
most_of(const MillmScheduler *s, const MillmSlot *slot, int n)
{
	return slot->wants_rows && s->rows < n ? s->rows : n;
}

/*
 * Admit the first in line, if the pool has its pages and then still one for each that runs; NULL if not.
 * One that has nothing to do in this step, because its reader is behind or it wants rows and there are none left, lets the others pass.
 */
static MillmSlot *
admit(MillmScheduler *s)
{
	int			at = s->n_running;
	MillmSlot  *slot;
	int64_t		need;

	while (at < s->n && (s->slots[at]->is_paused || most_of(s, s->slots[at], 1) == 0))
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

static DecodeCost *
decode_cost(MillmScheduler *s, int n_decode)
{
	int			i = 31 - __builtin_clz((unsigned) n_decode);

	return &s->decode[i < DECODE_CLASSES ? i : DECODE_CLASSES - 1];
}

/* Those whose prompt is not in the KV cache yet and who need not wait for their reader. */
static int
n_unread(const MillmScheduler *s)
{
	int			n = 0;

	for (int i = 0; i < s->n; i++)
		n += !s->slots[i]->is_paused && (i >= s->n_running || owed(s->slots[i]) > 1);
	return n;
}

/* What prefill may add to a step whose decode tokens take decode_ms, in milliseconds. */
static double
time_beside(const MillmScheduler *s, double decode_ms, bool has_stream)
{
	const double even = PREFILL_SHARE * decode_ms;
	const double least = has_stream ? MIN_PREFILL_MS : STEP_MS;
	const double most = MANY_SHARE * decode_ms > STEP_MS ? MANY_SHARE * decode_ms : STEP_MS;
	const double all = even * n_unread(s);

	return all > most ? most : all > least ? all : least;
}

/* How many tokens of prefill, at most so many, go beside n_decode > 0 decode tokens, some of them of a stream or none. */
static int
tokens_beside(MillmScheduler *s, int n_decode, bool has_stream, int most)
{
	DecodeCost *decode = decode_cost(s, n_decode);
	const double least_ms = MIN_CHUNK * s->prefill_ms;
	double		ms;

	if (decode->n_mixed >= (decode->ms > 0 ? DECODE_EVERY : has_stream ? 0 : FIRST_MIXED))
		return 0;				/* what these take is measured */
	if (s->prefill_ms == 0)
		return FIRST_CHUNK < most ? FIRST_CHUNK : most;
	ms = time_beside(s, decode->ms * n_decode, has_stream);
	s->saved_ms += ms;
	if (ms < least_ms)
		ms = has_stream && least_ms > STEP_MS ? STEP_MS : least_ms;
	if (ms < s->prefill_ms)
		ms = s->prefill_ms;
	if (has_stream && s->saved_ms < ms)
		return 0;				/* the next step has more time for it */
	s->saved_ms = has_stream ? s->saved_ms - ms : 0;
	return ms / s->prefill_ms < most ? (int) (ms / s->prefill_ms) : most;
}

/* How many tokens of prefill, at most so many, go into a step of their own. */
static int
tokens_alone(const MillmScheduler *s, int most)
{
	const int	least = WHOLE_CHUNK < most ? WHOLE_CHUNK : most;
	const double n = s->prefill_ms > 0 ? LONE_MS / s->prefill_ms : least;

	return n < least ? least : n < most ? (int) n : most;
}

/* The slot gets n more tokens of the step, or what it owes or the step has left of its kind; returns how many. */
static int
give(MillmScheduler *s, MillmPlanItem *item, int n)
{
	const int	rest = owed(item->slot) - item->n_tokens;

	n = most_of(s, item->slot, n < rest ? n : rest);
	if (item->slot->wants_rows)
		s->rows -= n;
	item->n_tokens += n;
	return n;
}

/*
 * The slot's next chunk in a step with room for so many more tokens, and, if it is not the step's first, for some extra ones to bring its prompt to an
 * end; returns its tokens, which may be none.  A prompt of which much is left leaves half of the room to those after it.
 */
static int
plan_prefill(MillmScheduler *s, MillmSlot *slot, int room, int extra, MillmPlanItem *item)
{
	const int	many = WHOLE_CHUNK < s->max_batch_tokens ? WHOLE_CHUNK : s->max_batch_tokens;
	const int	most = most_of(s, slot, room);
	const int	limit = most_of(s, slot, room < s->chunk ? room + extra : room);

	*item = (MillmPlanItem) {.slot = slot};
	return give(s, item, owed(slot) <= limit ? owed(slot) : owed(slot) > many ? (most + 1) / 2 : most);
}

int
millm_sched_plan(MillmScheduler *s, MillmPlanItem *items)
{
	int			n_items = 0;
	int			n_decode;
	int			budget;
	int			extra;			/* tokens to end another prompt with, rather than let it wait for the next step */
	int			n_streams = 0;	/* admitted */
	bool		has_stream = false;
	MillmSlot  *admitted;

	for (int i = 0; i < s->n_running; i++)
	{
		MillmSlot  *slot = s->slots[i];

		if (slot->is_paused || !make_room(s, i) || owed(slot) > 1)
			continue;
		items[n_items++] = (MillmPlanItem) {.slot = slot, .n_tokens = 1};
		has_stream |= slot->is_stream;
	}
	n_decode = n_items;
	budget = s->max_batch_tokens - n_decode;
	s->rows = MILLM_SCHED_ROWS;
	s->chunk = n_decode > 0 ? tokens_beside(s, n_decode, has_stream, budget) : tokens_alone(s, budget);
	extra = s->chunk / 3 < budget - s->chunk ? s->chunk / 3 : budget - s->chunk;
	budget = s->chunk;
	for (int i = 0; i < s->n_running && budget > 0; i++)
		if (!s->slots[i]->is_paused && owed(s->slots[i]) > 1)
		{
			budget -= plan_prefill(s, s->slots[i], budget, extra, &items[n_items]);
			n_items += items[n_items].n_tokens > 0;
		}
	while (budget > 0 && (n_decode > 0 || n_streams < FIRST_STREAMS) && (admitted = admit(s)) != NULL)
	{
		budget -= plan_prefill(s, admitted, budget, extra, &items[n_items]);
		n_items += items[n_items].n_tokens > 0;
		n_streams += admitted->is_stream;
	}
	/* what nobody took of the halves */
	for (int i = n_decode; i < n_items && budget > 0; i++)
		budget -= give(s, &items[i], budget);
	return n_items;
}

/* A measure after the one before, which is 0 for none; never less. */
static double
follow(double before, double now)
{
	if (before == 0)
		return now > 0 ? now : 0;
	return now > before * MAX_CHANGE ? before * MAX_CHANGE : now < before / MAX_CHANGE ? before / MAX_CHANGE : now;
}

/* A few tokens at the end of a prompt cost more each, and say nothing of a chunk. */
static bool
is_whole_chunk(const MillmScheduler *s, int n_prefill)
{
	return 2 * n_prefill >= s->chunk;
}

/* A step of so many tokens of prefill, and nothing else, has taken so long. */
static void
measure_prefill(MillmScheduler *s, int n, double ms)
{
	const double token_ms = ms / n;

	if (token_ms < s->prefill_ms && n >= s->n_measured)
		s->prefill_ms = token_ms;	/* the ones before were too few for the machine, or its first */
	else if (s->prefill_ms == 0 || token_ms < s->prefill_ms || is_whole_chunk(s, n))
		s->prefill_ms = follow(s->prefill_ms, token_ms);
	if (n > s->n_measured)
		s->n_measured = n;
}

void
millm_sched_done(MillmScheduler *s, const MillmPlanItem *items, int n, double ms)
{
	int			n_decode = 0;
	int			n_prefill = 0;
	int			n_drafted = 0;

	for (int i = 0; i < n; i++)
	{
		items[i].slot->n_past += items[i].n_tokens;
		n_drafted += items[i].n_drafted;
		if (items[i].n_tokens > 1 || owed(items[i].slot) > 0)
			n_prefill += items[i].n_tokens;
		else
			n_decode++;
	}
	if (n_drafted > 0)
		return;					/* what a token takes without drafts remains as it was */
	if (n_decode > 0 && n_prefill > 0)
	{
		DecodeCost *decode = decode_cost(s, n_decode);
		const double decode_ms = decode->ms * n_decode;

		decode->n_mixed++;
		if (decode_ms == 0)
			return;
		if (s->prefill_ms == 0)
			s->prefill_ms = follow(0, (ms - decode_ms) / n_prefill);
		else if (is_whole_chunk(s, n_prefill))
		{
			/* which of the two took longer nobody knows: where the machine is slower for a while, both did, and the chunk remains as it is */
			const double change = 1 + BOTH_CHANGE * (follow(1, ms / (decode_ms + s->prefill_ms * n_prefill)) - 1);

			decode->ms *= change;
			s->prefill_ms *= change;
		}
	}
	else if (n_decode > 0)
	{
		DecodeCost *decode = decode_cost(s, n_decode);

		decode->ms = follow(decode->ms, ms / n_decode);
		decode->n_mixed = 0;
	}
	else if (n_prefill > 0)
		measure_prefill(s, n_prefill, ms);
}
