"""Damaged copies of a tiny model (issue A, "Bad input"): a named error with figures, exit status 1, and no crash."""
import json
import re
import shutil
import struct

import pytest

from conftest import TINY, run_engine

GOOD = TINY / "llama"


@pytest.fixture
def model(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(GOOD, copy)
    return copy


def refused(model, code, *texts):
    """Both commands say the same thing, once, and end with status 1."""
    for args in (["inspect", model], ["generate", model, "Hello", "--max-tokens", "4"]):
        done = run_engine(*args, timeout=60)
        assert done.returncode == 1, (args[0], done.returncode, done.stderr)
        assert done.stdout == ""
        assert done.stderr.startswith(f"millm-engine: {code}: "), done.stderr
        for text in texts:
            assert text in done.stderr
        assert len(done.stderr) < 3000


def edit_config(model, name="config.json", **changes):
    path = model / name
    config = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def read_st(path):
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + n]), data[8 + n:]


def write_st(path, header, data, pad=0):
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def greedy(model):
    done = run_engine("greedy", model, "--ids", "5,6,7", "--max-tokens", 16, kernels="ref")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_copy_is_good(model):
    assert run_engine("inspect", model).returncode == 0
    assert run_engine("generate", model, "Hello", "--max-tokens", "4").returncode == 0


@pytest.mark.parametrize("pad", range(1, 8))
def test_unaligned_data_is_no_damage(model, pad):
    want = greedy(model)
    header, data = read_st(model / "model.safetensors")
    write_st(model / "model.safetensors", header, data, (pad - len(json.dumps(header))) % 8)
    assert greedy(model) == want


# --- safetensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -4096, -1])
def test_truncated(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(model, "INVALID_MODEL_FILE", "model.safetensors", "bytes")


def test_longer(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refused(model, "INVALID_MODEL_FILE", "describes 987904 bytes of data; the file has 987905")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 + 100, 2**63, 2**64 - 8, 2**64 - 1])
def test_header_length_lies(model, length):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(model, "INVALID_MODEL_FILE", "model.safetensors")


def test_overlap_and_hole(model):
    header, data = read_st(model / "model.safetensors")
    norm = header["model.norm.weight"]
    begin, end = norm["data_offsets"]
    norm["data_offsets"] = [begin - 4, end - 4]
    write_st(model / "model.safetensors", header, data)
    refused(model, "INVALID_MODEL_FILE", "a hole or an overlap")
    del header["model.norm.weight"]
    write_st(model / "model.safetensors", header, data)
    refused(model, "INVALID_MODEL_FILE")


@pytest.mark.parametrize("shape", [[2**32, 2**32], [2**62], [-64], [64.5], ["64"], [], [1] * 9, [2**63 - 1, 2]])
def test_absurd_shape(model, shape):
    header, data = read_st(model / "model.safetensors")
    header["model.norm.weight"]["shape"] = shape
    write_st(model / "model.safetensors", header, data)
    refused(model, "INVALID_MODEL_FILE", "model.norm.weight")


@pytest.mark.parametrize("offsets", [[0, 2**63 - 1], [-256, 0], [2**63 - 257, 2**63 - 1], [5], "0", None])
def test_absurd_offsets(model, offsets):
    header, data = read_st(model / "model.safetensors")
    header["model.norm.weight"]["data_offsets"] = offsets
    write_st(model / "model.safetensors", header, data)
    refused(model, "INVALID_MODEL_FILE", "model.norm.weight")


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b"{}" + b"x", b"[" * 100000, b'{"a\xff": 1}', b'{"a": 99999999999999999999}'])
def test_header_is_no_header(model, header):
    write_st(model / "model.safetensors", header, b"")
    refused(model, "INVALID_MODEL_FILE", "JSON")


def test_duplicate_tensor(model):
    header, data = read_st(model / "model.safetensors")
    text = json.dumps(header)
    twice = '{"model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + ", " + text[1:]
    write_st(model / "model.safetensors", twice.encode(), data)
    refused(model, "INVALID_MODEL_FILE", "duplicate")


def test_unknown_dtype(model):
    header, data = read_st(model / "model.safetensors")
    header["model.norm.weight"]["dtype"] = "F8_E5M2"
    write_st(model / "model.safetensors", header, data)
    refused(model, "UNSUPPORTED", "F8_E5M2", "model.norm.weight")


