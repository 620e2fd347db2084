"""How layers are dealt to the stages of a pipeline: the division, and the times that it goes by."""

from __future__ import annotations

import random
import threading
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _model_harness import build_reference, save
from engine_checkpoint import save_checkpoint
from quant_checkpoints import CASES, write_checkpoint
from test_parallel_units import config

from fastinfer.distributed.group import ParallelGroups
from fastinfer.distributed.stages import StageCosts, divide_layers
from fastinfer.engine import stage_cost
from fastinfer.engine.config import EngineConfig
from fastinfer.engine.runner import ModelRunner
from fastinfer.models import load_config
from fastinfer.models.shard import check_stages, weight_costs
from fastinfer.quant import notes
from fastinfer.quant.config import LinearScheme, QuantConfig


def test_stages_are_balanced_with_the_head_counted() -> None:
    def counts(stages: int, **changes: Any) -> list[int]:
        return divide_layers(weight_costs(config(**changes)), stages)

    assert counts(1) == [32]
    assert counts(2) == [17, 15]  # the head weighs 2.4 layers
    assert counts(2, vocab_size=100) == [16, 16]
    assert counts(2, vocab_size=16 * 128256) == [31, 1], "a huge vocabulary: fewer layers with it"
    for stages in range(1, 33):
        division = counts(stages)
        assert sum(division) == 32 and min(division) >= 1 and len(division) == stages
        assert max(division[:-1], default=0) - min(division[:-1], default=0) <= 1
    check_stages(config(), 2, [1, 31])
    with pytest.raises(ValueError, match="at most the 32 layers"):
        check_stages(config(), 33)
    for wrong in ([16, 15], [8, 8, 16]):
        with pytest.raises(ValueError, match="2 numbers that add up to the 32 layers"):
            check_stages(config(), 2, wrong)


@pytest.mark.parametrize("seed", range(20))
def test_no_division_has_a_faster_slowest_stage(seed: int) -> None:
    rng = random.Random(seed)
    layers, stages = rng.randint(4, 9), rng.randint(1, 4)
    costs = StageCosts(
        tuple(rng.choice([1.0, 1.0, 2.5]) for _ in range(layers)), rng.random(), 4 * rng.random()
    )
    best = min(
        max(costs.of_stages([b - a for a, b in pairwise((0, *cuts, layers))]))
        for cuts in combinations(range(1, layers), stages - 1)
    )
    assert max(costs.of_stages(divide_layers(costs, stages))) == pytest.approx(best)


class TwoStages:
    """Two ranks, a stage each, as far as loading goes; they meet like real ones."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2, timeout=60), [0, 0]

    def rank(self, rank: int) -> Any:
        def least(what: str, value: int) -> int:
            self.values[rank] = value
            self.barrier.wait()
            result = min(self.values)
            self.barrier.wait()
            return result

        place = SimpleNamespace(rank=rank, size=2)
        groups = ParallelGroups(rank, 2, None, place, torch.device("cpu"))  # type: ignore[arg-type]
        return SimpleNamespace(groups=groups, least=least)


def divided(folder: Path, **options: Any) -> tuple[list[int], list[float | None]]:
    """Layers of both stages, and what they were expected to take."""
    save_checkpoint(folder)
    settings = EngineConfig(
        model=str(folder), num_blocks=8, max_num_seqs=2, pipeline_parallel_size=2, **options
    )
    meeting, runners = TwoStages(), [None, None]

    def make(rank: int) -> None:
        runners[rank] = ModelRunner(settings, torch.device("cpu"), team=meeting.rank(rank))

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = [runner.pipeline_stats()[0] for runner in runners]  # type: ignore[attr-defined]
    return [int(s["layers"]) for s in stats], [s.get("planned_ms") for s in stats]


@pytest.mark.parametrize(
    ("last", "counts"), [(0.001, [1, 2]), (9.0, [2, 1])], ids=["cheap_head", "dear_head"]
)
def test_stages_are_divided_by_measured_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, counts: list[int]
) -> None:
    """Weights would say 2 and 1 in both cases; the embedding weighs nothing then."""
    costs = StageCosts((1.0, 1.0, 1.0), 0.5, last)
    monkeypatch.setattr(stage_cost, "measure_costs", lambda *_: costs)
    assert divided(tmp_path) == (counts, [1e3 * each for each in costs.of_stages(counts)])


def test_ranks_agree_although_they_measure_different_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One finds layers expensive, the other the head: the slowest of each counts for both."""
    asked: list[str] = []

    def seconds(probe: Any, number: int) -> float:
        asked.append("layer")
        return 4.0 if threading.current_thread().name == "slow layers" else 1.0

    def ends(probe: Any) -> tuple[float, float]:
        return (0.0, 0.0) if threading.current_thread().name == "slow layers" else (0.0, 40.0)

    names = iter(["slow layers", "slow head"])
    init = threading.Thread.__init__
    monkeypatch.setattr(
        threading.Thread,
        "__init__",
        lambda self, *a, **k: init(self, *a, **({"name": next(names, None)} | k)),
    )
    monkeypatch.setattr(stage_cost._Probe, "layer", seconds)
    monkeypatch.setattr(stage_cost._Probe, "ends", ends)
    assert divided(tmp_path) == ([2, 1], [8000.0, 44000.0])
    assert asked == ["layer", "layer"], "one kind of layer, timed once by each"


