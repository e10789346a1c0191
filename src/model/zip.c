/*
 * zip.c -- see zip.h.
 *
 * A zip archive ends with a record that says where its directory is; in front of that record lies, when numbers need 64 bits, another
 * one and its locator.  The directory says where each member's local header is, and only that one says where its bytes begin.  All of these
 * numbers are a stranger's.  (PKWARE's APPNOTE, sections 4.3 and 4.5.3.)
 *
 * Owns: the directory's bytes, which hold the names, and the members.
 */
#include "zip.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arith.h"
#include "shown.h"

#define MAX_DIRECTORY	((uint64_t) 64 << 20)
#define MAX_NAME		1024

/* Sizes of the fixed parts, and what they begin with. */
#define END_BYTES		22
#define END_MAGIC		0x06054B50u
#define LOCATOR_BYTES	20
#define LOCATOR_MAGIC	0x07064B50u
#define END64_BYTES		56
#define END64_MAGIC		0x06064B50u
#define ENTRY_BYTES		46
#define ENTRY_MAGIC		0x02014B50u
#define LOCAL_BYTES		30
#define LOCAL_MAGIC		0x04034B50u

/* Flags that change nothing for who has the directory: the sizes also follow the bytes; names are UTF-8. */
#define HARMLESS_FLAGS	(1u << 3 | 1u << 11)

struct MillmZip
{
	unsigned char *directory;
	MillmZipMember *members;	/* by name */
	size_t		n_members;
};

typedef struct Reader
{
	int			fd;
	const char *name;
	uint64_t	len;			/* of the file */
	uint64_t	directory_at, directory_bytes, n_entries;
	MillmError *err;
} Reader;

static unsigned
get_le16(const unsigned char *p)
{
	return p[0] | (unsigned) p[1] << 8;
}

static MillmCode
damaged(const Reader *r, const char *detail)
{
	millm_fail(r->err, MILLM_E_INVALID_MODEL_FILE, "invalid PyTorch checkpoint \"%s\"", r->name);
	millm_detail(r->err, "%s", detail);
	return MILLM_E_INVALID_MODEL_FILE;
}

static MillmCode
bad_member(const Reader *r, const char *member, const char *what)
{
	millm_fail(r->err, MILLM_E_INVALID_MODEL_FILE, "invalid PyTorch checkpoint \"%s\"", r->name);
	millm_detail(r->err, "Its member \"%s\" %s.", shown(member).text, what);
	return MILLM_E_INVALID_MODEL_FILE;
}

