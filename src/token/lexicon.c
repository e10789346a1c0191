/*
 * lexicon.c -- Unigram, WordPiece and WordLevel over one trie.
 *
 * The trie's edges lie in one hash table, keyed by node and byte: a step is one look-up, and a vocabulary of 250,000 pieces is
 * built in some tens of milliseconds, in any order.
 *
 * Unigram is Viterbi's algorithm from left to right.  Sums and their order are the genuine library's to the bit, and so is the
 * choice between equals: the first way to a place stays unless a later one is strictly better, and at one place shorter
 * pieces come first.
 */
#include "lexicon.h"

#include <stdlib.h>
#include <string.h>

#include "unicode.h"

typedef struct PathNode
{
	double		score;			/* of the best way to here */
	uint32_t	start;			/* of its last piece */
	int32_t		id;				/* of its last piece; NOT_REACHED: no way leads here yet */
} PathNode;

#define NOT_REACHED (-2)

/* ---- the trie ---- */

/* Where the edge of a node and a byte should be. */
static inline size_t
edge_place(const Lexicon *lexicon, uint32_t node, unsigned char byte)
{
	return ((node << 8 | byte) * UINT64_C(0x9E3779B97F4A7C15) >> 32) & (lexicon->n_edge_slots - 1);
}

static TrieEdge *
find_edge(const Lexicon *lexicon, uint32_t node, unsigned char byte)
{
	uint32_t	key = node << 8 | byte;
	size_t		mask = lexicon->n_edge_slots - 1;
	size_t		i = edge_place(lexicon, node, byte);

	while (lexicon->edges[i].node != 0 && lexicon->edges[i].key != key)
		i = (i + 1) & mask;
	return &lexicon->edges[i];
}

static bool
grow_edges(Lexicon *lexicon, size_t n_slots)
{
	TrieEdge   *old = lexicon->edges;
	size_t		n_old = lexicon->n_edge_slots;
	TrieEdge   *edges = millm_table_alloc(n_slots, sizeof(*edges));

	if (!edges)
		return false;
	memset(edges, 0, n_slots * sizeof(*edges));
	lexicon->edges = edges;
	lexicon->n_edge_slots = n_slots;
	for (size_t i = 0; i < n_old; i++)
		if (old[i].node != 0)
			*find_edge(lexicon, old[i].key >> 8, (unsigned char) old[i].key) = old[i];
	free(old);
	return true;
}

bool
millm_lexicon_reserve(Lexicon *lexicon, size_t n_bytes)
{
	size_t		n_slots = 1024;

	/* a third of the bytes of a vocabulary are nodes of their own; the table grows when they are more */
	while (n_slots < n_bytes / 2)
		n_slots *= 2;
	lexicon->max_nodes = n_slots / 2;
	lexicon->ids = millm_table_alloc(lexicon->max_nodes, sizeof(*lexicon->ids));
	if (!lexicon->ids || !grow_edges(lexicon, n_slots))
		return false;
	lexicon->ids[0] = -1;
	lexicon->n_nodes = 1;
	return true;
}

static bool
grow_nodes(Lexicon *lexicon)
{
	int32_t    *ids;

	ids = millm_table_alloc(lexicon->max_nodes * 2, sizeof(*ids));
	if (!ids)
		return false;
	memcpy(ids, lexicon->ids, lexicon->n_nodes * sizeof(*ids));
	free(lexicon->ids);
	lexicon->ids = ids;
	lexicon->max_nodes *= 2;
	return grow_edges(lexicon, lexicon->n_edge_slots * 2);
}

/* One step, along an edge that is made if there is none. */
static bool
enter(Lexicon *lexicon, uint32_t *node, unsigned char byte)
{
	TrieEdge   *edge;

	if (lexicon->n_nodes == lexicon->max_nodes && !grow_nodes(lexicon))
		return false;
	edge = find_edge(lexicon, *node, byte);
	if (edge->node == 0)
	{
		*edge = (TrieEdge) {*node << 8 | byte, lexicon->n_nodes};
		lexicon->ids[lexicon->n_nodes++] = -1;
	}
	*node = edge->node;
	return true;
}

/* Byte by byte of all pieces at once: what the next step of one will read is fetched while the others do theirs. */
bool
millm_lexicon_add(Lexicon *lexicon, const LexiconPiece *pieces, size_t n)
{
	uint32_t	nodes[LEXICON_BATCH] = {0};
	uint32_t	longest = 0;

	for (size_t i = 0; i < n; i++)
		if (pieces[i].n > longest)
			longest = pieces[i].n;
	for (uint32_t at = 0; at < longest; at++)
		for (size_t i = 0; i < n; i++)
		{
			if (at >= pieces[i].n)
				continue;
			if (!enter(lexicon, &nodes[i], (unsigned char) pieces[i].text[at]))
				return false;
			if (at + 1 < pieces[i].n)
				__builtin_prefetch(&lexicon->edges[edge_place(lexicon, nodes[i], (unsigned char) pieces[i].text[at + 1])], 1);
		}
	for (size_t i = 0; i < n; i++)
		lexicon->ids[nodes[i]] = pieces[i].id;
	return true;
}

