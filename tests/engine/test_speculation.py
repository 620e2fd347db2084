"""Speculation changes how many steps it takes, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from engine_helpers import HOSTS, load_host_module
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

from fastinfer import LLM, SamplingParams
from fastinfer.engine.drafting import NGramDrafter
from fastinfer.engine.request import Request

INVALID = (-1, VOCAB, 2**40)


class Guesser:
    """Knows the greedy answer, and spoils some of it; `wrong` is the chance of each token."""

    def __init__(self, seed: int = 0, wrong: float = 0.3, invalid: bool = False) -> None:
        self.uses_blocks = False
        self.random, self.wrong = random.Random(seed), wrong
        self.invalid = invalid
        self.asked: list[int] = []

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        out = []
        for request, count in wanted:
            assert 0 < count <= 16
            self.asked.append(count)
            tokens = toy_greedy(request.tokens, self.random.randrange(count + 2))
            for i in range(len(tokens)):
                if self.random.random() < self.wrong:
                    tokens[i] = self.random.randrange(VOCAB)
                if self.invalid and self.random.random() < 0.2:
                    tokens[i] = self.random.choice(INVALID)
            out.append(tokens)  # one more than was asked for, at times
        return out


def guessing_llm(drafter: Guesser, k: int = 4, model: ToyModel | None = None, **settings) -> LLM:
    llm = toy_llm(
        model,
        speculative="ngram",
        num_speculative_tokens=k,
        adaptive_speculation=False,
        **settings,
    )
    if llm.core.speculator is not None:
        llm.core.speculator.drafter = drafter
    return llm


SETTINGS = [
    {},
    {"num_blocks": 8, "block_size": 4},
    {"max_num_batched_tokens": 7},
    {"max_num_seqs": 2, "block_size": 3},
    {"enable_prefix_caching": False},
    {"async_scheduling": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("invalid", [False, True])
def test_greedy_tokens_do_not_change(settings: dict, invalid: bool) -> None:
    params = [greedy(n) for n in (10, 20, 1, 17, 2)]
    for wrong in (0.0, 0.3, 1.0):
        drafter = Guesser(1, wrong, invalid)
        with guessing_llm(drafter, **settings) as llm:
            outputs = llm.generate(PROMPTS, params)
            expected = [
                toy_greedy(prompt, each.max_tokens)
                for prompt, each in zip(PROMPTS, params, strict=True)
            ]
            assert tokens_of(outputs) == expected
            assert drafter.asked
            if settings.get("num_blocks") == 8:
                assert llm.stats().num_preemptions > 0
            stats = llm.stats()
            if wrong == 0.0 and not invalid:
                assert stats.num_accepted_tokens == stats.num_draft_tokens > 0
            assert_idle(llm)


@pytest.mark.parametrize("k", range(17))
def test_every_number_of_drafts(k: int) -> None:
    for wrong in (0.0, 0.2):
        with guessing_llm(Guesser(k, wrong), k, block_size=3) as llm:
            (output,) = llm.generate([[1, 2, 3]], greedy(40))
            assert output.outputs[0].token_ids == toy_greedy([1, 2, 3], 40)
            metrics = output.metrics
            assert metrics.num_output_tokens == 40
            if k == 0:
                assert metrics.num_draft_tokens == 0 and metrics.accepted_length is None
            else:
                assert 0 <= metrics.num_accepted_tokens <= metrics.num_draft_tokens
                assert metrics.accepted_length == (
                    1 + metrics.num_accepted_tokens / metrics.num_verifications
                )


SAMPLED = [
    SamplingParams(seed=1, max_tokens=15),
    SamplingParams(seed=2, max_tokens=15, temperature=0.3, top_k=9, top_p=0.9, min_p=0.01),
    SamplingParams(seed=3, max_tokens=15, temperature=0.3, repetition_penalty=1.3),
    SamplingParams(seed=4, max_tokens=15, temperature=0.2, presence_penalty=1, logprobs=3),
    SamplingParams(max_tokens=15, n=3, temperature=0.4, min_tokens=9, stop_token_ids=[1, 2, 3]),
]


def everything(outputs: list) -> list:
    return [
        [
            (c.token_ids, c.finish_reason, c.stop_reason, c.cumulative_logprob, c.logprobs)
            for c in output.outputs
        ]
        for output in outputs
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_tokens_and_logprobs_do_not_change(settings: dict) -> None:
    with toy_llm() as llm:
        expected = everything(llm.generate(PROMPTS, SAMPLED))
    for wrong in (0.0, 0.5):
        with guessing_llm(Guesser(2, wrong), **settings) as llm:
            assert everything(llm.generate(PROMPTS, SAMPLED)) == expected
            assert llm.stats().num_accepted_tokens > 0
            assert_idle(llm)


def test_the_end_inside_an_accepted_run() -> None:
    answer = toy_greedy([1], 30)
    for length in range(1, 12):
        with guessing_llm(Guesser(0, 0.0), 16) as llm:
            stop = next(i for i in range(length - 1, 30) if answer[i] not in answer[:i])
            params = [
                greedy(length),
                greedy(30, stop_token_ids=[answer[stop]]),
                greedy(30, stop_token_ids=answer[:3], min_tokens=length + 3),
            ]
            outputs = [o.outputs[0] for o in llm.generate([[1]] * 3, params)]
            assert outputs[0].token_ids == answer[:length]
            assert outputs[1].token_ids == answer[: stop + 1]
            assert outputs[1].stop_reason == answer[stop]
            assert outputs[1].metrics.num_output_tokens == stop + 1
            assert len(outputs[2].token_ids) >= length + 3
            assert_idle(llm)


def test_drafts_end_at_the_limit_of_the_model_and_of_the_pool() -> None:
    with guessing_llm(Guesser(0, 0.0), 16, ToyModel(max_model_len=12)) as llm:
        (output,) = llm.generate([[1, 2, 3]], greedy(50))
        assert output.outputs[0].token_ids == toy_greedy([1, 2, 3], 9)
    with guessing_llm(Guesser(0, 0.0), 16, num_blocks=3, block_size=4) as llm:
        (output,) = llm.generate([[1, 2, 3]], greedy(50))
        assert output.outputs[0].token_ids == toy_greedy([1, 2, 3], 10)
        assert output.outputs[0].finish_reason == "length"


def test_streams_and_cancellation() -> None:
    with guessing_llm(Guesser(0, 0.1), 6) as llm:
        got: list[int] = []
        longest = 0
        with llm.stream([1, 2], greedy(30)) as stream:
            for output in stream:
                for completion in output.outputs:
                    got += completion.token_ids
                    longest = max(longest, len(completion.token_ids))
        assert got == toy_greedy([1, 2], 30) and longest > 1
        with llm.stream([1, 2], greedy(30)) as stream:
            next(stream)
        assert_idle(llm)


def test_guesses_on_paper_are_those_of_steps_with_drafts() -> None:
    """While nothing is drafted, acceptance is learned all the same, and no token changes."""
    for wrong in (0.0, 1.0):
        settings = {"speculative": "ngram", "num_speculative_tokens": 3, "async_scheduling": True}
        with toy_llm(max_num_seqs=16, num_blocks=400, **settings) as llm:
            speculator = llm.core.speculator
            speculator.drafter, pace = Guesser(1, wrong), speculator.pace
            assert pace.on_paper
            pace._decide = lambda running: 0
            prompts = [[i] for i in range(1, 13)]
            got = tokens_of(llm.generate(prompts, greedy(100)))
            assert got == [toy_greedy(prompt, 100) for prompt in prompts]
            assert llm.stats().num_draft_tokens == 0
            learned = [pace._learned, pace._usual.rate, pace._usual.found]
            assert learned[0] > 12 and 0.4 < learned[2] < 0.98
            assert learned[1] > 0.9 if wrong == 0.0 else learned[1] < 0.2
            assert_idle(llm)


def test_a_drafter_that_fails_ends_the_requests_and_nothing_else() -> None:
    class Broken:
        uses_blocks = False

        def propose(self, wanted: object) -> list[list[int]]:
            raise OSError("no")

    with guessing_llm(Guesser()) as llm:
        llm.core.speculator.drafter = Broken()
        with pytest.raises(OSError, match="no"):
            llm.generate([[1]], greedy(5))
        assert_idle(llm)
        llm.core.speculator.drafter = Guesser()
        assert tokens_of(llm.generate([[1]], greedy(5))) == [toy_greedy([1], 5)]


@pytest.mark.parametrize("host", HOSTS)
def test_ngram_proposals(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_host_module(host)
    monkeypatch.setenv("FASTINFER_HOST", host)
    with toy_llm() as llm:
        (request,) = [
            c.request for g in llm.core.add([(None, [9], greedy())]) for c in g.completions
        ]
        drafter = NGramDrafter(2, 3)
        for tokens, count, expected in [
            ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
            ([1, 2, 3, 4, 1, 2], 6, [3, 4, 1, 2, 3, 4]),  # goes on with its own continuation
            ([7, 7, 7], 5, [7] * 5),
            ([1, 2, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
            ([1, 2, 3], 4, []),
            ([5, 1, 6, 1], 4, []),  # one token alike is not enough
        ]:
            request.tokens = tokens
            assert drafter.propose([(request, count)]) == [expected]
        request.tokens = [9]


def test_figures() -> None:
    with guessing_llm(Guesser(3, 0.3)) as llm:
        llm.generate(PROMPTS, greedy(20))
        stats, figures = llm.stats(), llm.metrics()
        assert figures["total_draft_tokens"] == stats.num_draft_tokens > 0
        assert figures["total_accepted_tokens"] == stats.num_accepted_tokens
        assert figures["draft_acceptance_rate"] == pytest.approx(
            stats.num_accepted_tokens / stats.num_draft_tokens
        )
        assert figures["mean_accepted_length"] == pytest.approx(
            1 + stats.num_accepted_tokens / stats.num_verifications
        )
        assert stats.num_steps < 100
    with toy_llm() as llm:
        llm.generate(PROMPTS, greedy(5))
        assert "draft_acceptance_rate" not in llm.metrics()


class LikelyGuesser(Guesser):
    """One of the likeliest four tokens at every place, at random."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        out = []
        for request, count in wanted:
            tokens = list(request.tokens)
            for _ in range(count):
                tokens.append(self.random.choice(toy_logits(tokens).topk(4).indices.tolist()))
            out.append(tokens[len(request.tokens) :])
        return out


