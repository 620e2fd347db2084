"""Greedy tokens of the engine against transformers.generate, for tiny models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _model_harness import MAX_LEN, TINY, build_reference, random_ids, save

from fastinfer import LLM, SamplingParams

LENGTHS = [1, 6, 19, 33]
COUNT = 20
# What happens to the requests, one engine each. A pool of 16 blocks of 4 is not enough for all.
RUNS = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 5},
    "preempted": {"block_size": 4, "num_blocks": 16},
    "overlapped": {"async_scheduling": True, "block_size": 3, "num_blocks": 90},
    "static": {"cuda_graphs": True, "async_scheduling": True, "max_num_seqs": 7},
    "swapped": {"block_size": 4, "num_blocks": 16, "swap_space": 1 << 30},
}
# "self" is replaced by the checkpoint: a draft model that is nearly always right. The prompts
# repeat themselves, so there are n-grams to find; of a random model's answers few are right.
NGRAM = {"speculative": "ngram", "prompt_lookup_min": 1, "adaptive_speculation": False}
TIGHT = {"block_size": 4, "num_blocks": 14}  # the longest request fits
DRAFT = {"speculative": "self", "adaptive_speculation": False}
SPECULATIVE = {
    "n-gram": NGRAM,
    "n-gram, overlapped": {**NGRAM, **RUNS["overlapped"]},
    "n-gram, preempted": {**NGRAM, **TIGHT, "num_speculative_tokens": 1},
    "n-gram, swapped": {**NGRAM, **RUNS["swapped"]},
    "n-gram, static": {**NGRAM, **RUNS["static"], "num_speculative_tokens": 7},
    "n-gram, bursts": {**NGRAM, **RUNS["static"], "bursts": 3},
    "draft": DRAFT,
    "draft, chunked": {**DRAFT, **RUNS["chunked"]},
    "draft, overlapped": {**DRAFT, **RUNS["overlapped"], "num_speculative_tokens": 1},
    "draft, preempted": {**DRAFT, **TIGHT},
    "draft, swapped": {**DRAFT, **RUNS["swapped"], "num_speculative_tokens": 2},
    "draft, static": {**DRAFT, **RUNS["static"], "num_speculative_tokens": 6},
    "draft, bursts": {**DRAFT, **RUNS["static"], "bursts": 4, "num_speculative_tokens": 2},
    "adaptive": {**DRAFT, "adaptive_speculation": True},
}


def check_speculation(
    folder: Path, runs: list[str], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    for run in runs:
        options = {"num_blocks": 40, **SPECULATIVE[run]}
        if options["speculative"] == "self":
            options["speculative"] = str(folder)
        steps = options.pop("bursts", None)
        with LLM(folder, device="cpu", **options) as llm:
            assert llm.core.speculator is not None
            llm.core.speculator.burst_steps = steps
            for chosen in (range(4), [1], [2]):
                outputs = llm.generate([prompts[i] for i in chosen], params)
                got = [output.outputs[0].token_ids for output in outputs]
                assert got == [expected[i] for i in chosen], run
            stats = llm.stats()
            if "draft" in run:
                assert stats.num_accepted_tokens > 0.8 * stats.num_draft_tokens > 0, run
            if "swapped" in run:
                assert stats.num_swapped > 0
            if "preempted" in run:
                assert stats.num_preemptions > 0
            assert stats.kv_blocks_used == 0


@pytest.mark.full
@pytest.mark.parametrize("name", TINY)
def test_speculation_in_every_mode(name: str, tmp_path: Path) -> None:
    save(name, build_reference(name), tmp_path)
    prompts = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    with LLM(tmp_path, device="cpu", num_blocks=40) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    check_speculation(tmp_path, list(SPECULATIVE), prompts, expected)


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = build_reference(name)
    save(name, reference, tmp_path)
    prompts = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = []
    for prompt in prompts:
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, use_cache=True
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert max(LENGTHS) + COUNT <= MAX_LEN
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)

    def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    for run, settings in RUNS.items():
        with LLM(tmp_path, device="cpu", **{"num_blocks": 40, **settings}) as llm:
            assert tokens(llm, prompts) == expected, run
            if run in ("preempted", "swapped"):
                assert llm.stats().num_preemptions > 0
                assert (llm.stats().num_swapped > 0) == (run == "swapped")
            if run == "batched":  # alone, with the prefix that is now in the cache
                for prompt, answer in zip(prompts, expected, strict=True):
                    assert tokens(llm, [prompt]) == [answer]
                assert llm.stats().prefix_hit_tokens > 0
            assert llm.stats().kv_blocks_used == 0
    # every family with both drafters; all the modes over the families, and each with `full`
    first, names = list(TINY).index(name), list(SPECULATIVE)
    check_speculation(tmp_path, [names[first % 6], names[6 + first % 8]], prompts, expected)
    with LLM(tmp_path, device="cpu", num_blocks=40, enable_prefix_caching=False) as llm:
        assert [tokens(llm, [prompt])[0] for prompt in prompts] == expected
