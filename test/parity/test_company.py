"""millm.deterministic: the bits of a row of logits do not depend on how many sequences share a step, on where chunks begin, on what others say, on the
number of threads, or on whether the beginning was computed or shared, by a fork or through the prefix cache.  company_driver.c compares; every variant of
the kernels that runs here, and of a GPU (emulated, test/cuda).
"""
import json
import subprocess

import pytest
from conftest import FIXTURES, ROOT

DRIVER = ROOT / "build" / "company_driver"
# of each way in which a layer can be made, and of each dtype of weights
TINY_MODELS = ["tiny/llama-bf16", "tiny/llama-f16", "tiny/gemma2", "tiny/gemma3", "tiny/gpt2", "tiny/falcon-rw", "tiny/phi3-long", "tiny/mixtral-sliding",
               "tiny/qwen2_moe", "tiny/gpt_oss", "tiny/gpt_oss-mxfp4", "tiny-bnb/nf4-wide", "tiny-bnb/nf4-odd", "tiny-bnb/nf4-gpt2-odd", "tiny-bnb/int8", "tiny-bnb/int8-f16-odd"]


def company(model, variant, n, longest, how="deterministic"):
    """{what: [rows, rows with other bits]}, or None where the variant cannot run."""
    done = subprocess.run([DRIVER, FIXTURES / model, variant, str(n), str(longest), how], capture_output=True, text=True, timeout=300)
    if "this CPU cannot run" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same(counts):
    assert counts and all(rows > 0 and other == 0 for rows, other in counts.values()), counts


@pytest.mark.parametrize("model", TINY_MODELS)
def test_tiny_models(model):
    for variant, n, longest in [("ref", 16, 24), ("avx2", 64, 40), ("avx512", 64, 40), ("amx", 64, 40)]:
        counts = company(model, variant, n, longest)
        if counts is not None:
            assert ("64 at a time" in counts) == (n == 64)
            assert_same(counts)


@pytest.mark.parametrize("model", ["tiny/llama-bf16", "tiny/gemma3", "tiny/gpt_oss", "tiny/falcon-rw"])
def test_int8_kv(model):
    """What a position leaves in a KV cache of int8 does not depend on its company either."""
    for variant, n, longest in [("ref", 16, 24), ("avx2", 16, 40), ("avx512", 64, 40)]:
        counts = company(model, variant, n, longest, "int8")
        if counts is not None:
            assert_same(counts)


@pytest.mark.parametrize("model", ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-nf4", "SmolLM2-135M-Instruct-int8"])
def test_real_weights(model):
    for variant in "amx", "avx512", "avx2":
        counts = company(model, variant, 3, 18)
        if counts is not None:
            return assert_same(counts)
    assert_same(company(model, "ref", 1, 4))


def test_without_it_company_shows():
    """The comparison sees what it should: the fast forms of 4-bit weights depend on how many tokens a step has."""
    counts = company("tiny-bnb/nf4-wide", "avx2", 16, 40, "fast")
    if counts is None:
        pytest.skip("no AVX2")
    assert counts["16 at a time"][1] > 0 and counts["forks"][1] > 0
