/*-------------------------------------------------------------------------
 * helper.c
 *	  The life of a helper program as the supervisor's child.
 *
 *     (start) --fork, exec--> STARTING --HELLO on fd 3--> READY
 *        ^                        |                          |
 *        |                        +------- it ended ---------+
 *        +--- restart_at ---- BACKOFF (or MISSING: there is no such program)
 *
 * Owns:     the process, both ends' descriptors, the tail of what it said, the delay before the next start.
 * Publishes: state, pid, restarts and last exit in shared memory.
 *
 * The delay doubles from RESTART_MIN_MS to RESTART_MAX_MS and falls back when a run has lasted STABLE_MS.
 * Between fork and exec the child calls only async-signal-safe functions.
 *-------------------------------------------------------------------------
 */
#include "helper.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libpq/pqsignal.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/memutils.h"

#include "compat.h"
#include "json.h"
#include "shmem.h"
#include "version.h"

#define RESTART_MIN_MS	200
#define RESTART_MAX_MS	60000
#define STABLE_MS		60000
#define STOP_WAIT_MS	2000
#define STARTING_MAX_MS	20000

static void
publish(MillmChild *child, MillmHelperState state)
{
	MillmHelperStatus *s = &millm_shared->helpers[child->which];

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	s->state = state;
	s->pid = child->pid;
	LWLockRelease(millm_shared->lock);
	millm_broadcast();
}

static void
publish_exit(MillmChild *child, const char *how)
{
	MillmHelperStatus *s = &millm_shared->helpers[child->which];

	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	strlcpy(s->last_exit, how, sizeof(s->last_exit));
	LWLockRelease(millm_shared->lock);
}

void
millm_child_init(MillmChild *child, MillmHelper which)
{
	memset(child, 0, sizeof(*child));
	child->which = which;
	child->program = which == MILLM_ENGINE ? "millm-engine" : "millm-hub";
	child->log_fd = child->control_fd = -1;
	child->delay_ms = RESTART_MIN_MS;
}

/* In the child, after fork: only async-signal-safe calls from here. */
static void
exec_helper(const char *path, char *const argv[], char *const envp[], int log_fd, int control_fd, pid_t parent)
{
	sigset_t	none;
	int			null_fd = open("/dev/null", O_RDONLY);

	setsid();
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(126);				/* the parent died before the line above */
	for (int sig = 1; sig < NSIG; sig++)
		if (sig != SIGKILL && sig != SIGSTOP)
			signal(sig, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* first out of the way of 0 to 3, then into place */
	log_fd = fcntl(log_fd, F_DUPFD, 10);
	control_fd = fcntl(control_fd, F_DUPFD, 10);
	if (null_fd < 0 || log_fd < 0 || control_fd < 0 ||
		dup2(null_fd, 0) < 0 || dup2(log_fd, 1) < 0 || dup2(log_fd, 2) < 0 || dup2(control_fd, 3) < 0)
		_exit(126);
#ifdef SYS_close_range
	if (syscall(SYS_close_range, 4u, ~0u, 0u) != 0)
#endif
		for (int fd = 4; fd < 4096; fd++)
			close(fd);
	execve(path, argv, envp);
	_exit(127);
}

static void
start(MillmChild *child)
{
	char		path[MAXPGPATH];
	const char *socket = millm_helper_socket(child->which);
	char	   *argv[] = {(char *) child->program, "serve", "--socket", (char *) socket, NULL};
	/* what a helper may know of our environment; never a credential */
	static const char *const passed[] = {"LANG", "LC_ALL", "TZ", "HOME", "PATH", "http_proxy", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY",
		"SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "MILLM_KERNELS",
		"LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"};	/* where containers have the GPU driver, and which GPUs it shows */
	char	   *envp[lengthof(passed) + 1];
	int			n = 0;
	int			log_pipe[2],
				control[2];
	pid_t		parent = getpid(),
				pid;

	child->started = GetCurrentTimestamp();
	snprintf(path, sizeof(path), "%s/millm/%s/%s", pkglib_path, MILLM_VERSION, child->program);
	if (access(path, X_OK) != 0)
	{
		MillmHelperStatus status;

		millm_helper_status(child->which, &status);
		if (status.state != MILLM_HELPER_MISSING)
			ereport(LOG, (errcode_for_file_access(), errmsg("could not start millm's helper program \"%s\": %m", path),
						  errhint("Install millm's helper programs beside the extension's library.")));
		child->restart_at = GetCurrentTimestamp() + RESTART_MAX_MS / 6 * INT64CONST(1000);
		publish(child, MILLM_HELPER_MISSING);
		return;
	}
	for (int i = 0; i < (int) lengthof(passed); i++)
	{
		const char *value = getenv(passed[i]);

		if (value)
			envp[n++] = psprintf("%s=%s", passed[i], value);
	}
	envp[n] = NULL;
	if (pipe2(log_pipe, O_CLOEXEC) != 0)
	{
		ereport(LOG, (errmsg("could not create a pipe for %s: %m", child->program)));
		child->restart_at = GetCurrentTimestamp() + child->delay_ms * INT64CONST(1000);
		return;
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) != 0)
	{
		ereport(LOG, (errmsg("could not create a socket for %s: %m", child->program)));
		close(log_pipe[0]);
		close(log_pipe[1]);
		child->restart_at = GetCurrentTimestamp() + child->delay_ms * INT64CONST(1000);
		return;
	}
	fflush(NULL);
	pid = fork();
	if (pid == 0)
		exec_helper(path, argv, envp, log_pipe[1], control[1], parent);
	close(log_pipe[1]);
	close(control[1]);
	for (int i = 0; i < n; i++)
		pfree(envp[i]);
	if (pid < 0)
	{
		ereport(LOG, (errmsg("could not fork %s: %m", child->program)));
		close(log_pipe[0]);
		close(control[0]);
		child->restart_at = GetCurrentTimestamp() + child->delay_ms * INT64CONST(1000);
		return;
	}
	fcntl(log_pipe[0], F_SETFL, O_NONBLOCK);
	fcntl(control[0], F_SETFL, O_NONBLOCK);
	child->pid = pid;
	child->log_fd = log_pipe[0];
	child->control_fd = control[0];
	child->line_len = child->tail_len = child->hello_len = 0;
	child->ready = false;
	child->verdict[0] = '\0';
	publish(child, MILLM_HELPER_STARTING);
}

