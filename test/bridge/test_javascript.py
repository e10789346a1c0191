"""The genuine JavaScript client: client.mjs runs it, here its answers are compared with SQL's."""
import array
import json
import os
import subprocess
from pathlib import Path

import pytest
from harness import PATIENCE, ROOT

HERE = Path(__file__).parent
HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def out(bridge, keys, cluster):
    model = cluster.load("tiny-chat")
    command = ["node", HERE / "client.mjs", f"{bridge.url}/v1", keys["user"], keys["revoked"], model]
    done = subprocess.run(command, env=os.environ | {"NODE_PACKAGES": str(ROOT / ".venvb/node/node_modules")}, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sql(cluster):
    return cluster.call("chat", messages=HI, max_tokens=20, seed=8, temperature=1.0)


def test_models(out):
    assert (out["models"], out["model"]) == (["tiny-chat"], "tiny-chat")


def test_chat(out, sql):
    choice = out["chat"]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (sql["text"], "length")
    assert len(choice["logprobs"]["content"]) == 20
    assert out["requestID"]


def test_stream(out, sql):
    assert out["streamed"] == out["helper"] == sql["text"]
    assert (out["finish"], out["streamedUsage"]) == ("length", out["chat"]["usage"])


def test_completions(out, cluster):
    assert out["completions"] == [cluster.call("complete", prompt=p, max_tokens=6, temperature=0.0)["text"] for p in ("The quick", "Once")]


def test_embeddings(out, cluster):
    expected = cluster.rows("embed", texts=["x", "The quick brown fox"])
    for name in ("embeddings", "embeddingsFloat"):
        assert [array.array("f", v) for v in out[name]] == [array.array("f", v) for v in expected]


def test_errors(out):
    assert out["unauthorized"] == {"kind": "AuthenticationError", "status": 401, "code": "invalid_api_key", "requestID": True}
    assert out["notFound"] == {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "requestID": True}
    assert (out["badRequest"]["kind"], out["badRequest"]["status"]) == ("BadRequestError", 400)
    assert (out["tooLong"]["kind"], out["tooLong"]["code"]) == ("BadRequestError", "context_length_exceeded")


def test_abort(out, cluster):
    assert 3 <= out["read"] < 1000  # what had come already is still handed out
    cluster.wait_idle()


def test_parallel(out, cluster):
    assert out["parallel"] == [cluster.call("chat", messages=HI, max_tokens=10, temperature=1.0, seed=seed)["text"] for seed in range(1, 9)]
