"""Codes of 4 or 8 bits in int32 words, the way checkpoint formats store them.

Element i of a packed run sits in word i // (32 / bits). Its place inside the word is `i % (32 /
bits)` in natural order; AWQ's GEMM
format interleaves eight 4-bit columns as 0, 2, 4, 6, 1, 3, 5, 7 instead (nibble p of the word holds
column AWQ_ORDER[p]).
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
        awq: AWQ's order inside a word instead of the natural one.

    Returns:
        uint8 tensor.
    """
    per_word = 32 // bits
    dim %= words.dim()
    order = AWQ_ORDER if awq else range(per_word)
    # A right shift of a negative int32 fills with ones, hence the mask.
    shifts = torch.empty(per_word, dtype=torch.int32)
    for place, column in enumerate(order):
        shifts[column] = place * bits
    shifts = shifts.to(words.device).view(-1, *[1] * (words.dim() - 1 - dim))
    codes = (words.unsqueeze(dim + 1) >> shifts) & ((1 << bits) - 1)
    codes = codes.to(torch.uint8).flatten(dim, dim + 1)
    return codes if size is None else codes.narrow(dim, 0, size)


def pack_words(codes: Tensor, bits: int, dim: int, *, awq: bool = False) -> Tensor:
    """uint8 codes -> int32 words: the inverse of `unpack_words`; a last word is filled up with
    zeros.
    """
    per_word = 32 // bits
    dim %= codes.dim()
    missing = -codes.shape[dim] % per_word
    if missing:
        shape = list(codes.shape)
        shape[dim] = missing
        codes = torch.cat([codes, codes.new_zeros(shape)], dim)
    codes = codes.unflatten(dim, (-1, per_word)).movedim(dim + 1, 0).to(torch.int64)
    words = torch.zeros_like(codes[0])
    order = AWQ_ORDER if awq else range(per_word)
    for place, column in enumerate(order):
        words |= codes[column] << (place * bits)
    # Words with the top bit set are negative as int32.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
