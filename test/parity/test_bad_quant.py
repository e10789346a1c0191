"""Damaged copies of tiny quantized models (issue B, "Bad input"): a named error with figures, exit status 1, and no crash.

MILLM_ENGINE=build/san/millm-engine runs it under sanitizers.
"""
import json
import math
import shutil

import pytest
import torch
from conftest import FIXTURES, run_engine
from safetensors.torch import load_file, save_file
from test_bad_models import edit_config, refused

TINY = FIXTURES / "tiny-bnb"
X = "model.layers.2.mlp.down_proj"      # [64, 172]: blocks straddle the rows
W = X + ".weight"
STATE = W + ".quant_state.bitsandbytes__nf4"
INVALID, UNSUPPORTED = "INVALID_MODEL_FILE", "UNSUPPORTED"
NAN, INF = math.nan, math.inf


@pytest.fixture
def copy(tmp_path):
    """copy(name): the model, for a test to damage."""
    def of(name):
        return shutil.copytree(TINY / name, tmp_path / "model")
    return of


def edit(model, **changes):
    """Change tensors of model.safetensors; each change is a function of the tensor, or None to take it away."""
    path = model / "model.safetensors"
    stored = load_file(path)
    for name, change in changes.items():
        if change is None:
            del stored[name]
        else:
            stored[name] = change(stored.get(name)).contiguous()
    save_file(stored, path, metadata={"format": "pt"})


def as_text(value):
    return torch.tensor(list(value if isinstance(value, bytes) else json.dumps(value).encode()), dtype=torch.uint8)


def edit_state(model, state=STATE, **changes):
    """Change keys of a quant_state; ... takes one away."""
    def change(t):
        value = json.loads(bytes(t.numpy())) | changes
        return as_text({k: v for k, v in value.items() if v is not ...})
    edit(model, **{state: change})


def at(index, value):
    def change(t):
        t = t.clone()
        t.view(-1)[index] = value
        return t
    return change


def constant(t):
    return lambda _: t


# --- each tensor -------------------------------------------------------------------------------


PARTS = {
    "nf4": [".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", STATE[len(X):]],
    "nf4-plain": [".weight", ".weight.absmax", ".weight.quant_map", STATE[len(X):]],
    "int8": [".weight", ".SCB"],        # weight_format may be absent
}
EACH = [(model, part) for model, parts in PARTS.items() for part in parts]


@pytest.mark.parametrize("name", PARTS)
def test_the_copy_is_good(name, copy):
    model = copy(name)
    edit(model)
    for args in (["inspect", model], ["generate", model, "Hello", "--max-tokens", "4"]):
        done = run_engine(*args)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name,part", EACH)
def test_missing(name, part, copy):
    model = copy(name)
    edit(model, **{X + part: None})
    refused(model, INVALID, X, part.rpartition(".")[2] if "quant_state" not in part else "quant_state")


@pytest.mark.parametrize("name,part", EACH + [("int8", ".weight_format")])
@pytest.mark.parametrize("how", ["one more", "one less", "empty", "twice"])
def test_wrong_length(name, part, how, copy):
    model = copy(name)

    def change(t):
        flat = t.reshape(-1)
        flat = {"one more": torch.cat([flat, flat[:1]]), "one less": flat[:-1], "empty": flat[:0], "twice": torch.cat([flat, flat])}[how]
        return flat.reshape(-1, *t.shape[1:]) if flat.numel() % max(1, t.shape[1:].numel()) == 0 else flat
    edit(model, **{X + part: change})
    refused(model, INVALID, X)


@pytest.mark.parametrize("name,part", EACH + [("int8", ".weight_format")])
def test_wrong_dtype(name, part, copy):
    """The same bytes under another dtype; 4-bit codes may be stored as any float, but these have another number of bytes."""
    model = copy(name)
    for dtype in (torch.int16, torch.int64, torch.bool, torch.float64):
        edit(model, **{X + part: lambda t: t.to(torch.float32).to(dtype)})
        refused(model, INVALID, X)
        shutil.copy(TINY / name / "model.safetensors", model)


