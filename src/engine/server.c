/*
 * server.c -- the requests of protocol.md, from the event loop to the engine and back.
 *
 * The loop's thread reads the fields and hands the work over.  Texts up to QUICK_TEXT_BYTES are encoded right there,
 * for their time is less than a hop; longer ones go to the worker, so that tokenizing megabytes delays no token.
 *
 * A generate request's connection owns a reference to its MillmRequest (the connection's data), so that
 * closing can cancel it; the request's Call owns a reference to the connection until the final frame is sent.
 */
#include "server.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "embedding.h"
#include "engine.h"
#include "scoring.h"
#include "serve.h"
#include "version.h"
#include "worker.h"

#define QUICK_TEXT_BYTES	(16 << 10)
#define QUICK_IDS			4096
#define MAX_QUEUED_TEXTS	4096		/* conversations and long texts that wait for the worker */
#define MAX_QUEUED_BYTES	((size_t) 256 << 20)	/* of them together; one has up to WIRE_MAX_REQUEST_BYTES */
#define MAX_TEXTS			1024		/* of one request for embeddings or scores */
#define MAX_PENDING_BYTES	(1u << 20)	/* of a stream's unread frames; beyond it the sequence pauses */
#define MAX_TIMEOUT_MS		(24 * 3600 * 1000)

typedef struct EngineServer
{
	MillmEngine *engine;
	MillmWorker *worker;
} EngineServer;

/* One request under way, of whatever op. */
typedef struct Call
{
	EngineServer *server;
	MillmConn  *conn;			/* a reference */
	MillmRequest *generation;	/* a reference; generate, embed and score only */
	const MillmLoaded *loaded;	/* a reference; text ops, and a chat that has to be rendered */
	json_t	   *chat;			/* ours alone: the fields of a conversation */
	char	   *text;			/* a prompt, or what to encode; a copy, for jansson's objects stay on the loop's thread */
	size_t		len;
	char	   *texts;			/* embed, score: all of them, one after the other */
	size_t	   *ends;			/* [n_texts]: where each ends in texts */
	size_t		n_texts;
	int64_t		first_text;		/* its number, for errors; 0: none */
	int32_t    *ids;			/* what to decode */
	size_t		n_ids;
	bool		add_special;
	bool		parse_special;	/* of the text; a rendered chat has origins instead */
	bool		counts;			/* count_tokens: the number, not the ids */
	bool		embeds;			/* and of the text as embeddings are made of it */
	MillmAnswerForm form;		/* generate */
	char	   *name;			/* load, unload: for the log; plan, inspect: the path */
	MillmLoadOptions load;		/* plan, with the two below */
	const char *quantization;	/* static, or NULL */
	bool		must_fit;
} Call;

static void
free_call(Call *call)
{
	millm_conn_unref(call->conn);
	millm_request_unref(call->generation);
	millm_loaded_release(call->loaded);
	json_decref(call->chat);
	free(call->text);
	free(call->texts);
	free(call->ends);
	free(call->ids);
	free(call->name);
	free(call);
}

/* NULL, with the client told, when memory is out. */
static Call *
new_call(EngineServer *server, MillmConn *conn)
{
	Call	   *call = calloc(1, sizeof(*call));
	MillmError	err;

	if (!call)
	{
		millm_fail(&err, MILLM_E_INTERNAL, "out of memory");
		millm_conn_error(conn, &err);
		return NULL;
	}
	call->server = server;
	call->conn = millm_conn_ref(conn);
	return call;
}

static MillmCode
keep_text(Call *call, const char *text, size_t len, MillmError *err)
{
	call->text = malloc(len + 1);
	if (!call->text)
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	memcpy(call->text, text, len);
	call->len = len;
	return MILLM_OK;
}

static MillmCode
keep_ids(Call *call, json_t *array, MillmError *err)
{
	size_t		n = json_array_size(array);

	call->ids = malloc((n + 1) * sizeof(*call->ids));
	if (!call->ids)
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	for (; call->n_ids < n; call->n_ids++)
	{
		json_t	   *id = json_array_get(array, call->n_ids);

		if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX)
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "field \"ids\" must be an array of token ids");
			millm_detail(err, "Element %zu is not one.", call->n_ids);
			return MILLM_E_INVALID_ARGUMENT;
		}
		call->ids[call->n_ids] = (int32_t) json_integer_value(id);
	}
	return MILLM_OK;
}

/* The last frame of a call. */
static void
end_with_error(Call *call, const MillmError *err)
{
	millm_conn_error(call->conn, err);
	free_call(call);
}

static void
end_with_result(Call *call, json_t *result)
{
	millm_conn_result(call->conn, result);
	free_call(call);
}

static void
too_many_texts(MillmError *err)
{
	millm_fail(err, MILLM_E_SERVER_BUSY, "too many texts and questions are waiting for the engine's worker");
	millm_detail(err, "At most %d may wait, of %zu bytes together.", MAX_QUEUED_TEXTS, MAX_QUEUED_BYTES);
}

static size_t
texts_len(const Call *call)
{
	return call->n_texts > 0 ? call->ends[call->n_texts - 1] : 0;
}

/* Have the worker do it; false when too many wait for that. */
static bool
post(Call *call, MillmWorkFn fn)
{
	const size_t chat = call->chat ? json_dumpb(call->chat, NULL, 0, 0) : 0;

	return millm_worker_post(call->server->worker, fn, call, call->len + texts_len(call) + call->n_ids * sizeof(call->ids[0]) + chat);
}

/* Every op begins so: its name is one of the fields. */
static void
begin_fields(MillmFields *f, json_t *request, MillmError *err)
{
	const char *op;

	millm_fields_begin(f, request, err);
	millm_field_string(f, "op", &op);
}

/* ---- status -------------------------------------------------------------------------------- */

static json_t *
string_or_null(const char *s)
{
	json_t	   *value = s ? json_string(s) : NULL;

	return value ? value : json_null();
}

static json_t *
integer_or_null(bool known, int64_t n)
{
	return known ? json_integer(n) : json_null();
}

