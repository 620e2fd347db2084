"""One decoder block of a checkpoint in fp32, its linear layers known by their checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..models.config import ModelConfig
from ..models.decoder import DecoderLayer
from ..models.layers import Layer, Linear, RMSNorm
from ..models.weights import Target, weight_targets

# The fused linear layers in the order in which they run. Each reads one input.
MODULES = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [begin, end) of a fused linear layer: one linear layer of the checkpoint."""

    name: str  # e.g. model.layers.0.self_attn.q_proj
    module: str  # one of MODULES
    begin: int
    end: int


class Block:
    """Block `index`, read from the checkpoint.

    Args:
        config: of the model.
        index: which block.
        checkpoint: to read it from.
    """

    def __init__(self, config: ModelConfig, index: int, checkpoint: Checkpoint) -> None:
        self.index = index
        self.layer = DecoderLayer(config, index, dtype=torch.float32)
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
                begin, end = self._rows(target)
                yield Part(name.removesuffix(".weight"), target.module, begin, end)

    def _rows(self, target: Target) -> tuple[int, int]:
        sizes = self.linear(target.module).parts
        names = list(sizes)
        wanted = target.parts or tuple(names)
        begin = sum(sizes[n] for n in names[: names.index(wanted[0])])
        return begin, begin + sum(sizes[n] for n in wanted)

    def linear(self, module: str) -> Linear:
        """One of MODULES."""
        found = self.layer.get_submodule(module)
        assert isinstance(found, Linear)
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
        """fp32 [N, K], a view: writing to it changes the block."""
        return self.linear(part.module).weight.data[part.begin : part.end]

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
            value = getattr(self._module(target.module), target.param).data
            if target.parts or target.module in MODULES:
                begin, end = self._rows(target)
                value = value[begin:end]
            tensors[name] = value.to(self.stored[name]).clone()
        return tensors
