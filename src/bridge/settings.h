/*
 * settings.h -- the settings of millm-bridge: flags win over the environment, which wins over the file of --config.
 *
 *     --pool_size 8  or  --pool-size=8        MILLM_BRIDGE_POOL_SIZE=8        pool_size = 8
 *
 * A name that is not in settings.def and a value out of its range end the program with status 2, by name.
 */
#ifndef MILLM_BRIDGE_SETTINGS_H
#define MILLM_BRIDGE_SETTINGS_H

#include <stdbool.h>

typedef struct Settings
{
#define TEXT(name, initial, help) const char *name;
#define INT(name, initial, least, most, help) int name;
#define BOOL(name, initial, help) bool name;
#include "settings.def"
#undef TEXT
#undef INT
#undef BOOL
} Settings;

/* Written by settings_read() before anything else runs, constant afterwards. */
extern Settings settings;

/* Read all three sources.  Ends the program on --help, --version and on what is wrong. */
extern void settings_read(int argc, char **argv);

#endif
