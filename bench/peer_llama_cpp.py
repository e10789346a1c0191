#!/usr/bin/env python3
"""peer_llama_cpp.py MODEL.gguf ... -- llama.cpp's own figures, by its C API, as llama-bench takes them.  Prints JSON.

Prefill from an empty cache in one batch with the last token's logits; then decoding from an empty cache, one token of each sequence
at a time, every row with its logits.  With --quantize FORMAT OUT it makes the quantized model instead ("pure": every matrix, the head too).
"""
import argparse
import ctypes
import json
import time

import llama_cpp as L


def decode(ctx, batch, tokens):
    """tokens: (id, position, sequence, wants logits) each"""
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence, wants) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, position, 1, sequence, wants
    assert L.llama_decode(ctx, batch) == 0
    L.llama_synchronize(ctx)


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("--quantize", nargs=2, metavar=("FORMAT", "OUT"))
    a.add_argument("--prompt", type=int, default=512)
    a.add_argument("--gen", type=int, default=64)
    a.add_argument("--sequences", type=int, default=1)
    a.add_argument("--context", type=int, default=0, help="tokens that each sequence has before it decodes")
    a.add_argument("--gpu-layers", type=int, default=0)
    a.add_argument("--threads", type=int, default=2)
    a = a.parse_args()
    L.llama_log_set(QUIET, ctypes.c_void_p(0))
    L.llama_backend_init()
    if a.quantize:
        p = L.llama_model_quantize_default_params()
        p.ftype, p.pure, p.nthread = getattr(L, "LLAMA_FTYPE_MOSTLY_" + a.quantize[0]), True, a.threads
        assert L.llama_model_quantize(a.model.encode(), a.quantize[1].encode(), ctypes.byref(p)) == 0
        return
    start = time.perf_counter()
    m = L.llama_model_default_params()
    m.n_gpu_layers = a.gpu_layers
    model = L.llama_model_load_from_file(a.model.encode(), m)
    load_s = time.perf_counter() - start
    assert model, f"llama.cpp cannot load {a.model}"
    p = L.llama_context_default_params()
    p.n_seq_max = a.sequences
    p.n_ctx = max(a.prompt, (a.context + a.gen + 2) * a.sequences) + 64
    p.kv_unified = True
    p.n_batch = p.n_ubatch = max(a.prompt, a.context, a.sequences, 32)
    p.n_threads = p.n_threads_batch = a.threads
    ctx = L.llama_init_from_model(model, p)
    n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    batch = L.llama_batch_init(p.n_batch, 0, 1)

    def ids(i):
        return (i * 7919 + 13) % n_vocab

    def fill(sequence, n, wants):
        decode(ctx, batch, [(ids(i), i, sequence, wants and i == n - 1) for i in range(n)])

    def prompt(n):
        L.llama_memory_clear(L.llama_get_memory(ctx), True)
        fill(0, n, True)

    def generate(first, n):
        for at in range(first, first + n):
            decode(ctx, batch, [(ids(at + 7 * s), at, s, True) for s in range(a.sequences)])

    prompt(a.prompt if a.gpu_layers else min(a.prompt, 16))  # warm: a GPU's kernels are loaded when they are first used
    start = time.perf_counter()
    prompt(a.prompt)
    prefill_s = time.perf_counter() - start
    L.llama_memory_clear(L.llama_get_memory(ctx), True)
    for s in range(a.sequences if a.context else 0):
        fill(s, a.context, False)
    generate(a.context, 1)
    start = time.perf_counter()
    generate(a.context + 1, a.gen)
    decode_s = time.perf_counter() - start
    print(json.dumps({"prefill_tps": a.prompt / prefill_s, "decode_tps": a.gen * a.sequences / decode_s, "load_s": load_s,
                      "model_bytes": L.llama_model_size(model), "version": L.__version__, "system": L.llama_print_system_info().decode()}))


QUIET = L.llama_log_callback(lambda level, text, data: None)
if __name__ == "__main__":
    main()
