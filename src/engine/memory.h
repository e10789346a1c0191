/*
 * memory.h -- how much of the machine's memory a model will take, decided before any is taken.
 */
#ifndef MILLM_MEMORY_H
#define MILLM_MEMORY_H

#include <stdint.h>

#include "error.h"

/* MemAvailable of /proc/meminfo in bytes, or -1 when it cannot be read. */
extern int64_t millm_memory_available(void);

typedef struct MillmMemoryPlan
{
	/* given */
	int64_t		page_bytes;			/* of one KV page */
	int			page_tokens;
	int			context_length;
	int			max_sequences;
	int64_t		kv_cache_bytes;		/* 0: choose */
	int64_t		weights_bytes;
	int64_t		workspace_bytes;
	int64_t		available_bytes;	/* -1: not known; then nothing is refused for it */
	/* found */
	int64_t		n_pages;
} MillmMemoryPlan;

/*
 * Choose n_pages: max_sequences x context, at most a quarter of what is available, at least one full context.
 * INVALID_ARGUMENT when kv_cache_bytes does not hold one context, INSUFFICIENT_MEMORY with the figures when weights, KV cache and
 * workspace together do not fit what is available.
 */
extern MillmCode millm_memory_plan(MillmMemoryPlan *plan, MillmError *err);

#endif
