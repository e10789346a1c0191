/*
 * main.c -- millm-engine's command line: for people without a server, for the tests, and `serve`.
 *
 * Each command reads its options against its own table; an option that is not in it is an error.  Errors go to stderr in
 * PostgreSQL's shape, and the exit status is 1; a wrong command line is 2.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "bench.h"
#include "engine.h"
#include "forward.h"
#include "kv.h"
#include "server.h"
#include "version.h"

#define MAX_INPUT_BYTES ((size_t) 64 << 20)	/* of a text on stdin or an ids file */

static const char usage[] =
	"millm-engine " MILLM_VERSION ": load a model of the HuggingFace format and compute with it\n"
	"\n"
	"  millm-engine generate DIR PROMPT   continue the text; the result goes to stdout as it is made\n"
	"      --max-tokens N       at most N tokens (default 256)\n"
	"      --temperature T      0 is greedy (default: the model's generation_config.json)\n"
	"      --top-k N  --top-p P  --min-p P  --repetition-penalty P\n"
	"      --frequency-penalty P  --presence-penalty P\n"
	"      --seed N             the same seed gives the same text (default: random)\n"
	"      --stop TEXT          end before this text; may be given up to 16 times\n"
	"      --context-length N   (default: the model's maximum or 8192, the smaller)\n"
	"  millm-engine bench DIR             measure prefill and decode, medians of the rounds\n"
	"      --prompt N  --gen N  --rounds N   (default 512, 64, 3)\n"
	"      --batch N            tokens of the prompt in a step (default 256)\n"
	"      --sequences N        decoded side by side (default 1)\n"
	"      --context N          tokens that each of them has before (default 0)\n"
	"      --json               print one JSON object\n"
	"  millm-engine inspect DIR           what the model is\n"
	"  millm-engine tokenize DIR [TEXT]   ids and their texts, one a line; TEXT from stdin when it is not given\n"
	"      --ids                only the ids, on one line\n"
	"      --no-special         without what the tokenizer adds (BOS)\n"
	"  millm-engine greedy DIR --ids IDS  print the ids that follow\n"
	"      --max-tokens N       (default 64)\n"
	"  millm-engine logits DIR --ids IDS --output FILE\n"
	"                                     write float32 logits of every position, [n, vocabulary]\n"
	"      --chunk N            so many tokens a step\n"
	"      --mutate FLAG        falsify a flag of the model first; --list-mutations prints them\n"
	"  millm-engine serve --socket PATH   answer requests (src/wire/protocol.md) until told to end\n"
	"  millm-engine --version | help\n"
	"\n"
	"DIR holds config.json, model.safetensors and tokenizer.json.  IDS is 1,2,3 or a file with such a list.\n"
	"generate, bench, greedy and logits also take:\n"
	"      --device NAME        auto, cpu, cuda or cuda:N (default: cpu)\n"
	"      --threads N          (default: one per CPU)\n"
	"      --kernels NAME       ref, avx2, avx512 or amx (default: the best that this CPU has)\n"
	"      --kv-cache-dtype D   auto (what the kernels read best), or int8: half the memory (default: auto)\n"
	"bench and greedy also take:\n"
	"      --head full          do not use the screening copy of the LM head (default: screened, if there is one)\n";

/* ---- the command line ---------------------------------------------------------------------- */

typedef enum OptionKind {OPT_FLAG, OPT_TEXT, OPT_INT, OPT_DOUBLE, OPT_STOP, OPT_HEAD, OPT_DEVICE, OPT_KV_FORMAT} OptionKind;

typedef struct Option
{
	const char *name;			/* "--threads"; NULL ends the table */
	OptionKind	kind;
	void	   *out;			/* bool, const char *, int64_t, double, MillmGenerateOptions, bool (full), MillmDeviceWish, MillmKvFormat */
	int64_t		min;			/* of an OPT_INT */
	int64_t		max;
} Option;

__attribute__((noreturn, format(printf, 1, 2))) static void
wrong_usage(const char *fmt, ...)
{
	va_list		ap;

	fprintf(stderr, "millm-engine: ");
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\nTry \"millm-engine help\".\n");
	exit(2);
}

static int
report(const MillmError *err)
{
	fprintf(stderr, "millm-engine: %s: %s\n", millm_code_name(err->code), err->message);
	if (err->detail[0])
		fprintf(stderr, "DETAIL:  %s\n", err->detail);
	if (err->hint[0])
		fprintf(stderr, "HINT:  %s\n", err->hint);
	return 1;
}

