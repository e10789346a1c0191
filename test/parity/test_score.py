"""How probable millm-engine finds texts and labels, against log-softmax of transformers' logits of the same tokens."""
import math
import threading
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, SMOLLM2, TINY, error, reference, reference_logits
from engine_client import TEXT, Engine, HelperError
from test_embed import FAMILIES, LONG, OTHERS, TEXTS, all_free, load, tokens

TOLERANCE = 2e-5		# as the logits' (test_logits.py)
PROMPT = "The quick brown fox jumps over"
LABELS = [" the lazy dog.", " a", "\u6f22\u5b57 \U0001f600", " the", " nothing at all, for it was much too tired"]


def logprobs(theirs, ids):
    """Of each token but the first, in double."""
    rows = torch.log_softmax(torch.from_numpy(reference_logits(theirs, ids)).double(), -1)
    return [float(rows[i - 1, ids[i]]) for i in range(1, len(ids))]


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def label_scores(theirs, model, prompt, labels):
    """The rule of scoring.h: prompt and label encoded together, divided where all labels leave the prompt's own tokens as they are."""
    alone = tokens(model, prompt)
    whole = [tokens(model, prompt + label) for label in labels]
    n = min(common(alone, ids) for ids in whole)
    return [(sum(logprobs(theirs, ids)[n - 1:]), len(ids) - n) for ids in whole]


def shown(engine, text, **fields):
    """The rows of a text's tokens, and the RESULT."""
    with engine.open("score", texts=[text], tokens=True, **fields) as c:
        result = c.result()
    assert all(kind == TEXT for kind, _ in c.before)
    return [row for _, payload in c.before for row in payload["logprobs"]], result


def assert_scores(ours, theirs, tolerance=TOLERANCE):
    assert [s["tokens"] for s in ours] == [n for _, n in theirs]
    for a, (b, n) in zip(ours, theirs):
        assert abs(a["logprob"] - b) <= tolerance * max(1, n) * max(1, abs(b) / max(1, n)), (a, b)


def refused(code, engine, **fields):
    with pytest.raises(HelperError) as e:
        engine.call("score", **fields)
    assert e.value.code == code, e.value
    return e.value


@pytest.fixture(scope="module")
def engine():
    e = Engine(env={"MILLM_KERNELS": "ref"})
    yield e
    assert e.stop() == 0


@pytest.fixture(scope="module")
def theirs():
    return reference(LONG)


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_family(engine, name):
    """Every family: tokens of texts, texts together, labels of a prompt."""
    model = TINY / name
    theirs = reference(model)
    load(engine, model)
    want = {text: logprobs(theirs, tokens(model, text)) for text in TEXTS}
    for text in TEXTS[:3]:
        rows, result = shown(engine, text)
        assert [row["id"] for row in rows] == tokens(model, text)
        assert rows[0]["logprob"] is None
        assert error(np.array([0] + [row["logprob"] for row in rows[1:]]), np.array([0] + want[text])) <= TOLERANCE
        assert result["usage"]["prompt_tokens"] == len(rows)
    assert_scores(engine.call("score", texts=TEXTS)["scores"], [(sum(w), len(w)) for w in want.values()])
    assert_scores(engine.call("score", prompt=PROMPT, labels=LABELS)["scores"], label_scores(theirs, model, PROMPT, LABELS))
    all_free(engine)


def test_what_a_token_is(engine):
    load(engine, LONG)
    for text in TEXTS:
        rows, _ = shown(engine, text)
        assert b"".join(bytes(row["bytes"]) for row in rows).decode().endswith(text)


@pytest.mark.parametrize("prompt", ["Answer:", "Answer: ", "Answer:\n", "a b"])
def test_where_prompt_and_label_meet(engine, theirs, prompt):
    """A space at the prompt's end may become the label's: for all of them alike."""
    load(engine, LONG)
    labels = ["yes", "no", " maybe", "nothing of the sort"]
    assert_scores(engine.call("score", prompt=prompt, labels=labels)["scores"], label_scores(theirs, LONG, prompt, labels))


def test_many_labels(engine, theirs):
    """More than a group, of all lengths, one of them longer than a step; a prompt that ends anywhere in a page."""
    load(engine, LONG, context_length=1024)
    labels = [" " + " ".join(str(i * j) for j in range(1, 2 + i % 7)) for i in range(60)] + [" " + "one two three " * 40]
    assert len(tokens(LONG, labels[-1])) > 256
    for n in (1, 15, 16):
        prompt = "x y " * n
        assert_scores(engine.call("score", prompt=prompt, labels=labels)["scores"], label_scores(theirs, LONG, prompt, labels))
    all_free(engine)


