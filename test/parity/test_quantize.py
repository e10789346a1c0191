"""Quantizing while the bytes arrive: what millm-hub writes is what bitsandbytes writes and transformers reads, and nothing is lost on the way."""
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from test_hub_client import MILLM_HUB, SCREENING_COPY, SMOL, UUID, faults, hub, serve  # noqa: F401
from transformers import AutoModelForCausalLM

SOURCE = FIXTURES / "SmolLM2-135M-Instruct"
PARTS_OF_A_LINEAR = {"Q4": 6, "Q8": 3}


def quantize(source, output, quantization, check=True):
    return subprocess.run([MILLM_HUB, "quantize", source, "--quantization", quantization, "--output", output], capture_output=True, text=True, check=check, timeout=120)


def header(path):
    with open(path, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        return n, json.loads(f.read(n))


def files(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    d = tmp_path_factory.mktemp("quantized")
    before = files(SOURCE)
    for q in ("Q4", "Q8"):
        quantize(SOURCE, d / q, q)
    assert files(SOURCE) == before  # the original is left alone
    yield d
    shutil.rmtree(d)


def check_layout(path, quantization):
    """Ordinary safetensors: no holes, no overlaps, aligned; all that belongs to a Linear is in it."""
    n, h = header(path)
    h.pop("__metadata__")
    assert (8 + n) % 64 == 0
    at = 0
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}
    for name, t in sorted(h.items(), key=lambda x: x[1]["data_offsets"]):
        begin, end = t["data_offsets"]
        assert begin == at, name
        assert (end - begin) % 64 != 0 or begin % 64 == 0 or "quant_state" in name, f"{name} is not aligned to 64 bytes"
        assert begin % sizes[t["dtype"]] == 0, name
        at = end
    assert 8 + n + at == path.stat().st_size
    suffix = ".weight.absmax" if quantization == "Q4" else ".SCB"
    modules = [k.removesuffix(suffix) for k in h if k.endswith(suffix)]
    for m in modules:
        assert sum(k.startswith(m + ".") for k in h if not k.endswith(".bias")) == PARTS_OF_A_LINEAR[quantization], m
    return modules


@pytest.mark.parametrize("quantization", ["Q4", "Q8"])
def test_every_tensor(smol, quantization):
    """Packed bytes identical to bitsandbytes' for every Linear of SmolLM2; the others as they were."""
    d = smol / quantization
    modules = check_layout(d / "model.safetensors", quantization)
    assert len(modules) == 210
    ours, theirs = load_file(d / "model.safetensors"), load_file(SOURCE / "model.safetensors")
    for name, w in theirs.items():
        module = name.removesuffix(".weight")
        if module not in modules:
            assert torch.equal(ours[name], w), name
        elif quantization == "Q4":
            q, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
            assert torch.equal(ours[name], q), name
            text = json.loads(bytes(ours[name + ".quant_state.bitsandbytes__nf4"].tolist()))
            assert abs(text.pop("nested_offset") - state.offset.item()) <= 2 ** -22 * state.offset.item()
            assert text == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape), "nested_blocksize": 256, "nested_dtype": "float32"}
        else:
            q, scb, _ = bnb.int8_vectorwise_quant(w.half())
            assert torch.equal(ours[name], q) and torch.equal(ours[module + ".SCB"], scb), name


@pytest.mark.parametrize("quantization", ["Q4", "Q8"])
def test_transformers_loads_it(smol, quantization):
    model, info = AutoModelForCausalLM.from_pretrained(smol / quantization, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model.model.layers[7].mlp.up_proj, Linear4bit if quantization == "Q4" else Linear8bitLt)
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_meta(smol):
    meta = json.loads((smol / "Q4/.millm_meta.json").read_text())
    raw = (SOURCE / "model.safetensors").read_bytes()
    weights = meta["files"]["model.safetensors"]
    assert meta["quantization"] == "Q4" and Path(meta["source_path"]).resolve() == SOURCE.resolve() and meta["millm_version"] and meta["commit"] is None
    assert weights == {"size": len(raw), "hash": hashlib.sha256(raw).hexdigest(), "bytes": (smol / "Q4/model.safetensors").stat().st_size}
    assert meta["original_bytes"] == len(raw) and meta["quantized_bytes"] == weights["bytes"]
    on_disk = sum(p.stat().st_size for p in (smol / "Q4").iterdir() if p.name != ".millm_meta.json")
    assert abs(meta["bytes"] - on_disk) < 1000  # config.json has grown


