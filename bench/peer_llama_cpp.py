#!/usr/bin/env python3
"""peer_llama_cpp.py MODEL.gguf --prompt N --gen N --threads N -- llama.cpp's own figures, by its C API, as llama-bench takes them.

Prefill from an empty cache in one batch with the last token's logits; then decode one token at a time.  Prints JSON.
"""
import argparse
import ctypes
import json
import time

import llama_cpp as L


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("--prompt", type=int, default=512)
    a.add_argument("--gen", type=int, default=64)
    a.add_argument("--threads", type=int, default=2)
    a = a.parse_args()
    L.llama_log_set(QUIET, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(a.model.encode(), L.llama_model_default_params())
    assert model, f"llama.cpp cannot load {a.model}"
    p = L.llama_context_default_params()
    p.n_ctx = a.prompt + a.gen + 64
    p.n_batch = p.n_ubatch = max(a.prompt, 32)
    p.n_threads = p.n_threads_batch = a.threads
    ctx = L.llama_init_from_model(model, p)
    n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))

    def decode(ids):
        arr = (L.llama_token * len(ids))(*ids)
        assert L.llama_decode(ctx, L.llama_batch_get_one(arr, len(ids))) == 0
        L.llama_synchronize(ctx)

    def clear():
        L.llama_memory_clear(L.llama_get_memory(ctx), True)

    ids = [(i * 7919 + 13) % n_vocab for i in range(a.prompt + a.gen)]
    decode(ids[:8])  # warm
    clear()
    start = time.perf_counter()
    decode(ids[:a.prompt])
    prefill = a.prompt / (time.perf_counter() - start)
    clear()
    decode(ids[:1])
    start = time.perf_counter()
    for i in ids[1:a.gen + 1]:
        decode([i])
    gen = a.gen / (time.perf_counter() - start)
    print(json.dumps({"prefill_tps": prefill, "decode_tps": gen, "version": L.__version__, "system": L.llama_print_system_info().decode()}))


QUIET = L.llama_log_callback(lambda level, text, data: None)
if __name__ == "__main__":
    main()