/* One step; NO_NODE: no piece goes on so. */
static inline uint32_t
step(const Lexicon *lexicon, uint32_t node, char byte)
{
	uint32_t	next = find_edge(lexicon, node, (unsigned char) byte)->node;

	return next != 0 ? next : NO_NODE;
}

uint32_t
millm_lexicon_walk(const Lexicon *lexicon, const char *text, size_t n)
{
	uint32_t	node = 0;

	for (size_t i = 0; i < n && node != NO_NODE; i++)
		node = step(lexicon, node, text[i]);
	return node;
}

int32_t
millm_lexicon_find(const Lexicon *lexicon, const char *text, size_t n)
{
	uint32_t	node = millm_lexicon_walk(lexicon, text, n);

	return node == NO_NODE ? -1 : lexicon->ids[node];
}

bool
millm_lexicon_is_sound(const Lexicon *lexicon, size_t n_ids)
{
	size_t		limit = lexicon->kind == LEXICON_UNIGRAM && lexicon->n_scores < n_ids ? lexicon->n_scores : n_ids;
	size_t		n_slots = lexicon->n_edge_slots;
	size_t		n_edges = 0;
	bool		is_bad = false;

	if (lexicon->n_nodes == 0 || n_slots == 0 || (n_slots & (n_slots - 1)) != 0 || lexicon->unknown_id < -1 ||
		(lexicon->unknown_id >= 0 && (size_t) lexicon->unknown_id >= limit) ||
		(lexicon->continuing >= lexicon->n_nodes && lexicon->continuing != NO_NODE))
		return false;
	for (size_t i = 0; i < n_slots; i++)
	{
		is_bad |= lexicon->edges[i].node >= lexicon->n_nodes;
		n_edges += lexicon->edges[i].node != 0;
	}
	for (size_t i = 0; i < lexicon->n_nodes; i++)
		is_bad |= lexicon->ids[i] >= 0 && (size_t) lexicon->ids[i] >= limit;
	return !is_bad && n_edges < n_slots;
}

void
millm_lexicon_free(Lexicon *lexicon)
{
	free(lexicon->edges);
	free(lexicon->ids);
	free(lexicon->scores);
}

void
millm_lexicon_scratch_free(LexiconScratch *s)
{
	free(s->ids);
	free(s->path);
}

/* ---- the models ---- */

static MillmCode
out_of_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

static MillmCode
add_id(LexiconScratch *s, int32_t id, MillmError *err)
{
	if (s->n == s->capacity)
	{
		size_t		capacity = s->capacity ? s->capacity * 2 : 64;
		int32_t    *ids = realloc(s->ids, capacity * sizeof(*ids));

		if (!ids)
			return out_of_memory(err);
		s->ids = ids;
		s->capacity = capacity;
	}
	s->ids[s->n++] = id;
	return MILLM_OK;
}

static MillmCode
add_unknown(const Lexicon *lexicon, LexiconScratch *s, MillmError *err)
{
	if (lexicon->unknown_id >= 0)
		return add_id(s, lexicon->unknown_id, err);
	millm_fail(err, MILLM_E_INVALID_ARGUMENT, "text has a word that the tokenizer does not know");
	millm_detail(err, "The tokenizer has no token for what is unknown.");
	return MILLM_E_INVALID_ARGUMENT;
}

static MillmCode
encode_word_level(const Lexicon *lexicon, LexiconScratch *s, const char *word, size_t n, MillmError *err)
{
	int32_t		id = millm_lexicon_find(lexicon, word, n);

	return id >= 0 ? add_id(s, id, err) : add_unknown(lexicon, s, err);
}

static MillmCode
encode_word_piece(const Lexicon *lexicon, LexiconScratch *s, const char *word, size_t n, MillmError *err)
{
	size_t		n_characters = 0;
	MillmCode	rc;

	for (size_t i = 0; i < n; i++)
		n_characters += ((unsigned char) word[i] & 0xC0) != 0x80;
	if (n_characters > lexicon->max_characters)
		return add_unknown(lexicon, s, err);
	for (size_t start = 0; start < n;)
	{
		uint32_t	node = start == 0 ? 0 : lexicon->continuing;
		int32_t		id = -1;
		size_t		end = start;

		for (size_t i = start; i < n && node != NO_NODE; i++)
		{
			node = step(lexicon, node, word[i]);
			if (node != NO_NODE && lexicon->ids[node] >= 0)
			{
				id = lexicon->ids[node];
				end = i + 1;
			}
		}
		if (id < 0)
		{
			s->n = 0;			/* a word with an unknown part is unknown */
			return add_unknown(lexicon, s, err);
		}
		if ((rc = add_id(s, id, err)) != MILLM_OK)
			return rc;
		start = end;
	}
	return MILLM_OK;
}

