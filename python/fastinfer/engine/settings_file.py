"""Settings in a file: what `fastinfer tune` writes, and `--config` and `LLM.from_config` read.

    {"fastinfer_settings": {"max_num_seqs": 64, ...}, ...}

Everything beside the settings is for people: what they were tuned for, what was measured.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .config import EngineConfig

FILE_KEY = "fastinfer_settings"
_NOT_SETTINGS = {"model", "tokenizer", "device", "load_format", "progress"}  # the user's to say


def write_settings(path: str | os.PathLike[str], settings: dict[str, Any], **about: Any) -> None:
    """Write such a file; `about` says where the settings come from."""
    document = {FILE_KEY: settings, **about}
    Path(path).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in such a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none, or names a setting that there is not.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} must be a JSON file, got {error}") from None
    settings = document.get(FILE_KEY) if isinstance(document, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(f"config: {path} must hold an object {FILE_KEY!r}, as `tune` writes it")
    known = set(EngineConfig.__dataclass_fields__) - _NOT_SETTINGS
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"config: {path} holds {unknown[0]!r}, which is not a setting")
    return settings
