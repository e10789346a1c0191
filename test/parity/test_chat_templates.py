"""src/chat beside the genuine jinja2, set up as transformers sets it up: the same text, byte for byte, or both refuse."""
import datetime
import functools
import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from chat_cases import CONTEXT, EXPRESSIONS, STATEMENTS, UNSUPPORTED
from conftest import ROOT

NOW = 1753000000
TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))


class Driver:
    """build/chat_driver (chat_driver.c), which answers line by line."""

    def __init__(self):
        program = Path(os.environ.get("MILLM_CHAT_DRIVER") or ROOT / "build" / "chat_driver").resolve()
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TZ": "UTC"})

    def render(self, template, variables, trusted=None):
        line = {"template": template, "trusted": trusted or {}, "variables": variables, "now": NOW}
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the driver died"
        return json.loads(answer)


@pytest.fixture(scope="module")
def driver():
    d = Driver()
    yield d
    d.process.stdin.close()
    assert d.process.wait(10) == 0


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls):
        return cls.fromtimestamp(NOW, datetime.timezone.utc).replace(tzinfo=None)


@functools.lru_cache(maxsize=None)
def compiled(template):
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = FixedClock
    return chat_template_utils._compile_jinja_template(template)


def genuine(template, variables, trusted=None):
    """The text, or None when jinja2 refuses."""
    try:
        return compiled(template).render(**{**(trusted or {}), **variables})
    except Exception:  # noqa: BLE001: whatever a template can make Python raise
        return None


def compare(driver, template, variables, trusted=None):
    want = genuine(template, variables, trusted)
    got = driver.render(template, variables, trusted)
    if got.get("text") == want and ("text" in got or got["code"] in ("INVALID_ARGUMENT", "INVALID_MODEL_FILE", "UNSUPPORTED")):
        return None
    return f"{template!r}\n   jinja2 {want!r}\n   millm  {got.get('text', got)!r}"


def complain(problems):
    problems = [p for p in problems if p]
    assert not problems, f"{len(problems)} differ:\n" + "\n".join(problems[:20])


def expressions():
    # one a piece between " ; ", lines likewise; a newline inside quotes is part of its expression
    for chunk in re.split(r" ; |\n(?=\S)(?!b')(?! )", EXPRESSIONS.strip("\n")):
        yield chunk


def test_expressions(driver):
    cases = list(expressions())
    assert len(cases) > 700
    skipped = set(unsupported_expressions())
    complain(compare(driver, "{{ " + e + " }}", CONTEXT) for e in cases if e not in skipped)


def unsupported_expressions():
    """Python has no limit for integers, and prints what has no text with its address."""
    return ["12345678901234567890123", "9223372036854775807 + 1", "2 ** 64", "10 ** 400", "(-8) ** 0.5", "d.items", "s.format", "'x'.join", "a.real"]


def test_truth_of_expressions(driver):
    # jinja2 writes a constant that is infinite into its Python as the name inf, which is not there
    skipped = {*unsupported_expressions(), "'inf'|float", "'nan'|float", "1e400", "1e308 * 10"} - {"d.items", "s.format", "'x'.join"}
    complain(compare(driver, "{% if " + e + " %}yes{% else %}no{% endif %}", CONTEXT) for e in expressions()
             if e not in skipped and " if " not in e and "," not in e)


def test_statements(driver):
    complain(compare(driver, s, CONTEXT) for s in STATEMENTS)


@pytest.mark.parametrize("template", UNSUPPORTED)
def test_unsupported_is_refused_by_name(driver, template):
    got = driver.render(template, CONTEXT)
    assert got["code"] in ("UNSUPPORTED", "INVALID_ARGUMENT"), got
