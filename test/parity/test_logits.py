"""Numbers against float32 transformers: tiny models with every flag on, SmolLM2, and the proof that each flag matters."""
import functools
import json
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, SMOLLM2, TINY, engine_logits, error, reference, reference_logits, run_engine, smollm2_ids

# float32 noise of two summation orders on these sizes is below 5e-6 (architectures.md 9); every wrong flag measured >= 3e-4
TINY_TOLERANCE = 2e-5
# 30 layers of it, on real weights
SMOLLM2_TOLERANCE = 1e-4
# what the fast kernels may change (issue A)
MIN_TOP1_AGREEMENT = 0.99
MAX_MEAN_KL = 1e-3
# and what a KV cache of int8 may: measured 0.991 and 3.7e-4 with SmolLM2
MIN_TOP1_AGREEMENT_INT8 = 0.98
# on tiny random models, beside the same with a cache of float32, of half of the positions (where an expert's place is taken by another all logits change): measured
# at most 1.3e-2
TINY_INT8_TOLERANCE = 2.5e-2
# a reference that itself hesitates this little may be decided by rounding
TIE_MARGIN = 1e-3

TINY_MODELS = sorted(p.name for p in TINY.iterdir() if (p / "config.json").exists()) if TINY.is_dir() else []


def test_there_are_tiny_models():
    assert len(TINY_MODELS) >= 50, f"run test/fixture/make: {TINY} has {TINY_MODELS}"


