"""Embeddings of millm-engine against transformers' hidden states, pooled by sentence-transformers' rules.

The rules are those of its Pooling and Normalize modules (6.2.0), written out in pooled() below; the files are what it writes into a repository.
"""
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from conftest import TINY, error, reference
from engine_client import VECTOR, Engine, HelperError

TOLERANCE = 2e-5		# as the logits' (test_logits.py)
SOON = 20
LONG = TINY / "llama-long"
TEXTS = ["Hello world", "a", "The quick brown fox jumps over the lazy dog.", "def main(out):\n\treturn {}", "\u00e4\u00f6\u00fc \u6f22\u5b57 \U0001f600"]
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
FAMILIES = sorted(p.name for p in TINY.iterdir() if "-" not in p.name and (p / "config.json").exists()) if TINY.is_dir() else []
OTHERS = ["opt-after", "opt-plain", "llama-bf16", "gemma2-uncapped", "gemma3-vision", "cohere-norms", "falcon-rw"]


def tokens(model, text):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids


def hidden_states(theirs, ids):
    base = theirs.base_model if theirs.base_model is not theirs else theirs.model
    return base(torch.tensor([ids])).last_hidden_state[0].double().numpy()


def pooled(h, mode):
    n = len(h)
    w = np.arange(1, n + 1)[:, None]
    return {"cls": h[0], "max": h.max(0), "mean": h.mean(0), "mean_sqrt_len_tokens": h.sum(0) / n**0.5, "weightedmean": (h * w).sum(0) / w.sum(),
            "lasttoken": h[-1]}[mode]


def expected(theirs, model, text, modes=("mean",), normalized=True):
    h = hidden_states(theirs, tokens(model, text))
    v = np.concatenate([pooled(h, m) for m in modes])
    return v / np.linalg.norm(v) if normalized else v


def embed(engine, texts, **fields):
    """A vector for each text, and the RESULT."""
    with engine.open("embed", texts=texts, **fields) as c:
        result = c.result()
    assert all(kind == VECTOR for kind, _ in c.before) and len(c.before) == len(texts)
    return [np.frombuffer(p, np.float32) for _, p in c.before], result


def refused(code, engine, **fields):
    with pytest.raises(HelperError) as e:
        embed(engine, **fields)
    assert e.value.code == code, e.value
    return e.value


def load(engine, path, **fields):
    if engine.call("status")["state"] != "idle":
        engine.call("unload")
    engine.call("load", path=str(path), **fields)


def all_free(engine):
    end = time.monotonic() + SOON
    while True:
        s = engine.call("status")
        if s["running"] == s["waiting"] == 0 and s["pages_free"] == s["pages_total"]:
            return
        assert time.monotonic() < end, s
        time.sleep(0.005)


@pytest.fixture(scope="module")
def engine():
    e = Engine(env={"MILLM_KERNELS": "ref"})
    yield e
    assert e.stop() == 0


@pytest.fixture
def repository(tmp_path):
    """A model's directory with the files of sentence-transformers that are given, as JSON; a module's directory by its name."""
    def make(modules, source=LONG, **files):
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        for name, content in {"modules.json": modules, **files}.items():
            file = path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return path
    return make


def module(i, kind, path=None, package="sentence_transformers.models"):
    return {"idx": i, "name": str(i), "path": path if path is not None else "" if kind == "Transformer" else f"{i}_{kind}", "type": f"{package}.{kind}"}


FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
MODULES = [module(0, "Transformer"), module(1, "Pooling")]
NORMALIZED = MODULES + [module(2, "Normalize")]


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_family(engine, name):
    model = TINY / name
    theirs = reference(model)
    load(engine, model)
    vectors, result = embed(engine, TEXTS)
    for text, vector in zip(TEXTS, vectors):
        assert error(vector, expected(theirs, model, text)) <= TOLERANCE, text
        assert abs(np.linalg.norm(vector) - 1) < 1e-5
    assert result["usage"]["prompt_tokens"] == sum(len(tokens(model, t)) for t in TEXTS)


@pytest.fixture(scope="module")
def theirs():
    return reference(LONG)


@pytest.mark.parametrize("modes", [[m] for m in MODES] + [["mean", "max"], ["lasttoken", "cls"], MODES])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_pooling(engine, repository, theirs, modes, older, normalized):
    config = {"embedding_dimension": 64, "pooling_mode": modes if len(modes) > 1 else modes[0]}
    if older:	# which stands modes side by side in the order of its flags
        modes = [m for m in MODES if m in modes]
        config = {"word_embedding_dimension": 64, **{f"pooling_mode_{m if m not in ('cls', 'max', 'mean') else m + ('_token' if m == 'cls' else '_tokens')}": m in modes for m in MODES}}
        config["pooling_mode_weightedmean_tokens"] = config.pop("pooling_mode_weightedmean")
    load(engine, repository(NORMALIZED if normalized else MODULES, **{"1_Pooling/config.json": config}))
    for text, vector in zip(TEXTS, embed(engine, TEXTS)[0]):
        assert error(vector, expected(theirs, LONG, text, modes, normalized)) <= TOLERANCE, text


