"""The quantised linear layer of the decoder: parts as a checkpoint stores them, fused to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..distributed.group import Communicator
from ..distributed.span import Span
from ..quant.canonical import CanonicalWeight
from ..quant.formats import Stored
from ..quant.fused import FusedLinear
from ..quant.layers import W8A8Linear
from .layers import Linear, RowParts

_GROUPS = (128, 64, 32, 16, 8)  # of 4-bit weights: the largest that divides the input channels


class QuantizedLinear(RowParts):
    """y = x @ weight.T + bias, the weight in quantised or dense parts.

    The parts wait in canonical form until all are there, then become one `FusedLinear`.

    Args:
        in_features: K, or a `Span` of it.
        parts: name -> rows, in the order in which they are stacked.
        bias: whether there is a bias [N].
        dtype: of the bias, of dense parts and of the activations.
        device: where the layer runs.
        group: of the ranks that have the other input channels; None: they are all here.
    """

    def __init__(
        self,
        in_features: int | Span,
        parts: Mapping[str, int | Span],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: Communicator | None = None,
    ) -> None:
        super().__init__(in_features, parts, bias=bias, dtype=dtype)
        self._dtype, self._device, self._group = dtype, device, group
        self._waiting: dict[str, tuple[tuple[str, ...], Stored]] = {}
        self._inputs: GatheredInputs | None = None
        self.fused: FusedLinear | None = None

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        return None if param == "weight" else super().place(param, parts)

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        if param == "weight":
            self.load_quantized(parts, tensor)
        else:
            super().load(param, parts, tensor)

    def load_quantized(
        self, parts: tuple[str, ...], weight: Stored, inputs: GatheredInputs | None = None
    ) -> None:
        """Take the weight of `parts` (neighbours; none: all of them).

        Args:
            parts: which.
            weight: what `cut` says of it.
            inputs: where its input channels come from, if not from this rank alone.
        """
        parts = parts or tuple(self.parts)
        self._inputs = inputs
        self._waiting[parts[0]] = (parts, weight)
        if sum(len(parts) for parts, _ in self._waiting.values()) < len(self.parts):
            return
        ordered = [self._waiting[name][1] for name in self.parts if name in self._waiting]
        self._waiting = {}
        self.fused = FusedLinear(ordered, dtype=self._dtype, device=self._device)
        for linear in self.fused.linears if self._group is not None else ():
            if isinstance(linear, W8A8Linear):
                linear.largest = partial(_largest_of_all, self._group)

    def forward(self, x: Tensor) -> Tensor:
        assert self.fused is not None, "the loader fills every layer"
        if self._inputs is not None:
            x = self._inputs(x)
        return self.fused(x, self.bias)


def _largest_of_all(group: Communicator | None, x: Tensor) -> Tensor:
    """[T, 1]: the largest magnitude of each row of x over the ranks."""
    assert group is not None
    # Zero but for this rank's numbers, so that the sum over ranks is what they all say.
    said = torch.zeros(group.size, x.shape[0], dtype=torch.float32, device=x.device)
    torch.amax(x.abs().float(), dim=1, out=said[group.rank])
    return group.all_reduce_(said).amax(dim=0)[:, None].to(x.dtype)


@torch.no_grad()
def quantize_layers(model: nn.Module, scheme: str, device: torch.device) -> None:
    """Round the weights of a decoder's linear layers to nearest, in place; the head stays.

    Args:
        model: its weights are there.
        scheme: "int8": one scale per output channel; "int4": groups of up to 128 input channels.
        device: where it is.

    Raises:
        ValueError: the checkpoint is quantised already.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"load_model: quantization={scheme!r} must go with a plain checkpoint, got one "
                "that is quantised already; leave it out"
            )
        if not isinstance(layer, Linear) or name == "lm_head":
            continue
        bits, group = 8, -1
        if scheme == "int4":
            bits, group = 4, next((g for g in _GROUPS if layer.in_features % g == 0), -1)
        dtype = layer.weight.dtype
        codes, scales, zeros = ops.quantize_weight(layer.weight, bits, group, scale_dtype=dtype)
        with torch.device("meta"):
            quantized = QuantizedLinear(
                layer.in_features, layer.parts, bias=False, dtype=dtype, device=device
            )
        quantized.bias = layer.bias
        quantized.load_quantized((), CanonicalWeight(codes, scales, zeros, bits, group))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)


class GatheredInputs:
    """The input channels of a piece of an act-order weight, wherever they were computed.

    Args:
        group: of the ranks that have them.
        pieces: channels [begin, end) of each rank.
        channels: int64, those that this rank multiplies, in the order of its columns.
        device: where it runs.
    """

    def __init__(
        self,
        group: Communicator,
        pieces: Sequence[Span],
        channels: Tensor,
        device: torch.device,
    ) -> None:
        self._group = group
        self._width = max(piece.count for piece in pieces)
        place = torch.empty(pieces[0].total, dtype=torch.int64)
        for rank, piece in enumerate(pieces):
            place[piece.begin : piece.end] = rank * self._width + torch.arange(piece.count)
        self._places = place[channels.cpu()].to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, channels of this rank] -> [T, channels it multiplies]."""
        if x.shape[1] < self._width:
            x = torch.nn.functional.pad(x, (0, self._width - x.shape[1]))
        everything = self._group.all_gather(x).transpose(0, 1).flatten(1)
        return everything.index_select(1, self._places)
