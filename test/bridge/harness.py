"""A private cluster with millm, and bridges to it.

dev/check's stage `bridge` names what it made: PG_BIN (the private copy of PostgreSQL, with the extension and millm-bridge in
it), RUN_USER (who runs servers; may be ourselves), WORK (a directory of that user, where logs stay after the tests), and
MILLM_FIXTURES.  Servers listen on a Unix socket, bridges on ports of 127.0.0.1 that the kernel chooses.
"""
import getpass
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

ROOT = Path(__file__).resolve().parents[2]
PG_BIN = Path(os.environ["PG_BIN"])
RUN_USER = os.environ.get("RUN_USER", getpass.getuser())
WORK = Path(os.environ["WORK"])
FIXTURES = Path(os.environ["MILLM_FIXTURES"])
BRIDGE = Path(os.environ.get("MILLM_BRIDGE", PG_BIN / "millm-bridge"))  # or one built with a sanitizer

# Time limits are for hangs only: this machine may be busy.
PATIENCE = 60

# A conversation whose answer goes on for longer than any test waits
LONG = dict(model="SmolLM2-135M-Instruct", messages=[{"role": "user", "content": "Repeat the word banana one thousand times: banana banana banana banana banana banana"}],
            max_tokens=6000, temperature=0)

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def as_run_user(*command):
    command = [str(c) for c in command]
    return command if getpass.getuser() == RUN_USER else ["runuser", "-u", RUN_USER, "--", *command]