static void
take_value(const Option *o, const char *value)
{
	MillmGenerateOptions *g;
	MillmError	err;
	char	   *end = NULL;

	errno = 0;
	switch (o->kind)
	{
		case OPT_FLAG:
			break;
		case OPT_TEXT:
			*(const char **) o->out = value;
			return;
		case OPT_INT:
			{
				long long	n = strtoll(value, &end, 10);

				if (errno || end == value || *end || n < o->min || n > o->max)
					wrong_usage("%s takes an integer from %" PRId64 " to %" PRId64 ", not \"%s\"", o->name, o->min, o->max, value);
				*(int64_t *) o->out = n;
				return;
			}
		case OPT_DOUBLE:
			*(double *) o->out = strtod(value, &end);
			if (errno || end == value || *end || !isfinite(*(double *) o->out))
				wrong_usage("%s takes a number, not \"%s\"", o->name, value);
			return;
		case OPT_STOP:
			g = o->out;
			if (g->n_stops == MILLM_MAX_STOPS)
				wrong_usage("at most %d stop sequences", MILLM_MAX_STOPS);
			g->stops[g->n_stops++] = value;
			return;
		case OPT_HEAD:
			if (strcmp(value, "full") != 0 && strcmp(value, "screened") != 0)
				wrong_usage("%s takes full or screened, not \"%s\"", o->name, value);
			*(bool *) o->out = strcmp(value, "full") == 0;
			return;
		case OPT_DEVICE:
			if (millm_device_wish(value, o->out, &err) != MILLM_OK)
				wrong_usage("%s", err.message);
			return;
		case OPT_KV_FORMAT:
			if (millm_kv_format(value, o->out, &err) != MILLM_OK)
				wrong_usage("%s takes auto or int8, not \"%s\"", o->name, value);
			return;
	}
}

/* Read argv[0..argc): options by the table, the rest into args; between min_args and max_args of them. */
static void
parse(int argc, char **argv, const Option *options, const char **args, int min_args, int max_args)
{
	int			n = 0;
	bool		no_more = false;

	for (int i = 0; i < argc; i++)
	{
		const Option *o = options;

		if (!no_more && strcmp(argv[i], "--") == 0)
		{
			no_more = true;
			continue;
		}
		if (no_more || argv[i][0] != '-' || argv[i][1] == '\0')
		{
			if (n == max_args)
				wrong_usage("unexpected argument \"%s\"", argv[i]);
			args[n++] = argv[i];
			continue;
		}
		while (o->name && strcmp(o->name, argv[i]) != 0)
			o++;
		if (!o->name)
			wrong_usage("unrecognized option \"%s\"", argv[i]);
		if (o->kind == OPT_FLAG)
			*(bool *) o->out = true;
		else if (i + 1 == argc)
			wrong_usage("%s needs a value", o->name);
		else
			take_value(o, argv[++i]);
	}
	if (n < min_args)
		wrong_usage("an argument is missing");
	for (; n < max_args; n++)
		args[n] = NULL;
}

typedef struct Machine
{
	MillmDeviceWish wish;
	int64_t		threads;
	const char *kernels;
	MillmKvFormat kv_format;
	MillmDevice device;			/* that was chosen */
} Machine;
#define ANY_MACHINE {.wish = {.what = MILLM_DEVICE_CPU}}
#define MACHINE_OPTIONS(machine) \
	{"--device", OPT_DEVICE, &(machine).wish, 0, 0}, {"--threads", OPT_INT, &(machine).threads, 1, 1024}, {"--kernels", OPT_TEXT, &(machine).kernels, 0, 0}, \
	{"--kv-cache-dtype", OPT_KV_FORMAT, &(machine).kv_format, 0, 0}

/* Read all of f; NUL-terminated, the caller frees it. */
static char *
read_all(FILE *f, const char *name, size_t *len)
{
	size_t		capacity = 65536;
	char	   *buf = malloc(capacity);
	size_t		n = 0;

	for (;;)
	{
		size_t		k;

		if (!buf)
			wrong_usage("out of memory");
		k = fread(buf + n, 1, capacity - n - 1, f);
		n += k;
		if (k == 0)
			break;
		if (capacity - n == 1)
		{
			if (capacity >= MAX_INPUT_BYTES)
				wrong_usage("\"%s\" has more than %zu bytes", name, MAX_INPUT_BYTES);
			capacity *= 2;
			buf = realloc(buf, capacity);
		}
	}
	if (ferror(f))
		wrong_usage("could not read \"%s\": %s", name, strerror(errno));
	buf[n] = '\0';
	*len = n;
	return buf;
}

