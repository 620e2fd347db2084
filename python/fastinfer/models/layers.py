"""The leaf layers of the decoder: linear, norm, embedding.

A checkpoint stores q, k, v (and gate, up) as separate tensors while the decoder multiplies them as
one matrix. Each layer here says which parts it is made of and places a checkpoint tensor into them,
so the loader needs no knowledge of fusing. A quantised or a tensor-parallel linear is a class with
the same methods (`part_shape`, `place`, `load`, `forward`): it may keep other parameters (see
`quantized.py`), or take only its rows of each part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastinfer import ops


class Layer(nn.Module):
    """A module whose parameters are filled from checkpoint tensors.

    Attributes:
        batch_invariant: a row's bits must not depend on the other rows; see
            `CausalLM.set_batch_invariant`.
    """

    batch_invariant = False

    def part_shape(self, param: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        """Shape of the checkpoint tensor that fills `parts` of a parameter; no parts: all of it."""
        return tuple(getattr(self, param).shape)

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        """The contiguous memory that `load` would copy a checkpoint tensor to; None: not one."""
        return getattr(self, param).data

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        """Copy a checkpoint tensor (any dtype or device) into `parts` of a parameter."""
        getattr(self, param).data.copy_(tensor)


class RowParts(Layer):
    """A linear layer whose weight [N, K] and bias [N] are made of named row blocks.

    Args:
        in_features: K.
        parts: name -> rows, in the order in which they are stacked. A plain linear has one part.
        bias: whether there is a bias [N].
        dtype: of the bias.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(self.parts.values())
        self.bias = _parameter(self.out_features, dtype=dtype) if bias else None

    def part_shape(self, param: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        rows = sum(self.parts[p] for p in parts or self.parts)
        return (rows, self.in_features) if param == "weight" else (rows,)

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        names = list(self.parts)
        parts = parts or tuple(names)
        first = names.index(parts[0])
        if parts != tuple(names[first : first + len(parts)]):
            return None
        begin = sum(self.parts[name] for name in names[:first])
        return getattr(self, param).data[begin : begin + sum(self.parts[part] for part in parts)]

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        target = getattr(self, param).data
        begins = dict(zip(self.parts, _begins(self.parts.values()), strict=True))
        taken = 0
        for part in parts or self.parts:
            rows = self.parts[part]
            target[begins[part] : begins[part] + rows].copy_(tensor[taken : taken + rows])
            taken += rows


class Linear(RowParts):
    """y = x @ weight.T + bias.

    Args:
        in_features: K.
        parts: name -> rows, in the order in which they are stacked. A plain linear has one part.
        bias: whether there is a bias [N].
        dtype: of the parameters.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, parts, bias=bias, dtype=dtype)
        self.weight = _parameter(self.out_features, in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, batch_invariant=self.batch_invariant)


class RMSNorm(Layer):
    """y = x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """In place: residual += x, x = norm(residual). Returns x."""
        return ops.fused_add_rms_norm(x, residual, self.weight, self.eps)[0]


class Embedding(Layer):
    """Rows of weight [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(vocab_size, hidden_size, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input_ids, self.weight)


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Uninitialised memory for every parameter and buffer of a model on the meta device.

    `Module.to_empty` does the same, but first imports some 500 modules, sympy among them: one to
    two and a half seconds.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _begins(sizes: object) -> list[int]:
    begins, total = [], 0
    for size in sizes:  # type: ignore[attr-defined]
        begins.append(total)
        total += size
    return begins
