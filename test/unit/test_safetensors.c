/* test_safetensors.c -- what a safetensors file may say, and everything that it may not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "checkpoint.h"
#include "safetensors.h"
#include "utf8.h"

static MillmCode
parse(const char *header, size_t data_bytes, MillmSafetensors **st, unsigned char **bytes, MillmError *err)
{
	size_t		len;

	*bytes = st_bytes(header, data_bytes, &len);
	return millm_st_parse(*bytes, len, "a.safetensors", st, err);
}

static void
good(void **state)
{
	MillmSafetensors *st;
	MillmError	err;
	unsigned char *bytes;
	const MillmStTensor *t;

	(void) state;
	/* not in the order of the data; an empty tensor, a scalar; spaces behind */
	assert_int_equal(parse("{\"b\": {\"dtype\": \"BF16\", \"shape\": [2, 3], \"data_offsets\": [4, 16]}, \"__metadata__\": {\"x\": \"y\"},"
						   " \"a\": {\"dtype\": \"F32\", \"shape\": [], \"data_offsets\": [0, 4]},"
						   " \"e\": {\"dtype\": \"F64\", \"shape\": [0, 9223372036854775807], \"data_offsets\": [4, 4]},"
						   " \"z\": {\"dtype\": \"I64\", \"shape\": [1], \"data_offsets\": [16, 24]}}   ", 24, &st, &bytes, &err), MILLM_OK);
	assert_int_equal(millm_st_n_tensors(st), 4);
	t = millm_st_tensor(st, 0);
	assert_string_equal(t->name, "a");
	assert_int_equal(t->n_dims, 0);
	assert_int_equal(t->bytes, 4);
	t = millm_st_tensor(st, 1);
	assert_string_equal(t->name, "e");
	assert_int_equal(t->bytes, 0);
	t = millm_st_tensor(st, 2);
	assert_string_equal(t->name, "b");
	assert_int_equal(t->dtype, MILLM_BF16);
	assert_int_equal(t->n_dims, 2);
	assert_int_equal(t->dims[0], 2);
	assert_int_equal(t->dims[1], 3);
	assert_int_equal(t->begin, 4);
	assert_ptr_equal(t->data, (const char *) millm_st_tensor(st, 0)->data + 4);
	assert_string_equal(millm_st_path(st), "a.safetensors");
	millm_st_close(st);
	free(bytes);

	assert_int_equal(parse("{}", 0, &st, &bytes, &err), MILLM_OK);
	assert_int_equal(millm_st_n_tensors(st), 0);
	millm_st_close(st);
	free(bytes);
	millm_st_close(NULL);
}

