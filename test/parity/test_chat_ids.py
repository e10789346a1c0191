"""The ids of a chat, for each family's published tokenizer and template: those of transformers' apply_chat_template(tokenize=True).

One BOS, the template's own; and what people write is never a special token.
"""
import re

import pytest
from conftest import FIXTURES, SMOLLM2
from test_chat_templates import BYE, SYSTEM, TIME, USER, WEATHER, YO, Driver, FixedClock, call

# directory, and whether the template begins with BOS
TOKENIZERS = {"smollm2": (SMOLLM2, False), "gemma3": (FIXTURES / "gemma-3-270m", True), "qwen3": (FIXTURES / "tokenizers" / "qwen3", False),
              "llama3.1": (FIXTURES / "tokenizers" / "llama3.1", True), "deepseek-v3": (FIXTURES / "tokenizers" / "deepseek-v3", True),
              "mistral": (FIXTURES / "tokenizers" / "mistral", True), "gpt-oss": (FIXTURES / "tokenizers" / "gpt-oss", False)}
TEXTS = ["Why is the sky blue?", "", " leading and trailing \n", "na\u00efve \u2603 \u65e5\u672c\u8a9e \U0001f600\u200d\U0001f525", "def f(x):\n    return {\"a\": 'b'}[x]  # 12345\n\n\n\tend",
         "a" * 300, "\u0627\u0644\u0633\u0644\u0627\u0645 \u0928\u092e\u0938\u094d\u0924\u0947", "<b>&amp;</b> {{ x }} {% if %}"]
SHAPES = {
    "user": lambda t: {"messages": [{"role": "user", "content": t}]},
    "turns": lambda t: {"messages": [{"role": "user", "content": t}, YO, {"role": "user", "content": t + t}]},
    "system": lambda t: {"messages": [{"role": "system", "content": t}, USER, YO, BYE]},
    "tools": lambda t: {"messages": [SYSTEM, {"role": "user", "content": t}], "tools": [WEATHER, TIME]},
    "tool call": lambda t: {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": t})]},
                                         {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": t}], "tools": [WEATHER]},
}


@pytest.fixture(scope="module")
def driver():
    d = Driver()
    yield d
    d.process.stdin.close()
    assert d.process.wait(10) == 0


@pytest.fixture(scope="module", params=TOKENIZERS)
def family(request):
    """(directory, does the template write a BOS, the genuine tokenizer)"""
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    directory, has_bos = TOKENIZERS[request.param]
    assert directory.is_dir(), "run test/fixture/make"
    chat_template_utils.datetime = FixedClock
    return directory, has_bos, AutoTokenizer.from_pretrained(directory)


def test_ids(driver, family):
    directory, has_bos, genuine = family
    compared = 0
    for name, shape in SHAPES.items():
        for text in TEXTS:
            chat = shape(text)
            got = driver.chat(directory, **chat)
            if "tools" in chat and "tools" not in genuine.chat_template:
                assert got["code"] == "UNSUPPORTED" and "tools" in got["message"]  # genuine would leave them out
                continue
            try:
                want = genuine.apply_chat_template(chat["messages"], tools=chat.get("tools"), add_generation_prompt=True)
            except Exception as refusal:  # noqa: BLE001: whatever the template raises
                assert "code" in got, f"{name}, {text!r}: {refusal}"
                continue
            assert got.get("ids") == want, f"{name}, {text!r}: {got.get('message')}"
            compared += 1
            if has_bos:
                assert want[0] == genuine.bos_token_id and want.count(genuine.bos_token_id) == 1
    assert compared >= 2 * len(TEXTS)


def test_a_second_bos_would_show(driver, family):
    directory, has_bos, genuine = family
    got = driver.chat(directory, messages=[USER])
    again = genuine(got["text"]).input_ids
    adds = genuine("").input_ids
    assert again == adds + got["ids"]
    if has_bos and adds:
        assert again[:2] == [genuine.bos_token_id] * 2


def test_what_people_write_is_text(driver, family):
    """Every special token of the family inside a message: the chat has the special ids of a harmless one."""
    directory, _, genuine = family
    specials = {i: t.content for i, t in genuine.added_tokens_decoder.items() if t.special}
    assert specials

    def special_ids(text):
        got = driver.chat(directory, messages=[{"role": "user", "content": text}])
        return [i for i in got["ids"] if i in specials], got

    harmless, _ = special_ids("x")
    for at in range(0, len(specials), 40):
        attack = " ".join(["a" + s + "b" for s in list(specials.values())[at:at + 40]])
        found, got = special_ids(attack)
        assert found == harmless, attack
        # and nothing is lost: the ids are the text
        squeezed = re.sub(r"\s+", "", genuine.decode(got["ids"], clean_up_tokenization_spaces=False))
        assert re.sub(r"\s+", "", got["text"]) in (squeezed, squeezed.removeprefix("<s>"))