def test_layers_and_ends_are_timed(tmp_path: Path) -> None:
    counts, planned = divided(tmp_path, dtype="float32")
    assert sum(counts) == 3 and all(each is not None and each > 0 for each in planned)
    given = divided(tmp_path, pipeline_stages=[1, 2])
    assert given == ([1, 2], [None, None])


def test_a_huge_vocabulary_leaves_the_last_stage_few_layers(tmp_path: Path) -> None:
    """Measured, not weighed."""
    save(
        "llama",
        build_reference("llama", vocab_size=30000, num_hidden_layers=8, tie_word_embeddings=False),
        tmp_path,
    )
    settings = EngineConfig(model=str(tmp_path), max_num_seqs=8, pipeline_parallel_size=2)
    meeting = SimpleNamespace(
        groups=SimpleNamespace(tensor=None, stages=2), least=lambda what, value: value
    )
    whole = load_config(tmp_path)
    costs = stage_cost.measure_costs(settings, whole, meeting, torch.device("cpu"))  # type: ignore[arg-type]
    first, last = divide_layers(costs, 2)
    assert last < first


class Alone:
    """A group whose other ranks have nothing to say."""

    peer = None
    batch_invariant = False

    def __init__(self, size: int) -> None:
        self.rank, self.size = size - 1, size

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    "name",
    [
        "llama_mqa",
        "qwen3_window",
        "gptq_v2_act_order",
        "gptq_odd_group",
        "awq",
        "ct_w8a8",
        "bnb_nf4",
    ],
)
def test_every_kind_of_model_can_be_timed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, ranks: int
) -> None:
    """With its quantisation, cut over ranks; in silence."""
    if name in CASES:
        write_checkpoint(CASES[name], tmp_path)
    else:
        save(name, build_reference(name), tmp_path)
    tensor = None if ranks == 1 else Alone(ranks)
    meeting: Any = SimpleNamespace(
        groups=SimpleNamespace(tensor=tensor, stages=2), least=lambda what, value: value
    )
    whole = load_config(tmp_path)
    for options in ({}, {"requantize": 4}, {"kv_cache_dtype": "int8", "batch_invariant": True}):
        settings = EngineConfig(
            model=str(tmp_path), max_num_seqs=4, pipeline_parallel_size=2, **options
        )
        costs = stage_cost.measure_costs(settings, whole, meeting, torch.device("cpu"))
        assert len(costs.layers) == whole.num_layers
        assert min(*costs.layers, costs.first, costs.last) > 0
    assert not [each for each in caplog.records if each.name == notes.log.name]


def test_what_is_timed_fits_where_the_cache_will(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    whole = load_config(tmp_path)
    meeting: Any = SimpleNamespace(groups=SimpleNamespace(tensor=None, stages=2))

    def rows(**options: Any) -> int:
        settings = EngineConfig(
            model=str(tmp_path), max_num_seqs=32, pipeline_parallel_size=2, **options
        )
        probe = stage_cost._Probe(settings, whole, meeting, torch.device("cpu"), None)
        assert 1 <= probe._rows <= 16
        return probe._rows

    context = min(stage_cost.CONTEXT, whole.max_position)
    assert rows() == 16
    # 2 of 3 layers: as much as 4 contexts of one
    assert rows(num_blocks=2 * -(-context // 16), block_size=16) == 4
    assert rows(num_blocks=1) == rows(kv_cache_memory=1) == 1
    assert rows(kv_cache_memory=1 << 40) == 16


def test_kinds_of_layers() -> None:
    windows = config(architectures=["MistralForCausalLM"], num_hidden_layers=4, sliding_window=8)
    assert len(set(stage_cost.layer_kinds(windows, None))) == 1
    scheme = LinearScheme("gptq", 4, 128, True)
    quant = QuantConfig("gptq", scheme, overrides=(("layers.0", None),))
    kinds = stage_cost.layer_kinds(windows, quant)
    assert kinds[0] != kinds[1] and len(set(kinds[1:])) == 1
