"""What test/gpu/run and bench/gpu share: steps that are done once, whose results are on disk before the next one begins, and that end in time."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    pass


def arguments(parser):
    parser.add_argument("--gpu", type=Path, default=ROOT / ".gpu", help="what pack made")
    parser.add_argument("--results", type=Path, default=ROOT / ".gpu" / "results", help="copied to $OUT too, where that is set")
    parser.add_argument("--scratch", type=Path, help="for models that are made there (default: in memory, where that has room for them)")
    parser.add_argument("--limit", type=int, default=500, help="seconds after which no step begins")
    parser.add_argument("--engine", type=Path, help="another engine than pack's, and")
    parser.add_argument("--libraries", type=Path, help="where its libraries are: build/emulated/millm-engine and build/emulated/driver try the script out")


def cublas_directories():
    """Where libcublasLt.so.13 may be that the loader does not know: of the toolkit, or beside PyTorch."""
    places = [Path("/usr/local/cuda/lib64")] + [Path(p) / "nvidia" / d / "lib" for p in sys.path for d in ("cu13", "cublas")]
    return [str(p) for p in places if (p / "libcublasLt.so.13").exists()]


def scratch():
    """A tmpfs, as files in the page cache are, if it takes three formats of three models; else a disk."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() and shutil.disk_usage(memory).free > 50e9 else Path("/tmp")) / "millm-gpu"


class Steps:
    """o: the parsed arguments().  Results are objects: stage, name, ok, seconds, and the figures or the error."""

    def __init__(self, o):
        self.o = o
        self.scratch = o.scratch or scratch()
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.unpack()
        base = next(iter(self.parts("base")), o.gpu / "base")
        self.bin = base / "bin"
        self.engine = o.engine or self.bin / "millm-engine"
        libraries = [str(o.libraries or base / "lib"), *([] if o.libraries else cublas_directories()), os.environ.get("LD_LIBRARY_PATH", "")]
        self.env = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, libraries))}
        self.until = time.monotonic() + o.limit
        o.results.mkdir(parents=True, exist_ok=True)
        self.path = o.results / "results.jsonl"
        self.lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.new = []

    def unpack(self):
        """Each packed part once, as .tar.xz is all that travels."""
        for packed in sorted(self.o.gpu.glob("*.tar.xz")):
            done = self.scratch / "parts" / f"{packed.name}.done"
            if not done.exists():
                done.parent.mkdir(exist_ok=True)
                with tarfile.open(packed) as t:
                    t.extractall(done.parent, filter="data")
                done.touch()

    def parts(self, pattern):
        """Directories of parts of that name, packed or not, in order."""
        return sorted(p for d in (self.scratch / "parts", self.o.gpu) for p in d.glob(pattern) if p.is_dir())

    def passed(self, stage, name):
        """The result of a step that has passed, of this run or an earlier one; None."""
        return next((r for r in reversed(self.lines) if r["stage"] == stage and r["name"] == name and r["ok"]), None)

    def step(self, stage, name, function, *args):
        """Run it unless it has passed; its result is on disk before the next one begins.  False: the time is over."""
        if self.passed(stage, name):
            return True
        if time.monotonic() > self.until:
            return False
        start = time.monotonic()
        try:
            figures, ok = function(*args) or {}, True
        except Exception as e:  # whatever it was: the next step is another
            figures, ok = {"error": f"{type(e).__name__}: {e}"[-2000:], **getattr(e, "figures", {})}, False
        r = {"stage": stage, "name": name, "ok": ok, "seconds": round(time.monotonic() - start, 2), **figures}
        self.new.append(r)
        self.lines.append(r)
        with self.path.open("a") as f:
            f.write(json.dumps(r) + "\n")
        print(json.dumps(r), flush=True)
        out = os.environ.get("OUT")
        if out:
            shutil.copy(self.path, out)
        return True

    def left(self):
        """Seconds that a step may still take."""
        return max(5, self.until + 20 - time.monotonic())

    def run(self, *args, timeout=120, **env):
        done = subprocess.run(list(map(str, args)), env={**self.env, **env}, capture_output=True, text=True, timeout=min(timeout, self.left()))
        if done.returncode != 0:
            raise Failed(f"{' '.join(map(str, args))[:300]}: exit {done.returncode}: {(done.stderr + done.stdout)[-1500:]}")
        return done.stdout

    def table(self):
        """Of this run, last; how many failed."""
        print(f"\n{'stage':10}{'step':44}{'':6}{'seconds':>8}  figures")
        for r in self.new:
            rest = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items() if k not in ("stage", "name", "ok", "seconds")}
            print(f"{r['stage']:10}{r['name']:44}{'ok' if r['ok'] else 'FAIL':6}{r['seconds']:8.1f}  {str(rest)[:160]}")
        n_failed = sum(not r["ok"] for r in self.new)
        print(f"gpu: {len(self.new) - n_failed} passed, {n_failed} failed")
        return n_failed
