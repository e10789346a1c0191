#!/usr/bin/env python3
"""Write unicode_tables.c: the class of every code point, in a two-stage table.

    pip install --target DIR16 --no-deps unicodedata2==16.0.0
    pip install --target DIR17 --no-deps unicodedata2==17.0.0
    python3.11 src/token/make_unicode.py DIR16 DIR17

The genuine tokenizer's regexes follow Unicode 16.0, what it takes from Rust's standard library (is_numeric) follows
17.0.  Python 3.11's own unicodedata, 14.0, tells which assignments are newer than the oldest PCRE2 that we build with.
"""
import importlib.util
import sys
import unicodedata as old
from pathlib import Path


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


def rows(values, per_line):
    for i in range(0, len(values), per_line):
        yield "\t" + ", ".join(map(str, values[i:i + per_line])) + ","


def main():
    classes = [unicode_class(cp) for cp in range(0x110000)]
    blocks, index = {}, []
    for start in range(0, 0x110000, 1 << SHIFT):
        index.append(blocks.setdefault(tuple(classes[start:start + (1 << SHIFT)]), len(blocks)))
    assert len(blocks) < 65536
    out = [
        "/*",
        f" * unicode_tables.c -- the class of every code point: Unicode {new.unidata_version}.",
        " *",
        " * Written by make_unicode.py; do not edit.  unicode.h says what the bits mean.",
        " */",
        '#include "unicode.h"',
        "",
        f"const uint16_t millm_unicode_index[{len(index)}] = {{",
        *rows(index, 24),
        "};",
        "",
        f"const uint8_t millm_unicode_block[{len(blocks)}][1 << MILLM_UNICODE_SHIFT] = {{",
    ]
    for block in blocks:
        out += ["\t{", *("\t" + r for r in rows(block, 32)), "\t},"]
    out += ["};", ""]
    Path(__file__).with_name("unicode_tables.c").write_text("\n".join(out))
    print(f"{len(index)} index entries, {len(blocks)} blocks", file=sys.stderr)


main()
