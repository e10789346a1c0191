"""make soak -- many sessions at once, for an hour, while the engine is killed every minute: does anything leak, mix or get stuck?

Sessions ask questions whose answers were written down before, when each was asked alone (millm.deterministic is on, so the same bits are due in
any company): whole texts, streams, choices, arrays and rows of prompts, embeddings, of random lengths, greedy or with a seed.  Some requests are canceled, some run into
statement_timeout, some clients vanish in the middle or are terminated; streams end at a LIMIT.  Once a minute the engine gets SIGKILL and the next of the
tiny models is loaded.  The KV cache is too small for all, so sequences are preempted.

Twice a minute everybody rests, and then all must be as before: nothing at work, every KV page free, descriptors and private memory of
the engine, the supervisor and the sessions that never ended.  At the end: the postmaster is the same, and its log tells of no crash.

A right answer is right however the request was to end; an error is right when its ending explains it, or a kill of the engine that fell into
its time.  Anything else is a failure; the report counts and quotes them, and the exit status is 1.
"""
import argparse
import collections
import itertools
import json
import os
import platform
import random
import re
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
from psycopg import pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "test/bridge"))
sys.path.insert(0, str(ROOT / "test/parity"))
from engine_client import call  # noqa: E402
from harness import FIXTURES, Cluster, as_run_user  # noqa: E402

# Fixtures: windows, softcaps, mixtures of experts; weights whose matmuls would take other forms in company, were they not deterministic
LONG = "tiny/llama-long"        # the one with room for prompts of several chunks
LONG_CONTEXT = 1024
MODELS = [LONG, "tiny-bnb/nf4-wide", "tiny/gemma3", "tiny/llama-bf16", "tiny/qwen2_moe", "tiny-bnb/int8", "tiny/mixtral-sliding", "tiny/gemma2", "tiny/gpt2",
          "tiny/gpt_oss-mxfp4"]
MAX_FAILURES = 20       # the end
MAX_ATTEMPTS = 20       # of what only a late timeout can refuse
STUCK = 60              # seconds after which a request that should take milliseconds counts as stuck
MAX_GROWTH_KB = 8192    # of private memory between two rests of one process; what a leaking request loses, a thousand times
PREFIXES = ["", "", "Classify what follows as good or bad, in one word, and say nothing else: ", "Summarize: "]
WORDS = "a the of and in to is was he for it with as his on be at by I this had not are but from or have an they which one you".split()
CRASHES = r"PANIC|ThreadSanitizer|terminating any other active server processes|all server processes terminated|automatic recovery in progress|WARNING: .*leak"

# The ways in which a request may end, how often, and which errors each explains
ENDINGS = {"answer": (60, ()), "cancel": (10, ("57014",)), "timeout": (10, ("57014",)), "vanish": (10, ()), "limit": (6, ()), "terminate": (4, ("57P01",))}
KILLED = ("ML019", "ML006", "ML008")    # ENGINE_UNAVAILABLE, MODEL_NOT_LOADED, MODEL_BUSY: while the engine was not there


class Stuck(Exception):
    pass


