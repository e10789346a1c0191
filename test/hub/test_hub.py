"""The test hub against the genuine huggingface_hub client: what it cannot fool, it is no test of ours."""
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hub as hub_module  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HUB_ROOT = ROOT / ".fixtures/hub"


@pytest.fixture(scope="module")
def hub():
    return hub_module.start(HUB_ROOT)


def faults(hub, *fs):
    urllib.request.urlopen(urllib.request.Request(hub.endpoint + "/_faults", json.dumps(list(fs)).encode(), method="POST")).read()


@pytest.fixture(autouse=True)
def no_faults(hub):
    faults(hub)
    yield
    faults(hub)


def client(hub, tmp_path, code, token=None):
    """Run code in a process of its own with the client set up for this hub; returns (exit status, output)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
    if token:
        env["HF_TOKEN"] = token
    done = subprocess.run([sys.executable, "-c", "from huggingface_hub import *\nfrom huggingface_hub import errors\n" + code], env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def error_of(hub, tmp_path, repo, token=None):
    code, out = client(hub, tmp_path, f"""
try:
    snapshot_download("{repo}")
    print("NONE")
except Exception as e:
    print("CLASSES", [c.__name__ for c in type(e).__mro__])
""", token)
    assert code == 0, out
    return out


def test_downloads_whole_repository(hub, tmp_path):
    code, out = client(hub, tmp_path, 'print(snapshot_download("millm-test/tiny-llama"))')
    assert code == 0, out
    got = Path(out.strip().splitlines()[-1])
    want = HUB_ROOT / "millm-test/tiny-llama"
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in want.iterdir())
    for p in want.iterdir():
        assert (got / p.name).read_bytes() == p.read_bytes()
    assert not any(r["authorization"] for r in hub.log if r["port"] == "cdn")
    hub.log.clear()
    # the second time nothing is fetched
    code, _ = client(hub, tmp_path, 'snapshot_download("millm-test/tiny-llama")')
    assert code == 0 and not [r for r in hub.log if r["method"] == "GET" and "/resolve" in r["path"]]


def test_single_name_pages_and_shards(hub, tmp_path):
    assert client(hub, tmp_path, 'snapshot_download("tiny-single"); print("OK")')[1].strip().endswith("OK")
    code, out = client(hub, tmp_path, 'print(len(list(HfApi().list_repo_tree("millm-test/sharded"))), get_safetensors_metadata("millm-test/sharded").parameter_count)')
    assert code == 0, out
    n, counts = out.strip().splitlines()[-1].split(" ", 1)
    assert int(n) == len(list((HUB_ROOT / "millm-test/sharded").iterdir()))
    assert eval(counts)["F32"] > 100_000


def test_metadata(hub, tmp_path):
    code, out = client(hub, tmp_path, 'i = model_info("millm-test/tiny-llama", files_metadata=True); print(i.sha, i.safetensors.total, [s for s in i.siblings if s.lfs][0].lfs.sha256)')
    assert code == 0, out
    sha, total, sha256 = out.split()[-3:]
    assert len(sha) == 40 and int(total) > 100_000 and len(sha256) == 64
    assert client(hub, tmp_path, 'snapshot_download("millm-test/tiny-llama", revision="refs/pr/1")')[0] == 0
    assert "somebody" in client(hub, tmp_path, "print(whoami())", "hf_good")[1]


def test_renamed(hub, tmp_path):
    code, out = client(hub, tmp_path, 'print(snapshot_download("millm-test/old-name"))')
    assert code == 0 and "old-name" in out


def test_errors(hub, tmp_path):
    assert "GatedRepoError" in error_of(hub, tmp_path, "millm-test/gated")
    assert "GatedRepoError" in error_of(hub, tmp_path, "millm-test/gated", "hf_nogrant")
    assert "NONE" in error_of(hub, tmp_path, "millm-test/gated", "hf_good")
    assert "RepositoryNotFoundError" in error_of(hub, tmp_path, "millm-test/missing", "hf_good")
    assert "RepositoryNotFoundError" in error_of(hub, tmp_path, "millm-test/private", "hf_nogrant")
    # without a token a missing repository is a bare 401; over http the genuine client does not know it for what it is
    assert "HfHubHTTPError" in error_of(hub, tmp_path, "millm-test/missing")
    assert "HfHubHTTPError" in error_of(hub, tmp_path, "millm-test/tiny-llama", "hf_bad")
    code, out = client(hub, tmp_path, """
