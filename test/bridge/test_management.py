"""The management API, from the Hub to a loaded model; who may; events; what monitors and load balancers ask."""
import http.client
import json
import queue
import socket
import threading

import pytest
from harness import PATIENCE, Bridge, wait_true

REPO = "millm-test/tiny-llama"


@pytest.fixture
def api(bridge, keys):
    """api(method, path, body, key's name): (status, data or error)"""
    def call(method, path, body=None, key="admin"):
        status, _, reply = bridge.request(method, path, body, keys.get(key))
        assert set(reply) == {"success", "data", "error"} and reply["success"] == (status < 400), reply
        assert (reply["data"] is None or reply["success"]) and (reply["error"] is None) == reply["success"], reply
        return status, reply["data"] if reply["success"] else reply["error"]
    return call


class Events:
    """What GET /api/events sends, as (event, data), read on a thread of its own."""

    def __init__(self, bridge, key):
        self.connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=PATIENCE)
        self.connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {key}"})
        self.reply = self.connection.getresponse()
        assert self.reply.status == 200 and self.reply.getheader("Content-Type").startswith("text/event-stream")
        self.queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        text = ""
        try:
            while piece := self.reply.read1(65536):  # its readline() waits for more than a line
                text += piece.decode()
                *events, text = text.split("\n\n")
                for event in events:
                    if event.startswith("event: "):
                        name, data = event.split("\n")
                        self.queue.put((name[7:], json.loads(data[6:])))
        except (OSError, ValueError, http.client.HTTPException, AttributeError):
            pass

    def until(self, name):
        """All events up to the first of that name."""
        seen = []
        while not seen or seen[-1][0] != name:
            seen.append(self.queue.get(timeout=PATIENCE))
        return seen

    def seen(self):
        """All events since the last call."""
        return [self.queue.get() for _ in range(self.queue.qsize())]

    def close(self):
        self.connection.sock.shutdown(socket.SHUT_RDWR)  # close() would wait for the thread
        self.connection.close()


def test_from_hub_to_text(api, bridge, keys, cluster):
    for model in api("GET", "/api/models")[1]:
        if model["repo_id"]:
            api("DELETE", f"/api/models/{model['id']}")
    status, preview = api("POST", "/api/models/preview", {"repo_id": REPO})
    assert status == 200 and preview == cluster.call("preview", repo_id=REPO)
    events = Events(bridge, keys["user"])
    status, model = api("POST", "/api/models", {"repo_id": REPO, "quantization": "FP16", "name": "from-hub"})
    assert status == 202 and (model["name"], model["repo_id"], model["quantization"]) == ("from-hub", REPO, "FP16")
    assert set(model) == {c[0] for c in cluster.execute("SELECT * FROM millm.models LIMIT 0").description}
    assert events.until("model:download:complete")[-1][1]["model_id"] == model["id"]
    path = f"/api/models/{model['id']}"
    assert api("GET", path)[1]["status"] == "ready"
    assert api("POST", "/api/models", {"repo_id": REPO, "quantization": "FP16"})[0] == 409, "it is there already"
    status, _ = api("POST", f"{path}/load", {})
    assert status == 202
    assert events.until("model:load:complete")[-1][1]["model_id"] == model["id"]
    assert wait_true(lambda: api("GET", path)[1]["status"] == "loaded", "the model is loaded")
    status, _, reply = bridge.request("POST", "/v1/completions", {"model": "from-hub", "prompt": "x", "max_tokens": 2}, keys["user"])
    assert status == 200, reply
    assert api("DELETE", path)[0] in (400, 409), "a loaded model is not deleted"
    assert api("POST", f"{path}/unload")[0] == 200
    assert api("POST", f"{path}/load", {"wait": True}) and api("GET", path)[1]["status"] == "loaded"
    assert api("POST", f"{path}/unload")[0] == 200
    assert api("DELETE", path)[0] == 200
    assert api("GET", path)[0] == 404
    events.close()


def test_local_model(api, cluster):
    status, model = api("POST", "/api/models", {"path": str(cluster.model_directory("tiny")), "quantization": "FP16", "name": "local-one"})
    if status == 409:  # another test has it registered
        return
    assert (status, model["source"]) == (202, "local")
    assert api("DELETE", f"/api/models/{model['id']}")[0] == 200


@pytest.mark.parametrize("method, path, body, status, code", [
    ("GET", "/api/models/999999", None, 404, "MODEL_NOT_FOUND"), ("POST", "/api/models/999999/load", {}, 404, "MODEL_NOT_FOUND"), ("DELETE", "/api/models/999999", None, 404, "MODEL_NOT_FOUND"),
    ("POST", "/api/models/999999/cancel", None, 404, "MODEL_NOT_FOUND"), ("POST", "/api/models", {"repo_id": "nobody/nothing"}, 404, "REPO_NOT_FOUND"),
    ("POST", "/api/models", {"repo_id": "not a repo"}, 400, "INVALID_REPO_ID"), ("POST", "/api/models", {"path": "/nowhere"}, 400, "INVALID_LOCAL_PATH"),
    ("POST", "/api/models", {"repo_id": REPO, "quantization": "Q5"}, 400, "INVALID_ARGUMENT"), ("POST", "/api/models", {"repo_id": "millm-test/unknown-arch"}, 400, "UNSUPPORTED_ARCHITECTURE"),
    ("POST", "/api/models", {}, 400, None), ("POST", "/api/models", {"repo_id": REPO, "path": "/x"}, 400, None), ("POST", "/api/models", {"repo": REPO}, 400, None),
    ("GET", "/api/models/x", None, (400, 404), None), ("GET", "/api/nothing", None, 404, None), ("PUT", "/api/models", {}, 405, None),
    ("POST", "/api/models/preview", {"repo_id": "nobody/nothing"}, 404, "REPO_NOT_FOUND"),
])
def test_errors(api, method, path, body, status, code):
    got, error = api(method, path, body)
    assert got in (status if isinstance(status, tuple) else (status,)), error
    assert error["message"] and (code is None or error["code"] == code), error


