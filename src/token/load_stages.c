/*
 * load_stages.c -- normalizers, pre-tokenizers, post-processors and decoders of tokenizer.json.
 *
 * Sequences are taken apart, and components that are made of others (BertNormalizer, BertPreTokenizer, ByteLevel) are loaded as
 * those: what is left are the few kinds of stages of tokenizer.h.
 */
#include <stdlib.h>
#include <string.h>

#include "loader.h"
#include "unicode.h"

#define MAX_POST_IDS 64			/* that a post-processor adds on one side */

/* The "type" of a component. */
static MillmCode
get_type(Loader *l, const json_t *component, const char *part, const char **type)
{
	*type = json_string_value(millm_load_get(component, "type"));
	return *type ? MILLM_OK : millm_load_invalid(l, "A %s has no \"type\".", part);
}

/* {"String": ...} or {"Regex": ...} */
static MillmCode
get_pattern(Loader *l, const json_t *component, bool may_be_regex, const char *part, Pattern *out)
{
	json_t	   *pattern = millm_load_get(component, "pattern");
	json_t	   *regex = millm_load_get(pattern, "Regex");
	MillmCode	rc;

	if (json_is_string(regex))
	{
		if (!may_be_regex)
			return millm_load_unsupported(l, part, "Replace with a regular expression");
		return millm_pattern_regex(out, json_string_value(regex), json_string_length(regex), l->err);
	}
	*out = (Pattern) {.kind = PATTERN_LITERAL};
	if ((rc = millm_load_text(l, pattern, "String", true, &out->literal, &out->literal_n)) != MILLM_OK)
		return rc;
	return out->literal_n > 0 ? MILLM_OK : millm_load_unsupported(l, part, "pattern that is empty");
}

/* ---- normalizers ---- */

/* Those without settings. */
static const struct
{
	const char *name;
	Normalizer	stage;
}			plain_normalizers[] = {
	{"NFC", {.kind = NORMALIZE_FORM, .is_composed = true}},
	{"NFD", {.kind = NORMALIZE_FORM}},
	{"NFKC", {.kind = NORMALIZE_FORM, .is_composed = true, .is_compatible = true}},
	{"NFKD", {.kind = NORMALIZE_FORM, .is_compatible = true}},
	{"Lowercase", {.kind = NORMALIZE_LOWERCASE}},
	{"StripAccents", {.kind = NORMALIZE_DROP, .habits = UH_ACCENT}},
	{"Nmt", {.kind = NORMALIZE_NMT}},
	{"ByteLevel", {.kind = NORMALIZE_BYTE_LEVEL}},
};

static MillmCode
add_normalizer(Loader *l, Normalizer stage, Normalizer **out)
{
	if (l->tok->n_normalizers == MAX_STAGES)
		return millm_load_unsupported(l, "normalizer", "Sequence with more than 32 parts");
	*out = &l->tok->normalizers[l->tok->n_normalizers++];
	**out = stage;
	return MILLM_OK;
}

/* BertNormalizer is up to five others; accents go with the capitals unless "strip_accents" says. */
static MillmCode
load_bert(Loader *l, const json_t *json)
{
	bool		cleans;
	bool		splits_chinese;
	bool		lowers;
	bool		strips;
	Normalizer *stage;
	MillmCode	rc;

	if ((rc = millm_load_bool(l, json, "clean_text", true, &cleans)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "handle_chinese_chars", true, &splits_chinese)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "lowercase", true, &lowers)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "strip_accents", lowers, &strips)) != MILLM_OK)
		return rc;
	if (cleans)
		rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_CLEAN}, &stage);
	if (rc == MILLM_OK && splits_chinese)
		rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_CHINESE}, &stage);
	if (rc == MILLM_OK && strips)
		rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_FORM}, &stage);
	if (rc == MILLM_OK && strips)
		rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_DROP, .habits = UH_MARK}, &stage);
	if (rc == MILLM_OK && lowers)
		rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_LOWERCASE}, &stage);
	return rc;
}

