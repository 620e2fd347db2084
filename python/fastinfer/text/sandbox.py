"""The jinja2 environment chat templates run in.

A template comes with the checkpoint, so it is untrusted input. jinja2's immutable sandbox keeps it
away from Python's internals and from changing its arguments. What it does not bound is work, so on
top of it here, by the checks of ``limits.py``:

* a deadline, checked at every loop iteration, call, filter, operator and concatenation;
* a limit on every string or list that one of these builds, and on the output.

That stops runaway templates in the ordinary ways. It is no substitute for a separate process with
memory limits when a template is known to be hostile: lists nested in themselves many times over
still print without bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .limits import (
    check_binop,
    check_format,
    check_join,
    check_replace,
    check_result,
    check_size,
    check_width,
    guard_filter,
    tick,
)


class TemplateRefusal(jinja2.TemplateError):
    """The template called ``raise_exception``."""


# No chat template needs these, and with large arguments each is a memory bomb.
_DENIED_METHODS = frozenset(
    {"center", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"}
)
_DENIED_FILTERS = ("urlize", "wordwrap", "xmlattr")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Sandbox with the names and filters that chat templates written for transformers expect."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        for name in _DENIED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: guard_filter(name, call) for name, call in self.filters.items()}
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_DictFactory(),
            namespace=_Namespace,
        )

    def compile_chat(self, source: str) -> jinja2.Template:
        """Compile a template with the checks woven in."""
        return self.from_string(_Weaver(self).visit(self.parse(source)))

    # ---- hooks of jinja2 and its sandbox ----------------------------------------------------

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _DENIED_METHODS and isinstance(obj, (str, bytes, int)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 would hand out an undefined value, which prints as nothing.
        raise SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe"
        )

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            method = getattr(__obj, "__name__", "")
            if method == "join" and args:
                args = (check_join(owner, args[0]), *args[1:])
            elif method == "replace" and len(args) >= 2:
                check_replace(owner, args[0], args[1])
        return check_result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        tick()
        check_binop(operator, left, right)
        return check_result(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, (*args, kwargs), percent=False)
            return wrapped(*args, **kwargs)

        return formatted

    def concat(self, parts: Iterable[str]) -> str:
        """Joins rendered pieces: the output, a macro's result, a block assignment."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            check_size(size)
            kept.append(part)
        tick()
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

    def _call(self, name: str, arguments: list[nodes.Expr], lineno: int) -> Any:
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

    Here it only opens a scope, as it does in transformers.
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
    check_format(format, (), percent=True)
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    check_width(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