static void
op_status(EngineServer *server, MillmConn *conn, json_t *request)
{
	static const char *const states[] = {"idle", "loading", "loaded", "unloading"};
	MillmFields f;
	MillmError	err;
	MillmEngineStatus st;
	const MillmLoaded *m;

	begin_fields(&f, request, &err);
	if (millm_fields_end(&f) != MILLM_OK)
	{
		millm_conn_error(conn, &err);
		return;
	}
	millm_engine_status(server->engine, &st);
	m = st.loaded;
	millm_conn_result(conn, json_pack("{s:s, s:i, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
									  "state", states[st.state],
									  "pid", (int) getpid(),
									  "version", MILLM_VERSION,
									  "kernels", string_or_null(m ? m->kernels : NULL),
									  "threads", integer_or_null(m, m ? m->threads : 0),
									  "deterministic", m ? json_boolean(m->deterministic) : json_null(),
									  "prefix_cache", m ? json_boolean(m->prefix_cache) : json_null(),
									  "device", string_or_null(m ? m->device.name : NULL),
									  "device_reason", string_or_null(m ? m->device.reason : NULL),
									  "model", string_or_null(m ? m->name : NULL),
									  "model_uuid", string_or_null(m ? m->uuid : NULL),
									  "path", string_or_null(m ? m->path : NULL),
									  "context_length", integer_or_null(m, m ? m->context_length : 0),
									  "running", st.running,
									  "waiting", st.waiting,
									  "pages_total", integer_or_null(m, m ? m->pages_total : 0),
									  "pages_free", integer_or_null(m && st.pages_free >= 0, st.pages_free),
									  "pages_cached", integer_or_null(m && st.pages_cached >= 0, st.pages_cached),
									  "drafted_tokens", integer_or_null(m, st.drafted_tokens),
									  "accepted_tokens", integer_or_null(m, st.accepted_tokens),
									  "weights_bytes", integer_or_null(m, m ? m->weights_bytes : 0),
									  "kv_cache_dtype", string_or_null(m ? m->kv_dtype : NULL),
									  "kv_bytes", integer_or_null(m, m ? m->kv_bytes : 0),
									  "loaded_at", integer_or_null(m, m ? m->loaded_at : 0)));
	millm_loaded_release(m);
}

/* ---- load and unload ----------------------------------------------------------------------- */

static void
load_progress(void *arg, const char *stage, int percent)
{
	Call	   *call = arg;

	millm_conn_send(call->conn, WIRE_PROGRESS, json_pack("{s:s, s:i}", "stage", stage, "progress", percent));
}

static void
load_done(void *arg, const MillmLoaded *m)
{
	json_t	   *warnings = json_array();

	for (int i = 0; i < m->n_warnings; i++)
	{
		millm_log("WARNING", "model \"%s\": %s", m->name, m->warnings[i]);
		json_array_append_new(warnings, json_string(m->warnings[i]));
	}
	millm_log("LOG", "loaded model \"%s\": %s, %.1f MB of weights, %.1f MB of KV cache (%s), on %s (%s), kernels %s, %d threads, %.0f ms",
			  m->name, m->model->config.model_type, (double) m->weights_bytes / 1e6, (double) m->kv_bytes / 1e6,
			  m->kv_dtype, m->device.name, m->device.reason, m->kernels, m->threads, m->load_ms);
	end_with_result(arg, json_pack("{s:s, s:o, s:f, s:I, s:I, s:I, s:i, s:i, s:o}", "device", m->device.name, "fingerprint",
								   json_sprintf("%s/%s/millm-" MILLM_VERSION "-%s%s", m->name, millm_model_quantization(m->model), m->kernels,
												strcmp(m->kv_dtype, "int8") == 0 ? "-kv-int8" : ""),
								   "load_ms", m->load_ms,
								   "weights_bytes", (json_int_t) m->weights_bytes, "kv_bytes", (json_int_t) m->kv_bytes,
								   "private_bytes", (json_int_t) m->private_bytes, "context_length", m->context_length,
								   "max_sequences", m->max_sequences, "warnings", warnings));
}

static void
load_failed(void *arg, const MillmError *err)
{
	Call	   *call = arg;

	millm_log("WARNING", "could not load model \"%s\": %s", call->name, err->message);
	end_with_error(call, err);
}

static void
unload_progress(void *arg, const char *stage, int pending)
{
	Call	   *call = arg;

	millm_conn_send(call->conn, WIRE_PROGRESS, json_pack("{s:s, s:i}", "stage", stage, "pending", pending));
}

static void
unload_done(void *arg, const char *name, int64_t freed_bytes)
{
	millm_log("LOG", "unloaded model \"%s\"", name);
	end_with_result(arg, json_pack("{s:o, s:o}", "model", string_or_null(name), "freed_bytes", integer_or_null(freed_bytes >= 0, freed_bytes)));
}

static void
unload_failed(void *arg, const MillmError *err)
{
	end_with_error(arg, err);
}

/* What load and plan have in common: which model, and the options that decide how much memory it takes. */
typedef struct LoadFields
{
	int64_t		context_length;
	int64_t		max_sequences;
} LoadFields;

static void
read_load_fields(MillmFields *f, MillmLoadOptions *o, LoadFields *n)
{
	const char *device = NULL;
	const char *kv_cache_dtype = NULL;

	*n = (LoadFields) {.max_sequences = o->max_sequences};
	millm_field_string(f, "path", &o->path);
	millm_field_string(f, "model", &o->model);
	millm_field_int(f, "context_length", 0, MILLM_MAX_POSITIONS, &n->context_length);
	millm_field_int(f, "max_sequences", 1, 1024, &n->max_sequences);
	millm_field_int(f, "kv_cache_bytes", 0, INT64_MAX, &o->kv_cache_bytes);
	millm_field_string(f, "device", &device);
	if (device && f->code == MILLM_OK)
		f->code = millm_device_wish(device, &o->device, f->err);
	millm_field_string(f, "kv_cache_dtype", &kv_cache_dtype);
	if (kv_cache_dtype && f->code == MILLM_OK)
		f->code = millm_kv_format(kv_cache_dtype, &o->kv_format, f->err);
	o->context_length = (int) n->context_length;
	o->max_sequences = (int) n->max_sequences;
}

