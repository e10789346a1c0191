/*
 * quantize.c -- can a quantized download keep up: sha256 and the encoders over the same bytes in memory, alone and together.
 *
 *   make && cc -O2 -D_GNU_SOURCE -Isrc/base -Isrc/quant -Isrc/hub -o build/quantize bench/quantize.c build/libmillm.a \
 *       $(pkg-config --libs jansson libcrypto) -lpthread -lm
 *   build/quantize
 *
 * The bytes are BF16 weights, one Linear of 8192 x 2048 after the other with its scales; they are passed on in steps, as a
 * download does: one thread hashes a step while the other encodes it, and both wait for each other (hub/fetch.c).
 * GB/s of raw bytes by the clock on the wall, and by the CPU time of both threads together, which a busy machine disturbs
 * less; medians, and the best, of rounds that take turns.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "half.h"
#include "hash.h"
#include "quant.h"

#define ROUNDS		9
#define N_LINEARS	8
#define N_OUT		8192
#define N_IN		2048
#define LINEAR_BYTES ((size_t) N_OUT * N_IN * 2)
#define STEP_BYTES	((size_t) 2 << 20)

static double
now(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (double) ts.tv_sec + (double) ts.tv_nsec / 1e9;
}

static int
compare(const void *a, const void *b)
{
	double		x = *(const double *) a,
				y = *(const double *) b;

	return (x > y) - (x < y);
}

/* Sorts. */
static double
median(double *x)
{
	qsort(x, ROUNDS, sizeof(*x), compare);
	return x[ROUNDS / 2];
}

/* Once over all weights: hash them when there is a hasher, encode them when there is room for the result. */
static bool
pass(const unsigned char *weights, MillmHasher *hasher, MillmQuantFormat format, unsigned char *out)
{
	MillmQuantEncoder *enc = NULL;
	const MillmQuantPart *parts;
	MillmHash	hash;
	MillmError	err;
	int			n_parts;
	char		sixty_four[65];

	memset(sixty_four, '0', 64);
	sixty_four[64] = '\0';
	millm_hash_begin(&hash, sixty_four, 0);
	for (int l = 0; l < N_LINEARS; l++, weights += LINEAR_BYTES)
	{
		MillmCode	rc = out ? millm_quant_begin(format, "bench.weight", MILLM_BF16, N_OUT, N_IN, &enc, &err) : MILLM_OK;

		for (size_t at = 0; at < LINEAR_BYTES && rc == MILLM_OK; at += STEP_BYTES)
		{
			if (hasher)
				millm_hasher_start(hasher, &hash, weights + at, STEP_BYTES);
			if (out)
				rc = millm_quant_push(enc, weights + at, STEP_BYTES, out, &err);
			if (hasher)
				millm_hasher_wait(hasher);
		}
		if (out && rc == MILLM_OK)
			rc = millm_quant_finish(enc, &parts, &n_parts, &err);
		millm_quant_free(enc);
		enc = NULL;
		if (rc != MILLM_OK)
			return fprintf(stderr, "%s\n", err.message), false;
	}
	return true;
}

int
main(void)
{
	static const struct {const char *what; bool hashes, encodes; MillmQuantFormat format;} rows[] = {
		{"sha256", true, false, MILLM_QUANT_NF4}, {"NF4", false, true, MILLM_QUANT_NF4}, {"INT8", false, true, MILLM_QUANT_INT8},
		{"sha256 + NF4", true, true, MILLM_QUANT_NF4}, {"sha256 + INT8", true, true, MILLM_QUANT_INT8},
	};
	enum {N_ROWS = sizeof(rows) / sizeof(rows[0])};
	const size_t n = N_LINEARS * LINEAR_BYTES / 2;
	MillmHasher *hasher = millm_hasher_create();
	uint16_t   *weights = malloc(n * 2);
	unsigned char *out = calloc(STEP_BYTES, 1);
	double		wall[N_ROWS][ROUNDS],
				cpu[N_ROWS][ROUNDS];
	const double bytes = (double) n * 2;
	uint32_t	x = 1;

	if (!hasher || !weights || !out)
		return fprintf(stderr, "out of memory\n"), 1;
	for (size_t i = 0; i < n; i++)	/* the sum of two: more small ones than large ones, as weights are */
	{
		x = 1664525 * x + 1013904223;
		weights[i] = millm_f32_to_bf16(((float) (x >> 20) - (float) (x >> 8 & 0xFFF)) * 0x1p-17f);
	}
	for (int r = 0; r < ROUNDS; r++)
		for (int k = 0; k < N_ROWS; k++)
		{
			double		start = now(CLOCK_MONOTONIC),
						cpu_start = now(CLOCK_PROCESS_CPUTIME_ID);

			if (!pass((unsigned char *) weights, rows[k].hashes ? hasher : NULL, rows[k].format, rows[k].encodes ? out : NULL))
				return 1;
			wall[k][r] = now(CLOCK_MONOTONIC) - start;
			cpu[k][r] = now(CLOCK_PROCESS_CPUTIME_ID) - cpu_start;
		}
	for (int k = 0; k < N_ROWS; k++)
	{
		double		middle = median(wall[k]);

		printf("  %-14s %5.2f GB/s (best %5.2f)   %5.2f by CPU time\n", rows[k].what, bytes / middle / 1e9, bytes / wall[k][0] / 1e9,
			   bytes / median(cpu[k]) / 1e9);
	}
	millm_hasher_free(hasher);
	free(weights);
	free(out);
	return 0;
}
