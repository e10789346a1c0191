/*
 * server.h -- `millm-engine serve`: the requests of src/wire/protocol.md on a Unix socket.
 */
#ifndef MILLM_SERVER_H
#define MILLM_SERVER_H

/* Serve until shutdown; returns the exit status.  Call it before anything else opens descriptors. */
extern int	millm_engine_serve(const char *socket_path);

#endif
