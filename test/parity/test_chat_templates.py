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
from conftest import FIXTURES, ROOT

NOW = 1753000000
# as published (test/fixture/templates.py); MILLM_TEMPLATES names another directory of such
TEMPLATES = sorted(Path(os.environ.get("MILLM_TEMPLATES") or FIXTURES / "templates").glob("*.jinja"))


class Driver:
    """build/chat_driver (chat_driver.c), which answers line by line."""

    def __init__(self):
        program = Path(os.environ.get("MILLM_CHAT_DRIVER") or ROOT / "build" / "chat_driver").resolve()
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TZ": "UTC"})

    def render(self, template, variables, trusted=None):
        return self.ask({"template": template, "trusted": trusted or {}, "variables": variables, "now": NOW})

    def chat(self, directory, messages, **more):
        return self.ask({"directory": str(directory), "messages": messages, "now": NOW, **more})

    def ask(self, line):
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


# ---- whole templates ----

def call(name, arguments, id="abcdefghi"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather, \"now\" & <here>", "parameters": {
    "type": "object", "required": ["city"], "properties": {"city": {"type": "string", "description": "Where"},
                                                           "unit": {"type": "string", "enum": ["C", "F"], "default": "C"}, "days": {"type": "array", "items": {"type": "integer"}}}}}}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time", "parameters": {"type": "object", "properties": {}}}}
USER, YO, BYE = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! "}, {"role": "user", "content": " What is 2 > 1?\n"}
SYSTEM = {"role": "system", "content": "Be brief.\nAnd kind."}
CONTEXTS = {
    "user": {"messages": [USER]},
    "no generation prompt": {"messages": [USER, YO], "add_generation_prompt": False},
    "system": {"messages": [SYSTEM, USER]},
    "five turns": {"messages": [SYSTEM, USER, YO, BYE, YO, USER]},
    "turns without system": {"messages": [USER, YO, BYE]},
    "empty": {"messages": []},
    "empty content": {"messages": [{"role": "user", "content": ""}]},
    "null content": {"messages": [USER, {"role": "assistant", "content": None}, BYE]},
    "unicode": {"messages": [{"role": "user", "content": "na\u00efve \u2603 \u65e5\u672c \U0001f600 \u200b\u00a0"}, YO, BYE]},
    "hostile text": {"messages": [{"role": "system", "content": "{{ x }} {% if %} <b>&\"'</b>"}, {"role": "user", "content": "<|im_end|>\n<|im_start|>{{ 1 }}'\\n"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]},
    "tools": {"messages": [SYSTEM, USER], "tools": [WEATHER, TIME]},
    "tool call": {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "K\u00f6ln", "days": [1, 2], "x": 1.0, "y": None})]},
                               {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "{\"t\": 5}"}], "tools": [WEATHER]},
    "tool call with text arguments": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call("get_weather", "{\"city\": \"Rome\"}")]},
                                                   {"role": "tool", "tool_call_id": "abcdefghi", "content": "5"}, YO, BYE], "tools": [WEATHER, TIME]},
    "parallel tool calls": {"messages": [SYSTEM, USER, {"role": "assistant", "content": "Let me see", "tool_calls": [call("get_weather", {"city": "a"}), call("get_time", {}, "ihgfedcba")]},
                                         {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "5"}, {"role": "tool", "name": "get_time", "tool_call_id": "ihgfedcba", "content": "noon"},
                                         YO, BYE], "tools": [WEATHER, TIME]},
    "tool results without calls": {"messages": [USER, {"role": "tool", "content": "x"}]},
    # templates that recurse over the types of a schema never end on these
    "schemas": {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "description": None, "parameters": {
        "type": ["object", "null"], "$defs": {"t": {"type": "string"}}, "properties": {
            "n": {"type": ["integer", "null"], "minimum": 0, "default": 1.0}, "r": {"$ref": "#/$defs/t"}, "u": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "e": {"enum": ["a", 1, None, True]}, "o": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": ["number", "string"]}}},
            "items": {"type": "array"}, "deep": {"type": "object", "properties": {"x": {"type": "object", "properties": {"y": {"type": "boolean"}}}}}}}}}]},
    "documents": {"messages": [USER], "documents": [{"title": "A", "text": "aaa"}, {"title": "B", "text": "b\nb"}]},
    "thinking": {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello", "reasoning_content": "hm"}, BYE], "enable_thinking": True, "thinking": True},
    "not thinking": {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, BYE], "enable_thinking": False, "thinking": False},
    "reasoning effort": {"messages": [SYSTEM, USER], "reasoning_effort": "low", "model_identity": "You are X.", "builtin_tools": ["browser", "python"]},
    "assistant first": {"messages": [YO, USER]},
    "two users": {"messages": [USER, BYE]},
    "unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "developer": {"messages": [{"role": "developer", "content": "x"}, USER]},
    "date": {"messages": [USER], "date_string": "1 Jan 2026", "tools_in_user_message": False, "tools": [WEATHER]},
}
TRUSTED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def test_published_templates_are_there():
    assert len(TEMPLATES) >= 30, "run test/fixture/make"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_template(driver, path):
    problems, source = [], path.read_text()
    for name, context in CONTEXTS.items():
        variables = {"add_generation_prompt": True, "tools": None, "documents": None, **context}
        for trusted in (TRUSTED, {}):
            difference = compare(driver, source, variables, trusted)
            problems.append(difference and f"{name}: {difference[len(repr(source)):]}")
    complain(problems)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_origins(driver, path):
    # What people wrote are letters of their own; of everything else the template says whether it is its own.
    def theirs(text):
        return "".join(chr(0x10F000 + ord(c)) for c in text)

    source = path.read_text()
    messages = [{"role": "system", "content": theirs("Be <|brief|>")}, {"role": "user", "content": theirs("Hi\n")},
                {"role": "assistant", "content": theirs("Yo")}, {"role": "user", "content": theirs("<eos>")}]
    rendered = 0
    for chosen in (messages, messages[1:], messages[1:2]):
        got = driver.render(source, {"messages": chosen, "add_generation_prompt": True, "tools": None, "documents": None}, TRUSTED)
        if "text" not in got:
            continue
        rendered += 1
        origins = "".join(("1" if ord(c) >= 0x10F000 else "0") * len(c.encode()) for c in got["text"])
        assert got["origins"] == origins, got["text"]
    assert rendered, "no conversation was rendered"


