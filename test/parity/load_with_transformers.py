"""load_with_transformers.py OUT DIR... -- open quantized directories with this Python's transformers and say what it made of them.

Writes OUT/N.npy, the logits of a fixed text in float32 (empty where bitsandbytes cannot compute them on a CPU), and prints a line of JSON for each directory.  A program of its own, because
transformers 4 and 5 cannot live in one process; test_load_quantized.py runs it with both.
"""
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import bitsandbytes.nn as bnn
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def raw(t):
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def differs(module, name, stored):
    """What the module holds otherwise than the file: a list of names."""
    weight, beside = module.weight, {k[len(name) + 1:]: v for k, v in stored.items() if k.startswith(name + ".")}
    if isinstance(module, bnn.Linear8bitLt):
        pairs = {"weight": weight.data, "SCB": weight.SCB}
    else:
        state = weight.quant_state
        pairs = {"weight": weight.data, "weight.absmax": state.absmax}
        text = json.loads(bytes(next(v for k, v in beside.items() if "quant_state" in k).numpy()))
        if state.nested:
            pairs |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
        said = {"shape": list(state.shape), "blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": str(state.dtype)[len("torch."):]}
        if state.nested:
            said |= {"nested_blocksize": state.state2.blocksize, "nested_offset": float(state.offset)}
        wrong = [k for k in said if said[k] != text[k]]
        if wrong:
            return wrong
    return [k for k, t in pairs.items() if not torch.equal(raw(t), raw(beside[k]))]


def main(out, directories):
    torch.set_grad_enabled(False)
    for i, directory in enumerate(map(Path, directories)):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map={"": "cpu"}, output_loading_info=True)
        stored = {k: t for path in sorted(directory.glob("model*.safetensors")) for k, t in load_file(path).items()}
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, (bnn.Linear4bit, bnn.Linear8bitLt))}
        other = [f"{n}: {differs(m, n, stored)}" for n, m in quantized.items() if differs(m, n, stored)]
        # the versions differ in what they would do with float32 asked for
        for p in model.eval().parameters():
            if p.is_floating_point() and not isinstance(p, (bnn.Params4bit, bnn.Int8Params)):
                p.data = p.data.float()
        for m in quantized.values():
            # dequantizes for each product.  In eval mode bitsandbytes 0.50.1 repacks 4-bit weights for this CPU, which fails when blocks straddle
            # the rows, and rounds the activations of INT8, so that any difference is a large one
            m.train()
        ids = torch.arange(3, 27).view(1, -1)
        # on a CPU it computes with codes stored as bytes only
        computes = not any(m.weight.is_floating_point() for m in quantized.values())
        np.save(out / f"{i}.npy", model(ids).logits[0].float().numpy() if computes else np.zeros(0))
        print(json.dumps({
            "transformers": transformers.__version__, "directory": str(directory),
            "info": {k: [str(x) for x in info[k]] for k in INFO if info.get(k)},
            "Linear4bit": sorted(n for n, m in quantized.items() if isinstance(m, bnn.Linear4bit)),
            "Linear8bitLt": sorted(n for n, m in quantized.items() if isinstance(m, bnn.Linear8bitLt)),
            "other": other,
        }), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
