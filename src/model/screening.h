/*
 * screening.h -- the screening copy of the LM head that may lie beside a model's files (quant/screen.h).
 */
#ifndef MILLM_SCREENING_H
#define MILLM_SCREENING_H

#include "model.h"
#include "safetensors.h"

/* Could a screening copy of m's head be made, and would it be of use? */
extern bool millm_screening_is_possible(const MillmModel *m);

/*
 * Map dir's screening copy, if there is one, and bind it to m, whose head is bound: m->screen, and *out the file, the
 * caller's; else *out is NULL.  Not an error, but said in m->screen_refused: a file that is damaged, or that was not made
 * from this head.  INSUFFICIENT_MEMORY.
 */
extern MillmCode millm_screening_open(const char *dir, MillmModel *m, MillmSafetensors **out, MillmError *err);

#endif
