"""The jinja2 environment chat templates run in.

A template comes with the checkpoint, so it is untrusted input. jinja2's immutable sandbox keeps it
away from Python's internals and from changing its arguments. What it does not bound is work, so on
top of it here:

* a deadline, checked at every loop iteration, call, filter and concatenation;
* a limit on every string or list that an operator, a call or a filter of known growth would build,
  checked before it is built;
* a limit on the output.

That stops runaway templates in the ordinary ways; it is no substitute for a separate process with
memory limits when a template is known to be hostile.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer


@dataclass(slots=True, frozen=True)
class RenderLimits:
    """What one rendering may use.

    Attributes:
        max_chars: characters of output and of any string on the way to it.
        max_seconds: wall time.
    """

    max_chars: int = 16 * 2**20
    max_seconds: float = 10.0


class TemplateRefusal(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class LimitExceeded(SecurityError):
    """The template used more than :class:`RenderLimits` allows."""


# (deadline on time.monotonic(), max_chars, max_seconds) of the rendering under way.
_BUDGET: ContextVar[tuple[float, int, float]] = ContextVar("fastinfer_render_budget")
_MAX_INT_BITS = 1 << 16
_MAX_WIDTH = 1000
# Methods that only pad or re-encode; with a large argument each is a memory bomb.
_DENIED_METHODS = frozenset(
    {"center", "expandtabs", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill"}
)
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4,})")
_WIDE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{4,})")


@contextmanager
def render_budget(limits: RenderLimits) -> Iterator[None]:
    """Everything a :class:`ChatEnvironment` does inside counts against these limits."""
    deadline = time.monotonic() + limits.max_seconds
    token = _BUDGET.set((deadline, limits.max_chars, limits.max_seconds))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def _tick() -> None:
    deadline, _, seconds = _BUDGET.get()
    if time.monotonic() > deadline:
        raise LimitExceeded(f"it ran longer than {seconds:g} seconds")


def _check_size(size: int) -> None:
    limit = _BUDGET.get()[1]
    if size > limit:
        raise LimitExceeded(f"it built more than {limit} characters or items")


def _check_width(value: Any) -> None:
    if isinstance(value, int) and abs(value) > _MAX_WIDTH:
        raise LimitExceeded(f"it asked for a width of {value}, more than {_MAX_WIDTH}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Sandbox with the names and filters that chat templates written for transformers expect."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        for name, function in self.filters.items():
            self.filters[name] = _guard_filter(name, function)
        self.filters["tojson"] = _to_json
        self.globals.pop("lipsum", None)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_DictFactory(),
            namespace=_Namespace,
        )

    def compile_chat(self, source: str) -> jinja2.Template:
        """Compile a template with the checks above woven in."""
        return self.from_string(_Weaver(self).visit(self.parse(source)))

    # ---- hooks of the sandbox ---------------------------------------------------------------

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _DENIED_METHODS and isinstance(obj, (str, bytes, int)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            method = getattr(__obj, "__name__", "")
            if method == "join" and args:
                args = (_check_join(owner, args[0]), *args[1:])
            elif method == "replace" and len(args) >= 2:
                _check_replace(owner, args[0], args[1])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "%":
            _check_percent(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits, more = left.bit_length(), right.bit_length()
            growth = {"*": bits + more, "**": bits * max(right, 0), "+": 0}[operator]
            if growth > _MAX_INT_BITS:
                raise LimitExceeded(f"it computed an integer of more than {_MAX_INT_BITS} bits")
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(count, int) and hasattr(sequence, "__len__"):
                    _check_size(len(sequence) * count)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(str(value.__self__)):
            raise LimitExceeded("it formatted with a computed width or one of four digits or more")
        return wrapped

    def concat(self, parts: Iterable[str]) -> str:
        """Joins rendered pieces: the output, a macro's result, a block assignment."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            _check_size(size)
            kept.append(part)
        _tick()
        return "".join(kept)

    # ---- called from woven code -------------------------------------------------------------

    def tick(self) -> None:
        """Does nothing: being called checks the deadline."""

    def concat_values(self, *values: Any) -> str:
        """The ``~`` operator."""
        return self.concat(map(str, values))


class _Weaver(NodeTransformer):
    """Puts a checked call into every loop body and in place of every ``~``."""

    def __init__(self, environment: ChatEnvironment) -> None:
        self._environment = environment

    def _call(self, name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
        return call.set_lineno(lineno).set_environment(self._environment)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.ExprStmt(self._call("tick", [], node.lineno))
        node.body.insert(0, call.set_lineno(node.lineno).set_environment(self._environment))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat_values", node.nodes, node.lineno)


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``: marks what the assistant wrote, for training.

    Here it only opens a scope, as the macro behind it does in transformers.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _DictFactory:
    """``dict(...)`` and ``dict.fromkeys`` without handing out the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """jinja2's ``namespace`` without underscore names, which Python looks up on its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it set the underscore name {name!r} on a namespace")


def _raise_exception(message: Any = "") -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    _tick()
    _check_width(len(indent) if isinstance(indent, str) else indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# ---- filters and methods of known growth ----------------------------------------------------


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # jinja2 passes a context, an evaluation context or the environment first where marked so.
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _tick()
        values = args[skip:]
        if name in ("center", "indent", "batch", "slice"):
            for value in (*values[1:], *kwargs.values()):
                _check_width(len(value) if isinstance(value, str) else value)
        elif name == "replace" and len(values) >= 3:
            _check_replace(str(values[0]), str(values[1]), str(values[2]))
        elif name == "join" and values:
            glue = str(values[1]) if len(values) > 1 else str(kwargs.get("d", ""))
            items = _check_join(glue, values[0])
            args = (*args[:skip], items, *values[1:])
        elif name == "format" and values:
            _check_percent(values[0])
        return function(*args, **kwargs)

    return guarded


def _check_percent(template: Any) -> None:
    if isinstance(template, bytes):
        template = template.decode("latin-1")
    if isinstance(template, str) and _WIDE_PERCENT.search(template):
        raise LimitExceeded("it formatted with a computed width or one of four digits or more")


def _check_replace(text: str | bytes, old: Any, new: Any) -> None:
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        _check_size(len(text) + text.count(old) * len(new))


def _check_join(glue: str | bytes, items: Any) -> list[Any]:
    items = list(items)
    strings = sum(len(item) for item in items if isinstance(item, (str, bytes)))
    _check_size(strings + len(glue) * len(items))
    return items
