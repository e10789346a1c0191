/*
 * log.c -- lines to the supervisor's log.
 *
 * One line is one write() of fewer than PIPE_BUF bytes, so lines of several threads never mix.
 * A reader that does not read must not stop the model thread: lines that do not fit the pipe are
 * dropped and counted, and the next line that does fit says how many.
 */
#include "serve.h"

#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LOG_LINE_BYTES 2048

static atomic_int n_lost;

static bool
write_line(const char *line, size_t len)
{
	struct pollfd pfd = {.fd = STDERR_FILENO, .events = POLLOUT};

	return poll(&pfd, 1, 0) == 1 && (pfd.revents & POLLOUT) &&
		write(STDERR_FILENO, line, len) == (ssize_t) len;
}

void
millm_log(const char *level, const char *fmt, ...)
{
	char		line[LOG_LINE_BYTES];
	va_list		ap;
	int			n;
	int			k;
	int			lost = atomic_exchange(&n_lost, 0);

	if (lost > 0)
	{
		n = snprintf(line, sizeof(line), "WARNING %d log lines were lost\n", lost);
		if (!write_line(line, (size_t) n))
		{
			atomic_fetch_add(&n_lost, lost + 1);
			return;
		}
	}

	n = snprintf(line, sizeof(line), "%s ", level);
	va_start(ap, fmt);
	k = vsnprintf(line + n, sizeof(line) - (size_t) n - 1, fmt, ap);
	va_end(ap);
	if (k < 0)
		return;
	for (char *p = line + n; *p; p++)
		if (*p == '\n' || *p == '\r')
			*p = ' ';
	n += (int) strlen(line + n);
	line[n++] = '\n';
	if (!write_line(line, (size_t) n))
		atomic_fetch_add(&n_lost, 1);
}
