/*
 * probe.c -- what this machine can read right now: bytes per second of n threads streaming through memory.
 *
 * probe THREADS [MIB]: each thread reads its slice of a buffer of MIB (default 1024) once per pass with four
 * independent accumulators; prints GB/s (1e9) of the best and the median of five passes.  The machines that
 * we measure on are not constant, so every figure in bench/ stands beside a probe of the same seconds.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PASSES 5

typedef struct Slice
{
	const uint64_t *data;
	size_t		n;
	uint64_t	sum;
	pthread_barrier_t *barrier;
} Slice;

/* As wide as AVX2's registers: wider ones GCC keeps in memory, and the loop is bound by that instead. */
typedef uint64_t Vec __attribute__((vector_size(32), aligned(32)));

static void *
reader(void *arg)
{
	Slice	   *s = arg;
	const Vec  *v = (const Vec *) s->data;
	size_t		n = s->n / 4;

	for (int pass = 0; pass < PASSES; pass++)
	{
		Vec			a = {0}, b = {0}, c = {0}, d = {0};

		pthread_barrier_wait(s->barrier);
		for (size_t i = 0; i + 4 <= n; i += 4)
		{
			__builtin_prefetch((const char *) &v[i] + 4096);
			__builtin_prefetch((const char *) &v[i + 2] + 4096);
			a += v[i], b += v[i + 1], c += v[i + 2], d += v[i + 3];
		}
		a += b + c + d;
		s->sum += a[0] + a[1] + a[2] + a[3];
		pthread_barrier_wait(s->barrier);
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

int
main(int argc, char **argv)
{
	long		threads = argc > 1 ? strtol(argv[1], NULL, 10) : 1;
	long		mib = argc > 2 ? strtol(argv[2], NULL, 10) : 1024;
	size_t		bytes;
	char	   *buf;
	Slice		slices[64];
	pthread_t	ids[64];
	pthread_barrier_t barrier;
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
	pthread_barrier_init(&barrier, NULL, (unsigned) threads + 1);
	for (long t = 0; t < threads; t++)
	{
		size_t		per = bytes / (size_t) threads & ~(size_t) 4095;

		slices[t] = (Slice) {(const uint64_t *) (buf + (size_t) t * per), per / 8, 0, &barrier};
		if (pthread_create(&ids[t], NULL, reader, &slices[t]))
			return 1;
	}
	for (int pass = 0; pass < PASSES; pass++)
	{
		double		start;

		pthread_barrier_wait(&barrier);
		start = now();
		pthread_barrier_wait(&barrier);
		rate[pass] = (double) bytes / (now() - start) / 1e9;
	}
	for (long t = 0; t < threads; t++)
		pthread_join(ids[t], NULL);
	qsort(rate, PASSES, sizeof(rate[0]), by_value);
	printf("{\"threads\": %ld, \"best_gbps\": %.2f, \"median_gbps\": %.2f}\n", threads, rate[PASSES - 1], rate[PASSES / 2]);
	return 0;
}
