/*
 * prefix.c -- the tree of cached pages, and the order in which they go.
 *
 * Owns:     the nodes, the hash table that finds them, the line of the pages that rest.
 * Borrows:  page numbers; their references are kv.c's.
 * Does not: know sequences, but for how many stand at a node, or what makes a beginning usable through a window.
 *
 * A node is found by its parent and its own tokens, both compared: equal by induction means that all tokens from the first one on are the
 * same, so that two texts whose hashes collide are still two.  The hash only spreads nodes over buckets; its key is of this load, so that
 * nobody can choose tokens that meet in one.
 *
 * The least recently used page goes first, and with it none that a longer beginning needs: who lets pages go does so from the end
 * of his text (kv.c), and who uses one uses all before it, so that of two pages of a group without a window the one closer to the root never
 * rests longer.  Pages of a group with a window rest as soon as they are out of it.  A node whose pages are gone stays while it has
 * children, which a window may leave usable, or while a sequence stands there.
 */
#include "prefix.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "forward.h"

typedef struct Node
{
	int32_t		parent;			/* a place */
	int32_t		next;			/* in its bucket, or of the free nodes; -1: the last */
	int32_t		n_children;
	int32_t		n_sequences;	/* that stand here */
	int32_t		n_pages;
	int32_t		tokens[MILLM_KV_PAGE_TOKENS];
} Node;

/* Where a page of the cache is, and its neighbours in the line. */
typedef struct Cached
{
	int32_t		node;			/* -1: not in the cache */
	int32_t		group;
	int32_t		older, newer;	/* -1: none */
	bool		is_resting;
} Cached;

struct MillmPrefix
{
	int32_t		n_pages;		/* and as many nodes */
	int			n_groups;
	uint64_t	key;
	uint32_t	mask;			/* buckets - 1 */
	int32_t    *buckets;		/* the first node of each; -1: none */
	Node	   *nodes;			/* [n_pages]; free: n_children -1 */
	int32_t    *pages;			/* [n_pages, n_groups] */
	int32_t		free_node;
	Cached	   *cached;			/* [n_pages] */
	int32_t		oldest, newest;	/* that rest */
	int32_t		n_cached, n_resting;
};

MillmPrefix *
millm_prefix_create(int32_t n_pages, int n_groups)
{
	MillmPrefix *p = calloc(1, sizeof(*p));
	const size_t n = (size_t) n_pages;
	size_t		n_buckets = 16;

	if (!p)
		return NULL;
	while (n_buckets < n)
		n_buckets *= 2;
	p->n_pages = n_pages;
	p->n_groups = n_groups;
	p->mask = (uint32_t) (n_buckets - 1);
	p->buckets = malloc(n_buckets * sizeof(*p->buckets));
	p->nodes = calloc(n, sizeof(*p->nodes));
	p->pages = calloc(n, (size_t) n_groups * sizeof(*p->pages));
	p->cached = calloc(n, sizeof(*p->cached));
	if (!p->buckets || !p->nodes || !p->pages || !p->cached)
	{
		millm_prefix_free(p);
		return NULL;
	}
	if (getrandom(&p->key, sizeof(p->key), GRND_NONBLOCK) < 0)
		p->key = (uint64_t) (uintptr_t) p;	/* hardly ever: the machine has just begun */
	memset(p->buckets, -1, n_buckets * sizeof(*p->buckets));
	for (int32_t i = 0; i < n_pages; i++)
	{
		p->nodes[i] = (Node) {.n_children = -1, .next = i + 1 < n_pages ? i + 1 : -1};
		p->cached[i] = (Cached) {.node = -1, .older = -1, .newer = -1};
	}
	p->oldest = p->newest = -1;
	return p;
}

void
millm_prefix_free(MillmPrefix *p)
{
	if (!p)
		return;
	free(p->buckets);
	free(p->nodes);
	free(p->pages);
	free(p->cached);
	free(p);
}

/* ---- nodes ----------------------------------------------------------------------------------- */

static int32_t *
bucket_of(const MillmPrefix *p, int32_t place, const int32_t *tokens)
{
	uint64_t	h = (p->key ^ (uint32_t) place) * UINT64_C(0x9E3779B97F4A7C15);

	for (int i = 0; i < MILLM_KV_PAGE_TOKENS; i++)
	{
		h = (h ^ h >> 32 ^ (uint32_t) tokens[i]) * UINT64_C(0x9E3779B97F4A7C15);
		h += p->key;
	}
	return &p->buckets[(h >> 32) & p->mask];
}

