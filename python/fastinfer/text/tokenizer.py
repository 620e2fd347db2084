"""Finds the tokenizer of a checkpoint folder and loads it."""

from __future__ import annotations

import os
from pathlib import Path

from .base import Tokenizer, TokenizerError, TokenizerNotFoundError
from .files import read_settings

__all__ = ["Tokenizer", "TokenizerError", "TokenizerNotFoundError", "load_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder.

    ``tokenizer.json`` is read by the ``tokenizers`` package, exactly as it is written; without it,
    ``tokenizer.model`` is read by ``sentencepiece``. Special tokens and the chat template come
    from the files beside it. No code from the folder is run.

    Args:
        path: folder in the Hugging Face layout.

    Returns:
        The tokenizer.

    Raises:
        TokenizerNotFoundError: no folder there, or no tokenizer in it.
        TokenizerDependencyError: ``tokenizer.model`` without the sentencepiece package.
        TokenizerError: a file is damaged or contradicts another.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TokenizerNotFoundError(
            f"load_tokenizer: path must be a checkpoint folder, got {str(folder)!r}, which is no "
            "folder; download the checkpoint first"
        )
    if (folder / "tokenizer.json").is_file():
        from .tokenizer_json import JsonTokenizer

        return JsonTokenizer(folder / "tokenizer.json", read_settings(folder))
    if (folder / "tokenizer.model").is_file():
        from .sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(folder / "tokenizer.model", read_settings(folder))
    raise TokenizerNotFoundError(
        f"load_tokenizer: {str(folder)!r} must hold tokenizer.json or tokenizer.model, got neither;"
        " download one of them (transformers' save_pretrained writes tokenizer.json), or give "
        "prompts as lists of token ids, which need no tokenizer"
    )
