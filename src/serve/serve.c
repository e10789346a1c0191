/*
 * serve.c -- the life of a helper process: set-up, the listening socket, the loop, the end.
 *
 * Started by the supervisor, fd 3 is our line to it: one HELLO says that we listen, its end says
 * that the supervisor is gone.  Started by hand, fd 3 is not a socket and there is no supervisor.
 * SIGTERM, SIGINT, the end of fd 3 and {"op":"shutdown"} all lead to the same orderly exit, which a
 * watchdog (SIGALRM, default action) bounds.
 */
#include "clock.h"
#include "conn.h"

#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SUPERVISOR_FD		3
#define SHUTDOWN_LIMIT_S	10	/* then the watchdog ends the process */
#define GOODBYE_MS			1000	/* for clients to take their last frames */
#define ACCEPT_PAUSE_MS		100	/* when we are out of descriptors */
#define OOM_SCORE_ADJ		"500"	/* the kernel should take us before any Postgres process */

typedef struct Process
{
	Server		server;
	const char *path;
	struct stat socket_stat;
	int			listener;
	struct event *acceptable;
	struct event *accept_again;
	struct event *woken;
	struct event *term;
	struct event *interrupt;
	struct event *supervisor;		/* NULL: by hand */
	bool		stopping;
} Process;

static void
stop(Process *p, const char *why)
{
	if (p->stopping)
		return;
	p->stopping = true;
	millm_log("LOG", "%s shuts down: %s", p->server.service->program, why);
	event_base_loopbreak(p->server.base);
}

static void
on_stop_request(Server *server)
{
	stop((Process *) server, "a client asked for it");
}

static void
on_signal(evutil_socket_t sig, short what, void *arg)
{
	(void) what;
	stop(arg, sig == SIGTERM ? "SIGTERM" : "SIGINT");
}

static void
on_supervisor(evutil_socket_t fd, short what, void *arg)
{
	char		buf[64];
	ssize_t		n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT);

	(void) what;
	if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
		return;					/* it has nothing to say to us; only its end counts */
	stop(arg, "the supervisor is gone");
}

static void
on_woken(evutil_socket_t fd, short what, void *arg)
{
	Process    *p = arg;
	uint64_t	n;

	(void) what;
	(void) !read(fd, &n, sizeof(n));
	conn_flush_dirty(&p->server);
}

static void
on_acceptable(evutil_socket_t fd, short what, void *arg)
{
	Process    *p = arg;

	(void) what;
	/* A few at a time, so that a storm of clients does not keep the others from being served. */
	for (int i = 0; i < 16; i++)
	{
		int			client = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (client >= 0)
			conn_open(&p->server, client);
		else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
		{
			struct timeval tv = {.tv_usec = ACCEPT_PAUSE_MS * 1000};

			millm_log("WARNING", "could not accept a client: %s", strerror(errno));
			event_del(p->acceptable);
			event_add(p->accept_again, &tv);
			return;
		}
		else if (errno == EAGAIN || errno == EWOULDBLOCK)
			return;
	}
}

static void
on_accept_again(evutil_socket_t fd, short what, void *arg)
{
	(void) fd;
	(void) what;
	event_add(((Process *) arg)->acceptable, NULL);
}

/* Listen on p->path with mode 0600, replacing a socket that nobody listens on. */
static bool
listen_on(Process *p)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	struct stat st;
	mode_t		mask;
	int			rc;

	if (strlen(p->path) >= sizeof(addr.sun_path))
	{
		millm_log("ERROR", "socket path \"%s\" is too long: %zu bytes, at most %zu", p->path,
				  strlen(p->path), sizeof(addr.sun_path) - 1);
		return false;
	}
	memcpy(addr.sun_path, p->path, strlen(p->path));
	if (lstat(p->path, &st) == 0)
	{
		int			probe;

		if (!S_ISSOCK(st.st_mode))
		{
			millm_log("ERROR", "\"%s\" exists and is not a socket", p->path);
			return false;
		}
		probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		rc = probe < 0 ? -1 : connect(probe, (struct sockaddr *) &addr, sizeof(addr));
		if (rc == 0 || errno == EAGAIN)
		{
			millm_log("ERROR", "another process listens on \"%s\"", p->path);
			if (probe >= 0)
				close(probe);
			return false;
		}
		if (probe >= 0)
			close(probe);
		unlink(p->path);
	}
	p->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	mask = umask(0177);
	rc = p->listener < 0 ? -1 : bind(p->listener, (struct sockaddr *) &addr, sizeof(addr));
	umask(mask);
	if (rc < 0 || listen(p->listener, 512) < 0 || stat(p->path, &p->socket_stat) < 0)
	{
		millm_log("ERROR", "could not listen on \"%s\": %s", p->path, strerror(errno));
		return false;
	}
	return true;
}

