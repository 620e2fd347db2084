"""Incremental detokenization of one request, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from .base import Tokenizer


class IncrementalDetokenizer:
    """Turns the ids of one request into text as they come.

    No output ever ends inside a character: bytes of an unfinished one wait for the next token, and
    come out as U+FFFD once they are known to be broken or at :meth:`finish`. Text that might be the
    beginning of a stop string waits too. The concatenated outputs do not depend on how the text was
    cut into tokens. Where several stop strings match, the one that is complete first counts, and
    among those the longest.

    A run of byte-fallback tokens that is not UTF-8 is repaired character by character, as
    sentencepiece does; the tokenizers package gives up on the whole run, which no stream can, since
    it has printed the run's first characters by then.

    Args:
        tokenizer: from :func:`fastinfer.text.load_tokenizer`.
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the text, one or several.
        include_stop_str: keep the stop string at the end of the text.
        prompt_token_ids: what the ids continue. With them the first word keeps its leading space;
            without, the text starts as ``tokenizer.decode(ids)`` does.

    Raises:
        ValueError: a stop string is empty or not a string.
    """

    __slots__ = (
        "_finished",
        "_held",
        "_include_stop_str",
        "_matcher",
        "_parts",
        "_stream",
        "stop_reason",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: str | Sequence[str] | None = None,
        include_stop_str: bool = False,
        *,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> None:
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        for text in stops:
            if not isinstance(text, str) or not text:
                raise ValueError(
                    f"IncrementalDetokenizer: stop must be non-empty strings, got {text!r}; "
                    "leave it out to stop nowhere"
                )
        self._stream = tokenizer.stream(skip_special_tokens)
        if prompt_token_ids is not None:
            self._stream.prime(prompt_token_ids)
        self._matcher = StopMatcher(stops) if stops else None
        self._include_stop_str = include_stop_str
        self._held = ""
        self._parts: list[str] = []
        self._finished = False
        self.stop_reason: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; :attr:`stop_reason` is that string."""
        return self.stop_reason is not None

    @property
    def text(self) -> str:
        """All the text returned so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain ("" once stopped).

        Raises:
            ValueError: :meth:`finish` was called before.
        """
        if self.stopped:
            return ""
        if self._finished:
            raise ValueError(
                "IncrementalDetokenizer.append: the text must be open, got a finished one; "
                "make a new detokenizer for the next request"
            )
        return self._accept(self._stream.push(token_id))

    def finish(self) -> str:
        """No more ids will come: return everything held back. Later calls return ""."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        text = self._accept(self._stream.flush())
        if not self.stopped and self._held:
            text += self._emit(self._held)
            self._held = ""
        return text

    def _accept(self, new: str) -> str:
        if not new:
            return ""
        if self._matcher is None:
            return self._emit(new)
        pending = self._held + new
        hit = self._matcher.feed(new)
        if hit is not None:
            consumed, self.stop_reason = hit
            end = len(self._held) + consumed
            self._held = ""
            keep = end if self._include_stop_str else end - len(self.stop_reason)
            return self._emit(pending[:keep])
        safe = len(pending) - self._matcher.longest_prefix
        self._held = pending[safe:]
        return self._emit(pending[:safe])

    def _emit(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


class StopMatcher:
    """Finds stop strings in a stream of text, in constant amortised time per character and string.

    Args:
        stops: the stop strings, none empty.

    Reference:
        Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6 (1977).
    """

    __slots__ = ("_failures", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first, so that of two that end together the longer one is found.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    @property
    def longest_prefix(self) -> int:
        """Length of the longest tail of the text so far that begins a stop string."""
        return max(self._states)

    def feed(self, text: str) -> tuple[int, str] | None:
        """Read text; at the first match return (characters read up to its end, stop string)."""
        for position, char in enumerate(text, 1):
            for index, stop in enumerate(self._stops):
                state = self._states[index]
                while state and stop[state] != char:
                    state = self._failures[index][state - 1]
                if stop[state] == char:
                    state += 1
                    if state == len(stop):
                        return position, stop
                self._states[index] = state
        return None


@lru_cache(maxsize=64)  # the n completions of a prompt have the same stop strings
def _failure_table(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest border."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
