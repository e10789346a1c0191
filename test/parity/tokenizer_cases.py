"""What the tokenizer comparisons share: the driver of our tokenizer, the texts, and small tokenizers made on the spot."""
import base64
import json
import random
import struct
import subprocess
import sysconfig
import unicodedata
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "build" / "tok_driver"

REGEX_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
REGEX_QWEN = REGEX_LLAMA3.replace("{1,3}", "")
REGEX_CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
REGEX_QWEN35 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
                r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
REGEX_O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
               r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
               r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
REGEX_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
REGEX_DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                   "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")
REGEX_TIKTOKEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+"
                  r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")


class Ours:
    """Our tokenizer of a model directory, in a process of its own."""

    def __init__(self, directory):
        assert DRIVER.exists(), f"{DRIVER} is missing: make drivers"
        self.process = subprocess.Popen([DRIVER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0

    def ask(self, kind, n, data, size):
        self.process.stdin.write(struct.pack("<II", ord(kind), n) + data)
        self.process.stdin.flush()
        count, = struct.unpack("<i", self.process.stdout.read(4))
        if count < 0:
            count, = struct.unpack("<i", self.process.stdout.read(4))
            raise ValueError(self.process.stdout.read(count).decode())
        return count, self.process.stdout.read(count * size)

    def encode(self, text, kind="E"):
        data = text if isinstance(text, bytes) else text.encode()
        count, raw = self.ask(kind, len(data), data, 4)
        return list(struct.unpack(f"<{count}i", raw))

    def decode(self, ids, kind="D"):
        return self.ask(kind, len(ids), struct.pack(f"<{len(ids)}i", *ids), 1)[1].decode()


def compile_in(directory, original):
    """Compile original's tokenizer in a new directory of links to its files; the second look must find it so."""
    directory.mkdir()
    for file in original.glob("tokenizer*.json"):
        (directory / file.name).symlink_to(file)
    said = [subprocess.run([DRIVER, directory, "--compile"], check=True, capture_output=True, text=True).stdout.strip() for _ in range(2)]
    assert said == ["not compiled", "compiled"]
    return directory


def differences(ours, genuine, texts, limit=5):
    """The first texts that the two encode differently, as readable lines."""
    out = []
    for text in texts:
        a, b = ours.encode(text), genuine.encode(text, add_special_tokens=False).ids
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            out.append(f"{text[:60]!r}: at token {at} ours {a[at:at + 6]} genuine {b[at:at + 6]}")
            if len(out) == limit:
                break
    return out


# ---- texts ----

MULTILINGUAL = """
All human beings are born free and equal in dignity and rights. They're endowed with reason; it's so, I'LL say.
Tous les êtres humains naissent libres et égaux en dignité et en droits. L'été où naît la forêt.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Größe, ÄÖÜ.
Todos los seres humanos nacen libres e iguales. ¿Qué? ¡Señor!
Все люди рождаются свободными и равными в своём достоинстве и правах.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι. ΣΊΣΥΦΟΣ σίσυφος
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。「你好」、谢谢！
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ か\u3099
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. \u1112\u1161\u11ab
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. ١٢٣٤٥
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३ क्षत्रिय
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.
មនុស្សទាំងអស់កើតមកមានសេរីភាព និងសមភាព
ყველა ადამიანი იბადება თავისუფალი ß ﬁ ﬆ İ ı ǅ ʰ 𝒜𝒷 𠀀 𱍐 Å\u212bA\u030a
👩\u200d👩\u200d👧\u200d👦 🇩🇪🇫🇷 👍🏽 1️⃣ 🏴\U000e0067\U000e0062\U000e007f ❤️ \u200d \ue000 \ufdd0 \U0010ffff
"""

EDGES = [
    "", " ", "  ", "   ", " " * 16, " " * 255, " " * 256, " " * 10000, "  \n", "\t\t\t", " \n \n", "\r\n", "\r", "\n\r",
    "\r\n\r\n  x", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u3000", "\ufeff", "\xad",
    "a\u180eb", "  \u180e  x", "x \u3000 y", "x\xa0\xa0y", "\x1c\x1d\x1e\x1f",
    "0", "12", "123", "1234", "1234567", "1,234.56", "٣٤٥", "½", "Ⅷ", "²", "१२३", "１２３", "0xdeadbeef",
    "123e4567-e89b-12d3-a456-426614174000", "2024-12-31T23:59:59", "192.168.0.1", "a1b2c3", "½½½½", "1²3",
    "I'm don't we'LL it'S '", "’s", "'ſ", "'K", "\u212a'S", "A's", "''''", "'", " 's", "x's't're've'm'll'd", "'Re'VE'lL'D", "'ſt",
    "don’t", "\u00df'SS", "'sa 'ta 'rea", "😀", "😀😀 😀", "\u200d", "e" + "\u0301" * 50, "\u0301", "\u0301\u0301a", " \u0301",
    "a" * 100000, "文" * 20000, "!" * 100000, "aA" * 5000, "A" * 3000, "1" * 30000, "\n" * 3000, " \n" * 3000, "\t \r\n" * 2000,
    "".join(random.Random(1).choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100000)),
    "<|im_start", "<|im_start|>|>", "<<s>>", "<s ></s>", "▁", "<0x0A>", "Ġ", "Ċ", "é", "<|im_start|>user\nhi<|im_end|>\n",
    " <|im_end|> ", "<|im_end|><|im_end|>", "<|im_end|", "｜", "<|endoftext|>x", "a<|endoftext|>  b",
    "    if x:\n        return 1\n\tpass\n", "a->b !== c // d /* e */", "https://x.y///z?a=b&c=d", "C:\\a\\b", "<br/><p>",
    "\\frac{1}{2}", "\0", "a\0b", "\0\0 \0", "#include <stdio.h>\n\nint\nmain(void)\n{\n}\n",
]

AWKWARD = (list("aAzZ019 '.,!-_/<>|\n\r\t\0") + ["'s", "'LL", "  ", "\r\n", "ſ", "é", "e\u0301", "ß", "\u212a", "\u0130", "Σ"] +
           list("\x85\xa0\u180e\u2003\u200b\u2028\u3000\ufeff\u0301\u0940²½Ⅷ٣文か\u3099각\u1100\u1161ʰǅ😀\u200d\U00013430\U0001e030\U000323af") +
           ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "▁", "Ġ"])


