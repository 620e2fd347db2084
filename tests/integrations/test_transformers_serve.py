"""`transformers serve` with continuous batching on fastinfer's attention."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import fastinfer

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples/tiny/model")


def request(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.full), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_chat_completions(device: str, tmp_path: Path) -> None:
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package, reason="needs transformers[serving] and accelerate")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "fastinfer.integrations.transformers", "serve", MODEL]
    command += ["--continuous-batching", "--attn-implementation", "fastinfer/flash-attn2"]
    dtype = "float16" if device == "cuda" else "float32"
    command += ["--cb-num-blocks", "64", "--device", device, "--dtype", dtype]
    package = str(Path(fastinfer.__file__).parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths, "FASTINFER_STRICT": "1"},
        )
    try:
        base = f"http://localhost:{port}"
        for _ in range(120):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                if request(f"{base}/health")["status"] == "ok":
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        message = {"role": "user", "content": "Tell me a story."}
        body = {"model": MODEL, "messages": [message], "max_tokens": 12, "temperature": 0}
        answers = [request(f"{base}/v1/chat/completions", body) for _ in range(2)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0] == texts[1] and len(texts[0].split()) >= 6, texts
        assert answers[0]["usage"]["completion_tokens"] == 12
    finally:
        server.terminate()
        server.wait(30)
