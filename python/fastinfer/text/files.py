"""Reads the small files next to a tokenizer: special tokens, added tokens, chat templates.

Checkpoints spread them over ``tokenizer_config.json``, ``special_tokens_map.json``,
``added_tokens.json``, ``chat_template.jinja`` and ``additional_chat_templates/``; older and newer
ones repeat each other. The first of that list which mentions a key decides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import TokenizerError


@dataclass(slots=True, frozen=True)
class AddedToken:
    """A token matched in the text before the tokenizer proper sees it."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(slots=True)
class TokenizerSettings:
    """What the side files say.

    Attributes:
        config: ``tokenizer_config.json`` as it stands.
        named: "bos_token" -> "<s>" and so on.
        added: tokens with a declared id.
        special: every special token (named ones and additional ones), by content.
        chat_template: one template, templates by name, or None.
    """

    config: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    added: dict[int, AddedToken] = field(default_factory=dict)
    special: dict[str, AddedToken] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(
            f"load_tokenizer: {path.name} must be valid JSON, got {error}; download it again"
        ) from error
    if not isinstance(value, dict):
        raise TokenizerError(
            f"load_tokenizer: {path.name} must hold a JSON object, got a "
            f"{type(value).__name__}; download it again"
        )
    return value


def read_settings(folder: Path) -> TokenizerSettings:
    """Everything the side files of a checkpoint folder say about its tokenizer."""
    config = read_json_object(folder / "tokenizer_config.json")
    merged = {**read_json_object(folder / "special_tokens_map.json"), **config}
    settings = TokenizerSettings(config=config)

    for token_id, value in (config.get("added_tokens_decoder") or {}).items():
        token = _added_token(value, f"added_tokens_decoder[{token_id}]", special=False)
        settings.added[_token_id(token_id, "tokenizer_config.json")] = token
    by_content = {token.content: token for token in settings.added.values()}

    for key, value in merged.items():
        # "add_bos_token": true ends the same way but is a switch.
        if key.endswith("_token") and isinstance(value, (str, dict)):
            token = _added_token(value, key)
            settings.named[key] = token.content
            settings.special[token.content] = by_content.get(token.content, token)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = merged.get(key) or []
        for value in values.values() if isinstance(values, dict) else values:
            token = _added_token(value, key)
            settings.special[token.content] = by_content.get(token.content, token)

    if not settings.added:
        for content, token_id in read_json_object(folder / "added_tokens.json").items():
            token = settings.special.get(content) or AddedToken(content, special=False)
            settings.added[_token_id(token_id, "added_tokens.json")] = token
    for token in settings.added.values():
        if token.special:
            settings.special.setdefault(token.content, token)

    settings.chat_template = read_chat_template(folder, config)
    return settings


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template(s) of a checkpoint: template files win over ``tokenizer_config.json``."""
    templates = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if templates:
        return templates["default"] if templates.keys() == {"default"} else templates

    value = config.get("chat_template")
    if isinstance(value, list):
        try:
            value = {str(entry["name"]): entry["template"] for entry in value}
        except (TypeError, KeyError):
            value = object()
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise TokenizerError(
        "load_tokenizer: chat_template in tokenizer_config.json must be a string or a list of "
        '{"name", "template"} objects, got something else; put the template in chat_template.jinja'
    )


def _added_token(value: Any, where: str, *, special: bool = True) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        return AddedToken(
            value["content"],
            # A named token is special whatever its own entry says.
            special=special or bool(value.get("special", False)),
            **{name: bool(value.get(name, False)) for name in flags},
        )
    raise TokenizerError(
        f"load_tokenizer: {where} must be a string or an object with a 'content' string, got "
        f"{value!r}; fix tokenizer_config.json or special_tokens_map.json"
    )


def _token_id(value: Any, where: str) -> int:
    try:
        token_id = int(value)
    except (TypeError, ValueError):
        token_id = -1
    if token_id < 0:
        raise TokenizerError(
            f"load_tokenizer: token ids in {where} must be non-negative integers, got {value!r}; "
            "download it again"
        )
    return token_id
