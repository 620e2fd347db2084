"""A tensor that is written may not repeat memory (expand): what came last would win."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastinfer as fi
from helpers import refuses

ROW = torch.ones(1, 64)
Q = torch.ones(1, 3, 2, 16)
CACHE = torch.zeros(1, 4, 1, 16).expand(2, 4, 1, 16)
CASES: dict[str, Callable[[], object]] = {
    "rms_norm": lambda: fi.rms_norm(torch.ones(3, 64), ROW[0], out=ROW.expand(3, 64)),
    "fused_add_rms_norm": lambda: fi.fused_add_rms_norm(
        torch.ones(3, 64), ROW.expand(3, 64), ROW[0]
    ),
    "silu_and_mul": lambda: fi.silu_and_mul(torch.ones(3, 128), out=ROW.expand(3, 64)),
    "linear": lambda: fi.linear(torch.ones(3, 64), torch.ones(64, 64), out=ROW.expand(3, 64)),
    "repeat_kv": lambda: fi.repeat_kv(Q, 2, out=torch.ones(1, 3, 1, 16).expand(1, 3, 4, 16)),
    "apply_rotary": lambda: fi.apply_rotary(
        Q[:, :1].expand(1, 3, 2, 16), None, torch.ones(3, 8), torch.ones(3, 8), inplace=True
    ),
    "reshape_and_cache": lambda: fi.reshape_and_cache(
        Q[0, :, :1], Q[0, :, :1], CACHE, CACHE.clone(), torch.arange(3)
    ),
    "flash_attn_func": lambda: fi.flash_attn_func(Q, Q, Q, out=Q[:, :1].expand(1, 3, 2, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_expanded_outputs_are_refused(name: str) -> None:
    refuses(CASES[name], name, "must not repeat memory", ".contiguous()")


def test_expanded_inputs_are_fine() -> None:
    x = torch.arange(64.0).expand(3, 64)
    assert torch.equal(fi.rms_norm(x, ROW[0]), fi.rms_norm(x.contiguous(), ROW[0]))
