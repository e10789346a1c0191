"""millm-hub against the test hub: what a download leaves on disk, every way a hub can fail, and that a token stays where it belongs."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "test/hub"))
import hub as hub_module  # noqa: E402

SCREENING_COPY = "millm_head_int8.safetensors"
MILLM_HUB = Path(os.environ.get("MILLM_HUB", ROOT / "build/millm-hub"))  # or one built with a sanitizer
HUB_ROOT = ROOT / ".fixtures/hub"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = "millm-test/tiny-llama"


@pytest.fixture(scope="module")
def hub():
    return hub_module.start(HUB_ROOT)


@pytest.fixture(autouse=True)
def no_faults(hub):
    faults(hub)
    yield
    faults(hub)


def faults(hub, *fs):
    urllib.request.urlopen(urllib.request.Request(hub.endpoint + "/_faults", json.dumps(list(fs)).encode(), method="POST")).read()


def command(hub, what, repo, cache=None, token=None, *more):
    args = [MILLM_HUB, what, repo, "--endpoint", hub.endpoint, "--quantization", "FP16", *more]
    if cache:
        args += ["--cache-dir", cache]
    if token:
        file = Path(cache or "/tmp") / "token-file"
        file.parent.mkdir(exist_ok=True)
        file.write_text(token + "\n")
        args += ["--token-file", file]
    return list(map(str, args))


def run(hub, what, repo, cache=None, token=None, *more):
    return subprocess.run(command(hub, what, repo, cache, token, *more), capture_output=True, text=True, timeout=120)


def model_dir(cache, repo):
    return Path(cache) / "huggingface" / (repo.replace("/", "--") + "--FP16")


def leftovers(cache, repo):
    d = model_dir(cache, repo)
    return sorted(p.name for p in d.iterdir()) if d.exists() else []


def same_files(cache, repo, source=None):
    """What lies in the cache is what was published; F32 has become BF16, each matrix rounded to nearest, and config.json says so.
    Beside it lie the meta file and the screening copy, which are ours."""
    d, source = model_dir(cache, repo), HUB_ROOT / (source or repo)
    names = [n for n in leftovers(cache, repo) if n not in (".millm_meta.json", SCREENING_COPY)]
    assert (d / SCREENING_COPY).exists() == (d / ".millm_meta.json").exists()
    is_f32 = json.loads((source / "config.json").read_text()).get("dtype") == "float32"
    for n in names:
        if is_f32 and n.endswith(".safetensors"):
            ours, theirs = load_file(d / n), load_file(source / n)
            assert ours.keys() == theirs.keys()
            for name, t in theirs.items():
                assert torch.equal(ours[name], t.bfloat16() if t.dim() > 1 else t), name
        elif is_f32 and n == "config.json":
            assert json.loads((d / n).read_text()) == json.loads((source / n).read_text()) | {"dtype": "bfloat16"}
        elif is_f32 and n == "model.safetensors.index.json":
            assert json.loads((d / n).read_text())["weight_map"] == json.loads((source / n).read_text())["weight_map"]
        else:
            assert (d / n).read_bytes() == (source / n).read_bytes(), n
    return names


def test_download(hub, tmp_path):
    done = run(hub, "download", TINY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_files(tmp_path, TINY) == sorted(p.name for p in (HUB_ROOT / TINY).iterdir())
    meta = json.loads((model_dir(tmp_path, TINY) / ".millm_meta.json").read_text())
    assert meta["repo_id"] == TINY and meta["quantization"] == "FP16" and len(meta["commit"]) == 40
    weights = (HUB_ROOT / TINY / "model.safetensors").read_bytes()
    assert meta["files"]["model.safetensors"] == {"size": len(weights), "hash": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    assert meta["original_bytes"] == meta["quantized_bytes"] == len(weights)
    # the second time every file is proved from disk; nothing but small requests
    hub.log.clear()
    assert run(hub, "download", TINY, tmp_path).returncode == 0
    assert not [r for r in hub.log if r["port"] == "cdn"]


def test_what_is_fetched(hub, tmp_path):
    assert run(hub, "download", "millm-test/extras", tmp_path).returncode == 0
    names = leftovers(tmp_path, "millm-test/extras")
    assert "LICENSE" in names and "model.safetensors" in names
    assert not {"onnx.onnx", "modeling.py", "training_args.bin", "original"} & set(names)


def test_module_directories(hub, tmp_path, serve):
    """What sentence-transformers keeps below the model: its modules' configs, in their places, and nothing else that lies in directories."""
    repo = "millm-test/embedder"
    ours, theirs = model_dir(tmp_path, repo), HUB_ROOT / repo
    wanted = sorted(str(p.relative_to(theirs)) for p in theirs.rglob("*") if p.is_file() and "onnx" not in str(p))
    assert "1_Pooling/config.json" in wanted and "modules.json" in wanted
    # one that fails leaves nothing behind, theirs neither
    from engine_client import HelperError

    faults(hub, {"repo": repo, "file": "model.safetensors", "status": 404})
    with pytest.raises(HelperError):
        serve("download", **job(hub, tmp_path, repo)).result()
    assert not ours.exists()
    faults(hub)
    assert run(hub, "download", repo, tmp_path).returncode == 0
    have = sorted(str(p.relative_to(ours)) for p in ours.rglob("*") if p.is_file())
    assert sorted(n for n in have if n not in (".millm_meta.json", SCREENING_COPY)) == wanted
    assert all((ours / n).read_bytes() == (theirs / n).read_bytes() for n in wanted)
    hub.log.clear()
    assert run(hub, "download", repo, tmp_path).returncode == 0 and not [r for r in hub.log if r["port"] == "cdn"]
    # the same from a directory of this machine
    out = tmp_path / "q4"
    done = subprocess.run([MILLM_HUB, "quantize", ours, "--quantization", "Q4", "--output", out], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "1_Pooling/config.json").read_text()) == {"pooling_mode_lasttoken": True} and (out / "modules.json").exists()


def test_shards_pages_names(hub, tmp_path):
    assert run(hub, "download", "millm-test/sharded", tmp_path).returncode == 0
    assert len([n for n in same_files(tmp_path, "millm-test/sharded") if n.endswith(".safetensors")]) > 1
    assert run(hub, "download", "tiny-single", tmp_path).returncode == 0
    assert run(hub, "download", "millm-test/old-name", tmp_path).returncode == 0
    assert run(hub, "validate", TINY, None, None, "--revision", "refs/pr/1").returncode == 0


