"""fastinfer under flash-attn's name, for code that says `import flash_attn`.

    from fastinfer.integrations import flash_attn
    flash_attn.install()
    from flash_attn import flash_attn_qkvpacked_func
    from flash_attn.bert_padding import unpad_input, pad_input

The forward pass of flash-attn 2.8's interface. Nothing is installed until `install` is called, and
a flash-attn that is already imported is not replaced unless asked for.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _lib
from ..ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

VERSION = "2.8.3"  # of the interface; fastinfer's own version follows the plus sign
_MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of qkv [B, S, 3, H, D]."""
    q, k, v = _split("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of q [B, Sq, Hq, D] and kv [B, Sk, 2, Hkv, D]."""
    k, v = _split("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of qkv [T, 3, H, D]."""
    q, k, v = _split("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of q [Tq, Hq, D] and kv [Tk, 2, Hkv, D]."""
    k, v = _split("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _split(name: str, arg: str, packed: Tensor, dims: int, parts: int) -> tuple[Tensor, ...]:
    _lib.require_tensors(name, **{arg: packed})
    _lib.check(
        packed.dim() == dims and packed.shape[-3] == parts,
        f"{name}: {arg} must have {dims} dimensions, the third from the end of size {parts}, got "
        f"{_lib.describe(packed)}",
    )
    return packed.unbind(-3)


# ---- bert_padding


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x, by their numbers."""
    return x[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] with `values` in the rows `indices`."""
    out = values.new_zeros(first_axis_dim, *values.shape[1:])
    out[indices] = values
    return out


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the rows of [B, S, ...] that the mask [B, S] names.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: [B, S], 1 for tokens.
        unused_mask: [B, S], 1 for rows to keep that belong to no sequence's used length.

    Returns:
        (rows [T, ...], their numbers in the flattened batch, cu_seqlens int32 [B + 1], longest
        sequence, used length of each sequence int32 [B]).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    starts = F.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[indices], indices, starts, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: rows [T, ...] back to [B, S, ...], zero elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def _not_here(name: str) -> Any:
    raise AttributeError(
        f"flash_attn: {name} is not part of fastinfer, which has the forward pass of the attention "
        "functions; uninstall() gives the name back to the flash-attn package"
    )


def _make(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name, f"{name}, served by fastinfer (fastinfer.integrations).")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "flash_attn")
    module.__getattr__ = _not_here  # type: ignore[attr-defined]
    vars(module).update(names)
    return module


def install(*, replace: bool = False) -> types.ModuleType:
    """Put a module called flash_attn into `sys.modules`.

    Args:
        replace: also when another flash_attn is imported already; code that holds its functions
            keeps them.

    Returns:
        The module, with the attention functions, `flash_attn_interface`, `bert_padding` and
        `__version__` "2.8.3+fastinfer...".

    Raises:
        RuntimeError: another flash_attn is imported already.
    """
    present = sys.modules.get("flash_attn")
    if present is not None and getattr(present, "__fastinfer__", False):
        return present
    if present is not None and not replace:
        raise RuntimeError(
            "flash_attn.install: flash_attn must not be imported yet, got "
            f"{getattr(present, '__file__', present)}; call install before it, or install("
            "replace=True)"
        )
    functions = {
        f.__name__: f
        for f in (
            flash_attn_func,
            flash_attn_kvpacked_func,
            flash_attn_qkvpacked_func,
            flash_attn_varlen_func,
            flash_attn_varlen_kvpacked_func,
            flash_attn_varlen_qkvpacked_func,
            flash_attn_with_kvcache,
        )
    }
    padding = (index_first_axis, index_put_first_axis, unpad_input, pad_input)
    from .._version import __version__

    interface = _make("flash_attn.flash_attn_interface", **functions)
    bert = _make("flash_attn.bert_padding", **{f.__name__: f for f in padding})
    top = _make(
        "flash_attn",
        **functions,
        flash_attn_interface=interface,
        bert_padding=bert,
        __version__=f"{VERSION}+fastinfer{__version__}",
        __path__=[],
        __all__=sorted(functions),
        __fastinfer__=True,
    )
    for name in [m for m in sys.modules if m.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    sys.modules.update(zip(_MODULES, (top, interface, bert), strict=True))
    return top


def uninstall() -> None:
    """Take the module out again; a no-op when it is not there."""
    if getattr(sys.modules.get("flash_attn"), "__fastinfer__", False):
        for name in _MODULES:
            sys.modules.pop(name, None)
