"""Logits of a model that is divided over 2 and 4 processes against those of one process, fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _model_harness import TINY, build_reference, save
from grid_rank import INVARIANT, SEQUENCES, logits_of
from parallel_grid import CHANGES, LAYOUTS, run_grid
from quant_checkpoints import CASES, Int8Activations, write_checkpoint

QUICK = ("llama", "llama_biases", "llama_mqa", "mistral_window", "qwen2", "qwen3", "baichuan")
QUICK_FORMATS = (
    "gptq_asymmetric",
    "gptq_v2_act_order",
    "awq",
    "ct_8bit",
    "ct_w8a8",
    "bnb_nf4",
    "native",
)
BOUND = 1e-4

Grid = Callable[[bool, int], tuple[dict[str, Path], dict[tuple[str, int, int], Any]]]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """(whether all cases, processes) -> folders and results; each combination is run once."""
    done: dict[tuple[bool, int], Any] = {}

    def get(everything: bool, size: int) -> Any:
        if (everything, size) not in done:
            folder = tmp_path_factory.mktemp("grid")
            cases: dict[str, Path] = {}
            for name in TINY if everything else QUICK:
                cases[name] = folder / name
                save(name, build_reference(name, **CHANGES.get(name, {})), cases[name])
            for name in CASES if everything else QUICK_FORMATS:
                cases[name] = folder / name
                cases[name].mkdir()
                write_checkpoint(CASES[name], cases[name])
                if CASES[name].activations:
                    cases[name + INVARIANT] = cases[name]
            done[everything, size] = cases, run_grid(folder, cases, LAYOUTS[size])
        return done[everything, size]

    return get


def check(grid: Grid, everything: bool, size: int, names: Any) -> None:
    cases, results = grid(everything, size)
    worst: dict[str, float] = {}
    for name in names:
        want = logits_of(str(cases[name]), None, batch_invariant=name.endswith(INVARIANT))
        for tp, pp in LAYOUTS[size]:
            got = results[name, tp, pp]
            if isinstance(got, str):
                worst[f"{name} {tp} {pp}: {got}"] = float("inf")
                continue
            error = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True))
            same = all(
                torch.equal(a.argmax(1), b.argmax(1)) for a, b in zip(want, got, strict=True)
            )
            worst[f"{name} tp {tp} pp {pp}"] = error if same else float("inf")
    bad = {name: error for name, error in worst.items() if not error < BOUND}
    assert not bad, bad


@pytest.mark.parametrize("size", [2, 4])
def test_every_family(grid: Grid, size: int) -> None:
    check(grid, False, size, QUICK)


@pytest.mark.parametrize("size", [2, 4])
def test_quantised_formats(grid: Grid, size: int) -> None:
    exact = [name for name in QUICK_FORMATS if not CASES[name].activations]
    check(grid, False, size, exact)


@pytest.mark.parametrize("size", [2, 4])
def test_int8_activations_with_a_scale_for_all_ranks(grid: Grid, size: int) -> None:
    """Batch-invariant mode takes the scale of a token over all ranks, as one process does."""
    names = [name + INVARIANT for name in QUICK_FORMATS if CASES[name].activations]
    assert names
    check(grid, False, size, names)


@pytest.mark.parametrize("size", [2, 4])
def test_int8_activations(grid: Grid, size: int, tmp_path: Path) -> None:
    """A rank scales the activations that it has: no further from exact activations than one
    process, which has one scale for all of them.
    """
    cases, results = grid(False, size)
    for name in QUICK_FORMATS:
        if not CASES[name].activations:
            continue
        exact = write_checkpoint(CASES[name], tmp_path)
        for module in exact.modules():
            if isinstance(module, Int8Activations):
                weight = (module.codes * module.scale.double()).float()
                module.forward = partial(
                    torch.nn.functional.linear, weight=weight, bias=module.bias
                )
        with torch.no_grad():
            truth = torch.cat([exact(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
        one = torch.cat(logits_of(str(cases[name]), None))
        for tp, pp in LAYOUTS[size]:
            got = torch.cat(results[name, tp, pp])
            if tp == 1:
                assert float((got - one).abs().max()) < BOUND
            assert float((got - truth).norm()) < 1.2 * float((one - truth).norm())


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_every_variant_and_format(grid: Grid, size: int) -> None:
    exact = [name + INVARIANT * CASES[name].activations for name in CASES]
    check(grid, True, size, [*TINY, *exact])
