"""Codes of 4 or 8 bits in int32 words, the way checkpoint formats store them.

Element i of a packed run sits in word i // (32 / bits). Its place inside the word is
`i % (32 / bits)` in natural order. AWQ's GEMM format interleaves eight 4-bit columns instead:
nibble p of the word holds column AWQ_ORDER[p].
"""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NATURAL_ORDER = tuple(range(8))


def unpack_words(
    words: Tensor, bits: int, dim: int, *, size: int | None = None, awq: bool = False
) -> Tensor:
    """int32 words -> uint8 codes: `dim` grows by 32 / bits.

    Args:
        words: int32, any shape.
        bits: 4 or 8.
        dim: dimension along which the codes were packed.
        size: number of codes to keep along `dim` (the last word may be padded). None: all.
        awq: AWQ's order inside a word instead of the natural one (4 bits only).

    Returns:
        uint8 tensor.
    """
    dim %= words.dim()
    order = _order(bits, awq)
    shape = [*words.shape[: dim + 1], len(order), *words.shape[dim + 1 :]]
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for place, column in enumerate(order):
        # A right shift of a negative int32 fills with ones, hence the mask.
        codes.select(dim + 1, column).copy_((words >> (place * bits)) & ((1 << bits) - 1))
    codes = codes.flatten(dim, dim + 1)
    return codes if size is None else codes.narrow(dim, 0, size)


def pack_words(codes: Tensor, bits: int, dim: int, *, awq: bool = False) -> Tensor:
    """uint8 codes -> int32 words: the inverse of `unpack_words`; a last word is filled up with
    zeros.
    """
    dim %= codes.dim()
    order = _order(bits, awq)
    missing = -codes.shape[dim] % len(order)
    if missing:
        shape = list(codes.shape)
        shape[dim] = missing
        codes = torch.cat([codes, codes.new_zeros(shape)], dim)
    columns = codes.unflatten(dim, (-1, len(order)))
    words = torch.zeros_like(columns.select(dim + 1, 0), dtype=torch.int32)
    for place, column in enumerate(order):
        # The top place reaches the sign bit: such words are negative as int32.
        words |= columns.select(dim + 1, column).to(torch.int32) << (place * bits)
    return words


def _order(bits: int, awq: bool) -> tuple[int, ...]:
    """Place in the word -> element of the run."""
    if awq and bits != 4:
        raise ValueError(f"AWQ's interleaved order exists for 4 bits only, got bits {bits}")
    return AWQ_ORDER if awq else NATURAL_ORDER[: 32 // bits]
