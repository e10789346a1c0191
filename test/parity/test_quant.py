"""src/quant against bitsandbytes itself, on the CPU: the same bytes, the same values back, and directories that transformers opens."""
import json
import math
import subprocess

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from conftest import ROOT, SMOLLM2
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DRIVER = ROOT / "build" / "quant_driver"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8}
NAMES = {v: k for k, v in DTYPES.items()}
STATE = ".weight.quant_state.bitsandbytes__"


def driver(*args, data=b"", ok=True):
    done = subprocess.run([DRIVER, *map(str, args)], input=data, capture_output=True, timeout=100)
    assert (done.returncode == 0) == ok, done.stderr.decode()
    return done.stdout if ok else done.stderr.decode()


def raw(t):
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor(data, dtype, shape):
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def read_parts(data):
    parts = {}
    while data:
        line, data = data.split(b"\n", 1)
        suffix, dtype, size, *shape = line.decode().split()
        parts[suffix] = tensor(data[: int(size)], DTYPES[dtype], [int(d) for d in shape])
        data = data[int(size):]
    return parts


def write_parts(parts):
    return b"".join(f"{k} {NAMES[t.dtype]} {t.numel() * t.element_size()}\n".encode() + raw(t) for k, t in parts.items())


def encode(fmt, w, step=1 << 20):
    return read_parts(driver("encode", fmt, NAMES[w.dtype], w.shape[0], w.shape[1], step, data=raw(w)))


def decode4(parts, kind="nf4"):
    n = json.loads(raw(parts[STATE + kind]))["shape"]
    return tensor(driver("decode4", "x" + STATE + kind, data=write_parts(parts)), torch.float32, n)


def theirs_4bit(w, nested=True, blocksize=64, quant_type="nf4", storage=torch.uint8):
    """(our kind of parts, their QuantState) from bitsandbytes"""
    packed, state = bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    return {".weight": packed, **{".weight." + k: v for k, v in state.as_dict(packed=True).items()}}, state


def bits(t):
    return t.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.int8}[t.element_size()])