static void
op_load(EngineServer *server, MillmConn *conn, json_t *request)
{
	MillmLoadOptions o;
	MillmLoadSink sink = {.progress = load_progress, .loaded = load_done, .failed = load_failed};
	MillmFields f;
	MillmError	err;
	LoadFields	n;
	int64_t		threads = 0;
	int64_t		max_queue;
	int64_t		stall_ms;
	int64_t		draft_tokens;
	Call	   *call;

	millm_load_options_init(&o);
	max_queue = o.max_queue;
	stall_ms = o.stream_stall_timeout_ms;
	draft_tokens = o.draft_tokens;
	begin_fields(&f, request, &err);
	read_load_fields(&f, &o, &n);
	millm_field_string(&f, "model_uuid", &o.model_uuid);
	millm_field_int(&f, "threads", 0, 1024, &threads);
	millm_field_int(&f, "max_queue", 0, 65536, &max_queue);
	millm_field_int(&f, "stream_stall_timeout_ms", 1, MAX_TIMEOUT_MS, &stall_ms);
	millm_field_bool(&f, "deterministic", &o.deterministic);
	millm_field_bool(&f, "prefix_cache", &o.prefix_cache);
	millm_field_int(&f, "draft_tokens", 0, MILLM_MAX_DRAFT_TOKENS, &draft_tokens);
	millm_field_bool(&f, "may_write", &o.may_write);
	millm_field_bool(&f, "force", &o.force);
	o.threads = (int) threads;
	o.max_queue = (int) max_queue;
	o.stream_stall_timeout_ms = (int) stall_ms;
	o.draft_tokens = (int) draft_tokens;
	if (millm_fields_end(&f) != MILLM_OK)
	{
		millm_conn_error(conn, &err);
		return;
	}
	if (!o.path)
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "field \"path\" is missing");
		millm_conn_error(conn, &err);
		return;
	}

	call = new_call(server, conn);
	if (!call)
		return;
	call->name = strdup(o.model ? o.model : o.path);
	sink.arg = call;
	if (!call->name)
	{
		millm_fail(&err, MILLM_E_INTERNAL, "out of memory");
		end_with_error(call, &err);
	}
	else if (millm_engine_load(server->engine, &o, &sink, &err) != MILLM_OK)
		end_with_error(call, &err);
}

static void
op_unload(EngineServer *server, MillmConn *conn, json_t *request)
{
	MillmLoadSink sink = {.progress = unload_progress, .unloaded = unload_done, .failed = unload_failed};
	MillmFields f;
	MillmError	err;
	int64_t		timeout_ms = 30000;
	Call	   *call;

	begin_fields(&f, request, &err);
	millm_field_int(&f, "timeout_ms", 0, MAX_TIMEOUT_MS, &timeout_ms);
	if (millm_fields_end(&f) != MILLM_OK)
	{
		millm_conn_error(conn, &err);
		return;
	}
	call = new_call(server, conn);
	if (!call)
		return;
	sink.arg = call;
	if (millm_engine_unload(server->engine, (int) timeout_ms, &sink, &err) != MILLM_OK)
		end_with_error(call, &err);
}

static void
op_cancel_load(EngineServer *server, MillmConn *conn, json_t *request)
{
	MillmFields f;
	MillmError	err;

	begin_fields(&f, request, &err);
	if (millm_fields_end(&f) != MILLM_OK)
	{
		millm_conn_error(conn, &err);
		return;
	}
	millm_engine_cancel_load(server->engine);
	millm_conn_result(conn, json_object());
}

/* ---- chat: fields of a conversation, rendered on the worker --------------------------------- */

/* Read them; what is not there stays out of the object that keep_chat() makes. */
typedef struct ChatFields
{
	json_t	   *messages;
	json_t	   *tools;
	json_t	   *documents;
	json_t	   *kwargs;
	const char *template_name;
	bool		add_generation_prompt;
} ChatFields;

static void
read_chat(MillmFields *f, ChatFields *c)
{
	c->add_generation_prompt = true;
	millm_field_array(f, "messages", &c->messages);
	millm_field_array(f, "tools", &c->tools);
	millm_field_array(f, "documents", &c->documents);
	millm_field_object(f, "template_kwargs", &c->kwargs);
	millm_field_string(f, "chat_template", &c->template_name);
}

/* A copy, for the request's own objects stay on the loop's thread. */
static MillmCode
keep_chat(Call *call, const MillmLoaded *loaded, const ChatFields *c, MillmError *err)
{
	call->chat = json_pack("{s:o, s:o*, s:o*, s:o*, s:s*, s:b}", "messages", json_deep_copy(c->messages), "tools", json_deep_copy(c->tools),
						   "documents", json_deep_copy(c->documents), "template_kwargs", json_deep_copy(c->kwargs),
						   "chat_template", c->template_name, "add_generation_prompt", c->add_generation_prompt);
	call->loaded = millm_loaded_ref(loaded);
	return call->chat ? MILLM_OK : millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

static MillmCode
render(const Call *call, MillmRendering *out, MillmError *err)
{
	MillmChatOptions o = {
		.template_name = json_string_value(json_object_get(call->chat, "chat_template")),
		.messages = json_object_get(call->chat, "messages"),
		.tools = json_object_get(call->chat, "tools"),
		.documents = json_object_get(call->chat, "documents"),
		.kwargs = json_object_get(call->chat, "template_kwargs"),
		.add_generation_prompt = json_is_true(json_object_get(call->chat, "add_generation_prompt")),
	};

	return millm_templates_apply(call->loaded->templates, &o, time(NULL), out, err);
}

/* ---- generate ------------------------------------------------------------------------------ */

/* Queue what was written, or send why it cannot be sent; free it. */
static void
queue_answer(Call *call, WireKind kind, MillmAnswer *answer)
{
	MillmError	err;

	if (!answer->has_failed)
		millm_conn_queue_bytes(call->conn, kind, answer->json, answer->n);
	else
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the answer is too large");
		millm_detail(&err, "At most %u bytes are sent in one piece, if there is memory for them.", WIRE_MAX_REPLY_BYTES);
		millm_hint(&err, "Ask for fewer tokens, or stream the text.");
		millm_conn_error(call->conn, &err);
		millm_engine_cancel(call->server->engine, call->generation);
	}
	free(answer->json);
}

static void
generate_piece(void *arg, const MillmPiece *piece)
{
	Call	   *call = arg;
	MillmAnswer row = {0};

	/* without choices, the result says what the last piece does */
	if (piece->is_last && !call->form.has_choices)
		return;
	millm_answer_row(&row, &call->form, piece);
	queue_answer(call, WIRE_TEXT, &row);
}

static void
generate_flush(void *arg)
{
	millm_conn_flush(((Call *) arg)->conn);
}

static bool
generate_is_behind(void *arg, int *stalled_ms)
{
	Call	   *call = arg;

	*stalled_ms = millm_conn_stalled_ms(call->conn);
	return millm_conn_pending_bytes(call->conn) > MAX_PENDING_BYTES;
}

static void
generate_done(void *arg, const MillmResult *r)
{
	Call	   *call = arg;
	MillmAnswer answer = {0};

	millm_answer_result(&answer, &call->form, r);
	queue_answer(call, WIRE_RESULT, &answer);
	millm_conn_flush(call->conn);
	free_call(call);
}

static void
generate_failed(void *arg, const MillmError *err)
{
	Call	   *call = arg;
	const MillmTiming t = millm_request_timing(call->generation);
	json_t	   *payload = millm_error_json(err);

	json_object_set_new(payload, "queue_ms", json_real(t.queue_ms));
	json_object_set_new(payload, "compute_ms", json_real(t.compute_ms));
	millm_conn_send(call->conn, WIRE_ERROR, payload);
	free_call(call);
}