def random_texts(n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        yield "".join(rng.choice(AWKWARD) for _ in range(rng.randint(1, 24)))


def all_code_points():
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def neighbour_texts():
    """Every code point beside a letter, a space, a digit, a line end, punctuation and itself; a few hundred in a text."""
    points = all_code_points()
    for i in range(0, len(points), 256):
        yield "".join(f"a{c}b {c}{c} {c}1{c}\n{c}.{c}  {c}'{c}s{c}" for c in points[i:i + 256])


def corpus(n_bytes=1_200_000):
    """Sources and documents that every Python brings, cut into pieces of some kilobytes, and many languages."""
    out, size = [MULTILINGUAL, MULTILINGUAL * 20], 0
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    site = Path(sysconfig.get_paths()["purelib"])
    files = sorted(stdlib.glob("*.py")) + sorted(site.glob("*/METADATA")) + sorted(ROOT.glob("src/*/*.c"))
    random.Random(7).shuffle(files)
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")[:40000]
        out.append(text)
        size += len(text.encode())
        if size > n_bytes:
            break
    assert size > 1_000_000, size
    return out


def translations(n_bytes):
    """Text of many languages: (language, text), from the message catalogues of packages that are installed (`msgid` and `msgstr` of *.mo)."""
    import gettext
    import site

    files = sorted({f for d in [*site.getsitepackages(), sysconfig.get_paths()["stdlib"], "/usr/share/locale"] for f in Path(d).glob("**/*.mo")})
    random.Random(8).shuffle(files)
    size = 0
    for path in files:
        language = path.parent.parent.name
        try:
            with path.open("rb") as f:
                text = "\n".join(m for m in gettext.GNUTranslations(f)._catalog.values() if isinstance(m, str))
        except (OSError, UnicodeDecodeError, struct.error):
            continue
        if text.isascii():
            continue
        yield language, text[:60000]
        size += len(text[:60000].encode())
        if size > n_bytes:
            return


# ---- small tokenizers ----

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(pre_tokenizer, normalizer=None, vocabulary=2000, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, special_tokens=SPECIALS,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([MULTILINGUAL * 3] + corpus()[2:20], trainer)
    return tokenizer


def split(regex):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece_like(vocabulary, metaspace, fallback=True):
    """The Llama 2 shape: text in pieces of whole words with U+2581, unknown bytes as <0xHH>."""
    base = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    if metaspace:
        base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer_base = Tokenizer(models.BPE())
    trainer_base.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>"] + ([f"<0x{b:02X}>" for b in range(256)] if fallback else [])
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, special_tokens=specials, limit_alphabet=120)
    trainer_base.train_from_iterator([MULTILINGUAL * 3] + corpus()[2:12], trainer)
    data = json.loads(trainer_base.to_str())
    shape = json.loads(base.to_str())
    for key in ("unk_token", "fuse_unk", "byte_fallback"):
        data["model"][key] = shape["model"][key]
    for key in ("normalizer", "pre_tokenizer"):
        data[key] = shape[key]
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    data["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    data["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [
        {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return Tokenizer.from_str(json.dumps(data))


def with_parts(tokenizer, **parts):
    """The same tokenizer with other members of its tokenizer.json; those of "model" are changed one by one."""
    data = json.loads(tokenizer.to_str())
    data["model"].update(parts.pop("model", {}))
    return Tokenizer.from_str(json.dumps(data | parts))


def unigram(byte_fallback):
    """The T5 and XLM-RoBERTa shape: SentencePiece's Unigram behind a charsmap, words with U+2581."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"] + ([f"<0x{b:02X}>" for b in range(256)] if byte_fallback else [])
    trainer = trainers.UnigramTrainer(vocab_size=1500, show_progress=False, special_tokens=specials, unk_token="<unk>")
    tokenizer.train_from_iterator([MULTILINGUAL] + corpus()[2:12], trainer)
    data = json.loads(tokenizer.to_str())
    added = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    # two pieces that are written twice, and one of unknown characters, which a run of them becomes
    vocab = data["model"]["vocab"] + [["the", -3.5], data["model"]["vocab"][300], ["\u16a0\u16a1", -20.0]]
    model = {"vocab": vocab, "unk_id": 2, "byte_fallback": byte_fallback}
    normalizer = sequence("normalizers", NORMALIZERS["charsmap"], NORMALIZERS["strip-right"], REPLACE_RUNS)
    decoder = sequence("decoders", {"type": "ByteFallback"}, METASPACE) if byte_fallback else METASPACE
    post = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}
    return with_parts(tokenizer, model=model, normalizer=normalizer, decoder=decoder, post_processor=post, added_tokens=added,
                      pre_tokenizer=METASPACE if byte_fallback else sequence("pretokenizers", {"type": "WhitespaceSplit"}, METASPACE))


def words(kind):
    """The BERT shape, and whole words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]") if kind == "bert" else models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if kind == "bert" else pre_tokenizers.Whitespace()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = (trainers.WordPieceTrainer if kind == "bert" else trainers.WordLevelTrainer)(vocab_size=2000, show_progress=False, special_tokens=specials)
    tokenizer.train_from_iterator([MULTILINGUAL * 3] + corpus()[2:12], trainer)
    post = {"type": "BertProcessing" if kind == "bert" else "RobertaProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    return with_parts(tokenizer, normalizer=bert(True, True, None, kind == "bert"), decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
                      post_processor=post if kind == "bert" else post | {"trim_offsets": True, "add_prefix_space": False})


def suffixed():
    """The shape of the first GPT and of CLIP: BPE whose words end in </w>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, special_tokens=["<unk>"], end_of_word_suffix="</w>", limit_alphabet=200)
    tokenizer.train_from_iterator([MULTILINGUAL * 3] + corpus()[2:12], trainer)
    return with_parts(tokenizer, decoder={"type": "BPEDecoder", "suffix": "</w>"}, normalizer={"type": "Lowercase"})


def make(name):
    """The small tokenizer of that name, as the genuine library's object."""
    if name in ("unigram", "unigram-bytes"):
        return unigram(name == "unigram-bytes")
    if name in ("bert", "wordlevel"):
        return words(name)
    if name == "suffixed":
        return suffixed()
    bl = pre_tokenizers.ByteLevel
    if name == "gpt2":
        return trained(bl(add_prefix_space=False))
    if name == "prefix-space":
        return trained(bl(add_prefix_space=True))
    if name == "digits":
        return trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bl(add_prefix_space=False)]))
    if name == "digit-runs":
        return trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), bl(add_prefix_space=False)]))
    if name == "llama3":
        return trained(split(REGEX_LLAMA3), ignore_merges=True)
    if name == "qwen":
        return trained(split(REGEX_QWEN), normalizers.NFC())
    if name == "llama2":
        return sentencepiece_like(1500, None)
    if name == "mistral":
        return sentencepiece_like(1500, "first")
    if name == "fused-unknown":
        return sentencepiece_like(900, "always", fallback=False)
    return trained(split(REGEXES[name]), vocabulary=900)


