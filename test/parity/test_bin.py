"""PyTorch checkpoints: every tensor arrives as torch.load() sees it, in any form; what wants to run, or to be more than it is, is refused and leaves nothing."""
import builtins
import json
import os
import pickle
import posix
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, TINY
from safetensors.torch import load_file, save_file
from test_hub_client import MILLM_HUB, UUID, faults, hub_module, serve  # noqa: F401
from transformers import AutoModelForCausalLM

SMOLLM2 = FIXTURES / "SmolLM2-135M-Instruct"


def describe(source, to):
    """All of a model but its weights."""
    to.mkdir(parents=True)
    for f in source.iterdir():
        if f.suffix in (".json", ".jinja") and not f.name.endswith(".index.json"):
            shutil.copy(f, to)
    return to


def save(source, to, change=lambda sd: sd, **options):
    describe(source, to)
    torch.save(change(load_file(source / "model.safetensors")), to / "pytorch_model.bin", **options)


def with_metadata(sd):
    """As model.state_dict() is: an OrderedDict with an attribute; and one tensor is a Parameter."""
    sd = OrderedDict(sd)
    sd._metadata = OrderedDict([("", {"version": 1}), ("model", {"version": 2, "list": [1, 2, -3, 1 << 40], "none": None, "yes": True})])
    name = next(iter(sd))
    sd[name] = torch.nn.Parameter(sd[name])
    return sd


def one_storage(sd):
    """All tensors are views of one flat storage."""
    flat = torch.cat([t.flatten() for t in sd.values()])
    out, at = {}, 0
    for name, t in sd.items():
        out[name] = flat[at:at + t.numel()].view(t.shape)
        at += t.numel()
    return out


def scattered(sd):
    """Matrices are transposed, or columns of a wider one."""
    wide = lambda t: torch.cat([t, t + 1], 1)[:, :t.shape[1]]  # noqa: E731
    return {name: (t if t.dim() < 2 else t.t().contiguous().t() if i % 2 else wide(t)) for i, (name, t) in enumerate(sd.items())}


def gpt2_with_masks(sd):
    """Old files carry the causal mask, and the head beside the embedding that it is."""
    sd = {name.removeprefix("transformer."): t for name, t in sd.items()}
    sd |= {f"h.{i}.attn.bias": torch.tril(torch.ones(8, 8, dtype=torch.uint8)).view(1, 1, 8, 8) for i in range(5)}
    return sd | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(5)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bin") / "hub"
    bf16 = TINY / "llama-bf16"
    save(bf16, root / "t/bf16")
    save(TINY / "llama-f16", root / "t/f16")
    save(TINY / "llama", root / "t/f32")
    save(bf16, root / "t/metadata", with_metadata)
    save(bf16, root / "t/protocol4", with_metadata, pickle_protocol=4)
    save(bf16, root / "t/one-storage", one_storage)
    save(bf16, root / "t/scattered", scattered)
    save(TINY / "gpt2", root / "t/gpt2-old", gpt2_with_masks)
    for name, source, size in (("sharded", bf16, "200KB"), ("gpt2-tied", TINY / "gpt2", "50GB")):
        describe(source, root / "t" / name)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.save_pretrained(root / "t" / name, safe_serialization=False, max_shard_size=size)
    sd = torch.load(root / "t/gpt2-tied/pytorch_model.bin")
    sd["lm_head.weight"] = sd["transformer.wte.weight"]
    torch.save(sd, root / "t/gpt2-tied/pytorch_model.bin")
    return root


@pytest.fixture(scope="module")
def hub(root):
    return hub_module.start(root)


@pytest.fixture(autouse=True)
def no_faults(hub):
    faults(hub)


def command(hub, repo, cache, quantization):
    return list(map(str, [MILLM_HUB, "download", repo, "--endpoint", hub.endpoint, "--cache-dir", cache, "--quantization", quantization]))


def limits():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def download(hub, repo, cache, quantization="FP16"):
    return subprocess.run(command(hub, repo, cache, quantization), capture_output=True, text=True, timeout=120)


def quantize(source, output, quantization, **options):
    return subprocess.run([MILLM_HUB, "quantize", source, "--quantization", quantization, "--output", output], capture_output=True, text=True, timeout=120, **options)


