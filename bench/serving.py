"""bench/serving -- many sessions at once on the CPU: tokens per second and time to the first token.

--sessions sessions ask --requests short greedy generations each (--prompt random tokens, at most --tokens new ones), every one with a next request as
soon as it has its answer:

    millm                   in so many PostgreSQL sessions, through complete_stream(): all of it is measured, SQL and rows included
    millm, one session      the same requests of one session, one after the other
    millm, one, screened    the same with the screening copy of the LM head, which a step of so few sequences reads in the head's place
    millm, deterministic    with millm.deterministic on
    llama.cpp               the same token ids in as many slots of one context (peer_serving.py); no server around it
    llama.cpp, one slot     a plain loop over one session's requests

All others compute every row's logits, as llama.cpp does: their model lies there without the screening copy.  Rounds are interleaved, medians are
printed.  Tokens are those that were generated, the end token included.  Time to the first token is from asking to the first piece of text (millm) or
the first token (llama.cpp).

Then a stream beside a prompt of --long tokens: from one token to the next, alone and while the other is read.

Then the shared instruction: --rows rows of --shared tokens that are the same and --own that are not, max_tokens 4, in one generate_rows(), with millm.prefix_cache
on and off; with --deterministic, millm.deterministic is on for both, and every text must be the same.
"""
import argparse
import json
import os
import platform
import random
import selectors
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from psycopg import pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test/bridge"))
from harness import WORK, Cluster, wait_true  # noqa: E402

MODELS = Path(os.environ.get("MILLM_BENCH_MODELS", ROOT / "build/bench"))
VENV = Path(os.environ.get("MILLM_BENCH_VENV", ROOT / "build/bench-venv"))
COUNT, LONG_TOKENS = "Count: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", 6000     # asked beside a long prompt, and the most it may answer
WAIT_S = 600        # for anything from any session
PEER = {"BF16": "BF16", "Q8": "Q8_0", "Q4": "Q4_0"}
SCREENING_COPY = "millm_head_int8.safetensors"
COMPLETE = b"SELECT millm.complete_stream($1, max_tokens => $2::int, temperature => 0)"
WORDS = "river stone market garden winter letter engine silver window yellow forest signal bridge kitchen planet doctor summer number paper music".split()
INSTRUCTION = "You are given a short note. Say in one word whether it is about nature, about work or about the house, and do not explain. "


def sh(*args):
    return subprocess.run([str(a) for a in args], check=True, capture_output=True, text=True).stdout


def quantized(source, format):
    """The model as a download in that format leaves it, where the server can read it; and the same without its screening copy."""
    made = MODELS / f"{source.name}-{format}"
    if not (made / "config.json").exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        sh(ROOT / "build/millm-hub", "quantize", source, "--quantization", {"BF16": "FP16"}.get(format, format), "--output", made)
    screened, full = WORK / f"{made.name}-screened", WORK / made.name
    shutil.copytree(made, screened)
    shutil.copytree(made, full, ignore=shutil.ignore_patterns(SCREENING_COPY))
    for path in [p for out in (screened, full) for p in (out, *out.rglob("*"))]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return screened, full


def peer(source, format):
    """The peer's python and its model."""
    python = VENV / "bin/python"
    if not python.exists():
        print(f"installing the peer into {VENV} (compiles llama.cpp: some minutes)", flush=True)
        sh(sys.executable, "-m", "venv", VENV)
        sh(VENV / "bin/pip", "install", "-q", "--no-cache-dir", "llama-cpp-python", "gguf", "numpy")
    MODELS.mkdir(parents=True, exist_ok=True)
    bf16, out = MODELS / f"{source.name}.BF16.gguf", MODELS / f"{source.name}.{PEER[format]}.gguf"
    if not bf16.exists():
        sh(python, ROOT / "bench/to_gguf.py", source, bf16)
    if not out.exists():
        sh(python, ROOT / "bench/peer_llama_cpp.py", bf16, "--quantize", PEER[format], out)
    return python, out


