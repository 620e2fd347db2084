"""GPTQ checkpoints, v1 and v2, 4 and 8 bits.

    qweight int32 [K * bits / 32, N]   codes packed along K, natural order
    qzeros  int32 [G, N * bits / 32]   zero points packed along N; v1 stores z - 1, v2 z
    scales  float [G, N]
    g_idx   int32 [K]                  group of each input channel (act-order), may be absent

Reference: Frantar et al., "GPTQ", 2022; the AutoGPTQ and GPTQModel projects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bits import pack_words, unpack_words
from ..canonical import CanonicalWeight, QuantError, has_float_zeros
from ..config import LinearScheme
from ..notes import note
from .common import FLOATS, INT32, Expected, ceil_div, num_groups, ordered, take

# Share of zero points equal to 0 above which an asymmetric v1 file is taken to be damaged.
_SUSPICIOUS_SHARE = 0.25
_SUSPICIOUS_WORDS = 4


def tensor_names(prefix: str, scheme: LinearScheme) -> dict[str, bool]:
    """Name -> whether it must be there."""
    return {
        f"{prefix}.qweight": True,
        f"{prefix}.scales": True,
        f"{prefix}.qzeros": scheme.symmetric is not True,
        f"{prefix}.g_idx": False,
    }


def layout(prefix: str, scheme: LinearScheme, k: int, n: int) -> dict[str, Expected]:
    """What the tensors of a layer with K inputs and N outputs must be."""
    bits, groups = scheme.bits, num_groups(k, scheme.group_size)
    size = f"with group_size {scheme.group_size}"
    return {
        f"{prefix}.qweight": Expected(
            INT32,
            (ceil_div(k * bits, 32), n),
            f"[in * {bits} / 32, out] for {k} -> {n} features",
        ),
        f"{prefix}.scales": Expected(FLOATS, (groups, n), f"[groups, out] {size}"),
        f"{prefix}.qzeros": Expected(
            INT32, (groups, ceil_div(n * bits, 32)), f"[groups, out * {bits} / 32] {size}"
        ),
    }


def read(
    prefix: str,
    tensors: Mapping[str, Tensor],
    scheme: LinearScheme,
    in_features: int,
    out_features: int,
) -> CanonicalWeight | Tensor:
    """See `formats.read_linear`."""
    bits, k, n = scheme.bits, in_features, out_features
    expected = layout(prefix, scheme, k, n)
    words = take(tensors, f"{prefix}.qweight", expected[f"{prefix}.qweight"])
    scales = take(tensors, f"{prefix}.scales", expected[f"{prefix}.scales"])
    weight = CanonicalWeight(
        codes=unpack_words(words.t().contiguous(), bits, 1, size=k),
        scales=scales.t().contiguous(),
        zeros=_zeros(prefix, tensors, scheme, expected[f"{prefix}.qzeros"], n),
        bits=bits,
        group_size=scheme.group_size,
    )
    return ordered(prefix, weight, tensors.get(f"{prefix}.g_idx"), f"{prefix}.g_idx")


def _zeros(
    prefix: str, tensors: Mapping[str, Tensor], scheme: LinearScheme, expected: Expected, n: int
) -> Tensor | None:
    """uint8 [N, G], or None for symmetric weights.

    The declared version decides only where the configuration says that the weights are asymmetric:
    files exist that declare v1 and hold v2 zeros. Symmetric weights need no zeros at all; where
    nothing is said, the middle of the range in either spelling means symmetric.
    """
    name, bits = f"{prefix}.qzeros", scheme.bits
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    if scheme.symmetric and name not in tensors:
        return None
    words = take(tensors, name, expected)
    stored = unpack_words(words, bits, 1, size=n)
    if scheme.symmetric is not False:
        spelling = _symmetric_spelling(stored, middle)
        if scheme.symmetric:
            if spelling is None:
                note(prefix, "stored zero points ignored, because the file says sym: true")
            return None
        if spelling is not None:
            return None
    if scheme.style == "gptq_v2":
        return stored.t().contiguous()
    if _looks_carried(stored, bits):
        note(
            prefix,
            "implausibly many zero points of 0: the file was probably written by a packer that "
            "let z - 1 overflow into the neighbours, which cannot be repaired; expect bad output",
        )
    # Per code, not per word: a stored 15 is z = 0 and must not carry into the next code.
    return ((stored.to(torch.int16) + 1) & top).to(torch.uint8).t().contiguous()


def _symmetric_spelling(stored: Tensor, middle: int) -> str | None:
    """Which version's spelling of "all in the middle" this is."""
    if stored.numel() == 0 or bool((stored == middle - 1).all()):
        return "gptq"
    return "gptq_v2" if bool((stored == middle).all()) else None


