"""LangChain's ChatOpenAI and OpenAIEmbeddings."""
import array
import asyncio

import openai
import pytest
from harness import PATIENCE
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

TALK = [SystemMessage("Be brief."), HumanMessage("Hi there")]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]


@pytest.fixture
def options(bridge, keys, tiny):
    return dict(model=tiny, base_url=f"{bridge.url}/v1", api_key=keys["user"], max_retries=0, timeout=PATIENCE)


@pytest.fixture
def chat(options):
    return ChatOpenAI(**options, temperature=1, seed=5, max_tokens=16)


@pytest.fixture
def expected(cluster, tiny):
    return cluster.call("chat", messages=MESSAGES, temperature=1.0, seed=5, max_tokens=16)


def test_invoke(chat, expected):
    reply = chat.invoke(TALK)
    assert reply.content == expected["text"]
    assert reply.response_metadata["finish_reason"] == "length"
    assert (reply.usage_metadata["input_tokens"], reply.usage_metadata["output_tokens"]) == (expected["usage"]["prompt_tokens"], 16)


def test_stream(chat, expected):
    chunks = list(chat.stream(TALK, stream_usage=True))
    assert "".join(c.content for c in chunks) == expected["text"] and len(chunks) > 3
    assert sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks) == 16


def test_batch(chat, expected):
    assert [r.content for r in chat.batch([TALK] * 6)] == [expected["text"]] * 6


def test_async(chat, expected):
    async def both():
        return (await chat.ainvoke(TALK)).content, "".join([c.content async for c in chat.astream(TALK)])
    assert asyncio.run(both()) == (expected["text"], expected["text"])


def test_bound_arguments(options, cluster):
    text = ChatOpenAI(**options, temperature=0, max_tokens=40).invoke(TALK).content
    assert ChatOpenAI(**options, temperature=0, max_tokens=40).bind(stop=[text[8:10]]).invoke(TALK).content == text[:text.index(text[8:10])]
    logprobs = ChatOpenAI(**options, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2).invoke(TALK).response_metadata["logprobs"]["content"]
    assert [len(e["top_logprobs"]) for e in logprobs] == [2, 2, 2, 2]


def test_error(options):
    with pytest.raises(openai.BadRequestError, match="not loaded"):
        ChatOpenAI(**options | {"model": "no-such-model"}).invoke(TALK)


def test_embeddings(options, cluster):
    # without check_embedding_ctx_length=False it sends token ids of OpenAI's own tokenizer
    embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    texts = ["x", "The quick brown fox"]
    expected = [array.array("f", v) for v in cluster.rows("embed", texts=texts)]
    assert [array.array("f", v) for v in embeddings.embed_documents(texts)] == expected
    assert array.array("f", embeddings.embed_query("x")) == expected[0]
