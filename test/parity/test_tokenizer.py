"""Our token ids and texts against the genuine `tokenizers` library: the fixture model's tokenizer and small ones of
every supported shape, on a corpus of more than a megabyte, edge cases, random strings and all code points."""
import json
import os
import random
import struct
import sys
import time

import pytest
from conftest import FIXTURES, ROOT, SMOLLM2
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
import tokenizer_cases as cases
from tokenizer_cases import Ours

sys.path.insert(0, str(ROOT / "test/fixture"))
from unigram_tokenizers import fields  # noqa: E402

# These see the whole corpus and every code point beside others; the rest, which share their code, see a sample.
THOROUGH = ["smollm2", "gpt2", "llama3"]


@pytest.fixture(scope="module", params=["smollm2"] + cases.SMALL)
def pair(request, tmp_path_factory):
    """(name, ours, genuine)"""
    if request.param == "smollm2":
        directory, genuine = SMOLLM2, Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
    else:
        genuine = cases.make(request.param)
        directory = cases.write(genuine, tmp_path_factory.mktemp("tokenizer"))
    assert genuine.get_vocab_size() > 400
    with Ours(directory) as ours:
        yield request.param, ours, genuine


def test_edges(pair):
    name, ours, genuine = pair
    texts = cases.EDGES + [" " + t for t in cases.EDGES[:120]] + [t + "\n" + t for t in cases.EDGES[:120]]
    assert cases.differences(ours, genuine, texts) == []


def test_corpus(pair):
    name, ours, genuine = pair
    texts = cases.corpus()
    assert cases.differences(ours, genuine, texts if name in THOROUGH else texts[:2] + texts[2::4]) == []


def test_random(pair):
    name, ours, genuine = pair
    assert cases.differences(ours, genuine, cases.random_texts(2000, seed=name)) == []


def test_code_points(pair):
    name, ours, genuine = pair
    texts = list(cases.neighbour_texts())
    assert cases.differences(ours, genuine, texts if name in THOROUGH else texts[::60] + texts[:12]) == []


def test_post_processor(pair):
    name, ours, genuine = pair
    for text in ("", "Hello, world"):
        assert ours.encode(text, "P") == genuine.encode(text).ids


def test_decode(pair):
    name, ours, genuine = pair
    rng = random.Random(3)
    ids = sorted(genuine.get_vocab(with_added_tokens=True).values())
    samples = [[i] for i in ids[:3000]]
    samples += [[rng.choice(ids) for _ in range(rng.randint(2, 30))] for _ in range(1500)]
    samples += [genuine.encode(t).ids for t in cases.EDGES if len(t) < 20000]
    for sample in samples:
        assert ours.decode(sample) == genuine.decode(sample, skip_special_tokens=False), sample
        assert ours.decode(sample, "K") == genuine.decode(sample, skip_special_tokens=True), sample


def test_stream(pair):
    name, ours, genuine = pair
    rng = random.Random(5)
    ids = sorted(genuine.get_vocab(with_added_tokens=True).values())
    samples = [genuine.encode(t).ids for t in cases.EDGES + [cases.MULTILINGUAL] if len(t) < 20000]
    if name not in ("llama2", "mistral", "unigram-bytes"):  # there a broken run of byte tokens may differ (see decode.c)
        samples += [[rng.choice(ids) for _ in range(rng.randint(2, 30))] for _ in range(1000)]
    for sample in samples:
        assert ours.decode(sample, "S") == genuine.decode(sample, skip_special_tokens=True), sample


@pytest.mark.parametrize("name", ["gpt2", "llama3", "digits", "cl100k"])
def test_round_trip(name, tmp_path):
    """A byte-level tokenizer without a normalizer gives every text back."""
    with Ours(cases.write(cases.make(name), tmp_path)) as ours:
        for text in cases.EDGES + [cases.MULTILINGUAL] + list(cases.random_texts(500, seed=11)):
            assert ours.decode(ours.encode(text)) == text


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """Added tokens with every flag, in raw and in normalized text."""
    genuine = cases.make("qwen")
    genuine.add_tokens([
        AddedToken("<L>", lstrip=True, normalized=False), AddedToken("<R>", rstrip=True, normalized=False),
        AddedToken("<LR>", lstrip=True, rstrip=True, normalized=False), AddedToken("word", single_word=True, normalized=True),
        AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False), AddedToken("e\u0301e", normalized=True),
        AddedToken("ab", normalized=True), AddedToken("abab", normalized=True), AddedToken("<L", normalized=False),
        AddedToken("\t", normalized=False), AddedToken("abc d", normalized=True, lstrip=True)])
    genuine.add_special_tokens([AddedToken("<S>", single_word=True, normalized=False), AddedToken("<SN>", normalized=True, special=True)])
    directory = cases.write(genuine, tmp_path_factory.mktemp("added"))
    with Ours(directory) as ours:
        yield ours, genuine