def test_stored_dtype_that_cannot_be_multiplied(model):
    header, data = read_st(model / "model.safetensors")
    header["model.norm.weight"]["dtype"] = "I32"
    write_st(model / "model.safetensors", header, data)
    refused(model, "UNSUPPORTED", "I32", "HINT:")


def test_renamed_tensor(model):
    header, data = read_st(model / "model.safetensors")
    header["model.layers.2.mlp.up_projection.weight"] = header.pop("model.layers.2.mlp.up_proj.weight")
    write_st(model / "model.safetensors", header, data)
    refused(model, "INVALID_MODEL_FILE", 'tensor "model.layers.2.mlp.up_proj.weight" is missing', "4 layers")


def test_extra_tensor(model):
    header, data = read_st(model / "model.safetensors")
    header["model.layers.0.self_attn.q_norm.weight"] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
    write_st(model / "model.safetensors", header, data + bytes(16))
    refused(model, "INVALID_MODEL_FILE", "q_norm", "HINT:")


def test_terminal_codes_in_names_are_not_repeated(model):
    header, data = read_st(model / "model.safetensors")
    header["\x1b[31mevil\r\nERROR: forged"] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
    write_st(model / "model.safetensors", header, data + bytes(16))
    refused(model, "INVALID_MODEL_FILE", "?[31mevil??ERROR: forged")


def test_git_lfs_pointer(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(model, "INVALID_MODEL_FILE", "header claims")


# --- shards ------------------------------------------------------------------------------------


def shard(model):
    shutil.rmtree(model)
    shutil.copytree(TINY / "llama-sharded", model)
    return sorted(model.glob("model-*.safetensors"))


def test_missing_shard(model):
    shards = shard(model)
    assert run_engine("inspect", model).returncode == 0
    shards[1].unlink()
    refused(model, "MODEL_FILES_MISSING", shards[1].name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", ".", "a/b", 7, None])
def test_shard_name(model, name):
    shard(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "INVALID_MODEL_FILE", "model.safetensors.index.json")


def test_tensor_in_two_files(model):
    shards = shard(model)
    shutil.copy(shards[0], shards[1])
    refused(model, "INVALID_MODEL_FILE", "is in two files")


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"PK")
    refused(model, "MODEL_FILES_MISSING", "model.safetensors.index.json", "HINT:")


# --- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
                                 "max_position_embeddings"])
@pytest.mark.parametrize("value", [-1, 0, 2**31, 2**63 - 1, 2**64, 1e300, 64.5, "64", [64], {}, True])
def test_absurd_number(model, key, value):
    edit_config(model, **{key: value})
    refused(model, "INVALID_MODEL_FILE", "config.json")


@pytest.mark.parametrize("key,value", [("hidden_size", 128), ("num_hidden_layers", 3), ("num_hidden_layers", 5), ("num_attention_heads", 8), ("vocab_size", 510),
                                       ("num_key_value_heads", 4), ("num_key_value_heads", 3), ("intermediate_size", 171), ("head_dim", 15)])
def test_contradicts_the_files(model, key, value):
    edit_config(model, **{key: value, **({} if key == "head_dim" else {"head_dim": ...})})
    refused(model, "INVALID_MODEL_FILE", "DETAIL:")


@pytest.mark.parametrize("changes,code,text", [
    (dict(model_type="gpt5"), "UNSUPPORTED_ARCHITECTURE", '"gpt5"'),
    (dict(model_type=...), "UNSUPPORTED_ARCHITECTURE", "model_type"),
    (dict(hidden_act="quick_gelu"), "UNSUPPORTED_ARCHITECTURE", "quick_gelu"),
    (dict(is_encoder_decoder=True), "UNSUPPORTED_ARCHITECTURE", "is_encoder_decoder"),
    (dict(layer_types=["sliding_attention"] * 4), "UNSUPPORTED_ARCHITECTURE", "sliding_attention"),
    (dict(rope_scaling={"rope_type": "proportional", "factor": 2.0}), "UNSUPPORTED_ARCHITECTURE", "proportional"),
    (dict(rope_scaling={"type": "llama3"}), "INVALID_MODEL_FILE", "factor"),
    (dict(rope_theta=-1.0), "INVALID_MODEL_FILE", "rope_theta"),
    (dict(quantization_config={"quant_method": "gptq"}), "UNSUPPORTED", "gptq"),
    (dict(attention_bias=True), "INVALID_MODEL_FILE", "q_proj.bias"),
    (dict(attention_bias="no"), "INVALID_MODEL_FILE", "attention_bias"),
    (dict(eos_token_id=[-1]), "INVALID_MODEL_FILE", "eos_token_id"),
    (dict(eos_token_id=list(range(33))), "INVALID_MODEL_FILE", "at most 32"),
])
def test_config(model, changes, code, text):
    edit_config(model, **changes)
    refused(model, code, text)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"model_type": "llama", "x": NaN}', b'{"model_type": "ll\xffama"}', b"[" * 100000, b"\0"])
