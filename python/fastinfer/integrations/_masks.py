"""The mask function of `attn_implementation="fastinfer"`, and the form in which it hands masks on.

transformers asks once per step for a mask and gives the answer to every layer; the answer has to be
None or a 4-D tensor. Ours is

    None        plain: causal with equal numbers of queries and keys, one query that sees all keys,
                a causal prefill of the first Nq keys (the rest of a static cache is empty), or no
                mask at all in encoders
    int32       [B, form, 1, 2]: row b sees keys first[b] .. count[b] - 1, the last query aligned
                with key count[b] - 1. Only [:, 0, 0, :] is data (the rest is a broadcast view);
                form is 1 + 2 W, or 2 + 2 W in both directions, with W the window that a key must be
                in, the query's own position included in causal ones; 0: none. A size rather than a
                value, because the host has to know it without waiting for the device, and not that
                of a dimension of queries or keys, because models cut those (Gemma 4 keeps the last
                queries).
    bool        [B, 1, Nq, Nk], transformers' own: patterns that the kernels do not have, and masks
                that the model works on itself (adds to, concatenates, gives to an indexer)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_tracing


@dataclass(slots=True)
class KeyRange:
    """A decoded int32 mask: which keys each sequence sees."""

    first: Tensor  # int32 [B]
    count: Tensor  # int32 [B]
    causal: bool
    window: int | None

    @property
    def sides(self) -> tuple[int, int]:
        """window_size of the attention operators."""
        return window_sides(self.window, self.causal)


def window_sides(window: int | None, causal: bool) -> tuple[int, int]:
    """transformers counts a query's own position in a causal window; encoders give the distance."""
    if not window:
        return -1, -1
    return (window - 1, 0) if causal else (window, window)