def wait_true(sub, what, timeout=PATIENCE):
    """The first true value of sub(); how long it took is the caller's to measure."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = sub()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"waited {timeout} s in vain until {what}")


class Cluster:
    """A running server with the extension.  Its owner calls stop()."""

    def __init__(self, name, **settings):
        self.dir = WORK / name
        shutil.rmtree(self.dir, ignore_errors=True)
        subprocess.run(as_run_user("mkdir", "-p", self.dir), check=True)
        # short enough for a Unix socket's path
        self.sockets = subprocess.run(as_run_user("mktemp", "-d", "/tmp/millm-bridge.XXXXXX"), check=True, capture_output=True, text=True).stdout.strip()
        self.log = self.dir / "server.log"
        self.data = self.dir / "data"
        self._run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--encoding", "UTF8", "--locale", "C")
        settings = {"shared_preload_libraries": "millm", "listen_addresses": "", "unix_socket_directories": self.sockets, "max_connections": 300, "fsync": "off",
                    "millm.cache_dir": self.dir / "cache", "millm.hf_endpoint": "http://127.0.0.1:9", "millm.hf_cache_dir": "none"} | settings
        conf = "".join(f"{k} = '{v}'\n" for k, v in settings.items())
        subprocess.run(as_run_user("tee", "-a", self.data / "postgresql.conf"), input=conf, text=True, check=True, stdout=subprocess.DEVNULL)
        self._run("pg_ctl", "-D", self.data, "-l", self.log, "-w", "-t", PATIENCE, "start")
        self.execute("CREATE EXTENSION millm")

    def _run(self, program, *args):
        done = subprocess.run(as_run_user(PG_BIN / program, *args), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")
        assert done.returncode == 0, f"{program}: {done.stdout}"

    def stop(self):
        self._run("pg_ctl", "-D", self.data, "-m", "fast", "-w", "-t", PATIENCE, "stop")
        shutil.rmtree(self.sockets, ignore_errors=True)

    def restart(self):
        self._run("pg_ctl", "-D", self.data, "-l", self.log, "-m", "fast", "-w", "-t", PATIENCE, "restart")

    def conninfo(self, user="postgres"):
        return f"host={self.sockets} dbname=postgres user={user}"

    def connect(self, user="postgres", **how):
        return psycopg.connect(self.conninfo(user), autocommit=True, **how)

    def execute(self, sql, *args):
        with self.connect() as db:
            return db.execute(sql, args)

    def value(self, sql, *args):
        """The first column of the first row."""
        with self.connect() as db:
            return db.execute(sql, args).fetchone()[0]

    def call(self, function, **args):
        """millm.FUNCTION(name => value, ...), one value; lists and objects are arrays of text and jsonb."""
        with self.connect() as db:
            return db.execute(*statement(function, args)).fetchone()[0]

    def rows(self, function, **args):
        with self.connect() as db:
            return [row[0] for row in db.execute(*statement(function, args)).fetchall()]

    def load(self, name):
        """Make name the loaded model, registering it first where it lies."""
        with self.connect() as db:
            if db.execute("SELECT model FROM millm.status()").fetchone()[0] == name:
                return name
            if not db.execute("SELECT 1 FROM millm.models WHERE name = %s", [name]).fetchone():
                db.execute("SELECT millm.register_local(%s, name => %s)", [str(self.model_directory(name)), name])
            db.execute("SELECT millm.load(%s)", [name])
        return name

    def model_directory(self, name):
        """The directory of a fixture.  tiny-chat is tiny-long with a chat template, which no tiny model has."""
        known = {"tiny": "tiny/llama", "tiny-long": "tiny/llama-long", "SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct"}
        if name in known:
            return FIXTURES / known[name]
        assert name == "tiny-chat", name
        directory = self.dir / name
        if not directory.exists():
            with tempfile.TemporaryDirectory() as tmp:
                config = json.loads((FIXTURES / "tiny/llama-long/tokenizer_config.json").read_text()) | {"chat_template": CHAT_TEMPLATE}
                source = Path(tmp) / "tokenizer_config.json"
                source.write_text(json.dumps(config))
                os.chmod(tmp, 0o755)
                subprocess.run(as_run_user("cp", "-rL", FIXTURES / "tiny/llama-long", directory), check=True)
                subprocess.run(as_run_user("cp", source, directory / "tokenizer_config.json"), check=True)
        return directory

    def at_work(self):
        """Requests that the engine has: running or waiting."""
        return self.value("SELECT running + waiting FROM millm.status()")

    def wait_idle(self):
        wait_true(lambda: self.at_work() == 0, "the engine is idle")


def statement(function, args):
    def cast(name, value):
        if isinstance(value, dict) or name in ("messages", "template_kwargs"):
            return json.dumps(value), "::jsonb"
        return value, "::text" if isinstance(value, str) else "::text[]" if isinstance(value, list) else ""
    cooked = {name: cast(name, value) for name, value in args.items()}
    return (f"SELECT * FROM millm.{function}(" + ", ".join(f"{n} => %s{c}" for n, (_, c) in cooked.items()) + ")", [v for v, _ in cooked.values()])


class Bridge:
    """A running millm-bridge.  Settings are its flags, with underscores."""

    def __init__(self, cluster, name="bridge", **settings):
        self.log = cluster.dir / f"{name}.log"
        settings = {"listen": "127.0.0.1:0", "database": cluster.conninfo("bridge")} | settings
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
        with open(self.log, "a") as log:
            at = log.tell()
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("MILLM_", "PG"))}
            self.process = subprocess.Popen(as_run_user(BRIDGE, *flags), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/")

        def listening():
            text = self.log.read_text()[at:]
            assert self.process.poll() is None, f"millm-bridge ended: {text}"
            return re.search(r"127\.0\.0\.1:([1-9]\d*)", text)
        self.port = int(wait_true(listening, "the bridge says where it listens")[1])
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def pid(self):
        """The bridge's own, not runuser's."""
        pid = self.process.pid
        while True:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if not children:
                return pid
            pid = int(children[0])

    def stop(self):
        """SIGTERM; returns the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def rss_kb(self):
        """Resident memory; 0 under AddressSanitizer, which keeps what is freed."""
        if "libasan" in Path(f"/proc/{self.pid}/maps").read_text():
            return 0
        return int(re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.M)[1])

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def request(self, method, path, body=None, key=None, headers={}, timeout=PATIENCE):
        """A request of its own connection: (status, headers, JSON body or text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = dict(headers)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            text = reply.read()
            kind = reply.getheader("Content-Type", "")
            return reply.status, reply.headers, json.loads(text) if kind.startswith("application/json") else text.decode()
        finally:
            connection.close()
