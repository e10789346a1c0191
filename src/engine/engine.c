/*
 * engine.c -- the model thread: load, step after step, unload.
 *
 * One thread owns the forward pass, the KV cache, the scheduler and every request that it has taken from the inbox.
 * All others reach it through the fields under the lock: the inbox, the load or unload that is asked for, the counters.
 *
 *     IDLE --load--> LOADING --done--> LOADED --unload--> UNLOADING --nobody left--> IDLE
 *                       \___failed___________________________________________________/
 *
 * A request is so many sequences as it has choices.  Each is counted in n_active from accept to its end; what is counted and not
 * running is waiting, be it in the hands of an encoding thread, in the inbox, or in the scheduler's line.  A choice's pages
 * are back, and the counters say so, before the sink hears of its end.  The failure of one choice is that of the request, as is a cancel.
 *
 * What a prompt begins with is taken from the prefix cache when a choice begins, and again before each of its steps: whoever began with the same a
 * step earlier has computed more of it by now.
 *
 * The choices of a request share its prompt.  The first one computes it but for the last token, while the others are paused; what it has
 * then (its prefix) each of them forks when it is admitted, and goes on from there: full pages stay shared, the one that is begun is copied.  The
 * prefix lives until all have begun, or until somebody needs its pages; who begins later computes the prompt itself.
 *
 * A choice that is alone in the engine takes a draft into its step (draft.h): rows of tokens that it may go on with.  Of these generation.c accepts what its sampler chooses.
 *
 * No wait is without end: a paused stream is looked at every PAUSE_POLL_MS, an unload ends at its deadline.
 */
#include "engine.h"

#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clock.h"
#include "embedding.h"
#include "generation.h"
#include "load.h"
#include "memory.h"
#include "scoring.h"

#define PAUSE_POLL_MS		20		/* only while some reader is behind */
#define DRAIN_REPORT_MS		250		/* of an unload that waits */
#define SERVICE_WEIGHT		0.1		/* of the latest sequence in the average */
#define MAX_WAIT_S			86400	/* nobody expects to wait for longer */

struct MillmEngine
{
	pthread_t	thread;
	pthread_mutex_t lock;
	pthread_cond_t wake;

	/* under the lock */
	MillmEngineState state;
	bool		is_woken;			/* something below has changed since the model thread looked */
	MillmRequest *inbox;			/* first in, first out */
	MillmRequest **inbox_end;
	const MillmLoaded *loaded;
	MillmLoadOptions load;			/* of the load under way, its strings owned */
	MillmLoadSink sink;				/* of the load or unload under way */
	int64_t		drain_until_ms;
	int			n_active;
	int			n_running;
	int64_t		pages_free;
	int64_t		pages_cached;
	int64_t		drafted_tokens;
	int64_t		accepted_tokens;
	double		service_ms;			/* of a sequence from its first step to its end, a moving average; 0: not measured yet */

	atomic_bool is_ending;			/* the process shuts down */
	atomic_bool stops_load;
	atomic_bool cancels_all;		/* nobody may go on: shutdown, or an unload whose time is over */

	/* the model thread's */
	MillmForward *fw;
	MillmScheduler *sched;
	MillmRequest **live;			/* [n_live] of max_sequences + max_queue: taken from the inbox and not ended */
	int			n_live;
	MillmPlanItem *plan;			/* [max_sequences] */
	MillmBatchToken *batch;			/* [max_batch_tokens] */
	int			load_percent;		/* told last */
};

static double
now_ms(void)
{
	return (double) millm_now_us() / 1e3;
}

/* Under the lock. */
static void
wake_thread(MillmEngine *e)
{
	e->is_woken = true;
	pthread_cond_signal(&e->wake);
}

/* ---- the end of a request ------------------------------------------------------------------ */

/* Give n places back. */
static void
leave(MillmEngine *e, int n)
{
	pthread_mutex_lock(&e->lock);
	e->n_active -= n;
	if (e->state == MILLM_UNLOADING)
		wake_thread(e);
	pthread_mutex_unlock(&e->lock);
}

/* The end of a request with an error; any thread.  The engine's reference goes. */
static void
fail_request(MillmEngine *e, MillmRequest *r, const MillmError *err)
{
	leave(e, r->n_left);
	r->sink.failed(r->sink.arg, err);
	millm_request_unref(r);
}

static void
publish(MillmEngine *e)
{
	pthread_mutex_lock(&e->lock);
	e->n_running = e->sched ? millm_sched_n_running(e->sched) : 0;
	e->pages_free = e->fw ? millm_kv_pages_free(e->fw) : -1;
	e->pages_cached = e->fw ? millm_kv_pages_cached(e->fw) : -1;
	pthread_mutex_unlock(&e->lock);
}

static void
drop_prefix(MillmRequest *r)
{
	millm_sequence_free(r->prefix);
	r->prefix = NULL;
}

