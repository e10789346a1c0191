#!/usr/bin/env python3
"""to_gguf.py MODEL_DIR OUT.gguf -- the same weights for the peer: a llama-shaped HuggingFace repository as BF16 GGUF.

No vocabulary goes along (the benchmarks feed token ids).  GGUF keeps q and k rows in the other rope order, so the
rows of each head are permuted: HuggingFace pairs (j, j + r/2), GGUF's llama pairs (2j, 2j + 1).
"""
import json
import sys
from pathlib import Path

import gguf
import numpy as np


def tensors(directory):
    for path in sorted(directory.glob("model*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        n = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:8 + n].tobytes())
        for name, t in header.items():
            if name == "__metadata__":
                continue
            assert t["dtype"] == "BF16", f"{name} is {t['dtype']}, not BF16"
            begin, end = t["data_offsets"]
            yield name, data[8 + n + begin:8 + n + end].view(np.uint16).reshape(t["shape"])


def permute(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def main(directory, out):
    c = json.loads((directory / "config.json").read_text())
    heads, kv = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
    w = gguf.GGUFWriter(out, "llama")
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c.get("rope_theta", 10000.0))
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    w.add_rope_dimension_count(head_dim)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, data in tensors(directory):
        if name == "model.embed_tokens.weight":
            new = "token_embd.weight"
        elif name == "model.norm.weight":
            new = "output_norm.weight"
        elif name == "lm_head.weight":
            new = "output.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            new = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        if "attn_q." in new or "attn_k." in new:
            data = permute(data, heads if "attn_q." in new else kv)
        if data.ndim == 1:  # norms are float32 there
            w.add_tensor(new, (data.astype(np.uint32) << 16).view(np.float32))
        else:
            w.add_tensor(new, np.ascontiguousarray(data).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