REGEXES = {"cl100k": REGEX_CL100K, "qwen3.5": REGEX_QWEN35, "o200k": REGEX_O200K, "bloom": REGEX_BLOOM,
           "deepseek3": REGEX_DEEPSEEK3, "tiktoken": REGEX_TIKTOKEN, "word": r"\w+|\W", "edge": r"\b|\s+$", "han": r"\p{Han}+|\d+"}
SMALL = ["gpt2", "prefix-space", "digits", "digit-runs", "llama3", "qwen", "llama2", "mistral", "fused-unknown", "unigram", "unigram-bytes",
         "bert", "wordlevel", "suffixed"] + list(REGEXES)


# ---- components, one by one ----

def revealing(normalizer=None, pre_tokenizer=None, decoder=None):
    """A tokenizer whose ids tell every byte of the normalized text and where each piece begins: no character is in its vocabulary,
    and one that does not begin a piece is "##" and the character, in bytes."""
    return Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder,
        "model": {"type": "BPE", "vocab": {f"<0x{b:02X}>": b for b in range(256)}, "merges": [], "byte_fallback": True,
                  "continuing_subword_prefix": "##"}}))


def charsmap(mapping):
    """SentencePiece's compiled form of {text: text}: a double array over bytes, then the texts."""
    texts, offsets = b"", {}
    for key, value in mapping.items():
        offsets[key] = len(texts)
        texts += value.encode() + b"\0"
    trie = {}
    for key in mapping:
        node = trie
        for b in key.encode():
            node = node.setdefault(b, {})
        node[None] = offsets[key]
    units, used = {0: 0}, {0}

    def place(node, at):
        labels = [0 if label is None else label for label in node]
        # an offset of less than 2^21 is written as it is; position 0 is the root's
        base = next(b for b in range(1, 1 << 20) if all((at ^ b ^ x) not in used for x in labels))
        units[at] = units.get(at, 0) | base << 10 | (None in node) << 8
        used.update(at ^ base ^ x for x in labels)
        for label, child in node.items():
            if label is None:
                units[at ^ base] = child | 1 << 31
            else:
                units[at ^ base ^ label] = label
        for label, child in node.items():
            if label is not None:
                place(child, at ^ base ^ label)

    place(trie, 0)
    n = max(units) + 256
    return base64.b64encode(struct.pack("<I", 4 * n) + b"".join(struct.pack("<I", units.get(i, 0x1FF)) for i in range(n)) + texts).decode()


