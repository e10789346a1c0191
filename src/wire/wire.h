/*
 * wire.h -- the one protocol between the extension (or anyone) and a helper program.
 *
 * A frame is a fixed header of 8 bytes, two little-endian uint32, length of the payload and
 * kind, and then the payload.  Payloads are UTF-8 JSON objects, except for WIRE_VECTOR (raw
 * little-endian float32).
 *
 * One conversation per connection:
 *
 *     client                          helper
 *     HELLO, REQUEST       ->
 *                          <-         HELLO
 *                          <-         PROGRESS* | TEXT* | VECTOR*
 *                          <-         RESULT or ERROR          (then the helper closes)
 *
 * HELLO is {"protocol": 1, "version": "1.0.0", "program": "millm.so" | "millm-engine" | ...}.
 * Either side that reads a protocol or version other than its own ends the conversation with
 * VERSION_MISMATCH.  A client that closes early cancels what it asked for, unless the request
 * is of the kind that belongs to the server (see protocol.md).
 *
 * This room allocates nothing and does no I/O: it is compiled into the extension (palloc) and
 * into the helpers (malloc), and works in the caller's buffers.
 */
#ifndef MILLM_WIRE_H
#define MILLM_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

#define WIRE_PROTOCOL			1
#define WIRE_HEADER_BYTES		8
/* Payload limits: what a helper accepts from a client, and a client from a helper. */
#define WIRE_MAX_REQUEST_BYTES	(16u << 20)
#define WIRE_MAX_REPLY_BYTES	(64u << 20)

typedef enum WireKind
{
	WIRE_HELLO = 1,
	WIRE_REQUEST = 2,			/* {"op": ..., arguments} */
	WIRE_PROGRESS = 3,			/* of a long job; fields depend on the op */
	WIRE_TEXT = 4,				/* {"text": ...}: the next piece of a generation */
	WIRE_VECTOR = 5,			/* raw float32 */
	WIRE_RESULT = 6,			/* final */
	WIRE_ERROR = 7				/* final: {"code": NAME, "message", "detail"?, "hint"?, "expected_wait_s"?} */
} WireKind;

typedef struct WireHeader
{
	uint32_t	length;			/* payload bytes */
	WireKind	kind;
} WireHeader;

/* Write a header of WIRE_HEADER_BYTES bytes to dst. */
extern void wire_put_header(void *dst, WireKind kind, uint32_t length);

/*
 * Read a header from WIRE_HEADER_BYTES bytes.  PROTOCOL_VIOLATION when the kind is none of the
 * above or the payload is longer than max_length.
 */
extern MillmCode wire_get_header(const void *src, uint32_t max_length, WireHeader *out, MillmError *err);

/*
 * Length of the JSON string literal (quotes included) that stands for text[0..len), and the
 * literal itself.  text is valid UTF-8.  wire_put_json_string() writes at most size bytes and
 * no terminator, and returns the bytes written, or 0 when size is too small.
 */
extern size_t wire_json_string_bytes(const char *text, size_t len);
extern size_t wire_put_json_string(char *dst, size_t size, const char *text, size_t len);

/* Write the payload of our HELLO for that program to dst (NUL-terminated); returns its length. */
extern size_t wire_put_hello(char *dst, size_t size, const char *program);
#define WIRE_HELLO_BYTES 128	/* enough for any hello */

#endif
