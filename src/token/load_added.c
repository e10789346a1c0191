/*
 * load_added.c -- added tokens: their ids and flags, and the two sets by which encode.c finds them in a text.
 */
#include <stdlib.h>
#include <string.h>

#include "loader.h"

MillmCode
millm_load_added_token(Loader *l, const json_t *json, bool is_special, int64_t file_id)
{
	MillmTokenizer *tok = l->tok;
	json_t	   *content = json_is_string(json) ? (json_t *) json : millm_load_get(json, "content");
	const char *text = json_string_value(content);
	size_t		n = json_string_length(content);
	AddedToken	token = {0};
	bool		is_new;
	int64_t		id;
	size_t		i;
	MillmCode	rc;

	if (!text)
		return millm_load_invalid(l, "An added token has no \"content\".");
	if (n == 0)
		return MILLM_OK;
	if (n > MAX_ADDED_BYTES)
		return millm_load_invalid(l, "An added token is %zu bytes long, the limit is %d.", n, MAX_ADDED_BYTES);
	token.special = is_special;
	if (json_is_object(json))
	{
		if ((rc = millm_load_bool(l, json, "special", is_special, &token.special)) != MILLM_OK ||
			(rc = millm_load_bool(l, json, "single_word", false, &token.single_word)) != MILLM_OK ||
			(rc = millm_load_bool(l, json, "lstrip", false, &token.lstrip)) != MILLM_OK ||
			(rc = millm_load_bool(l, json, "rstrip", false, &token.rstrip)) != MILLM_OK ||
			(rc = millm_load_bool(l, json, "normalized", !token.special, &token.normalized)) != MILLM_OK)
			return rc;
		token.special = token.special || is_special;
	}
	id = millm_map_get(&tok->contents, text, n);
	if (id < 0)
	{
		id = (int64_t) l->n_vocabulary;
		if (l->max_added >= id)
			id = (int64_t) l->max_added + 1;
		if ((rc = millm_load_content(l, millm_map_key(text, (uint32_t) n), id, &is_new)) != MILLM_OK)
			return rc;
	}
	if (file_id >= 0 && file_id != id)
		return millm_load_invalid(l, "The added token \"%.100s\" has the id %lld, but its place in the vocabulary is %lld.",
					   text, (long long) file_id, (long long) id);
	token.id = (int32_t) id;
	token.content = tok->tokens[id].content;
	tok->tokens[id].special = token.special = token.special || tok->tokens[id].special;
	if (token.id > l->max_added)
		l->max_added = token.id;
	i = tok->tokens[id].added;
	if (i == 0)
	{
		if ((tok->n_added & (tok->n_added - 1)) == 0)
		{
			size_t		capacity = tok->n_added ? tok->n_added * 2 : 1;
			AddedToken *added = realloc(tok->added, capacity * sizeof(*added));

			if (!added)
				return millm_load_out_of_memory(l->err);
			tok->added = added;
		}
		i = ++tok->n_added;
		tok->tokens[id].added = (uint32_t) i;
	}
	tok->added[i - 1] = token;
	return MILLM_OK;
}

MillmCode
millm_load_added_tokens(Loader *l, const json_t *list)
{
	size_t		i;
	json_t	   *json;
	MillmCode	rc;

	if (list && !json_is_array(list))
		return millm_load_invalid(l, "\"added_tokens\" is not an array.");
	json_array_foreach(list, i, json)
	{
		json_t	   *id = millm_load_get(json, "id");

		if (!json_is_integer(id) || json_integer_value(id) < 0)
			return millm_load_invalid(l, "An added token has no \"id\".");
		if ((rc = millm_load_added_token(l, json, false, json_integer_value(id))) != MILLM_OK)
			return rc;
	}
	return MILLM_OK;
}

static int
compare_patterns(const void *a, const void *b)
{
	const AddedPattern *x = a;
	const AddedPattern *y = b;
	size_t		n = x->n < y->n ? x->n : y->n;
	int			order = memcmp(x->text, y->text, n);

	if (order != 0)
		return order;
	if (x->n != y->n)
		return x->n < y->n ? -1 : 1;
	return x->token < y->token ? -1 : x->token > y->token;
}

/* Fill one of the two sets with its tokens, once all are known. */
static MillmCode
build_set(Loader *l, AddedSet *set, bool normalized)
{
	MillmTokenizer *tok = l->tok;
	Bytes		buffers[2] = {0};
	PatternScratch scratch = {0};
	size_t	   *offsets = NULL; /* of the patterns in set->texts, which may still move */
	uint32_t	first = 0;
	MillmCode	rc = MILLM_OK;

	if (tok->n_added == 0)
		return MILLM_OK;
	set->patterns = calloc(tok->n_added, sizeof(*set->patterns));
	offsets = calloc(tok->n_added, sizeof(*offsets));
	if (!set->patterns || !offsets)
		rc = millm_load_out_of_memory(l->err);
	for (size_t i = 0; i < tok->n_added && rc == MILLM_OK; i++)
	{
		const AddedToken *token = &tok->added[i];
		const char *text = tok->contents.keys.data + token->content.offset;
		size_t		n = token->content.n;
		bool		is_moved;

		if (token->normalized != normalized)
			continue;
		if (normalized &&
			(rc = millm_normalize(tok, &scratch, text, n, buffers, &text, &n, &is_moved, l->err)) != MILLM_OK)
			break;
		if (n == 0)
			continue;
		offsets[set->n] = set->texts.n;
		if (!millm_bytes_add(&set->texts, text, n))
			rc = millm_load_out_of_memory(l->err);
		set->patterns[set->n++] = (AddedPattern) {NULL, n, (uint32_t) i};
	}
	for (size_t i = 0; i < set->n && rc == MILLM_OK; i++)
		set->patterns[i].text = set->texts.data + offsets[i];
	if (rc == MILLM_OK)
		qsort(set->patterns, set->n, sizeof(*set->patterns), compare_patterns);
	for (int b = 0; b <= 256 && rc == MILLM_OK; b++)
	{
		while (first < set->n && (unsigned char) set->patterns[first].text[0] < b)
			first++;
		set->first[b] = first;
	}
	free(offsets);
	millm_bytes_free(&buffers[0]);
	millm_bytes_free(&buffers[1]);
	millm_pattern_scratch_free(&scratch);
	return rc;
}

MillmCode
millm_load_sets(Loader *l)
{
	MillmCode	rc = build_set(l, &l->tok->raw, false);

	return rc == MILLM_OK ? build_set(l, &l->tok->normalized, true) : rc;
}
