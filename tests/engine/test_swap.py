"""Preempted requests wait in host memory, or are computed again; priorities say who goes first."""

from __future__ import annotations

import pytest
import torch
from engine_toy import PROMPTS, assert_idle, greedy, tokens_of, toy_greedy, toy_llm
from scheduler_harness import (
    FakeModel,
    alone,
    make_request,
    make_scheduler,
    run_all,
    step,
)

from fastinfer import SamplingParams
from fastinfer.engine.swap import SwapSpace

TOY_BLOCK = 2 * 2 * 4 * 1 * 2 * 4  # layers, sides, tokens, heads, channels, bytes


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("space", [0, 1, 3, 40])
def test_tokens_do_not_change(space: int, overlap: bool) -> None:
    settings = {"num_blocks": 8, "async_scheduling": overlap, "enable_prefix_caching": False}
    with toy_llm(swap_space=space * TOY_BLOCK, **settings) as llm:
        swap = llm.core.scheduler.swap
        assert (swap is None) == (space == 0)
        for rate in (None, 1e-9, 1e12):  # not measured, recomputing slow, recomputing fast
            if swap is not None:
                swap.prefill_rate = rate
                swap.observe = lambda tokens, seconds: None
            before = llm.stats()
            outputs = llm.generate(PROMPTS, greedy(20))
            assert tokens_of(outputs) == [toy_greedy(prompt, 20) for prompt in PROMPTS]
            after = llm.stats()
            assert after.num_preemptions > before.num_preemptions
            swapped = after.num_swapped - before.num_swapped
            assert (swapped > 0) == (space > 1 and rate != 1e12)
            assert swap is None or swap.num_free == swap.num_blocks
            assert_idle(llm)


@pytest.mark.parametrize("dtype", ["auto", "int8", "fp8"])
def test_what_comes_back_is_what_went_out(dtype: str) -> None:
    from fastinfer.engine.kv_cache import allocate_cache
    from fastinfer.engine.swap import HostCache, _tensors

    class Model:
        num_layers, num_kv_heads, head_dim = 2, 2, 16

    kind = {"auto": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[dtype]
    _, layers = allocate_cache(
        Model(), num_blocks=7, block_size=4, dtype=kind, device=torch.device("cpu")
    )
    for i, tensor in enumerate(_tensors(layers)):
        tensor.copy_((torch.arange(tensor.numel()) % 50 + i).view(tensor.shape))
    host = HostCache(Model(), layers, 5, 4)
    before = [tensor.clone() for tensor in _tensors(layers)]
    assert host.measure_bandwidth() > 0
    host.move([(6, 0), (2, 4)], [])
    for tensor in _tensors(layers):
        tensor[[1, 2, 3, 6]] = 0
    host.move([], [(0, 1), (4, 3)])
    for tensor, old in zip(_tensors(layers), before, strict=True):
        assert torch.equal(tensor[1].float(), old[6].float())
        assert torch.equal(tensor[3].float(), old[2].float())
        assert torch.equal(tensor[[0, 4, 5]].float(), old[[0, 4, 5]].float())


def test_the_rule() -> None:
    space = SwapSpace(10, block_bytes=1000, bandwidth=1e6)  # 2 ms a block, out and back
    assert space.pays(10, 1) and not space.pays(11, 100) and not space.pays(0, 0)
    space.observe(63, 1.0)
    assert space.prefill_rate is None
    space.observe(100, 0.01)  # 10,000 tokens a second
    assert space.pays(1, 21) and not space.pays(1, 19)
    space.observe(100, 0.02)
    assert 5_000 < space.prefill_rate < 10_000


def test_a_request_that_ends_while_it_waits_frees_its_blocks() -> None:
    swap = SwapSpace(8, 1, 1e9)
    scheduler = make_scheduler(num_blocks=6, swap=swap, enable_prefix_caching=False)
    model = FakeModel(scheduler)
    requests = [make_request(scheduler, 8, 12) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    while not scheduler.num_swapped:
        step(scheduler, model)
    assert swap.num_free < swap.num_blocks and requests[1].host_blocks
    scheduler.finish(requests[1], "abort")
    assert swap.num_free == swap.num_blocks
    run_all(scheduler, model)


def test_a_swapped_request_goes_on_where_it_was() -> None:
    swap = SwapSpace(8, 1, 1e9)
    scheduler = make_scheduler(num_blocks=7, swap=swap, enable_prefix_caching=False)
    model = FakeModel(scheduler)
    requests = [make_request(scheduler, 8, 12) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    plans = run_all(scheduler, model)
    assert scheduler.num_swapped > 0
    for request in requests:
        assert request.output_token_ids == alone(request.tokens[:8], 12)
    computed = sum(plan.num_tokens for plan in plans)
    assert computed == sum(len(request.tokens) - 1 for request in requests)  # each token once


def test_priorities_decide_who_is_admitted_and_who_gives_way() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=2)
    model = FakeModel(scheduler)
    low = [make_request(scheduler, 3, 20, priority=5) for _ in range(3)]
    for request in low:
        scheduler.add(request)
    step(scheduler, model)
    assert scheduler.running == low[:2]
    high = make_request(scheduler, 3, 4, priority=-1)
    scheduler.add(high)
    assert list(scheduler.waiting) == [high, low[2]]
    step(scheduler, model)
    step(scheduler, model)  # the youngest of the low ones has given way
    step(scheduler, model)
    assert scheduler.running == [high, low[0]]
    assert list(scheduler.waiting) == [low[1], low[2]]
    run_all(scheduler, model)
    for request in [*low, high]:
        assert request.output_token_ids == alone(request.tokens[:3], request.num_output)
    assert low[0].metrics.num_preemptions == 0
    # equal priorities: as they came, and nobody gives way
    again = [make_request(scheduler, 3, 5) for _ in range(4)]
    for request in again:
        scheduler.add(request)
    run_all(scheduler, model)
    assert all(request.metrics.num_preemptions == 0 for request in again)


def test_priorities_of_an_engine() -> None:
    with toy_llm(max_num_seqs=1) as llm:
        outputs = llm.generate(PROMPTS[:3], greedy(5), priority=[3, 1, 2])
        ends = [output.metrics.finished_time for output in outputs]
        assert ends[1] < ends[2] < ends[0]
        assert tokens_of(outputs) == [toy_greedy(prompt, 5) for prompt in PROMPTS[:3]]
        with pytest.raises(ValueError, match="one number or one per prompt"):
            llm.generate(PROMPTS[:3], greedy(5), priority=[1])
        with llm.stream([1], SamplingParams(temperature=0, max_tokens=3), priority=1) as stream:
            assert [t for o in stream for c in o.outputs for t in c.token_ids] == toy_greedy([1], 3)
        assert_idle(llm)