def test_shared_prefix(engine, theirs):
    """What the prefix cache has of a prompt is not computed again, and the scores are the same."""
    load(engine, LONG, context_length=1024)
    prompt, other = ("one two three four five six seven eight " * 8 + end for end in ("nine", "and so on and on"))
    results = [engine.call("score", prompt=p, labels=LABELS) for p in (prompt, prompt, other)]
    n = len(tokens(LONG, prompt))
    assert results[0]["usage"]["cached_tokens"] == 0
    assert n - 24 - 16 < results[1]["usage"]["cached_tokens"] <= n - 24 and results[2]["usage"]["cached_tokens"] > 0
    for p, r in zip((prompt, prompt, other), results):
        assert_scores(r["scores"], label_scores(theirs, LONG, p, LABELS))
    load(engine, LONG, context_length=1024, prefix_cache=False)
    assert all(engine.call("score", prompt=prompt, labels=LABELS)["usage"]["cached_tokens"] == 0 for _ in range(2))
    all_free(engine)


def test_chat(engine):
    """With raw false: what the chat template makes of a user's message, as generate has it; special tokens are the template's only."""
    load(engine, SMOLLM2, context_length=512)
    labels = ["Paris", "Rome", "<|im_end|>"]
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "The capital of France?"}]
    prompt = engine.call("apply_chat_template", messages=messages)["text"]
    ours = engine.call("score", prompt="The capital of France?", system="Answer.", raw=False, labels=labels)["scores"]
    assert_scores(ours[:2], label_scores(reference(SMOLLM2), SMOLLM2, prompt, labels[:2]))
    assert ours[2]["tokens"] > 1
    assert engine.call("score", prompt="x", labels=labels)["scores"][2]["tokens"] == 1


def test_perplexity():
    """Of a real model, with the kernels that serve."""
    text = (ROOT / "LICENSE").read_text()[:600]
    want = logprobs(reference(SMOLLM2), tokens(SMOLLM2, text))
    e = Engine()
    try:
        # keys and values of 16 bits in both, activations of 16 bits in the second
        for deterministic, tolerance in ((True, 1e-3), (False, 5e-3)):
            load(e, SMOLLM2, context_length=512, deterministic=deterministic)
            ours = e.call("score", texts=[text])["scores"][0]
            mine, theirs = (math.exp(-x / len(want)) for x in (ours["logprob"], sum(want)))
            print(f"perplexity {mine:.6f}, transformers' {theirs:.6f}")
            assert ours["tokens"] == len(want) and abs(mine - theirs) <= tolerance * theirs
    finally:
        assert e.stop() == 0


def test_refused(engine):
    load(engine, LONG, context_length=64)
    text = "one two three four five six seven eight " * 10
    n = len(tokens(LONG, text))
    assert refused("INVALID_ARGUMENT", engine, texts=["a", ""], first=1).detail == "Text 2 of the array has no tokens."
    e = refused("CONTEXT_LENGTH_EXCEEDED", engine, texts=[text])
    assert f"The text has {n} tokens" in e.detail and "64" in e.detail and e.hint
    e = refused("CONTEXT_LENGTH_EXCEEDED", engine, prompt=text, labels=["a"])
    assert f"The prompt has {n} tokens" in e.detail and "64" in e.detail and e.hint
    e = refused("CONTEXT_LENGTH_EXCEEDED", engine, prompt="a", labels=["a", text])
    assert "label 2" in e.detail and "64" in e.detail
    assert "twice" in refused("INVALID_ARGUMENT", engine, prompt="x", labels=["a", "b", "a"]).message
    assert refused("INVALID_ARGUMENT", engine, prompt="x", labels=["a", ""]).detail == "It is label 2."
    assert "prompt" in refused("INVALID_ARGUMENT", engine, prompt="", labels=["a"]).message
    for fields in (dict(), dict(texts=[]), dict(texts=["a"] * 1025), dict(texts=["a", None]), dict(texts=["a"], prompt="x"), dict(prompt="x"),
                   dict(labels=["a"]), dict(prompt="x", labels=[]), dict(prompt="x", labels=[str(i) for i in range(257)]), dict(prompt="x", labels="a"),
                   dict(texts=["a", "b"], tokens=True), dict(prompt="x", labels=["a"], tokens=True), dict(prompt="x", labels=["a"], first=1),
                   dict(texts=["a"], raw=True), dict(texts=["a"], system="x"), dict(prompt="x", labels=["a"], system="x"), dict(texts=["a"], n=2)):
        refused("INVALID_ARGUMENT", engine, **fields)
    refused("UNSUPPORTED", engine, prompt="x", labels=["a"], system="x", raw=False)
    refused("MODEL_NOT_LOADED", engine, texts=["a"], model_uuid="another")
    engine.call("unload")
    refused("MODEL_NOT_LOADED", engine, texts=["a"])


