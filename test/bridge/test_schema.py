"""Schemathesis: what /openapi.json promises is what is served.

All of its checks, among them: no 5xx, no status, content type, header or shape of a body that the document does not have,
bad data refused, other methods refused, keys not ignored.
"""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Bridge

HERE = Path(__file__).parent


@pytest.mark.parametrize("who", ["nobody", "user", "admin"])
def test_schemathesis(cluster, keys, who):
    cluster.load("tiny-chat")
    bridge = Bridge(cluster, f"schema-{who}", keepalive_interval=1)
    command = [Path(sys.executable).with_name("st"), "--config-file", HERE / "schemathesis.toml", "run", f"{bridge.url}/openapi.json", "--checks=all",
               "--phases=examples,coverage,fuzzing,stateful", "--seed=1"]
    if who != "nobody":
        command += ["--header", f"Authorization: Bearer {keys[who]}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/tmp")
    tested = re.search(r"(\d+) generated", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert tested and int(tested[1]) > 100
    assert bridge.stop() == 0
