"""`fastinfer bench serve --url`: what a client sees of a server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from server_helpers import Running, serving, wait_until_idle
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from fastinfer.bench.http_drive import ServerLoad
from fastinfer.bench.workloads import make_workload
from fastinfer.cli.main import main


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(api_keys=("sesame",)) as running:
        yield running
        wait_until_idle(running.llm)


def bench(server: Running, *options: str, out: Path) -> dict:
    arguments = ["bench", "serve", "--url", server.url, "--api-key", "sesame", *options]
    arguments += ["--num-prompts", "6", "--input-len", "12", "--output-len", "7"]
    assert main([*arguments, "--output", str(out), "--detailed"]) == 0
    return json.loads(out.read_text())


def test_every_token_is_counted(server: Running, tmp_path: Path):
    result = bench(server, "--request-rate", "50", out=tmp_path / "a.json")
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_input_tokens"] == 6 * 12 and result["total_output_tokens"] == 6 * 7
    assert result["output_lens"] == [7] * 6 and result["model_id"] == "tiny"
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"]
    assert "num_steps" not in result  # a client does not see them


def test_chat_turns_carry_the_answers_and_find_them_cached(server: Running, tmp_path: Path):
    options = ("--workload", "chat", "--turns", "3", "--max-concurrency", "2")
    result = bench(server, *options, out=tmp_path / "chat.json")
    assert result["completed"] == 18 and result["max_concurrent_requests"] <= 2
    assert sorted(result["input_lens"]) == sorted([12, 31, 50] * 6)
    cached = dict(zip(result["input_lens"], result["cached_tokens"], strict=True))
    assert cached[31] == 16 and cached[50] == 32  # all full blocks of the past


def test_sweep_over_rates(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = bench(server, "--request-rate", "20,inf", out=tmp_path / "b.json")
    assert [each["request_rate"] for each in results] == [20.0, "inf"]
    assert "TTFT p50" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(server: Running, capsys: pytest.CaptureFixture[str]):
    for arguments, sentence in (
        (["--url", server.url], "list of models"),  # no key
        (["--url", "localhost:1"], "must begin with http"),
        (["--url", "http://127.0.0.1:9"], "list of models"),
        (["--url", server.url, "--api-key", "sesame", "--served-model-name", "x"], "not 'x'"),
        ([], "--model or --url"),
    ):
        assert main(["bench", "serve", *arguments]) == 2
        assert sentence in capsys.readouterr().err


class Stranger:
    """A server without token ids, which answers every other request with an error."""

    def __init__(self) -> None:
        self.asked = 0

    async def models(self, _: object) -> JSONResponse:
        return JSONResponse({"data": [{"id": "other"}]})

    async def completions(self, request: object) -> object:
        body = await request.json()  # type: ignore[attr-defined]
        if "return_token_ids" in body:
            return JSONResponse({"error": {"message": "unknown field"}}, 400)
        self.asked += 1
        if self.asked % 2 == 0:
            return JSONResponse({"error": {"message": "busy"}}, 503)

        async def events() -> object:
            for text in ("a", "b"):
                yield f'data: {{"choices": [{{"text": "{text}"}}]}}\n\n'
            usage = {"completion_tokens": 5, "prompt_tokens": 3}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )


def test_another_server_with_coarse_deliveries_and_failures():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = uvicorn.Server(uvicorn.Config(Stranger().app(), log_level="error"))
        thread = threading.Thread(target=app.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not app.started:
            time.sleep(0.01)
        try:
            load = ServerLoad(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model=None)
            work = make_workload("random", num_requests=4, vocab_size=9, input_len=3, output_len=5)
            result = load.run(work, [0.0] * 4, max_concurrency=1)
            assert [record.failed for record in result.records] == [True, False, True, False]
            assert [r.num_output_tokens for r in result.records if not r.failed] == [5, 5]
            chat = make_workload("chat", num_requests=1, vocab_size=9, input_len=3, output_len=5)
            with pytest.raises(ValueError, match="several turns"):
                load.run(chat, [0.0])
        finally:
            app.should_exit = True
            thread.join(10)