ALPHABET = ["<L>", "<R>", "<LR>", "word", "words", "\n", "\n\n", "é", "e\u0301e", "ab", "abab", "abc d", "<L", "<S>", "<SN>", " ", "  ", "\t",
            "\u3000", "_", "x", "\u200d", "1", "<", "<|im_end|>"]


def added_texts():
    rng = random.Random(17)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 12))) for _ in range(6000)]


def test_added_tokens(added):
    ours, genuine = added
    assert cases.differences(ours, genuine, added_texts()) == []


def test_special_tokens_as_text(added):
    ours, genuine = added
    genuine.encode_special_tokens = True
    try:
        for text in added_texts():
            assert ours.encode(text, "N") == genuine.encode(text).ids, text
    finally:
        genuine.encode_special_tokens = False


BEHAVIORS = ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("pattern", ["-", cases.Regex(r"[-a]+|\d"), cases.Regex(r"(?=b)"), cases.Regex(r"b*|-")],
                         ids=["string", "regex", "empty-match", "empty-or-not"])
def test_split_behaviors(pattern, behavior, invert, tmp_path):
    genuine = cases.make("gpt2")
    genuine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, behavior, invert), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    rng = random.Random(2)
    with Ours(cases.write(genuine, tmp_path)) as ours:
        texts = ["The-final--countdown", "-", "--", "-a-", "a-b1-"] + ["".join(rng.choice("-ab1 é") for _ in range(9)) for _ in range(400)]
        assert cases.differences(ours, genuine, texts) == []


@pytest.mark.parametrize("name, parts", cases.COMPONENTS, ids=[name for name, _ in cases.COMPONENTS])
def test_component(name, parts, tmp_path):
    """Every normalizer and pre-tokenizer alone, seen through a vocabulary that hides nothing."""
    genuine = cases.revealing(**parts)
    with Ours(cases.write(genuine, tmp_path)) as ours:
        texts = [t for t in cases.EDGES if len(t) < 400] + [cases.MULTILINGUAL] + list(cases.random_texts(600, seed=name))
        texts += list(cases.mark_texts(300, seed=name)) + list(cases.point_texts())[::1 if name.startswith("normalizer") else 4]
        assert cases.differences(ours, genuine, texts) == []


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODERS = {
    "wordpiece": {"type": "WordPiece", "prefix": "##", "cleanup": True}, "wordpiece-raw": {"type": "WordPiece", "prefix": "", "cleanup": False},
    "suffix": {"type": "BPEDecoder", "suffix": "</w>"}, "ctc": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "ctc-raw": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": False}, "metaspace": cases.METASPACE,
    "metaspace-never": cases.METASPACE | {"prepend_scheme": "never"}, "fuse": {"type": "Fuse"}, "bytes": {"type": "ByteFallback"},
    "strip": {"type": "Strip", "content": " ", "start": 2, "stop": 0}, "none": None,
    "byte-level": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "llama": cases.sequence("decoders", {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP),
    "bytes-first": cases.sequence("decoders", {"type": "ByteFallback"}, cases.METASPACE, STRIP),
    "mixed": cases.sequence("decoders", {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": False},
                            {"type": "BPEDecoder", "suffix": "</w>"}, {"type": "ByteFallback"}, {"type": "WordPiece", "prefix": "##", "cleanup": True},
                            {"type": "Replace", "pattern": {"String": "▁"}, "content": "---"})}
DECODED = ["a", "##b", "b</w>", "</w>c", "<pad>", "x<pad>y", "|", "▁", "▁▁d", "e▁f", " ", "  g ", ".", " .", "n't", " do not", " ' ", "'s", "é", "Ġh", "ĠĊ", "日",
           "<0x41>", "<0xe2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x0a>", "##", "", "do", "not", "!", "'", "'re"]


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, tmp_path):
    """Every decoder over tokens that it has rules for, at once and as a stream."""
    genuine = cases.Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "decoder": DECODERS[name],
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(DECODED)}, "unk_token": "a"}}))
    rng = random.Random(name)
    broken = [DECODED.index(t) for t in DECODED if t.startswith("<0x")]
    with Ours(cases.write(genuine, tmp_path)) as ours:
        for _ in range(3000):
            ids = [rng.randrange(len(DECODED)) for _ in range(rng.randint(0, 9))]
            text = genuine.decode(ids)
            assert ours.decode(ids) == text, (ids, [DECODED[i] for i in ids])
            if name == "byte-level" or not set(ids) & set(broken):
                assert ours.decode(ids, "S") == text, ids