/* len bytes at offset, which must be there. */
static MillmCode
read_at(const Reader *r, void *buf, size_t len, uint64_t offset)
{
	char	   *p = buf;

	if (offset > r->len || len > r->len - offset)
		return damaged(r, "Its zip directory, or a header, lies outside of the file.");
	while (len > 0)
	{
		ssize_t		n = pread(r->fd, p, len, (off_t) offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return damaged(r, n < 0 ? strerror(errno) : "It became shorter while it was read.");
		p += n;
		offset += (uint64_t) n;
		len -= (size_t) n;
	}
	return MILLM_OK;
}

/* Where is the directory?  Archives with a comment behind it are not torch's. */
static MillmCode
find_directory(Reader *r)
{
	unsigned char end[END_BYTES], locator[LOCATOR_BYTES], end64[END64_BYTES];
	uint64_t	at, directory_end, last;
	MillmCode	rc;

	if (r->len < END_BYTES)
		return damaged(r, "It is too short for a zip archive.");
	directory_end = r->len - END_BYTES;
	if ((rc = read_at(r, end, END_BYTES, directory_end)) != MILLM_OK)
		return rc;
	if (millm_get_le32(end) != END_MAGIC || get_le16(end + 20) != 0)
		return damaged(r, "It does not end as a zip archive: it is cut, or no such file.");
	r->n_entries = get_le16(end + 10);
	r->directory_bytes = millm_get_le32(end + 12);
	r->directory_at = millm_get_le32(end + 16);
	if (get_le16(end + 4) != 0 || get_le16(end + 6) != 0 || get_le16(end + 8) != r->n_entries)
		return damaged(r, "It is a zip archive of several parts.");
	if (r->len >= END_BYTES + LOCATOR_BYTES && (rc = read_at(r, locator, LOCATOR_BYTES, directory_end - LOCATOR_BYTES)) != MILLM_OK)
		return rc;
	if (r->len >= END_BYTES + LOCATOR_BYTES && millm_get_le32(locator) == LOCATOR_MAGIC)
	{
		at = millm_get_le64(locator + 8);
		if ((rc = read_at(r, end64, END64_BYTES, at)) != MILLM_OK)
			return rc;
		if (millm_get_le32(end64) != END64_MAGIC || millm_get_le32(end64 + 16) != 0 || millm_get_le32(end64 + 20) != 0)
			return damaged(r, "Its zip64 end record is none, or one of several parts.");
		r->n_entries = millm_get_le64(end64 + 32);
		r->directory_bytes = millm_get_le64(end64 + 40);
		r->directory_at = millm_get_le64(end64 + 48);
		directory_end = at;
	}
	if (!millm_add_u64(r->directory_at, r->directory_bytes, &last) || last > directory_end)
		return damaged(r, "Its zip directory lies outside of the file.");
	if (r->directory_bytes > MAX_DIRECTORY || r->n_entries > r->directory_bytes / ENTRY_BYTES)
		return damaged(r, "Its zip directory claims more members than it has room for, or more than are read.");
	return MILLM_OK;
}

/* Numbers that do not fit into 32 bits are in the extra field 1, those that it needs in this order.  false: they are not. */
static bool
widen(const unsigned char *extra, size_t len, uint64_t *bytes, uint64_t *stored_bytes, uint64_t *header)
{
	uint64_t   *numbers[] = {bytes, stored_bytes, header};
	const unsigned char *field = NULL;
	size_t		left = 0;

	for (size_t at = 0; !field && len - at >= 4; at += 4 + get_le16(extra + at + 2))
	{
		left = get_le16(extra + at + 2);
		if (left > len - at - 4)
			return false;
		if (get_le16(extra + at) == 1)
			field = extra + at + 4;
	}
	for (int i = 0; i < 3; i++)
	{
		if (*numbers[i] != UINT32_MAX)
			continue;
		if (!field || left < 8)
			return false;
		*numbers[i] = millm_get_le64(field);
		field += 8;
		left -= 8;
	}
	return true;
}

/* The local header says where the bytes begin, and tells the same story as the directory. */
static MillmCode
locate(const Reader *r, MillmZipMember *m, size_t name_len)
{
	unsigned char local[LOCAL_BYTES + MAX_NAME];
	uint64_t	end;
	MillmCode	rc = read_at(r, local, LOCAL_BYTES + name_len, m->header);

	if (rc != MILLM_OK)
		return rc;
	if (millm_get_le32(local) != LOCAL_MAGIC || get_le16(local + 8) != 0 || get_le16(local + 26) != name_len || memcmp(local + LOCAL_BYTES, m->name, name_len) != 0)
		return bad_member(r, m->name, "is another one, or compressed, by its own header");
	m->offset = m->header + LOCAL_BYTES + name_len + get_le16(local + 28);
	if (!millm_add_u64(m->offset, m->bytes, &end) || end > r->directory_at)
		return bad_member(r, m->name, "lies outside of the file");
	return MILLM_OK;
}

/* The entry at p of the directory, of which left bytes remain; *used of them are its. */
static MillmCode
read_entry(const Reader *r, unsigned char *p, uint64_t left, MillmZipMember *m, uint64_t *used)
{
	uint64_t	stored_bytes;
	size_t		name_len, extra_len;
	unsigned	flags, method;

	if (left < ENTRY_BYTES || millm_get_le32(p) != ENTRY_MAGIC)
		return damaged(r, "Its zip directory is damaged.");
	flags = get_le16(p + 8);
	method = get_le16(p + 10);
	stored_bytes = millm_get_le32(p + 20);
	m->bytes = millm_get_le32(p + 24);
	name_len = get_le16(p + 28);
	extra_len = get_le16(p + 30);
	m->header = millm_get_le32(p + 42);
	*used = ENTRY_BYTES + name_len + extra_len + get_le16(p + 32);
	if (*used > left || name_len == 0 || name_len > MAX_NAME || memchr(p + ENTRY_BYTES, '\0', name_len))
		return damaged(r, "Its zip directory is damaged, or has a name that is none.");
	if (!widen(p + ENTRY_BYTES + name_len, extra_len, &m->bytes, &stored_bytes, &m->header))
		return damaged(r, "Its zip directory lacks a 64-bit number.");
	/* one byte to the front, where all has been read, so that there is room for a NUL behind */
	memmove(p + ENTRY_BYTES - 1, p + ENTRY_BYTES, name_len);
	p[ENTRY_BYTES - 1 + name_len] = '\0';
	m->name = (const char *) p + ENTRY_BYTES - 1;
	if ((flags & ~HARMLESS_FLAGS) != 0 || method != 0 || stored_bytes != m->bytes)
		return bad_member(r, m->name, "is compressed or encrypted; torch.save() only stores");
	return locate(r, m, name_len);
}

static int
by_place(const void *a, const void *b)
{
	const MillmZipMember *x = a, *y = b;

	return (x->header > y->header) - (x->header < y->header);
}

static int
by_name(const void *a, const void *b)
{
	return strcmp(((const MillmZipMember *) a)->name, ((const MillmZipMember *) b)->name);
}

/* No byte belongs to two members, and no name is one's and another's. */
static MillmCode
check_apart(const Reader *r, MillmZip *zip)
{
	MillmZipMember *m = zip->members;

	qsort(m, zip->n_members, sizeof(*m), by_place);
	for (size_t i = 1; i < zip->n_members; i++)
		if (m[i].header < m[i - 1].offset + m[i - 1].bytes)
			return bad_member(r, m[i].name, "overlaps another one");
	qsort(m, zip->n_members, sizeof(*m), by_name);
	for (size_t i = 1; i < zip->n_members; i++)
		if (strcmp(m[i].name, m[i - 1].name) == 0)
			return bad_member(r, m[i].name, "is there twice");
	return MILLM_OK;
}

static MillmCode
read_directory(const Reader *r, MillmZip *zip)
{
	uint64_t	at = 0, used;
	MillmCode	rc;

	zip->directory = malloc((size_t) r->directory_bytes + 1);
	zip->members = calloc((size_t) r->n_entries + 1, sizeof(*zip->members));
	if (!zip->directory || !zip->members)
		return millm_fail(r->err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	if ((rc = read_at(r, zip->directory, (size_t) r->directory_bytes, r->directory_at)) != MILLM_OK)
		return rc;
	for (; zip->n_members < r->n_entries; zip->n_members++, at += used)
		if ((rc = read_entry(r, zip->directory + at, r->directory_bytes - at, &zip->members[zip->n_members], &used)) != MILLM_OK)
			return rc;
	return check_apart(r, zip);
}

MillmCode
millm_zip_open(int fd, const char *name, MillmZip **out, MillmError *err)
{
	Reader		r = {.fd = fd, .name = name, .err = err};
	MillmZip   *zip = calloc(1, sizeof(*zip));
	struct stat sb;
	MillmCode	rc;

	if (!zip)
		return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
	if (fstat(fd, &sb) != 0)
		rc = damaged(&r, strerror(errno));
	else
	{
		r.len = (uint64_t) sb.st_size;
		if ((rc = find_directory(&r)) == MILLM_OK)
			rc = read_directory(&r, zip);
	}
	if (rc == MILLM_OK)
		*out = zip;
	else
		millm_zip_close(zip);
	return rc;
}

void
millm_zip_close(MillmZip *zip)
{
	if (!zip)
		return;
	free(zip->directory);
	free(zip->members);
	free(zip);
}

size_t
millm_zip_n_members(const MillmZip *zip)
{
	return zip->n_members;
}

const MillmZipMember *
millm_zip_member(const MillmZip *zip, size_t i)
{
	return &zip->members[i];
}

const MillmZipMember *
millm_zip_find(const MillmZip *zip, const char *name)
{
	MillmZipMember key = {.name = name};

	return bsearch(&key, zip->members, zip->n_members, sizeof(key), by_name);
}