class Session:
    """A connection that asks one prompt after the other and notes when something of the answer comes."""

    def __init__(self, cluster, prompts, max_tokens):
        self.db = pq.PGconn.connect(cluster.conninfo().encode())
        self.prompts, self.max_tokens = iter(prompts), max_tokens
        self.tokens, self.asked, self.times = 0, 0.0, []        # times of the latest answer's pieces

    def ask(self):
        """The next prompt; False: there is none."""
        prompt = next(self.prompts, None)
        if prompt is None:
            return False
        self.asked, self.times, self.last = time.perf_counter(), [], None
        self.db.send_query_params(COMPLETE, [prompt.encode(), str(self.max_tokens).encode()])
        self.db.set_single_row_mode()
        return True

    def read(self):
        """What has come; True: the answer is whole."""
        self.db.consume_input()
        while not self.db.is_busy():
            if (result := self.db.get_result()) is None:
                self.tokens += json.loads(self.last)["usage"]["completion_tokens"]
                return True
            assert result.status in (pq.ExecStatus.SINGLE_TUPLE, pq.ExecStatus.TUPLES_OK), result.error_message.decode()
            if result.ntuples:
                self.times.append(time.perf_counter())
                self.last = result.get_value(0, 0)
        return False


def waiting(selector):
    """Sessions for which something has come."""
    ready = selector.select(WAIT_S)
    assert ready, f"nothing came from any session in {WAIT_S} s"
    return [key.data for key, _ in ready]


def serve(cluster, sessions, max_tokens):
    """Every session its prompts, all at the same time, in one thread that waits for all connections: {"seconds", "tokens", "first_ms"}"""
    sessions, first = [Session(cluster, prompts, max_tokens) for prompts in sessions], []
    selector = selectors.DefaultSelector()
    start = time.perf_counter()
    for s in sessions:
        selector.register(s.db.socket, selectors.EVENT_READ, s)
        s.ask()
    while selector.get_map():
        for s in waiting(selector):
            if s.read():
                first.append(1e3 * (s.times[0] - s.asked))
                if not s.ask():
                    selector.unregister(s.db.socket)
    seconds = time.perf_counter() - start
    for s in sessions:
        s.db.finish()
    return {"seconds": seconds, "tokens": sum(s.tokens for s in sessions), "first_ms": first}


def load(cluster, name, **settings):
    """The model loaded with these settings, which count from the next load on."""
    for key, value in settings.items():
        cluster.execute(f"ALTER SYSTEM SET millm.{key} = {value}")
    cluster.execute("SELECT pg_reload_conf()")

    def loaded():
        if cluster.value("SELECT model FROM millm.status()"):
            cluster.execute("SELECT millm.unload()")
        cluster.execute("SELECT millm.load(%s)", name)
        return cluster.value("SELECT deterministic FROM millm.status()") == (settings["deterministic"] == "on")
    wait_true(loaded, "the settings count")


def share(cluster, name, a, rng):
    """The rows with the prefix cache and without: seconds, tokens, which texts."""
    def tokens(text):
        return cluster.value("SELECT millm.count_tokens(%s)", text)

    deterministic = "on" if a.deterministic else "off"
    load(cluster, name, deterministic=deterministic, prefix_cache="on")
    instruction = INSTRUCTION
    while tokens(instruction) < a.shared:
        instruction += INSTRUCTION
    words = instruction.split()
    while tokens(" ".join(words)) > a.shared:
        words.pop()
    instruction = " ".join(words) + "\n"
    cluster.execute("CREATE TABLE note (id int, body text)")
    with cluster.connect() as db, db.cursor().copy("COPY note FROM STDIN") as copy:
        for i in range(a.rows):
            copy.write_row((i, f"{i}: " + " ".join(rng.choice(WORDS) for _ in range(a.own - 4))))
    results = {}
    for cache in "on", "off":
        load(cluster, name, deterministic=deterministic, prefix_cache=cache)
        start = time.perf_counter()
        query = "SELECT id, " + "'" + instruction.replace("'", "''") + "' || body FROM note ORDER BY id"
        cluster.execute(f"CREATE TABLE answer_{cache} AS SELECT * FROM millm.generate_rows(%s, raw => true, temperature => 0, max_tokens => 4)", query)
        seconds = time.perf_counter() - start
        n, errors, prompt, cached = cluster.execute(f"SELECT count(*), count(error), sum(prompt_tokens), sum(cached_tokens) FROM answer_{cache}").fetchone()
        assert (n, errors) == (a.rows, 0)
        results[cache] = {"seconds": round(seconds, 2), "prompt_tokens": prompt, "cached_tokens": cached}
    same = cluster.value('SELECT count(*) FROM answer_on JOIN answer_off USING (key) WHERE answer_on.text = answer_off.text')
    n_shared = tokens(instruction)
    assert same == a.rows or not a.deterministic
    return results | {"rows": a.rows, "shared": n_shared, "deterministic": a.deterministic, "same_texts": same, "ratio": round(results["off"]["seconds"] / results["on"]["seconds"], 2),
                      "cached_share": round(float(results["on"]["cached_tokens"]) / (n_shared * a.rows), 3)}