CHARSMAP = {"\t": " ", "\n": " ", "\u00a0": " ", "\ufb01": "fi", "\u00bd": "1\u20442", "\uff21": "A", "\uff21\u0301": "\u00c1", "e\u0301": "\u00e9",
            "a": "aa", "\u200d": "", "\u00ad": "", "\u3000": " ", "\u30ab\u3099": "\u30ac", "\u0600": "x", "\u0130": "I", "\r": ""}


def bert(clean, chinese, accents, lower):
    return {"type": "BertNormalizer", "clean_text": clean, "handle_chinese_chars": chinese, "strip_accents": accents, "lowercase": lower}


def sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


REPLACE_RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
FIRST = METASPACE | {"prepend_scheme": "first"}
NORMALIZERS = {t.lower(): {"type": t} for t in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")} | {
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True}, "strip-left": {"type": "Strip", "strip_left": True, "strip_right": False},
    "strip-right": {"type": "Strip", "strip_left": False, "strip_right": True},
    "replace-regex": {"type": "Replace", "pattern": {"Regex": r"\s+|b*"}, "content": "\\1_"},
    "replace-runs": REPLACE_RUNS, "prepend": {"type": "Prepend", "prepend": "▁x"}, "charsmap": {"type": "Precompiled", "precompiled_charsmap": charsmap(CHARSMAP)},
    "bert": bert(True, True, None, True), "bert-cased": bert(True, True, None, False), "bert-accents": bert(False, False, True, False),
    "bert-clean": bert(True, False, False, False),
    "sequence": sequence("normalizers", {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}),
    "empty-sequence": sequence("normalizers")}