/* "1,2,3" or the name of a file with such a list, commas or white space between. */
static int32_t *
read_ids(const char *arg, int vocab, int *n)
{
	FILE	   *f = fopen(arg, "re");
	size_t		len;
	char	   *text = f ? read_all(f, arg, &len) : strdup(arg);
	size_t		capacity = 0;
	int32_t    *ids = NULL;

	*n = 0;
	if (f)
		fclose(f);
	for (char *p = text + strspn(text, ", \t\r\n"); *p; p += strspn(p, ", \t\r\n"))
	{
		char	   *end;
		long		id = strtol(p, &end, 10);

		if (end == p || id < 0 || id >= vocab)
			wrong_usage("\"%.20s\" is not a token id from 0 to %d", p, vocab - 1);
		if ((size_t) *n == capacity)
		{
			capacity = capacity ? 2 * capacity : 1024;
			ids = realloc(ids, capacity * sizeof(*ids));
			if (!ids)
				wrong_usage("out of memory");
		}
		ids[(*n)++] = (int32_t) id;
		p = end;
	}
	free(text);
	if (*n == 0)
		wrong_usage("--ids is empty");
	return ids;
}

/* ---- generate ------------------------------------------------------------------------------ */

/* What main() waits for; the model thread fills it. */
typedef struct Wait
{
	sem_t		done;
	bool		failed;
	MillmError	err;
	MillmResult result;			/* but for its choices */
	bool		stopped;
} Wait;

static void
on_loaded(void *arg, const MillmLoaded *loaded)
{
	for (int i = 0; i < loaded->n_warnings; i++)
		fprintf(stderr, "millm-engine: warning: %s\n", loaded->warnings[i]);
	sem_post(&((Wait *) arg)->done);
}

static void
on_failed(void *arg, const MillmError *err)
{
	Wait	   *w = arg;

	w->failed = true;
	w->err = *err;
	sem_post(&w->done);
}

static void
on_piece(void *arg, const MillmPiece *piece)
{
	(void) arg;
	fwrite(piece->text, 1, piece->len, stdout);
	fflush(stdout);
}

static void
on_done(void *arg, const MillmResult *result)
{
	Wait	   *w = arg;

	w->result = *result;
	w->stopped = result->choices[0].stopped;
	sem_post(&w->done);
}

static bool
wait_for(Wait *w)
{
	while (sem_wait(&w->done) != 0)
		;						/* a signal */
	return !w->failed;
}

/* Load and generate; the engine is the caller's. */
static bool
generate(MillmEngine *engine, const MillmLoadOptions *load, const MillmGenerateOptions *options, const char *prompt, Wait *w)
{
	MillmLoadSink load_sink = {.loaded = on_loaded, .failed = on_failed, .arg = w};
	MillmSink	sink = {.piece = on_piece, .done = on_done, .failed = on_failed, .arg = w};
	const MillmLoaded *loaded;
	MillmRequest *r;
	MillmCode	rc = millm_engine_load(engine, load, &load_sink, &w->err);

	if (rc != MILLM_OK || !wait_for(w) || millm_engine_loaded(engine, &loaded, &w->err) != MILLM_OK)
		return false;
	rc = millm_request_create(loaded, options, &sink, &r, &w->err);
	millm_loaded_release(loaded);
	if (rc != MILLM_OK)
		return false;
	rc = millm_engine_accept(engine, r, &w->err);
	if (rc == MILLM_OK)
		millm_engine_submit(engine, r, &(MillmPrompt) {.text = prompt, .len = strlen(prompt)});
	millm_request_unref(r);
	return rc == MILLM_OK && wait_for(w);
}

