"""Busy, gone, ending: what clients see of it."""
import json
import os
import re
import signal
import subprocess
import threading
import time

import openai
import pytest
from conftest import make_roles
from harness import BRIDGE, LONG, PATIENCE, Bridge, Cluster, as_run_user, wait_true

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def small():
    """A server with a place for one request and one that waits."""
    cluster = Cluster("small", **{"millm.max_sequences": 1, "millm.max_queue": 1, "max_connections": 50, "millm.context_length": 8192})
    cluster.keys = make_roles(cluster)
    cluster.load("SmolLM2-135M-Instruct")
    yield cluster
    cluster.stop()


def client_of(bridge, cluster, **options):
    return openai.OpenAI(base_url=f"{bridge.url}/v1", api_key=cluster.keys["user"], **{"max_retries": 0, "timeout": PATIENCE} | options)


def test_busy_engine(small):
    bridge = Bridge(small, "busy")
    client = client_of(bridge, small)
    with client.chat.completions.create(**LONG, stream=True) as first:
        next(first)
        second = threading.Thread(target=lambda: client.chat.completions.create(**LONG | {"max_tokens": 2}))
        second.start()
        wait_true(lambda: small.at_work() == 2, "one runs and one waits")
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**LONG)
        assert (caught.value.status_code, caught.value.code) == (503, "server_busy")
        assert int(caught.value.response.headers["retry-after"]) >= 1
    second.join(PATIENCE)
    assert bridge.stop() == 0


def test_full_queue(small):
    bridge = Bridge(small, "full", pool_size=1, queue_size=1)
    client = client_of(bridge, small)
    first = client.chat.completions.create(**LONG, stream=True)
    next(first)
    answers = []
    second = threading.Thread(target=lambda: answers.append(client.models.list().data[0].id))
    second.start()
    time.sleep(0.3)
    with pytest.raises(openai.InternalServerError) as caught:
        client.models.list()
    assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) >= 1
    assert bridge.request("GET", "/health")[0] == 200
    # who tries again, as clients do by default, gets through
    patient = threading.Thread(target=lambda: answers.append(client_of(bridge, small, max_retries=5).models.list().data[0].id))
    patient.start()
    first.close()
    second.join(PATIENCE)
    patient.join(PATIENCE)
    assert answers == ["SmolLM2-135M-Instruct"] * 2
    assert bridge.stop() == 0


def test_keep_alive(small):
    """Comments while nothing is said: here a request waits for its turn."""
    bridge = Bridge(small, "keepalive", keepalive_interval=1)
    client = client_of(bridge, small)
    with client.chat.completions.create(**LONG, stream=True) as first:
        next(first)
        with client.chat.completions.with_streaming_response.create(**LONG | {"max_tokens": 3}, stream=True) as waiting:
            lines = waiting.iter_lines()
            assert next(line for line in lines if line) == ": keep-alive"
            first.close()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and "error" not in rest[-2]
        with client.chat.completions.create(**LONG | {"max_tokens": 3}, stream=True) as stream:
            assert len([c for c in stream if c.choices[0].delta.content]) >= 1, "the genuine client does not mind comments"
    assert bridge.stop() == 0


def test_drain(small):
    """SIGTERM: what runs is answered, nobody new is let in."""
    bridge = Bridge(small, "drain")
    client = client_of(bridge, small)
    stream = client.chat.completions.create(**LONG | {"max_tokens": 60}, stream=True)
    next(stream)
    os.kill(bridge.pid, signal.SIGTERM)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    assert bridge.process.wait(PATIENCE) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_drain_has_an_end(small):
    bridge = Bridge(small, "drain-end", drain_timeout=1)
    client = client_of(bridge, small)
    stream = client.chat.completions.create(**LONG, stream=True)
    next(stream)
    begin = time.monotonic()
    os.kill(bridge.pid, signal.SIGTERM)
    with pytest.raises(openai.APIError):  # an event of the stream, not a silent end
        list(stream)
    assert bridge.process.wait(PATIENCE) is not None and time.monotonic() - begin < 20
    small.wait_idle()


