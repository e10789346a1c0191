/* test_pickle.c -- PyTorch checkpoints: what a pickle may say, where a zip's members lie, and the safetensors bytes that come of both. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

#include "arith.h"
#include "pickle.h"
#include "safetensors.h"
#include "torch_bin.h"
#include "zip.h"

/* Parts of programs.  Numbers are BININT1, texts SHORT_BINUNICODE. */
#define BEGIN		"\x80\x02"
#define TABLE		"ccollections\nOrderedDict\n)R"
#define STORAGE(type, key, n)	"(\x8c\x07storage" "ctorch\n" type "Storage\n" "\x8c\x01" key "\x8c\x03" "cpu" "K" n "tQ"
#define TENSOR(storage, offset, dims, strides)	"ctorch._utils\n_rebuild_tensor_v2\n" "(" storage "K" offset dims strides "\x89" TABLE "tR"
#define VECTOR		TENSOR(STORAGE("Float", "0", "\x04"), "\x00", "K\x04\x85", "K\x01\x85")

static MillmCode
run(const char *program, size_t len, MillmPickle **p, char **bytes, MillmError *err)
{
	*bytes = malloc(len);
	memcpy(*bytes, program, len);
	return millm_pickle_read(*bytes, len, "x.bin", p, err);
}

static void
good(void **state)
{
	/* memo, protocol 4's names, metadata, a parameter, the same tensor twice */
	static const char program[] = BEGIN TABLE "q\x00(" "\x8c\x01" "a" VECTOR "\x94"
		"\x8c\x01" "b" "\x8c\x0ctorch._utils\x8c\x12_rebuild_parameter\x93" "h\x01\x88" TABLE "\x87R"
		"X\x02\0\0\0cc" TENSOR(STORAGE("BFloat16", "7", "\x09"), "\x03", "K\x02K\x03\x86", "K\x01K\x02\x86") "u"
		"}\x8c\x09_metadata}\x8c\x01v](K\x01M\x01\x02J\xff\xff\xff\xff\x8a\x01\xfe" "es" "s" "b.";
	MillmPickle *p;
	MillmError	err = {0};
	const MillmView *v;
	char	   *bytes;

	(void) state;
	if (run(program, sizeof(program) - 1, &p, &bytes, &err) != MILLM_OK)
		fail_msg("%s: %s", err.message, err.detail);
	assert_int_equal(millm_pickle_n_tensors(p), 3);
	assert_string_equal(millm_pickle_name(p, 0), "a");
	assert_string_equal(millm_pickle_name(p, 1), "b");
	assert_string_equal(millm_pickle_name(p, 2), "cc");
	assert_ptr_equal(millm_pickle_view(p, 0), millm_pickle_view(p, 1));
	v = millm_pickle_view(p, 0);
	assert_string_equal(v->key, "0");
	assert_int_equal(v->dtype, MILLM_F32);
	assert_int_equal(v->n_stored, 4);
	assert_int_equal(v->n_dims, 1);
	assert_int_equal(v->dims[0], 4);
	v = millm_pickle_view(p, 2);
	assert_string_equal(v->key, "7");
	assert_int_equal(v->dtype, MILLM_BF16);
	assert_int_equal(v->offset, 3);
	assert_int_equal(v->dims[1], 3);
	assert_int_equal(v->strides[1], 2);
	millm_pickle_free(p);
	free(bytes);
	millm_pickle_free(NULL);
}

