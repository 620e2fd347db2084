"""Speculation on the GPU: the tokens of plain decoding, with graphs and without, for both drafters,
of 16-bit and of quantised weights; preempted, swapped, with a cached prefix.

With `batch_invariant` to the last bit. Without it a check of several tokens and a decode of one
round differently, as batches of different sizes do; nearly all tokens agree then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bundled import NEEDS_GPU, TINY, story_prompts

from fastinfer import LLM, SamplingParams
from fastinfer.engine import EngineStats
from fastinfer.engine.swap import SwapSpace
from fastinfer.quant import QuantizeOptions, quantize_checkpoint
from fastinfer.text import load_tokenizer

pytestmark = NEEDS_GPU
DRAFTERS = {"ngram": "ngram", "draft": str(TINY / "draft")}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    counting = load_tokenizer(TINY / "model").encode("Count from one to twenty.")
    return [*story_prompts((1, 3, 17, 66, 33, 5, 100, 16, 48)), counting]


PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=48, ignore_eos=True),
    "sampled": SamplingParams(seed=7, temperature=0.8, top_p=0.9, max_tokens=48, ignore_eos=True),
}


def tokens_of(
    prompts: Sequence[list[int]],
    kinds: Sequence[str],
    model: Path = TINY / "model",
    **settings: object,
) -> tuple[dict[str, list[list[int]]], EngineStats]:
    """All at once, then some of them alone, whose prefix may be in the cache."""
    defaults = {"device": "cuda", "num_blocks": 400, "max_num_seqs": 12, "progress": False}
    tokens: dict[str, list[list[int]]] = {}
    with LLM(model, **{**defaults, **settings}) as llm:
        for kind in kinds:
            params = PARAMS[kind]
            outputs = llm.generate(prompts, params)
            outputs += [llm.generate([p], params)[0] for p in prompts[::3]]
            tokens[kind] = [output.outputs[0].token_ids for output in outputs]
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
    return tokens, stats


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    return tokens_of(prompts, list(PARAMS), batch_invariant=True)[0]


@pytest.fixture
def always_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it pays or not: of so small a model it may not."""
    monkeypatch.setattr(SwapSpace, "pays", lambda self, blocks, _: 0 < blocks <= self.num_free)


PREEMPTED = {"num_blocks": 18}
SWAPPED = {"num_blocks": 18, "swap_space": 1 << 26}


def check(got: object, expected: object, stats: EngineStats, settings: dict) -> None:
    """`expected`, and what the settings ask for did happen."""
    assert got == expected
    assert (stats.num_preemptions > 0) == ("num_blocks" in settings)
    assert (stats.num_swapped > 0) == ("swap_space" in settings)


def check_drafts(
    prompts: list, expected: dict, drafter: str, settings: dict, model: Path = TINY / "model"
) -> None:
    """The same with drafts."""
    got, stats = tokens_of(
        prompts,
        list(expected),
        model,
        batch_invariant=True,
        speculative=DRAFTERS[drafter],
        adaptive_speculation=False,
        **settings,
    )
    check(got, expected, stats, settings)
    assert stats.num_accepted_tokens > 0
    assert "num_blocks" in settings or stats.prefix_hit_tokens > 0


@pytest.mark.usefixtures("always_swap")
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"cuda_graphs": False}, PREEMPTED, SWAPPED, {"num_speculative_tokens": 15}],
    ids=str,
)
def test_tokens_to_the_last_bit(
    prompts: list, expected: dict, drafter: str, settings: dict
) -> None:
    check_drafts(prompts, expected, drafter, settings)