def weight(shape, dtype, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * 0.05
    if kind == "outliers":
        w.view(-1)[::97] *= 40
    elif kind == "uniform":
        w = torch.rand(shape, generator=g) - 0.5
    elif kind == "tiny":
        w *= 1e-6 if dtype == torch.float16 else 1e-30
    elif kind == "coarse":        # many exact ratios, so many values on and beside thresholds
        w = torch.randint(-12, 13, shape, generator=g).float() / 8
        w[:, 0] = 1.5
    return w.to(dtype)


CASES = [(s, d, k) for d in ("F32", "F16", "BF16") for s, k in (
    ((96, 256), "normal"), ((64, 576), "outliers"), ((33, 61), "uniform"), ((17, 100), "coarse"), ((256, 256), "coarse"),
    ((1, 1), "normal"), ((3, 21), "normal"), ((2, 32), "normal"), ((130, 128), "tiny"), ((512, 1024), "normal"))]


@pytest.mark.parametrize("shape,dtype,kind", CASES)
def test_nf4_plain(shape, dtype, kind):
    w = weight(shape, DTYPES[dtype], kind)
    theirs, state = theirs_4bit(w, nested=False)
    data = driver("blocks", dtype, w.numel(), data=raw(w))
    half = (w.numel() + 1) // 2
    assert data[:half] == raw(theirs[".weight"])
    assert data[half:] == raw(state.absmax)


@pytest.mark.parametrize("shape,dtype,kind", CASES)
def test_nf4_nested(shape, dtype, kind):
    w = weight(shape, DTYPES[dtype], kind)
    ours = encode("nf4", w, step=4099)
    theirs, state = theirs_4bit(w)
    assert list(ours) == list(theirs)      # names, in the order of their state_dict
    for k in ours:
        assert ours[k].dtype == theirs[k].dtype, k
        if "quant_state" not in k:
            assert ours[k].shape == theirs[k].shape, k
    for k in (".weight", ".weight.quant_map", ".weight.nested_quant_map"):
        assert raw(ours[k]) == raw(theirs[k]), k
    a, b = (json.loads(raw(p[STATE + "nf4"])) for p in (ours, theirs))
    assert list(a) == list(b)
    offset, reference = a.pop("nested_offset"), b.pop("nested_offset")
    assert a == b
    assert abs(offset - reference) <= 2 * np.spacing(np.float32(reference))
    assert json.dumps({**a, "nested_offset": offset}).encode() == raw(ours[STATE + "nf4"])
    # their loader takes ours; they dequantize it to what we do, bit for bit
    q = bnb.QuantState.from_dict({k[len(".weight."):]: t for k, t in ours.items() if k != ".weight"}, device="cpu")
    assert tuple(q.shape) == shape and q.nested and q.blocksize == 64
    assert torch.equal(bits(bnb.dequantize_4bit(ours[".weight"], q)), bits(decode4(ours).to(w.dtype)))
    assert torch.equal(bits(bnb.dequantize_4bit(theirs[".weight"], state)), bits(decode4(theirs).to(w.dtype)))


def nearest(x, code):
    """The reference rule for the 8-bit codes, with numpy: nearest entry, even code on a midpoint."""
    mid = (code[:-1] + code[1:]) * np.float32(0.5)
    c = np.searchsorted(mid, x, side="left")
    at = mid[np.minimum(c, 254)] == x
    return np.where(at & (c % 2 == 1), c + 1, c).astype(np.uint8)


def table(x, code):
    """bitsandbytes' CPU rule: a table of 65,536 entries."""
    f = np.float32
    mid = (code[:-1] + code[1:]) * f(0.5)
    k = np.arange(65536).astype(f)
    lut = np.searchsorted(mid, f(-1) + (f(2) * k) / f(65535), side="left")
    t = (np.clip(x, f(-1), f(1)) + f(1)) * f(0.5)
    return lut[(t * f(65535) + f(0.5)).astype(np.int64)].astype(np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_absmax_codes(seed):
    """Given their offset: nested_absmax is theirs; codes follow the published rule and are never worse than theirs."""
    w = weight((2048, 2048), torch.bfloat16, "normal", seed)
    theirs, state = theirs_4bit(w)
    absmax = theirs_4bit(w, nested=False)[1].absmax
    offset, n = state.offset.item(), absmax.numel()
    data = driver("nest", repr(offset), data=raw(absmax))
    codes, nested = np.frombuffer(data[:n], np.uint8), np.frombuffer(data[n:], np.float32)
    assert nested.tobytes() == raw(theirs[".weight.nested_absmax"])
    map2 = theirs[".weight.nested_quant_map"].numpy()
    x = (absmax.numpy() - np.float32(offset)) * np.repeat(np.float32(1) / nested, 256)[:n]
    assert np.array_equal(codes, nearest(x, map2))
    reference = theirs[".weight.absmax"].numpy()
    assert np.array_equal(reference, table(x, map2))
    wide = x.astype(np.float64)
    assert (np.abs(wide - map2[codes]) <= np.abs(wide - map2[reference]) + 1e-7).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_decode_theirs(quant_type, nested, blocksize):
    for i, (shape, dtype) in enumerate([((64, 576), "BF16"), ((33, 61), "F16"), ((70, 130), "F32"), ((5, 4096), "BF16")]):
        w = weight(shape, DTYPES[dtype], "outliers", i)
        parts, state = theirs_4bit(w, nested, blocksize, quant_type)
        ours = decode4(parts, quant_type)
        codes = torch.stack([parts[".weight"].view(-1) >> 4, parts[".weight"].view(-1) & 15], 1).view(-1)[: w.numel()]
        scale = state.absmax
        if nested:
            scale = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: scale.numel()] + state.offset
        assert torch.equal(ours.view(-1), state.code[codes.long()] * scale.repeat_interleave(blocksize)[: w.numel()])
        # bitsandbytes 0.50.1's AVX-512 code takes a wrong scale where a block straddles rows; its portable code does not
        if shape[1] % blocksize == 0:
            assert torch.equal(bnb.dequantize_4bit(parts[".weight"], state), ours.to(w.dtype))
        portable = _dequantize_4bit_compute(parts[".weight"].view(-1), scale, state.code, blocksize, shape, w.dtype)
        assert torch.equal(portable, ours.to(w.dtype))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_decode_quant_storage(storage):
    w = weight((64, 128), torch.bfloat16, "normal")
    parts, state = theirs_4bit(w, storage=storage)
    assert torch.equal(decode4(parts).to(torch.bfloat16), decode4(theirs_4bit(w)[0]).to(torch.bfloat16))


@pytest.mark.parametrize("shape,dtype,kind", CASES)
def test_int8(shape, dtype, kind):
    w = weight(shape, DTYPES[dtype], kind)
    ours = encode("int8", w, step=997)
    q, scb, _ = bnb.int8_vectorwise_quant(w.half())
    zero_rows = scb == 0                   # theirs is NaN there, cast to int8: whatever the machine makes of it
    assert torch.equal(ours[".weight"][~zero_rows], q[~zero_rows])
    assert not ours[".weight"][zero_rows].any()
    assert torch.equal(ours[".SCB"], scb)
    assert ours[".weight_format"].shape == () and ours[".weight_format"].item() == 0
    y = tensor(driver("decode8", "x.weight", *shape, data=write_parts(ours)), torch.float32, shape)
    assert torch.equal(y, bnb.int8_vectorwise_dequant(ours[".weight"], scb))


def test_refusals():
    w = torch.tensor([[1.0, math.nan] * 64])
    assert 'tensor "driver" holds a value that is NaN or infinite' in driver("encode", "nf4", "F32", 1, 128, 9, data=raw(w), ok=False)
    w = torch.tensor([[1.0, 1e5] * 64])
    assert "does not fit into F16" in driver("encode", "int8", "F32", 1, 128, 9, data=raw(w), ok=False)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_smollm2(fmt):
    """Every Linear of real weights."""
    with safe_open(SMOLLM2 / "model.safetensors", "pt") as f:
        names = [n for n in f.keys() if n.endswith("_proj.weight")]
        assert len(names) == 30 * 7
        for n in names[:: 1 if fmt == "nf4" else 3]:
            w = f.get_tensor(n)
            if fmt == "nf4":
                theirs, state = theirs_4bit(w, nested=False)
                data = driver("blocks", NAMES[w.dtype], w.numel(), data=raw(w))
                assert data == raw(theirs[".weight"]) + raw(state.absmax), n
            else:
                q, scb, _ = bnb.int8_vectorwise_quant(w.half())
                ours = encode("int8", w)
                assert torch.equal(ours[".weight"], q) and torch.equal(ours[".SCB"], scb), n


def config_of(fmt, *skip):
    return json.loads(driver("config", fmt, "BF16", *skip))


def test_config_text():
    from transformers import BitsAndBytesConfig

    ours = config_of("nf4", "lm_head")
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"])
    assert json.dumps(ours) == json.dumps(theirs.to_dict(), sort_keys=True)
    theirs = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert json.dumps(config_of("int8", "lm_head")) == json.dumps(theirs.to_dict(), sort_keys=True)


FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "starcoder2",
            "stablelm", "gpt_neox", "falcon", "phi", "cohere", "glm4", "bloom", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_which_linears(family):
    """The tensors that we quantize are those that transformers turns into 4-bit modules when only the head is skipped."""
    import bitsandbytes.nn as bnn
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = AutoConfig.for_model(family)
    config.num_hidden_layers = 2
    config.use_qk_norm = True  # Command R+'s norms are matrices
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        names = "".join(f"{n} {p.dim()}\n" for n, p in model.named_parameters())
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        model = replace_with_bnb_linear(model, [head], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    theirs = {n + ".weight" for n, m in model.named_modules() if isinstance(m, bnn.Linear4bit)}
    ours = set(driver("linears", data=names.encode()).decode().split())
    assert len(ours) >= 8 and ours == theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_transformers_loads(fmt, tied, tmp_path):
    """A directory made of the driver's parts opens in transformers: no key missing or unexpected, the weights ours."""
    import bitsandbytes.nn as bnn
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=99, tie_word_embeddings=tied, dtype=torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "raw")
    state = load_file(tmp_path / "raw" / "model.safetensors")
    out, plain = {}, model.float()
    for name, t in state.items():
        if not name.endswith("_proj.weight"):
            out[name] = t
            continue
        x = name[: -len(".weight")]
        parts = encode(fmt, t)
        out.update({x + k: p for k, p in parts.items()})
        y = decode4(parts).to(t.dtype) if fmt == "nf4" else tensor(driver("decode8", name, *t.shape, data=write_parts(parts)), torch.float32, t.shape)
        plain.get_submodule(x).weight.data = y.float()
    made = tmp_path / "made"
    made.mkdir()
    save_file(out, made / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((tmp_path / "raw" / "config.json").read_text())
    text["quantization_config"] = config_of(fmt, "lm_head")
    (made / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True))

    loaded, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    n = 0
    for name, module in loaded.named_modules():
        if isinstance(module, bnn.Linear4bit if fmt == "nf4" else bnn.Linear8bitLt):
            n += 1
            x = out[name + ".weight"]
            assert raw(module.weight.data) == raw(x), name
            if fmt == "nf4":
                s = module.weight.quant_state
                assert s.nested and s.blocksize == 64 and tuple(s.shape) == tuple(state[name + ".weight"].shape)
            else:
                assert torch.equal(module.weight.SCB, out[name + ".SCB"])
    assert n == 2 * 7
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        a, b = loaded.eval()(ids).logits, plain.eval()(ids).logits
    # bitsandbytes computes NF4 in bf16 and rounds INT8's activations: near, not equal
    assert (a - b).abs().max() <= 0.03 * b.abs().max()
