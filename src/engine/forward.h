/*
 * forward.h -- run tokens through the model: the one forward pass, over a paged KV cache.
 *
 * A step is a ragged batch: a list of (sequence, position, token), in which prefill chunks and
 * decode tokens of many sequences stand side by side.  Tokens of one sequence must be consecutive
 * in the list and in position.  Written once against backend.h; CPU and CUDA are backends.
 *
 * Not thread-safe: the model thread owns everything here.
 */
#ifndef MILLM_FORWARD_H
#define MILLM_FORWARD_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "model.h"
#include "shortlist.h"

typedef struct MillmForward MillmForward;
typedef struct MillmBackendCounts MillmBackendCounts;	/* backend.h */
typedef struct MillmDevice MillmDevice;			/* device.h */
typedef struct MillmKvLayout MillmKvLayout;		/* kv.h */
typedef struct MillmSequence MillmSequence;		/* a growing list of tokens: its page tables and its length */

#define MILLM_KV_PAGE_TOKENS 16
#define MILLM_BATCH_TOKENS	256	/* rows of one step, unless somebody asks for others */

typedef struct MillmForwardOptions
{
	const MillmDevice *device;	/* NULL: the CPU; must outlive the forward pass */
	int			n_threads;		/* 0: one per CPU this process may use */
	int			max_batch_tokens;	/* rows of one step; 0: MILLM_BATCH_TOKENS */
	int			max_logits;		/* of them, those whose logits are wanted; 0, or more than there are: all */
	int64_t		n_pages;		/* KV pages of MILLM_KV_PAGE_TOKENS positions (kv.h) */
	int			max_sequences;	/* of a step, each of at most */
	int			max_length;		/* positions: what a device keeps room for in page tables; 0: one sequence, of all that the model knows */
	bool		deterministic;	/* batch-invariant kernels: a row's bits do not depend on its company */
	bool		prefix_cache;	/* keep what sequences have computed, for those that begin with the same (millm_sequence_share()) */
	bool		full_head;		/* read all of the LM head, even if it has a screening copy: the tokens are the same */
	const char *kernels;		/* the CPU: "ref", "avx2", "avx512", "amx"; NULL: the best, or $MILLM_KERNELS */
	MillmKvFormat kv_format;
	/* Told how far the copy of the weights is, on a device that makes one; false: stop, CANCELED.  NULL: nobody asks */
	bool		(*progress) (void *arg, int percent);
	void	   *progress_arg;
} MillmForwardOptions;

/* Reserves KV pool and workspace now; INSUFFICIENT_MEMORY with figures when it cannot.  The model must outlive it. */
extern MillmCode millm_forward_create(const MillmModel *model, const MillmForwardOptions *options,
									  MillmForward **out, MillmError *err);
extern void millm_forward_free(MillmForward *fw);

extern const char *millm_forward_kernels(const MillmForward *fw);	/* the variant in use */
extern const char *millm_forward_kv_dtype(const MillmForward *fw);	/* of what it keeps in KV pages: "float32", "float16", "int8" */
extern int	millm_forward_threads(const MillmForward *fw);
extern int	millm_forward_max_batch_tokens(const MillmForward *fw);
/* Which layers of a model share KV pages; millm_kv_pages() tells how many pages a sequence takes. */
extern void millm_forward_kv_layout(const MillmModel *model, MillmKvLayout *layout);
/* "auto" or "int8"; INVALID_ARGUMENT names what is neither. */
extern MillmCode millm_kv_format(const char *name, MillmKvFormat *out, MillmError *err);
/*
 * Bytes of one KV page with the kernels of these options (MILLM_KV_AUTO: float32 for "ref", float16 for the others; -1 when there are no such
 * kernels: create says why), and what a forward pass of these options takes besides.
 */
extern int64_t millm_kv_page_bytes(const MillmModel *model, const MillmForwardOptions *options);
extern int64_t millm_forward_workspace_bytes(const MillmModel *model, const MillmForwardOptions *options);
/* What became of the rows of logits so far. */
typedef struct MillmHeadUse
{
	int64_t		n_rows;
	int64_t		n_screened;		/* of them, by the screening copy */
	int64_t		n_read;			/* rows of the head that were read for these */
} MillmHeadUse;
extern MillmHeadUse millm_forward_head_use(const MillmForward *fw);
/* What its backend has done so far; false, and nothing there, when that counts nothing. */
extern bool millm_forward_counts(const MillmForward *fw, MillmBackendCounts *counts);
extern int64_t millm_kv_pages_total(const MillmForward *fw);
extern int64_t millm_kv_pages_free(const MillmForward *fw);	/* those that only the prefix cache has among them */
extern int64_t millm_kv_pages_cached(const MillmForward *fw);	/* by the prefix cache, those in use by sequences too */
extern int64_t millm_kv_pages_needed(const MillmForward *fw, int length);	/* by a sequence that grows to it */

