/*
 * settings.h -- the extension's settings (GUCs).
 *
 * Those of the helpers count where the supervisor reads them; a session that sets one changes nothing.
 */
#ifndef MILLM_SETTINGS_H
#define MILLM_SETTINGS_H

#include "postgres.h"

extern char *millm_database;
extern int	millm_max_sequences;
extern int	millm_max_queue;
extern char *millm_cache_dir;
extern char *millm_hf_endpoint;
extern char *millm_hf_token_file;
extern char *millm_hf_token;
extern int	millm_download_connections;
extern char *millm_hf_cache_dir;
extern char *millm_auto_load_model;
extern char *millm_device;
extern int	millm_threads;
extern int	millm_context_length;
extern int	millm_kv_cache_size;		/* MB */
extern const char *millm_kv_cache_dtype(void);	/* "auto" or "int8" */
extern int	millm_unload_timeout;		/* ms */
extern int	millm_stream_stall_timeout;	/* ms */
extern bool millm_deterministic;
extern bool millm_prefix_cache;
extern int	millm_draft_tokens;
extern bool millm_reload_after_crash;

extern void millm_define_settings(void);

/* The setting, else the environment's variable, else the default.  palloc'd. */
extern char *millm_effective_cache_dir(void);
extern char *millm_effective_endpoint(void);
extern char *millm_effective_hf_cache_dir(void);	/* or NULL: none is to be used */
extern char *millm_effective_auto_load(void);	/* or NULL */
/* The server's own access token (file, setting, environment), or NULL.  palloc'd; WARNING when the file cannot be used. */
extern char *millm_effective_token(void);

#endif
