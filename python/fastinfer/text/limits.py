"""How much work one rendering of a chat template may do, and the checks that hold it to that.

A check runs before a string is built wherever its size can be foretold, because a single operation
can ask for terabytes. Results are checked as well, which ends repeated doubling.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import SecurityError


@dataclass(slots=True, frozen=True)
class RenderLimits:
    """What one rendering may use.

    Attributes:
        max_chars: characters of output and of any string on the way to it, items of any list.
        max_seconds: wall time.
    """

    max_chars: int = 8 * 2**20
    max_seconds: float = 10.0


class LimitExceeded(SecurityError):
    """The template used more than :class:`RenderLimits` allows."""


# (deadline on time.monotonic(), max_chars, max_seconds) of the rendering under way.
_BUDGET: ContextVar[tuple[float, int, float]] = ContextVar("fastinfer_render_budget")
_MAX_INT_BITS = 1 << 16
_MAX_WIDTH = 1000
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4,})")
_WIDE_FORMAT = re.compile(r"\{[^{}:]*:[^{}]*(?:\{|\d{4,})")  # one way to match: linear time


@contextmanager
def render_budget(limits: RenderLimits) -> Iterator[None]:
    """Everything a chat environment does inside counts against these limits."""
    deadline = time.monotonic() + limits.max_seconds
    token = _BUDGET.set((deadline, limits.max_chars, limits.max_seconds))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def tick() -> None:
    """Refuse to go on after the deadline."""
    deadline, _, seconds = _BUDGET.get()
    if time.monotonic() > deadline:
        raise LimitExceeded(f"it ran longer than {seconds:g} seconds")


def check_size(size: int) -> None:
    """Refuse to build something of this many characters or items."""
    limit = _BUDGET.get()[1]
    if size > limit:
        raise LimitExceeded(f"it built more than {limit} characters or items")


def check_result(value: Any) -> Any:
    """The value, if it is no string or list beyond the limit."""
    if isinstance(value, (str, bytes, list, tuple)):
        check_size(len(value))
    return value


def check_width(value: int | str | None) -> None:
    """Refuse an absurd indentation, field width or number of columns."""
    width = len(value) if isinstance(value, str) else value
    if isinstance(width, int) and abs(width) > _MAX_WIDTH:
        raise LimitExceeded(f"it asked for a width of {width}, more than {_MAX_WIDTH}")


def check_binop(operator: str, left: Any, right: Any) -> None:
    """Checks of ``left <operator> right`` for ``+``, ``*``, ``**`` and ``%``."""
    if operator == "%" and isinstance(left, (str, bytes)):
        check_format(left, right if isinstance(right, tuple) else (right,), percent=True)
    elif isinstance(left, int) and isinstance(right, int):
        bits, more = left.bit_length(), right.bit_length()
        growth = {"*": bits + more, "**": bits * max(right, 0)}.get(operator, 0)
        if growth > _MAX_INT_BITS:
            raise LimitExceeded(f"it computed an integer of more than {_MAX_INT_BITS} bits")
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and hasattr(sequence, "__len__"):
                check_size(len(sequence) * count)
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        check_size(len(left) + len(right))


def check_format(template: str | bytes, values: Iterable[Any], *, percent: bool) -> None:
    """Checks of ``template % values`` and of ``template.format(*values)``."""
    text = template.decode("latin-1") if isinstance(template, bytes) else template
    if (_WIDE_PERCENT if percent else _WIDE_FORMAT).search(text):
        raise LimitExceeded("it formatted with a computed width or one of four digits or more")
    longest = 0
    for value in values:
        parts = value.values() if isinstance(value, Mapping) else (value,)
        longest = max([longest, *(len(part) for part in parts if isinstance(part, (str, bytes)))])
    check_size(len(text) + text.count("%" if percent else "{") * longest)


def check_replace(text: Any, old: Any, new: Any) -> None:
    """Check of ``text.replace(old, new)``."""
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        check_size(len(text) + text.count(old) * len(new))


def check_join(glue: str | bytes, items: Any) -> list[Any]:
    """Check of ``glue.join(items)``; returns the items, which may have been a generator."""
    items = list(items)
    strings = sum(len(item) for item in items if isinstance(item, (str, bytes)))
    check_size(strings + len(glue) * len(items))
    return items


def guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A jinja2 filter with the checks of its name."""
    # jinja2 passes a context, an evaluation context or the environment first where marked so.
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tick()
        values = args[skip:]
        if name in ("center", "indent", "batch", "slice"):
            for value in (*values[1:], *kwargs.values()):
                check_width(value)
                if name == "indent" and isinstance(value, (int, str)):
                    width = len(value) if isinstance(value, str) else value
                    check_size((str(values[0]).count("\n") + 1) * width)
        elif name == "replace" and len(values) >= 3:
            check_replace(str(values[0]), str(values[1]), str(values[2]))
        elif name == "join" and values:
            glue = str(values[1]) if len(values) > 1 else str(kwargs.get("d", ""))
            args = (*args[:skip], check_join(glue, values[0]), *values[1:])
        elif name == "format" and values:
            check_format(str(values[0]), (*values[1:], kwargs), percent=True)
        return check_result(function(*args, **kwargs))

    return guarded
