"""The quantised linear layer of the decoder: parts as a checkpoint stores them, fused to run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..quant.formats import Stored
from ..quant.fused import FusedLinear
from .layers import RowParts


class QuantizedLinear(RowParts):
    """y = x @ weight.T + bias, the weight in quantised or dense parts.

    The parts wait in canonical form until all are there, then become one `FusedLinear`.

    Args:
        in_features: K.
        parts: name -> rows, in the order in which they are stacked.
        bias: whether there is a bias [N].
        dtype: of the bias, of dense parts and of the activations.
        device: where the layer runs.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_features, parts, bias=bias, dtype=dtype)
        self._dtype, self._device = dtype, device
        self._waiting: dict[str, tuple[tuple[str, ...], Stored]] = {}
        self.fused: FusedLinear | None = None

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        return None if param == "weight" else super().place(param, parts)

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        if param == "weight":
            self.load_quantized(parts, tensor)
        else:
            super().load(param, parts, tensor)

    def load_quantized(self, parts: tuple[str, ...], weight: Stored) -> None:
        """Take the weight of `parts` (neighbours; none: all of them)."""
        parts = parts or tuple(self.parts)
        self._waiting[parts[0]] = (parts, weight)
        if sum(len(parts) for parts, _ in self._waiting.values()) < len(self.parts):
            return
        ordered = [self._waiting[name][1] for name in self.parts if name in self._waiting]
        self._waiting = {}
        self.fused = FusedLinear(ordered, dtype=self._dtype, device=self._device)

    def forward(self, x: Tensor) -> Tensor:
        assert self.fused is not None, "the loader fills every layer"
        return self.fused(x, self.bias)
