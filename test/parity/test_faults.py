"""Every way in which a hub can fail, for FP16 and Q4, as the server sees it: millm-hub serves, and a download ends whole or leaves nothing.

Each case has a process of its own and one of a few hubs to itself, and most of its time is waiting (for backoffs, for what stands still): so
all cases that are asked for run at once, and each test reads how its own has ended.
"""
import hashlib
import json
import os
import queue
import random
import shutil
import signal
import struct
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_client import Conversation, HelperError
from test_hub_client import FAULTS, HUB_ROOT, MILLM_HUB, TINY, UUID, faults, hub_module, wait_for_socket

N_AT_ONCE = 20
FORMS = ("FP16", "Q4")
F16, SHARDED, GATED, OLD_NAME = "millm-test/tiny-f16", "millm-test/sharded", "millm-test/gated", "millm-test/old-name"
FAILED = "MODEL_DOWNLOAD_FAILED"


def content(path):
    """A file's bytes, hashed; of safetensors without their metadata, which name the source's hash when it came from a hub."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return hashlib.sha256(data).hexdigest()
    n, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    return header, hashlib.sha256(data[8 + n:]).hexdigest()


class Clean:
    """What a repository's files should be, from the published ones without any hub.  test_quantize judges `millm-hub quantize` itself."""

    def __init__(self, directory):
        self.directory, self.made, self.lock = directory, {}, threading.Lock()

    def __call__(self, repo, form):
        repo = {OLD_NAME: TINY}.get(repo, repo)
        with self.lock:
            if (repo, form) not in self.made:
                out = self.directory / f"{repo.replace('/', '--')}--{form}"
                subprocess.run([MILLM_HUB, "quantize", HUB_ROOT / repo, "--quantization", form, "--output", out], check=True, capture_output=True, timeout=60)
                self.made[repo, form] = {p.name: content(p) for p in out.iterdir() if p.name != ".millm_meta.json"}
            return self.made[repo, form]