static int
command_generate(int argc, char **argv)
{
	MillmGenerateOptions g;
	MillmLoadOptions load;
	const char *args[2];
	Machine		machine = ANY_MACHINE;
	int64_t		context_length = 0;
	int64_t		seed = INT64_MIN;
	bool		ok;
	Wait		w = {0};
	MillmEngine *engine;
	MillmError	err;
	Option		options[] = {
		{"--max-tokens", OPT_INT, &g.max_tokens, 1, INT32_MAX},
		{"--temperature", OPT_DOUBLE, &g.temperature, 0, 0},
		{"--top-k", OPT_INT, &g.top_k, 0, MILLM_MAX_TOP_K},
		{"--top-p", OPT_DOUBLE, &g.top_p, 0, 0},
		{"--min-p", OPT_DOUBLE, &g.min_p, 0, 0},
		{"--repetition-penalty", OPT_DOUBLE, &g.repetition_penalty, 0, 0},
		{"--frequency-penalty", OPT_DOUBLE, &g.frequency_penalty, 0, 0},
		{"--presence-penalty", OPT_DOUBLE, &g.presence_penalty, 0, 0},
		{"--seed", OPT_INT, &seed, INT64_MIN + 1, INT64_MAX},
		{"--stop", OPT_STOP, &g, 0, 0},
		{"--context-length", OPT_INT, &context_length, 1, MILLM_MAX_POSITIONS},
		MACHINE_OPTIONS(machine),
		{0}
	};

	millm_generate_options_init(&g);
	millm_load_options_init(&load);
	parse(argc, argv, options, args, 2, 2);
	g.has_seed = seed != INT64_MIN;
	g.seed = seed;
	load.path = args[0];
	load.device = machine.wish;
	load.kernels = machine.kernels;
	load.kv_format = machine.kv_format;
	load.threads = (int) machine.threads;
	load.context_length = (int) context_length;
	load.max_sequences = 1;
	load.max_queue = 0;

	if (millm_engine_create(&engine, &err) != MILLM_OK)
		return report(&err);
	sem_init(&w.done, 0, 0);
	ok = generate(engine, &load, &g, args[1], &w);
	millm_engine_free(engine);
	sem_destroy(&w.done);
	if (!ok)
		return report(&w.err);
	if (isatty(STDOUT_FILENO))
		fprintf(stderr, "\n[%d prompt tokens, %d generated, %s, seed %" PRId64 "]\n", w.result.prompt_tokens,
				w.result.completion_tokens, w.stopped ? "stop" : "length", w.result.seed);
	return 0;
}

/* ---- the forward pass alone: greedy, logits --------------------------------------------- */

typedef struct Runner
{
	MillmModel *model;
	MillmForward *fw;
	MillmSequence *seq;
	bool		full_head;
	MillmTop	top;			/* which logits of a last token are wanted */
} Runner;

/* A model with one sequence that can have n_positions; machine's device is chosen, and must stay as long as the runner. */
static MillmCode
runner_open(Runner *run, const char *dir, const char *mutate, Machine *machine, int64_t n_positions, MillmError *err)
{
	MillmForwardOptions options = {.device = &machine->device, .n_threads = (int) machine->threads, .kernels = machine->kernels, .kv_format = machine->kv_format, .full_head = run->full_head,
		.max_batch_tokens = MILLM_BATCH_TOKENS, .max_sequences = 1, .max_length = (int) n_positions};
	MillmKvLayout layout;
	MillmCode	rc;

	if ((rc = millm_device_choose(&machine->wish, NULL, &machine->device, err)) != MILLM_OK ||
		(!run->model && (rc = millm_model_open(dir, &run->model, err)) != MILLM_OK) ||
		(mutate && (rc = millm_model_mutate(run->model, mutate, err)) != MILLM_OK))
		return rc;
	if (n_positions > run->model->config.max_context)
	{
		millm_fail(err, MILLM_E_CONTEXT_LENGTH_EXCEEDED, "too many tokens for the model");
		millm_detail(err, "There would be %" PRId64 "; it knows %d positions.", n_positions, run->model->config.max_context);
		return MILLM_E_CONTEXT_LENGTH_EXCEEDED;
	}
	millm_forward_kv_layout(run->model, &layout);
	options.n_pages = millm_kv_pages(&layout, (int) n_positions, MILLM_BATCH_TOKENS);
	if ((rc = millm_forward_create(run->model, &options, &run->fw, err)) != MILLM_OK)
		return rc;
	run->seq = millm_sequence_create(run->fw, (int) n_positions);
	return run->seq ? MILLM_OK : millm_fail(err, MILLM_E_INTERNAL, "out of memory");
}

