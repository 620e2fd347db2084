"""Continuous batching (`generate_batch`, `transformers serve`) with fastinfer's attention.

transformers admits to it only "sdpa", "paged|eager" and names that contain "flash" (the server also
wants a known one or owner/name, as kernels on the hub have), and looks for the latter's functions
with `modeling_flash_attention_utils._lazy_imports`. That function is wrapped, so that NAME is found
here, without the `kernels` package and without asking the hub; and so is the manager's choice of an
implementation, so that a model loaded with "fastinfer" takes NAME for the time of the run. Both are
private: `install` checks that they are what they were in the releases this was written against, and
says so otherwise. Then `offer_package` remains: where the `kernels` package is installed, it finds
our functions as a local kernel under NAME, and transformers does the rest by itself.

`order_streams` mends a race of transformers (5.17 to 5.24), whatever attention is used: the tensors
of a step are zeroed and written on the stream of the caller, and read on streams that do not wait
for it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import cuda
from transformers import modeling_flash_attention_utils as loader
from transformers.generation.continuous_batching import ContinuousBatchingManager as Manager
from transformers.generation.continuous_batching import input_outputs

from ._older_paging import PREFIX, fastinfer_paged_attention, no_mask

PLAIN = "fastinfer"
NAME = "fastinfer/flash-attn2"  # "flash...2": the name transformers' paged decode path asks for
_ARGUMENTS = ["implementation", "attention_wrapper", "allow_all_kernels"]
_HELPERS = ("_pad_input", "_unpad_input", "lazy_import_flash_attention")


def install() -> str | None:
    """Make NAME known to the loader. Returns why that is not possible, or None."""
    original = getattr(loader, "_lazy_imports", None)
    if original is None or not all(hasattr(loader, name) for name in _HELPERS):
        return "modeling_flash_attention_utils has another form"
    if hasattr(original, "fastinfer_original"):
        return None
    if list(inspect.signature(original).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        return "_lazy_imports takes other arguments"

    @functools.wraps(original)
    def wrapped(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation not in (NAME, PREFIX + NAME):
            return original(implementation, *args, **kwargs)
        from .. import ops

        return (
            ops.flash_attn_func,
            ops.flash_attn_varlen_func,
            ops.flash_attn_with_kvcache,
            loader._pad_input,
            loader._unpad_input,
        )

    choose = getattr(Manager, "switch_to_cb_friendly_attn", None)
    if choose is None or list(inspect.signature(choose).parameters)[:2] != ["self", "model"]:
        return "ContinuousBatchingManager has another form"

    @functools.wraps(choose)
    def chosen(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        plain = model.config._attn_implementation == PLAIN
        if plain:
            model.set_attn_implementation(NAME)
        choose(self, model, *args, **kwargs)
        if plain:
            self._original_attn_impl = PLAIN  # `stop` goes back to it

    wrapped.fastinfer_original = original  # type: ignore[attr-defined]
    loader._lazy_imports = wrapped
    if hasattr(loader, "lazy_import_paged_flash_attention"):  # before 5.20: "paged|" and NAME
        transformers.AttentionInterface.register(PREFIX + NAME, fastinfer_paged_attention)
        transformers.AttentionMaskInterface.register(PREFIX + NAME, no_mask)
    Manager.switch_to_cb_friendly_attn = chosen
    return None


def order_streams() -> None:
    """Let the copies and the computation of a step wait for what was begun on the caller's stream.

    Asynchronous batching resets its tensors on the GPU on the default stream and then fills them
    from another one. Where the GPU is busy, the zeros come late: prompts become token 0.
    """
    for name in ("ContinuousBatchingIOs", "ContinuousBatchingAsyncIOs"):
        kind = getattr(input_outputs, name, None)
        original = getattr(kind, "get_model_kwargs", None)
        if original is not None and not hasattr(original, "fastinfer_original"):
            kind.get_model_kwargs = _after_the_caller(original)


def _after_the_caller(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def ordered(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of both the first in a step; the asynchronous class lets the second wait for it.
        stream = getattr(self, "h2d_stream", None) or getattr(self, "compute_stream", None)
        if isinstance(stream, cuda.Stream):
            stream.wait_stream(cuda.current_stream(stream.device))
        return original(self, *args, **kwargs)

    ordered.fastinfer_original = original  # type: ignore[attr-defined]
    return ordered


def offer_package() -> bool:
    """Name our local kernel package to the `kernels` library. Returns whether that is installed, in
    the release that transformers asks for.

    Tested with the release that transformers 5.17 asks for (tests/integrations/
    test_kernel_package.py runs where it is installed).
    """
    from transformers.utils import import_utils

    if not getattr(import_utils, "is_kernels_available", lambda: False)():
        return False
    others = os.environ.get("LOCAL_KERNELS")
    ours = f"{NAME}={Path(__file__).with_name('kernel_package')}"
    os.environ["LOCAL_KERNELS"] = f"{others}:{ours}" if others else ours
    return True
