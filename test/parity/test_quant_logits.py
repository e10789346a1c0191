"""Numbers of quantized checkpoints: float32 transformers whose every quantized Linear holds what bitsandbytes dequantizes is the judge.

That transformers' own loader sees the same weights in these directories is tested in test_load_quantized.py.
"""
import functools
import json
import pydoc_data.topics
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from conftest import ENGINE, FIXTURES, SMOLLM2, engine_logits, error, reference, reference_logits, run_engine, smollm2_ids
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

TINY = FIXTURES / "tiny-bnb"
TINY_TOLERANCE = 2e-5
# 16-bit activations and KV, as for the float models
FAST_TOLERANCE = 3e-2
TINY_MODELS = sorted(p.name for p in TINY.iterdir() if (p / "config.json").exists()) if TINY.is_dir() else []
STATE = ".weight.quant_state.bitsandbytes__"


def tensors(directory):
    return {k: t for path in sorted(directory.glob("model*.safetensors")) for k, t in load_file(path).items()}


def dequantized_4bit(beside, weight):
    """beside: what lies beside the weight, by its name behind ".weight."."""
    state = QuantState.from_dict(beside, device="cpu")
    if state.shape[1] % state.blocksize == 0:
        return dequantize_4bit(weight, state).float()
    # bitsandbytes 0.50.1's AVX-512 code takes a wrong scale where a block straddles rows; its portable code does not
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(weight.view(torch.uint8).view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype).float()


def float_state(directory):
    """The state dict in float32, quantized weights dequantized, still [out, in]; and the names of these."""
    stored, out, quantized = tensors(directory), {}, set()
    for name, t in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module + ".SCB" in stored:
            out[name] = (t.float() * stored[module + ".SCB"][:, None]) * 0.007874015718698502
            quantized.add(module)
        elif leaf == "weight" and any(name[:-len(".weight")] + STATE + kind in stored for kind in ("nf4", "fp4")):
            beside = {k[len(name) + 1:]: v for k, v in stored.items() if k.startswith(name + ".")}
            out[name] = dequantized_4bit(beside, t)
            quantized.add(module)
        elif ".weight." not in name and leaf not in ("SCB", "weight_format"):
            out[name] = t.float()
    return out, quantized


def judge(directory):
    torch.set_grad_enabled(False)
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state, quantized = float_state(directory)
    assert quantized
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) and name in quantized:
            state[name + ".weight"] = state[name + ".weight"].T
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(model._tied_weights_keys or [])
    model.tie_weights()
    return model