def test_database_restart(small):
    """A stream ends with an error, requests meanwhile are 503, and afterwards all is as before, by itself."""
    bridge = Bridge(small, "restart")
    client = client_of(bridge, small)
    stream = client.chat.completions.create(**LONG, stream=True)
    next(stream)
    small._run("pg_ctl", "-D", small.data, "-m", "fast", "-w", "stop")
    with pytest.raises(openai.APIError):
        list(stream)
    assert bridge.request("GET", "/health")[0] == 200
    status, _, reply = bridge.request("GET", "/ready")
    assert status == 503 and reply
    with pytest.raises(openai.InternalServerError) as caught:
        client.models.list()
    assert caught.value.status_code == 503
    small._run("pg_ctl", "-D", small.data, "-l", small.log, "-w", "start")
    small.load("SmolLM2-135M-Instruct")
    wait_true(lambda: bridge.request("GET", "/ready")[0] == 200, "the bridge has found the server again")
    assert client.chat.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
    assert bridge.stop() == 0


def test_engine_killed(small):
    """The engine dies in the middle: an error, then the next engine answers."""
    bridge = Bridge(small, "killed")
    client = client_of(bridge, small)
    stream = client.chat.completions.create(**LONG, stream=True)
    next(stream)
    os.kill(small.value("SELECT engine_pid FROM millm.status()"), signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    wait_true(lambda: small.value("SELECT engine_state FROM millm.status()") == "ready", "there is another engine")
    small.load("SmolLM2-135M-Instruct")
    assert client.chat.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
    assert bridge.stop() == 0


def refused(*flags):
    done = subprocess.run(as_run_user(BRIDGE, *flags), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, cwd="/")
    assert done.returncode != 0
    return done.stderr + done.stdout


def test_refuses_to_start(small):
    """Each with its reason."""
    listen = "--listen=127.0.0.1:0"
    database = f"--database={small.conninfo('bridge')}"
    assert "NOSUCH" in refused("--nosuch=1").upper()
    assert "pool_size" in refused(listen, database, "--pool_size=many").replace("-", "_")
    assert re.search("superuser", refused(listen, f"--database={small.conninfo('postgres')}"))
    small.execute("CREATE ROLE inheriting LOGIN INHERIT")
    assert "NOINHERIT" in refused(listen, f"--database={small.conninfo('inheriting')}")
    assert "max_connections" in refused(listen, database, "--pool_size=1000")
    assert re.search("loopback|127.0.0.1", refused("--listen=0.0.0.0:0", database, "--anonymous_role=app"))


def test_anonymous(small):
    bridge = Bridge(small, "anonymous", anonymous_role="app")
    assert bridge.request("GET", "/v1/models")[0] == 200
    assert bridge.request("GET", "/v1/models", key="wrong")[0] == 401, "a wrong key is not no key"
    assert bridge.request("POST", "/api/models/1/unload")[0] == 403
    status, _, reply = bridge.request("POST", "/v1/chat/completions", {"model": LONG["model"], "messages": HI, "max_tokens": 2})
    assert status == 200, reply
    assert bridge.stop() == 0


def test_audit(small):
    """What the database sees: the role of the key, its name and the request's in application_name."""
    bridge = Bridge(small, "audit")
    client = client_of(bridge, small)
    with client.chat.completions.create(**LONG, stream=True, extra_headers={"X-Request-Id": "audited-1"}) as stream:
        next(stream)
        with small.connect() as db:
            sessions = db.execute("SELECT usename, application_name, query FROM pg_stat_activity WHERE usename = 'bridge' AND state = 'active'").fetchall()
    assert len(sessions) == 1
    assert "user" in sessions[0][1] and "audited-1" in sessions[0][1]
    assert "Repeat the word" not in sessions[0][2], "a parameter, not a part of the statement"
    assert json.dumps(LONG["messages"]) not in small.log.read_text()
    assert bridge.stop() == 0