MillmCode
millm_load_normalizer(Loader *l, const json_t *json, int depth)
{
	const char *type;
	Normalizer *stage = NULL;
	MillmCode	rc;

	if ((rc = get_type(l, json, "normalizer", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return millm_load_unsupported(l, "normalizer", "Sequence nested too deeply");
		if (!json_is_array(millm_load_get(json, "normalizers")))
			return millm_load_invalid(l, "\"normalizers\" is not an array.");
		json_array_foreach(millm_load_get(json, "normalizers"), i, part)
			if ((rc = millm_load_normalizer(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (strcmp(type, "BertNormalizer") == 0)
		return load_bert(l, json);
	for (size_t i = 0; i < sizeof(plain_normalizers) / sizeof(plain_normalizers[0]); i++)
		if (strcmp(type, plain_normalizers[i].name) == 0)
			return add_normalizer(l, plain_normalizers[i].stage, &stage);
	if (strcmp(type, "Strip") == 0)
	{
		if ((rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_STRIP}, &stage)) != MILLM_OK ||
			(rc = millm_load_bool(l, json, "strip_left", true, &stage->strips_start)) != MILLM_OK)
			return rc;
		return millm_load_bool(l, json, "strip_right", true, &stage->strips_end);
	}
	if (strcmp(type, "Prepend") == 0)
	{
		if ((rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_PREPEND}, &stage)) != MILLM_OK)
			return rc;
		return millm_load_text(l, json, "prepend", true, &stage->text, &stage->text_n);
	}
	if (strcmp(type, "Replace") == 0)
	{
		if ((rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_REPLACE}, &stage)) != MILLM_OK ||
			(rc = get_pattern(l, json, true, "normalizer", &stage->pattern)) != MILLM_OK)
			return rc;
		return millm_load_text(l, json, "content", true, &stage->text, &stage->text_n);
	}
	if (strcmp(type, "Precompiled") == 0)
	{
		json_t	   *charsmap = millm_load_get(json, "precompiled_charsmap");

		if (!json_is_string(charsmap))
			return millm_load_invalid(l, "\"precompiled_charsmap\" is not a string.");
		if ((rc = add_normalizer(l, (Normalizer) {.kind = NORMALIZE_CHARSMAP}, &stage)) != MILLM_OK)
			return rc;
		return millm_charsmap_read(&stage->charsmap, json_string_value(charsmap), json_string_length(charsmap), l->err);
	}
	return millm_load_unsupported(l, "normalizer", type);
}

/* ---- pre-tokenizers ---- */

static MillmCode add_pre(Loader *l, PreTokenizerKind kind, PreTokenizer **out);

MillmCode
millm_load_letters(Loader *l)
{
	PreTokenizer *letters;

	if (!l->byte_level)
		return MILLM_OK;
	l->byte_level = false;
	return add_pre(l, PRE_LETTERS, &letters);
}

static MillmCode
add_pre(Loader *l, PreTokenizerKind kind, PreTokenizer **out)
{
	MillmCode	rc = millm_load_letters(l);

	if (rc != MILLM_OK)
		return rc;
	if (l->tok->n_pre == MAX_STAGES)
		return millm_load_unsupported(l, "pre-tokenizer", "Sequence with more than 32 parts");
	*out = &l->tok->pre[l->tok->n_pre++];
	(*out)->kind = kind;
	return MILLM_OK;
}

static MillmCode
add_split(Loader *l, Pattern pattern, Behavior behavior, bool invert)
{
	PreTokenizer *pre = NULL;
	MillmCode	rc = add_pre(l, PRE_SPLIT, &pre);

	if (rc != MILLM_OK)
	{
		millm_pattern_free(&pattern);
		return rc;
	}
	pre->pattern = pattern;
	pre->behavior = behavior;
	pre->invert = invert;
	return MILLM_OK;
}