# --- other sources: dtypes, Conv1D, shards, damage

TINY = ["llama", "llama-f16", "llama-bf16", "llama-bias", "llama-sharded", "llama-headdim", "gpt2", "gpt2-inverse", "mixtral", "qwen2_moe"]
ROUTERS = ("gate", "shared_expert_gate")


@pytest.mark.parametrize("quantization", ["Q4", "Q8", "FP16"])
@pytest.mark.parametrize("name", TINY)
def test_tiny(tmp_path, name, quantization):
    source, out = FIXTURES / "tiny" / name, tmp_path / "out"
    quantize(source, out, quantization)
    config = json.loads((source / "config.json").read_text())
    is_f32 = config["dtype"] == "float32"
    dtype = torch.float16 if config["dtype"] == "float16" else torch.bfloat16
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == str(dtype).removeprefix("torch.")
    assert ("quantization_config" in written) == (quantization != "FP16")
    theirs, ours = {}, {}
    for p in source.glob("*.safetensors"):
        theirs |= load_file(p)
    for p in out.glob("model*.safetensors"):
        ours |= load_file(p)
        if quantization != "FP16":
            check_layout(p, quantization)
    for t, w in theirs.items():
        module = t.removesuffix(".weight")
        is_router = module.split(".")[-1] in ROUTERS
        converted = w.to(dtype) if w.dtype == torch.float32 and w.dim() > 1 and not is_router else w
        turned = converted.T.contiguous() if name.startswith("gpt2") else converted
        if module + ".SCB" in ours:
            q, scb, _ = bnb.int8_vectorwise_quant(turned.half())
            assert torch.equal(ours[t], q) and torch.equal(ours[module + ".SCB"], scb), t
        elif t + ".absmax" in ours:
            assert torch.equal(ours[t], bnb.quantize_4bit(turned, blocksize=64, compress_statistics=True, quant_type="nf4")[0]), t
        else:
            assert torch.equal(ours[t], converted), t
            assert quantization == "FP16" or w.dim() < 2 or is_router or not any(c.isdigit() for c in t.split(".")), f"{t} is not quantized"
    index = out / "model.safetensors.index.json"
    if index.exists():
        read = json.loads(index.read_text())
        assert {(t, f) for t, f in read["weight_map"].items()} == {(t, p.name) for p in out.glob("model-*.safetensors") for t in header(p)[1] if t != "__metadata__"}
        assert read["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in ours.values())
    elif quantization == "FP16" and not is_f32:
        assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


def damaged(tmp_path, change):
    d = tmp_path / "damaged"
    shutil.copytree(FIXTURES / "tiny/llama-bf16", d)
    tensors = load_file(d / "model.safetensors")
    change(tensors)
    save_file(tensors, d / "model.safetensors", metadata={"format": "pt"})
    return d


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value,quantization", [(float("nan"), "Q4"), (float("inf"), "Q4"), (float("nan"), "Q8"), (70000.0, "Q8")])
def test_impossible_values(tmp_path, value, quantization):
    d = damaged(tmp_path, lambda t: t[UP][3].__setitem__(5, value))
    done = quantize(d, tmp_path / "out", quantization, check=False)
    assert done.returncode == 1 and "INVALID_MODEL_FILE" in done.stderr and UP in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_overflow_of_f32(tmp_path):
    d = tmp_path / "f32"
    shutil.copytree(FIXTURES / "tiny/llama", d)
    tensors = load_file(d / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, d / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((d / "config.json").read_text()) | {"dtype": "float16"}
    (d / "config.json").write_text(json.dumps(config))
    # the directory's own F32 matrices become the config's F16: what does not fit is named
    done = quantize(d, tmp_path / "out", "Q4", check=False)
    assert done.returncode == 1 and "lm_head.weight" in done.stderr and "F16" in done.stderr, done.stderr


@pytest.mark.parametrize("kind,refused", [("nf4", "Q8"), ("int8", "Q4")])
def test_quantized_already(tmp_path, kind, refused):
    source = FIXTURES / "tiny-bnb" / kind
    done = quantize(source, tmp_path / "out", refused, check=False)
    assert done.returncode == 1 and "UNSUPPORTED" in done.stderr and "already" in done.stderr
    quantize(source, tmp_path / "same", "Q4" if refused == "Q8" else "Q8")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


# --- the stream


def job(hub, cache, quantization, repo=SMOL):  # noqa: F811
    return {"endpoint": hub.endpoint, "repo_id": repo, "cache_dir": str(cache), "directory": f"huggingface/smol--{quantization}", "quantization": quantization,
            "model_id": 1, "model_uuid": UUID, "owner_id": UUID}


def du(directory):
    total = 0
    for root, _, names in os.walk(directory):
        for n in names:
            try:
                total += os.stat(os.path.join(root, n)).st_blocks * 512
            except FileNotFoundError:
                pass
    return total


def test_disk_never_holds_the_full_precision(hub, tmp_path, serve, smol):  # noqa: F811
    """At most what lies there in the end and two tensors; and ready at most a second after the last byte."""
    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 150_000_000})
    peak, ended = 0, threading.Event()

    def watch():
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, du(tmp_path))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    last = time.monotonic()
    c = serve("download", **job(hub, tmp_path, "Q4"))
    for kind, frame in c.frames():
        if frame.get("stage") == "downloading":
            last = time.monotonic()
    result_after = time.monotonic() - last
    ended.set()
    watcher.join()
    faults(hub)
    final = du(tmp_path)
    largest = max(t.numel() * t.element_size() for t in load_file(SOURCE / "model.safetensors").values())
    print(f"peak {peak / 1e6:.1f} MB, in the end {final / 1e6:.1f} MB, the result {result_after:.3f} s after the last progress")
    assert peak <= final + 2 * largest
    assert result_after < 20
    assert frame["quantization"] == "Q4" and abs(frame["disk_bytes"] - final) < 200_000
    assert (tmp_path / "huggingface/smol--Q4/model.safetensors").stat().st_size < 120_000_000
    ours, direct = load_file(tmp_path / "huggingface/smol--Q4/model.safetensors"), load_file(smol / "Q4/model.safetensors")
    assert ours.keys() == direct.keys() and all(torch.equal(ours[k], direct[k]) for k in ours)