int32_t
millm_prefix_find(const MillmPrefix *p, int32_t place, const int32_t *tokens)
{
	int32_t		i = *bucket_of(p, place, tokens);

	while (i >= 0 && (p->nodes[i].parent != place || memcmp(p->nodes[i].tokens, tokens, sizeof(p->nodes[i].tokens)) != 0))
		i = p->nodes[i].next;
	return i;
}

int32_t
millm_prefix_add(MillmPrefix *p, int32_t place, const int32_t *tokens)
{
	const int32_t i = p->free_node;
	int32_t    *bucket = bucket_of(p, place, tokens);
	Node	   *node;

	if (i < 0)
		return -1;
	node = &p->nodes[i];
	p->free_node = node->next;
	*node = (Node) {.parent = place, .next = *bucket};
	memcpy(node->tokens, tokens, sizeof(node->tokens));
	*bucket = i;
	if (place >= 0)
		p->nodes[place].n_children++;
	memset(p->pages + (size_t) i * (size_t) p->n_groups, -1, (size_t) p->n_groups * sizeof(*p->pages));
	return i;
}

/* A node that nothing keeps goes, and so may its ancestors. */
static void
prune(MillmPrefix *p, int32_t place)
{
	while (place >= 0 && p->nodes[place].n_children == 0 && p->nodes[place].n_sequences == 0 && p->nodes[place].n_pages == 0)
	{
		Node	   *node = &p->nodes[place];
		int32_t		parent = node->parent;
		int32_t    *link = bucket_of(p, parent, node->tokens);

		while (*link != place)
			link = &p->nodes[*link].next;
		*link = node->next;
		node->n_children = -1;
		node->next = p->free_node;
		p->free_node = place;
		if (parent >= 0)
			p->nodes[parent].n_children--;
		place = parent;
	}
}

int32_t
millm_prefix_parent(const MillmPrefix *p, int32_t node)
{
	return p->nodes[node].parent;
}

const int32_t *
millm_prefix_tokens(const MillmPrefix *p, int32_t node)
{
	return p->nodes[node].tokens;
}

const int32_t *
millm_prefix_pages(const MillmPrefix *p, int32_t node)
{
	return p->pages + (size_t) node * (size_t) p->n_groups;
}

void
millm_prefix_enter(MillmPrefix *p, int32_t place)
{
	if (place >= 0)
		p->nodes[place].n_sequences++;
}

void
millm_prefix_leave(MillmPrefix *p, int32_t place)
{
	if (place < 0)
		return;
	p->nodes[place].n_sequences--;
	prune(p, place);
}

/* ---- pages ----------------------------------------------------------------------------------- */

void
millm_prefix_put(MillmPrefix *p, int32_t node, int group, int32_t page)
{
	p->pages[(size_t) node * (size_t) p->n_groups + (size_t) group] = page;
	p->nodes[node].n_pages++;
	p->cached[page].node = node;
	p->cached[page].group = group;
	p->n_cached++;
}

bool
millm_prefix_has(const MillmPrefix *p, int32_t page)
{
	return p->cached[page].node >= 0;
}

void
millm_prefix_rest(MillmPrefix *p, int32_t page)
{
	Cached	   *c = &p->cached[page];

	c->older = p->newest;
	c->newer = -1;
	c->is_resting = true;
	*(p->newest >= 0 ? &p->cached[p->newest].newer : &p->oldest) = page;
	p->newest = page;
	p->n_resting++;
}

void
millm_prefix_wake(MillmPrefix *p, int32_t page)
{
	Cached	   *c = &p->cached[page];

	*(c->older >= 0 ? &p->cached[c->older].newer : &p->oldest) = c->newer;
	*(c->newer >= 0 ? &p->cached[c->newer].older : &p->newest) = c->older;
	c->is_resting = false;
	p->n_resting--;
}

int32_t
millm_prefix_evict(MillmPrefix *p)
{
	const int32_t page = p->oldest;
	Cached	   *c;

	if (page < 0)
		return -1;
	millm_prefix_wake(p, page);
	c = &p->cached[page];
	p->pages[(size_t) c->node * (size_t) p->n_groups + (size_t) c->group] = -1;
	p->nodes[c->node].n_pages--;
	prune(p, c->node);
	c->node = -1;
	p->n_cached--;
	return page;
}