/* A request of the model thread's fails: pages first. */
static void
retire(MillmEngine *e, int at, const MillmError *err)
{
	MillmRequest *r = e->live[at];

	e->live[at] = e->live[--e->n_live];
	for (int i = 0; i < r->n_choices; i++)
		millm_sched_remove(e->sched, &r->choices[i].slot);
	drop_prefix(r);
	publish(e);
	fail_request(e, r, err);
}

MillmTiming
millm_request_timing(const MillmRequest *r)
{
	const double now = now_ms();
	const double begun = r->begun_ms > 0 ? r->begun_ms : now;

	return (MillmTiming) {.queue_ms = begun - r->accepted_ms, .compute_ms = now - begun};
}

/* What the expected wait is reckoned from. */
static void
note_service(MillmEngine *e, double ms)
{
	pthread_mutex_lock(&e->lock);
	e->service_ms = e->service_ms > 0 ? e->service_ms + SERVICE_WEIGHT * (ms - e->service_ms) : ms;
	pthread_mutex_unlock(&e->lock);
}

/* A choice has said all; with the last one its request is done. */
static void
finish_choice(MillmEngine *e, MillmChoice *c)
{
	MillmRequest *r = c->request;
	MillmPiece	piece = generation_last_piece(c);

	millm_sched_remove(e->sched, &c->slot);
	publish(e);
	note_service(e, now_ms() - r->begun_ms);
	leave(e, 1);
	if (r->sink.piece)
		r->sink.piece(r->sink.arg, &piece);
	if (--r->n_left == 0)
	{
		MillmPiece	pieces[MILLM_MAX_CHOICES];
		MillmResult result = {.choices = pieces, .n = r->n_choices, .scores = r->scoring ? scoring_scores(r->scoring) : NULL,
			.prompt_tokens = r->n_prompt, .cached_tokens = r->n_cached, .seed = r->sampling.seed, .timing = millm_request_timing(r)};
		int			at = 0;

		for (int i = 0; i < r->n_choices; i++)
		{
			pieces[i] = generation_last_piece(&r->choices[i]);
			result.completion_tokens += r->choices[i].n_completion;
		}
		while (e->live[at] != r)
			at++;
		e->live[at] = e->live[--e->n_live];
		r->sink.done(r->sink.arg, &result);
		millm_request_unref(r);
	}
}

static const char *
what_of(const MillmRequest *r)
{
	return r->embedding ? "embedding" : r->scoring ? "scoring" : "generation";
}

static void
canceled(MillmEngine *e, const MillmRequest *r, MillmError *err)
{
	if (atomic_load(&e->is_ending))
		millm_fail(err, MILLM_E_CANCELED, "%s canceled: the engine shuts down", what_of(r));
	else if (atomic_load(&e->cancels_all))
		millm_fail(err, MILLM_E_CANCELED, "%s canceled: the model is being unloaded", what_of(r));
	else
		millm_fail(err, MILLM_E_CANCELED, "%s canceled", what_of(r));
}

/* ---- pages, for the scheduler -------------------------------------------------------------- */

static MillmChoice *
choice_of(MillmSlot *slot)
{
	return (MillmChoice *) slot;	/* its first member */
}

static bool
has_begun(const MillmChoice *c)
{
	return c->seq || c->sampler;
}

/* Tokens of the prompt that need not be computed. */
static int
n_reusable(const MillmChoice *c)
{
	const int	n_prompt = c->request->n_prompt;
	const int	n = c->slot.n_tokens - MIN_COMPUTED;

	return n_prompt < n ? n_prompt : n;
}

/* Take what the prefix cache has of the prompt. */
static void
reuse(MillmChoice *c)
{
	MillmRequest *r = c->request;
	const int	n_past = c->slot.n_past;

	if (n_past >= n_reusable(c))
		return;
	c->slot.n_past = millm_sequence_share(c->seq, r->prompt, n_reusable(c));
	if (c->index == 0 && c->slot.n_preempted == 0)
		r->n_cached += c->slot.n_past - n_past;
}

/* The choice begins, or begins again: with the prefix of its request, if there is one. */
static bool
begin_sequence(MillmEngine *e, MillmChoice *c, int length)
{
	MillmRequest *r = c->request;
	bool		all_have_begun = true;

	c->seq = r->prefix ? millm_sequence_fork(r->prefix) : millm_sequence_create(e->fw, r->n_prompt + r->max_tokens);
	if (!c->seq)
		return false;
	c->slot.n_past = millm_sequence_length(c->seq);
	if (c->index == 0 && c->slot.n_preempted == 0)
		r->n_cached = 0;		/* the pool may have been too full before */
	if (!r->prefix)
		reuse(c);
	if (!millm_sequence_reserve(c->seq, length))
	{
		millm_sequence_free(c->seq);
		c->seq = NULL;
		c->slot.n_past = 0;
		return false;
	}
	for (int i = 0; i < r->n_choices; i++)
		all_have_begun &= has_begun(&r->choices[i]);
	if (all_have_begun)
		drop_prefix(r);
	return true;
}

