/*
 * load.c -- from a directory to a MillmLoaded and a forward pass, or an error and nothing.
 */
#include "load.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "clock.h"
#include "machine.h"
#include "memory.h"
#include "scheduler.h"

#define DEFAULT_CONTEXT_LENGTH 8192

typedef struct Counted
{
	MillmLoaded loaded;			/* first, so that one is the other */
	atomic_int	refs;
} Counted;

void
millm_load_options_init(MillmLoadOptions *options)
{
	*options = (MillmLoadOptions) {.max_sequences = 16, .max_queue = 64, .stream_stall_timeout_ms = 30000, .prefix_cache = true,
		.draft_tokens = MILLM_DEFAULT_DRAFT_TOKENS};
}

const MillmLoaded *
millm_loaded_ref(const MillmLoaded *loaded)
{
	atomic_fetch_add(&((Counted *) loaded)->refs, 1);
	return loaded;
}

void
millm_loaded_release(const MillmLoaded *loaded)
{
	Counted    *c = (Counted *) loaded;

	if (!c || atomic_fetch_sub(&c->refs, 1) != 1)
		return;
	millm_tokenizer_close(c->loaded.tokenizer);
	millm_templates_free(c->loaded.templates);
	millm_model_close(c->loaded.model);
	free(c->loaded.path);
	free(c->loaded.name);
	free(c->loaded.uuid);
	free(c);
}

static MillmCode
choose_context(const MillmLoadOptions *options, const MillmConfig *config, int *out, MillmError *err)
{
	int			max = config->max_context;

	if (options->context_length > max)
	{
		millm_fail(err, MILLM_E_INVALID_ARGUMENT, "context_length is larger than the model's maximum");
		millm_detail(err, "It is %d; the model knows %d positions.", options->context_length, max);
		return MILLM_E_INVALID_ARGUMENT;
	}
	*out = options->context_length > 0 ? options->context_length :
		max < DEFAULT_CONTEXT_LENGTH ? max : DEFAULT_CONTEXT_LENGTH;
	return MILLM_OK;
}

static void
collect_warnings(MillmLoaded *loaded)
{
	const MillmGenerationConfig *g = &loaded->model->generation;
	int			n = (int) (sizeof(g->ignored) / sizeof(g->ignored[0]));

	for (int i = 0; i < g->n_ignored && i < n; i++)
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]),
					 "generation_config.json sets \"%s\", which is not honoured", g->ignored[i]);
	if (g->n_ignored > n)
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]),
					 "generation_config.json sets %d more keys that are not honoured", g->n_ignored - n);
	if (loaded->model->config.arch->text_config)
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]),
					 "only the text part of the model is used: it sees no images");
	if (loaded->model->screen_refused[0])
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]), "%s", loaded->model->screen_refused);
}

static double
now_ms(void)
{
	return (double) millm_now_us() / 1e3;
}

/* A tokenizer.json of megabytes takes longer to parse than weights to be mapped: both go on at once. */
typedef struct Opening
{
	MillmLoaded *loaded;
	bool		may_write;
	MillmCode	rc;
	MillmError	err;
	/* about a chat template, and about what was to be written; their code is MILLM_OK when there is none */
	MillmError	complaint;
	MillmError	not_written;
} Opening;

static void *
open_tokenizer(void *arg)
{
	Opening    *o = arg;

	o->rc = millm_tokenizer_open(o->loaded->path, &o->loaded->tokenizer, &o->err);
	if (o->rc == MILLM_OK && o->may_write)
		(void) millm_tokenizer_compile(o->loaded->tokenizer, o->loaded->path, &o->not_written);
	if (o->rc == MILLM_OK)
		o->rc = millm_templates_open(o->loaded->path, &o->loaded->templates, &o->complaint, &o->err);
	return NULL;
}