static void
dtypes(void **state)
{
	static const struct
	{
		const char *name;
		int			bytes;
	}			all[] = {
		{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I8", 1}, {"U8", 1}, {"I16", 2}, {"I32", 4}, {"I64", 8}, {"F64", 8}, {"BOOL", 1},
	};

	(void) state;
	assert_int_equal(sizeof(all) / sizeof(all[0]), MILLM_N_DTYPES - (MILLM_N_WEIGHT_DTYPES - MILLM_N_FLOAT_DTYPES));
	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
	{
		char		header[200];
		MillmSafetensors *st;
		MillmError	err;
		unsigned char *bytes;
		MillmDtype	d;

		snprintf(header, sizeof(header), "{\"t\": {\"dtype\": \"%s\", \"shape\": [3], \"data_offsets\": [0, %d]}}", all[i].name, 3 * all[i].bytes);
		assert_int_equal(parse(header, (size_t) (3 * all[i].bytes), &st, &bytes, &err), MILLM_OK);
		d = millm_st_tensor(st, 0)->dtype;
		assert_string_equal(millm_dtype_name(d), all[i].name);
		assert_int_equal(millm_dtype_bytes(d), all[i].bytes);
		millm_st_close(st);
		free(bytes);
	}
}

#define T(name, dtype, shape, offsets) "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", \"data_offsets\": " offsets "}"

static void
bad_headers(void **state)
{
	static const struct
	{
		const char *header;
		size_t		data_bytes;
		MillmCode	code;
		const char *text;
	}			cases[] = {
		/* places */
		{"{" T("a", "F32", "[2]", "[0, 8]") "}", 7, MILLM_E_INVALID_MODEL_FILE, "claims bytes 0 to 8"},
		{"{" T("a", "F32", "[2]", "[0, 8]") "}", 9, MILLM_E_INVALID_MODEL_FILE, "describes 8 bytes of data; the file has 9"},
		{"{}", 4, MILLM_E_INVALID_MODEL_FILE, "describes 0 bytes of data; the file has 4"},
		{"{" T("a", "F32", "[2]", "[0, 8]") ", " T("b", "F32", "[1]", "[4, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "a hole or an overlap"},
		{"{" T("a", "F32", "[1]", "[0, 4]") ", " T("b", "F32", "[1]", "[0, 4]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "a hole or an overlap"},
		{"{" T("a", "F32", "[1]", "[0, 4]") ", " T("b", "F32", "[1]", "[8, 12]") "}", 12, MILLM_E_INVALID_MODEL_FILE, "begins at byte 8 of the data where byte 4"},
		{"{" T("a", "F32", "[1]", "[4, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "a hole or an overlap"},
		{"{" T("a", "F32", "[1]", "[8, 4]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "data_offsets"},
		{"{" T("a", "F32", "[1]", "[-4, 0]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "data_offsets"},
		{"{" T("a", "F32", "[1]", "[0, 4, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "data_offsets"},
		{"{" T("a", "F32", "[1]", "[0, 4.0]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "data_offsets"},
		{"{" T("a", "F32", "[1]", "[0, \"4\"]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "data_offsets"},
		{"{" T("a", "F32", "[1]", "4") "}", 4, MILLM_E_INVALID_MODEL_FILE, "data_offsets"},
		{"{" T("a", "F32", "[1]", "[0, 9223372036854775807]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "claims bytes 0 to 9223372036854775807"},
		{"{" T("a", "F32", "[1]", "[9223372036854775803, 9223372036854775807]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "claims bytes"},
		/* shapes */
		{"{" T("a", "F32", "[3]", "[0, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "for 12 bytes of elements"},
		{"{" T("a", "F32", "[-2]", "[0, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "impossible shape"},
		{"{" T("a", "F32", "[2.0]", "[0, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "impossible shape: dimension 0 is not an integer"},
		{"{" T("a", "F32", "[true]", "[0, 4]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "impossible shape"},
		{"{" T("a", "F32", "{}", "[0, 4]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "dtype, shape or data_offsets"},
		/* products that wrap to something plausible: 2^32 * 2^32 elements, 2^62 elements of 4 bytes */
		{"{" T("a", "F32", "[4294967296, 4294967296]", "[0, 0]") "}", 0, MILLM_E_INVALID_MODEL_FILE, "impossible shape"},
		{"{" T("a", "F32", "[4611686018427387904]", "[0, 0]") "}", 0, MILLM_E_INVALID_MODEL_FILE, "claims bytes 0 to 0"},
		{"{" T("a", "F32", "[4611686018427387905]", "[0, 4]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "claims bytes 0 to 4"},
		{"{" T("a", "F32", "[9223372036854775808]", "[0, 4]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "not a JSON object"},
		{"{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0, 4]") "}", 4, MILLM_E_INVALID_MODEL_FILE, "9 dimensions; at most 8"},
		/* dtypes */
		{"{" T("a", "F8_E4M3", "[4]", "[0, 4]") "}", 4, MILLM_E_UNSUPPORTED, "dtype \"F8_E4M3\" of tensor \"a\""},
		{"{" T("a", "f32", "[1]", "[0, 4]") "}", 4, MILLM_E_UNSUPPORTED, "dtype \"f32\""},
		{"{\"a\": {\"dtype\": 7, \"shape\": [1], \"data_offsets\": [0, 4]}}", 4, MILLM_E_INVALID_MODEL_FILE, "dtype, shape or data_offsets"},
		/* JSON */
		{"{\"a\": {\"shape\": [1], \"data_offsets\": [0, 4]}}", 4, MILLM_E_INVALID_MODEL_FILE, "dtype, shape or data_offsets"},
		{"{\"a\": 3}", 0, MILLM_E_INVALID_MODEL_FILE, "dtype, shape or data_offsets"},
		{"{\"a\": null}", 0, MILLM_E_INVALID_MODEL_FILE, "dtype, shape or data_offsets"},
		{"{" T("a", "F32", "[1]", "[0, 4]") ", " T("a", "F32", "[1]", "[4, 8]") "}", 8, MILLM_E_INVALID_MODEL_FILE, "duplicate"},
		{"{\"a\": {\"dtype\": \"F32\", \"dtype\": \"F16\", \"shape\": [1], \"data_offsets\": [0, 4]}}", 4, MILLM_E_INVALID_MODEL_FILE, "duplicate"},
		{"[]", 0, MILLM_E_INVALID_MODEL_FILE, "it is another value"},
		{"", 0, MILLM_E_INVALID_MODEL_FILE, "not a JSON object"},
		{"{\"a\": ", 0, MILLM_E_INVALID_MODEL_FILE, "not a JSON object"},
		{"{} x", 0, MILLM_E_INVALID_MODEL_FILE, "not a JSON object"},
		{"{\"\xff\": 1}", 0, MILLM_E_INVALID_MODEL_FILE, "not a JSON object"},
		{"{\"a\\u0000b\": 1}", 0, MILLM_E_INVALID_MODEL_FILE, "not a JSON object"},
	};

	(void) state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		MillmSafetensors *st = (void *) &cases;	/* a failure leaves it alone */
		MillmError	err;
		unsigned char *bytes;

		assert_failure(parse(cases[i].header, cases[i].data_bytes, &st, &bytes, &err), &err, cases[i].code, cases[i].text);
		assert_non_null(strstr(cases[i].code == MILLM_E_UNSUPPORTED ? err.detail : err.message, "\"a.safetensors\""));
		assert_ptr_equal(st, &cases);
		free(bytes);
	}
}

/* Every prefix of a good file is refused, and so is every lie about the header's length that reaches beyond it. */
static void
truncated(void **state)
{
	MillmSafetensors *st;
	MillmError	err;
	size_t		len;
	unsigned char *bytes = st_bytes("{" T("a", "F32", "[2]", "[0, 8]") "}", 8, &len);

	(void) state;
	for (size_t n = 0; n < len; n++)
	{
		unsigned char *prefix = malloc(n ? n : 1);	/* its own block, so that a sanitizer sees a read behind it */

		memcpy(prefix, bytes, n);
		assert_int_equal(millm_st_parse(prefix, n, "x", &st, &err), MILLM_E_INVALID_MODEL_FILE);
		assert_true(err.detail[0]);
		free(prefix);
	}
	assert_failure(millm_st_parse(bytes, 7, "x", &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "It has 7 bytes");
	memset(bytes, 0xFF, 8);
	assert_failure(millm_st_parse(bytes, len, "x", &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "claims 18446744073709551615 bytes");
	memset(bytes, 0, 8);
	assert_failure(millm_st_parse(bytes, len, "x", &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "not a JSON object");
	free(bytes);
}

static void
deep(void **state)
{
	size_t		n = 1 << 20;
	char	   *header = malloc(n + 1);
	MillmSafetensors *st;
	MillmError	err;
	unsigned char *bytes;

	(void) state;
	memset(header, '[', n);
	header[n] = '\0';
	assert_failure(parse(header, 0, &st, &bytes, &err), &err, MILLM_E_INVALID_MODEL_FILE, "depth");
	free(bytes);
	free(header);
}

/* A name of any length and content is shown short and tame. */
static void
names_in_errors(void **state)
{
	char		header[2000];
	char		name[1000];
	MillmSafetensors *st;
	MillmError	err;
	unsigned char *bytes;

	(void) state;
	memset(name, 'x', sizeof(name));
	memcpy(name, "\\n\\u001b[31m", 12);
	for (size_t i = 12; i + 2 < sizeof(name) - 1; i += 2)
		memcpy(name + i, "\xc3\xa9", 2);
	name[sizeof(name) - 2] = '\0';
	snprintf(header, sizeof(header), "{\"%s\": {\"dtype\": \"F32\", \"shape\": [3], \"data_offsets\": [0, 8]}}", name);
	assert_failure(parse(header, 8, &st, &bytes, &err), &err, MILLM_E_INVALID_MODEL_FILE, "...\" claims bytes 0 to 8 for 12");
	assert_non_null(strstr(err.detail, "\"??[31m\xc3\xa9"));
	assert_null(strchr(err.detail, '\n'));
	assert_int_equal(millm_utf8_valid_bytes(err.detail, strlen(err.detail)), strlen(err.detail));
	free(bytes);
}

static void
files(void **state)
{
	static const TestTensor tensor = {"a", "F32", 4, {2, 3}, 1};
	char		dir[64], path[512];
	MillmSafetensors *st;
	MillmError	err;
	size_t		len;

	(void) state;
	make_dir(dir);
	snprintf(path, sizeof(path), "%s/x", dir);
	assert_failure(millm_st_open(path, &st, &err), &err, MILLM_E_MODEL_FILES_MISSING, "No such file");
	assert_failure(millm_st_open(dir, &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "not a regular file");
	assert_int_equal(mkfifo(path, 0600), 0);
	assert_failure(millm_st_open(path, &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "not a regular file");
	remove_file(dir, "x");
	write_text(dir, "x", "");
	assert_failure(millm_st_open(path, &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "It has 0 bytes");
	write_text(dir, "x", "version https://git-lfs.github.com/spec/v1\n");
	assert_failure(millm_st_open(path, &st, &err), &err, MILLM_E_INVALID_MODEL_FILE, "The header claims");

	for (int pad = 0; pad < 4; pad++)	/* whatever the alignment */
	{
		float		value;

		write_st(dir, "x", &tensor, 1, pad);
		assert_int_equal(millm_st_open(path, &st, &err), MILLM_OK);
		assert_string_equal(millm_st_path(st), path);
		memcpy(&value, (const char *) millm_st_tensor(st, 0)->data + 20, 4);
		assert_true(value == 6);
		assert_non_null(millm_st_map(st, &len));
		assert_ptr_equal((const char *) millm_st_map(st, &len) + len, (const char *) millm_st_tensor(st, 0)->data + 24);
		millm_st_close(st);
	}
	remove_dir(dir);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(good),
		cmocka_unit_test(dtypes),
		cmocka_unit_test(bad_headers),
		cmocka_unit_test(truncated),
		cmocka_unit_test(deep),
		cmocka_unit_test(names_in_errors),
		cmocka_unit_test(files),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
