"""The whole loop around a toy model: batching, paging, preemption, streams, faults, Ctrl-C."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
from engine_toy import (
    PROMPTS,
    VOCAB,
    ToyModel,
    assert_idle,
    greedy,
    tokens_of,
    toy_greedy,
    toy_llm,
    toy_logits,
)

from fastinfer import SamplingParams
from fastinfer.engine import EngineConfig
from fastinfer.engine.core import KEPT_RECORDS


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 64])
@pytest.mark.parametrize("budget", [1, 5, 2048])
def test_a_batch_gives_what_each_prompt_gives_alone(block_size: int, budget: int) -> None:
    llm = toy_llm(block_size=block_size, max_num_batched_tokens=budget)
    outputs = llm.generate(PROMPTS, greedy())
    assert tokens_of(outputs) == [toy_greedy(prompt, 10) for prompt in PROMPTS]
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert all(
        output.finished and output.outputs[0].finish_reason == "length" for output in outputs
    )
    assert [output.request_id for output in outputs] == ["0", "1", "2", "3", "4"]
    assert_idle(llm)


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 7}, {"max_num_batched_tokens": 5}])
def test_overlapped_steps_give_the_same(settings: dict) -> None:
    """Every step is launched before the tokens of the one before are looked at."""
    model = ToyModel(eos=(11,))
    llm = toy_llm(model, async_scheduling=True, **settings)
    params = [
        greedy(14, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=9, logprobs=2, min_tokens=5),
        SamplingParams(seed=4, max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.5),
        greedy(14, stop_token_ids=[toy_greedy(PROMPTS[3], 6)[-1]]),
        SamplingParams(seed=5, n=3, max_tokens=8),
    ]
    plain = toy_llm(ToyModel(eos=(11,)), **settings)
    expected = plain.generate(PROMPTS, params)
    outputs = llm.generate(PROMPTS, params)
    for output, other in zip(outputs, expected, strict=True):
        for a, b in zip(output.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.finish_reason, a.stop_reason, a.logprobs) == (
                b.token_ids,
                b.finish_reason,
                b.stop_reason,
                b.logprobs,
            )
    assert_idle(llm)
    for prompt in PROMPTS:
        pieces = list(llm.stream(prompt, greedy(6, ignore_eos=True)))
        assert [t for o in pieces for t in o.outputs[0].token_ids] == toy_greedy(prompt, 6)
    assert_idle(llm)


def test_a_step_is_launched_before_the_last_one_is_read() -> None:
    events: list[str] = []
    model = ToyModel()
    llm = toy_llm(model, async_scheduling=True)
    model.before = lambda: events.append("launch")
    deliver = llm.core._deliver

    def note(*results: object) -> None:
        events.append("read")
        deliver(*results)

    llm.core._deliver = note
    llm.generate([[1, 2, 3]], greedy(3))
    assert events == ["launch", "launch", "read", "launch", "read", "read"]
    events.clear()
    # penalties of a step count the tokens of the one before: these two cannot overlap
    llm.generate([[1, 2, 3]], greedy(3, frequency_penalty=0.1))
    assert events == ["launch", "read"] * 3


def test_completions_share_the_prompt() -> None:
    prompt = [i % 7 for i in range(26)]
    for settings in ({}, {"enable_prefix_caching": False}):
        llm = toy_llm(**settings)
        many = llm.generate(prompt, SamplingParams(n=4, seed=9, max_tokens=5))[0]
        for i, completion in enumerate(many.outputs):
            single = SamplingParams(seed=9 + i, max_tokens=5)
            assert completion.token_ids == llm.generate(prompt, single)[0].outputs[0].token_ids
        # 25 tokens in 6 full blocks shared by all, then two blocks of their own
        assert llm.stats().kv_blocks_peak <= 6 + 4 * 2
        assert [c.metrics.num_cached_tokens for c in many.outputs] == [0, 25, 25, 25]
        assert_idle(llm)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_tiny_pool_preempts_and_changes_nothing(prefix_caching: bool) -> None:
    llm = toy_llm(num_blocks=7, enable_prefix_caching=prefix_caching)
    outputs = llm.generate(PROMPTS, greedy(14))
    assert llm.stats().num_preemptions > 0
    assert tokens_of(outputs) == [toy_greedy(prompt, 14) for prompt in PROMPTS]
    assert sum(o.metrics.num_preemptions for o in outputs) == llm.stats().num_preemptions
    assert_idle(llm)


def test_a_cached_prefix_changes_nothing() -> None:
    llm = toy_llm()
    prefix = list(range(20))
    first = llm.generate([*prefix, 1], greedy())[0]
    second = llm.generate([*prefix, 2], greedy())[0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 20)
    assert second.outputs[0].token_ids == toy_greedy([*prefix, 2], 10)


def test_unused_slots_are_never_read() -> None:
    llm = toy_llm()
    llm._core.runner.cache.fill_(float("nan"))
    assert tokens_of(llm.generate(PROMPTS, greedy())) == [toy_greedy(p, 10) for p in PROMPTS]


def test_every_form_of_prompt() -> None:
    llm = toy_llm()
    ids = [3, 1, 4]
    expected = toy_greedy(ids, 10)
    forms = [
        ids,
        (3, 1, 4),
        {"prompt_token_ids": ids},
        [ids],
        [{"prompt_token_ids": ids}],
        np.array(ids),
        torch.tensor(ids),
        torch.tensor([ids]),
        [np.int32(i) for i in ids],
    ]
    for form in forms:
        (output,) = llm.generate(form, greedy())
        assert output.outputs[0].token_ids == expected
        assert output.prompt is None and output.outputs[0].text == ""
    assert llm.generate([], greedy()) == []
    many = llm.generate([ids, [5]], [greedy(2), greedy(3)])
    assert [len(tokens) for tokens in tokens_of(many)] == [2, 3]


def test_bad_prompts_are_refused_before_anything_starts() -> None:
    llm = toy_llm(num_blocks=4)
    other = llm.stream([1, 2], greedy(6))
    next(other)
    for prompts, message in [
        ([[1], []], "at least one token"),
        ([[1], list(range(17))], r"fit into the KV cache of 16 tokens \(4 blocks of 4\), got 17"),
        ([[1], [VOCAB]], rf"must be in \[0, {VOCAB}\), the vocabulary of the model, got {VOCAB}"),
        ([[1], [-1, 1]], "got -1"),
        ([[1], "text"], "must be token ids, because 'toy' holds no tokenizer"),
        ([[1], {"promt": [1]}], "LLM: prompt must be text, a list of token ids"),
        ([[1], [1, "a"]], "LLM: prompt must be text, a list of token ids"),
        ([[1], 3.5], "LLM: prompt must be text, a list of token ids"),
        (None, "LLM: prompts must be text, a list of token ids"),
        (b"abc", "LLM: prompts must be text, a list of token ids, or a list of these, got bytes"),
        ([[1], b"abc"], "LLM: prompt must be text, a list of token ids"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            llm.generate(prompts, greedy())
        assert "\n" not in str(caught.value)
        assert llm.stats().running + llm.stats().waiting == 1
    for params, message in [
        ([greedy()], "one or one per prompt, got 1 for 2 prompts"),
        (greedy(stop="x"), "stop needs a tokenizer and this model folder has none"),
        (greedy(stop_token_ids=[VOCAB]), r"stop_token_ids must be in \[0, 50\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.generate([[1], [2]], params)
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="shorter than max_model_len 8"):
        toy_llm(max_model_len=8).generate(list(range(8)), greedy())
    ids = [token for output in other for token in output.outputs[0].token_ids]
    assert ids == toy_greedy([1, 2], 6)[1:]  # the stream went on unharmed
    assert_idle(llm)


def test_parameters_are_copied_and_checked_again() -> None:
    llm = toy_llm()
    params = greedy()
    params.top_p = 3.0
    with pytest.raises(ValueError, match="top_p"):
        llm.generate([1], params)
    params.top_p = 1.0
    stream = llm.stream([1], params)
    params.max_tokens = 1
    assert sum(len(output.outputs[0].token_ids) for output in stream) == 10


def test_end_of_sequence_stop_ids_and_limits() -> None:
    expected = toy_greedy([3, 1, 4], 10)
    eos = expected[4]
    llm = toy_llm(ToyModel(eos=(eos,)))
    until = expected[: expected.index(eos) + 1]
    done = llm.generate([3, 1, 4], greedy())[0].outputs[0]
    assert (done.token_ids, done.finish_reason, done.stop_reason) == (until, "stop", None)
    more = llm.generate([3, 1, 4], greedy(ignore_eos=True))[0].outputs[0]
    assert (more.token_ids, more.finish_reason) == (expected, "length")
    stop = expected[2]
    early = llm.generate([3, 1, 4], greedy(stop_token_ids=[stop]))[0].outputs[0]
    assert early.token_ids == expected[: expected.index(stop) + 1]
    assert (early.finish_reason, early.stop_reason) == ("stop", stop)
    forced = llm.generate([3, 1, 4], greedy(min_tokens=8))[0].outputs[0]
    assert len(forced.token_ids) >= 8 and eos not in forced.token_ids[:7]
    unlimited = llm.generate([3, 1, 4], greedy(None, ignore_eos=True))[0].outputs[0]
    assert len(unlimited.token_ids) == min(llm.max_model_len, 401) - 3 == 398


def test_streaming_gives_the_same_as_generating() -> None:
    llm = toy_llm()
    params = SamplingParams(max_tokens=12, seed=5, logprobs=2, n=2)
    whole = llm.generate([3, 1, 4], params)[0]
    pieces = list(llm.stream([3, 1, 4], params))
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for index in range(2):
        parts = [c for piece in pieces for c in piece.outputs if c.index == index]
        joined = [token for part in parts for token in part.token_ids]
        assert joined == whole.outputs[index].token_ids
        assert [p for part in parts for p in part.logprobs] == whole.outputs[index].logprobs
        assert parts[-1].finish_reason == "length" and parts[0].finish_reason is None
        assert parts[-1].cumulative_logprob == whole.outputs[index].cumulative_logprob
    assert whole.outputs[0].token_ids != whole.outputs[1].token_ids


@pytest.mark.parametrize("overlap", [False, True])
def test_streams_and_generate_interleave(overlap: bool) -> None:
    llm = toy_llm(async_scheduling=overlap)
    one, two = llm.stream([1], greedy(20)), llm.stream([2], greedy(20))
    got = ([*next(one).outputs[0].token_ids], [*next(two).outputs[0].token_ids])
    assert tokens_of(llm.generate([3], greedy(5))) == [toy_greedy([3], 5)]
    for stream, tokens in zip((one, two), got, strict=True):
        for output in stream:
            tokens += output.outputs[0].token_ids
    assert got == (toy_greedy([1], 20), toy_greedy([2], 20))
    assert_idle(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_leaving_a_stream_frees_its_blocks(overlap: bool) -> None:
    llm = toy_llm(async_scheduling=overlap)
    for leave in ("break", "close", "with", "never started"):
        stream = llm.stream([1, 2, 3, 4, 5], greedy(50))
        if leave == "with":
            with stream:
                next(stream)
        elif leave != "never started":
            next(stream)
            assert llm.stats().kv_blocks_used == 2
        if leave == "close":
            stream.close()
            stream.close()
            assert stream._generation.completions[0].request.finish_reason == "abort"
        del stream
        gc.collect()
        assert_idle(llm)


def test_seeds_make_requests_reproducible_whatever_runs_beside() -> None:
    llm = toy_llm()
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.95, max_tokens=16, seed=42)
    alone = llm.generate([3, 1, 4], params)[0].outputs[0].token_ids
    others = [SamplingParams(max_tokens=9), greedy(), SamplingParams(seed=1, max_tokens=20)]
    batch = llm.generate([[1], [2], [9] * 9, [3, 1, 4]], [*others, params])
    assert batch[3].outputs[0].token_ids == alone
    tiny = toy_llm(num_blocks=6)
    preempted = tiny.generate([[1] * 8, [3, 1, 4]], [greedy(16), params])
    assert tiny.stats().num_preemptions > 0
    assert preempted[1].outputs[0].token_ids == alone
    other_seed = SamplingParams(temperature=1.3, max_tokens=16, seed=43)
    assert llm.generate([3, 1, 4], other_seed)[0].outputs[0].token_ids != alone


def test_requests_without_a_seed_differ_but_the_engine_seed_fixes_them() -> None:
    params = SamplingParams(max_tokens=12)
    first = tokens_of(toy_llm(seed=1).generate([[3], [3], [3]], params))
    assert len({tuple(tokens) for tokens in first}) == 3
    assert tokens_of(toy_llm(seed=1).generate([[3], [3], [3]], params)) == first
    assert tokens_of(toy_llm(seed=2).generate([[3], [3], [3]], params)) != first


def test_completion_i_of_n_uses_seed_plus_i() -> None:
    llm = toy_llm()
    many = llm.generate([3], SamplingParams(n=3, seed=2**63 - 2, max_tokens=8))[0]
    assert [completion.index for completion in many.outputs] == [0, 1, 2]
    for completion, seed in zip(many.outputs, [2**63 - 2, 2**63 - 1, -(2**63)], strict=True):
        single = llm.generate([3], SamplingParams(seed=seed, max_tokens=8))[0]
        assert single.outputs[0].token_ids == completion.token_ids


def test_sampling_follows_the_distribution() -> None:
    """Chi-square of first tokens against the softmax; fixed seeds, 44 degrees of freedom."""
    llm = toy_llm()
    count = 4000
    outputs = llm.generate([[3, 1, 4]] * count, SamplingParams(max_tokens=1))
    observed = torch.bincount(
        torch.tensor([o.outputs[0].token_ids[0] for o in outputs]), minlength=VOCAB
    )
    expected = toy_logits([3, 1, 4]).softmax(0) * count
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert 22 < chi_square < 89  # 49 degrees of freedom: outside with probability < 0.1 %


def test_penalties_see_prompt_and_output() -> None:
    llm = toy_llm()

    def expected(prompt: list[int], count: int, **penalty: float) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = toy_logits(tokens)
            output = tokens[len(prompt) :]
            seen = torch.tensor(sorted({*tokens}))
            repeat = penalty.get("repetition_penalty", 1.0)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / repeat, values * repeat)
            for token in set(output):
                logits[token] -= penalty.get("frequency_penalty", 0.0) * output.count(token)
                logits[token] -= penalty.get("presence_penalty", 0.0)
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    prompt = [random.Random(3).randrange(VOCAB) for _ in range(30)]
    settings = [
        {},
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.7, "presence_penalty": -1.0, "frequency_penalty": 0.5},
    ]
    outputs = llm.generate([prompt] * len(settings), [greedy(40, **s) for s in settings])
    assert tokens_of(outputs) == [expected(prompt, 40, **s) for s in settings]


def test_logprobs_are_those_of_the_processed_distribution() -> None:
    llm = toy_llm()
    params = SamplingParams(max_tokens=3, seed=1, logprobs=3, temperature=0.7)
    plain = SamplingParams(max_tokens=3, seed=1)
    only = SamplingParams(max_tokens=3, seed=1, logprobs=0)
    outputs = llm.generate([[3, 1, 4]] * 3, [params, plain, only])
    first, none, chosen = (output.outputs[0] for output in outputs)
    assert none.logprobs is None and none.cumulative_logprob is None
    tokens = [3, 1, 4]
    total = 0.0
    for token, entry in zip(first.token_ids, first.logprobs, strict=True):
        exact = (toy_logits(tokens) / 0.7).log_softmax(0)
        assert entry[token].logprob == pytest.approx(exact[token].item(), abs=1e-5)
        top = exact.topk(3).indices.tolist()
        assert set(entry) == {token, *top}
        for rank, other in enumerate(top, start=1):
            assert entry[other].rank == rank
            assert entry[other].logprob == pytest.approx(exact[other].item(), abs=1e-5)
            assert entry[other].decoded_token is None
        total += entry[token].logprob
        tokens.append(token)
    assert first.cumulative_logprob == pytest.approx(total)
    assert [set(entry) for entry in chosen.logprobs] == [{t} for t in chosen.token_ids]


def test_metrics_and_stats() -> None:
    llm = toy_llm(max_num_seqs=2)
    stream = llm.stream([1, 2, 3, 4, 5], greedy(3))
    waiting = [llm.stream([1], greedy(3)) for _ in range(2)]
    next(stream)
    stats = llm.stats()
    assert (stats.running, stats.waiting) == (2, 1)
    assert stats.kv_blocks_used == 3 and stats.kv_blocks_total == 100
    assert stats.kv_cache_usage == pytest.approx(0.03)
    assert stats.kv_block_bytes == 2 * 2 * 4 * 1 * 2 * 4
    for each in (stream, *waiting):
        last = list(each)[-1]
        assert last.metrics.ttft > 0 and last.metrics.e2el >= last.metrics.ttft
        assert last.metrics.num_output_tokens == 3 and last.metrics.finished_time is not None
    figures = llm.metrics()
    assert (figures["completed"], figures["failed"]) == (3, 0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (7, 9)
    assert llm.stats().kv_blocks_peak == 3


def test_memory_stays_flat_over_many_requests() -> None:
    llm = toy_llm(num_blocks=8)
    for _ in range(3):
        llm.generate([[1]] * 100, greedy(1))
    assert llm._core.records.maxlen == KEPT_RECORDS and len(llm._core.records) == 300
    assert not llm._core._completions and not llm._core.scheduler.requests


def test_cache_size_from_bytes() -> None:
    block = 2 * 2 * 4 * 1 * 2 * 4
    llm = toy_llm(num_blocks=None, kv_cache_memory=10 * block + 1)
    assert llm.stats().kv_blocks_total == 10
    with pytest.raises(ValueError, match=f"at least one block of {block} bytes, got 5"):
        toy_llm(num_blocks=None, kv_cache_memory=5)
    with pytest.raises(ValueError, match="must fit into the memory of cpu"):
        toy_llm(num_blocks=2**50)
    with pytest.raises(ValueError, match="must fit into the memory of cpu; lower num_blocks"):
        toy_llm(num_blocks=2**36, kv_cache_dtype="int8")
    # no more than the requests can use: 3 requests of 500 tokens in blocks of 4
    assert toy_llm(num_blocks=None, max_num_seqs=3).stats().kv_blocks_total == 375


@pytest.mark.parametrize(
    ("budget", "longest", "seqs", "prompts"),
    [(64, 500, 8, [64]), (64, 21, 8, [20, 20, 20, 4]), (64, 21, 2, [20, 20]), (5, 2, 9, [1] * 5)],
)
def test_the_step_that_memory_is_measured_with_is_the_largest(
    budget: int, longest: int, seqs: int, prompts: list[int]
) -> None:
    llm = toy_llm(ToyModel(longest))
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": seqs, "block_size": 4}
    runner = llm.core.runner
    runner._drawn = torch.zeros(seqs, dtype=torch.int64)
    batch = runner._largest_step(EngineConfig(model="toy", **settings))
    assert batch.meta.cu_seqlens_q.diff().tolist() == prompts == batch.meta.seq_lens.tolist()
    assert len(batch.sampling) == min(seqs, sum(prompts))
    slots = batch.meta.slot_mapping.tolist()
    assert len(set(slots)) == len(slots) == sum(prompts)
    assert len(runner.launch(batch).result().token_ids) == len(batch.sampling)