@pytest.mark.parametrize("quantization", ["Q4", "Q8"])
@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_killed_and_resumed(hub, tmp_path, smol, quantization, at):  # noqa: F811
    """kill -9 of the hub: the next attempt goes on at a tensor boundary, fetches the rest only, and proves the whole file."""
    size = (SOURCE / "model.safetensors").stat().st_size
    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 150_000_000})
    command = list(map(str, [MILLM_HUB, "download", SMOL, "--endpoint", hub.endpoint, "--quantization", quantization, "--cache-dir", tmp_path]))
    d = tmp_path / "huggingface" / (SMOL.replace("/", "--") + "--" + quantization)
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and p.poll() is None:
        state = next(iter(d.glob(".partial-*.state")), None) if d.exists() else None
        try:
            if state and json.loads(state.read_text())["offset"] >= size * at - (64 << 20):
                break
        except (ValueError, FileNotFoundError):
            pass
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    offset = json.loads(next(iter(d.glob(".partial-*.state"))).read_text())["offset"]
    assert offset >= size * at - (64 << 20)
    hub.log.clear()
    faults(hub)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    firsts = [int(r["range"].split("=")[1].split("-")[0]) for r in hub.log if r["port"] == "cdn" and r["range"]]
    assert firsts and min(firsts) == offset, "it started over"
    ours, direct = load_file(d / "model.safetensors"), load_file(smol / quantization / "model.safetensors")
    assert ours.keys() == direct.keys() and all(torch.equal(ours[k], direct[k]) for k in ours)
    assert not [p.name for p in d.iterdir() if p.name.startswith(".partial")]
    assert (d / SCREENING_COPY).read_bytes() == (smol / quantization / SCREENING_COPY).read_bytes()