/* Somebody needs pages: take a prefix's, if there is one. */
static bool
drop_any_prefix(MillmEngine *e)
{
	for (int i = 0; i < e->n_live; i++)
		if (e->live[i]->prefix)
		{
			drop_prefix(e->live[i]);
			return true;
		}
	return false;
}

static bool
pages_reserve(void *arg, MillmSlot *slot, int length)
{
	MillmEngine *e = arg;
	MillmChoice *c = choice_of(slot);
	bool		has_room;

	if (c->seq)
		reuse(c);
	do
		has_room = c->request->embedding ? embedding_reserve(c->request, e->fw) :
			c->request->scoring ? scoring_reserve(c->request, e->fw) :
			c->seq ? millm_sequence_reserve(c->seq, length) : begin_sequence(e, c, length);
	while (!has_room && drop_any_prefix(e));
	return has_room;
}

static void
pages_release(void *arg, MillmSlot *slot)
{
	MillmChoice *c = choice_of(slot);

	(void) arg;
	if (c->request->embedding)
		embedding_release(c->request);
	if (c->request->scoring)
		scoring_release(c->request);
	millm_sequence_free(c->seq);
	c->seq = NULL;
}

static int64_t
pages_n_free(void *arg)
{
	return millm_kv_pages_free(((MillmEngine *) arg)->fw);
}

static int64_t
pages_needs(void *arg, const MillmSlot *slot)
{
	const MillmForward *fw = ((MillmEngine *) arg)->fw;
	const MillmChoice *c = (const MillmChoice *) slot;
	const MillmRequest *r = c->request;
	int64_t		n = millm_kv_pages_needed(fw, slot->n_tokens);

	if (r->embedding || r->scoring)
		return n;
	/* the page in which the prefix ends is copied */
	return r->prefix ? n - millm_kv_pages_needed(fw, millm_sequence_length(r->prefix)) + millm_kv_pages_needed(fw, 1) :
		n - millm_kv_pages_held(fw, r->n_prompt + r->max_tokens, r->prompt, n_reusable(c), slot->n_tokens);
}

/* Choice 0 has computed the prompt but for its last token: now all of them begin. */
static void
share_prompt(MillmChoice *c)
{
	MillmRequest *r = c->request;

	r->shares_prompt = false;
	r->prefix = millm_sequence_fork(c->seq);	/* NULL: they compute it themselves */
	c->slot.n_tokens = r->n_prompt;
}

/* ---- a step -------------------------------------------------------------------------------- */

typedef struct Step
{
	MillmEngine *engine;
	const MillmPlanItem *plan;
	int			n;
} Step;

/* Asked between layers: does anybody still want this step? */
static bool
step_is_unwanted(void *arg)
{
	Step	   *step = arg;

	if (atomic_load(&step->engine->cancels_all))
		return true;
	for (int i = 0; i < step->n; i++)
		if (!atomic_load(&choice_of(step->plan[i].slot)->request->is_canceled))
			return false;
	return true;
}

static void
note_failure(MillmRequest *r, const MillmError *err)
{
	r->has_failed = true;
	r->failure = *err;
}

/* Retire the requests in which something has failed. */
static void
sweep(MillmEngine *e)
{
	for (int i = e->n_live - 1; i >= 0; i--)
		if (e->live[i]->has_failed)
		{
			MillmError	err = e->live[i]->failure;

			retire(e, i, &err);
		}
}

/* A ledger that contradicts itself gives one reader another's text: a debug build does not go on. */
static void
check_pages(const MillmEngine *e)
{
#ifdef MILLM_DEBUG
	MillmError	err;

	if (millm_forward_check(e->fw, &err) == MILLM_OK)
		return;
	fprintf(stderr, "ERROR %s\n", err.message);
	abort();
#else
	(void) e;
#endif
}

/*
 * Draft what comes after the next token of a sequence, if it is alone: beside others its rows would be theirs.  Nobody waits then, so that what the scheduler
 * does not learn of such steps it does not need.
 */
static void
draft(MillmEngine *e, MillmPlanItem *item)
{
	MillmChoice *c = choice_of(item->slot);

	item->n_drafted = c->n_drafted = 0;
	if (e->loaded->draft_tokens == 0 || c->request->embedding || c->request->scoring || item->slot->n_past + 1 < item->slot->n_tokens ||
		millm_sched_n_running(e->sched) + millm_sched_n_waiting(e->sched) > 1)
		return;
	generation_draft(c, e->loaded->draft_tokens);
	if (c->n_drafted > 0 && !millm_sequence_reserve(c->seq, c->slot.n_tokens + c->n_drafted))
		c->n_drafted = 0;
	item->n_drafted = c->n_drafted;
}

