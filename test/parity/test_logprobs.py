"""logprobs and logit_bias: log-softmax of the raw logits, whatever the sampling does to them, as transformers computes it.

The engine continues a prompt and says of each token how probable it found it; transformers, in float32, reads the same ids.  What sampling changes (temperature,
penalties, biases) must not show.
"""
import json

import numpy as np
import pytest

from conftest import FIXTURES, SMOLLM2, TINY, engine_logits, reference, reference_logits
from engine_client import Engine, HelperError

PROMPT = "Once upon a time, 日本 said: "
SAMPLING = {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": 1,
            "logit_bias": {"5": 3.5, "17": -100, "40": 1}}


def log_softmax(logits):
    z = logits.astype(np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def check(choice, want, tolerance, top):
    """Entries of a choice against log-probabilities [n, vocab] of the positions before its tokens."""
    assert len(choice["logprobs"]) == len(want) > 0
    for entry, row in zip(choice["logprobs"], want):
        assert abs(entry["logprob"] - row[entry["id"]]) < tolerance
        others = entry["top_logprobs"]
        ids = [o["id"] for o in others]
        assert len(set(ids)) == top and [o["logprob"] for o in others] == sorted((o["logprob"] for o in others), reverse=True)
        for o in others:
            assert abs(o["logprob"] - row[o["id"]]) < tolerance
        rest = np.delete(row, ids)
        assert top == 0 or rest.max() < others[-1]["logprob"] + tolerance, "a more probable one is not there"
        for o in [entry, *others]:
            if o["bytes"] is None:
                assert o["token"] == ""
            else:
                assert o["token"] == bytes(o["bytes"]).decode(errors="replace")


def continued(engine, **fields):
    """Ids of the prompt and of each choice, and the choices."""
    r = engine.call("generate", prompt=PROMPT, logprobs=True, n=2, **fields)
    return engine.call("tokenize", text=PROMPT)["ids"], r["choices"]


# tolerances: what two float32 implementations of these sizes differ by (test_logits.py), in nats
@pytest.mark.parametrize("model, tolerance", [(TINY / "llama-long", 1e-4), (TINY / "gemma2", 1e-4), (TINY / "qwen3_moe", 1e-4), (SMOLLM2, 3e-4)],
                         ids=lambda p: getattr(p, "name", None))
def test_as_transformers(model, tolerance):
    genuine = reference(model)
    e = Engine(env={"MILLM_KERNELS": "ref"})
    e.call("load", path=str(model), context_length=64 if model.parent == TINY else 256)
    for sampling in (SAMPLING, {"temperature": 0}):
        prompt, choices = continued(e, max_tokens=8, top_logprobs=20, **sampling)
        for choice in choices:
            ids = [entry["id"] for entry in choice["logprobs"]]
            want = log_softmax(reference_logits(genuine, prompt + ids)[len(prompt) - 1:-1])
            check(choice, want, tolerance, 20)
            if sampling["temperature"] == 0:
                assert all(entry["id"] == entry["top_logprobs"][0]["id"] for entry in choice["logprobs"])
    assert e.stop() == 0


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct-nf4", "SmolLM2-135M-Instruct-int8"])
def test_beside_a_screening_copy(name, tmp_path):
    """Without logprobs these models read a part of their head only; a sum over all needs all."""
    model = FIXTURES / name
    e = Engine(env={"MILLM_KERNELS": "ref"})
    e.call("load", path=str(model), context_length=256)
    for sampling in (SAMPLING, {"temperature": 0}):
        prompt, choices = continued(e, max_tokens=6, top_logprobs=5, **sampling)
        plain = e.call("generate", prompt=PROMPT, n=2, max_tokens=6, **sampling)
        assert [c["text"] for c in plain["choices"]] == [c["text"] for c in choices], "to ask for logprobs changes no choice"
        ids = [entry["id"] for entry in choices[0]["logprobs"]]
        ours = engine_logits(model, prompt + ids, tmp_path)[len(prompt) - 1:-1]
        check(choices[0], log_softmax(ours), 1e-3, 5)
    assert e.stop() == 0


@pytest.fixture(scope="module")
def smollm2():
    e = Engine()
    e.call("load", path=str(SMOLLM2), context_length=512, deterministic=True)	# no bit depends on how many choices there are
    yield e
    assert e.stop() == 0


@pytest.mark.parametrize("stop", [[], ["e", "のは", "。"]])
def test_streamed(smollm2, stop):
    """The rows' entries, one behind the other, are those of the whole: also of tokens that end within a character or wait for a stop sequence."""
    fields = {"prompt": "日本の首都は", "max_tokens": 40, "temperature": 1, "seed": 3, "stop": stop, "logprobs": True, "top_logprobs": 2}
    whole = smollm2.call("generate", **fields)
    assert len(whole["logprobs"]) == whole["usage"]["completion_tokens"]	# this one meets no eos
    if not stop:
        assert b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]).decode(errors="replace") == whole["text"]
        assert any("�" in entry["token"] for entry in whole["logprobs"])
    with smollm2.open("generate", **fields, stream=True) as c:
        last = c.result()
    rows = [row for _, row in c.before] + [last]
    assert [entry for row in rows for entry in row["logprobs"]] == whole["logprobs"]
    assert "".join(row.get("text", "") for row in rows) == whole["text"] and all(row["text"] for row in rows[:-1])
    several = smollm2.call("generate", **fields, n=3)
    assert several["choices"][0] == {"index": 0, **{k: whole[k] for k in ("text", "finish_reason", "logprobs")}}
    with smollm2.open("generate", **fields, n=3, stream=True) as c:
        assert set(c.result()) == {"usage", "seed", "queue_ms", "compute_ms"}
    for i, choice in enumerate(several["choices"]):
        assert [entry for _, row in c.before if row["index"] == i for entry in row["logprobs"]] == choice["logprobs"]