def test_config_over_tokenizer(tmp_path):
    """tokenizer_config.json: its flags win, special tokens that are missing are added, add_bos_token adds."""
    genuine = cases.make("gpt2")
    end = genuine.token_to_id("<|im_end|>")
    config = {"added_tokens_decoder": {str(end): {"content": "<|im_end|>", "lstrip": True, "rstrip": True, "normalized": False,
                                                  "single_word": False, "special": True}},
              "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "add_bos_token": True}
    with Ours(cases.write(genuine, tmp_path, config)) as ours:
        start, pad = genuine.token_to_id("<|im_start|>"), genuine.get_vocab_size()
        assert ours.encode("a", "P") == [start] + genuine.encode("a").ids
        assert ours.encode("a  <|im_end|> \nb") == genuine.encode("a").ids + [end] + genuine.encode("b").ids
        assert ours.encode("<pad>") == [pad]
        assert ours.decode([pad], "K") == ""


PUBLISHED = {"gemma3": FIXTURES / "gemma-3-270m", "xlm-roberta": FIXTURES / "unigram/xlm-roberta",
             **{name: FIXTURES / "tokenizers" / name for name in ("qwen3", "llama3.1", "deepseek-v3", "mistral", "gpt-oss", "minilm")}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name, tmp_path):
    """Tokenizers as their authors published them, the large ones compiled too.  MILLM_TOKENIZER_BYTES: so much text of many languages too, and all of the corpus."""
    directory = PUBLISHED[name]
    much = int(os.environ.get("MILLM_TOKENIZER_BYTES", 0))
    assert directory.is_dir(), "run test/fixture/make"
    genuine = cases.Tokenizer.from_file(str(directory / "tokenizer.json"))
    genuine.no_padding()
    genuine.no_truncation()
    texts = [t for t in cases.EDGES if much or len(t) < 30000] + [cases.MULTILINGUAL] + cases.corpus(max(much // 3, 1_200_000))[2:None if much else 12]
    texts += list(cases.neighbour_texts())[::1 if much else 200]
    languages = set()
    for language, text in cases.translations(much // 3 if much else 200_000):
        texts.append(text)
        languages.add(language)
    specials = [t.content for t in genuine.get_added_tokens_decoder().values()][:200]
    rng = random.Random(name)
    texts += ["".join(rng.choice(specials + cases.AWKWARD) for _ in range(rng.randint(1, 12))) for _ in range(500)]
    is_large = (directory / "tokenizer.json").stat().st_size > 4 << 20
    for where in [directory] + ([cases.compile_in(tmp_path / name, directory)] if is_large else []):
        with Ours(where) as ours:
            assert cases.differences(ours, genuine, texts) == []
            for text in texts[::7]:
                ids = ours.encode(text)
                assert ours.decode(ids) == genuine.decode(ids, skip_special_tokens=False)
                assert ours.decode(ids, "K") == genuine.decode(ids)
    if much:
        print(f"{name}: {sum(len(t.encode()) for t in texts)} bytes in {len(texts)} texts, {len(languages)} languages")


def test_fuzz(pair):
    """Random strings for a while, from another seed each time; MILLM_SEED repeats one."""
    name, ours, genuine = pair
    seed = int(os.environ.get("MILLM_SEED", time.time_ns() % 1_000_000_000))
    print(f"MILLM_SEED={seed}")
    rng = random.Random(seed)
    points = cases.all_code_points()
    end = time.monotonic() + float(os.environ.get("MILLM_FUZZ_SECONDS", 1))
    while time.monotonic() < end:
        text = "".join(rng.choice(cases.AWKWARD) if rng.random() < 0.8 else chr(rng.randrange(0x3000)) if rng.random() < 0.7 else rng.choice(points)
                       for _ in range(rng.randint(1, 60)))
        text = text.encode(errors="ignore").decode()
        ids = ours.encode(text)
        assert ids == genuine.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == genuine.decode(ids, skip_special_tokens=False), text


def legacy_texts():
    return [t for t in cases.EDGES if len(t) < 20000] + [cases.MULTILINGUAL] + list(cases.random_texts(1000, seed=9)) + cases.corpus()[2:8]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocabulary_and_merges(name, tmp_path):
    """vocab.json, merges.txt, added_tokens.json: as transformers' class reads them."""
    import transformers

    made = cases.make("gpt2" if name == "GPT2Tokenizer" else "qwen")
    made.model.save(str(tmp_path))
    n = made.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<two>": n + 1, "<one>": n}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "<|im_end|>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "add_prefix_space": name == "GPT2Tokenizer"}))
    genuine = getattr(transformers, name + "Fast").from_pretrained(tmp_path)
    with Ours(tmp_path) as ours:
        for text in legacy_texts() + ["a<one><two> <pad>b<|im_end|><|endoftext|>", "<two>x"]:
            ids = genuine(text)["input_ids"]
            assert ours.encode(text, "P") == ids, text[:80]
            assert ours.decode(ids, "K") == genuine.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def score(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_bpe(legacy, tmp_path):
    """tokenizer.model of BPE: the merges that transformers makes of its scores, and Llama's stages."""
    from transformers.convert_slow_tokenizer import generate_merges

    made = cases.make("llama2" if legacy else "mistral")
    data = json.loads(made.to_str())
    vocab = data["model"]["vocab"]
    rng = random.Random(4)
    # scores in no order, many of them equal: so every rule of the order of merges counts
    pieces = [(t, score(-rng.randrange(300) / 7 if i > 258 else 0), 2 if i == 0 else 3 if i < 3 else 6 if t.startswith("<0x") else 1)
              for t, i in sorted(vocab.items(), key=lambda x: x[1])]
    pieces += [("<mine>", 0.0, 4)]
    data["model"]["vocab"] = {t: i for i, (t, _, _) in enumerate(pieces)}
    data["model"]["merges"] = generate_merges(data["model"]["vocab"], [(t, s) for t, s, _ in pieces])
    data["added_tokens"] = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": k != 4}
                            for i, (t, _, k) in enumerate(pieces) if k in (2, 3, 4)]
    genuine = cases.Tokenizer.from_str(json.dumps(data))
    (tmp_path / "tokenizer.model").write_bytes(cases.sentencepiece_model(pieces, 2, True))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
    with Ours(tmp_path) as ours:
        for text in legacy_texts() + ["a<mine>b <s></s><unk>"]:
            ids = genuine.encode(text).ids
            assert ours.encode(text, "P") == ids, text[:80]
            assert ours.decode(ids) == genuine.decode(ids, skip_special_tokens=False)


def test_sentencepiece_unigram(tmp_path):
    """tokenizer.model of Unigram: its scores are float32, and the stages are SentencePiece's own."""
    data = json.loads(cases.make("unigram").to_str())
    pieces = [(t, score(s), 3 if i < 2 else 2 if i == 2 else 1) for i, (t, s) in enumerate(data["model"]["vocab"])]
    model = cases.sentencepiece_model(pieces, 1, False, 2, cases.base64.b64decode(cases.charsmap(cases.CHARSMAP)))
    data["post_processor"], data["pre_tokenizer"] = None, cases.METASPACE
    genuine = cases.Tokenizer.from_str(json.dumps(data))
    genuine.model = cases.models.Unigram([(t, s) for t, s, _ in pieces], 2, False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    with Ours(tmp_path) as ours:
        assert cases.differences(ours, genuine, legacy_texts()) == []


def test_published_sentencepiece():
    """The model of SentencePiece's own tests."""
    directory = FIXTURES / "unigram/botchan"
    assert directory.is_dir(), "run test/fixture/make"
    messages = list(fields((directory / "tokenizer.model").read_bytes()))
    pieces = [dict(fields(m)) for number, m in messages if number == 1]
    charsmap = dict(fields(dict(messages)[3]))[2]
    vocab = [(p[1].decode(), struct.unpack("<f", p[2])[0]) for p in pieces]
    assert len(vocab) == 1000 and len(charsmap) > 200_000
    data = json.loads(cases.make("unigram").to_str())
    data["normalizer"]["normalizers"][0]["precompiled_charsmap"] = cases.base64.b64encode(charsmap).decode()
    data["post_processor"], data["pre_tokenizer"] = None, cases.METASPACE
    data["added_tokens"] = [{"id": i, "content": p[1].decode(), "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                            for i, p in enumerate(pieces) if p.get(3, 1) in (2, 3)]
    data["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    genuine = cases.Tokenizer.from_str(json.dumps(data))
    texts = legacy_texts() + list(cases.neighbour_texts())[::20] + [t for _, t in cases.translations(200_000)]
    with Ours(directory) as ours:
        assert cases.differences(ours, genuine, texts) == []


def test_transformers_agrees():
    """The whole of the fixture model's two files, as transformers reads them."""
    from transformers import AutoTokenizer

    genuine = AutoTokenizer.from_pretrained(SMOLLM2)
    with Ours(SMOLLM2) as ours:
        for text in cases.EDGES + [cases.MULTILINGUAL]:
            assert ours.encode(text, "P") == genuine.encode(text)


def test_invalid_text_is_refused(pair):
    name, ours, genuine = pair
    for bad in (b"\x80", b"a\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ab\xe2\x82", b"\xf0\x9f\x98"):
        with pytest.raises(ValueError, match=f"not valid UTF-8 at byte offset {len(bad) - len(bad.lstrip(b'ab'))}"):
            ours.encode(bad)
    with pytest.raises(ValueError, match="token id 99999999 is not in the vocabulary"):
        ours.decode([99999999])