def genuine(directory):
    """What torch.load() says, over all shards."""
    out = {}
    for f in sorted(directory.glob("*.bin")):
        out |= torch.load(f, weights_only=False)  # ours; the careful reader knows no protocol 4
    return out


def ours(directory):
    out = {}
    for f in sorted(directory.glob("model*.safetensors")):
        out |= load_file(f)
    return out


REPOS = ["bf16", "f16", "f32", "metadata", "protocol4", "one-storage", "scattered", "gpt2-old", "gpt2-tied", "sharded"]


@pytest.mark.parametrize("name", REPOS)
def test_tensors(hub, root, tmp_path, name):
    done = download(hub, f"t/{name}", tmp_path)
    assert done.returncode == 0, done.stderr
    d = tmp_path / f"huggingface/t--{name}--FP16"
    have, want = ours(d), genuine(root / "t" / name)
    if name == "gpt2-tied":
        assert want.pop("lm_head.weight") is not None  # it is the embedding
    assert have.keys() == want.keys()
    for k, t in want.items():
        t = t.bfloat16() if t.dtype == torch.float32 and t.dim() > 1 else t
        assert have[k].dtype == t.dtype and torch.equal(have[k], t), k
    names = {p.name for p in d.iterdir()}
    assert not [n for n in names if ".bin" in n or n.startswith(".partial")], "what came is left over"
    assert ("model.safetensors.index.json" in names) == (name == "sharded")
    meta = json.loads((d / ".millm_meta.json").read_text())
    assert meta["converted_from"] == ("F32" if want[next(iter(want))].dtype == torch.float32 else None)
    assert {k for k, f in meta["files"].items() if "stored_as" in f} == {f.name for f in (root / "t" / name).glob("*.bin")}
    for f in (f for f in meta["files"].values() if "stored_as" in f):
        assert f["bytes"] == (d / f["stored_as"]).stat().st_size and f["hash"]
    # the genuine library opens it, and it is the same model
    model = AutoModelForCausalLM.from_pretrained(d, dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(root / "t" / {"protocol4": "metadata"}.get(name, name), dtype=model.dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.state_dict().values(), strict=True))
    # nothing comes twice
    hub.log.clear()
    assert download(hub, f"t/{name}", tmp_path).returncode == 0
    assert not [r for r in hub.log if r["port"] == "cdn"]