class Session:
    """A connection whose every wait has an end."""

    def __init__(self, cluster):
        self.db = pq.PGconn.connect(cluster.conninfo().encode())
        if self.db.status != pq.ConnStatus.OK:
            raise ConnectionError(self.db.error_message.decode())
        self.pid = self.db.backend_pid
        self.timeout = None         # as set here
        self.fences = itertools.count()

    def send(self, sql, args=()):
        self.db.send_query_params(sql.encode(), [None if a is None else str(a).encode() for a in args])

    def wait(self, seconds):
        """Until the answer is whole; False when the time is over before."""
        end = time.monotonic() + seconds
        while self.db.is_busy():
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.db.socket], [], [], left)[0]:
                return False
            self.db.consume_input()
        return True

    def finish(self):
        """(first columns, SQLSTATE or "", message)"""
        rows, state, message = [], "", ""
        try:
            while True:
                if not self.wait(STUCK):
                    raise Stuck(f"no answer for {STUCK} s")
                result = self.db.get_result()
                if result is None:
                    return rows, state, message
                if result.status in (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE):
                    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"lost").decode()
                    message = result.error_message.decode()
                else:
                    rows += [result.get_value(i, 0) for i in range(result.ntuples)]
        except psycopg.OperationalError as e:
            return rows, "lost", str(e)

    def query(self, sql, *args):
        self.send(sql, args)
        rows, state, message = self.finish()
        if state:
            raise RuntimeError(f"{sql}: {state} {message}")
        return [None if r is None else r.decode() for r in rows]

    def set_timeout(self, ms):
        """Set statement_timeout; an old one has no effect any more, however late it fires.

        PostgreSQL (15 at least) reports a timeout that fires in the last microseconds of a statement when it next looks, which may be in the
        next one, whatever that one's own timeout is: once in a million statements, on a busy machine.  Hence the fence between them."""
        if ms == self.timeout:
            return
        self.insist(lambda: self.succeeds("SET statement_timeout = 0"))
        self.insist(lambda: self.succeeds(f"SELECT {next(self.fences)}"))
        if ms > 0:
            self.insist(lambda: self.succeeds(f"SET statement_timeout = {ms}"))
        self.timeout = ms

    def insist(self, attempt):
        for _ in range(MAX_ATTEMPTS):
            if attempt():
                return
            # an error that came while nothing was asked was taken for this answer, which still comes: libpq drops what it reads now
            time.sleep(0.05)
            self.db.consume_input()
            self.db.is_busy()
        raise RuntimeError(f"a statement was refused {MAX_ATTEMPTS} times: {self.db.error_message.decode()}")

    def succeeds(self, sql):
        """SET, or SELECT of a number."""
        result = self.db.exec_(sql.encode())
        if self.db.status != pq.ConnStatus.OK:
            raise ConnectionError(self.db.error_message.decode())
        if sql.startswith("SELECT"):
            return result.status == pq.ExecStatus.TUPLES_OK and result.get_value(0, 0) == sql.split()[1].encode()
        return result.status == pq.ExecStatus.COMMAND_OK

    def vanish(self):
        s = socket.socket(fileno=os.dup(self.db.socket))
        s.shutdown(socket.SHUT_RDWR)
        s.close()
        self.db.finish()


