/*
 * memory.c -- the prediction of a load's memory.
 *
 * Weights are mapped, so they are the page cache's and can be evicted; but a model whose weights are read from disk
 * again for every token is of no use, so they must fit too.  What is available (machine.h) counts what is cached, the
 * weights themselves included when they have been read before.
 */
#include "memory.h"

#include <inttypes.h>
#include <stdio.h>

#define SHOWN_TOKENS	256			/* context lengths that we propose are multiples of it */

int64_t
millm_memory_private(void)
{
	FILE	   *f = fopen("/proc/self/status", "re");
	char		line[256];
	int64_t		kb = -1;

	if (!f)
		return -1;
	while (kb < 0 && fgets(line, sizeof(line), f))
		if (sscanf(line, "RssAnon: %" SCNd64 " kB", &kb) != 1)
			kb = -1;
	fclose(f);
	return kb < 0 ? -1 : kb * 1024;
}

static double
mb(int64_t bytes)
{
	return (double) bytes / 1e6;
}

static int64_t
context_pages(const MillmMemoryPlan *plan, int length)
{
	return millm_kv_pages(&plan->layout, length, plan->step_tokens);
}

/* Pages that fit beside weights_bytes of weights; negative: not even these fit. */
static int64_t
fitting_pages(const MillmMemoryPlan *plan, int64_t weights_bytes)
{
	int64_t		left = plan->available_bytes - weights_bytes - plan->workspace_bytes;

	return left < 0 ? -1 : left / plan->page_bytes;
}

/* The longest context that fits beside weights_bytes of weights, a multiple of SHOWN_TOKENS unless it is all; 0: none. */
static int
fitting_context(const MillmMemoryPlan *plan, int64_t weights_bytes)
{
	const int64_t pages = fitting_pages(plan, weights_bytes);
	int			fits = 0;		/* times SHOWN_TOKENS: known to fit, and not to */
	int			not = plan->context_length / SHOWN_TOKENS + 1;

	if (context_pages(plan, plan->context_length) <= pages)
		return plan->context_length;
	while (not - fits > 1)
	{
		int			middle = fits + (not - fits) / 2;

		if (context_pages(plan, middle * SHOWN_TOKENS) <= pages)
			fits = middle;
		else
			not = middle;
	}
	return fits * SHOWN_TOKENS;
}

static int64_t
smaller(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

MillmCode
millm_memory_plan(MillmMemoryPlan *plan, MillmError *err)
{
	const int64_t least = context_pages(plan, plan->context_length);
	int64_t		pages = plan->max_sequences * least;

	if (plan->kv_cache_bytes > 0)
	{
		pages = plan->kv_cache_bytes / plan->page_bytes;
		if (pages < least)
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the KV cache is too small for one context");
			millm_detail(err, "A context of %d tokens needs %.1f MB; kv_cache_bytes is %.1f MB.", plan->context_length,
						 mb(least * plan->page_bytes), mb(plan->kv_cache_bytes));
			return MILLM_E_INVALID_ARGUMENT;
		}
	}
	else if (plan->available_bytes >= 0)
		pages = smaller(pages, smaller(plan->available_bytes / 4 / plan->page_bytes, fitting_pages(plan, plan->weights_bytes)));
	plan->n_pages = pages < least ? least : pages;

	if (__builtin_mul_overflow(plan->n_pages, plan->page_bytes, &plan->kv_bytes) ||
		__builtin_add_overflow(plan->kv_bytes, plan->workspace_bytes, &plan->total_bytes) ||
		__builtin_add_overflow(plan->total_bytes, plan->weights_bytes, &plan->total_bytes))
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "no machine has the memory for a context of %d tokens", plan->context_length);
	return MILLM_OK;
}

MillmCode
millm_memory_check(const MillmMemoryPlan *plan, int64_t q4_weights_bytes, MillmError *err)
{
	const int	fits = fitting_context(plan, plan->weights_bytes);
	const int	fits_q4 = q4_weights_bytes >= 0 ? fitting_context(plan, q4_weights_bytes) : 0;

	if (plan->available_bytes < 0 || plan->total_bytes <= plan->available_bytes)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory to load the model");
	millm_detail(err, "It needs %.1f MB (weights %.1f MB, a KV cache for contexts of %d tokens %.1f MB, workspace %.1f MB), only %.1f MB are available.",
				 mb(plan->total_bytes), mb(plan->weights_bytes), plan->context_length, mb(plan->kv_bytes), mb(plan->workspace_bytes),
				 mb(plan->available_bytes));
	if (fits > 0)
		millm_hint(err, "A context length of %d would fit%s.", fits,
				   plan->kv_cache_bytes > 0 ? ", with a KV cache no larger than that needs" : "");
	else if (fits_q4 > 0)
		millm_hint(err, "As Q4 its weights would take %.1f MB, which would fit with a context length of %d.", mb(q4_weights_bytes), fits_q4);
	else
		millm_hint(err, "No shorter context would fit%s. Free memory, or use a smaller model.", q4_weights_bytes >= 0 ? ", nor would Q4" : "");
	return MILLM_E_INSUFFICIENT_MEMORY;
}
