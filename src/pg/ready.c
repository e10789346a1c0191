/*
 * ready.c -- a ready model before it is loaded.
 *
 * The figures are the engine's: it opens the files as a load does, and reserves nothing.
 */
#include "ready.h"

#include <sys/stat.h>

#include "access/xlog.h"

#include "client.h"
#include "json.h"
#include "settings.h"
#include "shmem.h"

#define PLAN_MS		30000		/* it reads headers; a slow disk has time */

static void
refuse_missing(const MillmModel *m, const char *directory)
{
	MillmError	err;

	millm_fail(&err, MILLM_E_MODEL_FILES_MISSING, "the files of model \"%s\" are missing", m->name);
	millm_detail(&err, "There is no \"%s/config.json\".", directory);
	if (!m->directory)
		millm_hint(&err, "Put the directory back, or delete the model.");
	else if (RecoveryInProgress())
		millm_hint(&err, "A standby downloads nothing: copy the directory from the primary's model cache.");
	else
		millm_hint(&err, "%s it again with millm.retry().", m->repo_id ? "Download" : "Make");
	millm_ereport(ERROR, &err);
}

static void
check_status(const MillmModel *m)
{
	MillmError	err;

	if (m->uncommitted)
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_READY, "model \"%s\" is not committed yet", m->name);
		millm_hint(&err, "COMMIT first: a load does not wait for the transaction's end.");
	}
	else if (strcmp(m->status, "pending") == 0)
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_READY, "%s of model \"%s\" has not ended yet", millm_model_work(m), m->name);
		millm_hint(&err, "Wait for it with millm.wait().");
	}
	else if (strcmp(m->status, "error") == 0)
	{
		millm_fail(&err, MILLM_E_MODEL_NOT_READY, "%s of model \"%s\" has failed", millm_model_work(m), m->name);
		millm_detail(&err, "%s: %s", m->error_code, m->error_message);
		millm_hint(&err, "Try again with millm.retry().");
	}
	else
		return;
	millm_ereport(ERROR, &err);
}

static char *
directory_of(const MillmModel *m)
{
	return m->directory ? psprintf("%s/%s", millm_shared->cache_dir, m->directory) : m->local_path;
}

bool
millm_model_is_missing(const MillmModel *m)
{
	struct stat sb;

	return stat(psprintf("%s/config.json", directory_of(m)), &sb) != 0 && (errno == ENOENT || errno == ENOTDIR);
}

char *
millm_model_directory(const MillmModel *m)
{
	check_status(m);
	if (millm_model_is_missing(m))
		refuse_missing(m, directory_of(m));
	return directory_of(m);
}

void
millm_estimate_load(const char *directory, const char *quantization, int context_length, bool must_fit, MillmEstimate *plan)
{
	StringInfoData buf;
	MillmJson	reply;
	int64		n;

	initStringInfo(&buf);
	appendStringInfoString(&buf, "{\"op\":\"plan\",\"path\":");
	millm_json_append_string(&buf, directory, strlen(directory));
	appendStringInfo(&buf, ",\"device\":\"%s\",\"kv_cache_dtype\":\"%s\"", millm_device, millm_kv_cache_dtype());
	if (quantization)
		appendStringInfo(&buf, ",\"quantization\":\"%s\"", quantization);
	appendStringInfo(&buf, ",\"context_length\":%d,\"max_sequences\":%d,\"kv_cache_bytes\":" INT64_FORMAT ",\"must_fit\":%s}",
					 context_length > 0 ? context_length : millm_context_length, millm_max_sequences,
					 (int64) millm_kv_cache_size << 20, must_fit ? "true" : "false");
	millm_client_call(MILLM_ENGINE, buf.data, &buf, PLAN_MS);
	reply = millm_json(buf.data, buf.len);
	plan->quantization = millm_json_get_string(reply, "quantization");
	if (!plan->quantization || !millm_json_get_int(reply, "weights_bytes", &plan->weights_bytes) ||
		!millm_json_get_int(reply, "kv_bytes", &plan->kv_bytes) || !millm_json_get_int(reply, "workspace_bytes", &plan->workspace_bytes) ||
		!millm_json_get_int(reply, "fp16_weights_bytes", &plan->fp16_weights_bytes) || !millm_json_get_int(reply, "context_length", &n))
		millm_reply_invalid("a plan's figures");
	plan->context_length = (int) n;
	if (!millm_json_get_int(reply, "available_bytes", &plan->available_bytes))
		plan->available_bytes = -1;
}
