/*
 * openapi.S -- openapi.json, as bytes of the program.
 */
	.section .rodata
	.globl openapi_json, openapi_json_end
openapi_json:
	.incbin "src/bridge/openapi.json"
openapi_json_end:
	.section .note.GNU-stack, "", %progbits
