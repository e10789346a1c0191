/*
 * torch_bin.c -- see torch_bin.h.
 *
 * Tensors are views of storages: an offset, and a stride for each dimension.  Those whose elements lie one after the other are copied; of the
 * others (transposed, sliced) the part of the storage that they span is read whole and picked apart.  A view that has an element twice is
 * refused, and so are views that together are far more than the file: a few bytes must not become a disk full.
 *
 * Owns: the zip's directory, the pickle and its bytes, the new header.  Borrows: the file descriptor.
 */
#include "torch_bin.h"

#include <errno.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arith.h"
#include "pickle.h"
#include "safetensors.h"
#include "shown.h"
#include "zip.h"

#define PIECE_BYTES	((size_t) 1 << 20)	/* read at a time */
#define PICKLE_NAME	"data.pkl"

/* A tensor of the new file. */
typedef struct Source
{
	const MillmView *view;
	uint64_t	at;				/* its first element, in the file */
	uint64_t	span;			/* bytes from there to the end of its last one */
	uint64_t	bytes;			/* of its elements */
} Source;

struct MillmTorchBin
{
	int			fd;
	char	   *name;
	uint64_t	len;			/* of the file */
	MillmZip   *zip;
	char	   *pickle_bytes;
	MillmPickle *pickle;
	Source	   *sources;		/* [n_sources], in order */
	size_t		n_sources;
	char	   *head;			/* of the safetensors file */
	size_t		head_bytes;
	uint64_t	data_bytes;
};

static MillmCode
no_memory(MillmError *err)
{
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory");
}

static MillmCode
damaged(const MillmTorchBin *b, MillmError *err)
{
	return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "invalid PyTorch checkpoint \"%s\"", b->name);
}