class Question:
    """Something to ask of a model, and the answer that it gives when asked alone."""

    def __init__(self, rng, number, model, context):
        self.number, self.model = number, model
        self.kind = rng.choices(["generate", "stream", "choices", "array", "rows", "embed"], [6, 6, 2, 2, 2, 2])[0]
        self.max_tokens = rng.randint(1, min(60, context // 2))
        n = int(rng.random() ** 2 * min(context, 700))
        self.prompt = rng.choice(PREFIXES) + f"{number} " + " ".join(rng.choice(WORDS) for _ in range(n // 3))
        self.options = "temperature => 0" if rng.random() < 0.6 else f"temperature => 1, seed => {number}"

    def sql(self, ending):
        options = f"max_tokens => {self.max_tokens}, {self.options}, model => $2"
        if self.kind == "embed":
            return "SELECT millm.embed($1, model => $2)"
        if self.kind == "array":
            return f"SELECT unnest(millm.generate(string_to_array($1, '|'), raw => true, {options}))"
        if self.kind == "rows":
            return f"SELECT coalesce('ERROR ' || error, text) FROM millm.generate_rows($1, raw => true, {options})"
        if self.kind == "choices":
            return f"SELECT c->>'text' FROM jsonb_array_elements(millm.complete($1, n => 3, {options})->'choices') c ORDER BY c->'index'"
        if self.kind == "stream":
            return f"SELECT millm.generate_stream($1, raw => true, {options})" + (" LIMIT 3" if ending == "limit" else "")
        return f"SELECT millm.generate($1, raw => true, {options})"

    def args(self):
        several = "|".join(self.prompt[:max(1, len(self.prompt) // i)] for i in (1, 2, 3))      # of one beginning
        return {"array": several, "rows": f"SELECT n, p FROM unnest(string_to_array('{several}', '|')) WITH ORDINALITY u(p, n)"}.get(self.kind, self.prompt), self.model

    def is_right(self, rows, ending):
        got = b"".join(rows) if self.kind == "stream" else tuple(rows)
        return self.answer.startswith(got) if self.kind == "stream" and ending == "limit" else got == self.answer

    def ask_alone(self, session):
        session.send(self.sql("answer"), self.args())
        rows, state, message = session.finish()
        if state:
            raise RuntimeError(f"question {self.number} of {self.model}: {message}")
        self.answer = b"".join(rows) if self.kind == "stream" else tuple(rows)


class World:
    """What the sessions share.  `lock` guards all of it."""

    def __init__(self):
        self.lock = threading.Condition()
        self.model = None           # loaded now; None while the engine is not there
        self.generation = 0         # of the engine
        self.resting = False        # nobody may begin a request
        self.at_work = 0
        self.ended = False
        self.counts = collections.Counter()     # (kind, ending, outcome)
        self.failures = []

    def fail(self, what):
        with self.lock:
            self.failures.append(what)
            if len(self.failures) >= MAX_FAILURES:
                self.ended = True
            if len(self.failures) <= MAX_FAILURES:
                print("FAILURE:", what, flush=True)
            self.lock.notify_all()

    def begin(self):
        """May a request begin?  Waits for it; (model, generation), or None at the end."""
        with self.lock:
            while not self.ended and (self.resting or self.model is None):
                self.lock.wait()
            if self.ended:
                return None
            self.at_work += 1
            return self.model, self.generation

    def done(self, *count):
        with self.lock:
            self.at_work -= 1
            self.counts[count] += 1
            self.lock.notify_all()


def ask(world, cluster, session, question, ending, generation, rng):
    """One request; the outcome's name, and whether the session goes on."""
    session.set_timeout(rng.randint(1, 40) if ending == "timeout" else 0)
    session.send(question.sql(ending), question.args())
    if ending in ("cancel", "vanish", "terminate"):
        session.wait(rng.expovariate(1 / 0.02))
    if ending == "vanish":
        session.vanish()
        return "gone", False
    if ending == "cancel":
        session.db.get_cancel().cancel()
    if ending == "terminate":
        other = Session(cluster)
        other.query("SELECT pg_terminate_backend($1)", session.pid)
        other.db.finish()
    rows, state, message = session.finish()
    if state == "lost" and ending == "terminate":
        state = "57P01"
    goes_on = state not in ("57P01", "lost") and ending != "terminate"     # the signal may still be on its way
    with world.lock:
        was_killed = world.model is None or world.generation != generation
    if not state:
        if question.is_right(rows, ending):
            return "right", goes_on
        if was_killed and question.kind == "rows" and any(r.startswith(b"ERROR ") for r in rows):
            return "engine killed", goes_on
        world.fail(f"wrong answer to {question.kind} {question.number} of {question.model} ({ending}): {rows!r:.300}, expected {question.answer!r:.300}")
        return "wrong", goes_on
    if state in ENDINGS[ending][1]:
        return state, goes_on
    if state in KILLED and was_killed:
        return "engine killed", goes_on
    world.fail(f"{question.kind} {question.number} of {question.model} ({ending}): {state} {message.strip()}")
    return state, goes_on


def work(world, cluster, questions, seed, faithful):
    """A session that asks until the end.  A faithful one is the same connection all the time."""
    rng = random.Random(seed)
    session = faithful
    endings = {e: w for e, (w, _) in ENDINGS.items() if not faithful or e not in ("vanish", "terminate")}
    try:
        while (began := world.begin()) is not None:
            model, generation = began
            question = rng.choice(questions[model])
            ending = rng.choices(list(endings), list(endings.values()))[0]
            outcome = "failed"
            try:
                session = session or Session(cluster)
                outcome, goes_on = ask(world, cluster, session, question, ending, generation, rng)
                if not goes_on:
                    session = None
            finally:
                world.done(question.kind, ending, outcome)
    except Exception as e:
        world.fail(f"session {seed}: {type(e).__name__} {e}")


def process(pid):
    """Private memory in kB and descriptors of a process at rest; what is being closed does not count."""
    descriptors = []
    for _ in range(5):
        descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.02)
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^RssAnon:\s+(\d+)", status, re.M)[1]), min(descriptors)


def engine_status(cluster):
    """The engine's own status.  Its path may be too long for a socket's address."""
    fd = os.open(cluster.data / "pgsql_tmp.millm", os.O_RDONLY)
    try:
        return call(f"/proc/self/fd/{fd}/engine.sock", "status")
    finally:
        os.close(fd)


def rest(world, cluster):
    """Everybody finishes; the engine's status when nothing is at work and every page is free, or None and a failure."""
    with world.lock:
        world.resting = True
        if not world.lock.wait_for(lambda: world.at_work == 0, timeout=2 * STUCK):
            world.failures.append(f"{world.at_work} requests are stuck")
            return None
    end = time.monotonic() + 20
    while True:
        s = engine_status(cluster)
        if s["running"] == s["waiting"] == 0 and s["pages_free"] == s["pages_total"]:
            return s
        if time.monotonic() > end:
            world.fail(f"at rest {s['running']} run, {s['waiting']} wait, {s['pages_free']} of {s['pages_total']} pages are free")
            return None
        time.sleep(0.01)


def go_on(world):
    with world.lock:
        world.resting = False
        world.lock.notify_all()


def load(world, cluster, keeper, model):
    """Load model into the engine that there is or will be; seconds that it took."""
    start = time.monotonic()
    while True:
        keeper.send("SELECT millm.load($1)", [model])
        _, state, message = keeper.finish()
        if not state:
            break
        if state not in KILLED or time.monotonic() - start > STUCK:
            raise RuntimeError(f"load of {model}: {state} {message}")
        time.sleep(0.05)
    with world.lock:
        world.model = model
        world.generation += 1
        world.lock.notify_all()
    return time.monotonic() - start


def kill_engine(world, keeper):
    pid = int(keeper.query("SELECT engine_pid FROM millm.status()")[0])
    with world.lock:
        world.model = None
    subprocess.run(["kill", "-9", str(pid)], check=True)


def directory(cluster, model):
    """Where a model lies; the long one is a copy with fewer positions, several of which fit into the KV cache."""
    source = FIXTURES / model
    if model != LONG:
        return source
    copy = cluster.dir / "long"
    config = json.dumps(json.loads((source / "config.json").read_text()) | {"max_position_embeddings": LONG_CONTEXT})
    subprocess.run(as_run_user("cp", "-rL", source, copy), check=True)
    subprocess.run(as_run_user("tee", copy / "config.json"), input=config, text=True, check=True, stdout=subprocess.DEVNULL)
    return copy


def prepare(cluster, keeper, world, n_questions, rng):
    """The questions of each model, with their answers."""
    questions = {}
    for model in MODELS:
        keeper.query("SELECT millm.register_local($1, name => $2)", directory(cluster, model), model)
        load(world, cluster, keeper, model)
        status = engine_status(cluster)
        context = status["context_length"]
        assert status["deterministic"]
        questions[model] = []
        while len(questions[model]) < n_questions:
            q = Question(rng, len(questions[model]), model, context)
            if int(keeper.query("SELECT millm.count_tokens($1)", q.prompt)[0]) + q.max_tokens <= context:
                q.ask_alone(keeper)
                questions[model].append(q)
        keeper.query("SELECT millm.unload()")
    return questions


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--sessions", type=int, default=32)
    p.add_argument("--questions", type=int, default=60, help="of each model")
    p.add_argument("--life", type=float, default=60, help="seconds between two kills of the engine")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--report", type=Path, help="also write the report to this file")
    a = p.parse_args()
    a.commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()    # as it is now, not at the end
    cluster = Cluster("soak", **{"millm.deterministic": "on", "millm.max_sequences": 16, "millm.max_queue": 4 * a.sessions, "millm.kv_cache_size": "1MB",
                                 "log_min_messages": "warning"})
    try:
        failures, text = soak(a, cluster)
    finally:
        cluster.stop()
    print("\n" + text)
    if a.report:
        a.report.write_text(text)
    sys.exit(1 if failures else 0)


def soak(a, cluster):
    """(failures, the report)"""
    rng = random.Random(a.seed)
    postmaster = int((cluster.data / "postmaster.pid").read_text().split()[0])
    world, keeper = World(), Session(cluster)
    questions = prepare(cluster, keeper, world, a.questions, rng)
    load(world, cluster, keeper, MODELS[0])
    load_s = []     # after each kill
    world.resting = True
    faithful = [Session(cluster) for _ in range(4)]
    threads = [threading.Thread(target=work, args=(world, cluster, questions, i, faithful[i] if i < 4 else None), daemon=True) for i in range(a.sessions)]
    for t in threads:
        t.start()

    def lasting():
        """Processes that no kill ends, by name: (private kB, descriptors)"""
        supervisor = int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{engine_status(cluster)['pid']}/status").read_text(), re.M)[1])
        return {"postmaster": process(postmaster), "supervisor": process(supervisor)} | {f"session {i}": process(s.pid) for i, s in enumerate(faithful)}

    start, lives, first, last = time.monotonic(), [], None, None
    print(f"{a.sessions} sessions, {a.minutes:g} minutes", flush=True)
    while not world.ended:
        sizes = []
        for _ in range(2):
            go_on(world)
            time.sleep(a.life / 2)
            status = rest(world, cluster)
            if not status:
                break
            sizes.append(process(status["pid"]))
            last = lasting()
            first = first or last
        if len(sizes) < 2:
            break
        lives.append((status["model"], sizes, status["pages_cached"]))
        (kb, fds), (kb_end, fds_end) = sizes
        if fds_end > fds or kb_end - kb > MAX_GROWTH_KB:
            world.fail(f"the engine with {status['model']} grew from {kb} kB, {fds} descriptors to {kb_end} kB, {fds_end}")
        total = sum(world.counts.values())
        print(f"{time.monotonic() - start:6.0f} s {total:8d} requests, {status['model']}: engine {kb} -> {kb_end} kB, {fds} -> {fds_end} descriptors, all pages free", flush=True)
        if time.monotonic() - start >= a.minutes * 60:
            break
        go_on(world)
        time.sleep(0.2)         # so that it has something to do when it is killed
        kill_engine(world, keeper)
        load_s.append(load(world, cluster, keeper, MODELS[len(lives) % len(MODELS)]))
    seconds = time.monotonic() - start
    with world.lock:
        world.ended = True
        world.lock.notify_all()
    for t in threads:
        t.join(STUCK)
        if t.is_alive():
            world.fail("a session does not end")
    for name in first or {}:
        (kb, fds), (kb_end, fds_end) = first[name], last[name]
        if fds_end > fds + 2 or kb_end - kb > MAX_GROWTH_KB:    # PostgreSQL keeps files of catalogs open as it needs them
            world.fail(f"{name} grew from {kb} kB, {fds} descriptors to {kb_end} kB, {fds_end}")
    if int((cluster.data / "postmaster.pid").read_text().split()[0]) != postmaster:
        world.fail("the postmaster is another one")
    restarts = int(keeper.query("SELECT restarts FROM millm.status()")[0])
    if restarts != len(load_s):
        world.fail(f"the engine was killed {len(load_s)} times, and restarted {restarts} times")
    world.failures += [f"the server's log: {line}" for line in cluster.log.read_text().splitlines() if re.search(CRASHES, line)]

    return world.failures, report(a, world, seconds, load_s, lives, first, last)


def report(a, world, seconds, load_s, lives, first, last):
    machine = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    total = sum(world.counts.values())
    kinds, endings = (sorted({k[i] for k in world.counts}) for i in (0, 1))
    outcomes = collections.Counter()
    for (_, ending, outcome), n in world.counts.items():
        outcomes[ending, outcome] += n
    lines = [f"make soak, {time.strftime('%Y-%m-%d')}, commit {a.commit}, {machine}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
             f"{a.sessions} sessions, {seconds / 60:.1f} minutes, {total} requests ({total / seconds:.0f} a second), seed {a.seed}",
             "", "requests by what was asked: " + ", ".join(f"{k} {sum(n for key, n in world.counts.items() if key[0] == k)}" for k in kinds),
             "and by how they were to end:"]
    for ending in endings:
        lines.append(f"  {ending:10}" + ", ".join(f"{o} {n}" for (e, o), n in sorted(outcomes.items()) if e == ending))
    lines += ["", f"engine killed {len(load_s)} times" + (f"; from the kill to a loaded model: median {1e3 * statistics.median(load_s):.0f} ms, longest {1e3 * max(load_s):.0f} ms" if load_s else ""),
              f"rests with nothing at work and every KV page free: {2 * len(lives)}",
              "", "the engine's lives: private memory and descriptors in the middle and at the end, free pages that the prefix cache has"]
    lines += [f"  {model:22}{kb:7} ->{kb_end:7} kB {fds:4} -> {fds_end} {cached:8}" for model, ((kb, fds), (kb_end, fds_end)), cached in lives]
    lines += ["", "processes that lived all the time: at the first rest and at the last"]
    lines += [f"  {name:22}{first[name][0]:7} ->{last[name][0]:7} kB {first[name][1]:4} -> {last[name][1]}" for name in first or {}]
    lines += ["", f"failures: {len(world.failures)}"] + [f"  {f}" for f in world.failures[:MAX_FAILURES]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
