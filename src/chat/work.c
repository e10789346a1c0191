/*
 * work.c -- the arena and the limits of a compilation or a rendering.
 */
#include "work.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arith.h"
#include "shown.h"

#define ALIGNMENT 16
#define FIRST_BLOCK_BYTES (32u << 10)
#define MAX_BLOCK_BYTES (1u << 20)
#define PAYMENTS_PER_LOOK 256

struct WorkBlock
{
	WorkBlock  *next;
	size_t		bytes;			/* all of it, this header included */
	_Alignas(ALIGNMENT) char data[];
};

static void
add_block(Work *w, size_t n)
{
	size_t		bytes = w->blocks ? w->blocks->bytes * 2 : FIRST_BLOCK_BYTES;
	WorkBlock  *block;

	if (bytes > MAX_BLOCK_BYTES)
		bytes = MAX_BLOCK_BYTES;
	if (n > w->left_bytes || n > SIZE_MAX / 2)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "the template needs too much memory");
	if (bytes < n + sizeof(*block))
		bytes = n + sizeof(*block);
	block = malloc(bytes);
	if (!block)
		millm_work_fail(w, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	w->left_bytes -= bytes < w->left_bytes ? bytes : w->left_bytes;
	block->bytes = bytes;
	block->next = w->blocks;
	w->blocks = block;
	w->at = block->data;
	w->end = (char *) block + bytes;
}

void *
millm_work_alloc(Work *w, size_t n)
{
	char	   *p;

	if (n > w->left_bytes + MAX_BLOCK_BYTES)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "the template needs too much memory");
	n = (n + ALIGNMENT - 1) & ~(size_t) (ALIGNMENT - 1);
	if (!w->blocks || (size_t) (w->end - w->at) < n)
		add_block(w, n);
	p = w->at;
	w->at += n;
	return p;
}

void *
millm_work_array(Work *w, size_t n, size_t size)
{
	size_t		bytes;
	void	   *p;

	if (!millm_mul_size(n, size, &bytes))
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "the template needs too much memory");
	p = millm_work_alloc(w, bytes);
	memset(p, 0, bytes);
	return p;
}

bool
millm_work_extend(Work *w, void *p, size_t old_n, size_t new_n)
{
	size_t		old_bytes = (old_n + ALIGNMENT - 1) & ~(size_t) (ALIGNMENT - 1);

	if (!w->blocks || (char *) p < w->blocks->data || (char *) p + old_bytes != w->at || new_n > (size_t) (w->end - (char *) p))
		return false;
	new_n = (new_n + ALIGNMENT - 1) & ~(size_t) (ALIGNMENT - 1);
	if (new_n > (size_t) (w->end - (char *) p))
		return false;
	w->at = (char *) p + new_n;
	return true;
}

void
millm_work_free(Work *w)
{
	for (WorkBlock *next, *block = w->blocks; block; block = next)
	{
		next = block->next;
		free(block);
	}
	w->blocks = NULL;
}

void
millm_work_fail(Work *w, MillmCode code, const char *fmt, ...)
{
	char		text[384];
	va_list		ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	text[millm_utf8_valid_bytes(text, strlen(text))] = '\0';	/* not half a character where it was cut */
	if (w->line > 0)
		millm_fail(w->err, code, "chat template, line %d: %s", w->line, text);
	else
		millm_fail(w->err, code, "chat template: %s", text);
	w->err = NULL;				/* the first word counts */
	longjmp(w->door, (int) code);
}

static int64_t
cpu_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

void
millm_work_pay(Work *w, uint64_t n)
{
	if (n > w->left_steps)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "the template takes too many steps");
	w->left_steps -= n;
	if (w->deadline && ++w->unlooked == PAYMENTS_PER_LOOK)
	{
		w->unlooked = 0;
		if (cpu_time() > w->deadline)
			millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "the template takes too long");
	}
}

void
millm_work_limit_time(Work *w, int seconds)
{
	w->deadline = cpu_time() + seconds * INT64_C(1000000000);
}

void
millm_work_enter(Work *w)
{
	if (++w->depth > MAX_DEPTH)
		millm_work_fail(w, MILLM_E_INVALID_ARGUMENT, "nested or recursive too deeply");
}
