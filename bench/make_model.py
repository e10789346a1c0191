#!/usr/bin/env python3
"""make_model.py SHAPE OUT -- a llama-shaped model with the sizes of a well-known one and random bfloat16 weights.

What it says makes no sense; what it costs is what the real one costs: speed does not depend on the values.  Families that millm does
not know yet stand here with their sizes alone (no biases, no norms of their own).  It is written at the disk's speed.
"""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

# hidden, FFN, layers, heads, KV heads, head_dim, vocabulary, tied
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "gemma-2-2b": (2304, 9216, 26, 8, 4, 256, 256000, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "tiny": (64, 192, 2, 4, 2, 16, 512, True),  # nobody's: tries a benchmark out
    "1GB": (2048, 8192, 8, 32, 8, 64, 16000, True),  # nobody's: 487 M parameters in Linears, 33 M in the embedding
}
POOL = 1 << 24


def tensors(shape):
    hidden, ffn, layers, heads, kv, dim, vocab, tied = shape
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        yield p + "post_attention_layernorm.weight", (hidden,)
        for name, size in (("self_attn.q_proj", (heads * dim, hidden)), ("self_attn.k_proj", (kv * dim, hidden)), ("self_attn.v_proj", (kv * dim, hidden)),
                           ("self_attn.o_proj", (hidden, heads * dim)), ("mlp.gate_proj", (ffn, hidden)), ("mlp.up_proj", (ffn, hidden)),
                           ("mlp.down_proj", (hidden, ffn))):
            yield f"{p}{name}.weight", size
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def bytes_tokenizer():
    """One token a byte: enough for a directory that is a whole model."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": []}}


def main(name, out):
    if name not in SHAPES:
        sys.exit(f"make_model.py: there is no shape \"{name}\"; there are {', '.join(SHAPES)}")
    hidden, ffn, layers, heads, kv, dim, vocab, tied = SHAPES[name]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for t, size in tensors(SHAPES[name]):
        n = 2 * int(np.prod(size))
        header[t] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + n]}
        at += n
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    if shutil.disk_usage(tmp).free < at + (1 << 30):
        sys.exit(f"make_model.py: {at / 1e9:.1f} GB do not fit into {out.parent}")
    drawn = (np.random.default_rng(1).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)).view(np.uint32)
    pool = ((drawn + 0x7FFF + (drawn >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(tmp / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t, size in tensors(SHAPES[name]):
            n = 2 * int(np.prod(size))
            if len(size) == 1:
                f.write(b"\x80\x3f" * (n // 2))  # a norm of ones
                continue
            start = sum(t.encode()) * 131 % (len(pool) // 2) * 2  # each tensor begins elsewhere in the pool
            while n > 0:
                piece = pool[start:start + n]
                f.write(piece)
                n, start = n - len(piece), 0
    (tmp / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": dim, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 131072, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "use_cache": True}, indent=1) + "\n")
    (tmp / "tokenizer.json").write_text(json.dumps(bytes_tokenizer()))
    shutil.rmtree(out, ignore_errors=True)
    os.rename(tmp, out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
