"""Loads a quantised checkpoint into somebody else's model, e.g. one built by transformers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import Checkpoint
from . import notes
from .canonical import CanonicalWeight, Int8Weight, QuantError
from .config import LinearScheme, QuantConfig, read_quant_config
from .formats import check_headers, is_plain, read_linear, tensor_names
from .fused import runnable
from .layers import QuantLinear, W8A8Linear

_WHO = "load_quantized"


def load_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    requantize: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Fill a model from a quantised checkpoint, in place.

    Each `nn.Linear` that the checkpoint holds quantised is replaced by a `QuantLinear` or
    `W8A8Linear`; all other parameters and buffers are filled as they are. Gradients are switched
    off for the whole model.

    Args:
        model: any module whose parameter names are those of the checkpoint, e.g.
            `LlamaForCausalLM(config)`. Its random initial weights are not used, so it may be on the
            meta device, except for buffers that the checkpoint does not hold.
        path: checkpoint folder: config.json with `quantization_config` (or quantize_config.json,
            quant_config.json) and safetensors files.
        device: where the model goes; None: each tensor stays where it is, what is on meta goes to
            the CPU.
        dtype: of the unquantised parameters; None: the dtype each has.
        requantize: 4 or 8: quantise again what no kernel reads as it is stored (bitsandbytes nf4
            and fp4, GPTQ with irregular groups), rounding to nearest in groups of 64. None:
            dequantise it. Either is logged.
        progress: show a progress bar while reading, when stderr is a terminal.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        QuantError: the checkpoint is not quantised, the format is not supported, a tensor has no
            place in the model, a parameter no tensor, or a tensor is damaged; the message names it.

    Example:
        >>> config = AutoConfig.from_pretrained(path)
        >>> del config.quantization_config
        >>> model = load_quantized(LlamaForCausalLM(config), path)
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{_WHO}: path must be a checkpoint folder on this machine, got {str(path)!r}; "
            "download the checkpoint first"
        )
    with notes.collecting(), torch.no_grad():
        try:
            quant = read_quant_config(folder)
            if quant is None:
                raise QuantError(
                    f"{folder}: config.json must have a quantization_config, got none; load plain "
                    "checkpoints with the model's own library"
                )
            if dtype is not None:
                model.to(dtype)
            if device is not None and not any(p.is_meta for p in model.parameters()):
                model.to(device)
            loading = _Loading(model, Checkpoint(folder, who=_WHO), quant, device, requantize)
            loading.run(progress=progress)
        except QuantError as error:
            raise QuantError(f"{_WHO}: {error}") from error
    model.requires_grad_(False)
    return model.eval()


@dataclass(slots=True)
class _Layer:
    """A linear layer to be replaced."""

    module: nn.Linear
    scheme: LinearScheme
    names: frozenset[str]  # tensors of its weight
    got: dict[str, Tensor] = field(default_factory=dict)


class _Loading:
    """One run of `load_quantized`."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        quant: QuantConfig,
        device: str | torch.device | None,
        requantize: int | None,
    ) -> None:
        self.model, self.checkpoint, self.quant = model, checkpoint, quant
        self.device, self.requantize = device, requantize
        self.slots = _slots(model)
        self.layers = self._find_layers()
        self.owner = {name: layer for layer, at in self.layers.items() for name in at.names}
        self.zero_biases = {
            f"{name}.bias"
            for name, at in self.layers.items()
            if at.module.bias is None and f"{name}.bias" in checkpoint.tensors
        }
        self._check_names()

    def _find_layers(self) -> dict[str, _Layer]:
        dtypes = {name: info.dtype for name, info in self.checkpoint.tensors.items()}
        found = {}
        for name, module in self.model.named_modules():
            scheme = self.quant.for_module(name) if isinstance(module, nn.Linear) else None
            # A head that shares the embedding's weight is not stored on its own.
            if scheme is None or len(self.slots[f"{name}.weight"].names) > 1:
                continue
            if is_plain(name, scheme, dtypes):
                notes.note(
                    name, "stored in floating point although quantization_config does not except it"
                )
                continue
            names = frozenset(n for n in tensor_names(name, scheme) if n in dtypes)
            found[name] = _Layer(module, scheme, names)
        return found

    def _check_names(self) -> None:
        """Every tensor has a place, every parameter a tensor: known before data is read."""
        stored = self.checkpoint.tensors
        replaced = {f"{name}.weight" for name in self.layers}
        required = {
            name
            for layer, at in self.layers.items()
            for name, must in tensor_names(layer, at.scheme).items()
            if must
        }
        missing = sorted(name for name in required if name not in stored)
        for name, slot in self.slots.items():
            if name in replaced or slot.names[0] != name or not slot.required:
                continue
            if not any(alias in stored for alias in slot.names):
                missing.append(name)
        unused = [
            name
            for name in stored
            if name not in self.owner
            and name not in self.zero_biases
            and (name not in self.slots or name in replaced)
            and not name.endswith("rotary_emb.inv_freq")
        ]
        if self.quant.raw.get("kv_cache_scheme"):
            unused = [name for name in unused if not name.endswith(("_scale", "_zero_point"))]
        if missing or unused:
            found = "; ".join(
                f"{what} {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}"
                for what, names in (("missing", missing), ("without a place in the model", unused))
                if names
            )
            raise QuantError(
                f"the names of the checkpoint ({self.quant.method}) must be those of "
                f"{type(self.model).__name__}, got {found}; build the model from the config.json "
                "of this checkpoint"
            )
        shapes = {name: info.shape for name, info in stored.items()}
        dtypes = {name: info.dtype for name, info in stored.items()}
        for name, at in self.layers.items():
            k, n = at.module.in_features, at.module.out_features
            check_headers(name, at.scheme, shapes, dtypes, k, n)

    def run(self, *, progress: bool) -> None:
        names = {*self.owner, *self.zero_biases}
        names |= {name for name in self.checkpoint.tensors if name in self.slots}
        with tqdm(
            total=len(names),
            desc="loading weights",
            unit="tensor",
            disable=not (progress and sys.stderr.isatty()),
        ) as bar:
            for name, tensor in self.checkpoint.read(names):
                if name in self.owner:
                    self._quantized(self.owner[name], name, tensor)
                elif name in self.zero_biases:
                    if bool(tensor.any()):
                        raise QuantError(
                            f"{name}: must be zero, because the model's layer has no bias, got "
                            "other values; build the model with biases"
                        )
                else:
                    self._plain(name, tensor)
                bar.update()
        left = [n for n, b in self.model.named_buffers() if b.is_meta]
        if left:
            raise QuantError(
                f"{', '.join(left[:4])}: buffers that the checkpoint does not hold must not be on "
                "the meta device; build the model on the CPU"
            )

    def _plain(self, name: str, tensor: Tensor) -> None:
        slot = self.slots[name]
        if tuple(tensor.shape) != tuple(slot.tensor.shape):
            raise QuantError(
                f"{name}: must be {list(slot.tensor.shape)}, got {list(tensor.shape)}; build the "
                "model from the config.json of this checkpoint"
            )
        if tensor.is_floating_point() != slot.tensor.is_floating_point():
            raise QuantError(f"{name}: must be {slot.tensor.dtype}, got {tensor.dtype}")
        if slot.filled and not torch.equal(tensor.to(slot.tensor), slot.tensor):
            raise QuantError(
                f"{name}: must equal {', '.join(n for n in slot.names if n != name)}, with which "
                "the model ties it, got other values; set tie_word_embeddings to false"
            )
        slot.fill(self.model, tensor, self.device)

    def _quantized(self, layer: str, name: str, tensor: Tensor) -> None:
        at = self.layers[layer]
        at.got[name] = tensor
        if len(at.got) < len(at.names):
            return
        old, tensors = at.module, dict(at.got)
        at.got.clear()
        stored = read_linear(layer, tensors, at.scheme, old.in_features, old.out_features)
        stored = runnable(layer, stored, self.requantize)
        if isinstance(stored, Tensor):
            self._plain(f"{layer}.weight", stored)
            return
        device = self.device or ("cpu" if old.weight.is_meta else old.weight.device)
        new = _replacement(stored, device)
        new.bias = old.bias  # filled, or still to be
        _set(self.model, layer, new)