/* A choice has accepted so much of its draft. */
static void
end_draft(MillmEngine *e, MillmChoice *c, int n_accepted)
{
	pthread_mutex_lock(&e->lock);
	e->drafted_tokens += c->n_drafted;
	e->accepted_tokens += n_accepted;
	pthread_mutex_unlock(&e->lock);
	millm_sequence_accept(c->seq, c->draft, n_accepted);
	c->n_drafted = 0;
}

/* Run the planned step, choose a token for each sequence that has come to its end, retire what is finished. */
static void
run_step(MillmEngine *e, int n)
{
	Step		step = {e, e->plan, n};
	int			n_batch = 0;
	int			vocab = e->loaded->model->config.vocab_size;
	double		start = now_ms();
	const float *logits;		/* those that are next */
	const float *rows;			/* all of them */
	const float *hidden;
	MillmError	err;
	MillmCode	rc;

	for (int i = 0; i < n; i++)
	{
		MillmChoice *c = choice_of(e->plan[i].slot);
		int			last = c->slot.n_past + e->plan[i].n_tokens;
		MillmTop	top;

		draft(e, &e->plan[i]);

		if (c->request->begun_ms == 0)
			c->request->begun_ms = start;
		if (c->request->embedding)
		{
			embedding_fill(c->request, e->plan[i].n_tokens, e->batch + n_batch);
			n_batch += e->plan[i].n_tokens;
			continue;
		}
		if (c->request->scoring)
		{
			scoring_fill(c->request, e->plan[i].n_tokens, e->batch + n_batch);
			n_batch += e->plan[i].n_tokens;
			continue;
		}
		top = generation_needs(c);
		for (int pos = c->slot.n_past; pos < last; pos++)
			e->batch[n_batch++] = (MillmBatchToken) {.seq = c->seq, .position = pos, .token = generation_token(c, pos),
				.want_logits = pos == c->slot.n_tokens - 1 && !c->request->shares_prompt, .top = top};
		for (int k = 0; k < c->n_drafted; k++)
			e->batch[n_batch++] = (MillmBatchToken) {.seq = c->seq, .position = last + k, .token = c->draft[k], .want_logits = true, .top = top,
				.is_draft = true};
	}
	rc = millm_forward_step(e->fw, e->batch, n_batch, step_is_unwanted, &step, &logits, &err);
	if (rc == MILLM_E_CANCELED)
		return;					/* nothing has grown; the next round retires them */
	if (rc != MILLM_OK)
	{
		for (int i = 0; i < n; i++)
			note_failure(choice_of(e->plan[i].slot)->request, &err);
		sweep(e);
		return;
	}
	millm_sched_done(e->sched, e->plan, n, now_ms() - start);
	hidden = millm_forward_hidden(e->fw);
	rows = logits;

	for (int i = 0; i < n; i++)
	{
		MillmChoice *c = choice_of(e->plan[i].slot);

		if (c->request->embedding)
			rc = embedding_take(c->request, e->plan[i].n_tokens, &hidden, &err);
		else if (c->request->scoring)
			rc = scoring_take(c->request, e->fw, e->plan[i].n_tokens, &logits, &err);
		else if (c->slot.n_past < c->slot.n_tokens)
			continue;			/* more of its prompt is to come */
		else if (c->request->shares_prompt)
		{
			share_prompt(c);
			continue;
		}
		else
		{
			const int	n_past = c->slot.n_past;

			rc = generation_take(c, e->fw, logits, (int) ((logits - rows) / vocab), &err);
			logits += (size_t) vocab * (size_t) (1 + c->n_drafted);
			if (c->n_drafted > 0)
				end_draft(e, c, c->slot.n_past - n_past);
		}
		if (rc != MILLM_OK)
			note_failure(c->request, &err);
		else if (c->is_finished)
			finish_choice(e, c);
		else if ((c->request->embedding || c->request->scoring) && c->slot.n_past == c->slot.n_tokens)
		{
			/* a group of texts is done; the next one stands in line as if it came now */
			millm_sched_remove(e->sched, &c->slot);
			millm_sched_add(e->sched, &c->slot);
		}
	}
	for (int i = 0; i < e->n_live; i++)
		if (e->live[i]->sink.flush)
			e->live[i]->sink.flush(e->live[i]->sink.arg);
	sweep(e);
	check_pages(e);
}