/* Who asks: as the extension says, the OID of a role. */
static void
read_role(MillmFields *f, MillmSink *sink)
{
	int64_t		role = 0;

	millm_field_int(f, "role", 0, UINT32_MAX, &role);
	sink->role = (uint32_t) role;
}

/*
 * Hand the accepted request over, its conversation rendered: what is to be continued, and the labels that are to be scored, if there are some.
 */
static void
submit(void *arg, bool is_ending)
{
	Call	   *call = arg;
	MillmEngine *engine = call->server->engine;
	char	   *text = call->text;
	char	   *labels = call->texts;
	size_t	   *ends = call->ends;
	const MillmTexts texts = {.bytes = labels, .ends = ends, .n = call->n_texts};
	MillmPrompt prompt = {.text = text, .len = call->len, .plain = !call->parse_special};
	MillmRendering rendering = {0};
	MillmError	err;

	call->text = call->texts = NULL;
	call->ends = NULL;
	if (is_ending)
		millm_engine_cancel(engine, call->generation);
	/* The call may be gone when its request has been handed over or refused. */
	if (!is_ending && call->chat && render(call, &rendering, &err) != MILLM_OK)
		millm_engine_refuse(engine, call->generation, &err);
	else
	{
		if (rendering.text)
			prompt = (MillmPrompt) {.text = rendering.text, .len = rendering.n, .origins = rendering.origins};
		if (ends)
			millm_engine_submit_labels(engine, call->generation, &prompt, &texts);
		else
			millm_engine_submit(engine, call->generation, &prompt);
	}
	millm_rendering_free(&rendering);
	free(text);
	free(labels);
	free(ends);
}

/*
 * The call's request is accepted: from here on it ends through its sink, and closing the connection cancels it.  What takes a while to encode is
 * done on the worker.
 */
static void
start(Call *call, MillmWorkFn submit_it)
{
	EngineServer *server = call->server;
	const size_t prompts = call->len * (call->n_texts > 0 ? call->n_texts : 1);	/* it is encoded with each label */
	MillmRequest *r = millm_request_ref(call->generation);
	MillmError	err;

	millm_conn_set_data(call->conn, r);
	if (!call->chat && prompts <= QUICK_TEXT_BYTES && texts_len(call) <= QUICK_TEXT_BYTES)
		submit_it(call, false);
	else if (!post(call, submit_it))
	{
		too_many_texts(&err);
		millm_engine_refuse(server->engine, r, &err);
	}
}

/* Is the loaded model the one that the request names? */
static MillmCode
check_model(const MillmLoaded *loaded, const char *uuid, MillmError *err)
{
	if (!uuid || (loaded->uuid && strcmp(uuid, loaded->uuid) == 0))
		return MILLM_OK;
	millm_fail(err, MILLM_E_MODEL_NOT_LOADED, "the model that was asked for is not loaded");
	millm_detail(err, "The loaded model is \"%s\".", loaded->name);
	millm_hint(err, "Load it first.");
	return MILLM_E_MODEL_NOT_LOADED;
}

/*
 * A prompt that is not raw is a user's message if the model knows messages; what it knows only as text is continued as it is,
 * and cannot have a system message.
 */
static MillmCode
keep_prompt(Call *call, const MillmLoaded *loaded, const char *prompt, size_t len, const char *system, size_t system_len, bool raw, MillmError *err)
{
	json_t	   *messages;

	if (raw || !loaded->templates)
	{
		if (system && raw)
			return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "a raw prompt has no system message");
		if (system)
		{
			millm_fail(err, MILLM_E_UNSUPPORTED, "model \"%s\" has no chat template, so it knows no system message", loaded->name);
			millm_hint(err, "Write the instructions into the prompt.");
			return MILLM_E_UNSUPPORTED;
		}
		return keep_text(call, prompt, len, err);
	}
	messages = json_array();
	if (system)
		json_array_append_new(messages, json_pack("{s:s, s:s%}", "role", "system", "content", system, system_len));
	json_array_append_new(messages, json_pack("{s:s, s:s%}", "role", "user", "content", prompt, len));
	call->chat = json_pack("{s:o, s:b}", "messages", messages, "add_generation_prompt", true);
	call->loaded = millm_loaded_ref(loaded);
	return call->chat ? MILLM_OK : millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

/* What people write into a conversation is text: who asks for the contrary is refused. */
static MillmCode
check_parse_special(const Call *call, const json_t *parse_special, MillmError *err)
{
	if (!call->chat || !json_is_true(parse_special))
		return MILLM_OK;
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "parse_special needs a raw prompt");
	millm_detail(err, "In a conversation only the chat template writes special tokens.");
	return MILLM_E_INVALID_ARGUMENT;
}

static MillmCode
read_stops(json_t *array, MillmGenerateOptions *o, MillmError *err)
{
	size_t		n = json_array_size(array);

	if (n > MILLM_MAX_STOPS)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "too many stop sequences");
		millm_detail(err, "There are %zu; at most %d are accepted.", n, MILLM_MAX_STOPS);
		return MILLM_E_INVALID_ARGUMENT;
	}
	for (size_t i = 0; i < n; i++)
	{
		json_t	   *stop = json_array_get(array, i);
		const char *text = json_string_value(stop);

		if (!text || strlen(text) != json_string_length(stop))
			return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "field \"stop\" must be an array of strings without U+0000");
		o->stops[o->n_stops++] = text;
	}
	return MILLM_OK;
}

static bool
is_given(const json_t *request, const char *name)
{
	const json_t *value = json_object_get(request, name);

	return value && !json_is_null(value);
}

/* An object of token ids and numbers; which ids there are is the model's matter. */
static MillmCode
read_logit_bias(json_t *object, MillmGenerateOptions *o, MillmError *err)
{
	const char *key;
	json_t	   *value;

	if (json_object_size(object) > MILLM_MAX_LOGIT_BIASES)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "too many entries in logit_bias");
		millm_detail(err, "There are %zu; at most %d are accepted.", json_object_size(object), MILLM_MAX_LOGIT_BIASES);
		return MILLM_E_INVALID_ARGUMENT;
	}
	json_object_foreach(object, key, value)
	{
		char	   *end;
		long		id = strtol(key, &end, 10);
		char		canonical[24];

		snprintf(canonical, sizeof(canonical), "%ld", id);
		if (strcmp(canonical, key) != 0 || id < 0 || id > INT32_MAX || !json_is_number(value))
		{
			millm_fail(err, MILLM_E_INVALID_ARGUMENT, "logit_bias must be an object of token ids and numbers");
			millm_detail(err, "The entry \"%.50s\" is not such a pair.", key);
			return MILLM_E_INVALID_ARGUMENT;
		}
		o->logit_bias[o->n_logit_bias++] = (MillmLogitBias) {(int32_t) id, (float) json_number_value(value)};
	}
	return MILLM_OK;
}

