/*
 * reply.c -- answers in JSON.
 */
#include "reply.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

/* Numbers as they were written, most of the time: 17 digits would make 0.1 another number to the eye */
#define DUMP_FLAGS (JSON_COMPACT | JSON_REAL_PRECISION(15))
/* Of a long message the end is cut; PostgreSQL's are shorter, but may quote what a client sent. */
#define MAX_MESSAGE 4096
/* A longer wait is so uncertain that a look in between does no harm. */
#define MAX_RETRY_AFTER_S 60

void
reply_json(HttpRequest *r, int status, json_t *body)
{
	char	   *text = json_dumps(body, DUMP_FLAGS);

	json_decref(body);
	if (text)
		http_reply(r, status, "application/json", text, strlen(text));
	else
		http_reply(r, 500, NULL, NULL, 0);
	free(text);
}

void
reply_event(HttpRequest *r, json_t *body)
{
	char	   *text = json_dumps(body, DUMP_FLAGS);
	char	   *event;
	int			n;

	json_decref(body);
	if (text && (n = asprintf(&event, "data: %s\n\n", text)) > 0)
	{
		http_stream_send(r, event, (size_t) n);
		free(event);
	}
	free(text);
}

static const char *
openai_type(int status)
{
	switch (status)
	{
		case 401:
			return "authentication_error";
		case 403:
			return "permission_error";
		case 429:
			return "rate_limit_error";
	}
	return status >= 500 ? "server_error" : "invalid_request_error";
}

/* A code as the shape has it: MODEL_NOT_FOUND in miLLM's, model_not_found in OpenAI's. */
static void
spell(char *dst, size_t size, const char *code, bool is_large)
{
	size_t		n = 0;

	for (; code[n] && n + 1 < size; n++)
	{
		if (is_large)
			dst[n] = (char) (code[n] >= 'a' && code[n] <= 'z' ? code[n] - 'a' + 'A' : code[n]);
		else
			dst[n] = (char) (code[n] >= 'A' && code[n] <= 'Z' ? code[n] - 'A' + 'a' : code[n]);
	}
	dst[n] = '\0';
}

/* wait_s: what the engine expects; 0: it has not said. */
static void
add_retry_after(HttpRequest *r, int wait_s)
{
	char		seconds[12];

	snprintf(seconds, sizeof(seconds), "%d", wait_s < 1 ? 1 : wait_s > MAX_RETRY_AFTER_S ? MAX_RETRY_AFTER_S : wait_s);
	http_add_header(r, "Retry-After", seconds);
}

void
reply_error(HttpRequest *r, int status, const char *code, const char *param, const char *fmt, ...)
{
	char		message[MAX_MESSAGE];
	char		spelt[64];
	json_t	   *text;
	json_t	   *body;
	va_list		ap;
	int			n;

	va_start(ap, fmt);
	n = vsnprintf(message, sizeof(message), fmt, ap);
	va_end(ap);
	if (n >= (int) sizeof(message))
	{
		n = (int) sizeof(message) - 1;
		while (n > 0 && ((unsigned char) message[n] & 0xC0) == 0x80)	/* not in the middle of a character */
			n--;
		message[n] = '\0';
	}
	if (!(text = json_string(message)))		/* not UTF-8: it quotes a path, or a server's message before its encoding is set */
		text = json_string("The request cannot be answered.");
	r->error_code = code;
	if (!r->is_streaming && (status == 429 || status == 503))
		add_retry_after(r, millm_expected_wait(message));
	if (!r->is_streaming && status == 401)
		http_add_header(r, "WWW-Authenticate", "Bearer");
	spell(spelt, sizeof(spelt), code, r->is_api);
	if (r->is_api)
		body = json_pack("{s:b, s:n, s:{s:s, s:o, s:{s:s?, s:s}}}", "success", 0, "data", "error", "code", spelt, "message", text,
						 "details", "param", param, "request_id", r->id);
	else
		body = json_pack("{s:{s:o, s:s, s:s?, s:s}}", "error", "message", text, "type", openai_type(status), "param", param, "code", spelt);
	if (r->is_streaming)
	{
		reply_event(r, body);
		http_stream_end(r);
	}
	else
		reply_json(r, status, body);
}
