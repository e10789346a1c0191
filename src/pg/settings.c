/*
 * settings.c -- definitions of the settings, and where a value comes from when one is unset.
 */
#include "settings.h"

#include <limits.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "storage/fd.h"
#include "utils/guc.h"

#include "compat.h"
#include "device_name.h"

char	   *millm_database;
int			millm_max_sequences;
int			millm_max_queue;
char	   *millm_cache_dir;
char	   *millm_hf_endpoint;
char	   *millm_hf_token_file;
char	   *millm_hf_token;
int			millm_download_connections;
char	   *millm_hf_cache_dir;
char	   *millm_auto_load_model;
char	   *millm_device;
int			millm_threads;
int			millm_context_length;
int			millm_kv_cache_size;
static int	kv_cache_dtype;
int			millm_unload_timeout;
int			millm_stream_stall_timeout;
bool		millm_deterministic;
bool		millm_prefix_cache;
int			millm_draft_tokens;
bool		millm_reload_after_crash;

#define DEFAULT_ENDPOINT "https://huggingface.co"

static bool
check_device(char **value, void **extra, GucSource source)
{
	MillmDeviceWish wish;

	if (millm_device_name(*value, &wish))
		return true;
	GUC_check_errdetail(MILLM_DEVICE_NAMES);
	return false;
}

static bool
check_absolute(char **value, void **extra, GucSource source)
{
	if ((*value)[0] == '\0' || (*value)[0] == '/')
		return true;
	GUC_check_errdetail("The path must be absolute.");
	return false;
}

static bool
check_hf_cache_dir(char **value, void **extra, GucSource source)
{
	return strcmp(*value, "none") == 0 || check_absolute(value, extra, source);
}

static const char *
show_token(void)
{
	return millm_hf_token && millm_hf_token[0] ? "********" : "";
}

/* The engine's names of them (millm_kv_format()), each at its number. */
static const struct config_enum_entry kv_cache_dtypes[] = {{"auto", 0, false}, {"int8", 1, false}, {NULL, 0, false}};

const char *
millm_kv_cache_dtype(void)
{
	return kv_cache_dtypes[kv_cache_dtype].name;
}

