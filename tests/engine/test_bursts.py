"""Steps of speculation that follow each other on the device: the same tokens, fewer looks."""

from __future__ import annotations

import ctypes
import random
import re
from pathlib import Path

import pytest
from engine_toy import assert_idle

from fastinfer import LLM, SamplingParams
from fastinfer._host_loader import load_host
from fastinfer.engine import rounds
from fastinfer.engine.bursts import MAX_STEPS, Bursts
from rounds_case import make_tensors, numbers

TINY = Path(__file__).parents[2] / "examples" / "tiny"
STORIES = TINY.joinpath("heldout.txt").read_text(encoding="utf-8").split("<|begin|>")[1:]
TEXTS = [STORIES[0][:60], "Once upon a time", STORIES[2][:150], "Count from three to seven."]
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=24, ignore_eos=True),
    "mixed": [SamplingParams(temperature=t, seed=1, max_tokens=9 + t) for t in (0, 1, 0, 2)],
    "stops": SamplingParams(temperature=0, max_tokens=40, stop=["the"], min_tokens=5),
}


def tokens(outputs: list) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.outputs]


def load(**settings: object) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "num_blocks": 120, "progress": False}
    return LLM(TINY / "model", **{**defaults, **settings})


class Counted:
    """Counts the bursts of an engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[tuple[int, int]] = []
        self.behind = 0
        launch, go_on = Bursts.launch, Bursts.go_on

        def counted(bursts: Bursts, plan):  # type: ignore[no-untyped-def]
            self.plans.append(plan.burst)
            return launch(bursts, plan)

        def counted_too(bursts: Bursts, plan, room):  # type: ignore[no-untyped-def]
            self.behind += 1
            return go_on(bursts, plan, room)

        monkeypatch.setattr(Bursts, "launch", counted)
        monkeypatch.setattr(Bursts, "go_on", counted_too)


def bursting(steps: int = 3, **settings: object) -> LLM:
    llm = load(cuda_graphs=True, adaptive_speculation=False, **settings)
    assert llm.core.speculator is not None and llm.core.speculator.bursts is not None
    llm.core.speculator.burst_steps = steps
    return llm


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    with load() as llm:
        return {name: tokens(llm.generate(TEXTS, p)) for name, p in PARAMS.items()}


@pytest.mark.parametrize("drafter", ["ngram", TINY / "draft"], ids=["ngram", "draft"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_speculative_tokens": 4},
        {"num_speculative_tokens": 1, "steps": 8},
        {"num_speculative_tokens": 16, "block_size": 5, "steps": 2},
        {"num_speculative_tokens": 3, "num_blocks": 9, "swap_space": 1 << 26},
        {"num_speculative_tokens": 2, "max_num_batched_tokens": 64, "max_num_seqs": 2},
        {"num_speculative_tokens": 4, "async_scheduling": True},
        {"num_speculative_tokens": 2, "async_scheduling": True, "num_blocks": 9, "steps": 2},
    ],
    ids=str,
)
def test_the_tokens_do_not_change(expected, drafter, settings, monkeypatch) -> None:
    counted = Counted(monkeypatch)
    with bursting(speculative=drafter, **settings) as llm:
        for name, params in PARAMS.items():
            assert tokens(llm.generate(TEXTS, params)) == expected[name], name
        assert len(counted.plans) > 4
        assert (counted.behind > 0) == ("async_scheduling" in settings)
        stats = llm.stats()
        assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
        assert_idle(llm)
        if settings.get("num_blocks") == 9:
            assert stats.num_preemptions > 0
        if drafter != "ngram" and settings["num_speculative_tokens"] < 16:
            assert stats.num_accepted_tokens > 0.25 * stats.num_draft_tokens


def test_a_burst_is_one_step_and_counts_its_checks(monkeypatch) -> None:
    counted = Counted(monkeypatch)
    with bursting(8, speculative=TINY / "draft", num_speculative_tokens=4) as llm:
        (output,) = llm.generate(TEXTS[0], PARAMS["greedy"])
        metrics = output.metrics
        assert metrics.num_output_tokens == 24
        assert llm.stats().num_steps == len(counted.plans) + 1 < 8  # and the prompt
        assert metrics.num_verifications >= 24 / 5
        assert (
            metrics.accepted_length == 1 + metrics.num_accepted_tokens / metrics.num_verifications
        )
        # the draft model goes on from where a burst has left it
        ran = []
        drafter = llm.core.speculator.drafter
        monkeypatch.setattr(drafter, "_run_behind", lambda behind: ran.append(behind))
        llm.generate(TEXTS[0], PARAMS["greedy"])
        assert len(ran) <= 1


def test_requests_that_want_more_than_tokens_and_waiting_ones_have_no_bursts(monkeypatch) -> None:
    counted = Counted(monkeypatch)
    with bursting(speculative="ngram", max_num_seqs=1, num_speculative_tokens=4) as llm:
        llm.generate(TEXTS[3], SamplingParams(temperature=0, max_tokens=20, logprobs=1))
        llm.generate(TEXTS[3], SamplingParams(temperature=0, max_tokens=20, presence_penalty=1))
        assert not counted.plans
        llm.generate(TEXTS[:2], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        alone = len(counted.plans)
        assert 0 < alone < 20  # the second request, when the first had ended
        for bucket, seconds in ((0, 1e-4), (0, 1.0)):
            llm.core.speculator.burst_steps = None
            llm.core.speculator._seconds = {bucket: seconds}
        assert llm.core.speculator.bursts.steps(1e-4) == 8
        assert llm.core.speculator.bursts.steps(5e-3) == 0


def test_block_tables_may_be_read_sixteen_bytes_at_a_time() -> None:
    with bursting(speculative="ngram", num_speculative_tokens=1) as llm:
        bursts = llm.core.speculator.bursts
        for rows in (1, 2, 4, 8):
            bucket = bursts._bucket(rows, 1)
            assert bucket.tensors["tables"].data_ptr() % 16 == 0
            assert bucket.tensors["tables"].numel() == rows * bursts._held.tables.shape[1]


def test_a_burst_forgets_what_the_blocks_that_it_writes_held_for_others() -> None:
    with bursting(8, speculative=TINY / "draft", num_speculative_tokens=4, block_size=4) as llm:
        core, used = llm.core, set()
        drafter = core.speculator.drafter
        drafter._content.update(dict.fromkeys(range(120), b"of others"))
        core.on_plan = lambda plan: [used.update(c.request.block_table) for c in plan.chunks]
        llm.generate(TEXTS[0], PARAMS["greedy"])
        assert len(used) > 6
        assert all(drafter._content.get(block) != b"of others" for block in used)


def test_catching_up_keeps_to_the_budget_of_a_step(expected, monkeypatch) -> None:
    budget, ran = 32, {}
    settings = {"max_num_batched_tokens": budget, "num_speculative_tokens": 1}
    with bursting(2, speculative=TINY / "draft", **settings) as llm:
        core = llm.core
        drafter, wants = core.speculator.drafter, core.speculator.wants
        run = drafter._run_behind

        def noted(behind) -> None:  # type: ignore[no-untyped-def]
            ran[core.num_steps] = ran.get(core.num_steps, 0) + sum(each[2] for each in behind)
            run(behind)

        monkeypatch.setattr(drafter, "_run_behind", noted)
        # until all of them decode, nothing is drafted: the draft model is far behind
        monkeypatch.setattr(
            core.speculator,
            "wants",
            lambda running: all(r.num_output > 3 for r in running) and wants(running),
        )
        assert tokens(llm.generate(TEXTS, PARAMS["greedy"])) == expected["greedy"]
        assert llm.stats().num_accepted_tokens > 0
    assert sum(ran.values()) > 2 * budget and max(ran.values()) <= budget


def test_no_burst_is_longer_than_what_the_device_keeps(expected, monkeypatch) -> None:
    counted = Counted(monkeypatch)
    with bursting(1000, speculative="ngram", num_speculative_tokens=2) as llm:
        assert tokens(llm.generate(TEXTS, PARAMS["greedy"])) == expected["greedy"]
    assert max(steps for steps, _ in counted.plans) == MAX_STEPS


def test_plans_of_bursts_behind_others_are_shown_once_they_are_known(monkeypatch) -> None:
    counted, seen = Counted(monkeypatch), []
    settings = {"async_scheduling": True, "num_speculative_tokens": 2}
    with bursting(2, speculative="ngram", **settings) as llm:
        llm.core.on_plan = seen.append
        llm.generate(TEXTS[:2], PARAMS["greedy"])
        assert counted.behind > 0 and len(seen) == llm.stats().num_steps
    assert all(chunk.start >= 0 for plan in seen for chunk in plan.chunks)
    assert all(plan.num_tokens == sum(chunk.count for chunk in plan.chunks) for plan in seen)


def test_the_search_is_that_of_the_host() -> None:
    rng = random.Random(0)
    for case in range(60):
        k, length = rng.choice((1, 3, 8)), rng.randint(2, 60)
        row = [rng.randrange(3) for _ in range(length)]
        tensors = make_tensors(k, [row], [length + rng.randint(0, 9)], block_size=4)
        rounds.Rounds(tensors, **numbers(tensors, k, 4))(rounds.PREPARE)
        found = load_host().propose_ngram(row, 4, 2, k)
        most = min(k, int(tensors["capacity"]) - length)
        wanted = (found * k)[:most] if found else []
        count = int(tensors["count"])
        assert tensors["input_ids"].tolist()[k + 1 - count :] == wanted, case
        assert tensors["seq_lens"].tolist() == [length + len(wanted)]


def test_the_library_and_python_agree_on_the_struct() -> None:
    source = Path(__file__).parents[2] / "csrc" / "cuda" / "common" / "speculate.cu"
    body = source.read_text().split("struct FastinferSpeculation {")[1].split("};")[0]
    fields = []
    for kind, names in re.findall(r"^\s*(void\*|int64_t) ([\w, ]+);", body, re.M):
        fields += [(name.strip(), kind) for name in names.split(",")]
    kinds = {"void*": ctypes.c_void_p, "int64_t": ctypes.c_int64}
    assert [(n, kinds[kind]) for n, kind in fields] == rounds._Speculation._fields_
