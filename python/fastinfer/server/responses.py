"""The JSON objects of the API, made of the engine's outputs."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ..engine.outputs import CompletionOutput, Logprob, RequestOutput

Json = dict[str, Any]
_LONGEST_ERROR = 500  # characters
_FLOOR = -9999.0  # what the API shows for a token that could not have been drawn: JSON has no -inf


class Reply:
    """One answer in the making: its id and time, the model, what has been used.

    Args:
        model: Name to show.
        chat: Chat completion or completion.
        n: Completions per prompt; a choice's index is `n * prompt + completion`.
        return_token_ids: Choices also hold `token_ids`, as vLLM's do.
        token_bytes: Bytes of a token, which may be a part of a character; None: those of its text.
    """

    def __init__(
        self,
        model: str,
        *,
        chat: bool,
        n: int,
        return_token_ids: bool = False,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        self.chat = chat
        self._token_bytes = token_bytes
        self._return_token_ids = return_token_ids
        self.n = n
        kind = "chat.completion" if chat else "text_completion"
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._head: Json = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk = {**self._head, "object": "chat.completion.chunk" if chat else kind}
        self._offsets: dict[int, int] = {}
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._output_tokens = 0

    def count(self, prompt: int, output: RequestOutput) -> None:
        """Take note of what an output used."""
        self._prompt_tokens[prompt] = len(output.prompt_token_ids)
        self._cached_tokens[prompt] = output.num_cached_tokens
        self._output_tokens += sum(len(each.token_ids) for each in output.outputs)

    @property
    def usage(self) -> Json:
        """Tokens so far."""
        prompt_tokens = sum(self._prompt_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._output_tokens,
            "total_tokens": prompt_tokens + self._output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }

    def whole(self, outputs: Sequence[RequestOutput], echoes: Sequence[str]) -> Json:
        """The answer in one piece; `echoes` go in front of the texts, one per prompt."""
        choices = []
        for prompt, output in enumerate(outputs):
            self.count(prompt, output)
            for completion in output.outputs:
                choice = self._choice(prompt, completion)
                if self.chat:
                    choice["message"] = {
                        "role": "assistant",
                        "content": completion.text,
                        "refusal": None,
                    }
                else:
                    choice["text"] = echoes[prompt] + completion.text
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": self.usage}

    def opening(self, prompt: int, echo: str) -> list[Json]:
        """Chunks before the first token: the role of a chat answer, the echo of a prompt."""
        if not self.chat and not echo:
            return []
        first: Json = (
            {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": echo}
        )
        return [
            self._of(
                {"index": prompt * self.n + i, **first, "logprobs": None, "finish_reason": None}
            )
            for i in range(self.n)
        ]

    def chunks(self, prompt: int, output: RequestOutput) -> list[Json]:
        """What is new, one chunk per choice."""
        self.count(prompt, output)
        made = []
        for completion in output.outputs:
            told = completion.text or completion.logprobs or completion.finished
            if not (told or self._return_token_ids):
                continue  # half a character: its text comes with a later token
            choice = self._choice(prompt, completion)
            if self.chat:
                choice["delta"] = {"content": completion.text} if completion.text else {}
            else:
                choice["text"] = completion.text
            made.append(self._of(choice))
        return made

    def closing(self) -> Json:
        """The chunk with the usage, after the last choice."""
        return {**self._chunk, "choices": [], "usage": self.usage}

    def _of(self, choice: Json) -> Json:
        return {**self._chunk, "choices": [choice]}

    def _choice(self, prompt: int, completion: CompletionOutput) -> Json:
        index = prompt * self.n + completion.index
        logprobs: Json | None = None
        if completion.logprobs is not None:
            if self.chat:
                logprobs = {
                    "content": [
                        self._chat_position(token, entry)
                        for token, entry in zip(
                            completion.token_ids, completion.logprobs, strict=True
                        )
                    ],
                    "refusal": None,
                }
            else:
                logprobs = self._positions(index, completion)
        choice: Json = {
            "index": index,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }
        if self._return_token_ids:
            choice["token_ids"] = completion.token_ids
        if completion.stop_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        return choice

    def _positions(self, index: int, completion: CompletionOutput) -> Json:
        """Log-probabilities in the form of /v1/completions: parallel lists."""
        tokens, values, tops, offsets = [], [], [], []
        offset = self._offsets.get(index, 0)
        assert completion.logprobs is not None
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            text = _text(token, entry[token])
            tokens.append(text)
            values.append(_finite(entry[token].logprob))
            tops.append({_text(t, e): _finite(e.logprob) for t, e in entry.items()})
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _chat_position(self, token: int, entry: dict[int, Logprob]) -> Json:
        ranked = [each for each in entry.items() if each[1].rank is not None]
        ranked.sort(key=lambda each: each[1].rank or 0)
        drawn = self._chat_token(token, entry[token])
        return {**drawn, "top_logprobs": [self._chat_token(*each) for each in ranked]}

    def _chat_token(self, token: int, entry: Logprob) -> Json:
        text = _text(token, entry)
        data = text.encode() if self._token_bytes is None else self._token_bytes(token)
        return {"token": text, "logprob": _finite(entry.logprob), "bytes": list(data)}


def _text(token: int, entry: Logprob) -> str:
    return entry.decoded_token if entry.decoded_token is not None else f"token_id:{token}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _FLOOR


def error_json(message: str, *, kind: str, param: str | None = None, code: Any = None) -> Json:
    """The API's error object. What it says of the request is cut off somewhere; half a surrogate
    pair, which JSON can hold, is shown escaped.
    """
    if len(message) > _LONGEST_ERROR:
        message = message[:_LONGEST_ERROR] + " ..."
    message, param = _encodable(message), None if param is None else _encodable(param[:80])
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
