"""What needs no second process: pieces, stages, plans as integers, cuts of quantised weights."""

from __future__ import annotations

import dataclasses
import random
import socket
import threading
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _model_harness import build_reference, save
from engine_checkpoint import save_checkpoint
from engine_toy import ToyModel, toy_llm

from fastinfer import LLM, SamplingParams
from fastinfer.checkpoint import Cut
from fastinfer.cli.main import build_parser
from fastinfer.cli.options import engine_options
from fastinfer.distributed.control import Hub, RankError, Spoke, first_line, listen_at
from fastinfer.distributed.group import ParallelGroups
from fastinfer.distributed.span import Span, even, in_units
from fastinfer.distributed.stages import StageCosts, divide_layers
from fastinfer.engine import runner as runner_module
from fastinfer.engine import stage_cost
from fastinfer.engine.config import EngineConfig
from fastinfer.engine.parallel import pack_result, unpack_result
from fastinfer.engine.plan_wire import PlanReader, PlanWriter
from fastinfer.engine.runner import ModelRunner
from fastinfer.engine.sampler import SampleResult
from fastinfer.engine.step_plan import SchedulePlan
from fastinfer.models.config import ModelConfig, load_config, parse_config
from fastinfer.models.shard import Shard, check_stages, weight_costs
from fastinfer.quant.canonical import CanonicalWeight
from fastinfer.quant.config import LinearScheme, QuantConfig
from fastinfer.quant.cutting import cut_columns
from fastinfer.quant.formats import Codes


def config(**changes: Any) -> ModelConfig:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    return parse_config(raw | changes)


@pytest.mark.parametrize("total", [1, 5, 96, 131, 14336])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_pieces_cover_everything_once(total: int, ranks: int) -> None:
    def covered(spans: list[Span]) -> bool:
        places = [i for span in spans for i in range(span.begin, span.end)]
        return places == list(range(total)) and all(s.count <= s.size for s in spans)

    assert covered([even(total, rank, ranks) for rank in range(ranks)])
    for unit in (1, 8, 40):
        if -(-total // unit) < ranks:
            with pytest.raises(ValueError, match="at most"):
                in_units(total, 0, ranks, unit)
        else:
            spans = [in_units(total, rank, ranks, unit) for rank in range(ranks)]
            assert covered(spans)
            assert all(span.begin % unit == 0 for span in spans)
    shards = [Shard(rank=rank, ranks=ranks, unit=128) for rank in range(ranks)]
    if total >= 96:
        assert covered([shard.inner(total) for shard in shards])


def test_key_value_heads_are_repeated_when_they_are_fewer_than_ranks() -> None:
    spans = [Shard(rank=rank, ranks=8).heads(2, 16) for rank in range(8)]
    assert [(span.begin, span.size) for span in spans] == [(0, 16)] * 4 + [(16, 16)] * 4
    assert Shard(rank=5, ranks=8).config(config(num_key_value_heads=2)).num_kv_heads == 1


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
    monkeypatch.setattr(runner_module, "measure_costs", lambda *_: costs)
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


def test_kinds_of_layers() -> None:
    windows = config(architectures=["MistralForCausalLM"], num_hidden_layers=4, sliding_window=8)
    assert len(set(stage_cost.layer_kinds(windows, None))) == 1
    scheme = LinearScheme("gptq", 4, 128, True)
    quant = QuantConfig("gptq", scheme, overrides=(("layers.0", None),))
    kinds = stage_cost.layer_kinds(windows, quant)
    assert kinds[0] != kinds[1] and len(set(kinds[1:])) == 1


def test_the_hub_listens_where_the_others_look() -> None:
    with listen_at("127.0.0.1", several_hosts=True) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with listen_at("localhost", several_hosts=True) as server:
        assert server.getsockname()[0] in ("127.0.0.1", "::1")
    # a name that is not this machine's
    with listen_at("no-such-host.invalid", several_hosts=True) as server:
        assert server.getsockname()[0] in ("0.0.0.0", "::")


def test_a_name_that_means_loopback_is_of_no_use_to_other_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen_at("node0", several_hosts=False) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with listen_at("node0", several_hosts=True) as server:
        assert server.getsockname()[0] in ("0.0.0.0", "::")


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_the_hub_speaks_ipv6() -> None:
    try:
        listener = listen_at("::1", several_hosts=False)
        assert listener.getsockname()[0] == "::1"
    except (OSError, AssertionError):
        pytest.skip("this machine has no IPv6")
    hub = Hub(2, listener=listener, timeout=30)
    spoke: list[Spoke] = []
    joining = threading.Thread(target=lambda: spoke.append(Spoke(hub.address("::1"), 1)))
    joining.start()
    hub.accept()
    joining.join()
    spoke[0].done = True
    hub.hang_up()


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "tune", "bench throughput"])
def test_commands_that_make_an_engine_take_its_sizes(command: str) -> None:
    sizes = ["--tp", "2", "--pp", "2", "--pp-layers", "1,2", "--distributed-timeout", "9"]
    args = build_parser().parse_args([*command.split(), "--model", "m", *sizes])
    options = engine_options(args)
    assert options["tensor_parallel_size"] == options["pipeline_parallel_size"] == 2
    assert options["pipeline_stages"] == [1, 2] and options["distributed_timeout"] == 9