def some_ids(directory, n):
    rng = random.Random(1)
    config = json.loads((directory / "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    return [rng.randrange(vocab) for _ in range(n)]


def test_there_are_tiny_models():
    assert len(TINY_MODELS) >= 30, f"run test/fixture/make: {TINY} has {TINY_MODELS}"


@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_ref(model, tmp_path):
    ids = some_ids(TINY / model, 24)
    theirs = reference_logits(judge(TINY / model), ids)
    ours = engine_logits(TINY / model, ids, tmp_path)
    assert error(ours, theirs) <= TINY_TOLERANCE
    assert error(engine_logits(TINY / model, ids, tmp_path, chunk=5), theirs) <= TINY_TOLERANCE


@pytest.mark.parametrize("quantization", ["Q4", "Q8"])
@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2-sliding", "qwen3", "gemma", "gemma2", "gemma3", "gemma3-vision-5", "phi-norms", "neox", "stablelm", "olmo2", "granite", "smollm3", "starcoder2", "cohere-norms", "glm4", "opt-after", "falcon-new", "bloom-6", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_families(family, quantization, tmp_path):
    """Every family as millm-hub quantizes it."""
    made = tmp_path / "made"
    done = subprocess.run([ENGINE.parent / "millm-hub", "quantize", FIXTURES / "tiny" / family, "--output", made, "--quantization", quantization],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    model, ids = judge(made), some_ids(made, 24)
    if family.startswith("gemma"):
        # it scales the embedding by a number of the embedding's dtype, which is float32 here and bfloat16 in the file
        scale = model.config.get_text_config().hidden_size**0.5
        model.get_input_embeddings().register_forward_hook(lambda _, __, x: x * (float(torch.tensor(scale).bfloat16()) / scale))
    assert error(engine_logits(made, ids, tmp_path), reference_logits(model, ids)) <= TINY_TOLERANCE


@pytest.mark.parametrize("quantization", ["Q4", "Q8"])
@pytest.mark.parametrize("model", ["gemma3-vision", "gemma3-vision-5"])
def test_other_parts_stay(model, quantization, tmp_path):
    """A vision tower keeps 16 bits, and is in the list by which transformers knows it; the text model is quantized, its head has a screening copy."""
    made = tmp_path / "made"
    done = subprocess.run([ENGINE.parent / "millm-hub", "quantize", FIXTURES / "tiny" / model, "--output", made, "--quantization", quantization],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs, ours = tensors(FIXTURES / "tiny" / model), tensors(made)
    foreign = [n for n in theirs if "vision_tower." in n or "multi_modal_projector." in n]
    assert len(foreign) > 30 and all(torch.equal(ours[n], theirs[n].bfloat16() if theirs[n].dim() > 1 else theirs[n]) for n in foreign)
    state, quantized = float_state(made)
    assert len(quantized) == 6 * 7 and not quantized & {n.removesuffix(".weight") for n in foreign}
    assert (made / "millm_head_int8.safetensors").exists()
    skip = json.loads((made / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "vision_tower", "model.vision_tower"} <= set(skip)
    # transformers makes a plain Linear of each of its modules
    model = AutoModelForCausalLM.from_pretrained(made)
    assert {type(m).__name__ for n, m in model.named_modules() if "vision_tower" in n and "Linear" in type(m).__name__} <= {"Linear", "NonDynamicallyQuantizableLinear"}
    assert sum(type(m).__name__ in ("Linear4bit", "Linear8bitLt") for m in model.modules()) == 6 * 7


@pytest.mark.parametrize("quantization", ["Q4", "Q8", "FP16"])
@pytest.mark.parametrize("model", ["gpt_oss", "gpt_oss-mxfp4"])
def test_experts_that_are_no_linears(model, quantization, tmp_path):
    """Refused by name, or left as they are; float32 becomes bfloat16."""
    made = tmp_path / "made"
    done = subprocess.run([ENGINE.parent / "millm-hub", "quantize", FIXTURES / "tiny" / model, "--output", made, "--quantization", quantization],
                          capture_output=True, text=True, timeout=60)
    if quantization != "FP16":
        assert done.returncode != 0 and f'models of type "gpt_oss" cannot be quantized to {quantization}' in done.stderr
        assert not made.exists()
        return
    assert done.returncode == 0, done.stderr
    ids = some_ids(made, 24)
    assert error(engine_logits(made, ids, tmp_path), reference_logits(reference(made), ids)) <= TINY_TOLERANCE


def fast_kernels():
    """The variants that this CPU has."""
    flags = open("/proc/cpuinfo").read()
    return [k for k, flag in (("avx2", " avx2 "), ("avx512", " avx512_bf16 "), ("amx", " amx_bf16 ")) if flag in flags] or ["ref"]


@pytest.mark.parametrize("kernels", fast_kernels())
@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_fast(model, kernels, tmp_path):
    ids = some_ids(TINY / model, 24)
    theirs = reference_logits(judge(TINY / model), ids)
    assert error(engine_logits(TINY / model, ids, tmp_path, kernels=kernels), theirs) <= FAST_TOLERANCE
    # one token at a time, as a generation runs
    assert error(engine_logits(TINY / model, ids, tmp_path, kernels=kernels, chunk=1), theirs) <= FAST_TOLERANCE


def mutations():
    done = run_engine("logits", "--list-mutations")
    return [m for m in done.stdout.split() if m.startswith("quant_")]


def test_there_are_mutations():
    assert len(mutations()) >= 7


@pytest.mark.parametrize("field", mutations())
def test_each_field_matters(field, tmp_path):
    """Falsify one field of the quantized weights: some tiny model must change far beyond the tolerance."""
    changed = []
    for model in TINY_MODELS:
        ids = some_ids(TINY / model, 24)
        ours = engine_logits(TINY / model, ids, tmp_path, mutate=field)
        if not np.isfinite(ours).all() or error(ours, engine_logits(TINY / model, ids, tmp_path)) > 5 * TINY_TOLERANCE:
            changed.append(model)
            break
    assert changed, f"no tiny model notices {field}"


# --- real weights ------------------------------------------------------------------------------

MIN_TOP1_AGREEMENT = 0.99
MAX_MEAN_KL = 1e-3
PERPLEXITY_TOLERANCE = 0.02
KINDS = ["nf4", "int8"]


def real(kind):
    return SMOLLM2.with_name(f"{SMOLLM2.name}-{kind}")


@functools.cache
def text_ids():
    """2,000 tokens of prose, in four pieces."""
    ids = smollm2_ids("\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)[:12]))[:2000]
    return [ids[at:at + 500] for at in range(0, 2000, 500)]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def losses(lp, ids):
    return -lp[np.arange(len(ids) - 1), ids[1:]]


def perplexity(pieces):
    """Of the text, from the losses of its pieces."""
    return float(np.exp(np.concatenate(pieces).mean()))


@functools.cache
def judged(kind):
    """The judge's logits of each piece of the text."""
    model = judge(real(kind))
    return [reference_logits(model, ids) for ids in text_ids()]


@functools.cache
def measured(kind, kernels):
    """Of each position: does the best token agree, the KL divergence; and the losses of each piece."""
    agree, kl, pieces = [], [], []
    with tempfile.TemporaryDirectory() as tmp:
        for ids, theirs in zip(text_ids(), judged(kind)):
            lp, lq = log_softmax(theirs), log_softmax(engine_logits(real(kind), ids, Path(tmp), kernels=kernels))
            agree += list(lp.argmax(1) == lq.argmax(1))
            kl += list((np.exp(lp) * (lp - lq)).sum(1))
            pieces.append(losses(lq, ids))
    return agree, kl, pieces


@pytest.mark.parametrize("kernels", fast_kernels())
@pytest.mark.parametrize("kind", KINDS)
def test_smollm2(kind, kernels):
    """Teacher-forced: what the fast kernels decide."""
    agree, kl, _ = measured(kind, kernels)
    print(f"{kind} {kernels}: top-1 agreement {np.mean(agree):.4f}, mean KL {np.mean(kl):.2e} over {len(kl)} positions")
    assert len(kl) == 2000
    assert np.mean(agree) >= MIN_TOP1_AGREEMENT
    assert np.mean(kl) < MAX_MEAN_KL


@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_perplexity(kind):
    """Beside bitsandbytes' own forward, which rounds scales and activations to bfloat16, or activations to 8 bits."""
    model = AutoModelForCausalLM.from_pretrained(real(kind), device_map={"": "cpu"})
    bnb = perplexity([losses(log_softmax(model(torch.tensor([ids])).logits[0].float().numpy()), ids) for ids in text_ids()])
    judges = perplexity([losses(log_softmax(theirs), ids) for ids, theirs in zip(text_ids(), judged(kind))])
    ours = perplexity(measured(kind, fast_kernels()[-1])[2])
    print(f"{kind}: perplexity {ours:.4f}, judge {judges:.4f}, bitsandbytes {bnb:.4f}")
    assert abs(ours / judges - 1) <= PERPLEXITY_TOLERANCE / 10
    assert abs(ours / bnb - 1) <= PERPLEXITY_TOLERANCE