@pytest.mark.parametrize("name,shape", [("nf4", (1, -1)), ("nf4", (-1,)), ("nf4", (64, 86)), ("nf4", (-1, 1, 1)), ("int8", (172, 64)), ("int8", (-1,)),
                                        ("int8", (64, 172, 1)), ("int8", (1, 64, 172))])
def test_wrong_shape(name, shape, copy):
    model = copy(name)
    edit(model, **{W: lambda t: t.reshape(shape)})
    refused(model, INVALID, f'tensor "{W}" has the wrong shape')


@pytest.mark.parametrize("name,extra,like", [
    ("nf4-plain", W + ".nested_absmax", None), ("nf4-plain", W + ".nested_quant_map", None), ("nf4", X + ".SCB", None), ("nf4", X + ".weight_format", None),
    ("nf4", W.replace("layers.2", "layers.4") + ".absmax", None), ("nf4", W + ".quant_state.bitsandbytes__fp4", STATE), ("nf4", W + ".scales", None),
    ("int8", W + ".absmax", None), ("int8", W + ".quant_map", None), ("int8", X + ".CB", None),
    ("int8", "model.norm.SCB", None), ("nf4", "model.norm.weight.absmax", None)])
def test_extra(name, extra, like, copy):
    model = copy(name)
    stored = load_file(model / "model.safetensors")
    edit(model, **{extra: constant(stored[like] if like else torch.ones(4))})
    refused(model, INVALID, extra if "nested" not in extra else "nested")


def test_a_quantized_weight_of_another_kind(copy):
    """What INT8 and NF4 share is the name of the weight."""
    model = copy("nf4")
    int8 = load_file(TINY / "int8" / "model.safetensors")
    edit(model, **{W: constant(int8[W])})
    refused(model, INVALID, W)
    shutil.copy(TINY / "nf4" / "model.safetensors", model)
    edit(model, **{STATE: None, X + ".SCB": constant(int8[X + ".SCB"])})
    refused(model, INVALID, W)


# --- quant_state -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["blocksize", "nested_blocksize"])
@pytest.mark.parametrize("value", [0, 1, 3, 16, 63, 65, 8192, 2**31, 2**32 + 64, 2**63 - 1, -64, 64.0, "64", True, [64], {}, None, ...])
def test_block_size(key, value, copy):
    model = copy("nf4")
    edit_state(model, **{key: value})
    refused(model, INVALID, f'invalid "{key}"', STATE, "power of two")


@pytest.mark.parametrize("key,value", [("blocksize", 32), ("blocksize", 128), ("blocksize", 4096)])
def test_block_size_that_does_not_fit(key, value, copy):
    model = copy("nf4")
    edit_state(model, **{key: value})
    refused(model, INVALID, X, "absmax", "expected")


def test_nested_block_size_that_does_not_fit(copy):
    model = copy("nf4")                 # 172 blocks: one group of 256, two of 128
    edit_state(model, nested_blocksize=128)
    refused(model, INVALID, X, "nested_absmax", "4 bytes; expected 8")


@pytest.mark.parametrize("shape,code", [
    ([172, 64], INVALID), ([64, 171], INVALID), ([65, 172], INVALID), ([32, 344], INVALID), ([64, -172], INVALID), ([-64, -172], INVALID), ([0, 172], INVALID),
    ([2**32, 2**32], INVALID), ([2**62, 4], INVALID), ([2**63 - 1, 2**63 - 1], INVALID), ([2**63, 1], INVALID), ([1, 2**40], INVALID), ([64.0, 172.0], INVALID),
    (["64", "172"], INVALID), ([], INVALID), (64, INVALID), ("64, 172", INVALID), (None, INVALID), (..., INVALID), ([11008], UNSUPPORTED),
    ([1, 64, 172], UNSUPPORTED), ([1] * 1000, UNSUPPORTED)])
def test_shape(shape, code, copy):
    model = copy("nf4")
    edit_state(model, shape=shape)
    refused(model, code, X)


