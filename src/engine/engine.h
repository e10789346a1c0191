/*
 * engine.h -- the loaded model and the one thread that computes with it.
 *
 * Callers (the event loop, the command line) hand requests over and get called back on the model thread.
 * Every request that was accepted ends with exactly one done() or failed().
 */
#ifndef MILLM_ENGINE_H
#define MILLM_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "device.h"
#include "draft.h"
#include "error.h"
#include "logprobs.h"
#include "model.h"
#include "request.h"
#include "templates.h"
#include "token.h"

typedef struct MillmEngine MillmEngine;
typedef struct MillmRequest MillmRequest;

extern MillmCode millm_engine_create(MillmEngine **out, MillmError *err);
/* Cancel everything, end the model thread, free the model.  Requests get CANCELED before this returns. */
extern void millm_engine_free(MillmEngine *engine);

/* ---- load and unload ----------------------------------------------------------------------- */

typedef struct MillmLoadOptions
{
	const char *path;
	const char *model;			/* the name that people know it by; NULL: the path */
	const char *model_uuid;		/* NULL: none */
	MillmDeviceWish device;		/* zeros: auto */
	const char *kernels;		/* NULL: the best, or $MILLM_KERNELS */
	int			threads;		/* 0: one per CPU */
	int			context_length;	/* 0: the model's maximum or 8192, the smaller */
	int			max_sequences;
	int			max_queue;
	MillmKvFormat kv_format;	/* of the KV cache */
	int64_t		kv_cache_bytes;	/* 0: max_sequences x context, at most a quarter of the available memory */
	int			stream_stall_timeout_ms;
	bool		deterministic;
	bool		prefix_cache;	/* what prompts begin with alike is computed once */
	int			draft_tokens;	/* of a draft for a sequence that runs alone, at most MILLM_MAX_DRAFT_TOKENS; 0: none */
	bool		may_write;		/* the directory is the server's own: what makes the next load shorter may be written there */
	bool		force;			/* try it although the memory seems not to be there; a warning has the figures */
} MillmLoadOptions;

/* 16 sequences, 64 in the queue, 30 s, with a prefix cache, drafts of 3 tokens; everything else chosen. */
extern void millm_load_options_init(MillmLoadOptions *options);

/* What a load takes; bytes. */
typedef struct MillmLoadPlan
{
	int64_t		weights_bytes;	/* mapped files */
	int64_t		kv_bytes;
	int64_t		workspace_bytes;
	int64_t		fp16_weights_bytes;	/* what the weights take, or took, with 16 bits */
	int64_t		available_bytes;	/* -1: not known */
	int			context_length;
	const char *quantization;	/* "FP16", "Q4" or "Q8": of the weights that were reckoned with */
} MillmLoadPlan;

/*
 * What a load with these options would take and whether it would fit, in place of what is loaded now; nothing is loaded or changed.
 * quantization "FP16", "Q4" or "Q8": as if the weights were so; NULL: as they are.  Any thread.  With must_fit, INSUFFICIENT_MEMORY with
 * the figures and what would fit; the errors of millm_model_open(), INVALID_ARGUMENT for a context length.
 */
extern MillmCode millm_engine_plan(MillmEngine *engine, const MillmLoadOptions *options, const char *quantization, bool must_fit,
								   MillmLoadPlan *out, MillmError *err);

typedef struct MillmLoaded
{
	char	   *path;
	char	   *name;
	char	   *uuid;			/* NULL: none */
	MillmModel *model;
	MillmTokenizer *tokenizer;
	MillmTemplates *templates;	/* NULL: the model has none */
	int			context_length;
	int			max_sequences;
	int			max_queue;
	int			stream_stall_timeout_ms;
	MillmDevice device;
	char		kernels[32];
	int			threads;
	bool		deterministic;
	bool		prefix_cache;
	int			draft_tokens;
	char		kv_dtype[16];	/* millm_forward_kv_dtype() */
	int64_t		pages_total;
	int64_t		weights_bytes;	/* as the device has them: mapped files, or a copy */
	int64_t		kv_bytes;
	int64_t		private_bytes;	/* the KV cache and the workspace: what is ours alone, not the page cache's */
	int64_t		loaded_at;		/* unix seconds */
	double		load_ms;
	char		warnings[12][256];
	int			n_warnings;
} MillmLoaded;

