"""Gemma 3 270M, whose weights and tokenizer are genuine (test/fixture/gemma3.py): its numbers, its greedy text and its chats, as transformers has them.

SmolLM2-135M-Instruct, the other real model, is in test_logits.py, test_load_quantized.py and test_engine_serve.py.
"""
import numpy as np
import pytest

from conftest import FIXTURES, engine_logits, error, reference, reference_logits, run_engine
from engine_client import Engine, HelperError
from test_logits import MAX_MEAN_KL, MIN_TOP1_AGREEMENT, MIN_TOP1_AGREEMENT_INT8, TIE_MARGIN

GEMMA3 = FIXTURES / "gemma-3-270m"
# float32 noise of 18 layers: measured 1.3e-6
REF_TOLERANCE = 2e-5
PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):\n", "1, 2, 3, 4, 5,", "Die Hauptstadt von Deutschland ist", "\u6771\u4eac\u306f"]


@pytest.fixture(scope="module")
def gemma3():
    import torch

    model = reference(GEMMA3)
    # transformers rounds the scale of embeddings to the weights' dtype, which is float32 in this reference only: as published it is bfloat16
    scale = model.model.embed_tokens.embed_scale
    scale.copy_(scale.to(torch.bfloat16))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GEMMA3)


def test_ref(gemma3, tokenizer, tmp_path):
    ids = tokenizer("The capital of France is Paris. It has 2,102,650").input_ids
    assert ids[0] == tokenizer.bos_token_id
    worst = error(engine_logits(GEMMA3, ids, tmp_path), reference_logits(gemma3, ids))
    print(f"ref: {worst:.1e} over {len(ids)} positions")
    assert worst <= REF_TOLERANCE


def test_fast_kernels(gemma3, tokenizer, tmp_path):
    """Teacher-forced beyond the window of 512 positions."""
    import pydoc_data.topics

    ids = tokenizer(pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["booleans"]).input_ids[:560]
    assert len(ids) == 560
    theirs = reference_logits(gemma3, ids)
    ours = engine_logits(GEMMA3, ids, tmp_path, kernels=None)
    agree = theirs.argmax(1) == ours.argmax(1)
    kl = []
    for a, b in zip(theirs[::4], ours[::4]):  # row by row: the vocabulary is large
        a, b = a.astype(np.float64), b.astype(np.float64)
        a -= np.logaddexp.reduce(a)
        b -= np.logaddexp.reduce(b)
        kl.append((np.exp(a) * (a - b)).sum())
    print(f"top-1 agreement {np.mean(agree):.4f}, mean KL {np.mean(kl):.2e}, beyond the window {np.mean(kl[128:]):.2e}")
    assert np.mean(agree) >= MIN_TOP1_AGREEMENT
    assert np.mean(kl) < MAX_MEAN_KL and np.mean(kl[128:]) < MAX_MEAN_KL


def test_int8_kv(gemma3, tokenizer, tmp_path):
    """A KV cache of int8, whose keys of few dims are much larger than others; beyond the window."""
    import pydoc_data.topics

    ids = tokenizer(pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["booleans"]).input_ids[:560]
    kl = []
    agree = []
    for a, b in zip(reference_logits(gemma3, ids)[::4], engine_logits(GEMMA3, ids, tmp_path, kernels=None, kv_cache_dtype="int8")[::4]):
        a, b = a.astype(np.float64), b.astype(np.float64)
        a -= np.logaddexp.reduce(a)
        b -= np.logaddexp.reduce(b)
        agree.append(a.argmax() == b.argmax())
        kl.append((np.exp(a) * (a - b)).sum())
    print(f"KV cache int8: top-1 agreement {np.mean(agree):.4f}, mean KL {np.mean(kl):.2e}, beyond the window {np.mean(kl[128:]):.2e}")
    assert np.mean(agree) >= MIN_TOP1_AGREEMENT_INT8
    assert np.mean(kl) < MAX_MEAN_KL


def check_greedy(gemma3, ids, ours):
    """Equal to the reference's choice at each step, or up to the first at which the reference itself hesitates."""
    logits = reference_logits(gemma3, ids + ours)[len(ids) - 1:]
    for step, choice in enumerate(ours):
        best = int(logits[step].argmax())
        if best != choice:
            second, first = np.sort(logits[step])[-2:]
            assert first - second < TIE_MARGIN, f"step {step}: {choice}, reference {best} by {first - second}"
            return step
    return len(ours)


@pytest.mark.parametrize("kernels", ["ref", None])
def test_greedy(gemma3, tokenizer, kernels):
    prompts, n = (PROMPTS[:1], 8) if kernels else (PROMPTS, 32)
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        done = run_engine("greedy", GEMMA3, "--ids", ",".join(map(str, ids)), "--max-tokens", n, kernels=kernels)
        assert done.returncode == 0, done.stderr
        ours = [int(x) for x in done.stdout.replace(",", " ").split()]
        print(repr(prompt), check_greedy(gemma3, ids, ours), "of", len(ours), repr(tokenizer.decode(ours)))


def test_chat(gemma3, tokenizer):
    conversations = [[{"role": "user", "content": "Why is the sky blue?"}],
                     [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi <end_of_turn>\n"}, {"role": "assistant", "content": "Yo"},
                      {"role": "user", "content": "na\u00efve \u2603   \u65e5\u672c"}]]
    e = Engine()
    e.call("load", path=str(GEMMA3), context_length=2048)
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert e.call("apply_chat_template", messages=messages)["text"] == text
    ids = tokenizer.apply_chat_template(conversations[0], add_generation_prompt=True)
    chat = e.call("generate", messages=conversations[0], temperature=0, max_tokens=16)
    assert ids[:2].count(tokenizer.bos_token_id) == 1 and chat["usage"]["prompt_tokens"] == len(ids)
    ours = e.call("tokenize", text=chat["text"], add_special=False)["ids"]
    check_greedy(gemma3, ids, ours[:12])
    # the template refuses in its own words
    with pytest.raises(HelperError) as refusal:
        e.call("generate", messages=conversations[0] * 2)
    assert refusal.value.code == "INVALID_ARGUMENT" and "Conversation roles must alternate" in refusal.value.detail
    assert e.stop() == 0