/* Retire what is canceled or stalled; pause whose reader is behind, and who waits for his prompt.  Returns whether any is paused. */
static bool
look_at_readers(MillmEngine *e)
{
	bool		any_paused = false;

	for (int i = e->n_live - 1; i >= 0; i--)
	{
		MillmRequest *r = e->live[i];
		MillmError	err;
		int			stalled_ms = 0;
		bool		is_behind = false;

		if (atomic_load(&r->is_canceled) || atomic_load(&e->cancels_all))
		{
			canceled(e, r, &err);
			retire(e, i, &err);
			continue;
		}
		if ((r->sink.piece || r->sink.embedding) && r->sink.is_behind)
			is_behind = r->sink.is_behind(r->sink.arg, &stalled_ms);
		for (int k = 0; k < r->n_choices; k++)
			r->choices[k].slot.is_paused = is_behind || (r->shares_prompt && k > 0);
		if (stalled_ms > e->loaded->stream_stall_timeout_ms)
		{
			millm_fail(&err, MILLM_E_CANCELED, "%s canceled: its reader stopped reading", what_of(r));
			millm_detail(&err, "Nothing was read for %d ms; stream_stall_timeout is %d ms.", stalled_ms,
						 e->loaded->stream_stall_timeout_ms);
			retire(e, i, &err);
			continue;
		}
		any_paused |= is_behind;
	}
	return any_paused;
}

/* ---- load and unload, on the model thread -------------------------------------------------- */

static void
free_load_strings(MillmLoadOptions *o)
{
	free((char *) o->path);
	free((char *) o->model);
	free((char *) o->model_uuid);
	free((char *) o->kernels);
	*o = (MillmLoadOptions) {0};
}

static void
free_model(MillmEngine *e)
{
	millm_sched_free(e->sched);
	free(e->live);
	free(e->plan);
	free(e->batch);
	millm_forward_free(e->fw);
	e->sched = NULL;
	e->live = NULL;
	e->plan = NULL;
	e->batch = NULL;
	e->fw = NULL;
}

