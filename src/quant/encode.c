/*
 * encode.c -- the stream: bytes of a weight, cut anywhere, to a quantized Linear.
 *
 * A format consumes whole units: NF4 a block of 64 weights, INT8 a row.  Units that lie whole in a push are
 * encoded where they lie; one that is cut waits in `carry`.  The last unit of NF4 may be short.  Scales stay in
 * memory until the end, because double quantization needs their mean.
 */
#include <stdlib.h>
#include <string.h>

#include "layout.h"

struct MillmQuantEncoder
{
	MillmQuantFormat format;
	MillmDtype	dtype;
	int64_t		n_out;
	int64_t		n_in;
	char		name[256];
	uint64_t	input_bytes;	/* of the whole weight */
	uint64_t	taken;			/* of these, pushed */
	size_t		unit;			/* values in a unit */
	size_t		unit_bytes;		/* their bytes */
	uint64_t	n_units_done;
	unsigned char *carry;		/* [unit_bytes] */
	size_t		n_carried;
	float	   *scales;			/* [blocks or rows] absmax, SCB */
	float	   *half;			/* [n_in], INT8 */
	uint8_t    *absmax_codes;	/* [blocks], NF4, as what follows */
	float	   *nested_absmax;
	float		nested_map[256];
	char		state_text[MILLM_QUANT_STATE_MAX];
	int			n_parts;
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
};

MillmCode
millm_quant_begin(MillmQuantFormat format, const char *name, MillmDtype dtype, int64_t n_out, int64_t n_in,
				  MillmQuantEncoder **out, MillmError *err)
{
	MillmQuantPart parts[MILLM_QUANT_MAX_PARTS];
	MillmQuantEncoder *enc;
	int			n_parts;
	uint64_t	n_scales;
	MillmCode	rc = millm_quant_layout(format, dtype, n_out, n_in, parts, &n_parts, err);

	if (rc != MILLM_OK)
	{
		if (err && err->detail[0] == '\0')
			millm_detail(err, "The tensor is \"%.200s\".", name);
		return rc;
	}
	if (!(enc = calloc(1, sizeof(*enc))))
		goto no_memory;
	enc->format = format;
	enc->dtype = dtype;
	enc->n_out = n_out;
	enc->n_in = n_in;
	enc->n_parts = n_parts;
	memcpy(enc->parts, parts, sizeof(parts));
	strncpy(enc->name, name, sizeof(enc->name) - 1);
	enc->unit = format == MILLM_QUANT_NF4 ? MILLM_NF4_BLOCK : (size_t) n_in;
	enc->unit_bytes = enc->unit * (dtype == MILLM_F32 ? 4 : 2);
	enc->input_bytes = (uint64_t) (n_out * n_in) * (dtype == MILLM_F32 ? 4 : 2);
	n_scales = format == MILLM_QUANT_NF4 ? (uint64_t) parts[MILLM_PART_ABSMAX].shape[0] : (uint64_t) n_out;
	enc->carry = malloc(enc->unit_bytes);
	enc->scales = malloc(n_scales * sizeof(float));
	if (!enc->carry || !enc->scales)
		goto no_memory;
	if (format == MILLM_QUANT_INT8 && !(enc->half = malloc((size_t) n_in * sizeof(float))))
		goto no_memory;
	if (format == MILLM_QUANT_NF4)
	{
		enc->absmax_codes = malloc(n_scales);
		enc->nested_absmax = malloc(parts[MILLM_PART_NESTED_ABSMAX].bytes);
		if (!enc->absmax_codes || !enc->nested_absmax)
			goto no_memory;
	}
	*out = enc;
	return MILLM_OK;

no_memory:
	millm_quant_free(enc);
	return millm_fail(err, MILLM_E_INSUFFICIENT_MEMORY, "out of memory while quantizing \"%.200s\"", name);
}

void
millm_quant_free(MillmQuantEncoder *enc)
{
	if (!enc)
		return;
	free(enc->carry);
	free(enc->scales);
	free(enc->half);
	free(enc->absmax_codes);
	free(enc->nested_absmax);
	free(enc);
}

/* Bytes of quantized weight that the first n_bytes of the raw one become. */
static uint64_t
written_after(const MillmQuantEncoder *enc, uint64_t n_bytes)
{
	uint64_t	n_values = n_bytes / enc->unit_bytes * enc->unit;

	if (n_bytes >= enc->input_bytes)
		return enc->parts[MILLM_PART_WEIGHT].bytes;
	return enc->format == MILLM_QUANT_NF4 ? n_values / 2 : n_values;
}

size_t
millm_quant_push_writes(const MillmQuantEncoder *enc, size_t n_bytes)
{
	uint64_t	left = enc->input_bytes - enc->taken;

	return (size_t) (written_after(enc, enc->taken + (n_bytes < left ? n_bytes : left)) - written_after(enc, enc->taken));
}

