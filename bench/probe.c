/*
 * probe.c -- what this machine can do right now: bytes per second of n threads streaming through memory, and, where the CPU has AMX,
 * operations per second of as many threads multiplying tiles.
 *
 *   make && cc -O3 -mavx2 -D_GNU_SOURCE -Isrc/base -Isrc/kernel -o build/probe bench/probe.c build/libmillm.a -lpthread -lm
 *   build/probe THREADS [MIB]
 *
 * Reading: each thread reads its slice of a buffer of MIB (default 1024) with four independent accumulators.  Tiles: products of registers
 * with registers, six sums side by side, more than the unit's latency asks for.  Prints the best and the median pass as JSON, GB/s in 1e9
 * bytes and GFLOP/s in 1e9 multiplications and additions; amx_gflops is null without AMX.  The machines that we measure on are not constant, so
 * every figure in bench/ stands beside a probe of the same seconds.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "amx_tile.h"
#include "kernel.h"

#define PASSES		5
#define AMX_ROUNDS	100000			/* of six products: about 4 ms */
#define AMX_FLOP	(6.0 * AMX_ROUNDS * 2 * 16 * 16 * 32)

typedef struct Worker
{
	void		(*pass) (struct Worker *w);
	const uint64_t *data;
	size_t		n;
	uint64_t	sum;
	pthread_barrier_t *barrier;
	pthread_t	id;
} Worker;

/* As wide as AVX2's registers: wider ones GCC keeps in memory, and the loop is bound by that instead. */
typedef uint64_t Vec __attribute__((vector_size(32), aligned(32)));

static void
read_slice(Worker *w)
{
	const Vec  *v = (const Vec *) w->data;
	size_t		n = w->n / 4;
	Vec			a = {0}, b = {0}, c = {0}, d = {0};

	for (size_t i = 0; i + 4 <= n; i += 4)
	{
		__builtin_prefetch((const char *) &v[i] + 4096);
		__builtin_prefetch((const char *) &v[i + 2] + 4096);
		a += v[i], b += v[i + 1], c += v[i + 2], d += v[i + 3];
	}
	a += b + c + d;
	w->sum += a[0] + a[1] + a[2] + a[3];
}

static void
multiply_tiles(Worker *w)
{
	(void) w;
	tile_configure();				/* which makes zeros of them all */
	for (int i = 0; i < AMX_ROUNDS; i++)
	{
		tile_dot_bf16(0, 6, 7);
		tile_dot_bf16(1, 6, 7);
		tile_dot_bf16(2, 6, 7);
		tile_dot_bf16(3, 6, 7);
		tile_dot_bf16(4, 6, 7);
		tile_dot_bf16(5, 6, 7);
	}
	tile_release();
}

static void *
work(void *arg)
{
	Worker	   *w = arg;

	for (int pass = 0; pass < PASSES; pass++)
	{
		pthread_barrier_wait(w->barrier);
		w->pass(w);
		pthread_barrier_wait(w->barrier);
	}
	return NULL;
}

static double
now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double) ts.tv_sec + 1e-9 * (double) ts.tv_nsec;
}

static int
by_value(const void *a, const void *b)
{
	double		x = *(const double *) a, y = *(const double *) b;

	return (x > y) - (x < y);
}

/* rate[PASSES], ascending: amount, of all the workers together, per second of each pass. */
static void
measure(Worker *workers, long n, void (*pass) (Worker *), double amount, double *rate)
{
	pthread_barrier_t barrier;

	pthread_barrier_init(&barrier, NULL, (unsigned) n + 1);
	for (long t = 0; t < n; t++)
	{
		workers[t].pass = pass;
		workers[t].barrier = &barrier;
		if (pthread_create(&workers[t].id, NULL, work, &workers[t]))
		{
			fprintf(stderr, "probe: could not start a thread\n");
			exit(1);
		}
	}
	for (int i = 0; i < PASSES; i++)
	{
		double		start;

		pthread_barrier_wait(&barrier);
		start = now();
		pthread_barrier_wait(&barrier);
		rate[i] = amount / (now() - start);
	}
	for (long t = 0; t < n; t++)
		pthread_join(workers[t].id, NULL);
	pthread_barrier_destroy(&barrier);
	qsort(rate, PASSES, sizeof(rate[0]), by_value);
}

int
main(int argc, char **argv)
{
	long		threads = argc > 1 ? strtol(argv[1], NULL, 10) : 1;
	long		mib = argc > 2 ? strtol(argv[2], NULL, 10) : 1024;
	size_t		bytes;
	char	   *buf;
	Worker		workers[64] = {0};
	double		rate[PASSES];

	if (threads < 1 || threads > 64 || mib < 1 || mib > 65536)
	{
		fprintf(stderr, "usage: probe THREADS(1-64) [MIB(1-65536)]\n");
		return 2;
	}
	bytes = (size_t) mib << 20;
	buf = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (buf == MAP_FAILED)
	{
		perror("probe: mmap");
		return 1;
	}
	madvise(buf, bytes, MADV_HUGEPAGE);
	memset(buf, 1, bytes);
	for (long t = 0; t < threads; t++)
	{
		size_t		per = bytes / (size_t) threads & ~(size_t) 4095;

		workers[t].data = (const uint64_t *) (buf + (size_t) t * per);
		workers[t].n = per / 8;
	}
	measure(workers, threads, read_slice, (double) bytes, rate);
	printf("{\"threads\": %ld, \"best_gbps\": %.2f, \"median_gbps\": %.2f, \"amx_gflops\": ", threads, rate[PASSES - 1] / 1e9, rate[PASSES / 2] / 1e9);
	if (millm_cpu_flags() & MILLM_CPU_AMX)
	{
		measure(workers, threads, multiply_tiles, AMX_FLOP * (double) threads, rate);
		printf("%.0f}\n", rate[PASSES / 2] / 1e9);
	}
	else
		printf("null}\n");
	return 0;
}