static MillmCode
set_up_steps(MillmEngine *e, const MillmLoaded *loaded, MillmError *err)
{
	MillmSchedPages pages = {pages_reserve, pages_release, pages_n_free, pages_needs, millm_kv_pages_needed(e->fw, 1), e};
	int			max_batch = millm_forward_max_batch_tokens(e->fw);

	e->sched = millm_sched_create(&pages, loaded->max_sequences, loaded->max_queue, max_batch);
	e->live = calloc((size_t) loaded->max_sequences + (size_t) loaded->max_queue, sizeof(*e->live));
	e->plan = calloc((size_t) loaded->max_sequences, sizeof(*e->plan));
	e->batch = calloc((size_t) max_batch, sizeof(*e->batch));
	if (e->sched && e->live && e->plan && e->batch)
		return MILLM_OK;
	return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

static bool
report_load(void *arg, const char *stage, int percent)
{
	MillmEngine *e = arg;

	if (e->sink.progress && percent != e->load_percent)
		e->sink.progress(e->sink.arg, stage, percent);
	e->load_percent = percent;
	return !atomic_load(&e->stops_load) && !atomic_load(&e->is_ending);
}

static void
run_load(MillmEngine *e)
{
	MillmLoadSink sink = e->sink;
	const MillmLoaded *loaded = NULL;
	MillmError	err;
	const LoadProgress progress = {report_load, e};
	MillmCode	rc;

	e->load_percent = -1;
	rc = load_model(&e->load, &progress, &loaded, &e->fw, &err);
	if (rc == MILLM_OK)
		rc = set_up_steps(e, loaded, &err);
	if (rc != MILLM_OK)
	{
		free_model(e);
		millm_loaded_release(loaded);
		loaded = NULL;
		(void) malloc_trim(0);
	}

	pthread_mutex_lock(&e->lock);
	free_load_strings(&e->load);
	e->loaded = loaded;
	e->service_ms = 0;
	e->drafted_tokens = 0;
	e->accepted_tokens = 0;
	e->state = loaded ? MILLM_LOADED : MILLM_IDLE;
	pthread_mutex_unlock(&e->lock);
	publish(e);
	if (rc == MILLM_OK)
		sink.loaded(sink.arg, loaded);
	else
		sink.failed(sink.arg, &err);
}

/*
 * What a model takes on that device is the difference of two of these; -1: not known.  What was freed goes back to the kernel, not to the
 * allocator's stock: another program may need it.
 */
static int64_t
taken_bytes(const MillmDevice *device)
{
	int64_t		free_bytes,
				total_bytes;

	malloc_trim(0);
	if (!device->memory)
		return millm_memory_private();
	return device->memory(device->ordinal, &free_bytes, &total_bytes, NULL) == MILLM_OK ? total_bytes - free_bytes : -1;
}

static void
finish_unload(MillmEngine *e)
{
	MillmLoadSink sink = e->sink;
	const MillmLoaded *loaded;
	const MillmDevice device = e->loaded->device;
	const int64_t before = taken_bytes(&device);
	char	   *name;
	int64_t		after;

	free_model(e);
	pthread_mutex_lock(&e->lock);
	loaded = e->loaded;
	e->loaded = NULL;
	e->state = MILLM_IDLE;
	atomic_store(&e->cancels_all, atomic_load(&e->is_ending));
	pthread_mutex_unlock(&e->lock);
	publish(e);
	name = strdup(loaded->name);
	millm_loaded_release(loaded);
	after = taken_bytes(&device);
	sink.unloaded(sink.arg, name ? name : "", before < 0 || after < 0 ? -1 : before > after ? before - after : 0);
	free(name);
}

/* ---- the thread ---------------------------------------------------------------------------- */

/* Wait until something changes, or for so long (< 0: no limit, somebody will wake us).  Under the lock. */
static void
wait_for_work(MillmEngine *e, int limit_ms)
{
	struct timespec until;

	if (e->is_woken)
		return;
	if (limit_ms < 0)
	{
		pthread_cond_wait(&e->wake, &e->lock);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += (long) limit_ms % 1000 * 1000000;
	until.tv_sec += limit_ms / 1000 + until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_cond_timedwait(&e->wake, &e->lock, &until);
}

static void
take_inbox(MillmEngine *e)
{
	MillmRequest *r;

	pthread_mutex_lock(&e->lock);
	r = e->inbox;
	e->inbox = NULL;
	e->inbox_end = &e->inbox;
	e->is_woken = false;
	pthread_mutex_unlock(&e->lock);

	while (r)
	{
		MillmRequest *next = r->next;

		/* n_active <= max_sequences + max_queue, so there is room in both. */
		e->live[e->n_live++] = r;
		for (int i = 0; i < r->n_choices; i++)
			millm_sched_add(e->sched, &r->choices[i].slot);
		r = next;
	}
}

/* One look at everything, and one step if there is something to compute; returns how long to wait then, 0: do not. */
static int
run_round(MillmEngine *e)
{
	bool		any_paused;
	int			n;
	int			n_active;
	bool		unloading;
	int64_t		drain_until;

	take_inbox(e);
	any_paused = look_at_readers(e);
	n = millm_sched_plan(e->sched, e->plan);
	publish(e);
	if (n > 0)
		run_step(e, n);

	pthread_mutex_lock(&e->lock);
	n_active = e->n_active;
	unloading = e->state == MILLM_UNLOADING;
	drain_until = e->drain_until_ms;
	pthread_mutex_unlock(&e->lock);
	if (unloading && n_active == 0)
	{
		finish_unload(e);
		return -1;
	}
	if (unloading && !atomic_load(&e->cancels_all) && (int64_t) now_ms() >= drain_until)
	{
		atomic_store(&e->cancels_all, true);
		return 0;
	}
	if (n > 0)
		return 0;
	if (any_paused)
		return PAUSE_POLL_MS;
	if (unloading && !atomic_load(&e->cancels_all))
		return drain_until - (int64_t) now_ms() < DRAIN_REPORT_MS ? 1 + (int) (drain_until - (int64_t) now_ms()) : DRAIN_REPORT_MS;
	return -1;
}

static void *
model_thread(void *arg)
{
	MillmEngine *e = arg;
	MillmError	err;
	int			wait_ms = -1;
	double		reported = 0;

	pthread_mutex_lock(&e->lock);
	while (!atomic_load(&e->is_ending))
	{
		MillmEngineState state = e->state;
		int			n_active = e->n_active;

		if (state == MILLM_IDLE || state == MILLM_LOADED || state == MILLM_UNLOADING)
		{
			if (wait_ms != 0)
				wait_for_work(e, wait_ms);
			state = e->state;
		}
		if (state == MILLM_IDLE)
			e->is_woken = false;
		pthread_mutex_unlock(&e->lock);

		wait_ms = -1;
		if (state == MILLM_LOADING)
			run_load(e);
		else if (state != MILLM_IDLE)
		{
			if (state == MILLM_UNLOADING && e->sink.progress && now_ms() - reported >= DRAIN_REPORT_MS)
			{
				reported = now_ms();
				e->sink.progress(e->sink.arg, "draining", n_active);
			}
			wait_ms = run_round(e);
		}
		pthread_mutex_lock(&e->lock);
	}
	pthread_mutex_unlock(&e->lock);

	if (e->sched)
	{
		take_inbox(e);
		while (e->n_live > 0)
		{
			canceled(e, e->live[e->n_live - 1], &err);
			retire(e, e->n_live - 1, &err);
		}
	}
	free_model(e);
	return NULL;
}

/* ---- what the other threads call ------------------------------------------------------------ */

MillmCode
millm_engine_create(MillmEngine **out, MillmError *err)
{
	MillmEngine *e = calloc(1, sizeof(*e));
	pthread_condattr_t attr;

	if (!e)
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	e->inbox_end = &e->inbox;
	e->pages_free = e->pages_cached = -1;
	pthread_mutex_init(&e->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&e->wake, &attr);
	pthread_condattr_destroy(&attr);
	if (pthread_create(&e->thread, NULL, model_thread, e) != 0)
	{
		pthread_cond_destroy(&e->wake);
		pthread_mutex_destroy(&e->lock);
		free(e);
		return millm_fail(err, MILLM_E_INTERNAL, "could not start the model thread");
	}
	*out = e;
	return MILLM_OK;
}

void
millm_engine_free(MillmEngine *e)
{
	atomic_store(&e->cancels_all, true);
	atomic_store(&e->is_ending, true);
	pthread_mutex_lock(&e->lock);
	wake_thread(e);
	pthread_mutex_unlock(&e->lock);
	pthread_join(e->thread, NULL);
	if (e->state == MILLM_UNLOADING)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_CANCELED, "unload canceled: the engine shuts down");
		e->sink.failed(e->sink.arg, &err);
	}
	else if (e->state == MILLM_LOADING)
	{
		MillmError	err;

		millm_fail(&err, MILLM_E_CANCELED, "load canceled: the engine shuts down");
		e->sink.failed(e->sink.arg, &err);
		free_load_strings(&e->load);
	}
	millm_loaded_release(e->loaded);
	pthread_cond_destroy(&e->wake);
	pthread_mutex_destroy(&e->lock);
	free(e);
}