FORMATS = {
    "int4": QuantizeOptions(bits=4, group_size=64),
    "int8": QuantizeOptions(bits=8, group_size=-1),
    "w8a8": QuantizeOptions(method="smoothquant", bits=8, group_size=-1, samples=4, seqlen=64),
}


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, prompts: list
) -> Callable[[str], tuple[Path, dict[str, list[list[int]]]]]:
    """Format -> checkpoint of the bundled model, and its tokens without speculation; made once."""
    made: dict[str, tuple[Path, dict[str, list[list[int]]]]] = {}

    def get(name: str) -> tuple[Path, dict[str, list[list[int]]]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            calib = TINY / "heldout.txt" if name == "w8a8" else None
            quantize_checkpoint(TINY / "model", folder, FORMATS[name], calib=calib, progress=False)
            made[name] = folder, tokens_of(prompts, ["greedy"], folder, batch_invariant=True)[0]
        return made[name]

    return get


@pytest.mark.usefixtures("always_swap")
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("settings", [{}, PREEMPTED, SWAPPED], ids=str)
def test_quantized_weights_to_the_last_bit(
    prompts: list, quantized: Callable, weights: str, drafter: str, settings: dict
) -> None:
    folder, expected = quantized(weights)
    check_drafts(prompts, expected, drafter, settings, folder)


@pytest.mark.parametrize("weights", ["16 bits", *FORMATS])
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_the_decode_kernel_checks_drafts(
    prompts: list, quantized: Callable, weights: str, cache: str
) -> None:
    """Not batch invariant: several queries per request in the decode kernel."""
    model = TINY / "model" if weights == "16 bits" else quantized(weights)[0]
    plain, _ = tokens_of(prompts, ["greedy"], model, kv_cache_dtype=cache)
    for drafter, folder in DRAFTERS.items():
        got, stats = tokens_of(
            prompts,
            ["greedy"],
            model,
            kv_cache_dtype=cache,
            speculative=folder,
            adaptive_speculation=False,
        )
        # sequences go apart at a near tie and stay apart: count how far they are the same
        pairs = list(zip(got["greedy"], plain["greedy"], strict=True))
        same = sum(agreed(a, b) for a, b in pairs)
        assert same > 0.7 * sum(len(b) for _, b in pairs)
        if drafter == "draft":
            assert stats.num_accepted_tokens > 0.3 * stats.num_draft_tokens


def agreed(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@pytest.mark.usefixtures("always_swap")
def test_swapped_requests_go_on_as_they_were(prompts: list, expected: dict) -> None:
    got, stats = tokens_of(prompts, list(PARAMS), batch_invariant=True, **SWAPPED)
    check(got, expected, stats, SWAPPED)


NEAR = 0.15  # nats: a step of a bfloat16 logit between 16 and 32 is 0.125


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("invariant", [True, False], ids=["invariant", "default"])
def test_long_answers_differ_at_near_ties_or_not_at_all(drafter: str, invariant: bool) -> None:
    """As bench_speculative.py runs them: one request, bursts."""
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    settings = {"device": "cuda", "num_blocks": 256, "max_num_seqs": 8, "progress": False}
    settings |= {"speculative": DRAFTERS[drafter], "adaptive_speculation": False}
    texts = ["Count from one to twenty.", "On Monday, Tom made soup. On Tuesday, Tom made soup."]
    with LLM(TINY / "model", batch_invariant=invariant, **settings) as llm:
        for text in texts:
            (with_drafts,) = llm.generate(text, params)
            assert with_drafts.metrics.num_accepted_tokens > 20
            speculator, llm.core.speculator = llm.core.speculator, None
            (plain,) = llm.generate(text, params)
            a, b = (each.outputs[0].token_ids for each in (with_drafts, plain))
            at = agreed(a, b)
            if at < len(a):
                assert not invariant
                one = SamplingParams(temperature=0, max_tokens=1, logprobs=8, ignore_eos=True)
                prompt = {"prompt_token_ids": [*plain.prompt_token_ids, *b[:at]]}
                (scores,) = llm.generate([prompt], one)[0].outputs[0].logprobs
                assert abs(scores[a[at]].logprob - scores[b[at]].logprob) < NEAR
            llm.core.speculator = speculator
