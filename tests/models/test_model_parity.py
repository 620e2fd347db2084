"""The decoder gives the logits and greedy tokens of transformers, however a text is fed to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _model_harness import (
    TINY,
    PagedRun,
    Tiny,
    build_reference,
    greedy,
    random_ids,
    run_schedule,
)

from fastinfer.models import load_model

LENGTHS = (21, 1, 33, 16)
TOLERANCE = 1e-4

GetTiny = Callable[[str], Tiny]
Schedule = list[list[tuple[int, int]]]


def one_go(lengths: tuple[int, ...]) -> Schedule:
    return [[(s, n)] for s, n in enumerate(lengths)]


def chunked(lengths: tuple[int, ...]) -> Schedule:
    return [[(s, min(5, n - i))] for s, n in enumerate(lengths) for i in range(0, n, 5)]


def stepwise(lengths: tuple[int, ...]) -> Schedule:
    """All sequences together, one token each: the decode path."""
    return [[(s, 1) for s, n in enumerate(lengths) if i < n] for i in range(max(lengths))]


def mixed(lengths: tuple[int, ...]) -> Schedule:
    """Random subsets in random order with chunks of random lengths, decodes among prefills."""
    rng = random.Random(7)
    left = list(lengths)
    schedule = []
    while any(left):
        live = [s for s, n in enumerate(left) if n]
        chosen = rng.sample(live, rng.randint(1, len(live)))
        step = [(s, min(left[s], rng.choice((1, 1, 2, 9, 17)))) for s in chosen]
        for s, n in step:
            left[s] -= n
        schedule.append(step)
    return schedule


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("feed", [one_go, chunked, stepwise, mixed])
@pytest.mark.parametrize("name", TINY)
def test_logits_match_transformers(
    tiny: GetTiny, name: str, feed: Callable[[tuple[int, ...]], Schedule], block_size: int
) -> None:
    pair = tiny(name)
    sequences = [random_ids(n, seed=i) for i, n in enumerate(LENGTHS)]
    got = run_schedule(pair.model, sequences, feed(LENGTHS), block_size=block_size)
    for ids, logits in zip(sequences, got, strict=True):
        expected = pair.reference_logits(ids)
        assert expected.std() > 0.3  # the comparison is absolute, so the logits must not be tiny
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_match_generate(tiny: GetTiny, name: str) -> None:
    pair = tiny(name)
    prompts = [random_ids(n, seed=100 + n) for n in (19, 3)]
    got = greedy(pair.model, prompts, 10, block_size=4)
    for prompt, tokens in zip(prompts, got, strict=True):
        expected = pair.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_windows_matter(tiny: GetTiny) -> None:
    """The window tests above could not pass with the window ignored."""
    for name in ("mistral_window", "qwen2_window", "qwen3_window"):
        pair = tiny(name)
        ids = random_ids(23, seed=0)
        full = load_model(pair.folder, progress=False)
        for layer in full.layers:
            layer.attn.window = (-1, -1)
        (logits,) = run_schedule(full, [ids], [[(0, 23)]], block_size=4)
        assert (logits - pair.reference_logits(ids)).abs().max() > 100 * TOLERANCE


def test_dynamic_rope_beyond_the_trained_length(tiny: GetTiny) -> None:
    """A pass over max_model_len tokens, the length at which transformers has the same base."""
    pair = tiny("llama_dynamic")
    length = 100  # the model was made for 64
    model = load_model(pair.folder, progress=False, max_model_len=length)
    assert model.max_model_len == length
    ids = random_ids(length, seed=5)
    reference = build_reference("llama_dynamic")
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    run = PagedRun(model, 1, block_size=16, max_len=length)
    got = torch.cat([run.step([(0, ids[:70])])[0], run.step([(0, ids[70:])])[0]])
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama_biases", "mistral_window", "qwen2", "qwen3"])
def test_bfloat16_stays_close(name: str, tmp_path: Path) -> None:
    """Against fp32 arithmetic on the same bf16 weights."""
    reference = build_reference(name, dtype=torch.bfloat16)
    reference.save_pretrained(tmp_path)
    reference.float()
    model = load_model(tmp_path, progress=False)
    assert model.dtype == torch.bfloat16 == model.config.dtype
    sequences = [random_ids(n, seed=i) for i, n in enumerate(LENGTHS)]
    got = run_schedule(model, sequences, mixed(LENGTHS), block_size=4)
    for ids, logits in zip(sequences, got, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0]
        cosine = torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1)
        assert cosine.min() > 0.999


def test_batch_mates_do_not_change_a_row(tiny: GetTiny) -> None:
    pair = tiny("llama")
    sequences = [random_ids(n, seed=i) for i, n in enumerate(LENGTHS)]
    alone = run_schedule(pair.model, sequences, one_go(LENGTHS), block_size=4)
    together = run_schedule(pair.model, sequences, [list(enumerate(LENGTHS))], block_size=4)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_forward_refuses_wrong_arguments(tiny: GetTiny) -> None:
    model = tiny("llama").model
    run = PagedRun(model, 1, block_size=4)
    run.step([(0, [1, 2])])
    with pytest.raises(ValueError, match=r"CausalLM: caches must hold one LayerCache per layer"):
        model(torch.tensor([1]), None, run.caches[:-1])
    with pytest.raises(ValueError, match=r"CausalLM: input_ids must be packed \[T\], got \[1, 1\]"):
        model(torch.tensor([[1]]), None, run.caches)