def test_newer_packages(engine, repository, theirs):
    modules = [module(0, "Transformer", package="sentence_transformers.base.modules.transformer"),
               module(1, "Pooling", package="sentence_transformers.sentence_transformer.modules.pooling")]
    config = {"transformer_task": "feature-extraction", "modality_config": {"text": FORWARD}, "module_output_name": "token_embeddings"}
    load(engine, repository(modules, **{"1_Pooling/config.json": {"embedding_dimension": 64}, "sentence_bert_config.json": config}))
    assert error(embed(engine, ["Hello"])[0][0], expected(theirs, LONG, "Hello", normalized=False)) <= TOLERANCE


def test_prompt(engine, repository, theirs):
    """A default prompt stands before every text; others are the caller's to write."""
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "include_prompt": True}
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    files = {"1_Pooling/config.json": pooling, "config_sentence_transformers.json": prompts}
    load(engine, repository(NORMALIZED, **files))
    vectors, result = embed(engine, ["Hello"])
    assert error(vectors[0], expected(theirs, LONG, "query: Hello")) <= TOLERANCE
    count = lambda **more: engine.call("count_tokens", text="Hello", **more)["count"]
    assert count(for_embedding=True) == result["usage"]["prompt_tokens"] == len(tokens(LONG, "query: Hello"))
    assert count() == count(for_embedding=False) == len(tokens(LONG, "Hello"))
    for name in ("document", None):
        files["config_sentence_transformers.json"] = prompts | {"default_prompt_name": name}
        load(engine, repository(NORMALIZED, **files))
        assert error(embed(engine, ["Hello"])[0][0], expected(theirs, LONG, "Hello")) <= TOLERANCE
    files["1_Pooling/config.json"] = pooling | {"include_prompt": False}
    load(engine, repository(NORMALIZED, **files))
    embed(engine, ["Hello"])
    files["config_sentence_transformers.json"] = prompts
    load(engine, repository(NORMALIZED, **files))
    assert "include_prompt" in refused("UNSUPPORTED", engine, texts=["Hello"]).detail


@pytest.mark.parametrize("modules, files, code, word", [
    (NORMALIZED + [module(3, "Dense")], {}, "UNSUPPORTED", "models.Dense"),
    ([module(0, "Transformer"), module(1, "Dense"), module(2, "Pooling")], {}, "UNSUPPORTED", "models.Dense"),
    ([module(0, "Transformer")], {}, "UNSUPPORTED", "names no Pooling"),
    ([module(0, "Transformer", "0_Transformer"), module(1, "Pooling")], {}, "UNSUPPORTED", "Transformer"),
    ([module(0, "Transformer", package="custom_st"), module(1, "Pooling")], {}, "UNSUPPORTED", "custom_st.Transformer"),
    (MODULES + [module(2, "Pooling")], {}, "UNSUPPORTED", "module 2"),
    ([module(0, "Transformer"), module(1, "Pooling", "../1_Pooling")], {}, "INVALID_MODEL_FILE", "directory"),
    ([module(0, "Transformer"), module(1, "Pooling", "")], {}, "INVALID_MODEL_FILE", "directory"),
    ([module(0, "Transformer"), module(1, "Pooling", "nowhere")], {}, "MODEL_FILES_MISSING", ""),
    ({}, {}, "INVALID_MODEL_FILE", "an array"),
    ([7], {}, "INVALID_MODEL_FILE", "a type"),
    ("[", {}, "INVALID_MODEL_FILE", "Line 1"),
    (MODULES, {"1_Pooling/config.json": []}, "INVALID_MODEL_FILE", "object"),
    (MODULES, {"1_Pooling/config.json": {"pooling_mode": "median"}}, "UNSUPPORTED", "median"),
    (MODULES, {"1_Pooling/config.json": {"pooling_mode": ["mean"] * 7}}, "UNSUPPORTED", "one too many"),
    (MODULES, {"1_Pooling/config.json": {"pooling_mode": 3}}, "UNSUPPORTED", "pooling_mode"),
    (MODULES, {"sentence_bert_config.json": {"do_lower_case": True}}, "UNSUPPORTED", "do_lower_case"),
    (MODULES, {"sentence_bert_config.json": {"modality_config": {"text": FORWARD, "message": FORWARD}}}, "UNSUPPORTED", '"message"'),
    (MODULES, {"sentence_bert_config.json": {"modality_config": {"text": FORWARD | {"method_output_name": "pooler_output"}}}}, "UNSUPPORTED", "modality_config"),
    (MODULES, {"sentence_bert_config.json": {"transformer_task": "text-generation"}}, "UNSUPPORTED", "text-generation"),
    (MODULES, {"sentence_bert_config.json": {"max_seq_length": 0}}, "INVALID_MODEL_FILE", "max_seq_length"),
    (MODULES, {"config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": "query"}}, "INVALID_MODEL_FILE", "default_prompt_name"),
    (MODULES, {"config_sentence_transformers.json": {"prompts": {"q": "x" * 5000}, "default_prompt_name": "q"}}, "INVALID_MODEL_FILE", "4096"),
])
def test_refused_by_name(engine, repository, modules, files, code, word):
    """The model loads and generates text all the same."""
    load(engine, repository(modules, **({"1_Pooling/config.json": {"pooling_mode": "mean"}} | files)))
    e = refused(code, engine, texts=["Hello"])
    assert word in (e.detail or e.message)
    assert engine.call("generate", prompt="Hello", max_tokens=2)["usage"]["completion_tokens"] > 0