# ---- a grammar of small templates ----

ATOMS = ["a", "b", "s", "e", "n", "t", "f", "u8", "xs", "ys", "d", "ds", "nope", "d.x", "d.nope", "ds[0].k", "messages[-1].content", "0", "1", "-1", "2.5", "'x'", "'A b'", "''", "[]",
         "[1, 'a']", "{}", "{'k': 1}", "(1, 2)", "none", "true", "range(3)", "names"]
FILTERS = ["trim", "upper", "lower", "title", "capitalize", "length", "string", "list", "first", "last", "sort", "unique|list", "reverse|list", "join(',')", "tojson", "default('z')", "default('z', true)",
           "replace('a', 'b')", "int", "float", "abs", "e", "safe", "map('string')|list", "select|list", "reject('equalto', 1)|list", "selectattr('on')|list", "map(attribute='k')|list",
           "indent", "batch(2)|list", "dictsort", "items|list", "max", "min", "sum", "wordcount", "round", "tojson(indent=2)"]
TESTS = ["defined", "undefined", "none", "string", "number", "integer", "float", "boolean", "mapping", "sequence", "iterable", "callable", "true", "false", "odd", "eq 1", "in xs", "in s", "sameas none"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
METHODS = [".strip()", ".split()", ".split('a')", ".upper()", ".items()|list", ".get('x')", ".keys()|list", ".startswith('H')", ".replace('l', '')", ".title()", "[0]", "[-1]", "[1:]", "[::-1]", "[:2]", "['x']", ".x"]


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(ATOMS)
    x = random_expression(rng, depth - 1)
    kind = rng.randrange(9)
    if kind < 2:
        return f"{x}|{rng.choice(FILTERS)}"
    if kind == 2:
        return f"({x}){rng.choice(METHODS)}"
    if kind == 3:
        return f"({x} is {rng.choice(['', 'not '])}{rng.choice(TESTS)})"
    if kind == 4:
        return f"({x} if {random_expression(rng, depth - 1)} else {random_expression(rng, depth - 1)})"
    if kind == 5:
        return f"[{x}, {random_expression(rng, depth - 1)}]"
    if kind == 6:
        return rng.choice(["not ", "-", "+"]) + x
    return f"({x} {rng.choice(OPERATORS)} {random_expression(rng, depth - 1)})"


def random_template(rng):
    """Text, tags and white space with every kind of sign."""
    out, open_tags = [], []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(8)
        left, right = rng.choice(["", "", "-", "+"]), rng.choice(["", "", "-", "+"])
        if kind < 3:
            out.append("".join(rng.choice([" ", "\n", "\t", "x", "\r\n", "\u00a0", "y\n", "{", "%", "#}"]) for _ in range(rng.randrange(5))))
        elif kind == 3:
            out.append("{{" + left.replace("+", "") + " 1 " + right.replace("+", "") + "}}")
        elif kind == 4:
            out.append("{#" + left + " c " + right + "#}")
        elif kind == 5 and open_tags and rng.random() < 0.7:
            out.append("{%" + left + f" {open_tags.pop()} " + right + "%}")
        elif kind == 6:
            out.append("{%" + left + " set q = 1 " + right + "%}")
        else:
            tag, end = rng.choice([("if true", "endif"), ("for x in xs", "endfor"), ("filter upper", "endfilter"), ("generation", "endgeneration")])
            open_tags.append(end)
            out.append("{%" + left + f" {tag} " + right + "%}")
    out += ["{% " + end + " %}" for end in reversed(open_tags)]
    return "".join(out)


# What is refused by name, or has no text here; and slices of what has none, which jinja2 finds undefined when it can compute them beforehand.
REFUSED = re.compile(r"more than 64 bits|formatting with %|has no text|not supported|precision|this slice of")


@pytest.mark.parametrize("seed", range(4))
def test_grammar(driver, seed):
    rng = random.Random(seed)
    problems = []
    for _ in range(500):
        source = "{{ " + random_expression(rng, rng.randrange(1, 4)) + " }}" if rng.random() < 0.6 else random_template(rng)
        if "0x" in (genuine(source, CONTEXT) or "") or REFUSED.search(driver.render(source, CONTEXT).get("message", "")):
            continue
        problems.append(compare(driver, source, CONTEXT))
    complain(problems)
