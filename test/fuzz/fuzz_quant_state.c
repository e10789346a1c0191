/*
 * fuzz_quant_state.c -- a stranger's quantized Linear: its quant_state, and tensors that may not fit it.
 *
 * The input is the text up to a NUL, then the lengths and dtypes of five tensors, then bytes for them.  Whatever
 * binds is dequantized, each tensor in a buffer of exactly its length, and everything that comes out is finite.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "quant.h"

#define N_STORED 5
#define MAX_WEIGHTS 65536		/* of those that are dequantized whole */

static void
check(int ok)
{
	if (!ok)
		abort();
}

/* Take n bytes of the input, repeated, into a buffer of exactly that size. */
static void *
take(const uint8_t *data, size_t size, size_t *at, size_t n)
{
	uint8_t    *p = malloc(n ? n : 1);

	for (size_t i = 0; i < n; i++)
		p[i] = size ? data[(*at)++ % size] : 0;
	return p;
}

static void
dequantize(const MillmQuantWeight *w)
{
	int64_t		n = w->n_out * w->n_in;
	float	   *y;

	if (n > MAX_WEIGHTS)
		return;
	y = malloc((size_t) n * sizeof(float));
	millm_quant_dequantize(y, w, 0, n);
	for (int64_t i = 0; i < n; i++)
		check(isfinite(y[i]));
	millm_quant_dequantize(y, w, n - 1, 1);
	millm_quant_dequantize(y, w, n / 3, n / 2);
	free(y);
}

/* Half of the inputs get tensors that fit the state but for one, so that bindings succeed. */
static size_t
fitting(const MillmQuantState *st, int i)
{
	int64_t		n = st->n_out * st->n_in, blocks = (n + st->block_size - 1) / st->block_size;

	switch (i)
	{
		case 0:
			return (size_t) (n + 1) / 2;
		case 1:
			return (size_t) blocks * (st->nested ? 1 : 4);
		case 2:
			return 64;
		case 3:
			return st->nested ? (size_t) (blocks + st->nested_block_size - 1) / (size_t) st->nested_block_size * 4 : 0;
		default:
			return st->nested ? 1024 : 0;
	}
}

static void
four_bit(const uint8_t *data, size_t size, const MillmQuantState *st)
{
	MillmStored s[N_STORED] = {0};
	MillmQuantWeight w;
	MillmError	err;
	bool		fits = size > 0 && data[0] & 1 && st->n_out * st->n_in <= MAX_WEIGHTS;
	size_t		at = 0;

	for (int i = 0; i < N_STORED; i++)
	{
		unsigned	kind = at < size ? data[at++] : 0;
		unsigned	length = at < size ? data[at++] : 0;

		s[i].dtype = (MillmDtype) (kind % MILLM_N_DTYPES);
		s[i].bytes = length * (kind & 64 ? 4 : 1);
		if (fits)
		{
			s[i].dtype = i >= 2 || (i == 1 && !st->nested) ? MILLM_F32 : MILLM_U8;
			s[i].bytes = fitting(st, i) + (kind == 255);
		}
	}
	for (int i = 0; i < N_STORED; i++)
		if (s[i].bytes > 0)
			s[i].data = take(data, size, &at, s[i].bytes);
	if (fits)
		memcpy((void *) (uintptr_t) s[2].data, st->format == MILLM_QUANT_FP4 ? millm_fp4_codebook : millm_nf4_codebook, 64);
	if (millm_quant_bind_4bit("x.weight", st, s[0], s[1], s[2], s[3], s[4], &w, &err) == MILLM_OK)
		dequantize(&w);
	else
		check(err.code == MILLM_E_INVALID_MODEL_FILE && err.message[0]);
	for (int i = 0; i < N_STORED; i++)
		free((void *) (uintptr_t) s[i].data);
}

