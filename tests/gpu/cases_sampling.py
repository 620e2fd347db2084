"""sample and verify_draft for the generic GPU tests: every path, three logits dtypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made
from torch import Tensor

from fastinfer.ops.sampling import sample, verify_draft

Rules = dict[str, float]


def _rows(batch: int, device: str, rules: Rules) -> dict[str, Tensor]:
    made = {
        k: torch.full((batch,), v, dtype=torch.int32 if k == "top_k" else torch.float32)
        for k, v in rules.items()
    }
    made["seeds"] = torch.arange(batch) * 7919
    made["steps"] = torch.arange(batch)
    return {k: v.to(device) for k, v in made.items()}


def _sample(
    batch: int,
    vocab: int,
    dtype: torch.dtype,
    rules: Rules,
    *,
    top: int = 0,
    penalised: bool = False,
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        logits = (torch.randn(batch, vocab, generator=g, device=device) * 3).to(dtype)
        kw = _rows(batch, device, rules)
        if penalised:
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                kw[name] = torch.rand(batch, generator=g, device=device) + 0.5
            kw["prompt_mask"] = torch.rand(batch, vocab, generator=g, device=device) < 0.1
            kw["output_counts"] = torch.randint(
                0, 3, (batch, vocab), generator=g, device=device, dtype=torch.int32
            )
        ids = torch.full((batch,), -77, device=device)
        outputs = [ids]
        if top:
            outputs += [
                torch.full((batch,), float("nan"), device=device),
                torch.full((batch, top), -77, device=device),
                torch.full((batch, top), float("nan"), device=device),
            ]

        def run() -> None:
            got = sample(logits, **kw, out=ids, return_logprobs=top > 0, num_top_logprobs=top)
            for to, value in zip(outputs[1:], got[1:], strict=False):
                to.copy_(value)

        return run, outputs

    return make


def _verify(
    batch: int, k: int, vocab: int, rules: Rules, probs: bool
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        target = torch.randn(batch, k + 1, vocab, generator=g, device=device).bfloat16()
        drafts = target[:, :k].float().argmax(-1)
        drafts[::2] = torch.randint(vocab, drafts[::2].shape, generator=g, device=device)
        q = torch.softmax(target[:, :k].float(), -1) if probs else None
        kw = _rows(batch, device, rules)
        ids = torch.full((batch, k + 1), -77, device=device)
        num = torch.full((batch,), -77, device=device, dtype=torch.int32)

        def run() -> None:
            got = verify_draft(target, drafts, q, **kw)
            ids.copy_(got.token_ids)
            num.copy_(got.num_accepted)

        return run, [ids, num]

    return make


_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_ALL: Rules = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
_TOP_P: Rules = {"temperature": 1.0, "top_p": 0.9}

CASES: list[Case] = [
    Case("sample greedy bf16", _sample(3, 5003, _BF16, {"temperature": 0.0})),
    Case("sample race fp16", _sample(2, 9001, _F16, {"temperature": 1.0})),
    Case("sample list fp32", _sample(5, 2049, _F32, _ALL, top=5, penalised=True)),
    Case("sample nucleus bf16", _sample(2, 20000, _BF16, _TOP_P, top=3)),
    Case("sample wide top-k fp16", _sample(1, 20001, _F16, {"top_k": 9000}, top=1500)),
    Case("sample cluster bf16", _sample(1, 70000, _BF16, _ALL, top=20)),
    Case("sample cluster nucleus fp32", _sample(2, 70001, _F32, _TOP_P, penalised=True)),
    Case("verify list", _verify(3, 2, 9000, _ALL, probs=True)),
    Case("verify nucleus", _verify(2, 3, 9000, _TOP_P, probs=True)),
    Case("verify one-hot", _verify(4, 1, 1000, {"temperature": 0.7}, probs=False)),
]
