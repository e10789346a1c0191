/*
 * threads.c -- the team: one loop at a time, joined only by the threads that are awake.
 *
 * One 64-bit word says it all: the number of the current loop (upper half), whether it still admits
 * helpers, and how many are inside.  A worker enters by adding itself to that word while the loop is open; the
 * caller closes the loop when no piece is left and waits for those inside only.  So a worker that
 * sleeps or that the system has put aside delays nobody.
 *
 * Sleeping: a worker that has spun in vain announces itself in n_sleeping, looks at the word once more
 * and waits on the condition; a caller that has opened a loop looks at n_sleeping.  Both sides are
 * sequentially consistent, so one of them sees the other.
 */
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define OPEN			(UINT64_C(1) << 31)
#define INSIDE(word)	((uint32_t) (word) & 0x7FFFFFFF)
#define LOOP(word)		((word) >> 32)

/* About 100 us: longer than the serial parts of a step, shorter than anyone could notice. */
#define SPINS_BEFORE_SLEEP	4000
#define SPINS_BEFORE_YIELD	2000

struct MillmTeam
{
	int			n_threads;
	int			n_started;
	pthread_t  *threads;		/* [n_threads - 1], the first n_started run */
	pthread_mutex_t lock;
	pthread_cond_t wake;
	atomic_int	n_sleeping;
	atomic_bool is_ending;
	/* the loop */
	void		(*work) (void *arg, int64_t begin, int64_t end);
	void	   *arg;
	int64_t		n_items;
	int64_t		grain;
	int64_t		largest;
	_Alignas(64) _Atomic uint64_t word;
	_Alignas(64) _Atomic int64_t next;
};

static inline void
relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#endif
}

int
millm_cpu_count(void)
{
	cpu_set_t	set;
	int			n;

	if (sched_getaffinity(0, sizeof(set), &set) != 0)
		return 1;
	n = CPU_COUNT(&set);
	return n < 1 ? 1 : n > MILLM_MAX_THREADS ? MILLM_MAX_THREADS : n;
}

/* Half of a thread's fair share of what is left, within the loop's bounds. */
static int64_t
piece_size(const MillmTeam *team, int64_t n_left)
{
	int64_t		n = n_left / (2 * team->n_threads);

	n = n > team->largest ? team->largest : n < team->grain ? team->grain : n;
	return n < n_left ? n : n_left;
}

static void
do_pieces(MillmTeam *team)
{
	int64_t		begin = atomic_load_explicit(&team->next, memory_order_relaxed);

	while (begin < team->n_items)
	{
		int64_t		n = piece_size(team, team->n_items - begin);

		if (atomic_compare_exchange_weak_explicit(&team->next, &begin, begin + n, memory_order_relaxed, memory_order_relaxed))
		{
			team->work(team->arg, begin, begin + n);
			begin = atomic_load_explicit(&team->next, memory_order_relaxed);
		}
	}
}

/* Sleep until there is a loop after seen, or the end. */
static void
sleep_until_loop(MillmTeam *team, uint64_t seen)
{
	pthread_mutex_lock(&team->lock);
	atomic_fetch_add(&team->n_sleeping, 1);
	while (LOOP(atomic_load(&team->word)) == seen && !atomic_load(&team->is_ending))
		pthread_cond_wait(&team->wake, &team->lock);
	atomic_fetch_sub(&team->n_sleeping, 1);
	pthread_mutex_unlock(&team->lock);
}

static void *
worker_main(void *arg)
{
	MillmTeam  *team = arg;
	uint64_t	seen = 0;		/* the last loop that we took part in, or came too late for */
	int			n_spins = 0;

	while (!atomic_load_explicit(&team->is_ending, memory_order_relaxed))
	{
		uint64_t	word = atomic_load_explicit(&team->word, memory_order_acquire);

		if (LOOP(word) == seen)
		{
			if (++n_spins < SPINS_BEFORE_SLEEP)
				relax();
			else
			{
				sleep_until_loop(team, seen);
				n_spins = 0;
			}
			continue;
		}
		if ((word & OPEN) && !atomic_compare_exchange_weak_explicit(&team->word, &word, word + 1, memory_order_acq_rel,
																	memory_order_relaxed))
			continue;			/* somebody else came or went: look again */
		seen = LOOP(word);
		n_spins = 0;
		if (word & OPEN)
		{
			do_pieces(team);
			atomic_fetch_sub_explicit(&team->word, 1, memory_order_release);
		}
	}
	return NULL;
}

