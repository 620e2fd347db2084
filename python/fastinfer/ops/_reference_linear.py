"""Plain-torch references of the linear and quantisation operators: slow, simple, any device.

Matrix products run in fp64. Layouts are spelled out from their definition, with no C++ involved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear in fp64, rounded to x's dtype."""
    y = x.double() @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


def _group_of(k: int, group_size: int, device: torch.device) -> Tensor:
    columns = torch.arange(k, device=device)
    return columns // (group_size if group_size > 0 else max(k, 1))


def dequantize_codes_reference(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """fp32 [N, K] from canonical tensors: (code - z) * s, or (code - middle) * s + zf."""
    group = _group_of(codes.shape[1], group_size, codes.device)
    s = scales.float()[:, group]
    middle = float(1 << (bits - 1))
    if zeros is None:
        return (codes.float() - middle) * s
    if zeros.dtype == torch.uint8:
        return (codes.float() - zeros.float()[:, group]) * s
    return (codes.float() - middle) * s + zeros.float()[:, group]


def _cuda_position(n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    """For the padded [N, K]: index into qweight.flatten() and bit shift of every code."""
    row, col = torch.arange(n)[:, None], torch.arange(k)[None, :]
    lane = row % 8 * 4 + col % 8 // 2
    register = row % 16 // 8 + 2 * (col % 16 // 8)
    half = col % 2 + 0 * row
    index = row // 64 * (k // 64) + col // 64
    index = ((index * 4 + row % 64 // 16) * 32 + lane) * 4 + col % 64 // 16
    if bits == 4:
        return index, 4 * (register + 4 * half)
    return index * 2 + register // 2, 8 * (register % 2 + 2 * half)


def _cpu_position(n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    row, col = torch.arange(n)[:, None], torch.arange(k)[None, :]
    per_word = 32 // bits
    return (row // 16 * (k // per_word) + col // per_word) * 16 + row % 16, bits * (
        col % per_word + 0 * row
    )


def _cuda_rows(n: int) -> Tensor:
    """Row number of every entry [blocks, 8, 8] of packed scales."""
    block = torch.arange(n // 64).view(-1, 1, 1, 1)
    g8, j, h = (
        torch.arange(8).view(1, -1, 1, 1),
        torch.arange(4).view(1, 1, -1, 1),
        torch.arange(2).view(1, 1, 1, -1),
    )
    return (block * 64 + j * 16 + h * 8 + g8).flatten(2)


def pack_weight_reference(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    perm: Tensor | None = None,
    layout: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """pack_weight, one code at a time."""
    codes = codes.cpu() if perm is None else codes.cpu()[:, perm.cpu().long()]
    n, k = codes.shape
    rows, cols = (64, 64) if layout == "cuda" else (16, 32 // bits)
    n_pad, k_pad = -(-n // rows) * rows, -(-k // cols) * cols
    middle = 1 << (bits - 1)
    padded = torch.full((n_pad, k_pad), middle, dtype=torch.int64)
    if zeros is not None and zeros.dtype == torch.uint8 and k:
        last = zeros.shape[1] - 1
        group = _group_of(k_pad, group_size if group_size > 0 else k_pad, codes.device)
        padded[:n] = zeros.cpu().long()[:, group.clamp(max=last)]
    padded[:n, :k] = codes.long()
    position = _cuda_position if layout == "cuda" else _cpu_position
    index, shift = position(n_pad, k_pad, bits)
    words = torch.zeros(n_pad * k_pad * bits // 32, dtype=torch.int64)
    words.index_add_(0, index.flatten(), (padded << shift).flatten())
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = (
        (n_pad // 64, k_pad // 64, 128 * bits)
        if layout == "cuda"
        else (n_pad // 16, k_pad // cols, 16)
    )

    def spread(t: Tensor | None, fill: int) -> Tensor | None:
        if t is None:
            return None
        full = torch.full((t.shape[1], n_pad), fill, dtype=t.dtype)
        full[:, :n] = t.cpu().t()
        if layout == "cuda":
            return full[:, _cuda_rows(n_pad)]
        return full if t.dtype == torch.uint8 else full.float()

    integer = zeros is not None and zeros.dtype == torch.uint8
    return words.view(shape), spread(scales, 0), spread(zeros, middle if integer else 0)


def unpack_weight_reference(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, n: int, k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Canonical codes uint8 [n, k], scales, zeros [n, G] from either layout; perm stays applied."""
    cuda = qweight.shape[2] != 16
    n_pad = qweight.shape[0] * (64 if cuda else 16)
    k_pad = qweight.shape[1] * (64 if cuda else 32 // bits)
    index, shift = (_cuda_position if cuda else _cpu_position)(n_pad, k_pad, bits)
    words = qweight.cpu().flatten().long() & 0xFFFFFFFF
    codes = (words[index] >> shift) & ((1 << bits) - 1)

    def gather(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        flat = t.cpu().flatten(1)
        if cuda:
            natural = torch.empty_like(flat)
            natural[:, _cuda_rows(n_pad).flatten()] = flat
            flat = natural
        return flat[:, :n].t().contiguous()

    gathered = gather(scales)
    assert gathered is not None
    return codes[:n, :k].to(torch.uint8), gathered, gather(zeros)


def dequantize_weight_reference(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    perm: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dequantize_weight in plain torch."""
    canonical = unpack_weight_reference(qweight, scales, zeros, bits, out_features, in_features)
    packed_order = dequantize_codes_reference(*canonical, bits, group_size)
    w = packed_order
    if perm is not None:
        w = torch.empty_like(packed_order)
        w[:, perm.cpu().long()] = packed_order
    return w.to(dtype).to(qweight.device)


def _packed_linear_reference(
    bits: int,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    perm: Tensor | None,
) -> Tensor:
    w = dequantize_weight_reference(
        qweight,
        scales,
        zeros,
        bits=bits,
        group_size=group_size,
        out_features=out_features,
        in_features=x.shape[-1],
        perm=perm,
    )
    return linear_reference(x, w, bias)


def int4_linear_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    perm: Tensor | None = None,
) -> Tensor:
    """int4_linear: dequantise, multiply in fp64."""
    return _packed_linear_reference(
        4, x, qweight, scales, zeros, bias, group_size, out_features, perm
    )


def int8_linear_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    perm: Tensor | None = None,
) -> Tensor:
    """int8_linear: dequantise, multiply in fp64."""
    return _packed_linear_reference(
        8, x, qweight, scales, zeros, bias, group_size, out_features, perm
    )


def w8a8_linear_reference(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_zeros: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """w8a8_linear with exact sums (fp64 holds them) and the same epilogue order: bit equal."""
    x = x_q.double()
    if x_zeros is not None:
        x = x - x_zeros.double().view(*x_q.shape[:-1], 1)
    y = (x @ weight.double().t()).float()
    y = y * x_scale.view(*x_q.shape[:-1], 1) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def quantize_per_token_reference(
    x: Tensor, scale: Tensor | None = None, *, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """quantize_per_token, bit equal for rows without inf or NaN."""
    rows = x.float().flatten(0, -2) if x.dim() > 1 else x.float().unsqueeze(0)
    if scale is not None or symmetric:
        s = rows.abs().amax(1) / 127 if scale is None else scale.expand(rows.shape[0])
        s = torch.where(s == 0, 1.0, s)
        q = (rows / s[:, None]).round().clamp(-127, 127)
        return q.to(torch.int8).view(x.shape), s.clone(), None
    high, low = rows.amax(1).clamp(min=0), rows.amin(1).clamp(max=0)
    s = high / 255 - low / 255
    zero = (-128 - low / s).round().clamp(-128, 127)
    s, zero = torch.where(s == 0, 1.0, s), torch.where(s == 0, 0.0, zero)
    q = ((rows / s[:, None]).round() + zero[:, None]).clamp(-128, 127)
    return q.to(torch.int8).view(x.shape), s, zero.to(torch.int32)


def quantize_weight_reference(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """quantize_weight, bit equal for groups without inf or NaN whose scale fits scale_dtype."""
    n, k = weight.shape
    size = group_size if group_size > 0 else max(k, 1)
    groups = -(-k // size)
    w = torch.zeros(n, groups * size)
    w[:, :k] = weight.float()
    w = w.view(n, groups, size)
    middle, last = float(1 << (bits - 1)), float((1 << bits) - 1)
    high, low = w.amax(2).clamp(min=0), w.amin(2).clamp(max=0)
    s = w.abs().amax(2) / (middle - 1) if symmetric else high / last - low / last
    s = s.to(scale_dtype).float()
    s = torch.where(s == 0, 1.0, s)
    z = torch.full_like(s, middle) if symmetric else (-low / s).round().clamp(0, last)
    q = ((w / s[..., None]).round() + z[..., None]).clamp(1 if symmetric else 0, last)
    codes = q.reshape(n, -1)[:, :k].to(torch.uint8)
    return codes.contiguous(), s.to(scale_dtype), None if symmetric else z.to(torch.uint8)
