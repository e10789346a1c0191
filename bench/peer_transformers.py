#!/usr/bin/env python3
"""peer_transformers.py MODEL ... -- transformers' own figures: prefill, and decoding by generate(), or by generate_batch() with --how batching.

One line of JSON a measure, as soon as there is one.  Prefill: one prompt from an empty cache, logits of the last token.  Decoding: what more tokens take
beyond the first, of prompts of --context tokens each.  bnb-nf4 (nested) and bnb-int8 are quantized by bitsandbytes as the model is loaded.
"""
import argparse
import json
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device, function, *args):
    synchronize(device)
    start = time.perf_counter()
    function(*args)
    synchronize(device)
    return time.perf_counter() - start


def load(a):
    how = {"bf16": {}, "batching": {"attn_implementation": "sdpa"},
           "bnb-nf4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                                 bnb_4bit_compute_dtype=torch.bfloat16)},
           "bnb-int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}}[a.how]
    return AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16, device_map={"": a.device}, **how).eval()


def prompts(vocab, sequences, length):
    return torch.randint(0, vocab, (sequences, length), generator=torch.Generator().manual_seed(1))


def generation(n):
    return GenerationConfig(max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)


def prefill(a, model, n):
    ids = prompts(model.config.vocab_size, 1, n).to(a.device)

    def once():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    once()
    s = statistics.median(timed(a.device, once) for _ in range(a.rounds))
    return {"what": "prefill", "prompt": n, "tps": n / s, "ms": 1e3 * s}


def decode(a, model, sequences, context):
    ids = prompts(model.config.vocab_size, sequences, max(context, 1)).to(a.device)
    mask = torch.ones_like(ids)

    def once(n):
        assert model.generate(input_ids=ids, attention_mask=mask, generation_config=generation(n)).shape[1] == ids.shape[1] + n

    once(2)
    s = statistics.median(timed(a.device, once, a.gen + 1) for _ in range(a.rounds)) - statistics.median(timed(a.device, once, 1) for _ in range(a.rounds))
    assert s > 0, f"{a.gen} tokens are too few to be measured"
    return {"what": "decode", "sequences": sequences, "context": context, "tps": a.gen * sequences / s, "ms": 1e3 * s / a.gen}


def batching(a, model, sequences, context):
    """Tokens a second while all sequences were generating: from the last first token to the first last one."""
    ids = prompts(model.config.vocab_size, sequences, max(context, 1)).tolist()
    out = model.generate_batch(ids, generation_config=generation(a.gen + 1), record_timestamps=True)
    assert len(out) == sequences and all(len(o.generated_tokens) == a.gen + 1 for o in out.values()), [o.error for o in out.values()]
    times = [o.timestamps for o in out.values()]
    start, end = max(t[0] for t in times), min(t[-1] for t in times)
    n = sum(start < at <= end for t in times for at in t)
    assert n >= a.gen, f"only {n} tokens were made while all sequences were generating"
    return {"what": "decode", "sequences": sequences, "context": context, "tps": n / (end - start), "ms": 1e3 * (end - start) * sequences / n}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--how", choices=["bf16", "bnb-nf4", "bnb-int8", "batching"], default="bf16")
    p.add_argument("--device", default="cuda")
    p.add_argument("--prompt", type=int, action="append", default=[], help="tokens; may be given several times")
    p.add_argument("--decode", action="append", default=[], type=lambda s: tuple(map(int, s.split(":"))), help="SEQUENCES:CONTEXT, the same")
    p.add_argument("--gen", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    torch.manual_seed(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if a.how.startswith("bnb"):
        import bitsandbytes

        versions["bitsandbytes"] = bitsandbytes.__version__
    with torch.no_grad():  # generate_batch() has a thread of its own that writes what inference mode would forbid
        start = time.perf_counter()
        model = load(a)
        print(json.dumps({"what": "load", "ms": 1e3 * (time.perf_counter() - start), "memory_bytes": model.get_memory_footprint(), **versions}), flush=True)
        for n in a.prompt:
            print(json.dumps(prefill(a, model, n)), flush=True)
        for sequences, context in a.decode:
            print(json.dumps((batching if a.how == "batching" else decode)(a, model, sequences, context)), flush=True)


if __name__ == "__main__":
    main()
