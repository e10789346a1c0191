/*
 * fuzz_tokenizer.c -- no tokenizer.json, no text and no ids may do more than fail by name.
 *
 * The input is a text, a zero byte, and a tokenizer.json.  What loads must encode the text, give back the ids
 * it made, and stream them to the same bytes as it decodes them, but for a broken run of byte tokens.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"

int			LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const uint8_t *end = memchr(data, 0, size);
	const char *text = (const char *) data;
	size_t		text_n = end ? (size_t) (end - data) : 0;
	MillmTokenizer *tok;
	MillmIds	ids = {0};
	MillmDetok *detok;
	MillmError	err;
	char	   *decoded;
	size_t		decoded_n;
	size_t		streamed_n = 0;
	size_t		n;

	if (!end || size > 65536 ||
		millm_tokenizer_parse((const char *) end + 1, size - text_n - 1, NULL, 0, &tok, &err) != MILLM_OK)
		return 0;
	if (millm_encode(tok, text, text_n, (MillmEncodeOptions) {.add_special = true, .parse_special = text_n % 2}, 0, &ids, &err) == MILLM_OK)
	{
		if (millm_decode(tok, ids.ids, ids.n, true, &decoded, &decoded_n, &err) != MILLM_OK)
			abort();
		detok = millm_detok_create(tok);
		for (size_t i = 0; detok && i < ids.n; i++)
		{
			(void) millm_detok_push(detok, ids.ids[i], &n);
			streamed_n += n;
		}
		if (detok)
		{
			(void) millm_detok_flush(detok, &n);
			if (tok->decoders[0].kind == DECODE_BYTE_LEVEL && tok->n_decoders == 1 && streamed_n + n != decoded_n)
				abort();
		}
		millm_detok_free(detok);
		free(decoded);
	}
	millm_ids_free(&ids);
	millm_tokenizer_close(tok);
	return 0;
}