/* One line of its log: "LEVEL text". */
static void
log_line(MillmChild *child, const char *line)
{
	static const struct
	{
		const char *name;
		int			level;
	}			levels[] = {{"LOG ", LOG}, {"WARNING ", WARNING}, {"ERROR ", LOG}, {"DEBUG ", DEBUG1}};
	int			level = LOG;

	for (int i = 0; i < (int) lengthof(levels); i++)
		if (strncmp(line, levels[i].name, strlen(levels[i].name)) == 0)
		{
			level = levels[i].level;
			line += strlen(levels[i].name);
			break;
		}
	if (line[0])
		ereport(level, (errmsg_internal("%s: %s", child->program, line)));
}

static void
read_log(MillmChild *child)
{
	char		buf[4096];
	ssize_t		n;

	/* bounded: a helper that writes without pause must not hold the supervisor */
	for (int round = 0; round < 16 && child->log_fd >= 0; round++)
	{
		n = read(child->log_fd, buf, sizeof(buf));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
		{
			if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
			{
				close(child->log_fd);
				child->log_fd = -1;
			}
			return;
		}
		if (child->tail_len + n > MILLM_TAIL_BYTES)
		{
			int			drop = child->tail_len + (int) n - MILLM_TAIL_BYTES;

			memmove(child->tail, child->tail + drop, child->tail_len - drop);
			child->tail_len -= drop;
		}
		memcpy(child->tail + child->tail_len, buf, n);
		child->tail_len += n;
		for (ssize_t i = 0; i < n; i++)
		{
			if (buf[i] != '\n' && child->line_len < (int) sizeof(child->line) - 1)
			{
				child->line[child->line_len++] = buf[i] ? buf[i] : ' ';
				continue;
			}
			child->line[child->line_len] = '\0';
			log_line(child, child->line);
			child->line_len = 0;
		}
	}
}

/* End it ourselves, and remember why. */
static void
condemn(MillmChild *child, const char *why)
{
	if (!child->verdict[0])
		strlcpy(child->verdict, why, sizeof(child->verdict));
	kill(child->pid, SIGKILL);
}

/* Its HELLO on fd 3: it listens, and it is of our version. */
static void
read_hello(MillmChild *child)
{
	WireHeader	header;
	MillmJson	hello;
	char	   *version;
	ssize_t		n = recv(child->control_fd, child->hello + child->hello_len, sizeof(child->hello) - child->hello_len, 0);

	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
	{
		close(child->control_fd);
		child->control_fd = -1;
		return;
	}
	if (n < 0 || child->ready)
		return;
	child->hello_len += n;
	if (child->hello_len < WIRE_HEADER_BYTES ||
		wire_get_header(child->hello, sizeof(child->hello) - WIRE_HEADER_BYTES, &header, NULL) != MILLM_OK ||
		child->hello_len < WIRE_HEADER_BYTES + (int) header.length)
		return;
	hello = millm_json(child->hello + WIRE_HEADER_BYTES, header.length);
	version = millm_json_get_string(hello, "version");
	if (!version || strcmp(version, MILLM_VERSION) != 0)
	{
		condemn(child, psprintf("it is of version %s, the server's millm library of version %s", version ? version : "unknown", MILLM_VERSION));
		return;
	}
	child->ready = true;
	publish(child, MILLM_HELPER_READY);
}

