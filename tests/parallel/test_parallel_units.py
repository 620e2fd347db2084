"""What needs no second process: pieces, stages, plans as integers, cuts of quantised weights."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _model_harness import build_reference, save
from engine_toy import ToyModel, toy_llm
from quant_checkpoints import CASES, write_checkpoint

from fastinfer import LLM, SamplingParams
from fastinfer import checkpoint as checkpoint_module
from fastinfer._errors import first_line
from fastinfer.checkpoint import Cut
from fastinfer.cli.main import build_parser
from fastinfer.cli.options import engine_options
from fastinfer.distributed import control, launch
from fastinfer.distributed.control import Hub, RankError, Spoke
from fastinfer.distributed.launch import listen_at, restore_environment
from fastinfer.distributed.span import Span, even, in_units
from fastinfer.engine.parallel import pack_result, unpack_result
from fastinfer.engine.plan_wire import PlanReader, PlanWriter
from fastinfer.engine.sampler import SampleResult
from fastinfer.engine.step_plan import SchedulePlan
from fastinfer.models.config import ModelConfig, load_config, parse_config
from fastinfer.models.loader import load_model
from fastinfer.models.shard import WHOLE, Shard
from fastinfer.quant.canonical import CanonicalWeight
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


def test_ipv4_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen_at("node0", several_hosts=False) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_a_run_unsets_what_it_set_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_GIVEN", "1")
    monkeypatch.delenv("FASTINFER_A", raising=False)
    monkeypatch.delenv("FASTINFER_B", raising=False)
    variables: dict[str, str] = {}
    for name in ("FASTINFER_GIVEN", "FASTINFER_A", "FASTINFER_B"):
        launch._default(variables, name, "0")
    monkeypatch.setenv("FASTINFER_B", "2")
    restore_environment({})  # of another run
    assert os.environ["FASTINFER_A"] == "0"
    restore_environment(variables)
    assert os.environ["FASTINFER_GIVEN"] == "1" and os.environ["FASTINFER_B"] == "2"
    assert "FASTINFER_A" not in os.environ and not variables


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_the_hub_speaks_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    listener = listen_at("::1", several_hosts=False)
    assert listener.getsockname()[0] == "::1"
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


class Counted:
    """A file, or a slice of it, that counts the bytes that are taken out."""

    def __init__(self, inner: Any, taken: list[int]) -> None:
        self._inner, self._taken = inner, taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __enter__(self) -> Counted:
        return Counted(self._inner.__enter__(), self._taken)

    def __exit__(self, *exc: Any) -> Any:
        return self._inner.__exit__(*exc)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self._taken.append(tensor.nbytes)
        return tensor

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._count(self._inner.get_tensor(name))

    def get_slice(self, name: str) -> Counted:
        return Counted(self._inner.get_slice(name), self._taken)

    def __getitem__(self, where: Any) -> torch.Tensor:
        return self._count(self._inner[where])


@pytest.mark.parametrize(("case", "most"), [("plain", 0.3), ("gptq", 0.5), ("ct_int8", 0.5)])
def test_a_rank_reads_its_slices_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, most: float
) -> None:
    """Of four ranks; the scales of groups, which each reads whole, are much of tiny layers."""
    if case == "plain":
        save("llama", build_reference("llama"), tmp_path)
    else:
        write_checkpoint(CASES[case], tmp_path)
    taken: list[int] = []
    opened = checkpoint_module._open
    monkeypatch.setattr(checkpoint_module, "_open", lambda *args: Counted(opened(*args), taken))

    def read(shard: Shard) -> int:
        taken.clear()
        load_model(tmp_path, shard=shard, progress=False)
        return sum(taken)

    whole = read(WHOLE)
    group: Any = SimpleNamespace()  # that there is one; nothing is run
    parts = [read(Shard(rank=rank, ranks=4, group=group)) for rank in range(4)]
    assert all(part < most * whole for part in parts), (whole, parts)
    stages = [
        read(Shard(first_layer=0, num_layers=1, is_last=False)),
        read(Shard(first_layer=1, num_layers=load_config(tmp_path).num_layers - 1, is_first=False)),
    ]
    assert sum(stages) == whole


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


@pytest.mark.parametrize("loaded", [False, True])
def test_a_late_collective_is_told_as_one(loaded: bool) -> None:
    """Whichever rank says it, with the limit of the time."""
    limit = r"distributed_timeout \(30 s\)" if loaded else "1800 s"
    gloo = "[gloo/transport/tcp] Timed out waiting 30000ms for recv operation to complete"
    hub = Hub(3, listener=socket.create_server(("127.0.0.1", 0)), timeout=30)
    hub.loaded = loaded
    spokes: list[Spoke] = []

    def connect() -> None:
        spokes.extend(Spoke(hub.address("127.0.0.1"), rank) for rank in (1, 2))

    joining = threading.Thread(target=connect)
    joining.start()
    hub.accept()
    joining.join()
    for spoke in spokes:
        spoke.done = True
    try:
        spokes[1].fail(RuntimeError(gloo))
        with pytest.raises(RankError, match=f"a collective of 3 ranks took longer than {limit}"):
            hub.gather("a report")
    finally:
        hub.close()
    hub = Hub(3, listener=socket.create_server(("127.0.0.1", 0)), timeout=30)
    hub.loaded = loaded
    late = str(hub.explain(RuntimeError(gloo)))
    assert re.search(f"a collective of 3 ranks took longer than {limit}", late)
    hub.hang_up()
    hub = Hub(3, listener=socket.create_server(("127.0.0.1", 0)), timeout=30)
    late = str(hub.explain(TimeoutError("timed out"), "an order to rank 1"))
    assert "an order to rank 1 took longer than distributed_timeout (30 s)" in late
    hub.hang_up()


def test_a_caller_that_dawdles_is_let_go() -> None:
    """However many bytes it sends, one at a time."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"{")
        with pytest.raises(TimeoutError):
            control._read_line(ours, 0.05)
        theirs.sendall(b"}\n")
        assert control._read_line(ours, 5.0) == "}\n"