@pytest.mark.parametrize("key,value", [
    ("dtype", "float8_e4m3fn"), ("dtype", "int8"), ("dtype", "torch.bfloat16"), ("dtype", None), ("dtype", 16), ("dtype", ...),
    ("nested_dtype", "bfloat16"), ("nested_dtype", None), ("nested_dtype", ...),
    ("nested_offset", NAN), ("nested_offset", INF), ("nested_offset", -INF), ("nested_offset", 1e39), ("nested_offset", -1e39), ("nested_offset", "0.1"),
    ("nested_offset", None), ("nested_offset", ...),
    ("quant_type", "fp4"), ("quant_type", ["nf4"]), ("quant_type", None), ("quant_type", ...),
    ("blocksize_", 64), ("", 1), ("version", "2"), ("absmax", [1.0])])
def test_other_keys(key, value, copy):
    model = copy("nf4")
    edit_state(model, **{key: value})
    refused(model, INVALID, STATE)


def test_unknown_quant_type(copy):
    model = copy("nf4")
    edit_state(model, quant_type="nf3")
    refused(model, UNSUPPORTED, '"nf3"', STATE)


def test_terminal_codes_are_not_repeated(copy):
    model = copy("nf4")
    for change in (dict(quant_type="\x1b[31m\r\nERROR: forged"), {"\x1b[31m\r\nERROR: forged": 1}, dict(dtype="\x1b[31m\x7f\r\nERROR: forged")):
        edit_state(model, **change)
        done = run_engine("inspect", model)
        assert done.returncode == 1 and "\x1b" not in done.stderr and "\x7f" not in done.stderr and "\nERROR" not in done.stderr
        shutil.copy(TINY / "nf4" / "model.safetensors", model)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"64", b'{"quant_type": "nf4"', b"\xff\xfe", b"{}", b"\0" * 100, b"[" * 4000, b" " * 5000, b"{}{}",
                                  b'{"a\0b": 1}'])
def test_state_is_no_state(text, copy):
    model = copy("nf4")
    edit(model, **{STATE: constant(as_text(text))})
    refused(model, INVALID, STATE)


def test_duplicate_key(copy):
    model = copy("nf4")
    edit(model, **{STATE: lambda t: as_text(b'{"blocksize": 32, ' + bytes(t.numpy())[1:])})
    refused(model, INVALID, STATE, "duplicate")


def test_nested_keys_of_a_plain_weight(copy):
    model = copy("nf4-plain")
    edit_state(model, nested_blocksize=256, nested_dtype="float32", nested_offset=0.1)
    refused(model, INVALID, X, "absmax")


def test_plain_keys_of_a_nested_weight(copy):
    model = copy("nf4")
    edit_state(model, nested_blocksize=..., nested_dtype=..., nested_offset=...)
    refused(model, INVALID, X, "nested")


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name,part,index", [
    ("nf4", ".weight.nested_absmax", 0), ("nf4", ".weight.nested_quant_map", 255), ("nf4", ".weight.nested_quant_map", 7), ("nf4", ".weight.quant_map", 7),
    ("nf4-plain", ".weight.absmax", 0), ("nf4-plain", ".weight.absmax", -1), ("int8", ".SCB", 0), ("int8", ".SCB", -1)])
def test_not_finite(name, part, index, value, copy):
    model = copy(name)
    edit(model, **{X + part: at(index, value)})
    refused(model, INVALID, X, part.rpartition(".")[2])


@pytest.mark.parametrize("name,part,value", [
    ("nf4", ".weight.nested_absmax", 3.4e38), ("nf4-plain", ".weight.absmax", 3.4e38), ("nf4-plain-odd", ".weight.absmax", 65520.0), ("int8", ".SCB", 3e38),
    ("nf4", ".weight.nested_quant_map", 3e38)])
def test_scales_that_make_infinite_weights(name, part, value, copy):
    model = copy(name)
    x = X.replace("layers.2", "layers.1")
    edit(model, **{x + part: at(0, value)} | ({x + ".weight.nested_absmax": at(0, 10.0)} if "map" in part else {}))
    refused(model, INVALID, x)


