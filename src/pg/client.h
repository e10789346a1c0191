/*
 * client.h -- a Postgres process talks to a helper, politely.
 *
 * All waits are WaitLatchOrSocket + CHECK_FOR_INTERRUPTS, so a cancel, a timeout and a terminate
 * get through within milliseconds.  The socket is an external FD (AcquireExternalFD) closed by a
 * reset callback of the memory context that was current at connect: LIMIT, error and caught error
 * alike close it, and closing is canceling.
 */
#ifndef MILLM_CLIENT_H
#define MILLM_CLIENT_H

#include "postgres.h"

#include "lib/stringinfo.h"

#include "wire.h"

typedef enum MillmHelper {MILLM_ENGINE, MILLM_HUB} MillmHelper;

typedef struct MillmClient MillmClient;

/*
 * Connect, exchange HELLOs and send the request (a JSON object's text, in UTF-8).  ereports ENGINE_UNAVAILABLE or
 * HUB_UNAVAILABLE (with the helper's state and last exit from live.h) when nobody listens within timeout_ms,
 * VERSION_MISMATCH when the helper is of another build.  timeout_ms < 0: no limit (still interruptible).
 */
extern MillmClient *millm_client_open(MillmHelper helper, const char *request, int timeout_ms);

/*
 * Wait for the next frame and append its payload to out (reset first).  An ERROR frame, or a connection that ends
 * before a final frame, leaves as ereport.  After RESULT the client is spent.
 */
extern WireKind millm_client_receive(MillmClient *client, StringInfo out, int timeout_ms);

/* Close now; also done by the memory context.  NULL is fine. */
extern void millm_client_close(MillmClient *client);

/* The socket, for callers that wait for more than one thing. */
extern pgsocket millm_client_socket(MillmClient *client);

/*
 * The same without waiting and without ereport, for the supervisor's and the clerk's loops: returns WIRE_ERROR with the error
 * filled when the connection broke; 0 when no whole frame is there yet.
 */
extern int millm_client_poll(MillmClient *client, StringInfo out, MillmError *err);

/* Raise err with its SQLSTATE, detail and hint. */
extern void millm_ereport(int elevel, const MillmError *err);
/* Fill err from the payload of an ERROR frame. */
extern void millm_error_from_json(const char *json, MillmError *err);

#endif