class Case:
    """One cache and one millm-hub, which leaves a failing hub alone only briefly and waits only 5 s for one that stands still."""

    def __init__(self, hub, directory, repo, form, token=None):
        self.hub, self.cache, self.repo, self.form, self.token = hub, directory / "cache", repo, form, token
        self.cache.mkdir(parents=True)
        self.socket, self.log_path = directory / "s", directory / "log"
        with open(self.log_path, "w") as f:
            self.process = subprocess.Popen([MILLM_HUB, "serve", "--socket", self.socket, "--breaker-ms", "200", "--stall-s", "5"], stderr=f)
        wait_for_socket(self.socket)

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0

    @property
    def model(self):
        return self.cache / "huggingface" / f"{self.repo.replace('/', '--')}--{self.form}"

    def start(self):
        job = {"endpoint": self.hub.endpoint, "repo_id": self.repo, "cache_dir": str(self.cache), "directory": str(self.model.relative_to(self.cache)),
               "quantization": self.form, "model_id": 1, "model_uuid": UUID, "owner_id": UUID, "token": self.token}
        return Conversation(self.socket, "download", 180, **{k: v for k, v in job.items() if v is not None})

    def download(self):
        """None when it has arrived, else the HelperError."""
        try:
            self.start().result()
        except HelperError as e:
            return e

    def check_right(self, clean):
        expected = clean(self.repo, self.form)
        meta = json.loads((self.model / ".millm_meta.json").read_text())
        there = {p.name: content(p) for p in self.model.iterdir() if p.name != ".millm_meta.json"}
        assert there.keys() == expected.keys()
        assert not [n for n in there if there[n] != expected[n]]
        for name, said in meta["files"].items():
            published = (HUB_ROOT / {OLD_NAME: TINY}.get(self.repo, self.repo) / name).read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(published) + published).hexdigest()
            assert said["size"] == len(published) and said["hash"] in (hashlib.sha256(published).hexdigest(), git), name

    def check_nothing_left(self):
        assert not [p for p in self.cache.rglob("*") if p.name not in (".lock", ".trash", "huggingface")]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return Clean(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def pool():
    """Runs sub(hub, *args) with a hub that nobody else uses meanwhile."""
    hubs = queue.SimpleQueue()
    for _ in range(N_AT_ONCE):
        hubs.put(hub_module.start(HUB_ROOT))

    def with_hub(sub, *args):
        hub = hubs.get()
        try:
            return sub(hub, *args)
        finally:
            faults(hub)
            hubs.put(hub)

    with ThreadPoolExecutor(N_AT_ONCE) as executor:
        yield lambda sub, *args: executor.submit(with_hub, sub, *args)


def at(where, kind=None, **more):
    return {"where": where, **({"kind": kind} if kind else {}), **more}


# name, repo, token, faults; then how it ends: True arrives, else the error's name
MATRIX = [(f"{n}-{f['where']}-{f.get('kind', f.get('status'))}-{f.get('times', 'always')}", TINY, None, [f], outcome) for n, (f, outcome) in enumerate(FAULTS)] + [
    ("stalls-once", F16, None, [at("cdn", "stall", after=100_000, seconds=60, times=1)], True),
    ("stalls-always", F16, None, [at("cdn", "stall", after=1000, seconds=60)], FAILED),
    ("slow", F16, None, [at("cdn", bytes_per_second=100_000)], True),
    ("slow-answers", TINY, None, [at("any", delay=0.3)], True),
    ("truncated-often", TINY, None, [at("cdn", "truncate", after=70_000)], True),
    ("truncated-small-file", TINY, None, [at("cache", "truncate", after=20, times=2)], True),
    ("reset-often", TINY, None, [at("cdn", "reset", after=70_000)], True),
    ("reset-always", TINY, None, [at("cdn", "reset", after=1000)], FAILED),
    ("reset-last-shard", SHARDED, None, [at("cdn", "reset", after=1000, file="00006-of-00006.safetensors")], FAILED),
    ("wrong-bytes-last-shard", SHARDED, None, [at("cdn", "wrong_bytes", file="00006-of-00006.safetensors")], FAILED),
    ("wrong-bytes-small-file", TINY, None, [at("cache", "wrong_bytes", file="tokenizer.json")], FAILED),
    ("wrong-part", TINY, None, [at("cdn", "truncate", after=300_000, times=1), at("cdn", "other_part", times=1)], True),
    ("whole-to-a-range", TINY, None, [at("cdn", "truncate", after=300_000, times=1), at("cdn", "ignore_range")], True),
    ("whole-to-a-range-truncated", TINY, None, [at("cdn", "truncate", after=300_000, times=1), at("cdn", "ignore_range", times=1), at("cdn", "truncate", after=200_000, times=2)], True),
    *((f"{where}-{status}-always", TINY, None, [at(where, status=status)], outcome) for where, status, outcome in [
        ("info", 401, "REPO_NOT_FOUND"), ("info", 404, FAILED), ("tree", 404, FAILED), ("info", 500, FAILED), ("tree", 503, FAILED),
        ("resolve", 401, "REPO_NOT_FOUND"), ("resolve", 500, FAILED), ("resolve", 503, FAILED), ("cdn", 401, FAILED), ("cdn", 403, FAILED),
        ("cdn", 404, FAILED), ("cdn", 416, FAILED), ("cdn", 429, FAILED), ("cdn", 500, FAILED), ("cache", 503, FAILED)]),
    ("repo-gone", TINY, None, [at("info", status=404, code="RepoNotFound")], "REPO_NOT_FOUND"),
    ("revision-gone", TINY, None, [at("tree", status=404, code="RevisionNotFound")], "REPO_NOT_FOUND"),
    ("flapping", TINY, None, [at("any", status=503, every=3)], True),
    ("flapping-body", SHARDED, None, [at("cdn", "reset", after=1000, every=2)], True),
    ("flapping-connections", TINY, None, [at("any", "close", every=3)], True),
    *((f"loop-{where}", TINY, None, [at(where, "loop")], FAILED) for where in ("tree", "resolve", "cache")),
    *((f"elsewhere-{where}", GATED, "hf_good", [at(where, "elsewhere")], FAILED) for where in ("info", "tree", "resolve")),
    ("elsewhere-cache", TINY, "hf_good", [at("cache", "elsewhere")], FAILED),
    ("renamed", OLD_NAME, None, [], True),
    ("renamed-reset", OLD_NAME, None, [at("cdn", "reset", after=300_000, times=1)], True),
    ("gated", GATED, None, [], "GATED_MODEL_NO_TOKEN"),
    ("gated-no-grant", GATED, "hf_nogrant", [], "GATED_MODEL_NO_TOKEN"),
    ("gated-pending", GATED, "hf_pending", [], "GATED_MODEL_NO_TOKEN"),
    ("gated-bad-token", GATED, "hf_bad", [], "INVALID_HF_TOKEN"),
    ("gated-granted", GATED, "hf_good", [at("cdn", "truncate", after=300_000, times=1)], True),
    ("grant-lost-midway", GATED, "hf_good", [at("cdn", "truncate", after=300_000, times=1), at("resolve", status=403, method="GET", file="model.safetensors")], "GATED_MODEL_NO_TOKEN"),
]
IDS = [f"{case[0]}-{form}" for case in MATRIX for form in FORMS]
CASES = dict(zip(IDS, ((*case, form) for case in MATRIX for form in FORMS)))
assert len(CASES) == len(IDS)
# what the quantizer reads is refused by it, before the hash can tell that the bytes are wrong
READ_ON_ARRIVAL = {"6-cdn-wrong_bytes-always-Q4", "wrong-bytes-last-shard-FP16", "wrong-bytes-last-shard-Q4"}


def run_case(hub, directory, clean, name, repo, token, fs, outcome, form):
    case = Case(hub, directory, repo, form, token)
    try:
        faults(hub, *fs)
        error = case.download()
        log = list(hub.log)
        if outcome is True:
            assert error is None, error
            case.check_right(clean)
        else:
            assert error and error.code == ("INVALID_MODEL_FILE" if f"{name}-{form}" in READ_ON_ARRIVAL else outcome), error
            assert error.detail or error.hint, error
            case.check_nothing_left()
        # three attempts for a request, an answer whose content was wrong is asked for once more, and nobody hammers
        again = Counter((r["port"], r["method"], r["path"], r["range"]) for r in log).most_common(1)[0]
        assert again[1] <= (30 if "loop" in name else 6), again
        assert not [r for r in log if r["port"] == "cdn" and r["authorization"]]
        said = str(error) + str(error and error.hint) + case.log_path.read_text()
        assert "Signature" not in said and (not token or token not in said)
        faults(hub)
        case.token = "hf_good" if repo == GATED else token
        error = case.download()
        assert error is None, error
        case.check_right(clean)
    finally:
        case.close()
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def running(request, pool, clean, tmp_path_factory):
    """The futures of the matrix's cases that this run asks for, those that stand still for long first."""
    top = tmp_path_factory.mktemp("matrix")
    ids = [i.callspec.params["id"] for i in request.session.items if i.originalname == "test_matrix"]
    return {i: pool(run_case, top / str(n), clean, *CASES[i]) for n, i in enumerate(sorted(ids, key=lambda i: "stall" not in i))}


# --- a disk that fills up


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a little more than what a download leaves free."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    d = tmp_path / "disk"
    d.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", d], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount")
    yield d
    subprocess.run(["umount", d], check=True)


