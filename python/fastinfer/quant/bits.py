"""Codes of 4 or 8 bits in int32 words, the way checkpoint formats store them.

Element i of a packed run sits in word i // (32 / bits). Its place inside the word is
`i % (32 / bits)` in natural order. AWQ's GEMM format interleaves eight 4-bit columns instead:
nibble p of the word holds column (0, 2, 4, 6, 1, 3, 5, 7)[p].
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    _check_order(bits, awq)
    # Bytes instead of shifted words: little-endian, so places follow each other.
    data = words.movedim(dim, -1).contiguous().view(torch.uint8)
    if bits == 4:
        data = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)
    if awq:
        # Even columns sit in the low half of a word, odd ones in the high half.
        data = data.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)
    codes = data.movedim(-1, dim)
    return codes if size is None else codes.narrow(dim, 0, size)


def pack_words(codes: Tensor, bits: int, dim: int, *, awq: bool = False) -> Tensor:
    """uint8 codes -> int32 words: the inverse of `unpack_words`; a last word is filled up with
    zeros.
    """
    _check_order(bits, awq)
    data = codes.movedim(dim, -1)
    missing = -data.shape[-1] % (32 // bits)
    if missing:
        data = torch.nn.functional.pad(data, (0, missing))
    if awq:
        data = data.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)
    if bits == 4:
        pairs = data.unflatten(-1, (-1, 2))
        data = pairs[..., 0] | (pairs[..., 1] << 4)
    # Through one dimension: those of size 1 may have strides that no int32 view can have.
    words = data.contiguous().flatten().view(torch.int32)
    return words.view(*data.shape[:-1], data.shape[-1] // 4).movedim(-1, dim)


def _check_order(bits: int, awq: bool) -> None:
    if awq and bits != 4:
        raise ValueError(f"AWQ's interleaved order exists for 4 bits only, got bits {bits}")
