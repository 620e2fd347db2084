"""Puts every tensor of a checkpoint into its place in a model, or in a part of one.

Plain tensors go straight there: to a GPU by threads that read ahead, where there is nothing to
convert. Tensors of quantised layers are collected until a layer is complete and packed then. Of
what is divided over ranks only this rank's piece is read: of quantised layers that of the codes,
which are nearly all of their bytes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import Checkpoint, Cut
from ..quant.config import QuantConfig
from ..quant.cutting import cut_columns, cut_rows
from ..quant.formats import Stored, codes_of, read_linear
from ..quant.fused import runnable
from .config import ModelConfig
from .decoder import CausalLM
from .device_read import BackgroundRead, can_send, read_to_device
from .layers import Layer, RowParts, give_memory
from .quantized import GatheredInputs, QuantizedLinear
from .weights import EMBEDDING, HEAD, TensorPlan, plan_tensors


def exchange(
    model: CausalLM, module: str, config: ModelConfig, device: torch.device
) -> QuantizedLinear:
    """Put a quantised layer in the place of a plain one."""
    plain = model.get_submodule(module)
    if isinstance(plain, QuantizedLinear):
        return plain
    assert isinstance(plain, RowParts)
    assert config.dtype is not None
    if module == "lm_head" and config.normalized_head:
        raise ValueError(
            f"load_model: lm_head of {config.architecture} must be in floating point, got a "
            "quantised one; its rows are normalised while loading"
        )
    with torch.device("meta"):
        layer = QuantizedLinear(
            plain.columns,
            plain.spans,
            bias=plain.bias is not None,
            dtype=config.dtype,
            device=device,
            group=model.shard.group if module.endswith(("o_proj", "down_proj")) else None,
        )
    parent, _, child = module.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


class Filler:
    """Puts every tensor of a checkpoint into its place."""

    def __init__(
        self,
        model: CausalLM,
        config: ModelConfig,
        checkpoint: Checkpoint,
        quant: QuantConfig | None,
        device: torch.device,
        requantize: int | None,
    ) -> None:
        self.model, self.config, self.checkpoint = model, config, checkpoint
        self.device, self.requantize = device, requantize
        infos = checkpoint.tensors
        self.plan: TensorPlan = plan_tensors(
            model,
            config,
            {name: info.shape for name, info in infos.items()},
            {name: info.dtype for name, info in infos.items()},
            quant,
        )
        for target in self.plan.quantized.values():
            exchange(model, target.module, config, device)
        _check_complete(model, {(t.module, t.param) for t in self.plan.plain.values()})
        give_memory(model, device)
        # Tensor name -> the layer it belongs to, and what has been read of each layer so far.
        self.owner = {n: name for name, t in self.plan.quantized.items() for n in t.tensors}
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.cuts = self._cuts()
        self.background: BackgroundRead | None = None
        self.bar: Any = None

    def start(self, *, progress: bool) -> None:
        """Have threads read what needs no work; read everything else."""
        names = {*self.plan.plain, *self.owner, *self.plan.zero_biases}
        self.bar = tqdm(
            total=len(names),
            desc="loading weights",
            unit="tensor",
            disable=not (progress and sys.stderr.isatty()),
        )
        try:
            places = self._places()
            if places:
                for param in self.model.parameters():
                    param.zero_()
                rows = {name: self.cuts[name].rows[0] for name in places if name in self.cuts}
                self.background = BackgroundRead(self.checkpoint.files, places, self.device, rows)
            for name, tensor in self._read(names - places.keys()):
                if name in self.owner:
                    self._quantized(self.owner[name], name, tensor)
                elif name in self.plan.zero_biases:
                    _check_zero(name, tensor)
                else:
                    self._plain(name, tensor)
                self.bar.update()
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Wait for the threads."""
        try:
            if self.background is not None:
                self.background.wait(self.bar.update)
            tied = self.config.tie_word_embeddings and self.model.embed_tokens is not None
            if tied and HEAD in self.checkpoint.tensors:
                _check_tied(self.model, self.checkpoint)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the threads."""
        if self.background is not None:
            self.background.close()
        self.bar.close()

    def _places(self) -> dict[str, Tensor]:
        """The tensors whose bytes are copied as they are, to a GPU."""
        places: dict[str, Tensor] = {}
        for name, where in self.plan.plain.items() if _in_background(self.device) else ():
            layer = self.model.get_submodule(where.module)
            assert isinstance(layer, Layer)
            place = layer.place(where.param, where.parts)
            if place is not None and can_send(self.checkpoint.tensors[name].dtype, place.dtype):
                places[name] = place
        return places

    def _read(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        sent: set[str] = set()
        if self.device.type == "cuda":
            infos, whole = self.checkpoint.tensors, self.plan.plain.keys() - self.cuts.keys()
            sent = {n for n in names & whole if can_send(infos[n].dtype)}
        if sent:
            yield from read_to_device(self.checkpoint.files, sent, self.device)
        yield from self.checkpoint.read(names - sent, self.cuts)

    def _plain(self, name: str, tensor: Tensor) -> None:
        where = self.plan.plain[name]
        layer = self.model.get_submodule(where.module)
        assert isinstance(layer, Layer)
        layer.load(where.param, where.parts, tensor)

    def _quantized(self, layer_name: str, name: str, tensor: Tensor) -> None:
        where = self.plan.quantized[layer_name]
        tensors = self.waiting.setdefault(layer_name, {})
        tensors[name] = tensor
        if len(tensors) < len(where.tensors):
            return
        del self.waiting[layer_name]
        layer = self.model.get_submodule(where.module)
        assert isinstance(layer, QuantizedLinear)
        codes = codes_of(layer_name, where.scheme)
        read = None if codes is None else self.cuts.get(codes.name)
        if codes is not None and read is not None:
            shape = self.checkpoint.tensors[codes.name].shape
            tensors[codes.name] = read.back(tensors[codes.name], shape)
        stored, channels = self._piece(layer_name, tensors)
        if channels is not None and read is not None:
            # columns in another order than the file's, which is only known now
            assert codes is not None
            tensors |= dict(self.checkpoint.read({codes.name}))
            stored, channels = self._piece(layer_name, tensors)
        inputs = None if channels is None else self._gathered(where.module, channels)
        layer.load_quantized(where.parts, stored, inputs)

    def _piece(self, name: str, tensors: dict[str, Tensor]) -> tuple[Stored, Tensor | None]:
        """What this process has of a layer, and the input channels of that, if they are others than
        its own.
        """
        where = self.plan.quantized[name]
        layer = self.model.get_submodule(where.module)
        assert isinstance(layer, QuantizedLinear)
        rows, columns = layer.part_shape("weight", where.parts)
        stored = read_linear(name, tensors, where.scheme, columns, rows)
        stored = runnable(name, stored, self.requantize)
        cut, channels = layer.cut("weight", where.parts), None
        if cut is not None:
            stored = cut_rows(stored, cut.rows)
            if cut.columns is not None:
                stored, channels = cut_columns(stored, *cut.columns)
                stored = runnable(name, stored)
        return stored, channels

    def _cuts(self) -> dict[str, Cut]:
        """What is read of the tensors of which this process needs a piece."""
        cuts: dict[str, Cut] = {}
        for name, plain in self.plan.plain.items():
            layer = self.model.get_submodule(plain.module)
            assert isinstance(layer, Layer)
            cut = layer.cut(plain.param, plain.parts)
            if cut is not None:
                cuts[name] = cut
        for name, target in self.plan.quantized.items():
            layer = self.model.get_submodule(target.module)
            assert isinstance(layer, Layer)
            cut, codes = layer.cut("weight", target.parts), codes_of(name, target.scheme)
            if cut is None or codes is None or self.requantize is not None:
                continue
            if len(cut.rows) == 1:
                _, columns = layer.part_shape("weight", target.parts)
                cuts[codes.name] = codes.part(cut.rows[0], cut.columns or (0, columns))
        return cuts

    def _gathered(self, module: str, channels: Tensor) -> GatheredInputs:
        shard = self.model.shard
        assert shard.group is not None
        ranks = [dataclasses.replace(shard, rank=rank) for rank in range(shard.ranks)]
        if module.endswith("o_proj"):
            pieces = [r.heads(self.config.num_heads, self.config.head_dim) for r in ranks]
        else:
            pieces = [r.inner(self.config.intermediate_size) for r in ranks]
        return GatheredInputs(shard.group, pieces, channels, self.device)


def _in_background(device: torch.device) -> bool:
    return device.type == "cuda"


def _check_zero(name: str, bias: Tensor) -> None:
    if bool(bias.any()):
        raise ValueError(
            f"load_model: {name} must be zero, because config.json describes a layer without bias, "
            "got other values; check that config.json belongs to these weights"
        )


def _check_complete(model: CausalLM, filled: set[tuple[str, str]]) -> None:
    """A parameter that no tensor of the map fills would keep whatever its memory held."""
    names = {f"{module}.{param}" for module, param in filled}
    left = [name for name, _ in model.named_parameters() if name not in names]
    if left:
        raise RuntimeError(
            "load_model: every parameter must have a checkpoint tensor, got none for "
            f"{', '.join(left)}; the weight map of this architecture is incomplete, please report "
            "it"
        )


def _check_tied(model: CausalLM, checkpoint: Checkpoint) -> None:
    layer = model.embed_tokens
    assert layer is not None
    expected = layer.part_shape("weight", ())
    cut = layer.cut("weight", ())
    embedding = layer.weight
    same = checkpoint.tensors[HEAD].shape == expected
    if same:
        _, head = next(iter(checkpoint.read({HEAD}, None if cut is None else {HEAD: cut})))
        same = torch.equal(head.to(embedding), embedding[: len(head)])
    if not same:
        raise ValueError(
            f"load_model: {HEAD} must equal {EMBEDDING} when tie_word_embeddings is true, got "
            "another tensor; set tie_word_embeddings to false in config.json to use it"
        )
