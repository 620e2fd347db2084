"""Quantise transformers models while they load, save them, and load them again bit-equal.

    enable()
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FastinferInt4Config())
    model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)

Weights are rounded to nearest (`fastinfer.quant.rtn`); for GPTQ, AWQ or SmoothQuant use
`fastinfer quantize` and `fastinfer.quant.load_quantized`. While transformers fills the model, each
linear layer is a `_Staged` module whose buffers are the tensors of the native format
(`quant/formats/native.py`); afterwards it becomes a `QuantLinear`, whose `state_dict` has the same
names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quant.canonical import CanonicalWeight
from ..quant.config import LinearScheme, matches
from ..quant.formats import native
from ..quant.layers import QuantLinear, has_kernel
from ..quant.rtn import GridOptions, rtn


class _Config(QuantizationConfigMixin):
    """Options of quantising on load.

    Args:
        group_size: input channels per scale: a multiple of 8, or -1 for one per output channel.
        symmetric: False adds zero points.
        modules_to_not_convert: layers left as they are (names or parts of names), besides the
            output head.
    """

    bits: int
    method: str

    def __init__(
        self,
        group_size: int = 128,
        symmetric: bool = True,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = self.method
        self.group_size, self.symmetric = group_size, symmetric
        self.modules_to_not_convert = modules_to_not_convert
        if not has_kernel(group_size):
            raise ValueError(
                f"{type(self).__name__}: group_size must be -1 or a positive multiple of 8, got "
                f"{group_size}"
            )


class FastinferInt4Config(_Config):
    __doc__ = _Config.__doc__
    bits, method = 4, "fastinfer_int4"


class FastinferInt8Config(_Config):
    __doc__ = _Config.__doc__
    bits, method = 8, "fastinfer_int8"


class _Staged(nn.Module):
    """A quantised layer while transformers fills it."""

    def __init__(self, linear: nn.Linear, config: _Config, *, stored: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scheme = LinearScheme("fastinfer", config.bits, config.group_size, config.symmetric)
        expected = native.layout("w", scheme, self.in_features, self.out_features)
        names = ("qweight", "scales") if config.symmetric else ("qweight", "scales", "qzeros")
        for name in names:
            dtype = torch.float32 if name == "scales" else torch.int32
            shape = expected[f"w.{name}"].shape
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        # What the checkpoint holds; transformers drops tensors without a place in the model.
        self.weight = None if stored else linear.weight
        self.bias = linear.bias
        self.scheme = scheme

    def canonical(self, name: str) -> CanonicalWeight:
        tensors = {f"w.{k}": t.cpu() for k, t in self.named_buffers()}
        weight = native.read("w", tensors, self.scheme, self.in_features, self.out_features)
        assert isinstance(weight, CanonicalWeight)
        return weight.validate(name)

    def finished(self, name: str) -> QuantLinear:
        weight = self.canonical(name)
        weight.bias = None if self.bias is None else self.bias.detach()
        return QuantLinear.from_canonical(weight, device=self.get_buffer("qweight").device)


class _Round(ConversionOps):
    """Weight of the checkpoint -> tensors of the native format."""

    def __init__(self, config: _Config) -> None:
        self.options = GridOptions(config.bits, config.group_size, config.symmetric, torch.float32)

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        *,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        if isinstance(weight, list):
            (weight,) = weight
        layer = full_layer_name.removesuffix(".weight")
        try:
            rounded = rtn(weight.cpu(), self.options)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {k: t.to(weight.device) for k, t in native.write(layer, rounded).items()}


class FastinferQuantizer(HfQuantizer):
    """Both bit widths; which one is in the configuration."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, add_default_skips=True
        )
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not any(matches(s, name) for s in skip):
                parent, _, child = name.rpartition(".")
                staged = _Staged(module, config, stored=self.pre_quantized)
                setattr(model.get_submodule(parent), child, staged)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, _Staged):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.finished(name))
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and isinstance(model.get_submodule(layer), _Staged)

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self.quantization_config)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make both methods known to transformers; once per process."""
    for config in (FastinferInt4Config, FastinferInt8Config):
        register_quantization_config(config.method)(config)
        register_quantizer(config.method)(FastinferQuantizer)