typedef struct MillmLoadSink
{
	/* load: percent of "loading_weights" (reading them) or "moving_to_gpu"; unload: requests that are "draining" */
	void		(*progress) (void *arg, const char *stage, int n);
	void		(*loaded) (void *arg, const MillmLoaded *loaded);
	void		(*unloaded) (void *arg, const char *name, int64_t freed_bytes);	/* private memory, or the device's, measured; -1: not known */
	void		(*failed) (void *arg, const MillmError *err);
	void	   *arg;
} MillmLoadSink;

/*
 * Begin to load or unload; what comes of it comes through the sink, on the model thread.  What is refused at once is
 * returned: MODEL_ALREADY_LOADED, MODEL_BUSY while another load or unload is under way, MODEL_NOT_LOADED; then the sink is
 * not called.  The load goes through millm_model_open()'s errors, INVALID_ARGUMENT and INSUFFICIENT_MEMORY with figures.
 */
extern MillmCode millm_engine_load(MillmEngine *engine, const MillmLoadOptions *options, const MillmLoadSink *sink, MillmError *err);
/* Make the load that is under way, if any, fail with CANCELED soon; one that is nearly done may still succeed. */
extern void millm_engine_cancel_load(MillmEngine *engine);
/* Take no new requests, wait so long for those there are, cancel the rest. */
extern MillmCode millm_engine_unload(MillmEngine *engine, int timeout_ms, const MillmLoadSink *sink, MillmError *err);

/*
 * A reference to the loaded model, which is immutable until millm_loaded_release(); its tokenizer and its config may be
 * used from any thread.  MODEL_NOT_LOADED when there is none, MODEL_BUSY while it is being unloaded.
 */
extern MillmCode millm_engine_loaded(MillmEngine *engine, const MillmLoaded **out, MillmError *err);
extern const MillmLoaded *millm_loaded_ref(const MillmLoaded *loaded);
extern void millm_loaded_release(const MillmLoaded *loaded);	/* NULL is fine */

typedef enum MillmEngineState {MILLM_IDLE, MILLM_LOADING, MILLM_LOADED, MILLM_UNLOADING} MillmEngineState;

typedef struct MillmEngineStatus
{
	MillmEngineState state;
	int			running;
	int			waiting;
	int64_t		pages_free;		/* -1 without a model; those that only the prefix cache has among them */
	int64_t		pages_cached;	/* -1 without a model; by the prefix cache */
	int64_t		drafted_tokens;	/* of the loaded model's sequences */
	int64_t		accepted_tokens;	/* of them */
	const MillmLoaded *loaded;	/* a reference, or NULL */
} MillmEngineStatus;

extern void millm_engine_status(MillmEngine *engine, MillmEngineStatus *out);

/* ---- generate, embed, score ----------------------------------------------------------------- */

/* What one of the n choices of a request says, or some of it. */
typedef struct MillmPiece
{
	int			choice;			/* 0 .. n - 1 */
	const char *text;			/* whole characters */
	size_t		len;
	const MillmLogprob *logprobs;	/* of its tokens since the piece before, n_tokens rows as of millm_logprobs(), with n_top; the eos has none */
	int			n_tokens;
	int			n_top;
	bool		is_last;
	bool		stopped;		/* the last: by an eos id or a stop sequence; else max_tokens are reached */
} MillmPiece;

typedef struct MillmTiming
{
	double		queue_ms;		/* from accept to the first step */
	double		compute_ms;		/* from there on, in whatever company; 0 before */
} MillmTiming;

/* How probable the model finds a text: of n tokens of it, the sum of the logprobs that each has after those before it. */
typedef struct MillmScore
{
	double		logprob;
	int			n;				/* 0: nothing is before any of them */
} MillmScore;

typedef struct MillmResult
{
	const MillmPiece *choices;	/* [n]: the last piece of each, which is all of it when it was not streamed */
	int			n;
	const MillmScore *scores;	/* of a request for scores, one for each text or label; else NULL */
	int			prompt_tokens;	/* of embeddings and scores: of all texts */
	int			cached_tokens;	/* of them, those that the prefix cache had */
	int			completion_tokens;	/* every chosen token of all choices, the eos ids too */
	int64_t		seed;
	MillmTiming timing;
} MillmResult;

