"""What the user gets back. Field names as in vLLM. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from .metrics import RequestMetrics


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    It belongs to the distribution the token was drawn from: after penalties, temperature and
    filters. `rank` is 1 for the most likely token, None when the token is not among those asked
    for. `decoded_token` is what the token adds to a text that has begun, with its leading space;
    U+FFFD stands in it for a part of a character.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt, so far or complete.

    Args:
        index: Which of the n completions.
        text: Generated text; what is new in it when streaming.
        token_ids: Generated tokens, the stopping one included; the new ones when streaming.
        cumulative_logprob: Sum over all tokens so far, if log-probabilities were asked for.
        logprobs: One dict per token of `token_ids`, from token id to `Logprob`.
        finish_reason: "stop", "length", "abort", or None while it goes on.
        stop_reason: The stop string or stop token id; None for the model's own end.
        metrics: Its timeline.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions.

    Args:
        request_id: Chosen by the engine.
        prompt: The prompt as text, None when it was given as token ids.
        prompt_token_ids: The prompt as tokens.
        outputs: One entry per completion; when streaming, those that have something new.
        finished: Whether all of them are complete.
        metrics: Timeline of the first completion.
        num_cached_tokens: Prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first completion in `outputs`, empty when there is none."""
        return self.outputs[0].text if self.outputs else ""

    def __str__(self) -> str:
        return self.text