static void
read_options(MillmFields *f, MillmGenerateOptions *o)
{
	int64_t		seed = INT64_MIN;
	int64_t		top_k = o->top_k;
	int64_t		max_tokens = o->max_tokens;

	/* The ranges are request.c's, which words them better; -1 is its "not given", so it is refused here. */
	millm_field_int(f, "max_tokens", 1, INT32_MAX, &max_tokens);
	millm_field_double(f, "temperature", 0, MILLM_MAX_TEMPERATURE, &o->temperature);
	millm_field_int(f, "top_k", 0, MILLM_MAX_TOP_K, &top_k);
	millm_field_double(f, "top_p", 0, 1, &o->top_p);
	millm_field_double(f, "min_p", 0, 1, &o->min_p);
	millm_field_double(f, "repetition_penalty", 0.01, 100, &o->repetition_penalty);
	millm_field_double(f, "frequency_penalty", -2, 2, &o->frequency_penalty);
	millm_field_double(f, "presence_penalty", -2, 2, &o->presence_penalty);
	millm_field_int(f, "seed", INT64_MIN, INT64_MAX, &seed);
	o->has_seed = is_given(f->object, "seed");
	o->seed = seed;
	millm_field_int(f, "n", 1, MILLM_MAX_CHOICES, &o->n);
	millm_field_bool(f, "logprobs", &o->logprobs);
	millm_field_int(f, "top_logprobs", 0, MILLM_MAX_TOP_LOGPROBS, &o->top_logprobs);
	o->top_k = top_k;
	o->max_tokens = max_tokens;
}

static void
op_generate(EngineServer *server, MillmConn *conn, json_t *request)
{
	MillmGenerateOptions o;
	MillmSink	sink = {.flush = generate_flush, .done = generate_done, .failed = generate_failed, .is_behind = generate_is_behind};
	MillmFields f;
	MillmError	err;
	ChatFields	chat = {0};
	const char *uuid = NULL;
	const char *prompt = NULL;
	const char *system = NULL;
	size_t		len = 0;
	size_t		system_len = 0;
	bool		raw = true;
	bool		stream = false;
	bool		parse_special = true;
	json_t	   *stops = NULL;
	json_t	   *logit_bias = NULL;
	Call	   *call;
	const MillmLoaded *loaded = NULL;

	millm_generate_options_init(&o);
	begin_fields(&f, request, &err);
	millm_field_text(&f, "prompt", &prompt, &len);
	millm_field_text(&f, "system", &system, &system_len);
	read_chat(&f, &chat);
	read_role(&f, &sink);
	millm_field_string(&f, "model_uuid", &uuid);
	millm_field_bool(&f, "raw", &raw);
	millm_field_bool(&f, "stream", &stream);
	millm_field_bool(&f, "parse_special", &parse_special);
	read_options(&f, &o);
	millm_field_array(&f, "stop", &stops);
	millm_field_object(&f, "logit_bias", &logit_bias);
	if (millm_fields_end(&f) != MILLM_OK)
	{
		millm_conn_error(conn, &err);
		return;
	}
	call = new_call(server, conn);
	if (!call)
		return;
	call->form = (MillmAnswerForm) {.streams = stream, .has_choices = is_given(request, "n"), .has_logprobs = o.logprobs};
	call->parse_special = parse_special;
	sink.arg = call;
	sink.piece = stream ? generate_piece : NULL;

	if (!prompt == !chat.messages)
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "one of the fields \"prompt\" and \"messages\" must be there");
	else if (prompt && (chat.tools || chat.documents || chat.kwargs || chat.template_name))
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "tools and the like need \"messages\"");
	else if (chat.messages && system)
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "field \"system\" goes with \"prompt\" only");
	else if (read_stops(stops, &o, &err) == MILLM_OK &&
			 read_logit_bias(logit_bias, &o, &err) == MILLM_OK &&
			 millm_engine_loaded(server->engine, &loaded, &err) == MILLM_OK &&
			 check_model(loaded, uuid, &err) == MILLM_OK &&
			 (prompt ? keep_prompt(call, loaded, prompt, len, system, system_len, raw, &err) : keep_chat(call, loaded, &chat, &err)) == MILLM_OK &&
			 check_parse_special(call, json_object_get(request, "parse_special"), &err) == MILLM_OK &&
			 millm_request_create(loaded, &o, &sink, &call->generation, &err) == MILLM_OK &&
			 millm_engine_accept(server->engine, call->generation, &err) == MILLM_OK)
	{
		call->form.tokenizer = loaded->tokenizer;
		millm_loaded_release(loaded);
		start(call, submit);
		return;
	}
	millm_loaded_release(loaded);
	end_with_error(call, &err);
}

/* ---- embed --------------------------------------------------------------------------------- */

static void
embed_values(void *arg, const float *values, int n)
{
	Call	   *call = arg;

	millm_conn_send_bytes(call->conn, WIRE_VECTOR, values, (size_t) n * sizeof(*values));
}

static void
embed_done(void *arg, const MillmResult *r)
{
	end_with_result(arg, json_pack("{s:{s:i}, s:f, s:f}", "usage", "prompt_tokens", r->prompt_tokens, "queue_ms", r->timing.queue_ms,
								   "compute_ms", r->timing.compute_ms));
}

static void
submit_texts(void *arg, bool is_ending)
{
	Call	   *call = arg;
	char	   *bytes = call->texts;
	size_t	   *ends = call->ends;
	MillmTexts	texts = {.bytes = bytes, .ends = ends, .n = call->n_texts, .first = call->first_text};

	call->texts = NULL;
	call->ends = NULL;
	if (is_ending)
		millm_engine_cancel(call->server->engine, call->generation);
	/* The call may be gone when this returns. */
	millm_engine_submit_texts(call->server->engine, call->generation, &texts);
	free(bytes);
	free(ends);
}

