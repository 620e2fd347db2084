"""Inverse frequencies and cos/sin tables of every rotary variant.

For head dimension D, position p and frequency i < D/2 the tables hold

    cos[p, i] = a * cos(p * f_i)      sin[p, i] = a * sin(p * f_i)      fp32, [positions, D/2]

with f_i = theta^(-2i/D) for the plain embedding; the other types rescale f, and yarn sets the
factor a. The rotation itself pairs x[i] with x[i + D/2] (half-split), which is how Hugging Face
weights are stored.

Dynamic NTK makes theta depend on the length of the sequence. A paged cache stores keys already
rotated and shares them between sequences, so they cannot be rotated again as a sequence grows. Here
theta is therefore chosen once, from the length of the table (`max_model_len`): up to the trained
length this is the plain embedding, exactly as in transformers; a longer table uses the theta that
transformers would use for one pass over a sequence of that length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .rope_config import RopeConfig


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, *, length: int, max_position: int
) -> tuple[Tensor, float]:
    """Frequencies of one rotary embedding.

    Args:
        rope: which variant, with which numbers.
        head_dim: D.
        length: tokens the table is for; only the dynamic type depends on it.
        max_position: tokens the checkpoint is declared for.

    Returns:
        (fp32 [D/2] radians per position, factor on cos and sin).

    Reference:
        RoFormer (arXiv 2104.09864); linear: position interpolation (arXiv 2306.15595); dynamic:
        NTK-aware scaling; yarn: arXiv 2309.00071; llama3: the Llama 3.1 release.
    """
    theta = rope.theta
    if rope.rope_type == "dynamic":
        stretch = rope.factor * max(length, max_position) / max_position - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.rope_type == "yarn":
        return _yarn(rope, frequencies, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def rotary_tables(
    rope: RopeConfig, head_dim: int, *, length: int, max_position: int
) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0 .. length-1.

    Args:
        rope: which variant, with which numbers.
        head_dim: D.
        length: rows of the table.
        max_position: tokens the checkpoint is declared for.

    Returns:
        (cos, sin), each fp32 [length, D/2] on the CPU, so that every device starts from the same
        bits.
    """
    frequencies, scale = inverse_frequencies(
        rope, head_dim, length=length, max_position=max_position
    )
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


class RotaryTable(nn.Module):
    """The cos/sin tables of one rotary embedding, as buffers that move with the model."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int, *, length: int, max_position: int) -> None:
        super().__init__()
        self.rope = rope
        self.head_dim = head_dim
        self.length = length
        self.max_position = max_position
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(length, head_dim // 2), persistent=False)

    def fill(self) -> None:
        """Compute the tables; the constructor, which also runs on meta, leaves them empty."""
        cos, sin = rotary_tables(
            self.rope, self.head_dim, length=self.length, max_position=self.max_position
        )
        self.cos.copy_(cos)
        self.sin.copy_(sin)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, blend linearly in between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # over the original context
    weight = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    weight = weight.clamp(0.0, 1.0)
    return (1 - weight) * frequencies / rope.factor + weight * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """Keep fast dimensions, divide slow ones by the factor, ramp linearly in between."""

    def dimension_of(turns: float) -> float:
        # the dimension that makes this many turns over the original context
        span = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0.0, 1.0)
    return frequencies / rope.factor * (1 - keep) + frequencies * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Temperature of yarn on cos and sin; q and k both carry it, so logits get its square."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def strength(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return strength(rope.mscale) / strength(rope.mscale_all_dim)
    return strength(1.0)