static MillmCode
load_byte_level(Loader *l, const json_t *json)
{
	static const char gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
	bool		add_prefix_space;
	bool		use_regex;
	PreTokenizer *pre;
	Pattern		pattern;
	MillmCode	rc;

	if (!millm_load_get(json, "add_prefix_space"))
		return millm_load_invalid(l, "ByteLevel has no \"add_prefix_space\".");
	if ((rc = millm_load_bool(l, json, "add_prefix_space", false, &add_prefix_space)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "use_regex", true, &use_regex)) != MILLM_OK ||
		(rc = millm_load_letters(l)) != MILLM_OK)
		return rc;
	if (add_prefix_space && (rc = add_pre(l, PRE_PREFIX_SPACE, &pre)) != MILLM_OK)
		return rc;
	if (use_regex && ((rc = millm_pattern_regex(&pattern, gpt2, sizeof(gpt2) - 1, l->err)) != MILLM_OK ||
					  (rc = add_split(l, pattern, SPLIT_ISOLATED, false)) != MILLM_OK))
		return rc;
	l->byte_level = true;
	return MILLM_OK;
}

/* The "behavior" of a splitter; absent, it is `otherwise'. */
static MillmCode
get_behavior(Loader *l, const json_t *json, const char *otherwise, Behavior *out)
{
	static const char *const names[] = {
		[SPLIT_REMOVED] = "Removed",
		[SPLIT_ISOLATED] = "Isolated",
		[SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
		[SPLIT_MERGED_WITH_NEXT] = "MergedWithNext",
		[SPLIT_CONTIGUOUS] = "Contiguous",
	};
	json_t	   *behavior = millm_load_get(json, "behavior");
	const char *name = behavior ? json_string_value(behavior) : otherwise;

	if (!name)
		return millm_load_invalid(l, "A splitter has no \"behavior\".");
	for (int i = 0; i <= SPLIT_CONTIGUOUS; i++)
		if (strcmp(names[i], name) == 0)
		{
			*out = (Behavior) i;
			return MILLM_OK;
		}
	return millm_load_invalid(l, "A splitter has the behavior \"%.50s\".", name);
}

static MillmCode
load_split(Loader *l, const json_t *json)
{
	Pattern		pattern = {0};
	Behavior	behavior;
	bool		invert;
	MillmCode	rc;

	if ((rc = get_behavior(l, json, NULL, &behavior)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "invert", false, &invert)) != MILLM_OK)
		return rc;
	if ((rc = get_pattern(l, json, true, "pre-tokenizer", &pattern)) != MILLM_OK)
	{
		millm_pattern_free(&pattern);
		return rc;
	}
	return add_split(l, pattern, behavior, invert);
}

/* CharDelimiterSplit */
static MillmCode
load_delimiter(Loader *l, const json_t *json)
{
	Pattern		pattern = {.kind = PATTERN_LITERAL};
	uint32_t	cp;
	MillmCode	rc = millm_load_text(l, json, "delimiter", true, &pattern.literal, &pattern.literal_n);

	if (rc != MILLM_OK)
		return rc;
	if (pattern.literal_n > 0 && millm_utf8_get(pattern.literal, &cp) == pattern.literal_n)
		return add_split(l, pattern, SPLIT_REMOVED, false);
	millm_pattern_free(&pattern);
	return millm_load_invalid(l, "The \"delimiter\" of CharDelimiterSplit is not one character.");
}

static MillmCode
load_fixed_length(Loader *l, const json_t *json)
{
	Pattern		pattern = {.kind = PATTERN_LENGTH, .length = 5};
	MillmCode	rc;

	if (millm_load_get(json, "length") && (rc = millm_load_size(l, json, "length", &pattern.length)) != MILLM_OK)
		return rc;
	if (pattern.length == 0)
		return millm_load_invalid(l, "The \"length\" of FixedLength is 0.");
	return add_split(l, pattern, SPLIT_ISOLATED, false);
}