def beside(cluster, name, a, rng):
    """Milliseconds between the pieces of a stream: alone, and while another session's long prompt is read."""
    load(cluster, name, deterministic="off", prefix_cache="on")
    words = [rng.choice(WORDS) for _ in range(a.long)]
    while (n := cluster.value("SELECT millm.count_tokens(%s)", " ".join(words))) > a.long:
        del words[a.long - n:]
    selector, gaps, seconds = selectors.DefaultSelector(), {}, 0.0
    for when in "alone", "beside":
        # the same answer, since a token takes the longer the more are before it
        stream, other = Session(cluster, [COUNT], LONG_TOKENS), Session(cluster, [" ".join(words)], 1)
        for session in stream, other:
            selector.register(session.db.socket, selectors.EVENT_READ, session)
        stream.ask()
        while not other.tokens and not stream.tokens:
            for session in waiting(selector):
                session.read()
            if when == "beside" and len(stream.times) > 20 and not other.asked:
                other.ask()
        if when == "beside":
            assert other.tokens, f"the stream's {LONG_TOKENS} tokens ended before the prompt was read"
            seconds = time.perf_counter() - other.asked
            stream.db.get_cancel().cancel()
        gaps[when] = [1e3 * (y - x) for x, y in zip(stream.times, stream.times[1:])][20:]
        for session in stream, other:
            selector.unregister(session.db.socket)
            session.db.finish()
    figures = {}
    for when, ms in gaps.items():
        ms = sorted(ms[:len(gaps["beside"])])
        figures[when] = {"mean_ms": round(statistics.mean(ms), 2), "median_ms": round(statistics.median(ms), 2), "p99_ms": round(ms[len(ms) * 99 // 100], 2), "tokens": len(ms)}
    return figures | {"prompt": n, "seconds": round(seconds, 2), "ratio": round(figures["beside"]["mean_ms"] / figures["alone"]["mean_ms"], 2)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", type=Path, default=ROOT / ".fixtures/SmolLM2-135M-Instruct", help="a directory with 16-bit weights")
    p.add_argument("--format", choices=PEER, default="Q4")
    p.add_argument("--sessions", type=int, default=32)
    p.add_argument("--requests", type=int, default=100, help="of each session")
    p.add_argument("--prompt", type=int, default=30)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--long", type=int, default=8000, help="tokens of the prompt beside a stream; 0: not that")
    p.add_argument("--rows", type=int, default=10000, help="of the shared instruction; 0: not that")
    p.add_argument("--shared", type=int, default=200)
    p.add_argument("--own", type=int, default=30)
    p.add_argument("--deterministic", action="store_true", help="the rows with millm.deterministic on")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    a = p.parse_args()
    rng = random.Random(1)
    directories = quantized(a.model.resolve(), a.format)
    python, gguf = peer(a.model.resolve(), a.format)
    # without drafts, which the peer has not, and a session alone only
    cluster = Cluster("cluster", **{"millm.max_sequences": a.sessions, "millm.threads": a.threads, "millm.draft_tokens": 0})
    try:
        result = measure(a, cluster, *directories, python, gguf, rng)
    finally:
        cluster.stop()
    if a.save:
        path = ROOT / f"bench/results/{date.today()}-serving-{a.model.name.lower()}-{a.format.lower()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def measure(a, cluster, screened, directory, python, gguf, rng):
    name = directory.name
    for d in directory, screened:
        cluster.execute("SELECT millm.register_local(%s, name => %s)", str(d), d.name)
    load(cluster, name, deterministic="off")
    # no two begin alike, so that nothing is shared
    prompts = [[f"{i * a.requests + k} " + " ".join(rng.choice(WORDS) for _ in range(a.prompt - 4)) for k in range(a.requests)] for i in range(a.sessions)]
    with cluster.connect() as db:
        ids = [[db.execute("SELECT millm.tokenize(%s)", [p]).fetchone()[0] for p in session] for session in prompts]
    eos = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    common = {"max_tokens": a.tokens, "threads": a.threads, "eos": eos if isinstance(eos, list) else [eos]}

    def run_peer(sessions):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
            json.dump(common | {"sessions": sessions}, f)
            f.flush()
            return json.loads(sh(python, ROOT / "bench/peer_serving.py", gguf, f.name))

    def millm(sessions, deterministic="off", model=name):
        load(cluster, model, deterministic=deterministic)
        serve(cluster, [s[:1] for s in sessions], a.tokens)     # warm
        return serve(cluster, sessions, a.tokens)

    contestants = {"millm": lambda: millm(prompts), "millm, one session": lambda: millm(prompts[:1]),
                   "millm, one, screened": lambda: millm(prompts[:1], model=screened.name), "millm, deterministic": lambda: millm(prompts, "on"),
                   "llama.cpp": lambda: run_peer(ids), "llama.cpp, one slot": lambda: run_peer(ids[:1])}
    rounds = {who: [] for who in contestants}
    for _ in range(a.rounds):
        for who, run in contestants.items():
            r = run()
            rounds[who].append(r | {"tps": r["tokens"] / r["seconds"]})
            print(f"  {who}: {rounds[who][-1]['tps']:.1f} tokens/s", flush=True)

    def median(who, f):
        return statistics.median(map(f, rounds[who]))

    def percentile(r, share):
        return sorted(r["first_ms"])[min(len(r["first_ms"]) - 1, int(share * len(r["first_ms"])))]

    figures = {who: {"tps": round(median(who, lambda r: r["tps"]), 1), "first_p50_ms": round(median(who, lambda r: percentile(r, 0.5)), 1),
                     "first_p99_ms": round(median(who, lambda r: percentile(r, 0.99)), 1), "tokens": rounds[who][0]["tokens"]} for who in rounds}
    machine = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    version = rounds["llama.cpp"][0]["version"]
    print(f"\n{date.today()}, {machine}, {a.threads} threads, load {os.getloadavg()[0]:.1f}; {name} beside {gguf.name}, {version}\n"
          f"{a.sessions} sessions x {a.requests} requests of {a.prompt} tokens and at most {a.tokens} more; medians of {a.rounds} interleaved rounds\n"
          f"{'':24}tokens/s   to one session's   first token, ms: median      p99    p99 / median")
    for who, f in figures.items():
        one = figures["llama.cpp, one slot" if who.startswith("llama") else "millm, one session"]
        print(f"{who:24}{f['tps']:8.1f} {f['tps'] / one['tps']:18.2f} {f['first_p50_ms']:24.1f} {f['first_p99_ms']:8.1f} {f['first_p99_ms'] / f['first_p50_ms']:15.2f}")
    print(f"millm / llama.cpp: {figures['millm']['tps'] / figures['llama.cpp']['tps']:.2f}, deterministic {figures['millm, deterministic']['tps'] / figures['llama.cpp']['tps']:.2f}")
    result = {"date": str(date.today()), "command": "bench/serving " + " ".join(sys.argv[1:]), "cpu": machine, "threads": a.threads, "load": os.getloadavg()[0], "model": name,
              "peer": gguf.name, "peer_version": version, "peer_system": rounds["llama.cpp"][0]["system"], "rounds": a.rounds, "sessions": a.sessions,
              "requests": a.requests, "prompt": a.prompt, "max_tokens": a.tokens, "results": figures}
    if a.long:
        result["long"] = r = beside(cluster, name, a, rng)
        print(f"\nfrom one token of a stream to the next: {r['alone']['mean_ms']} ms alone (p99 {r['alone']['p99_ms']}), {r['beside']['mean_ms']} (p99 {r['beside']['p99_ms']}) while a prompt "
              f"of {r['prompt']} tokens is read in {r['seconds']} s: {r['ratio']:.2f} times")
    if a.rows:
        result["shared"] = s = share(cluster, name, a, rng)
        print(f"\n{s['rows']} rows of {s['shared']} shared tokens: {s['on']['seconds']} s with the prefix cache, {s['off']['seconds']} s without: {s['ratio']:.2f} times as fast; "
              f"{s['cached_share']:.1%} of the shared tokens were cached; {s['same_texts']} texts are the same")
    return result


if __name__ == "__main__":
    main()
