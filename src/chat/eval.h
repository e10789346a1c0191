/*
 * eval.h -- run a compiled template.
 */
#ifndef MILLM_CHAT_EVAL_H
#define MILLM_CHAT_EVAL_H

#include "builtin.h"

/* The text of the template under these variables (see chat.h), a view into the run's arena; fails the run's work. */
extern Str	millm_template_run(Run *run, size_t max_output, const json_t *trusted, const json_t *variables);

#endif
