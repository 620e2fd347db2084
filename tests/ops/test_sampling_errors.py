"""Every argument check of sample and verify_draft answers with one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sampling_on_device
from fastinfer.ops.sampling import sample, verify_draft
from helpers import refuses

device = sampling_on_device.device
B, K, V = 3, 2, 7
LOGITS, TARGET = torch.randn(B, V), torch.randn(B, K + 1, V)
IDS, Q = torch.zeros(B, K, dtype=torch.int64), torch.full((B, K, V), 1 / V)
MASK, COUNTS = torch.zeros(B, V, dtype=torch.bool), torch.zeros(B, V, dtype=torch.int32)
ROW = torch.ones(B)


def strided(t: Tensor) -> Tensor:
    """Like t, last dimension not contiguous."""
    return torch.stack([t, t], -1)[..., 0]


PER_ROW = [
    ("temperature", ROW),
    ("top_k", ROW.int()),
    ("top_p", ROW),
    ("min_p", ROW),
    ("seeds", ROW.long()),
    ("steps", ROW.long()),
]
PENALTIES = [
    ("repetition_penalty", ROW),
    ("presence_penalty", ROW),
    ("frequency_penalty", ROW),
]


@pytest.mark.parametrize(("name", "good"), PER_ROW + PENALTIES)
def test_per_row_parameters(name: str, good: Tensor) -> None:
    extra = {"output_counts": COUNTS} if "penalty" in name else {}
    calls = [("sample", lambda v: sample(LOGITS, **{name: v}, **extra))]
    if not extra:
        calls.append(("verify_draft", lambda v: verify_draft(TARGET, IDS, **{name: v})))
    for op, call in calls:
        call(good)
        refuses(lambda: call(good.double()), op, name, "torch.float64", ".to(dtype)")  # noqa: B023
        refuses(lambda: call(torch.cat([good, good])), op, name, "[3]", "[6]")  # noqa: B023
        refuses(lambda: call(good[:, None]), op, name, "[3]", "[3, 1]")  # noqa: B023
        refuses(lambda: call(strided(good)), op, name, "contiguous")  # noqa: B023
        refuses(lambda: call(0.5), op, name, "tensor", "float", "torch.full")  # noqa: B023


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"logits": LOGITS[0]}, ("logits", "2 dimensions", "[7]")),
        ({"logits": TARGET}, ("logits", "2 dimensions")),
        ({"logits": LOGITS.double()}, ("logits", "torch.float64")),
        ({"logits": LOGITS.long()}, ("logits", "torch.int64")),
        ({"logits": strided(LOGITS)}, ("logits", "contiguous")),
        ({"logits": LOGITS[:, :0]}, ("logits", "columns", "[3, 0]")),
        ({"logits": torch.empty(0, 2**23)}, ("logits", "columns", "8388607")),
        ({"prompt_mask": MASK.int()}, ("prompt_mask", "torch.bool")),
        ({"prompt_mask": MASK[:2]}, ("prompt_mask", "[3, 7]", "[2, 7]")),
        ({"prompt_mask": strided(MASK)}, ("prompt_mask", "contiguous")),
        ({"output_counts": COUNTS.long()}, ("output_counts", "torch.int32")),
        ({"output_counts": COUNTS[:, :5]}, ("output_counts", "[3, 7]", "[3, 5]")),
        ({"output_counts": strided(COUNTS)}, ("output_counts", "contiguous")),
        ({"repetition_penalty": ROW}, ("repetition_penalty", "prompt_mask or output_counts")),
        ({"presence_penalty": ROW}, ("presence_penalty", "output_counts")),
        (
            {"frequency_penalty": ROW, "prompt_mask": MASK},
            ("frequency_penalty", "output_counts", "None"),
        ),
        ({"num_top_logprobs": -1}, ("num_top_logprobs", ">= 0", "-1")),
        ({"num_top_logprobs": V + 1}, ("num_top_logprobs", "at most", "7", "8")),
        ({"out": ROW}, ("out", "torch.int64")),
        ({"out": torch.empty(2, dtype=torch.int64)}, ("out", "[3]", "[2]")),
        ({"out": strided(ROW.long())}, ("out", "contiguous")),
        ({"logits": LOGITS.clone().requires_grad_()}, ("requires grad",)),
    ],
    ids=lambda v: str(list(v)) if isinstance(v, dict) else "",
)
def test_sample(kwargs: dict[str, Any], words: tuple[str, ...]) -> None:
    refuses(lambda: sample(**{"logits": LOGITS, **kwargs}), "sample", *words)


def test_outputs_of_the_raw_operator() -> None:
    outputs = {
        "token_ids": torch.empty(B, dtype=torch.int64),
        "logprobs": torch.empty(B),
        "top_ids": torch.empty(B, 2, dtype=torch.int64),
        "top_logprobs": torch.empty(B, 2),
    }
    parameters = dict.fromkeys([n for n, _ in PER_ROW + PENALTIES])
    rest = {**parameters, "prompt_mask": None, "output_counts": None, "workspace": None}
    for name, bad in (
        ("logprobs", torch.empty(B + 1)),
        ("top_ids", torch.empty(B, 2)),
        ("top_logprobs", torch.empty(B, 3)),
        ("top_logprobs", None),
    ):
        call = {**rest, **outputs, name: bad}
        refuses(lambda: torch.ops.fastinfer.sample(LOGITS, **call), "sample", name)  # noqa: B023


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"target_logits": LOGITS}, ("target_logits", "3 dimensions")),
        ({"target_logits": TARGET.long()}, ("target_logits", "torch.int64")),
        ({"target_logits": strided(TARGET)}, ("target_logits", "contiguous")),
        ({"target_logits": TARGET[:, :, :0]}, ("target_logits", "columns")),
        (
            {"target_logits": TARGET[:, :0], "draft_token_ids": IDS[:, :0]},
            ("target_logits", "k + 1", "[3, 0, 7]"),
        ),
        ({"target_logits": TARGET[:, :2]}, ("draft_token_ids", "[3, 1]", "[3, 2]")),
        ({"draft_token_ids": IDS.float()}, ("draft_token_ids", "torch.float32")),
        ({"draft_token_ids": IDS[:2]}, ("draft_token_ids", "[3, 2]", "[2, 2]")),
        ({"draft_token_ids": strided(IDS)}, ("draft_token_ids", "contiguous")),
        ({"draft_probs": Q.half()}, ("draft_probs", "torch.float32", "torch.float16")),
        ({"draft_probs": Q[:, :1]}, ("draft_probs", "[3, 2, 7]", "[3, 1, 7]")),
        ({"draft_probs": strided(Q)}, ("draft_probs", "contiguous")),
        ({"num_draft_tokens": ROW}, ("num_draft_tokens", "torch.int32")),
        ({"num_draft_tokens": torch.ones(2).int()}, ("num_draft_tokens", "[3]", "[2]")),
        ({"num_draft_tokens": 2}, ("num_draft_tokens", "tensor", "int")),
        ({"draft_probs": Q.clone().requires_grad_()}, ("requires grad",)),
    ],
    ids=lambda v: str(list(v)) if isinstance(v, dict) else "",
)
def test_verify_draft(kwargs: dict[str, Any], words: tuple[str, ...]) -> None:
    good = {"target_logits": TARGET, "draft_token_ids": IDS}
    refuses(lambda: verify_draft(**{**good, **kwargs}), "verify_draft", *words)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("temperature", -0.5, (">= 0", "-0.5", "row 1")),
        ("temperature", float("nan"), (">= 0", "nan")),
        ("top_p", 1.5, ("between 0 and 1", "1.5")),
        ("top_p", -0.5, ("between 0 and 1", "-0.5")),
        ("min_p", 1.5, ("between 0 and 1", "1.5")),
        ("repetition_penalty", 0.0, ("> 0", "row 1")),
    ],
)
def test_values_under_validation(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, bad: float, words: tuple[str, ...]
) -> None:
    good, values = torch.full((B,), 0.5), torch.full((B,), 0.5)
    values[1] = bad
    extra = {"prompt_mask": MASK} if name == "repetition_penalty" else {}
    sample(LOGITS, **{name: values}, **extra)  # not looked at without validation
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    sample(LOGITS, **{name: good}, **extra)
    refuses(lambda: sample(LOGITS, **{name: values}, **extra), "sample", name, *words)
    if not extra:
        refuses(lambda: verify_draft(TARGET, IDS, **{name: values}), "verify_draft", name, *words)


def test_drafts_under_validation(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    for bad in (-1, V, 2**40):
        ids = IDS.clone()
        ids[2, 1] = bad
        refuses(lambda: verify_draft(TARGET, ids), "draft_token_ids", str(bad), "row 2")  # noqa: B023
        verify_draft(TARGET, ids, num_draft_tokens=torch.tensor([2, 0, 1]))  # not a draft
    for bad in (-1, K + 1):
        num = torch.tensor([0, bad, 0], dtype=torch.int32)
        refuses(
            lambda: verify_draft(TARGET, IDS, num_draft_tokens=num),  # noqa: B023
            "num_draft_tokens",
            f"between 0 and {K}",
            f"got {bad} in row 1",
        )