/* Encode n_values from a unit's start at values: whole units, and only at the end of the weight a short one. */
static MillmCode
encode(MillmQuantEncoder *enc, unsigned char **out, const unsigned char *values, size_t n_values, MillmError *err)
{
	MillmInt8Result result = MILLM_INT8_OK;
	float	   *scales = enc->scales + enc->n_units_done;

	if (enc->format == MILLM_QUANT_NF4)
	{
		if (!millm_nf4_encode(*out, scales, values, enc->dtype, n_values))
			result = MILLM_INT8_NOT_FINITE;
		*out += (n_values + 1) / 2;
	}
	else
	{
		result = millm_int8_encode((int8_t *) *out, scales, enc->half, values, enc->dtype, n_values / enc->unit, enc->unit);
		*out += n_values;
	}
	enc->n_units_done += (n_values + enc->unit - 1) / enc->unit;
	if (result == MILLM_INT8_OK)
		return MILLM_OK;
	if (result == MILLM_INT8_OVERFLOW)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "cannot quantize tensor \"%s\" to INT8: a value does not fit into F16", enc->name);
		millm_detail(err, "INT8 is made from 16-bit floats, whose largest magnitude is 65504.");
		millm_hint(err, "Use Q4 or FP16.");
	}
	else
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" holds a value that is NaN or infinite", enc->name);
	return MILLM_E_INVALID_MODEL_FILE;
}

MillmCode
millm_quant_push(MillmQuantEncoder *enc, const void *bytes, size_t n_bytes, void *out, MillmError *err)
{
	const unsigned char *in = bytes;
	unsigned char *to = out;
	size_t		value_bytes = enc->unit_bytes / enc->unit;
	size_t		direct;
	MillmCode	rc;

	if (n_bytes > enc->input_bytes - enc->taken)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" is longer than its shape", enc->name);
		millm_detail(err, "Its %lld x %lld weights have %llu bytes.", (long long) enc->n_out, (long long) enc->n_in,
					 (unsigned long long) enc->input_bytes);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	enc->taken += n_bytes;
	if (enc->n_carried > 0)
	{
		size_t		wanted = enc->unit_bytes - enc->n_carried;
		size_t		n = n_bytes < wanted ? n_bytes : wanted;

		memcpy(enc->carry + enc->n_carried, in, n);
		enc->n_carried += n;
		in += n;
		n_bytes -= n;
		if (enc->n_carried == enc->unit_bytes)
		{
			if ((rc = encode(enc, &to, enc->carry, enc->unit, err)) != MILLM_OK)
				return rc;
			enc->n_carried = 0;
		}
	}
	direct = n_bytes / enc->unit_bytes * enc->unit_bytes;
	if (direct > 0)
	{
		if ((rc = encode(enc, &to, in, direct / value_bytes, err)) != MILLM_OK)
			return rc;
		in += direct;
		n_bytes -= direct;
	}
	if (n_bytes > 0)
	{
		memcpy(enc->carry, in, n_bytes);
		enc->n_carried = n_bytes;
	}
	if (enc->taken < enc->input_bytes || enc->n_carried == 0)
		return MILLM_OK;
	rc = encode(enc, &to, enc->carry, enc->n_carried / value_bytes, err);
	enc->n_carried = 0;
	return rc;
}

MillmCode
millm_quant_finish(MillmQuantEncoder *enc, const MillmQuantPart **parts, int *n_parts, MillmError *err)
{
	static const uint8_t row_major = 0;

	if (enc->taken < enc->input_bytes)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "tensor \"%s\" is shorter than its shape", enc->name);
		millm_detail(err, "Its %lld x %lld weights have %llu bytes; %llu came.", (long long) enc->n_out, (long long) enc->n_in,
					 (unsigned long long) enc->input_bytes, (unsigned long long) enc->taken);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	if (enc->format == MILLM_QUANT_NF4)
	{
		MillmQuantPart *state_part = &enc->parts[MILLM_PART_STATE];
		MillmQuantState state = {
			.format = MILLM_QUANT_NF4, .dtype = enc->dtype, .n_out = enc->n_out, .n_in = enc->n_in,
			.block_size = MILLM_NF4_BLOCK, .nested = true, .nested_block_size = MILLM_NF4_NESTED_BLOCK,
			.nested_offset = millm_absmax_offset(enc->scales, enc->n_units_done),
		};

		millm_absmax_encode(enc->absmax_codes, enc->nested_absmax, enc->scales, enc->n_units_done, state.nested_offset);
		millm_dynamic_map(enc->nested_map);
		enc->parts[MILLM_PART_ABSMAX].data = enc->absmax_codes;
		enc->parts[MILLM_PART_QUANT_MAP].data = millm_nf4_codebook;
		enc->parts[MILLM_PART_NESTED_ABSMAX].data = enc->nested_absmax;
		enc->parts[MILLM_PART_NESTED_MAP].data = enc->nested_map;
		state_part->data = enc->state_text;
		state_part->bytes = millm_quant_state_write(&state, enc->state_text, sizeof(enc->state_text));
		state_part->shape[0] = (int64_t) state_part->bytes;
	}
	else
	{
		enc->parts[MILLM_PART_SCB].data = enc->scales;
		enc->parts[MILLM_PART_WEIGHT_FORMAT].data = &row_major;
	}
	*parts = enc->parts;
	*n_parts = enc->n_parts;
	return MILLM_OK;
}