def fill(path, leave):
    """A file that takes the room of path's file system but for some bytes, whatever else is being written there."""
    with open(path, "wb") as f:
        for attempt in range(100):
            s = os.statvfs(path.parent)
            try:
                return os.posix_fallocate(f.fileno(), 0, s.f_bavail * s.f_frsize - leave)
            except OSError:
                assert attempt < 99


@pytest.mark.parametrize("form", FORMS)
def test_disk_full(small_disk, clean, form):
    """Too little room is refused before a byte; room that is lost midway ends the download; both leave nothing, and with room again it arrives."""
    hub = hub_module.start(HUB_ROOT)
    case = Case(hub, small_disk, F16, form)
    filler = small_disk / "filler"
    try:
        fill(filler, 50_000)
        error = case.download()
        assert error.code == "INSUFFICIENT_DISK" and "only" in error.detail and error.hint, error
        assert not [r for r in hub.log if r["port"] == "cdn"]
        case.check_nothing_left()
        filler.unlink()
        faults(hub, at("cdn", bytes_per_second=100_000))
        c = case.start()
        while c.receive()[1].get("bytes", 0) < 40_000:
            pass
        fill(filler, 8192)
        with pytest.raises(HelperError) as e:
            c.result()
        assert e.value.code == "INSUFFICIENT_DISK" and e.value.hint, e.value
        case.check_nothing_left()
        filler.unlink()
        faults(hub)
        assert case.download() is None
        case.check_right(clean)
    finally:
        case.close()


