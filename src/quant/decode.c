/*
 * decode.c -- a stranger's quantized Linear: checked against its quant_state, and turned back into float32.
 *
 * After a bind every index that millm_quant_dequantize() forms lies inside of a tensor, because each length was
 * compared with what n_out, n_in and the block sizes ask for, and every weight is finite.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "layout.h"
#include "widen.h"

static float
float_at(const void *p, int64_t i)
{
	float		f;

	memcpy(&f, (const unsigned char *) p + 4 * i, 4);
	return f;
}

/* The tensor name+suffix must be there with this dtype and length. */
static MillmCode
check_stored(const char *name, const char *suffix, MillmStored t, MillmDtype dtype, const char *dtype_name, uint64_t bytes,
			 MillmError *err)
{
	if (t.data && t.dtype == dtype && t.bytes == bytes)
		return MILLM_OK;
	millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "quantized tensor \"%.200s\" has a wrong or no \"%s\"", name, suffix);
	if (!t.data)
		millm_detail(err, "There is no tensor of that name; expected %llu bytes of %s.", (unsigned long long) bytes, dtype_name);
	else if (t.dtype != dtype)
		millm_detail(err, "Its dtype is not %s.", dtype_name);
	else
		millm_detail(err, "It has %llu bytes; expected %llu.", (unsigned long long) t.bytes, (unsigned long long) bytes);
	return MILLM_E_INVALID_MODEL_FILE;
}

static MillmCode
not_finite(const char *name, const char *suffix, MillmError *err)
{
	return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"%s\" of quantized tensor \"%.200s\" holds a value that is NaN or infinite, or makes weights that are",
					  suffix, name);
}

/* Largest magnitude of n floats; NaN or infinity when there is one. */
static float
largest(const void *p, int64_t n)
{
	uint32_t	max = max_magnitude(p, (size_t) n);
	float		f;

	memcpy(&f, &max, 4);
	return f;
}

/*
 * Up to here a scale, which is also the largest weight of its block, stays finite when it is rounded to dtype.
 * NaN is beyond it.
 */
static bool
is_beyond(float scale, MillmDtype dtype)
{
	return !(dtype == MILLM_F16 ? scale < 65520.0f : dtype == MILLM_BF16 ? scale < 0x1.ffp127f : scale <= FLT_MAX);
}

/* The codebook is built in; the file's copy must be the same but for a rounding. */
static MillmCode
check_codebook(const char *name, const float *codebook, const void *stored, MillmError *err)
{
	for (int i = 0; i < 16; i++)
	{
		float		f = float_at(stored, i);

		if (!(fabsf(f - codebook[i]) <= 1e-6f))
		{
			millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "\"quant_map\" of quantized tensor \"%.200s\" is not the codebook of its quant_type", name);
			millm_detail(err, "Entry %d is %g; expected %g.", i, (double) f, (double) codebook[i]);
			return MILLM_E_INVALID_MODEL_FILE;
		}
	}
	return MILLM_OK;
}

MillmCode
millm_quant_bind_4bit(const char *name, const MillmQuantState *state, MillmStored weight, MillmStored absmax,
					  MillmStored quant_map, MillmStored nested_absmax, MillmStored nested_map, MillmQuantWeight *out,
					  MillmError *err)
{
	int64_t		n = state->n_out * state->n_in;
	int64_t		n_blocks = (n + state->block_size - 1) / state->block_size;
	MillmQuantWeight w = {
		.format = state->format, .dtype = state->dtype, .n_out = state->n_out, .n_in = state->n_in,
		.block_size = state->block_size, .data = weight.data, .absmax = absmax.data,
	};
	MillmDtype	stored_as = weight.dtype == MILLM_F32 || weight.dtype == MILLM_F16 || weight.dtype == MILLM_BF16 ? weight.dtype : MILLM_U8;
	MillmCode	rc;

	if ((rc = check_stored(name, "weight", weight, stored_as, "U8", (uint64_t) (n + 1) / 2, err)) != MILLM_OK ||
		(rc = check_stored(name, "quant_map", quant_map, MILLM_F32, "F32", 16 * 4, err)) != MILLM_OK ||
		(rc = check_codebook(name, state->format == MILLM_QUANT_NF4 ? millm_nf4_codebook : millm_fp4_codebook,
							 quant_map.data, err)) != MILLM_OK)
		return rc;
	if (state->nested)
	{
		int64_t		n_groups = (n_blocks + state->nested_block_size - 1) / state->nested_block_size;

		if ((rc = check_stored(name, "absmax", absmax, MILLM_U8, "U8", (uint64_t) n_blocks, err)) != MILLM_OK ||
			(rc = check_stored(name, "nested_absmax", nested_absmax, MILLM_F32, "F32", (uint64_t) n_groups * 4, err)) != MILLM_OK ||
			(rc = check_stored(name, "nested_quant_map", nested_map, MILLM_F32, "F32", 256 * 4, err)) != MILLM_OK)
			return rc;
		if (is_beyond(largest(nested_map.data, 256), MILLM_F32))
			return not_finite(name, "nested_quant_map", err);
		/* the largest scale that any code could decode to */
		if (is_beyond(largest(nested_absmax.data, n_groups) * largest(nested_map.data, 256) + fabsf(state->nested_offset), state->dtype))
			return not_finite(name, "nested_absmax", err);
		w.nested_block_size = state->nested_block_size;
		w.nested_offset = state->nested_offset;
		w.nested_absmax = nested_absmax.data;
		w.nested_map = nested_map.data;
	}
	else
	{
		if (nested_absmax.data || nested_map.data)
		{
			millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "quantized tensor \"%.200s\" has nested scales that its quant_state does not mention", name);
			return MILLM_E_INVALID_MODEL_FILE;
		}
		if ((rc = check_stored(name, "absmax", absmax, MILLM_F32, "F32", (uint64_t) n_blocks * 4, err)) != MILLM_OK)
			return rc;
		if (is_beyond(largest(absmax.data, n_blocks), state->dtype))
			return not_finite(name, "absmax", err);
	}
	*out = w;
	return MILLM_OK;
}