void
millm_define_settings(void)
{
	const int	hidden = GUC_SUPERUSER_ONLY | GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE;

	DefineCustomStringVariable("millm.database", "Database that holds the registry of models.", NULL,
							   &millm_database, "postgres", PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.max_sequences", "Sequences that the engine runs at once; more requests wait.", NULL,
							&millm_max_sequences, 16, 1, 1024, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.max_queue", "Requests that may wait for the engine; more are refused.", NULL,
							&millm_max_queue, 256, 1, 65536, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("millm.cache_dir", "Directory of downloaded models.",
							   "Empty: the environment's MODEL_CACHE_DIR, else .cache/millm under the server user's home.",
							   &millm_cache_dir, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, check_absolute, NULL, NULL);
	DefineCustomStringVariable("millm.hf_endpoint", "Base URL of the HuggingFace Hub.",
							   "Empty: the environment's HF_ENDPOINT, else " DEFAULT_ENDPOINT ".",
							   &millm_hf_endpoint, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("millm.hf_token_file", "File with the server's access token for the Hub (mode 0600).", NULL,
							   &millm_hf_token_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, check_absolute, NULL, NULL);
	DefineCustomStringVariable("millm.hf_token", "The server's access token for the Hub.",
							   "A token file is the better place. Empty: the environment's HF_TOKEN.",
							   &millm_hf_token, "", PGC_SIGHUP, hidden, NULL, NULL, show_token);
	DefineCustomIntVariable("millm.download_connections", "Connections over which a large file is downloaded.", NULL,
							&millm_download_connections, 4, 1, 16, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("millm.hf_cache_dir", "HuggingFace cache of the server's user, from which files are taken that it has.",
							   "Empty: the environment's HF_HUB_CACHE, else hub under HF_HOME, else .cache/huggingface/hub under the server user's home. none: no such cache.",
							   &millm_hf_cache_dir, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, check_hf_cache_dir, NULL, NULL);
	DefineCustomStringVariable("millm.auto_load_model", "Model, by name or id, that a starting server loads.",
							   "Empty: the environment's AUTO_LOAD_MODEL, else none.",
							   &millm_auto_load_model, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("millm.device", "Where models run: auto, cpu, cuda or cuda:N.", NULL,
							   &millm_device, "auto", PGC_SIGHUP, 0, check_device, NULL, NULL);
	DefineCustomIntVariable("millm.threads", "Threads of the engine.", "0: one for each CPU that the server may use.",
							&millm_threads, 0, 0, 1024, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.context_length", "Positions of a sequence.", "0: the model's maximum or 8192, the smaller.",
							&millm_context_length, 0, 0, 16 << 20, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.kv_cache_size", "Memory for keys and values of all sequences.",
							"0: enough for max_sequences whole contexts, at most a quarter of free memory, at least one context.",
							&millm_kv_cache_size, 0, 0, INT_MAX, PGC_SIGHUP, GUC_UNIT_MB, NULL, NULL, NULL);
	DefineCustomEnumVariable("millm.kv_cache_dtype", "How keys and values are kept.",
							 "auto: in 16 bits, or in 32 where the kernels are exact. int8: in half of that, for longer contexts and more of them, a little less exact.",
							 &kv_cache_dtype, 0, kv_cache_dtypes, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.unload_timeout", "How long unloading waits for running requests.", NULL,
							&millm_unload_timeout, 30000, 0, 3600000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.stream_stall_timeout", "How long a stream may wait for a reader that does not read.", NULL,
							&millm_stream_stall_timeout, 30000, 100, 3600000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomBoolVariable("millm.reload_after_crash", "Load the model again by itself after the engine has crashed.", NULL,
							 &millm_reload_after_crash, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("millm.deterministic", "Make a result independent of what else the engine computes at the time.", NULL,
							 &millm_deterministic, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("millm.prefix_cache", "Compute what prompts begin with alike once.", NULL,
							 &millm_prefix_cache, true, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("millm.draft_tokens", "Tokens that a sequence which runs alone is guessed to go on with, and that are computed together.", "0: none.",
							&millm_draft_tokens, 3, 0, 15, PGC_SIGHUP, 0, NULL, NULL, NULL);
	MarkGUCPrefixReserved("millm");
}

static char *
first_set(const char *setting, const char *variable, const char *fallback)
{
	const char *env = getenv(variable);

	if (setting && setting[0])
		return pstrdup(setting);
	if (env && env[0])
		return pstrdup(env);
	return fallback ? pstrdup(fallback) : NULL;
}

/* getpwuid, not $HOME: the server is often started with somebody else's environment */
static const char *
server_home(void)
{
	struct passwd *pw = getpwuid(geteuid());

	return pw && pw->pw_dir ? pw->pw_dir : "/tmp";
}

char *
millm_effective_cache_dir(void)
{
	char	   *dir = first_set(millm_cache_dir, "MODEL_CACHE_DIR", NULL);

	return dir ? dir : psprintf("%s/.cache/millm", server_home());
}

char *
millm_effective_hf_cache_dir(void)
{
	char	   *dir = first_set(millm_hf_cache_dir, "HF_HUB_CACHE", NULL);
	char	   *home = first_set(NULL, "HF_HOME", NULL);

	if (!dir)
		dir = home ? psprintf("%s/hub", home) : psprintf("%s/.cache/huggingface/hub", server_home());
	return strcmp(dir, "none") == 0 ? NULL : dir;
}

char *
millm_effective_endpoint(void)
{
	char	   *url = first_set(millm_hf_endpoint, "HF_ENDPOINT", DEFAULT_ENDPOINT);
	size_t		n = strlen(url);

	while (n > 0 && url[n - 1] == '/')
		url[--n] = '\0';
	return url;
}

char *
millm_effective_auto_load(void)
{
	return first_set(millm_auto_load_model, "AUTO_LOAD_MODEL", NULL);
}

char *
millm_effective_token(void)
{
	char	   *token = NULL;

	if (millm_hf_token_file && millm_hf_token_file[0])
	{
		struct stat sb;
		FILE	   *f = AllocateFile(millm_hf_token_file, "r");
		char		line[512];

		if (!f || fstat(fileno(f), &sb) != 0)
			ereport(WARNING, (errcode_for_file_access(), errmsg("could not read millm.hf_token_file: %m")));
		else if (sb.st_mode & (S_IRWXG | S_IRWXO))
			ereport(WARNING, (errmsg("millm.hf_token_file is not used because others may read it"), errhint("Set its mode to 0600.")));
		else if (!fgets(line, sizeof(line), f) || strlen(line) == sizeof(line) - 1)
			ereport(WARNING, (errmsg("millm.hf_token_file is empty, or its first line is too long")));
		else
			token = pstrdup(line);
		explicit_bzero(line, sizeof(line));
		if (f)
			FreeFile(f);
	}
	else
		token = first_set(millm_hf_token, "HF_TOKEN", NULL);
	if (token)
		token[strcspn(token, " \t\r\n")] = '\0';
	return token && token[0] ? token : NULL;
}
