"""What becomes of a prompt: its completions' text and log-probabilities, on the way to the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .outputs import CompletionOutput, Logprob, RequestOutput
from .request import Request
from .sampler import SampleResult


@dataclass(slots=True, eq=False)
class Completion:
    """One of the n completions: the request behind it and everything derived from its tokens.

    Args:
        request: The scheduler's view.
        index: Which of the n.
        detokenizer: Turns tokens into text and finds stop strings; None without a tokenizer.
        token_bytes: What a token adds to a text; None without a tokenizer.
    """

    request: Request
    index: int
    detokenizer: Any | None = None
    token_bytes: Callable[[int], bytes] | None = None
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    sent_text: int = 0
    sent_tokens: int = 0
    sent_end: bool = False

    def take(self, result: SampleResult, row: int) -> str | None:
        """Follow up on the tokens just appended; returns the stop string they complete, if any.

        Tokens behind a stop string are taken back: with drafts a step may have brought some.
        """
        request = self.request
        for left in range(request.metrics.token_counts[-1] - 1, -1, -1):
            stop = self._take_one(result, row, len(request.tokens) - 1 - left, last=left == 0)
            if stop is not None:
                request.drop_last(left)
                return stop
            row += 1
        return None

    def _take_one(self, result: SampleResult, row: int, at: int, *, last: bool) -> str | None:
        request = self.request
        token = request.tokens[at]
        if request.sampling.logprobs is not None:
            self._take_logprobs(result, row, token)
        if self.detokenizer is None:
            return None
        # at a stop token, which is not part of the text
        ends = last and request.finish_reason == "stop"
        if not ends or request.sampling.include_stop_str_in_output:
            self.text += self.detokenizer.append(token)
        if self.detokenizer.stop_reason is not None or (last and request.finish_reason is not None):
            self.flush()
        return self.detokenizer.stop_reason

    def flush(self) -> None:
        """Let go of text that was held back because more tokens could have changed it."""
        if self.detokenizer is not None:
            self.text += self.detokenizer.finish()

    def _take_logprobs(self, result: SampleResult, row: int, token: int) -> None:
        if self.logprobs is None:
            self.logprobs, self.cumulative_logprob = [], 0.0
        assert result.logprobs is not None and self.cumulative_logprob is not None
        self.cumulative_logprob += result.logprobs[row]
        wanted = self.request.sampling.logprobs or 0
        entry = {token: Logprob(result.logprobs[row], None, self._decoded(token))}
        if result.top_ids is not None and result.top_logprobs is not None:
            # others of the batch may have asked for more
            best = zip(result.top_ids[row][:wanted], result.top_logprobs[row], strict=False)
            for rank, (other, value) in enumerate(best, start=1):
                if other == token:
                    entry[token].rank = rank
                else:
                    entry[other] = Logprob(value, rank, self._decoded(other))
        self.logprobs.append(entry)

    def _decoded(self, token: int) -> str | None:
        if self.token_bytes is None:
            return None
        return self.token_bytes(token).decode("utf-8", "replace")

    @property
    def has_news(self) -> bool:
        """Whether `output(delta=True)` would say anything new."""
        unsent = self.sent_tokens < self.request.num_output or self.sent_text < len(self.text)
        return unsent or (self.request.finished and not self.sent_end)

    def output(self, *, delta: bool) -> CompletionOutput:
        """Everything so far, or what has come since the last call with `delta`."""
        tokens = self.request.output_token_ids
        text_from = self.sent_text if delta else 0
        tokens_from = self.sent_tokens if delta else 0
        if delta:
            self.sent_text, self.sent_tokens = len(self.text), len(tokens)
            self.sent_end = self.request.finished
        return CompletionOutput(
            index=self.index,
            text=self.text[text_from:],
            token_ids=tokens[tokens_from:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[tokens_from:],
            finish_reason=self.request.finish_reason if self.request.finished else None,
            stop_reason=self.request.stop_reason,
            metrics=self.request.metrics,
        )


@dataclass(slots=True, eq=False)
class Generation:
    """A prompt with its n completions; `error` says why it was aborted, if a step failed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    completions: list[Completion] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return all(completion.request.finished for completion in self.completions)

    @property
    def has_news(self) -> bool:
        """Whether a streaming reader has something to read."""
        return any(completion.has_news for completion in self.completions)

    def output(self, *, delta: bool = False) -> RequestOutput:
        """Everything so far, or only what is new."""
        chosen = [c for c in self.completions if c.has_news or not delta]
        first = self.completions[0].request.metrics
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output(delta=delta) for completion in chosen],
            finished=self.finished,
            metrics=first,
            num_cached_tokens=first.num_cached_tokens,
        )
