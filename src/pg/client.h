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
 * HUB_UNAVAILABLE (with the helper's state and last exit from live.h) when nobody listens and the helper is not just
 * starting, or when it does not say HELLO within timeout_ms; VERSION_MISMATCH when the helper is of another build;
 * INVALID_ARGUMENT when the request is longer than WIRE_MAX_REQUEST_BYTES.  timeout_ms < 0: the client's own limit, 30 s.
 * The result lives in the current memory context.
 */
extern MillmClient *millm_client_open(MillmHelper helper, const char *request, int timeout_ms);

/*
 * Wait for the next frame and write its payload to out (reset first).  An ERROR frame, a connection that ends
 * before a final frame and timeout_ms without a frame leave as ereport, the socket closed.  timeout_ms < 0: no limit,
 * still interruptible.  After RESULT the client is spent.
 */
extern WireKind millm_client_receive(MillmClient *client, StringInfo out, int timeout_ms);

/*
 * The whole conversation of a request that is answered by one RESULT, whose payload is written to out (which may be
 * the buffer that the request is in).  timeout_ms as for millm_client_receive().
 */
extern void millm_client_call(MillmHelper helper, const char *request, StringInfo out, int timeout_ms);

/*
 * Send the rows that this query has produced to the SQL client, and wait until it has taken them: before the wait for
 * the next piece of a stream.  Does nothing when the output goes nowhere.  Errors and interrupts close the client first.
 */
extern void millm_client_flush_rows(MillmClient *client);

/* Close now; also done by the memory context.  NULL is fine. */
extern void millm_client_close(MillmClient *client);

/* The socket, for callers that wait for more than one thing. */
extern pgsocket millm_client_socket(MillmClient *client);

/*
 * The same without waiting and without ereport, for the supervisor's and the clerk's loops: returns the frame's kind, its
 * payload in out; 0 when no whole frame is there yet; WIRE_ERROR with err filled when the helper answered so or
 * the connection broke.
 */
extern int	millm_client_poll(MillmClient *client, StringInfo out, MillmError *err);

/*
 * One sleep of a loop that polls the engine: until client's socket has something to read, something wants our attention, or timeout_ms (< 0: a second)
 * are over; the caller looks which.  client NULL: without a socket.  Serves interrupts, and looks after the SQL client.
 */
extern void millm_client_sleep(MillmClient *client, int timeout_ms);

/* Whether this process has the descriptors for one connection more. */
extern bool millm_client_can_open(void);

/*
 * Requests that compute (generate, embed, score) begin with their op and the role that asks, for the engine to be fair between roles, and are counted
 * when they end (stat.h), whichever way that is: millm_begin_compute() begins the text, the other two are millm_client_open() and
 * millm_client_call() of the engine, without a limit of time.
 */
extern void millm_begin_compute(StringInfo request, const char *op);
extern MillmClient *millm_compute_open(const char *request);
extern void millm_compute_call(const char *request, StringInfo out);

/*
 * Texts of SQL in requests and replies.  Append value as a JSON string, in UTF-8; INVALID_ARGUMENT when it is longer than
 * any request may be.  A reply's field as a text in the database's encoding (a character that has none there is
 * PostgreSQL's error for it).  millm_reply_invalid(): PROTOCOL_VIOLATION, the reply lacks what.
 */
extern void millm_append_text(StringInfo request, const text *value);
/*
 * Append the field "model_uuid" of the loaded model, when wanted (a name, or an id in digits) means that one.  Another one is an error, not a
 * swap; the engine compares the uuid again, because the model may change before the request arrives.
 */
extern void millm_append_model(StringInfo request, const text *wanted);
extern text *millm_reply_text(StringInfo reply, const char *field);
extern void millm_reply_invalid(const char *what) __attribute__((noreturn));

/* Raise err with its SQLSTATE, detail and hint. */
extern void millm_ereport(int elevel, const MillmError *err);
/* Raise an error of these texts; detail and hint may be NULL. */
extern void millm_refuse(MillmCode code, const char *message, const char *detail, const char *hint) __attribute__((noreturn));
/*
 * One of the statement's arguments is a secret (if is_secret): until error_context_stack is set back to context->previous, or an error has left
 * the function, no message brings the statement into the server's log.
 */
extern void millm_hide_statement(ErrorContextCallback *context, bool is_secret);
/* Fill err from the payload of an ERROR frame. */
extern void millm_error_from_json(const char *json, MillmError *err);

#endif