REFUSALS = [
    ("millm-test/missing", None, "REPO_NOT_FOUND"), ("millm-test/missing", "hf_good", "REPO_NOT_FOUND"), ("millm-test/private", None, "REPO_NOT_FOUND"),
    ("millm-test/private", "hf_nogrant", "REPO_NOT_FOUND"), ("millm-test/gated", None, "GATED_MODEL_NO_TOKEN"),
    ("millm-test/gated", "hf_nogrant", "GATED_MODEL_NO_TOKEN"), ("millm-test/gated", "hf_bad", "INVALID_HF_TOKEN"), (TINY, "hf_bad", "INVALID_HF_TOKEN"),
    ("millm-test/disabled", None, "MODEL_DOWNLOAD_FAILED"), ("millm-test/unknown-arch", None, "UNSUPPORTED_ARCHITECTURE"),
    ("millm-test/remote-code", None, "TRUST_REMOTE_CODE_REQUIRED"), ("millm-test/no-weights", None, "MODEL_DOWNLOAD_FAILED"),
    ("millm-test/no-config", None, "MODEL_DOWNLOAD_FAILED"), ("a/../b", None, "INVALID_REPO_ID"), ("a//b", None, "INVALID_REPO_ID"),
    ("x--y", None, "INVALID_REPO_ID"), (".a/b", None, "INVALID_REPO_ID"), ("a/b.git", None, "INVALID_REPO_ID"), ("é/b", None, "INVALID_REPO_ID"),
]


@pytest.mark.parametrize("repo,token,code", REFUSALS)
def test_refusals(hub, tmp_path, repo, token, code):
    done = run(hub, "download", repo, tmp_path, token)
    assert done.returncode == 1 and f"millm-hub: {code}:" in done.stderr, done.stderr
    assert not (tmp_path / "huggingface").exists() or not any((tmp_path / "huggingface").iterdir())
    if token:
        assert token not in done.stderr + done.stdout


GATED, NOGRANT = "millm-test/gated", "valid, but its account has no access"
GATE = {"where": "resolve", "status": 401, "code": "GatedRepo", "message": "Please log in."}
TOKENS = [
    # the token, the faults, the error's name, what it says
    (GATED, None, [], "GATED_MODEL_NO_TOKEN", ["No access token was given", "/millm-test/gated, then give an access token"]),
    (GATED, "hf_nogrant", [], "GATED_MODEL_NO_TOKEN", [NOGRANT, "not in the authorized list", "Ask for access at", "when it is granted"]),
    (GATED, "hf_pending", [], "GATED_MODEL_NO_TOKEN", [NOGRANT, "awaiting a review"]),
    # some gates give a bad token and a missing grant the same answer: only whoami tells
    (GATED, "hf_nogrant", [GATE], "GATED_MODEL_NO_TOKEN", [NOGRANT]),
    (GATED, "hf_nogrant", [GATE, {"where": "whoami", "status": 401}], "INVALID_HF_TOKEN", ["has expired", "millm.hf_token_file"]),
    (GATED, "hf_nogrant", [GATE, {"where": "whoami", "status": 429}], "GATED_MODEL_NO_TOKEN", ["did not say whether the access token is valid"]),
    (TINY, "hf_nogrant", [{"where": "info", "status": 401}], "REPO_NOT_FOUND", ["this access token may not see it"]),
    (TINY, "hf_nogrant", [{"where": "info", "status": 401}, {"where": "whoami", "status": 503}], "REPO_NOT_FOUND", ["or it is not valid"]),
    (TINY, "hf_bad", [], "INVALID_HF_TOKEN", ["has expired"]),
    (TINY, "hf_nogrant", [{"where": "info", "status": 403, "code": "", "message": "token lacks read"}], "INVALID_HF_TOKEN", ["token lacks read"]),
]


@pytest.mark.parametrize("repo,token,fs,code,says", TOKENS, ids=[f"{t[1]}-{t[3]}-{len(t[2])}{i}" for i, t in enumerate(TOKENS)])
def test_token_errors(hub, tmp_path, repo, token, fs, code, says):
    """A bad token, a missing grant and a repository that is not there are told apart."""
    faults(hub, *fs)
    done = run(hub, "validate", repo, None, token)
    assert f"millm-hub: {code}:" in done.stderr, done.stderr
    assert all(s in done.stderr for s in says) and (token or "hf_") not in done.stderr.replace("hf_token", ""), done.stderr
    assert len([r for r in hub.log if r["path"] == "/api/whoami-v2"]) <= 1


def test_good_token(hub, tmp_path):
    assert run(hub, "download", "millm-test/gated", tmp_path, "hf_good").returncode == 0
    assert run(hub, "download", "millm-test/private", tmp_path, "hf_good").returncode == 0
    assert any(r["authorization"] for r in hub.log if r["port"] == "hub")
    assert not any(r["authorization"] for r in hub.log if r["port"] == "cdn")
    assert run(hub, "download", "millm-test/remote-code", tmp_path, None, "--trust-remote-code").returncode == 0
    for p in tmp_path.rglob("*"):
        if p.is_file() and p.name != "token-file":
            assert b"hf_good" not in p.read_bytes()


def test_unknown_revision(hub, tmp_path):
    done = run(hub, "download", TINY, tmp_path, None, "--revision", "nope")
    assert "REPO_NOT_FOUND" in done.stderr and "nope" in done.stderr
    assert "INVALID_ARGUMENT" in run(hub, "validate", TINY, None, None, "--revision", "../x").stderr


# one fault at a time; then how it ends: True arrives whole, else the error's name
FAULTS = [
    ({"where": "cdn", "kind": "truncate", "after": 300_000, "times": 2}, True),
    ({"where": "cdn", "kind": "truncate", "after": 0}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "cdn", "kind": "truncate", "after": 1000}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "cdn", "kind": "reset", "after": 300_000, "times": 1}, True),
    ({"where": "cdn", "kind": "ignore_range"}, True),
    ({"where": "cdn", "kind": "wrong_bytes", "times": 1}, True),
    ({"where": "cdn", "kind": "wrong_bytes"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "cdn", "status": 503, "times": 2}, True),
    ({"where": "cdn", "status": 503}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "cdn", "status": 403, "times": 1}, True),
    ({"where": "cdn", "status": 416, "times": 1}, True),
    ({"where": "resolve", "status": 500, "times": 2}, True),
    ({"where": "resolve", "status": 429, "retry_after": 1, "times": 1}, True),
    ({"where": "resolve", "status": 429, "retry_after": 1}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "resolve", "status": 403, "file": "model.safetensors"}, "GATED_MODEL_NO_TOKEN"),
    ({"where": "resolve", "status": 404, "file": "model.safetensors"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "resolve", "kind": "expired", "file": ".safetensors", "times": 2}, True),
    ({"where": "resolve", "kind": "wrong_size", "file": ".safetensors"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "resolve", "kind": "wrong_etag", "file": ".safetensors"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "resolve", "kind": "no_size", "file": ".safetensors"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "resolve", "kind": "no_commit"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "resolve", "kind": "wrong_commit"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "info", "status": 502, "times": 1}, True),
    ({"where": "info", "kind": "html"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "info", "kind": "loop"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "tree", "kind": "html"}, "MODEL_DOWNLOAD_FAILED"),
    ({"where": "cdn", "kind": "close", "times": 2}, True),
]


