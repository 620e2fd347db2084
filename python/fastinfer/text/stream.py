"""Incremental decoding: token ids in one by one, complete characters out.

Two ways, chosen by the tokenizer:

* :class:`ByteStream` where a token stands for fixed bytes (byte-level BPE, sentencepiece and
  Llama-style byte fallback). An incremental UTF-8 decoder does the rest: exact, one dictionary
  look-up per token, and never more than three bytes held back.
* :class:`WindowStream` for every other decoder (Metaspace, WordPiece, ...): decode a short window
  of ids twice, once without and once with the new ids, and print the difference. The window slides
  whenever text comes out, and after a fixed number of ids at the latest.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .base import Tokenizer

REPLACEMENT = "\ufffd"
REPLACE_EACH_BYTE = "fastinfer_replace_each_byte"

# Ids with text that a stream takes from the end of a prompt: enough for any unfinished character,
# and independent of the prompt's length.
_PROMPT_TAIL = 32
# A UTF-8 character has at most 4 bytes and a token at least one, so a tail that is still broken
# after this many ids will stay broken.
_MAX_HELD_IDS = 8


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


# Byte-fallback tokenizers print one U+FFFD per bad byte; Python's own "replace" prints one per
# maximal broken sequence, which is what byte-level tokenizers do.
codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)


class TokenStream(Protocol):
    """One request's incremental decoder."""

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Continue after these ids: their text is not printed, but they are context."""

    def push(self, token_id: int) -> str:
        """Take one id; return the characters that are now complete."""

    def flush(self) -> str:
        """Return what was held back, broken bytes as U+FFFD."""


class ByteStream:
    """Exact stream for tokenizers whose tokens are fixed byte strings.

    Args:
        token_bytes: id -> the bytes it adds (b"" for skipped and unknown ids).
        errors: codec error handler for bytes that are not UTF-8.
        strip: leading spaces of the whole text to drop.
    """

    __slots__ = ("_strip", "_token_bytes", "_utf8")

    def __init__(self, token_bytes: Callable[[int], bytes], *, errors: str, strip: int = 0) -> None:
        self._token_bytes = token_bytes
        self._strip = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def prime(self, prompt_ids: Sequence[int]) -> None:
        tail = _tail(prompt_ids, lambda token_id: bool(self._token_bytes(token_id)))
        for token_id in tail:
            self.push(token_id)
        if len(tail) == _PROMPT_TAIL:
            self._strip = 0

    def push(self, token_id: int) -> str:
        data = self._token_bytes(token_id)
        if self._strip and data:
            data = self._strip_leading(token_id, data)
        return self._utf8.decode(data) if data else ""

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _strip_leading(self, token_id: int, data: bytes) -> bytes:
        while self._strip and data.startswith(b" "):
            data = data[1:]
            self._strip -= 1
        if data:
            self._strip = 0
        return data


class WindowStream:
    """Stream for any decoder, through ``tokenizer.decode`` on a sliding window of ids."""

    __slots__ = ("_held", "_ids", "_seen", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # the window: ids already printed (context), then held ids
        self._held = 0  # how many ids at the end of the window are held back
        self._seen = ""  # the text of the window's printed ids

    def prime(self, prompt_ids: Sequence[int]) -> None:
        self._ids = _tail(prompt_ids, self._adds_text)
        self._seen = self._decode(self._ids)

    def push(self, token_id: int) -> str:
        if not self._adds_text(token_id):
            return ""
        self._ids.append(token_id)
        self._held += 1
        text = self._decode(self._ids)
        overdue = self._held >= _MAX_HELD_IDS
        # An id that prints nothing yet (a lone space marker at the start) stays in the window: as
        # the only context of the next id it could change how that one decodes.
        if not overdue and (text.endswith(REPLACEMENT) or len(text) <= len(self._seen)):
            return ""
        return self._commit(text)

    def flush(self) -> str:
        return self._commit(self._decode(self._ids)) if self._held else ""

    def _adds_text(self, token_id: int) -> bool:
        return (
            token_id not in self._skip and self._tokenizer.convert_id_to_token(token_id) is not None
        )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _commit(self, text: str) -> str:
        new = text[len(self._seen) :]
        self._ids = self._ids[-self._held :]
        self._held = 0
        self._seen = self._decode(self._ids)
        return new


def _tail(prompt_ids: Sequence[int], adds_text: Callable[[int], bool]) -> list[int]:
    tail: list[int] = []
    for token_id in reversed(prompt_ids):
        if adds_text(token_id):
            tail.append(token_id)
            if len(tail) == _PROMPT_TAIL:
                break
    return tail[::-1]
