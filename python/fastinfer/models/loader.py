"""Builds a model from a checkpoint folder.

The model is built on the meta device, checked against the file headers, then given memory once;
each tensor is copied from its (memory-mapped) file straight into its place, converting the dtype on
the way; to a GPU by threads that read ahead, in the background where there is nothing to convert
(`start_loading`). Linear layers that the checkpoint holds quantised are exchanged for
`QuantizedLinear` before; their tensors are collected until a layer is complete and packed then.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import Checkpoint, Cut
from ..quant import notes
from ..quant.canonical import QuantError
from ..quant.config import QuantConfig, read_quant_config
from ..quant.cutting import cut_columns, cut_rows
from ..quant.formats import read_linear
from ..quant.fused import runnable
from .config import ModelConfig, load_config
from .decoder import CausalLM
from .device_read import BackgroundRead, can_send, read_to_device
from .dummy import fill_random
from .layers import Layer, RowParts, give_memory
from .quantized import GatheredInputs, QuantizedLinear
from .shard import WHOLE, Shard
from .weights import EMBEDDING, HEAD, TensorPlan, plan_tensors, weight_targets

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    progress: bool = True,
    max_model_len: int | None = None,
    requantize: int | None = None,
    shard: Shard = WHOLE,
) -> CausalLM:
    """Load a checkpoint folder in Hugging Face layout, plain or quantised.

    Args:
        path: folder with `config.json` and safetensors weights, single or sharded.
        dtype: of the parameters: a torch dtype, its name, or "auto" for what `config.json` states
            and, where it states nothing, what the embedding is stored as.
        device: where the model lives.
        load_format: "auto" reads the weights; "dummy" draws small random ones from a fixed seed and
            needs only `config.json` (for benchmarks).
        progress: show a progress bar while reading, when stderr is a terminal.
        max_model_len: longest sequence to run, in tokens; sizes the rotary tables. None: what the
            checkpoint declares. With dynamic NTK a longer length also changes the frequencies, see
            `rotary.py`.
        requantize: 4 or 8: quantise again what no kernel reads as it is stored (bitsandbytes nf4
            and fp4, GPTQ with irregular groups), rounding to nearest in groups of 64. None:
            dequantise it to `dtype`. Either is logged.
        shard: which part of the model to build; only its bytes are read of plain tensors.

    Returns:
        The model, ready to run; its `config.dtype` is the dtype of its parameters.

    Raises:
        FileNotFoundError: the folder, `config.json`, the weights or a shard is not there.
        ValueError: the configuration is not supported, the weights do not match it, or an argument
            is wrong. Damaged quantised tensors are named.
        RuntimeError: a CUDA device was asked for and there is none.
    """
    with start_loading(
        path,
        dtype=dtype,
        device=device,
        load_format=load_format,
        progress=progress,
        max_model_len=max_model_len,
        requantize=requantize,
        shard=shard,
    ) as loading:
        return loading.finish()


class Loading:
    """A model some of whose weights may still be on their way.

    Leaving the scope stops what has not been finished.

    Attributes:
        model: complete but for values: its memory is there, so that steps can be measured and
            captured. What it computes before `finish` means nothing.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.filler: _Filler | None = None

    def finish(self) -> CausalLM:
        """Wait for the weights; returns the model, ready to run. Raises what `load_model` does."""
        with torch.no_grad():
            if self.filler is not None:
                self.filler.finish()
            self.model.finish_loading()
        return self.model

    def close(self) -> None:
        """Stop reading. May be called twice."""
        if self.filler is not None:
            self.filler.close()

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def start_loading(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    progress: bool = True,
    max_model_len: int | None = None,
    requantize: int | None = None,
    shard: Shard = WHOLE,
) -> Loading:
    """Like `load_model`, but tensors for a GPU that need no conversion are read in the background.

    Returns:
        The model, to be finished; its parameters are zero where nothing has arrived yet.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(
            f"load_model: load_format must be 'auto' or 'dummy', got {load_format!r}; 'auto' reads "
            "safetensors, 'dummy' draws random weights"
        )
    if max_model_len is not None and (not isinstance(max_model_len, int) or max_model_len < 1):
        raise ValueError(
            "load_model: max_model_len must be a positive number of tokens, got "
            f"{max_model_len!r}; leave it out to use the checkpoint's length"
        )
    if requantize not in (None, 4, 8):
        raise ValueError(
            f"load_model: requantize must be None, 4 or 8 bits, got {requantize!r}; leave it out "
            "to dequantise"
        )
    target = _device(device)
    config = load_config(path)
    with notes.collecting(), _named(), torch.no_grad():
        quant = read_quant_config(path)
        checkpoint = Checkpoint(Path(path)) if load_format == "auto" else None
        config = dataclasses.replace(config, dtype=resolve_dtype(dtype, config, checkpoint))
        shard = dataclasses.replace(shard, unit=_unit(config, quant)) if shard != WHOLE else shard
        with torch.device("meta"):
            model = CausalLM(config, dtype=config.dtype, max_model_len=max_model_len, shard=shard)
        model.eval()
        loading = Loading(model)
        if checkpoint is None:
            fill_random(model, config, quant, target, exchange=_exchange)
        else:
            loading.filler = _Filler(model, config, checkpoint, quant, target, requantize)
            loading.filler.start(progress=progress)
        model.fill_tables()
    return loading


@contextmanager
def _named() -> Iterator[None]:
    """Errors of the quantised formats name the tensor; the caller wants to know who complains."""
    try:
        yield
    except QuantError as error:
        raise QuantError(f"load_model: {error}") from error


def _exchange(
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
        )
    parent, _, child = module.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def _unit(config: ModelConfig, quant: QuantConfig | None) -> int:
    """Feed-forward channels that must stay together: the quantisation groups of the down layers."""
    sizes = {1}
    for tensor, target in weight_targets(config).items() if quant is not None else ():
        if target.is_linear_weight and target.module.endswith("down_proj"):
            scheme = quant.for_module(tensor.removesuffix(".weight"))
            if scheme is not None and scheme.group_size > 0:
                sizes.add(scheme.group_size)
    return math.lcm(*sizes)


class _Filler:
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
            _exchange(model, target.module, config, device)
        _check_complete(model, {(t.module, t.param) for t in self.plan.plain.values()})
        give_memory(model, device)
        # Tensor name -> the layer it belongs to, and what has been read of each layer so far.
        self.owner = {n: name for name, t in self.plan.quantized.items() for n in t.tensors}
        self.waiting: dict[str, dict[str, Tensor]] = {}
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
                self.background = BackgroundRead(self.checkpoint.files, places, self.device)
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
        cuts: dict[str, Cut] = {}
        for name in names & self.plan.plain.keys():
            where = self.plan.plain[name]
            layer = self.model.get_submodule(where.module)
            assert isinstance(layer, Layer)
            cut = layer.cut(where.param, where.parts)
            if cut is not None:
                cuts[name] = cut
        if self.device.type == "cuda":
            infos, whole = self.checkpoint.tensors, self.plan.plain.keys() - cuts.keys()
            sent = {n for n in names & whole if can_send(infos[n].dtype)}
        if sent:
            yield from read_to_device(self.checkpoint.files, sent, self.device)
        yield from self.checkpoint.read(names - sent, cuts)

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
        rows, columns = layer.part_shape("weight", where.parts)
        stored = read_linear(layer_name, tensors, where.scheme, columns, rows)
        stored = runnable(layer_name, stored, self.requantize)
        cut, inputs = layer.cut("weight", where.parts), None
        if cut is not None:
            stored = cut_rows(stored, cut.rows)
            if cut.columns is not None:
                stored, channels = cut_columns(stored, *cut.columns)
                stored = runnable(layer_name, stored)
                if channels is not None:
                    inputs = self._gathered(where.module, channels)
        layer.load_quantized(where.parts, stored, inputs)

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


def resolve_dtype(
    dtype: str | torch.dtype, config: ModelConfig, checkpoint: Checkpoint | None
) -> torch.dtype:
    """The dtype of parameters that `load_model(dtype=...)` stands for."""
    if isinstance(dtype, str) and dtype == "auto":
        if config.dtype is not None:
            return config.dtype
        stored = checkpoint.tensors.get(EMBEDDING) if checkpoint is not None else None
        return _STORED.get(stored.dtype, torch.float32) if stored is not None else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _STORED.values():
        raise ValueError(
            f"load_model: dtype must be 'auto', float32, float16 or bfloat16, got {dtype!r}; "
            "activations of other dtypes are not supported"
        )
    return resolved


def _device(device: str | torch.device) -> torch.device:
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"load_model: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}; name a device"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(
            f"load_model: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}; the operators "
            "run on these"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"load_model: device must exist, got {device!r} with {torch.cuda.device_count()} CUDA "
            "devices visible; use device='cpu' or check the driver"
        )
    return resolved
