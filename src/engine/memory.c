/*
 * memory.c -- the prediction of a load's memory.
 *
 * Weights are mapped, so they are the page cache's and can be evicted; but a model whose weights are read from disk
 * again for every token is of no use, so they must fit too.  MemAvailable counts what is cached as available, the
 * weights themselves included when they have been read before.
 */
#include "memory.h"

#include <inttypes.h>
#include <stdio.h>


int64_t
millm_memory_available(void)
{
	FILE	   *f = fopen("/proc/meminfo", "re");
	char		line[256];
	int64_t		kb = -1;

	if (!f)
		return -1;
	while (kb < 0 && fgets(line, sizeof(line), f))
		if (sscanf(line, "MemAvailable: %" SCNd64 " kB", &kb) != 1)
			kb = -1;
	fclose(f);
	return kb < 0 ? -1 : kb * 1024;
}

static double
mb(int64_t bytes)
{
	return (double) bytes / 1e6;
}

MillmCode
millm_memory_plan(MillmMemoryPlan *plan, MillmError *err)
{
	int64_t		context_pages = ((int64_t) plan->context_length + plan->page_tokens - 1) / plan->page_tokens;
	int64_t		pages = plan->max_sequences * context_pages;
	int64_t		kv_bytes;
	int64_t		total;

	if (plan->kv_cache_bytes > 0)
	{
		pages = plan->kv_cache_bytes / plan->page_bytes;
		if (pages < context_pages)
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "the KV cache is too small for one context");
			millm_detail(err, "A context of %d tokens needs %.1f MB; kv_cache_bytes is %.1f MB.", plan->context_length,
						 mb(context_pages * plan->page_bytes), mb(plan->kv_cache_bytes));
			return MILLM_E_INVALID_ARGUMENT;
		}
	}
	else if (plan->available_bytes >= 0 && pages > plan->available_bytes / 4 / plan->page_bytes)
		pages = plan->available_bytes / 4 / plan->page_bytes;
	if (pages < context_pages)
		pages = context_pages;

	if (__builtin_mul_overflow(pages, plan->page_bytes, &kv_bytes) ||
		__builtin_add_overflow(kv_bytes, plan->workspace_bytes, &total) ||
		__builtin_add_overflow(total, plan->weights_bytes, &total) ||
		(plan->available_bytes >= 0 && total > plan->available_bytes))
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory to load the model");
		millm_detail(err, "Weights take %.1f MB, the KV cache of %d tokens per sequence %.1f MB and the workspace %.1f MB; %.1f MB are available.",
					 mb(plan->weights_bytes), plan->context_length, (double) pages * mb(plan->page_bytes), mb(plan->workspace_bytes),
					 mb(plan->available_bytes));
		millm_hint(err, "Load it with a smaller context length or KV cache, or free memory.");
		return MILLM_E_INSUFFICIENT_MEMORY;
	}
	plan->n_pages = pages;
	return MILLM_OK;
}
