"""Quantised linear layers as modules: weight-only 4 and 8 bits, and int8 x int8.

Each is a drop-in for `torch.nn.Linear` in inference. The buffers are in the layout of the device
they are on; `state_dict` always holds the canonical tensors of the native format (see
`formats/native.py`), so a checkpoint does not depend on the device it was saved from. Moving a
layer to another kind of device packs it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastinfer import ops

from .canonical import CanonicalWeight, Int8Weight, QuantError
from .config import LinearScheme
from .formats import native
from .packed import layout_of, pack, unpack


class _QuantizedModule(nn.Module):
    """What both kinds share: the bias, and a state dict in canonical form."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    batch_invariant = False  # whether a row's bits must not depend on the other rows

    def _store(self, weight: Any, device: torch.device) -> None:
        raise NotImplementedError

    def _weight(self) -> CanonicalWeight | Int8Weight | None:
        raise NotImplementedError

    def _scheme(self) -> LinearScheme:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return next(b for b in self._buffers.values() if b is not None).device

    def canonical(self) -> Any:
        """The layer's weight (and bias) in canonical form, on the CPU.

        Raises:
            RuntimeError: no weights have been loaded yet.
        """
        weight = self._weight()
        if weight is None:
            raise RuntimeError(
                f"{type(self).__name__}: weights must be loaded first, got an empty layer; call "
                "load_state_dict or from_canonical"
            )
        weight.bias = None if self.bias is None else self.bias.detach().cpu()
        return weight

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in native.write("", self.canonical()).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tensors = {k[len(prefix) :]: t for k, t in state_dict.items() if k.startswith(prefix)}
        mine = {f"w.{k}": t for k, t in tensors.items()}
        wanted = {name[2:]: must for name, must in native.tensor_names("w", self._scheme()).items()}
        wanted["bias"] = self.bias is not None
        missing = [name for name, must in wanted.items() if must and name not in tensors]
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [
            prefix + k for k in tensors if k not in wanted or (k == "bias" and self.bias is None)
        ]
        if missing:
            return
        name = prefix.removesuffix(".") or type(self).__name__
        try:
            weight = native.read("w", mine, self._scheme(), self.in_features, self.out_features)
            weight.validate(name)
            if self.bias is not None:
                self.bias.data.copy_(tensors["bias"])
        except (QuantError, RuntimeError) as error:
            error_msgs.append(f"{name}: {error}".replace(f"{name}: w.", f"{prefix}"))
            return
        self._store(weight, self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _QuantizedModule:
        before = self.device
        after = fn(torch.empty(0, dtype=torch.int32, device=before)).device
        kept = dict(self._buffers)
        weight = None
        if layout_of(before) != layout_of(after) and "meta" not in (before.type, after.type):
            weight = self._weight()
        super()._apply(fn, recurse)
        if weight is not None:
            self._store(weight, after)
            return self
        # `.half()` and the like choose the dtype of activations; scales keep theirs.
        for name, buffer in kept.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class QuantLinear(_QuantizedModule):
    """y = x @ dequantised(weight).T + bias, with 4- or 8-bit weights (W4A16, W8A16).

    Args:
        in_features: K.
        out_features: N.
        bits: 4 or 8.
        group_size: input channels per scale: -1 (all) or a positive multiple of 8.
        bias: whether there is a bias [N].
        dtype: of the bias. Activations may be fp32 (CPU), fp16 or bf16, whatever this says.
        device: where the layer lives.

    A new layer is empty until `load_state_dict`, whose `qzeros`, `zeros` and `perm` may be absent;
    `from_canonical` makes a filled one.

    Raises:
        QuantError: bits or group size have no kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 128,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise QuantError(f"QuantLinear: bits must be 4 or 8, got {bits}")
        if not has_kernel(group_size):
            raise QuantError(
                "QuantLinear: group_size must be -1 or a positive multiple of 8, got "
                f"{group_size}; dequantise such weights"
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        self._scale_dtype, self._zero_dtype = torch.float32, None
        self.bias = _bias(out_features, dtype, device) if bias else None
        empty = torch.empty(0, dtype=torch.int32, device=device)
        self.register_buffer("packed_qweight", empty, persistent=False)
        for name in ("packed_scales", "packed_zeros", "perm"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def from_canonical(
        cls,
        weight: CanonicalWeight,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """A layer that holds this weight (and its bias).

        Args:
            weight: what to hold.
            dtype: of the bias; None: as it is.
            device: where the layer lives; None: where the codes are.
        """
        device = torch.device(device) if device is not None else weight.codes.device
        layer = cls(
            weight.in_features,
            weight.out_features,
            bits=weight.bits,
            group_size=weight.group_size,
            bias=weight.bias is not None,
            dtype=dtype or (weight.bias.dtype if weight.bias is not None else None),
            device=device,
        )
        if layer.bias is not None and weight.bias is not None:
            layer.bias.data.copy_(weight.bias)
        layer._store(weight, device)
        return layer

    def _scheme(self) -> LinearScheme:
        return LinearScheme("fastinfer", self.bits, self.group_size, None)

    def _store(self, weight: CanonicalWeight, device: torch.device) -> None:
        packed = pack(weight, device)
        self._scale_dtype = weight.scales.dtype
        self._zero_dtype = None if weight.zeros is None else weight.zeros.dtype
        self.packed_qweight, self.packed_scales, self.packed_zeros = packed
        self.perm = None if weight.perm is None else weight.perm.to(device, torch.int32)

    def _weight(self) -> CanonicalWeight | None:
        if self.packed_scales is None:
            return None
        weight = unpack(
            ops.PackedWeight(self.packed_qweight, self.packed_scales, self.packed_zeros),
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            in_features=self.in_features,
            scale_dtype=self._scale_dtype,
            zero_dtype=self._zero_dtype,
        )
        weight.perm = None if self.perm is None else self.perm.cpu()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], x's dtype."""
        return self.run(x, self.bias)

    def run(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """`forward` with another bias, optionally into `out` [M, N]."""
        if self.packed_scales is None:
            self.canonical()  # raises
        op = ops.int4_linear if self.bits == 4 else ops.int8_linear
        return op(
            x,
            self.packed_qweight,
            self.packed_scales,
            self.packed_zeros,
            _like(bias, x),
            group_size=self.group_size,
            out_features=self.out_features,
            perm=self.perm,
            batch_invariant=self.batch_invariant,
            out=out,
        )

    def extra_repr(self) -> str:
        order = ", act_order=True" if self.perm is not None else ""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}{order}"


class W8A8Linear(_QuantizedModule):
    """y = dequantised(int8(x) @ weight.T) + bias, activations quantised per token.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        dtype: of the bias.
        device: where the layer lives.

    A new layer is empty until `load_state_dict`; `from_canonical` makes a filled one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # [M, K] -> [M, 1], the largest magnitude of each token over what is elsewhere too; if set,
        # batch-invariant calls scale activations by it
        self.largest: Callable[[Tensor], Tensor] | None = None
        self.bias = _bias(out_features, dtype, device) if bias else None
        empty = torch.empty(0, dtype=torch.int8, device=device)
        self.register_buffer("weight", empty, persistent=False)
        self.register_buffer("weight_scale", None, persistent=False)

    @classmethod
    def from_canonical(
        cls,
        weight: Int8Weight,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> W8A8Linear:
        """A layer that holds this weight (and its bias); arguments as in `QuantLinear`."""
        device = torch.device(device) if device is not None else weight.codes.device
        layer = cls(
            weight.in_features,
            weight.out_features,
            bias=weight.bias is not None,
            dtype=dtype or (weight.bias.dtype if weight.bias is not None else None),
            device=device,
        )
        if layer.bias is not None and weight.bias is not None:
            layer.bias.data.copy_(weight.bias)
        layer._store(weight, device)
        return layer

    def _scheme(self) -> LinearScheme:
        return LinearScheme("fastinfer", 8, -1, True, activations="int8_token")

    def _store(self, weight: Int8Weight, device: torch.device) -> None:
        self.weight = weight.codes.to(device).contiguous()
        self.weight_scale = weight.scales.to(device, torch.float32).contiguous()

    def _weight(self) -> Int8Weight | None:
        if self.weight_scale is None:
            return None
        return Int8Weight(self.weight.cpu(), self.weight_scale.cpu())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], x's dtype."""
        return self.run(x, self.bias)

    def run(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """`forward` with another bias, optionally into `out` [M, N]."""
        if self.weight_scale is None:
            self.canonical()  # raises
        if self.batch_invariant and self.largest is not None:
            codes, scale, _ = ops.quantize_per_token(torch.cat((x, self.largest(x)), dim=-1))
            codes = codes[..., : self.in_features].contiguous()
        else:
            codes, scale, _ = ops.quantize_per_token(x)
        return ops.w8a8_linear(
            codes,
            scale,
            self.weight,
            self.weight_scale,
            _like(bias, x),
            out_dtype=x.dtype,
            batch_invariant=self.batch_invariant,
            out=out,
        )


def has_kernel(group_size: int) -> bool:
    """Whether the packed kernels take groups of this size."""
    return group_size == -1 or (group_size > 0 and group_size % 8 == 0)


def _bias(n: int, dtype: torch.dtype | None, device: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(n, dtype=dtype, device=device), requires_grad=False)


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """The kernels add a bias of the activations' dtype."""
    return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