def encode(first: Tensor, count: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """The int32 mask of these ranges."""
    # Stored as [2, B], so that what `decode` takes out of it needs no copy in every layer.
    data = torch.stack([first, count]).to(torch.int32).t()[:, None, None, :]
    return data.expand(-1, 2 * (window or 0) + (1 if causal else 2), 1, 2)


def is_key_range(mask: Tensor) -> bool:
    """Whether a mask is one of `encode`."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[2:] == (1, 2)


def decode(mask: Tensor) -> KeyRange:
    """What `encode` was given."""
    data = mask[:, 0, 0]
    window, both = divmod(mask.shape[1] - 1, 2)
    return KeyRange(data[:, 0].contiguous(), data[:, 1].contiguous(), not both, window or None)


def as_bool(mask: Tensor, q_length: int, kv_length: int) -> Tensor:
    """The int32 mask as transformers would have written it: bool [B, 1, Nq, Nk]."""
    keys = decode(mask)
    j = torch.arange(kv_length, device=mask.device)[None, None]
    # Position of each query among the keys: the last one is aligned with key count - 1.
    i = torch.arange(q_length, device=mask.device)[None, :, None] - q_length
    i = i + keys.count[:, None, None]
    seen = (j >= keys.first[:, None, None]) & (j < keys.count[:, None, None])
    if keys.causal:
        seen = seen & (j <= i)
    left, right = keys.sides
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    return seen.expand(-1, q_length, -1)[:, None]


def recognise(mask_function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask function of transformers; None: another pattern.

    Windows are found in the closures that transformers makes: `and_masks(overlay(W), plain)`.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None
    parts = _captured(mask_function).get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    plain = recognise(parts[1])
    if plain is None or plain[1] is not None:
        return None
    overlay = getattr(parts[0], "__qualname__", "").partition(".")[0]
    wanted = "sliding_window_overlay" if plain[0] else "sliding_window_bidirectional_overlay"
    window = _captured(parts[0]).get("sliding_window")
    if overlay != wanted or not isinstance(window, int) or window < 1:
        return None
    return plain[0], window


def _recognise_traced(
    mask_function: Callable[..., Any], local_size: int | None, config: Any
) -> tuple[bool, int | None] | None:
    """`recognise` where closures cannot be read: torch.compile traces the code that makes them.

    transformers gives `local_size` with windows and with chunks; which one the model has is in its
    configuration, and patterns laid over it are announced (by `use_vmap`, or by not allowing the
    causal skip) before this is called.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None
    chunked = getattr(config, "attention_chunk_size", None) is not None
    if local_size is None or chunked or not getattr(config, "is_causal", True):
        return None
    return (True, local_size) if local_size == getattr(config, "sliding_window", None) else None


def _captured(fn: Callable[..., Any]) -> dict[str, Any]:
    code, cells = getattr(fn, "__code__", None), getattr(fn, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def fastinfer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls once per step; see the top of this file for what it returns.

    Reads values of `attention_mask` (one synchronisation per step, as transformers' own mask
    functions do) unless it is traced; then padding that is not on one side fails an assertion when
    the compiled code runs.
    """

    def theirs() -> Tensor | None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            # None would be read as a mask of ours that is not this one.
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )

    kind = None
    if not use_vmap and torch.compiler.is_dynamo_compiling():
        plain = allow_is_causal_skip or q_length == 1
        kind = _recognise_traced(mask_function, local_size if plain else None, kwargs.get("config"))
    elif not use_vmap:
        kind = recognise(mask_function)
    if kind is None:
        return theirs()
    causal, window = kind
    skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    if not skip and _is_worked_on(
        causal, q_length, window is None and not isinstance(q_offset, Tensor), kwargs.get("config")
    ):
        return theirs()
    if window is not None and window >= kv_length:
        window = None
    end = q_offset + q_length - kv_offset if causal else kv_length
    tracing = any(isinstance(t, Tensor) and is_tracing(t) for t in (attention_mask, q_offset))
    seen = kv_offset + (end if causal else kv_length)
    if attention_mask is not None and not tracing and _no_padding(attention_mask, seen):
        attention_mask = None
    padding = _padding(attention_mask, kv_length, kv_offset)
    if padding is not None and not tracing:
        one_run, full = _look_at(padding, end, causal)
        if not one_run:
            return theirs()
        padding = None if full else padding
    plain = padding is None and window is None and skip and not tracing
    if getattr(kwargs.get("config"), "num_kv_shared_layers", 0):
        plain = False  # fewer queries may arrive than were asked for
    if plain and _is_plain(causal, q_length, kv_length, q_offset, kv_offset):
        return None
    if not causal and window is not None and (padding is not None or q_length != kv_length):
        return theirs()  # the kernels align windows with the last key of each sequence

    first = torch.zeros(batch_size, dtype=torch.int32, device=device)
    if isinstance(end, Tensor):
        count = end.to(torch.int32).expand(batch_size)
    else:
        count = torch.full_like(first, end)
    if padding is not None:
        if tracing:
            assert_one_run(padding, end, causal)
        first = _first(padding).expand(batch_size)
        if not causal:
            count = (kv_length - _first(padding.flip(1))).expand(batch_size)
    return encode(first, count, causal=causal, window=window)


# Types of models that were seen to work on their causal masks.
_workers: set[str] = set()


def _is_worked_on(causal: bool, q_length: int, growing: bool, config: Any) -> bool:
    """Whether a mask that must not be skipped is one that the model works on, so that it needs a
    row for every query and a column for every key.

    transformers itself never skips the mask of a step of one token with a cache of fixed size (one
    that is not `growing`): then it matters what the model asked for in the prompt.
    """
    if not causal or growing or q_length > 1:
        if causal and config is not None and not torch.compiler.is_compiling():
            _workers.add(config.model_type)
        return True
    return getattr(config, "model_type", None) in _workers


def _no_padding(attention_mask: Tensor, keys: int | Tensor) -> bool:
    """Whether a mask has the first `keys` keys of all rows and holds ones only: what most masks
    are, told with a few launches.
    """
    length = attention_mask.shape[-1]
    if not isinstance(keys, Tensor):
        return length >= keys and bool(attention_mask.all())
    return bool(attention_mask.all() & (keys <= length))


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool [B, Nk], True where there is a token."""
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = F.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _first(padding: Tensor) -> Tensor:
    """First True of each row; the row's length where there is none."""
    before = torch.cumsum(padding, dim=1) == 0
    return before.sum(1, dtype=torch.int32)


def _runs(padding: Tensor) -> Tensor:
    """Runs of True in each row."""
    before = F.pad(padding, (1, 0))[:, :-1]
    return (padding & ~before).sum(1)


def _look_at(padding: Tensor, end: int | Tensor, causal: bool) -> tuple[bool, bool]:
    """(every row is one run of tokens, and no token that a query could see is missing)."""
    seen = padding
    if causal:
        seen = padding | (torch.arange(padding.shape[1], device=padding.device) >= end)
    one_run, full = torch.stack([(_runs(padding) <= 1).all(), seen.all()]).tolist()
    return one_run, full


def assert_one_run(padding: Tensor, end: int | Tensor, causal: bool) -> None:
    """In traced code, where the values are not known yet."""
    torch._assert_async(
        (_runs(padding) <= 1).all(),
        "fastinfer: attention_mask must be padded on one side only in compiled code",
    )


def _is_plain(
    causal: bool, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> bool:
    """Whether the attention function, given no mask, does the right thing."""
    if not causal:
        return True
    if isinstance(q_offset, Tensor):
        if q_length == 1:  # (the answer would cost a synchronisation per step)
            return False
        q_offset = int(q_offset)
    offset = q_offset - kv_offset
    return kv_length == offset + 1 if q_length == 1 else offset == 0
