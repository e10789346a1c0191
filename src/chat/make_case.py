#!/usr/bin/env python3
"""Write case_table.h: the characters whose upper or title case is more than one character (Python's str methods)."""
import sys
import unicodedata
from pathlib import Path


def row(c):
    fields = [[ord(x) for x in s] + [0] * (3 - len(s)) for s in (c.upper(), c.title())]
    return "\t{0x%04X, {%s}, {%s}}," % (ord(c), *(", ".join("0x%04X" % x if x else "0" for x in f) for f in fields))


special = [chr(cp) for cp in range(0x110000) if not 0xD800 <= cp < 0xE000 and max(len(chr(cp).upper()), len(chr(cp).title())) > 1]
Path(__file__).with_name("case_table.h").write_text("\n".join([
    "/* case_table.h -- written by make_case.py from Unicode %s; do not edit. */" % unicodedata.unidata_version,
    "static const SpecialCase special_cases[] = {", *map(row, special), "};", ""]))
print(len(special), file=sys.stderr)
