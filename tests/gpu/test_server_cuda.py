"""The HTTP server over an engine on the GPU that speculates: the tokens of an engine without a
server and without drafts, for readers of streams and of whole answers, beside others who leave.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundled import NEEDS_GPU, TINY, story_prompts

from fastinfer import LLM, SamplingParams
from fastinfer.text import load_tokenizer

pytest.importorskip("uvicorn", reason="the server needs fastinfer[serve]")
pytest.importorskip("starlette", reason="the server needs fastinfer[serve]")
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from server_helpers import Running, serving, wait_until_idle

pytestmark = NEEDS_GPU
LENGTHS = (3, 17, 66, 33, 100, 48)
NEW = 48
# to the last bit only so: see test_speculation_cuda.py
ENGINE = {"device": "cuda", "batch_invariant": True, "num_blocks": 400, "max_num_seqs": 16}
KINDS = {"greedy": {"temperature": 0}, "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 7}}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    counting = load_tokenizer(TINY / "model").encode("Count from one to twenty.")
    return [*story_prompts(LENGTHS), counting]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    with LLM(TINY / "model", progress=False, **ENGINE) as llm:
        return {
            kind: [
                output.outputs[0].token_ids
                for output in llm.generate(
                    prompts, SamplingParams(max_tokens=NEW, ignore_eos=True, **options)
                )
            ]
            for kind, options in KINDS.items()
        }


def body(prompt: list[int], **options: object) -> bytes:
    asked = {"prompt": prompt, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
    return json.dumps({**asked, **options}).encode()


def tokens_of(server: Running, prompt: list[int], *, stream: bool, **options: object) -> list[int]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", body(prompt, stream=stream, **options))
        answer = connection.getresponse()
        assert answer.status == 200
        if not stream:
            return json.load(answer)["choices"][0]["token_ids"]
        tokens: list[int] = []
        lines = [line for line in answer.read().split(b"\n\n") if line]
        assert lines.pop() == b"data: [DONE]"
        for line in lines:
            tokens += json.loads(line[5:])["choices"][0]["token_ids"]
        return tokens
    finally:
        connection.close()


def leave(server: Running, prompt: list[int]) -> None:
    """Read a little of a long answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", body(prompt, stream=True, max_tokens=800))
    connection.getresponse().read(100)
    connection.close()


@pytest.mark.parametrize("adaptive", [False, True], ids=["always", "adaptive"])
@pytest.mark.parametrize("drafter", ["ngram", str(TINY / "draft")], ids=["ngram", "draft"])
def test_tokens_over_http(
    prompts: list[list[int]], expected: dict, drafter: str, adaptive: bool
) -> None:
    engine = {**ENGINE, "speculative": drafter, "adaptive_speculation": adaptive}
    with serving(engine=engine) as server, ThreadPoolExecutor(32) as pool:
        for kind, options in KINDS.items():
            for stream in (True, False):
                leavers = [pool.submit(leave, server, prompt) for prompt in prompts[:3]]
                answers = [
                    pool.submit(tokens_of, server, prompt, stream=stream, **options)
                    for prompt in prompts
                ]
                assert [each.result() for each in answers] == expected[kind]
                for each in leavers:
                    each.result()
            # alone, where the steps of a small model follow each other on the GPU
            started = time.monotonic()
            wait_until_idle(server.llm)
            assert time.monotonic() - started < 10
            for prompt, tokens in zip(prompts[::3], expected[kind][::3], strict=True):
                assert tokens_of(server, prompt, stream=True, **options) == tokens
        wait_until_idle(server.llm)
        stats = server.llm.stats()
        assert stats.num_accepted_tokens > 0 and server.llm.failed_steps == 0