int32_t
millm_prefix_n_pages(const MillmPrefix *p)
{
	return p->n_cached;
}

int32_t
millm_prefix_n_resting(const MillmPrefix *p)
{
	return p->n_resting;
}

/* ---- the check -------------------------------------------------------------------------------- */

MillmCode
millm_prefix_check(const MillmPrefix *p, const int32_t *references, int32_t *standing, const int *windows, MillmError *err)
{
	MillmCode	rc = MILLM_OK;
	int32_t		n_cached = 0, n_resting = 0, n_nodes = 0, n_free = 0;

	for (int32_t i = 0; i < p->n_pages; i++)
	{
		const Node *node = &p->nodes[i];
		const int32_t *pages = millm_prefix_pages(p, i);
		int32_t		n = 0;

		if (node->n_children < 0)
			continue;
		n_nodes++;
		if (node->n_sequences != standing[i])
			rc = millm_fail(err, MILLM_E_INTERNAL, "%d sequences stand at a node that counts %d", standing[i], node->n_sequences);
		if (node->n_children == 0 && node->n_sequences == 0 && node->n_pages == 0)
			rc = millm_fail(err, MILLM_E_INTERNAL, "nothing keeps node %d", i);
		if (millm_prefix_find(p, node->parent, node->tokens) != i)
			rc = millm_fail(err, MILLM_E_INTERNAL, "node %d is not found", i);
		if (node->parent >= 0 && p->nodes[node->parent].n_children < 1)
			rc = millm_fail(err, MILLM_E_INTERNAL, "the parent of node %d does not know it", i);
		for (int g = 0; g < p->n_groups; g++)
		{
			if (pages[g] < 0)
				continue;
			n++;
			if (p->cached[pages[g]].node != i || p->cached[pages[g]].group != g)
				rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is in two nodes", pages[g]);
			if (windows[g] == 0 && node->parent >= 0 && millm_prefix_pages(p, node->parent)[g] < 0)
				rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d is cached, and the one before it is not", pages[g]);
		}
		if (n != node->n_pages)
			rc = millm_fail(err, MILLM_E_INTERNAL, "node %d has %d KV pages and counts %d", i, n, node->n_pages);
	}
	/* standing is free now: the children of each node, counted */
	memset(standing, 0, (size_t) p->n_pages * sizeof(*standing));
	for (int32_t i = 0; i < p->n_pages; i++)
		if (p->nodes[i].n_children >= 0 && p->nodes[i].parent >= 0)
			standing[p->nodes[i].parent]++;
	for (int32_t i = 0; i < p->n_pages; i++)
		if (p->nodes[i].n_children >= 0 && p->nodes[i].n_children != standing[i])
			rc = millm_fail(err, MILLM_E_INTERNAL, "node %d has %d children and counts %d", i, standing[i], p->nodes[i].n_children);
	for (int32_t i = p->free_node; i >= 0 && n_free <= p->n_pages; i = p->nodes[i].next)
		n_free++;
	if (n_nodes + n_free != p->n_pages)
		rc = millm_fail(err, MILLM_E_INTERNAL, "%d nodes are used and %d free, of %d", n_nodes, n_free, p->n_pages);

	for (int32_t i = 0; i < p->n_pages; i++)
	{
		const Cached *c = &p->cached[i];

		n_cached += c->node >= 0;
		n_resting += c->is_resting;
		if (c->is_resting != (c->node >= 0 && references[i] == 1))
			rc = millm_fail(err, MILLM_E_INTERNAL, "KV page %d counts %d references and %s", i, references[i], c->is_resting ? "rests" : "does not rest");
	}
	if (n_cached != p->n_cached || n_resting != p->n_resting)
		rc = millm_fail(err, MILLM_E_INTERNAL, "%d KV pages are cached and %d rest; the counts are %d and %d", n_cached, n_resting,
						p->n_cached, p->n_resting);
	for (int32_t i = p->oldest; i >= 0 && n_resting > -1; i = p->cached[i].newer)
		n_resting--;
	if (n_resting != 0)
		rc = millm_fail(err, MILLM_E_INTERNAL, "the line of resting KV pages is not as long as it should be");
	return rc;
}