# --- whatever comes


N_RANDOM = 100


def random_faults(r):
    """One to three faults, half of them for ever: so some downloads must arrive, some cannot."""
    def one():
        where = r.choice(("info", "tree", "resolve", "cache", "cdn", "cdn", "cdn"))
        kinds = [k for k, places in hub_module.KINDS.items() if where in places and k not in ("stall", "loop", "elsewhere")]
        f = at(where, r.choice(kinds)) if r.random() < 0.7 else at(where, status=r.choice((401, 403, 404, 408, 416, 429, 500, 502, 503, 504)))
        if f.get("kind") in ("truncate", "reset"):
            f["after"] = r.choice((0, 1, 1000, 100_000, 200_000))
        if r.random() < 0.5:
            f["times"] = r.randint(1, 4)
        if r.random() < 0.3:
            f["every"] = r.randint(2, 4)
        if f.get("status") == 429 and r.random() < 0.5:
            f["retry_after"] = 1
        return f

    return [one() for _ in range(r.randint(1, 3))]


def run_random(hub, directory, clean, seed):
    r = random.Random(seed)
    repo, form, fs = r.choice((TINY, F16, SHARDED)), r.choice(("FP16", "Q4", "Q8")), random_faults(r)
    case = Case(hub, directory, repo, form)
    try:
        faults(hub, *fs)
        error = case.download()
        if error is None:
            case.check_right(clean)
        else:
            assert error.code in (FAILED, "HUB_UNAVAILABLE", "REPO_NOT_FOUND", "GATED_MODEL_NO_TOKEN", "INVALID_REPO_ID", "INVALID_MODEL_FILE"), error
            case.check_nothing_left()
        faults(hub)
        assert case.download() is None
        case.check_right(clean)
        return error.code if error else "ready"
    except Exception as e:
        raise AssertionError(f"seed {seed}, {repo} as {form}, faults {fs}") from e
    finally:
        case.close()
        shutil.rmtree(directory)


def test_random_faults(running, pool, clean, tmp_path):  # while the matrix runs
    """Every one ends ready, with the right files, or with an error and none; MILLM_SEED repeats a run."""
    seed = int(os.environ.get("MILLM_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"MILLM_SEED={seed}")
    ends = Counter(f.result(240) for f in [pool(run_random, tmp_path / str(i), clean, seed + i) for i in range(N_RANDOM)])
    print(dict(ends))
    assert ends["ready"] >= 10 and ends.total() - ends["ready"] >= 10, "the faults are too weak or too strong to tell anything"


# --- the matrix's ends, last: those that stand still end last

@pytest.mark.parametrize("id", IDS)
def test_matrix(running, id):
    running[id].result(240)
