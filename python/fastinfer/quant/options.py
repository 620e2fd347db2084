"""The options of `fastinfer quantize`, and what they mean for each method."""

from __future__ import annotations

from dataclasses import dataclass

from .methods import METHODS, MethodOptions
from .rtn import GridOptions

# Format a method's result is written in unless another is asked for.
FORMAT_OF = {
    "rtn": "compressed-tensors",
    "gptq": "gptq",
    "awq": "awq",
    "smoothquant": "compressed-tensors",
}


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What to make of a checkpoint.

    Attributes:
        method: "rtn", "awq", "gptq" or "smoothquant".
        bits: 4 or 8; None: 4, and 8 for SmoothQuant, which has no other.
        group_size: input channels per scale, -1 for all; None: 128, and -1 for SmoothQuant.
        symmetric: None: False for AWQ, else True.
        act_order: GPTQ: columns with the largest inputs first.
        static_groups: GPTQ with act-order: groups of neighbours with grids from the original
            weights, so that nothing is permuted at run time.
        format: one of FORMATS; None: the method's own (RTN and SmoothQuant: compressed-tensors).
        skip: patterns of layers left in floating point: names, whole parts of names, or "re:...".
        samples: pieces of calibration text.
        seqlen: tokens per piece.
        damp: GPTQ, see `MethodOptions`.
        alpha: SmoothQuant, see `MethodOptions`.
        eval_window: tokens the model sees at once while its perplexity is measured; None: 2048 or
            what the model can.
    """

    method: str = "rtn"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool = False
    static_groups: bool = True
    format: str | None = None
    skip: tuple[str, ...] = ("lm_head",)
    samples: int = 128
    seqlen: int = 512
    damp: float | None = None
    alpha: float = 0.5
    eval_window: int | None = None


def method_options(options: QuantizeOptions) -> MethodOptions:
    """Fill in the defaults of the method, refuse what it does not have."""
    method = options.method
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    bits, group_size, symmetric = options.bits, options.group_size, options.symmetric
    if method == "smoothquant":
        if bits not in (None, 8) or group_size not in (None, -1) or symmetric is False:
            raise ValueError(
                "quantize: smoothquant must have 8 bits, group_size -1 and symmetric weights, got "
                f"{bits}, {group_size} and symmetric={symmetric}; leave them out"
            )
        bits, group_size, symmetric = 8, -1, True
    if options.act_order and method != "gptq":
        raise ValueError(f"quantize: act_order must be used with gptq, got {method}")
    if options.damp is not None and not 0 < options.damp < 1:
        raise ValueError(f"quantize: damp must be between 0 and 1, got {options.damp}")
    if not 0 <= options.alpha <= 1:
        raise ValueError(f"quantize: alpha must be in 0..1, got {options.alpha}")
    grid = GridOptions(
        4 if bits is None else bits,
        128 if group_size is None else group_size,
        (method != "awq") if symmetric is None else symmetric,
    )
    static = options.act_order and options.static_groups
    return MethodOptions(method, grid, options.act_order, static, options.damp, options.alpha)