/*
 * An empty sequence, planned to grow to so many positions: some models rotate long sequences otherwise (MillmRope).  It may grow
 * further, as what it was planned for.  NULL when out of memory.  free gives its pages back.
 */
extern MillmSequence *millm_sequence_create(MillmForward *fw, int planned_length);
extern void millm_sequence_free(MillmSequence *seq);	/* NULL is fine */
/*
 * A second sequence with the same past, NULL when out of memory; pages are shared and copied on write.  Both must
 * reserve again before their next step: the copy is made there.
 */
extern MillmSequence *millm_sequence_fork(MillmSequence *seq);
/*
 * Let the sequence share its full pages through the prefix cache, those of generated tokens too, and begin, or go on, with what the cache has of
 * tokens [n], its own: returns its length then, of which what was added is whole pages.  A sequence shares from its first position on or not at
 * all; asked again while it computes its prompt, it has what others have computed meanwhile.  Room reserved before may be lost.
 */
extern int	millm_sequence_share(MillmSequence *seq, const int32_t *tokens, int n);
/*
 * Of millm_kv_pages_needed(length >= n), those that a sequence of that plan need not take when it shares and begins with tokens [n],
 * because others hold them now.
 */
extern int64_t millm_kv_pages_held(const MillmForward *fw, int planned_length, const int32_t *tokens, int n, int length);
extern int	millm_sequence_length(const MillmSequence *seq);	/* positions computed so far */
/* Of the draft that its last step has computed, the first n tokens are the sequence's from now on; the others are no more. */
extern void millm_sequence_accept(MillmSequence *seq, const int32_t *draft, int n);
/*
 * Forget positions from length on, and pages reserved past it.  Where windows have let go what the next position would see, all is
 * forgotten: millm_sequence_length() tells.
 */
extern void millm_sequence_truncate(MillmSequence *seq, int length);
/*
 * Make room for positions up to length; false (and nothing changed) when the pool has too few free pages.  Layers with a window get
 * room for one step, since they give pages back as the sequence grows: to be called before every step.
 */
extern bool millm_sequence_reserve(MillmSequence *seq, int length);
/* For tests: INTERNAL when the pages, their counts and the sequences contradict each other. */
extern MillmCode millm_forward_check(const MillmForward *fw, MillmError *err);

typedef struct MillmBatchToken
{
	MillmSequence *seq;
	int32_t		position;		/* == millm_sequence_length(seq) for its first token in this step */
	int32_t		token;
	bool		want_logits;
	MillmTop	top;			/* of these, what is needed; zeros: all */
	bool		want_hidden;	/* its last hidden state; not of one whose logits are wanted */
	bool		is_draft;		/* computed, but not the sequence's until millm_sequence_accept(): they are its last in this step */
} MillmBatchToken;

/*
 * Run one step.  Room must have been reserved.  Rows of logits, [n_wanted, vocab_size] float32 in the
 * order of the wanting tokens, are at *logits until the next step; those that a token's top does not need may be
 * -infinity, the others have the bits that the full head gives.  should_stop(arg), if not NULL, is asked
 * between layers; when it says true the step ends with CANCELED and no sequence has grown.
 * INTERNAL naming the layer when an activation becomes NaN or infinite; INVALID_ARGUMENT for a token id that the
 * vocabulary does not have, CONTEXT_LENGTH_EXCEEDED past learned positions.  A failed step has not happened.
 */
extern MillmCode millm_forward_step(MillmForward *fw, const MillmBatchToken *batch, int n,
									bool (*should_stop) (void *arg), void *arg,
									const float **logits, MillmError *err);
/* Of row i of these logits: what its token's top needs is among these. */
extern MillmListed millm_forward_listed(const MillmForward *fw, int i);
/*
 * Of the last step that succeeded, until the next: the hidden states, after the final norm, of the tokens that wanted them, in their order,
 * [n wanting, millm_forward_hidden_size()] float32; transformers' last_hidden_state.  NULL when none did.
 */
extern const float *millm_forward_hidden(const MillmForward *fw);
extern int	millm_forward_hidden_size(const MillmForward *fw);

#endif