def _looks_carried(stored: Tensor, bits: int) -> bool:
    """Whether z - 1 seems to have been computed on whole words: one z of 0 then sets all places
    above it in its word.
    """
    top, per_word = (1 << bits) - 1, 32 // bits
    full = stored == top
    if not bool(full.any()):
        return False
    if float(full.float().mean()) > _SUSPICIOUS_SHARE:
        return True
    whole = full[:, : full.shape[1] // per_word * per_word].unflatten(1, (-1, per_word))
    # Words with a full place below the top, and those of them whose full places run up to the top.
    some = whole[..., :-1].any(-1)
    falls = (whole[..., :-1] & ~whole[..., 1:]).any(-1)
    return int(some.sum()) >= _SUSPICIOUS_WORDS and not bool((some & falls).any())


def write(prefix: str, weight: CanonicalWeight, *, style: str = "gptq") -> dict[str, Tensor]:
    """The tensors of one linear layer.

    `qzeros` and `g_idx` are always written, because most readers expect them.

    Args:
        prefix: full name of the layer.
        weight: with uint8 zeros or none. Its bias is written too.
        style: "gptq" stores zero points minus one, "gptq_v2" as they are.
    """
    if has_float_zeros(weight):
        raise QuantError(f"{prefix}: zeros must be integers to be written as GPTQ, got floats")
    k, size = weight.in_features, weight.group_size
    group = torch.arange(k, dtype=torch.int32) // (max(k, 1) if size == -1 else size)
    codes = weight.codes
    if weight.perm is not None:
        order = weight.perm.long()
        codes, index = torch.empty_like(codes), torch.empty_like(group)
        codes[:, order], index[order] = weight.codes, group
        group = index
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full(weight.scales.shape, weight.middle, dtype=torch.uint8)
    if style == "gptq":
        if weight.zeros is not None and not zeros.all():
            note(
                prefix,
                "zero points of 0 are stored as 15 (255) in GPTQ v1; readers that add 1 to whole "
                "words instead of codes get their neighbours wrong, write gptq_v2 for those",
            )
        zeros = ((zeros.to(torch.int16) - 1) & ((1 << weight.bits) - 1)).to(torch.uint8)
    tensors = {
        f"{prefix}.qweight": pack_words(codes.t(), weight.bits, 0).contiguous(),
        f"{prefix}.qzeros": pack_words(zeros.t(), weight.bits, 1).contiguous(),
        f"{prefix}.scales": weight.scales.t().contiguous(),
        f"{prefix}.g_idx": group.contiguous(),
    }
    if weight.bias is not None:
        tensors[f"{prefix}.bias"] = weight.bias.contiguous()
    return tensors


def write_config(
    scheme: LinearScheme, ignore: Sequence[str] = (), *, lm_head: bool = False
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose layers `write` made.

    Args:
        scheme: of all layers.
        ignore: full names of the layers left in floating point.
        lm_head: whether the output head is quantised.
    """
    skipped = [name for name in ignore if name != "lm_head"]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": bool(scheme.symmetric),
        "desc_act": scheme.act_order,
        "static_groups": not scheme.act_order,
        "true_sequential": True,
        "lm_head": lm_head,
        "checkpoint_format": scheme.style or "gptq",
        "pack_dtype": "int32",
    }
    if skipped:
        config["modules_to_not_convert"] = skipped
        config["dynamic"] = {"-:" + re.escape(name) + "$": {} for name in skipped}
    return config
