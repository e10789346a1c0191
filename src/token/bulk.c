/*
 * bulk.c -- model.vocab and model.merges of a tokenizer.json, read where they lie.
 *
 * These two are 99 of 100 bytes of the file, and a tree of JSON values takes ten times the time and the memory of
 * what they say: hundreds of thousands of short strings.  So they are read here, into two arrays that point into
 * the file, and everything else is left to jansson: the file with these two cut out, called the rest.
 *
 * Owns:     the arrays, the rest, and copies of the strings that have escapes.
 * Borrows:  the bytes of the file.
 * Refuses:  nothing.  What is cut is strictly valid JSON of the expected form; a member that is anything else
 *           stays in the rest, where jansson finds what is wrong.  The walk to the members is lenient: it steps
 *           over strings and brackets only, which is exact if the rest is valid JSON, and jansson judges that.
 *
 * A string of the file is read here at most once, and none grows when it is unescaped: so unescaped needs room
 * for the file and no more.
 */
#include "bulk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arith.h"
#include "unicode.h"
#include "utf8.h"

#define MAX_DIGITS 300			/* of a score; 19 of them, behind leading zeros, fit 64 bits.  Python writes 17 */
#define MAX_POWER 250			/* so that no score is infinite */

typedef struct Reader
{
	const char *p;
	const char *end;
	const char *kept;			/* all before this is in the rest, or cut */
	size_t		n;				/* of the file */
	Bulk	   *bulk;
	bool		is_memory_out;
} Reader;

static bool
out_of_memory(Reader *r)
{
	r->is_memory_out = true;
	return false;
}

static void
skip_space(Reader *r)
{
	while (r->p < r->end && (*r->p == ' ' || *r->p == '\n' || *r->p == '\t' || *r->p == '\r'))
	{
		r->p++;
		while (r->end - r->p >= 8 && millm_get_le64(r->p) == UINT64_C(0x2020202020202020))
			r->p += 8;			/* an indent */
	}
}

/* The next byte behind white space; '\0' at the end, which is no JSON. */
static inline char
peek(Reader *r)
{
	if (r->p < r->end && (unsigned char) *r->p <= ' ')
		skip_space(r);
	return r->p < r->end ? *r->p : '\0';
}

/* Step over c, which is not NUL, behind white space. */
static inline bool
take(Reader *r, char c)
{
	if (peek(r) != c)
		return false;
	r->p++;
	return true;
}

/* ---- strings ---- */

/* The high bit of each byte of w that is not plain: a control, a quote, a backslash, or not ASCII. */
static inline uint64_t
not_plain(uint64_t w)
{
	const uint64_t ones = UINT64_C(0x0101010101010101);
	uint64_t	quote = w ^ ones * '"';
	uint64_t	backslash = w ^ ones * '\\';

	/* x - ones borrows into the bytes above a zero: the lowest bit set is right, and only that one is used */
	return ((w - ones * 0x20) | (quote - ones) | (backslash - ones) | w) & ones * 0x80;
}

/* Go on to the next quote or backslash.  False when a control, a byte that is not UTF-8 or the end comes before it. */
static inline bool
skip_plain(Reader *r)
{
	for (;;)
	{
		uint32_t	cp;
		int			k;

		while (r->end - r->p >= 8)
		{
			uint64_t	found = not_plain(millm_get_le64(r->p));

			if (found != 0)
			{
				r->p += __builtin_ctzll(found) / 8;
				break;
			}
			r->p += 8;
		}
		if (r->p == r->end || (unsigned char) *r->p < 0x20)
			return false;
		if (*r->p == '"' || *r->p == '\\')
			return true;
		k = millm_utf8_decode(r->p, (size_t) (r->end - r->p), &cp, NULL);
		if (k < 0)
			return false;
		r->p += k;
	}
}

/* The four hexadecimal digits behind "\u". */
static bool
read_hex(Reader *r, uint32_t *out)
{
	*out = 0;
	if (r->end - r->p < 4)
		return false;
	for (int i = 0; i < 4; i++)
	{
		char		c = *r->p++;

		if (c >= '0' && c <= '9')
			*out = *out << 4 | (uint32_t) (c - '0');
		else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'))
			*out = *out << 4 | (uint32_t) ((c | 0x20) - 'a' + 10);
		else
			return false;
	}
	return true;
}