MillmCode
millm_quant_bind_int8(const char *name, int64_t n_out, int64_t n_in, MillmStored weight, MillmStored scb,
					  MillmStored weight_format, MillmQuantWeight *out, MillmError *err)
{
	int64_t		n;
	MillmCode	rc;

	if (n_out <= 0 || n_in <= 0 || __builtin_mul_overflow(n_out, n_in, &n) || n > MILLM_QUANT_MAX_WEIGHTS)
		return millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "quantized tensor \"%.200s\" claims %lld x %lld weights", name,
						  (long long) n_out, (long long) n_in);
	if ((rc = check_stored(name, "weight", weight, MILLM_I8, "I8", (uint64_t) n, err)) != MILLM_OK ||
		(rc = check_stored(name, "SCB", scb, MILLM_F32, "F32", (uint64_t) n_out * 4, err)) != MILLM_OK)
		return rc;
	if (weight_format.data)
	{
		if ((rc = check_stored(name, "weight_format", weight_format, MILLM_U8, "U8", 1, err)) != MILLM_OK)
			return rc;
		if (*(const uint8_t *) weight_format.data != 0)
		{
			millm_fail(err, MILLM_E_UNSUPPORTED, "weight_format %d of quantized tensor \"%.200s\" is not supported",
					   *(const uint8_t *) weight_format.data, name);
			millm_detail(err, "Only 0, row-major, is.");
			return MILLM_E_UNSUPPORTED;
		}
	}
	if (!(largest(scb.data, n_out) <= FLT_MAX / 128))
		return not_finite(name, "SCB", err);
	*out = (MillmQuantWeight) {
		.format = MILLM_QUANT_INT8, .dtype = MILLM_F32, .n_out = n_out, .n_in = n_in, .data = weight.data, .absmax = scb.data,
	};
	return MILLM_OK;
}

/* The scale of a block.  Product and sum are rounded one after the other: two statements, so that none is fused. */
static float
block_scale(const MillmQuantWeight *w, int64_t block)
{
	float		scale;

	if (w->nested_block_size == 0)
		return float_at(w->absmax, block);
	scale = float_at(w->nested_map, ((const uint8_t *) w->absmax)[block]);
	scale *= float_at(w->nested_absmax, block / w->nested_block_size);
	scale += w->nested_offset;
	return scale;
}

void
millm_quant_dequantize(float *y, const MillmQuantWeight *w, int64_t first, int64_t n)
{
	const float *codebook = w->format == MILLM_QUANT_FP4 ? millm_fp4_codebook : millm_nf4_codebook;
	int64_t		unit = w->format == MILLM_QUANT_INT8 ? w->n_in : w->block_size;
	int64_t		i = first;

	while (i < first + n)
	{
		int64_t		in_unit = i / unit;
		int64_t		end = (in_unit + 1) * unit < first + n ? (in_unit + 1) * unit : first + n;

		if (w->format == MILLM_QUANT_INT8)
		{
			float		scb = float_at(w->absmax, in_unit);

			for (; i < end; i++)
			{
				float		product = (float) (int8_t) w->data[i] * scb;

				*y++ = product * 0.007874015718698502f;
			}
		}
		else
		{
			float		scale = block_scale(w, in_unit);

			for (; i < end; i++)
				*y++ = codebook[i % 2 == 0 ? w->data[i / 2] >> 4 : w->data[i / 2] & 15] * scale;
		}
	}
}
