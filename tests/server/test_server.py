"""What a server meets: broken and large bodies, clients that leave or do not read, full queues."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from server_helpers import MODEL, Running, serving, wait_until_idle

from fastinfer.server import protocol
from fastinfer.server.exposition import Histogram
from fastinfer.server.limits import LimitRate

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(max_body_bytes=20_000, max_requests=64, stall_timeout=1.0) as running:
        yield running
        wait_until_idle(running.llm)


def post(server: Running, body: object, path: str = "/v1/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, timeout=60)


def send_raw(server: Running, body: dict) -> socket.socket:
    """A connection with the request written and nothing read."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
        % (len(data), data)
    )
    return connection


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"prompt": "x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 9000],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_bodies(server: Running, body: bytes, path: str):
    answer = post(server, body, path)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and "Traceback" not in error["message"]


def test_unknown_paths_and_methods(server: Running):
    assert httpx.get(server.url + "/v2/completions").status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    assert "error" in httpx.get(server.url + "/nothing").json()


def test_large_bodies_are_refused_with_and_without_their_length(server: Running):
    large = json.dumps({"prompt": "x" * 30_000}).encode()
    assert post(server, large).status_code == 413

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    answer = httpx.post(server.url + "/v1/completions", content=pieces(), timeout=60)
    assert answer.status_code == 413 and "20000 bytes" in answer.json()["error"]["message"]
    assert post(server, SHORT).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(server: Running):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{"
        )
        connection.settimeout(20)
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]
    assert post(server, SHORT).status_code == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stop": "x" * 1025}, "stop"),
        ({"stop": ["a", "x" * 1025]}, "stop"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"prompt": ["a"] * 100, "n": 6}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"top_k": "9" * 9000}, "top_k"),
        ({"x" * 9000: 1}, "x" * 80),
    ],
)
def test_no_request_asks_for_too_much_and_no_error_repeats_it(
    server: Running, more: dict, param: str
):
    answer = post(server, {**SHORT, **more})
    assert answer.status_code == 400 and len(answer.content) < 1500
    assert answer.json()["error"]["param"] == param


FIELDS = sorted(protocol._COMPLETION | protocol._CHAT | protocol._IGNORED | {"no_such_field"})
VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        129,
        2**31,
        2**63,
        2**64,
        2**100,
        -(2**70),
        0.5,
        1e-300,
        1e308,
    ),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "tiny", "\ud800", "\0", "a" * 3000),
    *([], [0], [1, 2], [-1], [2**70], ["a"], ["a"] * 20, [[1, 2], [3]], [[]], [None], [True]),
    *({}, {"a": 1}, {"type": "text"}, {"include_usage": True}, {"messages": 1}, {"limits": 2}),
    *([{"role": "user", "content": text}] for text in ("hi", None, 5, [{"type": "text"}])),
]