/* Plan for steps of so many rows; of them so many are of logits as the scheduler lets in. */
static MillmCode
plan_rows(const MillmModel *model, int n, MillmMemoryPlan *plan, MillmForwardOptions *fo, MillmError *err)
{
	fo->max_batch_tokens = n < plan->max_sequences ? plan->max_sequences : n;
	fo->max_logits = MILLM_SCHED_ROWS + plan->max_sequences;
	plan->step_tokens = fo->max_batch_tokens;
	plan->workspace_bytes = millm_forward_workspace_bytes(model, fo);
	return millm_memory_plan(plan, err);
}

static int64_t
context_pages(const MillmMemoryPlan *plan)
{
	return millm_kv_pages(&plan->layout, plan->context_length, plan->step_tokens);
}

/*
 * Rows of a step on a GPU, which reads its weights, and decodes them, once for all of them, and has not enough to do with few: the more the better, as long as
 * what they take is a small part of its memory, which is the same at each load, and as long as no load is refused for them, and no sequence has to wait for pages
 * that had them.
 */
#define GPU_BATCH_TOKENS 2048
#define GPU_BATCH_SHARE 32		/* 1 of so many bytes */
static void
widen_steps(const MillmModel *model, int64_t device_bytes, MillmMemoryPlan *plan, MillmForwardOptions *fo)
{
	const int64_t pages = context_pages(plan);
	const int64_t n_contexts = plan->n_pages / pages < plan->max_sequences ? plan->n_pages / pages : plan->max_sequences;

	for (int n = GPU_BATCH_TOKENS; n > plan->step_tokens; n /= 2)
	{
		MillmMemoryPlan wide = *plan;
		MillmForwardOptions wide_fo = *fo;

		if (plan_rows(model, n, &wide, &wide_fo, NULL) != MILLM_OK || (wide.available_bytes >= 0 && wide.total_bytes > wide.available_bytes))
			continue;
		/* layers with a window have pages for a step more than they see */
		if (wide.workspace_bytes - plan->workspace_bytes + (context_pages(&wide) - pages) * wide.page_bytes > device_bytes / GPU_BATCH_SHARE ||
			wide.n_pages / context_pages(&wide) < n_contexts)
			continue;
		*plan = wide;
		*fo = wide_fo;
		return;
	}
}

/*
 * The memory of model's load, and the forward pass it is for; releasable_bytes will be given back before.  A GPU's memory is what counts
 * where there is one: weights are copied there, and the mapped files are the page cache's.
 */
static MillmCode
plan_memory(const MillmModel *model, const MillmLoadOptions *options, const MillmDevice *device, int64_t weights_bytes, int64_t releasable_bytes,
			MillmMemoryPlan *plan, MillmForwardOptions *fo, MillmError *err)
{
	int64_t		device_bytes = 0;	/* a GPU's, all of it */
	MillmCode	rc;

	*fo = (MillmForwardOptions) {.device = device, .n_threads = options->threads, .deterministic = options->deterministic,
		.prefix_cache = options->prefix_cache, .kernels = options->kernels, .kv_format = options->kv_format};
	*plan = (MillmMemoryPlan) {.max_sequences = options->max_sequences, .kv_cache_bytes = options->kv_cache_bytes, .weights_bytes = weights_bytes};
	millm_forward_kv_layout(model, &plan->layout);
	if ((rc = choose_context(options, &model->config, &plan->context_length, err)) != MILLM_OK)
		return rc;
	fo->max_sequences = options->max_sequences;
	fo->max_length = plan->context_length;
	if (!device->memory)
		plan->available_bytes = millm_machine_memory("").available_bytes;
	else if ((rc = device->memory(device->ordinal, &plan->available_bytes, &device_bytes, err)) != MILLM_OK)
		return rc;
	if (plan->available_bytes >= 0)
		plan->available_bytes += releasable_bytes;
	plan->page_bytes = millm_kv_page_bytes(model, fo);
	if (plan->page_bytes < 0)
	{
		MillmForward *none;

		return millm_forward_create(model, fo, &none, err);	/* no such kernels: it says which there are */
	}
	if ((rc = plan_rows(model, MILLM_BATCH_TOKENS, plan, fo, err)) != MILLM_OK)
		return rc;
	if (device->memory)
		widen_steps(model, device_bytes, plan, fo);
	fo->n_pages = plan->n_pages;
	return MILLM_OK;
}

