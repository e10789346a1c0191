/*
 * memory.h -- how much of the machine's memory a model will take, decided before any is taken.
 */
#ifndef MILLM_MEMORY_H
#define MILLM_MEMORY_H

#include <stdint.h>

#include "error.h"
#include "kv.h"

/* What this process has to itself, in bytes: neither files nor the page cache.  -1 when it cannot be read. */
extern int64_t millm_memory_private(void);

typedef struct MillmMemoryPlan
{
	/* given */
	int64_t		page_bytes;			/* of one KV page */
	MillmKvLayout layout;
	int			step_tokens;		/* that a sequence grows by at most at a time */
	int			context_length;
	int			max_sequences;
	int64_t		kv_cache_bytes;		/* 0: choose */
	int64_t		weights_bytes;
	int64_t		workspace_bytes;
	int64_t		available_bytes;	/* -1: not known; then nothing is refused for it */
	/* found */
	int64_t		n_pages;
	int64_t		kv_bytes;			/* of these pages */
	int64_t		total_bytes;		/* weights, KV cache and workspace */
} MillmMemoryPlan;

/*
 * Choose n_pages: max_sequences x context, at most a quarter of what is available and no more than the rest leaves, at least one full
 * context.  INVALID_ARGUMENT when kv_cache_bytes does not hold one context.
 */
extern MillmCode millm_memory_plan(MillmMemoryPlan *plan, MillmError *err);

/*
 * INSUFFICIENT_MEMORY when the plan takes more than what is available, with the figures and what would fit: a shorter context, or the
 * weights quantized (q4_weights_bytes; -1 when they are already, or cannot be).
 */
extern MillmCode millm_memory_check(const MillmMemoryPlan *plan, int64_t q4_weights_bytes, MillmError *err);

#endif
