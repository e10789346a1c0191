#!/usr/bin/env python3
"""peer_serving.py MODEL.gguf LOAD.json -- a load of many short generations on llama.cpp's C API.  Prints JSON.

What llama.cpp's server does with as many slots as the load has sessions (continuous batching over one context with one KV cache for all), without HTTP
and without JSON: each step has a token of every slot that generates, and then prompts, up to n_batch tokens; a slot whose answer is complete takes its
session's next prompt at once.  Greedy: the largest of all logits of a row, found by numpy.
"""
import argparse
import ctypes
import json
import time

import llama_cpp as L
import numpy as np

QUIET = L.llama_log_callback(lambda level, text, data: None)


class Slot:
    def __init__(self, number, prompts):
        self.number, self.prompts = number, iter(prompts)
        self.next()

    def next(self):
        """The session's next prompt; None as `rest` says that there is none."""
        self.rest = next(self.prompts, None)
        self.position, self.n, self.asked = 0, 0, time.perf_counter()


def main():
    a = argparse.ArgumentParser()
    a.add_argument("model")
    a.add_argument("load", type=argparse.FileType())
    a = a.parse_args()
    load = json.load(a.load)
    L.llama_log_set(QUIET, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(a.model.encode(), L.llama_model_default_params())
    assert model, f"llama.cpp cannot load {a.model}"
    longest = max(len(ids) for session in load["sessions"] for ids in session) + load["max_tokens"]
    p = L.llama_context_default_params()
    p.n_seq_max = len(load["sessions"])
    p.n_ctx = p.n_seq_max * (longest + 1)
    p.kv_unified = True
    p.n_threads = p.n_threads_batch = load["threads"]
    ctx = L.llama_init_from_model(model, p)
    memory = L.llama_get_memory(ctx)
    n_batch, n_vocab = L.llama_n_batch(ctx), L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    batch = L.llama_batch_init(n_batch, 0, 1)

    def step(slots):
        """One decode of what the slots have to say; [(slot, token)] of those whose prompt is complete."""
        rows, n = [], 0
        for slot in sorted(slots, key=lambda s: len(s.rest)):       # who generates comes first
            k = min(len(slot.rest), n_batch - n)
            for i in range(k):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = slot.rest[i], slot.position + i, 1, slot.number
                batch.logits[n] = i == len(slot.rest) - 1
                if batch.logits[n]:
                    rows.append((slot, n))
                n += 1
            slot.position += k
            slot.rest = slot.rest[k:]
        batch.n_tokens = n
        assert L.llama_decode(ctx, batch) == 0
        return [(slot, int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), (n_vocab,)).argmax())) for slot, i in rows]

    def serve(sessions):
        slots = [Slot(i, prompts) for i, prompts in enumerate(sessions)]
        first, n_tokens = [], 0
        while slots := [s for s in slots if s.rest is not None]:
            for slot, token in step(slots):
                slot.n += 1
                n_tokens += 1
                if slot.n == 1:
                    first.append(time.perf_counter() - slot.asked)
                if token in load["eos"] or slot.n == load["max_tokens"]:
                    L.llama_memory_seq_rm(memory, slot.number, -1, -1)
                    slot.next()
                else:
                    slot.rest = [token]
        return n_tokens, first

    serve([session[:1] for session in load["sessions"]])    # warm
    start = time.perf_counter()
    n_tokens, first = serve(load["sessions"])
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": n_tokens, "first_ms": [1e3 * t for t in first],
                      "version": "llama-cpp-python " + L.__version__, "system": L.llama_print_system_info().decode()}))


main()