def some_ids(model, n, seed=1):
    config = json.loads((TINY / model / "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(n)]


@functools.cache
def tiny_reference(model):
    """Ids, what transformers makes of them, and how many parameters it has."""
    ids, theirs = some_ids(model, 24), reference(TINY / model)
    return ids, reference_logits(theirs, ids), theirs.num_parameters()


@functools.cache
def tiny_ours(model):
    with tempfile.TemporaryDirectory() as tmp:
        return engine_logits(TINY / model, some_ids(model, 24), Path(tmp))


@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_ref(model, tmp_path):
    ids, theirs, n_parameters = tiny_reference(model)
    assert f"parameters       {n_parameters}\n" in run_engine("inspect", TINY / model).stdout
    assert error(tiny_ours(model), theirs) <= TINY_TOLERANCE
    # prompt chunks must not matter
    assert error(engine_logits(TINY / model, ids, tmp_path, chunk=5), theirs) <= TINY_TOLERANCE


@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_int8_kv(model, tmp_path):
    """Every shape of a head with a KV cache of int8: near the exact one, and not the same."""
    ours = engine_logits(TINY / model, some_ids(model, 24), tmp_path, kv_cache_dtype="int8")
    of_positions = np.abs(ours - tiny_ours(model)).max(1) / np.abs(ours).max()
    assert 0 < np.median(of_positions) <= TINY_INT8_TOLERANCE
    # what a prompt leaves in the cache is what single tokens leave
    assert error(engine_logits(TINY / model, some_ids(model, 24), tmp_path, chunk=5, kv_cache_dtype="int8"), ours) <= TINY_TOLERANCE


@pytest.mark.parametrize("model", ["llama-dynamic", "phi3-long"])
def test_short_sequences(model, tmp_path):
    """What rotates long sequences otherwise, as short ones, one token at a time too."""
    ids = some_ids(model, 12)
    theirs = reference_logits(reference(TINY / model), ids)
    assert error(engine_logits(TINY / model, ids, tmp_path), theirs) <= TINY_TOLERANCE
    assert error(engine_logits(TINY / model, ids, tmp_path, chunk=1), theirs) <= TINY_TOLERANCE


@pytest.mark.parametrize("kernels, flag", [("avx2", " avx2 "), ("avx512", " avx512_bf16 "), ("amx", " amx_bf16 ")])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_fast(model, kernels, flag, tmp_path):
    if flag not in open("/proc/cpuinfo").read():
        done = run_engine("logits", TINY / model, "--ids", "1", "--output", tmp_path / "x", kernels=kernels)
        assert done.returncode != 0 and kernels in done.stderr, "kernels that this CPU lacks must be refused by name"
        return
    ids, theirs, _ = tiny_reference(model)
    ours = engine_logits(TINY / model, ids, tmp_path, kernels=kernels)
    # 16-bit activations or KV: architectures.md 9 allows 3e-2
    assert error(ours, theirs) <= 3e-2


@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_greedy(model):
    """16 tokens, one at a time, equal the reference's, or up to the first step where the reference itself hesitates."""
    ids = some_ids(model, 12, seed=2)
    done = run_engine("greedy", TINY / model, "--ids", ",".join(map(str, ids)), "--max-tokens", 16, kernels="ref")
    assert done.returncode == 0, done.stderr
    ours = [int(x) for x in done.stdout.replace(",", " ").split()]
    # the last of them that the reference has to confirm; an end of the text is not among ours
    for token, row in zip(ours, reference_logits(reference(TINY / model), ids + ours)[len(ids) - 1:]):
        second, first = np.sort(row)[-2:]
        if first - second < TIE_MARGIN:
            break
        assert token == int(row.argmax())


PYTHON5 = ROOT / ".venv5" / "bin" / "python3"
RESPELL = """
import sys, pathlib, transformers
assert transformers.__version__.startswith("5.")
for d in map(pathlib.Path, sys.argv[2:]):
    transformers.AutoConfig.from_pretrained(d).save_pretrained(pathlib.Path(sys.argv[1]) / d.name)
"""


@pytest.fixture(scope="session")
def spelled_by_5(tmp_path_factory):
    """Where transformers 5 has written the config.json of each tiny model once more."""
    if not PYTHON5.exists():
        pytest.skip(f"there is no {PYTHON5.parent.parent}: run test/setup-venv transformers5")
    out = tmp_path_factory.mktemp("spelled")
    done = subprocess.run([PYTHON5, "-c", RESPELL, out, *(TINY / m for m in TINY_MODELS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


# transformers 5 lets every other layer of it slide, 4 all of them
OTHERWISE_IN_5 = ["qwen2_moe-sliding"]


@pytest.mark.parametrize("model", [m for m in TINY_MODELS if m not in OTHERWISE_IN_5])
def test_spelling_of_5(model, spelled_by_5, tmp_path):
    """The same bits from the config.json that transformers 5 writes."""
    directory = spelled_by_5 / model
    for path in (TINY / model).iterdir():
        if not (directory / path.name).exists():
            (directory / path.name).symlink_to(path)
    assert np.array_equal(engine_logits(directory, some_ids(model, 24), tmp_path), tiny_ours(model))


def mutations():
    done = run_engine("logits", "--list-mutations")
    # the fields of quantized weights are test_quant_logits.py's
    return [m for m in done.stdout.split() if not m.startswith("quant_")] if done.returncode == 0 else []


def test_there_are_mutations():
    assert len(mutations()) >= 50


@pytest.mark.parametrize("flag", mutations())
def test_each_flag_matters(flag, tmp_path):
    """Flip one flag of the resolved description: at least one tiny model must change beyond the tolerance, or be refused."""
    for model in TINY_MODELS:
        ours = engine_logits(TINY / model, some_ids(model, 24), tmp_path, mutate=flag)
        if ours is not None and (not np.isfinite(ours).all() or error(ours, tiny_ours(model)) > 5 * TINY_TOLERANCE):
            return
    assert False, f"no tiny model notices {flag}"


PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The quick brown fox", "In 1492,", "Water boils at",
    "To be or not to be,", "SELECT name FROM", "The meaning of life is", "Paris is a city in", "My favourite food is",
    "The first president of the United States was", "import numpy as np\n", "A haiku about autumn:\n", "Photosynthesis is the process",
    "1, 2, 3, 4, 5,", "Dear Sir or Madam,", "The speed of light is", "Roses are red,", "Machine learning is",
]


def test_smollm2_ref(smollm2, tmp_path):
    ids = smollm2_ids("The capital of France is Paris. It has 2,102,650 inhabitants, and a tower.")
    assert error(engine_logits(SMOLLM2, ids, tmp_path), reference_logits(smollm2, ids)) <= SMOLLM2_TOLERANCE


def test_smollm2_greedy(smollm2):
    """64 greedy tokens equal the reference's, or up to the first step where the reference itself hesitates."""
    whole = 0
    for prompt in PROMPTS:
        ids = smollm2_ids(prompt)
        done = run_engine("greedy", SMOLLM2, "--ids", ",".join(map(str, ids)), "--max-tokens", 64)
        assert done.returncode == 0, done.stderr
        ours = [int(x) for x in done.stdout.replace(",", " ").split()]
        assert ours
        logits = reference_logits(smollm2, ids + ours)[len(ids) - 1:]
        for step, row in enumerate(logits):
            best = int(row.argmax())
            if step == len(ours):
                assert len(ours) == 64 or best == 2, f"{prompt!r}: ours ended after {step}, the reference goes on with {best}"
                break
            if best != ours[step]:
                second, first = np.sort(row)[-2:]
                assert first - second < TIE_MARGIN, f"{prompt!r}: step {step}: {ours[step]}, reference {best} by {first - second}"
                break
        else:
            step += 1
        whole += step >= min(64, len(ours))
    assert whole >= 0.9 * len(PROMPTS), f"only {whole} of {len(PROMPTS)} reached their end"


@pytest.fixture(scope="module")
def of_fast_kernels(smollm2, tmp_path_factory):
    """Teacher-forced over 2,000 positions of text, with each KV cache: does the best token agree, and the KL divergence."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)[:12])
    ids = smollm2_ids(text)[:2000]
    found = {"auto": ([], []), "int8": ([], [])}
    for at in range(0, 2000, 500):
        piece = ids[at:at + 500]
        theirs = reference_logits(smollm2, piece).astype(np.float64)
        lp = theirs - np.logaddexp.reduce(theirs, axis=1, keepdims=True)
        for dtype, (agree, kl) in found.items():
            ours = engine_logits(SMOLLM2, piece, tmp_path_factory.mktemp("logits"), kernels=None, kv_cache_dtype=dtype).astype(np.float64)
            lq = ours - np.logaddexp.reduce(ours, axis=1, keepdims=True)
            agree += list(theirs.argmax(1) == ours.argmax(1))
            kl += list((np.exp(lp) * (lp - lq)).sum(1))
    return found


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_smollm2_fast_kernels(of_fast_kernels, dtype):
    """What the fast kernels decide."""
    agree, kl = of_fast_kernels[dtype]
    print(f"KV cache {dtype}: top-1 agreement {np.mean(agree):.4f}, mean KL {np.mean(kl):.2e} over {len(kl)} positions")
    assert len(kl) == 2000
    assert np.mean(agree) >= (MIN_TOP1_AGREEMENT if dtype == "auto" else MIN_TOP1_AGREEMENT_INT8)
    assert np.mean(kl) < MAX_MEAN_KL