static MillmCode
load_metaspace(Loader *l, const json_t *json, Prepend *prepend, Pattern *replacement, bool *is_split)
{
	const char *scheme = json_string_value(millm_load_get(json, "prepend_scheme"));
	bool		legacy;
	uint32_t	cp;
	MillmCode	rc;

	*replacement = (Pattern) {.kind = PATTERN_LITERAL};
	*prepend = PREPEND_ALWAYS;
	if ((rc = millm_load_bool(l, json, "add_prefix_space", true, &legacy)) != MILLM_OK ||
		(rc = millm_load_bool(l, json, "split", true, is_split)) != MILLM_OK)
		return rc;
	if (scheme && strcmp(scheme, "never") == 0)
		*prepend = PREPEND_NEVER;
	else if (scheme && strcmp(scheme, "first") == 0)
		*prepend = PREPEND_FIRST;
	else if (millm_load_get(json, "prepend_scheme") && (!scheme || strcmp(scheme, "always") != 0))
		return millm_load_invalid(l, "Metaspace has the \"prepend_scheme\" \"%.50s\".", scheme ? scheme : "");
	if (!legacy)
	{
		if (scheme && *prepend != PREPEND_NEVER)
			return millm_load_invalid(l, "Metaspace has \"add_prefix_space\" false, but \"prepend_scheme\" \"%s\".", scheme);
		*prepend = PREPEND_NEVER;
	}
	if ((rc = millm_load_text(l, json, "replacement", true, &replacement->literal, &replacement->literal_n)) != MILLM_OK)
		return rc;
	if (replacement->literal_n == 0 || millm_utf8_get(replacement->literal, &cp) != replacement->literal_n)
		return millm_load_invalid(l, "The \"replacement\" of Metaspace is not one character.");
	return MILLM_OK;
}

static MillmCode
load_metaspace_splitter(Loader *l, const json_t *json)
{
	Pattern		replacement;
	Prepend		prepend;
	bool		is_split;
	PreTokenizer *pre = NULL;
	MillmCode	rc;

	if ((rc = load_metaspace(l, json, &prepend, &replacement, &is_split)) != MILLM_OK ||
		(rc = add_pre(l, PRE_METASPACE, &pre)) != MILLM_OK)
	{
		millm_pattern_free(&replacement);
		return rc;
	}
	pre->prepend = prepend;
	pre->text = replacement.literal;
	pre->text_n = replacement.literal_n;
	if (!is_split)
		return MILLM_OK;
	replacement.literal = malloc(pre->text_n);
	if (!replacement.literal)
		return millm_load_out_of_memory(l->err);
	memcpy(replacement.literal, pre->text, pre->text_n);
	return add_split(l, replacement, SPLIT_MERGED_WITH_NEXT, false);
}