/* Of the weights as if they were so, where the device keeps them; NULL: as they are. */
static int64_t
weights_bytes(const MillmModel *model, const MillmDevice *device, const char *quantization)
{
	if (device->kind->copied_bytes)
		return device->kind->copied_bytes(model, quantization);
	return quantization ? millm_model_weights_bytes_as(model, quantization) : (int64_t) model->weights_bytes;
}

/* What the weights would take as Q4; -1 when they are quantized, or cannot be. */
static int64_t
q4_bytes(const MillmModel *model, const MillmDevice *device)
{
	return model->quantization || model->config.has_fused_experts ? -1 : weights_bytes(model, device, "Q4");
}

/* What unloading now (NULL: nothing) gives back on the device. */
static int64_t
releasable_bytes(const MillmLoaded *now, const MillmDevice *device)
{
	int64_t		touched;

	if (!now || strcmp(now->device.name, device->name) != 0)
		return 0;
	if (device->memory)
		return now->weights_bytes + now->private_bytes;
	touched = millm_memory_private();	/* of what it has reserved */
	return touched < 0 ? 0 : touched < now->private_bytes ? touched : now->private_bytes;
}

MillmCode
plan_load(const MillmLoadOptions *options, const char *quantization, bool must_fit, const MillmLoaded *now, MillmLoadPlan *out, MillmError *err)
{
	MillmModel *model;
	MillmMemoryPlan plan;
	MillmForwardOptions fo;
	MillmDevice device;
	MillmCode	rc = millm_device_choose(&options->device, NULL, &device, err);

	if (rc != MILLM_OK || (rc = millm_model_open(options->path, &model, err)) != MILLM_OK)
		return rc;
	out->quantization = quantization ? quantization : millm_model_quantization(model);
	if (strcmp(out->quantization, millm_model_quantization(model)) == 0)
		quantization = NULL;
	rc = plan_memory(model, options, &device, weights_bytes(model, &device, quantization), releasable_bytes(now, &device), &plan, &fo, err);
	if (rc == MILLM_OK && must_fit)
		rc = millm_memory_check(&plan, q4_bytes(model, &device), err);
	out->weights_bytes = plan.weights_bytes;
	out->kv_bytes = plan.kv_bytes;
	out->workspace_bytes = plan.workspace_bytes;
	out->available_bytes = plan.available_bytes;
	out->context_length = plan.context_length;
	out->fp16_weights_bytes = weights_bytes(model, &device, strcmp(millm_model_quantization(model), "FP16") == 0 ? NULL : "FP16");
	millm_model_close(model);
	return rc;
}

static bool
report_reading(void *arg, int percent)
{
	const LoadProgress *p = arg;

	return p->report(p->arg, "loading_weights", percent);
}

static bool
report_moving(void *arg, int percent)
{
	const LoadProgress *p = arg;

	return p->report(p->arg, "moving_to_gpu", percent);
}

