"""Slow packers and unpackers, one code at a time, written from the formats' descriptions alone.

They share no code with the package: what they write, the loaders must read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]  # place in the word -> column
NF4 = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]
FP4 = [
    *(0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25),
    *(-0.0, -0.0052083333, -0.6666667, -1.0, -0.3333333, -0.5, -0.1666667, -0.25),
]


def signed(word: int) -> int:
    """A 32-bit pattern as int32 holds it."""
    return word - (1 << 32) if word >= 1 << 31 else word


def words_of(values: list[int], bits: int, places: list[int] | None = None) -> list[int]:
    """Pack a run of codes, filling the last word with zeros."""
    per = 32 // bits
    places = places or list(range(per))
    out = []
    for begin in range(0, len(values), per):
        word = 0
        for place in range(per):
            index = begin + places[place]
            if index < len(values):
                word |= values[index] << (bits * place)
        out.append(signed(word))
    return out


def codes_of(words: list[int], bits: int, places: list[int] | None = None) -> list[int]:
    """Unpack a run of words."""
    per = 32 // bits
    places = places or list(range(per))
    out = [0] * (per * len(words))
    for w, word in enumerate(words):
        for place in range(per):
            code = ((word & 0xFFFFFFFF) // 2 ** (bits * place)) % 2**bits
            out[w * per + places[place]] = code
    return out


def pack_rows(codes: Tensor, bits: int, places: list[int] | None = None) -> Tensor:
    """[R, C] -> int32 [R, words]: along the second dimension."""
    return torch.tensor([words_of(row, bits, places) for row in codes.tolist()], dtype=torch.int32)


def unpack_rows(words: Tensor, bits: int, places: list[int] | None = None) -> Tensor:
    """int32 [R, words] -> [R, C]."""
    return torch.tensor([codes_of(row, bits, places) for row in words.tolist()])


@dataclass
class Weight:
    """A random quantised weight in plain integers, columns in original order.

    w[n, k] = (codes[n, k] - zeros[n, group[k]]) * scales[n, group[k]]
    """

    codes: Tensor  # int64 [N, K]
    zeros: Tensor  # int64 [N, G]
    scales: Tensor  # [N, G]
    group: Tensor  # int64 [K]
    bits: int

    def dense(self) -> Tensor:
        """fp32 [N, K], column by column."""
        out = torch.empty(self.codes.shape)
        for k in range(self.codes.shape[1]):
            g = int(self.group[k])
            out[:, k] = (self.codes[:, k] - self.zeros[:, g]).float() * self.scales[:, g].float()
        return out

    def with_group(self, group: Tensor) -> Weight:
        return replace(self, group=group)


def random_weight(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    symmetric: bool = True,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Weight:
    """Codes over the whole range; zeros, where asymmetric, from 0 to the top."""
    g = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (n, k), generator=g)
    zeros = torch.full((n, groups), 2 ** (bits - 1))
    if not symmetric:
        low, high = top // 3, top - top // 3
        zeros = torch.randint(low, high + 1, (n, groups), generator=g)
        zeros[0, 0], zeros[-1, -1] = 0, top
    spread = 0.3 / 2 ** (bits - 1)
    scales = ((torch.rand(n, groups, generator=g) + 0.5) * spread).to(scale_dtype)
    group = torch.arange(k) // size
    if act_order:
        group = group[torch.randperm(k, generator=g)]
    return Weight(codes, zeros, scales, group, bits)


def gptq(w: Weight, *, version: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    top = 2**w.bits - 1
    stored = (w.zeros - 1) & top if version == 1 else w.zeros
    tensors = {
        "qweight": pack_rows(w.codes, w.bits).t().contiguous(),
        "qzeros": pack_rows(stored.t(), w.bits),
        "scales": w.scales.t().contiguous(),
    }
    if g_idx:
        tensors["g_idx"] = w.group.to(torch.int32)
    return tensors


def awq(w: Weight) -> dict[str, Tensor]:
    return {
        "qweight": pack_rows(w.codes.t(), 4, AWQ_PLACES),
        "qzeros": pack_rows(w.zeros.t(), 4, AWQ_PLACES),
        "scales": w.scales.t().contiguous(),
    }


def pack_quantized(
    w: Weight, *, symmetric: bool, act_order: bool = False, packed_zeros: bool = True
) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack_rows(w.codes, w.bits),
        "weight_scale": w.scales.clone(),
        "weight_shape": torch.tensor(list(w.codes.shape)),
    }
    if not symmetric and packed_zeros:
        tensors["weight_zero_point"] = pack_rows(w.zeros.t(), w.bits).t().contiguous()
    elif not symmetric:
        tensors["weight_zero_point"] = (w.zeros - 2 ** (w.bits - 1)).to(torch.int8)
    if act_order:
        tensors["weight_g_idx"] = w.group.to(torch.int32)
    return tensors


def int_quantized(w: Weight, *, symmetric: bool = True) -> dict[str, Tensor]:
    tensors = {
        "weight": (w.codes - 2 ** (w.bits - 1)).to(torch.int8),
        "weight_scale": w.scales.clone(),
    }
    if not symmetric:
        tensors["weight_zero_point"] = (w.zeros - 2 ** (w.bits - 1)).to(torch.int8)
    return tensors


def bnb_int8(n: int, k: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors and the dequantised weight."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    largest = torch.rand(n, generator=g) * 0.4 + 0.1
    dense = torch.stack([codes[i].float() * (largest[i] / 127) for i in range(n)])
    return {
        "weight": codes,
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }, dense


def bnb_4bit(
    n: int,
    k: int,
    seed: int,
    *,
    kind: str = "nf4",
    nested: bool = False,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    nested_blocksize: int = 256,
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors and the dequantised weight."""
    g = torch.Generator().manual_seed(seed)
    codebook = NF4 if kind == "nf4" else FP4
    codes = torch.randint(0, 16, (n * k,), generator=g).tolist()
    blocks = -(-n * k // blocksize)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "float32", "shape": [n, k]}
    tensors = {}
    if nested:
        stored = torch.randint(0, 256, (blocks,), generator=g)
        inner_map = torch.linspace(-1, 1, 256)
        inner = torch.rand(-(-blocks // nested_blocksize), generator=g) * 0.1 + 0.05
        offset = 0.3
        absmax = [
            float(inner_map[stored[i]] * inner[i // nested_blocksize]) + offset
            for i in range(blocks)
        ]
        tensors |= {
            "weight.absmax": stored.to(torch.uint8),
            "weight.nested_absmax": inner,
            "weight.nested_quant_map": inner_map,
        }
        state |= {
            "nested_blocksize": nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    else:
        absmax = (torch.rand(blocks, generator=g) * 0.3 + 0.1).tolist()
        tensors["weight.absmax"] = torch.tensor(absmax)
    dense = [codebook[code] * absmax[i // blocksize] for i, code in enumerate(codes)]
    data = [16 * codes[i] + codes[i + 1] for i in range(0, len(codes), 2)]
    tensors["weight"] = torch.tensor(data, dtype=torch.uint8).view(storage).unsqueeze(1)
    tensors["weight.quant_map"] = torch.tensor(codebook)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors, torch.tensor(dense).view(n, k)


def native(w: Weight, *, symmetric: bool) -> dict[str, Tensor]:
    """Columns in group order, with the permutation that put them there."""
    perm = sorted(range(w.codes.shape[1]), key=lambda k: (int(w.group[k]), k))
    tensors = {
        "qweight": pack_rows(w.codes[:, perm], w.bits).t().contiguous(),
        "scales": w.scales.t().contiguous(),
    }
    if not symmetric:
        tensors["qzeros"] = pack_rows(w.zeros.t(), w.bits)
    if perm != sorted(perm):
        tensors["perm"] = torch.tensor(perm, dtype=torch.int32)
    return tensors