/* Tell the supervisor that we listen. */
static bool
say_ready(const MillmService *service)
{
	char		frame[WIRE_HEADER_BYTES + WIRE_HELLO_BYTES];
	size_t		len = wire_put_hello(frame + WIRE_HEADER_BYTES, WIRE_HELLO_BYTES, service->program);

	wire_put_header(frame, WIRE_HELLO, (uint32_t) len);
	len += WIRE_HEADER_BYTES;
	return send(SUPERVISOR_FD, frame, len, MSG_NOSIGNAL) == (ssize_t) len;
}

static void
set_up_process(bool supervised, bool raise_oom_score)
{
	struct rlimit limit;

	signal(SIGPIPE, SIG_IGN);
	json_object_seed(0);
	if (supervised)
	{
		prctl(PR_SET_PDEATHSIG, SIGTERM);
		fcntl(SUPERVISOR_FD, F_SETFD, FD_CLOEXEC);
	}
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max)
	{
		limit.rlim_cur = limit.rlim_max < 65536 ? limit.rlim_max : 65536;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	if (raise_oom_score)
	{
		int			fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

		if (fd < 0 || write(fd, OOM_SCORE_ADJ, strlen(OOM_SCORE_ADJ)) < 0)
			millm_log("WARNING", "could not raise oom_score_adj: %s", strerror(errno));
		if (fd >= 0)
			close(fd);
	}
}

/* Give the clients a moment to take their last frames, then close what is left. */
static void
say_goodbye(Process *p)
{
	int64_t		end = millm_now_ms() + GOODBYE_MS;

	p->server.ended = true;
	for (MillmConn *c = p->server.conns; c; c = c->next)
		event_del(c->readable);
	conn_flush_dirty(&p->server);
	for (;;)
	{
		struct timeval tv = {.tv_usec = 10000};
		bool		answering = false;

		pthread_mutex_lock(&p->server.lock);
		for (MillmConn *c = p->server.conns; c && !answering; c = c->next)
			answering = c->out_end > c->out_start;
		pthread_mutex_unlock(&p->server.lock);
		if (!answering || millm_now_ms() >= end)
			break;
		event_base_loopexit(p->server.base, &tv);
		event_base_dispatch(p->server.base);
	}
	while (p->server.conns)
		conn_close(p->server.conns);
	conn_flush_dirty(&p->server);	/* drops the list's references */
}

static struct event *
add_event(Process *p, int fd, short what, event_callback_fn fn)
{
	struct event *ev = event_new(p->server.base, fd, what, fn, p);

	if (!ev || event_add(ev, NULL) < 0)
	{
		millm_log("ERROR", "could not set up the event loop");
		exit(1);
	}
	return ev;
}

int
millm_serve(const MillmService *service, const char *socket_path, bool raise_oom_score)
{
	Process		p = {.path = socket_path, .listener = -1};
	struct stat st;
	bool		supervised = fstat(SUPERVISOR_FD, &st) == 0 && S_ISSOCK(st.st_mode);

	set_up_process(supervised, raise_oom_score);
	p.server.service = service;
	p.server.on_stop_request = on_stop_request;
	pthread_mutex_init(&p.server.lock, NULL);
	p.server.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	p.server.base = event_base_new();
	if (p.server.wake_fd < 0 || !p.server.base)
	{
		millm_log("ERROR", "could not set up the event loop");
		return 1;
	}
	if (!listen_on(&p))
		return 1;
	p.acceptable = add_event(&p, p.listener, EV_READ | EV_PERSIST, on_acceptable);
	p.accept_again = evtimer_new(p.server.base, on_accept_again, &p);
	p.woken = add_event(&p, p.server.wake_fd, EV_READ | EV_PERSIST, on_woken);
	p.term = add_event(&p, SIGTERM, EV_SIGNAL | EV_PERSIST, on_signal);
	p.interrupt = add_event(&p, SIGINT, EV_SIGNAL | EV_PERSIST, on_signal);
	if (supervised)
	{
		p.supervisor = add_event(&p, SUPERVISOR_FD, EV_READ | EV_PERSIST, on_supervisor);
		if (!say_ready(service))
			stop(&p, "the supervisor is gone");
	}
	millm_log("DEBUG", "%s listens on \"%s\"", service->program, socket_path);

	if (!p.stopping)
		event_base_dispatch(p.server.base);

	alarm(SHUTDOWN_LIMIT_S);
	event_free(p.acceptable);
	event_free(p.accept_again);
	close(p.listener);
	/* Ours may have been replaced by our successor's. */
	if (stat(socket_path, &st) == 0 && st.st_ino == p.socket_stat.st_ino && st.st_dev == p.socket_stat.st_dev)
		unlink(socket_path);
	service->on_shutdown(service->arg);
	say_goodbye(&p);
	if (p.supervisor)
		event_free(p.supervisor);
	event_free(p.interrupt);
	event_free(p.term);
	event_free(p.woken);
	event_base_free(p.server.base);
	close(p.server.wake_fd);
	pthread_mutex_destroy(&p.server.lock);
	return 0;
}