MillmCode
millm_load_pre_tokenizer(Loader *l, const json_t *json, int depth)
{
	const char *type;
	MillmCode	rc;

	if ((rc = get_type(l, json, "pre-tokenizer", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return millm_load_unsupported(l, "pre-tokenizer", "Sequence nested too deeply");
		if (!json_is_array(millm_load_get(json, "pretokenizers")))
			return millm_load_invalid(l, "\"pretokenizers\" is not an array.");
		json_array_foreach(millm_load_get(json, "pretokenizers"), i, part)
			if ((rc = millm_load_pre_tokenizer(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (strcmp(type, "ByteLevel") == 0)
		return load_byte_level(l, json);
	if (strcmp(type, "Split") == 0)
		return load_split(l, json);
	if (strcmp(type, "Digits") == 0)
	{
		bool		individual;

		if ((rc = millm_load_bool(l, json, "individual_digits", false, &individual)) != MILLM_OK)
			return rc;
		return add_split(l, (Pattern) {.kind = PATTERN_FLAG, .flag = UC_NUMERIC},
						 individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, false);
	}
	if (strcmp(type, "WhitespaceSplit") == 0)
		return add_split(l, (Pattern) {.kind = PATTERN_FLAG, .flag = UC_SPACE}, SPLIT_REMOVED, false);
	if (strcmp(type, "Whitespace") == 0)
		return add_split(l, (Pattern) {.kind = PATTERN_WORD}, SPLIT_REMOVED, true);
	if (strcmp(type, "UnicodeScripts") == 0)
		return add_split(l, (Pattern) {.kind = PATTERN_SCRIPT}, SPLIT_REMOVED, true);
	if (strcmp(type, "Punctuation") == 0)
	{
		Behavior	behavior;

		if ((rc = get_behavior(l, json, "Isolated", &behavior)) != MILLM_OK)
			return rc;
		return add_split(l, (Pattern) {.kind = PATTERN_PUNCTUATION}, behavior, false);
	}
	if (strcmp(type, "BertPreTokenizer") == 0)
	{
		if ((rc = add_split(l, (Pattern) {.kind = PATTERN_FLAG, .flag = UC_SPACE}, SPLIT_REMOVED, false)) != MILLM_OK)
			return rc;
		return add_split(l, (Pattern) {.kind = PATTERN_PUNCTUATION}, SPLIT_ISOLATED, false);
	}
	if (strcmp(type, "CharDelimiterSplit") == 0)
		return load_delimiter(l, json);
	if (strcmp(type, "FixedLength") == 0)
		return load_fixed_length(l, json);
	if (strcmp(type, "Metaspace") == 0)
		return load_metaspace_splitter(l, json);
	return millm_load_unsupported(l, "pre-tokenizer", type);
}

/* ---- the post-processor ---- */

MillmCode
millm_load_post_ids(Loader *l, int32_t **ids, size_t *n, const int32_t *more, size_t n_more, bool in_front)
{
	int32_t    *grown;

	if (*n + n_more > MAX_POST_IDS)
		return millm_load_unsupported(l, "post-processor", "with more than 64 tokens");
	grown = realloc(*ids, (*n + n_more + 1) * sizeof(*grown));
	if (!grown)
		return millm_load_out_of_memory(l->err);
	*ids = grown;
	if (in_front)
		memmove(grown + n_more, grown, *n * sizeof(*grown));
	memcpy(grown + (in_front ? 0 : *n), more, n_more * sizeof(*grown));
	*n += n_more;
	return MILLM_OK;
}

/* Is it the id of a token? */
static bool
is_token(const MillmTokenizer *tok, const json_t *id)
{
	return json_is_integer(id) && json_integer_value(id) >= 0 && json_integer_value(id) < tok->n_ids &&
		tok->tokens[json_integer_value(id)].exists;
}

static MillmCode
load_template(Loader *l, const json_t *json)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *single = millm_load_get(json, "single");
	int32_t		ids[2][MAX_POST_IDS];	/* before the text, and behind it */
	size_t		n[2] = {0};
	int			side = 0;
	size_t		i;
	json_t	   *item;
	MillmCode	rc;

	if (!json_is_array(single))
		return millm_load_invalid(l, "TemplateProcessing has no \"single\".");
	json_array_foreach(single, i, item)
	{
		json_t	   *sequence = millm_load_get(item, "Sequence");
		const char *name = json_string_value(millm_load_get(millm_load_get(item, "SpecialToken"), "id"));
		json_t	   *token_ids;
		size_t		k;
		json_t	   *id;

		if (sequence)
		{
			const char *which = json_string_value(millm_load_get(sequence, "id"));

			if (!which || strcmp(which, "A") != 0 || side++ > 0)
				return millm_load_unsupported(l, "post-processor", "TemplateProcessing that does not name the text once");
			continue;
		}
		token_ids = name ? millm_load_get(millm_load_get(millm_load_get(json, "special_tokens"), name), "ids") : NULL;
		if (!json_is_array(token_ids))
			return millm_load_invalid(l, "Item %zu of TemplateProcessing names no special token.", i);
		json_array_foreach(token_ids, k, id)
		{
			if (!is_token(tok, id))
				return millm_load_invalid(l, "The special token \"%.100s\" of TemplateProcessing has an id that no token has.", name);
			if (n[side] == MAX_POST_IDS)
				return millm_load_unsupported(l, "post-processor", "with more than 64 tokens");
			ids[side][n[side]++] = (int32_t) json_integer_value(id);
		}
	}
	if (side == 0)
		return millm_load_unsupported(l, "post-processor", "TemplateProcessing that does not name the text once");
	if ((rc = millm_load_post_ids(l, &tok->before, &tok->n_before, ids[0], n[0], true)) != MILLM_OK)
		return rc;
	return millm_load_post_ids(l, &tok->after, &tok->n_after, ids[1], n[1], false);
}

/* BertProcessing, RobertaProcessing: "cls" before the text, "sep" behind it, each [token, id]. */
static MillmCode
load_pair(Loader *l, const json_t *json)
{
	static const char *const keys[] = {"cls", "sep"};
	int32_t		ids[2];
	MillmCode	rc;

	for (int i = 0; i < 2; i++)
	{
		json_t	   *token = millm_load_get(json, keys[i]);
		json_t	   *id = json_array_get(token, 1);

		if (json_array_size(token) != 2 || !json_is_string(json_array_get(token, 0)) || !json_is_integer(id))
			return millm_load_invalid(l, "\"%s\" is not a token and its id.", keys[i]);
		if (!is_token(l->tok, id))
			return millm_load_invalid(l, "\"%s\" has an id that no token has.", keys[i]);
		ids[i] = (int32_t) json_integer_value(id);
	}
	if ((rc = millm_load_post_ids(l, &l->tok->before, &l->tok->n_before, &ids[0], 1, true)) != MILLM_OK)
		return rc;
	return millm_load_post_ids(l, &l->tok->after, &l->tok->n_after, &ids[1], 1, false);
}

MillmCode
millm_load_post_processor(Loader *l, const json_t *json, int depth)
{
	const char *type;
	MillmCode	rc;

	if ((rc = get_type(l, json, "post-processor", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return millm_load_unsupported(l, "post-processor", "Sequence nested too deeply");
		if (!json_is_array(millm_load_get(json, "processors")))
			return millm_load_invalid(l, "\"processors\" is not an array.");
		json_array_foreach(millm_load_get(json, "processors"), i, part)
			if ((rc = millm_load_post_processor(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (strcmp(type, "ByteLevel") == 0)
		return MILLM_OK;		/* it only moves offsets, which we do not have */
	if (strcmp(type, "TemplateProcessing") == 0)
		return load_template(l, json);
	if (strcmp(type, "BertProcessing") == 0 || strcmp(type, "RobertaProcessing") == 0)
		return load_pair(l, json);
	return millm_load_unsupported(l, "post-processor", type);
}

/* ---- decoders ---- */

/* A text of a decoder that must not be empty: one would be found everywhere. */
static MillmCode
get_literal(Loader *l, const json_t *json, const char *key, const char *type, char **out, size_t *n)
{
	MillmCode	rc = millm_load_text(l, json, key, true, out, n);

	return rc != MILLM_OK || *n > 0 ? rc : millm_load_invalid(l, "The \"%s\" of %s is empty.", key, type);
}

static MillmCode
load_strip(Loader *l, const json_t *json, Decoder *stage)
{
	uint32_t	cp;
	MillmCode	rc;

	stage->pattern.kind = PATTERN_LITERAL;
	if ((rc = millm_load_size(l, json, "start", &stage->n_start)) != MILLM_OK ||
		(rc = millm_load_size(l, json, "stop", &stage->n_stop)) != MILLM_OK ||
		(rc = millm_load_text(l, json, "content", true, &stage->pattern.literal, &stage->pattern.literal_n)) != MILLM_OK)
		return rc;
	if (stage->pattern.literal_n == 0 || millm_utf8_get(stage->pattern.literal, &cp) != stage->pattern.literal_n)
		return millm_load_invalid(l, "The \"content\" of Strip is not one character.");
	return MILLM_OK;
}

static MillmCode
add_decoder(Loader *l, const json_t *json, int depth)
{
	MillmTokenizer *tok = l->tok;
	const char *type;
	Decoder    *stage;
	MillmCode	rc;

	if ((rc = get_type(l, json, "decoder", &type)) != MILLM_OK)
		return rc;
	if (strcmp(type, "Sequence") == 0)
	{
		size_t		i;
		json_t	   *part;

		if (depth == MAX_SEQUENCE_DEPTH)
			return millm_load_unsupported(l, "decoder", "Sequence nested too deeply");
		if (json_array_size(millm_load_get(json, "decoders")) == 0)
			return millm_load_unsupported(l, "decoder", "Sequence without decoders");
		json_array_foreach(millm_load_get(json, "decoders"), i, part)
			if ((rc = add_decoder(l, part, depth + 1)) != MILLM_OK)
				return rc;
		return MILLM_OK;
	}
	if (tok->n_decoders == MAX_STAGES)
		return millm_load_unsupported(l, "decoder", "Sequence with more than 32 parts");
	stage = &tok->decoders[tok->n_decoders++];
	if (strcmp(type, "ByteLevel") == 0)
		stage->kind = DECODE_BYTE_LEVEL;
	else if (strcmp(type, "ByteFallback") == 0)
		stage->kind = DECODE_BYTE_FALLBACK;
	else if (strcmp(type, "Fuse") == 0)
		stage->kind = DECODE_FUSE;
	else if (strcmp(type, "Replace") == 0)
	{
		stage->kind = DECODE_REPLACE;
		if ((rc = get_pattern(l, json, false, "decoder", &stage->pattern)) != MILLM_OK)
			return rc;
		return millm_load_text(l, json, "content", true, &stage->text, &stage->text_n);
	}
	else if (strcmp(type, "Strip") == 0)
	{
		stage->kind = DECODE_STRIP;
		return load_strip(l, json, stage);
	}
	else if (strcmp(type, "Metaspace") == 0)
	{
		Prepend		prepend;
		bool		is_split;

		stage->kind = DECODE_METASPACE;
		rc = load_metaspace(l, json, &prepend, &stage->pattern, &is_split);
		stage->is_first_dropped = prepend != PREPEND_NEVER;
		return rc;
	}
	else if (strcmp(type, "WordPiece") == 0)
	{
		stage->kind = DECODE_WORD_PIECE;
		if ((rc = millm_load_bool(l, json, "cleanup", true, &stage->is_cleaned)) != MILLM_OK)
			return rc;
		return millm_load_text(l, json, "prefix", true, &stage->pattern.literal, &stage->pattern.literal_n);
	}
	else if (strcmp(type, "BPEDecoder") == 0)
	{
		stage->kind = DECODE_SUFFIX;
		return get_literal(l, json, "suffix", type, &stage->pattern.literal, &stage->pattern.literal_n);
	}
	else if (strcmp(type, "CTC") == 0)
	{
		stage->kind = DECODE_CTC;
		if ((rc = millm_load_bool(l, json, "cleanup", true, &stage->is_cleaned)) != MILLM_OK ||
			(rc = get_literal(l, json, "pad_token", type, &stage->pattern.literal, &stage->pattern.literal_n)) != MILLM_OK)
			return rc;
		return get_literal(l, json, "word_delimiter_token", type, &stage->text, &stage->text_n);
	}
	else
		return millm_load_unsupported(l, "decoder", type);
	return MILLM_OK;
}

/*
 * Are the decoders in an order that decode.c reproduces?  ByteLevel alone; else at most one ByteFallback, and Fuse at the end or
 * before one Strip of the beginning.
 */
static MillmCode
check_decoders(Loader *l)
{
	const MillmTokenizer *tok = l->tok;
	int			n_fallbacks = 0;
	bool		is_fused = false;

	for (int i = 0; i < tok->n_decoders; i++)
	{
		const Decoder *d = &tok->decoders[i];
		bool		is_final_strip = d->kind == DECODE_STRIP && d->n_stop == 0 && i == tok->n_decoders - 1;

		n_fallbacks += d->kind == DECODE_BYTE_FALLBACK;
		if ((d->kind == DECODE_BYTE_LEVEL && tok->n_decoders > 1) || n_fallbacks > 1 || (is_fused && !is_final_strip))
			return millm_load_unsupported(l, "decoder", "Sequence in this order");
		is_fused = d->kind == DECODE_FUSE;
	}
	return MILLM_OK;
}

MillmCode
millm_load_decoder(Loader *l, const json_t *json)
{
	MillmCode	rc = add_decoder(l, json, 0);

	return rc == MILLM_OK ? check_decoders(l) : rc;
}