static void
runner_close(Runner *run)
{
	millm_sequence_free(run->seq);
	if (run->fw)
		millm_forward_free(run->fw);
	millm_model_close(run->model);
}

/* Append ids[0..n), at most chunk a step; every row of logits goes to out if there is one, else *last is the last one. */
static MillmCode
runner_feed(Runner *run, const int32_t *ids, int n, int chunk, FILE *out, const float **last, MillmError *err)
{
	size_t		vocab = (size_t) run->model->config.vocab_size;
	int			max = millm_forward_max_batch_tokens(run->fw);
	MillmBatchToken *batch = calloc((size_t) max, sizeof(*batch));
	MillmCode	rc = batch ? MILLM_OK : millm_fail(err, MILLM_E_INTERNAL, "out of memory");

	if (chunk < 1 || chunk > max)
		chunk = max;
	for (int at = 0, k; at < n && rc == MILLM_OK; at += k)
	{
		int			past = millm_sequence_length(run->seq);

		k = n - at < chunk ? n - at : chunk;
		for (int i = 0; i < k; i++)
			batch[i] = (MillmBatchToken) {.seq = run->seq, .position = past + i, .token = ids[at + i],
				.want_logits = out || at + i == n - 1, .top = run->top};
		rc = !millm_sequence_reserve(run->seq, past + k) ? millm_fail(err, MILLM_E_INTERNAL, "out of memory") :
			millm_forward_step(run->fw, batch, k, NULL, NULL, last, err);
		if (rc == MILLM_OK && out && fwrite(*last, sizeof(float) * vocab, (size_t) k, out) != (size_t) k)
			rc = millm_fail(err, MILLM_E_INTERNAL, "could not write: %s", strerror(errno));
	}
	free(batch);
	return rc;
}

static int
command_bench(int argc, char **argv)
{
	const char *args[1];
	Machine		machine = ANY_MACHINE;
	int64_t		n_prompt = 512;
	int64_t		n_gen = 64;
	int64_t		n_batch = MILLM_BATCH_TOKENS;
	int64_t		n_context = 0;
	int64_t		n_sequences = 1;
	int64_t		n_rounds = 3;
	bool		as_json = false;
	bool		full_head = false;
	Option		options[] = {
		{"--prompt", OPT_INT, &n_prompt, 1, 1 << 20},
		{"--gen", OPT_INT, &n_gen, 1, 1 << 20},
		{"--batch", OPT_INT, &n_batch, 1, 1 << 16},
		{"--context", OPT_INT, &n_context, 0, 1 << 20},
		{"--sequences", OPT_INT, &n_sequences, 1, 4096},
		{"--rounds", OPT_INT, &n_rounds, 1, MILLM_BENCH_MAX_ROUNDS},
		{"--json", OPT_FLAG, &as_json, 0, 0},
		{"--head", OPT_HEAD, &full_head, 0, 0},
		MACHINE_OPTIONS(machine),
		{0}
	};
	MillmModel *model = NULL;
	MillmBench	bench;
	MillmBenchResult r;
	MillmError	err;
	MillmCode	rc;

	parse(argc, argv, options, args, 1, 1);
	bench = (MillmBench) {.n_prompt = (int) n_prompt, .n_batch = (int) n_batch, .n_context = (int) n_context, .n_gen = (int) n_gen, .n_sequences = (int) n_sequences,
		.n_rounds = (int) n_rounds, .device = &machine.device, .n_threads = (int) machine.threads, .kernels = machine.kernels, .kv_format = machine.kv_format, .full_head = full_head};
	rc = millm_device_choose(&machine.wish, NULL, &machine.device, &err);
	if (rc == MILLM_OK)
		rc = millm_model_open(args[0], &model, &err);
	if (rc == MILLM_OK)
	{
		if (model->screen_refused[0])
			fprintf(stderr, "millm-engine: warning: %s\n", model->screen_refused);
		(void) millm_model_populate(model, NULL, NULL);
		rc = millm_bench_run(model, &bench, &r, &err);
	}
	if (rc == MILLM_OK && as_json)
	{
		json_t	   *result = json_pack("{s:s, s:s, s:s, s:s?, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:I, s:I, s:s, s:f}", "version", MILLM_VERSION,
									   "model_type", model->config.model_type, "dtype", model->dtype, "quantization", model->quantization,
									   "kernels", r.kernels, "kv_cache_dtype", r.kv_dtype, "threads", r.n_threads, "prompt", bench.n_prompt, "batch", bench.n_batch, "context", bench.n_context,
									   "gen", bench.n_gen, "sequences", bench.n_sequences, "rounds", bench.n_rounds,
									   "prefill_tps", r.prefill_tps, "decode_tps", r.decode_tps,
									   "weights_bytes", (json_int_t) model->weights_bytes, "decode_bytes", (json_int_t) r.decode_bytes,
									   "head", r.head, "head_rows", r.head_rows);

		if (r.is_counted)
			(void) json_object_set_new(result, "decode_step", json_pack("{s:f, s:f, s:f, s:f}", "kernels", r.kernels_a_step, "starts", r.starts_a_step,
																	   "waits", r.waits_a_step, "host_us", r.host_us_a_step));
		json_dumpf(result, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6));
		printf("\n");
		json_decref(result);
	}
	else if (rc == MILLM_OK)
		printf("%s %s%s%s, %.1f MB, kernels %s, KV cache %s, %d threads, median of %d rounds\n"
			   "prefill %5d tokens  %9.1f tokens/s\n"
			   "decode  %5d tokens  %9.1f tokens/s, %d sequences of %d tokens before, %.1f GB/s of weights, head %s\n",
			   model->config.model_type, model->dtype, model->quantization ? " and " : "", model->quantization ? model->quantization : "",
			   (double) model->weights_bytes / 1e6, r.kernels, r.kv_dtype, r.n_threads, bench.n_rounds, bench.n_prompt, r.prefill_tps, bench.n_gen,
			   r.decode_tps, bench.n_sequences, bench.n_context, r.decode_tps / bench.n_sequences * (double) r.decode_bytes / 1e9, r.head);
	if (rc == MILLM_OK && !as_json && r.is_counted)
		printf("a decoding step: %.1f kernels, %.1f starts, %.1f waits, %.1f microseconds of the host's\n", r.kernels_a_step, r.starts_a_step,
			   r.waits_a_step, r.host_us_a_step);
	millm_model_close(model);
	return rc == MILLM_OK ? 0 : report(&err);
}