def test_large_scales_are_no_damage(copy):
    """The largest that stay finite: read, and the logits, which are not, are a named error."""
    model = copy("nf4-plain")
    edit(model, **{W + ".absmax": at(0, 3.38e38)})
    assert run_engine("inspect", model).returncode == 0


@pytest.mark.parametrize("value", [1, 2, 3, 255])
def test_weight_format(value, copy):
    model = copy("int8")
    edit(model, **{X + ".weight_format": constant(torch.tensor(value, dtype=torch.uint8))})
    refused(model, UNSUPPORTED, f"weight_format {value}", X)


def test_weight_format_may_be_absent(copy):
    model = copy("int8")
    edit(model, **{X + ".weight_format": None})
    assert run_engine("inspect", model).returncode == 0


def test_another_codebook(copy):
    model = copy("nf4")
    stored = load_file(TINY / "fp4" / "model.safetensors")
    edit(model, **{W + ".quant_map": constant(stored[W + ".quant_map"])})
    refused(model, INVALID, X, "quant_map", "expected -1")


# --- what is not supported ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_embedding(kind, copy):
    """The embedding, quantized as an LM head may be."""
    model = copy(f"{kind}-head")
    stored = load_file(model / "model.safetensors")
    head = {k: v for k, v in stored.items() if k.startswith("lm_head.")}
    assert len(head) > 2
    edit(model, **{k.replace("lm_head", "model.embed_tokens"): constant(v) for k, v in head.items()})
    refused(model, UNSUPPORTED, "model.embed_tokens.weight", "embedding")


def test_quantized_norm(copy):
    model = copy("int8")
    edit(model, **{"model.norm.weight": lambda t: t.to(torch.int8), "model.norm.SCB": constant(torch.ones(64))})
    refused(model, UNSUPPORTED, "I8", "model.norm.weight")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "hqq", "BitsAndBytes", "", 4, None, [], "\x1b[31m"])
def test_quant_method(method, copy):
    model = copy("nf4")
    edit_config(model, quantization_config={"quant_method": method, "bits": 4})
    refused(model, UNSUPPORTED, "quant_method")
    assert "\x1b" not in run_engine("inspect", model).stderr


@pytest.mark.parametrize("value", [4, "bitsandbytes", [], ["bitsandbytes"], True, {}])
def test_quantization_config_is_none(value, copy):
    model = copy("nf4")
    edit_config(model, quantization_config=value)
    refused(model, UNSUPPORTED, "quant_method")


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_tensors_tell_not_the_config(name, copy):
    """A config that says nothing, or another thing, changes no number."""
    model = copy(name)
    greedy = ["greedy", model, "--ids", "5,6,7", "--max-tokens", 8]
    want = run_engine(*greedy, kernels="ref").stdout
    assert want
    for value in (..., {"quant_method": "bitsandbytes"}, {"quant_method": "bitsandbytes", "load_in_4bit": name == "int8", "load_in_8bit": name == "nf4"}):
        edit_config(model, quantization_config=value)
        assert run_engine(*greedy, kernels="ref").stdout == want


# --- any byte ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "nf4-gpt2-odd", "int8-gpt2"])
def test_every_byte_of_the_states_may_be_wrong(name, copy):
    """One byte at a time of a quant_state, a scale, a map: refused with status 1, or read; never a signal."""
    model = copy(name)
    path = model / "model.safetensors"
    good = path.read_bytes()
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + n])
    places = []
    for key, entry in header.items():
        if "quant_state" in key or "absmax" in key or key.endswith("SCB"):
            begin, end = entry["data_offsets"]
            places += range(8 + n + begin, 8 + n + end)
    for place in places[::max(1, len(places) // 60)]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1:])
        done = run_engine("greedy", model, "--ids", "5,6,7", "--max-tokens", 2, timeout=60)
        assert done.returncode in (0, 1), (place, done.returncode, done.stderr)
        assert done.returncode == 0 or done.stderr.startswith("millm-engine: "), done.stderr
