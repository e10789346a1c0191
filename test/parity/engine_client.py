"""Speak millm's frames (src/wire/wire.h) to a running helper; for tests and for people.

    python test/parity/engine_client.py SOCKET '{"op": "status"}'

prints every frame of the answer, one a line.
"""
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = float(os.environ.get("MILLM_TEST_PATIENCE", 60))		# seconds without a word; an engine with a sanitizer needs more
HELLO, REQUEST, PROGRESS, TEXT, VECTOR, RESULT, ERROR = range(1, 8)
VERSION = next(line.split('"')[1] for line in (ROOT / "src/base/version.h").read_text().splitlines() if "define MILLM_VERSION " in line)


class HelperError(Exception):
    """An ERROR frame: .code, .message, .detail, .hint; all of it in .payload."""

    def __init__(self, payload):
        super().__init__(f"{payload['code']}: {payload['message']}" + (f" ({payload['detail']})" if "detail" in payload else ""))
        self.payload = payload
        self.code, self.message = payload["code"], payload["message"]
        self.detail, self.hint = payload.get("detail"), payload.get("hint")


def frame(kind, payload):
    if not isinstance(payload, bytes):
        payload = json.dumps(payload).encode()
    return struct.pack("<II", len(payload), kind) + payload


class Conversation:
    """One connection: one request, then its frames.  Closing it early cancels."""

    def __init__(self, socket_path, op=None, timeout=PATIENCE, /, **fields):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self.sock.connect(str(socket_path))
        self.buffer = b""
        if op is not None:
            self.send(HELLO, {"protocol": 1, "version": VERSION, "program": "engine_client.py"})
            self.send(REQUEST, {"op": op, **fields})

    def send(self, kind, payload):
        self.sock.sendall(frame(kind, payload))

    def _exactly(self, n):
        while len(self.buffer) < n:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the helper hung up")
            self.buffer += data
        out, self.buffer = self.buffer[:n], self.buffer[n:]
        return out

    def receive(self):
        """The next frame after HELLO: (kind, payload).  Raises HelperError for an ERROR frame."""
        while True:
            length, kind = struct.unpack("<II", self._exactly(8))
            payload = self._exactly(length)
            if kind != VECTOR:
                payload = json.loads(payload)
            if kind == ERROR:
                self.close()
                raise HelperError(payload)
            if kind == HELLO:
                continue
            if kind == RESULT:
                self.close()
            return kind, payload

    def frames(self):
        while True:
            kind, payload = self.receive()
            yield kind, payload
            if kind == RESULT:
                return

    def result(self):
        """Read to the end: the RESULT's payload; the frames before it are in .before."""
        self.before = []
        for kind, payload in self.frames():
            if kind == RESULT:
                return payload
            self.before.append((kind, payload))

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def call(socket_path, op, timeout=PATIENCE, /, **fields):
    """One request and its RESULT."""
    with Conversation(socket_path, op, timeout, **fields) as c:
        return c.result()


class Engine:
    """A millm-engine of our own, as the supervisor starts it: fd 3 is its line to us."""

    def __init__(self, env=None, program=os.environ.get("MILLM_ENGINE", ROOT / "build/millm-engine")):
        self.dir = tempfile.TemporaryDirectory(prefix="millm-test-")
        self.path = f"{self.dir.name}/engine.sock"
        self.log = open(f"{self.dir.name}/log", "w+")
        self.line, child = socket.socketpair()
        os.set_inheritable(child.fileno(), True)
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec 3<&"$0" && exec "$@"', str(child.fileno()), str(program), "serve", "--socket", self.path],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env={**os.environ, **(env or {})}, pass_fds=[child.fileno()])
        child.close()
        self.line.settimeout(20)
        hello = self.line.recv(4096)
        if not hello:
            raise RuntimeError(f"the engine did not start: {self.lines()}")
        assert struct.unpack("<II", hello[:8])[1] == HELLO
        assert json.loads(hello[8:])["program"] == "millm-engine"

    def call(self, op, timeout=PATIENCE, /, **fields):
        return call(self.path, op, timeout, **fields)

    def open(self, op, timeout=PATIENCE, /, **fields):
        return Conversation(self.path, op, timeout, **fields)

    def lines(self):
        return Path(self.log.name).read_text().splitlines()

    def stop(self):
        """The supervisor goes away; the engine's exit status."""
        self.line.close()
        try:
            return self.process.wait(15)
        finally:
            self.process.kill()
            self.log.close()
            self.dir.cleanup()


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    request = json.loads(sys.argv[2])
    try:
        for _, payload in Conversation(sys.argv[1], request.pop("op"), None, **request).frames():
            print(json.dumps(payload, ensure_ascii=False), flush=True)
    except HelperError as e:
        sys.exit(f"{e}" + (f"\nHINT: {e.hint}" if e.hint else ""))


if __name__ == "__main__":
    main()
