/*
 * settings.c -- one table, three sources.
 */
#include "settings.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "version.h"

#define ENVIRONMENT_PREFIX "MILLM_BRIDGE_"
#define MAX_FILE_BYTES 65536

extern char **environ;

Settings	settings = {
#define TEXT(name, initial, help) .name = initial,
#define INT(name, initial, least, most, help) .name = initial,
#define BOOL(name, initial, help) .name = initial,
#include "settings.def"
#undef TEXT
#undef INT
#undef BOOL
};

typedef struct Setting
{
	const char *name;
	enum {SETTING_TEXT, SETTING_INT, SETTING_BOOL} kind;
	void	   *value;
	int			least;
	int			most;
	const char *help;
} Setting;

static const Setting table[] = {
#define TEXT(name, initial, help) {#name, SETTING_TEXT, &settings.name, 0, 0, help},
#define INT(name, initial, least, most, help) {#name, SETTING_INT, &settings.name, least, most, help},
#define BOOL(name, initial, help) {#name, SETTING_BOOL, &settings.name, 0, 0, help},
#include "settings.def"
#undef TEXT
#undef INT
#undef BOOL
};

#define N_SETTINGS (sizeof(table) / sizeof(table[0]))

__attribute__((noreturn, format(printf, 1, 2))) static void
wrong(const char *fmt, ...)
{
	va_list		ap;

	fputs("millm-bridge: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputs("\nTry \"millm-bridge --help\".\n", stderr);
	exit(2);
}

/* '-' and '_' are the same in a name, letters of any case too (the environment's are large). */
static bool
same_name(const char *setting, const char *name, size_t len)
{
	if (strlen(setting) != len)
		return false;
	for (size_t i = 0; i < len; i++)
	{
		char		c = name[i] == '-' ? '_' : name[i];

		if (c >= 'A' && c <= 'Z')
			c = (char) (c - 'A' + 'a');
		if (c != setting[i])
			return false;
	}
	return true;
}

/* where: how the source calls it, for the message; value is copied. */
static void
set(const char *name, size_t len, const char *value, const char *where)
{
	for (size_t i = 0; i < N_SETTINGS; i++)
	{
		const Setting *s = &table[i];
		char	   *end;
		long		n;

		if (!same_name(s->name, name, len))
			continue;
		switch (s->kind)
		{
			case SETTING_TEXT:
				if (!(*(const char **) s->value = strdup(value)))
					wrong("out of memory");
				return;
			case SETTING_INT:
				errno = 0;
				n = strtol(value, &end, 10);
				if (errno || end == value || *end || n < s->least || n > s->most)
					wrong("%s%.*s takes an integer from %d to %d, not \"%s\"", where, (int) len, name, s->least, s->most, value);
				*(int *) s->value = (int) n;
				return;
			case SETTING_BOOL:
				if (strcmp(value, "on") == 0 || strcmp(value, "true") == 0)
					*(bool *) s->value = true;
				else if (strcmp(value, "off") == 0 || strcmp(value, "false") == 0)
					*(bool *) s->value = false;
				else
					wrong("%s%.*s takes on or off, not \"%s\"", where, (int) len, name, value);
				return;
		}
	}
	wrong("unrecognized setting \"%s%.*s\"", where, (int) len, name);
}

static char *
trim(char *text)
{
	char	   *end;

	text += strspn(text, " \t\r");
	for (end = text + strlen(text); end > text && strchr(" \t\r", end[-1]); end--)
		;
	*end = '\0';
	return text;
}