/* The character that an escape stands for; r->p is at the backslash. */
static bool
read_escape(Reader *r, uint32_t *cp)
{
	static const char letters[] = "\"\\/bfnrt";
	static const char meanings[] = "\"\\/\b\f\n\r\t";
	const char *letter;
	uint32_t	low;

	if (r->end - r->p < 2)
		return false;
	r->p += 2;
	if (r->p[-1] != 'u')
	{
		letter = memchr(letters, r->p[-1], sizeof(letters) - 1);
		if (!letter)
			return false;
		*cp = (unsigned char) meanings[letter - letters];
		return true;
	}
	if (!read_hex(r, cp))
		return false;
	if (*cp < 0xD800 || *cp > 0xDFFF)
		return true;
	if (*cp > 0xDBFF || r->end - r->p < 2 || r->p[0] != '\\' || r->p[1] != 'u')
		return false;			/* half a pair */
	r->p += 2;
	if (!read_hex(r, &low) || low < 0xDC00 || low > 0xDFFF)
		return false;
	*cp = 0x10000 + ((*cp - 0xD800) << 10) + (low - 0xDC00);
	return true;
}

static bool
read_string(Reader *r, BulkString *out)
{
	Bulk	   *bulk = r->bulk;
	const char *run;			/* that is not in unescaped yet */
	size_t		begin = bulk->unescaped_n;

	if (!take(r, '"'))
		return false;
	run = r->p;
	for (bool is_copied = false;; is_copied = true)
	{
		uint32_t	cp;

		if (!skip_plain(r))
			return false;
		if (*r->p == '"' && !is_copied)
		{
			*out = (BulkString) {run, (uint32_t) (r->p - run)};
			r->p++;
			return true;
		}
		if (!bulk->unescaped && !(bulk->unescaped = malloc(r->n)))
			return out_of_memory(r);
		memcpy(bulk->unescaped + bulk->unescaped_n, run, (size_t) (r->p - run));
		bulk->unescaped_n += (size_t) (r->p - run);
		if (*r->p == '"')
		{
			*out = (BulkString) {bulk->unescaped + begin, (uint32_t) (bulk->unescaped_n - begin)};
			r->p++;
			return true;
		}
		if (!read_escape(r, &cp))
			return false;
		bulk->unescaped_n += millm_utf8_put(bulk->unescaped + bulk->unescaped_n, cp);
		run = r->p;
	}
}

static bool
is_name(BulkString s, const char *name)
{
	return s.n == strlen(name) && memcmp(s.text, name, s.n) == 0;
}

/* ---- the two members ---- */

/* Room for one more in an array of n. */
static bool
grow(Reader *r, void **array, size_t n, size_t *max, size_t size)
{
	size_t		grown_max = *max ? *max * 2 : r->n / 32 + 64;	/* no file of a known model grows it */
	void	   *grown;

	if (n < *max)
		return true;
	grown = millm_table_alloc(grown_max, size);
	if (!grown)
		return out_of_memory(r);
	if (n > 0)
		memcpy(grown, *array, n * size);
	free(*array);
	*array = grown;
	*max = grown_max;
	return true;
}

/* An integer of at most 18 digits: larger ones are no ids. */
static bool
read_integer(Reader *r, int64_t *out)
{
	bool		is_negative = peek(r) == '-';
	const char *first;

	r->p += is_negative;
	first = r->p;
	for (*out = 0; r->p < r->end && *r->p >= '0' && *r->p <= '9' && r->p - first < 18; r->p++)
		*out = *out * 10 + (*r->p - '0');
	if (r->p == first || (*first == '0' && r->p - first > 1))
		return false;
	if (is_negative)
		*out = -*out;
	return true;
}

/* One or more digits onto *digits, counted in *n.  False: there is none, or more than fit. */
static bool
read_digits(Reader *r, uint64_t *digits, int *n)
{
	const char *first = r->p;

	for (; r->p < r->end && *r->p >= '0' && *r->p <= '9'; r->p++)
	{
		if (++*n > MAX_DIGITS || *digits > (UINT64_MAX - 9) / 10)
			return false;
		*digits = *digits * 10 + (uint64_t) (*r->p - '0');
	}
	return r->p > first;
}

