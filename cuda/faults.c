/*
 * faults.c -- see faults.h.
 */
#include "faults.h"

#ifdef MILLM_FAULTS
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define FAULT_FILE "millm_fault"

bool
millm_fault_is_due(const char *name)
{
	FILE	   *f = fopen(FAULT_FILE, "re");
	char		line[64] = "";
	bool		is_due;

	if (!f)
		return false;
	is_due = fgets(line, sizeof(line), f) && strcspn(line, "\n") == strlen(name) && strncmp(line, name, strlen(name)) == 0;
	fclose(f);
	return is_due && unlink(FAULT_FILE) == 0;
}
#endif
