"""Chat templates: a list of messages -> the prompt string or ids a chat model was trained on.

The template language and the names a template may use are those of transformers'
``apply_chat_template``, so that a checkpoint's own template gives the same string here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from .base import Tokenizer
from .limits import LimitExceeded, RenderLimits, render_budget
from .sandbox import ChatEnvironment, TemplateRefusal

_MAX_TEMPLATE_CHARS = 2**20
_MAX_DEPTH = 64


class ChatTemplateError(ValueError):
    """There is no chat template, it cannot be rendered, or the messages do not fit it."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    limits: RenderLimits | None = None,
    **variables: Any,
) -> str:
    """Render a conversation with the checkpoint's chat template.

    Args:
        tokenizer: gives the template and the special tokens it may name.
        messages: {"role": ..., "content": ...} mappings; an assistant's may have "tool_calls"
            instead of content. Keys whose value is None count as absent.
        tools: JSON schemas of the functions the model may call.
        documents: mappings with "title" and "text" for templates that retrieve.
        chat_template: a template to use instead, or the name of one of several templates.
        add_generation_prompt: end with the header of the assistant's turn.
        limits: bounds on output and time.
        **variables: anything else the template reads (``enable_thinking=False``).

    Returns:
        The prompt. It usually spells out BOS: encode it without adding special tokens.

    Raises:
        ChatTemplateError: no template; malformed messages; the template refuses the conversation,
            fails, tries to leave the sandbox or exceeds a limit.
    """
    limits = limits or RenderLimits()
    arguments: dict[str, Any] = {
        **tokenizer.named_special_tokens,
        **{name: _plain(value, name) for name, value in variables.items()},
        "messages": _check_messages(messages),
        "tools": _check_list(tools, "tools"),
        "documents": _check_list(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    source = select_template(tokenizer, chat_template, has_tools=tools is not None)
    try:
        with render_budget(limits):
            return _compile(source).render(arguments)
    except TemplateRefusal as error:
        raise ChatTemplateError(
            f"render_chat: messages must suit the chat template, which refused them: {error}"
        ) from error
    except LimitExceeded as error:
        raise ChatTemplateError(
            f"render_chat: the chat template must stay within its limits, but {error}; pass "
            "another chat_template=..., or wider limits=RenderLimits(...) if this one is trusted"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"render_chat: the chat template must be valid jinja2, got {error.message} at line "
            f"{error.lineno}; pass chat_template=... to replace it"
        ) from error
    except Exception as error:  # whatever a template makes Python raise is the template's fault
        detail = str(error) or type(error).__name__
        raise ChatTemplateError(
            f"render_chat: the chat template must render these messages, got {detail}; "
            "check the messages' keys, or pass chat_template=... to replace it"
        ) from error


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any
) -> list[int]:
    """Render a conversation and encode it, adding no special tokens beyond the template's own.

    Args:
        tokenizer: as for :func:`render_chat`.
        messages: as for :func:`render_chat`.
        **options: as for :func:`render_chat`.

    Returns:
        The prompt's token ids.

    Raises:
        ChatTemplateError: as for :func:`render_chat`.
    """
    return tokenizer.encode(render_chat(tokenizer, messages, **options), add_special_tokens=False)


def select_template(tokenizer: Tokenizer, wanted: str | None, *, has_tools: bool) -> str:
    """The template text to use: the wanted one, else "tool_use" with tools, else the default."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if wanted is not None:
            return own.get(wanted, wanted)
        if has_tools and "tool_use" in own:
            return own["tool_use"]
        if "default" in own:
            return own["default"]
        raise ChatTemplateError(
            "render_chat: chat_template must name one of the checkpoint's templates "
            f"{sorted(own)}, got None; it has no default"
        )
    if wanted is not None:
        return wanted
    if own is None:
        raise ChatTemplateError(
            "render_chat: the checkpoint must have a chat template, got none in "
            "chat_template.jinja or tokenizer_config.json; pass chat_template=..., or give a plain "
            "prompt if this is a base model"
        )
    return own


@functools.lru_cache(maxsize=1)
def _environment() -> ChatEnvironment:
    return ChatEnvironment()


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise LimitExceeded(f"its source has more than {_MAX_TEMPLATE_CHARS} characters")
    return _environment().compile_chat(source)


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            "render_chat: messages must be a list of {'role', 'content'} mappings, got "
            f"{type(messages).__name__}; wrap a single prompt as "
            "[{'role': 'user', 'content': prompt}]"
        )
    if not messages:
        raise ChatTemplateError(
            "render_chat: messages must hold at least one message, got none; "
            "add {'role': 'user', 'content': ...}"
        )
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(
            f"render_chat: {where} must be a mapping with 'role' and 'content', got "
            f"{type(message).__name__}; write {{'role': 'user', 'content': ...}}"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ChatTemplateError(
            f"render_chat: {where}['role'] must be a non-empty string, got {role!r}; "
            "use 'system', 'user', 'assistant' or 'tool'"
        )
    if content is None and message.get("tool_calls") is None:
        raise ChatTemplateError(
            f"render_chat: {where} must have 'content' (or 'tool_calls'), got the keys "
            f"{sorted(map(str, message))}; add the text as 'content'"
        )
    if content is not None and not isinstance(content, (str, list, tuple, Mapping)):
        raise ChatTemplateError(
            f"render_chat: {where}['content'] must be a string, a list of parts or a mapping, got "
            f"{type(content).__name__}; convert it with str()"
        )
    # Templates ask "is defined" of a key far more often than "is none".
    return {
        str(key): _plain(value, f"{where}[{key!r}]")
        for key, value in message.items()
        if value is not None
    }


def _check_list(values: Any, name: str) -> list[Any] | None:
    if values is None:
        return None
    valid = isinstance(values, Sequence) and all(isinstance(value, Mapping) for value in values)
    if not valid:
        raise ChatTemplateError(
            f"render_chat: {name} must be a list of mappings, got {values!r:.80}; "
            "pass functions as their JSON schema"
        )
    return [_plain(value, f"{name}[{i}]") for i, value in enumerate(values)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain JSON types: nothing with methods of its own reaches a template."""
    if depth > _MAX_DEPTH:
        raise ChatTemplateError(
            f"render_chat: {where} must be nested at most {_MAX_DEPTH} deep, got more; flatten it"
        )
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass (an enum, say) is reduced to its value
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {
            _plain(key, where, depth + 1): _plain(item, where, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise ChatTemplateError(
        f"render_chat: {where} must be made of strings, numbers, lists and mappings, got "
        f"{type(value).__name__}; convert it first"
    )
