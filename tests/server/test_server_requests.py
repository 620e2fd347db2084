"""Requests that only JSON can hold, that cost much, or that quote names of this machine."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import server_helpers
from server_helpers import Running, serving, wait_until_idle

from fastinfer.engine.outputs import CompletionOutput, Logprob, RequestOutput
from fastinfer.server.responses import Reply

PROMPT = {"prompt": "Once upon a time", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running
        wait_until_idle(running.llm)


def ask(server: Running, body: dict, **headers: str) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    # ascii, so that half a surrogate pair is sent as an escape
    return httpx.post(
        server.url + path, content=json.dumps(body).encode(), headers=headers, timeout=60
    )


@pytest.mark.parametrize(
    "body",
    [
        {**PROMPT, "temperature": 10**400},
        {**PROMPT, "top_p": -(10**400)},
        {**PROMPT, "\ud800": 1},
        {**PROMPT, "prompt": "\ud800"},
        {**CHAT, "messages": [{"role": "\ud800", "content": "x"}]},
        {**CHAT, "chat_template_kwargs": {"self": 1}},
        {**CHAT, "chat_template_kwargs": {"tokenizer": 1}},
    ],
)
def test_what_cannot_be_served_is_the_fault_of_the_request(server: Running, body: dict):
    answer = ask(server, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_as_many_stops_as_allowed(server: Running):
    body = {**PROMPT, "stop": ["x" * 1024] * 16, "stop_token_ids": [1] * 1024, "n": 8}
    assert len(ask(server, body).json()["choices"]) == 8


def test_rate_limit_goes_by_key_where_they_are_checked():
    with serving(requests_per_minute=1, api_keys=("a", "b")) as server:
        codes = [ask(server, PROMPT, authorization=f"Bearer {key}").status_code for key in "abax"]
        assert codes == [200, 200, 429, 401]
        wait_until_idle(server.llm)


@pytest.mark.parametrize(("folder", "model"), [("", "."), ("..", "model")])
def test_a_short_path_of_the_model_changes_no_sentence(
    folder: str, model: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(server_helpers.MODEL) / folder)
    monkeypatch.setattr(server_helpers, "MODEL", model)
    with serving() as server:
        errors = [ask(server, {**PROMPT, name: -0.5}) for name in ("temperature", "model")]
        sentences = [error.json()["error"]["message"] for error in errors]
        assert sentences[0] == "temperature must be >= 0, got -0.5"
        assert sentences[1] == "model must be one of tiny, got -0.5"


def test_log_probabilities_hold_the_bytes_of_a_part_of_a_character():
    entries = [{7: Logprob(-0.5, 1, "\ufffd")}, {8: Logprob(-0.25, None, "x")}]
    completion = CompletionOutput(0, "x", [7, 8], logprobs=entries)
    output = RequestOutput("0", None, [1], [completion], finished=True)
    reply = Reply("m", chat=True, n=1, token_bytes={7: b"\xf0\x9f", 8: b"x"}.__getitem__)
    content = reply.whole([output], [""])["choices"][0]["logprobs"]["content"]
    assert [each["bytes"] for each in content] == [[0xF0, 0x9F], [0x78]]
    assert content[0]["top_logprobs"][0]["bytes"] == [0xF0, 0x9F]


def test_nobody_passes_for_another_address():
    with serving(requests_per_minute=2) as server:
        codes = [
            httpx.post(
                server.url + "/v1/completions",
                json=PROMPT,
                headers={"x-forwarded-for": f"10.0.0.{i}"},
                timeout=60,
            ).status_code
            for i in range(3)
        ]
        assert codes == [200, 200, 429]
        wait_until_idle(server.llm)


@pytest.mark.parametrize("http", [None, "h11"])
def test_headers_are_limited(http: str | None):
    with serving(http=http) as server:
        for size, wanted in ((70_000, b"400"), (30_000, b"200")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: ")
                with contextlib.suppress(OSError):  # refused before the end
                    for _ in range(size // 5000):
                        connection.sendall(b"a" * 5000)
                        time.sleep(0.01)
                    connection.sendall(b"\r\n\r\n")
                assert connection.recv(4096).split(b" ")[1] == wanted
        wait_until_idle(server.llm)