static bool
copy_string(const char *from, const char **to)
{
	*to = from ? strdup(from) : NULL;
	return !from || *to;
}

MillmCode
millm_engine_load(MillmEngine *e, const MillmLoadOptions *options, const MillmLoadSink *sink, MillmError *err)
{
	MillmLoadOptions copy = *options;
	MillmCode	rc = MILLM_OK;

	copy.path = copy.model = copy.model_uuid = copy.kernels = NULL;
	if (!copy_string(options->path, &copy.path) || !copy_string(options->model, &copy.model) ||
		!copy_string(options->model_uuid, &copy.model_uuid) || !copy_string(options->kernels, &copy.kernels))
	{
		free_load_strings(&copy);
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	}
	pthread_mutex_lock(&e->lock);
	if (e->state == MILLM_LOADED)
	{
		rc = millm_fail(err, MILLM_E_MODEL_ALREADY_LOADED, "model \"%s\" is loaded", e->loaded->name);
		millm_hint(err, "Unload it first.");
	}
	else if (e->state != MILLM_IDLE)
		rc = millm_fail(err, MILLM_E_MODEL_BUSY, "a model is being %s", e->state == MILLM_LOADING ? "loaded" : "unloaded");
	else
	{
		e->state = MILLM_LOADING;
		atomic_store(&e->stops_load, false);
		e->load = copy;
		e->sink = *sink;
		wake_thread(e);
	}
	pthread_mutex_unlock(&e->lock);
	if (rc != MILLM_OK)
		free_load_strings(&copy);
	return rc;
}

MillmCode
millm_engine_plan(MillmEngine *e, const MillmLoadOptions *options, const char *quantization, bool must_fit, MillmLoadPlan *out, MillmError *err)
{
	MillmEngineStatus now;
	MillmCode	rc;

	millm_engine_status(e, &now);
	rc = plan_load(options, quantization, must_fit, now.loaded, out, err);
	millm_loaded_release(now.loaded);
	return rc;
}

/* Fill err for a state in which the loaded model cannot be asked for anything.  Under the lock. */
static MillmCode
not_loaded(MillmEngine *e, MillmError *err)
{
	if (e->state == MILLM_UNLOADING)
		return millm_fail(err, MILLM_E_MODEL_BUSY, "model \"%s\" is being unloaded", e->loaded->name);
	if (e->state == MILLM_LOADING)
	{
		millm_fail(err, MILLM_E_MODEL_NOT_LOADED, "the model is still being loaded");
		millm_hint(err, "Wait until the load is complete.");
	}
	else
	{
		millm_fail(err, MILLM_E_MODEL_NOT_LOADED, "no model is loaded");
		millm_hint(err, "Load one first.");
	}
	return MILLM_E_MODEL_NOT_LOADED;
}

void
millm_engine_cancel_load(MillmEngine *e)
{
	atomic_store(&e->stops_load, true);
}

MillmCode
millm_engine_unload(MillmEngine *e, int timeout_ms, const MillmLoadSink *sink, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	pthread_mutex_lock(&e->lock);
	if (e->state == MILLM_LOADED)
	{
		e->state = MILLM_UNLOADING;
		e->sink = *sink;
		e->drain_until_ms = (int64_t) now_ms() + timeout_ms;
		wake_thread(e);
	}
	else if (e->state == MILLM_LOADING)
		rc = millm_fail(err, MILLM_E_MODEL_BUSY, "a model is being loaded");
	else
		rc = not_loaded(e, err);
	pthread_mutex_unlock(&e->lock);
	return rc;
}

