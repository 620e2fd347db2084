"""What an error says, where there is room for one sentence."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """An error in one sentence; one without a text says at least what it is."""
    text = str(error).strip()
    if not text:
        text = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    return text.splitlines()[0][:2000]
