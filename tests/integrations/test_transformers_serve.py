"""`transformers serve` with continuous batching on fastinfer's attention: the tokens of
`generate`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastinfer

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples/tiny/model")
QUESTIONS = ("Who are you?", "What is a tree?", "A story about a fish, please.")
NEW = 12


def request(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


def by_generate(question: str) -> tuple[str, int]:
    """The answer of `generate` with eager attention in fp32, and how many tokens it has.

    The likeliest token of each step is ahead of the next by more than fp16 rounds away.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, attn_implementation="eager", dtype=torch.float32
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**chat, max_new_tokens=NEW, do_sample=False)
    begin = chat["input_ids"].shape[1]
    with torch.no_grad():
        best = model(ids).logits[0, begin - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.1
    return tokenizer.decode(ids[0, begin:], skip_special_tokens=True), ids.shape[1] - begin


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
    # Left to transformers, a step on a large GPU is so large that listing its ids takes seconds.
    command += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"]
    command += ["--device", device, "--dtype", dtype]
    package = str(Path(fastinfer.__file__).parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths, "FASTINFER_STRICT": "1", "HF_HUB_OFFLINE": "1"},
        )
    try:
        want = [by_generate(question) for question in QUESTIONS]
        base = f"http://localhost:{port}"
        for _ in range(120):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                if request(f"{base}/health")["status"] == "ok":
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)

        def ask(question: str) -> tuple[str, int]:
            message = {"role": "user", "content": question}
            body = {"model": MODEL, "messages": [message], "max_tokens": NEW, "temperature": 0}
            answer = request(f"{base}/v1/chat/completions", body)
            text = answer["choices"][0]["message"]["content"]
            return text, answer["usage"]["completion_tokens"]

        assert ask(QUESTIONS[0]) == want[0]  # loads the model
        with ThreadPoolExecutor(len(QUESTIONS)) as threads:
            for _ in range(3):
                assert list(threads.map(ask, QUESTIONS)) == want
    finally:
        server.terminate()
        server.wait(30)
