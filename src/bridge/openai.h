/*
 * openai.h -- the routes under /v1, as OpenAI's clients know them.
 */
#ifndef MILLM_BRIDGE_OPENAI_H
#define MILLM_BRIDGE_OPENAI_H

#include "http.h"

extern void openai_models(HttpRequest *r);		/* GET /v1/models: what is loaded; ?all=true: what could be */
extern void openai_model(HttpRequest *r);		/* GET /v1/models/{id} */
extern void openai_chat(HttpRequest *r);		/* POST /v1/chat/completions */
extern void openai_complete(HttpRequest *r);	/* POST /v1/completions */
extern void openai_embed(HttpRequest *r);		/* POST /v1/embeddings */

#endif
