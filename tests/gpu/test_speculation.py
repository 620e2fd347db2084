"""Speculation on the GPU: the tokens of plain decoding, with graphs and without, for both drafters.

With `batch_invariant` to the last bit. Without it a check of several tokens and a decode of one
round differently, as batches of different sizes do; nearly all tokens agree then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fastinfer import LLM, SamplingParams
from fastinfer.text import load_tokenizer
from helpers import devices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        any("cuda" not in devices(op) for op in ("flash_attn_kvcache", "sample")),
        reason="there is no GPU",
    ),
]

TINY = Path(__file__).parents[2] / "examples" / "tiny"
STORIES = TINY.joinpath("heldout.txt").read_text(encoding="utf-8").split("<|begin|>")[1:]
DRAFTERS = {"ngram": "ngram", "draft": str(TINY / "draft")}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TINY / "model")
    lengths = (1, 3, 17, 66, 33, 5, 100, 16, 48)
    ids = [tokenizer.encode(s)[:n] for s, n in zip(STORIES, lengths, strict=False)]
    return [*ids, tokenizer.encode("Count from one to twenty.")]


PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=48, ignore_eos=True),
    "sampled": SamplingParams(seed=7, temperature=0.8, top_p=0.9, max_tokens=48, ignore_eos=True),
}


def tokens_of(
    prompts: Sequence[list[int]], params: SamplingParams, **settings: object
) -> tuple[list[list[int]], LLM]:
    defaults = {"device": "cuda", "num_blocks": 400, "max_num_seqs": 12, "progress": False}
    llm = LLM(TINY / "model", **{**defaults, **settings})
    with llm:
        together = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        alone = [llm.generate([p], params)[0].outputs[0].token_ids for p in prompts[::3]]
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
    return together + alone, stats


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    return {
        name: tokens_of(prompts, params, batch_invariant=True)[0] for name, params in PARAMS.items()
    }


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"cuda_graphs": False}, {"num_blocks": 24}, {"num_speculative_tokens": 15}],
    ids=str,
)
def test_tokens_to_the_last_bit(
    prompts: list, expected: dict, drafter: str, kind: str, settings: dict
) -> None:
    got, stats = tokens_of(
        prompts,
        PARAMS[kind],
        batch_invariant=True,
        speculative=DRAFTERS[drafter],
        adaptive_speculation=False,
        **settings,
    )
    assert got == expected[kind]
    assert stats.num_accepted_tokens > 0
    assert (stats.num_preemptions > 0) == ("num_blocks" in settings)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_the_decode_kernel_checks_drafts(
    prompts: list, expected: dict, drafter: str, cache: str
) -> None:
    """Not batch invariant: several queries per request in the decode kernel."""
    plain, _ = tokens_of(prompts, PARAMS["greedy"], kv_cache_dtype=cache)
    got, stats = tokens_of(
        prompts,
        PARAMS["greedy"],
        kv_cache_dtype=cache,
        speculative=DRAFTERS[drafter],
        adaptive_speculation=False,
    )

    # sequences go apart at a near tie and stay apart: count how far they are the same
    def agreed(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))

    same = sum(agreed(a, b) for a, b in zip(got, plain, strict=True))
    assert same > 0.8 * sum(map(len, plain))
    assert stats.num_accepted_tokens > 0.3 * stats.num_draft_tokens or drafter == "ngram"