typedef struct MillmSink
{
	/*
	 * The next piece of a choice; has text, unless it is the last, which has none, or brings logprobs of many tokens that show no text.
	 * NULL: not streamed, the result has the texts.
	 */
	void		(*piece) (void *arg, const MillmPiece *piece);
	/* After each step of the model: its pieces are out, so that those of all requests can be sent together.  May be NULL. */
	void		(*flush) (void *arg);
	void		(*done) (void *arg, const MillmResult *result);		/* all choices have ended */
	void		(*failed) (void *arg, const MillmError *err);
	/* The next text's embedding, [n] float32, borrowed; of a request for embeddings only, which has no pieces. */
	void		(*embedding) (void *arg, const float *values, int n);
	/* With piece or embedding: is the reader behind?  *stalled_ms: for how long nothing could be written to him.  May be NULL. */
	bool		(*is_behind) (void *arg, int *stalled_ms);
	uint32_t	role;			/* whose request it is: roles take turns */
	void	   *arg;
} MillmSink;

/*
 * A request for this model, with one reference, the caller's.  Keeps copies of what it needs; takes its own
 * reference to loaded.  Checks the options (INVALID_ARGUMENT).
 */
extern MillmCode millm_request_create(const MillmLoaded *loaded, const MillmGenerateOptions *options, const MillmSink *sink,
									  MillmRequest **out, MillmError *err);
/*
 * The same for embeddings, which go to sink.embedding in the order of their texts, before done().  UNSUPPORTED when the model's files ask for what
 * is not done here (MillmPooling).
 */
extern MillmCode millm_request_create_embedding(const MillmLoaded *loaded, const MillmSink *sink, MillmRequest **out, MillmError *err);
/*
 * The same for scores, which the result has.  With sink.piece, it is told of every token of the text, pieces without text: logprobs of its tokens
 * in their order, NAN of the first.  Then there must be one text, and no prompt.
 */
extern MillmCode millm_request_create_scoring(const MillmLoaded *loaded, const MillmSink *sink, MillmRequest **out, MillmError *err);
extern MillmRequest *millm_request_ref(MillmRequest *r);
extern void millm_request_unref(MillmRequest *r);		/* NULL is fine */
/* Up to now, or to its end; from its sink's calls only. */
extern MillmTiming millm_request_timing(const MillmRequest *r);

/*
 * Places for the request's choices: at most max_sequences + max_queue may be under way; who finds too few free gets SERVER_BUSY with the
 * figures and, once some sequence has ended, the expected wait (millm_expect_wait()), and who wants more than there are INVALID_ARGUMENT.  MODEL_BUSY while the model is being unloaded, MODEL_NOT_LOADED when it is gone.
 * After MILLM_OK it ends with done() or failed().
 */
extern MillmCode millm_engine_accept(MillmEngine *engine, MillmRequest *r, MillmError *err);
/*
 * What a request continues.  Raw (origins NULL): special tokens may be written in it, and it gets what the tokenizer adds.  Rendered
 * by a chat template: nothing is added, for the template wrote it all, and special tokens are only what the template wrote.
 */
typedef struct MillmPrompt
{
	const char *text;
	size_t		len;
	const uint8_t *origins;
	bool		plain;			/* raw: what looks like a special token is text */
} MillmPrompt;

/* Encode the prompt and hand the accepted request to the model thread; any thread but that one; failed() may be called here. */
extern void millm_engine_submit(MillmEngine *engine, MillmRequest *r, const MillmPrompt *prompt);
/* What a request for embeddings or scores is about, at least one text; special tokens may be written in them, and they get what the tokenizer adds. */
typedef struct MillmTexts
{
	const char *bytes;			/* of all, one after the other */
	const size_t *ends;			/* [n] */
	size_t		n;
	int64_t		first;			/* the number of the first one, for errors; 0: they have none */
} MillmTexts;

extern void millm_engine_submit_texts(MillmEngine *engine, MillmRequest *r, const MillmTexts *texts);
/* Of a request for scores: the texts are what may follow the prompt, and only they are scored (scoring.h). */
extern void millm_engine_submit_labels(MillmEngine *engine, MillmRequest *r, const MillmPrompt *prompt, const MillmTexts *labels);
/* Instead of submitting it: end an accepted request with this error. */
extern void millm_engine_refuse(MillmEngine *engine, MillmRequest *r, const MillmError *err);
/* Nobody wants the answer any more: its pages come back within milliseconds.  Any thread, any time. */
extern void millm_engine_cancel(MillmEngine *engine, MillmRequest *r);

#endif