def _replacement(
    stored: CanonicalWeight | Int8Weight, device: str | torch.device
) -> QuantLinear | W8A8Linear:
    if isinstance(stored, Int8Weight):
        return W8A8Linear.from_canonical(stored, device=device)
    return QuantLinear.from_canonical(stored, device=device)


@dataclass(slots=True)
class _Slot:
    """A parameter or buffer of the model, under all its names."""

    tensor: Tensor
    names: list[str]
    required: bool
    filled: bool = False

    def fill(self, model: nn.Module, tensor: Tensor, device: str | torch.device | None) -> None:
        self.filled = True
        if not self.tensor.is_meta:
            self.tensor.data.copy_(tensor)
            return
        filled = tensor.to(device or "cpu", self.tensor.dtype, copy=True)
        if isinstance(self.tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=False)
        for name in self.names:
            _set(model, name, filled)
        self.tensor = filled


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Name -> slot; tied parameters share one."""
    by_identity: dict[int, _Slot] = {}
    slots = {}
    persistent = set(model.state_dict(keep_vars=True))
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        required = isinstance(tensor, nn.Parameter) or name in persistent
        slot = by_identity.setdefault(id(tensor), _Slot(tensor, [], required))
        slot.names.append(name)
        slots[name] = slot
    return slots


def _set(model: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(value, Tensor) and child in owner._buffers:
        owner._buffers[child] = value
    else:
        setattr(owner, child, value)