def test_an_error_without_words() -> None:
    assert first_line(MemoryError()) == "out of memory"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("one\ntwo")) == "one"


def mirror(llm: LLM) -> list[tuple[SchedulePlan, SchedulePlan]]:
    """Every plan that is run from now on, with what the other side would make of it."""
    core, seen = llm.core, []
    writer, reader = (kind(core.config_rows) for kind in (PlanWriter, PlanReader))
    step = core.runner.step

    def spy(plan: SchedulePlan) -> Any:
        seen.append((plan, reader.read(writer.write(plan))))
        for chunk, copy in zip(plan.chunks, seen[-1][1].chunks, strict=True):
            a, b = chunk.request, copy.request
            assert (chunk.start, chunk.count) == (copy.start, copy.count)
            assert (chunk.num_drafts, chunk.samples) == (copy.num_drafts, copy.samples)
            for name in ("tokens", "block_table", "seed", "num_prompt", "in_flight", "row"):
                assert getattr(a, name) == getattr(b, name), name
            assert a.draft_tokens[: chunk.num_drafts] == b.draft_tokens
            assert a.sample_position == b.sample_position
            assert a.wants_only_tokens == b.wants_only_tokens
            assert set(a.stop_ids) == set(b.stop_ids)
            for name in ("temperature", "top_p", "top_k", "min_p", "min_tokens", "logprobs"):
                assert getattr(a.sampling, name) == getattr(b.sampling, name), name
            b.blocks_sent = len(b.block_table)
        assert (plan.copies, plan.num_tokens) == (seen[-1][1].copies, seen[-1][1].num_tokens)
        return step(plan)

    core.runner.step = spy
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_plans_survive_the_wire(seed: int) -> None:
    rng = random.Random(seed)
    options: dict[str, Any] = {"num_blocks": 12, "max_num_batched_tokens": 16, "block_size": 4}
    if seed % 2:
        options["speculative"] = "ngram"
    llm = toy_llm(ToyModel(), **options)
    llm.core.config_rows = llm.config.max_num_seqs
    seen = mirror(llm)
    prompts = [{"prompt_token_ids": [rng.randrange(5) + 1] * rng.randint(1, 17)} for _ in range(12)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 0.7]),
            top_p=rng.choice([1.0, 0.9]),
            n=rng.choice([1, 1, 2]),
            logprobs=rng.choice([None, 2]),
            min_tokens=rng.choice([0, 1]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            seed=rng.choice([None, 2**63 - 1, -5]),
        )
        for _ in prompts
    ]
    llm.generate(prompts, params)
    assert len(seen) > 10


@pytest.mark.parametrize("logprobs", [False, True])
def test_results_survive_the_wire(logprobs: bool) -> None:
    result = SampleResult([3, 1, 2**40])
    if logprobs:
        result = SampleResult([3, 1], [-0.5, float("-inf")], [[3, 4], [1, 0]], [[-1.0, -2.5]] * 2)
    assert unpack_result(pack_result(result)) == result
    assert unpack_result(pack_result(SampleResult([]))) == SampleResult([])


@pytest.mark.parametrize("bounds", [(0, 32), (32, 96), (40, 96), (8, 24), (64, 90)])
@pytest.mark.parametrize("order", [False, True])
def test_columns_of_a_quantised_weight(bounds: tuple[int, int], order: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = CanonicalWeight(
        torch.randint(0, 16, (5, 90), dtype=torch.uint8, generator=generator),
        torch.rand(5, 3, generator=generator),
        torch.randint(0, 16, (5, 3), dtype=torch.uint8, generator=generator),
        4,
        32,
        torch.randperm(90, generator=generator).to(torch.int32) if order else None,
    )
    begin, end = bounds[0], min(bounds[1], 90)
    piece, channels = cut_columns(weight, begin, end)
    assert (channels is not None) == order
    if channels is None:
        channels = torch.arange(begin, end)
    piece.validate("piece")
    assert torch.equal(piece.dequantize(), weight.dequantize()[:, channels])


def test_codes_are_read_in_whole_words() -> None:
    codes = Codes("w", rows_first=False, per_row=8)  # AWQ: [in, out / 8]
    cut = codes.part((12, 20), (3, 9))
    assert cut == Cut(((3, 9),), (1, 3))
    whole = torch.arange(40).view(10, 4)
    assert torch.equal(cut.back(cut.of(whole), (10, 4))[3:9, 1:3], whole[3:9, 1:3])
    assert dataclasses.replace(codes, rows_first=True).part((8, 16), (0, 5)).rows == ((1, 2),)


def test_a_late_answer_says_what_and_how_long() -> None:
    hub = Hub(2, listener=socket.create_server(("127.0.0.1", 0)), timeout=30)
    spoke: list[Spoke] = []
    joining = threading.Thread(target=lambda: spoke.append(Spoke(hub.address("127.0.0.1"), 1)))
    joining.start()
    hub.accept()
    joining.join()
    spoke[0].done = True  # or this process would end with the hub
    try:
        with pytest.raises(RankError, match=r"a report took longer than 0\.3 s"):
            hub.gather("a report", 0.3)
        with pytest.raises(RankError, match="a report took longer"):
            hub.result(1)  # over is over, whatever its sockets say
    finally:
        hub.close()