void
millm_team_run(MillmTeam *team, void (*work) (void *arg, int64_t begin, int64_t end), void *arg, int64_t n_items, int64_t grain, int64_t largest)
{
	uint64_t	loop;

	if (n_items <= 0)
		return;
	if (team->n_started == 0 || n_items <= grain)
	{
		work(arg, 0, n_items);
		return;
	}

	team->work = work;
	team->arg = arg;
	team->n_items = n_items;
	team->grain = grain;
	team->largest = largest;
	atomic_store_explicit(&team->next, 0, memory_order_relaxed);
	loop = (LOOP(atomic_load_explicit(&team->word, memory_order_relaxed)) + 1) & UINT32_MAX;
	atomic_store(&team->word, loop << 32 | OPEN);
	if (atomic_load(&team->n_sleeping) > 0)
	{
		pthread_mutex_lock(&team->lock);
		pthread_cond_broadcast(&team->wake);
		pthread_mutex_unlock(&team->lock);
	}

	do_pieces(team);
	atomic_fetch_and(&team->word, ~OPEN);
	/* Those inside have at most one piece each to finish. */
	for (int i = 0; INSIDE(atomic_load_explicit(&team->word, memory_order_acquire)) > 0; i++)
	{
		if (i < SPINS_BEFORE_YIELD)
			relax();
		else
			sched_yield();		/* a helper may have lost its CPU to us */
	}
}

MillmCode
millm_team_create(int n_threads, MillmTeam **out, MillmError *err)
{
	MillmTeam  *team;

	if (n_threads == 0)
		n_threads = millm_cpu_count();
	if (n_threads < 1 || n_threads > MILLM_MAX_THREADS)
		return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "invalid number of threads: %d", n_threads);
	if (!(team = aligned_alloc(64, (sizeof(*team) + 63) / 64 * 64)))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	memset(team, 0, sizeof(*team));
	team->n_threads = n_threads;
	pthread_mutex_init(&team->lock, NULL);
	pthread_cond_init(&team->wake, NULL);
	atomic_init(&team->n_sleeping, 0);
	atomic_init(&team->is_ending, false);
	atomic_init(&team->word, 0);
	atomic_init(&team->next, 0);
	if (!(team->threads = calloc((size_t) n_threads, sizeof(*team->threads))))
	{
		millm_team_free(team);
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	}
	for (; team->n_started < n_threads - 1; team->n_started++)
	{
		int			rc = pthread_create(&team->threads[team->n_started], NULL, worker_main, team);

		if (rc != 0)
		{
			int			n = team->n_started;

			millm_team_free(team);
			millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "could not start thread %d of %d", n + 2, n_threads);
			millm_detail(err, "The system says: %s.", strerror(rc));
			return MILLM_E_INSUFFICIENT_MEMORY;
		}
	}
	*out = team;
	return MILLM_OK;
}

void
millm_team_free(MillmTeam *team)
{
	if (!team)
		return;
	pthread_mutex_lock(&team->lock);
	atomic_store(&team->is_ending, true);
	pthread_cond_broadcast(&team->wake);
	pthread_mutex_unlock(&team->lock);
	for (int i = 0; i < team->n_started; i++)
		pthread_join(team->threads[i], NULL);
	pthread_cond_destroy(&team->wake);
	pthread_mutex_destroy(&team->lock);
	free(team->threads);
	free(team);
}

int
millm_team_size(const MillmTeam *team)
{
	return team->n_threads;
}