try:
    hf_hub_download("millm-test/tiny-llama", "nothing.json")
except errors.EntryNotFoundError as e: print("ENTRY")
try:
    model_info("millm-test/tiny-llama", revision="nope")
except errors.RevisionNotFoundError as e: print("REVISION")
""")
    assert "ENTRY" in out and "REVISION" in out, out


def test_gated_masks_hashes(hub, tmp_path):
    code, out = client(hub, tmp_path, 'print([s.lfs.sha256 for s in model_info("millm-test/gated", files_metadata=True).siblings if s.lfs])')
    assert "****" in out
    assert "****" not in client(hub, tmp_path, 'print([s.lfs.sha256 for s in model_info("millm-test/gated", files_metadata=True).siblings if s.lfs])', "hf_good")[1]


SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("kind,calls", [("stall", 1), ("truncate", 2)])
def test_resumes(hub, tmp_path, kind, calls):
    """After 30 MB the body stands still, or ends. This client asks for the rest at once, or in its next call."""
    faults(hub, {"repo": SMOL, "where": "cdn", "kind": kind, "after": 30 << 20, "seconds": 4, "times": 1})
    for call in range(calls):
        code, out = client(hub, tmp_path, f'print("PATH", hf_hub_download("{SMOL}", "model.safetensors"))')
        assert (code == 0) == (call == calls - 1), out
    path = Path(next(line for line in out.splitlines() if line.startswith("PATH")).split(" ", 1)[1])
    assert path.read_bytes() == (HUB_ROOT / SMOL / "model.safetensors").read_bytes()
    assert any(r["range"] for r in hub.log if r["port"] == "cdn")


def test_stalls_at_a_byte(hub):
    """Whatever the parts: no byte of the file from there on."""
    path, at = "millm-test/tiny-llama/resolve/main/model.safetensors", 5000
    faults(hub, {"where": "cdn", "kind": "stall", "at": at, "seconds": 60})
    for start in (0, 4000, at + 1):
        request = urllib.request.Request(f"{hub.endpoint}/{path}", headers={"Range": f"bytes={start}-"})
        with urllib.request.urlopen(request, timeout=1) as answer:
            assert len(answer.read(max(0, at - start))) == max(0, at - start)
            with pytest.raises(TimeoutError):
                answer.read(1)


def test_wrong_size_is_noticed(hub, tmp_path):
    faults(hub, {"repo": "millm-test/tiny-llama", "where": "resolve", "kind": "wrong_size", "file": ".safetensors"})
    assert "OSError" in error_of(hub, tmp_path, "millm-test/tiny-llama")


def test_throttle(hub, tmp_path):
    """So much through all connections together."""
    import threading
    import time

    size = (HUB_ROOT / "millm-test/tiny-llama/model.safetensors").stat().st_size
    faults(hub, {"repo": "millm-test/tiny-llama", "where": "cdn", "bytes_per_second": size})
    url = f"{hub.endpoint}/millm-test/tiny-llama/resolve/main/model.safetensors"
    start = time.monotonic()
    threads = [threading.Thread(target=lambda: urllib.request.urlopen(url).read()) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert time.monotonic() - start > 1.5  # two, less what may be made up for


@pytest.mark.parametrize("fault", [{"kind": "trunctate"}, {"kind": "truncate"}, {"kind": "stall", "at": 1, "after": 1}, {"where": "moon"}, {"after": "x"}, {"bytes_per_second": 0}, {"often": 1}, 3])
def test_impossible_faults_are_refused(hub, fault):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        faults(hub, fault)
