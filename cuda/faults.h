/*
 * faults.h -- what a test of a whole server cannot wait for: a device that fails, memory that runs out.
 *
 * Only a module that is compiled with -DMILLM_FAULTS has it (make FAULTS=1; the emulated one): nobody installs that.  The file "millm_fault" in the
 * working directory, a server's data directory, names the fault that happens once, at the next occasion, and goes away with it.
 */
#ifndef MILLM_CUDA_FAULTS_H
#define MILLM_CUDA_FAULTS_H

#include <stdbool.h>

#ifdef MILLM_FAULTS
extern bool millm_fault_is_due(const char *name);
#else
#define millm_fault_is_due(name) false
#endif

#endif
