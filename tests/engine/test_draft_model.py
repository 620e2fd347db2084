"""Drafts from a model: what it knows of a request, what it shares, and that it helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_checkpoint import save_checkpoint

from fastinfer import LLM, SamplingParams
from fastinfer.engine.draft_model import ModelDrafter

TINY = Path(__file__).parents[2] / "examples" / "tiny"
STORIES = TINY.joinpath("heldout.txt").read_text(encoding="utf-8").split("<|begin|>")[1:]
PROMPTS = [STORIES[0][:60], "Once upon a time", STORIES[2][:150], "Count from three to seven."]
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=40, ignore_eos=True),
}


def load(**settings: object) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "num_blocks": 120, "progress": False}
    return LLM(TINY / "model", **{**defaults, **settings})


def speculative(**settings: object) -> LLM:
    return load(speculative=TINY / "draft", adaptive_speculation=False, **settings)


def tokens(outputs: list) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.outputs]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    with load() as llm:
        return {name: tokens(llm.generate(PROMPTS, p)) for name, p in PARAMS.items()}


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_speculative_tokens": 1},
        {"num_speculative_tokens": 5, "cuda_graphs": True},
        {"num_speculative_tokens": 16, "block_size": 5},
        {"num_blocks": 9, "swap_space": 1 << 26},
        {"max_num_batched_tokens": 11},  # the draft model catches up in pieces, too
        {"async_scheduling": True, "adaptive_speculation": True},
        {"kv_cache_dtype": "int8", "max_num_seqs": 2},
    ],
    ids=str,
)
def test_the_trained_pair(expected: dict, kind: str, settings: dict) -> None:
    if settings.get("kv_cache_dtype"):
        with load(kv_cache_dtype="int8", max_num_seqs=2) as llm:
            wanted = tokens(llm.generate(PROMPTS, PARAMS[kind]))
    else:
        wanted = expected[kind]
    with load(speculative=TINY / "draft", **{"adaptive_speculation": False, **settings}) as llm:
        assert tokens(llm.generate(PROMPTS, PARAMS[kind])) == wanted
        stats = llm.stats()
        assert stats.num_accepted_tokens > 0.25 * stats.num_draft_tokens > 0
        assert stats.kv_blocks_used == 0
        if settings.get("num_blocks") == 9:
            assert stats.num_preemptions > 0


def test_several_completions_and_a_cached_prompt(expected: dict) -> None:
    params = SamplingParams(temperature=0.9, seed=1, n=3, max_tokens=20, ignore_eos=True)
    with load() as llm:
        wanted = tokens(llm.generate(PROMPTS[2], params))
    with speculative() as llm:
        drafter = llm.core.speculator.drafter
        assert isinstance(drafter, ModelDrafter)
        ran: list[int] = []
        run = drafter._run_behind
        drafter._run_behind = lambda behind: (ran.append(sum(b[2] for b in behind)), run(behind))
        assert tokens(llm.generate(PROMPTS[2], params)) == wanted
        first = sum(ran)
        ran.clear()
        assert tokens(llm.generate(PROMPTS[2], params)) == wanted
        assert sum(ran) < first  # what it knows of the cached blocks is not run again
        length = len(llm.tokenizer.encode(PROMPTS[2]))
        assert first <= 3 * length and sum(ran) <= 3 * 16  # the block that is not full


def test_a_step_without_drafts_is_caught_up_with() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with speculative() as llm:
        wanted = tokens(llm.generate(PROMPTS[:2], params))
        speculator = llm.core.speculator
        wants, calls = speculator.wants, iter(range(10**6))
        speculator.wants = lambda running: next(calls) % 9 < 4 and wants(running)
        before = llm.stats()
        assert tokens(llm.generate(PROMPTS[:2], params)) == wanted
        after = llm.stats()
        drafts = after.num_draft_tokens - before.num_draft_tokens
        accepted = after.num_accepted_tokens - before.num_accepted_tokens
        assert accepted > 0.6 * drafts > 0


def test_its_own_draft_is_always_right() -> None:
    """The same model with the same random numbers: every draft stands, sampled ones as well."""
    for params in PARAMS.values():
        with load(speculative=TINY / "model", adaptive_speculation=False) as llm:
            llm.generate(PROMPTS, params)
            assert llm.stats().num_accepted_tokens == llm.stats().num_draft_tokens > 0


def test_memory_of_both_caches_is_counted() -> None:
    with load(num_blocks=None, kv_cache_memory=2_000_000) as llm:
        alone = llm.stats()
    with speculative(num_blocks=None, kv_cache_memory=2_000_000) as llm:
        both = llm.stats()
    assert both.kv_block_bytes > alone.kv_block_bytes
    assert both.kv_blocks_total == 2_000_000 // both.kv_block_bytes < alone.kv_blocks_total


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", tokenizer=False)
    with pytest.raises(ValueError, match="must have the vocabulary of the model"):
        load(speculative=tmp_path / "other")
    shutil.copytree(TINY / "draft", tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[700:714:7]
    for _ in range(2):
        vocab[a], vocab[b] = vocab[b], vocab[a]
    names = sorted(vocab, key=vocab.get)
    shifted = {name: (i + 1) % len(names) for i, name in enumerate(names)}
    data["model"]["vocab"] = shifted
    data["added_tokens"] = []
    data["post_processor"] = None
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="must have the vocabulary of the model"):
        load(speculative=tmp_path / "words")
    with pytest.raises(FileNotFoundError):
        load(speculative=tmp_path / "nowhere")


def test_nothing_of_the_cache_that_was_not_written_matters() -> None:
    with speculative() as llm:
        wanted = tokens(llm.generate(PROMPTS, PARAMS["greedy"]))
    with speculative() as llm:
        drafter = llm.core.speculator.drafter
        for layer in drafter._layers:  # finite rubbish
            layer.k.copy_(torch.randn(layer.k.shape) * 100)
            layer.v.copy_(torch.randn(layer.v.shape) * 100)
        assert tokens(llm.generate(PROMPTS, PARAMS["greedy"])) == wanted
        assert llm.stats().num_accepted_tokens > 0.5 * llm.stats().num_draft_tokens