def test_eos_has_no_entry(smollm2):
    r = smollm2.call("generate", messages=[{"role": "user", "content": "Hi"}], max_tokens=100, temperature=0, logprobs=True)
    assert r["finish_reason"] == "stop" and len(r["logprobs"]) == r["usage"]["completion_tokens"] - 1
    assert b"".join(bytes(entry["bytes"]) for entry in r["logprobs"]).decode() == r["text"]


def test_special_tokens(smollm2):
    """A special token shows no text; its entry has its name, and a stream that shows nothing brings entries all the same."""
    start = smollm2.call("tokenize", text="<|im_start|>")["ids"][0]
    r = smollm2.call("generate", prompt="x", max_tokens=3, temperature=0, logit_bias={str(start): 100}, logprobs=True)
    assert r["text"] == "" and [entry["token"] for entry in r["logprobs"]] == ["<|im_start|>"] * 3
    with smollm2.open("generate", prompt="x", max_tokens=300, temperature=0, logit_bias={str(start): 100}, logprobs=True, stream=True) as c:
        last = c.result()
    assert [(row["text"], len(row["logprobs"])) for _, row in c.before] == [("", 256)] and len(last["logprobs"]) == 44


def test_zero_byte(smollm2):
    """PostgreSQL's json and text have no U+0000."""
    zero = json.loads((SMOLLM2 / "tokenizer.json").read_text())["model"]["vocab"]["\u0100"]	# its letter in the byte alphabet
    r = smollm2.call("generate", prompt="x", max_tokens=2, temperature=0, logit_bias={str(zero): 100}, logprobs=True)
    assert r["text"] == "��" and [(entry["token"], entry["bytes"]) for entry in r["logprobs"]] == [("�", [0])] * 2


def test_logit_bias(smollm2):
    ask = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    plain = smollm2.call("generate", **ask)["logprobs"][0]
    first, second = plain["top_logprobs"][:2]
    gap = first["logprob"] - second["logprob"]

    def biased(bias, **fields):
        return smollm2.call("generate", **{**ask, **fields}, logit_bias=bias)["logprobs"]

    assert plain["id"] == first["id"]
    assert biased({str(first["id"]): -100})[0]["id"] == second["id"]
    assert biased({str(second["id"]): gap - 0.01})[0]["id"] == first["id"]
    assert biased({str(second["id"]): gap + 0.01})[0]["id"] == second["id"]
    raised = biased({str(second["id"]): 100})[0]
    assert raised["id"] == second["id"] and raised["top_logprobs"] == plain["top_logprobs"], "logprobs know of no bias"
    # drawn: with -100 it never comes
    n = 8 * 16
    drawn = [c["logprobs"][0]["id"] for seed in range(8) for c in smollm2.call(
        "generate", **{**ask, "temperature": 1, "n": 16}, seed=seed, logit_bias={str(first["id"]): -100})["choices"]]
    assert len(drawn) == n and first["id"] not in drawn
    assert biased({str(first["id"]): 100}, temperature=1, seed=1, max_tokens=4)[0]["id"] == first["id"]
    # beside a penalty: first the bias, then the penalty
    assert [entry["id"] for entry in biased({str(first["id"]): 100}, max_tokens=3)] == [first["id"]] * 3
    assert [entry["id"] for entry in biased({str(first["id"]): 100}, max_tokens=3, repetition_penalty=100)] != [first["id"]] * 3


@pytest.mark.parametrize("fields, word", [
    ({"logprobs": 1}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs needs logprobs"), ({"top_logprobs": 0, "logprobs": False}, "top_logprobs needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logit_bias": [1]}, "logit_bias"), ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"": 1}}, "logit_bias"), ({"logit_bias": {"1": "2"}}, "logit_bias"), ({"logit_bias": {"1": 100.5}}, "logit_bias"),
    ({"logit_bias": {"1": -101}}, "logit_bias"), ({"logit_bias": {"99999999": 1}}, "logit_bias"), ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
])
def test_named_refusals(smollm2, fields, word):
    with pytest.raises(HelperError) as e:
        smollm2.call("generate", prompt="x", **fields)
    assert e.value.code == "INVALID_ARGUMENT" and word in e.value.message


def test_most_biases(smollm2):
    assert smollm2.call("generate", prompt="x", max_tokens=1, logit_bias={str(i): 1 for i in range(300)})["usage"]["completion_tokens"] == 1


def test_tokens_that_are_no_byte_level_ones():
    """Metaspace and byte fallback (Gemma): what each token adds is the text, put together."""
    e = Engine()
    e.call("load", path=str(FIXTURES / "gemma-3-270m"), context_length=128)
    euro = json.loads((FIXTURES / "gemma-3-270m" / "tokenizer.json").read_text())["model"]["vocab"]["<0xE2>"]
    r = e.call("generate", prompt="<bos>Es waren einmal zwei Br\u00fcder,", max_tokens=12, temperature=0, logprobs=True, top_logprobs=2)
    assert b"".join(bytes(entry["bytes"]) for entry in r["logprobs"]).decode() == r["text"] and " " in r["text"]
    one = e.call("generate", prompt="x", max_tokens=1, temperature=0, logprobs=True, logit_bias={str(euro): 100})["logprobs"][0]
    assert one["bytes"] == [0xE2] and one["token"] == "�"
    assert e.stop() == 0