/* Open, plan, reserve all but the tokenizer; loaded and keeps what it got when this fails. */
static MillmCode
open_model(MillmLoaded *loaded, const MillmLoadOptions *options, LoadProgress *progress, MillmForward **fw, MillmError *err)
{
	MillmForwardOptions fo;
	MillmMemoryPlan plan;
	MillmError	short_of;
	MillmCode	rc;

	if ((rc = millm_device_choose(&options->device, NULL, &loaded->device, err)) != MILLM_OK ||
		(rc = millm_model_open(options->path, &loaded->model, err)) != MILLM_OK ||
		(rc = plan_memory(loaded->model, options, &loaded->device, weights_bytes(loaded->model, &loaded->device, NULL), 0, &plan, &fo, err)) != MILLM_OK)
		return rc;
	if ((rc = millm_memory_check(&plan, q4_bytes(loaded->model, &loaded->device), &short_of)) != MILLM_OK)
	{
		if (!options->force)
		{
			*err = short_of;
			return rc;
		}
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]), "the load was forced: %s", short_of.detail);
	}
	loaded->context_length = plan.context_length;

	/* a device reads the files while it copies them */
	if (!loaded->device.kind->copied_bytes && !millm_model_populate(loaded->model, report_reading, progress))
		return millm_fail(err, MILLM_E_CANCELED, "the load was canceled");
	fo.progress = report_moving;
	fo.progress_arg = progress;
	if ((rc = millm_forward_create(loaded->model, &fo, fw, err)) != MILLM_OK)
		return rc;

	loaded->max_sequences = options->max_sequences;
	loaded->max_queue = options->max_queue;
	loaded->stream_stall_timeout_ms = options->stream_stall_timeout_ms;
	loaded->deterministic = options->deterministic;
	loaded->prefix_cache = options->prefix_cache;
	loaded->draft_tokens = options->draft_tokens;
	snprintf(loaded->kernels, sizeof(loaded->kernels), "%s", millm_forward_kernels(*fw));
	snprintf(loaded->kv_dtype, sizeof(loaded->kv_dtype), "%s", millm_forward_kv_dtype(*fw));
	loaded->threads = millm_forward_threads(*fw);
	loaded->pages_total = plan.n_pages;
	loaded->weights_bytes = plan.weights_bytes;
	loaded->kv_bytes = plan.kv_bytes;
	loaded->private_bytes = plan.kv_bytes + plan.workspace_bytes;
	collect_warnings(loaded);
	return MILLM_OK;
}

/* loaded is zeroed, and keeps what it got when this fails. */
static MillmCode
fill(MillmLoaded *loaded, const MillmLoadOptions *options, const LoadProgress *progress, MillmForward **fw, MillmError *err)
{
	Opening		tokenizer = {.loaded = loaded, .may_write = options->may_write};
	LoadProgress told = *progress;
	double		start = now_ms();
	pthread_t	thread;
	MillmCode	rc;
	int			failed;

	loaded->path = strdup(options->path);
	loaded->name = strdup(options->model ? options->model : options->path);
	loaded->uuid = options->model_uuid ? strdup(options->model_uuid) : NULL;
	if (!loaded->path || !loaded->name || (options->model_uuid && !loaded->uuid))
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	if ((failed = pthread_create(&thread, NULL, open_tokenizer, &tokenizer)) != 0)
		open_tokenizer(&tokenizer);
	rc = open_model(loaded, options, &told, fw, err);
	if (!failed)
		pthread_join(thread, NULL);
	if (rc == MILLM_OK && (rc = tokenizer.rc) != MILLM_OK)
	{
		if (err)
			*err = tokenizer.err;
		millm_forward_free(*fw);
		*fw = NULL;
	}
	if (rc == MILLM_OK && tokenizer.complaint.code != MILLM_OK)
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]), "%s", tokenizer.complaint.message);
	if (rc == MILLM_OK && tokenizer.not_written.code != MILLM_OK)
		millm_format(loaded->warnings[loaded->n_warnings++], sizeof(loaded->warnings[0]), "%s", tokenizer.not_written.message);
	loaded->loaded_at = (int64_t) time(NULL);
	loaded->load_ms = now_ms() - start;
	return rc;
}

MillmCode
load_model(const MillmLoadOptions *options, const LoadProgress *progress, const MillmLoaded **out, MillmForward **fw, MillmError *err)
{
	Counted    *c = calloc(1, sizeof(*c));
	MillmCode	rc;

	if (!c)
		return millm_fail(err, MILLM_E_INTERNAL, "out of memory");
	atomic_init(&c->refs, 1);
	rc = fill(&c->loaded, options, progress, fw, err);
	if (rc == MILLM_OK)
		*out = &c->loaded;
	else
		millm_loaded_release(&c->loaded);
	return rc;
}