/* NAME = VALUE or NAME = 'VALUE' a line; # begins a comment line. */
static void
read_file(const char *path)
{
	char	   *text = malloc(MAX_FILE_BYTES + 1);
	FILE	   *f = fopen(path, "r");
	size_t		n;
	char	   *rest;
	char	   *line;

	if (!text)
		wrong("out of memory");
	if (!f)
		wrong("could not open \"%s\": %s", path, strerror(errno));
	n = fread(text, 1, MAX_FILE_BYTES + 1, f);
	if (ferror(f))
		wrong("could not read \"%s\": %s", path, strerror(errno));
	if (n > MAX_FILE_BYTES || memchr(text, '\0', n))
		wrong("\"%s\" is not a file of settings", path);
	fclose(f);
	text[n] = '\0';
	for (rest = text; (line = strsep(&rest, "\n")) != NULL;)
	{
		char	   *equals;
		char	   *name;
		char	   *value;
		size_t		len;

		line = trim(line);
		if (*line == '\0' || *line == '#')
			continue;
		if (!(equals = strchr(line, '=')))
			wrong("\"%s\": \"%s\" is not NAME = VALUE", path, line);
		*equals = '\0';
		name = trim(line);
		value = trim(equals + 1);
		len = strlen(value);
		if (len >= 2 && value[0] == '\'' && value[len - 1] == '\'')
		{
			value[len - 1] = '\0';
			value++;
		}
		set(name, strlen(name), value, "");
	}
	free(text);
}

static void
read_environment(void)
{
	const size_t prefix = strlen(ENVIRONMENT_PREFIX);

	for (char **e = environ; *e; e++)
	{
		const char *equals = strchr(*e, '=');

		if (!equals || strncmp(*e, ENVIRONMENT_PREFIX, prefix) != 0)
			continue;
		/* the file was read before; the URL is for clients, dev/playground sets it */
		if (strncmp(*e, ENVIRONMENT_PREFIX "CONFIG=", prefix + 7) == 0 || strncmp(*e, ENVIRONMENT_PREFIX "URL=", prefix + 4) == 0)
			continue;
		set(*e + prefix, (size_t) (equals - *e) - prefix, equals + 1, ENVIRONMENT_PREFIX);
	}
}

static void
help(void)
{
	printf("millm-bridge " MILLM_VERSION ": OpenAI's HTTP API and millm's own, answered by a PostgreSQL server with the extension\n\n"
		   "  --config FILE            lines NAME = VALUE (or " ENVIRONMENT_PREFIX "CONFIG)\n"
		   "  --version, --help\n\n"
		   "and as flags, as " ENVIRONMENT_PREFIX "NAME in the environment, or in that file:\n\n");
	for (size_t i = 0; i < N_SETTINGS; i++)
	{
		const Setting *s = &table[i];

		printf("  --%-22s %s", s->name, s->help);
		if (s->kind == SETTING_INT)
			printf(" (%d)\n", *(int *) s->value);
		else if (s->kind == SETTING_BOOL)
			printf(" (%s)\n", *(bool *) s->value ? "on" : "off");
		else if (**(const char **) s->value)
			printf(" (%s)\n", *(const char **) s->value);
		else
			putchar('\n');
	}
}

/* The value of the flag at argv[*i]: behind its '=', or the next argument. */
static const char *
flag_value(int argc, char **argv, int *i)
{
	const char *equals = strchr(argv[*i], '=');

	if (equals)
		return equals + 1;
	if (*i + 1 == argc)
		wrong("%s needs a value", argv[*i]);
	return argv[++*i];
}

/* --config alone, or all the other flags. */
static void
read_flags(int argc, char **argv, const char **config)
{
	for (int i = 1; i < argc; i++)
	{
		const char *flag = argv[i];
		size_t		len;

		if (strncmp(flag, "--", 2) != 0)
			wrong("\"%s\" is not a flag", flag);
		len = strcspn(flag + 2, "=");
		if (same_name("config", flag + 2, len))
		{
			const char *value = flag_value(argc, argv, &i);

			if (config)
				*config = value;
		}
		else if (config && same_name("help", flag + 2, len))
		{
			help();
			exit(0);
		}
		else if (config && same_name("version", flag + 2, len))
		{
			puts("millm-bridge " MILLM_VERSION);
			exit(0);
		}
		else
		{
			const char *value = flag_value(argc, argv, &i);

			if (!config)
				set(flag + 2, len, value, "--");
		}
	}
}

void
settings_read(int argc, char **argv)
{
	const char *config = getenv(ENVIRONMENT_PREFIX "CONFIG");

	read_flags(argc, argv, &config);
	if (config)
		read_file(config);
	read_environment();
	read_flags(argc, argv, NULL);
}
