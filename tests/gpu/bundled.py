"""The bundled model and its stories, for tests that run it on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fastinfer.text import load_tokenizer
from helpers import devices

TINY = Path(__file__).parents[2] / "examples" / "tiny"
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        any("cuda" not in devices(op) for op in ("flash_attn_kvcache", "sample")),
        reason="there is no GPU",
    ),
]


def story_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """The first tokens of held-out stories, one of each length."""
    tokenizer = load_tokenizer(TINY / "model")
    stories = TINY.joinpath("heldout.txt").read_text(encoding="utf-8").split("<|begin|>")[1:]
    return [tokenizer.encode(s)[:n] for s, n in zip(stories, lengths, strict=False)]