def test_16_bits_keep_the_files_and_get_a_copy(hub, tmp_path, serve, smol):  # noqa: F811
    """FP16: the published bytes, and the screening copy that Q4 has, whose head is the same."""
    faults(hub)
    size = serve("validate", repo_id=SMOL, endpoint=hub.endpoint, quantization="FP16").result()["disk_bytes"]
    done = serve("download", **job(hub, tmp_path, "FP16")).result()
    d = tmp_path / "huggingface/smol--FP16"
    copy = (d / SCREENING_COPY).read_bytes()
    assert copy == (smol / "Q4" / SCREENING_COPY).read_bytes()
    assert (d / "model.safetensors").read_bytes() == (SOURCE / "model.safetensors").read_bytes()
    assert done["disk_bytes"] == size


def test_16_bits_killed_and_resumed(hub, tmp_path, smol):  # noqa: F811
    """The head goes by in two attempts: the copy is then made from the file."""
    size = (SOURCE / "model.safetensors").stat().st_size
    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 150_000_000})
    command = list(map(str, [MILLM_HUB, "download", SMOL, "--endpoint", hub.endpoint, "--quantization", "FP16", "--cache-dir", tmp_path]))
    d = tmp_path / "huggingface" / (SMOL.replace("/", "--") + "--FP16")
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and p.poll() is None and sum(f.stat().st_size for f in d.glob(".partial-*-model.safetensors")) < size // 10:
        time.sleep(0.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (d / SCREENING_COPY).exists() and not (d / "model.safetensors").exists()
    hub.log.clear()
    faults(hub)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert min(int(r["range"].split("=")[1].split("-")[0]) for r in hub.log if r["port"] == "cdn" and r["range"]) > 0, "it started over"
    assert (d / "model.safetensors").read_bytes() == (SOURCE / "model.safetensors").read_bytes()
    assert (d / SCREENING_COPY).read_bytes() == (smol / "Q4" / SCREENING_COPY).read_bytes()
    assert not [p.name for p in d.iterdir() if p.name.startswith(".partial")]


def test_wrong_content(hub, tmp_path, serve, smol):  # noqa: F811
    from engine_client import HelperError

    faults(hub, {"repo": SMOL, "where": "cdn", "kind": "wrong_bytes", "times": 1})
    serve("download", **job(hub, tmp_path, "Q4")).result()  # refetched once
    direct = load_file(smol / "Q4/model.safetensors")
    ours = load_file(tmp_path / "huggingface/smol--Q4/model.safetensors")
    assert all(torch.equal(ours[k], direct[k]) for k in direct)
    faults(hub, {"repo": SMOL, "where": "cdn", "kind": "wrong_bytes"})
    with pytest.raises(HelperError, match="MODEL_DOWNLOAD_FAILED.*wrong content|INVALID_MODEL_FILE"):
        serve("download", **(job(hub, tmp_path, "Q8"))).result()
    assert not (tmp_path / "huggingface/smol--Q8").exists()


def test_cancel(hub, tmp_path, serve):  # noqa: F811
    from engine_client import HelperError

    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 50_000_000})
    c = serve("download", **job(hub, tmp_path, "Q4"))
    while c.receive()[1].get("bytes", 0) < 20_000_000:
        pass
    serve("cancel", model_uuid=UUID).result()
    assert not (tmp_path / "huggingface/smol--Q4").exists()
    with pytest.raises(HelperError, match="CANCELED"):
        c.result()


def test_estimate(hub, serve, smol):  # noqa: F811
    """validate's figure is what lies there in the end."""
    for q in ("Q4", "Q8"):
        said = serve("validate", endpoint=hub.endpoint, repo_id=SMOL, quantization=q, timeout_ms=20000).result()["disk_bytes"]
        real = json.loads((smol / q / ".millm_meta.json").read_text())["bytes"]
        assert abs(said - real) < 0.005 * real, (q, said, real)
    f32 = serve("validate", endpoint=hub.endpoint, repo_id="millm-test/tiny-f32", quantization="FP16", timeout_ms=20000).result()
    assert f32["converted_from"] == "F32" and f32["converted_to"] == "BF16" and f32["disk_bytes"] < f32["total_bytes"]
    nf4 = serve("validate", endpoint=hub.endpoint, repo_id="millm-test/tiny-nf4", quantization="FP16", timeout_ms=20000).result()
    assert nf4["prequantized"] == "nf4" and nf4["quantization"] == "Q4" and nf4["converted_from"] is None
