#!/usr/bin/env python3
"""Write unicode_tables.c: classes, habits, scripts and lower case of every code point, in two-stage tables.

    pip install --target DIR16 --no-deps unicodedata2==16.0.0
    pip install --target DIR17 --no-deps unicodedata2==17.0.0
    .venv/bin/python3 src/token/make_unicode.py DIR16 DIR17

The genuine tokenizer's regexes follow Unicode 16.0, what it takes from Rust's standard library (is_numeric) follows
17.0.  Python 3.11's own unicodedata, 14.0, tells which assignments are newer than the oldest PCRE2 that we build with.

Its normalizers and splitters have tables of their own, of several ages; those are had by asking it (tokenizers 0.22.2) about
one code point after the other.  Its normal forms are Unicode 9.0's, and Perl knows what that had not assigned.
"""
import importlib.util
import subprocess
import sys
import unicodedata as old
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers


def database(directory, version):
    file, = Path(directory).glob("unicodedata2*.so")
    spec = importlib.util.spec_from_file_location("unicodedata2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.unidata_version == version, module.unidata_version
    return module


new = database(sys.argv[1], "16.0.0")
rust = database(sys.argv[2], "17.0.0")
assert old.unidata_version == "14.0.0", old.unidata_version

# The order of enum UnicodeCategory in unicode.h.
CATEGORIES = "Cn Cc Cf Co Cs Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So Zl Zp Zs".split()
SPACE, IS_NEW, NUMERIC = 0x20, 0x40, 0x80
SHIFT = 7
WHITE_SPACE = {*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def unicode_class(cp):
    category = new.category(chr(cp))
    flags = SPACE if cp in WHITE_SPACE else 0
    if category != old.category(chr(cp)):
        flags |= IS_NEW
    if rust.category(chr(cp)) in ("Nd", "Nl", "No"):
        flags |= NUMERIC
    return CATEGORIES.index(category) | flags


def bert(**flags):
    return normalizers.BertNormalizer(**({"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False} | flags))


ACCENTS, CLEAN, MARKS = normalizers.StripAccents(), bert(clean_text=True), bert(strip_accents=True)
LOWER, PUNCTUATION, SCRIPTS = normalizers.Lowercase(), pre_tokenizers.Punctuation(), pre_tokenizers.UnicodeScripts()
UNASSIGNED = set(map(int, subprocess.run(
    ["perl", "-e", r'for (0..0x10ffff) { print "$_\n" if ($_ < 0xd800 || $_ > 0xdfff) && chr($_) =~ /\P{Present_In: 9.0}/ }'],
    check=True, capture_output=True, text=True).stdout.split()))


def habit(cp):
    """What the genuine normalizers and splitters do with a code point, as the bits of unicode.h."""
    if 0xD800 <= cp < 0xE000:
        return 0
    c = chr(cp)
    return sum(bit << i for i, bit in enumerate([
        cp in UNASSIGNED, ACCENTS.normalize_str(c) == "", CLEAN.normalize_str(c) == "", MARKS.normalize_str("x" + c) == "x",
        len(PUNCTUATION.pre_tokenize_str("x" + c)) == 2, LOWER.normalize_str(c) != c]))


def scripts():
    """A number for the script of each code point; 0: it never cuts."""
    def is_same(a, b):
        return len(SCRIPTS.pre_tokenize_str(a + b)) == 1

    out, first, last = [], [], 0
    for cp in range(0x110000):
        c = chr(cp) if not 0xD800 <= cp < 0xE000 else " "
        if not SCRIPTS.pre_tokenize_str(c):
            out.append(0)
            continue
        if last == 0 or not is_same(first[last - 1], c):
            last = next((i + 1 for i, a in enumerate(first) if is_same(a, c)), 0)
        if last == 0:
            first.append(c)
            last = len(first)
        out.append(last)
    assert len(first) < 256
    return out


def two_stage(name, values):
    """The lines of millm_unicode_NAME_index and _block."""
    blocks, index = {}, []
    for start in range(0, 0x110000, 1 << SHIFT):
        index.append(blocks.setdefault(tuple(values[start:start + (1 << SHIFT)]), len(blocks)))
    print(f"{name}: {len(index)} index entries, {len(blocks)} blocks", file=sys.stderr)
    yield from ["", f"const uint16_t millm_unicode_{name}index[{len(index)}] = {{", *rows(index, 24), "};", ""]
    yield f"const uint8_t millm_unicode_{name}block[{len(blocks)}][1 << MILLM_UNICODE_SHIFT] = {{"
    for block in blocks:
        yield from ["\t{", *("\t" + r for r in rows(block, 32)), "\t},"]
    yield "};"


def rows(values, per_line):
    for i in range(0, len(values), per_line):
        yield "\t" + ", ".join(map(str, values[i:i + per_line])) + ","


def main():
    lower = {cp: LOWER.normalize_str(chr(cp)) for cp in range(0x110000) if not 0xD800 <= cp < 0xE000}
    lower = {cp: text for cp, text in lower.items() if text != chr(cp)}
    assert [cp for cp, text in lower.items() if len(text) > 1] == [0x130] and lower[0x130] == "i\u0307"
    pairs = [(cp, ord(text[0])) for cp, text in lower.items()]
    out = [
        "/*",
        f" * unicode_tables.c -- properties of every code point: Unicode {new.unidata_version}, and what the genuine tokenizer does with it.",
        " *",
        " * Written by make_unicode.py; do not edit.  unicode.h says what the bits mean.",
        " */",
        '#include "unicode.h"',
        *two_stage("", [unicode_class(cp) for cp in range(0x110000)]),
        *two_stage("habit_", [habit(cp) for cp in range(0x110000)]),
        *two_stage("script_", scripts()),
        "",
        f"const size_t millm_unicode_n_lower = {len(pairs)};",
        f"const uint32_t millm_unicode_lower[{len(pairs)}][2] = {{",
        *rows([f"{{{a}, {b}}}" for a, b in pairs], 8),
        "};",
        "",
    ]
    Path(__file__).with_name("unicode_tables.c").write_text("\n".join(out))


main()