def test_whatever_a_body_holds_is_served_or_refused(server: Running):
    rng = random.Random(0)
    codes = set()
    for i in range(400):
        path = ("/v1/completions", "/v1/chat/completions")[i % 2]
        body: dict[str, object] = {"max_tokens": 3}
        body.update(({"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]})[i % 2])
        body.update((rng.choice(FIELDS), rng.choice(VALUES)) for _ in range(rng.randint(1, 3)))
        answer = post(server, body, path)
        codes.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        assert "server_error" not in answer.text, (body, answer.text)
    assert codes >= {200, 400}


@pytest.mark.parametrize("value", [1.5, "1", True, 10**9, [1]])
def test_a_priority_is_a_whole_number(server: Running, value: object):
    answer = post(server, {**SHORT, "priority": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"
    assert post(server, {**SHORT, "priority": None}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_priority_comes_before_arrival(path: str):
    prompt = {"prompt": "Once"}
    if path.endswith("chat/completions"):
        prompt = {"messages": [{"role": "user", "content": "Once"}]}
    ended: list[int] = []

    async def ask(http: httpx.AsyncClient, url: str, priority: int, length: int) -> None:
        body = {**prompt, "max_tokens": length, "ignore_eos": True, "priority": priority}
        answer = await http.post(url + path, json=body)
        assert answer.status_code == 200
        ended.append(priority)

    async def all_of_them(server: Running) -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            tasks = [asyncio.create_task(ask(http, server.url, -9, 400))]
            while server.llm.stats().running == 0:
                await asyncio.sleep(0.01)
            for count, priority in enumerate((5, 0, -3), start=2):
                tasks.append(asyncio.create_task(ask(http, server.url, priority, 4)))
                while server.llm.num_requests < count:
                    await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)

    with serving(engine={"max_num_seqs": 1}) as server:
        asyncio.run(all_of_them(server))
        wait_until_idle(server.llm)
    assert ended == [-9, -3, 0, 5]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: Running, stream: bool):
    connections = [send_raw(server, {**LONG, "stream": stream}) for _ in range(5)]
    deadline = time.monotonic() + 20
    while server.llm.num_requests < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.llm.num_requests == 5
    for connection in connections:
        connection.close()
    left = time.monotonic()
    wait_until_idle(server.llm)
    assert time.monotonic() - left < 5  # long before 900 tokens
    assert post(server, SHORT).status_code == 200


def test_a_client_that_does_not_read_does_not_hold_up_others(server: Running):
    # Many log-probabilities fill the buffers of a connection; then the stall limit ends it.
    body = {**LONG, "stream": True, "logprobs": 100, "n": 8, "temperature": 1}
    lazy = send_raw(server, body)
    assert post(server, SHORT).json()["usage"]["completion_tokens"] == 4
    wait_until_idle(server.llm, 60)
    lazy.close()


def test_more_requests_than_allowed_get_503():
    with serving(max_requests=2) as server:
        held = [send_raw(server, {**LONG, "stream": True}) for _ in range(2)]
        while server.llm.num_requests < 2:
            time.sleep(0.01)
        answer = post(server, SHORT)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        for connection in held:
            connection.close()
        wait_until_idle(server.llm)
        assert post(server, {**SHORT, "prompt": ["a", "b"]}).status_code == 200
        assert post(server, {**SHORT, "prompt": ["a", "b", "c"]}).status_code == 503  # all or none
        wait_until_idle(server.llm)


def test_request_timeout_ends_the_request():
    with serving(request_timeout=0.05) as server:
        assert post(server, LONG).status_code == 504
        streamed = post(server, {**LONG, "stream": True})
        assert streamed.status_code == 200 and "timeout_error" in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        wait_until_idle(server.llm)


def test_rate_limit():
    with serving(requests_per_minute=3) as server:
        codes = [post(server, SHORT).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        # nobody asked for a key: another one every time is still the same client
        headers = {"authorization": "Bearer another"}
        answer = httpx.post(server.url + "/v1/completions", json=SHORT, headers=headers)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert httpx.get(server.url + "/health").status_code == 200
        wait_until_idle(server.llm)


def test_rate_limit_fills_up_with_time():
    now = [0.0]
    limit = LimitRate(None, 6, by_key=False, clock=lambda: now[0])  # type: ignore[arg-type]
    assert [limit._take("a") for _ in range(6)] == [0.0] * 6
    assert limit._take("a") == pytest.approx(10.0)
    assert limit._take("b") == 0.0
    now[0] = 10.5
    assert limit._take("a") == 0.0
    assert limit._take("a") == pytest.approx(9.5)


def test_health_and_metrics(server: Running):
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    before = metric(server, "generation_tokens_total")
    post(server, SHORT)
    assert metric(server, "generation_tokens_total") == before + 4
    assert metric(server, "requests_open") == 0
    text = httpx.get(server.url + "/metrics").text
    assert 'fastinfer_http_responses_total{path="/v1/completions",status="200"}' in text
    for line in text.splitlines():
        assert line.startswith("#") or len(line.rsplit(" ", 1)) == 2
    server.llm.failed_steps = 3
    assert httpx.get(server.url + "/health").status_code == 503
    server.llm.failed_steps = 0


def metric(server: Running, name: str) -> float:
    for line in httpx.get(server.url + "/metrics").text.splitlines():
        if line.startswith(f"fastinfer_{name} "):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(name)


def test_a_failed_step_is_said_without_details():
    with serving() as server:
        runner = server.llm.llm.core.runner
        step = runner.step

        def failing(plan: object) -> object:
            runner.step = step
            raise RuntimeError("secret detail in /some/path.py")

        runner.step = failing
        answer = post(server, SHORT)
        assert answer.status_code == 500 and "secret" not in answer.text
        assert post(server, SHORT).status_code == 200
        wait_until_idle(server.llm)


def test_an_engine_that_has_stopped_is_said():
    with serving() as server:
        server.llm.close()
        answer = post(server, SHORT)
        assert answer.status_code == 503 and "stopped" in answer.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 503


def test_speculation_is_counted():
    engine = {"speculative": str(MODEL.parent / "draft"), "adaptive_speculation": False}
    with serving(engine=engine) as server:
        post(server, {**SHORT, "max_tokens": 30, "ignore_eos": True})
        drafts, accepted = (
            metric(server, "draft_tokens_total"),
            metric(server, "accepted_tokens_total"),
        )
        assert drafts > accepted > 0
        assert 1 + accepted / metric(server, "draft_checks_total") > 1.5  # tokens per check
        wait_until_idle(server.llm)


def test_histogram():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0, None):
        histogram.observe(value)
    lines = histogram.lines("x", "A value.")
    assert lines[2:] == [
        'x_bucket{le="1.0"} 2',
        'x_bucket{le="2.0"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 12",
        "x_count 4",
    ]


def crowd(server: Running, clients: int, seed: int) -> tuple[int, int]:
    """Streams at once, a third of which leave at random; (complete ones, those that left)."""

    async def one(client: httpx.AsyncClient, i: int) -> bool:
        leaves = (i * 7919 + seed) % 3 == 0
        body = {**SHORT, "max_tokens": 20, "ignore_eos": True, "stream": True, "seed": i}
        tokens = 0
        async with client.stream("POST", server.url + "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return True
                if line.startswith("data:"):
                    data = json.loads(line[5:])
                    assert "error" not in data
                    tokens += 1
                    if leaves and tokens > (i * 31 + seed) % 5:
                        return False
        raise AssertionError("the stream ended without its end")

    async def everybody() -> list[bool]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            return await asyncio.gather(*(one(client, i) for i in range(clients)))

    results = asyncio.run(everybody())
    return sum(results), len(results) - sum(results)


def test_a_crowd_with_random_disconnects():
    with serving(engine={"max_num_seqs": 64, "num_blocks": 400}) as server:
        complete, left = crowd(server, 120, seed=1)
        assert (complete, left) == (80, 40)
        wait_until_idle(server.llm)


@pytest.mark.full
def test_a_thousand_streams_with_random_disconnects():
    with serving(engine={"max_num_seqs": 256, "num_blocks": 1200}) as server:
        for seed in range(2):
            complete, left = crowd(server, 1000, seed=seed)
            assert complete + left == 1000 and left > 300
            wait_until_idle(server.llm)