MillmCode
millm_engine_loaded(MillmEngine *e, const MillmLoaded **out, MillmError *err)
{
	MillmCode	rc = MILLM_OK;

	pthread_mutex_lock(&e->lock);
	if (e->state == MILLM_LOADED)
		*out = millm_loaded_ref(e->loaded);
	else
		rc = not_loaded(e, err);
	pthread_mutex_unlock(&e->lock);
	return rc;
}

void
millm_engine_status(MillmEngine *e, MillmEngineStatus *out)
{
	pthread_mutex_lock(&e->lock);
	out->state = e->state;
	out->running = e->n_running;
	out->waiting = e->n_active > e->n_running ? e->n_active - e->n_running : 0;
	out->pages_free = e->pages_free;
	out->pages_cached = e->pages_cached;
	out->drafted_tokens = e->drafted_tokens;
	out->accepted_tokens = e->accepted_tokens;
	out->loaded = e->loaded ? millm_loaded_ref(e->loaded) : NULL;
	pthread_mutex_unlock(&e->lock);
}

MillmCode
millm_engine_accept(MillmEngine *e, MillmRequest *r, MillmError *err)
{
	const MillmLoaded *loaded = r->loaded;
	const int	capacity = loaded->max_sequences + loaded->max_queue;
	MillmCode	rc = MILLM_OK;

	if (r->n_choices > capacity)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "n is out of range");
		millm_detail(err, "It is %d; %d sequences may run and %d wait.", r->n_choices, loaded->max_sequences, loaded->max_queue);
		millm_hint(err, "Ask for fewer choices, or raise millm.max_queue.");
		return MILLM_E_INVALID_ARGUMENT;
	}
	pthread_mutex_lock(&e->lock);
	if (e->state != MILLM_LOADED || e->loaded != loaded)
		rc = not_loaded(e, err);
	else if (r->n_choices > capacity - e->n_active)
	{
		const double wait_s = (e->n_active - e->n_running + r->n_choices) * e->service_ms / loaded->max_sequences / 1000;

		rc = millm_fail(err, MILLM_E_SERVER_BUSY, "too many requests for model \"%s\"", loaded->name);
		millm_detail(err, "%d sequences are running and %d are waiting, of at most %d and %d; the request has %d.", e->n_running,
					 e->n_active - e->n_running, loaded->max_sequences, loaded->max_queue, r->n_choices);
		if (wait_s > 0)
			millm_expect_wait(err, wait_s < MAX_WAIT_S ? (int) wait_s + 1 : MAX_WAIT_S);
		millm_hint(err, "Try again later, or raise millm.max_queue.");
	}
	else
	{
		e->n_active += r->n_choices;
		r->accepted_ms = now_ms();
		millm_request_ref(r);
	}
	pthread_mutex_unlock(&e->lock);
	return rc;
}

/* What there is of them depends on the request. */
static void
submit(MillmEngine *e, MillmRequest *r, const MillmPrompt *prompt, const MillmTexts *texts)
{
	MillmError	err;

	if (atomic_load(&r->is_canceled) || atomic_load(&e->cancels_all))
	{
		canceled(e, r, &err);
		fail_request(e, r, &err);
		return;
	}
	if ((r->embedding ? embedding_begin(r, texts, &err) : r->scoring ? scoring_begin(r, prompt, texts, &err) :
		 generation_begin(r, prompt, &err)) != MILLM_OK)
	{
		fail_request(e, r, &err);
		return;
	}
	pthread_mutex_lock(&e->lock);
	r->next = NULL;
	*e->inbox_end = r;
	e->inbox_end = &r->next;
	wake_thread(e);
	pthread_mutex_unlock(&e->lock);
}

void
millm_engine_submit(MillmEngine *e, MillmRequest *r, const MillmPrompt *prompt)
{
	submit(e, r, prompt, NULL);
}

void
millm_engine_submit_texts(MillmEngine *e, MillmRequest *r, const MillmTexts *texts)
{
	submit(e, r, NULL, texts);
}

void
millm_engine_submit_labels(MillmEngine *e, MillmRequest *r, const MillmPrompt *prompt, const MillmTexts *labels)
{
	submit(e, r, prompt, labels);
}

void
millm_engine_refuse(MillmEngine *e, MillmRequest *r, const MillmError *err)
{
	fail_request(e, r, err);
}

void
millm_engine_cancel(MillmEngine *e, MillmRequest *r)
{
	atomic_store(&r->is_canceled, true);
	pthread_mutex_lock(&e->lock);
	wake_thread(e);
	pthread_mutex_unlock(&e->lock);
}