static void
refusals(void **state)
{
#define P(text) text, sizeof(text) - 1
	static const struct
	{
		const char *program;
		size_t		len;
		const char *says;		/* in the message or the detail */
	}			bad[] = {
		{P(""), "does not begin"}, {P("\x80"), "does not begin"}, {P("\x80\x01}."), "does not begin"}, {P("\x80\x06}."), "does not begin"}, {P("}."), "does not begin"},
		{P(BEGIN), "no end"}, {P(BEGIN "."), "no table"}, {P(BEGIN "}."), "empty"}, {P(BEGIN "}}."), "no table"}, {P(BEGIN "N."), "no table"},
		{P(BEGIN "cposix\nsystem\n."), "the global posix.system"}, {P(BEGIN "\x8c\x02os\x8c\x06system\x93."), "the global os.system"},
		{P(BEGIN "ctorch\nFloatStorag\n."), "the global torch.FloatStorag"}, {P(BEGIN "ctorch.x\nFloatStorage\n."), "the global torch.x.FloatStorage"},
		{P(BEGIN "cos\0\nsystem\n."), "no name"}, {P(BEGIN "cos\nsys"), "no name"}, {P(BEGIN "cos"), "no name"}, {P(BEGIN "\x8c\x01" "a\x93."), "no name"},
		{P(BEGIN "0."), "opcode POP"}, {P(BEGIN "i."), "opcode INST"}, {P(BEGIN "o."), "opcode OBJ"}, {P(BEGIN "\x81."), "opcode NEWOBJ"},
		{P(BEGIN "\x92."), "opcode NEWOBJ_EX"}, {P(BEGIN "\x82\x01."), "opcode EXT1"}, {P(BEGIN "P0\n."), "opcode PERSID"}, {P(BEGIN BEGIN), "opcode PROTO"},
		{P(BEGIN "\xff."), "opcode 0xff"}, {P(BEGIN "\0."), "opcode 0x00"},
		{P(BEGIN "X\xff\xff\xff\xff" "a"), "within an opcode"}, {P(BEGIN "X\x01\0"), "within an opcode"}, {P(BEGIN "\x8c\x02" "a"), "within an opcode"},
		{P(BEGIN "J\0\0\0"), "within an opcode"}, {P(BEGIN "K"), "within an opcode"}, {P(BEGIN "q"), "within an opcode"}, {P(BEGIN "\x8a\x09\0\0\0\0\0\0\0\0\0."), "9 bytes"},
		{P(BEGIN "\x8a\x08\0\0"), "within an opcode"}, {P(BEGIN "\x8c\x01\xff."), "UTF-8"}, {P(BEGIN "\x8c\x01\0."), "UTF-8"},
		{P(BEGIN "\x95\xff\xff\xff\xff\xff\xff\xff\xff."), "within a frame"},
		{P(BEGIN "t."), "no mark"}, {P(BEGIN "\x85."), "lacks"}, {P(BEGIN "N(\x86."), "lacks"}, {P(BEGIN "}s."), "no table"}, {P(BEGIN "}(Nu."), "no table"},
		{P(BEGIN "](NNu."), "no table"}, {P(BEGIN "}Na."), "no list"}, {P(BEGIN "}(Ne."), "no list"}, {P(BEGIN "e."), "no list"}, {P(BEGIN "}Nb."), "attributes"},
		{P(BEGIN "q\x00."), "nothing to be remembered"}, {P(BEGIN "(\x94."), "nothing to be remembered"}, {P(BEGIN "}r\xff\xff\xff\xff."), "remembers value 4294967295"},
		{P(BEGIN "}q\x05h\x04."), "never remembered"}, {P(BEGIN "j\xff\xff\xff\xff."), "never remembered"},
		{P(BEGIN "NR."), "calls"}, {P(BEGIN "N)R."), "calls"}, {P(BEGIN "ctorch\nFloatStorage\n)R."), "calls torch.FloatStorage"},
		{P(BEGIN "ccollections\nOrderedDict\nN\x85R."), "OrderedDict of 1"}, {P(BEGIN "ctorch._utils\n_rebuild_parameter\n}\x88}\x87R."), "no tensor"},
		{P(BEGIN "ctorch._utils\n_rebuild_tensor_v2\n)R."), "0 parts"}, {P(BEGIN ")Q."), "five parts"}, {P(BEGIN "(NNNNNtQ."), "is none"},
		{P(BEGIN "}\x8c\x01" "aNs."), "\"a\" is no tensor"}, {P(BEGIN "}K\x01" VECTOR "s."), "no text"}, {P(BEGIN "}\x8c\x01" "a" VECTOR "s.."), "1 bytes follow"},
		{P(BEGIN "}\x8c\x01" "a" TENSOR(STORAGE("Float", "0", "\x04"), "\x00", "K\x04\x85", ")") "s."), "impossible shape"},
		{P(BEGIN "}\x8c\x01" "a" TENSOR(STORAGE("Float", "0", "\x04"), "\x00", "J\xff\xff\xff\xff\x85", "K\x01\x85") "s."), "impossible shape"},
		{P(BEGIN "}\x8c\x01" "a" TENSOR("N", "\x00", "K\x04\x85", "K\x01\x85") "s."), "no storage"},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
	{
		MillmPickle *p;
		MillmError	err = {0};
		char	   *bytes;

		if (run(bad[i].program, bad[i].len, &p, &bytes, &err) != MILLM_E_INVALID_MODEL_FILE || (!strstr(err.message, bad[i].says) && !strstr(err.detail, bad[i].says)))
			fail_msg("program %zu, which should say \"%s\", says: %s: %s", i, bad[i].says, err.message, err.detail);
		free(bytes);
	}
}

/* More values than it may make, of every kind of opcode that makes one out of nothing. */
static void
bombs(void **state)
{
	static const struct
	{
		const char *part;
		size_t		len;
	}			parts[] = {{P("N")}, {P("(")}, {P(")")}, {P("\x94")}, {P("h\x00")}, {P("}")}, {P("\x85")}, {P("K\x01")}, {P("\x8c\x00")}};
	const size_t size = (size_t) 12 << 20;
	char	   *bytes = malloc(size);

	(void) state;
	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
	{
		MillmPickle *p;
		MillmError	err = {0};
		size_t		len = 5;

		memcpy(bytes, BEGIN "Nq\x00", len);
		while (len + parts[i].len <= size)
		{
			memcpy(bytes + len, parts[i].part, parts[i].len);
			len += parts[i].len;
		}
		assert_int_equal(millm_pickle_read(bytes, len, "x.bin", &p, &err), MILLM_E_INVALID_MODEL_FILE);
		assert_true(strstr(err.detail, "more than 4194304 values") || strstr(err.detail, "remembers value 4194304") || strstr(err.detail, "within an opcode"));
	}
	free(bytes);
}

/* --- Archives ------------------------------------------------------------------------------------------------ */

typedef struct Archive
{
	unsigned char bytes[8192];
	size_t		len;
	unsigned char directory[2048];
	size_t		directory_len;
	unsigned	n;
} Archive;

static void
put16(unsigned char *p, unsigned v)
{
	p[0] = (unsigned char) v;
	p[1] = (unsigned char) (v >> 8);
}

/* A stored member; is_wide: with its numbers in the directory's 64-bit field. */
static void
add(Archive *a, const char *name, const void *data, size_t len, bool is_wide)
{
	unsigned char *local = a->bytes + a->len, *entry = a->directory + a->directory_len, *extra;
	size_t		n = strlen(name);

	memset(entry, 0, 46);
	millm_put_le32(entry, 0x02014B50);
	millm_put_le32(entry + 20, is_wide ? UINT32_MAX : (uint32_t) len);
	millm_put_le32(entry + 24, is_wide ? UINT32_MAX : (uint32_t) len);
	put16(entry + 28, (unsigned) n);
	put16(entry + 30, is_wide ? 4 + 3 + 28 : 0);
	millm_put_le32(entry + 42, is_wide ? UINT32_MAX : (uint32_t) a->len);
	memcpy(entry + 46, name, n);
	extra = entry + 46 + n;
	if (is_wide)
	{
		memcpy(extra, "FB\x03\0abc\x01\0\x18\0", 11);
		millm_put_le64(extra + 11, len);
		millm_put_le64(extra + 19, len);
		millm_put_le64(extra + 27, a->len);
	}
	a->directory_len += 46 + n + (is_wide ? 35 : 0);
	memset(local, 0, 30);
	millm_put_le32(local, 0x04034B50);
	put16(local + 26, (unsigned) n);
	put16(local + 28, 3);
	memcpy(local + 30, name, n);
	memcpy(local + 30 + n, "ZZZ", 3);
	memcpy(local + 33 + n, data, len);
	a->len += 33 + n + len;
	a->n++;
}

/* Write the directory and the end; an open file of it. */
static int
finish(Archive *a, bool is_wide)
{
	size_t		at = a->len;
	unsigned char *end;
	int			fd = memfd_create("archive", MFD_CLOEXEC);

	memcpy(a->bytes + at, a->directory, a->directory_len);
	end = a->bytes + at + a->directory_len;
	if (is_wide)
	{
		memset(end, 0, 76);
		millm_put_le32(end, 0x06064B50);
		millm_put_le64(end + 24, a->n);
		millm_put_le64(end + 32, a->n);
		millm_put_le64(end + 40, a->directory_len);
		millm_put_le64(end + 48, at);
		millm_put_le32(end + 56, 0x07064B50);
		millm_put_le64(end + 64, at + a->directory_len);
		end += 76;
	}
	memset(end, 0, 22);
	millm_put_le32(end, 0x06054B50);
	put16(end + 8, is_wide ? 0xFFFF : a->n);
	put16(end + 10, is_wide ? 0xFFFF : a->n);
	millm_put_le32(end + 12, is_wide ? UINT32_MAX : (uint32_t) a->directory_len);
	millm_put_le32(end + 16, is_wide ? UINT32_MAX : (uint32_t) at);
	a->len = (size_t) (end + 22 - a->bytes);
	assert_true(a->len <= sizeof(a->bytes) && fd >= 0);
	assert_int_equal(write(fd, a->bytes, a->len), a->len);
	return fd;
}

static void
archives(void **state)
{
	(void) state;
	for (int is_wide = 0; is_wide < 2; is_wide++)
	{
		Archive		a = {0};
		MillmZip   *zip;
		MillmError	err = {0};
		const MillmZipMember *m;
		int			fd;

		add(&a, "b/2", "hello", 5, is_wide);
		add(&a, "a", "", 0, is_wide);
		fd = finish(&a, is_wide);
		if (millm_zip_open(fd, "x.bin", &zip, &err) != MILLM_OK)
			fail_msg("%s: %s", err.message, err.detail);
		assert_int_equal(millm_zip_n_members(zip), 2);
		assert_string_equal(millm_zip_member(zip, 0)->name, "a");
		m = millm_zip_find(zip, "b/2");
		assert_non_null(m);
		assert_int_equal(m->bytes, 5);
		assert_memory_equal(a.bytes + m->offset, "hello", 5);
		assert_null(millm_zip_find(zip, "b"));
		millm_zip_close(zip);
		/* whatever byte of the directory is another one, it is refused, or means what it meant */
		for (size_t i = 71; i < a.len; i++)
		{
			unsigned char was = a.bytes[i], is = (unsigned char) (was ^ 0x81);

			assert_int_equal(pwrite(fd, &is, 1, (off_t) i), 1);
			if (millm_zip_open(fd, "x.bin", &zip, &err) == MILLM_OK)
			{
				for (size_t k = 0; k < millm_zip_n_members(zip); k++)
					assert_true(millm_zip_member(zip, k)->offset + millm_zip_member(zip, k)->bytes <= a.len);
				millm_zip_close(zip);
			}
			else
				assert_true(err.code == MILLM_E_INVALID_MODEL_FILE && err.detail[0]);
			assert_int_equal(pwrite(fd, &was, 1, (off_t) i), 1);
		}
		for (size_t len = 0; len < a.len; len++)
		{
			assert_int_equal(ftruncate(fd, (off_t) len), 0);
			assert_int_equal(millm_zip_open(fd, "x.bin", &zip, &err), MILLM_E_INVALID_MODEL_FILE);
		}
		close(fd);
	}
}

/* --- Checkpoints ------------------------------------------------------------------------------------------------ */

typedef struct Taken
{
	unsigned char bytes[4096];
	size_t		len;
} Taken;

static MillmCode
take(void *arg, const void *data, size_t len, MillmError *err)
{
	Taken	   *t = arg;

	(void) err;
	assert_true(len > 0 && t->len + len <= sizeof(t->bytes));
	memcpy(t->bytes + t->len, data, len);
	t->len += len;
	return MILLM_OK;
}

static const MillmStTensor *
find(const MillmSafetensors *st, const char *name)
{
	for (size_t i = 0; i < millm_st_n_tensors(st); i++)
		if (strcmp(millm_st_tensor(st, i)->name, name) == 0)
			return millm_st_tensor(st, i);
	return NULL;
}

static void
checkpoints(void **state)
{
	/* of bytes 0 ... 11: all; [2, 3] of [4, 3]; its transpose; every other one; a scalar; nothing; the tied head */
	static const char program[] = BEGIN "}("
		"\x8c\x03" "all" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x00", "K\x04K\x03\x86", "K\x03K\x01\x86")
		"\x8c\x04rows" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x03", "K\x02K\x03\x86", "K\x03K\x01\x86")
		"\x8c\x06turned" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x03", "K\x03K\x02\x86", "K\x01K\x03\x86")
		"\x8c\x05other" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x01", "K\x06\x85", "K\x02\x85")
		"\x8c\x06scalar" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x0b", ")", ")")
		"\x8c\x07nothing" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x0c", "K\x00K\x05\x86", "K\x05K\x01\x86")
		"\x8c\x04head" TENSOR(STORAGE("Byte", "0", "\x0c"), "\x00", "K\x04K\x03\x86", "K\x03K\x01\x86") "u.";
	static const struct
	{
		const char *name, *bytes;
		size_t		len;
	}			want[] = {
		{"all", P("\0\1\2\3\4\5\6\7\10\11\12\13")}, {"rows", P("\3\4\5\6\7\10")}, {"turned", P("\3\6\4\7\5\10")}, {"other", P("\1\3\5\7\11\13")},
		{"scalar", P("\13")}, {"nothing", P("")}, {"head", P("\0\1\2\3\4\5\6\7\10\11\12\13")},
	};
	Archive		a = {0};
	MillmTorchBin *bin;
	MillmError	err = {0};
	int			fd;

	(void) state;
	add(&a, "x/data.pkl", program, sizeof(program) - 1, false);
	add(&a, "x/byteorder", "little", 6, false);
	add(&a, "x/data/0", "\0\1\2\3\4\5\6\7\10\11\12\13", 12, false);
	fd = finish(&a, true);
	for (int is_tied = 0; is_tied < 2; is_tied++)
	{
		Taken		t = {0};
		MillmSafetensors *st;

		if (millm_torch_bin_open(fd, "x.bin", is_tied ? "head" : NULL, &bin, &err) != MILLM_OK)
			fail_msg("%s: %s", err.message, err.detail);
		assert_int_equal(millm_torch_bin_read(bin, take, &t, &err), MILLM_OK);
		assert_int_equal(millm_torch_bin_bytes(bin), t.len);
		millm_torch_bin_close(bin);
		assert_int_equal(millm_st_parse(t.bytes, t.len, "x", &st, &err), MILLM_OK);
		assert_int_equal(millm_st_n_tensors(st), 7 - is_tied);
		for (size_t i = 0; i < 7 - (size_t) is_tied; i++)
		{
			const MillmStTensor *tensor = find(st, want[i].name);

			assert_non_null(tensor);
			assert_int_equal(tensor->bytes, want[i].len);
			assert_memory_equal(tensor->data, want[i].bytes, want[i].len);
		}
		millm_st_close(st);
	}
	millm_torch_bin_close(NULL);
	close(fd);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(good), cmocka_unit_test(refusals), cmocka_unit_test(bombs), cmocka_unit_test(archives), cmocka_unit_test(checkpoints),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