@pytest.mark.parametrize("fault,outcome", FAULTS, ids=[f"{f['where']}-{f.get('kind', f.get('status'))}-{f.get('times', 'always')}" for f, _ in FAULTS])
def test_faults(hub, tmp_path, fault, outcome):
    faults(hub, fault | {"repo": TINY})
    done = run(hub, "download", TINY, tmp_path)
    if outcome is True:
        assert done.returncode == 0, done.stderr
        same_files(tmp_path, TINY)
        return
    assert done.returncode == 1 and f"millm-hub: {outcome}:" in done.stderr, done.stderr
    # the command line keeps what is whole for the next attempt; nothing that is not proved has a name
    same_files(tmp_path, TINY) if not [n for n in leftovers(tmp_path, TINY) if n.startswith(".partial")] else None
    assert "Signature" not in done.stderr
    faults(hub)
    assert run(hub, "download", TINY, tmp_path).returncode == 0
    same_files(tmp_path, TINY)
    assert not [n for n in leftovers(tmp_path, TINY) if n.startswith(".partial")]


# --- preview


def preview(hub, repo, token=None, *more):
    done = run(hub, "preview", repo, None, token, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def n_params(repo):
    return sum(t.numel() for f in (HUB_ROOT / repo).glob("*.safetensors") for t in load_file(f).values())


def test_preview(hub, tmp_path):
    p = preview(hub, SMOL)
    assert (p["name"], p["params"], p["params_count"]) == ("SmolLM2-135M-Instruct", "135M", n_params(SMOL))
    assert (p["hidden_size"], p["num_layers"], p["context_length"], p["model_type"], p["architecture"]) == (576, 30, 8192, "llama", "LlamaForCausalLM")
    assert (p["license"], p["is_gated"], p["requires_trust_remote_code"], p["supported"], p["reason"]) == ("apache-2.0", False, False, True, None)
    assert not [r for r in hub.log if r["port"] == "cdn"], "the Hub's own count is enough"
    # what download says of the same
    for form, mb in p["estimated_sizes"].items():
        said = json.loads(run(hub, "validate", SMOL, None, None, "--quantization", form).stdout)["disk_bytes"]
        assert mb["disk_mb"] == -(-said // 2**20)
        kv = 8192 * 30 * 3 * 64 * 2 * 2 / 2**20
        assert mb["disk_mb"] + kv - 10 < mb["memory_mb"] <= mb["disk_mb"] + kv + 1
    sizes = p["estimated_sizes"]
    assert sizes["Q4"]["disk_mb"] < sizes["Q8"]["disk_mb"] < p["download_mb"]
    assert abs(sizes["FP16"]["disk_mb"] - p["download_mb"] - 49152 * (576 + 8) / 2**20) <= 1, "beside what is published lies the LM head's copy"


@pytest.mark.parametrize("repo,revision", [(SMOL, "refs/pr/1"), ("millm-test/sharded", "refs/pr/1"), ("millm-test/tiny-gpt2", "refs/pr/1")])
def test_preview_counts_from_headers(hub, repo, revision):
    """The Hub's count is of the default branch only: elsewhere a piece of each weight file is asked for, and no more than that."""
    assert preview(hub, repo, None, "--revision", revision)["params_count"] == n_params(repo)
    ranges = [r["range"] for r in hub.log if r["port"] == "cdn"]
    assert len(ranges) == len(list((HUB_ROOT / repo).glob("*.safetensors"))) and all(int(r.split("-")[1]) < 200_000 for r in ranges)
    # a hub that sends the whole is not listened to for longer
    faults(hub, {"where": "cdn", "kind": "ignore_range"})
    assert preview(hub, repo, None, "--revision", revision)["params_count"] == n_params(repo)
    faults(hub, {"where": "cdn", "kind": "truncate", "after": 100, "times": 1})
    assert preview(hub, repo, None, "--revision", revision)["params_count"] == n_params(repo)


@pytest.mark.parametrize("kind,published", [("nf4", "Q4"), ("int8", "Q8")])
def test_preview_quantized(hub, kind, published):
    """Packed codes are counted as what they stand for; there is one form only."""
    p = preview(hub, f"millm-test/tiny-{kind}")
    assert p["params_count"] == n_params(TINY) and p["quantization"] == kind
    assert {k for k, v in p["estimated_sizes"].items() if v} == {published}


def test_preview_long_header(hub, tmp_path):
    """A header that does not fit into the first piece, a damaged one, and one that is longer than its file."""
    from safetensors.torch import save_file

    root = tmp_path / "root"
    shutil.copytree(HUB_ROOT / TINY, root / "x/long")
    weights = root / "x/long/model.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights, metadata={"padding": "x" * 300_000})
    h = hub_module.start(root)
    assert preview(h, "x/long", None, "--revision", "refs/pr/1")["params_count"] == n_params(TINY)
    for damage in (b"\xff" * 8, (1 << 20).to_bytes(8, "little"), (200_000_000).to_bytes(8, "little"), b""):
        data = bytearray(weights.read_bytes())
        data[: len(damage)] = damage
        weights.write_bytes(data if damage else b"1234")
        p = preview(h, "x/long", None, "--revision", "refs/pr/1")
        assert p["supported"] is False and "invalid safetensors" in p["reason"], p


def test_preview_of_what_cannot_run(hub):
    p = preview(hub, "millm-test/unknown-arch")
    assert p["supported"] is False and "perceiver" in p["reason"] and p["params_count"] == n_params(TINY) and p["num_layers"] == 4 and p["estimated_sizes"] is None
    assert preview(hub, "millm-test/remote-code")["requires_trust_remote_code"] is True
    assert preview(hub, "millm-test/no-config")["supported"] is False
    p = preview(hub, "millm-test/gated")
    assert p["is_gated"] is True and p["supported"] is None and p["model_type"] == "llama" and p["params_count"] == n_params(TINY) and "/millm-test/gated" in p["hint"]
    assert p["hidden_size"] is None and p["license"] == "llama3"
    p = preview(hub, "millm-test/gated", "hf_good")
    assert p["is_gated"] is True and p["supported"] is True and p["hidden_size"] == 64


@pytest.mark.parametrize("repo,token,fault,code", [
    ("millm-test/missing", None, None, "REPO_NOT_FOUND"), ("a//b", None, None, "INVALID_REPO_ID"), (TINY, "hf_bad", None, "INVALID_HF_TOKEN"),
    ("millm-test/disabled", None, None, "MODEL_DOWNLOAD_FAILED"), (TINY, None, {"where": "info", "status": 503}, "HUB_UNAVAILABLE"),
    (TINY, None, {"where": "cache", "status": 500, "file": "config.json"}, "HUB_UNAVAILABLE"), (TINY, None, {"where": "info", "kind": "html"}, "MODEL_DOWNLOAD_FAILED")])
def test_preview_errors(hub, repo, token, fault, code):
    faults(hub, *([fault] if fault else []))
    done = run(hub, "preview", repo, None, token)
    assert done.returncode == 1 and f"millm-hub: {code}:" in done.stderr, done.stderr


# --- a file of several connections

BIG = "millm-test/big"


@pytest.fixture(scope="module")
def big_hub(tmp_path_factory):
    """A hub with a model of 85 MB."""
    sys.path.insert(0, str(ROOT / "bench"))
    import make_model

    make_model.SHAPES["big"] = (1024, 4096, 2, 16, 4, 64, 8000, True)
    root = tmp_path_factory.mktemp("hub")
    make_model.main("big", root / BIG)
    shutil.copy(HUB_ROOT / TINY / "tokenizer.json", root / BIG)
    assert (root / BIG / "model.safetensors").stat().st_size > 72 << 20
    yield hub_module.start(root)
    shutil.rmtree(root)


def weights_requests(hub, **which):
    return [r for r in list(hub.log) if "model.safetensors" in r["path"] and all(r[k] == v for k, v in which.items())]


def same_big(hub, cache):
    return (model_dir(cache, BIG) / "model.safetensors").read_bytes() == (hub.root / BIG / "model.safetensors").read_bytes()


def test_big(big_hub, tmp_path):
    """Each byte is asked for once, in pieces, at the one address that the hub gave each connection."""
    assert run(big_hub, "download", BIG, tmp_path).returncode == 0
    assert same_big(big_hub, tmp_path)
    asked = sorted(tuple(map(int, r["range"].split("=")[1].split("-"))) if not r["range"].endswith("-") else (int(r["range"][6:-1]), None) for r in weights_requests(big_hub, port="cdn"))
    assert len(asked) > 8 and asked[0][0] == 0 and all(a[1] + 1 == b[0] for a, b in zip(asked, asked[1:])) and asked[-1][1] is None
    assert len(weights_requests(big_hub, port="hub", method="GET")) <= 4
    shutil.rmtree(tmp_path / "huggingface")


@pytest.mark.parametrize("n", [1, 2, 16])
def test_big_connections(big_hub, tmp_path, n):
    """As many as are asked for; each asks the hub once for the address."""
    faults(big_hub)
    assert run(big_hub, "download", BIG, tmp_path, None, "--connections", n).returncode == 0
    assert same_big(big_hub, tmp_path)
    asked = [r["range"] for r in weights_requests(big_hub, port="cdn")]
    assert len(asked) == 1 if n == 1 else len(asked) >= 2 * n
    assert 1 <= len(weights_requests(big_hub, port="hub", method="GET")) <= n
    shutil.rmtree(tmp_path / "huggingface")
    for wrong in (0, 17, "x"):
        assert run(big_hub, "download", BIG, tmp_path, None, "--connections", wrong).returncode == 2


def cdn(kind, **more):
    return {"where": "cdn", "kind": kind, "file": "model.safetensors", **more}


BIG_FAULTS = [
    ([cdn("truncate", after=3_000_000, times=3)], True),
    ([cdn("truncate", after=1000)], "MODEL_DOWNLOAD_FAILED"),
    ([cdn("truncate", after=0, times=4)], True),
    ([cdn("reset", after=300_000, times=3)], True),
    ([cdn("close", times=3)], True),
    ([cdn("close")], "MODEL_DOWNLOAD_FAILED"),
    ([cdn("ignore_range")], True),
    ([cdn("ignore_range", times=1)], True),
    ([cdn("ignore_range", times=2), cdn("truncate", after=20_000_000, times=2)], True),
    ([cdn("other_part", times=4)], True),
    ([cdn("wrong_bytes", times=1)], True),
    ([cdn("wrong_bytes")], "MODEL_DOWNLOAD_FAILED"),
    ([cdn(None, status=503, times=4)], True),
    ([cdn(None, status=503)], "MODEL_DOWNLOAD_FAILED"),
    ([cdn(None, status=429, retry_after=1, times=5)], True),
    ([cdn(None, status=403, times=2)], True),
    ([cdn(None, status=416, times=1)], True),
    ([cdn(None, status=416)], "MODEL_DOWNLOAD_FAILED"),
    ([cdn(None, status=404)], "MODEL_DOWNLOAD_FAILED"),
    ([{"where": "resolve", "kind": "expired", "times": 3}], True),
    ([{"where": "resolve", "kind": "brief"}, cdn(None, bytes_per_second=30_000_000)], True),
    ([{"where": "resolve", "status": 500, "method": "GET", "file": "model.safetensors", "times": 4}], True),
]


@pytest.mark.parametrize("fs,outcome", BIG_FAULTS, ids=["+".join(f"{f['where']}-{f.get('kind') or f.get('status') or 'slow'}-{f.get('times', 'always')}" for f in fs) for fs, _ in BIG_FAULTS])
def test_big_faults(big_hub, tmp_path, fs, outcome):
    faults(big_hub, *({k: v for k, v in f.items() if v is not None} for f in fs))
    done = run(big_hub, "download", BIG, tmp_path)
    log = weights_requests(big_hub)
    faults(big_hub)
    assert "Signature" not in done.stderr and not any(r["authorization"] for r in log if r["port"] == "cdn")
    if outcome is True:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and f"millm-hub: {outcome}:" in done.stderr, done.stderr
        assert not (model_dir(tmp_path, BIG) / "model.safetensors").exists()
        assert run(big_hub, "download", BIG, tmp_path).returncode == 0
    assert same_big(big_hub, tmp_path)
    assert not [n for n in leftovers(tmp_path, BIG) if n.startswith(".partial")]
    shutil.rmtree(tmp_path / "huggingface")


def test_big_stalls(big_hub, tmp_path, serve):
    """All connections stand still; cancel does not wait for them."""
    from engine_client import HelperError

    faults(big_hub, cdn("stall", after=1 << 20, seconds=3600))
    c = serve("download", **job(big_hub, tmp_path, BIG))
    end = time.monotonic() + 20
    while len(weights_requests(big_hub, port="cdn")) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)
    start = time.monotonic()
    serve("cancel", model_uuid=UUID).result()
    print(f"canceled after {time.monotonic() - start:.3f} s")
    assert time.monotonic() - start < 15  # nobody waited for the stalled to be given up
    with pytest.raises(HelperError, match="CANCELED"):
        c.result()
    assert not model_dir(tmp_path, BIG).exists()


# --- stopped halfway


def test_killed_download_resumes(hub, tmp_path):
    """kill -9 at about half; the next one asks for the rest only, and the whole is proved."""
    size = (HUB_ROOT / SMOL / "model.safetensors").stat().st_size
    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 150_000_000})
    p = subprocess.Popen(command(hub, "download", SMOL, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    have = 0
    while have < size // 2 and time.monotonic() < end:
        have = max([f.stat().st_size for f in model_dir(tmp_path, SMOL).glob(".partial-*safetensors")] or [0]) if model_dir(tmp_path, SMOL).exists() else 0
        time.sleep(0.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    faults(hub)
    assert run(hub, "download", SMOL, tmp_path).returncode == 0
    same_files(tmp_path, SMOL)
    ranges = [int(r["range"].split("=")[1].split("-")[0]) for r in hub.log if r["port"] == "cdn" and r["range"]]
    assert ranges and ranges[0] >= size // 3, "it started over"


def test_stall_and_slow(hub, tmp_path):
    faults(hub, {"repo": TINY, "where": "info", "delay": 3, "times": 1})
    done = subprocess.run(command(hub, "validate", TINY), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0


def test_one_cache_one_owner(hub, tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = run(hub, "download", TINY, tmp_path)
    assert done.returncode == 1 and "uses it" in done.stderr
    assert run(hub, "download", TINY, tmp_path).returncode == 0


def test_nobody_listens(tmp_path):
    done = subprocess.run([MILLM_HUB, "validate", TINY, "--endpoint", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "HUB_UNAVAILABLE" in done.stderr and "Hint" in done.stderr
    done = subprocess.run([MILLM_HUB, "validate", TINY, "--endpoint", "ftp://x"], capture_output=True, text=True, timeout=60)
    assert "INVALID_ARGUMENT" in done.stderr


def test_links_are_not_followed(hub, tmp_path):
    """Somebody put a link where a model's file would go: it is replaced, not written through."""
    d = model_dir(tmp_path, TINY)
    d.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (d / "config.json").symlink_to(victim)
    assert run(hub, "download", TINY, tmp_path).returncode == 0
    assert victim.read_text() == "precious" and not (d / "config.json").is_symlink()


def wait_for_socket(path):
    """Until somebody listens there: a socket has its name before that."""
    from engine_client import Conversation

    end = time.monotonic() + 20
    while True:
        try:
            return Conversation(path).close()
        except OSError:
            assert time.monotonic() < end, "millm-hub did not start"
            time.sleep(0.01)


@pytest.fixture
def serve(tmp_path):
    """millm-hub as the supervisor runs it; returns a function that opens a conversation."""
    from engine_client import Conversation

    sock = tmp_path / "hub.sock"
    p = subprocess.Popen([MILLM_HUB, "serve", "--socket", sock], stderr=subprocess.DEVNULL)
    wait_for_socket(sock)
    yield lambda op, **fields: Conversation(sock, op, **fields)
    p.send_signal(signal.SIGTERM)
    assert p.wait(20) == 0


UUID = "01234567-89ab-cdef-0123-456789abcdef"


def job(hub, cache, repo):
    return {"endpoint": hub.endpoint, "repo_id": repo, "cache_dir": str(cache), "directory": "huggingface/" + repo.replace("/", "--") + "--FP16",
            "model_id": 1, "model_uuid": UUID, "owner_id": UUID}


def test_serve(hub, tmp_path, serve):
    from engine_client import PROGRESS, HelperError

    assert serve("validate", endpoint=hub.endpoint, repo_id=TINY).result()["params"] > 100_000
    q4 = serve("validate", endpoint=hub.endpoint, repo_id=TINY, quantization="Q4").result()
    assert q4["quantization"] == "Q4" and 0 < q4["disk_bytes"] < q4["total_bytes"] + 100_000 and q4["prequantized"] is None
    with pytest.raises(HelperError, match="INVALID_ARGUMENT.*nf5"):
        serve("validate", endpoint=hub.endpoint, repo_id=TINY, quantization="nf5").result()
    with pytest.raises(HelperError, match="nonsense"):
        serve("validate", endpoint=hub.endpoint, repo_id=TINY, nonsense=1).result()
    with pytest.raises(HelperError, match="repo_id"):
        serve("validate", endpoint=hub.endpoint).result()
    frames = list(serve("download", **job(hub, tmp_path, TINY)).frames())
    progress = [f for kind, f in frames if kind == PROGRESS]
    assert progress[0]["stage"] == "resolving" and [f["bytes"] for f in progress] == sorted(f["bytes"] for f in progress)
    result = frames[-1][1]
    assert result["path"] == str(model_dir(tmp_path, TINY)) and result["config"]["model_type"] == "llama"
    assert serve("inspect", path=result["path"]).result()["params"] == result["params"]
    # somebody else's directory is not removed; ours is, whole
    other = "99999999-89ab-cdef-0123-456789abcdef"
    assert serve("remove", cache_dir=str(tmp_path), directory=job(hub, tmp_path, TINY)["directory"], model_uuid=other).result() == {"removed": False}
    assert leftovers(tmp_path, TINY)
    assert serve("remove", cache_dir=str(tmp_path), directory=job(hub, tmp_path, TINY)["directory"], model_uuid=UUID).result() == {"removed": True}
    assert not model_dir(tmp_path, TINY).exists() and not any((tmp_path / ".trash").iterdir())


def test_serve_preview(hub, serve):
    """Ends with its connection."""
    from engine_client import HelperError

    assert serve("preview", endpoint=hub.endpoint, repo_id=TINY).result()["params_count"] == n_params(TINY)
    with pytest.raises(HelperError, match="quantization"):
        serve("preview", endpoint=hub.endpoint, repo_id=TINY, quantization="Q4").result()
    faults(hub, {"where": "info", "delay": 20})
    with pytest.raises(HelperError, match="HUB_UNAVAILABLE"):
        serve("preview", endpoint=hub.endpoint, repo_id=TINY, timeout_ms=200).result()
    # eight at a time is all there is: these are gone when they are not wanted any more
    for _ in range(2):
        for c in [serve("preview", endpoint=hub.endpoint, repo_id=TINY) for _ in range(8)]:
            c.close()
        time.sleep(2)
    faults(hub)
    assert serve("preview", endpoint=hub.endpoint, repo_id=TINY).result()["supported"] is True


def test_serve_errors_leave_nothing(hub, tmp_path, serve):
    from engine_client import HelperError

    faults(hub, {"repo": TINY, "where": "cdn", "kind": "wrong_bytes"})
    with pytest.raises(HelperError, match="MODEL_DOWNLOAD_FAILED.*wrong content"):
        serve("download", **job(hub, tmp_path, TINY)).result()
    assert not model_dir(tmp_path, TINY).exists()


def test_cancel_within_a_second(hub, tmp_path, serve):
    from engine_client import HelperError

    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 20_000_000})
    c = serve("download", **job(hub, tmp_path, SMOL))
    while c.receive()[1].get("bytes", 0) < 5_000_000:
        pass
    assert serve("status").result()["job"] == UUID
    with pytest.raises(HelperError, match="SERVER_BUSY"):
        serve("download", **job(hub, tmp_path, TINY)).result()
    start = time.monotonic()
    assert serve("cancel", model_uuid=UUID).result() == {}
    print(f"canceled after {time.monotonic() - start:.3f} s")
    assert time.monotonic() - start < 20
    assert not model_dir(tmp_path, SMOL).exists()
    with pytest.raises(HelperError, match="CANCELED"):
        c.result()


def test_lost_connection_keeps_what_came(hub, tmp_path, serve):
    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 40_000_000})
    c = serve("download", **job(hub, tmp_path, SMOL))
    while c.receive()[1].get("bytes", 0) < 10_000_000:
        pass
    c.close()
    end = time.monotonic() + 20
    while serve("status").result()["state"] != "idle" and time.monotonic() < end:
        time.sleep(0.05)
    assert [n for n in leftovers(tmp_path, SMOL) if n.startswith(".partial")]
    faults(hub)
    assert serve("download", **job(hub, tmp_path, SMOL)).result()["disk_bytes"] > 200_000_000
    same_files(tmp_path, SMOL)
    assert min(int(r["range"][6:].split("-")[0]) for r in weights_requests(hub, port="cdn", method="GET")) > 5_000_000, "it started over"


def test_progress_never_goes_back(hub, tmp_path, serve):
    """Neither when the content was wrong and comes again, nor when kept bytes turn out to be too many."""
    from engine_client import PROGRESS

    d = model_dir(tmp_path, SMOL)
    published = json.loads(run(hub, "validate", SMOL).stdout)["total_bytes"]
    faults(hub, {"repo": SMOL, "where": "cdn", "kind": "wrong_bytes", "times": 1, "bytes_per_second": 150_000_000})
    for _ in range(2):
        c = serve("download", **job(hub, tmp_path, SMOL))
        seen, result = [], None
        for kind, frame in c.frames():
            if kind == PROGRESS:
                seen.append(frame)
            else:
                result = frame
        numbers = [f["bytes"] for f in seen]
        assert numbers == sorted(numbers) and numbers[0] >= 0 and numbers[-1] <= published < result["disk_bytes"]
        assert {f["total_bytes"] for f in seen if f["stage"] == "downloading"} <= {published}
        same_files(tmp_path, SMOL)
        # again, with a partial that is longer than the file
        whole = d / "model.safetensors"
        sha = hashlib.sha256(whole.read_bytes()).hexdigest()
        with open(whole, "ab") as f:
            f.write(b"x" * 4096)
        whole.rename(d / f".partial-{sha[:16]}-model.safetensors")


# --- a hub that keeps failing is left alone


@pytest.fixture
def brief_serve(tmp_path):
    """millm-hub that leaves a failing hub alone for two seconds at first; returns (a function that opens a conversation, the log's path)."""
    from engine_client import Conversation

    sock, log = tmp_path / "brief.sock", tmp_path / "log"
    with open(log, "w") as f:
        p = subprocess.Popen([MILLM_HUB, "serve", "--socket", sock, "--breaker-ms", "2000"], stderr=f)
    wait_for_socket(sock)
    yield (lambda op, **fields: Conversation(sock, op, **fields)), log
    p.send_signal(signal.SIGTERM)
    assert p.wait(20) == 0


def wait_breaker(serve, state, seconds=20):
    end = time.monotonic() + seconds
    while not (now := serve("status").result()["circuit_breaker"]).startswith(state) and time.monotonic() < end:
        time.sleep(0.02)
    assert now.startswith(state)
    return now


def test_breaker(hub, tmp_path, brief_serve):
    from engine_client import HelperError

    serve, log = brief_serve

    def validate(repo=TINY):
        return serve("validate", endpoint=hub.endpoint, repo_id=repo).result()

    assert serve("status").result()["circuit_breaker"] == "closed"
    faults(hub, {"where": "info", "status": 404, "code": "RepoNotFound", "times": 3}, {"where": "info", "status": 429, "times": 3})
    for _ in range(6):  # refusals are answers
        with pytest.raises(HelperError):
            validate()
    faults(hub, {"where": "info", "status": 503})
    for _ in range(5):
        with pytest.raises(HelperError, match="HUB_UNAVAILABLE"):
            validate()
    assert "UTC" in wait_breaker(serve, "open until 20")
    n = len(hub.log)
    with pytest.raises(HelperError, match="HUB_UNAVAILABLE.*left alone.*5 requests"):
        validate()
    assert len(hub.log) == n, "it was asked"
    wait_breaker(serve, "half-open")
    with pytest.raises(HelperError, match="could not serve"):  # the one that tries, and the only one
        validate()
    assert len(hub.log) == n + 1
    wait_breaker(serve, "open until 20")
    faults(hub)
    with pytest.raises(HelperError, match="left alone"):  # it has not been asked, so nobody knows that it is well
        validate()
    wait_breaker(serve, "half-open")
    assert validate()["gated"] is False
    assert serve("status").result()["circuit_breaker"] == "closed"
    lines = log.read_text()
    assert "WARNING 5 requests to " in lines and "(status 503)" in lines and "answers again" in lines


def test_breaker_and_downloads(hub, tmp_path, brief_serve):
    """A download waits for the next try, also one that is under way, and can be canceled meanwhile."""
    from engine_client import HelperError

    serve, _ = brief_serve
    faults(hub, {"where": "info", "kind": "close"})
    for _ in range(5):
        with pytest.raises(HelperError, match="HUB_UNAVAILABLE"):
            serve("preview", endpoint=hub.endpoint, repo_id=TINY, timeout_ms=500).result()
        if serve("status").result()["circuit_breaker"] != "closed":
            break
    wait_breaker(serve, "open until")
    faults(hub)
    assert serve("download", **job(hub, tmp_path, TINY)).result()["disk_bytes"] > 0
    same_files(tmp_path, TINY)
    # a cancel does not wait
    faults(hub, {"where": "info", "status": 500})
    shutil.rmtree(tmp_path / "huggingface")
    for _ in range(5):
        with pytest.raises(HelperError, match="HUB_UNAVAILABLE"):
            serve("validate", endpoint=hub.endpoint, repo_id=TINY).result()
    c = serve("download", **job(hub, tmp_path, TINY))
    c.receive()
    start = time.monotonic()
    serve("cancel", model_uuid=UUID).result()
    assert time.monotonic() - start < 20
    with pytest.raises(HelperError, match="CANCELED"):
        c.result()


def test_breaker_under_way(big_hub, tmp_path, brief_serve):
    """Five failures of four connections open it in the midst of a file: the download waits for the next try, then goes on."""
    serve, log = brief_serve
    # until it is open: a success of one connection between the failures of the others would count them anew
    faults(big_hub, {"where": "resolve", "status": 500, "method": "GET", "file": "model.safetensors"})
    download = serve("download", **job(big_hub, tmp_path, BIG))
    end = time.monotonic() + 60
    while "have failed in a row" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    faults(big_hub)
    download.result()
    assert "answers again" in log.read_text()
    assert same_big(big_hub, tmp_path)
    shutil.rmtree(tmp_path / "huggingface")


OTHER = "99999999-89ab-cdef-0123-456789abcdef"


def test_another_models_directory_is_safe(hub, tmp_path, serve):
    """A finished directory belongs to its uuid: neither the download of another registry's model of that name nor its failure touches it."""
    from engine_client import HelperError

    for i in range(20):  # a download that has been answered is no longer in the way of the next
        serve("download", **(job(hub, tmp_path, TINY) | {"directory": f"huggingface/many-{i}"})).result()
    serve("download", **job(hub, tmp_path, TINY)).result()
    before = {n: (model_dir(tmp_path, TINY) / n).stat().st_mtime_ns for n in leftovers(tmp_path, TINY)}
    with pytest.raises(HelperError, match="MODEL_ALREADY_EXISTS"):
        serve("download", **(job(hub, tmp_path, TINY) | {"model_uuid": OTHER, "owner_id": OTHER})).result()
    # nor does a failure of its own second attempt
    faults(hub, {"repo": TINY, "where": "info", "status": 404, "code": "RepoNotFound"})
    with pytest.raises(HelperError, match="REPO_NOT_FOUND"):
        serve("download", **job(hub, tmp_path, TINY)).result()
    assert before == {n: (model_dir(tmp_path, TINY) / n).stat().st_mtime_ns for n in leftovers(tmp_path, TINY)}


def interrupted(hub, cache, serve, at=10_000_000):
    """A download whose connection is lost after some bytes; what came is kept."""
    faults(hub, {"repo": SMOL, "where": "cdn", "bytes_per_second": 100_000_000})
    c = serve("download", **job(hub, cache, SMOL))
    while c.receive()[1].get("bytes", 0) < at:
        pass
    c.close()
    faults(hub)


def test_the_next_download_waits_for_a_stopping_one(hub, tmp_path, serve):
    interrupted(hub, tmp_path, serve)
    assert serve("download", **job(hub, tmp_path, SMOL)).result()["disk_bytes"] > 200_000_000
    same_files(tmp_path, SMOL)


def test_unfinished_is_removed_by_its_uuid_only(hub, tmp_path, serve):
    from engine_client import HelperError

    interrupted(hub, tmp_path, serve)
    end = time.monotonic() + 20
    while serve("status").result()["state"] != "idle" and time.monotonic() < end:
        time.sleep(0.05)
    where = {"cache_dir": str(tmp_path), "directory": job(hub, tmp_path, SMOL)["directory"]}
    assert serve("remove", **where, model_uuid=OTHER).result() == {"removed": False}
    assert leftovers(tmp_path, SMOL)
    assert serve("remove", **where, model_uuid=UUID).result() == {"removed": True}
    assert serve("remove", **where, model_uuid=UUID).result() == {"removed": False}
    assert not model_dir(tmp_path, SMOL).exists() and not any((tmp_path / ".trash").iterdir())
    # a resumed attempt that fails before it has chosen files leaves nothing either
    interrupted(hub, tmp_path, serve)
    faults(hub, {"repo": SMOL, "where": "info", "status": 404, "code": "RepoNotFound"})
    with pytest.raises(HelperError, match="REPO_NOT_FOUND"):
        serve("download", **job(hub, tmp_path, SMOL)).result()
    assert not model_dir(tmp_path, SMOL).exists()
    for directory in ("../x", "huggingface/..", "huggingface/../../x", "/etc/x", "huggingface//x", "", ".trash/x"):
        with pytest.raises(HelperError, match="INVALID_ARGUMENT"):
            serve("remove", cache_dir=str(tmp_path), directory=directory, model_uuid=UUID).result()
        with pytest.raises(HelperError, match="INVALID_ARGUMENT"):
            serve("download", **(job(hub, tmp_path, TINY) | {"directory": directory})).result()


# --- files that are here already


def hf_cache(cache, repo, links=True, commit="0" * 40):
    """What the genuine client would have left of a repository."""
    d = cache / ("models--" + repo.replace("/", "--"))
    (d / "blobs").mkdir(parents=True)
    (d / "snapshots" / commit).mkdir(parents=True)
    for f in (HUB_ROOT / repo).iterdir():
        blob = hub_module.Blob(f)
        name = blob.sha256 if blob.lfs else blob.sha1
        if links:
            shutil.copy(f, d / "blobs" / name)
            (d / "snapshots" / commit / f.name).symlink_to(f"../../blobs/{name}")
        else:
            shutil.copy(f, d / "snapshots" / commit / f.name)
    return d


def fetched(hub):
    return sorted({r["path"].split("?")[0].rsplit("/", 1)[1] for r in hub.log if r["method"] == "GET" and ("/resolve" in r["path"] or r["port"] == "cdn")})


def cached(hub, tmp_path, repo=TINY, *more):
    faults(hub)
    done = run(hub, "download", repo, tmp_path / "cache", None, "--hf-cache", tmp_path / "hf", *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("links", [True, False])
def test_huggingface_cache(hub, tmp_path, links):
    """Files of the user's cache are linked, not fetched; only what the plan is made of is read from the Hub."""
    commit = json.loads(run(hub, "validate", TINY).stdout)["commit"]
    d = hf_cache(tmp_path / "hf", TINY, links, commit)
    said = cached(hub, tmp_path)
    assert fetched(hub) == ["config.json"] and "is taken from" in said
    same_files(tmp_path / "cache", TINY)
    ours = model_dir(tmp_path / "cache", TINY) / "model.safetensors"
    assert any(f.stat().st_ino == ours.stat().st_ino for f in (d / "blobs").iterdir()) == links
    assert any(f.stat().st_ino == ours.stat().st_ino for f in (d / "snapshots" / commit).iterdir())


def test_huggingface_cache_quantized(hub, tmp_path):
    """The quantizer reads from there what it would have read from the Hub."""
    hf_cache(tmp_path / "hf", SMOL)
    cached(hub, tmp_path, SMOL, "--quantization", "Q4")
    assert fetched(hub) == ["config.json"]
    other = tmp_path / "other"
    assert run(hub, "download", SMOL, other, None, "--quantization", "Q4").returncode == 0
    for f in (other / "huggingface" / (SMOL.replace("/", "--") + "--Q4")).iterdir():
        if f.name != ".millm_meta.json":
            assert f.read_bytes() == (tmp_path / "cache/huggingface" / f.parent.name / f.name).read_bytes(), f.name


def test_huggingface_cache_is_not_believed(hub, tmp_path):
    """A damaged blob, one of another length, links that lead elsewhere, a FIFO: the Hub has the file too."""
    d = hf_cache(tmp_path / "hf", TINY)
    weights = d / "blobs" / hub_module.Blob(HUB_ROOT / TINY / "model.safetensors").sha256
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = cached(hub, tmp_path)
    assert fetched(hub) == ["config.json", "model.safetensors"] and "WARNING" in said and "is damaged in" in said
    same_files(tmp_path / "cache", TINY)
    for form in ("FP16", "Q4"):
        shutil.rmtree(tmp_path / "cache")
        weights.write_bytes(b"\0" * len(data))
        cached(hub, tmp_path, TINY, "--quantization", form)
        assert "model.safetensors" in fetched(hub)
    outside = tmp_path / "outside"
    outside.write_bytes(data)

    def short():
        weights.write_bytes(data[:-1])

    def link():
        weights.symlink_to(outside)

    def fifo():
        os.mkfifo(weights)

    def linked_directory():
        weights.write_bytes(data)
        (d / "blobs").rename(tmp_path / "blobs")
        (d / "blobs").symlink_to(tmp_path / "blobs")

    for damage in (short, link, fifo, linked_directory):
        shutil.rmtree(tmp_path / "cache")
        weights.unlink()
        damage()
        cached(hub, tmp_path)
        assert "model.safetensors" in fetched(hub), damage
        same_files(tmp_path / "cache", TINY)


def test_huggingface_cache_of_another_device(hub, tmp_path):
    """Where no link is possible a copy is made; a file that others could change is copied too."""
    d = hf_cache(tmp_path / "hf", TINY)
    for f in (d / "blobs").iterdir():
        f.chmod(0o666)
    cached(hub, tmp_path)
    assert fetched(hub) == ["config.json"]
    same_files(tmp_path / "cache", TINY)
    inodes = {f.stat().st_ino for f in (d / "blobs").iterdir()}
    assert not any(f.stat().st_ino in inodes for f in model_dir(tmp_path / "cache", TINY).iterdir())


@pytest.mark.parametrize("form", ["FP16", "Q4"])
def test_directory_of_a_model_that_is_gone(hub, tmp_path, serve, form):
    """Taken over by the same registry or the same cluster, proved file by file; a stranger's stays a stranger's."""
    from engine_client import HelperError

    third = "77777777-89ab-cdef-0123-456789abcdef"
    mine = job(hub, tmp_path, TINY) | {"cluster": "12345", "quantization": form}
    serve("download", **mine).result()
    d = model_dir(tmp_path, TINY)
    ours = (d / "model.safetensors").stat()
    for stranger in ({"owner_id": third, "cluster": "678"}, {"owner_id": third}):
        with pytest.raises(HelperError, match="MODEL_ALREADY_EXISTS"):
            serve("download", **(mine | {"cluster": None, "model_uuid": OTHER} | stranger)).result()
    # a failure leaves it as it was
    faults(hub, {"repo": TINY, "where": "resolve", "status": 404, "file": "tokenizer.json"})
    damaged = (d / "tokenizer.json").read_bytes()
    (d / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(HelperError, match="MODEL_DOWNLOAD_FAILED"):
        serve("download", **(mine | {"model_uuid": OTHER})).result()
    assert json.loads((d / ".millm_meta.json").read_text())["uuid"] == UUID and not [n for n in leftovers(tmp_path, TINY) if n.startswith(".partial")]
    # the same registry; then the same cluster with another registry: an extension that was dropped and created
    for heir in ({"model_uuid": OTHER, "cluster": "678"}, {"model_uuid": third, "cluster": "678", "owner_id": third}):
        faults(hub)
        result = serve("download", **(mine | heir)).result()
        assert json.loads((d / ".millm_meta.json").read_text())["uuid"] == heir["model_uuid"]
        assert "model.safetensors" not in fetched(hub) and (d / "model.safetensors").stat().st_ino == ours.st_ino
        assert (d / "tokenizer.json").read_bytes() == damaged and result["bytes"] < 400_000
    # the old model's end is not its end
    assert serve("remove", cache_dir=str(tmp_path), directory=mine["directory"], model_uuid=UUID).result() == {"removed": False}
    assert serve("remove", cache_dir=str(tmp_path), directory=mine["directory"], model_uuid=third).result() == {"removed": True}


def test_directory_of_the_command_line(hub, tmp_path, serve):
    """What millm-hub has downloaded by itself is the server's when that wants it."""
    assert run(hub, "download", TINY, tmp_path).returncode == 0
    faults(hub)
    assert serve("download", **job(hub, tmp_path, TINY)).result()["bytes"] == 0
    assert fetched(hub) == ["config.json"]
