/*
 * tok_driver.c -- one tokenizer, driven from Python: requests on stdin, answers on stdout, all little-endian.
 *
 *     tok_driver DIR
 *     tok_driver DIR --open N        opens it N times and prints the milliseconds of CPU of each
 *     tok_driver DIR --compile       compiles it; prints whether it was compiled before
 *
 * A request is u32 kind, u32 n, and n bytes of text (kinds E, P, N) or n ids of 4 bytes (kinds D, K, S):
 *     E  encode with special tokens parsed     P  the same with what the post-processor adds
 *     N  encode, special tokens are text
 *     B  encode, and answer with the nanoseconds of CPU that it took and the number of tokens, each of 8 bytes
 *     D  decode    K  decode, special tokens skipped    S  the same through a stream, id by id
 * The answer is i32 count and so many ids or bytes, or -1, i32 count and a message.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "token.h"

static void
answer(const void *data, size_t n, size_t size)
{
	int32_t		count = (int32_t) n;

	fwrite(&count, 4, 1, stdout);
	fwrite(data, size, n, stdout);
	fflush(stdout);
}

static void
fail(const MillmError *err)
{
	int32_t		minus = -1;

	fwrite(&minus, 4, 1, stdout);
	answer(err->message, strlen(err->message), 1);
}

/* Of this process, which has one thread: a busy machine makes it no longer. */
static double
now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (double) t.tv_sec * 1e3 + (double) t.tv_nsec / 1e6;
}

static int
time_openings(const char *dir, int n)
{
	for (int i = 0; i < n; i++)
	{
		MillmTokenizer *tok;
		MillmError	err;
		double		start = now_ms();

		if (millm_tokenizer_open(dir, &tok, &err) != MILLM_OK)
			return 1;
		printf("%.3f\n", now_ms() - start);
		millm_tokenizer_close(tok);
	}
	return 0;
}

static int
compile(const char *dir)
{
	MillmTokenizer *tok;
	MillmError	err;

	if (millm_tokenizer_open(dir, &tok, &err) != MILLM_OK || millm_tokenizer_compile(tok, dir, &err) != MILLM_OK)
	{
		fprintf(stderr, "%s: %s\n", millm_code_name(err.code), err.message);
		return 1;
	}
	printf("%s\n", millm_tokenizer_is_compiled(tok) ? "compiled" : "not compiled");
	millm_tokenizer_close(tok);
	return 0;
}

int
main(int argc, char **argv)
{
	MillmTokenizer *tok;
	MillmError	err = {0};
	uint32_t	head[2];

	if (argc == 4 && strcmp(argv[2], "--open") == 0)
		return time_openings(argv[1], (int) strtol(argv[3], NULL, 10));
	if (argc == 3 && strcmp(argv[2], "--compile") == 0)
		return compile(argv[1]);
	if (argc != 2)
	{
		fprintf(stderr, "usage: tok_driver DIR [--open N | --compile]\n");
		return 2;
	}
	if (millm_tokenizer_open(argv[1], &tok, &err) != MILLM_OK)
	{
		fprintf(stderr, "%s: %s. %s\n", millm_code_name(err.code), err.message, err.detail);
		return 1;
	}
	while (fread(head, 4, 2, stdin) == 2)
	{
		bool		is_ids = strchr("DKS", (int) head[0]) != NULL;
		size_t		n = head[1];
		char	   *data = malloc(n * 4 + 4);

		if (!data || fread(data, is_ids ? 4 : 1, n, stdin) != n)
			return 3;
		if (!is_ids)
		{
			MillmIds	ids = {0};
			double		start = now_ms();
			MillmEncodeOptions options = {.add_special = head[0] == 'P', .parse_special = head[0] != 'N'};

			if (millm_encode(tok, data, n, options, 0, &ids, &err) != MILLM_OK)
				fail(&err);
			else if (head[0] == 'B')
				answer((uint64_t[]) {(uint64_t) ((now_ms() - start) * 1e6), ids.n}, 2, 8);
			else
				answer(ids.ids, ids.n, 4);
			millm_ids_free(&ids);
		}
		else if (head[0] == 'S')
		{
			MillmDetok *d = millm_detok_create(tok);
			char	   *all = NULL;
			size_t		all_n = 0;

			if (!d)
				return 3;
			for (size_t i = 0; i <= n; i++)
			{
				size_t		len;
				const char *piece = i < n ? millm_detok_push(d, ((int32_t *) data)[i], &len) : millm_detok_flush(d, &len);

				all = realloc(all, all_n + len + 1);
				if (!all)
					return 3;
				memcpy(all + all_n, piece, len);
				all_n += len;
			}
			answer(all, all_n, 1);
			free(all);
			millm_detok_free(d);
		}
		else
		{
			char	   *text;
			size_t		len;

			if (millm_decode(tok, (int32_t *) data, n, head[0] == 'K', &text, &len, &err) == MILLM_OK)
			{
				answer(text, len, 1);
				free(text);
			}
			else
				fail(&err);
		}
		free(data);
	}
	millm_tokenizer_close(tok);
	return 0;
}