static double
power_of_ten(int n)
{
	static const double exact[] = {
		1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
	};
	char		text[16];

	if (n < (int) (sizeof(exact) / sizeof(exact[0])))
		return exact[n];
	snprintf(text, sizeof(text), "1e%d", n);
	return strtod(text, NULL);
}

/*
 * A number, to the bit as the genuine library reads it (serde_json): its digits as an integer, and then one multiplication or
 * division by a power of ten, which is not always the double that is nearest.
 */
static bool
read_number(Reader *r, double *out)
{
	bool		is_negative = peek(r) == '-';
	uint64_t	digits = 0;
	uint64_t	power = 0;
	int			n = 0;
	int			n_whole;
	int			n_power = 0;
	int			exponent;
	const char *first;

	r->p += is_negative;
	first = r->p;
	if (!read_digits(r, &digits, &n) || (*first == '0' && n > 1))
		return false;
	n_whole = n;
	if (r->p < r->end && *r->p == '.' && (r->p++, !read_digits(r, &digits, &n)))
		return false;
	exponent = n_whole - n;
	if (r->p < r->end && (*r->p == 'e' || *r->p == 'E'))
	{
		bool		is_small = ++r->p < r->end && *r->p == '-';

		r->p += r->p < r->end && (*r->p == '-' || *r->p == '+');
		if (!read_digits(r, &power, &n_power) || power > MAX_POWER)
			return false;
		exponent += is_small ? -(int) power : (int) power;
	}
	*out = (double) digits;
	*out = exponent < 0 ? *out / power_of_ten(-exponent) : *out * power_of_ten(exponent);
	if (is_negative)
		*out = -*out;
	return true;
}

/* [["a", -0.5], ...] */
static bool
read_scores(Reader *r)
{
	Bulk	   *bulk = r->bulk;

	bulk->n_entries = 0;
	bulk->has_scores = true;
	if (!take(r, '['))
		return false;
	if (take(r, ']'))
		return true;
	do
	{
		BulkString	piece;
		double		score;

		if (!take(r, '[') || !read_string(r, &piece) || !take(r, ',') || !read_number(r, &score) || !take(r, ']'))
			return false;
		if (!grow(r, (void **) &bulk->entries, bulk->n_entries, &bulk->max_entries, sizeof(*bulk->entries)))
			return false;
		bulk->entries[bulk->n_entries++] = (BulkEntry) {piece.text, piece.n, {.score = score}};
	} while (take(r, ','));
	return take(r, ']');
}

/* {"a": 0, ...}, or the other form */
static bool
read_vocabulary(Reader *r)
{
	Bulk	   *bulk = r->bulk;

	if (peek(r) == '[')
		return read_scores(r);
	bulk->n_entries = 0;
	bulk->has_scores = false;
	if (!take(r, '{'))
		return false;
	if (take(r, '}'))
		return true;
	do
	{
		size_t		n_unescaped = bulk->unescaped_n;
		BulkString	key;
		int64_t		id;

		if (!read_string(r, &key) || !take(r, ':') || !read_integer(r, &id))
			return false;
		/* as jansson, no NUL in a key; it can only come from an escape */
		if (bulk->unescaped_n > n_unescaped && memchr(key.text, '\0', key.n))
			return false;
		if (!grow(r, (void **) &bulk->entries, bulk->n_entries, &bulk->max_entries, sizeof(*bulk->entries)))
			return false;
		bulk->entries[bulk->n_entries++] = (BulkEntry) {key.text, key.n, {.id = id}};
	} while (take(r, ','));
	return take(r, '}');
}

