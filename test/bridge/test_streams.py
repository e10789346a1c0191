"""Two hundred streams at once, readers that do not read, and what the bridge holds meanwhile."""
import asyncio
import json
import socket
import time

import httpx
import openai
import pytest
from harness import PATIENCE, Bridge

N = 200


@pytest.fixture(scope="module")
def wide(cluster, keys):
    """As many connections as streams: all of them are under way at once."""
    bridge = Bridge(cluster, "wide", pool_size=N + 20)
    yield bridge
    assert bridge.stop() == 0


@pytest.fixture(scope="module")
def narrow(cluster, keys):
    """The pool as it is by default: most of them wait in the bridge."""
    bridge = Bridge(cluster, "narrow", queue_size=N)
    yield bridge
    assert bridge.stop() == 0


def prompt(i):
    return [{"role": "user", "content": f"Tell me about the number {i} and {i * i}."}]


@pytest.fixture(scope="module")
def expected(cluster):
    """What SQL gives, one after the other."""
    cluster.load("tiny-chat")
    with cluster.connect() as db:
        return [db.execute("SELECT millm.chat(%s::jsonb, max_tokens => 24, temperature => 1, seed => %s) ->> 'text'", [json.dumps(prompt(i)), i]).fetchone()[0] for i in range(N)]


async def genuine(bridge, key):
    """All at once through the openai client: the texts."""
    http_client = httpx.AsyncClient(limits=httpx.Limits(max_connections=N), timeout=PATIENCE)
    async with openai.AsyncOpenAI(base_url=f"{bridge.url}/v1", api_key=key, max_retries=0, http_client=http_client) as client:
        async def one(i):
            stream = await client.chat.completions.create(model="tiny-chat", messages=prompt(i), max_tokens=24, temperature=1, seed=i, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return await asyncio.gather(*(one(i) for i in range(N)))


def request(key, i, tokens):
    body = json.dumps({"model": "tiny-chat", "messages": prompt(i), "max_tokens": tokens, "temperature": 1, "seed": i, "stream": True})
    # HTTP/1.0: a stream without chunks, ended by the connection's end
    return (f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()


def text_of(answer):
    events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: ")]
    assert events and events[-1] == b"[DONE]", answer[-500:]
    return "".join(json.loads(e)["choices"][0]["delta"].get("content") or "" for e in events[:-1])


async def bare(bridge, key):
    """The same over bare sockets: the client's own work is small."""
    async def one(i):
        reader, writer = await asyncio.open_connection("127.0.0.1", bridge.port)
        writer.write(request(key, i, 24))
        answer = await reader.read()
        writer.close()
        return text_of(answer)
    return await asyncio.gather(*(one(i) for i in range(N)))


class SlowReader:
    """A stream of thousands of tokens over a connection whose window is small, which nobody reads until read()."""

    def __init__(self, bridge, key, seed, tokens):
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", bridge.port))
        self.sock.sendall(request(key, seed, tokens))

    def read(self):
        """The text, of all that has come and will come."""
        answer = b""
        while piece := self.sock.recv(1 << 20):
            answer += piece
        return text_of(answer)


@pytest.mark.parametrize("which, streams", [("wide", genuine), ("wide", bare), ("narrow", bare)])
def test_two_hundred(which, streams, request, keys, expected):
    bridge = request.getfixturevalue(which)
    before = bridge.rss_kb()
    begin = time.monotonic()
    texts = asyncio.run(streams(bridge, keys["user"]))
    took = time.monotonic() - begin
    lost = [i for i in range(N) if texts[i] != expected[i]]
    assert not lost, f"{len(lost)} of {N} differ, the first: {lost[0]}: {texts[lost[0]]!r}, expected {expected[lost[0]]!r}"
    print(f"{N} streams of 24 tokens, {streams.__name__} client, {which} pool: {took:.2f} s; the bridge has {bridge.rss_kb()} kB, {bridge.rss_kb() - before:+} kB")
    assert bridge.rss_kb() - before < 16 * 1024


def test_slow_readers(wide, keys, cluster, expected):
    """Ten that do not read: the two hundred others do not notice, the bridge does not store what the ten leave, and these lose nothing."""
    begin = time.monotonic()
    asyncio.run(bare(wide, keys["user"]))
    alone = time.monotonic() - begin
    before = wide.rss_kb()
    slow = [SlowReader(wide, keys["user"], seed, 6000) for seed in range(10)]  # some 1.5 MB each
    time.sleep(1)
    begin = time.monotonic()
    assert asyncio.run(bare(wide, keys["user"])) == expected
    beside = time.monotonic() - begin
    grown = wide.rss_kb() - before
    print(f"{N} streams alone {alone:.2f} s, beside ten that do not read {beside:.2f} s; the bridge grew by {grown} kB")
    assert grown < 16 * 1024
    assert beside < 20 * alone + 1
    for seed, reader in enumerate(slow):
        assert reader.read() == cluster.call("chat", messages=prompt(seed), max_tokens=6000, temperature=1.0, seed=seed)["text"]
    cluster.wait_idle()