def test_no_room_beside_the_prompt(engine):
    """A pool of one context: a label needs a copy of the page in which the prompt ends, which is not there."""
    load(engine, LONG, context_length=64, max_sequences=1)
    status = engine.call("status")
    assert status["pages_total"] * 16 == status["context_length"] == 64
    prompt = "x"
    while len(tokens(LONG, prompt)) < 58:
        prompt += " x"
    refused("CONTEXT_LENGTH_EXCEEDED", engine, prompt=prompt, labels=[" one two"])
    assert engine.call("score", prompt=prompt, labels=[","])["scores"][0]["tokens"] == 1
    all_free(engine)


def test_company(theirs):
    """Texts, labels and generations at once, in chunks, in a pool that is too small for all: the same scores, in order."""
    e = Engine(env={"MILLM_KERNELS": "ref"})
    try:
        load(e, LONG, context_length=1024, max_sequences=4, max_queue=16, kv_cache_bytes=1200000)
        texts = [" ".join(f"{i * j}" for j in range(1, n)) or "x" for i, n in enumerate([2, 150, 3, 8, 60, 5, 2, 200, 9, 1, 12, 33])]
        prompt, labels = texts[4], [f" {i} or {i * i}" for i in range(24)]
        want = [(sum(w), len(w)) for w in (logprobs(theirs, tokens(LONG, t)) for t in texts)]
        want_labels = label_scores(theirs, LONG, prompt, labels)
        alone = e.call("generate", prompt="Hello", max_tokens=60, temperature=0)["text"]
        rows_alone = shown(e, texts[7])[0]
        done = []

        def run(check):
            check()
            done.append(check)

        checks = [lambda: assert_scores(e.call("score", texts=texts)["scores"], want)] * 3 + \
            [lambda: assert_scores(e.call("score", prompt=prompt, labels=labels)["scores"], want_labels)] * 3 + \
            [lambda: None if e.call("generate", prompt="Hello", max_tokens=60, temperature=0)["text"] == alone else 1 / 0] * 3 + \
            [lambda: None if [r["id"] for r in shown(e, texts[7])[0]] == [r["id"] for r in rows_alone] else 1 / 0] * 3
        threads = [threading.Thread(target=run, args=(c,)) for c in checks]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(done) == len(checks)
        all_free(e)
    finally:
        assert e.stop() == 0


def test_one_text_does_not_change_another(engine):
    load(engine, LONG, deterministic=True, context_length=2048)
    texts = TEXTS + ["one two three four five " * 100]
    alone = [engine.call("score", texts=[t])["scores"][0] for t in texts]
    assert engine.call("score", texts=texts)["scores"] == alone
    labels = [engine.call("score", prompt=PROMPT, labels=[label])["scores"][0] for label in LABELS]
    assert engine.call("score", prompt=PROMPT, labels=LABELS)["scores"] == labels


def test_cancel(engine):
    load(engine, LONG, context_length=8192)
    text = "one two three four five six seven eight " * 100
    for fields in (dict(texts=[text] * 500), dict(prompt=text, labels=[f" {i} {text[:i]}" for i in range(256)])):
        c = engine.open("score", **fields)
        end = time.monotonic() + 20
        while engine.call("status")["running"] == 0:
            assert time.monotonic() < end
        c.close()
        all_free(engine)
        c = engine.open("score", **fields)
        while engine.call("status")["running"] == 0:
            assert time.monotonic() < end
        engine.call("unload", timeout_ms=0)
        with pytest.raises(HelperError) as e:
            c.result()
        assert e.value.code == "CANCELED" and "unloaded" in e.value.message
        load(engine, LONG, context_length=8192)
