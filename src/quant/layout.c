/*
 * layout.c -- which tensors a quantized Linear is stored as, and what config.json says about it.
 *
 * Names, dtypes, shapes and keys are those that bitsandbytes' modules save and transformers' loader asks for.
 */
#include <jansson.h>
#include <string.h>

#include "layout.h"

static MillmQuantPart
part(const char *suffix, MillmDtype dtype, int n_dims, int64_t rows, int64_t columns)
{
	uint64_t	size = dtype == MILLM_F32 ? 4 : 1;

	for (int i = 0; i < n_dims; i++)
		size *= (uint64_t) (i == 0 ? rows : columns);
	return (MillmQuantPart) {.suffix = suffix, .dtype = dtype, .n_dims = n_dims, .shape = {rows, columns}, .bytes = size};
}

MillmCode
millm_quant_layout(MillmQuantFormat format, MillmDtype dtype, int64_t n_out, int64_t n_in,
				   MillmQuantPart parts[MILLM_QUANT_MAX_PARTS], int *n_parts, MillmError *err)
{
	int64_t		n, n_blocks;

	if (dtype != MILLM_F32 && dtype != MILLM_F16 && dtype != MILLM_BF16)
		return millm_fail(err, MILLM_E_UNSUPPORTED, "cannot quantize a tensor whose dtype is not F32, F16 or BF16");
	if (n_out <= 0 || n_in <= 0 || __builtin_mul_overflow(n_out, n_in, &n) || n > MILLM_QUANT_MAX_WEIGHTS)
	{
		millm_fail(err, MILLM_E_INVALID_MODEL_FILE, "cannot quantize a tensor of %lld x %lld weights",
				   (long long) n_out, (long long) n_in);
		millm_detail(err, "Both must be positive, and their product at most %lld.", (long long) MILLM_QUANT_MAX_WEIGHTS);
		return MILLM_E_INVALID_MODEL_FILE;
	}
	switch (format)
	{
		case MILLM_QUANT_NF4:
			n_blocks = (n + MILLM_NF4_BLOCK - 1) / MILLM_NF4_BLOCK;
			parts[MILLM_PART_WEIGHT] = part(".weight", MILLM_U8, 2, (n + 1) / 2, 1);
			parts[MILLM_PART_ABSMAX] = part(".weight.absmax", MILLM_U8, 1, n_blocks, 0);
			parts[MILLM_PART_QUANT_MAP] = part(".weight.quant_map", MILLM_F32, 1, 16, 0);
			parts[MILLM_PART_NESTED_ABSMAX] = part(".weight.nested_absmax", MILLM_F32, 1,
				(n_blocks + MILLM_NF4_NESTED_BLOCK - 1) / MILLM_NF4_NESTED_BLOCK, 0);
			parts[MILLM_PART_NESTED_MAP] = part(".weight.nested_quant_map", MILLM_F32, 1, 256, 0);
			parts[MILLM_PART_STATE] = part(".weight.quant_state.bitsandbytes__nf4", MILLM_U8, 1, MILLM_QUANT_STATE_MAX, 0);
			*n_parts = 6;
			return MILLM_OK;
		case MILLM_QUANT_INT8:
			parts[MILLM_PART_WEIGHT] = part(".weight", MILLM_I8, 2, n_out, n_in);
			parts[MILLM_PART_SCB] = part(".SCB", MILLM_F32, 1, n_out, 0);
			parts[MILLM_PART_WEIGHT_FORMAT] = part(".weight_format", MILLM_U8, 0, 0, 0);
			*n_parts = 3;
			return MILLM_OK;
		case MILLM_QUANT_FP4:
			break;
	}
	return millm_fail(err, MILLM_E_UNSUPPORTED, "cannot quantize to FP4");
}

const char *const *
millm_quant_routers(void)
{
	static const char *const names[MILLM_QUANT_N_ROUTERS + 1] = {"gate", "shared_expert_gate", NULL};

	return names;
}

static bool
is_weight(const char *tensor)
{
	static const char weight[] = ".weight";
	size_t		len = strlen(tensor);

	return len >= sizeof(weight) && strcmp(tensor + len - (sizeof(weight) - 1), weight) == 0;
}

bool
millm_quant_is_router(const char *tensor)
{
	const char *dot = strrchr(tensor, '.');

	for (const char *const *router = millm_quant_routers(); *router && is_weight(tensor); router++)
	{
		size_t		n = strlen(*router);

		if (dot - tensor > (ptrdiff_t) n && memcmp(dot - n, *router, n) == 0 && dot[-1 - (ptrdiff_t) n] == '.')
			return true;
	}
	return false;
}

bool
millm_quant_is_quantized(const char *tensor, int n_dims)
{
	if (n_dims != 2 || !is_weight(tensor) || strstr(tensor, "_norm.weight") || millm_quant_is_router(tensor))
		return false;
	for (const char *dot = strchr(tensor, '.'); dot; dot = strchr(dot + 1, '.'))
	{
		size_t		digits = strspn(dot + 1, "0123456789");

		if (digits > 0 && dot[1 + digits] == '.')
			return true;
	}
	return false;
}

static const char *
torch_name(MillmDtype dtype)
{
	return dtype == MILLM_F32 ? "float32" : dtype == MILLM_F16 ? "float16" : "bfloat16";
}

json_t *
millm_quant_config_json(MillmQuantFormat format, MillmDtype compute, const char *const *skip, int n_skip)
{
	bool		is_nf4 = format == MILLM_QUANT_NF4;
	json_t	   *names = json_array();

	for (int i = 0; i < n_skip; i++)
		if (json_array_append_new(names, json_string(skip[i])) != 0)
		{
			json_decref(names);
			return NULL;
		}
	/* Every key of transformers' BitsAndBytesConfig: what does not concern INT8 has the class's defaults. */
	return json_pack("{sb sb sb sb ss ss ss sb sb sb so sf ss}",
					 "_load_in_4bit", is_nf4, "_load_in_8bit", !is_nf4,
					 "load_in_4bit", is_nf4, "load_in_8bit", !is_nf4,
					 "bnb_4bit_compute_dtype", is_nf4 ? torch_name(compute) : "float32",
					 "bnb_4bit_quant_storage", "uint8",
					 "bnb_4bit_quant_type", is_nf4 ? "nf4" : "fp4",
					 "bnb_4bit_use_double_quant", is_nf4,
					 "llm_int8_enable_fp32_cpu_offload", false,
					 "llm_int8_has_fp16_weight", false,
					 "llm_int8_skip_modules", names,
					 "llm_int8_threshold", 6.0,
					 "quant_method", "bitsandbytes");
}