/* One line of valid UTF-8, in place: people read it through SQL. */
static void
make_text(char *s)
{
	for (char *p = s; *p; p++)
		if ((unsigned char) *p < ' ')
			*p = ' ';
	for (s += pg_encoding_verifymbstr(PG_UTF8, s, strlen(s)); *s; s += pg_encoding_verifymbstr(PG_UTF8, s, strlen(s)))
		*s++ = '?';
}

/* "killed by signal 9", and the last lines it wrote. */
static void
describe_exit(MillmChild *child, int status, char *buf, size_t size)
{
	int			n;
	int			from = Max(0, child->tail_len - 300);

	if (child->verdict[0])
		n = snprintf(buf, size, "ended by the supervisor: %s", child->verdict);
	else if (WIFSIGNALED(status))
		n = snprintf(buf, size, "killed by signal %d", WTERMSIG(status));
	else
		n = snprintf(buf, size, "exit status %d", WEXITSTATUS(status));
	while (from > 0 && from < child->tail_len && child->tail[from - 1] != '\n')
		from++;
	if (from < child->tail_len)
	{
		snprintf(buf + n, size - n, "; it said: %.*s", child->tail_len - from, child->tail + from);
		make_text(buf);
	}
}

static bool
notice_end(MillmChild *child)
{
	int			status;
	pid_t		pid = waitpid(child->pid, &status, WNOHANG);
	char		how[sizeof(millm_shared->helpers[0].last_exit)];
	TimestampTz now = GetCurrentTimestamp();

	if (pid != child->pid)
		return false;
	read_log(child);
	describe_exit(child, status, how, sizeof(how));
	ereport(LOG, (errmsg("%s (PID %d) ended: %s", child->program, (int) child->pid, how)));
	if (child->log_fd >= 0)
		close(child->log_fd);
	if (child->control_fd >= 0)
		close(child->control_fd);
	child->log_fd = child->control_fd = -1;
	child->pid = 0;
	child->ready = false;
	if (now - child->started > STABLE_MS * INT64CONST(1000))
		child->delay_ms = RESTART_MIN_MS;
	child->restart_at = now + child->delay_ms * INT64CONST(1000);
	child->delay_ms = Min(2 * child->delay_ms, RESTART_MAX_MS);
	LWLockAcquire(millm_shared->lock, LW_EXCLUSIVE);
	millm_shared->helpers[child->which].restarts++;
	LWLockRelease(millm_shared->lock);
	publish_exit(child, how);
	publish(child, MILLM_HELPER_BACKOFF);
	return true;
}

bool
millm_child_tend(MillmChild *child)
{
	if (child->pid == 0)
	{
		if (GetCurrentTimestamp() >= child->restart_at)
			start(child);
		return false;
	}
	if (child->log_fd >= 0)
		read_log(child);
	if (child->control_fd >= 0)
		read_hello(child);
	if (!child->ready && GetCurrentTimestamp() - child->started > STARTING_MAX_MS * INT64CONST(1000))
		condemn(child, "it did not become ready in time");
	return notice_end(child);
}

long
millm_child_timeout(const MillmChild *child)
{
	TimestampTz now = GetCurrentTimestamp();

	if (child->pid == 0)
		return Max(1, (long) ((child->restart_at - now) / 1000) + 1);
	/* its descriptors are gone but the process is not yet: look again soon */
	if (child->log_fd < 0 || child->control_fd < 0)
		return 10;
	return child->ready ? -1 : 1000;
}

void
millm_child_stop(MillmChild *child)
{
	int			status;

	if (child->pid == 0)
		return;
	kill(child->pid, SIGTERM);
	for (int waited = 0; waited < STOP_WAIT_MS; waited += 10)
	{
		if (waitpid(child->pid, &status, WNOHANG) == child->pid)
		{
			child->pid = 0;
			publish(child, MILLM_HELPER_STOPPED);
			return;
		}
		(void) WaitLatch(NULL, WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 10, PG_WAIT_EXTENSION);
	}
	kill(child->pid, SIGKILL);
	waitpid(child->pid, &status, 0);
	child->pid = 0;
	publish(child, MILLM_HELPER_STOPPED);
}
