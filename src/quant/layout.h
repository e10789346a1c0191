/*
 * layout.h -- inside of src/quant: places in the list of parts that layout.c fills and encode.c completes.
 */
#ifndef MILLM_QUANT_LAYOUT_H
#define MILLM_QUANT_LAYOUT_H

#include "quant.h"

/* More weights than any matrix has; small enough that no sum or product of sizes below can wrap. */
#define MILLM_QUANT_MAX_WEIGHTS	(INT64_C(1) << 40)

enum
{
	MILLM_PART_WEIGHT,
	/* NF4 */
	MILLM_PART_ABSMAX = 1, MILLM_PART_QUANT_MAP, MILLM_PART_NESTED_ABSMAX, MILLM_PART_NESTED_MAP, MILLM_PART_STATE,
	/* INT8 */
	MILLM_PART_SCB = 1, MILLM_PART_WEIGHT_FORMAT
};

#endif
