"""Sum over ranks through memory that GPUs write to each other, on request with the residual
addition and RMS norm behind it; the greatest candidate of all ranks. For
`fastinfer.distributed.PeerAllReduce`, which makes the groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _lib
from .norm import fused_add_rms_norm_reference

_all_reduce = _lib.op("peer_all_reduce")
_all_reduce_add_rms_norm = _lib.op("peer_all_reduce_add_rms_norm")
_argmax = _lib.op("peer_argmax")

ALGORITHMS = {"auto": 0, "one_shot": 1, "two_shot": 2}


def peer_all_reduce(x: Tensor, group: int, algorithm: str = "auto") -> Tensor:
    """x = x_0 + x_1 + ... over the ranks of a group, in place; the same bits on every rank.

    Args:
        x: [..., D], fp32, fp16 or bf16 on the group's CUDA device; last dimension contiguous, one
            row stride.
        group: number of a connected group, the same call on every rank.
        algorithm: "one_shot", "two_shot" or "auto" (by size).

    Returns:
        x.

    Raises:
        RuntimeError: wrong dtype, strides, device or size, the group is not connected, or the input
            requires grad.
    """
    _lib.require_tensors("peer_all_reduce", x=x)
    _lib.refuse_grad("peer_all_reduce", x)
    _all_reduce(x, group, ALGORITHMS[algorithm])
    return x


def peer_all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group: int,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`peer_all_reduce`, then `fused_add_rms_norm`, with the bits of the two, in one launch.

    Rows beyond 16 KiB, unaligned ones and a weight of another dtype than x take two launches.

    Args:
        x: [..., D], this rank's part of the sum; receives the normalised values.
        residual: like x; receives residual + sum.
        weight: [D], fp32, fp16 or bf16.
        eps: added to the mean square.
        group: number of a connected group, the same call on every rank.
        algorithm: as in `peer_all_reduce`.

    Returns:
        (x, residual), the same tensors.

    Raises:
        RuntimeError: wrong dtype, shape, strides, device or size, the group is not connected, or an
            input requires grad.
    """
    name = "peer_all_reduce_add_rms_norm"
    _lib.require_tensors(name, x=x, residual=residual, weight=weight)
    _lib.refuse_grad(name, x, residual, weight)
    _all_reduce_add_rms_norm(x, residual, weight, eps, group, ALGORITHMS[algorithm])
    return x, residual


def peer_argmax(logits: Tensor, ids: Tensor, begin: int, group: int, out: Tensor) -> Tensor:
    """Of every rank's candidate for a row the greatest: greedy tokens of a divided vocabulary.

    Args:
        logits: [B, N], this rank's columns; N = 0: it has none. fp32, fp16 or bf16 on the group's
            CUDA device, last dimension contiguous.
        ids: int64 [B], the column of each row that is this rank's candidate.
        begin: what its first column is overall; begin + N stays below 2^31.
        group: number of a connected group, the same call on every rank.
        out: int64 [B], receives begin + ids of the rank with the greatest logit: of equal ones the
            first, NaN being the least.

    Returns:
        out, the same on every rank.

    Raises:
        RuntimeError: wrong dtype, shape, strides or device, or the group is not connected.
    """
    _lib.require_tensors("peer_argmax", logits=logits, ids=ids, out=out)
    _lib.refuse_grad("peer_argmax", logits)
    _argmax(logits, ids, begin, group, out)
    return out


def peer_argmax_reference(
    parts: Sequence[Tensor], ids: Sequence[Tensor], begins: Sequence[int]
) -> Tensor:
    """Every rank's logits, candidates and first columns -> int64 [B], in plain torch."""
    values, tokens = [], []
    for part, chosen, begin in zip(parts, ids, begins, strict=True):
        value = torch.full(chosen.shape, float("-inf"), device=chosen.device)
        if part.shape[1]:
            value = part.float().gather(1, chosen[:, None])[:, 0]
        values.append(value.nan_to_num(float("-inf"), float("inf"), float("-inf")))
        tokens.append(chosen + begin)
    winner = torch.stack(values).argmax(dim=0, keepdim=True)  # the first of equal ones
    return torch.stack(tokens).gather(0, winner)[0]


def peer_all_reduce_reference(parts: Sequence[Tensor]) -> Tensor:
    """The sum of every rank's x in plain torch: fp32, in the order of the ranks, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def peer_all_reduce_add_rms_norm_reference(
    parts: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normalised, residual) from every rank's x, in plain torch."""
    return fused_add_rms_norm_reference(peer_all_reduce_reference(parts), residual, weight, eps)


def _check_x(name: str, x: Tensor, algorithm: int) -> None:
    _lib.check_dtype(name, "x", x, _lib.FLOATS)
    _lib.check(x.dim() >= 1, f"{name}: x must have at least one dimension, got {_lib.describe(x)}")
    _lib.check(
        algorithm in (0, 1, 2),
        f"{name}: algorithm must be 0 (by size), 1 (one-shot) or 2 (two-shot), got {algorithm}",
    )


@_lib.register_fake("peer_all_reduce")
def _(x: Tensor, group: int, algorithm: int) -> None:
    _check_x("peer_all_reduce", x, algorithm)


@_lib.register_fake("peer_argmax")
def _(logits: Tensor, ids: Tensor, begin: int, group: int, out: Tensor) -> None:
    name = "peer_argmax"
    _lib.check_dtype(name, "logits", logits, _lib.FLOATS)
    _lib.check(
        logits.dim() == 2, f"{name}: logits must have 2 dimensions, got {_lib.describe(logits)}"
    )
    for what, tensor in (("ids", ids), ("out", out)):
        _lib.check_dtype(name, what, tensor, (torch.int64,))
        _lib.check(
            tuple(tensor.shape) == (logits.shape[0],),
            lambda what=what, tensor=tensor: (
                f"{name}: {what} must have shape [{logits.shape[0]}], got {_lib.describe(tensor)}"
            ),
        )


@_lib.register_fake("peer_all_reduce_add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: int, algorithm: int) -> None:
    name = "peer_all_reduce_add_rms_norm"
    _check_x(name, x, algorithm)
    _lib.check_dtype(name, "weight", weight, _lib.FLOATS)
    _lib.check(
        tuple(weight.shape) == (x.shape[-1],),
        lambda: f"{name}: weight must have shape [{x.shape[-1]}], got {_lib.describe(weight)}",
    )
    _lib.check(
        residual.shape == x.shape and residual.dtype == x.dtype,
        lambda: (
            f"{name}: residual must be like x ({_lib.describe(x)}), got {_lib.describe(residual)}"
        ),
    )
