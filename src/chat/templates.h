/*
 * templates.h -- the chat templates of one model, as its directory has them.
 */
#ifndef MILLM_CHAT_TEMPLATES_H
#define MILLM_CHAT_TEMPLATES_H

#include "chat.h"

/* Immutable; may be used by many threads at once. */
typedef struct MillmTemplates MillmTemplates;

/*
 * Read them: chat_template.jinja, else tokenizer_config.json's chat_template (one, or a list of named ones), and
 * additional_chat_templates/NAME.jinja.  *out is NULL when the model has none.  A template that does not compile is an
 * error only when it is applied; *complaint (may be NULL) then has the first such error, else MILLM_OK.
 * INVALID_MODEL_FILE for files that are not what they should be.
 */
extern MillmCode millm_templates_open(const char *dir, MillmTemplates **out, MillmError *complaint, MillmError *err);
extern void millm_templates_free(MillmTemplates *set);	/* NULL is fine */

/* What a caller may want of a conversation.  JSON is borrowed. */
typedef struct MillmChatOptions
{
	const char *template_name;	/* NULL: "tool_use" if there is one and tools are given, else "default" */
	const json_t *messages;		/* an array of objects, each with a role */
	const json_t *tools;		/* an array, or NULL */
	const json_t *documents;	/* an array of objects, or NULL */
	const json_t *kwargs;		/* further variables, an object, or NULL; they win, and may not be messages, tools or documents */
	bool		add_generation_prompt;
} MillmChatOptions;

/*
 * The conversation as the model was trained to see it.  set may be NULL: UNSUPPORTED, for a model without a template is never given
 * another's markers.  UNSUPPORTED too for what the model would not see: pictures and sounds; tools, documents and variables that its
 * template does not use.  INVALID_ARGUMENT for a name that is not there and for messages of the wrong shape; errors of
 * millm_template_render().
 */
extern MillmCode millm_templates_apply(const MillmTemplates *set, const MillmChatOptions *options, time_t now,
									   MillmRendering *out, MillmError *err);

#endif