def test_the_distribution_of_sampled_tokens() -> None:
    """Chi-square of all continuations of three tokens; drafts for the second and the third."""
    count, prompt, k = 2500, [4, 2], 4
    drafter = LikelyGuesser(7)
    with guessing_llm(drafter, 2, num_blocks=400, max_num_seqs=100) as llm:
        params = SamplingParams(n=count, top_k=k, temperature=1.3, max_tokens=3)
        (output,) = llm.generate([prompt], params)
        drawn = Counter(tuple(c.token_ids) for c in output.outputs)
        assert llm.stats().num_accepted_tokens > count // 10
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in expected.items():
            top = toy_logits([*prompt, *tokens]).topk(k)
            for token, p in zip(top.indices, (top.values / 1.3).softmax(0), strict=True):
                longer[(*tokens, int(token))] = chance * float(p)
        expected = longer
    assert set(drawn) <= set(expected)
    rare = [t for t, p in expected.items() if p * count < 5]
    cells = [(drawn[t], p * count) for t, p in expected.items() if p * count >= 5]
    if rare:
        cells.append((sum(drawn[t] for t in rare), sum(expected[t] for t in rare) * count))
    chi2 = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 30
    # Wilson and Hilferty: the cube root is nearly normal; 3.3 deviations is one in 2,000
    z = ((chi2 / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 3.3