def test_too_long(engine, repository):
    text = "one two three four five six seven eight " * 10
    n = len(tokens(LONG, text))
    load(engine, repository(MODULES, **{"1_Pooling/config.json": {}, "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False}}), context_length=64)
    assert n > 64
    e = refused("CONTEXT_LENGTH_EXCEEDED", engine, texts=[text])
    assert f"The text has {n} tokens" in e.detail and "64" in e.detail and e.hint
    e = refused("CONTEXT_LENGTH_EXCEEDED", engine, texts=["Hello", text[:60]], first=7)
    assert e.detail.startswith("Text 8 of the array has ") and "20" in e.detail
    embed(engine, [text[:30]])


def test_what_is_no_text(engine):
    load(engine, LONG)
    assert refused("INVALID_ARGUMENT", engine, texts=["a", ""], first=1).detail == "Text 2 of the array has no tokens."
    refused("INVALID_ARGUMENT", engine, texts=[])
    refused("INVALID_ARGUMENT", engine, texts=["a"] * 1025)
    refused("INVALID_ARGUMENT", engine, texts=["a", None])
    refused("INVALID_ARGUMENT", engine, texts="a")
    refused("INVALID_ARGUMENT", engine, texts=["a"], pooling="mean")
    refused("MODEL_NOT_LOADED", engine, texts=["a"], model_uuid="another")
    engine.call("unload")
    refused("MODEL_NOT_LOADED", engine, texts=["a"])


def test_company(theirs):
    """Long and short texts, many at once and beside generations, in chunks, in a pool that is too small for all: the same vectors, in order."""
    e = Engine(env={"MILLM_KERNELS": "ref"})
    try:
        load(e, LONG, context_length=1024, max_sequences=4, max_queue=16, kv_cache_bytes=1200000)
        texts = [" ".join(f"{i * j}" for j in range(1, n)) or "x" for i, n in enumerate([2, 150, 3, 8, 60, 5, 2, 200, 9, 1, 12, 33, 100, 4] * 2)]
        want = [expected(theirs, LONG, t) for t in texts]
        alone = e.call("generate", prompt="Hello", max_tokens=60, temperature=0)["text"]
        results, texts_of = [], []

        def run(shift):
            mine = texts[shift:] + texts[:shift]
            results.append((want[shift:] + want[:shift], embed(e, mine)[0]))

        def say():
            texts_of.append(e.call("generate", prompt="Hello", max_tokens=60, temperature=0)["text"])

        threads = [threading.Thread(target=run, args=(k,)) for k in (0, 5, 11)] + [threading.Thread(target=say) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(results) == 3 and texts_of == [alone] * 6
        for theirs_, ours in results:
            for a, b in zip(ours, theirs_):
                assert error(a, b) <= TOLERANCE
        all_free(e)
    finally:
        assert e.stop() == 0


def test_one_text_does_not_change_another(engine):
    load(engine, LONG, deterministic=True, context_length=2048)
    long = "one two three four five " * 100
    alone = [embed(engine, [t])[0][0].tobytes() for t in TEXTS + [long]]
    assert [v.tobytes() for v in embed(engine, TEXTS + [long])[0]] == alone


def test_cancel(engine):
    load(engine, LONG, context_length=8192)
    text = "one two three four five six seven eight " * 100
    c = engine.open("embed", texts=[text] * 500)
    assert c.receive()[0] == VECTOR
    c.close()
    all_free(engine)
    c = engine.open("embed", texts=[text] * 500)
    assert c.receive()[0] == VECTOR
    engine.call("unload", timeout_ms=0)
    with pytest.raises(HelperError) as e:
        c.result()
    assert e.value.code == "CANCELED" and "unloaded" in e.value.message


def test_slow_reader(engine, repository):
    """One who does not read stops his own request, not the engine; what he reads later is whole."""
    load(engine, repository(MODULES, **{"1_Pooling/config.json": {"pooling_mode": MODES}}))
    texts = [f"text {i}" for i in range(1024)]
    slow = [engine.open("embed", texts=texts) for _ in range(2)]
    assert embed(engine, TEXTS)[1]["usage"]["prompt_tokens"] > 0
    for c in slow:
        c.result()
        assert len(c.before) == len(texts)
    all_free(engine)
