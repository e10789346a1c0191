/*
 * version.h -- millm's version.  test/check-version compares it with millm.control, META.json
 * and the name of the SQL script.
 */
#ifndef MILLM_VERSION_H
#define MILLM_VERSION_H

#define MILLM_VERSION "1.0.0"

#endif
