"""Models of transformers that compute attention themselves and never ask for an attention function.

`set_attn_implementation` leaves them alone, with a warning of transformers. `from_pretrained` and
`from_config` give them any name that is registered: the model would run its own code on masks made
for ours, where None can stand for "causal". `watch_names` lets transformers choose for such models.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

from transformers import PreTrainedModel

from ._fallback import refuse_or_warn

_ATTENTION = re.compile(r"^class \w*Attention\w*\((?:\w+\.)*Module\):", re.MULTILINE)


def watch_names(names: tuple[str, ...]) -> None:
    """Wrap the choice of an implementation, where it has the known form."""
    original = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if original is None or hasattr(original, "fastinfer_original"):
        return

    @functools.wraps(original)
    def chosen(self: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
        if requested in names and not asks_for_attention(type(self)):
            refuse_or_warn(f"{type(self).__name__} has attention of its own, which no name changes")
            requested = None
        return original(self, requested, *args, **kwargs)

    chosen.fastinfer_original = original  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = chosen


@functools.lru_cache(None)
def asks_for_attention(model: type) -> bool:
    """Whether the file of a model class takes attention functions from transformers; where there
    is no attention in it, or no file, it is taken to. The same guess as transformers' for
    `set_attn_implementation`.
    """
    try:
        code = inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):
        return True
    return "ALL_ATTENTION_FUNCTIONS" in code or _ATTENTION.search(code) is None