PRE_TOKENIZERS = {t.lower(): {"type": t} for t in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "FixedLength")} | {
    f"punctuation-{b.lower()}": {"type": "Punctuation", "behavior": b} for b in ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext")} | {
    "delimiter": {"type": "CharDelimiterSplit", "delimiter": "é"}, "length": {"type": "FixedLength", "length": 3}, "metaspace": METASPACE, "metaspace-first": FIRST,
    "metaspace-legacy": {"type": "Metaspace", "replacement": "_", "add_prefix_space": False, "prepend_scheme": "never", "str_rep": "_"},
    "letters-digits": sequence("pretokenizers", {"type": "Punctuation", "behavior": "Contiguous"}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                               {"type": "Digits", "individual_digits": False}, {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False}),
    "letters-twice": sequence("pretokenizers", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
                              {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}, {"type": "Whitespace"}),
    "scripts-metaspace": sequence("pretokenizers", {"type": "UnicodeScripts"}, FIRST), "words-metaspace": sequence("pretokenizers", {"type": "WhitespaceSplit"}, METASPACE),
    "empty-sequence": sequence("pretokenizers")}
# Where a piece begins in the text decides what Metaspace first does, also behind these.
MOVING = {"strip": NORMALIZERS["strip"], "nmt": {"type": "Nmt"}, "clean": bert(True, False, False, False), "runs": REPLACE_RUNS, "prepend": NORMALIZERS["prepend"],
          "remove": {"type": "Replace", "pattern": {"String": " "}, "content": ""}, "chinese": bert(False, True, False, False), "accents": {"type": "StripAccents"},
          "charsmap": NORMALIZERS["charsmap"], "nfd": sequence("normalizers", {"type": "NFD"}, {"type": "StripAccents"}), "letters": {"type": "ByteLevel"}}
COMPONENTS = [(f"normalizer-{k}", {"normalizer": v}) for k, v in NORMALIZERS.items()] + \
    [(f"pre-{k}", {"pre_tokenizer": v}) for k, v in PRE_TOKENIZERS.items()] + \
    [(f"first-{k}", {"normalizer": v, "pre_tokenizer": FIRST}) for k, v in MOVING.items()]
POINTS = [*range(0x3400), *range(0x3400, 0x20000, 23), *range(0xA000, 0xAC00), *range(0xF900, 0x12000), *range(0x16A00, 0x17000), *range(0x1AFF0, 0x1FC00),
          *range(0x20000, 0xE0000, 997), *range(0xE0000, 0xE0200), *range(0xE0200, 0x110000, 997)]


def point_texts():
    """Most code points that are assigned, each between letters; some hundred in a text."""
    points = [chr(c) for c in POINTS if not 0xD800 <= c < 0xE000]
    for i in range(0, len(points), 200):
        yield "".join(f"a{c}e\u0301 {c}" for c in points[i:i + 200])


def mark_texts(n, seed):
    """Letters under heaps of marks, of several ages: what the normal forms sort and compose."""
    rng = random.Random(seed)
    marks = [c for c in map(chr, range(0x110000)) if unicodedata.category(c).startswith("M")] + list("\u0301\u0323\u0307\u0327\u3099\u1161\u11a8\U0001e08f") * 40
    bases = list("aeoAüǖか각ᄀ가ｶ\u0915\u0b47\u1112\U00011935") + ["ﬁ", "①", " ", ""]
    for _ in range(n):
        yield "".join(rng.choice(bases) + "".join(rng.choice(marks) for _ in range(rng.randint(0, 4))) for _ in range(rng.randint(1, 6)))


def sentencepiece_model(pieces, model_type, byte_fallback, unknown_id=0, charsmap_bytes=b""):
    """The bytes of a tokenizer.model (a protocol buffer) with pieces of (text, score, type)."""
    def varint(n):
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def text(number, data):
        return varint(number << 3 | 2) + varint(len(data)) + data

    out = b"".join(text(1, text(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind))
                   for piece, score, kind in pieces)
    trainer = varint(3 << 3) + varint(model_type) + varint(35 << 3) + varint(byte_fallback) + varint(40 << 3) + varint(unknown_id)
    return out + text(2, trainer) + text(3, text(1, b"made") + text(2, charsmap_bytes))


def write(tokenizer, directory, config=None):
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def is_nfc(text):
    return unicodedata.is_normalized("NFC", text)