static int
command_greedy(int argc, char **argv)
{
	const char *args[1];
	const char *ids_arg = NULL;
	Machine		machine = ANY_MACHINE;
	int64_t		max_tokens = 64;
	MillmSampling greedy = {.repetition_penalty = 1, .top_p = 1};
	MillmSampler *sampler = NULL;
	Runner		run = {0};
	Option		options[] = {
		{"--ids", OPT_TEXT, &ids_arg, 0, 0},
		{"--max-tokens", OPT_INT, &max_tokens, 1, MILLM_MAX_POSITIONS},
		{"--head", OPT_HEAD, &run.full_head, 0, 0},
		MACHINE_OPTIONS(machine),
		{0}
	};
	const float *logits;
	int32_t    *ids = NULL;
	int			n;
	MillmError	err;
	MillmCode	rc;

	parse(argc, argv, options, args, 1, 1);
	if (!ids_arg)
		wrong_usage("--ids is missing");
	rc = millm_model_open(args[0], &run.model, &err);
	if (rc == MILLM_OK)
	{
		ids = read_ids(ids_arg, run.model->config.vocab_size, &n);
		rc = runner_open(&run, args[0], NULL, &machine, n + max_tokens, &err);
	}
	if (rc == MILLM_OK && !(sampler = millm_sampler_create(&greedy, run.model->config.vocab_size)))
		rc = millm_fail(&err, MILLM_E_INTERNAL, "out of memory");
	if (rc == MILLM_OK)
	{
		run.top = millm_sampler_needs(sampler, NULL, 0);
		rc = runner_feed(&run, ids, n, 0, NULL, &logits, &err);
	}
	for (int i = 0; i < max_tokens && rc == MILLM_OK; i++)
	{
		const MillmConfig *config = &run.model->config;
		int32_t		id;
		bool		ends = false;

		rc = millm_sampler_choose(sampler, logits, NULL, n + i, &id, &err);
		for (int k = 0; k < config->n_eos && rc == MILLM_OK; k++)
			ends |= config->eos_ids[k] == id;
		if (rc != MILLM_OK || ends)
			break;
		printf("%s%" PRId32, i ? " " : "", id);
		if (i + 1 < max_tokens)
			rc = runner_feed(&run, &id, 1, 1, NULL, &logits, &err);
	}
	printf("\n");
	free(ids);
	millm_sampler_free(sampler);
	runner_close(&run);
	return rc == MILLM_OK ? 0 : report(&err);
}

