"""Bursts of speculation on the GPU: the kernel between two checks is its twin."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fastinfer import LLM, SamplingParams
from fastinfer.engine import rounds
from fastinfer.engine.bursts import Bursts
from helpers import devices
from rounds_case import make_tensors, numbers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in devices("sample"), reason="there is no GPU"),
]

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("history", [True, False])
def test_the_kernel_is_its_twin(k: int, history: bool) -> None:
    rng = random.Random(k)
    for case in range(20):
        rows = [[rng.randrange(4) for _ in range(rng.randint(2, 60))] for _ in range(case % 5 + 1)]
        capacity = [len(row) + rng.randint(-1, 3 * k) for row in rows]
        capacity[-1] = rng.choice((capacity[-1], -1))  # nobody
        size = rng.choice((1, 4, 16))
        cpu = make_tensors(k, rows, capacity, block_size=size, history=history)
        gpu = {name: tensor.cuda() for name, tensor in cpu.items()}
        both = [rounds.Rounds(t, **numbers(t, k, size)) for t in (cpu, gpu)]
        if not history:
            drafts = torch.tensor([rng.randrange(60) for _ in range(k * len(rows))])
            for tensors in (cpu, gpu):
                tensors["draft_drawn"].copy_(drafts)
        for what in (rounds.PREPARE, rounds.ADVANCE, rounds.ADVANCE, rounds.ADVANCE):
            for one in both:
                one(what)
                if not history:
                    one(rounds.ROWS)
            for name, tensor in cpu.items():
                assert torch.equal(tensor, gpu[name].cpu()), (case, what, name)
            # what the check draws next: the drafts, with some mistakes
            drawn = cpu["input_ids"].roll(-1).clone()
            for i in range(len(drawn)):
                if rng.random() < 0.2 or drawn[i] >= 50:
                    drawn[i] = rng.randrange(4)
            for tensors in (cpu, gpu):
                tensors["drawn"].copy_(drawn)


@pytest.mark.parametrize("drafter", ["ngram", str(TINY / "draft")], ids=["ngram", "draft"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_to_the_last_bit(drafter: str, temperature: float, monkeypatch) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=90, ignore_eos=True)
    prompts = ["Count from one to twenty.", "Once upon a time", "The dog"]
    settings = {"device": "cuda", "num_blocks": 200, "max_num_seqs": 8, "progress": False}
    bursts = []
    launch = Bursts.launch

    def counted(self: Bursts, plan):  # type: ignore[no-untyped-def]
        bursts.append(plan.burst)
        return launch(self, plan)

    monkeypatch.setattr(Bursts, "launch", counted)
    with LLM(TINY / "model", batch_invariant=True, **settings) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    for adaptive in (False, True):
        with LLM(
            TINY / "model",
            batch_invariant=True,
            speculative=drafter,
            adaptive_speculation=adaptive,
            **settings,
        ) as llm:
            for steps in (None, 2, 8):
                llm.core.speculator.burst_steps = steps
                got = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
                assert got == wanted, (adaptive, steps)
            stats = llm.stats()
            assert stats.num_accepted_tokens > 0 and stats.kv_blocks_used == 0
    assert len(bursts) > 4