/* Copies: jansson's objects stay on the loop's thread. */
static MillmCode
keep_texts(Call *call, const char *field, json_t *array, size_t max, MillmError *err)
{
	size_t		n = json_array_size(array);
	size_t		len = 0;

	if (n < 1 || n > max)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "field \"%s\" must be an array of 1 to %zu texts", field, max);
		millm_detail(err, "There are %zu.", n);
		return MILLM_E_INVALID_ARGUMENT;
	}
	for (size_t i = 0; i < n; i++)
	{
		if (!json_is_string(json_array_get(array, i)))
			return millm_fail(err, MILLM_E_INVALID_ARGUMENT, "element %zu of field \"%s\" is not a string", i, field);
		len += json_string_length(json_array_get(array, i));
	}
	call->texts = malloc(len + 1);
	call->ends = malloc(n * sizeof(*call->ends));
	if (!call->texts || !call->ends)
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	for (size_t at = 0; call->n_texts < n; call->ends[call->n_texts++] = at)
	{
		json_t	   *text = json_array_get(array, call->n_texts);

		memcpy(call->texts + at, json_string_value(text), json_string_length(text));
		at += json_string_length(text);
	}
	return MILLM_OK;
}

static void
op_embed(EngineServer *server, MillmConn *conn, json_t *request)
{
	MillmSink	sink = {.embedding = embed_values, .done = embed_done, .failed = generate_failed, .is_behind = generate_is_behind};
	Call	   *call = new_call(server, conn);
	const MillmLoaded *loaded = NULL;
	const char *uuid = NULL;
	json_t	   *texts = NULL;
	MillmFields f;
	MillmError	err;

	if (!call)
		return;
	sink.arg = call;
	begin_fields(&f, request, &err);
	read_role(&f, &sink);
	millm_field_array(&f, "texts", &texts);
	millm_field_int(&f, "first", 1, INT64_MAX / 2, &call->first_text);
	millm_field_string(&f, "model_uuid", &uuid);
	if (millm_fields_end(&f) == MILLM_OK &&
		keep_texts(call, "texts", texts, MAX_TEXTS, &err) == MILLM_OK &&
		millm_engine_loaded(server->engine, &loaded, &err) == MILLM_OK &&
		check_model(loaded, uuid, &err) == MILLM_OK &&
		millm_request_create_embedding(loaded, &sink, &call->generation, &err) == MILLM_OK &&
		millm_engine_accept(server->engine, call->generation, &err) == MILLM_OK)
		start(call, submit_texts);
	else
		end_with_error(call, &err);
	millm_loaded_release(loaded);
}

/* ---- score --------------------------------------------------------------------------------- */

static void
score_done(void *arg, const MillmResult *r)
{
	Call	   *call = arg;
	json_t	   *scores = json_array();

	for (size_t i = 0; i < call->n_texts; i++)
		json_array_append_new(scores, json_pack("{s:f, s:i}", "logprob", r->scores[i].logprob, "tokens", r->scores[i].n));
	end_with_result(call, json_pack("{s:o, s:{s:i, s:i}, s:f, s:f}", "scores", scores, "usage", "prompt_tokens", r->prompt_tokens,
									"cached_tokens", r->cached_tokens, "queue_ms", r->timing.queue_ms, "compute_ms", r->timing.compute_ms));
}

/* Texts by themselves, or labels that follow a prompt. */
static void
op_score(EngineServer *server, MillmConn *conn, json_t *request)
{
	MillmSink	sink = {.flush = generate_flush, .done = score_done, .failed = generate_failed, .is_behind = generate_is_behind};
	Call	   *call = new_call(server, conn);
	const MillmLoaded *loaded = NULL;
	const char *uuid = NULL;
	const char *prompt = NULL;
	const char *system = NULL;
	size_t		len = 0;
	size_t		system_len = 0;
	bool		raw = true;
	bool		tokens = false;
	json_t	   *texts = NULL;
	json_t	   *labels = NULL;
	MillmFields f;
	MillmError	err;

	if (!call)
		return;
	call->parse_special = true;
	begin_fields(&f, request, &err);
	millm_field_array(&f, "texts", &texts);
	millm_field_int(&f, "first", 1, INT64_MAX / 2, &call->first_text);
	millm_field_bool(&f, "tokens", &tokens);
	millm_field_text(&f, "prompt", &prompt, &len);
	millm_field_text(&f, "system", &system, &system_len);
	millm_field_bool(&f, "raw", &raw);
	millm_field_array(&f, "labels", &labels);
	read_role(&f, &sink);
	millm_field_string(&f, "model_uuid", &uuid);
	sink.arg = call;
	sink.piece = tokens ? generate_piece : NULL;
	call->form = (MillmAnswerForm) {.streams = true, .has_logprobs = true};
	if (millm_fields_end(&f) != MILLM_OK)
		;
	else if (!texts == !labels || !prompt == !texts)
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "either the field \"texts\" or the fields \"prompt\" and \"labels\" must be there");
	else if (texts && (system || is_given(request, "raw")))
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "\"system\" and \"raw\" need \"prompt\"");
	else if (labels && (tokens || call->first_text))
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "\"tokens\" and \"first\" need \"texts\"");
	else if (tokens && json_array_size(texts) != 1)
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "\"tokens\" needs one text");
	else if ((texts ? keep_texts(call, "texts", texts, MAX_TEXTS, &err) : keep_texts(call, "labels", labels, MILLM_MAX_LABELS, &err)) == MILLM_OK &&
			 millm_engine_loaded(server->engine, &loaded, &err) == MILLM_OK &&
			 check_model(loaded, uuid, &err) == MILLM_OK &&
			 (texts || keep_prompt(call, loaded, prompt, len, system, system_len, raw, &err) == MILLM_OK) &&
			 millm_request_create_scoring(loaded, &sink, &call->generation, &err) == MILLM_OK &&
			 millm_engine_accept(server->engine, call->generation, &err) == MILLM_OK)
	{
		call->form.tokenizer = loaded->tokenizer;
		millm_loaded_release(loaded);
		start(call, texts ? submit_texts : submit);
		return;
	}
	millm_loaded_release(loaded);
	end_with_error(call, &err);
}

/* ---- text: tokenize, count_tokens, detokenize ---------------------------------------------- */

/* A RESULT of many ids is written straight as JSON: a tree of them would take forty times their bytes. */
static void
send_ids(MillmConn *conn, const MillmIds *ids)
{
	static const char head[] = "{\"ids\":[";
	char	   *json = malloc(sizeof(head) + ids->n * 12 + 2);
	size_t		n = sizeof(head) - 1;
	MillmError	err;

	if (!json)
	{
		millm_fail(&err, MILLM_E_INTERNAL, "out of memory");
		millm_conn_error(conn, &err);
		return;
	}
	memcpy(json, head, n);
	for (size_t i = 0; i < ids->n; i++)
		n += (size_t) snprintf(json + n, 13, "%s%" PRId32, i ? "," : "", ids->ids[i]);
	json[n++] = ']';
	json[n++] = '}';
	if (n <= WIRE_MAX_REPLY_BYTES)
		millm_conn_send_bytes(conn, WIRE_RESULT, json, n);
	else
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the text has too many tokens for one answer");
		millm_detail(&err, "It has %zu tokens.", ids->n);
		millm_conn_error(conn, &err);
	}
	free(json);
}

