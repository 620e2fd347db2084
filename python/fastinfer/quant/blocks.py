"""One decoder block of a checkpoint, its linear layers known by their checkpoint names.

It computes in fp32. A method that changes weights in place has all of them in fp32; for the others
the weights stay where they are, in mapped files or, once quantised, as codes, and become fp32 a few
rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checkpoint import Checkpoint
from ..models.config import ModelConfig
from ..models.decoder import DecoderLayer
from ..models.layers import Layer, Linear, RMSNorm, RowParts
from ..models.weights import Target, weight_targets
from .canonical import CanonicalWeight, Int8Weight
from .memory import row_chunks_of
from .rtn import unpacked

# The fused linear layers in the order in which they run. Each reads one input.
MODULES = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [begin, end) of a fused linear layer: one linear layer of the checkpoint."""

    name: str  # e.g. model.layers.0.self_attn.q_proj
    module: str  # one of MODULES
    begin: int
    end: int


class StreamedLinear(RowParts):
    """`Linear` that keeps no fp32 weight: each range of rows is a tensor as it was loaded, or the
    quantised weight that replaced it.

    Args:
        in_features: K.
        parts: name -> rows, as of `Linear`.
        bias: whether there is a bias [N].
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool) -> None:
        super().__init__(in_features, parts, bias=bias, dtype=torch.float32)
        self.sources: dict[tuple[int, int], Tensor | CanonicalWeight | Int8Weight] = {}

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        if param == "weight":
            self.sources[_rows(self, parts)] = tensor
        else:
            super().load(param, parts, tensor)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for (first, last), source in self.sources.items():
            for begin, end in row_chunks_of(last - first, self.in_features):
                weight = unpacked(source, begin, end)
                rows = slice(first + begin, first + end)
                bias = None if self.bias is None else self.bias[rows]
                out[..., rows] = ops.linear(x, weight, bias)
        return out


def _rows(linear: RowParts, parts: tuple[str, ...]) -> tuple[int, int]:
    """Rows of these parts, all without any."""
    sizes = linear.parts
    names = list(sizes)
    wanted = parts or tuple(names)
    begin = sum(sizes[n] for n in names[: names.index(wanted[0])])
    return begin, begin + sum(sizes[n] for n in wanted)


class Block:
    """Block `index`, read from the checkpoint.

    Args:
        config: of the model.
        index: which block.
        checkpoint: to read it from.
        streamed: keep the weights as they are stored; they can then be replaced, not written to.
    """

    def __init__(
        self, config: ModelConfig, index: int, checkpoint: Checkpoint, *, streamed: bool = False
    ) -> None:
        self.index = index
        self.layer = DecoderLayer(config, index, dtype=torch.float32)
        if streamed:  # nothing has touched the memory of these weights
            for name in MODULES:
                owner, _, attribute = name.rpartition(".")
                linear = self.linear(name)
                new = StreamedLinear(linear.in_features, linear.parts, bias=linear.bias is not None)
                setattr(self.layer.get_submodule(owner), attribute, new)
        ours = f"layers.{index}."
        self.targets: dict[str, Target] = {
            name: Target(target.module.removeprefix(ours), target.param, target.parts)
            for name, target in weight_targets(config).items()
            if target.module.startswith(ours)
        }
        self.stored: dict[str, torch.dtype] = {}
        with torch.no_grad():
            for name, tensor in checkpoint.read(set(self.targets)):
                target = self.targets[name]
                self.stored[name] = tensor.dtype
                self._module(target.module).load(target.param, target.parts, tensor)
        self.parts = list(self._find_parts())

    def _module(self, name: str) -> Layer:
        module = self.layer.get_submodule(name)
        assert isinstance(module, Layer)
        return module

    def _find_parts(self) -> Iterator[Part]:
        for name, target in self.targets.items():
            if target.module in MODULES and target.param == "weight":
                begin, end = _rows(self.linear(target.module), target.parts)
                yield Part(name.removesuffix(".weight"), target.module, begin, end)

    def linear(self, module: str) -> Linear | StreamedLinear:
        """One of MODULES."""
        found = self.layer.get_submodule(module)
        assert isinstance(found, Linear | StreamedLinear)
        return found

    def norm(self, name: str) -> RMSNorm:
        """`input_norm` or `post_norm`."""
        found = self.layer.get_submodule(name)
        assert isinstance(found, RMSNorm)
        return found

    def norm_dtype(self, name: str) -> torch.dtype:
        """Dtype in which the checkpoint stores the weight of a norm."""
        return next(self.stored[n] for n, t in self.targets.items() if t.module == name)

    def of(self, module: str) -> list[Part]:
        """The checkpoint's layers inside a fused one."""
        return [part for part in self.parts if part.module == module]

    def weight(self, part: Part) -> Tensor:
        """[N, K]: fp32, a view, so that writing to it changes the block; streamed: as stored."""
        linear = self.linear(part.module)
        if isinstance(linear, Linear):
            return linear.weight.data[part.begin : part.end]
        source = linear.sources[part.begin, part.end]
        assert isinstance(source, Tensor)
        return source

    def replace(self, part: Part, weight: CanonicalWeight | Int8Weight) -> None:
        """Compute with this weight from now on. Streamed blocks only."""
        linear = self.linear(part.module)
        assert isinstance(linear, StreamedLinear)
        linear.sources[part.begin, part.end] = weight

    def bias(self, part: Part) -> Tensor | None:
        """fp32 [N] or None."""
        bias = self.linear(part.module).bias
        return None if bias is None else bias.data[part.begin : part.end]

    def plain_tensors(self, quantized: set[str]) -> dict[str, Tensor]:
        """What stays in floating point, in the dtypes of the checkpoint.

        Args:
            quantized: names of the layers whose weight is left out.
        """
        tensors = {}
        for name, target in self.targets.items():
            if name.removesuffix(".weight") in quantized:
                continue
            module = self._module(target.module)
            if isinstance(module, StreamedLinear) and target.param == "weight":
                value = module.sources[_rows(module, target.parts)]
                assert isinstance(value, Tensor)
                tensors[name] = value.clone()
                continue
            value = getattr(module, target.param).data
            if target.parts or target.module in MODULES:
                begin, end = _rows(self.linear(target.module), target.parts)
                value = value[begin:end]
            tensors[name] = value.to(self.stored[name]).clone()
        return tensors