/* A run of unknown characters: together a piece after all, or bytes, or unknown.  Its ids are added backwards. */
static MillmCode
add_unknown_run(const Lexicon *lexicon, LexiconScratch *s, const char *run, size_t n, MillmError *err)
{
	int32_t		id = millm_lexicon_find(lexicon, run, n);
	bool		has_bytes = lexicon->byte_fallback;
	MillmCode	rc = MILLM_OK;

	if (id >= 0)
		return add_id(s, id, err);
	for (size_t i = 0; i < n && has_bytes; i++)
		has_bytes = lexicon->fallback_ids[(unsigned char) run[i]] >= 0;
	if (!has_bytes)
		return add_unknown(lexicon, s, err);
	for (size_t i = n; i-- > 0 && rc == MILLM_OK;)
		rc = add_id(s, lexicon->fallback_ids[(unsigned char) run[i]], err);
	return rc;
}

static inline void
offer(PathNode *to, double score, size_t start, int32_t id)
{
	if (to->id == NOT_REACHED || score > to->score)
		*to = (PathNode) {score, (uint32_t) start, id};
}

/* path[i] becomes the best way to byte i of the word.  False: a character is no piece, and there is no unknown token. */
static bool
find_path(const Lexicon *lexicon, PathNode *path, const char *word, size_t n)
{
	unsigned	length;

	for (size_t i = 1; i <= n; i++)
		path[i].id = NOT_REACHED;
	path[0] = (PathNode) {0};
	for (size_t start = 0; start < n; start += length)
	{
		uint32_t	node = 0;
		uint32_t	cp;
		bool		is_known = false;	/* this one character is a piece */

		length = millm_utf8_get(word + start, &cp);
		for (size_t i = start; i < n; i++)
		{
			int32_t		id;

			node = step(lexicon, node, word[i]);
			if (node == NO_NODE)
				break;
			id = lexicon->ids[node];
			if (id < 0)
				continue;
			offer(&path[i + 1], lexicon->scores[id] + path[start].score, start, id);
			is_known = is_known || i + 1 - start == length;
		}
		if (!is_known)
		{
			if (lexicon->unknown_id < 0)
				return false;
			offer(&path[start + length], lexicon->unknown_score + path[start].score, start, lexicon->unknown_id);
		}
	}
	return true;
}

static MillmCode
encode_unigram(const Lexicon *lexicon, LexiconScratch *s, const char *word, size_t n, MillmError *err)
{
	size_t		run = n;		/* where the unknown characters that were walked over last end */
	MillmCode	rc = MILLM_OK;

	if (n >= s->path_capacity)
	{
		PathNode   *path = realloc(s->path, (n + 1) * 2 * sizeof(*path));

		if (!path)
			return out_of_memory(err);
		s->path = path;
		s->path_capacity = (n + 1) * 2;
	}
	if (!find_path(lexicon, s->path, word, n))
		return add_unknown(lexicon, s, err);
	for (size_t end = n; end > 0 && rc == MILLM_OK;)
	{
		const PathNode *node = &s->path[end];

		if (node->id != lexicon->unknown_id)
		{
			if (end < run)
				rc = add_unknown_run(lexicon, s, word + end, run - end, err);
			if (rc == MILLM_OK)
				rc = add_id(s, node->id, err);
			run = node->start;
		}
		end = node->start;
	}
	if (rc == MILLM_OK && run > 0)
		rc = add_unknown_run(lexicon, s, word, run, err);
	for (size_t i = 0; i < s->n / 2; i++)
	{
		int32_t		id = s->ids[i];

		s->ids[i] = s->ids[s->n - 1 - i];
		s->ids[s->n - 1 - i] = id;
	}
	return rc;
}

MillmCode
millm_lexicon_encode(const Lexicon *lexicon, LexiconScratch *s, const char *word, size_t n, MillmError *err)
{
	s->n = 0;
	switch (lexicon->kind)
	{
		case LEXICON_UNIGRAM:
			return encode_unigram(lexicon, s, word, n, err);
		case LEXICON_WORDPIECE:
			return encode_word_piece(lexicon, s, word, n, err);
		case LEXICON_WORDLEVEL:
			break;
	}
	return encode_word_level(lexicon, s, word, n, err);
}
