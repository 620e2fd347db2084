"""What the operator tests share: devices, instruction-set levels, numerics rules, opcheck and
compile checks.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastinfer import _lib

# Operators with a CUDA kernel: their tests also run on the GPU where there is one.
CUDA_OPS: frozenset[str] = frozenset(
    {
        "flash_attn_fwd",
        "flash_attn_varlen_fwd",
        "flash_attn_kvcache",
        "plan_decode",
        "merge_attn_states",
        "reshape_and_cache",
        "gather_cache",
        "copy_blocks",
        "swap_blocks",
        "repeat_kv",
        "apply_rotary",
        "apply_rotary_and_cache",
        "gelu_and_mul",
        "int4_linear",
        "int8_linear",
        "linear",
        "fused_add_rms_norm",
        "dequantize_weight",
        "pack_weight",
        "quantize_per_token",
        "quantize_weight",
        "rms_norm",
        "rms_norm_quant",
        "silu_and_mul",
        "silu_and_mul_quant",
        "sample",
        "verify_draft",
        "w8a8_linear",
    }
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
ISA_LEVELS = ("generic", "avx2", "avx512", "vnni")


def devices(op: str) -> list[str]:
    """Devices on which `op`, by its name in csrc/schemas.cpp, can run here."""
    assert hasattr(_lib.ops, op), f"{op} is no operator: its tests would never see a GPU"
    return ["cpu", "cuda"] if op in CUDA_OPS and torch.cuda.is_available() else ["cpu"]


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(device)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """A tensor full of NaN (integers: of a value nobody wants): what an output or an unused slot
    holds before a call.
    """
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), device=device).to(dtype)
    return torch.full(shape, -77 if dtype.is_signed else 77, dtype=dtype, device=device)


def special_rows(x: torch.Tensor) -> torch.Tensor:
    """x [at least 8 rows, D] with rows of zeros, inf, NaN, one element, tiny and huge numbers from
    row 1 on.
    """
    huge = 6e4 if x.dtype == torch.float16 else 1e30
    x[1], x[4] = 0, 0
    x[2, 3], x[3, -1], x[4, 5] = -torch.inf, torch.nan, 3
    x[5], x[6] = x[5] * 1e-30, x[6].sign() * huge
    return x


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal, NaN included."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_close_to_reference(
    out: torch.Tensor, reference: torch.Tensor, baseline: torch.Tensor, *, factor: float = 2.0
) -> None:
    """max|out - reference| <= factor * max|baseline - reference| + rounding slack.

    reference is fp64 from the same inputs, baseline the same maths in torch at out's dtype. The
    slack is twice the effect of one
    extra rounding of the reference at out's dtype (the rule FlashAttention's tests use), plus 1e-5.
    """
    assert out.shape == reference.shape, (out.shape, reference.shape)
    if out.numel() == 0:
        return
    reference = reference.double()
    assert torch.isfinite(out.double()).all() or not torch.isfinite(reference).all(), (
        "non-finite values in the output"
    )
    rounded = reference.to(out.dtype)
    slack = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().double() + 1e-5
    error = (out.double() - reference).abs().max()
    allowed = factor * (baseline.double() - reference).abs().max() + slack
    assert error <= allowed, f"max error {error:.3e} > allowed {allowed:.3e}"


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float(
        (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-300)
    )


def opcheck(
    op: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    cuda: bool = False,
    stays: tuple[torch.Tensor, ...] = (),
) -> None:
    """torch.library.opcheck, all four checks: schema, autograd registration, fake kernel, AOT
    dispatch with dynamic shapes. `cuda`: where there is a GPU, again with every tensor there but
    those that stay on the host.
    """
    torch.library.opcheck(op, args, kwargs or {})
    if cuda and torch.cuda.is_available():

        def move(x: Any) -> Any:
            host = not isinstance(x, torch.Tensor) or any(x is t for t in stays)
            return x if host else x.cuda()

        args, kwargs = torch.utils._pytree.tree_map(move, (args, kwargs or {}))
        torch.library.opcheck(op, args, kwargs)


def compiles(fn: Callable[..., Any], *args: Any, backend: str = "aot_eager") -> Any:
    """fn(*args) under torch.compile(fullgraph=True, dynamic=True); in-place effects happen on
    args.
    """
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)(*args)


def refuses(fn: Callable[[], Any], *words: str) -> None:
    """fn must raise one sentence that contains every word (operator, argument, ...)."""
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        fn()
    text = str(caught.value)
    for word in words:
        assert re.search(re.escape(word), text), f"{word!r} not in: {text}"
    assert "\n" not in text.strip(), f"more than one line: {text}"
    assert "Error in" not in text and ".cpp" not in text, text


def available_isa_levels() -> list[str]:
    best = _lib.cpu_isa()
    return list(ISA_LEVELS[: ISA_LEVELS.index(best) + 1])


# Relative Frobenius error of a linear layer: rounding of the output plus a little.
LINEAR_BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2.2e-3}


def assert_linear_error(out: torch.Tensor, reference: torch.Tensor, *context: Any) -> None:
    """Error within LINEAR_BOUNDS, or, for a handful of outputs, what rounding the fp64
    reference alone costs.
    """
    floor = relative_error(reference.to(out.dtype), reference)
    error = relative_error(out, reference)
    assert error <= max(LINEAR_BOUNDS[out.dtype], 1.01 * floor), (error, floor, *context)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """torch's pool at n threads for the scope."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Codes = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def assert_codes_match(got: Codes, want: Codes, y: torch.Tensor) -> None:
    """int8 rows (q, scale, zeros): shapes and dtypes of `want`, scales equal to fp32 accuracy,
    codes
    that differ only where a rounding was nearly a tie, and (q - zero) * scale within half a step
    of y (a whole one when asymmetric: the zero point is rounded too, and the ends may clip).
    """
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
    q, scale, zeros = got
    torch.testing.assert_close(scale, want[1], rtol=1e-5, atol=0)
    codes, want_codes = q.double(), want[0].double()
    if zeros is not None and want[2] is not None:
        assert (zeros - want[2]).abs().max() <= 1
        codes, want_codes = codes - zeros[..., None], want_codes - want[2][..., None]
    difference = (codes - want_codes).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() <= 0.01
    step = scale.double()[..., None]
    limit = (0.5 if zeros is None else 1.0) + 1e-3
    assert ((codes * step - y.double()).abs() <= limit * step).all()


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of counts under expected probabilities; cells expected below 5 are pooled."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    assert not counts[expected == 0].any(), "a value of probability 0 was observed"
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(counts) > 1 else 1.0
