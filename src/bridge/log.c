/*
 * log.c -- lines to stderr that never stop the loop.
 */
#include "log.h"

#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static long n_lost;

static bool
write_line(const char *line, size_t len)
{
	while (len > 0)
	{
		struct pollfd pfd = {.fd = STDERR_FILENO, .events = POLLOUT};
		ssize_t		n;

		if (poll(&pfd, 1, 0) != 1 || !(pfd.revents & POLLOUT))
			return false;
		/* a pipe that polls writable has room for PIPE_BUF bytes, so this does not block */
		n = write(STDERR_FILENO, line, len < 4096 ? len : 4096);
		if (n <= 0)
			return false;
		line += n;
		len -= (size_t) n;
	}
	return true;
}

void
bridge_log(const char *level, const char *event, json_t *fields)
{
	json_t	   *line;
	struct timespec now;
	struct tm	utc;
	char		stamp[40];
	size_t		n;
	char	   *text;

	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &utc);
	n = strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
	snprintf(stamp + n, sizeof(stamp) - n, ".%03ldZ", now.tv_nsec / 1000000);
	line = json_pack("{s:s, s:s, s:s}", "time", stamp, "level", level, "event", event);
	if (n_lost > 0)
		json_object_set_new(line, "lines_lost", json_integer(n_lost));
	if (fields)
	{
		json_object_update(line, fields);
		json_decref(fields);
	}
	text = json_dumps(line, JSON_COMPACT | JSON_REAL_PRECISION(9));
	json_decref(line);
	if (text)
	{
		size_t		len = strlen(text);

		text[len] = '\n';		/* in place of the terminator: write_line() takes a length */
		if (write_line(text, len + 1))
			n_lost = 0;
		else
			n_lost++;
	}
	free(text);
}