/* Skip the work when nobody waits for it any more. */
static bool
is_unwanted(Call *call, bool is_ending)
{
	MillmError	err;

	if (!is_ending && !millm_conn_is_closed(call->conn))
		return false;
	millm_fail(&err, MILLM_E_CANCELED, "canceled: the engine shuts down");
	end_with_error(call, &err);
	return true;
}

static void
encode(void *arg, bool is_ending)
{
	Call	   *call = arg;
	MillmEncodeOptions options = {.add_special = call->add_special, .parse_special = call->parse_special};
	MillmIds	ids = {0};
	MillmError	err;

	if (is_unwanted(call, is_ending))
		return;
	if ((call->embeds ? embedding_encode(call->loaded, call->text, call->len, &ids, &err) :
		 millm_encode(call->loaded->tokenizer, call->text, call->len, options, 0, &ids, &err)) != MILLM_OK)
		millm_conn_error(call->conn, &err);
	else if (call->counts)
		millm_conn_result(call->conn, json_pack("{s:I}", "count", (json_int_t) ids.n));
	else
		send_ids(call->conn, &ids);
	millm_ids_free(&ids);
	free_call(call);
}

static void
decode(void *arg, bool is_ending)
{
	Call	   *call = arg;
	char	   *text = NULL;
	size_t		len;
	MillmError	err;

	if (is_unwanted(call, is_ending))
		return;
	if (millm_decode(call->loaded->tokenizer, call->ids, call->n_ids, false, &text, &len, &err) != MILLM_OK)
		millm_conn_error(call->conn, &err);
	else
		millm_conn_result(call->conn, json_pack("{s:s%}", "text", text, len));
	free(text);
	free_call(call);
}

static void
recode(EngineServer *server, MillmConn *conn, json_t *request, bool decodes, bool counts)
{
	Call	   *call = new_call(server, conn);
	MillmWorkFn work = decodes ? decode : encode;
	const char *text = NULL;
	size_t		len = 0;
	json_t	   *ids = NULL;
	MillmFields f;
	MillmError	err;

	if (!call)
		return;
	call->add_special = true;
	call->parse_special = true;
	call->counts = counts;
	begin_fields(&f, request, &err);
	if (decodes)
		millm_field_array(&f, "ids", &ids);
	else
		millm_field_text(&f, "text", &text, &len);
	if (counts)
		millm_field_bool(&f, "for_embedding", &call->embeds);
	else if (!decodes)
	{
		millm_field_bool(&f, "add_special", &call->add_special);
		millm_field_bool(&f, "parse_special", &call->parse_special);
	}
	if (millm_fields_end(&f) == MILLM_OK && !ids && !text)
		f.code = millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "field \"%s\" is missing", decodes ? "ids" : "text");
	if (f.code != MILLM_OK ||
		(ids ? keep_ids(call, ids, &err) : keep_text(call, text, len, &err)) != MILLM_OK ||
		millm_engine_loaded(server->engine, &call->loaded, &err) != MILLM_OK)
		end_with_error(call, &err);
	else if (call->len <= QUICK_TEXT_BYTES && call->n_ids <= QUICK_IDS)
		work(call, false);
	else if (!post(call, work))
	{
		too_many_texts(&err);
		end_with_error(call, &err);
	}
}

/* ---- apply_chat_template -------------------------------------------------------------------- */

static void
apply_template(void *arg, bool is_ending)
{
	Call	   *call = arg;
	MillmRendering rendering = {0};
	MillmError	err;

	if (is_unwanted(call, is_ending))
		return;
	if (render(call, &rendering, &err) != MILLM_OK)
		end_with_error(call, &err);
	else
		end_with_result(call, json_pack("{s:s%}", "text", rendering.text, rendering.n));
	millm_rendering_free(&rendering);
}

static void
op_apply_chat_template(EngineServer *server, MillmConn *conn, json_t *request)
{
	Call	   *call = new_call(server, conn);
	const MillmLoaded *loaded = NULL;
	const char *uuid = NULL;
	ChatFields	chat = {0};
	MillmFields f;
	MillmError	err;

	if (!call)
		return;
	begin_fields(&f, request, &err);
	read_chat(&f, &chat);
	millm_field_bool(&f, "add_generation_prompt", &chat.add_generation_prompt);
	millm_field_string(&f, "model_uuid", &uuid);
	if (millm_fields_end(&f) == MILLM_OK && !chat.messages)
		f.code = millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "field \"messages\" is missing");
	if (f.code != MILLM_OK ||
		millm_engine_loaded(server->engine, &loaded, &err) != MILLM_OK ||
		check_model(loaded, uuid, &err) != MILLM_OK ||
		keep_chat(call, loaded, &chat, &err) != MILLM_OK)
		end_with_error(call, &err);
	else if (!post(call, apply_template))
	{
		too_many_texts(&err);
		end_with_error(call, &err);
	}
	millm_loaded_release(loaded);
}

/* ---- memory: what each device of CUDA has -------------------------------------------------- */

/* On the worker: drivers take their time to start. */
static void
list_devices(void *arg, bool is_ending)
{
	Call	   *call = arg;
	json_t	   *devices = json_array();
	MillmDeviceState d;

	if (is_unwanted(call, is_ending))
	{
		json_decref(devices);
		return;
	}
	for (int i = 0; millm_device_look(i, NULL, &d, NULL) == MILLM_OK; i++)
		json_array_append_new(devices, json_pack("{s:o, s:s, s:o, s:o, s:o}", "device", json_sprintf("cuda:%d", i), "name", d.name,
												 "total_bytes", integer_or_null(d.total_bytes >= 0, d.total_bytes),
												 "free_bytes", integer_or_null(d.free_bytes >= 0, d.free_bytes),
												 "context_bytes", integer_or_null(d.context_bytes >= 0, d.context_bytes)));
	end_with_result(call, json_pack("{s:o}", "devices", devices));
}

static void
op_memory(EngineServer *server, MillmConn *conn, json_t *request)
{
	Call	   *call = new_call(server, conn);
	MillmFields f;
	MillmError	err;

	if (!call)
		return;
	begin_fields(&f, request, &err);
	if (millm_fields_end(&f) == MILLM_OK && !post(call, list_devices))
	{
		too_many_texts(&err);
		f.code = err.code;
	}
	if (f.code != MILLM_OK)
		end_with_error(call, &err);
}

/* ---- plan, inspect: a model that lies there, loaded or not --------------------------------- */

