"""Quantized directories, those of bitsandbytes and those that millm writes, opened by transformers 4 and 5: no key missing, unexpected
or mismatched, the modules and bytes expected, the same logits.
"""
import functools
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, ROOT, SMOLLM2, engine_logits, error, reference_logits, smollm2_ids
from test_logits import SMOLLM2_TOLERANCE
from test_quant_logits import TINY as TINY_BNB
from test_quant_logits import TINY_MODELS, TINY_TOLERANCE, judge

HUB = ROOT / "build" / "millm-hub"
PYTHONS = {"4": ROOT / ".venv" / "bin" / "python3", "5": ROOT / ".venv5" / "bin" / "python3"}
IDS = list(range(3, 27))
# two versions of the same arithmetic, in 16 bits
SAME = 2e-2
# bitsandbytes' matrix products are in 16 bits
NEAR = 5e-2


@pytest.fixture(params=PYTHONS)
def version(request):
    if not PYTHONS[request.param].exists():
        pytest.skip(f"there is no {PYTHONS[request.param].parent.parent}: run test/setup-venv transformers{request.param}")
    return request.param


def load(version, directories):
    """[(report, logits)] of the directories."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([PYTHONS[version], ROOT / "test/parity/load_with_transformers.py", out, *directories], capture_output=True, text=True,
                              timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(reports) == len(directories)
        return [(report, np.load(Path(out) / f"{i}.npy")) for i, report in enumerate(reports)]


def check(version, report, logits, directory, kind):
    assert report["transformers"].split(".")[0] == version
    assert not report["info"], report
    assert not report["other"], report
    quantized, others = ("Linear8bitLt", "Linear4bit") if kind == "int8" else ("Linear4bit", "Linear8bitLt")
    assert not report[others]
    stored = {k for path in directory.glob("model*.safetensors") for k in header(path)}
    beside = ".SCB" if kind == "int8" else ".quant_map"
    assert set(report[quantized]) == {k[:-len(beside)].removesuffix(".weight") for k in stored if k.endswith(beside)} and report[quantized]
    assert np.isfinite(logits).all() and (logits.size > 0) == ("stored-as" not in directory.name)


def header(path):
    with open(path, "rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))


@functools.cache
def tiny(version):
    return load(version, [TINY_BNB / name for name in TINY_MODELS])


def test_bitsandbytes_own(version):
    """What test_quant_logits.py judges by is what transformers loads."""
    for name, (report, logits), (_, logits4) in zip(TINY_MODELS, tiny(version), tiny("4")):
        check(version, report, logits, TINY_BNB / name, name.split("-")[0])
        if logits.size > 0:
            assert error(logits, logits4) <= SAME, name
        # bitsandbytes 0.50.1's AVX-512 code takes a wrong scale where a block straddles rows
        if name.startswith("int8") or name in ("nf4-wide", "nf4-sharded", "nf4-blocks-of-32"):
            assert error(logits, reference_logits(judge(TINY_BNB / name), IDS)) <= NEAR, name


SOURCES = {"llama": FIXTURES / "tiny" / "llama-bf16", "tied": FIXTURES / "tiny" / "llama-bias", "sharded": FIXTURES / "tiny" / "llama-sharded",
           "gpt2": FIXTURES / "tiny" / "gpt2", "smollm2": SMOLLM2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{(source, quantization): directory that millm wrote}"""
    made = {}
    for name, source in SOURCES.items():
        for quantization in ("Q4", "Q8"):
            out = tmp_path_factory.mktemp("written") / f"{name}-{quantization}"
            done = subprocess.run([HUB, "quantize", source, "--quantization", quantization, "--output", out], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            made[name, quantization] = out
    return made


@pytest.fixture(scope="module")
def loaded4(written):
    return dict(zip(written, load("4", written.values())))


def test_written_by_millm(version, written, loaded4):
    for which, (report, logits) in zip(written, load(version, written.values()) if version != "4" else loaded4.values()):
        check(version, report, logits, written[which], "int8" if which[1] == "Q8" else "nf4")
        assert error(logits, loaded4[which][1]) <= SAME, which
        if which == ("smollm2", "Q8"):
            assert error(logits, reference_logits(judge(written[which]), IDS)) <= NEAR, which


def test_experts(tmp_path):
    """transformers 5 has no Linear for each expert: it opens neither what version 4 writes nor what we do.  Version 4 opens ours, and its own we."""
    made = {}
    for family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        for quantization, kind in (("Q4", "nf4"), ("Q8", "int8")):
            made[tmp_path / f"{family}-{kind}"] = kind
            done = subprocess.run([HUB, "quantize", FIXTURES / "tiny" / family, "--quantization", quantization, "--output", tmp_path / f"{family}-{kind}"],
                                  capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    for (directory, kind), (report, logits) in zip(made.items(), load("4", made)):
        check("4", report, logits, directory, kind)
    for family, kind in (("mixtral", "nf4"), ("qwen2_moe", "int8")):
        theirs = tmp_path / "theirs" / kind
        done = subprocess.run([PYTHONS["4"], ROOT / "test/fixture/quantized.py", FIXTURES / "tiny" / family, kind, theirs], capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
        # it quantizes the routers too
        assert error(engine_logits(theirs, IDS, tmp_path), reference_logits(judge(theirs), IDS)) <= TINY_TOLERANCE


def test_written_by_millm_is_read_by_millm(written, tmp_path):
    """The same judge as for bitsandbytes' own files."""
    for which, directory in written.items():
        # a text for the real model: over ids at random, float32 transformers is 2e-4 away from float64 transformers, and we are 2e-5
        ids, tolerance = (smollm2_ids("The capital of France is Paris, because"), SMOLLM2_TOLERANCE) if which[0] == "smollm2" else (IDS, TINY_TOLERANCE)
        assert error(engine_logits(directory, ids, tmp_path), reference_logits(judge(directory), ids)) <= tolerance, which