static int
command_logits(int argc, char **argv)
{
	const char *args[1];
	const char *ids_arg = NULL;
	const char *output = NULL;
	const char *mutate = NULL;
	Machine		machine = ANY_MACHINE;
	int64_t		chunk = 0;
	bool		lists = false;
	Option		options[] = {
		{"--ids", OPT_TEXT, &ids_arg, 0, 0},
		{"--output", OPT_TEXT, &output, 0, 0},
		{"--mutate", OPT_TEXT, &mutate, 0, 0},
		{"--list-mutations", OPT_FLAG, &lists, 0, 0},
		{"--chunk", OPT_INT, &chunk, 1, MILLM_MAX_POSITIONS},
		MACHINE_OPTIONS(machine),
		{0}
	};
	Runner		run = {0};
	const float *logits;
	int32_t    *ids = NULL;
	int			n;
	FILE	   *out;
	MillmError	err;
	MillmCode	rc;

	parse(argc, argv, options, args, 0, 1);
	if (lists)
	{
		for (int i = 0; millm_mutation_name(i); i++)
			printf("%s\n", millm_mutation_name(i));
		return 0;
	}
	if (!args[0] || !ids_arg || !output)
		wrong_usage("logits needs DIR, --ids and --output");
	rc = millm_model_open(args[0], &run.model, &err);
	if (rc == MILLM_OK)
	{
		ids = read_ids(ids_arg, run.model->config.vocab_size, &n);
		rc = runner_open(&run, args[0], mutate, &machine, n, &err);
	}
	if (rc == MILLM_OK)
	{
		out = fopen(output, "we");
		if (!out)
			rc = millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "could not open \"%s\": %s", output, strerror(errno));
		else
		{
			rc = runner_feed(&run, ids, n, (int) chunk, out, &logits, &err);
			if (fclose(out) != 0 && rc == MILLM_OK)
				rc = millm_fail(&err, MILLM_E_INTERNAL, "could not write \"%s\": %s", output, strerror(errno));
		}
	}
	free(ids);
	runner_close(&run);
	return rc == MILLM_OK ? 0 : report(&err);
}

/* ---- inspect, tokenize, serve ---------------------------------------------------------------- */

static int
command_inspect(int argc, char **argv)
{
	const char *args[1];
	Option		options[] = {{0}};
	MillmModel *model;
	MillmTokenizer *tok = NULL;
	const MillmConfig *c;
	MillmForwardOptions best_kernels = {0};
	int64_t		page_bytes;
	MillmKvLayout layout;
	MillmError	err;
	MillmError	tok_err;

	parse(argc, argv, options, args, 1, 1);
	if (millm_model_open(args[0], &model, &err) != MILLM_OK)
		return report(&err);
	c = &model->config;
	printf("model type       %s (%s)\n", c->model_type, c->architecture[0] ? c->architecture : "no architecture named");
	printf("parameters       %" PRId64 "\n", model->n_params);
	printf("weights          %.1f MB, %s\n", (double) model->weights_bytes / 1e6, model->dtype);
	if (model->screen.codes.data)
		printf("LM head          with an INT8 screening copy\n");
	else if (model->screen_refused[0])
		printf("LM head          %s\n", model->screen_refused);
	printf("layers           %d\n", c->n_layers);
	printf("hidden size      %d\n", c->hidden_size);
	printf("FFN size         %d%s\n", c->intermediate_size, c->mlp_gated ? ", gated" : "");
	if (c->n_experts > 0)
		printf("experts          %d of size %d, %d for each token%s\n", c->n_experts, c->expert_size, c->n_chosen,
			   c->shared_expert_size ? " and a shared one" : "");
	printf("heads            %d, %d for keys and values, %d dimensions each\n", c->n_heads, c->n_kv_heads, c->head_dim);
	printf("positions        %d, %s\n", c->max_positions, c->position == MILLM_POS_ROPE ? "rotary" : "learned");
	printf("vocabulary       %d\n", c->vocab_size);
	printf("eos ids         ");
	for (int i = 0; i < c->n_eos; i++)
		printf(" %d", c->eos_ids[i]);
	printf("%s\n", c->n_eos ? "" : " none");
	millm_forward_kv_layout(model, &layout);
	page_bytes = millm_kv_page_bytes(model, &best_kernels);
	if (page_bytes > 0)
	{
		int			n_slide = 0;

		for (int g = 0; g < layout.n_groups; g++)
			n_slide += layout.windows[g] > 0;
		printf("KV cache         %.1f kB per token", (double) page_bytes * layout.n_groups / MILLM_KV_PAGE_TOKENS / 1e3);
		if (n_slide > 0)
			printf(", of which %.1f kB for those in the window only", (double) page_bytes * n_slide / MILLM_KV_PAGE_TOKENS / 1e3);
		printf("\n");
	}
	if (millm_tokenizer_open(args[0], &tok, &tok_err) == MILLM_OK)
		printf("tokenizer        %d ids%s\n", millm_tokenizer_n_ids(tok),
			   millm_tokenizer_has_chat_template(tok) ? ", with a chat template" : "");
	else
		printf("tokenizer        %s\n", tok_err.message);
	for (int i = 0; i < model->generation.n_ignored && i < 8; i++)
		printf("not honoured     %s of generation_config.json\n", model->generation.ignored[i]);
	millm_tokenizer_close(tok);
	millm_model_close(model);
	return 0;
}

