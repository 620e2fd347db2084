"""fastinfer inside transformers 5.

    import fastinfer.integrations.transformers as fi
    fi.enable()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastinfer")

What `enable` makes known to transformers:

    attn_implementation="fastinfer"              generate with any cache, generate_batch
    attn_implementation="fastinfer/flash-attn2"  the same under a name that `transformers serve` and
                                                 continuous batching accept
    quantization_config=FastinferInt4Config() or FastinferInt8Config()   rounds while loading

`python -m fastinfer.integrations.transformers serve ...` is the `transformers` command with all of
this enabled.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._quantizer import FastinferInt4Config as FastinferInt4Config
    from ._quantizer import FastinferInt8Config as FastinferInt8Config

ATTENTION = "fastinfer"
PAGED_ATTENTION = "fastinfer/flash-attn2"

_enabled = False


def enable() -> None:
    """Register attention, masks, continuous batching and quantizers with transformers. Safe to call
    twice; until it is called, transformers behaves as it always does.

    Raises:
        ImportError: transformers is missing or older than 5.
    """
    global _enabled
    if _enabled:
        return
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "fastinfer.integrations.transformers: transformers must be installed, got none; "
            "pip install 'transformers>=5'"
        ) from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            "fastinfer.integrations.transformers: transformers must be 5 or newer, got "
            f"{transformers.__version__}; pip install -U transformers"
        )
    from . import _loader, _own_attention, _quantizer
    from ._attention import fastinfer_attention
    from ._masks import fastinfer_mask

    for name in (ATTENTION, PAGED_ATTENTION):
        transformers.AttentionInterface.register(name, fastinfer_attention)
        # Without a mask function of its own name, transformers drops the mask in silence.
        transformers.AttentionMaskInterface.register(name, fastinfer_mask)
    _own_attention.watch_names((ATTENTION, PAGED_ATTENTION))
    _loader.order_streams()
    problem = _loader.install()
    if problem is not None and not _loader.offer_package():
        warnings.warn(
            f"fastinfer: generate_batch cannot use {PAGED_ATTENTION!r} with transformers "
            f"{transformers.__version__} ({problem}); everything else works",
            stacklevel=2,
        )
    _quantizer.register()
    _enabled = True


def __getattr__(name: str) -> Any:
    if name in ("FastinferInt4Config", "FastinferInt8Config"):
        return getattr(importlib.import_module("._quantizer", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The `transformers` command, enabled."""
    from transformers.cli.transformers import main as command

    enable()
    command()


if __name__ == "__main__":
    main()