/* On the worker: opening a model takes longer than the loop may stand still. */
static void
plan(void *arg, bool is_ending)
{
	Call	   *call = arg;
	MillmLoadPlan p;
	MillmError	err;

	if (is_unwanted(call, is_ending))
		return;
	if (millm_engine_plan(call->server->engine, &call->load, call->quantization, call->must_fit, &p, &err) != MILLM_OK)
		end_with_error(call, &err);
	else
		end_with_result(call, json_pack("{s:s, s:I, s:I, s:I, s:I, s:o, s:i}", "quantization", p.quantization,
										"weights_bytes", (json_int_t) p.weights_bytes, "kv_bytes", (json_int_t) p.kv_bytes,
										"workspace_bytes", (json_int_t) p.workspace_bytes, "fp16_weights_bytes", (json_int_t) p.fp16_weights_bytes,
										"available_bytes", integer_or_null(p.available_bytes >= 0, p.available_bytes),
										"context_length", p.context_length));
}

/* One of ours, for a name that somebody sent; NULL: there is none of that name. */
static const char *
quantization_name(const char *name)
{
	static const char *const names[] = {"FP16", "Q4", "Q8"};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (strcmp(name, names[i]) == 0)
			return names[i];
	return NULL;
}

static void
inspect(void *arg, bool is_ending)
{
	Call	   *call = arg;
	MillmModel *model;
	MillmError	err;

	if (is_unwanted(call, is_ending))
		return;
	if (millm_model_open(call->name, &model, &err) != MILLM_OK)
	{
		end_with_error(call, &err);
		return;
	}
	end_with_result(call, millm_model_inspect_json(model));
	millm_model_close(model);
}

static void
plan_or_inspect(EngineServer *server, MillmConn *conn, json_t *request, bool inspects)
{
	Call	   *call = new_call(server, conn);
	MillmFields f;
	MillmError	err;
	LoadFields	n;
	const char *quantization = NULL;

	if (!call)
		return;
	millm_load_options_init(&call->load);
	begin_fields(&f, request, &err);
	if (inspects)
		millm_field_string(&f, "path", &call->load.path);
	else
	{
		read_load_fields(&f, &call->load, &n);
		millm_field_string(&f, "quantization", &quantization);
		millm_field_bool(&f, "must_fit", &call->must_fit);
	}
	if (millm_fields_end(&f) == MILLM_OK && !call->load.path)
		f.code = millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "field \"path\" is missing");
	if (f.code == MILLM_OK && quantization && !(call->quantization = quantization_name(quantization)))
		f.code = millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "there is no quantization \"%.20s\"", quantization);
	if (f.code == MILLM_OK && !(call->name = strdup(call->load.path)))
		f.code = millm_fail(&err, MILLM_E_INTERNAL, "out of memory");
	call->load.path = call->name;
	call->load.model = NULL;
	if (f.code == MILLM_OK && !post(call, inspects ? inspect : plan))
	{
		too_many_texts(&err);
		f.code = err.code;
	}
	if (f.code != MILLM_OK)
		end_with_error(call, &err);
}

/* ---- the service --------------------------------------------------------------------------- */

/* Ops that differ from one another in little. */
static void
op_inspect(EngineServer *server, MillmConn *conn, json_t *request)
{
	plan_or_inspect(server, conn, request, true);
}

static void
op_plan(EngineServer *server, MillmConn *conn, json_t *request)
{
	plan_or_inspect(server, conn, request, false);
}

static void
op_tokenize(EngineServer *server, MillmConn *conn, json_t *request)
{
	recode(server, conn, request, false, false);
}

static void
op_count_tokens(EngineServer *server, MillmConn *conn, json_t *request)
{
	recode(server, conn, request, false, true);
}

static void
op_detokenize(EngineServer *server, MillmConn *conn, json_t *request)
{
	recode(server, conn, request, true, false);
}

/* All but shutdown, which is serve.h's. */
static const struct
{
	const char *name;
	void		(*run) (EngineServer *server, MillmConn *conn, json_t *request);
}			ops[] = {
	{"status", op_status}, {"memory", op_memory}, {"plan", op_plan}, {"inspect", op_inspect}, {"load", op_load}, {"cancel_load", op_cancel_load},
	{"unload", op_unload}, {"generate", op_generate}, {"embed", op_embed}, {"score", op_score}, {"apply_chat_template", op_apply_chat_template},
	{"tokenize", op_tokenize}, {"count_tokens", op_count_tokens}, {"detokenize", op_detokenize},
};
#define N_OPS (sizeof(ops) / sizeof(ops[0]))

static void
refuse_op(MillmConn *conn, const char *op)
{
	MillmError	err;
	char		names[sizeof(err.hint)] = "";

	for (size_t i = 0, n = 0; i < N_OPS && n < sizeof(names); i++)
		n += (size_t) snprintf(names + n, sizeof(names) - n, "%s, ", ops[i].name);
	millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "unrecognized op \"%.50s\"", op);
	millm_hint(&err, "The ops are: %sshutdown.", names);
	millm_conn_error(conn, &err);
}

static void
on_request(void *arg, MillmConn *conn, json_t *request)
{
	EngineServer *server = arg;
	const char *op = json_string_value(json_object_get(request, "op"));
	MillmError	err;

	if (!op)
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "field \"op\" is missing or not a string");
		millm_conn_error(conn, &err);
		return;
	}
	for (size_t i = 0; i < N_OPS; i++)
		if (strcmp(op, ops[i].name) == 0)
		{
			ops[i].run(server, conn, request);
			return;
		}
	refuse_op(conn, op);
}

static void
on_close(void *arg, MillmConn *conn)
{
	EngineServer *server = arg;
	MillmRequest *r = millm_conn_data(conn);

	if (r)
		millm_engine_cancel(server->engine, r);
}

static void
on_free(void *arg, MillmConn *conn)
{
	(void) arg;
	millm_request_unref(millm_conn_data(conn));
}

static void
on_shutdown(void *arg)
{
	EngineServer *server = arg;

	millm_worker_free(server->worker);
	millm_engine_free(server->engine);
}

int
millm_engine_serve(const char *socket_path)
{
	EngineServer server;
	MillmService service = {"millm-engine", on_request, on_close, on_shutdown, on_free, &server};
	MillmError	err;
	int			rc;

	if (millm_engine_create(&server.engine, &err) != MILLM_OK)
	{
		millm_log("ERROR", "%s", err.message);
		return 1;
	}
	server.worker = millm_worker_create(MAX_QUEUED_TEXTS, MAX_QUEUED_BYTES);
	if (!server.worker)
	{
		millm_log("ERROR", "could not start a thread");
		millm_engine_free(server.engine);
		return 1;
	}
	rc = millm_serve(&service, socket_path, true);
	return rc;
}