static int
command_tokenize(int argc, char **argv)
{
	const char *args[2];
	bool		only_ids = false;
	bool		no_special = false;
	Option		options[] = {
		{"--ids", OPT_FLAG, &only_ids, 0, 0},
		{"--no-special", OPT_FLAG, &no_special, 0, 0},
		{0}
	};
	MillmTokenizer *tok;
	MillmIds	ids = {0};
	char	   *input = NULL;
	size_t		len;
	MillmError	err;
	MillmCode	rc;

	parse(argc, argv, options, args, 1, 2);
	if (millm_tokenizer_open(args[0], &tok, &err) != MILLM_OK)
		return report(&err);
	if (args[1])
		len = strlen(args[1]);
	else
		input = read_all(stdin, "stdin", &len);
	rc = millm_encode(tok, args[1] ? args[1] : input, len,
					  (MillmEncodeOptions) {.add_special = !no_special, .parse_special = true}, 0, &ids, &err);
	for (size_t i = 0; i < ids.n && rc == MILLM_OK; i++)
	{
		char	   *text;
		size_t		n;

		if (only_ids)
		{
			printf("%s%" PRId32, i ? " " : "", ids.ids[i]);
			continue;
		}
		rc = millm_decode(tok, &ids.ids[i], 1, false, &text, &n, &err);
		if (rc == MILLM_OK)
		{
			json_t	   *quoted = json_stringn(text, n);

			printf("%" PRId32 "\t", ids.ids[i]);
			json_dumpf(quoted, stdout, JSON_ENCODE_ANY);
			printf("\n");
			json_decref(quoted);
			free(text);
		}
	}
	if (only_ids)
		printf("\n");
	millm_ids_free(&ids);
	free(input);
	millm_tokenizer_close(tok);
	return rc == MILLM_OK ? 0 : report(&err);
}

static int
command_serve(int argc, char **argv)
{
	const char *path = NULL;
	Option		options[] = {{"--socket", OPT_TEXT, &path, 0, 0}, {0}};

	parse(argc, argv, options, NULL, 0, 0);
	if (!path)
		wrong_usage("serve needs --socket PATH");
	return millm_engine_serve(path);
}

int
main(int argc, char **argv)
{
	static const struct
	{
		const char *name;
		int			(*run) (int argc, char **argv);
	}			commands[] = {
		{"generate", command_generate}, {"bench", command_bench}, {"inspect", command_inspect}, {"tokenize", command_tokenize},
		{"greedy", command_greedy}, {"logits", command_logits}, {"serve", command_serve},
	};

	if (argc < 2)
	{
		fputs(usage, stderr);
		return 2;
	}
	if (strcmp(argv[1], "--version") == 0)
	{
		printf("millm-engine %s\n", MILLM_VERSION);
		return 0;
	}
	if (strcmp(argv[1], "help") == 0 || strcmp(argv[1], "--help") == 0)
	{
		fputs(usage, stdout);
		return 0;
	}
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
		if (strcmp(argv[1], commands[i].name) == 0)
			return commands[i].run(argc - 2, argv + 2);
	wrong_usage("unrecognized command \"%s\"", argv[1]);
}