static void
int8(const uint8_t *data, size_t size, int64_t n_out, int64_t n_in)
{
	MillmStored weight = {MILLM_I8, NULL, 0}, scb = {MILLM_F32, NULL, 0}, none = {0};
	MillmQuantWeight w;
	MillmError	err;
	size_t		at = 0;

	weight.bytes = (uint64_t) n_out * (uint64_t) n_in % MAX_WEIGHTS;
	scb.bytes = (uint64_t) n_out * 4 % MAX_WEIGHTS;
	weight.data = take(data, size, &at, weight.bytes);
	scb.data = take(data, size, &at, scb.bytes);
	if (millm_quant_bind_int8("x.weight", n_out, n_in, weight, scb, none, &w, &err) == MILLM_OK)
		dequantize(&w);
	free((void *) (uintptr_t) weight.data);
	free((void *) (uintptr_t) scb.data);
}

/* The encoder, fed with any bytes in pieces: it refuses them or what it makes can be read back. */
static void
encode(const uint8_t *data, size_t size)
{
	MillmDtype	dtype;
	MillmQuantEncoder *enc;
	const MillmQuantPart *parts;
	MillmQuantState st;
	MillmQuantWeight w;
	MillmError	err;
	MillmStored s[6];
	int64_t		n_in, n_out;
	int			n_parts;
	size_t		step, n;
	uint8_t    *out;
	bool		is_nf4;

	if (size < 8)
		return;
	dtype = (MillmDtype) (data[0] % 3);
	is_nf4 = data[0] & 4;
	n_in = 1 + data[1];
	step = 1 + data[2];
	data += 3;
	size -= 3;
	n_out = (int64_t) (size / (dtype == MILLM_F32 ? 4 : 2)) / n_in;
	if (n_out == 0)
		return;
	n = (size_t) (n_out * n_in) * (dtype == MILLM_F32 ? 4 : 2);
	out = malloc((size_t) (n_out * n_in + 1));
	check(millm_quant_begin(is_nf4 ? MILLM_QUANT_NF4 : MILLM_QUANT_INT8, "x.weight", dtype, n_out, n_in, &enc, &err) == MILLM_OK);
	for (size_t i = 0, at = 0; i < n; i += step)
	{
		size_t		k = n - i < step ? n - i : step;
		size_t		writes = millm_quant_push_writes(enc, k);

		if (millm_quant_push(enc, data + i, k, out + at, &err) != MILLM_OK)
			goto done;
		at += writes;
	}
	check(millm_quant_finish(enc, &parts, &n_parts, &err) == MILLM_OK);
	for (int i = 0; i < n_parts; i++)
		s[i] = (MillmStored) {parts[i].dtype, i == 0 ? out : parts[i].data, parts[i].bytes};
	if (is_nf4)
	{
		check(millm_quant_state_read("x.weight.quant_state.bitsandbytes__nf4", s[5].data, s[5].bytes, &st, &err) == MILLM_OK);
		/* refused when its magnitudes are near the end of its dtype */
		if (millm_quant_bind_4bit("x.weight", &st, s[0], s[1], s[2], s[3], s[4], &w, &err) == MILLM_OK)
			dequantize(&w);
	}
	else
	{
		check(millm_quant_bind_int8("x.weight", n_out, n_in, s[0], s[1], s[2], &w, &err) == MILLM_OK);
		dequantize(&w);
	}
done:
	millm_quant_free(enc);
	free(out);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t		len = strnlen((const char *) data, size);
	char	   *text = malloc(len ? len : 1);
	MillmQuantState st;
	MillmError	err;

	const char *name = size % 2 ? "x.weight.quant_state.bitsandbytes__nf4" : "x.weight.quant_state.bitsandbytes__fp4";

	memcpy(text, data, len);
	if (millm_quant_state_read(name, text, len, &st, &err) == MILLM_OK)
	{
		char		again[MILLM_QUANT_STATE_MAX];
		MillmQuantState st2;
		size_t		n = millm_quant_state_write(&st, again, sizeof(again));

		check(n < sizeof(again));
		check(millm_quant_state_read(name, again, n, &st2, &err) == MILLM_OK);
		check(st2.n_out == st.n_out && st2.n_in == st.n_in && st2.nested == st.nested && st2.nested_offset == st.nested_offset);
		len = len < size ? len + 1 : len;
		four_bit(data + len, size - len, &st);
		int8(data + len, size - len, st.n_out, st.n_in);
	}
	else
		check(err.code != MILLM_OK && err.message[0]);
	free(text);
	encode(data, size);
	return 0;
}
