"""bench/bridge -- what the bridge costs beside the same statements over libpq.

A tiny model, whose tokens take some 60 microseconds, is asked the same thing over three roads, one after the other, round by round:

    SQL           one statement on a connection that stays: SELECT millm.chat(...)
    transaction   the transaction that the bridge makes of a request: BEGIN and role, the statement and COMMIT (libpq's pipeline)
    bridge        POST /v1/chat/completions on a connection that stays

Per request: max_tokens 1; the bridge's overhead is the difference of the medians (goal: less than 2 ms over SQL).  Per token: streams of
--tokens tokens, chat_stream() in single-row mode beside "stream": true; the difference divided by the tokens (goal: less than 100
microseconds).  Both clients do the least that reads everything.  CPU is the bridge's own, as the kernel counts it.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import socket
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from psycopg import pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test/bridge"))
from conftest import make_roles  # noqa: E402
from harness import Bridge, Cluster  # noqa: E402

MESSAGES = [{"role": "user", "content": "Tell me about the number 7."}]
BEGIN = (b"SELECT set_config('role', k.role, true), set_config('statement_timeout', '600000', true), set_config('application_name', 'bench', true), k.* "
         b"FROM millm.authenticate($1) k")
CHAT = b"SELECT millm.chat($1::jsonb, max_tokens => $2::integer, temperature => 0, model => $3::text)"
STREAM = b"SELECT millm.chat_stream($1::jsonb, max_tokens => $2::integer, temperature => 0, model => $3::text)"


class Libpq:
    """The least that a client of libpq can do."""

    def __init__(self, conninfo):
        self.db = pq.PGconn.connect(conninfo.encode())
        assert self.db.status == pq.ConnStatus.OK, self.db.error_message

    def statement(self, sql, *args):
        result = self.db.exec_params(sql, [a.encode() for a in args])
        assert result.status == pq.ExecStatus.TUPLES_OK, result.error_message

    def transaction(self, key_hash, sql, *args):
        db = self.db
        db.enter_pipeline_mode()
        db.send_query_params(b"BEGIN", [])
        db.send_query_params(BEGIN, [b"\\x" + key_hash.encode()])
        db.pipeline_sync()
        self._results()
        db.send_query_params(sql, [a.encode() for a in args])
        db.send_query_params(b"COMMIT", [])
        db.pipeline_sync()
        self._results()
        db.exit_pipeline_mode()

    def _results(self):
        while True:
            result = self.db.get_result()
            if result is None:
                continue
            assert result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.PIPELINE_SYNC), result.error_message
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                return

    def stream(self, *args):
        """Number of rows."""
        self.db.send_query_params(STREAM, [a.encode() for a in args])
        self.db.set_single_row_mode()
        rows = 0
        while (result := self.db.get_result()) is not None:
            assert result.status in (pq.ExecStatus.SINGLE_TUPLE, pq.ExecStatus.TUPLES_OK), result.error_message
            rows += result.status == pq.ExecStatus.SINGLE_TUPLE
        return rows


class Http:
    """The least that a client of HTTP can do: requests made beforehand, answers read to their end."""

    def __init__(self, bridge, key):
        self.port, self.key = bridge.port, key
        self.connect()

    def connect(self):
        self.sock = socket.create_connection(("127.0.0.1", self.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, **body):
        body = json.dumps({"model": "tiny-chat", "messages": MESSAGES, "temperature": 0} | body)
        return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}").encode()

    def answer(self, request):
        self.sock.sendall(request)
        data = self.sock.recv(65536)
        while True:
            head, end, body = data.partition(b"\r\n\r\n")
            length = end and re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            if length and len(body) >= int(length[1]):
                assert head.startswith(b"HTTP/1.1 200"), data
                return
            data += self.sock.recv(65536)

    def stream(self, request):
        """Number of events."""
        self.sock.sendall(request)
        events, tail = 0, b""
        while b"data: [DONE]\n\n" not in tail or not tail.endswith(b"0\r\n\r\n"):
            data = self.sock.recv(1 << 20)
            assert data
            events += data.count(b"data: ")
            tail = (tail + data)[-64:]
        return events


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(call, *args):
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


def interleaved(rounds, **roads):
    """Seconds of each round, by road; a few rounds first that do not count."""
    took = {name: [] for name in roads}
    for i in range(-max(3, rounds // 20), rounds):
        for name, road in roads.items():
            seconds = timed(road)
            if i >= 0:
                took[name].append(seconds)
    return took


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=1000, help="of requests")
    p.add_argument("--streams", type=int, default=21, help="rounds of streams")
    p.add_argument("--tokens", type=int, default=2000, help="of a stream")
    p.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    a = p.parse_args()

    cluster = Cluster("cluster")
    key = make_roles(cluster)["user"]
    cluster.load("tiny-chat")
    bridge = Bridge(cluster)
    db, as_bridge, http = Libpq(cluster.conninfo()), Libpq(cluster.conninfo("bridge")), Http(bridge, key)
    key_hash = hashlib.sha256(key.encode()).hexdigest()
    messages = json.dumps(MESSAGES)

    one = http.request(max_tokens=1)

    def fresh():
        http.connect()
        http.answer(one)
    requests = interleaved(a.rounds, **{
        "SQL": lambda: db.statement(CHAT, messages, "1", "tiny-chat"),
        "transaction": lambda: as_bridge.transaction(key_hash, CHAT, messages, "1", "tiny-chat"),
        "bridge": lambda: http.answer(one),
        "bridge, new connection": fresh})
    before = cpu_seconds(bridge.pid)
    for _ in range(a.rounds):
        http.answer(one)
    request_cpu = (cpu_seconds(bridge.pid) - before) / a.rounds

    many = http.request(max_tokens=a.tokens, stream=True)
    pieces = {"SQL": db.stream(messages, str(a.tokens), "tiny-chat"), "bridge": http.stream(many)}
    before = cpu_seconds(bridge.pid)
    streams = interleaved(a.streams, SQL=lambda: db.stream(messages, str(a.tokens), "tiny-chat"), bridge=lambda: http.stream(many))
    token_cpu = (cpu_seconds(bridge.pid) - before) / (a.streams + max(3, a.streams // 20)) / a.tokens
    memory = bridge.rss_kb()
    bridge.stop()
    cluster.stop()

    median = {name: 1e3 * statistics.median(t) for name, t in requests.items()}
    per_token = {name: 1e6 * statistics.median(t) / a.tokens for name, t in streams.items()}
    machine = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    print(f"{date.today()}, {machine}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    print(f"one request, max_tokens 1, ms ({a.rounds} rounds)    median     p95   over SQL")
    for name, t in requests.items():
        print(f"  {name:36}         {median[name]:7.3f} {1e3 * sorted(t)[int(0.95 * len(t))]:7.3f}    {median[name] - median['SQL']:+7.3f}")
    print(f"  the bridge's CPU                             {1e3 * request_cpu:7.3f}\n")
    print(f"one token of a stream of {a.tokens}, us ({a.streams} rounds)  median   over SQL   pieces")
    for name in streams:
        print(f"  {name:36}         {per_token[name]:7.1f}    {per_token[name] - per_token['SQL']:+7.1f}   {pieces[name]}")
    print(f"  the bridge's CPU                             {1e6 * token_cpu:7.1f}\n")
    print(f"the bridge's memory at the end: {memory / 1024:.1f} MB")
    if a.save:
        result = {"date": str(date.today()), "command": "bench/bridge " + " ".join(sys.argv[1:]), "cpu": machine, "cpus": os.cpu_count(), "load": os.getloadavg()[0],
                  "request_ms": {n: {"median": round(median[n], 3), "p95": round(1e3 * sorted(t)[int(0.95 * len(t))], 3)} for n, t in requests.items()},
                  "request_bridge_cpu_ms": round(1e3 * request_cpu, 3), "tokens": a.tokens, "token_us": {n: round(v, 1) for n, v in per_token.items()},
                  "token_bridge_cpu_us": round(1e6 * token_cpu, 1), "bridge_rss_kb": memory}
        (ROOT / f"bench/results/{date.today()}-bridge.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
