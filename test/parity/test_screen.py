"""The LM head through its screening copy: the same tokens as with the full head, on real weights and real text.

MILLM_SCREEN_POSITIONS says how many positions are compared (default 512); the whole text has about 113,000.
"""
import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, SMOLLM2, TINY, run_engine
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DRIVER = ROOT / "build" / "screen_driver"
COPY = "millm_head_int8.safetensors"
POSITIONS = int(os.environ.get("MILLM_SCREEN_POSITIONS", 512))


def driver(*args):
    done = subprocess.run([DRIVER, *map(str, args)], capture_output=True, text=True, timeout=60 + POSITIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of(model, directory):
    """A directory with the model's files and the screening copy of its head."""
    directory.mkdir()
    for f in model.iterdir():
        (directory / f.name).symlink_to(f.resolve())
    driver("make", directory, 1000003)
    return directory


@pytest.fixture(scope="module")
def screened(tmp_path_factory):
    return copy_of(SMOLLM2, tmp_path_factory.mktemp("screen") / "smollm2")


@pytest.fixture(scope="module")
def text_ids(screened):
    text = "\n".join(pydoc_data.topics.topics.values())
    done = subprocess.run([ROOT / "build" / "millm-engine", "tokenize", screened, "--ids"], input=text.encode(), capture_output=True, timeout=100)
    return np.array(done.stdout.split(), dtype=np.int32)


def test_every_position_chooses_the_same(screened, text_ids, tmp_path):
    """Each logit within its bound; greedy, top-k, top-k with top-p and a penalty, min-p choose the same from the shortlist."""
    path = tmp_path / "ids"
    text_ids[:POSITIONS].tofile(path)
    found = json.loads(driver("compare", screened, path))
    print(found)
    assert found["positions"] == min(POSITIONS, len(text_ids))
    assert found["out_of_bound"] == 0
    for name, setting in found["settings"].items():
        assert setting["differ"] == 0, name
        assert setting["full"] < found["positions"] / 20, name  # a shortlist that is never short proves nothing
        assert setting["rows"] < found["vocab"] / 32, name


@pytest.mark.parametrize("kernels", ["avx2", None])
def test_greedy_through_the_engine(screened, text_ids, kernels):
    if kernels and run_engine("greedy", TINY / "llama", "--ids", "1", "--max-tokens", 1, kernels=kernels).returncode != 0:
        pytest.skip(f"this CPU has no {kernels}")
    args = ["greedy", screened, "--ids", ",".join(map(str, text_ids[:40])), "--max-tokens", 50]
    full, short = (run_engine(*args, "--head", head, kernels=kernels) for head in ("full", "screened"))
    assert full.returncode == 0 and len(full.stdout.split()) == 50
    assert short.stdout == full.stdout


@pytest.mark.parametrize("options", [
    "--temperature 0", "--temperature 0 --repetition-penalty 1.2", "--temperature 1 --top-k 40", "--temperature 0.7 --top-k 20 --top-p 0.8 "
    "--repetition-penalty 1.05", "--temperature 1 --min-p 0.1", "--temperature 1 --top-k 50 --min-p 0.05 --presence-penalty 0.5",
    "--temperature 1", "--temperature 1 --top-p 0.9"])
def test_generate_is_the_same_without_the_copy(screened, options):
    args = ["The history of the lighthouse", "--max-tokens", 40, "--seed", 7, *options.split()]
    short, full = (run_engine("generate", model, *args) for model in (screened, SMOLLM2))
    assert full.returncode == 0 and full.stdout
    assert (short.stdout, short.stderr) == (full.stdout, full.stderr)


def test_bench_says_which_head_is_read(screened):
    args = ["bench", "--json", "--rounds", 1, "--prompt", 4, "--gen", 4]
    short, forced, none = (json.loads(run_engine(*args, *more).stdout) for more in ([screened], [screened, "--head", "full"], [SMOLLM2]))
    assert (short["head"], forced["head"], none["head"]) == ("screened", "full", "full")
    assert 1 <= short["head_rows"] < 49152 / 16
    head = 49152 * 576
    assert forced["decode_bytes"] == none["decode_bytes"]
    assert 0 <= short["decode_bytes"] - (forced["decode_bytes"] - 2 * head + head + 8 * 49152) - short["head_rows"] * 1152 + 1 < 2
    assert short["weights_bytes"] == none["weights_bytes"] + head + 8 * 49152
    wrong = run_engine("bench", screened, "--head", "half")
    assert wrong.returncode == 2 and '"half"' in wrong.stderr


def test_genuine_readers(tmp_path):
    """safetensors reads the copy; transformers does not look at it."""
    from transformers import AutoModelForCausalLM

    model = copy_of(TINY / "llama", tmp_path / "tiny")
    head = load_file(model / "model.safetensors")
    head = head.get("lm_head.weight", head.get("model.embed_tokens.weight")).double()
    with safe_open(model / COPY, "pt") as f:
        assert sorted(f.keys()) == ["codes", "error", "fingerprint", "scale"]
        loss = head - f.get_tensor("codes").double() * f.get_tensor("scale").double()[:, None] / 127
        norm = loss.norm(dim=1)
        assert (f.get_tensor("error").double() >= norm).all()
        assert (f.get_tensor("error").double() <= norm * 1.01 + head.norm(dim=1) * 2e-5).all()  # and it is no idle talk
    _, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_a_copy_of_another_head_is_not_used(tmp_path):
    model = copy_of(TINY / "llama", tmp_path / "tiny")
    weights = load_file(model / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[name][3] = weights[name][3] * 1.5
    os.unlink(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = run_engine("generate", model, "a", "--max-tokens", 2)
    assert done.returncode == 0 and re.search(f'"{COPY}" is not used: .*another LM head', done.stderr)
    os.unlink(model / COPY)
    shutil.copy(model / "config.json", model / COPY)
    done = run_engine("generate", model, "a", "--max-tokens", 2)
    assert done.returncode == 0 and f'"{COPY}" is not used' in done.stderr