/* ["a b", ["a", "b"], ...] */
static bool
read_merges(Reader *r)
{
	Bulk	   *bulk = r->bulk;

	bulk->n_merges = 0;
	if (!take(r, '['))
		return false;
	if (take(r, ']'))
		return true;
	do
	{
		BulkString	left;
		BulkString	right = {0};

		if (take(r, '['))
		{
			if (!read_string(r, &left) || !take(r, ',') || !read_string(r, &right) || !take(r, ']'))
				return false;
		}
		else if (!read_string(r, &left))
			return false;
		if (!grow(r, (void **) &bulk->merges, bulk->n_merges, &bulk->max_merges, sizeof(*bulk->merges)))
			return false;
		bulk->merges[bulk->n_merges++] = (BulkMerge) {left.text, right.text, left.n, right.n};
	} while (take(r, ','));
	return take(r, ']');
}

/* ---- the way to them ---- */

/* Step over a value; whether it is a right one is jansson's question. */
static bool
skip_value(Reader *r)
{
	size_t		depth = 0;

	(void) peek(r);
	while (r->p < r->end)
	{
		char		c = *r->p;

		if (c == '"')
		{
			do
			{
				r->p += *r->p == '\\' ? 2 : 1;
				if (r->p >= r->end)
				{
					r->p = r->end;
					return false;
				}
			} while (*r->p != '"');
		}
		else if (c == '{' || c == '[')
			depth++;
		else if ((c == '}' || c == ']' || c == ',') && depth == 0)
			return true;		/* the end of a number or a word */
		else if (c == '}' || c == ']')
			depth--;
		r->p++;
		if (depth == 0 && (c == '"' || c == '}' || c == ']'))
			return true;
	}
	return false;
}

/* Put what lies before end, and then more, into the rest. */
static bool
keep(Reader *r, const char *end, const char *more)
{
	if (!millm_bytes_add(&r->bulk->rest, r->kept, (size_t) (end - r->kept)) ||
		!millm_bytes_add(&r->bulk->rest, more, strlen(more)))
		return out_of_memory(r);
	r->kept = r->p;
	return true;
}

/* Read a member and cut it out; or step over it. */
static bool
cut(Reader *r, bool (*read) (Reader *), bool *is_read)
{
	const char *begin = r->p;

	*is_read = read(r);
	if (*is_read)
		return keep(r, begin, " null");
	r->p = begin;
	return !r->is_memory_out && skip_value(r);
}

/* The members of the object that is the file, or the one that is its model.  A later one of the same name counts. */
static bool
read_members(Reader *r, bool is_model)
{
	Bulk	   *bulk = r->bulk;
	bool		ok;

	if (!take(r, '{'))
		return false;
	if (take(r, '}'))
		return true;
	do
	{
		BulkString	key;

		if (!read_string(r, &key) || !take(r, ':'))
			return false;
		if (is_model && is_name(key, "vocab"))
			ok = cut(r, read_vocabulary, &bulk->has_vocabulary);
		else if (is_model && is_name(key, "merges"))
			ok = cut(r, read_merges, &bulk->has_merges);
		else if (!is_model && is_name(key, "model"))
		{
			bulk->has_vocabulary = bulk->has_merges = false;
			ok = peek(r) == '{' ? read_members(r, true) : skip_value(r);
		}
		else
			ok = skip_value(r);
		if (!ok)
			return false;
	} while (take(r, ','));
	return take(r, '}');
}

bool
millm_bulk_read(Bulk *bulk, const char *json, size_t n)
{
	Reader		r = {.p = json, .end = json + n, .kept = json, .n = n, .bulk = bulk};

	/* Where the walk ends early, the file is no JSON, and the rest is not either. */
	if (n <= UINT32_MAX)
		(void) read_members(&r, false);
	r.p = r.end;
	return !r.is_memory_out && keep(&r, r.end, "");
}

bool
millm_bulk_read_vocabulary(Bulk *bulk, const char *json, size_t n)
{
	Reader		r = {.p = json, .end = json + n, .kept = json, .n = n, .bulk = bulk};

	bulk->has_vocabulary = n <= UINT32_MAX && peek(&r) == '{' && read_vocabulary(&r) && peek(&r) == '\0' && r.p == r.end;
	return !r.is_memory_out;
}

void
millm_bulk_free(Bulk *bulk)
{
	free(bulk->entries);
	free(bulk->merges);
	free(bulk->unescaped);
	millm_bytes_free(&bulk->rest);
	*bulk = (Bulk) {0};
}
