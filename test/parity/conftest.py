"""What the comparisons with the genuine libraries share: where things are, and how to ask our engine for numbers."""
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path(os.environ.get("MILLM_ENGINE") or ROOT / "build" / "millm-engine").resolve()
FIXTURES = ROOT / ".fixtures"
SMOLLM2 = FIXTURES / "SmolLM2-135M-Instruct"
TINY = FIXTURES / "tiny"


def run_engine(*args, kernels=None, timeout=300):
    """Run millm-engine; returns the finished process, output as text."""
    env = dict(os.environ)
    env.pop("MILLM_KERNELS", None)
    if kernels:
        env["MILLM_KERNELS"] = kernels
    return subprocess.run([ENGINE, *map(str, args)], env=env, capture_output=True, text=True, timeout=timeout)


def engine_logits(model, ids, tmp_path, kernels="ref", mutate=None, chunk=None, kv_cache_dtype="auto"):
    """Logits of every position, [len(ids), vocab] float32, or None when a mutated model was refused."""
    out = tmp_path / "logits.f32"
    ids_file = tmp_path / "ids.txt"
    ids_file.write_text(",".join(map(str, ids)))
    args = ["logits", model, "--ids", ids_file, "--output", out, "--kv-cache-dtype", kv_cache_dtype]
    if mutate:
        args += ["--mutate", mutate]
    if chunk:
        args += ["--chunk", chunk]
    done = run_engine(*args, kernels=kernels)
    if done.returncode != 0 and mutate:
        return None
    assert done.returncode == 0, done.stderr
    return np.fromfile(out, dtype=np.float32).reshape(len(ids), -1)


def reference(model):
    """The genuine model in float32 with eager attention (the only one that honours every flag, but it adds Falcon's ALiBi twice)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_grad_enabled(False)
    attention = "sdpa" if getattr(AutoConfig.from_pretrained(model), "alibi", False) else "eager"
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention).eval().float()  # it unpacks MXFP4 to bfloat16, exactly


def reference_logits(model, ids):
    import torch

    return model(torch.tensor([ids])).logits[0].numpy()


def smollm2_ids(text):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json")).encode(text).ids


def error(ours, theirs):
    """The measure of issue A: max |a-b| / max(1, max|b|)."""
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.fixture(scope="session")
def smollm2():
    return reference(SMOLLM2)