def test_config_is_no_config(model, text):
    (model / "config.json").write_bytes(text)
    refused(model, "INVALID_MODEL_FILE", "config.json")


def test_config_is_huge(model):
    (model / "config.json").write_bytes(b" " * (5 << 20))
    refused(model, "INVALID_MODEL_FILE", "At most 4194304 bytes")


def test_no_config(model):
    (model / "config.json").unlink()
    refused(model, "MODEL_FILES_MISSING", "config.json")
    refused(model / "nowhere", "MODEL_FILES_MISSING", "config.json")


@pytest.mark.parametrize("changes,text", [(dict(temperature=-1), "temperature"), (dict(top_k=0.5), "top_k"), (dict(top_p=7), "top_p"),
                                          (dict(eos_token_id="</s>"), "eos_token_id"), (dict(do_sample="yes"), "do_sample")])
def test_generation_config(model, changes, text):
    edit_config(model, "generation_config.json", **changes)
    refused(model, "INVALID_MODEL_FILE", text, "generation_config.json")


def test_generation_config_that_is_not_honoured_is_named(model):
    edit_config(model, "generation_config.json", num_beams=4)
    done = run_engine("inspect", model)
    assert done.returncode == 0
    assert re.search(r"not honoured +num_beams", done.stdout)


def test_every_byte_of_the_header_may_be_wrong(model):
    """One byte of the header at a time: refused with status 1, or read; never a signal."""
    path = model / "model.safetensors"
    good = path.read_bytes()
    n = struct.unpack("<Q", good[:8])[0]
    for at in range(0, 8 + n, max(1, n // 150)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x11]) + good[at + 1:])
        done = run_engine("inspect", model, timeout=60)
        assert done.returncode in (0, 1), (at, done.returncode, done.stderr)
        assert done.returncode == 0 or done.stderr.startswith("millm-engine: "), done.stderr


def damaged_header(model, change):
    """Another header for the same bytes: sizes of tensors stay what they were, so that only their meaning is damaged."""
    header, data = read_st(model / "model.safetensors")
    change(header)
    write_st(model / "model.safetensors", header, data)


def rename(header, tensor):
    header[tensor + "_"] = header.pop(tensor)


EXPERTS = "model.layers.1.mlp.experts."


@pytest.mark.parametrize("change, code, text", [
    (lambda h: rename(h, EXPERTS + "down_proj_scales"), "INVALID_MODEL_FILE", EXPERTS + "down_proj_scales"),
    (lambda h: rename(h, EXPERTS + "gate_up_proj_bias"), "INVALID_MODEL_FILE", EXPERTS + "gate_up_proj_bias"),
    (lambda h: rename(h, "model.layers.1.self_attn.sinks"), "INVALID_MODEL_FILE", "model.layers.1.self_attn.sinks"),
    (lambda h: h[EXPERTS + "gate_up_proj_blocks"]["shape"].reverse(), "INVALID_MODEL_FILE", EXPERTS + "gate_up_proj_blocks"),
    (lambda h: h[EXPERTS + "down_proj_scales"]["shape"].reverse(), "INVALID_MODEL_FILE", EXPERTS + "down_proj_scales"),
    (lambda h: h[EXPERTS + "gate_up_proj_scales"].update(dtype="I8"), "UNSUPPORTED", EXPERTS + "gate_up_proj_scales"),
    (lambda h: h[EXPERTS + "down_proj_bias"]["shape"].reverse(), "INVALID_MODEL_FILE", EXPERTS + "down_proj_bias"),
])
def test_fused_experts(change, code, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY / "gpt_oss-mxfp4", model)
    damaged_header(model, change)
    refused(model, code, text)


@pytest.mark.parametrize("changes, text", [(dict(num_local_experts=5), "gate"), (dict(num_local_experts=3), "gate"), (dict(intermediate_size=43), "w1")])
def test_experts(changes, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY / "mixtral", model)
    edit_config(model, **changes)
    refused(model, "INVALID_MODEL_FILE", text)