static MillmCode
read_at(const MillmTorchBin *b, void *buf, size_t len, uint64_t offset, MillmError *err)
{
	char	   *p = buf;

	while (len > 0)
	{
		ssize_t		n = pread(b->fd, p, len, (off_t) offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
		{
			damaged(b, err);
			millm_detail(err, "Byte %llu could not be read: %s.", (unsigned long long) offset, n < 0 ? strerror(errno) : "the file ends before");
			return MILLM_E_INVALID_MODEL_FILE;
		}
		p += n;
		offset += (uint64_t) n;
		len -= (size_t) n;
	}
	return MILLM_OK;
}

/* --- What it holds -------------------------------------------------------------------------------------- */

/* The format before PyTorch 1.6: pickles one after the other, the first of which is a magic number. */
static MillmCode
refuse_legacy(const MillmTorchBin *b, MillmError *err)
{
	static const unsigned char magic[] = {0x80, 2, 0x8A, 10, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19};
	unsigned char begin[sizeof(magic)];

	if (b->len < sizeof(magic) || read_at(b, begin, sizeof(begin), 0, NULL) != MILLM_OK || memcmp(begin, magic, sizeof(magic)) != 0)
		return MILLM_OK;
	millm_fail(err, MILLM_E_UNSUPPORTED, "PyTorch checkpoint \"%s\" has the format of PyTorch before 1.6", b->name);
	millm_detail(err, "It is no zip archive but a sequence of pickles; millm does not read it.");
	millm_hint(err, "Choose a repository, or a revision, with safetensors; or load it with a current PyTorch and save it again.");
	return MILLM_E_UNSUPPORTED;
}

/* The pickle, and the folder of the archive that all is in ("archive/"). */
static MillmCode
find_pickle(const MillmTorchBin *b, const MillmZipMember **out, int *folder_len, MillmError *err)
{
	*out = NULL;
	for (size_t i = 0; i < millm_zip_n_members(b->zip); i++)
	{
		const MillmZipMember *m = millm_zip_member(b->zip, i);
		const char *slash = strchr(m->name, '/');

		if (!slash || strcmp(slash + 1, PICKLE_NAME) != 0)
			continue;
		if (*out)
		{
			damaged(b, err);
			millm_detail(err, "It has two pickles, \"%s\" and \"%s\".", shown((*out)->name).text, shown(m->name).text);
			return MILLM_E_INVALID_MODEL_FILE;
		}
		*out = m;
		*folder_len = (int) (slash + 1 - m->name);
	}
	if (*out && (*out)->bytes <= MILLM_PICKLE_MAX_BYTES)
		return MILLM_OK;
	damaged(b, err);
	if (*out)
		millm_detail(err, "Its pickle takes %llu bytes; at most %zu are read.", (unsigned long long) (*out)->bytes, MILLM_PICKLE_MAX_BYTES);
	else
		millm_detail(err, "It is a zip archive without \"" PICKLE_NAME "\".");
	return MILLM_E_INVALID_MODEL_FILE;
}

/* A member of the archive's folder, or NULL. */
static const MillmZipMember *
find_member(const MillmTorchBin *b, const char *folder, int folder_len, const char *what, const char *key)
{
	char		name[1200];

	if ((size_t) snprintf(name, sizeof(name), "%.*s%s%s", folder_len, folder, what, key) >= sizeof(name))
		return NULL;
	return millm_zip_find(b->zip, name);
}

/* Archives of newer versions say in which order the bytes of a number come. */
static MillmCode
check_byte_order(const MillmTorchBin *b, const char *folder, int folder_len, MillmError *err)
{
	static const char little[] = "little";
	const MillmZipMember *m = find_member(b, folder, folder_len, "byteorder", "");
	char		order[sizeof(little) - 1];
	MillmCode	rc;

	if (!m)
		return MILLM_OK;
	if (m->bytes == sizeof(order))
	{
		if ((rc = read_at(b, order, sizeof(order), m->offset, err)) != MILLM_OK)
			return rc;
		if (memcmp(order, little, sizeof(order)) == 0)
			return MILLM_OK;
	}
	millm_fail(err, MILLM_E_UNSUPPORTED, "PyTorch checkpoint \"%s\" was written on a machine of another byte order", b->name);
	millm_hint(err, "Choose a repository, or a revision, with safetensors.");
	return MILLM_E_UNSUPPORTED;
}

/*
 * Of a view: bytes of its elements, and how many elements lie from its first to its last one.  false: it is larger than 64 bits count, or it
 * has an element twice.
 */
static bool
measure(const MillmView *v, uint64_t *bytes, uint64_t *span)
{
	int			order[MILLM_PICKLE_MAX_DIMS], n = 0;
	uint64_t	reach;			/* of the dimensions so far: elements from the first to the last one */

	*bytes = (uint64_t) millm_dtype_bytes(v->dtype);
	for (int d = 0; d < v->n_dims; d++)
	{
		if (!millm_mul_u64(*bytes, (uint64_t) v->dims[d], bytes))
			return false;
		if (v->dims[d] == 1)
			continue;
		order[n++] = d;
		for (int i = n - 1; i > 0 && v->strides[order[i - 1]] > v->strides[order[i]]; i--)
		{
			int			swap = order[i];

			order[i] = order[i - 1];
			order[i - 1] = swap;
		}
	}
	*span = 0;
	if (*bytes == 0)
		return true;
	reach = 1;
	for (int i = 0; i < n; i++)
	{
		uint64_t	step = (uint64_t) v->strides[order[i]], last;

		/* each dimension steps over all that the finer ones reach */
		if (step < reach || !millm_mul_u64(step, (uint64_t) v->dims[order[i]] - 1, &last) || !millm_add_u64(last, reach, &reach))
			return false;
	}
	*span = reach;
	return true;
}

/* Where does this tensor lie? */
static MillmCode
place(const MillmTorchBin *b, const char *folder, int folder_len, const char *name, const MillmView *v, Source *out, MillmError *err)
{
	const MillmZipMember *m = find_member(b, folder, folder_len, "data/", v->key);
	const uint64_t element = (uint64_t) millm_dtype_bytes(v->dtype);
	uint64_t	stored, span, end;

	if (!m || !millm_mul_u64((uint64_t) v->n_stored, element, &stored) || stored > m->bytes)
	{
		damaged(b, err);
		millm_detail(err, "The storage \"%s\" of tensor \"%s\" should have %lld elements of %s; it %s.", shown(v->key).text, shown(name).text, (long long) v->n_stored,
					 millm_dtype_name(v->dtype), m ? "is shorter" : "is not there");
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (!measure(v, &out->bytes, &span))
	{
		damaged(b, err);
		millm_detail(err, "Tensor \"%s\" has an impossible shape, or an element twice.", shown(name).text);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (!millm_add_u64((uint64_t) v->offset, span, &end) || end > (uint64_t) v->n_stored)
	{
		damaged(b, err);
		millm_detail(err, "Tensor \"%s\" claims elements %lld to %llu of a storage of %lld.", shown(name).text, (long long) v->offset, (unsigned long long) end,
					 (long long) v->n_stored);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	out->view = v;
	out->at = m->offset + (uint64_t) v->offset * element;
	out->span = span * element;
	return MILLM_OK;
}

static bool
same_view(const MillmView *a, const MillmView *b)
{
	size_t		n = (size_t) a->n_dims * sizeof(a->dims[0]);

	return strcmp(a->key, b->key) == 0 && a->dtype == b->dtype && a->offset == b->offset && a->n_dims == b->n_dims &&
		memcmp(a->dims, b->dims, n) == 0 && memcmp(a->strides, b->strides, n) == 0;
}

/* Is tensor i, of the name that may be left out, the same as another one? */
static bool
is_repeated(const MillmPickle *p, size_t i)
{
	for (size_t k = 0; k < millm_pickle_n_tensors(p); k++)
		if (k != i && same_view(millm_pickle_view(p, i), millm_pickle_view(p, k)))
			return true;
	return false;
}

/* One tensor's line of the header, and its place in the data.  false: out of memory. */
static bool
describe(json_t *header, const char *name, const MillmView *v, uint64_t begin, uint64_t end)
{
	json_t	   *shape = json_array();

	for (int d = 0; d < v->n_dims; d++)
		json_array_append_new(shape, json_integer(v->dims[d]));
	return json_object_set_new(header, name, json_pack("{s:s, s:o, s:[I, I]}", "dtype", millm_dtype_name(v->dtype), "shape", shape, "data_offsets",
													   (json_int_t) begin, (json_int_t) end)) == 0;
}

static MillmCode
plan(MillmTorchBin *b, const char *folder, int folder_len, const char *tied, json_t *header, MillmError *err)
{
	const size_t n = millm_pickle_n_tensors(b->pickle);
	MillmCode	rc;

	if (!header || !(b->sources = calloc(n, sizeof(*b->sources))))
		return no_memory(err);
	for (size_t i = 0; i < n; i++)
	{
		const char *name = millm_pickle_name(b->pickle, i);
		Source	   *s = &b->sources[b->n_sources];
		uint64_t	begin = b->data_bytes;

		if (strcmp(name, "__metadata__") == 0 || json_object_get(header, name))
		{
			damaged(b, err);
			millm_detail(err, "Tensor \"%s\" is there twice, or has a name that no tensor may have.", shown(name).text);
			return MILLM_E_INVALID_MODEL_FILE;
		}
		if (tied && strcmp(name, tied) == 0 && is_repeated(b->pickle, i))
			continue;
		if ((rc = place(b, folder, folder_len, name, millm_pickle_view(b->pickle, i), s, err)) != MILLM_OK)
			return rc;
		b->n_sources++;
		/* each is at most the file, so this cannot overflow */
		b->data_bytes += s->bytes;
		if (b->data_bytes > 2 * b->len)
		{
			damaged(b, err);
			millm_detail(err, "Its tensors share their storages so often that they would take more than twice the %llu bytes of the file.", (unsigned long long) b->len);
			return MILLM_E_INVALID_MODEL_FILE;
		}
		if (!describe(header, name, s->view, begin, b->data_bytes))
			return no_memory(err);
	}
	return MILLM_OK;
}

/* 8 bytes of length, then the header; spaces make the data begin at a multiple of 8. */
static MillmCode
write_head(MillmTorchBin *b, const json_t *header, MillmError *err)
{
	char	   *text = json_dumps(header, JSON_COMPACT);
	size_t		n = text ? strlen(text) : 0;

	if (n > MILLM_ST_HEADER_MAX - 8)
	{
		free(text);
		damaged(b, err);
		millm_detail(err, "A header of its %zu tensors would take %zu bytes.", b->n_sources, n);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	b->head_bytes = 8 + (n + 7) / 8 * 8;
	if (!text || !(b->head = malloc(b->head_bytes)))
	{
		free(text);
		return no_memory(err);
	}
	memset(b->head, ' ', b->head_bytes);
	millm_put_le64(b->head, b->head_bytes - 8);
	memcpy(b->head + 8, text, n);
	free(text);
	return MILLM_OK;
}

static MillmCode
read_contents(MillmTorchBin *b, const char *tied, MillmError *err)
{
	const MillmZipMember *m;
	json_t	   *header;
	struct stat sb;
	int			folder_len = 0;
	MillmCode	rc;

	if (fstat(b->fd, &sb) != 0)
	{
		damaged(b, err);
		millm_detail(err, "%s.", strerror(errno));
		return MILLM_E_INVALID_MODEL_FILE;
	}
	b->len = (uint64_t) sb.st_size;
	if ((rc = refuse_legacy(b, err)) != MILLM_OK || (rc = millm_zip_open(b->fd, b->name, &b->zip, err)) != MILLM_OK ||
		(rc = find_pickle(b, &m, &folder_len, err)) != MILLM_OK || (rc = check_byte_order(b, m->name, folder_len, err)) != MILLM_OK)
		return rc;
	if (!(b->pickle_bytes = malloc((size_t) m->bytes + 1)))
		return no_memory(err);
	if ((rc = read_at(b, b->pickle_bytes, (size_t) m->bytes, m->offset, err)) != MILLM_OK ||
		(rc = millm_pickle_read(b->pickle_bytes, (size_t) m->bytes, b->name, &b->pickle, err)) != MILLM_OK)
		return rc;
	header = json_object();
	if ((rc = plan(b, m->name, folder_len, tied, header, err)) == MILLM_OK)
		rc = write_head(b, header, err);
	json_decref(header);
	return rc;
}

MillmCode
millm_torch_bin_open(int fd, const char *name, const char *tied, MillmTorchBin **out, MillmError *err)
{
	MillmTorchBin *b = calloc(1, sizeof(*b));
	MillmCode	rc;

	if (!b || !(b->name = strdup(name)))
	{
		free(b);
		return no_memory(err);
	}
	b->fd = fd;
	if ((rc = read_contents(b, tied, err)) == MILLM_OK)
		*out = b;
	else
		millm_torch_bin_close(b);
	return rc;
}

void
millm_torch_bin_close(MillmTorchBin *b)
{
	if (!b)
		return;
	millm_pickle_free(b->pickle);
	millm_zip_close(b->zip);
	free(b->pickle_bytes);
	free(b->sources);
	free(b->head);
	free(b->name);
	free(b);
}

uint64_t
millm_torch_bin_bytes(const MillmTorchBin *b)
{
	return b->head_bytes + b->data_bytes;
}

/* --- Its bytes --------------------------------------------------------------------------------------------- */

/* Do the elements lie one after the other? */
static bool
is_contiguous(const Source *s)
{
	int64_t		step = 1;

	if (s->span != s->bytes)
		return false;
	for (int d = s->bytes > 0 ? s->view->n_dims - 1 : -1; d >= 0; d--)
	{
		if (s->view->dims[d] != 1 && s->view->strides[d] != step)
			return false;
		step *= s->view->dims[d];
	}
	return true;
}

static MillmCode
copy(const MillmTorchBin *b, const Source *s, uint8_t *piece, MillmTorchTake take, void *arg, MillmError *err)
{
	for (uint64_t at = 0; at < s->bytes;)
	{
		size_t		n = s->bytes - at < PIECE_BYTES ? (size_t) (s->bytes - at) : PIECE_BYTES;
		MillmCode	rc = read_at(b, piece, n, s->at + at, err);

		if (rc != MILLM_OK || (rc = take(arg, piece, n, err)) != MILLM_OK)
			return rc;
		at += n;
	}
	return MILLM_OK;
}

/* Elements here and there: the last dimension runs fastest. */
static MillmCode
gather(const MillmTorchBin *b, const Source *s, uint8_t *piece, MillmTorchTake take, void *arg, MillmError *err)
{
	const MillmView *v = s->view;
	const size_t element = (size_t) millm_dtype_bytes(v->dtype);
	int64_t		index[MILLM_PICKLE_MAX_DIMS] = {0};
	uint8_t    *storage = malloc((size_t) s->span);
	size_t		n = 0, at = 0;
	MillmCode	rc;

	if (!storage)
	{
		millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "insufficient memory to read \"%s\"", b->name);
		millm_detail(err, "A tensor that is not contiguous spans %.1f MB.", (double) s->span / 1e6);
		return MILLM_E_INSUFFICIENT_MEMORY;
	}
	rc = read_at(b, storage, (size_t) s->span, s->at, err);
	for (uint64_t left = s->bytes / element; rc == MILLM_OK && left > 0; left--)
	{
		memcpy(piece + n, storage + at * element, element);
		n += element;
		if (n == PIECE_BYTES || left == 1)
		{
			rc = take(arg, piece, n, err);
			n = 0;
		}
		for (int d = v->n_dims - 1; d >= 0; d--)
		{
			at += (size_t) v->strides[d];
			if (++index[d] < v->dims[d])
				break;
			at -= (size_t) v->strides[d] * (size_t) v->dims[d];
			index[d] = 0;
		}
	}
	free(storage);
	return rc;
}

MillmCode
millm_torch_bin_read(MillmTorchBin *b, MillmTorchTake take, void *arg, MillmError *err)
{
	uint8_t    *piece = malloc(PIECE_BYTES);
	MillmCode	rc = piece ? take(arg, b->head, b->head_bytes, err) : no_memory(err);

	for (size_t i = 0; i < b->n_sources && rc == MILLM_OK; i++)
		rc = (is_contiguous(&b->sources[i]) ? copy : gather) (b, &b->sources[i], piece, take, arg, err);
	free(piece);
	return rc;
}