@pytest.mark.parametrize("quantization", ["Q4", "Q8"])
@pytest.mark.parametrize("name", ["f32", "scattered", "gpt2-tied", "sharded"])
def test_quantized(hub, root, tmp_path, name, quantization):
    """Of a .bin, fetched or local, comes what comes of the same tensors in safetensors."""
    same = describe(root / "t" / name, tmp_path / "same")
    sd = genuine(root / "t" / name)
    if name == "gpt2-tied":
        del sd["lm_head.weight"]
    save_file({k: t.contiguous() for k, t in sd.items()}, same / "model.safetensors")
    for source, output in ((same, "want"), (root / "t" / name, "local")):
        done = quantize(source, tmp_path / output, quantization)
        assert done.returncode == 0, done.stderr
    assert download(hub, f"t/{name}", tmp_path, quantization).returncode == 0
    want = ours(tmp_path / "want")
    for d in (tmp_path / "local", tmp_path / f"huggingface/t--{name}--{quantization}"):
        have = ours(d)
        assert have.keys() == want.keys() and all(torch.equal(have[k], t) for k, t in want.items())
        assert (d / "millm_head_int8.safetensors").read_bytes() == (tmp_path / "want/millm_head_int8.safetensors").read_bytes()
        assert json.loads((d / "config.json").read_text()) == json.loads((tmp_path / "want/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "local")
    assert sorted(p.name for p in (root / "t" / name).glob("*.bin")), "the original is gone"


def test_register_in_place(serve, root):  # noqa: F811
    from engine_client import HelperError

    with pytest.raises(HelperError, match="INVALID_LOCAL_PATH.*PyTorch checkpoint") as e:
        serve("inspect", path=str(root / "t/bf16")).result()
    assert "millm-hub quantize" in e.value.hint


def test_preview(hub, serve):  # noqa: F811
    """What cannot be known before it is here is null; all else is."""
    said = serve("preview", endpoint=hub.endpoint, repo_id="t/sharded", revision="main").result()
    assert said["supported"] is True and said["params"] is None and said["estimated_sizes"]["Q4"]["disk_mb"] > 0


def test_safetensors_win(hub, root, tmp_path):
    both = describe(TINY / "llama-bf16", root / "t/both")
    shutil.copy(TINY / "llama-bf16/model.safetensors", both)
    (both / "pytorch_model.bin").write_text("never read")
    assert download(hub, "t/both", tmp_path).returncode == 0
    assert not [r for r in hub.log if r["path"].endswith(".bin")]


# --- Those that mean no good ---------------------------------------------------------------------------------------------------


class Call:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


G = b"c%s\n%s\n"
OD = G % (b"collections", b"OrderedDict")
REBUILD = G % (b"torch._utils", b"_rebuild_tensor_v2")
EMPTY = OD + b")R"


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s


def number(n):
    return b"\x8a\x08" + struct.pack("<q", n)


def storage(kind=b"FloatStorage", key=b"0", n=4):
    return b"(" + text(b"storage") + G % (b"torch", kind) + text(key) + text(b"cpu") + number(n) + b"tQ"


def tensor(store=None, offset=0, dims=(4,), strides=(1,)):
    numbers = lambda xs: b"(" + b"".join(map(number, xs)) + b"t"  # noqa: E731
    return REBUILD + b"(" + (store or storage()) + number(offset) + numbers(dims) + numbers(strides) + b"\x89" + EMPTY + b"tR"


def table(*items):
    return b"\x80\x02}(" + b"".join(text(k) + v for k, v in items) + b"u."


def archive(path, program, members=None, compression=zipfile.ZIP_STORED, name="archive"):
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr(f"{name}/data.pkl", program)
        for k, v in (members or {"data/0": bytes(16)}).items():
            z.writestr(f"{name}/{k}", v)


def shell(pwned, protocol, callee=os.system):
    return pickle.dumps({"w": Call(callee, (f"touch {pwned}",))}, protocol)


BIG = 1 << 62
PROGRAMS = {
    "os.system": (lambda p: shell(p, 2), "the global (posix|os).system"),
    "STACK_GLOBAL": (lambda p: shell(p, 4, posix.system), "the global posix.system"),
    "eval": (lambda p: pickle.dumps({"w": Call(builtins.eval, ("1",))}, 2), "the global (__builtin__|builtins).eval"),
    "getattr": (lambda p: pickle.dumps({"w": Call(getattr, (1, "real"))}, 3), "getattr"),
    "nested": (lambda p: b"\x80\x02" + OD + b"(" + G % (b"os", b"system") + b"(" + text(b"x") + b"tRtR.", "the global os.system"),
    "build": (lambda p: table((b"w", tensor() + b"}" + text(b"__class__") + text(b"x") + b"sb")), "attributes"),
    "load of another pickle": (lambda p: table((b"w", G % (b"torch", b"load") + b"(" + text(b"/etc/passwd") + b"tR")), "the global torch.load"),
    "other rebuild": (lambda p: table((b"w", G % (b"torch._utils", b"_rebuild_tensor_v3"))), "the global torch._utils._rebuild_tensor_v3"),
    "storage called": (lambda p: table((b"w", G % (b"torch", b"FloatStorage") + b")R")), "it calls torch.FloatStorage"),
    "INST": (lambda p: b"\x80\x02(" + text(b"x") + b"ios\nsystem\n.", "the pickle opcode INST"),
    "OBJ": (lambda p: b"\x80\x02(" + OD + b"o.", "the pickle opcode OBJ"),
    "NEWOBJ": (lambda p: b"\x80\x02" + OD + b")\x81.", "the pickle opcode NEWOBJ"),
    "EXT1": (lambda p: b"\x80\x02\x82\x01.", "the pickle opcode EXT1"),
    "PERSID": (lambda p: b"\x80\x02P0\n.", "the pickle opcode PERSID"),
    "no opcode": (lambda p: b"\x80\x02\xff.", "the pickle opcode 0xff"),
    "protocol 0": (lambda p: pickle.dumps({"w": 1}, 0), "protocol 2 to 5"),
    "a control character": (lambda p: table((b"w", G % (b"os", b"sys\x1b[2Jtem"))), r"os\.sys\?\[2Jtem"),
    "memo bomb": (lambda p: b"\x80\x02)" + b"q\x00(h\x00h\x00h\x00h\x00h\x00h\x00h\x00h\x00t" * 200_000 + b".", "no table|more than"),
    "memo index": (lambda p: b"\x80\x02}r\xff\xff\xff\xff.", "remembers value 4294967295"),
    "memo of nothing": (lambda p: b"\x80\x02h\x05.", "never remembered"),
    "values": (lambda p: b"\x80\x02" + b"N" * 6_000_000 + b".", "more than [0-9]+ values"),
    "marks": (lambda p: b"\x80\x02" + b"(" * 6_000_000 + b".", "more than [0-9]+ values"),
    "depth": (lambda p: b"\x80\x02)" + b"\x85" * 3_000_000 + b".", "no table"),
    "one name": (lambda p: b"\x80\x02}(" + text(b"n" * 1_000_000) + b"q\x00" + tensor() + b"q\x01" + b"h\x00h\x01" * 200_000 + b"u.", "twice"),
    "text length": (lambda p: b"\x80\x02X\xff\xff\xff\xff.", "within an opcode"),
    "integer length": (lambda p: b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "255 bytes"),
    "no end": (lambda p: b"\x80\x02}", "no end"),
    "empty": (lambda p: b"\x80\x02}.", "empty"),
    "list": (lambda p: b"\x80\x02].", "no table"),
    "trailing": (lambda p: table((b"w", tensor())) + b"x", "follow its end"),
    "no tensor": (lambda p: table((b"epoch", number(7))), '"epoch" is no tensor'),
    "a name twice": (lambda p: table((b"w", tensor()), (b"w", tensor())), "twice"),
    "reserved": (lambda p: table((b"__metadata__", tensor())), "no tensor may have"),
    "missing storage": (lambda p: table((b"w", tensor(storage(key=b"1")))), "is not there"),
    "escaping key": (lambda p: table((b"w", tensor(storage(key=b"../data.pkl", n=1)))), "is not there"),
    "short storage": (lambda p: table((b"w", tensor(storage(n=5)))), "is shorter"),
    "storage of 2^62": (lambda p: table((b"w", tensor(storage(n=BIG)))), "is shorter"),
    "offset": (lambda p: table((b"w", tensor(offset=1))), "claims elements 1 to 5"),
    "huge offset": (lambda p: table((b"w", tensor(offset=(1 << 63) - 1))), "claims elements"),
    "negative offset": (lambda p: table((b"w", tensor(offset=-1))), "no storage"),
    "negative dimension": (lambda p: table((b"w", tensor(dims=(-1,)))), "impossible shape"),
    "huge shape": (lambda p: table((b"w", tensor(dims=(BIG, BIG), strides=(BIG, 1)))), "impossible shape"),
    "huge stride": (lambda p: table((b"w", tensor(dims=(2, 2), strides=(BIG, 1)))), "claims elements"),
    "expanded": (lambda p: table((b"w", tensor(dims=(1 << 40,), strides=(0,)))), "an element twice"),
    "overlapping rows": (lambda p: table((b"w", tensor(dims=(3, 2), strides=(1, 1)))), "an element twice"),
    "nine dimensions": (lambda p: table((b"w", tensor(dims=(1,) * 9, strides=(1,) * 9))), "8 dimensions"),
    "strides missing": (lambda p: table((b"w", tensor(dims=(2, 2), strides=(1,)))), "impossible shape"),
}


def refused(tmp_path, make):
    """The error with which a checkpoint that make(path) writes is refused: nothing ran, and nothing is left."""
    d = describe(TINY / "llama-bf16", tmp_path / "evil")
    make(d / "pytorch_model.bin")
    before = sorted(p.name for p in d.iterdir())
    done = quantize(d, tmp_path / "out", "FP16", preexec_fn=limits)
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists() and sorted(p.name for p in d.iterdir()) == before
    return done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_evil_programs(tmp_path, name):
    make, says = PROGRAMS[name]
    error = refused(tmp_path, lambda path: archive(path, make(tmp_path / "pwned")))
    assert "INVALID_MODEL_FILE" in error
    assert re.search(says, error), error


def patched(offset_of, value, size=4):
    """An archive of which one number is another: offset_of(bytes) says where it is."""
    def make(path):
        archive(path, table((b"w", tensor())))
        data = bytearray(path.read_bytes())
        at = offset_of(data)
        data[at:at + size] = value.to_bytes(size, "little")
        path.write_bytes(data)
    return make


def end(data):
    return data.rindex(b"PK\5\6")


def second(data):
    return data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)


def overlapping(path):
    """Both storages are the same bytes of the file."""
    archive(path, table((b"w", tensor()), (b"v", tensor(storage(key=b"1")))), {"data/0": bytes(16), "data/1": bytes(16)})
    data = bytearray(path.read_bytes())
    first, other = second(data), data.rindex(b"PK\1\2")
    data[other + 42:other + 46] = data[first + 42:first + 46]
    data[other + 46:other + 46 + 14] = data[first + 46:first + 46 + 14]
    path.write_bytes(data)


def twice(path):
    with pytest.warns(UserWarning):
        with zipfile.ZipFile(path, "w") as z:
            for i in range(2):
                z.writestr("archive/data.pkl", table((b"w", tensor())))


def many_names(path):
    """A few bytes, a thousand times."""
    archive(path, table(*[(b"%d" % i, tensor(storage(n=25_000), dims=(25_000,))) for i in range(1000)]), {"data/0": bytes(100_000)})


ARCHIVES = {
    "cut": (lambda p: (archive(p, table((b"w", tensor()))), p.write_bytes(p.read_bytes()[:-10])), "does not end as a zip"),
    "short": (lambda p: p.write_bytes(b"PK\3\4"), "too short"),
    "text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n" * 10), "does not end as a zip"),
    "compressed": (lambda p: archive(p, table((b"w", tensor())) + b" " * 1000, None, zipfile.ZIP_DEFLATED), "is compressed"),
    "encrypted": (patched(lambda d: second(d) + 8, 1, 2), "encrypted"),
    "no pickle": (lambda p: archive(p, b"", {"data/0": b""}, name="a/b"), "without"),
    "two pickles": (lambda p: (archive(p, table((b"w", tensor()))), zipfile.ZipFile(p, "a").writestr("other/data.pkl", b"")), "two pickles"),
    "directory outside": (patched(lambda d: end(d) + 16, 1 << 31), "outside"),
    "directory of 4 GB": (patched(lambda d: end(d) + 12, 0xFFFFFFFF), "outside"),
    "more members": (patched(lambda d: end(d) + 8, 60000 << 16 | 60000), "more members"),
    "header outside": (patched(lambda d: second(d) + 42, 1 << 30), "outside"),
    "header elsewhere": (patched(lambda d: second(d) + 42, 0), "another one"),
    "member too long": (patched(lambda d: second(d) + 20, (1 << 20) | (1 << 20) << 32, 8), "outside"),
    "sizes differ": (patched(lambda d: second(d) + 20, 15), "compressed"),
    "64 bits missing": (patched(lambda d: second(d) + 42, 0xFFFFFFFF), "64-bit"),
    "overlapping": (overlapping, "overlaps"),
    "a member twice": (twice, "overlaps|there twice"),
    "many names": (many_names, "more than twice"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_evil_archives(tmp_path, name):
    make, says = ARCHIVES[name]
    error = refused(tmp_path, make)
    assert "INVALID_MODEL_FILE" in error and re.search(says, error), error


def test_other_formats(tmp_path):
    sd = load_file(TINY / "llama-bf16/model.safetensors")
    error = refused(tmp_path / "legacy", lambda p: torch.save(sd, p, _use_new_zipfile_serialization=False))
    assert "UNSUPPORTED" in error and "before 1.6" in error and "Hint:" in error
    error = refused(tmp_path / "big", lambda p: archive(p, table((b"w", tensor())), {"byteorder": b"big", "data/0": bytes(16)}))
    assert "UNSUPPORTED" in error and "byte order" in error


def test_evil_download(hub, root, tmp_path, serve):  # noqa: F811
    """From the Hub: an error, nothing in the cache, nothing ran."""
    from engine_client import HelperError

    d = describe(TINY / "llama-bf16", root / "t/evil")
    archive(d / "pytorch_model.bin", shell(tmp_path / "pwned", 2))
    fields = dict(endpoint=hub.endpoint, repo_id="t/evil", quantization="Q4", cache_dir=str(tmp_path / "cache"), directory="huggingface/evil",
                  model_id=1, model_uuid=UUID, owner_id=UUID)
    with pytest.raises(HelperError, match="INVALID_MODEL_FILE.*system"):
        serve("download", **fields).result()
    assert not (tmp_path / "cache/huggingface/evil").exists()
    assert download(hub, "t/evil", tmp_path / "cli").returncode == 1
    assert not [p for p in (tmp_path / "cli").rglob("*") if ".bin" in p.name or p.name.endswith(".safetensors")]
    assert not (tmp_path / "pwned").exists()


def test_shard_that_is_not_there(hub, root, tmp_path):
    d = shutil.copytree(root / "t/sharded", root / "t/hole")
    next(d.glob("pytorch_model-00002*.bin")).unlink()
    done = download(hub, "t/hole", tmp_path)
    assert done.returncode == 1 and "MODEL_DOWNLOAD_FAILED" in done.stderr and "pytorch_model.bin.index.json" in done.stderr


# --- Killed -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol(hub, root, tmp_path_factory):
    """SmolLM2 as a .bin: large enough to be killed in the middle."""
    save(SMOLLM2, root / "t/smol")
    want = tmp_path_factory.mktemp("smol") / "Q4"
    assert quantize(SMOLLM2, want, "Q4").returncode == 0
    return ours(want)


@pytest.mark.parametrize("at", ["fetching", "converting"])
def test_killed(hub, root, tmp_path, smol, at):
    """kill -9 while it comes: the next attempt fetches the rest.  While it is converted: only that is done again."""
    size = (root / "t/smol/pytorch_model.bin").stat().st_size
    d = tmp_path / "huggingface/t--smol--Q4"
    if at == "fetching":
        faults(hub, {"where": "cdn", "bytes_per_second": 60_000_000})
    p = subprocess.Popen(command(hub, "t/smol", tmp_path, "Q4"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pattern, enough = (".partial-*pytorch_model.bin", size // 3) if at == "fetching" else (".partial-*model.safetensors", 8 << 20)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and p.poll() is None and not any(f.stat().st_size >= enough for f in d.glob(pattern)):
        time.sleep(0.005)
    assert p.poll() is None, "it ended before it could be killed"
    p.send_signal(signal.SIGKILL)
    p.wait()
    faults(hub)
    hub.log.clear()
    done = download(hub, "t/smol", tmp_path, "Q4")
    assert done.returncode == 0, done.stderr
    firsts = [int(r["range"].split("=")[1].split("-")[0]) for r in hub.log if r["port"] == "cdn" and r["range"]]
    assert min(firsts) >= size // 3 if at == "fetching" else not firsts, "it started over"
    have = ours(d)
    assert have.keys() == smol.keys() and all(torch.equal(have[k], t) for k, t in smol.items())
    assert not [f.name for f in d.iterdir() if f.name.startswith(".partial") or ".bin" in f.name]


def test_disk(hub, serve, smol, tmp_path):  # noqa: F811
    """What is needed besides is seen before it is fetched: a small file system is refused at once."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    cache = tmp_path / "small"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=360m", "none", cache], capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    try:
        # Q4 takes 115 MB and the margin 64 MB: room for that, but not for 270 MB of checkpoint besides
        hub.log.clear()
        done = download(hub, "t/smol", cache, "Q4")
        assert done.returncode == 1 and "INSUFFICIENT_DISK" in done.stderr, done.stderr
        assert not [r for r in hub.log if r["port"] == "cdn"]
    finally:
        subprocess.run(["umount", cache], check=True)