def test_who_may(api, cluster, tiny):
    assert api("GET", "/api/models", key="user")[0] == 200
    model = next(m for m in api("GET", "/api/models")[1] if m["name"] == tiny)
    for method, path, body in (("POST", "/api/models", {"repo_id": REPO}), ("POST", f"/api/models/{model['id']}/load", {}), ("POST", f"/api/models/{model['id']}/unload", None),
                               ("DELETE", f"/api/models/{model['id']}", None)):
        assert api(method, path, body, "user")[0] == 403, path
        assert api(method, path, body, "stranger")[0] == 403, path
        assert api(method, path, body, "revoked")[0] == 401, path
        assert api(method, path, body, "no key at all")[0] == 401, path
    assert api("GET", "/api/models", key="stranger")[0] == 403
    assert api("GET", f"/api/models/{model['id']}")[1]["status"] == "loaded"


def test_events_are_bounded(bridge, keys, cluster, tiny):
    """A listener that does not read: others get theirs, and the bridge does not keep his without end."""
    deaf = http.client.HTTPConnection("127.0.0.1", bridge.port)
    deaf.connect()
    deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.request("GET", "/api/events", headers={"Authorization": f"Bearer {keys['user']}"})
    events = Events(bridge, keys["user"])
    before = bridge.rss_kb()
    with cluster.connect() as db:
        for _ in range(2000):
            db.execute("SELECT pg_notify('millm_progress', %s)", [json.dumps({"event": "model:load:progress", "model_id": 1, "stage": "x" * 7000})])

        def end_seen():  # one that reads too slowly loses some events, too
            db.execute("SELECT pg_notify('millm_progress', %s)", [json.dumps({"event": "model:test:end"})])
            return ("model:test:end", {"event": "model:test:end"}) in events.seen()
        wait_true(end_seen, "the end comes")
    assert bridge.rss_kb() - before < 16 * 1024
    deaf.close()
    events.close()


def test_what_is_not_an_event(bridge, keys, cluster):
    """Any role can notify: what is no JSON object of an event's shape breaks nobody's stream."""
    events = Events(bridge, keys["user"])
    with cluster.connect() as db:
        for payload in ("", "nonsense", "[]", '{"event": "a\\nb"}', "line\nline", '{"event": 1}'):
            db.execute("SELECT pg_notify('millm_progress', %s)", [payload])
        db.execute("SELECT pg_notify('millm_progress', %s)", [json.dumps({"event": "model:test:end", "n": 1})])
    assert events.until("model:test:end")[-1] == ("model:test:end", {"event": "model:test:end", "n": 1})
    events.close()


def test_system(api, bridge, cluster):
    status, memory = api("GET", "/api/system/memory", key="user")
    assert status == 200 and json.dumps(memory).count("total_bytes") >= 1


def test_probes(bridge, cluster, keys, tiny):
    assert bridge.request("GET", "/health")[0] == 200
    assert bridge.request("GET", "/ready")[0] == 200
    bridge.request("POST", "/v1/completions", {"model": tiny, "prompt": "x", "max_tokens": 3}, keys["user"])
    status, headers, text = bridge.request("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name not in samples, f"{name} twice"
            samples[name] = float(value)
    for name in {n.split("{")[0] for n in samples}:
        family = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        assert f"# TYPE {family} " in text or f"# TYPE {name} " in text, f"{name} has no TYPE"
    assert all(k not in text for k in keys.values())


def test_openapi(bridge):
    status, _, document = bridge.request("GET", "/openapi.json")
    assert status == 200 and document["openapi"].startswith("3.1")
    served = {"/v1/models", "/v1/models/{id}", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/models", "/api/models/{id}", "/api/models/{id}/load", "/api/models/{id}/unload",
              "/api/models/{id}/cancel", "/api/models/preview", "/api/events", "/api/system/memory", "/health", "/ready", "/metrics", "/openapi.json"}
    assert set(document["paths"]) >= served, served - set(document["paths"])
    for path in document["paths"]:
        status, headers, _ = bridge.request("TRACE", path.replace("{id}", "1"))
        assert status in (405, 501), path


def test_cors(bridge, cluster, keys):
    page = Bridge(cluster, "cors", cors_origin="https://app.example")
    _, headers, _ = page.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://app.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"})
    assert headers["Access-Control-Allow-Origin"] == "https://app.example" and "POST" in headers["Access-Control-Allow-Methods"]
    assert {"authorization", "content-type"} <= {h.strip().lower() for h in headers["Access-Control-Allow-Headers"].split(",")}
    assert page.request("GET", "/v1/models", key=keys["user"], headers={"Origin": "https://app.example"})[1]["Access-Control-Allow-Origin"] == "https://app.example"
    assert page.request("GET", "/v1/models", key=keys["user"], headers={"Origin": "https://evil.example"})[1]["Access-Control-Allow-Origin"] in (None, "https://app.example")
    assert page.stop() == 0
