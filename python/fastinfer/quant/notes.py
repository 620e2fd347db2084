"""What a loader says aloud: one log line per kind of remark, however many layers it concerns.

Formats call `note` where they repair, ignore or convert something. While a load runs the remarks
are collected and logged once at its end; outside of one they are logged at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger("fastinfer.quant")
_collected: ContextVar[dict[str, list[str]] | None] = ContextVar("fastinfer_notes", default=None)
_silent: ContextVar[bool] = ContextVar("fastinfer_notes_silent", default=False)


def note(name: str, text: str) -> None:
    """Say `text` about the layer or tensor `name`."""
    collected = _collected.get()
    if collected is None:
        log.warning("%s: %s", name, text)
    else:
        collected.setdefault(text, []).append(name)


@contextmanager
def collecting(*, say: bool = True) -> Iterator[dict[str, list[str]]]:
    """Within this block remarks with the same text become one line at its end (`say` false: none,
    of such blocks inside it neither); yields text -> names.
    """
    collected: dict[str, list[str]] = {}
    token, silent = _collected.set(collected), _silent.get()
    within = _silent.set(silent or not say)
    try:
        yield collected
    finally:
        _collected.reset(token)
        _silent.reset(within)
        for text, names in collected.items() if say and not silent else ():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            log.warning("%s%s: %s", names[0], more, text)
